"""Prepares tokens and image features as a decoder's input: embeddings on the host, or ids for a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.engines import Array, Floats, TokenIds
from dualfocus.runtime.turns import Token

_Input = TypeVar("_Input", covariant=True)  # a decoder's


class EmbeddingsOf(Protocol[_Input]):
    """The embeddings of a decoder of one kind."""

    def embed(self, tokens: Sequence[Token], features: Mapping[str, Array]) -> _Input:
        """The decoder's input for `tokens`; `features` maps the names of images to their (T, D) tokens."""


Embeddings = EmbeddingsOf[Any]  # of either kind


@dataclass(frozen=True)
class HostEmbeddings:
    """The input of `engines.HostDecoder`: (L, D) embeddings, looked up in a table."""

    table: npt.NDArray[np.float32 | np.float16]  # (vocabulary, D), row i embeds token i; may be memory-mapped

    def embed(self, tokens: Sequence[Token], features: Mapping[str, Array]) -> Floats:
        """(L, D): rows of the table, and of the images' `features` (T, D)."""
        rows = self.table[[token if isinstance(token, int) else 0 for token in tokens]]
        out: Floats = np.asarray(rows, np.float32)
        shown = [(i, token) for i, token in enumerate(tokens) if not isinstance(token, int)]
        for image in {token.image for _, token in shown}:
            places = [(i, token.position) for i, token in shown if token.image == image]
            at, positions = zip(*places, strict=True)
            out[list(at)] = features[image][list(positions)]
        return out


@dataclass(frozen=True)
class DeviceEmbeddings:
    """The input of `engines.DeviceDecoder`: ids alone, since its graph holds the table."""

    vocabulary: int

    def embed(self, tokens: Sequence[Token], features: Mapping[str, Array]) -> TokenIds:
        """The ids of the tokens, with the `features` of the images among them in the order shown."""
        starts: dict[str, int] = {}  # the id of an image's first token
        end = self.vocabulary
        for name in dict.fromkeys(token.image for token in tokens if not isinstance(token, int)):
            starts[name], end = end, end + len(features[name])
        ids = [token if isinstance(token, int) else starts[token.image] + token.position for token in tokens]
        return TokenIds(np.array(ids, np.int64), tuple(features[name] for name in starts))
