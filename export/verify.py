"""The exported graphs against torch, on fresh random inputs: the last step before a manifest is written.

The reference is the checkpoint as transformers runs it (`get_image_features`, and one causal forward
over whole sequences), never this package's own modules. The decoder's graph is driven the way the
runtime will: one buffer bound as past and present, filled by prefill, append and decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from transformers import LlavaForConditionalGeneration

from dualfocus.export.errors import ExportError
from dualfocus.runtime.manifest import DecoderSpec, Manifest

TOLERANCE = 1e-4  # of the reference's largest magnitude; of 1 where that is smaller

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """How far one exported result lies from torch's."""

    what: str
    max_abs: float
    allowed: float

    @classmethod
    def between(cls, what: str, got: Floats, expected: Floats) -> Difference:
        """Of two arrays of one shape."""
        assert got.shape == expected.shape, (what, got.shape, expected.shape)
        # NaN compares false with everything: make it a difference that no tolerance allows
        max_abs = float(np.nan_to_num(np.abs(got - expected), nan=np.inf).max())
        return cls(what, max_abs, TOLERANCE * max(1.0, float(np.abs(expected).max())))

    @property
    def ok(self) -> bool:
        return self.max_abs <= self.allowed

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO FAR"
        return f"{self.what:<42} max |onnx - torch| {self.max_abs:.1e}, allowed {self.allowed:.1e}  {verdict}"


class DecoderSession:
    """``decoder.onnx`` over zeroed caches of its own, updated in place; no more than a check needs."""

    def __init__(self, path: Path, spec: DecoderSpec, rows: int, capacity: int) -> None:
        self.session, self.spec = _open(path), spec
        shape = (rows, spec.kv_heads, capacity, spec.head_size)
        self.caches = {
            f"{layer}.{part}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for layer in range(spec.layers)
            for part in ("key", "value")
        }

    def append(self, embeds: Floats, start: list[int], counts: list[int] | None = None) -> Floats:
        """Append (B, S, hidden) to rows that hold `start` tokens; `counts` (default: S) of the S are real.

        Returns the logits of all S positions, (B, S, vocabulary).
        """
        rows, length, _ = embeds.shape
        counts = counts or [length] * rows
        totals = np.add(start, counts)
        inputs = {
            "inputs_embeds": embeds,
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array(totals.max(), np.int32),
            "logits_at": np.tile(np.arange(length), (rows, 1)),
        }
        if self.spec.ragged_append:
            inputs["query_seqlens"] = np.array(counts, np.int32)
        binding = self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        result: Floats = binding.get_outputs()[-1].numpy()  # outputs come in the order they were bound
        return result


def verify(
    model: LlavaForConditionalGeneration, folder: Path, manifest: Manifest, *, seed: int
) -> Iterator[Difference]:
    """Compare every graph of the unfinished bundle in `folder` with `model`, one Difference at a time."""
    rng = np.random.default_rng(seed)
    size = manifest.image.size
    pixels = rng.standard_normal((2, 3, size, size), np.float32)
    features = image_features(model, pixels)
    session = _open(folder / "vision.onnx")
    for n in (1, 2):
        (got,) = session.run(["image_features"], {"pixel_values": pixels[:n]})
        yield Difference.between(f"vision, {n} picture{'s' * (n > 1)}", got, features[:n])

    # Two rows: an image's tokens and random text, as a real prompt has them.
    prompt, append, steps = manifest.image.tokens + 16, 7, 3
    total = prompt + append + steps
    spec = manifest.decoder
    if total > spec.context:
        raise ExportError(
            f"a context of {spec.context} tokens holds no image of {manifest.image.tokens} and a question"
        )
    ids = rng.integers(spec.vocabulary, size=(2, total - manifest.image.tokens))
    with torch.no_grad():
        text = model.get_input_embeddings()(torch.from_numpy(ids)).numpy()
    embeds = np.concatenate([features, text], axis=1)
    expected = logits(model, embeds)

    one = DecoderSession(folder / "decoder.onnx", spec, 1, total)
    got = one.append(embeds[:1, :prompt], [0])
    yield Difference.between(f"decoder, prefill of {prompt}", got, expected[:1, :prompt])
    got = one.append(embeds[:1, prompt : prompt + append], [prompt])
    yield Difference.between(f"decoder, append of {append}", got, expected[:1, prompt : prompt + append])
    got = np.concatenate(
        [one.append(embeds[:1, i : i + 1], [i]) for i in range(prompt + append, total)], axis=1
    )
    yield Difference.between(f"decoder, {steps} steps", got, expected[:1, prompt + append :])

    # Row 1 stays `behind` tokens behind row 0 throughout.
    behind = 5
    two = DecoderSession(folder / "decoder.onnx", spec, 2, total + append)
    at = [prompt, prompt - behind]
    got = two.append(embeds[:, :prompt], [0, 0], at)
    yield _ragged(f"decoder, prefills of {at[0]} and {at[1]}", got, expected, [0, 0], at)
    if spec.ragged_append:
        counts = [append, append - 3]
        chunk = np.stack([embeds[row, start : start + append] for row, start in enumerate(at)])
        got = two.append(chunk, at, counts)
        yield _ragged(f"decoder, appends of {counts[0]} and {counts[1]}", got, expected, at, counts)
        at = [start + count for start, count in zip(at, counts, strict=True)]
    for _ in range(steps):
        step = np.stack([embeds[row, start : start + 1] for row, start in enumerate(at)])
        got = two.append(step, at)
        yield _ragged("decoder, one step of two rows", got, expected, at, [1, 1])
        at = [start + 1 for start in at]


def image_features(model: LlavaForConditionalGeneration, pixels: Floats) -> Floats:
    """What transformers makes of (N, 3, S, S): (N, T, hidden)."""
    with torch.no_grad():
        features: Floats = torch.stack(list(model.model.get_image_features(torch.from_numpy(pixels)))).numpy()
    return features


def logits(model: LlavaForConditionalGeneration, embeds: Floats) -> Floats:
    """What transformers' language model and head make of (B, S, hidden): (B, S, vocabulary)."""
    with torch.no_grad():
        hidden = model.language_model(
            inputs_embeds=torch.from_numpy(embeds), use_cache=False
        ).last_hidden_state
        result: Floats = model.lm_head(hidden).numpy()
    return result


def _ragged(what: str, got: Floats, expected: Floats, starts: list[int], counts: list[int]) -> Difference:
    """Compare the valid part of every row of a right-padded chunk."""
    valid = [got[row, :count] for row, count in enumerate(counts)]
    right = [expected[row, s : s + n] for row, (s, n) in enumerate(zip(starts, counts, strict=True))]
    return Difference.between(what, np.concatenate(valid), np.concatenate(right))


def _open(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
