"""What the rule that chooses between the macro and the micro answer is worth, on the held-out scenes.

Every question is asked twice in dual mode, once with each loss that a runner knows. All other rules follow
from what was said then: which pass a gate skips, whether both passes agree, which answer was the surer one
when it was given. Of each rule the table tells how often it answers right, how much better than `reference`
it does on the same questions, and how often it takes the micro answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualfocus.bench import harness
from dualfocus.bench.harness import Watch
from dualfocus.bench.scenes import GROUPS, asked, is_right
from dualfocus.bench.scorers import paired, share
from dualfocus.runtime import Bundle, DualFocus
from dualfocus.runtime.result import Answer, Pass
from dualfocus.train.curate import Dialogue

if TYPE_CHECKING:
    from rich.console import Console

GATE = 0.9  # the confidence above which the macro answer stands


@dataclass(frozen=True)
class Judged:
    """A question's two answers: whether they are right, how sure they were, and what both losses choose."""

    category: str
    right: Mapping[Pass, bool]
    confidence: Mapping[Pass, float]
    agree: bool
    located: bool  # there is a micro answer
    reference: Pass
    answer: Pass

    @classmethod
    def of(cls, dialogue: Dialogue, macro: Answer, micro: Answer | None, **chosen: Pass) -> Judged:
        """Without a micro answer, the macro answer stands for it."""
        said: dict[Pass, Answer] = {"macro": macro, "micro": micro or macro}
        return cls(
            dialogue.category,
            {name: is_right(dialogue, answer.text) for name, answer in said.items()},
            {name: answer.generation.confidence for name, answer in said.items()},
            macro.text == said["micro"].text,
            micro is not None,
            **chosen,
        )


# which pass's answer is taken; None: none is
RULES: dict[str, Callable[[Judged], Pass | None]] = {
    "always macro": lambda a: "macro",
    "always micro": lambda a: "micro",
    "reference": lambda a: a.reference,
    "answer-only": lambda a: a.answer,
    f"gate {GATE}": lambda a: "macro" if a.confidence["macro"] > GATE else a.reference,
    "the surer one": lambda a: "micro" if a.confidence["micro"] > a.confidence["macro"] else "macro",
    "agreement": lambda a: "micro" if a.agree and a.located else None,
    "oracle": lambda a: "macro" if a.right["macro"] else "micro",
}


def run(
    bundle: Bundle,
    limit: int,
    threads: int | None,
    watch: Watch = lambda *_: None,
    *,
    spin: bool = True,
) -> dict[str, Any]:
    """All that is measured on the first `limit` held-out questions, as the JSON object has it.

    `threads` and `spin` are the opened bundle's.
    """
    runners = {rule: DualFocus(bundle, select=rule) for rule in ("reference", "answer")}
    judged: list[Judged] = []
    for i, (picture, dialogue) in enumerate(asked(limit)):
        watch("asking", i, limit)
        results = {rule: runner.ask(picture, dialogue.question) for rule, runner in runners.items()}
        chosen = {rule: result.chosen for rule, result in results.items()}
        macro, micro = results["reference"].macro, results["reference"].micro
        assert macro is not None
        judged.append(Judged.of(dialogue, macro, micro, **chosen))
    return harness.header("rules", threads, spin=spin, manifest=bundle.manifest) | {
        "questions": limit,
        "gate": GATE,
        "rules": {name: _worth(rule, judged) for name, rule in RULES.items()},
    }


def _worth(rule: Callable[[Judged], Pass | None], judged: Sequence[Judged]) -> dict[str, Any]:
    taken = [rule(a) for a in judged]
    right = [bool(name and a.right[name]) for name, a in zip(taken, judged, strict=True)]
    accuracy, gain = {}, {}
    for group, categories in GROUPS.items():
        of = [i for i, a in enumerate(judged) if a.category in categories]
        if of:
            accuracy[group] = share(sum(right[i] for i in of), len(of))
            gain[group] = paired([right[i] - judged[i].right[judged[i].reference] for i in of])
    answered = sum(name is not None for name in taken)
    return {
        "answered": answered / len(judged),
        "right_of_answered": share(sum(right), answered) if answered else None,
        "micro": sum(
            name == "micro" and a.located and not a.agree for name, a in zip(taken, judged, strict=True)
        )
        / len(judged),
        "accuracy": accuracy,
        "gain": gain,
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as a table for people, accuracies with 95 % intervals."""
    from rich.table import Table

    harness.show_machine(result["machine"], console)
    console.print(
        f"{result['bundle']}, {result['questions']} held-out questions; accuracy in percent", markup=False
    )
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for row in _rows(result):
        table.add_row(*row)
    console.print(table)


def markdown(result: Mapping[str, Any]) -> str:
    """The result as README's table."""
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *_rows(result)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


_COLUMNS = [
    "rule",
    *GROUPS,
    "against reference, points",
    "answers",
    "right of those",
    "takes micro against macro",
]


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, row in result["rules"].items():
        shares = [row["accuracy"].get(group) for group in GROUPS]
        gain = row["gain"]["all"]
        rows.append(
            [
                name,
                *(f"{100 * of['share']:.1f}" if of else "" for of in shares),
                f"{100 * gain['mean']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})",
                f"{100 * row['answered']:.1f} %",
                f"{100 * row['right_of_answered']['share']:.1f}" if row["right_of_answered"] else "",
                f"{100 * row['micro']:.1f} %",
            ]
        )
    return rows


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Every rule's accuracy on details, on global questions and on all, with 95 % intervals, as a picture."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    names = list(result["rules"])
    for i, (group, colour) in enumerate(zip(GROUPS, ("#ee6677", "#4477aa", "#222222"), strict=True)):
        found = [
            (j, row["accuracy"][group])
            for j, row in enumerate(result["rules"].values())
            if group in row["accuracy"]
        ]
        axis.errorbar(
            [100 * of["share"] for _, of in found],
            [j + 0.22 * (i - 1) for j, _ in found],
            xerr=np.array([[of["share"] - of["low"], of["high"] - of["share"]] for _, of in found]).T * 100,
            fmt="o",
            color=colour,
            label=group,
        )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("accuracy, percent (where it does not answer, an agreement is wrong)")
    axis.set_title(f"{result['bundle']}, {result['questions']} held-out questions")
    axis.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
