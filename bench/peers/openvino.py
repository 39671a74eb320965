"""Everything through OpenVINO and its GenAI library, from files as optimum-intel's exports are laid out.

Decoder parts run in a `ContinuousBatchingPipeline`, the library's fastest way on a CPU, one `step` at a time:
sampling is in it, Python and text are not. The vision part is the compiled model alone. A question is five
calls of `VLMPipeline`, which reads the text and the pictures itself, decodes as many tokens as the replies
have (its own choice: it takes no given ones), and keeps what it prefilled for prompts that begin alike. It
gives no log-probabilities of a prompt with images, so that candidates are read and not scored.

Settings are the library's defaults but for float32, which a CPU with bfloat16 would otherwise compute in
that, over a cache in 8 bits. Weights are compressed by nncf: 8 bits a channel, or 4 bits in groups with head
and embeddings in 8, and the vision tower in 8 bits for both, all asymmetric as its defaults are.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import openvino
import openvino_genai

from dualfocus.bench.peers.base import (
    PAST,
    PREFILL,
    STEPS,
    Call,
    Counts,
    Engines,
    Opened,
    Part,
    Precision,
    Slot,
    Work,
)
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.geometry import Crop
from dualfocus.runtime.image import Picture

REQUIRES = ("openvino-genai", "openvino", "openvino-tokenizers", "nncf")
FOLDER = "openvino"  # of `Work.folder`
CHAT = "chat.json"
GROUP = 32  # weights that share a scale at 4 bits: the default of 128 does not divide every width

# Which files a precision opens, and how. What is not said is the library's default.
FILES: Mapping[Precision, Precision] = {"fp32": "fp32", "bf16": "fp32", "int8": "int8", "int4": "int4"}
SETTINGS: Mapping[Precision, Mapping[str, str]] = {
    "fp32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "int8": {},
    "int4": {},
}
WEIGHTS: Mapping[Precision, str] = {
    "fp32": "float32 weights",
    "bf16": "bfloat16 weights",
    "int8": "int8 weights by channel",
    "int4": f"int4 weights in groups of {GROUP}, int8 head and vision",
}
UNPROVEN = "its prefix cache is on as shipped; no counter of its tells what that saved"

DECODER, VISION, TABLE = "language", "vision_embeddings", "text_embeddings"  # models of a VLMPipeline


def prepare(checkpoint: Any, folder: Path) -> None:
    """By precision a folder with "vlm", all models, "text", whose decoder takes tokens, and `Chat`."""
    missing = [precision for precision in dict.fromkeys(FILES.values()) if not (folder / precision).exists()]
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        unfinished = {precision: Path(name, precision) for precision in missing}
        _write_models(checkpoint, unfinished)
        for precision, place in unfinished.items():
            llava = checkpoint.model
            for kind, config in (("text", llava.language_model.config), ("vlm", llava.config)):
                config.save_pretrained(place / kind)
                llava.generation_config.save_pretrained(place / kind)
                _write_tokenizer(checkpoint, place / kind)
            _write_chat(checkpoint, place)
            place.rename(folder / precision)


def _write_models(checkpoint: Any, folders: Mapping[Precision, Path]) -> None:
    import nncf

    from dualfocus.bench.peers import openvino_export as export

    llava = checkpoint.model
    models = {
        Path("text", "openvino_model.xml"): partial(export.decoder, llava, embeds=False),
        Path("vlm", _file(DECODER)): partial(export.decoder, llava, embeds=True),
        Path("vlm", _file(VISION)): partial(export.vision, llava),
        Path("vlm", _file(TABLE)): partial(export.embeddings, llava),
    }
    for path, make in models.items():
        converted = make()
        for precision, folder in folders.items():
            model = converted.clone()
            if precision == "int4" and path.name not in (_file(VISION), _file(TABLE)):
                model = nncf.compress_weights(
                    model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=GROUP
                )
            elif precision != "fp32":
                model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            openvino.save_model(model, folder / path, compress_to_fp16=False)


def _file(name: str) -> str:
    return f"openvino_{name}_model.xml"


def _write_tokenizer(checkpoint: Any, folder: Path) -> None:
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    facts = json.loads(checkpoint.tokenizer.to_str())
    facts["post_processor"] = None  # which might put a token before every prompt
    end = checkpoint.tokenizer.id_to_token(checkpoint.tokens.eos[0])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), eos_token=end, pad_token=end
    )
    parts = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, part in zip(("tokenizer", "detokenizer"), parts, strict=True):
        openvino.save_model(part, folder / f"openvino_{name}.xml")


def _write_chat(checkpoint: Any, folder: Path) -> None:
    """What `Chat` reads, and how the library is to read pictures."""
    from dualfocus.export.checkpoint import describe
    from dualfocus.export.errors import ExportError

    manifest = describe(checkpoint, ragged_append=True)
    image, prompts, tokens = manifest.image, manifest.prompts, manifest.tokens
    if image.fit == "stretch":
        raise ExportError("the tower sees pictures stretched, which the library's LLaVA pipeline cannot do")
    chat = Chat(
        begin="" if tokens.bos is None else checkpoint.tokenizer.id_to_token(tokens.bos),
        system=prompts.system,
        user=prompts.user,
        reply=prompts.reply,
        pad=image.pad_colour if image.fit == "pad" else None,
    )
    (folder / CHAT).write_text(json.dumps(dataclasses.asdict(chat)), encoding="utf-8")
    processor = {
        "size": {"shortest_edge": image.size},
        "crop_size": {"height": image.size, "width": image.size},
        "image_mean": image.mean,
        "image_std": image.std,
    }
    (folder / "vlm" / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


@dataclass(frozen=True)
class Chat:
    """How a dialogue is written for this checkpoint; the templates are those of `manifest.Prompts`."""

    begin: str
    system: str
    user: str
    reply: str
    pad: Sequence[int] | None  # the colour that makes a picture square; None: its middle is cut out

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt, an image's place marked "<image>"."""
        said = [self.begin]
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                said.append(self.system)
            elif message["role"] == "user":
                said.append(self.user.replace("{turn}", content))
            else:
                said.append(self.replied(content))
        return "".join(said)

    def replied(self, answer: str) -> str:
        return self.reply.replace("{answer}", answer)

    def square(self, picture: Picture, crop: Crop) -> Picture:
        """The crop as the pipeline is given it, which pads nothing itself."""
        left, top, right, bottom = crop
        part = picture[top:bottom, left:right]
        if self.pad is None:
            return part.copy()
        height, width = part.shape[:2]
        side = max(height, width)
        y, x = (side - height) // 2, (side - width) // 2
        padded = np.empty((side, side, 3), np.uint8)
        padded[:] = self.pad
        padded[y : y + height, x : x + width] = part
        return padded


class _Decode:
    """`rows` requests alike, one `step` after the other."""

    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline, work: Work, rows: int) -> None:
        self._pipeline = pipeline
        self._tokens = np.array([work.tokens], np.int64)
        self._rows = rows
        self._handles: list[openvino_genai.GenerationHandle] = []

    def _add(self, length: int, replies: int) -> None:
        """Requests with prompts of that length; the first step of theirs prefills, and chooses a token."""
        config = _greedy(replies)
        prompt = openvino.Tensor(self._tokens[:, :length].copy())
        self._handles = [self._pipeline.add_request(row, prompt, config) for row in range(self._rows)]

    def prefill(self) -> Counts:
        self._add(PREFILL, 1)
        self._pipeline.step()
        return Counts(tokens_prefilled=PREFILL)

    def hold_past(self) -> None:
        self._add(PAST, 1 + STEPS)
        self._pipeline.step()

    def decode(self) -> Counts:
        for _ in range(STEPS):
            self._pipeline.step()
        return Counts(decode_steps=STEPS)

    def replies(self) -> list[list[int]]:
        """What the finished requests decoded, the token that prefilling chose before it; to be read once."""
        assert not self._pipeline.has_non_finished_requests()
        return [handle.read_all()[0].generated_ids for handle in self._handles]


class _Question:
    """The five calls, about a picture that changes before every time."""

    def __init__(self, pipeline: openvino_genai.VLMPipeline, chat: Chat, work: Work) -> None:
        self._pipeline = pipeline
        self.tokenizer = pipeline.get_tokenizer()
        height, width = work.picture.shape[:2]
        crops = ((0, 0, width, height), work.crop)
        self._pictures = [chat.square(work.picture, crop) for crop in crops]
        self.calls = [(self._text(chat, call), _images(call), call) for call in work.calls]
        self._seen = 0

    def _text(self, chat: Chat, call: Call) -> str:
        text = chat.text(call.messages)
        if call.scored:
            answer = self.tokenizer.decode(list(call.reply), skip_special_tokens=True)
            text += chat.replied(answer.strip())
        return text

    def differs(self) -> bool:
        """Its tokenizer reads one of the texts otherwise than the protocol does."""
        (image,) = self._read("<image>")
        for text, _, call in self.calls:
            expected: list[int] = []
            for token in call.prompt:
                if not isinstance(token, Slot):
                    expected.append(token)
                elif token.position == 0:
                    expected.append(image)
            if call.scored:
                expected.extend(call.reply)
            if self._read(text) != expected:
                return True
        return False

    def _read(self, text: str) -> list[int]:
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        tokens: list[int] = encoded.input_ids.data[0].tolist()
        return tokens

    def show_another(self) -> None:
        """Change the picture, of which its prefix cache would otherwise know everything."""
        self._seen += 1
        picture = self._pictures[0]
        picture[len(picture) // 2] = self._seen % 256  # a line that a cut-out middle has too

    def ask(self) -> Counts:
        counts = Counts(source="VLMPerfMetrics, whose tokens include those kept from calls before")
        for text, images, call in self.calls:
            metrics = self.generate(text, images, 1 if call.scored else len(call.reply)).perf_metrics
            counts.vision_encodes += images
            counts.tokens_prefilled += metrics.get_num_input_tokens()
            counts.decode_steps += metrics.get_num_generated_tokens() - 1
        return counts

    def generate(self, text: str, images: int, tokens: int) -> openvino_genai.VLMDecodedResults:
        """So many tokens after `text` with the first `images` pictures."""
        return self._pipeline.generate(
            text.replace("<image>\n", "<image>"),  # it puts a line's end behind every image of its own accord
            images=[openvino.Tensor(picture[None]) for picture in self._pictures[:images]],
            generation_config=_greedy(tokens),
        )


def _images(call: Call) -> int:
    return len({token.image for token in call.prompt if isinstance(token, Slot)})


def _greedy(tokens: int) -> openvino_genai.GenerationConfig:
    """So many tokens, whatever they are."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = tokens
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    return config


class _Vision:
    """`engines.VisionEncoder`."""

    def __init__(self, precision: Precision, work: Work) -> None:
        self._compiled = _compile(VISION, precision, work)

    def encode(self, pixels: Floats) -> Floats:
        features: Floats = self._compiled(pixels)[0]
        return features


class _Decoder:
    """`engines.HostDecoder`, for a cache of one row that only grows: the model of the questions, apart."""

    def __init__(self, precision: Precision, work: Work) -> None:
        self._compiled = _compile(DECODER, precision, work)
        self._requests: WeakKeyDictionary[KVCache, openvino.InferRequest] = WeakKeyDictionary()

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        assert list(rows) == [0], f"rows {rows}, expected the only one"
        if cache not in self._requests:
            assert cache.lengths[0] == 0, "the cache was filled by another"
            self._requests[cache] = self._compiled.create_infer_request()
        start = cache.lengths[0]
        cache.lengths[0] += len(embeddings[0])
        logits: Floats = self._requests[cache].infer(
            {
                "inputs_embeds": embeddings[0][None],
                "attention_mask": np.ones((1, cache.lengths[0]), np.int64),
                "position_ids": np.arange(start, cache.lengths[0])[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )[0]
        return [logits[0, list(logits_at[0])]]


def _files(precision: Precision, work: Work) -> Path:
    return work.folder / FOLDER / FILES[precision]


def _settings(precision: Precision, work: Work) -> dict[str, object]:
    return {"INFERENCE_NUM_THREADS": work.threads, **SETTINGS[precision]}


def _compile(name: str, precision: Precision, work: Work) -> openvino.CompiledModel:
    path = _files(precision, work) / "vlm" / _file(name)
    return openvino.Core().compile_model(path, "CPU", _settings(precision, work))


def _form(precision: Precision) -> str:
    core = openvino.Core()
    core.set_property("CPU", dict(SETTINGS[precision]))
    computed, kept = (
        core.get_property("CPU", name).get_type_name()
        for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
    )
    return f"{WEIGHTS[precision]}, computed in {computed}, cache in {kept}; candidates read, not scored"


def _batching(precision: Precision, work: Work) -> openvino_genai.ContinuousBatchingPipeline:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # the same prompt comes again in every round
    scheduler.max_num_batched_tokens = 2 * PAST  # a prompt at once, as its other pipelines do it
    return openvino_genai.ContinuousBatchingPipeline(
        _files(precision, work) / "text", scheduler, "CPU", _settings(precision, work)
    )


def _question(precision: Precision, work: Work) -> _Question:
    files = _files(precision, work)
    pipeline = openvino_genai.VLMPipeline(files / "vlm", "CPU", **_settings(precision, work))
    chat = Chat(**json.loads((files / CHAT).read_text(encoding="utf-8")))
    return _Question(pipeline, chat, work)


def _open(precision: Precision, work: Work) -> Opened:
    batching = _batching(precision, work)
    one, two = _Decode(batching, work, 1), _Decode(batching, work, 2)
    vision = _Vision(precision, work)

    def see() -> Counts:
        vision.encode(work.pixels[:1])
        return Counts(vision_encodes=1)

    parts: dict[Part, Callable[[], Counts]] = {
        "vision": see,
        "prefill": one.prefill,
        "decode": one.decode,
        "decode, two rows": two.decode,
    }
    before: dict[Part, Callable[[], object]] = {"decode": one.hold_past, "decode, two rows": two.hold_past}
    cannot: dict[Part, str] = {"question with reuse": UNPROVEN}
    question = _question(precision, work)
    if question.differs():
        cannot["question as shipped"] = "its tokenizer reads the prompts otherwise"
    else:
        parts["question as shipped"], before["question as shipped"] = question.ask, question.show_another
    return Opened(_form(precision), parts, before, cannot)


def _engines(precision: Precision, work: Work) -> Engines:
    return Engines(_Decoder(precision, work), _Vision(precision, work))


PRECISIONS: Mapping[Precision, Callable[[Work], Opened]] = {
    precision: partial(_open, precision) for precision in FILES
}
ENGINES: Mapping[Precision, Callable[[Work], Engines]] = {
    precision: partial(_engines, precision) for precision in ("bf16", "int8", "int4")
}
