"""Our pixels against those of the checkpoints' own image processors, whose files an export reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

from dualfocus.export import checkpoint as checkpoints
from dualfocus.kernels import crop_resize_u8
from dualfocus.runtime.image import Picture, view, whole
from dualfocus.runtime.manifest import ImageSpec

ROOM = 20_000  # pixels along the longer edge: a processor that crops makes all of the resized picture
PATCHES = {56: 14, 77: 11, 336: 14}  # by tower size


@dataclass(frozen=True)
class Case:
    processor: Any
    spec: ImageSpec  # what an export makes of the processor's file
    expands: bool  # the picture is made a square before the processor gets it

    def pixels(self, picture: Picture, **steps: bool) -> npt.NDArray[Any]:
        """(3, S, S), the processor's."""
        if self.expands:
            picture = expand_to_square(picture, tuple(int(mean * 255) for mean in self.processor.image_mean))
        made = self.processor(picture, return_tensors="np", input_data_format="channels_last", **steps)
        return made["pixel_values"][0]

    def takes(self, picture: Picture) -> bool:
        """Whether the processor resizes the picture in little memory."""
        height, width = picture.shape[:2]
        size = self.spec.size
        across = down = size
        if self.spec.fit == "crop":
            across, down = (size * side // min(height, width) for side in (width, height))
        return max(across, down) <= ROOM


def expand_to_square(picture: Picture, colour: tuple[int, ...]) -> Picture:
    """The original LLaVA's first step: an odd pixel of padding goes right or below."""
    height, width = picture.shape[:2]
    across, down = max(0, height - width), max(0, width - height)
    border = across // 2, down // 2, across - across // 2, down - down // 2
    return np.asarray(ImageOps.expand(Image.fromarray(picture), border, colour))


def make_processors(size: int) -> dict[str, Any]:
    edge, square = {"shortest_edge": size}, {"height": size, "width": size}
    return {
        "clip": CLIPImageProcessor(size=edge, crop_size=square),
        "clip, both sides": CLIPImageProcessor(size=square, crop_size=square),
        "llava": LlavaImageProcessor(size=edge, crop_size=square),
        "llava, padding": LlavaImageProcessor(do_pad=True, size=edge, crop_size=square),
        "llava, padding, both sides": LlavaImageProcessor(do_pad=True, size=square, do_center_crop=False),
        "llava, padding, other mean": LlavaImageProcessor(
            do_pad=True, size=edge, crop_size=square, image_mean=[0.0, 0.999, 1.0], image_std=[0.5, 0.01, 3.0]
        ),
        "siglip": SiglipImageProcessor(size=square),
    }


FITS = {
    "clip": "crop",
    "clip, both sides": "stretch",
    "llava": "crop",
    "llava, padding": "pad",
    "llava, padding, both sides": "pad",
    "llava, padding, other mean": "pad",
    "siglip": "stretch",
    "original": "pad",
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Case]:
    folder, found = tmp_path_factory.mktemp("processors"), {}
    for size, patch in PATCHES.items():
        shape = tiny.Shape(image=size, patch=patch)
        padded = tiny.build(folder / f"padded {size}", shape, fit="pad")
        plain = tiny.build(folder / f"plain {size}", shape)
        for name, processor in make_processors(size).items():
            found[name, size] = Case(processor, read(plain, processor), expands=False)
        original = make_processors(size)["clip"]
        found["original", size] = Case(original, read(padded, original), expands=True)
    return found


def read(folder: Path, processor: Any) -> ImageSpec:
    """What an export of the checkpoint says, once it has that processor's own file."""
    processor.save_pretrained(folder)
    return checkpoints.describe(checkpoints.load(folder), ragged_append=True).image


def noise(height: int, width: int, seed: int = 0, binary: bool = False) -> Picture:
    """Random pixels; black and white ones make the filter overshoot most."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(values < 128, np.uint8(0), np.uint8(255)) if binary else values


sides = st.one_of(st.integers(1, 5), st.integers(1, 100), st.integers(100, 700))
pictures = st.builds(noise, sides, sides, st.integers(0, 9), st.booleans())
many = settings(deadline=None, max_examples=30)


def shapes(test: Any) -> Any:
    """The same test on pictures of any shape, these among them."""
    for height, width in [
        (1, 1), (1, 2), (2, 1), (1, 300), (300, 1), (3, 1000), (1000, 3), (56, 56), (77, 77), (336, 336),
        (57, 56), (337, 200), (400, 368), (401, 368), (640, 480), (480, 640), (1500, 2000), (2000, 1500),
        (3000, 90),
    ]:  # fmt: skip
        test = example(noise(height, width, binary=True))(test)
    return many(given(pictures)(test))


@pytest.mark.parametrize("size", PATCHES)
@pytest.mark.parametrize("name", FITS)
def test_the_fit_is_read_from_the_file(cases: dict[tuple[str, int], Case], name: str, size: int) -> None:
    spec, processor = cases[name, size].spec, cases[name, size].processor
    assert (spec.fit, spec.size) == (FITS[name], size)
    assert (list(spec.mean), list(spec.std)) == (list(processor.image_mean), list(processor.image_std))


@pytest.mark.parametrize("size", PATCHES)
@pytest.mark.parametrize("name", FITS)
def test_pixels_are_the_processors(cases: dict[tuple[str, int], Case], name: str, size: int) -> None:
    case = cases[name, size]
    spec = case.spec
    fit = spec.pad_colour if spec.fit == "pad" else spec.fit

    @shapes
    def check(picture: Picture) -> None:
        assume(case.takes(picture))
        want = case.pixels(picture, do_rescale=False, do_normalize=False)
        assert want.dtype == np.uint8
        got = crop_resize_u8(picture, whole(picture), size, fit=fit)
        np.testing.assert_array_equal(got.transpose(2, 0, 1), want)

    check()


@pytest.mark.parametrize("name", FITS)
def test_a_view_is_the_processors(cases: dict[tuple[str, int], Case], name: str) -> None:
    """Within what float32 steps may round: v / 255, the mean and their difference each by 2^-25, all of which
    std divides; and std, the quotient and our one rounding each by 2^-24 of the value."""
    case = cases[name, 56]
    bound = 3 * 2**-25 / min(case.spec.std)

    @shapes
    def check(picture: Picture) -> None:
        assume(case.takes(picture))
        (got,) = view(picture, whole(picture), case.spec)
        np.testing.assert_allclose(got, case.pixels(picture), rtol=3 * 2**-24, atol=bound)

    check()
