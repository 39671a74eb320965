"""A checkpoint folder's tokenizer -> the `tokenizers` library's form of it.

The original LLaVA tokenises with transformers' slow classes. So a folder's ``tokenizer.model``, where it has
one, is converted from the slow Llama class, which is asked what it puts before a text and behind a special
token (settings named ``legacy``, ``add_prefix_space`` and the model's own decide that together). The fast
Llama class is no substitute: with ``legacy`` false it puts nothing before a text that begins with a space.
A folder with ``tokenizer.json`` alone is what the fast class makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

# by its full name, which needs sentencepiece when it is imported and not only when it is used
from transformers.models.llama.tokenization_llama import LlamaTokenizer

from dualfocus.export.errors import ExportError, first_line

# Whatever SentencePiece may be set to change shows here: spaces, forms of a character, unknown ones, digits.
PROBE = "  A  chat, {token} USER:{token}\n\tﬁ e\u0301 中 [0.12, 0.34] "


def load(folder: Path) -> tuple[Tokenizer, int | None, int | None]:
    """The tokenizer, the token it opens every text with, and the one it calls the end.

    Raises ExportError where there is none, or one that is damaged or cannot be converted.
    """
    sentencepiece = (folder / "tokenizer.model").exists()
    if not sentencepiece and not (folder / "tokenizer.json").exists():
        raise ExportError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, use_fast=not sentencepiece, local_files_only=True, **_class_of(folder)
        )
    except Exception as error:  # anything a broken or foreign file makes the library raise
        raise ExportError(f"the tokenizer of {folder} cannot be loaded: {first_line(error)}") from error
    if loaded is False:  # the library's word for it
        raise ExportError(f"{folder / 'tokenizer.model'} cannot be read: it is no SentencePiece model")
    if loaded.is_fast:
        backend: Tokenizer = loaded.backend_tokenizer
        _add(backend, loaded.added_tokens_decoder)
        backend.no_padding()
        backend.no_truncation()
    elif isinstance(loaded, LlamaTokenizer):
        backend = _convert(loaded)
    else:
        raise ExportError(
            f"the tokenizer of {folder} is a {type(loaded).__name__}, expected LlamaTokenizer or a fast one"
        )
    bos = loaded.bos_token_id if loaded("a").input_ids[:1] == [loaded.bos_token_id] else None
    if bos is not None and not loaded.is_fast:
        backend.post_processor = processors.TemplateProcessing(
            single=[loaded.bos_token, "$A"], special_tokens=[(loaded.bos_token, bos)]
        )
    return backend, bos, loaded.eos_token_id


def _class_of(folder: Path) -> dict[str, str]:
    """What AutoTokenizer is to be told: the original LLaVA's model types are unknown to transformers."""

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return raw

    if "tokenizer_class" in read("tokenizer_config.json"):
        return {}
    original = "LlavaLlamaForCausalLM" in (read("config.json").get("architectures") or ())
    return {"tokenizer_type": "llama"} if original else {}


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
    try:
        backend: Tokenizer = convert_slow_tokenizer(slow)
    except Exception as error:  # the library raises bare Exception
        raise ExportError(f"tokenizer.model cannot be converted: {first_line(error)}") from error
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
