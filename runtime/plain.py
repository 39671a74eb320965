"""The protocol as its authors run it: every call of the model on its own, nothing kept between them.

This is the readable reference, and what the scheduler is tested against. Each call encodes its images
anew and prefills its whole prompt; replies are decoded greedily; each candidate is scored by a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Logits
from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.geometry import Crop, Region, find_region
from dualfocus.runtime.grammar import BoxCursor
from dualfocus.runtime.image import Picture, whole
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.result import Answer, Counters, FocusResult, Generation, Mode, StageClock
from dualfocus.runtime.selection import candidates, loss
from dualfocus.runtime.sequence import embed, likeliest, log_softmax
from dualfocus.runtime.turns import Prompt, Question, Turns, micro_answer


class PlainRunner:
    """Answers questions about pictures, the plain way."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        select: SelectRule | None = None,
        free_box: bool = True,
        on_stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`free_box` as in `scheduler.FocusRunner`; `on_stage` is told each stage's name as it begins."""
        self._bundle = bundle
        self._select = select or bundle.manifest.select
        self._grammar = None if free_box else bundle.grammar
        self._on_stage = on_stage

    def ask(
        self, picture: Picture, question: str | Question, mode: Mode = "dual", *, box_reply: str | None = None
    ) -> FocusResult:
        """The same answer as `scheduler.FocusRunner.ask` gives, and the same errors."""
        self._bundle.device.use()
        manifest = self._bundle.manifest
        turns = Turns(manifest, self._bundle.tokenizer, question)
        turns.check_length(macro_only=mode == "macro")
        clock, counters = StageClock(), Counters()
        model = _Model(self._bundle, picture, counters)
        crops = {"whole": whole(picture)}
        macro = located = micro = None
        region = Region()

        def enter(stage: str) -> None:
            self._on_stage(stage)
            clock.enter(stage)

        if mode != "micro":
            enter("macro")
            macro = Answer.of(model.generate(turns.macro("whole"), crops), turns.question)
        if mode != "macro":
            if box_reply is None:
                enter("locate")
                cursor = self._grammar.start() if self._grammar else None
                located = model.generate(turns.locate("whole"), crops, cursor)
                box_reply = located.text
            height, width = picture.shape[:2]
            region = find_region(box_reply, manifest.coordinates, width, height, manifest.image)
            if region.crop is not None:
                crops["crop"] = region.crop
                enter("micro")
                try:
                    prompt = turns.micro("whole", "crop", box_reply)
                except QuestionError as error:  # a reply can take more tokens than when it was said
                    region = Region(region.box, None, str(error))
                else:
                    micro = Answer.of(model.generate(prompt, crops), turns.question, micro_answer)
            if macro is None and micro is None:
                enter("macro")
                macro = Answer.of(model.generate(turns.macro("whole"), crops), turns.question)
            texts = candidates(macro, micro, turns.question.options)
            if macro and micro and texts:
                enter("select")
                with suppress(QuestionError):  # no room to score what was said: the macro answer stands
                    prompts = [turns.select("whole", "crop", box_reply, text) for text in texts]
                    losses = [self._loss(model.score(prompt, crops)) for prompt in prompts]
                    macro, micro = replace(macro, loss=losses[0]), replace(micro, loss=losses[1])
        return FocusResult.conclude(macro, located, region, micro, counters, clock.stop())

    def _loss(self, logprobs: tuple[list[float], list[float]]) -> float:
        return loss(*logprobs, self._select)


class _Model:
    """Calls of the model about one picture. `crops` says what every image named in a prompt shows."""

    def __init__(self, bundle: Bundle, picture: Picture, counters: Counters) -> None:
        self._bundle = bundle
        self._picture = picture
        self._counters = counters

    def generate(
        self, prompt: Prompt, crops: Mapping[str, Crop], cursor: BoxCursor | None = None
    ) -> Generation:
        """A greedy reply; with a `cursor`, among the tokens that it allows."""
        bundle, manifest = self._bundle, self._bundle.manifest
        cache, (logits,) = self._prefill(prompt, crops, [len(prompt.tokens) - 1])
        tokens: list[int] = []
        logprobs: list[float] = []
        while True:
            token = likeliest(logits, None if cursor is None else cursor.allowed)
            if cursor is not None:
                cursor.advance(token)
            tokens.append(token)
            logprobs.append(log_softmax(logits, token))
            full = len(tokens) == manifest.max_new_tokens or cache.lengths[0] == cache.capacity
            if token in manifest.tokens.eos or full:
                text = bundle.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                return Generation(text, tuple(tokens), tuple(logprobs))
            ((logits,),) = bundle.decoder.extend(cache, [0], [embed([token], bundle.embeddings, {})], [[0]])
            self._counters.decode_steps += 1
            self._counters.decode_rows += 1

    def score(self, prompt: Prompt, crops: Mapping[str, Crop]) -> tuple[list[float], list[float]]:
        """The log-probabilities of the tokens of the two replies in `prompt`: the box, and a candidate."""
        positions = [at for reply in prompt.replies for at in reply]
        _, rows = self._prefill(prompt, crops, [at - 1 for at in positions])
        logprobs: dict[int, float] = {}
        for at, logits in zip(positions, rows, strict=True):
            token = prompt.tokens[at]
            assert isinstance(token, int)
            logprobs[at] = log_softmax(logits, token)
        box, candidate = ([logprobs[at] for at in reply] for reply in prompt.replies)
        return box, candidate

    def _prefill(
        self, prompt: Prompt, crops: Mapping[str, Crop], logits_at: Sequence[int]
    ) -> tuple[KVCache, Sequence[Logits]]:
        """A cache that holds `prompt`, and the (K, vocabulary) logits after K of its positions."""
        bundle, spec = self._bundle, self._bundle.manifest.decoder
        # in the order shown, not a set's: another place in the batch may round otherwise
        seen = dict.fromkeys(token.image for token in prompt.tokens if not isinstance(token, int))
        pixels = bundle.view([(self._picture, crops[name]) for name in seen])
        features = dict(zip(seen, bundle.vision.encode(pixels), strict=True))
        self._counters.vision_encodes += len(seen)
        self._counters.tokens_prefilled += len(prompt.tokens)
        cache = KVCache(spec, 1, spec.context, bundle.device.memory)
        embeddings = embed(prompt.tokens, bundle.embeddings, features)
        (logits,) = bundle.decoder.extend(cache, [0], [embeddings], [logits_at])
        return cache, logits
