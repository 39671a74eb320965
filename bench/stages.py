"""One question, every stage apart: where the time of an answer goes, from an encoded picture to the text.

``dualfocus bench stages`` asks one question, whose macro and micro answers differ, of a runner that keeps
nothing from one question to the next: the longest way through. Of trained weights it is the first such
question about the held-out scenes; random ones are made to say what the protocol usually hears
(`ScriptedDecoder`), about a picture of 12 megapixels. The stages are the runtime's own
(`FocusResult.times_ms`), with the picture's decoding before them; what lies between, such as writing the
prompts, is the rest: with it a round's stages add up to its total, though medians of many rounds need not.
macro and locate decode together, so that is one span.

- Time to first token: from the encoded picture and the question to the first token of the macro answer.
- Time per output token: of each reply, from its first token to its last, for every one after the first; as
  a reader of the stream sees it, so tokens that were forced or drafted come at once.
- Prefill, tokens/s: prompt tokens computed, over the stages that do so (prefill, micro prefill, select).
- Decode, tokens/s: tokens said in the decode stages, over those stages.
- First answer: what a process takes that is started for the purpose (`fresh`), files in the page cache.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from PIL import Image

from dualfocus.bench import energy, fresh, harness, savings
from dualfocus.bench.harness import Timing, Watch
from dualfocus.bench.scenes import held_out
from dualfocus.bench.scripted import ScriptedDecoder
from dualfocus.runtime import Bundle, DualFocus, Engine, ReplyToken, Stage, open_picture
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import DecoderOf
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.protocol import focus
from dualfocus.runtime.result import Event, FocusResult
from dualfocus.train import scenes

if TYPE_CHECKING:
    from rich.console import Console

Input = TypeVar("Input", bound=Sized)
Output = TypeVar("Output")

OPEN, REST = "decode_picture", "rest"  # what is not the runtime's stages
PREFILL, DECODE = ("prefill", "micro_prefill", "select"), ("decode", "micro_decode")
PIXELS = 12e6  # of the picture that random weights are asked about
QUALITY = 90  # of the pictures' JPEG
FRESH = 5  # processes started for the first answer


@dataclass(frozen=True)
class Subject:
    """What is asked: an encoded picture, a question, and for random weights a script."""

    file: bytes
    question: str
    script: Mapping[int, int]


@dataclass(frozen=True)
class Call:
    """A call of the decoder: for each of its `rows`, tokens it computed (`new`) and those before (`past`).

    `begin` and `end` are `time.perf_counter`'s.
    """

    stage: str
    begin: float
    end: float
    rows: tuple[int, ...]
    new: tuple[int, ...]
    past: tuple[int, ...]


class MeteredDecoder(Generic[Input, Output]):
    """A decoder that keeps account of its calls, under the `stage` that it is told."""

    def __init__(self, decoder: DecoderOf[Input, Output]) -> None:
        self._decoder = decoder
        self.stage = ""
        self.calls: list[Call] = []

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Input],
        logits_at: Sequence[Sequence[int]],
    ) -> Sequence[Output]:
        """As `engines.DecoderOf.extend`."""
        past = tuple(cache.lengths[row] for row in rows)
        begin = time.perf_counter()
        logits = self._decoder.extend(cache, rows, embeddings, logits_at)
        end = time.perf_counter()
        self.calls.append(Call(self.stage, begin, end, tuple(rows), tuple(map(len, embeddings)), past))
        return logits


@dataclass(frozen=True)
class Round:
    """A question asked once: milliseconds of the stages, which add up to `total`, and when what happened."""

    stages: Mapping[str, float]
    total: float
    begin: float
    entered: Sequence[tuple[str, float]]  # the stages again, as they began
    said: Sequence[tuple[str, str, float]]  # every token's reply, its stage, and when
    calls: Sequence[Call]
    result: FocusResult

    def said_in(self, reply: str) -> list[float]:
        """When the tokens of a reply were said."""
        return [at for name, _, at in self.said if name == reply]


class Asker:
    """Asks the subject over and over; nothing is kept from one time to the next."""

    def __init__(self, bundle: Bundle, subject: Subject) -> None:
        decoder = bundle.decoder
        if subject.script:
            decoder = ScriptedDecoder(decoder)
            decoder.script = subject.script
        self._subject = subject
        self._meter = MeteredDecoder(decoder)
        self._engine = Engine(dataclasses.replace(bundle, decoder=self._meter), cache_mb=0)

    def ask(self) -> Round:
        """Once more."""
        meter = self._meter
        meter.calls.clear()
        said: list[tuple[str, str, float]] = []
        begin = time.perf_counter()
        entered = [(OPEN, begin)]

        def follow(event: Event) -> None:
            match event:
                case Stage(name):
                    meter.stage = name
                    if name != "queue":  # nothing else is asked
                        entered.append((name, time.perf_counter()))
                case ReplyToken(reply):
                    said.append((reply, meter.stage, time.perf_counter()))

        picture = open_picture(self._subject.file)
        opened = time.perf_counter()
        result = self._engine.run(self._engine.submit(picture, self._subject.question, focus, follow=follow))
        total = 1e3 * (time.perf_counter() - begin)
        stages = {OPEN: 1e3 * (opened - begin), **result.times_ms}
        del stages["total"], stages["queue"]
        stages[REST] = total - sum(stages.values())
        return Round(stages, total, begin, entered, said, tuple(meter.calls), result)


def run(
    bundle: Bundle,
    rounds: int,
    threads: int | None,
    watch: Watch = lambda *_: None,
    *,
    spin: bool = True,
) -> dict[str, Any]:
    """All that is measured, as the JSON object has it; `threads` and `spin` are the opened bundle's.

    InputError for a trained bundle whose passes never disagree on the held-out questions. RuntimeError if a
    fresh process answers otherwise.
    """
    subject = find_subject(bundle, watch)
    asker = Asker(bundle, subject)
    asker.ask()  # not timed: first calls are slower
    asked = []
    with energy.Meter() as meter:
        for done in range(rounds):
            watch("asking", done, rounds)
            asked.append(asker.ask())
    answered = asked[0].result
    begun = begin_afresh(bundle, subject, (threads, spin), answered.answer, watch)
    with Image.open(io.BytesIO(subject.file)) as image:
        picture = {"width": image.width, "height": image.height, "format": image.format}
    result = harness.header("stages", threads, spin=spin, manifest=bundle.manifest) | {
        "scripted": bool(subject.script),
        "rounds": rounds,
        "unit": "ms",
        "picture": picture | {"bytes": len(subject.file)},
        "question": subject.question,
        "macro": answered.macro and answered.macro.text,
        "micro": answered.micro and answered.micro.text,
        **summarise(asked),
        "first_answer": begun["times_ms"],
        "memory": begun["memory"],
        "bundle_bytes": sum(entry.size for entry in bundle.manifest.files.values()),
    }
    if meter.joules is not None:
        result["joules_a_question"] = meter.joules / rounds
    return result


def find_subject(bundle: Bundle, watch: Watch = lambda *_: None) -> Subject:
    """What to ask: the macro and the micro answer will differ."""
    by_scene = itertools.groupby(held_out(savings.SEARCHED), key=lambda question: question[0].seed)
    if savings.is_random(bundle):
        _, group = next(by_scene)
        scene, dialogue = next(group)
        question = dialogue.question + savings.HINT
        script = savings.script(
            bundle, question, savings.BOXES[0], savings.MACRO_ANSWER, savings.MICRO_ANSWER
        )
        image = scenes.draw(scene)
        factor = (PIXELS / (image.width * image.height)) ** 0.5
        larger = image.resize((round(factor * image.width), round(factor * image.height)))
        return Subject(_encoded(larger), question, script)
    model = DualFocus(bundle)
    done = 0
    for _, group in by_scene:
        of_scene = list(group)
        file = _encoded(scenes.draw(of_scene[0][0]))
        session = model.session(open_picture(file))
        for _, dialogue in of_scene:
            watch("looking for a question", done, savings.SEARCHED)
            done += 1
            if savings.kind_of(session.ask(dialogue.question)) == "disagree":
                return Subject(file, dialogue.question, {})
    raise InputError(
        f"bench stages: among {savings.SEARCHED} held-out questions there is none on which this model's two "
        "passes disagree"
    )


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def summarise(asked: Sequence[Round]) -> dict[str, Any]:
    """Rounds, at least two, as the JSON object has them."""
    totals = [of.total for of in asked]
    names = list(asked[0].stages)
    rows = {}
    for name in names:
        times = [of.stages[name] for of in asked]
        calls = [call for call in asked[0].calls if call.stage == name]
        in_decoder = [sum(1e3 * (c.end - c.begin) for c in of.calls if c.stage == name) for of in asked]
        rows[name] = {
            **dataclasses.asdict(Timing.of(times)),
            "share": sum(times) / sum(totals),
            "decoder_calls": len(calls),
            "decoder_tokens": sum(sum(call.new) for call in calls),
            "decoder_share": sum(in_decoder) / sum(times) if calls else None,
        }
    counters = dataclasses.asdict(asked[0].result.counters)
    decoded = sum(stage in DECODE for _, stage, _ in asked[0].said)
    prefilling = [sum(of.stages[name] for name in PREFILL if name in of.stages) for of in asked]
    decoding = [sum(of.stages[name] for name in DECODE if name in of.stages) for of in asked]
    return {
        "total": dataclasses.asdict(Timing.of(totals)),
        "stages": rows,
        "time_to_first_token": _timing(asked, lambda of: of.said_in("macro")[0] - of.begin),
        "time_per_output_token": {
            reply: _timing(asked, lambda of, reply=reply: _mean_gap(of.said_in(reply)))  # type: ignore[misc]
            for reply in ("macro", "locate", "micro")
            if len(asked[0].said_in(reply)) > 1
        },
        "tokens_per_second": {
            "prefill": 1e3 * counters["tokens_prefilled"] / statistics.median(prefilling),
            "decode": 1e3 * decoded / statistics.median(decoding),
        },
        "tokens_said_in_decode": decoded,
        "counters": counters,
        "timeline": _timeline(sorted(asked, key=lambda of: of.total)[(len(asked) - 1) // 2]),
    }


def _timing(asked: Sequence[Round], seconds: Callable[[Round], float]) -> dict[str, float]:
    return dataclasses.asdict(Timing.of([1e3 * seconds(of) for of in asked]))


def _mean_gap(at: Sequence[float]) -> float:
    return (at[-1] - at[0]) / (len(at) - 1)


def _timeline(of: Round) -> dict[str, Any]:
    """A round, in milliseconds from its begin: for the picture of it."""

    def since(at: float) -> float:
        return 1e3 * (at - of.begin)

    return {
        "total": of.total,
        "stages": [[name, since(at)] for name, at in of.entered],
        "calls": [
            dataclasses.asdict(call) | {"begin": since(call.begin), "end": since(call.end)}
            for call in of.calls
        ],
    }


def begin_afresh(
    bundle: Bundle, subject: Subject, engines: tuple[int | None, bool], answer: str, watch: Watch
) -> dict[str, Any]:
    """First answers of fresh processes: times of the steps and of all, and the most memory that one took."""
    began = []
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.jpg"
        picture.write_bytes(subject.file)
        for done in range(FRESH):
            watch("starting afresh", done, FRESH)
            began.append(fresh.measure(picture, subject.question, bundle.path, *engines, subject.script))
    for of in began:
        if of["answer"] != answer:
            raise RuntimeError(f"a fresh process answers {of['answer']!r}, expected {answer!r}")
    steps = {step: [of["times_ms"][step] for of in began] for step in fresh.STEPS}
    steps["total"] = [sum(of["times_ms"].values()) for of in began]
    memory = {
        name: max(of[name] for of in began) for name in ("peak_rss", "rss_anon") if began[0][name] is not None
    }
    return {
        "times_ms": {step: dataclasses.asdict(Timing.of(times)) for step, times in steps.items()},
        "memory": memory,
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as tables for people."""
    from rich.table import Table

    harness.show_machine(result["machine"], console)
    picture = result["picture"]
    said = f"{result['question']!r} -> {result['macro']!r}, {result['micro']!r}"
    shown = f"{picture['format']} of {picture['width']} x {picture['height']}"
    console.print(f"{result['bundle']}, {result['precision']}: {said}; {shown}", markup=False)
    console.print(f"{result['rounds']} rounds")
    if result["scripted"]:
        console.print("Random weights: replies are made to be of the protocol's usual lengths.")
    table = Table(box=None, pad_edge=False)
    for column in ("", "ms", "p5", "p95", "share", "decoder tokens", "calls", "in the decoder"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["stages"].items():
        calls: list[str] = []
        if row["decoder_calls"]:
            calls = [str(row["decoder_tokens"]), str(row["decoder_calls"])]
            calls.append(f"{100 * row['decoder_share']:.1f} %")
        table.add_row(name.replace("_", " "), *_times(row), f"{100 * row['share']:.1f} %", *calls)
    table.add_row("total", *_times(result["total"]), "", style="bold")
    console.print(table)
    console.print()
    for name, fact in facts(result).items():
        console.print(f"{name}: {fact}", markup=False)


def _times(row: Mapping[str, float]) -> list[str]:
    return [f"{row[name]:.2f}" for name in ("median", "p5", "p95")]


def facts(result: Mapping[str, Any]) -> dict[str, str]:
    """What stands below the table: by name, a figure with its unit."""
    rates, first, memory = result["tokens_per_second"], result["first_answer"], result["memory"]
    steps = ", ".join(f"{step} {first[step]['median']:.0f}" for step in first if step != "total")
    replies = result["time_per_output_token"]
    found = {
        "time to first token": f"{result['time_to_first_token']['median']:.1f} ms",
        "time per output token": ", ".join(f"{name} {of['median']:.2f} ms" for name, of in replies.items()),
        "prefill": f"{rates['prefill']:.0f} tokens/s",
        "decode": f"{rates['decode']:.0f} tokens/s",
        "first answer from process start": f"{first['total']['median']:.0f} ms ({steps})",
        "bundle": f"{result['bundle_bytes'] / 1e6:.1f} MB",
    }
    if memory:
        found["memory of a process that answered"] = (
            f"{memory['peak_rss'] / 1e6:.0f} MB at the most; {memory['rss_anon'] / 1e6:.0f} MB of its own "
            "at the answer"
        )
    if "joules_a_question" in result:
        found["energy"] = f"{result['joules_a_question']:.2f} J a question, of the whole machine"
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The result as README's table."""
    lines = ["| | ms | p5 | p95 | share |", "|---|---|---|---|---|"]
    for name, row in result["stages"].items():
        cells = " | ".join([*_times(row), f"{100 * row['share']:.1f} %"])
        lines.append(f"| {name.replace('_', ' ')} | {cells} |")
    lines.append(f"| **total** | {' | '.join(_times(result['total']))} | |")
    lines.append("")
    lines += [f"- {name}: {fact}" for name, fact in facts(result).items()]
    return "\n".join(lines)


LANES = ("picture", "row 1: macro, candidate", "row 0: locate, micro, candidate")
COLOURS = {"picture": "#bbbbbb", "encode": "#228833", "prefill": "#4477aa", "decode": "#ee6677"}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A waterfall of the median round, and below it what each prompt found cached, as a picture at `path`."""
    from matplotlib import pyplot

    timeline = result["timeline"]
    figure, (stages, prompts) = pyplot.subplots(2, 1, figsize=(10, 6), height_ratios=(3, 2))
    edges = [*timeline["stages"], ["", timeline["total"]]]
    for (name, begin), (_, end) in itertools.pairwise(edges):
        stages.axvline(begin, color="#dddddd", linewidth=0.8, zorder=0)
        if not any(call["stage"] == name for call in timeline["calls"]):
            kind = "encode" if name.startswith("encode") else "picture"
            stages.barh(0, end - begin, left=begin, color=COLOURS[kind])
        if end - begin > 0.02 * timeline["total"]:
            text = f" {name.replace('_', ' ')}\n {end - begin:.1f}"
            stages.text(begin, -0.55, text, fontsize=7, va="bottom", rotation=30)
    for call in timeline["calls"]:
        kind = "decode" if call["stage"] in DECODE else "prefill"
        for row in call["rows"]:
            bar = {"left": call["begin"], "color": COLOURS[kind], "edgecolor": "white", "linewidth": 0.3}
            stages.barh(2 - row, call["end"] - call["begin"], **bar)
    stages.set_yticks(range(len(LANES)), LANES)
    stages.set_ylim(len(LANES) - 0.4, -1.2)
    stages.set_xlabel("ms")
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": len(COLOURS), "fontsize": 8}
    stages.legend(patches, list(COLOURS), **below)
    for i, (name, past, new) in enumerate(_prompts(timeline["calls"])):
        prompts.barh(i, past, color="white", edgecolor="#4477aa", hatch="///")
        prompts.barh(i, new, left=past, color="#4477aa")
        prompts.text(past + new, i, f" {past} reused, {new} computed", va="center", fontsize=8)
        prompts.text(0, i, f"{name} ", va="center", ha="right", fontsize=8)
    prompts.set_yticks([])
    prompts.invert_yaxis()
    prompts.margins(x=0.3)
    prompts.set_xlabel("tokens on the row: hatched, held already; filled, computed (drafts included)")
    figure.suptitle(
        f"{result['bundle']}, {result['machine']['processor']}: a question, {timeline['total']:.0f} ms"
    )
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def _prompts(calls: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Of each prompt, which may take several calls: its name, the tokens it found, and those it computed."""
    found: dict[tuple[str, int], list[int]] = {}
    for call in calls:
        if call["stage"] in PREFILL:
            for row, past, new in zip(call["rows"], call["past"], call["new"], strict=True):
                found.setdefault((call["stage"], row), [past, 0])[1] += new
    replies = {"prefill": iter(["macro", "locate"]), "micro_prefill": iter(["micro"])}
    return [
        (next(replies.get(stage, iter([f"select, row {row}"])), stage), past, new)
        for (stage, row), (past, new) in found.items()
    ]
