"""The decoder alone through onnxruntime-genai: its model builder's files, its `Generator`'s loop.

The builder (CPU, its defaults: round-to-nearest in blocks of 32, activations of a quantised product in int8)
writes the model; of its options only ``prune_lm_head`` is set, because what is asked for is the last logits.
The tokens decoded are the peer's own choice, the argmax: a `Generator` of two rows takes no given ones.
"""

from __future__ import annotations

import copy
import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as genai

from dualfocus.bench.peers.base import (
    PAST,
    PREFILL,
    STEPS,
    Counts,
    Engines,
    Opened,
    Part,
    Precision,
    Work,
)
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats

REQUIRES = ("onnxruntime-genai", "onnxruntime")  # which it takes from its own package: none comes with it
FOLDER = "genai"  # of `Work.folder`

FORMS: Mapping[Precision, str] = {
    "fp32": "fp32",
    "int8": "int8, symmetric, blocks of 32, the head too; accuracy level 4",
    "int4": "int4, symmetric, blocks of 32, the head too; accuracy level 4",
}
MEASURED: tuple[Precision, ...] = ("int8", "int4")  # in quality, from embeddings
UNKNOWN = "neither its model builder nor its image processors know LLaVA"

# Imported by version 0.18's builder for models of other kinds; transformers 4 has none of them.
NEWER = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")


def prepare(checkpoint: Any, folder: Path) -> None:
    """The builder's folder for each precision, and for those measured one that takes embeddings."""
    options = {_name(precision): (precision, "prune_lm_head=true") for precision in FORMS}
    options |= {_name(precision, embeds=True): (precision, "exclude_embeds=true") for precision in MEASURED}
    missing = {name: option for name, option in options.items() if not (folder / name).exists()}
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        unfinished = Path(name)
        _save(checkpoint, unfinished / "checkpoint")
        common = ["-i", str(unfinished / "checkpoint"), "-e", "cpu", "-c", str(unfinished / "cache")]
        builds = [
            [*common, "-o", str(unfinished / built), "-p", precision, "--extra_options", option]
            for built, (precision, option) in missing.items()
        ]
        # in a process of its own: the builder puts modules of common names on the path
        command = f"import json, sys; from {__name__} import build; build(json.loads(sys.argv[1]))"
        status = subprocess.run([sys.executable, "-c", command, json.dumps(builds)]).returncode
        if status:
            raise RuntimeError(f"its model builder ended with status {status}")
        for built in missing:
            (unfinished / built).rename(folder / built)


def build(builds: Sequence[Sequence[str]]) -> None:
    """Run the model builder with each of these command lines."""
    import onnxruntime_genai.models  # noqa: F401  puts the builder's modules on the path
    import transformers

    for name in NEWER:
        if not hasattr(transformers, name):
            setattr(transformers, name, None)
    for arguments in builds:
        sys.argv = ["builder", *arguments]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def _name(precision: Precision, *, embeds: bool = False) -> str:
    return f"{precision}-embeds" if embeds else precision


def _save(checkpoint: Any, folder: Path) -> None:
    """The language model as a checkpoint of its own, of the architecture that the builder knows."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    llava, tokens = checkpoint.model, checkpoint.tokens
    config = copy.deepcopy(llava.language_model.config)
    config.bos_token_id, config.eos_token_id = tokens.bos, list(tokens.eos)
    # transformers 5 always says so, and the builder expects it
    config.rope_scaling = config.rope_scaling or {"rope_type": "default"}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model, model.lm_head = llava.language_model, llava.lm_head
    model.save_pretrained(folder)
    end = checkpoint.tokenizer.id_to_token(tokens.eos[0])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=checkpoint.tokenizer, eos_token=end, pad_token=end)
    tokenizer.save_pretrained(folder)


class _Decode:
    """The `Generator` of `rows` rows alike."""

    def __init__(self, model: genai.Model, work: Work, rows: int) -> None:
        self._model = model
        self._rows = rows
        self._tokens = np.array([work.tokens] * rows, np.int32)  # (rows, PAST + STEPS)
        self._generator: genai.Generator | None = None

    def start(self) -> genai.Generator:
        """An empty one."""
        longest = PAST + STEPS + 1
        params = genai.GeneratorParams(self._model)
        # no token ends a row before it has the longest length
        params.set_search_options(
            batch_size=self._rows, max_length=longest, min_length=longest, do_sample=False
        )
        self._generator = genai.Generator(self._model, params)
        return self._generator

    def prefill(self) -> Counts:
        assert self._generator is not None
        self._generator.append_tokens(self._tokens[:, :PREFILL])
        self._generator.generate_next_token()  # computes nothing more: takes the argmax
        return Counts(tokens_prefilled=PREFILL)

    def hold_past(self) -> None:
        """PAST tokens, and the first one decoded after them chosen."""
        generator = self._generator
        if generator is None or self._rows > 1:  # several rows can only be emptied
            generator = self.start()
            generator.append_tokens(self._tokens[:, :PAST])
        else:
            generator.rewind_to(PAST - 1)
            generator.append_tokens(self._tokens[:, PAST - 1 : PAST])
        generator.generate_next_token()

    def decode(self) -> Counts:
        assert self._generator is not None
        for _ in range(STEPS):
            self._generator.generate_next_token()
        return Counts(decode_steps=STEPS)

    def row(self, row: int) -> tuple[int, ...]:
        """All its tokens, the last one only chosen."""
        assert self._generator is not None
        return tuple(self._generator.get_sequence(row).tolist())


def _open_model(precision: Precision, work: Work) -> genai.Model:
    config = genai.Config(str(work.folder / FOLDER / _name(precision)))
    options = {"session_options": {"intra_op_num_threads": work.threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    return genai.Model(config)


def _open(precision: Precision, work: Work) -> Opened:
    model = _open_model(precision, work)
    empty, one, two = (_Decode(model, work, rows) for rows in (1, 1, 2))
    cannot: tuple[Part, ...] = ("vision", "question as shipped", "question with reuse")
    return Opened(
        FORMS[precision],
        {"prefill": empty.prefill, "decode": one.decode, "decode, two rows": two.decode},
        {"prefill": empty.start, "decode": one.hold_past, "decode, two rows": two.hold_past},
        dict.fromkeys(cannot, UNKNOWN),
    )


class _Decoder:
    """`engines.HostDecoder`, for a cache of one row that only grows: the builder's graph from embeddings.

    onnxruntime-genai itself runs it in ONNX Runtime, but only behind image encoders that it knows.
    """

    def __init__(self, precision: Precision, work: Work) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = work.threads
        path = work.folder / FOLDER / _name(precision, embeds=True) / "model.onnx"
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._presents = [output.name for output in self._session.get_outputs() if output.name != "logits"]
        self._caches: WeakKeyDictionary[KVCache, list[Floats]] = WeakKeyDictionary()

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        assert list(rows) == [0], f"rows {rows}, expected the only one"
        if cache not in self._caches:
            _, kv_heads, _, head_size = cache.keys[0].shape
            self._caches[cache] = [np.zeros((1, kv_heads, 0, head_size), np.float32) for _ in self._presents]
        past = self._caches[cache]
        assert past[0].shape[2] == cache.lengths[0], "the cache was cut"
        cache.lengths[0] += len(embeddings[0])
        feeds: dict[str, npt.NDArray[Any]] = {
            name.replace("present", "past_key_values"): entries
            for name, entries in zip(self._presents, past, strict=True)
        }
        feeds["inputs_embeds"] = embeddings[0][None]
        feeds["attention_mask"] = np.ones((1, cache.lengths[0]), np.int64)
        logits, *self._caches[cache] = self._session.run(["logits", *self._presents], feeds)
        return [logits[0, list(logits_at[0])]]


def _engines(precision: Precision, work: Work) -> Engines:
    return Engines(_Decoder(precision, work))


PRECISIONS: Mapping[Precision, Callable[[Work], Opened]] = {
    precision: partial(_open, precision) for precision in FORMS
}
ENGINES: Mapping[Precision, Callable[[Work], Engines]] = {
    precision: partial(_engines, precision) for precision in MEASURED
}
