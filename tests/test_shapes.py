"""Models of random weights: reproducible, shaped as said, exported like any other, and fit to be timed."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner, Result

from dualfocus import cli
from dualfocus.export import SHAPES, ExportError, export_bundle, shapes
from dualfocus.export.random_weights import (
    BOS,
    EOS,
    NAMELESS_SCALE,
    make_tokenizer,
    random_checkpoint,
    random_model,
)
from dualfocus.runtime import Bundle, DualFocus, Reference
from dualfocus.runtime.manifest import Manifest
from dualfocus.runtime.turns import DUALFOCUS, ImageToken, Turns

EDGE = SHAPES["edge"]
TINY = tiny.Shape(name="smallest", vocabulary=1201, tied=True)  # more rows than the tokenizer has tokens
BOX = "[0.12, 0.34, 0.56, 0.78]"


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "bundle"
    export_bundle(TINY, folder, progress=lambda _: None)
    return folder


def ids(text: str) -> list[int]:
    found: list[int] = make_tokenizer(EDGE.vocabulary).encode(text, add_special_tokens=False).ids
    return found


def tokens(text: str) -> list[str]:
    found: list[str] = make_tokenizer(EDGE.vocabulary).encode(text, add_special_tokens=False).tokens
    return found


# ---- weights


def test_a_seed_names_one_model() -> None:
    one, same, other = (random_model(TINY, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].is_floating_point())


def test_the_caller_s_random_numbers_do_not_matter() -> None:
    torch.manual_seed(1)
    one = random_model(TINY).state_dict()
    torch.manual_seed(2)
    two = random_model(TINY).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("tied", [True, False])
def test_the_best_token_leads_clearly_and_has_a_name(tied: bool) -> None:
    checkpoint = random_checkpoint(dataclasses.replace(TINY, tied=tied))
    named = checkpoint.tokenizer.get_vocab_size()
    assert named < TINY.vocabulary
    embeds = torch.nn.functional.embedding(
        torch.randint(named, (8, 50), generator=torch.Generator().manual_seed(0)),
        checkpoint.model.get_input_embeddings().weight,
    )
    logits = tiny.logits(checkpoint.model, embeds.detach().numpy())
    ordinary = np.delete(logits[..., :named], EOS, axis=-1)
    assert ordinary.std() == pytest.approx(2, rel=0.1)
    assert logits[..., named:].std() == pytest.approx(2 * NAMELESS_SCALE, rel=0.1)
    assert (logits.argmax(-1) < named).all()
    second, best = np.sort(logits, axis=-1)[..., -2:].transpose(2, 0, 1)
    assert np.median(best - second) > 0.2
    assert 0.02 < (logits.argmax(-1) == EOS).mean() < 0.4  # replies end, and not at once


def test_what_is_said_depends_on_what_was_asked() -> None:
    """Twenty tokens differ among 600; unscaled attention would average them away (correlation above 0.99)."""
    model = random_checkpoint(dataclasses.replace(TINY, layers=12)).model
    correlations = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        embeds = rng.standard_normal((2, 600, TINY.hidden), np.float32)
        embeds[1, :570], embeds[1, 590:] = embeds[0, :570], embeds[0, 590:]
        correlations.append(np.corrcoef(tiny.logits(model, embeds)[:, -1])[0, 1])
    assert np.mean(correlations) < 0.95


# ---- tokenizer


def test_tokens_are_llamas() -> None:
    assert tokens(BOX + "</s>") == [
        *("▁[", "0", ".", "1", "2", ",", "▁", "0", ".", "3", "4", ","),
        *("▁", "0", ".", "5", "6", ",", "▁", "0", ".", "7", "8", "]", "</s>"),
    ]
    assert tokens("\nnaïve")[:2] == ["▁", "<0x0A>"]
    assert {"<0xC3>", "<0xAF>"} <= set(tokens("\nnaïve"))
    assert ids("<s></s>") == [BOS, EOS]
    assert len(tokens(DUALFOCUS.system)) == 30  # every word and sign one token, and the space at its end


@pytest.mark.parametrize(
    "text", ["What is written on the red star?", "a  b\n\tc", "naïve 猫 🙂 ½", BOX, "<0x0A>", "▁", "x" * 99]
)
def test_text_comes_back(text: str) -> None:
    tokenizer = make_tokenizer(EDGE.vocabulary)
    back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    assert back == text.replace("▁", " ").removeprefix(" ")


def test_the_tokenizer_is_the_same_in_every_process() -> None:
    code = "from dualfocus.export.random_weights import make_tokenizer as m; print(m(49152).to_str())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == make_tokenizer(EDGE.vocabulary).to_str()


def test_a_small_vocabulary_is_kept() -> None:
    assert make_tokenizer(400).get_vocab_size() == 400


# ---- bundles


def test_a_bundle_of_random_weights_says_so(random_bundle: Path) -> None:
    manifest = Bundle.open(random_bundle, threads=1).manifest
    assert manifest.name == "smallest"
    assert manifest.source["checkpoint"] == "random weights, seed 0"
    assert (manifest.image.tokens, manifest.image.fit) == (16, "pad")
    assert (manifest.tokens.bos, manifest.tokens.eos) == (BOS, (EOS,))
    assert (manifest.prompts, manifest.coordinates, manifest.max_new_tokens) == (DUALFOCUS, "original", 128)


def test_a_bundle_of_random_weights_answers(random_bundle: Path, picture: np.ndarray) -> None:
    bundle = Bundle.open(random_bundle, threads=1)
    plain, focus = Reference(bundle, free_box=False), DualFocus(bundle)
    for question in ("What is this?", "How many dogs are there?"):
        one, two = (runner.ask(picture, question) for runner in (plain, focus))
        assert one.micro is not None
        assert (one.answer, one.chosen, one.box) == (two.answer, two.chosen, two.box)


def edge_turns(random_bundle: Path, question: str) -> Turns:
    """The prompts of `edge`, whose weights are not needed for them."""
    manifest: Manifest = Bundle.open(random_bundle, threads=1).manifest
    manifest = dataclasses.replace(
        manifest,
        image=dataclasses.replace(manifest.image, tokens=EDGE.image_tokens),
        decoder=dataclasses.replace(manifest.decoder, context=EDGE.context),
    )
    return Turns(manifest, make_tokenizer(EDGE.vocabulary), question)


def test_prompts_are_as_long_as_with_llamas_tokenizer(random_bundle: Path) -> None:
    turns = edge_turns(random_bundle, "What is written on the red star?")
    turns.check_length(macro_only=False)
    macro, locate = turns.macro("whole").tokens, turns.locate("whole").tokens
    micro = turns.micro("whole", "crop", BOX).tokens
    assert sum(isinstance(token, ImageToken) for token in macro) == 576
    assert 30 <= macro.index(ImageToken("whole", 0)) <= 40  # the system sentence and the user's name
    assert 620 <= len(macro) <= 650
    # what reuse leaves: macro and locate share all up to behind the picture, micro goes on from locate
    shared = next(i for i, pair in enumerate(zip(macro, locate, strict=False)) if pair[0] != pair[1])
    assert 1290 <= len(macro) - shared + len(micro) <= 1330


def test_edge_has_smollm2_s_and_vit_b_16_s_sizes() -> None:
    assert EDGE.image_tokens == 576
    head = EDGE.heads * EDGE.head_size
    attention = EDGE.hidden * (2 * head + 2 * EDGE.kv_heads * EDGE.head_size)
    decoder = EDGE.layers * (attention + 3 * EDGE.hidden * EDGE.mlp + 2 * EDGE.hidden) + EDGE.hidden
    assert EDGE.tied
    assert decoder + EDGE.vocabulary * EDGE.hidden == 134_515_008  # SmolLM2-135M's own count


# ---- refusals


def refused(result: Result) -> str:
    assert result.exit_code == 2, (result.exit_code, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_refusals(tmp_path: Path) -> None:
    def export(*arguments: object) -> str:
        return refused(CliRunner().invoke(cli.app, ["export", *map(str, arguments), "-o", f"{tmp_path}/out"]))

    assert "expected a CHECKPOINT or --random SHAPE" in export()
    assert "both a CHECKPOINT and --random SHAPE" in export(tmp_path, "--random", "edge")
    assert "no shape is called 'huge', expected one of edge" in export("--random", "huge")
    assert "--random '' is empty" in export("--random", "")
    assert not (tmp_path / "out").exists()


def test_named() -> None:
    assert shapes.named("edge") is EDGE
    with pytest.raises(ExportError, match=re.escape("no shape is called 'Edge'")):
        shapes.named("Edge")


# ---- edge itself


@pytest.mark.slow
def test_edge(tmp_path: Path, picture: np.ndarray) -> None:
    result = CliRunner().invoke(cli.app, ["export", "--random", "edge", "-o", str(tmp_path / "edge")])
    assert result.exit_code == 0, result.stderr
    bundle = Bundle.open(tmp_path / "edge")
    spec = bundle.manifest.decoder
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_size) == (30, 576, 9, 3, 64)
    assert (spec.vocabulary, spec.context, bundle.manifest.image.tokens) == (49_152, 2048, 576)
    plain, focus = Reference(bundle, free_box=False), DualFocus(bundle)
    one, two = (runner.ask(picture, "What is written on the red star?") for runner in (plain, focus))
    assert one.micro is not None
    assert two.micro is not None
    assert (one.macro.generation, one.box, one.micro.text, one.chosen) == (
        two.macro.generation,
        two.box,
        two.micro.text,
        two.chosen,
    )
    assert two.counters.vision_encodes == 2
