"""Curation: what is kept and dropped and why, the spellings of the files, and that nothing is half done."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dualfocus import cli
from dualfocus.bench import curate as bench
from dualfocus.bench import harness
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.files import claimed
from dualfocus.runtime.turns import DUALFOCUS, Question, Text, Turn, render
from dualfocus.train import curate, dataset, scenes, visual_genome
from dualfocus.train.curate import Dialogue, Drop

WIDTH, HEIGHT = 200, 100  # of every picture made by hand

Files = dict[str, Any]


def thing(key: int, name: str, x: float, y: float, w: float, h: float, *attributes: str) -> dict[str, Any]:
    return {"object_id": key, "x": x, "y": y, "w": w, "h": h, "names": [name], "attributes": [*attributes]}


def region(key: int, x: float, y: float, w: float, h: float) -> dict[str, Any]:
    return {"region_id": key, "x": x, "y": y, "width": w, "height": h, "phrase": "something", "image_id": 1}


def qa(key: int, question: str, answer: str = "Blue.", *named: int, found: tuple[int, ...] = ()) -> Files:
    objects = {"q_objects": [{"object_id": i} for i in named], "a_objects": [{"object_id": i} for i in found]}
    return {"qa_id": key, "image_id": 1, "question": question, "answer": answer, **objects}


# one man, annotated twice, two cars that their colours tell apart, two trees that nothing does, and two each
# of what is seldom meant
THINGS = [
    thing(11, "man", 10, 10, 40, 60),
    thing(12, "car", 100, 40, 50, 40, "red"),
    thing(13, "Car", 150, 40, 50, 40, "blue"),
    thing(14, "tree", 0, 0, 10, 90),
    thing(15, "tree", 60, 0, 20, 90),
    *(
        thing(key, name, 160 + 20 * (key % 2), 0, 20, 20)
        for key, name in enumerate(2 * ("color", "picture", "picture frame", "side", "top"), 16)
    ),
    thing(31, "man", 11, 11, 40, 60),
]


def picture(*qas: Files, regions: list[Files], mapping: dict[str, int]) -> Files:
    """Picture 1's entry of every file."""
    return {
        "image_data": {"image_id": 1, "width": WIDTH, "height": HEIGHT, "url": "https://at/VG_100K_2/1.jpg"},
        "objects": {
            "image_id": 1,
            "objects": [{k: v for k, v in t.items() if k != "attributes"} for t in THINGS],
        },
        "attributes": {"image_id": 1, "attributes": [*THINGS]},
        "region_descriptions": {"id": 1, "regions": regions},
        "question_answers": {"id": 1, "qas": [*qas]},
        "qa_to_region_mapping": mapping,
    }


def judged(asked: Files, *box: float) -> Dialogue | Drop:
    """One question's fate; `box` is x, y, w, h of the region it is mapped to, if it is."""
    regions, mapping = ([region(7, *box)], {"5": 7}) if box else ([], {})
    ((key, verdict),) = curate.judge(picture(asked, regions=regions, mapping=mapping))
    assert key == 5
    return verdict


@pytest.mark.parametrize(
    ("asked", "box", "expected"),
    [
        # the region, the objects without one, all of them together
        (qa(5, "What is the man wearing?", "A hat.", 11), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is the man wearing?", "A hat.", 11), (), (10, 10, 50, 70)),
        (qa(5, "Where is the red car?", "By him.", 12, found=(11,)), (), (10, 10, 150, 80)),
        (qa(5, "What is in the background?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is in the background?"), (), Drop.NO_REGION),
        (qa(5, "What is the man wearing?", "A hat.", 99), (), Drop.NO_REGION),
        # the asked object, by its words: attribute and name, name, attribute
        (qa(5, "What is behind the red car?", "x", 12), (), (100, 40, 150, 80)),
        (qa(5, "What is behind the car?", "x", 12), (), Drop.AMBIGUOUS),
        (qa(5, "What is the blue one?", "x", 13), (), (150, 40, 200, 80)),
        (qa(5, "What is behind the Tree?", "x", 15), (), Drop.AMBIGUOUS),
        (qa(5, "What is that?", "x", 11), (), Drop.AMBIGUOUS),
        (qa(5, "What is the object behind?", "x", 11), (), Drop.AMBIGUOUS),
        (qa(5, "What is he wearing?", "x", 11), (), (10, 10, 50, 70)),
        (qa(5, "What are the men wearing?", "x", 11), (), (10, 10, 50, 70)),
        (qa(5, "What grows there?", "x", 15), (), Drop.AMBIGUOUS),
        (qa(5, "Is the man by the tree?", "x", 11, 15), (), Drop.AMBIGUOUS),
        # nothing is named by the annotations, but by the question
        (qa(5, "What is the man wearing?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is behind the tree?"), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "What is behind the tree?", "x", 99), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "What is behind the treetop?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        # what is asked for, and the picture, are no objects, though there are two of each
        (qa(5, "What color is the man's hat?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is the color of his hat?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "Which color?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is the man in the picture doing?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What color is in the picture?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "Where was the picture taken?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is on the left side of the man?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is on top of the tree?"), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "What is on top of the man?"), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is at the top?"), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "What is on the picture?"), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "What is in the picture on the wall?"), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "What is in the picture frame?"), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "What is on the color of the wall?"), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "Is the color bright?"), (20, 10, 30, 20), Drop.AMBIGUOUS),
        # of two that are named one is not listed
        (qa(5, "Is the man by the tree?", "x", 11, 99), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "Is the man by the car?", "x", 11, 99), (20, 10, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "Is the man by the dog?", "x", 11, 99), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "What is the man wearing?", "A hat.", 11, found=(99,)), (), Drop.NO_REGION),
        (qa(5, "What is the man wearing?", "A hat.", 11, found=(99,)), (20, 10, 30, 20), (20, 10, 50, 30)),
        # counts are of several, though not all that they name is, and what is not there is not one of them
        (qa(5, "How many doors does the car have?", "2", 12), (100, 40, 30, 20), Drop.AMBIGUOUS),
        (qa(5, "How many doors does the red car have?", "2", 12), (100, 40, 30, 20), (100, 40, 130, 60)),
        (qa(5, "How many cars does the man have?", "2", 12, 13), (100, 40, 30, 20), (100, 40, 130, 60)),
        (qa(5, "How many cars or a car are there?", "2", 12, 13), (), (100, 40, 200, 80)),
        (qa(5, "Is there a green car?", "No."), (20, 10, 30, 20), (20, 10, 50, 30)),
        (qa(5, "Is the tree tall?", "No."), (20, 10, 30, 20), Drop.AMBIGUOUS),
        # boxes
        (qa(5, "What is the man wearing?", "x", 11), (20, 10, 0, 20), Drop.EMPTY),
        (qa(5, "What is the man wearing?", "x", 11), (20, 10, 30, -1), Drop.EMPTY),
        (qa(5, "What is the man wearing?", "x", 11), (50, 10, 30, 20), Drop.APART),
        (qa(5, "What is the man wearing?", "x", 11), (49, 10, 30, 20), (49, 10, 79, 30)),
        (qa(5, "What is here?"), (300, 10, 30, 20), Drop.OUTSIDE),
        (qa(5, "What is here?"), (-16, 10, 30, 20), Drop.OUTSIDE),
        (qa(5, "What is here?"), (-15, 10, 30, 20), (0, 10, 15, 30)),
        (qa(5, "What is here?"), (190, 95, 12, 6), (190, 95, 200, 100)),
        (qa(5, "What is here?"), (0, 0, 200, 90), Drop.WHOLE),
        (qa(5, "What is here?"), (0, 0, 200, 89), (0, 0, 200, 89)),
        (qa(5, "What is here?"), (-5, -5, 300, 120), Drop.WHOLE),
    ],
)  # fmt: skip
def test_every_reason_by_hand(asked: Files, box: tuple[float, ...], expected: Any) -> None:
    verdict = judged(asked, *box)
    assert (verdict.box if isinstance(verdict, Dialogue) else verdict) == expected


def test_answers_end_as_the_runtimes_do() -> None:
    for answer in (" St. John. ", "St. John .", ". St. John. ."):
        verdict = judged(qa(5, "What is here?", answer), 20, 10, 30, 20)
        assert verdict == Dialogue("What is here?", "St. John", (20, 10, 50, 30), "")


@pytest.mark.parametrize(
    ("second", "x", "agrees"),
    [
        (qa(6, "what is Here", "blue"), 20, True),
        (qa(6, "What is here?", "Red."), 20, False),
        (qa(6, "What is here?", "Blue."), 30, True),  # 20 of 40 px in common: an IoU of exactly a half
        (qa(6, "What is here?", "Blue."), 31, False),
        (qa(6, "What is there?", "Red."), 90, True),
    ],
)
def test_what_is_asked_twice_has_to_agree(second: Files, x: float, agrees: bool) -> None:
    regions = [region(1, 20, 10, 30, 20), region(2, x, 10, 30, 20)]
    records = picture(qa(5, "What is here?"), second, regions=regions, mapping={"5": 1, "6": 2})
    assert [isinstance(verdict, Dialogue) for _, verdict in curate.judge(records)] == [agrees, agrees]
    if not agrees:
        assert [verdict for _, verdict in curate.judge(records)] == [Drop.TWICE] * 2


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_all_that_is_asked_again_has_to_agree(order: tuple[int, ...]) -> None:
    """Both halves agree with the whole, and not with each other."""
    boxes = [region(1, 20, 10, 40, 20), region(2, 20, 10, 20, 20), region(3, 40, 10, 20, 20)]
    asked = [qa(key, "What is here?") for key in (5, 6, 7)]
    mapping = {str(key): boxes[i]["region_id"] for key, i in zip((5, 6, 7), order, strict=True)}
    records = picture(*asked, regions=boxes, mapping=mapping)
    assert [verdict for _, verdict in curate.judge(records)] == [Drop.TWICE] * 3
    assert len(curate.dialogues(picture(*asked[:1], regions=boxes, mapping=mapping))) == 1


def test_what_is_absent_has_no_region_to_disagree_about() -> None:
    regions = [region(1, 20, 10, 30, 20), region(2, 90, 10, 30, 20)]
    for question, kept in (("Is there a dog?", 2), ("Is it big?", 0)):
        asked = (qa(5, question, "No"), qa(6, question, "no"))
        assert len(curate.dialogues(picture(*asked, regions=regions, mapping={"5": 1, "6": 2}))) == kept


def test_an_object_merged_into_another_is_that_one() -> None:
    records = picture(qa(5, "What is the man wearing?", "x", 1011), regions=[], mapping={})
    records["attributes"]["attributes"] = [THINGS[0] | {"merged_object_ids": [1011]}]
    assert [d.box for d in curate.dialogues(records)] == [(10, 10, 50, 70)]


# ---------------------------------------------------------------------------------------------- files


def save(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def whole(*pictures: Files) -> Files:
    """Files of several pictures' entries."""
    files: Files = {name: [p[name] for p in pictures] for name in pictures[0]}
    files["qa_to_region_mapping"] = {k: v for p in pictures for k, v in p["qa_to_region_mapping"].items()}
    return files


@pytest.fixture
def files() -> Files:
    """One picture: a question by its region, one by its objects, an ambiguous one."""
    asked = (
        qa(5, "What is the man\n wearing?", "A hat.", 11),
        qa(6, "What is behind the red car?", "A wall.", 12),
        qa(7, "What is behind the tree?", "A wall.", 15),
    )
    return whole(picture(*asked, regions=[region(3, 20, 10, 30, 20)], mapping={"5": 3}))


def samples(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "dialogues.json").read_text())
    return found


def build(folder: Path, files: Files, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Samples and statistics."""
    source = save(folder / "in", files)
    statistics = dataset.build(source, folder / "out", **options)
    assert statistics["questions"] == statistics["kept"] + sum(statistics["dropped"].values())
    assert json.loads((folder / "out" / "statistics.json").read_text()) == statistics
    return samples(folder / "out"), statistics


def test_a_sample_is_the_protocols(tmp_path: Path, files: Files) -> None:
    made, statistics = build(tmp_path, files)
    hint = "Answer the question using a single word or phrase."
    locate = "Please provide the bounding box coordinate of the region this question asks"
    micro = "Please combine the information from these two images and answer this question"
    assert made[0] == {
        "id": "1_5",
        "image": "VG_100K_2/1.jpg",
        "sub_area": [0.1, 0.1, 0.25, 0.3],
        "conversations": [
            {
                "from": "human",
                "value": f"<image>\n{locate}: What is the man wearing?",
            },
            {"from": "gpt", "value": "[0.10, 0.10, 0.25, 0.30]"},
            {"from": "human", "value": f"<image>\n{micro}: What is the man wearing?\n{hint}"},
            {"from": "gpt", "value": "A hat"},
        ],
    }
    assert [s["id"] for s in made] == ["1_5", "1_6"]
    assert statistics["kept"] == 2
    assert statistics["dropped"][Drop.AMBIGUOUS] == 1
    # 600 and 2,000 of 20,000 px
    assert {s["up_to"]: s["boxes"] for s in statistics["box_sizes"] if s["boxes"]} == {0.05: 1, 0.1: 1}


def test_a_sample_is_what_the_runtime_asks() -> None:
    dialogue = Dialogue("Is {T} here?", "yes", (0, 0, 1, 1), "")
    made = dataset.sample("1", "1.jpg", (0.0, 0.1, 0.25, 1.0), dialogue)["conversations"]
    box, answer = made[1]["value"], made[3]["value"]
    pieces = render(
        DUALFOCUS,
        Question.parse(dialogue.question, DUALFOCUS.hint),
        [Turn(DUALFOCUS.locate, box), Turn(DUALFOCUS.micro, answer)],
    )
    fed = "".join(piece.text if isinstance(piece, Text) else "<image>" for piece in pieces)
    turns = [said["value"] for said in made]
    assert fed == DUALFOCUS.system + "".join(
        f"USER: {user} ASSISTANT: {reply}</s>" for user, reply in zip(turns[::2], turns[1::2], strict=True)
    )


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, files: Files) -> None:
    expected, _ = build(tmp_path, files)
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    dataset.build(tmp_path / "in", tmp_path / "marked")
    assert samples(tmp_path / "marked") == expected


def test_other_spellings_are_the_same(tmp_path: Path, files: Files) -> None:
    expected, _ = build(tmp_path, files)

    def renamed(entry: Files, **names: str) -> Files:
        return {names.get(key, key): value for key, value in entry.items()}

    files["image_data"] = [renamed(e, image_id="id") | {"image_id": "1"} for e in files["image_data"]]
    for name in ("objects", "attributes"):
        files[name] = [
            {"id": e["image_id"], name: [
                renamed(o, names="name", object_id="id", w="width", h="height") | {"name": o["names"][0]}
                for o in e[name]
            ]}
            for e in files[name]
        ]  # fmt: skip
    files["region_descriptions"] = [
        {
            "image_id": 1,
            "regions": [
                renamed(r, region_id="id", width="w", height="h") | {"image_id": None} for r in e["regions"]
            ],
        }
        for e in files["region_descriptions"]
    ]
    for e in files["question_answers"]:
        e["image_id"] = e.pop("id")
        e["qas"] = [renamed(one, qa_id="id") for one in e["qas"]]
        e["qas"][0]["a_objects"] = None
        del e["qas"][1]["a_objects"]
        e["qas"][1]["q_objects"] = [{"id": 12}]
    files["qa_to_region_mapping"] = {"5": "3", "6": 99.0}
    (tmp_path / "again").mkdir()
    made, statistics = build(tmp_path / "again", files)
    assert made == expected
    assert not any(statistics["malformed"].values())


def test_older_attributes_bring_no_second_objects(tmp_path: Path, files: Files) -> None:
    """v1.4 merged and removed objects which v1.2 of the attributes, the last there is, still lists."""
    expected, _ = build(tmp_path, files)
    assert files["objects"][0]["objects"].pop() == {k: v for k, v in THINGS[-1].items() if k != "attributes"}
    files["objects"][0]["objects"][0]["merged_object_ids"] = [1011, 31]  # the man's
    files["attributes"][0]["attributes"][1] = thing(12, "car", 100, 40, 50, 40)  # not called red,
    files["objects"][0]["objects"][1]["merged_object_ids"] = [1012]
    files["attributes"][0]["attributes"] += [
        thing(1011, "man", 12, 12, 40, 60, "tall"),
        thing(1012, "wheel", 100, 40, 50, 40, "red"),  # but by what was merged into it
        thing(2011, "man", 90, 10, 40, 60),  # removed
    ]
    (tmp_path / "again").mkdir()
    made, _ = build(tmp_path / "again", files)
    assert made == expected
    files["objects"] = []  # then there are only those
    (tmp_path / "without").mkdir()
    made, statistics = build(tmp_path / "without", files)
    assert made == []
    assert statistics["dropped"][Drop.AMBIGUOUS] == 3  # which man?


def test_archives_are_read(tmp_path: Path, files: Files) -> None:
    expected, _ = build(tmp_path, files)
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in (tmp_path / "in").iterdir():
        with zipfile.ZipFile(packed / f"{path.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, f"data/{path.name}")
    dataset.build(packed, tmp_path / "out2")
    assert samples(tmp_path / "out2") == expected


def test_files_are_found_under_the_names_they_are_published_by(tmp_path: Path, files: Files) -> None:
    expected, _ = build(tmp_path, files)
    objects = tmp_path / "in" / "objects.json"
    with zipfile.ZipFile(tmp_path / "in" / "objects_v1_2.json.zip", "w") as archive:
        archive.write(objects, "objects_v1_2.json")
    older = objects.rename(tmp_path / "in" / "objects_v1.json")
    with pytest.raises(
        InputError, match=r"holds objects_v1.json, objects_v1_2.json.zip: expected one of them"
    ):
        dataset.build(tmp_path / "in", tmp_path / "out2")
    older.unlink()
    dataset.build(tmp_path / "in", tmp_path / "out2")
    assert samples(tmp_path / "out2") == expected


@pytest.mark.parametrize(("at", "value"), [(6, 1), (8, 9)])
def test_an_archive_that_cannot_be_unpacked_is_one_sentence(
    tmp_path: Path, files: Files, at: int, value: int
) -> None:
    """An encrypted one, and one of Deflate64, which Windows writes: flags and method, told in two places."""
    build(tmp_path, files)
    path = tmp_path / "in" / "objects.json.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "in" / "objects.json", "objects.json")
    (tmp_path / "in" / "objects.json").unlink()
    data = bytearray(path.read_bytes())
    data[at] = data[data.index(b"PK\x01\x02") + at + 2] = value
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"objects\.json\.zip: no archive that can be read"):
        dataset.build(tmp_path / "in", tmp_path / "out2")


def test_without_mapping_and_attributes(tmp_path: Path, files: Files) -> None:
    del files["qa_to_region_mapping"], files["attributes"]
    made, statistics = build(tmp_path, files)
    # nobody says which car is red, and the man's own box takes the place of his region
    assert [(s["id"], s["sub_area"]) for s in made] == [("1_5", [0.05, 0.1, 0.25, 0.7])]
    assert statistics["dropped"][Drop.AMBIGUOUS] == 2
    assert [note.split()[-1] for note in statistics["notes"][:2]] == [
        "attributes.json",
        "qa_to_region_mapping.json",
    ]


def test_objects_of_the_question_bring_their_boxes(tmp_path: Path, files: Files) -> None:
    files["objects"][0]["objects"] = []
    files["attributes"][0]["attributes"] = []
    files["qa_to_region_mapping"] = {}
    files["question_answers"][0]["qas"][1]["q_objects"] = [thing(12, "car", 100, 40, 50, 40)]
    made, _ = build(tmp_path, files)
    assert [(s["id"], s["sub_area"]) for s in made] == [("1_6", [0.5, 0.4, 0.75, 0.8])]


LISTED = {"image_id": 1, "width": WIDTH, "height": HEIGHT}
NOT_PLACED = {"id": 9, "y": 1, "width": 1, "height": 1}


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        # a picture's record
        ("image_data", None, "not an object"),
        ("image_data", {"width": 1, "height": 1}, "no image_id"),
        ("image_data", {"image_id": 2, "width": 1}, "a picture without a size"),
        ("image_data", {"image_id": 2, "width": 1, "height": "1"}, "a picture without a size"),
        ("image_data", LISTED, "the picture's second record"),
        ("objects", {"image_id": "x"}, "image_id is no whole number"),
        ("objects", {"image_id": 2}, "no list of objects"),
        # one of the parts of picture 1
        ("objects/objects", 7, "objects: not an object"),
        ("objects/objects", {"names": ["x"]}, "no object_id"),
        ("objects/objects", thing(1, "x", 1, 1, 1, 1) | {"names": [7]}, "names are no texts"),
        ("objects/objects", thing(1, "x", 1, 1, 1, 1) | {"names": []}, "an object without a name"),
        ("objects/objects", thing(1, "x", 1, 1, True, 1), "w is no number"),
        ("attributes/attributes", thing(1, "x", 1, 1, 1, 1, None), "attributes are no texts"),  # type: ignore[arg-type]
        # numbers that no picture has, and not all of which a double has
        ("objects/objects", thing(1, "x", 1, 1, 10**400, 1), "w is no number"),
        ("region_descriptions/regions", region(1 << 63, 1, 1, 1, 1), "region_id is no whole number"),
        ("region_descriptions/regions", region(4, 1e300, 1, 1, 1), "x is no number"),
        ("region_descriptions/regions", NOT_PLACED, "x is no number"),
        ("region_descriptions/regions", NOT_PLACED | {"image_id": 2}, "regions: of another picture"),
        ("region_descriptions/regions", region(3, 1, 1, 1, 1), "regions: an id for the second time"),
        ("question_answers/qas", qa(8, " "), "no question"),
        ("question_answers/qas", qa(8, "What?", "."), "no answer"),
        ("question_answers/qas", qa(8, "What is <image>?"), "question that holds <image>"),
        ("question_answers/qas", qa(8, "What?") | {"q_objects": [7]}, "q_objects: not an object"),
        ("question_answers/qas", qa(8, "What?") | {"q_objects": 7}, "q_objects are no list"),
        ("question_answers/qas", qa(8, "What?") | {"a_objects": [{}]}, "a_objects: no object_id"),
        ("question_answers/qas", {"question": "What?"}, "no qa_id"),
        # the mapping's pairs
        ("qa_to_region_mapping", {"8": None}, "no region_id"),
        ("qa_to_region_mapping", {"x": 3}, "qa_id is no whole number"),
        ("qa_to_region_mapping", {"9" * 5000: 3}, "qa_id is no whole number"),
    ],
)
def test_malformed_records_are_counted_and_left_out(
    tmp_path: Path, files: Files, name: str, record: Any, reason: str
) -> None:
    (tmp_path / "good").mkdir()
    expected, _ = build(tmp_path / "good", files)
    name, _, within = name.partition("/")
    if name == "qa_to_region_mapping":
        files[name] |= record
    else:
        (files[name][0][within] if within else files[name]).append(record)
    made, statistics = build(tmp_path, files)
    assert made == expected
    assert {n: r for n, r in statistics["malformed"].items() if r} == {name: {reason: 1}}
    assert f"| {name}.json | {reason} | 1 |" in (tmp_path / "out" / "statistics.md").read_text()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_nesting_is_counted_outside_of_texts(tmp_path: Path, chunk: int) -> None:
    """Whatever is cut where: brackets in texts, behind escaped quotes and backslashes, count for nothing."""
    deep = ("[" * 100, "]" * 100)
    texts = json.dumps(['[[["[[', "\\", "\\\\[", '\\"{{{', "]]]", "n\n[", "é["])[1:-1]
    for extra, refused in ((0, False), (1, True)):
        text = f"{'[' * extra}{deep[0]}{texts},{texts}{deep[1]}{']' * extra}".encode()
        stream = visual_genome._Shallow(tmp_path, io.BytesIO(text))
        with pytest.raises(InputError, match="deeper than 100") if refused else nullcontext():
            assert b"".join(iter(lambda: stream.read(chunk), b"")) == text  # noqa: B023


def test_deep_nesting_is_refused_at_once(tmp_path: Path, files: Files) -> None:
    source = save(tmp_path / "in", files)
    (source / "objects.json").write_text("[" * 100_000 + "]" * 100_000)
    assert "objects.json is nested deeper" in refused(run("--visual-genome", source, "-o", tmp_path / "out"))


@pytest.mark.parametrize("broken", ["x", "attributes"])
def test_an_object_that_is_partly_bad_is_still_another_one(tmp_path: Path, files: Files, broken: str) -> None:
    """What the annotations say of a second man is unreadable; that there is one, they say."""
    second = thing(41, "man", 90, 10, 40, 60) | {broken: "nowhere" if broken == "x" else [7]}
    files["objects"][0]["objects"].append(second)
    made, statistics = build(tmp_path, files)
    assert [one["id"] for one in made] == ["1_6"]
    assert statistics["dropped"][Drop.AMBIGUOUS] == 2
    reason = "x is no number" if broken == "x" else "attributes are no texts"
    assert statistics["malformed"]["objects"] == {reason: 1}


@pytest.mark.parametrize(
    ("bad", "kept"),
    [
        (7, True),
        ({"names": ["man"]}, True),
        ({"object_id": "x"}, True),
        ({"object_id": 11, "x": "nowhere"}, True),
        # it has no region of its own, and where the unreadable object is may be where the answer is
        (7, False),
    ],
)
def test_a_question_with_a_bad_object_stays(tmp_path: Path, files: Files, bad: Any, kept: bool) -> None:
    files["question_answers"][0]["qas"][0]["q_objects"].append(bad)
    if not kept:
        files["qa_to_region_mapping"] = {}
    made, statistics = build(tmp_path, files)
    assert [one["id"] for one in made] == (["1_5", "1_6"] if kept else ["1_6"])
    assert statistics["questions"] == 3
    assert sum(statistics["malformed"]["question_answers"].values()) == 1
    assert statistics["dropped"][Drop.NO_REGION] == (not kept)


def test_pictures_that_are_not_listed_or_not_there(tmp_path: Path, files: Files) -> None:
    files["question_answers"].append({"id": 3, "qas": []})
    second = json.loads(json.dumps(files["question_answers"][0]).replace('"image_id": 1', '"image_id": 2'))
    files["question_answers"].append(second | {"id": 2})
    _, statistics = build(tmp_path, files)
    assert statistics["dropped"][Drop.NO_SIZE] == 3
    files["image_data"].append(files["image_data"][0] | {"image_id": 2})
    (tmp_path / "pictures" / "VG_100K").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "pictures" / "VG_100K" / "1.jpg")
    (tmp_path / "pictures" / "VG_100K" / "2.jpg").touch()  # what was cut off unpacking
    statistics = dataset.build(save(tmp_path / "in", files), tmp_path / "out2", images=tmp_path / "pictures")
    assert statistics["dropped"][Drop.NO_FILE] == 3
    assert statistics["pictures"] == 2
    assert {s["image"] for s in samples(tmp_path / "out2")} == {"VG_100K/1.jpg"}


def test_a_box_that_two_decimals_lose_is_dropped(tmp_path: Path, files: Files) -> None:
    files["region_descriptions"][0]["regions"] = [region(3, 20.2, 10, 0.6, 20)]  # 0.101 to 0.104
    made, statistics = build(tmp_path, files)
    assert [s["id"] for s in made] == ["1_6"]
    assert statistics["dropped"][Drop.THIN] == 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three drawn scenes, image_id 1 to 3."""
    folder = tmp_path_factory.mktemp("drawn")
    laid = [scenes.layout(seed) for seed in range(3)]
    visual_genome.write(folder, ((scenes.annotate(s, i + 1), scenes.draw(s)) for i, s in enumerate(laid)))
    return folder


def test_drawn_scenes_end_to_end(drawn: Path, tmp_path: Path) -> None:
    statistics = dataset.build(drawn, tmp_path / "out")
    made = samples(tmp_path / "out")
    expected = [
        (seed + 1, d)
        for seed in range(3)
        for d in curate.dialogues(scenes.annotate(scenes.layout(seed), seed + 1))
    ]
    assert len(made) == len(expected) == statistics["kept"] > 30
    for one, (key, dialogue) in zip(made, expected, strict=True):
        said = [turn["value"] for turn in one["conversations"]]
        assert dialogue.question in said[0]
        assert said[3] == dialogue.answer
        assert one["category"] == dialogue.category
        assert one["image"] == f"VG_100K/{key}.jpg"
        with Image.open(drawn / one["image"]) as opened:
            width, height = opened.size
        for part, pixels, side in zip(one["sub_area"], dialogue.box, (width, height) * 2, strict=True):
            assert abs(part * side - pixels) <= 0.005 * side + 1e-9
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        assert sheet.size == (6 * 320, 6 * (240 + 66))
    assert statistics["notes"] == []
    assert statistics["questions"] == sum(
        len(scenes.annotate(scenes.layout(s), s + 1)["question_answers"]["qas"]) for s in range(3)
    )


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (640, 480), "white").save(tmp_path / "1.png")
    dialogue = Dialogue("What?", "that", (160, 120, 320, 240), "")
    one = dataset._Shown("1.png", (0.25, 0.25, 0.5, 0.5), dialogue)
    sheet = dataset.sheet(tmp_path, [one] * 8 + [one._replace(image="none.png")])
    red = [(x, y) for x in range(320) for y in range(240) if sheet.getpixel((x, y)) == (255, 0, 0)]
    # 640 x 480 shrinks to 312 x 234, three pixels from the tile's corner
    assert (min(red), max(red)) == ((3 + 78, 3 + 58), (3 + 156, 3 + 117))
    blank = sheet.crop((2 * 320, 306, 3 * 320, 306 + 240))
    assert blank.getcolors() == [(320 * 240, (255, 255, 255))]


def test_runs_are_alike_and_the_order_of_files_does_not_matter(drawn: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    rng = random.Random(1)
    files = {path.stem: json.loads(path.read_text()) for path in drawn.glob("*.json")}
    for name, content in files.items():
        if isinstance(content, list):
            rng.shuffle(content)
        else:
            files[name] = dict(rng.sample(list(content.items()), len(content)))
    for entry in files["question_answers"]:
        rng.shuffle(entry["qas"])
    save(other, files)
    sheets = set()
    for source, out, seed in ((drawn, "a", 0), (drawn, "b", 0), (other, "c", 0), (drawn, "d", 1)):
        dataset.build(source, tmp_path / out, images=drawn, seed=seed)
        sheets.add((tmp_path / out / "samples.png").read_bytes())
    for name in ("dialogues.json", "statistics.json", "statistics.md"):
        assert len({(tmp_path / out / name).read_bytes() for out in "abc"}) == 1
    assert len(sheets) == 2
    assert (tmp_path / "d" / "dialogues.json").read_bytes() == (
        tmp_path / "a" / "dialogues.json"
    ).read_bytes()


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    def peak(pictures: int) -> int:
        folder = tmp_path / str(pictures)
        visual_genome.write(folder, ((r, None) for r in bench.records_of(pictures, Counter())))
        tracemalloc.start()
        dataset.build(folder, folder / "out")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)  # what is cached once
    few, many = peak(20), peak(120)
    size = sum(path.stat().st_size for path in (tmp_path / "120").glob("*.json"))
    assert size > 2_000_000
    assert many - few < size / 20


# ------------------------------------------------------------------------------------- the command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["curate", *map(str, arguments)])


def refused(result: Result) -> str:
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_command_says_what_it_did(drawn: Path, tmp_path: Path) -> None:
    result = run("--visual-genome", drawn, "-o", tmp_path / "new" / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "new" / "out" / "statistics.json").read_text())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    result = run("--visual-genome", drawn, "-o", tmp_path / "out", "--images", tmp_path)
    assert "has no pictures" in result.stdout
    assert not (tmp_path / "out" / "samples.png").exists()
    assert "expected a new or an empty folder" in refused(
        run("--visual-genome", drawn, "-o", tmp_path / "out")
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.write_text(p.read_text()[:-60]), "behind record 0"),
        (lambda p: p.write_text(p.read_text()[:-1] + ", {}, {} x"), "behind record 3"),
        (lambda p: p.write_text("<html>"), "begins with '<', expected a list"),
        (lambda p: p.write_text(""), "begins with '', expected a list"),
        (lambda p: p.write_text("{}"), "begins with '{', expected a list"),
        (lambda p: p.write_bytes(b'[{"id": "\xff"}]'), "no JSON behind record 0"),
        (lambda p: p.unlink(), "has no question_answers.json"),
        (lambda p: p.rename(f"{p}.zip"), "no archive that can be read"),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(
    tmp_path: Path, files: Files, spoil: Callable[[Path], object], said: str
) -> None:
    source = save(tmp_path / "in", files)
    spoil(source / "question_answers.json")
    reason = refused(run("--visual-genome", source, "-o", tmp_path / "out"))
    assert said in reason
    assert reason.count("question_answers.json") == 1  # a sentence is in no other one
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_all_that_is_missing_is_named(tmp_path: Path) -> None:
    reason = refused(run("--visual-genome", tmp_path, "-o", tmp_path / "out"))
    assert "image_data.json, objects.json, region_descriptions.json, question_answers.json" in reason
    for option in ("--visual-genome", "--images"):
        given = {"--visual-genome": tmp_path, "--images": tmp_path} | {option: tmp_path / "nowhere"}
        arguments = [argument for pair in given.items() for argument in pair]
        assert "nowhere" in refused(run(*arguments, "-o", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["reading", "curating"])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, files: Files, stage: str) -> None:
    def watch(doing: str, done: int, total: int) -> None:
        if doing.startswith(stage):
            raise KeyboardInterrupt

    source = save(tmp_path / "in", files)
    with pytest.raises(KeyboardInterrupt):
        dataset.build(source, tmp_path / "out", watch=watch)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_ended_leaves_nothing(tmp_path: Path, files: Files, number: signal.Signals) -> None:
    source = save(tmp_path / "in", files)
    arguments = ["curate", "--visual-genome", str(source), "-o", str(tmp_path / "new" / "out")]
    code = (
        "import os\nfrom dualfocus import cli\nfrom dualfocus.train import dataset\n"
        f"dataset._write = lambda *_: os.kill(os.getpid(), {number})\ncli.app({arguments})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, files: Files) -> None:
    source = save(tmp_path / "in", files)
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom dualfocus.train import dataset\n"
        "dataset.sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"dataset.build(Path({str(source)!r}), Path({str(tmp_path / 'out')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = tmp_path / ".out.partial"
    assert [path.name for path in left.rglob("dialogues.json")] == ["dialogues.json"]
    (left / "link").symlink_to(source)
    dataset.build(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert len(samples(tmp_path / "out")) == 2
    assert len([*source.iterdir()]) == 6


def test_two_runs_to_one_place_are_told_apart(tmp_path: Path, files: Files) -> None:
    source = save(tmp_path / "in", files)
    with claimed(tmp_path / ".out.partial", InputError):
        assert "another process writes to" in refused(run("--visual-genome", source, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_folders_made_for_nothing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    refused(run("--visual-genome", tmp_path / "in", "-o", tmp_path / "a" / "b" / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_name_that_the_output_cannot_spell(drawn: Path, tmp_path: Path) -> None:
    arguments = ["curate", "--visual-genome", str(drawn), "-o", str(tmp_path / "é\udcff")]
    command = [
        sys.executable,
        "-c",
        "import sys; from dualfocus import cli; cli.app(sys.argv[1:])",
        *arguments,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/??: 3 of 3 pictures" in done.stdout


def test_a_full_disk_names_the_place(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    source = save(tmp_path / "in", files)
    monkeypatch.setattr(dataset, "_write", full)
    reason = refused(run("--visual-genome", source, "-o", tmp_path / "out"))
    assert reason == f"dualfocus: {tmp_path / '.out.partial'}: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_extra_is_named_where_it_is_missing() -> None:
    code = (
        "import sys; sys.modules['ijson'] = None\n"
        "from dualfocus import cli\n"
        "cli.app(['curate', '--visual-genome', '.', '-o', 'nowhere'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "dualfocus: curate needs ijson: pip install 'dualfocus[cpu,train]'\n"


def test_the_benchmark_finds_what_it_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench, "FAULTY", 0.5)
    arguments = ["bench", "curate", "--pictures", "30", "--folder", str(tmp_path), "--json", "--save"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = json.loads(result.stdout)
    assert found["malformed"]["planted"] == found["malformed"]["counted"] > 8
    assert found["malformed"]["alike"]
    assert found["statistics"]["kept"] > 0
    assert found["memory"]["value"] == found["curate"]["peak_rss"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    (saved,) = (tmp_path / "results").iterdir()
    assert saved.name.endswith("-curate.json")
    assert "planted" in bench.markdown(found)
