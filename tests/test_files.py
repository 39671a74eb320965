import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta

from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.files import (
    claimed,
    convert,
    decode_json,
    naming,
    read_bytes,
    read_json,
    sync,
    to_json,
    with_parents,
)


@dataclass(frozen=True)
class Part:
    layers: Annotated[int, Meta(ge=1, le=1024)]


@dataclass(frozen=True)
class Whole:
    name: str
    parts: list[Part]


GOOD = b'{"name": "a", "parts": [{"layers": 3}]}'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "is not JSON"),
        (b"NaN", "is not JSON"),
        (b'{"name": "\xff", "parts": []}', "is not JSON"),
        (b'{"name": "\\ud800", "parts": []}', "is not JSON"),
        (b'{"name": "a", "parts": ' + b"[" * 100_000, "expected `object`, got `array`"),
        (b'{"name": 3, "parts": []}', "it: name: expected `str`, got `int`"),
        (b'{"name": "a"}', "it: object missing required field `parts`"),
        (b"[]", "it: expected `object`, got `array`"),
        (b'{"name": "a", "parts": [{"layers": true}]}', "it: parts[0].layers: expected `int`, got `bool`"),
        (b'{"name": "a", "parts": [{"layers": 1025}]}', "it: parts[0].layers: expected `int` <= 1024"),
        (b'{"name": "a", "parts": [{"layers": 1' + b"0" * 400 + b"}]}", "it: parts[0].layers: "),
    ],
)
def test_wrong_json_is_one_sentence(text: bytes, problem: str) -> None:
    with pytest.raises(BundleError) as refused:
        decode_json(text, Whole, BundleError, "it")
    assert problem in str(refused.value)


def test_deep_nesting_in_an_untyped_part() -> None:
    with pytest.raises(BundleError, match="it is nested too deeply"):
        decode_json(b'{"a": ' * 100_000, dict[str, Any], BundleError, "it")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_json_becomes_its_type(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.json").write_bytes(mark + GOOD)
    assert read_json(tmp_path / "a.json", Whole, BundleError) == Whole("a", [Part(3)])


def test_convert_takes_parsed_json() -> None:
    assert convert({"layers": 3}, Part, BundleError, "it") == Part(3)
    with pytest.raises(BundleError, match="it: layers: expected `int` >= 1"):
        convert({"layers": 0}, Part, BundleError, "it")


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(bytes(11))
    (tmp_path / "link").symlink_to("large")
    for name, problem in {
        "fifo": "is not a regular file",
        "endless": "is not a regular file",
        "missing": "does not exist",
        "large/inside": "does not exist",
        "": "is a folder, expected a file",
        "a" * 300: "cannot be read: File name too long",
        "a\0b": "cannot be read",
        "large": "has more than 10 bytes",
        "link": "has more than 10 bytes",
    }.items():
        with pytest.raises(BundleError, match=problem):
            read_bytes(tmp_path / name, BundleError, limit=10)
    assert read_bytes(tmp_path / "link", BundleError, limit=11) == bytes(11)


def test_what_is_no_number_is_null_in_json() -> None:
    value = {"a": [math.nan, 1.5, (math.inf, "\u00e9")], "b": -math.inf, "c": True, "d": None}
    text = to_json(value)
    assert text.isascii()
    assert json.loads(text) == {"a": [None, 1.5, [None, "\u00e9"]], "b": None, "c": True, "d": None}


def test_an_error_of_a_write_names_its_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space") as full,
        naming(tmp_path / "a"),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 100_000)
    assert full.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as missing, naming(tmp_path / "a"):
        (tmp_path / "b").open()
    assert missing.value.filename == str(tmp_path / "b")


def test_folders_made_for_nothing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for made in (False, True):
        with pytest.raises(ZeroDivisionError), with_parents(tmp_path / "a" / "b" / "c" / "d"):  # noqa: PT012
            assert (tmp_path / "a" / "b" / "c").is_dir()
            if made:
                (tmp_path / "a" / "b" / "else").touch()
            raise ZeroDivisionError
        assert [path.name for path in (tmp_path / "a").rglob("*")] == (["b", "else"] if made else [])
    with with_parents(tmp_path / "x" / "y" / "z"):
        pass
    assert (tmp_path / "x" / "y").is_dir()


HOLD = """
import sys
from pathlib import Path
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.files import claimed
with claimed(Path(sys.argv[1]), BundleError):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BundleError, match="another process writes to"), claimed(folder, BundleError):
            pass
        other.kill()
    with claimed(folder, BundleError):
        (folder / "a").touch()
        sync(tmp_path)
    with claimed(folder, BundleError):  # what is in it stays
        assert (folder / "a").exists()


def test_errors_inside_a_claim_are_not_the_claims(tmp_path: Path) -> None:
    for error in (FileNotFoundError, BlockingIOError):
        with pytest.raises(error), claimed(tmp_path / "folder", BundleError):
            raise error
