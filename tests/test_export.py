"""The exporter: what a bundle holds, that its graphs are torch's, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from tokenizers import Tokenizer
from transformers import LlavaConfig, LlavaForConditionalGeneration

from dualfocus.export import ExportError, decoder, export_bundle, nano_tower, verify
from dualfocus.export import bundle as bundles
from dualfocus.export import checkpoint as checkpoints
from dualfocus.export.verify import Trial
from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.manifest import BoxFormat, Manifest, Precision
from dualfocus.runtime.turns import DUALFOCUS

SHAPES = {
    "grouped-query": tiny.Shape(),
    "one-key-head": tiny.Shape(image=84, heads=3, kv_heads=1, head_size=32, vocabulary=1021, layers=1),
    "all-heads": tiny.Shape(heads=2, kv_heads=2, head_size=48, hidden=40, crop=True, feature_layer=-1),
    "tied-and-biased": tiny.Shape(tied=True, bias=True, feature_strategy="full", vocabulary=401),
    "stretched-rope": tiny.Shape(rope_scaling={"rope_type": "linear", "factor": 4.0}),
}


def quiet(_: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Exported:
    checkpoint: Path
    bundle: Path
    manifest: Manifest
    model: LlavaForConditionalGeneration
    lines: list[str]


def export(folder: Path, shape: tiny.Shape, **options: Any) -> Exported:
    checkpoint = tiny.build(folder / "checkpoint", shape)
    lines: list[str] = []
    manifest = export_bundle(checkpoint, folder / "bundle", progress=lines.append, **options)
    return Exported(checkpoint, folder / "bundle", manifest, tiny.make_model(shape), lines)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tmp_path_factory.mktemp("export"), request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def edit(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


# ---- what a bundle holds


def test_manifest_lists_every_file(exported: Exported) -> None:
    raw = json.loads((exported.bundle / "manifest.json").read_text())
    assert Manifest.from_dict(raw) == exported.manifest
    present = {path.name for path in exported.bundle.iterdir()} - {"manifest.json"}
    graphs = {f"{part}.onnx{data}" for part in ("vision", "decoder") for data in ("", ".data")}
    assert present == {*graphs, "embeddings.npy", "tokenizer.json"}
    assert exported.manifest.files.keys() == present
    for name, entry in exported.manifest.files.items():
        data = (exported.bundle / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256)


def test_manifest_describes_the_model(exported: Exported) -> None:
    manifest, text = exported.manifest, exported.model.config.text_config
    spec = manifest.decoder
    assert (spec.layers, spec.hidden, spec.context) == (text.num_hidden_layers, text.hidden_size, 1024)
    assert (spec.heads, spec.kv_heads, spec.head_size) == (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
    )
    assert spec.vocabulary == text.vocab_size
    assert spec.ragged_append
    assert manifest.image.size == exported.model.config.vision_config.image_size
    assert manifest.image.tokens == exported.model.config.image_seq_length
    assert manifest.tokens.bos == 1
    assert manifest.tokens.eos == tuple(exported.model.generation_config.eos_token_id)
    assert manifest.prompts == DUALFOCUS
    assert (manifest.name, manifest.max_new_tokens) == ("tiny", 12)  # dualfocus.json says so
    assert (manifest.coordinates, manifest.select) == ("original", "reference")
    assert manifest.box == BoxFormat("[{x0}, {y0}, {x1}, {y1}]", 2)


def test_fit_follows_the_preprocessor(exported: Exported) -> None:
    processor = json.loads((exported.checkpoint / "preprocessor_config.json").read_text())
    assert exported.manifest.image.fit == ("pad" if processor.get("do_pad") else "crop")
    assert exported.manifest.image.mean == tuple(processor["image_mean"])


def test_embeddings_and_tokenizer_are_the_checkpoints(exported: Exported) -> None:
    embeddings = np.load(exported.bundle / "embeddings.npy", mmap_mode="r")
    expected = exported.model.get_input_embeddings().weight.detach().numpy()
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, expected)
    text = "What is written on the red star? Ünïcode\n"
    ours = Tokenizer.from_file(str(exported.bundle / "tokenizer.json")).encode(text).ids
    assert [exported.manifest.tokens.bos, *ours] == tiny.make_tokenizer()(text).input_ids


def test_comparison_is_printed(exported: Exported) -> None:
    compared = [line for line in exported.lines if "|onnx - torch|" in line]
    for part in ("vision", "prefill of", "append of", "steps", "appends of", "one step of two rows"):
        assert any(part in line for line in compared), part
    assert all(line.endswith("ok") for line in compared)


# ---- the graphs


def test_vision_holds_no_dead_weights(exported: Exported) -> None:
    """Tower layers past the selected one, and the class pooling's norm, are not in the file."""
    model = exported.model
    graph = onnx.load(exported.bundle / "vision.onnx").graph
    layer = model.config.vision_feature_layer % (model.config.vision_config.num_hidden_layers + 1)
    used = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if "language_model" not in name
        and "lm_head" not in name
        and "post_layernorm" not in name
        and not any(f"encoder.layers.{i}." in name for i in range(layer, 99))
    )
    stored = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    assert used <= stored <= used + 200  # and a few constants of shapes


def test_decoder_interface(exported: Exported) -> None:
    """Names, types and shapes are `DecoderSpec`'s, so that a runtime may bind by the manifest alone."""
    spec = exported.manifest.decoder
    graph = onnx.load(exported.bundle / "decoder.onnx").graph

    def interface(values: Any) -> dict[str, tuple[int, list[str | int]]]:
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    f32, i32, i64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64
    cache = (f32, ["batch", spec.kv_heads, "capacity", spec.head_size])
    layers = [f"{i}.{part}" for i in range(spec.layers) for part in ("key", "value")]
    assert interface(graph.input) == {
        "inputs_embeds": (f32, ["batch", "length", spec.hidden]),
        "seqlens_k": (i32, ["batch"]),
        "total_sequence_length": (i32, []),
        "logits_at": (i64, ["batch", "wanted"]),
        "query_seqlens": (i32, ["batch"]),
        **{f"past_key_values.{name}": cache for name in layers},
    }
    assert interface(graph.output) == {
        "logits": (f32, ["batch", "wanted", spec.vocabulary]),
        **{f"present.{name}": cache for name in layers},
    }


@pytest.fixture(scope="module")
def sequences(exported: Exported) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of 40 random embeddings, and torch's logits after each."""
    embeds = np.random.default_rng(5).standard_normal((2, 40, exported.manifest.decoder.hidden), np.float32)
    return embeds, tiny.logits(exported.model, embeds)


def session(exported: Exported, rows: int = 1, capacity: int = 64) -> verify.Session:
    return verify.Session(exported.bundle / "decoder.onnx", exported.manifest.decoder, rows, capacity)


def test_rewound_cache_is_a_fresh_one(exported: Exported, sequences: tuple[np.ndarray, np.ndarray]) -> None:
    """A smaller length forgets what followed: another continuation of the prefix is torch's, every time."""
    (row, other), expected = sequences[0], sequences[1][0]
    one = session(exported)
    one.append(row[None, :30], [0])
    kept = [cache.numpy()[:, :, :20].copy() for cache in one.caches.values()]
    one.append(other[None, 20:40], [20])
    for before, after in zip(kept, one.caches.values(), strict=True):
        np.testing.assert_array_equal(before, after.numpy()[:, :, :20])
    np.testing.assert_allclose(one.append(row[None, 20:], [20])[0], expected[20:], atol=1e-4)

    joined = np.concatenate([row[:20], other[20:]])[None]
    np.testing.assert_allclose(
        one.append(other[None, 20:], [20]), tiny.logits(exported.model, joined)[:, 20:], atol=1e-4
    )


def test_ragged_append_is_one_by_one(exported: Exported, sequences: tuple[np.ndarray, np.ndarray]) -> None:
    embeds, _ = sequences
    both, alone = session(exported, rows=2), [session(exported), session(exported)]
    prefixes, counts = [25, 18], [9, 4]
    both.append(embeds[:, :25], [0, 0], prefixes)
    chunk = np.stack([embeds[row, start : start + 9] for row, start in enumerate(prefixes)])
    together = both.append(chunk, prefixes, counts)
    for row, (start, count) in enumerate(zip(prefixes, counts, strict=True)):
        alone[row].append(embeds[row : row + 1, :start], [0])
        expected = alone[row].append(embeds[row : row + 1, start : start + count], [start])
        np.testing.assert_allclose(together[row, :count], expected[0], atol=1e-5)


def test_idle_row_keeps_its_cache(exported: Exported, sequences: tuple[np.ndarray, np.ndarray]) -> None:
    """A row that appends nothing while the other does is unchanged, bit for bit."""
    embeds, expected = sequences
    both = session(exported, rows=2)
    both.append(embeds[:, :20], [0, 0])
    before = [cache.numpy()[1].copy() for cache in both.caches.values()]
    got = both.append(embeds[:, 20:25], [20, 20], [5, 0])
    np.testing.assert_allclose(got[0], expected[0, 20:25], atol=1e-4)
    for cache, kept in zip(both.caches.values(), before, strict=True):
        np.testing.assert_array_equal(cache.numpy()[1], kept)


def test_capacity_does_not_matter(exported: Exported, sequences: tuple[np.ndarray, np.ndarray]) -> None:
    embeds, _ = sequences
    tight, wide = session(exported, capacity=40), session(exported, capacity=200)
    np.testing.assert_allclose(tight.append(embeds[:1], [0]), wide.append(embeds[:1], [0]), atol=1e-5)


def test_without_ragged_append(tmp_path: Path) -> None:
    """The graph for an ONNX Runtime that does not know query_seqlens."""
    exported = export(tmp_path, tiny.Shape(), ragged_append=False)
    graph = onnx.load(exported.bundle / "decoder.onnx").graph
    assert not exported.manifest.decoder.ragged_append
    assert "query_seqlens" not in {value.name for value in graph.input}
    assert not any("appends of" in line for line in exported.lines)
    assert any("one step of two rows" in line for line in exported.lines)


def test_nano_tower(tmp_path: Path) -> None:
    """The registered tower goes the same way as CLIP's: its last hidden state, no class token."""
    build_with_nano_tower(tmp_path / "checkpoint")
    manifest = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", progress=quiet)
    assert (manifest.image.size, manifest.image.tokens) == (64, 4)
    assert manifest.source["vision_tower"] == "dualfocus_nano_vision"


def build_with_nano_tower(folder: Path) -> None:
    tiny.build(folder, tiny.Shape(image=64))
    text = LlavaForConditionalGeneration.from_pretrained(folder).config.text_config
    vision = nano_tower.NanoVisionConfig(
        image_size=64,
        patch_size=32,
        channels=(8, 16),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = LlavaConfig(
        vision,
        text,
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


# ---- complete or not at all


def test_graph_that_differs_is_no_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tolerance no float32 graph meets: the comparison refuses, and nothing is left behind."""
    monkeypatch.setattr(verify, "TOLERANCE", 1e-12)
    with pytest.raises(ExportError, match=r"vision, 1 picture: the exported graph is .* away from torch"):
        export_bundle(checkpoint, tmp_path / "bundle", progress=quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_wrong_weights_are_noticed(
    checkpoint: Path, tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose values come from the keys' projection is refused, whatever weights are rounded to."""
    original = decoder.Layer.of.__func__  # type: ignore[attr-defined]

    def spoiled(cls: type[decoder.Layer], tensors: Mapping[str, torch.Tensor]) -> decoder.Layer:
        value = "self_attn.v_proj.weight"
        layer: decoder.Layer = original(cls, {**tensors, value: tensors[value.replace("v_", "k_")]})
        return layer

    monkeypatch.setattr(decoder.Layer, "of", classmethod(spoiled))
    with pytest.raises(ExportError, match=r"layer 1.*: the exported graph is"):
        export_bundle(checkpoint, tmp_path / "bundle", precision=precision, progress=quiet)
    assert list(tmp_path.iterdir()) == []


WRITTEN = {
    "manifest.json", "vision.onnx", "vision.onnx.data", "decoder.onnx", "decoder.onnx.data", "embeddings.npy",
    "tokenizer.json",
}  # fmt: skip


def test_old_bundle_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    listed = {"of the old bundle": {}, "../checkpoint.txt": {}}
    (out / "manifest.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    (out / "of the old bundle").write_text("")
    (out / "packed").mkdir()
    (out / "packed" / "decoder.onnx").write_text("")
    (tmp_path / "checkpoint.txt").write_text("")
    export_bundle(checkpoint, out, progress=quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "checkpoint.txt"}
    assert {path.name for path in out.iterdir()} == WRITTEN


def kept(out: Path) -> dict[str, Any]:
    """Files, a folder, a link and what is in it, as people keep them beside a bundle."""
    (out / "notes").mkdir()
    files = {"README.md": "mine", "notes/a.txt": "a", ".hidden": "b"}
    for name, text in files.items():
        (out / name).write_text(text)
    (out / "link").symlink_to("README.md")
    (out / "nowhere").symlink_to("no such file")
    (out / "elsewhere").symlink_to("notes")
    return files


def check_kept(out: Path, files: dict[str, Any]) -> None:
    assert {name: (out / name).read_text() for name in files} == files
    assert os.readlink(out / "link") == "README.md"
    assert os.readlink(out / "nowhere") == "no such file"
    manifest = Manifest.from_dict(json.loads((out / "manifest.json").read_text()))
    assert manifest.files.keys() == WRITTEN - {"manifest.json"}
    written = {path.name for path in out.iterdir()}
    assert written == WRITTEN | {"README.md", "notes", ".hidden", "link", "nowhere", "elsewhere"}


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("manifest", ["bundle", "{}", "no JSON"])
def test_other_files_stay(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool, manifest: str
) -> None:
    """Whatever the file system can do, and whatever is left of the old bundle."""
    out = tmp_path / "bundle"
    export_bundle(checkpoint, out, precision="int8", progress=quiet)
    if manifest != "bundle":
        (out / "manifest.json").write_text(manifest)
    files = kept(out)
    if not in_one_step:
        monkeypatch.setattr(bundles, "_exchange", lambda *_: False)
    export_bundle(checkpoint, out, progress=quiet)
    check_kept(out, files)
    assert list(tmp_path.iterdir()) == [out]
    assert json.loads((out / "manifest.json").read_text())["precision"] == "fp32"


def test_they_stay_where_nothing_is_linked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    export_bundle(checkpoint, out, progress=quiet)
    files = kept(out)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    export_bundle(checkpoint, out, progress=quiet)
    check_kept(out, files)


def test_a_link_to_a_bundle_stays_a_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    export_bundle(checkpoint, tmp_path / "disk" / "real", precision="int8", progress=quiet)
    (tmp_path / "link").symlink_to("disk/real")
    export_bundle(checkpoint, tmp_path / "link", progress=quiet)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "disk" / "real" / "manifest.json").read_text())["precision"] == "fp32"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


@pytest.mark.parametrize("at", ["before", "after", "between"])
def test_a_process_that_is_killed_leaves_a_bundle(checkpoint: Path, tmp_path: Path, at: str) -> None:
    """Around the one step; and between the two that other file systems take: then the next export begins with
    the old bundle back in its place.
    """
    out = tmp_path / "bundle"
    export_bundle(checkpoint, out, precision="int8", progress=quiet)
    files = kept(out)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dualfocus.export import bundle, export_bundle\n"
        "def kill(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "exchange, rename = bundle._exchange, Path.rename\n"
        "def exchanged(*names):\n"
        "    if sys.argv[3] == 'before': kill()\n"
        "    assert exchange(*names)\n"
        "    kill()\n"
        "def renamed(path, other):\n"
        "    if path.name.endswith('.partial'): kill()\n"
        "    return rename(path, other)\n"
        "if sys.argv[3] == 'between': bundle._exchange, Path.rename = (lambda *_: False), renamed\n"
        "else: bundle._exchange = exchanged\n"
        "export_bundle(sys.argv[1], Path(sys.argv[2]), progress=lambda _: None)"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(out), at]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    if at == "between":
        assert not out.exists()
        with pytest.raises(ExportError):  # whatever comes of the next one
            export_bundle(tmp_path / "no such", out, precision="int8", progress=quiet)
    found = json.loads((out / "manifest.json").read_text())
    assert found["precision"] == ("fp32" if at == "after" else "int8")
    assert Bundle.open(out).manifest == Manifest.from_dict(found)
    check_kept(out, files)
    export_bundle(checkpoint, out, precision="fp16", progress=quiet)
    check_kept(out, files)
    assert list(tmp_path.iterdir()) == [out]


def test_everything_is_on_the_disk_before_it_takes_its_place(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    sync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda of: (happened.append(Path(os.readlink(f"/proc/self/fd/{of}")).name), sync(of))[1]
    )
    monkeypatch.setattr(
        Path,
        "rename",
        lambda path, other: (happened.append(f"-> {Path(other).name}"), rename(path, other))[1],
    )
    export_bundle(checkpoint, tmp_path / "bundle", progress=quiet)
    *before, moved, after = happened[-len(WRITTEN) - 3 :]
    assert set(before) == {*WRITTEN, ".bundle.partial"}
    assert before[-1] == ".bundle.partial"
    assert (moved, after) == ("-> bundle", tmp_path.name)


def test_a_full_disk_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Trial, "begin", full)
    message = (
        r"/\.bundle\.partial cannot be written: No space left on device; this export takes [\d.]+ (k|M)B"
    )
    with pytest.raises(ExportError, match=message):
        export_bundle(checkpoint, tmp_path / "bundle", progress=quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 250, "n" * 300, "letter.txt/bundle", "/proc/bundle"])
def test_a_place_that_cannot_be_written(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match=r"cannot be written|is a file|has room for 0 bytes"):
        export_bundle(checkpoint, tmp_path / name, progress=quiet)


@pytest.mark.parametrize("count", [0, 999, 1_000, 2_345_000, 7_250_000_000])
def test_sizes_are_told_in_units_that_say_something(count: int) -> None:
    expected = {0: "0 bytes", 999: "999 bytes", 1_000: "1.0 kB", 2_345_000: "2.3 MB", 7_250_000_000: "7.2 GB"}
    assert bundles._size(count) == expected[count]


# ---- what a tokenizer's file holds besides


HARMFUL = {
    "padding": {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    },
    "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 1},
}


def test_a_tokenizer_is_exported_bare(broken: Path, tmp_path: Path) -> None:
    """What pads, cuts or is put around a text could abort the runtime, and is of no use to it."""
    edit(broken / "tokenizer.json", **HARMFUL)
    manifest = export_bundle(broken, tmp_path / "bundle", progress=quiet)
    stored = json.loads((tmp_path / "bundle" / "tokenizer.json").read_text())
    assert (stored["padding"], stored["truncation"], stored["post_processor"]) == (None, None, None)
    assert manifest.tokens.bos == 1  # which the file puts before a text
    assert Bundle.open(tmp_path / "bundle").tokenizer.encode("a red star").ids


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+)+$"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(?<"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"decoder": {"type": "Strip", "content": " ", "start": 10**9, "stop": 10**9}},
        {"post_processor": {"type": "TemplateProcessing", "single": 3}},
        {"added_tokens": [{"id": 10**12, "content": "a"}]},
        {"model": {"type": "BPE", "vocab": [], "merges": 3}},
        {"model": 3},
        {"model": {"type": "BPE", "vocab": {"<pad>": 0, "a": 1, "b": 9000}, "merges": []}},
    ],
)
def test_a_harmful_tokenizer_is_refused(broken: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    edit(broken / "tokenizer.json", **changes)
    refused(broken, tmp_path, "tokenizer.json")


# ---- refusals


def test_another_programs_manifest_is_no_bundles(checkpoint: Path, tmp_path: Path) -> None:
    text = json.dumps({"name": "An app", "start_url": "/", "icons": []})
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ExportError, match="is a folder with other things in it"):
        export_bundle(checkpoint, tmp_path, progress=quiet)
    assert (tmp_path / "manifest.json").read_text() == text


def test_other_peoples_folder_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match="is a folder with other things in it"):
        export_bundle(checkpoint, tmp_path, progress=quiet)
    with pytest.raises(ExportError, match="is a file, expected"):
        export_bundle(checkpoint, tmp_path / "letter.txt", progress=quiet)
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "is not a checkpoint folder: it has no config.json"),
        ("preprocessor_config.json", "lacks its image processor: it has no preprocessor_config.json"),
        ("tokenizer.json", "has no tokenizer: neither tokenizer.json nor tokenizer.model"),
        ("model.safetensors", "has no weights, expected one of model.safetensors, model"),
    ],
)
def test_missing_file(broken: Path, tmp_path: Path, name: str, message: str) -> None:
    (broken / name).unlink()
    refused(broken, tmp_path, message)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"]
)
def test_torn_file(broken: Path, tmp_path: Path, name: str) -> None:
    data = (broken / name).read_bytes()
    (broken / name).write_bytes(data[: len(data) // 2])
    refused(broken, tmp_path, "cannot be (read|loaded)|is not JSON")


def test_missing_weights(broken: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    (gone,) = [name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")]
    del weights[gone]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused(broken, tmp_path, r"lacks 1 of the model's weights, the first .*layers\.1\.mlp\.up_proj\.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlavaNextForConditionalGeneration"]}, "LlavaNext.*, expected LLaVA's: LlavaFor"),
        ({"text_config": {"model_type": "gpt2"}}, "language model is of type 'gpt2', expected one of llama"),
    ],
)
def test_other_architecture(broken: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit(broken / "config.json", **changes)
    refused(broken, tmp_path, message)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (tiny.Shape(head_size=24), "head size is 24, .* a multiple of 16"),
        (tiny.Shape(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope type 'dynamic'"),
        (tiny.Shape(context=32), "a context of 32 tokens holds no image of 16"),
    ],
)
def test_unsupported_shape(tmp_path: Path, shape: tiny.Shape, message: str) -> None:
    refused(tiny.build(tmp_path / "checkpoint", shape), tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, "resample is 2, expected 3"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, expected 1/255"),
        ({"size": {"shortest_edge": 64}}, "size is .*64.*, expected the tower's 56"),
        ({"size": {"height": 56, "width": 64}}, "size is .*64.*, expected the tower's 56"),
        ({"crop_size": {"height": 64, "width": 64}}, "crop_size is .*64.*, expected the tower's 56"),
        ({"do_rescale": False}, "do_rescale is False, expected True"),
        ({"do_pad": False, "do_center_crop": False}, "neither do_pad nor do_center_crop"),
        ({"image_mean": ...}, "image_mean is missing"),
    ],
)
def test_other_preprocessing(broken: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit(broken / "preprocessor_config.json", **changes)
    refused(broken, tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promts": {}}, "dualfocus.json: unknown key 'promts', expected one of"),
        ({"prompts": {"makro": "{T}"}}, "dualfocus.json: unknown field 'prompts.makro'"),
        ({"prompts": []}, "dualfocus.json: prompts: expected `object`, got `array`"),
        ({"prompts": {"user": "USER:"}}, "dualfocus.json: prompts.user does not hold '{turn}' exactly once"),
        ({"prompts": {"micro": "{T}"}}, "dualfocus.json: prompts.micro does not hold '<image>' exactly once"),
        ({"prompts": {"reply": "{answer}\n"}}, "prompts.reply ends with .* none of the model's end tokens"),
        (
            {"coordinates": "feet"},
            "coordinates: invalid enum value 'feet', expected one of model, original, padded",
        ),
        ({"box": "[]"}, "dualfocus.json: box: expected `object .* null`, got `str`"),
        (
            {"box": {"text": "[{x0}]", "decimals": 2}},
            "dualfocus.json: box.text is '\\[{x0}\\]', expected {x0}, {y0}",
        ),
        ({"box": {"text": BoxFormat().text, "decimals": 9}}, "box.decimals: expected `int` <= 4"),
        (
            {"box": {"text": BoxFormat().text, "decimals": 2}, "coordinates": "model"},
            "expected null where coordinates is 'model'",
        ),
        ({"select": 3}, "select: expected `str`, got `int`"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected `int` >= 1"),
        ({"fit": "squash"}, "image.fit: invalid enum value 'squash', expected one of crop"),
    ],
)
def test_bad_declaration(broken: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit(broken / "dualfocus.json", **changes)
    refused(broken, tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "box"),
    [
        ({"box": None}, None),
        ({"coordinates": "model"}, None),
        ({"box": {"text": "{x0},{y0},{x1},{y1}", "decimals": 3}}, BoxFormat("{x0},{y0},{x1},{y1}", 3)),
    ],
)
def test_declared_box_format(broken: Path, changes: dict[str, Any], box: BoxFormat | None) -> None:
    edit(broken / "dualfocus.json", **changes)
    assert checkpoints.describe(checkpoints.load(broken), ragged_append=True).box == box


def test_declaration_reaches_the_manifest(broken: Path, tmp_path: Path) -> None:
    edit(
        broken / "dualfocus.json",
        name="spectacles",
        coordinates="padded",
        select="answer",
        fit="crop",
        prompts={"hint": "", "select": DUALFOCUS.micro},
    )
    manifest = export_bundle(broken, tmp_path / "bundle", progress=quiet)
    assert (manifest.name, manifest.coordinates, manifest.select) == ("spectacles", "padded", "answer")
    assert manifest.image.fit == "crop"
    assert manifest.prompts == dataclasses.replace(DUALFOCUS, hint="", select=DUALFOCUS.micro)
    assert manifest.prompts.select == manifest.prompts.micro


def refused(checkpoint: Path, folder: Path, message: str) -> None:
    """One sentence, and nothing written."""
    before = set(folder.iterdir())
    with pytest.raises(ExportError, match=message) as caught:
        export_bundle(checkpoint, folder / "bundle", progress=quiet)
    assert "\n" not in str(caught.value)
    assert set(folder.iterdir()) == before


def test_import_is_light() -> None:
    code = "import sys, dualfocus.export; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("package", ["torch", "sentencepiece"])
def test_missing_package_is_named(tmp_path: Path, package: str) -> None:
    code = (
        f"import sys, pathlib; sys.modules['{package}'] = None\n"
        "from dualfocus.export import ExportError, export_bundle\n"
        "try: export_bundle(pathlib.Path('a'), pathlib.Path('b'))\n"
        "except ExportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"export needs {package}: pip install 'dualfocus[export,cpu]'\n"


def test_vision_is_torchs(exported: Exported) -> None:
    """Batches of one and of three, on pixels the exporter never saw."""
    import onnxruntime

    size = exported.manifest.image.size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(9)).numpy()
    vision = onnxruntime.InferenceSession(exported.bundle / "vision.onnx", providers=["CPUExecutionProvider"])
    expected = verify.image_features(exported.model, pixels)
    for n in (1, 3):
        (got,) = vision.run(["image_features"], {"pixel_values": pixels[:n]})
        np.testing.assert_allclose(got, expected[:n], atol=1e-4)
