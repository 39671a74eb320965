"""A decoder in a rotated basis: it computes the same, and its activations are tame enough for 8 bits.

A llama's residual stream has a few channels a hundred times the size of the others, which take the range of
an 8-bit product's activations for themselves. RMSNorm without its weights does not care for a rotation of
the stream, so every matrix that reads the stream can be rotated one way and every matrix that writes it
the other, and the outliers are spread over all channels. So are an attention head's values, between their
projection and the output projection. Nothing of it is left to do at run time but to rotate what comes in
(QuaRot, Ashkboos et al. 2024, without its rotations inside attention and MLP).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualfocus.export.decoder import Head, Layer, Linear
from dualfocus.runtime.manifest import DecoderSpec


class Rotation:
    """A rotation of one decoder, which changes its weights in place, a layer at a time."""

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec
        self.stream = _rotation(spec.hidden, 0)  # a state times this is the rotated state

    @property
    def entrance(self) -> Tensor:
        """The (hidden, hidden) matrix of the product that rotates what comes in."""
        return self.stream.T

    def layer(self, i: int, layer: Layer) -> None:
        """Rotate layer `i`."""
        self._reads(layer.norm, layer.qkv)
        self._reads(layer.mlp_norm, layer.gate, layer.up)
        self._writes(layer.project)
        self._writes(layer.down)
        self._rotate_values(layer, i)

    def head(self, head: Head) -> None:
        """Rotate what comes behind the layers."""
        self._reads(head.norm, head.head)

    def _reads(self, norm: Tensor, *readers: Linear) -> None:
        """Rotate what `readers` read; the norm's weights, before it, go into theirs."""
        for reader in readers:
            torch.matmul(reader.weight * norm, self.stream, out=reader.weight)
        norm.fill_(1)

    def _writes(self, writer: Linear) -> None:
        torch.matmul(self.stream.T, writer.weight.clone(), out=writer.weight)
        if writer.bias is not None:
            writer.bias = writer.bias @ self.stream

    def _rotate_values(self, layer: Layer, i: int) -> None:
        """Rotate each head's values: the output projection reads what query heads found of their group's."""
        groups, size = self._spec.kv_heads, self._spec.head_size
        first = (self._spec.heads + groups) * size  # behind queries and keys
        turns = torch.stack([_rotation(size, 1 + i * groups + group) for group in range(groups)])
        values = layer.qkv.weight[first:]
        values.copy_(torch.einsum("gij,gid->gjd", turns, values.unflatten(0, (groups, size))).flatten(0, 1))
        if layer.qkv.bias is not None:
            bias = layer.qkv.bias[first:]
            bias.copy_(torch.einsum("gij,gi->gj", turns, bias.unflatten(0, (groups, size))).flatten())
        found = layer.project.weight.unflatten(1, (groups, -1, size))
        layer.project.weight = torch.einsum("dghi,gij->dghj", found, turns).flatten(1)


def _rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal (size, size) matrix, float32."""
    generator = torch.Generator().manual_seed(seed)
    rotation, triangle = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = rotation * triangle.diagonal().sign()  # without, its columns would lean one way
    return signed.float()
