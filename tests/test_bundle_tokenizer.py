"""A bundle's tokenizer reaches the library only in forms that cannot make it abort, panic or hang."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from dualfocus.runtime.bundle import BUILT_IN
from dualfocus.runtime.errors import BundleError
from dualfocus.runtime.tokenizer import open_tokenizer, parse

RAW: dict[str, Any] = json.loads((BUILT_IN / "tokenizer.json").read_bytes())
ROWS = 635
TEXTS = [
    "",
    "What is it? [0.12, 0.34]</s>",
    " a  b\n\n",
    "中文 👍🏽",
    "USER: <image>\nx ASSISTANT:",
    "a" * 2000,
]


def opened(raw: Any, rows: int = ROWS) -> Tokenizer:
    return parse(json.dumps(raw).encode(), rows, BundleError, "the file")


def refused(raw: Any, rows: int = ROWS) -> str:
    with pytest.raises(BundleError) as caught:
        opened(raw, rows)
    sentence = str(caught.value)
    assert sentence.startswith("the file")
    assert "\n" not in sentence
    assert len(sentence) < 400
    return sentence


def test_the_built_in_model_reads_as_the_library_reads_it() -> None:
    theirs = Tokenizer.from_file(str(BUILT_IN / "tokenizer.json"))
    ours = open_tokenizer(BUILT_IN / "tokenizer.json", ROWS)
    for text in TEXTS:
        one, two = (of.encode(text, add_special_tokens=False) for of in (ours, theirs))
        assert one.ids == two.ids
        assert one.offsets == two.offsets
        assert ours.decode(one.ids, skip_special_tokens=False) == theirs.decode(
            two.ids, skip_special_tokens=False
        )


FIXED: dict[str, Any] = {
    "strategy": {"Fixed": 10**9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": FIXED},
        {"padding": {"nonsense": 1}},
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 9}},
        {"post_processor": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 10**9]}},
        {"post_processor": "nonsense"},
    ],
    ids=str,
)
def test_what_no_bundle_uses_is_left_out(changes: dict[str, Any]) -> None:
    theirs, ours = Tokenizer.from_file(str(BUILT_IN / "tokenizer.json")), opened(RAW | changes)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False).ids


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(part: dict[str, Any], times: int) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [part] * times}


def model(**changes: Any) -> dict[str, Any]:
    return {"model": RAW["model"] | changes}


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": ""}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
METASPACE = {"type": "Metaspace", "prepend_scheme": "always", "split": True}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
ADDED = RAW["added_tokens"][0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"normalizer": replace("b" * 17, String="a")}, "normalizer.content: expected `str` of length <= 16"),
        ({"normalizer": sequence(replace("aaaa", String="a"), 4)}, "replacements make 256 characters of one"),
        ({"normalizer": sequence(sequence(replace("aaaa", Regex="a"), 2), 2)}, "make 625 characters of one"),
        ({"normalizer": replace("b", String="")}, "normalizer.pattern.String: expected `str` of length >= 1"),
        ({"normalizer": replace("b", String="a", Regex="a")}, "a pattern needs one of String and Regex"),
        ({"normalizer": replace("b")}, "a pattern needs one of String and Regex"),
        ({"normalizer": replace("b", Regex="(a+)+$")}, "the expression '(a+)+$' is none that is known"),
        ({"normalizer": sequence({"type": "NFC"}, 17)}, "normalizers: expected `array` of length <= 16"),
        ({"normalizer": CHARSMAP}, "normalizer.type: invalid value 'Precompiled', expected one of NFC"),
        ({"normalizer": {"type": "BertNormalizer"}}, "normalizer.type: invalid value 'BertNormalizer'"),
        ({"normalizer": {}}, "normalizer: object missing required field `type`"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "invalid value 'FixedLength', expected"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": r"\p{Foo}"}}}, "is not a tokenizer"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a|a)*b"}}}, "the expression '(a|a)*b' is none"),
        ({"pre_tokenizer": METASPACE | {"replacement": "ab"}}, "replacement: expected `str` of length <= 1"),
        ({"decoder": STRIP | {"stop": 1}}, "decoder.stop: expected `int` <= 0"),
        ({"decoder": {"type": "WordPiece"}}, "decoder.type: invalid value 'WordPiece', expected one"),
        (model(type="Unigram"), "model.type: invalid enum value 'Unigram', expected one of BPE"),
        ({"model": {"vocab": {}, "unk_token": "x"}}, "model: object missing required field `type`"),
        (model(dropout=0.5), "model.dropout: expected `null`, got `float`"),
        (model(continuing_subword_prefix="##"), "continuing_subword_prefix: invalid enum value '##'"),
        (model(unk_token="nowhere"), "model.unk_token is 'nowhere', which is not in its vocabulary"),
        (model(vocab=[1]), "is not a tokenizer"),
        (model(vocab={"a": 2**40}), "is not a tokenizer"),
        (model(vocab={"a": -1}), "is not a tokenizer"),
        (model(merges=[["not", "there"]]), "is not a tokenizer"),
        ({"added_tokens": [ADDED | {"id": 5}]}, "the added token '<s>' gets the id 0, not 5"),
        ({"added_tokens": [ADDED | {"content": ""}]}, "[0].content: expected `str` of length >= 1"),
        ({"added_tokens": [ADDED | {"id": 10**9}]}, "added_tokens[0].id: expected `int` <= 16777215"),
        ({"version": "2.0"}, "version: invalid enum value '2.0', expected one of 1.0"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_could_harm_is_refused(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(RAW | changes)


def test_qwens_settings_are_taken() -> None:
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "ignore_merges": True}
    assert opened(RAW | model(**empty)).encode("What is it?").ids == opened(RAW).encode("What is it?").ids


def test_ids_beyond_the_model_are_refused() -> None:
    assert "has token ids up to 634, expected ids below 600" in refused(RAW, 600)


@pytest.mark.parametrize(
    "text", [b"", b"[", b"[]", b"null", b"{}", b'{"model": []}', b"[" * 100_000, b"\xff", b"NaN"]
)
def test_what_is_no_tokenizer_is_refused(text: bytes) -> None:
    with pytest.raises(BundleError, match=r"^the file"):
        parse(text, ROWS, BundleError, "the file")


def test_a_key_that_is_there_twice_is_one_for_both_readers() -> None:
    """The library is given what was checked, and not the file."""
    text = json.dumps(RAW | {"normalizer": replace("b" * 10_000, String="a")})[:-1] + ', "normalizer": null}'
    tokenizer = parse(text.encode(), ROWS, BundleError, "the file")
    assert tokenizer.normalizer is None
