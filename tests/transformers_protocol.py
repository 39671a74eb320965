"""The DualFocus protocol written with transformers alone: the other side of the parity test.

Four `generate` calls and a `forward` per candidate, each with its images, nothing kept between them;
pixels by Pillow, boxes by a few lines of torch. From `dualfocus` come only data: a bundle's manifest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration

import dualfocus.export.nano_tower  # noqa: F401  registers nano's tower
from dualfocus.runtime.manifest import Manifest

CropBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class Reply:
    """A greedy reply: its tokens (the end token included, where it came), its text, and how sure each was."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]  # the best logit's lead over the second, per token
    text: str


@dataclass(frozen=True)
class Score:
    """A candidate's mean negative log-likelihood by both rules."""

    reference: float  # over the box reply and the answer
    answer: float  # over the answer alone


@dataclass(frozen=True)
class Outcome:
    """All that one question comes to. `crop`, `micro` and the scores are None where the protocol has none."""

    macro: Reply
    locate: Reply
    crop: CropBox | None
    micro: Reply | None
    macro_score: Score | None
    micro_score: Score | None

    @property
    def micro_text(self) -> str | None:
        """The micro reply as the protocol takes it: no newlines and then no periods around it."""
        return None if self.micro is None else final_text(self.micro)

    def chosen(self, rule: str) -> str:
        """The lower loss by a rule; macro where there is no choice, and when equal."""
        if self.micro is None or self.macro_score is None or self.micro_score is None:
            return "macro"
        return "micro" if getattr(self.micro_score, rule) < getattr(self.macro_score, rule) else "macro"


class TransformersProtocol:
    """A checkpoint in float32, asked by the protocol that a manifest's prompts spell."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.manifest = manifest
        self.prompts = manifest.prompts

    def ask(self, picture: Image.Image, question: str, box_reply: str | None = None) -> Outcome:
        """Macro, locate, micro and select. A `box_reply` stands for the locate reply a random model lacks."""
        prompts = self.prompts
        whole = question if "\n" in question or not prompts.hint else f"{question}\n{prompts.hint}"
        fields = {"{Q}": question.split("\n")[0], "{T}": whole}

        def turn(template: str) -> str:
            return prompts.user.replace("{turn}", re.sub(r"\{[QT]\}", lambda m: fields[m[0]], template))

        view = [self.pixels(picture)]
        macro = self.generate(prompts.system + turn(prompts.macro), view)
        locate = self.generate(prompts.system + turn(prompts.locate), view)
        located = locate.text if box_reply is None else box_reply
        crop = crop_of(located, *picture.size, self.manifest)
        if crop is None:
            return Outcome(macro, locate, None, None, None, None)

        view.append(self.pixels(picture.crop(crop)))
        history = [prompts.system + turn(prompts.locate), prompts.reply.replace("{answer}", located)]
        micro = self.generate("".join(history) + turn(prompts.micro), view)
        if macro.text == final_text(micro):
            return Outcome(macro, locate, crop, micro, None, None)
        scores = (
            self.score([*history, turn(prompts.select), prompts.reply.replace("{answer}", text)], view)
            for text in (macro.text, final_text(micro))
        )
        return Outcome(macro, locate, crop, micro, *scores)

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
        """The model's own greedy continuation of a rendered dialogue."""
        ids, _ = self._encode(text)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.stack(view),
            do_sample=False,
            max_new_tokens=self.manifest.max_new_tokens,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = tuple(out.sequences[0, ids.shape[1] :].tolist())
        best = [logits[0].topk(2).values for logits in out.logits]
        margins = tuple(float(first - second) for first, second in best)
        return Reply(tokens, margins, self.tokenizer.decode(tokens, skip_special_tokens=True).strip())

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


def final_text(micro: Reply) -> str:
    return micro.text.strip("\n").strip(".")


def crop_of(reply: str, width: int, height: int, manifest: Manifest) -> CropBox | None:
    """The first four comma-separated unsigned numbers as a crop; None where there is none or it is empty."""
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
    centre, half = box.sum(0) / 2, (box[1] - box[0]).max() / 2
    box = torch.stack([centre - half, centre + half])
    for margin in (0, 25):
        box += torch.tensor([[-margin], [margin]])
        box = torch.minimum(box.clamp(min=0), size - 1)
    x0, y0, x1, y1 = box.int().flatten().tolist()
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None
