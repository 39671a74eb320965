"""TensorRT's Python API, as far as it is called here, without TensorRT.

It parses what `operators` lists. A plan is text that tells what was asked for; its engine computes with ONNX
Runtime on the CPU, on what is at the addresses that it is told, if all are there and fit the profile.
test_tensorrt.py compares the signatures with the real ones, wherever those are installed.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dualfocus.export.operators import unsupported

__version__ = "10.15.1"

OURS = ("dualfocus.runtime.tensorrt", "dualfocus.export.tensorrt")
Modules = tuple[Any, Any]


def imported(monkeypatch: pytest.MonkeyPatch, tensorrt: ModuleType | None) -> Iterator[Modules]:
    """Our modules, anew, over `tensorrt`; over TensorRT-RTX if that is None."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    _forget()
    yield tuple(map(importlib.import_module, OURS))
    _forget()


def _forget() -> None:
    for name in OURS:
        package, _, module = name.rpartition(".")
        sys.modules.pop(name, None)
        vars(importlib.import_module(package)).pop(module, None)


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None: ...

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class ITensor:
    name: str
    shape: tuple[int, ...]
    is_shape_tensor: bool

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        of_type = value.type.tensor_type
        self.shape = tuple(-1 if d.dim_param else d.dim_value for d in of_type.shape.dim)
        # the real one follows the graph: what reaches an operator's shape
        self.is_shape_tensor = value.name == "total_sequence_length"


class INetworkDefinition:
    def __init__(self) -> None:
        self.inputs: list[ITensor] = []
        self._graph = ""

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> ITensor:
        return self.inputs[index]


class ParserError:
    def __init__(self, desc: str) -> None:
        self._desc = desc

    def desc(self) -> str:
        return self._desc

    def node_name(self) -> str:
        return "present.0.key"

    def node_operator(self) -> str:
        return "TensorScatter"


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger, self._errors = network, logger, list[ParserError]()

    def parse_from_file(self, model: str) -> bool:
        self._network._graph = model
        try:
            parsed = onnx.load(model, load_external_data=False)
        except Exception:  # protobuf's
            self._logger.log(ILogger.Severity.ERROR, "ModelImporter.cpp: Failed to parse ONNX model")
            return False
        if refused := unsupported(parsed, "tensorrt"):
            self._errors.append(ParserError(f"{refused[0]}.\nmore"))
            return False
        beside = {e.value for t in parsed.graph.initializer for e in t.external_data if e.key == "location"}
        assert all((Path(model).parent / name).is_file() for name in beside)
        self._network.inputs += map(ITensor, parsed.graph.input)
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[Any]] = {}
        self.values: dict[str, list[Any]] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self.shapes[input] = [min, opt, max]

    def set_shape_input(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self.values[input] = [min, opt, max]


class ITimingCache:
    def __init__(self, held: bytes) -> None:
        self.held = held

    def serialize(self) -> bytes:
        return self.held


class IProgressMonitor:
    def __init__(self) -> None: ...

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class IBuilderConfig:
    progress_monitor: IProgressMonitor

    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self.limits: dict[MemoryPoolType, int] = {}
        self._cache: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.limits[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        torn = serialized_timing_cache == b"torn"
        return None if torn else ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.held == b"another GPU's" and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        for tensor in network.inputs:
            for profile in config.profiles:
                if tensor.is_shape_tensor:
                    (low,), (usual,), (high,) = profile.values[tensor.name]
                    assert low <= usual <= high
                elif -1 in tensor.shape:
                    for size, *sizes in zip(tensor.shape, *profile.shapes[tensor.name], strict=True):
                        assert sizes == sorted(sizes)
                        assert size in (-1, sizes[0])
        if config.limits.get(MemoryPoolType.WORKSPACE) == 0:
            self._logger.log(ILogger.Severity.WARNING, "slow")
            self._logger.log(ILogger.Severity.ERROR, "Could not find any implementation for a node.\nmore")
            return None
        cache = config.get_timing_cache()
        assert cache is not None
        cache.held += b"timed "
        config.progress_monitor.phase_start("Building engine", None, 2)
        for step in range(2):
            assert config.progress_monitor.step_complete("Building engine", step)
        config.progress_monitor.phase_finish("Building engine")
        profiles = [profile.shapes | profile.values for profile in config.profiles]
        told = {"graph": network._graph, "profiles": profiles}
        return json.dumps(told).encode()


class ExecutionContextAllocationStrategy(enum.IntEnum):
    ON_PROFILE_CHANGE = 1


class IExecutionContext:
    def __init__(self, told: dict[str, Any], logger: ILogger) -> None:
        self._session = ort.InferenceSession(told["graph"], providers=["CPUExecutionProvider"])
        self._told, self._logger = told, logger
        self._profile: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle
        self._profile = self._told["profiles"][profile_index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._profile[name]
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            self._logger.log(ILogger.Severity.ERROR, f"{name}: {shape} is not in {least} to {most}\nmore")
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle
        binding, sizes = self._session.io_binding(), dict[str, int]()
        for node in self._session.get_inputs():
            shape = self._shapes[node.name] if node.shape else ()
            sizes |= {d: size for d, size in zip(node.shape, shape, strict=True) if isinstance(d, str)}
            bind(binding.bind_input, node, shape, self._addresses[node.name])
            if not shape:
                (least,), _, (most,) = self._profile[node.name]
                value = ctypes.c_int32.from_address(self._addresses[node.name]).value
                assert least <= value <= most
                assert value % 64 == 0 or value == most, "as many shapes as there are lengths"
        for node in self._session.get_outputs():
            if node.name.startswith("present"):
                past = node.name.replace("present", "past_key_values")
                assert self._addresses[node.name] == self._addresses[past]
            shape = tuple(sizes.get(d, d) for d in node.shape)
            bind(binding.bind_output, node, shape, self._addresses[node.name])
        self._session.run_with_iobinding(binding)
        return True


def bind(binder: Any, node: Any, shape: tuple[int, ...], address: int) -> None:
    names = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
    binder(node.name, "cpu", 0, names.get(node.type, np.int64), shape, address)


class ICudaEngine:
    def __init__(self, told: dict[str, Any], logger: ILogger) -> None:
        self._told, self._logger = told, logger

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext:
        return IExecutionContext(self._told, self._logger)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            return ICudaEngine(json.loads(bytes(serialized_engine)), self._logger)
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "Serialization assertion failed.")
            return None
