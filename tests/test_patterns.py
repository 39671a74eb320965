"""Expressions of published tokenizers pass, and those that take too long do not."""

from __future__ import annotations

import json

import pytest

from dualfocus.runtime.bundle import BUILT_IN
from dualfocus.runtime.patterns import is_harmless

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Qwen2": QWEN,
    "Llama 3": QWEN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"),
    "GPT-4o, Mistral": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "DeepSeek": (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "thousands": r"\d{1,3}(?=(?:\d{3})*\b)",
    "random weights": r"▁?\p{L}+|\p{N}|▁?[^\p{L}\p{N}▁]|▁",
}
EVIL = [
    "(a+)+$", "(a*)*b", "(a|a)+$", "(a|ab|b)*c", "(?:a?){30}a{30}", "a?a?a?a?a?a?a?aaaaaaa", r"(\s+x?)+y",
    "a*a*a*b", r"\s*\s*x", "((a{1,9}){1,9}){1,9}", "(?:a{2,3})+", "a{1,3}+", "a{3}?b",
    "(?:(?:a|b)(?:a|b)){9}x",
    "(a|a)(a|a)(a|a)(a|a)(a|a)b", r"(a)\1", r"\g<0>", "(?<n>a)", "(?i)a", "(?#x)", "(?~ab)", "(*FAIL)",
    "(?(1)a|b)", "a**", "*a", "(a", "a)", "[a", "[]", "[a&&b]", "[[:alpha:]]", "a{1000}", "a" * 3000,
    "(" * 50 + "a" + ")" * 50, "(" * 1999, r"\K", r"\X", r"\R", "\\", r"\p{", "{1}", "(?=a)*", "^*",
    "(?:" + "|".join("a" * 20) + ")b",
]  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_expressions_pass(name: str) -> None:
    assert is_harmless(PUBLISHED[name])


def test_the_built_in_models_passes() -> None:
    raw = json.loads((BUILT_IN / "tokenizer.json").read_text())
    assert is_harmless(raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])


@pytest.mark.parametrize("pattern", EVIL, ids=lambda pattern: pattern[:20])
def test_others_do_not(pattern: str) -> None:
    assert not is_harmless(pattern)
