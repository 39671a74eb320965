"""What a precision costs in quality, on held-out scenes: accuracy, and how far its decoder is from float32.

Our float32 bundle answers the questions by the plain protocol; its dialogues and image features are then laid
before every other decoder, so that all choose the next token of the same text: at each position of the macro,
box and micro replies the distributions are compared. Accuracy is of the peer on its own: its decoder, and its
vision encoder where that can be had, through the plain protocol.

Of random weights nothing of this means anything.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dualfocus.bench.harness import Watch
from dualfocus.bench.peers.base import Engines, Precision, Work
from dualfocus.bench.peers.process import Child, PeerError
from dualfocus.bench.scenes import held_out, is_right
from dualfocus.bench.scorers import share
from dualfocus.runtime import Bundle, Reference
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats, HostDecoder
from dualfocus.runtime.geometry import Crop
from dualfocus.runtime.image import Picture, view, whole
from dualfocus.runtime.sequence import embed
from dualfocus.runtime.turns import Prompt, Turns
from dualfocus.train import scenes
from dualfocus.train.curate import Dialogue

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Dialogues:
    """What float32 said to one question, and the logits of what it could have said."""

    crop: Crop | None
    box: str
    replies: tuple[tuple[int, ...], ...]  # macro, box and, where there is a crop, micro
    logits: tuple[Floats, ...]  # (tokens of the reply, vocabulary) each


@dataclass(frozen=True)
class Compared:
    """A reply's positions: how far the distributions are apart, and whether both have the same best token."""

    divergence: Doubles  # nats
    agree: npt.NDArray[np.bool_]


def measure(
    opened: Sequence[tuple[str, str, Precision]],
    bundle: Path,
    work: Work,
    questions: int,
    watch: Watch = lambda *_: None,
) -> list[dict[str, Any]]:
    """A row for each of the `opened`, which are (peer, module, precision), as the JSON object has it.

    `bundle` is ours in float32. A row that could not be measured has "cannot", its reason; without float32's
    dialogues that is all rows.
    """
    first = Child(_refer, bundle, work.threads, questions, log=work.folder / "quality-reference.log")
    try:
        reference: list[Dialogues] = _follow(first, "float32's dialogues", watch)
    except PeerError as error:
        reason = f"float32's dialogues: {error}"
        return [{"peer": peer, "precision": precision, "cannot": reason} for peer, _, precision in opened]
    rows = []
    for peer, module, precision in opened:
        row: dict[str, Any] = {"peer": peer, "precision": precision}
        log = work.folder / f"quality-{peer}-{precision}.log"
        child = Child(_compare, module, precision, bundle, work, reference, log=log)
        try:
            row |= _follow(child, f"quality of {peer} {precision}", watch)
        except PeerError as error:
            row["cannot"] = str(error)
        rows.append(row)
    return rows


def _follow(child: Child, doing: str, watch: Watch) -> Any:
    """What comes after the numbers (done, total) that tell of progress."""
    try:
        while isinstance(message := child.receive(), tuple):
            watch(doing, *message)
        return message
    finally:
        child.close()


def _refer(connection: Connection, bundle: Path, threads: int, questions: int) -> None:
    """Sends float32's dialogues, a list of `Dialogues`."""
    opened = Bundle.open(bundle, threads=threads)
    runner = Reference(opened)
    dialogues = []
    for done, (picture, asked) in enumerate(_pictures(questions)):
        connection.send((done, questions))
        result = runner.ask(picture, asked.question)
        assert result.macro is not None
        assert result.located is not None
        said = [result.macro.generation, result.located, *([result.micro.generation] if result.micro else [])]
        of = Dialogues(result.crop, result.located.text, tuple(reply.tokens for reply in said), ())
        logits = tuple(_logits(opened, opened.decoder, picture, asked, of))
        dialogues.append(dataclasses.replace(of, logits=logits))
    connection.send(dialogues)


def _compare(
    connection: Connection,
    module: str,
    precision: Precision,
    bundle: Path,
    work: Work,
    reference: Sequence[Dialogues],
) -> None:
    """Sends the JSON object of one peer's quality."""
    engines: Engines = importlib.import_module(module).ENGINES[precision](work)
    fp32 = Bundle.open(bundle, threads=work.threads)
    vision = engines.vision or fp32.vision
    runner = Reference(dataclasses.replace(fp32, decoder=engines.decoder, vision=vision))
    right = 0
    compared: list[Compared] = []
    features: list[tuple[Floats, Floats]] = []
    for done, ((picture, asked), of) in enumerate(zip(_pictures(len(reference)), reference, strict=True)):
        connection.send((done, len(reference)))
        right += is_right(asked, runner.ask(picture, asked.question).answer)
        found = _logits(fp32, engines.decoder, picture, asked, of)
        compared += [compare(want, have) for want, have in zip(of.logits, found, strict=True)]
        if engines.vision:
            seen = _pixels(fp32, picture, of.crop)
            features.append((fp32.vision.encode(seen), engines.vision.encode(seen)))
    divergence = np.concatenate([reply.divergence for reply in compared])
    agree = np.concatenate([reply.agree for reply in compared])
    connection.send(
        {
            "questions": len(reference),
            "accuracy": share(right, len(reference)),
            "positions": len(divergence),
            "kl": float(divergence.mean()),
            "top1": float(agree.mean()),
            "vision": vision_error(features) if features else None,
        }
    )


def compare(want: Floats, have: Floats) -> Compared:
    """(positions, vocabulary) logits against the wanted ones: Kullback-Leibler divergence from them."""
    expected, found = _log_softmax(want), _log_softmax(have)
    divergence: Doubles = (np.exp(expected) * (expected - found)).sum(axis=-1)
    return Compared(divergence, want.argmax(axis=-1) == have.argmax(axis=-1))


def vision_error(features: Sequence[tuple[Floats, Floats]]) -> dict[str, float]:
    """Image features against float32's, pairs of (N, T, D): the error's norm over theirs, and the mean cosine
    of a token."""
    want, have = (np.concatenate(side).astype(np.float64) for side in zip(*features, strict=True))
    norms = np.linalg.norm(want, axis=-1) * np.linalg.norm(have, axis=-1)
    return {
        "relative": float(np.linalg.norm(have - want) / np.linalg.norm(want)),
        "cosine": float(((want * have).sum(axis=-1) / norms).mean()),
    }


def _log_softmax(logits: Floats) -> Doubles:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normal: Doubles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normal


def _pictures(questions: int) -> Iterator[tuple[Picture, Dialogue]]:
    seed, picture = None, np.empty(0, np.uint8)
    for scene, dialogue in held_out(questions):
        if scene.seed != seed:
            seed, picture = scene.seed, np.asarray(scenes.draw(scene))
        yield picture, dialogue


def _pixels(bundle: Bundle, picture: Picture, crop: Crop | None) -> Floats:
    """(N, 3, S, S): the whole picture, and the crop if there is one."""
    crops = [whole(picture), *([crop] if crop else [])]
    return np.concatenate([view(picture, of, bundle.manifest.image) for of in crops])


def _logits(
    bundle: Bundle, decoder: HostDecoder, picture: Picture, asked: Dialogue, of: Dialogues
) -> Iterator[Floats]:
    """For each reply `of` float32 the (tokens, vocabulary) logits that `decoder` chooses its tokens by, after
    what `bundle`, which is float32's, sees and was told."""
    turns = Turns(bundle.manifest, bundle.tokenizer, asked.question)
    prompts: list[Prompt] = [turns.macro("whole"), turns.locate("whole")]
    if of.crop:
        prompts.append(turns.micro("whole", "crop", of.box))
    encoded = bundle.vision.encode(_pixels(bundle, picture, of.crop))
    features: Mapping[str, Floats] = dict(zip(("whole", "crop"), encoded, strict=False))
    spec = bundle.manifest.decoder
    for prompt, reply in zip(prompts, of.replies, strict=True):
        tokens = (*prompt.tokens, *reply[:-1])
        cache = KVCache(spec, rows=1, capacity=spec.context)
        at = range(len(prompt.tokens) - 1, len(tokens))
        (logits,) = decoder.extend(cache, [0], [embed(tokens, bundle.embeddings, features)], [at])
        yield logits
