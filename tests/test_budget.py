"""`inspect --budget`: what a bundle takes of memory, and the sentence where that cannot be told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dualfocus import cli
from dualfocus.bench import budget
from dualfocus.runtime.bundle import BUILT_IN, read_manifest
from dualfocus.runtime.cache import KVCache

pytestmark = pytest.mark.skipif(not budget.STATUS.exists(), reason="only Linux tells")


def test_the_parts_of_the_built_in_model() -> None:
    parts, opening = budget.measure(BUILT_IN)
    assert opening > 0
    total = parts.pop("in all")
    assert total == sum(parts.values())
    manifest, _ = read_manifest(BUILT_IN)
    assert parts["KV cache"] == KVCache(manifest.decoder, 2, manifest.decoder.context).nbytes
    weights = sum(file.size for name, file in manifest.files.items() if ".onnx" in name)
    assert 0.5 * weights < parts["packed weights"] < 3 * weights
    assert parts["Python and libraries"] > 5_000_000


def test_the_command_line_shows_them(tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["inspect", str(BUILT_IN), "--budget"]).stdout
    assert "memory: packed weights" in shown
    assert "ms, files in the system's cache" in shown
    told = json.loads(CliRunner().invoke(cli.app, ["inspect", str(BUILT_IN), "--budget", "--json"]).stdout)
    assert {"KV cache", "in all"} <= told["budget"].keys()
    assert told["opening_ms"] > 0
    assert "budget" not in json.loads(
        CliRunner().invoke(cli.app, ["inspect", str(BUILT_IN), "--json"]).stdout
    )


def test_one_sentence_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budget, "STATUS", tmp_path / "status")
    result = CliRunner().invoke(cli.app, ["inspect", str(BUILT_IN), "--budget"])
    assert result.exit_code == 2
    assert "--budget needs" in result.stderr
