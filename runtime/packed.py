"""Graphs with their weights as this machine's kernels read them, beside a bundle's own.

ONNX Runtime repacks weights whenever it opens a graph, which is the longer part of a start and takes private
memory of their size. `pack` keeps what comes of it in the bundle's folder ``packed``, whose files are mapped
instead: shared by processes, and dropped by the system when memory is short. They fit one kind of processor
and one version of ONNX Runtime. With any other, and where they are incomplete, they are passed over.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

from dualfocus import kernels
from dualfocus.runtime.errors import BundleError

FOLDER, NOTE = "packed", "packed.json"  # the note is written last
GRAPHS = ("vision.onnx", "decoder.onnx")


def pack(path: Path, digest: str) -> Path:
    """Pack the weights of the bundle at `path`, which `digest` names.

    Returns the folder. Raises BundleError where the disk has no room for it, EngineError where there is no
    ONNX Runtime.
    """
    from dualfocus.runtime.onnx import save_packed

    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    # the packed weights are stored behind the weights they were made from, and are about as large
    if (free := shutil.disk_usage(path).free) < 2.5 * size:
        raise BundleError(f"{path} has room for {free / 1e9:.1f} GB, packing may take {2.5 * size / 1e9:.1f}")
    unfinished = path / f".{FOLDER}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for graph in GRAPHS:
            save_packed(path / graph, unfinished / graph)
        sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
        note = {"made_for": _made_for(digest), "sizes": sizes}
        (unfinished / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(path / FOLDER, ignore_errors=True)
        unfinished.rename(path / FOLDER)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path / FOLDER


def graphs(path: Path, digest: str) -> Path:
    """The folder whose graphs are to be opened for the bundle at `path`: its ``packed``, or itself."""
    folder = path / FOLDER
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        fits = note["made_for"] == _made_for(digest)
        whole = all((folder / name).stat().st_size == size for name, size in note["sizes"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return path
    return folder if fits and whole else path


def _made_for(digest: str) -> dict[str, Any]:
    """What has to be the same for packed weights to be read."""
    from dualfocus.runtime.onnx import VERSION

    return {
        "bundle": digest,
        "onnxruntime": VERSION,
        "processor": _processor(),
        "kernels": list(kernels.available()),
    }


def _processor() -> str:
    """One text for each kind: its name and what it can do, hashed."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = [line for line in first if line.startswith(("model name", "flags", "Features", "CPU "))]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
