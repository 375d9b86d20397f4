# ruff: noqa: RUF001 - look-alike characters are test inputs here
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymathrl.errors import UserError
from pymathrl.tasks.arithmetic import Arithmetic, problem_key, read_integer, work_out
from pymathrl.tasks.problem import Problem

CHAIN = Problem(0, "37+485-12*6", "450", {"numbers": (37, 485, 12, 6), "ops": "+-*"})


def test_work_out():
    assert work_out((37, 485, 12, 6), "+-*") == (["12*6=72", "37+485=522", "522-72=450"], 450)
    assert work_out((3, 5, 4), "-+") == (["3-5=-2", "-2+4=2"], 2)
    assert work_out((2, 3, 4), "**") == (["2*3=6", "6*4=24"], 24)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("450", 450), ("+450", 450), ("-450", -450), ("−450", -450), (" 007\n", 7), ("-0", 0),
        ("1,234", None), ("1 234", None), ("450.0", None), ("4.5e2", None), ("--4", None), ("- 4", None), ("4_0", None),
        ("", None), ("٣", None), ("37+485-12*6", None), ("=450", None), ("9" * 257, None), ("9" * 10_000, None),
    ],
)  # fmt: skip
def test_read_integer(text, value):
    assert read_integer(text) == value


def test_grades():
    task = Arithmetic()
    grade = task.grade(CHAIN, "x</think><answer>+0450</answer>\n")
    assert (grade.reward, grade.correct, grade.answer, grade.canonical) == (1.0, True, "+0450", "450")
    assert task.grade(CHAIN, "<answer>451</answer>").reward == 0.1
    assert Arithmetic(format_score=0.0).grade(CHAIN, "<answer>451</answer>").reward == 0.0
    assert task.grade(CHAIN, "<answer>37+485-12*6</answer>").reward == 0.0
    assert task.grade(CHAIN, "450").reward == 0.0
    assert task.grade(CHAIN, "<answer>450</answer></think>").reward == 0.0


@given(st.text(st.characters(exclude_categories=())) | st.text("0123456789+-−,. \n</answer>think"))
def test_grading_never_raises(text):
    for response in (text, f"<answer>{text}</answer>"):
        grade = Arithmetic().grade(CHAIN, response)
        assert grade.correct == (grade.reward == 1.0) == (grade.canonical == "450")


def test_generated_problems():
    task, rng = Arithmetic(terms_min=2, terms_max=5, digits_min=1, digits_max=4), random.Random(0)
    seen_lengths = set()
    for index in range(300):
        one = task.train(index, 1)
        assert one == task.train(index, 1) and one.uid == index
        assert eval(one.question) == int(one.answer)  # Python's own arithmetic, on text made here
        seen_lengths.add(len(one.meta["numbers"]))
        assert all(1 <= len(str(number)) <= 4 for number in one.meta["numbers"])
        assert task.grade(one, task.solution(one, rng)).correct
        text = task.prompt(one, "compact") + task.solution(one, rng)
        for tag in ("<think>", "</think>", "<answer>", "</answer>"):
            text = text.replace(tag, "")
        assert set(text) <= set("0123456789+-*= ?\n,")
    assert seen_lengths == {2, 3, 4, 5}
    assert task.train(0, 1) != task.train(0, 2)


def test_train_and_test_never_overlap():
    narrow = Arithmetic(terms_max=2, digits_max=1)
    test = {problem_key(p.question) for p in narrow.test()}
    train = {problem_key(narrow.train(index, 0).question) for index in range(3000)}
    raw = {problem_key(f"{a}{op}{b}") for a in range(1, 10) for b in range(1, 10) for op in "+-*"}
    assert not test & train
    assert test | train == raw  # every chain was met, on one side
    assert Arithmetic().test(30) == Arithmetic().test(60)[:30]
    assert len({problem_key(p.question) for p in Arithmetic().test()}) == 1024


def test_order_makes_no_new_problem():
    assert problem_key("2+3*4") == problem_key("4*3+2") != problem_key("2*3+4")


def test_other_wordings_have_the_same_value():
    task, rng, same = Arithmetic(), random.Random(0), 0
    for index in range(200):
        one = task.train(index, 0)
        other = task.reword(one, rng)
        assert other.answer == one.answer and sorted(other.meta["numbers"]) == sorted(one.meta["numbers"])
        assert sorted(other.meta["ops"]) == sorted(one.meta["ops"])
        assert task.grade(other, f"<answer>{one.answer}</answer>").correct
        same += other.question == one.question
    assert same < 60  # of a sum of two terms with a minus there is no other order
    assert {task.reword(CHAIN, rng).question for _ in range(100)} == {
        "37+485-6*12", "37-12*6+485", "37-6*12+485", "485+37-12*6", "485+37-6*12", "485-12*6+37", "485-6*12+37",
    }  # fmt: skip
    alone = Problem(0, "7-2", "5", {"numbers": (7, 2), "ops": "-"})
    assert task.reword(alone, rng) is alone


def test_prompts():
    task = Arithmetic()
    assert task.prompt(CHAIN, "compact") == "37+485-12*6 = ?\n<think>"
    chat, plain = task.prompt(CHAIN, "chat"), task.prompt(CHAIN, "plain")
    assert "37+485-12*6" in chat and chat in plain and plain.endswith("\n<think>")
    with pytest.raises(UserError, match="did you mean 'plain'"):
        task.prompt(CHAIN, "plan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms_min": 5}, "2 <= terms_min <= terms_max <= 12, got terms_min=5, terms_max=4"),
        ({"digits_max": 10}, "digits_max"),
        ({"ops": "+/"}, r"characters \+ - \*, got '\+/'"),
        ({"ops": ""}, "ops"),
        ({"format_score": -0.1}, "format_score"),
        ({"answer": "boxed"}, "answer must be tag or last"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Arithmetic(**options)


@pytest.mark.parametrize("ops", ["+", "-", "*"])
def test_the_narrowest_options_still_have_both_sides(ops):
    narrow = Arithmetic(terms_max=2, digits_max=1, ops=ops)
    test = {problem_key(p.question) for p in narrow.test()}
    assert 0 < len(test) < 20
    assert not test & {problem_key(narrow.train(index, 0).question) for index in range(300)}


@pytest.mark.parametrize(
    ("response", "reward", "correct"),
    [("3*4 is 12, so -4.", 1.0, True), ("8-12", 0.1, False), ("-4.5", 0.0, False), ("?", 0.0, False)],
)
def test_answers_without_a_tag(response, reward, correct):
    task = Arithmetic(answer="last")
    problem = Problem(0, "8-3*4", "-4", {"numbers": (8, 3, 4), "ops": "-*"})
    grade = task.grade(problem, response)
    assert (grade.reward, grade.correct) == (reward, correct)
    assert "8-3*4" in task.prompt(problem, "chat") and "<answer>" not in task.prompt(problem, "chat")
