"""A checkpoint folder -> configuration, weights to be read, tokenizer and the manifest's facts.

Two kinds of folder are read. Hugging Face's, `LlavaForConditionalGeneration`: any vision tower that AutoModel
builds of plain numbers, a decoder of `decoder.KINDS`, names of tensors as transformers writes them before and
since 4.52. And the original LLaVA's and DualFocus's, `LlavaLlamaForCausalLM`: their tower is in the shards,
or in a folder or Hub repository of its own, which the configuration names. Both with safetensors or PyTorch's
``.bin`` files. No library reads a folder's JSON files: `config` does, into types.

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

import copy
import dataclasses
import inspect
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from msgspec import UNSET
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
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
from dualfocus.export import config as files
from dualfocus.export import decoder, hub, source
from dualfocus.export.config import ImageProcessor, lengths
from dualfocus.export.errors import ExportError
from dualfocus.export.tokenizer import load as load_tokenizer
from dualfocus.export.weights import FLOATS, Renames, StoredWeights, Weights, places
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.libraries import foreign, printable, quiet
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
_IMAGE_SIZE = 8192  # pixels a side, at most
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
KNOWN_TOWER_PROCESSOR = ImageProcessor(
    crop_size=336,
    do_center_crop=True,
    do_normalize=True,
    do_resize=True,
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
    resample=BICUBIC,
    size=336,
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: what it says of itself, and its weights, still on disk."""

    name: str
    config: LlavaConfig
    weights: Weights
    tokenizer: Tokenizer
    tokens: TokenSpec
    preprocessor: ImageProcessor
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


@quiet()
def load(folder: Path, name: str | None = None, vision_tower: str | None = None) -> Checkpoint:
    """Read all but the weights of the checkpoint in `folder`, and see that these are there.

    It is called `name`, by default as the folder is. `vision_tower`, a folder or a Hub id, replaces the one
    that an original checkpoint names. Raises ExportError where there is no checkpoint, one of another kind,
    or one that lacks something.
    """
    architecture = source.check_folder(folder)
    if architecture == source.HUGGING_FACE:
        if vision_tower is not None:
            raise ExportError(f"{folder} has its vision tower inside, so --vision-tower cannot be given")
        config, weights, preprocessor = _hugging_face(folder)
    else:
        config, weights, preprocessor = _original(folder, vision_tower)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32  # in which all of it is computed, whatever it is stored in
    declared = None
    if (folder / "dualfocus.json").exists():
        declared = files.read(folder / "dualfocus.json", dict[str, Any])
    _check_sizes(folder, config, weights)
    tokenizer, bos, eos = load_tokenizer(folder)
    rows, highest = config.text_config.vocab_size, max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ExportError(f"the tokenizer gives ids up to {highest}, the model knows {rows} tokens")
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
    return checkpoint


_Parts = tuple[LlavaConfig, StoredWeights, ImageProcessor]


def _hugging_face(folder: Path) -> _Parts:
    raw = files.read(folder / "config.json", files.LlavaDescription)
    text = raw.text_config or files.TextConfig()
    if text.model_type not in decoder.KINDS:
        raise ExportError(
            f"the language model is of type {text.model_type!r}, expected one of {', '.join(decoder.KINDS)}"
        )
    vision = raw.vision_config
    with _described(folder):
        config = LlavaConfig(
            None if vision is None else _vision_config(folder, {"model_type": "clip_vision_model"} | vision),
            CONFIG_MAPPING[text.model_type](**text.arguments()),
            **raw.arguments(),
        )
    return config, StoredWeights(places(folder, HUGGING_FACE)), files.read_processor(folder)


def _described(folder: Path) -> AbstractContextManager[None]:
    """Raise ExportError where transformers makes no model of the configuration, whatever it raises."""
    return foreign(f"{folder / 'config.json'} describes no model", ExportError)


def _vision_config(folder: Path, raw: dict[str, Any]) -> PretrainedConfig:
    """transformers' configuration of the tower that `raw`, of the config.json in `folder`, describes.

    Of it go numbers, words and short lists to the arguments that the class has by name: none of those may
    make transformers load anything (a kernel, a backbone).
    """
    path, kind = folder / "config.json", raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ExportError(
            f"{path}: the vision tower is of type {kind!r:.80}, which transformers does not know"
        )
    make = CONFIG_MAPPING[kind]
    known = {*inspect.signature(make.__init__).parameters, "vision_use_head"}  # the latter is SigLIP's
    if any("backbone" in name for name in known):
        raise ExportError(f"{path}: the vision tower is of type {kind!r}, which is built of another model")
    given = {name: value for name, value in raw.items() if name in known and not isinstance(value, dict)}
    plain = files.convert(given, dict[str, files.Plain], str(path))
    most = files.LAYERS
    for name, value in plain.items():
        if "layers" in name and isinstance(value, int) and value > most:
            raise ExportError(f"{path}: {name} of the vision tower is {value}, expected at most {most}")
    with foreign(f"{path} describes no vision tower", ExportError):
        return make(**plain)


def _original(folder: Path, vision_tower: str | None) -> _Parts:
    """The original LLaVA's configuration as Hugging Face's, and the weights of its two parts."""
    path = folder / "config.json"
    raw = files.read(path, files.OriginalDescription)
    expected: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
        "mm_patch_merge_type": ("flat", None),
    }
    for key, values in expected.items():
        if getattr(raw, key) not in values:
            wanted = " or ".join(repr(value) for value in values if value is not None)
            raise ExportError(f"{path}: {key} is {getattr(raw, key)!r}, expected {wanted}")
    name, layer = raw.mm_vision_tower, raw.mm_vision_select_layer
    if name is None or layer is None:
        missing = "mm_vision_tower" if name is None else "mm_vision_select_layer"
        raise ExportError(f"{path} has no {missing}, expected LLaVA's")
    sources = [places(folder, ORIGINAL)]
    inside = any(of.startswith("model.vision_tower.") for of in sources[0])
    if vision_tower is None and inside and Path(name).name == Path(KNOWN_TOWER).name:
        vision, preprocessor = CLIPVisionConfig(**KNOWN_TOWER_CONFIG), copy.copy(KNOWN_TOWER_PROCESSOR)
    else:
        tower = _find_tower(folder, vision_tower or name)
        files.check_no_code(tower)
        of_tower = files.read(tower / "config.json", dict[str, Any])
        part = of_tower.get("vision_config")  # CLIP's has a text tower beside it
        if isinstance(part, dict):
            older = of_tower.get("vision_config_dict")  # which goes before
            kind = f"{of_tower.get('model_type', 'clip')}_vision_model"
            of_tower = {"model_type": kind} | part | (older if isinstance(older, dict) else {})
        vision = _vision_config(tower, of_tower)
        preprocessor = files.read_processor(tower)
        if vision_tower is not None:
            sources.insert(0, places(tower, TOWER))
        elif not inside:
            sources.append(places(tower, TOWER))
    if raw.image_aspect_ratio == "pad":
        preprocessor.do_pad = True
    width = getattr(vision, "hidden_size", None)
    if raw.mm_hidden_size not in (None, width):
        raise ExportError(
            f"{path}: mm_hidden_size is {raw.mm_hidden_size}, expected the vision tower's {width}"
        )
    with _described(folder):
        config = LlavaConfig(
            vision,
            LlamaConfig(**raw.arguments()),
            vision_feature_layer=layer,
            vision_feature_select_strategy="full"
            if raw.mm_vision_select_feature == "cls_patch"
            else "default",
            tie_word_embeddings=raw.tie_word_embeddings is True,
        )
    return config, StoredWeights(*sources), preprocessor


def _find_tower(folder: Path, name: str) -> Path:
    """The folder of the tower called `name`: a path, in or beside the checkpoint's, or on the Hub."""
    places = [Path(name), folder / Path(name).name, folder.parent / Path(name).name]
    for place in places:
        if os.path.isfile(place / "config.json"):
            return place
    try:
        return hub.fetch(name)[0]
    except ExportError as error:
        raise ExportError(
            f"{folder} needs the vision tower {name:.200}, expected beside it or as --vision-tower: {error}"
        ) from None


def _ends(folder: Path, config: LlavaConfig, eos: int | None) -> tuple[int, ...]:
    """The tokens that end a reply: the generation's, else the tokenizer's."""
    path = folder / "generation_config.json"
    if path.exists():
        ends = files.read(path, files.GenerationFile).eos_token_id
    else:
        ends = config.eos_token_id if config.eos_token_id is not None else config.text_config.eos_token_id
    if ends is None:
        ends = eos
    found = tuple(dict.fromkeys([ends] if isinstance(ends, int) else ends or []))
    if not found:
        raise ExportError(f"{folder} names no end-of-sequence token")
    rows = config.text_config.vocab_size
    if wrong := [end for end in found if not 0 <= end < rows]:
        raise ExportError(
            f"{folder}: eos_token_id holds {wrong[0]}, expected ids of the model's {rows} tokens"
        )
    return found


def _check_sizes(folder: Path, config: LlavaConfig, weights: Weights) -> None:
    """Raise ExportError where the configuration's layers or vocabulary are not those of the weights.

    Before anything of these sizes is built.
    """
    for part, pattern, whose in (
        (config.text_config, r"model\.language_model\.layers\.(\d+)\.", "language model"),
        (config.vision_config, r"model\.vision_tower\.(?:\w+\.)*?layers?\.(\d+)\.", "vision tower"),
    ):
        found = {match[1] for name in weights.shapes if (match := re.match(pattern, name))}
        layers = getattr(part, "num_hidden_layers", None)
        if found and isinstance(layers, int) and layers > len(found):
            raise ExportError(
                f"{folder / 'config.json'}: num_hidden_layers of the {whose} is {layers}, "
                f"the weights have {len(found)}"
            )
    table = weights.shapes.get(EMBEDDINGS)
    expected = (config.text_config.vocab_size, config.text_config.hidden_size)
    if table is not None and table != expected:
        raise ExportError(
            f"{folder}: {EMBEDDINGS} has shape {table}, expected {expected} as the configuration says"
        )


def _check_weights(folder: Path, checkpoint: Checkpoint) -> None:
    """Raise ExportError where a tensor is missing, or of another shape or type than expected."""
    with _described(folder):
        expected = checkpoint.skeleton.state_dict()
    found, dtypes = checkpoint.weights.shapes, checkpoint.weights.dtypes
    wrong = [
        name
        for name in checkpoint.names
        if found.get(name) != tuple(expected[name].shape) or dtypes[name] not in FLOATS
    ]
    if not wrong:
        return
    if method := source.quantized_tensors(found):
        raise ExportError(f"{folder} {source.quantized(method)}")
    if missing := [name for name in wrong if name not in found]:
        raise ExportError(f"{folder} lacks {len(missing)} of the model's weights, the first {missing[0]}")
    name = wrong[0]
    if found[name] != (shape := tuple(expected[name].shape)):
        raise ExportError(
            f"{folder}: {name} has shape {found[name]}, expected {shape} as the configuration says"
        )
    raise ExportError(f"{folder}: {name} is of type {dtypes[name]}, expected one of {', '.join(FLOATS)}")


@quiet()
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
            f"dualfocus.json: unknown key {unknown[0]!r:.60}, expected one of {', '.join(sorted(known))}"
        )
    image = _image(checkpoint)
    image |= {"fit": declared.get("fit", image["fit"])}
    if coordinates is None:
        stock = checkpoint.declared is None and "dualfocus" not in checkpoint.name.lower()
        coordinates = "padded" if stock and image["fit"] != "stretch" else "original"
        coordinates = declared.get("coordinates", coordinates)
    config, prompts = checkpoint.config, declared.get("prompts", {})
    table = CHATML if _speaks_chatml(checkpoint) else DUALFOCUS
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
        raise ExportError(printable(str(error)).replace("manifest.json", "dualfocus.json", 1)) from None
    return _with_end_of_reply(manifest, checkpoint)


def _speaks_chatml(checkpoint: Checkpoint) -> bool:
    """Whether replies end as ChatML's do.

    Qwen2's files may list <|endoftext|> first or alone, which ends a document.
    """
    tokenizer, ends = checkpoint.tokenizer, checkpoint.tokens.eos
    chatml, dualfocus = (
        tokenizer.token_to_id(table.reply[len("{answer}") :]) for table in (CHATML, DUALFOCUS)
    )
    return chatml is not None and (chatml in ends or dualfocus not in ends)


def _image(checkpoint: Checkpoint) -> dict[str, Any]:
    """`ImageSpec` as a dict, from the preprocessor's file and the tower."""
    processor, size = checkpoint.preprocessor, getattr(checkpoint.config.vision_config, "image_size", None)
    if not isinstance(size, int) or not 1 <= size <= _IMAGE_SIZE:
        raise ExportError(
            f"config.json: image_size of the vision tower is {size!r}, expected 1 to {_IMAGE_SIZE}"
        )
    expected = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": BICUBIC}
    for key, value in expected.items():
        if (given := getattr(processor, key)) not in (value, UNSET):
            raise ExportError(f"preprocessor_config.json: {key} is {given!r}, expected {value!r}")
    factor = 1 / 255 if processor.rescale_factor is UNSET else processor.rescale_factor
    if factor is None or abs(factor * 255 - 1) > 1e-6:
        raise ExportError(f"preprocessor_config.json: rescale_factor is {factor}, expected 1/255")
    cut = processor.do_center_crop in (True, UNSET)
    if processor.do_pad is True:
        fit = "pad"
    elif processor.resizes_both_sides:  # else it is the shortest edge that is resized
        fit = "stretch"
    elif cut:
        fit = "crop"
    else:
        raise ExportError(
            "preprocessor_config.json: neither do_pad nor do_center_crop is set, expected one of them, "
            "or a size of height and width"
        )
    for key in ("size", "crop_size") if cut else ("size",):
        if (found := lengths(getattr(processor, key))) not in (set(), {size}):
            given = " x ".join(map(str, sorted(found)))
            raise ExportError(f"preprocessor_config.json: {key} is {given}, expected the tower's {size}")
    for key in ("image_mean", "image_std"):
        if getattr(processor, key) is UNSET:
            raise ExportError(f"preprocessor_config.json: {key} is missing")
    with foreign("the configuration selects no features of the tower", ExportError):
        features = checkpoint.skeleton.model.get_image_features(torch.zeros(1, 3, size, size, device="meta"))
    return {
        "size": size,
        "tokens": features[0].shape[0],
        "mean": processor.image_mean,
        "std": processor.image_std,
        "fit": fit,
    }


def _with_end_of_reply(manifest: Manifest, checkpoint: Checkpoint) -> Manifest:
    """`manifest`, with the token that ends a reply in its prompts among those that end one.

    A reply in the history must end the way the model ends one, or losses are over the wrong tokens. Raises
    ExportError where it ends with no special token.
    """
    tokenizer, reply, ends = checkpoint.tokenizer, manifest.prompts.reply, manifest.tokens.eos
    with foreign("the tokenizer makes no tokens of prompts.reply", ExportError):
        found = tokenizer.encode(reply.replace("{answer}", "a"), add_special_tokens=False).ids
    end = found[-1] if found else -1
    if end in ends:
        return manifest
    token = tokenizer.get_added_tokens_decoder().get(end)
    if token is not None and token.special and reply.endswith(token.content):
        return dataclasses.replace(manifest, tokens=dataclasses.replace(manifest.tokens, eos=(*ends, end)))
    names = ", ".join(repr(tokenizer.id_to_token(of) or of) for of in ends[:3])
    if isinstance((checkpoint.declared or {}).get("prompts"), dict):
        raise ExportError(
            f"dualfocus.json: prompts.reply ends with {reply[-20:]!r}, "
            f"which is none of the model's end tokens: {names}"
        )
    raise ExportError(
        f"the model ends its replies with {names}, and no prompts for that are known: put dualfocus.json "
        'into the checkpoint\'s folder, with its own as {"prompts": {"system": "…", "user": "…{turn}…", '
        f'"reply": "{{answer}}{tokenizer.id_to_token(ends[-1])}"}}}}'
    )
