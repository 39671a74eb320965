"""Several zooms: look again inside a crop that still holds much more than the model sees of it."""

from __future__ import annotations

from dataclasses import replace

from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.image import whole
from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.protocol import Found, Look, find, score
from dualfocus.runtime.result import Answer, FocusResult
from dualfocus.runtime.selection import candidates
from dualfocus.runtime.turns import micro_answer
from dualfocus.runtime.work import Encode, Generate, Steps, Task

LARGER = 2.0  # a crop whose longer side is so many times the model's input is looked into again


def zooms(
    task: Task, most: int, *, select: SelectRule | None = None, free_box: bool = False
) -> Steps[FocusResult]:
    """Zoom up to `most` times, answer after each zoom, and keep the answer of the lowest loss.

    One zoom is `protocol.focus`. Of several, each answer is scored in the context that gave it, the macro
    answer in that of the first zoom, over the answer's tokens alone: in the context of the last zoom, its own
    greedy answer nearly always wins. The result has the region of the best micro answer.
    """
    assert most >= 1, f"most is {most}"
    turns, area = task.turns, whole(task.picture)
    turns.check_length(macro_only=False)
    yield [Encode(area)]
    search = find(task, turns, area, free_box=free_box)
    macro, found = yield [Generate("macro", turns.macro(task.image(area))), search]
    answers, draft = [Answer.of(macro, turns.question)], macro.tokens
    looks: list[tuple[Found, Look]] = []
    while found.look is not None:
        look = found.look
        (micro,) = yield [Generate("micro", look.prompt, draft=draft)]
        answers.append(Answer.of(micro, turns.question, micro_answer))
        looks.append((found, look))
        area, draft = look.crop, micro.tokens
        larger = max(area[2] - area[0], area[3] - area[1]) / task.manifest.image.size
        if len(looks) == most or larger < LARGER:
            break
        turns = turns.within(look.image, look.reply)
        try:
            found = yield from find(task, turns, area, free_box=free_box)
        except QuestionError:  # the context is full
            break
    if not looks:
        return FocusResult.conclude(answers[0], found.located, found.region, None)

    named = [at for at, answer in enumerate(answers) if answer.letter] or list(range(len(answers)))
    texts = candidates([answers[at] for at in named], turns.question.options)
    rule = (select or task.manifest.select) if len(looks) == 1 else "answer"
    pairs = list(zip(named, texts, strict=True)) if texts else []
    losses = yield [score(looks[max(at - 1, 0)][1], [text], rule) for at, text in pairs]
    if [None] not in losses:
        for (at, _), (loss,) in zip(pairs, losses, strict=True):
            answers[at] = replace(answers[at], loss=loss)
    best = min(range(len(looks)), key=lambda at: (answers[at + 1].letter is None, answers[at + 1].loss or 0))
    found, _ = looks[best]
    return FocusResult.conclude(answers[0], found.located, found.region, answers[best + 1])
