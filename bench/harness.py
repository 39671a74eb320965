"""What every benchmark shares: the machine in words, candidates timed in turn, results as dated files.

A result is one JSON object. It begins with `header`; times are milliseconds.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1  # of the JSON objects
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "dualfocus", "onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy", "pillow",
    "opencv-python", "opencv-python-headless", "torchvision",
)  # fmt: skip

Watch = Callable[[str, int, int], object]  # told what is done next, how much is done, and of how much


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Of at least two calls."""
        low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(median, low, high)

    def each(self, parts: int) -> Timing:
        """A call does `parts` things alike: the time of one."""
        return Timing(self.median / parts, self.low / parts, self.high / parts)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Mapping[str, Callable[[], object]] | None = None,
    warm: bool = False,
    watch: Watch = lambda *_: None,
) -> dict[str, Timing]:
    """Times every candidate once a round, `rounds` (at least 2) times, after one call of each to warm up
    unless they are `warm`.

    What slows the machine for a while then slows all alike. Each round begins with another candidate, so that
    none always finds the caches as the same neighbour left them. `before` holds what some candidates need
    done before every call, which is not timed.
    """
    names = list(candidates)
    orders = [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(rounds)]
    if not warm:
        orders.insert(0, names)
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    for done, name in enumerate(name for order in orders for name in order):
        watch(name, done, len(names) * len(orders))
        if before and name in before:
            before[name]()
        begin = time.perf_counter()
        candidates[name]()
        milliseconds[name].append(1e3 * (time.perf_counter() - begin))
    return {name: Timing.of(values[-rounds:]) for name, values in milliseconds.items()}


def header(bench: str, threads: int | None) -> dict[str, Any]:
    """What every result begins with. `threads` of the engines; None: as many as the library takes."""
    return {
        "schema": SCHEMA,
        "bench": bench,
        "machine": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": threads,
            "system": f"{platform.system()} {platform.machine()}",
            "load": [round(load, 2) for load in os.getloadavg()],
            "commit": _commit(),
            "versions": {"python": platform.python_version()} | _versions(),
        },
    }


def show_machine(machine: Mapping[str, Any], console: Console) -> None:
    """A header's "machine" for people."""
    for name, value in machine.items():
        text = value
        if isinstance(value, dict):
            text = ", ".join(f"{package} {version}" for package, version in value.items())
        console.print(f"{name:>10}  {text}", markup=False)
    console.print()


def save(result: Mapping[str, Any]) -> Path:
    """Writes bench/results/<today>-<bench>[-<bundle>].json; a second run on one day replaces the first."""
    RESULTS.mkdir(exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date()
    words = [str(today), result["bench"], *([result["bundle"]] if "bundle" in result else [])]
    path = RESULTS / (re.sub(r"[^\w.-]+", "_", "-".join(words)) + ".json")
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _commit() -> str | None:
    """Of the checkout this runs from, with "-dirty" where files differ from it; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # git would look further up, and find somebody else's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
