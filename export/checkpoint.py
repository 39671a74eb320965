"""A checkpoint folder -> configuration, weights to be read, tokenizer and the manifest's facts.

Two kinds of folder are read. Hugging Face's, `LlavaForConditionalGeneration`: any vision tower that AutoModel
knows, a decoder of `decoder.KINDS`, names of tensors as transformers writes them before and since 4.52. And
the original LLaVA's and DualFocus's, `LlavaLlamaForCausalLM`: their tower is in the shards, or in a folder or
Hub repository of its own, which the configuration names. Both with safetensors or PyTorch's ``.bin`` files.

A folder may have ``dualfocus.json``, in which a checkpoint declares what no other file says::

    name            str   default: the folder's name
    prompts         dict  any of `Prompts`' fields; the others stay those of `turns`' table
    coordinates     "original" | "padded" | "model"   default: "original", as DualFocus was trained
    box             dict (`BoxFormat`) | null         default: DualFocus's; null for "model" coordinates
    select          "reference" | "answer"            default: "reference"
    max_new_tokens  int                               default: 128
    fit             "pad" | "crop" | "stretch"        default: what the preprocessor does
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)
from transformers.modeling_utils import no_init_weights

import dualfocus.export.nano_tower  # noqa: F401  registers the built-in model's tower with AutoModel
from dualfocus import __version__
from dualfocus.export import decoder, hub
from dualfocus.export.errors import ExportError, first_line
from dualfocus.export.tokenizer import load as load_tokenizer
from dualfocus.export.weights import FLOATS, Renames, StoredWeights, Weights, places, read_json
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.manifest import (
    FORMAT_VERSION,
    ON_DEVICE,
    BoxFormat,
    CacheType,
    CoordinateSpace,
    Manifest,
    Precision,
    Target,
    TokenSpec,
)
from dualfocus.runtime.turns import CHATML, DUALFOCUS

DEFAULTS = {"select": "reference", "max_new_tokens": 128}
BICUBIC = 3  # Pillow's number for it, which preprocessor files use
EMBEDDINGS, HEAD, NORM = (
    "model.language_model.embed_tokens.weight",
    "lm_head.weight",
    "model.language_model.norm.weight",
)

# Hugging Face's names before 4.52 -> since then; the newer ones match none of them
HUGGING_FACE: Renames = (
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"vision_tower\.", "model.vision_tower."),
    (r"multi_modal_projector\.", "model.multi_modal_projector."),
)
ORIGINAL: Renames = (
    (r"model\.vision_tower\.vision_tower\.", "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
)
TOWER: Renames = ((r"vision_model\.", "model.vision_tower.vision_model."),)

# The tower of all published LLaVA-1.5 and DualFocus checkpoints, which may be in the shards and nowhere else.
KNOWN_TOWER = "openai/clip-vit-large-patch14-336"
KNOWN_TOWER_CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_TOWER_PROCESSOR = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": BICUBIC,
    "size": 336,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: what it says of itself, and its weights, still on disk."""

    name: str
    config: LlavaConfig
    weights: Weights
    tokenizer: Tokenizer
    tokens: TokenSpec
    preprocessor: dict[str, Any]
    declared: dict[str, Any] | None  # what dualfocus.json says, if there is one
    architecture: str

    @cached_property
    def skeleton(self) -> LlavaForConditionalGeneration:
        """transformers' model without memory: names, shapes, and what is tied to what."""
        with torch.device("meta"):
            return LlavaForConditionalGeneration(self.config).eval()

    @property
    def tied(self) -> bool:
        """Whether one table embeds tokens and scores them."""
        return self.skeleton.lm_head.weight is self.skeleton.get_input_embeddings().weight

    @cached_property
    def names(self) -> list[str]:
        """Of the tensors that the model needs, in its order."""
        return [
            name
            for name, tensor in self.skeleton.state_dict().items()
            if tensor.is_floating_point() and not (name == HEAD and self.tied)
        ]

    @cached_property
    def model(self) -> LlavaForConditionalGeneration:
        """All of it in memory as transformers runs it, float32. Other runtimes are compared with it."""
        with no_init_weights():
            model = LlavaForConditionalGeneration(self.config).eval()
        tensors = {name: self.weights.read(name) for name in self.names}
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(
            bos_token_id=self.tokens.bos, eos_token_id=list(self.tokens.eos)
        )
        return model


def load(folder: Path, name: str | None = None, vision_tower: str | None = None) -> Checkpoint:
    """Read all but the weights of the checkpoint in `folder`, and see that these are there.

    It is called `name`, by default as the folder is. `vision_tower`, a folder or a Hub id, replaces the one
    that an original checkpoint names. Raises ExportError where there is no checkpoint, one of another kind,
    or one that lacks something.
    """
    raw = read_json(folder / "config.json", f"{folder} is not a checkpoint folder")
    architectures = raw.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else "none"
    if architecture == "LlavaForConditionalGeneration":
        if vision_tower is not None:
            raise ExportError(f"{folder} has its vision tower inside, so --vision-tower cannot be given")
        config, weights, preprocessor = _hugging_face(folder, raw)
    elif architecture == "LlavaLlamaForCausalLM":
        config, weights, preprocessor = _original(folder, raw, vision_tower)
    else:
        raise ExportError(
            f"{folder} holds the architecture {architecture}, expected LlavaForConditionalGeneration "
            "or LlavaLlamaForCausalLM"
        )
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32  # in which all of it is computed, whatever it is stored in
    declared = None
    if (folder / "dualfocus.json").exists():
        declared = read_json(folder / "dualfocus.json", "")
    tokenizer, bos, eos = load_tokenizer(folder)
    tokens = TokenSpec(bos, _ends(folder, config, eos))
    checkpoint = Checkpoint(
        name or folder.resolve().name,
        config,
        weights,
        tokenizer,
        tokens,
        preprocessor,
        declared,
        architecture,
    )
    _check_weights(folder, checkpoint)
    rows, highest = config.text_config.vocab_size, max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ExportError(f"the tokenizer gives ids up to {highest}, the model knows {rows} tokens")
    return checkpoint


_Parts = tuple[LlavaConfig, StoredWeights, dict[str, Any]]


def _hugging_face(folder: Path, raw: dict[str, Any]) -> _Parts:
    path = folder / "preprocessor_config.json"
    if not path.exists() and (folder / "processor_config.json").exists():  # since transformers 5
        preprocessor = read_json(folder / "processor_config.json", "").get("image_processor")
        if not isinstance(preprocessor, dict):
            raise ExportError(f"{folder / 'processor_config.json'} describes no image processor")
    else:
        preprocessor = read_json(path, f"{folder} lacks its image processor")
    text = raw.get("text_config")
    if isinstance(text, dict) and isinstance(rope := text.get("rope_parameters"), dict):  # transformers 5's
        theta = {key: rope[key] for key in ("rope_theta",) if key in rope}
        raw = raw | {"text_config": text | theta | {"rope_scaling": rope}}
    with _described(folder):
        config = LlavaConfig.from_dict(raw)
    if config.text_config.model_type not in decoder.KINDS:
        raise ExportError(
            f"the language model is of type {config.text_config.model_type!r}, "
            f"expected one of {', '.join(decoder.KINDS)}"
        )
    return config, StoredWeights(places(folder, HUGGING_FACE)), preprocessor


@contextmanager
def _described(folder: Path) -> Iterator[None]:
    """Raise ExportError where transformers makes no model of the configuration, whatever it raises."""
    try:
        yield
    except Exception as error:
        raise ExportError(f"{folder / 'config.json'} describes no model: {first_line(error)}") from None


def _original(folder: Path, raw: dict[str, Any], vision_tower: str | None) -> _Parts:
    """The original LLaVA's configuration as Hugging Face's, and the weights of its two parts."""
    expected: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
        "mm_patch_merge_type": ("flat", None),
    }
    for key, values in expected.items():
        if raw.get(key) not in values:
            wanted = " or ".join(repr(value) for value in values if value is not None)
            raise ExportError(f"{folder / 'config.json'}: {key} is {raw.get(key)!r}, expected {wanted}")
    for key, kind in (("mm_vision_tower", str), ("mm_vision_select_layer", int)):
        if not isinstance(raw.get(key), kind):
            raise ExportError(
                f"{folder / 'config.json'}: {key} is {raw.get(key)!r}, expected a {kind.__name__}"
            )
    sources = [places(folder, ORIGINAL)]
    inside = any(name.startswith("model.vision_tower.") for name in sources[0])
    name = raw["mm_vision_tower"]
    if vision_tower is None and inside and Path(name).name == Path(KNOWN_TOWER).name:
        vision, preprocessor = CLIPVisionConfig(**KNOWN_TOWER_CONFIG), dict(KNOWN_TOWER_PROCESSOR)
    else:
        tower = _find_tower(folder, vision_tower or name)
        vision = _vision_config(tower)
        preprocessor = read_json(tower / "preprocessor_config.json", f"{tower} lacks its image processor")
        if vision_tower is not None:
            sources.insert(0, places(tower, TOWER))
        elif not inside:
            sources.append(places(tower, TOWER))
    if raw.get("image_aspect_ratio") == "pad":
        preprocessor["do_pad"] = True
    if raw.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ExportError(
            f"{folder / 'config.json'}: mm_hidden_size is {raw['mm_hidden_size']!r}, "
            f"expected the vision tower's {vision.hidden_size}"
        )
    text = {key: value for key, value in raw.items() if key not in ("model_type", "architectures")}
    with _described(folder):
        config = LlavaConfig(
            vision,
            LlamaConfig(**text),
            vision_feature_layer=raw["mm_vision_select_layer"],
            vision_feature_select_strategy="full"
            if raw.get("mm_vision_select_feature") == "cls_patch"
            else "default",
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    return config, StoredWeights(*sources), preprocessor


def _find_tower(folder: Path, name: str) -> Path:
    """The folder of the tower called `name`: a path, in or beside the checkpoint's, or on the Hub."""
    places = [Path(name), folder / Path(name).name, folder.parent / Path(name).name]
    for place in places:
        if (place / "config.json").is_file():
            return place
    try:
        return hub.fetch(name)[0]
    except ExportError as error:
        raise ExportError(
            f"{folder} needs the vision tower {name}, expected beside it or as --vision-tower: {error}"
        ) from None


def _vision_config(tower: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(tower, local_files_only=True)
    except Exception as error:  # whatever is no configuration that transformers knows
        raise ExportError(f"{tower / 'config.json'} describes no vision tower: {first_line(error)}") from None
    return getattr(config, "vision_config", config)  # CLIP's has a text tower beside it


def _ends(folder: Path, config: LlavaConfig, eos: int | None) -> tuple[int, ...]:
    """The tokens that end a reply: the generation's, else the tokenizer's."""
    generation = GenerationConfig.from_model_config(config)
    if (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_dict(read_json(folder / "generation_config.json", ""))
    ends = eos if generation.eos_token_id is None else generation.eos_token_id
    if ends is None or ends == []:
        raise ExportError(f"{folder} names no end-of-sequence token")
    return (ends,) if isinstance(ends, int) else tuple(ends)


def _check_weights(folder: Path, checkpoint: Checkpoint) -> None:
    """Raise ExportError where a tensor is missing, or of another shape or type than expected."""
    with _described(folder):
        expected = checkpoint.skeleton.state_dict()
    found, dtypes = checkpoint.weights.shapes, checkpoint.weights.dtypes
    if missing := [name for name in checkpoint.names if name not in found]:
        raise ExportError(f"{folder} lacks {len(missing)} of the model's weights, the first {missing[0]}")
    for name in checkpoint.names:
        if found[name] != (shape := tuple(expected[name].shape)):
            raise ExportError(
                f"{folder}: {name} has shape {found[name]}, expected {shape} as the configuration says"
            )
        if dtypes[name] not in FLOATS:
            raise ExportError(
                f"{folder}: {name} is of type {dtypes[name]}, expected one of {', '.join(FLOATS)}"
            )


def describe(
    checkpoint: Checkpoint,
    *,
    ragged_append: bool,
    precision: Precision = "fp32",
    target: Target = "onnxruntime",
    cache: CacheType | None = None,
    coordinates: CoordinateSpace | None = None,
    revision: str | None = None,
) -> Manifest:
    """The manifest of the bundle to be written, its `files` still empty.

    `cache` None is float32, and float16 for a device, where it can be nothing else.
    `coordinates` overrides what the checkpoint's boxes are taken to be fractions of: without a declaration,
    of the picture for those called DualFocus, and for others, as LLaVA-1.5 was trained, of the padded square.
    """
    if target in ON_DEVICE:
        if precision not in ("fp16", "int4"):
            raise ExportError(
                f"--target {target} computes in float16, got --precision {precision}, expected fp16 or int4"
            )
        if cache == "float32":
            raise ExportError(f"--target {target} computes in float16, and so keeps keys and values")
        cache = "float16"
    if target == "cuda":  # ONNX Runtime's for CUDA does not know the input that ragged appends need
        ragged_append = False
    declared = checkpoint.declared or {}
    known = {"name", "prompts", "box", "fit", "coordinates", *DEFAULTS}
    if unknown := sorted(declared.keys() - known):
        raise ExportError(
            f"dualfocus.json: unknown key {unknown[0]!r}, expected one of {', '.join(sorted(known))}"
        )
    image = _image(checkpoint)
    image |= {"fit": declared.get("fit", image["fit"])}
    if coordinates is None:
        stock = checkpoint.declared is None and "dualfocus" not in checkpoint.name.lower()
        coordinates = "padded" if stock and image["fit"] != "stretch" else "original"
        coordinates = declared.get("coordinates", coordinates)
    config, prompts = checkpoint.config, declared.get("prompts", {})
    table = DUALFOCUS
    if CHATML.reply.endswith(checkpoint.tokenizer.id_to_token(checkpoint.tokens.eos[0]) or "\n"):
        table = CHATML
    box = None if coordinates == "model" else dataclasses.asdict(BoxFormat())
    raw = {
        "format_version": FORMAT_VERSION,
        "name": declared.get("name", checkpoint.name),
        "created_by": f"dualfocus {__version__}",
        "source": {
            "checkpoint": checkpoint.name,
            "architecture": checkpoint.architecture,
            "vision_tower": config.vision_config.model_type,
            "language_model": config.text_config.model_type,
        }
        | ({"revision": revision} if revision else {}),
        "precision": precision,
        "target": target,
        "image": image,
        "decoder": dataclasses.asdict(
            decoder.describe(
                config.text_config,
                vocabulary=checkpoint.skeleton.lm_head.out_features,
                ragged_append=ragged_append,
                cache=cache or "float32",
            )
        ),
        "tokens": dataclasses.asdict(checkpoint.tokens),
        "prompts": dataclasses.asdict(table) | prompts if isinstance(prompts, dict) else prompts,
        "box": declared.get("box", box),
        "coordinates": coordinates,
        **{key: declared.get(key, default) for key, default in DEFAULTS.items()},
        "files": {},
    }
    try:
        manifest = Manifest.from_dict(raw)
    except BundleError as error:  # every other field was made above, so dualfocus.json is what is wrong
        raise ExportError(str(error).replace("manifest.json", "dualfocus.json", 1)) from None
    _check_reply(manifest, checkpoint.tokenizer)
    return manifest


def _image(checkpoint: Checkpoint) -> dict[str, Any]:
    """`ImageSpec` as a dict, from the preprocessor's file and the tower."""
    processor, size = checkpoint.preprocessor, checkpoint.config.vision_config.image_size
    expected = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": BICUBIC}
    for key, value in expected.items():
        if processor.get(key, value) != value:
            raise ExportError(f"preprocessor_config.json: {key} is {processor[key]!r}, expected {value!r}")
    if abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ExportError(
            f"preprocessor_config.json: rescale_factor is {processor['rescale_factor']}, expected 1/255"
        )
    target, cut = processor.get("size"), processor.get("do_center_crop", True)
    if processor.get("do_pad"):
        fit = "pad"
    elif isinstance(target, dict) and "height" in target:  # else it is the shortest edge that is resized
        fit = "stretch"
    elif cut:
        fit = "crop"
    else:
        raise ExportError(
            "preprocessor_config.json: neither do_pad nor do_center_crop is set, expected one of them, "
            "or a size of height and width"
        )
    for key in ("size", "crop_size") if cut else ("size",):
        value = processor.get(key, size)
        if set(value.values() if isinstance(value, dict) else [value]) != {size}:
            raise ExportError(f"preprocessor_config.json: {key} is {value}, expected the tower's {size}")
    for key in ("image_mean", "image_std"):
        if key not in processor:
            raise ExportError(f"preprocessor_config.json: {key} is missing")
    try:
        features = checkpoint.skeleton.model.get_image_features(torch.zeros(1, 3, size, size, device="meta"))
    except Exception as error:  # whatever a layer that is none makes transformers raise
        raise ExportError(
            f"the configuration selects no features of the tower: {first_line(error)}"
        ) from None
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
