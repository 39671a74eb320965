"""Which of two candidate answers is taken: the one with the lower loss, the macro answer when equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dualfocus.runtime.manifest import SelectRule
from dualfocus.runtime.result import Answer
from dualfocus.runtime.sequence import UNKNOWN, CachedSequence, Extension
from dualfocus.runtime.turns import Prompt


def loss(box_reply: Sequence[float], candidate: Sequence[float], rule: SelectRule) -> float:
    """Mean negative log-likelihood of a candidate, from log-probabilities that count every end token.

    "reference" is the authors' code, whose label mask leaves the box reply in: it is common to both
    candidates, yet weighs a short one down less. "answer" is the candidate's tokens alone.
    """
    scored = [*box_reply, *candidate] if rule == "reference" else candidate
    return -sum(scored) / len(scored)


def candidates(macro: Answer | None, micro: Answer | None, options: Sequence[str]) -> tuple[str, str] | None:
    """The texts to score for both answers, None where there is nothing to decide.

    An answer is scored as it is, a letter as the text of its option.
    """
    if macro is None or micro is None or (options and not (macro.letter and micro.letter)):
        return None
    texts = [
        options[ord(answer.letter) - ord("A")] if answer.letter else answer.text for answer in (macro, micro)
    ]
    return None if texts[0] == texts[1] else (texts[0], texts[1])


class Candidate:
    """A candidate answer in its select `prompt`, to be scored on `row`."""

    def __init__(self, prompt: Prompt, row: CachedSequence, *, recall: bool) -> None:
        """`recall` begins with what the row knows already."""
        self.prompt = prompt
        self.row = row
        self._scored = [at for reply in prompt.replies for at in reply]
        self._logprobs = [UNKNOWN] * len(self._scored)
        if recall:
            self.look()

    @property
    def unknown(self) -> list[int]:
        """The positions of the tokens whose log-probabilities are not known."""
        scored = zip(self._scored, self._logprobs, strict=True)
        return [at for at, logprob in scored if math.isnan(logprob)]

    def up_to(self, length: int) -> Extension:
        """What brings the row to the prompt's first `length` tokens, and makes known what they tell."""
        after = {at - 1 for at in self.unknown if at <= length} | {length - 1}
        return Extension.to(self.row, self.prompt.tokens[:length], sorted(after))

    def look(self) -> None:
        """Take what the row knows by now."""
        found = self.row.recall(self.prompt.tokens, self._scored)
        pairs = zip(self._logprobs, found, strict=True)
        self._logprobs = [new if math.isnan(old) else old for old, new in pairs]

    def loss(self, rule: SelectRule) -> float:
        """The loss by `rule`; every token has to be known."""
        assert not self.unknown
        box = len(self.prompt.replies[0])
        return loss(self._logprobs[:box], self._logprobs[box:], rule)
