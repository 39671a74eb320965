"""The devices that work on this machine, and the one to run a bundle on.

A device is tried, not guessed: each step that can be missing, from the Python package to the driver, has a
message of its own. Libraries are imported only when a device that needs them is tried.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from importlib import metadata
from typing import Any, get_args

import numpy as np

from dualfocus.runtime import devices
from dualfocus.runtime.devices import Device, Kind
from dualfocus.runtime.errors import DeviceError, EngineError
from dualfocus.runtime.manifest import Target

# The devices that run each target's graphs, best first. A processor runs them all, float16 slowly.
RUNS: dict[Target, tuple[Kind, ...]] = {
    "onnxruntime": ("cpu",),
    "onnx-standard": ("cpu",),
    "cuda": ("cuda", "tensorrt-rtx", "cpu"),
    "tensorrt": ("tensorrt", "tensorrt-rtx", "cpu"),
}

# How far each device has been tested.
SEEN: dict[Kind, str] = {
    "cpu": "run on x86-64 (AVX2, AVX-512), and on 64-bit ARM as an emulator runs it",
    "cuda": "never run on a GPU: its graphs on a CPU, its calls on an emulated GPU",
    "tensorrt-rtx": "never run on a GPU: its parser and builder take the graphs",
    "tensorrt": "never run on a GPU: TensorRT-RTX builds the engines, the calls on an emulated GPU",
}


def choose(requested: Device | None, target: Target) -> Device:
    """The device for a bundle of `target`: `requested`, or the best one that works if that is None.

    Raises DeviceError if `requested` does not work here or cannot run such a bundle.
    """
    if requested is None:
        of_target = (Device(kind) for kind in RUNS[target])
        return next(device for device in of_target if problem(device) is None)
    if requested.kind not in RUNS[target]:
        others = [other for other, kinds in RUNS.items() if requested.kind in kinds]
        raise DeviceError(
            f"{requested} does not run a bundle of target {target}, expected one exported with --target "
            + " or ".join(others)
        )
    if (why := problem(requested)) is not None:
        raise DeviceError(f"{requested} does not work here: {why}")
    return requested


def problem(device: Device) -> str | None:
    """Why `device` does not work here, in a few words; None if it does."""
    if device.kind == "cpu":
        return None
    try:
        devices.find_gpu(device.index)
        device.use()
        # the first indexing makes CuPy compile a kernel, which needs CUDA's compiler and headers
        device.memory.zeros(2, np.int64)[[1]].get()
        if device.kind == "tensorrt":
            from dualfocus.runtime import tensorrt  # noqa: F401

            return None
        from dualfocus.runtime import onnx

        return onnx.problem(device)
    except (DeviceError, EngineError) as error:
        return str(error)
    except Exception as error:  # a broken CuPy raises anything
        return f"CuPy does not compute ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def survey() -> dict[str, Any]:
    """The devices of this machine, as JSON: what each kind lacks, the GPUs, and library versions."""
    names = ("onnxruntime", "onnxruntime-gpu", "cupy-cuda13x", "cupy-cuda12x", "tensorrt", "tensorrt-rtx")
    versions = {}
    for name in (*names, "onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    try:
        found = devices.gpus()
    except DeviceError:
        found = []
    else:
        import cupy

        numbers = {"CUDA driver": cupy.cuda.runtime.driverGetVersion()}
        numbers["CUDA runtime"] = cupy.cuda.runtime.runtimeGetVersion()
        versions |= {name: f"{number // 1000}.{number % 1000 // 10}" for name, number in numbers.items()}
    return {
        "devices": {kind: problem(Device(kind)) for kind in get_args(Kind)},
        "seen": SEEN,
        "gpus": [asdict(gpu) for gpu in found],
        "versions": versions,
    }
