"""A bundle of target tensorrt -> its folder ``engines``, for one model of GPU (`runtime.tensorrt`).

The graphs are the bundle's own. Networks are strongly typed: what is float16 is what the graph says, TensorRT
chooses nothing.

TensorRT builds on the GPU that it builds for, by timing kernels there; what it learned is kept in
``timing.cache``. TensorRT-RTX compiles for a GPU that need not be there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dualfocus.export.errors import ExportError
from dualfocus.runtime import contents, graph
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.manifest import DecoderSpec
from dualfocus.runtime.tensorrt import (
    DECODER,
    FOLDER,
    IS_RTX,
    LIBRARY,
    NOTE,
    VERSION,
    VISION,
    Gpu,
    Log,
    Note,
    Reach,
    find_gpu,
)
from dualfocus.runtime.tensorrt import library as trt

Watch = Callable[[str, int, int], object]  # what is being done, how many steps are done, and of how many
Sizes = tuple[int, int, int]  # the smallest, the usual and the largest
Profile = Mapping[str, Sizes]  # by dimension; of an input that shapes depend on, its value

# What varies in an input's shape, in order; in those of the cache and of lengths, the rows do.
VARYING = {"tokens": ("batch", "length"), "images": ("shown",), "logits_at": ("batch", "wanted")}
TIMING = "timing.cache"
ROWS, LENGTH, WANTED, PICTURES = 2, 1024, 64, 2  # two passes, an image and a question, a draft, two crops


def build_engines(
    path: Path,
    *,
    rows: int = ROWS,
    length: int = LENGTH,
    wanted: int = WANTED,
    pictures: int = PICTURES,
    workspace: int | None = None,
    index: int = 0,
    gpu: Gpu | None = None,
    watch: Watch = lambda *_: None,
) -> Path:
    """Build the engines of the bundle at `path`; returns their folder, whole or not there at all.

    They take calls of up to `rows` rows, of `length` new tokens a row, of which `wanted` are given logits,
    and `pictures` pictures. `workspace` is the memory in bytes that a layer may take beside its tensors, None
    all of the GPU's. `gpu` None is number `index` here; TensorRT-RTX alone can build for another. `watch`
    is told each step, by TensorRT's names. Raises BundleError for what is no bundle, ExportError for one that
    cannot become engines, and DeviceError where there is no GPU.
    """
    manifest, digest = read_manifest(path)
    spec, tokens = manifest.decoder, manifest.image.tokens
    if manifest.target != "tensorrt":
        raise ExportError(f"{path} is of target {manifest.target}, engines are built from --target tensorrt")
    reach = Reach(rows, min(length, spec.context), min(wanted, length, spec.context), pictures)
    if gpu is None:
        gpu = find_gpu(index)
    elif not IS_RTX:
        raise ExportError(f"TensorRT builds for the GPU that is there, not for {gpu.name}")
    profiles: dict[str, tuple[str, list[Profile]]] = {
        VISION: ("vision.onnx", [{"batch": (1, 1, pictures)}]),
        DECODER: ("decoder.onnx", decoder_profiles(spec, reach, tokens)),
    }
    contents.verify(path, manifest.files)
    graph.check(path, manifest, manifest.files)
    folder = path / FOLDER
    with contents.replacing(folder) as new:
        if (folder / TIMING).is_file():
            shutil.copy(folder / TIMING, new)
        for name, (file, of_graph) in profiles.items():
            plan = _Plan(path / file)
            plan.configure(gpu, workspace, watch)
            (new / name).write_bytes(plan.build(of_graph, new / TIMING))
        built_for = Gpu("any", gpu.capability) if IS_RTX else gpu
        files = {name: entry for name, entry in contents.entries(new).items() if name in profiles}
        note = Note(digest, LIBRARY, VERSION, built_for, reach, files)
        contents.write_note(new, NOTE, note)
    return folder


def decoder_profiles(spec: DecoderSpec, reach: Reach, tokens: int) -> list[Profile]:
    """The decoder's, as `runtime.tensorrt` numbers them: one engine's weights, tuned for two uses.

    A picture is `tokens` tokens. ``total_sequence_length`` decides how much of the cache is looked at, so it
    is a value that shapes depend on, which TensorRT reads in the host's memory.
    """
    shown = tokens * reach.pictures
    both = {
        "shown": (1, tokens, shown * reach.rows),
        "total_sequence_length": (1, max(1, spec.context // 2), spec.context),
    }
    context: Profile = both | {
        "batch": (1, 1, reach.rows),
        "length": (1, max(1, reach.length // 2), reach.length),
        "wanted": (1, 1, reach.wanted),
    }
    step: Profile = both | {
        "batch": (1, reach.rows, reach.rows),
        "length": (1, 1, 1),
        "wanted": (1, 1, 1),
    }
    return [context, step]


class _Plan:
    """A graph on its way to an engine."""

    def __init__(self, graph: Path) -> None:
        self._graph, self._log = graph, Log()
        self._builder = trt.Builder(self._log)
        typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self._network = self._builder.create_network(1 << int(typed))
        self._parser = trt.OnnxParser(self._network, self._log)  # weights live in it
        if not self._parser.parse_from_file(str(graph)):
            raise ExportError(f"{LIBRARY} {VERSION} does not take {graph}{self._refusal()}")
        self._config = self._builder.create_builder_config()

    def _refusal(self) -> str:
        """Where the parser stopped, and why; of what is no graph it tells the log alone."""
        if not self._parser.num_errors:
            return f": {_line(self._log.reason)}"
        error = self._parser.get_error(0)
        node = f" at {error.node_operator()} {error.node_name()}" if error.node_name() else ""
        return f"{node}: {_line(error.desc())}"

    def configure(self, gpu: Gpu, workspace: int | None, watch: Watch) -> None:
        """What holds for every graph."""
        config = self._config
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.progress_monitor = _Monitor(watch)
        if IS_RTX:
            known = trt.ComputeCapability.__members__
            name = "SM" + gpu.capability.replace(".", "")
            if name not in known:
                able = ", ".join(f"{of[2:-1]}.{of[-1]}" for of in known if of.startswith("SM"))
                raise ExportError(f"{LIBRARY} {VERSION} builds for compute capability {able}, not for {gpu}")
            config.num_compute_capabilities = 1
            config.set_compute_capability(known[name], 0)

    def build(self, profiles: Sequence[Profile], timing: Path) -> Any:
        """The plan, a buffer. What `timing` holds need not be timed again, and what was is added to it."""
        for sizes in profiles:
            self._config.add_optimization_profile(self._profile(sizes))
        if not IS_RTX:  # which times nothing
            self._use(timing)
        plan = self._builder.build_serialized_network(self._network, self._config)
        if plan is None:
            raise ExportError(f"{LIBRARY} {VERSION} cannot build {self._graph}: {_line(self._log.reason)}")
        if not IS_RTX:
            timing.write_bytes(self._config.get_timing_cache().serialize())
        return plan

    def _profile(self, sizes: Profile) -> Any:
        profile = self._builder.create_optimization_profile()
        for tensor in map(self._network.get_input, range(self._network.num_inputs)):
            if tensor.is_shape_tensor:
                profile.set_shape_input(tensor.name, *([size] for size in sizes[tensor.name]))
            elif -1 in tensor.shape:
                shapes = [list(tensor.shape) for _ in range(3)]
                varying = (i for i, size in enumerate(tensor.shape) if size == -1)
                for i, dimension in zip(varying, VARYING.get(tensor.name, ("batch",)), strict=True):
                    for shape, size in zip(shapes, sizes[dimension], strict=True):
                        shape[i] = size
                profile.set_shape(tensor.name, *shapes)
        return profile

    def _use(self, timing: Path) -> None:
        known = timing.read_bytes() if timing.is_file() else b""
        cache = self._config.create_timing_cache(known)
        if cache is None or not self._config.set_timing_cache(cache, False):  # another GPU's or version's
            self._config.set_timing_cache(self._config.create_timing_cache(b""), False)


class _Monitor(trt.IProgressMonitor):
    """Passes on what the builder tells, from whichever thread it does."""

    def __init__(self, watch: Watch) -> None:
        trt.IProgressMonitor.__init__(self)
        self._watch, self._steps = watch, dict[str, int]()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by the library."""
        self._steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by the library; False would end the build."""
        self._watch(phase_name, step + 1, self._steps[phase_name])
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Called by the library."""
        self._steps.pop(phase_name, None)


def _line(text: str) -> str:
    return text.splitlines()[0].rstrip(".") if text else "it gave no reason"
