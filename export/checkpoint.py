"""A Hugging Face LLaVA checkpoint folder -> torch model, tokenizer and the manifest's facts.

What is read: ``config.json`` and the weights (`LlavaForConditionalGeneration`, any vision tower that
AutoModel knows, llama decoder), the tokenizer, ``preprocessor_config.json``, and, where the
folder has one, ``dualfocus.json``, in which a checkpoint declares what no Hugging Face file says::

    name            str   default: the folder's name
    prompts         dict  any of `Prompts`' fields; the others stay the DualFocus table's
    coordinates     "original" | "padded" | "model"   default: "original", as DualFocus was trained
    box             dict (`BoxFormat`) | null         default: DualFocus's; null for "model" coordinates
    select          "reference" | "answer"            default: "reference"
    max_new_tokens  int                               default: 128
    fit             "pad" | "crop"                    default: what the preprocessor does
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlavaForConditionalGeneration

import dualfocus.export.nano_tower  # noqa: F401  registers the built-in model's tower with AutoModel
from dualfocus import __version__
from dualfocus.export import decoder
from dualfocus.export.errors import ExportError, first_line
from dualfocus.export.tokenizer import load as load_tokenizer
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.manifest import FORMAT_VERSION, BoxFormat, Manifest, Precision, TokenSpec
from dualfocus.runtime.turns import DUALFOCUS

DEFAULTS = {"coordinates": "original", "select": "reference", "max_new_tokens": 128}
BICUBIC = 3  # Pillow's number for it, which preprocessor files use


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: float32 model in evaluation mode, tokenizer, and what the folder declares."""

    name: str  # the folder's
    model: LlavaForConditionalGeneration
    tokenizer: Tokenizer
    tokens: TokenSpec
    preprocessor: dict[str, Any]
    declared: dict[str, Any]


def load(folder: Path) -> Checkpoint:
    """Read the checkpoint in `folder`. Raises ExportError where it is none, or one of another kind."""
    config = _read_json(folder / "config.json", f"{folder} is not a checkpoint folder")
    architectures = config.get("architectures") or ["none"]
    if architectures[0] != "LlavaForConditionalGeneration":
        raise ExportError(
            f"{folder} holds the architecture {architectures[0]}, expected LlavaForConditionalGeneration"
        )
    text_type = config.get("text_config", {}).get("model_type", "llama")
    if text_type != "llama":  # before the weights are read, which takes minutes for a large model
        raise ExportError(f"the language model is of type {text_type!r}, expected 'llama'")
    preprocessor = _read_json(folder / "preprocessor_config.json", f"{folder} lacks its image processor")
    declared = {}
    if (folder / "dualfocus.json").exists():
        declared = _read_json(folder / "dualfocus.json", "")
    tokenizer, bos, eos = load_tokenizer(folder)
    model = _load_model(folder)
    ends = model.generation_config.eos_token_id
    ends = eos if ends is None else ends
    ends = [ends] if isinstance(ends, int) else ends
    if not ends:
        raise ExportError(f"{folder} names no end-of-sequence token")
    rows, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ExportError(f"the tokenizer gives ids up to {highest}, the model knows {rows} tokens")
    return Checkpoint(
        folder.resolve().name, model, tokenizer, TokenSpec(bos, tuple(ends)), preprocessor, declared
    )


def describe(checkpoint: Checkpoint, *, ragged_append: bool, precision: Precision = "fp32") -> Manifest:
    """The manifest of the bundle to be written, its `files` still empty."""
    model, declared = checkpoint.model, checkpoint.declared
    known = {"name", "prompts", "box", "fit", *DEFAULTS}
    if unknown := sorted(declared.keys() - known):
        raise ExportError(
            f"dualfocus.json: unknown key {unknown[0]!r}, expected one of {', '.join(sorted(known))}"
        )
    image = _image(checkpoint)
    prompts = declared.get("prompts", {})
    box = None if declared.get("coordinates") == "model" else dataclasses.asdict(BoxFormat())
    raw = {
        "format_version": FORMAT_VERSION,
        "name": declared.get("name", checkpoint.name),
        "created_by": f"dualfocus {__version__}",
        "source": {
            "checkpoint": checkpoint.name,
            "architecture": type(model).__name__,
            "vision_tower": model.config.vision_config.model_type,
            "language_model": model.config.text_config.model_type,
        },
        "precision": precision,
        "image": image | {"fit": declared.get("fit", image["fit"])},
        "decoder": dataclasses.asdict(decoder.describe(model, ragged_append=ragged_append)),
        "tokens": dataclasses.asdict(checkpoint.tokens),
        "prompts": dataclasses.asdict(DUALFOCUS) | prompts if isinstance(prompts, dict) else prompts,
        "box": declared.get("box", box),
        **{key: declared.get(key, default) for key, default in DEFAULTS.items()},
        "files": {},
    }
    try:
        manifest = Manifest.from_dict(raw)
    except BundleError as error:  # every other field was made above, so dualfocus.json is what is wrong
        raise ExportError(str(error).replace("manifest.json", "dualfocus.json", 1)) from None
    _check_reply(manifest, checkpoint.tokenizer)
    return manifest


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(f"{missing}: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ExportError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw


def _load_model(folder: Path) -> LlavaForConditionalGeneration:
    try:
        model, report = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # anything missing, torn or mismatched weights make the library raise
        raise ExportError(f"the weights of {folder} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ExportError(f"{folder} lacks {len(missing)} of the model's weights, the first {missing[0]}")
    return model.eval()


def _image(checkpoint: Checkpoint) -> dict[str, Any]:
    """`ImageSpec` as a dict, from the preprocessor's file and the tower."""
    processor, size = checkpoint.preprocessor, checkpoint.model.config.vision_config.image_size
    expected = {"do_resize": True, "do_normalize": True, "resample": BICUBIC}
    for key, value in expected.items():
        if processor.get(key, value) != value:
            raise ExportError(f"preprocessor_config.json: {key} is {processor[key]!r}, expected {value!r}")
    if abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ExportError(
            f"preprocessor_config.json: rescale_factor is {processor['rescale_factor']}, expected 1/255"
        )
    if processor.get("do_pad"):
        fit, keys = "pad", ["size"]
    elif processor.get("do_center_crop", True):
        fit, keys = "crop", ["size", "crop_size"]
    else:
        raise ExportError(
            "preprocessor_config.json: neither do_pad nor do_center_crop is set, expected one of them"
        )
    for key in keys:
        value = processor.get(key, size)
        if set(value.values() if isinstance(value, dict) else [value]) != {size}:
            raise ExportError(f"preprocessor_config.json: {key} is {value}, expected the tower's {size}")
    for key in ("image_mean", "image_std"):
        if key not in processor:
            raise ExportError(f"preprocessor_config.json: {key} is missing")
    with torch.no_grad():
        features = checkpoint.model.model.get_image_features(torch.zeros(1, 3, size, size))
    return {
        "size": size,
        "tokens": features[0].shape[0],
        "mean": processor["image_mean"],
        "std": processor["image_std"],
        "fit": fit,
    }


def _check_reply(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """A reply in the history must end the way the model ends one, or losses are over the wrong tokens."""
    reply = manifest.prompts.reply
    end = tokenizer.encode(reply.replace("{answer}", "a"), add_special_tokens=False).ids[-1]
    if end not in manifest.tokens.eos:
        raise ExportError(
            f"prompts.reply ends with {tokenizer.id_to_token(end)!r}, "
            f"which is none of the model's end tokens {list(manifest.tokens.eos)}"
        )
