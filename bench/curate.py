"""Curating a made-up Visual Genome of full size: time and memory.

``dualfocus bench curate``. The files are written first: as many pictures, questions, regions and objects as
the real ones have, in records as long, with the objects in another order of pictures and with malformed
records in known numbers. Then ``dualfocus curate`` runs as a process of its own, whose memory is read every
20 ms. There are no pictures, so no contact sheet is drawn.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualfocus.bench import harness
from dualfocus.bench.harness import Watch
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.files import naming
from dualfocus.train import visual_genome

if TYPE_CHECKING:
    from rich.console import Console

LIMIT = 1_500_000_000  # bytes of memory that curating may take
ROOM = 50_000  # bytes of disk that a picture takes meanwhile
REGIONS, OBJECTS, QUESTIONS = 54, 38, 17  # a picture's; as in the real data set, on average
MERGED = 8  # one object of so many was merged from two; attributes still list the second,
LATER = 500  # whose id is so much higher
MAPPED, NAMED = 0.7, 0.6  # of the questions have a region, have objects
FAULTY = 0.01  # of the pictures have a malformed record
APART = 1000  # pictures between an entry of objects and its place in the other files, at the most
NOUNS = (
    "man", "woman", "child", "tree", "car", "building", "window", "sign", "shirt", "street", "wall", "table",
    "chair", "dog", "horse", "train", "bus", "plate", "sky", "grass", "fence", "light", "pole", "door", "hat",
    "bag", "boat", "cat", "bench", "clock", "elephant", "giraffe", "kite", "lamp", "mirror", "pillow",
    "plane", "roof", "sheep", "shoe", "skateboard", "surfboard", "toilet", "towel", "truck", "umbrella",
    "vase", "wheel", "zebra", "bicycle",
)  # fmt: skip
ADJECTIVES = (
    "red", "blue", "green", "white", "black", "brown", "yellow", "grey", "large", "small", "tall", "round",
    "wooden", "metal", "old",
)  # fmt: skip
VERBS = ("standing near", "next to", "in front of", "hanging above", "parked behind", "leaning against")


def run(pictures: int, folder: Path | None, watch: Watch) -> dict[str, Any]:
    """The result, of a kind that `harness` describes; what is written below `folder` is gone afterwards.

    InputError where the system does not tell a process's memory, or the disk has no room.
    """
    if not Path("/proc/self/status").exists():
        raise InputError("bench curate needs /proc, which this system does not have")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, out = Path(place) / "visual_genome", Path(place) / "out"
        if (free := shutil.disk_usage(place).free) < pictures * ROOM:
            raise InputError(
                f"{place} has room for {free / 1e9:.1f} GB, bench curate takes {pictures * ROOM / 1e9:.1f}"
            )
        planted: Counter[tuple[str, str]] = Counter()
        made = (
            (records, None)
            for i, records in enumerate(records_of(pictures, planted))
            if not watch("writing a Visual Genome", i, pictures)
        )
        with naming(source):
            visual_genome.write(source, made)
        sizes = {path.name: path.stat().st_size for path in sorted(source.iterdir())}
        watch("curating", 0, 1)
        command = [sys.executable, "-m", "dualfocus.cli", "curate", "--visual-genome", str(source)]
        curated = harness.child([*command, "-o", str(out), "--json"])
        statistics = json.loads(curated.pop("said")[0])
        written = (out / "dialogues.json").stat().st_size
    del statistics["notes"]  # of folders that are gone
    found = {
        (name, reason): count for name, of in statistics["malformed"].items() for reason, count in of.items()
    }
    return harness.header("curate", 1) | {
        "pictures": pictures,
        "bytes": sizes,
        "dialogues_bytes": written,
        "curate": curated | {"mb_per_s": sum(sizes.values()) / 1e6 / curated["seconds"]},
        "memory": harness.wanted(curated["peak_rss"], at_most=LIMIT),
        "statistics": statistics,
        "malformed": {
            "planted": sum(planted.values()),
            "counted": sum(found.values()),
            "alike": found == dict(planted),  # by file and reason
        },
    }


def records_of(pictures: int, planted: Counter[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Records of made-up pictures, to be written in this order; counts into `planted` what is malformed, by
    file and the reason that curating is to find."""
    rng = np.random.default_rng(0)
    phrases = _phrases(rng)
    faults = itertools.cycle(_FAULTS)
    waiting: list[Any] = []  # entries of objects
    for picture in range(1, pictures + 1):
        records = _records(picture, rng, phrases)
        if rng.random() < FAULTY:
            planted[next(faults)(records)] += 1
        waiting.append(records.pop("objects"))
        if len(waiting) == APART:
            records["objects"] = waiting.pop(int(rng.integers(APART)))
        yield records
    for entry in waiting:
        yield {"objects": entry}


def _phrases(rng: np.random.Generator) -> list[str]:
    def one() -> str:
        a, b = (f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
        return f"a {a} {rng.choice(VERBS)} the {b}"

    return [one() for _ in range(5000)]


def _records(picture: int, rng: np.random.Generator, phrases: list[str]) -> dict[str, Any]:
    """One picture's, of an average number of parts; ids are a thousand for each picture."""
    first = 1000 * picture
    width, height = (int(side) for side in rng.integers(300, 1024, 2))

    def boxes(count: int) -> list[list[int]]:
        x, y = rng.integers(0, width, count), rng.integers(0, height, count)
        # a little over the picture's edge now and then, as people draw
        w = np.minimum(rng.exponential(0.25 * width, count).astype(int) + 1, width - x + 3)
        h = np.minimum(rng.exponential(0.25 * height, count).astype(int) + 1, height - y + 3)
        return np.stack([x, y, w, h], 1).tolist()  # type: ignore[no-any-return]

    def some(average: int) -> int:
        return int(min(1 + rng.poisson(average - 1), 2 * average))

    kinds = rng.integers(0, len(NOUNS), OBJECTS * 2).tolist()
    shades = rng.integers(0, len(ADJECTIVES), OBJECTS * 2).tolist()
    objects: list[dict[str, Any]] = []
    for i, (x, y, w, h) in enumerate(boxes(some(OBJECTS))):
        name = NOUNS[kinds[i]]
        merged = [] if i % MERGED else [first + i + LATER]
        own = {"synsets": [f"{name}.n.01"], "h": h, "object_id": first + i, "merged_object_ids": merged}
        objects.append(own | {"names": [name], "w": w, "y": y, "x": x})
    attributes = [
        o | {"attributes": [ADJECTIVES[shades[i]]]} if shades[i] % 2 else o for i, o in enumerate(objects)
    ]
    attributes += [o | {"object_id": id} for o in attributes for id in o["merged_object_ids"]]
    said = rng.integers(0, len(phrases), REGIONS * 2).tolist()
    regions: list[Any] = [
        {"region_id": first + i, "width": w, "height": h, "image_id": picture, "phrase": phrases[said[i]],
         "y": y, "x": x}
        for i, (x, y, w, h) in enumerate(boxes(some(REGIONS)))
    ]  # fmt: skip
    qas: list[Any] = []
    mapping: dict[str, Any] = {}
    for i in range(some(QUESTIONS)):
        asked = objects[i % len(objects)]
        name, shade = asked["names"][0], ADJECTIVES[shades[i]]
        question = (
            f"What color is the {name} in the picture?",
            f"What is the {shade} {name} doing there?",
            f"Where is the {name} that can be seen?",
        )[i % 3]
        named = [asked] if rng.random() < NAMED else []
        if rng.random() < MAPPED:
            region = regions[i % len(regions)]
            mapping[str(first + i)] = region["region_id"]
            if i % 20:  # an object and the region that tells of it lie in one place, but for some
                region |= {"x": asked["x"], "y": asked["y"], "width": asked["w"] + 9, "height": asked["h"]}
        answer = f"{shade.capitalize()}." if i % 2 else f"By the {NOUNS[kinds[-1 - i]]}."
        qas.append(
            {"a_objects": [], "question": question, "image_id": picture, "qa_id": first + i, "answer": answer,
             "q_objects": named}
        )  # fmt: skip
    url = f"https://cs.stanford.edu/people/rak248/VG_100K/{picture}.jpg"
    size = {"width": width, "url": url, "height": height, "image_id": picture}
    return {
        "image_data": size | {"coco_id": None, "flickr_id": None},
        "objects": {"image_id": picture, "objects": objects, "image_url": url},
        "attributes": {"image_id": picture, "attributes": attributes},
        "region_descriptions": {"regions": regions, "id": picture},
        "question_answers": {"id": picture, "qas": qas},
        "qa_to_region_mapping": mapping,
    }


def _no_size(records: dict[str, Any]) -> tuple[str, str]:
    records["image_data"] |= {"width": 0}
    return "image_data", "a picture without a size"


def _text_for_picture(records: dict[str, Any]) -> tuple[str, str]:
    records["attributes"] = "none"
    return "attributes", "not an object"


def _no_picture(records: dict[str, Any]) -> tuple[str, str]:
    del records["objects"]["image_id"]
    return "objects", "no image_id"


def _text_for_x(records: dict[str, Any]) -> tuple[str, str]:
    records["region_descriptions"]["regions"].append({"region_id": 0, "x": "left", "y": 0})
    return "region_descriptions", "x is no number"


def _null_region(records: dict[str, Any]) -> tuple[str, str]:
    records["region_descriptions"]["regions"].append(None)
    return "region_descriptions", "regions: not an object"


def _no_answer(records: dict[str, Any]) -> tuple[str, str]:
    records["question_answers"]["qas"].append({"qa_id": 1, "question": "What?"})
    return "question_answers", "no answer"


def _no_questions(records: dict[str, Any]) -> tuple[str, str]:
    records["question_answers"]["qas"] = None
    return "question_answers", "no list of qas"


def _null_mapped(records: dict[str, Any]) -> tuple[str, str]:
    records["qa_to_region_mapping"][str(1000 * records["image_data"]["image_id"])] = None
    return "qa_to_region_mapping", "no region_id"


_FAULTS = (
    _no_size,
    _text_for_picture,
    _no_picture,
    _text_for_x,
    _null_region,
    _no_answer,
    _no_questions,
    _null_mapped,
)


def facts(result: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, in words."""
    curated, statistics, malformed = result["curate"], result["statistics"], result["malformed"]
    verdict = "met" if result["memory"]["met"] else "missed"
    size, alike = sum(result["bytes"].values()), "the same" if malformed["alike"] else "not the same"
    return {
        "pictures": f"{result['pictures']:,}, {size / 1e9:.2f} GB of JSON",
        "questions": f"{statistics['questions']:,}",
        "time": f"{curated['seconds'] / 60:.1f} minutes, {curated['mb_per_s']:.0f} MB/s",
        "memory": f"{curated['peak_rss'] / 1e6:.0f} MB at the most (wanted {LIMIT / 1e6:,.0f}: {verdict})",
        "kept": f"{statistics['kept']:,} dialogues, {result['dialogues_bytes'] / 1e9:.2f} GB",
        "malformed": f"{malformed['planted']:,} planted, {malformed['counted']:,} counted, reasons {alike}",
    } | {f"dropped: {reason}": f"{count:,}" for reason, count in statistics["dropped"].items() if count}


def markdown(result: Mapping[str, Any]) -> str:
    """README's table."""
    rows = [f"| {name} | {fact} |" for name, fact in facts(result).items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def show(result: Mapping[str, Any], console: Console) -> None:
    """For people."""
    harness.show_machine(result["machine"], console)
    for name, fact in facts(result).items():
        console.print(f"{name}  {fact}", markup=False)
