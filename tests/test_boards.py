"""`inspect SHAPE --budget`: what is computed, held to what exports store and to what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
import tiny
from onnx.external_data_helper import load_external_data_for_model
from typer.testing import CliRunner, Result

from dualfocus import cli
from dualfocus.bench import boards, harness, readme
from dualfocus.export import SHAPES, export_bundle
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.manifest import Precision

DEPLOY = Path(__file__).parent.parent / "deploy/jetson/README.md"
# blocks of 32 to 128 inputs come out whole; layers enough for int4 to treat some otherwise than others
SHAPE = tiny.Shape(name="whole", layers=8, hidden=128, mlp=256, vocabulary=1024, tower_layers=4)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_weights_are_those_that_an_export_stores(precision: Precision, tmp_path: Path) -> None:
    export_bundle(SHAPE, tmp_path / "bundle", precision=precision, progress=lambda _: None)
    for name, computed in (("decoder", boards.decoder_nbytes), ("vision", boards.tower_nbytes)):
        model = onnx.load(str(tmp_path / f"bundle/{name}.onnx"), load_external_data=False)
        load_external_data_for_model(model, str(tmp_path / "bundle"))
        stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
        # beyond the matrices there are scalars, shapes and zero points of one byte
        assert stored == pytest.approx(computed(SHAPE, precision, "CPU"), rel=0.02), name
    manifest, _ = read_manifest(tmp_path / "bundle")
    cache = KVCache(manifest.decoder, boards.ROWS, manifest.decoder.context)
    assert boards.budget(SHAPE, precision, "CPU")["KV cache"] == cache.nbytes


def test_the_bundle_of_7_b_is_as_large_as_computed() -> None:
    result = json.loads(readme.newest("export-llava-7b-huggingface-int4").read_text())
    shape = SHAPES["llava-7b"]
    weights = boards.decoder_nbytes(shape, "int4", "CPU") + boards.tower_nbytes(shape, "int4", "CPU")
    embeddings = boards.budget(shape, "int4", "CPU")["embeddings"]
    assert weights + embeddings == pytest.approx(result["bundle_bytes"], rel=0.001)


def test_all_of_7_b_on_a_cpu_is_as_much_as_was_measured() -> None:
    """When a question still touched the whole cache. Embeddings are mapped, so they are no private memory."""
    result = json.loads((harness.RESULTS / "2026-11-23-export-llava-7b-original-int4.json").read_text())
    parts = boards.budget(SHAPES["llava-7b"], "int4", "CPU")
    private = parts["in all"] - parts["embeddings"] - boards.SYSTEM
    assert private == pytest.approx(result["starts"]["first start"]["rss_anon"], rel=0.05)


def test_a_gpu_has_two_bytes_for_all_but_blocks() -> None:
    shape = SHAPES["llava-7b"]
    fp16, int4 = (boards.budget(shape, precision, "GPU") for precision in ("fp16", "int4"))
    parameters = boards.decoder_nbytes(shape, "fp32", "CPU") + boards.tower_nbytes(shape, "fp32", "CPU")
    assert fp16["weights"] == parameters // 2
    assert fp16["KV cache"] * 2 == boards.budget(shape, "fp32", "CPU")["KV cache"]
    assert int4["weights"] < 0.45 * fp16["weights"]
    assert int4["in all"] == sum(size for part, size in int4.items() if part != "in all")


def test_every_layer_counts_and_those_that_never_run_do_not() -> None:
    one = dataclasses.replace(SHAPE, feature_layer=-1)
    assert boards.tower_nbytes(one, "fp32", "CPU") > boards.tower_nbytes(SHAPE, "fp32", "CPU")
    assert boards.tower_nbytes(dataclasses.replace(SHAPE, feature_layer=3), "fp32", "CPU") == (
        boards.tower_nbytes(SHAPE, "fp32", "CPU")
    )


def test_workspace_is_above_what_was_measured() -> None:
    """`inspect --budget` of edge bundles: 54 to 79 MB of activations in all precisions."""
    assert 79e6 < boards.workspace(SHAPES["edge"], "fp32", "CPU") < 2 * 79e6


def inspect(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["inspect", *arguments])


def test_the_command_line_shows_them() -> None:
    shown = inspect("llava-7b", "--budget")
    assert shown.exit_code == 0, shown.stderr
    assert [line.split("  ")[0] for line in shown.stdout.splitlines()[1:-1]] == [
        f"{precision}, {device}" for precision, device in boards.RECIPES
    ]
    told = json.loads(inspect("llava-7b", "--budget", "--json").stdout)
    assert told == boards.report(SHAPES["llava-7b"])
    left = told["budgets"][0]["left"]
    assert left["Orin Nano 8 GB"] < 0 < left["AGX Orin 32 GB"]
    for arguments in (["llava-7b"], ["llava-7b", "--budget", "--verify"]):
        refused = inspect(*arguments)
        assert refused.exit_code == 2
        assert "is a shape" in refused.stderr
        assert refused.stdout == ""


def test_a_folder_goes_before_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edge").mkdir()
    assert "is a shape" not in inspect("edge").stderr


def test_the_deployments_table_is_what_is_computed() -> None:
    text = DEPLOY.read_text(encoding="utf-8")
    _, table = text.split("<!-- python -m dualfocus.bench.boards -->\n\n")
    assert table.startswith(f"{boards.markdown()}\n<!-- /boards -->")
