"""From Visual Genome's annotations to the dialogues the method is trained on, one picture at a time.

A dialogue is a question, its answer and the region the answer lies in. Questions whose object cannot be
told from another one of the picture are dropped (the paper's "ambiguity filtration"), and so are those
whose box says nothing: none, boxes that disagree, a box that is empty, outside or the whole picture.
`train.dataset` makes a data set of what is kept here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]
Records = Mapping[str, Any]  # a picture's entry of every Visual Genome file, by file name without ".json"

WHOLE = 0.9  # of the picture's area: a box from here on points at nothing
INSIDE = 0.5  # of a box's own area: with less of it inside, the box is not this picture's
_WORD = re.compile(r"\w+")
# What a question asks for, and the picture it is about, have words that are objects' names too: not here.
_FRAME = re.compile(
    r" (what|which) (colou?r|kind|type|sort|shape|material|pattern|time|side|part)s?(?= )"
    r"|(?<= (is|re)) the (colou?r|kind|type|sort|shape|material|pattern)s?(?= of )"
    r"| ((left|right|other|far|near) )?side(?= of )| (in front|on top|in the back|in back)(?= of )"
    r"| time of day(?= )"
    r"| (in|of) (the|this) (picture|photo|photograph|image|scene|background|foreground)"
    r"(?= )(?! (on|above|over|under|behind|beside|hanging) )"
    r"| (the|this) (picture|photo|photograph|image)(?= (was )?taken )"
)
_COUNTED = re.compile(r" how many .*?(?= (is|are|do|does|can|has|have|was|were) )")
_ANY = (" this ", " that ", " it ", " object ", " thing ", " item ")  # words that fit whatever there is


class Drop(StrEnum):
    """Why a question is left out: the first that holds of the last two, and then of the others in order.

    The last three are `train.dataset`'s.
    """

    NO_REGION = "no region, and no named object or one without a box"
    AMBIGUOUS = "the asked object is there more than once"
    EMPTY = "box without an area"
    APART = "region that touches none of the named objects"
    OUTSIDE = "box outside the picture"
    WHOLE = "box around nearly the whole picture"
    TWICE = "asked more than once, with answers or boxes that disagree"
    THIN = "box without an area once written with two decimals"
    NO_SIZE = "picture without a usable record in image_data"
    NO_FILE = "picture whose file is missing"


@dataclass(frozen=True)
class Dialogue:
    """One curated question: `box` (x0, y0, x1, y1) in pixels of the picture is the region to look at."""

    question: str
    answer: str
    box: Box
    category: str  # "" where the annotations give none


def dialogues(records: Records) -> list[Dialogue]:
    """What is kept of one picture."""
    return [judged for _, judged in judge(records) if isinstance(judged, Dialogue)]


def judge(records: Records) -> list[tuple[int, Dialogue | Drop]]:
    """Every question of one picture, by its qa_id: its dialogue, or why there is none.

    The region is the one `qa_to_region_mapping` names, else what holds all objects that `q_objects` and
    `a_objects` name; it is clipped to the picture. The picture's objects, with their attributes, are those
    of `attributes`; the other files read are `image_data`, `region_descriptions` and `question_answers`.
    """
    things = _Things(records["attributes"]["attributes"])
    regions = {r["region_id"]: r for r in records["region_descriptions"]["regions"]}
    image, mapping = records["image_data"], records["qa_to_region_mapping"]
    judged: dict[int, Dialogue | Drop] = {}
    asked: dict[str, list[int]] = {}
    for qa in records["question_answers"]["qas"]:
        key, said = qa["qa_id"], _words(qa["question"])
        answer = qa["answer"].strip(". \t\r\n")  # as the runtime ends one
        region = regions.get(mapping.get(str(key)))
        objects = *qa["q_objects"], *qa["a_objects"]
        named = [place for o in objects if (place := things.box(o))]
        box: Box | Drop
        if region is None and len(named) < max(len(objects), 1):  # the answer may be where the box is missing
            box = Drop.NO_REGION
        elif things.ambiguous(qa["q_objects"], said, answer):
            box = Drop.AMBIGUOUS
        elif region is not None:
            x, y = region["x"], region["y"]
            box = _checked((x, y, x + region["width"], y + region["height"]), named, image)
        else:
            x0, y0, x1, y1 = zip(*named, strict=True)
            box = _checked((min(x0), min(y0), max(x1), max(y1)), named, image)
        if isinstance(box, Drop):
            judged[key] = box
            continue
        judged[key] = Dialogue(qa["question"], answer, box, qa.get("category", ""))
        asked.setdefault(said, []).append(key)
    for said, keys in asked.items():
        if len(keys) > 1 and not _agree(said, [judged[key] for key in keys]):
            judged |= dict.fromkeys(keys, Drop.TWICE)
    return list(judged.items())


def fractions(box: Box, width: float, height: float) -> Box:
    """A box in pixels as the prompts write it: parts of the picture's sides, two decimals."""
    x0, y0, x1, y1 = box
    return round(x0 / width, 2), round(y0 / height, 2), round(x1 / width, 2), round(y1 / height, 2)


class _Thing(NamedTuple):
    """An object of the picture; names and attributes as `_words` makes them."""

    names: tuple[str, ...]
    attributes: tuple[str, ...]
    box: Box | None  # None where the annotations give none that can be used


class _Things:
    """The objects of one picture."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._all: list[_Thing] = []
        self._by_id: dict[int, _Thing] = {}
        for entry in entries:
            names = tuple(_phrase(name) for name in entry["names"])
            attributes = tuple(_phrase(name) for name in entry.get("attributes", ()))
            thing = _Thing(names, attributes, _corners(entry) if "x" in entry else None)
            self._all.append(thing)
            self._by_id[entry["object_id"]] = thing
            for merged in entry.get("merged_object_ids", ()):  # the same one, as others annotated it
                self._by_id.setdefault(merged, thing)

    def box(self, named: Mapping[str, Any]) -> Box | None:
        """Of an object that a question names, which may bring its own; None if it has no area."""
        thing = self._by_id.get(named["object_id"])
        box = _corners(named) if "x" in named else thing.box if thing else None
        return box if box and box[0] < box[2] and box[1] < box[3] else None

    def ambiguous(self, named: Sequence[Mapping[str, Any]], said: str, answer: str) -> bool:
        """True where the question's words point at an asked object and at another one too.

        Where the annotations do not name what is asked about, or name what they do not list, it is what the
        question names; but what is counted is several, and what is not there can be mistaken for nothing.
        """
        if said.startswith(" how many "):
            if not (counted := _COUNTED.match(said)):
                return False
            said = said[counted.end() :]  # what is counted is not in it, nor of what is named
            things = ((o, self._by_id.get(o["object_id"])) for o in named)
            named = [o for o, thing in things if thing and any(name in said for name in thing.names)]
        asked = [self._by_id[o["object_id"]] for o in named if o["object_id"] in self._by_id]
        if len(asked) < max(len(named), 1) and not _absent(said, answer):
            within = _FRAME.sub("", said)
            asked += [
                thing
                for thing in self._all
                for name in thing.names
                if name in (said if " " in name.strip() else within)  # a "picture frame" is no picture
            ]
        return any(_places(self._fitting(said, thing)) > 1 for thing in asked)

    def _fitting(self, said: str, asked: _Thing) -> list[_Thing]:
        """The objects that fit the words which point at `asked`.

        The words are its attribute and name together ("red star"), else its name, else its attribute; by
        none of them ("she") it is the one of its name, and by "that" or "the object" any.
        """
        for name in asked.names:
            for attribute in asked.attributes:
                if attribute + name[1:] in said:
                    return [t for t in self._all if name in t.names and attribute in t.attributes]
        for name in asked.names:
            if name in said:
                return [t for t in self._all if name in t.names]
        for attribute in asked.attributes:
            if attribute in said:
                return [t for t in self._all if attribute in t.attributes]
        if any(word in said for word in _ANY):
            return self._all
        return max(([t for t in self._all if name in t.names] for name in asked.names), key=len)


def _places(things: Sequence[_Thing]) -> int:
    """How many they are: what was annotated twice has two boxes at one place, and either shows the other.

    One without a box is one more: nothing shows that it is not.
    """
    boxes: list[Box] = []
    unplaced = 0
    for thing in things:
        if thing.box is None:
            unplaced += 1
        elif not any(_alike(thing.box, box) for box in boxes):
            boxes.append(thing.box)
    return len(boxes) + unplaced


def _words(text: str) -> str:
    """The words in lower case with a space before, between and after them, so that `in` finds whole ones."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


_phrase = lru_cache(maxsize=1 << 17)(_words)  # names come again and again, questions do not


def _corners(entry: Mapping[str, Any]) -> Box:
    x, y = entry["x"], entry["y"]
    return x, y, x + entry["w"], y + entry["h"]


def _checked(box: Box, named: Sequence[Box], image: Mapping[str, Any]) -> Box | Drop:
    """The part of `box` that lies in the picture, or what is wrong with it."""
    width, height = image["width"], image["height"]
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        return Drop.EMPTY
    if named and not any(_shared(box, other) for other in named):
        return Drop.APART
    area = (x1 - x0) * (y1 - y0)
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        inside = _shared(box, (0, 0, width, height))
        if inside < INSIDE * area:
            return Drop.OUTSIDE
        box, area = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)), inside
    return Drop.WHOLE if area >= WHOLE * width * height else box


def _absent(said: str, answer: str) -> bool:
    """Whether a question is for what is not there."""
    return said.startswith((" is there ", " are there ")) and answer.lower() == "no"


def _agree(said: str, same: Sequence[Any]) -> bool:
    """Whether one question's dialogues have one answer and one region: an IoU of at least a half.

    What is not there has no region of its own, so that only the answers can disagree.
    """
    if len({one.answer.lower() for one in same}) > 1:
        return False
    return _absent(said, same[0].answer) or all(
        _alike(a, b) for a, b in combinations({one.box for one in same}, 2)
    )


def _alike(a: Box, b: Box) -> bool:
    """An IoU of at least a half."""
    return 3 * _shared(a, b) >= _shared(a, a) + _shared(b, b) > 0


def _shared(a: Box, b: Box) -> float:
    """The area that two boxes have in common."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0
