"""A row of the KV cache that knows which tokens it holds, so that only what is new is computed.

`CachedSequence.extend_to` is the whole of prefix reuse: whatever prompt comes next, the row keeps the
longest common prefix of tokens and computes the rest. Branching from an image, going on from a reply,
scoring a second candidate and a second question on the same picture are all that one operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Decoder, Floats
from dualfocus.runtime.result import Counters
from dualfocus.runtime.turns import Prompt, Token

LogProbs = npt.NDArray[np.float64]  # (vocabulary,), or one per token


class CachedSequence:
    """Row `row` of `cache`, the tokens in it, and the log-probabilities that were computed on the way."""

    def __init__(self, decoder: Decoder, cache: KVCache, row: int, embeddings: Floats) -> None:
        self._decoder = decoder
        self._cache = cache
        self._row = row
        self._embeddings = embeddings
        self._tokens: list[Token] = []
        self._logprobs: list[float] = []  # of each token given those before it; nan where nobody asked
        self._next: LogProbs | None = None  # of every token that may follow, unless the row was cut since

    @property
    def next(self) -> LogProbs:
        """(vocabulary,) log-probabilities of what follows the row's last token."""
        assert self._next is not None
        return self._next

    def extend_to(self, prompt: Prompt, features: Mapping[str, Floats], counters: Counters) -> None:
        """Make the row hold `prompt`: afterwards `next` and the replies' log-probabilities are known.

        `features` maps the name of every image in `prompt` to its (T, D) tokens.
        """
        tokens = prompt.tokens
        common = common_prefix(self._tokens, tokens)
        logprobs = self._logprobs[:common] + [float("nan")] * (len(tokens) - common)
        asked = [at for reply in prompt.replies for at in reply if np.isnan(logprobs[at])]
        known: dict[int, LogProbs] = {}  # position: of every token that may follow it
        if common == len(self._tokens) and self._next is not None:
            known[common - 1] = self._next
        # What a token's log-probability needs stands after the one before it. Where that is neither known
        # nor computed anyway, a token that is in the cache is computed again.
        missing = [at for at in [*(at - 1 for at in asked), len(tokens) - 1] if at not in known]
        keep = min([common, *missing])
        self._cut(keep)
        if missing:
            new = embed(tokens[keep:], self._embeddings, features)
            rows = self._extend(new, [at - keep for at in missing])
            known.update(zip(missing, rows, strict=True))
        for at in asked:
            token = tokens[at]
            assert isinstance(token, int)
            logprobs[at] = float(known[at - 1][token])
        self._tokens, self._logprobs, self._next = list(tokens), logprobs, known[len(tokens) - 1]
        counters.tokens_reused += keep
        counters.tokens_prefilled += len(tokens) - keep

    def append(self, token: int) -> None:
        """Go on with a token chosen from `next`."""
        (following,) = self._extend(self._embeddings[[token]], [0])
        self._logprobs.append(float(self.next[token]))
        self._tokens.append(token)
        self._next = following

    def logprobs(self, reply: range) -> list[float]:
        """The log-probabilities of the tokens at the positions of a reply."""
        return self._logprobs[reply.start : reply.stop]

    def _cut(self, length: int) -> None:
        self._cache.truncate(self._row, length)
        if length < len(self._tokens):
            self._next = None
        del self._tokens[length:], self._logprobs[length:]

    def _extend(self, embeddings: Floats, logits_at: Sequence[int]) -> LogProbs:
        return log_softmax(self._decoder.extend(self._cache, self._row, embeddings, logits_at))


def common_prefix(left: Sequence[Token], right: Sequence[Token]) -> int:
    """How many tokens both begin with; image tokens are equal if image and position are."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def embed(tokens: Sequence[Token], table: Floats, features: Mapping[str, Floats]) -> Floats:
    """(L, D) embeddings of `tokens`: rows of `table` (vocabulary, D) and of the images' `features` (T, D)."""
    out = np.array(table[[token if isinstance(token, int) else 0 for token in tokens]])
    for i, token in enumerate(tokens):
        if not isinstance(token, int):
            out[i] = features[token.image][token.position]
    return out


def log_softmax(logits: Floats) -> LogProbs:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    result: LogProbs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
