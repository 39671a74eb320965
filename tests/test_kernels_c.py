"""The crop kernel's C core by itself: under sanitizers, and as 64-bit ARM code.

kernel_fuzz.c makes the random crops and walks every path.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels"
CORE = sorted(str(path) for path in KERNELS.glob("*.c") if path.name != "binding.c")
CASES = 600


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        pytest.skip("no C compiler")
    return found


def fuzz(compiler: str, folder: Path, *flags: str, runner: tuple[str, ...] = ()) -> str:
    """Compiles and runs kernel_fuzz.c; the line it prints: the number of cases and a hash of the results."""
    program = str(folder / "kernel_fuzz")
    build = [compiler, "-std=c11", "-ffp-contract=off", *flags, f"-I{KERNELS}", "-o", program]
    subprocess.run([*build, *CORE, str(TESTS / "kernel_fuzz.c")], check=True, timeout=300)
    done = subprocess.run([*runner, program, str(CASES)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{CASES} cases, hash ")
    return done.stdout


def test_sanitizers_find_nothing(compiler: str, tmp_path: Path) -> None:
    sanitize = "-fsanitize=address,undefined"
    probe = [compiler, sanitize, "-x", "c", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, input=b"int main(void) { return 0; }", capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no address and undefined-behaviour sanitizers")
    fuzz(compiler, tmp_path, "-g", "-O1", sanitize, "-fno-sanitize-recover=all")


def test_neon_gives_the_same_bytes(compiler: str, tmp_path: Path) -> None:
    cross, qemu = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if cross is None or qemu is None:
        pytest.skip("running 64-bit ARM code here takes aarch64-linux-gnu-gcc and qemu-aarch64")
    native = fuzz(compiler, tmp_path, "-O2")
    assert fuzz(cross, tmp_path, "-O2", "-static", runner=(qemu,)) == native
