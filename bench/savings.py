"""What every exact saving is worth: a question from the plain protocol to all of them, one added a row.

``dualfocus bench savings`` times one question in all ways in turn, in one process. The savings are added one
after the other, for a first question, so that nothing is kept from before; the rows after them are one pass
alone, a second question about the same picture, and eight questions about eight pictures at once. Every way
is asked once before anything is timed, and has to give the same answer, box and tokens.

There are two cases, because what they save differs: where both passes agree the draft is the whole micro
answer, and nothing is scored; where they disagree the draft is of no use, and both candidates are scored. For
a trained bundle these are questions about the held-out scenes, the first of which it agrees or disagrees
with itself. A bundle of random weights (``dualfocus export --random``) would reply garbage of any length,
which is not what is to be timed: there `ScriptedDecoder` gives the logits a push, so that every reply is the
one and as long as the protocol's typical one (answers of three tokens, a well-formed box). What is computed,
and so what is timed, is the real model's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dualfocus.bench import harness
from dualfocus.bench.harness import Watch
from dualfocus.bench.scenes import held_out
from dualfocus.bench.scripted import ScriptedDecoder
from dualfocus.runtime import Bundle, DualFocus, Reference
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.grammar import Cursor, Grammar
from dualfocus.runtime.image import Picture, view, whole
from dualfocus.runtime.protocol import focus
from dualfocus.runtime.result import FocusResult
from dualfocus.runtime.sequence import embed
from dualfocus.runtime.turns import ImageToken, Turns
from dualfocus.runtime.work import Generate, Protocol, Steps, Task
from dualfocus.train import scenes

if TYPE_CHECKING:
    from rich.console import Console

PLAIN, MACRO, SECOND, SEVERAL = "plain", "macro only", "second question", "8 at once, each"
SAVINGS = ("images", "prefix", "batch", "forced", "draft")  # as added; what outlives a question is SECOND's
ALL = f"+ {SAVINGS[-1]}"  # the row that has them all
AT_ONCE = 8
SEARCHED = 400  # held-out questions among which a trained bundle's cases are looked for

COLUMNS = {
    "encodes": "vision_encodes",
    "prefilled": "tokens_prefilled",
    "reused": "tokens_reused",
    "forced": "tokens_forced",
    "drafted": "tokens_drafted",
    "accepted": "tokens_accepted",
    "steps": "decode_steps",
    "rows": "decode_rows",
}  # of the table: counters

Kind = Literal["agree", "disagree"]
KINDS: tuple[Kind, ...] = ("agree", "disagree")

# What random weights are made to say. The second question's region is another one.
BOXES = ((0.32, 0.41, 0.58, 0.67), (0.12, 0.23, 0.45, 0.61))
MACRO_ANSWER, MICRO_ANSWER = "two words", "other text"  # of each the first two tokens
HINT = "\nA single word."  # in place of the protocol's: macro's replies and locate's then stand apart


@dataclass(frozen=True)
class Asked:
    """A question about a picture, and for random weights the `script` that `ScriptedDecoder` follows."""

    picture: Picture
    question: str
    script: Mapping[int, int]


@dataclass(frozen=True)
class Case:
    """Questions about different pictures, and a `second` one about the first's, with another region."""

    several: tuple[Asked, ...]
    second: Asked


def is_random(bundle: Bundle) -> bool:
    """The bundle was made by ``dualfocus export --random``."""
    return bundle.manifest.source.get("checkpoint", "").startswith("random weights")


def run(
    bundle: Bundle,
    rounds: int,
    threads: int | None,
    watch: Watch = lambda *_: None,
    *,
    spin: bool = True,
) -> dict[str, Any]:
    """All that is measured, as the JSON object has it; `threads` and `spin` are the opened bundle's.

    InputError for a trained bundle without such questions among the held-out ones. RuntimeError if two ways
    do not give the same answer, box and tokens.
    """
    random = is_random(bundle)
    if random:
        bundle = dataclasses.replace(bundle, decoder=ScriptedDecoder(bundle.decoder))
    cases = scripted_cases(bundle) if random else found_cases(bundle, watch)
    result = harness.header("savings", threads, spin=spin, manifest=bundle.manifest) | {
        "scripted": random,
        "rounds": rounds,
        "unit": "ms",
        "fork": fork_cost(bundle, cases["agree"].several[0], rounds),
        "cases": {},
    }
    for kind, case in cases.items():
        result["cases"][kind] = _measure(bundle, kind, case, rounds, partial(_watch_case, watch, kind))
    return result


def _watch_case(watch: Watch, kind: Kind, doing: str, done: int, total: int) -> None:
    watch(f"{kind}: {doing}", done, total)


def _measure(bundle: Bundle, kind: Kind, case: Case, rounds: int, watch: Watch) -> dict[str, Any]:
    """One case: every row's times and counters, and the ratios."""
    ways = _Ways(bundle, case)
    results = {}
    for done, (name, ask) in enumerate(ways.rows.items()):
        watch(f"checking {name}", done, len(ways.rows))
        ways.before[name]()
        results[name] = ask()
    ways.check(results)
    timings = harness.interleaved(ways.rows, rounds, before=ways.before, warm=True, watch=watch)
    timings[SEVERAL] = timings[SEVERAL].each(AT_ONCE)
    rows = {
        name: dataclasses.asdict(timing)
        | {"ratio": timings[PLAIN].median / timing.median, "counters": _mean_counters(results[name])}
        for name, timing in timings.items()
    }
    ratio = {
        # equal candidates are not scored, so that where both passes agree plain encodes 4 images, not 8
        "plain / all": harness.wanted(
            timings[PLAIN].median / timings[ALL].median, at_least=3.6 if kind == "disagree" else None
        ),
        "all / macro only": harness.wanted(timings[ALL].median / timings[MACRO].median, at_most=2.3),
        "second question / first": harness.wanted(timings[SECOND].median / timings[ALL].median, at_most=0.6),
    }
    (answered,) = results[ALL]
    return {
        "question": case.several[0].question,
        "macro": answered.macro and answered.macro.text,
        "micro": answered.micro and answered.micro.text,
        "rows": rows,
        "ratios": ratio,
    }


class _Ways:
    """The ways to ask a case's questions: by row, a call, and what has to be done `before` each."""

    def __init__(self, bundle: Bundle, case: Case) -> None:
        self._bundle = bundle
        self._case = case
        first = case.several[0]
        self._all = DualFocus(bundle, cache_mb=0)
        at_once = DualFocus(bundle, cache_mb=0, slots=2 * AT_ONCE)
        pairs = [(asked.picture, asked.question) for asked in case.several]

        def without(*savings: str) -> Callable[[], list[FocusResult]]:
            protocol = leaving_out(savings)
            return lambda: [self._all.submit(first.picture, first.question, protocol).result()]

        def alone(reference: Reference) -> Callable[[], list[FocusResult]]:
            return lambda: [reference.ask(first.picture, first.question)]

        self.rows: dict[str, Callable[[], list[FocusResult]]] = {
            PLAIN: alone(Reference(bundle)),
            "+ images": alone(Reference(bundle, encode_once=True)),
            "+ prefix": without("batch", "forced", "draft"),
            "+ batch": without("forced", "draft"),
            "+ forced": without("draft"),
            ALL: lambda: [self._all.ask(first.picture, first.question)],
            MACRO: lambda: [self._all.ask(first.picture, first.question, "macro")],
            SECOND: lambda: [self._met.ask(case.second.question)],
            SEVERAL: lambda: list(at_once.ask_many(pairs)),
        }
        self.before: dict[str, Callable[[], object]] = dict.fromkeys(self.rows, lambda: self._say(first))
        self.before[SECOND] = self._meet

    def _say(self, asked: Asked) -> None:
        if isinstance(self._bundle.decoder, ScriptedDecoder):
            self._bundle.decoder.script = asked.script

    def _meet(self) -> None:
        """Ask a new runner the first question, so that the second one comes second in every round."""
        first = self._case.several[0]
        self._met = DualFocus(self._bundle).session(first.picture)
        self._say(first)
        self._met.ask(first.question)
        self._say(self._case.second)

    def check(self, results: Mapping[str, Sequence[FocusResult]]) -> None:
        """RuntimeError unless all rows' `results` are those of the same question asked the plain way, or, of
        the further questions, with all savings."""
        first = self._case.several[0]
        (plain,) = results[PLAIN]
        for name in [f"+ {saving}" for saving in SAVINGS]:
            check_same(name, results[name][0], plain)
        (macro,) = results[MACRO]
        check_same(MACRO, macro, Reference(self._bundle).ask(first.picture, first.question, "macro"))
        further = zip(
            (self._case.second, *self._case.several), (*results[SECOND], *results[SEVERAL]), strict=True
        )
        for asked, result in further:
            self._say(asked)
            check_same(
                f"{asked.question!r} asked otherwise", result, self._all.ask(asked.picture, asked.question)
            )


@dataclass(frozen=True)
class _Stepwise:
    """A grammar whose tokens are all decoded, one after the other, also where there is no choice."""

    grammar: Grammar

    def start(self) -> Cursor:
        return _StepwiseCursor(self.grammar.start())


@dataclass(frozen=True)
class _StepwiseCursor:
    cursor: Cursor
    forced: bool = False

    @property
    def allowed(self) -> tuple[int, ...]:
        return self.cursor.allowed

    def advance(self, token: int) -> None:
        self.cursor.advance(token)

    def ahead(self) -> list[int]:
        return []


def leaving_out(savings: Collection[str]) -> Protocol:
    """DualFocus without some of `SAVINGS`: "batch" yields its work one by one, "forced" decodes a box's every
    token, "draft" shows no draft."""

    def protocol(task: Task) -> Steps[FocusResult]:
        if "forced" in savings and task.grammar is not None:
            task = dataclasses.replace(task, grammar=_Stepwise(task.grammar))
        result: FocusResult = yield from _without(savings, focus(task))
        return result

    return protocol


def _without(savings: Collection[str], steps: Steps[Any]) -> Steps[Any]:
    try:
        work = next(steps)
        while True:
            items = [_item(savings, item) for item in work]
            results = []
            for part in [[item] for item in items] if "batch" in savings else [items]:
                results += yield part
            work = steps.send(results)
    except StopIteration as end:
        return end.value


def _item(savings: Collection[str], item: Any) -> Any:
    if isinstance(item, Generator):
        return _without(savings, item)
    if isinstance(item, Generate) and "draft" in savings:
        return dataclasses.replace(item, draft=())
    return item


def check_same(name: str, result: FocusResult, expected: FocusResult) -> None:
    """RuntimeError unless both are the same answer, box, crop and tokens."""

    def facts(of: FocusResult) -> tuple[object, ...]:
        replies = (of.macro and of.macro.generation, of.located, of.micro and of.micro.generation)
        return of.answer, of.chosen, of.box, of.crop, [reply and reply.tokens for reply in replies]

    if facts(result) != facts(expected):
        raise RuntimeError(f"{name} gives {facts(result)}, expected {facts(expected)}")


def _mean_counters(results: Sequence[FocusResult]) -> dict[str, float]:
    counted = [dataclasses.asdict(result.counters) for result in results]
    return {name: sum(counters[name] for counters in counted) / len(counted) for name in counted[0]}


def fork_cost(bundle: Bundle, asked: Asked, rounds: int) -> dict[str, Any]:
    """Copying the picture's prefix into another row, against prefilling it."""
    manifest = bundle.manifest
    prompt = Turns(manifest, bundle.tokenizer, asked.question).macro("whole").tokens
    prefix = prompt[: prompt.index(ImageToken("whole", manifest.image.tokens - 1)) + 1]
    features = bundle.vision.encode(view(asked.picture, whole(asked.picture), manifest.image))
    embeddings = embed(prefix, bundle.embeddings, {"whole": features[0]})
    cache = KVCache(manifest.decoder, rows=2, capacity=manifest.decoder.context)
    timings = harness.interleaved(
        {
            "prefill": lambda: bundle.decoder.extend(cache, [0], [embeddings], [[len(prefix) - 1]]),
            "fork": lambda: cache.fork(0, 1, len(prefix)),
        },
        rounds,
        before={"prefill": lambda: cache.truncate(0, 0)},
    )
    percent = 100 * timings["fork"].median / timings["prefill"].median
    return {
        "tokens": len(prefix),
        **{name: dataclasses.asdict(timing) for name, timing in timings.items()},
        "percent": harness.wanted(percent, at_most=2),
    }


def found_cases(bundle: Bundle, watch: Watch) -> dict[Kind, Case]:
    """The first held-out scenes about which a trained bundle's passes agree or disagree."""
    model = DualFocus(bundle)
    several: dict[Kind, list[Asked]] = {kind: [] for kind in KINDS}
    pairs: dict[Kind, tuple[Asked, Asked]] = {}
    questions = held_out(SEARCHED)
    done = 0
    for _, group in itertools.groupby(questions, key=lambda question: question[0].seed):
        of_scene = list(group)
        picture = np.asarray(scenes.draw(of_scene[0][0]))
        session = model.session(picture)
        found: dict[Kind, dict[object, Asked]] = {kind: {} for kind in KINDS}  # by crop
        for _, dialogue in of_scene:
            watch("looking for questions", done, len(questions))
            done += 1
            result = session.ask(dialogue.question)
            if (kind := kind_of(result)) is not None:
                found[kind].setdefault(result.crop, Asked(picture, dialogue.question, {}))
        for kind, by_crop in found.items():
            asked = list(by_crop.values())
            if len(asked) > 1 and kind not in pairs:
                pairs[kind] = asked[0], asked[1]
            elif asked and len(several[kind]) < AT_ONCE - 1:
                several[kind].append(asked[0])
        if len(pairs) == len(KINDS) and all(len(asked) == AT_ONCE - 1 for asked in several.values()):
            return {kind: Case((pairs[kind][0], *several[kind]), pairs[kind][1]) for kind in KINDS}
    raise InputError(
        f"bench savings: among {SEARCHED} held-out questions there are not {AT_ONCE} on which this model's "
        f"two passes agree, and {AT_ONCE} on which they disagree"
    )


def kind_of(result: FocusResult) -> Kind | None:
    """Which case an answered question is one of, if any."""
    macro, micro = result.macro, result.micro
    if macro is None or micro is None:
        return None
    if macro.generation.tokens == micro.generation.tokens:
        return "agree"
    return None if macro.loss is None or micro.loss is None else "disagree"


def scripted_cases(bundle: Bundle) -> dict[Kind, Case]:
    """The same for random weights: what is asked about `AT_ONCE` scenes, and what is to be replied.

    InputError where the script would have to say two things at one place.
    """
    by_scene = itertools.groupby(held_out(SEARCHED), key=lambda question: question[0].seed)
    groups = [list(group) for _, group in itertools.islice(by_scene, AT_ONCE)]
    pictures = [np.asarray(scenes.draw(group[0][0])) for group in groups]
    questions = [dialogue.question + HINT for _, dialogue in groups[0][: len(BOXES)]]
    cases: dict[Kind, Case] = {}
    for kind in KINDS:
        replies = MACRO_ANSWER, MACRO_ANSWER if kind == "agree" else MICRO_ANSWER
        scripts = [
            script(bundle, question, box, *replies) for question, box in zip(questions, BOXES, strict=True)
        ]
        several = tuple(Asked(picture, questions[0], scripts[0]) for picture in pictures)
        cases[kind] = Case(several, Asked(pictures[0], questions[1], scripts[1]))
    return cases


def script(
    bundle: Bundle, question: str, box: tuple[float, float, float, float], macro: str, micro: str
) -> dict[int, int]:
    """What `ScriptedDecoder` has to say where, for a `question` with these replies."""
    manifest, tokenizer = bundle.manifest, bundle.tokenizer
    assert manifest.box is not None  # `export --random` writes one
    turns = Turns(manifest, tokenizer, question)
    locating = turns.locate("whole")
    reading = turns.micro("whole", "crop", manifest.box.write(*box))
    # the box as its history spells it, which is how it is decoded too
    located = reading.tokens[len(locating.tokens) : reading.replies[0].stop]
    answers = [
        (*tokenizer.encode(text, add_special_tokens=False).ids[:2], manifest.tokens.eos[0])
        for text in (macro, micro)
    ]
    pushed: dict[int, int] = {}
    for prompt, reply in ((turns.macro("whole"), answers[0]), (locating, located), (reading, answers[1])):
        for at, token in enumerate(reply, len(prompt.tokens) - 1):
            assert isinstance(token, int)
            if at in pushed:
                raise InputError(f"bench savings: two replies to {question!r} meet at position {at}")
            pushed[at] = token
    return pushed


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as tables for people."""
    from rich.table import Table

    harness.show_machine(result["machine"], console)
    if result["scripted"]:
        console.print(
            "Random weights: replies are made to be of the protocol's usual lengths, by a push to the"
        )
        console.print("logits. What is computed is the model's own.\n")
    for kind, case in result["cases"].items():
        console.print(
            f"{result['bundle']}, macro and micro {kind}: {case['question']!r} -> {case['macro']!r}, "
            f"{case['micro']!r}; {result['rounds']} rounds",
            markup=False,
        )
        table = Table(box=None, pad_edge=False)
        columns = ("ms", "quartiles", "plain / it", *COLUMNS)
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        for name, row in case["rows"].items():
            counted = [f"{row['counters'][counter]:.4g}" for counter in COLUMNS.values()]
            quartiles = f"{row['low']:.1f} - {row['high']:.1f}"
            table.add_row(name, f"{row['median']:.1f}", quartiles, f"{row['ratio']:.2f}", *counted)
        console.print(table)
        for name, ratio in case["ratios"].items():
            said = harness.verdict(ratio) or "nothing is wanted: plain scores no candidates here"
            console.print(f"{name}: {ratio['value']:.2f} ({said})")
        console.print()
    fork = result["fork"]
    console.print(
        f"branching behind the picture: {fork['fork']['median']:.3f} ms, {fork['percent']['value']:.2f} % of "
        f"{fork['prefill']['median']:.1f} ms for the prefill of its {fork['tokens']} tokens "
        f"({harness.verdict(fork['percent'])})"
    )
    console.print("ratios are wanted of the shape `edge`", style="dim")


LABELS = {
    PLAIN: "the plain protocol",
    "+ images": "+ an image is encoded once",
    "+ prefix": "+ prompts start from what is cached",
    "+ batch": "+ macro and locate decode together",
    "+ forced": "+ the box under its grammar",
    "+ draft": "+ the macro answer as draft",
    "+ select": "+ candidates as branches",  # in results before 2026-11-29
    MACRO: "macro alone",
    SECOND: "second question on the picture",
    SEVERAL: "8 questions at once, each",
}  # of the rows, where there is room


def markdown(result: Mapping[str, Any]) -> str:
    """The result as README's table; of counters, both cases' where they are not the same."""
    cases = [result["cases"][kind]["rows"] for kind in KINDS]
    lines = [
        f"| | {' | | '.join(KINDS)} | | encodes | prefilled | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    last = [name for name in cases[0] if name.startswith("+")][-1]
    for name in cases[0]:
        label = LABELS[name] + ": all of it" * (name == last)
        rows = [case[name] for case in cases]
        cells = [f"{row['median']:,.0f} | {row['ratio']:.2f}\u00d7" for row in rows]
        for counter in ("vision_encodes", "tokens_prefilled", "decode_steps"):
            counted = dict.fromkeys(f"{row['counters'][counter]:.0f}" for row in rows)
            cells.append(" / ".join(counted))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A bar for each row, cases side by side, as a picture at `path`."""
    from matplotlib import pyplot

    cases = result["cases"]
    figure, axes = pyplot.subplots(1, len(cases), sharey=True, figsize=(5 * len(cases), 4.5))
    for axis, (kind, case) in zip(axes, cases.items(), strict=True):
        rows = case["rows"]
        medians = [row["median"] for row in rows.values()]
        reach = [
            [row["median"] - row["low"] for row in rows.values()],
            [row["high"] - row["median"] for row in rows.values()],
        ]
        bars = axis.barh(list(rows), medians, xerr=reach, color="#4477aa", ecolor="#222222")
        axis.bar_label(bars, [f" {row['ratio']:.1f} x" for row in rows.values()])
        axis.margins(x=0.15)
        axis.set_title(f"macro and micro {kind}")
        axis.set_xlabel(f"ms a question (median and quartiles of {result['rounds']})")
    axes[0].invert_yaxis()
    axes[0].set_ylabel("savings added to the plain protocol")
    figure.suptitle(f"{result['bundle']}, {result['machine']['processor']}")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
