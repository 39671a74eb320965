"""The KV cache: forking and truncating against computing anew, made-up and in ONNX Runtime."""

from __future__ import annotations

import fakes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualfocus.runtime import Bundle
from dualfocus.runtime.cache import KVCache

ROWS, CAPACITY = 3, 40
FAKE = fakes.make_bundle()


def embedded(bundle: Bundle, tokens: list[int]) -> np.ndarray:
    return np.array(bundle.embeddings[tokens])


def anew(bundle: Bundle, tokens: list[int]) -> np.ndarray:
    cache = KVCache(bundle.manifest.decoder, 1, CAPACITY)
    return bundle.decoder.extend(cache, 0, embedded(bundle, tokens), [len(tokens) - 1])


def run(bundle: Bundle, operations: list[tuple[str, int, int]], atol: float) -> None:
    """Extend, fork and truncate rows at random; every logit has to be that of its row computed anew."""
    cache = KVCache(bundle.manifest.decoder, ROWS, CAPACITY)
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    for i, (name, row, number) in enumerate(operations):
        if name == "fork":
            target = number % ROWS
            cache.fork(row, target)
            rows[target] = list(rows[row])
        elif name == "truncate":
            length = number % (len(rows[row]) + 1)
            cache.truncate(row, length)
            del rows[row][length:]
        elif len(rows[row]) + 1 + number % 4 <= CAPACITY:
            new = [(7 * i + 3 * k + number) % 200 for k in range(1 + number % 4)]
            rows[row] += new
            logits = bundle.decoder.extend(cache, row, embedded(bundle, new), [len(new) - 1])
            np.testing.assert_allclose(logits, anew(bundle, rows[row]), atol=atol)
        assert cache.lengths == [len(tokens) for tokens in rows]


operations = st.lists(
    st.tuples(
        st.sampled_from(["extend", "extend", "fork", "truncate"]),
        st.integers(0, ROWS - 1),
        st.integers(0, 99),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(operations)
def test_any_sequence_of_operations_equals_recomputation(operations):
    run(FAKE, operations, 1e-6)


def test_any_sequence_of_operations_equals_recomputation_in_onnx_runtime(tiny_bundle):
    bundle = Bundle.open(tiny_bundle, threads=1)

    @settings(max_examples=25, deadline=None)
    @given(operations)
    def check(operations):
        run(bundle, operations, 1e-4)

    check()


def test_onnx_runtime_writes_into_the_cache_and_only_where_it_should(tiny_bundle):
    bundle = Bundle.open(tiny_bundle, threads=1)
    cache = KVCache(bundle.manifest.decoder, ROWS, CAPACITY)
    for array in cache.keys + cache.values:
        array[:] = 99
    bundle.decoder.extend(cache, 1, embedded(bundle, [5, 6, 7]), [2])
    bundle.decoder.extend(cache, 1, embedded(bundle, [8]), [0])
    for array in cache.keys + cache.values:
        assert (array[1, :, :4] != 99).all()
        assert (array[[0, 2]] == 99).all()
    kept = [array[1, :, :2].copy() for array in cache.keys + cache.values]
    cache.truncate(1, 2)
    bundle.decoder.extend(cache, 1, embedded(bundle, [9, 10, 11]), [2])
    for array, before in zip(cache.keys + cache.values, kept, strict=True):
        np.testing.assert_array_equal(array[1, :, :2], before)


def test_logits_come_from_the_positions_asked_for(tiny_bundle):
    bundle = Bundle.open(tiny_bundle, threads=1)
    tokens = [5, 6, 7, 8, 9, 10]
    cache = KVCache(bundle.manifest.decoder, 1, CAPACITY)
    logits = bundle.decoder.extend(cache, 0, embedded(bundle, tokens), [0, 3, 5])
    assert logits.shape == (3, bundle.manifest.decoder.vocabulary)
    for got, length in zip(logits, (1, 4, 6), strict=True):
        np.testing.assert_allclose(got, anew(bundle, tokens[:length])[0], atol=1e-4)


def test_nbytes_is_what_the_formula_says():
    spec = FAKE.manifest.decoder
    cache = KVCache(spec, ROWS, CAPACITY)
    assert cache.nbytes == 2 * spec.layers * ROWS * spec.kv_heads * CAPACITY * spec.head_size * 4


def test_truncating_cannot_lengthen():
    cache = KVCache(FAKE.manifest.decoder, 1, CAPACITY)
    with pytest.raises(AssertionError):
        cache.truncate(0, 1)
