"""What "the same bits" means of the crop on a GPU, and random crops to see it by.

The suite checks it on the emulation of tests/cuda_on_host. On a machine with a GPU it is checked there:
``python tests/cuda_equality.py [CASES]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dualfocus import kernels
from dualfocus.kernels import cuda, reference

PAD = (122, 116, 104)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("rgb", *cuda.MATRICES)
LAYOUTS = ("packed", "padded", "every other row", "upside down")
PLACES = ("host", "device")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Case:
    """A crop, and how its picture lies."""

    height: int
    width: int
    box: tuple[int, int, int, int]
    size: int
    fit: tuple[int, int, int] | Literal["crop", "stretch"]
    dtype: str = "float32"
    format: str = "rgb"  # or the matrix of NV12
    layout: str = "packed"
    place: str = "host"
    binary: bool = False  # black and white overshoots most
    seed: int = 0


CORNERS = (
    Case(512, 512, (0, 0, 512, 512), 512, "stretch", format="bt601"),  # each pixel as it is
    Case(512, 512, (0, 0, 512, 512), 512, "stretch", format="bt709"),
    Case(9, 9, (1, 1, 8, 8), 5, PAD, format="bt601"),  # squares of chroma cut on all sides
    Case(9, 9, (8, 8, 9, 9), 5, "stretch", format="bt709"),
    Case(1, 1, (0, 0, 1, 1), 1, PAD),
    Case(1, 1, (0, 0, 1, 1), 336, "crop"),
    Case(20000, 1, (0, 0, 1, 20000), 24, "stretch"),
    Case(1, 20000, (0, 0, 20000, 1), 24, "stretch"),
    Case(40000, 2, (0, 0, 2, 40000), 1, PAD),  # no tap is left of the row, nor a row for the second pass
    Case(2, 40000, (0, 0, 40000, 2), 1, PAD),
    Case(2, 40000, (0, 0, 40000, 2), 7, PAD),  # the row of padding is not quite its colour
    Case(600000, 1, (0, 0, 1, 600000), 1, PAD, binary=True),  # more rows than a grid is high
    Case(337, 200, (0, 0, 200, 337), 336, "stretch"),  # the order of the passes changes
    Case(400, 368, (0, 0, 368, 400), 336, "stretch"),
    Case(401, 368, (0, 0, 368, 401), 336, "stretch"),
    Case(900, 40, (3, 5, 37, 895), 24, "crop"),  # most rows are beyond the centre
    Case(40, 900, (5, 3, 895, 37), 24, "crop"),
    Case(1008, 1008, (0, 0, 1008, 1008), 336, PAD),
)


def draw(whole: Callable[[int, int], int]) -> Case:
    """A case made of whole numbers that `whole` draws, bounds included."""

    def side() -> int:
        return whole(1, (5, 60, 250)[whole(0, 2)])

    height, width = side(), side()
    x0, y0 = whole(0, width - 1), whole(0, height - 1)
    return Case(
        height,
        width,
        (x0, y0, whole(x0 + 1, width), whole(y0 + 1, height)),
        whole(1, (8, 100)[whole(0, 1)]),
        ("crop", "stretch", (whole(0, 255), whole(0, 255), whole(0, 255)))[whole(0, 2)],
        DTYPES[whole(0, 1)],
        FORMATS[whole(0, 2)],
        LAYOUTS[whole(0, 3)],
        PLACES[whole(0, 1)],
        bool(whole(0, 1)),
        whole(0, 9),
    )


@dataclass(frozen=True)
class OnDevice:
    """A view of memory on the GPU, laid out as the view of its copy on the host."""

    memory: cuda.DeviceArray
    base: npt.NDArray[Any]
    view: npt.NDArray[Any]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.view.shape,
            "typestr": self.view.dtype.str,
            "data": (self.memory.pointer + self.view.ctypes.data - self.base.ctypes.data, True),
            "strides": self.view.strides,
            "version": 3,
            "stream": None,
        }


def place(plane: npt.NDArray[np.uint8], layout: str, where: str) -> Any:
    """The plane with its rows as `layout` has them, in memory no larger than they take."""
    if layout == "packed":
        base = view = plane.copy()
    elif layout == "padded":
        base = np.pad(plane, [(0, 0), (3, 4), *[(0, 0)] * (plane.ndim - 2)], constant_values=77)
        view = base[:, 3:-4]
    elif layout == "every other row":
        base = plane.repeat(2, 0)[:-1]
        base[1::2] = 77
        view = base[::2]
    else:
        base = plane[::-1].copy()
        view = base[::-1]
    return view if where == "host" else OnDevice(cuda.upload(base), base, view)


def both(case: Case) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The crop by crop.cu and by C, as whole numbers of the items' size: (3, size, size) each."""
    random = np.random.default_rng(case.seed)

    def noise(*shape: int) -> npt.NDArray[np.uint8]:
        values = random.integers(0, 256, shape, np.uint8)
        return np.where(values < 128, np.uint8(0), np.uint8(255)) if case.binary else values

    source: Any
    if case.format == "rgb":
        picture = noise(case.height, case.width, 3)
        source = place(picture, case.layout, case.place)
    else:
        luma = noise(case.height, case.width)
        chroma = noise((case.height + 1) // 2, (case.width + 1) // 2, 2)
        matrix = cuda.MATRICES[cuda.MATRICES.index(case.format)]  # type: ignore[arg-type]
        picture = reference.nv12_to_rgb(luma, chroma, matrix)
        planes = (place(plane, case.layout, case.place) for plane in (luma, chroma))
        source = cuda.Nv12(*planes, matrix)
    out = cuda.DeviceArray((3, case.size, case.size), case.dtype)
    cuda.crop_resize(source, case.box, case.size, fit=case.fit, mean=MEAN, std=STD, out=out)
    want = kernels.crop_resize(
        picture, case.box, case.size, fit=case.fit, mean=MEAN, std=STD, dtype=case.dtype
    )
    items = f"u{want.itemsize}"
    return out.numpy().view(items), want.view(items)


def check(case: Case) -> None:
    """Raises AssertionError unless both give the same bits."""
    got, want = both(case)
    np.testing.assert_array_equal(got, want, err_msg=str(case))


def check_all(count: int) -> None:
    """As `check`, for the corners and for random cases, the same ones every time."""
    for corner in CORNERS:
        for where in PLACES:
            check(replace(corner, place=where))
    random = np.random.default_rng(0)
    for _ in range(count):
        check(draw(lambda low, high: int(random.integers(low, high, endpoint=True))))


if __name__ == "__main__":
    if reason := cuda.unavailable():
        sys.exit(reason)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    check_all(count)
    print(f"{len(CORNERS)} corners and {count} random crops on the GPU: every bit is that of the C kernel")
