"""How fast a model of random weights is on a device, beside what the device allows and beside transformers.

The device's rates are measured with torch: its memory's by a copy, bytes read and written; its arithmetic's
by the model's own matrix products in float16, at their own shapes, each from weights that no cache holds. A
decode step has to read all weights of the decoder's products, and the keys and values of its past; prefill
and vision have to do their multiply-adds, attention's too, causal where the model is. Replies are scripted
(`ScriptedDecoder`), as long as the protocol's usual ones.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import onnx as graphs

from dualfocus.bench import crop, harness, hollow, limits, stages
from dualfocus.bench.gpu_check import NEVER, held
from dualfocus.bench.harness import Timing
from dualfocus.bench.peers import work as works
from dualfocus.bench.peers.base import PAST, PREFILL, STEPS, Opened
from dualfocus.bench.scripted import ScriptedDecoder
from dualfocus.kernels import cuda
from dualfocus.runtime import Bundle, DualFocus, Reference, onnx
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.manifest import Precision
from dualfocus.runtime.sequence import embed

if TYPE_CHECKING:
    from dualfocus.bench.gpu import Figures, Part, Setup

Calls = Mapping[str, Callable[[], object]]

DECODE, ARITHMETIC = (
    75,
    60,
)  # percent of the limits that are wanted: of one row in fp16; of prefill and vision
QUESTION = 5  # times as fast as the authors' protocol
CROP = 1.5  # times the upload alone
PICTURES = (1, 2, 8)  # at once, through the vision tower; of the last, `ARITHMETIC` is wanted
ROWS = (1, 2, 8)  # decoded at once
REPEATS = 10  # of a copy or a product, between two looks at the clock
FRESH = 1 << 28  # bytes of weights that a product goes through before it comes to the same again


def parts(precision: Precision, setup: Setup) -> Iterator[Part]:
    """What is measured of the model in one precision."""
    skeleton = setup.folder / f"{setup.model}-{precision}"
    with tempfile.TemporaryDirectory(dir=setup.scratch) as scratch:
        model = _Model(skeleton, Path(scratch) / "bundle", precision, setup)
        yield "model", model.made
        yield "engines", model.engines
        yield "stages", model.stages
        yield "question", model.question
        for batch in setup.batches:
            yield f"{batch} at once", partial(model.at_once, batch)
        # last: an error of the device would leave no more parts
        yield "engines, steps replayed", model.replayed


class _Model:
    """A model, written and opened, and what is measured of it."""

    def __init__(self, skeleton: Path, path: Path, precision: Precision, setup: Setup) -> None:
        begin = time.perf_counter()
        hollow.fill(skeleton, path)
        filled = time.perf_counter()
        self._bundle = Bundle.open(path, device=setup.device)
        opened = time.perf_counter()
        self._seconds = {"seconds to write it": filled - begin, "seconds to open it": opened - filled}
        self._precision, self._setup = precision, setup
        self._work = works.make(path, skeleton, 1)
        self._scripted = ScriptedDecoder(self._bundle.decoder)
        self._scripted.script = works.script(self._work.calls) or {}
        self._asked = dataclasses.replace(self._bundle, decoder=self._scripted)
        self._rates = _Rates(setup)

    def made(self) -> Figures:
        """What it takes."""
        manifest = self._bundle.manifest
        return {
            **self._seconds,
            "ONNX Runtime": onnx.VERSION,
            "context": manifest.decoder.context,
            "bytes of the bundle": sum(entry.size for entry in manifest.files.values()),
            **held(self._bundle.device),
        }

    @cached_property
    def _peer(self) -> Opened | Exception | None:
        """The authors' protocol, which needs no second precision; or why it cannot be had."""
        if self._precision != "fp16":
            return None
        try:
            import torch

            from dualfocus.bench.peers import transformers

            return transformers.open_model(torch.float16, "SDPA", self._work, _torch(self._setup.device))
        except Exception as error:  # its figures are missing then, and ours are not
            traceback.print_exc()
            return error

    def engines(self) -> Figures:
        """Vision, prefill and decode, beside their limits and beside transformers."""
        bundle, spec = self._bundle, self._bundle.manifest.decoder
        size = bundle.manifest.image.size
        random = np.random.default_rng(0)
        # on the device, where the crop kernel leaves them
        drawn = random.standard_normal((max(PICTURES), 3, size, size))
        pixels = bundle.device.memory.asarray(drawn, np.float16)
        empty = KVCache(spec, 1, spec.context, bundle.device.memory)
        prompt = embed(self._work.tokens[:PREFILL], bundle.embeddings, {})
        calls, before = self._steps()
        calls |= {f"vision, {n}": partial(bundle.vision.encode, pixels[:n]) for n in PICTURES}
        calls["prefill"] = lambda: bundle.decoder.extend(empty, [0], [prompt], [[PREFILL - 1]])
        before["prefill"] = lambda: empty.truncate(0, 0)
        peer = self._peer
        if isinstance(peer, Opened):
            for part in ("vision", "prefill", "decode", "decode, two rows"):
                calls[f"transformers, {part}"] = peer.parts[part]
                if part in peer.before:
                    before[f"transformers, {part}"] = peer.before[part]
        with patch.object(onnx, "CAPTURE_AFTER", NEVER):
            return self._told(timed(calls, self._setup, before))

    def replayed(self) -> Figures:
        """Steps of decode again, as CUDA graphs, which become of rows that stay."""
        calls, before = self._steps()
        with patch.object(onnx, "CAPTURE_AFTER", 2):  # the second is recorded, all that follow are replayed
            return self._told(timed(calls, self._setup, before))

    def _steps(self) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
        """Steps of decode, and what comes before."""
        steps = {rows: _Steps(self._bundle, self._work.tokens, rows) for rows in ROWS}
        return (
            {f"decode, {rows}": of.run for rows, of in steps.items()},
            {f"decode, {rows}": of.begin for rows, of in steps.items()},
        )

    def _told(self, timings: Mapping[str, Timing]) -> Figures:
        found: Figures = {"bandwidth of the device, GB/s": self._rates.bandwidth / 1e9}
        for name, timing in timings.items():
            each = timing.each(STEPS) if "decode" in name else timing
            found[name] = dataclasses.asdict(each)
            if not name.startswith("transformers"):
                found |= {f"{name}: {of}": figure for of, figure in self._limit(name, each.median).items()}
        return found

    def _limit(self, name: str, ms: float) -> Figures:
        """How near a call comes to what it may take."""
        bundle, spec = self._bundle, self._bundle.manifest.decoder
        kind, _, number = name.partition(", ")
        if kind == "decode":
            rows = int(number)
            cache = 2 * spec.layers * spec.kv_heads * spec.head_size * np.dtype(spec.dtype).itemsize
            moved = sum(of.nbytes for of in self._products["decoder"]) + rows * (PAST + 1) * cache
            limit = 1e3 * moved / self._rates.bandwidth
            judged = rows == 1 and self._precision == "fp16"
            wish = harness.wanted(100 * limit / ms, at_least=DECODE if judged else None)
            return {"percent of the bandwidth": wish, "tokens/s": 1e3 * rows / ms}
        if kind == "prefill":
            many = [of for of in self._products["decoder"] if not of.is_last(spec.layers)]
            attention, length, judged = limits.causal(spec, 0, PREFILL), PREFILL, True
        else:
            pictures, tokens = int(number), bundle.manifest.image.tokens
            many, length = self._products["vision"], pictures * tokens
            attention = pictures * tokens**2 * sum(of.attends for of in many)
            judged = pictures == max(PICTURES)
        rate = self._rates.arithmetic(many, length)
        operations = 2 * (sum(of.inner * of.columns * length for of in many) + attention)
        percent = 100 * 1e3 * operations / rate / ms
        wish = harness.wanted(percent, at_least=ARITHMETIC if judged else None)
        return {"percent of the matrix rate": wish, "TFLOP/s of the products alone": rate / 1e12}

    @cached_property
    def _products(self) -> dict[str, list[Product]]:
        return {name: products(self._bundle.path / f"{name}.onnx") for name in ("decoder", "vision")}

    def stages(self) -> Figures:
        """A question about a photograph, as ``bench stages`` asks it."""
        asker = stages.Asker(self._bundle, stages.find_subject(self._bundle))
        timings = [asker.ask() for _ in range(1 + max(2, self._setup.rounds // 2))][1:]
        summary = stages.summarise(timings)
        names = ("total", "time_to_first_token", "time_per_output_token", "tokens_per_second")
        return {name.replace("_", " "): summary[name] for name in names} | {
            name.replace("_", " "): {key: row[key] for key in ("median", "low", "high", "p5", "p95")}
            for name, row in summary["stages"].items()
        }

    def question(self) -> Figures:
        """The whole question: the authors' protocol, ours plain, and with every saving; one pass alone."""
        picture, question = self._work.picture, self._work.question
        full, plain = DualFocus(self._asked, cache_mb=0), Reference(self._asked)
        calls: dict[str, Callable[[], object]] = {
            "all savings": lambda: full.ask(picture, question),
            "macro only": lambda: full.ask(picture, question, "macro"),
            "plain": lambda: plain.ask(picture, question),
        }
        peer = self._peer
        if isinstance(peer, Opened):
            calls["transformers"] = peer.parts["question as shipped"]
        said = [call.reply for call in self._work.calls if not call.scored]
        for runner in (full, plain):
            result = runner.ask(picture, question)
            assert result.macro is not None
            assert result.micro is not None
            found = [result.macro.generation, result.located, result.micro.generation]
            assert [reply and reply.tokens for reply in found] == said, f"replied {found}, expected {said}"
        timings = timed(calls, self._setup)
        best = timings["all savings"].median
        figures: Figures = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
        figures["plain / all savings"] = timings["plain"].median / best
        if "transformers" in timings:
            ratio = timings["transformers"].median / best
            figures["authors' protocol / all savings"] = harness.wanted(ratio, at_least=QUESTION)
        if isinstance(peer, Exception):
            figures["failed"] = f"transformers: {type(peer).__name__}: {peer}"
        return figures

    def at_once(self, batch: int) -> Figures:
        """Questions about so many pictures, asked together; the peer gives its memory to them."""
        self.__dict__.pop("_peer", None)
        _release(self._setup.device)
        found = self._wave(batch)
        _release(self._setup.device)
        return found

    def _wave(self, batch: int) -> Figures:
        picture, question = self._work.picture, self._work.question
        step = max(1, picture.shape[1] // batch)
        asked = [(np.roll(picture, i * step, axis=1), question) for i in range(batch)]
        model = DualFocus(self._asked, slots=2 * batch, cache_mb=0)
        timing = timed({"wave": lambda: list(model.ask_many(asked))}, self._setup)["wave"]
        return {
            "each": dataclasses.asdict(timing.each(batch)),
            "questions/s": 1e3 * batch / timing.median,
            **held(self._bundle.device),
        }


class _Steps:
    """`STEPS` tokens, one after the other, on rows that hold `PAST` already."""

    def __init__(self, bundle: Bundle, tokens: tuple[int, ...], rows: int) -> None:
        spec = bundle.manifest.decoder
        self._decoder, self._rows = bundle.decoder, range(rows)
        self._cache = KVCache(spec, rows, spec.context, bundle.device.memory)
        self._steps = [embed([token], bundle.embeddings, {}) for token in tokens[PAST:]]
        past = embed(tokens[:PAST], bundle.embeddings, {})
        for row in self._rows:
            self._decoder.extend(self._cache, [row], [past], [[0]])

    def begin(self) -> None:
        for row in self._rows:
            self._cache.truncate(row, PAST)

    def run(self) -> None:
        for step in self._steps:
            rows = len(self._rows)
            self._decoder.extend(self._cache, self._rows, [step] * rows, [[0]] * rows)


@dataclass(frozen=True)
class Product:
    """A product with a matrix of weights, (inner, columns); they take `nbytes` as they are stored."""

    name: str
    inner: int
    columns: int
    nbytes: int
    attends: int = 0  # multiply-adds of the attention that follows, for each pair of tokens

    def is_last(self, layers: int) -> bool:
        """Whether it is done for those positions alone whose logits are wanted."""
        behind = self.name.startswith(f"layers.{layers - 1}.") and ".qkv" not in self.name
        return behind or self.name.startswith("head")


def products(path: Path) -> list[Product]:
    """Those of the graph at `path`, one for every node that multiplies with weights."""
    graph = graphs.load(path, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    found: list[Product] = []
    for node in graph.node:
        weights = [stored[name] for name in node.input[1:] if name in stored]
        nbytes = sum(_nbytes(tensor) for tensor in weights)
        if node.op_type == "MatMulNBits":
            told = {attribute.name: attribute.i for attribute in node.attribute}
            found.append(Product(node.name, told["K"], told["N"], nbytes))
        elif node.op_type == "MatMul" and weights:
            inner, columns = weights[0].dims
            found.append(Product(node.name, inner, columns, nbytes))
        elif node.op_type == "Conv":
            columns, *window = weights[0].dims
            found.append(Product(node.name, math.prod(window), columns, nbytes))
        elif node.op_type == "MatMul":  # of two activations: scores, or values; as wide as what was projected
            found[-1] = dataclasses.replace(found[-1], attends=found[-1].attends + found[-1].columns)
    return found


def _nbytes(tensor: graphs.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return len(tensor.raw_data)


class _Rates:
    """How fast the device is, by torch."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._products: dict[tuple[int, int, int], float] = {}  # seconds

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of its memory, read and written."""
        import torch

        source = torch.ones(self._setup.copied, dtype=torch.uint8, device=_torch(self._setup.device))
        target = torch.empty_like(source)
        return 2 * self._setup.copied / self._seconds(lambda i: target.copy_(source))

    def arithmetic(self, many: list[Product], length: int) -> float:
        """Operations a second of all the products together, with `length` tokens."""
        seconds = sum(self._product(length, of.inner, of.columns) for of in many)
        return sum(2 * length * of.inner * of.columns for of in many) / seconds

    def _product(self, rows: int, inner: int, columns: int) -> float:
        if (rows, inner, columns) not in self._products:
            import torch

            like: dict[str, Any] = {"dtype": torch.float16, "device": _torch(self._setup.device)}
            count = min(REPEATS, 1 + FRESH // (2 * inner * columns))
            weights = [torch.randn(inner, columns, **like) for _ in range(count)]
            x = torch.randn(rows, inner, **like)
            seconds = self._seconds(lambda i: x @ weights[i % count])
            self._products[rows, inner, columns] = seconds
        return self._products[rows, inner, columns]

    def _seconds(self, call: Callable[[int], object]) -> float:
        """A call's, where `REPEATS` follow each other; the median of a few times."""
        import torch

        device = torch.device(_torch(self._setup.device))
        wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        seconds = []
        for _ in range(6):
            wait()
            begin = time.perf_counter()
            for i in range(REPEATS):
                call(i)
            wait()
            seconds.append((time.perf_counter() - begin) / REPEATS)
        return sorted(seconds[1:])[2]  # without the first, which is slower


def _torch(device: str) -> str:
    """What torch calls a device."""
    return device.replace("tensorrt-rtx", "cuda").replace("tensorrt", "cuda")


def _release(device: str) -> None:
    """Give back what arrays took on the device: the pools of CuPy and torch keep it."""
    gc.collect()
    if _torch(device) != "cpu":
        import cupy
        import torch

        cupy.get_default_memory_pool().free_all_blocks()
        torch.cuda.empty_cache()


def timed(calls: Calls, setup: Setup, before: Calls | None = None) -> dict[str, Timing]:
    """`harness.interleaved`, of as many rounds as a part may take, from 2 to all that are set."""
    for _ in range(2):  # the second time is without what a first call does
        begin = time.perf_counter()
        for name, call in calls.items():
            if before and name in before:
                before[name]()
            call()
        once = time.perf_counter() - begin
    rounds = max(2, min(setup.rounds, int(setup.seconds / once)))
    return harness.interleaved(calls, rounds, before=before, warm=True)


def crops(setup: Setup) -> Iterator[Part]:
    """The crop of a picture of 12 megapixels in host memory, beside its upload alone."""
    for memory in ("pageable", "pinned"):
        yield f"from {memory} memory", partial(_crop, memory, setup)


def _crop(memory: str, setup: Setup) -> Figures:
    if (why := cuda.unavailable()) is not None:
        return {"absent": why}
    import cupy
    import cupyx

    picture = crop.photograph()
    if memory == "pinned":
        pinned = cupyx.empty_pinned(picture.shape, picture.dtype)
        pinned[...] = picture
        picture = pinned
    height, width, _ = picture.shape
    there = cupy.empty(picture.shape, picture.dtype)
    out = cuda.DeviceArray((3, crop.SIZE, crop.SIZE), np.float16)
    stream = cupy.cuda.get_current_stream()

    def upload() -> None:
        there.set(picture)
        stream.synchronize()

    def whole() -> None:
        cuda.crop_resize(
            picture, (0, 0, width, height), crop.SIZE, fit=crop.PAD, mean=crop.MEAN, std=crop.STD, out=out
        )

    timings = timed({"upload": upload, "upload and crop": whole}, setup)
    ratio = timings["upload and crop"].median / timings["upload"].median
    return {name: dataclasses.asdict(timing) for name, timing in timings.items()} | {
        "upload and crop / upload": harness.wanted(ratio, at_most=CROP)
    }
