"""`DualFocus` as a program uses it: any source, any thread, many questions, a clean end."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from equality import Pair, same
from PIL import Image
from test_batching import PICTURES, QUESTIONS, BrokenError, expected, failing
from test_engine import BOX, QUESTION, make, script, spelled

from dualfocus.runtime import (
    Bundle,
    BusyError,
    DualFocus,
    EngineError,
    FocusResult,
    InputError,
    PictureError,
    QuestionError,
    Reference,
    ReplyToken,
    open_picture,
)
from dualfocus.runtime.work import Encode, Steps, Task

FAKE = make()


class Gate:
    """A decoder that waits before every call until it is opened."""

    def __init__(self, bundle: Bundle) -> None:
        self._extend = bundle.decoder.extend
        self.open = threading.Event()
        self.reached = threading.Event()
        bundle.decoder.extend = self.extend

    def extend(self, *args: Any) -> Any:
        self.reached.set()
        assert self.open.wait(30)
        return self._extend(*args)


def test_a_picture_may_be_a_path_bytes_an_image_or_an_array(tmp_path: Path) -> None:
    model = DualFocus(FAKE)
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURES[0]).save(path)
    encoded = path.read_bytes()
    for source in (path, str(path), encoded, Image.open(io.BytesIO(encoded)), PICTURES[0]):
        result = model.ask(source, QUESTION)
        same(Pair(PICTURES[0], QUESTION), result, expected(0, 0, "dual"), FAKE, alike=True)
    for bad in (tmp_path / "none.png", b"no picture"):
        for ask in (model.ask, model.stream, model.session, model.submit):
            with pytest.raises(PictureError):
                ask(bad) if ask == model.session else ask(bad, QUESTION)
    for ask in (model.ask, model.stream, model.submit):
        with pytest.raises(QuestionError):
            ask(path, " ")


def test_a_wrong_mode_is_a_sentence() -> None:
    model = DualFocus(FAKE)
    session = model.session(PICTURES[0])
    for ask in (
        lambda: model.ask(PICTURES[0], QUESTION, "both"),  # type: ignore[arg-type]
        lambda: model.stream(PICTURES[0], QUESTION, "both"),  # type: ignore[arg-type]
        lambda: model.ask_many([(PICTURES[0], QUESTION)], "both"),  # type: ignore[arg-type]
        lambda: session.ask(QUESTION, "both"),  # type: ignore[arg-type]
        lambda: session.stream(QUESTION, "both"),  # type: ignore[arg-type]
        lambda: Reference(FAKE).ask(PICTURES[0], QUESTION, "both"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="unknown mode 'both': expected dual, macro, micro"):
            ask()


def test_many_threads_ask_one_model() -> None:
    model = DualFocus(FAKE, slots=6)

    def ask(at: int) -> tuple[int, FocusResult]:
        return at, model.ask(PICTURES[at % 3], QUESTIONS[at % 4])

    with ThreadPoolExecutor(8) as pool:
        for at, result in pool.map(ask, range(60)):
            pair = Pair(PICTURES[at % 3], QUESTIONS[at % 4])
            same(pair, result, expected(at % 3, at % 4, "dual"), FAKE, alike=True)


def test_models_and_references_on_many_threads_share_an_opened_bundle() -> None:
    """On a real graph: whatever is kept for the next call is one engine's, or guarded."""
    bundle = Bundle.open(threads=1)
    scene = open_picture(Path(__file__).parent.parent / "examples" / "scene.png")
    pictures = [scene, scene[:, ::-1].copy()]
    questions = ["What is written on the red star?", "Is there a green circle?", "What color is the heart?"]
    pairs = [(picture, question) for picture in pictures for question in questions] * 4
    alone = [Reference(bundle, free_box=False).ask(*pair) for pair in pairs[:6]]

    def ask(at: int) -> list[FocusResult]:
        own = Reference(bundle, free_box=False) if at % 2 else DualFocus(bundle, slots=4)
        order = pairs[at:] + pairs[:at]
        answers = [own.ask(*pair) for pair in order]
        return answers[len(pairs) - at :] + answers[: len(pairs) - at]

    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(ask, range(4)):
            for i, answer in enumerate(answers):
                same(Pair(*pairs[i]), answer, alone[i % 6], bundle, alike=True)


def test_many_threads_take_from_one_batch() -> None:
    answers = DualFocus(FAKE, slots=4).ask_many((PICTURES[0], QUESTIONS[at % 4]) for at in range(40))
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: next(answers), range(40)))
    assert answers.given == 40
    assert list(answers) == []
    texts = [expected(0, at, "dual").answer for at in range(4)]
    assert sorted(result.answer for result in taken) == sorted(texts * 10)


def test_a_character_of_several_tokens_is_streamed_whole() -> None:
    """Each byte of it is a token: until the last of them, there is no text to show."""
    said = "é 👍🏽, 中"
    bundle = fakes.make_bundle(script(spelled(BOX), macro=said))
    events = list(DualFocus(bundle).stream(PICTURES[0], QUESTION))
    texts = [event.text for event in events if isinstance(event, ReplyToken) and event.reply == "macro"]
    assert events[-1].macro.text == said
    assert "".join(texts).strip() == said
    assert {character for text in texts for character in text} == {*said}
    assert texts.count("") == sum(len(character.encode()) - 1 for character in said) + 1  # and the end


def test_many_answers_come_in_order_and_each_failure_at_its_place() -> None:
    model = DualFocus(FAKE, slots=4)
    read = []

    def picture(at: int) -> Any:
        def source() -> np.ndarray:
            read.append(at)
            if at == 5:
                raise PictureError("no picture")
            return PICTURES[at % 3]

        return source

    answers = model.ask_many((picture(at), " " if at == 7 else QUESTIONS[at % 4]) for at in range(20))
    for at in range(20):
        if at in (5, 7):
            with pytest.raises(PictureError if at == 5 else QuestionError):
                next(answers)
        else:
            pair = Pair(PICTURES[at % 3], QUESTIONS[at % 4])
            same(pair, next(answers), expected(at % 3, at % 4, "dual"), FAKE, alike=True)
        assert answers.given == at + 1
        assert len(read) <= at + 1 + 4  # pictures are read as they are needed
    assert list(answers) == []


def test_a_picture_that_is_changed_after_it_was_given_is_what_it_was() -> None:
    picture = PICTURES[0].copy()
    bundle = make()
    model, gate = DualFocus(bundle), Gate(bundle)
    handle, stream, session = (
        model.submit(picture, QUESTION),
        model.stream(picture, QUESTION),
        model.session(picture),
    )
    picture[:] = 0
    gate.open.set()
    for result in (handle.result(), [*stream][-1], session.ask(QUESTION)):
        same(Pair(PICTURES[0], QUESTION), result, expected(0, 0, "dual"), FAKE, alike=True)


def test_a_handle_tells_when_it_is_done_and_what_happened() -> None:
    bundle = make()
    model, gate = DualFocus(bundle), Gate(bundle)
    handle = model.submit(PICTURES[0], QUESTION)
    assert not handle.done
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    gate.open.set()
    *events, last = handle
    assert handle.done
    assert last == handle.result() == handle.result(0)
    assert list(handle) == [last]  # events are for one reader
    assert any(isinstance(event, ReplyToken) for event in events)
    broken = model.submit(PICTURES[0], QUESTION, failing(2))
    with pytest.raises(BrokenError):
        list(broken)
    with pytest.raises(BrokenError):
        broken.result()


def test_what_is_cancelled_raises_and_the_others_are_answered() -> None:
    bundle = make()
    model, gate = DualFocus(bundle, slots=6), Gate(bundle)
    handles = [model.submit(PICTURES[at], QUESTION) for at in range(3)]
    assert gate.reached.wait(10)
    handles[1].cancel()
    handles[1].cancel()
    gate.open.set()
    with pytest.raises(CancelledError):
        handles[1].result()
    for at in (0, 2):
        same(Pair(PICTURES[at], QUESTION), handles[at].result(), expected(at, 0, "dual"), FAKE, alike=True)
    handles[0].cancel()  # it is done: nothing happens
    assert handles[0].result()


def test_a_cancelled_tower_is_awaited_and_its_result_dropped() -> None:
    bundle = make()
    started, go_on = threading.Event(), threading.Event()
    encode = bundle.vision.encode

    def slow(pixels: Any) -> Any:
        started.set()
        assert go_on.wait(10)
        return encode(pixels)

    bundle.vision.encode = slow
    model = DualFocus(bundle)
    handle = model.submit(PICTURES[0], QUESTION)
    assert started.wait(10)
    handle.cancel()
    other = model.submit(PICTURES[1], QUESTION)
    go_on.set()
    with pytest.raises(CancelledError):
        handle.result()
    same(Pair(PICTURES[1], QUESTION), other.result(), expected(1, 0, "dual"), FAKE, alike=True)


def test_too_many_questions_are_refused_and_later_ones_taken() -> None:
    bundle = make()
    model, gate = DualFocus(bundle, queue=3), Gate(bundle)
    handles = [model.submit(PICTURES[at], QUESTION) for at in range(3)]
    with pytest.raises(BusyError, match="3 questions are waiting"):
        model.submit(PICTURES[0], QUESTION)
    gate.open.set()
    for handle in handles:
        handle.result()
    assert model.ask(PICTURES[0], QUESTION).answer == "AB7"


def test_a_closed_model_cancels_and_takes_no_more() -> None:
    bundle = make()
    gate = Gate(bundle)
    with DualFocus(bundle) as model:
        handles = [model.submit(PICTURES[at], QUESTION) for at in range(2)]
        assert gate.reached.wait(10)
        threading.Timer(0.2, gate.open.set).start()  # close waits for the call that is computed
    model.close()
    for handle in handles:
        with pytest.raises(CancelledError):
            handle.result(10)
    with pytest.raises(EngineError, match="was closed"):
        model.ask(PICTURES[0], QUESTION)


def test_a_model_that_nobody_holds_ends_its_thread() -> None:
    before = {*threading.enumerate()}
    model = DualFocus(make())
    (thread,) = {*threading.enumerate()} - before
    handle = model.submit(PICTURES[0], QUESTION)
    gone = weakref.ref(model)
    del model
    assert handle.result().answer == "AB7"  # what is on its way is answered
    del handle
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_what_is_closed_or_dropped_is_not_computed() -> None:
    """A stream before its first event, and answers that nobody takes."""
    bundle = make()
    model, gate = DualFocus(bundle, slots=4), Gate(bundle)
    stream = model.stream(PICTURES[0], QUESTION)
    handle = stream._handle
    stream.close()
    dropped = model.stream(PICTURES[1], QUESTION)
    handles = [handle, dropped._handle]
    del dropped
    answers = model.ask_many([(PICTURES[2], QUESTION)] * 3 + [(PICTURES[0], "What else?")] * 3)
    answers._submit()
    handles += answers._coming
    del answers
    gate.open.set()
    for handle in handles:
        with pytest.raises(CancelledError):
            handle.result(10)
    assert model.ask(PICTURES[0], QUESTION).answer == "AB7"


def test_a_small_queue_is_enough_for_many() -> None:
    model = DualFocus(make(), slots=8, queue=2)
    asked = [(PICTURES[at % 3], QUESTIONS[at % 2]) for at in range(9)]
    for pair, result, at in zip(asked, model.ask_many(asked), range(9), strict=True):
        same(Pair(*pair), result, expected(at % 3, at % 2, "dual"), FAKE, alike=True)


def test_a_source_may_fail_in_any_way() -> None:
    def broken() -> np.ndarray:
        raise OSError("a disk")

    model = DualFocus(FAKE)
    answers = model.ask_many([(PICTURES[0], QUESTION), (broken, QUESTION), (PICTURES[1], QUESTION)])
    same(Pair(PICTURES[0], QUESTION), next(answers), expected(0, 0, "dual"), FAKE, alike=True)
    with pytest.raises(OSError, match="a disk"):
        next(answers)
    same(Pair(PICTURES[1], QUESTION), next(answers), expected(1, 0, "dual"), FAKE, alike=True)


def test_a_protocol_that_asks_its_own_model_is_told_so() -> None:
    model = DualFocus(FAKE)

    def protocol(task: Task) -> Steps[FocusResult]:
        yield [Encode((0, 0, 9, 9))]
        return model.ask(PICTURES[0], QUESTION)

    with pytest.raises(EngineError, match="cannot wait for another question"):
        model.submit(PICTURES[1], QUESTION, protocol).result(10)


@pytest.mark.parametrize("work", [3, "a", None, Encode, (0, 0, 9, 9)])
def test_a_protocol_that_yields_no_work_ends_with_an_error(work: Any) -> None:
    """It would wait for ever for what nobody computes, and hold its slots."""
    model = DualFocus(FAKE, slots=2)

    def at_once(task: Task) -> Steps[None]:
        yield [work]

    def later(task: Task) -> Steps[None]:
        yield [Encode((0, 0, 9, 9))]
        yield [work]

    for protocol in (at_once, later):
        with pytest.raises(TypeError, match=f"an item of type {type(work).__name__}, expected Encode"):
            model.submit(PICTURES[0], QUESTION, protocol).result(10)
    assert model.ask(PICTURES[0], QUESTION).answer == "AB7"


def test_a_batch_goes_on_after_what_is_no_pair() -> None:
    answers = DualFocus(FAKE).ask_many([None, (PICTURES[0],), (PICTURES[0], QUESTION)])  # type: ignore[list-item]
    for error in (TypeError, ValueError):
        with pytest.raises(error, match="unpack"):
            next(answers)
    assert [result.answer for result in answers] == ["AB7"]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_batch_of_what_cannot_be_iterated() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        DualFocus(FAKE).ask_many(3)  # type: ignore[arg-type]
    gc.collect()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"select": "loss"}, "unknown select 'loss': expected reference, answer"),
        ({"skip_above": 2}, "skip_above is 2, expected a probability"),
        ({"skip_above": float("nan")}, "skip_above is nan"),
        ({"slots": 0}, "slots is 0, expected 1 or more"),
        ({"cache_mb": -1}, "cache_mb is -1, expected 0 or more"),
        ({"cache_mb": float("nan")}, "cache_mb is nan"),
        ({"chunk": 0}, "chunk is 0, expected 1 or more"),
        ({"queue": 0}, "queue is 0, expected 1 or more"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DualFocus(FAKE, **options)


def test_a_box_reply_is_text() -> None:
    with pytest.raises(InputError, match="box_reply is of type tuple, expected text"):
        DualFocus(FAKE).ask(PICTURES[0], QUESTION, box_reply=(0, 0, 1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["array", "subclass"])
def test_a_picture_in_memory_is_copied(kind: str, tmp_path: Path) -> None:
    """After Ctrl-C the engine may still read it, while its owner writes something else into it."""
    picture = PICTURES[0].copy()
    if kind == "subclass":
        picture = np.memmap(tmp_path / "p", np.uint8, "w+", shape=PICTURES[0].shape)
        picture[:] = PICTURES[0]
    bundle = make()
    model, gate = DualFocus(bundle), Gate(bundle)
    handle = model.submit(picture, QUESTION)
    picture[:] = 0
    gate.open.set()
    same(Pair(PICTURES[0], QUESTION), handle.result(), expected(0, 0, "dual"), FAKE, alike=True)


def test_ctrl_c_while_waiting_cancels_the_question() -> None:
    bundle = make()
    model, gate = DualFocus(bundle), Gate(bundle)

    def interrupt() -> None:
        assert gate.reached.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        model.ask(PICTURES[0], QUESTION)
    thread.join()
    gate.open.set()
    same(
        Pair(PICTURES[1], QUESTION),
        model.ask(PICTURES[1], QUESTION),
        expected(1, 0, "dual"),
        FAKE,
        alike=True,
    )


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_fork_is_told_to_open_a_model_of_its_own() -> None:
    """Also if it holds a question that the parent asked; and it ends."""
    done = run(
        """
import os, sys
import numpy as np
from dualfocus.runtime import DualFocus, EngineError
model = DualFocus(threads=1)
picture = np.zeros((40, 40, 3), np.uint8)
handle = model.submit(picture, "What is it?")
child = os.fork()
if child == 0:
    for ask in (lambda: model.ask(picture, "What is it?"), handle.result, handle.cancel, lambda: [*handle]):
        try:
            ask()
        except EngineError as error:
            print(error)
    sys.exit()
os.waitpid(child, 0)
print(handle.result().answer != "")
"""
    )
    assert done.stderr == ""
    *told, answered = done.stdout.splitlines()
    assert answered == "True"
    assert len(told) == 4
    assert all("open the model after the fork" in line for line in told)


def test_a_process_ends_while_questions_are_on_their_way() -> None:
    done = run(
        """
import numpy as np
from dualfocus.runtime import DualFocus
model = DualFocus(threads=1)
handles = [model.submit(np.full((40, 40, 3), at, np.uint8), "What is it?") for at in range(40)]
print("asked")
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("numpy", "PIL", "tokenizers", "onnxruntime", "dualfocus.runtime")
    done = run(f"import sys, dualfocus; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout == "[]\n"
    done = run("import dualfocus; print(dualfocus.DualFocus.__name__, 'DualFocus' in dir(dualfocus))")
    assert done.stdout == "DualFocus True\n"
    assert "has no attribute" in run("import dualfocus; dualfocus.Nothing").stderr
