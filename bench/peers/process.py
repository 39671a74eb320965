"""Work in a process of its own: what it says, how long each part took there, and how it ended.

A process that raises or dies does not take the benchmark with it: whoever waits for it gets a `PeerError`
with the reason. What libraries print goes to a log file.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dualfocus.bench.peers.base import Counts, Opened, Part, Peer, Precision, Work

ENDING = 10  # seconds that a process has to end by itself
LOOK, REST = 0.02, 1.0  # seconds between looks whether a process is at rest, and at most until it has to be

Target = Callable[..., None]  # of the module's top level; called with a connection and further arguments


class PeerError(Exception):
    """A process could not do what it was asked; the text is the reason."""


@dataclass(frozen=True)
class Failure:
    """What a process says in place of an answer."""

    reason: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """In one line."""
        lines = str(error).strip().splitlines()
        return cls(f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__)


@dataclass(frozen=True)
class Ready:
    """A peer was opened."""

    form: str
    parts: tuple[Part, ...]
    cannot: Mapping[Part, str]


@dataclass(frozen=True)
class Done:
    """A part was done once."""

    ms: float
    counts: Counts
    idle_ms: float  # CPU time that the process took between its last answer and this part
    peak_rss: int  # bytes, so far


class Child:
    """A process that runs `target`; everything that it sends can be received here."""

    def __init__(self, target: Target, *args: Any, log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy this process' threads' locks
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, log, target, args), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is noticed here

    def send(self, message: object) -> None:
        """PeerError if the process is gone."""
        try:
            self._connection.send(message)
        except OSError:
            raise PeerError(self._fate()) from None

    def receive(self, seconds: float | None = None) -> Any:
        """The next message; PeerError if it is a `Failure`, or the process is gone, or silent for so long."""
        try:
            if not self._connection.poll(seconds):
                raise PeerError(f"its process said nothing for {seconds:.0f} s, and was ended")
            message = self._connection.recv()
        except (EOFError, OSError):
            raise PeerError(self._fate()) from None
        if isinstance(message, Failure):
            raise PeerError(message.reason)
        return message

    def close(self) -> None:
        """End the process, by force where it does not end by itself."""
        with suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        self._process.join(ENDING)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _fate(self) -> str:
        self._process.join(ENDING)
        status = self._process.exitcode
        if status is None:
            return "its process stopped answering"
        if status >= 0:
            return f"its process ended with status {status}"
        name = signal.Signals(-status).name
        hint = ", as happens when memory runs out" if -status == getattr(signal, "SIGKILL", None) else ""
        return f"its process was ended by {name}{hint}"


class OpenedPeer:
    """A peer, opened in a process of its own."""

    def __init__(self, module: str, precision: Precision, work: Work, log: Path) -> None:
        """PeerError if it cannot be opened."""
        self._child = Child(_serve, module, precision, work, log=log)
        try:
            self.ready: Ready = self._child.receive()
        except PeerError:
            self._child.close()
            raise

    def do(self, part: Part) -> Done:
        """Do `part` once; PeerError if it fails."""
        self._child.send(part)
        done: Done = self._child.receive()
        return done

    def close(self) -> None:
        """End its process."""
        self._child.close()


def _main(connection: Connection, log: Path, target: Target, args: tuple[Any, ...]) -> None:
    """What the process does."""
    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):  # below Python: native libraries write there too
            os.dup2(file.fileno(), stream)
    try:
        target(connection, *args)
    except Exception as error:
        traceback.print_exc()
        with suppress(OSError):  # nobody is left to be told
            connection.send(Failure.of(error))


def _serve(connection: Connection, module: str, precision: Precision, work: Work) -> None:
    """Open a peer and do the parts that are asked for, until there are no more."""
    peer: Peer = importlib.import_module(module)
    opened = peer.PRECISIONS[precision](work)
    connection.send(Ready(opened.form, tuple(opened.parts), dict(opened.cannot)))
    answered = time.process_time()
    with suppress(EOFError):  # the benchmark was ended
        while (part := connection.recv()) is not None:
            idle_ms = 1e3 * (time.process_time() - answered)
            connection.send(_do(opened, part, idle_ms))
            answered = time.process_time()


def _do(opened: Opened, part: Part, idle_ms: float) -> Done | Failure:
    try:
        if part in opened.before:
            opened.before[part]()
        begin = time.perf_counter()
        counts = opened.parts[part]()
        ms = 1e3 * (time.perf_counter() - begin)
    except Exception as error:
        traceback.print_exc()
        return Failure.of(error)
    _come_to_rest()
    return Done(ms, counts, idle_ms, peak_rss())


def _come_to_rest() -> None:
    """Wait until this process leaves the cores alone: libraries' threads spin for a while after their work,
    ONNX Runtime's for tens of milliseconds, and the next peer's turn comes at once."""
    end = time.monotonic() + REST
    while time.monotonic() < end:
        begin = time.process_time()
        time.sleep(LOOK)
        if time.process_time() - begin < LOOK / 20:
            return


def peak_rss() -> int:
    """The most memory that this process ever had in RAM, in bytes.

    From Linux' own account of the process: `getrusage` there begins with what the parent had.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
