"""A checkpoint's tensors, each read from its place on disk when it is asked for.

PyTorch's ``.bin`` files and safetensors are opened by mapping them, so that a checkpoint larger than memory
can be read, one tensor at a time. Nothing in a ``.bin`` file is run: one that wants more than tensors is
refused.
"""

from __future__ import annotations

import re
import zipfile
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from dualfocus.export import config
from dualfocus.export.errors import ExportError
from dualfocus.export.source import WEIGHTS
from dualfocus.runtime.libraries import foreign

_TORCH = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
FLOATS = tuple(_TORCH.values())  # that are read, as safetensors calls them
_POINTER = b"version https://git-lfs"  # how a file begins that stands for one not downloaded

Renames = Sequence[tuple[str, str]]  # regular expression at a name's beginning, and what replaces it


class Weights(Protocol):
    """A model's tensors by their names in `LlavaForConditionalGeneration`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor there is."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Of the same, as safetensors calls them: what is stored as "F16" loses nothing as float16."""

    @property
    def identity(self) -> str:
        """The same for the same weights."""

    def read(self, name: str) -> Tensor:
        """The tensor `name`, float32 and the caller's own."""


class StoredWeights:
    """`Weights` of one folder or several."""

    def __init__(self, *sources: dict[str, Place]) -> None:
        """Of `places`; where two have one tensor, the first counts."""
        self._places = dict(ChainMap(*sources))
        self.shapes = {name: place.shape for name, place in self._places.items()}
        self.dtypes = {name: place.dtype for name, place in self._places.items()}
        files = sorted({place.file for place in self._places.values()})
        self.identity = str(
            [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        )
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        self.reads[name] += 1
        # a file that ends early, or a disk that does
        with foreign(f"{place.file}: {place.key} cannot be read", ExportError):
            tensor = place.read()
        return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class Place:
    """Where one tensor is."""

    def __init__(self, file: Path, key: str, opened: Any) -> None:
        self.file, self.key, self._opened = file, key, opened
        if isinstance(opened, dict):
            tensor = opened[key]
            self.shape, self.dtype = tuple(tensor.shape), _TORCH.get(tensor.dtype, str(tensor.dtype))
        else:
            entry = opened.get_slice(key)
            self.shape, self.dtype = tuple(entry.get_shape()), entry.get_dtype()

    def read(self) -> Tensor:
        tensor: Tensor = (
            self._opened[self.key] if isinstance(self._opened, dict) else self._opened.get_tensor(self.key)
        )
        return tensor


def places(folder: Path, renames: Renames) -> dict[str, Place]:
    """Where the tensors of the checkpoint in `folder` are, which has its own names for them.

    Raises ExportError where there are none, or what cannot be read.
    """
    return {_renamed(place.key, renames): place for place in _open(folder)}


def _open(folder: Path) -> Iterator[Place]:
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ExportError(f"{folder} has no weights, expected one of {', '.join(WEIGHTS)}")
    if path.suffix == ".json":
        yield from _open_shards(folder, path)
        return
    opened = _open_file(path)
    yield from (Place(path, key, opened) for key in opened.keys())  # noqa: SIM118


def _open_shards(folder: Path, index: Path) -> Iterator[Place]:
    listed = config.shards(index)
    opened = {}
    for file in sorted(set(listed.values())):
        if not (folder / file).is_file():
            raise ExportError(f"{folder} lacks {file}, which its index lists")
        opened[file] = _open_file(folder / file)
    held = {file: set(tensors.keys()) for file, tensors in opened.items()}
    # A tensor that its file lacks is missed only if the model needs it.
    yield from (Place(folder / file, key, opened[file]) for key, file in listed.items() if key in held[file])


def _open_file(path: Path) -> Any:
    """By name: tensors (``.bin``), or what reads them (safetensors)."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise ExportError(f"{path} is empty, expected weights")
    if start == _POINTER:
        raise ExportError(f"{path} is a pointer of Git LFS, expected the weights that `git lfs pull` brings")
    is_zip = zipfile.is_zipfile(path)
    if start.startswith(b"PK") and not is_zip:  # whose contents are listed at the end
        raise ExportError(f"{path} cannot be read: its end is missing")
    with foreign(f"{path} cannot be read", ExportError):
        if path.suffix == ".safetensors":
            return safe_open(path, "pt")
        try:
            # a file in the format before PyTorch 1.6 cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except UnpicklingError as error:
            if "global" in str(error).lower():  # that is, a name of Python's, to be called
                raise ExportError(
                    f"{path} holds pickled code, which is never run, expected tensors alone"
                ) from None
            raise ExportError(f"{path} cannot be read: PyTorch saves nothing like it") from None
    if not isinstance(tensors, dict):
        raise ExportError(f"{path} holds a {type(tensors).__name__}, expected tensors by name")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or not _is_dense(tensor):
            raise ExportError(
                f"{path} holds a {type(tensor).__name__} as {key!r}, expected dense tensors by name"
            )
    return tensors


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _renamed(name: str, renames: Renames) -> str:
    for beginning, replacement in renames:
        new, found = re.subn(f"^{beginning}", replacement, name)
        if found:
            return new
    return name
