"""What a peer is: another runtime on the same weights, and what all of them are asked to do.

A peer's module has three things: ``REQUIRES``, the packages whose versions name it; ``prepare``, which
writes its model files, untimed; and ``PRECISIONS``, which says how to open it. Each opened peer lives in a
process of its own (`dualfocus.bench.peers`), so that no library's threads or memory are in another's way.

A module may also have ``ENGINES``: by precision a call ``(Work) -> Engines`` that gives the peer's decoder,
and its vision encoder if that can be had, behind this runtime's interfaces. With them its quality is measured
(`bench.peers.quality`). Such a decoder is only ever given row 0 of a `KVCache` of one row, which grows from
empty and is never cut or copied; it need not write its keys and values there, but has to count the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from dualfocus.runtime.engines import Floats, HostDecoder, VisionEncoder
from dualfocus.runtime.geometry import Crop
from dualfocus.runtime.image import Picture

Precision = Literal["fp32", "bf16", "int8", "int4"]
Part = Literal[
    "vision", "prefill", "decode", "decode, two rows", "question as shipped", "question with reuse"
]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PARTS: tuple[Part, ...] = get_args(Part)

PREFILL = 640  # tokens prefilled into an empty cache, logits of the last alone
PAST = 650  # tokens before the decoded ones
STEPS = 32  # tokens decoded one after the other, on each row


@dataclass(frozen=True)
class Slot:
    """Where a token of an image stands in a prompt: the `position`-th of `image` 0 (whole) or 1 (crop)."""

    image: int
    position: int


@dataclass(frozen=True)
class Call:
    """One call of the plain protocol: a prompt, and the reply that is decoded after it, or scored.

    Replies are given, so that every peer decodes as many tokens as the others, whatever its weights say: a
    step is computed, its argmax taken, and then the reply's token is what goes on.
    """

    prompt: tuple[int | Slot, ...]
    messages: tuple[Mapping[str, str], ...]  # the same as a chat; "<image>" marks an image, whole first
    reply: tuple[int, ...]  # its end token included
    scored: bool  # the reply's log-probabilities are wanted; nothing is decoded


@dataclass(frozen=True)
class Work:
    """What every peer is asked to do, the same for all."""

    folder: Path  # each peer's `prepare` has a folder of its own in it, called after the peer's module
    threads: int
    tokens: tuple[int, ...]  # PAST + STEPS tokens of random text; prefill takes the first PREFILL
    picture: Picture
    crop: Crop  # what the micro pass looks at
    pixels: Floats  # (2, 3, S, S): the whole picture and the crop, as the model takes them
    calls: tuple[Call, ...]  # macro, locate, micro, and a scored call for each candidate
    question: str  # what the calls ask, its hint included


@dataclass
class Counts:
    """What one part came to, by the peer's own counters where it has some."""

    vision_encodes: int = 0
    tokens_prefilled: int = 0
    decode_steps: int = 0
    source: str = "counted by the driver"  # or the name of the library's own counters


@dataclass(frozen=True)
class Opened:
    """A peer ready to work. A part that it cannot do is in `cannot`, with a reason in a few words."""

    form: str  # what the precision is called there: "Q8_0", "int4, block 32"
    parts: Mapping[Part, Callable[[], Counts]]  # done once per call, and what was done
    before: Mapping[Part, Callable[[], object]] = field(default_factory=dict)  # untimed, before every call
    cannot: Mapping[Part, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Engines:
    """A peer's computations behind this runtime's interfaces."""

    decoder: HostDecoder
    vision: VisionEncoder | None = None  # None: it cannot be had apart


class Peer(Protocol):
    """What a peer's module looks like."""

    REQUIRES: tuple[str, ...]
    PRECISIONS: Mapping[Precision, Callable[[Work], Opened]]

    def prepare(self, checkpoint: Any, folder: Path) -> None:
        """Write whatever files are not there yet into `folder`, which is there.

        `checkpoint` is an `export.checkpoint.Checkpoint` in float32, which must not be changed.
        """
