"""This runtime and others on the same weights, side by side: ``dualfocus bench peers``.

`run` loads a checkpoint once and lets every installed peer write its files from it. Each peer is then opened
in each precision, in a process of its own, and all that can do a part do it in turn, round by round; the time
is what the part took inside the process. All are open at once, so that memory has to hold the model as often
as there are rows. What a peer cannot do stands in the result with its reason; so does a process that died.

The modules: `base`, what a peer is; `work`, what is asked of it; `process`, where it runs; `quality`, what
its precisions cost; `report`, tables and bars; and one for each peer, of which `ours` is this runtime.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dualfocus.bench import harness
from dualfocus.bench.harness import Timing, Watch
from dualfocus.bench.peers.base import PARTS, PAST, PRECISIONS, PREFILL, STEPS, Part, Peer, Precision, Work
from dualfocus.bench.peers.process import Child, Done, Failure, OpenedPeer, PeerError
from dualfocus.bench.peers.report import markdown, plot, show
from dualfocus.export.shapes import Shape
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.errors import InputError

__all__ = ["markdown", "plot", "run", "show"]

OURS, TRANSFORMERS, LLAMA_CPP = "dualfocus", "transformers", "llama.cpp"
PEERS = {
    OURS: "dualfocus.bench.peers.ours",
    TRANSFORMERS: "dualfocus.bench.peers.transformers",
    LLAMA_CPP: "dualfocus.bench.peers.llama_cpp",
    "onnxruntime-genai": "dualfocus.bench.peers.genai",
    "openvino": "dualfocus.bench.peers.openvino",
}  # modules by name; a peer's folder is called after its module
NOT_INSTALLED = "not installed: pip install 'dualfocus[peers]'"

TOKENS: Mapping[Part, int] = {"prefill": PREFILL, "decode": STEPS, "decode, two rows": 2 * STEPS}
ROOM: Mapping[Part, int] = {"prefill": PREFILL, "decode": PAST + STEPS, "decode, two rows": PAST + STEPS}
# a question of ours always reuses what it has
AGAINST: Mapping[Part, Part] = {"question with reuse": "question as shipped"}

Row = dict[str, Any]  # of the JSON object
Medians = Mapping[tuple[str, Precision, Part], float]  # milliseconds by peer, precision and part


@dataclass(frozen=True)
class Prepared:
    """What is known of a peer before it is opened."""

    versions: Mapping[str, str] = field(default_factory=dict)
    precisions: Sequence[Precision] = ()
    engines: Sequence[Precision] = ()  # those whose quality can be measured
    missing: str | None = None  # why it is not there
    failed: str | None = None  # why its files could not be written


def run(
    source: Path | Shape,
    folder: Path,
    rounds: int,
    threads: int | None,
    precisions: Sequence[Precision] = PRECISIONS,
    questions: int = 200,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """All that is measured, as the JSON object has it.

    `source` is a checkpoint folder, or the shape of random weights; every peer's files go into `folder` and
    are found there the next time. `threads` None takes as many as there are cores. `rounds` is how often each
    part is timed; a question, which takes as long as ten others, a third as often. A checkpoint's quality is
    measured on `questions` held-out scenes, which a checkpoint other than the built-in model's knows nothing
    about; random weights have none, and "quality" is None.

    InputError if `folder` holds another model's files, or our own bundles cannot be exported.
    """
    from dualfocus.bench.peers.work import make  # draws a scene, which the processes need not be able to

    threads = threads or _cores()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, source)
    prepared = _prepare(source, folder, precisions, watch)
    if (reason := prepared[OURS].missing or prepared[OURS].failed) is not None:
        raise InputError(f"bench peers: our own bundles could not be exported, {reason}")
    bundle = folder / folder_name(PEERS[OURS]) / "fp32"
    manifest, _ = read_manifest(bundle)
    work = make(bundle, folder, threads)
    result = harness.header("peers", threads) | {
        "bundle": manifest.name,
        "rounds": rounds,
        "unit": "ms",
        "question": work.question,
        "tokens": dict(TOKENS) | {"past of the decoded": PAST},
        "peers": {name: _introduced(peer) for name, peer in prepared.items()},
    }
    asked: list[tuple[str, Precision]] = [
        (name, precision)
        for name, peer in prepared.items()
        for precision in PRECISIONS
        if peer.failed is None and precision in peer.precisions and precision in precisions
    ]
    rows = _time(asked, work, manifest.decoder.context, rounds, watch)
    compare(rows)
    result |= {"rows": rows, "wanted": wanted(medians(rows)), "quality": None}
    if isinstance(source, Path):
        from dualfocus.bench.peers import quality

        measured = [
            (name, PEERS[name], precision) for name, precision in asked if precision in prepared[name].engines
        ]
        result["quality"] = quality.measure(measured, bundle, work, questions, watch)
    return result


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _claim(folder: Path, source: Path | Shape) -> None:
    """Note in `folder` which model's files are in it; InputError if they are another's."""
    if isinstance(source, Shape):
        identity: dict[str, Any] = {"random weights": dataclasses.asdict(source)}
    else:
        if not source.is_dir():
            raise InputError(f"{source} is not a folder, expected a checkpoint")
        files = sorted(path for path in source.iterdir() if path.is_file())
        identity = {
            "checkpoint": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        }
    note = folder / "source.json"
    text = json.dumps(identity, indent=2) + "\n"
    if not note.exists():
        note.write_text(text, encoding="utf-8")
    elif note.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder} holds the files of another model, expected this one's or nothing")


def _prepare(
    source: Path | Shape, folder: Path, precisions: Sequence[Precision], watch: Watch
) -> dict[str, Prepared]:
    """All peers' files. One process reads the checkpoint for all of them; where it dies, the peer whose turn
    it was gets the reason, and another process goes on with the next."""
    found: dict[str, Prepared] = {}
    while todo := {name: module for name, module in PEERS.items() if name not in found}:
        log = folder / f"prepare-{folder_name(next(iter(todo.values())))}.log"
        child = Child(_prepare_in_turn, source, folder, todo, tuple(precisions), log=log)
        name = ""
        try:
            for name in todo:
                watch(f"preparing {name}", len(found), len(PEERS))
                found[name] = child.receive()
        except PeerError as error:
            found[name] = Prepared(failed=str(error))
        finally:
            child.close()
    return found


def _prepare_in_turn(
    connection: Connection,
    source: Path | Shape,
    folder: Path,
    modules: Mapping[str, str],
    precisions: Sequence[Precision],
) -> None:
    """Sends a `Prepared` for each of `modules`."""
    checkpoint: Any = None
    for name, module in modules.items():
        try:
            peer: Peer = importlib.import_module(module)
            versions = {package: importlib.metadata.version(package) for package in peer.REQUIRES}
        except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError) as error:
            # a module of ours that is not there is no library that was not installed
            broken = (error.name or "").startswith("dualfocus")
            connection.send(Prepared(failed=str(error)) if broken else Prepared(missing=NOT_INSTALLED))
            continue
        failed = None
        place = folder / folder_name(module)
        place.mkdir(exist_ok=True)
        try:
            if name == OURS:
                from dualfocus.bench.peers import ours

                ours.prepare(source, place, ("fp32", *precisions))
            else:
                checkpoint = checkpoint or _load(source)
                peer.prepare(checkpoint, place)
        except Exception as error:
            failed = Failure.of(error).reason
        engines = tuple(getattr(peer, "ENGINES", ()))
        connection.send(Prepared(versions, tuple(peer.PRECISIONS), engines, failed=failed))


def _load(source: Path | Shape) -> Any:
    from dualfocus.export import checkpoint, random_weights

    return random_weights.random_checkpoint(source) if isinstance(source, Shape) else checkpoint.load(source)


def folder_name(module: str) -> str:
    """What the folder of a peer's files is called: its module's last name."""
    return module.rpartition(".")[2]


def _introduced(peer: Prepared) -> dict[str, Any]:
    """A peer as the JSON object has it: its versions, and why it has no rows where it has none."""
    reason = peer.missing or peer.failed
    return {"versions": dict(peer.versions)} | ({"cannot": reason} if reason else {})


def _time(
    asked: Sequence[tuple[str, Precision]], work: Work, room: int, rounds: int, watch: Watch
) -> list[Row]:
    """A row for each of `asked`: every part's times, or the reason why it has none."""
    rows: list[Row] = []
    opened: dict[int, OpenedPeer] = {}  # by the row's index
    try:
        for i, (name, precision) in enumerate(asked):
            watch(f"opening {name} {precision}", i, len(asked))
            row: Row = {"peer": name, "precision": precision}
            rows.append(row)
            log = work.folder / f"{folder_name(PEERS[name])}-{precision}.log"
            try:
                opened[i] = OpenedPeer(PEERS[name], precision, work, log)
            except PeerError as error:
                row["cannot"] = str(error)
            else:
                row |= {"form": opened[i].ready.form, "peak_rss": 0, "idle_ms": 0.0, "parts": {}}
        for part in PARTS:
            able: dict[int, OpenedPeer] = {}
            for i, peer in opened.items():
                if ROOM.get(part, 0) > room:
                    rows[i]["parts"][part] = {"cannot": f"the model has room for {room} tokens"}
                elif part in peer.ready.parts:
                    able[i] = peer
                else:
                    rows[i]["parts"][part] = {"cannot": peer.ready.cannot.get(part, "it was not written")}
            times = max(2, rounds // 3) if part.startswith("question") else rounds
            for i, found in interleaved(able, part, times, partial(_watch_part, watch, part)).items():
                _note(rows[i], part, found)
    finally:
        for peer in opened.values():
            peer.close()
    return rows


def _watch_part(watch: Watch, part: Part, done: int, total: int) -> None:
    watch(part, done, total)


def interleaved(
    peers: Mapping[int, OpenedPeer], part: Part, rounds: int, watch: Callable[[int, int], object]
) -> dict[int, list[Done] | str]:
    """Of every peer what doing `part` came to, `rounds` times after one to warm up; or why it failed.

    As `harness.interleaved`: a round asks each once, and begins with another one than the round before.
    """
    found: dict[int, list[Done] | str] = {i: [] for i in peers}
    keys = list(peers)
    orders = [keys, *(keys[turn % len(keys) :] + keys[: turn % len(keys)] for turn in range(rounds) if keys)]
    for done, i in enumerate(i for order in orders for i in order):
        watch(done, len(keys) * len(orders))
        so_far = found[i]
        if isinstance(so_far, list):
            try:
                so_far.append(peers[i].do(part))
            except PeerError as error:
                found[i] = str(error)
    return {i: of if isinstance(of, str) else of[1:] for i, of in found.items()}


def _note(row: Row, part: Part, found: Sequence[Done] | str) -> None:
    """Enter in `row` what `part` came to."""
    if isinstance(found, str):
        row["parts"][part] = {"cannot": found}
        return
    timing = Timing.of([done.ms for done in found])
    entry = dataclasses.asdict(timing) | {
        "rounds": len(found),
        "counts": dataclasses.asdict(found[-1].counts),
    }
    if part in TOKENS:
        entry["tokens_per_s"] = 1e3 * TOKENS[part] / timing.median
    row["parts"][part] = entry
    row["peak_rss"] = max(row["peak_rss"], *(done.peak_rss for done in found))
    row["idle_ms"] = max(row["idle_ms"], *(done.idle_ms for done in found))


def medians(rows: Iterable[Row]) -> dict[tuple[str, Precision, Part], float]:
    """Those of all parts that were timed."""
    return {
        (row["peer"], row["precision"], part): entry["median"]
        for row in rows
        for part, entry in row.get("parts", {}).items()
        if "median" in entry
    }


def compare(rows: Sequence[Row]) -> None:
    """Enter in every part's "ratio" how many times as long it takes as ours does in the same precision; None
    where there is no such row of ours."""
    known = medians(rows)
    for row in rows:
        for part, entry in row.get("parts", {}).items():
            if "median" in entry:
                ours = known.get((OURS, row["precision"], AGAINST.get(part, part)))
                entry["ratio"] = None if ours is None else entry["median"] / ours


def wanted(known: Medians) -> list[dict[str, Any]]:
    """What is wanted of the shape `edge`: how many times as long another takes as we do.

    "value" and "met" are None where a side is missing. The best of several is the fastest that was timed.
    """
    targets: list[dict[str, Any]] = []

    def want(
        part: Part,
        ours: Precision,
        others: Sequence[tuple[str, Precision]],
        at_least: float,
        of: Part | None = None,
    ) -> None:
        of = of or part  # what the others do
        took = {f"{name} {precision}": known.get((name, precision, of)) for name, precision in others}
        timed = {name: ms for name, ms in took.items() if ms is not None}
        best = min(timed, key=timed.__getitem__, default=None)
        mine = known.get((OURS, ours, part))
        value = None if mine is None or best is None else timed[best] / mine
        targets.append(
            {
                "part": of,
                "ours": ours,
                "other": best or (next(iter(took)) if len(took) == 1 else f"the best peer {ours}"),
                "value": value,
                "wanted": f">= {at_least}",
                "met": None if value is None else value >= at_least,
            }
        )

    own: tuple[Precision, ...] = ("fp32", "int8", "int4")
    floors: dict[Part, float] = {"decode": 1.2, "decode, two rows": 1.6, "prefill": 1.2}
    for part, at_least in floors.items():
        for precision in own:
            want(part, precision, [(LLAMA_CPP, precision)], at_least)
    want("vision", "fp32", [(TRANSFORMERS, "fp32")], 1.2)
    want("vision", "int8", [(TRANSFORMERS, "bf16")], 1.5)
    want("vision", "int8", [(LLAMA_CPP, "int8")], 1.0)
    question: Part = "question as shipped"
    want(question, "fp32", [(TRANSFORMERS, "fp32")], 3.5)
    want(question, "int8", [(TRANSFORMERS, "fp32")], 6.0)
    for of, at_least in ((question, 2.5), ("question with reuse", 1.3)):
        for precision in own:
            peers = [(name, precision) for name in PEERS if name != OURS]
            want(question, precision, peers, at_least, of)
    return targets
