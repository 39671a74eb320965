"""What an answer is: the chosen text, and everything that led to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from dualfocus.runtime.errors import InputError
from dualfocus.runtime.geometry import Box, Crop, Region
from dualfocus.runtime.turns import Question

Mode = Literal["dual", "macro", "micro"]
Pass = Literal["macro", "micro"]
ReplyName = str  # "macro", "locate", "micro", or what another protocol calls its own


def check_mode(mode: str) -> None:
    """Raises InputError unless `mode` is a `Mode`."""
    if mode not in get_args(Mode):
        raise InputError(f"unknown mode {mode!r}: expected {', '.join(get_args(Mode))}")


@dataclass(frozen=True)
class Generation:
    """A greedy reply: its tokens, the end token included, and their log-probabilities."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]  # None where a forced token's was never needed

    @property
    def confidence(self) -> float:
        """The geometric mean of the tokens' probabilities, as far as they were computed."""
        known = [logprob for logprob in self.logprobs if logprob is not None]
        return math.exp(sum(known) / len(known)) if known else 1.0


@dataclass(frozen=True)
class Answer:
    """One pass's answer. `text` is what the model generated; `loss` is None where nothing had to be scored.

    `letter` is that of the option which the text names, None where it names none or there are none.
    """

    text: str
    generation: Generation
    loss: float | None = None
    letter: str | None = None

    @classmethod
    def of(
        cls,
        generation: Generation,
        question: Question,
        finish: Callable[[str], str] = str,
        loss: float | None = None,
    ) -> Answer:
        """A reply as an answer to `question`; `finish` makes the final text of it."""
        text = finish(generation.text)
        return cls(text, generation, loss, question.letter(text))


@dataclass
class Counters:
    """What an answer cost. `tokens_prefilled` + `tokens_reused` is what the plain protocol prefills.

    Of several questions at once, each counts the images that were encoded for it first, and the decoder calls
    that it took part in.
    """

    vision_encodes: int = 0  # images encoded
    tokens_prefilled: int = 0  # prompt tokens computed
    tokens_reused: int = 0  # prompt tokens that did not have to be
    tokens_forced: int = 0  # reply tokens the grammar left no choice about
    tokens_drafted: int = 0  # reply tokens computed ahead: not the forced ones, unless after a wrong one
    tokens_accepted: int = 0  # drafted tokens that were chosen
    decode_steps: int = 0  # decoder calls that continue replies; one for all rows
    decode_rows: int = 0  # rows of those calls, so that rows / steps is the mean batch


@dataclass(frozen=True)
class Stage:
    """A stage of the work begins."""

    name: str


@dataclass(frozen=True)
class ReplyToken:
    """A token of a reply. `text` is what it adds: nothing, if it ends the reply or is part of a character."""

    reply: ReplyName
    token: int
    text: str


class StageClock:
    """Times stages, one after the other, adding up those entered again."""

    def __init__(self) -> None:
        self._start = self._entered = time.perf_counter()
        self._stage: str | None = None
        self._times: dict[str, float] = {}

    def enter(self, stage: str | None) -> None:
        """`stage` begins, and what was entered before ends."""
        now = time.perf_counter()
        if self._stage is not None:
            self._times[self._stage] = self._times.get(self._stage, 0) + 1e3 * (now - self._entered)
        self._stage, self._entered = stage, now

    def stop(self) -> dict[str, float]:
        """Milliseconds of every stage, and of everything since this clock was made."""
        self.enter(None)
        return {**self._times, "total": 1e3 * (self._entered - self._start)}


@dataclass(frozen=True)
class FocusResult:
    """An answered question. A pass that did not run is None."""

    answer: str  # the letter of an option, where one was named
    chosen: Pass
    skipped: bool  # the macro answer was sure enough not to look closer
    fallback: str | None  # why no micro answer could be had
    box: Box | None  # in pixels of the upright picture
    crop: Crop | None
    macro: Answer | None
    located: Generation | None
    micro: Answer | None
    # what it cost: filled in by whatever executes the protocol
    counters: Counters = field(default_factory=Counters)
    times_ms: dict[str, float] = field(default_factory=dict, compare=False)

    @classmethod
    def conclude(
        cls,
        macro: Answer | None,
        located: Generation | None,
        region: Region,
        micro: Answer | None,
        *,
        skipped: bool = False,
    ) -> FocusResult:
        """Choose the lower loss, macro where both are equal or not scored.

        A pass that is alone wins, and one that is alone in naming an option.
        """
        if macro and micro and macro.loss is not None and micro.loss is not None:
            is_micro = micro.loss < macro.loss
        else:
            is_micro = macro is None or (micro is not None and micro.letter is not None and not macro.letter)
        answer = micro if is_micro else macro
        assert answer is not None
        return cls(
            answer.letter or answer.text,
            "micro" if is_micro else "macro",
            skipped,
            region.problem,
            region.box,
            region.crop,
            macro,
            located,
            micro,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of the command line, schema 2."""

        def brief(answer: Answer | None) -> dict[str, Any] | None:
            if answer is None:
                return None
            confidence = round(answer.generation.confidence, 6)
            return {"text": answer.text, "loss": answer.loss, "confidence": confidence}

        return {
            "schema": 2,
            "answer": self.answer,
            "chosen": self.chosen,
            "skipped": self.skipped,
            "fallback": self.fallback,
            "box": None if self.box is None else list(self.box.corners),
            "crop": None if self.crop is None else list(self.crop),
            "macro": brief(self.macro),
            "micro": brief(self.micro),
            "counters": asdict(self.counters),
            "times_ms": {stage: round(ms, 3) for stage, ms in self.times_ms.items()},
        }


Event = Stage | ReplyToken | Region | FocusResult  # what a question's stream consists of; the result is last
