"""Devices: which are chosen, what each lacks in one sentence, and the graphs for them.

No GPU is needed: the graphs run on the CPU, and on an emulated GPU (`emulated`).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import numpy as np
import onnx
import pytest
import tiny
from test_parity import BOX_TOKENS, picture
from typer.testing import CliRunner

from dualfocus import kernels
from dualfocus.bench.scenes import held_out
from dualfocus.cli import app
from dualfocus.export import ExportError, export_bundle
from dualfocus.kernels import cuda
from dualfocus.runtime import Bundle, DualFocus, Engine, Reference, devices, registry
from dualfocus.runtime import onnx as engine
from dualfocus.runtime.devices import CPU, Device
from dualfocus.runtime.errors import DeviceError
from dualfocus.runtime.geometry import Region
from dualfocus.runtime.manifest import ON_DEVICE
from dualfocus.runtime.result import FocusResult, ReplyToken
from dualfocus.train import scenes

CHECKPOINT = Path(__file__).parent.parent / "train" / "checkpoints" / "nano"
QUESTIONS = ["What is written on the red star?", "How many blue circles are there?", "Is it green?"]
LOSS = 2e-2  # what losses in float16 may differ by from those in float32


def ask(runner: DualFocus | Reference, questions: int) -> list[FocusResult]:
    return [
        runner.ask(np.asarray(picture(i, 200 + 31 * i, 260 - 17 * i)), QUESTIONS[i % len(QUESTIONS)])
        for i in range(questions)
    ]


# ---- choosing ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", None),
        ("cpu", CPU),
        ("cuda", Device("cuda")),
        ("cuda:3", Device("cuda", 3)),
        ("tensorrt-rtx:1", Device("tensorrt-rtx", 1)),
        ("tensorrt", Device("tensorrt")),
    ],
)
def test_a_device_is_named(text: str, expected: Device | None) -> None:
    assert devices.parse(text) == expected
    if expected not in (None, CPU):
        assert devices.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:", "cuda:-1", "cuda:1000", "cpu:0", "CUDA", "cuda:1 ", "cuda:1\n", None, 3]
)
def test_no_device_is_called_that(text: Any) -> None:
    with pytest.raises(
        DeviceError, match=r"^unknown device .*: expected auto, cpu, cuda\[:N\], tensorrt\[:N\] or"
    ):
        devices.parse(text)


def test_the_best_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    works = {"cpu"}
    monkeypatch.setattr(registry, "problem", lambda device: None if device.kind in works else "broken")
    targets = registry.RUNS
    assert {target: str(registry.choose(None, target)) for target in targets} == dict.fromkeys(targets, "cpu")
    works |= {"tensorrt-rtx"}
    assert str(registry.choose(None, "cuda")) == str(registry.choose(None, "tensorrt")) == "tensorrt-rtx:0"
    works |= {"cuda", "tensorrt"}
    assert str(registry.choose(None, "cuda")) == "cuda:0"
    assert str(registry.choose(None, "tensorrt")) == "tensorrt:0"
    assert registry.choose(None, "onnxruntime") == CPU
    assert registry.choose(Device("tensorrt-rtx", 2), "cuda") == Device("tensorrt-rtx", 2)


def test_a_device_that_runs_no_such_bundle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "problem", lambda _: None)
    with pytest.raises(DeviceError, match=r"cuda:0 does not run a bundle of target onnxruntime, .* cuda$"):
        registry.choose(Device("cuda"), "onnxruntime")
    with pytest.raises(DeviceError, match=r"tensorrt-rtx:0 does not run .* --target cuda or tensorrt$"):
        registry.choose(Device("tensorrt-rtx"), "onnx-standard")


def missing(monkeypatch: pytest.MonkeyPatch, cupy: Any, index: int = 1) -> str:
    """What CUDA lacks where `import cupy` gives that."""
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    found = registry.problem(Device("cuda", index))
    assert found is not None
    return found


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "CuPy is missing" in missing(monkeypatch, None)

    def no_driver() -> int:
        raise emulated.CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    without_driver = emulated.cupy()
    without_driver.cuda.runtime.getDeviceCount = no_driver
    found = missing(monkeypatch, without_driver)
    assert found.startswith("no NVIDIA driver or GPU answers (cudaErrorInsufficientDriver")
    assert missing(monkeypatch, emulated.cupy(1)) == "there is no GPU 1, 1 found"
    monkeypatch.setattr(engine.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has no CUDA: pip install 'dualfocus[gpu]'" in missing(monkeypatch, emulated.cupy(2))
    monkeypatch.setattr(engine.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(engine.ort, "preload_dlls", lambda: print("noise"))
    assert "libonnxruntime_providers" in missing(monkeypatch, emulated.cupy(2))
    assert engine._library_problem(tmp_path, "none.so") is not None
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    engine._rtx_devices.cache_clear()
    assert "pip install 'dualfocus[tensorrt-rtx]'" in str(registry.problem(Device("tensorrt-rtx")))
    monkeypatch.setitem(
        sys.modules,
        "onnxruntime_ep_nv_tensorrt_rtx",
        SimpleNamespace(get_ep_name=lambda: "Rtx", get_library_path=lambda: str(tmp_path / "none.so")),
    )
    assert "none.so" in str(registry.problem(Device("tensorrt-rtx")))


def test_the_command_line_says_it_too(built: dict[str, Path]) -> None:
    run = CliRunner().invoke
    for arguments in (
        ["ask", "examples/scene.png", "What?", "--device", "gpu"],
        ["ask", "examples/scene.png", "What?", "--device", "cuda"],
        ["eval", "scenes", "--limit", "1", "--device", "cuda"],
        ["bench", "stages", "--device", "tensorrt"],
        ["inspect"],
    ):
        result = run(app, arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("dualfocus: ")
        assert result.stderr.count("\n") == 1
    if registry.problem(Device("cuda")):
        result = run(
            app,
            ["ask", "examples/scene.png", "What?", "--device", "cuda", "--bundle", str(built["cuda-fp16"])],
        )
        assert result.exit_code == 2
        assert "cuda:0 does not work here: " in result.stderr


@pytest.mark.parametrize("command", ["stages", "gate", "limits"])
def test_benchmarks_run_such_a_bundle_or_refuse_it(built: dict[str, Path], command: str) -> None:
    amount = ["--limit", "2"] if command == "gate" else ["--rounds", "2"]
    result = CliRunner().invoke(
        app, ["bench", command, *amount, "--bundle", str(built["cuda-fp16"]), "--json"]
    )
    if command == "limits":
        assert result.exit_code == 2
        assert "bench limits is for the CPU, tiny has target cuda" in result.stderr
    else:
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["bench"] == command


def test_a_budget_of_such_a_bundle(built: dict[str, Path]) -> None:
    told = json.loads(
        CliRunner().invoke(app, ["inspect", str(built["cuda-fp16"]), "--budget", "--json"]).stdout
    )
    assert told["budget"]["in all"] > told["budget"]["KV cache"] > 0


def test_what_there_is_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(CliRunner().invoke(app, ["inspect", "--devices", "--json"]).stdout)
    assert list(found["devices"]) == ["cpu", "cuda", "tensorrt-rtx", "tensorrt"]
    assert found["devices"]["cpu"] is None
    assert "onnxruntime" in found["versions"]
    refused = CliRunner().invoke(app, ["inspect", "models/nano", "--devices"])
    assert refused.exit_code == 2
    emulated.install(monkeypatch)
    told = CliRunner().invoke(app, ["inspect", "--devices"]).stdout
    assert "Emulated, compute capability 9.0, 4.0 GB" in told
    assert "CUDA driver" in told


# ---- the graphs ----


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of one random model: in float32 for the CPU, and for devices."""
    folder = tmp_path_factory.mktemp("devices")
    checkpoint = tiny.build(folder / "checkpoint", max_new_tokens=BOX_TOKENS)
    found = {}
    for name in ("onnxruntime-fp32", "cuda-fp16", "cuda-int4", "tensorrt-fp16", "tensorrt-int4"):
        target, precision = name.split("-")
        export_bundle(
            checkpoint,
            folder / name,
            target=target,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
            progress=lambda _: None,
        )
        found[name] = folder / name
    return found


DEVICE_BUNDLES = ["cuda-fp16", "cuda-int4", "tensorrt-fp16", "tensorrt-int4"]


@pytest.mark.parametrize("name", DEVICE_BUNDLES)
def test_reuse_and_batches_answer_what_plain_does(built: dict[str, Path], name: str) -> None:
    bundle = Bundle.open(built[name], threads=1)
    assert bundle.device == CPU
    assert bundle.manifest.target in ON_DEVICE
    plain = ask(Reference(bundle, free_box=False), 6)
    fast = ask(DualFocus(bundle), 6)
    pictures = [np.asarray(picture(i, 200 + 31 * i, 260 - 17 * i)) for i in range(6)]
    together = DualFocus(bundle, slots=8).ask_many(
        [(seen, QUESTIONS[i % len(QUESTIONS)]) for i, seen in enumerate(pictures)]
    )
    for expected, *others in zip(plain, fast, together, strict=True):
        for found in others:
            for reply in ("macro", "micro"):
                ours, theirs = getattr(found, reply), getattr(expected, reply)
                assert (ours and ours.text) == (theirs and theirs.text)
                if theirs and theirs.loss is not None:
                    assert ours.loss == pytest.approx(theirs.loss, abs=LOSS)
            assert found.box == expected.box
            assert found.counters.vision_encodes <= 2


def test_nano_in_float16_says_what_it_says_in_float32(tmp_path: Path) -> None:
    export_bundle(CHECKPOINT, tmp_path / "nano", target="cuda", precision="fp16", progress=lambda _: None)
    exact, half = DualFocus(Bundle.open()), DualFocus(Bundle.open(tmp_path / "nano"))
    losses = 0
    for scene, asked in held_out(40):
        pixels = np.asarray(scenes.draw(scene))
        expected, found = (runner.ask(pixels, asked.question) for runner in (exact, half))
        for reply in ("macro", "micro"):
            ours, theirs = getattr(found, reply), getattr(expected, reply)
            assert (ours is None) == (theirs is None)
            if theirs is None:
                continue
            assert ours.generation.tokens == theirs.generation.tokens
            if theirs.loss is not None:
                losses += 1
                assert ours.loss == pytest.approx(theirs.loss, abs=LOSS)
    assert losses >= 8


def test_only_float16_is_for_a_device(tmp_path: Path) -> None:
    checkpoint = tiny.build(tmp_path / "checkpoint")
    for wrong in ({"precision": "fp32"}, {"precision": "int8"}, {"precision": "fp16", "cache": "float32"}):
        with pytest.raises(ExportError, match="--target cuda computes in float16"):
            export_bundle(checkpoint, tmp_path / "out", target="cuda", **wrong)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", DEVICE_BUNDLES)
def test_nothing_in_a_device_graph_is_float32_but_the_logits(built: dict[str, Path], name: str) -> None:
    """What is left in float32 would be copied, or refused by a strongly typed engine."""
    for graph in ("vision.onnx", "decoder.onnx"):
        model = onnx.load(built[name] / graph, load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        floats = {
            value.name
            for value in [*inferred.value_info, *inferred.output, *inferred.input]
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        }
        floats |= {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
        assert floats <= {"logits", "peak", "logsumexp"}


def test_embeddings_are_in_the_bundle_once(built: dict[str, Path]) -> None:
    model = onnx.load(built["cuda-fp16"] / "decoder.onnx", load_external_data=False)
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name == "embeddings")
    assert {entry.key: entry.value for entry in table.external_data}["location"] == "embeddings.npy"
    onnx.load(built["cuda-fp16"] / "decoder.onnx")
    read = onnx.numpy_helper.to_array(
        next(
            t
            for t in onnx.load(built["cuda-fp16"] / "decoder.onnx").graph.initializer
            if t.name == "embeddings"
        )
    )
    assert np.array_equal(read, np.load(built["cuda-fp16"] / "embeddings.npy"))


# ---- an emulated GPU ----


def test_a_gpu_answers_as_the_cpu_does(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = Bundle.open(built["cuda-fp16"])
    expected = [*ask(DualFocus(on_cpu), 6), *ask(Reference(on_cpu), 2)]
    emulated.install(monkeypatch)
    bundle = Bundle.open(built["cuda-fp16"])
    assert bundle.device == Device("cuda")
    found = [*ask(DualFocus(bundle), 6), *ask(Reference(bundle), 2)]
    for ours, theirs in zip(found, expected, strict=True):
        assert replace(ours, times_ms={}) == replace(theirs, times_ms={})
        assert ours.counters == theirs.counters


def test_a_gpu_encodes_the_crop_while_it_decodes(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The region comes as soon as the box is there, before the macro answer's last token."""
    emulated.install(monkeypatch)
    runner = DualFocus(Bundle.open(built["cuda-fp16"]))
    early = 0
    for i in range(6):
        events = list(runner.stream(np.asarray(picture(i, 200 + 31 * i, 260 - 17 * i)), QUESTIONS[i % 3]))
        regions = [at for at, event in enumerate(events) if isinstance(event, Region)]
        assert len(regions) == 1
        macro = [
            at for at, event in enumerate(events) if isinstance(event, ReplyToken) and event.reply == "macro"
        ]
        early += regions[0] < macro[-1]
        assert events[-1].counters.vision_encodes == 2 if events[-1].crop else 1
    assert early


def test_a_gpu_cuts_crops_out_itself(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel in C here, into the memory that the one in CUDA would write to."""
    streams = []

    def crop_resize(*arguments: Any, out: emulated.Array, stream: int, **options: Any) -> None:
        streams.append(stream)
        out._memory[...] = kernels.crop_resize(*arguments, **options, dtype=np.float16)

    expected = ask(DualFocus(Bundle.open(built["cuda-fp16"])), 4)
    emulated.install(monkeypatch)
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "crop_resize", crop_resize)
    bundle = Bundle.open(built["cuda-fp16"])
    found = ask(DualFocus(bundle), 4)
    assert len(streams) == sum(result.counters.vision_encodes for result in found) == 8
    assert set(streams) == {7}  # the tower's, which is the one that does not wait for others
    for ours, theirs in zip(found, expected, strict=True):
        assert replace(ours, times_ms={}) == replace(theirs, times_ms={})


def test_what_goes_wrong_apart_is_raised_here(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated.install(monkeypatch)
    bundle = Bundle.open(built["cuda-fp16"])
    runner = DualFocus(bundle)
    expected = ask(runner, 6)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(Engine, "_encode_aside", fail)
        runner = DualFocus(bundle)
        with pytest.raises(MemoryError):
            ask(runner, 6)
    for ours, theirs in zip(ask(runner, 6), expected, strict=True):
        assert ours.answer == theirs.answer


def test_little_is_copied_to_and_from_a_gpu(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    bundle = Bundle.open(built["cuda-fp16"])
    runner = DualFocus(bundle, select="answer")
    seen = np.asarray(picture(1, 300, 200))
    runner.ask(seen, QUESTIONS[0])
    emulated.copied.update(dict.fromkeys(emulated.copied, 0))
    result = runner.ask(seen, QUESTIONS[1], mode="macro")
    assert result.counters.vision_encodes == 0
    tokens = result.counters.tokens_prefilled + result.counters.decode_steps
    logits = len(result.macro.generation.tokens) if result.macro else 0
    # an id, a length and a position of 8 bytes each for a token at most; and for a choice two numbers
    assert emulated.copied["to device"] <= 40 * tokens
    assert emulated.copied["to host"] <= 16 * (logits + 1)


def test_steps_that_come_again_are_recorded(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    monkeypatch.setattr(engine, "CAPTURE_AFTER", 3)
    bundle = Bundle.open(built["cuda-fp16"])
    held: list[bool] = []
    run = emulated._Session.run_with_iobinding

    def watched(session: Any, binding: Any, options: Any = None) -> None:
        number = options and options.get_run_config_entry("gpu_graph_id")
        if number not in (None, "-1", *emulated.recorded):
            held.append(bundle.alone.locked())
        run(session, binding, options)

    monkeypatch.setattr(emulated._Session, "run_with_iobinding", watched)
    runner = DualFocus(bundle)
    ask(runner, 3)
    first = emulated.recorded.index("1")
    assert set(emulated.recorded[:first]) == {"-1"}
    assert emulated.recorded[first:].count("1") > 10
    assert emulated.recorded.count("-1") > 6  # prompts are not: each is another shape
    assert held
    assert all(held)  # by the decoder, so that nobody else's work gets into the recording
    assert not bundle.alone.locked()
    count = len(set(emulated.recorded))
    ask(runner, 3)
    assert len(set(emulated.recorded)) == count  # the same rows are the same recordings


def test_a_gpu_keeps_nothing_of_what_is_gone(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    bundle = Bundle.open(built["cuda-fp16"])
    runner = DualFocus(bundle, cache_mb=0)
    ask(runner, 3)
    gc.collect()
    before = sum(isinstance(thing, emulated.Array) for thing in gc.get_objects())
    ask(runner, 6)
    gc.collect()
    assert sum(isinstance(thing, emulated.Array) for thing in gc.get_objects()) <= before


def test_a_gpu_that_fails_is_one_sentence(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    runner = DualFocus(Bundle.open(built["cuda-fp16"]))

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\nat node")

    with monkeypatch.context() as broken:
        broken.setattr(emulated._Session, "run_with_iobinding", fail)
        with pytest.raises(DeviceError, match=r"^cuda:0 failed: out of memory$"):
            ask(runner, 1)
    assert ask(runner, 1)[0].answer == ask(DualFocus(Bundle.open(built["cuda-fp16"])), 1)[0].answer


def test_threads_that_outnumber_the_cores_do_not_spin() -> None:
    """They would take the cores from those that work: 256 of them left a question on two cores unanswered."""
    cores = len(os.sched_getaffinity(0))
    for number, spins in ((None, "1"), (cores, "1"), (cores + 1, "0"), (256, "0")):
        options = engine._options(engine.Threads(number, spin=True))
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins


def test_cupy_that_does_not_compute_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = emulated.cupy()

    def zeros(*_: object) -> None:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    broken.zeros = zeros
    assert (
        missing(monkeypatch, broken, 0)
        == "CuPy does not compute (libnvrtc.so.13: cannot open shared object file)"
    )


def test_provider_fallback_is_an_error(monkeypatch: pytest.MonkeyPatch, built: dict[str, Path]) -> None:
    """ONNX Runtime opens a session on the CPU where CUDA does not come up, and only logs it."""
    place = engine.Place(Device("cuda"), stream=SimpleNamespace(ptr=1))
    with (
        pytest.raises(DeviceError, match="fell back to CPUExecutionProvider"),
        pytest.warns(match="not in available"),
    ):
        engine._session(built["cuda-fp16"] / "vision.onnx", engine._options(place.threads), place)
