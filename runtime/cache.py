"""The decoder's key/value cache: rows of one capacity, each with a length of its own.

What stands beyond a row's length is never read, so truncating only moves the length. Causal attention
makes a kept prefix exact: its entries do not depend on what follows.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.manifest import DecoderSpec

Entries = npt.NDArray[np.float32 | np.float16]


@dataclass(frozen=True)
class Snapshot:
    """A copy of the first entries of a row: per layer, keys then values, (kv_heads, length, head_size)."""

    entries: tuple[Entries, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.entries)


class KVCache:
    """Keys and values of every layer, and how many positions of each row are valid."""

    def __init__(self, spec: DecoderSpec, rows: int, capacity: int, memory: Any = np) -> None:
        """Memory is reserved for every row's `capacity`; the host's is touched only as tokens arrive.

        `memory` is the module whose arrays lie where the decoder runs: NumPy, or CuPy.
        """
        shape = (rows, spec.kv_heads, capacity, spec.head_size)
        reserve = _reserve if memory is np else memory.zeros
        self.capacity = capacity
        self.lengths = [0] * rows
        self.keys: list[Entries] = [reserve(shape, spec.dtype) for _ in range(spec.layers)]
        self.values: list[Entries] = [reserve(shape, spec.dtype) for _ in range(spec.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes reserved: 2 x layers x rows x KV heads x capacity x head size x bytes of a number."""
        return sum(array.nbytes for array in self.keys + self.values)

    @property
    def token_nbytes(self) -> int:
        """Bytes a token takes in a row."""
        return self.nbytes // (len(self.lengths) * self.capacity)

    def truncate(self, row: int, length: int) -> None:
        """Forget what row `row` holds beyond `length` tokens."""
        assert 0 <= length <= self.lengths[row], f"row {row} holds {self.lengths[row]} tokens, not {length}"
        self.lengths[row] = length

    def fork(self, source: int, target: int, length: int, kept: int = 0) -> None:
        """Make row `target` hold the first `length` tokens of row `source`; it already has `kept` of them."""
        assert kept <= self.lengths[target], f"row {target} holds {self.lengths[target]} tokens, not {kept}"
        assert kept <= length <= self.lengths[source], f"row {source} holds {self.lengths[source]} tokens"
        for array in self.keys + self.values:
            array[target, :, kept:length] = array[source, :, kept:length]
        self.lengths[target] = length

    def save(self, row: int, length: int) -> Snapshot:
        """A copy of the first `length` tokens of row `row`."""
        assert length <= self.lengths[row], f"row {row} holds {self.lengths[row]} tokens, not {length}"
        return Snapshot(tuple(array[row, :, :length].copy() for array in self.keys + self.values))

    def load(self, row: int, snapshot: Snapshot) -> None:
        """Make row `row` hold what `snapshot` does."""
        length = snapshot.entries[0].shape[1]
        for array, entries in zip(self.keys + self.values, snapshot.entries, strict=True):
            array[row, :, :length] = entries
        self.lengths[row] = length


def _reserve(shape: tuple[int, ...], dtype: str) -> Entries:
    """Zeros that take memory page by page as they are written to.

    NumPy asks the system for huge pages, of which one is all that a head of a row may ever hold.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    zeros: Entries = np.frombuffer(memory, dtype).reshape(shape)
    return zeros
