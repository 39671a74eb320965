"""Random-weight LLaVA checkpoints, small enough to build and export in a test.

`build` writes what a real checkpoint folder holds: weights, config, tokenizer, preprocessor and
`dualfocus.json`. The weights are those of `dualfocus export --random`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dualfocus.export import random_weights, shapes

SENTENCES = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "Please provide the bounding box coordinate of the region this question asks: [0.12, 0.34, 0.56, 0.78]",
    "Please combine the information from these two images and answer this question:",
    "Answer the question using a single word or phrase. USER: ASSISTANT:",
    "What is written on the red star? How many blue circles are there? Is there a green square?",
]


@dataclass(frozen=True)
class Shape(shapes.Shape):
    """The sizes of one random model; the defaults are the smallest that exercise grouped-query heads."""

    name: str = "tiny"
    image: int = 56
    patch: int = 14
    tower_layers: int = 3
    tower_width: int = 32
    tower_heads: int = 2
    tower_mlp: int = 64
    feature_layer: int = -2
    feature_strategy: str = "default"
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    mlp: int = 128
    vocabulary: int = 419  # odd on purpose, and more rows than the tokenizer names
    context: int = 1024


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
    model = random_weights.random_model(shape, seed)
    # A random model would hardly ever say </s>: let every 24th token end a reply, so that lengths vary.
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, *range(24, shape.vocabulary, 24)], pad_token_id=0
    )
    return model


def logits(model: LlavaForConditionalGeneration, embeds: np.ndarray) -> np.ndarray:
    """What transformers' language model and head make of (B, S, hidden): (B, S, vocabulary)."""
    with torch.no_grad():
        states = model.language_model(
            inputs_embeds=torch.from_numpy(embeds), use_cache=False
        ).last_hidden_state
        found: np.ndarray = model.lm_head(states).numpy()
    return found


def build(folder: Path, shape: Shape | None = None, *, seed: int = 0, **declared: Any) -> Path:
    """Write the checkpoint of `make_model(shape, seed)` into `folder` and return it.

    `declared` goes into ``dualfocus.json``, where replies are 12 tokens at most unless it says otherwise.
    """
    shape = shape or Shape()
    make_model(shape, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(random_weights.make_preprocessor(shape)))
    (folder / "dualfocus.json").write_text(json.dumps({"name": shape.name, "max_new_tokens": 12} | declared))
    return folder
