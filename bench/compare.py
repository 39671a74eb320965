"""Two results of one benchmark, row by row: what changed.

``dualfocus bench compare OLD NEW`` goes through all figures that both results have. Where something was
timed, its medians are compared, and it counts as changed where the quartiles of both runs are apart. Figures
without quartiles are compared as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dualfocus.bench.harness import plain
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.files import convert, read_json

if TYPE_CHECKING:
    from rich.console import Console

CONDITIONS = ("processor", "cores", "isa", "governor", "memory", "threads", "spin", "environment", "system")
NAMES = ("peer", "precision", "part", "ours")  # what tells rows of a list from each other
CENTRES = ("median", "share", "mean")  # of a timing, of answers that are right, of pairs' differences
SKIPPED = ("schema", "machine", "timeline", "rounds", "share")  # not measured, or parts of what is


class _Machine(msgspec.Struct):
    date: str
    versions: dict[str, str]


class _Result(msgspec.Struct):
    """What every result has."""

    schema: int
    bench: str
    machine: _Machine


def read(path: Path) -> dict[str, Any]:
    """A result's file. InputError if it is none."""
    result = read_json(path, dict[str, Any], InputError)
    convert(result, _Result, InputError, f"{path} is not a benchmark's result")
    try:
        repr(result), *_figures(result)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be compared") from None
    return result


def run(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What changed from `old` to `new`, as the JSON object has it.

    InputError for results of different benchmarks or schemas.
    """
    for key, what in (("bench", "benchmarks"), ("schema", "schemas")):
        if old[key] != new[key]:
            raise InputError(f"these are results of two {what}, {old[key]!r:.60} and {new[key]!r:.60}")
    before, after = dict(_figures(old)), dict(_figures(new))
    rows = {name: _row(before[name], after[name]) for name in before if name in after}
    return {
        "bench": old["bench"],
        "dates": [old["machine"]["date"], new["machine"]["date"]],
        "differences": _differences(old, new),
        "rows": rows,
        "only_old": [name for name in before if name not in after],
        "only_new": [name for name in after if name not in before],
    }


def _figures(value: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, float]]]:
    """All figures by where they stand: centre and interval, or a figure that is its own centre."""
    if isinstance(value, Mapping):
        numbers = {key for key, of in value.items() if _is_number(of)}
        centre = next((key for key in CENTRES if {key, "low", "high"} <= numbers), None)
        if centre is not None:
            yield name, {"median": value[centre], "low": value["low"], "high": value["high"]}
        for key, of in value.items():
            ours = centre is not None and key in (centre, "low", "high", "p5", "p95")
            if not ours and key not in SKIPPED:
                yield from _figures(of, f"{name} / {key}" if name else key)
    elif isinstance(value, list):
        for i, of in enumerate(value):
            names = [str(of[key]) for key in NAMES if key in of] if isinstance(of, Mapping) else []
            yield from _figures(of, f"{name} / {' '.join(names) or i}")
    elif _is_number(value):
        yield name, {"median": value}


def _is_number(value: Any) -> bool:
    """One that can be compared and shown, which no more than a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _row(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, Any]:
    """Both medians, their ratio (None where the old one is 0), and whether it is more than chance."""
    timed = "low" in old and "low" in new
    changed = old["median"] != new["median"]
    if timed:
        changed = old["high"] < new["low"] or new["high"] < old["low"]
    ratio = new["median"] / old["median"] if old["median"] else None
    return {"old": old["median"], "new": new["median"], "ratio": ratio, "timed": timed, "changed": changed}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What else was not the same: the model, the machine, its threads, the versions."""
    before, after = old["machine"], new["machine"]
    pairs = {
        "bundle": (old.get("bundle"), new.get("bundle")),
        "rounds": (old.get("rounds"), new.get("rounds")),
    }
    pairs |= {name: (before.get(name), after.get(name)) for name in CONDITIONS}
    versions = before["versions"], after["versions"]
    pairs |= {
        f"{name}'s version": (versions[0].get(name), versions[1].get(name))
        for name in versions[0] | versions[1]
    }
    return {name: list(pair) for name, pair in pairs.items() if pair[0] != pair[1]}


def show(result: Mapping[str, Any], console: Console) -> None:
    """The comparison as a table for people. Figures that are no timings are shown where they differ."""
    from rich.table import Table

    console.print(plain(f"{result['bench']}, {result['dates'][0]} -> {result['dates'][1]}"))
    for name, (old, new) in result["differences"].items():
        console.print(plain(f"not the same {name}: {old} -> {new}"))
    table = Table(box=None, pad_edge=False)
    for column in ("", "old", "new", "new / old", ""):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        if row["timed"] or row["changed"]:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            mark = "changed" if row["changed"] and row["timed"] else ""
            table.add_row(plain(name), f"{row['old']:.6g}", f"{row['new']:.6g}", ratio, mark)
    console.print(table)
    for which in ("old", "new"):
        if names := result[f"only_{which}"]:
            console.print(plain(f"only in the {which} one: {', '.join(names)}"))
    console.print("changed: the intervals of both runs are apart", style="dim")
