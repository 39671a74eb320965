"""Continuous batching: requests join and leave at any step, and each is answered as if it were alone."""

from __future__ import annotations

import functools
from concurrent.futures import CancelledError
from functools import partial
from itertools import count
from typing import Any

import fakes
import numpy as np
import pytest
from equality import Pair, same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import BOX, CHOICE, QUESTION, make, script, spelled

from dualfocus.runtime import Bundle, Engine, QuestionError, Reference, Region
from dualfocus.runtime.engine import PADDING, together
from dualfocus.runtime.errors import ModelError
from dualfocus.runtime.protocol import focus
from dualfocus.runtime.request import Request
from dualfocus.runtime.result import FocusResult, ReplyToken, Stage
from dualfocus.runtime.work import Encode, Generate, Score, Steps, Task

FAKE = make()
MODES = ("dual", "macro", "micro")
QUESTIONS = [QUESTION, "What else?", CHOICE, "Why\nA. so\nB. not"]
PICTURES = [np.random.default_rng(at).integers(0, 256, (50 + at, 70, 3), np.uint8) for at in range(3)]
TOO_LONG = QUESTION + " the" * 2000


class BrokenError(Exception):
    pass


@functools.cache
def expected(picture: int, question: int, mode: str) -> FocusResult:
    return Reference(FAKE, free_box=False).ask(PICTURES[picture], QUESTIONS[question], mode)


def failing(at: int) -> Any:
    """A protocol that raises when it is resumed for the time number `at`."""

    def protocol(task: Task) -> Steps[FocusResult]:
        steps = focus(task)
        work = next(steps)
        for _ in range(at):
            try:
                work = steps.send((yield work))
            except StopIteration:
                break
        raise BrokenError

    return protocol


def drain(engine: Engine) -> None:
    for _ in range(2000):
        if engine.idle:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def holds_nothing(engine: Engine) -> bool:
    """No slot is taken, nothing is owned, and slots hold what they say."""
    prefixes = engine.prefixes
    return (
        len(prefixes.free) == len(prefixes.slots)
        and not prefixes._owners
        and [len(slot.tokens) for slot in prefixes.slots] == engine._cache.lengths
    )


arrival = st.fixed_dictionaries(
    {
        "picture": st.integers(0, 2),
        "question": st.integers(0, 3),
        "mode": st.sampled_from(["dual", "dual", *MODES]),
        "priority": st.integers(-1, 1),
        "after": st.integers(0, 6),  # steps since the one before it arrived
        "fate": st.sampled_from(["finish"] * 5 + ["cancel", "fail", "too long"]),
        "at": st.integers(0, 12),  # when that comes
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(arrival, max_size=8),
    st.sampled_from([1, 2, 3, 4, 7, 16]),
    st.sampled_from([7, 32, 512]),
    st.sampled_from([0, 0.05, 512]),
)
def test_whatever_else_happens_an_answer_is_the_references(arrivals, slots, chunk, cache_mb):
    engine = Engine(FAKE, slots=slots, chunk=chunk, cache_mb=cache_mb)
    requests: list[tuple[dict[str, Any], Request]] = []
    doomed: list[tuple[int, Request]] = []
    now = 0

    def step() -> None:
        nonlocal now
        for at, request in doomed:
            if at == now:
                engine.cancel(request)
        engine.step()
        now += 1

    for of in arrivals:
        for _ in range(of["after"]):
            step()
        protocol = failing(of["at"]) if of["fate"] == "fail" else partial(focus, mode=of["mode"])
        if of["fate"] == "too long":
            with pytest.raises(QuestionError):
                engine.submit(PICTURES[of["picture"]], TOO_LONG, protocol)
            continue
        if of["fate"] == "fail" and of["at"] == 0:
            with pytest.raises(BrokenError):
                engine.submit(PICTURES[of["picture"]], QUESTIONS[of["question"]], protocol)
            continue
        question = QUESTIONS[of["question"]]
        request = engine.submit(PICTURES[of["picture"]], question, protocol, priority=of["priority"])
        requests.append((of, request))
        if of["fate"] == "cancel":
            doomed.append((now + of["at"], request))
    while not engine.idle:
        step()
        assert now < 3000
    for of, request in requests:
        assert request.done
        key = of["picture"], of["question"], of["mode"]
        if of["fate"] == "fail":
            with pytest.raises(BrokenError):
                _ = request.result
        elif of["fate"] == "cancel" and isinstance(request._error, CancelledError):
            with pytest.raises(CancelledError):
                _ = request.result
        else:
            pair = Pair(PICTURES[of["picture"]], QUESTIONS[of["question"]])
            same(pair, request.result, expected(*key), FAKE, alike=True)
    assert holds_nothing(engine)


def test_a_request_that_joins_leaves_the_others_answers(picture):
    """At every step of the first one's life."""
    alone = Engine(FAKE, slots=4)
    steps = 0
    first = alone.submit(picture, QUESTION, focus)
    while not first.done:
        alone.step()
        steps += 1
    for at in range(steps):
        engine = Engine(FAKE, slots=4)
        first = engine.submit(PICTURES[0], QUESTION, focus)
        for _ in range(at):
            engine.step()
        second = engine.submit(PICTURES[1], QUESTIONS[1], focus)
        drain(engine)
        same(Pair(PICTURES[0], QUESTION), first.result, expected(0, 0, "dual"), FAKE, alike=True)
        same(Pair(PICTURES[1], QUESTIONS[1]), second.result, expected(1, 1, "dual"), FAKE, alike=True)


# One failure touches one request


def ask_three(engine: Engine, odd: Any = focus) -> list[Request]:
    return [engine.submit(PICTURES[at], QUESTIONS[at % 2], odd if at == 1 else focus) for at in range(3)]


def others_are_right(requests: list[Request]) -> None:
    for at in (0, 2):
        same(Pair(PICTURES[at], QUESTIONS[0]), requests[at].result, expected(at, 0, "dual"), FAKE, alike=True)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_protocol_that_raises_fails_alone(at):
    engine = Engine(FAKE, slots=6)
    requests = ask_three(engine, failing(at))
    drain(engine)
    with pytest.raises(BrokenError):
        _ = requests[1].result
    others_are_right(requests)
    assert holds_nothing(engine)


@pytest.mark.parametrize("what", ["view", "encode"])
def test_a_picture_that_cannot_be_encoded_fails_alone(what, monkeypatch):
    bundle = make()
    engine = Engine(bundle, slots=6)

    def view(self: Bundle, seen: Any, view: Any = Bundle.view) -> Any:
        if any(picture is PICTURES[1] for picture, _ in seen):
            raise BrokenError
        return view(self, seen)

    def encode(pixels: Any, encode: Any = bundle.vision.encode) -> Any:
        bad = Bundle.view(bundle, [(PICTURES[1], (0, 0, 70, 51))])
        if any(np.array_equal(one, bad[0]) for one in pixels):
            raise MemoryError
        return encode(pixels)

    if what == "view":
        monkeypatch.setattr(Bundle, "view", view)
    else:
        monkeypatch.setattr(bundle.vision, "encode", encode)
    requests = ask_three(engine)
    drain(engine)
    with pytest.raises(BrokenError if what == "view" else MemoryError):
        _ = requests[1].result
    others_are_right(requests)
    assert holds_nothing(engine)


def test_a_decoder_call_that_fails_for_one_row_fails_alone(monkeypatch):
    """A call of several rows is then made row by row."""
    bundle = make()
    engine = Engine(bundle, slots=6)
    extend = bundle.decoder.extend
    culprit: list[Request] = []

    def stopping(kv: Any, rows: Any, *rest: Any) -> Any:
        mine = {job.slot.row for request in culprit for job in request.jobs if job.slot}
        if mine & {*rows}:
            raise BrokenError
        return extend(kv, rows, *rest)

    monkeypatch.setattr(bundle.decoder, "extend", stopping)
    requests = ask_three(engine)
    for _ in range(2):
        engine.step()
    culprit.append(requests[1])
    drain(engine)
    with pytest.raises(BrokenError):
        _ = requests[1].result
    others_are_right(requests)
    assert holds_nothing(engine)


def test_a_prompt_beyond_the_context_fails_alone():
    def protocol(task: Task) -> Steps[None]:
        yield [Encode((0, 0, 9, 9))]
        prompt = task.turns.macro(task.image((0, 0, 9, 9)))
        long = prompt.tokens + (5,) * FAKE.manifest.decoder.context
        yield [Generate("macro", type(prompt)(long, ()))]

    engine = Engine(FAKE, slots=6)
    requests = ask_three(engine, protocol)
    drain(engine)
    with pytest.raises(AssertionError, match="context"):
        _ = requests[1].result
    others_are_right(requests)
    assert holds_nothing(engine)


def test_a_request_can_be_cancelled_at_every_step():
    steps = 0
    engine = Engine(FAKE, slots=6, chunk=40)
    ask_three(engine)
    while not engine.idle:
        engine.step()
        steps += 1
    for at in range(steps):
        engine = Engine(FAKE, slots=6, chunk=40)
        requests = ask_three(engine)
        for _ in range(at):
            engine.step()
        engine.cancel(requests[1])
        engine.cancel(requests[1])  # again: nothing happens
        drain(engine)
        assert requests[1].done
        others_are_right(requests)
        assert holds_nothing(engine)


def test_a_cancelled_protocol_is_closed():
    closed = []

    def protocol(task: Task) -> Steps[FocusResult]:
        try:
            return (yield from focus(task))
        finally:
            closed.append(task)

    engine = Engine(FAKE)
    request = engine.submit(PICTURES[0], QUESTION, protocol)
    waiting = engine.submit(PICTURES[1], QUESTION, protocol)  # two slots: it is not live yet
    for _ in range(3):
        engine.step()
    engine.cancel(waiting)
    assert len(closed) == 1
    engine.cancel(request)
    assert len(closed) == 2
    assert engine.idle
    for one in (request, waiting):
        with pytest.raises(CancelledError):
            _ = one.result


def test_a_protocol_of_ones_own():
    """Work of other kinds in one list, a generator among it, and a result that is no FocusResult."""

    def closer(task: Task) -> Steps[str]:
        yield []
        yield [Encode((0, 0, 20, 20))]
        (reply,) = yield [Generate("corner", task.turns.macro(task.image((0, 0, 20, 20))))]
        return reply.text

    def protocol(task: Task) -> Steps[tuple[str, str]]:
        yield [Encode((0, 0, 70, 50))]
        whole, corner = yield [Generate("whole", task.turns.macro(task.image((0, 0, 70, 50)))), closer(task)]
        return whole.text, corner

    engine = Engine(FAKE)
    events: list[Any] = []
    found = engine.run(engine.submit(PICTURES[0], QUESTION, protocol, follow=events.append))
    assert found == Reference(FAKE).run(PICTURES[0], QUESTION, protocol)
    assert {event.reply for event in events if isinstance(event, ReplyToken)} == {"whole", "corner"}


def test_the_same_crop_of_another_picture_is_another_image():
    """An image's name holds the picture's, whoever asks for it."""

    def corner(task: Task) -> Steps[tuple[float, ...]]:
        yield [Encode((0, 0, 20, 20))]
        (reply,) = yield [Generate("corner", task.turns.macro(task.image((0, 0, 20, 20))))]
        return reply.logprobs

    engine = Engine(FAKE, slots=4)
    requests = [engine.submit(picture, QUESTION, corner) for picture in PICTURES]
    drain(engine)
    for picture, request in zip(PICTURES, requests, strict=True):
        expected = Reference(FAKE).run(picture, QUESTION, corner)
        assert request.result == pytest.approx(expected, abs=1e-5)
    assert len({request.result for request in requests}) == 3


@pytest.mark.parametrize("stage", ["view_whole", "encode_whole", "prefill", "decode", "select"])
@pytest.mark.parametrize("how", ["raise", "cancel"])
def test_a_follower_that_raises_or_cancels_ends_its_request_alone(stage, how):
    """About a picture that the others ask about too."""
    engine = Engine(FAKE, slots=6)

    def follow(event: Any) -> None:
        if event == Stage(stage):
            if how == "raise":
                raise BrokenError
            engine.cancel(requests[0])

    requests = [
        engine.prepare(PICTURES[0], QUESTION, focus, follow=follow),  # the one that is encoded for
        *(engine.prepare(PICTURES[0], QUESTION, focus) for _ in range(2)),
    ]
    for request in requests:
        engine.add(request)
    drain(engine)
    with pytest.raises(BrokenError if how == "raise" else CancelledError):
        _ = requests[0].result
    for request in requests[1:]:
        same(Pair(PICTURES[0], QUESTION), request.result, expected(0, 0, "dual"), FAKE, alike=True)
    assert holds_nothing(engine)


def cancelling(engine: Engine, requests: list[Request], at: int) -> Any:
    """Cancels the last of `requests` as it generates its token number `at`."""
    tokens = count()

    def follow(event: Any) -> None:
        if isinstance(event, ReplyToken) and next(tokens) == at:
            engine.cancel(requests[-1])

    return follow


def test_a_follower_may_cancel_at_any_token():
    for tokens in count():
        engine = Engine(FAKE, slots=6)
        requests = [engine.submit(PICTURES[0], QUESTION, focus)]
        follow = cancelling(engine, requests, tokens)
        requests.append(engine.submit(PICTURES[1], QUESTION, focus, follow=follow))
        drain(engine)
        same(Pair(PICTURES[0], QUESTION), requests[0].result, expected(0, 0, "dual"), FAKE, alike=True)
        assert holds_nothing(engine)
        if requests[1]._error is None:
            break
    assert tokens > 20


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["all", "one"])
def test_logits_that_are_no_numbers_fail_their_request_alone(monkeypatch, number, where):
    """As an overflow in float16 gives them, for a prompt with "odd" in it."""
    bundle = make()
    decoder, logits = bundle.decoder, bundle.decoder._logits

    def overflowing(cache, row, length):
        found = logits(cache, row, length)
        keys = cache.keys[0][row, 0, :length]
        tokens = [token for token in (decoder._ids.get(key.tobytes()) for key in keys) if token is not None]
        if "odd" in bundle.tokenizer.decode(tokens):
            found[slice(None) if where == "all" else int(found.argmax())] = number
        return found

    monkeypatch.setattr(decoder, "_logits", overflowing)
    engine = Engine(bundle, slots=6)
    odd, other = (engine.submit(PICTURES[0], question, focus) for question in ("An odd one?", QUESTION))
    drain(engine)
    if where == "all" or number != -np.inf:  # one token that is impossible is another answer, and no fault
        with pytest.raises(ModelError, match="a number that is not finite"):
            _ = odd.result
        with pytest.raises(ModelError, match="a number that is not finite"):
            Reference(bundle).ask(PICTURES[0], "An odd one?")
    same(Pair(PICTURES[0], QUESTION), other.result, expected(0, 0, "dual"), FAKE, alike=True)
    assert holds_nothing(engine)


def test_a_score_that_is_no_number_fails_its_request(monkeypatch):
    bundle = make()
    engine = Engine(bundle)
    vocabulary = bundle.manifest.decoder.vocabulary
    monkeypatch.setattr(bundle.decoder, "_logits", lambda *_: np.full(vocabulary, np.nan))

    def scores(task: Task) -> Steps[Any]:
        yield [Encode((0, 0, 9, 9)), Encode((0, 0, 20, 20))]
        images = task.image((0, 0, 9, 9)), task.image((0, 0, 20, 20))
        return (yield [Score(task.turns.select(*images, BOX, "a"))])

    with pytest.raises(ModelError, match="a number that is not finite"):
        engine.run(engine.submit(PICTURES[0], QUESTION, scores))
    assert holds_nothing(engine)


def test_a_protocol_without_work_ends_at_once():
    def protocol(task: Task) -> Steps[str]:
        yield []
        yield [Region(problem="nothing")]
        return task.picture_name

    events: list[Any] = []
    engine = Engine(FAKE)
    request = engine.submit(PICTURES[0], QUESTION, protocol, follow=events.append)
    assert engine.idle
    assert engine.run(request) == request.name == Reference(FAKE).run(PICTURES[0], QUESTION, protocol)
    assert events[-1] == Region(problem="nothing")


# Counts


def count_padded(bundle: Bundle) -> list[int]:
    """How many positions the decoder is made to compute, what pads rows to the longest included."""
    extend, total = bundle.decoder.extend, [0]

    def counted(kv: Any, rows: Any, embeddings: Any, logits_at: Any) -> Any:
        total[0] += len(rows) * max(map(len, embeddings))
        return extend(kv, rows, embeddings, logits_at)

    bundle.decoder.extend = counted
    return total


@pytest.mark.parametrize(("many", "calls", "padded"), [(1, 15, 593), (8, 38, 2472)])
def test_requests_take_no_more_than_waves_did(many, calls, padded):
    """Waves took 15 and 41 calls, 593 and 2,472 positions (2026-11-29)."""
    bundle = fakes.make_bundle(script(spelled(BOX)))
    total = count_padded(bundle)
    engine = Engine(bundle, slots=2 * many)
    for at in range(many):
        engine.submit(PICTURES[at % 3], QUESTIONS[at % 2], focus)
    drain(engine)
    assert bundle.decoder.calls <= calls
    assert total[0] <= padded


def prompt_tokens(bundle: Bundle) -> list[tuple[list[int], list[int]]]:
    """Of every call of the decoder, its rows and how many tokens each computes."""
    extend = bundle.decoder.extend
    calls: list[tuple[list[int], list[int]]] = []

    def watched(kv: Any, rows: Any, embeddings: Any, logits_at: Any) -> Any:
        calls.append((list(rows), list(map(len, embeddings))))
        return extend(kv, rows, embeddings, logits_at)

    bundle.decoder.extend = watched
    return calls


@pytest.mark.parametrize("chunk", [32, 100, 512])
def test_a_newcomer_delays_a_running_reply_by_one_chunk_at_most(chunk):
    """Its prompt of 600 tokens, and whatever else comes with it."""
    bundle = make(max_new_tokens=60)
    engine = Engine(bundle, slots=6, chunk=chunk)
    events: list[Any] = []
    running = engine.submit(PICTURES[0], "What else?", partial(focus, mode="macro"), follow=events.append)
    while not any(isinstance(event, ReplyToken) for event in events):
        engine.step()
    calls = prompt_tokens(bundle)
    long = "What is it?\n" + "the " * 400
    newcomer = engine.submit(PICTURES[1], long, partial(focus, mode="macro"))
    other = engine.submit(PICTURES[2], long, partial(focus, mode="macro"))
    prompt = 0
    while not running.done:
        said, before = len(events), len(calls)
        engine.step()
        if len(events) > said:  # a token came
            between = sum(sum(counts) for _, counts in calls[before:] if max(counts) > 8)
            assert between <= chunk
            prompt += between
    assert prompt > chunk
    drain(engine)
    assert newcomer.result.macro
    assert other.result.macro


@pytest.mark.parametrize("chunk", [16, 50])
def test_chunks_end_at_the_same_places_whatever_else_is_live(chunk):
    def boundaries(others: int) -> set[int]:
        bundle = make()
        engine = Engine(bundle, slots=8, chunk=chunk, cache_mb=0)
        for at in range(others):
            engine.submit(PICTURES[1 + at], QUESTIONS[1], focus)
            for _ in range(3):
                engine.step()
        ends: set[int] = set()
        extend = bundle.decoder.extend

        def watched(kv: Any, rows: Any, embeddings: Any, logits_at: Any) -> Any:
            found = extend(kv, rows, embeddings, logits_at)
            slots = {job.slot.row for job in request.jobs if job.slot and job.prompt}
            ends.update(kv.lengths[row] for row in rows if row in slots)
            return found

        bundle.decoder.extend = watched
        request = engine.submit(PICTURES[0], QUESTIONS[3], partial(focus, mode="macro"))
        drain(engine)
        return ends

    alone = boundaries(0)
    assert len(alone) > 2
    assert all(end % chunk == 0 for end in sorted(alone)[:-1])
    # a system prompt that another request computed is not computed again
    assert boundaries(1) <= alone
    assert boundaries(2) <= alone


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 200))
def test_prompts_share_a_call_where_that_wastes_little(lengths, most):
    groups = together(lengths, most)
    assert sorted(at for group in groups for at in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[at] for at in group)
        assert len(group) == 1 or len(group) * longest <= most
        assert sum(longest - lengths[at] for at in group) <= PADDING


def test_equal_prompts_share_a_call_and_different_ones_do_not():
    assert together([20, 20, 20], 512) == [[0, 1, 2]]
    assert together([20, 20, 20], 40) == [[0, 1], [2]]
    assert together([20, 50], 512) == [[1], [0]]
    assert together([], 512) == []


def test_the_higher_priority_comes_first_then_the_earlier():
    engine = Engine(FAKE)
    order: list[str] = []

    def follow(name: str) -> Any:
        return lambda event: order.append(name) if event == Stage("encode_whole") else None

    for at, (name, priority) in enumerate([("a", 0), ("b", 0), ("c", 1), ("d", -1), ("e", 1)]):
        picture = np.full((30, 30, 3), at, np.uint8)
        engine.submit(picture, QUESTION, focus, priority=priority, follow=follow(name))
    drain(engine)
    assert order == ["c", "e", "a", "b", "d"]


def test_one_picture_is_encoded_once_for_all_that_ask_about_it_at_once():
    bundle = make()
    engine = Engine(bundle, slots=8)
    requests = [engine.submit(PICTURES[0], QUESTION, focus) for _ in range(4)]
    drain(engine)
    assert bundle.vision.images == 2 == sum(request.result.counters.vision_encodes for request in requests)
