"""The authors' protocol through `transformers`, in float32 and bfloat16, with PyTorch's SDPA attention.

What it computes is counted where it is computed: at the doors of its vision tower and its language model.
`bench.gpu` opens it on a GPU, in float16; transformers 5 will do for that too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging

import dualfocus.export.nano_tower  # noqa: F401  registers the built-in model's tower with AutoModel
from dualfocus.bench.peers.base import (
    PAST,
    PREFILL,
    STEPS,
    Call,
    Counts,
    Engines,
    Opened,
    Part,
    Precision,
    Slot,
    Work,
)
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats

REQUIRES = ("transformers", "torch")
FOLDER = "transformers"  # of `Work.folder`


def prepare(checkpoint: Any, folder: Path) -> None:
    """The weights as a checkpoint folder of their own, which random ones have none of."""
    model = folder / "model"
    if model.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        checkpoint.model.save_pretrained(Path(unfinished) / "model")
        (Path(unfinished) / "model").rename(model)


class _Model:
    """The model of `work` in one precision, and what it counted since it was last asked."""

    def __init__(self, work: Work, dtype: torch.dtype, device: str = "cpu") -> None:
        torch.set_num_threads(work.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.work = work
        self.dtype = dtype
        self.device = torch.device(device)
        self.model = _read(work.folder / FOLDER / "model", dtype, self.device).eval()
        self.language_model = self.model.model.language_model
        attention = self.language_model.config._attn_implementation
        assert attention == "sdpa", attention
        self._counts = Counts()
        self.model.model.vision_tower.register_forward_pre_hook(self._see, with_kwargs=True)
        self.language_model.register_forward_pre_hook(self._read, with_kwargs=True)

    def _see(self, tower: object, args: Sequence[torch.Tensor], kwargs: Mapping[str, torch.Tensor]) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        self._counts.vision_encodes += len(pixels)

    def _read(self, decoder: object, args: object, kwargs: Mapping[str, torch.Tensor]) -> None:
        rows, length, _ = kwargs["inputs_embeds"].shape
        if length == 1:
            self._counts.decode_steps += 1
        else:
            self._counts.tokens_prefilled += rows * length

    def counted(self) -> Counts:
        """What was counted since the last call of this."""
        counts, self._counts = self._counts, Counts(source="hooks on the model's forward passes")
        return counts

    def pixels(self, images: int) -> torch.Tensor:
        """The first `images` of whole picture and crop."""
        return torch.from_numpy(self.work.pixels[:images]).to(self.device, self.dtype)

    def tensor(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids where the model is."""
        return torch.tensor(tokens, device=self.device)

    def wait(self) -> None:
        """Until a GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def vision(self) -> None:
        self.model.get_image_features(pixel_values=self.pixels(1))

    def prefill(self) -> None:
        tokens = self.tensor([self.work.tokens[:PREFILL]])
        self.model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def question(self) -> None:
        """Every call on its own: `generate` for replies, a forward pass with labels for candidates."""
        for call in self.work.calls:
            (self._score if call.scored else self._generate)(call)

    def _generate(self, call: Call) -> None:
        prompt, images = self._inputs(call)
        out = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=self.pixels(images),
            do_sample=False,
            max_new_tokens=len(call.reply),
            logits_processor=LogitsProcessorList([_Says(call.reply, prompt.shape[1])]),
            pad_token_id=0,
        )
        said = out[0, prompt.shape[1] :].tolist()
        assert said == list(call.reply), f"replied {said}, expected {call.reply}"

    def _score(self, call: Call) -> None:
        prompt, images = self._inputs(call)
        tokens = torch.cat([prompt, self.tensor([call.reply])], dim=1)
        labels = tokens.clone()
        labels[:, : prompt.shape[1]] = -100  # what the loss leaves out
        self.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=self.pixels(images),
            labels=labels,
            use_cache=False,
        ).loss.item()

    def _inputs(self, call: Call) -> tuple[torch.Tensor, int]:
        """(1, L) token ids, the image token where an image stands, and how many images there are."""
        image = self.model.config.image_token_id
        ids = [image if isinstance(token, Slot) else token for token in call.prompt]
        return self.tensor([ids]), len({token.image for token in call.prompt if isinstance(token, Slot)})


def _read(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint in `folder`; where it is a configuration alone, random weights, made on the device."""
    if any(folder.glob("*.safetensors")):
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        return model.to(device)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with device:
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)


class _Decode:
    """Decoding `rows` rows alike, from a cache that holds what comes before."""

    def __init__(self, model: _Model, rows: int) -> None:
        self._model = model.model
        self._tokens = model.tensor([model.work.tokens] * rows)  # (rows, PAST + STEPS)
        self._cache: DynamicCache | None = None

    def before(self) -> None:
        if self._cache is None:
            past = self._tokens[:, :PAST]
            out = self._model(
                input_ids=past, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1
            )
            self._cache = out.past_key_values
        self._cache.crop(PAST)

    def run(self) -> None:
        for at in range(PAST, PAST + STEPS):
            step = self._tokens[:, at : at + 1]
            self._model(input_ids=step, past_key_values=self._cache, use_cache=True).logits.argmax(-1)


class _Says(LogitsProcessor):  # type: ignore[misc]
    """Makes a given reply the best one."""

    def __init__(self, reply: Sequence[int], start: int) -> None:
        self._reply = reply
        self._start = start

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._reply[tokens.shape[1] - self._start]] = torch.inf
        return scores


def open_model(dtype: torch.dtype, form: str, work: Work, device: str = "cpu") -> Opened:
    """The model of `work`, whose parts are over when their work on the device is."""
    model = _Model(work, dtype, device)
    one, two = _Decode(model, 1), _Decode(model, 2)

    def part(do: Callable[[], None]) -> Callable[[], Counts]:
        def counted() -> Counts:
            with torch.inference_mode():
                do()
            model.wait()
            return model.counted()

        return counted

    def before(do: Callable[[], None]) -> Callable[[], Counts]:
        return part(do)  # what it counts is left behind

    parts: dict[Part, Callable[[], None]] = {
        "vision": model.vision,
        "prefill": model.prefill,
        "decode": one.run,
        "decode, two rows": two.run,
        "question as shipped": model.question,
    }
    return Opened(
        form,
        {name: part(do) for name, do in parts.items()},
        {"decode": before(one.before), "decode, two rows": before(two.before)},
        {"question with reuse": "generate keeps nothing between calls"},
    )


class _Decoder:
    """`engines.HostDecoder`, for a cache of one row that only grows."""

    def __init__(self, model: _Model) -> None:
        self._model = model.model
        self._dtype = model.dtype
        self._caches: WeakKeyDictionary[KVCache, DynamicCache] = WeakKeyDictionary()

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        assert list(rows) == [0], f"rows {rows}, expected the only one"
        own = self._caches.setdefault(cache, DynamicCache())
        assert own.get_seq_length() == cache.lengths[0], "the cache was cut"
        with torch.inference_mode():
            states = self._model.model.language_model(
                inputs_embeds=torch.from_numpy(embeddings[0][None]).to(self._dtype),
                past_key_values=own,
                use_cache=True,
            ).last_hidden_state
            logits: Floats = self._model.lm_head(states[0, list(logits_at[0])]).float().numpy()
        cache.lengths[0] += len(embeddings[0])
        return [logits]


class _Vision:
    """`engines.VisionEncoder`."""

    def __init__(self, model: _Model) -> None:
        self._model = model

    def encode(self, pixels: Floats) -> Floats:
        with torch.inference_mode():
            features = self._model.model.get_image_features(
                pixel_values=torch.from_numpy(pixels).to(self._model.dtype)
            )
        return np.stack([image.float().numpy() for image in features])


def _engines(dtype: torch.dtype, work: Work) -> Engines:
    model = _Model(work, dtype)
    return Engines(_Decoder(model), _Vision(model))


PRECISIONS: Mapping[Precision, Callable[[Work], Opened]] = {
    "fp32": partial(open_model, torch.float32, "float32"),
    "bf16": partial(open_model, torch.bfloat16, "bfloat16"),
}
ENGINES: Mapping[Precision, Callable[[Work], Engines]] = {
    "fp32": partial(_engines, torch.float32),
    "bf16": partial(_engines, torch.bfloat16),
}
