"""Llama decoder -> ``decoder.onnx``: `DecoderSpec`'s contract, written as one small torch module.

The module holds the checkpoint's own weights and is exported, never run: attention and norms are
emitted as single ONNX nodes (``com.microsoft::GroupQueryAttention``, ``RMSNormalization``), whose
semantics exist in ONNX Runtime alone. What the graph computes is checked by `verify`.

A graph with ``query_seqlens`` appends ragged chunks of S > 1 to a batch; it needs ONNX Runtime
1.32. Without that input GroupQueryAttention takes S > 1 on a non-empty cache at batch 1 only.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import LlamaConfig, LlavaForConditionalGeneration

from dualfocus.export.errors import ExportError
from dualfocus.runtime.manifest import DecoderSpec

OPSET = 23  # the first with RMSNormalization
# Beyond this, weights lie in a file beside the graph: ONNX Runtime maps it, and keeps only what its kernels
# packed in private memory (an int8 decoder of 144 MB took 152 MB, as a single file 213 MB).
SINGLE_FILE_BYTES = 64_000_000


class Attention(nn.Module):
    """Packed QKV projection and GroupQueryAttention over one layer's cache; no output projection."""

    def __init__(self, layer: nn.Module, config: LlamaConfig) -> None:
        super().__init__()
        parts = (layer.q_proj, layer.k_proj, layer.v_proj)
        weight = torch.cat([part.weight for part in parts])
        self.qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=config.attention_bias)
        self.qkv.weight = nn.Parameter(weight)
        if config.attention_bias:
            self.qkv.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.head_dim

    def forward(
        self,
        x: Tensor,  # (B, S, hidden)
        cache: tuple[Tensor, Tensor],  # 2 x (B, kv_heads, capacity, head_size)
        lengths: tuple[Tensor, Tensor, Tensor | None],  # seqlens_k, total_sequence_length, query_seqlens
        rotary: tuple[Tensor, Tensor],  # 2 x (context, head_size / 2)
    ) -> tuple[Tensor, Tensor, Tensor]:
        key, value = cache
        seqlens_k, total, query_seqlens = lengths
        # Inputs 1 and 2 (key, value) are packed into the query; 9 to 15 are features no llama uses.
        inputs = [self.qkv(x), None, None, key, value, seqlens_k, total, *rotary]
        if query_seqlens is not None:
            inputs += [None] * 7 + [query_seqlens]
        out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "do_rotary": 1},
            dtypes=(x.dtype,) * 3,
            shapes=((x.shape[0], x.shape[1], self.heads * self.head_size), key.shape, value.shape),
            version=1,
        )
        return out, present_key, present_value


class RMSNorm(nn.Module):
    """The checkpoint's norm as one node."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = torch.onnx.ops.symbolic(
            "RMSNormalization",
            (x, self.weight),
            {"axis": -1, "epsilon": self.epsilon},
            dtype=x.dtype,
            shape=x.shape,
            version=OPSET,
        )
        return normed


class Layer(nn.Module):
    """One decoder layer; the MLP and the output projection are the checkpoint's own modules."""

    def __init__(self, layer: nn.Module, config: LlamaConfig) -> None:
        super().__init__()
        self.attention = Attention(layer.self_attn, config)
        self.project, self.mlp = layer.self_attn.o_proj, layer.mlp
        self.norm, self.mlp_norm = RMSNorm(layer.input_layernorm), RMSNorm(layer.post_attention_layernorm)


class Decoder(nn.Module):
    """The whole graph: layers, final norm and head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        language_model = model.language_model
        config = language_model.config
        self.layers = nn.ModuleList(Layer(layer, config) for layer in language_model.layers)
        self.norm, self.head = RMSNorm(language_model.norm), model.lm_head
        self.entrance: nn.Module = nn.Identity()  # where `rotate.rotated` turns what comes in
        # The model's own rotary module fills the tables, so that every static rope variant comes along.
        positions = torch.arange(config.max_position_embeddings)[None]
        half = config.head_dim // 2  # the other half of a row repeats it
        for name, table in zip(
            ("cos", "sin"), language_model.rotary_emb(torch.zeros(()), positions), strict=True
        ):
            assert table.shape[-1] == 2 * half
            self.register_buffer(name, table[0, :, :half].contiguous())

    def forward(
        self,
        inputs_embeds: Tensor,  # (B, S, hidden)
        seqlens_k: Tensor,  # (B,) i32
        total_sequence_length: Tensor,  # () i32
        logits_at: Tensor,  # (B, K) i64
        query_seqlens: Tensor | None,  # (B,) i32
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        x = self.entrance(inputs_embeds)
        lengths = (seqlens_k, total_sequence_length, query_seqlens)
        presents: list[Tensor] = []
        last = len(self.layers) - 1
        for i, (layer, cache) in enumerate(zip(self.layers, past, strict=True)):
            attended, *present = layer.attention(layer.norm(x), cache, lengths, (self.cos, self.sin))
            presents += present
            if i == last:  # nothing reads the other positions any more: no projection, MLP or head for them
                x, attended = _rows(x, logits_at), _rows(attended, logits_at)
            x = x + layer.project(attended)
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.head(self.norm(x)), *presents


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """(B, S, D), (B, K) -> (B, K, D): the positions asked for."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def describe(model: LlavaForConditionalGeneration, *, ragged_append: bool) -> DecoderSpec:
    """The spec of the graph that `export_decoder` will write; ExportError where it could not."""
    config = model.language_model.config
    if config.model_type != "llama":
        raise ExportError(f"the language model is of type {config.model_type!r}, expected 'llama'")
    rope = (config.rope_scaling or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ExportError(f"rope type {rope!r} changes with the sequence's length, which a table cannot hold")
    if config.head_dim % 16:
        raise ExportError(
            f"the head size is {config.head_dim}, and GroupQueryAttention with rotary needs a multiple of 16"
        )
    return DecoderSpec(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocabulary=model.lm_head.out_features,
        context=config.max_position_embeddings,
        dtype="float32",
        ragged_append=ragged_append,
    )


def export_decoder(decoder: Decoder, spec: DecoderSpec, path: Path) -> None:
    """Write ``decoder.onnx`` (beyond `SINGLE_FILE_BYTES` of weights, ``decoder.onnx.data`` beside it too)."""
    batch, length, wanted, capacity = Dim("batch"), Dim("length"), Dim("wanted"), Dim("capacity")
    cache = torch.zeros(2, spec.kv_heads, 8, spec.head_size)
    example = {  # sizes above 1, all different: the exporter takes a 1 or an equality for a constant
        "inputs_embeds": torch.zeros(2, 5, spec.hidden),
        "seqlens_k": torch.full((2,), 4, dtype=torch.int32),
        "total_sequence_length": torch.tensor(5, dtype=torch.int32),
        "logits_at": torch.zeros(2, 3, dtype=torch.int64),
        "query_seqlens": torch.full((2,), 5, dtype=torch.int32) if spec.ragged_append else None,
        "past": [(cache.clone(), cache.clone()) for _ in range(spec.layers)],
    }
    past_axes = {0: batch, 2: capacity}
    axes = {
        "inputs_embeds": {0: batch, 1: length},
        "seqlens_k": {0: batch},
        "total_sequence_length": {},
        "logits_at": {0: batch, 1: wanted},
        "query_seqlens": {0: batch} if spec.ragged_append else None,
        "past": [(past_axes, past_axes) for _ in range(spec.layers)],
    }
    scalars = ["inputs_embeds", "seqlens_k", "total_sequence_length", "logits_at"]
    if spec.ragged_append:
        scalars.append("query_seqlens")
    caches = [f"{i}.{part}" for i in range(spec.layers) for part in ("key", "value")]
    with torch.no_grad():
        program = torch.onnx.export(
            decoder,
            kwargs=example,
            dynamic_shapes=axes,
            input_names=scalars + [f"past_key_values.{name}" for name in caches],
            output_names=["logits"] + [f"present.{name}" for name in caches],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of whoever exported
    weights = sum(tensor.numel() * tensor.element_size() for tensor in decoder.state_dict().values())
    program.save(path, external_data=weights > SINGLE_FILE_BYTES)
