"""What is given to export: recognised from its name and its small files, before anything heavy is imported.

Whatever is no checkpoint of a kind that is exported is named as what it is, with what to do instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from dualfocus.export import config
from dualfocus.export.config import Described
from dualfocus.export.errors import ExportError
from dualfocus.runtime.files import URL

HUGGING_FACE, ORIGINAL = "LlavaForConditionalGeneration", "LlavaLlamaForCausalLM"
# The first that a checkpoint has holds its weights, or names the files that do: transformers' order.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ID = re.compile(r"(?:\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)
_PAGE = re.compile(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", re.ASCII)
_MERGED = "expected a whole checkpoint: merge it into its base first (merge_and_unload of peft)"
_EXPECTED = f"expected LLaVA's: {HUGGING_FACE} or {ORIGINAL}"

# By quant_method; what is not here is called by its own name.
_QUANTIZED = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
}
# By the end of a tensor's name, where no file says it.
_QUANTIZED_TENSORS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_format": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".scales": "MLX, GPTQ or AWQ",
}
# Names that people know models by.
_FAMILIES = {
    "llava_next": "LLaVA-NeXT",
    "llava_next_video": "LLaVA-NeXT-Video",
    "llava_onevision": "LLaVA-OneVision",
    "video_llava": "Video-LLaVA",
    "vipllava": "ViP-LLaVA",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL",
    "internvl_chat": "InternVL",
    "idefics": "Idefics",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "mllama": "Llama 3.2 Vision",
    "llama4": "Llama 4",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma 3",
    "gemma3n": "Gemma 3n",
    "mistral3": "Mistral Small 3",
    "minicpmv": "MiniCPM-V",
    "phi3_v": "Phi-3-Vision",
    "florence2": "Florence-2",
    "molmo": "Molmo",
    "moondream1": "Moondream",
    "instructblip": "InstructBLIP",
    "blip-2": "BLIP-2",
    "bunny-llama": "Bunny",
    "deepseek_vl": "DeepSeek-VL",
}
_LANGUAGE_MODELS = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "opt"}
_TOWERS = {"clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2", "vit"}


def check_given(source: str, revision: str | None = None) -> None:
    """Raise ExportError if `source` can be no checkpoint: neither a folder of one nor an id on the Hub."""
    if not source.strip():
        raise ExportError(
            "the checkpoint's name is \"\", expected a checkpoint's folder or its id on the Hub"
        )
    if os.path.exists(source):  # unlike Path.exists, it raises nothing
        if revision is not None:
            raise ExportError(f"{source} is a path, which has no revision {revision!r}, expected an id")
        if os.path.isdir(source):
            check_folder(Path(source))
        else:
            raise ExportError(f"{source} is {_file(Path(source))}")
        return
    if page := _PAGE.match(source):
        raise ExportError(f"{source:.200} is a URL, expected the model's id on the Hub: {page[1]}")
    if URL.match(source) or source.startswith("data:"):
        raise ExportError(f"{source:.60} is a URL, expected a checkpoint's folder or its id on the Hub")
    if source.lower().endswith(".gguf"):
        raise ExportError(f"{source:.200} does not exist, and a GGUF file could not be exported: {_GGUF}")
    if not is_id(source):
        raise ExportError(f"no such folder: {source:.200}, expected a checkpoint's folder or its id")


def is_id(source: str) -> bool:
    """Whether `source` is written as a model's id on the Hub is: "llava-hf/llava-1.5-7b-hf"."""
    return bool(_ID.fullmatch(source)) and not re.search(r"--|\.\.|\.git$", source) and len(source) <= 200


_GGUF = "it holds llama.cpp's weights, expected the folder of the checkpoint that it was made from"


def _file(path: Path) -> str:
    """What a file is, and what to give instead."""
    if not path.is_file():
        return "no folder, expected a checkpoint's"
    start = read_start(path)
    if start == b"GGUF":
        return f"a GGUF file: {_GGUF}"
    if path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".json", ".model"):
        return f"one file of a checkpoint, expected its folder: {path.absolute().parent}"
    if start[:2] in (b"PK", b"\x1f\x8b") or path.suffix in (".tar", ".zip", ".tgz", ".gz"):
        return "an archive, expected the folder that it unpacks to"
    if path.suffix == ".onnx":
        return "an ONNX graph, expected the folder of the checkpoint that it was made from"
    return "a file, expected a checkpoint's folder"


def read_start(path: Path) -> bytes:
    """The first bytes of a file, at most 4."""
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from None


def check_folder(folder: Path) -> str:
    """The architecture of the checkpoint in `folder`: `HUGGING_FACE` or `ORIGINAL`.

    Raises ExportError where there is no checkpoint, or one of a kind that is not exported.
    """
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise ExportError(f"{folder} cannot be read: {error.strerror}") from None
    if "adapter_config.json" in names and not names & set(WEIGHTS):
        raise ExportError(f"{folder} {_adapter(folder)}")
    if problem := kind_of_files(names):
        raise ExportError(f"{folder} {problem}")
    if "config.json" not in names:
        inside = sorted(path.parent for path in _glob(folder, "config.json"))
        hint = f"; {inside[0]} has one" if inside else ""
        raise ExportError(f"{folder} is not a checkpoint folder: it has no config.json{hint}")
    described = config.read(folder / "config.json", Described)
    architecture = _architecture(folder, described)
    if problem := _quantized(described):
        raise ExportError(f"{folder} {problem}")
    config.check_no_code(folder)
    return architecture


def _glob(folder: Path, name: str) -> Iterable[Path]:
    """`name` in the folders of `folder`, and in those of ``snapshots``, as the Hub's cache has them."""
    try:
        return [*folder.glob(f"*/{name}"), *folder.glob(f"snapshots/*/{name}")]
    except OSError:
        return []


def kind_of_files(names: Collection[str]) -> str | None:
    """What a folder with files of these `names` is where it is no checkpoint, as a sentence's end."""
    given, weights = set(names), ", ".join(WEIGHTS)
    if "manifest.json" in given and given & {"decoder.onnx", "vision.onnx"}:
        return "is a bundle, exported already: ask it with --bundle, expected a checkpoint's folder"
    for name, method in (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")):
        if name in given:
            return quantized(method)
    if given & set(WEIGHTS):
        return None
    if "adapter_config.json" in given:
        return f"is a LoRA or another adapter, {_MERGED}"
    if "mm_projector.bin" in given:
        return (
            "holds LLaVA's projector alone (mm_projector.bin), as its first stage of training leaves it: "
            "expected the whole model, with its language model's weights"
        )
    if found := sorted(name for name in given if name.lower().endswith(".gguf")):
        return (
            f"holds GGUF files ({found[0]}), llama.cpp's weights: expected the checkpoint they were made from"
        )
    if "params.json" in given and "config.json" not in given:
        return "is in its makers' own format (params.json), expected Hugging Face's: convert it first"
    if "model_index.json" in given:
        return f"is a model of diffusers, which makes pictures, {_EXPECTED}"
    for name, library in (("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax")):
        if name in given:
            return f"holds {library}'s weights alone ({name}), expected one of {weights}"
    return None


def _adapter(folder: Path) -> str:
    """What a folder of an adapter is."""
    raw = config.read(folder / "adapter_config.json", dict)
    kind, base = raw.get("peft_type"), raw.get("base_model_name_or_path")
    name = "LoRA adapter" if kind in ("LORA", None) else f"PEFT adapter ({kind!s:.40})"
    of = f" of {base:.200}" if isinstance(base, str) and base.isprintable() else ""
    return f"is a {name}{of}, {_MERGED}"


def _architecture(folder: Path, described: Described) -> str:
    kind = described.model_type or ""
    if described.architectures:
        name = described.architectures[0]
    elif described.mm_vision_tower is not None and kind in ("", "llava", "llava_llama"):
        name = ORIGINAL
    elif kind == "llava":
        name = HUGGING_FACE
    else:
        name = ""
    vision = described.vision_config
    if name == HUGGING_FACE and isinstance(vision, dict) and vision.get("model_type") == "pixtral":
        raise ExportError(
            f"{folder} is Pixtral, whose tower takes pictures of any size and is not exported, {_EXPECTED} "
            "with a tower of one size, CLIP's or SigLIP's"
        )
    if name not in (HUGGING_FACE, ORIGINAL):
        raise ExportError(f"{folder} {_other(name, kind)}")
    return name


def _other(name: str, kind: str) -> str:
    """What a folder of another architecture is."""
    if kind in _FAMILIES:
        what = f"is {_FAMILIES[kind]}, which is not exported"
    elif kind in _LANGUAGE_MODELS and "Llava" not in name:
        what = "is a language model without a vision tower"
    elif kind in _TOWERS:
        what = "is a vision tower alone, which --vision-tower takes"
    elif name or kind:
        what = "is a model of another kind"
    else:
        return f"has a config.json without architectures and model_type, {_EXPECTED}"
    return f"{what}: its architecture is {name or kind}, {_EXPECTED}"


def _quantized(described: Described) -> str | None:
    """What a checkpoint is whose weights are stored in fewer bits: a sentence's end."""
    if described.quantization:
        return quantized("MLX")
    text = described.text_config if isinstance(described.text_config, dict) else {}
    found = described.quantization_config or text.get("quantization_config")
    if not isinstance(found, dict) or not found:
        return None
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    return quantized(_QUANTIZED.get(str(method), f"{method or 'an unknown method'!s:.40}"))


def quantized(method: str) -> str:
    """That a checkpoint is quantised with `method`, as a sentence's end."""
    return (
        f"holds weights quantised with {method}, expected float16, bfloat16 or float32: export the "
        "checkpoint it was made from, with --precision int8 or int4"
    )


def quantized_tensors(names: Iterable[str]) -> str | None:
    """With what the tensors of these `names` are quantised, if they are."""
    for name in names:
        for end, method in _QUANTIZED_TENSORS.items():
            if name.endswith(end):
                return method
    return None
