"""A checkpoint's tensors, each read from its place on disk when it is asked for.

PyTorch's ``.bin`` files and safetensors are opened by mapping them, so that a checkpoint larger than memory
can be read, one tensor at a time. Nothing in a ``.bin`` file is run: one that wants more than tensors is
refused.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from dualfocus.export.errors import ExportError, first_line

FLOATS = {"F16": 2, "BF16": 2, "F32": 4}  # as safetensors calls them, and bytes of a number
_TORCH = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# What a folder may hold, the best first: an index of shards, or all in one file.
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")

Renames = Sequence[tuple[str, str]]  # regular expression at a name's beginning, and what replaces it


class Weights(Protocol):
    """A model's tensors by their names in `LlavaForConditionalGeneration`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor there is."""

    @property
    def is_half(self) -> bool:
        """float16, all of them: what is stored as such loses nothing."""

    @property
    def identity(self) -> str:
        """The same for the same weights."""

    def read(self, name: str) -> Tensor:
        """The tensor `name`, float32 and the caller's own."""


class StoredWeights:
    """`Weights` of one folder or several, each with its own names for the tensors."""

    def __init__(self, sources: Iterable[tuple[Path, Renames]]) -> None:
        """Open what the folders hold; where two hold one tensor, the first counts. Raises ExportError."""
        self._places: dict[str, _Place] = {}
        for folder, renames in sources:
            for place in _open(folder):
                name = _renamed(place.key, renames)
                self._places.setdefault(name, place)
        self.shapes = {name: place.shape for name, place in self._places.items()}
        self.is_half = all(place.dtype == "F16" for place in self._places.values() if place.dtype in FLOATS)
        files = sorted({place.file for place in self._places.values()})
        self.identity = str(
            [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        )
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        if place.dtype not in FLOATS:
            raise ExportError(
                f"{place.file}: {place.key} is of type {place.dtype}, expected one of {', '.join(FLOATS)}"
            )
        self.reads[name] += 1
        try:
            tensor = place.read()
        except Exception as error:  # a file that ends early, or a disk that does
            raise ExportError(f"{place.file}: {place.key} cannot be read: {first_line(error)}") from error
        return tensor.to(torch.float32, copy=True)


class _Place:
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


def holds_weights(folder: Path) -> bool:
    """Whether there are weights of either kind in `folder`."""
    return any((folder / name).is_file() for name in (*_INDEX, *_SINGLE))


def _open(folder: Path) -> Iterator[_Place]:
    """Every tensor of the checkpoint in `folder`."""
    for index, single in zip(_INDEX, _SINGLE, strict=True):
        if (folder / index).is_file():
            yield from _open_shards(folder, folder / index)
            return
        if (folder / single).is_file():
            opened = _open_file(folder / single)
            yield from (_Place(folder / single, key, opened) for key in opened.keys())  # noqa: SIM118
            return
    raise ExportError(f"{folder} has no weights, expected one of {', '.join((*_INDEX, *_SINGLE))}")


def _open_shards(folder: Path, index: Path) -> Iterator[_Place]:
    listed = read_json(index, "").get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ExportError(f"{index} lists no weights: expected a weight_map of names and files")
    opened: dict[str, Any] = {}
    for key, file in listed.items():
        if Path(file).name != file:
            raise ExportError(f"{index} lists {file!r}, expected a file beside it")
        if file not in opened:
            if not (folder / file).is_file():
                raise ExportError(f"{folder} lacks {file}, which its index lists")
            opened[file] = _open_file(folder / file)
        if key not in opened[file].keys():  # noqa: SIM118  safetensors' handle has no `in`
            raise ExportError(f"{folder / file} holds no {key}, which {index.name} says it does")
        yield _Place(folder / file, key, opened[file])


def _open_file(path: Path) -> Any:
    """By name: tensors (``.bin``), or what reads them (safetensors)."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, "pt")
        # a file in the format before PyTorch 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged or a hostile file makes the libraries raise
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise ExportError(f"{path} wants to run code when it is read, expected tensors alone") from None
        raise ExportError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ExportError(f"{path} holds a {type(tensors).__name__}, expected tensors by name")
    return tensors


def _renamed(name: str, renames: Renames) -> str:
    for beginning, replacement in renames:
        new, found = re.subn(f"^{beginning}", replacement, name)
        if found:
            return new
    return name


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The object in `path`; ExportError, beginning with `missing` where there is no file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(f"{missing}: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ExportError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw
