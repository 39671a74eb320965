"""README's tables, written from the newest results: ``python -m dualfocus.bench.readme [--check]``.

A table stands between two comments, and is replaced by what the benchmark's `markdown` makes of its result::

    <!-- bench:savings-edge -->
    ...
    <!-- /bench -->

The name is a result's, bench/results/DATE-NAME.json, of which the newest counts; several that share a table
are joined by "+". `--check` writes nothing, and exits with 1 where a table is not what it would be.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dualfocus.bench import harness
from dualfocus.bench.compare import read
from dualfocus.runtime.errors import InputError

README = Path(__file__).resolve().parent.parent / "README.md"
TABLE = re.compile(r"(<!-- bench:(?P<name>[\w.+-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
DATE = "????-??-??"


def newest(name: str) -> Path:
    """The newest result of that name. InputError if there is none."""
    found = sorted(harness.RESULTS.glob(f"{DATE}-{name}.json"))
    if not found:
        raise InputError(f"there is no result {harness.RESULTS / f'{DATE}-{name}.json'} for README's table")
    return found[-1]


def table(names: str) -> str:
    """The table of the newest results of those names. InputError if their benchmark makes none."""
    paths = [newest(name) for name in names.split("+")]
    results = [read(path) for path in paths]
    # what has a score for each pass is a benchmark of answers
    bench = "accuracy" if "mode" in results[0] else results[0]["bench"]
    module = importlib.import_module(f"dualfocus.bench.{bench}")
    if not hasattr(module, "markdown"):
        raise InputError(f"{paths[0]}: the benchmark {bench} makes no table for README")
    return f"{module.markdown(*results)}\n"


def rewritten(text: str) -> str:
    """README's text with all its tables made anew. InputError for a marker that is never closed."""
    opened, closed = len(re.findall(r"<!-- bench:", text)), len(TABLE.findall(text))
    if opened != closed:
        raise InputError(
            f"README has {opened} markers <!-- bench:NAME -->, and {closed} with <!-- /bench --> behind"
        )
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found['name'])}\n{found[3]}", text)


def main(arguments: Sequence[str]) -> int:
    """Rewrite or check README; returns the exit status."""
    if [*arguments] not in ([], ["--check"]):
        print("usage: python -m dualfocus.bench.readme [--check]", file=sys.stderr)
        return 2
    text = README.read_text(encoding="utf-8")
    try:
        new = rewritten(text)
    except InputError as error:
        print(f"dualfocus: {error}", file=sys.stderr)
        return 2
    if arguments:
        if new != text:
            print(
                "README.md is not what bench/results say: python -m dualfocus.bench.readme", file=sys.stderr
            )
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
