"""TensorRT's engines of a bundle; nothing else imports tensorrt, or TensorRT-RTX, which has the same API.

`export.tensorrt` builds them into the bundle's folder ``engines``. They fit one bundle, one version of the
library and one model of GPU; with any other they are refused, because TensorRT itself would refuse some
and run others slowly. Nothing here was run on a GPU yet: what is tested is what surrounds the library.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualfocus.runtime.errors import BundleError, EngineError

try:
    import tensorrt as trt
except ImportError:
    try:
        import tensorrt_rtx as trt  # an engine of it runs on GeForce and RTX GPUs from Turing on
    except ImportError:
        raise EngineError("no TensorRT is installed: pip install 'dualfocus[tensorrt]'") from None

FOLDER, NOTE = "engines", "engines.json"  # the note is written last
VISION, DECODER = "vision.engine", "decoder.engine"
CONTEXT, GENERATION = 0, 1  # the decoder's optimisation profiles: appends of any length, and steps
library: Any = trt
LIBRARY: str = trt.__name__
VERSION: str = trt.__version__
IS_RTX = LIBRARY == "tensorrt_rtx"
REBUILD = "build them again on this machine with dualfocus.export.tensorrt.build_engines"

MAJOR, MINOR = 75, 76  # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for."""

    name: str  # "NVIDIA GeForce RTX 4090"; of an engine of TensorRT-RTX: "any"
    capability: str  # "8.9"

    def __str__(self) -> str:
        return f"{self.name} of compute capability {self.capability}"


@dataclass(frozen=True)
class Reach:
    """The largest calls that engines take."""

    rows: int  # of the cache in one call
    capacity: int  # tokens in a row; the cache's tensors have this size
    length: int  # tokens appended to a row in one call
    wanted: int  # positions of a row whose logits are given
    pictures: int  # in one call of the tower


@dataclass(frozen=True)
class Note:
    """``engines.json``: what the engines beside it are."""

    bundle: str  # SHA-256 of manifest.json
    library: str
    version: str
    gpu: Gpu
    reach: Reach
    sizes: dict[str, int]  # bytes, by file

    @classmethod
    def from_dict(cls, raw: Any) -> Note:
        """Raises LookupError, TypeError or ValueError for what is no such note."""
        sizes = {name: int(raw["sizes"][name]) for name in (VISION, DECODER)}
        return cls(**{**raw, "gpu": Gpu(**raw["gpu"]), "reach": Reach(**raw["reach"]), "sizes": sizes})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict(to_dict(n)) == n``."""
        return dataclasses.asdict(self)


class Log(trt.ILogger):  # type: ignore[misc]  # Any to mypy
    """Keeps the library's errors, which it tells nobody else."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        """Called by the library."""
        if int(severity) <= int(trt.ILogger.Severity.ERROR):
            self.errors.append(msg)

    @property
    def reason(self) -> str:
        """The first error, in a line."""
        return self.errors[0].splitlines()[0] if self.errors else "it gave no reason"


@dataclass(frozen=True)
class Engines:
    """A bundle's engines, opened: `ICudaEngine`s, from which contexts are made."""

    runtime: Any  # lives as long as they do
    vision: Any
    decoder: Any
    reach: Reach


def find_gpu(index: int = 0) -> Gpu:
    """The GPU number `index`, as the driver counts those it shows; EngineError where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise EngineError("no NVIDIA driver is installed: there is no libcuda.so.1") from None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls = (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), index)),
        ("cuDeviceGetName", (name, len(name), device)),
        ("cuDeviceGetAttribute", (ctypes.byref(major), MAJOR, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(minor), MINOR, device)),
    )
    for function, arguments in calls:
        if code := getattr(cuda, function)(*arguments):
            raise EngineError(f"the NVIDIA driver shows no GPU {index}: {function} gave error {code}")
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}")


def load(path: Path, digest: str) -> Engines:
    """Open the engines of the bundle at `path`, which `digest` names; plans are mapped, not read.

    Raises BundleError where there are none, or they are another's, another version's, another GPU's or
    damaged; EngineError where there is no GPU.
    """
    note, gpu = _note(path), find_gpu()
    folder = path / FOLDER
    for what, found, expected in (
        ("bundle", note.bundle, digest),
        ("library", f"{note.library} {note.version}", f"{LIBRARY} {VERSION}"),
        ("GPU", str(note.gpu), str(gpu if note.gpu.name != "any" else Gpu("any", gpu.capability))),
    ):
        if found != expected:
            raise BundleError(f"{folder} was built for the {what} {found}, this is {expected}: {REBUILD}")
    log = Log()
    runtime = trt.Runtime(log)
    vision, decoder = (_open(runtime, log, folder / name, note.sizes[name]) for name in (VISION, DECODER))
    return Engines(runtime, vision, decoder, note.reach)


def _note(path: Path) -> Note:
    file = path / FOLDER / NOTE
    try:
        return Note.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BundleError(f"{path} has no engines: {REBUILD}") from None
    except (OSError, ValueError, LookupError, TypeError):
        raise BundleError(f"{file} is damaged: {REBUILD}") from None


def _open(runtime: Any, log: Log, file: Path, size: int) -> Any:
    found = file.stat().st_size if file.is_file() else 0
    if found != size or not size:
        raise BundleError(f"{file} has {found} bytes, expected {size}: {REBUILD}")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BundleError(f"{file} cannot be opened by {LIBRARY} {VERSION}: {log.reason}")
    return engine
