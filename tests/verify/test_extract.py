"""What a response states: the table of cases, the languages of MGSM, and texts made to take long."""

import json
import time
from pathlib import Path

import pytest

from pymathrl.verify import extract
from pymathrl.verify.extract import MODES, PHRASES, last_answer

ROWS = [json.loads(line) for line in Path(__file__).with_name("extraction.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['mode']}-{row['response'][:24]!r}")
def test_table(row):
    assert extract(row["response"], row["mode"]) == row["expected"], row["note"]


def test_the_table_is_whole_and_a_long_response_is_no_other_case():
    assert len(ROWS) == 49
    assert extract("x" * 200_000 + "\\boxed{9}") == "9"


@pytest.mark.parametrize(
    "response, expected",
    [
        ("\\boxed{1}, \\boxed{2}, and \\boxed{3}", "1,2,3"),
        ("$\\boxed{1}$ or $\\boxed{2}$", "1,2"),
        ("\\boxed{7} \\boxed{1}, no: \\boxed{2}, \\boxed{3}", "2,3"),  # the prose cuts the list
        ("\\boxed{} \\boxed{4}", "4"),
        ("\\boxed{4} \\boxed{}", None),  # the last box is empty
        ("\\boxed{4} \\boxed{5", None),  # the last box is cut off
        ("\\boxed{1 + \\boxed{2}}", "2"),  # the last command counts
        ("\\boxed{\\boxed{9}", "9"),
        ("\\boxed -3.5.", "-3.5"),
        ("\\boxed\\frac{1}{2}.", "\\frac{1}{2}"),
        ("\\boxed\\text{ yes}", "\\text{ yes}"),
        ("\\boxed\\frac{1}{2", None),
        ("\\boxed{3} as \\boxed asks", "3"),  # a word is no answer of a bare command
        ("\\boxed x.", "x"),
        ("\\boxed", None),
        ("\\boxedness{3}", None),
        ("a <think> that is open \\boxed{3}", None),
        ("x</think>\\boxed{3}", "3"),  # begun in the prompt
        ("\\boxed{2}</think>", None),
        ("<think>a</think>\\boxed{3}<think>", None),
        ("\\boxed{\\\\}}", "\\\\"),  # a line break, then the end: the backslash escapes the other backslash
        ("", None),
    ],
)
def test_boxes(response, expected):
    assert extract(response) == expected


@pytest.mark.parametrize(
    "response, expected",
    [
        ("<answer> 1+2 </answer>", "1+2"),
        ("<answer>1\n+2</answer>\n", "1\n+2"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>1</answer> <answer>2", "1"),  # an unclosed tag is none
        ("<answer><answer>1</answer>", "1"),
        ("<answer>1</answer></answer>", "1</answer>"),  # not an expression, so it earns nothing
        ("<answer>1</answer></think><answer>2</answer>", "2"),
        ("<answer>1</answer></think>", None),
        ("<answer>1</think>2</answer>", None),
        ("</answer>1<answer>", None),
        ("<ANSWER>1</ANSWER>", None),
        ("1+2", None),
        ("", None),
    ],
)
def test_tags(response, expected):
    assert last_answer(response) == expected
    assert extract(response, "tag") == expected


def test_a_tag_may_be_read_through_thoughts_and_its_box_counts():
    assert last_answer("<answer>1</answer></think>", after_thought=False) == "1"
    assert extract("<answer>so \\boxed{4}, not \\boxed{5</answer>", "tag") is None
    assert extract("<answer> </answer>", "tag") is None


@pytest.mark.parametrize(
    "response, expected",
    [
        ("#### Answer\n#### 12", "12"),  # a heading is no mark
        ("#### 12\n#### Remarks", "12"),
        ("#### 12.", "12"),
        ("####12", "12"),
        ("##### 12", None),
        ("#### \\frac{1}{2}", "\\frac{1}{2}"),
        ("####\n12", None),
    ],
)
def test_gsm8k(response, expected):
    assert extract(response, "gsm8k") == expected


@pytest.mark.parametrize(
    "response, expected",
    [
        ("The answer is therefore $5$.", "5"),
        ("The answer is $3$ and $5$.", "$3$ and $5$"),
        ("The answer is \\(4\\).", "4"),
        ("The answer is 5 because 2+3=5.", "5"),
        ("The answer is $x = \\boxed{5}$, as asked.", "5"),
        ("The answer is\n$$\n\\boxed{3}\n$$", "3"),
        ("The answer is \\[ x = 5", None),  # cut off
        ("**Final Answer**\n\n73", "73"),
        ("### Answer\n73 apples", "73 apples"),
        ("The answer to the second question is 5.", "5"),
        ("Answer: $\\text{Mr. Smith}$.", "\\text{Mr. Smith}"),
        ("The answer is no.", "no"),
        ("The answer isn't 5.", None),
        ("Answer: 4. No, the answer is not 4.", None),
        ("The answer is not 4. The answer is 5.", "5"),
        ("The answer is 5! Great", "5! Great"),  # a factorial sign or an exclamation: the words make it wrong
        ("The answer is", None),
        ("no phrase 7", None),
    ],
)
def test_phrases(response, expected):
    assert extract(response, "answer") == expected


MGSM = {
    "en": ["The answer is 11.", "Answer: 11"],
    "de": ["Die Antwort ist 11.", "Die Antwort lautet: 11", "Antwort: 11"],
    "es": ["La respuesta es 11.", "Respuesta: 11", "La respuesta final es 11."],
    "fr": ["La réponse est 11.", "Réponse : 11"],
    "ru": ["Ответ — 11.", "Ответ: 11"],
    "sw": ["Jibu ni 11.", "Jibu: 11"],
    "bn": ["উত্তর হল 11।", "উত্তর: 11"],
    "te": ["సమాధానం 11.", "సమాధానం: 11"],
    "th": ["คำตอบคือ 11", "คำตอบ: 11"],
    "ja": ["答えは11です。", "答え：11"],  # noqa: RUF001
    "zh": ["答案是 11。", "答案：11", "**答案为：** 11"],  # noqa: RUF001
}


@pytest.mark.parametrize("language, texts", MGSM.items())
def test_phrases_of_mgsm(language, texts):
    assert MGSM.keys() == PHRASES.keys()
    for text in texts:
        assert extract(f"12 - 1 = 11\n{text}", "answer") == "11", text


@pytest.mark.parametrize(
    "response, expected",
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{\\textbf{(B)}\\ 24}", "B"),
        ("\\boxed{\\text{b}}", "B"),
        ("<answer>c) 42</answer>", "C"),
        ("The answer is option D.", "D"),
        ("The answer is a dog", None),
        ("\\boxed{Bob}", None),
        ("\\boxed{K}", None),
        ("\\boxed{A, B}", None),
        ("\\boxed{A} and \\boxed{C}", None),
        ("<answer>(A) or (B)</answer>", None),
        ("<answer>A/B/C/D</answer>", None),
        ("Answer: A, since B is wrong", "A"),
        ("\\boxed{A) 1, 2}", "A"),
        ("So I choose\n**C**", "C"),
        ("C) it is 42", "C"),
        ("A dog.", None),
        ("", None),
    ],
)
def test_choices(response, expected):
    assert extract(response, "choice") == expected


@pytest.mark.parametrize(
    "response, expected",
    [
        ("<answer>1</answer> \\boxed{2} #### 3", "1"),
        ("<answer>1 \\boxed{2}", None),  # the tag is there, and is cut off
        ("\\boxed{2}\n#### 3", "2"),
        ("the answer is 4\n#### 3", "3"),
        ("the answer is 4", "4"),
        ("\\boxed{2", None),
        ("42", None),
    ],
)
def test_auto_takes_the_first_kind_of_mark_that_is_there(response, expected):
    assert extract(response, "auto") == expected


def test_last_numbers():
    assert [extract(t, "last_number") for t in ("=-3", "5-3", "(2)-3", "x = .5", "1,2,3", "12,345,678", "2/3.5")] == [
        "-3", "3", "3", ".5", "3", "12,345,678", "2/3.5"
    ]  # fmt: skip


def test_an_unknown_mode_is_the_callers_mistake():
    with pytest.raises(ValueError, match="did you mean 'boxed'"):
        extract("", "box")


FLOODS = [
    "\\boxed{", "\\boxed ", "\\boxed{}", "\\boxed{1},", "\\fbox", "\\boxed\\text{", "<answer>", "</answer>", "<think>",
    "</think>", "{", "}", "\\", "answer is ", "answer: ", "answer to ", "answer", "####", "#### 1", "1,", "1", "111,",
    "-", "$", " ", "\n", "**", "because ", "答案是", "\\text{and", "(", "1/", "1.", "A",
]  # fmt: skip


def seconds(text, mode):
    best = float("inf")
    for _ in range(2):
        begin = time.process_time()
        extract(text, mode)
        best = min(best, time.process_time() - begin)
    return best


@pytest.mark.parametrize("mode", MODES)
def test_the_time_is_linear_in_the_response_whatever_it_repeats(mode):
    # four times the text takes four times as long; where it grew with the square, sixteen times
    for flood in FLOODS:
        for before, after in (("", ""), ("The answer is ", ""), ("\\boxed{1}", "\\boxed{2}")):
            short, long = (seconds(before + flood * (size // len(flood)) + after, mode) for size in (12_000, 48_000))
            assert long < 8 * short + 0.02, (before, flood, short, long)


def test_a_megabyte_of_opened_boxes_takes_no_second():
    begin = time.process_time()
    assert extract("\\boxed{" * 150_000) is None
    assert extract("\\boxed{1} and " * 80_000 + "\\boxed{2}") == "1,2"
    assert time.process_time() - begin < 4
