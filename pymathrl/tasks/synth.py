"""Problems that this package generates without end: ``synth:chain_sum``. Answers are exact, and boxed by default.

The families are in `families`. An answer has to be worked out: a text whose value is the answer, as the question itself
often is, earns nothing. Sums, products and fractions share their held-out problems with the task ``arithmetic``.
``synth:countdown`` is the task ``countdown``, and ``synth:puzzle24`` the same over the solvable problems of four cards
of 1 to 13 with the target 24: both are graded by their own rules, with the answer in its tag. The built-in model can
spell these two and, with answer="tag", chain_sum, mixed_arith, fraction_ops and sequence_next.
"""

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Any, ClassVar

from pymathrl.errors import UserError, nearest
from pymathrl.tasks.arithmetic import REWORDS
from pymathrl.tasks.countdown import Countdown, FileRows, Row, countdown, problem_key, solve
from pymathrl.tasks.expression import Binary, Invalid, Node, parse, render
from pymathrl.tasks.families import FAMILIES
from pymathrl.tasks.generated import Generated, checked_template, grade_text
from pymathrl.tasks.holdout import is_held_out
from pymathrl.tasks.problem import Check, Grade, Problem
from pymathrl.tasks.questions import without_clothes
from pymathrl.verify import Result
from pymathrl.verify.policy import Policy


@dataclass(frozen=True)
class Synth(Generated):
    """A family of `FAMILIES`; settings: its knobs."""

    prefix: ClassVar[str] = "synth"

    def draw(self, uid: int, rng: random.Random) -> Problem:
        drawn = FAMILIES[self.family].draw(rng, **dict(self.settings))
        return Problem(uid, drawn.question, drawn.gold, {"key": drawn.key or drawn.question, "base": drawn.base})

    def key(self, problem: Problem) -> str:
        key: str = problem.meta["key"]
        return key if key.startswith("arithmetic:") else f"{self.name}:{key}"

    def prompt(self, problem: Problem, style: str) -> str:
        family, question = FAMILIES[self.family], problem.question
        return self.template.prompt(question + family.tail if style == "compact" else family.lead + question, style)

    def reword(self, problem: Problem, rng: random.Random) -> Problem:
        """A formula with the operands of sums and products in another order, or other brackets; a text with a sentence
        in front. A sequence stays as it is."""
        if not FAMILIES[self.family].lead:
            return super().reword(problem, rng)
        node = parse(problem.question)
        if isinstance(node, Invalid):
            return problem
        for _ in range(REWORDS):
            text = render(_reordered(node, rng))
            if text != problem.question:
                return replace(problem, question=text)
        return problem

    def check(self, problem: Problem) -> Check:
        return Check((problem.answer,), self.mode, Policy(require_form="" if problem.meta["base"] else "evaluated"))

    def grade_result(self, problem: Problem, response: str, result: Result) -> Grade:
        base = problem.meta["base"]
        if not base or result.extracted is None:
            return super().grade_result(problem, response, result)
        said = without_clothes(result.extracted).replace("\\,", "").replace(" ", "").upper()
        said = said.removesuffix(f"_{base}").removesuffix(f"_{{{base}}}")
        return grade_text(problem.answer, said, result)


def _reordered(node: Node, rng: random.Random) -> Node:
    if not isinstance(node, Binary):
        return node
    left, right = _reordered(node.left, rng), _reordered(node.right, rng)
    swap = node.op in "+*" and rng.random() < 0.5
    return Binary(node.op, right, left) if swap else Binary(node.op, left, right)


def synth_task(
    family: str, *, answer: str = "template", template: str = "auto", format_score: float = 0.0, **knobs: int
) -> Synth:
    """The task of a family of `FAMILIES`; UserError for a knob that is out of its range."""
    name, known = f"synth:{family}", FAMILIES[family].knobs
    values = {knob: default for knob, (default, _, _) in known.items()} | knobs
    for knob, value in values.items():
        _, least, most = known[knob]
        if not least <= value <= most:
            raise UserError(f"task {name}: expected {least} <= {knob} <= {most}, got {value}")
    template = checked_template(name, answer, template, format_score)
    return Synth(family, tuple(values.items()), template, answer, format_score)


class Constructor:
    """Of the tasks of one family: its signature names the knobs of that family with their defaults."""

    def __init__(self, family: str) -> None:
        self.family = family
        common = [p for p in inspect.signature(synth_task).parameters.values() if p.kind is p.KEYWORD_ONLY]
        knobs = [
            inspect.Parameter(knob, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=int)
            for knob, (default, _, _) in FAMILIES[family].knobs.items()
        ]
        self.__signature__ = inspect.Signature(common + knobs)

    def __call__(self, **options: Any) -> Synth:
        return synth_task(self.family, **options)


def puzzle24(*, format_score: float = 0.1, allow_subset: bool = False) -> Countdown:
    """Countdown over the four cards of 1 to 13 from which 24 can be made with whole numbers on the way."""
    return Countdown(_cards(), format_score, allow_subset)


@lru_cache(maxsize=1)
def _cards() -> FileRows:
    rows = [
        Row(f"24:{number}", nums, 24)
        for number, nums in enumerate(combinations_with_replacement(range(1, 14), 4))
        if solve(nums, 24, limit=1)
    ]
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[is_held_out(problem_key(row.nums, row.target))].append(row)
    return FileRows("synth:puzzle24", tuple(sides[0]), tuple(sides[1]))


def constructor(family: str) -> Callable[..., Any]:
    """Of the tasks ``synth:FAMILY``; UserError where there is no such family."""
    others: dict[str, Callable[..., Any]] = {"countdown": countdown, "puzzle24": puzzle24}
    if family not in {**FAMILIES, **others}:
        raise UserError(f"task synth:{family}: unknown family: {nearest(family, [*FAMILIES, *others])}")
    return others[family] if family in others else Constructor(family)
