"""A checkpoint's modules -> OpenVINO models with the inputs and outputs that its GenAI library expects.

The decoder keeps its cache as state: ``beam_idx`` (B,) says which row each row goes on from, and the library
turns state and attention into its paged form where it wants that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dualfocus.export.vision import Vision

Past = Sequence[tuple[Tensor, Tensor]]  # (B, kv_heads, length, head_size) each, by layer


class _Cache:
    """What transformers' Llama asks of a cache: the past before what it appends."""

    def __init__(self, past: Past) -> None:
        self.layers = list(past)

    def update(self, key: Tensor, value: Tensor, layer: int, options: object) -> tuple[Tensor, Tensor]:
        past_key, past_value = self.layers[layer]
        self.layers[layer] = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        return self.layers[layer]


class _Decoder(nn.Module):  # type: ignore[misc]
    """Llama and head over a past given layer by layer."""

    def __init__(self, model: LlavaForConditionalGeneration, *, embeds: bool) -> None:
        super().__init__()
        self.llama, self.head = model.language_model, model.lm_head
        self.input = "inputs_embeds" if embeds else "input_ids"

    def forward(
        self,
        new: Tensor,  # (B, S, hidden) embeddings, or (B, S) tokens
        attention_mask: Tensor,  # (B, past + S)
        position_ids: Tensor,  # (B, S)
        past: Past,
    ) -> tuple[Tensor, ...]:
        cache = _Cache(past)
        at = past[0][0].shape[2] + torch.arange(new.shape[1])
        visible = torch.arange(attention_mask.shape[1])[None] <= at[:, None]
        visible = visible & attention_mask[:, None, None].bool()  # (B, 1, S, past + S)
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        states = self.llama(
            **{self.input: new},
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            cache_position=at,
            use_cache=True,
        ).last_hidden_state
        return self.head(states), *(entries for layer in cache.layers for entries in layer)


def decoder(model: LlavaForConditionalGeneration, *, embeds: bool) -> openvino.Model:
    """``input_ids`` (B, S), or ``inputs_embeds`` (B, S, hidden), ``attention_mask`` (B, past + S),
    ``position_ids`` (B, S), ``beam_idx`` (B,) -> ``logits`` (B, S, vocabulary)."""
    config = model.language_model.config
    rows, length, past = 2, 3, 4  # all different: sizes that are alike might be taken for the same
    entries = torch.zeros(rows, config.num_key_value_heads, past, config.head_dim)
    new = (
        torch.zeros(rows, length, config.hidden_size)
        if embeds
        else torch.zeros(rows, length, dtype=torch.long)
    )
    example = {
        "new": new,
        "attention_mask": torch.ones(rows, past + length, dtype=torch.long),
        "position_ids": torch.arange(past, past + length).expand(rows, -1),
        "past": tuple((entries, entries.clone()) for _ in range(config.num_hidden_layers)),
    }
    wrapped = _Decoder(model, embeds=embeds).eval()
    converted = _convert(wrapped, example)
    kinds = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    pasts = [f"past_key_values.{kind}" for kind in kinds]
    presents = [f"present.{kind}" for kind in kinds]
    cached = [-1, config.num_key_value_heads, -1, config.head_dim]
    shapes = {
        wrapped.input: [-1, -1, config.hidden_size] if embeds else [-1, -1],
        "attention_mask": [-1, -1],
        "position_ids": [-1, -1],
    }
    _name(converted, shapes | dict.fromkeys(pasts, cached), ["logits", *presents])
    _keep_state(converted, wrapped.input, dict(zip(pasts, presents, strict=True)), cached)
    return converted


def vision(model: LlavaForConditionalGeneration) -> openvino.Model:
    """``pixel_values`` (N, 3, S, S) -> ``last_hidden_state`` (N, T, D), the image tokens."""
    size = model.config.vision_config.image_size
    converted = _convert(Vision(model).eval(), {"pixel_values": torch.zeros(2, 3, size, size)})
    _name(converted, {"pixel_values": [-1, 3, size, size]}, ["last_hidden_state"])
    return converted


def embeddings(model: LlavaForConditionalGeneration) -> openvino.Model:
    """``input`` (B, S) tokens -> ``inputs_embeds`` (B, S, hidden)."""
    converted = _convert(model.get_input_embeddings(), {"input": torch.zeros(2, 3, dtype=torch.long)})
    _name(converted, {"input": [-1, -1]}, ["inputs_embeds"])
    return converted


def _convert(module: nn.Module, example: dict[str, Any]) -> openvino.Model:
    with torch.no_grad():
        return openvino.convert_model(module, example_input=example)


def _name(model: openvino.Model, inputs: dict[str, list[int]], outputs: Sequence[str]) -> None:
    """Give inputs, in order, their names and shapes (-1 where any size will do), and outputs theirs."""
    for port, (name, shape) in zip(model.inputs, inputs.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()


def _keep_state(model: openvino.Model, leading: str, presents: dict[str, str], shape: Sequence[int]) -> None:
    """Turn the cache's inputs and the outputs that they become, `presents`, into state.

    It begins empty, with as many rows as the input `leading` has; `shape` is that of a layer's entries.
    """
    order = ops.parameter([-1], np.int32, name="beam_idx")
    order.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([order])
    zero = ops.constant(0, dtype=np.int32)
    for name in presents:
        past = model.input(name)
        readers = past.get_target_inputs()
        reordered = ops.gather(past, order, zero)
        for reader in readers:
            reader.replace_source_output(reordered.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, presents)
    rows = ops.gather(ops.shape_of(model.input(leading), output_type="i32"), ops.constant([0]), zero)
    _, kv_heads, _, head_size = shape
    empty = ops.constant(np.array([kv_heads, 0, head_size], np.int32))
    initial = ops.broadcast(ops.constant(0.0, dtype=np.float32), ops.concat([rows, empty], 0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([initial])
    model.validate_nodes_and_infer_types()
