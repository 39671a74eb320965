"""The drawn scenes, their curation, and the exactness of what nano is trained on."""

import copy
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dualfocus.export import export_bundle
from dualfocus.export.nano_tower import NanoVisionConfig, NanoVisionModel
from dualfocus.runtime import Bundle, DualFocus
from dualfocus.train import curate, nano, recipe, scenes

WHOLE_VIEW_PIXELS = nano.IMAGE.size


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_scene_is_what_its_description_says(seed: int, unseen: bool) -> None:
    scene = scenes.layout(seed, unseen=unseen)
    assert scene == scenes.layout(seed, unseen=unseen)
    picture = scenes.draw(scene)
    assert picture.size == (scene.width, scene.height)
    assert picture.mode == "RGB"
    assert picture.tobytes() == scenes.draw(scene).tobytes()
    longer = max(picture.size)
    assert 800 <= longer <= 1600
    assert min(picture.size) >= 400
    assert 1 <= len(scene.things) <= 7
    for i, thing in enumerate(scene.things):
        assert 0.01 * longer <= thing.cap <= 0.02 * longer
        # three view pixels at most: no whole-picture view resolves a label
        assert thing.cap / longer * WHOLE_VIEW_PIXELS < 3.3
        x0, y0, x1, y1 = thing.box
        assert x0 >= 0
        assert y0 >= 0
        assert x1 <= scene.width
        assert y1 <= scene.height
        for other in scene.things[:i]:
            assert max(abs(thing.x - other.x), abs(thing.y - other.y)) > 0.5 * (thing.size + other.size)


def test_what_is_unseen_is_nowhere_in_training() -> None:
    assert not set(scenes.FONTS) & set(scenes.UNSEEN_FONTS)
    assert not set(scenes.PHOTOGRAPHS) & set(scenes.UNSEEN_PHOTOGRAPHS)
    shapes = [{scene.width / scene.height for scene in map(lay_out, range(60))} for lay_out in (seen, unseen)]
    assert max(*shapes[0], *(1 / shape for shape in shapes[0])) < 1.8
    assert min(max(shape, 1 / shape) for shape in shapes[1]) > 1.99


def seen(seed: int) -> scenes.Scene:
    return scenes.layout(seed)


def unseen(seed: int) -> scenes.Scene:
    return scenes.layout(seed, unseen=True)


def test_frequent_kinds_are_met_more_often() -> None:
    met = Counter(thing.kind for seed in range(400) for thing in scenes.layout(seed).things)
    assert set(met) == set(scenes.KINDS)
    assert met["circle"] > 1.5 * met["drop"]


def test_different_seeds_draw_different_pictures() -> None:
    pictures = {scenes.draw(scenes.layout(seed)).tobytes() for seed in range(5)}
    assert len(pictures) == 5


@pytest.mark.parametrize("seed", range(20))
def test_annotations_are_visual_genomes(seed: int) -> None:
    scene = scenes.layout(seed)
    records = scenes.annotate(scene, 7)
    assert records["image_data"] == {"image_id": 7, "width": scene.width, "height": scene.height, "url": ""}
    objects = records["objects"]["objects"]
    assert [o["names"] for o in objects] == [[t.kind] for t in scene.things]
    assert [o["attributes"] for o in records["attributes"]["attributes"]] == [
        [t.colour] for t in scene.things
    ]
    regions = {r["region_id"]: r for r in records["region_descriptions"]["regions"]}
    qas = records["question_answers"]["qas"]
    assert len({qa["qa_id"] for qa in qas}) == len(qas)
    assert set(records["qa_to_region_mapping"]) == {str(qa["qa_id"]) for qa in qas}
    assert set(records["qa_to_region_mapping"].values()) <= set(regions)
    known = {o["object_id"] for o in objects}
    assert {o["object_id"] for qa in qas for o in qa["q_objects"]} <= known


EXTREMES: dict[str, Callable[[tuple[scenes.Thing, ...]], scenes.Thing]] = {
    "leftmost": lambda things: min(things, key=lambda t: t.x),
    "rightmost": lambda things: max(things, key=lambda t: t.x),
    "topmost": lambda things: min(things, key=lambda t: t.y),
    "lowest": lambda things: max(things, key=lambda t: t.y),
}


@pytest.mark.parametrize("seed", range(20))
def test_curated_answers_are_true(seed: int) -> None:
    scene = scenes.layout(seed)
    for dialogue in curate.dialogues(scenes.annotate(scene, 0)):
        question, answer = dialogue.question, dialogue.answer
        words = question.rstrip("?").split()
        if words[-1] == "object" and words[-2] in EXTREMES:
            thing = EXTREMES[words[-2]](scene.things)
            said = {"written": thing.label, "color": thing.colour, "shape": thing.kind}
            assert answer == next(value for word, value in said.items() if word in words)
            assert dialogue.box == tuple(round(v) for v in thing.box)
        elif "character" in words:
            (thing,) = [t for t in scene.things if words[-2:] == [t.colour, t.kind]]
            assert answer == thing.label[{"first": 0, "last": 2}[words[3]]]
        elif question.startswith("What is written on"):
            (thing,) = [t for t in scene.things if words[-2:] == [t.colour, t.kind]]
            assert answer == thing.label
            assert dialogue.box == tuple(round(v) for v in thing.box)
        elif question.startswith("What color"):
            (thing,) = [t for t in scene.things if t.kind == words[-1]]
            assert answer == thing.colour
        elif question.startswith("What shape"):
            (thing,) = [t for t in scene.things if t.colour == words[-2]]
            assert answer == thing.kind
        elif question.startswith("Is there"):
            present = any(words[-2:] == [t.colour, t.kind] for t in scene.things)
            assert answer == ("yes" if present else "no")
        elif question.startswith("How many"):
            asked = words[2] if words[3] == "objects" else words[2][:-1]
            assert answer == str(sum(asked in (t.colour, t.kind) for t in scene.things))
        else:
            (one,) = [t for t in scene.things if words[2:4] == [t.colour, t.kind]]
            (other,) = [t for t in scene.things if words[-2:] == [t.colour, t.kind]]
            true = {"left": one.x < other.x, "above": one.y < other.y, "larger": one.size > other.size}
            assert answer == ("yes" if true[words[4]] else "no")


def test_ambiguous_questions_are_dropped() -> None:
    base = scenes.layout(3)
    thing = dataclasses.replace(base.things[0], kind="star", colour="red")
    twin = dataclasses.replace(base.things[1], kind="star", colour="red")
    other = dataclasses.replace(base.things[2], kind="star", colour="blue")

    def kept(*things: scenes.Thing) -> set[str]:
        return {
            d.question for d in curate.dialogues(scenes.annotate(dataclasses.replace(base, things=things), 0))
        }

    assert {"What is written on the red star?", "What color is the star?"} <= kept(thing)
    two_stars = kept(thing, other)
    assert {"What is written on the red star?", "What is written on the blue star?"} <= two_stars
    assert "What color is the star?" not in two_stars
    twins = kept(thing, twin)
    assert (
        not {"What is written on the red star?", "Is there a red star?", "What shape is the red object?"}
        & twins
    )
    assert any(question.startswith("How many") for question in twins)


def test_a_question_without_a_region_falls_back_on_its_objects() -> None:
    records = copy.deepcopy(scenes.annotate(scenes.layout(1), 0))
    kept = {d.question: d for d in curate.dialogues(records)}
    records["qa_to_region_mapping"].clear()
    without = curate.dialogues(records)
    absent = [d for d in kept.values() if d.answer in ("no", "0") and d.category in ("existence", "count")]
    assert absent
    assert {d.question for d in without} == kept.keys() - {d.question for d in absent}
    assert [d for d in without if d.category == "detail"] == [
        d for d in kept.values() if d.category == "detail"
    ]


@pytest.mark.parametrize("seed", range(10))
def test_cells_say_what_the_view_shows(seed: int) -> None:
    scene = scenes.layout(seed)
    whole = nano.view_cells(scene, (0, 0, scene.width, scene.height))
    filled = whole[whole[:, 0] > 0]
    assert len(filled) <= len(scene.things)
    assert {(scenes.KINDS[k - 1], list(scenes.COLOURS)[c - 1]) for k, c in filled[:, :2]} <= {
        (t.kind, t.colour) for t in scene.things
    }
    assert (filled[:, 6:] == 0).all()  # no label is legible in the whole picture
    for thing in scene.things:
        crop = recipe.crop_of(scene, nano.box_text(scene, thing.box))
        cells = nano.view_cells(scene, crop)
        spelled = ["".join(scenes.ALPHABET[c - 1] for c in cell[6:]) for cell in cells if cell[6] > 0]
        assert thing.label in spelled


def test_tokenizer_reads_back_what_it_wrote() -> None:
    tokenizer = nano.build_tokenizer()
    for text in (
        "USER: What is written on the red star? ASSISTANT: K7P",
        "naïve 12.34 Größe\n[0.5, x]",
        "日本",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.encode(text).ids == [tokenizer.token_to_id("<s>"), *ids]
    box = tokenizer.encode(" [0.12, 0.34, 0.56, 1.00]", add_special_tokens=False)
    assert len(box.ids) == 9
    assert len(tokenizer.encode(" K7P", add_special_tokens=False).ids) == 3


def test_a_tree_trains_what_its_dialogues_would_one_by_one() -> None:
    """Logits at every target of a tree equal those of the whole dialogue fed alone."""
    trees = recipe.Trees(0, pixels=True)
    model = nano.build_model(trees.tokenizer, "nano", 0).eval()
    dialogues = recipe.Dialogues(model, trees.tokenizer)
    tree = trees.tree(5)
    batch = recipe.collate([trees.tree(4), tree])
    with torch.no_grad():
        image_tokens = model.get_image_features(pixel_values=recipe.normalise(batch["seen"]))
        image_tokens = torch.stack(list(image_tokens))
        together, seen = dialogues.loss(batch, image_tokens)
        decoder, losses, weights = model.model.language_model, [], []
        first = 0
        for one in (trees.tree(4), tree):
            tokens = image_tokens[first : first + len(one.cells)].flatten(0, 1)
            first += len(one.cells)
            for rows in one.branches:
                for row in rows:
                    columns = torch.from_numpy(np.concatenate([one.prefix, row]))
                    embeds = decoder.embed_tokens(columns[:, 0])
                    here = columns[:, 0] == model.config.image_token_id
                    embeds[here] = tokens[columns[here, 1]]
                    logits = model.lm_head(decoder(inputs_embeds=embeds[None]).last_hidden_state[0])
                    wanted = columns[:, 2] >= 0
                    weight = dialogues.weights[columns[wanted, 3]]
                    likely = logits[wanted].log_softmax(-1)
                    losses.append(-(dialogues.soft[columns[wanted, 2]] * likely).sum(-1) * weight)
                    weights.append(weight)
    alone = torch.cat(losses).sum() / torch.cat(weights).sum()
    assert torch.allclose(together - recipe.POINTING * seen["pointing"], alone, atol=1e-4)


@pytest.mark.slow
def test_the_recipe_runs_from_nothing_to_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second or two of every stage, resumed: what comes out answers, however badly, in every size."""
    monkeypatch.setattr(recipe, "RUNS", tmp_path)
    monkeypatch.setattr(recipe, "CHECKPOINTS", tmp_path / "checkpoints")
    for resume in (False, True):
        recipe.train_tower(0.03, 1, resume)
        recipe.train_symbols(0.03, 1, resume)
    curve = [json.loads(line) for line in (tmp_path / "symbols.jsonl").read_text().splitlines()]
    assert curve[-1]["samples"] > curve[0]["samples"]
    recipe.draw_trees(10, 1)
    scene = scenes.layout(scenes.HELD_OUT)
    for size, layers in nano.SIZES.items():
        for resume in (False, True):
            recipe.train_dialogues(size, 0.03, 1, resume)
        assert torch.load(tmp_path / f"{size}.pt")["samples"] > recipe.TREES
        recipe.save(size)
        export_bundle(tmp_path / "checkpoints" / size, tmp_path / size, progress=lambda _: None)
        bundle = Bundle.open(tmp_path / size, threads=1)
        assert (bundle.manifest.name, bundle.manifest.decoder.layers) == (size, layers)
        result = DualFocus(bundle).ask(np.asarray(scenes.draw(scene)), "Is there a red star?")
        assert result.macro is not None
    with pytest.raises(SystemExit, match="holds a nano already"):
        recipe.load("nano")
    (tmp_path / "nano.pt").unlink()
    torch.save({"tower": NanoVisionModel(NanoVisionConfig()).state_dict()}, tmp_path / "tower.pt")
    with pytest.raises(SystemExit, match=r"holds another tower than .*nano, expected the same or none"):
        recipe.load("nano")
    assert not (tmp_path / "nano.pt").exists()


def test_a_checkpoint_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "RUNS", tmp_path)
    recipe.load("nano")
    recipe.load("nano-s")  # which shares the tower
    recipe.draw_trees(2 * recipe.TREES, 1)
    kept = load_file(recipe.CHECKPOINTS / "nano" / "model.safetensors")
    loaded = torch.load(tmp_path / "nano.pt")["model"]
    for name in ("tower", "features"):
        found = torch.load(tmp_path / f"{name}.pt")
        tower = found.get("tower", found)
        assert all(torch.equal(tower[part].half(), kept[f"vision_tower.{part}"]) for part in tower)
    recipe.train_dialogues("nano", 0.03, 1, resume=True)
    gone_on = torch.load(tmp_path / "nano.pt")["model"]
    assert gone_on.keys() == loaded.keys()
    changed = {name for name in loaded if not torch.equal(gone_on[name], loaded[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_a_size_starts_from_what_another_learned() -> None:
    """Layers that nano lacks add nothing at first: nano-l says what nano says."""
    tokenizer = nano.build_tokenizer()
    learned = nano.build_model(tokenizer, "nano", 0).eval()
    with torch.no_grad():  # as after training: no layer adds nothing any more
        for parameter in learned.model.language_model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    larger = nano.build_model(tokenizer, "nano-l", 1).eval()
    recipe.take_over(larger, learned.state_dict())
    tokens = torch.arange(5, 50)[None]
    with torch.no_grad():
        assert torch.equal(
            larger.model.language_model(tokens).last_hidden_state,
            learned.model.language_model(tokens).last_hidden_state,
        )
    smaller = nano.build_model(tokenizer, "nano-s", 1)
    recipe.take_over(smaller, learned.state_dict())
    kept = smaller.model.language_model.layers[2].mlp.down_proj.weight
    assert torch.equal(kept, learned.model.language_model.layers[2].mlp.down_proj.weight)


def test_kept_trees_carry_what_the_tower_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "RUNS", tmp_path)
    tower = NanoVisionModel(NanoVisionConfig()).eval()
    torch.save({"tower": tower.state_dict()}, tmp_path / "tower.pt")
    recipe.draw_trees(3, 1)
    kept = list(itertools.islice(recipe.Kept(0), 6))
    for round_ in (kept[:3], kept[3:]):
        for seed in (1_500_000, 1_500_001, 1_500_002):
            tree = recipe.Trees(0, pixels=True).tree(seed)
            (same,) = (one for one in round_ if np.array_equal(one.cells, tree.cells))
            with torch.no_grad():
                seen = tower(recipe.normalise(torch.from_numpy(tree.seen))).last_hidden_state
            assert np.allclose(same.seen, seen.numpy(), atol=0.05)  # in bfloat16
