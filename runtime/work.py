"""What a protocol asks for: images to encode, replies to generate, replies to score.

A protocol is a generator. It yields a list of work, is sent the list of its results, and returns what the
request is answered with. An item of the list may be another such generator: it runs with the other items,
and what it returns is its result. A protocol knows nothing of slots, batches, caches, devices or other
requests. `engine` and `reference` execute protocols; `protocol` is DualFocus, `zooms` another one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dualfocus.runtime.geometry import Crop, Region
from dualfocus.runtime.grammar import Grammar
from dualfocus.runtime.image import Picture
from dualfocus.runtime.manifest import Manifest
from dualfocus.runtime.result import ReplyName
from dualfocus.runtime.turns import Prompt, Turns


@dataclass(frozen=True)
class Encode:
    """Encode a crop of the picture, which prompts then show as `Task.image(crop)`. Result: None."""

    crop: Crop


@dataclass(frozen=True)
class Generate:
    """Decode a reply greedily, within `grammar` if there is one. Result: its `Generation`.

    `draft` is what the reply may turn out to be: it changes what is computed, never the reply.
    """

    reply: ReplyName
    prompt: Prompt
    grammar: Grammar | None = None
    draft: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """Score a prompt's replies. Result: the log-probabilities of the earlier ones, and of the last one."""

    prompt: Prompt


R = TypeVar("R", covariant=True)
# A `Region` is passed to the follower of the request. Result: None.
Steps = Generator[Sequence["Encode | Generate | Score | Region | Steps[Any]"], list[Any], R]


def crop_name(picture_name: str, crop: Crop) -> str:
    """The name of a crop of a picture."""
    return f"{picture_name} {crop}"


@dataclass(frozen=True)
class Task:
    """What a protocol is given: a question about a picture, and what the model says of itself."""

    manifest: Manifest
    turns: Turns
    grammar: Grammar | None  # of the model's boxes, if it has one
    picture: Picture
    picture_name: str  # `prefix_cache.image_name`

    def image(self, crop: Crop) -> str:
        """How prompts name a crop. No two crops of any pictures share a name: caches rely on it."""
        return crop_name(self.picture_name, crop)


Protocol = Callable[[Task], Steps[Any]]
