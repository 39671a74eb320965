"""A `Shape` -> a checkpoint in memory: random weights, and a tokenizer as Llama's.

Weights are scaled so that logits spread like a trained model's: the best leads the second by about a
half, where Hugging Face's initialisation leaves an argmax to rounding. One seed gives one model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from dualfocus.export.checkpoint import EMBEDDINGS, HEAD, Checkpoint
from dualfocus.export.config import ImageProcessor
from dualfocus.export.shapes import Shape
from dualfocus.runtime.manifest import TokenSpec
from dualfocus.runtime.turns import DUALFOCUS

SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]  # ids 0 to 3
BOS, EOS, IMAGE = 1, 2, 3

# Logits spread by 2 (see `random_model`). Rows that no token names are scaled down, as untrained rows of
# real models are, so that none of them wins; </s> is scaled up, so that replies end: on `edge`, twelve
# questions about two pictures were answered in 1 to 14 tokens.
NAMELESS_SCALE, EOS_SCALE = 0.25, 3.0
# Attention scores spread by 4, and MLPs add twice as much. With 1 and 1, attention averages an image's 576
# tokens to one and the same state: whatever it was asked, `edge` repeated one token without end.
QUERY_SCALE, MLP_SCALE = 4.0, 2.0

# What the tokenizer knows whole. The prompts come from the protocol itself.
QUESTIONS = """\
What is written on the red star? What number is on the bus? What does the sign say?
What is the name of the shop on the left? What is the license plate number of the white car?
What brand is the laptop? What time does the clock show? What is the title of the book on the table?
Which word is on the yellow label of the bottle? What is the first word on the poster?
How many people are in the picture? How many blue circles are there? How many dogs are playing?
How many windows does the house have? How many chairs are around the table?
Is there a green square? Is there a cat on the sofa? Is the man wearing a hat? Are the lights on?
Is it raining? Is the door open or closed? Are there any trees behind the building?
Does the woman have long hair? Does the plate have food on it? Can you see a bicycle in the image?
What color is the umbrella? What colour are the shoes of the girl? What is the shape of the mirror?
What is the boy holding in his right hand? What is the person on the bench doing?
What animal is standing near the fence? What kind of fruit is in the bowl? What sport is being played?
What is the material of the floor? What is behind the small black bag? What is on top of the fridge?
Where is the dog? Where was this photo taken? Who is driving the truck? Why is the street wet?
Which side of the road is the train on? Which one is larger, the orange ball or the purple box?
Is the cup to the left or to the right of the spoon? Is the bird above or below the branch?
When was the stamp printed? What year is shown on the coin? What is the price of the banana?
Describe the logo on the shirt. Read the text at the bottom of the page. Name the player with the ball.
Yes. No. Two, three, four, five. Red, green, blue, white, black, brown, grey, pink.
"""


def random_checkpoint(shape: Shape, seed: int = 0) -> Checkpoint:
    """The model of `shape` with DualFocus' prompts, as if it had been read from a folder."""
    tokenizer, config = make_tokenizer(shape.vocabulary), make_config(shape)
    return Checkpoint(
        name=f"random weights, seed {seed}",
        config=config,
        weights=DrawnWeights(config, seed, named=tokenizer.get_vocab_size()),
        tokenizer=tokenizer,
        tokens=TokenSpec(BOS, (EOS,)),
        preprocessor=msgspec.convert(make_preprocessor(shape), ImageProcessor),
        declared={"name": shape.name},
        architecture="LlavaForConditionalGeneration",
    )


class DrawnWeights:
    """`Weights` made as they are read, in the model's order: what is passed over is kept until it is read."""

    def __init__(self, config: LlavaConfig, seed: int, named: int | None = None) -> None:
        """Of `named` tokens the tokenizer knows, if that is given, one is to lead everywhere."""
        with torch.device("meta"):
            parameters = dict(LlavaForConditionalGeneration(config).named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.dtypes = dict.fromkeys(self.shapes, "F32")
        self.identity = f"{config.to_json_string()}, seed {seed}"
        self._scores = HEAD if HEAD in self.shapes else EMBEDDINGS
        self._named, self._drawn = named, self._draw(torch.Generator().manual_seed(seed))
        self._waiting: dict[str, Tensor] = {}

    def all(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, in the model's order."""
        return self._drawn

    def read(self, name: str) -> Tensor:
        while name not in self._waiting:
            self._waiting |= [next(self._drawn)]
        return self._waiting.pop(name)

    def _draw(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        for name, shape in self.shapes.items():
            weight = torch.empty(shape).normal_(generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.mul_(0.1).add_(1)
            elif name in (EMBEDDINGS, HEAD):
                weight.mul_(2 * shape[1] ** -0.5)  # a normed state's logits then spread by 2
            elif weight.dim() > 1:
                weight.mul_(weight[0].numel() ** -0.5)  # variance kept from input to output
            else:
                weight.mul_(0.1)
            if name.endswith("self_attn.q_proj.weight") and "language_model" in name:
                weight.mul_(QUERY_SCALE)
            elif name.endswith("mlp.down_proj.weight"):
                weight.mul_(MLP_SCALE)
            elif name == self._scores and self._named is not None:
                weight[self._named :] *= NAMELESS_SCALE
                weight[EOS] *= EOS_SCALE
            yield name, weight


def random_model(shape: Shape, seed: int = 0) -> LlavaForConditionalGeneration:
    """A float32 model of `shape` in evaluation mode, its tokens numbered as in `SPECIAL`."""
    model = LlavaForConditionalGeneration(make_config(shape)).eval()
    model.load_state_dict(dict(DrawnWeights(model.config, seed).all()), strict=False)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS)
    return model


def make_config(shape: Shape) -> LlavaConfig:
    """transformers' configuration of `shape`."""
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=shape.tower_mlp,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        attention_bias=shape.bias,
        mlp_bias=shape.bias,
        rope_theta=shape.rope_theta,
        rope_scaling=shape.rope_scaling,
        rms_norm_eps=1e-5,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaConfig(
        vision,
        text,
        image_token_index=IMAGE,
        image_seq_length=shape.image_tokens,
        vision_feature_layer=shape.feature_layer,
        vision_feature_select_strategy=shape.feature_strategy,
        tie_word_embeddings=shape.tied,
    )


def make_preprocessor(shape: Shape) -> dict[str, Any]:
    """``preprocessor_config.json`` of CLIP's processor, with LLaVA's padding unless the shape crops."""
    processor: dict[str, Any] = CLIPImageProcessor(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    ).to_dict()
    processor["resample"] = int(processor["resample"])
    return processor if shape.crop else processor | {"do_pad": True}


def make_tokenizer(vocabulary: int) -> Tokenizer:
    """A SentencePiece-type BPE of at most `vocabulary` tokens, trained on the prompts and `QUESTIONS`.

    What it has of Llama's: "▁" for a space and before every text, digits one by one, 256 bytes for
    characters it does not know, ids (special tokens, bytes, pieces). So the prompts take about as many
    tokens as in Llama's.
    """
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
            # a word or a sign with the space before it, or a digit without
            pre_tokenizers.Split(Regex(r"▁?\p{L}+|\p{N}|▁?[^\p{L}\p{N}▁]|▁"), "isolated"),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) - len(bytes_),
        initial_alphabet=["▁", *map(chr, range(0x21, 0x7F))],
        show_progress=False,
    )
    prompts = [text.replace("</s>", "") for text in dataclasses.asdict(DUALFOCUS).values()]
    # a newline is a byte in Llama's, so none is shown
    lines = "\n".join([*prompts, "[0.12, 0.34, 0.56, 0.78]", QUESTIONS]).replace("<image>", "").splitlines()
    trained.train_from_iterator(lines, trainer)
    learnt = json.loads(trained.to_str())["model"]

    pieces = [*SPECIAL, *bytes_, *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[(left, right) for left, right in learnt["merges"]],
            unk_token=SPECIAL[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
