"""The engines on ONNX Runtime; nothing else imports onnxruntime.

The decoder's graph is bound with the same memory as past and as present, so a call writes the new
tokens' keys and values straight into the cache and copies nothing. A GPU is another place for the same
arrays (`devices`): what a graph is told is written on the host and copied, and of what it says the likeliest
tokens and the logarithms of their probabilities' sums come back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from dualfocus import kernels
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.devices import CPU, Device
from dualfocus.runtime.engines import Array, DeviceLogits, Floats, to_host
from dualfocus.runtime.errors import BundleError, DeviceError, EngineError
from dualfocus.runtime.manifest import DecoderSpec, ImageSpec

try:
    import onnxruntime as ort
except ImportError:
    raise EngineError(
        "no ONNX Runtime is installed: pip install 'dualfocus[cpu]', or 'dualfocus[gpu]' for NVIDIA"
    ) from None


VERSION: str = ort.__version__
# A recorded step outlives its cache, so that only one that stays is worth it: as many steps, no reply has.
RECORDED_AFTER = 256
IDLE_TOKENS = 8  # a call may compute so many idle positions; for more, another call costs less

Shapes = dict[str, list[int | None]]  # by name; None: any size


@dataclass(frozen=True)
class Threads:
    """How the engines use the processor."""

    number: int | None = None  # None: one for each core
    spin: bool = True  # between two parts of a call, threads wait awake: right unless others want the cores


def save_packed(source: Path, target: Path) -> None:
    """Write the graph at `source`, its weights as the kernels read them beside it, to `target`."""
    options = _options(Threads())
    options.optimized_model_filepath = str(target)
    for entry, value in {
        "session.optimized_model_external_initializers_file_name": f"{target.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(entry, value)
    _session(source, options, Place())


def _options(threads: Threads, *, half: bool = False) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads.number is not None:
        options.intra_op_num_threads = threads.number
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads.spin)))
    # between calls nothing is to be waited for: one graph's threads would spin on into the other's work
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without VNNI, pairs of 8-bit products are added in 16 bits, and overflow, unless this is set; with VNNI
    # it would halve the speed. The crop kernel's AVX-512 path needs VNNI too, so it is there or is not.
    # Graphs of float16 have no such products, but weights that this would spoil.
    if "avx512" not in kernels.available() and not half:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def problem(device: Device) -> str | None:
    """What ONNX Runtime lacks to run graphs on `device`, whose GPU is there; None if nothing."""
    if device.kind == "tensorrt-rtx":
        return _rtx_problem()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return f"ONNX Runtime {VERSION} as installed has no CUDA: pip install 'dualfocus[gpu]' without [cpu]"
    return _library_problem(Path(ort.__file__).parent / "capi", "libonnxruntime_providers_cuda.so")


def _library_problem(folder: Path, name: str) -> str | None:
    """Why the provider's library `name` cannot be loaded: ONNX Runtime itself would go on without it."""
    with contextlib.redirect_stdout(io.StringIO()):  # where it tells of what is missing, as we do
        ort.preload_dlls()  # CUDA's and cuDNN's, where pip installed them
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / name))
    except OSError as error:
        return str(error)
    return None


def _rtx_problem() -> str | None:
    try:
        _rtx_devices()
    except DeviceError as error:
        return str(error)
    return None


@functools.cache
def _rtx_devices() -> list[Any]:
    """The GPUs that the TensorRT-RTX plug-in takes, in the driver's order."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as rtx
    except ImportError as error:
        raise DeviceError(f"{error}: pip install 'dualfocus[tensorrt-rtx]'") from None
    name = rtx.get_ep_name()
    try:
        ort.register_execution_provider_library(name, rtx.get_library_path())
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        raise DeviceError(str(error).splitlines()[0]) from None
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        raise DeviceError(f"{name} takes none of the GPUs here")
    return found


@dataclass(frozen=True)
class Place:
    """Where sessions run: a device, and how."""

    device: Device = CPU
    threads: Threads = Threads()
    stream: Any = None  # CuPy's, which everything is queued on
    half: bool = False  # the graphs compute in float16
    replay: bool = False  # steps that come again and again are recorded and replayed, as CUDA graphs


def _session(path: Path, options: ort.SessionOptions, place: Place) -> ort.InferenceSession:
    device = place.device
    chosen: dict[str, str] = {}
    if device.kind == "cuda":  # memory as much as is needed, and no search for the tower's one convolution
        chosen = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
    if device.kind != "cpu":
        chosen |= {"device_id": str(device.index), "user_compute_stream": str(place.stream.ptr)}
        chosen["enable_cuda_graph"] = str(int(place.replay))
    try:
        if device.kind == "tensorrt-rtx":
            options.add_provider_for_devices([_rtx_devices()[device.index]], chosen)
            return ort.InferenceSession(path, options)
        providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
        session = ort.InferenceSession(path, options, providers=[(providers[device.kind], chosen)])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path} cannot be opened by ONNX Runtime {VERSION}: {reason}") from None
    if (first := session.get_providers()[0]) != providers[device.kind]:
        raise DeviceError(f"{device} does not work here: ONNX Runtime {VERSION} fell back to {first}")
    return session


def _open(path: Path, place: Place, inputs: Shapes, outputs: Shapes) -> ort.InferenceSession:
    """A session on the graph at `path`, which has these `inputs` and no others, and these `outputs`."""
    session = _session(path, _options(place.threads, half=place.half), place)
    for kind, nodes, expected in (
        ("input", session.get_inputs(), inputs),
        ("output", session.get_outputs(), outputs),
    ):
        found = {node.name: node.shape for node in nodes}
        for name, shape in expected.items():
            if name not in found:
                raise BundleError(f"{path} has no {kind} {name}, which the manifest promises")
            sizes = [size if isinstance(size, int) else None for size in found[name]]
            matches = (size in (None, wanted) for size, wanted in zip(sizes, shape, strict=False))
            if len(sizes) != len(shape) or not all(matches):
                raise BundleError(f"{path}: {kind} {name} has shape {found[name]}, the manifest says {shape}")
    for node in session.get_inputs():
        if node.name not in inputs:
            raise BundleError(f"{path} has an input {node.name}, of which the manifest says nothing")
    return session


class OnnxVisionEncoder:
    """`engines.VisionEncoder` on ONNX Runtime.

    With `one_by_one` pictures go through the graph alone: in 8 bits, those of one call share the range of
    their activations, so that one would change the other's tokens.
    """

    def __init__(
        self, path: Path, spec: ImageSpec, hidden: int, place: Place, *, one_by_one: bool = False
    ) -> None:
        inputs: Shapes = {"pixel_values": [None, 3, spec.size, spec.size]}
        self._session = _open(path, place, inputs, {"image_features": [None, spec.tokens, hidden]})
        self._one_by_one = one_by_one

    def encode(self, pixels: Floats) -> Floats:
        calls = np.split(pixels, len(pixels)) if self._one_by_one else [pixels]
        encoded = [self._session.run(["image_features"], {"pixel_values": call})[0] for call in calls]
        features: Floats = np.concatenate(encoded) if len(calls) > 1 else encoded[0]
        return features


class DeviceVisionEncoder:
    """`engines.VisionEncoder` on ONNX Runtime, in float16, on a device where the image tokens stay."""

    def __init__(self, path: Path, spec: ImageSpec, hidden: int, place: Place) -> None:
        inputs: Shapes = {"pixel_values": [None, 3, spec.size, spec.size]}
        self._session = _open(path, place, inputs, {"image_features": [None, spec.tokens, hidden]})
        self._place = place
        self._shape = spec.tokens, hidden

    def encode(self, pixels: Array) -> Array:
        memory, stream = self._place.device.memory, self._place.stream
        binding = self._session.io_binding()
        with stream or contextlib.nullcontext():
            seen = memory.asarray(pixels, np.float16)
            features = memory.empty((len(pixels), *self._shape), np.float16)
            _bind(binding.bind_input, "pixel_values", seen, self._place.device)
            _bind(binding.bind_output, "image_features", features, self._place.device)
            self._session.run_with_iobinding(binding)  # waits for the device
        return features


@dataclass(eq=False)
class _Call:
    """A call of the decoder's graph: its `inputs` by name, on the host, and the cache are bound.

    On a device, the graph reads copies of them; a step's copies and outputs stay in place.
    """

    binding: Any
    inputs: dict[str, npt.NDArray[Any]]
    copies: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)
    times: int = 0  # how often it was made
    recording: int = 0  # the number of what is replayed in its place; 0: nothing yet


class OnnxDecoder:
    """`engines.Decoder` on ONNX Runtime."""

    def __init__(self, path: Path, spec: DecoderSpec, place: Place) -> None:
        past: list[int | None] = [None, spec.kv_heads, spec.context, spec.head_size]  # or of any capacity
        inputs: Shapes = {
            **self._tokens_in(spec),
            "seqlens_k": [None],
            "total_sequence_length": [],
            "logits_at": [None, None],
        }
        if spec.ragged_append:
            inputs["query_seqlens"] = [None]
        for layer in range(spec.layers):
            inputs[f"past_key_values.{layer}.key"] = past
            inputs[f"past_key_values.{layer}.value"] = past
        self._spec, self._place = spec, place
        self._session = _open(path, place, inputs, {"logits": [None, None, spec.vocabulary]})
        self._calls: WeakKeyDictionary[KVCache, dict[tuple[int, int, bool], _Call]] = WeakKeyDictionary()

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Any],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Any]:
        assert len(set(rows)) == len(rows), f"a row twice in one call: {rows}"
        longest = max(map(len, embeddings))
        calls: list[list[int]] = []  # of indices into `rows`
        for i in sorted(range(len(rows)), key=rows.__getitem__):
            if calls and self._joins(cache, rows[calls[-1][-1]], rows[i], longest):
                calls[-1].append(i)
            else:
                calls.append([i])
        results: dict[int, Any] = {}
        for call in calls:
            new, wanted = [embeddings[i] for i in call], [logits_at[i] for i in call]
            results |= zip(call, self._run(cache, [rows[i] for i in call], new, wanted), strict=True)
        return [results[i] for i in range(len(rows))]

    def _joins(self, cache: KVCache, last: int, row: int, longest: int) -> bool:
        """Whether `row` goes into the call whose last row is `last`, where all are padded to `longest`."""
        idle = row - last - 1
        if not self._spec.ragged_append:
            return longest == 1 and not idle
        room = cache.capacity - longest  # ONNX Runtime wants it for the padding too, of idle rows as well
        return idle * longest <= IDLE_TOKENS and max(cache.lengths[last : row + 1]) <= room

    def _run(
        self, cache: KVCache, rows: Sequence[int], new: Sequence[Any], logits_at: Sequence[Sequence[int]]
    ) -> list[Any]:
        """One call of the graph, over all rows from the first to the last.

        Those not asked for are idle: given no tokens, they pass as empty, and nothing is written to them.
        """
        first, stop = min(rows), max(rows) + 1
        batch, longest, wanted = stop - first, max(map(len, new)), max(map(len, logits_at))
        call = self._call(cache, first, stop, longest, wanted)
        at = [row - first for row in rows]
        self._write_tokens(call, at, new)
        # lists, not arrays: while the graph ran, its weights drove NumPy's code out of the processor's caches
        counts, lengths = [0] * batch, [0] * batch
        for i, row, chunk, positions in zip(at, rows, new, logits_at, strict=True):
            assert len(chunk), "nothing to append"
            if longest > 1:  # a step's are as they were made
                call.inputs["logits_at"][i, : len(positions)] += np.array(positions, np.int64)
            counts[i] = len(chunk)
            lengths[i] = cache.lengths[row] + len(chunk)
        longest_row = max(lengths)
        assert longest_row <= cache.capacity, f"{longest_row} tokens in a row of {cache.capacity}"
        call.inputs["seqlens_k"][:] = [max(length - 1, 0) for length in lengths]
        call.inputs["total_sequence_length"][...] = longest_row
        if self._spec.ragged_append:
            call.inputs["query_seqlens"][:] = counts

        results = self._compute(call, cache, at, [len(positions) for positions in logits_at])
        for row, chunk in zip(rows, new, strict=True):
            cache.lengths[row] += len(chunk)
        return results

    def _call(self, cache: KVCache, first: int, stop: int, longest: int, wanted: int) -> _Call:
        """Memory for a call's inputs, bound beside rows of `cache`.

        The rows are bound as past and as present once for all calls: their memory stays in place. So are
        the inputs of a step, one token a row, which come again and again.
        """
        is_step = longest == wanted == 1
        device = self._place.device
        kept = self._calls.setdefault(cache, {})
        if (call := kept.get((first, stop, is_step))) is None:
            binding = self._session.io_binding()
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                for kind, of_layer in (("key", keys), ("value", values)):
                    _bind(binding.bind_input, f"past_key_values.{layer}.{kind}", of_layer[first:stop], device)
                    _bind(binding.bind_output, f"present.{layer}.{kind}", of_layer[first:stop], device)
        elif is_step:
            return call
        else:
            binding = call.binding
        batch = stop - first
        inputs: dict[str, npt.NDArray[Any]] = {
            **self._new_tokens(batch, longest),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logits_at": self._first_positions(batch, longest, wanted),
        }
        if self._spec.ragged_append:
            inputs["query_seqlens"] = np.zeros(batch, np.int32)
        call = _Call(binding, inputs)
        self._bind_inputs(call)
        # of other calls the binding alone is kept: their memory is not to outlive them
        kept[first, stop, is_step] = call if is_step else _Call(binding, {})
        return call

    # The rest is done in another way on a device.

    def _tokens_in(self, spec: DecoderSpec) -> Shapes:
        return {"inputs_embeds": [None, None, spec.hidden]}

    def _new_tokens(self, batch: int, longest: int) -> dict[str, npt.NDArray[Any]]:
        return {"inputs_embeds": np.zeros((batch, longest, self._spec.hidden), np.float32)}

    def _first_positions(self, batch: int, longest: int, wanted: int) -> npt.NDArray[np.int64]:
        """(B, K), as `DecoderSpec` counts positions: a row's first one, so that those wanted can be added."""
        return np.zeros((batch, wanted), np.int64)

    def _bind_inputs(self, call: _Call) -> None:
        for name, array in call.inputs.items():
            _bind(call.binding.bind_input, name, array, CPU)

    def _write_tokens(self, call: _Call, rows: Sequence[int], new: Sequence[Any]) -> None:
        told = call.inputs["inputs_embeds"]
        if len(rows) < len(told):  # in 8 bits, all rows share the range of their activations: nothing stale
            told[:] = 0
        for row, chunk in zip(rows, new, strict=True):
            told[row, : len(chunk)] = chunk

    def _compute(self, call: _Call, cache: KVCache, rows: Sequence[int], wanted: Sequence[int]) -> list[Any]:
        """Run the graph, and give out each row's logits, as many as are wanted."""
        logits = np.empty((*call.inputs["logits_at"].shape, self._spec.vocabulary), np.float32)
        _bind(call.binding.bind_output, "logits", logits, CPU)
        self._session.run_with_iobinding(call.binding)
        if len(logits) == 1:
            return [logits[0]]
        # copies, so that a row's logits do not keep those of the whole call
        return [logits[row, :count].copy() for row, count in zip(rows, wanted, strict=True)]


class DeviceDecoder(OnnxDecoder):
    """`engines.Decoder` on ONNX Runtime, over a graph that looks up embeddings and chooses on its device."""

    def __init__(self, path: Path, spec: DecoderSpec, place: Place) -> None:
        super().__init__(path, spec, place)
        self._memory = place.device.memory
        self._no_images = self._memory.zeros((1, spec.hidden), np.float16)
        self._recordings = 0

    def _tokens_in(self, spec: DecoderSpec) -> Shapes:
        return {"tokens": [None, None], "images": [None, spec.hidden]}

    def _new_tokens(self, batch: int, longest: int) -> dict[str, npt.NDArray[Any]]:
        return {"tokens": np.zeros((batch, longest), np.int64)}

    def _first_positions(self, batch: int, longest: int, wanted: int) -> npt.NDArray[np.int64]:
        return np.repeat(longest * np.arange(batch)[:, None], wanted, axis=1)

    def _bind_inputs(self, call: _Call) -> None:
        for name, array in call.inputs.items():
            if name == "total_sequence_length":  # is read on the host
                _bind(call.binding.bind_input, name, array, CPU)
            else:
                call.copies[name] = self._memory.empty(array.shape, array.dtype)
                _bind(call.binding.bind_input, name, call.copies[name], self._place.device)
        batch, wanted = call.inputs["logits_at"].shape
        call.outputs |= {
            "logits": self._memory.empty((batch, wanted, self._spec.vocabulary), np.float32),
            "best": self._memory.empty((batch, wanted), np.int64),
            "peak": self._memory.empty((batch, wanted), np.float32),
            "logsumexp": self._memory.empty((batch, wanted), np.float32),
        }
        for name, array in call.outputs.items():
            _bind(call.binding.bind_output, name, array, self._place.device)

    def _write_tokens(self, call: _Call, rows: Sequence[int], new: Sequence[Any]) -> None:
        images: list[Array] = []
        shown = 0
        for row, chunk in zip(rows, new, strict=True):
            ids = np.where(chunk.ids < self._spec.vocabulary, chunk.ids, chunk.ids + shown)
            call.inputs["tokens"][row, : len(chunk)] = ids
            images += chunk.images
            shown += sum(map(len, chunk.images))
        if len(images) > 1:
            images = [self._memory.concatenate(images)]
        call.copies["images"] = images[0] if images else self._no_images
        _bind(call.binding.bind_input, "images", call.copies["images"], self._place.device)

    def _compute(self, call: _Call, cache: KVCache, rows: Sequence[int], wanted: Sequence[int]) -> list[Any]:
        is_step = call.inputs["tokens"].shape[1] == 1
        if is_step:  # a recorded step reads how much of the cache is valid on the device, and no other bound
            call.inputs["total_sequence_length"][...] = cache.capacity
        for name, array in call.inputs.items():
            if name in call.copies:
                _copy_to(call.copies[name], array)
        self._session.run_with_iobinding(call.binding, self._how(call, is_step))
        best, peak, logsumexp = (to_host(call.outputs[of]) for of in ("best", "peak", "logsumexp"))
        logits = call.outputs["logits"].copy() if is_step else call.outputs["logits"]
        return [
            [
                DeviceLogits(logits[at], int(best[at]), float(peak[at]), float(logsumexp[at]))
                for at in ((row, i) for i in range(count))
            ]
            for row, count in zip(rows, wanted, strict=True)
        ]

    def _how(self, call: _Call, is_step: bool) -> ort.RunOptions | None:
        """Whether a call is recorded and replayed as a CUDA graph: a step that comes again and again."""
        if not self._place.replay:
            return None
        call.times += 1
        if is_step and not call.recording and call.times > RECORDED_AFTER:
            self._recordings += 1
            call.recording = self._recordings
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(call.recording or -1))
        return options


def _copy_to(target: Array, array: npt.NDArray[Any]) -> None:
    """Copy what is on the host to where the graph reads it."""
    if hasattr(target, "set"):
        target.set(array)
    else:
        target[...] = array


def _bind(bind: Any, name: str, array: Array, device: Device) -> None:
    """Bind memory by its address: `array` has to live until the run is over."""
    if device.kind == "cpu":
        bind(name, "cpu", 0, array.dtype, array.shape, array.__array_interface__["data"][0])
    else:
        bind(name, "cuda", device.index, array.dtype, array.shape, array.data.ptr)
