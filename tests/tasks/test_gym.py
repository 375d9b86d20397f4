"""Tasks made by reasoning-gym: exact grading of what its generators state, and refusals with their reasons."""

import importlib.util
import random
import re
import sys

import pytest

from pymathrl.errors import UserError
from pymathrl.tasks import gym as module
from pymathrl.tasks import load_task
from pymathrl.tasks.gym import LITERAL, REFUSED, VALUE, WORD
from pymathrl.tasks.holdout import is_held_out

needs_gym = pytest.mark.skipif(
    not importlib.util.find_spec("reasoning_gym"),
    reason="reasoning-gym is not installed: the extra 'rg'",
)


def test_families_that_cannot_be_graded_are_refused_with_the_reason():
    for name, message in (
        ("rg:sudoku", "this family is not graded exactly: many answers are right"),
        ("rg:simple_integration", "an antiderivative is right with any constant"),
        ("rg:chain_sun", "unknown family: did you mean 'chain_sum'"),
        ("rg:", "unknown family"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(name)
    listed = [*VALUE, *WORD, *LITERAL, *(family for families in REFUSED.values() for family in families)]
    assert len(listed) == len(set(listed))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        UserError, match=r"made by reasoning-gym, which is not installed; run pip install 'pymathrl\[rg\]'"
    ):
        load_task("rg:chain_sum")


@needs_gym
def test_every_family_of_the_package_is_listed():
    from reasoning_gym.factory import DATASETS

    listed = {*VALUE, *WORD, *LITERAL, *(family for families in REFUSED.values() for family in families)}
    assert listed == set(DATASETS)


@needs_gym
@pytest.mark.parametrize("family", [*VALUE, *WORD, *LITERAL])
def test_a_family_grades_its_own_answers(family):
    task = load_task(f"rg:{family}")
    problems = [task.train(index, 0) for index in range(4)]
    assert problems == [load_task(f"rg:{family}").train(index, 0) for index in range(4)]
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        response = task.solution(problem, random.Random(0))
        assert task.grade(problem, response).correct
        if other.answer.casefold() != problem.answer.casefold():
            assert not task.grade(problem, task.solution(other, random.Random(0))).correct
        # what holds the gold answer among others is wrong: the package's own scorer pays for it
        assert not task.grade(problem, f"\\boxed{{{problem.answer}, {problem.answer}, 17}}").correct
        assert not task.grade(problem, problem.answer).correct


@needs_gym
def test_the_question_is_no_answer():
    for family, read in (
        ("chain_sum", r": (.*) ="), ("products", r": (.*)\. Give"),
        ("polynomial_multiplication", r": (.*)"),
    ):  # fmt: skip
        task = load_task(f"rg:{family}")
        for problem in [task.train(index, 0) for index in range(4)]:
            found = re.search(read, problem.question)
            assert found, problem.question
            grade = task.grade(problem, f"\\boxed{{{found[1]}}}")
            assert (grade.correct, grade.reason) == (False, "wrong: not evaluated")


@needs_gym
def test_streams_and_settings():
    task = load_task("rg:chain_sum", settings="min_terms=2,max_terms=3,allow_negation=false")
    train, test = [task.train(i, 0) for i in range(50)], task.test(20)
    assert len({p.question for p in test}) == 20 and not {p.question for p in train} & {p.question for p in test}
    assert [p.uid for p in test] == list(range(20)) and train[3] != task.train(3, 1)
    assert all(p.question.count("+") + p.question.count(" - ") <= 2 for p in train)
    assert all(task.grade(p, f"\\boxed{{{p.answer}}}").correct for p in test)
    tagged = load_task("rg:chain_sum", answer="tag", format_score=0.1)
    assert tagged.grade(train[0], "<answer>0.123</answer>").reward == 0.1
    for options, message in (
        ({"settings": "min_term=2"}, "settings has no 'min_term': did you mean 'min_terms'"),
        ({"settings": "min_terms=x"}, "settings min_terms must be int, got 'x'"),
        ({"settings": "min_terms=5,max_terms=2"}, "reasoning-gym refuses the settings"),
        ({"format_score": 0.5}, "format_score must be in"),
        ({"answer": "x"}, "expected answer in template"),
    ):
        with pytest.raises(UserError, match=message):
            load_task("rg:chain_sum", **options)
    with pytest.raises(UserError, match="in evaluations only"):
        load_task("rg:gcd", answer="last").train(0, 0)


@needs_gym
def test_a_fraction_is_to_be_simplified():
    task = load_task("rg:fraction_simplification")
    one = task.train(0, 0)
    top, bottom = (int(n) for n in re.findall(r"\d+", one.answer))
    assert task.grade(one, f"\\boxed{{\\frac{{{top}}}{{{bottom}}}}}").correct
    assert not task.grade(one, f"\\boxed{{\\frac{{{2 * top}}}{{{2 * bottom}}}}}").correct


def test_a_narrow_family_ends(monkeypatch):
    monkeypatch.setattr(module, "_draw", lambda task, uid, item: module.Problem(uid, "the only one", "1"))
    task = module.Gym("gcd")
    held_out = is_held_out("rg:gcd:the only one")
    assert len(task.test(5)) == held_out
    if held_out:
        with pytest.raises(UserError, match="no training problem in 2000 draws"):
            task.train(0, 0)
    else:
        assert task.train(0, 0).answer == "1"
