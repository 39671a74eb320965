"""Names what was given in place of a bundle, and the next step."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from dualfocus.runtime.errors import BundleError, InputError
from dualfocus.runtime.files import URL, read_json

Found = tuple[str, str]  # what it is, and the next step

_ORIGINAL = "export the checkpoint that it was made from, `dualfocus export CHECKPOINT -o BUNDLE`"
_FOLDER = "give the folder of a bundle"
_WEIGHTS = "a file of weights", "export the folder that it is in, `dualfocus export FOLDER -o BUNDLE`"
_PICTURE = "a picture", "give it as PICTURE, and the folder of a bundle here"
_ARCHIVE = "an archive", "unpack it, and give the folder of the bundle"

_MAGIC: tuple[tuple[int, bytes, Found], ...] = (  # where in a file, what is there
    (0, b"GGUF", ("a GGUF file, of llama.cpp", _ORIGINAL)),
    (0, b"\x89PNG", _PICTURE),
    (0, b"\xff\xd8\xff", _PICTURE),
    (0, b"GIF8", _PICTURE),
    (0, b"II*\0", _PICTURE),
    (0, b"MM\0*", _PICTURE),
    (0, b"BM", _PICTURE),
    (8, b"WEBP", _PICTURE),
    (4, b"ftyp", _PICTURE),
    (0, b"PK\3\4", _ARCHIVE),
    (0, b"\x1f\x8b", _ARCHIVE),
)
_SUFFIXES: dict[str, Found] = {
    **dict.fromkeys((".safetensors", ".bin", ".pt", ".pth"), _WEIGHTS),
    **dict.fromkeys((".tar", ".xz", ".zst", ".7z"), _ARCHIVE),
    ".onnx": ("one graph", _FOLDER),
}
_FILES: tuple[tuple[str, Found], ...] = (  # in a folder
    ("adapter_config.json", ("a LoRA adapter", "merge it into its base model, and export that")),
    ("genai_config.json", ("a model of ONNX Runtime GenAI", _ORIGINAL)),
    ("openvino_language_model.xml", ("a model of OpenVINO", _ORIGINAL)),
    ("openvino_model.xml", ("a model of OpenVINO", _ORIGINAL)),
    ("params.json", ("a checkpoint in Mistral's own form", "export the one in Hugging Face's form")),
    ("decoder.onnx", ("a bundle without its manifest.json", "copy or export it again")),
)


def refusal(given: str) -> BundleError:
    """Why `given`, which has no manifest, is no bundle."""
    what, step = _name(given)
    shown = f"{given[:60]}…" if len(given) > 500 else given or "the path given"
    return BundleError(f"{shown} is {what}: {step}")


def _name(given: str) -> Found:
    if not given:
        return "empty", _FOLDER
    if given.startswith("data:"):
        return "a data: URL", _FOLDER
    if URL.match(given):
        return "a URL", "download the bundle, and give its folder"
    path = Path(given)
    if os.path.isdir(path):
        return _name_folder(path)
    if os.path.isfile(path):
        return _name_file(path)
    if os.path.lexists(path):
        return "not a folder", _FOLDER
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not os.path.lexists(path.parent):
        return (
            "not a folder here",
            f"a model of the Hub is exported first, `dualfocus export {given} -o BUNDLE`",
        )
    return "not a folder", _FOLDER


def _name_file(path: Path) -> Found:
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        start = b""
    for at, magic, found in _MAGIC:
        if start.startswith(magic, at):
            return found
    return _SUFFIXES.get(path.suffix.lower(), ("a file", _FOLDER))


def _name_folder(path: Path) -> Found:
    if re.fullmatch(r"\..+\.partial", path.name):
        return "an interrupted export", "continue it, `dualfocus export … --resume`"
    for name, found in _FILES:
        if os.path.isfile(path / name):
            return found
    if os.path.isfile(path / "config.json"):
        quantised = _quantised(path / "config.json")
        if quantised is not None:
            return f"a checkpoint of {quantised} weights", _ORIGINAL
        return "a checkpoint", f"export it first, `dualfocus export {path} -o BUNDLE`"
    try:
        names = os.listdir(path)
    except OSError as error:
        return f"a folder that cannot be read ({error.strerror})", _FOLDER
    if any(name.endswith(".gguf") for name in names):
        return "a folder of GGUF files, of llama.cpp", _ORIGINAL
    return "a folder without manifest.json, so it is not a bundle", _FOLDER


def _quantised(path: Path) -> str | None:
    """What a checkpoint's weights are quantised by, as its configuration tells; None if it tells nothing."""
    try:
        config = read_json(path, dict[str, Any], InputError)
    except InputError:
        return None
    if isinstance(method := config.get("quantization_config"), dict):
        return f"quantised ({method.get('quant_method', 'some method')!s:.40})"
    return "quantised (MLX)" if isinstance(config.get("quantization"), dict) else None
