"""The official rules, each by cases counted by hand."""

from __future__ import annotations

import pytest

from dualfocus.bench import scorers
from dualfocus.bench.scorers import vqa_normal


@pytest.mark.parametrize(("said", "normal"), [("HELLO World", "hello world"), ("ÉCOLE", "école")])
def test_vqa_case(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(
    ("said", "normal"),
    [("  red   car ", "red car"), ("red\ncar", "red car"), ("red\tcar", "red car"), ("", ""), (" \n ", "")],
)
def test_vqa_white_space(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(
    ("said", "normal"),
    [("10,000", "10000"), ("red, blue", "red blue"), ("red,blue", "redblue"), ("why?", "why"), ("a?b", "ab")],
)
def test_vqa_commas_and_question_marks_vanish(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("t-shirt", "t shirt"),  # between two words a mark parts them,
        ("t- shirt", "t shirt"),  # beside a space it vanishes,
        ("t-shirt - red", "tshirt red"),  # and then everywhere
        ("stop!", "stop"),
        ("(left)", "left"),
        ('the "end"', "end"),
        ("a/b", "b"),
        ("x_y@z.com", "x y zcom"),
        ("[{<>}]", ""),
        ("1+1=2", "1 1 2"),
        ("a:b;c", "a:b c"),  # a colon is no mark
        ("50%", "50%"),
        ("$5", "$5"),
    ],
)
def test_vqa_punctuation(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("yes.", "yes"),
        ("dr. who", "dr who"),
        ("2.5", "2.5"),  # not before a digit
        (".5", ".5"),
        ("5. ", "5"),
        ("u.s.a.", "usa"),
        ("." * 33, "."),  # 32 at the most
    ],
)
def test_vqa_full_stops(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("None", "0"),
        ("zero", "0"),
        ("Two cats", "2 cats"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("one-two", "1 2"),
    ],
)
def test_vqa_number_words(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(
    ("said", "normal"),
    [("The cat", "cat"), ("an apple a day", "apple day"), ("theatre", "theatre"), ("a", "")],
)
def test_vqa_articles(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("dont", "don't"),
        ("Wont stop", "won't stop"),
        ("couldntve", "couldntve"),  # two are forgotten: no entry
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("twas", "'twas"),
        ("oclock", "o'clock"),
        ("ill", "ill"),  # a word of its own, as "hell" and "well"
        ("im", "im"),  # the table has it with a capital, which no normal form has
        ("somebody'd", "somebodyd"),  # the table's mistake
    ],
)
def test_vqa_contractions(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(("said", "normal"), [("it's", "it 's"), ("men's", "men 's"), ("James'", "james'")])
def test_vqa_the_apostrophe_s_is_a_word(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(
    ("equal", "score"),
    [
        (0, 0.0),
        (1, 0.3),  # left out itself: 0; of nine others it is one of nine: 1/3
        (2, 0.6),  # 2 of 1/3, 8 of 2/3
        (3, 0.9),  # 3 of 2/3, 7 of 1
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_textvqa_leaves_one_out(equal: int, score: float) -> None:
    references = ["Nokia."] * equal + [f"other {i}" for i in range(10 - equal)]
    assert scorers.textvqa("the nokia", references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "yes"),
    [
        ("Yes", True),
        ("yes, there is", True),
        ("No", False),
        ("no", False),
        ("There is not", False),
        ("NO", True),  # not a word it knows
        ("nothing", True),
        ("No, there is", False),  # the comma goes before words are told apart
        ("Yes. No", True),  # only up to the first full stop
        (". no", True),
        ("maybe\nno", True),  # words are parted by spaces alone
        ("", True),
    ],
)
def test_pope_reads_yes_and_no(said: str, yes: bool) -> None:
    assert scorers.says_yes(said) is yes
    assert scorers.pope(said, ("yes",)) == yes
    assert scorers.pope(said, ("no",)) == (not yes)


def test_pope_figures() -> None:
    """3 hits, 1 false alarm, 2 missed, 4 rightly denied."""
    judged = [(True, True)] * 3 + [(True, False)] + [(False, True)] * 2 + [(False, False)] * 4
    assert scorers.yes_no(judged) == {
        "accuracy": 0.7,
        "precision": 0.75,
        "recall": 0.6,
        "f1": 0.6667,  # 2 x 0.75 x 0.6 / 1.35
        "yes": 0.4,
    }


def test_pope_figures_where_nobody_says_yes() -> None:
    told = scorers.yes_no([(False, True), (False, False)])
    assert told == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes": 0.0}


@pytest.mark.parametrize(
    ("said", "score"),
    [
        *(("Dog", 1), ("dog.", 1), ("dog...", 1), (" dog", 0), ("dogs", 0), ("dog. ", 0), ("", 0)),
        *((".dog", 0), ("d.og", 0), ("d.o.g.", 0)),  # full stops within stay
    ],
)
def test_gqa_is_exact(said: str, score: float) -> None:
    assert scorers.gqa(said, ("dog",)) == score


@pytest.mark.parametrize(("said", "score"), [("A", 1), ("a", 0), ("B", 0), ("A.", 0)])
def test_letters_are_equal(said: str, score: float) -> None:
    assert scorers.exact(said, ("A",)) == score


def test_wilson() -> None:
    low, high = scorers.wilson(85, 100)
    assert (round(low, 4), round(high, 4)) == (0.7672, 0.9069)  # by hand, from Wilson's formula
    assert scorers.share(0, 10) == {"share": 0.0, "low": 0.0, "high": 0.2775}


def test_paired_differences() -> None:
    """Of 98 pairs 12 are won and 4 lost.

    By hand, half a pair added to each outcome: (12.5 - 4.5) / 100 = 0.08, of variance
    (17 / 100 - 0.08^2) / 100 = 0.001636, so that 1.96 x 0.040447 = 0.0793 is to either side.
    """
    told = scorers.paired([1.0] * 12 + [-1.0] * 4 + [0.0] * 82)
    assert told == {"mean": round(8 / 98, 4), "low": 0.0007, "high": 0.1593}
    nothing = scorers.paired([0.0] * 98)
    assert nothing["mean"] == 0
    assert nothing["low"] == -nothing["high"] == -0.0196  # 1.96 x (1 / 100 / 100)^0.5
    assert scorers.paired([1.0, 1.0])["high"] <= 1


def test_overlap_of_boxes() -> None:
    assert scorers.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert scorers.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert scorers.iou((3, 3, 1, 1), (0, 0, 4, 4)) == 0  # an inverted box fits nothing
    assert scorers.iou((3, 0, 1, 2), (0, 0, 2, 2)) == 0
    assert scorers.iou((1, 1, 1, 1), (2, 2, 2, 2)) == 0  # nor does one without an area
