"""The engines on ONNX Runtime; nothing else imports onnxruntime.

The decoder's graph is bound with the same memory as past and as present, so a call writes the new
tokens' keys and values straight into the cache and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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


Shapes = dict[str, list[int | None]]  # by name; None: any size


def _open(path: Path, threads: int | None, inputs: Shapes, outputs: Shapes) -> ort.InferenceSession:
    """A session on the graph at `path`, which has these `inputs` and no others, and these `outputs`."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path} cannot be opened by ONNX Runtime {ort.__version__}: {reason}") from None
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
    """`engines.VisionEncoder` on ONNX Runtime."""

    def __init__(self, path: Path, spec: ImageSpec, hidden: int, threads: int | None) -> None:
        inputs: Shapes = {"pixel_values": [None, 3, spec.size, spec.size]}
        self._session = _open(path, threads, inputs, {"image_features": [None, spec.tokens, hidden]})

    def encode(self, pixels: Floats) -> Floats:
        (features,) = self._session.run(["image_features"], {"pixel_values": pixels})
        encoded: Floats = features
        return encoded


class OnnxDecoder:
    """`engines.Decoder` on ONNX Runtime."""

    def __init__(self, path: Path, spec: DecoderSpec, threads: int | None) -> None:
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

    def extend(self, cache: KVCache, row: int, embeddings: Floats, logits_at: Sequence[int]) -> Floats:
        new = len(embeddings)
        length = cache.lengths[row] + new
        assert new, "nothing to append"
        assert length <= cache.capacity, f"{length} tokens in a row of {cache.capacity}"
        arrays: dict[str, npt.NDArray[Any]] = {
            "inputs_embeds": np.ascontiguousarray(embeddings[None], np.float32),  # (1, L, D)
            "seqlens_k": np.array([length - 1], np.int32),
            "total_sequence_length": np.array(length, np.int32),
            "logits_at": np.array([logits_at], np.int64),  # (1, K)
        }
        if self._spec.ragged_append:
            arrays["query_seqlens"] = np.array([new], np.int32)
        logits = np.empty((1, len(logits_at), self._spec.vocabulary), np.float32)

        binding = self._session.io_binding()
        for name, array in arrays.items():
            _bind(binding.bind_input, name, array)
        _bind(binding.bind_output, "logits", logits)
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            for kind, of_layer in (("key", keys), ("value", values)):
                _bind(binding.bind_input, f"past_key_values.{layer}.{kind}", of_layer[row : row + 1])
                _bind(binding.bind_output, f"present.{layer}.{kind}", of_layer[row : row + 1])
        self._session.run_with_iobinding(binding)
        cache.lengths[row] = length
        result: Floats = logits[0]
        return result


def _bind(bind: Any, name: str, array: npt.NDArray[Any]) -> None:
    """Bind host memory by its address: `array` has to live until the run is over."""
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
