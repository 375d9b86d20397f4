"""Countdown: write an expression that uses every given number exactly once and equals the target.

The task of ROVER (arXiv 2509.24981) and, before it, TinyZero: 3 or 4 integers in 1..99, targets 10..100, operations
+ - * /.  Problems are generated (always solvable, by construction) or read from a JSONL file of
``{"nums": [79, 17, 60], "target": 36}`` rows with an optional ``"id"`` and ``"hint"``.

Grading differs from the public ROVER scorer, which evaluates the answer as code after a character filter: there
``2**3``, ``7//2`` and ``3.7*10`` (with numbers 3, 7, 10) count as correct, and an answer followed by a line break is
not found.  Here only the grammar of `expression` exists and the whole response is read.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from pymathrl.errors import UserError
from pymathrl.tasks.expression import (
    MAX_LITERALS,
    Binary,
    Invalid,
    Literal,
    Node,
    canonical,
    evaluate,
    literals,
    parse,
    render,
)
from pymathrl.tasks.holdout import TEST_SEED, held_out_keys, is_held_out
from pymathrl.tasks.jsonl import fail, read_hint, read_objects, shuffled
from pymathrl.tasks.problem import Grade, Problem
from pymathrl.tasks.prompt_style import instruct
from pymathrl.verify.extract import last_answer

MAX_DRAWS = 100_000  # redraws before the generator gives up (about 1 s): ranges that cannot be met must not hang
MAX_REPEATS = 1_000  # draws in a row that are in the test set already: the ranges hold no more problems
TEST_SIZE = 1_024  # problems in the generated test set, unless a caller asks for another number
MAX_NUMBER = 10**9  # of a file's nums, so that an expression of 12 numbers fits the 256 characters of the parser
EXHAUSTIVE_NUMBERS = 4  # up to so many numbers `solution` enumerates all solutions (about 0.3 ms for 4)
SEARCHED_NUMBERS = 6  # up to so many it searches for one (about 20 ms for 6, tenfold per number more)
ROVER_TOLERANCE = Fraction(1, 100_000)


def problem_key(nums: Sequence[int], target: int) -> str:
    """The identity of a problem: order of the numbers does not matter."""
    return f"countdown:{','.join(map(str, sorted(nums)))}->{target}"


# ---- problems ----------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where the problems come from: see `Task.train` and `Task.test` for what the two promise."""

    def train(self, index: int, seed: int) -> Problem: ...

    def test(self, n: int | None) -> list[Problem]: ...


@dataclass(frozen=True)
class Generator:
    """Random solvable problems: nmin..nmax numbers in lo..hi, target in tlo..thi (all bounds included)."""

    nmin: int = 3
    nmax: int = 4
    lo: int = 1
    hi: int = 99
    tlo: int = 10
    thi: int = 100

    def __post_init__(self) -> None:
        for low, high, least, most in (
            ("nmin", "nmax", 1, MAX_LITERALS),
            ("lo", "hi", 0, MAX_NUMBER),
            ("tlo", "thi", 0, MAX_NUMBER),
        ):
            a, b = getattr(self, low), getattr(self, high)
            if not least <= a <= b <= most:
                raise UserError(f"countdown: expected {least} <= {low} <= {high} <= {most}, got {low}={a}, {high}={b}")

    def draw(self, rng: random.Random, held_out: bool | None = None) -> tuple[list[int], int, Node]:
        """(nums, target, a solution): joins random pairs by random operations that keep a nonnegative integer, until
        the target is in range and, if `held_out` is given, the problem is (True) or is not (False) held out."""
        for _ in range(MAX_DRAWS):
            n = rng.randint(self.nmin, self.nmax)
            nums = [rng.randint(self.lo, self.hi) for _ in range(n)]
            pool: list[tuple[int, Node]] = [(value, Literal(value)) for value in nums]
            while len(pool) > 1:
                a = pool.pop(rng.randrange(len(pool)))
                b = pool.pop(rng.randrange(len(pool)))
                op = rng.choice("+-*/")
                if op == "-" and a[0] < b[0]:
                    a, b = b, a
                if op == "/" and (b[0] == 0 or a[0] % b[0]):
                    op = "+"
                pool.append((_apply(op, a[0], b[0]), Binary(op, a[1], b[1])))
            target, solution = pool[0]
            if self.tlo <= target <= self.thi and held_out in (None, is_held_out(problem_key(nums, target))):
                return nums, target, solution
        side = {None: "problem", False: "training problem", True: "test problem"}[held_out]
        raise UserError(f"countdown: no {side} in {MAX_DRAWS} draws of {self}; widen lo..hi, tlo..thi or nmin..nmax")

    def train(self, index: int, seed: int) -> Problem:
        nums, target, solution = self.draw(_stream(seed, index), held_out=False)
        return _problem(index, nums, target, solution=render(solution))

    def test(self, n: int | None) -> list[Problem]:
        return list(_test_problems(self, TEST_SIZE if n is None else n))


def _stream(seed: int, index: int) -> random.Random:
    return random.Random(seed * 1_000_003 + index)


def generate(generator: Generator, seed: int, index: int) -> tuple[list[int], int, Node]:
    """The stream before anything is held out: (nums, target, a solution).  Fixed by CPython's `random`."""
    return generator.draw(_stream(seed, index))


@lru_cache(maxsize=8)
def _test_problems(generator: Generator, n: int) -> tuple[Problem, ...]:
    rng, problems, repeats = random.Random(TEST_SEED), dict[str, Problem](), 0
    while len(problems) < n and repeats < MAX_REPEATS:
        nums, target, solution = generator.draw(rng, held_out=True)
        key = problem_key(nums, target)
        repeats = repeats + 1 if key in problems else 0
        if not repeats:
            problems[key] = _problem(len(problems), nums, target, solution=render(solution))
    return tuple(problems.values())


@dataclass(frozen=True)
class Row:
    """One row of a file.  name: its "id", else "<file>:<line>".  hint: a text for who cannot solve it, or ""."""

    name: str
    nums: tuple[int, ...]
    target: int
    hint: str = ""


@dataclass(frozen=True)
class FileRows:
    """The rows of a JSONL file, split once: `train_rows` and `test_rows` share no problem (numbers in any order).

    Rows that repeat a problem are kept, all on the same side.  A stream visits each training row once per epoch, in an
    order that depends on the seed and the epoch only.
    """

    path: str
    train_rows: tuple[Row, ...]
    test_rows: tuple[Row, ...]

    def train(self, index: int, seed: int) -> Problem:
        if not self.train_rows:
            raise UserError(f"{self.path}: no row is left to train on; use split='hash' and two or more distinct rows")
        epoch, position = divmod(index, len(self.train_rows))
        return _row_problem(index, self.train_rows[shuffled(len(self.train_rows), seed, epoch)[position]])

    def test(self, n: int | None) -> list[Problem]:
        return [_row_problem(uid, row) for uid, row in enumerate(self.test_rows[:n])]


def read_rows(path: str | Path, split: str) -> FileRows:
    """split "hash": `held_out_keys` decides (about 1/8 of the problems, at least one).
    split "all": every row is a test row, in the order of the file, and there is nothing to train on."""
    if split not in ("hash", "all"):
        raise UserError(f"countdown: split must be 'hash' or 'all', got {split!r}")
    rows, line_of_id = [], dict[str, int]()
    for line, item in read_objects(path):
        nums, target = _read_nums(path, line, item), _read_target(path, line, item)
        name = _read_id(path, line, item)
        if name is not None and line_of_id.setdefault(name, line) != line:
            fail(path, line, item, "id", f"unique (line {line_of_id[name]} has it too)")
        rows.append(Row(name or f"{Path(path).name}:{line}", nums, target, read_hint(path, line, item)))
    if split == "all":
        return FileRows(str(path), (), tuple(rows))
    held_out = held_out_keys(problem_key(row.nums, row.target) for row in rows)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[problem_key(row.nums, row.target) in held_out].append(row)
    return FileRows(str(path), tuple(sides[0]), tuple(sides[1]))


def _read_nums(path: str | Path, line: int, item: dict[str, Any]) -> tuple[int, ...]:
    nums = item.get("nums")
    if (
        not isinstance(nums, list)
        or not 1 <= len(nums) <= MAX_LITERALS
        or not all(type(value) is int and 0 <= value <= MAX_NUMBER for value in nums)  # type: bool is no number here
    ):
        fail(path, line, item, "nums", f"a list of 1 to {MAX_LITERALS} integers in 0..{MAX_NUMBER}")
    return tuple(nums)


def _read_target(path: str | Path, line: int, item: dict[str, Any]) -> int:
    target = item.get("target")
    if type(target) is not int:
        fail(path, line, item, "target", "an integer")
    return target


def _read_id(path: str | Path, line: int, item: dict[str, Any]) -> str | None:
    if "id" not in item:
        return None
    name = item["id"]
    if type(name) not in (int, str) or name == "":
        fail(path, line, item, "id", "a non-empty string or an integer")
    return str(name)


def _problem(uid: int, nums: Sequence[int], target: int, **meta: Any) -> Problem:
    question = f"{' '.join(map(str, nums))} -> {target}"
    return Problem(uid, question, str(target), {"nums": tuple(nums), "target": target, **meta})


def _row_problem(uid: int, row: Row) -> Problem:
    return _problem(uid, row.nums, row.target, id=row.name, **({"hint": row.hint} if row.hint else {}))


# ---- solutions ---------------------------------------------------------------------------------------------------


def solve(
    nums: Sequence[int], target: int, limit: int | None = None, rng: random.Random | None = None
) -> dict[str, Node]:
    """Distinct solutions with nonnegative integers at every step and exact divisions: canonical form -> tree.

    Stops after `limit` of them; None finds all.  The search joins pairs of numbers depth first.  Its time has no bound:
    about 0.3 ms for 4 numbers, and 20 to 50 times more for each further one.  With `rng` it visits the pairs in random
    order, so `limit=1` gives a random solution, though not uniformly: the more orders of steps lead to a solution, the
    more often it comes first.
    """
    found: dict[str, Node] = {}
    for tree in _search([(value, Literal(value)) for value in nums], target, rng):
        found.setdefault(canonical(tree) or "", tree)
        if len(found) == limit:
            break
    return found


def _search(pool: list[tuple[int, Node]], target: int, rng: random.Random | None) -> Iterator[Node]:
    if len(pool) == 1:
        if pool[0][0] == target:
            yield pool[0][1]
        return
    pairs = [(i, j) for j in range(len(pool)) for i in range(j)]
    if rng:
        rng.shuffle(pairs)
    for i, j in pairs:
        a, b = pool[i], pool[j]
        joins = _joins(a[0], b[0])
        if rng:
            rng.shuffle(joins)
        rest = [pool[k] for k in range(len(pool)) if k not in (i, j)]
        for op, value, swapped in joins:
            if rest or value == target:  # builds no tree for a last step that misses
                tree = Binary(op, b[1], a[1]) if swapped else Binary(op, a[1], b[1])
                yield from _search([*rest, (value, tree)], target, rng)


def _joins(a: int, b: int) -> list[tuple[str, int, bool]]:
    """(operation, result, operands swapped) of every step that stays in the nonnegative integers; the larger operand
    of + and * comes first, which leaves a learner one habit for all four operations."""
    joins = [("+", a + b, a < b), ("*", a * b, a < b)]
    for x, y, swapped in ((a, b, False), (b, a, True)):
        if x >= y:
            joins.append(("-", x - y, swapped))
        if y and x % y == 0:
            joins.append(("/", x // y, swapped))
    return joins


def _apply(op: str, a: int, b: int) -> int:
    """One step in the integers; a division must be exact."""
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    return a * b if op == "*" else a // b


def _steps(tree: Node, out: list[str]) -> int:
    """Appends one "a+b=c" per operation, operands before their results; returns the value."""
    if isinstance(tree, Literal):
        return tree.value
    assert isinstance(tree, Binary), tree
    a, b = _steps(tree.left, out), _steps(tree.right, out)
    value = _apply(tree.op, a, b)
    out.append(f"{a}{tree.op}{b}={value}")
    return value


def solution_text(tree: Node) -> str:
    """A response that starts inside ``<think>``: "79-60=19,19+17=36</think><answer>(79-60)+17</answer>"."""
    steps: list[str] = []
    _steps(tree, steps)
    return f"{','.join(steps)}</think><answer>{render(tree)}</answer>"


# ---- the task ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Countdown:
    """The Countdown task over a source of problems; see `tasks.Task` for the methods.

    format_score: reward of a well-formed wrong answer, which parses and uses the numbers as asked; 0 pays for
        correctness only.  ROVER's code pays 0.1 (its paper says the reward is 0 or 1).
    allow_subset: numbers may be left unused.
    compat: "exact", or "rover" for the text rules of the ROVER scorer: the last line only, any closed tag in it earns
        `format_score`, only ASCII ``0-9+-*/().`` and spaces, within 1e-5 of the target.  Answers are still evaluated by
        our parser, so powers, floor divisions and decimal points never count as correct.
    """

    source: Source
    format_score: float = 0.1
    allow_subset: bool = False
    compat: str = "exact"
    name: str = field(default="countdown", init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.format_score < 1:
            raise UserError(f"countdown: format_score must be in [0, 1), got {self.format_score}")
        if self.compat not in ("exact", "rover"):
            raise UserError(f"countdown: compat must be 'exact' or 'rover', got {self.compat!r}")

    def train(self, index: int, seed: int) -> Problem:
        return self.source.train(index, seed)

    def test(self, n: int | None = None) -> list[Problem]:
        return self.source.test(n)

    def prompt(self, problem: Problem, style: str) -> str:
        if style == "compact":
            return f"{problem.question}\n<think>"
        nums, target = list(problem.meta["nums"]), problem.meta["target"]
        task = (
            f"Here is a list of numbers: {nums}. Combine them into one arithmetic expression whose value is {target}. "
            "The operations allowed are +, -, * and /, brackets are fine, and every number has to appear exactly once. "
            "Put your reasoning between <think> and </think>, and the finished expression between <answer> and "
            "</answer>, for instance <answer>(1 + 2) / 3</answer>."
        )
        return instruct(task, style)

    def reword(self, problem: Problem, rng: random.Random) -> Problem:
        """The numbers in another order."""
        nums, rest = list(problem.meta["nums"]), dict(problem.meta)
        if len(set(nums)) == 1:
            return problem
        while tuple(nums) == problem.meta["nums"]:
            rng.shuffle(nums)
        del rest["nums"], rest["target"]
        return _problem(problem.uid, nums, problem.meta["target"], **rest)

    def grade(self, problem: Problem, response: str) -> Grade:
        rover = self.compat == "rover"
        answer = last_answer(response.rsplit("\n", 1)[-1], after_thought=False) if rover else last_answer(response)
        if answer is None:
            return Grade(0.0, False, None, None, "no closed answer tag")
        node = parse(answer)
        malformed = self.format_score if rover else 0.0
        if isinstance(node, Invalid):
            return Grade(malformed, False, answer, None, f"not an expression: {node.reason}")
        form = canonical(node)
        if rover and not answer.isascii():
            return Grade(malformed, False, answer, form, "not an expression: characters outside ASCII")
        used, given = Counter(literals(node)), Counter(problem.meta["nums"])
        if used != given and not (self.allow_subset and used <= given):
            return Grade(malformed, False, answer, form, "does not use the given numbers exactly once each")
        value = evaluate(node)
        if value is None:
            return Grade(malformed, False, answer, form, "division by zero")
        error = abs(value - problem.meta["target"])
        if error == 0 or (rover and error < ROVER_TOLERANCE):
            return Grade(1.0, True, answer, form, "correct")
        return Grade(self.format_score, False, answer, form, f"wrong value {value}")

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """Supervised text in the compact format: up to 4 numbers, uniform over the distinct solutions of `solve`; more,
        the generator's own solution or, for a row of a file, the first hit of a random search.
        UserError where there is none: a row may be unsolvable, need fractions, or have more than 6 numbers."""
        nums, target = problem.meta["nums"], problem.meta["target"]
        if len(nums) <= EXHAUSTIVE_NUMBERS:
            found = list(solve(nums, target).values())
        elif "solution" in problem.meta:
            own = parse(problem.meta["solution"])
            found = [] if isinstance(own, Invalid) else [own]
        elif len(nums) <= SEARCHED_NUMBERS:
            found = list(solve(nums, target, limit=1, rng=rng).values())
        else:
            found = []
        if not found:
            raise UserError(
                f"countdown: cannot write a solution of {problem.question}; expected a problem that is solvable with "
                f"integer steps, with at most {SEARCHED_NUMBERS} numbers if it comes from a file"
            )
        return solution_text(rng.choice(found))


def countdown(
    *,
    nmin: int = 3,
    nmax: int = 4,
    lo: int = 1,
    hi: int = 99,
    tlo: int = 10,
    thi: int = 100,
    format_score: float = 0.1,
    allow_subset: bool = False,
    compat: str = "exact",
) -> Countdown:
    """Generated problems; the meaning of the options is in `Generator` and `Countdown`."""
    return Countdown(Generator(nmin, nmax, lo, hi, tlo, thi), format_score, allow_subset, compat)


def countdown_file(
    path: str | Path,
    *,
    split: str = "hash",
    format_score: float = 0.1,
    allow_subset: bool = False,
    compat: str = "exact",
) -> Countdown:
    """Problems of a JSONL file; the meaning of the options is in `read_rows` and `Countdown`."""
    return Countdown(read_rows(path, split), format_score, allow_subset, compat)
