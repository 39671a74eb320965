"""What every benchmark shares: the machine in words, candidates timed in turn, results as dated files."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times every candidate once a round, `rounds` (at least 2) times, after one call of each to warm up.

    What slows the machine for a while then slows all alike. Each round begins with another candidate, so that
    none always finds the caches as the same neighbour left them.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        candidates[name]()
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: _timing([1e3 * value for value in values]) for name, values in seconds.items()}


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median=median, low=low, high=high)


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """The processor, the system, and the versions of those `packages` (distributions) that are installed."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | _versions(packages),
    }


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Writes bench/results/<today>-<name>.json; a second run on one day replaces the first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.datetime.now(datetime.UTC).date()}-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
