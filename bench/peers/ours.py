"""Our own rows: bundles of one checkpoint in every precision, through the runtime as anybody uses it.

Nothing is kept from one question to the next, so that each is a first one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from dualfocus.bench.peers.base import PAST, PREFILL, STEPS, Counts, Engines, Opened, Precision, Work
from dualfocus.bench.peers.work import script
from dualfocus.bench.scripted import ScriptedDecoder
from dualfocus.export import Shape, export_bundle
from dualfocus.runtime import Bundle, DualFocus
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.sequence import embed

REQUIRES = ("dualfocus", "onnxruntime")
FOLDER = "ours"  # of `Work.folder`
OWN: tuple[Literal["fp32", "int8", "int4"], ...] = ("fp32", "int8", "int4")


def prepare(source: Path | Shape, folder: Path, precisions: Sequence[Precision]) -> None:
    """A bundle of `source` for each of our `precisions`; unlike a peer's, an export reads the checkpoint.

    ExportError as `export_bundle` raises it.
    """
    for precision in OWN:
        if precision in precisions and not _complete(folder / precision):
            export_bundle(source, folder / precision, precision=precision)


def _complete(bundle: Path) -> bool:
    try:
        read_manifest(bundle)
    except BundleError:
        return False
    return True


class _Rows:
    """`rows` rows of a cache, and the decoder over them."""

    def __init__(self, bundle: Bundle, work: Work, rows: int) -> None:
        spec = bundle.manifest.decoder
        self._bundle = bundle
        self._tokens = list(work.tokens)
        self._rows = range(rows)
        self._cache = KVCache(spec, rows=rows, capacity=spec.context)

    def empty(self) -> None:
        for row in self._rows:
            self._cache.truncate(row, 0)

    def prefill(self) -> Counts:
        self._extend(self._tokens[:PREFILL])
        return Counts(tokens_prefilled=PREFILL)

    def hold_past(self) -> None:
        if self._cache.lengths[0] == 0:
            self._extend(self._tokens[:PAST])
        for row in self._rows:
            self._cache.truncate(row, PAST)

    def decode(self) -> Counts:
        for token in self._tokens[PAST : PAST + STEPS]:
            self._extend([token])
        return Counts(decode_steps=STEPS)

    def _extend(self, tokens: list[int]) -> None:
        rows = len(self._rows)
        new = [embed(tokens, self._bundle.embeddings, {})] * rows
        logits = self._bundle.decoder.extend(self._cache, self._rows, new, [[len(tokens) - 1]] * rows)
        np.argmax(np.concatenate(logits), axis=-1)


def _bundle(precision: Precision, work: Work) -> Bundle:
    return Bundle.open(work.folder / FOLDER / precision, threads=work.threads)


def _open(precision: Precision, work: Work) -> Opened:
    bundle = _bundle(precision, work)
    empty, one, two = (_Rows(bundle, work, rows) for rows in (1, 1, 2))

    scripted = ScriptedDecoder(bundle.decoder)
    scripted.script = script(work.calls) or {}
    runner = DualFocus(dataclasses.replace(bundle, decoder=scripted), cache_mb=0)
    replies = [call.reply for call in work.calls if not call.scored]

    def vision() -> Counts:
        bundle.vision.encode(work.pixels[:1])
        return Counts(vision_encodes=1)

    def question() -> Counts:
        result = runner.ask(work.picture, work.question)
        macro, located, micro = result.macro, result.located, result.micro
        said = [
            reply and reply.tokens
            for reply in (macro and macro.generation, located, micro and micro.generation)
        ]
        assert said == replies, f"replied {said}, expected {replies}"
        counters = result.counters
        return Counts(
            counters.vision_encodes, counters.tokens_prefilled, counters.decode_steps, "FocusResult.counters"
        )

    return Opened(
        precision,
        {
            "vision": vision,
            "prefill": empty.prefill,
            "decode": one.decode,
            "decode, two rows": two.decode,
            "question as shipped": question,
        },
        {"prefill": empty.empty, "decode": one.hold_past, "decode, two rows": two.hold_past},
        {"question with reuse": "it is the question as shipped"},
    )


def _engines(precision: Precision, work: Work) -> Engines:
    bundle = _bundle(precision, work)
    return Engines(bundle.decoder, bundle.vision)


PRECISIONS: Mapping[Precision, Callable[[Work], Opened]] = {
    precision: partial(_open, precision) for precision in OWN
}
ENGINES: Mapping[Precision, Callable[[Work], Engines]] = {
    precision: partial(_engines, precision) for precision in OWN
}
