"""One call from a picture to a model's input: crop, fit into a square, bicubic resize, normalise.

``crop_resize_u8(picture, box, size, fit=colour)`` equals, bit for bit, Pillow's
``pad_square(picture.crop(box), colour).resize((size, size), BICUBIC)``: the filter's taps never leave the
crop. With ``fit="crop"`` it equals Hugging Face's CLIPImageProcessor instead: the shorter edge resized to
``size``, then the centre cut out. With ``fit="stretch"`` it equals SiglipImageProcessor:
``picture.crop(box).resize((size, size), BICUBIC)``, each side by its own factor. ``crop_resize`` is the same
followed by the usual normalisation. `reference` is the same rule in Pillow, to read and to test against.

The work is done in C (crop.h), by the best of the paths that the processor can run: "avx512", "avx2", "neon",
"scalar". All give the same bits. The environment variable DUALFOCUS_ISA, or `force_isa`, picks one.

The pixels are the same on every processor, and depend on no library. They were compared with Pillow 13.0.0;
versions before 13 give other bits for tall crops that are not padded, because they always resize the width
first.

`cuda`, to be imported by itself, is `crop_resize` on an NVIDIA GPU, with the same bits.

`stream_sum` has nothing to do with pictures: a benchmark measures with it how fast memory can be read.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from dualfocus.kernels import _crop

__all__ = ["available", "crop_resize", "crop_resize_u8", "force_isa", "isa", "stream_sum"]

Fit = Sequence[SupportsIndex] | Literal["crop", "stretch"]  # a sequence: the colour to pad with

_forced: str | None = None


def crop_resize_u8(
    picture: npt.NDArray[np.uint8],
    box: Sequence[SupportsIndex],
    size: int,
    *,
    fit: Fit,
) -> npt.NDArray[np.uint8]:
    """The crop as a model sees it, before normalisation: (size, size, 3) uint8.

    picture: (H, W, 3) uint8, the rows packed and any distance apart. box: whole pixels (x0, y0, x1, y1),
    half-open, inside the picture, no side above 2^24. size: 1 to 16384. fit: the colour (r, g, b), 0 to 255,
    that makes the crop a centred square; "crop" for shortest edge, then centre crop; "stretch" for each side
    by itself.

    Raises ValueError for anything else, saying what was found and what was expected.
    """
    pixels = _crop.resize(picture, box, size, fit, None, isa())
    return np.frombuffer(pixels, np.uint8).reshape(size, size, 3)


def crop_resize(
    picture: npt.NDArray[np.uint8],
    box: Sequence[SupportsIndex],
    size: int,
    *,
    fit: Fit,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: npt.DTypeLike = np.float32,
) -> npt.NDArray[Any]:
    """`crop_resize_u8`, normalised and planar: (3, size, size) in `dtype`, float32 or float16.

    A value v of channel c becomes (v / 255 - mean[c]) / std[c], computed in float64 and rounded once to
    `dtype`. Raises ValueError as `crop_resize_u8` does, and for any mean, std or dtype that is not usable.
    """
    table = _normalisation(_triple("mean", mean), _triple("std", std), _float_type(dtype))
    pixels = _crop.resize(picture, box, size, fit, table, isa())
    return np.frombuffer(pixels, table.dtype).reshape(3, size, size)


def available() -> tuple[str, ...]:
    """The paths that this processor can run, the best first; "scalar" is always the last."""
    return _crop.available()


def isa() -> str:
    """The path in use: the forced one, else the one DUALFOCUS_ISA names, else the best.

    Raises ValueError if DUALFOCUS_ISA names a path that this processor cannot run.
    """
    return _forced or _runnable(os.environ.get("DUALFOCUS_ISA") or available()[0])


def force_isa(name: str | None) -> None:
    """Use the path `name` from now on, in all threads; None takes that back.

    Raises ValueError for a path that this processor cannot run.
    """
    global _forced
    _forced = None if name is None else _runnable(name)


def stream_sum(words: npt.NDArray[np.uint64]) -> int:
    """The sum, modulo 2^64, of a contiguous array, read as fast as one core can; other threads go on."""
    return _crop.stream_sum(words)


def _runnable(name: str) -> str:
    if name not in available():
        raise ValueError(
            f"no crop kernel {name!r} on this processor, expected one of {', '.join(available())}"
        )
    return name


def _triple(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be three numbers, got {values!r}") from None
    return red, green, blue


def _float_type(dtype: npt.DTypeLike) -> np.dtype[Any]:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found not in (np.float32, np.float16):
        raise ValueError(f"dtype must be float32 or float16, got {dtype!r}")
    return found


@functools.lru_cache(maxsize=16)
def _normalisation(
    mean: tuple[float, float, float], std: tuple[float, float, float], dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """(3, 256): what each value of each channel becomes. All paths read it, so none can round its own way."""
    if not np.isfinite(mean).all():
        raise ValueError(f"mean must be three finite numbers, got {mean}")
    if not (np.isfinite(std).all() and min(std) > 0):
        raise ValueError(f"std must be three finite numbers above 0, got {std}")
    values = np.arange(256) / 255
    table: npt.NDArray[Any] = (values - np.array(mean)[:, None]) / np.array(std)[:, None]
    return table.astype(dtype)
