"""Slots of the KV cache, handed out by what they hold, and encoded images: what outlives a request.

A free slot keeps its tokens. Free slots are the prefix cache: a prompt gets the slot that holds most of it,
or a copy of that part. They and the images hold at most `limit` bytes; the least recently used go first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Array
from dualfocus.runtime.image import Picture
from dualfocus.runtime.sequence import CachedSequence, Extension, common_prefix
from dualfocus.runtime.turns import Token


class PrefixCache:
    """The slots of `cache`, and image tokens by name."""

    def __init__(self, cache: KVCache, limit: int) -> None:
        """`limit` is in bytes. It does not count what live requests use."""
        self.limit = limit
        self.slots = [CachedSequence(cache, row) for row in range(len(cache.lengths))]
        self._token_nbytes = cache.token_nbytes
        # free slots by row and (T, D) images by name, the least recently used first
        self._kept: OrderedDict[int | str, CachedSequence | Array] = OrderedDict(enumerate(self.slots))
        self._owners: dict[int, object] = {}  # by row: the live request that used a slot last

    @property
    def free(self) -> list[CachedSequence]:
        """The free slots, the least recently used first."""
        return [kept for kept in self._kept.values() if isinstance(kept, CachedSequence)]

    @property
    def nbytes(self) -> int:
        """Bytes kept for later requests."""
        return sum(self._size(key) for key in self._kept)

    def image(self, name: str) -> Array | None:
        """The (T, D) tokens of an image, if they are kept."""
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def keep_image(self, name: str, features: Array) -> None:
        """Keep an image, unless it alone is larger than the limit."""
        if features.nbytes <= self.limit:
            self._kept[name] = features
            self._evict()

    def acquire(
        self, tokens: Sequence[Token], owner: object, coming: Iterable[Extension]
    ) -> CachedSequence | None:
        """A slot that holds as much of a prompt as any slot does, for the live request `owner`.

        None if no slot is free, or if an extension that is `coming` will hold more of the prompt.
        """
        free = self.free
        if not free:
            return None
        held = {slot.row: common_prefix(slot.tokens, tokens) for slot in self.slots}
        source = max(self.slots, key=lambda slot: (held[slot.row], slot.row in self._kept))
        length = held[source.row]
        if any(extension.prefix(tokens) > length for extension in coming):
            return None
        # what another live request used last it may soon need again
        able = [slot for slot in free if self._owners.get(slot.row, owner) is owner] or free
        if length and source in able and not source.shows_images(length):
            slot = source
        else:
            # one call of the graph covers all rows from first to last: those in use are to be neighbours
            busy = {slot.row for slot in self.slots if slot.row not in self._kept}
            slot = next((slot for slot in able if {slot.row - 1, slot.row + 1} & busy), able[0])
            if slot is source:
                slot.cut(length)
            else:
                slot.fork_from(source, length)
        del self._kept[slot.row]
        self._owners[slot.row] = owner
        return slot

    def release(self, slot: CachedSequence) -> None:
        """Take back a slot, with what it holds."""
        self._kept[slot.row] = slot

    def end(self, owner: object) -> None:
        """The request `owner` is over: what it used is kept as far as the limit allows."""
        for row in [row for row, of in self._owners.items() if of is owner]:
            del self._owners[row]
            self.slots[row].forget()
        self._evict()

    def clear(self) -> None:
        """Take back all slots, empty: what they hold may be half written."""
        self._owners.clear()
        for slot in self.slots:
            slot.clear()
            self._kept[slot.row] = slot

    def _size(self, key: int | str) -> int:
        kept = self._kept[key]
        if isinstance(kept, CachedSequence):
            return 0 if key in self._owners else len(kept.tokens) * self._token_nbytes
        return int(kept.nbytes)

    def _evict(self) -> None:
        excess = self.nbytes - self.limit
        for key, kept in list(self._kept.items()):
            if excess <= 0:
                break
            excess -= self._size(key)
            if not isinstance(kept, CachedSequence):
                del self._kept[key]
            elif key not in self._owners:
                kept.clear()


def image_name(picture: Picture, model: str) -> str:
    """A name that two pictures share only if shape, every byte and the model are the same."""
    digest = hashlib.sha256(f"{model} {picture.shape} {picture.dtype}".encode())
    digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()
