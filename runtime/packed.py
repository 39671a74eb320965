"""Graphs prepacked for this machine, in a folder of the bundle.

ONNX Runtime repacks weights whenever it opens a graph, which is the longer part of a start and takes private
memory of their size. `pack` keeps what comes of it in the bundle's folder ``packed``, whose files are mapped
instead: shared by processes, and dropped by the system when memory is short. They fit one kind of processor
and one version of ONNX Runtime. With any other, and where they are incomplete, they are passed over.

For tensorrt-rtx the folder is ``packed-rtx``: graphs that name their engines (EP context), and what
their kernels were compiled to, in ``cache``. The names of the options were looked up in the plug-in; what it
makes of them was never seen, for want of a GPU.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualfocus import kernels
from dualfocus.runtime import contents, devices, graph
from dualfocus.runtime.contents import HASHED_BYTES
from dualfocus.runtime.devices import CPU, Device, Kind
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.manifest import ON_DEVICE, Files, Manifest

FOLDERS: dict[Kind, str] = {"cpu": "packed", "tensorrt-rtx": "packed-rtx"}
NOTE = "packed.json"  # written last
CACHE = "cache"  # of compiled kernels, which come with use


@dataclass(frozen=True)
class Note:
    """``packed.json``: what has to be the same for the graphs to be opened, and the files."""

    made_for: dict[str, Any]
    files: Files


@dataclass(frozen=True)
class _Made:
    """What the notes of all kinds have in common."""

    files: Files


def pack(path: Path, manifest: Manifest, digest: str, device: Device = CPU) -> Path:
    """Pack the graphs of the bundle at `path`, as `read_manifest` gives it, for a CPU or TensorRT-RTX.

    Returns the folder. Raises BundleError where a file of the bundle is not what was exported, the disk has
    no room, or another process packs the bundle; EngineError where there is no ONNX Runtime.
    """
    from dualfocus.runtime.onnx import save_packed

    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    # the packed weights are stored after the weights they were made from, and are about as large
    if (free := shutil.disk_usage(path).free) < 2.5 * size:
        raise BundleError(
            f"{path} has room for {free / 1e6:,.1f} MB, packing may take {2.5 * size / 1e6:,.1f} MB"
        )
    contents.verify(path, manifest.files)
    graph.check(path, manifest, manifest.files)
    folder = path / FOLDERS[device.kind]
    with contents.replacing(folder) as new:
        for name in (graph.VISION, graph.DECODER):
            save_packed(path / name, new / name, device, half=manifest.target in ON_DEVICE)
        note = Note(_made_for(digest, device), contents.entries(new))
        contents.write_note(new, NOTE, note)
    return folder


def find(path: Path, digest: str, device: Device = CPU) -> tuple[Path, Files] | None:
    """The folder and the files of the graphs that were packed of the bundle at `path` for this machine.

    None where there are none, they were made for something else, or they are not what was written.
    """
    if device.kind not in FOLDERS or not os.path.isdir(path / FOLDERS[device.kind]):
        return None
    try:
        folder, note = contents.read_note(path, FOLDERS[device.kind], NOTE, Note)
        if note.made_for != _made_for(digest, device):
            return None
        contents.check(folder, note.files)
        contents.verify(folder, note.files, HASHED_BYTES)
    except BundleError:
        return None
    return folder, note.files


def verify(path: Path) -> None:
    """Read every file that was made of the bundle at `path` for this or another machine, by their notes.

    Raises BundleError if one is not what was written.
    """
    for name, note in ((FOLDERS["cpu"], NOTE), (FOLDERS["tensorrt-rtx"], NOTE), ("engines", "engines.json")):
        if os.path.lexists(path / name):
            try:
                folder, made = contents.read_note(path, name, note, _Made)
                contents.check(folder, made.files)
                contents.verify(folder, made.files)
            except BundleError as error:
                raise BundleError(f"{error}: make it again with `dualfocus pack {path}`") from None


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
    features = [line for line in first if line.startswith(("model name", "flags", "Features", "CPU "))]
    return hashlib.sha256("\n".join(features).encode()).hexdigest()
