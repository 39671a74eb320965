"""Reads files from outside: bounded, regular files only, JSON into types.

Whatever is wrong with a file is one sentence, raised as the error class of the room that reads it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TypeVar

import msgspec

from dualfocus.runtime.errors import InputError

T = TypeVar("T")
JSON_LIMIT = 64 << 20  # bytes: tokenizer.json, the largest JSON file of a model, has 10 to 30 million


def read_bytes(path: Path, error: type[InputError], *, limit: int) -> bytes:
    """The content of the regular file `path`. Links are followed.

    Raises `error` where there is no such file, where it is a folder, a device or a FIFO (which may never
    end), and where it has more than `limit` bytes.
    """
    try:
        # a FIFO without a writer would block the opening
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            regular = stat.S_ISREG(os.fstat(handle).st_mode)
            content = file.read(limit + 1) if regular else b""
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path} does not exist") from None
    except IsADirectoryError:
        raise error(f"{path} is a folder, expected a file") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        raise error(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    if not regular:
        raise error(f"{path} is not a regular file")
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
        raise error(f"{name}: {_sentence(problem)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise error(f"{name} is not JSON: {problem}") from None
    except RecursionError:
        raise error(f"{name} is nested too deeply to be read") from None


def convert(value: object, kind: type[T], error: type[InputError], name: str) -> T:
    """What was read from JSON already, as a `kind`; raises as `decode_json` does."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise error(f"{name}: {_sentence(problem)}") from None
    except RecursionError:
        raise error(f"{name} is nested too deeply to be read") from None


def _sentence(problem: msgspec.ValidationError) -> str:
    """msgspec's message with the field first: "decoder.layers: expected `int` <= 1024"."""
    message, found, path = str(problem).rpartition(" - at `$")
    if not found:
        return _lower(str(problem))
    field = path.rstrip("`").lstrip(".")
    return f"{field}: {_lower(message)}" if field else _lower(message)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
