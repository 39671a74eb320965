"""Packed weights compute the same bits, and are passed over wherever they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from dualfocus import cli
from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle, packed
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.cache import KVCache
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
