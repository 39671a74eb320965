"""A model as a program uses it: `DualFocus` opens a bundle, and any thread may ask it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import get_args

import numpy as np

from dualfocus.runtime.bundle import BUILT_IN, Bundle
from dualfocus.runtime.engine import CHUNK, Engine
from dualfocus.runtime.errors import BusyError, InputError
from dualfocus.runtime.image import Picture, PictureSource, open_picture
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.prefix_cache import image_name
from dualfocus.runtime.protocol import focus
from dualfocus.runtime.result import Event, FocusResult, Mode, check_mode
from dualfocus.runtime.turns import Question
from dualfocus.runtime.work import Protocol
from dualfocus.runtime.worker import Handle, Worker

Asked = tuple[PictureSource | Callable[[], Picture], str | Question]
ON_CPU, ON_GPU = 16, 2  # slots: memory is touched as it is used, or reserved at once


class DualFocus:
    """Answers questions about pictures, and keeps what it saw of them for later questions.

    A picture is anything `image.open_picture` reads: a file name, an encoded file's bytes, a binary file
    object, a Pillow image, an (H, W, 3) uint8 RGB array or a uint8 tensor of PyTorch. Several threads may
    ask at once. A forked process has to open a model of its own.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str = BUILT_IN,
        *,
        device: str = "auto",
        threads: int | None = None,
        select: SelectRule | None = None,
        free_box: bool = False,
        skip_above: float | None = None,
        slots: int | None = None,
        cache_mb: float = 512,
        chunk: int = CHUNK,
        queue: int = 1024,
    ) -> None:
        """`device` and `threads` open a bundle that is a path (`Bundle.open`, which says what it raises).

        `select`, `free_box` and `skip_above` are `protocol.focus`'s. `slots` rows of KV cache answer half as
        many questions at once; None takes `ON_CPU`, or `ON_GPU`, where questions then run one by one.
        `cache_mb` and `chunk` are `Engine`'s. At most `queue` questions may be pending.
        """
        if select not in (None, *get_args(SelectRule)):
            raise InputError(f"unknown select {select!r}: expected {', '.join(get_args(SelectRule))}")
        if skip_above is not None and not 0 <= skip_above <= 1:
            raise InputError(f"skip_above is {skip_above}, expected a probability from 0 to 1")
        for name, value, least in (("slots", slots, 1), ("cache_mb", cache_mb, 0), ("chunk", chunk, 1)):
            if value is not None and not value >= least:  # NaN too
                raise InputError(f"{name} is {value}, expected {least} or more")
        if queue < 1:
            raise InputError(f"queue is {queue}, expected 1 or more")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, device=device, threads=threads)
        self.bundle = bundle
        self._focus = partial(focus, select=select, free_box=free_box, skip_above=skip_above)
        self._slots = slots if slots is not None else ON_CPU if bundle.device.kind == "cpu" else ON_GPU
        engine = Engine(bundle, slots=self._slots, cache_mb=cache_mb, chunk=chunk)
        self._worker = Worker(engine, queue)

    def ask(
        self,
        picture: PictureSource,
        question: str | Question,
        mode: Mode = "dual",
        *,
        box_reply: str | None = None,
    ) -> FocusResult:
        """Answer `question` about `picture`.

        "dual" runs both passes and takes the better answer; "macro" looks at the whole picture only; "micro"
        takes the zoomed answer, and the macro answer where the model points nowhere. `box_reply` stands for
        the model's reply to the locate turn. Raises PictureError, QuestionError for a question that is empty
        or too long, and InputError for another mode, before anything is computed.
        """
        return _wait(self._worker.submit(_kept(picture), question, self._protocol(mode, box_reply)))

    def stream(self, picture: PictureSource, question: str | Question, mode: Mode = "dual") -> Stream:
        """What `ask` does, as it happens: stages, the replies' tokens, the region, at last the result.

        A stream that is closed before its end cancels the question.
        """
        return Stream(self._worker.submit(_kept(picture), question, self._protocol(mode)))

    def ask_many(self, asked: Iterable[Asked], mode: Mode = "dual") -> Batch:
        """Answer (picture, question) pairs side by side: an iterator over `ask`'s answers, in order.

        Pictures are read when their turn comes: a picture may also be a function that gives it. What a pair
        fails with is raised at its place, and the iterator can be read on.
        """
        return Batch(self, asked, self._protocol(mode), self._slots)

    def session(self, picture: PictureSource) -> Session:
        """For several questions about `picture`, which is hashed only once."""
        pixels = _kept(picture)
        return Session(self._worker, self._protocol, pixels, image_name(pixels, self.bundle.digest))

    def submit(
        self,
        picture: PictureSource,
        question: str | Question,
        protocol: Protocol | None = None,
        *,
        priority: int = 0,
    ) -> Handle:
        """Queue a question and return at once. `protocol` None is DualFocus, as `ask` runs it.

        Of the questions that wait, those of the highest `priority` come first. The handle's result is what
        the protocol returns. Raises as `ask` does, and BusyError where too many are pending.
        """
        protocol = protocol or self._protocol("dual")
        return self._worker.submit(_kept(picture), question, protocol, priority=priority)

    def close(self) -> None:
        """Cancel what is pending, and end the engine's thread."""
        self._worker.close()

    def __enter__(self) -> DualFocus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _protocol(self, mode: Mode, box_reply: str | None = None) -> Protocol:
        check_mode(mode)
        if not isinstance(box_reply, str | None):
            raise InputError(f"box_reply is of type {type(box_reply).__name__}, expected text")
        return partial(self._focus, mode=mode, box_reply=box_reply)


class Session:
    """Questions about one picture. Made by `DualFocus.session`."""

    def __init__(
        self, worker: Worker, protocol: Callable[[Mode], Protocol], picture: Picture, name: str
    ) -> None:
        self._worker = worker
        self._protocol = protocol
        self._picture = picture
        self._name = name

    def ask(self, question: str | Question, mode: Mode = "dual") -> FocusResult:
        """As `DualFocus.ask`."""
        return _wait(self.submit(question, self._protocol(mode)))

    def stream(self, question: str | Question, mode: Mode = "dual") -> Stream:
        """As `DualFocus.stream`."""
        return Stream(self.submit(question, self._protocol(mode)))

    def submit(
        self, question: str | Question, protocol: Protocol | None = None, *, priority: int = 0
    ) -> Handle:
        """As `DualFocus.submit`."""
        protocol = protocol or self._protocol("dual")
        return self._worker.submit(self._picture, question, protocol, name=self._name, priority=priority)


class Stream:
    """A question's events as they come; the last is its result. Closing or dropping it cancels that."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._events = iter(handle)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        event: Event = next(self._events)
        return event

    def close(self) -> None:
        """Cancel the question, if it is not answered."""
        self._handle.cancel()

    def __del__(self) -> None:
        with suppress(InputError):  # a fork drops what is its parent's
            self.close()


class Batch:
    """Answers in order, as `DualFocus.ask_many` gives them. `given` counts them, failures too.

    Any thread may take the next one. Closing or dropping it cancels what is pending.
    """

    def __init__(self, model: DualFocus, asked: Iterable[Asked], protocol: Protocol, ahead: int) -> None:
        self.given = 0
        self._coming: deque[Handle | Exception] = deque()
        self._model = model
        self._asked = iter(asked)  # raises for what is none
        self._protocol = protocol
        self._ahead = ahead
        self._next: list[Asked] = []  # one that was taken and not submitted yet
        self._lock = Lock()

    def __iter__(self) -> Batch:
        return self

    def __next__(self) -> FocusResult:
        with self._lock:
            self._submit()
            if not self._coming:
                raise StopIteration
            first = self._coming.popleft()
            self.given += 1
        if isinstance(first, Exception):
            raise first
        return _wait(first)

    def close(self) -> None:
        """Cancel what is pending."""
        for handle in self._coming:
            if isinstance(handle, Handle):
                handle.cancel()

    def __del__(self) -> None:
        with suppress(InputError):  # a fork drops what is its parent's
            self.close()

    def _submit(self) -> None:
        """Keep enough on the way that the engine never waits, and as much as the queue takes."""
        while len(self._coming) < self._ahead:
            try:
                self._next = self._next or [next(self._asked)]
            except StopIteration:
                return
            try:
                picture, question = self._next[0]
                pixels = picture() if callable(picture) else picture
                self._coming.append(self._model.submit(pixels, question, self._protocol))
            except BusyError as error:
                if self._coming:
                    return
                self._coming.append(error)
            except Exception as error:
                self._coming.append(error)
            self._next.clear()


def _kept(source: PictureSource) -> Picture:
    """The picture at `source`, as an array that nobody else can change."""
    picture = open_picture(source)
    return picture.copy() if isinstance(source, np.ndarray) else picture


def _wait(handle: Handle) -> FocusResult:
    try:
        result: FocusResult = handle.result()
    except BaseException:  # Ctrl-C, for one: nobody waits for it any more
        handle.cancel()
        raise
    return result
