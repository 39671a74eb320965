"""Drawn scenes, annotated in Visual Genome's own JSON format.

A scene is laid out first (`layout`: sizes, kinds, colours, labels; cheap) and drawn on demand (`draw`:
a full-resolution picture). `annotate` says the same scene in Visual Genome's records, so that one
curation code (`train.curate`) serves drawn scenes and the real data set. Every object carries a
three-character label 1.4 to 2 % of the picture's longer side high: the whole-picture view cannot
resolve it, a crop can.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Any

import matplotlib  # ships the DejaVu family under a free licence
import numpy as np
from PIL import Image, ImageDraw, ImageFont

KINDS = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "arrow")
COLOURS = {
    "red": (212, 30, 36),
    "orange": (247, 136, 22),
    "yellow": (246, 221, 44),
    "green": (34, 150, 62),
    "blue": (32, 82, 204),
    "purple": (134, 42, 168),
    "black": (24, 24, 26),
    "white": (246, 246, 246),
}
ALPHABET = "ACEFHJKLMNPRTUVWXY3479"  # no pair that a small font draws alike (0/O, 1/I, 5/S, 8/B …)
HELD_OUT = 10_000_000  # no training uses the seeds from here on
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif-Bold.ttf")
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9)

Pixels = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One drawn object: its centre and size in pixels, its label's text and cap height."""

    kind: str
    colour: str
    label: str
    x: float
    y: float
    size: float
    cap: float

    @property
    def box(self) -> Pixels:
        """(x0, y0, x1, y1) in pixels of the picture."""
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """A laid-out picture; `seed` decides everything that drawing adds (background, clutter, fonts)."""

    seed: int
    width: int
    height: int
    things: tuple[Thing, ...]


def layout(seed: int, fewest: int = 3, most: int = 7) -> Scene:
    """Lay out the scene of this seed: 800 to 1600 px, some objects that do not overlap.

    Colours and kinds repeat on purpose, so that a question must name both to be unambiguous.
    """
    rng = random.Random(seed)
    longer = rng.randint(800, 1600)
    shorter = max(800 * longer // 1600, round(longer / rng.choice(ASPECTS)))
    width, height = (longer, shorter) if rng.random() < 0.6 else (shorter, longer)
    kinds, colours = rng.sample(KINDS, rng.randint(3, 7)), rng.sample(list(COLOURS), rng.randint(3, 7))
    things: list[Thing] = []
    for _ in range(rng.randint(fewest, most)):
        for _attempt in range(20):
            size = rng.uniform(0.12, 0.20) * longer
            x = rng.uniform(0.52 * size, width - 0.52 * size)
            y = rng.uniform(0.52 * size, height - 0.52 * size)
            # a margin of 6 % keeps neighbours apart in the small view too
            if all(max(abs(x - t.x), abs(y - t.y)) > 0.53 * (size + t.size) for t in things):
                label = "".join(rng.choices(ALPHABET, k=3))
                cap = rng.uniform(0.014, 0.020) * longer
                things.append(Thing(rng.choice(kinds), rng.choice(colours), label, x, y, size, cap))
                break
    return Scene(seed, width, height, tuple(things))


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


@functools.cache
def _outline(kind: str) -> tuple[tuple[float, float], ...]:
    """The shape's polygon in the unit square [-1, 1] x [-1, 1], touching all four sides."""
    if kind == "square":
        points = [(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)]
    elif kind == "triangle":
        points = [(0.0, -1.0), (1, 1), (-1, 1)]
    elif kind == "diamond":
        points = [(0.0, -1.0), (1, 0), (0, 1), (-1, 0)]
    elif kind == "cross":
        a = 0.38
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1)]
        points += [(-a, a), (-1, a), (-1, -a), (-a, -a)]
    elif kind == "arrow":
        points = [(-1.0, -0.45), (0.1, -0.45), (0.1, -1), (1, 0), (0.1, 1), (0.1, 0.45), (-1, 0.45)]
    elif kind == "star":
        turns = [(math.pi * i / 5 - math.pi / 2, 1.0 if i % 2 == 0 else 0.5) for i in range(10)]
        points = [(r * math.cos(t), r * math.sin(t)) for t, r in turns]
    elif kind == "heart":
        ts = [2 * math.pi * i / 40 for i in range(40)]
        points = [
            (
                16 * math.sin(t) ** 3,
                -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t),
            )
            for t in ts
        ]
    else:
        points = [(math.cos(2 * math.pi * i / 40), math.sin(2 * math.pi * i / 40)) for i in range(40)]
    xs, ys = zip(*points, strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    return tuple((2 * (x - x0) / (x1 - x0) - 1, 2 * (y - y0) / (y1 - y0) - 1) for x, y in points)


def draw(scene: Scene) -> Image.Image:
    """Draw the scene: an RGB picture of its full size."""
    rng = np.random.default_rng(scene.seed)
    base = rng.integers(90, 215, 3)
    small = np.clip(
        base + rng.integers(-28, 29, (int(rng.integers(2, 7)), int(rng.integers(2, 7)), 3)), 60, 235
    )
    picture = Image.fromarray(small.astype(np.uint8)).resize(
        (scene.width, scene.height), Image.Resampling.BILINEAR
    )
    pen = ImageDraw.Draw(picture)
    longer = max(scene.width, scene.height)
    for _ in range(int(rng.integers(4, 14))):  # clutter: thin lines, specks and unrelated small print
        x, y = rng.uniform(0, scene.width), rng.uniform(0, scene.height)
        shade = tuple(int(v) for v in np.clip(base + rng.integers(-70, 71, 3), 0, 255))
        what, reach = rng.integers(3), rng.uniform(0.01, 0.12) * longer
        if what == 0:
            pen.line(
                (x, y, x + rng.uniform(-reach, reach), y + rng.uniform(-reach, reach)),
                shade,
                int(rng.integers(1, 5)),
            )
        elif what == 1:
            r = longer * rng.uniform(0.002, 0.012)
            pen.ellipse((x - r, y - r, x + r, y + r), shade)
        else:
            text = "".join(rng.choice(list(ALPHABET + "abcdeghnorstu "), int(rng.integers(3, 12))))
            pen.text(
                (x, y),
                text,
                shade,
                _font(FONTS[int(rng.integers(4))], int(longer * rng.uniform(0.012, 0.022))),
            )
    for thing in scene.things:
        half = thing.size / 2
        colour = np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, 3)
        fill = tuple(int(v) for v in np.clip(colour, 0, 255))
        edge = tuple(int(v) for v in np.clip(colour * 0.55, 0, 255)) if rng.random() < 0.5 else fill
        points = [(thing.x + half * u, thing.y + half * v) for u, v in _outline(thing.kind)]
        pen.polygon(points, fill, edge, max(1, round(0.004 * longer)))
        # cap height is 0.73 of a DejaVu font's size
        font = _font(FONTS[int(rng.integers(len(FONTS)))], max(6, round(thing.cap / 0.73)))
        ink, plate = (
            ((20, 20, 24), (250, 248, 240)) if rng.random() < 0.7 else ((250, 250, 250), (30, 32, 40))
        )
        x0, y0, x1, y1 = pen.textbbox((thing.x, thing.y), thing.label, font, "mm")
        margin = 0.3 * thing.cap
        pen.rectangle((x0 - margin, y0 - margin, x1 + margin, y1 + margin), plate)
        pen.text((thing.x, thing.y), thing.label, ink, font, "mm")
    return picture


def annotate(scene: Scene, image_id: int) -> dict[str, dict[str, Any]]:
    """This scene's entry of every Visual Genome file, by file name without ``.json``.

    Ambiguous questions are asked too, as people do; dropping them is curation's work. A question about
    something absent or counted is mapped to the region of the most similar object: a person looks there,
    and a region that gave the answer away by its size would teach the wrong lesson.
    """
    rng = random.Random(scene.seed ^ 0x5CE9E)
    first = image_id * 1000
    objects: list[dict[str, Any]] = []
    attributes: list[dict[str, Any]] = []
    regions: list[dict[str, Any]] = []
    relationships: list[dict[str, Any]] = []
    for i, thing in enumerate(scene.things):
        x0, y0, x1, y1 = (round(v) for v in thing.box)
        place = {"x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0}
        one = {"object_id": first + i, **place, "names": [thing.kind], "synsets": [f"{thing.kind}.n.01"]}
        objects.append(one)
        attributes.append({**one, "attributes": [thing.colour]})
        box = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
        phrase = f"{thing.label} written on the {thing.colour} {thing.kind}"
        regions.append({"region_id": first + i, "image_id": image_id, **box, "phrase": phrase})
        for j, other in enumerate(scene.things):
            if other.x - thing.x > 0.5 * (other.size + thing.size):
                relation = {"predicate": "left of", "subject": one, "object": {"object_id": first + j}}
                relationships.append({"relationship_id": first * 50 + len(relationships), **relation})

    qas: list[dict[str, Any]] = []
    mapping: dict[str, int] = {}

    def ask(category: str, question: str, answer: str, asked: list[int], look: int) -> None:
        qa_id = first + len(qas)
        named = [{"object_id": first + i, "object_name": scene.things[i].kind} for i in asked]
        said = {"question": question, "answer": answer, "category": category}  # the last is ours
        qas.append({"qa_id": qa_id, "image_id": image_id, **said, "q_objects": named, "a_objects": []})
        mapping[str(qa_id)] = first + look

    for i, thing in enumerate(scene.things):
        name = f"{thing.colour} {thing.kind}"
        ask("detail", f"What is written on the {name}?", thing.label, [i], i)
        ask("attribute", f"What color is the {thing.kind}?", thing.colour, [i], i)
        ask("attribute", f"What shape is the {thing.colour} object?", thing.kind, [i], i)
        ask("existence", f"Is there a {name}?", "yes", [i], i)
        where = rng.randrange(len(scene.things))
        if where != i:
            there = scene.things[where]
            axis = rng.choice(("left of", "above"))
            apart = there.x - thing.x if axis == "left of" else there.y - thing.y
            if abs(apart) > 0.05 * max(scene.width, scene.height):
                says = "yes" if apart > 0 else "no"
                ask("relation", f"Is the {name} {axis} the {there.colour} {there.kind}?", says, [i, where], i)

    pairs = {(t.colour, t.kind) for t in scene.things}
    for i, thing in enumerate(scene.things):  # absent, but like something present
        near = [(thing.colour, kind) for kind in KINDS] + [(colour, thing.kind) for colour in COLOURS]
        colour, kind = rng.choice([pair for pair in near if pair not in pairs])
        ask("existence", f"Is there a {colour} {kind}?", "no", [], i)
    words = [(k, f"{k}s") for k in KINDS] + [(c, f"{c} objects") for c in COLOURS]
    found = {word: [i for i, t in enumerate(scene.things) if word in (t.kind, t.colour)] for word, _ in words}
    present, absent = ([pair for pair in words if bool(found[pair[0]]) is there] for there in (True, False))
    several = [pair for pair in present if len(found[pair[0]]) > 1]
    asked = set(rng.sample(present, 2) + rng.sample(several, min(3, len(several))) + rng.sample(absent, 1))
    for word, plural in sorted(asked):
        seen = found[word]
        ask(
            "count",
            f"How many {plural} are there?",
            str(len(seen)),
            seen,
            rng.choice(seen or range(len(scene.things))),
        )
    return {
        "image_data": {"image_id": image_id, "width": scene.width, "height": scene.height, "url": ""},
        "objects": {"image_id": image_id, "objects": objects},
        "attributes": {"image_id": image_id, "attributes": attributes},
        "relationships": {"image_id": image_id, "relationships": relationships},
        "region_descriptions": {"id": image_id, "regions": regions},
        "question_answers": {"id": image_id, "qas": qas},
        "qa_to_region_mapping": mapping,
    }
