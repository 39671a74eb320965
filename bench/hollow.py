"""A bundle without its large weights, a few megabytes that can be sent anywhere; and the bundle again.

What a model costs depends on its shape, not on what it learnt. `make` writes graphs, tokenizer and manifest
of a shape as its export has them, and in place of the weights ``weights.npz``: of what is small all of it,
of a large tensor `NUMBERS` numbers as random weights have them. `fill` draws the large tensors anew from
theirs, and needs neither torch nor a GPU, but the room on the disk.

An entry is called ``file@offset@bytes``, and stands for so many bytes there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from dualfocus.export.graph import DataFile, joined
from dualfocus.export.shapes import Shape
from dualfocus.runtime import contents
from dualfocus.runtime.manifest import Manifest, Precision

if TYPE_CHECKING:
    from dualfocus.export.decoder import Head, Layer, Linear

Array = npt.NDArray[Any]

WEIGHTS = "weights.npz"
MODEL = "transformers/model"  # where the peer of that name looks for its configuration
WHOLE = 1 << 18  # up to so many numbers, a tensor is kept as it is: norms, biases, rotary tables
NUMBERS = 1 << 10  # kept of a larger one
CHUNK = 1 << 22  # numbers drawn at a time
# As in `export.random_weights`; queries and keys lie in one matrix here, and share what spreads scores.
QUERY_SCALE, MLP_SCALE = 2.0, 2.0


def make(shape: Shape, precision: Precision, folder: Path) -> None:
    """Write the skeleton of a bundle for CUDA, `precision` fp16 or int4, into `folder`, which is new.

    A decoder's matrix is one random row over and over, so that its search takes no time. Needs the extra
    ``export``. The peer's configuration is there too.
    """
    from dualfocus.export import checkpoint as checkpoints
    from dualfocus.export.decoder import DecoderGraphs
    from dualfocus.export.random_weights import random_checkpoint
    from dualfocus.export.verify import TorchDecoder
    from dualfocus.export.vision import export_vision, read_tower, store_vision

    assert not shape.bias, "no shape has biases in its decoder"
    checkpoint = random_checkpoint(shape)
    manifest = checkpoints.describe(checkpoint, ragged_append=False, precision=precision, target="cuda")
    config, spec = checkpoint.config, manifest.decoder
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as exact:
        tower = read_tower(config, checkpoint.weights, Path(exact))
        export_vision(tower, Path(exact) / "vision.onnx")
        store_vision(Path(exact) / "vision.onnx", folder / "vision.onnx", precision, half=True)
    kept = _kept_of(folder / "vision.onnx")

    draw = _Rows()
    table = np.lib.format.open_memmap(
        folder / "embeddings.npy", "w+", np.float16, (spec.vocabulary, spec.hidden)
    )
    kept |= _npy(folder / "embeddings.npy", table, draw(1, spec.hidden, 2.0).weight.numpy())
    data = _Sampled(folder / "decoder.onnx.data")
    rotary = TorchDecoder(config.text_config).rotary(spec.context)
    graphs = DecoderGraphs(spec, config.text_config, precision, data, rotary, manifest.target)
    parts = [graphs.embedding(folder / "embeddings.npy")]
    parts += [graphs.layer(i, draw.layer(shape)) for i in range(spec.layers)]
    parts.append(graphs.head(draw.head(shape)))
    onnx.save(joined(parts), folder / "decoder.onnx")
    data.close()
    arrays: Any = kept | data.kept
    np.savez_compressed(folder / WEIGHTS, **arrays)
    for name in ("embeddings.npy", "decoder.onnx.data", "vision.onnx.data"):
        (folder / name).unlink(missing_ok=True)
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(folder / MODEL)


def fill(folder: Path, out: Path, seed: int = 0) -> Manifest:
    """Write the bundle whose skeleton is in `folder` to `out`, which is new, its large weights random."""
    out.mkdir(parents=True)
    for name in ("vision.onnx", "decoder.onnx", "tokenizer.json"):
        shutil.copyfile(folder / name, out / name)
    with np.load(folder / WEIGHTS) as kept, ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes: dict[str, int] = {}
        for key in kept.files:
            name, start, nbytes = _parsed(key)
            sizes[name] = max(sizes.get(name, 0), start + nbytes)
        for name, size in sizes.items():
            with (out / name).open("wb") as file:
                file.truncate(size)
        tasks = [pool.submit(_draw, out, key, kept[key], seed + i) for i, key in enumerate(kept.files)]
        for task in tasks:
            task.result()
    manifest = Manifest.from_dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    manifest = replace(manifest, files=contents.entries(out))
    (out / "manifest.json").write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8")
    return manifest


def size(folder: Path) -> int:
    """Bytes that the bundle will take, about."""
    with np.load(folder / WEIGHTS) as kept:
        return sum(_parsed(key)[2] for key in kept.files)


def _draw(out: Path, key: str, numbers: Array, seed: int) -> None:
    """Write a tensor: `numbers` as they are if they are all of it, else so many drawn from them."""
    name, start, nbytes = _parsed(key)
    random = np.random.default_rng(seed)
    with (out / name).open("r+b") as file:
        file.seek(start)
        if numbers.nbytes == nbytes:
            numbers.tofile(file)
            return
        for done in range(0, nbytes, CHUNK * numbers.itemsize):
            count = min(CHUNK, (nbytes - done) // numbers.itemsize)
            numbers[random.integers(0, len(numbers), count, np.uint16)].tofile(file)


def _parsed(key: str) -> tuple[str, int, int]:
    name, start, nbytes = key.split("@")
    return name, int(start), int(nbytes)


def _sample(array: Array) -> Array:
    """All of a small array, of a larger one some numbers; flat."""
    flat = array.reshape(-1)
    if flat.size <= WHOLE:
        return flat
    return flat[np.random.default_rng(0).integers(0, flat.size, NUMBERS)]


class _Sampled(DataFile):
    """A file that is as long as it would be and holds nothing: what it would hold is sampled."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.kept: dict[str, Array] = {}

    def _write(self, array: Array) -> None:
        self.kept[f"{self.path.name}@{self._file.tell()}@{array.nbytes}"] = _sample(array)
        self._file.seek(array.nbytes, os.SEEK_CUR)


def _kept_of(path: Path) -> dict[str, Array]:
    """The weights beside the graph at `path`, sampled."""
    kept = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if onnx.external_data_helper.uses_external_data(tensor):
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            start, shape = int(place["offset"]), tuple(tensor.dims)
            array = np.memmap(path.with_name(place["location"]), dtype, "r", start, shape)
            kept[f"{place['location']}@{start}@{array.nbytes}"] = np.array(_sample(array))
    return kept


def _npy(path: Path, table: np.memmap[Any, Any], row: Array) -> dict[str, Array]:
    """The head of the .npy file at `path`, whose `table` is to be drawn from numbers such as the `row`'s."""
    head = np.fromfile(path, np.uint8, table.offset)
    numbers = row.reshape(-1)[:NUMBERS].astype(table.dtype)
    return {f"{path.name}@0@{head.nbytes}": head, f"{path.name}@{table.offset}@{table.nbytes}": numbers}


class _Rows:
    """Matrices of one random row each, which take no memory; scaled as `export.random_weights` does."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, outputs: int, inputs: int, scale: float = 1.0) -> Linear:
        from dualfocus.export.decoder import Linear

        row = self._torch.empty(inputs).normal_(generator=self._generator)
        return Linear((row * scale * inputs**-0.5).expand(outputs, inputs))

    def norm(self, size: int) -> Any:
        return self._torch.empty(size).normal_(1.0, 0.1, generator=self._generator)

    def layer(self, shape: Shape) -> Layer:
        from dualfocus.export.decoder import Layer

        width = shape.heads * shape.head_size
        return Layer(
            norm=self.norm(shape.hidden),
            qkv=self(width + 2 * shape.kv_heads * shape.head_size, shape.hidden, QUERY_SCALE),
            project=self(shape.hidden, width),
            mlp_norm=self.norm(shape.hidden),
            gate=self(shape.mlp, shape.hidden),
            up=self(shape.mlp, shape.hidden),
            down=self(shape.hidden, shape.mlp, MLP_SCALE),
        )

    def head(self, shape: Shape) -> Head:
        from dualfocus.export.decoder import Head

        return Head(self.norm(shape.hidden), self(shape.vocabulary, shape.hidden, 2.0))
