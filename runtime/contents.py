"""The files that a folder lists, as a bundle does and what `pack` made of one: their sizes and hashes."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.files import claimed, is_plain_name, read_json, sync
from dualfocus.runtime.manifest import FileEntry, Files

NOTE_LIMIT = 1 << 20  # bytes
HASHED_BYTES = 64_000_000  # of what is opened, hashed at every opening; the whole by `inspect --verify`


def entries(folder: Path) -> dict[str, FileEntry]:
    """Every file of `folder`, read from end to end."""
    return {
        path.name: FileEntry(path.stat().st_size, _digest(path))
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def check(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise BundleError unless `folder` itself holds the regular `files`, of the sizes listed."""
    for name, entry in files.items():
        file = find(folder, name)
        if not os.path.exists(file):
            raise BundleError(f"{file} is missing: the bundle is incomplete")
        if not os.path.isfile(file):
            raise BundleError(f"{file} is not a regular file")
        if (size := file.stat().st_size) != entry.size:
            raise BundleError(f"{file} has {size} bytes, expected {entry.size}: the bundle is damaged")


def find(folder: Path, name: str) -> Path:
    """The path of the file `name` of `folder`. Raises BundleError for one that is elsewhere, as by a link.

    Links of the Hub's cache, from a snapshot to its blobs, are followed.
    """
    if not is_plain_name(name):
        raise BundleError(f"{folder} lists {name!r:.80}, expected a plain file name")
    path = folder / name
    if path.is_symlink():
        inside = os.path.realpath(folder)
        repository, snapshots = os.path.split(os.path.dirname(inside))
        allowed = [inside, *([os.path.join(repository, "blobs")] if snapshots == "snapshots" else [])]
        if os.path.dirname(os.path.realpath(path)) not in allowed:
            raise BundleError(f"{path} is a link to a file elsewhere, expected the file itself")
    return path


def verify(folder: Path, files: Mapping[str, FileEntry], most: float = math.inf) -> None:
    """Raise BundleError if one of the `files` of `folder`, all of which are there, has not the hash listed.

    The smallest are read first, and no more than `most` bytes in all.
    """
    for name, entry in sorted(files.items(), key=lambda of: of[1].size):
        if (most := most - entry.size) < 0:
            return
        if (found := _digest(folder / name)) != entry.sha256:
            raise BundleError(f"{folder / name} has SHA-256 {found}, expected {entry.sha256}")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None


class Noted(Protocol):
    """A note that was written into a folder last, about the others of its files."""

    @property
    def files(self) -> Files: ...


N = TypeVar("N", bound=Noted)


def write_note(folder: Path, name: str, note: Noted) -> None:
    """Write the `note` about the files of `folder` as the JSON file `name`."""
    (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(note)) + b"\n")


def read_note(path: Path, folder: str, name: str, kind: type[N]) -> tuple[Path, N]:
    """The `folder` of the bundle at `path`, and the note `name` in it, a dataclass. Raises BundleError."""
    found = find(path, folder)
    return found, read_json(find(found, name), kind, BundleError, limit=NOTE_LIMIT)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` at the end, whole and on the disk.

    Raises BundleError where another process is writing one, and where the disk does not take it.
    """
    new = folder.parent / f".{folder.name}.unfinished"
    try:
        with claimed(folder.parent, BundleError):
            try:
                shutil.rmtree(new, ignore_errors=True)  # what a killed process left
                new.mkdir()
                yield new
                sync(new)
                if folder.is_symlink():
                    folder.unlink()
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error.strerror or error}") from None
