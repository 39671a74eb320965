"""Graphs with their weights in fewer bits, and what that changes.

What is rewritten are the products with a weight matrix, the head's too; everything else, the KV cache and
what goes in and out stay float32. The recipes are what was measured to be worth it on a CPU (bench/LOG.md):

- fp16: weights rounded to half precision. A CPU computes in float32, so this is half the file, no faster.
- int8: one scale for an output channel, rounded to nearest, and one for all activations of a product, which
  multiplies hundreds of tokens more than twice as fast as blocks do. In the decoder that is fine where the
  activations are tame, once it is rotated (`rotate`); the down projections, whose inputs are not, and the
  head have blocks of weights with a scale each, and activations rounded in the same blocks. The tower's
  projector stays float32, as does the rotation of what comes into the decoder: their errors would go
  straight into the image's tokens, and they take next to no time.
- int4: the decoder in blocks of 32 weights with scale and zero point fitted by llama.cpp's k-quant search,
  as ONNX Runtime has it; the head, and the packed QKV and down projections of half of the layers, which
  cost quality most, in 8 bits. The tower as in int8.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import (
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from tokenizers import Tokenizer

from dualfocus.export.decoder import SINGLE_FILE_BYTES
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.manifest import Manifest
from dualfocus.runtime.onnx import OnnxDecoder, OnnxVisionEncoder, Threads
from dualfocus.runtime.sequence import embed
from dualfocus.runtime.turns import Turns

LAYER_PRODUCTS = 5  # of a layer, in the graph's order: QKV, attention's output, gate, up, down
QKV, DOWN = 0, 4
INT8_DOWN_BLOCK, INT8_HEAD_BLOCK, INT4_BLOCK = 128, 64, 32
INTEGER_ACTIVATIONS = 4  # MatMulNBits' accuracy level: products in integers, several times as fast as floats

QUESTIONS = (
    "What is written on the red sign above the door?",
    "How many people are standing in front of the white building?",
    "Is there a bicycle to the left of the tree?",
)


def quantize_decoder(source: Path, target: Path, precision: Literal["fp16", "int8", "int4"]) -> None:
    """Write the float32 graph at `source`, rotated for int8, with weights of `precision` to `target`."""
    model = onnx.load(source)
    if precision == "fp16":
        _halve(model)
        _save(model, target)
    elif precision == "int4":
        in_8_bits = {name: {"bits": 8} for name in _in_8_bits(model)}
        config = KQuantWeightOnlyQuantConfig(customized_weight_config=in_8_bits)
        _save(_in_blocks(model, block_size=INT4_BLOCK, algo_config=config), target)
    else:
        entrance, *products, head = (node.name for node, _ in _products(model))
        assert len(products) % LAYER_PRODUCTS == 0, "not a rotated graph of export.decoder's"
        down = products[DOWN::LAYER_PRODUCTS]
        for names, block in (down, INT8_DOWN_BLOCK), ([head], INT8_HEAD_BLOCK):
            rest = {entrance, *products, head} - {*names}
            model = _in_blocks(model, bits=8, block_size=block, is_symmetric=True, nodes_to_exclude=rest)
        _by_channel(model, target, sorted({*products} - {*down}))


def _in_blocks(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    """`model` with its products as MatMulNBits, as the quantizer's `options` say."""
    quantizer = MatMulNBitsQuantizer(model, accuracy_level=INTEGER_ACTIVATIONS, **options)
    with contextlib.redirect_stdout(io.StringIO()):  # the library draws a bar of its own
        quantizer.process()
    return quantizer.model.model


def _by_channel(model: onnx.ModelProto, target: Path, names: Sequence[str]) -> None:
    """Write `model` to `target`, the products called `names` with a scale for each output channel.

    What is multiplied in one call shares the range of its activations, and a session on an x86 processor
    without VNNI needs ``session.x64quantprecision``, which `runtime.onnx` sees to.
    """
    quantize_dynamic(
        model,
        target,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=names,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=_weights(model) / 4 > SINGLE_FILE_BYTES,
        extra_options={"MatMulConstBOnly": True},
    )


def quantize_vision(source: Path, target: Path, precision: Literal["fp16", "int8", "int4"]) -> None:
    """Write the float32 graph at `source`, its nodes named by optimum, with other weights to `target`.

    Pictures encoded in one call would share the range of their activations: `runtime.onnx` takes them one
    by one.
    """
    model = onnx.load(source)
    if precision == "fp16":
        _halve(model)
        _save(model, target)
    else:
        names = [node.name for node in model.graph.node if node.op_type == "MatMul"]
        _by_channel(model, target, [name for name in names if "/projector/" not in name])


def _save(model: onnx.ModelProto, target: Path) -> None:
    beside = _weights(model) > SINGLE_FILE_BYTES
    onnx.save(model, target, save_as_external_data=beside, location=f"{target.name}.data")


def _weights(model: onnx.ModelProto) -> int:
    """Bytes."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def _products(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """The products with a weight matrix, in the graph's order, and those matrices, (K, N)."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return [
        (node, weights[node.input[1]])
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights
    ]


def _in_8_bits(model: onnx.ModelProto) -> Iterator[str]:
    """Names of the products that int4 leaves in 8 bits.

    The layers are those in which llama.cpp's Q4_K_M gives more bits to the value and down projections: the
    first and the last eighth, and every third between. A matrix with an odd number of blocks, whose zero
    points end in half a byte, is more than the library's search can pack.
    """
    products = _products(model)
    layers = len(products) // LAYER_PRODUCTS
    assert len(products) == layers * LAYER_PRODUCTS + 1, "not a graph of export.decoder's"
    for i, (node, weight) in enumerate(products):
        layer, kind = divmod(i, LAYER_PRODUCTS)
        head = layer == layers
        dear = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        odd = -(-weight.dims[0] // INT4_BLOCK) % 2 == 1
        if head or odd or (dear and kind in (QKV, DOWN)):
            yield node.name


def _halve(model: onnx.ModelProto) -> None:
    """Store weight matrices as float16, cast back when they are read."""
    for node, weight in _products(model):
        half = onnx.numpy_helper.to_array(weight).astype(np.float16)
        weight.CopyFrom(onnx.numpy_helper.from_array(half, weight.name))
        cast = onnx.helper.make_node(
            "Cast", [weight.name], [f"{weight.name}.float32"], to=onnx.TensorProto.FLOAT
        )
        node.input[1] = cast.output[0]
        model.graph.node.insert(0, cast)


def errors(exact: Path, folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> Iterator[str]:
    """What quantising changed, in words: the graphs in `folder` against the float32 ones in `exact`.

    The decoder is asked the macro turns of `QUESTIONS` about made-up pictures, always the same, so that two
    exports can be compared; both decoders see the float32 tower's image tokens, so that its figures are its
    own.
    """
    pixels = _pictures(len(QUESTIONS), manifest.image.size)
    hidden, embeddings = manifest.decoder.hidden, np.load(folder / "embeddings.npy", mmap_mode="r")
    features, rounded = (
        OnnxVisionEncoder(place / "vision.onnx", manifest.image, hidden, Threads()).encode(pixels)
        for place in (exact, folder)
    )
    relative = float(np.linalg.norm(rounded - features) / np.linalg.norm(features))
    yield f"vision: image tokens {100 * relative:.2g} % away from float32's (relative L2)"
    divergences, same = [], []
    decoders = [OnnxDecoder(place / "decoder.onnx", manifest.decoder, Threads()) for place in (exact, folder)]
    for question, whole in zip(QUESTIONS, features, strict=True):
        tokens = Turns(manifest, tokenizer, question).macro("whole").tokens
        embedded = embed(tokens, embeddings, {"whole": whole})
        text = [i for i, token in enumerate(tokens) if isinstance(token, int)]
        exact_logits, logits = (
            decoder.extend(KVCache(manifest.decoder, 1, len(tokens)), [0], [embedded], [text])[0]
            for decoder in decoders
        )
        divergences.append(divergence(exact_logits, logits))
        same.append(exact_logits.argmax(-1) == logits.argmax(-1))
    kl, top_1 = np.concatenate(divergences), np.concatenate(same)
    yield (
        f"decoder: KL divergence from float32 {kl.mean():.2g} nats, the same likeliest token "
        f"{100 * top_1.mean():.1f} % of {len(kl)} times"
    )


def divergence(exact: Floats, logits: Floats) -> Floats:
    """(K, vocabulary) logits, twice -> (K,): the Kullback-Leibler divergence of the second from the first."""
    p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
            for x in (exact.astype(np.float64), logits.astype(np.float64)))  # fmt: skip
    result: Floats = (np.exp(p) * (p - q)).sum(-1)
    return result


def _pictures(n: int, size: int) -> Floats:
    """(n, 3, size, size) normalised pixels, with the areas and edges that pictures have and noise has not."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((n, 3, size, size), np.float32)
    for cells in (4, 16):
        coarse = rng.standard_normal((n, 3, cells, cells), np.float32)
        at = np.arange(size) * cells // size
        pixels += coarse[:, :, at][..., at]
    return pixels
