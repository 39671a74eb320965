"""A made-up model for testing what surrounds one: every logit depends on every cached entry.

The decoder keeps the embeddings it is given in the cache and computes its logits from what it finds
there, weighted by position. So one stale, missing or misplaced entry of a row changes every number that
row gives after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.devices import CPU
from dualfocus.runtime.embeddings import HostEmbeddings
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.manifest import (
    FORMAT_VERSION,
    BoxFormat,
    DecoderSpec,
    FileEntry,
    ImageSpec,
    Manifest,
    TokenSpec,
)
from dualfocus.runtime.turns import DUALFOCUS, Turns

WIDTH = 24
IMAGE_TOKENS = 9
BOS, EOS = 1, 2


@cache
def make_tokenizer() -> Tokenizer:
    """A byte-level BPE with tokens of several characters, so that a text has more than one spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["[0.10, 0.20, 0.60, 0.70]", "USER: the ASSISTANT: question"] * 9, trainer)
    return tokenizer


def make_manifest(tokenizer: Tokenizer, **changes: object) -> Manifest:
    fields: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "target": "onnxruntime",
        "name": "fake",
        "created_by": "a test",
        "source": {},
        "precision": "fp32",
        "image": ImageSpec(8, IMAGE_TOKENS, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "pad"),
        "decoder": DecoderSpec(
            layers=1,
            hidden=WIDTH,
            heads=1,
            kv_heads=1,
            head_size=WIDTH,
            vocabulary=tokenizer.get_vocab_size(),
            context=1500,
            dtype="float32",
            ragged_append=True,
        ),
        "tokens": TokenSpec(BOS, (EOS,)),
        "prompts": DUALFOCUS,
        "coordinates": "original",
        "box": BoxFormat(),
        "select": "reference",
        "max_new_tokens": 40,
        "files": {"vision.onnx": FileEntry(1, "0")},
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


class FakeVision:
    """Image tokens that depend on every pixel of the view; counts the images it encoded."""

    def __init__(self, spec: ImageSpec) -> None:
        rng = np.random.default_rng(1)
        pixels = 3 * spec.size**2
        self._weights = rng.standard_normal((pixels, spec.tokens * WIDTH)).astype(np.float32) / pixels**0.5
        self.images = 0

    def encode(self, pixels: Floats) -> Floats:
        self.images += len(pixels)
        return (pixels.reshape(len(pixels), -1) @ self._weights).reshape(len(pixels), -1, WIDTH)


class FakeDecoder:
    """Position-weighted sums of a row's cache as logits, and replies that can be given a push.

    `script` maps what a user turn contains to the tokens its reply leans to: a push, not a certainty,
    so that log-probabilities go on depending on the cache. Counts its calls and the tokens appended.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        table: Floats,
        tokenizer: Tokenizer,
        script: dict[str, Sequence[int]],
    ) -> None:
        rng = np.random.default_rng(2)
        self._weights = rng.standard_normal((spec.context, WIDTH))
        self._out = rng.standard_normal((WIDTH, spec.vocabulary)) / 2
        self._ids = {row.tobytes(): i for i, row in enumerate(table)}
        self._tokenizer = tokenizer
        self._script = script
        self.calls = 0
        self.tokens = 0

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        assert len(set(rows)) == len(rows)
        self.calls += 1
        results = []
        for row, new, positions in zip(rows, embeddings, logits_at, strict=True):
            start = cache.lengths[row]
            assert 1 <= len(new) <= cache.capacity - start
            assert all(0 <= at < len(new) for at in positions)
            for store, sign in ((cache.keys, 1), (cache.values, -1)):
                store[0][row, 0, start : start + len(new)] = sign * new
            cache.lengths[row] = start + len(new)
            self.tokens += len(new)
            logits = [self._logits(cache, row, start + at + 1) for at in positions]
            results.append(np.array(logits, np.float32).reshape(len(positions), self._out.shape[1]))
        return results

    def _logits(self, kv: KVCache, row: int, length: int) -> npt.NDArray[np.float64]:
        keys, values = kv.keys[0][row, 0, :length], kv.values[0][row, 0, :length]
        mixed = ((keys - values).astype(np.float64) * self._weights[:length]).sum(0) / length**0.5
        logits: npt.NDArray[np.float64] = np.tanh(mixed) @ self._out
        # what was said since the last image, or since the beginning
        said: list[int] = []
        for key in reversed(keys):
            if (token := self._ids.get(key.tobytes())) is None:
                break
            said.insert(0, token)
        text = self._tokenizer.decode(said, skip_special_tokens=False)
        user, _, _ = text.rpartition("ASSISTANT:")
        for mark, reply in self._script.items():
            done = next((n for n in range(len(reply), 0, -1) if said[-n:] == list(reply[:n])), 0)
            if mark in user and done < len(reply) and (done or text.endswith("ASSISTANT:")):
                logits[reply[done]] += 20
        return logits


def make_bundle(
    script: dict[str, Sequence[int]] | None = None, tokenizer: Tokenizer | None = None, **changes: object
) -> Bundle:
    """An opened bundle of made-up engines; `changes` are to its manifest."""
    tokenizer = tokenizer or make_tokenizer()
    manifest = make_manifest(tokenizer, **changes)
    spec = manifest.decoder
    table = np.random.default_rng(3).standard_normal((spec.vocabulary, WIDTH)).astype(np.float32)
    decoder = FakeDecoder(spec, table, tokenizer, {} if script is None else script)
    vision = FakeVision(manifest.image)
    return Bundle(Path("fake"), manifest, "digest", CPU, vision, decoder, tokenizer, HostEmbeddings(table))


def spelling(bundle: Bundle, text: str) -> list[int]:
    """The reply `text` as the history of a dialogue spells it, its end token included."""
    prompt = Turns(bundle.manifest, bundle.tokenizer, "What?").micro("whole", "crop", text)
    return [token for token in (prompt.tokens[at] for at in prompt.replies[0]) if isinstance(token, int)]


@contextmanager
def interrupted(decoder: FakeDecoder, call: int, *, late: bool) -> Iterator[None]:
    """Ctrl-C at the decoder's `call`-th call from now, before or after it has written to the cache."""
    extend = decoder.extend
    stop = decoder.calls + call

    def stopping(*args: Any) -> list[Floats]:
        if decoder.calls == stop:
            if late:
                extend(*args)
            raise KeyboardInterrupt
        return extend(*args)

    decoder.extend = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        yield
    decoder.extend = extend  # type: ignore[method-assign]
