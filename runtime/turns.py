"""The protocol's turns as data: the prompts, and how a dialogue becomes what the decoder is fed.

`DUALFOCUS` is the table of the authors' evaluation code; another family of models is another table, not
another code path. A dialogue is rendered to pieces (text, or the place of an image), and tokenised the
way the original LLaVA does: every run of text between two images on its own, one `bos` at the very front.
User and model text is filled in after the templates were split at their image markers, so that no
question and no reply can add an image. In such text no special token is parsed either (`markup`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer

from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.manifest import Manifest, Prompts, TokenSpec
from dualfocus.runtime.markup import Encoded, Spans, encode

# Spaces count: no space after the select turn's colon, and one at its end, so two before "ASSISTANT:".
DUALFOCUS = Prompts(
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    user="USER: {turn} ASSISTANT:",
    reply=" {answer}</s>",
    image="<image>",
    macro="<image>\n{T}",
    locate=("<image>\nPlease provide the bounding box coordinate of the region this question asks: {Q}"),
    micro=("<image>\nPlease combine the information from these two images and answer this question: {T}"),
    select=(
        "<image>\nPlease combine the information from these two images and answer this question:{Q}\n"
        "Answer the question using a single word or phrase "
    ),
    hint="Answer the question using a single word or phrase.",
)

# The same prompts in ChatML, Qwen2's form.
CHATML = replace(
    DUALFOCUS,
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>",
    user="\n<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n",
    reply="{answer}<|im_end|>",
)


CHARACTERS = 32  # that a token of a question may have on average: text has 3 to 5


@dataclass(frozen=True)
class Wording:
    """The turns that a benchmark's script words in its own way, for models that know `DUALFOCUS`' table.

    {C} is the question's context, and {CQ} the context with the question after it. `history` is the
    locate turn as the later ones remember it, `candidate` what is scored of an {answer}, and `option` what
    of each option a reply is compared with.
    """

    locate: str = DUALFOCUS.locate
    history: str = DUALFOCUS.locate
    select: str = DUALFOCUS.select
    candidate: str = "{answer}"
    option: str = "{text}"


# As the authors' scripts render them, slips included: a select turn ends with a space but in MMBench, whose
# candidates begin with a second "ASSISTANT:", and a context that is not there reads "nan" in its history.
# MMBench's compares a reply with the options' texts, the others with their whole lines.
SEED = Wording(select=DUALFOCUS.select.replace(":{Q}", ": {Q}"), option="{letter}. {text}")
GQA_MCQ = Wording(
    select="<image>\n{Q}\nAnswer the question using a single word or phrase. ", option="{letter}. {text}"
)
MMBENCH = Wording(
    locate="<image>\n{CQ}\nPlease provide the bounding box coordinate of the region this question asks.",
    history="<image>\n{C}\nPlease provide the bounding box coordinate of the region this question asks: {Q}",
    select=(
        "<image>\nPlease combine the information from these two images and answer this question: {CQ} "
        "Answer the question using a single word or phrase."
    ),
    candidate="ASSISTANT: {answer}",
)


class ImageToken(NamedTuple):
    """One of an image's tokens: `position` in 0..T-1 of the image whose pixels `image` names."""

    image: str
    position: int


Token = int | ImageToken  # a row of the embedding table, or of an encoded image


@dataclass(frozen=True)
class Question:
    """A question as the turns need it: `first_line` is {Q}, `whole` is {T}, which holds all its hints.

    A multiple-choice question has `options`, without their letters: A, B, and so on are those of their
    order. `wording` is its benchmark's, and `context` what MMBench says before a question.
    Raises QuestionError if there is no question, or one with bytes that are no UTF-8 (surrogates).
    """

    first_line: str
    whole: str
    options: tuple[str, ...] = ()
    context: str = ""
    wording: Wording = Wording()

    def __post_init__(self) -> None:
        texts = (self.first_line, self.whole, self.context, *self.options)
        if (kind := next((type(text) for text in texts if not isinstance(text, str)), None)) is not None:
            raise QuestionError(f"a part of the question is of type {kind.__name__}, expected text")
        if not self.first_line.strip():
            raise QuestionError("the question is empty")
        for text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise QuestionError(f"the question {text!r:.60} is not text in UTF-8")

    @classmethod
    def parse(cls, text: str, hint: str) -> Question:
        """Further lines of `text` are hints of its own; without any, `hint` becomes the second line."""
        text = text.strip()
        # as the authors' code does: splitlines() would also take a form feed or U+2028 for a line's end
        first_line, *hints = text.split("\n")
        whole = text if hints or not hint else f"{text}\n{hint}"
        return cls(first_line.rstrip(), whole)

    def fill(self, template: str) -> Text:
        """A turn's template with this question in it.

        In one pass over the template: a question that contains "{T}" stays as it was typed.
        """
        both = f"{self.context}\n{self.first_line}" if self.context else self.first_line
        fields = {"{Q}": self.first_line, "{T}": self.whole, "{C}": self.context or "nan", "{CQ}": both}
        parts = re.split(r"(\{(?:Q|T|C|CQ)\})", template)
        return Text.join((fields.get(part, part), i % 2 == 1) for i, part in enumerate(parts))

    def letter(self, reply: str) -> str | None:
        """The capital letter of the option that `reply` names, None if it names none.

        A reply longer than one character is read as the authors' code does: by its first character where
        that is one of a to d, else as the first option that contains it or is contained in it, whatever
        their case. So of options beyond D, which their benchmarks do not have, "E" is read, and "E. a cat"
        by its text. A letter that no option has names none, and a small one is the capital: their code fails
        at both, or counts them as wrong.
        """
        named = {chr(ord("A") + at): text for at, text in enumerate(self.options)}
        said = reply.lower()
        if said[1:] and said[0] not in "abcd":
            shown = self.wording.option
            lines = {of: shown.format(letter=of, text=text).lower() for of, text in named.items()}
            return next((of for of, line in lines.items() if said in line or line in said), None)
        return next((of for of in named if of.lower() == said[:1]), None)


@dataclass(frozen=True)
class Turn:
    """A user turn, one of the prompts' templates, and the model's reply once there is one."""

    template: str
    reply: str | None = None


@dataclass(frozen=True)
class Text:
    """A run of text.

    `given` is where a person or the model wrote it, and no template. `reply` marks what the model
    generated, with its end, which is what a loss is over.
    """

    text: str
    given: Spans = ()
    reply: bool = False

    @classmethod
    def join(cls, parts: Iterable[tuple[str, bool]], *, reply: bool = False) -> Text:
        """One text of several, each with whether it is given."""
        text, given = "", []
        for part, is_given in parts:
            if is_given and part:
                given.append((len(text), len(text) + len(part)))
            text += part
        return cls(text, tuple(given), reply)

    @classmethod
    def concatenate(cls, texts: Iterable[Text]) -> Text:
        """One text of several; it is no reply."""
        return cls.join((part, is_given) for text in texts for part, is_given in text.parts)

    @property
    def parts(self) -> Iterator[tuple[str, bool]]:
        """Its parts in order, and whether each is given."""
        end = 0
        for start, stop in self.given:
            yield self.text[end:start], False
            yield self.text[start:stop], True
            end = stop
        yield self.text[end:], False


class Image:
    """The place of an image in a rendered dialogue."""


Piece = Text | Image


@dataclass(frozen=True)
class Prompt:
    """What the decoder is fed, and which of its positions are the model's replies, one range per reply."""

    tokens: tuple[Token, ...]
    replies: tuple[range, ...]


class Turns:
    """The protocol's four prompts for one question, ready for the decoder.

    `image` names the image that a prompt looks at, `crop` the region of it that the model's box `reply`
    led to. In `within` a crop, both images and the box before it come first.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, question: str | Question) -> None:
        """A text is parsed. Raises QuestionError as `Question` does, for a text of far too many characters,
        and for one that spells the mark of an image.

        A question's wording is for the table that its benchmark was worded for: a manifest with prompts
        of its own says what its model was trained on, and they stand.
        """
        prompts = manifest.prompts
        if isinstance(question, str):
            _check_size(len(question), manifest)
            question = Question.parse(question, prompts.hint)
        if not isinstance(question, Question):
            raise QuestionError(f"the question is of type {type(question).__name__}, expected text")
        texts = (question.first_line, question.whole, question.context, *question.options)
        _check_size(sum(map(len, texts)), manifest)
        if any(prompts.image in text for text in texts):
            raise QuestionError(
                f"the question holds {prompts.image!r}, which stands for a picture in this model's prompts: "
                "leave it out"
            )
        self.question = question
        self._manifest = manifest
        self._tokenizer = tokenizer
        own = Wording(prompts.locate, prompts.locate, prompts.select)
        self._wording = question.wording if prompts == DUALFOCUS else own
        self._encoded: dict[Text, Encoded] = {}
        self._images: tuple[str, ...] = ()
        self._history: tuple[Turn, ...] = ()

    def within(self, image: str, reply: str) -> Turns:
        """The prompts about a crop of `image`, after the box `reply` that led to it."""
        turns = copy.copy(self)
        turns._images = (*self._images, image)
        turns._history = (*self._history, Turn(self._wording.history, reply))
        return turns

    def macro(self, image: str) -> Prompt:
        """Step 1: the question, on the whole picture."""
        return self._prompt([image], Turn(self._manifest.prompts.macro))

    def locate(self, image: str) -> Prompt:
        """Step 2: where to look."""
        return self._prompt([image], Turn(self._wording.locate))

    def micro(self, image: str, crop: str, reply: str) -> Prompt:
        """Step 3: the question, on both images, with step 2 as history."""
        history = Turn(self._wording.history, reply)
        return self._prompt([image, crop], history, Turn(self._manifest.prompts.micro))

    def select(self, image: str, crop: str, reply: str, candidate: str) -> Prompt:
        """Step 4: a candidate answer to be scored; its replies are the boxes and the candidate."""
        wording = self._wording
        scored = Turn(wording.select, wording.candidate.replace("{answer}", candidate))
        return self._prompt([image, crop], Turn(wording.history, reply), scored)

    def check_length(self, *, macro_only: bool) -> None:
        """Raise QuestionError if a prompt, with the longest replies, would not fit the model's context."""
        manifest, longest = self._manifest, self._manifest.max_new_tokens
        need = len(self.macro("whole").tokens) + longest
        if not macro_only:
            micro = self.micro("whole", "crop", "")
            need = max(need, len(micro.tokens) + 2 * longest)
            options = self.question.options
            for candidate in options or [""]:  # what is scored is an option, or as long as a reply can be
                select = self.select("whole", "crop", "", candidate)
                need = max(need, len(select.tokens) + (1 if options else 2) * longest)
        if need > manifest.decoder.context:
            raise _too_long(need, manifest)

    def _prompt(self, images: Sequence[str], *turns: Turn) -> Prompt:
        manifest = self._manifest
        pieces = render(manifest.prompts, self.question, [*self._history, *turns])
        images = [*self._images, *images]
        length = manifest.image.tokens
        prompt = tokenize(pieces, self._tokenizer, manifest.tokens, images, length, self._encoded)
        if len(prompt.tokens) > manifest.decoder.context:
            raise _too_long(len(prompt.tokens), manifest)
        return prompt


def _check_size(characters: int, manifest: Manifest) -> None:
    """Refuse before tokenizing what could not fit: that takes memory and time, for megabytes much of both."""
    most = CHARACTERS * manifest.decoder.context
    if characters > most:
        raise QuestionError(
            f"the question is too long: it has {characters:,} characters, "
            f"for the model's {manifest.decoder.context} tokens at most {most:,} are read"
        )


def _too_long(need: int, manifest: Manifest) -> QuestionError:
    return QuestionError(
        f"the question is too long: with its pictures and answers it takes {need} tokens, "
        f"the model has room for {manifest.decoder.context}"
    )


def micro_answer(reply: str) -> str:
    """A candidate's final text from the micro pass's reply."""
    return reply.strip("\n").strip(".")


def render(prompts: Prompts, question: Question | None, turns: Sequence[Turn]) -> list[Piece]:
    """The dialogue of `turns` about `question`, or of turns that ask it themselves, as pieces in order."""
    pieces: list[Piece] = [Text(prompts.system)]
    before, after = prompts.user.split("{turn}")
    for turn in turns:
        texts = turn.template.split(prompts.image)
        for i, text in enumerate(texts):
            if i:
                pieces.append(Image())
            filled = question.fill(text) if question else Text.join([(text, True)])
            start, end = before if i == 0 else "", after if i == len(texts) - 1 else ""
            pieces.append(Text.join([(start, False), *filled.parts, (end, False)]))
        if turn.reply is not None:
            start, end = prompts.reply.split("{answer}")
            pieces.append(Text.join([(start, False), (turn.reply, True), (end, False)], reply=True))
    return pieces


def tokenize(
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    tokens: TokenSpec,
    images: Sequence[str],
    length: int,
    known: dict[Text, Encoded] | None = None,
) -> Prompt:
    """Tokenise rendered `pieces`; `images` names what stands at each image's place, `length` tokens long.

    `known` keeps what texts became for the next call: a question's prompts have most of theirs in common.
    Raises QuestionError as `markup.encode` does.
    """
    known = {} if known is None else known
    out: list[Token] = [] if tokens.bos is None else [tokens.bos]
    replies: list[range] = []
    names = iter(images)
    template = _template(pieces)
    for run in _runs(pieces):
        if isinstance(run, Image):
            name = next(names)
            out.extend(_image_tokens(name, length))
            continue
        whole = Text.concatenate(run)
        encoded = known.get(whole) or encode(tokenizer, whole.text, whole.given, template)
        known[whole] = encoded
        start = 0
        for piece in run:
            stop = start + len(piece.text)
            if piece.reply:
                # a token belongs to the text it ends in: "▁[" of ": [" is the reply's
                inside = [len(out) + i for i, end in enumerate(encoded.ends) if start < end <= stop]
                replies.append(range(inside[0], inside[-1] + 1))
            start = stop
        out.extend(encoded.ids)
    assert next(names, None) is None
    return Prompt(tuple(out), tuple(replies))


def _template(pieces: Iterable[Piece]) -> str:
    """All text that nobody gave."""
    texts = (piece.parts for piece in pieces if isinstance(piece, Text))
    return "\0".join(part for parts in texts for part, is_given in parts if not is_given)


@lru_cache(maxsize=64)
def _image_tokens(name: str, length: int) -> tuple[ImageToken, ...]:
    """The same objects in every prompt that shows the image, which makes comparing prompts fast."""
    return tuple(ImageToken(name, position) for position in range(length))


def _runs(pieces: Sequence[Piece]) -> Iterator[Image | list[Text]]:
    """The images, and between them the texts that are tokenised as one."""
    run: list[Text] = []
    for piece in pieces:
        if isinstance(piece, Text):
            run.append(piece)
            continue
        if run:
            yield run
        yield piece
        run = []
    if run:
        yield run
