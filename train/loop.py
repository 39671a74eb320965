"""The loop that every training here runs in: a schedule, steps, a curve, and states to resume from.

`fit` takes its steps as they come and ends when the schedule says so, by steps (`by_steps`) or by the clock
(`by_minutes`). Everything that depends on how many processes there are, and on what, is accelerate's.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor, nn

from dualfocus.runtime.errors import InputError
from dualfocus.runtime.files import read_json

WARM_UP = 0.03  # of the way
CLIP = 1.0  # the longest that a step's gradient may be

Schedule = Callable[[int], float]  # steps done -> the share of the way behind; from 1 on, it is over


def by_steps(total: int) -> Schedule:
    """The way is `total` steps long."""
    return lambda done: done / total


def by_minutes(minutes: float) -> Schedule:
    """The way is as long as the clock says, from now on. For one process: two would not stop together."""
    start = time.monotonic()
    return lambda _: (time.monotonic() - start) / (60 * minutes)


def rate(share: float) -> float:
    """The learning rate as a share of its peak: a warm-up, then a cosine to zero."""
    if share < WARM_UP:
        return share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (min(share, 1.0) - WARM_UP) / (1 - WARM_UP)))


@dataclass(frozen=True)
class Step:
    """What one step learns from: in this process `parts`, one after the other, as many as are accumulated.

    `counts` is what all processes' parts hold together; they are summed over the run: "samples", and
    "tokens" where there are such, which the speed is then told in.
    """

    parts: Sequence[Any]
    counts: Mapping[str, int]


class Curve:
    """A run's curve, one JSON line at a time, and on a terminal its progress.

    A line's `minutes` are those since this process began; `step` and the counts are of the whole run.
    """

    def __init__(
        self, path: Path | None, counts: Mapping[str, int] | None = None, *, every: float = 0.0
    ) -> None:
        """Lines go to the end of `path`, one `every` so many seconds; None: this process writes none.

        `counts` is what earlier runs, which this one goes on from, have seen.
        """
        self.counts = Counter(counts)
        self._first, self._every = Counter(counts), every
        self._file = None if path is None else path.open("a", encoding="utf-8")
        self._start = self._last = time.monotonic()
        self._means: dict[str, list[float]] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=self._file is None or not sys.stderr.isatty(),
            speed_estimate_period=600,  # a step may take longer than the default's 30 seconds
        )
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Curve:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def note(self, step: int, share: float, values: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Take in one step: `values` are written as means since the last line, `counts` as sums."""
        self.counts.update(counts)
        for name, value in values.items():
            if math.isfinite(value):  # what a step had nothing of, has no mean
                self._means.setdefault(name, []).append(value)
        now = time.monotonic()
        unit = "tokens" if "tokens" in self.counts else "samples"
        speed = (self.counts[unit] - self._first[unit]) / max(now - self._start, 1e-9)
        self.show(f"loss {values['loss']:.3f}  {speed:,.0f} {unit}/s", share)
        if now - self._last >= self._every or share >= 1:
            self._last = now
            means = {name: sum(seen) / len(seen) for name, seen in self._means.items()}
            minutes = round((now - self._start) / 60, 3)
            self.write({"minutes": minutes, "step": step, **self.counts, **means})
            self._means = {}

    def show(self, text: str, share: float) -> None:
        """What is done, and how much of it is."""
        self._bar.update(self._task, description=text, completed=min(1.0, share))

    def write(self, line: Mapping[str, float]) -> None:
        """One line."""
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def fit(
    accelerator: Accelerator,
    modules: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    steps: Iterable[Step],
    loss: Callable[[Any], tuple[Tensor, Mapping[str, float]]],
    curve: Curve,
    save: Callable[[int, Mapping[str, int]], None],
    *,
    done: int = 0,
    save_every: int = 200,
) -> None:
    """Minimise over `steps` the mean of `loss` of a step's parts and processes, until the way is behind.

    The peak of each group's learning rate is what `optimizer` was made with. `loss` also gives values for
    the curve, the main process's own. `save` is told, every `save_every` steps and at the end, how many steps
    are `done`, which begins where a resumed run goes on, and the curve's counts. Raises InputError where the
    loss is no number any more.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for step in steps:
        share = schedule(done)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate(share)
        total = torch.zeros((), device=accelerator.device)
        values: dict[str, float] = {}
        for part in step.parts:
            with accelerator.accumulate(*modules):
                with accelerator.autocast():
                    value, seen = loss(part)
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                optimizer.zero_grad()
            total += value.detach() / len(step.parts)
            for name, number in seen.items():
                values[name] = values.get(name, 0.0) + number / len(step.parts)
        done += 1
        mean = accelerator.reduce(total, "mean").item()
        if not math.isfinite(mean):
            raise InputError(f"the loss of step {done} is {mean}: expected a number, try a lower rate")
        share, lr = schedule(done), optimizer.param_groups[0]["lr"]
        curve.note(done, share, {"loss": mean, "lr": lr, **values}, step.counts)
        if share >= 1 or done % save_every == 0:
            save(done, curve.counts)
        if share >= 1:
            return


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise InputError where weights cannot be written to `path`, as on a disk that is full."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, SafetensorError) as error:  # torch's and safetensors' words for an OSError
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{path} could not be written, is the disk full? {why}") from None


def save_state(accelerator: Accelerator, folder: Path, done: int, counts: Mapping[str, int]) -> None:
    """Write what a run needs to go on behind step `done`, whole or not at all, in the place of the last.

    InputError where it cannot be written: the last one is still there.
    """
    aside = folder / ".state"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    with writing(aside):
        accelerator.save_state(str(aside))
    if accelerator.is_main_process:
        (aside / "counts.json").write_text(json.dumps(counts))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        old = _states(folder)
        aside.rename(folder / f"state-{done}")
        for state in old.values():
            shutil.rmtree(state)


def load_state(accelerator: Accelerator, folder: Path) -> tuple[int, dict[str, int]]:
    """Go back to the last state in `folder`: how many steps were done, 0 if there is none, and the counts."""
    states = _states(folder)
    if not states:
        return 0, {}
    done = max(states)
    accelerator.load_state(str(states[done]), strict=False)  # frozen weights are not in it
    return done, read_json(states[done] / "counts.json", dict[str, int], InputError)


def leave_out_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
    """For `Accelerator.register_save_state_pre_hook`: a state is of what learns alone, and buffers."""
    for model, state in zip(models, weights, strict=bool(weights)):  # FSDP has saved its own already
        kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kept |= {name for name, _ in model.named_buffers()}
        for name in state.keys() - kept:
            del state[name]


def _states(folder: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix("state-")): path for path in folder.glob("state-*")}
