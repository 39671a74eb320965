"""What a bundle says about itself: ``manifest.json`` as frozen dataclasses.

A bundle is a folder::

    manifest.json     written last; a folder without one is not a bundle
    vision.onnx       pixel_values (N, 3, S, S) f32 -> image_features (N, T, D) f32 (tower and projector)
    decoder.onnx      one call appends embeddings to the KV cache, see `DecoderSpec`
    embeddings.npy    (vocabulary, D) f32 or f16, memory-mapped: row i embeds token i
    tokenizer.json    of the `tokenizers` library

ONNX external data is in a file next to its graph, listed in `Manifest.files` like everything else.
Head counts, sizes, dtypes, prompts and coordinates come from here and from nowhere else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.files import convert

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

# Bounds, so that no damaged number or text costs all memory or time.
Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Layers = Annotated[int, Meta(ge=1, le=1 << 10)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 24)]
Unit = Annotated[float, Meta(ge=0, le=1)]
Deviation = Annotated[float, Meta(ge=1e-3, le=1e3)]
Text = Annotated[str, Meta(max_length=20_000)]
FileName = Annotated[str, Meta(min_length=1, max_length=255)]


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: its size is checked at every opening, its hash by `inspect --verify`."""

    size: Annotated[int, Meta(ge=0, le=1 << 45)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


Files = Annotated[dict[FileName, FileEntry], Meta(max_length=1000)]


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes `size` x `size` pixels, and how many tokens those become."""

    size: Count
    tokens: Count
    mean: tuple[Unit, Unit, Unit]
    std: tuple[Deviation, Deviation, Deviation]
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
    ``logits_at`` (B, K) i64, the positions in S whose logits are requested; with `ragged_append` also
    ``query_seqlens`` (B,) i32, how many of the S new positions each row really has (right-padded);
    ``past_key_values.{i}.key`` and ``.value`` (B, kv_heads, capacity, head_size) of `dtype`.

    Outputs: ``logits`` (B, K, vocabulary) f32; ``present.{i}.key`` and ``.value``, which may be bound
    to the very buffers of the past: the cache is updated in place and its capacity never changes.

    For a GPU (`ON_DEVICE`), nothing but token ids goes in or out. In place of ``inputs_embeds`` there are
    ``tokens`` (B, S) i64 and ``images`` (I, hidden) f16: a token of `vocabulary` + i is row i of the images.
    ``logits_at`` counts positions through all rows: those of row b begin at b x S.
    The other outputs are, for each position, ``best`` (B, K) i64, the likeliest token, ``peak`` (B, K)
    f32, its logit, and ``logsumexp`` (B, K) f32.
    """

    layers: Layers
    hidden: Count
    heads: Count
    kv_heads: Count
    head_size: Count
    vocabulary: Count
    context: Count  # tokens the positions reach
    dtype: CacheType  # of keys and values
    ragged_append: bool  # appends of S > 1 to a non-empty cache in batches > 1


@dataclass(frozen=True)
class Prompts:
    """The protocol's turns as text. Placeholders: {Q}, the question's first line; {T}, the whole question.

    A rendered dialogue is ``system``, then for every turn ``user`` with {turn} filled in and, where
    answered, ``reply`` with {answer}; ``image`` marks where an image's tokens stand.
    """

    system: Text
    user: Text
    reply: Text
    image: Text
    macro: Text
    locate: Text
    micro: Text
    select: Text
    hint: Text  # appended to a one-line question as its second line; empty where the model needs none

    def check(self) -> None:
        """Raise BundleError if a placeholder is missing, a turn does not show exactly one image, or no end
        token can follow a reply."""
        holders = {"user": "{turn}", "reply": "{answer}"}
        holders |= dict.fromkeys(("macro", "locate", "micro", "select"), self.image)
        for name, holder in holders.items():
            if not holder or getattr(self, name).count(holder) != 1:
                raise BundleError(f"manifest.json: prompts.{name} does not hold {holder!r:.60} exactly once")
        if self.image in self.user:
            raise BundleError(f"manifest.json: prompts.user holds {self.image!r:.60}, which is the turn's")
        if self.reply.endswith("{answer}"):
            raise BundleError("manifest.json: prompts.reply ends with '{answer}', not with an end token")


@dataclass(frozen=True)
class BoxFormat:
    """How a checkpoint writes a box of fractions; the defaults are how DualFocus checkpoints do.

    `text` has the placeholders {x0}, {y0}, {x1}, {y1}, each a number of `decimals` places in 0..1.
    """

    text: Text = "[{x0}, {y0}, {x1}, {y1}]"
    decimals: Annotated[int, Meta(ge=1, le=4)] = 2

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


@dataclass(frozen=True)
class TokenSpec:
    """Special tokens: `bos` opens every dialogue (None: nothing does), any of `eos` ends a reply."""

    bos: TokenId | None
    eos: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=1000)]


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself."""

    format_version: int
    name: Text
    created_by: Text  # "dualfocus 0.1.0"
    source: dict[Text, Text]  # where the weights came from: checkpoint, architecture, revision …
    precision: Precision  # of the weights; what goes in and out is float32, `ON_DEVICE` float16
    target: Target  # what the graphs are made for, which says their operators and the decoder's inputs
    image: ImageSpec
    decoder: DecoderSpec
    tokens: TokenSpec
    prompts: Prompts
    coordinates: CoordinateSpace  # what the model's box numbers are fractions (or pixels) of
    box: BoxFormat | None  # None: box replies are decoded freely, as pixels ("model") always are
    select: SelectRule
    max_new_tokens: Count
    files: Files

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Manifest:
        """Build from parsed JSON. Raises BundleError naming the first field that is wrong."""
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            step = "update dualfocus" if newer else "export it again with `dualfocus export …`"
            raise BundleError(f"bundle format {version!r:.60}, expected {FORMAT_VERSION}: {step}")
        manifest = convert(raw, cls, BundleError, "manifest.json")
        if unknown := _unknown(raw, manifest.to_dict()):
            raise BundleError(f"manifest.json: unknown field {unknown!r:.80}")
        manifest.prompts.check()
        manifest._check_box()
        manifest._check_tokens()
        return manifest

    def _check_box(self) -> None:
        if self.box is None:
            return
        if self.coordinates == "model":
            raise _wrong(
                "box", self.box.text, "null where coordinates is 'model', for these are no fractions"
            )
        self.box.check()

    def _check_tokens(self) -> None:
        most = self.decoder.vocabulary - 1
        if self.tokens.bos is not None and self.tokens.bos > most:
            raise _wrong("tokens.bos", self.tokens.bos, f"a token from 0 to {most}")
        for i, token in enumerate(self.tokens.eos):
            if token > most:
                raise _wrong(f"tokens.eos.{i}", token, f"a token from 0 to {most}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict(to_dict(m)) == m``."""
        return dataclasses.asdict(self)


def _unknown(raw: Mapping[str, Any], known: Mapping[str, Any], path: str = "") -> str | None:
    """The first field of `raw`, by its path, that is not in `known`."""
    for name, value in raw.items():
        if name not in known:
            return f"{path}{name}"
        if isinstance(value, dict) and (found := _unknown(value, known[name], f"{path}{name}.")):
            return found
    return None


def _wrong(path: str, raw: object, expected: str) -> BundleError:
    return BundleError(f"manifest.json: {path} is {raw!r:.60}, expected {expected}")
