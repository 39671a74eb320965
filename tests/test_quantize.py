"""Bundles of fewer bits: what is rewritten, and that what they say stays close to float32's."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import tiny
import torch
from typer.testing import CliRunner

from dualfocus import cli, kernels
from dualfocus.bench.scenes import held_out
from dualfocus.export import decoder, export_bundle, quantize, random_weights
from dualfocus.export.graph import DataFile, joined
from dualfocus.export.rotate import Rotation
from dualfocus.export.verify import TorchDecoder
from dualfocus.runtime import Bundle, DualFocus, Engine, Reference
from dualfocus.runtime.bundle import BUILT_IN
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.devices import CPU
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.image import view, whole
from dualfocus.runtime.manifest import Precision
from dualfocus.runtime.onnx import OnnxDecoder, Place, Threads, save_packed
from dualfocus.runtime.protocol import focus
from dualfocus.runtime.request import Request
from dualfocus.runtime.result import FocusResult
from dualfocus.runtime.sequence import embed
from dualfocus.runtime.turns import Turns
from dualfocus.train import scenes

CHECKPOINT = Path(__file__).parent.parent / "train" / "checkpoints" / "nano"
QUESTIONS = 60

# KL divergence from float32 at most, likeliest token the same at least, answers the same at least. Seen were
# 0, 1 and 1 in fp16; 0.0001, 1 and 1 in int8; 0.0013, 1 and 0.97 in int4.
FLOORS = {"fp16": (1e-6, 0.999, 1.0), "int8": (0.002, 0.96, 0.95), "int4": (0.02, 0.93, 0.88)}


@pytest.fixture(scope="module", params=FLOORS)
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def bundle(precision: Precision, lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(precision) / "bundle"
    lines.clear()
    export_bundle(CHECKPOINT, folder, precision=precision, progress=lines.append)
    return Bundle.open(folder, threads=1)


@cache
def exact() -> Bundle:
    return Bundle.open(BUILT_IN, threads=1)


@cache
def asked() -> list[tuple[np.ndarray, str]]:
    """(picture, question) pairs, a few of each scene."""
    drawn: dict[int, np.ndarray] = {}
    for scene, _ in held_out(QUESTIONS):
        if scene.seed not in drawn:
            drawn[scene.seed] = np.asarray(scenes.draw(scene))
    return [(drawn[scene.seed], dialogue.question) for scene, dialogue in held_out(QUESTIONS)]


@cache
def exact_answers() -> list[str]:
    runner = DualFocus(exact())
    return [runner.ask(picture, question).answer for picture, question in asked()]


def test_the_manifest_says_so(bundle: Bundle, precision: Precision) -> None:
    assert bundle.manifest.precision == precision
    assert exact().manifest.precision == "fp32"


def test_every_product_with_weights_is_rewritten(bundle: Bundle, precision: Precision) -> None:
    graph = onnx.load(bundle.path / "decoder.onnx", load_external_data=False).graph
    bits = Counter(
        attribute.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    )
    layers = bundle.manifest.decoder.layers
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    plain = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert len(plain) == (precision == "int8")  # which rotates what comes in
    products = 5 * layers + 1
    if precision == "fp16":
        assert not bits
        assert sum(node.op_type == "Cast" for node in graph.node) >= products
    elif precision == "int8":
        kinds = Counter(node.op_type for node in graph.node)
        assert bits == {8: layers + 1}  # down projections, and the head
        assert kinds["QuantizeLinear"] == 3 * layers  # gate and up are given the same
        assert kinds["ReduceMax"] == layers  # the output projections'
        assert kinds["DequantizeLinear"] == kinds["QuantizeLinear"] + products - bits[8]
        assert kinds["DynamicQuantizeLinear"] == 0
    else:
        # of nano's four layers the last is among the last eighth, and every third before it; and the head
        assert bits == {8: 1 + 2 * sum(i >= 3 or i % 3 == 2 for i in range(layers)), 4: bits[4]}
        assert bits.total() == products


def test_onnx_runtime_multiplies_in_integers(bundle: Bundle, precision: Precision, tmp_path: Path) -> None:
    save_packed(bundle.path / "decoder.onnx", tmp_path / "decoder.onnx", CPU, half=False)
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMulIntegerToFloat"] == 4 * bundle.manifest.decoder.layers * (precision == "int8")
    assert kinds["DequantizeLinear"] == 0


def test_it_takes_less_room(bundle: Bundle, precision: Precision) -> None:
    for graph, share in (
        ("decoder.onnx", {"fp16": 0.55, "int8": 0.32, "int4": 0.25}[precision]),
        ("vision.onnx", 0.9),  # nano's tower is convolutions, which stay as they are
    ):
        sizes = [
            sum(entry.size for name, entry in of.manifest.files.items() if name.startswith(graph))
            for of in (bundle, exact())
        ]
        assert sizes[0] < share * sizes[1]


def test_the_decoder_stays_close(bundle: Bundle, precision: Precision) -> None:
    most, least, _ = FLOORS[precision]
    divergences, same = [], []
    reference = DualFocus(exact())
    for picture, question in asked()[:20]:
        told = reference.ask(picture, question)
        assert told.macro is not None
        turns = Turns(exact().manifest, exact().tokenizer, question)
        prompt = turns.macro("whole").tokens
        reply = told.macro.generation.tokens
        (features,) = exact().vision.encode(view(picture, whole(picture), exact().manifest.image))
        embedded = embed((*prompt, *reply), exact().embeddings, {"whole": features})
        at = list(range(len(prompt) - 1, len(prompt) + len(reply) - 1))
        expected, got = (
            of.decoder.extend(KVCache(of.manifest.decoder, 1, len(embedded)), [0], [embedded], [at])[0]
            for of in (exact(), bundle)
        )
        divergences.append(quantize.divergence(expected, got))
        same.append(expected.argmax(-1) == got.argmax(-1))
    assert -1e-9 <= np.concatenate(divergences).mean() <= most
    assert np.concatenate(same).mean() >= least


def test_answers_stay_the_same(bundle: Bundle, precision: Precision) -> None:
    runner = DualFocus(bundle)
    answers = [runner.ask(picture, question).answer for picture, question in asked()]
    same = np.mean([a == b for a, b in zip(answers, exact_answers(), strict=True)])
    assert same >= FLOORS[precision][2]


def test_reuse_answers_like_no_reuse(bundle: Bundle) -> None:
    fast, plain = DualFocus(bundle), Reference(bundle, free_box=False)
    assert [replies(fast.ask(*pair)) for pair in asked()[:15]] == [
        replies(plain.ask(*pair)) for pair in asked()[:15]
    ]


def test_questions_together_answer_like_each_alone(bundle: Bundle) -> None:
    pairs, runner = asked()[:24], DualFocus(bundle)
    order = np.random.default_rng(0).permutation(len(pairs))
    together = DualFocus(bundle, slots=16).ask_many([pairs[i] for i in order])
    assert [replies(result) for result in together] == [replies(runner.ask(*pairs[i])) for i in order]


def replies(result: FocusResult) -> list[tuple[int, ...]]:
    """The tokens of all replies of a question."""
    given = [result.macro, result.located, result.micro]
    return [getattr(reply, "generation", reply).tokens for reply in given if reply]


def prompt(bundle: Bundle) -> Floats:
    """The embeddings of a macro prompt."""
    picture, question = asked()[0]
    (features,) = bundle.vision.encode(view(picture, whole(picture), bundle.manifest.image))
    tokens = Turns(bundle.manifest, bundle.tokenizer, question).macro("whole").tokens
    return embed(tokens, bundle.embeddings, {"whole": features})


def check_rows_are_independent(bundle: Bundle) -> None:
    """The last token's logits, in chunks and beside rows whose activations are up to 3,000 times as large.

    With one range for all activations of a call, the logits moved by 0.04 to 0.2.
    """
    spec, embedded = bundle.manifest.decoder, prompt(bundle)
    end = len(embedded)
    sizes = 1000 * np.arange(1, 4, dtype=np.float32)[:, None, None]
    huge = sizes * np.random.default_rng(0).standard_normal((3, *embedded.shape), np.float32)

    def logits(cuts: list[int], *others: Floats) -> Floats:
        cache = KVCache(spec, 1 + len(others), end)
        for start, stop in zip([0, *cuts], [*cuts, end], strict=True):
            new = [row[start:stop] for row in (embedded, *others)]
            found = bundle.decoder.extend(cache, range(len(new)), new, [[stop - start - 1]] * len(new))
        result: Floats = found[0]
        return result

    alone = logits([])
    assert np.abs(alone).max() > 1
    for cuts in ([], [end // 2], [20, 64, end - 2], [end - 1]):
        for others in ((), (huge[0],), tuple(huge)):
            np.testing.assert_allclose(logits(cuts, *others), alone, rtol=0, atol=1e-4)


def test_a_row_does_not_depend_on_what_shares_its_call(bundle: Bundle) -> None:
    check_rows_are_independent(bundle)


@pytest.mark.parametrize("chosen", ["int8", "int4"])
def test_a_row_of_standard_operators_does_not_either(chosen: Precision, tmp_path: Path) -> None:
    export_bundle(
        CHECKPOINT, tmp_path / "b", precision=chosen, target="onnx-standard", progress=lambda _: None
    )
    check_rows_are_independent(Bundle.open(tmp_path / "b", threads=1))


def test_the_export_ends_with_what_it_cost(bundle: Bundle, precision: Precision, lines: list[str]) -> None:
    if precision == "fp16":  # nano's own weights are float16: nothing is rounded
        assert all("|onnx - torch|" in line for line in lines)
        return
    vision, decoder = lines[-2:]
    assert vision.startswith("vision: image tokens ")
    assert decoder.startswith("decoder: KL divergence from float32 ")
    assert float(decoder.split()[5]) <= 0.2
    assert float(vision.split()[3]) <= 5  # percent


def test_divergence() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    found = quantize.divergence(np.log(p)[None].astype(np.float32) + 3, np.log(q)[None].astype(np.float32))
    assert found == pytest.approx([(p * np.log(p / q)).sum()], abs=1e-6)
    assert quantize.divergence(np.ones((2, 4), np.float32), np.ones((2, 4), np.float32)) == pytest.approx(
        [0, 0]
    )


@pytest.mark.parametrize(
    ("paths", "needed"), [(("avx2", "scalar"), True), (("avx512", "avx2", "scalar"), False)]
)
def test_products_of_8_bits_do_not_overflow_without_vnni(
    paths: tuple[str, ...], needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "available", lambda: paths)
    options = Bundle.open(BUILT_IN, threads=1).vision._session.get_session_options()  # type: ignore[attr-defined]
    entry = "session.x64quantprecision"
    if needed:
        assert options.get_session_config_entry(entry) == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(entry)


def test_pictures_encoded_together_or_alone_are_the_same(bundle: Bundle, precision: Precision) -> None:
    pixels = np.random.default_rng(0).standard_normal((3, 3, 160, 160), np.float32)
    alone = np.concatenate([bundle.vision.encode(pixels[i : i + 1]) for i in range(3)])
    assert np.array_equal(bundle.vision.encode(pixels), alone) or precision == "fp16"


def test_odd_numbers_of_blocks(tmp_path: Path) -> None:
    """96 is three blocks of 32, and 80 no whole number of them."""
    shape = tiny.Shape(name="odd", hidden=96, heads=6, kv_heads=2, mlp=80)
    checkpoint = tiny.build(tmp_path / "checkpoint", shape)
    for precision in ("int8", "int4"):
        export_bundle(checkpoint, tmp_path / precision, precision=precision, progress=lambda _: None)
        picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
        assert DualFocus(Bundle.open(tmp_path / precision)).ask(picture, "What is it?").macro is not None


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.app, ["export", str(CHECKPOINT), "-o", str(tmp_path / "b"), "--precision", "int3"]
    )
    assert result.exit_code == 2
    assert not (tmp_path / "b").exists()


def test_an_idle_row_holds_nothing_stale(bundle: Bundle) -> None:
    """What a row between two others computed before does not change what they are told."""
    spec = bundle.manifest.decoder
    random = np.random.default_rng(0)
    embeddings = random.standard_normal((3, 1, spec.hidden)).astype(np.float32)

    def outer_rows(before: float) -> list[np.ndarray]:
        cache = KVCache(spec, 3, 8)
        bundle.decoder.extend(cache, [0, 1, 2], [before * embeddings[0]] * 3, [[0]] * 3)
        for row in range(3):
            cache.truncate(row, 0)
        return bundle.decoder.extend(cache, [0, 2], [embeddings[1], embeddings[2]], [[0], [0]])

    for first, second in zip(outer_rows(1), outer_rows(1000), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("biased", [False, True])
def test_a_rotated_decoder_computes_the_same(biased: bool, tmp_path: Path) -> None:
    config = random_weights.make_config(tiny.Shape(heads=6, bias=biased))
    weights = random_weights.DrawnWeights(config, seed=0)
    tensors = dict(weights.all())
    config = config.text_config
    spec = decoder.describe(config, vocabulary=419, ragged_append=True)
    reference, rotation = TorchDecoder(config), Rotation(spec)
    data = DataFile(tmp_path / "decoder.onnx.data")
    graphs = decoder.DecoderGraphs(spec, config, "fp32", data, reference.rotary(spec.context), "onnxruntime")
    states = np.random.default_rng(0).standard_normal((1, 9, spec.hidden)).astype(np.float32)
    parts, expected = [], states
    for i in range(spec.layers):
        prefix = f"model.language_model.layers.{i}."
        of = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        expected = reference.layer(of, expected)
        layer = decoder.Layer.of({name: tensor.clone() for name, tensor in of.items()})
        rotation.layer(i, layer)
        assert not torch.equal(layer.down.weight, of["mlp.down_proj.weight"])
        parts.append(graphs.layer(i, layer, None if i else rotation.entrance))
    norm, matrix = tensors["model.language_model.norm.weight"], tensors["lm_head.weight"]
    logits = reference.head(norm, matrix, expected)
    head = decoder.Head(norm.clone(), decoder.Linear(matrix.clone()))
    rotation.head(head)
    parts.append(graphs.head(head))
    data.close()
    onnx.save(joined(parts), tmp_path / "decoder.onnx")

    (found,) = OnnxDecoder(tmp_path / "decoder.onnx", spec, Place(threads=Threads(1))).extend(
        KVCache(spec, 1, 9), [0], list(states), [range(9)]
    )
    np.testing.assert_allclose(found, logits[0], atol=1e-4 * np.abs(logits).max())


def test_a_rotation_spreads_outliers() -> None:
    """What 8-bit products read: of a normed stream with one channel a hundred times the others."""
    config = random_weights.make_config(tiny.Shape()).text_config
    rotation = Rotation(decoder.describe(config, vocabulary=419, ragged_append=True))
    stream = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    stream[:, 5] *= 100
    peaks = [
        (x / x.square().mean(-1, keepdim=True).sqrt()).abs().max() for x in (stream, stream @ rotation.stream)
    ]
    assert peaks[0] > 7.9  # of at most 8: all of a row is in one channel
    assert peaks[1] < 4


@pytest.mark.parametrize(("bits", "most"), [(4, 0.09), (8, 0.006)])
def test_blocks_are_stored_as_they_are_read(bits: Literal[4, 8], most: float) -> None:
    """Odd numbers of blocks, in rows that are searched apart: what is stored is near the weights."""
    weight = np.random.default_rng(0).standard_normal((700, 96)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    form = quantize.Form(bits, 32, searched=True)
    integers, scales, zeros = quantize._in_chunks(weight, lambda rows: quantize._search(rows, bits, 32))
    centred = integers.reshape(700, 3, 32).astype(np.float32) - zeros[..., None]
    rounded = (centred * scales[..., None]).reshape(700, 96)
    assert np.linalg.norm(x @ (rounded - weight).T) < most * np.linalg.norm(x @ weight.T)
    stored = sum(array.nbytes for array in (quantize._packed(integers, bits), scales))
    stored += quantize._packed(zeros, bits).nbytes
    assert form.nbytes(*weight.shape) == pytest.approx(stored, rel=0.02)


@pytest.mark.parametrize("chosen", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("questions", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_answer_does_not_depend_on_load(
    chosen: Precision, questions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Replies alone, eight at a time in two orders, and with arrivals, chunks and slots at random."""
    export_bundle(CHECKPOINT, tmp_path / "b", precision=chosen, progress=lambda _: None)
    bundle = Bundle.open(tmp_path / "b")
    draw = cache(lambda seed: np.asarray(scenes.draw(scenes.layout(seed))))
    pairs = [(draw(scene.seed), dialogue.question) for scene, dialogue in held_out(questions)]
    engine = Engine(bundle, cache_mb=0)
    alone = [replies(engine.run(engine.submit(*pair, focus))) for pair in pairs]
    other: dict[str, int] = {}
    for seed in (1, 2):
        order = np.random.default_rng(seed).permutation(len(pairs))
        together = DualFocus(bundle, slots=16).ask_many(pairs[i] for i in order)
        differ = [replies(result) != alone[i] for i, result in zip(order, together, strict=True)]
        other[f"eight at a time, order {seed}"] = sum(differ)
    rng = np.random.default_rng(3)
    engine = Engine(bundle, slots=12, chunk=48)
    waiting = rng.permutation(len(pairs)).tolist()
    requests: dict[int, Request] = {}
    while waiting or not engine.idle:
        for _ in range(min(rng.poisson(0.4), len(waiting))):
            at = waiting.pop()
            requests[at] = engine.submit(*pairs[at], focus, priority=int(rng.integers(3)))
        engine.step()
    other["arriving at random"] = sum(
        replies(request.result) != alone[at] for at, request in requests.items()
    )
    with capsys.disabled():
        print(f"\n{chosen}, {questions} questions with another reply: {other}")
    assert len(requests) == questions
    assert set(other.values()) == {0}
