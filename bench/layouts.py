"""How publishers name a LLaVA's tensors, and how they lay them out in files.

What is published is stated here, and taken from nothing in `export`, whose tables are tested with it. A
layout is a function of a tensor's name in `LlavaForConditionalGeneration` since transformers 4.52, which
files may have as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

_PLACES = {"linear_1": 0, "linear_2": 2}  # in the original's projector, a GELU between them

Kind = Literal["safetensors", "bin", "old bin"]  # the last as PyTorch saved before 1.6


def hugging_face_before(name: str) -> str:
    """Files that transformers wrote before 4.52, which most of those on the Hub are."""
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "lm_head":
        return f"language_model.lm_head.{rest}"
    return f"language_model.model.{rest}" if part == "language_model" else f"{part}.{rest}"


def original(name: str) -> str:
    """The original LLaVA's and DualFocus's."""
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "multi_modal_projector":
        layer, _, of = rest.partition(".")
        return f"model.mm_projector.{_PLACES[layer]}.{of}"
    if part == "vision_tower":
        return f"model.vision_tower.vision_tower.{rest}"
    return f"model.{rest}" if part == "language_model" else name


def tower(name: str) -> str:
    """A vision tower's own, where it lies in a folder by itself."""
    return name.removeprefix("model.vision_tower.")


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], kind: Kind, shard_bytes: int | None = None
) -> None:
    """Write the named `tensors` into `folder`: one file, or with an index where `shard_bytes` bounds one.

    Of the tensors, one shard's are in memory at a time.
    """
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"{stem}-{len(shards)}.{suffix}"
        if kind == "safetensors":
            save_file(held, path, metadata={"format": "pt"})
        else:
            torch.save(held, path, _use_new_zipfile_serialization=kind == "bin")
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and shard_bytes is not None and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
    if shard_bytes is None:
        files = [f"{stem}.{suffix}"]
    for i, file in enumerate(files):
        (folder / f"{stem}-{i}.{suffix}").rename(folder / file)
    if shard_bytes is not None:
        where = {name: file for names, file in zip(shards, files, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2))
