"""Fast equals plain: every saving, alone and together, on the built-in model. See `equality`.

The same on models of random weights is in `test_parity`, which exports them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import fakes
import numpy as np
import pytest
from equality import TOLERANCE, Pair, Tally, same

from dualfocus.bench.savings import leaving_out
from dualfocus.bench.scenes import held_out
from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle, DualFocus, Engine, Reference
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.result import FocusResult, Generation, Mode, ReplyToken
from dualfocus.runtime.turns import Question
from dualfocus.train import scenes

CHECKPOINT = (
    Path(__file__).parent.parent / "train" / "checkpoints" / "nano"
)  # what models/nano was exported from
LEFT_OUT = [left for many in range(4) for left in combinations(("batch", "forced", "draft"), many)]
REPLIES = ("macro", "locate", "micro")
BOXES = ["[0.12, 0.30, 0.55, 0.61]", "[0.71, 0.80, 1.00, 0.97]", "[0.5, 0.5, 0.9, 0.6]", "none"]


@cache
def nano() -> Bundle:
    return Bundle.open(threads=1)


@cache
def drawn(scene: int) -> np.ndarray:
    return np.asarray(scenes.draw(scenes.layout(scene)))


def held_out_pairs(count: int) -> list[Pair]:
    """Questions about drawn scenes that nano was never trained on."""
    return [Pair(drawn(scene.seed), dialogue.question) for scene, dialogue in held_out(count)]


@cache
def plainly(
    at: int, rule: SelectRule = "reference", mode: Mode = "dual", box: str | None = None
) -> FocusResult:
    """What the plain runner says of the held-out pair `at`, decoding freely."""
    pair = held_out_pairs(at + 1)[at]
    return Reference(nano(), select=rule).ask(pair.picture, pair.question, mode, box_reply=box)


def check(
    runner: DualFocus,
    count: int,
    rule: SelectRule = "reference",
    mode: Mode = "dual",
    box: str | None = None,
) -> Tally:
    """Ask `runner` the first held-out questions; near-ties and ill-formed boxes are to be few."""
    tally = Tally(nano())
    for at, pair in enumerate(held_out_pairs(count)):
        fast = runner.ask(pair.picture, pair.question, mode, box_reply=box)
        tally.compare(replace(pair, box_reply=box), fast, plainly(at, rule, mode, box))
    assert tally.pairs == count
    assert len(tally.ties) <= count // 50, tally
    assert tally.ill_formed <= count // 50, tally
    return tally


def tampered(result: FocusResult) -> Iterator[FocusResult]:
    """`result` with one thing wrong."""
    assert result.crop

    def other(generation: Generation, at: int) -> Iterator[Generation]:
        tokens, logprobs = list(generation.tokens), list(generation.logprobs)
        tokens[at] += 1
        yield replace(generation, tokens=tuple(tokens))
        logprobs[at] -= 2 * TOLERANCE
        yield replace(generation, logprobs=tuple(logprobs))

    for wrong in other(result.located, 1):
        yield replace(result, located=wrong)
    for name in ("macro", "micro"):
        answer = getattr(result, name)
        for wrong in other(answer.generation, 0):
            yield replace(result, **{name: replace(answer, generation=wrong)})
        short = replace(answer.generation, tokens=answer.generation.tokens[:-1])
        yield replace(result, **{name: replace(answer, generation=short)})
        yield replace(result, **{name: replace(answer, loss=answer.loss + 2 * TOLERANCE)})
        yield replace(result, **{name: replace(answer, loss=None)})
        yield replace(result, **{name: None})
    yield replace(result, crop=(result.crop[0] + 1, *result.crop[1:]))
    yield replace(result, chosen="macro" if result.chosen == "micro" else "micro")
    yield replace(result, answer="another")


def test_whatever_differs_is_noticed() -> None:
    """Of a pair whose passes disagreed."""
    at = next(at for at in range(20) if plainly(at).macro.loss is not None)
    pair, plain = held_out_pairs(at + 1)[at], plainly(at)
    same(pair, plain, plain, nano())
    for wrong in tampered(plain):
        with pytest.raises(AssertionError):
            Tally(nano()).compare(pair, wrong, plain)


def test_only_a_near_tie_lets_a_divergence_pass() -> None:
    """On a made-up model whose logits lie within a hair of each other, but for one with a push."""
    bundle = fakes.make_bundle()
    bundle.decoder._out[:] *= 1e-5
    pair = Pair(drawn(0), "What?")
    plain = Reference(bundle).ask(pair.picture, pair.question, "macro")
    said = plain.macro.generation
    diverged = replace(said, tokens=(said.tokens[0], said.tokens[1] + 1, *said.tokens[2:]))
    fast = replace(plain, macro=replace(plain.macro, generation=diverged))
    tally = Tally(bundle)
    tally.compare(pair, fast, plain)
    assert len(tally.ties) == 1
    assert tally.tokens == 1  # nothing behind it is compared
    bundle.decoder._out[:, said.tokens[1]] += np.sign(bundle.decoder._out[:, said.tokens[1]])
    with pytest.raises(AssertionError, match="leads"):
        Tally(bundle).compare(pair, fast, plain)


@pytest.mark.parametrize("rule", ["reference", "answer"])
@pytest.mark.parametrize("pairs", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_all_savings_together(pairs: int, rule: SelectRule, capsys: pytest.CaptureFixture[str]) -> None:
    tally = check(DualFocus(nano(), select=rule), pairs, rule)
    if pairs == 500:
        with capsys.disabled():
            print(f"\nall savings, {rule}: {tally}")
    assert tally.losses > pairs / 8  # some passes disagreed, so that there was something to choose
    assert min(tally.chosen.values()) > 0


@pytest.mark.parametrize("left_out", LEFT_OUT, ids="+".join)
@pytest.mark.parametrize(("slots", "chunk"), [(1, 64), (2, 512), (8, 100)])
@pytest.mark.parametrize("pairs", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_any_savings(pairs: int, left_out: tuple[str, ...], slots: int, chunk: int) -> None:
    tally, engine, protocol = Tally(nano()), Engine(nano(), slots=slots, chunk=chunk), leaving_out(left_out)
    for at, pair in enumerate(held_out_pairs(pairs)):
        fast = engine.run(engine.submit(pair.picture, pair.question, protocol))
        tally.compare(pair, fast, plainly(at))
    assert tally.pairs == pairs
    assert tally.losses > 0
    assert len(tally.ties) <= pairs // 50, tally


@pytest.mark.parametrize("rule", ["reference", "answer"])
@pytest.mark.parametrize("mode", ["dual", "macro", "micro"])
@pytest.mark.parametrize("box", [None, *BOXES])
@pytest.mark.parametrize("pairs", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_any_mode_and_any_box(pairs: int, rule: SelectRule, mode: Mode, box: str | None) -> None:
    check(DualFocus(nano(), select=rule), pairs, rule, mode, box)


@pytest.mark.parametrize("pairs", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_boxes_decoded_freely(pairs: int) -> None:
    tally, runner = Tally(nano()), DualFocus(nano(), free_box=True)
    for at, pair in enumerate(held_out_pairs(pairs)):
        tally.compare(pair, runner.ask(pair.picture, pair.question), plainly(at), alike=True)
    assert tally.pairs == pairs
    assert len(tally.ties) <= pairs // 50, tally


@pytest.mark.parametrize("pairs", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_choices_between_what_the_passes_say(pairs: int) -> None:
    """Multiple choice: the passes' own answers are two of the options, which they name by their text."""
    tally, runner, plain = Tally(nano()), DualFocus(nano()), Reference(nano())
    for at, pair in enumerate(held_out_pairs(pairs)):
        said = plainly(at)
        options = ("a blue square", said.macro.text, said.micro.text if said.micro else "none", "3")
        choice = replace(pair, question=Question(pair.question, pair.question, options))
        fast = runner.ask(pair.picture, choice.question)
        tally.compare(choice, fast, plain.ask(pair.picture, choice.question))
    assert tally.pairs == pairs
    assert tally.losses > 0
    assert len(tally.ties) <= pairs // 50, tally


def shuffled(count: int, many: int) -> list[int]:
    """`many` of the first `count` pairs in some order, the same ones several times and side by side too."""
    order = np.random.default_rng(many).integers(0, count, many).tolist()
    return [*order[: many // 2], *order[: many - many // 2]]


@pytest.mark.parametrize("mode", ["dual", "macro", "micro"])
@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("many", [11, pytest.param(60, marks=pytest.mark.slow)])
def test_several_at_once(many: int, batch: int, mode: Mode) -> None:
    pairs, tally = held_out_pairs(20), Tally(nano())
    runner = DualFocus(nano(), slots=2 * batch)
    # in a list's order questions on one picture come together, else pictures are mixed
    for order in (shuffled(20, many), list(range(min(many, 20))), [0] * batch):
        results = list(runner.ask_many([(pairs[at].picture, pairs[at].question) for at in order], mode))
        assert len(results) == len(order)
        for at, fast in zip(order, results, strict=True):
            tally.compare(pairs[at], fast, plainly(at, mode=mode))
    assert len(tally.ties) <= tally.pairs // 50, tally
    assert list(runner.ask_many([])) == []


def test_a_session_and_a_stream() -> None:
    pairs = held_out_pairs(12)
    asked, streamed, met = DualFocus(nano()), DualFocus(nano()), DualFocus(nano())
    sessions: dict[int, object] = {}
    for at, pair in enumerate(pairs):
        expected = asked.ask(pair.picture, pair.question)
        *events, result = streamed.stream(pair.picture, pair.question)
        assert result == expected
        said = {
            name: [e for e in events if isinstance(e, ReplyToken) and e.reply == name] for name in REPLIES
        }
        for name, generation in zip(REPLIES, (result.macro, result.located, result.micro), strict=True):
            generation = getattr(generation, "generation", generation)
            tokens = generation.tokens if generation else ()
            assert tuple(e.token for e in said[name]) == tokens
            text = generation.text if generation else ""
            assert "".join(e.text for e in said[name]).strip() == text
        session = sessions.setdefault(id(pair.picture), met.session(pair.picture))
        same(pair, session.ask(pair.question), plainly(at), nano())
        *_, result = session.stream(pair.question, "micro")
        same(pair, result, plainly(at, mode="micro"), nano())


@pytest.mark.parametrize("pairs", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_the_gate_skips_what_is_above_it_and_nothing_else(pairs: int) -> None:
    asked = held_out_pairs(pairs)
    macros = [DualFocus(nano()).ask(pair.picture, pair.question, "macro") for pair in asked]
    gate = float(np.median([result.macro.generation.confidence for result in macros]))
    skipped = 0
    for at, (pair, macro) in enumerate(zip(asked, macros, strict=True)):
        fast = DualFocus(nano(), skip_above=gate).ask(pair.picture, pair.question)
        if macro.macro.generation.confidence > gate:
            assert fast == replace(macro, skipped=True)  # the counters included
            skipped += 1
        else:
            assert not fast.skipped
            same(pair, fast, plainly(at), nano())
        assert not DualFocus(nano()).ask(pair.picture, pair.question).skipped
    assert 0 < skipped < pairs


@pytest.mark.parametrize("batch", [3, 8])
def test_the_gate_in_a_batch(batch: int) -> None:
    """Rows of skipped questions stay empty between those of the others."""
    pairs = held_out_pairs(12)
    one, many = (DualFocus(nano(), skip_above=0.9, slots=2 * size) for size in (1, batch))
    results = list(many.ask_many([(pair.picture, pair.question) for pair in pairs]))
    for pair, fast in zip(pairs, results, strict=True):
        alone = one.ask(pair.picture, pair.question)
        assert fast.skipped == alone.skipped
        same(pair, fast, alone, nano())
    assert 0 < sum(result.skipped for result in results) < len(results)


@pytest.mark.parametrize("pairs", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_graph_without_ragged_appends(tiny_bundle: Path, tmp_path: Path, pairs: int) -> None:
    """Rows that cannot grow together grow one after the other."""
    export_bundle(
        tiny_bundle.parent / "checkpoint", tmp_path / "b", ragged_append=False, progress=lambda _: None
    )
    bundle = Bundle.open(tmp_path / "b", threads=1)
    assert not bundle.manifest.decoder.ragged_append
    plain = Reference(Bundle.open(tiny_bundle, threads=1), free_box=False)
    asked = held_out_pairs(pairs)
    one, many = DualFocus(bundle), DualFocus(bundle, slots=6)
    together = many.ask_many([(pair.picture, pair.question) for pair in asked])
    tally = Tally(bundle)
    for pair, fast in zip(asked, together, strict=True):
        expected = plain.ask(pair.picture, pair.question)
        tally.compare(pair, fast, expected, alike=True)
        tally.compare(pair, one.ask(pair.picture, pair.question), expected, alike=True)
    assert tally.losses > pairs
    assert len(tally.ties) <= pairs // 10, tally


@pytest.mark.slow
def test_nano_without_ragged_appends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_bundle(CHECKPOINT, tmp_path / "bundle", ragged_append=False, progress=lambda _: None)
    bundle = Bundle.open(tmp_path / "bundle", threads=1)
    tally = check(DualFocus(bundle), 50)
    pairs = held_out_pairs(20)
    results = DualFocus(bundle, slots=6).ask_many([(pair.picture, pair.question) for pair in pairs])
    for at, fast in enumerate(results):
        tally.compare(pairs[at], fast, plainly(at))
    with capsys.disabled():
        print(f"\nwithout ragged appends: {tally}")
