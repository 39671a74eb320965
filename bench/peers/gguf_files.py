"""A `Checkpoint` -> GGUF files as llama.cpp reads them: the decoder in a precision, and the vision tower.

The decoder's tensors are llama's: rows of the query and key projections are put in the order in which its
rotary embedding pairs them, and tied heads are left out. Vocabularies are written as SentencePiece's, each
piece the better the earlier it was learnt: for tokenizers of that type prompts then read as they do here; of
others only the ids mean anything. Rows of the table that no token names get names that no text contains.

The tower has to be CLIP's, and what the projector sees the output of one layer, without the class token. Only
the layers up to that one are written, and the last is named as the one to take: left to itself llama.cpp
would take the one before. It computes activations by a table in half precision, the projector's GELU in its
tanh approximation. And it puts the class token behind the patches, but gives out positions and picks patches
as if it stood in front (https://github.com/ggml-org/llama.cpp/issues/25814, open in July 2026): until that is
mended it computes as much as LLaVA does, but not the same. Nothing in a file can change that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer
from transformers import CLIPVisionModel

from dualfocus.export.errors import ExportError

TEXT: Mapping[str, Type] = {"f32": Type.F32, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
VISION: Mapping[str, Type] = {"f32": Type.F32, "bf16": Type.BF16}

LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # modules of a decoder's layer: what llama.cpp calls them
CLIP = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}  # the same of a tower's

Named = tuple[str, torch.Tensor]


def write_text(checkpoint: Any, path: Path, kind: str) -> None:
    """Write the decoder to `path`; `kind` is one of `TEXT`. ExportError if llama.cpp cannot compute it."""
    _write(path, "llama", TEXT[kind], checkpoint, _text_facts, _text_tensors(checkpoint.model))


def has_tower(checkpoint: Any) -> bool:
    """The tower is one that `write_vision` can write."""
    return isinstance(checkpoint.model.model.vision_tower, CLIPVisionModel)


def write_vision(checkpoint: Any, path: Path, kind: str) -> None:
    """Write tower and projector to `path`; `kind` is one of `VISION`. ExportError as above."""
    _write(path, "clip", VISION[kind], checkpoint, _vision_facts, _vision_tensors(checkpoint.model))


def _write(
    path: Path,
    arch: str,
    dtype: Type,
    checkpoint: Any,
    facts: Callable[[gguf.GGUFWriter, Any], None],
    tensors: Iterator[Named],
) -> None:
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, arch)
    facts(writer, checkpoint)
    for name, tensor in tensors:
        stored = _stored(name, tensor, dtype)
        data = tensor.detach().float().contiguous().numpy()
        writer.add_tensor(name, gguf.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def _stored(name: str, tensor: torch.Tensor, dtype: Type) -> Type:
    """Matrices are stored in `dtype`, but what is added or convolved, which llama.cpp wants in floats; the
    head, tied or not, has 8 bits at least, as llama.cpp's own quantiser leaves it."""
    if tensor.dim() != 2 or name == "v.position_embd.weight":
        return Type.F32
    if dtype == Type.Q4_0 and name in ("token_embd.weight", "output.weight"):
        return Type.Q8_0
    return dtype


def _text_facts(writer: gguf.GGUFWriter, checkpoint: Any) -> None:
    config = checkpoint.model.config.text_config
    if (config.rope_scaling or {}).get("rope_type", "default") != "default":
        raise ExportError(f"the decoder's positions are scaled, {config.rope_scaling}: not written to GGUF")
    writer.add_name(checkpoint.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, checkpoint.tokenizer, config.vocab_size)
    bos = checkpoint.tokens.bos
    writer.add_add_bos_token(bos is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_eos_token_id(checkpoint.tokens.eos[0])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int) -> None:
    pieces = [f"[nameless {row}]" for row in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    special = tokenizer.get_added_tokens_decoder()
    for piece, token in tokenizer.get_vocab().items():
        pieces[token] = piece
        types[token] = gguf.TokenType.NORMAL
        if token in special and special[token].special:
            types[token] = gguf.TokenType.CONTROL
        elif token in special:
            types[token] = gguf.TokenType.USER_DEFINED
        elif len(piece) == 6 and piece.startswith("<0x"):
            types[token] = gguf.TokenType.BYTE
    if (unknown := tokenizer.token_to_id("<unk>")) is not None:
        types[unknown] = gguf.TokenType.UNKNOWN
        writer.add_unk_token_id(unknown)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(row) for row in range(rows)])
    writer.add_token_types(types)


def _text_tensors(model: Any) -> Iterator[Named]:
    config, decoder = model.config.text_config, model.model.language_model
    yield "token_embd.weight", decoder.embed_tokens.weight
    for i, layer in enumerate(decoder.layers):
        for name, tensor in _layer(f"blk.{i}", layer, LLAMA):
            if ".attn_q." in name:
                yield name, _paired(tensor, config.num_attention_heads)
            elif ".attn_k." in name:
                yield name, _paired(tensor, config.num_key_value_heads)
            else:
                yield name, tensor
    yield "output_norm.weight", decoder.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight


def _paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Dimensions i and i + half of a head, which are turned together, side by side."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _layer(prefix: str, layer: torch.nn.Module, names: Mapping[str, str]) -> Iterator[Named]:
    for module, name in names.items():
        for kind, tensor in layer.get_submodule(module).named_parameters():
            yield f"{prefix}.{name}.{kind}", tensor


def _vision_facts(writer: gguf.GGUFWriter, checkpoint: Any) -> None:
    config, processor = checkpoint.model.config, checkpoint.preprocessor
    tower = config.vision_config
    known = {"quick_gelu": False, "gelu": True}
    if tower.hidden_act not in known:
        raise ExportError(
            f"the tower's activation is {tower.hidden_act!r}, expected one of {', '.join(known)}"
        )
    layers = _layers(config)
    writer.add_name(checkpoint.name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.use_gelu", known[tower.hidden_act])
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_image_mean(processor.image_mean)
    writer.add_vision_image_std(processor.image_std)


def _layers(config: Any) -> int:
    """How many layers of the tower are run."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if not isinstance(layer, int) or strategy != "default":
        raise ExportError(
            f"the projector sees layer {layer} of the tower, strategy {strategy!r}: not written to GGUF"
        )
    count: int = config.vision_config.num_hidden_layers
    return layer if layer >= 0 else count + 1 + layer


def _vision_tensors(model: Any) -> Iterator[Named]:
    tower, projector = model.model.vision_tower.vision_model, model.model.multi_modal_projector
    embeddings = tower.embeddings
    yield "v.class_embd", embeddings.class_embedding
    yield "v.patch_embd.weight", embeddings.patch_embedding.weight
    yield "v.position_embd.weight", embeddings.position_embedding.weight
    yield from _layer("v", tower, {"pre_layrnorm": "pre_ln"})
    for i, layer in enumerate(tower.encoder.layers[: _layers(model.config)]):
        yield from _layer(f"v.blk.{i}", layer, CLIP)
    yield from _layer("mm", projector, {"linear_1": "0", "linear_2": "2"})
