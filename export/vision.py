"""Vision tower and projector -> ``vision.onnx``, through optimum's exporter.

Any tower that transformers' AutoModel builds and that returns `hidden_states` will do. Layers past
the selected feature layer are dead code to the tracer: neither their nodes nor their weights reach
the file.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from optimum.exporters.onnx import export
from optimum.exporters.onnx.base import OnnxConfig
from optimum.utils import DummyVisionInputGenerator, NormalizedVisionConfig
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dualfocus.export.decoder import SINGLE_FILE_BYTES

OPSET = 18


class Vision(nn.Module):
    """pixel_values (N, 3, S, S) -> image_features (N, T, D), as `LlavaModel.get_image_features` does it."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.config = model.config.vision_config  # optimum asks a model for its configuration
        layers = model.config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else layers
        self.first = (
            1 if model.config.vision_feature_select_strategy == "default" else 0
        )  # skip the class token

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states
        selected = torch.cat([hidden[layer][:, self.first :] for layer in self.layers], dim=-1)
        return {"image_features": self.projector(selected)}


class VisionOnnxConfig(OnnxConfig):
    """The graph's one input and one output, of which only the batch is dynamic."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"pixel_values": {0: "batch"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"image_features": {0: "batch"}}


def export_vision(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Write ``vision.onnx`` (and, beyond `SINGLE_FILE_BYTES` of weights, a file with them beside it)."""
    vision = Vision(model).eval()
    export(vision, VisionOnnxConfig(vision.config), path, opset=OPSET)
    if path.stat().st_size > SINGLE_FILE_BYTES:  # optimum writes a second file from 2 GB on only
        onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.data")
