"""What the consumers of a graph on a GPU take: which of our graphs one of them can run is known without one.

Only operators that our graphs use are listed. What a table does not name is refused: better an export that
stops with one sentence than an engine that fails on another machine, or a layer that is copied to the host
and computed there in every call. A type is that of an operator's main input.

Where the entries are from:

- cuda: the kernels that ONNX Runtime 1.31.1's CUDA provider registers, as `get_all_opkernel_def` of the
  wheel onnxruntime-gpu 1.31.1 lists them, and where its partitioner puts the nodes of our graphs.
- tensorrt: docs/operators.md of onnx/onnx-tensorrt for TensorRT 10.15, the first with RotaryEmbedding,
  RMSNormalization and TensorScatter. Its Attention would take float32 too, but needs a fused kernel, and
  TensorRT-RTX's builder finds none.
- tensorrt-rtx: what the parser and the builder of tensorrt-rtx 1.7.1 take, which run without a GPU:
  tests/test_operators.py holds this table to them where they are installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import TensorProto

from dualfocus.export.errors import ExportError
from dualfocus.export.graph import MICROSOFT
from dualfocus.runtime.manifest import Target

Consumer = Literal["cuda", "tensorrt", "tensorrt-rtx"]
Types = dict[str, str]  # of values, by their names: "float16"

FLOATS = "float float16"
NUMBERS = f"{FLOATS} int32 int64"
ALL = f"{NUMBERS} bool"
HALF = "float16"

CUDA = {
    "Add Div Min Mod Mul Pow Sub Less LessOrEqual": NUMBERS,
    "And": "bool",
    "ArgMax Attention Conv Erf LayerNormalization MatMul RMSNormalization ReduceLogSumExp ReduceMax": FLOATS,
    "Relu RotaryEmbedding Sigmoid SimplifiedLayerNormalization Softmax Sqrt Tanh": FLOATS,
    "Cast Concat ConstantOfShape Expand Gather Reshape Shape Slice Split Squeeze": ALL,
    "TensorScatter Transpose Unsqueeze": ALL,
    "Constant": ALL,  # folded before nodes are placed
    "DequantizeLinear": "int4 int8 uint4 uint8",
    "Equal": ALL,
    "GatherND": f"{FLOATS} bool int64",
    "Range": "float int32 int64",
    "Where": NUMBERS,
    f"{MICROSOFT}.GroupQueryAttention": HALF,
    f"{MICROSOFT}.MatMulNBits": FLOATS,
    f"{MICROSOFT}.SkipSimplifiedLayerNormalization": FLOATS,
}
TENSORRT = {
    "Add ArgMax Div Equal Less LessOrEqual Min Mod Mul Pow Range ReduceLogSumExp ReduceMax Sub": NUMBERS,
    "And": "bool",
    "Attention": HALF,
    "Cast Concat Constant ConstantOfShape Expand Gather GatherND Reshape Shape Slice Squeeze": ALL,
    "Transpose Unsqueeze": ALL,
    "Conv Erf LayerNormalization MatMul RMSNormalization Relu RotaryEmbedding Sigmoid Softmax": FLOATS,
    "Sqrt Tanh": FLOATS,
    "DequantizeLinear": "int4 int8",
    "Split Where": ALL,
    "TensorScatter": f"{FLOATS} int32",
}
TENSORRT_RTX = TENSORRT | {
    "SimplifiedLayerNormalization": FLOATS,
    f"{MICROSOFT}.SkipSimplifiedLayerNormalization": HALF,
}


def _by_operator(table: Mapping[str, str]) -> dict[str, frozenset[str]]:
    return {name: frozenset(types.split()) for names, types in table.items() for name in names.split()}


Rule = Callable[[onnx.NodeProto, onnx.GraphProto], str | None]  # what is wrong with a node, if anything is


def _cache_in_place(node: onnx.NodeProto, graph: onnx.GraphProto) -> str | None:
    """TensorRT 10.15's IKVCacheUpdateLayer writes into an input of the network, which is an output too."""
    inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    if node.input[0] not in inputs or node.output[0] not in {value.name for value in graph.output}:
        return "whose cache is not an input, and as updated an output, of the graph itself"
    if any(dimension.dim_param for dimension in inputs[node.input[0]][1:]):
        return "whose cache is of no fixed capacity"
    return None


def _symmetric(node: onnx.NodeProto, _: onnx.GraphProto) -> str | None:
    """A zero point "must be zero" (operators.md), so none is to be there."""
    return "with a zero point" if len(node.input) > 2 and node.input[2] else None


def _known_inputs(node: onnx.NodeProto, _: onnx.GraphProto) -> str | None:
    """ONNX Runtime 1.31's schema ends before ``query_seqlens``."""
    return "with query_seqlens, which only later versions know" if len(node.input) > 16 else None


@dataclass(frozen=True)
class Tables:
    """What a consumer takes."""

    name: str
    opset: int  # the newest it knows
    types: Mapping[str, frozenset[str]]  # by operator, which has its domain before it unless the standard's
    rules: Mapping[str, Rule]


_RULES: dict[str, Rule] = {"TensorScatter": _cache_in_place, "DequantizeLinear": _symmetric}
CONSUMERS: dict[Consumer, Tables] = {
    "cuda": Tables(
        "ONNX Runtime 1.31's CUDA provider",
        27,
        _by_operator(CUDA),
        {f"{MICROSOFT}.GroupQueryAttention": _known_inputs},
    ),
    "tensorrt": Tables("TensorRT 10.15", 24, _by_operator(TENSORRT), _RULES),
    "tensorrt-rtx": Tables("TensorRT-RTX 1.7", 24, _by_operator(TENSORRT_RTX), _RULES),
}


def unsupported(model: onnx.ModelProto, consumer: Consumer) -> list[str]:
    """What `consumer` does not take of the graph, a sentence for each kind of node; [] if it takes all.

    Weights need not be loaded. That a graph passes says that its operators are known, not that it was run.
    """
    tables, types = CONSUMERS[consumer], types_of(model)
    found: dict[str, list[str]] = defaultdict(list)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    if opset > tables.opset:
        found[f"opset {opset}, only up to {tables.opset}"] = []
    for node in model.graph.node:
        if (wrong := _wrong(node, model.graph, types, tables)) is not None:
            found[wrong].append(node.name or node.output[0])
    return [f"{tables.name} takes no {what}{_places(nodes)}" for what, nodes in found.items()]


def check_supported(model: onnx.ModelProto, target: Target, graph: str) -> None:
    """Raise ExportError if what graphs of `target` are for does not take `model`, which is called `graph`."""
    consumers: dict[Target, Consumer] = {"cuda": "cuda", "tensorrt": "tensorrt"}
    if target in consumers and (refused := unsupported(model, consumers[target])):
        raise ExportError(f"{graph} cannot run on target {target}: {refused[0]}")


def _wrong(node: onnx.NodeProto, graph: onnx.GraphProto, types: Types, tables: Tables) -> str | None:
    name = operator(node)
    if name not in tables.types:
        return name
    main = _main(node, types)
    if main not in tables.types[name]:
        return f"{name} of {main}"
    rule = tables.rules.get(name)
    wrong = rule(node, graph) if rule else None
    return None if wrong is None else f"{name} {wrong}"


def operator(node: onnx.NodeProto) -> str:
    """What the tables call the operator of `node`."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _places(nodes: list[str]) -> str:
    if not nodes:
        return ""
    return f" ({nodes[0]}{f' and {len(nodes) - 1} more' if len(nodes) > 1 else ''})"


def types_of(model: onnx.ModelProto) -> Types:
    """The type of every value in a graph of the operators above, ONNX Runtime's own among them.

    onnx.shape_inference stops at operators that are not the standard's.
    """
    graph = model.graph
    types = {value.name: _type(value.type.tensor_type.elem_type) for value in graph.input}
    types |= {tensor.name: _type(tensor.data_type) for tensor in graph.initializer}
    for node in graph.node:
        given = _given(node, types)
        types |= {name: given[min(i, len(given) - 1)] for i, name in enumerate(node.output)}
    return types


def _given(node: onnx.NodeProto, types: Types) -> list[str]:
    """The types of the node's outputs; the last is that of all further ones."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    match node.op_type:
        case "Cast":
            return [_type(attributes["to"].i)]
        case "Constant" | "ConstantOfShape":
            return [_type(attributes["value"].t.data_type)]
        case "And" | "Equal" | "Less" | "LessOrEqual":
            return ["bool"]
        case "ArgMax" | "Shape":
            return ["int64"]
        case "DynamicQuantizeLinear":
            return ["uint8", "float", "uint8"]
        case "MatMulInteger":
            return ["int32"]
        case "QuantizeLinear":
            return [types[node.input[2]]]
        case "DequantizeLinear" | "Where":
            return [types[node.input[1]]]
        case "GroupQueryAttention":
            return [types[node.input[0]], types[node.input[3]]]
        case _:
            return [types[node.input[0]]]


def _main(node: onnx.NodeProto, types: Types) -> str:
    """The type that the tables speak of."""
    if node.op_type in ("Cast", "Constant", "ConstantOfShape"):
        return types[node.output[0]]
    return types[node.input[node.op_type == "Where"]]


def _type(kind: int) -> str:
    name: str = TensorProto.DataType.Name(kind)
    return name.lower()
