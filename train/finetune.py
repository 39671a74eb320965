"""Fine-tunes a LLaVA-type checkpoint on curated dialogues, mixed with LLaVA's own data.

    accelerate launch -m dualfocus.train.finetune CHECKPOINT --dialogues FILE.json --images DIR \\
        --mix llava.json --mix-images DIR -o OUT

or with `python -m` in one process. DDP, which `accelerate launch` chooses for several GPUs, keeps the model,
its gradients and AdamW's moments on each: 16 bytes a parameter. For 7 B of them it takes ``accelerate launch
--use_fsdp --fsdp_version 2``, which shares them out, or --lora.

Files are as `train.samples` reads them, checkpoints as `dualfocus export` does. Without options it is
LLaVA-1.5's recipe: projector and language model learn, the vision tower does not; one epoch of AdamW in
batches of 128 samples, 2e-5 at the peak after 3 % of the way and then a cosine to zero; 2,048 tokens, what is
longer is cut. With --lora, its recipe for LoRA.

OUT is a Hugging Face checkpoint, complete or not there at all, for `dualfocus export OUT -o BUNDLE`. Its
weights have the types of CHECKPOINT's, and `curve.jsonl` beside them is the run's curve. Until then the run
is in .OUT.partial, from where --resume goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from accelerate.utils.environment import parse_flag_from_env
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as computed_again
from torch.utils.data import DataLoader
from transformers import GenerationConfig, LlavaForConditionalGeneration

from dualfocus.export import checkpoint as checkpoints
from dualfocus.export import config, hub
from dualfocus.export.checkpoint import EMBEDDINGS, Checkpoint
from dualfocus.export.source import check_folder, check_given
from dualfocus.runtime import files
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.manifest import Manifest
from dualfocus.train import loop, samples
from dualfocus.train.dataset import check_new
from dualfocus.train.loop import Curve, Step
from dualfocus.train.samples import IGNORED, Part, Rows, Sample

RATE = 2e-5
# LLaVA-1.5's LoRA, on every linear layer of the language model; the projector learns whole, at RATE
LORA_RATE, RANK, ALPHA, DROPOUT = 2e-4, 128, 256, 0.05
LORA_LAYERS = r"model\.language_model\.layers\..*_proj"
BIG = 10**9  # parameters, from which on activations are computed again for the backward pass
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
LABELS = 4096  # whose logits exist at a time: of 16 rows' and Qwen2's words they would be tens of GB
PATIENCE = timedelta(hours=6)  # of processes, while one downloads or writes
COPIED = ("token", "special", "added", "vocab", "merges", "chat")  # the tokenizer's files begin so


class Losses(nn.Module):
    """A LLaVA whose forward pass is the loss of a `Part`: the sum over its labels, in nats."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model.model.language_model._no_split_modules  # what FSDP gathers at a time

    def tie_weights(self) -> None:
        """For FSDP, which moves parameters one by one."""
        self.model.tie_weights()

    def train(self, mode: bool = True) -> Losses:
        """The frozen tower stays as it is at inference: nano's has batch norms."""
        super().train(mode)
        self.model.model.vision_tower.eval()
        return self

    def forward(self, ids: Tensor, places: Tensor, labels: Tensor, pixels: Tensor) -> Tensor:
        model = self.model.model
        images = torch.cat(model.get_image_features(pixel_values=pixels))
        embeds = model.get_input_embeddings()(ids)
        # by place and not by order: of a row that was cut, an image's last tokens may be missing
        shown = images[places.clamp(min=0)].to(embeds.dtype)
        embeds = torch.where((places >= 0)[..., None], shown, embeds)
        # what is padded is behind everything else, so that causal attention hides it
        states = model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        parts = zip(states[wanted].split(LABELS), targets[wanted].split(LABELS), strict=True)
        sums = [computed_again(self._nll, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum()

    def _nll(self, states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model.lm_head(states).float(), targets, reduction="sum")


def prepare(checkpoint: Checkpoint, *, lora: bool, half: bool) -> tuple[Losses, list[dict[str, Any]]]:
    """The model that learns, float32, and the optimiser's groups of what does.

    With `half`, matrices that do not learn are bfloat16, as which all but the embeddings, whose rows are
    rounded so, are computed with anyway.
    """
    model = checkpoint.model
    model.requires_grad_(not lora)
    if lora:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=LORA_LAYERS)
        inject_adapter_in_model(config, model)
    adapters = [parameter for parameter in model.parameters() if lora and parameter.requires_grad]
    model.model.multi_modal_projector.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    if sum(parameter.numel() for parameter in model.parameters()) >= BIG:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters() if half else ():
        if not parameter.requires_grad and parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
    if lora:
        groups = [{"params": adapters, "lr": LORA_RATE}]
        groups.append({"params": [*model.model.multi_modal_projector.parameters()], "lr": RATE})
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": RATE}]
    return Losses(model), groups


def tuned(checkpoint: Checkpoint, state: Mapping[str, Tensor], trained: set[str]) -> dict[str, Tensor]:
    """All weights, of the types they are stored in: of `state` what was `trained`, LoRA's merged.

    The rest is read again, so that it is what it was to the bit.
    """
    weights = {}
    for name in checkpoint.names:
        path = name.removesuffix(".weight")
        down, up = (f"{path}.lora_{part}.default.weight" for part in "AB")
        if down in trained:
            change = state[up].float() @ state[down].float() * (ALPHA / RANK)
            tensor = checkpoint.weights.read(name) + change.cpu()
        else:
            tensor = state[name].cpu() if name in trained else checkpoint.weights.read(name)
        weights[name] = tensor.to(DTYPES[checkpoint.weights.dtypes[name]])
    return weights


def save_checkpoint(
    checkpoint: Checkpoint, source: Path, manifest: Manifest, weights: dict[str, Tensor], folder: Path
) -> None:
    """Write a Hugging Face checkpoint into the new `folder`, with tokenizer and template of `source`'s."""
    skeleton = checkpoint.skeleton.to(weights[EMBEDDINGS].dtype)  # which config.json tells
    for part in (skeleton.config.text_config, skeleton.config.vision_config):
        part.dtype = skeleton.dtype
    skeleton.generation_config = GenerationConfig(
        bos_token_id=manifest.tokens.bos, eos_token_id=list(manifest.tokens.eos)
    )
    skeleton.save_pretrained(folder, state_dict=weights)
    for name in hub.SMALL:
        if name.startswith(COPIED) and (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    written = {"preprocessor_config.json": config.fields(checkpoint.preprocessor)}
    if manifest.image.fit == "pad":  # transformers' CLIP processor would not, whatever it is told
        written["preprocessor_config.json"] |= {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    if (source / "processor_config.json").exists():
        processor = config.read(source / "processor_config.json", dict[str, Any])
        processor.pop("image_processor", None)  # since transformers 5; here it has a file of its own
        written["processor_config.json"] = processor
    written["dualfocus.json"] = {
        "prompts": dataclasses.asdict(manifest.prompts),
        "coordinates": manifest.coordinates,
        "box": None if manifest.box is None else dataclasses.asdict(manifest.box),
        "select": manifest.select,
        "max_new_tokens": manifest.max_new_tokens,
        "fit": manifest.image.fit,
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():  # safetensors keeps its files for their owner
        path.chmod((folder / "dualfocus.json").stat().st_mode)


def split(total: int, processes: int, most: int) -> tuple[int, int]:
    """A batch of `total` samples on `processes`: at most `most` rows at once, and how often."""
    if total % processes:
        raise InputError(f"--batch is {total}, expected a multiple of the {processes} processes")
    share = total // processes
    rows = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    return rows, share // rows


class Run:
    """One fine-tuning, from its arguments to OUT."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises InputError where something given cannot be used."""
        arguments.out = out = arguments.out.resolve()
        self.arguments = arguments
        self.folder = out.parent / f".{out.name}.partial"
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
        self.rows, self.parts = split(arguments.batch, state.num_processes, arguments.per_device)
        self.accelerator = _accelerator(self.parts, half=arguments.precision == "bf16")
        self.main = self.accelerator.is_main_process
        _check_out(out, self.folder, arguments.resume)
        with self.accelerator.main_process_first():  # where it is downloaded
            check_given(arguments.checkpoint)
            self.source = hub.fetch(arguments.checkpoint, check=check_folder)[0]
        self.checkpoint = checkpoints.load(self.source, out.name, arguments.vision_tower)
        # A checkpoint becomes a DualFocus one here: other than stock LLaVA's, its boxes are of the picture.
        coordinates = (self.checkpoint.declared or {}).get("coordinates", "original")
        manifest = checkpoints.describe(self.checkpoint, ragged_append=True, coordinates=coordinates)
        if manifest.image.fit == "crop" and "fit" not in (self.checkpoint.declared or {}):
            # a box may lie outside of a centre crop, and LLaVA-1.5 was trained on padded pictures
            self.say("pictures are padded to a square where the checkpoint's processor crops their centre")
            manifest = dataclasses.replace(manifest, image=dataclasses.replace(manifest.image, fit="pad"))
        self.manifest = manifest
        if coordinates == "model":
            raise InputError("the checkpoint's boxes are pixels of the model's input, expected fractions")
        self.learned, self.held_out = self._read()
        tokens = self.manifest.image.tokens
        self.lengths = [sample.length(tokens) for sample in self.learned]
        self.batches = [
            batch
            for epoch in range(arguments.epochs)
            for batch in samples.batches(self.learned, arguments.batch, f"{arguments.seed}/{epoch}")
        ]
        if len(self.batches) == 1:
            raise InputError(
                f"{len(self.learned)} samples make 1 step, whose learning rate is zero: "
                "expected a smaller --batch, or more --epochs"
            )

    def _read(self) -> tuple[list[Sample], list[Sample]]:
        """Samples to learn from and to hold out."""
        arguments = self.arguments
        files = [(arguments.dialogues, arguments.images)]
        if arguments.mix is not None:
            files.append((arguments.mix, arguments.mix_images or arguments.images))
        kept: list[Sample] = []
        for file, pictures in files:
            found, dropped = samples.read(file, pictures)
            why = "".join(f", dropped {number:,}: {reason}" for reason, number in sorted(dropped.items()))
            self.say(f"{file}: {len(found):,} samples{why}")
            if not found:
                raise InputError(f"{file} leaves no sample{why}")
            kept += found
        if len(kept) <= arguments.hold_out:
            raise InputError(
                f"{arguments.dialogues} leaves {len(kept)} usable samples, expected more than "
                f"the {arguments.hold_out} to hold out"
            )
        out = set(random.Random(f"{arguments.seed}/held out").sample(range(len(kept)), arguments.hold_out))
        return [s for i, s in enumerate(kept) if i not in out], [kept[i] for i in sorted(out)]

    def say(self, text: str) -> None:
        """One line on stderr, from one process."""
        if self.main:
            print(text, file=sys.stderr, flush=True)

    def settings(self) -> dict[str, Any]:
        """What a run to be resumed must have in common with this one."""
        of = ("batch", "length", "epochs", "lr", "lora", "precision", "seed", "hold_out")
        data = hashlib.sha256()
        for sample in self.learned:
            data.update(repr(sample).encode())
        return {
            "CHECKPOINT": _digest(self.checkpoint.weights.identity),
            "what the checkpoint declares": _digest(repr(self.manifest)),
            "tokenizer": _digest(self.checkpoint.tokenizer.to_str()),
            "samples": data.hexdigest(),
            "number of processes": self.accelerator.num_processes,
        } | {f"--{name.replace('_', '-')}": getattr(self.arguments, name) for name in of}

    def run(self) -> None:
        """Train, evaluate and save."""
        arguments, accelerator = self.arguments, self.accelerator
        torch.manual_seed(arguments.seed)
        half = arguments.lora and arguments.precision == "bf16"
        # FSDP shards what is of one type
        half = half and accelerator.distributed_type != DistributedType.FSDP
        losses, groups = prepare(self.checkpoint, lora=arguments.lora, half=half)
        trained = {name for name, p in losses.model.named_parameters() if p.requires_grad}
        if arguments.lr is not None:
            groups[0]["lr"] = arguments.lr
        for group in groups:
            group["initial_lr"] = group["lr"]  # `fit`'s peak, which a resumed state of FSDP would not bring
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        model, optimizer = accelerator.prepare(losses, optimizer)
        accelerator.register_save_state_pre_hook(loop.leave_out_frozen)
        torch.manual_seed(arguments.seed + accelerator.process_index)  # for LoRA's dropout
        self._begin()
        done, counts = loop.load_state(accelerator, self.folder)
        if done:
            self.say(f"going on behind step {done} of {len(self.batches)}")
        model.train()

        def loss(part: tuple[Part, float]) -> tuple[Tensor, Mapping[str, float]]:
            return _loss(model, part[0], accelerator.device) * part[1], {}

        def save(done: int, counts: Mapping[str, int]) -> None:
            loop.save_state(accelerator, self.folder, done, counts)

        path = self.folder / "curve.jsonl"
        if self.main:
            _cut_curve(path, done)
        with Curve(path if self.main else None, counts) as curve:
            loop.fit(
                accelerator,
                [model],
                optimizer,
                loop.by_steps(len(self.batches)),
                self._steps(done),
                loss,
                curve,
                save,
                done=done,
                save_every=arguments.save_every,
            )
            for name in ("cut", "unusable"):
                if number := curve.counts[name]:
                    self.say(f"{number:,} of {curve.counts['samples']:,} samples were {name}")
            if self.held_out:
                mean = self._evaluate(model, curve)
                self.say(f"held-out loss {mean:.4f} on {len(self.held_out)} samples")
                curve.write({"held_out": len(self.held_out), "held_out_loss": mean})
        state = accelerator.get_state_dict(model)
        if self.main:
            self._finish({name.removeprefix("model."): tensor for name, tensor in state.items()}, trained)
        accelerator.wait_for_everyone()
        accelerator.end_training()

    def _begin(self) -> None:
        """Make the run's folder, or see that the one there is of such a run."""
        file, settings = self.folder / "run.json", self.settings()
        if file.exists():
            for name, value in files.read_json(file, dict[str, Any], InputError).items():
                if (now := settings.get(name)) != value:
                    raise InputError(
                        f"{self.folder} was begun with {name} {value!r:.12}, "
                        f"expected the same, got {now!r:.12}"
                    )
        self.accelerator.wait_for_everyone()
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(".new")
            aside.write_text(json.dumps(settings, indent=2))
            aside.replace(file)
        self.accelerator.wait_for_everyone()

    def _loader(self, of: Sequence[Sample], parts: list[list[int]]) -> DataLoader[Part]:
        rows = Rows(
            of,
            self.manifest,
            self.checkpoint.tokenizer,
            min(self.arguments.length, self.manifest.decoder.context),
        )
        return DataLoader(
            rows,
            batch_sampler=parts,
            collate_fn=rows.collate,
            num_workers=self.arguments.workers,
            generator=torch.Generator(),  # else it draws from the one that dropout does
        )

    def _steps(self, done: int) -> Iterator[Step]:
        """This process's share of every step behind step `done`."""
        accelerator = self.accelerator
        place = self.parts, accelerator.process_index, accelerator.num_processes
        dealt = [samples.deal(b, self.lengths, self.rows, *place) for b in self.batches[done:]]
        parts = iter(self._loader(self.learned, [part for step in dealt for part in step]))
        names = ("samples", "tokens", "targets", "cut", "unusable")
        for _ in dealt:
            step = list(islice(parts, self.parts))
            own = torch.tensor([[part.counts[name] for name in names] for part in step]).sum(0)
            every = accelerator.reduce(own.to(accelerator.device), "sum").tolist()
            counts = dict(zip(names, every, strict=True))
            # every label of the batch counts alike, wherever it is
            weight = len(step) * accelerator.num_processes / max(1, counts["targets"])
            yield Step([(part, weight) for part in step], counts)

    def _evaluate(self, model: nn.Module, curve: Curve) -> float:
        """The held-out samples' mean loss a label."""
        accelerator = self.accelerator
        every = range(len(self.held_out))
        cut = [list(every[at : at + self.rows]) for at in range(0, len(every), self.rows)]
        cut += [[] for _ in range(-len(cut) % accelerator.num_processes)]  # all run as many
        total = torch.zeros(2, device=accelerator.device)
        model.eval()
        with torch.no_grad(), accelerator.autocast():
            own_parts = cut[accelerator.process_index :: accelerator.num_processes]
            for i, part in enumerate(self._loader(self.held_out, own_parts)):
                curve.show("held out", i / len(own_parts))
                loss = _loss(model, part, accelerator.device)
                total += torch.stack([loss, loss.new_tensor(part.counts["targets"])])
        summed, labels = accelerator.reduce(total, "sum").tolist()
        return float(summed / max(1.0, labels))

    def _finish(self, state: Mapping[str, Tensor], trained: set[str]) -> None:
        """Write OUT, aside first."""
        aside = self.folder / "checkpoint"
        shutil.rmtree(aside, ignore_errors=True)
        weights = tuned(self.checkpoint, state, trained)
        with loop.writing(aside):
            save_checkpoint(self.checkpoint, self.source, self.manifest, weights, aside)
        shutil.copyfile(self.folder / "curve.jsonl", aside / "curve.jsonl")
        files.sync(aside)
        out: Path = self.arguments.out
        aside.replace(out)
        shutil.rmtree(self.folder)
        self.say(f"{out}: fine-tuned; dualfocus export {out} -o BUNDLE makes a bundle of it")


def _accelerator(parts: int, *, half: bool) -> Accelerator:
    """accelerate, as it is configured. Raises InputError where the same would not be learned so."""
    accumulated = GradientAccumulationPlugin(
        num_steps=parts,
        # else a whole model's gradients stay on each device until the last part
        sync_each_batch=parse_flag_from_env("ACCELERATE_USE_FSDP"),
    )
    found = Accelerator(mixed_precision="bf16" if half else "no", gradient_accumulation_plugin=accumulated)
    if found.distributed_type == DistributedType.DEEPSPEED:
        raise InputError("accelerate is configured for DeepSpeed, expected FSDP, DDP or one process")
    if found.distributed_type == DistributedType.FSDP:
        if not found.is_fsdp2:  # which rounds the rotary frequencies, and loses AdamW's moments
            raise InputError("accelerate is configured for version 1 of FSDP, expected --fsdp_version 2")
        plugin = found.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        if half:  # computed in, but not summed
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
            )
    return found


def _loss(model: nn.Module, part: Part, device: torch.device) -> Tensor:
    tensors = (part.ids, part.places, part.labels, part.pixels)
    found: Tensor = model(*(tensor.to(device, non_blocking=True) for tensor in tensors))
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_out(out: Path, folder: Path, resume: bool) -> None:
    check_new(out)
    if folder.exists() and not resume:
        raise InputError(
            f"{folder} is of a run that was interrupted: --resume goes on with it, expected it to be removed "
            "otherwise"
        )


def _cut_curve(path: Path, done: int) -> None:
    """Of an interrupted run's curve, keep the lines up to the step that it goes on from."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.write_text("".join(f"{line}\n" for line in islice(lines, done)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; what was given and cannot be used is one sentence, and exit status 2."""
    parser = _Parser(
        prog="dualfocus.train.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("checkpoint", metavar="CHECKPOINT", help="a folder, or an id on the Hugging Face Hub")
    option("--dialogues", type=Path, required=True, metavar="FILE", help="what curation wrote")
    option("--images", type=Path, required=True, metavar="DIR", help="its pictures")
    option("--mix", type=Path, metavar="FILE", help="LLaVA's samples, to learn too")
    option("--mix-images", type=Path, metavar="DIR", help="their pictures (as --images)")
    option("-o", "--out", type=Path, required=True, metavar="OUT", help="where the checkpoint goes")
    option("--epochs", type=count, default=1, help="how often each sample is seen (1)")
    option("--lr", type=positive, help=f"peak learning rate ({RATE}; with --lora {LORA_RATE})")
    option("--batch", type=count, default=128, help="samples a step, of all processes (128)")
    option("--per-device", type=count, default=16, help="of these at once on a device, at most (16)")
    option("--length", type=count, default=2048, help="tokens behind which a sample is cut (2048)")
    option("--lora", action="store_true", help="learn low-rank changes instead, merged at the end")
    option("--precision", choices=["bf16", "fp32"], default="bf16", help="what is computed in (bf16)")
    option("--hold-out", type=amount, default=0, metavar="N", help="samples kept for a final evaluation (0)")
    option("--seed", type=seed, default=0)
    option("--workers", type=amount, default=min(4, (os.cpu_count() or 1) - 1), help="that read pictures")
    option("--save-every", type=count, default=500, metavar="N", help="steps between two saves (500)")
    option("--vision-tower", metavar="DIR|ID", help="in the place of the one that CHECKPOINT names")
    option("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file that it writes
    try:
        Run(parser.parse_args(arguments)).run()
    except torch.OutOfMemoryError:
        _refuse(
            "the device's memory is too small for this model and --per-device: less of it, --lora, or "
            "`accelerate launch --use_fsdp --fsdp_version 2` needs less"
        )
    except KeyboardInterrupt:
        print("dualfocus: interrupted; --resume goes on behind the last saved step", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        _refuse(error)


def _refuse(reason: object) -> NoReturn:
    print(f"dualfocus: {reason}", file=sys.stderr)
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    """A wrong call is one sentence too."""

    def error(self, message: str) -> NoReturn:
        _refuse(f"{message}; `python -m {self.prog} --help` says more")


def amount(text: str, least: int = 0) -> int:
    """For argparse, whose complaint names the function: a whole number."""
    number = int(text)
    if number < least:
        raise ValueError
    return number


def positive(text: str) -> float:
    """The same: a number above zero."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def seed(text: str) -> int:
    """The same: a whole number of 63 bits."""
    number = amount(text)
    if number >= 1 << 63:
        raise ValueError
    return number


def count(text: str) -> int:
    """The same, 1 or more."""
    return amount(text, 1)


if __name__ == "__main__":
    main()
