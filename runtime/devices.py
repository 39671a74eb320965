"""A device that a model runs on: this machine's processor, or an NVIDIA GPU through one of three libraries.

``cpu`` and ``cuda`` are ONNX Runtime's own; ``tensorrt-rtx`` is NVIDIA's plug-in for it; ``tensorrt`` runs
prebuilt engines. On a GPU, arrays are CuPy's. `registry` finds out which devices work here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np

from dualfocus.runtime.errors import DeviceError

Kind = Literal["cpu", "cuda", "tensorrt-rtx", "tensorrt"]


@dataclass(frozen=True)
class Device:
    """One processor and the library that drives it."""

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
        """Make this thread allocate its arrays on the device. Before, they are on the first GPU."""
        if self.kind != "cpu":
            self.memory.cuda.Device(self.index).use()

    def stream(self, *, blocking: bool) -> Any:
        """A new stream; if `blocking`, it and the default stream wait for each other. The CPU has none."""
        if self.kind == "cpu":
            return None
        return self.memory.cuda.Stream(non_blocking=not blocking)


CPU = Device("cpu")


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    index: int
    name: str
    compute_capability: str  # "8.7"
    memory: int  # bytes


def parse(text: str) -> Device | None:
    """The device named `text`: a kind, and for a GPU optionally ``:n``. None for "auto".

    Raises DeviceError for anything else.
    """
    if text == "auto":
        return None
    kinds = "|".join(get_args(Kind))
    found = re.fullmatch(rf"({kinds})(?::(\d{{1,3}}))?", text) if isinstance(text, str) else None
    if found is None or (found[1] == "cpu" and found[2]):
        raise DeviceError(
            f"unknown device {text!r:.60}: expected auto, cpu, cuda[:N], tensorrt[:N] or tensorrt-rtx[:N]"
        )
    return Device(found[1], int(found[2] or 0))  # type: ignore[arg-type]


def find_gpu(index: int) -> Gpu:
    """The GPU number `index`; DeviceError where there is none."""
    found = gpus()
    if index >= len(found):
        raise DeviceError(f"there is no GPU {index}, {len(found)} found")
    return found[index]


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine. Raises DeviceError if CuPy or the driver is missing."""
    try:
        import cupy
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceError(f"CuPy is missing ({error}): pip install 'dualfocus[gpu]'") from None
    runtime = cupy.cuda.runtime
    try:
        found = []
        for index in range(runtime.getDeviceCount()):
            properties = runtime.getDeviceProperties(index)
            capability = f"{properties['major']}.{properties['minor']}"
            found.append(Gpu(index, properties["name"].decode(), capability, properties["totalGlobalMem"]))
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"no NVIDIA driver or GPU answers ({error})") from None
    return found
