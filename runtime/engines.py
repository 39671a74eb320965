"""The contract between the runtime and an inference library: a vision encoder and a decoder.

A decoder is one of two kinds. One on the host takes embeddings and gives logits. One on a device takes token
ids, looks embeddings up itself and keeps the logits there. `embeddings` prepares what either takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.cache import KVCache

Floats = npt.NDArray[np.float32]
Array = Any  # NumPy's, or on a GPU CuPy's, which behaves like it

_Input = TypeVar("_Input", contravariant=True)
_Output = TypeVar("_Output", covariant=True)


@dataclass(frozen=True)
class TokenIds:
    """The input of a decoder on a device, which looks embeddings up itself.

    An id of `vocabulary` + i is row i of the concatenated `images`, (T, D) each.
    """

    ids: npt.NDArray[np.int64]  # (L,)
    images: tuple[Array, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class DeviceLogits:
    """(vocabulary,) logits that stay on a device, with what greedy decoding reads of them, computed there.

    It behaves as the part of an array that `sequence` and `generation` use.
    """

    values: Array
    best: int  # the likeliest token; the first of equals
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


class DecoderOf(Protocol[_Input, _Output]):
    """The language model over a KV cache: takes an input and gives an output for each row."""

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[_Input],
        logits_at: Sequence[Sequence[int]],
    ) -> Sequence[_Output]:
        """Append L >= 1 tokens to each of several different `rows` of `cache`, in place.

        Returns for each row the logits after its K positions `logits_at`, which count its new tokens from 0.
        """


class HostDecoder(DecoderOf[Floats, Floats], Protocol):
    """Takes (L, D) embeddings and gives (K, vocabulary) logits, in the host's memory."""


class DeviceDecoder(DecoderOf[TokenIds, list[DeviceLogits]], Protocol):
    """Takes the ids of L tokens and gives K logits that stay on the device."""


Decoder = DecoderOf[Any, Any]  # of either kind: a bundle pairs it with the embeddings of that kind
