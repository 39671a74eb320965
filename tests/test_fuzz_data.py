"""Mutated benchmarks, answers, results, Visual Genome and training files: a sentence, or a right answer."""

from __future__ import annotations

import functools
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import benchmarks
import fuzzing
import pytest
from rich.console import Console
from test_curate import picture, qa, region, thing, whole
from test_eval import answered

from dualfocus.bench import accuracy, compare, questions
from dualfocus.bench.answers import Answers, Line, Run
from dualfocus.runtime import InputError
from dualfocus.runtime.errors import PictureWarning
from dualfocus.runtime.files import to_json
from dualfocus.train import dataset, samples

warnings.simplefilter("ignore", PictureWarning)  # what a person is told of missing rows is no fault

CASES = 2000

# ---- benchmarks


@functools.cache
def _files(name: str) -> dict[str, bytes]:
    """A small benchmark of that name: its files by their paths."""
    with tempfile.TemporaryDirectory() as place:
        folder = benchmarks.WRITERS[name](Path(place))
        if name == "mmbench":  # one that names its pictures' rows
            (path,) = folder.glob("*.tsv")
            rows = [line.split("\t") for line in path.read_text().splitlines()]
            for row in rows[3:]:
                row[9] = str(int(row[0]) % questions.ROTATION)
            path.write_text("".join("\t".join(row) + "\n" for row in rows))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def prepare() -> None:
    """Make what all cases begin with. No power is cut here: syncs would only keep the disk busy."""
    os.fsync = lambda _: None  # type: ignore[assignment]
    for name in benchmarks.WRITERS:
        _files(name)


def _write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _mutate_lines(data: bytes, random: Random) -> bytes:
    """JSONL of which some lines are changed."""
    lines = data.splitlines(keepends=True)
    for at in random.sample(range(len(lines)), random.choice((1, 1, 2))):
        lines[at] = fuzzing.mutate_json(lines[at], random) + b"\n"
    return b"".join(random.choice((lines, lines, lines[::-1], lines[:1] * 2, lines + lines[:1])))


def _mutate_table(data: bytes, random: Random) -> bytes:
    """TSV of which some cells are changed."""
    rows = [line.split(b"\t") for line in data.splitlines()]
    for _ in range(random.choice((1, 1, 2, 5))):
        row = random.choice(rows)
        at = random.randrange(len(row))
        other = random.choice(random.choice(rows))
        number = str(random.choice(fuzzing.NUMBERS)).encode()
        text = random.choice(fuzzing.TEXTS).encode()
        row[at] = random.choice((fuzzing.mutate_bytes(row[at], random), other, number, text, b"", b'"'))
        if random.random() < 0.1:
            del row[at]
    return b"".join(b"\t".join(row) + b"\n" for row in rows)


def _mutate_file(name: str, data: bytes, random: Random) -> bytes:
    ways: list[Callable[[bytes, Random], bytes]] = [fuzzing.mutate_bytes]
    if name.endswith(".tsv"):
        ways += [_mutate_table] * 4
    elif data.count(b"\n") > 1 or name.endswith(".jsonl"):
        ways += [_mutate_lines] * 4
    else:
        ways += [fuzzing.mutate_json] * 4
    return random.choice(ways)(data, random)


def _report(benchmark: questions.Benchmark, lines: list[Line], run: Run) -> None:
    """Score these answers, and show the score."""
    with Answers(None, run) as answers:
        for line in {(line["question_id"], line["prompt"]): line for line in lines}.values():
            answers.append(line)
        result = accuracy.summarise(benchmark, answers, None)
    head = {"bench": benchmark.name, "bundle": "nano"}
    accuracy.show(head | result, Console(file=io.StringIO(), width=100))
    json.loads(to_json(result), parse_constant=pytest.fail)


def mutated_benchmark(random: Random, folder: Path) -> None:
    """One file of one benchmark is another; what can be read is answered, scored and shown."""
    name = random.choice([*benchmarks.WRITERS])
    files = dict(_files(name))
    changed = random.choice([path for path in files if path.endswith((".json", ".jsonl", ".tsv"))])
    files[changed] = _mutate_file(changed, files[changed], random)
    benchmark = questions.read(name, _write(folder, files))
    run = Run(name, "dual", "nano", "")
    answered_all = [
        answered(of, run, macro=random.choice(("A", "yes", "", "x")), micro="B") for of in benchmark.questions
    ]
    _report(benchmark, answered_all, run)
    with Answers(None, run) as answers:
        accuracy.answer_all(benchmark, answers, lambda todo: [answered(of, run) for of in todo], None)
    for of in benchmark.questions:
        of.picture.read()


# ---- answers


def mutated_answers(random: Random, folder: Path) -> None:
    """A file of answers is another: it is refused, or taken and scored."""
    name = random.choice(("pope", "mmbench", "textvqa"))
    benchmark = questions.read(name, _write(folder / "data", _files(name)))
    run = Run(name, "dual", "nano", "0123456789abcdef")
    box = {"box": [1.0, 2.0, 30.0, 40.0], "crop": [0, 0, 50, 60]}
    lines = [answered(of, run, macro="A", micro="B", **box) for of in benchmark.questions]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    ways = [_mutate_lines, _mutate_lines, fuzzing.mutate_bytes, _lose_the_end]
    path = folder / "a.jsonl"
    path.write_bytes(random.choice(ways)(data, random))
    with Answers(path, run) as answers:
        accuracy.answer_all(benchmark, answers, lambda todo: [answered(of, run) for of in todo], None)
        answers.arrange(of.key for of in benchmark.questions)
    _report(benchmark, list(answers.lines.values()), run)
    with Answers(path, run) as again:
        assert again.lines == answers.lines


def _lose_the_end(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + bytes(random.choice((0, 1, len(data) - at, 100_000)))


# ---- results

RESULT = {
    "schema": 2, "bench": "limits", "bundle": "nano",
    "machine": {"date": "2026-01-01T00:00:00", "versions": {"numpy": "2.0"}, "cores": 2, "memory": None},
    "rows": [{"peer": "ours", "ms": {"median": 1.5, "low": 1.0, "high": 2.0}}, {"part": "x", "share": 0.5}],
}  # fmt: skip


def mutated_result(random: Random, folder: Path) -> None:
    """One of two results is another."""
    new = folder / "new.json"
    (folder / "old.json").write_text(json.dumps(RESULT))
    new.write_bytes(fuzzing.mutate_json(json.dumps(RESULT).encode(), random))
    result = compare.run(compare.read(folder / "old.json"), compare.read(new))
    compare.show(result, Console(file=io.StringIO(), width=100))
    to_json(result)


# ---- Visual Genome

GENOME: dict[str, Any] = whole(
    picture(
        qa(5, "What is the man wearing?", "A hat.", 11),
        qa(6, "What is behind the red car?", "A wall.", 12, found=(11,)),
        qa(7, "What is behind the tree?", "A wall.", 15),
        qa(8, "How many cars are there?", "2", 12, 13) | {"q_objects": [thing(12, "car", 100, 40, 50, 40)]},
        regions=[region(3, 20, 10, 30, 20), region(4, 0, 0, 100, 50)],
        mapping={"5": 3, "7": 4},
    )
)


def mutated_genome(random: Random, folder: Path) -> None:
    """One of the files is another; what is made of it is a data set, and nothing else is left."""
    files = {f"{name}.json": json.dumps(content).encode() for name, content in GENOME.items()}
    for changed in random.sample(sorted(files), random.choice((1, 1, 2))):
        ways = [fuzzing.mutate_bytes, *[fuzzing.mutate_json] * 4]
        files[changed] = random.choice(ways)(files[changed], random)
    source = _write(folder / "in", files)
    try:
        statistics = dataset.build(source, folder / "new" / "out")
    except InputError:
        assert [path.name for path in folder.iterdir()] == ["in"]
        raise
    assert [path.name for path in (folder / "new").iterdir()] == ["out"]
    made = json.loads((folder / "new" / "out" / "dialogues.json").read_bytes(), parse_constant=pytest.fail)
    assert len(made) == statistics["kept"]
    for one in made:
        x0, y0, x1, y1 = one["sub_area"]
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1


# ---- training files

SAMPLES: list[Any] = [
    {
        "id": 1, "image": "0.png", "sub_area": [0.1, 0.2, 0.5, 0.6],
        "conversations": [{"from": who, "value": text} for who, text in (
            ("human", "<image>\nWhere?"), ("gpt", "[0.10, 0.20, 0.50, 0.60]"), ("human", "<image>\nWhat?"),
            ("gpt", "red"),
        )],
    },
    {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]  # fmt: skip


def mutated_samples(random: Random, folder: Path) -> None:
    """The file is another; a sample of it is whole, or dropped."""
    (folder / "0.png").write_bytes(benchmarks.drawing(0))
    (folder / "samples.json").write_bytes(fuzzing.mutate_json(json.dumps(SAMPLES).encode(), random))
    found, _ = samples.read(folder / "samples.json", folder)
    for sample in found:
        assert sample.length(64) >= 0
        assert sample.images in (0, 1, 2)
        sample.question()


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [mutated_benchmark, mutated_answers, mutated_result, mutated_genome, mutated_samples]
)
def test_a_mutated_file_is_a_sentence_or_a_right_answer(target: fuzzing.Target, tmp_path: Path) -> None:
    found = fuzzing.fuzz(target, CASES, tmp_path)
    assert not found, fuzzing.report(found)
