"""Mutates files with fixed seeds, and opens them in processes of their own.

A target is a function `target(random, folder)` of a module in this folder: it writes one mutated input into
the empty `folder` and gives it to the program. It may return, or raise InputError with one sentence. `fuzz`
reports everything else: another exception, an end by a signal, a hang, output on stdout or stderr, a file
written outside `folder`, a program that was started or a connection that was opened. If the module has a
function `prepare`, each process calls it once before, in a folder of its own.

A finding names its seed. To see it again: ``python tests/fuzzing.py test_fuzz_bundles:manifest 123``.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import importlib
import itertools
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from dualfocus.runtime.errors import InputError

Target = Callable[[Random, Path], object]
FACTOR = int(os.environ.get("FUZZ", "1"))  # multiplies the number of cases
SECONDS = 10  # a case that takes longer hangs
START = 180  # seconds for a process to import what it tests
MEMORY = 12 << 30  # bytes of address space for a process

# ---- mutations

NUMBERS = [0, 1, -1, 2, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 10**8, 10**9, 10**30]
TEXTS = [
    "", " ", "\0", "\n", "a" * 300, "b" * 100_000, "é", "\u202e", "👍", "../../escaped", "/dev/zero",
    "/etc/passwd", "https://example.com/x", "{}", "{Q}{T}", "[(*+?", "(a+)+$", "NaN", "1", "<image>", "</s>",
]  # fmt: skip
VALUES: list[Any] = [None, True, False, 0.5, -0.0, 1e308, 1e-320, [], {}, [[]], [{}], {"a": 1}, {"": None}]
# written in place of a string, which JSON's writer takes for one
RAW = {
    "\u0001nan": "NaN",
    "\u0001infinity": "-Infinity",
    "\u0001huge": "1" + "0" * 400,
    "\u0001float": "1e999",
    "\u0001list": "[" * 100_000 + "]" * 100_000,
    "\u0001object": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "\u0001open": "[" * 1_000,
    "\u0001surrogate": '"\\ud800"',
    "\u0001duplicate": '1, "a": 2, "a": 3',
}


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """`data` with a few bits flipped, or parts of it set, inserted, deleted, repeated, moved or cut off."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(out) + 1)
        end = min(len(out), at + random.choice((1, 1, 2, 4, 8, random.randrange(1, 1 + len(out) // 2 + 1))))
        match random.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << random.randrange(8)
            case 1:
                out[at:end] = bytes([random.choice((0, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x7B))]) * (end - at)
            case 2:
                out[at:at] = random.randbytes(random.choice((1, 2, 8, 100)))
            case 3:
                del out[at:end]
            case 4:
                out[at:at] = out[at:end] * random.choice((1, 2, 20))
            case 5:
                number = random.choice(NUMBERS) % 2**64
                size = random.choice((2, 4, 8))
                out[at : at + size] = (number % 2 ** (8 * size)).to_bytes(
                    size, random.choice(("little", "big"))
                )
            case 6:
                start = random.randrange(len(out) + 1)
                out[at:at] = out[start : start + end - at]
            case _ if random.random() < 0.3:
                del out[at:]
    return bytes(out)


def mutate_json(data: bytes | Any, random: Random) -> bytes:
    """JSON, as bytes or parsed, with some values replaced, keys deleted, renamed, added or repeated."""
    value = json.loads(data) if isinstance(data, bytes) else copy.deepcopy(data)
    if random.random() < 0.1:
        text = json.dumps(value).encode()
        return mutate_bytes(text, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _mutate_value(value, random)
    text = json.dumps(value)
    for sign, raw in RAW.items():
        text = text.replace(json.dumps(sign), raw)
    return text.encode()


def _mutate_value(root: Any, random: Random) -> Any:
    places = list(_places(root))
    if not places or random.random() < 0.01:
        return random.choice([*VALUES, *RAW])
    parent, key = random.choice(places)
    old = parent[key]
    match random.randrange(10):
        case 0 | 1:
            parent[key] = _other(old, random)
        case 2:
            parent[key] = copy.deepcopy(random.choice([*VALUES, *NUMBERS, *TEXTS]))
        case 3:
            parent[key] = random.choice(list(RAW))
        case 4:
            del parent[key]
        case 5 if isinstance(parent, dict):
            parent[random.choice([*TEXTS, f"{key}_", str(key).upper()])] = parent.pop(key)
        case 5:
            parent[key:key] = [copy.deepcopy(old)] * random.choice((1, 3, 1000))
        case 6 if isinstance(parent, dict):
            parent[random.choice(TEXTS)] = copy.deepcopy(random.choice([old, *VALUES]))
        case 7:  # what stands elsewhere
            other, place = random.choice(places)
            parent[key] = copy.deepcopy(other[place])
        case 8:
            parent[key] = random.choice([[old], [old] * 3, {"a": old}, str(old)[:1000]])
        case _ if isinstance(parent, dict):
            parent["\u0001"] = "\u0001duplicate"
    return root


def _other(value: Any, random: Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice([value + 1, value - 1, -value, value * 2, value * 1000, value / 2, *NUMBERS])
    if isinstance(value, float):
        return random.choice([-value, value * 1e6, value * 1e300, 0, int(value), *NUMBERS])
    if isinstance(value, str):
        text = mutate_bytes(value.encode("utf-8", "surrogatepass"), random).decode("utf-8", "replace")
        return random.choice([text, text, value * 2, value[::-1], value.upper(), *TEXTS])
    if isinstance(value, list):
        return random.choice(
            [[], value * 2, value[::-1], value[1:], value[:1] * 10_000, dict(enumerate(value))]
        )
    if isinstance(value, dict):
        return random.choice([{}, list(value), list(value.values()), {**value, "": value}])
    return random.choice([*VALUES, *NUMBERS])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield value, key
        yield from _places(item)


@dataclass
class Field:
    """One field of a protobuf message; a message is a list of them."""

    number: int
    wire: int  # 0 varint, 1 eight bytes, 2 bytes or a message, 5 four bytes
    value: int | bytes | list[Field]


def mutate_protobuf(data: bytes, random: Random) -> bytes:
    """A protobuf message with fields of it, at any depth, changed, deleted, repeated, moved or renumbered."""
    message = parse_protobuf(data)
    if message is None or random.random() < 0.05:
        return mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        every = list(_messages(message))
        inside, at = random.choice(every) if every else (message, 0)
        if not inside:
            continue
        field = inside[at]
        match random.randrange(10):
            case 0 | 1 | 2:
                _mutate_field(field, random)
            case 3:
                del inside[at]
            case 4:
                inside[at:at] = [_copied(field) for _ in range(random.choice((1, 1, 50)))]
            case 5:
                field.number = random.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 14, 15, 20, 25, 100, 2**28))
            case 6:
                other, place = random.choice(every)
                inside[at] = _copied(other[place])
            case 7:
                other, place = random.choice(every)
                inside.insert(at, _copied(other[place]))
            case 8:
                other, place = random.choice(every)
                inside[at], other[place] = _copied(other[place]), _copied(field)
            case _:
                for _ in range(random.choice((3, 100))):
                    field.value, field.wire = [copy.copy(field)], 2
    return write_protobuf(message)


def _copied(field: Field) -> Field:
    inside = field.value
    return Field(
        field.number, field.wire, [_copied(of) for of in inside] if isinstance(inside, list) else inside
    )


def _mutate_field(field: Field, random: Random) -> None:
    if isinstance(field.value, int):
        near = field.value + random.choice((-1, 1, 2))
        field.value = random.choice([near, near, *range(30), *NUMBERS]) % 2**64
        field.value %= {1: 2**64, 5: 2**32}.get(field.wire, 2**64)
    elif isinstance(field.value, bytes):
        texts = [text.encode() for text in TEXTS]
        field.value = random.choice([mutate_bytes(field.value, random), b"", *texts])
    else:
        field.value = random.choice([[], field.value[::-1], field.value * 2, field.value[:1]])


def _messages(message: list[Field]) -> Iterator[tuple[list[Field], int]]:
    for at, field in enumerate(message):
        yield message, at
        if isinstance(field.value, list):
            yield from _messages(field.value)


def parse_protobuf(data: bytes, depth: int = 0) -> list[Field] | None:
    """The fields of a message; None for what is none. Bytes that happen to be a message are taken for one."""
    fields, at = [], 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: int | bytes | list[Field]
        if not 1 <= number < 2**29 or at < 0:
            return None
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value = int.from_bytes(data[at : at + size], "little")
            at += size
        elif wire == 2:
            size, at = _varint(data, at)
            value = data[at : at + size]
            if at < 0 or len(value) != size:
                return None
            at += size
            if 0 < size < 1 << 20 and depth < 12 and (inside := parse_protobuf(value, depth + 1)):
                value = inside
        else:
            return None
        if not 0 <= at <= len(data):
            return None
        fields.append(Field(number, wire, value))
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends; -1 where there is none."""
    number = 0
    for shift in range(0, 70, 7):
        if not 0 <= at < len(data):
            break
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number % 2**64, at
    return 0, -1


def write_protobuf(message: list[Field]) -> bytes:
    """The message as bytes."""
    out = bytearray()
    for field in message:
        out += _as_varint(field.number << 3 | field.wire)
        if field.wire == 2:
            inside = field.value if isinstance(field.value, bytes) else write_protobuf(field.value)  # type: ignore[arg-type]
            out += _as_varint(len(inside)) + inside
        else:
            assert isinstance(field.value, int)
            sizes = {1: 8, 5: 4}
            out += (
                _as_varint(field.value)
                if field.wire == 0
                else field.value.to_bytes(sizes[field.wire], "little")
            )
    return bytes(out)


def _as_varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


# ---- the processes that open the mutated files


@dataclass(frozen=True)
class Finding:
    """A case that went wrong."""

    target: str
    seed: int
    kind: str  # "exception", "signal", "hang", "output", "sentence", "written outside", "forbidden"
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: python tests/fuzzing.py {self.target} {self.seed}\n{self.detail}"


def fuzz(target: Target, cases: int, root: Path, *, workers: int = 2) -> list[Finding]:
    """What goes wrong in `cases` times `FACTOR` calls of `target`, made by `workers` processes.

    Their folders are in `root`. The seeds are 0, 1, 2 ... A case that hangs is tried again before it counts,
    for the machine may be busy.
    """
    name = f"{target.__module__.rpartition('.')[2]}:{target.__name__}"
    seeds = iter(range(cases * FACTOR))
    lock, found = threading.Lock(), list[Finding]()

    def work(number: int) -> None:
        with _Process(name, root / f"worker{number}") as process:
            while (seed := _next(seeds, lock)) is not None:
                finding = process.try_case(seed)
                if finding is not None and finding.kind == "hang":
                    finding = process.try_case(seed)
                if finding is not None:
                    found.append(finding)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))  # raises what a worker does: one that cannot start tries nothing
    return sorted(found, key=lambda finding: finding.seed)


def report(found: list[Finding], most: int = 10) -> str:
    """The first findings of each kind, for an assertion's message."""
    kinds = sorted({finding.kind for finding in found})
    counts = {kind: sum(finding.kind == kind for finding in found) for kind in kinds}
    shown = [f for kind in kinds for f in itertools.islice((f for f in found if f.kind == kind), most)]
    return f"{counts}\n" + "\n".join(map(str, shown))


def _next(seeds: Iterator[int], lock: threading.Lock) -> int | None:
    with lock:
        return next(seeds, None)


class _Process:
    """A process that tries one case after another; it is replaced when one ends it."""

    def __init__(self, target: str, folder: Path) -> None:
        self._target, self._folder = target, folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def try_case(self, seed: int) -> Finding | None:
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{seed}\n".encode())
            process.stdin.flush()
        line = self._read(SECONDS)
        if line is None:
            process.send_signal(signal.SIGABRT)  # faulthandler then writes where it hangs
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            self._stop()
            return Finding(self._target, seed, "hang", self._output())
        if not line:
            code = process.wait()
            self._stop()
            return Finding(self._target, seed, "signal", f"ended with {code}\n{self._output()}")
        answer = json.loads(line)
        return None if answer is None else Finding(self._target, seed, answer[0], answer[1])

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading, "rb", buffering=0)
        here = Path(__file__).parent
        with (self._folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(here / "fuzzing.py"), self._target, "--answer-to", str(writing)],
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[writing],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        os.close(writing)
        ready = self._read(START)
        if not ready:
            self._stop()
            raise AssertionError(f"{self._target} cannot be imported: {self._output()}")

    def _read(self, seconds: float) -> bytes | None:
        """A line of the process: empty if it ended, None if it takes longer."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self._answers], [], [], seconds)[0]:
                return None
            part = self._answers.read(1 << 16)
            if not part:
                return b""
            line += part
        return line

    def _output(self) -> str:
        return (self._folder / "output").read_text(errors="replace")[-3000:]

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._answers.close()
            self._process = None


# ---- inside such a process

FORBIDDEN = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect",
    "socket.getaddrinfo", "builtins.input",
}  # fmt: skip
WRITES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
}


class _Watch:
    """Notes what Python code does that a case must not, by Python's audit events."""

    def __init__(self) -> None:
        self.inside: Path | None = None  # the case's folder while one runs
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in FORBIDDEN:
            self.seen.append(("forbidden", f"{event} {args!r:.300}"))
        elif event.startswith("os.") and event != "os.truncate" and args[-1] != -1:
            pass  # relative to an open folder, as `shutil.rmtree` works, which has an event of its own
        elif (event == "open" and self._writes(args)) or event in WRITES:
            changed = {"os.rename": args[:2], "os.link": args[1:2], "os.symlink": args[1:2]}
            for path in changed.get(event, args[:1]):
                if isinstance(path, str | bytes | os.PathLike) and not self._allowed(os.fsdecode(path)):
                    self.seen.append(("written outside", f"{event} {path!r}"))

    @staticmethod
    def _writes(args: tuple[Any, ...]) -> bool:
        _, mode, flags = args
        by_mode = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        return by_mode or (isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))

    def _allowed(self, path: str) -> bool:
        assert self.inside is not None
        real = os.path.realpath(path)
        return real == os.devnull or Path(real).is_relative_to(self.inside)


def _try(function: Target, name: str, seed: int, root: Path, watch: _Watch) -> tuple[str, str] | None:
    """What goes wrong in one case: its kind and details."""
    # deep, so that what climbs out of the case's folder stays within `root`
    folder = root / "a" / "b" / "c" / "case"
    folder.mkdir(parents=True)
    sys.stdout.flush(), sys.stderr.flush()
    before = os.fstat(1).st_size
    problem = None
    watch.inside, watch.seen = folder.resolve(), []
    try:
        function(Random(f"{name} {seed}"), folder)
    except InputError as error:
        sentence = str(error)
        if not sentence.strip() or "\n" in sentence or len(sentence) > 2000:
            problem = "sentence", f"{type(error).__name__}: {sentence:.3000}"
    except BaseException:  # a panic of Rust code, SystemExit
        problem = "exception", traceback.format_exc()[-3000:]
    finally:
        watch.inside = None
    sys.stdout.flush(), sys.stderr.flush()
    if problem is None and watch.seen:
        problem = watch.seen[0]
    if problem is None and os.fstat(1).st_size > before:
        with open("output", "rb") as output:
            output.seek(before)
            problem = "output", output.read(3000).decode(errors="replace")
    shutil.rmtree(folder)
    left = [path for path in root.rglob("*") if not (path.is_dir() and folder.is_relative_to(path))]
    if problem is None and left:
        problem = "written outside", ", ".join(map(str, left))[:3000]
    shutil.rmtree(root)
    return problem


def _serve(name: str, function: Target, prepare: Callable[[], object], answers: int) -> None:
    """Try the seeds that standard input names, and write what went wrong to the descriptor `answers`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    os.set_inheritable(answers, False)
    root = Path.cwd() / "cases"
    shutil.rmtree(root, ignore_errors=True)  # of a process that was ended
    prepare()
    watch = _Watch()
    home = root / "home"
    os.environ |= {"HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    tempfile.tempdir = None
    os.write(answers, b"ready\n")
    while line := sys.stdin.readline():
        found = _try(function, name, int(line), root, watch)
        os.write(answers, json.dumps(found).encode() + b"\n")


def _main() -> NoReturn:
    name, *rest = sys.argv[1:]
    module, _, function = name.partition(":")
    tests = importlib.import_module(module)
    target, prepare = getattr(tests, function), getattr(tests, "prepare", lambda: None)
    if rest[0] == "--answer-to":
        _serve(name, target, prepare, int(rest[1]))
    else:
        os.chdir(tempfile.mkdtemp(prefix="fuzzing"))
        prepare()
        folder = Path("case").absolute()
        folder.mkdir()
        print(folder, flush=True)
        target(Random(f"{name} {int(rest[0])}"), folder)
    sys.exit(0)


if __name__ == "__main__":
    _main()
