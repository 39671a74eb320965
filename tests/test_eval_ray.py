"""`dualfocus eval --ray`: the local answers from several workers, in one file whatever is killed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from equality import TOLERANCE
from typer.testing import CliRunner, Result

from dualfocus import cli
from dualfocus.bench import accuracy, cluster, scenes
from dualfocus.bench.answers import Line, Run
from dualfocus.bench.questions import Asked, File
from dualfocus.runtime import Bundle, DualFocus, InputError
from dualfocus.runtime.bundle import BUILT_IN, read_manifest

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

MANIFEST, DIGEST = read_manifest(BUILT_IN)
RUN = Run("scenes", "dual", MANIFEST.name, DIGEST[:16])
QUESTIONS = 12
PATIENCE = 300  # seconds: starting Ray on a busy machine


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    return list(scenes.benchmark(QUESTIONS).questions)


@pytest.fixture(scope="module")
def local(asked: list[Asked]) -> dict[str, Line]:
    """The answers of one process, by id."""
    return by_id(accuracy.ask_all(DualFocus(Bundle.open(threads=1)), RUN, asked))


class Near(float):
    """Equal to what it is in other sums: of questions side by side, of which a process has others."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Near) and abs(self - other) < TOLERANCE

    __hash__ = float.__hash__


def by_id(lines: Any) -> dict[str, Line]:
    """Answers without their times; each is there once."""

    def facts(metadata: dict[str, Any]) -> dict[str, Any]:
        near = {name: [of and Near(of) for of in metadata[name]] for name in ("losses", "confidence")}
        return metadata | near | {"ms": 0}

    found = [line | {"metadata": facts(line["metadata"])} for line in lines]
    assert len({line["question_id"] for line in found}) == len(found)
    return {line["question_id"]: line for line in found}


def written(path: Path) -> dict[str, Line]:
    return by_id(map(json.loads, path.read_text().splitlines()))


# Without a cluster


@pytest.mark.parametrize(
    ("given", "address"),
    [
        (["scenes", "--ray"], "local"),
        (["--ray", "--limit", "1", "scenes"], "local"),
        (["--ray", "scenes"], "local"),
        (["scenes", "--ray", "auto"], "auto"),
        (["scenes", "--ray=head:6379"], "head:6379"),
        (["scenes"], None),
    ],
)
def test_an_address_can_be_left_out(given, address, monkeypatch):
    taken = []

    def ask_all(address: str, run: Run, questions: list[Asked], **_: object) -> Iterator[Line]:
        taken.append(address)
        raise InputError("enough")

    monkeypatch.setattr(cluster, "ask_all", ask_all)
    result = CliRunner().invoke(cli.app, ["eval", *given, "--limit", "1"])
    assert taken == ([] if address is None else [address])
    assert result.exit_code == (0 if address is None else 2)


def refused(result: Result) -> str:
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    return result.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "nonsense"])
def test_an_address_where_nothing_is(address):
    said = refused(CliRunner().invoke(cli.app, ["eval", "scenes", "--limit", "1", "--ray", address]))
    assert f"--ray {address}: no Ray cluster could be reached: " in said


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refused(CliRunner().invoke(cli.app, ["eval", "scenes", "--limit", "1", "--ray"]))
    assert said == "dualfocus: --ray needs ray: pip install 'dualfocus[cpu,ray]'\n"


def test_what_a_worker_lacks_is_a_sentence(tmp_path):
    batch = {"questions": [b"cdualfocus.nowhere\nname\n."]}  # a pickle of what is not installed there
    answered = cluster._Worker(RUN, None, "cpu", 1)(batch)
    assert answered["lines"] == ["[]"]
    assert f"a worker on {socket.gethostname()} failed: No module named" in answered["problem"][0]


def test_a_workers_gpu_is_rays_choice():
    given = ["eval", "scenes", "--limit", "1", "--ray", "--device", "cuda:1"]
    assert "expected cuda instead of cuda:1" in refused(CliRunner().invoke(cli.app, given))


def test_there_is_an_engine_on_every_gpu_or_on_so_many_cores():
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 5.0}, {"memory": 1.0}]
    assert cluster.places(nodes, 4, is_gpu=False) == (3, 4)
    assert cluster.places(nodes, 1, is_gpu=False) == (13, 1)
    assert cluster.places(nodes, None, is_gpu=False) == (2, 5)
    assert cluster.places(nodes, 9, is_gpu=False) == (0, 9)
    assert cluster.places([], None, is_gpu=False) == (0, 1)
    assert cluster.places(nodes, 4, is_gpu=True) == (2, 4)
    assert cluster.places(nodes[1:], None, is_gpu=True) == (0, None)


def test_a_worker_answers_as_the_local_run_does(asked, local):
    worker = cluster._Worker(RUN, None, "cpu", 1)
    answered = worker({"questions": [pickle.dumps(asked[:2]), pickle.dumps(asked[2:3])]})
    assert answered["problem"] == ["", ""]
    lines = [line for of in answered["lines"] for line in json.loads(of)]
    assert by_id(lines) == {of.id: local[of.id] for of in asked[:3]}


def test_what_a_worker_cannot_do_it_says(asked):
    gone = pickle.dumps([replace(asked[0], picture=File("/nowhere/x.png"))])
    answered = cluster._Worker(RUN, None, "cpu", 1)({"questions": [gone]})
    assert answered["lines"] == ["[]"]
    assert str(asked[0].id) in answered["problem"][0]
    assert "/nowhere/x.png" in answered["problem"][0]
    other = cluster._Worker(replace(RUN, bundle="another"), None, "cpu", 1)
    assert "is another bundle on" in other({"questions": [pickle.dumps(asked[:1])]})["problem"][0]


# With one


class Driver:
    """`dualfocus eval scenes` in a process of its own; what it starts can be told by a mark."""

    def __init__(self, out: Path, *given: str, before: str = "") -> None:
        """`before` is code that it runs first."""
        self._mark = f"DUALFOCUS_TEST={uuid.uuid4()}"
        name, _, value = self._mark.partition("=")
        code = f"{before}\nfrom dualfocus import cli\ncli.main()"
        arguments = ["eval", "scenes", "--threads", "1", "--out", str(out), "--json", *given]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {name: value, "RAY_raylet_start_wait_time_s": "120"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def running(self, name: bytes = b"") -> int:
        """How many processes with the mark, and a command that begins with `name`, there are."""
        count = 0
        for of in Path("/proc").glob("[0-9]*"):
            try:
                command, environment = (of / "cmdline").read_bytes(), (of / "environ").read_bytes()
            except OSError:
                continue
            count += self._mark.encode() in environment.split(b"\0") and command.startswith(name)
        return count

    def wait_until_gone(self) -> None:
        end = time.monotonic() + PATIENCE
        while self.running():
            assert time.monotonic() < end, f"{self.running()} processes are left"
            time.sleep(0.2)


def finished(driver: Driver) -> dict[str, Any]:
    """Its result; nothing else was said."""
    out, err = driver.process.communicate(timeout=PATIENCE)
    assert (driver.process.returncode, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    return result


def test_two_local_workers_answer_as_one_process(tmp_path, asked, local):
    """Questions about two pictures, so that there are two workers where there are two cores."""
    assert len({of.picture for of in asked}) == 2
    driver = Driver(tmp_path / "answers.jsonl", "--limit", str(QUESTIONS), "--ray")
    most = 0
    while driver.process.poll() is None:
        most = max(most, driver.running(b"ray::MapWorker"))
        time.sleep(0.1)
    assert finished(driver)["questions"] == QUESTIONS
    assert most == min(2, os.cpu_count() or 1)
    assert written(tmp_path / "answers.jsonl") == local
    driver.wait_until_gone()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_was_ended_is_gone_on_with(tmp_path, end):
    """By its third answer, since nobody outside could be sure to be in time."""
    out, many = tmp_path / "answers.jsonl", 60
    questions = scenes.benchmark(many).questions
    expected = by_id(accuracy.ask_all(DualFocus(Bundle.open(threads=1)), RUN, questions))
    given = "--limit", str(many), "--ray"
    code = (
        "import os, signal\n"
        # a shell's background jobs, and so what these tests may run in, ignore Ctrl-C
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dualfocus.bench.answers import Answers\n"
        "append = Answers.append\n"
        "def ending(self, line):\n"
        "    append(self, line)\n"
        f"    if len(self.lines) == 3: os.kill(os.getpid(), {int(end)})\n"
        "Answers.append = ending\n"
    )
    ended = Driver(out, *given, before=code)
    interrupted = f"dualfocus: interrupted: the same command goes on with {out}\n"
    said = ended.process.communicate(timeout=PATIENCE)
    assert said == ("", interrupted if end is signal.SIGINT else "")
    ended.wait_until_gone()
    before = out.read_bytes()
    assert 3 <= before.count(b"\n") < many
    assert finished(Driver(out, *given))["questions"] == many
    assert {*before[: before.rindex(b"\n")].split(b"\n")} <= {*out.read_bytes().split(b"\n")}
    order = [json.loads(line)["question_id"] for line in out.read_text().splitlines()]
    assert order == [of.id for of in questions]
    assert written(out) == expected


@pytest.mark.slow
def test_a_cluster_of_two_machines(tmp_path, asked, local):
    """It is there before and after."""
    code = (
        "from ray.cluster_utils import Cluster\n"
        "head = {'num_cpus': 1, 'include_dashboard': False}\n"
        "cluster = Cluster(initialize_head=True, head_node_args=head)\n"
        "cluster.add_node(num_cpus=1)\n"
        "print(cluster.address, flush=True)\n"
        "input()\n"
        "cluster.shutdown()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout
        address = started.stdout.readline().strip()
        for name in ("one", "two"):
            driver = Driver(tmp_path / name, "--limit", str(QUESTIONS), "--ray", address)
            assert finished(driver)["questions"] == QUESTIONS
            assert written(tmp_path / name) == local
        lacking = Driver(tmp_path / "three", "--limit", "1", "--ray", address, "--threads", "2")
        _, said = lacking.process.communicate(timeout=PATIENCE)
        assert said == f"dualfocus: --ray {address}: the cluster has no machine with 2 cores\n"
        assert lacking.process.returncode == 2
        started.communicate("\n")
