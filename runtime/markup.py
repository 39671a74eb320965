"""Tokenizes a prompt's text, in which special tokens are parsed in the template alone.

What a person or the model wrote stays text: a question that spells ``</s>`` ends no turn. Its tokens are
those of transformers' ``split_special_tokens``, which transformers applies to a whole text only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from dualfocus.runtime.errors import QuestionError

Spans = tuple[tuple[int, int], ...]  # where parts of a text begin and end, in order, in characters

_STAND_INS = 0xF0000  # private characters, which stand for a template's special tokens


class Encoded(NamedTuple):
    """The tokens of a text, and where each ends, in characters."""

    ids: list[int]
    ends: list[int]


def encode(tokenizer: Tokenizer, text: str, given: Spans, template: str) -> Encoded:
    """The tokens of `text`, whose parts `given` hold no special token.

    Special is what the tokenizer calls so, and any other added token that the prompt's `template` spells: it
    structures the dialogue. Raises QuestionError where the tokenizer has no other tokens for such a text.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    added = _added(tokenizer)
    encoded = Encoded(encoding.ids, [end for _, end in encoding.offsets])
    if added.keys().isdisjoint(encoded.ids):
        return encoded
    special = {id: token for id, token in added.items() if token.special or token.content in template}
    if _first_in(given, text, encoding.ids, encoding.offsets, special) is None:
        return encoded
    return _encode_literally(tokenizer, text, given, special)


@lru_cache(maxsize=8)
def _added(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    return added


def _first_in(
    given: Spans,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    special: dict[int, AddedToken],
) -> str | None:
    """The first of the `special` tokens that is spelled in a part `given`, or reaches into one."""
    for id, (start, end) in zip(ids, offsets, strict=True):
        if id in special:
            content: str = special[id].content
            at = text.find(content, start, end)  # a token may take the spaces around it
            # not there: the model's own spelling of a character, as a byte
            if at >= 0 and any(at < stop and begin < at + len(content) for begin, stop in given):
                return content
    return None


def _encode_literally(
    tokenizer: Tokenizer, text: str, given: Spans, special: dict[int, AddedToken]
) -> Encoded:
    """As `encode`: stand-ins replace the template's special tokens, and the tokenizer knows no others."""
    contents = sorted((token.content for token in special.values()), key=len, reverse=True)
    stand_ins = {content: chr(_STAND_INS + i) for i, content in enumerate(contents)}
    if any(chr(_STAND_INS) <= character < chr(_STAND_INS + len(contents)) for character in text):
        raise QuestionError(
            "the question holds both a special token and a private character (U+F0000 to U+FFFFF)"
        )
    pattern = re.compile("|".join(map(re.escape, contents)))
    parts: list[str] = []  # of `text`, and what each becomes
    replaced: list[str] = []
    end = 0
    for start, stop in (*given, (len(text), len(text))):
        for found in pattern.finditer(text[:start], end):
            parts += [text[end : found.start()], found[0]]
            replaced += [text[end : found.start()], stand_ins[found[0]]]
            end = found.end()
        parts.append(text[end:stop])
        replaced.append(text[end:stop])
        end = stop
    literal, ids = _literal(tokenizer, tuple(stand_ins.items()))
    encoding = literal.encode("".join(replaced), add_special_tokens=False)
    lengths = [
        step
        for part, new in zip(parts, replaced, strict=True)
        for step in ([1] * len(part) if part == new else [len(part)])
    ]
    origin = list(accumulate(lengths, initial=0))  # of each character's beginning
    tokens = [ids.get(id, id) for id in encoding.ids]
    offsets = [(origin[start], origin[stop]) for start, stop in encoding.offsets]
    if (left := _first_in(given, text, tokens, offsets, special)) is not None:
        raise QuestionError(f"the question holds {left!r}, which this model's tokenizer cannot read as text")
    return Encoded(tokens, [stop for _, stop in offsets])


@lru_cache(maxsize=8)
def _literal(
    tokenizer: Tokenizer, stand_ins: tuple[tuple[str, str], ...]
) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer with stand-ins for some of its added tokens, and the ids of its added tokens there."""
    replaced = dict(stand_ins)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = []
    definition["post_processor"] = None  # which may name tokens that are gone
    literal = Tokenizer.from_str(json.dumps(definition))
    ids: dict[int, int] = {}
    for id, token in sorted(_added(tokenizer).items()):
        content = replaced.get(token.content, token.content)
        flags = token.__getstate__() | {"content": content}
        if content != token.content:
            flags |= {"normalized": False, "single_word": False}
        literal.add_tokens([AddedToken(**flags)])
        ids[literal.token_to_id(content)] = id
    return literal, ids
