"""What every benchmark shares: the machine in words, candidates timed in turn, results as dated files.

A result is one JSON object, of schema 2::

    schema    2; another number where the same name means something else
    bench     which benchmark: "stages", "limits", "savings", "gate", "crop", ...
    machine   date (ISO 8601, UTC), command, processor, cores (those this process may use), isa (the crop
              kernel's path), governor (of the processor's clock, null where it is not told), memory (bytes,
              null likewise), threads (of the engines; null: one for each core), spin (whether they wait
              awake), environment (variables that bear on threads, where set), system, load (averages over 1,
              5 and 15 minutes), commit, versions
    bundle    the model's name, where there is one, and
    precision of its weights
    ...       the benchmark's own; times are milliseconds

Wherever something was timed often, it is an object that has `Timing`'s fields: median, low and high (the
quartiles), p5 and p95. Wherever something is wanted of a figure, it is `wanted`'s object.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualfocus import kernels
from dualfocus.bench import fresh
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.files import naming, to_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from dualfocus.runtime.manifest import Manifest

SCHEMA = 2  # of the JSON objects
EVERY = 0.02  # seconds between two looks at a child's memory
RESULTS = Path(__file__).parent / "results"
CPUINFO, BOARD = Path("/proc/cpuinfo"), Path("/sys/firmware/devicetree/base/model")
PACKAGES = (
    "dualfocus", "onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy", "pillow",
    "opencv-python", "opencv-python-headless", "torchvision", "torch", "transformers", "llama-cpp-python",
    "gguf", "onnxruntime-genai", "openvino", "openvino-genai",
)  # fmt: skip
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)

Watch = Callable[[str, int, int], object]  # told what is done next, how much is done, and of how much


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, the quartiles around it, and what 5 and 95 of 100 calls stay below."""

    median: float
    low: float
    high: float
    p5: float
    p95: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Of at least two calls."""
        cuts = statistics.quantiles(milliseconds, n=20, method="inclusive")
        return cls(median=cuts[9], low=cuts[4], high=cuts[14], p5=cuts[0], p95=cuts[18])

    def each(self, parts: int) -> Timing:
        """A call does `parts` things alike: the time of one."""
        return Timing(**{name: value / parts for name, value in dataclasses.asdict(self).items()})


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


def child(command: Sequence[str]) -> dict[str, Any]:
    """Seconds that a process took, its private and its whole memory at the most, and the lines it said.

    Memory is 0 where the system does not tell it. InputError if the process fails.
    """
    begin = time.perf_counter()
    said: list[str] = []
    peaks = {"peak_rss": 0, "rss_anon": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        # read meanwhile: a full pipe would stop the child
        reader = threading.Thread(target=said.extend, args=(process.stdout,))
        reader.start()
        while process.poll() is None:
            for name, found in fresh.memory(process.pid).items():
                peaks[name] = max(peaks[name], found or 0)
            time.sleep(EVERY)
        reader.join()
    if process.returncode:
        raise InputError(f"{' '.join(command[1:4])} ended with exit status {process.returncode}")
    return {
        "seconds": time.perf_counter() - begin,
        "peak_rss_anon": peaks["rss_anon"],
        "peak_rss": peaks["peak_rss"],
        "said": [line.rstrip("\n") for line in said],
    }


def header(
    bench: str, threads: int | None, *, spin: bool = True, manifest: Manifest | None = None
) -> dict[str, Any]:
    """What every result begins with; `threads` and `spin` are what the bundle of the `manifest`, if there is
    one, was opened with.
    """
    of = {} if manifest is None else {"bundle": manifest.name, "precision": manifest.precision}
    return {
        "schema": SCHEMA,
        "bench": bench,
        "machine": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "isa": kernels.isa(),
            "governor": _governor(),
            "memory": _memory(),
            "threads": threads,
            "spin": spin,
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            "system": f"{platform.system()} {platform.machine()}",
            "load": [round(load, 2) for load in os.getloadavg()],
            "commit": _commit(),
            "versions": {"python": platform.python_version()} | _versions(),
        },
        **of,
    }


def show_machine(machine: Mapping[str, Any], console: Console) -> None:
    """A header's "machine" for people."""
    for name, value in machine.items():
        text = value
        if isinstance(value, dict):
            text = ", ".join(f"{key} {of}" for key, of in value.items())
        elif name == "memory" and value is not None:
            text = f"{value / 1e9:.1f} GB"
        if text not in (None, ""):
            console.print(f"{name:>11}  {text}", markup=False)
    console.print()


def wanted(value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """A figure, what is wanted of it, and whether it is met; both None if nothing is."""
    if at_least is not None:
        return {"value": value, "wanted": f">= {at_least}", "met": value >= at_least}
    if at_most is not None:
        return {"value": value, "wanted": f"<= {at_most}", "met": value <= at_most}
    return {"value": value, "wanted": None, "met": None}


def verdict(figure: Mapping[str, Any]) -> str:
    """A `wanted` object's wish for people; empty where there is none."""
    if figure["wanted"] is None:
        return ""
    return f"wanted {figure['wanted']}: {'met' if figure['met'] else 'missed'}"


def plain(text: str) -> Text:
    """What a file says, for a table: not read as rich's markup, nor obeyed by a terminal."""
    from rich.text import Text

    return Text(text if text.isprintable() else repr(text))


def save(result: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Writes bench/results/<today>-<bench>[-<bundle>[-<precision>]].json, float32 being the precision that is
    not named; a second run on one day replaces the first. `folder` is another one to write to.
    """
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(datetime.datetime.now(datetime.UTC).date()), result["bench"]]
    words += [result[key] for key in ("bundle", "precision") if result.get(key, "fp32") != "fp32"]
    path = folder / (re.sub(r"[^\w.-]+", "_", "-".join(words)) + ".json")
    with naming(path):
        path.write_text(to_json(result, indent=2) + "\n", encoding="utf-8")
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
    """Its name; the board's where processors have none, as on a Jetson."""
    for path, before in ((CPUINFO, "model name"), (BOARD, "")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith(before):
                return line.removeprefix(before).strip(" \t:\0")
    return platform.processor() or "unknown"


def _governor() -> str | None:
    try:
        path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
