"""Checkpoints from the Hub: what is asked for, what the cache is trusted with, and what is refused.

A small server speaks the Hub's protocol.
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import resource
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import reset_sessions
from typer.testing import CliRunner

from dualfocus import cli
from dualfocus.export import ExportError, hub

ID = "org/model"
OLD, NEW = "a" * 40, "b" * 40
LARGE = 24 << 20  # bytes: the client keeps what came in pieces of ten megabytes
SMALL = {name: name.encode() for name in hub.SMALL}
SHARDS = {"model-1-of-2.safetensors": b"one", "model-2-of-2.safetensors": b"two"}
INDEX = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
BIN_SHARD = {"pytorch_model-1-of-1.bin": b"one"}
BIN_INDEX = json.dumps({"weight_map": dict(zip("a", BIN_SHARD, strict=True))}).encode()
SHARDED = SMALL | SHARDS | {"model.safetensors.index.json": INDEX}
# What repositories hold besides, and no export reads.
OTHERS = dict.fromkeys(
    [
        "README.md", ".gitattributes", "picture.png", "model.gguf", "tf_model.h5", "flax_model.msgpack",
        "optimizer.pt", "training_args.bin", "model.fp16.safetensors", "consolidated.safetensors",
        "onnx/model.onnx", "checkpoint-9/model.safetensors", "checkpoint-9/config.json",
    ],
    b"no",
)  # fmt: skip


@dataclass
class Hub:
    """A Hub of one repository, and what it was asked for."""

    address: str = ""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": NEW})
    refuses: tuple[int, str] | None = None  # every file, with this status and X-Error-Code
    down: bool = False
    hiccups: int = 0  # how many requests for files fail, before others do not
    moves: dict[str, str] = field(default_factory=dict)  # branches, once a file was asked for
    breaks_after: int | None = None  # bytes of a file
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range

    @property
    def sent(self) -> list[str]:
        """The files that were downloaded."""
        files = [path.split("/resolve/")[1] for method, path, _ in self.requests if is_download(method, path)]
        return sorted(file.partition("/")[2] for file in files)


def is_download(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


@pytest.fixture
def remote() -> Iterator[Hub]:
    known = Hub(commits={NEW: SHARDED | OTHERS})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known.requests.append((self.command, self.path, self.headers["Range"]))
            match = re.fullmatch(
                rf"/api/models/{ID}(?:/revision/(?P<at>[^/]+))?|/{ID}/resolve/(?P<of>[^/]+)/(?P<file>.+)",
                self.path,
            )
            if known.down:
                self.answer(503)
            elif match is None:
                self.answer(404, {"X-Error-Code": "RepoNotFound"})
            else:
                revision = unquote(match["at"] or match["of"] or "main")
                commit = known.branches.get(revision, revision)
                if commit not in known.commits:
                    self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                elif match["file"] is None:
                    siblings = [{"rfilename": name} for name in known.commits[commit]]
                    self.answer(200, {}, json.dumps({"id": ID, "sha": commit, "siblings": siblings}).encode())
                elif known.hiccups:
                    known.hiccups -= 1
                    self.answer(503)
                elif known.refuses:
                    self.answer(known.refuses[0], {"X-Error-Code": known.refuses[1]})
                else:
                    known.branches |= known.moves
                    self.send_file(commit, known.commits[commit][match["file"]])

        do_HEAD = do_GET  # noqa: N815

        def send_file(self, commit: str, data: bytes) -> None:
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
            if wanted := self.headers["Range"]:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self.answer(206, headers, data[start:])
            else:
                self.answer(200, headers, data)

        def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: known.breaks_after if "/resolve/" in self.path else None])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        known.address = f"http://127.0.0.1:{server.server_port}"
        yield known
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def environment(remote: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a process of its own needs to use `remote`; the library in this one has read its own long ago."""
    cache = tmp_path / "home" / "hub"
    monkeypatch.setattr(constants, "ENDPOINT", remote.address)
    address = remote.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reset_sessions()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return clean | {"HF_ENDPOINT": remote.address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}


def refusal(source: str = ID, revision: str | None = None) -> str:
    """The sentence of the ExportError that `fetch` raises."""
    with pytest.raises(ExportError) as caught:
        hub.fetch(source, revision)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_path_is_returned_as_it_is(tmp_path: Path) -> None:
    assert hub.fetch(str(tmp_path)) == (tmp_path, None)
    assert "is a path, which has no revision 'v1', expected an id" in refusal(str(tmp_path), "v1")


@pytest.mark.parametrize("source", ["a/b/c", "./typo", "/no/such/folder", "typo/", "", "a--b", "n" * 300])
def test_neither_a_path_nor_an_id(remote: Hub, source: str) -> None:
    assert refusal(source) == f"no such folder: {source:.200}, expected a checkpoint's folder or its id"
    assert remote.requests == []


def test_only_what_an_export_reads_comes_and_once(remote: Hub) -> None:
    folder, commit = hub.fetch(ID)
    assert commit == NEW
    assert contents(folder) == SHARDED
    assert remote.sent == sorted(SHARDED)
    remote.requests.clear()
    assert hub.fetch(ID) == (folder, commit)
    assert not any("/resolve/" in path for _, path, _ in remote.requests)


def test_weights_come_last(remote: Hub) -> None:
    hub.fetch(ID)
    downloads = [path for method, path, _ in remote.requests if is_download(method, path)]
    assert {Path(path).name for path in downloads[-2:]} == SHARDS.keys()


@pytest.mark.parametrize(
    ("weights", "taken"),
    [
        ({"model.safetensors": b"w", "pytorch_model.bin": b"x"}, ["model.safetensors"]),
        ({"model.safetensors": b"w"} | SHARDS, ["model.safetensors"]),
        (
            {"model.safetensors.index.json": INDEX, "pytorch_model.bin.index.json": BIN_INDEX}
            | SHARDS
            | BIN_SHARD,
            ["model.safetensors.index.json", *SHARDS],
        ),
        ({"pytorch_model.bin": b"x", "tf_model.h5": b"y"}, ["pytorch_model.bin"]),
        (
            {"pytorch_model.bin.index.json": BIN_INDEX} | BIN_SHARD,
            ["pytorch_model.bin.index.json", *BIN_SHARD],
        ),
    ],
)
def test_one_kind_of_weights_is_taken(remote: Hub, weights: dict[str, bytes], taken: list[str]) -> None:
    remote.commits[NEW] = {"config.json": b"{}"} | weights
    folder, _ = hub.fetch(ID)
    assert sorted(contents(folder)) == remote.sent == sorted(["config.json", *taken])


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", OLD])
def test_a_revision_is_the_commit_it_names(remote: Hub, revision: str) -> None:
    remote.commits[OLD] = {"config.json": b"old", "model.safetensors": b"old weights"}
    remote.branches |= {"v1": OLD, "refs/pr/1": OLD}
    folder, commit = hub.fetch(ID, revision)
    assert commit == OLD
    assert contents(folder) == remote.commits[OLD]


def test_a_branch_that_moved_is_fetched_anew(remote: Hub) -> None:
    hub.fetch(ID)
    remote.commits[OLD] = SHARDED | {"config.json": b"other"}
    remote.branches["main"] = OLD
    remote.requests.clear()
    folder, commit = hub.fetch(ID)
    assert commit == OLD
    assert contents(folder) == remote.commits[OLD]
    assert remote.sent == ["config.json"]  # the other files are the same


def test_a_branch_that_moves_meanwhile_changes_nothing(remote: Hub) -> None:
    remote.commits[OLD] = SHARDED | {"model-1-of-2.safetensors": b"other"}
    remote.moves = {"main": OLD}
    folder, commit = hub.fetch(ID)
    assert commit == NEW
    assert contents(folder) == SHARDED


def test_unknown_revision() -> None:
    assert "org/model has no revision 'v9', expected a branch, tag or commit" in refusal(ID, "v9")


def test_unknown_id() -> None:
    assert "org/none is neither a folder nor a model on the Hub, expected one" in refusal("org/none")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", "org/model is gated: ask for access on its page, then `hf auth login`"),
        (403, "GatedRepo", "org/model is gated: ask for access on its page, then `hf auth login`"),
        (401, "", "the Hub does not let you read org/model: `hf auth login`, or set another HF_TOKEN"),
        (403, "", "the Hub does not let you read org/model: `hf auth login`, or set another HF_TOKEN"),
    ],
)
def test_files_that_may_not_be_read(remote: Hub, status: int, code: str, message: str) -> None:
    remote.refuses = (status, code)
    assert message in refusal()


def test_a_repository_without_a_checkpoint(remote: Hub) -> None:
    remote.commits[NEW] = {"config.json": b"{}", "README.md": b"no"}
    assert refusal() == (
        "org/model on the Hub has no config.json or none of model.safetensors, "
        "model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
    )
    assert remote.sent == []


def test_a_repository_without_a_shard(remote: Hub) -> None:
    remote.commits[NEW] = {name: data for name, data in SHARDED.items() if name != "model-2-of-2.safetensors"}
    assert "lacks model-2-of-2.safetensors, which model.safetensors.index.json names" in refusal()


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 3}', b"\xff"])
def test_a_broken_index(remote: Hub, index: bytes) -> None:
    remote.commits[NEW] = SHARDED | {"model.safetensors.index.json": index}
    assert re.search("model.safetensors.index.json(:| is not JSON)", refusal())


def test_an_interrupted_download_goes_on(remote: Hub) -> None:
    weights = os.urandom(LARGE)
    remote.commits[NEW] = {"config.json": b"{}", "model.safetensors": weights}
    remote.breaks_after = LARGE // 2
    assert "the download of org/model broke off, and goes on from there when started again" in refusal()
    remote.breaks_after = None
    remote.requests.clear()
    folder, _ = hub.fetch(ID)
    assert (folder / "model.safetensors").read_bytes() == weights
    (wanted,) = [wanted for method, path, wanted in remote.requests if is_download(method, path)]
    assert wanted is not None
    assert 0 < int(wanted.removeprefix("bytes=").removesuffix("-")) <= LARGE // 2


@pytest.fixture(params=["offline", "refused", "answers 503"])
def cut_off(
    request: pytest.FixtureRequest, remote: Hub, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Called, it puts the Hub out of reach; returns the reason that an error gives."""

    def cut() -> str:
        reset_sessions()
        remote.requests.clear()
        if request.param == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            return "HF_HUB_OFFLINE is set"
        if request.param == "refused":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard, which nothing serves
            return "ConnectionError"
        remote.down = True
        return "it answered 503"

    return cut


def test_out_of_reach_with_a_cache(remote: Hub, cut_off: Callable[[], str]) -> None:
    fetched = hub.fetch(ID)
    cut_off()
    assert hub.fetch(ID) == fetched
    assert hub.fetch(ID, NEW) == fetched
    assert remote.sent == []


def test_out_of_reach_with_nothing(cut_off: Callable[[], str]) -> None:
    reason = cut_off()
    assert refusal() == (
        f"org/model is neither a folder nor in the Hub's cache, and the Hub is out of reach: {reason}"
    )


@pytest.mark.parametrize("gone", ["config.json", "model-2-of-2.safetensors", "weights"])
def test_out_of_reach_with_a_part(cut_off: Callable[[], str], gone: str) -> None:
    folder, _ = hub.fetch(ID)
    for path in folder.glob("model*" if gone == "weights" else gone):
        path.unlink()
    reason = cut_off()
    assert refusal() == (
        f"the Hub's cache holds org/model without its {gone}, and the Hub is out of reach: {reason}"
    )


def test_an_interrupted_download_is_not_whole(remote: Hub, cut_off: Callable[[], str]) -> None:
    remote.commits[NEW] = {"config.json": b"{}", "model.safetensors": os.urandom(1000)}
    remote.breaks_after = 500
    assert "broke off" in refusal()
    cut_off()
    assert "the Hub's cache holds org/model without its weights" in refusal()


def test_no_room(remote: Hub) -> None:
    remote.commits[NEW] = {"config.json": b"{}", "model.safetensors": bytes(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        sentence = refusal()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"the Hub's cache {constants.HF_HUB_CACHE} cannot be written: File too large; make" in sentence


def test_the_other_transport_breaks_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """hf_xet raises RuntimeError for whatever happens."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Data processing error:\nNo space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    sentence = refusal()
    assert sentence.startswith("the download of org/model broke off")
    assert sentence.endswith(": Data processing error: No space left on device")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refusal() == "export needs huggingface_hub: pip install 'dualfocus[export,cpu]'"


def test_import_is_light() -> None:
    code = "import sys, dualfocus.export.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_terminal_shows_a_bar(environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    code = f"from dualfocus.export.hub import fetch; fetch({ID!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "Fetching" in shown


def test_command_says_one_line(remote: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"

    def export(*arguments: str) -> str:
        command = [sys.executable, "-m", "dualfocus.cli", "export", *arguments, "-o", str(bundle)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        return done.stderr

    assert "org/model has no revision 'v9'" in export(ID, "--revision", "v9")
    remote.hiccups, remote.breaks_after = 1, 1
    assert "broke off" in export(ID)
    assert remote.hiccups == 0


def test_command_exports_what_it_fetched(remote: Hub, tmp_path: Path) -> None:
    remote.commits[OLD] = {"config.json": b'{"architectures": ["Other"]}', "model.safetensors": b"weights"}
    done = CliRunner().invoke(cli.app, ["export", ID, "--revision", OLD, "-o", str(tmp_path / "bundle")])
    assert done.exit_code == 2
    assert "org/model is a model of another kind: its architecture is Other, expected LLaVA's" in done.stderr


def test_random_weights_have_no_revision(tmp_path: Path) -> None:
    arguments = ["--random", "edge", "--revision", "v1", "-o", str(tmp_path / "bundle")]
    done = CliRunner().invoke(cli.app, ["export", *arguments])
    assert done.exit_code == 2
    assert "--revision was given with --random SHAPE, expected it with a CHECKPOINT" in done.stderr
