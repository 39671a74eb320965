"""The crop kernel against Pillow + NumPy doing the same: crop, pad, resize, normalise, transpose. One thread.

``dualfocus bench crop``. Pillow + NumPy starts from an open Pillow image, so that no conversion is charged to
it. Each path's bytes are compared with Pillow's before it is timed. OpenCV and torchvision, where installed,
are there for orientation: their pixels differ. "copy of the box" is a limit: the time it takes merely to copy
the pixels concerned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dualfocus import kernels
from dualfocus.bench import harness
from dualfocus.bench.harness import Watch
from dualfocus.kernels import reference

if TYPE_CHECKING:
    from rich.console import Console

SIZE = 336
PAD = (122, 116, 104)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CASES = {
    "macro view: 4000 x 3000": (0, 0, 4000, 3000),
    "crop: 500 x 500": (1700, 1200, 2200, 1700),
    "small crop: 120 x 90, enlarged": (1700, 1200, 1820, 1290),
}
BASELINE = "Pillow + NumPy"

Box = tuple[int, int, int, int]
Floats = npt.NDArray[np.float32]


def photograph() -> npt.NDArray[np.uint8]:
    """(3000, 4000, 3): smooth shapes and noise. None of the candidates' times depends on what is shown."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((4000, 3000), reference.BICUBIC), np.int16)
    noisy: npt.NDArray[np.int16] = smooth + random.integers(-9, 10, smooth.shape, dtype=np.int16)
    return noisy.clip(0, 255).astype(np.uint8)


def normalised(pixels: npt.NDArray[np.uint8]) -> Floats:
    """(size, size, 3) uint8 -> (3, size, size) float32, as NumPy does it fastest: one multiply, one add."""
    scale = np.float32(1 / 255) / np.array(STD, np.float32)
    shift = -np.array(MEAN, np.float32) / np.array(STD, np.float32)
    return np.ascontiguousarray((pixels * scale + shift).transpose(2, 0, 1))


def with_pillow(image: Image.Image, box: Box) -> Floats:
    """The baseline: crop, pad, resize, normalise, transpose, each a step of its own."""
    square = reference.pad_square(image.crop(box), PAD)
    return normalised(np.asarray(square.resize((SIZE, SIZE), reference.BICUBIC)))


def with_kernel(isa: str, picture: npt.NDArray[np.uint8], box: Box) -> Floats:
    """The kernel's path `isa`."""
    kernels.force_isa(isa)
    return kernels.crop_resize(picture, box, SIZE, fit=PAD, mean=MEAN, std=STD)


def with_opencv(picture: npt.NDArray[np.uint8], box: Box) -> Floats:
    """OpenCV, by area where it shrinks: its bicubic filter reads four pixels at any scale, and aliases."""
    import cv2

    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0)
    left, top = (side - (x1 - x0)) // 2, (side - (y1 - y0)) // 2
    right, bottom = side - (x1 - x0) - left, side - (y1 - y0) - top
    square = cv2.copyMakeBorder(
        picture[y0:y1, x0:x1], top, bottom, left, right, cv2.BORDER_CONSTANT, value=PAD
    )
    filtering = cv2.INTER_AREA if side > SIZE else cv2.INTER_CUBIC
    return normalised(np.asarray(cv2.resize(square, (SIZE, SIZE), interpolation=filtering), np.uint8))


def with_torchvision(picture: npt.NDArray[np.uint8], box: Box) -> object:
    """torchvision's antialiased bicubic resize of a uint8 tensor."""
    import torch
    from torchvision.transforms.v2 import InterpolationMode, functional

    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0)
    left, top = (side - (x1 - x0)) // 2, (side - (y1 - y0)) // 2
    square = torch.tensor(PAD, dtype=torch.uint8).repeat(side, side, 1)
    square[top : top + y1 - y0, left : left + x1 - x0] = torch.from_numpy(picture[y0:y1, x0:x1])
    resized = functional.resize(
        square.permute(2, 0, 1), [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True
    )
    return functional.normalize(resized.float() / 255, list(MEAN), list(STD)).contiguous()


def candidates(
    picture: npt.NDArray[np.uint8], image: Image.Image, box: Box
) -> dict[str, Callable[[], object]]:
    """By name, what to time on one case."""
    x0, y0, x1, y1 = box
    found: dict[str, Callable[[], object]] = {BASELINE: functools.partial(with_pillow, image, box)}
    for isa in kernels.available():
        found[f"dualfocus, {isa}"] = functools.partial(with_kernel, isa, picture, box)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV (area or bicubic, orientation)"] = functools.partial(with_opencv, picture, box)
    with contextlib.suppress(ImportError, RuntimeError):  # the latter: built for another torch
        import torch
        import torchvision  # noqa: F401

        torch.set_num_threads(1)
        found["torchvision (orientation)"] = functools.partial(with_torchvision, picture, box)
    room = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
    found["copy of the box (limit)"] = lambda: np.copyto(room, picture[y0:y1, x0:x1])
    return found


def run(rounds: int, watch: Watch = lambda *_: None) -> dict[str, Any]:
    """All that is measured, as the JSON object has it. RuntimeError if a path's pixels are not Pillow's."""
    picture = photograph()
    image = Image.fromarray(picture)
    cases = {}
    for name, box in CASES.items():
        want = reference.crop_resize_u8(picture, box, SIZE, fit=PAD)
        for isa in kernels.available():
            kernels.force_isa(isa)
            if not np.array_equal(kernels.crop_resize_u8(picture, box, SIZE, fit=PAD), want):
                raise RuntimeError(f"{isa} on {name}: not the pixels that Pillow makes")
        timings = harness.interleaved(candidates(picture, image, box), rounds, watch=watch)
        kernels.force_isa(None)
        cases[name] = {
            label: dataclasses.asdict(timing) | {"ratio": timings[BASELINE].median / timing.median}
            for label, timing in timings.items()
        }
    paths = {"paths": kernels.available(), "size": SIZE}
    return harness.header("crop", threads=1) | paths | {"rounds": rounds, "unit": "ms", "cases": cases}


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as tables for people."""
    from rich.table import Table

    harness.show_machine(result["machine"], console)
    for name, rows in result["cases"].items():
        console.print(f"{name} -> {SIZE} x {SIZE}, {result['rounds']} rounds")
        table = Table(box=None, pad_edge=False)
        for column in ("", "ms", "quartiles", "times as fast"):
            table.add_column(column, justify="right" if column else "left")
        for label, row in rows.items():
            quartiles = f"{row['low']:.2f} - {row['high']:.2f}"
            table.add_row(label, f"{row['median']:.2f}", quartiles, f"{row['ratio']:.1f}")
        console.print(table)
        console.print()


def markdown(result: Mapping[str, Any]) -> str:
    """The result as README's table."""
    cases = result["cases"]
    lines = [
        f"| ms (times as fast as {BASELINE}) | {' | '.join(cases)} |",
        "|---" * (1 + len(cases)) + "|",
    ]
    for label in next(iter(cases.values())):
        cells = [f"{rows[label]['median']:.2f} ({rows[label]['ratio']:.1f}\u00d7)" for rows in cases.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)
