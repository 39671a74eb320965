"""Opens ``tokenizer.json`` with the `tokenizers` library, which trusts its file, after checking it.

A file can make that library abort, panic or never end: by padding to 10^9 tokens, replacements that grow the
text, expressions that backtrack, cuts within a character. So the file is read here first. The library is
given only the kinds of parts that exports write, with settings that are harmless. What a bundle never uses
(padding, truncation, and what is put around a text) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from tokenizers import Tokenizer

from dualfocus.runtime.errors import BundleError, InputError
from dualfocus.runtime.files import JSON_LIMIT, convert, decode_json, read_bytes
from dualfocus.runtime.libraries import foreign
from dualfocus.runtime.patterns import is_harmless

GROWTH = 64  # characters that all replacements of a file may make of one
UNUSED = dict.fromkeys(("truncation", "padding", "post_processor"))

Few = Meta(max_length=16)
Short = Annotated[str, Meta(max_length=16)]
Character = Annotated[str, Meta(min_length=1, max_length=1)]


class _Part(msgspec.Struct, tag_field="type"):
    """A part of a tokenizer, by its ``type``. Settings that are not listed pass as they are."""


class _Pattern(msgspec.Struct, forbid_unknown_fields=True):
    String: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    Regex: str | None = None

    def __post_init__(self) -> None:
        if (self.String is None) == (self.Regex is None):
            raise ValueError("a pattern needs one of String and Regex")
        if self.Regex is not None and not is_harmless(self.Regex):
            raise ValueError(f"the expression {self.Regex!r:.80} is none that is known to be harmless")


class _Replace(_Part, tag="Replace"):
    pattern: _Pattern
    content: Short

    @property
    def growth(self) -> float:
        """Characters that one becomes at most; an expression may also match between two."""
        if self.pattern.String is not None:
            return max(1, len(self.content) / len(self.pattern.String))
        return 1 + len(self.content)


class _Prepend(_Part, tag="Prepend"):
    prepend: Short


class _Nfc(_Part, tag="NFC"): ...


class _Nfkc(_Part, tag="NFKC"): ...


class _Normalizers(_Part, tag="Sequence"):
    normalizers: Annotated[list[_Normalizer], Few]


_Normalizer = _Nfc | _Nfkc | _Prepend | _Replace | _Normalizers


class _ByteLevel(_Part, tag="ByteLevel"):
    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool = True


class _Digits(_Part, tag="Digits"):
    individual_digits: bool


class _Metaspace(_Part, tag="Metaspace"):
    replacement: Character
    prepend_scheme: Literal["always", "first", "never"]
    split: bool


class _Split(_Part, tag="Split"):
    pattern: _Pattern
    behavior: Literal["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
    invert: bool


class _PreTokenizers(_Part, tag="Sequence"):
    pretokenizers: Annotated[list[_PreTokenizer], Few]


_PreTokenizer = _ByteLevel | _Digits | _Metaspace | _Split | _PreTokenizers


class _ByteFallback(_Part, tag="ByteFallback"): ...


class _Fuse(_Part, tag="Fuse"): ...


class _Strip(_Part, tag="Strip"):
    content: Character
    start: Annotated[int, Meta(ge=0, le=16)]
    stop: Annotated[int, Meta(ge=0, le=0)]  # the library panics where a token has fewer characters


class _Decoders(_Part, tag="Sequence"):
    decoders: Annotated[list[_Decoder], Few]


_Decoder = _ByteFallback | _ByteLevel | _Fuse | _Metaspace | _Replace | _Strip | _Decoders


class _Bpe(msgspec.Struct):
    """The model, without ``vocab`` and ``merges``, which the library checks itself."""

    type: Literal["BPE"]
    dropout: None = None  # answers would differ from time to time
    continuing_subword_prefix: Literal[""] | None = None  # pieces would be cut within a character
    end_of_word_suffix: Literal[""] | None = None
    unk_token: Annotated[str, Meta(min_length=1, max_length=100)] | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _Added(msgspec.Struct):
    id: Annotated[int, Meta(ge=0, lt=1 << 24)]
    content: Annotated[str, Meta(min_length=1, max_length=1000)]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _File(msgspec.Struct):
    version: Literal["1.0"]
    added_tokens: Annotated[list[_Added], Meta(max_length=100_000)]
    normalizer: _Normalizer | None
    pre_tokenizer: _PreTokenizer | None
    decoder: _Decoder | None
    model: _Bpe

    def __post_init__(self) -> None:
        for name, part in (("normalizer", self.normalizer), ("decoder", self.decoder)):
            growth = 1.0
            for each in _parts(part):
                growth *= each.growth if isinstance(each, _Replace) else 1
            if growth > GROWTH:
                raise ValueError(f"the {name}'s replacements make {growth:.0f} characters of one")


def _parts(part: Any) -> Sequence[_Part]:
    """A part, or those of a sequence, at any depth."""
    inside = getattr(part, "normalizers", None) or getattr(part, "decoders", None) or ()
    return [part, *(each for one in inside for each in _parts(one))]


def open_tokenizer(path: Path, rows: int) -> Tokenizer:
    """The tokenizer in the file `path`, for a model of `rows` tokens. Raises BundleError."""
    return parse(read_bytes(path, BundleError, limit=JSON_LIMIT), rows, BundleError, str(path))


def parse(text: bytes, rows: int, error: type[InputError], name: str) -> Tokenizer:
    """The tokenizer that the JSON `text` describes, for a model of `rows` tokens.

    Raises `error`, which names the file `name`, for a tokenizer of other parts than exports write, or of
    tokens that the model does not have.
    """
    parts = decode_json(text, dict[str, msgspec.Raw], error, name)
    model = decode_json(bytes(parts.pop("model", b"{}")), dict[str, msgspec.Raw], error, name)
    # the larger part of the file is not looked into twice
    tables = {key: model.pop(key, msgspec.Raw(b"null")) for key in ("vocab", "merges")}
    raw: dict[str, Any] = {key: decode_json(bytes(of), Any, error, name) for key, of in parts.items()}
    settings = {key: decode_json(bytes(of), Any, error, name) for key, of in model.items()}
    checked = convert(raw | {"model": settings}, _File, error, name)
    clean = msgspec.json.encode(raw | UNUSED | {"model": settings | tables})
    with foreign(f"{name} is not a tokenizer", error):
        tokenizer: Tokenizer = Tokenizer.from_buffer(clean)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise error(f"{name} has token ids up to {highest}, expected ids below {rows}")
    for token in checked.added_tokens:
        if (found := tokenizer.token_to_id(token.content)) != token.id:
            raise error(f"{name}: the added token {token.content!r:.60} gets the id {found}, not {token.id}")
    unknown = checked.model.unk_token
    if unknown is not None and tokenizer.model.token_to_id(unknown) is None:
        raise error(f"{name}: model.unk_token is {unknown!r:.60}, which is not in its vocabulary")
    return tokenizer
