"""The decoder's key/value cache: rows of one capacity, each with a length of its own.

What stands beyond a row's length is never read, so truncating only moves the length. Causal attention
makes a kept prefix exact: its entries do not depend on what follows.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.manifest import DecoderSpec

Entries = npt.NDArray[np.float32 | np.float16]
WORTH_FREEING = 8_000_000  # bytes of a row


class KVCache:
    """Keys and values of every layer, and how many positions of each row are valid."""

    def __init__(self, spec: DecoderSpec, rows: int, capacity: int, memory: Any = np) -> None:
        """Memory is reserved for every row's `capacity`; the host's is touched only as tokens arrive.

        `memory` is the module whose arrays lie where the decoder runs: NumPy, or CuPy.
        """
        shape = (rows, spec.kv_heads, capacity, spec.head_size)
        self.capacity = capacity
        self.lengths = [0] * rows
        self._pages: list[mmap.mmap] = []  # the host's memory of each array, where it can be given back
        arrays = [
            self._reserve(shape, spec.dtype) if memory is np else memory.zeros(shape, spec.dtype)
            for _ in range(2 * spec.layers)
        ]
        self.keys: list[Entries] = arrays[::2]
        self.values: list[Entries] = arrays[1::2]

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

    def clear(self, row: int) -> None:
        """Empty row `row`. The host's memory goes back to the system, where that is worth the page faults."""
        size = self.nbytes // (len(self.lengths) * 2 * len(self.keys))
        first, last = -(-row * size // mmap.PAGESIZE), (row + 1) * size // mmap.PAGESIZE
        if first < last and self.lengths[row] * self.token_nbytes >= WORTH_FREEING:
            for pages in self._pages:
                pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)
        self.lengths[row] = 0

    def _reserve(self, shape: tuple[int, ...], dtype: str) -> Entries:
        """Zeros that take memory page by page as they are written to.

        NumPy asks the system for huge pages, of which one is all that a head of a row may ever hold.
        """
        if not hasattr(mmap, "MADV_NOHUGEPAGE"):
            return np.zeros(shape, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        self._pages.append(pages)
        zeros: Entries = np.frombuffer(pages, dtype).reshape(shape)
        return zeros
