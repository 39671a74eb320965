"""What the tests share: a clean import path, pictures, a made-up model and an exported one."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

# One thread each: the suite runs on small machines, and its sums should not depend on their cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job and what nohup runs ignore these, and would pass that on to what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_HERE = Path(__file__).parent
# `python -m pytest` puts the repository's root on the path, where `import runtime` would work by accident.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE.parent]
sys.path.insert(0, str(_HERE))  # helpers: tiny, fakes, transformers_protocol


@pytest.fixture
def picture() -> np.ndarray:
    """(240, 320, 3) random bytes."""
    return np.random.default_rng(7).integers(0, 256, (240, 320, 3), np.uint8)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights, exported once. Tests that change it take a copy."""
    import tiny

    from dualfocus.export import export_bundle

    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = tiny.build(folder / "checkpoint", max_new_tokens=40)  # enough for a box
    export_bundle(checkpoint, folder / "bundle", progress=lambda _: None)
    return folder / "bundle"
