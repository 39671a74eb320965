"""`export_bundle`: checkpoint folder, or random weights -> bundle folder, complete or not at all.

Everything is written into a hidden folder beside the target, its manifest last, and only a bundle
whose graphs agreed with torch is renamed into place. An interrupted export leaves a hidden folder
without a manifest, which nothing opens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dualfocus.export.errors import ExportError
from dualfocus.export.shapes import Shape
from dualfocus.runtime.manifest import FileEntry, Manifest, Precision


def export_bundle(
    checkpoint: Path | Shape,
    out: Path,
    *,
    precision: Precision = "fp32",
    ragged_append: bool = True,
    progress: Callable[[str], None] = print,
) -> Manifest:
    """Export the Hugging Face LLaVA checkpoint in the folder `checkpoint` as the bundle `out`.

    Given a `Shape`, its model of random weights instead, which is never written as a checkpoint.

    A bundle already at `out` is replaced; any other non-empty folder is left alone. Weights of another
    `precision` than float32 are made by `quantize`, from graphs that agreed with torch before.
    `ragged_append` gives the decoder the input that ONNX Runtime before 1.32 does not know. `progress`
    gets one line per stage, per comparison with torch, and per error that quantising made. Raises
    ExportError: `out` is no place for a bundle, the checkpoint is of another kind or incomplete, or a
    graph differs from torch beyond tolerance.
    """
    _check_target(out)
    try:
        from dualfocus.export import checkpoint as checkpoints
        from dualfocus.export import quantize
        from dualfocus.export.decoder import Decoder, export_decoder
        from dualfocus.export.random_weights import random_checkpoint
        from dualfocus.export.rotate import rotated
        from dualfocus.export.verify import verify
        from dualfocus.export.vision import export_vision
    except ModuleNotFoundError as error:
        raise ExportError(f"export needs {error.name}: pip install 'dualfocus[export,cpu]'") from error
    with _quiet():
        if isinstance(checkpoint, Shape):
            progress(f"random weights of shape {checkpoint.name}")
            loaded = random_checkpoint(checkpoint)
        else:
            loaded = checkpoints.load(checkpoint)
    manifest = checkpoints.describe(loaded, ragged_append=ragged_append, precision=precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _folder_beside(out) as folder, _folder_beside(out) as spare:
        exact = folder if precision == "fp32" else spare
        with _quiet():
            progress("vision.onnx")
            export_vision(loaded.model, exact / "vision.onnx")
            progress("decoder.onnx")
            decoder = Decoder(loaded.model).eval()
            export_decoder(
                rotated(decoder) if precision == "int8" else decoder,
                manifest.decoder,
                exact / "decoder.onnx",
            )
        embeddings = loaded.model.get_input_embeddings().weight.detach().numpy()
        np.save(folder / "embeddings.npy", np.ascontiguousarray(embeddings, np.float32))
        loaded.tokenizer.save(str(folder / "tokenizer.json"))
        seed = int.from_bytes(os.urandom(4))
        progress(f"comparing with torch, seed {seed}")
        for difference in verify(loaded.model, exact, manifest, seed=seed):
            progress(str(difference))
            if not difference.ok:
                raise ExportError(
                    f"{difference.what}: the exported graph is {difference.max_abs:.2g} away from torch, "
                    f"expected at most {difference.allowed:.2g}"
                )
        if precision != "fp32":
            progress(f"quantising to {precision}")
            with _quiet():
                quantize.quantize_vision(exact / "vision.onnx", folder / "vision.onnx", precision)
                quantize.quantize_decoder(exact / "decoder.onnx", folder / "decoder.onnx", precision)
            for line in quantize.errors(exact, folder, manifest, loaded.tokenizer):
                progress(line)
        manifest = dataclasses.replace(manifest, files=_entries(folder))
        (folder / "manifest.json").write_text(
            json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8"
        )
        _move_into_place(folder, out)
    return manifest


def _check_target(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()) and not (out / "manifest.json").is_file():
            raise ExportError(f"{out} is a folder with other things in it, expected a bundle or nothing")
    elif out.exists():
        raise ExportError(f"{out} is a file, expected a bundle or nothing")


@contextlib.contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A hidden folder on `out`'s file system, so that a rename can move it; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would stay with the bundle
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an old bundle steps aside first, and comes back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    with _folder_beside(out) as aside:
        old = out.rename(aside / "old")
        try:
            folder.rename(out)
        except BaseException:
            old.rename(out)
            raise


def _entries(folder: Path) -> dict[str, FileEntry]:
    entries = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.name] = FileEntry(path.stat().st_size, digest)
    return entries


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
