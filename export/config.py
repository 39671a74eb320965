"""A checkpoint's JSON files as types with bounds, read before any library sees them.

Keys that an export does not use are passed over, whatever they hold: labels, kernels, dtypes. So no number
in a file costs memory or time, and no name in one loads anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from dualfocus.export.errors import ExportError
from dualfocus.runtime import files

T = TypeVar("T")
LIMIT = 16 << 20  # bytes of a JSON file that describes a model
INDEX_LIMIT = 64 << 20  # bytes of a list of tensors or tokens

LAYERS = 1024  # at most

Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Layers = Annotated[int, Meta(ge=1, le=LAYERS)]
LayerIndex = Annotated[int, Meta(ge=-1024, le=1024)]
Id = Annotated[int, Meta(ge=-1, le=1 << 24)]  # -1: none
Context = Annotated[int, Meta(ge=1, le=1 << 20)]  # of which the graph holds two tables
Positive = Annotated[float, Meta(gt=0, le=1e15)]
Name = Annotated[str, Meta(max_length=200)]
_Number = Annotated[int, Meta(ge=-(1 << 24), le=1 << 24)] | Annotated[float, Meta(ge=-1e15, le=1e15)]
Plain = _Number | bool | Name | Annotated[list[_Number | Name | bool], Meta(max_length=LAYERS)] | None

# Files in which a checkpoint may name code of its own; those of a tower are among them.
CODE_MAY_BE_NAMED_IN = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


class Rope(Struct):
    """How positions are scaled; `type` is the key before transformers 4.43."""

    rope_type: Name | UnsetType = UNSET
    type: Name | UnsetType = UNSET
    rope_theta: Positive | UnsetType = UNSET
    factor: Positive | UnsetType | None = UNSET
    original_max_position_embeddings: Size | UnsetType | None = UNSET
    low_freq_factor: Positive | UnsetType = UNSET
    high_freq_factor: Positive | UnsetType = UNSET
    attention_factor: Positive | UnsetType | None = UNSET
    beta_fast: Positive | UnsetType | None = UNSET
    beta_slow: Positive | UnsetType | None = UNSET
    mscale: Positive | UnsetType = UNSET
    mscale_all_dim: Positive | UnsetType = UNSET
    truncate: bool | UnsetType = UNSET

    def as_dict(self) -> dict[str, Any]:
        """transformers' form of today."""
        kind = self.type if self.rope_type is UNSET else self.rope_type
        raw = fields(self)
        raw.pop("type", None)
        raw.pop("rope_theta", None)
        return raw | {"rope_type": "default" if kind is UNSET else kind}


class TextConfig(Struct):
    """A decoder of Llama's kind. What is left out is what transformers' class has by default."""

    model_type: Name = "llama"
    vocab_size: Size | UnsetType = UNSET
    hidden_size: Size | UnsetType = UNSET
    intermediate_size: Size | UnsetType = UNSET
    num_hidden_layers: Layers | UnsetType = UNSET
    num_attention_heads: Size | UnsetType = UNSET
    num_key_value_heads: Size | UnsetType | None = UNSET
    head_dim: Size | UnsetType | None = UNSET
    max_position_embeddings: Context | UnsetType = UNSET
    hidden_act: Name | UnsetType = UNSET
    rms_norm_eps: Positive | UnsetType = UNSET
    rope_theta: Positive | UnsetType | None = UNSET
    rope_scaling: Rope | UnsetType | None = UNSET
    rope_parameters: Rope | UnsetType | None = UNSET  # transformers 5's
    attention_bias: bool | UnsetType = UNSET
    mlp_bias: bool | UnsetType = UNSET
    tie_word_embeddings: bool | UnsetType = UNSET
    sliding_window: Size | UnsetType | None = UNSET
    use_sliding_window: bool | UnsetType | None = UNSET
    max_window_layers: Annotated[int, Meta(ge=0, le=LAYERS)] | UnsetType = UNSET
    layer_types: Annotated[list[Name], Meta(max_length=1024)] | UnsetType | None = UNSET
    bos_token_id: Id | UnsetType | None = UNSET
    eos_token_id: Id | Annotated[list[Id], Meta(max_length=1024)] | UnsetType | None = UNSET
    pad_token_id: Id | UnsetType | None = UNSET

    def arguments(self) -> dict[str, Any]:
        """Of transformers' configuration class."""
        raw = {name: value for name, value in fields(self).items() if name in TextConfig.__struct_fields__}
        for name in ("model_type", "rope_scaling", "rope_parameters"):
            raw.pop(name, None)
        rope = self.rope_parameters or self.rope_scaling
        if isinstance(rope, Rope):
            raw["rope_scaling"] = rope.as_dict()
            if rope.rope_theta is not UNSET:
                raw["rope_theta"] = rope.rope_theta
        if raw.get("rope_theta", 0) is None:
            del raw["rope_theta"]
        return raw


class Described(Struct):
    """What any config.json may say of its model; `architectures` may be missing."""

    architectures: Annotated[list[Name], Meta(max_length=64)] | None = None
    model_type: Name | None = None
    quantization_config: Any = None
    quantization: Any = None  # MLX's
    text_config: Any = None
    vision_config: Any = None
    mm_vision_tower: Any = None


class LlavaDescription(Struct):
    """Hugging Face's LLaVA: ``LlavaForConditionalGeneration``."""

    text_config: TextConfig | None = None
    vision_config: dict[str, Any] | None = None
    image_token_index: Id | UnsetType | None = UNSET
    image_token_id: Id | UnsetType | None = UNSET  # the same, of today
    image_seq_length: Size | UnsetType | None = UNSET
    projector_hidden_act: Name | UnsetType = UNSET
    multimodal_projector_bias: bool | UnsetType = UNSET
    vision_feature_layer: (
        LayerIndex | Annotated[list[LayerIndex], Meta(min_length=1, max_length=64)] | UnsetType
    ) = UNSET
    vision_feature_select_strategy: Name | UnsetType = UNSET
    tie_word_embeddings: bool | UnsetType = UNSET
    bos_token_id: Id | UnsetType | None = UNSET
    eos_token_id: Id | Annotated[list[Id], Meta(max_length=1024)] | UnsetType | None = UNSET
    pad_token_id: Id | UnsetType | None = UNSET

    def arguments(self) -> dict[str, Any]:
        """Of `LlavaConfig`, but for the parts' configurations."""
        raw = fields(self)
        for name in ("text_config", "vision_config"):
            raw.pop(name, None)
        image = raw.pop("image_token_id", None)
        if raw.get("image_token_index") is None:
            raw.pop("image_token_index", None)
            if image is not None:
                raw["image_token_index"] = image
        return {name: value for name, value in raw.items() if value is not None or name.endswith("_id")}


class OriginalDescription(TextConfig):
    """The original LLaVA's and DualFocus's: ``LlavaLlamaForCausalLM``."""

    mm_projector_type: Name | None = None
    mm_vision_select_feature: Name | None = None
    mm_vision_select_layer: LayerIndex | None = None
    mm_vision_tower: Annotated[str, Meta(max_length=4096)] | None = None
    mm_hidden_size: Size | None = None
    mm_use_im_start_end: bool | None = None
    mm_patch_merge_type: Name | None = None
    image_aspect_ratio: Name | None = None


class Sides(Struct):
    """A size as transformers' processors have written it: by sides, or by one edge."""

    height: Size | None = None
    width: Size | None = None
    shortest_edge: Size | None = None
    longest_edge: Size | None = None


Pixels = Size | Annotated[list[Size], Meta(min_length=1, max_length=2)] | Sides
Channels = Annotated[list[Annotated[float, Meta(ge=-1e6, le=1e6)]], Meta(min_length=3, max_length=3)]


class ImageProcessor(Struct):
    """``preprocessor_config.json``, or ``image_processor`` in transformers 5's ``processor_config.json``."""

    image_mean: Channels | UnsetType = UNSET
    image_std: Channels | UnsetType = UNSET
    size: Pixels | UnsetType | None = UNSET
    crop_size: Pixels | UnsetType | None = UNSET
    resample: Annotated[int, Meta(ge=0, le=16)] | UnsetType | None = UNSET
    rescale_factor: Positive | UnsetType | None = UNSET
    do_resize: bool | UnsetType | None = UNSET
    do_rescale: bool | UnsetType | None = UNSET
    do_normalize: bool | UnsetType | None = UNSET
    do_center_crop: bool | UnsetType | None = UNSET
    do_pad: bool | UnsetType | None = UNSET
    do_convert_rgb: bool | UnsetType | None = UNSET
    image_processor_type: Name | UnsetType | None = UNSET

    @property
    def resizes_both_sides(self) -> bool:
        """Whether `size` is a height and a width. A number is the shortest edge in CLIP's processors."""
        if isinstance(self.size, Sides):
            return self.size.height is not None
        if isinstance(self.size, list):
            return len(self.size) == 2
        return isinstance(self.size, int) and str(self.image_processor_type).startswith("Siglip")


class ProcessorFile(Struct):
    """``processor_config.json``."""

    image_processor: ImageProcessor | None = None


class GenerationFile(Struct):
    """``generation_config.json``."""

    eos_token_id: Id | Annotated[list[Id], Meta(max_length=1024)] | None = None


class AddedToken(Struct):
    """A token as it is found in texts."""

    content: Annotated[str, Meta(min_length=1, max_length=1000)]
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | UnsetType = UNSET
    special: bool = False


TokenText = Annotated[str, Meta(max_length=1000)] | AddedToken | None
Tokens = Annotated[list[TokenText], Meta(max_length=10_000)]


class SpecialTokens(Struct):
    """``special_tokens_map.json``, and as much of ``tokenizer_config.json``."""

    bos_token: TokenText | UnsetType = UNSET
    eos_token: TokenText | UnsetType = UNSET
    unk_token: TokenText | UnsetType = UNSET
    sep_token: TokenText | UnsetType = UNSET
    pad_token: TokenText | UnsetType = UNSET
    cls_token: TokenText | UnsetType = UNSET
    mask_token: TokenText | UnsetType = UNSET
    additional_special_tokens: Tokens | UnsetType | None = UNSET


class TokenizerFile(SpecialTokens):
    """``tokenizer_config.json``."""

    tokenizer_class: Name | UnsetType | None = UNSET
    add_bos_token: bool | UnsetType | None = UNSET
    add_eos_token: bool | UnsetType | None = UNSET
    add_prefix_space: bool | UnsetType | None = UNSET
    legacy: bool | UnsetType | None = UNSET
    added_tokens_decoder: dict[Id, AddedToken] | UnsetType = UNSET
    extra_special_tokens: dict[Name, TokenText] | Tokens | UnsetType | None = (
        UNSET  # a list in transformers 5
    )


def lengths(size: int | list[int] | Sides | UnsetType | None) -> set[int]:
    """Every side or edge that a size names."""
    if isinstance(size, Sides):
        return {side for side in msgspec.structs.astuple(size) if side is not None}
    return {size} if isinstance(size, int) else set(size) if isinstance(size, list) else set()


def read(path: Path, kind: type[T], *, limit: int = LIMIT) -> T:
    """The JSON file `path` as a `kind`; raises ExportError as `runtime.files.read_json` does."""
    return files.read_json(path, kind, ExportError, limit=limit)


class StoredToken(AddedToken, kw_only=True):
    """One of `TokenizerJson`'s added tokens."""

    id: Annotated[int, Meta(ge=0, le=1 << 24)]


class _Special(Struct):
    id: Name


class _Piece(Struct):
    SpecialToken: _Special | None = None


class _Ids(Struct):
    ids: Annotated[list[Id], Meta(max_length=16)]


class _Processor(Struct, tag_field="type"):
    """What a tokenizer puts around a text: one of the `tokenizers` library's kinds, by its ``type``."""

    def opening(self) -> int | None:
        """The token that is put before a text."""
        return None


class _Template(_Processor, tag="TemplateProcessing"):
    single: Annotated[list[_Piece], Meta(max_length=16)]
    special_tokens: Annotated[dict[Name, _Ids], Meta(max_length=100)]

    def opening(self) -> int | None:
        special = self.single[0].SpecialToken if self.single else None
        found = self.special_tokens.get(special.id) if special else None
        return found.ids[0] if found and found.ids else None


class _Bert(_Processor, tag="BertProcessing"):
    cls: tuple[Name, Id]

    def opening(self) -> int | None:
        return self.cls[1]


class _Roberta(_Bert, tag="RobertaProcessing"): ...


class _ByteLevel(_Processor, tag="ByteLevel"): ...


class _Processors(_Processor, tag="Sequence"):
    processors: Annotated[list[_Template | _Bert | _Roberta | _ByteLevel], Meta(max_length=16)]

    def opening(self) -> int | None:
        return next((found for of in self.processors if (found := of.opening()) is not None), None)


class TokenizerJson(Struct):
    """Of ``tokenizer.json``, what the other files of a tokenizer are completed with."""

    added_tokens: Annotated[list[StoredToken], Meta(max_length=100_000)] = []
    post_processor: _Template | _Bert | _Roberta | _ByteLevel | _Processors | None = None


AddedTokensFile = dict[Annotated[str, Meta(min_length=1, max_length=1000)], Id]


class Index(Struct):
    """``*.index.json``: the file that each tensor is in."""

    weight_map: dict[str, Annotated[str, Meta(max_length=255)]]


def shards(index: Path) -> dict[str, str]:
    """The file of every tensor that an index lists. Raises ExportError for what is no file beside it."""
    listed = read(index, Index, limit=INDEX_LIMIT).weight_map
    for file in set(listed.values()):
        if not files.is_plain_name(file):
            raise ExportError(f"{index} lists {file!r:.200}, expected a file beside it")
    return listed


def convert(value: object, kind: type[T], name: str) -> T:
    """What was read from JSON already, as a `kind`; raises ExportError as `runtime.files.convert` does."""
    return files.convert(value, kind, ExportError, name)


def read_processor(folder: Path) -> ImageProcessor:
    """The image processor of the checkpoint or tower in `folder`, from either of its two places."""
    path, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.exists() or not nested.exists():
        if not path.exists():
            raise ExportError(f"{folder} lacks its image processor: it has no preprocessor_config.json")
        return read(path, ImageProcessor)
    found = read(nested, ProcessorFile).image_processor
    if found is None:
        raise ExportError(f"{nested} describes no image processor")
    return found


def fields(of: Struct) -> dict[str, Any]:
    """What a file gives, as built-in types, without what it leaves out."""
    raw: dict[str, Any] = msgspec.to_builtins(of)
    return raw


def check_no_code(folder: Path) -> None:
    """Raise ExportError if a file of the checkpoint or tower in `folder` names code of its own to be run.

    transformers would offer to import such code (``auto_map``), and it may make another model than ours.
    """
    for name in CODE_MAY_BE_NAMED_IN:
        path = folder / name
        left = [read(path, object)] if path.exists() else []
        while left:
            value = left.pop()
            left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
            if isinstance(value, dict) and (found := value.get("auto_map")):
                raise ExportError(
                    f"{path} names code of the checkpoint's own ({_first_name(found)!r:.80} in auto_map), "
                    "which is never run here: expected a checkpoint that transformers' own classes read"
                )


def _first_name(found: object) -> object:
    """One of the names in an ``auto_map``."""
    while isinstance(found, dict | list) and found:
        found = next(iter(found.values() if isinstance(found, dict) else found))
    return found
