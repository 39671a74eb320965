"""Reuse on equals reuse off: the same tokens, close log-probabilities, and the work that was predicted."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import fakes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualfocus.runtime import Bundle, FocusRunner, PlainRunner
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.result import Answer, Counters, FocusResult, Generation
from dualfocus.runtime.scheduler import image_name
from dualfocus.runtime.sequence import CachedSequence, common_prefix, embed, log_softmax
from dualfocus.runtime.turns import ImageToken, Prompt, Turns

BOX = "[0.10, 0.20, 0.60, 0.70]"
QUESTION = "What is written on the red star?"


def spelled(text: str) -> list[int]:
    """The tokenizer's spelling of a reply, its end included."""
    return [*fakes.make_tokenizer().encode(" " + text).ids, fakes.EOS]


def spelled_out(text: str) -> list[int]:
    """Another spelling of the same reply: from its first comma on, character by character."""
    tokenizer = fakes.make_tokenizer()
    head, comma, tail = (" " + text).partition(",")
    characters = (tokenizer.encode(character).ids[0] for character in comma + tail)
    return [*tokenizer.encode(head).ids, *characters, fakes.EOS]


def script(box: list[int], macro: str = "a sta", micro: str = "AB7.") -> dict[str, list[int]]:
    return {
        "bounding box coordinate of the region this question asks: What": box,
        "combine the information": spelled(micro),
        "\nWhat": spelled(macro),
    }


def same(fast: FocusResult, plain: FocusResult) -> None:
    """Everything but what it cost; numbers to within rounding."""
    assert (fast.answer, fast.chosen, fast.fallback) == (plain.answer, plain.chosen, plain.fallback)
    assert (fast.box, fast.crop) == (plain.box, plain.crop)
    same_generation(fast.located, plain.located)
    for ours, theirs in ((fast.macro, plain.macro), (fast.micro, plain.micro)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.text == theirs.text
            same_generation(ours.generation, theirs.generation)
            assert ours.loss == (None if theirs.loss is None else pytest.approx(theirs.loss, abs=1e-4))


def same_generation(ours: Generation | None, theirs: Generation | None) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert (ours.text, ours.tokens) == (theirs.text, theirs.tokens)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def same_work(fast: Counters, plain: Counters) -> None:
    """What reuse leaves out is counted as reused, and tokens are chosen as often."""
    assert fast.tokens_prefilled + fast.tokens_reused == plain.tokens_prefilled
    assert fast.decode_steps == plain.decode_steps
    assert plain.tokens_reused == 0


@pytest.mark.parametrize("rule", ["reference", "answer"])
@pytest.mark.parametrize("mode", ["dual", "macro", "micro"])
@pytest.mark.parametrize("spell", [spelled, spelled_out])
def test_reuse_changes_nothing(picture, rule, mode, spell):
    bundle = fakes.make_bundle(script(spell(BOX)))
    fast, plain = FocusRunner(bundle, select=rule), PlainRunner(bundle, select=rule)
    for question in (QUESTION, "What else?", QUESTION):
        ours, theirs = fast.ask(picture, question, mode), plain.ask(picture, question, mode)
        same(ours, theirs)
        same_work(ours.counters, theirs.counters)
    assert mode == "macro" or ours.located.text == BOX


def test_dual_on_a_first_question_costs_what_the_protocol_predicts(picture):
    bundle = fakes.make_bundle(script(spelled(BOX)))
    result = FocusRunner(bundle).ask(picture, QUESTION)
    turns = Turns(bundle.manifest, bundle.tokenizer, QUESTION)
    macro, locate = turns.macro("w").tokens, turns.locate("w").tokens
    micro = turns.micro("w", "c", BOX).tokens
    candidates = [turns.select("w", "c", BOX, text).tokens for text in ("a sta", "AB7")]
    said = {name: list(g.tokens[:-1]) for name, g in generations(result).items()}

    assert (result.macro.text, result.located.text, result.micro.text) == ("a sta", BOX, "AB7")
    branches = [
        common_prefix(macro, locate),  # system, USER: and the image
        len(locate) + len(said["locate"]),  # micro goes on from the reply, only its </s> is new
        common_prefix([*micro, *said["micro"]], candidates[0]),
        common_prefix(*candidates) - 1,  # what the first token is judged by is computed again
    ]
    assert branches[0] > fakes.IMAGE_TOKENS
    assert branches[2] > 2 * fakes.IMAGE_TOKENS
    prompts = [macro, locate, micro, *candidates]
    counters = result.counters
    assert counters.vision_encodes == 2
    assert counters.tokens_reused == sum(branches)
    assert counters.tokens_prefilled == sum(map(len, prompts)) - sum(branches)
    assert counters.decode_steps == sum(len(g.tokens) for g in generations(result).values())

    plain = PlainRunner(bundle).ask(picture, QUESTION).counters
    assert (plain.vision_encodes, plain.tokens_prefilled) == (8, sum(map(len, prompts)))


def generations(result: FocusResult) -> dict[str, Generation]:
    return {
        "macro": result.macro.generation,
        "locate": result.located,
        "micro": result.micro.generation,
    }


def test_a_box_spelled_differently_is_computed_again_from_where_the_spellings_part(picture):
    bundle = fakes.make_bundle(script(spelled_out(BOX)))
    result = FocusRunner(bundle).ask(picture, QUESTION, "micro")
    turns = Turns(bundle.manifest, bundle.tokenizer, QUESTION)
    locate, micro = turns.locate("w").tokens, turns.micro("w", "c", BOX).tokens
    held = [*locate, *result.located.tokens[:-1]]
    kept = common_prefix(held, micro)
    assert len(locate) < kept < len(held)
    # the row was cut behind `kept`, and the next token is the reply's: its probability is asked for
    assert result.counters.tokens_reused == kept - 1
    assert result.counters.tokens_prefilled == len(locate) + len(micro) - (kept - 1)


def test_a_second_question_starts_behind_the_picture(picture):
    bundle = fakes.make_bundle(script(spelled(BOX)))
    runner = FocusRunner(bundle)
    runner.ask(picture, QUESTION)
    second = runner.ask(picture, "What else?", "macro")
    prompt = Turns(bundle.manifest, bundle.tokenizer, "What else?").macro("w").tokens
    image_ends = max(i for i, token in enumerate(prompt) if isinstance(token, ImageToken))
    assert second.counters.vision_encodes == 0
    assert second.counters.tokens_reused > image_ends
    assert runner.ask(picture, QUESTION).counters.vision_encodes == 0  # the crop is remembered too


def test_an_equal_pair_is_not_scored(picture):
    bundle = fakes.make_bundle(script(spelled(BOX), macro="AB7", micro="AB7."))
    for runner in (FocusRunner(bundle), PlainRunner(bundle)):
        result = runner.ask(picture, QUESTION)
        assert result.macro.text == result.micro.text == "AB7"
        assert result.macro.loss is result.micro.loss is None
        assert result.chosen == "macro"
        assert "select" not in result.times_ms


@pytest.mark.parametrize("reply", ["none", "[0.6, 0.7, 0.1, 0.2]", "[0.00, 0.00, 0.00, 0.00]"])
@pytest.mark.parametrize("mode", ["dual", "micro"])
def test_without_a_crop_the_answer_is_macro(picture, reply, mode):
    bundle = fakes.make_bundle(script(spelled(reply)))
    for runner in (FocusRunner(bundle), PlainRunner(bundle)):
        result = runner.ask(picture, QUESTION, mode)
        assert (result.answer, result.chosen, result.micro, result.crop) == ("a sta", "macro", None, None)
        assert reply in result.fallback
        assert (result.box is None) == (reply == "none")


def test_the_lower_loss_wins_and_the_rules_can_disagree():
    def answer(text: str, loss: float | None) -> Answer:
        return Answer(text, Generation(text, (1,), (-1.0,)), loss)

    def chosen(macro: float | None, micro: float | None) -> str:
        from dualfocus.runtime.geometry import Region

        pair = answer("a", macro), None, Region(), answer("b", micro)
        return FocusResult.conclude(*pair, Counters(), {}).answer

    assert chosen(2.0, 1.0) == "b"
    assert chosen(1.0, 2.0) == "a"
    assert chosen(1.0, 1.0) == "a"
    assert chosen(None, None) == "a"


def test_rules():
    from dualfocus.runtime.selection import loss

    box, short, long = [-1.0] * 20, [-3.0], [-2.0] * 5
    assert loss(box, short, "reference") == pytest.approx(23 / 21)
    assert loss(box, long, "reference") == pytest.approx(30 / 25)
    assert loss(box, short, "answer") == 3
    assert loss(box, long, "answer") == 2  # and so the other one wins


def test_a_reply_ends_at_the_manifests_length(picture):
    bundle = fakes.make_bundle(max_new_tokens=3)
    for runner in (FocusRunner(bundle), PlainRunner(bundle)):
        result = runner.ask(picture, QUESTION, "macro")
        assert len(result.macro.generation.tokens) <= 3


@pytest.mark.parametrize("runner", [FocusRunner, PlainRunner])
def test_what_cannot_fit_is_refused_before_anything_is_computed(picture, runner):
    bundle = fakes.make_bundle()
    for question in ("", " \n ", "word " * 2000):
        with pytest.raises(QuestionError):
            runner(bundle).ask(picture, question)
    assert bundle.decoder.calls == 0


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["What?", "What else?", "Why"])), max_size=6)
)
def test_any_order_of_pictures_and_questions_is_answered_as_if_alone(asked):
    bundle = fakes.make_bundle(script(spelled(BOX)))
    rng = np.random.default_rng(0)
    pictures = {name: rng.integers(0, 256, (50, 70, 3), np.uint8) for name in "ab"}
    runner, plain = FocusRunner(bundle), PlainRunner(bundle)
    for name, question in asked:
        same(runner.ask(pictures[name], question), plain.ask(pictures[name], question))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50 * 70 * 3 - 1), st.integers(1, 255))
def test_one_changed_byte_is_another_picture(at, by):
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    changed = picture.copy()
    changed.flat[at] ^= np.uint8(by)
    assert image_name(picture, "model") != image_name(changed, "model")
    assert image_name(picture, "model") == image_name(picture.copy(), "model")


def test_shape_and_model_are_part_of_a_pictures_name(picture):
    assert image_name(picture, "a") != image_name(picture, "b")
    assert image_name(picture, "a") != image_name(picture.reshape(320, 240, 3), "a")
    assert image_name(picture[:, ::-1], "a") != image_name(picture, "a")
    assert image_name(picture[:, ::2], "a") == image_name(picture[:, ::2].copy(), "a")


def test_a_different_picture_never_hits(picture):
    bundle = fakes.make_bundle(script(spelled(BOX)))
    runner = FocusRunner(bundle)
    runner.ask(picture, QUESTION)
    prompt = Turns(bundle.manifest, bundle.tokenizer, QUESTION).macro("w").tokens
    image_begins = next(i for i, token in enumerate(prompt) if isinstance(token, ImageToken))
    other = picture.copy()
    other[-1, -1, -1] ^= 1
    for different in (other, picture.reshape(320, 240, 3)):
        counters = runner.ask(different, QUESTION, "macro").counters
        assert counters.vision_encodes == 1
        assert counters.tokens_reused == image_begins
        same(runner.ask(different, QUESTION), PlainRunner(bundle).ask(different, QUESTION))


def test_two_boxes_on_a_picture_are_two_crops(picture):
    bundle = fakes.make_bundle(script(spelled(BOX)))
    runner = FocusRunner(bundle)
    for reply, encodes in ((BOX, 2), ("[0.50, 0.50, 0.90, 0.90]", 1), (BOX, 0)):
        result = runner.ask(picture, QUESTION, box_reply=reply)
        same(result, PlainRunner(bundle).ask(picture, QUESTION, box_reply=reply))
        assert result.counters.vision_encodes == encodes


@contextmanager
def interrupted(decoder: fakes.FakeDecoder, call: int, *, late: bool):
    """Ctrl-C at the decoder's `call`-th call from now, before or after it has written to the cache."""
    extend = decoder.extend
    stop = decoder.calls + call

    def stopping(*args: object) -> np.ndarray:
        if decoder.calls == stop:
            if late:
                extend(*args)
            raise KeyboardInterrupt
        return extend(*args)

    decoder.extend = stopping
    with pytest.raises(KeyboardInterrupt):
        yield
    decoder.extend = extend


@pytest.mark.parametrize("call", [0, 2, 5, 9, 12])
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_question_leaves_nothing_stale(picture, call, late):
    bundle = fakes.make_bundle(script(spelled(BOX)))
    runner = FocusRunner(bundle)
    with interrupted(bundle.decoder, call, late=late):
        runner.ask(picture, QUESTION)
    for question in ("What else?", QUESTION):
        same(runner.ask(picture, question), PlainRunner(bundle).ask(picture, question))


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_prefill_leaves_nothing_stale(late):
    bundle = fakes.make_bundle()
    spec = bundle.manifest.decoder
    sequence = CachedSequence(bundle.decoder, KVCache(spec, 1, 16), 0, bundle.embeddings)
    sequence.extend_to(Prompt((3, 4, 5, 6), ()), {}, Counters())
    with interrupted(bundle.decoder, 0, late=late):
        sequence.extend_to(Prompt((3, 4, 7, 7), ()), {}, Counters())
    sequence.extend_to(Prompt((3, 4, 8), (range(2, 3),)), {}, Counters())
    logits = bundle.decoder.extend(KVCache(spec, 1, 16), 0, embed([3, 4], bundle.embeddings, {}), [1])
    assert sequence.logprobs(range(2, 3)) == pytest.approx([log_softmax(logits)[0][8]], abs=1e-6)


def test_a_picture_changed_in_place_is_another_picture(picture):
    bundle = fakes.make_bundle(script(spelled(BOX)))
    runner = FocusRunner(bundle)
    runner.ask(picture, QUESTION)
    picture[:] = 255 - picture
    same(runner.ask(picture, QUESTION), PlainRunner(bundle).ask(picture, QUESTION))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(3, 6), min_size=2, max_size=12),  # few tokens, so that prefixes are common
            st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), max_size=2),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_cached_sequence_equals_recomputation(steps):
    bundle = fakes.make_bundle()
    spec = bundle.manifest.decoder
    sequence = CachedSequence(bundle.decoder, KVCache(spec, 2, spec.context), 1, bundle.embeddings)
    counters = Counters()
    for tokens, spans, appended in steps:
        ends = [(start, min(start + length, len(tokens))) for start, length in spans]
        replies = tuple(range(start, stop) for start, stop in ends if start < stop)
        sequence.extend_to(Prompt(tuple(tokens), replies), {}, counters)
        for _ in range(appended):
            tokens = [*tokens, int(np.argmax(sequence.next))]
            sequence.append(tokens[-1])
        logits = bundle.decoder.extend(
            KVCache(spec, 1, spec.context), 0, embed(tokens, bundle.embeddings, {}), range(len(tokens))
        )
        expected = log_softmax(logits)
        np.testing.assert_allclose(sequence.next, expected[-1], atol=1e-6)
        for reply in replies:
            wanted = [expected[at - 1][tokens[at]] for at in reply]
            np.testing.assert_allclose(sequence.logprobs(reply), wanted, atol=1e-6)
    assert counters.tokens_reused + counters.tokens_prefilled == sum(len(tokens) for tokens, _, _ in steps)


def test_a_stale_entry_is_noticed():
    """The made-up decoder is worth something: one wrong entry in the cache changes what it says."""
    bundle = fakes.make_bundle()
    spec = bundle.manifest.decoder
    tokens = [5, 6, 7, 8, 9]
    logits = []
    for stale in (None, 2):
        cache = KVCache(spec, 1, 16)
        bundle.decoder.extend(cache, 0, embed(tokens[:4], bundle.embeddings, {}), [3])
        if stale is not None:
            cache.keys[0][0, 0, stale] += 1e-2
        logits.append(bundle.decoder.extend(cache, 0, embed(tokens[4:], bundle.embeddings, {}), [0]))
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


@pytest.mark.parametrize("rule", ["reference", "answer"])
def test_reuse_changes_nothing_in_onnx_runtime(tiny_bundle, rule):
    bundle = Bundle.open(tiny_bundle, threads=1)
    fast, plain = FocusRunner(bundle, select=rule), PlainRunner(bundle, select=rule)
    rng = np.random.default_rng(11)
    for size in ((90, 160), (160, 90), (64, 64)):
        picture = rng.integers(0, 256, (*size, 3), np.uint8)
        for question in ("What is it?", "Where?\nA. here\nB. there"):
            for reply in (BOX, "[0.5, 0.5, 0.9, 0.6]", None):
                ours = fast.ask(picture, question, box_reply=reply)
                theirs = plain.ask(picture, question, box_reply=reply)
                same(ours, theirs)
                same_work(ours.counters, theirs.counters)


def test_the_runtime_imports_neither_torch_nor_an_engine():
    unwanted = {"torch", "onnxruntime", "dualfocus.export"}
    code = f"import sys, dualfocus.runtime; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
