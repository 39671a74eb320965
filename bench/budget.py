"""``dualfocus inspect --budget``: the private memory that a bundle takes, by what takes it, and its start.

Every part is what `RssAnon` of a new process grew by, in the order in which a question needs them; Linux
tells it, other systems do not. Files that are mapped, the embeddings for one, are not private: the system
may drop and read them again. ONNX Runtime packs weights as its kernels read them, which takes other room
than the file, and keeps the room that its largest call took for activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from dualfocus.runtime.errors import InputError

STATUS = Path("/proc/self/status")


def measure(bundle: Path) -> tuple[dict[str, int], float]:
    """Bytes, by part, and the milliseconds that opening took.

    "KV cache" is what two rows reserve, and all that they can ever touch.

    "in all" is the sum, which answering one question at a time does not exceed, but by what is kept of
    pictures for later questions (``--cache-mb``). InputError where the system does not tell.
    """
    if not STATUS.exists():
        raise InputError(f"--budget needs {STATUS}, which this system does not have")
    done = subprocess.run(
        [sys.executable, "-m", "dualfocus.bench.budget", str(bundle)], capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"--budget: {bundle} could not be run: {done.stderr.strip().splitlines()[-1]}")
    parts, opening = json.loads(done.stdout)
    return parts, opening


def private() -> int:
    """Private bytes of this process that are in memory."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return 1024 * int(kilobytes)


def _measure_here(path: Path) -> tuple[dict[str, int], float]:
    import numpy as np

    from dualfocus.runtime.bundle import Bundle
    from dualfocus.runtime.cache import KVCache
    from dualfocus.runtime.onnx import OnnxDecoder  # noqa: F401  the libraries, before anything is opened
    from dualfocus.runtime.sequence import embed
    from dualfocus.runtime.turns import Turns

    libraries = private()
    begin = time.perf_counter()
    bundle = Bundle.open(path, device="cpu")
    opening = 1e3 * (time.perf_counter() - begin)
    opened = private()
    manifest = bundle.manifest
    spec, image = manifest.decoder, manifest.image
    turns = Turns(manifest, bundle.tokenizer, "What is written on the sign above the door of the house?")
    bundle.vision.encode(np.zeros((1, 3, image.size, image.size), np.float32))
    cache = KVCache(spec, 2, spec.context)
    box = "[0.12, 0.34, 0.56, 0.78]" if manifest.box is None else manifest.box.write(0.12, 0.34, 0.56, 0.78)
    whole, both = (len(prompt.tokens) for prompt in (turns.macro("whole"), turns.micro("whole", "crop", box)))
    for length in (whole, both - whole):
        bundle.decoder.extend(cache, [0], [embed([0] * length, bundle.embeddings, {})], [[length - 1]])
    touched = cache.lengths[0] * cache.token_nbytes
    parts = {
        "Python and libraries": libraries,
        "packed weights": opened - libraries,
        "activations": max(0, private() - opened - touched),
        "KV cache": cache.nbytes,
    }
    return parts | {"in all": sum(parts.values())}, opening


if __name__ == "__main__":
    print(json.dumps(_measure_here(Path(sys.argv[1]))))
