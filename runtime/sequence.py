"""What a slot of the KV cache holds: its tokens, and what is known of them. Only what is new is computed.

A slot is brought to a prompt by keeping the longest common prefix of tokens and computing the rest. Branching
from an image, continuing after a reply, scoring a second candidate and a second question about the same
picture are all that one operation. A log-probability that was computed once stays known: a slot remembers
those of branches that were cut off, as long as what they branched from stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

import numpy as np

from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.embeddings import EmbeddingsOf
from dualfocus.runtime.engines import Array, DecoderOf, DeviceLogits, Logits
from dualfocus.runtime.turns import Token

Input = TypeVar("Input")  # a decoder's
LogProb = float | None  # of a token; None: no pass had to compute it; NaN: the model did


class CachedSequence:
    """Row `row` of `cache`: its tokens, and what is known of what follows them."""

    def __init__(self, cache: KVCache, row: int) -> None:
        self._cache = cache
        self.row = row
        self.tokens: list[Token] = []
        self._logprobs: list[LogProb] = []  # of each token given those before it
        self._logits: dict[int, Logits] = {}  # position: (vocabulary,) for what follows it, where requested
        self._cut_off: list[
            tuple[int, list[Token], list[LogProb]]
        ] = []  # where a branch began, and the branch

    def logits(self, position: int) -> Logits | None:
        """(vocabulary,) logits of what follows `position`, or None where they were not requested."""
        return self._logits.get(position)

    def logprob(self, position: int, token: int) -> LogProb:
        """The log-probability of `token` after `position`; None without logits there."""
        logits = self._logits.get(position)
        return None if logits is None else log_softmax(logits, token)

    def recall(self, tokens: Sequence[Token], at: Sequence[int]) -> list[LogProb]:
        """The log-probabilities of the `tokens` at some positions, each given those before it, as far as
        they are known from this row or a branch cut off from it; else None."""
        found: list[LogProb] = [None] * len(tokens)
        common = common_prefix(self.tokens, tokens)
        found[:common] = self._logprobs[:common]
        for start, branch, logprobs in self._cut_off:
            if start <= common:
                end = start + common_prefix(branch, tokens[start:])
                known = zip(found[start:end], logprobs, strict=False)
                found[start:end] = [new if old is None else old for old, new in known]
        following = tokens[common] if common < len(tokens) else None
        if isinstance(following, int) and found[common] is None:
            found[common] = self.logprob(common - 1, following)
        return [found[position] for position in at]

    def cut(self, length: int) -> None:
        """Truncate to `length`; keep the removed branch's log-probabilities."""
        if length < len(self.tokens):
            self._cut_off = [branch for branch in self._cut_off if branch[0] <= length]
            self._cut_off.append((length, self.tokens[length:], self._logprobs[length:]))
            self._logits = {at: logits for at, logits in self._logits.items() if at < length}
            del self.tokens[length:], self._logprobs[length:]
        self._cache.truncate(self.row, length)  # last: the cache may hold more than the row knows of

    def forget(self) -> None:
        """Keep the tokens alone: no logits, nothing of branches that were cut off."""
        self._logits.clear()
        self._cut_off.clear()

    def forget_logits(self, before: int) -> None:
        """Forget the logits after positions below `before`, which no choice needs; they take much memory."""
        self._logits = {at: logits for at, logits in self._logits.items() if at >= before}

    def fork_from(self, source: CachedSequence, length: int) -> None:
        """Hold the first `length` tokens of `source`, copying those that are not held already."""
        kept = common_prefix(self.tokens, source.tokens[:length])
        self.cut(kept)
        self._cache.fork(source.row, self.row, length, kept)
        self.tokens += source.tokens[kept:length]
        self._logprobs += source._logprobs[kept:length]
        if (following := source.logits(length - 1)) is not None:
            self._logits[length - 1] = following

    def clear(self) -> None:
        """Hold nothing, and give memory back."""
        self.tokens, self._logprobs, self._logits, self._cut_off = [], [], {}, []
        self._cache.clear(self.row)

    def shows_images(self, start: int) -> bool:
        """Whether there is an image's token at `start` or after it."""
        return any(not isinstance(token, int) for token in self.tokens[start:])

    def computed(self, tokens: Sequence[Token], logits: Mapping[int, Logits]) -> None:
        """`tokens` were appended to the cache, and gave `logits` (vocabulary,) after some positions."""
        self._logits |= logits
        for token in tokens:
            last = len(self.tokens) - 1
            self._logprobs.append(self.logprob(last, token) if isinstance(token, int) else None)
            self.tokens.append(token)


@dataclass(frozen=True)
class Extension:
    """`tokens` to append to `sequence`, and the positions in it after which logits are requested."""

    sequence: CachedSequence
    tokens: Sequence[Token]
    logits_at: Sequence[int]

    @classmethod
    def to(cls, sequence: CachedSequence, tokens: Sequence[Token], after: Sequence[int]) -> Extension:
        """What brings `sequence` to `tokens`, with logits `after` some positions.

        The sequence is cut where it differs, and further where logits are requested after a token that it
        holds: such a token is computed again.
        """
        common = common_prefix(sequence.tokens, tokens)
        sequence.cut(min([common, *(at for at in after if sequence.logits(at) is None)]))
        requested = [at for at in after if sequence.logits(at) is None]  # with what was known after the cut
        return cls(sequence, tokens[len(sequence.tokens) :], requested)

    def split(self, length: int) -> tuple[Extension, Extension]:
        """The first `length` tokens, and the rest."""
        end = len(self.sequence.tokens) + length
        before, after = [at for at in self.logits_at if at < end], [at for at in self.logits_at if at >= end]
        return (
            Extension(self.sequence, self.tokens[:length], before),
            Extension(self.sequence, self.tokens[length:], after),
        )

    def prefix(self, tokens: Sequence[Token]) -> int:
        """How many of `tokens` the sequence will hold at its beginning, once it is extended."""
        held = len(self.sequence.tokens)
        common = common_prefix(self.sequence.tokens, tokens)
        return common if common < held else held + common_prefix(self.tokens, tokens[held:])


def extend(
    decoder: DecoderOf[Input, Iterable[Logits]],
    cache: KVCache,
    embeddings: EmbeddingsOf[Input],
    features: Mapping[str, Array],
    extensions: Sequence[Extension],
) -> None:
    """Append all `extensions`, each to a different row of `cache`, in one call of `decoder`.

    `features` maps the names of images to their (T, D) tokens.
    """
    for extension in extensions:
        extension.sequence.cut(len(extension.sequence.tokens))  # an interrupted call may have left more
    results = decoder.extend(
        cache,
        [extension.sequence.row for extension in extensions],
        [embed(extension.tokens, embeddings, features) for extension in extensions],
        [[at - len(e.sequence.tokens) for at in e.logits_at] for e in extensions],
    )
    for extension, logits in zip(extensions, results, strict=True):
        extension.sequence.computed(extension.tokens, dict(zip(extension.logits_at, logits, strict=True)))


def common_prefix(left: Sequence[Token], right: Sequence[Token]) -> int:
    """How many tokens both begin with; image tokens are equal if image and position are."""
    shorter = min(len(left), len(right))
    for start in range(0, shorter, 64):  # comparing lists is many times faster than a loop
        pair = list(left[start : start + 64]), list(right[start : start + 64])
        if pair[0] != pair[1]:
            same = (a == b for a, b in zip(*pair, strict=False))
            return min(shorter, start + sum(1 for _ in takewhile(bool, same)))
    return shorter


def embed(tokens: Sequence[Token], embeddings: EmbeddingsOf[Input], features: Mapping[str, Array]) -> Input:
    """The decoder's input for `tokens`; `features` maps the names of images to their (T, D) tokens."""
    return embeddings.embed(tokens, features)


def likeliest(logits: Logits, allowed: Sequence[int] | None) -> int:
    """The likeliest token, or that of those `allowed`; of equals the first."""
    if allowed is None:
        return int(logits.argmax())
    found = zip(logits[list(allowed)], allowed, strict=True)
    return max(found, key=lambda pair: (pair[0], -pair[1]))[1]


def log_softmax(logits: Logits, token: int) -> float:
    """The log-probability of one `token`, from (vocabulary,) logits; summed in float64 on the host.

    NaN if a logit is NaN or infinite, but for minus infinity.
    """
    if isinstance(logits, DeviceLogits):
        value = logits.peak if token == logits.best else float(logits[[token]][0])
        return value - logits.logsumexp
    most = logits.max()
    if not np.isfinite(most):
        return math.nan
    total = np.exp(logits - most).sum(dtype=np.float64)
    return float(logits[token]) - float(most) - math.log(total)
