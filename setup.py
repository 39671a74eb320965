"""The C extension, and one check; everything else stands in pyproject.toml."""

import pathlib
import sys

from setuptools import Extension, setup

if not (pathlib.Path(__file__).parent / "src/dualfocus/kernels/__init__.py").is_file():
    sys.exit(
        "src/dualfocus/kernels is not a link to ../../kernels: "
        "check out with symbolic links on (git config core.symlinks true)"
    )

SOURCES = ["binding", "crop", "crop_plan", "crop_avx512", "crop_avx2", "crop_neon", "stream"]
HEADERS = ["crop", "crop_isa", "crop_math", "crop_plan", "stream"]

setup(
    ext_modules=[
        Extension(
            "dualfocus.kernels._crop",
            [f"src/dualfocus/kernels/{name}.c" for name in SOURCES],
            depends=[f"src/dualfocus/kernels/{name}.h" for name in HEADERS],
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
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
