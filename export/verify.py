"""What is exported against torch, while it is: on pictures and text that no export saw before.

The reference is the checkpoint as transformers runs it, its tower whole and its decoder a layer at a time,
never this package's own modules. The graphs are driven the way the runtime will drive them: one buffer
bound as past and present, filled by prefill, append and decode, by one row and by two that differ in length.
What a layer's graph gives out goes into the next layer's, as in the decoder that they will make.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, PretrainedConfig
from transformers.modeling_utils import no_init_weights

from dualfocus.export.decoder import INPUTS
from dualfocus.export.errors import ExportError
from dualfocus.export.quantize import divergence
from dualfocus.runtime.embeddings import HostEmbeddings
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.manifest import DecoderSpec, Manifest
from dualfocus.runtime.turns import Turns

TOLERANCE = 1e-4  # of the reference's largest magnitude; of 1 where that is smaller
ROUNDED = 0.5  # of the norm of what a layer adds, where weights were rounded: beyond it, little of it is left

Basis = Floats | None

QUESTIONS = (
    "What is written on the red sign above the door?",
    "How many people are standing in front of the white building?",
)
APPEND, STEPS = 7, 3
BEHIND = 5  # tokens that row 1 has less than row 0, throughout


@dataclass(frozen=True)
class Difference:
    """How far one exported result lies from torch's."""

    what: str
    error: float
    allowed: float

    @classmethod
    def between(cls, what: str, got: Floats, expected: Floats) -> Difference:
        """Of two arrays of one shape that hold the same, but for the order of sums: by the largest error."""
        assert got.shape == expected.shape, (what, got.shape, expected.shape)
        # NaN compares false with everything: make it a difference that no tolerance allows
        error = float(np.nan_to_num(np.abs(got - expected), nan=np.inf).max())
        return cls(what, error, TOLERANCE * max(1.0, float(np.abs(expected).max())))

    @classmethod
    def rounded(cls, what: str, got: Floats, expected: Floats) -> Difference:
        """Of an array that rounded weights made: by the relative error."""
        assert got.shape == expected.shape, (what, got.shape, expected.shape)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        return cls(what, float(np.nan_to_num(error, nan=np.inf)), ROUNDED)

    def check(self) -> Difference:
        """Raise ExportError if it is too large."""
        if self.error > self.allowed:
            raise ExportError(
                f"{self.what}: the exported graph is {self.error:.2g} away from torch, "
                f"expected at most {self.allowed:.2g}"
            )
        return self

    def __str__(self) -> str:
        return f"{self.what:<42} |onnx - torch| {self.error:.1e}, allowed {self.allowed:.1e}  ok"


@dataclass(frozen=True)
class Call:
    """Append `counts` tokens to rows 0, 1, … that hold `starts`, right-padded to the longest."""

    what: str
    starts: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass
class Trial:
    """Two rows of states on their way through the decoder: (rows, T, hidden), embeddings at first."""

    exact: Floats  # torch's
    alone: Floats  # the graphs', row 0 by itself; where weights are rounded, from torch's before each layer
    both: Floats  # the graphs', both rows together; of row 1 the last BEHIND are not reached
    prompt: int  # how many positions prefill brings
    text: NDArray[np.bool_]  # (2, T) where a token stands, not an image

    @classmethod
    def begin(
        cls, manifest: Manifest, tokenizer: Tokenizer, table: Floats, features: Floats, seed: int
    ) -> Trial:
        """The macro turns of `QUESTIONS`, about pictures with `features`, and random text behind them."""
        try:
            turns = [Turns(manifest, tokenizer, question).macro("whole").tokens for question in QUESTIONS]
        except QuestionError:
            raise ExportError(
                f"a context of {manifest.decoder.context} tokens holds no image of {manifest.image.tokens} "
                "and a question"
            ) from None
        prompt = max(map(len, turns))
        length = prompt + APPEND + STEPS
        rng = np.random.default_rng(seed)
        rows = [[*tokens, *map(int, rng.integers(len(table), size=length - len(tokens)))] for tokens in turns]
        embeddings = HostEmbeddings(table)
        exact = np.stack(
            [embeddings.embed(row, {"whole": seen}) for row, seen in zip(rows, features, strict=True)]
        )
        text = np.array([[isinstance(token, int) for token in row] for row in rows])
        return cls(exact, exact[:1].copy(), exact.copy(), prompt, text)

    def calls(self, *, ragged_append: bool) -> tuple[list[Call], list[Call]]:
        """How the rows' tokens are appended: row 0 alone, and both."""
        prompt, end = int(self.prompt), self.exact.shape[1]
        alone = [
            Call(f"prefill of {prompt}", (0,), (prompt,)),
            Call(f"append of {APPEND}", (prompt,), (APPEND,)),
            *(Call(f"{STEPS} steps", (at,), (1,)) for at in range(prompt + APPEND, end)),
        ]
        at = (prompt, prompt - BEHIND)
        both = [Call(f"prefills of {at[0]} and {at[1]}", (0, 0), at)]
        if ragged_append:
            counts = (APPEND, APPEND - 3)
            both.append(Call(f"appends of {counts[0]} and {counts[1]}", at, counts))
            at = (at[0] + counts[0], at[1] + counts[1])
        both += [Call("one step of two rows", (at[0] + i, at[1] + i), (1, 1)) for i in range(STEPS)]
        return alone, both

    def through(
        self, path: Path, spec: DecoderSpec, exact: Floats, enters: Basis = None, leaves: Basis = None
    ) -> Trial:
        """The states behind the graph at `path`, of which torch's are given.

        What goes into the graph is multiplied with the orthogonal matrix `enters`, and what comes out is in
        the basis `leaves`.
        """
        calls = self.calls(ragged_append=spec.ragged_append)
        moved = []
        for states, of in zip((self.alone, self.both), calls, strict=True):
            rows, length, _ = states.shape
            states = states if enters is None else states @ enters
            session = Session(path, spec, rows, length + APPEND)  # for the padding of a shorter row
            out = np.zeros((rows, length, exact.shape[2]), np.float32)
            for call in of:
                chunk = np.zeros((rows, max(call.counts), states.shape[2]), np.float32)
                for row, (start, count) in enumerate(zip(call.starts, call.counts, strict=True)):
                    chunk[row, :count] = states[row, start : start + count]
                found = session.append(chunk, call.starts, call.counts)
                for row, (start, count) in enumerate(zip(call.starts, call.counts, strict=True)):
                    out[row, start : start + count] = found[row, :count]
            moved.append(out if leaves is None else out @ leaves.T)
        return replace(self, exact=exact, alone=moved[0], both=moved[1])

    def reached(self, *, ragged_append: bool) -> tuple[list[Reached], list[Reached]]:
        """What became of the tokens, by what appended them: of row 0 alone, and of both."""
        alone, both = (
            [Reached.by(of, states, self.exact, self.text) for of in _same(calls)]
            for states, calls in zip(
                (self.alone, self.both), self.calls(ragged_append=ragged_append), strict=True
            )
        )
        return alone, both


def _same(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls of one kind together."""
    return [[call for call in calls if call.what == what] for what in dict.fromkeys(c.what for c in calls)]


@dataclass(frozen=True)
class Reached:
    """What some calls appended, every row's tokens behind the other's."""

    what: str
    got: Floats  # (positions, hidden)
    expected: Floats
    text: NDArray[np.bool_]  # (positions,)

    @classmethod
    def by(cls, calls: Sequence[Call], got: Floats, expected: Floats, text: NDArray[np.bool_]) -> Reached:
        """What `calls` appended of (rows, T, …) arrays."""
        places = [
            (row, slice(start, start + count))
            for call in calls
            for row, (start, count) in enumerate(zip(call.starts, call.counts, strict=True))
        ]
        return cls(
            calls[0].what, *(np.concatenate([of[place] for place in places]) for of in (got, expected, text))
        )


class Session:
    """A graph of the decoder, or all of it, over zeroed caches of its own, updated in place."""

    def __init__(self, path: Path, spec: DecoderSpec, rows: int, capacity: int) -> None:
        self.session = _open(path)
        self.names = [node.name for node in self.session.get_inputs()]
        nodes = {node.name: node for node in self.session.get_inputs()}
        self.states = next(name for name in self.names if name == INPUTS or name.startswith("hidden."))
        self.dtype = np.float16 if nodes[self.states].type == "tensor(float16)" else np.float32
        sizes = {node.shape[2] for name, node in nodes.items() if name.startswith("past_key_values.")}
        (capacity,) = {size for size in sizes if isinstance(size, int)} or {capacity}
        shape = (rows, spec.kv_heads, capacity, spec.head_size)
        self.caches = {
            name.removeprefix("past_key_values."): ort.OrtValue.ortvalue_from_numpy(
                np.zeros(shape, spec.dtype)
            )
            for name in self.names
            if name.startswith("past_key_values.")
        }

    def append(self, states: Floats, starts: Sequence[int], counts: Sequence[int] | None = None) -> Floats:
        """Append (B, S, hidden) to rows that hold `starts` tokens; `counts` (default: S) of the S are real.

        Returns what the graph makes of all S positions: states, or logits.
        """
        rows, length, _ = states.shape
        totals = np.add(starts, counts or [length] * rows)
        # for a device, positions are counted through all rows
        starts_at = length * np.arange(rows)[:, None] if self.dtype is np.float16 else 0
        inputs = {
            self.states: np.ascontiguousarray(states, self.dtype),
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array(totals.max(), np.int32),
            "logits_at": np.tile(np.arange(length), (rows, 1)) + starts_at,
            "query_seqlens": (totals - np.array(starts)).astype(np.int32),
        }
        binding = self.session.io_binding()
        for name in self.names:
            if name in inputs:
                binding.bind_cpu_input(name, inputs[name])
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        names = [node.name for node in self.session.get_outputs()]
        binding.bind_output(next(name for name in names if name == "logits" or name.startswith("hidden.")))
        self.session.run_with_iobinding(binding)
        # outputs come in the order they were bound
        result: Floats = binding.get_outputs()[-1].numpy().astype(np.float32)
        return result


class TorchDecoder:
    """The language model of transformers, of which one layer at a time has weights."""

    def __init__(self, config: PretrainedConfig) -> None:
        config = copy.deepcopy(config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        with no_init_weights():
            self._model = AutoModel.from_config(config).eval()
        self._norm, self._model.norm = self._model.norm, nn.Identity()

    def layer(self, tensors: Mapping[str, Tensor], states: Floats) -> Floats:
        """(B, S, hidden) through the layer whose weights, by transformers' names, are `tensors`."""
        self._model.layers[0].load_state_dict(tensors, assign=True)
        with torch.no_grad():
            out: Floats = self._model(
                inputs_embeds=torch.from_numpy(states), use_cache=False
            ).last_hidden_state.numpy()
        return out

    def head(self, norm: Tensor, head: Tensor, states: Floats) -> Floats:
        """(K, hidden) -> (K, vocabulary): the norm behind the layers, and the product with the head."""
        self._norm.weight = nn.Parameter(norm)
        with torch.no_grad():
            logits: Floats = nn.functional.linear(self._norm(torch.from_numpy(states)), head).numpy()
        return logits

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """(length, head_size / 2) cosines and sines.

        The model's own module fills the tables, so that every static rope variant comes along.
        """
        tables = self._model.rotary_emb(torch.zeros(()), torch.arange(length)[None])
        half = tables[0].shape[-1] // 2  # the other half of a row repeats it
        cos, sin = (table[0, :, :half].contiguous() for table in tables)
        return cos, sin


def rounding(logits: Floats, expected: Floats) -> str:
    """What rounded weights changed of (K, vocabulary) logits, in words."""
    same = expected.argmax(-1) == logits.argmax(-1)
    return (
        f"decoder: KL divergence from float32 {divergence(expected, logits).mean():.2g} nats, "
        f"the same likeliest token {100 * same.mean():.1f} % of {len(same)} times"
    )


def image_features(model: LlavaForConditionalGeneration, pixels: Floats) -> Floats:
    """What transformers makes of (N, 3, S, S): (N, T, hidden)."""
    with torch.no_grad():
        features: Floats = torch.stack(list(model.model.get_image_features(torch.from_numpy(pixels)))).numpy()
    return features


def encode(path: Path, pixels: Floats) -> Floats:
    """What the graph at `path` makes of (N, 3, S, S)."""
    session = _open(path)
    is_half = session.get_inputs()[0].type == "tensor(float16)"
    told = {"pixel_values": pixels.astype(np.float16 if is_half else np.float32)}
    features: Floats = session.run(["image_features"], told)[0].astype(np.float32)
    return features


def _open(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    nodes = onnx.load(path, load_external_data=False).graph.node
    if any(node.op_type in ("MatMulInteger", "QuantizeLinear") for node in nodes):  # exact on any processor
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def pictures(n: int, size: int, seed: int) -> Floats:
    """(n, 3, size, size) normalised pixels, with the areas and edges that pictures have and noise has not."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((n, 3, size, size), np.float32)
    for cells in (4, 16):
        coarse = rng.standard_normal((n, 3, cells, cells), np.float32)
        at = np.arange(size) * cells // size
        pixels += coarse[:, :, at][..., at]
    return pixels
