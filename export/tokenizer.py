"""A checkpoint folder's tokenizer -> the `tokenizers` library's form of it.

The original LLaVA tokenises with transformers' slow classes. So a folder's ``tokenizer.model``, where it has
one, is converted from the slow Llama class, which is asked what it puts before a text and behind a special
token (settings named ``legacy``, ``add_prefix_space`` and the model's own decide that together). The fast
Llama class is no substitute: with ``legacy`` false it puts nothing before a text that begins with a space.
A folder with ``tokenizer.json`` alone is what the fast class makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from msgspec import UNSET
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import convert_slow_tokenizer
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

# by its full name, which needs sentencepiece when it is imported and not only when it is used
from transformers.models.llama.tokenization_llama import LlamaTokenizer

from dualfocus.export import config
from dualfocus.export.config import SpecialTokens, TokenizerFile, TokenizerJson, TokenText
from dualfocus.export.errors import ExportError
from dualfocus.runtime import files
from dualfocus.runtime.libraries import foreign
from dualfocus.runtime.tokenizer import parse

MODEL_LIMIT = 64 << 20  # bytes of tokenizer.model; the largest have 5 million
ROWS = 1 << 24  # of any model's table of tokens, at most
_Loaded = tuple[Tokenizer, int | None, int | None]

# Whatever SentencePiece may be set to change shows here: spaces, forms of a character, unknown ones, digits.
PROBE = "  A  chat, {token} USER:{token}\n\tﬁ e\u0301 中 [0.12, 0.34] "


def load(folder: Path) -> _Loaded:
    """The tokenizer, the token it opens every text with, and the one it calls the end.

    It encodes text alone: it neither pads nor truncates nor puts tokens around a text. Raises ExportError
    where there is none, or one that is damaged or cannot be converted.
    """
    model, fast = (folder / name for name in ("tokenizer.model", "tokenizer.json"))
    if not model.exists() and not fast.exists():
        raise ExportError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    settings = TokenizerFile()
    if (folder / "tokenizer_config.json").exists():
        settings = config.read(folder / "tokenizer_config.json", TokenizerFile)
    name = (settings.tokenizer_class or "LlamaTokenizer").removesuffix("Fast")
    stored = config.read(fast, TokenizerJson, limit=config.INDEX_LIMIT) if fast.exists() else None
    arguments = _arguments(folder, settings, stored)
    with foreign(f"the tokenizer of {folder} cannot be loaded", ExportError):
        if model.exists() and name == "LlamaTokenizer":
            return _load_slow(model, arguments)
        if stored is None:
            raise ExportError(f"the tokenizer of {folder} is a {name}, expected LlamaTokenizer or a fast one")
        return _load_fast(fast, stored, name, arguments)


def _load_slow(path: Path, arguments: dict[str, Any]) -> _Loaded:
    files.read_bytes(path, ExportError, limit=MODEL_LIMIT)  # the library opens it by its name
    try:
        slow = LlamaTokenizer(vocab_file=str(path), **arguments)
    except (RuntimeError, DecodeError):
        raise ExportError(f"{path} cannot be read: it is no SentencePiece model") from None
    return _as_opened(_convert(slow), path), _opening(slow), slow.eos_token_id


def _load_fast(path: Path, stored: TokenizerJson, name: str, arguments: dict[str, Any]) -> _Loaded:
    if name in ("PreTrainedTokenizer", "TokenizersBackend"):  # the latter since transformers 5
        kind = PreTrainedTokenizerFast
    else:
        kind = tokenizer_class_from_name(f"{name}Fast")
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedTokenizerFast):
        raise ExportError(
            f"tokenizer_config.json names the class {name!r:.80}, expected a tokenizer of transformers"
        )
    text = files.read_bytes(path, ExportError, limit=config.INDEX_LIMIT)
    opened = parse(text, ROWS, ExportError, str(path))
    known = set(opened.get_vocab().values())
    highest = max(opened.get_vocab(with_added_tokens=False).values(), default=-1)
    # the library prints a warning whenever it copies or saves one with a gap
    if (missing := next((of for of in range(highest) if of not in known), None)) is not None:
        raise ExportError(f"{path} has no token of id {missing}, expected ids without gaps up to {highest}")
    loaded = kind(tokenizer_object=opened, **arguments)
    backend: Tokenizer = loaded.backend_tokenizer
    _add(backend, loaded.added_tokens_decoder)
    if backend.post_processor is not None:  # the class decides, and not the file
        bos = _opening(loaded)
    else:
        bos = stored.post_processor.opening() if stored.post_processor is not None else None
        bos = bos if bos in known else None
    return _as_opened(backend, path), bos, loaded.eos_token_id


def _opening(loaded: Any) -> int | None:
    """The token that is put before every text."""
    bos: int | None = loaded.bos_token_id
    return bos if bos is not None and loaded("a").input_ids[:1] == [bos] else None


def _as_opened(backend: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer of text alone that a bundle opens, made of the file `path`."""
    return parse(backend.to_str().encode(), ROWS, ExportError, str(path))


def _arguments(folder: Path, settings: TokenizerFile, stored: TokenizerJson | None) -> dict[str, Any]:
    """Of transformers' classes, put together of the files as its `from_pretrained` does."""
    given = {name: getattr(settings, name) for name in SpecialTokens.__struct_fields__}
    more = settings.extra_special_tokens or ()
    added: dict[int, AddedToken] = {}
    if settings.added_tokens_decoder is not UNSET:
        added = {number: _token(token) for number, token in settings.added_tokens_decoder.items()}
    else:  # as before 2023's end
        if (folder / "special_tokens_map.json").exists():
            special = config.read(folder / "special_tokens_map.json", SpecialTokens)
            first = [*(given["additional_special_tokens"] or ())]
            given |= {name: value for name in given if (value := getattr(special, name)) is not UNSET}
            for token in given.values():
                if isinstance(token, config.AddedToken):
                    token.special = True
            given["additional_special_tokens"] = [*first, *(special.additional_special_tokens or ())]
        names = {_text(token) for name, token in given.items() if not isinstance(token, list)}
        names |= {_text(token) for token in given["additional_special_tokens"] or ()}
        if (folder / "added_tokens.json").exists():
            for content, number in config.read(folder / "added_tokens.json", config.AddedTokensFile).items():
                special_ = content in names
                added[number] = AddedToken(content, normalized=not special_, special=special_)
        for token in stored.added_tokens if stored else ():
            added[token.id] = _token(token)
    by_text = {token.content: token for token in added.values()}

    def found(token: TokenText) -> str | AddedToken | None:
        text = _text(token)
        return by_text.get(text) or (_token(token) if isinstance(token, config.AddedToken) else text)

    extra = more.values() if isinstance(more, dict) else more
    tokens = {_text(token): token for token in [*(given.pop("additional_special_tokens") or ()), *extra]}
    arguments: dict[str, Any] = {name: found(token) for name, token in given.items() if token is not UNSET}
    arguments["additional_special_tokens"] = [found(token) for text, token in tokens.items() if text]
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
        if (value := getattr(settings, name)) is not UNSET:
            arguments[name] = value
    return arguments | {"added_tokens_decoder": added}


def _text(token: TokenText) -> str | None:
    return token.content if isinstance(token, config.AddedToken) else token


def _token(token: config.AddedToken) -> AddedToken:
    raw = {name: value for name, value in config.fields(token).items() if name != "id"}
    return AddedToken(**raw)


def _add(backend: Tokenizer, tokens: Mapping[int, AddedToken]) -> None:
    """Add `tokens`, in the order of their ids, to be found as they are written.

    Files often call them "normalized", which the slow classes ignore; `tokenizers` would look for
    "▁</s>" then, and miss the one in "yes</s>".
    """
    for number, token in sorted(tokens.items()):
        backend.add_tokens([AddedToken(**token.__getstate__() | {"normalized": False})])
        if (given := backend.token_to_id(token.content)) != number:
            raise ExportError(f"the added token {token.content!r} has the id {number}, expected {given}")


def _convert(slow: LlamaTokenizer) -> Tokenizer:
    token = slow.all_special_tokens[0]
    if slow.tokenize(f"{token}a")[1].startswith("▁"):
        prepend = "always"
    else:
        prepend = "first" if slow.tokenize("a")[0].startswith("▁") else "never"
    with foreign("tokenizer.model cannot be converted", ExportError):
        backend: Tokenizer = convert_slow_tokenizer(slow)
    _add(backend, slow.added_tokens_decoder)
    # Metaspace spares a text that begins with its own sign. So spaces become "▁" before one is put in front.
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme=prepend, split=False),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False),
        ]
    )
    text = PROBE.format(token=token)
    if backend.encode(text, add_special_tokens=False).tokens != slow.tokenize(text):
        raise ExportError(
            "tokenizer.model is not of Llama's kind, a BPE on unchanged text: "
            f"converted, it makes other tokens of {text!r}"
        )
    return backend
