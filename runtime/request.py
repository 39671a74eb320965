"""A request: its protocol as far as it has come, what that waits for, and what the request cost."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dualfocus.runtime.engines import Array
from dualfocus.runtime.generation import Reply, Scoring
from dualfocus.runtime.geometry import Region
from dualfocus.runtime.image import Picture
from dualfocus.runtime.result import Counters, Event, FocusResult, ReplyToken, Stage, StageClock
from dualfocus.runtime.sequence import CachedSequence, Extension
from dualfocus.runtime.work import Encode, Generate, Score, Steps


@dataclass(eq=False)
class Job:
    """One piece of work, from the step that yields it until `branch` is sent its result."""

    work: Encode | Generate | Score | Region | Steps[Any]
    branch: Branch
    stage: str = ""  # what the names of its stages begin with
    live: Reply | Scoring | None = None
    slot: CachedSequence | None = None
    prompt: Extension | None = None  # what is left to prefill
    result: Any = None
    done: bool = False


@dataclass(eq=False)
class Branch:
    """A generator of a request: its protocol, or one that is the work of the job `parent`."""

    steps: Steps[Any]
    parent: Job | None = None
    jobs: list[Job] = field(default_factory=list)  # of the step that was yielded last
    state: str = "new"  # then "running", at last "ended"


class Request:
    """A question on its way through an `Engine`. When it is `done`, `result` is its answer or raises."""

    def __init__(
        self, picture: Picture, name: str, priority: int, clock: StageClock, follow: Callable[[Event], object]
    ) -> None:
        """`name` is the picture's, `clock` runs already; `follow` is called with each event."""
        self.picture = picture
        self.name = name
        self.priority = priority
        self.counters = Counters()
        self.jobs: list[Job] = []  # that are not done, in order
        self.features: dict[str, Array] = {}  # by name, (T, D) each: the images it has encoded
        self.done = False
        self.answering = False  # it has generated a token
        self._branches: list[Branch] = []
        self._clock = clock
        self._follow = follow
        self._stage: str | None = None
        self._replied = False
        self._value: Any = None
        self._error: BaseException | None = None

    @property
    def result(self) -> Any:
        """What the protocol returned. Raises what it failed with, CancelledError if it was cancelled."""
        assert self.done
        if self._error is not None:
            raise self._error
        return self._value

    def enter(self, stage: str) -> None:
        """The stage that its time is counted to from now on."""
        if stage != self._stage:
            self._stage = stage
            self._clock.enter(stage)
            self.emit(Stage(stage))

    def emit(self, event: Event) -> None:
        """Pass `event` to the follower."""
        self.answering |= isinstance(event, ReplyToken)
        self._follow(event)

    def start(self, steps: Steps[Any]) -> None:
        """Run a protocol up to its first work."""
        self._branch(steps, None)

    def finish(self, job: Job, result: Any) -> None:
        """A job is done: resume the branch that waits for it, if it waits for nothing else."""
        self.jobs.remove(job)
        self._replied |= isinstance(job.work, Generate)
        job.result, job.done, branch = result, True, job.branch
        self._advance(branch)
        while branch.state == "ended" and branch.parent is not None:
            branch = branch.parent.branch
            self._advance(branch)

    def fail(self, error: BaseException) -> None:
        """End the request with `error`, unless it has ended."""
        if self.done:
            return
        self._error, self.done = error, True
        self.jobs.clear()
        for branch in reversed(self._branches):
            with suppress(BaseException):  # what a protocol does when it is closed is its own
                branch.steps.close()

    def _branch(self, steps: Steps[Any], parent: Job | None) -> None:
        branch = Branch(steps, parent)
        self._branches.append(branch)
        self._advance(branch)

    def _advance(self, branch: Branch) -> None:
        while branch.state != "ended" and all(job.done for job in branch.jobs):
            results = [job.result for job in branch.jobs] if branch.state == "running" else None
            branch.state = "running"
            try:
                work = branch.steps.send(results)  # type: ignore[arg-type]  # the first is None
            except StopIteration as end:
                self._end(branch, end.value)
                return
            branch.jobs = [Job(item, branch) for item in work]
            for job in branch.jobs:
                self._begin(job)

    def _begin(self, job: Job) -> None:
        match job.work:
            case Region():
                job.done = True
                self.emit(job.work)
            case Generator():
                self._branch(job.work, job)
            case Encode() | Generate() | Score():
                if isinstance(job.work, Generate) and self._replied:
                    job.stage = f"{job.work.reply}_"
                self.jobs.append(job)
            case other:
                raise TypeError(
                    f"a protocol yielded an item of type {type(other).__name__}, expected Encode, Generate, "
                    "Score, Region or another generator"
                )

    def _end(self, branch: Branch, value: Any) -> None:
        branch.state = "ended"
        if branch.parent is not None:
            branch.parent.result, branch.parent.done = value, True
            return
        if isinstance(value, FocusResult):
            value = replace(value, counters=self.counters, times_ms=self._clock.stop())
        self._value, self.done = value, True
