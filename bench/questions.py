"""What a benchmark asks: its files, as LLaVA's evaluation lays them out, read into questions.

``--data DIR`` is a benchmark's folder, or the one above it (LLaVA's ``playground/data/eval``)::

    textvqa/     llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json, train_images/
    gqa/         llava_gqa_testdev_balanced_mcq.jsonl, data/testdev_balanced_questions.json, data/images/
    seed_bench/  llava-seed-bench-image.jsonl, else llava-seed-bench.jsonl; SEED-Bench.json; pictures
    mmbench/     mmbench_dev_20230712.tsv, or one other .tsv of its columns
    pope/        llava_pope_test.jsonl, coco/coco_pope_{random,popular,adversarial}.json, val2014/

A file that is missing, a question without an answer to compare with, an id that comes twice: each is refused
before anything is asked.
"""

from __future__ import annotations

import base64
import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dualfocus.bench import scorers
from dualfocus.runtime import InputError, Question, open_picture
from dualfocus.runtime.image import Picture
from dualfocus.runtime.turns import GQA_MCQ, MMBENCH, SEED, Wording

Key = tuple[str | int, str]  # what tells questions apart: the id, and the whole question

LETTER_HINT = "Answer with the option's letter from the given choices directly."
ROTATION = 1_000_000  # MMBench: what the ids of a question's rotations are apart
# pandas, with which the published scripts read MMBench, takes these for nothing; so do they "nan" and "none"
_NOTHING = {"", "null", "NULL", "NA", "N/A", "n/a", "<NA>", "#NA", "#N/A", "#N/A N/A", "-nan", "-NaN"}
_NOTHING |= {f"{sign}1.#{kind}" for sign in ("", "-") for kind in ("IND", "QNAN")}


class Source(Protocol):
    """Where a picture comes from. Sources are compared: questions about one share its pixels."""

    def read(self) -> Picture:
        """Raises PictureError where there is none."""


@dataclass(frozen=True)
class File:
    """A picture's file."""

    path: str

    def read(self) -> Picture:
        """Raises PictureError where there is none."""
        return open_picture(self.path)


@dataclass(frozen=True)
class Encoded:
    """A picture's file that lies in another one."""

    data: bytes

    def read(self) -> Picture:
        """Raises PictureError where there is none."""
        return open_picture(self.data)


@dataclass(frozen=True)
class Asked:
    """A question to ask, and what its answer is compared with; it can be sent to other processes."""

    id: str | int
    question: str | Question
    picture: Source
    references: tuple[str, ...]
    groups: tuple[str, ...] = ()  # the rows of the table that it counts in, beside the last
    base: str | int | None = None  # questions of one base count as one, right where all are
    spelled: bool = False  # the text of the chosen option is compared, not its letter
    region: tuple[float, float, float, float] | None = None  # what to look at, in pixels, where known

    @property
    def prompt(self) -> str:
        """The whole question, as it is written down with its answer."""
        return self.question if isinstance(self.question, str) else self.question.whole

    @property
    def key(self) -> Key:
        """What it is told by."""
        return self.id, self.prompt

    @property
    def unit(self) -> object:
        """What it counts as a part of: its base, else itself."""
        return self.key if self.base is None else self.base

    def final(self, said: str) -> str:
        """What of a pass's answer is compared: where it names an option, that."""
        if isinstance(self.question, str) or (named := self.question.letter(said)) is None:
            return said
        return self.question.options[ord(named) - ord("A")] if self.spelled else named


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's questions, in the order in which they are asked, and the rule of its score."""

    name: str
    questions: Sequence[Asked]
    rule: scorers.Rule
    groups: tuple[str, ...] = ()  # the rows of its table, in order; one of all questions follows
    yes_no: tuple[str, ...] = ()  # those of yes-and-no questions, which POPE's rule and figures are for
    ids_repeat: bool = False  # TextVQA's, of its pictures: a question asked twice counts twice

    def __post_init__(self) -> None:
        """Raises InputError where two questions have one id that should not, or there are none."""
        if not self.questions:
            raise InputError(f"{self.name}: the file of questions is empty")
        seen: set[object] = set()
        for asked in self.questions:
            if asked.id in seen and not self.ids_repeat:
                raise InputError(f"{self.name}: two questions have the id {asked.id!r}, expected one")
            seen.add(asked.id)

    def first(self, limit: int | None) -> list[Asked]:
        """The questions of the first `limit` units, None for all."""
        taken = set(list(self._units())[:limit])
        return [asked for asked in self.questions if asked.unit in taken]

    @property
    def size(self) -> int:
        """How many questions the score is a share of."""
        return len(self._units())

    def _units(self) -> dict[object, None]:
        return dict.fromkeys(asked.unit for asked in self.questions)


def read(name: str, data: Path) -> Benchmark:
    """The benchmark `name`, one of `READERS`, from the folder `data`. Raises InputError."""
    if not data.is_dir():
        raise InputError(f"--data {data} is not a folder, expected one with the files of {name}")
    return READERS[name](data)


def _textvqa(data: Path) -> Benchmark:
    path = _find(data, "textvqa", "llava_textvqa_val_v051_ocr.jsonl")
    annotations = _find(data, "textvqa", "TextVQA_0.5.1_val.json")
    answers: dict[tuple[str, str], tuple[str, ...]] = {}
    for entry in _fields(annotations, _json(annotations))("data", list):
        of = _fields(annotations, entry)
        given = tuple(of("answers", list))
        if not all(isinstance(answer, str) for answer in given):
            raise InputError(f"{annotations}: its answers are {given!r:.40}, expected texts")
        answers[of("image_id", str), of("question", str).lower()] = given
    questions: list[Asked] = []
    for where, entry in _lines(path):
        of = _fields(where, entry)
        id, text = of("question_id", str), of("text", str)
        found = answers.get((id, text.split("\n")[0].lower()), ())
        if len(found) != 10:
            raise InputError(
                f"{annotations} has {len(found)} answers to question {id}, {text.split(chr(10))[0]!r}, "
                "expected 10"
            )
        question = _question(where, text.split("\n")[0], text)  # as they stand, which `parse` would strip
        picture = _picture(path, "train_images", of("image", str))
        questions.append(Asked(id, question, picture, found, base=len(questions)))
    return Benchmark("textvqa", questions, scorers.textvqa, ids_repeat=True)


def _gqa_mcq(data: Path) -> Benchmark:
    path = _find(data, "gqa", "llava_gqa_testdev_balanced_mcq.jsonl")
    annotations = _find(
        data,
        "gqa",
        *(f"{folder}testdev_balanced_questions.json" for folder in ("data/", "data/questions1.2/", "")),
    )
    answers = _json(annotations)
    questions = []
    for where, entry in _lines(path):
        of = _fields(where, entry)
        id, text = of("question_id", str, int), of("question", str)
        answer = _fields(f"{annotations}, question {id}", answers.get(str(id)))
        right = (answer("answer", str),)
        first_line, *options = text.split("\n")
        question = _choice(where, first_line, options, f"{text}\n{LETTER_HINT}", GQA_MCQ)
        picture = _picture(path, "data/images", of("image", str))
        questions.append(Asked(id, question, picture, right, spelled=True))
    return Benchmark("gqa-mcq", questions, scorers.gqa)


def _seed(data: Path) -> Benchmark:
    path = _find(data, "seed_bench", "llava-seed-bench-image.jsonl", "llava-seed-bench.jsonl")
    annotations = _find(data, "seed_bench", "SEED-Bench.json")
    known = _fields(annotations, _json(annotations))
    kind_of = _fields(f"{annotations}, question_type", known("question_type", dict))
    names = {kind_of(name, int): name for name in known("question_type", dict)}
    told: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for entry in known("questions", list):
        of = _fields(annotations, entry)
        kind = names.get(of("question_type_id", int), "")
        told[str(of("question_id", str, int))] = (of("answer", str),), (kind, of("data_type", str))
    questions = []
    for where, entry in _lines(path):
        of = _fields(where, entry)
        id, text = of("question_id", str, int), of("text", str)
        if str(id) not in told:
            raise InputError(f"{annotations} has no answer to question {id} of {path}")
        right, groups = told[str(id)]
        first_line, *options, _ = text.split("\n") if "\n" in text else (text, "")
        question = _choice(where, first_line, options, text, SEED)
        questions.append(Asked(id, question, _picture(path, "", of("image", str)), right, groups))
    kinds = [name for name in (*names.values(), "image", "video") if any(name in q.groups for q in questions)]
    return Benchmark("seed", questions, scorers.exact, tuple(kinds))


def _mmbench(data: Path) -> Benchmark:
    path = _find(data, "mmbench", "mmbench_dev_20230712.tsv", "*.tsv")
    pictures: dict[str, Encoded] = {}  # rotations repeat theirs
    rotations: dict[int, list[Asked]] = {}
    for where, row in _rows(path):
        of = _fields(where, row)
        index, answer, text, encoded = (of(name, str) for name in ("index", "answer", "question", "image"))
        options = tuple(itertools.takewhile(bool, (_cell(row, name) for name in "ABCD")))
        # an answer behind an option that reads "None" can only be missed, as in the published scripts
        if not index.isdecimal() or len(index) > 18 or answer not in tuple("ABCD") or not options:
            raise InputError(
                f"{where}: its index is {index!r:.20}, its answer {answer!r:.20} and its options "
                f"{len(options)}, expected a number, one of A to D, and at least one"
            )
        if encoded not in pictures:
            try:
                pictures[encoded] = Encoded(base64.b64decode(encoded, validate=True))
            except ValueError as error:  # binascii's is one
                raise InputError(f"{where}: its image is not in base64: {error}") from None
        context = _cell(row, "hint")
        lettered = [f"{name}. {option}" for name, option in zip("ABCD", options, strict=False)]
        whole = "\n".join([*filter(None, [context]), text, *lettered, LETTER_HINT])
        groups = tuple(filter(None, [_cell(row, "l2-category") or _cell(row, "category")]))
        question, id = _question(where, text, whole, options, context, MMBENCH), int(index)
        asked = Asked(id, question, pictures[encoded], (answer,), groups, id % ROTATION)
        rotations.setdefault(id % ROTATION, []).append(asked)
    if all(len(of) == 1 for of in rotations.values()):
        raise InputError(
            f"{path} has no rotations, ids that are {ROTATION:,} apart: its score is of all of a question's"
        )
    # one after the other: they share the picture
    questions = [asked for of in rotations.values() for asked in of]
    groups = tuple(dict.fromkeys(group for asked in questions for group in asked.groups))
    return Benchmark("mmbench", questions, scorers.exact, groups)


POPE = ("random", "popular", "adversarial")


def _pope(data: Path) -> Benchmark:
    path = _find(data, "pope", "llava_pope_test.jsonl")
    labels: dict[tuple[str, str, str], str] = {}
    for category in POPE:
        # its ids are not those of the questions: a label is its question's by picture and words
        annotations = _find(data, "pope", f"coco/coco_pope_{category}.json", f"coco_pope_{category}.json")
        for where, entry in _lines(annotations):
            of = _fields(where, entry)
            asked = category, of("image", str), of("text", str).strip()
            label = of("label", str)
            if label not in ("yes", "no") or labels.setdefault(asked, label) != label:
                raise InputError(
                    f"{where}: the label is {label!r:.20}, expected yes or no, and always the same"
                )
    questions = []
    for where, entry in _lines(path):
        of = _fields(where, entry)
        id, text, category = of("question_id", int, str), of("text", str), of("category", str)
        first_line, image = text.split("\n")[0].strip(), of("image", str)
        found = labels.get((category, image, first_line))
        if found is None:
            raise InputError(f"coco_pope_{category}.json has no label for question {id} of {path}")
        question = _question(where, text.split("\n")[0], text)
        questions.append(Asked(id, question, _picture(path, "val2014", image), (found,), (category,)))
    return Benchmark("pope", questions, scorers.pope, POPE, POPE)


READERS: Mapping[str, Callable[[Path], Benchmark]] = {
    "textvqa": _textvqa,
    "gqa-mcq": _gqa_mcq,
    "seed": _seed,
    "mmbench": _mmbench,
    "pope": _pope,
}


def _find(data: Path, folder: str, *names: str) -> Path:
    """The first of `names` in `data`, or in its `folder`; a pattern has to fit one file alone."""
    for name in names:
        for place in (data, data / folder):
            found = sorted(place.glob(name))
            if len(found) > 1:
                listed = ", ".join(path.name for path in found)
                raise InputError(f"{place} holds {listed}: expected one of them, or {names[0]}")
            if found:
                return found[0]
    raise InputError(f"neither {data} nor its folder {folder} holds {' or '.join(names)}")


def _picture(beside: Path, folder: str, name: str) -> File:
    """A picture in a folder that lies beside the questions."""
    return File(str(beside.parent / folder / name))


def _choice(where: str, first_line: str, options: Sequence[str], whole: str, wording: Wording) -> Question:
    if not options:
        raise InputError(f"{where}: the question has no options, expected lines such as 'A. …'")
    # as the published scripts do: without looking, the letter, a point and a space
    return _question(where, first_line, whole, tuple(option[3:] for option in options), "", wording)


def _question(where: str, *parts: Any) -> Question:
    try:
        return Question(*parts)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The rows of a TSV file with its columns' names, each with where it stands."""
    csv.field_size_limit(1 << 30)  # a picture is one field
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 1):
                yield f"{path}, row {number}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TSV file in UTF-8: {error}") from None


def _cell(row: Mapping[str, str | None], name: str) -> str:
    """Empty for nothing, as the published scripts see that."""
    cell = row.get(name) or ""
    return "" if cell in _NOTHING or cell.lower() in ("nan", "none") else cell


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a JSONL file, each with where it stands."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {number} is not JSON: {error}") from None


def _fields(where: object, entry: Any) -> Callable[..., Any]:
    """Reads fields of `entry`, by name and the types they may have. Raises InputError."""

    def of(name: str, *kinds: type) -> Any:
        found = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(found, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{where}: its {name} is {found!r:.40}, expected {expected}")
        return found

    return of
