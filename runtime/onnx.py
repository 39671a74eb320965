"""The engines on ONNX Runtime; nothing else imports onnxruntime.

The decoder's graph is bound with the same memory as past and as present, so a call writes the new
tokens' keys and values straight into the cache and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from dualfocus import kernels
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.errors import BundleError, EngineError
from dualfocus.runtime.manifest import DecoderSpec, ImageSpec

try:
    import onnxruntime as ort
except ImportError:
    raise EngineError(
        "no ONNX Runtime is installed: pip install 'dualfocus[cpu]', or 'dualfocus[gpu]' for NVIDIA"
    ) from None


VERSION: str = ort.__version__
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
    _session(source, options)


def _options(threads: Threads) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads.number is not None:
        options.intra_op_num_threads = threads.number
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads.spin)))
    # between calls nothing is to be waited for: one graph's threads would spin on into the other's work
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without VNNI, pairs of 8-bit products are added in 16 bits, and overflow, unless this is set; with VNNI
    # it would halve the speed. The crop kernel's AVX-512 path needs VNNI too, so it is there or is not.
    if "avx512" not in kernels.available():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path} cannot be opened by ONNX Runtime {VERSION}: {reason}") from None


def _open(path: Path, threads: Threads, inputs: Shapes, outputs: Shapes) -> ort.InferenceSession:
    """A session on the graph at `path`, which has these `inputs` and no others, and these `outputs`."""
    session = _session(path, _options(threads))
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
        self, path: Path, spec: ImageSpec, hidden: int, threads: Threads, *, one_by_one: bool = False
    ) -> None:
        inputs: Shapes = {"pixel_values": [None, 3, spec.size, spec.size]}
        self._session = _open(path, threads, inputs, {"image_features": [None, spec.tokens, hidden]})
        self._one_by_one = one_by_one

    def encode(self, pixels: Floats) -> Floats:
        calls = np.split(pixels, len(pixels)) if self._one_by_one else [pixels]
        encoded = [self._session.run(["image_features"], {"pixel_values": call})[0] for call in calls]
        features: Floats = np.concatenate(encoded) if len(calls) > 1 else encoded[0]
        return features


@dataclass(frozen=True)
class _Call:
    """A call of the decoder's graph: its `inputs` by name are bound, and the cache."""

    binding: Any
    inputs: dict[str, npt.NDArray[Any]]


class OnnxDecoder:
    """`engines.Decoder` on ONNX Runtime."""

    def __init__(self, path: Path, spec: DecoderSpec, threads: Threads) -> None:
        past: list[int | None] = [None, spec.kv_heads, None, spec.head_size]
        inputs: Shapes = {
            "inputs_embeds": [None, None, spec.hidden],
            "seqlens_k": [None],
            "total_sequence_length": [],
            "logits_at": [None, None],
        }
        if spec.ragged_append:
            inputs["query_seqlens"] = [None]
        for layer in range(spec.layers):
            inputs[f"past_key_values.{layer}.key"] = past
            inputs[f"past_key_values.{layer}.value"] = past
        self._spec = spec
        self._session = _open(path, threads, inputs, {"logits": [None, None, spec.vocabulary]})
        self._calls: WeakKeyDictionary[KVCache, dict[tuple[int, int, bool], _Call]] = WeakKeyDictionary()

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        assert len(set(rows)) == len(rows), f"a row twice in one call: {rows}"
        longest = max(map(len, embeddings))
        calls: list[list[int]] = []  # of indices into `rows`
        for i in sorted(range(len(rows)), key=rows.__getitem__):
            if calls and self._joins(cache, rows[calls[-1][-1]], rows[i], longest):
                calls[-1].append(i)
            else:
                calls.append([i])
        results: dict[int, Floats] = {}
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
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        """One call of the graph, over all rows from the first to the last.

        Those not asked for are idle: given no tokens, they pass as empty, and nothing is written to them.
        """
        first, stop = min(rows), max(rows) + 1
        batch, longest, wanted = stop - first, max(map(len, embeddings)), max(map(len, logits_at))
        call = self._call(cache, first, stop, longest, wanted)
        if len(rows) < batch:  # in 8 bits, all rows share the range of their activations: nothing stale in it
            call.inputs["inputs_embeds"][:] = 0
        # lists, not arrays: while the graph ran, its weights drove NumPy's code out of the processor's caches
        new, lengths = [0] * batch, [0] * batch
        for row, chunk, positions in zip(rows, embeddings, logits_at, strict=True):
            assert len(chunk), "nothing to append"
            call.inputs["inputs_embeds"][row - first, : len(chunk)] = chunk
            if longest > 1:  # a step's are all 0, as they were made
                call.inputs["logits_at"][row - first, : len(positions)] = positions
            new[row - first] = len(chunk)
            lengths[row - first] = cache.lengths[row] + len(chunk)
        longest_row = max(lengths)
        assert longest_row <= cache.capacity, f"{longest_row} tokens in a row of {cache.capacity}"
        call.inputs["seqlens_k"][:] = [max(length - 1, 0) for length in lengths]
        call.inputs["total_sequence_length"][...] = longest_row
        if self._spec.ragged_append:
            call.inputs["query_seqlens"][:] = new
        logits = np.empty((batch, wanted, self._spec.vocabulary), np.float32)
        _bind(call.binding.bind_output, "logits", logits)

        self._session.run_with_iobinding(call.binding)
        for row, chunk in zip(rows, embeddings, strict=True):
            cache.lengths[row] += len(chunk)
        if batch == 1:
            return [logits[0]]
        # copies, so that a row's logits do not keep those of the whole call
        return [logits[row - first, : len(of)].copy() for row, of in zip(rows, logits_at, strict=True)]

    def _call(self, cache: KVCache, first: int, stop: int, longest: int, wanted: int) -> _Call:
        """Memory for a call's inputs, bound beside rows of `cache`.

        The rows are bound as past and as present once for all calls: their memory stays in place. So are
        the inputs of a step, one token a row, which come again and again.
        """
        is_step = longest == wanted == 1
        kept = self._calls.setdefault(cache, {})
        if (call := kept.get((first, stop, is_step))) is None:
            binding = self._session.io_binding()
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                for kind, of_layer in (("key", keys), ("value", values)):
                    _bind(binding.bind_input, f"past_key_values.{layer}.{kind}", of_layer[first:stop])
                    _bind(binding.bind_output, f"present.{layer}.{kind}", of_layer[first:stop])
        elif is_step:
            return call
        else:
            binding = call.binding
        batch = stop - first
        inputs: dict[str, npt.NDArray[Any]] = {
            "inputs_embeds": np.zeros((batch, longest, self._spec.hidden), np.float32),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logits_at": np.zeros((batch, wanted), np.int64),
        }
        if self._spec.ragged_append:
            inputs["query_seqlens"] = np.zeros(batch, np.int32)
        for name, array in inputs.items():
            _bind(binding.bind_input, name, array)
        # of other calls the binding alone is kept: their memory is not to outlive them
        kept[first, stop, is_step] = _Call(binding, inputs if is_step else {})
        return _Call(binding, inputs)


def _bind(bind: Any, name: str, array: npt.NDArray[Any]) -> None:
    """Bind host memory by its address: `array` has to live until the run is over."""
    bind(name, "cpu", 0, array.dtype, array.shape, array.__array_interface__["data"][0])
