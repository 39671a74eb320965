"""The confidence gate, ``--skip-above P``: accuracy against latency on the held-out scenes.

Every question is asked in turn three ways: without a gate, behind one that none passes (P = 1: the macro
answer is waited for, then a region is looked for) and behind one that all pass (P = 0: the macro answer
stands). At any P a question takes one of the latter two ways, which one its macro answer's confidence says,
so that these three tell every P's answers and times. A few P are really run as well, in turn with the others,
and stand beside what was derived. Nothing is kept from one question to the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualfocus.bench import harness
from dualfocus.bench.harness import Watch
from dualfocus.bench.scenes import GROUPS, asked, is_right
from dualfocus.bench.scorers import share
from dualfocus.runtime import Bundle, DualFocus

if TYPE_CHECKING:
    from rich.console import Console

THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
RUN = (0.5, 0.9, 0.99)  # those that are run too


@dataclass(frozen=True)
class Reply:
    """A question asked one way."""

    right: bool
    skipped: bool
    ms: float


@dataclass(frozen=True)
class Outcome:
    """A question asked all ways: without a gate (None), and behind some thresholds."""

    category: str
    confidence: float  # of its macro answer
    replies: Mapping[float | None, Reply]

    def behind(self, threshold: float) -> Reply:
        """What it comes to behind a gate at `threshold`."""
        return self.replies[0.0 if self.confidence > threshold else 1.0]


def run(
    bundle: Bundle,
    limit: int,
    threads: int | None,
    watch: Watch = lambda *_: None,
    *,
    spin: bool = True,
) -> dict[str, Any]:
    """All that is measured on the first `limit` held-out questions, as the JSON object has it.

    `threads` and `spin` are the opened bundle's.
    """
    outcomes = _ask_all(bundle, limit, watch)
    curve = [("never", [o.replies[None] for o in outcomes])]
    curve += [(str(p), [o.behind(p) for o in outcomes]) for p in (1.0, *reversed(THRESHOLDS), 0.0)]
    really = {str(p): [o.replies[p] for o in outcomes] for p in RUN}
    return harness.header("gate", threads, spin=spin, manifest=bundle.manifest) | {
        "questions": limit,
        "unit": "ms",
        "derived": {name: _summary(outcomes, replies) for name, replies in curve},
        "run": {name: _summary(outcomes, replies) for name, replies in really.items()},
    }


def _ask_all(bundle: Bundle, limit: int, watch: Watch) -> list[Outcome]:
    runners = {p: DualFocus(bundle, skip_above=p, cache_mb=0) for p in (None, 0.0, 1.0, *RUN)}
    ways = list(runners)
    outcomes = []
    for i, (picture, dialogue) in enumerate(asked(limit)):
        watch("asking", i, limit)
        if i == 0:  # not timed: first calls are slower
            for runner in runners.values():
                runner.ask(picture, dialogue.question)
        replies: dict[float | None, Reply] = {}
        confidence = 0.0
        for way in ways[i % len(ways) :] + ways[: i % len(ways)]:
            begin = time.perf_counter()
            result = runners[way].ask(picture, dialogue.question)
            ms = 1e3 * (time.perf_counter() - begin)
            replies[way] = Reply(is_right(dialogue, result.answer), result.skipped, ms)
            if way is None:
                assert result.macro is not None
                confidence = result.macro.generation.confidence
        outcomes.append(Outcome(dialogue.category, confidence, replies))
    return outcomes


def _summary(outcomes: Sequence[Outcome], replies: Sequence[Reply]) -> dict[str, Any]:
    accuracy = {}
    for group, categories in GROUPS.items():
        right = [r.right for o, r in zip(outcomes, replies, strict=True) if o.category in categories]
        if right:
            accuracy[group] = share(sum(right), len(right))
    times = [reply.ms for reply in replies]
    return {
        "skipped": sum(reply.skipped for reply in replies) / len(replies),
        "accuracy": accuracy,
        "mean_ms": statistics.mean(times),
        "median_ms": statistics.median(times),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as a table for people, accuracies with 95 % intervals."""
    from rich.table import Table

    harness.show_machine(result["machine"], console)
    console.print(
        f"{result['bundle']}, {result['questions']} held-out questions; accuracy in percent", markup=False
    )
    table = Table(box=None, pad_edge=False)
    for column in ("skip above", "", "skipped", *GROUPS, "mean ms", "median ms"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["derived"].items():
        table.add_row(name, "", *_cells(row))
        if name in result["run"]:
            table.add_row("", "run", *_cells(result["run"][name]), style="dim")
    console.print(table)


def _cells(row: Mapping[str, Any]) -> list[str]:
    shares = []
    for group in GROUPS:
        found = row["accuracy"].get(group)
        shares.append(
            f"{100 * found['share']:.1f} ({100 * found['low']:.1f} - {100 * found['high']:.1f})"
            if found
            else ""
        )
    return [f"{100 * row['skipped']:.1f} %", *shares, f"{row['mean_ms']:.1f}", f"{row['median_ms']:.1f}"]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """The curve as a picture at `path`: each threshold a point, those that were run beside it."""
    from matplotlib import pyplot

    def points(rows: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        return (
            [row["mean_ms"] for row in rows.values()],
            [100 * row["accuracy"]["all"]["share"] for row in rows.values()],
        )

    never, gated = {}, dict(result["derived"])
    never["never"] = gated.pop("never")
    figure, axis = pyplot.subplots(figsize=(7, 5))
    axis.plot(*points(gated), "o-", color="#4477aa", label="skip above P")
    axis.plot(
        *points(result["run"]), "o", color="#ee6677", fillstyle="none", markersize=10, label="really run"
    )
    axis.plot(*points(never), "s", color="#222222", label="no gate: both passes in one batch")
    for name, ms, percent in zip(gated, *points(gated), strict=True):
        axis.annotate(
            name,
            (ms, percent),
            xytext=(3, -4),
            textcoords="offset points",
            rotation=-60,
            va="top",
            fontsize=8,
        )
    axis.set_xlabel("mean latency of a question, ms")
    axis.set_ylabel("accuracy, percent")
    axis.set_title(f"{result['bundle']}, {result['questions']} held-out questions")
    axis.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
