"""The truth that the kernel is tested against: the same functions, in Pillow and NumPy, step by step."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC


def pad_square(crop: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The crop centred on a square of the colour: LLaVA's expand2square, an odd pixel goes right or below."""
    side = max(crop.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2))
    return square


def shortest_edge(crop: Image.Image, size: int) -> Image.Image:
    """The crop resized until its shorter edge is `size`, and the centre of that (CLIPImageProcessor)."""
    longer = int(size * max(crop.size) / min(crop.size))
    width, height = (size, longer) if crop.width <= crop.height else (longer, size)
    left, top = (width - size) // 2, (height - size) // 2
    return crop.resize((width, height), BICUBIC).crop((left, top, left + size, top + size))


def crop_resize_u8(
    picture: npt.NDArray[np.uint8],
    box: tuple[int, int, int, int],
    size: int,
    *,
    fit: tuple[int, int, int] | Literal["crop", "stretch"],
) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (size, size, 3) uint8."""
    crop = Image.fromarray(picture).crop(box)
    if fit == "crop":
        return np.asarray(shortest_edge(crop, size))
    if fit == "stretch":
        return np.asarray(crop.resize((size, size), BICUBIC))
    return np.asarray(pad_square(crop, fit).resize((size, size), BICUBIC))


def crop_resize(
    picture: npt.NDArray[np.uint8],
    box: tuple[int, int, int, int],
    size: int,
    *,
    fit: tuple[int, int, int] | Literal["crop", "stretch"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: npt.DTypeLike = np.float32,
) -> npt.NDArray[Any]:
    """(H, W, 3) uint8 -> (3, size, size) in `dtype`, computed in float64 and rounded once."""
    values = crop_resize_u8(picture, box, size, fit=fit) / 255
    normalised: npt.NDArray[Any] = (values - np.array(mean)) / np.array(std)
    return normalised.transpose(2, 0, 1).astype(dtype)


def nv12_to_rgb(
    y_plane: npt.NDArray[np.uint8], uv_plane: npt.NDArray[np.uint8], matrix: Literal["bt601", "bt709"]
) -> npt.NDArray[np.uint8]:
    """(H, W) and (ceil(H / 2), ceil(W / 2), 2) uint8 in limited range -> (H, W, 3) uint8.

    ITU-R BT.601 or BT.709, its factors rounded to multiples of 2^-16, the result to the nearest, halves up.
    Every pixel of a square of two by two takes the square's chroma as it is.
    """
    red, blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[matrix]  # their shares of luma
    green = 1 - red - blue
    luma, chroma = 2**16 * 255 / 219, 2**16 * 255 / 224
    height, width = y_plane.shape
    u, v = np.moveaxis(uv_plane.repeat(2, 0).repeat(2, 1)[:height, :width].astype(np.int64) - 128, 2, 0)
    grey = round(luma) * (y_plane.astype(np.int64) - 16)
    colours = (
        grey + round(chroma * 2 * (1 - red)) * v,
        grey
        - round(chroma * 2 * (1 - blue) * blue / green) * u
        - round(chroma * 2 * (1 - red) * red / green) * v,
        grey + round(chroma * 2 * (1 - blue)) * u,
    )
    return np.stack([((colour + 2**15) >> 16).clip(0, 255).astype(np.uint8) for colour in colours], axis=2)
