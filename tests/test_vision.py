"""The exported vision encoder, whatever the tower: in float32 it is torch's, in int8 near it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from dualfocus.export import nano_tower, verify
from dualfocus.export.verify import Floats
from dualfocus.export.vision import export_vision, store_vision
from dualfocus.runtime.manifest import Precision
from dualfocus.train.nano import build_model, build_tokenizer

INT8_ERROR = (
    0.03  # relative, L2; the towers here came to 0.011 to 0.019, in torch's bfloat16 to 0.008 to 0.009
)

# ---- towers


def clip() -> LlavaForConditionalGeneration:
    return tiny.make_model(tiny.Shape(feature_layer=-1))


def clip_with_gelu() -> LlavaForConditionalGeneration:
    """The activation of OpenCLIP's towers, where OpenAI's have the quick one; the class token kept."""
    model = tiny.make_model(tiny.Shape(image=84, tower_heads=4, feature_strategy="full"))
    for layer in model.model.vision_tower.vision_model.encoder.layers:
        layer.mlp.activation_fn = nn.GELU()
    return model


def clip_of_two_layers() -> LlavaForConditionalGeneration:
    """The projector sees two layers side by side."""
    plain = tiny.make_model(tiny.Shape())
    config = LlavaConfig(
        plain.config.vision_config,
        plain.config.text_config,
        image_token_index=3,
        vision_feature_layer=[-3, -1],
    )
    return with_random_weights(config)


def siglip() -> LlavaForConditionalGeneration:
    tower = SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=64,
        patch_size=16,
    )
    return with_last_layer_of(tower)


def nano() -> LlavaForConditionalGeneration:
    """Convolutions, batch norms and an attention of its own."""
    tower = nano_tower.NanoVisionConfig(
        image_size=64,
        patch_size=16,
        channels=(8, 16),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return with_last_layer_of(tower)


def with_last_layer_of(
    tower: SiglipVisionConfig | nano_tower.NanoVisionConfig,
) -> LlavaForConditionalGeneration:
    """No class token to skip."""
    config = LlavaConfig(
        tower,
        tiny.make_model(tiny.Shape()).config.text_config,
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return with_random_weights(config)


def with_random_weights(config: LlavaConfig) -> LlavaForConditionalGeneration:
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_().mul_(weight[0].numel() ** -0.5)  # variance kept from input to output
    return model


TOWERS = {  # and how many products with a matrix of weights it has, the projector's two not counted
    "clip": (clip, 18),
    "clip-with-gelu": (clip_with_gelu, 12),
    "clip-of-two-layers": (clip_of_two_layers, 18),
    "siglip": (siglip, 12),
    "nano": (nano, 8),
}


# ---- what each test looks at


class Exported:
    """One tower in both precisions, four pictures and torch's features of them."""

    def __init__(self, folder: Path, name: str) -> None:
        build, self.products = TOWERS[name]
        self.model = build()
        size = self.model.config.vision_config.image_size
        self.pixels = np.random.default_rng(7).standard_normal((4, 3, size, size), np.float32)
        self.expected = verify.image_features(self.model, self.pixels)
        self.paths: dict[Precision, Path] = {"fp32": folder / "fp32.onnx", "int8": folder / "int8.onnx"}
        export_vision(self.model, folder / "optimum.onnx")
        for precision, path in self.paths.items():
            store_vision(folder / "optimum.onnx", path, precision)

    def features(self, precision: Precision, pixels: Floats) -> Floats:
        return features(self.paths[precision], pixels)


def features(path: Path, pixels: Floats) -> Floats:
    options = ort.SessionOptions()
    # Without VNNI, ONNX Runtime adds two products of u8 with s8 in 16 bits, which is not enough. This
    # makes the weights u8, which loses nothing on any CPU.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    result: Floats = session.run(["image_features"], {"pixel_values": pixels})[0]
    return result


def relative_error(got: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=TOWERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    logging.disable(logging.WARNING)  # the exporters', about their own insides
    try:
        return Exported(tmp_path_factory.mktemp("vision"), request.param)
    finally:
        logging.disable(logging.NOTSET)


# ---- float32


@pytest.mark.parametrize("pictures", [1, 4])
def test_float_is_torch(exported: Exported, pictures: int) -> None:
    got = exported.features("fp32", exported.pixels[:pictures])
    verify.Difference.between("vision", got, exported.expected[:pictures]).check()


def test_weights_that_are_equal_need_no_copies(tmp_path: Path) -> None:
    """A fresh tower has many; engines for GPUs take no nodes that copy weights."""
    model = build_model(build_tokenizer(), "nano", 0).eval()
    export_vision(model, tmp_path / "optimum.onnx")
    store_vision(tmp_path / "optimum.onnx", tmp_path / "fp32.onnx", "fp32")

    def copied(name: str) -> int:
        return sum(node.op_type == "Identity" for node in onnx.load(tmp_path / name).graph.node)

    assert copied("optimum.onnx") > 0
    assert copied("fp32.onnx") == 0
    pixels = np.random.default_rng(7).standard_normal((2, 3, 160, 160), np.float32)
    expected = verify.image_features(model, pixels)
    assert relative_error(features(tmp_path / "fp32.onnx", pixels), expected) < 1e-5


def test_float_in_a_batch_is_one_by_one(exported: Exported) -> None:
    together = exported.features("fp32", exported.pixels)
    alone = [exported.features("fp32", picture[None]) for picture in exported.pixels]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5 * float(np.abs(together).max()))


# ---- int8


def test_int8_is_near(exported: Exported) -> None:
    """Near, and not the float graph under another name: one by one as well as together."""
    alone = [exported.features("int8", picture[None]) for picture in exported.pixels]
    for got in (np.concatenate(alone), exported.features("int8", exported.pixels)):
        assert 1e-3 < relative_error(got, exported.expected) < INT8_ERROR


def test_int8_has_a_scale_per_channel(exported: Exported) -> None:
    """The tower's matrices are s8 with a scale for each of their columns; only the projector's are float."""
    graph = onnx.load(exported.paths["int8"]).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    quantised = [node.input[1] for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(quantised) == exported.products
    for name in quantised:
        assert weights[name].data_type == onnx.TensorProto.INT8
        assert list(weights[name.replace(".int8", ".scale")].dims) == [weights[name].dims[1]]
    left = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    projector = exported.model.model.multi_modal_projector
    assert [list(weights[node.input[1]].dims) for node in left] == [
        list(linear.weight.T.shape) for linear in (projector.linear_1, projector.linear_2)
    ]
