"""What outlives a question: encoded images and the cached prefixes they end, bounded by bytes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from dualfocus.runtime.engines import Array
from dualfocus.runtime.image import Picture
from dualfocus.runtime.sequence import Prefix


@dataclass(frozen=True)
class EncodedImage:
    """An image's (T, D) tokens, and of a whole picture the part of a row that every question begins with."""

    features: Array
    prefix: Prefix | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.features.nbytes) + (self.prefix.nbytes if self.prefix else 0)


class ImagePool:
    """Images by name, of at most `limit` bytes together; the least recently used go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._images: OrderedDict[str, EncodedImage] = OrderedDict()  # least recently used first

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(image.nbytes for image in self._images.values())

    def get(self, name: str) -> EncodedImage | None:
        """The image of that name, if it is kept."""
        if name in self._images:
            self._images.move_to_end(name)
        return self._images.get(name)

    def put(self, name: str, image: EncodedImage) -> None:
        """Keep `image`, in place of what was kept under its name; not if it is larger than the pool."""
        if image.nbytes > self.limit:
            return
        self._images[name] = image
        self._images.move_to_end(name)
        while self.nbytes > self.limit:
            self._images.popitem(last=False)


def image_name(picture: Picture, model: str) -> str:
    """A name that two pictures share only if shape, every byte and the model are the same."""
    digest = hashlib.sha256(f"{model} {picture.shape} {picture.dtype}".encode())
    digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()
