"""`export_bundle`: checkpoint folder, or random weights -> bundle folder, complete or not at all.

Everything is written into a hidden folder beside the target, its manifest last, and only a bundle whose
graphs agreed with torch is renamed into place. An interrupted export leaves that folder, without a manifest,
so that nothing opens it; it can be resumed behind the last layer that was finished (`stream`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from dualfocus.export.errors import ExportError
from dualfocus.export.shapes import Shape
from dualfocus.runtime.manifest import CacheType, CoordinateSpace, FileEntry, Manifest, Precision, Target


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

    A bundle already at `out` is replaced; any other non-empty folder is left alone. With `target`
    "onnx-standard" the decoder is written in operators of the standard alone; `cache` is what it keeps keys
    and values in. `ragged_append` gives the decoder the input that ONNX Runtime before 1.32 does not know.
    `coordinates` and `vision_tower` override what the checkpoint says (`checkpoint.describe`,
    `checkpoint.load`); `revision` is the Hub's. With `resume`, an export to `out` that was interrupted goes
    on, if there is one. `progress` gets one line per comparison with torch, and what fewer bits changed;
    `watch` what is done next, how many weights are done, and of how many. Raises ExportError: `out` is no
    place for a bundle or too small for it, the checkpoint is of another kind or incomplete, another one's
    export is to be resumed, or a graph differs from torch beyond tolerance.
    """
    _check_target(out)
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
        source, commit = hub.fetch(str(checkpoint), revision)
        name = source.resolve().name if commit is None else str(checkpoint).rpartition("/")[2]
        with _quiet():
            loaded = checkpoints.load(source, name, vision_tower)
    manifest = checkpoints.describe(
        loaded,
        ragged_append=ragged_append,
        precision=precision,
        target=target,
        cache=cache,
        coordinates=coordinates,
        revision=commit,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial"
    export = Export(loaded, manifest, folder, progress, watch)
    _check_room(folder, export.needs())
    with _claimed(folder):
        export.begin(resume=resume)
        try:
            with _quiet():
                export.run()
            manifest = dataclasses.replace(manifest, files=entries(folder))
            (folder / "manifest.json").write_text(
                json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8"
            )
            _move_into_place(folder, out)
        except Exception:  # what interrupts is none: that can go on
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return manifest


def _check_target(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()) and not (out / "manifest.json").is_file():
            raise ExportError(f"{out} is a folder with other things in it, expected a bundle or nothing")
    elif out.exists():
        raise ExportError(f"{out} is a file, expected a bundle or nothing")


def _check_room(folder: Path, needed: int) -> None:
    """Raise ExportError if the disk has no room; what an earlier attempt left in `folder` makes some."""
    left = sum(path.stat().st_size for path in folder.rglob("*")) if folder.is_dir() else 0
    free = shutil.disk_usage(folder.parent).free
    if free + left < needed:
        raise ExportError(
            f"{folder.parent} has room for {free / 1e9:.1f} GB, this export takes {needed / 1e9:.1f}"
        )


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Make `folder`, which no other process may export to meanwhile."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ExportError(f"another export writes to {folder} already") from None
    else:
        yield
    finally:
        os.close(handle)


def _move_into_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an old bundle steps aside first, and comes back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    # on the same file system, so that a rename can move into it
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True
    ) as aside:
        old = out.rename(Path(aside) / "old")
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise


def entries(folder: Path) -> dict[str, FileEntry]:
    """Every file of a bundle to be, read from end to end."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.name] = FileEntry(path.stat().st_size, digest)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporters' warnings, which are about their own insides; errors still come through."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
