"""onnxruntime-genai as a peer of the benchmark: in float32 it decodes as torch does; the rest it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime_genai")

from dualfocus.bench.peers import genai as peer
from dualfocus.bench.peers.base import PARTS, PAST, PREFILL, STEPS, Work
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
    """The STEPS + 1 best tokens that end nothing, each after all before it."""
    tokens = list(work.tokens[:PAST])
    for _ in range(STEPS + 1):
        states = checkpoint.model.language_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
        logits = checkpoint.model.lm_head(states)
        logits[list(checkpoint.tokens.eos)] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[PAST:]


@pytest.mark.parametrize("rows", [1, 2])
def test_decodes_as_torch_does(rows: int, checkpoint: Checkpoint, work: Work) -> None:
    decode = peer._Decode(peer._open_model("fp32", work), work, rows)
    want = (*work.tokens[:PAST], *continuation(checkpoint, work))
    for _ in range(2):  # the second time after what the first one left
        decode.hold_past()
        assert decode.row(0) == want[: PAST + 1]
        decode.decode()
        assert [decode.row(row) for row in range(rows)] == [want] * rows


def test_every_precision_does_the_decoders_work_but_says_what_it_cannot(work: Work) -> None:
    for precision, opening in peer.PRECISIONS.items():
        opened = opening(work)
        assert set(opened.parts) == {"prefill", "decode", "decode, two rows"}
        assert set(opened.cannot) == set(PARTS) - set(opened.parts)
        assert opened.form.startswith(precision)
        for part, do in opened.parts.items():
            opened.before[part]()
            counts = do()
            assert counts.vision_encodes == 0
            assert counts.tokens_prefilled == (PREFILL if part == "prefill" else 0)
            assert counts.decode_steps == (0 if part == "prefill" else STEPS)


def test_the_decoder_apart_gives_the_same_logits(work: Work, tiny_bundle: Path) -> None:
    """From embeddings, which int8 leaves alone, as the `Generator` from tokens."""
    bundle = Bundle.open(tiny_bundle, threads=1)
    cache = KVCache(bundle.manifest.decoder, rows=1, capacity=bundle.manifest.decoder.context)
    decoder = peer._Decoder("int8", work)
    generator = peer._Decode(peer._open_model("int8", work), work, 1).start()
    for tokens in (work.tokens[:40], work.tokens[40:41], work.tokens[41:60]):
        generator.append_tokens(np.array(tokens, np.int32))
        new, at = [embed(tokens, bundle.embeddings, {})], [[0, len(tokens) - 1]]
        (logits,) = decoder.extend(cache, [0], new, at)
        assert logits.shape == (2, bundle.manifest.decoder.vocabulary)
        assert np.abs(logits[1] - generator.get_logits()[0, -1]).max() < 1e-3
    assert cache.lengths == [60]


def test_files_are_written_once(checkpoint: Checkpoint, work: Work) -> None:
    def written() -> dict[Path, int]:
        files = (work.folder / peer.FOLDER).rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    before = written()
    peer.prepare(checkpoint, work.folder / peer.FOLDER)
    assert written() == before
