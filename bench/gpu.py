"""The GPU: is everything right there, and how fast is it? One run of minutes, for a machine borrowed for it.

``python -m dualfocus.bench.gpu --prepare`` writes what the other two need, and takes the extra ``export``:
the built-in model for GPUs, and the skeleton of LLaVA-1.5-7B (`hollow`). That is some 40 MB, which can be
sent to a machine that has a GPU and reaches nothing. There ``--check`` compares devices with the CPU
(`gpu_check`); without it, the large model is timed (`gpu_times`). No figure is printed but was measured.

Sections run in processes of their own, as an error of CUDA leaves a process without its GPU, and for a
limited time. A part of one comes to figures, which are in the JSON as soon as they are there; or it is::

    {"failed": why}    it went wrong: the traceback is in the section's log, whose end is printed
    {"refused": why}   the device does not work here
    {"absent": why}    what it takes was not built
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualfocus.bench import harness
from dualfocus.bench.peers.process import Child, Failure, PeerError
from dualfocus.export.shapes import SHAPES, Shape
from dualfocus.runtime import devices, registry
from dualfocus.runtime.errors import DeviceError
from dualfocus.runtime.manifest import Precision, Target

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"
MINUTES = 9.0  # for all sections together
LOG_LINES = 25  # of a failed section's log
PRECISIONS: tuple[Precision, ...] = ("fp16", "int4")
TARGETS: dict[devices.Kind, Target] = {"cuda": "cuda", "tensorrt-rtx": "cuda", "tensorrt": "tensorrt"}
# LLaVA-1.5-7B was trained at 2048 tokens, and 16 questions at once then fit beside its weights into 80 GB.
MODEL = replace(SHAPES["llava-7b"], context=2048)

Figures = dict[str, Any]  # by name: a number, a text, `Timing`'s or `wanted`'s object, or more such figures
Part = tuple[str, Callable[[], Figures]]
Watch = harness.Watch


@dataclass(frozen=True)
class Setup:
    """What sections are told."""

    folder: Path = FOLDER  # what `prepare` wrote
    device: str = "cuda"  # of what is timed
    questions: int = 200  # compared
    many: int = 1000  # asked while memory is watched
    crops: int = 1000  # random ones, compared
    rounds: int = 20  # at most; fewer where a part would take longer than
    seconds: float = 10.0
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    copied: int = 1 << 30  # bytes, to see how fast the device's memory is
    model: str = MODEL.name
    scratch: str | None = None  # where the model is written; None: where the system has temporary files


@dataclass(frozen=True)
class Section:
    """Some parts that share a process; `seconds` is what it may take."""

    name: str
    parts: Callable[[Setup], Iterator[Part]]  # of some module's top level, or a partial of that
    seconds: float


def sections(setup: Setup, *, check: bool) -> list[Section]:
    """What is run: comparisons, or measurements."""
    from dualfocus.bench import gpu_check, gpu_times

    if not check:
        found = [
            Section(f"{setup.model} {precision}", partial(gpu_times.parts, precision), 270)
            for precision in PRECISIONS
        ]
        return [Section("machine", machine, 60), *found, Section("crop", gpu_times.crops, 60)]
    wanted = devices.parse(setup.device)
    kinds: tuple[devices.Kind, ...] = ("cpu",) if wanted == devices.CPU else tuple(TARGETS)
    found = [
        Section(f"{kind} {precision}", partial(gpu_check.parts, kind, precision), 240)
        for kind in kinds
        for precision in PRECISIONS
    ]
    return [Section("machine", machine, 60), Section("crop", gpu_check.crops, 90), *found]


def run(
    setup: Setup,
    *,
    check: bool,
    minutes: float = MINUTES,
    results: Path | None = None,
    chosen: list[Section] | None = None,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Run the sections, or those `chosen`; returns the JSON object, which is saved after every part."""
    end = time.monotonic() + 60 * minutes
    todo = sections(setup, check=check) if chosen is None else chosen
    result = harness.header("gpu-check" if check else "gpu", threads=None) | {
        "device": setup.device,
        "gpu": graphics(),
        "sections": {section.name: {} for section in todo},
    }
    log = setup.folder / "log"
    log.mkdir(parents=True, exist_ok=True)
    # here, so that it is gone whatever becomes of the sections
    with tempfile.TemporaryDirectory(dir=_roomy(setup)) as scratch:
        setup = replace(setup, scratch=scratch)
        for done, section in enumerate(todo):
            watch(section.name, done, len(todo))
            found = result["sections"][section.name]
            seconds = min(section.seconds, end - time.monotonic())
            for name, figures in _run(section, setup, seconds, log / f"{section.name}.log"):
                found[name] = figures
                harness.save(result, results)
    return result


def _roomy(setup: Setup) -> str | None:
    """A folder in memory, which is fast, if the models fit there; None: where temporary files are."""
    from dualfocus.bench import hollow

    memory = Path("/dev/shm")
    needed = sum(hollow.size(path.parent) for path in setup.folder.glob(f"*/{hollow.WEIGHTS}"))
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > needed else None


def _run(section: Section, setup: Setup, seconds: float, log: Path) -> Iterator[tuple[str, Figures]]:
    """A section's parts and their figures, as they come."""
    if seconds <= 0:
        yield "all", {"failed": "no time was left for it"}
        return
    end = time.monotonic() + seconds
    try:
        with closing(Child(serve, section.parts, setup, log=log)) as child:
            while (said := child.receive(max(0.0, end - time.monotonic()))) is not None:
                yield said
                if "failed" in said[1]:
                    _show_end(log)
    except PeerError as error:
        _show_end(log)
        yield "all", {"failed": str(error)}


def _show_end(log: Path) -> None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    print(f"--- the end of {log}", *lines[-LOG_LINES:], "---", sep="\n", file=sys.stderr, flush=True)


def serve(connection: Connection, parts: Callable[[Setup], Iterator[Part]], setup: Setup) -> None:
    """A section's process: does one part after the other, and says what each came to; None at the end."""
    with suppress(ImportError):
        import torch  # noqa: F401  brings CUDA's libraries into the process, where ONNX Runtime finds them
    every = parts(setup)
    while True:
        begin = time.monotonic()
        name = "all"
        try:
            name, do = next(every)
            figures = do()
        except StopIteration:
            break
        except DeviceError as error:
            figures = {"refused": str(error)}
        except Exception as error:
            traceback.print_exc()
            figures = {"failed": Failure.of(error).reason}
        connection.send((name, figures | {"seconds": round(time.monotonic() - begin, 1)}))
    connection.send(None)


def machine(setup: Setup) -> Iterator[Part]:
    """What there is, as `dualfocus inspect --devices` says it."""

    def survey() -> Figures:
        found = registry.survey()
        works = {kind: why or "works" for kind, why in found["devices"].items()}
        return {"devices": works, "versions": found["versions"], "GPUs": [str(gpu) for gpu in found["gpus"]]}

    yield "survey", survey


def graphics() -> list[dict[str, str]]:
    """What the driver says of every GPU as it is found, clocks too; nothing where there is none."""
    asked = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(asked.split(","), row, strict=False)) for row in rows]


def prepare(folder: Path = FOLDER, shape: Shape = MODEL, watch: Watch = lambda *_: None) -> None:
    """Write into `folder` what the sections need. Needs the extra ``export``."""
    from dualfocus.bench import hollow
    from dualfocus.export import export_bundle

    nano = ROOT / "train" / "checkpoints" / "nano"
    todo: dict[str, Callable[[Path], object]] = {
        # before 1.32, ONNX Runtime does not know what the built-in bundle's ragged appends need
        "nano-fp32": lambda out: export_bundle(nano, out, ragged_append=False, progress=lambda _: None)
    }
    for precision in PRECISIONS:
        for target in dict.fromkeys(TARGETS.values()):
            todo[f"nano-{target}-{precision}"] = partial(
                export_bundle, nano, precision=precision, target=target, progress=lambda _: None
            )
        todo[f"{shape.name}-{precision}"] = partial(hollow.make, shape, precision)
    for done, (name, write) in enumerate(todo.items()):
        watch(name, done, len(todo))
        shutil.rmtree(folder / name, ignore_errors=True)
        write(folder / name)


def figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """All of a result: section, part, figure, and what it is."""
    for section, parts in result["sections"].items():
        for part, found in parts.items():
            for name, figure in _flat(found):
                yield section, part, name, figure


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, figure in found.items():
        if isinstance(figure, dict) and not figure.keys() & {"met", "median"}:
            yield from ((f"{name}, {inner}", of) for inner, of in _flat(figure))
        else:
            yield name, figure


def failures(result: Mapping[str, Any]) -> list[str]:
    """What went wrong, and of a check what was missed. Of TensorRT, nobody expects that it is there."""
    is_check = result["bench"] == "gpu-check"
    optional = set(TARGETS) - {result["device"].partition(":")[0]}

    def is_wrong(section: str, name: str, figure: Any) -> bool:
        if name == "refused":
            return section.partition(" ")[0] not in optional
        return name == "failed" or (is_check and isinstance(figure, dict) and figure.get("met") is False)

    return [
        f"{section}: {part}: {name}"
        for section, part, name, figure in figures(result)
        if is_wrong(section, name, figure)
    ]


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as one table for people."""
    from rich.table import Table
    from rich.text import Text

    harness.show_machine(result["machine"], console)
    for gpu in result["gpu"]:
        console.print(", ".join(f"{name} {value}" for name, value in gpu.items()), markup=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    told: tuple[str, str] = "", ""
    for section, part, name, figure in figures(result):
        if name != "seconds":
            place = tuple("" if was == now else now for was, now in zip(told, (section, part), strict=True))
            table.add_row(*map(Text, (*place, f"{name}: {_told(figure)}")))
            told = section, part
    console.print(table)
    wrong = failures(result)
    console.print("failed: " + "; ".join(wrong) if wrong else "nothing failed", markup=False)


def _told(figure: Any) -> str:
    if isinstance(figure, dict) and "median" in figure:
        return f"{figure['median']:.3f} ms ({figure['low']:.3f} - {figure['high']:.3f})"
    if isinstance(figure, dict):
        return f"{figure['value']:.4g}" + (f" ({harness.verdict(figure)})" if figure["wanted"] else "")
    return f"{figure:.5g}" if isinstance(figure, float) else str(figure)


def main() -> None:
    """The command line, for a machine without this package's own."""
    from rich.console import Console

    parser = argparse.ArgumentParser("python -m dualfocus.bench.gpu")
    parser.add_argument("--prepare", action="store_true", help="write what the other two need, without a GPU")
    parser.add_argument("--check", action="store_true", help="compare the GPU with the CPU; time nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what was prepared  [build/gpu]")
    parser.add_argument("--device", default="cuda", help="cuda[:n], tensorrt, tensorrt-rtx or cpu  [cuda]")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it  [9]")
    parser.add_argument("--results", type=Path, help="where the JSON goes  [bench/results]")
    given = parser.parse_args()

    def say(what: str, done: int, total: int) -> None:
        print(f"{done + 1} of {total}: {what}", file=sys.stderr, flush=True)

    if given.prepare:
        prepare(given.folder, watch=say)
        return
    try:
        devices.parse(given.device)
    except DeviceError as error:
        parser.error(str(error))
    setup = Setup(given.folder.resolve(), given.device)
    result = run(setup, check=given.check, minutes=given.minutes, results=given.results, watch=say)
    show(result, Console(width=160))
    sys.exit(bool(failures(result)))


if __name__ == "__main__":
    from dualfocus.bench import gpu  # under its own name, by which the sections' processes know it

    gpu.main()
