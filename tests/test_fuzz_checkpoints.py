"""Checkpoints with mutated files: each is loaded, or refused in one sentence."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import formats
import fuzzing
import pytest

from dualfocus.export import checkpoint as checkpoints
from dualfocus.runtime.turns import DUALFOCUS, Question, Turn, render, tokenize

CASES = 2000
PICKED = {"tokenizer_config.json": 2, "config.json": 3}  # how often, where others are mutated once
Files = dict[str, bytes]


def read(write: Callable[[Path], Path]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder) / "checkpoint")
        return {path.name: path.read_bytes() for path in written.iterdir()}


@functools.cache
def llama() -> Files:
    """As Hugging Face's LLaVA-1.5, in two shards, and everything declared that can be."""
    model = formats.make()
    files = read(lambda folder: formats.hugging_face(folder, model, shard_bytes=400_000))
    declared = {
        "name": "mutated",
        "prompts": {"hint": "", "reply": DUALFOCUS.reply},
        "coordinates": "original",
        "box": {"text": "[{x0}, {y0}, {x1}, {y1}]", "decimals": 2},
        "select": "answer",
        "max_new_tokens": 12,
        "fit": "crop",
    }
    return files | {"dualfocus.json": json.dumps(declared).encode()}


@functools.cache
def qwen2() -> Files:
    """A fast tokenizer, and an image processor as transformers 5 writes it."""
    model = formats.make("qwen2", "siglip", layer=-1, strategy="full", tied=True)
    files = read(lambda folder: formats.hugging_face(folder, model, processor="siglip"))
    processor = json.loads(files.pop("preprocessor_config.json"))
    return files | {"processor_config.json": json.dumps({"image_processor": processor}).encode()}


@functools.cache
def original() -> Files:
    model = formats.make()
    return read(
        lambda folder: formats.original(
            folder, model, tower_inside=False, kind="safetensors", shard_bytes=None, tower_name="tower"
        )
    )


@functools.cache
def tower() -> Files:
    return read(lambda folder: formats.tower(folder, formats.make(), whole=True, kind="safetensors"))


def load(folder: Path) -> None:
    """What an export does before it computes, and what a question needs of the tokenizer."""
    checkpoint = checkpoints.load(folder)
    manifest = checkpoints.describe(checkpoint, ragged_append=True)
    pieces = render(manifest.prompts, Question.parse("What is it?", ""), [Turn(manifest.prompts.locate, "a")])
    tokenize(pieces, checkpoint.tokenizer, manifest.tokens, ["whole"], 1)


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pick(files: Files, random: Random, names: tuple[str, ...]) -> str:
    present = [name for name in names if name in files]
    return random.choice([name for name in present for _ in range(PICKED.get(name, 1))])


def configs(random: Random, folder: Path) -> None:
    """One of the JSON files that describe a model, or of its tower's."""
    base = random.choice((llama, qwen2, original))()
    described = "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"
    name = pick(base, random, (*described, "dualfocus.json"))
    write(folder, base | {name: fuzzing.mutate_json(base[name], random)})
    if base is original():
        of_tower = dict(tower())
        if random.random() < 0.5:
            write(folder, {name: base[name]})
            name = pick(of_tower, random, described)
            of_tower[name] = fuzzing.mutate_json(of_tower[name], random)
        write(folder / "tower", of_tower)
    load(folder)


def tokenizers(random: Random, folder: Path) -> None:
    """One of a tokenizer's files."""
    base = random.choice((llama, qwen2))()
    names = "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json"
    name = pick(base, random, (*names, "added_tokens.json"))
    if name == "tokenizer.model":
        changed = fuzzing.mutate_protobuf(base[name], random)
    else:
        changed = fuzzing.mutate_json(base[name], random)
    write(folder, base | {name: changed})
    if random.random() < 0.3:  # then the map of special tokens counts
        settings = json.loads(base["tokenizer_config.json"])
        settings.pop("added_tokens_decoder", None)
        if name != "tokenizer_config.json":
            write(folder, {"tokenizer_config.json": json.dumps(settings).encode()})
    load(folder)


def weights(random: Random, folder: Path) -> None:
    """The index, or the header of a safetensors file."""
    base = random.choice((llama, qwen2))()
    index = "model.safetensors.index.json"
    name = random.choice(sorted(name for name in base if name.startswith("model")))
    if name == index:
        changed = fuzzing.mutate_json(base[name], random)
    else:
        length = int.from_bytes(base[name][:8], "little")
        header, data = base[name][8 : 8 + length], base[name][8 + length :]
        if random.random() < 0.7:
            header = fuzzing.mutate_json(header, random)
            size = len(header) if random.random() < 0.9 else random.choice(fuzzing.NUMBERS) % 2**64
            changed = size.to_bytes(8, "little") + header + data
        else:
            changed = fuzzing.mutate_bytes(base[name], random)
    write(folder, base | {name: changed})
    load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("target", [configs, tokenizers, weights])
def test_mutated_checkpoints(target: fuzzing.Target, tmp_path: Path) -> None:
    found = fuzzing.fuzz(target, CASES, tmp_path)
    assert not found, fuzzing.report(found)


@pytest.mark.parametrize("files", [llama, qwen2, original])
def test_what_is_mutated_loads(files: Callable[[], Files], tmp_path: Path) -> None:
    write(tmp_path, files())
    write(tmp_path / "tower", tower())
    load(tmp_path)


if Path(sys.argv[0]).stem == "fuzzing":  # a process that tries cases: nothing is written once it does
    for made in (llama, qwen2, original, tower):
        made()
