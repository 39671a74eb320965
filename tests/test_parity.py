"""`DualFocus` on a bundle against the plain protocol in transformers on its checkpoint.

Both decode boxes freely where random weights name none; nano is held to the grammar, transformers never.
Replies token for token, crops pixel for pixel, losses within 1e-3, choices. Two float32 programs add
in different orders, so where the reference's best two logits lie within 1e-3 either may come first:
such a first divergence is counted and shown, and nothing after it is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import equality
import numpy as np
import pytest
import tiny
from PIL import Image
from transformers_protocol import Reply, TransformersProtocol

from dualfocus.bench.scenes import held_out
from dualfocus.export import export_bundle
from dualfocus.runtime import DualFocus, Reference
from dualfocus.runtime.bundle import BUILT_IN, Bundle
from dualfocus.runtime.turns import DUALFOCUS
from dualfocus.train import scenes

CHECKPOINT = (
    Path(__file__).parent.parent / "train" / "checkpoints" / "nano"
)  # what models/nano was exported from

TIE = 1e-3  # logits of the reference closer than this may swap
LOSS_TOLERANCE = 1e-3

BOX_TOKENS = 40  # more than any box takes

Pair = tuple[Image.Image, str, str | None]  # picture, question, the box reply where the model has none

SHAPES = {
    "smallest": tiny.Shape(),
    "84-pixels-three-heads": tiny.Shape(image=84, heads=3, kv_heads=1, head_size=32, vocabulary=1021),
    "all-heads-crop": tiny.Shape(image=112, heads=2, kv_heads=2, head_size=48, hidden=40, crop=True),
    "tied-biased-deep": tiny.Shape(layers=4, tied=True, bias=True, feature_strategy="full", vocabulary=401),
    "336-pixels": tiny.Shape(image=336, heads=8, kv_heads=2, vocabulary=733, context=2048),
}
QUESTIONS = [
    "What is written on the red star?",
    "How many blue circles are there?\nAnswer with a number: 1, 2 or 3.",
    "Ist das Schild grün?",
]
BOXES = ["[0.12, 0.30, 0.55, 0.61]", "[0.71, 0.80, 1.00, 0.97]", None]


@dataclass
class Tally:
    """What was compared. `ties` describes each divergence that was let pass."""

    pairs: int = 0
    tokens: int = 0
    losses: int = 0
    worst_loss: float = 0.0
    chosen: dict[str, int] = field(default_factory=lambda: {"macro": 0, "micro": 0})
    ties: list[str] = field(default_factory=list)

    def same_reply(self, what: str, got: tuple[int, ...], expected: Reply) -> bool:
        """Compare token for token; False after a divergence that a near-tie explains."""
        for i, (token, margin) in enumerate(zip(expected.tokens, expected.margins, strict=True)):
            if i >= len(got) or got[i] != token:
                assert margin < TIE, (
                    f"{what}: {got} is not {expected.tokens}; margin {margin:.2g} at token {i}"
                )
                self.ties.append(f"{what}: token {i}, margin {margin:.1e}")
                return False
            self.tokens += 1
        assert len(got) == len(expected.tokens), f"{what}: {got} goes on after {expected.tokens}"
        return True

    def same_loss(self, what: str, got: float | None, expected: float) -> None:
        assert got is not None, f"{what}: no loss, expected {expected:.6f}"
        self.losses += 1
        self.worst_loss = max(self.worst_loss, abs(got - expected))
        assert abs(got - expected) < LOSS_TOLERANCE, f"{what}: loss {got:.6f}, expected {expected:.6f}"

    def __str__(self) -> str:
        lines = [
            f"{self.pairs} pairs, {self.tokens} tokens, chosen {self.chosen}, "
            f"{self.losses} losses within {self.worst_loss:.1e}, {len(self.ties)} near-ties"
        ]
        return "\n  ".join(lines + self.ties)


def check_parity(checkpoint: Path, bundle: Path, pairs: Iterable[Pair], *, free_box: bool = True) -> Tally:
    """Ask every pair of both sides, by both selection rules, and assert that they agree."""
    opened = Bundle.open(bundle, threads=1)
    protocol = TransformersProtocol(checkpoint, opened.manifest)
    runners = {rule: DualFocus(opened, select=rule, free_box=free_box) for rule in ("reference", "answer")}
    tally = Tally()
    for picture, question, box_reply in pairs:
        tally.pairs += 1
        expected = protocol.ask(picture, question, box_reply)
        pixels = np.asarray(picture)
        for rule, runner in runners.items():
            what = f"pair {tally.pairs}, {rule}"
            result = runner.ask(pixels, question, box_reply=box_reply)
            located = result.located or runner.ask(pixels, question).located
            assert result.macro
            assert located
            same_macro = tally.same_reply(f"{what}, macro", result.macro.generation.tokens, expected.macro)
            same_box = tally.same_reply(f"{what}, locate", located.tokens, expected.locate)
            if not same_box and box_reply is None:
                continue
            assert result.crop == expected.crop, what
            if expected.micro is None:
                assert result.micro is None
                assert result.chosen == "macro"
                continue
            assert result.micro
            same_micro = tally.same_reply(f"{what}, micro", result.micro.generation.tokens, expected.micro)
            if not (same_macro and same_micro):
                continue
            assert (result.macro.text, result.micro.text) == (expected.macro.text, expected.micro_text)
            if expected.macro_score is None or expected.micro_score is None:
                assert result.macro.loss is result.micro.loss is None
                assert result.chosen == "macro"
                continue
            macro, micro = (getattr(s, rule) for s in (expected.macro_score, expected.micro_score))
            tally.same_loss(f"{what}, macro", result.macro.loss, macro)
            tally.same_loss(f"{what}, micro", result.micro.loss, micro)
            if result.chosen != expected.chosen(rule):
                assert abs(macro - micro) < 2 * LOSS_TOLERANCE, f"{what}: chose {result.chosen}"
                tally.ties.append(f"{what}, choice: losses {abs(macro - micro):.1e} apart")
            tally.chosen[result.chosen] += 1
    return tally


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured rectangles under fine noise, so that no two crops look alike."""
    rng = np.random.default_rng(seed)
    canvas = rng.integers(0, 256, (1, 1, 3)) * np.ones((height, width, 1))
    for _ in range(30):
        (x0, x1), (y0, y1) = (np.sort(rng.integers(0, side, 2)) for side in (width, height))
        canvas[y0:y1, x0:x1] = rng.integers(0, 256, 3)
    canvas += rng.normal(0, 20, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of random weights, and the bundle exported from it."""
    folder = tmp_path_factory.mktemp("shape")
    checkpoint = tiny.build(folder / "checkpoint", request.param)
    export_bundle(checkpoint, folder / "bundle", progress=lambda _: None)
    return folder


def test_random_models_agree_with_transformers(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the box text given, since random weights emit none."""
    pictures = [picture(1, 501, 333), picture(2, 240, 407)]
    pairs = [(p, q, b) for p in pictures for q in QUESTIONS for b in BOXES]
    tally = check_parity(exported / "checkpoint", exported / "bundle", pairs)
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.losses > len(pairs)  # most boxes come to a choice: the comparison is not empty


@pytest.mark.parametrize("pairs", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_random_models_answer_fast_what_they_answer_plainly(
    exported: Path, pairs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The grammar on both sides; alone and in batches."""
    opened = Bundle.open(exported / "bundle", threads=1)
    bundle = replace(opened, manifest=replace(opened.manifest, max_new_tokens=BOX_TOKENS))
    asked = [
        equality.Pair(np.asarray(picture(i // 3, 200 + 37 * (i % 7), 180 + 23 * (i % 5))), QUESTIONS[i % 3])
        for i in range(pairs)
    ]
    runner, plain = DualFocus(bundle), Reference(bundle, free_box=False)
    batched = DualFocus(bundle, slots=6).ask_many([(pair.picture, pair.question) for pair in asked])
    tally = equality.Tally(bundle)
    for pair, together in zip(asked, batched, strict=True):
        expected = plain.ask(pair.picture, pair.question)
        for fast in (runner.ask(pair.picture, pair.question), together):
            tally.compare(pair, fast, expected)
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.ill_formed == 0
    assert tally.losses > pairs / 2
    assert len(tally.ties) <= pairs // 10, tally


def test_another_family_of_prompts_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts, select turn and coordinates that the checkpoint declares, nano's way."""
    prompts = {"system": "", "select": DUALFOCUS.micro, "hint": ""}
    checkpoint = tiny.build(tmp_path / "checkpoint", prompts=prompts, coordinates="padded", max_new_tokens=6)
    export_bundle(checkpoint, tmp_path / "bundle", progress=lambda _: None)
    pairs = [(picture(3, 640, 411), q, b) for q in QUESTIONS for b in BOXES]
    tally = check_parity(checkpoint, tmp_path / "bundle", pairs)
    with capsys.disabled():
        print(f"\n{tally}")
    assert tally.losses > len(pairs)


def held_out_pairs(count: int) -> Iterator[Pair]:
    """Questions about drawn scenes that nano was never trained on; nano names its boxes itself."""
    for scene, dialogue in held_out(count):
        yield scenes.draw(scene), dialogue.question, None


@pytest.mark.parametrize("pairs", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_nano_agrees_with_transformers(pairs: int, capsys: pytest.CaptureFixture[str]) -> None:
    tally = check_parity(CHECKPOINT, BUILT_IN, held_out_pairs(pairs), free_box=False)
    with capsys.disabled():
        print(f"\nnano: {tally}")
    assert tally.pairs == pairs
    assert tally.losses > 0  # some passes disagreed, so choices were compared too
