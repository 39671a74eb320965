"""Boxes: conversions there and back, and the crop rule against the authors' arithmetic, rewritten."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dualfocus.runtime.geometry import MARGIN, Box, convert, crop_around, find_region
from dualfocus.runtime.manifest import ImageSpec

SPACES = ["pixels", "original", "padded", "model"]
sides = st.integers(1, 5000)
fractions = st.floats(0, 1, allow_subnormal=False)


def spec(fit: str = "pad", size: int = 336) -> ImageSpec:
    return ImageSpec(size, 576, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), fit)  # type: ignore[arg-type]


def find(reply: str, width: int = 1000, height: int = 800, space: str = "original"):
    return find_region(reply, space, width, height, spec())  # type: ignore[arg-type]


@given(
    st.sampled_from(SPACES), st.sampled_from(SPACES), st.sampled_from(["pad", "crop", "stretch"]),
    sides, sides, st.tuples(fractions, fractions, fractions, fractions),
)  # fmt: skip
def test_a_box_comes_back_from_every_space(there, back, fit, width, height, corners):
    box = convert(Box(*corners, "original"), back, width, height, spec(fit))
    other = convert(box, there, width, height, spec(fit))
    again = convert(other, back, width, height, spec(fit))
    assert again.space == back
    np.testing.assert_allclose(again.corners, box.corners, atol=1e-6 * max(width, height))


@given(sides, sides)
def test_the_whole_picture_in_every_space(width, height):
    pixels = Box(0, 0, width, height, "pixels")
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    assert convert(pixels, "original", width, height, spec()).corners == (0, 0, 1, 1)
    expected = np.array([left, top, left + width, top + height]) / side
    np.testing.assert_allclose(convert(pixels, "padded", width, height, spec()).corners, expected)
    np.testing.assert_allclose(convert(pixels, "model", width, height, spec()).corners, expected * 336)


@given(sides, sides)
def test_a_stretched_picture_fills_the_square(width, height):
    box = Box(width / 4, height / 5, width / 2, height, "pixels")
    padded = convert(box, "padded", width, height, spec("stretch")).corners
    np.testing.assert_allclose(padded, (0.25, 0.2, 0.5, 1))
    model = convert(box, "model", width, height, spec("stretch")).corners
    np.testing.assert_allclose(model, (84, 67.2, 168, 336))


@pytest.mark.parametrize(("width", "height"), [(1000, 600), (600, 1000), (500, 500), (337, 801)])
def test_models_pixels_of_a_centre_crop_are_where_a_mark_lands(width, height):
    marked = np.zeros((height, width, 3), np.uint8)
    box = Box(width / 2 - 40, height / 2 - 30, width / 2 + 50, height / 2 + 60, "pixels")
    x0, y0, x1, y1 = (round(corner) for corner in box.corners)
    marked[y0:y1, x0:x1] = 255
    short = min(width, height)
    resized = Image.fromarray(marked).resize((336 * width // short, 336 * height // short))
    left, top = (resized.width - 336) // 2, (resized.height - 336) // 2
    seen = np.asarray(resized.crop((left, top, left + 336, top + 336)))[..., 0] > 127
    ys, xs = np.nonzero(seen)
    found = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    got = convert(box, "model", width, height, spec("crop")).corners
    np.testing.assert_allclose(got, found, atol=1.0)


def authors_crop(corners: tuple[float, ...], width: int, height: int) -> tuple[int, ...]:
    """The rule with one scalar float32 operation a line."""
    f = np.float32
    x0, y0, x1, y1 = (f(corner) for corner in corners)
    cx, cy = (x1 + x0) / f(2), (y1 + y0) / f(2)
    half = max(x1 - x0, y1 - y0) / f(2)
    squared = [cx - half, cy - half, cx + half, cy + half]
    for margin in (f(0), f(25)):
        squared = [squared[0] - margin, squared[1] - margin, squared[2] + margin, squared[3] + margin]
        limits = [f(width - 1), f(height - 1)] * 2
        squared = [min(max(value, f(0)), limit) for value, limit in zip(squared, limits, strict=True)]
    return tuple(int(value) for value in squared)


hundredths = st.integers(0, 100).map(lambda n: n / 100)


@given(sides, sides, st.tuples(hundredths, hundredths, hundredths, hundredths))
def test_the_crop_is_the_authors(width, height, corners):
    box = convert(Box(*corners, "original"), "pixels", width, height, spec())
    crop = crop_around(box, width, height)
    expected = authors_crop(box.corners, width, height)
    if max(box.corners) <= 1 or expected[0] >= expected[2] or expected[1] >= expected[3]:
        assert crop is None
    else:
        assert crop == expected
        assert 0 <= crop[0] < crop[2] < width
        assert 0 <= crop[1] < crop[3] < height


@pytest.mark.parametrize(
    ("reply", "crop"),
    [
        ("[0.40, 0.40, 0.60, 0.50]", (375, 235, 625, 485)),  # 200 x 80 becomes 200 x 200, then 25 each side
        ("[0.00, 0.00, 0.10, 0.10]", (0, 0, 125, 115)),  # cut at the border, not moved inside
        ("[0.90, 0.90, 1.00, 1.00]", (875, 685, 999, 799)),  # and never the last row or column
        ("[0.50, 0.50, 0.50, 0.50]", (475, 375, 525, 425)),  # an empty box is still a place
        ("[0.29, 0.29, 0.58, 0.58]", (265, 178, 605, 518)),
    ],
)
def test_crops_by_hand(reply, crop):
    assert find(reply).crop == crop


def test_a_margin_is_25_pixels():
    assert MARGIN == 25


@pytest.mark.parametrize(
    ("reply", "corners"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("0.1,0.2,0.3,0.4", (0.1, 0.2, 0.3, 0.4)),
        ("at [0.1,\n0.2, 1, 1.] or [0.5, 0.5, 0.6, 0.6]", (0.1, 0.2, 1, 1)),
        ("[-0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),  # a sign is not read
        ("[.5, 0.2, 0.3, 0.4]", (5, 0.2, 0.3, 0.4)),  # nor a leading point
        ("1, [0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_which_numbers_are_read(reply, corners):
    width, height = 1000, 800
    box = find(reply).box
    np.testing.assert_allclose(box.corners, np.array(corners) * [width, height, width, height])


@pytest.mark.parametrize(
    "reply",
    ["", "no box", "[0.1, 0.2, 0.3]", "[.1, .2, .3, .4]", "[0.1, -0.2, 0.3, 0.4]", "[0.1 0.2 0.3 0.4]"],
)
def test_a_reply_without_four_numbers_names_no_box(reply):
    region = find(reply)
    assert (region.box, region.crop) == (None, None)
    assert region.problem == f"the reply {reply!r} names no box"


@pytest.mark.parametrize("digits", [37, 40, 308, 400])  # float32 ends at 39 digits, float64 at 309
@pytest.mark.filterwarnings("error")
def test_numbers_too_large_to_be_any_are_no_box(digits):
    region = find(f"[{'9' * digits}, 0.1, 0.2, 0.3]")
    assert (region.box, region.crop) == (None, None)
    assert "finite" in region.problem


@pytest.mark.parametrize(
    "reply", ["[0.00, 0.00, 0.00, 0.00]", "[0.9, 0.9, 0.1, 0.1]", "[0.6, 0.7, 0.1, 0.2]"]
)
def test_a_box_without_pixels_is_told(reply):
    region = find(reply)
    assert region.box is not None
    assert region.crop is None
    assert reply in region.problem


def test_coordinates_are_the_manifests():
    padded = find("[0.40, 0.40, 0.60, 0.50]", 1000, 600, "padded")
    np.testing.assert_allclose(padded.box.corners, (400, 200, 600, 300))
    model = find("[33, 67, 67, 101]", 336, 336, "model")
    np.testing.assert_allclose(model.box.corners, (33, 67, 67, 101))


def test_boxes_are_scaled_in_float32() -> None:
    """In float64 the left edge would be 795, and a crop that begins there a pixel narrower."""
    image = ImageSpec(336, 576, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "pad")
    box = find_region("[0.53, 0.10, 0.59, 0.20]", "original", 1500, 1000, image).box
    assert box is not None
    assert box.x0 == float(np.float32(0.53) * np.float32(1500))
    assert int(box.x0) == 794
