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
    turns, name, area = task.turns, task.name, whole(task.picture)
    turns.check_length(macro_only=mode == "macro")
    read = Generate("macro", turns.macro(name))
    look = find(task, turns, name, area, free_box=free_box, box_reply=box_reply)
    macro = micro = None
    found, skipped = Found(), False
    yield [Encode(name, area)]
    if mode == "dual" and skip_above is None:
        macro, found = yield [read, look]
    else:
        if mode != "micro":
            (macro,) = yield [read]
            skipped = skip_above is not None and mode == "dual" and macro.confidence > skip_above
        if mode != "macro" and not skipped:
            (found,) = yield [look]
    if found.prompt is not None:
        (micro,) = yield [Generate("micro", found.prompt, draft=macro.tokens if macro else ())]
    if macro is None and micro is None:  # the model points nowhere
        (macro,) = yield [read]
    answer = Answer.of(macro, turns.question) if macro else None
    closer = Answer.of(micro, turns.question, micro_answer) if micro else None
    if answer and closer and (texts := candidates((answer, closer), turns.question.options)):
        losses = yield from score(turns, name, found, texts, select or task.manifest.select)
        answer, closer = replace(answer, loss=losses[0]), replace(closer, loss=losses[1])
    return FocusResult.conclude(answer, found.located, found.region, closer, skipped=skipped)


@dataclass(frozen=True)
class Found:
    """The region to look at, and the micro prompt that shows it: None without a usable region."""

    region: Region = field(default_factory=Region)
    reply: str = ""
    located: Generation | None = None  # None: the reply was given
    crop: str = ""
    prompt: Prompt | None = None


def find(
    task: Task, turns: Turns, name: str, area: Crop, *, free_box: bool, box_reply: str | None = None
) -> Steps[Found]:
    """Ask where in the image `name`, which shows `area` of the picture, to look; encode what is there."""
    located = None
    if box_reply is None:
        (located,) = yield [Generate("locate", turns.locate(name), None if free_box else task.grammar)]
        box_reply = located.text
    (left, top, right, bottom), manifest = area, task.manifest
    region = find_region(box_reply, manifest.coordinates, right - left, bottom - top, manifest.image)
    region = region.moved(left, top)
    found = Found(region, box_reply, located)
    if region.crop is not None:
        crop = f"{task.name} {region.crop}"
        try:
            found = replace(found, crop=crop, prompt=turns.micro(name, crop, box_reply))
        except QuestionError as error:  # in the history, a reply can take more tokens than when decoded
            found = replace(found, region=Region(region.box, None, str(error)))
    yield [found.region]
    if found.region.crop is not None:
        yield [Encode(found.crop, found.region.crop)]
    return found


def score(
    turns: Turns, name: str, found: Found, texts: Sequence[str], rule: SelectRule
) -> Steps[list[float | None]]:
    """The losses of candidate answers in the context of `found`; None where they do not fit in."""
    try:
        prompts = [turns.select(name, found.crop, found.reply, text) for text in texts]
    except QuestionError:
        return [None] * len(texts)
    scored = yield [Score(prompt) for prompt in prompts]
    return [loss(earlier, last, rule) for earlier, last in scored]
