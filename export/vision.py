"""Vision tower and projector -> ``vision.onnx``, through optimum's exporter.

Any tower that transformers' AutoModel builds and that returns `hidden_states` will do. Layers past
the selected feature layer are dead code to the tracer: neither their nodes nor their weights reach
the file.
"""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_tensor
from optimum.exporters.onnx import export
from optimum.exporters.onnx.base import OnnxConfig
from optimum.utils import DummyVisionInputGenerator, NormalizedVisionConfig
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import no_init_weights

from dualfocus.export.graph import Array, DataFile, Graph
from dualfocus.export.quantize import EXACT, product, vision_form
from dualfocus.export.weights import Weights
from dualfocus.runtime.manifest import Precision

OPSET = 18
PARTS = ("model.vision_tower.", "model.multi_modal_projector.")


def read_tower(config: LlavaConfig, weights: Weights, folder: Path) -> LlavaForConditionalGeneration:
    """transformers' model of `config` with the weights of tower and projector, and without decoder layers.

    The weights are put into `folder` and mapped, so that they take no private memory beside the exporter's.
    """
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = 0
    config.text_config.layer_types = []  # where a model reads them, Qwen2, it wants a list
    with no_init_weights():  # memory that nobody writes to is not taken
        model = LlavaForConditionalGeneration(config).eval()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(PARTS) and tensor.is_floating_point():  # not batch norm's count of batches
            np.save(folder / f"{name}.npy", weights.read(name).numpy())
            tensors[name] = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
    model.load_state_dict(tensors, strict=False, assign=True)
    return model


class Vision(nn.Module):
    """pixel_values (N, 3, S, S) -> image_features (N, T, D), as `LlavaModel.get_image_features` does it."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.config = model.config.vision_config  # optimum asks a model for its configuration
        layers = model.config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else layers
        # "default" skips the class token
        self.first = 1 if model.config.vision_feature_select_strategy == "default" else 0

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


class Product(nn.Module):
    """A linear layer whose matrix is stored as ONNX multiplies with it, (inputs, outputs).

    The exporter would turn the other kind itself, in private memory.
    """

    def __init__(self, linear: nn.Linear, path: Path) -> None:
        super().__init__()
        np.save(path, np.ascontiguousarray(linear.weight.detach().numpy().T))
        self.weight = nn.Parameter(torch.from_numpy(np.load(path, mmap_mode="c")), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = torch.matmul(x, self.weight)
        return product if self.bias is None else product + self.bias


def export_vision(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Write the float32 graph as optimum does, its weights in it or beside it; other files may stay there."""
    vision = Vision(model).eval()
    linears = {name: layer for name, layer in vision.named_modules() if type(layer) is nn.Linear}
    for name, layer in linears.items():
        vision.set_submodule(name, Product(layer, path.with_name(f"{name}.transposed.npy")))
    try:
        export(vision, VisionOnnxConfig(vision.config), path, opset=OPSET)
    finally:
        for name, layer in linears.items():
            vision.set_submodule(name, layer)


def store_vision(source: Path, target: Path, precision: Precision, *, half: bool = False) -> None:
    """Write the float32 graph at `source` with weights of `precision`, which lie beside it, to `target`.

    With `half` it computes in float16, which is then the precision of all weights. In 8 bits, pictures
    encoded in one call share the range of their activations: `runtime.onnx` takes them one by one.
    """
    model = onnx.load(source, load_external_data=False)
    data = DataFile(target.with_name(f"{target.name}.data"))
    graph = Graph(data, OPSET, half=half)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    _name_once(model.graph)
    forms = {
        node.output[0]: vision_form(precision, node.name)
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors and not half
    }
    if half:
        _halve(model.graph)
    for value in model.graph.input:
        graph.declare(value)
    for value in model.graph.output:
        graph.declare(value, output=True)
    for node in model.graph.node:
        rewritten = forms.get(node.output[0], EXACT) != EXACT
        for name in node.input:
            if name in tensors and not (rewritten and name == node.input[1]):
                graph.weight(name, _array(tensors[name], source))
        if rewritten:
            x, name = node.input
            product(graph, x, _array(tensors[name], source).T, forms[node.output[0]], name, node.output[0])
        else:
            graph.copy(node)
    onnx.save(graph.model(), target)
    data.close()


def _name_once(graph: onnx.GraphProto) -> None:
    """Of weights that are equal, exporting keeps one, and nodes that copy it: name it wherever they are used.

    Such nodes are none that every engine takes.
    """
    weights = {tensor.name for tensor in graph.initializer}
    copies = [node for node in graph.node if node.op_type == "Identity" and node.input[0] in weights]
    of = {node.output[0]: node.input[0] for node in copies}
    for node in copies:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [of.get(name, name) for name in node.input]


def _halve(graph: onnx.GraphProto) -> None:
    """Turn every type float32 that the graph names into float16, but for its initializers."""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for attribute in chain.from_iterable(node.attribute for node in graph.node):
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:  # of a Cast
            attribute.i = TensorProto.FLOAT16
        elif attribute.t.data_type == TensorProto.FLOAT:  # of a Constant
            array = onnx.numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16)))


def _array(tensor: onnx.TensorProto, path: Path) -> Array:
    if onnx.external_data_helper.uses_external_data(tensor):
        tensor = copy.deepcopy(tensor)  # which the weights shall not stay in
        load_external_data_for_tensor(tensor, str(path.parent))
    array: Array = onnx.numpy_helper.to_array(tensor)
    return array
