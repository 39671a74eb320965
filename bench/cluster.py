"""A benchmark's questions, asked on many machines: through Ray Data, with one engine per worker.

A worker is a GPU, or so many cores of a machine. It is sent the questions about one picture and returns their
answers' lines, which come in any order: one process writes them down (`answers`), wherever they are from. All
machines find pictures and bundle under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from dualfocus.bench import accuracy
from dualfocus.bench.answers import Line, Run
from dualfocus.bench.questions import Asked
from dualfocus.runtime import Bundle, DualFocus, InputError, devices, registry
from dualfocus.runtime.bundle import BUILT_IN
from dualfocus.runtime.errors import DeviceError
from dualfocus.runtime.manifest import Target

LOCAL = "local"  # the address of a cluster of this machine alone, started and stopped with the run

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else its processes write to the terminal
    "RAY_worker_niceness": "0",  # else the engines come after whatever else this machine does
}


def ask_all(
    address: str,
    run: Run,
    questions: Sequence[Asked],
    *,
    bundle: Path | None,
    device: str,
    target: Target,
    threads: int | None,
) -> Iterator[Line]:
    """Answer every question, in any order, on the Ray cluster at `address`.

    `bundle` None is the built-in one, `target` what its graphs are for; `device` "auto" is what is best on
    this machine; `threads` are of each engine, None for all cores of the smallest machine. Raises InputError
    if Ray is not installed or not there, if it has no place for an engine, and as `accuracy.ask_all` does.
    """
    wanted = devices.parse(device)
    if wanted is not None and wanted.index:
        raise DeviceError(f"Ray chooses the GPU of each worker, expected {wanted.kind} instead of {wanted}")
    kind = (wanted or registry.choose(None, target)).kind
    is_gpu = kind != "cpu"
    with _connected(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, threads = places(nodes, threads, is_gpu=is_gpu)
        if not count:
            lacking = "GPU" if is_gpu else f"machine with {threads} cores"
            raise InputError(f"--ray {address}: the cluster has no {lacking}")
        together = [list(of) for _, of in groupby(questions, key=lambda asked: asked.picture)]
        rows = [{"questions": pickle.dumps(of)} for of in together]
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=(run, bundle and bundle.absolute(), kind, threads),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(count, len(rows))),
            **({"num_gpus": 1} if is_gpu else {"num_cpus": threads}),
        )
        try:
            # an answer is handed on when it comes, not with the next
            for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
                for problem in filter(None, batch["problem"]):
                    raise InputError(str(problem))
                for lines in batch["lines"]:
                    yield from json.loads(lines)
        except ray.exceptions.RayError as error:  # a worker that is gone, for want of memory or otherwise
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"--ray {address}: a worker failed: {reason}") from None


def places(
    nodes: Sequence[Mapping[str, float]], threads: int | None, *, is_gpu: bool
) -> tuple[int, int | None]:
    """How many engines there is room for on machines with these resources, and the threads of each."""
    if is_gpu:
        return sum(int(node.get("GPU", 0)) for node in nodes), threads
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    threads = threads or min(cores, default=1)
    return sum(of // threads for of in cores), threads


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module, connected; standard output is closed meanwhile."""
    for name, setting in ENVIRONMENT.items():
        os.environ.setdefault(name, setting)
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise InputError(f"--ray needs {error.name}: pip install 'dualfocus[cpu,ray]'") from None
    own = {"include_dashboard": False} if address == LOCAL else {}
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # where nobody listens, Ray waits for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        with _silence():  # it says on standard error that it was told to be silent
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except Exception as error:  # of any kind: a name not known, a port not open, another version of Ray
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"--ray {address}: no Ray cluster could be reached: {reason}") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # a thread of Ray's prints what becomes of its workers, where our result is to be
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _silence() -> Iterator[None]:
    """What is written to standard error, by whatever library, is lost."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _Worker:
    """An engine in a process of its own. What it cannot do comes back as a sentence: Ray would try again."""

    def __init__(self, run: Run, bundle: Path | None, device: str, threads: int | None) -> None:
        self._run = run
        self._bundle = bundle or BUILT_IN
        self._device = device
        self._threads = threads

    @cached_property
    def _model(self) -> DualFocus:
        bundle = Bundle.open(self._bundle, device=self._device, threads=self._threads)
        if bundle.digest[:16] != self._run.bundle:
            raise InputError(f"{self._bundle} is another bundle on {socket.gethostname()}, expected the same")
        return DualFocus(bundle)

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> dict[str, list[str]]:
        """Lists of questions about one picture each, pickled; lists of their lines, in JSON."""
        try:
            found = [
                list(accuracy.ask_all(self._model, self._run, pickle.loads(questions)))
                for questions in batch["questions"]
            ]
        except InputError as error:
            return {"lines": ["[]"], "problem": [str(error)]}
        except (ImportError, MemoryError, OSError) as error:
            reason = str(error) or type(error).__name__
            return {"lines": ["[]"], "problem": [f"a worker on {socket.gethostname()} failed: {reason}"]}
        return {"lines": [json.dumps(lines) for lines in found], "problem": [""] * len(found)}
