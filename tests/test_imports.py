"""Imports of the runtime go one way, and heavy libraries are imported late."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import dualfocus.runtime

RUNTIME = Path(dualfocus.runtime.__file__).parent
HEAVY = {"onnxruntime", "cupy", "tensorrt", "tensorrt_rtx"}


def imported(file: Path) -> set[str]:
    """The modules of the runtime that `file` imports, in functions too."""
    package, names = "dualfocus.runtime", set[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            names |= {f"{package}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.removeprefix(f"{package}.") for name in names if name.startswith(f"{package}.")}


def test_no_import_circle() -> None:
    graph = {file.stem: imported(file) for file in RUNTIME.glob("*.py")}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("devices") < order.index("onnx") < order.index("registry") < order.index("bundle")


def test_heavy_libraries_are_imported_late() -> None:
    code = f"import sys, dualfocus.runtime; print(*({HEAVY} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
