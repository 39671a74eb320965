"""Visual Genome's files, v1.2 and v1.4, read picture by picture in a little memory, and written likewise.

The files are lists of pictures, hundreds of megabytes long, mostly but not surely in one order. Each is read
once, as a stream; what is needed of a picture goes to a spool on the disk, from where `pictures` gathers it.
What a record says in another of the format's spellings is told in one; a record that cannot be used is left
out and counted. Of an object with a bad box, the names stay: it is still another one of its kind. So does a
question with a bad object.
"""

from __future__ import annotations

import codecs
import json
import lzma
import marshal
import re
import zipfile
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple

import ijson
import numpy as np
from PIL import Image

from dualfocus.runtime.errors import InputError
from dualfocus.runtime.turns import DUALFOCUS
from dualfocus.train.curate import Records

Watch = Callable[[str, int, int], object]  # told what is done, how much of it, and of how much
Entry = Mapping[str, Any]
Complain = Callable[[str], object]  # called with the reason why a part of a record alone is left out

REQUIRED = ("image_data", "objects", "region_descriptions", "question_answers")
MAPPING = "qa_to_region_mapping"
OPTIONAL = ("attributes", MAPPING)
FOLDERS = ("VG_100K", "VG_100K_2")  # of the pictures, in the real data set
SUFFIXES = (".jpg", ".jpeg", ".png")
LARGEST = 1_000_000_000  # of a picture's and a box's numbers
_FILE = re.compile(r"(\w+?)(_v\d+(?:_\d+)?)?\.json(\.zip)?")  # as they are downloaded: objects_v1_2.json.zip
DEPTH = 100
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_STEPS = bytes({*range(256)} - {*b"[{]}"})
UNKNOWN: dict[str, Any] = {"object_id": None}  # an object that a question names, and nobody can read
STEP = 1 << 20  # bytes between two words on the progress


class MalformedError(Exception):
    """A record that is left out; the message is the reason that is counted."""


class _File(NamedTuple):
    """One of the JSON files, which may lie in an archive of its own; `size` in bytes, unpacked."""

    path: Path
    member: str | None
    size: int

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        with ExitStack() as opened:
            if self.member is None:
                yield opened.enter_context(self.path.open("rb"))
            else:
                with _unpacking(self.path):
                    archive = opened.enter_context(zipfile.ZipFile(self.path))
                    member = opened.enter_context(archive.open(self.member))
                yield member


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Raise InputError for an archive that is damaged, encrypted, or packed in a way unknown here."""
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: no archive that can be read: {error}") from None


class Spool:
    """Values by kind and picture on the disk; in memory is only where they lie."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._places: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
        self._end = 0

    def put(self, kind: str, key: int, value: Any) -> None:
        """MalformedError if there is one already."""
        if key in self._places[kind]:
            raise MalformedError("the picture's second record")
        data = marshal.dumps(value)
        self._file.write(data)
        self._places[kind][key] = self._end, len(data)
        self._end += len(data)

    def get(self, kind: str, key: int) -> Any:
        """None if there is none."""
        start, length = self._places[kind].get(key, (0, 0))
        if not length:
            return None
        self._file.seek(start)
        return marshal.loads(self._file.read(length))

    def keys(self, kind: str) -> Collection[int]:
        """Of the pictures that have a value."""
        return self._places[kind].keys()

    def close(self) -> None:
        self._file.close()


class Annotations:
    """A folder of Visual Genome, read into a spool.

    `malformed` counts the records left out, by file and reason; `notes` are sentences on what is missing.
    """

    def __init__(self, folder: Path, spool: Path, watch: Watch = lambda *_: None) -> None:
        """Reads every file once. InputError if one is missing, cut off or no JSON."""
        files = _find(folder)
        self.malformed: dict[str, Counter[str]] = {name: Counter() for name in files}
        self.notes = [f"{folder} has no {name}.json" for name in OPTIONAL if name not in files]
        self._spool = Spool(spool)
        self._questions, self._regions = array("q"), array("q")  # the mapping's two columns
        total, before = sum(file.size for file in files.values()), 0
        for name, file in files.items():
            count, seen = self.malformed[name], -STEP
            with file.open() as stream:
                for entry in _records(file.path, stream, "{" if name == MAPPING else "["):
                    if stream.tell() >= seen + STEP:
                        seen = stream.tell()
                        watch(f"reading {file.path.name}", before + seen, total)
                    try:
                        self._take(name, entry, count)
                    except MalformedError as reason:
                        count[str(reason)] += 1
            before += file.size
        questions, regions = np.array(self._questions, np.int64), np.array(self._regions, np.int64)
        order = np.argsort(questions, kind="stable")
        self._mapping = questions[order], regions[order]

    def _take(self, name: str, entry: Any, count: Counter[str]) -> None:
        if name == MAPPING:
            pair = dict(zip(("qa_id", "region_id"), entry, strict=True))
            question, region = _id(pair, "qa_id"), _id(pair, "region_id")
            self._questions.append(question)
            self._regions.append(region)
            return
        if not isinstance(entry, dict):
            raise MalformedError("not an object")
        picture = _id(entry, "image_id")
        if name == "image_data":
            self._spool.put(name, picture, _size(entry))
            return
        within, parse = _PARTS[name]
        found: dict[int, Entry] = {}
        parts = entry.get(within)
        if not isinstance(parts, list):
            raise MalformedError(f"no list of {within}")
        for part in parts:
            try:
                if not isinstance(part, dict):
                    raise MalformedError(f"{within}: not an object")
                if _digits(part.get("image_id")) not in (None, picture):
                    raise MalformedError(f"{within}: of another picture")
                key, value = parse(part, lambda reason: count.update([reason]))
                if key in found:
                    raise MalformedError(f"{within}: an id for the second time")
                found[key] = value
            except MalformedError as reason:
                count[str(reason)] += 1
        if found:  # many pictures have a record, and nothing in it
            self._spool.put(name, picture, list(found.values()))

    def __len__(self) -> int:
        """How many pictures have questions."""
        return len(self._spool.keys("question_answers"))

    def pictures(self) -> Iterator[tuple[int, Records]]:
        """The image_id and the records of every picture with questions, in rising order, as `curate.judge`
        takes them; an `image_data` of None if the picture is not listed there."""
        get = self._spool.get
        for picture in sorted(self._spool.keys("question_answers")):
            questions = sorted(get("question_answers", picture), key=itemgetter("qa_id"))
            records = {
                "image_data": get("image_data", picture),
                "attributes": {"attributes": _joined(get("objects", picture), get("attributes", picture))},
                "region_descriptions": {"regions": get("region_descriptions", picture) or ()},
                "question_answers": {"qas": questions},
                MAPPING: self._mapped([qa["qa_id"] for qa in questions]),
            }
            yield picture, records

    def _mapped(self, wanted: list[int]) -> dict[str, int]:
        questions, regions = self._mapping
        at = np.searchsorted(questions, wanted)
        return {
            str(qa): int(regions[i])
            for qa, i in zip(wanted, at, strict=True)
            if i < len(questions) and questions[i] == qa
        }

    def close(self) -> None:
        self._spool.close()


def _joined(objects: list[Entry] | None, attributes: list[Entry] | None) -> list[Entry]:
    """A picture's objects with what `attributes` says of them.

    The two files are of different versions: v1.4 of `objects` merged and removed many that v1.2, which is
    the last of `attributes`, still lists. Those are no second objects, but a merged one's attributes hold
    of the one it became. Only where a picture has no `objects` do `attributes` stand for them.
    """
    if not objects:
        return attributes or []
    joined = {o["object_id"]: {**o} for o in objects}
    became = {old: o["object_id"] for o in reversed(objects) for old in o.get("merged_object_ids", ())}
    for said in attributes or ():
        key = said["object_id"]
        if more := said.get("attributes"):
            of = joined.get(key) or joined.get(became.get(key, key), {})
            of["attributes"] = [*of.get("attributes", ()), *more]
    return list(joined.values())


def _find(folder: Path) -> dict[str, _File]:
    """The files by name. InputError, naming them, if required ones are missing."""
    there: dict[str, dict[str, Path]] = defaultdict(dict)  # by name and version, unpacked before packed
    for path in sorted(folder.iterdir()):
        if (of := _FILE.fullmatch(path.name)) and path.is_file():
            there[of[1]].setdefault(of[2] or "", path)
    found = {}
    for name in (*REQUIRED, *OPTIONAL):
        versions = there[name]
        if len(versions) > 1 and "" not in versions:
            listed = ", ".join(path.name for path in versions.values())
            raise InputError(f"{folder} holds {listed}: expected one of them, or {name}.json")
        if not versions:
            continue
        path = versions[min(versions)]
        if path.suffix == ".json":
            found[name] = _File(path, None, path.stat().st_size)
            continue
        with _unpacking(path), zipfile.ZipFile(path) as archive:
            named = [(_FILE.fullmatch(Path(i.filename).name), i) for i in archive.infolist()]
        inside = [i for of, i in named if of and of[1] == name and not of[3]]
        if not inside:
            raise InputError(f"{path}: holds no {name}.json")
        found[name] = _File(path, inside[0].filename, inside[0].file_size)
    if missing := [f"{name}.json" for name in REQUIRED if name not in found]:
        raise InputError(f"{folder}: has no {', '.join(missing)}, expected Visual Genome's files")
    return found


class _Shallow:
    """A stream of JSON nested no deeper than `DEPTH`: ijson's time and memory grow with its square."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream = path, stream
        self._depth = 0
        self._in_text = False
        self._half = b""  # a backslash whose character is still to come

    def read(self, size: int) -> bytes:
        """Raises InputError where the nesting is too deep."""
        data = self._stream.read(size)
        # without escapes, every quote begins or ends a text
        read = (self._half + data).replace(b"\\\\", b"").replace(b'\\"', b"")
        self._half = b"\\" if read.endswith(b"\\") else b""
        parts = read.split(b'"')
        marks = b"".join(parts[self._in_text :: 2]).translate(_STEPS, _NO_STEPS)
        self._in_text ^= len(parts) % 2 == 0
        depths = self._depth + np.cumsum(np.frombuffer(marks, np.int8), dtype=np.int64)
        if len(depths):
            self._depth = int(depths[-1])
            if depths.max() > DEPTH:
                raise InputError(f"{self._path} is nested deeper than {DEPTH} levels, expected 7")
        return data


def _records(path: Path, stream: IO[bytes], opens: str) -> Iterator[Any]:
    """The elements of the list, or the pairs of the object, that the whole file is."""
    count = 0
    try:
        head = stream.read(64)
        mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        start = head[mark:].lstrip()[:1].decode("latin-1")
        if start != opens:
            kind = "a list" if opens == "[" else "an object"
            raise InputError(f"{path}: begins with {start!r}, expected {kind} in JSON")
        stream.seek(mark)
        read = ijson.items if opens == "[" else ijson.kvitems
        # numbers as they are: a double's are an error of the whole file where one is too large
        for entry in read(_Shallow(path, stream), "item" if opens == "[" else ""):
            yield entry
            count += 1
    except InputError:  # a ValueError too
        raise
    except (ijson.JSONError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError) as error:
        why = str(error.args[0] if error.args else error)
        why = why if isinstance(why, str) else repr(why)
        raise InputError(
            f"{path}: cut off or no JSON behind record {count}, before byte {stream.tell()}: "
            f"{why.strip().splitlines()[0]}"
        ) from None


def _id(entry: Entry, name: str) -> int:
    """A record's own number, which is also called ``id``."""
    key = _digits(entry.get(name, entry.get("id")))
    if type(key) is not int or abs(key) >= 1 << 63:
        raise MalformedError(f"no {name}" if key is None else f"{name} is no whole number")
    return key


def _digits(value: Any) -> Any:
    """An id, which may be written as text, as in the mapping's keys, or as 3.0."""
    if isinstance(value, Decimal) and abs(value) < LARGEST and value == int(value):
        return int(value)
    # no id has 20 digits, and int() raises for thousands
    is_number = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20
    return int(value) if is_number else value


def _place(entry: Entry, width: str = "w", height: str = "h") -> dict[str, float]:
    """A box; `width` and `height` are what its sides are called from here on."""
    sides = {
        "x": entry.get("x"),
        "y": entry.get("y"),
        width: entry.get("w", entry.get("width")),
        height: entry.get("h", entry.get("height")),
    }
    read = {name: _number(side) for name, side in sides.items()}
    for name, number in read.items():
        if number is None:
            raise MalformedError(f"{name} is no number")
    return read


def _number(value: Any) -> Any:
    """What ijson read as a number, if it is one that a picture can have, else None; a truth value is none."""
    if type(value) not in (int, Decimal) or abs(value) > LARGEST:
        return None
    return value if type(value) is int else float(value)


def _texts(value: Any, name: str) -> list[str]:
    """One text or a list of them."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not set(map(type, texts)) <= {str}:
        raise MalformedError(f"{name} are no texts")
    return texts


def _size(entry: Entry) -> Entry:
    width, height, url = _number(entry.get("width")), _number(entry.get("height")), entry.get("url")
    if width is None or height is None or min(width, height) < 1:
        raise MalformedError("a picture without a size")
    return {"width": width, "height": height, "url": url if isinstance(url, str) else ""}


def _region(entry: Entry, complain: Complain) -> tuple[int, Entry]:
    key = _id(entry, "region_id")
    return key, {"region_id": key, **_place(entry, "width", "height")}


def _object(entry: Entry, complain: Complain) -> tuple[int, Entry]:
    key = _id(entry, "object_id")
    names = _texts(entry.get("names", entry.get("name")), "names")
    if not names:
        raise MalformedError("an object without a name")
    read: dict[str, Any] = {"object_id": key, "names": names}
    try:
        read |= _place(entry)
    except MalformedError as reason:
        complain(str(reason))
    try:
        if entry.get("attributes"):
            read["attributes"] = _texts(entry["attributes"], "attributes")
    except MalformedError as reason:
        complain(str(reason))
    if merged := entry.get("merged_object_ids"):
        read["merged_object_ids"] = [i for i in merged if type(i) is int] if isinstance(merged, list) else []
    return key, read


def _question(entry: Entry, complain: Complain) -> tuple[int, Entry]:
    key = _id(entry, "qa_id")
    read: dict[str, Any] = {"qa_id": key}
    for name in ("question", "answer"):
        text = entry.get(name)
        if not isinstance(text, str) or not text.strip(". \t\r\n"):
            raise MalformedError(f"no {name}")
        if DUALFOCUS.image in text:  # where an image goes in a prompt
            raise MalformedError(f"{name} that holds {DUALFOCUS.image}")
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character, escaped
            raise MalformedError(f"{name} that is not text in UTF-8") from None
        read[name] = " ".join(text.split())  # in one line: a second one would be a hint of its own
    for name in ("q_objects", "a_objects"):
        objects = entry.get(name) or []
        if isinstance(objects, list):
            read[name] = [_named(o, name, complain) for o in objects]
        else:
            complain(f"{name} are no list")
            read[name] = [UNKNOWN]
    if isinstance(entry.get("category"), str):
        read["category"] = entry["category"]  # drawn scenes have one
    return key, read


def _named(entry: Any, name: str, complain: Complain) -> Entry:
    """An object that a question names: what can be read of it."""
    read = {**UNKNOWN}
    try:
        if not isinstance(entry, dict):
            raise MalformedError("not an object")
        read["object_id"] = _id(entry, "object_id")
        if entry.get("x") is not None:
            read |= _place(entry)
    except MalformedError as reason:
        complain(f"{name}: {reason}")
    return read


_PARTS: dict[str, tuple[str, Callable[[Entry, Complain], tuple[int, Entry]]]] = {
    "objects": ("objects", _object),
    "attributes": ("attributes", _object),
    "region_descriptions": ("regions", _region),
    "question_answers": ("qas", _question),
}


def find_pictures(folder: Path) -> dict[int, str]:
    """The pictures' files below `folder` by image_id, as paths relative to it."""
    found: dict[int, str] = {}
    for place in (folder, *(folder / name for name in FOLDERS)):
        if place.is_dir():
            for path in sorted(place.iterdir()):
                is_named = path.suffix.lower() in SUFFIXES and path.stem.isascii() and path.stem.isdigit()
                if is_named and path.is_file() and path.stat().st_size:  # what was cut off unpacking is empty
                    found.setdefault(int(path.stem), path.relative_to(folder).as_posix())
    return found


def write(folder: Path, pictures: Iterable[tuple[Mapping[str, Any], Image.Image | None]]) -> None:
    """Write records as the files of a Visual Genome folder, and the pictures where there are any.

    Each picture's records are by file name without ``.json``, as `scenes.annotate` makes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        files: dict[str, IO[str]] = {}
        begun: set[str] = set()  # those that hold something
        for records, picture in pictures:
            for name, entry in records.items():
                if name not in files:
                    files[name] = opened.enter_context((folder / f"{name}.json").open("w", encoding="utf-8"))
                    files[name].write("{" if name == MAPPING else "[")
                text = json.dumps(entry)
                if text := text[1:-1] if name == MAPPING else text:
                    files[name].write(",\n" * (name in begun) + text)
                    begun.add(name)
            if picture is not None:
                (folder / FOLDERS[0]).mkdir(exist_ok=True)
                key = records["image_data"]["image_id"]
                picture.save(folder / FOLDERS[0] / f"{key}.jpg", quality=95, subsampling=0)
        for name, file in files.items():
            file.write("}\n" if name == MAPPING else "]\n")
