"""Beside what was measured, what this machine allows: memory bandwidth for decode steps, else arithmetic.

``dualfocus bench limits``. The machine's two rates are measured here, with the threads the engines have: how
fast memory is read (`kernels.stream_sum` over a buffer much larger than the last cache), and how fast ONNX
Runtime multiplies large float32 matrices; the best of several tries before and after, as they are limits.

What the model has to do is counted, not estimated: the graphs run once under ONNX Runtime's profiler, which
tells the shapes of what each node was given and made, and the size of its weights as they are stored.

- A decode step has to read the weights, and of every row the keys and values of its past.
- Prefill and vision have to do 2 operations for every multiply-add of their matrix products and convolutions,
  and of attention, causal where the model is.

A limit is what has to be done over the rate; measured figures reach a share of it, which can be above 100 %:
where all that a step reads stays in the last cache, memory is no limit; and where weights are of fewer bits,
some of the arithmetic may be faster than float32's, whose rate is the one known.

Also here: Python's share of a decode step, what `OnnxDecoder.extend` takes beyond ONNX Runtime's own call.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from dualfocus.bench import harness
from dualfocus.bench.harness import Watch
from dualfocus.kernels import stream_sum
from dualfocus.runtime import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats, HostDecoder
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.manifest import DecoderSpec
from dualfocus.runtime.onnx import OnnxDecoder
from dualfocus.runtime.sequence import embed

if TYPE_CHECKING:
    from rich.console import Console

PREFILL, PAST = 640, 650  # tokens prefilled, and before the decoded one; less where the context is short
STREAM = 1 << 28  # bytes read, at least, and
CACHES = 4  # times the last cache's size
PRODUCT_SIZES = ((2048, 2048, 2048), (1024, 768, 3072))  # rows, inner size, columns: the faster one counts
TRIES = 7  # of which the best is the machine's rate

WANTED = {"int8": 60, "int4": 50}  # percent of the bandwidth limit, in a decode step of one row

PRODUCTS = (
    "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits", "MatMulBnb4", "MatMulInteger",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "QLinearMatMul",
)  # fmt: skip
CONVOLUTIONS = ("Conv", "FusedConv", "ConvInteger", "QLinearConv", "NhwcFusedConv")
ATTENTION = ("MultiHeadAttention", "Attention")
TABLES = ("Gather", "GroupQueryAttention", "GatherBlockQuantized")  # of their constants, a step reads few


@dataclass(frozen=True)
class Node:
    """What the profiler tells of a node that ran: shapes, and bytes of constants it was given."""

    kind: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    constants: int

    @property
    def multiply_adds(self) -> int:
        """Of matrix products, convolutions, and attention among all tokens; 0 of anything else."""
        if self.kind in PRODUCTS:
            return math.prod(self.outputs[0]) * self.inputs[0][-1]
        if self.kind in CONVOLUTIONS:
            return math.prod(self.outputs[0]) * math.prod(self.inputs[1][1:])
        if self.kind in ATTENTION:
            batch, queries, width = self.outputs[0]
            keys = self.inputs[1][-2]  # (B, L, D) or (B, heads, L, D / heads)
            return 2 * batch * queries * keys * width
        return 0


@dataclass(frozen=True)
class Work:
    """What a call has to do."""

    multiply_adds: int
    weights: int  # bytes

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> Work:
        """Of a call that ran `nodes`."""
        return cls(
            sum(node.multiply_adds for node in nodes),
            sum(node.constants for node in nodes if node.kind not in TABLES),
        )


def bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read from memory."""
    count = max(STREAM, CACHES * last_cache()) // (8 * threads) * threads
    parts = np.split(np.ones(count, np.uint64), threads)
    rates: list[float] = []
    for _ in range(TRIES):
        gate = threading.Barrier(threads)
        spans: list[tuple[float, float]] = []
        workers = [threading.Thread(target=_read, args=(part, gate, spans)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
        rates.append(8 * count / seconds)
    return max(rates)


def _read(part: npt.NDArray[np.uint64], gate: threading.Barrier, spans: list[tuple[float, float]]) -> None:
    gate.wait()
    begin = time.perf_counter()
    stream_sum(part)
    spans.append((begin, time.perf_counter()))


def last_cache() -> int:
    """Bytes of the processor's last-level cache; 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes)


def arithmetic(threads: int | None) -> float:
    """Float32 operations a second: large products in ONNX Runtime, one side constant, as weights are."""
    return max(_product(threads, *sizes) for sizes in PRODUCT_SIZES)


def _product(threads: int | None, rows: int, inner: int, columns: int) -> float:
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [value("a", shape=[rows, inner])],
        [value("c", shape=[rows, columns])],
        [numpy_helper.from_array(np.ones((inner, columns), np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    a = np.ones((rows, inner), np.float32)
    seconds = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        session.run(None, {"a": a})
        seconds.append(time.perf_counter() - begin)
    return float(2 * rows * inner * columns) / min(seconds)


def count(path: Path, call: Callable[[Any], object]) -> Work:
    """What the graph at `path` does as `call` runs a session on it once."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        options.log_severity_level = 3
        # packed weights are nobody's inputs any more, and would not be told
        options.add_session_config_entry("session.disable_prepacking", "1")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        call(session)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return Work.of(list(_nodes(events)))


def _nodes(events: Sequence[Mapping[str, Any]]) -> Iterator[Node]:
    for event in events:
        if event.get("cat") == "Node" and "input_type_shape" in event.get("args", {}):
            told = event["args"]
            inputs, outputs = (
                tuple(tuple(shape) for of in told[side] for shape in of.values())
                for side in ("input_type_shape", "output_type_shape")
            )
            yield Node(told["op_name"], inputs, outputs, int(told.get("parameter_size", 0)))


def causal(spec: DecoderSpec, past: int, new: int) -> int:
    """Multiply-adds of all layers' attention: `new` tokens, each to all before it and itself."""
    pairs = new * past + new * (new + 1) // 2
    return 2 * spec.layers * spec.heads * spec.head_size * pairs


def run(
    bundle: Bundle,
    rounds: int,
    threads: int | None,
    watch: Watch = lambda *_: None,
    *,
    spin: bool = True,
) -> dict[str, Any]:
    """All that is measured, as the JSON object has it; `threads` and `spin` are the opened bundle's."""
    before = _machine(threads, watch)
    engines = Engines(bundle)
    watch("counting", 2, 3)
    work = {name: count(engines.path(name), partial(engines.once, name)) for name in engines.calls}
    step = work["decode, one row"]
    timings = harness.interleaved(engines.calls, rounds, before=engines.before, watch=watch)
    after = _machine(threads, watch)
    machine = {name: max(rate, after[name]) for name, rate in before.items()}
    rows = {
        name: dataclasses.asdict(timing) | engines.limit(name, work[name], machine, timing.median)
        for name, timing in timings.items()
    }
    return harness.header("limits", threads, spin=spin, manifest=bundle.manifest) | {
        "rounds": rounds,
        "unit": "ms",
        "rates": machine,
        "last_cache": last_cache(),
        "bits_a_weight": 8 * step.weights / step.multiply_adds,
        "rows": rows,
        "python_percent": harness.wanted(100 * engines.python_share(rounds), at_most=2),
    }


def _machine(threads: int | None, watch: Watch) -> dict[str, float]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    watch("reading memory", 0, 3)
    rates = {"bandwidth, one thread": bandwidth(1), "bandwidth": bandwidth(threads or cores)}
    watch("multiplying", 1, 3)
    return {**rates, "arithmetic": arithmetic(threads)}


class Engines:
    """The calls that are measured, by row."""

    def __init__(self, bundle: Bundle) -> None:
        if not isinstance(bundle.decoder, OnnxDecoder):
            raise InputError(
                f"bench limits is for the CPU, {bundle.manifest.name} has target {bundle.manifest.target}: "
                "python -m dualfocus.bench.gpu times a GPU against its limits"
            )
        self._bundle = bundle
        self._decoder = bundle.decoder
        spec, image = bundle.manifest.decoder, bundle.manifest.image
        self.past = min(PAST, spec.context - 1)
        self.prefill = min(PREFILL, spec.context)
        random = np.random.default_rng(0)
        tokens = random.integers(0, spec.vocabulary, max(self.past, self.prefill))
        self._embeddings: Floats = embed(tokens.tolist(), bundle.embeddings, {})
        self._pixels = random.standard_normal((2, 3, image.size, image.size)).astype(np.float32)
        self._cache = KVCache(spec, rows=2, capacity=spec.context)
        for row in (0, 1):
            bundle.decoder.extend(self._cache, [row], [self._embeddings[: self.past]], [[0]])
        self._empty = KVCache(spec, rows=1, capacity=spec.context)
        self.calls: dict[str, Callable[[], object]] = {
            "vision, one image": lambda: bundle.vision.encode(self._pixels[:1]),
            "vision, two images": lambda: bundle.vision.encode(self._pixels),
            f"prefill, {self.prefill} tokens": lambda: self._fill(bundle.decoder),
            "decode, one row": lambda: self._step(bundle.decoder, [0]),
            "decode, two rows": lambda: self._step(bundle.decoder, [0, 1]),
        }
        self.before: dict[str, Callable[[], object]] = dict.fromkeys(self.calls, self._forget)

    def path(self, name: str) -> Path:
        """The graph that a row's call runs."""
        return self._bundle.path / ("vision.onnx" if name.startswith("vision") else "decoder.onnx")

    def once(self, name: str, session: Any) -> None:
        """A row's call, run by another session on its graph."""
        if name.startswith("vision"):
            images = 2 if name == "vision, two images" else 1
            session.run(["image_features"], {"pixel_values": self._pixels[:images]})
            return
        self._forget()
        decoder = _running(self._decoder, session)
        if name.startswith("prefill"):
            self._fill(decoder)
        else:
            self._step(decoder, [0, 1] if name == "decode, two rows" else [0])

    def limit(self, name: str, work: Work, machine: Mapping[str, float], ms: float) -> dict[str, Any]:
        """What a row's call has to do, and how near to the limit of that it comes."""
        spec = self._bundle.manifest.decoder
        if name.startswith("decode"):
            rows = 2 if name == "decode, two rows" else 1
            moved = work.weights + rows * (self.past + 1) * self._cache.token_nbytes
            limit = 1e3 * moved / machine["bandwidth"]
            least = None if rows > 1 else WANTED.get(self._bundle.manifest.precision)
            return {
                "bound": "bandwidth",
                "bytes": moved,
                "limit": limit,
                "percent_of_limit": harness.wanted(100 * limit / ms, at_least=least),
                "tokens_per_second": 1e3 * rows / ms,
            }
        operations = 2 * work.multiply_adds
        if name.startswith("prefill"):
            operations += 2 * causal(spec, 0, self.prefill)
        limit = 1e3 * operations / machine["arithmetic"]
        per = {"tokens_per_second": 1e3 * self.prefill / ms} if name.startswith("prefill") else {}
        return {
            "bound": "arithmetic",
            "operations": operations,
            "limit": limit,
            "percent_of_limit": harness.wanted(100 * limit / ms),
            **per,
        }

    def python_share(self, rounds: int) -> float:
        """Of a decode step of one row: what is not ONNX Runtime's call. The median of steps."""
        watched = _WatchedSession(self._decoder._session)
        decoder = _running(self._decoder, watched)
        shares = []
        for _ in range(1 + max(rounds, 10)):
            self._forget()
            watched.seconds = 0.0
            begin = time.perf_counter()
            self._step(decoder, [0])
            shares.append(1 - watched.seconds / (time.perf_counter() - begin))
        return statistics.median(shares[1:])  # without the first, which binds the cache

    def _forget(self) -> None:
        for row in (0, 1):
            self._cache.truncate(row, self.past)
        self._empty.truncate(0, 0)

    def _fill(self, decoder: HostDecoder) -> None:
        decoder.extend(self._empty, [0], [self._embeddings[: self.prefill]], [[self.prefill - 1]])

    def _step(self, decoder: HostDecoder, rows: Sequence[int]) -> None:
        decoder.extend(self._cache, rows, [self._embeddings[:1]] * len(rows), [[0]] * len(rows))


def _running(decoder: OnnxDecoder, session: Any) -> OnnxDecoder:
    """The decoder, run by another session."""
    other = copy.copy(decoder)
    other._session = session
    other._calls = WeakKeyDictionary()  # they are a session's
    return other


class _WatchedSession:
    """A session that adds up the `seconds` of its runs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.io_binding = session.io_binding
        self.seconds = 0.0

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        begin = time.perf_counter()
        self._session.run_with_iobinding(binding, options)
        self.seconds += time.perf_counter() - begin


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as a table for people."""
    from rich.table import Table

    harness.show_machine(result["machine"], console)
    for fact in facts(result):
        console.print(fact, markup=False)
    table = Table(box=None, pad_edge=False)
    for column in ("", "ms", "quartiles", "tokens/s", "has to do", "limit, ms", "of the limit", ""):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        table.add_row(name, *_cells(row), harness.verdict(row["percent_of_limit"]))
    console.print(table)
    python = result["python_percent"]
    console.print(f"Python's share of a decode step: {python['value']:.1f} % ({harness.verdict(python)})")
    console.print("shares are wanted of the shape `edge`", style="dim")
    for footnote in footnotes(result):
        console.print(footnote, style="dim")


def footnotes(result: Mapping[str, Any]) -> list[str]:
    """Why a share of a limit can be above 100 percent here."""
    found = []
    if result["precision"] in WANTED:
        found.append(
            "Arithmetic on weights of fewer bits may be faster than float32's, by which prefill and vision "
            "are limited here."
        )
    if any(row.get("bytes", math.inf) < result["last_cache"] for row in result["rows"].values()):
        found.append(
            f"What a step reads fits in the last cache of {result['last_cache'] / 1e6:.0f} MB: memory is no "
            "limit."
        )
    return found


def facts(result: Mapping[str, Any]) -> list[str]:
    """The machine's rates, and the model's weights, in words."""
    rates = result["rates"]
    read, alone = rates["bandwidth"] / 1e9, rates["bandwidth, one thread"] / 1e9
    return [
        f"memory is read at {read:.1f} GB/s ({alone:.1f} by one thread), float32 matrices are multiplied at "
        f"{rates['arithmetic'] / 1e9:.0f} GFLOP/s",
        f"{result['bundle']}, {result['precision']}: {result['bits_a_weight']:.1f} bits a weight; "
        f"{result['rounds']} rounds",
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    todo = f"{row['bytes'] / 1e6:.1f} MB" if "bytes" in row else f"{row['operations'] / 1e9:.1f} GFLOP"
    return [
        f"{row['median']:.2f}",
        f"{row['low']:.2f} - {row['high']:.2f}",
        f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else "",
        todo,
        f"{row['limit']:.2f}",
        f"{row['percent_of_limit']['value']:.0f} % of {row['bound']}",
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The result as README's table."""
    lines = [
        *facts(result),
        "",
        "| | ms | tokens/s | has to do | limit, ms | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        median, _, *cells = _cells(row)
        lines.append(f"| {name} | {' | '.join([median, *cells])} |")
    python = result["python_percent"]["value"]
    lines += ["", " ".join([f"Python's share of a decode step: {python:.1f} %.", *footnotes(result)])]
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A bar for each row against its limit, as a picture at `path`."""
    from matplotlib import pyplot

    rows = result["rows"]
    figure, axis = pyplot.subplots(figsize=(8, 3.5))
    shares = [row["percent_of_limit"]["value"] for row in rows.values()]
    colours = ["#ee6677" if row["bound"] == "bandwidth" else "#4477aa" for row in rows.values()]
    bars = axis.barh(list(rows), shares, color=colours)
    axis.bar_label(
        bars, [f" {row['median']:.1f} ms, at best {row['limit']:.1f}" for row in rows.values()], fontsize=8
    )
    axis.axvline(100, color="#222222", linestyle="--")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(100, *shares))
    axis.set_xlabel("percent of the limit: blue, float32 arithmetic; red, memory bandwidth")
    axis.set_title(f"{result['bundle']}, {result['precision']}, {result['machine']['processor']}")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
