"""The decoder's key/value cache: rows of one capacity, each with a length of its own.

What stands beyond a row's length is never read, so truncating only moves the length. Causal attention
makes a kept prefix exact: its entries do not depend on what follows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.manifest import DecoderSpec


class KVCache:
    """Keys and values of every layer, and how many positions of each row are valid."""

    def __init__(self, spec: DecoderSpec, rows: int, capacity: int) -> None:
        """Memory is reserved for every row's `capacity`, and touched only as tokens arrive."""
        shape = (rows, spec.kv_heads, capacity, spec.head_size)
        self.capacity = capacity
        self.lengths = [0] * rows
        self.keys: list[npt.NDArray[np.float32]] = [np.zeros(shape, spec.dtype) for _ in range(spec.layers)]
        self.values: list[npt.NDArray[np.float32]] = [np.zeros(shape, spec.dtype) for _ in range(spec.layers)]

    @property
    def nbytes(self) -> int:
        """Bytes reserved: 2 x layers x rows x KV heads x capacity x head size x 4."""
        return sum(array.nbytes for array in self.keys + self.values)

    def fork(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""
        length = self.lengths[source]
        for array in self.keys + self.values:
            array[target, :, :length] = array[source, :, :length]
        self.lengths[target] = length

    def truncate(self, row: int, length: int) -> None:
        """Forget what row `row` holds beyond `length` tokens."""
        assert 0 <= length <= self.lengths[row], f"row {row} holds {self.lengths[row]} tokens, not {length}"
        self.lengths[row] = length
