"""Writes the tables of README and docs/ from results: ``python -m dualfocus.bench.readme [--check]``.

A table stands between two comments. It is replaced by what the benchmark's `markdown` makes of its result::

    <!-- bench:savings-edge -->
    ...
    <!-- /bench -->

The name is a result's, bench/results/DATE-NAME.json, of which the newest counts. Several results that share a
table are joined by "+". `--check` writes nothing, and exits with 1 if a table differs from its result.
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

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- bench:(?P<name>[\w.+-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
DATE = "????-??-??"


def newest(name: str) -> Path:
    """The newest result of that name. InputError if there is none."""
    found = sorted(harness.RESULTS.glob(f"{DATE}-{name}.json"))
    if not found:
        raise InputError(f"there is no result {harness.RESULTS / f'{DATE}-{name}.json'} to make a table of")
    return found[-1]


def table(names: str) -> str:
    """The table of the newest results of those names. InputError if their benchmark makes none."""
    paths = [newest(name) for name in names.split("+")]
    results = [read(path) for path in paths]
    # what has a score for each pass is a benchmark of answers
    bench = "accuracy" if "mode" in results[0] else results[0]["bench"]
    module = importlib.import_module(f"dualfocus.bench.{bench}")
    if not hasattr(module, "markdown"):
        raise InputError(f"{paths[0]}: the benchmark {bench} makes no table")
    return f"{module.markdown(*results)}\n"


def pages() -> list[Path]:
    """The files whose tables are generated."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def rewritten(page: Path) -> str:
    """The text of `page` with all its tables made anew. InputError for a marker that is never closed."""
    text = page.read_text(encoding="utf-8")
    opened, closed = len(re.findall(r"<!-- bench:", text)), len(TABLE.findall(text))
    if opened != closed:
        raise InputError(f"{page} has {opened} markers <!-- bench:NAME -->, {closed} with <!-- /bench -->")
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found['name'])}\n{found[3]}", text)


def main(arguments: Sequence[str]) -> int:
    """Rewrite or check all pages; returns the exit status."""
    if [*arguments] not in ([], ["--check"]):
        print("usage: python -m dualfocus.bench.readme [--check]", file=sys.stderr)
        return 2
    try:
        new = {page: rewritten(page) for page in pages()}
    except InputError as error:
        print(f"dualfocus: {error}", file=sys.stderr)
        return 2
    changed = {page: text for page, text in new.items() if text != page.read_text(encoding="utf-8")}
    for page, text in changed.items():
        if arguments:
            print(f"{page} differs from bench/results: run python -m dualfocus.bench.readme", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
    return int(bool(arguments and changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
