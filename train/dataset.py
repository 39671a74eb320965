"""Visual Genome's annotations to a data set in LLaVA's format: ``dualfocus curate``.

What is written to the folder::

    dialogues.json   [{id, image, sub_area, conversations, category where there is one}]: step 2's turn, the
                     box, step 3's turn, the answer, by the runtime's own prompts; `sub_area` is the box as
                     numbers: fractions of the picture's width and height
    statistics.json  what was kept, and how much was dropped, or left out as malformed, for which reason
    statistics.md    the same for people
    samples.png      a contact sheet of some of the pictures with their boxes
"""

from __future__ import annotations

import bisect
import json
import random
import shutil
import textwrap
from collections.abc import Mapping
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib  # ships the DejaVu family under a free licence
from PIL import Image, ImageDraw, ImageFont

from dualfocus.runtime.errors import InputError, PictureError
from dualfocus.runtime.files import claimed, empty, naming, sync, with_parents
from dualfocus.runtime.image import open_picture
from dualfocus.runtime.manifest import BoxFormat
from dualfocus.runtime.turns import DUALFOCUS, Question
from dualfocus.train.curate import WHOLE, Box, Dialogue, Drop, fractions, judge
from dualfocus.train.visual_genome import Annotations, Watch, find_pictures

SIZES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, WHOLE)  # the histogram's edges: parts of the picture's area
SHEET = 36  # samples on the contact sheet, six in a row
TILE, CAPTION = (320, 240), 66  # pixels
LINE = 46  # characters of a caption's line


class _Shown(NamedTuple):
    """A sample for the contact sheet."""

    image: str
    area: Box
    dialogue: Dialogue


def build(
    source: Path, out: Path, *, images: Path | None = None, seed: int = 0, watch: Watch = lambda *_: None
) -> dict[str, Any]:
    """Curate the Visual Genome folder `source` into the new folder `out`; returns what statistics.json holds.

    Pictures are looked for in `images`, else in `source`: <image_id>.jpg there, or in VG_100K or VG_100K_2.
    A question whose picture has no file is dropped, unless none has one. `seed` chooses the contact sheet.
    Samples are in the order of image_id and qa_id. InputError where something given cannot be used; `out` is
    then not there.
    """
    out = out.resolve()
    check_new(out)
    if not source.is_dir():
        raise InputError(f"{source}: not a folder, expected Visual Genome's files in one")
    if images is not None and not images.is_dir():
        raise InputError(f"{images}: not a folder, expected Visual Genome's pictures in one")
    place = out.parent / f".{out.name}.partial"
    with with_parents(out), claimed(place, InputError):
        try:
            empty(place)  # of what a run that was killed left
            with naming(place):
                statistics = _build(source, place, images, seed, watch)
            (place / "out").rename(out)
        finally:
            shutil.rmtree(place)
    return statistics


def _build(source: Path, place: Path, images: Path | None, seed: int, watch: Watch) -> dict[str, Any]:
    """Write the folder `out` in `place`; what is only needed meanwhile lies next to it."""
    folder = place / "out"
    folder.mkdir()
    with closing(Annotations(source, place / "spool", watch)) as annotations:
        pictures = find_pictures(images or source)
        if not pictures:
            annotations.notes.append(
                f"{images or source} has no pictures, so there is no contact sheet, and `image` is a guess"
            )
        statistics, shown = _write(annotations, pictures, folder / "dialogues.json", seed, watch)
    if pictures:
        sheet(images or source, shown).save(folder / "samples.png")
    (folder / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    (folder / "statistics.md").write_text(markdown(statistics) + "\n", encoding="utf-8")
    sync(folder)
    return statistics


def check_new(out: Path) -> None:
    """Raise InputError unless `out`, a resolved path, is a place where a finished folder can be moved to."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not out.is_mount())):
        raise InputError(f"{out} is there already, expected a new or an empty folder")
    if out.is_mount():
        raise InputError(f"{out} is a file system of its own, expected a folder in one")


def _write(
    annotations: Annotations, pictures: Mapping[int, str], path: Path, seed: int, watch: Watch
) -> tuple[dict[str, Any], list[_Shown]]:
    """Judges and writes every question; returns the statistics, and the samples to show in their order."""
    rng = random.Random(seed)
    dropped = dict.fromkeys(Drop, 0)
    sizes = [0] * (len(SIZES) - 1)
    kept = used = 0
    chosen: dict[int, _Shown] = {}  # by how many samples came before it
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for done, (key, records) in enumerate(annotations.pictures()):
            if done % 256 == 0:
                watch("curating", done, len(annotations))
            before, listed = kept, records["image_data"]
            if listed is None or (pictures and key not in pictures):
                dropped[Drop.NO_SIZE if listed is None else Drop.NO_FILE] += len(
                    records["question_answers"]["qas"]
                )
                continue
            width, height = listed["width"], listed["height"]
            image = pictures.get(key) or "/".join(listed["url"].split("/")[-2:]) or f"{key}.jpg"
            for question, judged in judge(records):
                if isinstance(judged, Drop):
                    dropped[judged] += 1
                    continue
                area = fractions(judged.box, width, height)
                if area[0] >= area[2] or area[1] >= area[3]:  # the crop would be empty
                    dropped[Drop.THIN] += 1
                    continue
                made = sample(f"{key}_{question}", image, area, judged)
                file.write(",\n" * (kept > 0) + json.dumps(made))
                x0, y0, x1, y1 = judged.box
                sizes[bisect.bisect_left(SIZES[1:-1], (x1 - x0) * (y1 - y0) / (width * height))] += 1
                if rng.random() < SHEET / (kept + 1):  # so that all are as likely in the end
                    if len(chosen) == SHEET:
                        del chosen[rng.choice(list(chosen))]
                    chosen[kept] = _Shown(image, area, judged)
                kept += 1
            used += kept > before
        file.write("]\n")
    statistics = {
        "pictures": len(annotations),
        "pictures_kept": used,
        "questions": kept + sum(dropped.values()),
        "kept": kept,
        "dropped": {str(reason): count for reason, count in dropped.items()},
        "malformed": {name: dict(sorted(count.items())) for name, count in annotations.malformed.items()},
        "box_sizes": [
            {"above": low, "up_to": high, "boxes": count}
            for (low, high), count in zip(pairwise(SIZES), sizes, strict=True)
        ],
        "seed": seed,
        "notes": annotations.notes,
    }
    return statistics, [chosen[number] for number in sorted(chosen)]


def sample(key: str, image: str, area: Box, dialogue: Dialogue) -> dict[str, Any]:
    """One element of dialogues.json: its id, the picture's path, the box as `fractions` makes it."""
    question = Question.parse(dialogue.question, DUALFOCUS.hint)
    turns = (
        ("human", question.fill(DUALFOCUS.locate).text),
        ("gpt", BoxFormat().write(*area)),
        ("human", question.fill(DUALFOCUS.micro).text),
        ("gpt", dialogue.answer),
    )
    return {
        "id": key,
        "image": image,
        "sub_area": list(area),
        "conversations": [{"from": who, "value": text} for who, text in turns],
    } | ({"category": dialogue.category} if dialogue.category else {})


def sheet(folder: Path, shown: list[_Shown]) -> Image.Image:
    """The contact sheet: each picture with its box, question and answer below."""
    columns = 6
    width, height = TILE[0], TILE[1] + CAPTION
    whole = Image.new("RGB", (columns * width, SHEET // columns * height), "white")
    pen = ImageDraw.Draw(whole)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)
    for number, (image, area, dialogue) in enumerate(shown):
        left, top = number % columns * width + 3, number // columns * height + 3
        lines = textwrap.wrap(dialogue.question, LINE, max_lines=2, placeholder=" …")
        lines += textwrap.wrap(f"→ {dialogue.answer}", LINE, max_lines=1, placeholder=" …")
        try:
            picture = Image.fromarray(open_picture(folder / image))
        except PictureError:
            lines.insert(0, f"{image} cannot be read")
        else:
            picture.thumbnail((TILE[0] - 6, TILE[1] - 6))
            whole.paste(picture, (left, top))
            x0, y0, x1, y1 = (part * side for part, side in zip(area, picture.size * 2, strict=True))
            pen.rectangle((left + x0, top + y0, left + x1, top + y1), outline="red", width=2)
        pen.multiline_text((left, top + TILE[1]), "\n".join(lines), "black", font, spacing=3)
    return whole


def markdown(statistics: Mapping[str, Any]) -> str:
    """The statistics as tables."""
    asked, kept = statistics["questions"], statistics["kept"]

    def row(name: str, count: int, of: int) -> str:
        return f"| {name} | {count:,} | {100 * count / max(of, 1):.1f} % |"

    lines = ["| questions | | |", "|---|--:|--:|", row("all", asked, asked), row("kept", kept, asked)]
    lines += [row(f"dropped: {reason}", count, asked) for reason, count in statistics["dropped"].items()]
    lines += ["", "| the box's part of the picture | boxes | |", "|---|--:|--:|"]
    for size in statistics["box_sizes"]:
        name = f"{100 * size['above']:g} to {100 * size['up_to']:g} %"
        lines.append(row(name, size["boxes"], kept))
    lines += ["", "| malformed, left out | | |", "|---|---|--:|"]
    lines += [
        f"| {name}.json | {reason} | {count:,} |"
        for name, reasons in statistics["malformed"].items()
        for reason, count in reasons.items()
    ] or ["| none | | |"]
    used = f"{statistics['pictures_kept']:,} of {statistics['pictures']:,} pictures with questions are used."
    return "\n\n".join([used, *(f"{note}." for note in statistics["notes"]), "\n".join(lines)])
