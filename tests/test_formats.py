"""Every published format of checkpoint: exported, and held to transformers' own class with the same weights.

The bundle of an original checkpoint is compared with Hugging Face's folder of the same model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import formats
import msgspec
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from test_parity import check_parity, picture
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from dualfocus import cli
from dualfocus.bench import layouts
from dualfocus.export import ExportError, config, export_bundle
from dualfocus.export import checkpoint as checkpoints
from dualfocus.export.weights import StoredWeights
from dualfocus.runtime.manifest import Prompts
from dualfocus.runtime.turns import CHATML, DUALFOCUS

WORDS = [
    "what", "is", "the", "number", "of", "a", "red", "sign", "on", "left", "bus", "near", "12", "dogs,",
    "written", "above", "it", "and", "who", "holds",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: dict[str, Any]
    write: dict[str, Any]
    fit: str
    coordinates: str = "padded"
    tower: dict[str, Any] = field(default_factory=dict)  # how a tower's own folder is written
    place: str = ""  # and where it is
    prompts: Prompts = DUALFOCUS


SHARDS = {"shard_bytes": 100_000}
HALF, BRAIN = {"dtype": torch.float16}, {"dtype": torch.bfloat16}
SIGLIP = {"tower": "siglip", "layer": -1, "strategy": "full"}

HUGGING_FACE = {
    "llava-1.5": Case(HALF, {"before": True} | SHARDS, "crop"),
    "since 4.52": Case({"tied": True, "layer": [-1, 2, -2]}, {"processor": "llava, padding"}, "pad"),
    "qwen2 and siglip": Case(
        {"decoder": "qwen2", "tied": True} | SIGLIP | BRAIN,
        {"before": True, "processor": "siglip"},
        "stretch",
        "original",
        prompts=CHATML,
    ),
    "mistral in bin shards": Case(
        {"decoder": "mistral", "layer": 1, "strategy": "full"} | BRAIN,
        {"before": True, "kind": "bin"} | SHARDS,
        "crop",
    ),
    "old bin": Case(
        {"decoder": "qwen2", **HALF},
        {"kind": "old bin", "processor": "llava, padding, both sides"},
        "pad",
        prompts=CHATML,
    ),
    "old bin shards": Case({"tied": True, "layer": -3}, {"before": True, "kind": "old bin"} | SHARDS, "crop"),
    "mistral and siglip": Case(
        {"decoder": "mistral", "tied": True} | SIGLIP | HALF,
        {"kind": "bin", "processor": "siglip"},
        "stretch",
        "original",
    ),
    "qwen2 in shards": Case(
        {"decoder": "qwen2", "layer": [-2, -1], "strategy": "full"},
        {"processor": "clip, both sides"} | SHARDS,
        "stretch",
        "original",
        prompts=CHATML,
    ),
}
ORIGINAL = {
    "tower inside": Case(HALF, {"tower_name": "our-clip"}, "pad", tower={"whole": False}, place="beside"),
    "tower in the cache": Case(
        BRAIN,
        {"tower_inside": False, "kind": "bin", "shard_bytes": None, "tokenizer": "true"},
        "pad",
        tower={"whole": True},
        place="cache",
    ),
    "tower anywhere": Case(
        {"layer": -1, "strategy": "full"},
        {
            "tower_inside": False,
            "kind": "safetensors",
            "mm_vision_select_feature": "cls_patch",
            "model_type": "llava_llama",
            "image_aspect_ratio": "square",
        },
        "crop",
        tower={"whole": True, "kind": "safetensors"},
        place="path",
    ),
    "old bin": Case(
        HALF,
        {"tower_inside": False, "kind": "old bin"},
        "pad",
        tower={"whole": False, "kind": "old bin"},
        place="beside",
    ),
}


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No Hub, and an empty cache of it, which is returned."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[StoredWeights]:
    """The weights that exports read, in order."""
    found: list[StoredWeights] = []

    class Noted(StoredWeights):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(checkpoints, "StoredWeights", Noted)
    return found


def asked(seed: int, count: int = 4) -> list[Any]:
    """Pictures, questions and boxes that nothing was exported or tried with."""
    draw = random.Random(seed)
    pairs = []
    for i in range(count):
        question = " ".join(draw.choices(WORDS, k=draw.randint(2, 9))) + "?"
        left, upper = draw.uniform(0, 0.6), draw.uniform(0, 0.6)
        box = f"[{left:.2f}, {upper:.2f}, {left + 0.3:.2f}, {upper + 0.35:.2f}]"
        sides = draw.randint(90, 500), draw.randint(90, 500)
        pairs.append((picture(seed + i, *sides), question, box))
    return [*pairs, (*pairs[-1][:2], None)]  # and once what the model itself replies to the locate turn


def check(
    case: Case, model: formats.Model, exported: Path, twin: Path, opened: list[StoredWeights], **options: Any
) -> None:
    """Export `exported` and compare it with transformers on `twin`; every tensor is read once."""
    bundle = exported.parent / "bundle"
    manifest = export_bundle(exported, bundle, progress=quiet, **options)
    assert set(opened[-1].reads) == set(model.tensors)
    assert set(opened[-1].reads.values()) == {1}
    assert (manifest.image.fit, manifest.coordinates, manifest.prompts) == (
        case.fit,
        case.coordinates,
        case.prompts,
    )
    assert manifest.tokens.eos == tuple(model.ends)
    assert manifest.tokens.bos == model.vocabulary.bos
    is_half = case.model.get("dtype") == torch.float16
    table = np.load(bundle / "embeddings.npy")
    assert table.dtype == (np.float16 if is_half else np.float32)
    expected = model.tensors["model.language_model.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(table.astype(np.float32), expected)
    pairs = asked(zlib.crc32(f"{case.model} {case.write}".encode()))
    tally = check_parity(twin, bundle, pairs)
    print(tally)
    assert tally.tokens > 4 * len(pairs)
    assert tally.losses > len(pairs)
    assert len(tally.ties) <= 1, tally


# ---- formats


# Names since transformers 4.52, and the same tensors' before, and in the original LLaVA's files.
PUBLISHED = {
    "model.language_model.embed_tokens.weight": (
        "language_model.model.embed_tokens.weight",
        "model.embed_tokens.weight",
    ),
    "model.language_model.layers.0.self_attn.q_proj.weight": (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ),
    "model.language_model.layers.0.mlp.down_proj.weight": (
        "language_model.model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ),
    "model.language_model.norm.weight": ("language_model.model.norm.weight", "model.norm.weight"),
    "lm_head.weight": ("language_model.lm_head.weight", "lm_head.weight"),
    "model.multi_modal_projector.linear_1.weight": (
        "multi_modal_projector.linear_1.weight",
        "model.mm_projector.0.weight",
    ),
    "model.multi_modal_projector.linear_2.bias": (
        "multi_modal_projector.linear_2.bias",
        "model.mm_projector.2.bias",
    ),
    "model.vision_tower.vision_model.embeddings.class_embedding": (
        "vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
    ),
    "model.vision_tower.vision_model.pre_layrnorm.weight": (
        "vision_tower.vision_model.pre_layrnorm.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
    ),
}


def test_layouts_are_the_published_ones() -> None:
    for name, published in PUBLISHED.items():
        assert (layouts.hugging_face_before(name), layouts.original(name)) == published
    (last,) = list(PUBLISHED)[-1:]
    assert layouts.tower(last) == "vision_model.pre_layrnorm.weight"


@pytest.mark.parametrize("case", HUGGING_FACE.values(), ids=HUGGING_FACE)
def test_hugging_face(case: Case, tmp_path: Path, opened: list[StoredWeights]) -> None:
    model = formats.make(**case.model)
    folder = formats.hugging_face(tmp_path / "checkpoint", model, **case.write)
    check(case, model, folder, folder, opened)


@pytest.mark.parametrize("case", ORIGINAL.values(), ids=ORIGINAL)
def test_original(case: Case, tmp_path: Path, opened: list[StoredWeights], offline: Path) -> None:
    model = formats.make(**case.model)
    twin = formats.hugging_face(tmp_path / "twin", model)
    folder = formats.original(tmp_path / "checkpoint", model, **case.write)
    name, options = case.write.get("tower_name", formats.CLIP_NAME), {}
    if case.place == "beside":
        at = tmp_path / Path(name).name
    elif case.place == "path":
        at = tmp_path / "somewhere" / "tower"
        options = {"vision_tower": str(at)}
    else:
        repository = offline / f"models--{name.replace('/', '--')}"
        at = repository / "snapshots" / "0123abc"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0123abc")
    formats.tower(at, model, **case.tower)
    check(case, model, folder, twin, opened, **options)


def test_tower_that_is_only_in_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[StoredWeights]
) -> None:
    """No folder of it anywhere: what is published of the one tower of all LLaVA-1.5 goes for it."""
    model = formats.make()
    known = checkpoints.KNOWN_TOWER_CONFIG
    monkeypatch.setattr(
        checkpoints,
        "KNOWN_TOWER_CONFIG",
        {key: getattr(model.config.vision_config, key) for key in known},
    )
    sizes = {"crop_size": formats.SIZE, "size": formats.SIZE}
    processor = msgspec.structs.replace(checkpoints.KNOWN_TOWER_PROCESSOR, **sizes)
    monkeypatch.setattr(checkpoints, "KNOWN_TOWER_PROCESSOR", processor)
    twin = formats.hugging_face(tmp_path / "twin", model)
    folder = formats.original(tmp_path / "checkpoint", model)
    check(Case({}, {}, "pad"), model, folder, twin, opened)


def test_known_tower_is_clips() -> None:
    from transformers import CLIPVisionConfig

    clip = CLIPVisionConfig(**checkpoints.KNOWN_TOWER_CONFIG)
    assert (clip.hidden_act, clip.layer_norm_eps, clip.num_channels) == ("quick_gelu", 1e-5, 3)
    published = formats.PUBLISHED_CLIP | {"crop_size": 336, "size": 336}
    del published["feature_extractor_type"]
    assert published == config.fields(checkpoints.KNOWN_TOWER_PROCESSOR)


def test_given_tower_goes_before_the_one_inside(tmp_path: Path) -> None:
    inside, given = formats.make(seed=1), formats.make(seed=2)
    folder = formats.original(tmp_path / "checkpoint", inside)
    tower = formats.tower(tmp_path / "given", given, whole=True)
    loaded = checkpoints.load(folder, vision_tower=str(tower))
    for name, tensor in given.tensors.items():
        if "vision_tower" in name:
            assert torch.equal(loaded.weights.read(name), tensor)
    name = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(loaded.weights.read(name), inside.tensors[name])


def test_configuration_of_transformers_5(tmp_path: Path, opened: list[StoredWeights]) -> None:
    """Its rope's base and type are one entry, and its image processor is in processor_config.json."""
    model = formats.make("qwen2")
    twin = formats.hugging_face(tmp_path / "twin", model)
    folder = formats.hugging_face(tmp_path / "checkpoint", model)
    raw = read(folder / "config.json")
    text = raw["text_config"]
    del text["rope_scaling"]
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    formats.write_json(folder / "config.json", raw)
    processor = read(folder / "preprocessor_config.json")
    formats.write_json(folder / "processor_config.json", {"image_processor": processor})
    (folder / "preprocessor_config.json").unlink()
    check(Case({}, {}, "crop", prompts=CHATML), model, folder, twin, opened)


def test_files_of_transformers_5(tmp_path: Path, opened: list[StoredWeights]) -> None:
    """As 5.24 saves a checkpoint: a tokenizer's class that 4 does not know, special tokens in a list, and the
    image processor in another file.
    """
    model = formats.make("qwen2", "siglip", layer=-1, strategy="full", tied=True)
    twin = formats.hugging_face(tmp_path / "twin", model, processor="siglip")
    folder = formats.hugging_face(tmp_path / "checkpoint", model, processor="siglip")
    raw = read(folder / "config.json")
    text = raw["text_config"]
    del text["rope_scaling"]
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    text |= {
        "eos_token_id": None,
        "pruned_heads": {},
        "use_bfloat16": False,
        "layer_types": ["full_attention"] * 2,
    }
    formats.write_json(folder / "config.json", raw | {"dtype": "float32", "transformers_version": "5.24.0"})
    processor = read(folder / "preprocessor_config.json") | {"do_convert_rgb": None}
    nested = {"image_processor": processor, "image_token": "<image>", "patch_size": None}
    formats.write_json(folder / "processor_config.json", nested)
    names = [
        "preprocessor_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
    ]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    tokenizer = {
        "backend": "tokenizers",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"],
        "is_local": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "TokenizersBackend",
    }
    formats.write_json(folder / "tokenizer_config.json", tokenizer)
    check(Case({}, {}, "stretch", "original", prompts=CHATML), model, folder, twin, opened)


@pytest.mark.parametrize("architectures", [None, [], ...])
@pytest.mark.parametrize("write", [formats.hugging_face, formats.original])
def test_no_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path], architectures: Any
) -> None:
    """Then the model's type says which of the two it is."""
    model = formats.make()
    known = checkpoints.KNOWN_TOWER_CONFIG
    sizes = {key: getattr(model.config.vision_config, key) for key in known}
    monkeypatch.setattr(checkpoints, "KNOWN_TOWER_CONFIG", sizes)
    folder = write(tmp_path / "checkpoint", model)
    raw = read(folder / "config.json")
    expected = raw.pop("architectures")
    formats.write_json(
        folder / "config.json", raw if architectures is ... else raw | {"architectures": architectures}
    )
    assert [checkpoints.load(folder).architecture] == expected


# ---- how a reply ends


def ended(folder: Path, ends: Any) -> Any:
    """The manifest of the checkpoint whose generation_config.json lists those ends."""
    formats.write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return checkpoints.describe(checkpoints.load(folder), ragged_append=True)


def test_an_end_that_qwen2_does_not_list(tmp_path: Path) -> None:
    """<|endoftext|> ends a document, <|im_end|> a reply: first, alone, or last, the latter is one."""
    model = formats.make("qwen2")
    folder = formats.hugging_face(tmp_path / "checkpoint", model)
    document, reply = model.vocabulary.pad, model.vocabulary.eos
    for listed in ([document, reply], document, [document], [reply, document], reply):
        manifest = ended(folder, listed)
        assert manifest.prompts == CHATML
        listed = [listed] if isinstance(listed, int) else listed
        assert manifest.tokens.eos == tuple(listed if reply in listed else [*listed, reply])


def test_llamas_end_stays_llamas(tmp_path: Path) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", formats.make())
    manifest = ended(folder, [24, 2])
    assert (manifest.prompts, manifest.tokens.eos) == (DUALFOCUS, (24, 2))
    manifest = ended(folder, 24)
    assert (manifest.prompts, manifest.tokens.eos) == (DUALFOCUS, (24, 2))


def test_ends_that_are_none(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    for listed, message in {
        "2": "generation_config.json: eos_token_id: expected `int . array . null`, got `str`",
        "[2.5]": r"generation_config.json: eos_token_id.*: expected `int`, got `float`",
        "[]": "names no end-of-sequence token",
        "705": "eos_token_id holds 705, expected ids of the model's 705 tokens",
        "[2, -1]": "eos_token_id holds -1, expected ids of the model's 705 tokens",
        "1000000000000": "eos_token_id: expected `int` <=",
    }.items():
        text = f'"{listed}"' if listed == "2" else listed
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {text}}}')
        refused(folder, message)


@cache
def llama3() -> formats.Vocabulary:
    """A tokenizer whose special tokens are Llama 3's."""
    named = {
        "<|endoftext|>": "<|begin_of_text|>",
        "<|im_start|>": "<|end_of_text|>",
        "<|im_end|>": "<|eot_id|>",
    }
    model = formats.qwen2()
    text = json.dumps(model.files["tokenizer.json"])
    for old, new in named.items():
        text = text.replace(old, new)
    stored = json.loads(text)
    opening = stored["added_tokens"][0]["id"]
    special = {"id": "<|begin_of_text|>", "ids": [opening], "tokens": ["<|begin_of_text|>"]}
    stored["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|begin_of_text|>": special},
            },
        ],
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    }
    files = {"tokenizer.json": stored, "tokenizer_config.json": config}
    ends = opening + 1, opening + 2
    return formats.Vocabulary(files, model.size, model.image, opening, ends[0], ends[1])


def test_llama_3_needs_prompts_of_its_own(tmp_path: Path, small: formats.Model) -> None:
    words = llama3()
    folder = formats.hugging_face(tmp_path / "checkpoint", dataclasses.replace(small, vocabulary=words))
    for name in ("tokenizer.model", "special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    ends = [words.eos, words.pad]
    formats.write_json(folder / "generation_config.json", {"eos_token_id": ends})
    refused(
        folder,
        r"ends its replies with '<.end_of_text.>', '<.eot_id.>', and no prompts for that are known: put "
        r'dualfocus.json into .* "reply": "{answer}<.eot_id.>"}}',
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    prompts = {
        "system": "",
        "user": f"{head.format('user')}{{turn}}<|eot_id|>{head.format('assistant')}",
        "reply": "{answer}<|eot_id|>",
    }
    formats.write_json(folder / "dualfocus.json", {"prompts": prompts})
    manifest = checkpoints.describe(checkpoints.load(folder), ragged_append=True)
    assert (manifest.tokens.bos, manifest.tokens.eos) == (words.bos, tuple(ends))
    assert manifest.prompts == dataclasses.replace(DUALFOCUS, **prompts)


def test_the_help_names_the_file() -> None:
    shown = CliRunner().invoke(cli.app, ["export", "--help"], env={"COLUMNS": "200"}).stdout
    assert "dualfocus.json" in shown


# ---- sizes of pictures


@pytest.mark.parametrize(
    ("processor", "changes", "fit"),
    [
        ("clip", {"crop_size": [56, 56]}, "crop"),
        ("clip", {"crop_size": [56]}, "crop"),
        ("clip", {"crop_size": 56, "size": 56}, "crop"),
        ("clip", {"size": {"shortest_edge": 56, "longest_edge": None}}, "crop"),
        ("clip", {"size": [56, 56]}, "stretch"),
        ("clip", {"size": {"height": 56, "width": 56}}, "stretch"),
        ("siglip", {"size": 56}, "stretch"),
        ("siglip", {"size": [56, 56]}, "stretch"),
    ],
)
def test_sizes_as_they_are_written(tmp_path: Path, processor: str, changes: dict[str, Any], fit: str) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", formats.make(), processor=processor)
    edit(folder / "preprocessor_config.json", **changes)
    image = checkpoints.describe(checkpoints.load(folder), ragged_append=True).image
    assert (image.size, image.fit) == (56, fit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": [56, 64]}, "crop_size is 56 x 64, expected the tower's 56"),
        ({"size": 64}, "size is 64, expected the tower's 56"),
        ({"size": "56"}, "size: expected `int . object . array . null`, got `str`"),
        ({"size": [56, 56, 56]}, "size: expected `array` of length <= 2"),
        ({"size": []}, "size: expected `array` of length >= 1"),
        ({"size": {"height": "56", "width": 56}}, "size.height: expected `int . null`, got `str`"),
        ({"size": 10**12}, "size: expected `int` <="),
        ({"image_mean": 0.5}, "image_mean: expected `array`, got `float`"),
        ({"image_mean": [0.5, 0.5]}, "image_mean: expected `array` of length >= 3"),
        ({"image_mean": ["0.5"] * 3}, r"image_mean\[0\]|image_mean.*: expected `float`, got `str`"),
        ({"rescale_factor": [1]}, "rescale_factor: expected `float . null`, got `array`"),
        ({"resample": 10**30}, "resample: expected `int` <= 16"),
        ({"do_rescale": None}, "do_rescale is None, expected True"),
        ({"do_normalize": "no"}, "do_normalize: expected `bool . null`, got `str`"),
    ],
)
def test_sizes_that_are_none(
    tmp_path: Path, small: formats.Model, changes: dict[str, Any], message: str
) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    edit(folder / "preprocessor_config.json", **changes)
    refused(folder, message)


# ---- numbers that no model has


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        (
            "text_config",
            {"num_hidden_layers": 10**9},
            "text_config.num_hidden_layers: expected `int` <= 1024",
        ),
        (
            "text_config",
            {"num_hidden_layers": 1000},
            "num_hidden_layers of the language model is 1000, .* have 2",
        ),
        (
            "text_config",
            {"num_hidden_layers": "2"},
            "text_config.num_hidden_layers: expected `int`, got `str`",
        ),
        ("text_config", {"vocab_size": 10**12}, "text_config.vocab_size: expected `int` <= "),
        ("text_config", {"vocab_size": 10**7}, r"has shape \(705, 64\), expected \(10000000, 64\)"),
        ("text_config", {"hidden_size": 10**6}, r"has shape \(705, 64\), expected \(705, 1000000\)"),
        ("text_config", {"intermediate_size": 10**7}, "has shape .* as the configuration says"),
        ("text_config", {"rms_norm_eps": [1e-5]}, "rms_norm_eps: expected `float`, got `array`"),
        ("text_config", {"rope_theta": 0}, "rope_theta: expected `float` > 0"),
        ("text_config", {"max_position_embeddings": 10**30}, "max_position_embeddings: expected `int` <= "),
        (
            "text_config",
            {"max_position_embeddings": 2**24},
            "max_position_embeddings: expected `int` <= 1048576",
        ),
        (
            "text_config",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' changes with",
        ),
        (
            "text_config",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' changes",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' ch",
        ),
        (
            "text_config",
            {"rope_scaling": {"rope_type": "new"}},
            "rope type 'new' is unknown|describes no model",
        ),
        (
            "vision_config",
            {"num_hidden_layers": 10**9},
            "expected `int` <=|vision tower is 1000000000, expected",
        ),
        (
            "vision_config",
            {"num_hidden_layers": 900},
            "num_hidden_layers of the vision tower is 900, .* have 4",
        ),
        ("vision_config", {"image_size": 10**9}, "expected `int` <= "),
        ("vision_config", {"image_size": 10**6}, "has shape .* as the configuration says|image_size"),
        ("vision_config", {"patch_size": 0}, "describes no "),
        ("vision_config", {"hidden_size": 1e300}, "expected `float` <= "),
        (None, {"vision_feature_layer": []}, "vision_feature_layer: expected `array` of length >= 1"),
        (None, {"vision_feature_layer": 10**9}, "vision_feature_layer: expected `int` <= "),
        (None, {"text_config": []}, "text_config: expected `object . null`, got `array`"),
        (None, {"vision_config": "clip"}, "vision_config: expected `object . null`, got `str`"),
    ],
)
def test_numbers_that_no_model_has(
    tmp_path: Path, small: formats.Model, place: str | None, changes: dict[str, Any], message: str
) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    raw = read(folder / "config.json")
    formats.write_json(folder / "config.json", raw | ({place: raw[place] | changes} if place else changes))
    refused(folder, message)


@pytest.mark.parametrize(
    ("place", "changes"),
    [("text_config", {"num_hidden_layers": 1024}), ("vision_config", {"num_hidden_layers": 1024})],
)
def test_sizes_are_compared_before_a_model_is_built(
    tmp_path: Path,
    small: formats.Model,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    changes: dict[str, Any],
) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    raw = read(folder / "config.json")
    edit(folder / "config.json", **{place: raw[place] | changes})
    monkeypatch.setattr(
        checkpoints, "LlavaForConditionalGeneration", lambda _: pytest.fail("a model was built")
    )
    refused(folder, "is 1024, the weights have")


@pytest.mark.parametrize("place", ["text_config", "vision_config", None])
def test_what_an_export_does_not_use_may_be_anything(
    tmp_path: Path, small: formats.Model, place: str | None
) -> None:
    """Labels by the million, among others, are none of a model's business."""
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    raw = read(folder / "config.json")
    unused = {
        "num_labels": 10**9,
        "id2label": {"0": [1]},
        "problem_type": 3,
        "torch_dtype": "no such",
        "a": [[[]]],
    }
    (raw if place is None else raw[place]).update(unused)
    formats.write_json(folder / "config.json", raw)
    edit(folder / "generation_config.json", top_k="many", max_length=10**30, eos_token_id=2)
    assert checkpoints.describe(checkpoints.load(folder), ragged_append=True).tokens.eos == (2,)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "dualfocus.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "not JSON|nested too deeply|expected `object`"),
        (b'{"a":' * 100_000, "not JSON|nested too deeply"),
        (b"[]", "expected `object`, got `array`"),
        (b"null", "expected `object`, got `null`"),
        (b'{"a": NaN}', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"", "is not JSON"),
    ],
    ids=["deep list", "deep object", "list", "null", "NaN", "UTF-16", "empty"],
)
def test_what_is_no_object(
    tmp_path: Path, small: formats.Model, name: str, content: bytes, message: str
) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    tokenizer = read(folder / "tokenizer_config.json")
    del tokenizer["added_tokens_decoder"]  # then the map of special tokens is read
    formats.write_json(folder / "tokenizer_config.json", tokenizer)
    (folder / name).write_bytes(content)
    refused(folder, f"{name}.*({message})")


def test_a_name_that_no_file_system_takes(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.original(tmp_path / "checkpoint", small, tower_inside=False, tower_name="t" * 4000)
    refused(folder, "needs the vision tower t{200}, expected beside it or as --vision-tower: no such folder")
    folder = formats.hugging_face(tmp_path / "sharded", small, **SHARDS)
    index = folder / "model.safetensors.index.json"
    edit(index, weight_map={"lm_head.weight": "s" * 400})
    refused(folder, "weight_map.*: expected `str` of length <= 255")


def test_an_index_may_list_what_no_model_needs(tmp_path: Path, small: formats.Model) -> None:
    """As shards of 2023 list a buffer that they lack."""
    folder = formats.hugging_face(tmp_path / "checkpoint", small, **SHARDS)
    index = folder / "model.safetensors.index.json"
    listed = read(index)["weight_map"]
    name = "model.language_model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(index, weight_map=listed | {name: min(listed.values())})
    loaded = checkpoints.load(folder)
    assert name not in loaded.weights.shapes
    assert torch.equal(loaded.weights.read("lm_head.weight"), small.tensors["lm_head.weight"])


@pytest.mark.parametrize(
    "changed",
    [torch.nn.Parameter, lambda tensor: torch.cat([tensor, tensor])[: len(tensor)]],
    ids=["parameters", "parts of larger ones"],
)
def test_tensors_as_scripts_leave_them(
    tmp_path: Path, changed: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = formats.make()
    folder = formats.hugging_face(tmp_path / "checkpoint", model, kind="bin")
    state = torch.nn.Module().state_dict()  # which carries more than tensors
    for name, tensor in model.tensors.items():
        wide = tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        state[name] = changed(wide)
    torch.save(state, folder / "pytorch_model.bin")
    loaded = checkpoints.load(folder)
    for name, tensor in model.tensors.items():
        got = loaded.weights.read(name)
        assert torch.equal(got, tensor)
        assert got.is_contiguous()
        assert not got.requires_grad
    export_bundle(folder, tmp_path / "bundle", progress=quiet)


def test_one_kind_of_weights_is_read(tmp_path: Path) -> None:
    """Of several in one folder, the one that transformers would take."""
    name, folder = "lm_head.weight", tmp_path / "checkpoint"
    for seed, write in enumerate(
        [
            {"kind": "bin"} | SHARDS,
            {"kind": "bin"},
            {"kind": "safetensors"} | SHARDS,
            {"kind": "safetensors"},
        ]
    ):
        model = formats.make(seed=seed)
        formats.hugging_face(folder, model, **write)
        reference = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(reference.lm_head.weight, model.tensors[name])
        assert torch.equal(checkpoints.load(folder).weights.read(name), model.tensors[name])


# ---- what boxes are fractions of


@pytest.mark.parametrize(
    ("name", "processor", "declared", "option", "expected"),
    [
        ("llava-1.5-7b-hf", "clip", None, None, "padded"),
        ("llava-1.5-7b-hf", "llava, padding", None, None, "padded"),
        ("llava-1.5-7b-hf", "siglip", None, None, "original"),
        ("llava-1.5-7b-hf", "clip", None, "original", "original"),
        ("DualFocus-LLaVA-7B", "clip", None, None, "original"),
        ("our_dualfocus", "clip", None, None, "original"),
        ("our_dualfocus", "clip", None, "padded", "padded"),
        ("llava-1.5-7b-hf", "clip", {}, None, "original"),
        ("llava-1.5-7b-hf", "clip", {"coordinates": "padded"}, None, "padded"),
        ("DualFocus-LLaVA-7B", "clip", {"coordinates": "padded"}, "original", "original"),
    ],
)
def test_coordinates(
    tmp_path: Path, name: str, processor: str, declared: dict[str, Any] | None, option: Any, expected: str
) -> None:
    folder = formats.hugging_face(tmp_path / name, formats.make(), processor=processor)
    if declared is not None:
        formats.write_json(folder / "dualfocus.json", declared)
    loaded = checkpoints.load(folder)
    assert checkpoints.describe(loaded, ragged_append=True, coordinates=option).coordinates == expected


# ---- refusals


def refused(folder: Path, message: str, **options: Any) -> None:
    """One sentence, and nothing written."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ExportError, match=message) as caught:
        export_bundle(folder, folder.parent / "new" / "bundle", progress=quiet, **options)
    assert not re.search(r"\n|\. ", str(caught.value))
    assert sorted(folder.parent.rglob("*")) == before


@pytest.fixture
def small() -> formats.Model:
    return formats.make()


def edit(path: Path, **changes: Any) -> None:
    formats.write_json(path, read(path) | changes)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_missing_shard(tmp_path: Path, small: formats.Model, kind: layouts.Kind) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small, kind=kind, **SHARDS)
    gone = sorted(folder.glob(f"*-00002-of-*.{kind}"))[0]
    gone.unlink()
    refused(folder, f"lacks {gone.name}, which its index lists")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"lm_head.weight": "{first}"}, "lacks 1 of the model's weights, the first lm_head.weight"),
        ({"lm_head.weight": ""}, "lists '', expected a file beside it"),
        ({"lm_head.weight": ".."}, "lists '..', expected a file beside it"),
        ({"lm_head.weight": "../x"}, "lists '../x', expected a file beside it"),
        ({"lm_head.weight": "/etc/passwd"}, "lists '/etc/passwd', expected a file beside it"),
        ({"lm_head.weight": 3}, "index.json: weight_map.*: expected `str`, got `int`"),
        (None, "index.json: weight_map: expected `object`, got `null`"),
        ([], "index.json: weight_map: expected `object`, got `array`"),
        ({}, "lacks 1 of the model's weights, the first lm_head.weight"),
    ],
)
def test_wrong_index(
    tmp_path: Path, small: formats.Model, kind: layouts.Kind, listed: Any, message: str
) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small, kind=kind, **SHARDS)
    (index,) = folder.glob("*.index.json")
    weight_map = read(index)["weight_map"]
    first, last = min(weight_map.values()), weight_map.pop("lm_head.weight")
    assert first != last
    if isinstance(listed, dict):
        files = {name: first if file == "{first}" else file for name, file in listed.items()}
        listed = weight_map | files
    edit(index, weight_map=listed)
    refused(folder, message)


def test_index_that_is_none(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small, **SHARDS)
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "index.json: expected `object`, got `array`")


CHANGES: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "shape": (lambda t: t[:-1].clone(), r"has shape \(63, 64\), expected \(64, 64\) as the configuration"),
    "int8": (lambda t: t.to(torch.int8), "is of type .*8, expected one of F16, BF16, F32"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "is of type .*8_e4m3.*, expected one of F16, BF16, F32"),
    "float64": (lambda t: t.double(), "is of type .*64, expected one of F16, BF16, F32"),
}
NOT_TENSORS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "number": (lambda t: 3, "holds a int as .*q_proj.weight', expected dense tensors by name"),
    "sparse": (lambda t: t.to_sparse(), "holds a Tensor as .*q_proj.weight', expected dense tensors by name"),
    "no memory": (lambda t: t.to("meta"), "holds a Tensor as .*q_proj.weight', expected dense tensors"),
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *(("safetensors", *row) for row in CHANGES.values()),
        *(("bin", *row) for row in CHANGES.values()),
        *(("bin", *row) for row in NOT_TENSORS.values()),
    ],
    ids=[*CHANGES, *(f"bin, {name}" for name in CHANGES | NOT_TENSORS)],
)
def test_wrong_tensor(
    tmp_path: Path,
    small: formats.Model,
    kind: layouts.Kind,
    change: Callable[[torch.Tensor], Any],
    message: str,
) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small, kind=kind)
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    tensors = small.tensors | {name: change(small.tensors[name])}
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    refused(folder, f"(?i){message}")


@pytest.mark.parametrize("left", [0.0, 0.0001, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
def test_torn_weights(tmp_path: Path, small: formats.Model, kind: layouts.Kind, left: float) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small, kind=kind)
    path = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))])
    refused(folder, f"{path.name} cannot be read: " if left else f"{path.name} is empty, expected weights")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:9e556afd\nsize 499723\n",
            "is a pointer of Git LFS, expected the weights that `git lfs pull` brings",
        ),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "cannot be read: "),
    ],
    ids=["pointer", "page"],
)
def test_other_files(tmp_path: Path, small: formats.Model, name: str, content: bytes, message: str) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    refused(folder, message)


class Payload:
    """What a hostile file does to whoever unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


SAVERS: dict[str, Callable[[Any, Path], object]] = {
    "bin": torch.save,
    "old bin": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "pickle": lambda state, path: path.write_bytes(pickle.dumps(state, 2)),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_code_in_a_file_is_not_run(
    tmp_path: Path, small: formats.Model, save: Callable[[Any, Path], object]
) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small, kind="bin")
    mark = tmp_path / "mark"
    hostile = {"a": torch.zeros(1)} if save is not SAVERS["pickle"] else {}
    save(hostile | {"b": Payload(mark)}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin holds pickled code, which is never run, expected tensors alone")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # as it would have been


@pytest.mark.parametrize("state", [[torch.zeros(1)], {"state_dict": {"a": torch.zeros(1)}, "epoch": 3}])
def test_other_contents(tmp_path: Path, small: formats.Model, state: Any) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small, kind="bin")
    torch.save(state, folder / "pytorch_model.bin")
    refused(
        folder, "pytorch_model.bin holds a (list|dict as 'state_dict'), expected (dense )?tensors by name"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlavaMistralForCausalLM"]},
            "of another kind: its architecture is LlavaMistralForCausalLM, exp",
        ),
        (
            {"architectures": None, "model_type": None},
            "without architectures and model_type, expected LLaVA's",
        ),
        (
            {"architectures": "LlavaForConditionalGeneration"},
            "architectures: expected `array | null`, got `str`",
        ),
        ({"text_config": {"model_type": "gemma"}}, "of type 'gemma', expected one of llama, mistral, qwen2"),
        (
            {"text_config": {"model_type": "no such"}},
            "of type 'no such', expected one of llama, mistral, qwen2",
        ),
        ({"vision_config": {"model_type": "no such"}}, "tower is of type 'no such', which transformers does"),
        ({"vision_config": {"model_type": "dpt"}}, "is of type 'dpt', which is built of another model"),
        ({"vision_feature_layer": -30}, "the configuration selects no features of the tower: "),
        ({"vision_feature_select_strategy": "both"}, "config.json describes no model: "),
    ],
)
def test_other_model(tmp_path: Path, small: formats.Model, changes: dict[str, Any], message: str) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    edit(folder / "config.json", **changes)
    refused(folder, message)


def test_sizes_that_make_no_model(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    text = read(folder / "config.json")["text_config"]
    edit(folder / "config.json", text_config=text | {"num_key_value_heads": 0})
    refused(folder, "config.json: text_config.num_key_value_heads: expected `int` >= 1")


def test_more_tokens_than_rows(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    rows = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    fewer = small.tensors | {name: small.tensors[name][:600].clone() for name in rows}
    save_file(fewer, folder / "model.safetensors")
    text = read(folder / "config.json")["text_config"]
    edit(folder / "config.json", text_config=text | {"vocab_size": 600})
    refused(folder, "the tokenizer gives ids up to 641, the model knows 600 tokens")


def test_no_weights(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights, expected one of ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', expected 'mlp2x_gelu'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres', expected 'pad' or 'square'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True, expected False"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad', expected 'flat'"),
        ({"mm_vision_tower": None}, "config.json has no mm_vision_tower, expected LLaVA's"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer: expected `int . null`, got `str`"),
        ({"mm_hidden_size": 48}, "mm_hidden_size is 48, expected the vision tower's 32"),
        ({"num_attention_heads": "four"}, "config.json: num_attention_heads: expected `int`, got `str`"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' changes with"),
        ({"hidden_act": "gelu"}, "the language model's activation is 'gelu', expected 'silu'"),
    ],
)
def test_other_original(tmp_path: Path, small: formats.Model, changes: dict[str, Any], message: str) -> None:
    folder = formats.original(tmp_path / "checkpoint", small, tower_inside=False, **changes)
    formats.tower(tmp_path / "clip-vit-large-patch14-336", small, whole=True)
    refused(folder, message)


@pytest.mark.parametrize("name", [formats.CLIP_NAME, "/home/them/clip-vit-large-patch14-336"])
def test_no_tower(tmp_path: Path, small: formats.Model, name: str) -> None:
    folder = formats.original(tmp_path / "checkpoint", small, tower_inside=False, tower_name=name)
    refused(folder, f"needs the vision tower {name}, expected beside it or as --vision-tower: ")


def test_tower_of_another_width(tmp_path: Path, small: formats.Model) -> None:
    wide = formats.make(width=48)
    given = formats.tower(tmp_path / "tower", wide, whole=True)
    folder = formats.original(tmp_path / "checkpoint", small, tower_inside=False)
    refused(folder, "mm_hidden_size is 32, expected the vision tower's 48", vision_tower=str(given))
    edit(folder / "config.json", mm_hidden_size=48)
    refused(folder, r"linear_1.weight has shape \(64, 32\), expected \(64, 48\)", vision_tower=str(given))


def test_tower_without_weights(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.original(tmp_path / "checkpoint", small, tower_inside=False)
    (formats.tower(tmp_path / "clip-vit-large-patch14-336", small, whole=True) / "pytorch_model.bin").unlink()
    refused(folder, "clip-vit-large-patch14-336 has no weights, expected one of ")


def test_tower_that_cannot_be_given(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small)
    refused(folder, "has its vision tower inside, so --vision-tower cannot be given", vision_tower="clip")


def test_command_line_says_it_in_one_line(tmp_path: Path, small: formats.Model) -> None:
    folder = formats.hugging_face(tmp_path / "checkpoint", small, kind="bin", **SHARDS)
    gone = sorted(folder.glob("*.bin"))[2]
    gone.unlink()
    done = CliRunner().invoke(cli.app, ["export", str(folder), "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert f"{folder} lacks {gone.name}, which its index lists" in done.stderr
    assert not (tmp_path / "bundle").exists()


def read(path: Path) -> Any:
    return json.loads(path.read_text())
