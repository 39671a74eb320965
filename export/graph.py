"""ONNX graphs whose weights go to a file beside them as they are made, and are never in memory together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from dualfocus import __version__

OPSET = 23  # the first with RMSNormalization
STANDARD_OPSET = 24  # the first with TensorScatter, which a cache needs where operators are the standard's
IR_VERSION = 10
MICROSOFT = "com.microsoft"
INLINE_BYTES = 1024  # up to here a tensor lies in the graph: shapes have to, and norms of small models may
PAGE = 4096  # where a tensor begins in the file, so that it can be mapped alone

Array = npt.NDArray[Any]


class DataFile:
    """The file beside the graphs of one folder, written from front to back."""

    def __init__(self, path: Path, end: int = 0) -> None:
        """Go on behind the first `end` bytes of what is there; the rest is cut off."""
        self.path = path
        self._file = path.open("r+b" if end else "wb")
        self._file.truncate(end)
        self._file.seek(end)

    def store(self, name: str, array: Array, kind: int | None = None) -> TensorProto:
        """Write an array; the tensor returned says where it is. `kind` is a type that NumPy has not."""
        self._file.write(bytes(-self._file.tell() % PAGE))
        kind = helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
        tensor = _external(name, kind, array.shape, self.path, self._file.tell(), array.nbytes)
        self._write(array)
        return tensor

    def _write(self, array: Array) -> None:
        array.tofile(self._file)

    def flush(self) -> None:
        """Have everything on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more is to come."""
        self._file.close()


def _external(
    name: str, kind: int, shape: Sequence[int], path: Path, offset: int, nbytes: int
) -> TensorProto:
    """A tensor of ONNX's type `kind` whose bytes are in the file at `path`."""
    tensor = TensorProto(name=name, dims=shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": path.name, "offset": offset, "length": nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class Graph:
    """A graph in the making; values are known by their names."""

    def __init__(self, data: DataFile, opset: int = OPSET, *, half: bool = False) -> None:
        """`half`: it computes in float16, and so all its constants are kept."""
        self.half = half
        self.float = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self._data, self._opset = data, opset
        self._proto = onnx.GraphProto(name="dualfocus")
        self._weights: dict[str, TensorProto] = {}

    def input(self, name: str, kind: int, shape: Sequence[str | int]) -> str:
        """Declare an input, once."""
        if all(value.name != name for value in self._proto.input):
            self._proto.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[str | int]) -> None:
        """Declare an output, which some node makes."""
        self._proto.output.append(helper.make_tensor_value_info(name, kind, shape))

    def declare(self, value: onnx.ValueInfoProto, *, output: bool = False) -> None:
        """An input or an output as another graph declares it."""
        (self._proto.output if output else self._proto.input).append(value)

    @property
    def is_standard(self) -> bool:
        """Whether operators of the ONNX standard alone may be used."""
        return self._opset == STANDARD_OPSET

    def weight(self, name: str, array: Array) -> str:
        """A constant: of a name already taken, the one that is there."""
        if name not in self._weights:
            if self.half and array.dtype == np.float32:
                array = array.astype(np.float16)
            if array.nbytes > INLINE_BYTES:
                self._weights[name] = self._data.store(name, np.ascontiguousarray(array))
            else:
                self._weights[name] = onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def half_bytes(self, name: str, packed: Array, shape: Sequence[int], kind: int) -> str:
        """A constant of `shape` in 4-bit integers of ONNX's type `kind`, two in a byte, the lower first."""
        self._weights[name] = self._data.store(name, packed, kind)
        self._weights[name].dims[:] = shape
        return name

    def mapped(self, name: str, path: Path) -> str:
        """A constant that is the array in the .npy file at `path`, beside the data file."""
        array = np.load(path, mmap_mode="r")
        self._weights[name] = _external(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, path, array.offset, array.nbytes
        )
        return name

    def keep(self, tensors: Iterable[TensorProto]) -> None:
        """Constants that are in the data file already."""
        self._weights |= {tensor.name: tensor for tensor in tensors}

    def add(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node, if there is none yet that gives this output; returns its first output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        if all(names[0] not in node.output for node in self._proto.node):
            node = helper.make_node(kind, inputs, names, name=names[0], domain=domain, **attributes)
            self._proto.node.append(node)
        return names[0]

    def copy(self, node: onnx.NodeProto) -> None:
        """Add a node of another graph, whose values have the same names here."""
        self._proto.node.append(node)

    def model(self) -> onnx.ModelProto:
        """The graph as a model."""
        self._proto.initializer.extend(self._weights.values())
        return _model(self._proto, self._opset)


def _model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    if any(node.domain == MICROSOFT for node in graph.node):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    return helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=IR_VERSION,
        producer_name="dualfocus",
        producer_version=__version__,
    )


def joined(parts: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """One model of several, each of which goes on with what the one before it gave out.

    What several have by one name is the same, and is there once.
    """
    made = {value.name for part in parts for value in part.graph.output}
    taken = {value.name for part in parts for value in part.graph.input}
    graph = onnx.GraphProto(name="dualfocus")
    seen: set[str] = set()
    for part in parts:
        new_nodes = [node for node in part.graph.node if node.output[0] not in seen]
        seen |= {node.output[0] for node in new_nodes}
        graph.node.extend(new_nodes)
        graph.output.extend(value for value in part.graph.output if value.name not in taken)
        for group, values in ((graph.input, part.graph.input), (graph.initializer, part.graph.initializer)):
            new = [value for value in values if value.name not in seen | made]
            seen |= {value.name for value in new}
            group.extend(new)
    return _model(graph, parts[0].opset_import[0].version)


def end_of_data(parts: Sequence[onnx.ModelProto]) -> int:
    """Where in their data file the weights of `parts` end."""
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for part in parts
        for tensor in part.graph.initializer
        if tensor.external_data
    ]
    return max((int(place["offset"]) + int(place["length"]) for place in places), default=0)
