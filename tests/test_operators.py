"""Which exported graphs the libraries of a GPU take; asked of themselves too, where they are installed.

TensorRT-RTX's parser and builder need no GPU: pip install tensorrt-rtx-cu13.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import tiny
from fake_tensorrt import imported
from onnx import TensorProto, helper, numpy_helper

from dualfocus.export.bundle import export_bundle
from dualfocus.export.errors import ExportError
from dualfocus.export.operators import CONSUMERS, Consumer, types_of, unsupported
from dualfocus.runtime.bundle import read_manifest
from dualfocus.runtime.manifest import CacheType, Precision, Target

CHECKPOINT = Path(__file__).parent.parent / "train" / "checkpoints" / "nano"


class Form(NamedTuple):
    """What decides of which operators a graph is made."""

    target: Target
    precision: Precision
    cache: CacheType
    ragged_append: bool = True


ORT, STANDARD = "onnxruntime", "onnx-standard"
FOR_CUDA = [Form("cuda", precision, "float16", False) for precision in ("fp16", "int4")]
FOR_ENGINES = [Form("tensorrt", precision, "float16") for precision in ("fp16", "int4")]
FORMS = [
    *FOR_CUDA,
    *FOR_ENGINES,
    *(Form(target, precision, "float16") for target in (ORT, STANDARD) for precision in ("fp16", "int8")),
    Form(STANDARD, "int4", "float16"),
    Form(STANDARD, "fp32", "float32"),
    Form(ORT, "int4", "float16", False),
    Form(ORT, "fp32", "float32", False),
]


def name(form: Form) -> str:
    """What a test of `form` is called, the same in every process."""
    return "-".join(map(str, form))


Graphs = Callable[[Form], Path]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """The folder of the tiny model's graphs in a form."""
    folder = tmp_path_factory.mktemp("forms")
    checkpoint = tiny.build(folder / "checkpoint", tiny.Shape(heads=6, hidden=96))

    def export(form: Form) -> Path:
        out = folder / name(form)
        if not out.exists():
            target, precision, cache, ragged = form
            export_bundle(
                checkpoint,
                out,
                target=target,
                precision=precision,
                cache=cache,
                ragged_append=ragged,
                progress=lambda _: None,
            )
        return out

    return export


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def refused(graphs: Graphs, form: Form, graph: str, consumer: Consumer) -> set[str]:
    """What `consumer` refuses of a graph, without its own name and without where."""
    start = f"{CONSUMERS[consumer].name} takes no "
    sentences = unsupported(load(graphs(form) / f"{graph}.onnx"), consumer)
    assert all(sentence.startswith(start) for sentence in sentences)
    return {sentence.removeprefix(start).split(" (")[0] for sentence in sentences}


GROWING = "TensorScatter whose cache is of no fixed capacity"
GQA, NBITS = "com.microsoft.GroupQueryAttention", "com.microsoft.MatMulNBits"
INTEGERS = {"DynamicQuantizeLinear", "MatMulInteger"}  # the tower's
ROUNDED = {"Abs", "QuantizeLinear"}  # the decoder's
ZERO_POINTS = {"DequantizeLinear of uint8", "DequantizeLinear with a zero point"}


REFUSED: dict[Consumer, dict[Form, set[str]]] = {
    "cuda": {
        **{form: set() for form in FOR_CUDA + FOR_ENGINES},
        Form(ORT, "int4", "float16", False): set(),
        Form(ORT, "fp32", "float32", False): {f"{GQA} of float"},
        Form(ORT, "fp16", "float16"): {f"{GQA} with query_seqlens, which only later versions know"},
        Form(STANDARD, "fp32", "float32"): set(),
        Form(STANDARD, "fp16", "float16"): set(),
        Form(STANDARD, "int8", "float16"): ROUNDED,
    },
    "tensorrt": {
        **{form: set() for form in FOR_ENGINES},
        FOR_CUDA[0]: {GQA},
        FOR_CUDA[1]: {GQA, NBITS},
        Form(STANDARD, "fp32", "float32"): {"Attention of float", GROWING},
        Form(STANDARD, "fp16", "float16"): {GROWING},
        Form(STANDARD, "int4", "float16"): {
            "DequantizeLinear of uint4",
            "DequantizeLinear of uint8",
            GROWING,
        },
        Form(STANDARD, "int8", "float16"): ROUNDED | ZERO_POINTS | {GROWING},
        Form(ORT, "int8", "float16"): {GQA, NBITS} | ROUNDED | ZERO_POINTS,
    },
}
REFUSED["tensorrt-rtx"] = REFUSED["tensorrt"]


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("form", FORMS, ids=name)
def test_the_tower(graphs: Graphs, form: Form, consumer: Consumer) -> None:
    in_integers = form.precision in ("int8", "int4") and form.target in (ORT, STANDARD)
    assert refused(graphs, form, "vision", consumer) == (INTEGERS if in_integers else set())


@pytest.mark.parametrize(
    ("consumer", "form"),
    [(consumer, form) for consumer, forms in REFUSED.items() for form in forms],
    ids=lambda value: name(value) if isinstance(value, Form) else value,
)
def test_the_decoder(graphs: Graphs, consumer: Consumer, form: Form) -> None:
    assert refused(graphs, form, "decoder", consumer) == REFUSED[consumer][form]


def test_the_built_in_model_is_taken(tmp_path: Path) -> None:
    for target, consumers in (("cuda", ["cuda"]), ("tensorrt", ["tensorrt", "tensorrt-rtx"])):
        export_bundle(
            CHECKPOINT,
            tmp_path / target,
            target=target,  # type: ignore[arg-type]
            precision="fp16",
            progress=lambda _: None,
        )
        for consumer in consumers:
            for graph in ("vision.onnx", "decoder.onnx"):
                assert unsupported(load(tmp_path / target / graph), consumer) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operator", "told"),
    [
        (
            "Conv",
            "the vision tower cannot run on target cuda: ONNX Runtime 1.31's CUDA provider takes no Conv",
        ),
        ("Sigmoid", r"(layer 1|the vision tower) cannot run on target cuda: .* takes no Sigmoid"),
        (GQA, rf"^layer 1 cannot run on target cuda: .* takes no {GQA} \(layers\.0\.attention\.out\)$"),
        ("ArgMax", r"^the head cannot run on target cuda: .* takes no ArgMax \(best\)$"),
        ("Less", r"^the embedding cannot run on target cuda: .* takes no Less \(is_text\)$"),
    ],
    ids=["tower", "shared", "layer", "head", "embedding"],
)
def test_an_export_that_its_target_refuses_stops(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, operator: str, told: str
) -> None:
    checkpoint = tiny.build(tmp_path / "checkpoint")
    tables = CONSUMERS["cuda"]
    fewer = {name: types for name, types in tables.types.items() if name != operator}
    monkeypatch.setitem(CONSUMERS, "cuda", replace(tables, types=fewer))
    with pytest.raises(ExportError, match=told):
        export_bundle(checkpoint, tmp_path / "out", target="cuda", precision="fp16", progress=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_sentence(graphs: Graphs) -> None:
    model = load(graphs(Form(ORT, "fp32", "float32", False)) / "decoder.onnx")
    assert unsupported(model, "cuda") == [
        "ONNX Runtime 1.31's CUDA provider takes no com.microsoft.GroupQueryAttention of float "
        "(layers.0.attention.out and 1 more)"
    ]
    model.opset_import[0].version = 28
    assert (
        unsupported(model, "cuda")[0] == "ONNX Runtime 1.31's CUDA provider takes no opset 28, only up to 27"
    )


@pytest.mark.parametrize("form", FORMS, ids=name)
def test_types_are_those_that_onnx_infers(graphs: Graphs, form: Form) -> None:
    """As far as it does: it stops at ONNX Runtime's operators."""
    for graph in ("vision", "decoder"):
        model = load(graphs(form) / f"{graph}.onnx")
        types = types_of(model)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        for value in [*inferred.value_info, *inferred.output]:
            kind = value.type.tensor_type.elem_type
            assert types[value.name] == TensorProto.DataType.Name(kind).lower(), value.name


def cached(*nodes: onnx.NodeProto, output: str) -> onnx.ModelProto:
    """A graph of `nodes` over a cache ``past``, what is ``new``, and an 8-bit ``weight``."""
    of = {"past": ["batch", 2, 8, 4], "new": ["batch", 2, "length", 4]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name, shape in of.items()]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT16, None)]
    weights = {
        "weight": np.ones((4, 4), np.int8),
        "scale": np.ones(4, np.float16),
        "zero": np.ones(4, np.int8),
    }
    graph = helper.make_graph(
        nodes, "graph", inputs, outputs, [numpy_helper.from_array(a, name) for name, a in weights.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def test_a_cache_has_to_be_an_input_and_an_output() -> None:
    write = helper.make_node("TensorScatter", ["past", "new"], ["present"], axis=2)
    assert unsupported(cached(write, output="present"), "tensorrt") == []
    through = helper.make_node("Mul", ["present", "present"], ["squared"])
    (sentence,) = unsupported(cached(write, through, output="squared"), "tensorrt")
    assert "whose cache is not an input, and as updated an output, of the graph itself" in sentence
    assert unsupported(cached(write, through, output="squared"), "cuda") == []


def test_weights_have_no_zero_point() -> None:
    def made(*inputs: str) -> onnx.ModelProto:
        return cached(helper.make_node("DequantizeLinear", inputs, ["matrix"], axis=1), output="matrix")

    assert unsupported(made("weight", "scale"), "tensorrt") == []
    (sentence,) = unsupported(made("weight", "scale", "zero"), "tensorrt")
    assert sentence == "TensorRT 10.15 takes no DequantizeLinear with a zero point (matrix)"


KERNELS = """
import json
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
print(json.dumps([
    [kernel.domain, kernel.op_name, kernel.type_constraints]
    for kernel in get_all_opkernel_def()
    if kernel.provider == "CUDAExecutionProvider" and kernel.version_range[1] > 1000  # not superseded
]))
"""
FOLDED = {"Constant"}


def test_the_cuda_provider_registers_these_kernels() -> None:
    """In a process of its own: without CUDA's and TensorRT's libraries, asking ends it."""
    asked = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, check=False)
    kernels = json.loads(asked.stdout) if asked.returncode == 0 else []
    if not kernels:
        pytest.skip("no onnxruntime-gpu with all of its libraries")
    registered = defaultdict(set)
    for domain, name, constraints in kernels:
        types = {kind[len("tensor(") : -1] for kinds in constraints.values() for kind in kinds}
        registered[f"{domain}.{name}" if domain else name] |= types
    for name, types in CONSUMERS["cuda"].types.items():
        assert types <= registered[name] or name in FOLDED, name


@pytest.fixture(scope="module")
def rtx() -> Iterator[Any]:
    """`export.tensorrt` over TensorRT-RTX itself."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for _, export in imported(monkeypatch, None):
            yield export


def is_taken(rtx: Any, bundle: Path, graph: str, timing: Path) -> bool:
    spec = read_manifest(bundle)[0].decoder
    profiles = [{"batch": (1, 1, 2)}]
    if graph == "decoder.onnx":
        reach = rtx.Reach(rows=2, length=32, wanted=4, pictures=2)
        profiles = rtx.decoder_profiles(spec, reach, 16)
    try:
        plan = rtx._Plan(bundle / graph)
        plan.configure(rtx.Gpu("any", "8.9"), None, lambda *_: None)
        return bool(plan.build(profiles, timing))
    except ExportError:
        return False


@pytest.mark.parametrize("graph", ["vision.onnx", "decoder.onnx"])
@pytest.mark.parametrize("form", FORMS, ids=name)
def test_tensorrt_rtx_takes_what_the_table_says(
    rtx: Any, graphs: Graphs, form: Form, graph: str, tmp_path: Path
) -> None:
    taken = is_taken(rtx, graphs(form), graph, tmp_path / "timing")
    assert taken == (not unsupported(load(graphs(form) / graph), "tensorrt-rtx"))
