"""The crop kernel: equal to Pillow bit for bit on every path, safe on every input."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dualfocus import kernels
from dualfocus.kernels import reference

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
Fit = tuple[int, int, int] | Literal["crop", "stretch"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PAD = (122, 116, 104)


@pytest.fixture(autouse=True, params=kernels.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    kernels.force_isa(request.param)
    yield request.param
    kernels.force_isa(None)


def noise(height: int, width: int, seed: int = 0, binary: bool = False) -> Pixels:
    """Random pixels; black and white ones make the filter overshoot most."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(values < 128, np.uint8(0), np.uint8(255)) if binary else values


def whole(picture: Pixels) -> Box:
    return (0, 0, picture.shape[1], picture.shape[0])


@st.composite
def crops(draw: st.DrawFn) -> tuple[Pixels, Box, int, Fit]:
    """A picture, a box in it, a size and a fit; sides of one pixel and extreme shapes among them."""
    side = st.one_of(st.integers(1, 5), st.integers(1, 60), st.integers(100, 250))
    width, height = draw(side), draw(side)
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
    size = draw(st.one_of(st.integers(1, 8), st.integers(1, 150)))
    byte = st.integers(0, 255)
    fit: Fit = draw(st.one_of(st.sampled_from(["crop", "stretch"]), st.tuples(byte, byte, byte)))
    if fit == "crop":  # the reference makes the whole resized picture
        longer, shorter = max(x1 - x0, y1 - y0), min(x1 - x0, y1 - y0)
        size = min(size, max(1, 3000 * shorter // longer))
    return noise(height, width, draw(st.integers(0, 9)), draw(st.booleans())), (x0, y0, x1, y1), size, fit


# The fixture only sets a switch that no example changes, so that hypothesis's warning does not apply.
many = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(crops())
def test_equals_pillow(case: tuple[Pixels, Box, int, Fit]) -> None:
    picture, box, size, fit = case
    got = kernels.crop_resize_u8(picture, box, size, fit=fit)
    np.testing.assert_array_equal(got, reference.crop_resize_u8(picture, box, size, fit=fit))


@many
@given(crops(), st.sampled_from(["float32", "float16"]))
def test_normalised_equals_the_formula(case: tuple[Pixels, Box, int, Fit], dtype: str) -> None:
    picture, box, size, fit = case
    got = kernels.crop_resize(picture, box, size, fit=fit, mean=CLIP_MEAN, std=CLIP_STD, dtype=dtype)
    want = reference.crop_resize(picture, box, size, fit=fit, mean=CLIP_MEAN, std=CLIP_STD, dtype=dtype)
    assert got.dtype == dtype
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("height", "width", "size", "fit"),
    [
        (1, 1, 1, PAD),
        (1, 1, 336, "crop"),
        (900, 2, 24, "crop"),
        (2, 900, 24, "crop"),
        (500, 375, 336, "crop"),
        (1, 1, 336, "stretch"),
        (20000, 1, 24, "stretch"),
        (1, 20000, 24, "stretch"),
        (500, 375, 336, "stretch"),
        (337, 200, 336, "stretch"),  # the height loses a pixel, the width none: the height goes first
        (400, 368, 336, "stretch"),  # exactly twice as many: the width does
        (401, 368, 336, "stretch"),
        (375, 500, 336, PAD),
        (336, 336, 336, PAD),
        (112, 112, 336, PAD),  # whole factors: taps of weight exactly zero inside the window
        (1008, 1008, 336, PAD),
    ],
)
def test_equals_pillow_at_the_corners(height: int, width: int, size: int, fit: Fit) -> None:
    picture = noise(height, width, binary=True)
    got = kernels.crop_resize_u8(picture, whole(picture), size, fit=fit)
    np.testing.assert_array_equal(got, reference.crop_resize_u8(picture, whole(picture), size, fit=fit))


@pytest.mark.parametrize("size", [1, 7, 336])
@pytest.mark.parametrize("shape", [(2, 40000), (1, 20001), (3000, 2)])
def test_equals_pillow_on_slivers(shape: tuple[int, int], size: int) -> None:
    """Too long for the reference's padded square (gigabytes): Pillow's two passes, on the rows that differ.

    At size 1 a window is so long that its rounded weights no longer add up to one: padding changes colour.
    """
    picture = noise(*shape)
    side = max(shape)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    wide = np.full((shape[0] + 1, side, 3), PAD, np.uint8)  # the last row is padding
    wide[:-1, left : left + shape[1]] = picture
    narrow = np.asarray(Image.fromarray(wide).resize((size, len(wide)), reference.BICUBIC))
    rows = np.repeat(narrow[-1:], side, axis=0)
    rows[top : top + shape[0]] = narrow[:-1]
    want = np.asarray(Image.fromarray(rows).resize((size, size), reference.BICUBIC))
    np.testing.assert_array_equal(kernels.crop_resize_u8(picture, whole(picture), size, fit=PAD), want)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (90, 140),
        (140, 90),
        (31, 77),
        (64, 64),
        (300, 40),  # Pillow begins with the height
    ],
)
@pytest.mark.parametrize("size", [24, 33, 100])
def test_crop_equals_clip_image_processor(height: int, width: int, size: int) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size=size, do_rescale=False, do_normalize=False
    )
    picture = noise(height, width)
    want = processor(picture, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    got = kernels.crop_resize_u8(picture, whole(picture), size, fit="crop")
    np.testing.assert_array_equal(got.transpose(2, 0, 1), want)


@many
@given(crops(), st.tuples(*[st.integers(0, 255)] * 3))
def test_a_constant_stays_constant(case: tuple[Pixels, Box, int, Fit], colour: tuple[int, int, int]) -> None:
    picture, box, size, fit = case
    flat = np.broadcast_to(np.array(colour, np.uint8), picture.shape).copy()
    got = kernels.crop_resize_u8(flat, box, size, fit=fit if isinstance(fit, str) else colour)
    assert (got == np.array(colour)).all()


@pytest.mark.parametrize("fit", [PAD, "crop", "stretch"])
def test_an_unscaled_crop_is_exact(fit: Fit) -> None:
    picture = noise(90, 120)
    got = kernels.crop_resize_u8(picture, (13, 7, 77, 71), 64, fit=fit)
    np.testing.assert_array_equal(got, picture[7:71, 13:77])


@pytest.mark.parametrize(("shape", "where"), [((30, 61), np.s_[15:45]), ((31, 60), np.s_[14:45])])
def test_an_unscaled_crop_lies_in_the_middle_of_its_square(shape: tuple[int, int], where: slice) -> None:
    """An odd pixel of padding goes below or right."""
    picture = noise(*shape)
    across = kernels.crop_resize_u8(picture, whole(picture), shape[1], fit=PAD)
    want = np.broadcast_to(np.array(PAD, np.uint8), across.shape).copy()
    want[where] = picture
    np.testing.assert_array_equal(across, want)
    down = kernels.crop_resize_u8(picture.swapaxes(0, 1).copy(), (0, 0, *shape), shape[1], fit=PAD)
    np.testing.assert_array_equal(down, want.swapaxes(0, 1))


def test_pixels_outside_the_box_do_not_show() -> None:
    picture = noise(80, 90)
    other = np.bitwise_not(picture)
    other[20:50, 30:70] = picture[20:50, 30:70]
    fits: tuple[Fit, ...] = (PAD, "crop", "stretch")
    for fit in fits:
        one, two = (kernels.crop_resize_u8(p, (30, 20, 70, 50), 24, fit=fit) for p in (picture, other))
        np.testing.assert_array_equal(one, two)


def views() -> dict[str, Pixels]:
    """The same 40 x 50 pixels with rows at all sorts of distances."""
    picture = noise(40, 50)
    padded = np.zeros((40, 64, 3), np.uint8)
    padded[:, 7:57] = picture
    sparse = np.zeros((120, 50, 3), np.uint8)
    sparse[::3] = picture
    read_only = picture.copy()
    read_only.flags.writeable = False
    return {
        "read-only": read_only,
        "columns of a wider one": padded[:, 7:57],
        "every third row": sparse[::3],
        "upside down twice": picture[::-1].copy()[::-1],
    }


@pytest.mark.parametrize("name", views())
def test_rows_may_lie_anywhere(name: str) -> None:
    picture, view = noise(40, 50), views()[name]
    for box in [(0, 0, 50, 40), (3, 5, 50, 40), (0, 0, 9, 40)]:
        want = kernels.crop_resize_u8(picture, box, 21, fit=PAD)
        np.testing.assert_array_equal(kernels.crop_resize_u8(view, box, 21, fit=PAD), want)


def test_one_row_repeated() -> None:
    """A row stride of zero."""
    row = noise(1, 50)
    repeated = np.broadcast_to(row, (40, 50, 3))
    got = kernels.crop_resize_u8(repeated, whole(repeated), 21, fit=PAD)
    np.testing.assert_array_equal(got, kernels.crop_resize_u8(repeated.copy(), whole(repeated), 21, fit=PAD))


def test_whole_numbers_of_any_kind() -> None:
    picture = noise(40, 50)
    box = np.array([3, 5, 30, 35])
    got = kernels.crop_resize_u8(picture, box, np.int64(16), fit=list(np.array(PAD, np.uint8)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(got, kernels.crop_resize_u8(picture, (3, 5, 30, 35), 16, fit=PAD))


def test_results_are_the_callers_own() -> None:
    picture = noise(40, 50)
    first = kernels.crop_resize_u8(picture, whole(picture), 16, fit=PAD)
    kept = first.copy()
    second = kernels.crop_resize_u8(picture, (0, 0, 10, 10), 16, fit=PAD)
    second[:] = 0
    np.testing.assert_array_equal(first, kept)


def test_threads_do_not_disturb_each_other() -> None:
    picture = noise(300, 400)
    boxes = [(i, 2 * i, 400 - 3 * i, 300 - i) for i in range(40)]

    def crop(box: Box) -> npt.NDArray[Any]:
        return kernels.crop_resize(picture, box, 48, fit=PAD, mean=CLIP_MEAN, std=CLIP_STD)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(crop, boxes))
    for box, got in zip(boxes, together, strict=True):
        np.testing.assert_array_equal(got, crop(box))


GOOD: dict[str, Any] = {
    "picture": noise(40, 50),
    "box": (0, 0, 50, 40),
    "size": 16,
    "fit": PAD,
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "dtype": np.float32,
}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("picture", None, "uint8 array"),
        ("picture", [[[0, 0, 0]]], "uint8 array"),
        ("picture", noise(40, 50).astype(np.float32), "format is 'f'"),
        ("picture", noise(40, 50).astype(np.int8), "format is 'b'"),
        ("picture", noise(40, 50)[..., 0], "2 dimensions"),
        ("picture", noise(40, 50)[None], "4 dimensions"),
        ("picture", np.zeros((40, 50, 4), np.uint8), r"\(40, 50, 4\)"),
        ("picture", np.zeros((0, 50, 3), np.uint8), r"\(0, 50, 3\)"),
        ("picture", np.zeros((40, 50, 4), np.uint8)[..., :3], "strides"),
        ("picture", noise(40, 50)[..., ::-1], "strides"),
        ("picture", noise(40, 100)[:, ::2], "strides"),
        ("picture", np.zeros((3, 40, 50), np.uint8).transpose(1, 2, 0), "strides"),
        ("box", (0, 0, 50), r"\(x0, y0, x1, y1\)"),
        ("box", (0, 0, 50, 40, 1), r"\(x0, y0, x1, y1\)"),
        ("box", None, r"\(x0, y0, x1, y1\)"),
        ("box", {0, 1, 2, 3}, r"\(x0, y0, x1, y1\)"),
        ("box", (0.0, 0.0, 50.0, 40.0), "whole number, got 0.0"),
        ("box", np.array([0.0, 0.0, 50.0, 40.0]), "whole number"),
        ("box", (0, 0, math.nan, 40), "whole number, got nan"),
        ("box", (0, 0, math.inf, 40), "whole number, got inf"),
        ("box", ("0", 0, 50, 40), "whole number, got '0'"),
        ("box", (-1, 0, 50, 40), "outside the picture, which is 50 x 40"),
        ("box", (0, -1, 50, 40), "outside"),
        ("box", (0, 0, 51, 40), "outside"),
        ("box", (0, 0, 50, 41), "outside"),
        ("box", (0, 0, 1 << 80, 40), "outside"),
        ("box", (-(1 << 80), 0, 50, 40), "outside"),
        ("box", (20, 0, 20, 40), "empty"),
        ("box", (0, 9, 50, 9), "empty"),
        ("box", (30, 0, 20, 40), "empty"),
        ("box", (60, 0, 50, 40), "empty"),
        ("size", 0, "1 to 16384"),
        ("size", -3, "1 to 16384"),
        ("size", 16385, "1 to 16384"),
        ("size", 1 << 80, "1 to 16384"),
        ("size", 16.0, "whole number"),
        ("size", "16", "whole number"),
        ("size", None, "whole number"),
        ("fit", (122, 116), r"\(red, green, blue\)"),
        ("fit", 122, r"\(red, green, blue\)"),
        ("fit", (122, 116, 256), "0 to 255"),
        ("fit", (122, -1, 104), "0 to 255"),
        ("fit", (122.0, 116, 104), "whole number"),
        ("fit", None, r"'crop', 'stretch' or \(red, green, blue\) in whole numbers, got None"),
        ("fit", "pad", r"'crop', 'stretch' or \(red, green, blue\), got 'pad'"),
        ("fit", "", r"'crop', 'stretch' or \(red, green, blue\), got ''"),
        ("mean", (0.5, 0.5), "mean must be three numbers"),
        ("mean", 0.5, "mean must be three numbers"),
        ("mean", (0.5, "x", 0.5), "mean must be three numbers"),
        ("mean", (0.5, math.nan, 0.5), "mean must be three finite"),
        ("std", (0.5, 0.0, 0.5), "above 0"),
        ("std", (0.5, -1.0, 0.5), "above 0"),
        ("std", (0.5, math.inf, 0.5), "finite"),
        ("std", None, "std must be three numbers"),
        ("dtype", np.float64, "float32 or float16, got .*float64"),
        ("dtype", np.uint8, "float32 or float16, got .*uint8"),
        ("dtype", "no such type", "float32 or float16"),
        ("dtype", ">f4", "float32 or float16"),
    ],
)
def test_bad_arguments(name: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kernels.crop_resize(**{**GOOD, name: value})
    if name in ("picture", "box", "size", "fit"):
        bytes_only = {key: GOOD[key] for key in ("picture", "box", "size", "fit")}
        with pytest.raises(ValueError, match=says):
            kernels.crop_resize_u8(**{**bytes_only, name: value})


def test_a_side_beyond_what_pillow_counts() -> None:
    wide = np.broadcast_to(np.uint8(7), (1, (1 << 24) + 1, 3))
    one_row = np.lib.stride_tricks.as_strided(np.full(3, 7, np.uint8), (wide.shape[1], 1, 3), (0, 3, 1))
    with pytest.raises(ValueError, match="side above 16777216"):
        kernels.crop_resize_u8(one_row, (0, 0, 1, wide.shape[1]), 8, fit=PAD)


def test_the_switch(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.isa() == isa
    with pytest.raises(ValueError, match=r"no crop kernel 'mmx' on this processor, expected one of .*scalar"):
        kernels.force_isa("mmx")
    assert kernels.isa() == isa
    kernels.force_isa(None)
    monkeypatch.delenv("DUALFOCUS_ISA", raising=False)
    assert kernels.isa() == kernels.available()[0]
    monkeypatch.setenv("DUALFOCUS_ISA", isa)
    assert kernels.isa() == isa
    monkeypatch.setenv("DUALFOCUS_ISA", "mmx")
    with pytest.raises(ValueError, match="no crop kernel 'mmx'"):
        kernels.crop_resize_u8(noise(4, 4), (0, 0, 4, 4), 2, fit=PAD)
