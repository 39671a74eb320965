"""Reads files from outside: bounded, regular files only, JSON into types. Writes JSON, and whole folders.

Whatever is wrong with a file is one sentence, raised as the error class of the room that reads it.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import msgspec.inspect

from dualfocus.runtime.errors import InputError

T = TypeVar("T")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # how one begins; also with a slash lost, as `Path` loses it
JSON_LIMIT = 64 << 20  # bytes: tokenizer.json, the largest JSON file of a model, has 10 to 30 million


def open_file(path: Path, error: type[InputError]) -> BinaryIO:
    """The regular file `path`, opened for reading. Links are followed.

    Raises `error` where there is no such file, and where it is a folder, a device or a FIFO (which may never
    end).
    """
    try:
        # a FIFO without a writer would block the opening
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path} does not exist") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise error(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise error(f"{path} is {'a folder, expected a file' if stat.S_ISDIR(mode) else 'not a regular file'}")


def read_bytes(path: Path, error: type[InputError], *, limit: int) -> bytes:
    """The content of the file `path`. Raises `error` as `open_file` does, and beyond `limit` bytes."""
    with open_file(path, error) as file:
        try:
            content = file.read(limit + 1)
        except OSError as problem:
            raise error(f"{path} cannot be read: {problem.strerror}") from None
    if len(content) > limit:
        raise error(f"{path} has more than {limit:,} bytes")
    return content


def read_json(path: Path, kind: type[T], error: type[InputError], *, limit: int = JSON_LIMIT) -> T:
    """The JSON file `path` as a `kind`: a dataclass, a `msgspec.Struct` or a built-in type.

    Raises `error` as `read_bytes` and `decode_json` do.
    """
    return decode_json(read_bytes(path, error, limit=limit), kind, error, str(path))


def decode_json(text: bytes, kind: type[T], error: type[InputError], name: str) -> T:
    """JSON as a `kind`. Bounds of numbers and lengths are `msgspec.Meta` in the type's annotations.

    Raises `error`, which names `name` and the first field that is wrong: not JSON (NaN and Infinity are
    none), nested too deeply, of another type, out of bounds.
    """
    try:
        return msgspec.json.decode(text.removeprefix(b"\xef\xbb\xbf"), type=kind)
    except msgspec.ValidationError as problem:
        raise error(f"{name}: {_sentence(problem, kind)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise error(f"{name} is not JSON: {problem}") from None
    except RecursionError:
        raise error(f"{name} is nested too deeply to be read") from None


def convert(value: object, kind: type[T], error: type[InputError], name: str) -> T:
    """What was read from JSON already, as a `kind`; raises as `decode_json` does."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise error(f"{name}: {_sentence(problem, kind)}") from None
    except UnicodeEncodeError:
        raise error(f"{name} holds half a character, a surrogate, expected text") from None
    except RecursionError:
        raise error(f"{name} is nested too deeply to be read") from None


def _sentence(problem: msgspec.ValidationError, kind: Any) -> str:
    """msgspec's message with the field first: "decoder.layers: expected `int` <= 1024"."""
    message, _, path = str(problem).partition(" - at `")
    field = path.removeprefix("key` in `").removeprefix("$").rstrip("`").lstrip(".")
    if message.startswith(("Invalid enum value", "Invalid value")):
        message += f", expected one of {', '.join(_choices(kind, field))}"
    message = message[:1].lower() + message[1:]
    return f"{field}: {message}" if field else message


def _choices(kind: Any, field: str) -> list[str]:
    """The values that a literal, or the tag of a union, at `field` of a `kind` may have."""
    places = [msgspec.inspect.type_info(kind)]
    for name in re.findall(r"\[[^]]*\]|[^.[]+", field):
        places = [inside for place in _members(places) for inside in _inside(place, name)]
    return [
        str(value)
        for place in _members(places)
        if isinstance(place, msgspec.inspect.LiteralType)
        for value in place.values
    ]


def _members(places: list[msgspec.inspect.Type]) -> list[Any]:
    """The types, and in place of a union its members."""
    return [
        member
        for place in places
        for member in (place.types if isinstance(place, msgspec.inspect.UnionType) else [place])
    ]


def _inside(place: Any, name: str) -> list[msgspec.inspect.Type]:
    """The types of what is in a `place` by that name: a field, or "[...]" for an item."""
    if name == getattr(place, "tag_field", None):
        return [msgspec.inspect.LiteralType((place.tag,))]
    if not name.startswith("["):
        return [of.type for of in getattr(place, "fields", ()) if of.encode_name == name]
    items = (getattr(place, of, None) for of in ("value_type", "item_type"))
    return [item for item in items if item is not None]


def to_json(value: object, indent: int | None = None) -> str:
    """`value` as JSON in ASCII. NaN and infinities, which JSON does not know, are null."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(of) for of in value]
    return value


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block the name of the file it writes: errors of writes have none."""
    try:
        yield
    except OSError as problem:
        if problem.filename is None:
            problem.filename = str(path)
        raise


@contextmanager
def with_parents(path: Path) -> Iterator[None]:
    """Make the missing folders above `path`; remove them again where the block fails."""
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # something else lies in one by now
            for folder in missing:
                folder.rmdir()
        raise


@contextmanager
def claimed(folder: Path, error: type[InputError]) -> Iterator[None]:
    """Make `folder`, if it is not there, and keep other processes that claim it out until the block ends.

    The claim ends with the process, however that ends. Raises `error` where another process holds it.
    """
    handle = _claim(folder, error)
    try:
        yield
    finally:
        os.close(handle)


def _claim(folder: Path, error: type[InputError]) -> int:
    while True:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise error(f"another process writes to {folder} already") from None
        except FileNotFoundError:
            pass
        os.close(handle)  # who held it has removed the folder since: make it again


def is_plain_name(name: str) -> bool:
    """Whether `name` names a file of a folder: nothing elsewhere, and not the folder itself."""
    return Path(name).name == name and name not in ("", "..") and name.isprintable()


def empty(folder: Path) -> None:
    """Remove what is in the folder. Links are removed, and what they lead to stays."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync(folder: Path) -> None:
    """Bring the folder's files and names to the disk: a rename that follows is then of whole files."""
    for path in (*folder.rglob("*"), folder):
        sync_one(path)


def sync_one(path: Path) -> None:
    """Bring one file, or the names in one folder, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
