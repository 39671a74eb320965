"""OpenVINO as a peer of the benchmark: in float32 it computes what torch does, and says what it cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openvino_genai")
pytest.importorskip("openvino_tokenizers")
pytest.importorskip("nncf")

from dualfocus.bench.peers import openvino as peer
from dualfocus.bench.peers.base import PARTS, PAST, PREFILL, STEPS, Slot, Work
from dualfocus.bench.peers.work import make
from dualfocus.export.checkpoint import Checkpoint, load
from dualfocus.runtime import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.sequence import embed


@pytest.fixture(scope="module")
def checkpoint(tiny_bundle: Path) -> Checkpoint:
    return load(tiny_bundle.parent / "checkpoint")


@pytest.fixture(scope="module")
def work(checkpoint: Checkpoint, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("peers")
    (folder / peer.FOLDER).mkdir()
    before = {name: weight.clone() for name, weight in checkpoint.model.state_dict().items()}
    peer.prepare(checkpoint, folder / peer.FOLDER)
    for name, weight in checkpoint.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    return make(tiny_bundle, folder, 1)


@torch.no_grad()
def continuation(checkpoint: Checkpoint, work: Work) -> list[int]:
    """The STEPS + 1 best tokens, each after all before it."""
    tokens = list(work.tokens[:PAST])
    for _ in range(STEPS + 1):
        states = checkpoint.model.language_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
        tokens.append(int(checkpoint.model.lm_head(states).argmax()))
    return tokens[PAST:]


@pytest.mark.parametrize("rows", [1, 2])
def test_decodes_as_torch_does(rows: int, checkpoint: Checkpoint, work: Work) -> None:
    decode = peer._Decode(peer._batching("fp32", work), work, rows)
    for _ in range(2):  # nothing is left of the first time
        decode.hold_past()
        decode.decode()
        assert decode.replies() == [continuation(checkpoint, work)] * rows


def test_the_decoder_apart_gives_the_same_logits(work: Work, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, threads=1)
    spec = bundle.manifest.decoder
    caches = [KVCache(spec, rows=1, capacity=spec.context) for _ in range(2)]
    theirs = peer._Decoder("fp32", work)
    for tokens in (work.tokens[:40], work.tokens[40:41], work.tokens[41:60]):
        new, at = [embed(tokens, bundle.embeddings, {})], [[0, len(tokens) - 1]]
        (want,) = bundle.decoder.extend(caches[0], [0], new, at)
        (have,) = theirs.extend(caches[1], [0], new, at)
        assert np.abs(have - want).max() < 1e-3
    assert caches[0].lengths == caches[1].lengths == [60]


@torch.no_grad()
def test_encodes_as_torch_does(checkpoint: Checkpoint, work: Work) -> None:
    features = checkpoint.model.get_image_features(pixel_values=torch.from_numpy(work.pixels))
    want = np.stack([image.numpy() for image in features])
    assert np.abs(peer._Vision("fp32", work).encode(work.pixels) - want).max() < 1e-3


@torch.no_grad()
def test_reads_prompts_and_pictures_as_the_protocol_does(checkpoint: Checkpoint, work: Work) -> None:
    """With a picture that has the tower's size, so that no two resizers come into it."""
    size = checkpoint.model.config.vision_config.image_size
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    work = dataclasses.replace(work, picture=picture, crop=(0, 0, size, size))
    question = peer._question("fp32", work)
    assert not question.differs()
    mean, std = (np.array(checkpoint.preprocessor[f"image_{name}"]) for name in ("mean", "std"))
    pixels = torch.from_numpy(((picture / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
    for text, images, call in question.calls:
        assert images == len({token.image for token in call.prompt if isinstance(token, Slot)})
        ids = [
            checkpoint.model.config.image_token_id if isinstance(token, Slot) else token
            for token in call.prompt
        ]
        prompt = torch.tensor([[*ids, *(call.reply if call.scored else ())]])
        out = checkpoint.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=pixels.expand(images, -1, -1, -1),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=None,
            pad_token_id=0,
        )
        # by its own detokenizer: broken UTF-8, of which there is much here, is shown in more than one way
        said = question.tokenizer.decode(out[0, prompt.shape[1] :].tolist())
        assert question.generate(text, images, 8).texts == [said]


def test_every_precision_does_all_the_work_but_says_what_it_cannot(work: Work) -> None:
    fed = sum(len(call.prompt) + (len(call.reply) if call.scored else 0) for call in work.calls)
    steps = sum(len(call.reply) - 1 for call in work.calls if not call.scored)
    for precision, opening in peer.PRECISIONS.items():
        opened = opening(work)
        assert {*opened.parts, *opened.cannot} == set(PARTS)
        assert list(opened.cannot) == ["question with reuse"]
        counts = {}
        for part, do in opened.parts.items():
            if part in opened.before:
                opened.before[part]()
            counts[part] = do()
        assert counts["vision"].vision_encodes == 1
        assert counts["prefill"].tokens_prefilled == PREFILL
        assert counts["decode"].decode_steps == counts["decode, two rows"].decode_steps == STEPS
        asked = counts["question as shipped"]
        assert (asked.vision_encodes, asked.tokens_prefilled, asked.decode_steps) == (8, fed, steps)
        assert ("computed in f32, cache in f32" in opened.form) == (precision == "fp32")


def test_another_prompt_format_is_noticed(work: Work) -> None:
    question = peer._question("fp32", work)
    text, images, call = question.calls[0]
    question.calls[0] = text.replace("USER: ", "USER:"), images, call
    assert question.differs()


def test_files_are_written_once(checkpoint: Checkpoint, work: Work) -> None:
    def written() -> dict[Path, int]:
        files = (work.folder / peer.FOLDER).rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    before = written()
    peer.prepare(checkpoint, work.folder / peer.FOLDER)
    assert written() == before
