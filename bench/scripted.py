"""Replies of a wanted length from random weights: `ScriptedDecoder`. Imports nothing but the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Decoder, Floats

PUSH = 100.0  # added to a logit, whose like spread by 2


class ScriptedDecoder:
    """A decoder whose replies are made to be what they are wanted to be, for the model's own work.

    `script` maps positions in a row to the token that is to follow there; its logit is raised by `PUSH`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.script: Mapping[int, int] = {}

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        """As `engines.Decoder.extend`."""
        starts = [cache.lengths[row] for row in rows]
        results = self._decoder.extend(cache, rows, embeddings, logits_at)
        for start, logits, at in zip(starts, results, logits_at, strict=True):
            for i, position in enumerate(at):
                if (token := self.script.get(start + position)) is not None:
                    logits[i, token] += PUSH
        return results
