"""DualFocus for one question: read the whole picture, look at one region of it, keep the better answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.geometry import Crop, Region, find_region
from dualfocus.runtime.image import whole
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.result import Answer, FocusResult, Generation, Mode
from dualfocus.runtime.selection import candidates, loss
from dualfocus.runtime.turns import Prompt, Turns, micro_answer
from dualfocus.runtime.work import Encode, Generate, Score, Steps, Task


def focus(
    task: Task,
    mode: Mode = "dual",
    *,
    select: SelectRule | None = None,  # None: the manifest's
    free_box: bool = False,  # decode the box without its grammar
    skip_above: float | None = None,  # dual: a macro answer of more confidence stands
    box_reply: str | None = None,  # stands for the reply to the locate turn
) -> Steps[FocusResult]:
    """The paper's method. Raises QuestionError for a question that is too long, before any work."""
    turns, area = task.turns, whole(task.picture)
    name = task.image(area)
    turns.check_length(macro_only=mode == "macro")
    read = Generate("macro", turns.macro(name))
    search = find(task, turns, area, free_box=free_box, box_reply=box_reply)
    macro = micro = None
    found, skipped = Found(), False
    yield [Encode(area)]
    if mode == "dual" and skip_above is None:
        macro, found = yield [read, search]
    else:
        if mode != "micro":
            (macro,) = yield [read]
            skipped = skip_above is not None and mode == "dual" and macro.confidence > skip_above
        if mode != "macro" and not skipped:
            (found,) = yield [search]
    if found.look is not None:
        (micro,) = yield [Generate("micro", found.look.prompt, draft=macro.tokens if macro else ())]
    if macro is None and micro is None:  # the model points nowhere
        (macro,) = yield [read]
    answer = Answer.of(macro, turns.question) if macro else None
    closer = Answer.of(micro, turns.question, micro_answer) if micro else None
    if answer and closer and found.look and (texts := candidates((answer, closer), turns.question.options)):
        losses = yield from score(found.look, texts, select or task.manifest.select)
        answer, closer = replace(answer, loss=losses[0]), replace(closer, loss=losses[1])
    return FocusResult.conclude(answer, found.located, found.region, closer, skipped=skipped)


@dataclass(frozen=True)
class Look:
    """A region that the model names within an image, encoded: `prompt` shows both and asks the question."""

    turns: Turns  # those in which it is named
    image: str
    reply: str  # that names it
    crop: Crop
    name: str  # of the crop
    prompt: Prompt


@dataclass(frozen=True)
class Found:
    """Where a model points; `look` is None without a usable region."""

    region: Region = field(default_factory=Region)
    located: Generation | None = None  # None: nothing was generated
    look: Look | None = None


def find(
    task: Task, turns: Turns, area: Crop, *, free_box: bool, box_reply: str | None = None
) -> Steps[Found]:
    """Ask where to look in the image of `area`, and encode what is there."""
    image, manifest, located, look = task.image(area), task.manifest, None, None
    if box_reply is None:
        (located,) = yield [Generate("locate", turns.locate(image), None if free_box else task.grammar)]
        box_reply = located.text
    left, top, right, bottom = area
    region = find_region(box_reply, manifest.coordinates, right - left, bottom - top, manifest.image)
    region = region.moved(left, top)
    if region.crop is not None:
        name = task.image(region.crop)
        try:
            prompt = turns.micro(image, name, box_reply)
            look = Look(turns, image, box_reply, region.crop, name, prompt)
        except QuestionError as error:  # in the history, a reply can take more tokens than when decoded
            region = Region(region.box, None, str(error))
    yield [region]
    if look is not None:
        yield [Encode(look.crop)]
    return Found(region, located, look)


def score(look: Look, texts: Sequence[str], rule: SelectRule) -> Steps[list[float | None]]:
    """The losses of candidate answers in the context of `look`; None where they do not fit in."""
    try:
        prompts = [look.turns.select(look.image, look.name, look.reply, text) for text in texts]
    except QuestionError:
        return [None] * len(texts)
    scored = yield [Score(prompt) for prompt in prompts]
    return [loss(earlier, last, rule) for earlier, last in scored]
