"""`export_bundle`: checkpoint folder, or random weights -> bundle folder, complete or not at all.

Everything is written into a hidden folder beside the target, its manifest last, and only a bundle whose
graphs agreed with torch takes the target's place: in one step, so that a process that is killed, or a power
cut, leaves the old bundle or the new one. An interrupted export leaves that folder, without a manifest, so
that nothing opens it; it can be resumed after the last layer that was finished (`stream`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dualfocus.export import config, source
from dualfocus.export.errors import ExportError
from dualfocus.export.shapes import Shape
from dualfocus.runtime import contents
from dualfocus.runtime.files import claimed, sync, sync_one
from dualfocus.runtime.libraries import quiet
from dualfocus.runtime.manifest import CacheType, CoordinateSpace, Manifest, Precision, Target

# What an export writes, and what is made of a bundle in its folder (`runtime.packed`, `runtime.tensorrt`).
_WRITTEN = {
    "manifest.json",
    "vision.onnx",
    "vision.onnx.data",
    "decoder.onnx",
    "decoder.onnx.data",
    "embeddings.npy",
    "tokenizer.json",
}
_DERIVED = {"packed", "packed-rtx", "engines"}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h


def export_bundle(
    checkpoint: Path | str | Shape,
    out: Path,
    *,
    precision: Precision = "fp32",
    target: Target = "onnxruntime",
    cache: CacheType | None = None,
    ragged_append: bool = True,
    coordinates: CoordinateSpace | None = None,
    vision_tower: str | None = None,
    revision: str | None = None,
    resume: bool = False,
    progress: Callable[[str], None] = print,
    watch: Callable[[str, int, int], object] = lambda *_: None,
) -> Manifest:
    """Export the LLaVA checkpoint in the folder, or of the Hub's id, `checkpoint` as the bundle `out`.

    Given a `Shape`, its model of random weights instead, which is never written as a checkpoint.

    A bundle already at `out` is replaced, and other files in its folder are kept; a non-empty folder without
    a bundle is left alone. With `target` "onnx-standard" the decoder is written in operators of the standard
    alone; `cache` is what it keeps keys and values in. `ragged_append` gives the decoder the input that ONNX
    Runtime before 1.32 does not know.
    `coordinates` and `vision_tower` override what the checkpoint says (`checkpoint.describe`,
    `checkpoint.load`); `revision` is the Hub's. With `resume`, an export to `out` that was interrupted goes
    on, if there is one. `progress` gets one line per comparison with torch, and what fewer bits changed;
    `watch` what is done next, how many weights are done, and of how many. Raises ExportError: `out` is no
    place for a bundle or too small for it, the checkpoint is of another kind or incomplete, another one's
    export is to be resumed, or a graph differs from torch beyond tolerance.
    """
    out = Path(os.path.realpath(out))  # where a link leads, a bundle is replaced
    old = out.parent / f".{out.name}.old"
    if os.path.isdir(old) and not os.path.exists(out):  # a process was killed in `_move_into_place`
        old.rename(out)
    _check_target(out)
    if not isinstance(checkpoint, Shape):
        source.check_given(str(checkpoint), revision)
    try:
        from dualfocus.export import checkpoint as checkpoints
        from dualfocus.export import hub
        from dualfocus.export.random_weights import random_checkpoint
        from dualfocus.export.stream import Export
    except ModuleNotFoundError as error:
        raise ExportError(f"export needs {error.name}: pip install 'dualfocus[export,cpu]'") from error
    if isinstance(checkpoint, Shape):
        progress(f"random weights of shape {checkpoint.name}")
        loaded, commit = random_checkpoint(checkpoint), None
    else:
        folder, commit = hub.fetch(str(checkpoint), revision, source.check_folder)
        name = folder.resolve().name if commit is None else str(checkpoint).rpartition("/")[2]
        loaded = checkpoints.load(folder, name, vision_tower)
    manifest = checkpoints.describe(
        loaded,
        ragged_append=ragged_append,
        precision=precision,
        target=target,
        cache=cache,
        coordinates=coordinates,
        revision=commit,
    )
    folder = out.parent / f".{out.name}.partial"
    export = Export(loaded, manifest, folder, progress, watch)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_room(folder, export.needs())
        with claimed(folder, ExportError):
            export.begin(resume=resume)
            try:
                with quiet():
                    export.run()
                manifest = dataclasses.replace(manifest, files=contents.entries(folder))
                (folder / "manifest.json").write_text(
                    json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8"
                )
                _move_into_place(folder, out)
            except Exception:  # what interrupts is none: that can go on
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        place = folder if error.filename is None else error.filename
        raise ExportError(
            f"{place} cannot be written: {error.strerror or error}; this export takes {_size(export.needs())}"
        ) from error
    return manifest


def _check_target(out: Path) -> None:
    """Raise ExportError unless `out` is a bundle, an empty folder or nothing."""
    try:
        names = os.listdir(out)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ExportError(f"{out} is a file, expected a bundle or nothing") from None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ExportError(f"{out} cannot be written: {problem}") from None
    if names and not _is_bundle(out):
        raise ExportError(f"{out} is a folder with other things in it, expected a bundle or nothing")


def _is_bundle(folder: Path) -> bool:
    """Whether there is a manifest, whole or damaged: not another program's."""
    path = folder / "manifest.json"
    if not path.is_file():
        return False
    try:
        raw = config.read(path, object)
    except ExportError:
        return True
    return isinstance(raw, dict) and (not raw or "format_version" in raw)


def _check_room(folder: Path, needed: int) -> None:
    """Raise ExportError if the disk has no room; what an earlier attempt left in `folder` makes some."""
    left = sum(path.lstat().st_size for path in folder.rglob("*")) if folder.is_dir() else 0
    free = shutil.disk_usage(folder.parent).free
    if free + left < needed:
        raise ExportError(f"{folder.parent} has room for {_size(free)}, this export takes {_size(needed)}")


def _size(count: int) -> str:
    """Bytes, in the unit that says something."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _move_into_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`, whose old bundle goes; what else is in its folder is kept.

    Everything is on the disk before and after.
    """
    sync(folder)
    if not out.exists():
        folder.rename(out)
        sync_one(out.parent)
        return
    for path in _others(out):  # under both names until the old folder goes
        _link(path, folder / path.name)
    sync_one(folder)
    old = folder
    if not _exchange(folder, out):
        old = out.parent / f".{out.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise
    sync_one(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _others(out: Path) -> list[Path]:
    """What is in the folder of the old bundle `out` and neither of it nor made of it."""
    try:
        listed = set(config.read(out / "manifest.json", _Listed).files)
    except ExportError:  # damaged
        listed = set()
    ours = _WRITTEN | _DERIVED | listed
    return [path for path in out.iterdir() if path.name not in ours and not path.name.endswith(".unfinished")]


class _Listed(msgspec.Struct):
    """Of a bundle's manifest, the names of its files."""

    files: dict[str, Any]


def _link(path: Path, other: Path) -> None:
    """Give what is at `path` the second name `other`: a hard link, or a copy where there are none."""

    def link(of: str, to: str) -> None:
        try:
            os.link(of, to, follow_symlinks=False)
        except OSError:
            shutil.copy2(of, to, follow_symlinks=False)

    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, other, symlinks=True, copy_function=link)
    else:
        link(str(path), str(other))


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
