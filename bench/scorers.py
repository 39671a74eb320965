"""The benchmarks' official rules: when an answer is right, and what a count of right ones says.

A rule takes an answer and its references and gives 0 to 1. They are hard and literal on purpose: a score is
only worth something beside published ones if every quirk of the published rule is in it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

Rule = Callable[[str, Sequence[str]], float]  # an answer, its references

# TextVQA's rule is M4C's (`EvalAIAnswerProcessor`, after VQA's own evaluation), which LLaVA's scripts use.
_MARKS = ';/[]"{}()=+\\_-><@`!'  # commas and question marks are gone by then
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
            "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
# Each is restored from what it is with any one apostrophe forgotten; the table's one mistake is kept.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, c in enumerate(word) if c == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normal(text: str) -> str:
    """An answer in VQA's normal form, by which TextVQA compares."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = spaced = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _MARKS:
        # beside a space anywhere, a mark vanishes everywhere; elsewhere it parts two words
        beside = f"{mark} " in spaced or f" {mark}" in spaced
        text = text.replace(mark, "" if beside else " ")
    # a full stop with no digit behind it; of these 32 at the most: the rule passes a flag as the count
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def textvqa(answer: str, references: Sequence[str]) -> float:
    """The mean, over leaving out each reference once, of min(1, equal ones among the others / 3)."""
    said, normal = vqa_normal(answer), [vqa_normal(reference) for reference in references]
    equal = normal.count(said)
    inside, outside = min(1.0, (equal - 1) / 3), min(1.0, equal / 3)
    return (equal * inside + (len(normal) - equal) * outside) / len(normal)


def exact(answer: str, references: Sequence[str]) -> float:
    """The very text."""
    return float(answer in references)


def gqa(answer: str, references: Sequence[str]) -> float:
    """GQA: the very text, in lower case and without full stops at its end."""
    return float(answer.rstrip(".").lower() in references)


def says_yes(answer: str) -> bool:
    """POPE: whatever does not say no up to its first full stop. It reads "No", "no" and "not", as words."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope(answer: str, references: Sequence[str]) -> float:
    """POPE: yes and no as they are read from the answer."""
    return float(("yes" if says_yes(answer) else "no") in references)


def yes_no(judged: Iterable[tuple[bool, bool]]) -> dict[str, float]:
    """POPE's figures of (said yes, should have) pairs, of which there must be one at least.

    With nothing to divide by, precision, recall and F1 are 0.
    """
    of = Counter(judged)
    hit, false, missed, left = of[True, True], of[True, False], of[False, True], of[False, False]
    precision, recall = hit / max(hit + false, 1), hit / max(hit + missed, 1)
    return {
        "accuracy": round((hit + left) / of.total(), 4),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "f1": round(2 * precision * recall / ((precision + recall) or 1), 4),
        "yes": round((hit + false) / of.total(), 4),
    }


def wilson(right: float, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score; too wide where `right` adds up parts of ones."""
    z2, share = 1.96**2, right / of
    centre, spread = share + z2 / (2 * of), 1.96 * (share * (1 - share) / of + z2 / (4 * of * of)) ** 0.5
    return (centre - spread) / (1 + z2 / of), (centre + spread) / (1 + z2 / of)


def share(right: float, of: int) -> dict[str, float]:
    """A share and its interval, for JSON."""
    low, high = wilson(right, of)
    return {"share": round(right / of, 4), "low": round(max(0.0, low), 4), "high": round(min(1.0, high), 4)}


def paired(differences: Sequence[float]) -> dict[str, float]:
    """The mean of per-question differences, each -1 to 1, and its 95 % interval, for JSON.

    Agresti and Min's (Statistics in Medicine 24, 2005): Wald's interval of paired shares with half a pair
    added to each of the four outcomes, which keeps its promise with few disagreements too.
    """
    n, total = len(differences), math.fsum(differences)
    mean = total / (n + 2)
    spread = (
        1.96 * math.sqrt((math.fsum(d * d for d in differences) + 1) / (n + 2) - mean**2) / (n + 2) ** 0.5
    )
    return {
        "mean": round(total / n, 4),
        "low": round(max(-1.0, mean - spread), 4),
        "high": round(min(1.0, mean + spread), 4),
    }


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); an inverted or empty one fits nothing."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0.0, width) * max(0.0, height)
    if not inside:
        return 0.0
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)
