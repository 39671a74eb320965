"""The DualFocus protocol written with transformers alone: the other side of the parity test.

Written from the protocol's description, not from the runtime, whose two executors share one control flow:
this is the only check of it from outside. A `generate` call per reply and a `forward` call per candidate,
each with its images, nothing kept between them; pixels by Pillow, boxes by a few lines of torch. From
`dualfocus` come only data: a bundle's manifest, a question's fields, the wordings of its benchmark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration

import dualfocus.export.nano_tower  # noqa: F401  registers nano's tower
from dualfocus.runtime.manifest import Manifest
from dualfocus.runtime.turns import DUALFOCUS, Question, Wording

CropBox = tuple[int, int, int, int]
Mode = Literal["dual", "macro", "micro"]
Pass = Literal["macro", "micro"]

# How a question ends. The macro answer is the result, but for "micro only", "one letter" and "scored".
End = Literal[
    "macro only",  # the mode asks for no more
    "sure",  # the gate: the macro answer's confidence is above it
    "no crop",  # the box reply gives none
    "no room to look",  # the micro prompt is longer than the context
    "micro only",  # the mode asks for no more
    "one letter",  # multiple choice: one of the two names an option
    "no letter",  # multiple choice: none does
    "equal",  # both candidates are the same text
    "no room to score",  # a candidate's dialogue is longer than the context
    "scored",
]


@dataclass(frozen=True)
class Reply:
    """A greedy reply: its tokens (the end token included, where it came), its text, and how sure each was."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]  # the best logit's lead over the second, per token
    confidence: float  # the geometric mean of the tokens' probabilities
    text: str


@dataclass(frozen=True)
class Answer:
    """A pass's answer. `letter` is that of the option it names, None where it names none."""

    text: str
    letter: str | None


@dataclass(frozen=True)
class Score:
    """A candidate's mean negative log-likelihood by both rules."""

    reference: float  # over the box reply and the answer
    answer: float  # over the answer alone


@dataclass
class Outcome:
    """All that one question comes to. What the protocol does not reach is missing or None."""

    end: End = "scored"
    replies: dict[str, Reply] = field(default_factory=dict)  # macro, locate and micro, in the order they ran
    box: tuple[float, ...] | None = None  # in pixels
    crop: CropBox | None = None
    answers: dict[Pass, Answer] = field(default_factory=dict)
    scores: dict[Pass, Score] = field(default_factory=dict)
    fed: int = 0  # prompt tokens of all calls

    def chosen(self, rule: str) -> Pass:
        """The pass whose answer is the result; of two scores the lower by `rule`, macro when equal."""
        if self.end == "scored":
            macro, micro = (getattr(self.scores[name], rule) for name in ("macro", "micro"))
            return "micro" if micro < macro else "macro"
        if self.end == "one letter":
            return "macro" if self.answers["macro"].letter else "micro"
        return "micro" if self.end == "micro only" else "macro"

    def answer(self, rule: str) -> str:
        """The result: an option's letter where one is named."""
        answer = self.answers[self.chosen(rule)]
        return answer.letter or answer.text


class TransformersProtocol:
    """A checkpoint in float32, asked by the protocol that a manifest's prompts spell."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.manifest = manifest
        self.prompts = manifest.prompts

    def ask(
        self,
        picture: Image.Image,
        question: str | Question,
        mode: Mode = "dual",
        *,
        box_reply: str | None = None,
        skip_above: float | None = None,
    ) -> Outcome:
        """Macro, locate, micro and select, as far as `mode` and what is said let it come.

        `box_reply` stands for the locate reply that a random model lacks; the turn is not asked then.
        """
        out = Outcome()
        out.end = self._ask(out, picture, self._read(question), mode, box_reply, skip_above)
        return out

    def _ask(
        self,
        out: Outcome,
        picture: Image.Image,
        question: Question,
        mode: Mode,
        box_reply: str | None,
        skip_above: float | None,
    ) -> End:
        """Fill in `out`; why it ends where it does."""
        prompts, wording = self.prompts, self._wording(question)
        view = [self.pixels(picture)]

        def user(template: str) -> str:
            return prompts.user.replace("{turn}", fill(template, question))

        def said(text: str) -> str:
            return prompts.reply.replace("{answer}", text)

        def generate(name: str, text: str) -> Reply:
            out.fed += self._length(text)
            out.replies[name] = reply = self.generate(text, view)
            return reply

        def answer_macro() -> Reply:
            reply = generate("macro", prompts.system + user(prompts.macro))
            out.answers["macro"] = Answer(reply.text, letter_of(reply.text, question))
            return reply

        # 1: the whole picture
        if mode != "micro":
            macro = answer_macro()
            if mode == "macro":
                return "macro only"
            if skip_above is not None and macro.confidence > skip_above:
                return "sure"

        # 2: where to look
        if box_reply is None:
            box_reply = generate("locate", prompts.system + user(wording.locate)).text
        out.box = box_of(box_reply, *picture.size, self.manifest)
        crop = None if out.box is None else crop_of(out.box, *picture.size)
        if crop is None:
            if mode == "micro":
                answer_macro()
            return "no crop"

        # 3: both images, with step 2 as history
        history = [prompts.system + user(wording.history), said(box_reply)]
        asked = "".join(history) + user(prompts.micro)
        if self._length(asked) > self.manifest.decoder.context:
            if mode == "micro":
                answer_macro()
            return "no room to look"
        out.crop = crop
        view.append(self.pixels(picture.crop(crop)))
        micro = generate("micro", asked).text.strip("\n").strip(".")
        out.answers["micro"] = Answer(micro, letter_of(micro, question))
        if mode == "micro":
            return "micro only"

        # 4: the lower loss
        both: tuple[Pass, Pass] = ("macro", "micro")
        texts = [out.answers[name].text for name in both]
        if question.options:
            letters = [out.answers[name].letter for name in both]
            if None in letters:
                return "no letter" if letters == [None, None] else "one letter"
            texts = [question.options["ABCDEFGH".index(letter or "")] for letter in letters]
        if texts[0] == texts[1]:
            return "equal"
        dialogues = [
            [*history, user(wording.select), said(wording.candidate.replace("{answer}", text))]
            for text in texts
        ]
        lengths = [self._length("".join(dialogue)) for dialogue in dialogues]
        if max(lengths) > self.manifest.decoder.context:
            return "no room to score"
        out.fed += sum(lengths)
        for name, dialogue in zip(both, dialogues, strict=True):
            out.scores[name] = self.score(dialogue, view)
        return "scored"

    def _read(self, question: str | Question) -> Question:
        """A question in one line has no hint of its own, and gets the short-answer hint."""
        if isinstance(question, Question):
            return question
        hint = self.prompts.hint
        whole = question if "\n" in question or not hint else f"{question}\n{hint}"
        return Question(question.split("\n")[0], whole)

    def _wording(self, question: Question) -> Wording:
        """A benchmark's wording is of DualFocus' prompts; a checkpoint with others has been taught those."""
        prompts = self.prompts
        if prompts == DUALFOCUS:
            return question.wording
        return Wording(locate=prompts.locate, history=prompts.locate, select=prompts.select)

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """(3, S, S) float32: made a square as the manifest says, resized and normalised."""
        spec = self.manifest.image
        if spec.fit == "pad":
            side = max(picture.size)
            square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in spec.mean))
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            view = square.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
        elif spec.fit == "stretch":
            view = picture.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
        else:
            short = min(picture.size)
            width, height = (int(spec.size * side / short) for side in picture.size)
            left, top = (width - spec.size) // 2, (height - spec.size) // 2
            resized = picture.resize((width, height), Image.Resampling.BICUBIC)
            view = resized.crop((left, top, left + spec.size, top + spec.size))
        values = np.asarray(view, np.float32) / 255
        normal = (values - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
        return torch.from_numpy(normal).permute(2, 0, 1)

    def generate(self, text: str, view: list[torch.Tensor]) -> Reply:
        """The model's own greedy continuation of a rendered dialogue, as far as the context reaches."""
        ids, _ = self._encode(text)
        room = self.manifest.decoder.context - ids.shape[1] + 1  # the last token takes no place
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.stack(view),
            do_sample=False,
            max_new_tokens=min(self.manifest.max_new_tokens, room),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = tuple(out.sequences[0, ids.shape[1] :].tolist())
        best = [logits[0].topk(2).values for logits in out.logits]
        margins = tuple(float(first - second) for first, second in best)
        logprobs = [
            logits[0].double().log_softmax(-1)[token]
            for logits, token in zip(out.logits, tokens, strict=True)
        ]
        confidence = float(torch.stack(logprobs).mean().exp())
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Reply(tokens, margins, confidence, text)

    @torch.no_grad()
    def score(self, pieces: list[str], view: list[torch.Tensor]) -> Score:
        """Losses of a dialogue given as user turn, box reply, user turn, candidate."""
        ids, ends = self._encode("".join(pieces))
        logits = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.stack(view)
        ).logits
        logprobs = logits[0].double().log_softmax(-1)
        nll = -logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]  # of token i + 1 at i
        bounds = np.cumsum([0, *(len(self._spread(piece)) for piece in pieces)])

        def reply(piece: int) -> torch.Tensor:
            inside = [bounds[piece] < end <= bounds[piece + 1] for end in ends[1:]]
            return nll[torch.tensor(inside)]

        box, answer = reply(1), reply(3)
        return Score(float(torch.cat([box, answer]).mean()), float(answer.mean()))

    def _spread(self, text: str) -> str:
        """Hugging Face's prompts repeat the image token once per feature."""
        return text.replace(self.prompts.image, self.prompts.image * self.manifest.image.tokens)

    def _encode(self, text: str) -> tuple[torch.Tensor, list[int]]:
        """(1, L) ids with whatever the tokenizer opens a text with, and where in the text each token ends."""
        encoded = self.tokenizer(self._spread(text), return_offsets_mapping=True)
        return torch.tensor([encoded.input_ids]), [end for _, end in encoded.offset_mapping]

    def _length(self, text: str) -> int:
        return self._encode(text)[0].shape[1]


def fill(template: str, question: Question) -> str:
    """A turn about a question, which is not read for placeholders of its own."""
    context = question.context
    fields = {
        "{Q}": question.first_line,
        "{T}": question.whole,
        "{C}": context or "nan",
        "{CQ}": f"{context}\n{question.first_line}" if context else question.first_line,
    }
    return re.sub(r"\{(Q|T|C|CQ)\}", lambda m: fields[m[0]], template)


def letter_of(answer: str, question: Question) -> str | None:
    """The option that an answer names, whatever its case.

    More than one character: the first of them where that is a to d, else the option that contains the
    answer or is contained in it. Only a letter that an option has is valid.
    """
    options = dict(zip("ABCDEFGH", question.options, strict=False))
    if len(answer) > 1 and answer[0] not in "abcdABCD":
        for letter, text in options.items():
            shown = question.wording.option.format(letter=letter, text=text).casefold()
            if answer.casefold() in shown or shown in answer.casefold():
                return letter
        return None
    first = answer[:1].upper()
    return first if first in options else None


def box_of(reply: str, width: int, height: int, manifest: Manifest) -> tuple[float, ...] | None:
    """The first four comma-separated unsigned numbers, in pixels; None where there are none."""
    numbers = re.search(r",\s*".join([r"(\d+\.?\d*)"] * 4), reply)
    if numbers is None:
        return None
    box = torch.tensor([float(number) for number in numbers.groups()]).view(2, 2)  # corners x (x, y)
    size = torch.tensor([width, height])
    if manifest.coordinates == "original":
        box = box * size
    else:
        assert manifest.coordinates == "padded"
        box = box * size.max() - (size.max() - size) // 2
    return tuple(box.flatten().tolist()) if box.isfinite().all() else None


def crop_of(corners: tuple[float, ...], width: int, height: int) -> CropBox | None:
    """The pixels around a box in pixels; None where it is all zero or they are none."""
    box, size = torch.tensor(corners).view(2, 2), torch.tensor([width, height])
    if box.max() <= 0:
        return None
    centre, half = box.sum(0) / 2, (box[1] - box[0]).max() / 2
    box = torch.stack([centre - half, centre + half])
    for margin in (0, 25):
        box += torch.tensor([[-margin], [margin]])
        box = torch.minimum(box.clamp(min=0), size - 1)
    x0, y0, x1, y1 = box.int().flatten().tolist()
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None
