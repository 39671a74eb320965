"""The answers of a run as a JSONL file: appended one by one, and gone on with after whatever ended the run.

A run that asks many machines appends them as they come; once all are there they are in the questions' order.

A line is LLaVA's ``{question_id, prompt, text, answer_id, model_id, metadata}``, so that the published
scripts can read it; what is asked twice, as by TextVQA, has one. Of `metadata`, ``benchmark``, ``mode`` and
``bundle`` say which run it is of, and the rest what both passes said: ``macro`` and ``micro`` (null where
there was none), ``chosen``, ``fallback``, ``box`` and ``crop`` in pixels of the picture, its ``size``,
``losses`` and ``confidence`` of macro and micro, ``ms``, and ``picture``, a hash of its pixels. A
question that the model cannot be asked, as one longer than its context, has an empty text, and
``unanswered`` says why.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dualfocus.bench.questions import Asked, Id, Key
from dualfocus.runtime import FocusResult, InputError
from dualfocus.runtime.files import naming, sync_one, to_json
from dualfocus.runtime.image import Picture
from dualfocus.runtime.prefix_cache import image_name
from dualfocus.runtime.result import Answer, Mode

Line = dict[str, Any]

_Pixel = Annotated[int, Meta(ge=0, le=1 << 31)]
_Side = Annotated[int, Meta(ge=1, le=1 << 31)]


class _Metadata(msgspec.Struct):
    benchmark: str
    mode: str
    bundle: str
    macro: str | None
    micro: str | None
    chosen: Literal["macro", "micro", "none"]
    fallback: str | None
    box: tuple[float, float, float, float] | None
    crop: tuple[_Pixel, _Pixel, _Pixel, _Pixel] | None
    size: tuple[_Side, _Side]
    losses: tuple[float | None, float | None]
    confidence: tuple[float | None, float | None]
    ms: Annotated[float, Meta(ge=0, le=1e12)]
    picture: str
    unanswered: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where fields contradict each other."""
        if self.mode == "dual" and self.macro is None and self.unanswered is None:
            raise ValueError("a dual answer without a macro one")
        if (self.chosen == "none") != (self.unanswered is not None):
            raise ValueError(f"chosen is {self.chosen} and unanswered {self.unanswered!r:.40}")
        if self.crop is not None:
            x0, y0, x1, y1 = self.crop
            if self.box is None or x0 >= x1 or y0 >= y1:
                raise ValueError("a crop that is empty, or of no box")


class _Line(msgspec.Struct):
    question_id: Id
    prompt: str
    text: str
    answer_id: str
    model_id: str
    metadata: _Metadata


BEGIN = b'{"question_id": '  # of every line that `Run.line` makes
SYNC_AFTER = 1.0  # seconds: a kill loses no answer, a power cut those of a second


@dataclass(frozen=True)
class Run:
    """What all answers of a file have in common."""

    benchmark: str
    mode: Mode
    model: str  # the bundle's name,
    bundle: str  # and what its manifest hashes to

    def line(self, asked: Asked, picture: Picture, result: FocusResult) -> Line:
        """The line of an answered question."""
        passes = result.macro, result.micro
        return self._line(
            asked,
            picture,
            asked.final(result.answer),
            **{name: of and of.text for name, of in zip(("macro", "micro"), passes, strict=True)},
            chosen=result.chosen,
            fallback=result.fallback,
            box=result.box and list(result.box.corners),
            crop=result.crop and list(result.crop),
            losses=[of and of.loss for of in passes],
            confidence=[_confidence(of) for of in passes],
            ms=round(result.times_ms["total"], 3),
        )

    def unanswered(self, asked: Asked, picture: Picture, why: str) -> Line:
        """The line of a question that the model cannot be asked."""
        nothing = dict.fromkeys(("macro", "micro", "fallback", "box", "crop"))
        two = [None, None]
        return self._line(
            asked, picture, "", **nothing, chosen="none", losses=two, confidence=two, ms=0.0, unanswered=why
        )

    def _line(self, asked: Asked, picture: Picture, text: str, **metadata: Any) -> Line:
        height, width = picture.shape[:2]
        seed = json.dumps([self.benchmark, self.mode, self.bundle, *asked.key])
        return {
            "question_id": asked.id,
            "prompt": asked.prompt,
            "text": text,
            "answer_id": str(uuid.uuid5(uuid.NAMESPACE_OID, seed)),
            "model_id": self.model,
            "metadata": {
                "benchmark": self.benchmark,
                "mode": self.mode,
                "bundle": self.bundle,
                **metadata,
                "size": [width, height],
                "picture": fingerprint(picture),
            },
        }


def _confidence(answer: Answer | None) -> float | None:
    return None if answer is None else round(answer.generation.confidence, 6)


def fingerprint(picture: Picture) -> str:
    """A short hash of a picture's pixels."""
    return image_name(picture, "")[:16]


class Answers:
    """A run's answers by question, and the file that they are appended to, if there is one.

    Opening the file takes it for this process alone, drops what a killed one had half written of its last
    line, and what a power cut left of its end; it raises InputError if what the file holds is not of this
    run. `lost` says in a sentence what a power cut took.
    """

    def __init__(self, path: Path | None, run: Run) -> None:
        self.path = path
        self.run = run
        self.lines: dict[Key, Line] = {}
        self.lost: str | None = None
        self._file: int | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> Answers:
        if self.path is not None:
            self._is_new = not self.path.exists()
            # a FIFO without a reader would block the opening
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
            try:
                self._file = os.open(self.path, flags, 0o666)
            except OSError as error:
                raise InputError(f"{self.path} cannot be written: {error.strerror}") from None
            try:
                self._take(self.path, self._file)
            except BaseException:
                os.close(self._file)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self.path is not None:
            try:
                with naming(self.path):
                    os.fsync(self._file)
            finally:
                os.close(self._file)
            if self._is_new and not self.lines:
                self.path.unlink()  # nothing was answered
            else:
                sync_one(self.path.resolve().parent)  # its name

    def append(self, line: Line) -> None:
        """Take an answer, and have it written before this returns."""
        key = line["question_id"], line["prompt"]
        assert key not in self.lines, f"question {key} was answered twice"
        if self._file is not None and self.path is not None:
            rest = (to_json(line) + "\n").encode()
            with naming(self.path):
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                if time.monotonic() - self._synced > SYNC_AFTER:
                    os.fsync(self._file)
                    self._synced = time.monotonic()
        self.lines[key] = line

    def arrange(self, keys: Iterable[Key]) -> None:
        """Put the answers, all of which are of `keys`, into their order, also in the file: no more follow.

        Published scripts pair a benchmark's lines with its answers by their order.
        """
        ordered = {key: self.lines[key] for key in keys if key in self.lines}
        assert len(ordered) == len(self.lines)
        if self.path is not None and list(ordered) != list(self.lines):
            path = self.path.resolve()  # a link stays one
            aside = path.with_name(f".{path.name}.new")
            with naming(aside), aside.open("wb") as file:
                file.writelines((to_json(line) + "\n").encode() for line in ordered.values())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            sync_one(path.parent)
        self.lines = ordered

    def _take(self, path: Path, file: int) -> None:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise InputError(f"{path} is not a regular file, expected one for the answers")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path} is being written by another process") from None
        content = path.read_bytes()
        written = content.rstrip(b"\0")
        whole, end, cut = written.rpartition(b"\n")
        if content and not written:
            raise InputError(f"{path} holds nothing but NUL bytes, as a power cut can leave it: remove it")
        if not cut.startswith(BEGIN[: len(cut)]):
            raise InputError(f"{path}: its last line is not an answer that `dualfocus eval` wrote")
        for number, text in enumerate((whole + end).splitlines(), 1):
            where = f"{path}, line {number}"
            line = self._check(where, text)
            key = line["question_id"], line["prompt"]
            if key in self.lines:
                raise InputError(
                    f"{where} answers the question {key[0]!r:.100} again, expected one answer to each"
                )
            self.lines[key] = line
        if lost := len(content) - len(written):
            size = (len(whole + end) / len(self.lines)) if self.lines else len(cut) + lost
            count = max(1, round((len(cut) + lost) / size))
            self.lost = (
                f"{path}: its last {lost:,} bytes are NUL, as a power cut leaves them: about {count:,} of "
                "its answers are lost, and are asked for again"
            )
        if len(whole + end) < len(content):
            os.ftruncate(file, len(whole + end))

    def _check(self, where: str, text: bytes) -> Line:
        try:
            line = msgspec.json.decode(text)
            msgspec.convert(line, _Line)
        except msgspec.ValidationError as error:
            raise InputError(
                f"{where} is not an answer that `dualfocus eval` wrote: {error!s:.300}"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from None
        metadata = line["metadata"]
        found = Run(metadata["benchmark"], metadata["mode"], line["model_id"], metadata["bundle"])
        if found != self.run:
            raise InputError(f"{where} is of {_words(found)}, expected {_words(self.run)}")
        checked: Line = line
        return checked


def _words(run: Run) -> str:
    benchmark, mode, model, bundle = map(_short, (run.benchmark, run.mode, run.model, run.bundle))
    return f"{benchmark} in mode {mode} by the bundle {model} ({bundle})"


def _short(text: str) -> str:
    return text if len(text) <= 60 and text.isprintable() else f"{text!r:.60}"
