"""The thread that owns an engine. Any thread submits requests to it, and holds a handle of each."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from queue import SimpleQueue
from typing import Any

from dualfocus.runtime.engine import Engine
from dualfocus.runtime.errors import BusyError, EngineError
from dualfocus.runtime.image import Picture
from dualfocus.runtime.request import Request
from dualfocus.runtime.result import Event
from dualfocus.runtime.turns import Question
from dualfocus.runtime.work import Protocol


class Handle:
    """A request that was submitted. Any thread may use it."""

    def __init__(self, worker: Worker, request: Request, events: SimpleQueue[Event | None]) -> None:
        self._worker = worker
        self._request = request
        self._events = events
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """`result` would not wait."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for what the protocol returns. Raises what it failed with, CancelledError if it was cancelled,
        and TimeoutError after `timeout` seconds."""
        self._worker.check_waiting()
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer after {timeout} s")
        return self._request.result

    def __iter__(self) -> Iterator[Any]:
        """The events as they come, each for one reader. The last is the result, or raises as that does."""
        self._worker.check_waiting()
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)  # for the next reader
        yield self.result()

    def cancel(self) -> None:
        """Ask for its end, in whatever stage it is: unless it is done, `result` raises CancelledError."""
        self._worker.post(lambda engine: engine.cancel(self._request))

    def settle(self) -> None:
        """Called by the engine's thread once the request is done."""
        self._events.put(None)
        self._done.set()


class _Inbox:
    """Commands to the engine's thread. It holds no `Worker`: that can be freed while the thread waits."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.commands: list[Callable[[Engine], object]] = []
        self.handles: dict[Request, Handle] = {}  # of requests that are not done
        self.closed = False

    def serve(self, engine: Engine) -> None:
        """The thread's work: step while there is something to do."""
        closed = False
        while not closed:
            with self.changed:
                self.changed.wait_for(lambda: self.commands or self.closed or not engine.idle)
                commands, self.commands, closed = self.commands, [], self.closed
            for command in [*commands, Engine.step]:
                with contextlib.suppress(BaseException):  # which every request has failed with
                    command(engine)
            with self.changed:
                if closed:
                    for request in self.handles:
                        with contextlib.suppress(BaseException):
                            engine.cancel(request)
                        request.fail(CancelledError())  # it may not have come to the engine
                for request in [request for request in self.handles if request.done]:
                    self.handles.pop(request).settle()


class Worker:
    """An engine on a thread of its own."""

    def __init__(self, engine: Engine, queue: int) -> None:
        """At most `queue` requests may be pending."""
        self._engine = engine
        self._queue = queue
        self._inbox = _Inbox()
        self._process = os.getpid()
        # a daemon: the interpreter would wait for another kind before it runs what `finalize` registers
        self._thread = threading.Thread(
            target=self._inbox.serve, args=[engine], name="dualfocus", daemon=True
        )
        self._thread.start()
        self.close = weakref.finalize(self, _close, self._inbox, self._thread, self._process)

    def submit(
        self,
        picture: Picture,
        question: str | Question,
        protocol: Protocol,
        *,
        name: str | None = None,
        priority: int = 0,
    ) -> Handle:
        """Queue a request, as `Engine.prepare` describes it.

        Raises what that raises; BusyError where too many requests are pending; EngineError after
        `close`, and in a process that was forked from the one which opened the model.
        """
        self.check_process()
        events: SimpleQueue[Event | None] = SimpleQueue()
        request = self._engine.prepare(
            picture, question, protocol, name=name, priority=priority, follow=events.put
        )
        handle = Handle(self, request, events)
        inbox = self._inbox
        with inbox.changed:
            if inbox.closed:
                raise EngineError("the model was closed: open another one")
            if len(inbox.handles) >= self._queue:
                raise BusyError(f"{self._queue} questions are waiting already: ask again later")
            inbox.commands.append(lambda engine: engine.add(request))
            inbox.handles[request] = handle
            inbox.changed.notify()
        return handle

    def post(self, command: Callable[[Engine], object]) -> None:
        """Have the engine's thread run `command` between two steps."""
        self.check_process()
        with self._inbox.changed:
            self._inbox.commands.append(command)
            self._inbox.changed.notify()

    def check_waiting(self) -> None:
        """EngineError where waiting would never end: in a forked process, or in a protocol of this engine."""
        self.check_process()
        if threading.current_thread() is self._thread:
            raise EngineError("a protocol cannot wait for another question of its model: yield that work")

    def check_process(self) -> None:
        """EngineError in a forked process: it has no such thread, and would wait for ever."""
        if os.getpid() != self._process:
            raise EngineError(
                f"the model was opened by process {self._process}, this is {os.getpid()}, forked from it: "
                "open the model after the fork"
            )


def _close(inbox: _Inbox, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:
        return
    with inbox.changed:
        inbox.closed = True
        inbox.changed.notify()
    if thread is not threading.current_thread():
        thread.join()
