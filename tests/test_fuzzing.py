"""The fuzzer sees what goes wrong, and its mutations change what they are given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import fuzzing
import pytest

from dualfocus.runtime.errors import BundleError


def misbehave(random: Random, folder: Path) -> None:
    """A target that goes wrong in each way once."""
    (folder / "input").write_bytes(b"inside")
    match WAYS[random.randrange(len(WAYS))]:
        case "refuse":
            raise BundleError("the case is refused")
        case "exception":
            raise RecursionError
        case "panic":
            raise SystemExit(3)
        case "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "output":
            os.write(2, b"a library's warning")
        case "sentence":
            raise BundleError("two\nlines")
        case "written outside":
            (folder.parent.parent / "escaped").write_bytes(b"")
        case "forbidden":
            subprocess.run([sys.executable, "-c", ""], check=True)


WAYS = [
    "fine",
    "refuse",
    "exception",
    "panic",
    "signal",
    "output",
    "sentence",
    "written outside",
    "forbidden",
]


def test_every_way_is_found(tmp_path: Path) -> None:
    cases = 60
    found = fuzzing.fuzz(misbehave, cases, tmp_path)
    drawn = [
        WAYS[Random(f"test_fuzzing:misbehave {seed}").randrange(len(WAYS))]
        for seed in range(cases * fuzzing.FACTOR)
    ]
    assert set(drawn) == set(WAYS)
    expected = {
        seed: "exception" if way == "panic" else way
        for seed, way in enumerate(drawn)
        if way not in ("fine", "refuse")
    }
    assert {finding.seed: finding.kind for finding in found} == expected
    assert "python tests/fuzzing.py test_fuzzing:misbehave" in fuzzing.report(found)


def hang(random: Random, folder: Path) -> None:
    time.sleep(60)


def test_a_hang_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 0.5)
    monkeypatch.setattr(fuzzing, "FACTOR", 1)
    (found,) = fuzzing.fuzz(hang, 1, tmp_path)
    assert found.kind == "hang"
    assert "in hang" in found.detail  # where


def test_mutations_repeat_and_differ() -> None:
    model = (Path(fuzzing.__file__).parent.parent / "models" / "nano").resolve()
    for mutate, name in (
        (fuzzing.mutate_bytes, "embeddings.npy"),
        (fuzzing.mutate_json, "manifest.json"),
        (fuzzing.mutate_protobuf, "decoder.onnx"),
    ):
        data = (model / name).read_bytes()
        once, again = ([mutate(data, Random(seed)) for seed in range(40)] for _ in range(2))
        assert once == again
        assert len(set(once)) > 30
        assert sum(mutated != data for mutated in once) > 30


def test_a_message_is_written_as_it_was_read() -> None:
    for file in ("decoder.onnx", "vision.onnx"):
        data = (Path(fuzzing.__file__).parent.parent / "models" / "nano" / file).read_bytes()
        message = fuzzing.parse_protobuf(data)
        assert message is not None
        assert fuzzing.write_protobuf(message) == data


def test_most_mutations_of_json_are_json() -> None:
    raw = {"a": [1, 2.5, "text"], "b": {"c": None, "d": True}}
    valid = 0
    for seed in range(300):
        try:
            json.loads(fuzzing.mutate_json(raw, Random(seed)))
            valid += 1
        except (ValueError, RecursionError):
            pass
    assert 200 < valid < 300
