"""`dualfocus eval`: what is asked, what is written down, what a kill leaves, and what the table says."""

from __future__ import annotations

import csv
import errno
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import benchmarks
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dualfocus import cli
from dualfocus.bench import accuracy, harness, questions
from dualfocus.bench import scenes as drawn
from dualfocus.bench.answers import Answers, Line, Run
from dualfocus.bench.questions import Asked, Benchmark
from dualfocus.runtime import Bundle, DualFocus, InputError
from dualfocus.runtime.turns import GQA_MCQ, MMBENCH, SEED, Question
from dualfocus.train.curate import Dialogue

# In the order in which they are asked
IDS: dict[str, list[str | int]] = {
    "textvqa": ["0" * 16, "0" * 16, "0" * 15 + "1", "0" * 15 + "1"],
    "pope": [0, 1, 2, 3, 4, 5],
    "seed": [101, 102, "v3"],
    "gqa-mcq": ["200", "201"],
    "mmbench": [7, 1_000_007, 2_000_007, 9, 1_000_009],
}
RUN = Run("textvqa", "dual", "nano", "0123456789abcdef")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers are written, and results kept."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments), "--threads", "1"])


def told(*arguments: object) -> dict[str, Any]:
    result = evaluate(*arguments, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(result: Result) -> str:
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("dualfocus: ")


def written(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(lines: Sequence[Line]) -> list[Line]:
    """Without what the next run need not repeat to the last bit: times, and what depends on the order in
    which sums were made, which is another one where a picture was still at hand.
    """
    floats = {"ms": 0, "losses": 0, "confidence": 0}
    return [line | {"metadata": line["metadata"] | floats} for line in lines]


def answered(asked: Asked, run: Run = RUN, **metadata: Any) -> Line:
    """A line as `eval` writes them."""
    told = {
        "macro": "", "micro": "", "chosen": "macro", "fallback": None, "box": None, "crop": None,
        "size": [200, 160], "losses": [None, None], "confidence": [1.0, 1.0], "ms": 10.0, "picture": "",
    } | metadata  # fmt: skip
    text = asked.final(told["macro"] if told["chosen"] == "macro" else told["micro"])
    return {
        "question_id": asked.id,
        "prompt": asked.prompt,
        "text": text,
        "answer_id": "1",
        "model_id": run.model,
        "metadata": {"benchmark": run.benchmark, "mode": run.mode, "bundle": run.bundle, **told},
    }


def scored(benchmark: Benchmark, lines: Sequence[Line], limit: int | None = None) -> dict[str, Any]:
    """The summary of those lines; their run is the first one's."""
    first = lines[0]["metadata"]
    with Answers(None, Run(first["benchmark"], first["mode"], "nano", "")) as answers:
        for line in lines:
            answers.append(line)
        return accuracy.summarise(benchmark, answers, limit)


def shares(row: dict[str, Any]) -> list[float]:
    """Of macro, micro, dual, oracle."""
    return [row[name]["share"] for name in ("macro", "micro", "dual", "oracle")]


# every benchmark, from files to a table


@pytest.mark.parametrize("name", IDS)
def test_every_benchmark_is_asked_once(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks.WRITERS[name](here / "data")
    first = told(name, "--data", here / "data")
    path = here / f"{name}-nano-dual.jsonl"
    lines = written(path)
    assert [line["question_id"] for line in lines] == IDS[name]
    assert len({line["answer_id"] for line in lines}) == len(lines)
    assert first["bench"] == name
    assert first["bundle"] == "nano"
    assert sum(first["chosen"].values()) == len(lines)
    assert shares(first["accuracy"]["all"])  # all columns

    def nobody(*_: object, **__: object) -> Bundle:
        raise AssertionError("a finished file was asked about")

    monkeypatch.setattr(Bundle, "open", nobody)
    assert told(name, "--data", here / "data") | {"machine": 0} == first | {"machine": 0}
    assert written(path) == lines


def test_the_result_is_shown_and_kept(here: Path) -> None:
    benchmarks.mmbench(here / "mmbench")
    result = evaluate("mmbench", "--data", here, "--limit", 1, "--save", "-o", "some.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "the first 1 questions of 2, which is no score of the benchmark" in result.stdout
    assert [line["question_id"] for line in written(here / "some.jsonl")] == [7, 1_000_007, 2_000_007]
    (kept,) = (here / "results").iterdir()
    assert kept.name.endswith("-mmbench-nano.json")


def test_one_pass_alone(here: Path) -> None:
    benchmarks.textvqa(here)
    summary = told("textvqa", "--data", here, "--mode", "macro")
    assert set(summary["accuracy"]["all"]) == {"questions", "macro"}
    assert summary["bench"] == "textvqa-macro"
    assert summary["boxes"] is None
    lines = written(here / "textvqa-nano-macro.jsonl")
    assert {line["metadata"]["micro"] for line in lines} == {None}
    both = told("textvqa", "--data", here)
    assert both["accuracy"]["all"]["macro"] == summary["accuracy"]["all"]["macro"]
    alone = told("textvqa", "--data", here, "--mode", "micro")
    assert set(alone["accuracy"]["all"]) == {"questions", "micro"}
    for dual, micro in zip(
        *(written(here / f"textvqa-nano-{m}.jsonl") for m in ("dual", "micro")), strict=True
    ):
        assert micro["text"] == dual["metadata"]["micro"]


# what is read


def test_textvqa_has_ten_references_by_picture_and_question(here: Path) -> None:
    asked = questions.read("textvqa", benchmarks.textvqa(here)).questions
    assert [of.references for of in asked] == [(f"right {n}",) * 10 for n in range(4)]
    first_line, rest = "What is written on sign 0?", f"Reference OCR token: S, 0\n{benchmarks.SHORT}"
    assert asked[0].question == Question(first_line, f"{first_line}\n{rest}")
    replace("llava_textvqa_val_v051_ocr.jsonl", "sign 0?", "sign 0? ")(here)
    replace("TextVQA_0.5.1_val.json", "SIGN 0?", "SIGN 0? ")(here)
    spaced = questions.read("textvqa", here).questions[0]  # as it stands, in the published scripts too
    assert spaced.question == Question(f"{first_line} ", f"{first_line} \n{rest}")


def test_what_textvqa_asks_twice_is_answered_once_and_counts_twice(here: Path) -> None:
    path = benchmarks.textvqa(here) / "llava_textvqa_val_v051_ocr.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))
    benchmark = questions.read("textvqa", here)
    assert (len(benchmark.questions), benchmark.size) == (5, 5)
    summary = told("textvqa", "--data", here, "-o", "a.jsonl")
    assert summary["questions"] == summary["accuracy"]["all"]["questions"] == 5
    assert [line["prompt"] for line in written(here / "a.jsonl")] == [
        of.prompt for of in benchmark.questions[:4]
    ]


def test_pope_finds_labels_by_picture_and_words(here: Path) -> None:
    benchmark = questions.read("pope", benchmarks.pope(here))
    assert [(of.groups, of.references) for of in benchmark.questions] == [
        ((category,), (label,))
        for category in ("adversarial", "popular", "random")
        for label in ("yes", "no")
    ]
    assert benchmark.groups == benchmark.yes_no == ("random", "popular", "adversarial")


def test_seed_has_options_and_kinds(here: Path) -> None:
    benchmark = questions.read("seed", benchmarks.seed(here))
    first, _, video = benchmark.questions
    text = f"What is thing 0?\nA. thing A0\nB. thing B0\nC. thing C0\nD. thing D0\n{benchmarks.LETTER}"
    options = ("thing A0", "thing B0", "thing C0", "thing D0")
    assert first.question == Question("What is thing 0?", text, options, wording=SEED)
    assert first.references == ("A",)
    assert video.groups == ("Action Recognition", "video")
    assert benchmark.groups == ("Instance Identity", "Action Recognition", "image", "video")
    (here / "llava-seed-bench-image.jsonl").write_text(
        (here / "llava-seed-bench.jsonl").read_text().splitlines()[0]
    )
    assert len(questions.read("seed", here).questions) == 1  # the pictures alone, where they are given


def test_gqa_compares_the_text_of_the_option(here: Path) -> None:
    first, _ = questions.read("gqa-mcq", benchmarks.gqa_mcq(here)).questions
    text = f"Which one is 0?\nA. right\nB. left\n{benchmarks.LETTER}"
    assert first.question == Question("Which one is 0?", text, ("right", "left"), wording=GQA_MCQ)
    assert [first.final(said) for said in ("B", "b. left", "A", "LEFT", "other")] == [
        "left", "left", "right", "left", "other"
    ]  # fmt: skip


def test_mmbench_has_context_and_rotations(here: Path) -> None:
    benchmark = questions.read("mmbench", benchmarks.mmbench(here))
    first, second = benchmark.questions[:2]
    text = f'It is a pet.\nWhat is "7"?\nA. a cat\nB. a dog\nC. a cow\n{benchmarks.LETTER}'
    options = ("a cat", "a dog", "a cow")
    assert first.question == Question('What is "7"?', text, options, "It is a pet.", MMBENCH)
    assert second.references == ("C",)
    assert first.picture is second.picture
    assert isinstance(benchmark.questions[3].question, Question)
    assert benchmark.questions[3].question.context == ""
    assert benchmark.size == 2
    assert [of.id for of in benchmark.first(1)] == [7, 1_000_007, 2_000_007]


def test_mmbench_pictures_may_have_line_breaks(here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"
    expected = questions.read("mmbench", here)
    table(path, lambda row: row.update(image=re.sub("(.{76})", r"\1\n", row["image"])))
    assert path.read_text().count("\n") > 20
    assert questions.read("mmbench", here) == expected


@pytest.mark.parametrize("nothing", ["", "nan", "NaN", "None", "NA"])
def test_mmbench_options_end_at_nothing(nothing: str, here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("blue\t\t\t", f"blue\t{nothing}\tworse\t"))
    asked = questions.read("mmbench", here).questions[3]
    assert isinstance(asked.question, Question)
    assert asked.question.options == ("red", "blue")


def table(path: Path, change: Callable[[dict[str, str]], object]) -> Path:
    """Change every row of a TSV file; a column is gone where the first row has lost it."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        change(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("base", [7, 4241], ids=["no base64", "base64"])
def test_mmbench_rotations_can_name_the_row_of_their_picture(base: int, here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"

    def renumber(row: dict[str, str]) -> None:
        if int(row["index"]) % 1_000_000 == 7:
            row["index"] = str(int(row["index"]) - 7 + base)

    def refer(row: dict[str, str]) -> None:
        index = int(row["index"])
        row["image"] = row["image"] if index < 1_000_000 else str(index % 1_000_000)

    table(path, renumber)
    expected = questions.read("mmbench", here)
    table(path, refer)
    assert questions.read("mmbench", here) == expected
    path.write_text("\n".join(reversed(path.read_text().splitlines()[1:])))  # a row can name a later one
    path.write_text("\t".join(benchmarks.MMBENCH) + "\n" + path.read_text())
    assert {*questions.read("mmbench", here).questions} == {*expected.questions}


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("1000007", "the index 1000007, which has another row's itself"),
        ("2000007", "the index 2000007, which has another row's itself"),  # a cycle
        ("8", "the index 8, which is not there"),
        ("12345678", "the index 12345678, which is not there"),  # also base64 of six bytes
        ("", "its image is empty"),
    ],
)
def test_mmbench_rows_that_name_no_picture_are_refused(image: str, said: str, here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"
    names = {"1000007": "2000007", "2000007": "1000007"} if image == "2000007" else {"2000007": image}
    names = {"1000007": "7"} | names
    table(path, lambda row: row.update(image=names.get(row["index"], row["image"])))
    assert said in refused(evaluate("mmbench", "--data", here))


@pytest.mark.parametrize("column", [True, False], ids=["empty", "no column"])
def test_a_test_split_is_asked_and_not_scored(column: bool, here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"
    rows = len(path.read_text().splitlines()) - 1
    table(path, lambda row: row.update(answer="") if column else row.pop("answer"))
    result = evaluate("mmbench", "--data", here, "-o", "a.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "without answers, as in a test split, there is no score" in result.stdout
    assert "a mean of" in result.stdout
    assert len(written(here / "a.jsonl")) == rows
    summary = told("mmbench", "--data", here, "-o", "a.jsonl", "--save")
    assert summary["accuracy"] is None
    assert (summary["questions"], summary["of"]) == (2, 2)
    assert sum(summary["chosen"].values()) == rows


def test_a_row_without_its_answer_is_no_test_split(here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"
    table(path, lambda row: row.update(answer="" if row["index"] == "9" else row["answer"]))
    assert "it has no answer, expected one in every row" in refused(evaluate("mmbench", "--data", here))


def test_a_category_is_not_read_as_markup(here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"
    kinds = {"kind 7": "[/red]", "kind 9": "[bold]loud\x1b[2J"}
    table(path, lambda row: row.update({"l2-category": kinds[row["l2-category"]]}))
    result = evaluate("mmbench", "--data", here)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "[/red]" in result.stdout
    assert "[bold]loud\\x1b[2J" in result.stdout


@pytest.mark.parametrize("corrected", ["labels", "questions"])
def test_pope_is_spelled_in_two_ways(corrected: str, here: Path) -> None:
    """POPE corrected "imange" in its labels, and LLaVA's questions say it still."""
    expected = questions.read("pope", benchmarks.pope(here / "same"))
    benchmarks.pope(here / "pope")
    files = [here / "pope" / "coco" / f"coco_pope_{setting}.json" for setting in questions.POPE]
    for path in [here / "pope" / "llava_pope_test.jsonl"] if corrected == "labels" else files:
        path.write_text(path.read_text().replace("star in the image", "star in the imange"))
    read = questions.read("pope", here)
    assert [(of.id, of.references) for of in read.questions] == [
        (of.id, of.references) for of in expected.questions
    ]
    assert expected.notes == ()
    assert read.notes[0].startswith("3 questions spell 'image' in another way than their labels")
    assert "e3e3926" in read.notes[0]
    assert "e3e3926" in evaluate("pope", "--data", here).stdout
    files[0].write_text(files[0].read_text().replace("star", "stair"))
    assert re.search(
        r"no label for question 4 of .* commit e3e3926", refused(evaluate("pope", "--data", here))
    )


def test_pope_labels_that_differ_in_the_spelling_alone_have_to_agree(here: Path) -> None:
    path = benchmarks.pope(here) / "coco" / "coco_pope_random.json"
    line = path.read_text().splitlines()[0]
    path.write_text(path.read_text() + line.replace("image?", "imange?").replace('"no"', '"yes"'))
    assert "always the same" in refused(evaluate("pope", "--data", here))


def test_seed_without_the_hint_keeps_its_last_option(here: Path) -> None:
    path = benchmarks.seed(here) / "llava-seed-bench.jsonl"
    expected = questions.read("seed", here).questions
    path.write_text(path.read_text().replace(f"\\n{benchmarks.LETTER}", ""))
    read = questions.read("seed", here).questions
    assert [of.question.options for of in read] == [of.question.options for of in expected]  # type: ignore[union-attr]
    assert read[0].prompt == expected[0].prompt.removesuffix(f"\n{benchmarks.LETTER}")


def test_more_options_than_letters_are_refused(here: Path) -> None:
    path = benchmarks.seed(here) / "llava-seed-bench.jsonl"
    path.write_text(path.read_text().replace("\\nA. ", "\\nA. x" * 2_000_000 + "\\nA. ", 1))
    assert "options, expected lines such as" in refused(evaluate("seed", "--data", here))


def replace(name: str, old: str, new: str) -> Any:
    """What replaces text in the file of that name; an empty `new` file is none."""

    def change(folder: Path) -> None:
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return change


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def copy(name: str, to: str) -> Any:
    return lambda folder: (folder / to).write_bytes((folder / name).read_bytes())


def move(name: str, to: str) -> Any:
    return lambda folder: (folder / name).rename(folder / to)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("textvqa", remove("llava_textvqa_val_v051_ocr.jsonl"), "holds llava_textvqa_val_v051_ocr.jsonl"),
        ("textvqa", remove("TextVQA_0.5.1_val.json"), "holds TextVQA_0.5.1_val.json"),
        ("textvqa", replace("TextVQA_0.5.1_val.json", '"right 0", ', ""), "has 9 answers to question '0000"),
        ("textvqa", replace("TextVQA_0.5.1_val.json", "SIGN 3", "SIGN 4"), "has 0 answers"),
        ("textvqa", replace("TextVQA_0.5.1_val.json", "}", ""), "TextVQA_0.5.1_val.json is not JSON"),
        ("textvqa", replace("TextVQA_0.5.1_val.json", "{", "[" * 100_000), "expected `object`, got `array`"),
        ("textvqa", replace("TextVQA_0.5.1_val.json", "{", '{"a": ' * 100_000), "is nested too deeply"),
        ("pope", replace("llava_pope_test.jsonl", "{", "[" * 100_000), "line 1: expected `object`"),
        ("textvqa", replace("llava_textvqa_val_v051_ocr.jsonl", "}", ""), "line 1 is not JSON"),
        ("textvqa", replace("llava_textvqa_val_v051_ocr.jsonl", '"text"', '"txt"'), "required field `text`"),
        ("textvqa", remove("train_images/0000000000000001.jpg"), "1 pictures are missing"),
        ("pope", replace("llava_pope_test.jsonl", "star", "stair"), "no label for question 0"),
        ("pope", replace("llava_pope_test.jsonl", '"question_id": 1', '"question_id": 0'), "have the id 0"),
        ("pope", replace("coco/coco_pope_random.json", '"no"', '"none"'), "the label is 'none'"),
        ("pope", remove("coco/coco_pope_popular.json"), "coco_pope_popular.json"),
        ("seed", replace("SEED-Bench.json", '"v3"', '"v4"'), "no answer to question 'v3'"),
        ("textvqa", replace("TextVQA_0.5.1_val.json", '"right 0"', "0"), "].answers[0]: expected `str`"),
        ("seed", replace("llava-seed-bench.jsonl", "What is thing 0?", " "), "the question is empty"),
        ("seed", replace("SEED-Bench.json", '"questions"', '"q"'), "missing required field `questions`"),
        ("gqa-mcq", replace("data/testdev_balanced_questions.json", '"200"', '"3"'), "to question '200'"),
        ("gqa-mcq", replace("llava_gqa_testdev_balanced_mcq.jsonl", "\\nA. right\\nB. left", ""), "no opt"),
        ("mmbench", replace("mmbench_dev_20230712.tsv", "\tC\tfine", "\tE\tfine"), "its answer 'E'"),
        ("mmbench", replace("mmbench_dev_20230712.tsv", "index\t", "i\t"), "has no column index"),
        ("mmbench", replace("mmbench_dev_20230712.tsv", "iVBOR", "iVBO="), "not in base64"),
        ("mmbench", replace("mmbench_dev_20230712.tsv", "iVBOR", "é"), "not in base64"),
        ("mmbench", replace("mmbench_dev_20230712.tsv", "1000009", "9" * 5000), "expected a number"),
        ("mmbench", replace("mmbench_dev_20230712.tsv", "1000009", "9"), "two questions have the id 9"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_not_asked(name: str, change: Any, said: str, here: Path) -> None:
    change(benchmarks.WRITERS[name](here / "data"))
    assert said in refused(evaluate(name, "--data", here / "data"))
    assert not list(here.glob("*.jsonl"))


def test_several_files_are_told_apart_or_named(here: Path) -> None:
    benchmarks.mmbench(here)
    copy("mmbench_dev_20230712.tsv", "other.tsv")(here)
    assert len(questions.read("mmbench", here).questions) == 5  # one has the official name
    (here / "mmbench").mkdir()
    move("mmbench_dev_20230712.tsv", "mmbench/mmbench_dev_20230712.tsv")(here)
    assert len(questions.read("mmbench", here).questions) == 5  # also where another one is nearer
    move("mmbench/mmbench_dev_20230712.tsv", "mmbench_dev_20230712.tsv")(here)
    move("mmbench_dev_20230712.tsv", "another.tsv")(here)
    with pytest.raises(InputError, match=r"holds another\.tsv, other\.tsv: expected one of them"):
        questions.read("mmbench", here)


def test_a_byte_order_mark_is_no_part_of_a_name(here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"
    expected = questions.read("mmbench", here)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert questions.read("mmbench", here) == expected


def test_without_rotations_mmbench_has_no_score(here: Path) -> None:
    path = benchmarks.mmbench(here) / "mmbench_dev_20230712.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(InputError, match="has no rotations"):
        questions.read("mmbench", here)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pope"], "pope is read from files, expected --data DIR"),
        (["scenes", "--data", "."], "scenes are drawn, expected no --data DIR"),
        (["pope", "--data", "nowhere"], "--data nowhere is not a folder"),
        (["pope", "--data", "."], "neither . nor its folder pope holds llava_pope_test.jsonl"),
        (["scenes", "-o", "no/where.jsonl"], "the folder no does not exist"),
        (["scenes", "--bundle", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], said: str) -> None:
    assert said in refused(evaluate(*arguments))


def test_a_damaged_picture_is_named_with_its_question(here: Path) -> None:
    """What was answered before stays, and counts when the picture is there."""
    benchmarks.textvqa(here)
    picture = here / "train_images" / "0000000000000001.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:100])
    sentence = refused(evaluate("textvqa", "--data", here, "-o", "a.jsonl"))
    assert re.match(r"question 0000000000000001: .*0000000000000001.jpg is (damaged|not a picture)", sentence)
    assert len(written(here / "a.jsonl")) == 2
    picture.write_bytes(whole)
    assert told("textvqa", "--data", here, "-o", "a.jsonl")["questions"] == 4


# the answers' file


def filled(path: Path, count: int = 4) -> list[Asked]:
    """A file of answers to the first questions of textvqa, which lies beside it."""
    asked = list(questions.read("textvqa", benchmarks.textvqa(path.parent)).questions)
    with Answers(path, RUN) as answers:
        for n, of in enumerate(asked[:count]):
            answers.append(answered(of, macro=f"é {n}"))
    return asked


def test_a_half_written_line_is_dropped(here: Path) -> None:
    path = here / "a.jsonl"
    asked = filled(path, 3)
    whole = path.read_bytes()
    before = whole.rindex(b"\n", 0, -1) + 1
    for end in range(before, len(whole) + 1):
        path.write_bytes(whole[:end])
        with Answers(path, RUN) as answers:
            count = 3 if end == len(whole) else 2
            assert list(answers.lines) == [of.key for of in asked[:count]]
            answers.append(answered(asked[3]))
        assert [line["prompt"] for line in written(path)] == [of.prompt for of in (*asked[:count], asked[3])]


@pytest.mark.parametrize("half", [0, 1, 40])
def test_a_tail_of_nul_is_cut_and_said(here: Path, half: int) -> None:
    """What a power cut leaves: the length is on the disk, and of the last answers no byte."""
    path = here / "a.jsonl"
    asked = filled(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:half] + bytes(len(lines[2]) * 2 - half))
    with Answers(path, RUN) as answers:
        assert list(answers.lines) == [of.key for of in asked[:2]]
        assert answers.lost is not None
        assert "about 2 of its answers are lost" in answers.lost
        answers.append(answered(asked[2]))
    assert path.read_bytes().count(b"\0") == 0
    assert len(written(path)) == 3
    with Answers(path, RUN) as answers:
        assert answers.lost is None


def test_a_full_disk_names_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    benchmarks.textvqa(here / "data")
    monkeypatch.setattr("dualfocus.bench.answers.os.write", full)
    sentence = refused(evaluate("textvqa", "--data", here / "data", "-o", "a.jsonl"))
    assert sentence == "a.jsonl: No space left on device\n"


def test_the_command_says_what_a_power_cut_took(here: Path) -> None:
    benchmarks.textvqa(here / "data")
    first = told("textvqa", "--data", here / "data", "-o", "a.jsonl")
    path = here / "a.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-200] + bytes(200))
    result = evaluate("textvqa", "--data", here / "data", "-o", "a.jsonl")
    assert result.exit_code == 0
    assert "about 1 of its answers are lost" in result.stderr
    assert result.stderr.count("\n") == 1
    assert told("textvqa", "--data", here / "data", "-o", "a.jsonl")["accuracy"] == first["accuracy"]


@pytest.mark.parametrize("kind", ["zeros", "fifo", "device", "folder", "nul inside"])
def test_what_is_no_file_of_answers_is_left_alone(kind: str, here: Path) -> None:
    path = here / "a.jsonl"
    filled(path)
    kept = path.read_bytes()
    if kind == "nul inside":
        path.write_bytes(kept := kept.replace(b"sign 2", b"sign\0\0", 1))
    elif kind == "zeros":
        path.write_bytes(kept := bytes(5000))
    else:
        path.unlink()
        made: dict[str, Callable[[], object]] = {
            "fifo": lambda: os.mkfifo(path),
            "device": lambda: path.symlink_to("/dev/null"),
            "folder": path.mkdir,
        }
        made[kind]()
    benchmarks.textvqa(here / "data")
    assert "a.jsonl" in refused(evaluate("textvqa", "--data", here / "data", "-o", "a.jsonl"))
    if path.is_file():
        assert path.read_bytes() == kept


def test_a_question_longer_than_the_context_ends_nothing(here: Path) -> None:
    """It counts as wrong, whatever the benchmark's rule reads in no answer, and is said in the report."""
    path = benchmarks.pope(here) / "llava_pope_test.jsonl"
    for setting in questions.POPE:  # POPE reads a yes in what does not say no
        labels = here / "coco" / f"coco_pope_{setting}.json"
        labels.write_text(labels.read_text().replace("star", "star " * 3000))
    path.write_text(path.read_text().replace("star", "star " * 3000))
    summary = told("pope", "--data", here, "-o", "a.jsonl")
    assert summary["unanswered"] == 3
    assert sum(summary["chosen"].values()) == 3
    lines = written(here / "a.jsonl")
    assert [line["question_id"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert "too long" in lines[0]["metadata"]["unanswered"]
    assert lines[0]["text"] == ""
    figures = summary["yes_no"]["random"]["dual"]
    assert figures["recall"] == 0  # the only "yes" there is
    assert summary["accuracy"]["random"]["dual"]["share"] <= 0.5
    result = evaluate("pope", "--data", here, "-o", "a.jsonl")
    assert "3 too long for the model" in result.stdout


def test_an_answer_is_in_the_file_when_it_is_given(here: Path) -> None:
    path = here / "a.jsonl"
    asked = filled(path, 1)
    with Answers(path, RUN) as answers:
        answers.append(answered(asked[1]))
        assert len(written(path)) == 2


def test_the_file_is_one_process_alone(here: Path) -> None:
    path = here / "a.jsonl"
    filled(path, 1)
    with Answers(path, RUN), pytest.raises(InputError, match="is being written by another process"):
        Answers(path, RUN).__enter__()


def test_nothing_answered_leaves_no_file(here: Path) -> None:
    with Answers(here / "a.jsonl", RUN):
        assert (here / "a.jsonl").exists()
    assert not (here / "a.jsonl").exists()
    (here / "b.jsonl").touch()  # somebody else's
    with Answers(here / "b.jsonl", RUN):
        pass
    assert (here / "b.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda here: (here / "a.jsonl").write_text('{"a": 1}'), "its last line is not an answer that"),
        (lambda here: (here / "a.jsonl").write_text("secret"), "its last line is not an answer that"),
        (replace("a.jsonl", '"dual"', '"macro"'), "line 1 is of textvqa in mode macro by the bundle nano"),
        (replace("a.jsonl", '"textvqa"', '"pope"'), "line 1 is of pope in mode dual"),
        (replace("a.jsonl", "0123456789abcdef", "1123456789abcdef"), "expected textvqa in mode dual by"),
        (replace("a.jsonl", '"nano"', '"other"'), "by the bundle other"),
        (replace("a.jsonl", "sign 1", "sign 0"), "line 2 answers the question '0000000000000000' again"),
        (replace("a.jsonl", '"prompt"', '"p"'), "line 1 is not an answer that `dualfocus eval` wrote"),
        (replace("a.jsonl", '"losses"', '"l"'), "line 1 is not an answer that `dualfocus eval` wrote"),
        (replace("a.jsonl", "{", "7\n{"), "line 1 is not an answer that `dualfocus eval` wrote"),
        (replace("a.jsonl", "{", "{{"), "line 1 is not JSON"),
        (replace("a.jsonl", "{", "[" * 100_000 + "\n{"), "line 1 is not JSON"),
        (replace("a.jsonl", '"0000000000000000"', "[]"), "line 1 is not an answer that `dualfocus eval`"),
        (replace("a.jsonl", '"ms": 10.0', '"ms": null'), "line 1 is not an answer that `dualfocus eval`"),
        (replace("a.jsonl", '"box": null', '"box": 7'), "line 1 is not an answer that `dualfocus eval`"),
        (replace("a.jsonl", '"box": null', '"box": [1, 2, 3]'), "Expected `array` of length 4, got 3"),
        (replace("a.jsonl", '"box": null', '"box": [1, 2, 3, NaN]'), "line 1 is not JSON"),
        (replace("a.jsonl", '"box": null', '"box": [1, 2, 3, 1e999]'), "Number out of range"),
        (replace("a.jsonl", '"crop": null', '"crop": [1, 2, 3, 4]'), "a crop that is empty, or of no box"),
        (replace("a.jsonl", '"size": [200, 160]', '"size": [200, 0]'), "Expected `int` >= 1"),
        (replace("a.jsonl", '"macro": "\\u00e9 0"', '"macro": null'), "a dual answer without a macro one"),
        (replace("a.jsonl", '"chosen": "macro"', '"chosen": "[/red]"'), "Invalid enum value"),
    ],
)
def test_a_foreign_file_is_refused_and_kept(change: Any, said: str, here: Path) -> None:
    path = here / "a.jsonl"
    filled(path)
    change(here)
    kept = path.read_bytes()
    with pytest.raises(InputError, match=re.escape(said)):
        Answers(path, RUN).__enter__()
    assert path.read_bytes() == kept


def test_answers_are_found_by_their_questions(here: Path) -> None:
    """In whichever order they stand; one that is missing is asked again, one too many refused."""
    benchmarks.textvqa(here)
    first = told("textvqa", "--data", here, "-o", "a.jsonl")
    path = here / "a.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    random.Random(3).shuffle(lines)
    path.write_text("".join(lines))
    assert told("textvqa", "--data", here, "-o", "a.jsonl") | {"machine": 0} == first | {"machine": 0}
    path.write_text("".join(lines[1:]))
    assert told("textvqa", "--data", here, "-o", "a.jsonl")["accuracy"] == first["accuracy"]
    benchmark = questions.read("textvqa", here)
    assert [line["prompt"] for line in written(path)] == [of.prompt for of in benchmark.questions]
    assert {*path.read_text().splitlines()} >= {line.strip() for line in lines[1:]}
    path.write_text("".join(lines).replace("sign 2", "sign 9"))
    assert "which is not among the 4 of textvqa" in refused(evaluate("textvqa", "--data", here, "-o", path))


def test_a_link_to_the_answers_stays_one(here: Path) -> None:
    benchmarks.textvqa(here / "data")
    (here / "elsewhere").mkdir()
    (here / "a.jsonl").symlink_to("elsewhere/b.jsonl")
    told("textvqa", "--data", here / "data", "-o", "a.jsonl")
    path = here / "elsewhere" / "b.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    told("textvqa", "--data", here / "data", "-o", "a.jsonl")
    assert (here / "a.jsonl").is_symlink()
    assert path.read_text() == "".join(lines)
    assert [*path.parent.iterdir()] == [path]


def test_a_limit_can_grow_and_shrink(here: Path) -> None:
    benchmarks.textvqa(here)
    assert told("textvqa", "--data", here, "-o", "a.jsonl", "--limit", 1)["questions"] == 1
    assert told("textvqa", "--data", here, "-o", "a.jsonl", "--limit", 3)["questions"] == 3
    assert told("textvqa", "--data", here, "-o", "a.jsonl", "--limit", 2)["questions"] == 2
    assert len(written(here / "a.jsonl")) == 3


def test_other_pictures_of_the_same_names_are_noticed(here: Path) -> None:
    benchmarks.textvqa(here)
    told("textvqa", "--data", here, "-o", "a.jsonl", "--limit", 3)
    benchmarks.picture(here / "train_images" / "0000000000000001.jpg", 9)
    sentence = refused(evaluate("textvqa", "--data", here, "-o", "a.jsonl"))
    assert "the picture of the question '0000000000000001' is another one by now" in sentence


def test_there_is_no_score_without_all_answers(here: Path) -> None:
    benchmark = questions.read("textvqa", benchmarks.textvqa(here))
    lines = [answered(of) for of in benchmark.questions]
    with pytest.raises(InputError, match="lacks 1 of 4 answers, the first of them to the question '0000"):
        scored(benchmark, lines[:3])
    assert scored(benchmark, lines[:3], limit=3)["of"] == 4


def test_a_question_can_be_answered_elsewhere(here: Path) -> None:
    """Questions and runs can be sent, and an answer depends on nothing but them and the bundle."""
    benchmark = questions.read("mmbench", benchmarks.mmbench(here))
    run = Run("mmbench", "dual", "nano", "")
    bundle = Bundle.open(threads=1)
    together = list(accuracy.ask_all(DualFocus(bundle), run, benchmark.questions))
    sent, of = pickle.loads(pickle.dumps((benchmark.questions[4], run)))
    assert sent == benchmark.questions[4]
    (alone,) = accuracy.ask_all(DualFocus(bundle), of, [sent])
    assert same([alone]) == same([together[4]])


# kill -9


def start(out: Path, data: Path) -> subprocess.Popen[bytes]:
    arguments = ["eval", "textvqa", "--data", str(data), "-o", str(out), "--threads", "1"]
    code = f"from dualfocus import cli; cli.app({arguments})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_kill_loses_and_repeats_nothing(here: Path) -> None:
    asked = 16
    benchmarks.textvqa(here / "data", asked)
    uninterrupted, killed = here / "whole.jsonl", here / "killed.jsonl"
    with start(uninterrupted, here / "data") as process:
        assert process.wait() == 0
    for until in (1, 6, 7):
        with start(killed, here / "data") as process:
            while count(killed) < until and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert until <= count(killed) < asked
        with killed.open("ab") as file:  # as if it had come in the middle of a write
            file.write(b'{"question_id": "0000')
    with start(killed, here / "data") as process:
        assert process.wait() == 0
    assert same(written(killed)) == same(written(uninterrupted))
    assert count(killed) == asked


# the table


def test_each_pass_has_its_share(here: Path) -> None:
    """Of four questions macro knows the first, micro the first two; the third's micro answer is right but
    not chosen, the fourth has none."""
    benchmark = questions.read("textvqa", benchmarks.textvqa(here))
    a, b, c, d = benchmark.questions
    box = {"box": [10.0, -10.0, 60.0, 40.0], "crop": [0, 0, 100, 80]}
    summary = scored(
        benchmark,
        [
            answered(a, macro="right 0", micro="right 0", ms=10.0, **box),
            answered(b, macro="wrong", micro="Right 1.", chosen="micro", ms=20.0, **box),
            answered(
                c, macro="wrong", micro="right 2", ms=30.0, box=[0.0, 0, 160, 100], crop=[0, 0, 200, 160]
            ),
            answered(d, macro="wrong", micro=None, fallback="no box", ms=40.0),
        ],
    )
    row = summary["accuracy"]["all"]
    assert shares(row) == [0.25, 0.75, 0.5, 0.75]
    assert row["questions"] == summary["questions"] == summary["of"] == 4
    assert row["gain"]["mean"] == 0.25
    assert summary["chosen"] == {"macro": 3, "micro": 1}
    assert summary["fallbacks"] == 1
    assert (summary["mean_ms"], summary["median_ms"]) == (25, 25)
    boxes = summary["boxes"]
    assert boxes["found"]["share"] == 0.75
    assert boxes["area"] == 0.0625  # 50 x 40 of 200 x 160 are in the picture
    assert boxes["zoom"] == 2.0  # 200 pixels are seen as 100 were
    assert boxes["iou_50"] is None


def test_soft_scores_are_added_up(here: Path) -> None:
    benchmark = questions.read("textvqa", benchmarks.textvqa(here, 2))
    path = here / "TextVQA_0.5.1_val.json"
    path.write_text(path.read_text().replace('"right 0"', '"odd"', 8))
    benchmark = questions.read("textvqa", here)
    summary = scored(
        benchmark, [answered(of, macro=f"right {n}") for n, of in enumerate(benchmark.questions)]
    )
    assert summary["accuracy"]["all"]["macro"]["share"] == 0.8  # 0.6 for two of ten, and 1


def test_mmbench_wants_every_rotation(here: Path) -> None:
    """The first question: macro misses one rotation, micro another; the better of the two is always right."""
    benchmark = questions.read("mmbench", benchmarks.mmbench(here))
    run = Run("mmbench", "dual", "nano", "")
    right = [of.references[0] for of in benchmark.questions]
    macro = ["B", *right[1:]]
    micro = [right[0], "A", *right[2:]]
    lines = [
        answered(of, run, macro=a, micro=b, chosen="micro" if i == 0 else "macro")
        for i, (of, a, b) in enumerate(zip(benchmark.questions, macro, micro, strict=True))
    ]
    rows = scored(benchmark, lines)["accuracy"]
    assert shares(rows["kind 7"]) == [0, 0, 1, 1]
    assert shares(rows["kind 9"]) == [1, 1, 1, 1]
    assert shares(rows["all"]) == [0.5, 0.5, 1, 1]
    assert [rows[name]["questions"] for name in rows] == [1, 1, 2]


def test_letters_are_read_from_replies(here: Path) -> None:
    benchmark = questions.read("seed", benchmarks.seed(here))
    replies = ("thing A0", "(none)", "c. thing C2")
    lines = [
        answered(of, Run("seed", "dual", "nano", ""), macro=said, micro="D")
        for of, said in zip(benchmark.questions, replies, strict=True)
    ]
    rows = scored(benchmark, lines)["accuracy"]
    assert shares(rows["image"]) == [0.5, 0, 0.5, 0.5]
    assert shares(rows["Action Recognition"]) == shares(rows["video"]) == [1, 0, 1, 1]


def test_pope_has_figures_for_each_setting(here: Path) -> None:
    """Macro says yes to everything, micro is right throughout and always chosen but in the random setting."""
    benchmark = questions.read("pope", benchmarks.pope(here))
    lines = [
        answered(
            of,
            Run("pope", "dual", "nano", ""),
            macro="Yes, there is",
            micro=of.references[0],
            chosen="macro" if of.groups == ("random",) else "micro",
        )
        for of in benchmark.questions
    ]
    figures = scored(benchmark, lines)["yes_no"]
    assert list(figures) == ["random", "popular", "adversarial"]
    all_yes = {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 0.6667, "yes": 1.0}
    all_right = {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes": 0.5}
    assert figures["random"] == {"macro": all_yes, "micro": all_right, "dual": all_yes}
    assert figures["adversarial"] == {"macro": all_yes, "micro": all_right, "dual": all_right}


# scenes


def test_scenes_are_a_benchmark_too(here: Path) -> None:
    summary = told("scenes", "--limit", 7)
    assert not list(here.iterdir())  # no file unless there is one to go on with
    assert summary["questions"] == sum(summary["chosen"].values()) == 7
    assert sum(row["questions"] for name, row in summary["accuracy"].items() if name in drawn.CATEGORIES) == 7
    assert summary["accuracy"]["all"]["questions"] == 7
    fewer = told("scenes", "--limit", 4, "-o", "s.jsonl")
    again = told("scenes", "--limit", 7, "-o", "s.jsonl")
    assert again["accuracy"] == summary["accuracy"]
    assert [line["question_id"] for line in written(here / "s.jsonl")] == [
        of.id for of in drawn.benchmark(7).questions
    ]
    assert told("scenes", "--limit", 4, "-o", "s.jsonl")["accuracy"] == fewer["accuracy"]


def test_scenes_of_yes_and_no_are_judged_as_pope_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, _ = drawn.held_out(1)[0]
    box = (0.0, 0.0, 9.0, 9.0)
    asked = [
        (scene, Dialogue("Is there a red star?", "yes", box, "pope random")),
        (scene, Dialogue("Is there a blue star?", "no", box, "pope random")),
        (scene, Dialogue("What is written?", "AB", box, "detail")),
    ]
    monkeypatch.setattr(drawn, "CATEGORIES", ("detail", "pope random", "pope popular"))
    monkeypatch.setattr(drawn, "YES_NO", ("pope random", "pope popular"))
    monkeypatch.setattr(drawn, "held_out", lambda limit, *, unseen: asked[:limit])
    benchmark = drawn.benchmark(3)
    lines = [
        answered(
            of, Run("scenes", "dual", "nano", ""), macro=said, micro=said, box=[0, 0, 9, 9], crop=[0, 0, 9, 9]
        )
        for of, said in zip(benchmark.questions, ("Yes.", "yes", "ab"), strict=True)
    ]
    summary = scored(benchmark, lines)
    assert shares(summary["accuracy"]["pope random"]) == [0.5] * 4
    assert shares(summary["accuracy"]["detail"]) == [0] * 4  # the very text
    assert list(summary["accuracy"]) == ["detail", "pope random", "all"]
    assert list(summary["yes_no"]) == ["pope random"]
    assert summary["yes_no"]["pope random"]["dual"]["recall"] == 1
    assert summary["boxes"]["asked"] == 2  # not of what is not there
    assert summary["boxes"]["iou_50"]["share"] == 1
    right = [drawn.is_right(of, said) for (_, of), said in zip(asked, ("Yes.", "yes", "ab"), strict=True)]
    assert right == [True, False, False]


def test_pictures_are_read_once_for_neighbours(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    opened = questions.open_picture

    def counted(path: Any) -> Any:
        read.append(Path(path).name)
        return opened(path)

    monkeypatch.setattr(questions, "open_picture", counted)
    benchmark = questions.read("textvqa", benchmarks.textvqa(here))
    lines = list(accuracy.ask_all(DualFocus(Bundle.open(threads=1)), RUN, benchmark.questions))
    assert read == ["0000000000000000.jpg", "0000000000000001.jpg"]
    assert lines[0]["metadata"]["size"] == list(Image.open(here / "train_images" / read[0]).size)
