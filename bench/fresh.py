"""A fresh process, from its start to its first answer: `bench stages` runs this module as a child.

It does what ``dualfocus ask PICTURE QUESTION --json`` does, in that order. Standard input holds an object in
JSON: picture (a file), question, bundle (a folder), threads, spin, script (of `ScriptedDecoder`; empty for
trained weights) and began, the `time.perf_counter` of the parent as it started the child: all processes share
that clock. Standard output gets one: the answer, milliseconds from one step to the next in `STEPS`, and, on
Linux, the bytes of memory held at the most (peak_rss) and, of what is held at the answer, those that are no
file's (rss_anon).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

STEPS = ("python", "imports", "picture", "model", "answer")


def measure(
    picture: Path, question: str, bundle: Path, threads: int | None, spin: bool, script: Mapping[int, int]
) -> dict[str, Any]:
    """Run a child, and return its object. RuntimeError if it fails."""
    job = {
        "picture": str(picture),
        "question": question,
        "bundle": str(bundle),
        "threads": threads,
        "spin": spin,
        "script": script,
        "began": time.perf_counter(),
    }
    command = [sys.executable, "-m", "dualfocus.bench.fresh"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a fresh process did not answer: {done.stderr.strip()[-500:]}")
    answered: dict[str, Any] = json.loads(done.stdout)
    return answered


def main() -> None:
    """The child."""
    started = time.perf_counter()
    job = json.load(sys.stdin)
    stamps = [job["began"], started]
    import dualfocus.cli  # noqa: F401  (part of what a user waits for)
    from dualfocus.bench.scripted import ScriptedDecoder
    from dualfocus.runtime import Bundle, DualFocus, open_picture

    stamps.append(time.perf_counter())
    pixels = open_picture(job["picture"])
    stamps.append(time.perf_counter())
    bundle = Bundle.open(job["bundle"], threads=job["threads"], spin=job["spin"])
    if job["script"]:
        decoder = ScriptedDecoder(bundle.decoder)
        decoder.script = {int(position): token for position, token in job["script"].items()}
        bundle = dataclasses.replace(bundle, decoder=decoder)
    stamps.append(time.perf_counter())
    model = DualFocus(bundle)  # named, so that it is there when memory is looked at
    result = model.ask(pixels, job["question"])
    stamps.append(time.perf_counter())
    times = {step: 1e3 * (stamps[i + 1] - stamps[i]) for i, step in enumerate(STEPS)}
    print(json.dumps({"answer": result.answer, "times_ms": times, **memory()}))


def memory(process: int | Literal["self"] = "self") -> dict[str, int | None]:
    """Of a process, in bytes; None where the system does not tell, as of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {name: int(kilobytes.split()[0]) for name, _, kilobytes in (s.partition(":") for s in lines)
            if name in ("VmHWM", "RssAnon")}  # fmt: skip
    return {
        name: 1024 * told[field] if field in told else None
        for name, field in (("peak_rss", "VmHWM"), ("rss_anon", "RssAnon"))
    }


if __name__ == "__main__":
    main()
