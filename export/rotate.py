"""A decoder in a rotated basis: it computes the same, and its activations are tame enough for 8 bits.

A llama's residual stream has a few channels a hundred times the size of the others, which take the range of
an 8-bit product's activations for themselves. RMSNorm without its weights does not care for a rotation of
the stream, so every matrix that reads the stream can be rotated one way and every matrix that writes it
the other, and the outliers are spread over all channels. So are an attention head's values, between their
projection and the output projection. Nothing of it is left to do at run time but to rotate what comes in
(QuaRot, Ashkboos et al. 2024, without its rotations inside attention and MLP).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dualfocus.export.decoder import Decoder, Layer

SEED = 0


def rotated(decoder: Decoder) -> Decoder:
    """A copy of `decoder` that computes the same in a rotated basis."""
    decoder = copy.deepcopy(decoder)  # whose weights are the checkpoint's own
    generator = torch.Generator().manual_seed(SEED)
    stream = _rotation(decoder.head.in_features, generator)
    with torch.no_grad():
        for layer in decoder.layers:
            assert isinstance(layer, Layer)
            _reads(stream, layer.norm.weight, layer.attention.qkv)
            _reads(stream, layer.mlp_norm.weight, layer.mlp.gate_proj, layer.mlp.up_proj)
            _writes(stream, layer.project)
            _writes(stream, layer.mlp.down_proj)
            _rotate_values(layer, generator)
        _reads(stream, decoder.norm.weight, decoder.head)
        decoder.entrance = nn.Linear(*stream.shape, bias=False)
        decoder.entrance.weight.copy_(stream.T)
    return decoder


def _rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal (size, size) matrix, f64."""
    rotation, triangle = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = rotation * triangle.diagonal().sign()  # without, its columns would lean one way
    return signed


def _reads(stream: Tensor, norm: Tensor, *readers: nn.Linear) -> None:
    """Rotate what `readers` read; the norm's weights, before it, go into theirs."""
    for reader in readers:
        reader.weight.copy_((reader.weight.double() * norm.double()) @ stream)
    norm.fill_(1)


def _writes(stream: Tensor, writer: nn.Linear) -> None:
    writer.weight.copy_(stream.T @ writer.weight.double())
    if writer.bias is not None:
        writer.bias.copy_(writer.bias.double() @ stream)


def _rotate_values(layer: Layer, generator: torch.Generator) -> None:
    """Rotate each head's values: the output projection reads what query heads found of their group's."""
    attention, project = layer.attention, layer.project
    groups, size = attention.kv_heads, attention.head_size
    first = (attention.heads + groups) * size  # behind queries and keys
    turns = torch.stack([_rotation(size, generator) for _ in range(groups)])
    values = attention.qkv.weight[first:]
    values.copy_(
        torch.einsum("gij,gid->gjd", turns, values.double().unflatten(0, (groups, size))).flatten(0, 1)
    )
    if attention.qkv.bias is not None:
        bias = attention.qkv.bias[first:]
        bias.copy_(torch.einsum("gij,gi->gj", turns, bias.double().unflatten(0, (groups, size))).flatten())
    found = project.weight.double().unflatten(1, (groups, -1, size))
    project.weight.copy_(torch.einsum("dghi,gij->dghj", found, turns).flatten(1))
