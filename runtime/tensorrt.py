"""The vision encoder and the decoder as TensorRT engines. TensorRT-RTX has the same API and works too.

No other module of the runtime imports either library. `export.tensorrt` builds the engines into the bundle's
folder ``engines``. They fit one bundle, one version of the library and one model of GPU. With any other they
are refused: TensorRT itself would refuse some and run others slowly.

No engine has run on a GPU yet. TensorRT-RTX's builder accepts the graphs. The calls made here are tested with
a fake library that checks names, shapes, profiles and addresses, and computes on a CPU.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dualfocus.runtime import contents, devices
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.calls import Call, DeviceGraphDecoder
from dualfocus.runtime.devices import Device
from dualfocus.runtime.engines import Array, DeviceLogits, TokenIds, address
from dualfocus.runtime.errors import BundleError, DeviceError, EngineError
from dualfocus.runtime.manifest import Count, DecoderSpec, Files, ImageSpec

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
REBUILD = "build them on this machine with `dualfocus pack {} --device tensorrt`"
# Cache lengths are rounded up to this many tokens: TensorRT infers all shapes anew for each new length.
TOKENS = 64


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

    rows: Count  # of the cache in one call
    length: Count  # tokens appended to a row in one call
    wanted: Count  # positions of a row whose logits are given
    pictures: Count  # in one call of the tower


@dataclass(frozen=True)
class Note:
    """``engines.json``: what the engines in its folder are."""

    bundle: str  # SHA-256 of manifest.json
    library: str
    version: str
    gpu: Gpu
    reach: Reach
    files: Files


class Log(trt.ILogger):  # type: ignore[misc]  # Any to mypy
    """Keeps the library's errors, which it reports nowhere else."""

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
    log: Log
    vision: Any
    decoder: Any
    reach: Reach


def find_gpu(index: int = 0) -> Gpu:
    """What engines for GPU `index` are built for. Raises DeviceError if there is no such GPU."""
    found = devices.find_gpu(index)
    return Gpu(found.name, found.compute_capability)


def load(path: Path, digest: str, index: int = 0) -> Engines:
    """Open the engines of the bundle at `path`, whose digest is `digest`, on GPU `index`, the current one.

    Plans are memory-mapped. Raises BundleError if there are no engines, if they are damaged, or if they were
    built for another bundle, version or GPU; DeviceError if there is no GPU.
    """
    note, gpu = _note(path), find_gpu(index)
    folder = path / FOLDER
    for what, found, expected in (
        ("bundle", note.bundle, digest),
        ("library", f"{note.library} {note.version}", f"{LIBRARY} {VERSION}"),
        ("GPU", str(note.gpu), str(gpu if note.gpu.name != "any" else Gpu("any", gpu.capability))),
    ):
        if found != expected:
            raise BundleError(
                f"{folder} was built for the {what} {found}, this is {expected}: {_rebuild(path)}"
            )
    log = Log()
    runtime = trt.Runtime(log)
    vision, decoder = (_open(runtime, log, folder / name) for name in (VISION, DECODER))
    return Engines(runtime, log, vision, decoder, note.reach)


def _rebuild(path: Path) -> str:
    return REBUILD.format(path)


def _note(path: Path) -> Note:
    if not os.path.lexists(path / FOLDER / NOTE):
        raise BundleError(f"{path} has no engines: {_rebuild(path)}")
    try:
        folder, note = contents.read_note(path, FOLDER, NOTE, Note)
        for name in (VISION, DECODER):
            if name not in note.files:
                raise BundleError(f"{folder / NOTE} lists no {name}")
        contents.check(folder, note.files)
        contents.verify(folder, note.files, contents.HASHED_BYTES)
    except BundleError as error:
        raise BundleError(f"{error}: {_rebuild(path)}") from None
    return note


def _open(runtime: Any, log: Log, file: Path) -> Any:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BundleError(f"{file} cannot be opened by {LIBRARY} {VERSION}: {log.reason}")
    return engine


class _Memory(NamedTuple):
    """Where a tensor is."""

    address: int
    shape: tuple[int, ...] | None = None  # None: an output's, which follows from the inputs'


def _memory(array: Array, *, is_output: bool = False) -> _Memory:
    """Of an array on the device, or on the host."""
    return _Memory(address(array), None if is_output else array.shape)


class _Context:
    """Runs an engine on a stream with one of its optimisation profiles."""

    def __init__(self, engine: Any, log: Log, profile: int, stream: Any) -> None:
        """Workspace is allocated for the profile's largest call."""
        self._log, self._stream = log, stream
        self._told: dict[str, _Memory] = {}
        self._lock = threading.Lock()  # a context makes one call at a time
        self._context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        )
        self._check(self._context is not None, "create a context")
        self._check(
            self._context.set_optimization_profile_async(profile, stream.ptr), f"take profile {profile}"
        )

    def run(self, bound: Mapping[str, _Memory]) -> None:
        """Queue a call over all inputs and outputs, by name. A scalar is on the host and is read now."""
        with self._lock:
            for name, memory in bound.items():
                if self._told.get(name) == memory and memory.shape != ():
                    continue
                self._check(self._context.set_tensor_address(name, memory.address), f"take {name}")
                if memory.shape:
                    of_shape = f"take {name} of shape {memory.shape}"
                    self._check(self._context.set_input_shape(name, memory.shape), of_shape)
                self._told[name] = memory
            self._check(self._context.execute_async_v3(self._stream.ptr), "run")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise DeviceError(f"{LIBRARY} {VERSION} does not {what}: {self._log.reason}")


class TensorRtVisionEncoder:
    """`engines.VisionEncoder` on TensorRT: image tokens stay on the device."""

    def __init__(self, engines: Engines, spec: ImageSpec, hidden: int, device: Device, stream: Any) -> None:
        """Work is queued on `stream`, CuPy's, concurrent with the default one."""
        self._context = _Context(engines.vision, engines.log, 0, stream)
        self._most, self._device, self._stream = engines.reach.pictures, device, stream
        self._shape = spec.tokens, hidden

    def encode(self, pixels: Array) -> Array:
        """As `engines.VisionEncoder.encode`, in as many calls as the engine's limit requires."""
        memory = self._device.memory
        with self._stream:
            seen = memory.asarray(pixels, np.float16)
            features = memory.empty((len(seen), *self._shape), np.float16)
            for start in range(0, len(seen), self._most):
                now = slice(start, start + self._most)
                self._context.run(
                    {
                        "pixel_values": _memory(seen[now]),
                        "image_features": _memory(features[now], is_output=True),
                    }
                )
            self._stream.synchronize()
        return features


class TensorRtDecoder(DeviceGraphDecoder):
    """`engines.DeviceDecoder` on TensorRT: appends run with one profile of the engine, steps with another."""

    def __init__(self, engines: Engines, spec: DecoderSpec, device: Device, stream: Any) -> None:
        """Work is queued on `stream`, CuPy's, which the default one waits for."""
        super().__init__(spec, device, engines.reach.rows)
        self._reach = engines.reach
        self._contexts = [
            _Context(engines.decoder, engines.log, profile, stream) for profile in (CONTEXT, GENERATION)
        ]

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[TokenIds],
        logits_at: Sequence[Sequence[int]],
    ) -> list[list[DeviceLogits]]:
        """As `engines.DecoderOf.extend`; an append beyond the engine's limits is made in pieces."""
        assert cache.capacity == self._spec.context, "an engine's cache is as long as the model's context"
        found: list[list[DeviceLogits]] = [[] for _ in rows]
        done = [0] * len(rows)
        while left := [i for i, chunk in enumerate(embeddings) if done[i] < len(chunk)]:
            pieces, wanted = [], []
            for i in left:
                start, stop = done[i], min(done[i] + self._reach.length, len(embeddings[i]))
                assert list(logits_at[i]) == sorted(logits_at[i])
                at = [position for position in logits_at[i] if start <= position < stop]
                if len(at) > self._reach.wanted:
                    stop = at[self._reach.wanted]
                pieces.append(TokenIds(embeddings[i].ids[start:stop], embeddings[i].images))
                wanted.append([position - start for position in at if position < stop])
                done[i] = stop
            for i, logits in zip(
                left, super().extend(cache, [rows[i] for i in left], pieces, wanted), strict=True
            ):
                found[i] += logits
        return found

    def _total(self, call: Call, fullest: int, capacity: int) -> int:
        return min(-(-fullest // TOKENS) * TOKENS, capacity)

    def _new_binding(self) -> dict[str, _Memory]:
        return {}

    def _bind(self, binding: dict[str, _Memory], name: str, array: Array, *, is_output: bool = False) -> None:
        binding[name] = _memory(array, is_output=is_output)

    def _execute(self, call: Call) -> None:
        self._contexts[GENERATION if call.is_step else CONTEXT].run(call.binding)
