"""What is given to export: named as what it is before heavy imports, and its own code is never run."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import formats
import pytest
from huggingface_hub import constants
from safetensors.torch import save_file

from dualfocus.export import ExportError, config, export_bundle, source
from dualfocus.export import checkpoint as checkpoints

LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
ORIGINAL = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
EXPECTED = "expected LLaVA's: LlavaForConditionalGeneration or LlavaLlamaForCausalLM"
Folder = dict[str, Any]  # content by name: JSON, or bytes


def model(architecture: str, kind: str, **more: Any) -> Folder:
    return {"config.json": {"architectures": [architecture], "model_type": kind, **more}, WEIGHTS: b""}


WEIGHTS = "model.safetensors"
QUANTIZED = (
    "expected float16, bfloat16 or float32: export the checkpoint it was made from, with --precision int8"
)
METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
}
FOLDERS: dict[str, tuple[Folder, str]] = {
    "a bundle": (
        {"manifest.json": {"format_version": 4}, "decoder.onnx": b""},
        "is a bundle, exported already",
    ),
    "GGUF": (
        {"llava-q4.gguf": b"GGUF", "mmproj.gguf": b"GGUF"},
        r"holds GGUF files \(llava-q4.gguf\), llama.cpp's",
    ),
    "LoRA": (
        {
            "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "a/b"},
            "adapter_model.bin": b"",
        },
        "is a LoRA adapter of a/b, expected a whole checkpoint: merge it into its base first",
    ),
    "LLaVA's LoRA": (
        {
            "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"},
            "adapter_model.bin": b"",
            "non_lora_trainables.bin": b"",
            "config.json": ORIGINAL,
        },
        "is a LoRA adapter of lmsys/vicuna-7b-v1.5, expected a whole checkpoint",
    ),
    "another adapter": (
        {"adapter_config.json": {"peft_type": "IA3"}, "adapter_model.safetensors": b""},
        r"is a PEFT adapter \(IA3\), expected a whole checkpoint: merge it",
    ),
    "projector": (
        {"mm_projector.bin": b"", "config.json": ORIGINAL},
        r"holds LLaVA's projector alone \(mm_projector.bin\)",
    ),
    "projector without config": ({"mm_projector.bin": b""}, "holds LLaVA's projector alone"),
    "MLX": (
        {"config.json": LLAVA | {"quantization": {"group_size": 64, "bits": 4}}, WEIGHTS: b""},
        f"holds weights quantised with MLX, {QUANTIZED}",
    ),
    **{
        f"quantised, {method}": (
            {
                "config.json": LLAVA | {"quantization_config": {"quant_method": method, "bits": 4}},
                WEIGHTS: b"",
            },
            f"holds weights quantised with {name}, {QUANTIZED}",
        )
        for method, name in METHODS.items()
    },
    "bitsandbytes of old": (
        {"config.json": ORIGINAL | {"quantization_config": {"load_in_8bit": True}}, WEIGHTS: b""},
        "holds weights quantised with bitsandbytes",
    ),
    "quantised text": (
        {
            "config.json": LLAVA | {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            WEIGHTS: b"",
        },
        "holds weights quantised with AWQ",
    ),
    "AutoGPTQ": (
        {
            "quantize_config.json": {"bits": 4},
            "config.json": ORIGINAL,
            "gptq_model-4bit-128g.safetensors": b"",
        },
        "holds weights quantised with GPTQ",
    ),
    "Pixtral": (
        {"config.json": LLAVA | {"vision_config": {"model_type": "pixtral"}}, WEIGHTS: b""},
        "is Pixtral, whose tower takes pictures of any size and is not exported",
    ),
    "Mistral's own": (
        {"params.json": {"dim": 5120}, "consolidated.safetensors": b"", "tekken.json": {}},
        r"is in its makers' own format \(params.json\), expected Hugging Face's",
    ),
    "Qwen2-VL": (
        model("Qwen2VLForConditionalGeneration", "qwen2_vl"),
        f"is Qwen2-VL, which is not exported: its architecture is Qwen2VLFor.*, {EXPECTED}",
    ),
    "InternVL": (
        model(
            "InternVLChatModel",
            "internvl_chat",
            auto_map={"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        ),
        f"is InternVL, which is not exported: its architecture is InternVLChatModel, {EXPECTED}",
    ),
    "Idefics": (model("Idefics3ForConditionalGeneration", "idefics3"), "is Idefics3, which is not exported"),
    "LLaVA-NeXT": (
        model("LlavaNextForConditionalGeneration", "llava_next"),
        "is LLaVA-NeXT, which is not exported",
    ),
    "a language model": (
        model("LlamaForCausalLM", "llama"),
        "is a language model without a vision tower: its architecture is LlamaForCausalLM, expected LLaVA's",
    ),
    "a tower": (model("CLIPModel", "clip"), "is a vision tower alone, which --vision-tower takes"),
    "no kind": ({"config.json": {}, WEIGHTS: b""}, "has a config.json without architectures and model_type"),
    "diffusers": ({"model_index.json": {}}, "is a model of diffusers, which makes pictures"),
    "TensorFlow": (
        {"config.json": LLAVA, "tf_model.h5": b""},
        r"holds TensorFlow's weights alone \(tf_model.h5\)",
    ),
    "a level too high": (
        {"checkpoint-9/config.json": LLAVA},
        "it has no config.json; .*/checkpoint-9 has one",
    ),
    "the Hub's cache": (
        {"snapshots/0123/config.json": LLAVA},
        "it has no config.json; .*/snapshots/0123 has one",
    ),
    "nothing": ({}, "is not a checkpoint folder: it has no config.json"),
    "a list": ({"config.json": [], WEIGHTS: b""}, "config.json: expected `object`, got `array`"),
    "nested": ({"config.json": b"[" * 100_000, WEIGHTS: b""}, "config.json"),
    "NaN": ({"config.json": b'{"architectures": NaN}', WEIGHTS: b""}, "config.json is not JSON"),
}


def write(folder: Path, files: Folder) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
    return folder


def refused(given: str, message: str, revision: str | None = None) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        source.check_given(given, revision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_is_named(tmp_path: Path, files: Folder, message: str) -> None:
    refused(str(write(tmp_path / "given", files)), message)


GIVEN = {
    "": "the checkpoint's name is \"\", expected a checkpoint's folder or its id on the Hub",
    "  ": "expected a checkpoint's folder or its id on the Hub",
    "https://huggingface.co/llava-hf/llava-1.5-7b-hf/tree/main": ": llava-hf/llava-1.5-7b-hf$",
    "https:/huggingface.co/a/b": "is a URL, expected the model's id on the Hub: a/b$",
    "https://example.com/model": "^https://example.com/model is a URL, expected a checkpoint's folder",
    "data:application/octet-stream;base64," + "A" * 1000: "^data:.{1,60} is a URL",
    "hf://a/b": "is a URL",
    "./typo": "no such folder: ./typo, expected a checkpoint's folder or its id",
    "models/llava-q4.gguf": "does not exist, and a GGUF file could not be exported",
    "n" * 10_000: "no such folder: n+, expected",
    "a\0b": "no such folder",
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_name_is_named(given: str) -> None:
    refused(given, GIVEN[given])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", b"GGUF\3", "is a GGUF file: it holds llama.cpp's weights, expected the folder of"),
        ("no suffix", b"GGUF\3", "is a GGUF file"),
        ("model.safetensors", b"", "is one file of a checkpoint, expected its folder: /"),
        ("config.json", b"{}", "is one file of a checkpoint, expected its folder: /"),
        ("model.zip", b"PK\3\4", "is an archive, expected the folder that it unpacks to"),
        ("model.tar", b"", "is an archive"),
        ("decoder.onnx", b"", "is an ONNX graph"),
        ("letter.txt", b"dear", "is a file, expected a checkpoint's folder"),
    ],
)
def test_a_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(str(tmp_path / name), message)


def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(str(tmp_path / "fifo"), "is no folder, expected a checkpoint's")
    refused("/dev/zero", "is no folder, expected a checkpoint's")
    folder = write(tmp_path / "given", {WEIGHTS: b""})
    os.mkfifo(folder / "config.json")
    refused(str(folder), "config.json is not a regular file")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    refused(str(folder), "config.json is not a regular file")


@pytest.mark.parametrize("given", ["gpt2", "llava-hf/llava-1.5-7b-hf", "a.b/c_d-e"])
def test_an_id_may_be_one(given: str) -> None:
    source.check_given(given, "main")


def test_nothing_heavy_is_imported_to_say_it(tmp_path: Path) -> None:
    given = [str(write(tmp_path / str(i), files)) for i, (files, _) in enumerate(FOLDERS.values())]
    code = (
        "import sys\n"
        "from dualfocus.export import ExportError, export_bundle\n"
        "for given in sys.argv[1:]:\n"
        "    try: export_bundle(given, 'out'); print('exported')\n"
        "    except ExportError: pass\n"
        "print(*{'torch', 'transformers', 'onnx', 'huggingface_hub'} & set(sys.modules))"
    )
    given += [name for name in GIVEN if "\0" not in name]
    done = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


def test_weights_that_no_file_calls_quantised(tmp_path: Path) -> None:
    made = formats.make()
    folder = formats.hugging_face(tmp_path / "checkpoint", made)
    name = "model.language_model.layers.0.mlp.down_proj."
    tensors = {key: tensor for key, tensor in made.tensors.items() if not key.startswith(name)}
    for parts, method in {
        ("qweight", "scales"): "GPTQ or AWQ",
        ("weight_packed",): "compressed-tensors",
    }.items():
        packed = {name + part: made.tensors["lm_head.weight"].clone() for part in parts}
        save_file(tensors | packed, folder / WEIGHTS)
        with pytest.raises(ExportError, match=f"holds weights quantised with {method}, {QUANTIZED}"):
            checkpoints.load(folder)


# ---- code of a checkpoint's own

MARKING = "from pathlib import Path\nPath({mark!r}).touch()\nclass Tok: pass\nTok.from_pretrained = Tok\n"
MAPS = {
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]},
    "config.json": {"AutoConfig": "evil.Tok", "AutoModelForCausalLM": "evil.Tok"},
    "preprocessor_config.json": {"AutoImageProcessor": "evil.Tok"},
}


def hostile(folder: Path, name: str, found: Any) -> Path:
    """A checkpoint that would load, but for its own code."""
    checkpoint = formats.hugging_face(folder, formats.make("qwen2"))
    path = checkpoint / name
    raw = json.loads(path.read_text()) if path.exists() else {}
    if name == "tokenizer_config.json":
        raw["tokenizer_class"] = "Tok"
    path.write_text(json.dumps(raw | {"auto_map": found}))
    (checkpoint / "evil.py").write_text(MARKING.format(mark=str(folder.parent / "mark")))
    return checkpoint


def on_terminal(command: list[str], home: Path) -> tuple[int, str]:
    """The status and output of a process on a terminal at which "y" is typed all the time."""
    number, terminal = pty.openpty()
    environment = os.environ | {"HF_HOME": str(home), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("CI", None)
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, cwd=home
    ) as process:
        os.close(terminal)
        shown = b""
        while process.poll() is None:
            os.write(number, b"y\n")
            while select.select([number], [], [], 0.5)[0]:
                try:
                    shown += os.read(number, 1 << 16)
                except OSError:  # the other end is closed
                    break
                if process.poll() is not None:
                    break
        os.close(number)
        return process.wait(120), shown.decode(errors="replace")


@pytest.mark.parametrize("name", MAPS)
def test_a_checkpoints_code_is_never_run(tmp_path: Path, name: str) -> None:
    checkpoint, home = hostile(tmp_path / "checkpoint", name, MAPS[name]), tmp_path / "home"
    home.mkdir()
    command = [
        sys.executable,
        "-m",
        "dualfocus.cli",
        "export",
        str(checkpoint),
        "-o",
        str(tmp_path / "bundle"),
    ]
    status, shown = on_terminal(command, home)
    assert status == 2, shown
    assert "names code of the checkpoint's own ('evil.Tok' in auto_map), which is never run here" in shown
    assert "[y/N]" not in shown
    assert not (tmp_path / "mark").exists()
    assert list(home.rglob("*.py")) == []


def test_it_would_have_been_run(tmp_path: Path) -> None:
    """By the library, asked to: what the test before holds is there to be seen."""
    checkpoint, home = (
        hostile(tmp_path / "checkpoint", "tokenizer_config.json", MAPS["tokenizer_config.json"]),
        tmp_path,
    )
    code = f"import transformers; transformers.AutoTokenizer.from_pretrained({str(checkpoint)!r})"
    _, shown = on_terminal([sys.executable, "-c", code], home)
    assert "[y/N]" in shown
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tokenizer_config.json", ["evil.Tok", None]),  # as of old
        ("tokenizer_config.json", {"AutoProcessor": "evil.Tok"}),
        ("tokenizer_config.json", "evil.Tok"),
        ("config.json", {"AutoModel": "a/b--evil.Tok"}),
        ("processor_config.json", {"AutoProcessor": "evil.Tok"}),
    ],
)
def test_every_form_of_it_is_refused(tmp_path: Path, name: str, found: Any) -> None:
    with pytest.raises(ExportError, match=f"{name} names code of the checkpoint's own"):
        checkpoints.load(hostile(tmp_path / "checkpoint", name, found))


@pytest.mark.parametrize("inside", ["text_config", "vision_config"])
def test_it_is_refused_at_any_depth(tmp_path: Path, inside: str) -> None:
    checkpoint = formats.hugging_face(tmp_path / "checkpoint", formats.make())
    raw = json.loads((checkpoint / "config.json").read_text())
    raw[inside]["auto_map"] = {"AutoConfig": "evil.Tok"}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ExportError, match=r"config.json names code of the checkpoint's own \('evil.Tok'"):
        checkpoints.load(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_nor_is_a_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    made = formats.make()
    tower = formats.tower(tmp_path / "tower", made, whole=True)
    checkpoint = formats.original(tmp_path / "checkpoint", made, tower_inside=False, tower_name="them/tower")
    raw = json.loads((tower / name).read_text())
    (tower / name).write_text(json.dumps(raw | {"auto_map": {"AutoConfig": "evil.Tok"}}))
    with pytest.raises(ExportError, match=f"tower/{name} names code of the checkpoint's own"):
        checkpoints.load(checkpoint)


def test_an_empty_map_names_nothing(tmp_path: Path) -> None:
    for found in ({}, None):
        write(tmp_path, {"config.json": {"auto_map": found}})
        config.check_no_code(tmp_path)


def test_nothing_in_a_configuration_loads_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would fetch one from the Hub for an attention called "owner/name"."""
    from transformers import modeling_utils

    monkeypatch.setattr(
        modeling_utils, "load_and_register_kernel", lambda *_: pytest.fail("a kernel was loaded")
    )
    checkpoint = formats.hugging_face(tmp_path / "checkpoint", formats.make())
    raw = json.loads((checkpoint / "config.json").read_text())
    for part in (raw, raw["text_config"], raw["vision_config"]):
        part |= {"_attn_implementation": "them/kernel", "attn_implementation": "them/kernel"}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    assert checkpoints.describe(checkpoints.load(checkpoint), ragged_append=True).name == "checkpoint"


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", FOLDERS["LoRA"][0])
    done = subprocess.run(
        [sys.executable, "-m", "dualfocus.cli", "export", str(folder), "-o", str(tmp_path / "bundle")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "is a LoRA adapter of a/b" in done.stderr
    with pytest.raises(ExportError, match="is a LoRA adapter of a/b"):
        export_bundle(folder, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [folder]
