"""Boxes and the spaces they live in; from the model's reply to the crop.

Everything here is a pure function of numbers. Boxes are left, top, right, bottom with the origin at the
picture's upper left corner. The rules are those of the authors' evaluation code, its arithmetic in
float32 included: truncated to whole pixels, another precision is now and then another crop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dualfocus.runtime.manifest import CoordinateSpace, ImageSpec

Space = Literal["pixels"] | CoordinateSpace
Crop = tuple[int, int, int, int]  # whole pixels, half-open

MARGIN = 25  # pixels added on each side of the squared box

_BEYOND = float(np.finfo(np.float32).max) / 4  # so that no sum or difference of two corners overflows

# A sign is not part of a number and a number begins with a digit, so "[-0.1, ..." reads as 0.1,
# "[.5, ..." as 5, and either in a later place is no match at all. That is how the model's replies
# were read when its published results were made.
_FOUR_NUMBERS = re.compile(r",\s*".join([r"(\d+\.?\d*)"] * 4))


@dataclass(frozen=True)
class Box:
    """Corners in a space: "pixels" of the upright picture, or one of a manifest's coordinate spaces.

    "original": fractions of the picture's width and height. "padded": fractions of the square the
    picture is centred in, or stretched to. "model": pixels of the model's S x S input.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    space: Space

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """The numbers alone."""
        return self.x0, self.y0, self.x1, self.y1


def convert(box: Box, space: Space, width: int, height: int, image: ImageSpec) -> Box:
    """The same region of a `width` x `height` picture, in another space."""
    (scale_x, offset_x), (scale_y, offset_y) = _to_pixels(box.space, width, height, image)
    (per_x, from_x), (per_y, from_y) = _to_pixels(space, width, height, image)
    x0, x1 = ((x * scale_x + offset_x - from_x) / per_x for x in (box.x0, box.x1))
    y0, y1 = ((y * scale_y + offset_y - from_y) / per_y for y in (box.y0, box.y1))
    return Box(x0, y0, x1, y1, space)


def _to_pixels(
    space: Space, width: int, height: int, image: ImageSpec
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(scale, offset) of x and of y: pixels = number * scale + offset."""
    if space == "pixels":
        return (1, 0), (1, 0)
    if space == "original":
        return (width, 0), (height, 0)
    if space == "model" and image.fit == "crop":
        short = min(width, height)
        resized = [image.size * side // short for side in (width, height)]
        (x, y), (left, top) = resized, [(side - image.size) // 2 for side in resized]
        return (width / x, left * width / x), (height / y, top * height / y)
    if image.fit == "stretch":
        parts = image.size if space == "model" else 1
        return (width / parts, 0), (height / parts, 0)
    side = max(width, height)
    scale = side / (image.size if space == "model" else 1)
    return (scale, -((side - width) // 2)), (scale, -((side - height) // 2))


@dataclass(frozen=True)
class Region:
    """Where a reply points: the box in pixels, the crop to zoom into, or why there is none of them."""

    box: Box | None = None
    crop: Crop | None = None
    problem: str | None = None

    def moved(self, right: int, down: int) -> Region:
        """The region of a part of a picture, in pixels of the picture."""
        box, crop = self.box, self.crop
        if box is not None:
            box = Box(box.x0 + right, box.y0 + down, box.x1 + right, box.y1 + down, box.space)
        if crop is not None:
            crop = (crop[0] + right, crop[1] + down, crop[2] + right, crop[3] + down)
        return Region(box, crop, self.problem)


def find_region(reply: str, space: CoordinateSpace, width: int, height: int, image: ImageSpec) -> Region:
    """Read the first four comma-separated numbers of `reply` as a box and make its crop."""
    match = _FOUR_NUMBERS.search(reply)
    if match is None:
        return Region(problem=f"the reply {reply!r} names no box")
    with np.errstate(over="ignore"):
        # in float32 from the first product on: a last bit decides now and then which pixel is the border
        numbers: list[Any] = [np.float32(float(number)) for number in match.groups()]
        x0, y0, x1, y1 = numbers
        scaled = convert(Box(x0, y0, x1, y1, space), "pixels", width, height, image)
    x0, y0, x1, y1 = map(float, scaled.corners)
    box = Box(x0, y0, x1, y1, "pixels")
    if max(map(abs, box.corners)) > _BEYOND:
        return Region(problem=f"the reply {reply!r:.60} names no finite box")
    crop = crop_around(box, width, height)
    return Region(box, crop, None if crop else f"the box {reply!r} holds no pixels of the picture")


def crop_around(box: Box, width: int, height: int) -> Crop | None:
    """The crop the micro pass sees of a box in pixels, or None where it would be empty.

    A square of the longer side about the box's centre, clipped to the last pixel and not moved back
    from a border, then `MARGIN` more on each side, clipped again, truncated to whole pixels.
    """
    assert box.space == "pixels"
    if max(box.corners) <= 1:  # the authors' code refuses such a box as one that was never scaled
        return None
    last = np.array([width - 1, height - 1], np.float32)
    low = np.array([box.x0, box.y0], np.float32)
    high = np.array([box.x1, box.y1], np.float32)
    centre = (high + low) / np.float32(2)
    # the longer side; of a box inverted along both axes it is negative, and the crop mostly empty
    half = (high - low).max() / np.float32(2)
    low, high = np.clip(centre - half, 0, last), np.clip(centre + half, 0, last)
    low, high = np.clip(low - MARGIN, 0, last), np.clip(high + MARGIN, 0, last)
    (left, top), (right, bottom) = low.astype(int).tolist(), high.astype(int).tolist()
    return (left, top, right, bottom) if left < right and top < bottom else None
