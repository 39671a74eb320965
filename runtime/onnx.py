"""The vision encoder and the decoder on ONNX Runtime. No other module of the runtime imports onnxruntime."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from dualfocus import kernels
from dualfocus.runtime.calls import Append, Call, DeviceGraphDecoder, GraphDecoder, Input, Output
from dualfocus.runtime.devices import CPU, Device
from dualfocus.runtime.engines import Array, DeviceLogits, Floats, TokenIds, address
from dualfocus.runtime.errors import BundleError, DeviceError, EngineError
from dualfocus.runtime.manifest import DecoderSpec, ImageSpec

try:
    import onnxruntime as ort
except ImportError:
    raise EngineError(
        "no ONNX Runtime is installed: pip install 'dualfocus[cpu]', or 'dualfocus[gpu]' for NVIDIA"
    ) from None


VERSION: str = ort.__version__
# ONNX Runtime never frees a captured CUDA graph, so capture only rows that live longer than a reply.
CAPTURE_AFTER = 256  # steps over the same rows
NO_CAPTURE = -1  # the graph id of a run that is neither captured nor replayed
SILENT = 4  # a logger's severity: what goes wrong is raised, and nothing is to be printed besides
ort.set_default_logger_severity(SILENT)


@dataclass(frozen=True)
class Threads:
    """How the engines use the processor."""

    number: int | None = None  # None: one for each core
    spin: bool = True  # threads busy-wait within a call: faster, unless others need the cores


def save_packed(source: Path, target: Path, device: Device, *, half: bool) -> None:
    """Write the graph at `source`, which computes in float16 if `half`, to `target` as `device` reads it.

    The file next to it holds repacked weights for a CPU, and an engine for TensorRT-RTX.
    """
    data = f"{target.name}.data"
    if device.kind == "cpu":
        options = _options(Threads(), half=half)
        options.optimized_model_filepath = str(target)
        entries = {
            "session.optimized_model_external_initializers_file_name": data,
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "session.save_external_prepacked_constant_initializers": "1",
        }
    else:
        options = _options(Threads(), half=True)
        entries = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(target),
            "ep.context_embed_mode": "0",  # inside the graph, an engine may have 2 GB at most
            "ep.context_model_external_initializers_file_name": data,
        }
    for entry, value in entries.items():
        options.add_session_config_entry(entry, value)
    _session(source, options, Place(device))


def _options(threads: Threads, *, half: bool = False) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    if threads.number is not None:
        options.intra_op_num_threads = threads.number
    # threads that outnumber the cores would spin instead of those that work
    spin = threads.spin and (threads.number or 1) <= len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    # after a call, the graph's threads would keep spinning while the other graph works
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without VNNI, pairs of 8-bit products are added in 16 bits, and overflow, unless this is set; with VNNI
    # it would halve the speed. The crop kernel's AVX-512 path needs VNNI too, so it is there or is not.
    # Graphs of float16 have no such products, but weights that this would spoil.
    if half:  # in 8 bits, the kernels for one row and for several round activations differently
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if "avx512" not in kernels.available() and not half:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def problem(device: Device) -> str | None:
    """Why ONNX Runtime cannot run graphs on `device`, whose GPU exists; None if it can.

    Raises DeviceError with the reason if the TensorRT-RTX plug-in is missing or does not load.
    """
    if device.kind == "tensorrt-rtx":
        found = len(_rtx_devices())
        if device.index < found:
            return None
        return f"it takes {found} of the GPUs here, not number {device.index}"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"ONNX Runtime {VERSION} as installed has no CUDA: pip install 'dualfocus[gpu]' without [cpu]"
    return _library_problem(Path(ort.__file__).parent / "capi", "libonnxruntime_providers_cuda.so")


def _library_problem(folder: Path, name: str) -> str | None:
    """Why the provider's library `name` does not load. ONNX Runtime itself would continue without it."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what is missing
        ort.preload_dlls()  # CUDA's and cuDNN's, where pip installed them
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / name))
    except OSError as error:
        return str(error)
    return None


@functools.cache
def _rtx_devices() -> list[Any]:
    """The GPUs that the TensorRT-RTX plug-in supports, in the driver's order."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as rtx
    except ImportError as error:
        raise DeviceError(f"{error}: pip install 'dualfocus[tensorrt-rtx]'") from None
    name = rtx.get_ep_name()
    try:
        ort.register_execution_provider_library(name, rtx.get_library_path())
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise DeviceError(_reason(error)) from None
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        raise DeviceError(f"{name} takes none of the GPUs here")
    return found


def rtx_version() -> str:
    """The version of the TensorRT-RTX plug-in, which has to be installed."""
    import onnxruntime_ep_nv_tensorrt_rtx as rtx

    version: str = rtx.__version__
    return version


@dataclass(frozen=True)
class Place:
    """Where and how sessions run."""

    device: Device = CPU
    threads: Threads = Threads()
    stream: Any = None  # CuPy's; all work is queued on it
    half: bool = False  # the graphs compute in float16
    captures_steps: bool = False  # steps that recur become CUDA graphs
    # Held while a step is captured: CUDA then lets no other thread allocate. Threads that work on the device
    # while the decoder runs hold it too.
    alone: Lock = field(default_factory=Lock)
    cache: Path | None = None  # a folder where TensorRT-RTX keeps what it compiles at the first start


def _session(path: Path, options: ort.SessionOptions, place: Place) -> ort.InferenceSession:
    device = place.device
    chosen: dict[str, str] = {}
    if device.kind == "cuda":  # memory only as requested, and no search for the tower's one convolution
        chosen = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
    if device.kind != "cpu":
        chosen |= {"device_id": str(device.index), "enable_cuda_graph": str(int(place.captures_steps))}
        if place.stream is not None:
            chosen |= {"user_compute_stream": str(place.stream.ptr)}
    if device.kind == "tensorrt-rtx":
        chosen["has_user_compute_stream"] = str(int(place.stream is not None))
        if place.cache is not None:
            chosen["nv_runtime_cache_path"] = str(place.cache)
    try:
        if device.kind == "tensorrt-rtx":
            options.add_provider_for_devices([_rtx_devices()[device.index]], chosen)
            return ort.InferenceSession(path, options)
        providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
        of_device = [(providers[device.kind], chosen)]
        # with a fallback it would print that it falls back
        session = ort.InferenceSession(path, options, providers=of_device, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise _failure(f"{path} cannot be opened by ONNX Runtime {VERSION}", error) from None
    if (first := session.get_providers()[0]) != providers[device.kind]:
        raise DeviceError(f"{device} does not work here: ONNX Runtime {VERSION} fell back to {first}")
    return session


def _failure(what: str, error: Exception) -> BundleError | MemoryError:
    """What to raise for an exception of ONNX Runtime, which tells a lack of memory in its message alone."""
    text = str(error)
    if any(sign in text for sign in ("bad allocation", "bad_alloc", "allocate memory")):
        return MemoryError(f"{what}: not enough memory")
    return BundleError(f"{what}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The first line of its message, in brief."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


class OnnxVisionEncoder:
    """`engines.VisionEncoder` on ONNX Runtime.

    With `one_by_one`, each picture has a call of its own: in int8, pictures in one call share an activation
    scale, so that one would change the tokens of another.
    """

    def __init__(
        self, path: Path, spec: ImageSpec, hidden: int, place: Place, *, one_by_one: bool = False
    ) -> None:
        self._path, self._shape, self._one_by_one = path, (spec.tokens, hidden), one_by_one
        self._session = _open_vision(path, place, self._shape)

    def encode(self, pixels: Floats) -> Floats:
        calls = np.split(pixels, len(pixels)) if self._one_by_one else [pixels]
        encoded = [self._run(call) for call in calls]
        return np.concatenate(encoded) if len(calls) > 1 else encoded[0]

    def _run(self, pixels: Floats) -> Floats:
        try:
            features: Floats = self._session.run(["image_features"], {"pixel_values": pixels})[0]
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise _failure(f"{self._path} cannot be run", error) from None
        if features.shape != (expected := (len(pixels), *self._shape)):
            raise BundleError(f"{self._path} makes features of shape {features.shape}, expected {expected}")
        return features


class OnnxDeviceVisionEncoder:
    """`engines.VisionEncoder` on ONNX Runtime, in float16; image tokens stay on the device."""

    def __init__(self, path: Path, spec: ImageSpec, hidden: int, place: Place) -> None:
        self._path, self._place = path, place
        self._shape = spec.tokens, hidden
        self._session = _open_vision(path, place, self._shape)

    def encode(self, pixels: Array) -> Array:
        memory, stream = self._place.device.memory, self._place.stream
        binding = self._session.io_binding()
        with stream or contextlib.nullcontext():
            seen = memory.asarray(pixels, np.float16)
            features = memory.empty((len(pixels), *self._shape), np.float16)
            _bind(binding.bind_input, "pixel_values", seen, self._place.device)
            _bind(binding.bind_output, "image_features", features, self._place.device)
            _run(self._session, binding, self._path, self._place)
        return features


class _OnSession(GraphDecoder[Input, Output]):
    """A decoder that binds memory to a session on its graph."""

    _session: ort.InferenceSession
    _path: Path
    _place: Place

    def _new_binding(self) -> Any:
        return self._session.io_binding()

    def _bind(self, binding: Any, name: str, array: Array, *, is_output: bool = False) -> None:
        _bind(binding.bind_output if is_output else binding.bind_input, name, array, self._place.device)


class OnnxDecoder(_OnSession[Floats, Floats]):
    """`engines.HostDecoder` on ONNX Runtime."""

    def __init__(self, path: Path, spec: DecoderSpec, place: Place) -> None:
        super().__init__(spec)
        self._session = _open(path, place)
        self._path, self._place = path, place

    def _new_tokens(self, batch: int, longest: int) -> dict[str, npt.NDArray[Any]]:
        return {"inputs_embeds": np.zeros((batch, longest, self._spec.hidden), np.float32)}

    def _bind_inputs(self, call: Call) -> None:
        for name, array in call.inputs.items():
            self._bind(call.binding, name, array)

    def _write_tokens(self, call: Call, append: Append[Floats]) -> None:
        for place, chunk in zip(append.places, append.chunks, strict=True):
            call.inputs["inputs_embeds"][place, : len(chunk)] = chunk

    def _compute(self, call: Call, append: Append[Floats]) -> list[Floats]:
        logits = np.empty((*call.inputs["logits_at"].shape, self._spec.vocabulary), np.float32)
        self._bind(call.binding, "logits", logits, is_output=True)
        _run(self._session, call.binding, self._path, self._place)
        if len(logits) == 1:
            return [logits[0]]
        # copies, so that a row's logits do not keep those of the whole call
        return [
            logits[place, : len(requested)].copy()
            for place, requested in zip(append.places, append.logits_at, strict=True)
        ]


class OnnxDeviceDecoder(_OnSession[TokenIds, list[DeviceLogits]], DeviceGraphDecoder):
    """`engines.DeviceDecoder` on ONNX Runtime."""

    def __init__(self, path: Path, spec: DecoderSpec, place: Place) -> None:
        super().__init__(spec, place.device)
        self._session = _open(path, place)
        self._path, self._place, self._captured = path, place, 0

    def _total(self, call: Call, fullest: int, capacity: int) -> int:
        # a captured step keeps this value; it reads on the device how much of the cache is valid
        return capacity if call.is_step and self._place.captures_steps else fullest

    def _execute(self, call: Call) -> None:
        """Run the graph; capture a step as a CUDA graph once it recurs, and replay it from then on."""
        if not self._place.captures_steps:
            _run(self._session, call.binding, self._path, self._place)
            return
        call.times += 1
        if call.is_step and call.times == CAPTURE_AFTER:
            graph = self._captured + 1
            with self._place.alone:
                self._run_as(graph, call)
            self._captured = call.captured = graph
        else:
            self._run_as(call.captured, call)

    def _run_as(self, graph: int | None, call: Call) -> None:
        """Capture the call as CUDA graph `graph`, or replay it if it is captured; None: only run it."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(NO_CAPTURE if graph is None else graph))
        _run(self._session, call.binding, self._path, self._place, options)


def _open_vision(path: Path, place: Place, features: tuple[int, int]) -> ort.InferenceSession:
    """A session on a vision encoder's graph. Where the file leaves `features` open, they are inferred."""
    session = _open(path, place)
    found = session.get_outputs()[0].shape[1:]
    if len(found) != 2 or any(found[i] != features[i] for i in (0, 1) if isinstance(found[i], int)):
        sizes, expected = (" x ".join(map(str, of)) or "no size" for of in (found, features))
        raise BundleError(f"{path} makes features of {sizes}, expected {expected}")
    return session


def _open(path: Path, place: Place) -> ort.InferenceSession:
    """A session on the graph at `path`, which `graph.check` has found to be the manifest's."""
    return _session(path, _options(place.threads, half=place.half), place)


def _run(
    session: ort.InferenceSession,
    binding: Any,
    path: Path,
    place: Place,
    options: ort.RunOptions | None = None,
) -> None:
    """Run the graph at `path` on what is bound, and wait for the device."""
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        if place.device.kind != "cpu":
            raise DeviceError(f"{place.device} failed: {_reason(error)}") from None
        raise _failure(f"{path} cannot be run", error) from None


def _bind(bind: Any, name: str, array: Array, device: Device) -> None:
    """Bind memory by its address: `array` has to live until the run is over."""
    place = ("cpu", 0) if type(array) is np.ndarray else ("cuda", device.index)
    bind(name, *place, array.dtype, array.shape, address(array))
