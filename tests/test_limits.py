"""Limits: what a model has to do, by what its graphs do as they run. No rate of this machine is expected."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

from dualfocus import cli, kernels
from dualfocus.bench import limits
from dualfocus.bench.limits import Node, Work
from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle

ROWS = [
    "vision, one image",
    "vision, two images",
    "prefill, 640 tokens",
    "decode, one row",
    "decode, two rows",
]


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits") / "bundle"
    export_bundle(tiny.Shape(name="small", vocabulary=2000), folder, progress=lambda _: None)
    return folder


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates need not be this machine's best."""
    for name, value in (("STREAM", 1 << 20), ("CACHES", 0), ("TRIES", 2), ("PRODUCT_SIZES", ((64, 32, 16),))):
        monkeypatch.setattr(limits, name, value)


def matrices(shape: tiny.Shape) -> int:
    """Weights of all layers' matrices, without the head."""
    width = shape.heads * shape.head_size
    attention = shape.hidden * (width + 2 * shape.kv_heads * shape.head_size) + width * shape.hidden
    return shape.layers * (attention + 3 * shape.hidden * shape.mlp)


def test_a_decode_step_reads_every_weight_once(fp32: Path) -> None:
    shape = tiny.Shape(name="small", vocabulary=2000)
    engines = limits.Engines(Bundle.open(fp32, threads=1))
    head = shape.hidden * shape.vocabulary
    norms = 4 * (2 * shape.layers + 1) * shape.hidden
    for name, rows in (("decode, one row", 1), ("decode, two rows", 2)):
        work = limits.count(engines.path(name), partial(engines.once, name))
        assert work.multiply_adds == rows * (matrices(shape) + head)
        assert work.weights == pytest.approx(4 * (matrices(shape) + head) + norms, rel=1e-3)
    row = engines.limit("decode, two rows", work, {"bandwidth": 1e6, "arithmetic": 1.0}, 1.0)
    past = 2 * (engines.past + 1) * 2 * shape.layers * shape.kv_heads * shape.head_size * 4
    assert row["bytes"] == work.weights + past
    assert row["limit"] == pytest.approx((work.weights + past) / 1e3)


def test_prefill_multiplies_every_token(fp32: Path) -> None:
    shape = tiny.Shape(name="small", vocabulary=2000)
    engines = limits.Engines(Bundle.open(fp32, threads=1))
    name = "prefill, 640 tokens"
    work = limits.count(engines.path(name), partial(engines.once, name))
    last = shape.hidden * (shape.heads * shape.head_size + 3 * shape.mlp)  # of one layer, for logits alone
    most = 640 * matrices(shape) + shape.hidden * shape.vocabulary
    assert most - 640 * last < work.multiply_adds <= most
    row = engines.limit(name, work, {"bandwidth": 1.0, "arithmetic": 1e6}, 1.0)
    causal = 2 * shape.layers * shape.heads * shape.head_size * (640 * 641 // 2)
    assert row["operations"] == 2 * (work.multiply_adds + causal)


def test_attention_looks_back_only() -> None:
    spec = Bundle.open(threads=1).manifest.decoder
    one = limits.causal(spec, 10, 1)
    assert one == 2 * spec.layers * spec.heads * spec.head_size * 11
    assert limits.causal(spec, 10, 3) == one * (11 + 12 + 13) // 11


def test_nodes_multiply_what_their_shapes_say() -> None:
    counted = {
        Node("MatMul", ((1, 5, 8),), ((1, 5, 3),), 96): 5 * 8 * 3,
        Node("FusedMatMul", ((2, 5, 8), (2, 8, 5)), ((2, 5, 5),), 0): 2 * 5 * 8 * 5,
        Node("MatMulNBits", ((1, 5, 64), (3, 2, 16), (3, 2)), ((1, 5, 3),), 120): 5 * 64 * 3,
        Node("Conv", ((1, 3, 8, 8), (4, 3, 2, 2)), ((1, 4, 4, 4),), 192): 64 * 3 * 4,
        Node("MultiHeadAttention", ((1, 5, 8), (1, 7, 8), (1, 7, 8)), ((1, 5, 8),), 0): 2 * 5 * 7 * 8,
        Node("MultiHeadAttention", ((1, 5, 8), (1, 2, 7, 4), (1, 2, 7, 4)), ((1, 5, 8),), 0): 2 * 5 * 7 * 8,
        Node("Softmax", ((1, 5, 5),), ((1, 5, 5),), 0): 0,
        Node("GroupQueryAttention", ((1, 1, 8),), ((1, 1, 8),), 4096): 0,
    }
    for node, multiply_adds in counted.items():
        assert node.multiply_adds == multiply_adds, node
    work = Work.of(list(counted))
    assert work == Work(sum(counted.values()), 96 + 120 + 192)  # the table is not read as a whole


def test_memory_is_read_and_every_word_of_it_counts() -> None:
    words = np.random.default_rng(3).integers(0, 1 << 63, 12345, dtype=np.uint64)
    assert kernels.stream_sum(words) == int(words.sum())
    assert kernels.stream_sum(words[:0]) == 0
    assert limits.bandwidth(1) > 0
    assert limits.bandwidth(3) > 0
    for wrong in (words.view(np.uint8)[1:9], words.view(np.uint8)[:9]):
        with pytest.raises(ValueError, match="aligned to 8 bytes, and whole"):
            kernels.stream_sum(wrong)
    with pytest.raises((BufferError, ValueError)):
        kernels.stream_sum(words[::2])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_limits(precision: str, fp32: Path, tmp_path: Path) -> None:
    bundle = fp32
    if precision == "int8":
        bundle = tmp_path / "bundle"
        shape = tiny.Shape(name="small", vocabulary=2000)
        export_bundle(shape, bundle, precision="int8", progress=lambda _: None)
    plot = tmp_path / "bars.png"
    command = [
        "bench",
        "limits",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--bundle",
        str(bundle),
        "--plot",
        str(plot),
    ]
    done = CliRunner().invoke(cli.app, [*command, "--json"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    result = json.loads(done.stdout)
    assert (result["bench"], result["bundle"], result["precision"]) == ("limits", "small", precision)
    assert list(result["rows"]) == ROWS
    assert result["rates"].keys() == {"bandwidth, one thread", "bandwidth", "arithmetic"}
    assert (result["bits_a_weight"] < 12) == (precision == "int8")
    for name, row in result["rows"].items():
        assert row["bound"] == ("bandwidth" if name.startswith("decode") else "arithmetic")
        assert row["percent_of_limit"]["value"] == pytest.approx(100 * row["limit"] / row["median"])
        wanted = ">= 60" if (name, precision) == ("decode, one row", "int8") else None
        assert row["percent_of_limit"]["wanted"] == wanted
    one, two = (result["rows"][name] for name in ROWS[:2])
    assert one["operations"] == two["operations"] / 2
    assert 0 < result["python_percent"]["value"] < 100
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(cli.app, command)
    assert shown.exit_code == 0, (shown.stderr, shown.exception)
    for row in ROWS:
        assert shown.stdout.count(f"\n{row} ") == 1
        assert f"| {row} | " in limits.markdown(result)
    assert ("fewer bits" in shown.stdout) == (precision == "int8")
