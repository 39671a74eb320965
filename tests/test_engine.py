"""The engine on a made-up model: the reference's answers, nothing stale, and the work that was predicted."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import fakes
import numpy as np
import pytest
from equality import Pair, same
from hypothesis import given, settings
from hypothesis import strategies as st

from dualfocus.bench.savings import leaving_out
from dualfocus.runtime import Bundle, DualFocus, Engine, Reference
from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.geometry import Region
from dualfocus.runtime.manifest import DecoderSpec, ImageSpec, TokenSpec
from dualfocus.runtime.protocol import focus
from dualfocus.runtime.request import Request
from dualfocus.runtime.result import Answer, Counters, FocusResult, Generation, ReplyToken, Stage
from dualfocus.runtime.selection import loss
from dualfocus.runtime.sequence import common_prefix
from dualfocus.runtime.turns import DUALFOCUS, GQA_MCQ, MMBENCH, SEED, ImageToken, Question, Turns, Wording
from dualfocus.runtime.work import Score, Steps, Task

BOX = "[0.10, 0.20, 0.60, 0.70]"
QUESTION = "What is written on the red star?"
CHOICE = Question("What animal?", "What animal?\nA. cat\nB. red dog\nC. cat", ("cat", "red dog", "cat"))
QUESTIONS = [QUESTION, "What else?", QUESTION, CHOICE, "Why\nA. so\nB. not"]
TOKENIZER = fakes.make_tokenizer()


def spelled(text: str) -> list[int]:
    """The tokenizer's spelling of a reply, its end included."""
    return [*TOKENIZER.encode(" " + text).ids, fakes.EOS]


def spelled_out(text: str) -> list[int]:
    """Another spelling of the same reply: from its first comma on, character by character."""
    head, comma, tail = (" " + text).partition(",")
    characters = (TOKENIZER.encode(character).ids[0] for character in comma + tail)
    return [*TOKENIZER.encode(head).ids, *characters, fakes.EOS]


def script(box: list[int], macro: str = "a sta", micro: str = "AB7.") -> dict[str, list[int]]:
    return {
        "bounding box coordinate of the region this question asks: What": box,
        "combine the information": spelled(micro),
        "\nWhat": spelled(macro),
    }


def make(**changes: object) -> Bundle:
    return fakes.make_bundle(script(spelled(BOX)), **changes)


FAKE = make()


@pytest.fixture
def bundle() -> Bundle:
    """A model that names `BOX` and whose passes disagree."""
    return make()


def generations(result: FocusResult) -> dict[str, Generation]:
    said = {"macro": result.macro, "locate": result.located, "micro": result.micro}
    return {name: getattr(g, "generation", g) for name, g in said.items() if g is not None}


class Checked:
    """A model whose every answer is held against the reference's, both with the grammar or both without."""

    def __init__(self, bundle: Bundle, *, free_box: bool = False, **options: object) -> None:
        self.bundle = bundle
        self.fast = DualFocus(bundle, free_box=free_box, **({"slots": 2} | options))
        self.plain = Reference(bundle, free_box=free_box, select=options.get("select"))

    def ask(
        self, picture: np.ndarray, question: str | Question, mode: str = "dual", box: str | None = None
    ) -> FocusResult:
        images = self.bundle.vision.images
        fast = self.fast.ask(picture, question, mode, box_reply=box)
        assert fast.counters.vision_encodes == self.bundle.vision.images - images
        self.compare(picture, question, fast, mode, box)
        return fast

    def compare(
        self,
        picture: np.ndarray,
        question: str | Question,
        fast: FocusResult,
        mode: str = "dual",
        box: str | None = None,
    ) -> None:
        plain = self.plain.ask(picture, question, mode, box_reply=box)
        same(Pair(picture, question, box), fast, plain, self.bundle, alike=True)
        ours, theirs = fast.counters, plain.counters
        assert ours.tokens_prefilled + ours.tokens_reused == theirs.tokens_prefilled
        assert ours.decode_steps <= theirs.decode_steps
        assert ours.decode_steps <= ours.decode_rows <= theirs.decode_rows
        assert ours.tokens_accepted <= ours.tokens_drafted
        assert theirs.tokens_reused == theirs.tokens_forced == theirs.tokens_drafted == 0


# Equality


@pytest.mark.parametrize("rule", ["reference", "answer"])
@pytest.mark.parametrize("mode", ["dual", "macro", "micro"])
@pytest.mark.parametrize("spell", [spelled, spelled_out])
def test_nothing_changes_an_answer(picture, rule, mode, spell):
    """A reply that is not spelled canonically is one only a free box can give."""
    bundle = fakes.make_bundle(script(spell(BOX)))
    checked = Checked(bundle, select=rule, free_box=spell is spelled_out)
    for question in QUESTIONS:
        result = checked.ask(picture, question, mode)
        if mode != "macro" and question == QUESTION:
            assert result.located.text == BOX
            assert result.located.tokens == tuple(spell(BOX))


LEFT_OUT = [left for many in range(4) for left in combinations(("batch", "forced", "draft"), many)]


@pytest.mark.parametrize("left_out", LEFT_OUT, ids="+".join)
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("cache_mb", [0, 512])
def test_no_saving_changes_an_answer(picture, bundle, left_out, slots, chunk, cache_mb):
    engine = Engine(bundle, slots=slots, chunk=chunk, cache_mb=cache_mb)
    plain = Reference(bundle, free_box=False)
    for question in QUESTIONS:
        for shown in (picture, picture[::-1]):
            expected = plain.ask(shown, question)
            images = bundle.vision.images
            fast = engine.run(engine.submit(shown, question, leaving_out(left_out)))
            same(Pair(shown, question), fast, expected, bundle, alike=True)
            assert fast.counters.vision_encodes == bundle.vision.images - images


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(QUESTIONS)), max_size=7),
    st.integers(1, 4),
    st.sampled_from([0, 0.02, 512]),
)
def test_any_order_of_pictures_and_questions_is_answered_as_if_alone(asked, batch, cache_mb):
    bundle = FAKE
    rng = np.random.default_rng(0)
    pictures = {name: rng.integers(0, 256, (50, 70, 3), np.uint8) for name in "abc"}
    one, many = (Checked(bundle, cache_mb=cache_mb, slots=2 * size) for size in (1, batch))
    results = list(many.fast.ask_many([(pictures[name], question) for name, question in asked]))
    for (name, question), result in zip(asked, results, strict=True):
        many.compare(pictures[name], question, result)
        one.ask(pictures[name], question)


def test_a_picture_changed_in_place_is_another_picture(picture, bundle):
    checked = Checked(bundle)
    before = checked.ask(picture, QUESTION)
    picture[:] = 255 - picture
    assert checked.ask(picture, QUESTION).macro.generation.logprobs != before.macro.generation.logprobs


def test_a_sessions_picture_stays_what_it_was(picture, bundle):
    checked = Checked(bundle)
    original = picture.copy()
    session = checked.fast.session(picture)
    picture[:] = 0
    for question in QUESTIONS:
        checked.compare(original, question, session.ask(question))


def test_a_different_picture_never_hits(picture, bundle):
    checked = Checked(bundle)
    checked.ask(picture, QUESTION)
    prompt = Turns(bundle.manifest, bundle.tokenizer, QUESTION).macro("w").tokens
    image_begins = next(i for i, token in enumerate(prompt) if isinstance(token, ImageToken))
    other = picture.copy()
    other[-1, -1, -1] ^= 1
    for different in (other, picture.reshape(320, 240, 3)):
        counters = checked.ask(different, QUESTION, "macro").counters
        assert counters.vision_encodes == 1
        assert counters.tokens_reused == image_begins
        checked.ask(different, QUESTION)


def test_two_boxes_on_a_picture_are_two_crops(picture, bundle):
    checked = Checked(bundle)
    for box, encodes in ((BOX, 2), ("[0.50, 0.50, 0.90, 0.90]", 1), (BOX, 0)):
        assert checked.ask(picture, QUESTION, box=box).counters.vision_encodes == encodes


def test_an_equal_pair_is_not_scored(picture):
    bundle = fakes.make_bundle(script(spelled(BOX), macro="AB7", micro="AB7."))
    result = Checked(bundle).ask(picture, QUESTION)
    assert result.macro.text == result.micro.text == "AB7"
    assert result.macro.loss is result.micro.loss is None
    assert result.chosen == "macro"
    assert "select" not in result.times_ms


@pytest.mark.parametrize("reply", ["none", "[0.6, 0.7, 0.1, 0.2]", "[0.00, 0.00, 0.00, 0.00]"])
@pytest.mark.parametrize("mode", ["dual", "micro"])
@pytest.mark.parametrize("given", [False, True])
def test_without_a_crop_the_answer_is_macro(picture, reply, mode, given):
    bundle = fakes.make_bundle(script(spelled(reply)))
    checked = Checked(bundle, free_box=True)
    result = checked.ask(picture, QUESTION, mode, reply if given else None)
    assert (result.answer, result.chosen, result.micro, result.crop) == ("a sta", "macro", None, None)
    assert reply in result.fallback
    assert (result.box is None) == (reply == "none")


def test_under_the_grammar_every_reply_is_a_box(picture):
    bundle = fakes.make_bundle(script(spelled("none")))
    result = Checked(bundle).ask(picture, QUESTION)
    assert result.box is not None
    assert bundle.manifest.box.write(*(float(n) for n in result.located.text.strip("[]").split(", "))) == (
        result.located.text
    )


@pytest.mark.parametrize("most", [1, 3, 7, *(len(spelled(BOX)) - short for short in (3, 2, 1, 0))])
def test_a_reply_ends_at_the_manifests_length(picture, most):
    """In the middle of a box or of a draft, too."""
    checked = Checked(make(max_new_tokens=most))
    for question in QUESTIONS:
        result = checked.ask(picture, question)
        assert all(len(generation.tokens) <= most for generation in generations(result).values())
    result = checked.ask(picture, QUESTION, box=BOX)
    assert result.micro is not None
    assert result.macro.generation.tokens == tuple(spelled("a sta")[:most])


def test_a_draft_ends_where_the_context_does(picture):
    """With box replies ever longer, until there is no room for the micro answer and then for its prompt."""
    bundle = fakes.make_bundle(script(spelled(BOX), macro="AB7", micro="AB7"))
    checked = Checked(bundle)
    turns = Turns(bundle.manifest, bundle.tokenizer, QUESTION)
    word = " the"  # one token
    room = bundle.manifest.decoder.context - len(turns.micro("w", "c", BOX).tokens)
    said = set()
    for words in range(room - len(spelled("AB7")) - 1, room + 2):
        result = checked.ask(picture, QUESTION, box=BOX + words * word)
        said.add(result.micro and result.micro.text)
        if result.micro is None:  # a reply whose history does not fit is no use, as one without a box
            assert "too long" in result.fallback
            assert (result.chosen, result.answer) == ("macro", "AB7")
    assert said == {"AB7", "AB", "A", "", None}


def test_what_was_said_may_be_too_long_to_be_scored(picture):
    """The select turn is longer than the micro turn: there is a micro answer, but no room to compare it."""
    bundle = fakes.make_bundle(script(spelled(BOX)))
    checked = Checked(bundle)
    turns = Turns(bundle.manifest, bundle.tokenizer, QUESTION)
    longest = max(len(turns.select("w", "c", BOX, text).tokens) for text in ("a sta", "AB7"))
    room = bundle.manifest.decoder.context - longest
    scored = []
    for words in (room - 1, room, room + 1):
        result = checked.ask(picture, QUESTION, box=BOX + words * " the")
        assert (result.macro.text, result.micro.text) == ("a sta", "AB7")
        scored.append(result.macro.loss is not None)
        assert (result.micro.loss is not None) == scored[-1]
        assert scored[-1] or result.chosen == "macro"
    assert scored == [True, True, False]


@pytest.mark.parametrize("runner", [DualFocus, Reference])
def test_what_cannot_fit_is_refused_before_anything_is_computed(picture, bundle, runner):
    for question in ("", " \n ", "word " * 2000):
        with pytest.raises(QuestionError):
            runner(bundle).ask(picture, question)
    assert bundle.decoder.calls == bundle.vision.images == 0


def test_the_lower_loss_wins():
    def answer(text: str, loss: float | None) -> Answer:
        return Answer(text, Generation(text, (1,), (-1.0,)), loss)

    def chosen(macro: float | None, micro: float | None) -> str:
        return FocusResult.conclude(answer("a", macro), None, Region(), answer("b", micro)).answer

    assert chosen(2.0, 1.0) == "b"
    assert chosen(1.0, 2.0) == "a"
    assert chosen(1.0, 1.0) == "a"
    assert chosen(None, None) == "a"


# Multiple choice


def choice(macro: str, micro: str, box: str = BOX) -> Bundle:
    """A model whose passes say that of `CHOICE`, however worded, and whose scores lean to nothing."""
    replies = {"this question asks": box, "question: What animal?\nA.": micro, "\nWhat animal?\nA.": macro}
    return fakes.make_bundle({mark: spelled(reply) for mark, reply in replies.items()})


@pytest.mark.parametrize("wording", [Wording(), SEED, GQA_MCQ, MMBENCH])
@pytest.mark.parametrize("rule", ["reference", "answer"])
@pytest.mark.parametrize("macro", ["A", "B. red dog"])
def test_two_letters_are_scored_by_their_options(picture, wording, rule, macro):
    """Whoever says which of them, the same option has the lower loss."""
    question = replace(CHOICE, wording=wording)
    micro = "B" if macro == "A" else "a."
    result = Checked(choice(macro, micro), select=rule).ask(picture, question)
    other = Checked(choice(micro, macro), select=rule).ask(picture, question)
    assert (result.macro.text, result.micro.text) == (macro, micro.removesuffix("."))
    assert {result.macro.letter, result.micro.letter} == {"A", "B"}
    assert result.answer == other.answer == min((result.macro, result.micro), key=lambda a: a.loss).letter
    assert {result.chosen, other.chosen} == {"macro", "micro"}
    assert result.macro.loss == pytest.approx(other.micro.loss, abs=1e-5)
    assert result.micro.loss == pytest.approx(other.macro.loss, abs=1e-5)


@pytest.mark.parametrize(
    ("macro", "micro", "answer", "chosen"),
    [
        ("none", "B.", "B", "micro"),
        ("b", "none", "B", "macro"),
        ("none", "no", "none", "macro"),
        ("D", "red.", "B", "micro"),  # there is no option D
        ("B", "red dog.", "B", "macro"),
        ("A", "C", "A", "macro"),  # other letters of the same text
        ("C", "A", "C", "macro"),
    ],
)
def test_what_needs_no_scoring_is_not_scored(picture, macro, micro, answer, chosen):
    result = Checked(choice(macro, micro)).ask(picture, CHOICE)
    assert (result.answer, result.chosen) == (answer, chosen)
    assert (result.macro.text, result.micro.text) == (macro, micro.removesuffix("."))
    assert result.macro.loss is result.micro.loss is None
    assert "select" not in result.times_ms


def test_without_a_crop_a_choice_is_macros(picture):
    for macro, answer in (("b", "B"), ("none", "none")):
        result = Checked(choice(macro, "A", "none"), free_box=True).ask(picture, CHOICE)
        assert (result.answer, result.chosen, result.micro) == (answer, "macro", None)


@pytest.mark.parametrize(("mode", "answer"), [("macro", "B"), ("micro", "A")])
def test_a_pass_alone_names_its_option(picture, mode, answer):
    result = Checked(choice("red dog", "A.")).ask(picture, CHOICE, mode)
    assert (result.answer, result.chosen) == (answer, mode)


@pytest.mark.parametrize("left_out", LEFT_OUT, ids="+".join)
@pytest.mark.parametrize("wording", [GQA_MCQ, MMBENCH])
def test_no_saving_changes_a_choice(picture, left_out, wording):
    bundle = choice("A", "B.")
    model, plain = DualFocus(bundle), Reference(bundle, free_box=False)
    for question in (replace(CHOICE, wording=wording), QUESTION, replace(CHOICE, context="A farm.")):
        fast = model.submit(picture, question, leaving_out(left_out)).result()
        assert fast.macro.loss is not None
        same(Pair(picture, question), fast, plain.ask(picture, question), bundle, alike=True)


def test_choices_side_by_side_and_in_a_stream(picture):
    bundle = choice("A", "B.")
    checked = Checked(bundle, slots=6)
    wordings = (Wording(), SEED, GQA_MCQ, MMBENCH)
    asked = [(picture, replace(CHOICE, wording=wording)) for wording in wordings] + [(picture, QUESTION)]
    for (_, question), result in zip(asked, checked.fast.ask_many(asked), strict=True):
        checked.compare(picture, question, result)
    *_, result = checked.fast.stream(picture, asked[3][1])
    checked.compare(picture, asked[3][1], result)
    checked.compare(picture, CHOICE, checked.fast.session(picture).ask(CHOICE))


def test_a_choice_costs_what_an_open_question_does_and_its_options(picture):
    """The select turns are computed from where they part from the micro turn, and from each other."""
    bundle = choice("A", "B")
    result = Checked(bundle).ask(picture, CHOICE)
    turns = Turns(bundle.manifest, bundle.tokenizer, CHOICE)
    macro, locate = turns.macro("w").tokens, turns.locate("w").tokens
    micro = turns.micro("w", "c", BOX).tokens
    options = [turns.select("w", "c", BOX, text).tokens for text in ("cat", "red dog")]
    begins, shared = common_prefix(micro, options[0]), common_prefix(*options)
    assert 2 * fakes.IMAGE_TOKENS < begins < shared
    scored = shared - begins + sum(len(option) - 1 - shared for option in options)
    least = len(macro) + len(locate) - common_prefix(macro, locate) + scored
    least += len(micro) - len(locate) - len(result.located.tokens)
    assert result.counters.vision_encodes == 2
    assert least <= result.counters.tokens_prefilled <= least + 4


def test_the_rules_can_disagree():
    box, short, long = [-1.0] * 20, [-3.0], [-2.0] * 5
    assert loss(box, short, "reference") == pytest.approx(23 / 21)
    assert loss(box, long, "reference") == pytest.approx(30 / 25)
    assert loss(box, short, "answer") == 3
    assert loss(box, long, "answer") == 2  # and so the other one wins


# What is left half done


def run_all(engine: Engine, requests: list[Request]) -> list[FocusResult]:
    return [engine.run(request) for request in requests]


def calls_of(asked: list[tuple[np.ndarray, str]]) -> int:
    """How many times a new bundle's decoder is called for all that is `asked`."""
    bundle = make()
    engine = Engine(bundle, slots=6)
    run_all(engine, [engine.submit(*one, focus) for one in asked])
    return bundle.decoder.calls


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_an_interrupted_engine_holds_nothing_stale(picture, late, several):
    """At every single call of the decoder."""
    asked = [(picture, QUESTION), (picture[::-1], QUESTION), (picture, "What else?")][: 3 if several else 1]
    for call in range(calls_of(asked)):
        bundle = make()
        engine, plain = Engine(bundle, slots=6), Reference(bundle, free_box=False)
        with fakes.interrupted(bundle.decoder, call, late=late):
            requests = [engine.submit(*one, focus) for one in asked]
            run_all(engine, requests)
        assert engine.idle
        assert len(engine.prefixes.free) == 6
        for request in requests:
            assert request.done
        for one, result in zip(
            asked[::-1], run_all(engine, [engine.submit(*one, focus) for one in asked[::-1]]), strict=True
        ):
            same(Pair(*one), result, plain.ask(*one), bundle, alike=True)


def test_a_stream_that_is_left_is_cancelled_and_in_nobodys_way(picture, bundle):
    """At every single event."""
    events = len(list(DualFocus(bundle).stream(picture, QUESTION)))
    checked = Checked(bundle)
    for read in range(1, events):
        stream = checked.fast.stream(picture, QUESTION)
        for _ in zip(range(read), stream, strict=False):
            pass
        other = checked.fast.ask(picture[::-1], "What else?")
        checked.compare(picture[::-1], "What else?", other)
        stream.close()
        checked.compare(picture, QUESTION, checked.fast.ask(picture, QUESTION))
    assert checked.fast._worker._engine.idle


def test_streams_may_be_read_in_turn(picture, bundle):
    checked = Checked(bundle, slots=4)
    asked = [(picture, QUESTION), (picture[::-1], QUESTION), (picture, "What else?")]
    streams = [checked.fast.stream(*one) for one in asked]
    last: list[object] = [None] * 3
    while streams_left := [at for at in range(3) if not isinstance(last[at], FocusResult)]:
        for at in streams_left:
            last[at] = next(streams[at])
    for one, result in zip(asked, last, strict=True):
        checked.compare(*one, result)


def test_a_stream_tells_what_ask_returns(picture, bundle):
    *events, result = DualFocus(bundle).stream(picture, QUESTION)
    assert result == DualFocus(bundle).ask(picture, QUESTION)
    for name, generation in generations(result).items():
        told = [event for event in events if isinstance(event, ReplyToken) and event.reply == name]
        assert tuple(event.token for event in told) == generation.tokens
        assert "".join(event.text for event in told).strip() == generation.text
    regions = [event for event in events if isinstance(event, Region)]
    assert [(region.box, region.crop) for region in regions] == [(result.box, result.crop)]
    stages = [event.name for event in events if isinstance(event, Stage)]
    assert list(dict.fromkeys(stages)) == [stage for stage in result.times_ms if stage != "total"]
    assert stages[-1] == "select"


# What it costs


def spent_on_scores(bundle: Bundle, picture: np.ndarray) -> tuple[int, int]:
    """Ask `QUESTION`: how many calls and tokens of the decoder its scores take."""
    seen = bundle.decoder.calls, bundle.decoder.tokens

    def protocol(task: Task) -> Steps[FocusResult]:
        nonlocal seen
        steps = focus(task)
        work = next(steps)
        while True:
            if any(isinstance(item, Score) for item in work):
                seen = bundle.decoder.calls, bundle.decoder.tokens
            try:
                work = steps.send((yield work))
            except StopIteration as end:
                return end.value

    engine = Engine(bundle)
    engine.run(engine.submit(picture, QUESTION, protocol))
    return bundle.decoder.calls - seen[0], bundle.decoder.tokens - seen[1]


def test_a_first_question_costs_what_the_protocol_predicts(picture, bundle):
    result = Checked(bundle).ask(picture, QUESTION)
    turns = Turns(bundle.manifest, bundle.tokenizer, QUESTION)
    macro, locate = turns.macro("w").tokens, turns.locate("w").tokens
    micro = turns.micro("w", "c", BOX).tokens
    candidates = [turns.select("w", "c", BOX, text).tokens for text in ("a sta", "AB7")]
    assert (result.macro.text, result.located.text, result.micro.text) == ("a sta", BOX, "AB7")

    begins = common_prefix(macro, locate)  # system, USER: and the image
    select_begins = common_prefix(micro, candidates[0])
    shared = common_prefix(*candidates)
    assert begins > fakes.IMAGE_TOKENS
    assert select_begins > 2 * fakes.IMAGE_TOKENS
    assert result.counters.vision_encodes == 2
    # candidates' last tokens, their ends, are judged and not fed
    scored = (shared - select_begins) + sum(len(candidate) - 1 - shared for candidate in candidates)
    assert spent_on_scores(bundle, picture)[1] == scored
    # the micro prompt goes on from what was decoded of the box
    least = (
        len(macro) + (len(locate) - begins) + (len(micro) - len(locate) - len(result.located.tokens)) + scored
    )
    assert least <= result.counters.tokens_prefilled <= least + 4

    plain = Reference(bundle).ask(picture, QUESTION).counters
    assert (plain.vision_encodes, plain.tokens_prefilled) == (
        8,
        sum(map(len, (macro, locate, micro, *candidates))),
    )


def test_the_counters_are_what_the_engines_did(picture, bundle):
    """Every token that the decoder was given is one that the counters know of."""
    for question in QUESTIONS:
        runner = DualFocus(bundle)
        calls, fed = bundle.decoder.calls, bundle.decoder.tokens
        result = runner.ask(picture, question)
        calls, fed = bundle.decoder.calls - calls, bundle.decoder.tokens - fed
        counters = result.counters
        prompts = 3 + 2 * (
            result.macro.loss is not None
        )  # macro, locate, micro; shared and parted candidates
        assert counters.decode_steps < calls <= counters.decode_steps + prompts
        replies = sum(len(generation.tokens) for generation in generations(result).values())
        rejected = counters.tokens_drafted - counters.tokens_accepted
        assert fed <= counters.tokens_prefilled + replies + rejected
        assert fed >= counters.tokens_prefilled + counters.decode_rows


def test_rows_decode_together_and_a_row_that_ended_costs_nothing(picture, bundle):
    engine = Engine(bundle)
    result = engine.run(engine.submit(picture, QUESTION, leaving_out({"forced", "draft"})))
    macro, locate, micro = (len(generation.tokens) - 1 for generation in generations(result).values())
    assert result.counters.decode_steps == max(macro, locate) + micro
    assert result.counters.decode_rows == macro + locate + micro
    engine = Engine(bundle)
    apart = engine.run(engine.submit(picture, QUESTION, leaving_out({"forced", "draft", "batch"})))
    assert apart.counters.decode_steps == apart.counters.decode_rows == macro + locate + micro


def test_what_is_forced_or_drafted_is_not_decoded(picture):
    bundle = fakes.make_bundle(script(spelled(BOX), macro="AB7.", micro="AB7."))

    def counters(*left_out: str) -> Counters:
        engine = Engine(bundle)
        return engine.run(engine.submit(picture, QUESTION, leaving_out(left_out))).counters

    free, forced, drafted = counters("forced", "draft"), counters("draft"), counters("forced")
    reply = len(spelled("AB7."))
    assert free.tokens_forced == free.tokens_drafted == 0
    assert forced.tokens_forced > 0
    assert forced.decode_steps < free.decode_steps
    assert drafted.tokens_drafted == drafted.tokens_accepted == reply
    assert drafted.decode_rows == free.decode_rows - (reply - 1)


def test_a_draft_that_is_departed_from_is_cut(picture):
    bundle = fakes.make_bundle(script(spelled(BOX), macro="AB8", micro="AB7."))
    model = DualFocus(bundle)
    result = model.submit(picture, QUESTION, leaving_out({"forced"})).result()
    same(Pair(picture, QUESTION), result, Reference(bundle).ask(picture, QUESTION), bundle)
    agreed = common_prefix(spelled("AB8"), spelled("AB7."))
    assert 0 < agreed < len(spelled("AB8"))
    assert result.counters.tokens_accepted == agreed
    assert result.counters.tokens_drafted == len(spelled("AB8"))


def test_a_box_spelled_differently_is_computed_again_from_where_the_spellings_part(picture):
    bundle = fakes.make_bundle(script(spelled_out(BOX)))
    result = Checked(bundle, free_box=True).ask(picture, QUESTION, "micro")
    turns = Turns(bundle.manifest, bundle.tokenizer, QUESTION)
    locate, micro = turns.locate("w").tokens, turns.micro("w", "c", BOX).tokens
    held = [*locate, *result.located.tokens[:-1]]
    kept = common_prefix(held, micro)
    assert len(locate) < kept < len(held)
    assert kept - 1 <= result.counters.tokens_reused <= kept
    assert result.counters.tokens_prefilled == len(locate) + len(micro) - result.counters.tokens_reused


def test_a_second_question_starts_behind_the_picture(picture, bundle):
    checked = Checked(bundle)
    checked.ask(picture, QUESTION)
    prompt = Turns(bundle.manifest, bundle.tokenizer, "What else?").macro("w").tokens
    image_ends = max(i for i, token in enumerate(prompt) if isinstance(token, ImageToken))
    second = checked.ask(picture, "What else?", "macro").counters
    assert second.vision_encodes == 0
    assert second.tokens_reused > image_ends
    assert checked.ask(picture, QUESTION).counters.vision_encodes == 0  # the crop is remembered too


def test_the_same_question_again_costs_less(picture, bundle):
    checked = Checked(bundle)
    first, second = (checked.ask(picture, QUESTION).counters for _ in range(2))
    assert second.vision_encodes == 0
    assert second.tokens_prefilled < first.tokens_prefilled


def test_alternating_pictures_are_remembered(picture, bundle):
    """Four pictures in turn, and two slots for each."""
    checked = Checked(bundle, slots=8)
    pictures = [picture, picture[::-1], picture + np.uint8(1), picture + np.uint8(2)]
    prompt = Turns(bundle.manifest, bundle.tokenizer, QUESTION).macro("w").tokens
    image_ends = max(i for i, token in enumerate(prompt) if isinstance(token, ImageToken))
    for shown in pictures:
        assert checked.ask(shown, QUESTION).counters.vision_encodes == 2
    for shown in pictures * 2:
        counters = checked.ask(shown, QUESTION, "macro").counters
        assert counters.vision_encodes == 0
        assert counters.tokens_reused > image_ends
        assert counters.tokens_prefilled < len(prompt) - image_ends
    forgetful = Checked(bundle, cache_mb=0)
    for shown in pictures[:2] * 2:
        assert forgetful.ask(shown, QUESTION, "macro").counters.vision_encodes == 1


def test_the_same_question_again_is_prefilled_by_a_token(picture, bundle):
    checked = Checked(bundle)
    first = checked.ask(picture, QUESTION, "macro").counters
    again = checked.ask(picture, QUESTION, "macro").counters
    assert again.tokens_prefilled <= 1 < first.tokens_prefilled


def test_a_picture_that_was_put_out_is_encoded_again(picture, bundle):
    """Room for what one question leaves."""
    a, b = picture, picture[::-1]
    engine = Engine(bundle)
    engine.run(engine.submit(a, QUESTION, focus))
    checked = Checked(bundle, cache_mb=engine.prefixes.nbytes / 1e6)
    encodes = [checked.ask(shown, QUESTION).counters.vision_encodes for shown in (a, a, b, b, a)]
    assert encodes == [2, 0, 2, 0, 2]


@pytest.mark.parametrize("cache_mb", [0, 1e-6, 0.005])
def test_a_cache_without_room_works(picture, bundle, cache_mb):
    checked = Checked(bundle, cache_mb=cache_mb)
    for shown in (picture, picture, picture[::-1], picture):
        checked.ask(shown, QUESTION)
        assert checked.fast._worker._engine.prefixes.nbytes <= cache_mb * 1e6


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 40_000), st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_the_cache_never_holds_more_than_it_may(limit, order):
    bundle = FAKE
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 30, 40, 3), np.uint8)
    engine = Engine(bundle, cache_mb=limit / 1e6, slots=4)
    for at in order:
        requests = [engine.submit(pictures[at], QUESTION, focus)]
        requests += [
            engine.submit(pictures[at - 1], QUESTION, focus),
            engine.submit(pictures[at], "What else?", focus),
        ]
        while not all(request.done for request in requests):
            engine.step()
            assert engine.prefixes.nbytes <= limit


def test_questions_asked_together_share_encodes_and_calls(picture, bundle):
    checked = Checked(bundle, slots=8)
    images, calls = bundle.vision.images, bundle.decoder.calls
    results = list(checked.fast.ask_many([(picture, QUESTION)] * 4))
    assert bundle.vision.images - images == 2 == sum(result.counters.vision_encodes for result in results)
    together = bundle.decoder.calls - calls
    calls = bundle.decoder.calls
    one = DualFocus(bundle).ask(picture, QUESTION)
    assert together < 4 * (bundle.decoder.calls - calls)
    for result in results:
        assert result.counters.decode_steps == one.counters.decode_steps
        checked.compare(picture, QUESTION, result)


# The gate


def test_what_the_gate_lets_stand_is_the_macro_answer_at_its_cost(picture, bundle):
    macro = DualFocus(bundle).ask(picture, QUESTION, "macro")
    sure = macro.macro.generation.confidence
    skipped = DualFocus(bundle, skip_above=0.999 * sure).ask(picture, QUESTION)
    assert skipped == replace(macro, skipped=True)
    assert skipped.micro is skipped.located is skipped.box is skipped.fallback is None
    for gate in (sure, 1.0):  # not above it
        result = Checked(bundle, skip_above=gate).ask(picture, QUESTION)
        assert not result.skipped
        assert result.micro


def test_the_gate_is_off_unless_asked_for(picture):
    bundle = make()
    bundle.decoder._out[:] *= 1e-3  # but for the script's push, so that every answer is all but certain
    result = DualFocus(bundle).ask(picture, QUESTION)
    assert result.macro.generation.confidence > 0.9
    assert not result.skipped
    assert result.micro


def test_the_gate_is_dual_modes(picture, bundle):
    checked = Checked(bundle, skip_above=0.0)
    for mode in ("macro", "micro"):
        assert not checked.ask(picture, QUESTION, mode).skipped


# A question as LLaVA-1.5 is asked


@pytest.fixture(scope="module")
def llava() -> Bundle:
    """576 image tokens, DualFocus' prompts, a tokenizer like Llama's; passes disagree about "How"."""
    from dualfocus.export.random_weights import BOS, EOS, make_tokenizer

    tokenizer = make_tokenizer(32_000)
    vocabulary = tokenizer.get_vocab_size()
    width = fakes.WIDTH
    spec = DecoderSpec(1, width, 1, 1, width, vocabulary, 4096, "float32", ragged_append=True)
    image = ImageSpec(8, 576, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "pad")
    script: dict[str, list[int]] = {}
    shape = {"image": image, "decoder": spec, "tokens": TokenSpec(BOS, (EOS,)), "max_new_tokens": 128}
    bundle = fakes.make_bundle(script, tokenizer, **shape)
    script["bounding box"] = fakes.spelling(bundle, "[0.13, 0.47, 0.52, 0.86]")
    for mark in ("\nWhat", "question: What", "\nHow"):
        script[mark] = fakes.spelling(bundle, "3EE")
    script["question: How"] = fakes.spelling(bundle, "two of them")
    return bundle


def test_prompts_are_as_long_as_llamas(llava):
    """Else what follows would count something else: a system sentence of 34 tokens, a box of about 26."""
    assert llava.manifest.prompts == DUALFOCUS
    assert 30 <= len(llava.tokenizer.encode(DUALFOCUS.system).ids) <= 40
    assert 24 <= len(fakes.spelling(llava, "[0.13, 0.47, 0.52, 0.86]")) <= 30


def test_a_question_to_llava_costs_what_it_has_to(picture, llava):
    result = Checked(llava).ask(picture, QUESTION)
    assert result.macro.text == result.micro.text == "3EE"
    assert result.located.text == "[0.13, 0.47, 0.52, 0.86]"
    counters = result.counters
    assert counters.vision_encodes == 2
    assert 2 * 576 < counters.tokens_prefilled <= 1360
    assert counters.decode_steps <= 16
    assert counters.tokens_accepted >= len(result.micro.generation.tokens)  # the whole draft


def test_the_plain_protocol_pays_for_eight_images(picture, llava):
    """Where the passes disagree and candidates are scored."""
    question = "How many blue circles are there?"
    result = Checked(llava).ask(picture, question)
    assert result.macro.text != result.micro.text == "two of them"
    plain = Reference(llava, free_box=False).ask(picture, question).counters
    assert plain.vision_encodes == 8
    assert plain.tokens_prefilled > 8 * 576
    assert result.counters.vision_encodes == 2
    assert result.counters.tokens_prefilled < plain.tokens_prefilled / 3
    assert result.counters.decode_steps < plain.decode_steps / 1.5


def test_a_second_question_to_llava_pays_for_its_crop_alone(picture, llava):
    checked = Checked(llava)
    first = checked.ask(picture, QUESTION, box="[0.10, 0.20, 0.30, 0.40]").counters
    second = checked.ask(picture, "What is to the left of it?").counters
    assert (first.vision_encodes, second.vision_encodes) == (2, 1)
    assert second.tokens_reused > 3 * 576  # of macro, locate and micro
    assert 576 < second.tokens_prefilled < 2 * 576


def test_where_the_select_turn_is_the_micro_turn_no_candidate_is_computed(picture):
    """The draft pass scored the macro answer, decoding the micro answer, and the history the box."""
    prompts = replace(DUALFOCUS, select=DUALFOCUS.micro)
    bundle = make(prompts=prompts)
    assert spent_on_scores(bundle, picture) == (0, 0)
    result = DualFocus(bundle).ask(picture, QUESTION)
    assert None not in (result.macro.loss, result.micro.loss)
    assert result.counters.tokens_accepted < result.counters.tokens_drafted
    # and so a question that is scored costs no more than its three prompts
    turns = Turns(bundle.manifest, bundle.tokenizer, QUESTION)
    macro, locate = turns.macro("w").tokens, turns.locate("w").tokens
    micro = turns.micro("w", "c", BOX).tokens
    prefilled = len(macro) + len(locate) - common_prefix(macro, locate) + len(micro) - len(locate)
    assert result.counters.tokens_prefilled <= prefilled
    Checked(bundle).ask(picture, QUESTION)


def test_the_runtime_imports_neither_torch_nor_an_engine():
    unwanted = {"torch", "onnxruntime", "dualfocus.export"}
    code = f"import sys, dualfocus.runtime; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
