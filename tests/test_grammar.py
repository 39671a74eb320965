"""Box replies under the grammar: the tokenizer's own spelling of every well-formed box, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from functools import cache

import fakes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dualfocus.runtime.bundle import BUILT_IN, read_manifest
from dualfocus.runtime.geometry import find_region
from dualfocus.runtime.grammar import BoxCursor, BoxGrammar
from dualfocus.runtime.manifest import BoxFormat, Manifest, Prompts, TokenSpec
from dualfocus.runtime.turns import DUALFOCUS, Turns

SPECIAL = ["<unk>", "<s>", "</s>"]  # so that BOS and EOS are those of the fakes
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QUESTION = "What is left of the 2 stars, 3 or [0.5, 0.5]?"


def corpus() -> list[str]:
    rng = random.Random(0)
    boxes = ["[" + ", ".join(f"{rng.randint(0, 100) / 100:.2f}" for _ in range(4)) + "]" for _ in range(400)]
    turns = [DUALFOCUS.system + DUALFOCUS.locate + " ASSISTANT: " + box for box in boxes]
    return [*turns, *[DUALFOCUS.select + " ASSISTANT: "] * 40]


def byte_level(pattern: str, *, size: int = 600, dropout: float | None = None) -> Tokenizer:
    """A byte-level BPE whose words are what `pattern` splits into."""
    tokenizer = Tokenizer(models.BPE(dropout=dropout))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNSPACE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def llama(*, metaspace: bool = False) -> Tokenizer:
    """SentencePiece's BPE as Llama has it: single digits, each of which a byte token spells too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(UNSPACE)
    return tokenizer


LONG = ["▁0.", *(f"{n:02d}" for n in range(0, 100, 3)), ".99"]


def unigram(*more: str) -> Tokenizer:
    """SentencePiece's Unigram: of all spellings the likeliest, which takes the `more` pieces where it can."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    digits, others = pre_tokenizers.Digits(), pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, others])
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    pieces = [(piece, score) for piece, score in _pieces(tokenizer) if piece not in SPECIAL]
    table = [*((piece, 0.0) for piece in SPECIAL), *((piece, -10.0) for piece in BYTES), *pieces]
    table += [(piece, -2.0) for piece in more]
    trained = Tokenizer(models.Unigram(table, 0, byte_fallback=True))
    trained.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trained.decoder = decoders.Sequence(UNSPACE)
    return trained


def _pieces(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def word_level(*heads: str) -> Tokenizer:
    """Words of a hand-made list, like nano's: `heads` before two digits that are one word."""
    words = [*SPECIAL, *heads, *(f"{n:02d}" for n in range(100)), "]", " ASSISTANT:"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    split = r" ?\[[01]\.|, [01]\.|(?<=[01]\.)\d\d|\]| ASSISTANT:| ?\w+|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "fake": fakes.make_tokenizer,
    "byte-gpt2": lambda: byte_level(GPT2),
    "byte-llama3": lambda: byte_level(LLAMA3),
    "byte-digits": lambda: byte_level(LLAMA3.replace("{1,3}", "")),
    "sentencepiece-bpe": llama,
    "sentencepiece-bpe-metaspace": lambda: llama(metaspace=True),
    "sentencepiece-unigram": unigram,
    "sentencepiece-unigram-long": lambda: unigram(*LONG),
    "nano": lambda: Tokenizer.from_file(str(BUILT_IN / "tokenizer.json")),
    "words": lambda: word_level(" [0.", ", 0.", " [1.", ", 1."),
    "words-below-one": lambda: word_level(" [0.", ", 0."),
    "words-one-first": lambda: word_level(" [0.", " [1.", ", 0."),
    "words-one-later": lambda: word_level(" [0.", ", 0.", ", 1."),
}


class Case:
    """A tokenizer with a manifest and their grammar; what `Turns` makes of a box is the reference."""

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest | None = None, **changes: object) -> None:
        self.tokenizer = tokenizer
        self.manifest = dataclasses.replace(manifest or fakes.make_manifest(tokenizer), **changes)  # type: ignore[arg-type]
        self.unit = 10**self.manifest.box.decimals if self.manifest.box else 1
        self.grammar = BoxGrammar.build(self.manifest, tokenizer)

    def text(self, *units: int) -> str:
        assert self.manifest.box
        return self.manifest.box.write(*(n / self.unit for n in units))

    def spelling(self, text: str) -> list[int]:
        """The reply `text` as the history holds it, to its first end token; checked against the prompt."""
        turns = Turns(self.manifest, self.tokenizer, QUESTION)
        history, prompt = turns.micro("whole", "crop", text), turns.locate("whole")
        start = history.replies[0].start
        assert history.tokens[:start] == prompt.tokens
        tokens = [token for token in history.tokens[start:] if isinstance(token, int)]
        return tokens[: next(i for i, t in enumerate(tokens) if t in self.manifest.tokens.eos) + 1]

    def said(self, tokens: Sequence[int]) -> str:
        """A reply as the runner reads it."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def spells(self, *units: int) -> bool:
        text = self.text(*units)
        return self.said(self.spelling(text)) == text

    def start(self) -> BoxCursor:
        assert self.grammar
        return self.grammar.start()


@cache
def case(name: str) -> Case:
    manifest = read_manifest(BUILT_IN)[0] if name == "nano" else None
    return Case(TOKENIZERS[name](), manifest)


def accepts(cursor: BoxCursor, tokens: Sequence[int]) -> bool:
    for token in tokens:
        if token not in cursor.allowed:
            return False
        cursor.advance(token)
    return cursor.done


def draw(rng: random.Random, unit: int = 100) -> tuple[int, int, int, int]:
    """A well-formed box, now and then at a border."""
    numbers = [rng.choice([0, unit, *(rng.randint(0, unit) for _ in range(8))]) for _ in range(4)]
    (x0, x1), (y0, y1) = sorted(numbers[:2]), sorted(numbers[2:])
    return x0, y0, x1, y1


def walk(case: Case, rng: random.Random) -> list[int]:
    cursor, tokens = case.start(), []
    while not cursor.done:
        tokens.append(rng.choice(cursor.allowed))
        cursor.advance(tokens[-1])
    return tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_canonical_spellings_are_walked_to_the_end(name: str) -> None:
    here, rng, walked = case(name), random.Random(1), 0
    for box in (draw(rng) for _ in range(150)):
        if here.spells(*box):
            assert accepts(here.start(), here.spelling(here.text(*box))), box
            walked += 1
    assert walked >= 50 if "-one" in name else walked == 150


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_number_is_reached_at_every_place(name: str) -> None:
    here = case(name)
    for place in range(4):
        for number in range(101):
            box = [0, 0, 99, 99]
            box[place] = number
            x0, y0, x1, y1 = box
            accepted = here.spells(*box) and accepts(here.start(), here.spelling(here.text(*box)))
            assert accepted == (here.spells(*box) and x0 <= x1 and y0 <= y1), box


@given(name=st.sampled_from(sorted(TOKENIZERS)), box=st.tuples(*[st.integers(0, 100)] * 4))
@settings(max_examples=200, deadline=None)
def test_a_box_is_in_the_grammar_if_it_is_well_formed(name: str, box: tuple[int, int, int, int]) -> None:
    here = case(name)
    x0, y0, x1, y1 = box
    spelled = here.spelling(here.text(*box))
    assert accepts(here.start(), spelled) == (here.spells(*box) and x0 <= x1 and y0 <= y1)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whatever_is_allowed_is_a_box_in_its_own_spelling(name: str) -> None:
    here, rng = case(name), random.Random(2)
    assert here.manifest.box
    for _ in range(100):
        tokens = walk(here, rng)
        reply = here.said(tokens)
        corners = find_region(reply, "original", 100, 100, here.manifest.image).box
        assert corners is not None
        x0, y0, x1, y1 = np.asarray(corners.corners) / 100
        assert 0 <= x0 <= x1 <= 1
        assert 0 <= y0 <= y1 <= 1
        assert reply == here.manifest.box.write(x0, y0, x1, y1)
        assert here.spelling(reply) == tokens
        assert tokens[-1] in here.manifest.tokens.eos


def after(here: Case, tokens: Sequence[int]) -> BoxCursor:
    cursor = here.start()
    for token in tokens:
        cursor.advance(token)
    return cursor


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_ahead_begins_with_all_that_is_forced(name: str) -> None:
    here, rng = case(name), random.Random(3)
    for _ in range(10):
        tokens = walk(here, rng)
        for taken in range(len(tokens)):
            cursor = after(here, tokens[:taken])
            before = cursor.allowed
            run = cursor.ahead()
            assert cursor.allowed == before  # looking ahead took nothing
            forced: list[int] = []
            while len(cursor.allowed) == 1:
                forced += cursor.allowed
                cursor.advance(forced[-1])
            assert run[: len(forced)] == forced
            assert tokens[taken : taken + len(forced)] == forced
            assert len(set(cursor.allowed)) == len(cursor.allowed)
            guessed = after(here, [*tokens[:taken], *run])
            assert not guessed.done or run == forced  # behind a likely token there is a choice
            assert guessed.done or len(guessed.allowed) > 1
        assert after(here, tokens).allowed == ()
        assert after(here, tokens).ahead() == []


def test_a_token_is_likely_that_most_of_the_numbers_left_begin_with() -> None:
    here = case("sentencepiece-bpe")
    zero = here.tokenizer.token_to_id("0")
    for x0, likely in ((0, True), (12, True), (91, True), (92, False), (99, False)):
        spelled = here.spelling(here.text(x0, 0, 100, 100))
        third = len(spelled) - len("1.00, 1.00]") - 1  # a token for each character, and the end
        cursor = after(here, spelled[:third])
        assert zero in cursor.allowed
        assert (cursor.ahead()[:1] == [zero]) == likely  # of x0 to 1.00, all but the last begin with 0


def choices(here: Case, *box: int) -> int:
    """How often decoding this box chooses."""
    cursor, count = here.start(), 0
    for token in here.spelling(here.text(*box)):
        count += len(cursor.allowed) > 1
        cursor.advance(token)
    return count


def test_how_many_tokens_are_chosen() -> None:
    digits = case("sentencepiece-bpe")
    assert choices(digits, 12, 34, 56, 78) == 12  # of each number the digit before the point and two after it
    assert choices(digits, 12, 34, 56, 100) == 10  # 1.00 has no choice after its first digit
    assert choices(digits, 100, 34, 100, 78) == 1 + 3 + 0 + 3  # nor has what is not below 1.00
    assert choices(digits, 12, 34, 95, 78) == 12
    assert choices(digits, 95, 34, 95, 78) == 3 + 3 + 2 + 3  # 0 or 1, then 9 if 0, then 5 to 9
    assert choices(digits, 99, 99, 99, 99) == 3 + 3 + 1 + 1
    assert len(digits.spelling(digits.text(12, 34, 56, 78))) == 25  # [ 0 . 1 2  , _ 0 . 3 4  …  ] </s>
    words = case("words-below-one")
    assert choices(words, 12, 34, 56, 78) == 4
    assert choices(words, 99, 34, 99, 78) == 3
    assert choices(case("nano"), 12, 34, 56, 78) == 8  # and whether it is 0 or 1


def test_bytes_and_other_splits_are_not_allowed() -> None:
    here = case("sentencepiece-bpe")
    text = here.text(12, 34, 56, 78)
    spelled = here.spelling(text)
    one, byte = (here.tokenizer.token_to_id(token) for token in ("1", "<0x31>"))
    other = [byte if token == one else token for token in spelled]
    assert here.said(other) == text
    assert other != spelled
    assert not accepts(here.start(), other)
    here = case("byte-gpt2")
    spelled = here.spelling(here.text(12, 34, 56, 78))
    two = here.tokenizer.token_to_id("12")
    at = spelled.index(two)
    other = [*spelled[:at], *(here.tokenizer.token_to_id(digit) for digit in "12"), *spelled[at + 1 :]]
    assert here.said(other) == here.text(12, 34, 56, 78)
    assert not accepts(here.start(), other)


def greedy(here: Case, logits: np.ndarray, *, masked: bool) -> list[int]:
    """Greedy decoding where `logits` (steps, vocabulary) are what the model says."""
    cursor, tokens = here.start(), []
    for row in logits:
        choice = max(cursor.allowed, key=lambda token: row[token]) if masked else int(row.argmax())
        tokens.append(choice)
        if choice in here.manifest.tokens.eos:
            break
        if masked:
            cursor.advance(choice)
    return tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_mask_changes_no_well_formed_reply(name: str) -> None:
    """Random logits that lean to a box, upright or not: free and masked agree where free gives a box."""
    here, rng, equal = case(name), np.random.default_rng(4), 0
    for _ in range(100):
        box = rng.integers(0, 100, 4)
        if rng.random() < 0.7:
            box[[0, 2]], box[[1, 3]] = sorted(box[[0, 2]]), sorted(box[[1, 3]])
        spelled = here.spelling(here.text(*box))
        logits = rng.standard_normal((50, here.manifest.decoder.vocabulary))
        logits[range(len(spelled)), spelled] += 6
        free, masked = (greedy(here, logits, masked=masked) for masked in (False, True))
        x0, y0, x1, y1 = box
        if free == spelled and x0 <= x1 and y0 <= y1:
            assert masked == free
            equal += 1
        else:
            assert masked != free
            assert accepts(here.start(), masked)
    assert 10 <= equal <= 90


def test_an_end_token_among_the_numbers_is_no_part_of_them() -> None:
    """Free decoding ends at any end token, so that a number with one inside can never be said."""
    seven = case("sentencepiece-bpe").tokenizer.token_to_id("7")
    here = Case(llama(), tokens=TokenSpec(fakes.BOS, (fakes.EOS, seven)))
    rng = random.Random(5)
    assert not any(seven in walk(here, rng) for _ in range(50))
    assert accepts(here.start(), here.spelling(here.text(12, 34, 56, 80)))


@pytest.mark.parametrize("name", ["byte-llama3", "sentencepiece-bpe", "sentencepiece-unigram", "fake"])
@pytest.mark.parametrize(
    "box", [BoxFormat(decimals=1), BoxFormat(decimals=3), BoxFormat("<box>{x0},{y0},\n{x1},{y1}</box>", 2)]
)
def test_other_formats(name: str, box: BoxFormat) -> None:
    here, rng = Case(case(name).tokenizer, box=box), random.Random(6)
    for _ in range(30):
        assert accepts(here.start(), here.spelling(here.text(*draw(rng, here.unit))))
        tokens = walk(here, rng)
        assert here.spelling(here.said(tokens)) == tokens


def prompts(**changes: str) -> Prompts:
    return dataclasses.replace(DUALFOCUS, **changes)


UNHELD: dict[str, Callable[[], Case]] = {
    "no format": lambda: Case(fakes.make_tokenizer(), box=None),
    "no end token": lambda: Case(fakes.make_tokenizer(), prompts=prompts(reply=" {answer}\n")),
    "words around the answer": lambda: Case(
        fakes.make_tokenizer(), prompts=prompts(reply=" It is {answer}</s>")
    ),
    "a prompt that ends within a token": lambda: Case(
        byte_level(GPT2), prompts=prompts(user="USER: {turn} ASSISTANT: ", reply="{answer}</s>")
    ),
    "a prompt whose last token grows": lambda: Case(
        byte_level(r" +|\p{L}+|\d|."), prompts=prompts(user="USER: {turn} ASSISTANT: ")
    ),
    "tokens across a number's end": lambda: Case(byte_level(r"ASSISTANT:", size=1500)),
    "pieces across a number's end": lambda: Case(unigram("2,", "5,", "8,")),
    "a spelling that hangs on its neighbour": lambda: Case(byte_level(r"(?<=2), 0|(?<=\d), |" + GPT2)),
    "a spelling that hangs on the question": lambda: Case(
        byte_level(r"(?<=\?) |" + GPT2), prompts=prompts(user="{turn}")
    ),
    "a spelling by chance": lambda: Case(byte_level(GPT2, dropout=0.5)),
    "nothing can be spelled": lambda: Case(word_level(" [0.", ", 1.")),
    "a text that decodes to another": lambda: Case(spaced()),
}


def spaced() -> Tokenizer:
    tokenizer = word_level(" [0.", ", 0.")
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize("name", UNHELD)
def test_no_grammar_where_it_would_not_hold(name: str) -> None:
    assert UNHELD[name]().grammar is None
