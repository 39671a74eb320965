"""The vision tower of the built-in model, as a Hugging Face model of its own.

Importing this module registers it, so that ``AutoConfig`` and ``LlavaForConditionalGeneration`` build it
from a checkpoint's ``vision_config``. Convolutions see shapes and letters after minutes of training where
a plain ViT of this size sees neither after hours; two transformer layers then let cells look at each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class NanoVisionConfig(PretrainedConfig):
    """Sizes of the tower: (image_size / patch_size)² cells of `hidden_size` features."""

    model_type = "dualfocus_nano_vision"

    def __init__(
        self,
        image_size: int = 160,
        patch_size: int = 20,
        channels: tuple[int, int] = (32, 96),
        hidden_size: int = 160,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels = list(channels)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class _Attention(nn.Module):
    """One pre-norm transformer layer over the cells."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)  # (N, H, T, D / H)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoVisionModel(PreTrainedModel):
    """pixel_values (N, 3, S, S) f32 -> hidden_states[-1] (N, (S / patch)², hidden) f32, row by row."""

    config_class = NanoVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: NanoVisionConfig) -> None:
        super().__init__(config)
        first, second = config.channels
        width = config.hidden_size
        if config.patch_size % 4:
            raise ValueError(f"patch_size is {config.patch_size}, expected a multiple of 4")
        stride = config.patch_size // 4
        self.stem = nn.Conv2d(3, first, stride + 2, stride=stride, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(first)
        self.fine = nn.Sequential(_Residual(first), _Residual(first))
        self.down1 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.down1_norm = nn.BatchNorm2d(second)
        self.middle = nn.Sequential(_Residual(second), _Residual(second))
        self.down2 = nn.Conv2d(second, width, 3, stride=2, padding=1, bias=False)
        self.down2_norm = nn.BatchNorm2d(width)
        self.coarse = _Residual(width)
        cells = (config.image_size // config.patch_size) ** 2
        self.position = nn.Parameter(torch.randn(cells, width) * 0.02)
        heads = config.num_attention_heads
        self.layers = nn.ModuleList(_Attention(width, heads) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initialisation: the defaults of transformers suit no convolution."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        x = F.relu(self.stem_norm(self.stem(pixel_values)))
        x = F.relu(self.down1_norm(self.down1(self.fine(x))))
        x = F.relu(self.down2_norm(self.down2(self.middle(x))))
        x = self.coarse(x).flatten(2).transpose(1, 2) + self.position  # (N, T, D)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return BaseModelOutput(last_hidden_state=x, hidden_states=(x,))


AutoConfig.register(NanoVisionConfig.model_type, NanoVisionConfig)
AutoModel.register(NanoVisionConfig, NanoVisionModel)
