"""Accuracy on drawn scenes that no training ever saw: macro, micro, dual and the better of the two.

``dualfocus eval scenes`` asks a fixed list of questions, `held_out`, one after the other through the
runtime, in dual mode: one run tells what each pass alone would have answered.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualfocus.runtime.scheduler import FocusRunner
from dualfocus.train import curate, scenes
from dualfocus.train.curate import Dialogue

POPE = ("random", "popular", "adversarial")
CATEGORIES = (
    "detail",
    "attribute",
    "position",
    "count",
    "existence",
    "relation",
    *(f"pope {s}" for s in POPE),
)
GLOBAL = ("attribute", "position", "count", "existence")  # what the whole picture can answer


def held_out(questions: int, *, unseen: bool = False) -> list[tuple[scenes.Scene, Dialogue]]:
    """The first `questions` held-out questions, of every scene at most one of each category.

    A longer list begins with the shorter one. `unseen` as `train.scenes.Scene` has it.
    """
    found: list[tuple[scenes.Scene, Dialogue]] = []
    seed = scenes.HELD_OUT
    while len(found) < questions:
        scene = scenes.layout(seed, unseen=unseen)
        asked = curate.dialogues(scenes.annotate(scene, 0)) + [pope(scene, setting) for setting in POPE]
        for category in CATEGORIES:
            of = [d for d in asked if d.category == category]
            found += [(scene, d) for d in of[seed % len(of) :][:1]] if of else []
        seed += 1
    return found[:questions]


def pope(scene: scenes.Scene, setting: str) -> Dialogue:
    """A yes-or-no question as POPE (Li et al., 2023) asks: of odd seeds about something that is there.

    What is not there is any colour and kind ("random"), one of the ten most frequent of those
    ("popular"), or of a colour and a kind that are both there, on different objects ("adversarial").
    """
    rng = random.Random(f"{setting} {scene.seed}")
    pairs = [(thing.colour, thing.kind) for thing in scene.things]
    alone = [thing for thing in scene.things if pairs.count((thing.colour, thing.kind)) == 1]
    if scene.seed % 2 and alone:
        thing = rng.choice(alone)
        return Dialogue(f"Is there a {thing.colour} {thing.kind}?", "yes", thing.box, f"pope {setting}")
    absent = [(c, k) for c in scenes.COLOURS for k in scenes.KINDS if (c, k) not in pairs]
    if setting == "popular":
        absent = sorted(absent, key=lambda pair: -math.prod(map(scenes.popularity, pair)))[:10]
    if setting == "adversarial":
        words = {word for pair in pairs for word in pair}
        alike = [len(words & {*pair}) for pair in absent]
        absent = [pair for pair, words_there in zip(absent, alike, strict=True) if words_there == max(alike)]
    colour, kind = rng.choice(absent)
    return Dialogue(f"Is there a {colour} {kind}?", "no", rng.choice(scene.things).box, f"pope {setting}")


@dataclass(frozen=True)
class Outcome:
    """One answered question: which answers were right, and how well the box fits the asked region."""

    category: str
    macro: bool
    micro: bool
    dual: bool
    chosen: str
    fallback: bool
    iou: float | None  # None where the question has no one region (counts, absent things)
    ms: float


def ask_all(runner: FocusRunner, questions: Iterable[tuple[scenes.Scene, Dialogue]]) -> Iterable[Outcome]:
    """Ask every question; pictures are drawn as they come."""
    latest: tuple[int, np.ndarray[Any, np.dtype[np.uint8]]] | None = None
    for scene, dialogue in questions:
        if latest is None or latest[0] != scene.seed:
            latest = scene.seed, np.asarray(scenes.draw(scene))
        result = runner.ask(latest[1], dialogue.question)
        assert result.macro is not None
        macro = result.macro.text == dialogue.answer
        micro = result.micro.text == dialogue.answer if result.micro else macro
        one_region = dialogue.category in ("detail", "attribute") or dialogue.answer == "yes"
        yield Outcome(
            dialogue.category,
            macro,
            micro,
            result.answer == dialogue.answer,
            result.chosen,
            result.fallback is not None,
            (0.0 if result.box is None else iou(result.box.corners, dialogue.box)) if one_region else None,
            result.times_ms["total"],
        )


def iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0.0, width) * max(0.0, height)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score."""
    z2, share = 1.96**2, right / of
    centre, spread = share + z2 / (2 * of), 1.96 * (share * (1 - share) / of + z2 / (4 * of * of)) ** 0.5
    return (centre - spread) / (1 + z2 / of), (centre + spread) / (1 + z2 / of)


def summarise(outcomes: list[Outcome]) -> dict[str, Any]:
    """Shares right by kind of question and pass, each with its interval; boxes, choices and latency."""
    groups = {c: [o for o in outcomes if o.category == c] for c in CATEGORIES}
    groups["global"] = [o for o in outcomes if o.category in GLOBAL]
    groups["all"] = outcomes
    passes: dict[str, Callable[[Outcome], bool]] = {
        "macro": lambda o: o.macro,
        "micro": lambda o: o.micro,
        "dual": lambda o: o.dual,
        "oracle": lambda o: o.macro or o.micro,  # always picks the right one of the two
    }
    table = {}
    for group, members in groups.items():
        if members:
            table[group] = {"questions": len(members)} | {
                name: share(sum(map(right, members)), len(members)) for name, right in passes.items()
            }
    boxes = [o.iou for o in outcomes if o.iou is not None]
    return {
        "questions": len(outcomes),
        "accuracy": table,
        "boxes": {"asked": len(boxes), "iou_50": share(sum(v >= 0.5 for v in boxes), len(boxes))}
        if boxes
        else None,
        "chosen": dict(Counter(o.chosen for o in outcomes)),
        "fallbacks": sum(o.fallback for o in outcomes),
        "median_ms": round(statistics.median(o.ms for o in outcomes), 2),
    }


def share(right: int, of: int) -> dict[str, float]:
    """A share and its interval, for JSON."""
    low, high = wilson(right, of)
    return {"share": round(right / of, 4), "low": round(low, 4), "high": round(high, 4)}
