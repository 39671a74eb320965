"""llama.cpp through `llama-cpp-python`: its chat handler for LLaVA as shipped, and its batches by hand.

As shipped every call of the protocol is a chat completion. The handler forgets what it knew, encodes every
picture anew and takes the prompt in pieces, text and pictures. A `LogitsProcessor` makes it reply what it has
to; it also reads a candidate's log-probabilities, so that a candidate is decoded as any other reply. Only the
handler's template is changed, to the protocol's.

With reuse the same library is driven as an expert would: pictures are encoded once, what prompts have in
common is shared between sequences, the macro and locate replies are decoded in one batch, micro goes on where
locate stopped, and both candidates are branches behind what they share, in one batch. Where that is faster,
rows are decoded one after the other; both ways are tried when the peer is opened.

Both are given pictures in the tower's size already, rounded to the 8 bits that bitmaps have, so that none has
to be scaled. What was computed is what `llama_perf_context` says; it takes every batch of more than one token
for a prompt, so that steps of two rows are told apart here. Pictures are counted by the messages of the
library's helper, which the handler encodes with, and by calls of its encoder where it is called here.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import finalize, ref

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp
from llama_cpp.llama_chat_format import Llava15ChatHandler
from PIL import Image

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
from dualfocus.runtime.image import Picture
from dualfocus.runtime.sequence import log_softmax

REQUIRES = ("llama-cpp-python", "gguf")
FOLDER = "llama_cpp"  # of `Work.folder`
CHAT = "chat.json"
BATCH = 1024  # tokens computed at once; its default of 512 would cut a picture of 576 in two
TRIES, TRIED = 3, 8  # how often two ways are tried, for how many steps
COUNTER = "llama_perf_context"
NO_TOWER = "its vision towers are fixed, and this is none of them"
READS_OTHERWISE = "its tokenizer reads the prompts otherwise"


@dataclass(frozen=True)
class Setting:
    """How a precision is opened: files, the cache's type, and flash attention, which computes in float16."""

    text: str
    vision: str
    cache: int
    flash: bool

    @property
    def text_file(self) -> str:
        return f"text-{self.text}.gguf"

    @property
    def vision_file(self) -> str:
        return f"mmproj-{self.vision}.gguf"

    @property
    def form(self) -> str:
        cache = {llama_cpp.GGML_TYPE_F32: "F32", llama_cpp.GGML_TYPE_F16: "F16"}[self.cache]
        flash = "flash attention" if self.flash else "no flash attention"
        return f"{self.text.upper()}, tower {self.vision.upper()}, cache {cache}, {flash}"


# The tower in 16 bits, as its converters leave it: with AVX512_BF16 that is faster than Q8_0.
SETTINGS: Mapping[Precision, Setting] = {
    "fp32": Setting("f32", "f32", llama_cpp.GGML_TYPE_F32, flash=False),
    "bf16": Setting("bf16", "bf16", llama_cpp.GGML_TYPE_F16, flash=True),
    "int8": Setting("q8_0", "bf16", llama_cpp.GGML_TYPE_F16, flash=True),
    "int4": Setting("q4_0", "bf16", llama_cpp.GGML_TYPE_F16, flash=True),
}


def prepare(checkpoint: Any, folder: Path) -> None:
    """The GGUF files, a tower's only if it is CLIP's, and `Chat`."""
    from dualfocus.bench.peers import gguf_files
    from dualfocus.export.checkpoint import describe

    for setting in SETTINGS.values():
        if not (path := folder / setting.text_file).exists():
            gguf_files.write_text(checkpoint, path, setting.text)
        if gguf_files.has_tower(checkpoint) and not (path := folder / setting.vision_file).exists():
            gguf_files.write_vision(checkpoint, path, setting.vision)
    if not (folder / CHAT).exists():
        manifest = describe(checkpoint, ragged_append=True)
        prompts, image = manifest.prompts, manifest.image
        chat = Chat(prompts.system, prompts.user, prompts.reply, image.mean, image.std)
        (folder / CHAT).write_text(json.dumps(dataclasses.asdict(chat)), encoding="utf-8")


@dataclass(frozen=True)
class Chat:
    """How dialogues are written and pictures are seen; the texts are those of `manifest.Prompts`."""

    system: str
    user: str
    reply: str
    mean: Sequence[float]
    std: Sequence[float]

    def template(self) -> str:
        """For the handler, which puts an image's address where its marker is to stand."""
        user, reply = self.user.split("{turn}"), self.reply.split("{answer}")
        system, before, after, begin, end = (
            "{{ " + json.dumps(text) + " }}" for text in (self.system, *user, *reply)
        )
        return (
            system + "{% for message in messages %}{% if message.role == 'user' %}" + before +
            "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}"
            "{{ part.image_url.url }}{% endif %}{% endfor %}" + after +
            "{% elif message.role == 'assistant' %}" + begin + "{{ message.content }}" + end +
            "{% endif %}{% endfor %}"
        )  # fmt: skip

    def pictures(self, pixels: Floats) -> list[Picture]:
        """(N, 3, S, S) as the model takes them -> (S, S, 3) as bitmaps hold them."""
        values = pixels.transpose(0, 2, 3, 1) * np.array(self.std) + np.array(self.mean)
        return list(np.ascontiguousarray((255 * values).round().clip(0, 255).astype(np.uint8)))


@dataclass(frozen=True)
class Piece:
    """Tokens or (L, D) embeddings that follow each other from position `start` on, in all of `sequences`."""

    sequences: tuple[int, ...]
    start: int
    content: Sequence[int] | Floats
    logits_at: Sequence[int] = ()  # counted in 0..L-1, ascending


class Context:
    """Sequences over one cache of a model."""

    def __init__(self, llama: llama_cpp.Llama, cells: int, sequences: int = 1) -> None:
        """`cells` is how many tokens the cache holds; settings and threads are as `llama` has them."""
        params = llama_cpp.llama_context_default_params()
        for name in ("n_threads", "n_threads_batch", "type_k", "type_v", "flash_attn_type", "no_perf"):
            setattr(params, name, getattr(llama.context_params, name))
        params.n_ctx = params.n_batch = cells
        params.n_ubatch = min(cells, BATCH)
        params.n_seq_max = sequences
        params.kv_unified = True  # so that sequences can share what they have in common
        self._llama = llama  # which must not go before its contexts
        self._context = llama_cpp.llama_init_from_model(llama.model, params)
        assert self._context is not None, "a context could not be made"
        finalize(self, llama_cpp.llama_free, self._context)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama.n_vocab()
        for start, tokens in (0, [0, 0]), (2, [0]):  # so that neither counter is 0
            self.decode(Piece((0,), start, tokens, [len(tokens) - 1]))
        self.clear()

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def cut(self, sequence: int, length: int) -> None:
        """Forget what `sequence` holds beyond `length` tokens."""
        assert llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def fork(self, source: int, target: int) -> None:
        """Make `target` share all that `source` holds; it has to be empty."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def decode(self, *pieces: Piece) -> Floats:
        """Compute all `pieces`, of one kind, in one batch.

        Returns the (K, vocabulary) logits after all that were asked for, valid until the next call.
        """
        lengths = [len(piece.content) for piece in pieces]
        positions = np.concatenate(
            [
                np.arange(piece.start, piece.start + length)
                for piece, length in zip(pieces, lengths, strict=True)
            ]
        ).astype(np.int32)
        owners = [np.array(piece.sequences, np.int32) for piece in pieces]
        counts = np.repeat(np.array([len(ids) for ids in owners], np.int32), lengths)
        addresses = np.repeat(np.array([ids.ctypes.data for ids in owners], np.uintp), lengths)
        wanted = np.zeros(len(positions), np.int8)
        for begin, piece in zip(itertools.accumulate(lengths, initial=0), pieces, strict=False):
            wanted[[begin + at for at in piece.logits_at]] = 1
        batch = llama_cpp.llama_batch(
            n_tokens=len(positions),
            pos=_pointer(positions, ctypes.c_int32),
            n_seq_id=_pointer(counts, ctypes.c_int32),
            seq_id=ctypes.cast(addresses.ctypes.data, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=_pointer(wanted, ctypes.c_int8),
        )
        if isinstance(pieces[0].content, np.ndarray):
            embeddings = np.concatenate([np.asarray(piece.content, np.float32) for piece in pieces])
            batch.embd = _pointer(embeddings, ctypes.c_float)
        else:
            tokens = np.concatenate([np.array(piece.content, np.int32) for piece in pieces])
            batch.token = _pointer(tokens, ctypes.c_int32)
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        if not wanted.any():
            return np.empty((0, self._vocabulary), np.float32)
        rows: Floats = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self._context), shape=(int(wanted.sum()), self._vocabulary)
        )
        return rows

    def step(self, pieces: Sequence[Piece], apart: bool) -> list[int]:
        """Decode a token of each of some sequences, in one batch or `apart`: the best that may follow."""
        batches = [[piece] for piece in pieces] if apart else [pieces]
        return [int(token) for batch in batches for token in self.decode(*batch).argmax(axis=-1)]

    def computed(self) -> int:
        """How many tokens were computed so far, by the library's counters."""
        llama_cpp.llama_synchronize(self._context)
        return sum(_counters(self._context))


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _counters(context: Any) -> tuple[int, int]:
    """Tokens of batches of several, and of batches of one. Each is said to be 1 while it is 0."""
    counted = llama_cpp.llama_perf_context(context)
    return counted.n_p_eval, counted.n_eval


class Tower:
    """Pictures -> image tokens, by the context that the chat handler has for it."""

    def __init__(self, context: Any, llama: llama_cpp.Llama) -> None:
        """`llama` frees the context when it goes."""
        self.context = context
        self._llama = llama

    @contextmanager
    def preprocessed(self, picture: Picture) -> Iterator[Any]:
        """What the encoder takes; `picture` is (S, S, 3)."""
        height, width = picture.shape[:2]
        bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, _pointer(picture, ctypes.c_uint8))
        with _chunks(self.context, mtmd_cpp.mtmd_default_marker(), [bitmap]) as chunks:
            (image,) = (chunk for chunk in chunks if _is_image(chunk))
            yield image

    def encode(self, image: Any) -> Floats:
        """(T, D) image tokens, valid until the next call."""
        if mtmd_cpp.mtmd_encode_chunk(self.context, image):
            raise RuntimeError("mtmd_encode_chunk failed")
        shape = mtmd_cpp.mtmd_input_chunk_get_n_tokens(image), self._llama.n_embd()
        features: Floats = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self.context), shape=shape)
        return features


class _Seeing:
    """Encoding one picture, which was preprocessed before."""

    def __init__(self, tower: Tower, picture: Picture) -> None:
        self._tower = tower
        self._held = ExitStack()
        self._image = self._held.enter_context(tower.preprocessed(picture))

    def encode(self) -> Counts:
        self._tower.encode(self._image)
        return Counts(vision_encodes=1)


@contextmanager
def _chunks(context: Any, text: bytes, bitmaps: Sequence[Any]) -> Iterator[list[Any]]:
    """`text` and the images at its markers, as the library reads them. Frees the `bitmaps` too."""
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    try:
        told = mtmd_cpp.mtmd_input_text(text, len(text), True, True)
        array = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        if mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(told), array, len(bitmaps)):
            raise RuntimeError("mtmd_tokenize failed")
        count = mtmd_cpp.mtmd_input_chunks_size(chunks)
        yield [mtmd_cpp.mtmd_input_chunks_get(chunks, i) for i in range(count)]
    finally:
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd_cpp.mtmd_bitmap_free(bitmap)


def _is_image(chunk: Any) -> bool:
    return bool(mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE)


class _Messages:
    """Keeps the library's messages about pictures to itself, and counts those that one was encoded."""

    def __init__(self) -> None:
        self.encoded = 0
        self._callback = llama_cpp.llama_log_callback(self._hear)  # has to stay alive
        mtmd_cpp.mtmd_helper_log_set(self._callback, ctypes.c_void_p(0))

    def _hear(self, level: int, text: bytes, _: object) -> None:
        self.encoded += text.startswith(b"image slice encoded")


MESSAGES = _Messages()  # the library has one place for them


class _Says:
    """A `LogitsProcessor` that makes a given reply the best one, and notes its log-probabilities if asked."""

    def __init__(self, reply: Sequence[int], scored: bool) -> None:
        self.said = 0  # tokens
        self.logprobs: list[float] = []
        self._reply = reply
        self._scored = scored

    def __call__(self, tokens: object, scores: Floats) -> Floats:
        token = self._reply[self.said]
        self.said += 1
        if self._scored:
            self.logprobs.append(log_softmax(scores, token))
        scores[token] = np.inf
        return scores


class Shipped:
    """The protocol's calls as chat completions."""

    def __init__(self, llama: llama_cpp.Llama, tower: Tower, chat: Chat, work: Work) -> None:
        """`llama` has a chat handler, whose context is the `tower`'s."""
        self._llama = llama
        self._tower = tower
        self._chat = chat
        self._work = work
        self._pictures = chat.pictures(work.pixels)
        self._addresses = [_address(picture) for picture in self._pictures]
        self.scores: list[list[float]] = []  # of the candidates asked about last

    def differs(self) -> bool:
        """The library reads one of the prompts otherwise than the protocol does."""
        return any(self._read(call) != list(call.prompt) for call in self._work.calls)

    def _read(self, call: Call) -> list[int | Slot]:
        from jinja2 import Template

        marker = mtmd_cpp.mtmd_default_marker()
        text = Template(self._chat.template()).render(messages=_told(call, [marker.decode()] * 2))
        bitmaps = [
            mtmd_cpp.mtmd_bitmap_init(*picture.shape[1::-1], _pointer(picture, ctypes.c_uint8))
            for picture in self._pictures[: _images(call)]
        ]
        read: list[int | Slot] = []
        images = itertools.count()
        with _chunks(self._tower.context, text.encode(), bitmaps) as chunks:
            for chunk in chunks:
                length = ctypes.c_size_t(mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk))
                if _is_image(chunk):
                    image = next(images)
                    read.extend(Slot(image, position) for position in range(length.value))
                else:
                    tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
                    read.extend(tokens[: length.value])
        return read

    def ask(self) -> Counts:
        seen, counted = MESSAGES.encoded, _counters(self._llama.ctx)
        self.scores = []
        for call in self._work.calls:
            says = _Says(call.reply, call.scored)
            made = self._llama.create_chat_completion(
                _told(call, self._addresses),
                max_tokens=len(call.reply),
                temperature=0.0,
                repeat_penalty=1.0,
                logits_processor=llama_cpp.LogitsProcessorList([says]),
            )
            assert isinstance(made, dict)  # not a stream
            assert says.said == len(call.reply), f"a reply of {says.said} tokens"
            if call.scored:
                self.scores.append(says.logprobs)
        llama_cpp.llama_synchronize(self._llama.ctx)
        prefilled, steps = (now - then for now, then in zip(_counters(self._llama.ctx), counted, strict=True))
        return Counts(MESSAGES.encoded - seen, prefilled, steps, f"{COUNTER}, messages of mtmd_helper")


def _address(picture: Picture) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _told(call: Call, addresses: Sequence[str]) -> list[Any]:
    """The call's messages, images where they are marked."""
    images = iter(addresses)

    def parts(content: str) -> Iterator[dict[str, Any]]:
        for i, text in enumerate(content.split("<image>")):
            if i:
                yield {"type": "image_url", "image_url": {"url": next(images)}}
            if text:
                yield {"type": "text", "text": text}

    return [
        {"role": message["role"], "content": list(parts(message["content"]))}
        if message["role"] == "user"
        else dict(message)
        for message in call.messages
    ]


def _images(call: Call) -> int:
    return len({token.image for token in call.prompt if isinstance(token, Slot)})


class Reusing:
    """The protocol's calls with all that the library's batches allow to be kept."""

    MACRO, LOCATE = 0, 1  # sequences; micro and the candidates go on from locate's

    def __init__(
        self, llama: llama_cpp.Llama, tower: Tower, chat: Chat, work: Work, apart: bool = False
    ) -> None:
        """`apart` as in `Context.step`."""
        self._apart = apart
        self._macro, self._locate, self._micro, *self._candidates = work.calls
        told = [(*call.prompt, *call.reply) for call in work.calls]
        longest = max(told, key=len)
        room = len(longest) + sum(len(tokens) - _common(tokens, longest) for tokens in told)
        self._context = Context(llama, room, sequences=1 + max(1, len(self._candidates)))
        self._tower = tower
        self._pictures = chat.pictures(work.pixels)
        self._features: dict[int, Floats] = {}
        self._counts = Counts()
        self.scores: list[list[float]] = []  # of the candidates asked about last

    def ask(self) -> Counts:
        context, self._features = self._context, {}
        context.clear()
        self._counts = Counts(source=COUNTER)
        rows = 0  # decoded
        begun = context.computed()

        asked = {self.MACRO: self._macro, self.LOCATE: self._locate}
        shared = _common(self._macro.prompt, self._locate.prompt)
        self._feed((self.MACRO, self.LOCATE), self._macro.prompt[:shared], 0)
        ends = [
            Piece((row,), shared, _text(call.prompt[shared:]), [len(call.prompt) - shared - 1])
            for row, call in asked.items()
        ]
        context.decode(*ends).argmax(axis=-1)
        rows += self._decode(asked)

        known = (*self._locate.prompt, *self._locate.reply[:-1])
        kept = _common(known, self._micro.prompt)
        context.cut(self.LOCATE, kept)
        self._feed((self.LOCATE,), self._micro.prompt, kept).argmax(axis=-1)
        rows += self._decode({self.LOCATE: self._micro})

        context.cut(self.MACRO, 0)
        self._score((*self._micro.prompt, *self._micro.reply[:-1]))
        self._counts.tokens_prefilled = context.computed() - begun - rows
        return self._counts

    def _feed(self, sequences: tuple[int, ...], tokens: Sequence[int | Slot], start: int) -> Floats:
        """Feed `tokens` from `start` on; the (1, vocabulary) logits after the last."""
        logits: Floats | None = None
        while start < len(tokens):
            stop = start + 1
            while stop < len(tokens) and _kind(tokens[stop]) == _kind(tokens[start]):
                stop += 1
            content = self._content(tokens[start:stop])
            last = [stop - start - 1] if stop == len(tokens) else []
            logits = self._context.decode(Piece(sequences, start, content, last))
            start = stop
        assert logits is not None
        return logits

    def _content(self, tokens: Sequence[int | Slot]) -> Sequence[int] | Floats:
        first = tokens[0]
        if not isinstance(first, Slot):
            return _text(tokens)
        if first.image not in self._features:
            with self._tower.preprocessed(self._pictures[first.image]) as image:
                self._features[first.image] = self._tower.encode(image).copy()
            self._counts.vision_encodes += 1
        return self._features[first.image][[token.position for token in tokens if isinstance(token, Slot)]]

    def _decode(self, asked: Mapping[int, Call]) -> int:
        """Decode the replies of all sequences together; how many tokens were computed."""
        rows = 0
        for step in range(max(len(call.reply) for call in asked.values()) - 1):
            pieces = [
                Piece((row,), len(call.prompt) + step, call.reply[step : step + 1], [0])
                for row, call in asked.items()
                if step < len(call.reply) - 1  # nothing follows the end
            ]
            self._context.step(pieces, self._apart)
            self._counts.decode_steps += len(pieces) if self._apart else 1
            rows += len(pieces)
        return rows

    def _score(self, known: Sequence[int | Slot]) -> None:
        """Score the candidates behind as much of `known`, which is locate's sequence, as they begin with."""
        told = [(*call.prompt, *call.reply) for call in self._candidates]
        shared = min(_common(*told), *(len(call.prompt) for call in self._candidates))
        kept = min(_common(known, told[0]), shared - 1)  # the logits after the last shared one are needed
        self._context.cut(self.LOCATE, kept)
        branches = range(self.LOCATE, self.LOCATE + len(told))
        self._context.cut(branches[-1], 0)
        for branch in branches[1:]:
            self._context.fork(self.LOCATE, branch)
        pieces = [Piece(tuple(branches), kept, _text(told[0][kept:shared]), [shared - kept - 1])]
        for branch, tokens in zip(branches, told, strict=True):
            content = _text(tokens[shared:-1])
            pieces.append(Piece((branch,), shared, content, range(len(content))))
        logits = iter(self._context.decode(*pieces))
        first = next(logits)
        self.scores = []
        for call, tokens in zip(self._candidates, told, strict=True):
            after = [first, *itertools.islice(logits, len(tokens) - shared - 1)]
            scores = [
                log_softmax(row, token) for row, token in zip(after, _text(tokens[shared:]), strict=True)
            ]
            self.scores.append(scores[-len(call.reply) :])


def _kind(token: int | Slot) -> int | None:
    """What can be fed together: tokens of text, or of one image."""
    return token.image if isinstance(token, Slot) else None


def _text(tokens: Sequence[int | Slot]) -> list[int]:
    ids = [token for token in tokens if not isinstance(token, Slot)]
    assert len(ids) == len(tokens), "an image where the protocol has text"
    return ids


def _common(*rows: Sequence[int | Slot]) -> int:
    """How many tokens all begin with."""
    return next(
        (i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows))
    )


class _Decode:
    """`rows` sequences alike, decoded token by token behind what comes before."""

    def __init__(self, llama: llama_cpp.Llama, work: Work, rows: int) -> None:
        self._context = Context(llama, rows * (PAST + STEPS), sequences=rows)
        self._tokens = work.tokens
        self._rows = range(rows)
        self._held = False
        self.apart = False  # each row in a batch of its own
        self.said: list[list[int]] = []  # the best tokens of every step

    def hold_past(self) -> None:
        for row in self._rows:
            if self._held:
                self._context.cut(row, PAST)
            else:
                self._context.decode(Piece((row,), 0, self._tokens[:PAST], [PAST - 1]))
        self._held = True

    def decode(self, steps: int = STEPS) -> Counts:
        begun = self._context.computed()
        self.said = []
        for at in range(PAST, PAST + steps):
            pieces = [Piece((row,), at, self._tokens[at : at + 1], [0]) for row in self._rows]
            self.said.append(self._context.step(pieces, self.apart))
        rows = self._context.computed() - begun
        return Counts(decode_steps=rows // len(self._rows), source=COUNTER)

    def choose(self) -> None:
        """Decode from now on in the way that is faster here, in one batch or `apart`: for some types of
        weights there are kernels for one row and for many, but none for two."""
        took: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(TRIES):
            for self.apart, times in took.items():
                self.hold_past()
                begin = time.perf_counter()
                self.decode(TRIED)
                times.append(time.perf_counter() - begin)
        self.apart = min(took[True]) < min(took[False])


class _Prefill:
    def __init__(self, llama: llama_cpp.Llama, work: Work) -> None:
        self._context = Context(llama, PREFILL)
        self._tokens = work.tokens[:PREFILL]

    def prefill(self) -> Counts:
        begun = self._context.computed()
        self._context.clear()
        self._context.decode(Piece((0,), 0, self._tokens, [PREFILL - 1])).argmax()
        return Counts(tokens_prefilled=self._context.computed() - begun, source=COUNTER)


class LlamaCppDecoder:
    """`engines.HostDecoder`, for caches of one row of which it only uses and counts the length.

    It has one sequence, which is the cache's that was extended last: that cache may be truncated, and another
    one has to be empty.
    """

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self._context = Context(llama, llama_cpp.llama_model_n_ctx_train(llama.model))
        self._cache: Callable[[], KVCache | None] = lambda: None

    def extend(
        self,
        cache: KVCache,
        rows: Sequence[int],
        embeddings: Sequence[Floats],
        logits_at: Sequence[Sequence[int]],
    ) -> list[Floats]:
        assert list(rows) == [0], f"rows {rows}, expected the only one"
        start = cache.lengths[0]
        assert start == 0 or self._cache() is cache, "the cache was filled by another"
        self._cache = ref(cache)
        self._context.cut(0, start)
        wanted, at = np.unique(np.array(logits_at[0], np.intp), return_inverse=True)
        logits = self._context.decode(Piece((0,), start, embeddings[0], wanted.tolist()))
        cache.lengths[0] += len(embeddings[0])
        return [logits[at]]


class _Vision:
    """`engines.VisionEncoder`, of what 8 bits leave of the pixels."""

    def __init__(self, tower: Tower, chat: Chat) -> None:
        self._tower = tower
        self._chat = chat

    def encode(self, pixels: Floats) -> Floats:
        features = []
        for picture in self._chat.pictures(pixels):
            with self._tower.preprocessed(picture) as image:
                features.append(self._tower.encode(image).copy())
        return np.stack(features)


def _load(
    path: Path, setting: Setting, threads: int, cells: int = 8, handler: Llava15ChatHandler | None = None
) -> llama_cpp.Llama:
    """The decoder with a context of `cells` tokens of its own, which the chat `handler` works in."""
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=cells,
        n_batch=BATCH,
        n_ubatch=BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=setting.flash,
        type_k=setting.cache,
        type_v=setting.cache,
        chat_handler=handler,
        verbose=False,
    )
    for tokens in ([0, 0], [0]):  # so that neither counter is 0
        llama.eval(tokens)
        llama_cpp.llama_synchronize(llama.ctx)
    return llama


def _handler(chat: Chat, path: Path) -> Llava15ChatHandler | None:
    """With the tower at `path`; None if there is none."""
    if not path.exists():
        return None
    handler = Llava15ChatHandler(str(path), verbose=False)
    handler.CHAT_FORMAT = chat.template()
    handler.DEFAULT_SYSTEM_MESSAGE = None
    return handler


def _opened(precision: Precision, work: Work) -> tuple[llama_cpp.Llama, Chat, Tower | None]:
    setting, folder = SETTINGS[precision], work.folder / FOLDER
    chat = Chat(**json.loads((folder / CHAT).read_text(encoding="utf-8")))
    handler = _handler(chat, folder / setting.vision_file)
    cells = max(len(call.prompt) + len(call.reply) for call in work.calls)
    llama = _load(folder / setting.text_file, setting, work.threads, cells, handler)
    if handler is None:
        return llama, chat, None
    handler._init_mtmd_context(llama)  # which it else does when it is first asked
    return llama, chat, Tower(handler.mtmd_ctx, llama)


def _open(precision: Precision, work: Work) -> Opened:
    llama, chat, tower = _opened(precision, work)
    one, two = _Decode(llama, work, 1), _Decode(llama, work, 2)
    two.choose()
    form = f"{SETTINGS[precision].form}, two rows {'one after the other' if two.apart else 'in one batch'}"
    parts: dict[Part, Callable[[], Counts]] = {
        "prefill": _Prefill(llama, work).prefill,
        "decode": one.decode,
        "decode, two rows": two.decode,
    }
    before: dict[Part, Callable[[], object]] = {"decode": one.hold_past, "decode, two rows": two.hold_past}
    if tower is None:
        needed: tuple[Part, ...] = ("vision", "question as shipped", "question with reuse")
        return Opened(form, parts, before, dict.fromkeys(needed, NO_TOWER))
    parts["vision"] = _Seeing(tower, chat.pictures(work.pixels)[0]).encode
    parts["question with reuse"] = Reusing(llama, tower, chat, work, two.apart).ask
    shipped = Shipped(llama, tower, chat, work)
    if shipped.differs():
        return Opened(form, parts, before, {"question as shipped": READS_OTHERWISE})
    return Opened(form, {**parts, "question as shipped": shipped.ask}, before)


def _engines(precision: Precision, work: Work) -> Engines:
    llama, chat, tower = _opened(precision, work)
    return Engines(LlamaCppDecoder(llama), None if tower is None else _Vision(tower, chat))


PRECISIONS: Mapping[Precision, Callable[[Work], Opened]] = {
    precision: partial(_open, precision) for precision in SETTINGS
}
ENGINES: Mapping[Precision, Callable[[Work], Engines]] = {
    precision: partial(_engines, precision) for precision in SETTINGS
}
