"""A protocol executed the plain way: every call of the model on its own, nothing kept between them.

This is the readable reference, and what the engine is tested against. Each call encodes its images anew and
prefills its whole prompt. Replies are decoded greedily, a token a call; each prompt is scored by one call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Array, Logits
from dualfocus.runtime.generation import check_finite
from dualfocus.runtime.geometry import Crop, Region
from dualfocus.runtime.image import Picture, PictureSource, open_picture
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.prefix_cache import image_name
from dualfocus.runtime.protocol import focus
from dualfocus.runtime.result import Counters, FocusResult, Generation, Mode, StageClock, check_mode
from dualfocus.runtime.sequence import embed, likeliest, log_softmax
from dualfocus.runtime.turns import Prompt, Question, Turns
from dualfocus.runtime.work import Encode, Generate, Protocol, Score, Steps, Task, crop_name


class Reference:
    """Answers questions about pictures, the plain way."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        select: SelectRule | None = None,
        free_box: bool = True,
        skip_above: float | None = None,
        encode_once: bool = False,
        on_stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        """The first three are `protocol.focus`'s. `encode_once` encodes an image once for a question, not for
        each prompt that shows it. `on_stage` is called with each stage's name as it begins.
        """
        self._bundle = bundle
        self._focus = partial(focus, select=select, free_box=free_box, skip_above=skip_above)
        self._encode_once = encode_once
        self._on_stage = on_stage

    def ask(
        self,
        picture: PictureSource,
        question: str | Question,
        mode: Mode = "dual",
        *,
        box_reply: str | None = None,
    ) -> FocusResult:
        """The same answer as `model.DualFocus.ask` gives, and the same errors."""
        check_mode(mode)
        result: FocusResult = self.run(
            open_picture(picture), question, partial(self._focus, mode=mode, box_reply=box_reply)
        )
        return result

    def run(self, picture: Picture, question: str | Question, protocol: Protocol) -> Any:
        """What `protocol` returns."""
        bundle = self._bundle
        bundle.device.use()
        turns = Turns(bundle.manifest, bundle.tokenizer, question)
        name = image_name(picture, bundle.digest)
        calls = _Calls(bundle, picture, name, self._on_stage, encode_once=self._encode_once)
        result = calls.run(protocol(Task(bundle.manifest, turns, bundle.grammar, picture, name)))
        if isinstance(result, FocusResult):
            result = replace(result, counters=calls.counters, times_ms=calls.clock.stop())
        return result


class _Calls:
    """Calls of the model for one question."""

    def __init__(
        self,
        bundle: Bundle,
        picture: Picture,
        name: str,
        on_stage: Callable[[str], None],
        *,
        encode_once: bool,
    ) -> None:
        self.counters = Counters()
        self.clock = StageClock()
        self._bundle = bundle
        self._picture = picture
        self._name = name
        self._on_stage = on_stage
        self._encode_once = encode_once
        self._crops: dict[str, Crop] = {}  # what each image shows, by name
        self._features: dict[str, Array] = {}

    def run(self, steps: Steps[Any]) -> Any:
        """What a protocol returns; its work is done in the order in which it is yielded."""
        try:
            work = next(steps)
            while True:
                work = steps.send([self._do(item) for item in work])
        except StopIteration as end:
            return end.value

    def _do(self, work: Encode | Generate | Score | Region | Steps[Any]) -> Any:
        match work:
            case Encode(crop):
                self._crops[crop_name(self._name, crop)] = crop
            case Generate():
                self._enter(work.reply)
                return self._generate(work)
            case Score():
                self._enter("select")
                return self._score(work.prompt)
            case Generator():
                return self.run(work)
        return None

    def _enter(self, stage: str) -> None:
        self._on_stage(stage)
        self.clock.enter(stage)

    def _generate(self, work: Generate) -> Generation:
        bundle, manifest = self._bundle, self._bundle.manifest
        cursor = work.grammar.start() if work.grammar else None
        cache, (logits,) = self._prefill(work.prompt, [len(work.prompt.tokens) - 1])
        tokens: list[int] = []
        logprobs: list[float] = []
        while True:
            token = likeliest(logits, cursor.allowed if cursor else None)
            if cursor:
                cursor.advance(token)
            tokens.append(token)
            logprobs.append(check_finite(log_softmax(logits, token)))
            full = len(tokens) == manifest.max_new_tokens or cache.lengths[0] == cache.capacity
            if token in manifest.tokens.eos or full:
                text = bundle.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                return Generation(text, tuple(tokens), tuple(logprobs))
            ((logits,),) = bundle.decoder.extend(cache, [0], [embed([token], bundle.embeddings, {})], [[0]])
            self.counters.decode_steps += 1
            self.counters.decode_rows += 1

    def _score(self, prompt: Prompt) -> tuple[list[float], list[float]]:
        positions = [at for reply in prompt.replies for at in reply]
        _, rows = self._prefill(prompt, [at - 1 for at in positions])
        logprobs = []
        for at, logits in zip(positions, rows, strict=True):
            token = prompt.tokens[at]
            assert isinstance(token, int)
            logprobs.append(check_finite(log_softmax(logits, token)))
        earlier = len(positions) - len(prompt.replies[-1])
        return logprobs[:earlier], logprobs[earlier:]

    def _prefill(self, prompt: Prompt, logits_at: Sequence[int]) -> tuple[KVCache, Sequence[Logits]]:
        """A cache that holds `prompt`, and the (K, vocabulary) logits after K of its positions."""
        bundle, spec = self._bundle, self._bundle.manifest.decoder
        if not self._encode_once:
            self._features.clear()
        # in the order shown, not a set's: another place in the batch may round otherwise
        seen = dict.fromkeys(token.image for token in prompt.tokens if not isinstance(token, int))
        if new := [name for name in seen if name not in self._features]:
            pixels = bundle.view([(self._picture, self._crops[name]) for name in new])
            self._features |= zip(new, bundle.vision.encode(pixels), strict=True)
            self.counters.vision_encodes += len(new)
        self.counters.tokens_prefilled += len(prompt.tokens)
        cache = KVCache(spec, 1, spec.context, bundle.device.memory)
        embeddings = embed(prompt.tokens, bundle.embeddings, self._features)
        (logits,) = bundle.decoder.extend(cache, [0], [embeddings], [logits_at])
        return cache, logits
