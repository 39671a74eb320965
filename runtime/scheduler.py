"""The protocol with everything reused that may be: the same answers as `plain`, for a fraction.

All prompts of a question go through one `CachedSequence`, which keeps the longest common prefix of what
it holds and what comes. So the picture is prefilled once, macro and locate branch from it, micro goes on
from locate's reply, both candidates branch from micro's prompt, and the next question about the same
picture starts behind the picture. Every image is encoded once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.geometry import Crop, Region, find_region
from dualfocus.runtime.image import Picture, view, whole
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.result import Answer, Counters, FocusResult, Generation, Mode, StageClock
from dualfocus.runtime.selection import loss
from dualfocus.runtime.sequence import CachedSequence
from dualfocus.runtime.turns import Prompt, Turns, micro_answer

_IMAGES_KEPT = 8  # encoded images: a picture and the crops of its latest questions


class FocusRunner:
    """Answers questions about pictures, one at a time; keeps the latest picture for the next question.

    Its cache is shared by all its questions, so that each thread needs a runner of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        select: SelectRule | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        """`select` None takes the manifest's rule; `on_stage` is told each stage's name as it begins."""
        spec = bundle.manifest.decoder
        self._bundle = bundle
        self._select = select or bundle.manifest.select
        self._on_stage = on_stage
        cache = KVCache(spec, rows=1, capacity=spec.context)
        self._sequence = CachedSequence(bundle.decoder, cache, 0, bundle.embeddings)
        self._features: OrderedDict[str, Floats] = OrderedDict()  # by image name, latest last

    def ask(
        self, picture: Picture, question: str, mode: Mode = "dual", *, box_reply: str | None = None
    ) -> FocusResult:
        """Answer `question` about `picture`, (H, W, 3) uint8 RGB, upright.

        "dual" runs both passes and takes the better answer; "macro" looks at the whole picture only;
        "micro" takes the zoomed answer, and the macro answer where the model points nowhere.
        `box_reply` is used in place of the model's reply to step 2, which then is not asked for.
        Raises QuestionError for a question that is empty or too long, before anything is computed.
        """
        manifest = self._bundle.manifest
        turns = Turns(manifest, self._bundle.tokenizer, question)
        turns.check_length(macro_only=mode == "macro")
        clock, counters = StageClock(self._on_stage), Counters()
        macro = located = micro = None
        region = Region()

        with clock("encode_whole"):
            whole_name = image_name(picture, self._bundle.digest)
            self._encode(whole_name, picture, whole(picture), counters)
        if mode != "micro":
            with clock("macro"):
                macro = Answer.of(self._generate(turns.macro(whole_name), counters))
        if mode != "macro":
            if box_reply is None:
                with clock("locate"):
                    located = self._generate(turns.locate(whole_name), counters)
                box_reply = located.text
            height, width = picture.shape[:2]
            region = find_region(box_reply, manifest.coordinates, width, height, manifest.image)
            crop_name = f"{whole_name} {region.crop}"
            if region.crop is not None:
                with clock("encode_crop"):
                    self._encode(crop_name, picture, region.crop, counters)
                with clock("micro"):
                    prompt = turns.micro(whole_name, crop_name, box_reply)
                    micro = Answer.of(self._generate(prompt, counters), micro_answer)
            elif macro is None:
                with clock("macro"):
                    macro = Answer.of(self._generate(turns.macro(whole_name), counters))
            if macro and micro and macro.text != micro.text:
                with clock("select"):
                    candidate = partial(turns.select, whole_name, crop_name, box_reply)
                    macro = replace(macro, loss=self._loss(candidate(macro.text), counters))
                    micro = replace(micro, loss=self._loss(candidate(micro.text), counters))
        return FocusResult.conclude(macro, located, region, micro, counters, clock.stop())

    def _encode(self, name: str, picture: Picture, crop: Crop, counters: Counters) -> None:
        """See to it that the image `name`, the crop of `picture`, is in `_features`."""
        if name not in self._features:
            (self._features[name],) = self._bundle.vision.encode(
                view(picture, crop, self._bundle.manifest.image)
            )
            counters.vision_encodes += 1
        self._features.move_to_end(name)
        while len(self._features) > _IMAGES_KEPT:
            self._features.popitem(last=False)

    def _generate(self, prompt: Prompt, counters: Counters) -> Generation:
        manifest, sequence = self._bundle.manifest, self._sequence
        sequence.extend_to(prompt, self._features, counters)
        room = manifest.decoder.context - len(prompt.tokens) + 1
        tokens: list[int] = []
        logprobs: list[float] = []
        for left in reversed(range(min(manifest.max_new_tokens, room))):
            token = int(np.argmax(sequence.next))
            tokens.append(token)
            logprobs.append(float(sequence.next[token]))
            counters.decode_steps += 1
            if token in manifest.tokens.eos:
                break
            if left:
                sequence.append(token)
        text = self._bundle.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Generation(text, tuple(tokens), tuple(logprobs))

    def _loss(self, prompt: Prompt, counters: Counters) -> float:
        self._sequence.extend_to(prompt, self._features, counters)
        box, candidate = map(self._sequence.logprobs, prompt.replies)
        return loss(box, candidate, self._select)


def image_name(picture: Picture, model: str) -> str:
    """A name that two pictures share only if shape, every byte and the model are the same."""
    digest = hashlib.sha256(f"{model} {picture.shape} {picture.dtype}".encode())
    digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()
