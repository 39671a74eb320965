"""Tells regular expressions that are harmless from those that are not, or not known to be.

A tokenizer splits text by expressions from its file, and the library's engine backtracks. After ten million
steps it panics. So a bundle's expressions have to be of a form that cannot take so many:

    a repeated group holds neither alternatives nor items of varying length;
    of a run of items, two are repeated at most, and only optional ones follow the second;
    there are no references, names, conditions or options but (?i: ...).

Those of GPT, Llama, Qwen and DeepSeek are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LENGTH, DEPTH = 2000, 8
ALTERNATIVES = 16  # of a group
OPTIONAL = 4  # items of a run that leave a choice: optional ones, and groups of alternatives
COPIES = 100  # of a repeated item, where their number is given

_ESCAPE = r"""\\p\{\^?\w{1,40}\} | \\P\{\w{1,40}\} | \\x[0-9A-Fa-f]{2} | \\u[0-9A-Fa-f]{4}
    | \\[dDwWsSnrtfv] | \\[^\w\s]"""
_ITEM = re.compile(
    rf"""(?P<group> \( (?: \?: | \?i: | \?> | (?P<around> \?<?[=!] ) | (?!\?) ) )
    | (?P<edge> \\[bBAzZ] | \^ | \$ )
    | {_ESCAPE} | [^\\()\[\]{{}}|?*+^$] | \[ \^? (?: {_ESCAPE} | [^\\\[\]&] | &(?!&) )+ \]""",
    re.X,
)
_QUANTIFIER = re.compile(
    r"(?P<maybe>\?)[?+]? | [*+][?+]? | \{(?P<least>\d{1,3}) (?P<most>,(?:\d{1,3})?)? \}(?![?+])", re.X
)


@dataclass
class _Run:
    """How many items of a run are repeated, and how many leave a choice; of alternatives, the most."""

    repeated: int = 0
    optional: int = 0


class _RefusedError(Exception):
    """A form that is not known to be harmless."""


def is_harmless(pattern: str) -> bool:
    """Whether searching n characters takes a number of steps of the order of n x n at most."""
    try:
        return len(pattern) <= LENGTH and _alternatives(pattern, 0, 0)[1] == len(pattern)
    except _RefusedError:
        return False


def _alternatives(pattern: str, at: int, depth: int) -> tuple[_Run, int]:
    """What begins at `at`, and where it ends: at a closing parenthesis, or with the pattern."""
    if depth > DEPTH:
        raise _RefusedError
    runs: list[_Run] = []
    while not runs or pattern[at : at + 1] == "|":
        run, at = _run(pattern, at + bool(runs), depth)
        runs.append(run)
    if depth and len(runs) > ALTERNATIVES:
        raise _RefusedError
    chosen = int(depth > 0 and len(runs) > 1)
    return _Run(max(run.repeated for run in runs), max(run.optional for run in runs) + chosen), at


def _run(pattern: str, at: int, depth: int) -> tuple[_Run, int]:
    run = _Run()
    while at < len(pattern) and pattern[at] not in "|)":
        item, at, needed = _item(pattern, at, depth)
        if needed and run.repeated == 2:
            raise _RefusedError
        run = _Run(run.repeated + item.repeated, run.optional + item.optional)
        if run.repeated > 2 or run.optional > OPTIONAL:
            raise _RefusedError
    return run, at


def _item(pattern: str, at: int, depth: int) -> tuple[_Run, int, bool]:
    """An item with its quantifier, where it ends, and whether it has to be there."""
    found = _ITEM.match(pattern, at)
    if found is None:
        raise _RefusedError
    inside, at = _Run(), found.end()
    if found["group"]:
        inside, at = _alternatives(pattern, at, depth + 1)
        if pattern[at : at + 1] != ")":
            raise _RefusedError
        at += 1
    quantifier = _QUANTIFIER.match(pattern, at)
    if quantifier is None:
        return inside, at, True
    at = quantifier.end()
    if found["around"] or found["edge"]:
        raise _RefusedError
    if quantifier["maybe"]:
        return _Run(inside.repeated, inside.optional + 1), at, False
    if inside != _Run() or int(quantifier["least"] or 0) > COPIES:
        raise _RefusedError
    varies = quantifier["least"] is None or quantifier["most"] is not None
    return _Run(int(varies)), at, True
