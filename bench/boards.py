"""``dualfocus inspect SHAPE --budget``: the memory a model would take, computed, and what Jetsons have left.

Nothing is opened and nothing is measured here; `budget` measures a bundle on the machine it is for. A board's
memory serves processor and GPU alike, so everything is added up:

- Weights: what the exporter stores (`Form.nbytes`). On a CPU 15 % more, for ONNX Runtime packs them as its
  kernels read them: on the edge shape, 1 % was measured in float32, 6 % in int8 and 13 % in int4. On a GPU
  everything but int4's blocks is in two bytes.
- Embeddings: in two bytes, as checkpoints are published.
- KV cache: two rows of the whole context, in float32 on a CPU, float16 on a GPU.
- Workspace, an upper bound: all that a layer of the decoder makes of the longest prompt's new tokens (an
  image and `TEXT`) behind as many, nothing given back before the layer ends, attention's scores written out;
  the same of a layer of the tower; on a GPU in int4 also the largest matrix in float16, which prefill makes.
- System and engine: assumed, see `SYSTEM` and `ENGINE`. Building an engine on the board takes more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from dualfocus.export.quantize import Form, Part, decoder_form, vision_form
from dualfocus.export.shapes import SHAPES, Shape
from dualfocus.runtime.manifest import Precision

if TYPE_CHECKING:
    from rich.console import Console

Device = Literal["CPU", "GPU"]
RECIPES: tuple[tuple[Precision, Device], ...] = (
    ("fp16", "GPU"),
    ("int4", "GPU"),
    ("fp32", "CPU"),
    ("int8", "CPU"),
    ("int4", "CPU"),
)

# GiB that the boards are sold with. Of that, Linux has what carve-outs leave: public outputs of tegrastats
# tell 7.4 of 8 GiB for an Orin Nano and 61.4 of 64 for an AGX Orin; the smaller part is taken for all.
BOARDS = {
    "Orin Nano 8 GB": 8,
    "Orin NX 16 GB": 16,
    "AGX Orin 32 GB": 32,
    "AGX Orin 64 GB": 64,
    "Thor 128 GB": 128,
}
USABLE = 0.93

SYSTEM = 1_500_000_000  # assumed: Ubuntu without a desktop, and Docker
ENGINE: dict[Device, int] = {
    "CPU": 100_000_000,  # Python and libraries were 27 MB on x86-64 (`inspect BUNDLE --budget`)
    # assumed: a CUDA context with cuBLAS, cuDNN and TensorRT, of which NVIDIA's forum says 0.8 to 1.1 GB
    "GPU": 1_000_000_000,
}

ROWS = 2
TEXT = 128  # tokens around an image; the protocol's own are 30 to 60
PACKING = 1.15
HALF = Form(16)


def usable(board: str) -> int:
    """Bytes that Linux and what runs on it have of a board's memory."""
    return int(USABLE * BOARDS[board] * 2**30)


def budget(shape: Shape, precision: Precision, device: Device) -> dict[str, int]:
    """Bytes, by part, and "in all", their sum."""
    item = 2 if device == "GPU" else 4
    weights = decoder_nbytes(shape, precision, device) + tower_nbytes(shape, precision, device)
    parts = {
        "weights": weights if device == "GPU" else int(PACKING * weights),
        "embeddings": 2 * shape.vocabulary * shape.hidden,
        "KV cache": ROWS * shape.context * 2 * shape.layers * shape.kv_heads * shape.head_size * item,
        "workspace": workspace(shape, precision, device),
        "system and engine": SYSTEM + ENGINE[device],
    }
    return parts | {"in all": sum(parts.values())}


def decoder_nbytes(shape: Shape, precision: Precision, device: Device) -> int:
    """What the decoder's weights take as they are stored."""
    small = 2 if device == "GPU" else 4
    total = sum(
        decoder_form(precision, part, layer, shape.layers).nbytes(outputs, inputs)
        for layer in range(shape.layers)
        for part, (outputs, inputs) in _products(shape).items()
    )
    total += decoder_form(precision, "head", 0, shape.layers).nbytes(shape.vocabulary, shape.hidden)
    total += small * (
        (2 * shape.layers + 1) * shape.hidden + shape.context * shape.head_size
    )  # norms, rotary
    if shape.bias:
        total += small * shape.layers * _products(shape)["qkv"][0]
    return total + (4 * shape.hidden**2 if precision == "int8" else 0)  # the rotation of what comes in


def tower_nbytes(shape: Shape, precision: Precision, device: Device) -> int:
    """What the tower's and the projector's weights take as they are stored; layers that never run are not."""
    layers = shape.tower_layers + 1 + shape.feature_layer if shape.feature_layer < 0 else shape.feature_layer
    width, mlp, small = shape.tower_width, shape.tower_mlp, 2 if device == "GPU" else 4
    form, projector = (
        HALF if device == "GPU" else vision_form(precision, node) for node in ("", "/projector/")
    )
    total = layers * (4 * form.nbytes(width, width) + form.nbytes(mlp, width) + form.nbytes(width, mlp))
    total += projector.nbytes(shape.hidden, width) + projector.nbytes(shape.hidden, shape.hidden)
    total += small * (layers * (9 * width + mlp) + 2 * shape.hidden)  # biases and norms
    patches = (shape.image // shape.patch) ** 2
    return total + small * width * (3 * shape.patch**2 + 1 + patches + 1 + 2)  # the entrance


def workspace(shape: Shape, precision: Precision, device: Device) -> int:
    """What the longest calls of tower and decoder make beyond their weights, at the most."""
    item = 2 if device == "GPU" else 4
    new = shape.image_tokens + TEXT
    qkv, attended = _products(shape)["qkv"][0], shape.heads * shape.head_size
    decoder = new * (
        4 * shape.hidden + 2 * qkv + attended + 3 * shape.mlp
    )  # the stream twice, norms, products
    decoder += shape.heads * new * 2 * new  # attention's scores
    seen = (shape.image // shape.patch) ** 2 + 1
    tower = seen * (6 * shape.tower_width + shape.tower_mlp)
    tower += 2 * shape.tower_heads * seen**2  # scores, and what softmax makes of them
    total = item * (decoder + tower) + 4 * ROWS * shape.vocabulary  # and logits
    if precision == "int4" and device == "GPU":
        largest = max(n * k for n, k in [*_products(shape).values(), (shape.vocabulary, shape.hidden)])
        total += 2 * largest
    return total


def _products(shape: Shape) -> dict[Part, tuple[int, int]]:
    """Outputs and inputs of a decoder layer's products with weights."""
    attended = shape.heads * shape.head_size
    return {
        "qkv": (attended + 2 * shape.kv_heads * shape.head_size, shape.hidden),
        "project": (shape.hidden, attended),
        "gate": (shape.mlp, shape.hidden),
        "up": (shape.mlp, shape.hidden),
        "down": (shape.hidden, shape.mlp),
    }


def report(shape: Shape) -> dict[str, Any]:
    """All recipes of a shape: bytes by part, and for each board what it would have left."""
    rows = []
    for precision, device in RECIPES:
        parts = budget(shape, precision, device)
        left = {board: usable(board) - parts["in all"] for board in BOARDS}
        rows.append({"precision": precision, "device": device, "bytes": parts, "left": left})
    return {"shape": shape.name, "budgets": rows}


def show(found: Mapping[str, Any], console: Console) -> None:
    """The report as a table for people, in GB."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    first, *others = _cells(found)
    for column in first:
        table.add_column(column, justify="right" if column else "left")
    for row in others:
        table.add_row(*row)
    console.print(table)
    console.print("GB, computed. Under a board: what it would have left, - where it is too small.")


def markdown() -> str:
    """All shapes as the table of deploy/jetson/README.md."""
    lines: list[str] = []
    for shape in SHAPES.values():
        first, *others = _cells(report(shape))
        if not lines:
            lines += [_line(["", *first]), "|" + "---|" * (len(first) + 1)]
        lines += [_line([shape.name, *row]) for row in others]
    return "\n".join(lines) + "\n"


def _cells(found: Mapping[str, Any]) -> list[list[str]]:
    """A heading, and a row for each recipe."""
    rows = found["budgets"]
    cells = [["", *rows[0]["bytes"], *rows[0]["left"]]]
    for row in rows:
        parts = [f"{nbytes / 1e9:.2f}" for nbytes in row["bytes"].values()]
        left = [f"{nbytes / 1e9:.1f}" if nbytes >= 0 else "-" for nbytes in row["left"].values()]
        cells.append([f"{row['precision']}, {row['device']}", *parts, *left])
    return cells


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(markdown(), end="")
