"""The documentation: generated parts are current, links resolve, and what it tells a reader to type works."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from dualfocus import DualFocus, cli
from dualfocus.runtime.bundle import BUILT_IN
from dualfocus.runtime.result import Counters

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "bench/*.md", "train/*.md")
    for page in ROOT.glob(pattern)
)
HISTORY = ("CHANGELOG.md", "LOG.md")  # what was written of an earlier state stays
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCHEMA = ROOT / "docs/ask.schema.json"
OUTSIDE = {"sudo", "export", "cd"}  # commands of the system


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every block of that language."""
    found = ((page, match) for page in PAGES for match in FENCE.finditer(page.read_text(encoding="utf-8")))
    return [(names(page), match[2]) for page, match in found if match[1] == language]


def typed() -> list[tuple[str, list[str]]]:
    """(page, words) of every command that a reader is told to type, once each."""
    found: dict[tuple[str, ...], str] = {}
    for page, text in blocks("console"):
        for line in text.replace("\\\n", " ").splitlines():
            assert line.startswith("$ "), f"{page}: {line!r} is no command"
            for command in line[2:].split(" && "):
                found.setdefault(tuple(shlex.split(command, comments=True)), page)
    return [(page, [*words]) for words, page in found.items()]


COMMANDS = typed()


def identify(value: object) -> str | None:
    return shlex.join(value)[:60] if isinstance(value, list) else None


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_resolve(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", prose(page)):
        if ":" in target:
            continue
        to = page.parent / target if target else page
        assert to.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(to), f"{target} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_files_that_are_named_exist(page: Path) -> None:
    if page.name in HISTORY or "decisions" in page.parts:
        return
    rooms = "runtime|kernels|export|train|bench|models|tests|tools|docs|examples|deploy"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), f"{path} does not exist"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current() -> None:
    assert load(ROOT / "tools/docs.py").main(["--check"]) == 0


def test_a_changed_part_is_found_and_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load(ROOT / "tools/docs.py")
    text = (ROOT / "docs/bundle.md").read_text(encoding="utf-8")
    page = tmp_path / "bundle.md"
    page.write_text(re.sub(r"format \*\*\d+\*\*", "format **0**", text), encoding="utf-8")
    monkeypatch.setattr(tool, "DOCS", tmp_path)
    assert tool.main(["--check"]) == 1
    assert tool.main([]) == 0
    assert page.read_text(encoding="utf-8") == text
    assert tool.main(["--wrong"]) == 2


def test_readmes_numbers_are_those_of_the_pages_it_names() -> None:
    rows = re.findall(r"^\| .*\| (.*) \| .*\(docs/(\w+\.md)\)\) \|$", prose(ROOT / "README.md"), re.MULTILINE)
    assert len(rows) == 3
    for shown, page in rows:
        numbers = re.findall(r"\d[\d,.]*\d|\d", shown)
        cells = re.findall(r"\d[\d,.]*\d|\d", (ROOT / "docs" / page).read_text(encoding="utf-8"))
        assert numbers
        assert {*numbers} <= {*cells}


def test_the_demos_output_is_what_readme_shows() -> None:
    question = (ROOT / "examples/scene.txt").read_text(encoding="utf-8").strip()
    done = CliRunner().invoke(cli.app, ["ask", str(ROOT / "examples/scene.png"), question])
    shown = [text for page, text in blocks("") if page == "README.md"]
    assert [steady(text) for text in shown] == [steady(done.stdout)]


def steady(output: str) -> list[list[str]]:
    """The words of an answer's lines without times, and losses to one decimal."""
    lines = [line.split() for line in output.splitlines() if " ms: " not in line]
    return [[re.sub(r"^(\d\.\d)\d\d$", r"\1", word) for word in line] for line in lines]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=identify)
def test_commands_are_ones_that_exist(page: str, words: list[str]) -> None:
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if "-m" in arguments and program in ("python", "python3", "accelerate"):
        module = arguments[arguments.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None
    elif program == "dualfocus":
        parse(arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
    elif program == "pip":
        for extras in re.findall(r"dualfocus\[(.*)\]", shlex.join(arguments)):
            assert {*extras.split(",")} <= {*project["optional-dependencies"]}
    elif program in ("python", "python3", "pytest"):
        assert (ROOT / arguments[0]).exists()
    else:
        assert program in OUTSIDE | {"ruff", "mypy"}


def parse(arguments: list[str]) -> None:
    """Raise click's error for arguments that the command line does not take."""
    arguments = arguments[: arguments.index("<")] if "<" in arguments else [*arguments]
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(command.name, arguments)


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(Exception, match="--nope"):
        parse(["bench", "stages", "--nope"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, with the files that the documentation names."""
    for name in ("photo.jpg", "a.jpg", "b.jpg", "examples/scene.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "examples/scene.png", tmp_path / name)
    shutil.copytree(BUILT_IN, tmp_path / "BUNDLE")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runnable() -> Iterator[list[str]]:
    """Commands that need neither a GPU, a checkpoint, a data set nor minutes."""
    for _, (program, *arguments) in COMMANDS:
        command = arguments[0] if arguments else ""
        if program == "dualfocus" and command in ("ask", "inspect", "pack") and "--device" not in arguments:
            yield arguments


@pytest.mark.parametrize("arguments", runnable(), ids=identify)
def test_commands_that_can_run_do(arguments: list[str], folder: Path) -> None:
    given = None
    if "<" in arguments:
        given = (folder / arguments[-1]).read_bytes()
        arguments = arguments[: arguments.index("<")]
    done = CliRunner().invoke(cli.app, arguments, input=given)
    assert done.exit_code == 0, done.output
    assert done.stdout


@pytest.mark.parametrize("text", [text for _, text in blocks("python")])
def test_python_examples_run(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(text, "example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out or "print" not in text


@pytest.mark.parametrize(
    "flags", [[], ["--mode", "macro"], ["--skip-above", "0"], ["--zooms", "2"], ["--plain"]]
)
def test_json_is_of_its_schema(flags: list[str], folder: Path) -> None:
    check(CliRunner().invoke(cli.app, ["ask", "photo.jpg", "Is there a star?", "--json", *flags]).stdout)


def test_json_without_a_region_is_of_its_schema(folder: Path) -> None:
    with DualFocus() as model:
        result = model.ask("photo.jpg", "Is there a star?", box_reply="nowhere").to_dict()
    answer = check(json.dumps(result | {"bundle": "nano", "device": "cpu", "warnings": []}))
    assert answer["fallback"]
    assert answer["box"] is answer["crop"] is answer["micro"] is None


def check(line: str) -> dict[str, Any]:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    answer: dict[str, Any] = json.loads(line)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(answer, schema)
    assert {*answer} == {*schema["properties"]}
    counters = schema["$defs"]["counters"]["properties"]
    assert [*counters] == [field.name for field in dataclasses.fields(Counters)]
    return answer
