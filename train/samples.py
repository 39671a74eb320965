"""Training files -> what the decoder is fed: LLaVA's samples, and the dialogues that curation writes.

A file is a list of ``{id, image?, conversations [{from: human|gpt, value}]}``: a picture or none, shown where
a human turn says ``<image>``. With ``sub_area`` [x0, y0, x1, y1], fractions of the picture's width and
height, it is a dialogue of DualFocus: two images, the picture and the crop of that box, and the box is the
first reply. Training feeds what inference feeds: the checkpoint's prompts through `runtime.turns`, its
coordinates and crops through `runtime.geometry`, pixels through `runtime.image`.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from dualfocus.runtime.errors import InputError, PictureError
from dualfocus.runtime.files import read_bytes
from dualfocus.runtime.geometry import Box, convert, find_region
from dualfocus.runtime.image import open_picture, view, whole
from dualfocus.runtime.manifest import BoxFormat, Manifest
from dualfocus.runtime.turns import DUALFOCUS, ImageToken, Question, Turn, render, tokenize

LIMIT = 8 << 30  # bytes: LLaVA's own file has one billion
MARK = "<image>"  # where the files' turns show an image
IGNORED = -100  # the label of what is not learned

_LOCATE, _MICRO = (
    re.compile(re.escape(template).replace(re.escape(field), "(.+)"), re.DOTALL)
    for template, field in ((DUALFOCUS.locate, "{Q}"), (DUALFOCUS.micro, "{T}"))
)


class _Said(msgspec.Struct):
    speaker: str = msgspec.field(name="from")
    value: str


class _Entry(msgspec.Struct):
    conversations: list[_Said]
    image: str | None = None
    sub_area: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Sample:
    """One conversation: pairs of what the human says and the reply; `box` in fractions of the picture."""

    picture: str | None
    box: tuple[float, float, float, float] | None
    turns: tuple[tuple[str, str], ...]

    @property
    def images(self) -> int:
        """How many the decoder is shown."""
        return (self.picture is not None) + (self.box is not None)

    def length(self, image_tokens: int) -> int:
        """About how many tokens it has, as LLaVA guesses: the words and the images'."""
        return sum(len(text.split()) for turn in self.turns for text in turn) + self.images * image_tokens

    def question(self) -> str | None:
        """What a dialogue of the protocol's own wording asks, without the protocol's own hint."""
        if self.box is None or len(self.turns) != 2:
            return None
        first, second = _LOCATE.fullmatch(self.turns[0][0]), _MICRO.fullmatch(self.turns[1][0])
        if not (first and second and first[1] == second[1].split("\n")[0].rstrip()):
            return None
        return second[1].removesuffix(f"\n{DUALFOCUS.hint}")


def read(file: Path, pictures: Path) -> tuple[list[Sample], Counter[str]]:
    """The samples of `file`, whose images are in the folder `pictures`, and how many were dropped, by reason.

    Raises InputError where the file is none of samples, and where none of its pictures is there: some may be
    missing, as those that OCR-VQA has lost since, but not by a mistyped folder.
    """
    content = read_bytes(file, InputError, limit=LIMIT)
    try:
        # not by msgspec: half of a character, and NaN, make one sample malformed, not the file
        raw = json.loads(content)
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{file} is nested too deeply to be read") from None
    if not isinstance(raw, list):
        raise InputError(f"{file} holds a {type(raw).__name__}, expected a list of samples")
    exists = lru_cache(maxsize=1 << 16)(os.path.isfile)
    samples, dropped, missing = [], Counter[str](), ""
    for entry in raw:
        sample = _parse(entry, pictures)
        if sample is None:
            dropped["malformed"] += 1
        elif sample.box is not None and not _is_inside(sample.box):
            dropped["box outside the picture, or empty"] += 1
        elif sample.picture is not None and not exists(sample.picture):
            dropped["picture missing"] += 1
            missing = missing or sample.picture
        else:
            samples.append(sample)
    if missing and not any(sample.picture for sample in samples):
        raise InputError(f"{file}: none of its pictures is there, the first of them {missing!r:.300}")
    return samples, dropped


def _parse(entry: Any, pictures: Path) -> Sample | None:
    """None where it is no sample: another structure, or turns that show other images than there are."""
    try:
        read = msgspec.convert(entry, _Entry)
        turns = [(turn.speaker, turn.value) for turn in read.conversations]
        "".join(text for _, text in turns).encode()  # what is no UTF-8 cannot be tokenised
    except (msgspec.ValidationError, UnicodeEncodeError, OverflowError, RecursionError):
        return None
    if turns and turns[0][0] == "gpt":  # as some of ShareGPT's begin, amid a conversation
        del turns[0]
    box = read.sub_area
    shown = [text.count(MARK) for speaker, text in turns if speaker == "human"]
    picture = None if read.image is None else os.path.join(pictures, read.image)
    if [speaker for speaker, _ in turns] != ["human", "gpt"] * len(shown) or not turns:
        return None
    pairs = tuple((turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2))
    if box is None:
        return Sample(picture, None, pairs) if sum(shown) == (picture is not None) else None
    if picture is None or sum(shown) != 2 or shown[0] != 1:
        return None
    return Sample(picture, box, pairs)


def _is_inside(box: tuple[float, float, float, float]) -> bool:
    return 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1


@dataclass(frozen=True)
class Row:
    """One sample as the decoder is fed it.

    A column is (token id, row of `views`' image tokens or -1 where it is text, label or IGNORED).
    """

    columns: NDArray[np.int64]  # (L, 3)
    views: list[NDArray[np.float32]]  # (1, 3, S, S) each
    counts: Counter[str]


@dataclass(frozen=True)
class Part:
    """Rows that go through the model together, padded on the right."""

    ids: Tensor  # (B, L) i64
    places: Tensor  # (B, L) i64: rows of the image tokens of `pixels`, one image after the other, or -1
    labels: Tensor  # (B, L) i64
    pixels: Tensor  # (V, 3, S, S) f32, at least one: without images, one that nothing shows
    counts: Counter[str]


class Rows(Dataset[Row]):
    """Samples as rows, made when asked for."""

    def __init__(
        self, samples: Sequence[Sample], manifest: Manifest, tokenizer: Tokenizer, length: int
    ) -> None:
        """Rows are cut behind `length` tokens."""
        self.samples, self.manifest, self.tokenizer, self.length = samples, manifest, tokenizer, length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Row:
        """A row without columns, counted as "unusable", where the picture is damaged or the crop empty."""
        manifest, sample, counts = self.manifest, self.samples[index], Counter[str]()
        views, reply = [], ""
        try:
            if sample.picture is not None:
                picture = open_picture(sample.picture)
                views.append(view(picture, whole(picture), manifest.image))
            if sample.box is not None:
                height, width = picture.shape[:2]
                reply = self._box_text(sample.box, width, height)
                region = find_region(reply, manifest.coordinates, width, height, manifest.image)
                if region.crop is None:
                    raise PictureError(f"{sample.picture}: {region.problem}")
                views.append(view(picture, region.crop, manifest.image))
        except PictureError:
            return Row(np.zeros((0, 3), np.int64), [], Counter(unusable=1))
        question, turns = self._turns(sample, reply)
        pieces = render(manifest.prompts, question, turns)
        names = [str(i) for i in range(len(views))]
        prompt = tokenize(pieces, self.tokenizer, manifest.tokens, names, manifest.image.tokens)
        columns = np.array(
            [
                (0, int(token.image) * manifest.image.tokens + token.position, IGNORED)
                if isinstance(token, ImageToken)
                else (token, -1, IGNORED)
                for token in prompt.tokens
            ]
        )
        for reply_at in prompt.replies:
            columns[reply_at, 2] = columns[reply_at, 0]
        counts["cut"] = int(len(columns) > self.length)
        columns = columns[: self.length]
        counts["tokens"], counts["targets"] = len(columns), int((columns[:, 2] != IGNORED).sum())
        return Row(columns, views, counts)

    def _box_text(self, box: tuple[float, float, float, float], width: int, height: int) -> str:
        manifest = self.manifest
        own = convert(Box(*box, "original"), manifest.coordinates, width, height, manifest.image)
        return (manifest.box or BoxFormat()).write(*own.corners)

    def _turns(self, sample: Sample, box: str) -> tuple[Question | None, list[Turn]]:
        """The protocol's turns in the checkpoint's words; of any other conversation, its own."""
        prompts = self.manifest.prompts
        if question := sample.question():
            turns = [Turn(prompts.locate, box), Turn(prompts.micro, sample.turns[1][1])]
            return Question.parse(question, prompts.hint), turns
        turns = []
        for i, (human, reply) in enumerate(sample.turns):
            shown = f"{prompts.image}\n" * human.count(MARK)  # in front, as LLaVA does
            text = shown + human.replace(MARK, "").strip()
            turns.append(Turn(text, box if box and i == 0 else reply))
        return None, turns

    def collate(self, rows: Sequence[Row]) -> Part:
        """One part of `rows`, of which there may be none."""
        size, tokens = self.manifest.image.size, self.manifest.image.tokens
        longest = max([1, *(len(row.columns) for row in rows)])
        out = np.tile(np.array((0, -1, IGNORED)), (max(1, len(rows)), longest, 1))
        seen = 0
        for i, row in enumerate(rows):
            columns = out[i, : len(row.columns)]
            columns[:] = row.columns
            columns[columns[:, 1] >= 0, 1] += seen * tokens
            seen += len(row.views)
        views = [pixels for row in rows for pixels in row.views]
        pixels = np.concatenate(views or [np.zeros((1, 3, size, size), np.float32)])
        ids, places, labels = torch.from_numpy(out).unbind(-1)
        counts = sum((row.counts for row in rows), Counter(samples=len(rows)))
        return Part(ids, places, labels, torch.from_numpy(pixels), counts)


def batches(samples: Sequence[Sample], size: int, seed: str) -> list[list[int]]:
    """All samples in an order drawn from `seed`, in batches of `size` with pictures or of such without.

    What is left over of both kinds shares the last drawn batches, so that none but one is short.
    """
    rng = random.Random(seed)
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for i in rng.sample(range(len(samples)), len(samples)):
        kinds[samples[i].picture is not None].append(i)
    rest = [i for kind in kinds.values() for i in kind[len(kind) // size * size :]]
    whole_ones = [kind[: len(kind) // size * size] for kind in kinds.values()]
    cut = [of[at : at + size] for of in (*whole_ones, rest) for at in range(0, len(of), size)]
    return rng.sample(cut, len(cut))


def deal(
    batch: Sequence[int], lengths: Sequence[int], rows: int, parts: int, process: int, processes: int
) -> list[list[int]]:
    """A batch's `parts` of at most `rows` samples for one process: samples of like length share a part.

    So do parts that processes run at the same time. The parts of a short batch are short, or empty.
    """
    ordered = sorted(batch, key=lambda i: (-lengths[i], i))
    slices = [ordered[at * rows : (at + 1) * rows] for at in range(parts * processes)]
    return slices[process::processes]
