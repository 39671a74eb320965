"""The KV cache under any sequence of operations against computing anew, made-up and in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path

import fakes
import numpy as np
import pytest
import tiny as tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from dualfocus.bench import budget
from dualfocus.export import export_bundle
from dualfocus.runtime import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.sequence import common_prefix, embed

ROWS, CAPACITY = 4, 40
FAKE = fakes.make_bundle()


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, threads=1)


def embedded(bundle: Bundle, tokens: list[int]) -> Floats:
    return embed(tokens, bundle.embeddings, {})


def anew(bundle: Bundle, tokens: list[int], logits_at: list[int]) -> Floats:
    cache = KVCache(bundle.manifest.decoder, 1, CAPACITY)
    (logits,) = bundle.decoder.extend(cache, [0], [embedded(bundle, tokens)], [logits_at])
    return logits


# What to append to a row, and after which of it logits are wanted. Few tokens, so that prefixes are common.
appended = st.lists(st.integers(3, 6), min_size=1, max_size=5).flatmap(
    lambda new: st.tuples(st.just(new), st.sets(st.integers(0, len(new) - 1), min_size=1).map(sorted))
)
row = st.integers(0, ROWS - 1)
share = st.floats(0, 1)  # of what a row holds
operations = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.dictionaries(row, appended, min_size=1)),
        st.tuples(st.just("extend"), st.dictionaries(row, appended, min_size=2)),
        st.tuples(st.just("fork"), row, row, share, share),
        st.tuples(st.just("truncate"), row, share),
        st.tuples(st.just("clear"), row),
    ),
    max_size=25,
)


def check(bundle: Bundle, operations: list[tuple], atol: float) -> None:
    """Run `operations`; every logit has to be that of its row computed anew."""
    cache = KVCache(bundle.manifest.decoder, ROWS, CAPACITY)
    for array in cache.keys + cache.values:
        array[:] = 99  # what no row holds yet must not matter
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    for name, *of in operations:
        if name == "extend":
            new = {r: a for r, a in of[0].items() if len(rows[r]) + len(a[0]) <= CAPACITY}
            if not new:
                continue
            chunks = [embedded(bundle, tokens) for tokens, _ in new.values()]
            results = bundle.decoder.extend(cache, list(new), chunks, [at for _, at in new.values()])
            for (r, (tokens, at)), logits in zip(new.items(), results, strict=True):
                start = len(rows[r])
                rows[r] += tokens
                assert logits.shape == (len(at), bundle.manifest.decoder.vocabulary)
                expected = anew(bundle, rows[r], [start + i for i in at])
                np.testing.assert_allclose(logits, expected, atol=atol)
        elif name == "fork":
            source, target, *shares = of
            if source == target:
                continue
            length = round(shares[0] * len(rows[source]))
            kept = round(shares[1] * common_prefix(rows[source][:length], rows[target]))
            cache.fork(source, target, length, kept)
            rows[target] = rows[source][:length]
        elif name == "truncate":
            del rows[of[0]][round(of[1] * len(rows[of[0]])) :]
            cache.truncate(of[0], len(rows[of[0]]))
        else:
            cache.clear(of[0])
            rows[of[0]] = []
        assert cache.lengths == [len(tokens) for tokens in rows]
    for r, tokens in enumerate(rows):  # what was not extended last is right too
        if len(tokens) < CAPACITY:
            (logits,) = bundle.decoder.extend(cache, [r], [embedded(bundle, [3])], [[0]])
            np.testing.assert_allclose(logits, anew(bundle, [*tokens, 3], [len(tokens)]), atol=atol)


@settings(max_examples=150, deadline=None)
@given(operations)
def test_any_sequence_of_operations_equals_recomputation(operations):
    check(FAKE, operations, 1e-6)


@pytest.mark.parametrize("examples", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_any_sequence_of_operations_equals_recomputation_in_onnx_runtime(tiny, examples):
    settings(max_examples=examples, deadline=None)(given(operations)(lambda ops: check(tiny, ops, 1e-4)))()


def test_steps_over_idle_rows_change_none_of_them(tmp_path, monkeypatch):
    """Without ragged appends: one call of the graph for rows 0, 2 and 3, over row 1."""
    checkpoint = tiny_models.build(tmp_path / "checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle", ragged_append=False, progress=lambda _: None)
    bundle = Bundle.open(tmp_path / "bundle")
    settings(max_examples=20, deadline=None)(given(operations)(lambda ops: check(bundle, ops, 1e-4)))()
    cache = KVCache(bundle.manifest.decoder, ROWS, CAPACITY)
    texts = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
    for row, tokens in enumerate(texts):
        bundle.decoder.extend(cache, [row], [embedded(bundle, tokens)], [[]])
    runs = []
    run = bundle.decoder._compute
    monkeypatch.setattr(bundle.decoder, "_compute", lambda *of: runs.append(of) or run(*of))
    found = bundle.decoder.extend(cache, [0, 2, 3], [embedded(bundle, [20])] * 3, [[0]] * 3)
    assert len(runs) == 1
    assert cache.lengths == [4, 2, 2, 5]
    found.insert(1, *bundle.decoder.extend(cache, [1], [embedded(bundle, [20])], [[0]]))
    for tokens, logits in zip(texts, found, strict=True):
        np.testing.assert_allclose(logits, anew(bundle, [*tokens, 20], [len(tokens)]), atol=1e-4)


def test_rows_of_any_lengths_grow_together_and_no_others(tiny):
    """One call over rows 3 and 1, of unequal lengths; 0 is empty, 2 is not, and both stay as they are."""
    cache = KVCache(tiny.manifest.decoder, ROWS, CAPACITY)
    for array in cache.keys + cache.values:
        array[:] = 99
    tiny.decoder.extend(cache, [2], [embedded(tiny, [5, 6])], [[0]])
    tiny.decoder.extend(cache, [1], [embedded(tiny, [7, 8, 9])], [[0]])
    before = [array.copy() for array in cache.keys + cache.values]
    chunks = [[10, 11, 12, 13], [14]]
    far, near = tiny.decoder.extend(cache, [3, 1], [embedded(tiny, c) for c in chunks], [[1, 3], [0]])
    np.testing.assert_allclose(far, anew(tiny, chunks[0], [1, 3]), atol=1e-4)
    np.testing.assert_allclose(near, anew(tiny, [7, 8, 9, 14], [3]), atol=1e-4)
    assert cache.lengths == [0, 4, 2, 4]
    for array, old in zip(cache.keys + cache.values, before, strict=True):
        assert (array[3, :, :4] != 99).all()
        assert (array[1, :, 3] != 99).all()
        np.testing.assert_array_equal(array[[0, 2]], old[[0, 2]])
        np.testing.assert_array_equal(array[1, :, :3], old[1, :, :3])


def test_a_row_may_grow_to_its_last_place_beside_one_that_grows_by_more(tiny):
    cache = KVCache(tiny.manifest.decoder, 2, CAPACITY)
    full = [5 + i for i in range(CAPACITY)]
    tiny.decoder.extend(cache, [0], [embedded(tiny, full[:-1])], [[0]])
    chunks = [embedded(tiny, full[-1:]), embedded(tiny, [7, 8, 9])]
    last, other = tiny.decoder.extend(cache, [0, 1], chunks, [[0], [2]])
    np.testing.assert_allclose(last, anew(tiny, full, [CAPACITY - 1]), atol=1e-4)
    np.testing.assert_allclose(other, anew(tiny, [7, 8, 9], [2]), atol=1e-4)


def test_a_row_may_want_no_logits(tiny):
    for bundle in (FAKE, tiny):
        cache = KVCache(bundle.manifest.decoder, 2, CAPACITY)
        chunks = [embedded(bundle, [5, 6]), embedded(bundle, [7])]
        none, one = bundle.decoder.extend(cache, [0, 1], chunks, [[], [0]])
        assert none.shape == (0, bundle.manifest.decoder.vocabulary)
        np.testing.assert_allclose(one, anew(bundle, [7], [0]), atol=1e-4)


def test_nbytes_is_what_the_formula_says():
    spec = FAKE.manifest.decoder
    cache = KVCache(spec, ROWS, CAPACITY)
    assert cache.nbytes == 2 * spec.layers * ROWS * spec.kv_heads * CAPACITY * spec.head_size * 4


def test_no_operation_reaches_beyond_what_a_row_holds():
    cache = KVCache(FAKE.manifest.decoder, 2, CAPACITY)
    FAKE.decoder.extend(cache, [0], [embedded(FAKE, [5, 6])], [[0]])
    for beyond in (
        lambda: cache.truncate(0, 3),
        lambda: cache.fork(0, 1, 3),
        lambda: cache.fork(0, 1, 2, kept=1),
    ):
        with pytest.raises(AssertionError):
            beyond()
    assert cache.lengths == [2, 0]


def test_a_stale_entry_is_noticed():
    """The made-up decoder is worth something: one wrong entry in a row changes what that row says."""
    tokens = [5, 6, 7, 8, 9]
    logits = []
    for stale in (None, 2):
        cache = KVCache(FAKE.manifest.decoder, 2, 16)
        chunks = [embedded(FAKE, tokens[:4])] * 2
        FAKE.decoder.extend(cache, [0, 1], chunks, [[3], [3]])
        if stale is not None:
            cache.keys[0][1, 0, stale] += 1e-2
        logits.append(FAKE.decoder.extend(cache, [0, 1], [embedded(FAKE, tokens[4:])] * 2, [[0], [0]]))
    (good, good_too), (untouched, spoilt) = logits
    np.testing.assert_array_equal(good, good_too)
    np.testing.assert_array_equal(good, untouched)
    assert np.abs(good - spoilt).max() > 1e-3


@pytest.mark.skipif(not budget.STATUS.exists(), reason="only Linux tells")
def test_memory_is_taken_as_tokens_arrive() -> None:
    """Not a huge page for each head: a token of each of 32 heads is 4 MB of those, and 16 KB."""
    spec = dataclasses.replace(FAKE.manifest.decoder, layers=4, kv_heads=32, head_size=128)
    before = budget.private()
    cache = KVCache(spec, 2, 4096)
    for array in cache.keys + cache.values:
        array[0, :, :3] = 1
    taken = budget.private() - before
    pages = 2 * spec.layers * spec.kv_heads * mmap.PAGESIZE
    assert cache.nbytes > 1_000_000_000
    assert taken < 2 * pages + 8_000_000


@pytest.mark.skipif(not budget.STATUS.exists(), reason="only Linux tells")
def test_a_cleared_row_gives_its_memory_back() -> None:
    spec = dataclasses.replace(FAKE.manifest.decoder, layers=2, kv_heads=4, head_size=128)
    cache = KVCache(spec, 3, 4096)
    before = budget.private()
    for array in cache.keys + cache.values:
        array[:2] = 1
    row = cache.nbytes // 3
    assert budget.private() - before > 1.9 * row
    cache.lengths[0] = cache.lengths[1] = 4096
    cache.clear(0)
    assert cache.lengths == [0, 4096, 0]
    assert budget.private() - before < 1.1 * row
    for array in cache.keys + cache.values:
        assert (array[1] == 1).all()
