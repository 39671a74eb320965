"""A bundle on disk: checked, then opened.

Opening reads the manifest and compares every file's size, and of a bundle of up to `HASHED_BYTES` the
hashes too, which takes milliseconds. Larger ones start fast; `verify` hashes their files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dualfocus.kernels import cuda
from dualfocus.runtime import devices, packed, registry
from dualfocus.runtime.devices import Device
from dualfocus.runtime.embeddings import DeviceEmbeddings, Embeddings, HostEmbeddings
from dualfocus.runtime.engines import Array, Decoder, DeviceDecoder, HostDecoder, VisionEncoder
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.geometry import Crop
from dualfocus.runtime.grammar import BoxGrammar
from dualfocus.runtime.image import Picture, view, view_on_device
from dualfocus.runtime.manifest import ON_DEVICE, Manifest

Seen = Sequence[tuple[Picture, Crop]]

BUILT_IN = Path(__file__).parent.parent / "models" / "nano"
HASHED_BYTES = 64_000_000
_REQUIRED = ("vision.onnx", "decoder.onnx", "embeddings.npy", "tokenizer.json")


@dataclass(frozen=True)
class Bundle:
    """An opened model."""

    path: Path
    manifest: Manifest
    digest: str  # SHA-256 of manifest.json, which names every file's: what identifies the model
    device: Device
    vision: VisionEncoder
    decoder: Decoder
    tokenizer: Tokenizer
    embeddings: Embeddings  # of the decoder's kind
    viewer: Callable[[Seen], Array] | None = None  # what crops on the device, if anything does
    alone: Lock = field(
        default_factory=Lock
    )  # held by work on the device that is concurrent with the decoder

    def view(self, seen: Seen) -> Array:
        """(N, 3, S, S): what the vision tower sees of crops of pictures; on its device, if that can crop."""
        if self.viewer is not None:
            return self.viewer(seen)
        return np.concatenate([view(picture, crop, self.manifest.image) for picture, crop in seen])

    @cached_property
    def grammar(self) -> BoxGrammar | None:
        """The box replies' grammar, if the manifest and the tokenizer allow for one."""
        return BoxGrammar.build(self.manifest, self.tokenizer)

    @classmethod
    def open(
        cls,
        path: Path | str = BUILT_IN,
        *,
        device: str = "auto",
        threads: int | None = None,
        spin: bool = True,
    ) -> Bundle:
        """Check the bundle at `path` and open its engines on `device`; packed graphs if they fit (`packed`).

        "auto" is the best device that works for the bundle (`registry.choose`). On the CPU, `threads` None is
        one thread for each core; with `spin` they busy-wait within a call, which is faster unless something
        else needs the cores. TensorRT opens only engines that were built for it (`tensorrt`). Raises
        BundleError; DeviceError if the device does not work or cannot run the bundle; EngineError if ONNX
        Runtime is not installed.
        """
        path = Path(path)
        wanted = devices.parse(device)
        manifest, digest = read_manifest(path)
        if sum(entry.size for entry in manifest.files.values()) <= HASHED_BYTES:
            verify(path, manifest)
        tokenizer = _open_tokenizer(path, manifest)
        embeddings: Embeddings = HostEmbeddings(_open_table(path, manifest))
        chosen = registry.choose(wanted, manifest.target)

        image, spec = manifest.image, manifest.decoder
        vision: VisionEncoder
        decoder: HostDecoder | DeviceDecoder
        viewer = aside = ordered = None
        if manifest.target in ON_DEVICE:
            chosen.use()
            # CuPy's default stream and the decoder's wait for each other; the vision tower's is concurrent.
            aside, ordered = chosen.stream(blocking=False), chosen.stream(blocking=True)
            embeddings = DeviceEmbeddings(spec.vocabulary)
            if chosen.kind != "cpu" and cuda.available():
                viewer = partial(view_on_device, image=image, device=chosen, stream=aside)
        # Libraries are imported here and not at the top: `inspect` needs none, and one of them is enough.
        if chosen.kind == "tensorrt":
            from dualfocus.runtime import tensorrt

            engines = tensorrt.load(path, digest, chosen.index)
            vision = tensorrt.TensorRtVisionEncoder(engines, image, spec.hidden, chosen, aside)
            decoder = tensorrt.TensorRtDecoder(engines, spec, chosen, ordered)
            return cls(path, manifest, digest, chosen, vision, decoder, tokenizer, embeddings, viewer)

        from dualfocus.runtime import onnx

        threads_used, alone = onnx.Threads(threads, spin), Lock()
        graphs = packed.graphs(path, digest, chosen)
        files = graphs / "vision.onnx", graphs / "decoder.onnx"
        if manifest.target in ON_DEVICE:
            cache = graphs / packed.CACHE if graphs != path else None
            place = onnx.Place(chosen, threads_used, aside, half=True, cache=cache)
            vision = onnx.OnnxDeviceVisionEncoder(files[0], image, spec.hidden, place)
            place = replace(place, stream=ordered, captures_steps=chosen.kind != "cpu", alone=alone)
            decoder = onnx.OnnxDeviceDecoder(files[1], spec, place)
        else:
            place = onnx.Place(chosen, threads_used)
            one_by_one = manifest.precision in ("int8", "int4")
            vision = onnx.OnnxVisionEncoder(files[0], image, spec.hidden, place, one_by_one=one_by_one)
            decoder = onnx.OnnxDecoder(files[1], spec, place)
        return cls(path, manifest, digest, chosen, vision, decoder, tokenizer, embeddings, viewer, alone)


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest of the bundle at `path` and its SHA-256, after comparing every file's size."""
    if not os.path.isdir(path):  # unlike Path.is_dir, it raises nothing
        raise BundleError(f"{path} is not a folder, expected a bundle")
    try:
        text = (path / "manifest.json").read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path} holds no manifest.json, so it is not a bundle") from None
    except OSError as error:
        raise BundleError(f"{path / 'manifest.json'} cannot be read: {error.strerror}") from None
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / 'manifest.json'} is not JSON: {error}") from None
    try:
        manifest = Manifest.from_dict(raw)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None
    for name in _REQUIRED:
        if name not in manifest.files:
            raise BundleError(f"{path}: manifest.json lists no {name}")
    for name, entry in manifest.files.items():
        file = path / name
        if Path(name).name != name:  # a bundle says nothing about files outside its folder
            raise BundleError(f"{path}: manifest.json lists {name!r}, expected a plain file name")
        if not os.path.isfile(file):
            raise BundleError(f"{file} is missing")
        if (size := file.stat().st_size) != entry.size:
            raise BundleError(f"{file} has {size} bytes, expected {entry.size}: the bundle is damaged")
    return manifest, hashlib.sha256(text).hexdigest()


def verify(path: Path, manifest: Manifest) -> None:
    """Read every file of the bundle at `path`; raises BundleError if one is not what was exported."""
    for name, entry in manifest.files.items():
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.sha256:
            raise BundleError(f"{path / name} has SHA-256 {found}, expected {entry.sha256}")


def _open_tokenizer(path: Path, manifest: Manifest) -> Tokenizer:
    file = path / "tokenizer.json"
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"{file} is not a tokenizer: {error}") from None
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= manifest.decoder.vocabulary:
        raise BundleError(
            f"{file} gives ids up to {highest}, the decoder knows {manifest.decoder.vocabulary} tokens"
        )
    return tokenizer


def _open_table(path: Path, manifest: Manifest) -> npt.NDArray[np.float32 | np.float16]:
    """(vocabulary, hidden), memory-mapped."""
    file = path / "embeddings.npy"
    try:
        table = np.lib.format.open_memmap(file, mode="r")  # np.load would take an archive too
    except ValueError as error:
        raise BundleError(f"{file} is not an array: {error}") from None
    shape = (manifest.decoder.vocabulary, manifest.decoder.hidden)
    if table.dtype not in (np.float32, np.float16) or table.shape != shape:
        raise BundleError(
            f"{file} is {table.dtype} of shape {table.shape}, expected float32 or float16 {shape}"
        )
    checked: npt.NDArray[np.float32 | np.float16] = table
    return checked
