"""Bundles: a manifest says the same there and back, and every damage is one sentence."""

from __future__ import annotations

import copy
import hashlib
import json
import os
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
    assert "is not a folder: give the folder of a bundle" in refused(tmp_path / "none")


def test_a_name_too_long_for_the_file_system(tmp_path):
    assert "not a folder" in refused(tmp_path / ("x" * 300))


def test_a_folder_without_manifest(tmp_path):
    assert "is a folder without manifest.json, so it is not a bundle" in refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[]", "null", "3", pytest.param("[" * 100_000, id="deep")])
def test_a_manifest_that_is_none(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert "manifest.json" in refused(folder)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None])
def test_another_version(folder, version):
    edit(folder, "format_version", version)
    sentence = refused(folder)
    assert f"bundle format {version!r}, expected {FORMAT_VERSION}: " in sentence
    newer = version == FORMAT_VERSION + 1
    assert sentence.endswith("update dualfocus" if newer else "export it again with `dualfocus export …`")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("decoder", ..., "object missing required field `decoder`"),
        ("decoder.layers", ..., "decoder: object missing required field `layers`"),
        ("decoder.layers", "2", "decoder.layers: expected `int`, got `str`"),
        ("decoder.layers", True, "decoder.layers: expected `int`, got `bool`"),
        ("decoder.colour", 1, "manifest.json: unknown field 'decoder.colour'"),
        (
            "decoder.dtype",
            "int4",
            "decoder.dtype: invalid enum value 'int4', expected one of float16, float32",
        ),
        ("decoder.ragged_append", 1, "decoder.ragged_append: expected `bool`, got `int`"),
        ("image.mean", [0.5, 0.5], "image.mean: expected `array` of length 3"),
        ("image.mean", [0.5, "a", 0.5], "image.mean[1]: expected `float`, got `str`"),
        ("image.fit", "squash", "expected one of crop, pad, stretch"),
        ("tokens.eos", 2, "tokens.eos: expected `array`, got `int`"),
        ("coordinates", "model", "expected null where coordinates is 'model'"),
        ("box", ..., "object missing required field `box`"),
        ("box", "[]", "box: expected `object | null`, got `str`"),
        (
            "box.text",
            "[{x0}, {y0}, {x1}]",
            "box.text is '[{x0}, {y0}, {x1}]', expected {x0}, {y0}, {x1}, {y1} once",
        ),
        ("box.text", "[{x0}, {y0}, {x1}, {y1}] {x0}", "expected {x0}, {y0}, {x1}, {y1} once each"),
        ("box.text", "[{y0}, {x0}, {y1}, {x1}]", "once each in this order"),
        ("box.text", "[{x0} {y0} {x1} {y1}]", "with commas between"),
        ("box.text", "1 [{x0}, {y0}, {x1}, {y1}]", "no digits around"),
        ("box.text", "[{x0}, {y0}, {x1}, {y1}] ", "no digits around"),
        ("box.text", "{[{x0}, {y0}, {x1}, {y1}]", "box.text is '{["),
        ("box.decimals", 0, "box.decimals: expected `int` >= 1"),
        ("box.decimals", 5, "box.decimals: expected `int` <= 4"),
        (
            "coordinates",
            "polar",
            "coordinates: invalid enum value 'polar', expected one of model, original, padded",
        ),
        ("prompts", "hello", "prompts: expected `object`, got `str`"),
        ("prompts.user", "USER:", "prompts.user does not hold '{turn}' exactly once"),
        ("prompts.reply", "", "prompts.reply does not hold '{answer}'"),
        ("prompts.micro", "<image><image>{T}", "prompts.micro does not hold '<image>' exactly once"),
        ("prompts.image", "", "exactly once"),
        ("prompts.user", "{turn}<image>", "prompts.user holds '<image>'"),
        ("prompts.reply", "{answer}", "prompts.reply ends with '{answer}'"),
        ("prompts.system", "x" * 30_000, "prompts.system: expected `str` of length <= 20000"),
        ("prompts.hint", "\ud800", "manifest.json is not JSON"),
        ("image.size", -5, "image.size: expected `int` >= 1"),
        ("image.tokens", 10**12, "image.tokens: expected `int` <= 16777216"),
        ("image.tokens", 1.5, "image.tokens: expected `int`, got `float`"),
        ("image.mean", [0.5, float("nan"), 0.5], "manifest.json is not JSON"),
        ("image.mean", [0.5, 0.5, 10**400], "out of range"),
        ("image.mean", [2, 0.5, 0.5], "image.mean[0]: expected `float` <= 1.0"),
        ("image.std", [0.5, 0.5, 0], "image.std[2]: expected `float` >= 0.001"),
        ("image.std", [float("inf"), 0.5, 0.5], "manifest.json is not JSON"),
        ("decoder.layers", 10**9, "decoder.layers: expected `int` <= 1024"),
        ("decoder.context", 0, "decoder.context: expected `int` >= 1"),
        ("max_new_tokens", 0, "max_new_tokens: expected `int` >= 1"),
        ("tokens.eos", [], "tokens.eos: expected `array` of length >= 1"),
        ("tokens.eos", [2, -1], "tokens.eos[1]: expected `int` >= 0"),
        ("tokens.eos", [2, 300], "tokens.eos.1 is 300, expected a token from 0 to "),
        ("tokens.bos", -1, "tokens.bos: expected `int` >= 0"),
        ("tokens.bos", 10**6, "tokens.bos is 1000000, expected a token from 0 to "),
        ("source", {"a": {"b": [[]]}}, "source[...]: expected `str`, got `object`"),
        ("x" * 5000, 1, "manifest.json: unknown field 'xxx"),
        ("files", [], "files: expected `object`, got `array`"),
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


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "a\0b", "\n"])
def test_files_outside_the_folder_are_not_looked_at(folder, name):
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"][name] = {"size": 1, "sha256": "0" * 64}
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
        ("vision.onnx", b"no graph", "is not an ONNX graph"),
        ("decoder.onnx", b"no graph", "is not an ONNX graph"),
        ("vision.onnx", b"", "has no input pixel_values"),
        ("tokenizer.json", b"{}", "model: object missing required field `type`"),
        ("tokenizer.json", b"[]", "expected `object`, got `array`"),
        ("embeddings.npy", b"no array", "is not an array"),
        ("embeddings.npy", b"", "is not an array"),
        ("embeddings.npy", archive_file(np.zeros(3)), "is not an array"),
        (
            "embeddings.npy",
            array_file(np.zeros((3, 2), np.float32)),
            "is float32 of shape (3, 2), expected (",
        ),
        ("embeddings.npy", array_file(np.zeros((3, 2), np.float64)), "is not an array"),
        ("embeddings.npy", array_file(np.zeros((3, 2), ">f4")), "is not an array"),
        ("embeddings.npy", array_file(np.zeros((3, 2), np.float32, order="F")), "is not an array"),
        ("embeddings.npy", array_file(np.zeros(3, object)), "is not an array"),
    ],
)
def test_a_foreign_file(whole, name, data, said):
    replace(whole, name, data)
    assert said in refused(whole)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (
            "image.size",
            64,
            "input pixel_values is float32 (any, 3, 56, 56), expected float32 (any, 3, 64, 64)",
        ),
        (
            "image.tokens",
            15,
            "features of 16 x 64, expected 15 x 64",
        ),
        ("decoder.kv_heads", 1, "input past_key_values.0.key is float32 (any, 2, any, 16), expected "),
        ("decoder.dtype", "float16", "input past_key_values.0.key is float32 (any, 2, any, 16), expected "),
        ("decoder.layers", 3, "no input past_key_values.2.key"),
        ("decoder.layers", 1, "has an input 'past_key_values.1."),
        ("decoder.ragged_append", False, "has an input 'query_seqlens'"),
        ("decoder.vocabulary", 420, "embeddings.npy is float32 of shape (419, 64), expected (420, 64)"),
    ],
)
def test_a_manifest_of_other_graphs(whole, field, value, said):
    edit(whole, field, value)
    assert said in refused(whole)


# ---- what is no bundle


PICTURE = bytes.fromhex("89504e470d0a1a0a0000000d49484452")


def write(place: Path, files: dict[str, bytes]) -> Path:
    place.mkdir()
    for name, data in files.items():
        (place / name).write_bytes(data)
    return place


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "the path given is empty: give the folder of a bundle"),
        (
            "https://example.com/a/b",
            "https://example.com/a/b is a URL: download the bundle, and give its folder",
        ),
        ("hf://a/b", "hf://a/b is a URL: download"),
        ("data:image/png;base64," + "A" * 10_000, "is a data: URL: give the folder of a bundle"),
        ("liuhaotian/llava-v1.5-7b", "exported first, `dualfocus export liuhaotian/llava-v1.5-7b -o BUNDLE`"),
        ("a" * 5000, "is not a folder"),
        ("a\0b", "is not a folder"),
        ("/dev/null", "is not a folder"),
    ],
)
def test_what_is_given_is_named(given: str, sentence: str) -> None:
    for path in (given, Path(given)) if given else (given,):
        with pytest.raises(BundleError) as caught:
            Bundle.open(path)
        assert sentence in str(caught.value)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"config.json": b"{}"}, "is a checkpoint: export it first, `dualfocus export {} -o BUNDLE`"),
        ({"config.json": b"["}, "is a checkpoint: export it first"),
        (
            {"config.json": b'{"quantization_config": {"quant_method": "awq"}}'},
            "is a checkpoint of quantised (awq) weights: export the checkpoint that it was made from",
        ),
        ({"config.json": b'{"quantization": {"bits": 4}}'}, "is a checkpoint of quantised (MLX) weights"),
        ({"adapter_config.json": b"{}", "config.json": b"{}"}, "is a LoRA adapter: merge it into its base"),
        ({"params.json": b"{}"}, "is a checkpoint in Mistral's own form"),
        ({"a.gguf": b"GGUF"}, "is a folder of GGUF files, of llama.cpp: export the checkpoint that"),
        ({"genai_config.json": b"{}"}, "is a model of ONNX Runtime GenAI"),
        ({"decoder.onnx": b""}, "is a bundle without its manifest.json: copy or export it again"),
        ({}, "is a folder without manifest.json, so it is not a bundle: give the folder of a bundle"),
    ],
)
def test_a_folder_of_another_kind_is_named(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    place = write(tmp_path / "given", files)
    assert sentence.format(place) in refused(place)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("model.gguf", b"GGUF\3\0\0\0", "is a GGUF file, of llama.cpp: export the checkpoint that"),
        ("photo.jpg", b"\xff\xd8\xff\xe0", "is a picture: give it as PICTURE"),
        ("photo", PICTURE, "is a picture"),
        ("photo.heic", b"\0\0\0\x18ftypheic", "is a picture"),
        ("model.safetensors", b"", "is a file of weights: export the folder that it is in"),
        ("decoder.onnx", b"", "is one graph: give the folder of a bundle"),
        ("bundle.zip", b"PK\3\4", "is an archive: unpack it"),
        ("bundle.tar", b"", "is an archive"),
        ("notes.txt", b"", "is a file: give the folder of a bundle"),
    ],
)
def test_a_file_is_named(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert sentence in refused(tmp_path / name)


def test_an_interrupted_export_is_named(tmp_path: Path) -> None:
    place = write(tmp_path / ".out.partial", {"decoder.onnx": b"", "config.json": b"{}"})
    assert "is an interrupted export: continue it, `dualfocus export … --resume`" in refused(place)


# ---- links and devices


@pytest.mark.parametrize("name", ["manifest.json", "decoder.onnx", "embeddings.npy", "tokenizer.json"])
def test_what_is_no_file_of_the_folder_is_not_opened(
    folder: Path, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    (folder / name).rename(secret)
    for target in (secret, Path("/dev/zero"), Path("/proc/self/environ"), Path("/dev/stdin")):
        (folder / name).symlink_to(target)
        sentence = refused(folder)
        assert f"{name} is a link to a file elsewhere, expected the file itself" in sentence
        assert str(target) not in sentence
        (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is not a regular file" in refused(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{name} is " in refused(folder)


def test_a_snapshot_of_the_hubs_cache_opens(tiny_bundle: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(tiny_bundle.iterdir())):
        shutil.copy(file, blobs / f"{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert Bundle.open(snapshot, threads=1).manifest == read_manifest(tiny_bundle)[0]
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(tiny_bundle / "tokenizer.json")
    assert "tokenizer.json is a link to a file elsewhere" in refused(snapshot)


def test_links_within_the_folder_and_to_it_are_followed(folder: Path, manifest: Manifest) -> None:
    (folder / "decoder.onnx").rename(folder / "renamed")
    (folder / "decoder.onnx").symlink_to("renamed")
    link = folder.parent / f"{folder.name} link"
    link.symlink_to(folder)
    assert read_manifest(link)[0] == manifest
