"""What a model runs on: this machine's processor, or an NVIDIA GPU through one of three libraries.

``cpu`` and ``cuda`` are ONNX Runtime's own; ``tensorrt-rtx`` is NVIDIA's plug-in for it; ``tensorrt`` runs
engines that were built beforehand (`tensorrt`). On a GPU, arrays are CuPy's. Whether a device works is tried,
not guessed: every step that can be missing, from the Python package to the driver, has a sentence of its own.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np

from dualfocus.runtime.errors import DeviceError, EngineError
from dualfocus.runtime.manifest import Target

Kind = Literal["cpu", "cuda", "tensorrt-rtx", "tensorrt"]

# What runs the graphs of each target, the best first. A processor runs any of them, float16 slowly.
RUNS: dict[Target, tuple[Kind, ...]] = {
    "onnxruntime": ("cpu",),
    "onnx-standard": ("cpu",),
    "cuda": ("cuda", "tensorrt-rtx", "cpu"),
    "tensorrt": ("tensorrt", "tensorrt-rtx", "cpu"),
}


@dataclass(frozen=True)
class Device:
    """One processor, and what drives it."""

    kind: Kind
    index: int = 0  # of the GPU

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def memory(self) -> ModuleType:
        """The module whose arrays lie on the device: NumPy or CuPy."""
        if self.kind == "cpu":
            return np
        import cupy

        module: ModuleType = cupy
        return module

    def use(self) -> None:
        """Have this thread's arrays lie on the device; until then, they lie on the first GPU."""
        if self.kind != "cpu":
            self.memory.cuda.Device(self.index).use()

    def stream(self, *, blocking: bool) -> Any:
        """A new stream; if `blocking`, it and the default stream wait for each other. The CPU has none."""
        if self.kind == "cpu":
            return None
        return self.memory.cuda.Stream(non_blocking=not blocking)


CPU = Device("cpu")

# What of this program was seen working on what, and what never was.
SEEN: dict[Kind, str] = {
    "cpu": "run on x86-64 (AVX2, AVX-512), and on 64-bit ARM as an emulator runs it",
    "cuda": "never run on a GPU: its graphs on a CPU, its calls on an emulated GPU",
    "tensorrt-rtx": "never run on a GPU: its parser and builder take the graphs",
    "tensorrt": "never run on a GPU: TensorRT-RTX builds the engines, the calls on an emulated GPU",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    index: int
    name: str
    compute_capability: str  # "8.7"
    memory: int  # bytes


def parse(text: str) -> Device | None:
    """The device called `text`: a kind, on a GPU with ``:n`` behind it. None for "auto".

    Raises DeviceError for anything else.
    """
    if text == "auto":
        return None
    kinds = "|".join(get_args(Kind))
    found = re.fullmatch(rf"({kinds})(?::(\d{{1,3}}))?", text)
    if found is None or (found[1] == "cpu" and found[2]):
        raise DeviceError(
            f"there is no device {text!r}, expected auto, cpu, cuda, tensorrt or tensorrt-rtx, a GPU's "
            "number behind the last three, such as cuda:1"
        )
    return Device(found[1], int(found[2] or 0))  # type: ignore[arg-type]


def choose(wanted: Device | None, target: Target) -> Device:
    """The device for a bundle of `target`: the one `wanted`, or of those that work the best.

    Raises DeviceError where the one wanted does not work, or runs no such bundle.
    """
    if wanted is None:
        of_target = (Device(kind) for kind in RUNS[target])
        return next(device for device in of_target if problem(device) is None)
    if wanted.kind not in RUNS[target]:
        others = [other for other, kinds in RUNS.items() if wanted.kind in kinds]
        raise DeviceError(
            f"{wanted} does not run a bundle of target {target}, expected one exported with --target "
            + " or ".join(others)
        )
    if (why := problem(wanted)) is not None:
        raise DeviceError(f"{wanted} does not work here: {why}")
    return wanted


def problem(device: Device) -> str | None:
    """What `device` lacks to work here, in a few words; None if nothing."""
    if device.kind == "cpu":
        return None
    try:
        find_gpu(device.index)
        device.use()
        # CuPy compiles what it is first asked for, with CUDA's compiler and headers
        device.memory.zeros(2, np.int64)[[1]].get()
        if device.kind == "tensorrt":
            from dualfocus.runtime import tensorrt  # noqa: F401

            return None
        from dualfocus.runtime import onnx

        return onnx.problem(device)
    except (DeviceError, EngineError) as error:
        return str(error)
    except Exception as error:  # what a broken installation of CuPy raises is of any kind
        return f"CuPy does not compute ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def find_gpu(index: int) -> Gpu:
    """The GPU number `index`; DeviceError where there is none."""
    found = gpus()
    if index >= len(found):
        raise DeviceError(f"there is no GPU {index}, {len(found)} found")
    return found[index]


def survey() -> dict[str, Any]:
    """What this machine can run models on, as JSON: of each kind what it lacks, the GPUs, and versions."""
    names = ("onnxruntime", "onnxruntime-gpu", "cupy-cuda13x", "cupy-cuda12x", "tensorrt", "tensorrt-rtx")
    versions = {}
    for name in (*names, "onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    try:
        found = gpus()
    except DeviceError:
        found = []
    else:
        import cupy

        told = {"CUDA driver": cupy.cuda.runtime.driverGetVersion()}
        told["CUDA runtime"] = cupy.cuda.runtime.runtimeGetVersion()
        versions |= {name: f"{number // 1000}.{number % 1000 // 10}" for name, number in told.items()}
    return {
        "devices": {kind: problem(Device(kind)) for kind in get_args(Kind)},
        "seen": SEEN,
        "gpus": [asdict(gpu) for gpu in found],
        "versions": versions,
    }


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine. Raises DeviceError where they cannot be asked for."""
    try:
        import cupy
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceError(f"CuPy is missing ({error}): pip install 'dualfocus[gpu]'") from None
    runtime = cupy.cuda.runtime
    try:
        found = []
        for index in range(runtime.getDeviceCount()):
            told = runtime.getDeviceProperties(index)
            capability = f"{told['major']}.{told['minor']}"
            found.append(Gpu(index, told["name"].decode(), capability, told["totalGlobalMem"]))
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"no NVIDIA driver or GPU answers ({error})") from None
    return found
