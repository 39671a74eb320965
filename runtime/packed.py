"""Graphs as this machine reads them, beside a bundle's own.

ONNX Runtime repacks weights whenever it opens a graph, which is the longer part of a start and takes private
memory of their size. `pack` keeps what comes of it in the bundle's folder ``packed``, whose files are mapped
instead: shared by processes, and dropped by the system when memory is short. They fit one kind of processor
and one version of ONNX Runtime. With any other, and where they are incomplete, they are passed over.

For tensorrt-rtx the folder is ``packed-rtx``: graphs that name the engines beside them (EP context), and what
their kernels were compiled to, in ``cache``. The names of the options were looked up in the plug-in; what it
makes of them was never seen, for want of a GPU.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

from dualfocus import kernels
from dualfocus.runtime import devices
from dualfocus.runtime.devices import CPU, Device, Kind
from dualfocus.runtime.errors import BundleError

FOLDERS: dict[Kind, str] = {"cpu": "packed", "tensorrt-rtx": "packed-rtx"}
NOTE = "packed.json"  # written last
CACHE = "cache"  # of compiled kernels, which come with use
GRAPHS = ("vision.onnx", "decoder.onnx")


def pack(path: Path, digest: str, device: Device = CPU, *, half: bool = False) -> Path:
    """Pack the graphs of the bundle at `path`, which `digest` names, for a CPU or TensorRT-RTX.

    `half`: they compute in float16, as a GPU's do.

    Returns the folder. Raises BundleError where the disk has no room for it, EngineError where there is no
    ONNX Runtime.
    """
    from dualfocus.runtime.onnx import save_packed

    folder = path / FOLDERS[device.kind]

    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    # the packed weights are stored behind the weights they were made from, and are about as large
    if (free := shutil.disk_usage(path).free) < 2.5 * size:
        raise BundleError(f"{path} has room for {free / 1e9:.1f} GB, packing may take {2.5 * size / 1e9:.1f}")
    unfinished = path / f".{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for graph in GRAPHS:
            save_packed(path / graph, unfinished / graph, device, half=half)
        sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
        note = {"made_for": _made_for(digest, device), "sizes": sizes}
        (unfinished / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def graphs(path: Path, digest: str, device: Device = CPU) -> Path:
    """The folder whose graphs are to be opened for the bundle at `path`: one of packed ones, or itself."""
    if device.kind not in FOLDERS:
        return path
    folder = path / FOLDERS[device.kind]
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        fits = note["made_for"] == _made_for(digest, device)
        whole = all((folder / name).stat().st_size == size for name, size in note["sizes"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return path
    return folder if fits and whole else path


def _made_for(digest: str, device: Device) -> dict[str, Any]:
    """What has to be the same for packed graphs to be read."""
    from dualfocus.runtime.onnx import VERSION, rtx_version

    same = {"bundle": digest, "onnxruntime": VERSION}
    if device.kind == "cpu":
        return same | {"processor": _processor(), "kernels": list(kernels.available())}
    gpu = devices.find_gpu(device.index)
    return same | {"provider": rtx_version(), "gpu": f"{gpu.name} {gpu.compute_capability}"}


def _processor() -> str:
    """One text for each kind: its name and what it can do, hashed."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = [line for line in first if line.startswith(("model name", "flags", "Features", "CPU "))]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
