"""What answers are compared by: the loss of a candidate, and which texts are candidates."""

from __future__ import annotations

from collections.abc import Sequence

from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.result import Answer


def loss(box_reply: Sequence[float], candidate: Sequence[float], rule: SelectRule) -> float:
    """Mean negative log-likelihood of a candidate, from log-probabilities that count every end token.

    "reference" is the authors' code, whose label mask leaves the box reply in: it is common to both
    candidates, yet weighs a short one down less. "answer" is the candidate's tokens alone.
    """
    scored = [*box_reply, *candidate] if rule == "reference" else candidate
    return -sum(scored) / len(scored)


def candidates(answers: Sequence[Answer], options: Sequence[str]) -> list[str]:
    """The texts to score, one for each answer; none where there is nothing to decide.

    An answer is scored as it is, a letter as the text of its option.
    """
    if options and not all(answer.letter for answer in answers):
        return []
    texts = [options[ord(answer.letter) - ord("A")] if answer.letter else answer.text for answer in answers]
    return texts if len({*texts}) > 1 else []
