"""Damaged bundles, with hashes that fit: opened and asked, each is refused in one sentence or answers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from random import Random

import fuzzing
import numpy as np
import pytest

from dualfocus.runtime import Bundle, DualFocus, packed
from dualfocus.runtime.bundle import BUILT_IN, MANIFEST, read_manifest
from dualfocus.runtime.errors import InputError

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
QUESTIONS = (
    "What is written on the sign? [0.12] 中 </s>\n A  b  1234567",
    " " * 300 + "a" * 300 + "\n" * 300,
)


WHOLE = Path("whole").absolute()  # in the folder of the process


def prepare() -> None:
    """Copy the built-in model and pack it."""
    shutil.copytree(BUILT_IN, WHOLE, dirs_exist_ok=True)
    packed.pack(WHOLE, *read_manifest(WHOLE))


def damage(folder: Path, name: str, data: bytes, *, vouch: bool = True) -> Path:
    """The bundle in `folder`, with other contents of one file; with `vouch`, the notes give their hash."""
    shutil.copytree(WHOLE, folder / "bundle", copy_function=os.link)
    file = folder / "bundle" / name
    file.unlink()
    file.write_bytes(data)
    note = file.parent / (packed.NOTE if file.parent.name == "packed" else MANIFEST)
    if vouch:
        raw = json.loads(note.read_bytes())
        raw["files"][file.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        text = json.dumps(raw).encode()
        if note.name == MANIFEST:  # so that what is packed fits no more
            shutil.rmtree(folder / "bundle" / "packed")
        note.unlink()
        note.write_bytes(text)
    return folder / "bundle"


def use(bundle: Path, *, ask: bool = True) -> None:
    """Open a bundle, encode and decode with its tokenizer, and `ask` it."""
    opened = Bundle.open(bundle, device="cpu", threads=1, spin=False)
    tokens = [
        token
        for question in QUESTIONS
        for token in opened.tokenizer.encode(question, add_special_tokens=False).ids
    ]
    opened.tokenizer.decode([*tokens, *range(300)], skip_special_tokens=False)
    if ask:
        with DualFocus(opened, slots=2) as model:
            model.ask(PICTURE, QUESTIONS[0])


def manifest(random: Random, folder: Path) -> None:
    """`manifest.json` itself."""
    data = fuzzing.mutate_json((WHOLE / MANIFEST).read_bytes(), random)
    use(damage(folder, MANIFEST, data, vouch=False))


def embeddings(random: Random, folder: Path) -> None:
    """The header of the embeddings, and at times the rest."""
    data = (WHOLE / "embeddings.npy").read_bytes()
    head, rest = data[:128], data[128:]
    if random.random() < 0.1:
        rest = fuzzing.mutate_bytes(rest, random)
    use(damage(folder, "embeddings.npy", fuzzing.mutate_bytes(head, random) + rest))


def tokenizer(random: Random, folder: Path) -> None:
    """What the tokenizer does: its parts now and then of other kinds, its tables seldom."""
    raw = json.loads((WHOLE / "tokenizer.json").read_bytes())
    part = random.choice(
        ["normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation", "padding"]
    )
    kind = random.random()
    if kind < 0.4:
        raw[part] = random.choice(PARTS[part])
    parts = {key: value for key, value in raw.items() if key not in ("model", "added_tokens")}
    if kind < 0.7:
        changed = json.loads(json.dumps(raw))
        try:
            changed |= json.loads(fuzzing.mutate_json(parts, random))
        except (ValueError, TypeError, RecursionError):
            changed = raw
        data = json.dumps(changed).encode()
    elif kind < 0.9:
        tables = {key: raw["model"].pop(key) for key in ("vocab", "merges")}
        data = fuzzing.mutate_json(raw, random).replace(
            b'"BPE",', b'"BPE", ' + json.dumps(tables).encode()[1:-1] + b","
        )
    else:
        data = fuzzing.mutate_json(raw, random)
    use(damage(folder, "tokenizer.json", data), ask=random.random() < 0.2)


def notes(random: Random, folder: Path) -> None:
    """What was packed: its note, or a file that the note has the hash of or not."""
    name = random.choice([packed.NOTE, packed.NOTE, "decoder.onnx", "vision.onnx"])
    data = (WHOLE / "packed" / name).read_bytes()
    if name == packed.NOTE:
        bundle = damage(folder, f"packed/{name}", fuzzing.mutate_json(data, random), vouch=False)
    else:
        bundle = damage(
            folder, f"packed/{name}", fuzzing.mutate_bytes(data, random), vouch=random.random() < 0.5
        )
    try:
        read_manifest(bundle)
        packed.verify(bundle)
    except InputError:
        pass
    use(bundle, ask=random.random() < 0.2)


def graphs(random: Random, folder: Path) -> None:
    """Fields of the graphs."""
    name = random.choice(["decoder.onnx", "vision.onnx"])
    data = fuzzing.mutate_protobuf((WHOLE / name).read_bytes(), random)
    use(damage(folder, name, data))


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": True}
PARTS: dict[str, list[object]] = {
    "normalizer": [
        REPLACE,
        REPLACE | {"pattern": {"Regex": " {2,}"}},
        REPLACE | {"pattern": {"Regex": "(a+)+$"}},
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, REPLACE, {"type": "NFC"}]},
        {"type": "Sequence", "normalizers": [REPLACE | {"content": "aaaaaaaaaaaaaaaa"}] * 12},
        {"type": "NFKC"},
        {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyIAgMzkAgC4"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
    ],
    "pre_tokenizer": [
        SPLIT,
        SPLIT | {"pattern": {"Regex": r"\s*[\r\n]+|\s+(?!\S)|\s+"}, "behavior": "Isolated"},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True},
        {"type": "Digits", "individual_digits": True},
        {"type": "UnicodeScripts"},
        {"type": "FixedLength", "length": 0},
    ],
    "decoder": [
        {"type": "Sequence", "decoders": [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP]},
        STRIP | {"stop": 3},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    ],
    "post_processor": [
        {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    ],
    "truncation": [{"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}],
    "padding": [
        {
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "cases"),
    [(manifest, 2000), (embeddings, 500), (tokenizer, 1500), (notes, 500), (graphs, 2000)],
)
def test_no_damage_breaks_out(target: fuzzing.Target, cases: int, tmp_path: Path) -> None:
    found = fuzzing.fuzz(target, cases, tmp_path)
    assert not found, fuzzing.report(found)
