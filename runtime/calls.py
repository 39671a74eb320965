"""Maps one cache append to decoder-graph calls: groups rows and fills the graph's inputs.

`onnx` and `tensorrt` add how memory is bound and how a graph runs. The cache's memory is bound both as past
and as present, so that a call writes new keys and values in place and copies nothing. On a GPU, a graph's
inputs are written on the host and copied to the device. Logits stay there; of each position only the best
token, its logit and the log-sum-exp are copied back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.devices import Device
from dualfocus.runtime.engines import Array, DeviceLogits, TokenIds, to_host
from dualfocus.runtime.manifest import DecoderSpec

Input = TypeVar("Input", bound=Sized)  # the new tokens of a row, as the graph takes them
Output = TypeVar("Output")  # the logits of a row

# Idle positions between two rows that a call may compute. For more, a second call costs less.
IDLE_TOKENS = 8


def group_rows(
    rows: Sequence[int],
    counts: Sequence[int],
    lengths: Sequence[int],
    *,
    capacity: int,
    max_rows: int | None,
    ragged_append: bool,
) -> list[list[int]]:
    """Group an append of `counts[i]` tokens to each `rows[i]` into as few graph calls as possible.

    A call covers all rows from its first to its last, idle ones included, and pads each to the most tokens
    that one of them appends. `lengths` are those of all rows of the cache; a call covers `max_rows` of them
    at most. Without `ragged_append`, rows share a call only if each appends one token.

    Returns the groups as indices into `rows`, in the order of the rows.
    """
    groups: list[list[int]] = []
    longest = idle = fullest = 0  # of the last group: tokens padded to, idle rows between two, tokens held
    for i in sorted(range(len(rows)), key=rows.__getitem__):
        row, count = rows[i], counts[i]
        if groups:
            group = groups[-1]
            first, last = rows[group[0]], rows[group[-1]]
            joined_longest = max(longest, count)
            joined_idle = max(idle, row - last - 1)
            joined_fullest = max(fullest, *lengths[last + 1 : row + 1])
            if (
                (max_rows is None or row - first < max_rows)
                and (joined_longest == 1 or ragged_append)
                and joined_idle * joined_longest <= IDLE_TOKENS
                and joined_fullest + joined_longest <= capacity  # padding needs room, in idle rows too
            ):
                group.append(i)
                longest, idle, fullest = joined_longest, joined_idle, joined_fullest
                continue
        groups.append([i])
        longest, idle, fullest = count, 0, lengths[row]
    return groups


@dataclass
class Append(Generic[Input]):
    """The part of an append that one call of the graph makes.

    The call covers the rows from `first` to `stop`; those that are not in `rows` are idle.
    """

    rows: Sequence[int]  # of the cache, ascending
    chunks: Sequence[Input]  # the new tokens of each
    logits_at: Sequence[Sequence[int]]  # of each, the positions in its chunk whose logits are requested
    positions: int  # whose logits the graph computes for every row: the most that a row requests

    first: int = field(init=False)
    stop: int = field(init=False)
    places: list[int] = field(init=False)  # of `rows` in the call's batch
    longest: int = field(init=False)  # new tokens that every row is padded to
    is_step: bool = field(init=False)  # one token a row, and its logits: recurs while replies are decoded

    def __post_init__(self) -> None:
        self.first, self.stop = self.rows[0], self.rows[-1] + 1
        self.places = [row - self.first for row in self.rows]
        self.longest = max(map(len, self.chunks))
        self.is_step = self.longest == self.positions == 1


@dataclass(eq=False)
class Call:
    """The memory of a call: its `inputs` by name, on the host, bound together with rows of the cache.

    On a device, the graph reads `copies` of them. Those of a step and its `outputs` stay in place.
    """

    binding: Any  # the library's
    is_step: bool
    inputs: dict[str, npt.NDArray[Any]]
    copies: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)
    times: int = 0  # that a step was run
    captured: int | None = None  # the CUDA graph that is replayed in its place


@dataclass
class _Bound:
    """What stays bound to rows of a cache, by the first row and the one after the last."""

    steps: dict[tuple[int, int], Call] = field(default_factory=dict)
    # Of other calls the binding alone is kept: their inputs differ in shape, and may be large.
    bindings: dict[tuple[int, int], Any] = field(default_factory=dict)


class GraphDecoder(ABC, Generic[Input, Output]):
    """`engines.DecoderOf` over a graph of `DecoderSpec`'s contract."""

    _min_positions = 0  # whose logits a call computes for every row

    def __init__(self, spec: DecoderSpec, max_rows: int | None = None) -> None:
        """A call covers `max_rows` rows at most; None: any number."""
        self._spec, self._max_rows = spec, max_rows
        self._calls: WeakKeyDictionary[KVCache, _Bound] = WeakKeyDictionary()
        self._lock = Lock()  # engines on several threads may share an opened bundle

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Input],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Output]:
        """As `engines.DecoderOf.extend`."""
        assert len(set(rows)) == len(rows), f"a row twice in one append: {rows}"
        groups = group_rows(
            rows,
            list(map(len, embeddings)),
            cache.lengths,
            capacity=cache.capacity,
            max_rows=self._max_rows,
            ragged_append=self._spec.ragged_append,
        )
        results: dict[int, Output] = {}
        for group in groups:
            requested = [logits_at[i] for i in group]
            append = Append(
                [rows[i] for i in group],
                [embeddings[i] for i in group],
                requested,
                max(self._min_positions, *map(len, requested)),
            )
            with self._lock:
                results |= zip(group, self._run(cache, append), strict=True)
        return [results[i] for i in range(len(rows))]

    def _run(self, cache: KVCache, append: Append[Input]) -> list[Output]:
        """Call the graph once."""
        call = self._call(cache, append)
        self._write_tokens(call, append)
        if not append.is_step:  # a step's positions never change
            self._write_positions(call, append)
        self._write_lengths(call, append, cache)
        results = self._compute(call, append)
        for row, chunk in zip(append.rows, append.chunks, strict=True):
            cache.lengths[row] += len(chunk)
        return results

    def _call(self, cache: KVCache, append: Append[Input]) -> Call:
        """Memory for a call: that of an earlier step over the same rows, or new inputs.

        The rows of the cache are bound once for all calls over them, because their memory stays in place.
        """
        bound = self._calls.setdefault(cache, _Bound())
        rows = append.first, append.stop
        if append.is_step:
            if rows not in bound.steps:
                bound.steps[rows] = self._new_call(self._bind_rows(cache, *rows), append)
            return bound.steps[rows]
        if rows not in bound.bindings:
            bound.bindings[rows] = self._bind_rows(cache, *rows)
        return self._new_call(bound.bindings[rows], append)

    def _bind_rows(self, cache: KVCache, first: int, stop: int) -> Any:
        """A new binding, of rows of `cache` as past and as present."""
        binding = self._new_binding()
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            for kind, of_layer in (("key", keys), ("value", values)):
                self._bind(binding, f"past_key_values.{layer}.{kind}", of_layer[first:stop])
                self._bind(binding, f"present.{layer}.{kind}", of_layer[first:stop], is_output=True)
        return binding

    def _new_call(self, binding: Any, append: Append[Input]) -> Call:
        """New inputs, bound to `binding`."""
        batch = append.stop - append.first
        inputs = self._new_tokens(batch, append.longest) | {
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logits_at": self._first_positions(batch, append.longest, append.positions),
        }
        if self._spec.ragged_append:
            inputs["query_seqlens"] = np.zeros(batch, np.int32)
        call = Call(binding, append.is_step, inputs)
        self._bind_inputs(call)
        return call

    def _write_positions(self, call: Call, append: Append[Input]) -> None:
        """Write the positions whose logits are requested into a new call's inputs."""
        for place, positions in zip(append.places, append.logits_at, strict=True):
            call.inputs["logits_at"][place, : len(positions)] += np.array(positions, np.int64)

    def _write_lengths(self, call: Call, append: Append[Input], cache: KVCache) -> None:
        """Write how many tokens each row holds after the call, and how many of them are new.

        An idle row passes as empty, and nothing is written to it. Without ragged appends every row appends a
        token; an idle row's goes after its end, where nothing is ever read.
        """
        # lists, not arrays: the last run's weights evicted NumPy's code from the processor's caches
        ragged, covered = self._spec.ragged_append, cache.lengths[append.first : append.stop]
        counts = [0] * len(covered)
        lengths = [0] * len(covered) if ragged else [length + 1 for length in covered]
        for place, chunk in zip(append.places, append.chunks, strict=True):
            assert len(chunk), "nothing to append"
            counts[place] = len(chunk)
            lengths[place] = covered[place] + len(chunk)
        fullest = max(lengths)
        assert fullest <= cache.capacity, f"{fullest} tokens in a row of {cache.capacity}"
        call.inputs["seqlens_k"][:] = [max(length - 1, 0) for length in lengths]
        call.inputs["total_sequence_length"][...] = self._total(call, fullest, cache.capacity)
        if ragged:
            call.inputs["query_seqlens"][:] = counts

    def _total(self, call: Call, fullest: int, capacity: int) -> int:
        """The fullest row's length as the graph is given it; more is right too, up to `capacity`."""
        return fullest

    @abstractmethod
    def _new_binding(self) -> Any:
        """The library's object that memory is bound to."""

    @abstractmethod
    def _bind(self, binding: Any, name: str, array: Array, *, is_output: bool = False) -> None:
        """Bind memory by its address: `array` has to live until the run is over."""

    @abstractmethod
    def _new_tokens(self, batch: int, longest: int) -> dict[str, npt.NDArray[Any]]:
        """The input for the new tokens, by its name."""

    def _first_positions(self, batch: int, longest: int, positions: int) -> npt.NDArray[np.int64]:
        """(B, K) each row's first position, as `DecoderSpec` counts them: requested ones are added to it."""
        return np.zeros((batch, positions), np.int64)

    @abstractmethod
    def _bind_inputs(self, call: Call) -> None: ...

    @abstractmethod
    def _write_tokens(self, call: Call, append: Append[Input]) -> None:
        """Write each chunk to its place in the call's batch."""

    @abstractmethod
    def _compute(self, call: Call, append: Append[Input]) -> list[Output]:
        """Run the graph and return each row's logits, as many as it requests."""


class DeviceGraphDecoder(GraphDecoder[TokenIds, list[DeviceLogits]]):
    """`engines.DeviceDecoder` over a graph that looks up embeddings and chooses tokens on its device."""

    # Memory of no bytes has no address, and no profile of an engine can be without a position.
    _min_positions = 1

    def __init__(self, spec: DecoderSpec, device: Device, max_rows: int | None = None) -> None:
        super().__init__(spec, max_rows)
        self._memory = device.memory
        self._no_images = self._memory.zeros((1, spec.hidden), np.float16)

    @abstractmethod
    def _execute(self, call: Call) -> None:
        """Run the graph on what is bound; work on the default stream waits for it."""

    def _new_tokens(self, batch: int, longest: int) -> dict[str, npt.NDArray[Any]]:
        return {"tokens": np.zeros((batch, longest), np.int64)}

    def _first_positions(self, batch: int, longest: int, positions: int) -> npt.NDArray[np.int64]:
        return np.repeat(longest * np.arange(batch)[:, None], positions, axis=1)

    def _bind_inputs(self, call: Call) -> None:
        for name, array in call.inputs.items():
            if name == "total_sequence_length":  # is read on the host
                self._bind(call.binding, name, array)
            else:
                call.copies[name] = self._memory.empty(array.shape, array.dtype)
                self._bind(call.binding, name, call.copies[name])
        batch, positions = call.inputs["logits_at"].shape
        call.outputs |= {
            "logits": self._memory.empty((batch, positions, self._spec.vocabulary), np.float32),
            "best": self._memory.empty((batch, positions), np.int64),
            "peak": self._memory.empty((batch, positions), np.float32),
            "logsumexp": self._memory.empty((batch, positions), np.float32),
        }
        for name, array in call.outputs.items():
            self._bind(call.binding, name, array, is_output=True)

    def _write_tokens(self, call: Call, append: Append[TokenIds]) -> None:
        """All rows share one array of images, so a row's image ids follow those of the rows before it."""
        images: list[Array] = []
        shown = 0
        for place, chunk in zip(append.places, append.chunks, strict=True):
            ids = np.where(chunk.ids < self._spec.vocabulary, chunk.ids, chunk.ids + shown)
            call.inputs["tokens"][place, : len(chunk)] = ids
            images += chunk.images
            shown += sum(map(len, chunk.images))
        if len(images) > 1:
            images = [self._memory.concatenate(images)]
        call.copies["images"] = images[0] if images else self._no_images
        self._bind(call.binding, "images", call.copies["images"])

    def _compute(self, call: Call, append: Append[TokenIds]) -> list[list[DeviceLogits]]:
        for name, array in call.inputs.items():
            if name in call.copies:
                _copy_to(call.copies[name], array)
        self._execute(call)
        best, peak, logsumexp = (to_host(call.outputs[of]) for of in ("best", "peak", "logsumexp"))
        logits = call.outputs["logits"].copy() if call.is_step else call.outputs["logits"]
        return [
            [
                DeviceLogits(logits[at], int(best[at]), float(peak[at]), float(logsumexp[at]))
                for at in ((place, i) for i in range(len(requested)))
            ]
            for place, requested in zip(append.places, append.logits_at, strict=True)
        ]


def _copy_to(target: Array, array: npt.NDArray[Any]) -> None:
    """Copy an input from the host to where the graph reads it."""
    if hasattr(target, "set"):
        target.set(array)
    else:
        target[...] = array
