"""How nano is trained, in three sizes and four stages.

1. `tower`: the vision tower names each cell's slots (`train.nano`) in views of drawn scenes.
2. `symbols`: the decoder learns the dialogues on scenes whose image tokens are sums of slot embeddings:
   no pixels, so looking things up is learned on clean evidence and many questions a second.
3. `trees`: dialogues about new scenes, their pictures drawn, seen by the frozen tower and kept, once for
   all sizes.
4. `dialogues`: the projector learns to make those sums out of the tower's features, then projector and
   decoder learn the dialogues on real features. The other sizes start from what nano learned so, with a
   layer less or with more of them, which at first add nothing.

Run as ``python -m dualfocus.train.recipe STAGE --minutes M``; every stage saves to ``train/runs/`` and goes
on from what is there with ``--resume``. ``… save --size SIZE`` writes what `dialogues` saved as the
checkpoint ``train/checkpoints/SIZE``, from which ``dualfocus export train/checkpoints/nano -o models/nano``
makes the bundle; ``… load --size SIZE`` takes a checkpoint back into ``train/runs/``, for `trees` and
`dialogues` to go on from. What was run, for how long and with what curves: ``train/LOG.md``.
"""

from __future__ import annotations

import argparse
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import DynamicCache, LlavaForConditionalGeneration

from dualfocus.export.nano_tower import NanoVisionConfig, NanoVisionModel
from dualfocus.runtime.geometry import Crop, find_region
from dualfocus.runtime.manifest import TokenSpec
from dualfocus.runtime.turns import Image, ImageToken, Prompt, Question, Turn, render, tokenize
from dualfocus.train import curate, nano, scenes
from dualfocus.train.curate import Dialogue
from dualfocus.train.loop import Curve, Step, by_minutes, fit

RUNS, CHECKPOINTS = Path("train/runs"), Path("train/checkpoints")
TREES = 8  # scenes in a step of the later stages
# Scenes are drawn in a process beside. A fork of this one would hold its engines without their threads, and
# wait for ever where its garbage collector closes one.
BESIDE: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 4, "multiprocessing_context": "spawn"}
# where it has to be emulated, bfloat16 is three times slower than float32
BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
POINTING = 0.3  # what knowing where to look weighs beside knowing what to say


def jittered(rng: random.Random, box: scenes.Pixels, amount: float) -> scenes.Pixels:
    """A box as a model may predict it: every side moved by up to `amount` of the box's size."""
    size = box[2] - box[0]
    x0, y0, x1, y1 = (v + rng.uniform(-amount, amount) * size for v in box)
    return x0, y0, x1, y1


def crop_of(scene: scenes.Scene, reply: str) -> Crop:
    """The crop that a locate reply leads to."""
    crop = find_region(reply, "padded", scene.width, scene.height, nano.IMAGE).crop
    assert crop is not None
    return crop


class Views(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless (pixels (4, S, S, 3) u8, cells (4, GRID², 9)) of new scenes: the whole and three crops."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed = self.first
        while True:
            scene = scenes.layout(seed)
            rng = random.Random(seed)
            picture = np.asarray(scenes.draw(scene))
            crops = [(0, 0, scene.width, scene.height)]
            for thing in rng.choices(scene.things, k=3):
                crops.append(crop_of(scene, nano.box_text(scene, jittered(rng, thing.box, 0.12))))
            pixels = np.stack([nano.view_pixels(picture, crop) for crop in crops])
            cells = np.stack([nano.view_cells(scene, crop) for crop in crops])
            yield torch.from_numpy(pixels), torch.from_numpy(cells)
            seed += 1


def normalise(pixels: Tensor) -> Tensor:
    """(N, S, S, 3) u8 -> (N, 3, S, S) f32, channels last in memory."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (nano.IMAGE.mean, nano.IMAGE.std))
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous(
        memory_format=torch.channels_last
    )


def near(classes: int, spread: float = 1.0) -> Tensor:
    """(classes, classes) soft targets: a number's neighbours are nearly right."""
    i = torch.arange(classes)
    return torch.softmax(-((i[:, None] - i[None]) ** 2) / (2 * spread**2), -1)


class SlotHeads(nn.Module):
    """One linear classifier for each slot, on every cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.all = nn.Linear(width, sum(nano.SLOTS.values()))
        self.near = near(100)

    def loss(self, features: Tensor, cells: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy over slots (background only says that it is background), and shares right."""
        parts = self.all(features.flatten(0, -2)).float().split(list(nano.SLOTS.values()), -1)
        cells = cells.flatten(0, -2)
        filled = cells[:, 0] > 0
        # background cells are ten times as many: unweighted they drown everything else
        weight = torch.where(filled, 1.0, 0.12)
        total = (F.cross_entropy(parts[0], cells[:, 0], reduction="none") * weight).sum() / weight.sum()
        right = {"kind": (parts[0].argmax(-1) == cells[:, 0])[filled].float().mean().item()}
        right["background"] = (parts[0].argmax(-1) == 0)[~filled].float().mean().item()
        for i, (name, classes) in enumerate(nano.SLOTS.items()):
            if i == 0:
                continue
            logits, target = parts[i][filled], cells[filled, i]
            if classes == 100:
                total = total + 0.25 * F.cross_entropy(logits, self.near[target])
                right[name] = ((logits.argmax(-1) - target).abs() <= 2).float().mean().item()
            else:
                total = total + F.cross_entropy(logits, target)
                seen = target > 0
                right[name] = (logits.argmax(-1) == target)[seen].float().mean().item()
        return total, right


def train(
    stage: str,
    minutes: float,
    seen: int,
    modules: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    batches: DataLoader[Any],
    samples: int,
    loss: Callable[[Any, float], tuple[Tensor, dict[str, float]]],
    save: Callable[[int], None],
) -> None:
    """Train for `minutes` on `batches` of so many `samples`, of which earlier runs have `seen` some.

    `loss` is told the share of the time that is over, `save` how many samples all runs have seen.
    """
    accelerator = Accelerator(mixed_precision="bf16" if BFLOAT16 else "no", cpu=True)
    schedule = by_minutes(minutes)
    steps = (Step([batch], {"samples": samples}) for batch in batches)
    with Curve(RUNS / f"{stage}.jsonl", {"samples": seen}, every=15) as curve:
        fit(
            accelerator,
            modules,
            optimizer,
            schedule,
            steps,
            lambda batch: loss(batch, schedule(0)),
            curve,
            lambda _, counts: save(counts["samples"]),
        )


def train_tower(minutes: float, seed: int, resume: bool) -> None:
    """Stage 1: the tower on views."""
    torch.manual_seed(seed)
    tower, heads = NanoVisionModel(NanoVisionConfig()), SlotHeads(NanoVisionConfig().hidden_size)
    path, scenes_seen = RUNS / "tower.pt", 0
    if resume:
        state = torch.load(path)
        scenes_seen = state["samples"]
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
    tower = tower.to(memory_format=torch.channels_last)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3 if resume else 2e-3, weight_decay=0.02)
    batch_size = 24  # scenes, four views each
    views = Views(seed * 1_000_000 + scenes_seen)

    def loss(batch: tuple[Tensor, Tensor], _: float) -> tuple[Tensor, dict[str, float]]:
        pixels, cells = batch
        features = tower(normalise(pixels.flatten(0, 1))).last_hidden_state
        return heads.loss(features.float(), cells.flatten(0, 1))

    def save(samples: int) -> None:
        torch.save({"samples": samples, "tower": tower.state_dict(), "heads": heads.state_dict()}, path)

    loader = DataLoader(views, batch_size=batch_size, **BESIDE)
    train("tower", minutes, scenes_seen, [tower, heads], optimizer, loader, batch_size, loss, save)


@dataclass(frozen=True)
class Tree:
    """Dialogues about one picture as the runtime runs them: the picture's prefix once, then branches.

    A column is (token id, image cell, target, group): the cell is view * GRID² + cell where the id is
    <image>; the target is the token to predict there, or -100; the group says whose reply it is.
    """

    prefix: NDArray[np.int64]  # (P, 4)
    branches: list[NDArray[np.int64]]  # one (n, L, 4) for each of BRANCHES, padded on the right
    asked: list[NDArray[np.int64]]  # one (n,) for each: the position of the cell asked about, or -1
    cells: NDArray[np.int64]  # (views, GRID², 9)
    seen: NDArray[Any]  # u8 pixels (views, S, S, 3), f16 features (views, GRID², D), or none: symbols do


BRANCHES = {"macro": 8, "locate": 3, "micro": 5}  # how many of each a tree has
PADDING = (0, 0, -100, 0)
CATEGORIES = ("detail", "attribute", "existence", "count", "relation", "position")
GROUPS = (*(f"macro {c}" for c in CATEGORIES), *(f"micro {c}" for c in CATEGORIES), "box")


class Trees(IterableDataset[Tree]):
    """Endless trees of new scenes."""

    def __init__(self, first: int, pixels: bool) -> None:
        self.first, self.pixels = first, pixels
        self.things = (3, 7)  # fewest and most objects in a scene
        self.tokenizer = nano.build_tokenizer()
        self.image_id = self.tokenizer.token_to_id("<image>")
        self.tokens = TokenSpec(self.tokenizer.token_to_id("<s>"), (self.tokenizer.token_to_id("</s>"),))

    def __iter__(self) -> Iterator[Tree]:
        seed = self.first
        while True:
            yield self.tree(seed)
            seed += 1

    def tree(self, seed: int) -> Tree:
        """The tree of the scene of this seed."""
        scene = scenes.layout(seed, *self.things)
        rng = random.Random(seed)
        dialogues = curate.dialogues(scenes.annotate(scene, 0))
        crops = [(0, 0, scene.width, scene.height)]
        branches: list[list[NDArray[np.int64]]] = []
        asked: list[list[int]] = []

        def branch(d: Dialogue, turns: list[Turn], learn: list[tuple[int, str]]) -> None:
            pieces = render(nano.PROMPTS, Question.parse(d.question, ""), turns)
            views = ["0", str(len(crops) - 1)][: sum(isinstance(p, Image) for p in pieces)]
            prompt = tokenize(pieces, self.tokenizer, self.tokens, views, nano.GRID**2)
            cell = nano.asked_cell(crops[int(views[-1])], d)
            asked[-1].append(-1 if cell is None else prompt.tokens.index(ImageToken(views[-1], cell)))
            branches[-1].append(self.columns(prompt, learn))

        branches.append([])
        asked.append([])
        for d in self.choose(rng, dialogues, (0.3, 2, 2, 2, 2, 1.5), BRANCHES["macro"]):
            branch(d, [Turn(nano.PROMPTS.macro, d.answer)], [(0, f"macro {d.category}")])
        branches.append([])
        asked.append([])
        for d in self.choose(rng, dialogues, (2, 2, 1, 1, 1, 1.5), BRANCHES["locate"]):
            branch(d, [Turn(nano.PROMPTS.locate, nano.box_text(scene, d.box))], [(0, "box")])
        branches.append([])
        asked.append([])
        for d in self.choose(rng, dialogues, (4, 1, 1, 1.5, 1.5, 1), BRANCHES["micro"]):
            # half of the crops are as true as boxes get, half as wrong as a model's may be
            wrong = rng.random() < 0.5
            text = nano.box_text(scene, jittered(rng, d.box, 0.12) if wrong else d.box)
            crops.append(crop_of(scene, text))
            turns = [Turn(nano.PROMPTS.locate, text), Turn(nano.PROMPTS.micro, d.answer)]
            branch(d, turns, [(1, f"micro {d.category}")] + ([] if wrong else [(0, "box")]))

        # macro and locate part ways right after the picture: what they share is the prefix
        shared = branches[0][0][: len(branches[1][0]), :2] == branches[1][0][: len(branches[0][0]), :2]
        prefix = int(shared.all(-1).argmin())
        picture = np.asarray(scenes.draw(scene)) if self.pixels else None
        views = [nano.view_pixels(picture, crop) for crop in crops] if picture is not None else []
        return Tree(
            branches[0][0][:prefix],
            [pad([row[prefix:] for row in rows]) for rows in branches],
            [np.array(cells) for cells in asked],
            np.stack([nano.view_cells(scene, crop) for crop in crops]),
            np.array(views),
        )

    def columns(self, prompt: Prompt, learn: list[tuple[int, str]]) -> NDArray[np.int64]:
        """(L, 4) columns of one prompt; `learn` names the replies that count, and their group."""
        groups = {at: GROUPS.index(group) for reply, group in learn for at in prompt.replies[reply]}
        rows = []
        for at, token in enumerate(prompt.tokens[:-1]):
            following = prompt.tokens[at + 1] if at + 1 in groups else -100
            if isinstance(token, ImageToken):
                cell = int(token.image) * nano.GRID**2 + token.position
                rows.append((self.image_id, cell, following, groups.get(at + 1, 0)))
            else:
                rows.append((token, 0, following, groups.get(at + 1, 0)))
        return np.array(rows)

    def choose(
        self, rng: random.Random, asked: list[Dialogue], weights: Sequence[float], n: int
    ) -> list[Dialogue]:
        """`n` dialogues, their categories drawn by weight among those this scene has."""
        by = [[d for d in asked if d.category == c] for c in CATEGORIES]
        open_weights = [w if of else 0 for w, of in zip(weights, by, strict=True)]
        return [rng.choice(of) for of in rng.choices(by, open_weights, k=n)]


def pad(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """(n, L, 4): rows of columns padded on the right to the longest."""
    out = np.tile(np.array(PADDING), (len(rows), max(map(len, rows)), 1))
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def collate(trees: list[Tree]) -> dict[str, Tensor]:
    """Pictures after each other: `prefix` (B, P, 4), each of BRANCHES (B * n, L, 4), `cells`, `seen`.

    For each branch also the position of the cell asked about, as "macro asked" (B * n,).
    """
    first = np.cumsum([0] + [len(tree.cells) * nano.GRID**2 for tree in trees])
    out = {"prefix": np.stack([tree.prefix for tree in trees])}
    out["prefix"][..., 1] += first[:-1, None]
    for i, (name, n) in enumerate(BRANCHES.items()):
        out[name] = pad([row for tree in trees for row in tree.branches[i]])
        out[name][..., 1] += np.repeat(first[:-1], n)[:, None]
        out[f"{name} asked"] = np.concatenate([tree.asked[i] for tree in trees])
    out["cells"] = np.concatenate([tree.cells for tree in trees])
    out["seen"] = np.concatenate([tree.seen for tree in trees])
    return {name: torch.from_numpy(array) for name, array in out.items()}


class Symbols(nn.Module):
    """Slot classes (…, 9) -> embeddings (…, hidden): a sum of one vector a slot.

    A word's vector starts as what is its own in the decoder's embedding, turned; "none" as nothing.
    Numbers are `nano.waves` through a linear map, so that a regression onto the sum loses little by being
    slightly off.
    """

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer) -> None:
        super().__init__()
        table = model.get_input_embeddings().weight.detach()
        hidden = table.shape[1]
        spelled = [[f" {kind}" for kind in scenes.KINDS], [f" {colour}" for colour in scenes.COLOURS]]
        spelled += [[f" {c}" for c in scenes.ALPHABET]] + 2 * [list(scenes.ALPHABET)]
        self.words = nn.ModuleList()
        # a letter's place in the label is told by how it is turned
        for words, turned in zip(spelled, (0, 0, 0, 1, 2), strict=True):
            ids = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
            assert all(len(one) == 1 for one in ids)
            own = table[[one[0] for one in ids]]
            rows = torch.cat([torch.zeros(1, hidden), (own - own.mean(0)) @ nano.turn(hidden, turned).T])
            self.words.append(nn.Embedding.from_pretrained(rows.clone(), freeze=False))
        self.register_buffer("waves", nano.waves())
        self.numbers = nn.ModuleList(nn.Linear(self.waves.shape[1], hidden, bias=False) for _ in range(4))
        for linear in self.numbers:
            nn.init.normal_(linear.weight, std=0.05 / 5**0.5)

    def forward(self, cells: Tensor) -> Tensor:
        words = [*cells[..., :2].unbind(-1), *cells[..., 6:].unbind(-1)]
        total = sum(table(one) for table, one in zip(self.words, words, strict=True))
        numbers = sum(
            linear(self.waves[n]) for linear, n in zip(self.numbers, cells[..., 2:6].unbind(-1), strict=True)
        )
        return total + numbers * (cells[..., :1] > 0)


class Dialogues(nn.Module):
    """The decoder's loss on a batch of trees, for image tokens that come from symbols or from pixels."""

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        # on a CPU torch's fused attention is slow backwards: the plain one trains a third faster
        model.model.language_model.set_attn_implementation("eager")
        numbers = torch.tensor([tokenizer.token_to_id(f"{n:02d}") for n in range(100)])
        size = tokenizer.get_vocab_size()
        soft = torch.eye(size)
        soft[numbers[:, None], numbers[None]] = near(100)
        weights = [0.2 if name == "macro detail" else 3.0 if name == "box" else 4.0 for name in GROUPS]
        self.register_buffer("weights", torch.tensor(weights))
        self.register_buffer("soft", soft)  # row t: what to predict where token t is right

    def loss(
        self, batch: dict[str, Tensor], image_tokens: Tensor, branches: Sequence[str] = tuple(BRANCHES)
    ) -> tuple[Tensor, dict[str, float]]:
        """`image_tokens` (views, GRID², hidden); of the trees, `branches` alone.

        Returns the loss and, by group, the share of replies right: those whose every token is the likeliest
        given the right ones before it, where a number may be off by two hundredths.
        """
        flat = image_tokens.flatten(0, 1)
        decoder = self.model.model.language_model

        def run(columns: Tensor, cache: DynamicCache) -> Any:
            embeds = decoder.embed_tokens(columns[..., 0])
            here = columns[..., 0] == self.model.config.image_token_id
            embeds = torch.where(here[..., None], flat[columns[..., 1]].to(embeds.dtype), embeds)
            return decoder(
                inputs_embeds=embeds, past_key_values=cache, use_cache=True, output_attentions=True
            )

        prefix = DynamicCache()
        run(batch["prefix"], prefix)
        hidden: list[Tensor] = []
        targets: list[Tensor] = []
        groups: list[Tensor] = []
        replies: list[Tensor] = []
        pointing: list[Tensor] = []
        for name in branches:
            columns, n = batch[name], BRANCHES[name]
            fork = DynamicCache()
            for i, layer in enumerate(prefix.layers):
                fork.update(layer.keys.repeat_interleave(n, 0), layer.values.repeat_interleave(n, 0), i)
            wanted = columns[..., 2] >= 0
            out = run(columns, fork)
            hidden.append(out.last_hidden_state[wanted])
            # within a micro dialogue the box is looked for in another view
            answers = wanted & ((columns[..., 3] != GROUPS.index("box")) | (name != "micro"))
            pointing.append(self.pointing(out.attentions, answers, batch[f"{name} asked"]))
            targets.append(columns[wanted][:, 2])
            groups.append(columns[wanted][:, 3])
            replies.append(wanted.nonzero()[:, 0] + 10_000 * len(replies))
        target, group = torch.cat(targets), torch.cat(groups)
        logits = self.model.lm_head(torch.cat(hidden)).float()
        # an answer has one or two tokens, a box ten and half of them fixed; a label asked of the whole
        # picture is a guess, learned but not at the price of the rest
        weight = self.weights[group]
        losses = -(self.soft[target] * logits.log_softmax(-1)).sum(-1)
        loss = (losses * weight).sum() / weight.sum() + POINTING * torch.cat(pointing).mean()
        with torch.no_grad():
            good = self.soft[target, logits.argmax(-1)] > 0.05
            names, index = (torch.cat(replies) * len(GROUPS) + group).unique(return_inverse=True)
            whole = torch.ones(len(names)).scatter_reduce(0, index, good.float(), "amin")
            of = names % len(GROUPS)
            right = {name: whole[of == i].mean().item() for i, name in enumerate(GROUPS) if (of == i).any()}
            right["pointing"] = torch.cat(pointing).mean().item()
        return loss, right

    def pointing(self, attentions: tuple[Tensor, ...], wanted: Tensor, asked: Tensor) -> Tensor:
        """How far two heads of the third layer are from looking at the cell asked about, in nats.

        Where an answer comes from is known; said outright, it is learned in minutes instead of hours.
        """
        looks = attentions[2][:, :2].float()  # (rows, 2, queries, keys)
        row, query = (wanted & (asked >= 0)[:, None]).nonzero(as_tuple=True)
        return -(looks[row, :, query, asked[row]] + 1e-4).log().mean(-1)


def train_symbols(minutes: float, seed: int, resume: bool) -> None:
    """Stage 2: the decoder alone, from easy to hard.

    With one to three objects it learns what of a cell to copy, with more which cell; the micro turns, which
    cost more than all others together, join when looking things up works.
    """
    trees = Trees(seed * 1_000_000, pixels=False)
    model = nano.build_model(trees.tokenizer, "nano", seed)
    symbols, dialogues = Symbols(model, trees.tokenizer), Dialogues(model, trees.tokenizer)
    path, scenes_seen = RUNS / "symbols.pt", 0
    if resume:
        state = torch.load(path)
        scenes_seen = state["samples"]
        model.load_state_dict(state["model"])
        symbols.load_state_dict(state["symbols"])
        trees.first += scenes_seen
    learning = [model.model.language_model, symbols]
    parameters = [parameter for module in learning for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.02, betas=(0.9, 0.98))

    def loss(batch: dict[str, Tensor], share: float) -> tuple[Tensor, dict[str, float]]:
        # no worker process stands between: the next scene is laid out as said here
        trees.things = (1, 3) if share < 0.06 and not resume else (3, 7)
        early = share < 0.5 and not resume
        branches = ("macro", "locate") if early else tuple(BRANCHES)
        return dialogues.loss(batch, symbols(batch["cells"]), branches)

    def save(samples: int) -> None:
        torch.save({"samples": samples, "model": model.state_dict(), "symbols": symbols.state_dict()}, path)

    loader = DataLoader(trees, batch_size=TREES, collate_fn=collate)
    train("symbols", minutes, scenes_seen, learning, optimizer, loader, TREES, loss, save)


VIEWS = 1 + BRANCHES["micro"]  # of a tree: the whole picture, and a crop for each micro dialogue


def draw_trees(count: int, seed: int) -> None:
    """Stage 3: `count` trees with what the tower sees of their pictures: 123 kB each."""
    tower = NanoVisionModel(NanoVisionConfig())
    tower.load_state_dict(torch.load(RUNS / "tower.pt")["tower"])
    tower.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    config = tower.config
    features = np.lib.format.open_memmap(
        RUNS / "features.npy", "w+", np.float16, (count * VIEWS, nano.GRID**2, config.hidden_size)
    )
    torch.save(tower.state_dict(), RUNS / "features.pt")  # whose they are, whatever becomes of tower.pt
    trees: list[Tree] = []
    drawn = Trees(seed * 1_000_000 + 500_000, pixels=True)
    for batch in DataLoader(drawn, batch_size=TREES, collate_fn=list, **BESIDE):
        for tree in batch[: count - len(trees)]:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                seen = tower(normalise(torch.from_numpy(tree.seen))).last_hidden_state
            features[len(trees) * VIEWS : (len(trees) + 1) * VIEWS] = seen.float().numpy()
            trees.append(replace(tree, seen=np.zeros(0)))
        if len(trees) % 400 == 0:
            print(f"{len(trees)} of {count} scenes", flush=True)
        if len(trees) == count:
            break
    features.flush()
    (RUNS / "trees.pickle").write_bytes(pickle.dumps(trees))


class Kept(IterableDataset[Tree]):
    """What `draw_trees` kept, endlessly, in another order every time around."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.trees: list[Tree] = pickle.loads((RUNS / "trees.pickle").read_bytes())
        self.features = np.load(RUNS / "features.npy", mmap_mode="r")

    def __iter__(self) -> Iterator[Tree]:
        rng = random.Random(self.seed)
        while True:
            for i in rng.sample(range(len(self.trees)), len(self.trees)):
                yield replace(self.trees[i], seen=self.features[i * VIEWS : (i + 1) * VIEWS])


def take_over(model: LlavaForConditionalGeneration, learned: dict[str, Tensor]) -> None:
    """Load what another size learned; layers that it lacks stay as they are, and add nothing yet."""
    own = model.state_dict()
    model.load_state_dict(own | {name: value for name, value in learned.items() if name in own})


def train_dialogues(size: str, minutes: float, seed: int, resume: bool) -> None:
    """Stage 4: projector and decoder on what the tower saw.

    Of what starts from symbols, only the projector learns for the first tenth of the time, to say in the
    decoder's symbols what the tower saw; that stays a second loss while both learn the dialogues.
    """
    tokenizer = nano.build_tokenizer()
    model = nano.build_model(tokenizer, size, seed)
    symbols, dialogues = Symbols(model, tokenizer), Dialogues(model, tokenizer)
    path, scenes_seen = RUNS / f"{size}.pt", 0
    from_symbols = size == "nano" and not resume
    if resume:
        state = torch.load(path)
        scenes_seen = state["samples"]
        model.load_state_dict(state["model"])
    elif from_symbols:
        state = torch.load(RUNS / "symbols.pt")
        model.load_state_dict(state["model"])
        symbols.load_state_dict(state["symbols"])
    else:
        take_over(model, torch.load(RUNS / "nano.pt")["model"])
    model.model.vision_tower.load_state_dict(torch.load(RUNS / "features.pt"))
    symbols.requires_grad_(False)
    projector = model.model.multi_modal_projector
    trees = Kept(seed + scenes_seen)
    scale = symbols(torch.from_numpy(trees.trees[0].cells)).var()
    learning = [projector, model.model.language_model]
    parameters = [parameter for module in learning for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=7e-4 if from_symbols else 4e-4, weight_decay=0.02, betas=(0.9, 0.98)
    )

    def loss(batch: dict[str, Tensor], share: float) -> tuple[Tensor, dict[str, float]]:
        image_tokens = projector(batch["seen"].float()).float()
        if not from_symbols:
            return dialogues.loss(batch, image_tokens)
        error = (image_tokens - symbols(batch["cells"]).float()).square().mean(-1) / scale
        filled = batch["cells"][..., 0] > 0
        regression = error[filled].mean() + error[~filled].mean()
        if share < 0.1:
            return regression, {"regression": regression.item()}
        answers, right = dialogues.loss(batch, image_tokens)
        return answers + 0.3 * regression, {"regression": regression.item(), **right}

    def save(samples: int) -> None:
        torch.save({"samples": samples, "model": model.state_dict()}, path)

    loader = DataLoader(trees, batch_size=TREES, collate_fn=collate)
    train(size, minutes, scenes_seen, learning, optimizer, loader, TREES, loss, save)


def save(size: str) -> None:
    """Write the latest weights of `train_dialogues` as a checkpoint folder."""
    tokenizer = nano.build_tokenizer()
    model = nano.build_model(tokenizer, size, 0)
    model.load_state_dict(torch.load(RUNS / f"{size}.pt")["model"])
    nano.save_checkpoint(model, tokenizer, size, CHECKPOINTS / size)


def load(size: str) -> None:
    """Take a checkpoint back into `RUNS`, where the later stages find its tower and its decoder.

    The heads that the tower was trained with are not in a checkpoint: `tower` cannot go on from one. What is
    there already is not replaced; other sizes can follow, since they share the tower.
    """
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINTS / size, dtype=torch.float32)
    tower, path = model.model.vision_tower.state_dict(), RUNS / "tower.pt"
    if (RUNS / f"{size}.pt").exists():
        sys.exit(f"{RUNS} holds a {size} already, expected none")
    if not path.exists():
        torch.save({"samples": 0, "tower": tower}, path)
    elif any(not torch.equal(value, tower[name]) for name, value in torch.load(path)["tower"].items()):
        sys.exit(f"{RUNS} holds another tower than {CHECKPOINTS / size}, expected the same or none")
    torch.save({"samples": 0, "model": model.state_dict()}, RUNS / f"{size}.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["tower", "symbols", "trees", "dialogues", "save", "load"])
    parser.add_argument("--size", choices=nano.SIZES, default="nano", help="for dialogues, save, load (nano)")
    parser.add_argument("--minutes", type=float, default=20, help="how long to train (20)")
    parser.add_argument("--scenes", type=int, default=10_000, help="how many trees draws (10,000)")
    # of a million scenes each: those from `scenes.HELD_OUT` on no training sees
    parser.add_argument("--seed", type=int, default=1, choices=range(scenes.HELD_OUT // 1_000_000))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the stage's last save")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RUNS.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "tower":
        train_tower(arguments.minutes, arguments.seed, arguments.resume)
    elif arguments.stage == "symbols":
        train_symbols(arguments.minutes, arguments.seed, arguments.resume)
    elif arguments.stage == "trees":
        draw_trees(arguments.scenes, arguments.seed)
    elif arguments.stage == "dialogues":
        train_dialogues(arguments.size, arguments.minutes, arguments.seed, arguments.resume)
    elif arguments.stage == "save":
        save(arguments.size)
    else:
        load(arguments.size)
