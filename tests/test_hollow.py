"""A bundle's skeleton: that it is the bundle's, and that a bundle made of it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny

from dualfocus.bench import hollow
from dualfocus.export import export_bundle, quantize
from dualfocus.runtime import Bundle, DualFocus, Reference
from dualfocus.runtime.bundle import read_manifest, verify
from dualfocus.runtime.manifest import Precision

SHAPE = tiny.Shape(name="small", vocabulary=2000)
WHOLE = 5000  # so that most matrices are drawn


@pytest.fixture(scope="module", params=["fp16", "int4"])
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture(scope="module")
def skeleton(precision: Precision, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(precision) / "skeleton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hollow, "WHOLE", WHOLE)
        hollow.make(SHAPE, precision, folder)
    return folder


@pytest.fixture(scope="module")
def filled(skeleton: Path) -> Path:
    hollow.fill(skeleton, skeleton.with_name("filled"))
    return skeleton.with_name("filled")


def structure(path: Path) -> list[Any]:
    """Everything of a graph but the numbers that lie in it."""
    graph = onnx.load(path, load_external_data=False).graph
    for tensor in graph.initializer:
        tensor.ClearField("raw_data")
    return [message.SerializeToString() for message in (*graph.node, *graph.initializer, *graph.input)]


def test_graphs_and_files_are_those_of_an_export(precision: Precision, filled: Path, tmp_path: Path) -> None:
    export_bundle(SHAPE, tmp_path / "b", precision=precision, target="cuda", progress=lambda _: None)
    exported, _ = read_manifest(tmp_path / "b")
    made, _ = read_manifest(filled)
    for name in ("decoder.onnx", "vision.onnx"):
        assert structure(filled / name) == structure(tmp_path / "b" / name)
    sizes = [{name: entry.size for name, entry in of.files.items()} for of in (made, exported)]
    assert sizes[0] == sizes[1]
    told = [of.to_dict() | {"files": None} for of in (made, exported)]
    assert told[0] == told[1]
    verify(filled, made)


def test_large_tensors_are_drawn_as_they_were_distributed(skeleton: Path, filled: Path) -> None:
    table = np.load(filled / "embeddings.npy")
    assert table.shape == (SHAPE.vocabulary, SHAPE.hidden)
    assert len(np.unique(table)) <= hollow.NUMBERS
    assert 1.5 < table.std() * SHAPE.hidden**0.5 < 2.5
    for row in (table[0], table[-1]):
        assert len(np.unique(row)) > SHAPE.hidden / 3
    with np.load(skeleton / hollow.WEIGHTS) as kept:
        whole = [key for key in kept.files if kept[key].nbytes == int(key.split("@")[2])]
        for key in whole:
            name, start, nbytes = key.split("@")
            found = (filled / name).read_bytes()[int(start) : int(start) + int(nbytes)]
            assert found == kept[key].tobytes()
        assert 0 < len(whole) < len(kept.files)
    assert hollow.size(skeleton) == pytest.approx(
        sum(
            (filled / name).stat().st_size
            for name in ("embeddings.npy", "decoder.onnx.data", "vision.onnx.data")
        ),
        rel=0.1,
    )
    packed = sum(path.stat().st_size for path in skeleton.rglob("*") if path.is_file())
    assert packed < 300_000


def test_a_filled_bundle_answers_and_one_seed_gives_one(
    filled: Path, skeleton: Path, tmp_path: Path, picture: np.ndarray
) -> None:
    bundle = Bundle.open(filled, device="cpu", threads=1)
    result = DualFocus(bundle, free_box=True).ask(picture, "What is written on the red star?")
    assert result.macro is not None
    assert np.isfinite(result.macro.generation.logprobs).all()
    plain = Reference(bundle).ask(picture, "What is written on the red star?", "macro")
    assert plain.macro is not None
    assert plain.macro.generation.tokens == result.macro.generation.tokens
    again = hollow.fill(skeleton, tmp_path / "again")
    other = hollow.fill(skeleton, tmp_path / "other", seed=10**6)
    assert again.files == read_manifest(filled)[0].files
    assert other.files["decoder.onnx.data"] != again.files["decoder.onnx.data"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_over_and_over_is_searched_once(bits: int) -> None:
    row = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    repeated = np.broadcast_to(row, (70, 96))
    seen = []

    def search(rows: np.ndarray) -> tuple[Any, ...]:
        seen.append(len(rows))
        return quantize._search(rows, bits, 32)

    found = quantize._in_chunks(repeated, search)
    assert seen == [1]
    for ours, expected in zip(found, quantize._search(np.array(repeated), bits, 32), strict=True):
        np.testing.assert_array_equal(ours, expected)
