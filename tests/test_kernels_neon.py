"""The crop kernel's equality tests once more, through the paths of 64-bit ARM.

kernel_pipe.c, cross-compiled and run by qemu-user, answers where the binding would, so that all that these
tests try is held to Pillow. How rows lie in memory is kernel_fuzz.c's, and the binding `make test-aarch64`'s.
"""

import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_kernels import (  # noqa: F401  collected here too, with the fixture below
    test_a_constant_stays_constant,
    test_an_unscaled_crop_is_exact,
    test_an_unscaled_crop_lies_in_the_middle_of_its_square,
    test_equals_pillow,
    test_equals_pillow_at_the_corners,
    test_equals_pillow_on_slivers,
    test_normalised_equals_the_formula,
    test_pixels_outside_the_box_do_not_show,
    test_threads_do_not_disturb_each_other,
)
from test_kernels_c import CORE, KERNELS, TESTS

from dualfocus import kernels

PATHS = ("neon", "scalar")
FITS = {"pad": 0, "crop": 1, "stretch": 2}  # crop_fit


class Emulated:
    """The extension module's functions, with `program` behind them."""

    def __init__(self, qemu: str, program: Path, isa: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([qemu, str(program), isa], **pipes)
        self._lock = threading.Lock()

    def available(self) -> tuple[str, ...]:
        return PATHS

    def resize(self, picture, box, size, fit, table, isa) -> bytes:
        height, width, _ = picture.shape
        pad = (0, 0, 0) if isinstance(fit, str) else fit
        item = 0 if table is None else table.itemsize
        fit = FITS[fit if isinstance(fit, str) else "pad"]
        request = struct.pack("<12i", width, height, *map(int, box), size, fit, *map(int, pad), item)
        with self._lock:
            self._process.stdin.write(
                request + picture.tobytes() + (b"" if table is None else table.tobytes())
            )
            self._process.stdin.flush()
            result = self._process.stdout.read(3 * size * size * max(1, item))
        assert len(result) == 3 * size * size * max(1, item), "kernel_pipe ended early"
        return result

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cross = shutil.which("aarch64-linux-gnu-gcc")
    if cross is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("running 64-bit ARM code here takes aarch64-linux-gnu-gcc and qemu-aarch64")
    made = tmp_path_factory.mktemp("aarch64") / "kernel_pipe"
    flags = ["-std=c11", "-O3", "-ffp-contract=off", "-static", f"-I{KERNELS}"]  # setup.py's
    subprocess.run([cross, *flags, "-o", made, *CORE, TESTS / "kernel_pipe.c"], check=True, timeout=300)
    return made


@pytest.fixture(scope="module", params=PATHS)
def emulated(request: pytest.FixtureRequest, program: Path) -> Iterator[tuple[str, Emulated]]:
    core = Emulated("qemu-aarch64", program, request.param)
    yield request.param, core
    core.close()


@pytest.fixture(autouse=True)
def isa(emulated: tuple[str, Emulated], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, core = emulated
    monkeypatch.setattr(kernels, "_crop", core)
    kernels.force_isa(name)
    yield name
    kernels.force_isa(None)


def test_there_are_no_other_paths(program: Path) -> None:
    """Nor is a path that does not run taken for one that gives the right bytes."""
    done = subprocess.run(["qemu-aarch64", str(program), "avx2"], stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 2
