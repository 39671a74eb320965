"""Exporting a model larger than memory, and starting it: time, private memory and disk.

``dualfocus bench export --random llava-7b``. Random weights of the shape are written first, as a published
checkpoint has them: the original LLaVA's in two ``.bin`` shards with the tower inside, or Hugging Face's in
three of safetensors; float16, by the names that they are published with. Then ``dualfocus export`` runs as a
process of its own, whose private memory (``RssAnon``: what is no file's) is read every 20 ms. Two new
processes answer a question, one behind the other, and two more once the bundle's weights are packed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from dualfocus.bench import fresh, harness, layouts
from dualfocus.bench.crop import photograph
from dualfocus.bench.harness import Watch
from dualfocus.export import config as files
from dualfocus.export import random_weights
from dualfocus.export.shapes import Shape
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.manifest import Precision
from dualfocus.runtime.packed import pack

if TYPE_CHECKING:
    from rich.console import Console

Layout = Literal["original", "huggingface"]

QUESTION = "What is written on the red sign above the door?"
ORIGINAL_TOWER = (336, 24, 1024)
PRIVATE_LIMIT = 4_000_000_000  # bytes that an export may take
SHARD_BYTES = {"original": 9_980_000_000, "huggingface": 4_990_000_000}  # as large as the published shards


def run(
    shape: Shape, folder: Path, layout: Layout, precision: Precision, threads: int | None, watch: Watch
) -> dict[str, Any]:
    """The result, of a kind that `harness` describes; everything is written below `folder` and stays there.

    InputError where the system does not tell a process's memory, or the export fails.
    """
    if not Path("/proc/self/status").exists():
        raise InputError("bench export needs /proc, which this system does not have")
    if layout == "original" and (shape.image, shape.tower_layers, shape.tower_width) != ORIGINAL_TOWER:
        raise InputError(
            f"bench export: original checkpoints have CLIP's ViT-L/14 at 336, {shape.name} has not"
        )
    checkpoint, bundle = folder / f"{shape.name}-{layout}", folder / f"{shape.name}-{precision}"
    if not (checkpoint / "config.json").exists():  # written last
        write_checkpoint(shape, layout, checkpoint, watch)
    command = [sys.executable, "-m", "dualfocus.cli", "export", str(checkpoint), "-o", str(bundle)]
    watch("export", 0, 1)
    exported = harness.child([*command, "--precision", precision])
    exported["said"] = [line for line in exported["said"] if "|onnx - torch|" not in line]
    manifest, digest = read_manifest(bundle)
    result = harness.header("export", threads, manifest=manifest) | {
        "layout": layout,
        "checkpoint_bytes": _size(checkpoint),
        "bundle_bytes": _size(bundle),
        "export": exported,
        "private": harness.wanted(exported["peak_rss_anon"], at_most=PRIVATE_LIMIT),
    }
    with tempfile.TemporaryDirectory() as place:
        picture = Path(place) / "photograph.png"
        Image.fromarray(photograph()).save(picture, compress_level=1)

        def start(name: str) -> dict[str, Any]:
            watch(name, 0, 1)
            return fresh.measure(picture, QUESTION, bundle, threads, True, {})

        starts = {name: start(name) for name in ("first start", "second start")}
        watch("packing", 0, 1)
        begin = time.perf_counter()
        folder = pack(bundle, manifest, digest)
        packed = {"seconds": time.perf_counter() - begin, "bytes": _size(folder)}
        starts |= {name: start(name) for name in ("packed, first start", "packed, second start")}
    return result | {"starts": starts, "packed": packed}


def write_checkpoint(shape: Shape, layout: Layout, folder: Path, watch: Watch) -> None:
    """Random weights of `shape` as a published checkpoint, of which one shard at a time is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = random_weights.random_checkpoint(shape)
    config, weights = loaded.config, loaded.weights
    assert isinstance(weights, random_weights.DrawnWeights)
    published = layouts.original if layout == "original" else layouts.hugging_face_before
    count = len(weights.shapes)

    def named() -> Iterator[tuple[str, Tensor]]:
        for i, (name, tensor) in enumerate(weights.all()):
            watch("writing a checkpoint", i, count)
            yield published(name), tensor.half()

    layouts.write_weights(
        folder, named(), "bin" if layout == "original" else "safetensors", SHARD_BYTES[layout]
    )
    loaded.tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", random_weights.BOS)]
    )
    loaded.tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "preprocessor_config.json").write_text(json.dumps(files.fields(loaded.preprocessor)))
    raw = config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"]}
    if layout == "original":
        raw = config.text_config.to_dict() | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_vision_select_feature": "patch",
            "image_aspect_ratio": "pad",
        }
    (folder / "config.json").write_text(json.dumps(raw))


def _size(folder: Path) -> int:
    """Bytes of the files in `folder`; what is in folders of it is not counted."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def facts(result: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, in words."""
    exported = result["export"]
    verdict = "met" if result["private"]["met"] else "missed"
    found = {
        "checkpoint": f"{result['layout']}, {result['checkpoint_bytes'] / 1e9:.1f} GB",
        "bundle": f"{result['precision']}, {result['bundle_bytes'] / 1e9:.1f} GB",
        "export": f"{exported['seconds'] / 60:.1f} minutes",
        "its private memory": f"{exported['peak_rss_anon'] / 1e9:.2f} GB at the most (wanted 4: {verdict})",
        "with mapped files": f"{exported['peak_rss'] / 1e9:.1f} GB",
    }
    if packed := result.get("packed"):
        found["packing"] = f"{packed['seconds']:.0f} s, {packed['bytes'] / 1e9:.1f} GB"
    for name, start in result["starts"].items():
        model, answer = (start["times_ms"][step] / 1e3 for step in ("model", "answer"))
        private = f"{start['rss_anon'] / 1e9:.2f} GB private"
        found[name] = f"model open in {model:.1f} s, answer {answer:.0f} s later, {private}"
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """README's table."""
    rows = [f"| {name} | {fact} |" for name, fact in facts(result).items()]
    return "\n".join([f"| {result['bundle']} | |", "|---|---|", *rows])


def show(result: Mapping[str, Any], console: Console) -> None:
    """For people."""
    harness.show_machine(result["machine"], console)
    for line in result["export"]["said"]:
        console.print(line, markup=False)
    for name, fact in facts(result).items():
        console.print(f"{name:>20}  {fact}", markup=False)
