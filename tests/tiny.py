"""Random-weight LLaVA checkpoints, small enough to build and export in a test.

`build` writes what a real checkpoint folder holds: weights, config, tokenizer, preprocessor and
`dualfocus.json`. The weights are scaled so that logits spread like a trained model's (a top-two
margin near one), not like Hugging Face's initialisation, whose argmax is a coin toss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "Please provide the bounding box coordinate of the region this question asks: [0.12, 0.34, 0.56, 0.78]",
    "Please combine the information from these two images and answer this question:",
    "Answer the question using a single word or phrase. USER: ASSISTANT:",
    "What is written on the red star? How many blue circles are there? Is there a green square?",
]


@dataclass(frozen=True)
class Shape:
    """The sizes of one random model; the defaults are the smallest that exercise grouped-query heads."""

    image: int = 56
    patch: int = 14
    tower_layers: int = 3
    tower_width: int = 32
    feature_layer: int = -2
    feature_strategy: str = "default"
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    vocabulary: int = 419  # odd on purpose, and more rows than the tokenizer names
    context: int = 1024
    tied: bool = False
    bias: bool = False
    crop: bool = False
    rope_scaling: dict[str, Any] | None = None

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2 + (self.feature_strategy == "full")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 380 tokens: whatever garbage a random model says encodes."""
    backend = Tokenizer(models.BPE(ignore_merges=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def make_model(shape: Shape, seed: int = 0) -> LlavaForConditionalGeneration:
    """A float32 model of that shape in evaluation mode; the same seed gives the same weights."""
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=2 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=2,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        attention_bias=shape.bias,
        mlp_bias=shape.bias,
        rope_scaling=shape.rope_scaling,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision,
        text,
        image_token_index=3,
        image_seq_length=shape.image_tokens,
        vision_feature_layer=shape.feature_layer,
        vision_feature_select_strategy=shape.feature_strategy,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
            elif "embed_tokens" in name or "lm_head" in name:  # one tensor when tied
                weight.copy_(2 * torch.randn(weight.shape, generator=generator) * shape.hidden**-0.5)
            elif weight.dim() > 1:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) * fan_in**-0.5)
            else:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    # A random model would hardly ever say </s>: let every 24th token end a reply, so that lengths vary.
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, *range(24, shape.vocabulary, 24)], pad_token_id=0
    )
    return model


def build(folder: Path, shape: Shape | None = None, *, seed: int = 0, **declared: Any) -> Path:
    """Write the checkpoint of `make_model(shape, seed)` into `folder` and return it.

    `declared` goes into ``dualfocus.json``, where replies are 12 tokens at most unless it says otherwise.
    """
    shape = shape or Shape()
    make_model(shape, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    ).to_dict()
    if not shape.crop:
        processor["do_pad"] = True
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "dualfocus.json").write_text(json.dumps({"name": "tiny", "max_new_tokens": 12} | declared))
    return folder
