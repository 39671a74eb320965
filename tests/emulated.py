"""A GPU that is not there: CuPy's arrays in the host's memory, and ONNX Runtime's CUDA provider on the CPU.

An array is as strict as CuPy's: NumPy cannot look into it, and nothing of the host's can be put into it, but
by `set` and `get`, whose bytes are counted. What is left to a real GPU is CUDA itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from dualfocus.runtime import devices, onnx, registry

if TYPE_CHECKING:  # `cuda_provider` runs where there is no pytest
    import pytest

copied = {"to host": 0, "to device": 0}  # bytes
recorded: list[str] = []  # the numbers of the CUDA graphs of all calls, in order


class Array:
    """CuPy's, as far as this program uses it."""

    def __init__(self, memory: np.ndarray) -> None:
        assert type(memory) is np.ndarray
        self._memory = memory
        self.shape, self.dtype, self.nbytes = memory.shape, memory.dtype, memory.nbytes
        self.data = SimpleNamespace(ptr=memory.__array_interface__["data"][0])

    def get(self) -> np.ndarray:
        copied["to host"] += self.nbytes
        return self._memory.copy()

    def set(self, host: np.ndarray) -> None:
        assert type(host) is np.ndarray
        assert host.shape == self.shape
        assert host.dtype == self.dtype
        copied["to device"] += host.nbytes
        self._memory[...] = host

    def copy(self) -> Array:
        return Array(self._memory.copy())

    def __len__(self) -> int:
        return len(self._memory)

    def __iter__(self) -> Iterator[Array]:
        return (Array(part) for part in self._memory)

    def __getitem__(self, key: Any) -> Array:
        return Array(np.asarray(self._memory[key]))

    def __setitem__(self, key: Any, value: Array) -> None:
        assert isinstance(value, Array)
        self._memory[key] = value._memory

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")


class CUDARuntimeError(RuntimeError):
    pass


def asarray(array: np.ndarray | Array, dtype: np.dtype) -> Array:
    if isinstance(array, Array):
        assert array.dtype == dtype
        return array
    on_device = Array(np.empty(array.shape, dtype))
    on_device.set(array.astype(dtype))
    return on_device


def cupy(gpus: int = 1) -> Any:
    """The module."""
    properties = {"name": b"Emulated", "major": 9, "minor": 0, "totalGlobalMem": 4_000_000_000}
    runtime = SimpleNamespace(
        getDeviceCount=lambda: gpus,
        getDeviceProperties=lambda _: properties,
        memGetInfo=lambda: (3_000_000_000, 4_000_000_000),
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13000,
        CUDARuntimeError=CUDARuntimeError,
    )
    return SimpleNamespace(
        __version__="0",
        asarray=asarray,
        empty=lambda shape, dtype: Array(np.full(shape, 99, dtype)),
        zeros=lambda shape, dtype: Array(np.zeros(shape, dtype)),
        concatenate=lambda arrays: Array(np.concatenate([array._memory for array in arrays])),
        cuda=SimpleNamespace(Device=_Device, Stream=_Stream, runtime=runtime),
    )


class _Device(nullcontext):  # type: ignore[type-arg]
    def use(self) -> None: ...


class _Stream(nullcontext):  # type: ignore[type-arg]
    def __init__(self, *, non_blocking: bool) -> None:
        super().__init__()
        self.ptr = 7 if non_blocking else 8

    def synchronize(self) -> None: ...


class _Session:
    """A session on the CPU that takes the addresses of a GPU's memory."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def io_binding(self) -> Any:
        binding = self._session.io_binding()

        def bound(bind: Any) -> Any:
            return lambda name, device, *rest: bind(name, {"cuda": "cpu"}.get(device, device), *rest)

        return SimpleNamespace(
            real=binding, bind_input=bound(binding.bind_input), bind_output=bound(binding.bind_output)
        )

    def run_with_iobinding(self, binding: Any, options: ort.RunOptions | None = None) -> None:
        if options is not None:
            recorded.append(options.get_run_config_entry("gpu_graph_id"))
        self._session.run_with_iobinding(binding.real)


def install(monkeypatch: pytest.MonkeyPatch, gpus: int = 1) -> None:
    """Have this process see `gpus` emulated GPUs that ONNX Runtime can use."""
    real = onnx._session
    monkeypatch.setitem(__import__("sys").modules, "cupy", cupy(gpus))
    monkeypatch.setattr(onnx, "problem", lambda device: None)
    monkeypatch.setattr(
        onnx,
        "_session",
        lambda path, options, place: (
            real(path, options, place)
            if place.device == devices.CPU
            else _Session(real(path, options, onnx.Place(threads=place.threads)))
        ),
    )
    assert registry.problem(devices.Device("cuda")) is None
    copied.update(dict.fromkeys(copied, 0))
    recorded.clear()
