"""What the families of generated problems share whose answers are compared: see `gym` and `synth`."""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

from pymathrl.errors import UserError
from pymathrl.tasks.holdout import TEST_SEED, is_held_out
from pymathrl.tasks.problem import Check, Grade, Problem
from pymathrl.tasks.questions import (
    ANSWERS,
    FILE_TEMPLATES,
    MAX_FORMAT_SCORE,
    STATED,
    WORDINGS,
    grade_equal,
)
from pymathrl.tasks.templates import Template, find_template
from pymathrl.verify import Result, verify

TEST_SIZE = 1_024  # problems in the test set, unless a caller asks for another number
MAX_DRAWS = 2_000  # draws in a row without a new problem: the family holds no more


@dataclass(frozen=True)
class Generated(ABC):
    """Problems of a family without end; see `tasks.Task` for the methods. settings: what the family is told, as pairs.
    template_name, answer, format_score: as in `questions`."""

    family: str
    settings: tuple[tuple[str, Any], ...] = ()
    template_name: str = "qwen_boxed_user"
    answer: str = "template"
    format_score: float = 0.0
    name: str = field(default="", init=False)
    prefix: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.prefix}:{self.family}")

    @abstractmethod
    def draw(self, uid: int, rng: random.Random) -> Problem:
        """A problem, whether it is held out or not."""

    @abstractmethod
    def key(self, problem: Problem) -> str:
        """The identity of a problem."""

    @abstractmethod
    def check(self, problem: Problem) -> Check: ...

    @property
    def template(self) -> Template:
        return find_template(self.template_name, self.name)

    @property
    def system(self) -> str:
        return self.template.system

    @property
    def mode(self) -> str:
        """How the answer is read, a mode of `verify.extract`."""
        return self.template.mode if self.answer == "template" else ANSWERS[self.answer]

    def train(self, index: int, seed: int) -> Problem:
        if self.mode == "last_number":
            raise UserError(
                f"{self.name}: the last number of a response is read in evaluations only; use answer='boxed'"
            )
        rng = random.Random(seed * 1_000_003 + index)
        for _ in range(MAX_DRAWS):
            problem = self.draw(index, rng)
            if not is_held_out(self.key(problem)):
                return problem
        raise UserError(f"{self.name}: no training problem in {MAX_DRAWS} draws; widen the family's options")

    def test(self, n: int | None = None) -> list[Problem]:
        return list(_test_problems(self, TEST_SIZE if n is None else n))

    def prompt(self, problem: Problem, style: str) -> str:
        return self.template.prompt(problem.question, style)

    def reword(self, problem: Problem, rng: random.Random) -> Problem:
        """With a sentence in front."""
        return replace(problem, question=f"{rng.choice(WORDINGS)} {problem.question}")

    def grade(self, problem: Problem, response: str) -> Grade:
        check = self.check(problem)
        return self.grade_result(problem, response, verify(response, check.golds, check.mode, check.cfg))

    def grade_result(self, problem: Problem, response: str, result: Result) -> Grade:
        return grade_equal(problem, result, self.format_score)

    def solution(self, problem: Problem, rng: random.Random) -> str:
        return "</think>" + STATED[self.mode].format(gold=problem.answer)


@lru_cache(maxsize=8)
def _test_problems(task: Generated, n: int) -> tuple[Problem, ...]:
    rng, problems, misses = random.Random(TEST_SEED), dict[str, Problem](), 0
    while len(problems) < n and misses < MAX_DRAWS:
        problem = task.draw(len(problems), rng)
        key = task.key(problem)
        misses += 1
        if key not in problems and is_held_out(key):
            problems[key] = problem
            misses = 0
    return tuple(problems.values())


def grade_text(gold: str, said: str, result: Result) -> Grade:
    """The grade of an answer that is compared letter by letter. said: what `result` extracted, as `gold` is written."""
    right = said == gold
    return Grade(float(right), right, result.extracted, said, "correct" if right else "another text")


def checked_template(name: str, answer: str, template: str, format_score: float) -> str:
    """The name of the template that these options of a task mean; UserError for options out of range."""
    if answer not in ("template", *ANSWERS):
        raise UserError(f"task {name}: expected answer in template, {', '.join(ANSWERS)}, got {answer!r}")
    if not 0 <= format_score <= MAX_FORMAT_SCORE:
        raise UserError(f"task {name}: format_score must be in [0, {MAX_FORMAT_SCORE}], got {format_score}")
    if template == "auto":
        template = FILE_TEMPLATES["boxed" if answer == "template" else answer]
    find_template(template, f"task {name}")
    return template
