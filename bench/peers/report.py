"""What `bench.peers.run` found, for people: tables, and a picture of bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualfocus.bench import harness
from dualfocus.bench.peers.base import PARTS, PRECISIONS

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = dict(zip(PRECISIONS, ("#4477aa", "#66ccee", "#228833", "#ccbb44"), strict=True))

WANTED_OF = "edge"  # the shape that figures are wanted of
VERDICTS = {None: "not measured", True: "met", False: "missed"}


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as tables for people."""
    harness.show_machine(result["machine"], console)
    for name, peer in result["peers"].items():
        versions = ", ".join(f"{package} {version}" for package, version in peer["versions"].items())
        console.print(f"{name}: {peer.get('cannot', versions)}", markup=False, highlight=False)
    console.print(
        f"\n{result['bundle']}, {result['rounds']} rounds; medians, and how many times as long it takes as "
        "ours in the same precision",
        markup=False,
    )
    for part in PARTS:
        _show_part(part, result["rows"], console)
    opened = [row for row in result["rows"] if "parts" in row]
    _print_table(
        console,
        "memory, and work while others had their turn",
        ("", "", "peak RSS, MB", "idle, ms"),
        (
            [row["peer"], row["precision"], f"{row['peak_rss'] / 1e6:.0f}", f"{row['idle_ms']:.1f}"]
            for row in opened
        ),
    )
    _print_table(
        console,
        f"wanted of the shape `{WANTED_OF}`: how many times as long the other takes",
        ("", "ours", "other", "wanted", "found", ""),
        (
            [
                target["part"],
                target["ours"],
                target["other"],
                target["wanted"],
                _number(target["value"]),
                VERDICTS[target["met"]],
            ]
            for target in result["wanted"]
        ),
    )
    if result["quality"] is not None:
        _show_quality(result["quality"], console)


def _show_part(part: str, rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    cells, cannot = [], []
    for row in rows:
        entry = row.get("parts", {}).get(part, row)
        if "cannot" in entry:
            cannot.append(f"{row['peer']} {row['precision']}: {entry['cannot']}")
            continue
        counts = entry["counts"]
        cells.append(
            [
                row["peer"],
                row["precision"],
                row["form"],
                f"{entry['median']:.1f}",
                f"{entry['low']:.1f} - {entry['high']:.1f}",
                _number(entry["ratio"]),
                _number(entry.get("tokens_per_s"), 1),
                *(str(counts[name] or "") for name in ("vision_encodes", "tokens_prefilled", "decode_steps")),
            ]
        )
    columns = ("", "", "form", "ms", "quartiles", "/ ours", "tokens/s", "encodes", "prefilled", "steps")
    _print_table(console, part, columns, cells)
    for line in cannot:
        console.print(line, style="dim", markup=False, highlight=False)


def _show_quality(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    cells, cannot = [], []
    for row in rows:
        if "cannot" in row:
            cannot.append(f"{row['peer']} {row['precision']}: {row['cannot']}")
            continue
        right, vision = row["accuracy"], row["vision"] or {}
        interval = f"({100 * right['low']:.1f} - {100 * right['high']:.1f})"
        cells.append(
            [
                row["peer"],
                row["precision"],
                str(row["questions"]),
                f"{100 * right['share']:.1f} {interval}",
                f"{row['kl']:.5f}",
                f"{row['top1']:.4f}",
                _number(vision.get("relative"), 5),
                _number(vision.get("cosine"), 5),
            ]
        )
    columns = ("", "", "questions", "right, %", "KL", "top-1", "vision error", "cosine")
    _print_table(console, "quality on held-out scenes, against our float32", columns, cells)
    for line in cannot:
        console.print(line, style="dim", markup=False, highlight=False)


def markdown(result: Mapping[str, Any]) -> str:
    """The result as README's tables: of random weights every part of every row and what is wanted, of a
    checkpoint what the precisions cost in quality."""
    if result["quality"] is not None:
        return "\n".join(_quality_lines(result["quality"]))
    machine, peers = result["machine"], result["peers"]
    versions = [
        f"{package} {version}" for peer in peers.values() for package, version in peer["versions"].items()
    ]
    lines = [
        f"{result['bundle']}, {machine['threads']} threads, medians of {result['rounds']} rounds; "
        f"{', '.join(dict.fromkeys(versions))}.",
        "",
        "| | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for row in result["rows"]:
        parts = row.get("parts", {})
        cells = [_cell(parts.get(part, row)) for part in COLUMNS]
        lines.append(f"| {row['peer']} {row['precision']} | {' | '.join(cells)} |")
    lines += ["", *_reasons(result)]
    if result["bundle"] == WANTED_OF:
        lines += ["", "| times as long as ours | the other | wanted | found |", "|---|---|---|---|"]
        for target in result["wanted"]:
            found = VERDICTS[target["met"]] if target["value"] is None else f"{target['value']:.2f}"
            told = f"{target['part']}, {target['ours']}", target["other"], target["wanted"][3:]
            lines.append(
                f"| {' | '.join(told)} | {f'**{found}**, missed' if target['met'] is False else found} |"
            )
    return "\n".join(lines)


def _quality_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield "| | right, % | KL | same best token, % | vision error, % |"
    yield "|---|---|---|---|---|"
    for row in rows:
        cells = [f"cannot: {row['cannot']}"] if "cannot" in row else _quality_cells(row)
        yield f"| {row['peer']} {row['precision']} | {' | '.join(cells)} |"


COLUMNS = {
    "vision": "vision, ms",
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
    "decode, two rows": "two rows, tokens/s",
    "question as shipped": "question, ms",
    "question with reuse": "reusing, ms",
}  # of README's table


def _cell(entry: Mapping[str, Any]) -> str:
    return "-" if "cannot" in entry else f"{entry.get('tokens_per_s', entry['median']):,.0f}"


def _reasons(result: Mapping[str, Any]) -> list[str]:
    """Why some cells hold no figure."""
    found = [f"- {name}: {peer['cannot']}" for name, peer in result["peers"].items() if "cannot" in peer]
    parts: dict[tuple[str, str], list[str]] = {}  # by peer and reason
    for row in result["rows"]:
        if "cannot" in row:
            found.append(f"- {row['peer']} {row['precision']}: {row['cannot']}")
        for part, entry in row.get("parts", {}).items():
            if "cannot" in entry:
                parts.setdefault((row["peer"], entry["cannot"]), []).append(part)
    return found + [
        f"- {peer}, {', '.join(dict.fromkeys(of))}: {reason}" for (peer, reason), of in parts.items()
    ]


def _quality_cells(row: Mapping[str, Any]) -> list[str]:
    vision = row["vision"]
    return [
        f"{100 * row['accuracy']['share']:.1f}",
        f"{row['kl']:.5f}",
        f"{100 * row['top1']:.2f}",
        "" if vision is None else f"{100 * vision['relative']:.2f}",
    ]


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns without a heading, and those that name something, are flush left; the others hold numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "form", "ours", "other") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", markup=False, highlight=False, style="bold")
    console.print(table)


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A bar for each row and part, as a picture at `path`; its number is how many times as long as ours."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, part in zip(axes.flat, PARTS, strict=True):
        timed = [
            (row, entry)
            for row in result["rows"]
            if "median" in (entry := row.get("parts", {}).get(part, {}))
        ]
        medians = [entry["median"] for _, entry in timed]
        reach = [
            [entry["median"] - entry["low"] for _, entry in timed],
            [entry["high"] - entry["median"] for _, entry in timed],
        ]
        names = [f"{row['peer']} {row['precision']}" for row, _ in timed]
        colours = [COLOURS[row["precision"]] for row, _ in timed]
        bars = axis.barh(names, medians, xerr=reach, color=colours, ecolor="#222222")
        ratios = [entry["ratio"] for _, entry in timed]
        axis.bar_label(bars, ["" if ratio is None else f" {ratio:.2f} x" for ratio in ratios])
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(part)
    axes[1, 1].set_xlabel(
        f"ms (median and quartiles of {result['rounds']}); x: times ours in the same precision"
    )
    handles = [Patch(color=colour, label=precision) for precision, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))
    figure.suptitle(f"{result['bundle']}, {result['machine']['processor']}")
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
