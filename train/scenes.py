"""Drawn scenes, annotated in Visual Genome's own JSON format.

A scene is laid out first (`layout`: sizes, kinds, colours, labels; cheap) and drawn on demand (`draw`:
a full-resolution picture, most of them over a photograph). `annotate` says the same scene in Visual
Genome's records, so that one curation code (`train.curate`) serves drawn scenes and the real data set.
Every object carries a three-character label 1.4 to 2 % of the picture's longer side high: the
whole-picture view cannot resolve it, a crop can.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# both from the most to the least frequent
KINDS = (
    "circle", "square", "star", "triangle", "heart", "house",
    "diamond", "cross", "arrow", "moon", "hexagon", "drop",
)  # fmt: skip
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
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9)

# Fonts and photographs that Python packages ship, all under free licences: (package, file).
FONTS = (
    *(
        ("matplotlib", f"mpl-data/fonts/ttf/DejaVu{name}.ttf")
        for name in ("Sans", "Sans-Bold", "SansMono-Bold")
    ),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf"),
    *(("font_roboto", f"files/Roboto-{name}.ttf") for name in ("Medium", "Bold")),
    ("font_source_serif_pro", "files/SourceSerifPro-Semibold.ttf"),
)
PHOTOGRAPHS = tuple(
    ("skimage", f"data/{name}")
    for name in (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png",
        "grass.png", "gravel.png", "hubble_deep_field.jpg", "rocket.jpg",
    )
)  # fmt: skip
# those no training ever saw
UNSEEN_FONTS = (
    ("font_caladea", "files/Caladea-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/STIXGeneralBol.ttf"),
    ("font_roboto", "files/Roboto-Black.ttf"),
)
UNSEEN_PHOTOGRAPHS = (("skimage", "data/coffee.png"), ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"))
for _package, _ in (*FONTS, *PHOTOGRAPHS, *UNSEEN_FONTS, *UNSEEN_PHOTOGRAPHS):
    if find_spec(_package) is None:  # found missing here as an import would, and not at the first picture
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)

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
    """A laid-out picture; `seed` decides everything that drawing adds (background, clutter, fonts).

    `unseen` ones are framed, arranged, printed and set before photographs as none of training's is.
    """

    seed: int
    width: int
    height: int
    things: tuple[Thing, ...]
    unseen: bool = False


def layout(seed: int, fewest: int = 3, most: int = 7, *, unseen: bool = False) -> Scene:
    """Lay out the scene of this seed: 800 to 1600 px, some objects that do not overlap.

    Colours and kinds repeat on purpose, so that a question must name both to be unambiguous. With `unseen`
    the picture is twice as wide as high, or the other way round, and its objects stand in a grid.
    """
    rng = random.Random(seed)
    longer = rng.randint(800, 1600)
    shorter = longer // 2 if unseen else max(800 * longer // 1600, round(longer / rng.choice(ASPECTS)))
    width, height = (longer, shorter) if rng.random() < 0.6 else (shorter, longer)
    kinds, colours = _some(rng, KINDS), _some(rng, tuple(COLOURS))
    things: list[Thing] = []
    columns = 4 if width > height else 2
    places = rng.sample(range(8), 8)
    for number in range(rng.randint(fewest, most)):
        for _attempt in range(20):
            size = rng.uniform(0.12, 0.20) * longer
            if unseen:
                row, column = divmod(places[number], columns)
                x, y = (column + 0.5) * longer / 4, (row + 0.5) * longer / 4
            else:
                x = rng.uniform(0.52 * size, width - 0.52 * size)
                y = rng.uniform(0.52 * size, height - 0.52 * size)
            # a margin of 6 % keeps neighbours apart in the small view too
            if all(max(abs(x - t.x), abs(y - t.y)) > 0.53 * (size + t.size) for t in things):
                label = "".join(rng.choices(ALPHABET, k=3))
                cap = rng.uniform(0.014, 0.020) * longer
                things.append(Thing(rng.choice(kinds), rng.choice(colours), label, x, y, size, cap))
                break
    return Scene(seed, width, height, tuple(things), unseen)


def _some(rng: random.Random, words: Sequence[str]) -> list[str]:
    """3 to 7 of them, the frequent ones more often."""
    left, count = list(words), rng.randint(3, 7)
    return [
        left.pop(rng.choices(range(len(left)), [popularity(word) for word in left])[0]) for _ in range(count)
    ]


def popularity(word: str) -> float:
    """How often a kind or a colour is met, relative to others of its sort."""
    words = KINDS if word in KINDS else tuple(COLOURS)
    return 1 / (words.index(word) + 3)


def _file(package: str, path: str) -> str:
    found = find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    return f"{found.submodule_search_locations[0]}/{path}"


@functools.cache
def _font(font: tuple[str, str], cap: int) -> ImageFont.FreeTypeFont:
    """A font whose capitals are about `cap` pixels high."""
    path = _file(*font)
    top, bottom = ImageFont.truetype(path, 200).getbbox("H")[1::2]
    return ImageFont.truetype(path, max(6, round(200 * cap / (bottom - top))))


@functools.cache
def _photograph(photograph: tuple[str, str]) -> Image.Image:
    with Image.open(_file(*photograph)) as file:
        return file.convert("RGB")


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
    elif kind == "hexagon":
        points = [(math.cos(math.pi * i / 3), math.sin(math.pi * i / 3)) for i in range(6)]
    elif kind == "house":
        points = [(0.0, -1.0), (1, -0.2), (0.8, -0.2), (0.8, 1), (-0.8, 1), (-0.8, -0.2), (-1, -0.2)]
    elif kind == "drop":
        ts = [2 * math.pi * i / 40 for i in range(40)]
        points = [(math.sin(t) * math.sin(t / 2) ** 1.5, -math.cos(t)) for t in ts]
    elif kind == "moon":
        outer = [math.pi * (0.25 + 1.5 * i / 30) for i in range(31)]
        points = [(math.cos(t), math.sin(t)) for t in outer]
        points += [(0.5 + 0.72 * math.cos(t), 0.72 * math.sin(t)) for t in reversed(outer[4:-4])]
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
    fonts, photographs = (UNSEEN_FONTS, UNSEEN_PHOTOGRAPHS) if scene.unseen else (FONTS, PHOTOGRAPHS)
    base = rng.integers(90, 215, 3)
    if rng.random() < 0.7:
        picture = _part(_photograph(photographs[int(rng.integers(len(photographs)))]), scene, rng)
    else:
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
                _font(fonts[int(rng.integers(len(fonts)))], int(longer * rng.uniform(0.009, 0.016))),
            )
    for thing in scene.things:
        half = thing.size / 2
        colour = np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, 3)
        fill = tuple(int(v) for v in np.clip(colour, 0, 255))
        edge = tuple(int(v) for v in np.clip(colour * 0.55, 0, 255)) if rng.random() < 0.5 else fill
        points = [(thing.x + half * u, thing.y + half * v) for u, v in _outline(thing.kind)]
        pen.polygon(points, fill, edge, max(1, round(0.004 * longer)))
        font = _font(fonts[int(rng.integers(len(fonts)))], round(thing.cap))
        ink, plate = (
            ((20, 20, 24), (250, 248, 240)) if rng.random() < 0.7 else ((250, 250, 250), (30, 32, 40))
        )
        x0, y0, x1, y1 = pen.textbbox((thing.x, thing.y), thing.label, font, "mm")
        margin = 0.3 * thing.cap
        pen.rectangle((x0 - margin, y0 - margin, x1 + margin, y1 + margin), plate)
        pen.text((thing.x, thing.y), thing.label, ink, font, "mm")
    return picture


def _part(photograph: Image.Image, scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Some part of a photograph, mirrored or not, with less contrast, as large as the scene."""
    aspect = scene.width / scene.height
    widest = min(photograph.width, photograph.height * aspect)
    width = rng.uniform(0.45, 1) * widest
    x, y = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - width / aspect)
    box = (x, y, x + width, y + width / aspect)
    part = photograph.resize((scene.width, scene.height), Image.Resampling.BILINEAR, box)
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    contrast, shift = rng.uniform(0.35, 0.85), rng.uniform(30, 110)
    return part.point([min(255, int(contrast * v + shift)) for v in range(256)] * 3)


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

    def ask(
        category: str, question: str, answer: str, asked: list[int], look: int, found: Sequence[int] = ()
    ) -> None:
        qa_id = first + len(qas)
        said = {"question": question, "answer": answer, "category": category}  # the last is ours
        named = {
            of: [{"object_id": first + i, "object_name": scene.things[i].kind} for i in things]
            for of, things in (("q_objects", asked), ("a_objects", found))
        }
        qas.append({"qa_id": qa_id, "image_id": image_id, **said, **named})
        mapping[str(qa_id)] = first + look

    for i, thing in enumerate(scene.things):
        name = f"{thing.colour} {thing.kind}"
        ask("detail", f"What is written on the {name}?", thing.label, [i], i)
        end = rng.choice(("first", "last"))
        answer = thing.label[0 if end == "first" else -1]
        ask("detail", f"What is the {end} character on the {name}?", answer, [i], i)
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
            if abs(thing.size - there.size) > 0.15 * thing.size:
                says = "yes" if thing.size > there.size else "no"
                question = f"Is the {name} larger than the {there.colour} {there.kind}?"
                ask("relation", question, says, [i, where], i)

    pairs = {(t.colour, t.kind) for t in scene.things}
    shown = {word for pair in pairs for word in pair}
    absent = [(colour, kind) for kind in KINDS for colour in COLOURS if (colour, kind) not in pairs]
    for i, thing in enumerate(scene.things):  # absent, but most often like something present
        near = [pair for pair in absent if thing.colour in pair or thing.kind in pair]
        # both words fit, each another object: what a model that sees parts and not things takes to be there
        parted = [pair for pair in near if shown.issuperset(pair)]
        colour, kind = rng.choice(rng.choices((absent, near, parted or near), (0.3, 0.35, 0.35))[0])
        ask("existence", f"Is there a {colour} {kind}?", "no", [], i)
    xs, ys = [thing.x for thing in scene.things], [thing.y for thing in scene.things]
    for name, places, last in (
        ("leftmost", xs, False), ("rightmost", xs, True), ("topmost", ys, False), ("lowest", ys, True)
    ):  # fmt: skip
        order = sorted(range(len(places)), key=places.__getitem__, reverse=last)
        gaps = [abs(places[order[0]] - places[i]) for i in order[1:]]
        if gaps and gaps[0] < 0.04 * max(scene.width, scene.height):
            continue  # nobody could tell
        i, thing = order[0], scene.things[order[0]]
        ask("position", f"What color is the {name} object?", thing.colour, [], i, [i])
        ask("position", f"What shape is the {name} object?", thing.kind, [], i, [i])
        ask("detail", f"What is written on the {name} object?", thing.label, [], i, [i])
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
