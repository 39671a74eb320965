"""The benchmark against other runtimes: that all do the same work, what is counted, and what becomes of those
that cannot. No peer but transformers is needed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from dualfocus import cli
from dualfocus.bench import harness, peers
from dualfocus.bench.peers import quality
from dualfocus.bench.peers.base import PARTS, PAST, PREFILL, STEPS, Slot, Work
from dualfocus.bench.peers.process import OpenedPeer, PeerError
from dualfocus.bench.peers.work import make, script
from dualfocus.runtime import Bundle, Reference
from dualfocus.runtime.bundle import BUILT_IN
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.sequence import embed

SMALL = tiny.Shape(name="small", vocabulary=2000)

# Does what it is asked, until it raises, and then dies.
FRAGILE = """
import os, signal
from dualfocus.bench.peers.base import Counts, Opened
REQUIRES = ("numpy",)
def prepare(checkpoint, folder): (folder / "weights").write_text(type(checkpoint).__name__)
def fail(): raise ValueError("no such kernel\\nand more")
def die(): os.kill(os.getpid(), signal.SIGKILL)
def count(): print("noise"); return Counts(vision_encodes=7, source="its own")
def opened(work):
    assert (work.folder / "fragile" / "weights").read_text() == "Checkpoint"
    return Opened("f32", {"vision": count, "prefill": fail, "decode": die, "question as shipped": count},
                  cannot={"decode, two rows": "one row only"})
def broken(work): raise RuntimeError("cannot be opened")
PRECISIONS = {"fp32": opened, "bf16": broken}
"""
DIES = """
import os
REQUIRES = ("numpy",)
PRECISIONS = {"fp32": None}
def prepare(checkpoint, folder): os._exit(3)
"""
ABSENT = 'REQUIRES = ("no-such-package-is-installed",)'

# Our own engines, but that the decoder leans to one token, and what is seen is a hundredth too bright.
LEANING = """
from dualfocus.bench.peers.base import Engines
from dualfocus.runtime import Bundle
class Decoder:
    def __init__(self, decoder): self.decoder = decoder
    def extend(self, *args):
        results = self.decoder.extend(*args)
        for logits in results: logits[:, 7] += 30
        return results
class Vision:
    def __init__(self, vision): self.vision = vision
    def encode(self, pixels): return 1.01 * self.vision.encode(pixels)
def engines(work):
    bundle = Bundle.open(work.folder / "ours" / "fp32", threads=1)
    return Engines(Decoder(bundle.decoder), Vision(bundle.vision))
ENGINES = {"int8": engines}
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Made-up peers, where processes that are started find them too."""
    folder = tmp_path_factory.mktemp("modules")
    sources = {"fragile": FRAGILE, "dies": DIES, "absent": ABSENT, "leaning": LEANING}
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def result(modules: None, folder: Path) -> dict[str, Any]:
    """What `run` says of peers that are there, that fail in every way, and that are not there; in float32."""
    known = {name: peers.PEERS[name] for name in (peers.OURS, peers.TRANSFORMERS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PEERS", known | {name: name for name in ("fragile", "dies", "absent")})
        found = peers.run(SMALL, folder, 2, 1, ("fp32",))
    again: dict[str, Any] = json.loads(json.dumps(found))
    assert again == found
    return again


@pytest.fixture
def work(result: object, folder: Path) -> Work:
    return make(folder / "ours" / "fp32", folder, 1)


def row_of(result: dict[str, Any], peer: str) -> dict[str, Any]:
    (row,) = (row for row in result["rows"] if row["peer"] == peer)
    return row  # type: ignore[no-any-return]


def test_the_result_is_a_schema(result: dict[str, Any]) -> None:
    assert (result["schema"], result["bench"], result["bundle"]) == (harness.SCHEMA, "peers", "small")
    assert result["machine"]["threads"] == 1
    assert result["rounds"] == 2
    assert result["quality"] is None  # of random weights
    assert [(row["peer"], row["precision"]) for row in result["rows"]] == [
        (peer, "fp32") for peer in (peers.OURS, peers.TRANSFORMERS, "fragile")
    ]
    for row in result["rows"]:
        assert tuple(row["parts"]) == PARTS
        for part, entry in row["parts"].items():
            if "cannot" not in entry:
                timed = {"median", "low", "high", "counts", "ratio"}
                assert timed <= entry.keys()
                assert ("tokens_per_s" in entry) == (part in peers.TOKENS)
                assert entry["low"] <= entry["median"] <= entry["high"]
    assert {"torch", "transformers"} <= result["peers"][peers.TRANSFORMERS]["versions"].keys()


def test_all_do_the_same_work(result: dict[str, Any]) -> None:
    for peer in (peers.OURS, peers.TRANSFORMERS):
        parts = row_of(result, peer)["parts"]
        counts = {part: entry["counts"] for part, entry in parts.items() if "counts" in entry}
        assert counts["vision"]["vision_encodes"] == 1
        assert counts["prefill"]["tokens_prefilled"] == PREFILL
        for part in ("decode", "decode, two rows"):
            assert counts[part]["decode_steps"] == STEPS
            assert counts[part]["tokens_prefilled"] == 0  # what comes before them is not counted, nor timed
        assert parts["question with reuse"].keys() == {"cannot"}


def test_the_plain_protocol_encodes_eight_images_and_ours_two(result: dict[str, Any], work: Work) -> None:
    plain, ours = (
        row_of(result, peer)["parts"]["question as shipped"]["counts"]
        for peer in (peers.TRANSFORMERS, peers.OURS)
    )
    assert (plain["vision_encodes"], ours["vision_encodes"]) == (8, 2)
    fed = sum(len(call.prompt) + (len(call.reply) if call.scored else 0) for call in work.calls)
    assert plain["tokens_prefilled"] == fed
    assert ours["tokens_prefilled"] < fed / 2
    assert plain["decode_steps"] == sum(len(call.reply) - 1 for call in work.calls if not call.scored)
    assert ours["decode_steps"] < plain["decode_steps"]


def test_what_a_peer_cannot_do_has_a_reason(result: dict[str, Any]) -> None:
    parts = row_of(result, "fragile")["parts"]
    assert parts["vision"]["counts"]["source"] == "its own"
    assert parts["prefill"] == {"cannot": "ValueError: no such kernel"}
    assert parts["decode"]["cannot"].startswith("its process was ended by SIGKILL")
    assert parts["decode, two rows"] == {"cannot": "one row only"}
    assert parts["question as shipped"] == parts["decode"]  # it is dead
    assert result["peers"]["dies"]["cannot"] == "its process ended with status 3"
    assert result["peers"]["absent"]["cannot"] == "not installed: pip install 'dualfocus[peers]'"


def test_what_cannot_be_opened_has_a_reason(modules: None, work: Work, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="RuntimeError: cannot be opened"):
        OpenedPeer("fragile", "bf16", work, tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_folder_is_one_models(result: object, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another model"):
        peers.run(tiny.Shape(name="other"), folder, 2, 1)
    with pytest.raises(InputError, match="expected a checkpoint"):
        peers.run(tmp_path / "nowhere", tmp_path / "new", 2, 1)


def test_tables_and_bars(result: dict[str, Any], tmp_path: Path) -> None:
    shown = io.StringIO()
    peers.show(result, Console(file=shown, width=200))
    for line in (
        "fragile fp32: one row only",
        "dies: its process ended with status 3",
        "met",
        "not measured",
    ):
        assert line in shown.getvalue()
    peers.plot(result, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG"


def test_readmes_tables(result: dict[str, Any]) -> None:
    lines = peers.markdown(result).splitlines()
    ours, fragile = (row_of(result, name) for name in (peers.OURS, "fragile"))
    speed = f"{ours['parts']['prefill']['tokens_per_s']:,.0f}"
    took = f"{fragile['parts']['vision']['median']:,.0f}"
    (row,) = (line for line in lines if line.startswith(f"| {peers.OURS} fp32 |"))
    assert row.split(" | ")[2] == speed
    (row,) = (line for line in lines if line.startswith("| fragile fp32 |"))
    assert row.split(" | ")[1:] == [took, "-", "-", "-", "-", "- |"]
    assert "- dies: its process ended with status 3" in lines
    assert "- fragile, decode, two rows: one row only" in lines
    assert not any("transformers fp32 | 3.5" in line for line in lines)  # which is wanted of another shape
    lines = peers.markdown(result | {"bundle": "edge"}).splitlines()
    assert "| decode, int8 | llama.cpp int8 | 1.2 | not measured |" in lines
    (row,) = (
        line for line in lines if line.startswith("| question as shipped, fp32 | transformers fp32 | 3.5")
    )
    assert any(char.isdigit() for char in row.split("|")[4])


def test_readmes_table_of_quality(result: dict[str, Any]) -> None:
    vision = {"relative": 0.0123, "cosine": 0.99}
    good = {"questions": 2, "accuracy": {"share": 0.5}, "kl": 0.25, "top1": 0.75, "vision": vision}
    rows = [
        {"peer": peer, "precision": "fp32"} | of for peer, of in (("one", good), ("two", {"cannot": "died"}))
    ]
    assert peers.markdown(result | {"quality": rows}).splitlines()[2:] == [
        "| one fp32 | 50.0 | 0.25000 | 75.00 | 1.23 |",
        "| two fp32 | cannot: died |",
    ]


def test_transformers_computes_what_we_do(work: Work, folder: Path) -> None:
    from dualfocus.bench.peers.transformers import ENGINES

    theirs = ENGINES["fp32"](work)
    ours = Bundle.open(folder / "ours" / "fp32", threads=1)
    assert theirs.vision is not None
    np.testing.assert_allclose(
        theirs.vision.encode(work.pixels), ours.vision.encode(work.pixels), rtol=0, atol=1e-4
    )
    pieces = [
        embed(work.tokens[start:stop], ours.embeddings, {}) for start, stop in ((0, 40), (40, 41), (41, 50))
    ]
    caches = [KVCache(ours.manifest.decoder, rows=1, capacity=64) for _ in range(2)]
    for piece in pieces:
        at = [[0, len(piece) - 1]]
        (have,), (want,) = (
            decoder.extend(cache, [0], [piece], at)
            for decoder, cache in zip((theirs.decoder, ours.decoder), caches, strict=True)
        )
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-3)
    assert caches[0].lengths == caches[1].lengths == [50]


def test_the_work_is_the_plain_protocols(work: Work, folder: Path) -> None:
    bundle = Bundle.open(folder / "ours" / "fp32", threads=1)
    assert len(work.tokens) == PAST + STEPS
    assert max(work.tokens) < bundle.tokenizer.get_vocab_size()
    macro, locate, micro, *candidates = work.calls
    images = [{token.image for token in call.prompt if isinstance(token, Slot)} for call in work.calls]
    assert images == [{0}, {0}, {0, 1}, {0, 1}, {0, 1}]
    assert [call.scored for call in work.calls] == [False, False, False, True, True]
    box = bundle.tokenizer.decode(locate.reply, skip_special_tokens=True).strip()
    for call in (micro, *candidates):
        assert call.messages[-2] == {"role": "assistant", "content": box}
        assert sum(message["content"].count("<image>") for message in call.messages) == 2
        assert call.prompt[: len(locate.prompt) + len(locate.reply)] == (*locate.prompt, *locate.reply)
    assert candidates[0].prompt == candidates[1].prompt
    assert candidates[0].reply != candidates[1].reply
    for call in work.calls:  # what a chat's template would make of it is the prompt
        text = "".join(message["content"] for message in call.messages if message["role"] == "user")
        assert work.question.partition("\n")[0] in text
    pushed = script(work.calls)
    assert pushed is not None
    assert pushed[len(macro.prompt) - 1] == macro.reply[0]
    # the boxes that every peer is to look at
    result = Reference(bundle).ask(work.picture, work.question, box_reply=box)
    assert result.crop == work.crop


def test_replies_at_one_place_are_no_script(work: Work) -> None:
    assert script([work.calls[0], work.calls[0]]) is None


def test_ratios_are_against_ours_in_the_same_precision() -> None:
    def row(peer: str, precision: str, **parts: float) -> dict[str, Any]:
        named = {part.replace("_", " "): {"median": median} for part, median in parts.items()}
        return {"peer": peer, "precision": precision, "parts": named}

    rows = [
        row(peers.OURS, "fp32", decode=10.0, question_as_shipped=100.0),
        row(peers.OURS, "int8", decode=5.0),
        row("other", "int8", decode=20.0, vision=1.0),
        row("other", "fp32", question_with_reuse=150.0),
        {"peer": "gone", "precision": "int8", "cannot": "it died"},
    ]
    peers.compare(rows)
    assert rows[2]["parts"]["decode"]["ratio"] == 4
    assert rows[2]["parts"]["vision"]["ratio"] is None
    assert rows[3]["parts"]["question with reuse"]["ratio"] == 1.5  # against our question as shipped
    assert rows[0]["parts"]["decode"]["ratio"] == 1


def test_wanted_is_met_missed_or_not_known() -> None:
    question, reused = "question as shipped", "question with reuse"
    known: peers.Medians = {
        (peers.OURS, "int8", "decode"): 10.0,
        (peers.LLAMA_CPP, "int8", "decode"): 12.0,
        (peers.OURS, "int8", "decode, two rows"): 10.0,
        (peers.LLAMA_CPP, "int8", "decode, two rows"): 15.9,
        (peers.OURS, "int8", "vision"): 10.0,
        (peers.TRANSFORMERS, "bf16", "vision"): 15.0,
        (peers.LLAMA_CPP, "int8", "vision"): 9.0,
        (peers.OURS, "int8", "question as shipped"): 10.0,
        (peers.TRANSFORMERS, "fp32", "question as shipped"): 61.0,
        (peers.LLAMA_CPP, "int8", "question as shipped"): 40.0,
        ("openvino", "int8", "question as shipped"): 24.0,
        (peers.LLAMA_CPP, "int8", "question with reuse"): 14.0,
    }
    found = {(target["part"], target["ours"], target["other"]): target for target in peers.wanted(known)}
    expected: dict[tuple[str, str, str], tuple[float | None, str, bool | None]] = {
        ("decode", "int8", "llama.cpp int8"): (1.2, ">= 1.2", True),
        ("decode, two rows", "int8", "llama.cpp int8"): (1.59, ">= 1.6", False),
        ("prefill", "int8", "llama.cpp int8"): (None, ">= 1.2", None),
        ("vision", "fp32", "transformers fp32"): (None, ">= 1.2", None),
        ("vision", "int8", "transformers bf16"): (1.5, ">= 1.5", True),
        ("vision", "int8", "llama.cpp int8"): (0.9, ">= 1.0", False),
        (question, "fp32", "transformers fp32"): (None, ">= 2.5", None),  # ours is missing
        (question, "int8", "transformers fp32"): (6.1, ">= 6.0", True),
        (question, "int8", "openvino int8"): (2.4, ">= 2.5", False),  # the best, not llama.cpp
        (reused, "int8", "llama.cpp int8"): (1.4, ">= 1.3", True),
        (reused, "int4", "the best peer int4"): (None, ">= 1.3", None),
    }
    for key, (value, asked, met) in expected.items():
        target = found[key]
        assert target["value"] == (None if value is None else pytest.approx(value)), key
        assert (target["wanted"], target["met"]) == (asked, met), key


def test_quality_of_what_leans(modules: None, work: Work, tmp_path: Path) -> None:
    shutil.copytree(BUILT_IN, tmp_path / "ours" / "fp32")
    nano = dataclasses.replace(work, folder=tmp_path)
    asked = [
        (peers.OURS, peers.PEERS[peers.OURS], "fp32"),
        ("leaning", "leaning", "int8"),
        ("leaning", "leaning", "int4"),
    ]
    ours, leaning, missing = quality.measure(asked, tmp_path / "ours" / "fp32", nano, 4)
    same = {"relative": 0.0, "cosine": pytest.approx(1)}
    assert (ours["kl"], ours["top1"], ours["vision"]) == (0, 1, same)
    assert ours["questions"] == leaning["questions"] == 4
    assert ours["positions"] == leaning["positions"] > 4 * 10  # two answers and a box each
    assert ours["accuracy"]["share"] > 0.5 > leaning["accuracy"]["share"] == 0
    assert leaning["kl"] > 1
    assert leaning["top1"] < 0.5
    assert leaning["vision"] == {"relative": pytest.approx(0.01, rel=1e-4), "cosine": pytest.approx(1)}
    assert missing == {"peer": "leaning", "precision": "int4", "cannot": "KeyError: 'int4'"}


def test_divergence_is_of_the_wanted_distribution() -> None:
    want, have = (np.log(np.array([p], np.float32)) for p in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
    compared = quality.compare(want, have + 3)
    np.testing.assert_allclose(compared.divergence, [0.5 * math.log(2) - 0.25 * math.log(2)], rtol=1e-6)
    assert not compared.agree.any()
    np.testing.assert_allclose(quality.compare(want, want - 50).divergence, [0], atol=1e-6)


@pytest.mark.parametrize("given", [[], ["checkpoint", "--random", "edge"]])
def test_the_command_line_wants_one_model(given: list[str]) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "peers", *given])
    assert result.exit_code == 2
    assert "expected a CHECKPOINT or --random SHAPE" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_command_line_refuses_an_unknown_shape() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "peers", "--random", "square"])
    assert result.exit_code == 2
    assert "square" in result.stderr
