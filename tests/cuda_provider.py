"""What ONNX Runtime's CUDA provider does with a bundle, over a CUDA that computes nothing: JSON, on stdout.

`test_cuda_provider` runs it, in an environment of its own: ``cuda_provider.py FAKE_LIBRARY BUNDLE``.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

import emulated
import numpy as np

from dualfocus.runtime import Bundle, DualFocus, devices, onnx, registry
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import TokenIds

COUNTERS = ["held", "launched", "copied", "captured", "replayed", "forbidden"]
RECORDED_AFTER = 20
STEPS = {"row 0": [0], "row 1": [1], "rows 0 and 1": [0, 1]}


def main(library: str, folder: str) -> dict[str, Any]:
    """Everything that `test_cuda_provider` looks at."""
    sys.modules["cupy"] = emulated.cupy()
    fake = ctypes.CDLL(library)

    def counter(name: str) -> int:
        return ctypes.c_long.in_dll(fake, name).value

    def during(call: Callable[[], Any]) -> dict[str, int]:
        """What `call` asks of CUDA, and copies by way of our arrays."""
        before = {name: counter(name) for name in COUNTERS} | emulated.copied
        call()
        after = {name: counter(name) for name in COUNTERS} | emulated.copied
        return {name: after[name] - before[name] for name in after} | {"graph": counter("graph")}

    real = onnx._options

    def told(*arguments: Any, **options: Any) -> Any:
        made = real(*arguments, **options)
        made.log_severity_level = 2  # warnings
        made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return made

    onnx._options = told
    onnx.CAPTURE_AFTER = RECORDED_AFTER
    report: dict[str, Any] = {"problem": registry.problem(devices.Device("cuda"))}
    bundle = Bundle.open(folder, device="cuda")
    for name, session in (("vision", bundle.vision._session), ("decoder", bundle.decoder._session)):
        nodes: dict[str, list[str]] = {}
        for part in session.get_provider_graph_assignment_info():
            nodes.setdefault(part.ep_name, []).extend(node.op_type for node in part.get_nodes())
        options = session.get_provider_options()["CUDAExecutionProvider"]
        report[name] = {"providers": session.get_providers(), "options": options, "nodes": nodes}

    spec, image = bundle.manifest.decoder, bundle.manifest.image
    pixels = np.zeros((1, 3, image.size, image.size), np.float32)
    report["encode"] = during(lambda: report.update(features=bundle.vision.encode(pixels).shape))

    cache = KVCache(spec, 2, spec.context, bundle.device.memory)
    features = emulated.Array(np.zeros((image.tokens, spec.hidden), np.float16))
    prompt = TokenIds(np.r_[1, 2, spec.vocabulary + np.arange(image.tokens), 3], (features,))

    def extend(rows: list[int], tokens: TokenIds) -> None:
        bundle.decoder.extend(cache, rows, [tokens] * len(rows), [[0]] * len(rows))
        for row in rows:
            cache.lengths[row] = len(prompt)  # back again: more steps than the cache has room for

    def step(rows: list[int]) -> dict[str, int]:
        return during(lambda: extend(rows, TokenIds(np.array([5]))))

    report["prompts"] = [during(lambda row=row: extend([row], prompt)) for row in (0, 1, 0, 1)]
    report["steps"] = {name: [step(rows) for _ in range(RECORDED_AFTER + 5)] for name, rows in STEPS.items()}
    report["stream"] = counter("stream"), bundle.decoder._place.stream.ptr
    report["prompt between"] = during(lambda: extend([0], prompt))
    report["steps again"] = {name: [step(rows) for _ in range(100)] for name, rows in STEPS.items()}

    runner = DualFocus(bundle)
    picture = np.random.default_rng(7).integers(0, 256, (90, 120, 3), np.uint8)
    report["asked"] = []
    for _ in range(4):
        results = []
        asked = during(lambda results=results: results.append(runner.ask(picture, "Is it green?")))
        report["asked"].append(asked | vars(results[0].counters))
    return report


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout)
