"""Packed weights compute the same bits, and are passed over wherever they do not fit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
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
from dualfocus.runtime import Bundle, contents, onnx, packed
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.devices import Device
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.manifest import Precision


def pack(bundle: Path) -> Path:
    return packed.pack(bundle, *read_manifest(bundle))


def is_packed(bundle: Path) -> bool:
    found = packed.find(bundle, read_manifest(bundle)[1])
    return found is not None and found[0] == bundle / "packed"


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
        vouch(bundle, graph)
    with pytest.raises(BundleError, match=r"packed/vision.onnx is not an ONNX graph"):
        Bundle.open(bundle)


def vouch(bundle: Path, name: str) -> None:
    """Write the hash of a packed file, as it is now, into the note."""
    note, data = bundle / "packed" / "packed.json", (bundle / "packed" / name).read_bytes()
    raw = json.loads(note.read_text())
    raw["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    note.write_text(json.dumps(raw))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def move_away(file: Path) -> None:
    """Put a link in the place of a file."""
    bundle = file.parent if file.name == "packed" else file.parent.parent
    target = bundle.parent / f"moved {file.name}"
    file.rename(target)
    file.symlink_to(target)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


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
    "a deep note": lambda bundle: (bundle / "packed" / "packed.json").write_text("[" * 100_000),
    "a FIFO as a note": lambda bundle: fifo(bundle / "packed" / "packed.json"),
    "a FIFO as weights": lambda bundle: fifo(bundle / "packed" / "decoder.onnx.data"),
    "an endless note": lambda bundle: (
        (bundle / "packed" / "packed.json").unlink(),
        (bundle / "packed" / "packed.json").symlink_to("/dev/zero"),
    ),
    "a link to a graph elsewhere": lambda bundle: move_away(bundle / "packed" / "decoder.onnx"),
    "a link to a folder elsewhere": lambda bundle: move_away(bundle / "packed"),
    "a bit of the weights": lambda bundle: flip(bundle / "packed" / "decoder.onnx.data"),
    "a bit of a graph": lambda bundle: flip(bundle / "packed" / "vision.onnx"),
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


VERIFIED = [name for name in DOES_NOT_FIT if not name.startswith(("another", "other"))]


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_reads_what_was_packed(bundle: Path, name: str) -> None:
    run = CliRunner().invoke
    assert "SHA-256 verified" in run(cli.app, ["inspect", str(bundle), "--verify"]).stdout
    DOES_NOT_FIT[name](bundle)
    refused = run(cli.app, ["inspect", str(bundle), "--verify"])
    assert refused.exit_code == 2
    assert refused.stderr.endswith(f": make it again with `dualfocus pack {bundle}`\n")
    assert refused.stderr.count("\n") == 1
    if name == "a bit of the weights":
        assert "packed/decoder.onnx.data has SHA-256" in refused.stderr


def test_a_damaged_bundle_is_not_packed(bundle: Path) -> None:
    flip(bundle / "decoder.onnx.data")
    with pytest.raises(BundleError, match=r"bundle/decoder\.onnx\.data has SHA-256 \w{64}, expected"):
        pack(bundle)


def test_one_process_packs_at_a_time(bundle: Path) -> None:
    before = (bundle / "packed" / "packed.json").read_bytes()
    code = "import sys; from dualfocus import cli; sys.argv[1:] = ['pack', sys.argv[1]]; cli.main()"
    with contents.replacing(bundle / "packed") as new:
        (new / "half").write_bytes(b"written")
        other = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True)
        assert other.returncode == 2
        assert "another process writes to" in other.stderr
        assert (new / "half").exists()
        (new / "half").unlink()
        for file in (bundle / "packed").iterdir():
            shutil.copy(file, new)
    assert (bundle / "packed" / "packed.json").read_bytes() == before
    assert is_packed(bundle)
    assert not new.exists()


def test_a_full_disk_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match=r"bundle/packed cannot be written: No space left on device"):
        pack(bundle)
    assert is_packed(bundle)  # the old one


def test_nothing_is_left_where_packing_fails(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = set(copy.iterdir())
    (copy / "decoder.onnx").write_bytes(b"\0" * (copy / "decoder.onnx").stat().st_size)
    with pytest.raises(BundleError, match="has SHA-256"):
        pack(copy)
    assert set(copy.iterdir()) == before

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BundleError, match=r"has room for 0\.0 MB, packing may take \d\.\d MB"):
        pack(copy)
    assert set(copy.iterdir()) == before


def test_a_signal_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = sorted(bundle.rglob("*"))
    monkeypatch.setattr(onnx, "save_packed", terminated)
    assert CliRunner().invoke(cli.app, ["pack", str(bundle)]).exit_code == 128 + signal.SIGTERM
    assert sorted(bundle.rglob("*")) == before


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
    folder = packed.pack(for_gpu, *read_manifest(for_gpu), RTX)
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
