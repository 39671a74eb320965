"""The decoder -> graphs of `DecoderSpec`'s contract: one for each layer and one for the head, to be joined.

A layer at a time is read, written and forgotten, so that the model need not fit into memory. What each
graph computes is checked by `verify`, against transformers.

A graph with ``query_seqlens`` appends ragged chunks of S > 1 to a batch; it needs ONNX Runtime
1.32. Without that input GroupQueryAttention takes S > 1 on a non-empty cache at batch 1 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor
from transformers import PretrainedConfig

from dualfocus.export.errors import ExportError
from dualfocus.export.graph import MICROSOFT, OPSET, STANDARD_OPSET, DataFile, Graph
from dualfocus.export.quantize import EXACT, Part, decoder_form, product
from dualfocus.runtime.manifest import ON_DEVICE, STANDARD, CacheType, DecoderSpec, Precision, Target

KINDS = ("llama", "mistral", "qwen2")  # whose layers are the one that is written here
ROPES = ("default", "linear", "llama3", "yarn")  # whose angles are one table
INPUTS = "inputs_embeds"


@dataclass
class Linear:
    """A product's (N, K) matrix, float32, and what is added to it."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass
class Layer:
    """One decoder layer's weights, queries, keys and values packed into one matrix."""

    norm: Tensor  # (hidden,)
    qkv: Linear  # ((heads + 2 kv_heads) * head_size, hidden)
    project: Linear  # (hidden, heads * head_size)
    mlp_norm: Tensor  # (hidden,)
    gate: Linear  # (mlp, hidden)
    up: Linear
    down: Linear  # (hidden, mlp)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layer:
        """The layer whose weights, by transformers' names, are `tensors`."""

        def linear(*names: str) -> Linear:
            matrix = torch.cat([tensors[f"{name}.weight"] for name in names])
            has_bias = f"{names[0]}.bias" in tensors
            return Linear(
                matrix, torch.cat([tensors[f"{name}.bias"] for name in names]) if has_bias else None
            )

        return cls(
            norm=tensors["input_layernorm.weight"].clone(),
            qkv=linear(*(f"self_attn.{part}_proj" for part in "qkv")),
            project=linear("self_attn.o_proj"),
            mlp_norm=tensors["post_attention_layernorm.weight"].clone(),
            gate=linear("mlp.gate_proj"),
            up=linear("mlp.up_proj"),
            down=linear("mlp.down_proj"),
        )


@dataclass
class Head:
    """What makes logits of the last layer's states."""

    norm: Tensor  # (hidden,)
    head: Linear  # (vocabulary, hidden)


def describe(
    config: PretrainedConfig, *, vocabulary: int, ragged_append: bool, cache: CacheType = "float32"
) -> DecoderSpec:
    """The spec of the graph for a `config` of one of `KINDS`; ExportError where it could not be written."""
    if config.hidden_act != "silu":
        raise ExportError(f"the language model's activation is {config.hidden_act!r}, expected 'silu'")
    rope = (getattr(config, "rope_scaling", None) or {}).get("rope_type", "default")  # Mistral's has none
    if rope in ("dynamic", "longrope", "su"):
        raise ExportError(f"rope type {rope!r} changes with the sequence's length, which a table cannot hold")
    if rope not in ROPES:
        raise ExportError(f"rope type {rope!r} is unknown, expected one of {', '.join(ROPES)}")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size % 16:
        raise ExportError(
            f"the head size is {head_size}, and GroupQueryAttention with rotary needs a multiple of 16"
        )
    return DecoderSpec(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
        vocabulary=vocabulary,
        context=_context(config),
        dtype=cache,
        ragged_append=ragged_append,
    )


def _context(config: PretrainedConfig) -> int:
    """Tokens the model looks back to: what a sliding window would cut off is not promised."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return int(config.max_position_embeddings)
    return int(min(config.max_position_embeddings, window))


class _Names(NamedTuple):
    """What attention is given, by the names of the values."""

    x: str  # what the layer was given, (B, S, hidden)
    qkv: str
    past: list[str]  # keys and values
    present: list[str]
    lengths: list[str]  # seqlens_k, total_sequence_length and, with ragged appends, query_seqlens
    tables: list[str]  # cosines and sines


class DecoderGraphs:
    """Makes the graphs of one decoder, whose weights go to `data`."""

    def __init__(
        self,
        spec: DecoderSpec,
        config: PretrainedConfig,
        precision: Precision,
        data: DataFile,
        rotary: tuple[Tensor, Tensor],
        target: Target,
    ) -> None:
        """`rotary` are the (context, head_size / 2) tables of cosines and sines."""
        assert target not in STANDARD or spec.ragged_append
        self._spec, self._precision, self._data = spec, precision, data
        self._opset = STANDARD_OPSET if target in STANDARD else OPSET
        self._half = target in ON_DEVICE
        self._epsilon = float(config.rms_norm_eps)
        self._kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[spec.dtype]
        # GroupQueryAttention turns in the cache's type, RotaryEmbedding in that of what was projected
        of_tables = torch.float16 if spec.dtype == "float16" and target not in STANDARD else torch.float32
        self._rotary = {name: table.to(of_tables) for name, table in zip(("cos", "sin"), rotary, strict=True)}
        self._shared: list[TensorProto] = []  # the tables, once they are stored

    def share(self, part: onnx.ModelProto) -> None:
        """Refer to the tables that are stored for `part`, a layer's graph."""
        self._shared = [tensor for tensor in part.graph.initializer if tensor.name in self._rotary]

    def layer(self, i: int, layer: Layer, entrance: Tensor | None = None) -> onnx.ModelProto:
        """Layer `i`: ``hidden.{i}``, for the first ``inputs_embeds``, -> ``hidden.{i + 1}``.

        `entrance` is a (hidden, hidden) matrix that what comes in goes through. The last layer gives the
        positions ``logits_at`` alone: nothing reads the others any more.
        """
        spec, graph, name = self._spec, self._graph(), f"layers.{i}"
        graph.keep(self._shared)
        x = graph.input(f"hidden.{i}" if i else INPUTS, graph.float, ["batch", "length", spec.hidden])
        if entrance is not None:
            x = product(graph, x, entrance.numpy(), EXACT, "entrance.weight", "entrance.out")
        normed = self._norm(graph, x, layer.norm, f"{name}.norm")
        qkv = self._product(graph, normed, layer.qkv, "qkv", i)
        attended = self._attention(graph, x, qkv, i)
        if i == spec.layers - 1:
            heads = spec.heads * spec.head_size
            x, attended = (
                self._wanted(graph, of, width) for of, width in ((x, spec.hidden), (attended, heads))
            )
        x = graph.add(
            "Add", [x, self._product(graph, attended, layer.project, "project", i)], f"{name}.attended"
        )
        normed = self._norm(graph, x, layer.mlp_norm, f"{name}.mlp_norm")
        gate = self._product(graph, normed, layer.gate, "gate", i)
        up = self._product(graph, normed, layer.up, "up", i)
        gated = graph.add("Mul", [gate, graph.add("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        down = self._product(graph, graph.add("Mul", [gated, up], f"{name}.gated"), layer.down, "down", i)
        x = graph.add("Add", [x, down], f"hidden.{i + 1}")
        graph.output(x, graph.float, ["batch", self._length(i + 1), spec.hidden])
        part = graph.model()
        self.share(part)
        return part

    def head(self, head: Head) -> onnx.ModelProto:
        """The last layer's states -> ``logits``, and on a device what is asked about them."""
        spec, graph = self._spec, self._graph()
        shape: list[str | int] = ["batch", self._length(spec.layers)]
        x = graph.input(f"hidden.{spec.layers}", graph.float, [*shape, spec.hidden])
        normed = self._norm(graph, x, head.norm, "norm")
        form = decoder_form(self._precision, "head", spec.layers, spec.layers)
        out = product(
            graph, normed, head.head.weight.numpy(), form, "head", "head.out" if self._half else "logits"
        )
        graph.output("logits", TensorProto.FLOAT, [*shape, spec.vocabulary])
        if self._half:
            logits = graph.add("Cast", [out], "logits", to=TensorProto.FLOAT)
            graph.add("ArgMax", [logits], "best", axis=-1, keepdims=0)
            graph.add("ReduceMax", [logits, _ints(graph, -1)], "peak", keepdims=0)
            graph.add("ReduceLogSumExp", [logits, _ints(graph, -1)], "logsumexp", keepdims=0)
            graph.output("best", TensorProto.INT64, shape)
            graph.output("peak", TensorProto.FLOAT, shape)
            graph.output("logsumexp", TensorProto.FLOAT, shape)
        return graph.model()

    def embedding(self, table: Path) -> onnx.ModelProto:
        """``tokens`` and ``images`` -> the first layer's states; `table` is a file beside the data's."""
        spec, graph = self._spec, self._graph()
        tokens = graph.input("tokens", TensorProto.INT64, ["batch", "length"])
        images = graph.input("images", graph.float, ["shown", spec.hidden])
        weight = graph.mapped("embeddings", table)
        first = graph.weight("number.first", np.array(spec.vocabulary, np.int64))
        zero = graph.weight("number.0", np.array(0, np.int64))
        is_text = graph.add("Less", [tokens, first], "is_text")
        words = graph.add("Gather", [weight, graph.add("Where", [is_text, tokens, zero], "word")], "words")
        behind = graph.add("Sub", [tokens, first], "behind")
        seen = graph.add("Gather", [images, graph.add("Where", [is_text, zero, behind], "patch")], "patches")
        is_word = graph.add("Unsqueeze", [is_text, _ints(graph, 2)], "is_word")
        graph.add("Where", [is_word, words, seen], INPUTS)
        graph.output(INPUTS, graph.float, ["batch", "length", spec.hidden])
        return graph.model()

    def _graph(self) -> Graph:
        return Graph(self._data, self._opset, half=self._half)

    def _wanted(self, graph: Graph, x: str, width: int) -> str:
        """Of `x`, (B, S, width), the positions whose logits are wanted: (B, K, width).

        For a GPU they are counted through all rows: a Gather of them is what every library has a kernel for.
        """
        at = graph.input("logits_at", TensorProto.INT64, ["batch", "wanted"])
        if self._half:
            flat = graph.add("Reshape", [x, _ints(graph, -1, width)], f"{x}.flat")
            return graph.add("Gather", [flat, at], f"{x}.wanted", axis=0)
        where = graph.add("Unsqueeze", [at, _ints(graph, 2)], "at")
        return graph.add("GatherND", [x, where], f"{x}.wanted", batch_dims=1)

    def _length(self, i: int) -> str:
        """What the positions of ``hidden.{i}`` are called."""
        return "length" if i < self._spec.layers else "wanted"

    def _norm(self, graph: Graph, x: str, weight: Tensor, name: str) -> str:
        scale = graph.weight(f"{name}.weight", weight.numpy())
        return graph.add("RMSNormalization", [x, scale], f"{name}.out", axis=-1, epsilon=self._epsilon)

    def _product(self, graph: Graph, x: str, linear: Linear, part: Part, i: int) -> str:
        form, name = decoder_form(self._precision, part, i, self._spec.layers), f"layers.{i}.{part}"
        out = product(graph, x, linear.weight.numpy(), form, f"{name}.weight", f"{name}.out")
        if linear.bias is None:
            return out
        return graph.add("Add", [out, graph.weight(f"{name}.bias", linear.bias.numpy())], f"{name}.biased")

    def _attention(self, graph: Graph, x: str, qkv: str, i: int) -> str:
        """Rotary positions, the cache's update and attention of layer `i`, whose `x` became `qkv`."""
        spec = self._spec
        # TensorRT wants to know how long a cache is that it is to update in place
        capacity = spec.context if self._half and graph.is_standard else "capacity"
        cache: list[str | int] = ["batch", spec.kv_heads, capacity, spec.head_size]
        past, present = (
            [f"{when}.{i}.{part}" for part in ("key", "value")] for when in ("past_key_values", "present")
        )
        lengths = [
            graph.input("seqlens_k", TensorProto.INT32, ["batch"]),
            graph.input("total_sequence_length", TensorProto.INT32, []),
        ]
        if spec.ragged_append:
            lengths.append(graph.input("query_seqlens", TensorProto.INT32, ["batch"]))
        for name in past:
            graph.input(name, self._kind, cache)
        tables = [graph.weight(name, table.numpy()) for name, table in self._rotary.items()]
        write = self._standard_attention if graph.is_standard else self._grouped_query_attention
        out = write(graph, _Names(x, qkv, past, present, lengths, tables), f"layers.{i}.attention")
        for name in present:
            graph.output(name, self._kind, cache)
        return out

    def _grouped_query_attention(self, graph: Graph, of: _Names, name: str) -> str:
        """One node of ONNX Runtime's own."""
        # Inputs 1 and 2 (key, value) are packed into the query; 9 to 15 are features no llama uses.
        inputs = [self._as_cached(graph, of.qkv), "", "", *of.past, *of.lengths[:2], *of.tables]
        if self._spec.ragged_append:
            inputs += [""] * 7 + of.lengths[2:]
        out = graph.add(
            "GroupQueryAttention",
            inputs,
            [f"{name}.out", *of.present],
            domain=MICROSOFT,
            num_heads=self._spec.heads,
            kv_num_heads=self._spec.kv_heads,
            do_rotary=1,
            scale=self._spec.head_size**-0.5,  # what it would be anyway; TensorRT-RTX wants to be told
        )
        return self._as_computed(graph, out)

    def _standard_attention(self, graph: Graph, of: _Names, name: str) -> str:
        """The same in operators of the ONNX standard.

        What a position may see is written out as a mask, because what ``is_causal`` means behind a cache was
        settled only in 2026. Padding writes what is there already, so that it changes nothing.
        """
        spec, add = self._spec, graph.add
        new = add("Cast", [of.lengths[2]], "new", to=TensorProto.INT64)
        fresh = add(
            "Unsqueeze", [_fresh(graph, of.x, of.lengths[2]), _ints(graph, 1, 3)], "fresh.rows"
        )  # (B, 1, S, 1)
        held = add("Cast", [of.lengths[0]], "held", to=TensorProto.INT64)
        start = add("Sub", [add("Add", [held, _ints(graph, 1)], "valid"), new], "start")  # (B,)
        column = add("Unsqueeze", [start, _ints(graph, 1)], "start.column")
        position = add("Add", [column, _range(graph, _length(graph, of.x), "new")], "position")  # (B, S)
        rotary = add("Min", [position, _ints(graph, spec.context - 1)], "rotary")
        row = add("Unsqueeze", [position, _ints(graph, 1, 3)], "position.rows")  # (B, 1, S, 1)
        places = add("Expand", [row, _ints(graph, 1, spec.kv_heads, 1, 1)], "places")
        total = add("Cast", [of.lengths[1]], "total", to=TensorProto.INT64)
        reaches = add("LessOrEqual", [_range(graph, total, "held"), row], "reaches")  # (B, 1, S, total)
        # TensorRT promises nothing of a position that sees nothing: what is padding may see what it likes
        visible = reaches if self._half else add("And", [reaches, fresh], "visible")
        end = add("Reshape", [total, _ints(graph, 1)], "end")

        heads = add(
            "Reshape",
            [of.qkv, _ints(graph, 0, 0, spec.heads + 2 * spec.kv_heads, spec.head_size)],
            f"{name}.heads",
        )
        heads = add("Transpose", [heads], f"{name}.rows", perm=[0, 2, 1, 3])
        split = _ints(graph, spec.heads + spec.kv_heads, spec.kv_heads)
        turning = add("Split", [heads, split], [f"{name}.turning", f"{name}.value"], axis=1)
        turned = add("RotaryEmbedding", [turning, *of.tables, rotary], f"{name}.turned")
        split = _ints(graph, spec.heads, spec.kv_heads)
        query = add("Split", [turned, split], [f"{name}.query", f"{name}.key"], axis=1)
        seen = []
        for before, after, part in zip(of.past, of.present, (f"{name}.key", f"{name}.value"), strict=True):
            old = add("GatherND", [before, places], f"{part}.old", batch_dims=2)
            written = add("Where", [fresh, self._as_cached(graph, part), old], f"{part}.written")
            add("TensorScatter", [before, written, start], after, axis=2)
            seen.append(add("Slice", [after, _ints(graph, 0), end, _ints(graph, 2)], f"{part}.seen"))
        query = self._as_cached(graph, query)
        attributes: dict[str, Any] = {}
        if self._half:  # TensorRT would multiply the keys too, all that are seen: by 1 is nothing to do
            factor = graph.weight("scale", np.array(spec.head_size**-0.5, np.float32))
            query, attributes["scale"] = add("Mul", [query, factor], f"{name}.scaled"), 1.0
        out = add("Attention", [query, *seen, visible], f"{name}.found", **attributes)
        out = self._as_computed(graph, out)
        out = add("Transpose", [out], f"{name}.positions", perm=[0, 2, 1, 3])
        return add("Reshape", [out, _ints(graph, 0, 0, spec.heads * spec.head_size)], f"{name}.out")

    def _as_cached(self, graph: Graph, x: str) -> str:
        """`x` in the cache's type."""
        if self._kind == graph.float:
            return x
        return graph.add("Cast", [x], f"{x}.cached", to=self._kind)

    def _as_computed(self, graph: Graph, x: str) -> str:
        """`x`, of the cache's type, in the graph's."""
        if self._kind == graph.float:
            return x
        return graph.add("Cast", [x], f"{x}.computed", to=graph.float)


def _ints(graph: Graph, *numbers: int) -> str:
    """A constant: a list of integers."""
    return graph.weight("ints." + ".".join(map(str, numbers)), np.array(numbers, np.int64))


def _length(graph: Graph, x: str) -> str:
    """How many positions the (B, S, …) tensor `x` has, a scalar."""
    shape = graph.add("Shape", [x], "length.list", start=1, end=2)
    return graph.add("Squeeze", [shape, _ints(graph, 0)], "length.number")


def _range(graph: Graph, length: str, name: str) -> str:
    """0, 1, … below the scalar `length`."""
    number = [graph.weight(f"number.{i}", np.array(i, np.int64)) for i in (0, 1)]
    return graph.add("Range", [number[0], length, number[1]], f"range.{name}")


def _fresh(graph: Graph, x: str, query_seqlens: str) -> str:
    """(B, S): which of the positions of `x` a row really has."""
    new = graph.add("Cast", [query_seqlens], "new", to=TensorProto.INT64)
    column = graph.add("Unsqueeze", [new, _ints(graph, 1)], "new.column")
    return graph.add("Less", [_range(graph, _length(graph, x), "new"), column], "fresh")
