"""The C extension, the library for GPUs where nvcc is found, and one check; the rest is in pyproject.toml."""

import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

if not (pathlib.Path(__file__).parent / "src/dualfocus/kernels/__init__.py").is_file():
    sys.exit(
        "src/dualfocus/kernels is not a link to ../../kernels: "
        "check out with symbolic links on (git config core.symlinks true)"
    )

SOURCES = ["binding", "crop", "crop_plan", "crop_avx512", "crop_avx2", "crop_neon", "stream"]
HEADERS = ["crop", "crop_isa", "crop_math", "crop_plan", "stream"]
FOLDER = "src/dualfocus/kernels"

CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin"))
IS_CROSS = "_PYTHON_HOST_PLATFORM" in os.environ  # for another processor than nvcc's host compiler is for
# machine code for Orin, Hopper and Thor, as far as nvcc knows them; for others the driver compiles compute_75
GPUS = ["87", "90", "110"]


class BuildExt(build_ext):
    """Leaves crop.cu to nvcc. It makes a library for ctypes, not a Python module."""

    def build_extension(self, ext: Extension) -> None:
        """As setuptools does, or with nvcc. Without success that is a warning: the extension is optional."""
        if ext.name != "dualfocus.kernels._crop_cuda":
            return super().build_extension(ext)
        library = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], library, "newer"):
            return None
        listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True)
        if listed.returncode != 0:
            raise CompileError(f"{NVCC} --list-gpu-arch failed: {listed.stderr}")
        known = [gpu for gpu in GPUS if f"compute_{gpu}" in listed.stdout.split()]
        codes = ["compute_75,code=compute_75", *(f"compute_{gpu},code=sm_{gpu}" for gpu in known)]
        flags = ["-O3", "-shared", "-cudart", "static", *(f"-gencode=arch={code}" for code in codes)]
        # of the host's compiler; no contraction, as below
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
        self.mkpath(os.path.dirname(library))
        return self.spawn([NVCC, *flags, *host, *ext.sources, "-o", library])


extensions = [
    Extension(
        "dualfocus.kernels._crop",
        [f"{FOLDER}/{name}.c" for name in SOURCES],
        depends=[f"{FOLDER}/{name}.h" for name in HEADERS],
        # no contraction: a fused multiply-add in the filter's coefficients would change the last bit
        extra_compile_args=[
            "-O3",
            "-std=c11",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-Werror=implicit-function-declaration",
        ],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
    )
]
if NVCC and not IS_CROSS:
    extensions.append(
        Extension(
            "dualfocus.kernels._crop_cuda",
            [f"{FOLDER}/crop.cu", f"{FOLDER}/crop_plan.c"],
            depends=[f"{FOLDER}/{name}.h" for name in HEADERS],
            py_limited_api=True,
            optional=True,
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
