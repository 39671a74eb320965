"""Accuracy on drawn scenes that no training ever saw: macro, micro, dual and the better of the two.

``dualfocus eval scenes`` asks a fixed list of questions, `held_out`, as any other benchmark's (`accuracy`).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from dualfocus.bench import scorers
from dualfocus.bench.questions import POPE, Asked, Benchmark
from dualfocus.runtime.image import Picture
from dualfocus.train import curate, scenes
from dualfocus.train.curate import Dialogue

YES_NO = tuple(f"pope {setting}" for setting in POPE)
CATEGORIES = ("detail", "attribute", "position", "count", "existence", "relation", *YES_NO)
GLOBAL = ("attribute", "position", "count", "existence")  # what the whole picture can answer
GROUPS = {"detail": ("detail",), "global": GLOBAL, "all": CATEGORIES}  # what accuracies are told of


def held_out(questions: int, *, unseen: bool = False) -> list[tuple[scenes.Scene, Dialogue]]:
    """The first `questions` held-out questions, of every scene at most one of each category.

    A longer list begins with the shorter one. `unseen` as `train.scenes.Scene` has it.
    """
    found: list[tuple[scenes.Scene, Dialogue]] = []
    seed = scenes.HELD_OUT
    while len(found) < questions:
        scene = scenes.layout(seed, unseen=unseen)
        every = curate.dialogues(scenes.annotate(scene, 0)) + [pope(scene, setting) for setting in POPE]
        for category in CATEGORIES:
            of = [d for d in every if d.category == category]
            found += [(scene, d) for d in of[seed % len(of) :][:1]] if of else []
        seed += 1
    return found[:questions]


def asked(questions: int) -> Iterator[tuple[Picture, Dialogue]]:
    """The same questions with their scenes' pictures, each drawn once."""
    for _, of in groupby(held_out(questions), key=lambda one: one[0].seed):
        dialogues = list(of)
        picture = np.asarray(scenes.draw(dialogues[0][0]))
        for _, dialogue in dialogues:
            yield picture, dialogue


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
class Drawn:
    """A scene's picture, drawn when it is asked about."""

    scene: scenes.Scene

    def read(self) -> Picture:
        """(H, W, 3) uint8 RGB."""
        return np.asarray(scenes.draw(self.scene))


def is_right(dialogue: Dialogue, said: str) -> bool:
    """Whether an answer is right, by the rule of its question's category."""
    rule = scorers.pope if dialogue.category in YES_NO else scorers.exact
    return rule(said, (dialogue.answer,)) == 1


def benchmark(limit: int, *, unseen: bool = False) -> Benchmark:
    """The first `limit` questions of `held_out`; an id is the scene's seed and a number within the scene."""
    questions: list[Asked] = []
    before: Counter[int] = Counter()  # in the same scene
    for scene, dialogue in held_out(limit, unseen=unseen):
        category, answer = dialogue.category, dialogue.answer
        # counts and absent things lie in no one region
        one_region = category in ("detail", "attribute", "position") or answer == "yes"
        questions.append(
            Asked(
                f"{scene.seed}-{before[scene.seed]}",
                dialogue.question,
                Drawn(scene),
                (answer,),
                (category, "global") if category in GLOBAL else (category,),
                region=dialogue.box if one_region else None,
            )
        )
        before[scene.seed] += 1
    name = "scenes-unseen" if unseen else "scenes"
    return Benchmark(name, questions, scorers.exact, (*CATEGORIES, "global"), YES_NO)
