"""Fine-tuning: what is fed, in which order, by which rule; that it learns, goes on, and can be exported."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import formats
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from dualfocus.export import checkpoint as checkpoints
from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle, DualFocus
from dualfocus.runtime.errors import InputError
from dualfocus.runtime.image import open_picture, view
from dualfocus.runtime.manifest import Manifest
from dualfocus.runtime.turns import ImageToken, Turns
from dualfocus.train import finetune, loop, samples
from dualfocus.train.samples import IGNORED, Rows, Sample

NANO = Path(__file__).parent.parent / "train" / "checkpoints" / "nano"
LOCATE = "<image>\nPlease provide the bounding box coordinate of the region this question asks: "
MICRO = "<image>\nPlease combine the information from these two images and answer this question: "
HINT = "\nAnswer the question using a single word or phrase."
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
QUESTIONS = {"What is 0?": "red", "What is 1?": "37", "What is 2?": "a bus"}
BOXES = {"What is 0?": (0.1, 0.2, 0.5, 0.6), "What is 1?": (0.4, 0.1, 0.9, 0.7), "What is 2?": (0, 0, 0.5, 1)}


def dialogue(number: int, question: str) -> dict[str, Any]:
    box = BOXES[question]
    said = [
        LOCATE + question,
        "[" + ", ".join(f"{v:.2f}" for v in box) + "]",
        MICRO + question + HINT,
        QUESTIONS[question],
    ]
    return {
        "id": number,
        "image": f"{number}.png",
        "sub_area": list(box),
        "conversations": talk(*said),
    }


def talk(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


MIX = [
    {"id": "text", "conversations": talk(r"Say {Q}, {CQ}, \mathbf{C} and <b>.", "{T}", "Bye", "bye")},
    {"id": "seen", "image": "0.png", "conversations": talk("what?\n<image>", "noise", "and?", "nothing")},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoint`, `pictures`, `dialogues.json` and `mix.json`."""
    folder = tmp_path_factory.mktemp("tune")
    tiny.build(folder / "checkpoint", max_new_tokens=40)
    ends = {"bos_token_id": 1, "eos_token_id": 2}  # and no digit, as tiny's own say
    (folder / "checkpoint" / "generation_config.json").write_text(json.dumps(ends))
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (100 + 100 * i, 200, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    (folder / "dialogues.json").write_text(json.dumps([dialogue(i, q) for i, q in enumerate(QUESTIONS)]))
    (folder / "mix.json").write_text(json.dumps(MIX))
    return folder


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """accelerate's state is the process's, and a test's here."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def opened(source: Path, **describe: Any) -> tuple[checkpoints.Checkpoint, Manifest]:
    checkpoint = checkpoints.load(source)
    return checkpoint, checkpoints.describe(checkpoint, ragged_append=True, **describe)


def rows_of(source: Path, found: list[Sample], length: int = 2048) -> Rows:
    checkpoint, manifest = opened(source)
    return Rows(found, manifest, checkpoint.tokenizer, length)


def command(data: Path, out: Path, *more: str, batch: int = 4) -> list[str]:
    """Arguments that fine-tune the tiny checkpoint on three dialogues and two of LLaVA's samples."""
    files = [str(data / name) for name in ("checkpoint", "dialogues.json", "pictures", "mix.json")]
    given = [files[0], "--dialogues", files[1], "--images", files[2], "--mix", files[3], "--workers", "0"]
    given += ["--batch", str(batch), "--precision", "fp32", "-o", str(out), *more]
    return given


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- what is fed


def test_a_dialogue_is_fed_as_the_runtime_feeds_it(data: Path) -> None:
    """Of nano: its prompts, without hint, and its coordinates. The box by hand, on a picture of 200 x 100."""
    found, dropped = samples.read(data / "dialogues.json", data / "pictures")
    assert not dropped
    rows = rows_of(NANO, found)
    row, manifest = rows[0], rows.manifest
    # (20, 20) to (100, 60) in the picture, which stands 50 pixels below the upper end of its 200 x 200 square
    box = "[0.10, 0.35, 0.50, 0.55]"
    prompt = Turns(manifest, rows.tokenizer, "What is 0?").select("0", "1", box, "red")
    fed = [
        ImageToken(str(place // 64), place % 64) if place >= 0 else token for token, place, _ in row.columns
    ]
    assert tuple(fed) == prompt.tokens
    learned = [i for i, label in enumerate(row.columns[:, 2]) if label != IGNORED]
    assert learned == [i for reply in prompt.replies for i in reply]
    assert (row.columns[learned, 2] == row.columns[learned, 0]).all()
    picture = open_picture(data / "pictures" / "0.png")
    # a square of 80 about (60, 40), cut off at the picture's last pixel, and 25 more on each side
    crop = (0, 0, 125, 99)
    assert np.array_equal(row.views[0], view(picture, (0, 0, 200, 100), manifest.image))
    assert np.array_equal(row.views[1], view(picture, crop, manifest.image))


def test_a_dialogue_for_dualfocus_checkpoints_has_their_words(data: Path) -> None:
    found, _ = samples.read(data / "dialogues.json", data / "pictures")
    rows = rows_of(data / "checkpoint", found)
    columns = rows[0].columns
    text = rows.tokenizer.decode(columns[columns[:, 1] < 0, 0].tolist(), skip_special_tokens=False)
    assert text == (
        f"<s>{SYSTEM}USER: {LOCATE[7:]}What is 0? ASSISTANT: [0.10, 0.20, 0.50, 0.60]</s>"
        f"USER: {MICRO[7:]}What is 0?{HINT} ASSISTANT: red</s>"
    )
    learned = rows.tokenizer.decode(columns[columns[:, 2] >= 0, 2].tolist(), skip_special_tokens=False)
    assert learned == " [0.10, 0.20, 0.50, 0.60]</s> red</s>"
    assert columns[columns[:, 1] >= 0, 1].tolist() == list(range(32))


def test_llavas_samples_keep_their_words(data: Path) -> None:
    found, _ = samples.read(data / "mix.json", data / "pictures")
    rows = rows_of(data / "checkpoint", found)
    texts = []
    for row in (rows[0], rows[1]):
        ids = [2 if place == 0 else token for token, place, _ in row.columns if place <= 0]
        texts.append(rows.tokenizer.decode(ids, skip_special_tokens=False))
    said = "USER: Say {Q}, {CQ}, \\mathbf{C} and <b>. ASSISTANT: {T}</s>USER: Bye ASSISTANT: bye</s>"
    assert texts[0] == f"<s>{SYSTEM}{said}"
    # the picture, shown here by </s>, comes first, as LLaVA moves it
    assert texts[1] == (f"<s>{SYSTEM}USER: </s>\nwhat? ASSISTANT: noise</s>USER: and? ASSISTANT: nothing</s>")
    assert rows[0].views == []


def test_another_wording_keeps_its_words_and_takes_the_checkpoints_box(data: Path) -> None:
    asked = (("<image>\nWhere is it?", "there"), ("<image>\nWhat is it?", "red"))
    rows = rows_of(NANO, [Sample(str(data / "pictures" / "0.png"), BOXES["What is 0?"], asked)])
    columns = rows[0].columns
    text = rows.tokenizer.decode(columns[columns[:, 1] < 0, 0].tolist(), skip_special_tokens=False)
    assert "Where is it? ASSISTANT: [0.10, 0.35, 0.50, 0.55]</s>" in text
    assert text.endswith("What is it? ASSISTANT: red</s>")


def test_what_is_no_sample_is_counted(data: Path, tmp_path: Path) -> None:
    good = dialogue(0, "What is 0?")
    bad: list[Any] = [
        7,
        {"conversations": []},
        {"conversations": talk("a question")},
        {"conversations": talk("<image>\nof which picture?", "b")},
        {"image": "0.png", "conversations": talk("no mark", "b")},
        {"image": 3, "conversations": talk("<image>", "b")},
        {"conversations": talk("not UTF-8: \ud800", "b")},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        good | {"sub_area": [0.1, 0.2, 0.3]},
        good | {"sub_area": ["a", 0.2, 0.3, 0.4]},
        good | {"sub_area": [0.1, 0.2, 0.3, 10**400]},
        {key: value for key, value in good.items() if key != "image"},
    ]
    boxes = [[0.5, 0.2, 0.5, 0.6], [0.1, 0.2, 0.5, 1.2], [-0.1, 0, 1, 1], [math.nan, 0, 1, 1]]
    outside = [good | {"sub_area": box} for box in boxes]
    begins = {"conversations": [{"from": "gpt", "value": "mid-conversation"}, *talk("a", "b")]}
    file = tmp_path / "some.json"
    file.write_text(json.dumps([*bad, *outside, good | {"image": "none.png"}, good, begins]))
    found, dropped = samples.read(file, data / "pictures")
    assert dropped == {"malformed": 12, "box outside the picture, or empty": 4, "picture missing": 1}
    assert len(found) == 2
    assert found[1].turns == (("a", "b"),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "is nested too deeply to be read"),
        (b"{}", "holds a dict, expected a list"),
        (b"[", "is not JSON"),
        (b"\xff", "is not JSON"),
    ],
)
def test_what_is_no_file_of_samples_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(InputError, match=said):
        samples.read(tmp_path / "some.json", tmp_path)
    with pytest.raises(InputError, match="is not a regular file"):
        samples.read(Path("/dev/zero"), tmp_path)


@pytest.mark.parametrize("arguments", [[], ["x", "--epochs", "0"], ["x", "--precision", "int8"]])
def test_a_wrong_call_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        finetune.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("dualfocus: ")
    assert said.endswith("; `python -m dualfocus.train.finetune --help` says more\n")
    assert said.count("\n") == 1


def test_what_shows_no_use_while_training_is_fed_empty_and_counted(data: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (3, 3)).save(tmp_path / "dot.png")
    turns = (("<image>\nWhere?", "x"), ("<image>\nWhat?", "y"))
    damaged = Sample(str(tmp_path / "bad.png"), None, turns[:1])
    dot = Sample(str(tmp_path / "dot.png"), (0.0, 0.0, 0.1, 0.1), turns)  # no whole pixel
    found, _ = samples.read(data / "dialogues.json", data / "pictures")
    rows = rows_of(data / "checkpoint", [damaged, dot, found[0]], length=100)
    part = rows.collate([rows[i] for i in range(3)])
    assert part.counts == Counter(samples=3, unusable=2, cut=1, tokens=100)
    assert part.ids.shape == (3, 100)
    assert (part.labels == IGNORED).all()
    nothing = rows.collate([])
    losses = finetune.Losses(opened(data / "checkpoint")[0].model)
    for one in (part, nothing):
        loss = losses(one.ids, one.places, one.labels, one.pixels)
        assert loss.item() == 0
        loss.backward()  # every process has a gradient of everything, so that none waits for another


def test_the_loss_is_transformers_own(data: Path) -> None:
    """A part of rows of all kinds, padded, against transformers' class for each sample alone."""
    checkpoint = checkpoints.load(data / "checkpoint")
    found = [
        s for name in ("dialogues", "mix") for s in samples.read(data / f"{name}.json", data / "pictures")[0]
    ]
    rows = rows_of(data / "checkpoint", found)
    part = rows.collate([rows[i] for i in range(5)])
    losses = finetune.Losses(checkpoint.model)
    assert part.counts["samples"] == 5
    with torch.no_grad():
        together = losses(part.ids, part.places, part.labels, part.pixels).item()
        alone = 0.0
        for i in range(5):
            columns = torch.from_numpy(rows[i].columns)
            ids = torch.where(columns[:, 1] >= 0, checkpoint.config.image_token_id, columns[:, 0])
            pixels = [torch.from_numpy(pixels) for pixels in rows[i].views]
            seen = {"pixel_values": torch.cat(pixels)} if pixels else {}
            loss = checkpoint.model(input_ids=ids[None], labels=columns[None, :, 2], **seen).loss
            alone += loss.item() * rows[i].counts["targets"]
    assert together == pytest.approx(alone, rel=1e-5)
    assert part.counts["targets"] == sum(rows[i].counts["targets"] for i in range(5))


def test_what_saves_memory_changes_little(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A big model computes activations twice, to the same gradients; LoRA's frozen matrices are bfloat16."""
    found, _ = samples.read(data / "dialogues.json", data / "pictures")
    rows = rows_of(data / "checkpoint", found)
    part = rows.collate([rows[i] for i in range(3)])

    def learn(**how: bool) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        losses, groups = finetune.prepare(checkpoints.load(data / "checkpoint"), **how)
        losses.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=how["half"]):
            loss = losses(part.ids, part.places, part.labels, part.pixels)
        loss.backward()
        learned = {name: p for name, p in losses.named_parameters() if p.requires_grad}
        assert sum(len(group["params"]) for group in groups) == len(learned)
        assert all(p.dtype == torch.float32 for p in learned.values())
        frozen = {p.dtype for p in losses.parameters() if not p.requires_grad and p.dim() > 1}
        assert frozen == {torch.bfloat16 if how["half"] else torch.float32}
        assert losses.model.is_gradient_checkpointing == (finetune.BIG == 1)
        return loss.item(), {name: p.grad for name, p in learned.items() if p.grad is not None}

    once, gradients = learn(lora=False, half=False)
    adapted, _ = learn(lora=True, half=True)
    assert adapted == pytest.approx(once, rel=0.01)  # an adapter adds nothing at first
    monkeypatch.setattr(finetune, "BIG", 1)
    twice, again = learn(lora=False, half=False)
    assert twice == once
    assert gradients.keys() == again.keys()
    assert all(torch.allclose(gradients[name], again[name]) for name in gradients)


# ---- in which order, and how fast


def test_batches_hold_every_sample_once_and_are_of_a_kind() -> None:
    kinds = [Sample("p" if i % 3 else None, None, ((f"{'word ' * i}", "b"),)) for i in range(50)]
    drawn = samples.batches(kinds, 8, "0/0")
    assert drawn == samples.batches(kinds, 8, "0/0")
    assert drawn != samples.batches(kinds, 8, "0/1")
    assert Counter(i for batch in drawn for i in batch) == Counter(range(50))
    # 17 without a picture, 33 with: two and four whole batches, and two left over
    assert sorted(map(len, drawn)) == [2, 8, 8, 8, 8, 8, 8]
    assert all(len({kinds[i].picture for i in batch}) == 1 for batch in drawn if len(batch) == 8)


def test_a_batch_is_dealt_to_processes_by_length() -> None:
    lengths = [5, 90, 7, 80, 6, 70, 8]
    dealt = [samples.deal(range(7), lengths, 2, 2, process, 2) for process in range(2)]
    assert dealt == [[[1, 3], [2, 4]], [[5, 6], [0]]]
    assert samples.deal([0], lengths, 2, 2, 1, 2) == [[], []]


@pytest.mark.parametrize(
    ("total", "processes", "most", "expected"),
    [(128, 8, 16, (16, 1)), (128, 1, 16, (16, 8)), (6, 1, 4, (3, 2)), (7, 1, 4, (1, 7)), (2, 2, 16, (1, 1))],
)
def test_a_batch_is_split(total: int, processes: int, most: int, expected: tuple[int, int]) -> None:
    assert finetune.split(total, processes, most) == expected


def test_the_rate_warms_up_and_falls() -> None:
    assert loop.rate(0) == 0
    assert loop.rate(0.015) == 0.5
    assert loop.rate(0.03) == 1
    assert loop.rate(0.03 + 0.97 / 2) == pytest.approx(0.5)
    assert loop.rate(0.03 + 0.97 / 3) == pytest.approx(0.75)
    assert loop.rate(1) == loop.rate(1.7) == pytest.approx(0)


def test_fit_ends_when_the_schedule_says_so(tmp_path: Path) -> None:
    """By any clock: here one that says a third of the way is over after every step."""
    accelerator = Accelerator(cpu=True)
    line = nn.Linear(1, 1, bias=False)
    nn.init.constant_(line.weight, 1.0)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.1)
    saved: list[tuple[int, dict[str, int]]] = []
    steps = (loop.Step([float(i)], {"samples": 10}) for i in range(1, 100))
    with loop.Curve(tmp_path / "curve.jsonl", {"samples": 5}) as curve:
        loop.fit(
            accelerator,
            [line],
            optimizer,
            lambda done: done / 3,
            steps,
            lambda part: (line.weight.sum() * part, {"part": part}),
            curve,
            lambda done, counts: saved.append((done, dict(counts))),
            save_every=2,
        )
    written = [json.loads(text) for text in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [one["part"] for one in written] == [1, 2, 3]
    assert [one["samples"] for one in written] == [15, 25, 35]
    assert saved == [(2, {"samples": 25}), (3, {"samples": 35})]
    rates = [0.1 * loop.rate(share) for share in (0, 1 / 3, 2 / 3)]
    assert [one["lr"] for one in written] == pytest.approx(rates)
    # gradients are 1, 2 and 3, the last two clipped to 1
    assert line.weight.item() == pytest.approx(1 - sum(rates), abs=1e-5)
    assert [one["loss"] for one in written] == pytest.approx([1, 2, 3 * (1 - rates[1])], abs=1e-5)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    line = nn.Linear(1, 1)
    with loop.Curve(None) as curve, pytest.raises(InputError, match="the loss of step 1 is nan"):
        loop.fit(
            Accelerator(cpu=True),
            [line],
            torch.optim.SGD(line.parameters(), lr=0.1),
            loop.by_minutes(1),
            [loop.Step([None], {})],
            lambda _: (line.weight.sum() * math.nan, {}),
            curve,
            lambda *_: None,
        )


# ---- that it learns


@pytest.mark.parametrize("how", [[], ["--lora"]], ids=["full", "lora"])
def test_dialogues_are_learned_and_the_checkpoint_answers(data: Path, tmp_path: Path, how: list[str]) -> None:
    out = tmp_path / "out"
    rate = "1e-3" if how else "3e-3"
    finetune.main(command(data, out, *how, "--lr", rate, "--epochs", "50"))
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert len(curve) == 100  # of 5 samples, one batch of 4 and one of 1
    assert curve[0]["loss"] > 5
    assert max(line["loss"] for line in curve[-2:]) < 0.05
    assert curve[-1]["samples"] == 250
    assert not (tmp_path / ".out.partial").exists()
    modes = {path.name: path.stat().st_mode for path in out.iterdir()}
    assert set(modes.values()) == {(data / "dialogues.json").stat().st_mode}, modes

    before, after = (load_file(folder / "model.safetensors") for folder in (data / "checkpoint", out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        learned = not name.startswith("vision_tower.")
        if how and ("embed_tokens" in name or "norm" in name or "lm_head" in name):
            learned = False
        assert torch.equal(after[name], tensor) != learned, name

    export_bundle(out, tmp_path / "bundle", progress=lambda _: None)
    runner = DualFocus(Bundle.open(tmp_path / "bundle", threads=1))
    for i, (question, answer) in enumerate(QUESTIONS.items()):
        result = runner.ask(open_picture(data / "pictures" / f"{i}.png"), question, "micro")
        assert result.located is not None
        assert result.micro is not None
        said = dialogue(i, question)["conversations"]
        assert result.located.text == said[1]["value"]
        assert result.micro.text == answer


# ---- that it goes on


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize("how", [[], ["--lora"]], ids=["full", "lora"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    data: Path, tmp_path: Path, how: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whatever dropout draws; also when nothing but the steps since the last save is lost."""
    more = [*how, "--lr", "1e-3", "--epochs", "4", "--save-every", "3", "--hold-out", "1"]
    finetune.main(command(data, tmp_path / "whole", *more, batch=2))
    save_state, out = loop.save_state, tmp_path / "resumed"

    def stop(accelerator: Accelerator, folder: Path, done: int, counts: Any) -> None:
        if done == 6:
            raise InterruptedRunError
        save_state(accelerator, folder, done, counts)

    monkeypatch.setattr(loop, "save_state", stop)
    with pytest.raises(InterruptedRunError):
        finetune.main(command(data, out, *more, batch=2))
    monkeypatch.undo()
    assert not out.exists()
    _alone_now()
    steps: list[int] = []
    note = loop.Curve.note
    monkeypatch.setattr(
        loop.Curve, "note", lambda self, step, *of: (steps.append(step), note(self, step, *of))
    )
    finetune.main(command(data, out, *more, "--resume", batch=2))
    assert steps == [4, 5, 6, 7, 8]
    _same(tmp_path / "whole", out)


def _alone_now() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def curve(folder: Path) -> list[dict[str, Any]]:
    """A run's curve, line by line."""
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def _same(whole: Path, resumed: Path) -> None:
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    curves = [
        [{key: value for key, value in line.items() if key != "minutes"} for line in curve(folder)]
        for folder in (whole, resumed)
    ]
    assert curves[0] == curves[1]
    assert [line["step"] for line in curves[0][:-1]] == list(range(1, len(curves[0])))
    assert curves[0][-1]["held_out"] == 1


def test_a_killed_run_goes_on(data: Path, tmp_path: Path) -> None:
    """kill -9 while a state is written: it goes on from the one before."""
    more = ["--lr", "1e-3", "--epochs", "4", "--save-every", "3", "--hold-out", "1"]
    finetune.main(command(data, tmp_path / "whole", *more, batch=2))
    out = tmp_path / "resumed"
    given = command(data, out, *more, "--workers", "1", batch=2)
    code = (
        "import json, os, signal, sys\n"
        "from accelerate import Accelerator\n"
        "from dualfocus.train import finetune\n"
        "save, saved = Accelerator.save_state, []\n"
        "def kill(self, *of):\n"
        "    save(self, *of)\n"
        "    saved.append(of)\n"
        "    if len(saved) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Accelerator.save_state = kill\n"
        "finetune.main(json.loads(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(given)], env=_environment())
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / ".resumed.partial").glob("*state*")) == [
        ".state",
        "state-3",
    ]
    _alone_now()
    finetune.main([*given, "--resume"])
    _same(tmp_path / "whole", out)


@pytest.mark.parametrize(("limit", "within"), [(0.5, "state"), (1.2, "state"), (0.5, "checkpoint")])
def test_a_full_disk_is_said_and_gone_on_from(
    limit: float,
    within: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No room for the weights, for the optimiser's moments, which are twice as large, for the checkpoint."""
    more = ["--lr", "1e-3", "--epochs", "2", "--save-every", "3"]
    finetune.main(command(data, tmp_path / "whole", *more, batch=2))
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    if within == "checkpoint":
        monkeypatch.setattr(loop, "save_state", lambda *_: None)
    given = command(data, tmp_path / "out", *more, batch=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit * size), hard))
    _alone_now()
    try:
        with pytest.raises(SystemExit) as stopped:
            finetune.main(given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    said = f"{within} could not be written, is the disk full? "
    assert said in last
    assert last.partition(said)[2]  # in the words of what failed
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    _alone_now()
    finetune.main([*given, "--resume"])
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | more


def two_processes(given: list[str], **more: str) -> str:
    """What `processes.py` says in the end."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = [*start, str(Path(__file__).with_name("processes.py")), *given]
    done = subprocess.run(run, env=_environment(**more), check=False, capture_output=True, text=True)
    assert done.returncode == ("STOP_AFTER" in more), done.stderr
    return done.stderr


def _same_learned(source: Path, one: Path, two: Path) -> None:
    """Two runs learned something from `source`, and but for rounding the same."""
    first, second = curve(one), curve(two)
    for name in ("loss", "lr"):
        assert [line.get(name) for line in first] == pytest.approx([line.get(name) for line in second]), name
    assert [line.get("targets") for line in first] == [line.get("targets") for line in second]
    before, *after = (checkpoints.load(folder) for folder in (source, one, two))
    changes = []
    for name in before.names:
        tensors = [of.weights.read(name) for of in after]
        changes.append((tensors[0] - before.weights.read(name)).abs().max())
        assert torch.allclose(*tensors, rtol=0, atol=1e-5), name
    assert max(changes) > 1e-4


def test_two_processes_learn_what_one_does(data: Path, tmp_path: Path) -> None:
    more = ["--lr", "1e-4", "--epochs", "3", "--per-device", "1", "--hold-out", "1"]
    finetune.main(command(data, tmp_path / "one", *more))
    assert "2 processes, MULTI_CPU" in two_processes(command(data, tmp_path / "two", *more))
    one, two = tmp_path / "one", tmp_path / "two"
    _same_learned(data / "checkpoint", one, two)
    ends = [curve(folder)[-1]["held_out_loss"] for folder in (one, two)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral, tied", "--lora"])
def test_a_model_shared_out_learns_what_one_process_does(
    data: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP gathers a layer at a time, keeps tied weights tied, and goes on as if nothing had been."""
    monkeypatch.setattr(finetune, "DROPOUT", 0.0)
    source = data / "checkpoint"
    if kind == "mistral, tied":
        source = tmp_path / "source"
        formats.hugging_face(source, formats.make("mistral", tied=True, dtype=torch.float32))
    more = ["--lr", "1e-3", "--epochs", "4", "--per-device", "1", "--save-every", "2"]
    more += ["--lora"] if kind == "--lora" else []
    one, two = ([str(source), *command(data, tmp_path / name, *more, batch=2)[1:]] for name in ("one", "two"))
    finetune.main(one)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    fsdp["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    two_processes(two, **fsdp, STOP_AFTER="4")
    said = two_processes([*two, "--resume"], **fsdp)
    assert "going on behind step 4 of" in said
    assert "2 processes, FSDP" in said
    _same_learned(source, tmp_path / "one", tmp_path / "two")


def test_what_would_learn_otherwise_is_refused(data: Path, tmp_path: Path) -> None:
    more = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    start = [sys.executable, str(Path(__file__).with_name("processes.py")), *command(data, tmp_path / "out")]
    done = subprocess.run(start, env=_environment(**more), check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "dualfocus: accelerate is configured for version 1 of FSDP" in done.stderr


# ---- what goes in and comes out


@pytest.mark.parametrize("name", ["original", "llava-1.5", "qwen2 and siglip", "mistral, tied"])
def test_every_kind_of_checkpoint(data: Path, tmp_path: Path, name: str) -> None:
    """Some steps: what they leave alone is what it was, and what comes out is read as what went in."""
    source = tmp_path / "source"
    tower = []
    if name == "original":
        model = formats.make(dtype=torch.float16)
        formats.original(source, model, tower_inside=False)
        formats.tower(tmp_path / "clip", model, whole=False)
        tower = ["--vision-tower", str(tmp_path / "clip")]
    elif name == "llava-1.5":
        formats.hugging_face(source, formats.make(dtype=torch.float16), before=True, shard_bytes=100_000)
        (source / "chat_template.jinja").write_text("{{ messages }}")
        (source / "processor_config.json").write_text('{"patch_size": 14, "image_processor": {}}')
    elif name == "mistral, tied":
        model = formats.make("mistral", tied=True, dtype=torch.bfloat16)
        formats.hugging_face(source, model, kind="bin")
    else:
        model = formats.make("qwen2", "siglip", layer=-1, strategy="full", dtype=torch.bfloat16)
        formats.hugging_face(source, model, before=True, processor="siglip")
    given = command(data, tmp_path / "out", *tower, "--lr", "1e-2", "--epochs", "3", batch=8)
    finetune.main([str(source), *given[1:]])

    before = checkpoints.load(source, vision_tower=tower[1] if tower else None)
    after = checkpoints.load(tmp_path / "out")
    _, problems = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values())
    assert after.names == before.names
    for key in before.names:
        assert after.weights.dtypes[key] == before.weights.dtypes[key]
        same = torch.equal(after.weights.read(key), before.weights.read(key))
        assert same == key.startswith("model.vision_tower."), key
    text = f"{SYSTEM}USER: {LOCATE}a 1? ASSISTANT: [0.12, 0.34, 0.56, 0.78]</s>"
    assert after.tokenizer.encode(text).ids == before.tokenizer.encode(text).ids
    described = [
        checkpoints.describe(one, ragged_append=True, coordinates="original") for one in (before, after)
    ]
    for part in ("decoder", "tokens", "prompts", "box", "select", "max_new_tokens"):
        assert getattr(described[0], part) == getattr(described[1], part)
    image = described[0].image
    # what a centre crop leaves out could not be pointed at
    assert described[1].image == replace(image, fit={"crop": "pad"}.get(image.fit, image.fit))
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    padded = processor.get("do_pad"), processor.get("image_processor_type")
    assert (padded == (True, "LlavaImageProcessor")) == (described[1].image.fit == "pad")
    if name == "llava-1.5":
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
        assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == {"patch_size": 14}
    declared = checkpoints.describe(after, ragged_append=True)
    assert declared.coordinates == "original"  # whatever stock LLaVA's were


def test_nano_stays_nano(data: Path, tmp_path: Path) -> None:
    """Its batch norms see many pictures at once, and stay as they are; so do its prompts and coordinates."""
    out = tmp_path / "out"
    given = command(data, out, "--lr", "1e-3", "--epochs", "2", "--length", "512")
    finetune.main([str(NANO), *given[1:]])
    before, after = load_file(NANO / "model.safetensors"), weights(out)
    for name in before:
        if name.startswith("vision_tower.") and before[name].is_floating_point():
            assert torch.equal(before[name], after[name])
    manifests = [opened(folder)[1] for folder in (NANO, out)]
    assert manifests[0].prompts == manifests[1].prompts
    assert manifests[1].coordinates == "padded"
    assert manifests[1].max_new_tokens == 16


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda given: [*given, "--dialogues", "none.json"],
            "dualfocus: none.json does not exist",
        ),
        (
            lambda given: [*given, "--mix-images", "nowhere"],
            "mix.json: none of its pictures is there, the first of them 'nowhere/0.png'",
        ),
        (lambda given: ["nowhere", *given[1:]], "nowhere"),
        (
            lambda given: [*given, "--hold-out", "5"],
            "leaves 5 usable samples, expected more than the 5 to hold",
        ),
        (lambda given: [*given, "-o", given[0]], "is there already, expected a new or an empty folder"),
        (lambda given: [*given, "-o", "/proc"], "a file system of its own, expected a folder in one"),
        (lambda given: [*given, "--batch", "128", "--epochs", "1"], "make 1 step, whose learning rate is"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    data: Path,
    tmp_path: Path,
    spoil: Callable[[list[str]], list[str]],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune.main(spoil(command(data, tmp_path / "out")))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dualfocus: ")
    assert said in last
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is not JSON"), ('{"a": 1}', "holds a dict, expected a list of samples")]
)
def test_a_file_without_samples_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(InputError, match=said):
        samples.read(tmp_path / "file.json", tmp_path)


@pytest.mark.parametrize("option", ["--lr=-2e-5", "--lr=nan", "--lr=inf", "--lr=0", f"--seed={1 << 63}"])
def test_a_number_that_cannot_be_is_refused(data: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune.main(command(data, tmp_path / "out", option))
    assert stopped.value.code == 2


def test_a_batch_is_shared_evenly_or_refused() -> None:
    with pytest.raises(InputError, match="--batch is 128, expected a multiple of the 3 processes"):
        finetune.split(128, 3, 16)


def test_another_run_is_not_gone_on_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise InterruptedRunError

    monkeypatch.setattr(loop, "save_state", stop)
    with pytest.raises(InterruptedRunError):
        finetune.main(command(data, out))
    declared = data / "checkpoint" / "dualfocus.json"
    for more, said in (
        ([], "--resume goes on with it"),
        (["--resume", "--seed", "1"], "--seed 0, expected the same, got 1"),
        (["--resume"], "with what the checkpoint declares"),
    ):
        if said.startswith("with"):
            declared.write_text(json.dumps({"coordinates": "padded"}))
        _alone_now()
        with pytest.raises(SystemExit):
            finetune.main(command(data, out, *more))
        assert said in capsys.readouterr().err
