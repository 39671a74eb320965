"""The wheel for 64-bit ARM, and what it does on an emulated processor: `make test-aarch64`.

The wheel is made here by the cross compiler. build/aarch64/python, where `.ci/aarch64` has made it, runs it
with the wheels of its dependencies as they would be installed on a Jetson.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle, DualFocus, open_picture
from dualfocus.runtime.bundle import BUILT_IN
from dualfocus.runtime.manifest import Precision

REPOSITORY = Path(__file__).parent.parent
PYTHON = REPOSITORY / "build/aarch64/python"
PICTURE, QUESTION = (REPOSITORY / "examples" / name for name in ("scene.png", "scene.txt"))
CHECKPOINT = REPOSITORY / "train/checkpoints/nano"
# What qemu has nearest to the boards: Cortex-A78AE is of ARMv8.2 with dot products; Neoverse V3AE
# has vectors of 128 bits (SVE2), products of matrices of bytes, and no SME, which qemu 7.2 gets wrong.
PROCESSORS = {"orin": "cortex-a76", "thor": "max,sve-max-vq=1,sme=off"}
AARCH64 = 183  # ELF's number of the machine
OLDEST_GLIBC = (2, 35)  # JetPack 6's; JetPack 7 has 2.39

emulated = pytest.mark.skipif(
    not PYTHON.exists(), reason="`make test-aarch64` makes an emulated Python first"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("a wheel for 64-bit ARM takes aarch64-linux-gnu-gcc")
    pytest.importorskip("setuptools", "77", reason="no setuptools here, and none is downloaded")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # the build leaves things behind, and other builds may run
    shutil.copytree(
        REPOSITORY,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "runs"),
    )
    make = ["make", "--silent", "wheel-aarch64", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(
        [*make, "PIP_FLAGS=--no-build-isolation"], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (source / "dist").iterdir()
    return made


def test_the_wheel_is_for_every_python_on_64_bit_arm(wheel: Path) -> None:
    assert wheel.name.endswith("-cp311-abi3-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as files:
        libraries = [name for name in files.namelist() if name.endswith(".so")]
        (tags,) = (files.read(name).decode() for name in files.namelist() if name.endswith("/WHEEL"))
        (library,) = map(files.read, libraries)
    assert "Tag: cp311-abi3-linux_aarch64\n" in tags
    assert libraries == ["dualfocus/kernels/_crop.abi3.so"]
    assert library[:6] == b"\x7fELF\x02\x01"  # 64 bits, little-endian
    assert int.from_bytes(library[18:20], "little") == AARCH64
    assert b"\0crop_neon\0" in library  # exported: among the dynamic symbols' names
    assert b"\0crop_avx2\0" not in library
    wanted = {tuple(map(int, found.split(b"."))) for found in re.findall(rb"\0GLIBC_([\d.]+)\0", library)}
    assert max(wanted) <= OLDEST_GLIBC


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    found = {"fp32": BUILT_IN}
    for precision in ("int8", "int4"):
        found[precision] = tmp_path_factory.mktemp("nano") / precision
        export_bundle(CHECKPOINT, found[precision], precision=precision, progress=lambda _: None)
    return found


def run(*arguments: str | Path, cwd: Path, processor: str = PROCESSORS["orin"]) -> str:
    """What an emulated Python prints; the repository is not on its path, so the wheel is what runs."""
    environment = os.environ | {"QEMU_CPU": processor}
    done = subprocess.run(
        [PYTHON, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@emulated
@pytest.mark.slow
def test_the_kernels_whole_test(tmp_path: Path) -> None:
    """The very test, on the extension module as the wheel has it, beside Pillow's own ARM build."""
    shutil.copy(REPOSITORY / "tests/test_kernels.py", tmp_path)
    told = run("-m", "pytest", "-p", "no:cacheprovider", "test_kernels.py", "-v", cwd=tmp_path)
    for isa in ("neon", "scalar"):
        assert f"test_equals_pillow[{isa}] PASSED" in told


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_built_in_model_answers_alike(
    precision: Precision, processor: str, bundles: dict[Precision, Path], tmp_path: Path
) -> None:
    """ONNX Runtime's ARM kernels: the same answers from the same region, and about the same losses."""
    bundle, question = bundles[precision], QUESTION.read_text().strip()
    here = DualFocus(Bundle.open(bundle, threads=1)).ask(open_picture(str(PICTURE)), question)
    told = run(
        *("-m", "dualfocus.cli", "ask", PICTURE, question, "--bundle", bundle, "--json"),
        cwd=tmp_path,
        processor=PROCESSORS[processor],
    )
    there = json.loads(told)
    assert there["answer"] == here.answer == "T73"
    for name in ("macro", "micro"):
        answer = getattr(here, name)
        assert there[name]["text"] == answer.text
        # what integer products round differs between processors; float32 only in the order of its sums
        assert there[name]["loss"] == pytest.approx(answer.loss, abs=1e-3 if precision == "fp32" else 0.02)
    assert there["crop"] == list(here.crop)
