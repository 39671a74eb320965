"""Is a device right? The built-in model's answers there beside the CPU's, however asked; memory; crops.

A section is a device and a precision. float16 is held to float32 on the CPU: the same tokens of all replies,
and losses within `LOSS`. int4 is another model, so that it is held to itself on the CPU, where activations
are rounded otherwise: what differs is told, not judged.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from dualfocus.bench import fresh, harness
from dualfocus.bench.scenes import held_out
from dualfocus.kernels import cuda
from dualfocus.runtime import Bundle, DualFocus, Reference, devices, onnx, registry
from dualfocus.runtime.devices import Device, Kind
from dualfocus.runtime.errors import DeviceError
from dualfocus.runtime.image import Picture
from dualfocus.runtime.manifest import Precision
from dualfocus.runtime.result import FocusResult
from dualfocus.train import scenes

if TYPE_CHECKING:
    from dualfocus.bench.gpu import Figures, Part, Setup

LOSS = 2e-2  # that losses may differ by
AT_ONCE = 8  # questions
NEVER = 1 << 40  # steps before one is recorded
# Bytes that many questions may leave behind
FLAT = {"bytes held on the device": 2 << 20, "bytes held by the process": 16 << 20}

Asked = Sequence[tuple[Picture, str]]


def parts(kind: Kind, precision: Precision, setup: Setup) -> Iterator[Part]:
    """What is compared on one device, with a bundle of `gpu.prepare`. DeviceError where it does not work."""
    from dualfocus.bench.gpu import TARGETS

    wanted = devices.parse(setup.device)
    device = Device(kind, wanted.index if wanted else 0)
    if (why := registry.problem(device)) is not None:
        raise DeviceError(why)
    path = setup.folder / f"nano-{TARGETS.get(kind, 'cuda')}-{precision}"
    if kind == "tensorrt":
        yield "engines", lambda: _build(path, device.index)
    bundle = Bundle.open(path, device=str(device))
    exact = precision == "fp16"
    reference = Bundle.open(setup.folder / "nano-fp32" if exact else path, device="cpu")
    asked = questions(setup.questions)
    on_cpu = f"{reference.manifest.precision} on the CPU"

    ways: dict[str, Callable[[], list[FocusResult]]] = {
        on_cpu: lambda: _focus(reference, asked),
        f"{on_cpu}, plain": lambda: _plain(reference, asked),
        "reuse": lambda: _focus(bundle, asked),
        "plain": lambda: _plain(bundle, asked),
        "one by one": lambda: answers("reuse"),
        "in batches": lambda: list(DualFocus(bundle, slots=2 * AT_ONCE).ask_many(asked)),
        "replayed": lambda: _recorded(2, bundle, asked),
        "not replayed": lambda: _recorded(NEVER, bundle, asked),
    }

    @functools.cache
    def answers(way: str) -> list[FocusResult]:
        return ways[way]()

    for way, other in (
        ("reuse", on_cpu),
        ("plain", f"{on_cpu}, plain"),
        ("reuse", "plain"),
        ("in batches", "one by one"),
        ("replayed", "not replayed"),
    ):
        judged = exact or other not in (on_cpu, f"{on_cpu}, plain")
        yield f"{way} = {other}", functools.partial(_compared, answers, way, other, judged)
    yield "memory", lambda: memory(bundle, asked, setup.many)


def questions(count: int) -> Asked:
    """Held-out scenes and a question about each; a scene's picture is drawn once."""
    draw = functools.lru_cache(maxsize=1)(lambda seed: np.asarray(scenes.draw(scenes.layout(seed))))
    return [(draw(scene.seed), dialogue.question) for scene, dialogue in held_out(count)]


def _focus(bundle: Bundle, asked: Asked) -> list[FocusResult]:
    runner = DualFocus(bundle)
    return [runner.ask(*one) for one in asked]


def _plain(bundle: Bundle, asked: Asked) -> list[FocusResult]:
    runner = Reference(bundle, free_box=False)
    return [runner.ask(*one) for one in asked]


def _recorded(after: int, bundle: Bundle, asked: Asked) -> list[FocusResult]:
    with patch.object(onnx, "CAPTURE_AFTER", after):
        return _focus(bundle, asked)


def _compared(answers: Callable[[str], list[FocusResult]], way: str, other: str, judged: bool) -> Figures:
    return compare(answers(way), answers(other), judged=judged)


def compare(found: Sequence[FocusResult], expected: Sequence[FocusResult], *, judged: bool) -> Figures:
    """How many questions were answered in other tokens, and by how much the losses of the others differ."""
    pairs = list(zip(found, expected, strict=True))
    alike = [pair for pair in pairs if _tokens(pair[0]) == _tokens(pair[1])]
    apart = [
        abs(ours - theirs)
        for pair in alike
        for ours, theirs in zip(*map(_losses, pair), strict=True)
        if ours is not None and theirs is not None
    ]
    differ, loss = float(len(pairs) - len(alike)), max(apart, default=0.0)
    return {
        "questions": len(pairs),
        "answered in other tokens": harness.wanted(differ, at_most=0 if judged else None),
        "losses compared": len(apart),
        "largest difference of losses": harness.wanted(loss, at_most=LOSS if judged else None),
    }


def _tokens(result: FocusResult) -> list[Any]:
    replies = result.macro and result.macro.generation, result.micro and result.micro.generation
    return [reply and reply.tokens for reply in (*replies, result.located)]


def _losses(result: FocusResult) -> list[float | None]:
    return [None if answer is None else answer.loss for answer in (result.macro, result.micro)]


def memory(bundle: Bundle, asked: Asked, count: int) -> Figures:
    """What `count` questions leave behind, on the device and in this process, after some to warm up."""
    runner = DualFocus(bundle, cache_mb=1)  # which is full soon

    def taken() -> dict[str, int]:
        host = fresh.memory()["rss_anon"]
        return held(bundle.device) | ({} if host is None else {"bytes held by the process": host})

    for i in range(count // 10):
        runner.ask(*asked[i % len(asked)])
    before = taken()
    for i in range(count):
        runner.ask(*asked[i % len(asked)])
    found: Figures = {"questions": count}
    for name, now in taken().items():
        found[name] = now
        more = float(now - before[name])
        found[f"more {name}"] = harness.wanted(more, at_most=FLAT[name])
    return found


def held(device: Device) -> dict[str, int]:
    """Bytes taken on a GPU, by whomever; the CPU says nothing of it."""
    if device.kind == "cpu":
        return {}
    free, total = device.memory.cuda.runtime.memGetInfo()
    return {"bytes held on the device": int(total - free)}


def _build(path: Path, index: int) -> Figures:
    """TensorRT's engines, for the GPU that is here."""
    from dualfocus.export.tensorrt import build_engines

    engines = build_engines(path, rows=2 * AT_ONCE, pictures=AT_ONCE, index=index)
    return {"bytes of the engines": sum(file.stat().st_size for file in engines.iterdir())}


def crops(setup: Setup) -> Iterator[Part]:
    """The crop kernel's bits on the device, as the tests have it."""
    yield "the same bits as in C", lambda: _crops(setup.crops)


def _crops(count: int) -> Figures:
    from dualfocus.bench.gpu import ROOT

    script = ROOT / "tests" / "cuda_equality.py"
    if (why := cuda.unavailable()) is not None:
        return {"absent": why}
    if not script.is_file():
        return {"absent": f"there is no {script}: this is no checkout"}
    done = subprocess.run([sys.executable, str(script), str(count)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it ended")
    return {"told": done.stdout.strip()}
