"""A bundle on disk: checked, then opened.

Opening reads the manifest, compares every file's size, and the hashes of what it opens up to
`contents.HASHED_BYTES`. It looks into graphs and tokenizer before a library does. `verify` hashes all files.
What a bundle from elsewhere can do is in docs/security.md.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dualfocus.kernels import cuda
from dualfocus.runtime import contents, devices, foreign, graph, packed, registry
from dualfocus.runtime.devices import Device
from dualfocus.runtime.embeddings import DeviceEmbeddings, Embeddings, HostEmbeddings, open_table
from dualfocus.runtime.engines import Array, Decoder, DeviceDecoder, HostDecoder, VisionEncoder
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.files import URL, decode_json, read_bytes
from dualfocus.runtime.geometry import Crop
from dualfocus.runtime.grammar import BoxGrammar
from dualfocus.runtime.image import Picture, view, view_on_device
from dualfocus.runtime.manifest import ON_DEVICE, Manifest
from dualfocus.runtime.tokenizer import open_tokenizer

Seen = Sequence[tuple[Picture, Crop]]

BUILT_IN = Path(__file__).parent.parent / "models" / "nano"
MANIFEST, MANIFEST_LIMIT = "manifest.json", 1 << 20  # bytes
_REQUIRED = (graph.VISION, graph.DECODER, "embeddings.npy", "tokenizer.json")


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
        manifest, digest = read_manifest(path)
        path = Path(path)
        chosen = registry.choose(devices.parse(device), manifest.target)
        pack = packed.find(path, digest, chosen)
        graphs, listed = pack or (path, manifest.files)
        opened = _REQUIRED[2:] if pack or chosen.kind == "tensorrt" else manifest.files
        contents.verify(path, {name: manifest.files[name] for name in opened}, contents.HASHED_BYTES)
        tokenizer = open_tokenizer(path / "tokenizer.json", manifest.decoder.vocabulary)
        table = open_table(path / "embeddings.npy", manifest.decoder.vocabulary, manifest.decoder.hidden)
        embeddings: Embeddings = HostEmbeddings(table)

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

        graph.check(graphs, manifest, listed)
        threads_used, alone = onnx.Threads(threads, spin), Lock()
        files = graphs / graph.VISION, graphs / graph.DECODER
        if manifest.target in ON_DEVICE:
            cache = graphs / packed.CACHE if pack else None
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


def read_manifest(path: Path | str) -> tuple[Manifest, str]:
    """The manifest of the bundle at `path` and its SHA-256, after comparing every file's size.

    Raises BundleError; what is given in place of a bundle is named, where it is recognised.
    """
    given = str(path)
    if isinstance(path, Path):  # which makes one slash of two
        given = re.sub(rf"^({URL.pattern})(?=[^/])", r"\1/", given)
    path = Path(path)
    if not given or not os.path.lexists(path / MANIFEST):
        raise foreign.refusal(given)
    text = read_bytes(contents.find(path, MANIFEST), BundleError, limit=MANIFEST_LIMIT)
    raw = decode_json(text, dict[str, Any], BundleError, str(path / MANIFEST))
    try:
        manifest = Manifest.from_dict(raw)
        for name in _REQUIRED:
            if name not in manifest.files:
                raise BundleError(f"manifest.json lists no {name}")
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None
    contents.check(path, manifest.files)
    return manifest, hashlib.sha256(text).hexdigest()


def verify(path: Path, manifest: Manifest) -> None:
    """Read every file of the bundle at `path`, and what was made of it for this or another machine.

    Raises BundleError if one is not what was written.
    """
    contents.verify(path, manifest.files)
    packed.verify(path)
