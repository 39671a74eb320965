"""Reads what an ONNX graph says about itself, and refuses what no bundle's graph is.

A bundle's graph is straight-line: no loops or branches, no functions, operators of ONNX and ONNX Runtime
alone. Its weights are in files that the bundle lists. Its inputs and outputs are those of the manifest.
`check` finds out before ONNX Runtime opens the file, for opening alone computes whatever is constant.

The file is a protobuf message, of which only the fields needed are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.files import read_bytes
from dualfocus.runtime.manifest import ON_DEVICE, FileEntry, Manifest

VISION, DECODER = "vision.onnx", "decoder.onnx"
LIMIT = 64 << 20  # bytes of a graph without its weights; the largest exported has less than 1 MB
DOMAINS = ("", "ai.onnx", "com.microsoft", "com.microsoft.nchwc")  # the last is of packed graphs
TYPES = {1: "float32", 6: "int32", 7: "int64", 10: "float16"}
Size = int | None  # None: any


class Tensor(NamedTuple):
    """The type and shape of an input or output; a size that the graph leaves open is None."""

    type: str
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{self.type} ({', '.join('any' if size is None else str(size) for size in self.shape)})"


Tensors = dict[str, Tensor]


@dataclass
class Graph:
    """What was read of a graph."""

    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    weights: list[dict[str, str]] = field(default_factory=list)  # where those outside of the file are


def check(folder: Path, manifest: Manifest, files: Mapping[str, FileEntry]) -> None:
    """Raise BundleError unless both graphs in `folder` are those of `manifest`, with weights in `files`."""
    for name, (inputs, outputs) in ((VISION, vision(manifest)), (DECODER, decoder(manifest))):
        path = folder / name
        graph = read(path)
        _check_weights(path, graph, files)
        _check_tensors(path, "input", graph.inputs, inputs)
        _check_tensors(path, "output", graph.outputs, outputs)


def vision(manifest: Manifest) -> tuple[Tensors, Tensors]:
    """The inputs and outputs of the vision encoder's graph."""
    kind = "float16" if manifest.target in ON_DEVICE else "float32"
    image = manifest.image
    pixels = Tensor(kind, (None, 3, image.size, image.size))
    features = Tensor(kind, (None, image.tokens, manifest.decoder.hidden))
    return {"pixel_values": pixels}, {"image_features": features}


def decoder(manifest: Manifest) -> tuple[Tensors, Tensors]:
    """The inputs and outputs of the decoder's graph, as `DecoderSpec` describes them."""
    spec = manifest.decoder
    inputs, outputs = dict[str, Tensor](), dict[str, Tensor]()
    if manifest.target in ON_DEVICE:
        inputs["tokens"] = Tensor("int64", (None, None))
        inputs["images"] = Tensor("float16", (None, spec.hidden))
        for name, kind in (("best", "int64"), ("peak", "float32"), ("logsumexp", "float32")):
            outputs[name] = Tensor(kind, (None, None))
    else:
        inputs["inputs_embeds"] = Tensor("float32", (None, None, spec.hidden))
    inputs["seqlens_k"] = Tensor("int32", (None,))
    inputs["total_sequence_length"] = Tensor("int32", ())
    inputs["logits_at"] = Tensor("int64", (None, None))
    if spec.ragged_append:
        inputs["query_seqlens"] = Tensor("int32", (None,))
    outputs["logits"] = Tensor("float32", (None, None, spec.vocabulary))
    cache = Tensor(spec.dtype, (None, spec.kv_heads, None, spec.head_size))
    for layer in range(spec.layers):
        for part in ("key", "value"):
            inputs[f"past_key_values.{layer}.{part}"] = cache
            outputs[f"present.{layer}.{part}"] = cache
    return inputs, outputs


def _check_weights(path: Path, graph: Graph, files: Mapping[str, FileEntry]) -> None:
    for place in graph.weights:
        name = place.get("location", "")
        if name not in files:
            raise BundleError(f"{path} has weights in {name!r:.80}, expected a file that the bundle lists")
        start, length = (_number(place.get(key, "0")) for key in ("offset", "length"))
        if start + length > files[name].size:
            raise BundleError(
                f"{path} has weights up to byte {start + length} of {name}, which has {files[name].size}"
            )


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 1 << 63


def _check_tensors(path: Path, kind: str, found: Tensors, expected: Tensors) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise BundleError(f"{path} has no {kind} {name}, expected one of {tensor}")
        sizes = found[name].shape
        fits = len(sizes) == len(tensor.shape) and all(
            None in (size, of_manifest) or size == of_manifest
            for size, of_manifest in zip(sizes, tensor.shape, strict=True)
        )
        if found[name].type != tensor.type or not fits:
            raise BundleError(f"{path}: {kind} {name} is {found[name]}, expected {tensor}")
    for name in found:
        if name not in expected:
            raise BundleError(f"{path} has an {kind} {name!r:.80}, which the manifest does not describe")


# ---- the message


def read(path: Path) -> Graph:
    """The graph in the file at `path`. Raises BundleError for what is none, or not straight-line."""
    data = read_bytes(path, BundleError, limit=LIMIT)
    graph = Graph()
    try:
        for number, start, stop in _fields(data, 0, len(data)):
            if number == 7:
                _read_graph(data, start, stop, graph)
            elif number in (20, 25):  # training, functions
                raise _RefusedError("holds functions")
    except _RefusedError as error:
        raise BundleError(f"{path} {error}: a bundle's graph is straight-line") from None
    except (LookupError, ValueError):
        raise BundleError(f"{path} is not an ONNX graph") from None
    return graph


class _RefusedError(Exception):
    """A graph that is none of a bundle's."""


def _read_graph(data: bytes, start: int, stop: int, graph: Graph) -> None:
    for number, at, end in _fields(data, start, stop):
        if number == 1:
            _read_node(data, at, end, graph)
        elif number == 5:
            _read_weight(data, at, end, graph)
        elif number in (11, 12):
            name, tensor = _read_value(data, at, end)
            (graph.inputs if number == 11 else graph.outputs)[name] = tensor
        elif number == 15:
            raise _RefusedError("holds sparse weights")


def _read_node(data: bytes, start: int, stop: int, graph: Graph) -> None:
    for number, at, end in _fields(data, start, stop):
        if number == 7 and (domain := _text(data, at, end)) not in DOMAINS:
            raise _RefusedError(f"has an operator of the domain {domain!r:.80}")
        if number == 5:
            for part, first, last in _fields(data, at, end):
                if part in (6, 11) or (part == 20 and first in (5, 10)):
                    raise _RefusedError("holds a graph within a graph, as loops and branches do")
                if part in (5, 10):
                    _read_weight(data, first, last, graph)
                elif part in (22, 23):
                    raise _RefusedError("holds sparse weights")


def _read_weight(data: bytes, start: int, stop: int, graph: Graph) -> None:
    """Note where a tensor's data is, if that is another file."""
    place: dict[str, str] = {}
    outside = False
    for number, at, end in _fields(data, start, stop):
        if number == 14:
            outside |= at != 0
        elif number == 13:
            entry = {part: _text(data, first, last) for part, first, last in _fields(data, at, end)}
            key = entry.get(1, "")
            if key in place:
                raise ValueError(key)
            place[key] = entry.get(2, "")
    if outside or place:
        graph.weights.append(place)


def _read_value(data: bytes, start: int, stop: int) -> tuple[str, Tensor]:
    """The name, type and shape of an input or output."""
    fields = _once(data, start, stop)
    of_type = _once(data, *fields[2])
    tensor = _once(data, *of_type[1])  # what is not a tensor, such as a sequence, has no such field
    kind = tensor[1][0]
    shape: list[Size] = []
    for number, at, end in _fields(data, *tensor[2]):
        if number == 1:
            size = _once(data, at, end).get(1)
            shape.append(None if size is None else size[0])
    return _text(data, *fields[1]), Tensor(TYPES.get(kind, f"type {kind}"), tuple(shape))


def _once(data: bytes, start: int, stop: int) -> dict[int, tuple[int, int]]:
    """The fields of a message, each of which is there once."""
    found: dict[int, tuple[int, int]] = {}
    for number, at, end in _fields(data, start, stop):
        if number in found:
            raise ValueError(number)
        found[number] = at, end
    return found


def _text(data: bytes, start: int, stop: int) -> str:
    return data[start:stop].decode()


def _fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The number of each field in data[at:stop], and where its content begins and ends.

    Of a number, in place of where it begins, its value. Raises IndexError or ValueError where there is no
    message.
    """
    while at < stop:
        tag, at = data[at], at + 1
        if tag > 127:
            tag, at = _varint(data, at - 1)
        wire = tag & 7
        if wire == 2:
            size, at = data[at], at + 1
            if size > 127:
                size, at = _varint(data, at - 1)
            yield tag >> 3, at, at + size
            at += size
        elif wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value, 0
        elif wire == 5:
            at += 4
        elif wire == 1:
            at += 8
        else:
            raise ValueError(wire)
    if at != stop:
        raise ValueError(at)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        part, at = data[at], at + 1
        value |= (part & 127) << shift
        if part < 128:
            return value, at
    raise ValueError(at)
