"""`bench gpu` on machines without one: its sections on the CPU and on an emulated GPU, and how they fail."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import numpy as np
import pytest
import test_limits
import tiny
from rich.console import Console
from test_kernels_cuda import emulation

from dualfocus.bench import gpu, gpu_check, gpu_times, harness, hollow
from dualfocus.bench.gpu import Figures, Section, Setup
from dualfocus.bench.scripted import PushedLogits
from dualfocus.kernels import cuda
from dualfocus.runtime import DualFocus
from dualfocus.runtime.engines import DeviceLogits
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.sequence import likeliest, log_softmax

SHAPE = tiny.Shape(name="small", vocabulary=2000)

FAULTS = textwrap.dedent(
    """
    import os, time
    from dualfocus.runtime.errors import DeviceError

    def figures():
        print("working")
        return {"one": 1.0}

    def raises():
        raise ValueError("it broke\\nin two lines")

    def refuses():
        raise DeviceError("there is no such device")

    def faulty(setup):
        yield "works", figures
        yield "raises", raises
        yield "refuses", refuses
        yield "works again", figures

    def dies(setup):
        yield "works", figures
        yield "dies", lambda: os._exit(3)
        yield "is never done", figures

    def hangs(setup):
        yield "works", figures
        yield "hangs", lambda: time.sleep(60)

    def never(setup):
        raise DeviceError("there is none")
        yield "never", figures
    """
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hollow, "WHOLE", 5000)
        patch.setattr(gpu, "TARGETS", {"cuda": "cuda"})
        gpu.prepare(folder, SHAPE)
    return folder


@pytest.fixture
def setup(prepared: Path) -> Setup:
    return Setup(prepared, "cpu", 4, 10, 5, 2, 0.1, (1, 2), 1 << 16, SHAPE.name)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of sections that go wrong, where processes that are started find it too."""
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)
    import faults

    yield faults
    del sys.modules["faults"]


@pytest.fixture
def on_emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    # what is torch's and of CuPy's own is not emulated
    monkeypatch.setattr(gpu_times, "_torch", lambda device: "cpu")
    monkeypatch.setattr(gpu_times, "_release", lambda device: None)


def done(parts: Iterator[gpu.Part]) -> dict[str, Figures]:
    return {name: do() for name, do in parts}


def told(figures: Figures) -> Figures:
    """What is wanted of each."""
    return {name: of["met"] for name, of in figures.items() if isinstance(of, dict) and "met" in of}


@pytest.mark.parametrize("precision", gpu.PRECISIONS)
@pytest.mark.usefixtures("on_emulated_gpu")
def test_check_on_an_emulated_gpu(precision: Any, setup: Setup) -> None:
    found = done(gpu_check.parts("cuda", precision, setup))
    reference = "fp32 on the CPU" if precision == "fp16" else "int4 on the CPU"
    assert list(found) == [
        f"reuse = {reference}",
        f"plain = {reference}, plain",
        "reuse = plain",
        "in batches = one by one",
        "replayed = not replayed",
        "memory",
    ]
    for name, figures in found.items():
        if name != "memory":
            assert figures["questions"] == setup.questions
            verdicts = told(figures)
            judged = True if precision == "fp16" or reference not in name else None
            assert verdicts == {"answered in other tokens": judged, "largest difference of losses": judged}
    assert found["memory"]["questions"] == setup.many
    assert found["memory"]["more bytes held on the device"]["value"] == 0
    assert {"1", "-1"} <= set(emulated.recorded)  # both were asked for: recorded, and not


def test_what_differs_is_counted(setup: Setup) -> None:
    bundle = gpu_check.Bundle.open(setup.folder / "nano-fp32", device="cpu", threads=1)
    asked = gpu_check.questions(3)
    answers = list(DualFocus(bundle).ask_many(asked))
    same = gpu_check.compare(answers, answers, judged=True)
    assert told(same) == {"answered in other tokens": True, "largest difference of losses": True}
    other = gpu_check.compare(answers, [answers[1], *answers[1:]], judged=True)
    assert other["answered in other tokens"]["value"] == 1
    assert told(other)["answered in other tokens"] is False
    scored = [i for i, answer in enumerate(answers) if answer.macro and answer.macro.loss is not None]
    assert same["losses compared"] == 2 * len(scored)
    if scored:
        loss = answers[scored[0]].macro
        assert loss is not None


@pytest.mark.parametrize("precision", gpu.PRECISIONS)
@pytest.mark.usefixtures("on_emulated_gpu")
def test_times_on_an_emulated_gpu(precision: Any, setup: Setup) -> None:
    found = {}
    for name, do in gpu_times.parts(precision, gpu.replace(setup, device="cuda")):
        emulated.recorded.clear()
        found[name] = do()
        is_replayed = name == "engines, steps replayed"
        assert (len({"1", "2", "3"} & set(emulated.recorded)) == 3) == is_replayed
    assert list(found) == [
        "model", "engines", "stages", "question", "1 at once", "2 at once", "engines, steps replayed",
    ]  # fmt: skip
    assert not any("failed" in figures for figures in found.values())
    engines = found["engines"]
    least = {name: of["wanted"] for name, of in engines.items() if "percent" in name}
    assert least == {
        "decode, 1: percent of the bandwidth": ">= 75" if precision == "fp16" else None,
        "decode, 2: percent of the bandwidth": None,
        "decode, 8: percent of the bandwidth": None,
        "vision, 1: percent of the matrix rate": None,
        "vision, 2: percent of the matrix rate": None,
        "vision, 8: percent of the matrix rate": ">= 60",
        "prefill: percent of the matrix rate": ">= 60",
    }
    assert (
        ("transformers, prefill" in engines) == ("transformers" in found["question"]) == (precision == "fp16")
    )
    assert found["stages"]["time to first token"]["median"] > 0
    assert found["1 at once"]["questions/s"] == pytest.approx(1e3 / found["1 at once"]["each"]["median"])
    assert found["model"]["bytes held on the device"] == 1_000_000_000


def test_products_are_the_models_own(prepared: Path) -> None:
    for precision in gpu.PRECISIONS:
        decoder = gpu_times.products(prepared / f"small-{precision}" / "decoder.onnx")
        weights = sum(of.inner * of.columns for of in decoder)
        assert weights == test_limits.matrices(SHAPE) + SHAPE.hidden * SHAPE.vocabulary
        last = [of.name for of in decoder if of.is_last(SHAPE.layers)]
        assert len(last) == 5  # of the last layer what follows attention, and the head
        bits = 8 * sum(of.nbytes for of in decoder) / weights
        assert bits == 16 if precision == "fp16" else 4 < bits < 10
    vision = gpu_times.products(prepared / "small-fp16" / "vision.onnx")
    layers, width = SHAPE.tower_layers - 1, SHAPE.tower_width
    patches = 3 * SHAPE.patch**2 * width
    projector = width * SHAPE.hidden + SHAPE.hidden**2
    each = 4 * width**2 + 2 * width * SHAPE.tower_mlp
    assert sum(of.inner * of.columns for of in vision) == patches + layers * each + projector
    assert sum(of.attends for of in vision) == layers * 2 * width


def test_pushed_logits_on_a_device_lead_everywhere() -> None:
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    logsumexp = float(np.log(np.exp(values).sum()))
    pushed = PushedLogits(values, 7, peak=logsumexp, logsumexp=logsumexp)
    assert likeliest(pushed, None) == likeliest(pushed, [3, 7, 20]) == 7
    assert log_softmax(pushed, 7) == 0
    free = DeviceLogits(values, int(values.argmax()), float(values.max()), logsumexp)
    order = np.argsort([log_softmax(free, token) for token in (3, 20, 21)])
    assert order.tolist() == np.argsort([log_softmax(pushed, token) for token in (3, 20, 21)]).tolist()
    assert log_softmax(pushed, 3) < -50


def test_sections_run_in_processes_and_are_saved(setup: Setup, tmp_path: Path) -> None:
    chosen = [gpu.sections(setup, check=True)[i] for i in (0, 1)]
    chosen.append(Section("small fp16", partial(gpu_times.parts, "fp16"), 100))
    result = gpu.run(setup, check=False, results=tmp_path, chosen=chosen)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-gpu.json")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert (result["schema"], result["bench"], result["gpu"]) == (harness.SCHEMA, "gpu", [])
    assert result["sections"]["machine"]["survey"]["devices"]["cpu"] == "works"
    assert "failed" not in result["sections"]["small fp16"]["question"]
    assert gpu.failures(result) == []
    assert [section.name for section in gpu.sections(setup, check=True)] == [
        "machine", "crop", "cpu fp16", "cpu int4",
    ]  # fmt: skip
    on_gpu = [section.name for section in gpu.sections(Setup(), check=True)]
    assert on_gpu[2:4] == ["cuda fp16", "cuda int4"]
    assert [section.name for section in gpu.sections(Setup(), check=False)] == [
        "machine", "llava-7b fp16", "llava-7b int4", "crop",
    ]  # fmt: skip


def test_what_goes_wrong_is_said_and_the_rest_goes_on(
    faults: Any, setup: Setup, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    todo = {"faulty": 60, "dies": 60, "hangs": 5, "never": 60}
    chosen = [Section(name, getattr(faults, name), seconds) for name, seconds in todo.items()]
    result = gpu.run(setup, check=True, results=tmp_path / "results", chosen=chosen)
    found = {
        name: {part: {k: v for k, v in of.items() if k != "seconds"} for part, of in parts.items()}
        for name, parts in result["sections"].items()
    }
    assert found["faulty"] == {
        "works": {"one": 1.0},
        "raises": {"failed": "ValueError: it broke"},
        "refuses": {"refused": "there is no such device"},
        "works again": {"one": 1.0},
    }
    assert found["dies"] == {"works": {"one": 1.0}, "all": {"failed": "its process ended with status 3"}}
    assert found["hangs"]["works"] == {"one": 1.0}
    assert "said nothing for" in found["hangs"]["all"]["failed"]
    assert found["never"] == {"all": {"refused": "there is none"}}
    assert [line.rpartition(":")[0] for line in gpu.failures(result)] == [
        "faulty: raises", "faulty: refuses", "dies: all", "hangs: all", "never: all",
    ]  # fmt: skip
    logged = capfd.readouterr().err
    assert "ValueError: it broke" in logged
    assert "Traceback" in logged
    late = gpu.run(setup, check=True, minutes=0, results=tmp_path / "results", chosen=chosen)
    assert {of["all"]["failed"] for of in late["sections"].values()} == {"no time was left for it"}


def test_what_was_not_prepared_fails_and_a_kernel_not_built_is_absent(tmp_path: Path) -> None:
    bare = Setup(tmp_path, "cpu", model="small")
    with pytest.raises(BundleError, match="nano-cuda-fp16 is not a folder"):
        done(gpu_check.parts("cpu", "fp16", bare))
    with pytest.raises(FileNotFoundError, match=r"small-fp16"):
        done(gpu_times.parts("fp16", bare))
    if not cuda.available():
        for found in (done(gpu_check.crops(bare)), done(gpu_times.crops(bare))):
            assert {tuple(figures) for figures in found.values()} == {("absent",)}


def test_a_device_that_was_asked_for_has_to_work() -> None:
    result = made("gpu-check", {"refused": "no driver"})
    assert gpu.failures(result) == ["cuda fp16: a part: refused"]
    result["sections"] = {"tensorrt-rtx fp16": result["sections"]["cuda fp16"]}
    assert gpu.failures(result) == []
    assert gpu.failures(result | {"device": "tensorrt-rtx:1"}) != []


def test_crops_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch, setup: Setup) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    run = partial(SimpleNamespace, stdout="every bit\n", stderr="Traceback\nAssertionError: differs\n")
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: run(returncode=0))
    assert done(gpu_check.crops(setup)) == {"the same bits as in C": {"told": "every bit"}}
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: run(returncode=1))
    with pytest.raises(RuntimeError, match="AssertionError: differs"):
        done(gpu_check.crops(setup))


def test_crop_and_upload_on_an_emulated_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: Setup
) -> None:
    cupy = emulated.cupy()
    cupy.cuda.get_current_stream = lambda: SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(empty_pinned=np.empty))
    monkeypatch.setattr(gpu_times.crop, "photograph", lambda: np.zeros((60, 80, 3), np.uint8))
    monkeypatch.setattr(cuda, "FOLDER", emulation(tmp_path))
    cuda._gpu.cache_clear()
    try:
        found = done(gpu_times.crops(setup))
    finally:
        cuda._gpu.cache_clear()
    assert list(found) == ["from pageable memory", "from pinned memory"]
    for figures in found.values():
        ratio = figures["upload and crop / upload"]
        assert ratio["wanted"] == "<= 1.5"
        assert ratio["value"] == figures["upload and crop"]["median"] / figures["upload"]["median"]


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.graphics() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA X, 580.1, 81559 MiB, 345 MHz, 1980 MHz, 2619 MHz, 700 W, 31'\n")
    tool.chmod(0o755)
    (found,) = gpu.graphics()
    assert (found["name"], found["clocks.max.sm"], found["temperature.gpu"]) == ("NVIDIA X", "1980 MHz", "31")


def made(bench: str, figures: Figures) -> dict[str, Any]:
    told = {"device": "cuda", "gpu": []}
    return harness.header(bench, None) | told | {"sections": {"cuda fp16": {"a part": figures}}}


def test_a_table_says_all_of_it() -> None:
    missed = harness.wanted(3.0, at_most=0)
    timing = {"median": 1.5, "low": 1.25, "high": 2.0, "p5": 1.0, "p95": 3.0}
    figures = {
        "other tokens": missed,
        "step": timing,
        "inner": {"of": 2.0},
        "version": "1 [gpu]",
        "seconds": 9,
    }
    console = Console(width=100, record=True)
    gpu.show(made("gpu-check", figures), console)
    shown = console.export_text()
    for line in (
        "other tokens: 3 (wanted <= 0: missed)", "step: 1.500 ms (1.250 - 2.000)", "inner, of: 2", "1 [gpu]",
        "failed: cuda fp16: a part: other tokens",
    ):  # fmt: skip
        assert line in shown
    assert shown.count("a part") == 2
    assert gpu.failures(made("gpu", figures)) == []  # what is slow is not wrong


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_line(wrong: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []

    def run(setup: Setup, **options: Any) -> dict[str, Any]:
        given.append((setup, options))
        return made("gpu-check", {"failed": "it broke"} if wrong else {"one": 1})

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "prepare", lambda folder, watch: given.append(folder))
    command = ["gpu", "--check", "--folder", str(tmp_path), "--device", "cuda:1", "--minutes", "3"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        gpu.main()
    assert exit_.value.code == wrong
    ((setup, options),) = given
    assert (setup.folder, setup.device, options["check"], options["minutes"]) == (tmp_path, "cuda:1", True, 3)
    monkeypatch.setattr(sys, "argv", ["gpu", "--prepare", "--folder", str(tmp_path)])
    gpu.main()
    assert given[1:] == [tmp_path]
