"""`make`: what every peer is asked to do with a model, from the model's bundle alone.

The picture is a held-out scene, the question one about it, and the replies are those that `bench.savings` has
random weights give: answers of three tokens that differ, and a box as the protocol spells it. So both
candidates are scored, and the plain protocol encodes eight images.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dualfocus.bench import savings
from dualfocus.bench.peers.base import PAST, STEPS, Call, Slot, Work
from dualfocus.bench.scenes import held_out
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.geometry import Crop, find_region
from dualfocus.runtime.image import Picture, view, whole
from dualfocus.runtime.manifest import Manifest
from dualfocus.runtime.turns import Question, Token, Turns, micro_answer
from dualfocus.train import scenes

SEED = 0  # of the random text
SEARCHED = 20  # held-out questions among which one is taken whose replies do not meet


def make(bundle: Path, folder: Path, threads: int) -> Work:
    """The work for the model in `bundle`, a bundle of any precision; no engine is opened.

    InputError if the model writes no boxes of fractions, or if for none of `SEARCHED` questions the replies
    stand at places of their own, as `script` wants them.
    """
    manifest, _ = read_manifest(bundle)
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    if manifest.box is None:
        raise InputError(
            f"{bundle}: the model writes no boxes of fractions, which the peers are to reply with"
        )
    box = manifest.box.write(*savings.BOXES[0])
    for scene, dialogue in held_out(SEARCHED):
        question = dialogue.question + savings.HINT
        calls = _calls(manifest, tokenizer, question, box)
        if script(calls) is not None:
            picture = np.asarray(scenes.draw(scene))
            break
    else:
        raise InputError(f"{bundle}: of {SEARCHED} questions none keeps its replies at places of their own")
    crop = _crop(manifest, picture, box)
    pixels = np.concatenate([view(picture, of, manifest.image) for of in (whole(picture), crop)])
    tokens = _text(tokenizer, PAST + STEPS)
    return Work(folder, threads, tokens, picture, crop, pixels, calls, question)


def script(calls: Iterable[Call]) -> dict[int, int] | None:
    """By position in a row, the token that a decoded reply has to go on with there, for
    `savings.ScriptedDecoder`; None where two replies would have to go on differently at one place."""
    pushed: dict[int, int] = {}
    for call in calls:
        if call.scored:
            continue
        for at, token in enumerate(call.reply, len(call.prompt) - 1):
            if at in pushed:
                return None
            pushed[at] = token
    return pushed


def _text(tokenizer: Tokenizer, length: int) -> tuple[int, ...]:
    """Random tokens with a name, none of them special."""
    special = tokenizer.get_added_tokens_decoder()
    named = sorted(set(tokenizer.get_vocab().values()) - special.keys())
    return tuple(random.Random(SEED).choices(named, k=length))


def _crop(manifest: Manifest, picture: Picture, box: str) -> Crop:
    height, width = picture.shape[:2]
    region = find_region(box, manifest.coordinates, width, height, manifest.image)
    assert region.crop is not None, region.problem
    return region.crop


def _calls(manifest: Manifest, tokenizer: Tokenizer, question: str, box: str) -> tuple[Call, ...]:
    """The protocol's five calls: three replies, and two candidates scored."""
    turns = Turns(manifest, tokenizer, question)
    chat = _Chat(manifest, question)
    macro, locate, micro = turns.macro("whole"), turns.locate("whole"), turns.micro("whole", "crop", box)
    # the box as its history spells it, which is how it is decoded too
    located = micro.tokens[len(locate.tokens) : micro.replies[0].stop]
    answers = [
        (*tokenizer.encode(text, add_special_tokens=False).ids[:2], manifest.tokens.eos[0])
        for text in (savings.MACRO_ANSWER, savings.MICRO_ANSWER)
    ]
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    prompts = manifest.prompts
    told = chat.turn(prompts.locate), {"role": "assistant", "content": box}
    calls = [
        Call(_slots(macro.tokens), chat.messages(chat.turn(prompts.macro)), answers[0], scored=False),
        Call(_slots(locate.tokens), chat.messages(told[0]), _ids(located), scored=False),
        Call(_slots(micro.tokens), chat.messages(*told, chat.turn(prompts.micro)), answers[1], scored=False),
    ]
    for text in (texts[0], micro_answer(texts[1])):
        select = turns.select("whole", "crop", box, text)
        start = select.replies[-1].start
        calls.append(
            Call(
                _slots(select.tokens[:start]),
                chat.messages(*told, chat.turn(prompts.select)),
                _ids(select.tokens[start : select.replies[-1].stop]),
                scored=True,
            )
        )
    return tuple(calls)


class _Chat:
    """Turns as chat messages, their images marked "<image>"."""

    def __init__(self, manifest: Manifest, question: str) -> None:
        self._prompts = manifest.prompts
        self._question = Question.parse(question, manifest.prompts.hint)

    def turn(self, template: str) -> Mapping[str, str]:
        marked = template.replace(self._prompts.image, "<image>")
        filled = marked.replace("{Q}", self._question.first_line).replace("{T}", self._question.whole)
        return {"role": "user", "content": filled}

    def messages(self, *turns: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
        system = self._prompts.system.strip()
        return ({"role": "system", "content": system}, *turns) if system else turns


def _slots(tokens: Sequence[Token]) -> tuple[int | Slot, ...]:
    images = ("whole", "crop")
    return tuple(
        token if isinstance(token, int) else Slot(images.index(token.image), token.position)
        for token in tokens
    )


def _ids(tokens: Sequence[Token]) -> tuple[int, ...]:
    """Of a reply, in which no image stands."""
    return tuple(token for token in tokens if isinstance(token, int))
