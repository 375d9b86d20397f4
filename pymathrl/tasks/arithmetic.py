"""Arithmetic: the integer value of a chain such as "37+485-12*6", graded exactly.

Products bind before sums, there are no brackets, and results may be negative.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from pymathrl.errors import UserError
from pymathrl.tasks.expression import MAX_LITERALS, canonical
from pymathrl.tasks.holdout import TEST_SEED, is_held_out
from pymathrl.tasks.problem import Grade, Problem
from pymathrl.tasks.prompt_style import instruct
from pymathrl.verify.extract import extract, last_answer

MAX_DIGITS = 9
MAX_ANSWER_LENGTH = 256  # characters; Python refuses to read integers of more than 4300 digits
MAX_DRAWS = 4_000  # draws in a row without a new test problem: the ranges hold no more
REWORDS = 20  # tries to write a chain in another order: of two orders one comes up in all but one of a million
TEST_SIZE = 1_024  # problems in the test set, unless a caller asks for another number

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NORMALIZE = str.maketrans({"−": "-", "–": "-"})  # noqa: RUF001 - the characters to replace


def problem_key(chain: str) -> str:
    """The identity of a problem: the order of terms and of factors does not matter, so "2+3*4" and "4*3+2" are one."""
    return f"arithmetic:{canonical(chain)}"


def read_integer(text: str) -> int | None:
    """The integer a text states, else None: an optional sign and ASCII digits.  Leading zeros are allowed ("007" is 7);
    thousands separators ("1,234"), decimals ("7.0") and spaces inside are not."""
    text = text.strip().translate(_NORMALIZE)
    return int(text) if len(text) <= MAX_ANSWER_LENGTH and _INTEGER.fullmatch(text) else None


def read_number(text: str) -> int | None:
    """The integer that a number states as `extract` finds it in a text, "-1,234.00" for instance, else None."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    top, _, bottom = text.translate(_NORMALIZE).replace(",", "").partition("/")
    value = Fraction(top) / (Fraction(bottom or 1) or 1)
    return int(value) if value.denominator == 1 else None


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Chains of terms_min..terms_max numbers of digits_min..digits_max digits, joined by operations drawn from `ops`.

    A number of d digits is uniform over 10^(d-1)..10^d-1 (1..9 for one digit), d uniform over its range.
    answer: "tag" reads the integer in a closed answer tag; "last" the last number of the response, for a model that was
        not taught the tags, under a shorter prompt.
    format_score: reward of a wrong answer that is an integer where it should be; 0 pays for correctness only.
    """

    terms_min: int = 2
    terms_max: int = 4
    digits_min: int = 1
    digits_max: int = 3
    ops: str = "+-*"
    answer: str = "tag"
    format_score: float = 0.1
    name: str = field(default="arithmetic", init=False)

    def __post_init__(self) -> None:
        for low, high, least, most in (
            ("terms_min", "terms_max", 2, MAX_LITERALS),
            ("digits_min", "digits_max", 1, MAX_DIGITS),
        ):
            a, b = getattr(self, low), getattr(self, high)
            if not least <= a <= b <= most:
                raise UserError(f"arithmetic: expected {least} <= {low} <= {high} <= {most}, got {low}={a}, {high}={b}")
        if not self.ops or set(self.ops) - set("+-*"):
            raise UserError(f"arithmetic: ops must be one or more of the characters + - *, got {self.ops!r}")
        if self.answer not in ("tag", "last"):
            raise UserError(f"arithmetic: answer must be tag or last, got {self.answer!r}")
        if not 0 <= self.format_score < 1:
            raise UserError(f"arithmetic: format_score must be in [0, 1), got {self.format_score}")

    def draw(self, rng: random.Random) -> tuple[list[int], str]:
        """(numbers, operations between them)."""
        count = rng.randint(self.terms_min, self.terms_max)
        digits = [rng.randint(self.digits_min, self.digits_max) for _ in range(count)]
        numbers = [rng.randint(10 ** (d - 1), 10**d - 1) for d in digits]
        return numbers, "".join(rng.choice(self.ops) for _ in range(count - 1))

    def train(self, index: int, seed: int) -> Problem:
        rng = random.Random(seed * 1_000_003 + index)
        while True:  # ends: the narrowest options give 45 problems, and 7 of 8 are not held out
            numbers, ops = self.draw(rng)
            if not is_held_out(problem_key(_chain(numbers, ops))):
                return _problem(index, numbers, ops)

    def test(self, n: int | None = None) -> list[Problem]:
        return list(_test_problems(self, TEST_SIZE if n is None else n))

    def prompt(self, problem: Problem, style: str) -> str:
        if style == "compact":
            return f"{problem.question} = ?\n<think>"
        if self.answer == "last":
            return instruct(f"What is {problem.question}? Answer with the integer alone.", style)
        task = (
            f"Work out the exact value of {problem.question}. Multiply before you add or subtract. "
            "Put your reasoning between <think> and </think>, and the resulting integer, without thousands separators, "
            "between <answer> and </answer>, for instance <answer>-42</answer>."
        )
        return instruct(task, style)

    def reword(self, problem: Problem, rng: random.Random) -> Problem:
        """The factors of each product and the terms of the sum in another order, a term without minus first."""
        numbers, ops = list(problem.meta["numbers"]), problem.meta["ops"]
        terms: list[tuple[str, list[int]]] = [("+", numbers[:1])]
        for op, number in zip(ops, numbers[1:], strict=True):
            if op == "*":
                terms[-1][1].append(number)
            else:
                terms.append((op, [number]))
        for _ in range(REWORDS):
            for _, factors in terms:
                rng.shuffle(factors)
            rng.shuffle(terms)
            terms.insert(0, terms.pop(next(i for i, (sign, _) in enumerate(terms) if sign == "+")))
            flat = [number for _, factors in terms for number in factors]
            signs = "".join(sign + "*" * (len(factors) - 1) for sign, factors in terms)[1:]
            if _chain(flat, signs) != problem.question:
                return _problem(problem.uid, flat, signs)
        return problem

    def grade(self, problem: Problem, response: str) -> Grade:
        if self.answer == "last":
            number = extract(response, "last_number")
            if number is None:
                return Grade(0.0, False, None, None, "no number")
            answer, value = number, read_number(number)
        else:
            tagged = last_answer(response)
            if tagged is None:
                return Grade(0.0, False, None, None, "no closed answer tag")
            answer, value = tagged, read_integer(tagged)
        if value is None:
            return Grade(0.0, False, answer, None, "not an integer")
        if value == int(problem.answer):
            return Grade(1.0, True, answer, str(value), "correct")
        return Grade(self.format_score, False, answer, str(value), f"wrong value {value}")

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """Supervised text in the compact format: every product, then every sum, from left to right, one operation per
        step: "12*6=72,37+485=522,522-72=450</think><answer>450</answer>".  Each problem has one: `rng` is not drawn."""
        steps, value = work_out(problem.meta["numbers"], problem.meta["ops"])
        return f"{','.join(steps)}</think><answer>{value}</answer>"


def work_out(numbers: Sequence[int], ops: str) -> tuple[list[str], int]:
    """(one "a+b=c" per operation, in the order of evaluation; the value of the chain)."""
    steps: list[str] = []
    terms, signs = [numbers[0]], [""]
    for op, number in zip(ops, numbers[1:], strict=True):
        if op == "*":
            steps.append(f"{terms[-1]}*{number}={terms[-1] * number}")
            terms[-1] *= number
        else:
            terms.append(number)
            signs.append(op)
    total = terms[0]
    for sign, term in zip(signs[1:], terms[1:], strict=True):
        value = total + term if sign == "+" else total - term
        steps.append(f"{total}{sign}{term}={value}")
        total = value
    return steps, total


@lru_cache(maxsize=8)
def _test_problems(task: Arithmetic, n: int) -> tuple[Problem, ...]:
    rng, problems, misses = random.Random(TEST_SEED), dict[str, Problem](), 0
    while len(problems) < n and misses < MAX_DRAWS:
        numbers, ops = task.draw(rng)
        key = problem_key(_chain(numbers, ops))
        misses += 1
        if key not in problems and is_held_out(key):
            problems[key] = _problem(len(problems), numbers, ops)
            misses = 0
    return tuple(problems.values())


def _chain(numbers: Sequence[int], ops: str) -> str:
    return str(numbers[0]) + "".join(f"{op}{number}" for op, number in zip(ops, numbers[1:], strict=True))


def _problem(uid: int, numbers: Sequence[int], ops: str) -> Problem:
    _, value = work_out(numbers, ops)
    return Problem(uid, _chain(numbers, ops), str(value), {"numbers": tuple(numbers), "ops": ops})
