"""What an inference library has to provide. One module per library: `onnx` is onnxruntime's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.cache import KVCache

Floats = npt.NDArray[np.float32]


class VisionEncoder(Protocol):
    """Vision tower and projector."""

    def encode(self, pixels: Floats) -> Floats:
        """(N, 3, S, S) normalised pixels -> (N, T, D) image tokens."""


class Decoder(Protocol):
    """The language model over input embeddings and a cache."""

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        """Append to several `rows` of `cache`, in place: (L, D) `embeddings` each, L >= 1 of its own.

        Returns for each row the (K, vocabulary) logits after its positions `logits_at`, counted in 0..L-1.
        """
