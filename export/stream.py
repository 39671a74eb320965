"""A checkpoint -> a bundle's files, a layer at a time, and on from where it was interrupted.

Each tensor is read once. What it becomes is on the disk, and was compared with torch, before the next layer
comes, so that a model of any size takes the memory of one layer and the time of one pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import torch

from dualfocus.export import verify
from dualfocus.export.checkpoint import EMBEDDINGS, HEAD, NORM, Checkpoint
from dualfocus.export.decoder import DecoderGraphs, Head, Layer, Linear
from dualfocus.export.errors import ExportError
from dualfocus.export.graph import DataFile, end_of_data, joined
from dualfocus.export.operators import check_supported
from dualfocus.export.quantize import Part, decoder_form
from dualfocus.export.rotate import Rotation
from dualfocus.export.verify import Difference, TorchDecoder, Trial
from dualfocus.export.vision import PARTS, export_vision, read_tower, store_vision
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.files import empty
from dualfocus.runtime.manifest import ON_DEVICE, Manifest

Watch = Callable[[str, int, int], object]  # what is being done, how many weights are done, and of how many

LAYERS = "model.language_model.layers."
PRODUCTS: dict[str, Part] = {
    "o_proj": "project",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
NOTE = "export.json"
M_MMAP_THRESHOLD = -3  # of malloc.h: what is larger is mapped by itself


class Export:
    """One export on its way, in a folder.

    ``state.{i}.npz`` is there once everything before layer i is on the disk, and is what it takes to go on
    from there. It, the parts of the decoder's graph and the note of what is exported are gone in the end.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        manifest: Manifest,
        folder: Path,
        progress: Callable[[str], None],
        watch: Watch,
    ) -> None:
        self._checkpoint, self._manifest, self._folder = checkpoint, manifest, folder
        self._say, self._watch = progress, watch
        self._sizes = {name: math.prod(checkpoint.weights.shapes[name]) for name in checkpoint.names}
        self._done = 0
        # float16 stored as float16 is what it was
        self._is_exact = manifest.decoder.dtype == "float32" and (
            manifest.precision == "fp32"
            or (
                manifest.precision == "fp16"
                and {checkpoint.weights.dtypes[name] for name in self._sizes} == {"F16"}
            )
        )
        self._is_on_device = manifest.target in ON_DEVICE
        self._has_half_embeddings = self._is_on_device or checkpoint.weights.dtypes[EMBEDDINGS] == "F16"
        self._seed = 0

    def needs(self) -> int:
        """Bytes on the disk that the export takes at its largest, about."""
        spec, precision = self._manifest.decoder, self._manifest.precision
        tower = 4 * sum(size for name, size in self._sizes.items() if name.startswith(PARTS))
        total = tower + self._sizes[EMBEDDINGS] * (2 if self._has_half_embeddings else 4)
        for name in self._sizes:
            shape = self._checkpoint.weights.shapes[name]
            if name.startswith(LAYERS) and len(shape) == 2:
                layer, *_, module, _ = name.removeprefix(LAYERS).split(".")
                form = decoder_form(precision, PRODUCTS.get(module, "qkv"), int(layer), spec.layers)
                total += form.nbytes(*shape)
        total += decoder_form(precision, "head", 0, spec.layers).nbytes(spec.vocabulary, spec.hidden)
        total += 4 * spec.context * spec.head_size  # rotary tables
        total += 4 * spec.hidden**2 if precision == "int8" else 0  # the rotation of what comes in
        return max(total, 4 * tower)  # torch's twice, the exporter's and ours, before the decoder is there

    def begin(self, *, resume: bool) -> None:
        """Empty the folder, or see that what is in it is the beginning of this export."""
        told = {"manifest": self._manifest.to_dict(), "weights": self._checkpoint.weights.identity}
        note = self._folder / NOTE
        if resume and note.is_file():
            found = json.loads(note.read_text(encoding="utf-8"))
            self._seed = found.pop("seed")
            if found != json.loads(json.dumps(told)):
                raise ExportError(
                    f"{self._folder} is the beginning of another export: this one can only begin anew, "
                    "without --resume"
                )
            return
        empty(self._folder)
        if self._is_exact:  # else it stays 0, so that what two exports tell of rounding can be compared
            self._seed = int.from_bytes(os.urandom(4))
        note.write_text(json.dumps(told | {"seed": self._seed}), encoding="utf-8")

    def run(self) -> None:
        """Write all files but the manifest, or those that are not there yet."""
        _return_memory()
        found = [int(path.suffixes[0][1:]) for path in self._folder.glob("state.*.npz")]
        first = max(found, default=0)
        if found:
            self._count(*PARTS, EMBEDDINGS, *(f"{LAYERS}{i}." for i in range(first)))
        else:
            self._export_vision()
        if first:
            self._say(f"going on behind layer {first} of {self._manifest.decoder.layers}")
        self._export_decoder(first)
        # the note goes first: without it, nothing is resumed
        scraps = [self._folder / NOTE, *self._folder.glob("part.*.onnx"), *self._folder.glob("state.*.npz")]
        for path in scraps:
            path.unlink()

    def _export_vision(self) -> None:
        """Everything before the decoder, and what the decoder is to be tried on."""
        manifest, weights, folder = self._manifest, self._checkpoint.weights, self._folder
        self._tell("vision", *PARTS)
        exact = folder / "tower"
        exact.mkdir(exist_ok=True)
        tower = read_tower(self._checkpoint.config, weights, exact)
        pixels = verify.pictures(len(verify.QUESTIONS), manifest.image.size, self._seed)
        features = verify.image_features(tower, pixels)
        export_vision(tower, exact / "vision.onnx")
        del tower
        store_vision(
            exact / "vision.onnx", folder / "vision.onnx", manifest.precision, half=self._is_on_device
        )
        stored = onnx.load(folder / "vision.onnx", load_external_data=False)
        check_supported(stored, manifest.target, "the vision tower")
        for n in (1, len(pixels)):
            place = folder if self._is_exact else exact
            got = verify.encode(place / "vision.onnx", pixels[:n])
            what = f"vision, {n} picture{'s' * (n > 1)}"
            self._say(str(Difference.between(what, got, features[:n]).check()))
        if not self._is_exact:
            got = np.concatenate([verify.encode(folder / "vision.onnx", pixels[i : i + 1]) for i in range(n)])
            error = Difference.rounded("vision", got, features).check().error
            self._say(f"vision: image tokens {100 * error:.2g} % away from float32's (relative L2)")
        shutil.rmtree(exact)

        self._tell("embeddings", EMBEDDINGS)
        table = weights.read(EMBEDDINGS).numpy()
        np.save(folder / "embeddings.npy", table.astype(np.float16) if self._has_half_embeddings else table)
        self._checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
        self._keep(0, Trial.begin(manifest, self._checkpoint.tokenizer, table, features, self._seed))

    def _export_decoder(self, first: int) -> None:
        """The layers from `first` on, and the head."""
        spec, weights, config = self._manifest.decoder, self._checkpoint.weights, self._checkpoint.config
        with np.load(self._state(first)) as state:
            trial = Trial(**state)
        parts = [onnx.load(self._part(i), load_external_data=False) for i in range(first)]
        data = DataFile(self._folder / "decoder.onnx.data", end_of_data(parts))
        torch_decoder = TorchDecoder(config.text_config)
        graphs = DecoderGraphs(
            spec,
            config.text_config,
            self._manifest.precision,
            data,
            torch_decoder.rotary(spec.context),
            self._manifest.target,
        )
        rotation = Rotation(spec) if self._manifest.precision == "int8" else None
        if parts:
            graphs.share(parts[-1])
        for i in range(first, spec.layers):
            prefix = f"{LAYERS}{i}."
            self._tell(f"layer {i + 1} of {spec.layers}", prefix)
            tensors = {
                name.removeprefix(prefix): weights.read(name)
                for name in self._checkpoint.names
                if name.startswith(prefix)
            }
            exact = torch_decoder.layer(tensors, trial.exact)
            layer = Layer.of(tensors)
            if rotation:
                rotation.layer(i, layer)
            parts.append(graphs.layer(i, layer, rotation.entrance if rotation and i == 0 else None))
            check_supported(parts[i], self._manifest.target, f"layer {i + 1}")
            onnx.save(parts[i], self._part(i))
            data.flush()
            trial = self._through(i, trial, exact, rotation.stream.numpy() if rotation else None)
            self._keep(i + 1, trial)

        self._tell("head", NORM, HEAD)
        norm = weights.read(NORM)
        if self._checkpoint.tied:
            table = np.load(self._folder / "embeddings.npy", mmap_mode="r")
            matrix = torch.from_numpy(table.astype(np.float32))
        else:
            matrix = weights.read(HEAD)
        alone, both = trial.reached(ragged_append=spec.ragged_append)
        told = [*alone, *both] if self._is_exact else [alone[0], both[0]]
        expected = [torch_decoder.head(norm, matrix, of.expected[of.text]) for of in told]
        head = Head(norm.clone(), Linear(matrix))
        if rotation:
            rotation.head(head)
        parts.append(graphs.head(head))
        check_supported(parts[-1], self._manifest.target, "the head")
        data.flush()
        onnx.save(parts[-1], self._part(spec.layers))
        session = verify.Session(self._part(spec.layers), spec, 1, 0)
        for of, right in zip(told, expected, strict=True):
            states = of.got[of.text]
            (logits,) = session.append((states @ rotation.stream.numpy() if rotation else states)[None], [0])
            what = f"decoder, {of.what}"
            if self._is_exact:
                self._say(str(Difference.between(what, logits, right).check()))
            elif of is alone[0]:
                Difference.rounded(what, logits, right).check()
            else:
                self._say(verify.rounding(logits, right))
        data.close()
        if self._is_on_device:
            parts.insert(0, graphs.embedding(self._folder / "embeddings.npy"))
            check_supported(parts[0], self._manifest.target, "the embedding")
        model = joined(parts)
        onnx.save(model, self._folder / "decoder.onnx")
        onnx.checker.check_model(self._folder / "decoder.onnx")
        self._tell("hashing")

    def _through(self, i: int, trial: Trial, exact: Floats, basis: verify.Basis) -> Trial:
        """The states of `trial` behind layer `i`; torch's are `exact`.

        Exact weights are held to torch all the way. What rounded ones do to a state may grow from layer to
        layer, in some models to any size: each layer is held to what torch adds to torch's own state.
        """
        spec = self._manifest.decoder
        if not self._is_exact:
            trial = replace(trial, alone=trial.exact[:1])
        after = trial.through(self._part(i), spec, exact, enters=basis if i else None, leaves=basis)
        if self._is_exact:
            for of in chain(*after.reached(ragged_append=spec.ragged_append)):
                Difference.between(f"decoder behind layer {i + 1}, {of.what}", of.got, of.expected).check()
        else:
            got, expected = after.alone - trial.exact[:1], exact[:1] - trial.exact[:1]
            Difference.rounded(f"decoder, layer {i + 1}", got, expected).check()
        return after

    def _keep(self, i: int, trial: Trial) -> None:
        """Everything before layer `i` is there: put down what it takes to go on."""
        unfinished = self._folder / "state.npz.unfinished"
        with unfinished.open("wb") as file:
            np.savez(file, **vars(trial))
        unfinished.rename(self._state(i))
        self._state(i - 1).unlink(missing_ok=True)

    def _state(self, i: int) -> Path:
        return self._folder / f"state.{i}.npz"

    def _part(self, i: int) -> Path:
        return self._folder / f"part.{i}.onnx"

    def _tell(self, doing: str, *of: str) -> None:
        """Say that `doing` begins; the tensors whose names begin with one of `of` are done with it."""
        self._watch(doing, self._done, sum(self._sizes.values()))
        self._count(*of)

    def _count(self, *of: str) -> None:
        """The tensors whose names begin with one of `of` are done."""
        self._done += sum(size for name, size in self._sizes.items() if name.startswith(of))


def _return_memory() -> None:
    """Have glibc give back to the system what tensors took, once they are gone; it would keep most of it."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
