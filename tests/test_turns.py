"""The prompts against PROTOCOL.md's table, written out by hand; and what they are tokenised to."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import fakes
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dualfocus.runtime.errors import QuestionError
from dualfocus.runtime.turns import (
    CHATML,
    DUALFOCUS,
    GQA_MCQ,
    MMBENCH,
    SEED,
    Image,
    ImageToken,
    Prompt,
    Question,
    Text,
    Turn,
    Turns,
    Wording,
    micro_answer,
    render,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
)
HINT = "Answer the question using a single word or phrase."
LOCATE = "Please provide the bounding box coordinate of the region this question asks: "
COMBINE = "Please combine the information from these two images and answer this question:"


def shown(question: str, *turns: Turn) -> str:
    pieces = render(DUALFOCUS, Question.parse(question, HINT), turns)
    return "".join("<image>" if isinstance(piece, Image) else piece.text for piece in pieces)


def test_macro():
    assert shown("What is it?", Turn(DUALFOCUS.macro)) == (
        SYSTEM + "USER: <image>\nWhat is it?\nAnswer the question using a single word or phrase. ASSISTANT:"
    )


def test_locate_asks_the_first_line_alone():
    assert shown("What is it?\nReference OCR: A", Turn(DUALFOCUS.locate)) == (
        SYSTEM + "USER: <image>\n" + LOCATE + "What is it? ASSISTANT:"
    )


def test_micro_has_the_box_as_history():
    turns = Turn(DUALFOCUS.locate, "[0.10, 0.20, 0.30, 0.40]"), Turn(DUALFOCUS.micro)
    assert shown("What is it?\nA. cat\nB. dog", *turns) == (
        SYSTEM
        + "USER: <image>\n"
        + LOCATE
        + "What is it? ASSISTANT: [0.10, 0.20, 0.30, 0.40]</s>USER: <image>\n"
        + COMBINE
        + " What is it?\nA. cat\nB. dog ASSISTANT:"
    )


def test_select_has_no_space_after_the_colon_no_period_and_two_spaces_before_assistant():
    turns = Turn(DUALFOCUS.locate, "[0.10, 0.20, 0.30, 0.40]"), Turn(DUALFOCUS.select, "a cat")
    assert shown("What is it?\nA. cat", *turns) == (
        SYSTEM
        + "USER: <image>\n"
        + LOCATE
        + "What is it? ASSISTANT: [0.10, 0.20, 0.30, 0.40]</s>USER: <image>\n"
        + COMBINE
        + "What is it?\nAnswer the question using a single word or phrase  ASSISTANT: a cat</s>"
    )


@pytest.mark.parametrize(
    ("text", "first_line", "whole"),
    [
        ("What?", "What?", f"What?\n{HINT}"),
        ("  What? \n", "What?", f"What?\n{HINT}"),
        ("What?\nA. x", "What?", "What?\nA. x"),
        ("What? \nA. x", "What?", "What? \nA. x"),
    ],
)
def test_a_question_without_hints_of_its_own_gets_one(text, first_line, whole):
    assert Question.parse(text, HINT) == Question(first_line, whole)


@pytest.mark.parametrize("separator", ["\f", "\v", "\u2028", "\x85", "\r"])
def test_only_a_newline_ends_the_first_line(separator):
    text = f"What is{separator}it?"
    assert Question.parse(text, HINT) == Question(text, f"{text}\n{HINT}")


def test_a_question_of_other_bytes_than_utf8_is_refused():
    with pytest.raises(QuestionError, match="not text in UTF-8"):
        Question.parse(b"What \xff?".decode(errors="surrogateescape"), HINT)


@pytest.mark.parametrize("question", [None, 3, b"What?", ["What?"], ("What?",)])
def test_what_is_no_text_is_no_question(question):
    bundle = fakes.make_bundle()
    with pytest.raises(QuestionError, match=f"of type {type(question).__name__}, expected text"):
        Turns(bundle.manifest, bundle.tokenizer, question)
    with pytest.raises(QuestionError, match=f"of type {type(question).__name__}, expected text"):
        Question(question, "What?")


def test_an_empty_hint_adds_nothing():
    assert Question.parse("What?", "") == Question("What?", "What?")


@pytest.mark.parametrize("text", ["", " ", "\n\t\n"])
def test_an_empty_question_is_refused(text):
    with pytest.raises(QuestionError, match="empty"):
        Question.parse(text, HINT)


@pytest.mark.parametrize("text", ["{Q}", "{T}", "{turn}", "{answer}", "<image>", "a {Q} b <image> c"])
def test_a_question_cannot_change_the_dialogue(text):
    pieces = render(
        DUALFOCUS, Question.parse(text, ""), [Turn(DUALFOCUS.locate, text), Turn(DUALFOCUS.micro)]
    )
    assert sum(isinstance(piece, Image) for piece in pieces) == 2
    texts = [piece.text for piece in pieces if isinstance(piece, Text)]
    assert texts[2] == f"\n{LOCATE}{text} ASSISTANT:"
    assert texts[3] == f" {text}</s>"


@pytest.mark.parametrize(
    "question",
    [
        Question.parse("<image>\nWhat is it?", ""),
        Question.parse("What is it? <image>", HINT),
        Question("What?", "What?\nA. <image>", ("<image>", "b")),
        Question("What?", "What?", context="<image>"),
    ],
)
def test_a_question_with_the_mark_of_an_image_is_refused(question):
    tokenizer = fakes.make_tokenizer()
    with pytest.raises(QuestionError, match="the question holds '<image>', which stands for a picture"):
        Turns(fakes.make_manifest(tokenizer), tokenizer, question)


@pytest.mark.parametrize("text", ["a" * 10_000_000, "\n" * 9_999_999 + "a", "中" * 10_000_000])
def test_a_question_of_megabytes_is_refused_before_it_is_tokenized(text):
    tokenizer = fakes.make_tokenizer()
    manifest = fakes.make_manifest(tokenizer)
    for question in (text, Question("a", text), Question("a", "a", (text, "b"))):
        with pytest.raises(QuestionError, match="the question is too long: it has 10,000,00"):
            Turns(manifest, None, question)


def test_an_answer_loses_newlines_and_then_periods():
    assert micro_answer("\n..AB7.\n") == "AB7"
    assert micro_answer("1.5") == "1.5"
    assert micro_answer("...") == ""


def told(prompt: Prompt) -> str:
    """A prompt as text, behind the system's sentence."""
    texts = (
        fakes.make_tokenizer().decode(part, skip_special_tokens=False)
        if isinstance(part, list)
        else f"<{part}>"
        for part in split(prompt)
    )
    return "".join(texts).removeprefix("<s>" + SYSTEM)


def asked(wording: Wording, context: str = "", prompts=DUALFOCUS) -> Turns:
    tokenizer = fakes.make_tokenizer()
    question = Question("Which?", "Which?\nA. a cat\nB. a dog\nHint.", ("a cat", "a dog"), context, wording)
    return Turns(fakes.make_manifest(tokenizer, prompts=prompts), tokenizer, question)


BOX_TURN = "USER: <w>\n" + LOCATE + "Which? ASSISTANT: [0.1]</s>"


@pytest.mark.parametrize(
    ("wording", "history", "select"),
    [
        (Wording(), BOX_TURN, f"{COMBINE}Which?\n{HINT[:-1]}  ASSISTANT: a cat</s>"),
        (SEED, BOX_TURN, f"{COMBINE} Which?\n{HINT[:-1]}  ASSISTANT: a cat</s>"),
        (GQA_MCQ, BOX_TURN, f"Which?\n{HINT}  ASSISTANT: a cat</s>"),
        (
            MMBENCH,
            BOX_TURN.replace("\n", "\nnan\n"),
            f"{COMBINE} Which? {HINT} ASSISTANT: ASSISTANT: a cat</s>",
        ),
    ],
)
def test_a_benchmark_words_its_turns_as_its_script_does(wording, history, select):
    turns = asked(wording)
    assert told(turns.macro("w")) == "USER: <w>\nWhich?\nA. a cat\nB. a dog\nHint. ASSISTANT:"
    assert told(turns.micro("w", "c", "[0.1]")) == (
        history + f"USER: <c>\n{COMBINE} Which?\nA. a cat\nB. a dog\nHint. ASSISTANT:"
    )
    assert told(turns.select("w", "c", "[0.1]", "a cat")) == history + f"USER: <c>\n{select}"
    if wording is not MMBENCH:
        assert told(turns.locate("w")) == f"USER: <w>\n{LOCATE}Which? ASSISTANT:"


@pytest.mark.parametrize(("wording", "scored"), [(SEED, " a cat</s>"), (MMBENCH, " ASSISTANT: a cat</s>")])
def test_what_is_scored_is_all_that_the_script_does_not_mask(wording, scored):
    prompt = asked(wording).select("w", "c", "[0.1]", "a cat")
    ids = [[prompt.tokens[at] for at in reply] for reply in prompt.replies]
    texts = [fakes.make_tokenizer().decode(said, skip_special_tokens=False) for said in ids]
    assert texts == [" [0.1]</s>", scored]


def test_mmbench_asks_behind_the_context_and_remembers_it_otherwise():
    locate = LOCATE.removesuffix(": ")
    assert told(asked(MMBENCH).locate("w")) == f"USER: <w>\nWhich?\n{locate}. ASSISTANT:"
    turns = asked(MMBENCH, "A farm.")
    assert told(turns.locate("w")) == f"USER: <w>\nA farm.\nWhich?\n{locate}. ASSISTANT:"
    assert told(turns.select("w", "c", "[0.1]", "a cat")) == (
        f"USER: <w>\nA farm.\n{LOCATE}Which? ASSISTANT: [0.1]</s>"
        f"USER: <c>\n{COMBINE} A farm.\nWhich? {HINT} ASSISTANT: ASSISTANT: a cat</s>"
    )


@pytest.mark.parametrize("prompts", [CHATML, replace(DUALFOCUS, select=DUALFOCUS.micro)])
def test_a_manifests_own_prompts_stand(prompts):
    ours, theirs = asked(MMBENCH, prompts=prompts), asked(Wording(), prompts=prompts)
    assert ours.locate("w") == theirs.locate("w")
    assert ours.micro("w", "c", "[0.1]") == theirs.micro("w", "c", "[0.1]")
    assert ours.select("w", "c", "[0.1]", "a cat") == theirs.select("w", "c", "[0.1]", "a cat")


def letter(reply: str, *options: str, wording: Wording = MMBENCH) -> str | None:
    return Question("Which?", "Which?", options, "", wording).letter(reply)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B. a red dog", "B"),
        ("b) a cat", "B"),
        ("a cat", "A"),  # its first character
        ("The CAT is", None),
        ("It is a FISH, I think", "C"),  # contains
        ("red", "B"),  # is contained in
        ("on a mat", "A"),  # the first of two that contain it
        ("bird", "B"),  # nothing but its first character is looked at
        ("d", None),  # no option has that letter
        ("dog", None),
        ("Fish", "C"),
        ("fowl", None),
        ("", None),
        (" ", None),
        ("x", None),
    ],
)
def test_a_reply_names_an_option(reply, expected):
    assert letter(reply, "a cat on a mat", "a red dog on a mat", "fish") == expected


def test_options_beyond_d_are_named_by_their_letter_alone_or_their_text():
    options = ("one", "two", "three", "four", "five")
    assert letter("E", *options) == letter("e", *options) == letter("E. five", *options) == "E"
    assert letter("E.", *options) is None
    assert letter("D", *options) == letter("d. two", *options) == "D"


@pytest.mark.parametrize("wording", [SEED, GQA_MCQ])
@pytest.mark.parametrize(
    ("reply", "expected", "of_texts"),
    [
        ("left", "A", "A"),
        ("Left.", None, "A"),  # "a. left" holds no period behind it
        ("It is on the left", None, "A"),
        ("(A. left)", "A", "A"),
        ("left-hand", None, "A"),
        (". r", "B", None),
        ("right", "B", "B"),
    ],
)
def test_seed_and_gqa_compare_with_the_options_lines(wording, reply, expected, of_texts):
    assert letter(reply, "left", "right", wording=wording) == expected
    assert letter(reply, "left", "right", wording=MMBENCH) == of_texts


def test_an_open_questions_reply_names_nothing():
    assert letter("A") is letter("A cat") is None


@pytest.mark.parametrize("field", ["first_line", "whole", "context", "options"])
def test_all_of_a_question_is_text(field):
    question = Question("What?", "What?\nA. x", ("x",), "why")
    broken = "\udcff"
    with pytest.raises(QuestionError, match="not text in UTF-8"):
        replace(question, **{field: (broken,) if field == "options" else broken})
    with pytest.raises(QuestionError, match="empty"):
        replace(question, first_line=" ")


def test_the_longest_option_is_counted():
    """It is scored behind the longest box; a reply, which can be longer, is not."""
    tokenizer = fakes.make_tokenizer()
    manifest = fakes.make_manifest(tokenizer)

    def need(*options: str) -> int:
        turns = Turns(manifest, tokenizer, Question("What?", "What?", options))
        turns.check_length(macro_only=False)
        prompts = [turns.select("w", "c", "", option) for option in options]
        return max(len(prompt.tokens) for prompt in prompts) + manifest.max_new_tokens

    fits = bisect_left(range(1500), True, key=lambda words: refused(lambda n: need("x", "x " * n), words)) - 1
    assert fits > 100
    assert need("x", "x " * fits) <= manifest.decoder.context
    with pytest.raises(QuestionError, match="too long"):
        need("x " * (fits + 2), "x")


@pytest.fixture(scope="module")
def turns() -> Turns:
    tokenizer = fakes.make_tokenizer()
    return Turns(fakes.make_manifest(tokenizer), tokenizer, "What is written?")


def split(prompt: Prompt) -> list[list[int] | str]:
    """Token ids between the images, and every image's name where all its tokens stand in order."""
    parts: list[list[int] | str] = [[]]
    tokens = iter(prompt.tokens)
    for token in tokens:
        if isinstance(token, ImageToken):
            rest = [next(tokens) for _ in range(fakes.IMAGE_TOKENS - 1)]
            assert [token, *rest] == [ImageToken(token.image, i) for i in range(fakes.IMAGE_TOKENS)]
            parts += [token.image, []]
        else:
            parts[-1].append(token)
    return parts


def test_text_between_images_is_tokenised_on_its_own_with_one_bos_in_front(turns):
    tokenizer = fakes.make_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    assert split(turns.micro("w", "c", "[0.1]")) == [
        [fakes.BOS, *ids(SYSTEM + "USER: ")],
        "w",
        ids(f"\n{LOCATE}What is written? ASSISTANT: [0.1]</s>USER: "),
        "c",
        ids(f"\n{COMBINE} What is written?\n{HINT} ASSISTANT:"),
    ]


def sentencepiece_like() -> Tokenizer:
    """Spaces as "▁", one put in front of every text, bytes for characters it does not know: Llama's kind."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [SYSTEM, LOCATE, COMBINE, HINT, "[0.10, 0.20] USER: ASSISTANT:"] * 5, trainer
    )
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer", [fakes.make_tokenizer(), sentencepiece_like()], ids=["bytes", "sentencepiece"]
)
@pytest.mark.parametrize("answer", ["a k\u00e9\u4e16 7", "ASSISTANT: USER:", "1", ""])
def test_replies_are_what_the_model_said_with_its_end(tokenizer, answer):
    box = "[0.10, 0.20, 0.60, 0.70]"
    prompt = Turns(fakes.make_manifest(tokenizer), tokenizer, "What?").select("w", "c", box, answer)
    assert all(prompt.tokens[reply.stop - 1] == fakes.EOS for reply in prompt.replies)
    said = [[prompt.tokens[at] for at in reply] for reply in prompt.replies]
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in said]
    assert [text.removesuffix("</s>").strip() for text in texts] == [box, answer]
    assert prompt.replies[-1].stop == len(prompt.tokens)
    before = prompt.tokens[prompt.replies[-1].start - 6 : prompt.replies[-1].start]
    assert tokenizer.decode(list(before)).endswith("ASSISTANT:")


def test_what_is_asked_has_no_replies(turns):
    assert turns.macro("w").replies == turns.locate("w").replies == ()
    assert len(turns.micro("w", "c", "[0.1]").replies) == 1


@pytest.mark.parametrize("macro_only", [True, False])
def test_the_longest_question_that_is_let_through_fits(macro_only):
    tokenizer = fakes.make_tokenizer()
    manifest = fakes.make_manifest(tokenizer)
    context = manifest.decoder.context

    def longest(words: int) -> int:
        turns = Turns(manifest, tokenizer, "x " * words + "x")
        turns.check_length(macro_only=macro_only)
        prompts = [turns.macro("w")]
        if not macro_only:
            prompts += [turns.micro("w", "c", "0" * 39), turns.select("w", "c", "0" * 39, "")]
        return max(len(prompt.tokens) for prompt in prompts) + manifest.max_new_tokens

    fits = bisect_left(range(1000), True, key=lambda words: refused(longest, words)) - 1
    assert longest(fits) <= context
    assert fits > 100
    with pytest.raises(QuestionError, match=r"too long: .* takes \d+ tokens, the model has room for 1500"):
        longest(fits + 1)


def refused(check, words: int) -> bool:
    try:
        check(words)
    except QuestionError:
        return True
    return False
