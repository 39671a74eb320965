"""The command line: parses, calls, prints.

Nothing heavy is imported before a command needs it, so that `--help` answers at once. What a user gave
and cannot be used is one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO, cast, get_args

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    from dualfocus.bench.harness import Watch
    from dualfocus.export import Shape
    from dualfocus.runtime import FocusResult
    from dualfocus.runtime.geometry import Box
    from dualfocus.runtime.manifest import Manifest
    from dualfocus.runtime.result import Event

UsageError: type[Any] = typer.BadParameter.__bases__[0]  # of whichever Click typer brings
# standard output is all that is written to without a name
UNWRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


class _Commands(TyperGroup):
    """All commands. A wrong call, and a standard output that takes nothing, is one sentence as all else."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        try:
            status = super().main(*args, **options | {"standalone_mode": False})
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # of Click since 8.2
                print(error.ctx.get_help(), file=sys.stderr)
            else:
                _say(_wrong_call(error))
            status = 2
        except OSError as error:  # of `--help`
            _say_unwritten(error)
            status = 2
        sys.exit(status)


class _Command(TyperCommand):
    """One command. Nothing is empty, and what is looked for on this machine is no URL."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: dict[str, Any] = {}
        try:
            given = self.make_parser(ctx).parse_args(args=list(args))[0]
            param: Any
            for param in self.params:
                value = given.get(param.name)
                if value == "":
                    raise typer.BadParameter("is empty", param=param)
                is_url = isinstance(value, str) and re.match(r"\w[\w+.-]*://", value)
                if is_url and param.name not in ("picture", "checkpoint", "vision_tower", "ray"):
                    raise typer.BadParameter("is a URL, expected a local path", param=param)
            return super().parse_args(ctx, args)
        except UsageError as error:
            error.ctx = error.ctx or ctx
            param = getattr(error, "param", None)
            error.found = given.get(param.name) if param is not None else None
            raise


# plain help texts: laying them out with rich would double the time of `--help`
app = typer.Typer(
    name="dualfocus",
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SPINNER_AFTER = 2.0  # seconds
SHOWN = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PDF")  # that Pillow writes without another library
LONGEST = 2000  # characters of a sentence on stderr: a name in it is as long as who gave it likes

_Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        help="auto (the best that works), cpu, cuda[:N], tensorrt[:N] or tensorrt-rtx[:N].",
    ),
]


def _show_version(requested: bool) -> None:
    if requested:
        from dualfocus import __version__

        print(f"dualfocus {__version__}")
        raise typer.Exit


@app.callback()
def dualfocus(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Ask about a picture twice: as a whole, and zoomed in to where the answer is."""


@app.command(cls=_Command)
def ask(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="A file name, or - for standard input.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="One or more questions.")],
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The model  [default: the built-in one]")
    ] = None,
    mode: Annotated[
        Literal["dual", "macro", "micro"],
        typer.Option(help="dual runs both passes and keeps the better answer; macro and micro run one pass."),
    ] = "dual",
    plain: Annotated[
        bool, typer.Option("--plain", help="Run the reference: every prompt in full, nothing reused.")
    ] = False,
    select: Annotated[
        Literal["reference", "answer"] | None,
        typer.Option(
            help="Tokens that the loss covers: box reply and answer, or answer  [default: the model's]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each question.")] = False,
    show: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Write the picture with its box, crop and answers.")
    ] = None,
    free_box: Annotated[
        bool, typer.Option("--free-box", help="Decode the box without a grammar, as --plain does.")
    ] = False,
    skip_above: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            help="Skip the micro pass if the macro answer's mean token probability exceeds P  "
            "[default: never]",
        ),
    ] = None,
    zooms: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=8, help="Zoom again into a crop that is still large, at most N times."
        ),
    ] = 1,
    cache_mb: Annotated[
        int,
        typer.Option(
            metavar="MB", min=0, max=10**9, help="Memory limit of the prefix cache and of encoded images."
        ),
    ] = 512,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=256, help="Threads of the inference library  [default: one per core]"
        ),
    ] = None,
    spin: Annotated[
        bool,
        typer.Option(
            "--spin/--no-spin",
            help="Threads busy-wait within a call: faster, unless other work needs the cores.",
        ),
    ] = True,
    device: _Device = "auto",
) -> None:
    """Answer questions about a picture."""
    with _errors():
        from dualfocus.runtime import Bundle, DualFocus, Question, Reference, open_picture
        from dualfocus.runtime.bundle import BUILT_IN
        from dualfocus.runtime.errors import InputError, PictureWarning
        from dualfocus.runtime.turns import Turns
        from dualfocus.runtime.zooms import zooms as zooming

        for question in questions:
            Question.parse(question, "")  # what is empty needs no model
        if show is not None:
            _check_show(show, picture, questions)
        if plain and skip_above is not None:
            raise InputError("--plain runs every step, so --skip-above cannot be given with it")
        protocol = None
        if zooms > 1:
            if mode != "dual" or skip_above is not None:
                given = f"--mode {mode}" if mode != "dual" else "--skip-above"
                raise InputError(f"--zooms {zooms} runs both passes, so {given} cannot be given with it")
            protocol = partial(zooming, most=zooms, select=select, free_box=free_box or plain)
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", PictureWarning)
            pixels = open_picture(_standard_input() if picture == "-" else picture, "standard input")
        notes = [str(warning.message) for warning in noted]
        for note in notes:
            _say(note)
        waiting = _Waiting()
        with waiting:
            waiting.say("opening the model")
            model = Bundle.open(bundle or BUILT_IN, device=device, threads=threads, spin=spin)
        for question in questions:  # all of them before the first is answered
            Turns(model.manifest, model.tokenizer, question).check_length(macro_only=mode == "macro")

        if plain:
            reference = Reference(model, select=select, on_stage=waiting.say)

            def answer(question: str) -> FocusResult:
                with waiting:
                    if protocol is not None:
                        return cast("FocusResult", reference.run(pixels, question, protocol))
                    return reference.ask(pixels, question, mode)
        else:
            session = DualFocus(
                model, select=select, free_box=free_box, skip_above=skip_above, slots=2, cache_mb=cache_mb
            ).session(pixels)
            follow = _watch if _watched(sys.stdout) and not as_json else waiting.follow

            def answer(question: str) -> FocusResult:
                events = session.submit(question, protocol) if protocol else session.stream(question, mode)
                return follow(events)

        for question in questions:
            result = answer(question)
            if as_json:
                shown = {
                    **result.to_dict(),
                    "bundle": model.manifest.name,
                    "device": str(model.device),
                    "warnings": notes,  # about the picture
                }
                _print_json(shown)
            else:
                _print_result(result, question if len(questions) > 1 else None, str(model.device))
            if show is not None:
                from dualfocus.runtime.show import annotate

                _save(annotate(pixels, question, result), show)


@app.command(cls=_Command)
def export(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="Folder to write.")],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT", help="Folder of a checkpoint, or its id on the Hugging Face Hub."
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Branch, tag or commit on the Hub  [default: main]"),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Use random weights of this shape, such as edge."),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "int4"],
        typer.Option(
            help="Precision of the weights. int8 is fast and close to fp32, int4 smaller and less close."
        ),
    ] = "fp32",
    target: Annotated[
        Literal["onnxruntime", "onnx-standard", "cuda", "tensorrt"],
        typer.Option(
            help="Runtime of the graphs: ONNX Runtime on a CPU, any runtime of the ONNX standard, "
            "ONNX Runtime on a GPU, or TensorRT."
        ),
    ] = "onnxruntime",
    cache: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(
            help="Type of the KV cache. float16 halves its memory and rounds keys and values  "
            "[default: float32; for a GPU float16]"
        ),
    ] = None,
    coords: Annotated[
        Literal["original", "padded", "model"] | None,
        typer.Option(
            help="Space of the box coordinates: fractions of the picture or of the padded square, or pixels "
            "of what the model sees  [default: original if called DualFocus, else padded]"
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            metavar="TOWER", help="Folder or Hub id of the vision tower, if an original checkpoint lacks it."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted export to BUNDLE.")
    ] = False,
) -> None:
    """Export a checkpoint as a bundle.

    What no other file of a checkpoint says is read from dualfocus.json in its folder: prompts, coordinates,
    box, select, max_new_tokens, fit.
    """
    from dualfocus.export import ExportError, export_bundle, shapes

    with _errors():
        if checkpoint is not None and random is not None:
            raise ExportError("both a CHECKPOINT and --random SHAPE were given, expected one of them")
        for option, given in (("--revision", revision), ("--vision-tower", vision_tower)):
            if random is not None and given is not None:
                raise ExportError(f"{option} was given with --random SHAPE, expected it with a CHECKPOINT")
        source = checkpoint if random is None else shapes.named(random)
        if source is None:
            raise ExportError("nothing to export was given, expected a CHECKPOINT or --random SHAPE")
        from dualfocus.runtime.files import with_parents

        try:
            with _progress() as watch, with_parents(out):
                export_bundle(
                    source,
                    out,
                    precision=precision,
                    target=target,
                    cache=cache,
                    coordinates=coords,
                    vision_tower=vision_tower,
                    revision=revision,
                    resume=resume,
                    watch=watch,
                )
        except KeyboardInterrupt:
            _say(f"interrupted: the same command with --resume goes on with {out}")
            raise


@app.command(cls=_Command)
def curate(
    visual_genome: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of Visual Genome's JSON files, unpacked or .json.zip.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="New folder to write.")],
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Its pictures, or VG_100K and VG_100K_2  [default: in the other DIR]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed for the samples of the contact sheet.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as one JSON object.")] = False,
) -> None:
    """Make training dialogues from Visual Genome's questions and regions."""
    with _errors():
        with _needs_train("curate"):
            from dualfocus.train import dataset
        with _progress() as watch, _cleaning_up():
            statistics = dataset.build(visual_genome, out, images=images, seed=seed, watch=watch)
        if as_json:
            _print_json(statistics)
        else:
            print(f"{out}: {dataset.markdown(statistics)}", flush=True)


@app.command(cls=_Command)
def inspect(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE", help="Folder of a bundle; with --budget also a shape's name, such as llava-7b."
        ),
    ] = None,
    devices: Annotated[
        bool, typer.Option("--devices", help="List the devices of this machine, and what each lacks.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the SHA-256 of every file, packed ones too.")
    ] = False,
    budget: Annotated[
        bool,
        typer.Option(
            "--budget",
            help="Measure opening time and private memory; for a shape, compute the memory.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Describe a bundle, a shape or this machine."""
    with _errors():
        from dualfocus.export import SHAPES
        from dualfocus.runtime import bundle as bundles
        from dualfocus.runtime import packed
        from dualfocus.runtime.errors import InputError

        if devices:
            if bundle is not None or verify or budget:
                raise InputError("--devices is about this machine, expected no BUNDLE, --verify or --budget")
            _print_devices(as_json=as_json)
            return
        if bundle is None:
            raise InputError("nothing to inspect was given, expected a BUNDLE or --devices")
        if str(bundle) in SHAPES and not bundle.exists():
            _inspect_shape(SHAPES[str(bundle)], verify=verify, budget=budget, as_json=as_json)
            return
        manifest, digest = bundles.read_manifest(bundle)
        if verify:
            bundles.verify(bundle, manifest)
        parts: dict[str, int] = {}
        opening = 0.0
        if budget:
            from dualfocus.bench.budget import measure

            parts, opening = measure(bundle)
        if as_json:
            measured = {"budget": parts, "opening_ms": opening} if budget else {}
            _print_json(manifest.to_dict() | measured, indent=2)
        else:
            is_packed = packed.find(bundle, digest) is not None
            _print_manifest(manifest, parts, opening, verified=verify, is_packed=is_packed)


def _inspect_shape(shape: Shape, *, verify: bool, budget: bool, as_json: bool) -> None:
    from dualfocus.runtime.errors import InputError

    if verify or not budget:
        raise InputError(f"{shape.name} is a shape, of which --budget alone can be told; expected a bundle")
    try:
        from dualfocus.bench import boards
    except ModuleNotFoundError as error:
        raise InputError(
            f"--budget of a shape needs {error.name}: pip install 'dualfocus[export,cpu]'"
        ) from None
    _report(boards.report(shape), boards.show, as_json=as_json, save=False)


@app.command(cls=_Command)
def pack(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")],
    device: _Device = "cpu",
) -> None:
    """Prepack weights for this machine, or build TensorRT engines, for faster start-up."""
    with _errors():
        from dualfocus.runtime import bundle as bundles
        from dualfocus.runtime import devices, packed, registry
        from dualfocus.runtime.errors import DeviceError

        manifest, digest = bundles.read_manifest(bundle)
        chosen = registry.choose(devices.parse(device), manifest.target)
        chosen.use()
        if chosen.kind == "cuda":
            raise DeviceError(
                f"for {chosen} there is nothing to pack: ONNX Runtime opens the bundle as it is"
            )
        if chosen.kind == "tensorrt":
            from dualfocus.export.tensorrt import build_engines
            from dualfocus.runtime.tensorrt import LIBRARY, VERSION

            with _progress() as watch:
                folder = build_engines(bundle, index=chosen.index, watch=watch)
            alone = f"{chosen} and {LIBRARY} {VERSION} alone"
        else:
            waiting = _Waiting()
            with waiting, _cleaning_up():
                waiting.say("packing")
                folder = packed.pack(bundle, manifest, digest, chosen)
            alone = "this machine and ONNX Runtime alone"
        size = sum(path.stat().st_size for path in folder.iterdir())
        _console().print(_text(f"{folder}: {size / 1e6:.1f} MB, for {alone}"))


# what measurements have in common
_Limit = Annotated[int, typer.Option(metavar="N", min=1, help="Questions to ask.")]
_Bundle = Annotated[Path | None, typer.Option(metavar="DIR", help="The model  [default: the built-in one]")]
_Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, max=256, help="Threads of the inference library  [default: one per core]"
    ),
]
_Rounds = Annotated[int, typer.Option(metavar="N", min=2, help="Timed rounds.")]
_Spin = Annotated[
    bool,
    typer.Option(
        "--spin/--no-spin", help="Threads busy-wait within a call: faster, unless other work needs the cores."
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Save = Annotated[bool, typer.Option("--save", help="Save the result under bench/results.")]
_Plot = Annotated[Path | None, typer.Option(metavar="OUT", help="Plot the result as OUT.svg or OUT.png.")]


_Benchmark = Literal["textvqa", "gqa-mcq", "seed", "mmbench", "pope", "scenes", "scenes-unseen"]


class _RayCommand(_Command):
    """A command whose `--ray` may stand without its ADDRESS, which typer knows no option for."""

    def _is_address(self, word: str) -> bool:
        return not word.startswith("-") and word not in get_args(_Benchmark)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--ray") + 1 if "--ray" in args else 0
        if at and (at == len(args) or not self._is_address(args[at])):
            args = [*args[:at], "local", *args[at:]]
        return super().parse_args(ctx, args)


@app.command("eval", cls=_RayCommand)
def evaluate(
    benchmark: Annotated[
        _Benchmark,
        typer.Argument(
            metavar="BENCHMARK",
            help="textvqa, gqa-mcq, seed, mmbench or pope; scenes are drawn and held out, scenes-unseen "
            "also have layouts, fonts and photographs that training never saw.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the benchmark's files, as LLaVA's scripts expect them."),
    ] = None,
    mode: Annotated[
        Literal["dual", "macro", "micro"],
        typer.Option(help="dual also scores each pass alone; macro and micro run one pass."),
    ] = "dual",
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Questions to ask  [default: all; 2000 scenes]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="ANSWERS.jsonl",
            help="Answers file to write or continue  [default: BENCHMARK-MODEL-MODE.jsonl; none for scenes]",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Run on a Ray cluster, one engine per GPU or per --threads cores; without ADDRESS on this "
            "machine.",
        ),
    ] = None,
    bundle: _Bundle = None,
    device: _Device = "auto",
    threads: _Threads = None,
    as_json: _Json = False,
    save: _Save = False,
) -> None:
    """Score a benchmark with its official metric."""
    with _errors():
        from dualfocus.bench import accuracy, questions
        from dualfocus.bench.answers import Answers, Line, Run
        from dualfocus.runtime import DualFocus
        from dualfocus.runtime.bundle import BUILT_IN, read_manifest
        from dualfocus.runtime.errors import InputError

        if (data is None) != benchmark.startswith("scenes"):
            needed = "scenes are drawn, expected no" if data else f"{benchmark} is read from files, expected"
            raise InputError(f"{needed} --data DIR")
        manifest, digest = read_manifest(bundle or BUILT_IN)
        run = Run(benchmark, mode, manifest.name, digest[:16])
        if data is not None:
            # the workers of a cluster are in other folders
            asked = questions.read(benchmark, data if ray is None else data.absolute())
            out = out or Path(re.sub(r"[^\w.-]+", "_", f"{benchmark}-{manifest.name}-{mode}") + ".jsonl")
        else:
            with _needs_train("eval scenes"):
                from dualfocus.bench import scenes
            limit = limit or 2000
            begun = len(out.read_bytes().splitlines()) if out is not None and out.is_file() else 0
            asked = scenes.benchmark(max(limit, begun), unseen=benchmark == "scenes-unseen")
        if out is not None:
            _check_writable("--out", out)

        def ask(todo: Sequence[questions.Asked]) -> Iterable[Line]:
            if ray is not None:
                from dualfocus.bench import cluster

                return cluster.ask_all(
                    ray, run, todo, bundle=bundle, device=device, target=manifest.target, threads=threads
                )
            model = DualFocus(bundle or BUILT_IN, device=device, threads=threads)
            return accuracy.ask_all(model, run, todo)

        try:
            with Answers(out, run) as answers, _progress() as watch:
                if answers.lost is not None:
                    _say(answers.lost)
                result = accuracy.run(asked, answers, ask, manifest, limit, threads, watch)
        except KeyboardInterrupt:
            if out is not None:
                _say(f"interrupted: the same command goes on with {out}")
            raise
        _report(result, accuracy.show, as_json=as_json, save=save)


benches = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed.")
app.add_typer(benches, name="bench")


@benches.command("stages", cls=_Command)
def bench_stages(
    bundle: _Bundle = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=2, help="Timed rounds.")] = 20,
    device: _Device = "auto",
    threads: _Threads = None,
    spin: _Spin = True,
    as_json: _Json = False,
    save: _Save = False,
    plot: _Plot = None,
) -> None:
    """Time one question stage by stage: first token, cold start, memory."""
    _bench("stages", bundle, rounds, device, threads, spin, as_json=as_json, save=save, plot=plot)


@benches.command("limits", cls=_Command)
def bench_limits(
    bundle: _Bundle = None,
    rounds: _Rounds = 10,
    device: _Device = "auto",
    threads: _Threads = None,
    spin: _Spin = True,
    as_json: _Json = False,
    save: _Save = False,
    plot: _Plot = None,
) -> None:
    """Compare decode, prefill and vision with the limits of this machine (roofline)."""
    _bench("limits", bundle, rounds, device, threads, spin, as_json=as_json, save=save, plot=plot)


@benches.command("savings", cls=_Command)
def bench_savings(
    bundle: _Bundle = None,
    rounds: _Rounds = 10,
    device: _Device = "auto",
    threads: _Threads = None,
    spin: _Spin = True,
    as_json: _Json = False,
    save: _Save = False,
    plot: _Plot = None,
) -> None:
    """Time a question with each saving added in turn, from the plain protocol on."""
    _bench("savings", bundle, rounds, device, threads, spin, as_json=as_json, save=save, plot=plot)


@benches.command("throughput", cls=_Command)
def bench_throughput(
    bundle: _Bundle = None,
    rounds: _Rounds = 10,
    device: _Device = "auto",
    threads: _Threads = None,
    spin: _Spin = True,
    as_json: _Json = False,
    save: _Save = False,
    plot: _Plot = None,
) -> None:
    """Time several questions in flight: questions per second, TTFT, latency."""
    _bench("throughput", bundle, rounds, device, threads, spin, as_json=as_json, save=save, plot=plot)


@benches.command("gate", cls=_Command)
def bench_gate(
    limit: _Limit = 2000,
    bundle: _Bundle = None,
    device: _Device = "auto",
    threads: _Threads = None,
    spin: _Spin = True,
    as_json: _Json = False,
    save: _Save = False,
    plot: _Plot = None,
) -> None:
    """Trade accuracy against latency with `ask --skip-above`, on held-out drawn scenes."""
    _bench("gate", bundle, limit, device, threads, spin, as_json=as_json, save=save, plot=plot)


@benches.command("rules", cls=_Command)
def bench_rules(
    limit: _Limit = 2000,
    bundle: _Bundle = None,
    device: _Device = "auto",
    threads: _Threads = None,
    spin: _Spin = True,
    as_json: _Json = False,
    save: _Save = False,
    plot: _Plot = None,
) -> None:
    """Compare the rules that choose between both answers, on held-out drawn scenes."""
    _bench("rules", bundle, limit, device, threads, spin, as_json=as_json, save=save, plot=plot)


def _bench(
    name: str,
    bundle: Path | None,
    amount: int,
    device: str,
    threads: int | None,
    spin: bool,
    *,
    as_json: bool,
    save: bool,
    plot: Path | None,
) -> None:
    """Run the benchmark `name` on a bundle: `amount` is of rounds or questions."""
    with _errors():
        from importlib import import_module

        from dualfocus.runtime import Bundle
        from dualfocus.runtime.bundle import BUILT_IN
        from dualfocus.runtime.files import naming

        _check_plot(plot)
        with _needs_train(f"bench {name}"):
            module = import_module(f"dualfocus.bench.{name}")
        model = Bundle.open(bundle or BUILT_IN, device=device, threads=threads, spin=spin)
        with _progress() as watch:
            result = module.run(model, amount, threads, watch, spin=spin)
        _report(result, module.show, as_json=as_json, save=save)
        if plot is not None:
            with naming(plot):
                module.plot(result, plot)


@benches.command("compare", cls=_Command)
def bench_compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="A saved result.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="A later result of the same benchmark.")],
    as_json: _Json = False,
) -> None:
    """Compare two saved results."""
    with _errors():
        from dualfocus.bench import compare

        result = compare.run(compare.read(old), compare.read(new))
        _report(result, compare.show, as_json=as_json, save=False)


@benches.command("crop", cls=_Command)
def bench_crop(
    rounds: Annotated[int, typer.Option(metavar="N", min=2, help="Timed rounds.")] = 21,
    as_json: _Json = False,
    save: _Save = False,
) -> None:
    """Time the crop kernel against Pillow and NumPy, on one thread."""
    with _errors():
        from dualfocus.bench import crop

        with _progress() as watch:
            result = crop.run(rounds, watch)
        _report(result, crop.show, as_json=as_json, save=save)


@benches.command("peers", cls=_Command)
def bench_peers(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face LLaVA checkpoint."),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Use random weights of this shape, such as edge."),
    ] = None,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder that keeps the model files of the other runtimes.")
    ] = Path("build/peers"),
    rounds: Annotated[
        int,
        typer.Option(metavar="N", min=2, help="Timed rounds; a third as many for whole questions."),
    ] = 9,
    precision: Annotated[
        Literal["fp32", "bf16", "int8", "int4"] | None,
        typer.Option(help="Run one precision  [default: all]"),
    ] = None,
    questions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Held-out questions for nano's quality rows.")
    ] = 200,
    threads: _Threads = None,
    as_json: _Json = False,
    save: _Save = False,
    plot: _Plot = None,
) -> None:
    """Run the same weights and questions in other runtimes, interleaved."""
    from dualfocus.export import shapes

    with _errors():
        from dualfocus.runtime.errors import InputError
        from dualfocus.runtime.files import naming

        _check_plot(plot)
        with _needs_train("bench peers"):
            import dualfocus.bench.peers.work  # noqa: F401  draws a scene
            from dualfocus.bench import peers
            from dualfocus.bench.peers.base import PRECISIONS
        if (checkpoint is None) == (random is None):
            raise InputError("bench peers: expected a CHECKPOINT or --random SHAPE, one of them")
        source = checkpoint if random is None else shapes.named(random)
        assert source is not None
        with _progress() as watch, naming(folder):
            result = peers.run(
                source, folder, rounds, threads, (precision,) if precision else PRECISIONS, questions, watch
            )
        _report(result, peers.show, as_json=as_json, save=save)
        if plot is not None:
            with naming(plot):
                peers.plot(result, plot)


@benches.command("export", cls=_Command)
def bench_export(
    random: Annotated[str, typer.Option(metavar="SHAPE", help="Shape of the random weights.")] = "llava-7b",
    layout: Annotated[
        Literal["original", "huggingface"], typer.Option(help="File layout of the checkpoint.")
    ] = "original",
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "int4"], typer.Option(help="Precision of the bundle.")
    ] = "int4",
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the checkpoint and the bundle; both stay.")
    ] = Path("build/export"),
    threads: _Threads = None,
    as_json: _Json = False,
    save: _Save = False,
) -> None:
    """Measure time, memory and disk of exporting and starting a model larger than memory."""
    from dualfocus.export import shapes

    with _errors():
        with _needs_train("bench export"):
            from dualfocus.bench import export as bench
        from dualfocus.runtime.files import naming

        with _progress() as watch, naming(folder):
            result = bench.run(shapes.named(random), folder, layout, precision, threads, watch)
        _report(result, bench.show, as_json=as_json, save=save)


@benches.command("curate", cls=_Command)
def bench_curate(
    pictures: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Pictures of the synthetic data set; Visual Genome has 108,077."
        ),
    ] = 100_000,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for 5 GB of temporary files  [default: the system's]"),
    ] = None,
    as_json: _Json = False,
    save: _Save = False,
) -> None:
    """Measure time and memory of curating a synthetic Visual Genome of full size."""
    with _errors():
        with _needs_train("bench curate"):
            from dualfocus.bench import curate as bench
        with _progress() as watch, _cleaning_up():
            result = bench.run(pictures, folder, watch)
        _report(result, bench.show, as_json=as_json, save=save)


@contextmanager
def _needs_train(command: str) -> Iterator[None]:
    """Around imports of what the extra `train` installs."""
    from dualfocus.runtime.errors import InputError

    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{command} needs {error.name}: pip install 'dualfocus[cpu,train]'") from None


@contextmanager
def _progress() -> Iterator[Watch]:
    """A bar on a terminal, for what benchmarks tell of their progress."""
    from rich.progress import Progress

    bar = Progress(console=_stderr(), transient=True, disable=not _watched(sys.stderr))
    task = bar.add_task("", total=None)

    def watch(doing: str, done: int, total: int) -> None:
        bar.start()  # not before: there may be other bars until then
        bar.update(task, description=doing, completed=done, total=total)

    try:
        yield watch
    finally:
        bar.stop()


def _report(
    result: dict[str, Any], show: Callable[[dict[str, Any], Console], None], *, as_json: bool, save: bool
) -> None:
    if as_json:
        _print_json(result)
    else:
        show(result, _console())
    if save:
        from dualfocus.bench import harness

        harness.save(result)


def _check_plot(path: Path | None) -> None:
    """Refuse before anything is measured what could not be drawn afterwards."""
    from dualfocus.runtime.errors import InputError

    if path is None:
        return
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"--plot {path}: {path.suffix or 'no suffix'}, expected .svg or .png")
    _check_writable("--plot", path)
    with _needs_train("--plot"):
        import matplotlib  # noqa: F401


def _watched(stream: TextIO | None) -> bool:
    """A person sees what is written there; a closed stream is None."""
    return stream is not None and stream.isatty()


@contextmanager
def _errors() -> Iterator[None]:
    """What a user gave, or this machine has, and cannot be used ends the command with one sentence.

    What libraries would print as well is not shown.
    """
    from dualfocus.runtime.errors import InputError, PictureWarning
    from dualfocus.runtime.libraries import quiet

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model says what not every terminal's encoding has
    try:
        with quiet():
            warnings.simplefilter("default", PictureWarning)
            yield
            if sys.stdout is not None:
                sys.stdout.flush()  # while what fails is still a sentence
    except InputError as error:
        _refuse(error)
    except MemoryError:
        _refuse("there is not enough memory for this model and this picture")
    except BrokenPipeError:  # a reader that left has heard enough; typer ends quietly
        raise
    except OSError as error:
        _say_unwritten(error)
        raise typer.Exit(2) from None


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what is done as Ctrl-C does, which removes what is unfinished."""

    def end(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _refuse(reason: object) -> NoReturn:
    _say(reason)
    raise typer.Exit(2) from None


def _say(reason: object) -> None:
    sentence = _line(str(reason))
    if len(sentence) > LONGEST:
        sentence = f"{sentence[:LONGEST]} …"
    with suppress(OSError):  # there is nowhere else to say it
        typer.echo(f"dualfocus: {sentence}", err=True)


def _say_unwritten(error: OSError) -> None:
    """Say what the system refused, and of which file."""
    place = error.filename
    if place is None and error.errno in UNWRITTEN:
        place = "standard output"
        stream = sys.__stdout__
        if stream is not None and sys.stdout is stream:  # Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    _say(f"{f'{place}: ' if place is not None else ''}{error.strerror or error}")


def _wrong_call(error: Any) -> str:
    """Click's message as a clause, and where more is said."""
    path = error.ctx.command_path if error.ctx is not None else "dualfocus"
    found = getattr(error, "found", None)
    if found is not None:
        is_option = error.param.param_type_name == "option"
        name = max(error.param.opts, key=len) if is_option else error.param.metavar
        why = error.message.rstrip(".").removeprefix("Value error, ").removeprefix(f"{found!r} ")
        reason = f"{name} {found!r} {why.replace('Input should', 'should')}"
    else:
        reason = error.format_message().replace(". Choose from:", ", expected").replace(". Did", ", did")
        reason = reason[:1].lower() + reason[1:].rstrip(".?")
    return f"{reason}; `{path} --help` says more"


def _print_json(value: object, indent: int | None = None) -> None:
    from dualfocus.runtime.files import to_json

    print(to_json(value, indent), flush=True)  # in ASCII, which every stdout can take


def _standard_input() -> bytes:
    from dualfocus.runtime.errors import PictureError
    from dualfocus.runtime.image import FILE_LIMIT

    if sys.stdin is None:
        raise PictureError("standard input is closed, expected a picture")
    return sys.stdin.buffer.read(FILE_LIMIT + 1)


class _Waiting:
    """Says on a terminal what is being done, once it takes longer than `SPINNER_AFTER`."""

    def __init__(self) -> None:
        self._status: Status | None = None
        if _watched(sys.stderr):
            self._status = _stderr().status("")

    def say(self, stage: str) -> None:
        if self._status is not None:
            self._status.update(stage.replace("_", " "))

    def follow(self, events: Iterable[Event]) -> FocusResult:
        """Say the stages of an answer as they come; returns what comes last, its result."""
        from dualfocus.runtime import Stage

        with self:
            for event in events:
                if isinstance(event, Stage):
                    self.say(event.name)
        return _result(event)

    def __enter__(self) -> None:
        if self._status is not None:
            self._timer = threading.Timer(SPINNER_AFTER, self._status.start)
            self._timer.daemon = True
            self._timer.start()

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._timer.cancel()
            self._timer.join()
            self._status.stop()


def _watch(events: Iterable[Event]) -> FocusResult:
    """Show an answer on the terminal while it comes about: the macro answer, the region, the micro answer."""
    from rich.live import Live
    from rich.table import Table

    from dualfocus.runtime import Region, ReplyToken, Stage

    lines: dict[str, str] = {}
    stage = ""
    with Live(console=_console(), transient=True) as live:
        for event in events:
            match event:
                case Stage(name):
                    stage = name.replace("_", " ")
                case ReplyToken("macro" | "micro" as reply, _, text):
                    lines[reply] = lines.get(reply, "") + text
                case Region(box, _, problem):
                    lines["region"] = problem or _corners(cast("Box", box))
            rows = Table.grid(padding=(0, 2))
            for name, line in lines.items():
                rows.add_row(name, _text(line))
            rows.add_row(_text(stage, "dim"), "")
            live.update(rows)
    return _result(event)


def _result(event: Event) -> FocusResult:
    """The last event of a stream."""
    from dualfocus.runtime import FocusResult

    assert isinstance(event, FocusResult)
    return event


def _check_show(path: Path, picture: str, questions: list[str]) -> None:
    """Refuse before anything is computed what could not be written afterwards."""
    from PIL import Image

    from dualfocus.runtime.errors import InputError

    if len(questions) > 1:
        raise InputError(f"--show draws one answer, {len(questions)} questions were given")
    if Image.registered_extensions().get(path.suffix.lower()) not in SHOWN:
        raise InputError(
            f"--show {path}: {path.suffix or 'no suffix'} names no picture format, expected .png"
        )
    _check_writable("--show", path)
    if os.path.exists(path) and os.path.exists(picture) and os.path.samefile(path, picture):
        raise InputError(f"--show {path}: is the picture itself, which would be lost")


def _check_writable(option: str, path: Path) -> None:
    from dualfocus.runtime.errors import InputError

    if not os.path.isdir(path.parent):  # unlike Path.is_dir, it raises nothing
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
    exists = os.path.exists(path)
    if exists and not os.path.isfile(path):
        raise InputError(f"{option} {path}: is not a regular file")
    if not all(os.access(p, os.W_OK) for p in [path.parent, path][: 1 + exists]):
        raise InputError(f"{option} {path}: cannot be written")


def _save(image: PillowImage, path: Path) -> None:
    """Write `image` to `path`: all of it, or nothing."""
    from PIL import Image

    from dualfocus.runtime.errors import InputError

    unfinished = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        # a new file: never through a link that somebody put there
        with os.fdopen(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b") as file:
            image.save(file, Image.registered_extensions()[path.suffix.lower()])
        unfinished.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a format that knows no such picture
        raise InputError(f"--show {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _print_result(result: FocusResult, question: str | None, device: str) -> None:
    """`question` is printed where several were asked."""
    from rich.table import Table

    rows = Table.grid(padding=(0, 2))
    for name, answer in (("macro", result.macro), ("micro", result.micro)):
        if answer is not None:
            chosen = name == result.chosen
            loss = "" if answer.loss is None else f"loss {answer.loss:.3f}"
            rows.add_row(name, _text(answer.text, "bold" if chosen else ""), _text(loss, "dim"), "←" * chosen)
        if name == "macro" and result.box is not None:
            zoom = "" if result.crop is None else f"zoomed to {list(result.crop)}"
            rows.add_row("region", _text(_corners(result.box)), _text(zoom, "dim"))
    counters, times = result.counters, dict(result.times_ms)
    total = times.pop("total")
    times.pop("queue", None)  # nothing else was asked
    stages = ", ".join(f"{stage.replace('_', ' ')} {ms:.0f}" for stage, ms in times.items())
    steps = f"{counters.decode_steps} decode steps"
    if counters.decode_rows > counters.decode_steps:
        steps += f" for {counters.decode_rows / counters.decode_steps:.1f} rows each"
    work = (
        f"{counters.vision_encodes} images encoded, {counters.tokens_prefilled} tokens prefilled, "
        f"{counters.tokens_reused} reused; {steps}, {counters.tokens_forced} tokens forced, "
        f"{counters.tokens_accepted} of {counters.tokens_drafted} drafted ones taken"
    )
    console = _console()
    if question is not None:
        console.print(_text(question, "dim"))
    console.print(_text(result.answer, "bold green"))
    if result.fallback:
        console.print(_text(f"no micro answer: {result.fallback}", "yellow"))
    if result.skipped:
        console.print(_text("sure enough of the macro answer not to look closer", "yellow"))
    console.print(rows)
    console.print(_text(f"{total:.0f} ms: {stages}; on {device}", "dim"))
    console.print(_text(work, "dim"))


def _corners(box: Box) -> str:
    return f"[{', '.join(f'{side:.0f}' for side in box.corners)}]"


def _print_manifest(
    manifest: Manifest, budget: dict[str, int], opening: float, *, verified: bool, is_packed: bool
) -> None:
    from rich.table import Table

    image, decoder = manifest.image, manifest.decoder
    size = sum(entry.size for entry in manifest.files.values())
    facts = {
        "name": manifest.name,
        "made by": f"{manifest.created_by}, bundle format {manifest.format_version}",
        **manifest.source,
        "precision": f"weights of {manifest.precision}",
        "target": manifest.target,
        "image": f"{image.size} x {image.size}, {image.tokens} tokens, fitted by {image.fit}",
        "decoder": (
            f"{decoder.layers} layers of {decoder.hidden}, {decoder.heads} heads of {decoder.head_size}, "
            f"{decoder.kv_heads} KV heads, KV cache of {decoder.dtype}"
        ),
        "vocabulary": f"{decoder.vocabulary} tokens",
        "context": f"{decoder.context} tokens, replies of at most {manifest.max_new_tokens}",
        "box": f"coordinates of the {manifest.coordinates} picture",
        "selection": manifest.select,
        "files": f"{len(manifest.files)} files, {size / 1e6:.1f} MB"
        + (", SHA-256 verified" if verified else "")
        + (", packed for this machine" if is_packed else ""),
        **{f"memory: {part}": f"{size / 1e6:.1f} MB" for part, size in budget.items()},
        **({"opening": f"{opening:.0f} ms, files in the system's cache"} if budget else {}),
    }
    rows = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        rows.add_row(_text(name.replace("_", " "), "dim"), _text(fact))
    _console().print(rows)


def _print_devices(*, as_json: bool) -> None:
    from rich.table import Table

    from dualfocus.runtime.registry import survey

    found = survey()
    if as_json:
        _print_json(found, indent=2)
        return
    rows = Table.grid(padding=(0, 2))
    for kind, why in found["devices"].items():
        rows.add_row(_text(kind), _text("works here" if why is None else f"does not work here: {why}"))
        rows.add_row("", _text(found["seen"][kind], "dim"))
    for gpu in found["gpus"]:
        told = f"{gpu['name']}, compute capability {gpu['compute_capability']}"
        rows.add_row(_text(f"GPU {gpu['index']}"), _text(f"{told}, {gpu['memory'] / 1e9:.1f} GB"))
    for name, version in found["versions"].items():
        rows.add_row(_text(name, "dim"), _text(version))
    _console().print(rows)


def _line(text: str) -> str:
    """`text` as one line; what a terminal would obey, a model or a file can say too, so that is replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def _text(text: str, style: str = "") -> Text:
    """One line of text for rich."""
    from rich.text import Text

    return Text(_line(text), style)


def _console() -> Console:
    """Standard output; as wide as it takes where no terminal limits it."""
    from rich.console import Console

    return Console(highlight=False) if _watched(sys.stdout) else Console(highlight=False, width=1000)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def main() -> None:
    """The entry point of `dualfocus`."""
    warnings.formatwarning = lambda message, *_, **__: f"dualfocus: {_line(str(message))}\n"
    app(prog_name="dualfocus")


if __name__ == "__main__":
    main()
