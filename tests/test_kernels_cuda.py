"""The crop on a GPU: the C kernel's bits, its border, its build.

Without a GPU crop.cu runs on the emulation of tests/cuda_on_host, all of it: kernels, launches, uploads.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_equality
import numpy as np
import pytest
from cuda_equality import MEAN, PAD, STD, Case, check, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualfocus import kernels
from dualfocus.kernels import cuda, reference

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels"


Use = Callable[[Path], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Has `cuda` look for its library in a folder, for the length of a test."""

    def look(folder: Path) -> None:
        monkeypatch.setattr(cuda, "FOLDER", folder)
        cuda._gpu.cache_clear()

    yield look
    cuda._gpu.cache_clear()


def emulation(folder: Path, source: Path = KERNELS / "crop.cu") -> Path:
    """The folder, with crop.cu for the host in it; what C++ does not define traps."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-ffp-contract=off"]
    traps = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    include = [f"-I{TESTS / 'cuda_on_host'}", f"-I{KERNELS}"]
    sources = ["-x", "c++", str(source), "-x", "c", str(KERNELS / "crop_plan.c")]
    library = ["-o", str(folder / "_crop_cuda.so")]
    subprocess.run([compiler, *flags, *traps, *include, *sources, *library], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def emulated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulation(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulated(emulated_folder: Path, use: Use) -> ctypes.CDLL:
    """The emulation in place of the GPU."""
    use(emulated_folder)
    return cuda._gpu().library


@pytest.fixture(params=["emulated", "device"] if cuda.available() else ["emulated"])
def runner(request: pytest.FixtureRequest) -> None:
    """What runs crop.cu: the emulation, and the GPU where there is one."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")


# The fixture sets a switch that no example changes, so that hypothesis's warning does not apply.
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_equals_c(runner: None, data: st.DataObject) -> None:
    check(draw(lambda low, high: data.draw(st.integers(low, high))))


@pytest.mark.parametrize("place", cuda_equality.PLACES)
@pytest.mark.parametrize(
    "case", cuda_equality.CORNERS, ids=lambda case: f"{case.width}x{case.height}-{case.size}"
)
def test_equals_c_at_the_corners(runner: None, case: Case, place: str) -> None:
    check(replace(case, place=place))


def test_equals_c_after_larger_and_smaller_ones(runner: None) -> None:
    """The workspace is kept, grows, and may hold what an earlier crop left."""
    for side in (30, 200, 7, 199):
        check(Case(side, side, (0, 0, side, side), side // 3 + 1, PAD, place="host"))


MUTATIONS = {
    "no rounding": ("HALF + pad_weight * pad[0]", "pad_weight * pad[0]"),
    "no padding": ("HALF + pad_weight * pad[1]", "HALF"),
    "the width always first": ("= crop_down_first(across, down)", "= false"),
    "channels swapped": ("table[512 + to_byte(sums.blue)]", "table[512 + to_byte(sums.red)]"),
    "a factor off by one": ("117489", "117488"),
    "chroma from the crop's corner": ("(left + x) / 2 * 2", "left / 2 * 2 + x / 2 * 2"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_checked_finds(name: str, tmp_path: Path, use: Use) -> None:
    """`check` is worth something: a small fault in crop.cu does not pass it.

    No fault is among them that reads beyond a block, as the emulation ends the process there.
    """
    right, wrong = MUTATIONS[name]
    source = (KERNELS / "crop.cu").read_text()
    assert source.count(right) == 1
    (tmp_path / "crop.cu").write_text(source.replace(right, wrong))
    use(emulation(tmp_path, tmp_path / "crop.cu"))
    with pytest.raises(AssertionError, match="Case"):
        cuda_equality.check_all(300)


def uploaded(library: ctypes.CDLL, source: Any, box: tuple[int, int, int, int]) -> int:
    counter = ctypes.c_size_t.in_dll(library, "emulated_uploaded")
    before = counter.value
    cuda.crop_resize(source, box, 8, fit=PAD, mean=MEAN, std=STD, out=cuda.DeviceArray((3, 8, 8), "float32"))
    return counter.value - before


def test_no_more_is_uploaded_than_the_box(emulated: ctypes.CDLL) -> None:
    picture, box = np.zeros((90, 120, 3), np.uint8), (31, 13, 72, 44)
    plan = uploaded(emulated, cuda.upload(picture), box)
    assert plan < 8192
    assert uploaded(emulated, picture, box) - plan == 3 * 41 * 31
    luma, chroma = np.zeros((90, 120), np.uint8), np.zeros((45, 60, 2), np.uint8)
    assert uploaded(emulated, cuda.Nv12(cuda.upload(luma), cuda.upload(chroma), "bt601"), box) == plan
    # whole squares: columns 30 to 71, rows 12 to 43
    assert uploaded(emulated, cuda.Nv12(luma, chroma, "bt601"), box) - plan == 42 * 32 + 42 * 16


def test_nv12_reference_is_the_standard() -> None:
    """The corners of the colour cube, coded as ITU-R BT.601 and BT.709 say, to the nearest level."""
    colours = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], np.float64)
    for matrix, (red, blue) in {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}.items():
        grey = colours @ [red, 1 - red - blue, blue]
        luma = 16 + 219 / 255 * grey
        u = 128 + 224 / 255 * (colours[:, 2] - grey) / (2 * (1 - blue))
        v = 128 + 224 / 255 * (colours[:, 0] - grey) / (2 * (1 - red))
        y_plane = luma.round().astype(np.uint8).repeat(2)[None].repeat(2, 0)
        uv_plane = np.stack([u, v], 1).round().astype(np.uint8)[None]
        got = reference.nv12_to_rgb(y_plane, uv_plane, matrix)  # type: ignore[arg-type]
        want = colours.repeat(2, 0)[None].repeat(2, 0)
        assert np.abs(got - want).max() <= 2


class DlPack:
    """What shows itself by DLPack alone, on the device `kind`."""

    def __init__(self, array: np.ndarray, kind: int) -> None:
        self.array, self.kind = array, kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        assert self.kind != 2 or stream == 1
        return self.array.__dlpack__()


def test_dlpack(emulated: ctypes.CDLL) -> None:
    """In the emulation the GPU's kernels can read numpy's memory."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    normal = {"fit": PAD, "mean": MEAN, "std": STD}
    want = kernels.crop_resize(picture, (3, 5, 50, 40), 16, **normal)
    for source in (DlPack(picture, 1), DlPack(picture, 2), DlPack(picture, 13)):
        out = np.zeros((1, 3, 16, 16), np.float32)
        cuda.crop_resize(source, (3, 5, 50, 40), 16, out=DlPack(out, 2), **normal)
        np.testing.assert_array_equal(out[0], want)
    padded = np.zeros((40, 60, 3), np.uint8)
    padded[:, 4:54] = picture
    out = np.zeros((3, 16, 16), np.float32)
    pair = (out.ctypes.data, np.float32)
    cuda.crop_resize(DlPack(padded[:, 4:54], 2), (3, 5, 50, 40), 16, out=pair, **normal)
    np.testing.assert_array_equal(out, want)


class Shown:
    """What shows itself by __cuda_array_interface__."""

    def __init__(self, array: np.ndarray, **other: object) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": array.strides,
            "version": 3,
            **other,
        }


LUMA, CHROMA = np.zeros((40, 50), np.uint8), np.zeros((20, 25, 2), np.uint8)
OUT = np.zeros((3, 16, 16), np.float32)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("source", None, "source must be a uint8 array .height, width, 3., a numpy one or .*NoneType"),
        ("source", np.zeros((40, 50, 3), np.float32), "source must hold uint8, it holds float32"),
        ("source", Shown(np.zeros((40, 50, 3), np.int8)), "source must hold uint8, it holds int8"),
        ("source", DlPack(np.zeros((40, 50, 3), bool), 2), "DLPack type has the code 6"),
        ("source", np.zeros((40, 50, 4), np.uint8), r"shape \(height, width, 3\), it has \(40, 50, 4\)"),
        ("source", LUMA, r"shape \(height, width, 3\), it has \(40, 50\)"),
        ("source", np.zeros((0, 50, 3), np.uint8), r"it has \(0, 50, 3\)"),
        ("source", np.zeros((40, 100, 3), np.uint8)[:, ::2], r"strides \(any, 3, 1\), packed rows; it has"),
        ("source", np.zeros((40, 50, 4), np.uint8)[..., :3], r"strides \(any, 3, 1\)"),
        ("source", np.zeros((40, 50, 3), np.uint8)[..., ::-1], r"strides \(any, 3, 1\)"),
        ("source", cuda.Nv12(LUMA, CHROMA, "bt2020"), "matrix must be 'bt601' or 'bt709', got 'bt2020'"),  # type: ignore[arg-type]
        ("source", cuda.Nv12(CHROMA, CHROMA, "bt601"), r"y_plane must have the shape \(height, width\)"),
        ("source", cuda.Nv12(LUMA[:, ::2], CHROMA, "bt601"), r"y_plane must have the strides \(any, 1\)"),
        (
            "source",
            cuda.Nv12(LUMA, CHROMA[..., ::-1], "bt601"),
            r"uv_plane must have the strides \(any, 2, 1\)",
        ),
        ("source", cuda.Nv12(LUMA, CHROMA[:19], "bt601"), r"\(20, 25, 2\), half of y_plane's, it has \(19,"),
        ("source", cuda.Nv12(LUMA, Shown(CHROMA), "bt601"), "both in host memory or both on the GPU"),
        ("box", (0, 0, 51, 40), "outside the picture, which is 50 x 40"),
        ("box", (20, 0, 20, 40), "empty"),
        ("size", 0, "1 to 16384"),
        ("size", 16.0, "whole number"),
        ("fit", "pad", "'crop', 'stretch' or"),
        ("mean", (0.5, 0.5), "mean must be three numbers"),
        ("std", (0.5, 0.0, 0.5), "above 0"),
        ("out", None, "out must lie on the GPU, .* got .*NoneType"),
        ("out", OUT, "out must lie on the GPU, .* got .*ndarray"),
        ("out", DlPack(OUT, 1), "out must lie on the GPU"),
        (
            "out",
            Shown(OUT[:, :8]),
            r"out must have the shape \(3, 16, 16\), or 1 before that, it has \(3, 8,",
        ),
        ("out", Shown(np.zeros((2, 3, 16, 16), np.float32)), r"it has \(2, 3, 16, 16\)"),
        ("out", Shown(np.zeros((3, 16, 32), np.float32)[..., ::2]), "out must be packed, its strides are"),
        ("out", Shown(OUT, data=(OUT.ctypes.data, True)), "out must be writable"),
        ("out", Shown(OUT.astype(np.float64)), "out must hold float32 or float16, it holds float64"),
        ("out", (OUT.ctypes.data, np.float64), "out must hold float32 or float16, it holds float64"),
        ("out", (OUT.ctypes.data,), r"out must be \(pointer, dtype\), a whole number and a type"),
        ("out", (0, np.float32), "out must lie at a multiple of 4 bytes, it lies at 0x0"),
        ("out", (OUT.ctypes.data + 1, np.float16), "multiple of 2 bytes"),
        ("out", ("x", np.float32), r"out must be \(pointer, dtype\)"),
        ("stream", -1, "stream must be a CUDA stream's handle, a whole number from 0 on, got -1"),
        ("stream", None, "stream must be a CUDA stream's handle"),
    ],
)
def test_bad_arguments(emulated: ctypes.CDLL, name: str, value: object, says: str) -> None:
    good: dict[str, Any] = {
        "source": np.zeros((40, 50, 3), np.uint8),
        "box": (0, 0, 50, 40),
        "size": 16,
        "fit": PAD,
        "mean": MEAN,
        "std": STD,
        "out": Shown(OUT),
    }
    cuda.crop_resize(**good)
    with pytest.raises(ValueError, match=says):
        cuda.crop_resize(**{**good, name: value})


def test_what_is_uploaded_is_an_array() -> None:
    with pytest.raises(ValueError, match=r"array must be a numpy array, got .*list"):
        cuda.upload([1, 2])  # type: ignore[arg-type]


def test_no_room_is_said_and_survived(emulated: ctypes.CDLL) -> None:
    case = Case(400, 400, (0, 0, 400, 400), 30, PAD)
    room = ctypes.c_size_t.in_dll(emulated, "emulated_room")
    all_of_it, room.value = room.value, 100_000
    with pytest.raises(RuntimeError, match="CUDA failed to crop: out of memory"):
        check(case)
    with pytest.raises(RuntimeError, match="CUDA failed to allocate memory: out of memory"):
        cuda.upload(np.zeros((400, 400, 3), np.uint8))
    room.value = all_of_it
    check(case)


def test_without_the_library(tmp_path: Path, use: Use) -> None:
    use(tmp_path)
    assert not cuda.available()
    assert cuda.unavailable() == "dualfocus was built without its CUDA kernel: that takes nvcc"
    (tmp_path / "_crop_cuda.so").write_text("no library")
    assert (cuda.unavailable() or "").startswith("the CUDA kernel cannot be loaded: ")
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        cuda.upload(np.zeros((4, 4, 3), np.uint8))


def test_nvcc(tmp_path: Path, use: Use) -> None:
    """It compiles for Orin, keeps everything in registers, and the library loads with a GPU or without."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("compiling crop.cu for a GPU takes nvcc")
    flags = ["-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-arch=sm_87", "-Xptxas", "-v"]
    files = [str(KERNELS / "crop.cu"), str(KERNELS / "crop_plan.c"), "-o", str(tmp_path / "_crop_cuda.so")]
    done = subprocess.run([nvcc, *flags, *files], check=True, capture_output=True, text=True, timeout=300)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", done.stderr)
    assert memory == [("0", "0", "0")] * 8
    use(tmp_path)
    reason = cuda.unavailable()
    assert reason is None or re.fullmatch(
        r"there is no CUDA driver on this machine|CUDA failed to .*: .* \(error \d+\)", reason
    )
