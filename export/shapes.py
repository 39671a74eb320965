"""The sizes of models with random weights, which `dualfocus export --random` makes.

Such a model says nothing sensible, and costs exactly what a trained one of its shape costs: it is here
to be timed and to be compared with other runtimes. Another one is another row of `SHAPES`; what makes
the weights is `random_weights`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dualfocus.export.errors import ExportError


@dataclass(frozen=True)
class Shape:
    """A LLaVA: CLIP tower, projector of two layers with GELU between, llama decoder."""

    name: str
    # tower
    image: int  # pixels a side
    patch: int  # pixels a side
    tower_layers: int
    tower_width: int
    tower_heads: int
    tower_mlp: int
    feature_layer: int  # whose output the projector sees; those after it are never run
    feature_strategy: str  # "default": without the class token; "full": with it
    # decoder
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    context: int  # tokens
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    tied: bool = False  # one table embeds tokens and scores them
    bias: bool = False
    crop: bool = False  # a centre crop instead of padding to a square

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2 + (self.feature_strategy == "full")


LLAVA_7B = Shape(
    name="llava-7b",
    # CLIP's ViT-L/14 at 336, without its last layer, as LLaVA-1.5 has it
    image=336,
    patch=14,
    tower_layers=24,
    tower_width=1024,
    tower_heads=16,
    tower_mlp=4096,
    feature_layer=-2,
    feature_strategy="default",
    # Vicuna-7B v1.5
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    head_size=128,
    mlp=11_008,
    vocabulary=32_000,
    context=4096,
)

SHAPES = {
    shape.name: shape
    for shape in [
        Shape(
            name="edge",
            # CLIP's ViT-B/16 at 384, all twelve layers: 576 tokens, as many as LLaVA-1.5's
            image=384,
            patch=16,
            tower_layers=12,
            tower_width=768,
            tower_heads=12,
            tower_mlp=3072,
            feature_layer=-1,
            feature_strategy="default",
            # SmolLM2-135M
            layers=30,
            hidden=576,
            heads=9,
            kv_heads=3,
            head_size=64,
            mlp=1536,
            vocabulary=49_152,
            context=2048,
            rope_theta=100_000.0,
            tied=True,
        ),
        LLAVA_7B,
        # Vicuna-13B v1.5 behind the same tower
        replace(LLAVA_7B, name="llava-13b", layers=40, hidden=5120, heads=40, kv_heads=40, mlp=13_824),
    ]
}


def named(name: str) -> Shape:
    """The shape of that name; ExportError where there is none."""
    if name not in SHAPES:
        raise ExportError(f"no shape is called {name!r}, expected one of {', '.join(SHAPES)}")
    return SHAPES[name]
