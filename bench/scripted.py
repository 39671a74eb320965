"""Replies of a wanted length from random weights: `ScriptedDecoder`. Imports nothing but the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import DecoderOf, DeviceLogits, Floats

Input = TypeVar("Input")
Output = TypeVar("Output", Floats, list[DeviceLogits])

PUSH = 100.0  # added to a logit, whose like spread by 2


@dataclass(frozen=True)
class PushedLogits(DeviceLogits):
    """`best` was pushed. Nothing is written on the device: what comes from it is put `PUSH` lower."""

    def __getitem__(self, tokens: list[int]) -> Floats:
        found: Floats = super().__getitem__(tokens) - PUSH
        found[[token == self.best for token in tokens]] = self.peak
        return found


class ScriptedDecoder(Generic[Input, Output]):
    """A decoder whose replies are made to be what they are wanted to be, for the model's own work.

    `script` maps positions in a row to the token that is to follow there; its logit is raised by `PUSH`.
    """

    def __init__(self, decoder: DecoderOf[Input, Output]) -> None:
        self._decoder: DecoderOf[Input, Output] = decoder
        self.script: Mapping[int, int] = {}

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Input],
        logits_at: Sequence[Sequence[int]],
    ) -> Sequence[Output]:
        """As `engines.DecoderOf.extend`."""
        starts = [cache.lengths[row] for row in rows]
        results = self._decoder.extend(cache, rows, embeddings, logits_at)
        for start, logits, at in zip(starts, results, logits_at, strict=True):
            for i, position in enumerate(at):
                if (token := self.script.get(start + position)) is None:
                    continue
                if isinstance(logits, list):
                    of = logits[i].logsumexp  # so that its probability is 1
                    logits[i] = PushedLogits(logits[i].values, token, peak=of, logsumexp=of)
                else:
                    logits[i, token] += PUSH
        return results
