"""ONNX Runtime's CUDA provider itself, on a machine without a GPU: `make test-cuda`.

The target installs onnxruntime-gpu apart from all else. The libraries of CUDA that its provider wants are one
fake here (fake_cuda.c), which computes nothing: that calls go through, and what is placed where, recorded,
allocated and copied, is the real provider's; the numbers that come out mean nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny

from dualfocus.export import export_bundle

TESTS = Path(__file__).parent
CUDA = TESTS.parent / "build/cuda"
CHECKPOINT = TESTS.parent / "train/checkpoints/nano"
RECORDED_AFTER = 20  # cuda_provider.py's
# of what runs on the host in the tower
SHAPES_ONLY = {"Cast", "Concat", "Equal", "Gather", "Reshape", "Slice", "Unsqueeze", "Where"}
# nano's tower computes two layers' scales from a shape, on the host: 2 bytes each, copied whenever it runs
SCALES = 4
HARMLESS = (
    "No registered plugin EP device found",  # it looks for CUDA as a plug-in first
    "Some nodes were not assigned to the preferred",  # those that the test counts
    "Rerunning with verbose output",
    "2 Memcpy nodes are added",  # SCALES; other copies would be counted
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CUDA / ".made").exists(), reason="`make test-cuda` installs onnxruntime-gpu first"
    ),
]


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, beside links by all the names that the provider asks for."""
    folder = tmp_path_factory.mktemp("fake")
    (provider,) = CUDA.glob("lib/*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so")
    told = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], check=True, capture_output=True, text=True
    )
    wanted = re.findall(r" ((?:cu|__cuda)[a-zA-Z]\w+)(?:@+(\S+))?$", told.stdout, re.MULTILINE)
    # cuDNN's are looked up by name once they are needed
    by_name = re.findall(rb"(?<=\0)cudnn[A-Z]\w+(?=\0)", provider.read_bytes())
    names = {name for name, _ in wanted} | {name.decode() for name in by_name}
    (folder / "rest.c").write_text(
        "".join(f"__attribute__((weak)) long {name}(void) {{ return 0; }}\n" for name in sorted(names))
    )
    versions = {version: [n for n, v in wanted if v == version] for _, version in wanted if version}
    (folder / "versions").write_text(
        "".join(f"{version} {{ global: {'; '.join(of)}; }};\n" for version, of in versions.items())
    )
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,--version-script={folder}/versions"]
    subprocess.run(["cc", *flags, TESTS / "fake_cuda.c", folder / "rest.c", "-o", library], check=True)
    for name in (*versions, "libcurand.so.10", "libcudnn.so.9"):  # versions are called as libraries are
        (folder / name).symlink_to(library)
    return library


@pytest.fixture(scope="module", params=["tiny-fp16", "tiny-int4", "nano-fp16", "nano-int4"])
def report(
    request: pytest.FixtureRequest, fake: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `cuda_provider` tells of a bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    model, precision = request.param.split("-")
    checkpoint = CHECKPOINT if model == "nano" else tiny.build(folder / "checkpoint", max_new_tokens=40)
    export_bundle(checkpoint, folder / "bundle", target="cuda", precision=precision, progress=lambda _: None)
    path = f"{TESTS.parent / 'src'}:{TESTS}"
    done = subprocess.run(
        [CUDA / "bin/python", TESTS / "cuda_provider.py", fake, folder / "bundle"],
        env=os.environ | {"LD_LIBRARY_PATH": str(fake.parent), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout) | {"said": done.stderr}
    return found


def test_a_bundle_opens(report: dict[str, Any]) -> None:
    assert report["problem"] is None
    for name in ("vision", "decoder"):
        assert report[name]["providers"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        chosen = {
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "device_id": "0",
            "enable_cuda_graph": str(int(name == "decoder")),
            "has_user_compute_stream": "1",
        }
        assert chosen.items() <= report[name]["options"].items()
    assert report["vision"]["options"]["user_compute_stream"] == "7"  # emulated.py's, which waits for nobody
    assert report["decoder"]["options"]["user_compute_stream"] == "8"


def test_the_decoder_is_on_the_gpu_as_a_whole(report: dict[str, Any]) -> None:
    assert list(report["decoder"]["nodes"]) == ["CUDAExecutionProvider"]
    assert {"GroupQueryAttention"} <= set(report["decoder"]["nodes"]["CUDAExecutionProvider"])
    assert set(report["vision"]["nodes"].get("CPUExecutionProvider", [])) <= SHAPES_ONLY
    warnings = [line for line in report["said"].splitlines() if "onnxruntime" in line]
    assert [line for line in warnings if not any(known in line for known in HARMLESS)] == []


def test_a_picture_is_encoded(report: dict[str, Any]) -> None:
    assert report["features"][0] == 1
    assert report["encode"]["launched"] > 20
    assert report["encode"]["copied"] <= SCALES


def test_steps_are_recorded_once_and_replayed(report: dict[str, Any]) -> None:
    for number, steps in enumerate(report["steps"].values(), 1):
        before, (recording, *after) = steps[: RECORDED_AFTER - 1], steps[RECORDED_AFTER - 1 :]
        assert all(step["launched"] and not step["captured"] + step["replayed"] for step in before)
        assert (recording["captured"], recording["replayed"]) == (1, 1)
        # launched beforehand twice, which leaves the same cache, and into the recording
        assert recording["launched"] == 3 * before[0]["launched"]
        for step in after:
            assert (step["captured"], step["replayed"], step["launched"]) == (0, 1, 0)
            assert step["graph"] == number
    for number, steps in enumerate(report["steps again"].values(), 1):
        assert {(step["replayed"], step["launched"], step["graph"]) for step in steps} == {(1, 0, number)}
    for prompt in (*report["prompts"], report["prompt between"]):
        assert (prompt["launched"] > 0, prompt["captured"], prompt["replayed"]) == (True, 0, 0)
    assert report["stream"][0] == report["stream"][1]


def calls(report: dict[str, Any]) -> list[dict[str, int]]:
    """Of the decoder, after the first prompt of each row."""
    steps = (*report["steps"].values(), *report["steps again"].values())
    return [*report["prompts"][2:], *(step for of in steps for step in of), report["prompt between"]]


def test_nothing_is_forbidden_while_a_step_is_recorded(report: dict[str, Any]) -> None:
    assert {call["forbidden"] for call in [*calls(report), *report["asked"]]} == {0}


def test_memory_stays_as_it_is(report: dict[str, Any]) -> None:
    assert {call["held"] for call in calls(report)} == {0}
    assert report["asked"][-1]["held"] == 0


def test_little_is_copied(report: dict[str, Any]) -> None:
    """By ONNX Runtime nothing; by us an id, a length and a place, and three numbers of what was chosen."""
    assert {call["copied"] for call in calls(report)} == {0}
    assert all(asked["copied"] <= SCALES * asked["vision_encodes"] for asked in report["asked"])
    for name, steps in (*report["steps"].items(), *report["steps again"].items()):
        rows = 2 if "and" in name else 1
        assert {step["to device"] for step in steps} == {20 * rows}
        assert {step["to host"] for step in steps} == {16 * rows}


def test_a_whole_question_goes_through(report: dict[str, Any]) -> None:
    first, *others = report["asked"]
    assert first["vision_encodes"] >= 1
    for asked in others:
        assert asked["vision_encodes"] == 0  # the picture and its crop are known
    assert sum(asked["captured"] for asked in report["asked"]) >= 1
    assert report["asked"][-1]["replayed"] > 0
