"""Two results compared, and the documentation's tables made from results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dualfocus import cli
from dualfocus.bench import compare, harness, readme, savings
from dualfocus.runtime.errors import InputError


def timing(median: float, reach: float) -> dict[str, float]:
    low, high = median - reach, median + reach
    return {"median": median, "low": low, "high": high, "p5": low - 1, "p95": high + 1}


@pytest.fixture
def old() -> dict[str, Any]:
    rows = {
        "decode": timing(10.0, 1.0) | {"tokens": 5},
        "prefill": timing(100.0, 5.0),
        "gone": timing(1.0, 0),
    }
    return harness.header("stages", 2) | {"bundle": "nano", "rounds": 9, "stages": rows, "question": "What?"}


@pytest.fixture
def new(old: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(old)
    changed["stages"] = {
        "decode": timing(7.0, 1.5) | {"tokens": 4},
        "prefill": timing(104.0, 4.0),
        "select": timing(3.0, 0),
    }
    return changed


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", "compare", *map(str, arguments)])


def kept(folder: Path, result: dict[str, Any], name: str) -> Path:
    path = folder / name
    path.write_text(json.dumps(result))
    return path


def test_rows_are_compared_by_their_medians_and_quartiles(old: dict[str, Any], new: dict[str, Any]) -> None:
    result = compare.run(old, new)
    assert result["rows"] == {
        "stages / decode": {"old": 10, "new": 7, "ratio": 0.7, "timed": True, "changed": True},
        "stages / decode / tokens": {"old": 5, "new": 4, "ratio": 0.8, "timed": False, "changed": True},
        # 95 to 105, and 100 to 108
        "stages / prefill": {"old": 100, "new": 104, "ratio": 1.04, "timed": True, "changed": False},
    }
    assert result["only_old"] == ["stages / gone"]
    assert result["only_new"] == ["stages / select"]
    assert result["differences"] == {}
    touching = copy.deepcopy(old)
    touching["stages"]["decode"] = timing(12.0, 1.0)  # 9 to 11, and 11 to 13
    assert not compare.run(old, touching)["rows"]["stages / decode"]["changed"]
    assert compare.run(touching | {"x": 0}, touching | {"x": 3})["rows"]["x"]["ratio"] is None


def test_shares_of_right_answers_are_compared(old: dict[str, Any]) -> None:
    def share(right: float) -> dict[str, Any]:
        return {"accuracy": {"share": right, "low": right - 0.1, "high": right + 0.1}}

    rows = compare.run(old | share(0.5), old | share(0.75))["rows"]
    assert rows["accuracy"] == {"old": 0.5, "new": 0.75, "ratio": 1.5, "timed": True, "changed": True}
    assert not compare.run(old | share(0.5), old | share(0.625))["rows"]["accuracy"]["changed"]


def test_rows_of_a_list_go_by_their_names(old: dict[str, Any]) -> None:
    rows = [
        {"peer": peer, "precision": "int8", "decode": timing(ms, 0)} for peer, ms in (("a", 2.0), ("b", 3.0))
    ]
    before = old | {"rows": rows, "plain": [1, 2]}
    after = old | {"rows": [{**rows[1], "decode": timing(6.0, 0)}, rows[0]], "plain": [1, 3]}
    ratios = {name: row["ratio"] for name, row in compare.run(before, after)["rows"].items()}
    assert ratios["rows / a int8 / decode"] == 1
    assert ratios["rows / b int8 / decode"] == 2
    assert ratios["plain / 1"] == 1.5


def test_what_was_not_the_same_is_said(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    new["bundle"], new["machine"]["threads"], new["machine"]["processor"] = "edge", 1, "another"
    new["machine"]["load"] = [9, 9, 9]  # which nobody expects to be the same
    new["machine"]["versions"]["numpy"] = "1.0"
    del new["machine"]["versions"]["pillow"]
    result = compare.run(old, new)
    assert list(result["differences"]) == [
        "bundle", "processor", "threads", "numpy's version", "pillow's version"
    ]  # fmt: skip
    assert result["differences"]["threads"] == [2, 1]
    assert result["differences"]["pillow's version"] == [old["machine"]["versions"]["pillow"], None]
    done = run(kept(tmp_path, old, "a.json"), kept(tmp_path, new, "b.json"))
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "not the same threads: 2 -> 1\n" in done.stdout
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert lines["stages / decode"].rstrip().endswith("changed")
    assert not lines["stages / prefill"].rstrip().endswith("changed")
    assert "only in the new one: stages / select" in done.stdout
    told = run(kept(tmp_path, old, "a.json"), kept(tmp_path, new, "b.json"), "--json")
    assert json.loads(told.stdout) == result


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bench", "limits", "two benchmarks, 'stages' and 'limits'"),
        ("schema", 1, "two schemas, 2 and 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    key: str, value: object, said: str, old: dict[str, Any], tmp_path: Path
) -> None:
    done = run(kept(tmp_path, old, "a.json"), kept(tmp_path, old | {key: value}, "b.json"))
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("[1]", "expected `object`, got `array`"),
        ("{}", "is not a benchmark's result: object missing required field `schema`"),
        ('{"schema": 2, "bench": "stages"}', "missing required field `machine`"),
        ('{"schema": 2, "bench": "stages", "machine": {"date": 1}}', "machine.date: expected `str`"),
        ("[" * 100_000, "expected `object`, got `array`"),
        ('{"a": ' * 100_000, "is nested too deeply to be read"),
        (
            '{"schema": 2, "bench": "x", "machine": {"date": "", "versions": {}}, "a": '
            + "[" * 5000 + "1" + "]" * 5000 + "}",
            "is nested too deeply to be read",
        ),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    done = run(path, path)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"dualfocus: {path}")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_no_figure_is_not_compared(old: dict[str, Any], tmp_path: Path) -> None:
    odd = {"[/red]": {"median": 1.0, "low": 0.5, "high": 2.0}, "x": {"median": "1", "low": 1, "high": 2}}
    new = odd | {"[/red]": {"median": 9.0, "low": 8.0, "high": 10.0}, "y": 10**400}
    done = run(kept(tmp_path, old | odd, "a.json"), kept(tmp_path, old | new, "b.json"))
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "[/red]" in done.stdout


def savings_of(plain: float) -> dict[str, Any]:
    counters = {"vision_encodes": 2.0, "tokens_prefilled": 1277.0, "decode_steps": 9.0}
    rows = {name: timing(plain / 2, 1.0) | {"ratio": 2.0, "counters": counters} for name in savings.LABELS}
    other = {name: row | {"counters": counters | {"vision_encodes": 4.0}} for name, row in rows.items()}
    return harness.header("savings", 2) | {"cases": {"agree": {"rows": rows}, "disagree": {"rows": other}}}


BEFORE = "# name\n\n<!-- bench:savings-edge -->\nanything\n<!-- /bench -->\n\nbehind\n"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page of the documentation, and results of three days."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for date, plain in (("2026-01-02", 2468.0), ("2025-12-31", 1.0), ("2026-01-01", 2.0)):
        kept(tmp_path, savings_of(plain), f"{date}-savings-edge.json")
    kept(tmp_path, savings_of(3.0), "2026-01-03-savings-edge-int8.json")
    (tmp_path / "README.md").write_text("# nothing to generate\n")
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/page.md").write_text(BEFORE)
    return tmp_path / "docs/results/page.md"


def test_a_table_is_of_the_newest_result(page: Path) -> None:
    assert readme.main(["--check"]) == 1
    assert page.read_text() == BEFORE
    assert readme.main([]) == 0
    text = page.read_text()
    assert text.startswith("# name\n\n<!-- bench:savings-edge -->\n\n| | agree")
    assert text.endswith("|\n\n<!-- /bench -->\n\nbehind\n")
    assert "| the plain protocol | 1,234 | 2.00\u00d7 | 1,234 | 2.00\u00d7 | 2 / 4 | 1277 | 9 |\n" in text
    assert text.count("\n| ") == 1 + len(savings.LABELS)
    assert readme.main(["--check"]) == 0
    assert readme.main([]) == 0
    assert page.read_text() == text


def test_markers_are_checked(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in (
        ("<!-- bench:gone -->\n<!-- /bench -->\n", "there is no result"),
        ("<!-- bench:savings-edge -->\n", "1 markers"),
    ):
        page.write_text(text)
        assert readme.main([]) == 2
        assert said in capsys.readouterr().err
        assert page.read_text() == text
    assert readme.main(["--wrong"]) == 2
    kept(harness.RESULTS, harness.header("scenes", 2), "2026-01-01-scenes-nano.json")
    with pytest.raises(InputError, match="makes no table"):
        readme.table("scenes-nano")


def answers_of(bundle: str, right: float) -> dict[str, Any]:
    of = {"share": right, "low": right - 0.1, "high": right + 0.1}
    row = {"questions": 20, "macro": of, "micro": of, "dual": of, "oracle": of}
    row["gain"] = {"mean": 0.05, "low": -0.01, "high": 0.11}
    judged = {name: {"f1": f1, "yes": 0.5} for name, f1 in (("macro", 0.8), ("micro", 0.9), ("dual", 0.9))}
    return harness.header("scenes", 2) | {
        "bundle": bundle,
        "mode": "dual",
        "accuracy": {"detail": row, "count": row, "pope random": row, "all": row},
        "yes_no": {"pope random": judged},
    }


def test_results_of_several_models_share_a_table(page: Path) -> None:
    for name, right in (("small", 0.5), ("large", 0.75)):
        kept(harness.RESULTS, answers_of(name, right), f"2026-01-01-scenes-{name}.json")
    both = readme.table("scenes-small+scenes-large")
    assert "| small | detail | 20 | 50.0 | 50.0 | 50.0 (40.0 to 60.0) | 50.0 | +5.0 (-1.0 to 11.0) |" in both
    assert "| large | pope random, F1 (says yes: 50.0, 50.0 %) | 20 | 80.0 | 90.0 | 90.0 |  | +10.0 |" in both
    assert "count" not in both
    alone = readme.table("scenes-large")
    assert "| count | 20 | 75.0 |" in alone
    assert "large" not in alone


def test_the_repositorys_tables_are_what_its_results_say() -> None:
    assert readme.main(["--check"]) == 0
