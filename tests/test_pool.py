"""The image pool: never above its bytes, least recently used first, and names that nothing else shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualfocus.runtime.cache import Snapshot
from dualfocus.runtime.pool import EncodedImage, ImagePool, image_name
from dualfocus.runtime.sequence import Prefix


def image(nbytes: int, prefix: int = 0) -> EncodedImage:
    """An image of `nbytes` and, if any, a prefix of `prefix` bytes; of multiples of 4."""
    features = np.zeros((1, nbytes // 4), np.float32)
    entries = np.zeros((1, 1, prefix // 4), np.float32)
    return EncodedImage(features, Prefix((3,), Snapshot((entries,))) if prefix else None)


operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "get"]),
        st.sampled_from("abcdef"),
        st.sampled_from([0, 4, 40, 80, 120, 404]),
        st.sampled_from([0, 0, 20, 60]),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([0, 4, 100, 200]), operations)
def test_the_bound_holds_and_the_least_recently_used_go_first(limit, operations):
    pool = ImagePool(limit)
    expected: dict[str, EncodedImage] = {}  # least recently used first
    for name, key, nbytes, prefix in operations:
        if name == "get":
            found = pool.get(key)
            assert found is expected.get(key)
            if found is not None:
                expected[key] = expected.pop(key)
            continue
        new = image(nbytes, prefix)
        assert new.nbytes == nbytes + prefix
        pool.put(key, new)
        if new.nbytes <= limit:
            expected.pop(key, None)
            expected[key] = new
            while sum(kept.nbytes for kept in expected.values()) > limit:
                expected.pop(next(iter(expected)))
        assert pool.nbytes == sum(kept.nbytes for kept in expected.values()) <= limit
    assert all(pool.get(key) is kept for key, kept in list(expected.items()))


def test_an_image_too_large_displaces_none():
    pool = ImagePool(100)
    pool.put("a", image(40))
    pool.put("b", image(40))
    pool.put("c", image(104))
    assert pool.get("a")
    assert pool.get("b")
    pool.put("a", image(40, prefix=64))
    assert pool.get("a").prefix is None  # what was kept without a prefix stays
    assert pool.get("b")


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
