"""An append to a cache as calls of a decoder's graph: which rows go together, and what the graph is told.

`onnx` and `tensorrt` add how memory is bound and how a graph is run. The same memory is bound as past and as
present, so a call writes the new tokens' keys and values straight into the cache and copies nothing. A GPU is
another place for the same arrays (`devices`): what a graph is told is written on the host and copied, and of
what it says the likeliest tokens and the logarithms of their probabilities' sums come back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
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

IDLE_TOKENS = 8  # a call may compute so many idle positions; for more, another call costs less


@dataclass(eq=False)
class Call:
    """A call of the decoder's graph: its `inputs` by name, on the host, and the cache are bound.

    On a device, the graph reads copies of them; a step's copies and outputs stay in place.
    """

    binding: Any  # the library's
    is_step: bool  # one token a row, and one position whose logits are given
    inputs: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    copies: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)
    times: int = 0  # how often it was made
    captured: int | None = None  # the CUDA graph that is replayed in its place


class GraphDecoder(ABC, Generic[Input, Output]):
    """`engines.DecoderOf` over a graph of `DecoderSpec`'s contract."""

    def __init__(self, spec: DecoderSpec, rows: int | None = None) -> None:
        """A call takes `rows` rows at most; None: any number."""
        self._spec, self._rows = spec, rows
        self._calls: WeakKeyDictionary[KVCache, dict[tuple[int, int, bool], Call]] = WeakKeyDictionary()

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Input],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Output]:
        """As `engines.DecoderOf.extend`."""
        assert len(set(rows)) == len(rows), f"a row twice in one call: {rows}"
        longest = max(map(len, embeddings))
        calls: list[list[int]] = []  # of indices into `rows`
        for i in sorted(range(len(rows)), key=rows.__getitem__):
            if calls and self._joins(cache, rows[calls[-1][0]], rows[calls[-1][-1]], rows[i], longest):
                calls[-1].append(i)
            else:
                calls.append([i])
        results: dict[int, Output] = {}
        for call in calls:
            new, wanted = [embeddings[i] for i in call], [logits_at[i] for i in call]
            results |= zip(call, self._run(cache, [rows[i] for i in call], new, wanted), strict=True)
        return [results[i] for i in range(len(rows))]

    def _joins(self, cache: KVCache, first: int, last: int, row: int, longest: int) -> bool:
        """Whether `row` goes into a call of the rows `first` to `last`, all padded to `longest`."""
        idle = row - last - 1
        if self._rows is not None and row - first >= self._rows:
            return False
        if longest > 1 and not self._spec.ragged_append:
            return False
        room = cache.capacity - longest  # which the padding takes too, of idle rows as well
        return idle * longest <= IDLE_TOKENS and max(cache.lengths[last : row + 1]) <= room

    def _run(
        self, cache: KVCache, rows: Sequence[int], new: Sequence[Input], logits_at: Sequence[Sequence[int]]
    ) -> list[Output]:
        """One call of the graph, over all rows from the first to the last.

        Those not asked for are idle. Given no tokens, they pass as empty, and nothing is written to them;
        without ragged appends they make a step too, behind their ends, where nothing is ever read.
        """
        first, stop = min(rows), max(rows) + 1
        batch, longest, wanted = stop - first, max(map(len, new)), max(map(len, logits_at))
        call = self._call(cache, first, stop, longest, wanted)
        at = [row - first for row in rows]
        self._write_tokens(call, at, new)
        # lists, not arrays: while the graph ran, its weights drove NumPy's code out of the processor's caches
        counts, lengths = [0] * batch, [0] * batch
        if not self._spec.ragged_append:
            lengths = [cache.lengths[row] + 1 for row in range(first, stop)]
        for i, row, chunk, positions in zip(at, rows, new, logits_at, strict=True):
            assert len(chunk), "nothing to append"
            if longest > 1:  # a step's are as they were made
                call.inputs["logits_at"][i, : len(positions)] += np.array(positions, np.int64)
            counts[i] = len(chunk)
            lengths[i] = cache.lengths[row] + len(chunk)
        longest_row = max(lengths)
        assert longest_row <= cache.capacity, f"{longest_row} tokens in a row of {cache.capacity}"
        call.inputs["seqlens_k"][:] = [max(length - 1, 0) for length in lengths]
        call.inputs["total_sequence_length"][...] = self._total(call, longest_row, cache.capacity)
        if self._spec.ragged_append:
            call.inputs["query_seqlens"][:] = counts

        results = self._compute(call, at, [len(positions) for positions in logits_at])
        for row, chunk in zip(rows, new, strict=True):
            cache.lengths[row] += len(chunk)
        return results

    def _call(self, cache: KVCache, first: int, stop: int, longest: int, wanted: int) -> Call:
        """Memory for a call's inputs, bound beside rows of `cache`.

        The rows are bound as past and as present once for all calls: their memory stays in place. So are
        the inputs of a step, one token a row, which come again and again.
        """
        is_step = longest == wanted == 1
        kept = self._calls.setdefault(cache, {})
        if (call := kept.get((first, stop, is_step))) is None:
            binding = self._new_binding()
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                for kind, of_layer in (("key", keys), ("value", values)):
                    self._bind(binding, f"past_key_values.{layer}.{kind}", of_layer[first:stop])
                    self._bind(binding, f"present.{layer}.{kind}", of_layer[first:stop], is_output=True)
        elif is_step:
            return call
        else:
            binding = call.binding
        batch = stop - first
        call = Call(binding, is_step, self._new_tokens(batch, longest))
        call.inputs |= {
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logits_at": self._first_positions(batch, longest, wanted),
        }
        if self._spec.ragged_append:
            call.inputs["query_seqlens"] = np.zeros(batch, np.int32)
        self._bind_inputs(call)
        # of other calls the binding alone is kept: their memory is not to outlive them
        kept[first, stop, is_step] = call if is_step else Call(binding, is_step)
        return call

    def _total(self, call: Call, longest_row: int, capacity: int) -> int:
        """What the graph is told as the longest row's tokens; more than there are is right too."""
        return longest_row

    @abstractmethod
    def _new_binding(self) -> Any:
        """What memory is bound to."""

    @abstractmethod
    def _bind(self, binding: Any, name: str, array: Array, *, is_output: bool = False) -> None:
        """Bind memory by its address: `array` has to live until the run is over."""

    @abstractmethod
    def _new_tokens(self, batch: int, longest: int) -> dict[str, npt.NDArray[Any]]:
        """The input that the new tokens are written to."""

    def _first_positions(self, batch: int, longest: int, wanted: int) -> npt.NDArray[np.int64]:
        """(B, K), as `DecoderSpec` counts positions: a row's first one, so that those wanted can be added."""
        return np.zeros((batch, wanted), np.int64)

    @abstractmethod
    def _bind_inputs(self, call: Call) -> None: ...

    @abstractmethod
    def _write_tokens(self, call: Call, rows: Sequence[int], new: Sequence[Input]) -> None:
        """Write chunks to rows of a call."""

    @abstractmethod
    def _compute(self, call: Call, rows: Sequence[int], wanted: Sequence[int]) -> list[Output]:
        """Run the graph, and give out each row's logits, as many as are wanted."""


class DeviceGraphDecoder(GraphDecoder[TokenIds, list[DeviceLogits]]):
    """`engines.DeviceDecoder` over a graph that looks up embeddings and chooses on its device."""

    def __init__(self, spec: DecoderSpec, device: Device, rows: int | None = None) -> None:
        super().__init__(spec, rows)
        self._memory = device.memory
        self._no_images = self._memory.zeros((1, spec.hidden), np.float16)

    def _call(self, cache: KVCache, first: int, stop: int, longest: int, wanted: int) -> Call:
        # memory of no bytes has no address, and no profile of an engine can be without a position
        return super()._call(cache, first, stop, longest, max(wanted, 1))

    @abstractmethod
    def _execute(self, call: Call) -> None:
        """Run the graph on what is bound; work on the default stream waits for it."""

    def _new_tokens(self, batch: int, longest: int) -> dict[str, npt.NDArray[Any]]:
        return {"tokens": np.zeros((batch, longest), np.int64)}

    def _first_positions(self, batch: int, longest: int, wanted: int) -> npt.NDArray[np.int64]:
        return np.repeat(longest * np.arange(batch)[:, None], wanted, axis=1)

    def _bind_inputs(self, call: Call) -> None:
        for name, array in call.inputs.items():
            if name == "total_sequence_length":  # is read on the host
                self._bind(call.binding, name, array)
            else:
                call.copies[name] = self._memory.empty(array.shape, array.dtype)
                self._bind(call.binding, name, call.copies[name])
        batch, wanted = call.inputs["logits_at"].shape
        call.outputs |= {
            "logits": self._memory.empty((batch, wanted, self._spec.vocabulary), np.float32),
            "best": self._memory.empty((batch, wanted), np.int64),
            "peak": self._memory.empty((batch, wanted), np.float32),
            "logsumexp": self._memory.empty((batch, wanted), np.float32),
        }
        for name, array in call.outputs.items():
            self._bind(call.binding, name, array, is_output=True)

    def _write_tokens(self, call: Call, rows: Sequence[int], new: Sequence[TokenIds]) -> None:
        images: list[Array] = []
        shown = 0
        for row, chunk in zip(rows, new, strict=True):
            ids = np.where(chunk.ids < self._spec.vocabulary, chunk.ids, chunk.ids + shown)
            call.inputs["tokens"][row, : len(chunk)] = ids
            images += chunk.images
            shown += sum(map(len, chunk.images))
        if len(images) > 1:
            images = [self._memory.concatenate(images)]
        call.copies["images"] = images[0] if images else self._no_images
        self._bind(call.binding, "images", call.copies["images"])

    def _compute(self, call: Call, rows: Sequence[int], wanted: Sequence[int]) -> list[list[DeviceLogits]]:
        for name, array in call.inputs.items():
            if name in call.copies:
                _copy_to(call.copies[name], array)
        self._execute(call)
        best, peak, logsumexp = (to_host(call.outputs[of]) for of in ("best", "peak", "logsumexp"))
        logits = call.outputs["logits"].copy() if call.is_step else call.outputs["logits"]
        return [
            [
                DeviceLogits(logits[at], int(best[at]), float(peak[at]), float(logsumexp[at]))
                for at in ((row, i) for i in range(count))
            ]
            for row, count in zip(rows, wanted, strict=True)
        ]


def _copy_to(target: Array, array: npt.NDArray[Any]) -> None:
    """Copy what is on the host to where the graph reads it."""
    if hasattr(target, "set"):
        target.set(array)
    else:
        target[...] = array
