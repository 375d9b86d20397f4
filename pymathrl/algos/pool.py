"""A pool: a fixed set of problems that a run meets again and again, for algorithms that remember something of each.

A generated task never repeats a problem by itself, and a file gives a row another uid in every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymathrl.errors import UserError
from pymathrl.prompt import Prompts
from pymathrl.tasks import Problem

if TYPE_CHECKING:
    from pymathrl.context import Context


def identity(problem: Problem) -> str:
    """The same for a problem that a stream gives twice. An answer is one line, so no two problems share it."""
    return f"{problem.question}\n{problem.answer}"


class Pool:
    """The different problems among the first `size` elements of the task's stream, those whose prompts fit.

    problems [N], their prompts ids [N], and index: uid -> 0 .. N-1.
    """

    def __init__(self, ctx: Context, size: int) -> None:
        self.source = (ctx.task, size, ctx.train.max_prompt_tokens)
        found: dict[str, tuple[Problem, list[int]]] = {}
        too_long = 0
        for element in range(size):
            problem = ctx.task.train(element, ctx.train.seed)
            ids = ctx.encode(problem)
            if len(ids) > ctx.train.max_prompt_tokens:
                too_long += 1
            else:
                found.setdefault(identity(problem), (problem, ids))
        if not found:
            raise UserError(f"--pool {size}: every prompt exceeds --max-prompt-tokens; raise it")
        if too_long:
            ctx.note(f"pool: {too_long} of {size} prompts exceed --max-prompt-tokens and are left out")
        self.problems = [problem for problem, _ in found.values()]
        self.ids = [ids for _, ids in found.values()]
        self.index = {problem.uid: number for number, problem in enumerate(self.problems)}

    def __len__(self) -> int:
        return len(self.problems)

    def fits(self, ctx: Context, size: int) -> bool:
        """Whether it is still that of the stage: the next one of a schedule may have another task."""
        return self.source == (ctx.task, size, ctx.train.max_prompt_tokens)

    def prompts(self, numbers: Sequence[int], cursor: int = 0) -> Prompts:
        """The problems of these numbers, in this order."""
        return Prompts([self.problems[i] for i in numbers], [self.ids[i] for i in numbers], cursor)
