"""What a benchmark asks: its files, as LLaVA's evaluation lays them out, read into questions.

``--data DIR`` is a benchmark's folder, or the one above it (LLaVA's ``playground/data/eval``)::

    textvqa/     llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json, train_images/
    gqa/         llava_gqa_testdev_balanced_mcq.jsonl, data/testdev_balanced_questions.json, data/images/
    seed_bench/  llava-seed-bench-image.jsonl, else llava-seed-bench.jsonl; SEED-Bench.json; pictures
    mmbench/     mmbench_dev_20230712.tsv, or one other .tsv of its columns
    pope/        llava_pope_test.jsonl, coco/coco_pope_{random,popular,adversarial}.json, val2014/

A file that is missing, a question without an answer to compare with, an id that comes twice: each is refused
before anything is asked. Of MMBench's test split no question has an answer: it is asked, and not scored.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from dualfocus.bench import scorers
from dualfocus.runtime import InputError, Question, open_picture
from dualfocus.runtime.files import decode_json, open_file, read_bytes, read_json
from dualfocus.runtime.image import Picture
from dualfocus.runtime.turns import GQA_MCQ, MMBENCH, SEED, Wording

T = TypeVar("T")
Id = str | Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]
Key = tuple[str | int, str]  # what tells questions apart: the id, and the whole question

LIMIT = 1 << 30  # bytes: MMBench's files hold their pictures
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
    references: tuple[str, ...]  # none where the benchmark keeps its answers to itself
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
    notes: tuple[str, ...] = ()  # sentences on how its files were read

    def __post_init__(self) -> None:
        """Raises InputError where two questions have one id that should not, or there are none."""
        if not self.questions:
            raise InputError(f"{self.name}: the file of questions is empty")
        seen: set[object] = set()
        for asked in self.questions:
            if asked.id in seen and not self.ids_repeat:
                raise InputError(f"{self.name}: two questions have the id {asked.id!r:.100}, expected one")
            seen.add(asked.id)

    def first(self, limit: int | None) -> list[Asked]:
        """The questions of the first `limit` units, None for all."""
        taken = set(list(self._units())[:limit])
        return [asked for asked in self.questions if asked.unit in taken]

    @property
    def scored(self) -> bool:
        """False for a test split: its answers are its makers', who score what is sent to them."""
        return bool(self.questions[0].references)

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


class _TextVQAQuestion(msgspec.Struct):
    question_id: str  # the picture's
    image: str
    text: str


class _TextVQAAnswers(msgspec.Struct):
    image_id: str
    question: str
    answers: list[str]


class _TextVQA(msgspec.Struct):
    data: list[_TextVQAAnswers]


def _textvqa(data: Path) -> Benchmark:
    path = _find(data, "textvqa", "llava_textvqa_val_v051_ocr.jsonl")
    annotations = _find(data, "textvqa", "TextVQA_0.5.1_val.json")
    answers = {
        (entry.image_id, entry.question.lower()): tuple(entry.answers)
        for entry in read_json(annotations, _TextVQA, InputError, limit=LIMIT).data
    }
    questions: list[Asked] = []
    for where, entry in _lines(path, _TextVQAQuestion):
        first_line = entry.text.split("\n")[0]
        found = answers.get((entry.question_id, first_line.lower()), ())
        if len(found) != 10:
            raise InputError(
                f"{annotations} has {len(found)} answers to question {entry.question_id!r:.100}, "
                f"{first_line!r:.200}, expected 10"
            )
        question = _question(where, first_line, entry.text)  # as they stand, which `parse` would strip
        picture = _picture(path, "train_images", entry.image)
        questions.append(Asked(entry.question_id, question, picture, found, base=len(questions)))
    return Benchmark("textvqa", questions, scorers.textvqa, ids_repeat=True)


class _GQAQuestion(msgspec.Struct):
    question_id: Id
    image: str
    question: str


class _GQAAnswer(msgspec.Struct):
    answer: str


def _gqa_mcq(data: Path) -> Benchmark:
    path = _find(data, "gqa", "llava_gqa_testdev_balanced_mcq.jsonl")
    annotations = _find(
        data,
        "gqa",
        *(f"{folder}testdev_balanced_questions.json" for folder in ("data/", "data/questions1.2/", "")),
    )
    answers = read_json(annotations, dict[str, _GQAAnswer], InputError, limit=LIMIT)
    questions = []
    for where, entry in _lines(path, _GQAQuestion):
        right = answers.get(str(entry.question_id))
        if right is None:
            raise InputError(f"{annotations} has no answer to question {entry.question_id!r:.100} of {path}")
        first_line, *options = entry.question.split("\n")
        question = _choice(where, first_line, options, f"{entry.question}\n{LETTER_HINT}", GQA_MCQ)
        picture = _picture(path, "data/images", entry.image)
        questions.append(Asked(entry.question_id, question, picture, (right.answer,), spelled=True))
    return Benchmark("gqa-mcq", questions, scorers.gqa)


class _SEEDQuestion(msgspec.Struct):
    question_id: Id
    image: str
    text: str


class _SEEDAnswer(msgspec.Struct):
    question_id: Id
    question_type_id: int
    data_type: str
    answer: str


class _SEED(msgspec.Struct):
    question_type: dict[str, int]
    questions: list[_SEEDAnswer]


def _seed(data: Path) -> Benchmark:
    path = _find(data, "seed_bench", "llava-seed-bench-image.jsonl", "llava-seed-bench.jsonl")
    annotations = _find(data, "seed_bench", "SEED-Bench.json")
    known = read_json(annotations, _SEED, InputError, limit=LIMIT)
    names = {number: name for name, number in known.question_type.items()}
    answers = {str(entry.question_id): entry for entry in known.questions}
    questions = []
    for where, entry in _lines(path, _SEEDQuestion):
        answer = answers.get(str(entry.question_id))
        if answer is None:
            raise InputError(f"{annotations} has no answer to question {entry.question_id!r:.100} of {path}")
        first_line, *options = entry.text.split("\n")
        if options and not options[-1].startswith(f"{ascii_uppercase[len(options) - 1 :][:1]}. "):
            options.pop()  # the hint, which some files do without
        question = _choice(where, first_line, options, entry.text, SEED)
        groups = names.get(answer.question_type_id, ""), answer.data_type
        picture = _picture(path, "", entry.image)
        questions.append(Asked(entry.question_id, question, picture, (answer.answer,), groups))
    kinds = [name for name in (*names.values(), "image", "video") if any(name in q.groups for q in questions)]
    return Benchmark("seed", questions, scorers.exact, tuple(kinds))


def _mmbench(data: Path) -> Benchmark:
    path = _find(data, "mmbench", "mmbench_dev_20230712.tsv", "*.tsv")
    pictures: dict[str, Encoded] = {}  # by cell: rotations repeat theirs
    cells: dict[int, str] = {}  # by index
    read: list[tuple[str, int, Question, str, tuple[str, ...]]] = []
    for where, row in _rows(path, ("index", "question", "A", "image")):
        index, text, cell = (row[name] or "" for name in ("index", "question", "image"))
        options = tuple(itertools.takewhile(bool, (_cell(row, name) for name in "ABCD")))
        answer = _cell(row, "answer")
        # an answer behind an option that reads "None" can only be missed, as in the published scripts
        if not _is_index(index) or answer not in ("", *"ABCD") or not options:
            raise InputError(
                f"{where}: its index is {index!r:.20}, its answer {answer!r:.20} and its options "
                f"{len(options)}, expected a number, one of A to D, and at least one"
            )
        if not _is_index(cell) and cell not in pictures:
            if not cell:
                raise InputError(f"{where}: its image is empty, expected base64, or the index of another row")
            try:
                pictures[cell] = Encoded(base64.b64decode("".join(cell.split()), validate=True))
            except ValueError as error:  # binascii's is one
                raise InputError(f"{where}: its image is not in base64: {error}") from None
        cells[int(index)] = cell
        context = _cell(row, "hint")
        lettered = [f"{name}. {option}" for name, option in zip("ABCD", options, strict=False)]
        whole = "\n".join([*filter(None, [context]), text, *lettered, LETTER_HINT])
        groups = tuple(filter(None, [_cell(row, "l2-category") or _cell(row, "category")]))
        question = _question(where, text, whole, options, context, MMBENCH)
        read.append((where, int(index), question, answer, groups))
    rotations: dict[int, list[Asked]] = {}
    scored = any(answer for *_, answer, _ in read)
    for where, id, question, answer, groups in read:
        if scored and not answer:
            raise InputError(
                f"{where}: it has no answer, expected one in every row, or in none as in a test split"
            )
        cell = cells[id]
        if _is_index(cell):  # VLMEvalKit's files hold each picture once
            of, cell = cell, cells.get(int(cell), "")
            if cell not in pictures:
                why = "has another row's itself, expected one" if cell else "is not there"
                raise InputError(f"{where}: its image is that of the row with the index {of}, which {why}")
        asked = Asked(id, question, pictures[cell], (answer,) if answer else (), groups, id % ROTATION)
        rotations.setdefault(id % ROTATION, []).append(asked)
    if scored and all(len(of) == 1 for of in rotations.values()):
        raise InputError(
            f"{path} has no rotations, ids that are {ROTATION:,} apart: its score is of all of a question's"
        )
    # one after the other: they share the picture
    questions = [asked for of in rotations.values() for asked in of]
    groups = tuple(dict.fromkeys(group for asked in questions for group in asked.groups))
    notes = () if scored else (TEST_SPLIT,)
    return Benchmark("mmbench", questions, scorers.exact, groups, notes=notes)


TEST_SPLIT = (
    "without answers, as in a test split, there is no score: LLaVA's convert_mmbench_for_submission.py makes "
    "of the file of answers what MMBench's makers score"
)


def _is_index(cell: str) -> bool:
    """A row's number. Digits are base64 too, but no picture's file has only such in base64."""
    return cell.isascii() and cell.isdecimal() and len(cell) <= 18


POPE = ("random", "popular", "adversarial")
POPE_COMMIT = "e3e3926"  # of POPE's repository: its labels are those of LLaVA's questions, word for word


class _POPEQuestion(msgspec.Struct):
    question_id: Id
    image: str
    text: str
    category: str


class _POPELabel(msgspec.Struct):
    image: str
    text: str
    label: str


def _pope(data: Path) -> Benchmark:
    path = _find(data, "pope", "llava_pope_test.jsonl")
    labels: dict[tuple[str, str, str], _POPELabel] = {}
    for category in POPE:
        # its ids are not those of the questions: a label is its question's by picture and words
        annotations = _find(data, "pope", f"coco/coco_pope_{category}.json", f"coco_pope_{category}.json")
        for where, entry in _lines(annotations, _POPELabel):
            key = category, entry.image, _corrected(entry.text.strip())
            if entry.label not in ("yes", "no") or labels.setdefault(key, entry).label != entry.label:
                raise InputError(
                    f"{where}: the label is {entry.label!r:.20}, expected yes or no, and always the same"
                )
    questions, respelled = [], 0
    for where, asked in _lines(path, _POPEQuestion):
        first_line = asked.text.split("\n")[0]
        if asked.category not in POPE:
            raise InputError(f"{where}: its category is {asked.category!r:.40}, expected {', '.join(POPE)}")
        found = labels.get((asked.category, asked.image, _corrected(first_line.strip())))
        if found is None:
            raise InputError(
                f"coco_pope_{asked.category}.json has no label for question {asked.question_id!r:.100} "
                f"of {path}, {first_line!r:.200}: expected POPE's labels of commit {POPE_COMMIT}"
            )
        respelled += found.text.strip() != first_line.strip()
        question = _question(where, first_line, asked.text)
        picture = _picture(path, "val2014", asked.image)
        questions.append(Asked(asked.question_id, question, picture, (found.label,), (asked.category,)))
    note = (
        f"{respelled:,} questions spell 'image' in another way than their labels, one of both 'imange': POPE "
        f"corrected its labels after commit {POPE_COMMIT}, of which LLaVA's questions are"
    )
    notes = (note,) if respelled else ()
    return Benchmark("pope", questions, scorers.pope, POPE, POPE, notes=notes)


def _corrected(text: str) -> str:
    return text.replace("imange", "image")


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
    if not 0 < len(options) <= len(ascii_uppercase):
        raise InputError(
            f"{where}: the question has {len(options) or 'no'} options, expected lines such as 'A. …'"
        )
    # as the published scripts do: without looking, the letter, a point and a space
    return _question(where, first_line, whole, tuple(option[3:] for option in options), "", wording)


def _question(where: str, *parts: Any) -> Question:
    try:
        return Question(*parts)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The rows of a TSV file, which has these `columns` at least, each with where it stands."""
    csv.field_size_limit(LIMIT)  # a picture is one field
    with (
        open_file(path, InputError) as binary,
        io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file,
    ):
        rows = csv.DictReader(file, delimiter="\t")
        try:
            missing = [name for name in columns if name not in (rows.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {missing[0]}, expected a TSV file of MMBench's")
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a TSV file in UTF-8: {error}") from None


def _cell(row: Mapping[str, str | None], name: str) -> str:
    """Empty for nothing, as the published scripts see that."""
    cell = row.get(name) or ""
    return "" if cell in _NOTHING or cell.lower() in ("nan", "none") else cell


def _lines(path: Path, kind: type[T]) -> Iterator[tuple[str, T]]:
    """The lines of a JSONL file as `kind`, each with where it stands."""
    for number, line in enumerate(read_bytes(path, InputError, limit=LIMIT).split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, decode_json(line, kind, InputError, where)
