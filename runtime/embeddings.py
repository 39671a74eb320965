"""Prepares tokens and image features as a decoder's input: embeddings on the host, or ids for a device."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.engines import Array, Floats, TokenIds
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.turns import Token

# An array's file as NumPy writes it: version 1, the header's length in two bytes, the header.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?s:(?P<length>..))"
    rb"\{'descr': '<f(?P<bytes>[24])', 'fortran_order': False, "
    rb"'shape': \((?P<rows>\d{1,9}), (?P<columns>\d{1,9})\), \} *\n"
)
_LONGEST = 512  # bytes of a header, padding included

_Input = TypeVar("_Input", covariant=True)  # a decoder's


class EmbeddingsOf(Protocol[_Input]):
    """The embeddings of a decoder of one kind."""

    def embed(self, tokens: Sequence[Token], features: Mapping[str, Array]) -> _Input:
        """The decoder's input for `tokens`; `features` maps the names of images to their (T, D) tokens."""


Embeddings = EmbeddingsOf[Any]  # of either kind


def open_table(path: Path, rows: int, columns: int) -> npt.NDArray[np.float32 | np.float16]:
    """The array in the file `path`, (rows, columns) float32 or float16, memory-mapped. Raises BundleError."""
    with path.open("rb") as file:
        header = _HEADER.match(file.read(_LONGEST))
    if header is None or header.end() != 10 + int.from_bytes(header["length"], "little"):
        raise BundleError(f"{path} is not an array as exports write it: .npy, version 1, float32 or float16")
    dtype = np.dtype(f"<f{header['bytes'].decode()}")
    found = int(header["rows"]), int(header["columns"])
    if found != (rows, columns):
        raise BundleError(f"{path} is {dtype} of shape {found}, expected {(rows, columns)}")
    if (size := path.stat().st_size) != (expected := header.end() + rows * columns * dtype.itemsize):
        raise BundleError(f"{path} has {size} bytes, expected {expected} for {dtype} of shape {found}")
    return np.memmap(path, dtype, "r", header.end(), found)


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
