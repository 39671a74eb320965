"""Which of two candidate answers is taken: the one with the lower loss, the macro answer when equal."""

from __future__ import annotations

from collections.abc import Sequence

from dualfocus.runtime.manifest import SelectRule


def loss(box_reply: Sequence[float], candidate: Sequence[float], rule: SelectRule) -> float:
    """Mean negative log-likelihood of a candidate, from log-probabilities that count every end token.

    "reference" is the authors' code, whose label mask leaves the box reply in: it is common to both
    candidates, yet weighs a short one down less. "answer" is the candidate's tokens alone.
    """
    scored = [*box_reply, *candidate] if rule == "reference" else candidate
    return -sum(scored) / len(scored)
