"""What share of a benchmark's questions is answered right: macro, micro, dual, and the better of the two.

One run in dual mode tells all columns. Questions are asked several at once. Their answers are written down in
the benchmark's order, each as it comes (`answers`), and the table is made of what is written: ``dualfocus
eval`` on a finished file asks nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dualfocus.bench import harness, scorers
from dualfocus.bench.answers import Answers, Line, Run, fingerprint
from dualfocus.bench.harness import Watch
from dualfocus.bench.questions import Asked, Benchmark, File, Source
from dualfocus.runtime import DualFocus, InputError
from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.image import Picture
from dualfocus.runtime.manifest import Manifest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Ask = Callable[[Sequence[Asked]], Iterable[Line]]  # in any order, as they come


def ask_all(model: DualFocus, run: Run, questions: Iterable[Asked]) -> Iterator[Line]:
    """Answer every question, several at once, in order; of neighbours about one picture, it is read once.

    A question that the model cannot be asked is a line without an answer, and ends nothing.
    """
    latest: dict[Source, Picture] = {}
    pictures: deque[Picture] = deque()

    def picture(asked: Asked) -> Picture:
        if asked.picture not in latest:
            found = asked.picture.read()
            latest.clear()
            latest[asked.picture] = found
        pictures.append(latest[asked.picture])
        return pictures[-1]

    ours, theirs = itertools.tee(questions)
    answers = model.ask_many(((functools.partial(picture, a), a.question) for a in theirs), run.mode)
    for asked in ours:
        try:
            result = next(answers)
        except QuestionError as error:
            yield run.unanswered(asked, pictures.popleft(), str(error))
        except InputError as error:
            raise InputError(f"question {asked.id}: {error}") from None
        else:
            yield run.line(asked, pictures.popleft(), result)


def answer_all(
    benchmark: Benchmark,
    answers: Answers,
    ask: Ask,
    limit: int | None,
    watch: Watch = lambda *_: None,
) -> None:
    """Have every question answered that is not yet, of the first `limit`.

    Raises InputError, before anything is asked, where `answers` holds what is not of these questions, where
    the picture of its last answer is another one by now, or where one is missing.
    """
    known = {asked.key: asked for asked in benchmark.questions}
    for key in answers.lines:
        if key not in known:
            raise InputError(
                f"{answers.path} answers the question {key[0]!r:.100}, {key[1]!r:.60}, "
                f"which is not among the {len(known):,} of {benchmark.name}"
            )
    asked = list({asked.key: asked for asked in benchmark.first(limit)}.values())
    todo = [of for of in asked if of.key not in answers.lines]
    gone = [
        f.path
        for f in {of.picture for of in todo if isinstance(of.picture, File)}
        if not os.path.isfile(f.path)  # False for a name that no file can have
    ]
    if gone:
        raise InputError(f"{len(gone):,} pictures are missing, the first of them {min(gone)!r:.300}")
    if not todo:
        return
    if answers.lines:
        key, line = list(answers.lines.items())[-1]
        if fingerprint(known[key].picture.read()) != line["metadata"]["picture"]:
            raise InputError(
                f"{answers.path}: the picture of the question {key[0]!r:.100} is another one by now"
            )
    done = len(asked) - len(todo)
    watch("asking", done, len(asked))
    for line in ask(todo):
        answers.append(line)
        done += 1
        watch("asking", done, len(asked))


def summarise(benchmark: Benchmark, answers: Answers, limit: int | None) -> dict[str, Any]:
    """Scores by row and pass, each with its interval; boxes, choices and latency.

    Answers are found by their questions, wherever they stand. A question that could not be asked counts as
    answered wrong. Scores are None where the benchmark keeps its answers to itself. Raises InputError if an
    answer is missing.
    """
    asked = benchmark.first(limit)
    missing = [of for of in asked if of.key not in answers.lines]
    if missing:
        raise InputError(
            f"{answers.path} lacks {len(missing):,} of {len(asked):,} answers, the first of them "
            f"to the question {missing[0].id!r:.100}: there is no score without them"
        )
    lines = [answers.lines[of.key] for of in asked]
    answered = [
        (of, line["metadata"]) for of, line in zip(asked, lines, strict=True) if not _is_unanswered(line)
    ]
    times = [metadata["ms"] for _, metadata in answered]
    scores = _scores(benchmark, asked, lines) if benchmark.scored else {"accuracy": None, "yes_no": {}}
    return {
        "mode": answers.run.mode,
        "questions": len({of.unit for of in asked}),
        "of": benchmark.size,
        **scores,
        "boxes": None if answers.run.mode == "macro" or not answered else _boxes(answered),
        "chosen": dict(Counter(metadata["chosen"] for _, metadata in answered)),
        "fallbacks": sum(metadata["fallback"] is not None for _, metadata in answered),
        "unanswered": len(lines) - len(answered),
        "mean_ms": round(statistics.mean(times), 2) if times else None,
        "median_ms": round(statistics.median(times), 2) if times else None,
        "notes": list(benchmark.notes),
    }


def _scores(benchmark: Benchmark, asked: Sequence[Asked], lines: Sequence[Line]) -> dict[str, Any]:
    said = [_said(of, line) for of, line in zip(asked, lines, strict=True)]
    scores: dict[object, dict[str, float]] = {}
    groups: dict[object, tuple[str, ...]] = {}
    for of, line, texts in zip(asked, lines, said, strict=True):
        rule = scorers.pope if {*of.groups} & {*benchmark.yes_no} else benchmark.rule
        wrong = _is_unanswered(line)  # whatever the rule reads in an empty text
        found = {name: 0.0 if wrong else rule(text, of.references) for name, text in texts.items()}
        if "dual" in found:
            found["oracle"] = max(found["macro"], found["micro"])
        before = scores.get(of.unit, found)
        scores[of.unit] = {name: min(score, before[name]) for name, score in found.items()}
        groups[of.unit] = of.groups
    members = {
        group: [scores[unit] for unit in scores if group in groups[unit]] for group in benchmark.groups
    }
    members["all"] = list(scores.values())
    judged = {
        group: {
            name: scorers.yes_no(
                (_says_yes(of, line, texts[name]), "yes" in of.references)
                for of, line, texts in zip(asked, lines, said, strict=True)
                if group in of.groups
            )
            for name in said[0]
        }
        for group in benchmark.yes_no
        if members[group]
    }
    return {"accuracy": {group: _row(of) for group, of in members.items() if of}, "yes_no": judged}


def _says_yes(asked: Asked, line: Line, text: str) -> bool:
    """What is not answered says the wrong one of yes and no."""
    return "yes" not in asked.references if _is_unanswered(line) else scorers.says_yes(text)


def _is_unanswered(line: Line) -> bool:
    return line["metadata"].get("unanswered") is not None


def _said(asked: Asked, line: Line) -> dict[str, str]:
    """What each pass answered; the micro pass alone falls back to the macro answer too."""
    metadata = line["metadata"]
    if metadata["mode"] != "dual":
        return {metadata["mode"]: line["text"]}
    if _is_unanswered(line):
        return dict.fromkeys(("macro", "micro", "dual"), "")
    macro, micro = metadata["macro"], metadata["micro"]
    return {
        "macro": asked.final(macro),
        "micro": asked.final(macro if micro is None else micro),
        "dual": line["text"],
    }


def _row(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"questions": len(scores)}
    for name in scores[0]:
        row[name] = scorers.share(math.fsum(of[name] for of in scores), len(scores))
    if "dual" in row:
        row["gain"] = scorers.paired([of["dual"] - of["macro"] for of in scores])
    return row


def _boxes(answered: Sequence[tuple[Asked, Mapping[str, Any]]]) -> dict[str, Any]:
    """How often there was something to zoom in to, how large it is, and how it fits where that is known."""
    areas, zooms = [], []
    for _, of in answered:
        if of["crop"] is not None:
            (width, height), (x0, y0, x1, y1) = of["size"], of["crop"]
            zooms.append(max(width, height) / max(x1 - x0, y1 - y0))
            x0, x1 = (min(max(x, 0.0), width) for x in of["box"][::2])
            y0, y1 = (min(max(y, 0.0), height) for y in of["box"][1::2])
            areas.append(max(0.0, x1 - x0) * max(0.0, y1 - y0) / (width * height))
    fits = [
        0.0 if of["box"] is None else scorers.iou(of["box"], q.region)
        for q, of in answered
        if q.region is not None
    ]
    return {
        "found": scorers.share(len(zooms), len(answered)),
        "area": round(statistics.median(areas), 4) if areas else None,
        "zoom": round(statistics.median(zooms), 2) if zooms else None,
        "asked": len(fits),
        "iou_50": scorers.share(sum(fit >= 0.5 for fit in fits), len(fits)) if fits else None,
    }


def run(
    benchmark: Benchmark,
    answers: Answers,
    ask: Ask,
    manifest: Manifest,
    limit: int | None,
    threads: int | None,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Answer what is not answered yet, and the JSON object of it all; raises InputError as both do."""
    answer_all(benchmark, answers, ask, limit, watch)
    answers.arrange(asked.key for asked in benchmark.questions)
    mode = answers.run.mode
    name = benchmark.name if mode == "dual" else f"{benchmark.name}-{mode}"
    return harness.header(name, threads, manifest=manifest) | summarise(benchmark, answers, limit)


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as tables for people: percent, with 95 % intervals."""
    count = f"{result['questions']:,} questions"
    if result["questions"] < result["of"]:
        count = f"the first {count} of {result['of']:,}, which is no score of the benchmark"
    console.print(f"{result['bench']}, {result['bundle']}: {count}", markup=False)
    if result["accuracy"] is not None:
        console.print(_table(result))
    for note in result["notes"]:
        console.print(note, markup=False)
    if result["unanswered"]:
        console.print(f"not answered, which counts as wrong: {result['unanswered']:,} too long for the model")
    if result["yes_no"]:
        _show_yes_no(result["yes_no"], console)
    if boxes := result["boxes"]:
        told = [f"a box in {_share(boxes['found'])} of the questions"]
        if boxes["zoom"] is not None:
            told.append(
                f"of {100 * boxes['area']:.1f} % of the picture, zoomed {boxes['zoom']:.1f} times (medians)"
            )
        if boxes["iou_50"]:
            told.append(f"IoU of at least 0.5 in {_share(boxes['iou_50'])} of {boxes['asked']}")
        console.print(", ".join(told))
    chosen, asked = result["chosen"], sum(result["chosen"].values())
    if not asked:
        return
    passes = ", ".join(f"{name} {100 * count / asked:.1f} %" for name, count in chosen.items())
    console.print(
        f"chosen: {passes}; no micro answer: {100 * result['fallbacks'] / asked:.1f} %; "
        f"a mean of {result['mean_ms']} ms, median {result['median_ms']} ms"
    )


def _table(result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    rows = list(result["accuracy"].values())
    names = [name for name in ("macro", "micro", "dual", "oracle") if name in rows[0]]
    main = result["mode"]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("questions", *names, *(["dual - macro"] if "gain" in rows[0] else [])):
        table.add_column(column, justify="right")
    for group, row in result["accuracy"].items():
        cells = [f"{100 * row[name]['share']:.1f}" for name in names]
        cells[names.index(main)] += f" ({_interval(row[main])})"
        if "gain" in row:
            cells.append(f"{100 * row['gain']['mean']:+.1f} ({_interval(row['gain'])})")
        table.add_row(harness.plain(group), str(row["questions"]), *cells)
    return table


def markdown(*results: Mapping[str, Any]) -> str:
    """README's table of results in dual mode: of one, all its rows; of several, what they have in common."""
    assert all(result["mode"] == "dual" for result in results)
    several = len(results) > 1
    passes = ("macro", "micro", "dual", "oracle")
    rows = [[*(["model"] if several else []), "", "questions", *passes, "dual - macro"]]
    rows.append(["---"] * len(rows[0]))
    for result in results:
        name = [result["bundle"]] if several else []
        for group, row in result["accuracy"].items():
            if several and group not in ("detail", "global", "all", *result["yes_no"]):
                continue
            shares = [f"{100 * row[one]['share']:.1f}" for one in passes]
            shares[2] += f" ({_interval(row['dual'])})"
            gain = f"{100 * row['gain']['mean']:+.1f} ({_interval(row['gain'])})"
            rows.append([*name, group, str(row["questions"]), *shares, gain])
        for group, judged in result["yes_no"].items():
            scores = [f"{100 * judged[one]['f1']:.1f}" for one in passes[:3]]
            gain = f"{round(100 * (judged['dual']['f1'] - judged['macro']['f1']), 1) + 0.0:+.1f}"  # no -0.0
            said = ", ".join(f"{100 * judged[one]['yes']:.1f}" for one in ("macro", "dual"))
            asked = str(result["accuracy"][group]["questions"])
            rows.append([*name, f"{group}, F1 (says yes: {said} %)", asked, *scores, "", gain])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _show_yes_no(judged: Mapping[str, Mapping[str, Mapping[str, float]]], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("")
    for column in ("accuracy", "precision", "recall", "F1", "says yes"):
        table.add_column(column, justify="right")
    for group, passes in judged.items():
        for i, (name, figures) in enumerate(passes.items()):
            table.add_row("" if i else group, name, *(f"{100 * figure:.1f}" for figure in figures.values()))
    console.print(table)


def _interval(of: Mapping[str, float]) -> str:
    return f"{100 * of['low']:.1f} to {100 * of['high']:.1f}"


def _share(of: Mapping[str, float]) -> str:
    return f"{100 * of['share']:.1f} %"
