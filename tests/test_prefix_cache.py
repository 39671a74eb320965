"""Slots and images: the most of a prompt, never above the bytes, least recently used first, safe names."""

from __future__ import annotations

import fakes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.prefix_cache import PrefixCache, image_name
from dualfocus.runtime.sequence import CachedSequence, Extension, common_prefix, extend
from dualfocus.runtime.turns import ImageToken, Token

FAKE = fakes.make_bundle()
CAPACITY = 40
TOKEN = 2 * fakes.WIDTH * 4  # bytes: a key and a value of float32
IMAGES = {name: np.full((3, fakes.WIDTH), at, np.float32) for at, name in enumerate("abcdef")}
IMAGE = 3 * fakes.WIDTH * 4  # bytes


def spread(name: str) -> list[Token]:
    return [ImageToken(name, at) for at in range(3)]


class Slots:
    """A prefix cache whose slots are filled as the engine does it."""

    def __init__(self, slots: int, limit: int = 1 << 30) -> None:
        self.kv = KVCache(FAKE.manifest.decoder, slots, CAPACITY)
        self.cache = PrefixCache(self.kv, limit)

    def take(self, tokens: list[Token], owner: object, *coming: Extension) -> CachedSequence | None:
        """A slot that holds `tokens`."""
        slot = self.cache.acquire(tokens, owner, coming)
        if slot is not None:
            extension = Extension.to(slot, tokens, [len(tokens) - 1])
            if extension.tokens:
                extend(FAKE.decoder, self.kv, FAKE.embeddings, IMAGES, [extension])
        return slot

    def use(self, tokens: list[Token]) -> CachedSequence:
        """Take a slot for a request of its own, and give it back."""
        owner = object()
        slot = self.take(tokens, owner)
        assert slot is not None
        self.cache.release(slot)
        self.cache.end(owner)
        return slot


def held(cache: PrefixCache) -> int:
    """Bytes that free slots and images hold, counted otherwise."""
    images = sum(name in cache._kept for name in IMAGES)
    return sum(len(slot.tokens) for slot in cache.free) * TOKEN + images * IMAGE


prompts = st.lists(st.sampled_from([3, 4, 5, "a", "b"]), min_size=1, max_size=6).map(
    lambda run: [token for one in run for token in ([one] if isinstance(one, int) else spread(one))]
)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([0, TOKEN, 10 * TOKEN, 2 * IMAGE + 5 * TOKEN, 1 << 30]),
    st.lists(st.tuples(st.sampled_from(["take", "take", "release", "end", "image"]), prompts), max_size=20),
)
def test_a_slot_holds_what_its_tokens_say_and_the_bound_holds(slots, limit, operations):
    of = Slots(slots, limit)
    taken: list[tuple[CachedSequence, object]] = []
    for name, tokens in operations:
        if name == "take":
            most = max(common_prefix(slot.tokens, tokens) for slot in of.cache.slots)
            owner = object()
            free = len(of.cache.free)
            slot = of.cache.acquire(tokens, owner, ())
            assert (slot is None) == (free == 0)
            if slot is not None:
                assert common_prefix(slot.tokens, tokens) == most
                extension = Extension.to(slot, tokens, [len(tokens) - 1])
                if extension.tokens:
                    extend(FAKE.decoder, of.kv, FAKE.embeddings, IMAGES, [extension])
                fresh = Slots(1).take(tokens, object())
                np.testing.assert_allclose(
                    slot.logits(len(tokens) - 1), fresh.logits(len(tokens) - 1), atol=1e-5
                )
                taken.append((slot, owner))
        elif name == "image":
            image = next((token.image for token in tokens if not isinstance(token, int)), "c")
            of.cache.keep_image(image, IMAGES[image])
        elif taken:
            slot, owner = taken.pop(0)
            of.cache.release(slot)
            of.cache.end(owner)
            assert held(of.cache) <= limit
        assert of.cache.nbytes <= limit
        assert len(of.cache.free) == slots - len(taken)
        assert of.kv.lengths == [len(slot.tokens) for slot in of.cache.slots]


def test_the_least_recently_used_goes_first():
    of = Slots(3, limit=9 * TOKEN + IMAGE)
    of.use([3, 3, 3, 3])
    of.use([4, 4, 4, 4])
    of.cache.keep_image("a", IMAGES["a"])
    of.use([5, 5])  # a token too many
    assert sorted(slot.tokens for slot in of.cache.free) == [[], [4, 4, 4, 4], [5, 5]]
    of.use([4, 4, 4, 4])  # used again
    of.use([6, 6, 6, 6])
    assert of.cache.image("a") is None
    assert sorted(slot.tokens for slot in of.cache.free) == [[4, 4, 4, 4], [5, 5], [6, 6, 6, 6]]


def test_an_image_too_large_displaces_none():
    of = Slots(1, limit=2 * IMAGE)
    of.cache.keep_image("a", IMAGES["a"])
    of.cache.keep_image("b", np.zeros((7, fakes.WIDTH), np.float32))
    assert of.cache.image("a") is not None
    assert of.cache.image("b") is None


def test_a_slot_that_shows_a_picture_is_copied_for_another_one():
    """A few tokens in common are not worth the picture."""
    of = Slots(2)
    first = of.use([3, *spread("a"), 4])
    second = of.use([3, *spread("b"), 4])
    assert second is not first
    assert of.use([3, *spread("a"), 5]) is first  # another question about it goes in place


def test_what_a_live_request_used_is_not_taken_while_another_is_free():
    of = Slots(3)
    owner = object()
    mine = of.take([3, *spread("a"), 4], owner)
    of.cache.release(mine)
    other = of.take([3, *spread("a"), 5], object())
    assert other is not mine
    assert mine.tokens == [3, *spread("a"), 4]
    assert of.take([3, *spread("a"), 4, 6], owner) is mine


def test_a_prompt_waits_for_one_that_will_hold_more_of_it():
    of = Slots(2)
    slot = of.cache.acquire([3, *spread("a"), 4], object(), ())
    coming = Extension.to(slot, [3, *spread("a"), 4], [4])
    assert of.cache.acquire([3, *spread("a"), 5], object(), [coming]) is None
    assert of.cache.acquire([5, 6], object(), [coming]) is not None


def test_slots_in_use_are_neighbours():
    of = Slots(6)
    rows = [of.use([at + 3]).row for at in range(6)]
    for at in (0, 3, 1, 4, 2, 5):  # used again in an order in which neighbours are not the oldest
        assert of.use([at + 3]).row == rows[at]
    first, second = of.take([20, 21], object()), of.take([22, 23], object())
    assert abs(first.row - second.row) == 1


def test_after_clearing_every_slot_is_free_and_empty():
    of = Slots(3)
    of.take([3, 4], object())
    of.use([5, 6])
    of.cache.clear()
    assert [slot.tokens for slot in of.cache.free] == [[], [], []]
    assert of.kv.lengths == [0, 0, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50 * 70 * 3 - 1), st.integers(1, 255))
def test_one_changed_byte_is_another_picture(at, by):
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    changed = picture.copy()
    changed.flat[at] ^= np.uint8(by)
    assert image_name(picture, "model") != image_name(changed, "model")
    assert image_name(picture, "model") == image_name(picture.copy(), "model")


def test_shape_and_model_are_part_of_a_pictures_name(picture):
    assert image_name(picture, "a") != image_name(picture, "b")
    assert image_name(picture, "a") != image_name(picture.reshape(320, 240, 3), "a")
    assert image_name(picture[:, ::-1], "a") != image_name(picture, "a")
    assert image_name(picture[:, ::2], "a") == image_name(picture[:, ::2].copy(), "a")


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 1, 3)])
def test_a_picture_of_few_bytes_has_a_name(shape):
    assert len(image_name(np.zeros(shape, np.uint8), "")) == 64
