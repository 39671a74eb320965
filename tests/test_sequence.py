"""Rows that know their tokens: whatever they went through, what they say is what computing anew says."""

from __future__ import annotations

import math
from pathlib import Path

import fakes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualfocus.runtime import Bundle
from dualfocus.runtime.cache import KVCache
from dualfocus.runtime.embeddings import HostEmbeddings
from dualfocus.runtime.engines import Floats
from dualfocus.runtime.sequence import (
    CachedSequence,
    Extension,
    common_prefix,
    embed,
    extend,
    log_softmax,
)
from dualfocus.runtime.turns import ImageToken, Token

ROWS, CAPACITY, IMAGE_TOKENS = 3, 64, 3
FAKE = fakes.make_bundle()


class Rows:
    """A few sequences on one cache of `bundle`, and two images of random tokens."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        spec = bundle.manifest.decoder
        self.cache = KVCache(spec, ROWS, CAPACITY)
        for array in self.cache.keys + self.cache.values:
            array[:] = 99  # what no row holds yet must not matter
        self.sequences = [CachedSequence(self.cache, row) for row in range(ROWS)]
        rng = np.random.default_rng(5)
        images = rng.standard_normal((2, IMAGE_TOKENS, spec.hidden)).astype(np.float32)
        self.features = {"a": images[0], "b": images[1]}

    def extend(self, *extensions: Extension) -> None:
        decoder, embeddings = self.bundle.decoder, self.bundle.embeddings
        if new := [extension for extension in extensions if extension.tokens]:
            extend(decoder, self.cache, embeddings, self.features, new)

    def anew(self, tokens: list[Token]) -> Floats:
        """(L, vocabulary) logits of what follows each of `tokens`."""
        cache = KVCache(self.bundle.manifest.decoder, 1, CAPACITY)
        embeddings = embed(tokens, self.bundle.embeddings, self.features)
        (logits,) = self.bundle.decoder.extend(cache, [0], [embeddings], [range(len(tokens))])
        return logits

    def check(self, sequence: CachedSequence, tokens: list[Token], after: list[int], atol: float) -> None:
        """`sequence` holds `tokens`, and knows at least what follows the positions `after`."""
        assert sequence.tokens == tokens
        if not tokens:
            return
        expected = self.anew(tokens)
        for at in range(len(tokens)):
            logits = sequence.logits(at)
            assert logits is not None or at not in after
            if logits is not None:
                np.testing.assert_allclose(logits, expected[at], atol=atol)

    def check_recall(self, sequence: CachedSequence, tokens: list[Token], atol: float) -> None:
        """What `sequence` says of any `tokens` is right, as far as it says something."""
        found = sequence.recall(tokens, range(len(tokens)))
        known = [at for at, logprob in enumerate(found) if logprob is not None]
        expected = self.anew(tokens) if known else None
        for at in known:
            token = tokens[at]
            assert expected is not None
            assert isinstance(token, int)
            assert found[at] == pytest.approx(log_softmax(expected[at - 1], token), abs=atol)


def spread(token: int | str) -> list[Token]:
    """An image's name stands for its tokens."""
    return [token] if isinstance(token, int) else [ImageToken(token, i) for i in range(IMAGE_TOKENS)]


# few tokens, so that prefixes are common; positions are shares of what there is
tokens = st.lists(st.sampled_from([3, 4, 5, "a", "b"]), min_size=1, max_size=8).map(
    lambda run: [token for name in run for token in spread(name)]
)
row = st.integers(0, ROWS - 1)
share = st.floats(0, 1)
target = st.tuples(tokens, st.lists(share, max_size=3))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("to"), st.dictionaries(row, target, min_size=1)),
        st.tuples(st.just("go on"), row, tokens),
        st.tuples(st.just("fork"), row, row, share),
        st.tuples(st.just("cut"), row, share),
        st.tuples(st.just("forget"), row),
        st.tuples(st.just("clear"), row),
    ),
    max_size=20,
)


def check(bundle: Bundle, operations: list[tuple], asked: list[list[Token]], atol: float) -> None:
    rows = Rows(bundle)
    held: list[list[Token]] = [[] for _ in range(ROWS)]
    past: list[list[Token]] = []
    for name, *of in operations:
        past = [*past[-ROWS:], *(run for run in held if run)]
        after: dict[int, list[int]] = {}
        if name == "to":
            extensions = []
            for r, (new, shares) in of[0].items():
                held[r] = list(new)
                after[r] = sorted({len(new) - 1, *(round(s * (len(new) - 1)) for s in shares)})
                extensions.append(Extension.to(rows.sequences[r], new, after[r]))
            rows.extend(*extensions)
        elif name == "go on":
            r, new = of
            if len(held[r]) + len(new) <= CAPACITY:
                start = len(held[r])
                held[r] = held[r] + new
                after[r] = list(range(start, start + len(new)))
                rows.extend(Extension(rows.sequences[r], new, after[r]))
        elif name == "fork":
            source, r, part = of
            if source != r:
                held[r] = held[source][: round(part * len(held[source]))]
                rows.sequences[r].fork_from(rows.sequences[source], len(held[r]))
        elif name == "cut":
            r, part = of
            held[r] = held[r][: round(part * len(held[r]))]
            rows.sequences[r].cut(len(held[r]))
        elif name == "forget":
            rows.sequences[of[0]].forget()
        else:
            rows.sequences[of[0]].clear()
            held[of[0]] = []
        for r, sequence in enumerate(rows.sequences):
            rows.check(sequence, held[r], after.get(r, []), atol)
            # another row's tokens, and what once stood somewhere behind what stands here now
            behind = [held[r] + run[len(held[r]) :] for run in past]
            for run in (*asked, held[r - 1], *behind):
                rows.check_recall(sequence, run, atol)


@settings(max_examples=100, deadline=None)
@given(operations, st.lists(tokens, max_size=2))
def test_any_sequence_of_operations_equals_recomputation(operations, asked):
    check(FAKE, operations, asked, 1e-5)


@pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_any_sequence_of_operations_equals_recomputation_in_onnx_runtime(tiny_bundle: Path, examples: int):
    bundle = Bundle.open(tiny_bundle, threads=1)

    @settings(max_examples=examples, deadline=None)
    @given(operations, st.lists(tokens, max_size=2))
    def run(operations, asked):
        check(bundle, operations, asked, 2e-4)

    run()


def test_what_was_cut_off_is_remembered_as_long_as_its_beginning_stands():
    rows = Rows(FAKE)
    sequence = rows.sequences[0]
    rows.extend(Extension.to(sequence, [3, 4, 5, 6, 7], range(5)))
    known = sequence.recall([3, 4, 5, 6, 7], [3, 4])
    expected = rows.anew([3, 4, 5, 6, 7])
    assert known == pytest.approx([log_softmax(expected[2], 6), log_softmax(expected[3], 7)], abs=1e-6)
    rows.extend(Extension.to(sequence, [3, 4, 8], [2]))
    assert sequence.recall([3, 4, 5, 6, 7], [3, 4]) == known
    sequence.cut(2)
    assert sequence.recall([3, 4, 5, 6, 7], [3, 4]) == known
    rows.extend(Extension.to(sequence, [3, 9], [1]))  # what the branch began with is another
    assert sequence.recall([3, 4, 5, 6, 7], [3, 4]) == [None] * 2
    assert sequence.recall([3, 9, 5, 6, 7], [3, 4]) == [None] * 2
    sequence.forget()
    assert sequence.recall([3, 4, 5, 6, 7], [2, 3, 4]) == [None] * 3


def test_only_what_is_new_is_computed():
    rows = Rows(fakes.make_bundle())
    decoder = rows.bundle.decoder
    sequence, other = rows.sequences[:2]
    rows.extend(Extension.to(sequence, [3, *spread("a"), 4, 5], [5]))
    assert decoder.tokens == 6
    rows.extend(Extension.to(sequence, [3, *spread("a"), 6], [4]))
    assert decoder.tokens == 7
    rows.extend(Extension.to(sequence, [3, *spread("a"), 6], [4]))  # known: nothing to do
    assert decoder.tokens == 7
    rows.extend(Extension.to(sequence, [3, *spread("a"), 6], [2, 4]))  # logits behind a token that is held
    assert decoder.tokens == 7 + 3
    other.fork_from(sequence, 4)
    rows.extend(Extension.to(other, [3, *spread("a"), 7], [4]))
    assert decoder.tokens == 7 + 3 + 1
    other.clear()
    rows.extend(Extension.to(other, [3, *spread("a"), 8], [4]))
    assert decoder.tokens == 7 + 3 + 1 + 5
    assert decoder.calls == 5


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("then", ["extend", "go on", "fork to", "fork from", "clear"])
def test_an_interrupted_prefill_leaves_nothing_stale(late: bool, then: str):
    rows = Rows(fakes.make_bundle())
    spoilt, other = rows.sequences[:2]
    rows.extend(Extension.to(spoilt, [3, 4, 5, 6], [3]), Extension.to(other, [3, 9, 9, 9, 9, 9, 9, 9], [7]))
    with fakes.interrupted(rows.bundle.decoder, 0, late=late):
        rows.extend(Extension.to(spoilt, [3, 4, 7, 7, 7], [4]))
    if then == "go on":
        rows.extend(Extension(spoilt, [8], [2]))
        rows.check(spoilt, [3, 4, 8], [2], 1e-6)
    elif then == "fork to":
        spoilt.fork_from(other, 4)
    elif then == "fork from":
        other.fork_from(spoilt, 2)
        spoilt, other = other, spoilt
    elif then == "clear":
        spoilt.clear()
    for new in ([3, 4, 8], [3, 9, 9, 8]):
        rows.extend(Extension.to(spoilt, new, range(len(new))))
        rows.check(spoilt, new, list(range(len(new))), 1e-6)


def test_an_extension_in_parts_is_the_whole() -> None:
    prompt = [3, *spread("a"), 4, 5, 6]
    for held in (0, 1, 3):
        for length in range(len(prompt) - held + 1):
            rows = Rows(FAKE)
            sequence, other = rows.sequences[:2]
            if held:
                rows.extend(Extension.to(sequence, prompt[:held], []), Extension.to(other, prompt[:held], []))
            after = [at for at in (1, 4, 5, 6) if at >= held]
            whole = Extension.to(sequence, prompt, after)
            assert [whole.prefix(prompt), whole.prefix([3, 9]), whole.prefix([])] == [len(prompt), 1, 0]
            assert whole.prefix([*prompt[:-1], 9]) == len(prompt) - 1
            parts = whole.split(length)
            assert [len(part.tokens) for part in parts] == [length, len(whole.tokens) - length]
            rows.extend(*[part for part in parts[:1] if part.tokens])
            rows.extend(*[part for part in parts[1:] if part.tokens])
            rows.check(sequence, prompt, after, 1e-6)


def test_image_tokens_are_equal_if_image_and_position_are():
    assert common_prefix([3, *spread("a"), 4], [3, *spread("a"), 5]) == 4
    assert common_prefix([3, *spread("a")], [3, *spread("b")]) == 1
    assert common_prefix([3, ImageToken("a", 0)], [3, ImageToken("a", 1)]) == 1
    assert common_prefix([], [3]) == 0


def test_tokens_are_embedded_by_the_table_and_image_tokens_by_their_image():
    table = np.arange(10, dtype=np.float32)[:, None] + np.zeros((1, 2), np.float32)
    features = {"a": table[:3] + 100, "b": table[:3] + 200}
    embedded = embed([7, *spread("b"), 0, ImageToken("a", 2)], HostEmbeddings(table), features)
    assert embedded.tolist() == [[n, n] for n in (7, 200, 201, 202, 0, 102)]
    assert embedded.dtype == np.float32


def test_log_softmax_is_taken_in_float64():
    logits = np.array([1000, 1000, -1000], np.float32)
    assert log_softmax(logits, 0) == pytest.approx(-math.log(2), abs=1e-12)
    assert log_softmax(logits, 2) == pytest.approx(-2000 - math.log(2), abs=1e-9)
