"""The built-in model: its sizes, its tokenizer, and what each cell of a view shows.

nano comes in three `SIZES`, which share a tower, as LLaVA's 7B and 13B do. It sees `IMAGE.size`² pixels
as `GRID` x `GRID` cells, one image token each. A cell that holds the centre of an object is asked for nine
*slots*: the object's kind and colour, its box in hundredths of the view, and its label's three letters where
the view resolves them. Slots exist in training only: they are the tower's dense labels and the symbols the
decoder learns to look things up in before it sees pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dualfocus.kernels import crop_resize_u8
from dualfocus.runtime.geometry import Box, Crop, convert
from dualfocus.runtime.manifest import ImageSpec, Prompts
from dualfocus.runtime.turns import DUALFOCUS
from dualfocus.train.curate import Dialogue
from dualfocus.train.scenes import ALPHABET, COLOURS, KINDS, Pixels, Scene

GRID = 8
IMAGE = ImageSpec(size=160, tokens=GRID * GRID, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), fit="pad")

# slot names and their number of classes; class 0 of a word slot means "none"
SLOTS = {"kind": len(KINDS) + 1, "colour": len(COLOURS) + 1}
SLOTS |= dict.fromkeys(("x0", "y0", "x1", "y1"), 100)
SLOTS |= dict.fromkeys(("first", "second", "third"), len(ALPHABET) + 1)

SIZES = {"nano": 4, "nano-s": 3, "nano-l": 7}  # layers of the decoder
HIDDEN, HEADS = 192, 4

LEGIBLE = 6.0  # cap height in view pixels from which letters can be told apart


def view_pixels(picture: NDArray[np.uint8], crop: Crop) -> NDArray[np.uint8]:
    """The view (S, S, 3) u8 of a crop of a picture (H, W, 3) u8, as the runtime makes it."""
    return crop_resize_u8(picture, crop, IMAGE.size, fit=IMAGE.pad_colour)


def to_view(crop: Crop, box: Pixels) -> Pixels:
    """A box in pixels of the picture as fractions of the crop's padded square; may reach beyond [0, 1]."""
    x, y = crop[:2]
    inside = Box(box[0] - x, box[1] - y, box[2] - x, box[3] - y, "pixels")
    return convert(inside, "padded", crop[2] - x, crop[3] - y, IMAGE).corners


def view_cells(scene: Scene, crop: Crop) -> NDArray[np.int64]:
    """(GRID², 9) slot classes of a view; cells without an object's centre are all zero."""
    cells = np.zeros((GRID * GRID, len(SLOTS)), np.int64)
    side = max(crop[2] - crop[0], crop[3] - crop[1])
    for thing in scene.things:
        if not (crop[0] <= thing.x < crop[2] and crop[1] <= thing.y < crop[3]):
            continue
        x0, y0, x1, y1 = to_view(crop, thing.box)
        column, row = int((x0 + x1) / 2 * GRID), int((y0 + y1) / 2 * GRID)
        hundredths = [min(99, max(0, round(v * 100))) for v in (x0, y0, x1, y1)]
        legible = thing.cap / side * IMAGE.size >= LEGIBLE
        letters = [ALPHABET.index(c) + 1 if legible else 0 for c in thing.label]
        cells[row * GRID + column] = [
            KINDS.index(thing.kind) + 1,
            list(COLOURS).index(thing.colour) + 1,
            *hundredths,
            *letters,
        ]
    return cells


def asked_cell(crop: Crop, dialogue: Dialogue) -> int | None:
    """The cell of a view that holds the centre of the one object asked about, if there is one."""
    if dialogue.category == "count" or (dialogue.category == "existence" and dialogue.answer == "no"):
        return None
    x0, y0, x1, y1 = to_view(crop, dialogue.box)
    return int((y0 + y1) / 2 * GRID) * GRID + int((x0 + x1) / 2 * GRID)


PROMPTS = Prompts(
    system="",
    user="USER: {turn} ASSISTANT:",
    reply=" {answer}</s>",
    image="<image>",
    macro=DUALFOCUS.macro,
    locate=DUALFOCUS.locate,
    micro=DUALFOCUS.micro,
    select=DUALFOCUS.micro,
    hint="",
)

# A box is nine tokens, four of them chosen: " [0." "12" ", 0." "34" ", 0." "56" ", 0." "78" "]".
# Letters and digits of a label stand alone, so that a label is spelled and not looked up.
_WORDS = r" ?\[[01]\.|, [01]\.|(?<=[01]\.)\d\d|\]| ?[A-Z0-9](?![a-z])| ?[A-Za-z]+| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE over the words of the drawn world; any other text falls back to its bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than there is to merge: every word below becomes one token
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    # not special: they are read back as text
    tokenizer.add_tokens(["USER:", "ASSISTANT:"])
    return tokenizer


def box_text(scene: Scene, box: Pixels) -> str:
    """The reply that names `box`, given in pixels: hundredths of the padded square, 0.99 at most."""
    fractions = to_view((0, 0, scene.width, scene.height), box)
    return "[" + ", ".join(f"{min(0.99, max(0.0, v)):.2f}" for v in fractions) + "]"


def build_model(tokenizer: Tokenizer, size: str, seed: int) -> LlavaForConditionalGeneration:
    """One of `SIZES` with fresh weights, float32: 1.4 M in the tower, 0.44 M in each decoder layer."""
    from dualfocus.export.nano_tower import NanoVisionConfig

    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=SIZES[size],
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        # half of a head's 48 dimensions hardly turn within the context, and have room for kinds and colours
        rope_theta=1e6,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )
    config = LlavaConfig(
        vision_config=NanoVisionConfig(),
        text_config=text,
        image_token_id=tokenizer.token_to_id("<image>"),
        image_token_index=tokenizer.token_to_id("<image>"),
        image_seq_length=IMAGE.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        _look_things_up(model, tokenizer)
    return model


def waves() -> torch.Tensor:
    """(100, 10) sines and cosines of a number in hundredths: near numbers are alike, far ones are not."""
    angle = torch.arange(100)[:, None] / 100 * math.tau * 2.0 ** torch.arange(-1, 4)
    return torch.cat([angle.sin(), angle.cos()], -1)


def save_checkpoint(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, name: str, folder: Path
) -> None:
    """Write the model as a Hugging Face checkpoint that `dualfocus export` takes, weights in float16."""
    model.eval().half().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_pad": True,
        "do_resize": True,
        "size": {"height": IMAGE.size, "width": IMAGE.size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE.mean,
        "image_std": IMAGE.std,
    }
    declared = {
        "name": name,
        "prompts": dataclasses.asdict(PROMPTS),
        "coordinates": "padded",
        "select": "reference",
        "max_new_tokens": 16,
    }
    for name, content in (("preprocessor_config.json", processor), ("dualfocus.json", declared)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def turn(hidden: int, number: int = 0) -> torch.Tensor:
    """A fixed rotation (hidden, hidden), one of many: image tokens start out as turned words."""
    generator = torch.Generator().manual_seed(number)
    return torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0]


def _look_things_up(model: LlavaForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Start the decoder off as a look-up machine, which is most of what it will have to be.

    Embeddings: all tokens share a direction, words of one sort another, a plural resembles its singular
    and a number its neighbours. One head of layer 0 gathers the kinds and colours before a token. A head in
    layers 1 and 2 looks with them for the cells that show them, and takes over their words; three more in
    layer 2 look at the same cells for letters and for what they learn to take. Image tokens start out as
    words turned by `turn`, so that a word looks at cells and not at words.
    """
    text = model.config.text_config
    hidden, size, heads = text.hidden_size, text.head_dim, text.num_attention_heads
    rotation = turn(hidden)
    table = model.get_input_embeddings().weight

    def rows(words: list[str]) -> list[int]:
        return [tokenizer.token_to_id(tokenizer.encode(w, add_special_tokens=False).tokens[0]) for w in words]

    kinds, colours = rows([f" {kind}" for kind in KINDS]), rows([f" {colour}" for colour in COLOURS])
    letters = rows([f" {c}" for c in ALPHABET])
    numbers = [tokenizer.token_to_id(f"{n:02d}") for n in range(100)]
    things = torch.linalg.qr(table[kinds + colours].T)[0].T  # (20, hidden): all that kinds and colours span
    table[rows([f" {kind}s" for kind in KINDS])] += table[kinds]
    table[rows(list(ALPHABET))] += table[letters]
    table[numbers] = waves() @ torch.randn(10, hidden) * (0.05 / 5**0.5)
    sorts = torch.randn(5, hidden) * 0.05
    for sort, alike in zip(sorts, (kinds, colours, letters, numbers, rows([" yes", " no"])), strict=True):
        table[alike] += sort
    table[rows([f" {kind}s" for kind in KINDS])] += sorts[0]
    shared = torch.randn(hidden) * 0.05
    table += shared
    shared /= shared.norm()
    spelled = torch.linalg.qr((table[letters] - table[letters].mean(0)).T)[0].T  # (22, hidden)

    # within a head, the dimensions that rotary positions hardly turn
    still = torch.cat([torch.arange(size // 4, size // 2), torch.arange(3 * size // 4, size)])

    def head(
        layer: int, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gain: float
    ) -> None:
        """Make a head attend by `query` and `key`, and write the directions it reads by `value`."""
        attention, first = model.model.language_model.layers[layer].self_attn, number * size
        rows_of = slice(first, first + size)
        for part, wanted in ((attention.q_proj, query), (attention.k_proj, key)):
            part.weight[rows_of] *= 0.2
            part.weight[first + still[: len(wanted)]] = wanted
        attention.v_proj.weight[first : first + len(value)] = value
        attention.o_proj.weight[:, first : first + len(value)] = (
            gain * (value @ rotation if layer else value).T
        )

    for layer in model.model.language_model.layers:  # all else starts by adding nothing
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    gather = (shared[None], sorts[:2].sum(0, keepdim=True) / sorts[:2].sum(0).norm())
    head(0, heads - 1, *gather, things, 0.18)
    for layer in (1, 2):
        head(layer, 0, things, things @ rotation.T, things @ rotation.T, 0.12)
    head(2, 1, things, things @ rotation.T, spelled @ rotation.T, 0.12)
    for number in (2, 3):  # what these take over is learned: numbers
        head(2, number, things, things @ rotation.T, things[:0], 0.0)


def _corpus() -> Iterator[str]:
    yield from (PROMPTS.locate, PROMPTS.micro)
    for number in range(100):
        yield f" [0.{number:02d}, 0.{number:02d}] [1.00, 1.00]"
    yield " ".join(("", *ALPHABET)) + ALPHABET
    for kind in KINDS:
        yield f" {kind} {kind}s"
    for colour in COLOURS:
        yield f" {colour}"
    yield (
        "What color is the? What shape is the object? What is written on the? Is there a left of above?"
        " What is the first last character on? larger than leftmost rightmost topmost lowest"
        " How many objects are there? yes no 0 1 2 3 4 5 6 7 8 9"
    )
