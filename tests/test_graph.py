"""Graphs of other kinds are refused before ONNX Runtime sees them, and exported ones are read as they are."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dualfocus.runtime import Bundle, graph
from dualfocus.runtime.bundle import BUILT_IN, read_manifest
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.graph import Tensor

MANIFEST, _ = read_manifest(BUILT_IN)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILT_IN, tmp_path / "bundle"))


def change(bundle: Path, name: str, edit: Callable[[Any], object]) -> None:
    """Edit a graph with the `onnx` package, and have the manifest vouch for what comes of it."""
    model = onnx.load(bundle / name, load_external_data=False)
    edit(model)
    data = model.SerializeToString()
    (bundle / name).write_bytes(data)
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(raw))


def tensors(values: Any) -> dict[str, tuple[int, list[int | None]]]:
    """What the `onnx` package reads of inputs or outputs."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [
                size.dim_value if size.HasField("dim_value") else None
                for size in value.type.tensor_type.shape.dim
            ],
        )
        for value in values
    }


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
def test_a_graph_is_read_as_the_onnx_package_reads_it(name: str) -> None:
    found, model = graph.read(BUILT_IN / name), onnx.load(BUILT_IN / name, load_external_data=False)
    codes = {kind: code for code, kind in graph.TYPES.items()}
    for ours, theirs in ((found.inputs, model.graph.input), (found.outputs, model.graph.output)):
        assert {key: (codes[of.type], list(of.shape)) for key, of in ours.items()} == tensors(theirs)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert found.weights == [{e.key: e.value for e in tensor.external_data} for tensor in outside]
    assert len(outside) > 20


def test_the_codes_of_types_are_onnxs() -> None:
    for code, name in graph.TYPES.items():
        assert helper.tensor_dtype_to_np_dtype(code) == np.dtype(name)


def test_what_is_expected_is_what_is_exported(tiny_bundle: Path) -> None:
    for place in (BUILT_IN, tiny_bundle):
        manifest, _ = read_manifest(place)
        graph.check(place, manifest, manifest.files)


def test_a_device_takes_ids_and_float16() -> None:
    manifest = replace(MANIFEST, target="cuda")
    inputs, outputs = graph.decoder(manifest)
    assert inputs["tokens"] == Tensor("int64", (None, None))
    assert inputs["images"] == Tensor("float16", (None, 192))
    assert "inputs_embeds" not in inputs
    assert {"best", "peak", "logsumexp", "logits"} < set(outputs)
    assert graph.vision(manifest)[0]["pixel_values"].type == "float16"


# ---- what is refused


def add_loop(model: Any) -> None:
    """An endless one, which computes nothing that anybody needs."""
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    inside = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes_on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("goes_on", TensorProto.BOOL, [])],
    )
    model.graph.initializer.append(true)
    model.graph.node.append(helper.make_node("Loop", ["", "true"], [], name="endless", body=inside))


def add_if(model: Any) -> None:
    branch = helper.make_graph([], "branch", [], [])
    node = helper.make_node("If", ["true"], ["chosen"])
    node.attribute.append(helper.make_attribute("then_branch", branch))
    model.graph.node.append(node)


def add_graphs(model: Any) -> None:
    node = helper.make_node("Scan", ["a"], ["b"])
    node.attribute.append(helper.make_attribute("bodies", [helper.make_graph([], "one", [], [])]))
    model.graph.node.append(node)


def add_function(model: Any) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(
        helper.make_function("local", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 18)])
    )


def add_sparse(model: Any) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def set_domain(model: Any) -> None:
    model.graph.node[3].domain = "com.example"


def weights(key: str, value: str, *, attribute: bool = False) -> Callable[[Any], None]:
    """Change where the first weight outside of the graph, or that of a constant, is."""

    def edit(model: Any) -> None:
        if attribute:
            tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])
            tensor.ClearField("float_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="vision.onnx.data")
            model.graph.node.append(helper.make_node("Constant", [], ["constant"], value=tensor))
            tensor = model.graph.node[-1].attribute[0].t
        else:
            tensor = next(t for t in model.graph.initializer if t.external_data)
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
                return
        tensor.external_data.add(key=key, value=value)

    return edit


def rename(kind: str) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        getattr(model.graph, kind)[0].name = "another"

    return edit


def set_type(kind: str, code: int) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        getattr(model.graph, kind)[0].type.tensor_type.elem_type = code

    return edit


def set_rank(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1)


def set_sequence(model: Any) -> None:
    of = model.graph.input[0]
    of.CopyFrom(helper.make_tensor_sequence_value_info(of.name, TensorProto.FLOAT, [1]))


def add_input(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def add_output(model: Any) -> None:
    model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "an endless loop": (
        add_loop,
        "holds a graph within a graph, as loops and branches do: a bundle's graph is",
    ),
    "a branch": (add_if, "holds a graph within a graph"),
    "several graphs": (add_graphs, "holds a graph within a graph"),
    "a function": (add_function, "holds functions: a bundle's graph is straight-line"),
    "sparse weights": (add_sparse, "holds sparse weights"),
    "an operator of others": (set_domain, "has an operator of the domain 'com.example'"),
    "weights elsewhere": (
        weights("location", "../secret"),
        "has weights in '../secret', expected a file that the bundle lists",
    ),
    "weights at an address": (
        weights("location", "*/_ORT_MEM_ADDR_/*"),
        "has weights in '*/_ORT_MEM_ADDR_/*', expected a file that the bundle lists",
    ),
    "weights in a file not listed": (weights("location", "manifest.json"), "has weights in 'manifest.json'"),
    "a constant elsewhere": (
        weights("location", "/etc/passwd", attribute=True),
        "has weights in '/etc/passwd'",
    ),
    "weights beyond the end": (weights("length", "9000000000"), "has weights up to byte 9000"),
    "an offset that is none": (weights("offset", "-8"), "has weights up to byte 92233720368"),
    "another input": (rename("input"), "has no input "),
    "another output": (rename("output"), "has no output "),
    "an input of another type": (set_type("input", TensorProto.DOUBLE), " is type 11 (any, "),
    "an output of another type": (set_type("output", TensorProto.FLOAT16), " is float16 (any, "),
    "an input of another rank": (set_rank, ", 1), expected float32 (any, "),
    "a sequence": (set_sequence, "is not an ONNX graph"),
    "one more input": (add_input, "has an input 'more', which the manifest does not describe"),
    "one more output": (add_output, "has an output 'more', which the manifest does not describe"),
}


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
@pytest.mark.parametrize(("edit", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_another_graph_is_refused(
    bundle: Path, name: str, edit: Callable[[Any], object], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualfocus.runtime import onnx as runtime

    change(bundle, name, edit)
    monkeypatch.setattr(runtime, "_session", None)  # nothing is opened
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert sentence in str(caught.value)
    assert f"{bundle / name}" in str(caught.value)


def test_a_graph_that_fails_when_it_runs_is_one_sentence(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def reshape(model: Any) -> None:
        """Shapes that fit at opening, and not at run time."""
        features = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["unshaped" if name == features else name for name in node.output]
        shape = helper.make_tensor("shape", TensorProto.INT64, [3], [7, 64, 192])
        model.graph.initializer.append(shape)
        model.graph.node.append(helper.make_node("Reshape", ["unshaped", "shape"], [features]))

    change(bundle, "vision.onnx", reshape)
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"vision\.onnx cannot be run: .*") as caught:
        opened.vision.encode(np.zeros((1, 3, 160, 160), np.float32))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # ONNX Runtime would log it


def test_a_graph_that_does_not_open_is_one_sentence(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def unknown(model: Any) -> None:
        model.graph.node[-1].op_type = "NoSuchOperator"

    change(bundle, "decoder.onnx", unknown)
    with pytest.raises(BundleError, match=r"decoder\.onnx cannot be opened by ONNX Runtime [\d.]+: .*NoSuch"):
        Bundle.open(bundle)
    assert capfd.readouterr() == ("", "")  # Python's part of ONNX Runtime would print "EP Error"


def test_features_of_another_shape_are_refused(bundle: Path) -> None:
    def tile(model: Any) -> None:
        """More image tokens than the manifest says, of a number that is known at run time alone."""
        features = model.graph.output[0]
        features.type.tensor_type.shape.dim[1].dim_param = "tokens"
        for node in model.graph.node:
            node.output[:] = ["once" if name == features.name else name for name in node.output]
        model.graph.node.append(helper.make_node("Concat", ["once", "once"], [features.name], axis=1))

    change(bundle, "vision.onnx", tile)
    with pytest.raises(BundleError, match=r"vision\.onnx makes features of 128 x 192, expected 64 x 192"):
        Bundle.open(bundle)


def test_no_memory_is_no_damage() -> None:
    from dualfocus.runtime.onnx import _failure

    problem = RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad allocation\nmore")
    assert isinstance(_failure("it cannot be run", problem), MemoryError)
    assert str(_failure("it cannot be run", RuntimeError(""))) == "it cannot be run: RuntimeError"


@pytest.mark.parametrize(
    "data", [b"\x3a", b"\x3a\x05\x0a", b"\xff" * 20, b"\x3a\x02\x5a\x00", b"\x3b", b"[]"]
)
def test_what_is_no_message_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "graph").write_bytes(data)
    with pytest.raises(BundleError, match="graph is not an ONNX graph"):
        graph.read(tmp_path / "graph")
