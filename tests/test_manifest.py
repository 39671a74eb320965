"""Bundles: a manifest says the same there and back, and every damage is one sentence."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path

import fakes
import numpy as np
import pytest

from dualfocus.runtime import Bundle, BundleError
from dualfocus.runtime.bundle import read_manifest, verify
from dualfocus.runtime.geometry import find_region
from dualfocus.runtime.manifest import FORMAT_VERSION, BoxFormat, FileEntry, Manifest

FILES = {name: f"what is in {name}".encode() for name in ("vision.onnx", "decoder.onnx", "embeddings.npy")}


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()}
    tokenizer = fakes.make_tokenizer()
    text = tokenizer.to_str().encode()
    entries["tokenizer.json"] = FileEntry(len(text), hashlib.sha256(text).hexdigest())
    return fakes.make_manifest(tokenizer, files=entries)


@pytest.fixture
def folder(tmp_path: Path, manifest: Manifest) -> Path:
    """A folder that passes for a bundle until its engines are opened."""
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "tokenizer.json").write_text(fakes.make_tokenizer().to_str())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return tmp_path


def refused(folder: Path) -> str:
    """The sentence that refuses `folder`."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert str(folder) in sentence
    return sentence


def edit(folder: Path, path: str, value: object) -> None:
    """Set a field of the manifest in `folder`, named with dots; ... removes it."""
    raw = json.loads((folder / "manifest.json").read_text())
    place = raw
    *parents, name = path.split(".")
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    (folder / "manifest.json").write_text(json.dumps(raw))


def test_there_and_back(manifest):
    text = json.dumps(manifest.to_dict())
    assert Manifest.from_dict(json.loads(text)) == manifest


def test_from_dict_keeps_its_input(manifest):
    raw = json.loads(json.dumps(manifest.to_dict()))
    before = copy.deepcopy(raw)
    Manifest.from_dict(raw)
    assert raw == before


def test_what_is_whole_is_read(folder, manifest):
    found, digest = read_manifest(folder)
    assert found == manifest
    assert digest == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    verify(folder, found)


def test_no_folder(tmp_path):
    assert "not a folder" in refused(tmp_path / "none")


def test_a_name_too_long_for_the_file_system(tmp_path):
    assert "not a folder" in refused(tmp_path / ("x" * 300))


def test_a_folder_without_manifest(tmp_path):
    assert "no manifest.json" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[]", "null", "3", pytest.param("[" * 100_000, id="deep")])
def test_a_manifest_that_is_none(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert "manifest.json" in refused(folder)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
def test_another_version(folder, version):
    edit(folder, "format_version", version)
    sentence = refused(folder)
    assert f"format version {version!r}" in sentence
    assert ("newer dualfocus" in sentence) == (version == FORMAT_VERSION + 1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("decoder", ..., "field decoder is missing"),
        ("decoder.layers", ..., "field decoder.layers is missing"),
        ("decoder.layers", "2", "field decoder.layers is '2', expected an integer"),
        ("decoder.layers", True, "field decoder.layers is True, expected an integer"),
        ("decoder.colour", 1, "unknown field decoder.colour"),
        ("decoder.dtype", "int4", "field decoder.dtype is 'int4', expected one of float32"),
        ("decoder.ragged_append", 1, "expected true or false"),
        ("image.mean", [0.5, 0.5], "field image.mean is [0.5, 0.5], expected a list of 3"),
        ("image.mean", [0.5, "a", 0.5], "field image.mean.1 is 'a', expected a number"),
        ("image.fit", "squash", "expected one of pad, crop, stretch"),
        ("tokens.eos", 2, "field tokens.eos is 2, expected a list"),
        ("coordinates", "model", "expected null where coordinates is 'model'"),
        ("box", ..., "field box is missing"),
        ("box", "[]", "field box is '[]', expected an object"),
        (
            "box.text",
            "[{x0}, {y0}, {x1}]",
            "field box.text is '[{x0}, {y0}, {x1}]', expected {x0}, {y0}, {x1}, {y1} once",
        ),
        ("box.text", "[{x0}, {y0}, {x1}, {y1}] {x0}", "expected {x0}, {y0}, {x1}, {y1} once each"),
        ("box.text", "[{y0}, {x0}, {y1}, {x1}]", "once each in this order"),
        ("box.text", "[{x0} {y0} {x1} {y1}]", "with commas between"),
        ("box.text", "1 [{x0}, {y0}, {x1}, {y1}]", "no digits around"),
        ("box.text", "[{x0}, {y0}, {x1}, {y1}] ", "no digits around"),
        ("box.text", "{[{x0}, {y0}, {x1}, {y1}]", "field box.text is '{["),
        ("box.decimals", 0, "field box.decimals is 0, expected 1 to 4"),
        ("box.decimals", 5, "field box.decimals is 5, expected 1 to 4"),
        ("coordinates", "polar", "expected one of original, padded, model"),
        ("prompts", "hello", "field prompts is 'hello', expected an object"),
        ("prompts.user", "USER:", "field prompts.user does not hold '{turn}' exactly once"),
        ("prompts.reply", "", "field prompts.reply does not hold '{answer}'"),
        ("prompts.micro", "<image><image>{T}", "field prompts.micro does not hold '<image>' exactly once"),
        ("prompts.image", "", "exactly once"),
        ("prompts.user", "{turn}<image>", "field prompts.user holds '<image>'"),
        ("prompts.reply", "{answer}", "field prompts.reply ends with '{answer}'"),
        ("prompts.hint", "\ud800", "field prompts.hint is '\\ud800', expected text without surrogates"),
        ("image.size", -5, "field image.size is -5, expected 1 to "),
        ("image.tokens", 10**12, "field image.tokens is 1000000000000, expected 1 to "),
        ("image.mean", [0.5, float("nan"), 0.5], "field image.mean.1 is nan, expected 0 to 1"),
        ("image.mean", [0.5, 0.5, 10**400], "field image.mean.2 is 1000"),
        ("image.mean", [2, 0.5, 0.5], "field image.mean.0 is 2.0, expected 0 to 1"),
        ("image.std", [0.5, 0.5, 0], "field image.std.2 is 0.0, expected a number above 0"),
        ("image.std", [float("inf"), 0.5, 0.5], "field image.std.0 is inf, expected a number above 0"),
        ("decoder.layers", 10**9, "field decoder.layers is 1000000000, expected 1 to 1024"),
        ("decoder.context", 0, "field decoder.context is 0, expected 1 to "),
        ("max_new_tokens", 0, "field max_new_tokens is 0, expected 1 to "),
        ("tokens.eos", [], "field tokens.eos is [], expected one token or more"),
        ("tokens.bos", -1, "field tokens.bos is -1, expected a token below"),
        ("tokens.bos", 10**6, "field tokens.bos is 1000000, expected a token below"),
        ("files", [], "field files is [], expected an object"),
    ],
)
def test_a_wrong_field_is_named(folder, field, value, said):
    edit(folder, field, value)
    assert said in refused(folder)


def test_no_box_format_is_allowed(folder):
    edit(folder, "box", None)
    assert read_manifest(folder)[0].box is None
    edit(folder, "coordinates", "model")
    assert read_manifest(folder)[0].coordinates == "model"


@pytest.mark.parametrize("text", ["[{x0}, {y0}, {x1}, {y1}]", "<box>{x0},{y0},{x1},\n{y1}</box>"])
@pytest.mark.parametrize("decimals", [1, 4])
def test_a_box_is_written_as_it_is_read(folder, manifest, text, decimals):
    edit(folder, "box", {"text": text, "decimals": decimals})
    box = read_manifest(folder)[0].box
    assert box == BoxFormat(text, decimals)
    region = find_region(box.write(0.1, 0.2, 0.5, 1), "original", 1000, 1000, manifest.image)
    assert region.box.corners == (100, 200, 500, 1000)


def test_no_bos_is_allowed(folder):
    edit(folder, "tokens.bos", None)
    assert read_manifest(folder)[0].tokens.bos is None


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json"])
def test_a_file_that_is_missing_short_or_not_listed(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    assert f"{name} has {len(data) - 1} bytes, expected {len(data)}" in refused(folder)
    (folder / name).unlink()
    assert f"{name} is missing" in refused(folder)
    raw = json.loads((folder / "manifest.json").read_text())
    del raw["files"][name]
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert f"lists no {name}" in refused(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b"])
def test_files_outside_the_folder_are_not_looked_at(folder, name):
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"][name] = {"size": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert f"lists {name!r}" in refused(folder)


def test_verify_reads_every_byte(folder, manifest):
    data = bytearray((folder / "decoder.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "decoder.onnx").write_bytes(data)
    read_manifest(folder)  # the size is right
    with pytest.raises(BundleError, match=r"decoder.onnx has SHA-256 \w{64}, expected \w{64}"):
        verify(folder, manifest)


@pytest.fixture
def whole(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that opens, for a test to break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def replace(folder: Path, name: str, data: bytes) -> None:
    """Other contents that the manifest vouches for."""
    (folder / name).write_bytes(data)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(raw))


def array_file(array: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive_file(array: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


def test_what_opens(whole):
    bundle = Bundle.open(whole, threads=1)
    spec = bundle.manifest.decoder
    assert bundle.embeddings.table.shape == (spec.vocabulary, spec.hidden)
    assert isinstance(bundle.embeddings.table, np.memmap)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("vision.onnx", b"no graph", "cannot be opened by ONNX Runtime"),
        ("decoder.onnx", b"no graph", "cannot be opened by ONNX Runtime"),
        ("tokenizer.json", b"{}", "is not a tokenizer"),
        ("embeddings.npy", b"no array", "is not an array"),
        ("embeddings.npy", b"", "is not an array"),
        ("embeddings.npy", archive_file(np.zeros(3)), "is not an array"),
        (
            "embeddings.npy",
            array_file(np.zeros((3, 2), np.float32)),
            "(3, 2), expected float32 or float16 (",
        ),
        ("embeddings.npy", array_file(np.zeros(3, object)), "is not an array"),
    ],
)
def test_a_foreign_file(whole, name, data, said):
    replace(whole, name, data)
    assert said in refused(whole)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("image.size", 64, "input pixel_values has shape"),
        ("image.tokens", 15, "output image_features has shape"),
        ("decoder.kv_heads", 1, "input past_key_values.0.key has shape"),
        ("decoder.layers", 3, "no input past_key_values.2.key"),
        ("decoder.layers", 1, "has an input past_key_values.1."),
        ("decoder.ragged_append", False, "has an input query_seqlens"),
        ("decoder.vocabulary", 100, "the decoder knows 100 tokens"),
    ],
)
def test_a_manifest_of_other_graphs(whole, field, value, said):
    edit(whole, field, value)
    assert said in refused(whole)
