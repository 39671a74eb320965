"""The grammar of box replies, on the tokenizer's own tokens.

A box reply is the manifest's format with four numbers in it, x0 <= x1 and y0 <= y1, spelled the way the
tokenizer spells it within the dialogue; no other tokens of the same text are in the language. So what is
decoded under the grammar is, token for token, what the history holds in the next turn; and greedy decoding
under it equals free greedy decoding wherever that gives a well-formed box in this spelling.

Tokenizers differ in what they make of ``[0.12, 0.34, …``: one token per digit, ``12`` or ``.12``, ``, 0.``.
All that is relied on is that a token ends where a number ends, and that numbers do not change each other's
spelling: cut there, a reply is four parts and the end, and the language is five tries one after the other.
`BoxGrammar.build` makes them from what the tokenizer does, checks what it relies on, and gives no grammar
where that fails.
"""

from __future__ import annotations

import copy
import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Protocol

from tokenizers import Tokenizer

from dualfocus.runtime.manifest import Manifest
from dualfocus.runtime.turns import Piece, Question, Text, Turn, render

Tokens = tuple[int, ...]
Units = tuple[int, ...]  # the four numbers of a box, in units of their last decimal
Parts = tuple[Tokens, ...]  # its spelling: up to the end of each number, then up to the end token

# Two questions, so that a spelling that depends on the question is noticed.
_QUESTIONS = ("Where is it?", "left 0 [1, 2")


class Cursor(Protocol):
    """A place in a reply that a grammar holds."""

    @property
    def allowed(self) -> Tokens:
        """The tokens that may come next; empty only at the end."""

    @property
    def forced(self) -> bool:
        """There is no choice: `allowed` is one token."""

    def advance(self, token: int) -> None:
        """Take `token`, which must be one of `allowed`."""

    def ahead(self) -> list[int]:
        """The tokens that are worth computing before they are chosen."""


class Grammar(Protocol):
    """What a reply is held to. Immutable."""

    def start(self) -> Cursor:
        """A cursor at the reply's first token."""


LIKELY = 0.9  # of the numbers still possible: a token that so many begin with is worth trying unasked


@dataclass
class _Node:
    """What a part may continue with. A leaf has no `next` and one number, the one that it spells."""

    numbers: list[int] = field(default_factory=list)  # spelled below, ascending
    next: dict[int, _Node] = field(default_factory=dict)
    _allowed: dict[int, Tokens] = field(default_factory=dict)  # cached, by `least`
    _likely: dict[int, int | None] = field(default_factory=dict)

    def count(self, least: int) -> int:
        """How many of the numbers below are at least `least`."""
        return len(self.numbers) - (bisect_left(self.numbers, least) if self.numbers[0] < least else 0)

    def allowed(self, least: int) -> Tokens:
        """The tokens that a number of at least `least` may continue with."""
        if least not in self._allowed:
            self._allowed[least] = tuple(token for token, node in self.next.items() if node.count(least))
        return self._allowed[least]

    def likely(self, least: int) -> int | None:
        """The token that `LIKELY` of those numbers continue with, if there is one."""
        if least not in self._likely:
            enough = LIKELY * self.count(least)
            found = (token for token, node in self.next.items() if node.count(least) >= enough)
            self._likely[least] = next(found, None)
        return self._likely[least]


class BoxGrammar:
    """The canonical spellings of all well-formed boxes under one manifest and tokenizer. Immutable."""

    def __init__(self, parts: Sequence[_Node]) -> None:
        self._parts = parts

    @classmethod
    def build(cls, manifest: Manifest, tokenizer: Tokenizer) -> BoxGrammar | None:
        """Ask `tokenizer` for the spelling of every number: some 20 ms for two decimals, 2 s for four.

        Numbers that the tokenizer cannot spell are left out. None, for free decoding, where the manifest
        names no format or this tokenizer cannot be held to one: a number's spelling depends on its
        neighbours or on the question, a token crosses the end of a number, or a reply does not decode to
        itself, does not continue the prompt's tokens or is not followed by an end token.
        """
        if manifest.box is None:
            return None
        try:
            return cls(_tries(manifest.box.decimals, _Speller(manifest, tokenizer)))
        except _NoGrammarError:
            return None

    def start(self) -> BoxCursor:
        """A cursor at the reply's first token."""
        return BoxCursor(self._parts)


class BoxCursor:
    """A place in a box reply: what has been taken, and what may come next."""

    def __init__(self, parts: Sequence[_Node]) -> None:
        self._parts = parts
        self._numbers: tuple[int, ...] = ()
        self._node = parts[0]
        self.allowed = self._find_allowed()  # the tokens that may come next; empty only when `done`

    @property
    def done(self) -> bool:
        """The end token has been taken."""
        return len(self._numbers) == len(self._parts)

    @property
    def forced(self) -> bool:
        """There is no choice: `allowed` is one token."""
        return len(self.allowed) == 1

    def advance(self, token: int) -> None:
        """Take `token`, which must be one of `allowed`."""
        assert token in self.allowed
        self._node = self._node.next[token]
        if not self._node.next:
            self._numbers += (self._node.numbers[0],)
            if not self.done:
                self._node = self._parts[len(self._numbers)]
        self.allowed = self._find_allowed()

    def ahead(self) -> list[int]:
        """The tokens that come next in all boxes still possible, or in nearly all; the cursor stays here.

        Only a run without any choice reaches the end: after a likely token there are others to choose.
        """
        cursor = copy.copy(self)
        run: list[int] = []
        while (token := cursor._likely) is not None:
            cursor.advance(token)
            run.append(token)
        return run

    @property
    def _least(self) -> int:
        """The smallest number this part may spell: x1 and y1 are at least what stands two places before."""
        return self._numbers[-2] if len(self._numbers) in (2, 3) else 0

    def _find_allowed(self) -> Tokens:
        return self._node.allowed(self._least)

    @property
    def _likely(self) -> int | None:
        """The next token, where `LIKELY` of the numbers still possible begin with it."""
        return self._node.likely(self._least)


class _NoGrammarError(Exception):
    """This tokenizer cannot be held to the format."""


def _tries(decimals: int, speller: _Speller) -> list[_Node]:
    """One trie for each number of a box and one for the end. Raises _NoGrammarError."""
    numbers = range(10**decimals + 1)
    spelled = speller.spell([(n, n, n, n) for n in numbers], _QUESTIONS[0])
    able = next((parts for parts in spelled if parts), None)
    if able is None:
        raise _NoGrammarError
    known = next(n for n in numbers if spelled[n] is able)
    columns: list[dict[int, Tokens]] = [{}, {}, {}, {}]
    for n, parts in zip(numbers, spelled, strict=True):
        # a number that failed at all places may yet be known at some: a word can hold what precedes it
        boxes = [tuple(n if i == place else known for i in range(4)) for place in range(4)]
        alone = [parts] * 4 if parts else speller.spell(boxes, _QUESTIONS[0])
        for place, column in enumerate(columns):
            if found := alone[place]:
                column[n] = found[place]
    for low, high in ((0, 2), (1, 3)):  # nothing is above the largest, so that no choice is a dead end
        most = max(columns[high])
        columns[low] = {n: tokens for n, tokens in columns[low].items() if n <= most}
    _check_independence(columns, able[4], speller)
    return [*map(_trie, columns), _trie({0: able[4]})]


def _check_independence(columns: Sequence[dict[int, Tokens]], end: Tokens, speller: _Speller) -> None:
    """Every number once more, among other neighbours and after another question."""
    rng = random.Random(0)
    shuffled = [rng.sample(sorted(column), len(column)) for column in columns]
    rows = max(map(len, shuffled))
    boxes: list[Units] = [tuple(c[i % len(c)] for c in shuffled) for i in range(rows)]
    for box, parts in zip(boxes, speller.spell(boxes, _QUESTIONS[1]), strict=True):
        if parts != (*(column[n] for column, n in zip(columns, box, strict=True)), end):
            raise _NoGrammarError


def _trie(spellings: dict[int, Tokens]) -> _Node:
    """A number's text is as long as every other's, so no spelling begins another and all end in leaves."""
    root = _Node()
    for number, tokens in sorted(spellings.items()):
        node = root
        node.numbers.append(number)
        for token in tokens:
            node = node.next.setdefault(token, _Node())
            node.numbers.append(number)
    return root


class _Speller:
    """Boxes as the tokenizer spells them where a reply to the locate turn stands."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer) -> None:
        assert manifest.box is not None
        self._box = manifest.box
        self._prompts = manifest.prompts
        self._eos = manifest.tokens.eos
        self._tokenizer = tokenizer
        width = self._box.decimals + len("0.")
        *frames, _ = re.split(r"\{..\}", self._box.text)
        self._ends = [end + width * i for i, end in enumerate(accumulate(map(len, frames)), 1)]

    def spell(self, boxes: Sequence[Units], question: str) -> list[Parts | None]:
        """The parts of each of `boxes` in a dialogue about `question`; None for one that has no spelling.

        A token that crosses a number's end counts to the next part, which then differs with the number
        before it. Raises _NoGrammarError where a spelling does not continue the prompt's tokens, or has
        no end token.
        """
        unit = 10**self._box.decimals
        texts = [self._box.write(*(number / unit for number in box)) for box in boxes]
        before, after = self._around(question)
        reply = self._prompts.reply
        encodings = self._tokenizer.encode_batch(
            [before + reply.replace("{answer}", text) + after for text in texts], add_special_tokens=False
        )
        prompt = self._tokenizer.encode(before, add_special_tokens=False).ids
        starts = len(before) + reply.index("{answer}")
        found: list[Parts | None] = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            end = next((i for i in range(len(prompt), len(ids)) if ids[i] in self._eos), None)
            if ids[: len(prompt)] != prompt or end is None:
                raise _NoGrammarError
            decoded = self._tokenizer.decode(ids[len(prompt) : end + 1], skip_special_tokens=True)
            if decoded.strip() != text:  # an unknown character, or an end token among the numbers' own
                found.append(None)
                continue
            cuts = [bisect_right(encoding.offsets, starts + end, key=itemgetter(1)) for end in self._ends]
            bounds = pairwise([len(prompt), *cuts, end + 1])
            found.append(tuple(tuple(ids[start:stop]) for start, stop in bounds))
        return found

    def _around(self, question: str) -> tuple[str, str]:
        """The text between the images that surrounds the reply."""
        prompts = self._prompts
        turns = (Turn(prompts.locate, ""), Turn(prompts.micro))
        pieces = render(prompts, Question.parse(question, prompts.hint), turns)
        reply = next(i for i, piece in enumerate(pieces) if isinstance(piece, Text) and piece.reply)
        before, after = _first_texts(reversed(pieces[:reply])), _first_texts(pieces[reply + 1 :])
        return "".join(reversed(before)), "".join(after)


def _first_texts(pieces: Iterable[Piece]) -> list[str]:
    texts = []
    for piece in pieces:
        if not isinstance(piece, Text):
            break
        texts.append(piece.text)
    return texts
