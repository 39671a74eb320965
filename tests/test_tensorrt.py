"""Engines are built whole, and opened only where they fit.

With a fake of the library, and with TensorRT-RTX's own builder where it is installed, which needs no GPU.
No engine was ever run here.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import pytest
import tiny
from fake_tensorrt import Modules, imported

from dualfocus.export import ExportError, export_bundle
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.errors import BundleError, EngineError


class Driver:
    """libcuda's functions that are called, of a machine with one GPU."""

    name, major, minor = b"NVIDIA Test", 8, 9

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        return 0 if ordinal == 0 else 101

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self.name
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:  # noqa: N802
        number._obj.value = {75: self.major, 76: self.minor}[attribute]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Iterator[Modules]:
    """`runtime.tensorrt` and `export.tensorrt` over the fake, which calls itself TensorRT."""
    monkeypatch.setattr(fake_tensorrt, "__name__", "tensorrt")
    yield from imported(monkeypatch, fake_tensorrt)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that can become engines."""
    folder = tmp_path_factory.mktemp("standard")
    checkpoint = tiny.build(folder / "checkpoint")
    export_bundle(
        checkpoint,
        folder / "bundle",
        target="onnx-standard",
        precision="fp16",
        cache="float16",
        progress=lambda _: None,
    )
    return folder / "bundle"


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
    note = runtime.Note.from_dict(json.loads((folder / "engines.json").read_text()))
    assert note.bundle == digest(bundle)
    assert (note.library, note.version) == ("tensorrt", "10.15.1")
    assert note.gpu == runtime.Gpu("NVIDIA Test", "8.9")
    assert note.reach == runtime.Reach(rows=2, capacity=1024, length=300, wanted=8, pictures=2)

    engines = runtime.load(bundle, digest(bundle))
    assert engines.reach == note.reach
    assert engines.vision["profiles"] == [{"pixel_values": [[n, 3, 56, 56] for n in (1, 1, 2)]}]
    context, generation = (engines.decoder["profiles"][i] for i in (runtime.CONTEXT, runtime.GENERATION))
    assert context["inputs_embeds"] == [[1, 1, 64], [1, 150, 64], [2, 300, 64]]
    assert context["logits_at"] == [[1, 1], [1, 1], [2, 8]]
    assert generation["inputs_embeds"] == [[1, 1, 64], [2, 1, 64], [2, 1, 64]]
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
        "the GPU NVIDIA Other of compute capability 8.9, this is NVIDIA Test of compute capability 8.9: ",
    ),
    "another capability": (
        lambda b: rewrite(b, lambda n: n.update(gpu={"name": "any", "capability": "12.0"})),
        "the GPU any of compute capability 12.0, this is any of compute capability 8.9: ",
    ),
    "a torn plan": (
        lambda b: (b / "engines" / "decoder.engine").write_bytes(b"torn"),
        "decoder.engine has 4 bytes, expected ",
    ),
    "a plan less": (
        lambda b: (b / "engines" / "vision.engine").unlink(),
        "vision.engine has 0 bytes, expected ",
    ),
    "a damaged note": (lambda b: (b / "engines" / "engines.json").write_text("{"), "engines.json is damaged"),
    "a foreign note": (
        lambda b: (b / "engines" / "engines.json").write_text("[1]"),
        "engines.json is damaged",
    ),
    "a note of less": (lambda b: rewrite(b, lambda n: n.pop("reach")), "engines.json is damaged"),
    "a note of other files": (
        lambda b: rewrite(b, lambda n: n.update(sizes={"vision.engine": 1})),
        "engines.json is damaged",
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
    assert str(refused.value).endswith(runtime.REBUILD)


def test_a_plan_that_the_library_refuses(ours: Modules, bundle: Path) -> None:
    runtime, export = ours
    plan = export.build_engines(bundle) / "vision.engine"
    plan.write_bytes(b"x" * plan.stat().st_size)
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
    monkeypatch.setattr(export, "set_capacity", lambda *_: None)
    with pytest.raises(
        ExportError, match=r"decoder\.onnx at TensorScatter present\.0\.key: The KV cache must have a static"
    ):
        export.build_engines(bundle)
    assert set(bundle.iterdir()) == {*before, built}  # the ones before


def test_what_cannot_become_an_engine(ours: Modules, tiny_bundle: Path, bundle: Path) -> None:
    runtime, export = ours
    with pytest.raises(ExportError, match=r"no com\.microsoft\.GroupQueryAttention .*; export with --target"):
        export.build_engines(tiny_bundle)
    for capacity in (0, 1025):
        with pytest.raises(ExportError, match=f"capacity is {capacity}, expected 1 to the .* of 1024"):
            export.build_engines(bundle, capacity=capacity)
    with pytest.raises(ExportError, match="for the GPU that is there, not for NVIDIA Other"):
        export.build_engines(bundle, gpu=runtime.Gpu("NVIDIA Other", "8.6"))


def test_no_gpu(ours: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = ours
    with pytest.raises(EngineError, match="shows no GPU 1: cuDeviceGet gave error 101"):
        runtime.find_gpu(1)

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(EngineError, match="no NVIDIA driver is installed"):
        runtime.find_gpu()


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"pip install 'dualfocus\[tensorrt\]'"):
        next(imported(monkeypatch, None))


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


def test_tensorrt_rtx_builds_them(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real parser and builder, for a GPU that need not be there."""
    real("tensorrt_rtx")
    for runtime, export in imported(monkeypatch, None):
        steps: list[tuple[str, int, int]] = []
        folder = export.build_engines(
            bundle,
            capacity=512,
            gpu=runtime.Gpu("NVIDIA GeForce RTX 4090", "8.9"),
            watch=lambda *step, steps=steps: steps.append(step),
        )
        note = runtime._note(bundle)
        assert (note.library, note.gpu) == ("tensorrt_rtx", runtime.Gpu("any", "8.9"))
        assert note.sizes == {
            name: (folder / name).stat().st_size for name in ("vision.engine", "decoder.engine")
        }
        assert min(note.sizes.values()) > 1 << 16
        assert all(0 < done <= of for _, done, of in steps)
        with pytest.raises(ExportError, match=r"builds for compute capability 7\.5, .*, not for"):
            export.build_engines(bundle, gpu=runtime.Gpu("NVIDIA Old", "5.0"))
