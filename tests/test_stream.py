"""Export a layer at a time: each tensor once, on from any interruption; and in operators of the standard."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner

from dualfocus import cli
from dualfocus.bench import export as bench_export
from dualfocus.export import ExportError, export_bundle, stream, verify
from dualfocus.export import checkpoint as checkpoints
from dualfocus.export.weights import StoredWeights
from dualfocus.runtime import Bundle, DualFocus
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.errors import BundleError, InputError
from dualfocus.runtime.manifest import CacheType, Manifest, Precision, Target

SHAPE = tiny.Shape(layers=3)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("checkpoint") / "tiny", SHAPE)


def hashes(bundle: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir()}


class Interrupted(BaseException):
    """Comes from outside, as Ctrl-C does: no Exception."""


def interrupt_at(doing: str) -> Any:
    def watch(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if what == doing:
            raise Interrupted

    return watch


STAGES = ["vision", "embeddings", "layer 1 of 3", "layer 2 of 3", "layer 3 of 3", "head", "hashing"]


# ---- once


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_each_tensor_is_read_once(
    checkpoint: Path, tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = checkpoints.load

    def load(*arguments: Any) -> checkpoints.Checkpoint:
        loaded.append(original(*arguments))
        return loaded[-1]

    monkeypatch.setattr(checkpoints, "load", load)
    told: list[str] = []
    export_bundle(
        checkpoint,
        tmp_path / "bundle",
        precision=precision,
        progress=quiet,
        watch=lambda doing, done, total: told.append(doing),
    )
    (one,) = loaded
    assert one.weights.reads == dict.fromkeys(one.names, 1)
    assert told == STAGES


# ---- interruptions


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_resumed_anywhere_it_is_the_same_bundle(
    checkpoint: Path, tmp_path: Path, precision: Precision
) -> None:
    """Stopped once in every stage, each time further on; what had been done is not read again."""
    options: dict[str, Any] = {"precision": precision, "progress": quiet}
    export_bundle(checkpoint, tmp_path / "whole", **options)
    out = tmp_path / "parts"
    for stage in STAGES:
        with pytest.raises(Interrupted):
            export_bundle(checkpoint, out, resume=True, watch=interrupt_at(stage), **options)
        assert not out.exists()
        with pytest.raises(BundleError, match="is an interrupted export: continue it"):
            Bundle.open(tmp_path / ".parts.partial")
    export_bundle(checkpoint, out, resume=True, **options)
    assert not (tmp_path / ".parts.partial").exists()
    assert hashes(out) == hashes(tmp_path / "whole")


def test_resuming_goes_on_behind_the_last_finished_layer(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        export_bundle(checkpoint, tmp_path / "b", progress=quiet, watch=interrupt_at("layer 3 of 3"))
    lines: list[str] = []
    read: list[str] = []
    reading = StoredWeights.read
    monkeypatch.setattr(StoredWeights, "read", lambda self, name: (read.append(name), reading(self, name))[1])
    told: list[tuple[str, int, int]] = []
    export_bundle(
        checkpoint,
        tmp_path / "b",
        resume=True,
        progress=lines.append,
        watch=lambda *doing: told.append(doing),
    )
    assert [doing for doing, _, _ in told] == STAGES[4:]
    assert told[-1][1] == told[-1][2]  # what was done before the interruption counts as done
    assert lines[0] == "going on behind layer 2 of 3"
    assert {name.split(".layers.")[-1][0] for name in read if ".layers." in name} == {"2"}
    assert not any("vision" in name or "embed" in name for name in read)


def test_what_is_cut_off_in_a_layer_is_written_again(checkpoint: Path, tmp_path: Path) -> None:
    """A data file that is longer than the last finished layer left it, as a power cut leaves it."""
    export_bundle(checkpoint, tmp_path / "whole", precision="int4", progress=quiet)
    with pytest.raises(Interrupted):
        export_bundle(
            checkpoint, tmp_path / "b", precision="int4", progress=quiet, watch=interrupt_at("layer 2 of 3")
        )
    with (tmp_path / ".b.partial" / "decoder.onnx.data").open("ab") as file:
        file.write(b"half of a layer")
    (tmp_path / ".b.partial" / "state.npz.unfinished").write_bytes(b"PK")
    export_bundle(checkpoint, tmp_path / "b", precision="int4", resume=True, progress=quiet)
    assert hashes(tmp_path / "b") == hashes(tmp_path / "whole")


def test_without_resume_it_begins_anew(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        export_bundle(checkpoint, tmp_path / "b", progress=quiet, watch=interrupt_at("head"))
    told: list[str] = []
    export_bundle(checkpoint, tmp_path / "b", progress=quiet, watch=lambda doing, *_: told.append(doing))
    assert told == STAGES
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def test_another_export_is_not_resumed(checkpoint: Path, tmp_path: Path) -> None:
    """Nor harmed: the first can still go on."""
    with pytest.raises(Interrupted):
        export_bundle(checkpoint, tmp_path / "b", progress=quiet, watch=interrupt_at("head"))
    other = shutil.copytree(checkpoint, tmp_path / "other")
    os.utime(other / "model.safetensors", (0, 0))
    for source, options in ((checkpoint, {"precision": "int8"}), (other, {})):
        with pytest.raises(ExportError, match="is the beginning of another export"):
            export_bundle(source, tmp_path / "b", resume=True, progress=quiet, **options)
    export_bundle(checkpoint, tmp_path / "b", resume=True, progress=quiet)


def test_nothing_to_resume_is_a_beginning(checkpoint: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint, tmp_path / "b", resume=True, progress=quiet)
    assert Bundle.open(tmp_path / "b").manifest.name == "tiny"


def test_an_interrupted_export_leaves_the_old_bundle(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{}")
    with pytest.raises(Interrupted):
        export_bundle(checkpoint, tmp_path / "b", progress=quiet, watch=interrupt_at("hashing"))
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["manifest.json"]


def test_ctrl_c_says_how_to_go_on(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "read_tower", stopped)
    result = CliRunner().invoke(cli.app, ["export", str(checkpoint), "-o", str(tmp_path / "b")])
    assert result.exit_code == 130
    assert "--resume goes on" in result.stderr


def test_the_command_passes_everything_on(checkpoint: Path, tmp_path: Path) -> None:
    options = [
        "--precision",
        "int8",
        "--target",
        "onnx-standard",
        "--cache",
        "float16",
        "--coords",
        "model",
        "--resume",
    ]
    result = CliRunner().invoke(cli.app, ["export", str(checkpoint), "-o", str(tmp_path / "b"), *options])
    assert result.exit_code == 0, result.stderr
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.precision, manifest.target, manifest.decoder.dtype) == (
        "int8",
        "onnx-standard",
        "float16",
    )
    assert (manifest.coordinates, manifest.box) == ("model", None)
    refused = CliRunner().invoke(
        cli.app, ["export", str(checkpoint), "-o", str(tmp_path / "c"), "--vision-tower", "x"]
    )
    assert refused.exit_code == 2
    assert "has its vision tower inside" in refused.stderr


def test_the_bench_of_exports(tmp_path: Path) -> None:
    """On a model too small for anything but seeing that all of it runs."""
    shape = dataclasses.replace(SHAPE, name="small", vocabulary=900)
    result = bench_export.run(shape, tmp_path, "huggingface", "int4", 1, lambda *_: None)
    assert result["private"]["met"]
    assert result["packed"]["bytes"] > 0
    assert len({start["answer"] for start in result["starts"].values()}) == 1  # four processes, one answer
    with pytest.raises(InputError, match="original checkpoints have CLIP's"):
        bench_export.run(shape, tmp_path, "original", "int4", 1, lambda *_: None)


# ---- two at once, and no room


def test_two_exports_do_not_write_to_one_bundle(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / ".b.partial").mkdir()
    other = os.open(tmp_path / ".b.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ExportError, match="another process writes to"):
        export_bundle(checkpoint, tmp_path / "b", progress=quiet)
    os.close(other)
    export_bundle(checkpoint, tmp_path / "b", progress=quiet)


def test_a_disk_without_room_is_noticed_first(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ExportError, match=r"has room for 100\.0 kB, this export takes \d+\.\d (kB|MB)"):
        export_bundle(checkpoint, tmp_path / "b", progress=quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_room_that_is_asked_for_is_the_room_it_takes(
    tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More for the tower, which is float32 and there three times while it is exported."""
    folder = tiny.build(tmp_path / "checkpoint", tiny.Shape(hidden=256, mlp=1024, layers=3))
    asked: list[int] = []
    needs = stream.Export.needs
    monkeypatch.setattr(stream.Export, "needs", lambda self: (asked.append(needs(self)), asked[-1])[1])
    export_bundle(folder, tmp_path / "b", precision=precision, progress=quiet)
    taken = sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert 0.95 * taken < asked[0] < 2 * taken


# ---- operators of the standard


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "int4"])
def pair(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One checkpoint in both dialects."""
    folder = tmp_path_factory.mktemp(request.param)
    for target in ("onnxruntime", "onnx-standard"):
        export_bundle(checkpoint, folder / target, precision=request.param, target=target, progress=quiet)
    return {target: folder / target for target in ("onnxruntime", "onnx-standard")}


def test_only_operators_of_the_standard(pair: dict[str, Path]) -> None:
    model = onnx.load(pair["onnx-standard"] / "decoder.onnx")
    assert [(of.domain, of.version) for of in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    assert {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"} <= {
        node.op_type for node in model.graph.node
    }
    onnx.checker.check_model(str(pair["onnx-standard"] / "decoder.onnx"), full_check=True)
    raw = json.loads((pair["onnx-standard"] / "manifest.json").read_text())
    assert raw["target"] == "onnx-standard"
    assert Manifest.from_dict(raw) == Bundle.open(pair["onnx-standard"]).manifest


def sessions(pair: dict[str, Path], rows: int, capacity: int) -> list[verify.Session]:
    spec = Bundle.open(pair["onnxruntime"]).manifest.decoder
    return [verify.Session(path / "decoder.onnx", spec, rows, capacity) for path in pair.values()]


def test_both_dialects_compute_the_same(pair: dict[str, Path]) -> None:
    """Prefill, ragged appends with an idle row, a rewound cache, steps."""
    hidden = SHAPE.hidden
    random = np.random.default_rng(0)
    calls = [
        ((0, 0, 0), (9, 6, 3)),
        ((9, 6, 3), (4, 0, 7)),
        ((13, 6, 10), (1, 1, 1)),
        ((5, 7, 11), (6, 2, 0)),
    ]
    both = sessions(pair, 3, 40)
    for starts, counts in calls:
        states = random.standard_normal((3, max(counts), hidden), np.float32)
        ours, standard = (session.append(states, starts, counts) for session in both)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(standard[row, :count], ours[row, :count], atol=2e-2)
    for name, cache in both[0].caches.items():
        for row, length in enumerate((11, 9, 11)):
            valid = [of.numpy()[row, :, :length] for of in (cache, both[1].caches[name])]
            np.testing.assert_allclose(valid[1], valid[0], atol=2e-2)


def test_padding_and_idle_rows_write_nothing(pair: dict[str, Path]) -> None:
    _, standard = sessions(pair, 2, 24)
    random = np.random.default_rng(0)
    standard.append(random.standard_normal((2, 8, SHAPE.hidden), np.float32), (0, 0), (8, 5))
    before = [cache.numpy().copy() for cache in standard.caches.values()]
    standard.append(random.standard_normal((2, 4, SHAPE.hidden), np.float32), (8, 5), (2, 0))
    for old, cache in zip(before, standard.caches.values(), strict=True):
        new = cache.numpy()
        np.testing.assert_array_equal(new[1], old[1])
        np.testing.assert_array_equal(new[0, :, 10:], old[0, :, 10:])
        assert (new[0, :, 8:10] != old[0, :, 8:10]).any()


def test_answers_of_both_dialects(pair: dict[str, Path], picture: np.ndarray) -> None:
    results = [
        DualFocus(
            dataclasses.replace(
                bundle := Bundle.open(path, threads=1),
                manifest=dataclasses.replace(bundle.manifest, max_new_tokens=40),
            )
        ).ask(picture, "What is written on the red star?")
        for path in pair.values()
    ]
    if Bundle.open(pair["onnxruntime"]).manifest.precision in ("fp32", "fp16"):
        one, two = results
        assert one.macro
        assert two.macro
        assert one.macro.generation.tokens == two.macro.generation.tokens
        assert (one.answer, one.crop, one.chosen) == (two.answer, two.crop, two.chosen)
    assert all(result.counters.vision_encodes == 2 for result in results)


def test_the_reference_evaluator_runs_it(checkpoint: Path, tmp_path: Path) -> None:
    """Another implementation of the standard, which knows nothing of ONNX Runtime: ONNX's own."""
    export_bundle(checkpoint, tmp_path / "b", target="onnx-standard", progress=quiet)
    spec = Bundle.open(tmp_path / "b").manifest.decoder
    session = verify.Session(tmp_path / "b" / "decoder.onnx", spec, 2, 16)
    evaluator = ReferenceEvaluator(str(tmp_path / "b" / "decoder.onnx"))
    random = np.random.default_rng(0)
    shape = (2, spec.kv_heads, 16, spec.head_size)
    caches = {f"past_key_values.{name}": np.zeros(shape, np.float32) for name in session.caches}
    for starts, counts in (((0, 0), (6, 4)), ((6, 4), (1, 3)), ((7, 7), (1, 1))):
        states = random.standard_normal((2, max(counts), spec.hidden)).astype(np.float32)
        totals = np.add(starts, counts)
        names = [node.name for node in session.session.get_outputs()]
        found = dict(
            zip(
                names,
                evaluator.run(
                    names,
                    caches
                    | {
                        "inputs_embeds": states,
                        "seqlens_k": (totals - 1).astype(np.int32),
                        "total_sequence_length": np.array(totals.max(), np.int32),
                        "query_seqlens": np.array(counts, np.int32),
                        "logits_at": np.tile(np.arange(max(counts)), (2, 1)),
                    },
                ),
                strict=True,
            )
        )
        expected = session.append(states, starts, counts)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(found["logits"][row, :count], expected[row, :count], atol=1e-4)
        caches = {name: found[name.replace("past_key_values", "present")] for name in caches}


# ---- a cache of half the size


@pytest.mark.parametrize("target", ["onnxruntime", "onnx-standard"])
def test_a_float16_cache_is_half_the_memory_and_near(
    checkpoint: Path, tmp_path: Path, target: Target, picture: np.ndarray
) -> None:
    lines: list[str] = []
    caches: tuple[CacheType, ...] = ("float32", "float16")
    for kind in caches:
        export_bundle(checkpoint, tmp_path / kind, target=target, cache=kind, progress=lines.append)
    assert float(lines[-1].split("from float32 ")[1].split()[0]) < 1e-4  # nats
    bundles = [Bundle.open(tmp_path / kind, threads=1) for kind in caches]
    whole, half = (KVCache(bundle.manifest.decoder, 2, 64) for bundle in bundles)
    spec = bundles[0].manifest.decoder
    assert whole.nbytes == 2 * spec.layers * 2 * spec.kv_heads * 64 * spec.head_size * 4
    assert half.nbytes == whole.nbytes / 2
    random = np.random.default_rng(0)
    for lengths in ((20, 13), (5, 2), (1, 1)):
        chunks = [random.standard_normal((length, spec.hidden), np.float32) for length in lengths]
        at = [range(length) for length in lengths]
        found = [
            bundle.decoder.extend(cache, [0, 1], chunks, at)
            for bundle, cache in zip(bundles, (whole, half), strict=True)
        ]
        for one, two in zip(*found, strict=True):
            np.testing.assert_allclose(two, one, atol=0.02)
            assert not np.array_equal(one, two)
    # every saving works on it as on the other: forks, snapshots and all
    runner = DualFocus(bundles[1])
    session = runner.session(picture)
    for question in ("What is it?", "What is it?", "How many are there?"):
        assert session.ask(question) is not None
