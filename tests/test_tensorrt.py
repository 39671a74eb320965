"""Engines are built whole, and opened only where they fit.

With a fake of the library, whose engines compute on the CPU, on an emulated GPU (`emulated`); and with
TensorRT-RTX's own builder where it is installed, which needs no GPU. No real engine was ever run here.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated
import fake_tensorrt
import numpy as np
import pytest
import tiny
from fake_tensorrt import Modules, imported
from test_devices import QUESTIONS
from test_parity import picture
from typer.testing import CliRunner

from dualfocus.cli import app
from dualfocus.export import ExportError, export_bundle, operators
from dualfocus.runtime import Bundle, DualFocus, Reference
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.devices import Device
from dualfocus.runtime.engines import TokenIds
from dualfocus.runtime.errors import BundleError, DeviceError, EngineError
from dualfocus.runtime.manifest import Precision
from dualfocus.runtime.result import FocusResult

GPU = "Emulated"  # of compute capability 9.0


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    """`runtime.tensorrt` and `export.tensorrt` over the fake, which calls itself TensorRT."""
    emulated.install(monkeypatch)
    monkeypatch.setattr(fake_tensorrt, "__name__", "tensorrt")
    yield from imported(monkeypatch, fake_tensorrt)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that can become engines."""
    out = tmp_path_factory.mktemp("tensorrt") / "bundle"
    export_bundle(checkpoint, out, target="tensorrt", precision="fp16", progress=lambda _: None)
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def digest(bundle: Path) -> str:
    return read_manifest(bundle)[1]


def test_the_engines_and_their_note(ours: Modules, bundle: Path) -> None:
    runtime, export = ours
    steps: list[tuple[str, int, int]] = []
    folder = export.build_engines(bundle, length=300, wanted=8, watch=lambda *step: steps.append(step))
    assert {file.name for file in folder.iterdir()} == {
        "vision.engine",
        "decoder.engine",
        "timing.cache",
        "engines.json",
    }
    assert steps == [("Building engine", 1, 2), ("Building engine", 2, 2)] * 2
    note = runtime._note(bundle)
    assert set(note.files) == {"vision.engine", "decoder.engine"}
    assert note.bundle == digest(bundle)
    assert (note.library, note.version) == ("tensorrt", "10.15.1")
    assert note.gpu == runtime.Gpu(GPU, "9.0")
    assert note.reach == runtime.Reach(rows=2, length=300, wanted=8, pictures=2)

    engines = runtime.load(bundle, digest(bundle))
    assert engines.reach == note.reach
    assert engines.vision._told["profiles"] == [{"pixel_values": [[n, 3, 56, 56] for n in (1, 1, 2)]}]
    context, generation = (
        engines.decoder._told["profiles"][i] for i in (runtime.CONTEXT, runtime.GENERATION)
    )
    assert context["tokens"] == [[1, 1], [1, 150], [2, 300]]
    assert context["images"] == generation["images"] == [[1, 64], [16, 64], [64, 64]]
    assert context["logits_at"] == [[1, 1], [1, 1], [2, 8]]
    assert generation["tokens"] == [[1, 1], [2, 1], [2, 1]]
    assert generation["past_key_values.1.value"] == [[n, 2, 1024, 16] for n in (1, 2, 2)]
    assert generation["query_seqlens"] == [[1], [2], [2]]
    assert generation["total_sequence_length"] == [[1], [512], [1024]]


def test_what_was_timed_is_kept(ours: Modules, bundle: Path) -> None:
    _, export = ours
    timing = export.build_engines(bundle) / "timing.cache"
    assert timing.read_bytes() == b"timed " * 2
    assert export.build_engines(bundle) / "timing.cache" == timing
    assert timing.read_bytes() == b"timed " * 4
    for useless in (b"torn", b"another GPU's"):
        timing.write_bytes(useless)
        export.build_engines(bundle)
        assert timing.read_bytes() == b"timed " * 2


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    note = bundle / "engines" / "engines.json"
    raw = json.loads(note.read_text())
    change(raw)
    note.write_text(json.dumps(raw))


SPOIL: dict[str, tuple[Callable[[Path], object], str]] = {
    "another bundle": (lambda b: rewrite(b, lambda n: n.update(bundle="0")), "the bundle 0, this is "),
    "another version": (
        lambda b: rewrite(b, lambda n: n.update(version="10.14")),
        "the library tensorrt 10.14, this is tensorrt 10.15.1: ",
    ),
    "another library": (
        lambda b: rewrite(b, lambda n: n.update(library="tensorrt_rtx")),
        "the library tensorrt_rtx 10.15.1, this is tensorrt",
    ),
    "another GPU": (
        lambda b: rewrite(b, lambda n: n["gpu"].update(name="NVIDIA Other")),
        "the GPU NVIDIA Other of compute capability 9.0, this is Emulated of compute capability 9.0: ",
    ),
    "another capability": (
        lambda b: rewrite(b, lambda n: n.update(gpu={"name": "any", "capability": "12.0"})),
        "the GPU any of compute capability 12.0, this is any of compute capability 9.0: ",
    ),
    "a torn plan": (
        lambda b: (b / "engines" / "decoder.engine").write_bytes(b"torn"),
        "decoder.engine has 4 bytes, expected ",
    ),
    "a plan less": (
        lambda b: (b / "engines" / "vision.engine").unlink(),
        "vision.engine is missing",
    ),
    "a damaged note": (
        lambda b: (b / "engines" / "engines.json").write_text("{"),
        "engines.json is not JSON",
    ),
    "a foreign note": (
        lambda b: (b / "engines" / "engines.json").write_text("[1]"),
        "engines.json: expected `object`, got `array`",
    ),
    "a note of less": (
        lambda b: rewrite(b, lambda n: n.pop("reach")),
        "engines.json: object missing required field `reach`",
    ),
    "a note of a huge reach": (
        lambda b: rewrite(b, lambda n: n["reach"].update(rows=10**9)),
        "engines.json: reach.rows: expected `int` <= 16777216",
    ),
    "a note of fewer files": (
        lambda b: rewrite(b, lambda n: n["files"].pop("vision.engine")),
        "engines.json lists no vision.engine",
    ),
    "a FIFO as a note": (
        lambda b: ((b / "engines" / "engines.json").unlink(), os.mkfifo(b / "engines" / "engines.json")),
        "engines.json is not a regular file",
    ),
    "a link out of the bundle": (
        lambda b: shutil.move(b / "engines", b.parent) and (b / "engines").symlink_to(b.parent / "engines"),
        "engines is a link to a file elsewhere",
    ),
    "a damaged plan": (
        lambda b: (b / "engines" / "vision.engine").write_bytes(
            bytes((b / "engines" / "vision.engine").stat().st_size)
        ),
        "vision.engine has SHA-256 ",
    ),
    "no engines": (lambda b: shutil.rmtree(b / "engines"), "bundle has no engines"),
}


@pytest.mark.parametrize(("spoil", "told"), SPOIL.values(), ids=SPOIL.keys())
def test_what_does_not_fit_is_refused(
    ours: Modules, bundle: Path, spoil: Callable[[Path], object], told: str
) -> None:
    runtime, export = ours
    export.build_engines(bundle)
    spoil(bundle)
    with pytest.raises(BundleError, match=re.escape(told)) as refused:
        runtime.load(bundle, digest(bundle))
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(f"with `dualfocus pack {bundle} --device tensorrt`")


def test_a_plan_that_the_library_refuses(ours: Modules, bundle: Path) -> None:
    runtime, export = ours
    plan = export.build_engines(bundle) / "vision.engine"
    plan.write_bytes(b"x" * plan.stat().st_size)
    sha256 = hashlib.sha256(plan.read_bytes()).hexdigest()
    rewrite(bundle, lambda note: note["files"]["vision.engine"].update(sha256=sha256))
    with pytest.raises(BundleError, match=r"by tensorrt 10\.15\.1: Serialization assertion failed\.$"):
        runtime.load(bundle, digest(bundle))


def test_engines_of_rtx_fit_every_gpu_of_their_capability(ours: Modules, bundle: Path) -> None:
    runtime, export = ours
    export.build_engines(bundle)
    rewrite(bundle, lambda note: note["gpu"].update(name="any"))
    assert runtime.load(bundle, digest(bundle)).vision


def test_nothing_is_left_where_a_build_fails(
    ours: Modules, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, export = ours
    before = set(bundle.iterdir())
    with pytest.raises(ExportError, match=r"vision\.onnx: Could not find any implementation for a node$"):
        export.build_engines(bundle, workspace=0)
    assert set(bundle.iterdir()) == before
    built = export.build_engines(bundle, workspace=1 << 30)
    tables = operators.CONSUMERS["tensorrt"]
    fewer = {name: types for name, types in tables.types.items() if name != "Attention"}
    monkeypatch.setitem(operators.CONSUMERS, "tensorrt", replace(tables, types=fewer))
    with pytest.raises(ExportError, match=r"decoder\.onnx at TensorScatter present\.0\.key: .* Attention"):
        export.build_engines(bundle)
    assert set(bundle.iterdir()) == {*before, built}  # the ones before


def test_what_cannot_become_an_engine(ours: Modules, tiny_bundle: Path, bundle: Path) -> None:
    runtime, export = ours
    with pytest.raises(ExportError, match=r"is of target onnxruntime, .* built from --target tensorrt$"):
        export.build_engines(tiny_bundle)
    with pytest.raises(ExportError, match="for the GPU that is there, not for NVIDIA Other"):
        export.build_engines(bundle, gpu=runtime.Gpu("NVIDIA Other", "8.6"))


def test_no_gpu(ours: Modules) -> None:
    runtime, _ = ours
    with pytest.raises(DeviceError, match="there is no GPU 1, 1 found"):
        runtime.find_gpu(1)


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"pip install 'dualfocus\[tensorrt\]'"):
        next(imported(monkeypatch, None))


# ---- running them ----


def test_engines_answer_as_the_cpu_does(ours: Modules, bundle: Path) -> None:
    _, export = ours
    expected = answers(Bundle.open(bundle, device="cpu", threads=1))
    for reach in ({}, {"length": 24, "wanted": 3, "pictures": 1}, {"rows": 1}):  # small ones: in pieces
        export.build_engines(bundle, **reach)
        opened = Bundle.open(bundle)
        assert opened.device == Device("tensorrt")
        for ours_, theirs in zip(answers(opened), expected, strict=True):
            assert ours_.answer == theirs.answer
            assert ours_.box == theirs.box
            assert ours_.counters == theirs.counters
            for reply in ("macro", "micro"):
                found, told = getattr(ours_, reply), getattr(theirs, reply)
                assert (found and found.generation.tokens) == (told and told.generation.tokens)
                if told and told.loss is not None:
                    assert found.loss == pytest.approx(told.loss, abs=1e-2)


def answers(bundle: Bundle) -> list[FocusResult]:
    asked = [(np.asarray(picture(i, 200 + 31 * i, 260 - 17 * i)), QUESTIONS[i % 3]) for i in range(4)]
    fast, plain = DualFocus(bundle), Reference(bundle, free_box=False)
    return [
        *(fast.ask(*each) for each in asked),
        *DualFocus(bundle, slots=6).ask_many(asked[:3]),
        plain.ask(*asked[0]),
    ]


def test_what_no_profile_takes_is_refused(ours: Modules, bundle: Path) -> None:
    _, export = ours
    export.build_engines(bundle)
    opened = Bundle.open(bundle)
    patches = np.zeros((100, 64), np.float16)
    shown = TokenIds(np.arange(419, 519), (emulated.asarray(patches, np.float16),))
    cache = KVCache(opened.manifest.decoder, 1, 1024, opened.device.memory)
    with pytest.raises(
        DeviceError, match=r"^tensorrt 10\.15\.1 does not take images of shape \(100, 64\): .*64\]$"
    ):
        opened.decoder.extend(cache, [0], [shown], [[99]])


def test_the_command(ours: Modules, bundle: Path, tiny_bundle: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == (2 if result.stderr else 0), result.output
        assert result.stderr.count("\n") <= 1
        return result.stderr or result.stdout

    ask = "ask", "examples/scene.png", "What?", "--bundle", bundle
    assert f"has no engines: build them on this machine with `dualfocus pack {bundle} --device " in run(*ask)
    built = run("pack", bundle, "--device", "tensorrt")
    assert built.startswith(f"{bundle}/engines: ")
    assert built.endswith("for tensorrt:0 and tensorrt 10.15.1 alone\n")
    assert run("pack", tiny_bundle, "--device", "tensorrt").startswith(
        "dualfocus: tensorrt:0 does not run a bundle of target onnxruntime"
    )
    assert "does not work here: there is no GPU 1" in run("pack", bundle, "--device", "tensorrt:1")
    file = bundle / "vision.onnx"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert "vision.onnx has SHA-256 " in run("pack", bundle, "--device", "tensorrt")
    with pytest.raises(ExportError, match=r"vision\.onnx: ModelImporter\.cpp: Failed"):
        ours[1]._Plan(file)


def real(name: str) -> ModuleType:
    return pytest.importorskip(name, exc_type=ImportError)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_bindings", "tensorrt_rtx"])
def test_the_fake_has_the_real_signatures(name: str) -> None:
    """As the bindings write them into their docstrings, one or more for each method."""
    library = real(name)
    for kind, fake in inspect.getmembers(fake_tensorrt, inspect.isclass):
        if fake.__module__ != fake_tensorrt.__name__:
            continue
        theirs = getattr(library, kind)
        if issubclass(fake, enum.Enum):
            assert set(fake.__members__) <= set(theirs.__members__)
            continue
        made_by_library = kind not in ("Builder", "OnnxParser", "Runtime", "ILogger", "IProgressMonitor")
        for method, ours in [*vars(fake).items(), *inspect.get_annotations(fake).items()]:
            if method == "__init__" and made_by_library:
                continue
            if inspect.isfunction(ours):
                text = getattr(theirs, method).__doc__
                written = re.findall(rf"\b{method}\((self: .*)\) -> ", text)
                names = [re.findall(r"(?:^|, )(\w+): ", arguments) for arguments in written]
                assert list(inspect.signature(ours).parameters) in names, f"{kind}.{method}: {written}"
            elif not method.startswith("_"):
                assert hasattr(theirs, method), f"{kind}.{method}"


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_tensorrt_rtx_builds_them(
    checkpoint: Path, tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real parser and builder, for a GPU that need not be there."""
    real("tensorrt_rtx")
    bundle = tmp_path / "bundle"
    export_bundle(checkpoint, bundle, target="tensorrt", precision=precision, progress=lambda _: None)
    for runtime, export in imported(monkeypatch, None):
        steps: list[tuple[str, int, int]] = []
        folder = export.build_engines(
            bundle,
            gpu=runtime.Gpu("NVIDIA GeForce RTX 4090", "8.9"),
            watch=lambda *step, steps=steps: steps.append(step),
        )
        note = runtime._note(bundle)
        assert (note.library, note.gpu) == ("tensorrt_rtx", runtime.Gpu("any", "8.9"))
        sizes = {name: entry.size for name, entry in note.files.items()}
        assert sizes == {name: (folder / name).stat().st_size for name in ("vision.engine", "decoder.engine")}
        assert min(sizes.values()) > 1 << 16
        assert all(0 < done <= of for _, done, of in steps)
        with pytest.raises(ExportError, match=r"builds for compute capability 7\.5, .*, not for"):
            export.build_engines(bundle, gpu=runtime.Gpu("NVIDIA Old", "5.0"))
