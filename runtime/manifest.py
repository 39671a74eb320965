"""What a bundle says about itself: ``manifest.json`` as frozen dataclasses.

A bundle is a folder::

    manifest.json     written last; a folder without one is not a bundle
    vision.onnx       pixel_values (N, 3, S, S) f32 -> image_features (N, T, D) f32 (tower and projector)
    decoder.onnx      one call appends embeddings to the KV cache, see `DecoderSpec`
    embeddings.npy    (vocabulary, D) f32 or f16, memory-mapped: row i embeds token i
    tokenizer.json    of the `tokenizers` library

ONNX external data lies beside its graph and is listed in `Manifest.files` like everything else.
Head counts, sizes, dtypes, prompts and coordinates come from here and from nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from dualfocus.runtime.errors import BundleError

FORMAT_VERSION = 4

Fit = Literal["pad", "crop", "stretch"]
CoordinateSpace = Literal["original", "padded", "model"]
SelectRule = Literal["reference", "answer"]
CacheType = Literal["float32", "float16"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
Target = Literal["onnxruntime", "onnx-standard", "cuda", "tensorrt"]
ON_DEVICE: tuple[Target, ...] = (
    "cuda",
    "tensorrt",
)  # graphs of token ids, computing in float16
STANDARD: tuple[Target, ...] = ("onnx-standard", "tensorrt")  # a decoder of standard operators alone


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: its size is checked at every opening, its hash by `inspect --verify`."""

    size: int
    sha256: str


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes `size` x `size` pixels, and how many tokens those become."""

    size: int
    tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    # "pad": to a square with the mean colour; "crop": shortest edge to `size`, then centre crop; "stretch":
    # each side to `size`
    fit: Fit

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """What "pad" fills with: the processor's mean as bytes, truncated as the original does."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue


@dataclass(frozen=True)
class DecoderSpec:
    """The decoder graph's contract.

    Inputs: ``inputs_embeds`` (B, S, hidden) f32; ``seqlens_k`` (B,) i32, valid tokens including the
    new ones, minus one; ``total_sequence_length`` () i32, the longest row's valid tokens;
    ``logits_at`` (B, K) i64, the positions in S whose logits are wanted; with `ragged_append` also
    ``query_seqlens`` (B,) i32, how many of the S new positions each row really has (right-padded);
    ``past_key_values.{i}.key`` and ``.value`` (B, kv_heads, capacity, head_size) of `dtype`.

    Outputs: ``logits`` (B, K, vocabulary) f32; ``present.{i}.key`` and ``.value``, which may be bound
    to the very buffers of the past: the cache is updated in place and its capacity never changes.

    For a GPU (`ON_DEVICE`), nothing but token ids goes in or out. In place of ``inputs_embeds`` there are
    ``tokens`` (B, S) i64 and ``images`` (I, hidden) f16: a token of `vocabulary` + i is row i of the images.
    ``logits_at`` counts positions through all rows: those of row b begin at b x S.
    Beside the logits there are, of each position, ``best`` (B, K) i64, the likeliest token, ``peak`` (B, K)
    f32, its logit, and ``logsumexp`` (B, K) f32.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int  # tokens the positions reach
    dtype: CacheType  # of keys and values
    ragged_append: bool  # appends of S > 1 to a non-empty cache in batches > 1


@dataclass(frozen=True)
class Prompts:
    """The protocol's turns as text. Placeholders: {Q}, the question's first line; {T}, the whole question.

    A rendered dialogue is ``system``, then for every turn ``user`` with {turn} filled in and, where
    answered, ``reply`` with {answer}; ``image`` marks where an image's tokens stand.
    """

    system: str
    user: str
    reply: str
    image: str
    macro: str
    locate: str
    micro: str
    select: str
    hint: str  # appended to a one-line question as its second line; empty where the model needs none

    def check(self) -> None:
        """Raise BundleError if a placeholder is missing, a turn does not show exactly one image, or no end
        token can follow a reply."""
        holders = {"user": "{turn}", "reply": "{answer}"}
        holders |= dict.fromkeys(("macro", "locate", "micro", "select"), self.image)
        for name, holder in holders.items():
            if not holder or getattr(self, name).count(holder) != 1:
                raise BundleError(
                    f"manifest.json: field prompts.{name} does not hold {holder!r} exactly once"
                )
        if self.image in self.user:
            raise BundleError(f"manifest.json: field prompts.user holds {self.image!r}, which is the turn's")
        if self.reply.endswith("{answer}"):
            raise BundleError(
                "manifest.json: field prompts.reply ends with '{answer}', not with an end token"
            )


@dataclass(frozen=True)
class BoxFormat:
    """How a checkpoint writes a box of fractions; the defaults are how DualFocus checkpoints do.

    `text` has the placeholders {x0}, {y0}, {x1}, {y1}, each a number of `decimals` places in 0..1.
    """

    text: str = "[{x0}, {y0}, {x1}, {y1}]"
    decimals: int = 2

    def write(self, x0: float, y0: float, x1: float, y1: float) -> str:
        """The reply that names this box."""
        numbers = (f"{number:.{self.decimals}f}" for number in (x0, y0, x1, y1))
        return self.text.format(**dict(zip(("x0", "y0", "x1", "y1"), numbers, strict=True)))

    def check(self) -> None:
        """Raise BundleError for a format whose boxes `geometry.find_region` would not read back."""
        frame, between = r"[^\d{}]*", r",\s*"
        numbers = between.join((r"\{x0\}", r"\{y0\}", r"\{x1\}", r"\{y1\}"))
        if self.text != self.text.strip() or not re.fullmatch(frame + numbers + frame, self.text):
            expected = (
                "{x0}, {y0}, {x1}, {y1} once each in this order, with commas between and no digits around"
            )
            raise _wrong("box.text", self.text, expected)
        if not 1 <= self.decimals <= 4:
            raise _wrong("box.decimals", self.decimals, "1 to 4")


@dataclass(frozen=True)
class TokenSpec:
    """Special tokens: `bos` opens every dialogue (None: nothing does), any of `eos` ends a reply."""

    bos: int | None
    eos: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself."""

    format_version: int
    name: str
    created_by: str  # "dualfocus 0.1.0"
    source: dict[str, str]  # where the weights came from: checkpoint, architecture, revision …
    precision: Precision  # of the weights; what goes in and out is float32, `ON_DEVICE` float16
    target: Target  # what the graphs are made for, which says their operators and the decoder's inputs
    image: ImageSpec
    decoder: DecoderSpec
    tokens: TokenSpec
    prompts: Prompts
    coordinates: CoordinateSpace  # what the model's box numbers are fractions (or pixels) of
    box: BoxFormat | None  # None: box replies are decoded freely, as pixels ("model") always are
    select: SelectRule
    max_new_tokens: int
    files: dict[str, FileEntry]

    @classmethod
    def from_dict(cls, raw: object) -> Manifest:
        """Build from parsed JSON. Raises BundleError naming the first field that is wrong."""
        if not isinstance(raw, dict):
            raise BundleError(f"manifest.json holds a {type(raw).__name__}, expected an object")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            hint = "; a newer dualfocus can read it" if newer else ""
            raise BundleError(f"bundle format version {version!r}, expected {FORMAT_VERSION}{hint}")
        manifest: Manifest = _build(cls, raw, "")
        manifest.prompts.check()
        manifest._check_box()
        manifest._check_numbers()
        return manifest

    def _check_box(self) -> None:
        if self.box is None:
            return
        if self.coordinates == "model":
            raise _wrong(
                "box", self.box.text, "null where coordinates is 'model', for these are no fractions"
            )
        self.box.check()

    def _check_numbers(self) -> None:
        """Raise BundleError for a number of the right type that no model has."""
        image, decoder = self.image, self.decoder
        counts = {
            "image.size": image.size,
            "image.tokens": image.tokens,
            "max_new_tokens": self.max_new_tokens,
        }
        sizes = dataclasses.asdict(decoder).items()
        counts |= {f"decoder.{name}": size for name, size in sizes if type(size) is int}
        for name, number in counts.items():  # bounds, so that no damaged number costs all memory or time
            most = 1 << 10 if name == "decoder.layers" else 1 << 24
            if not 1 <= number <= most:
                raise _wrong(name, number, f"1 to {most}")
        for i, mean in enumerate(image.mean):
            if not 0 <= mean <= 1:  # so that the pad colour is one
                raise _wrong(f"image.mean.{i}", mean, "0 to 1")
        for i, std in enumerate(image.std):
            if not 0 < std < math.inf:
                raise _wrong(f"image.std.{i}", std, "a number above 0")
        if not self.tokens.eos:
            raise _wrong("tokens.eos", [], "one token or more")
        if self.tokens.bos is not None and not 0 <= self.tokens.bos < decoder.vocabulary:
            raise _wrong("tokens.bos", self.tokens.bos, f"a token below {decoder.vocabulary}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict(to_dict(m)) == m``."""
        return dataclasses.asdict(self)


def _build(kind: Any, raw: Any, path: str) -> Any:
    """Check `raw` against the annotation `kind` and build it; `path` names the field in errors."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(raw, dict):
            raise _wrong(path, raw, "an object")
        hints = typing.get_type_hints(kind)
        for name in raw:
            if name not in hints:
                raise BundleError(f"manifest.json: unknown field {path}{name}")
        for name in hints:
            if name not in raw:
                raise BundleError(f"manifest.json: field {path}{name} is missing")
        values = {name: _build(hint, raw[name], f"{path}{name}.") for name, hint in hints.items()}
        return kind(**values)  # type: ignore[operator]
    if origin is Literal:
        if raw not in args:
            raise _wrong(path, raw, "one of " + ", ".join(map(str, args)))
        return raw
    if origin is types.UnionType:
        return None if raw is None else _build(args[0], raw, path)
    if origin is tuple:
        variadic = args[-1] is Ellipsis
        if not isinstance(raw, list | tuple) or (not variadic and len(raw) != len(args)):
            raise _wrong(path, raw, "a list" if variadic else f"a list of {len(args)}")
        return tuple(_build(args[0], item, f"{path}{i}.") for i, item in enumerate(raw))
    if origin is dict:
        if not isinstance(raw, dict):
            raise _wrong(path, raw, "an object")
        return {name: _build(args[1], item, f"{path}{name}.") for name, item in raw.items()}
    if kind is float and type(raw) is int and abs(raw) < 1 << 53:
        return float(raw)
    if type(raw) is not kind:  # not isinstance: True is no layer count
        raise _wrong(
            path, raw, {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind]
        )
    if kind is str and not raw.isascii() and any("\ud800" <= c <= "\udfff" for c in raw):
        raise _wrong(path, raw, "text without surrogates")
    return raw


def _wrong(path: str, raw: object, expected: str) -> BundleError:
    return BundleError(f"manifest.json: field {path.rstrip('.')} is {raw!r:.60}, expected {expected}")
