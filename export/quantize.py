"""How the products with weight matrices are stored, and what fewer bits change.

Everything but these products, the KV cache and what goes in and out stay float32. The recipes are what was
measured to be worth it on a CPU (bench/LOG.md):

- fp16: weights rounded to half precision. A CPU computes in float32, so this is half the file, no faster.
- int8: a scale for each output channel, and products in integers, which multiply hundreds of tokens faster
  than blocks do. The decoder is rotated (`rotate`), so that 8 bits hold its activations. What QKV, gate and
  up read has a root mean square of 1, and a fixed range. The output projection takes each token's own range.
  The down projections, whose inputs have outliers, and the head have blocks of weights with a scale each,
  and activations rounded in the same blocks. The tower's products share one range for all activations of a
  call. Its projector stays float32, as does the rotation of what comes into the decoder: their errors would
  go straight into the image's tokens, and they take next to no time.
- int4: the decoder in blocks of 32 weights with scale and zero point fitted by llama.cpp's k-quant search,
  as ONNX Runtime has it; the head, and the packed QKV and down projections of half of the layers, which
  cost quality most, in 8 bits. The tower as in int8. TensorRT has no zero points: its weights are signed.

No range in the decoder spans several tokens: a token's result does not depend on which others share the call.

For a GPU all the rest is float16, the tower too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import TensorProto
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

from dualfocus.export.graph import MICROSOFT, Graph
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.manifest import Precision

INT8_DOWN_BLOCK, INT8_HEAD_BLOCK, INT4_BLOCK = 128, 64, 32
# Clips what an RMSNorm gives out. Rotated, it is near a normal distribution, for which 8 bits err least here.
NORMED_PEAK = 4.0
INTEGER_ACTIVATIONS = 4  # MatMulNBits' accuracy level: products in integers, several times as fast as floats
# Weights that are searched at a time: what that takes fits a processor's cache, and is below what malloc maps
# by itself (`stream`), which made the search four times as slow.
CHUNK = 1 << 16

# What sets the range of a product's 8-bit activations: all of a call, each token, or NORMED_PEAK.
Range = Literal["call", "token", "normed"]
Part = Literal["qkv", "project", "gate", "up", "down", "head"]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Form:
    """How a matrix is stored: `bits` a weight, a scale for `block` of them."""

    bits: Literal[32, 16, 8, 4]
    block: int | None = None  # None: in 8 bits a scale for each output channel; in 16 and 32 there is none
    searched: bool = False  # blocks have a zero point too, fitted by k-quant's search; else symmetric
    range: Range = "call"  # for 8 bits without blocks

    def nbytes(self, outputs: int, inputs: int) -> int:
        """What a matrix takes in the file."""
        weights = outputs * inputs * self.bits // 8
        if self.block is None:
            return weights + (5 * outputs if self.bits == 8 else 0)
        blocks = outputs * -(-inputs // self.block)
        return blocks * (self.block * self.bits // 8 + 4) + (blocks * self.bits // 8 if self.searched else 0)


EXACT = Form(32)
_OF: dict[Precision, Form] = {"fp32": EXACT, "fp16": Form(16)}


def decoder_form(precision: Precision, part: Part, layer: int, layers: int) -> Form:
    """How a product of the decoder is stored.

    The layers in which int4 gives more bits to the QKV and down projections are those in which llama.cpp's
    Q4_K_M gives them to the value and down projections: the first and the last eighth, and every third
    between.
    """
    if precision == "int8":
        if part in ("down", "head"):
            return Form(8, INT8_DOWN_BLOCK if part == "down" else INT8_HEAD_BLOCK)
        return Form(8, range="token" if part == "project" else "normed")
    if precision == "int4":
        dear = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        more = part == "head" or (dear and part in ("qkv", "down"))
        return Form(8 if more else 4, INT4_BLOCK, searched=True)
    return _OF[precision]


def vision_form(precision: Precision, node: str) -> Form:
    """How a product of the tower, named by optimum, is stored."""
    if precision in ("int8", "int4"):
        return EXACT if "/projector/" in node else Form(8)
    return _OF[precision]


def product(graph: Graph, x: str, weight: Floats, form: Form, name: str, output: str) -> str:
    """Add the product of `x` with the (N, K) matrix `weight`, stored as `form` says: (…, K) -> (…, N)."""
    if form.block is not None:
        return _block_product(graph, x, weight, form, name, output)
    if form.bits == 8:
        return _channel_product(graph, x, weight, form, name, output)
    stored = graph.weight(name, weight.T.astype(np.float32 if form.bits == 32 else np.float16))
    if form.bits == 16 and not graph.half:
        stored = graph.add("Cast", [stored], f"{name}.float32", to=TensorProto.FLOAT)
    return graph.add("MatMul", [x, stored], output)


def _channel_product(graph: Graph, x: str, weight: Floats, form: Form, name: str, output: str) -> str:
    """A product in integers, with a scale for each output channel.

    A session on an x86 processor without VNNI needs ``session.x64quantprecision``, which `runtime.onnx` sets.
    """
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    rounded = np.rint(weight / scale[:, None]).astype(np.int8)
    matrix = [
        graph.weight(f"{name}.int8", rounded.T),
        graph.weight(f"{name}.scale", scale),
        graph.weight(f"{name}.zero", np.zeros(len(scale), np.int8)),
    ]
    if form.range == "call":
        return _call_product(graph, x, matrix, output)
    if form.range == "normed":
        return _fixed_product(graph, x, NORMED_PEAK, matrix, name, output)
    last = graph.weight("last_axis", np.array([-1], np.int64))
    peak = graph.add("ReduceMax", [graph.add("Abs", [x], f"{x}.abs"), last], f"{x}.peak", keepdims=1)
    # A token of zeros becomes NaN, and that some integer: the product is finite, and 0 times its peak.
    scaled = graph.add("Div", [x, peak], f"{x}.scaled")
    return graph.add(
        "Mul", [_fixed_product(graph, scaled, 1.0, matrix, name, f"{output}.scaled"), peak], output
    )


def _call_product(graph: Graph, x: str, matrix: list[str], output: str) -> str:
    """Of activations with one range for all of a call; `matrix` is its integers, scales and zero points."""
    integers, scales, zeros = matrix
    of_x = [f"{x}.uint8", f"{x}.scale", f"{x}.zero"]
    graph.add("DynamicQuantizeLinear", [x], of_x)  # products of the same share it
    both = graph.add("Mul", [of_x[1], scales], f"{output}.scale")
    whole = graph.add("MatMulInteger", [of_x[0], integers, of_x[2], zeros], f"{output}.int32")
    return graph.add(
        "Mul", [graph.add("Cast", [whole], f"{output}.float32", to=TensorProto.FLOAT), both], output
    )


def _fixed_product(graph: Graph, x: str, peak: float, matrix: list[str], name: str, output: str) -> str:
    """Of activations clipped to -`peak` and `peak`; ONNX Runtime fuses it to MatMulIntegerToFloat."""
    step = graph.weight(f"step.{peak}", np.array(peak / 127, np.float32))
    centre = graph.weight("centre", np.array(128, np.uint8))
    whole = graph.add("QuantizeLinear", [x, step, centre], f"{x}.uint8")  # products of the same share it
    rounded = graph.add("DequantizeLinear", [whole, step, centre], f"{x}.rounded")
    dequantized = graph.add("DequantizeLinear", matrix, f"{name}.float32", axis=1)
    return graph.add("MatMul", [rounded, dequantized], output)


def _block_product(graph: Graph, x: str, weight: Floats, form: Form, name: str, output: str) -> str:
    """A product whose weights have a scale for every block of inputs, and a zero point if it was searched."""
    assert form.block is not None
    (outputs, inputs), block = weight.shape, form.block
    if graph.half and graph.is_standard:
        integers, scales = _in_chunks(weight, lambda rows: _signed(rows, form.bits, block))
        matrix = _signed_dequantized(graph, integers[:, :inputs].T, scales.T, form, name)
        return graph.add("MatMul", [x, matrix], output)
    find = _search if form.searched else _round
    integers, scales, *zeros = _in_chunks(weight, lambda rows: find(rows, form.bits, block))
    if graph.is_standard:
        matrix = _dequantized(graph, integers[:, :inputs].T, scales.T, [zero.T for zero in zeros], form, name)
        return graph.add("MatMul", [x, matrix], output)
    packed = _packed(integers, form.bits).reshape(outputs, scales.shape[1], -1)
    stored = [graph.weight(f"{name}.int{form.bits}", packed), graph.weight(f"{name}.scale", scales)]
    stored += [graph.weight(f"{name}.zero", _packed(zero, form.bits)) for zero in zeros]
    return graph.add(
        "MatMulNBits",
        [x, *stored],
        output,
        domain=MICROSOFT,
        K=inputs,
        N=outputs,
        bits=form.bits,
        block_size=block,
        accuracy_level=INTEGER_ACTIVATIONS,
    )


def _dequantized(
    graph: Graph, integers: Bytes, scales: Floats, zeros: list[Bytes], form: Form, name: str
) -> str:
    """The (K, N) matrix of `integers`, of which ONNX Runtime makes MatMulNBits when it multiplies."""
    # what MatMulNBits takes for granted without a zero point has to be said here
    zero = zeros[0] if zeros else np.full(scales.shape, 1 << (form.bits - 1), np.uint8)
    stored = []
    for kind, array in (("", integers), (".zero", zero)):
        of = f"{name}.int{form.bits}{kind}"
        if form.bits == 8:
            stored.append(graph.weight(of, array))
        else:
            stored.append(graph.half_bytes(of, _packed(array.reshape(-1), 4), array.shape, TensorProto.UINT4))
    inputs = [stored[0], graph.weight(f"{name}.scale", scales), stored[1]]
    return graph.add("DequantizeLinear", inputs, f"{name}.float32", axis=0, block_size=form.block)


def _signed_dequantized(
    graph: Graph, integers: npt.NDArray[np.int8], scales: Floats, form: Form, name: str
) -> str:
    """The (K, N) matrix of signed `integers` as TensorRT knows it, which has no zero points."""
    if form.bits == 8:
        stored = graph.weight(f"{name}.int8", integers)
    else:
        packed = _packed((integers.reshape(-1) & 0xF).astype(np.uint8), 4)
        stored = graph.half_bytes(f"{name}.int4", packed, integers.shape, TensorProto.INT4)
    inputs = [stored, graph.weight(f"{name}.scale", scales)]
    return graph.add("DequantizeLinear", inputs, f"{name}.float16", axis=0, block_size=form.block)


def _in_chunks(weight: Floats, find: Callable[[Floats], tuple[Any, ...]]) -> list[Any]:
    """What `find` makes of `weight`, some rows at a time, on every core."""
    if weight.strides[0] == 0:  # one row over and over, where only the shape matters: it is searched once
        return [np.broadcast_to(found, (len(weight), *found.shape[1:])) for found in find(weight[:1])]
    rows = max(1, CHUNK // weight.shape[1])
    chunks = [weight[start : start + rows] for start in range(0, len(weight), rows)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [np.concatenate(found) for found in zip(*pool.map(find, chunks), strict=True)]


def _round(weight: Floats, bits: int, block: int) -> tuple[Bytes, Floats]:
    """(N, K) -> (N, blocks * block) integers and (N, blocks) scales, rounded to nearest."""
    assert bits == 8, "in 4 bits, what follows is packed"
    quantizer = DefaultWeightOnlyQuantizer(
        DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=bits)
    )
    integers, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight.T))
    return integers.reshape(len(weight), -1), scales


def _signed(weight: Floats, bits: int, block: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """(N, K) -> (N, blocks * block) signed integers and (N, blocks) scales above 0.

    Each block's scale is the best of a few, by squared error: the extreme may be cut off where that helps.
    """
    rows, blocks = len(weight), -(-weight.shape[1] // block)
    parts = np.pad(weight, ((0, 0), (0, blocks * block - weight.shape[1]))).reshape(rows, blocks, block)
    most = 2 ** (bits - 1)
    extremes = np.abs(parts).max(-1, keepdims=True)
    found, chosen = np.empty(parts.shape, np.int8), np.empty_like(extremes)
    least = np.full_like(extremes, np.inf)
    for reach in most + np.linspace(-1, 1.5, 6 if bits == 4 else 1):
        # as float16 has it, in which it is stored, and never 0
        scales = np.maximum(extremes / reach, 2.0**-24).astype(np.float16).astype(np.float32)
        integers = np.rint(parts / scales).clip(-most, most - 1)
        errors = ((integers * scales - parts) ** 2).sum(-1, keepdims=True)
        better = errors < least
        found, chosen = np.where(better, integers, found).astype(np.int8), np.where(better, scales, chosen)
        least = np.minimum(errors, least)
    return found.reshape(rows, -1), chosen.reshape(rows, blocks)


def _search(weight: Floats, bits: int, block: int) -> tuple[Bytes, Floats, Bytes]:
    """(N, K) -> (N, blocks * block) integers, (N, blocks) scales and (N, blocks) zero points."""
    rows, blocks = len(weight), -(-weight.shape[1] // block)
    padded = np.pad(weight, ((0, 0), (0, blocks * block - weight.shape[1])))
    with np.errstate(divide="ignore", invalid="ignore"):  # of blocks that are all zero
        integers, scales, zeros = quant_tensor_k_quant_cpu(padded, bits, block)
    integers = integers.astype(np.uint8).reshape(rows, -1)
    return integers, scales.astype(np.float32).reshape(rows, blocks), zeros.reshape(rows, blocks)


def _packed(integers: Bytes, bits: int) -> Bytes:
    """Two of 4 bits in a byte, the first in its lower half; a last one alone is beside a zero."""
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, 1)])
    low, high = integers[..., ::2], integers[..., 1::2]
    packed: Bytes = (low | high << 4).astype(np.uint8)
    return packed


def divergence(exact: Floats, logits: Floats) -> Floats:
    """(K, vocabulary) logits, twice -> (K,): the Kullback-Leibler divergence of the second from the first."""
    p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
            for x in (exact.astype(np.float64), logits.astype(np.float64)))  # fmt: skip
    result: Floats = (np.exp(p) * (p - q)).sum(-1)
    return result
