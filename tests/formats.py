"""Checkpoint folders as their publishers write them, of small models with random weights.

One writer for each family: `hugging_face`, `original` (the original LLaVA and DualFocus) and `tower`, a
vision tower in a folder of its own. What the files say is stated here, key by key, as it is published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import test_tokenizer
import torch
from test_processors import make_processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from dualfocus.bench import layouts
from dualfocus.export.random_weights import DrawnWeights

SIZE, PATCH, WIDTH = 56, 14, 32  # of the tower: pixels a side, and of a patch; channels
VOCABULARY = 705  # odd on purpose, and more rows than a tokenizer names
CLIP_NAME = "openai/clip-vit-large-patch14-336"
PROCESSORS = {name: processor.to_dict() for name, processor in make_processors(SIZE).items()}

# ---- tokenizers: what lies in a folder, by name


@cache
def sentencepiece() -> bytes:
    return test_tokenizer.train()


@dataclass(frozen=True)
class Vocabulary:
    files: dict[str, Any]
    size: int
    image: int
    bos: int | None
    eos: int
    pad: int


def llama() -> Vocabulary:
    """As Hugging Face's LLaVA-1.5 has it: image and padding behind Llama's pieces.

    `legacy`, since transformers tokenises a prompt whole, and a text behind an image then gets the space in
    front that it has where the original LLaVA tokenises it alone.
    """
    files = dict(test_tokenizer.FOLDERS["image and pad"])
    files["tokenizer_config.json"] = files["tokenizer_config.json"] | {"legacy": True}
    pieces = test_tokenizer.PIECES
    files["tokenizer.model"] = sentencepiece()
    return Vocabulary(files, pieces + 2, pieces, 1, 2, pieces + 1)


@cache
def qwen2() -> Vocabulary:
    files = test_tokenizer.qwen2()
    del files["config.json"]
    numbers = {
        token["content"]: int(i)
        for i, token in files["tokenizer_config.json"]["added_tokens_decoder"].items()
    }
    end = numbers["<|im_end|>"]
    return Vocabulary(
        files, max(numbers.values()) + 1, numbers["<image>"], None, end, numbers["<|endoftext|>"]
    )


# ---- models


@dataclass(frozen=True)
class Model:
    """A model as publishers have it before they write it: tensors by transformers' names of today."""

    config: LlavaConfig
    tensors: dict[str, Tensor]
    vocabulary: Vocabulary

    @property
    def ends(self) -> list[int]:
        """Tokens that end a reply. Every 24th is one, since a random model would hardly ever say </s>."""
        return [self.vocabulary.eos, *range(24, VOCABULARY, 24)]


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
DECODERS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **of: LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=2048, **of),
    "mistral": lambda **of: MistralConfig(
        head_dim=16, max_position_embeddings=32768, sliding_window=1500, rope_theta=10000.0, **of
    ),
    "qwen2": lambda **of: Qwen2Config(
        max_position_embeddings=2048, rope_theta=1e6, sliding_window=2048, max_window_layers=1, **of
    ),
}
TOWERS: dict[str, Callable[..., PretrainedConfig]] = {
    "clip": lambda **of: CLIPVisionConfig(projection_dim=24, **of),
    "siglip": lambda **of: SiglipVisionConfig(vision_use_head=False, **of),
}


def make(
    decoder: str = "llama",
    tower: str = "clip",
    *,
    layer: int | list[int] = -2,
    strategy: str = "default",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
    seed: int = 0,
) -> Model:
    """A model of these kinds, its numbers such that `dtype` holds them."""
    vocabulary = qwen2() if decoder == "qwen2" else llama()
    vision = TOWERS[tower](
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision,
        DECODERS[decoder](**SIZES, tie_word_embeddings=tied),
        image_token_index=vocabulary.image,
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    drawn = DrawnWeights(config, seed, named=vocabulary.size)
    return Model(config, {name: tensor.to(dtype) for name, tensor in drawn.all()}, vocabulary)


# ---- folders


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def hugging_face(
    folder: Path,
    model: Model,
    *,
    before: bool = False,
    kind: layouts.Kind = "safetensors",
    shard_bytes: int | None = None,
    processor: str = "clip",
) -> Path:
    """`LlavaForConditionalGeneration`, with names and config.json as they were `before` 4.52 or are since."""
    test_tokenizer.write(folder, model.vocabulary.files)
    tensors = (
        (layouts.hugging_face_before(name) if before else name, tensor)
        for name, tensor in model.tensors.items()
    )
    layouts.write_weights(folder, tensors, kind, shard_bytes)
    config = model.config
    if before:
        text, vision = config.text_config.to_diff_dict(), config.vision_config.to_diff_dict()
        decoder = type(config.text_config).__name__.replace("Config", "ForCausalLM")
        raw = {
            "ignore_index": -100,
            "image_token_index": config.image_token_index,
            "model_type": "llava",
            "pad_token_id": model.vocabulary.pad,
            "projector_hidden_act": "gelu",
            "text_config": text | {"_name_or_path": "a/b", "architectures": [decoder]},
            "tie_word_embeddings": config.tie_word_embeddings,
            "torch_dtype": "float16",
            "transformers_version": "4.36.0.dev0",
            "vision_config": vision,
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "vocab_size": VOCABULARY,
        }
    else:
        raw = config.to_dict() | {"transformers_version": "4.57.6"}
    write_json(folder / "config.json", raw | {"architectures": ["LlavaForConditionalGeneration"]})
    _write_generation(folder, model)
    write_json(
        folder / "preprocessor_config.json", PROCESSORS[processor] | {"processor_class": "LlavaProcessor"}
    )
    return folder


def original(
    folder: Path,
    model: Model,
    *,
    tower_inside: bool = True,
    tower_name: str = CLIP_NAME,
    tokenizer: str = "alone",
    kind: layouts.Kind = "bin",
    shard_bytes: int | None = 100_000,
    **changes: Any,
) -> Path:
    """`LlavaLlamaForCausalLM`; `tokenizer` is of `test_tokenizer.FOLDERS`, `changes` are config.json's."""
    test_tokenizer.write(folder, test_tokenizer.FOLDERS[tokenizer] | {"tokenizer.model": sentencepiece()})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.tensors.items():
            if tower_inside or not name.startswith("model.vision_tower."):
                yield layouts.original(name), tensor
            if name.endswith("self_attn.o_proj.weight"):  # as Llama's shards had before 2023's end
                prefix = layouts.original(name).removesuffix("o_proj.weight")
                yield f"{prefix}rotary_emb.inv_freq", torch.rand(8)

    layouts.write_weights(folder, tensors(), kind, shard_bytes)
    text = model.config.text_config
    raw = {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_tower": tower_name,
        "model_type": "llava",
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
    }
    write_json(folder / "config.json", raw | SIZES | changes)
    _write_generation(folder, model)
    return folder


def tower(folder: Path, model: Model, *, whole: bool, kind: layouts.Kind = "bin") -> Path:
    """The vision tower alone, or the `whole` CLIP that it is a half of; float32, and its pixels as CLIP's."""
    folder.mkdir(parents=True)
    vision = model.config.vision_config
    tensors = {
        layouts.tower(name): tensor.float()
        for name, tensor in model.tensors.items()
        if name.startswith("model.vision_tower.")
    }
    tensors["vision_model.embeddings.position_ids"] = torch.arange((SIZE // PATCH) ** 2 + 1)[None]
    raw = vision.to_dict() | {"architectures": ["CLIPVisionModel"]}
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 99}
        config = CLIPConfig(text | {"num_attention_heads": 2}, vision.to_dict(), projection_dim=24)
        tensors = CLIPModel(config).state_dict() | tensors
        raw = config.to_dict() | {"architectures": ["CLIPModel"]}
    layouts.write_weights(folder, tensors.items(), kind)
    write_json(folder / "config.json", raw)
    write_json(folder / "preprocessor_config.json", PUBLISHED_CLIP)
    return folder


# CLIP's of 2021, whose sizes are numbers
PUBLISHED_CLIP = {
    "crop_size": SIZE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIZE,
}


def _write_generation(folder: Path, model: Model) -> None:
    raw = {
        "_from_model_config": True,
        "bos_token_id": model.vocabulary.bos,
        "eos_token_id": model.ends,
        "pad_token_id": model.vocabulary.pad,
        "transformers_version": "4.36.0.dev0",
    }
    write_json(folder / "generation_config.json", raw)
