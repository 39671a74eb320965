"""llama.cpp as a peer of the benchmark: its files hold our weights, and in float32 it does as torch does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import gguf

from dualfocus.bench.peers import gguf_files
from dualfocus.bench.peers import llama_cpp as peer
from dualfocus.bench.peers.base import PARTS, PAST, PREFILL, STEPS, Call, Opened, Part, Slot, Work
from dualfocus.bench.peers.work import make
from dualfocus.export import ExportError, export_bundle
from dualfocus.export.checkpoint import Checkpoint
from dualfocus.export.random_weights import random_checkpoint
from dualfocus.runtime import Bundle, Reference
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.sequence import embed

SHAPE = tiny.Shape(name="small", vocabulary=2000, tied=True)
UNTIED = dataclasses.replace(SHAPE, tied=False, bias=True, feature_layer=-1)
MOST = 2e-3  # llama.cpp's float32 against torch's, of logits that spread by 2


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(SHAPE)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "bundle"
    export_bundle(SHAPE, folder, progress=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def work(checkpoint: Checkpoint, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("peers")
    (folder / peer.FOLDER).mkdir()
    before = {name: weight.clone() for name, weight in checkpoint.model.state_dict().items()}
    peer.prepare(checkpoint, folder / peer.FOLDER)
    for name, weight in checkpoint.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    return make(bundle, folder, 1)


@pytest.fixture(scope="module")
def opened(work: Work) -> Opened:
    return peer.PRECISIONS["fp32"](work)


def owner(opened: Opened, part: Part) -> Any:
    return opened.parts[part].__self__  # type: ignore[attr-defined]


def context(work: Work, cells: int = 64, sequences: int = 1) -> peer.Context:
    llama, _, _ = peer._opened("fp32", work)
    return peer.Context(llama, cells, sequences)


@torch.no_grad()
def torch_logits(checkpoint: Checkpoint, tokens: Sequence[int]) -> Floats:
    states = checkpoint.model.language_model(input_ids=torch.tensor([tokens])).last_hidden_state
    logits: Floats = checkpoint.model.lm_head(states)[0].numpy()
    return logits


# ---- files


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: Any) -> Floats:
    found: Floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


def test_the_decoders_file_holds_its_weights(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(UNTIED)
    config, weights = checkpoint.model.config.text_config, checkpoint.model.state_dict()
    gguf_files.write_text(checkpoint, tmp_path / "text", "f32")
    fields, tensors = read(tmp_path / "text")
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == config.num_hidden_layers
    assert fields["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert len(tensors) == sum("language_model" in name or "lm_head" in name for name in weights)
    layer = "model.language_model.layers.1."
    for name, ours in {
        "token_embd.weight": "model.language_model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.attn_v.bias": f"{layer}self_attn.v_proj.bias",
        "blk.1.ffn_down.weight": f"{layer}mlp.down_proj.weight",
        "blk.1.ffn_norm.weight": f"{layer}post_attention_layernorm.weight",
    }.items():
        np.testing.assert_array_equal(values(tensors[name]), weights[ours].numpy())
    # a head's first half interleaved with its second, as llama.cpp turns neighbours together
    keys = weights[f"{layer}self_attn.k_proj.weight"].numpy()
    half = config.head_dim // 2
    np.testing.assert_array_equal(values(tensors["blk.1.attn_k.weight"])[:3], keys[[0, half, 1]])


def test_the_vocabulary_has_a_name_for_every_row(checkpoint: Checkpoint, work: Work) -> None:
    fields, _ = read(work.folder / peer.FOLDER / "text-f32.gguf")
    pieces, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    named = checkpoint.tokenizer.get_vocab_size()
    assert len(pieces) == len(set(pieces)) == SHAPE.vocabulary > named
    assert [checkpoint.tokenizer.token_to_id(piece) for piece in pieces[:named]] == list(range(named))
    kind = gguf.TokenType
    assert types[:5] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, kind.CONTROL, kind.BYTE]
    assert {*types[named:]} == {kind.UNUSED}
    assert fields["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize(("kind", "head", "most"), [("q8_0", "Q8_0", 0.01), ("q4_0", "Q8_0", 0.15)])
def test_quantised_files_are_near(
    kind: str, head: str, most: float, checkpoint: Checkpoint, work: Work
) -> None:
    _, exact = read(work.folder / peer.FOLDER / "text-f32.gguf")
    _, tensors = read(work.folder / peer.FOLDER / f"text-{kind}.gguf")
    assert tensors.keys() == exact.keys()
    assert "output.weight" not in tensors  # it is the table
    for name, tensor in tensors.items():
        want, have = values(exact[name]), values(tensor)
        assert np.linalg.norm(have - want) < most * np.linalg.norm(want), name
        expected = head if name.startswith("token_embd") else kind.upper()
        assert tensor.tensor_type.name == ("F32" if "norm" in name else expected), name


@pytest.mark.parametrize(("shape", "layers"), [(SHAPE, 2), (UNTIED, 3)])
def test_the_towers_file_has_the_layers_that_are_run(shape: tiny.Shape, layers: int, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(shape)
    gguf_files.write_vision(checkpoint, tmp_path / "mmproj", "bf16")
    fields, tensors = read(tmp_path / "mmproj")
    assert fields["clip.vision.block_count"] == layers
    assert fields["clip.vision.feature_layer"] == [layers]
    assert {name.split(".")[2] for name in tensors if name.startswith("v.blk.")} == set(
        map(str, range(layers))
    )
    assert not any("post_ln" in name for name in tensors)
    projector = checkpoint.model.model.multi_modal_projector.linear_2.weight.detach().numpy()
    np.testing.assert_allclose(values(tensors["mm.2.weight"]), projector, rtol=1 / 128)


def test_what_llama_cpp_would_compute_otherwise_is_not_written(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0}
    other = random_checkpoint(dataclasses.replace(SHAPE, rope_scaling=scaled, feature_strategy="full"))
    with pytest.raises(ExportError, match="positions are scaled"):
        gguf_files.write_text(other, tmp_path / "text", "f32")
    with pytest.raises(ExportError, match="strategy 'full'"):
        gguf_files.write_vision(other, tmp_path / "mmproj", "f32")
    assert not list(tmp_path.glob("*.gguf"))
    assert not (tmp_path / "text").exists()


def test_files_are_written_once(checkpoint: Checkpoint, work: Work) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (work.folder / peer.FOLDER).iterdir()}

    before = written()
    assert len(before) == len(gguf_files.TEXT) + len(gguf_files.VISION) + 1
    peer.prepare(checkpoint, work.folder / peer.FOLDER)
    assert written() == before


# ---- what it computes


def test_logits_are_torchs_of_tokens_and_of_embeddings(checkpoint: Checkpoint, work: Work) -> None:
    tokens = work.tokens[:60]
    want = torch_logits(checkpoint, tokens)
    table = checkpoint.model.get_input_embeddings().weight.detach().numpy()
    theirs = context(work)
    for content in (tokens, table[list(tokens)]):
        theirs.clear()
        have = theirs.decode(peer.Piece((0,), 0, content, range(len(tokens))))
        assert np.abs(have - want).max() < MOST
        np.testing.assert_array_equal(have.argmax(axis=1), want.argmax(axis=1))


def test_sequences_share_what_they_have_in_common(checkpoint: Checkpoint, work: Work) -> None:
    shared, first, second = list(work.tokens[:20]), list(work.tokens[20:25]), list(work.tokens[30:33])
    theirs = context(work, sequences=2)
    begun = theirs.computed()
    theirs.decode(peer.Piece((0, 1), 0, shared))
    have = theirs.decode(peer.Piece((0,), 20, first, [4]), peer.Piece((1,), 20, second, [2])).copy()
    for row, told in zip(have, (first, second), strict=True):
        assert np.abs(row - torch_logits(checkpoint, shared + told)[-1]).max() < MOST
    assert theirs.computed() - begun == 20 + 5 + 3
    theirs.cut(0, 10)  # the other one keeps what it has
    (have,) = theirs.decode(peer.Piece((1,), 23, [7], [0]))
    assert np.abs(have - torch_logits(checkpoint, [*shared, *second, 7])[-1]).max() < MOST


@pytest.mark.parametrize("apart", [False, True])
def test_decodes_as_torch_does(apart: bool, checkpoint: Checkpoint, work: Work) -> None:
    llama, _, _ = peer._opened("fp32", work)
    best = torch_logits(checkpoint, work.tokens)[PAST:].argmax(axis=1).tolist()
    for rows in (1, 2):
        decode = peer._Decode(llama, work, rows)
        decode.apart = apart
        for _ in range(2):  # nothing is left of the first time
            decode.hold_past()
            counts = decode.decode()
            assert decode.said == [[token] * rows for token in best]
            assert (counts.decode_steps, counts.source) == (STEPS, peer.COUNTER)


@torch.no_grad()
def features(checkpoint: Checkpoint, pictures: Sequence[np.ndarray[Any, Any]], class_last: bool) -> Floats:
    """(N, T, D) image tokens; with `class_last` as llama.cpp computes them (see `gguf_files`)."""
    facts = checkpoint.preprocessor
    pixels = (np.stack(pictures) / 255 - np.array(facts["image_mean"])) / np.array(facts["image_std"])
    tower = checkpoint.model.model.vision_tower.vision_model
    table = tower.embeddings
    patches = table.patch_embedding(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
    patches = patches.flatten(2).transpose(1, 2)
    token = table.class_embedding.expand(len(patches), 1, -1)
    states = (
        torch.cat([patches, token] if class_last else [token, patches], 1) + table.position_embedding.weight
    )
    states = tower.pre_layrnorm(states)
    for layer in tower.encoder.layers[: SHAPE.tower_layers + 1 + SHAPE.feature_layer]:
        states = layer(states, None, None)[0]
    found: Floats = checkpoint.model.model.multi_modal_projector(states[:, 1:]).numpy()
    return found


def test_encodes_as_it_is_known_to(checkpoint: Checkpoint, work: Work) -> None:
    _, chat, tower = peer._opened("fp32", work)
    assert tower is not None
    pictures = chat.pictures(work.pixels)
    shown = np.stack(pictures).astype(np.float64) / 255
    mean, std = (np.array(checkpoint.preprocessor[f"image_{name}"]) for name in ("mean", "std"))
    assert np.abs((shown - mean) / std - work.pixels.transpose(0, 2, 3, 1)).max() < 0.5001 / 255 / min(std)
    have = peer._Vision(tower, chat).encode(work.pixels)
    right, shifted = (features(checkpoint, pictures, class_last) for class_last in (False, True))
    ours = checkpoint.model.get_image_features(
        pixel_values=torch.from_numpy(((shown - mean) / std).transpose(0, 3, 1, 2)).float()
    )
    np.testing.assert_allclose(right, torch.stack(list(ours)).detach().numpy(), atol=1e-4)
    errors = [np.linalg.norm(have - want) / np.linalg.norm(want) for want in (right, shifted)]
    assert min(errors) < 0.005, errors


def test_it_reads_prompts_as_the_protocol_does(opened: Opened, work: Work) -> None:
    shipped = owner(opened, "question as shipped")
    assert not shipped.differs()
    shipped._chat = dataclasses.replace(shipped._chat, user="USER:{turn} ASSISTANT:")
    assert shipped.differs()


def test_reuse_scores_as_shipped_and_as_torch(opened: Opened, checkpoint: Checkpoint, work: Work) -> None:
    fed = sum(len(call.prompt) for call in work.calls)
    steps = sum(len(call.reply) - 1 for call in work.calls)
    macro, locate, micro, *candidates = work.calls
    for _ in range(2):  # nothing is kept from one question to the next
        shipped = opened.parts["question as shipped"]()
        assert (shipped.vision_encodes, shipped.tokens_prefilled, shipped.decode_steps) == (8, fed, steps)
        reused = opened.parts["question with reuse"]()
        assert reused.vision_encodes == 2
        branch = sum(len(call.reply) for call in candidates)
        least = len(micro.prompt) - len(locate.reply)  # without what was decoded
        assert least < reused.tokens_prefilled < len(micro.prompt) + len(macro.prompt) / 2 + branch + 100
        assert len(locate.reply) - 1 + len(micro.reply) - 1 <= reused.decode_steps < steps
    by_shipped, by_reuse = (
        owner(opened, part).scores for part in ("question as shipped", "question with reuse")
    )
    _, chat, tower = peer._opened("fp32", work)
    assert tower is not None
    seen = peer._Vision(tower, chat).encode(work.pixels)
    for i, call in enumerate(candidates):
        want = torch_scores(checkpoint, call, seen)
        np.testing.assert_allclose(by_shipped[i], want, atol=5e-3)
        np.testing.assert_allclose(by_reuse[i], want, atol=5e-3)


@torch.no_grad()
def torch_scores(checkpoint: Checkpoint, call: Call, seen: Floats) -> list[float]:
    table = checkpoint.model.get_input_embeddings().weight
    rows = [
        torch.from_numpy(seen[token.image, token.position]) if isinstance(token, Slot) else table[token]
        for token in (*call.prompt, *call.reply)
    ]
    states = checkpoint.model.language_model(inputs_embeds=torch.stack(rows)[None]).last_hidden_state[0]
    logits = checkpoint.model.lm_head(states[len(call.prompt) - 1 : -1]).log_softmax(-1)
    return [float(row[token]) for row, token in zip(logits, call.reply, strict=True)]


def test_every_precision_does_all_parts(work: Work) -> None:
    for precision, opening in peer.PRECISIONS.items():
        opened = opening(work)
        assert set(opened.parts) == set(PARTS)
        assert opened.form.startswith(peer.SETTINGS[precision].text.upper())
        counts = {}
        for part, do in opened.parts.items():
            opened.before.get(part, lambda: None)()
            counts[part] = do()
        assert counts["vision"].vision_encodes == 1
        assert counts["prefill"].tokens_prefilled == PREFILL
        assert counts["decode"].decode_steps == counts["decode, two rows"].decode_steps == STEPS
        for scores in owner(opened, "question with reuse").scores:
            assert all(math.isfinite(score) and score < 0 for score in scores)


def test_the_decoder_apart_gives_the_same_answers(bundle: Path, work: Work) -> None:
    ours = Bundle.open(bundle, threads=1)
    theirs = peer.ENGINES["fp32"](work).decoder
    result = Reference(dataclasses.replace(ours, decoder=theirs)).ask(work.picture, work.question, "macro")
    expected = Reference(ours).ask(work.picture, work.question, "macro")
    assert result.macro is not None
    assert expected.macro is not None
    assert result.macro.generation.tokens == expected.macro.generation.tokens
    caches = [KVCache(ours.manifest.decoder, rows=1, capacity=64) for _ in range(2)]
    for start, stop in ((0, 40), (40, 41), (41, 50)):
        new = [embed(work.tokens[start:stop], ours.embeddings, {})]
        at = [[stop - start - 1, 0]]  # in the order asked for
        (have,), (want,) = (
            decoder.extend(cache, [0], new, at)
            for decoder, cache in zip((theirs, ours.decoder), caches, strict=True)
        )
        assert np.abs(have - want).max() < MOST
    assert caches[0].lengths == caches[1].lengths == [50]
    caches[0].truncate(0, 40)
    (again,) = theirs.extend(caches[0], [0], [embed(work.tokens[40:50], ours.embeddings, {})], [[9]])
    assert np.abs(again - have[0]).max() < MOST
    with pytest.raises(AssertionError, match="filled by another"):
        theirs.extend(caches[1], [0], new, at)
