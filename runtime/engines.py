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

    def extend(self, cache: KVCache, row: int, embeddings: Floats, logits_at: Sequence[int]) -> Floats:
        """Append (L, D) `embeddings` to a row of `cache`, in place.

        Returns (K, vocabulary) logits after each of the K positions `logits_at`, counted in 0..L-1.
        """
