"""The built-in model: small enough, what its checkpoint says, and reading what the whole picture hides."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualfocus.bench import accuracy
from dualfocus.bench import scenes as bench
from dualfocus.bench.answers import Answers, Run
from dualfocus.runtime import Bundle, DualFocus, Reference, open_picture
from dualfocus.runtime.bundle import BUILT_IN, read_manifest, verify
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.result import FocusResult, Stage
from dualfocus.runtime.sequence import common_prefix
from dualfocus.runtime.turns import Turns
from dualfocus.train import nano, scenes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(threads=1)


def test_it_is_small_and_whole() -> None:
    manifest, _ = read_manifest(BUILT_IN)
    verify(BUILT_IN, manifest)
    files = [path for path in BUILT_IN.iterdir() if path.is_file()]
    assert {path.name for path in files} == {*manifest.files, "manifest.json"}
    assert sum(path.stat().st_size for path in files) <= 15_000_000


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
def test_a_graph_tells_nothing_of_where_it_was_made(name: str) -> None:
    graph = (BUILT_IN / name).read_bytes()
    assert b"site-packages" not in graph
    assert b".py" not in graph  # stack traces name the exporter's files


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx", "embeddings.npy", "tokenizer.json"])
def test_a_flipped_byte_is_noticed(name: str, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(BUILT_IN, tmp_path / "damaged"))
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} has SHA-256"):
        Bundle.open(damaged)


def test_manifest_says_what_training_assumed() -> None:
    manifest, _ = read_manifest(BUILT_IN)
    assert manifest.image == nano.IMAGE
    assert manifest.prompts == nano.PROMPTS
    assert manifest.coordinates == "padded"
    assert manifest.prompts.select == manifest.prompts.micro


def test_tokenizer_is_the_one_the_recipe_builds() -> None:
    built = json.loads(nano.build_tokenizer().to_str())["model"]["vocab"]
    shipped = json.loads((BUILT_IN / "tokenizer.json").read_text())["model"]["vocab"]
    assert built == shipped


def test_a_question_costs_what_the_counters_predict(bundle: Bundle) -> None:
    """And scoring costs nothing: the draft pass scored the macro answer, decoding the micro answer."""
    calls = 0
    extend = bundle.decoder.extend

    def counted(*args: Any) -> list[Floats]:
        nonlocal calls
        calls += 1
        return extend(*args)

    runner = DualFocus(replace(bundle, decoder=SimpleNamespace(extend=counted)))
    plain = Reference(bundle)
    seen: set[int] = set()
    departed = 0
    for scene, dialogue in bench.held_out(40):
        picture = np.asarray(scenes.draw(scene))
        scoring: int | None = None
        for event in runner.stream(picture, dialogue.question):
            if event == Stage("select"):
                scoring = calls
        assert isinstance(event, FocusResult)
        got, expected = event.counters, plain.ask(picture, dialogue.question).counters
        assert got.tokens_prefilled + got.tokens_reused == expected.tokens_prefilled
        assert got.decode_steps < expected.decode_steps
        # the picture is encoded at its first question only; a crop may be one of an earlier question
        assert got.vision_encodes <= (1 if scene.seed in seen else 2)
        seen.add(scene.seed)
        if scoring is not None:
            assert calls == scoring
            assert event.macro is not None
            assert event.macro.loss is not None
            assert got.tokens_accepted < got.tokens_drafted
            departed += 1
    assert departed >= 4  # of the questions about details at least


def test_the_picture_is_prefilled_once(bundle: Bundle) -> None:
    """A second question on the same picture starts behind the picture."""
    scene, first = bench.held_out(1)[0]
    picture = np.asarray(scenes.draw(scene))
    runner = DualFocus(bundle)
    runner.ask(picture, first.question, "macro")
    question = "How many stars are there?"
    again = runner.ask(picture, question, "macro").counters
    turns = [
        Turns(bundle.manifest, bundle.tokenizer, q).macro("x").tokens for q in (first.question, question)
    ]
    assert again.vision_encodes == 0
    assert again.tokens_reused == common_prefix(*turns) >= nano.IMAGE.tokens
    assert again.tokens_prefilled == len(turns[1]) - common_prefix(*turns)


def test_the_example_is_answered(bundle: Bundle) -> None:
    """What the README shows is what comes out."""
    picture = open_picture(ROOT / "examples" / "scene.png")
    question = (ROOT / "examples" / "scene.txt").read_text().strip()
    result = DualFocus(bundle).ask(picture, question)
    assert result.micro is not None
    assert result.chosen == "micro"
    assert result.answer in (ROOT / "README.md").read_text()
    assert Image.open(ROOT / "examples" / "scene.png").size == (picture.shape[1], picture.shape[0])


@pytest.mark.parametrize("setting", bench.POPE)
def test_pope_asks_for_what_is_absent_in_its_way(setting: str) -> None:
    frequent = [f"{colour} {kind}" for colour in list(scenes.COLOURS)[:5] for kind in scenes.KINDS[:6]]
    answers = []
    for seed in range(200):
        scene = scenes.layout(seed)
        asked = bench.pope(scene, setting)
        answers.append(asked.answer)
        colour, kind = asked.question.removeprefix("Is there a ").rstrip("?").split()
        there = [(t.colour, t.kind) for t in scene.things]
        assert ((colour, kind) in there) == (asked.answer == "yes")
        if asked.answer == "no" and setting == "popular":
            assert f"{colour} {kind}" in frequent
        if asked.answer == "no" and setting == "adversarial" and len(set(there)) > 2:
            assert colour in {c for c, _ in there} or kind in {k for _, k in there}
    assert 80 < answers.count("yes") <= 100


def test_it_reads_what_the_whole_picture_hides(bundle: Bundle) -> None:
    """200 held-out questions: the floor is far below what is reported, and far above chance."""
    run = Run("scenes", "dual", bundle.manifest.name, bundle.digest)
    runner = DualFocus(bundle)
    with Answers(None, run) as answers:
        summary = accuracy.run(
            bench.benchmark(200),
            answers,
            lambda todo: accuracy.ask_all(runner, run, todo),
            bundle.manifest,
            None,
            1,
        )
    detail, everything = summary["accuracy"]["detail"], summary["accuracy"]["all"]
    assert detail["macro"]["share"] < 0.1
    assert detail["dual"]["share"] > detail["macro"]["share"] + 0.2
    assert everything["dual"]["share"] > 0.5
    assert summary["boxes"]["iou_50"]["share"] > 0.5
