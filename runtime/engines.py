"""What an inference library has to provide. One module per library: `onnx` is onnxruntime's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.cache import KVCache

Floats = npt.NDArray[np.float32]
Array = Any  # NumPy's, or on a GPU CuPy's, which behaves like it


@dataclass(frozen=True)
class TokenIds:
    """What a decoder on a device is given in place of embeddings: it looks them up itself.

    An id of `vocabulary` + i is row i of `images`, (T, D) each, one behind the other.
    """

    ids: npt.NDArray[np.int64]  # (L,)
    images: tuple[Array, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class DeviceLogits:
    """(vocabulary,) logits that stay on a device: what decoding asks about them was computed there.

    It behaves as the part of an array that `sequence` and `reply` use.
    """

    values: Array
    best: int  # the likeliest token; of equals the first
    peak: float  # its logit
    logsumexp: float

    def argmax(self) -> int:
        """The likeliest token."""
        return self.best

    def __getitem__(self, tokens: list[int]) -> Floats:
        """The logits of some tokens, on the host."""
        return to_host(self.values[tokens])


Logits = Floats | DeviceLogits  # (vocabulary,), of one position


def address(array: Array) -> int:
    """Where the array's memory begins, on the host or on its device."""
    found: int = array.__array_interface__["data"][0] if type(array) is np.ndarray else array.data.ptr
    return found


def to_host(array: Array) -> npt.NDArray[Any]:
    """The array in the host's memory, where it may be already."""
    host: npt.NDArray[Any] = array.get() if hasattr(array, "get") else array
    return host


class VisionEncoder(Protocol):
    """Vision tower and projector."""

    def encode(self, pixels: Array) -> Array:
        """(N, 3, S, S) normalised pixels -> (N, T, D) image tokens, which stay on the encoder's device."""


class Decoder(Protocol):
    """The language model over input embeddings and a cache."""

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Any],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Any]:
        """Append to several `rows` of `cache`, in place: L >= 1 each, `embeddings` of `sequence.embed`'s.

        Returns for each row the (K, vocabulary) logits after its positions `logits_at`, counted in 0..L-1:
        on the host an array, on a device K `DeviceLogits`.
        """
