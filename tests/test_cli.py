"""The command line: what it prints, and that whatever it is given it neither crashes nor leaves halves."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import dualfocus
from dualfocus import cli
from dualfocus.runtime import Bundle, DualFocus, FocusResult
from dualfocus.runtime.show import annotate

COUNTERS = [
    "vision_encodes", "tokens_prefilled", "tokens_reused", "tokens_forced", "tokens_drafted",
    "tokens_accepted", "decode_steps", "decode_rows",
]  # fmt: skip
SCHEMA = [
    "schema", "answer", "chosen", "skipped", "fallback", "box", "crop", "macro", "micro", "counters",
    "times_ms", "bundle", "device", "warnings",
]  # fmt: skip


@pytest.fixture
def photo(tmp_path: Path, picture: np.ndarray) -> Path:
    Image.fromarray(picture).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


def ask(*arguments: object, bundle: Path, **options: object) -> Result:
    result = run("ask", *arguments, "--bundle", bundle, "--threads", 1, **options)
    assert result.exit_code == 0, result.stderr
    return result


def refused(result: Result) -> str:
    """The one sentence on stderr of a command that gave up, and nothing else anywhere."""
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("dualfocus: ")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("dualfocus: ").strip()


def test_json_is_one_object_of_the_schema(photo, bundle):
    answer = json.loads(ask(photo, "What is it?", "--json", "--free-box", bundle=bundle).stdout)
    assert list(answer) == SCHEMA
    assert answer["schema"] == 2
    assert list(answer["counters"]) == COUNTERS
    assert answer["chosen"] == "macro"
    assert answer["answer"] == answer["macro"]["text"]
    assert "names no box" in answer["fallback"]
    assert answer["micro"] is answer["box"] is answer["crop"] is answer["macro"]["loss"] is None
    assert answer["times_ms"]["total"] > 0
    assert (answer["bundle"], answer["device"], answer["warnings"]) == ("tiny", "cpu", [])


def test_json_with_both_passes(photo, bundle):
    answer = json.loads(ask(photo, "What is it?", "--json", bundle=bundle).stdout)
    assert answer["fallback"] is None
    left, top, right, bottom = answer["crop"]
    assert 0 <= left < right <= 320
    assert 0 <= top < bottom <= 240
    losses = {name: answer[name]["loss"] for name in ("macro", "micro")}
    assert answer["chosen"] == min(losses, key=losses.__getitem__)
    assert answer["answer"] == answer[answer["chosen"]]["text"]
    assert 0 < answer["macro"]["confidence"] <= 1
    counters = answer["counters"]
    assert counters["vision_encodes"] == 2
    assert counters["tokens_forced"] > 0
    assert counters["tokens_drafted"] >= counters["tokens_accepted"]
    assert counters["decode_rows"] >= counters["decode_steps"] > 0


@pytest.mark.parametrize("rule", ["reference", "answer"])
def test_the_rule_can_be_chosen(photo, bundle, rule):
    answer = json.loads(ask(photo, "What is it?", "--json", "--select", rule, bundle=bundle).stdout)
    expected = DualFocus(Bundle.open(bundle, threads=1), select=rule).ask(
        np.asarray(Image.open(photo)), "What is it?"
    )
    assert answer["macro"]["loss"] == pytest.approx(expected.macro.loss)
    assert answer["micro"]["loss"] == pytest.approx(expected.micro.loss)


def test_modes(photo, bundle):
    macro, micro, blind = (
        json.loads(ask(photo, "What is it?", "--json", "--mode", *mode, bundle=bundle).stdout)
        for mode in (["macro"], ["micro"], ["micro", "--free-box"])
    )
    assert macro["fallback"] is macro["box"] is macro["micro"] is None
    assert micro["chosen"] == "micro"
    assert micro["macro"] is None
    assert blind["chosen"] == "macro"
    assert "names no box" in blind["fallback"]
    assert blind["answer"] == macro["answer"]


def test_several_questions_are_a_line_each(photo, bundle):
    lines = ask(photo, "What?", "Where?", "What?", "--json", bundle=bundle).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 3
    assert answers[0]["answer"] == answers[2]["answer"]
    encodes = [answer["counters"]["vision_encodes"] for answer in answers]
    assert (encodes[0], encodes[2]) == (2, 0)  # at the third, its picture and its crop are kept
    assert encodes[1] <= 1


def test_nothing_has_to_be_kept(photo, bundle):
    lines = ask(photo, "What?", "What?", "--json", "--cache-mb", 0, bundle=bundle).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["counters"]["vision_encodes"] for answer in answers] == [2, 2]
    assert answers[0]["answer"] == answers[1]["answer"]


def test_a_sure_macro_answer_can_end_it(photo, bundle):
    sure, unsure, macro = (
        json.loads(ask(photo, "What is it?", "--json", *flags, bundle=bundle).stdout)
        for flags in (["--skip-above", 0], ["--skip-above", 1], ["--mode", "macro"])
    )
    assert sure["skipped"]
    assert sure["counters"] == macro["counters"]
    assert sure["answer"] == macro["answer"]
    assert not unsure["skipped"]
    assert unsure["micro"] is not None


def test_a_terminal_shows_the_macro_answer_then_the_region_then_the_result(photo, bundle):
    answer = json.loads(ask(photo, "What is it?", "--json", bundle=bundle).stdout)
    here, terminal = pty.openpty()
    command = ["ask", str(photo), "What is it?", "--bundle", str(bundle), "--threads", "1"]
    code = f"from dualfocus.cli import app; app({command!r})"
    wide = os.environ | {"COLUMNS": "200", "LINES": "50", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=terminal, env=wide) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # which is how the end of a terminal reads
            while block := os.read(here, 1 << 16):
                shown += block
    os.close(here)
    assert process.returncode == 0
    text = shown.decode()
    first, region = text.index("macro"), text.index("region")
    assert first < region < text.index(" ms: hash")
    erased = "\x1b[2K"  # what was shown meanwhile makes room for the result
    assert erased in text
    assert f"[{', '.join(f'{side:.0f}' for side in answer['box'])}]" in text[: text.rindex(erased)]


def test_plain_skips_nothing(photo):
    assert "--skip-above" in refused(run("ask", photo, "What?", "--plain", "--skip-above", "0.5"))


def test_plain_gives_the_same_answer(photo, bundle):
    fast, plain = (
        json.loads(ask(photo, "What is it?", "--json", *flags, bundle=bundle).stdout)
        for flags in (["--free-box"], ["--plain"])
    )
    work, plain_work = fast.pop("counters"), plain.pop("counters")
    del fast["times_ms"], plain["times_ms"]
    assert fast == plain
    assert plain_work["tokens_reused"] == 0
    assert work["tokens_prefilled"] + work["tokens_reused"] == plain_work["tokens_prefilled"]


def test_standard_input(photo, bundle):
    piped = ask("-", "What is it?", "--json", bundle=bundle, stdin=photo.read_bytes())
    named = ask(photo, "What is it?", "--json", bundle=bundle)
    assert json.loads(piped.stdout)["answer"] == json.loads(named.stdout)["answer"]


def test_standard_input_serves_every_question(photo, bundle):
    result = ask("-", "What?", "Where?", "--json", bundle=bundle, stdin=photo.read_bytes())
    assert len(result.stdout.splitlines()) == 2


def test_readable_output(photo, bundle):
    lines = ask(photo, "What is it?", bundle=bundle).stdout.splitlines()
    answer = json.loads(ask(photo, "What is it?", "--json", bundle=bundle).stdout)
    assert lines[0].strip() == cli._text(answer["answer"]).plain
    words = " ".join(lines)
    region = f"[{', '.join(f'{side:.0f}' for side in answer['box'])}]"
    for expected in ("macro", "micro", region, "loss", " ms: hash", "encode whole", "reused", "drafted"):
        assert expected in words
    assert "\x1b" not in words  # no colours where no terminal is


def test_readable_output_of_several_questions_names_them(photo, bundle):
    lines = ask(photo, "What?", "Where to?", bundle=bundle).stdout.splitlines()
    assert (lines.index("What?"), lines.count("Where to?")) == (0, 1)


def test_readable_output_obeys_no_control_codes(photo, bundle, monkeypatch):
    monkeypatch.setattr("dualfocus.runtime.protocol.micro_answer", lambda _: "a\x1b[2J\x07b\nc")
    output = ask(photo, "What?", "--mode", "micro", bundle=bundle).stdout
    assert output.splitlines()[0] == "a\ufffd[2J\ufffdb c"


def test_readable_output_says_why_there_is_no_micro_answer(photo, bundle):
    assert "no micro answer: the reply" in ask(photo, "What is it?", "--free-box", bundle=bundle).stdout


def test_show(photo, bundle, tmp_path):
    out = tmp_path / "out.png"
    ask(photo, "What is it?", "--show", out, bundle=bundle)
    with Image.open(out) as image:
        assert image.width > 640  # the picture, and the zoomed crop beside it
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert (255, 176, 0) in colours  # the box
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "photo.png"]


def test_show_without_a_box_and_over_an_old_file(photo, bundle, tmp_path):
    out = tmp_path / "out.jpg"
    out.write_text("old")
    ask(photo, "What is it?", "--free-box", "--show", out, bundle=bundle)
    with Image.open(out) as image:
        image.load()


def test_show_of_a_box_far_beyond_the_picture(photo, bundle, tmp_path):
    picture = np.asarray(Image.open(photo))
    runner = DualFocus(Bundle.open(bundle, threads=1))
    result = runner.ask(picture, "What?", box_reply="[0.5, 0.5, 99999999999999999999, 99999999999999999999]")
    assert result.box.x1 > 1e20
    drawn = np.asarray(annotate(picture, "What?", result))
    columns = np.flatnonzero((drawn == (255, 176, 0)).all(-1)[: drawn.shape[0] // 2].any(0))
    assert columns.max() < 700  # the box ends where the picture of 640 does, not in the zoomed crop


def test_show_never_replaces_the_picture(photo, bundle, tmp_path):
    before = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for out in (photo, tmp_path / "link.png"):
        assert "the picture itself" in refused(run("ask", photo, "What?", "--show", out, "--bundle", bundle))
    assert photo.read_bytes() == before


def test_show_with_a_name_as_long_as_names_may_be(photo, bundle, tmp_path):
    out = tmp_path / ("x" * 251 + ".png")
    ask(photo, "What?", "--show", out, bundle=bundle)
    assert out.exists()


def test_show_in_a_format_that_takes_no_such_picture(photo, bundle, tmp_path):
    result = run("ask", photo, "What?", "--show", tmp_path / "out.blp", "--bundle", bundle, "--threads", 1)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 300 + "/out.png", "does not exist"),
        ("none/out.png", "does not exist"),
        ("out.xyz", ".xyz names no picture format"),
        ("out.h5", ".h5 names no picture format"),
        ("out.grib", ".grib names no picture format"),
        ("out", "no suffix"),
    ],
)
def test_show_where_nothing_can_be_written(photo, bundle, tmp_path, name, said):
    sentence = refused(run("ask", photo, "What?", "--show", tmp_path / name, "--bundle", bundle))
    assert said in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_show_of_several_answers(photo, bundle, tmp_path):
    assert "2 questions" in refused(
        run("ask", photo, "A?", "B?", "--show", tmp_path / "o.png", "--bundle", bundle)
    )


def test_show_leaves_no_half_when_the_disk_is_full(photo, bundle, tmp_path, monkeypatch):
    def full(self: Image.Image, file: BinaryIO, format: str) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    result = run("ask", photo, "What?", "--json", "--show", tmp_path / "out.png", "--bundle", bundle)
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert json.loads(result.stdout)["answer"]  # what was computed is not lost
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_show_never_writes_through_a_link(photo, bundle, tmp_path, monkeypatch):
    """Whatever name the unfinished file takes, a link of that name is not followed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (tmp_path / "out" / ".known.png").symlink_to(tmp_path / "mine.txt")
    result = run("ask", photo, "What?", "--show", tmp_path / "out/o.png", "--bundle", bundle, "--threads", 1)
    assert result.exit_code == 2
    assert "File exists" in result.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_show_has_the_mode_of_new_files_and_replaces_a_link(photo, bundle, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "out.png").symlink_to(tmp_path / "mine.txt")
    before = os.umask(0o027)
    try:
        ask(photo, "What?", "--show", tmp_path / "out.png", bundle=bundle)
    finally:
        os.umask(before)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "out.png").is_symlink()
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "out.png", "photo.png"]


def test_a_picture_that_lacks_rows_is_answered_with_a_warning(photo, bundle, tmp_path):
    (tmp_path / "short.png").write_bytes(photo.read_bytes()[:-9000])
    result = ask(tmp_path / "short.png", "What?", "--json", bundle=bundle)
    (note,) = json.loads(result.stdout)["warnings"]
    assert re.fullmatch(f"{tmp_path}/short.png is not complete: [0-9]+ of its 240 rows are missing", note)
    assert result.stderr == f"dualfocus: {note}\n"


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (
            "https://example.com//a b.jpg?c#d",
            "https://example.com//a b.jpg?c#d is a URL, expected a file name",
        ),
        ("data:image/png;base64," + "A" * 9999, "a data: URI was given as a picture"),
        ("", "PICTURE '' is empty"),
    ],
)
def test_what_is_no_file_name(bundle, picture, sentence):
    said = refused(run("ask", picture, "What?", "--bundle", bundle))
    assert said.startswith(sentence)
    assert len(said) < 200


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "empty", "zero-sized", "folder", "bomb"])
def test_bad_pictures(photo, bundle, tmp_path, kind):
    path = tmp_path / "bad.png"
    header = photo.read_bytes()
    contents = {
        "truncated": header[: len(header) // 2],
        "text": b"hello",
        "empty": b"",
        "zero-sized": header[:16] + bytes(8) + header[24:],
        "bomb": header[:16] + b"\0\1\0\0" * 2 + header[24:],
    }
    if kind == "folder":
        path.mkdir()
    elif kind in contents:
        path.write_bytes(contents[kind])
    sentence = refused(run("ask", path, "What?", "--bundle", bundle, "--json"))
    assert str(path) in sentence


@pytest.mark.parametrize("data", [b"", b"hello"])
def test_bad_standard_input(bundle, data):
    assert refused(run("ask", "-", "What?", "--bundle", bundle, stdin=data)).startswith("standard input is ")


def test_endless_standard_input(bundle, photo, monkeypatch):
    monkeypatch.setattr("dualfocus.runtime.image.FILE_LIMIT", 1000)
    sentence = refused(run("ask", "-", "What?", "--bundle", bundle, stdin=photo.read_bytes()))
    assert sentence == "standard input has more than 1,000 bytes"


def test_a_bad_question_stops_before_any_answer(photo, bundle):
    assert "empty" in refused(run("ask", photo, "What?", " ", "--bundle", bundle, "--json"))
    assert "too long" in refused(run("ask", photo, "What?", "word " * 3000, "--bundle", bundle, "--json"))


def test_control_codes_in_a_message_are_not_obeyed(photo, bundle, tmp_path):
    assert "\ufffd[2J is not a folder" in refused(
        run("ask", photo, "What?", "--bundle", tmp_path / "\x1b[2J")
    )
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps(manifest | {"\x1b[2J": 1}))
    assert refused(run("ask", photo, "What?", "--bundle", broken)).endswith("unknown field '\\x1b[2J'")


def test_want_of_memory_is_one_sentence(photo, bundle, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(DualFocus, "__init__", fail)
    assert "not enough memory" in refused(run("ask", photo, "What?", "--bundle", bundle))


def test_bad_bundles(photo, bundle, tmp_path):
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(
        json.dumps(manifest | {"format_version": manifest["format_version"] + 1})
    )
    assert ": update dualfocus" in refused(run("ask", photo, "What?", "--bundle", broken))
    assert ": update dualfocus" in refused(run("inspect", broken))
    (broken / "manifest.json").write_text(json.dumps(manifest))
    (broken / "vision.onnx").unlink()
    assert "vision.onnx is missing" in refused(run("ask", photo, "What?", "--bundle", broken))
    assert "not a folder" in refused(run("ask", photo, "What?", "--bundle", tmp_path / "none"))
    assert "without manifest.json" in refused(run("ask", photo, "What?", "--bundle", tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask"],
        ["ask", "a.png"],
        ["ask", "a.png", "Q", "--mode", "x"],
        ["ask", "a.png", "Q", "--threads", "0"],
        ["ask", "a.png", "Q", "--threads", "99999999999"],
        ["ask", "a.png", "Q", "--skip-above", "nan"],
        ["ask", "a.png", "Q", "--skip-above", "1.5"],
        ["ask", "a.png", "Q", "--cache-mb", "-1"],
    ],
)
def test_wrong_usage(arguments):
    assert refused(run(*arguments)).endswith("--help` says more")


COMMANDS = [[name] for name in ("ask", "export", "curate", "inspect", "pack", "eval", "bench")] + [
    ["bench", name]
    for name in (
        "stages", "limits", "savings", "throughput", "gate", "rules", "compare", "crop", "peers", "export",
        "curate",
    )
]  # fmt: skip


def test_version():
    assert run("--version").stdout == f"dualfocus {dualfocus.__version__}\n"


@pytest.mark.parametrize("command", [[], ["bench"]], ids=" ".join)
def test_a_group_alone_shows_its_help(command):
    done = run(*command)
    assert done.exit_code == 2
    assert done.output == run(*command, "--help").output


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_names_what_was_wrong_and_where_more_is_said(command):
    sentence = refused(run(*command, "--no-such", "x"))
    assert "--no-such" in sentence
    assert f"`{' '.join(['dualfocus', *command])} --help`" in sentence
    assert run(*command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["aks"], "'aks', did you mean 'ask'"),
        (["bench", "nothing"], "'nothing'"),
        (["ask"], "PICTURE"),
        (["ask", "a.png"], "QUESTION"),
        (["ask", "a.png", "Q", "--mode", "x"], "--mode 'x' is not one of 'dual', 'macro', 'micro'"),
        (["ask", "a.png", "Q", "--threads", "0"], "--threads '0' should be greater than or equal to 1"),
        (["ask", "a.png", "Q", "--threads", "some"], "--threads 'some'"),
        (["ask", "a.png", "Q", "--bundle"], "--bundle"),
        (["ask", "", "Q"], "PICTURE '' is empty"),
        (["inspect", "a", "b"], "(b)"),
        (["eval"], "BENCHMARK"),
        (["eval", "other"], "BENCHMARK 'other' is not one of 'textvqa', 'gqa-mcq'"),
        (["eval", "pope", "--data", ""], "--data '' is empty"),
        (["eval", "pope", "--data", "https://a.org/x"], "--data 'https://a.org/x' is a URL"),
        (["eval", "pope", "--data", ".", "-o", ""], "--out '' is empty"),
        (["eval", "pope", "--data", ".", "--ray="], "--ray '' is empty"),
        (["curate", "--visual-genome", "", "-o", "x"], "--visual-genome '' is empty"),
        (["inspect", "s3://bucket/bundle"], "BUNDLE 's3://bucket/bundle' is a URL"),
        (["bench", "stages", "--rounds", "1"], "--rounds '1' should be greater than or equal to 2"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments, said):
    assert said in refused(run(*arguments))


@pytest.mark.parametrize("question", ["", " ", "\t\n", "\u3000"])
def test_an_empty_question_needs_no_model(question, tmp_path):
    assert refused(run("ask", "none.png", "What?", question, "--bundle", tmp_path)) == "the question is empty"


def test_json_has_no_word_for_what_is_no_number(photo, bundle, monkeypatch):
    def unknown(self: FocusResult) -> dict[str, object]:
        return {"answer": "a", "macro": {"loss": float("nan"), "confidence": [float("-inf"), 1.0]}}

    monkeypatch.setattr(FocusResult, "to_dict", unknown)
    printed = ask(photo, "What?", "--json", bundle=bundle).stdout
    assert json.loads(printed, parse_constant=pytest.fail)["macro"] == {
        "loss": None,
        "confidence": [None, 1.0],
    }


def test_inspect(bundle):
    result = run("inspect", bundle, "--verify")
    assert result.exit_code == 0
    for expected in ("tiny", "56 x 56, 16 tokens", "2 layers of 64", "2 KV heads", "verified"):
        assert expected in result.stdout


def test_inspect_json(bundle):
    printed = json.loads(run("inspect", bundle, "--json").stdout)
    assert printed == json.loads((bundle / "manifest.json").read_text())


def test_inspect_verify_finds_a_changed_byte(bundle, tmp_path):
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    data = bytearray((broken / "decoder.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "decoder.onnx").write_bytes(data)
    assert run("inspect", broken).exit_code == 0
    assert "SHA-256" in refused(run("inspect", broken, "--verify"))


def test_export_refuses_what_is_no_checkpoint(tmp_path):
    refused(run("export", tmp_path / "none", "-o", tmp_path / "a" / "b" / "out"))
    assert list(tmp_path.iterdir()) == []


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_help_imports_nothing_heavy():
    done = python(
        "import sys; from dualfocus import cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'PIL', 'rich', 'tokenizers', 'onnxruntime', 'torch', 'dualfocus.runtime'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert "ask" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_onnx_runtime_the_extras_are_named(photo, bundle):
    done = python(
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from dualfocus import cli\n"
        f"cli.app(['ask', {str(photo)!r}, 'What?', '--bundle', {str(bundle)!r}])"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "dualfocus[cpu]" in done.stderr
    assert "dualfocus[gpu]" in done.stderr


def test_nothing_is_left_in_the_users_folders(photo, bundle, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    places = {"HOME": home, "XDG_CACHE_HOME": home / "cache", "XDG_DATA_HOME": home / "data"}
    code = (
        f"from dualfocus import cli; cli.app(['ask', {str(photo)!r}, 'What?', '--bundle', {str(bundle)!r}])"
    )
    own = ("CI", "ORT_DISABLE_TELEMETRY")  # either would silence ONNX Runtime's telemetry by itself
    kept = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | {name: str(path) for name, path in places.items()}
    )
    assert done.returncode == 0
    assert list(home.rglob("*")) == []


def test_a_reader_that_leaves_is_no_crash(photo, bundle):
    arguments = ["ask", str(photo), "What?", "Why?", "--json", "--bundle", str(bundle)]
    code = f"from dualfocus import cli; cli.app({arguments})"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `command`, in which dualfocus is the command line, in a shell that has `arguments` as "$@"."""
    code = "import sys; from dualfocus import cli; cli.app(sys.argv[1:])"
    line = command.replace("dualfocus", f"{sys.executable} -c '{code}'")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command_line = ["sh", "-c", line, "sh", *map(str, arguments)]
    return subprocess.run(command_line, capture_output=True, text=True, env=buffered)


@pytest.mark.parametrize("flags", [[], ["--json"]])
@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ('dualfocus ask - What? "$@" <&-', 2, "standard input is closed"),
        ('dualfocus ask "$0" What? "$@" >&-', 0, ""),
        ('dualfocus ask "$0" What? "$@" 2>&- >/dev/null', 0, ""),
        ('dualfocus ask "$0" What? "$@" >/dev/full', 2, "No space left on device"),
        ('PYTHONIOENCODING=ascii dualfocus ask "$0" What? "$@"', 0, ""),
        ('dualfocus ask "$0" "$(printf \'What \\377?\')" "$@"', 2, "not text in UTF-8"),
    ],
)
def test_streams_that_are_closed_full_or_narrow(photo, bundle, flags, command, status, said):
    command = command.replace("$0", str(photo))
    done = shell(command, *flags, "--bundle", bundle, "--threads", 1)
    assert done.returncode == status
    assert said in done.stderr
    assert done.stderr.count("\n") == (1 if said else 0)


@pytest.mark.parametrize(
    "arguments", ["--help", "ask --help", "inspect --devices", "inspect --devices --json"]
)
def test_a_standard_output_that_is_full_is_named(arguments):
    done = shell(f"dualfocus {arguments} >/dev/full")
    assert done.returncode == 2
    assert done.stderr == "dualfocus: standard output: No space left on device\n"


def test_what_libraries_say_is_not_shown(tmp_path):
    """matplotlib, for one, where it finds no place for its cache."""
    (tmp_path / "home").write_text("no folder")
    done = python(
        "from dualfocus import cli; cli.app(['curate', '--visual-genome', 'none', '-o', 'nowhere'])",
        HOME=str(tmp_path / "home"),
        MPLCONFIGDIR=str(tmp_path / "home"),
    )
    assert done.returncode == 2
    assert done.stderr == "dualfocus: none: not a folder, expected Visual Genome's files in one\n"


# Ctrl-C: sent from inside, so that the moment is certain

INTERRUPT = "import atexit, os, signal, sys\ndef stop(*_): os.kill(os.getpid(), signal.SIGINT)\n"
BEGIN = "from dualfocus.__main__ import main\nsys.argv[1:] = ['inspect', '--devices']\n"
WHILE_IMPORTING = """
class Finder:
    def find_spec(self, name, *_):
        if name == "typer":
            stop()
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("moment", "status"),
    [
        (WHILE_IMPORTING, -signal.SIGINT),
        ("import typer.main; typer.main.get_command = stop\n", 130),
        ("from dualfocus import cli; cli._print_devices = lambda **_: stop()\n", 130),
        ("atexit.register(stop)\n", -signal.SIGINT),
    ],
    ids=["importing", "building the commands", "in a command", "ending"],
)
def test_an_interrupt_is_never_a_traceback(moment, status):
    done = python(INTERRUPT + moment + BEGIN + "main()")
    assert done.stderr == ""
    assert done.returncode == status


def test_an_interrupt_that_is_ignored_stays_ignored():
    done = python(
        INTERRUPT + "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WHILE_IMPORTING + BEGIN + "main()"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "cpu" in done.stdout


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "dualfocus", "ask"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dualfocus: missing argument 'PICTURE'")
