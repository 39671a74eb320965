"""From Visual Genome's annotations to the dialogues the method is trained on.

A dialogue is a question, its answer and the region the answer lies in. Questions whose object cannot be
told from another one of the picture are dropped (the paper's "ambiguity filtration").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Dialogue:
    """One curated question: `box` (x0, y0, x1, y1) in pixels of the picture is the region to look at."""

    question: str
    answer: str
    box: Box
    category: str  # "" where the annotations give none


def dialogues(records: dict[str, dict[str, Any]]) -> list[Dialogue]:
    """Curate one picture; `records` holds its entry of every Visual Genome file, by name without ``.json``.

    The region is the one `qa_to_region_mapping` names; a question without one is dropped.
    """
    traits = {o["object_id"]: _traits(o) for o in records["attributes"]["attributes"]}
    regions = {r["region_id"]: r for r in records["region_descriptions"]["regions"]}
    kept = []
    for qa in records["question_answers"]["qas"]:
        region = regions.get(records["qa_to_region_mapping"].get(str(qa["qa_id"])))
        asked = [o["object_id"] for o in qa["q_objects"]]
        counts = qa["question"].lower().startswith("how many")
        if region is None or (not counts and any(_ambiguous(qa["question"], i, traits) for i in asked)):
            continue
        x, y = region["x"], region["y"]
        box = (x, y, x + region["width"], y + region["height"])
        kept.append(Dialogue(qa["question"], qa["answer"], box, qa.get("category", "")))
    return kept


def _traits(entry: dict[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(entry["names"]), frozenset(entry.get("attributes", ()))


def _ambiguous(question: str, asked: int, traits: dict[int, tuple[frozenset[str], frozenset[str]]]) -> bool:
    """True where the words that point at the asked object point at another one too.

    The words are its attribute and name together ("red star"), else its name, else its attribute.
    """
    names, attributes = traits[asked]
    text = question.lower()

    def says(phrase: str) -> bool:
        return re.search(rf"\b{re.escape(phrase)}\b", text) is not None

    def fits(entry: tuple[frozenset[str], frozenset[str]]) -> bool:
        return (name is None or name in entry[0]) and (attribute is None or attribute in entry[1])

    name, attribute = next(
        ((n, a) for n in names for a in attributes if says(f"{a} {n}")),
        next(
            ((n, None) for n in names if says(n)),
            next(((None, a) for a in attributes if says(a)), (None, None)),
        ),
    )
    return sum(fits(entry) for entry in traits.values()) > 1
