"""Tiny benchmarks in the formats of the published ones, with drawn pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def drawing(n: int) -> bytes:
    """The n-th picture, as a PNG file."""
    image = Image.new("RGB", (200 + 8 * n, 160), (40 * n % 256, 90, 140))
    ImageDraw.Draw(image).rectangle((20 + n, 30, 80, 90), fill=(250, 240, 10 * n % 256))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture(path: Path, n: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawing(n))


def lines(path: Path, entries: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def textvqa(root: Path, questions: int = 4) -> Path:
    """Two questions on each picture, whose id they have. The right answers are 10 times `right N`."""
    asked, annotations = [], []
    for n in range(questions):
        image, text = f"{n // 2:016x}", f"What is written on sign {n}?"
        picture(root / "train_images" / f"{image}.jpg", n // 2)
        asked.append(
            {
                "question_id": image,
                "image": f"{image}.jpg",
                "text": f"{text}\nReference OCR token: S, {n // 2}\n{SHORT}",
            }
        )
        annotations.append({"image_id": image, "question": text.upper(), "answers": [f"right {n}"] * 10})
    lines(root / "llava_textvqa_val_v051_ocr.jsonl", asked)
    # in another order than the questions
    (root / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": annotations[::-1]}))
    return root


def pope(root: Path) -> Path:
    """Three settings of two questions on one picture; the labels' ids are their own, as POPE's are."""
    asked = []
    for category in ("adversarial", "popular", "random"):
        labels = []
        for thing, label in (("star", "yes"), ("dog", "no")):
            text = f"Is there a {thing} in the image?"
            labels.append(
                {"question_id": len(labels) + 1, "image": "COCO_1.jpg", "text": text, "label": label}
            )
            asked.append(
                {
                    "question_id": len(asked),
                    "image": "COCO_1.jpg",
                    "text": f"{text}\n{SHORT}",
                    "category": category,
                }
            )
        lines(root / "coco" / f"coco_pope_{category}.json", labels[::-1])
    picture(root / "val2014" / "COCO_1.jpg", 1)
    lines(root / "llava_pope_test.jsonl", asked)
    return root


def seed(root: Path) -> Path:
    """Two questions on pictures and one on a video's, which has an id in letters."""
    asked, told = [], []
    for n, (id, kind) in enumerate((("101", "image"), ("102", "image"), ("v3", "video"))):
        picture(root / "SEED-Bench-image" / str(n), n)
        options = "".join(f"{name}. thing {name}{n}\n" for name in "ABCD")
        asked.append(
            {
                "question_id": int(id) if id.isdecimal() else id,
                "image": f"SEED-Bench-image/{n}",
                "text": f"What is thing {n}?\n{options}{LETTER}",
                "category": "Instance Identity",
            }
        )
        told.append(
            {"question_id": id, "answer": "ABC"[n], "question_type_id": 2 + n // 2, "data_type": kind}
        )
    lines(root / "llava-seed-bench.jsonl", asked)
    types = {"Instance Identity": 2, "Action Recognition": 3}
    (root / "SEED-Bench.json").write_text(json.dumps({"questions": told[::-1], "question_type": types}))
    return root


def gqa_mcq(root: Path) -> Path:
    asked, told = [], {}
    for n, answer in enumerate(("left", "dog")):
        picture(root / "data" / "images" / f"n{n}.jpg", n)
        asked.append(
            {
                "question_id": f"20{n}",
                "image": f"n{n}.jpg",
                "question": f"Which one is {n}?\nA. right\nB. {answer}",
            }
        )
        told[f"20{n}"] = {"question": "Which one?", "answer": answer, "imageId": f"n{n}"}
    lines(root / "llava_gqa_testdev_balanced_mcq.jsonl", asked)
    (root / "data" / "testdev_balanced_questions.json").write_text(json.dumps(told))
    return root


MMBENCH = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category")


def mmbench(root: Path) -> Path:
    """A question of three options, with a hint, and one of two; all first ones come before the rotations."""
    rows: list[list[str]] = []
    for base, options, hint in ((7, ["a cat", "a dog", "a cow"], "It is a pet."), (9, ["red", "blue"], "")):
        for k in range(len(options)):
            turned = options[k:] + options[:k]
            cells = [*turned, *[""] * (4 - len(turned))]
            right = "ABC"[turned.index(options[0])]
            image = base64.b64encode(drawing(base)).decode()
            question = f'What is "{base}"?'
            rows.append(
                [str(base + k * 1_000_000), question, hint, *cells, right, "fine", image, f"kind {base}"]
            )
    root.mkdir(parents=True, exist_ok=True)
    with (root / "mmbench_dev_20230712.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerows([MMBENCH, *sorted(rows, key=lambda row: int(row[0]))])
    return root


WRITERS = {"textvqa": textvqa, "pope": pope, "seed": seed, "gqa-mcq": gqa_mcq, "mmbench": mmbench}
