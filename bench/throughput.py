"""Questions in flight: how many a second, and how long each waits for its first token and its answer.

``dualfocus bench throughput`` asks the same questions about as many pictures, keeping 1, 2, 4, 8 and 16 of
them in flight: as one is answered the next is submitted. One in flight is one by one. Every setting runs once
a round, in turn, on an engine that keeps nothing of a question once it is answered, and has to give the same
answers. Random weights are made to say what the protocol usually hears (`scripted`).

- First token: from the submission to the first token of the macro answer.
- Padded: the share of the positions computed by the decoder that hold no token.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualfocus.bench import harness, savings
from dualfocus.bench.harness import Timing, Watch
from dualfocus.bench.scenes import held_out
from dualfocus.bench.scripted import ScriptedDecoder
from dualfocus.runtime import Bundle, Engine, FocusResult, ReplyToken
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.calls import group_rows
from dualfocus.runtime.protocol import focus
from dualfocus.runtime.request import Request
from dualfocus.runtime.result import Event
from dualfocus.train import scenes

if TYPE_CHECKING:
    from rich.console import Console

    from dualfocus.runtime.engines import Decoder
    from dualfocus.runtime.manifest import DecoderSpec

IN_FLIGHT = (1, 2, 4, 8, 16)
QUESTIONS = {False: 32, True: 16}  # asked a round: of trained weights (nano), and of random ones (edge)
WANTED = {False: 1.3, True: 1.1}  # of eight in flight, likewise


class CountingDecoder:
    """A decoder that counts the tokens it is given, and the positions that it computes for them."""

    def __init__(self, decoder: Decoder, spec: DecoderSpec) -> None:
        self._decoder, self._spec = decoder, spec
        self.tokens = self.positions = 0

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Any],
        logits_at: Sequence[Sequence[int]],
    ) -> Sequence[Any]:
        """As `engines.DecoderOf.extend`."""
        counts = [len(chunk) for chunk in embeddings]
        lengths = cache.lengths
        for group in group_rows(
            rows,
            counts,
            lengths,
            capacity=cache.capacity,
            max_rows=None,
            ragged_append=self._spec.ragged_append,
        ):
            of = [rows[at] for at in group]
            self.positions += (max(of) - min(of) + 1) * max(counts[at] for at in group)
        self.tokens += sum(counts)
        return self._decoder.extend(cache, rows, embeddings, logits_at)


class _Flight:
    """Asks all questions, `many` of them in flight."""

    def __init__(self, bundle: Bundle, asked: Sequence[savings.Asked], many: int) -> None:
        self._asked = asked
        self._many = many
        self._counting = CountingDecoder(bundle.decoder, bundle.manifest.decoder)
        self._engine = Engine(dataclasses.replace(bundle, decoder=self._counting), slots=2 * many, cache_mb=0)
        self.first_token: list[float] = []  # milliseconds
        self.answer: list[float] = []
        self.results: list[FocusResult] = []

    @property
    def padded(self) -> float:
        """The share of positions without a token."""
        return 1 - self._counting.tokens / self._counting.positions

    def run(self) -> None:
        """Ask them once."""
        waiting = list(enumerate(self._asked))[::-1]
        live: dict[Request, tuple[int, float]] = {}
        results: dict[int, FocusResult] = {}
        while waiting or live:
            while waiting and len(live) < self._many:
                at, asked = waiting.pop()
                begin = time.perf_counter()
                follow = partial(self._follow, begin, [])
                live[self._engine.submit(asked.picture, asked.question, focus, follow=follow)] = at, begin
            self._engine.step()
            for request in [request for request in live if request.done]:
                at, begin = live.pop(request)
                self.answer.append(1e3 * (time.perf_counter() - begin))
                results[at] = request.result
        self.results = [results[at] for at in range(len(results))]

    def _follow(self, begin: float, seen: list[Event], event: Event) -> None:
        if isinstance(event, ReplyToken) and event.reply == "macro" and not seen:
            seen.append(event)
            self.first_token.append(1e3 * (time.perf_counter() - begin))


def run(
    bundle: Bundle, rounds: int, threads: int | None, watch: Watch = lambda *_: None, *, spin: bool = True
) -> dict[str, Any]:
    """All that is measured, as the JSON object has it; `threads` and `spin` are the opened bundle's.

    RuntimeError if a setting gives another answer than one by one.
    """
    random = savings.is_random(bundle)
    asked = questions(bundle)
    if random:
        scripted = ScriptedDecoder(bundle.decoder)
        scripted.script = asked[0].script
        bundle = dataclasses.replace(bundle, decoder=scripted)
    flights = {many: _Flight(bundle, asked, many) for many in IN_FLIGHT}
    calls = {str(many): flight.run for many, flight in flights.items()}
    timings = harness.interleaved(calls, rounds, watch=watch)
    for many, flight in flights.items():
        for result, expected in zip(flight.results, flights[1].results, strict=True):
            savings.check_same(f"{many} in flight", result, expected)
    alone = timings["1"].median
    rows = {}
    for many, flight in flights.items():
        once = len(asked)  # of the round that is not timed
        timing = timings[str(many)]
        rows[str(many)] = {
            **dataclasses.asdict(timing),
            "questions_per_second": 1e3 * len(asked) / timing.median,
            "first_token": dataclasses.asdict(Timing.of(flight.first_token[once:])),
            "answer": dataclasses.asdict(Timing.of(flight.answer[once:])),
            "padded": flight.padded,
            "ratio": harness.wanted(alone / timing.median, at_least=WANTED[random] if many == 8 else None),
        }
    return harness.header("throughput", threads, spin=spin, manifest=bundle.manifest) | {
        "scripted": random,
        "rounds": rounds,
        "unit": "ms",
        "questions": len(asked),
        "in_flight": rows,
    }


def questions(bundle: Bundle) -> list[savings.Asked]:
    """The first held-out question about each of some scenes; of random weights, one with a script."""
    many = QUESTIONS[savings.is_random(bundle)]
    by_scene = itertools.groupby(held_out(16 * many), key=lambda question: question[0].seed)
    firsts = [next(group) for _, group in itertools.islice(by_scene, many)]
    pictures = [np.asarray(scenes.draw(scene)) for scene, _ in firsts]
    texts = [dialogue.question for _, dialogue in firsts]
    script: Mapping[int, int] = {}
    if savings.is_random(bundle):
        texts = [texts[0] + savings.HINT] * len(firsts)
        answers = savings.MACRO_ANSWER, savings.MICRO_ANSWER
        script = savings.script(bundle, texts[0], savings.BOXES[0], *answers)
    return [savings.Asked(picture, text, script) for picture, text in zip(pictures, texts, strict=True)]


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as a table for people."""
    from rich.table import Table

    harness.show_machine(result["machine"], console)
    console.print(
        f"{result['bundle']}: {result['questions']} questions a round, {result['rounds']} rounds",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    columns = ("in flight", "questions/s", "one by one", "first token", "p95", "answer", "p95", "padded")
    for column in columns:
        table.add_column(column, justify="right")
    for many, row in result["in_flight"].items():
        first, answer = row["first_token"], row["answer"]
        table.add_row(
            many,
            f"{row['questions_per_second']:.3g}",
            f"{row['ratio']['value']:.2f}\u00d7",
            *(f"{of[key]:.0f} ms" for of in (first, answer) for key in ("median", "p95")),
            f"{100 * row['padded']:.1f} %",
        )
    console.print(table)
    console.print(f"8 in flight: {harness.verdict(result['in_flight']['8']['ratio'])}")


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a table of the documentation."""
    lines = [
        "| in flight | questions/s | to one by one | first token, p50 / p95 | answer, p50 / p95 | padded |",
        "|---|---|---|---|---|---|",
    ]
    for many, row in result["in_flight"].items():
        cells = [many, f"{row['questions_per_second']:.3g}", f"{row['ratio']['value']:.2f}\u00d7"]
        cells += [f"{row[of]['median']:.0f} / {row[of]['p95']:.0f} ms" for of in ("first_token", "answer")]
        lines.append(f"| {' | '.join(cells)} | {100 * row['padded']:.1f} % |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Questions a second and the time of an answer over the questions in flight, as a picture at `path`."""
    from matplotlib import pyplot

    rows = result["in_flight"]
    many = [int(name) for name in rows]
    figure, (rate, wait) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    rate.plot(many, [row["questions_per_second"] for row in rows.values()], marker="o", color="#4477aa")
    rate.set_ylabel("questions/s")
    for of, colour in (("first_token", "#228833"), ("answer", "#ee6677")):
        medians = [row[of]["median"] for row in rows.values()]
        wait.plot(many, medians, marker="o", color=colour, label=of.replace("_", " "))
        wait.fill_between(many, medians, [row[of]["p95"] for row in rows.values()], color=colour, alpha=0.2)
    wait.set_ylabel("ms (median, and up to p95)")
    wait.legend()
    for axis in (rate, wait):
        axis.set_xscale("log", base=2)
        axis.set_xticks(many, [str(of) for of in many])
        axis.set_xlabel("questions in flight")
        axis.set_ylim(bottom=0)
    figure.suptitle(f"{result['bundle']}, {result['machine']['processor']}")
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
