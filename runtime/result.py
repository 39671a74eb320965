"""What an answer is: the chosen text, and everything that led to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dualfocus.runtime.geometry import Box, Crop, Region

Mode = Literal["dual", "macro", "micro"]
Pass = Literal["macro", "micro"]


@dataclass(frozen=True)
class Generation:
    """A greedy reply: its tokens, the end token included, and their log-probabilities."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """One pass's answer. `text` is what a user sees; `loss` is None where nothing had to be scored."""

    text: str
    generation: Generation
    loss: float | None = None

    @classmethod
    def of(cls, generation: Generation, finish: Callable[[str], str] = str) -> Answer:
        """A reply as an answer; `finish` makes the final text of it."""
        return cls(finish(generation.text), generation)


@dataclass
class Counters:
    """What an answer cost. `tokens_prefilled` + `tokens_reused` is what the plain protocol prefills."""

    vision_encodes: int = 0  # images encoded
    tokens_prefilled: int = 0  # prompt tokens computed
    tokens_reused: int = 0  # prompt tokens that were in the cache
    decode_steps: int = 0  # decoder calls that choose a token, the prefill before a reply among them


class StageClock:
    """Times stages, adding up those entered again; `on_stage` is told each one's name as it begins."""

    def __init__(self, on_stage: Callable[[str], None] | None = None) -> None:
        self._on_stage = on_stage
        self._start = time.perf_counter()
        self._times: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._on_stage is not None:
            self._on_stage(stage)
        start = time.perf_counter()
        yield
        self._times[stage] = self._times.get(stage, 0) + 1e3 * (time.perf_counter() - start)

    def stop(self) -> dict[str, float]:
        """Milliseconds of every stage, and of everything since this clock was made."""
        return {**self._times, "total": 1e3 * (time.perf_counter() - self._start)}


@dataclass(frozen=True)
class FocusResult:
    """An answered question. A pass that did not run is None."""

    answer: str
    chosen: Pass
    fallback: str | None  # why no micro answer could be had
    box: Box | None  # in pixels of the upright picture
    crop: Crop | None
    macro: Answer | None
    located: Generation | None
    micro: Answer | None
    counters: Counters
    times_ms: dict[str, float] = field(compare=False)

    @classmethod
    def conclude(
        cls,
        macro: Answer | None,
        located: Generation | None,
        region: Region,
        micro: Answer | None,
        counters: Counters,
        times_ms: dict[str, float],
    ) -> FocusResult:
        """Choose the lower loss, macro where both are equal or not scored; a pass that is alone wins."""
        chosen: Pass = "macro"
        if macro is None or (
            micro and macro.loss is not None and micro.loss is not None and micro.loss < macro.loss
        ):
            chosen = "micro"
        answer = micro if chosen == "micro" else macro
        assert answer is not None
        return cls(
            answer.text,
            chosen,
            region.problem,
            region.box,
            region.crop,
            macro,
            located,
            micro,
            counters,
            times_ms,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of the command line, schema 1."""

        def brief(answer: Answer | None) -> dict[str, Any] | None:
            return None if answer is None else {"text": answer.text, "loss": answer.loss}

        return {
            "schema": 1,
            "answer": self.answer,
            "chosen": self.chosen,
            "fallback": self.fallback,
            "box": None if self.box is None else list(self.box.corners),
            "crop": None if self.crop is None else list(self.crop),
            "macro": brief(self.macro),
            "micro": brief(self.micro),
            "counters": asdict(self.counters),
            "times_ms": {stage: round(ms, 3) for stage, ms in self.times_ms.items()},
        }
