"""Several zooms: look again inside a crop that still holds much more than the model sees of it."""

from __future__ import annotations

from dataclasses import replace

from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.image import whole
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.protocol import Found, find, score
from dualfocus.runtime.result import Answer, FocusResult
from dualfocus.runtime.selection import candidates
from dualfocus.runtime.turns import Turns, micro_answer
from dualfocus.runtime.work import Encode, Generate, Steps, Task

LARGER = 2.0  # a crop whose longer side is so many times the model's input is looked into again


def zooms(
    task: Task, most: int, *, select: SelectRule | None = None, free_box: bool = False
) -> Steps[FocusResult]:
    """Zoom up to `most` times, answer behind each zoom, and keep the answer of the lowest loss.

    Of one zoom, this is `protocol.focus`. Of several, each answer is scored behind the zoom that gave it, the
    macro answer behind the first, by the tokens of the answer alone: behind the last zoom, its own greedy
    answer nearly always wins. The result's region is that of the best micro answer. Raises QuestionError.
    """
    turns, name, area = task.turns, task.name, whole(task.picture)
    turns.check_length(macro_only=False)
    yield [Encode(name, area)]
    look = find(task, turns, name, area, free_box=free_box)
    macro, found = yield [Generate("macro", turns.macro(name)), look]
    answers, draft = [Answer.of(macro, turns.question)], macro.tokens
    looks: list[tuple[Turns, str, Found]] = []
    while found.prompt is not None:
        (micro,) = yield [Generate("micro", found.prompt, draft=draft)]
        answers.append(Answer.of(micro, turns.question, micro_answer))
        looks.append((turns, name, found))
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
        return FocusResult.conclude(answers[0], found.located, found.region, None)

    named = [at for at, answer in enumerate(answers) if answer.letter] or list(range(len(answers)))
    texts = candidates([answers[at] for at in named], task.turns.question.options)
    rule = (select or task.manifest.select) if len(looks) == 1 else "answer"
    pairs = list(zip(named, texts, strict=True)) if texts else []
    losses = yield [score(*looks[max(at - 1, 0)], [text], rule) for at, text in pairs]
    if [None] not in losses:
        for (at, _), (loss,) in zip(pairs, losses, strict=True):
            answers[at] = replace(answers[at], loss=loss)
    best = min(range(len(looks)), key=lambda at: (answers[at + 1].letter is None, answers[at + 1].loss or 0))
    found = looks[best][2]
    return FocusResult.conclude(answers[0], found.located, found.region, answers[best + 1])
