"""Packed weights compute the same bits, and are passed over wherever they do not fit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from dualfocus import cli
from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle, onnx, packed
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.devices import Device
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.manifest import Precision


def pack(bundle: Path) -> Path:
    return packed.pack(bundle, read_manifest(bundle)[1])


def is_packed(bundle: Path) -> bool:
    return packed.graphs(bundle, read_manifest(bundle)[1]) == bundle / "packed"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A packed one."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    pack(copy)
    return copy


def computed(path: Path) -> list[np.ndarray]:
    """Image tokens, and the logits of a prefill, of two ragged rows and of a step."""
    opened = Bundle.open(path, threads=1)
    spec, size = opened.manifest.decoder, opened.manifest.image.size
    random = np.random.default_rng(0)
    results = [opened.vision.encode(random.standard_normal((2, 3, size, size), np.float32))]
    cache = KVCache(spec, 2, 64)
    for lengths in ((20, 13), (5, 2), (1, 1)):
        chunks = [random.standard_normal((length, spec.hidden), np.float32) for length in lengths]
        results += opened.decoder.extend(cache, [0, 1], chunks, [range(length) for length in lengths])
    return results


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_packed_weights_compute_the_same_bits(tmp_path: Path, precision: Precision) -> None:
    checkpoint = tiny.build(tmp_path / "checkpoint", tiny.Shape(heads=6, hidden=96))
    export_bundle(checkpoint, tmp_path / "bundle", precision=precision, progress=lambda _: None)
    before = computed(tmp_path / "bundle")
    pack(tmp_path / "bundle")
    assert is_packed(tmp_path / "bundle")
    for one, two in zip(before, computed(tmp_path / "bundle"), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_packed_graphs_are_what_is_opened(bundle: Path) -> None:
    for graph in ("vision.onnx", "decoder.onnx"):
        file = bundle / "packed" / graph
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(BundleError, match=r"packed/vision.onnx cannot be opened"):
        Bundle.open(bundle)


def rewrite_note(bundle: Path, key: str, value: object) -> None:
    note = bundle / "packed" / "packed.json"
    raw = json.loads(note.read_text())
    raw["made_for"][key] = value
    note.write_text(json.dumps(raw))


DOES_NOT_FIT: dict[str, Callable[[Path], object]] = {
    "another bundle": lambda bundle: rewrite_note(bundle, "bundle", "0" * 64),
    "another ONNX Runtime": lambda bundle: rewrite_note(bundle, "onnxruntime", "1.0"),
    "another processor": lambda bundle: rewrite_note(bundle, "processor", "abacus"),
    "other kernels": lambda bundle: rewrite_note(bundle, "kernels", ["scalar"]),
    "a torn file": lambda bundle: (bundle / "packed" / "decoder.onnx.data").write_bytes(b"torn"),
    "a file less": lambda bundle: (bundle / "packed" / "vision.onnx").unlink(),
    "a torn note": lambda bundle: (bundle / "packed" / "packed.json").write_text('{"made_for'),
    "a foreign note": lambda bundle: (bundle / "packed" / "packed.json").write_text("[1]"),
    "no note": lambda bundle: (bundle / "packed" / "packed.json").unlink(),
    "an empty note": lambda bundle: (bundle / "packed" / "packed.json").write_text("{}"),
}


@pytest.mark.parametrize("spoil", DOES_NOT_FIT.values(), ids=DOES_NOT_FIT.keys())
def test_what_does_not_fit_is_passed_over(
    bundle: Path, tiny_bundle: Path, spoil: Callable[[Path], object]
) -> None:
    assert is_packed(bundle)
    spoil(bundle)
    assert not is_packed(bundle)
    for one, two in zip(computed(tiny_bundle), computed(bundle), strict=True):
        np.testing.assert_array_equal(one, two)
    pack(bundle)  # again
    assert is_packed(bundle)


def test_nothing_is_left_where_packing_fails(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = set(copy.iterdir())
    (copy / "decoder.onnx").write_bytes(b"\0" * (copy / "decoder.onnx").stat().st_size)
    with pytest.raises(BundleError, match="cannot be opened"):
        pack(copy)
    assert set(copy.iterdir()) == before

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BundleError, match=r"has room for 0\.0 GB, packing may take"):
        pack(copy)
    assert set(copy.iterdir()) == before


def test_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    run = CliRunner().invoke
    assert "packed for this machine" not in run(cli.app, ["inspect", str(copy)]).stdout
    assert run(cli.app, ["pack", str(copy)]).exit_code == 0
    assert "packed for this machine" in run(cli.app, ["inspect", str(copy), "--verify"]).stdout
    refused = run(cli.app, ["pack", str(tmp_path)])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1


# ---- TensorRT-RTX, of whose plug-in only the calls are seen ----

RTX = Device("tensorrt-rtx")


@pytest.fixture(scope="module")
def for_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    checkpoint = tiny.build(folder / "checkpoint")
    export_bundle(checkpoint, folder / "bundle", target="cuda", precision="fp16", progress=lambda _: None)
    return folder / "bundle"


class Options:
    """A session's."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.provider: dict[str, str] = {}

    def add_session_config_entry(self, entry: str, value: str) -> None:
        self.entries[entry] = value

    def add_provider_for_devices(self, devices: list[str], chosen: dict[str, str]) -> None:
        assert devices == ["the GPU"]
        self.provider = chosen


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[Path, Options]:
    """Which graphs sessions were opened on, and how; an engine is a copy of its graph, run on the CPU."""
    found: dict[Path, Options] = {}
    real = onnx.ort.InferenceSession

    def session(path: Path, options: Options) -> Any:
        found[path] = options
        if target := options.entries.get("ep.context_file_path"):
            for file in path.parent.glob(f"*{path.stem}*"):
                shutil.copy(file, Path(target).parent)
            shutil.copy(path.parent / "embeddings.npy", Path(target).parent)
        return emulated._Session(real(path, providers=["CPUExecutionProvider"]))

    plug_in = SimpleNamespace(__version__="0.5.0")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plug_in)
    monkeypatch.setitem(sys.modules, "cupy", emulated.cupy())
    monkeypatch.setattr(onnx, "problem", lambda _: None)
    monkeypatch.setattr(onnx, "_rtx_devices", lambda: ["the GPU"])
    monkeypatch.setattr(onnx.ort, "SessionOptions", Options)
    monkeypatch.setattr(onnx.ort, "InferenceSession", session)
    return found


def test_the_plug_in_keeps_its_engines(for_gpu: Path, opened: dict[Path, Options]) -> None:
    _, digest = read_manifest(for_gpu)
    folder = packed.pack(for_gpu, digest, RTX)
    assert folder == for_gpu / "packed-rtx"
    for graph in ("vision.onnx", "decoder.onnx"):
        told = opened[for_gpu / graph].entries
        assert told["ep.context_enable"] == "1"
        assert told["ep.context_file_path"].endswith(f".packed-rtx.unfinished/{graph}")
        assert opened[for_gpu / graph].provider["has_user_compute_stream"] == "0"
    Bundle.open(for_gpu, device="tensorrt-rtx")
    provider = opened[folder / "decoder.onnx"].provider
    assert provider["has_user_compute_stream"] == provider["enable_cuda_graph"] == "1"
    assert provider["user_compute_stream"] == "8"
    assert provider["nv_runtime_cache_path"] == str(folder / "cache")
    assert opened[folder / "vision.onnx"].provider["user_compute_stream"] == "7"

    note = folder / "packed.json"
    raw = json.loads(note.read_text())
    assert raw["made_for"]["gpu"] == "Emulated 9.0"
    for name in ("bundle", "onnxruntime", "provider", "gpu"):
        note.write_text(json.dumps({**raw, "made_for": raw["made_for"] | {name: "another"}}))
        opened.clear()
        Bundle.open(for_gpu, device="tensorrt-rtx")
        assert set(opened) == {for_gpu / "vision.onnx", for_gpu / "decoder.onnx"}
        assert "nv_runtime_cache_path" not in opened[for_gpu / "decoder.onnx"].provider


def test_for_cuda_there_is_nothing_to_pack(for_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    refused = CliRunner().invoke(cli.app, ["pack", str(for_gpu), "--device", "cuda"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("dualfocus: for cuda:0 there is nothing to pack")
