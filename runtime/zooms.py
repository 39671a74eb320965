"""Several zooms: look again inside a crop that still holds much more than the model sees of it."""

from __future__ import annotations

from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.image import whole
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.protocol import Found, find, score
from dualfocus.runtime.result import Answer, FocusResult
from dualfocus.runtime.turns import micro_answer
from dualfocus.runtime.work import Encode, Generate, Steps, Task

LARGER = 1.5  # a crop whose longer side is so many times the model's input is looked into again


def zooms(
    task: Task, most: int, *, select: SelectRule | None = None, free_box: bool = False
) -> Steps[FocusResult]:
    """Zoom up to `most` times, answer behind each zoom, and keep the answer of the lowest loss.

    All answers are scored behind the last zoom. The result's region and micro answer are those of the zoom
    whose answer is best. Raises QuestionError as `protocol.focus` does.
    """
    turns, name, area = task.turns, task.name, whole(task.picture)
    turns.check_length(macro_only=False)
    yield [Encode(name, area)]
    look = find(task, turns, name, area, free_box=free_box)
    macro, found = yield [Generate("macro", turns.macro(name)), look]
    answer, draft = Answer.of(macro, turns.question), macro.tokens
    looks: list[tuple[Found, Answer]] = []
    while found.prompt is not None:
        (micro,) = yield [Generate("micro", found.prompt, draft=draft)]
        looks.append((found, Answer.of(micro, turns.question, micro_answer)))
        context = turns, name, found
        area, draft = found.region.crop, micro.tokens
        larger = max(area[2] - area[0], area[3] - area[1]) / task.manifest.image.size
        if len(looks) == most or larger < LARGER:
            break
        turns, name = turns.within(name, found.reply), found.crop
        try:
            found = yield from find(task, turns, name, area, free_box=free_box)
        except QuestionError:  # the context is full
            break
    if not looks:
        return FocusResult.conclude(answer, found.located, found.region, None)

    answers = [answer, *(micro for _, micro in looks)]
    named = [of for of in answers if of.letter] or answers  # of options, if any is named
    scored = yield from score(*context, named, select or task.manifest.select)
    losses = {id(of): with_loss for of, with_loss in zip(named, scored, strict=True)}
    answer, *closer = (losses.get(id(of), of) for of in answers)
    best = min(range(len(closer)), key=lambda at: (closer[at].letter is None, closer[at].loss or 0))
    found = looks[best][0]
    return FocusResult.conclude(answer, found.located, found.region, closer[best])
