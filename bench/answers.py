"""The answers of a run as a JSONL file: appended one by one, and gone on with after whatever ended the run.

A run that asks many machines appends them as they come; once all are there they are in the questions' order.

A line is LLaVA's ``{question_id, prompt, text, answer_id, model_id, metadata}``, so that the published
scripts can read it; what is asked twice, as by TextVQA, has one. Of `metadata`, ``benchmark``, ``mode`` and
``bundle`` say which run it is of, and the rest what both passes said: ``macro`` and ``micro`` (null where
there was none), ``chosen``, ``fallback``, ``box`` and ``crop`` in pixels of the picture, its ``size``,
``losses`` and ``confidence`` of macro and micro, ``ms``, and ``picture``, a hash of its pixels.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualfocus.bench.questions import Asked, Key
from dualfocus.runtime import FocusResult, InputError
from dualfocus.runtime.image import Picture
from dualfocus.runtime.prefix_cache import image_name
from dualfocus.runtime.result import Answer, Mode

Line = dict[str, Any]

FIELDS = {
    "question_id": str | int,
    "prompt": str,
    "text": str,
    "answer_id": str,
    "model_id": str,
    "metadata": dict,
}
METADATA = {
    "benchmark": str, "mode": str, "bundle": str, "macro": str | None, "micro": str | None, "chosen": str,
    "fallback": str | None, "box": list | None, "crop": list | None, "size": list, "losses": list,
    "confidence": list, "ms": int | float, "picture": str,
}  # fmt: skip
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
        height, width = picture.shape[:2]
        seed = json.dumps([self.benchmark, self.mode, self.bundle, *asked.key])
        return {
            "question_id": asked.id,
            "prompt": asked.prompt,
            "text": asked.final(result.answer),
            "answer_id": str(uuid.uuid5(uuid.NAMESPACE_OID, seed)),
            "model_id": self.model,
            "metadata": {
                "benchmark": self.benchmark,
                "mode": self.mode,
                "bundle": self.bundle,
                **{name: of and of.text for name, of in zip(("macro", "micro"), passes, strict=True)},
                "chosen": result.chosen,
                "fallback": result.fallback,
                "box": result.box and list(result.box.corners),
                "crop": result.crop and list(result.crop),
                "size": [width, height],
                "losses": [of and of.loss for of in passes],
                "confidence": [_confidence(of) for of in passes],
                "ms": round(result.times_ms["total"], 3),
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
    line, and raises InputError if what it holds is not of this run.
    """

    def __init__(self, path: Path | None, run: Run) -> None:
        self.path = path
        self.run = run
        self.lines: dict[Key, Line] = {}
        self._file: int | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> Answers:
        if self.path is not None:
            self._is_new = not self.path.exists()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                self._take(self.path, self._file)
            except BaseException:
                os.close(self._file)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            if self.path is not None and self._is_new and not self.lines:
                self.path.unlink()  # nothing was answered

    def append(self, line: Line) -> None:
        """Take an answer, and have it written before this returns."""
        key = line["question_id"], line["prompt"]
        assert key not in self.lines, f"question {key} was answered twice"
        if self._file is not None:
            rest = (json.dumps(line) + "\n").encode()
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
            with aside.open("wb") as file:
                file.writelines((json.dumps(line) + "\n").encode() for line in ordered.values())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        self.lines = ordered

    def _take(self, path: Path, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path} is being written by another process") from None
        whole, end, cut = path.read_bytes().rpartition(b"\n")
        if not cut.startswith(BEGIN[: len(cut)]):
            raise InputError(f"{path}: its last line is not an answer that `dualfocus eval` wrote")
        for number, text in enumerate((whole + end).splitlines(), 1):
            where = f"{path}, line {number}"
            line = self._check(where, text)
            key = line["question_id"], line["prompt"]
            if key in self.lines:
                raise InputError(
                    f"{where} answers the question {key[0]!r} again, expected one answer to each"
                )
            self.lines[key] = line
        if cut:
            os.ftruncate(file, len(whole + end))

    def _check(self, where: str, text: bytes) -> Line:
        try:
            line: Line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from None
        if not _has(line, FIELDS) or not _has(metadata := line["metadata"], METADATA):
            raise InputError(f"{where} is not an answer that `dualfocus eval` wrote")
        found = Run(metadata["benchmark"], metadata["mode"], line["model_id"], metadata["bundle"])
        if found != self.run:
            raise InputError(f"{where} is of {_words(found)}, expected {_words(self.run)}")
        return line


def _has(entry: object, kinds: Mapping[str, Any]) -> bool:
    """Whether it is an object with all these fields, of these types."""
    return isinstance(entry, dict) and all(
        name in entry and isinstance(entry[name], kind) for name, kind in kinds.items()
    )


def _words(run: Run) -> str:
    return f"{run.benchmark} in mode {run.mode} by the bundle {run.model} ({run.bundle})"
