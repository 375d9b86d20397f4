import pytest

from pymathrl.tasks.answer_tag import last_answer


@pytest.mark.parametrize(
    ("response", "expected"),
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
def test_table(response, expected):
    assert last_answer(response) == expected


def test_thought_mark_is_ignored_on_request():
    assert last_answer("<answer>1</answer></think>", after_thought=False) == "1"


def test_long_text_takes_linear_time():
    assert last_answer("<answer>" * 200_000) is None
    assert last_answer("</answer>" * 200_000) is None
