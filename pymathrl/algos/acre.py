"""ACRE: a reward for answers that a reasoning bears out again, after "Answer-Consistent Chain-of-thought Reinforcement
Learning" (arXiv 2510.10104); the part of it that needs no images.

A response's trace, what it wrote before its answer, is put behind the same problem said otherwise (options, numbers or
terms in another order, other words around it; never as it was), and the policy writes only the answer a~ anew:

    R = --acre-both    where a and a~ are right            1.0
        --acre-first   where only a is                     0.5
        --acre-second  where only a~ is                    0.2
        --acre-none    where neither is                    0.0         + the task's reward of a wrong answer, its format

a~ is graded by the reworded problem: options by their content, not by their letter. What the second pass draws is
never trained. A response without an answer tag is not asked again and has no a~; where a problem cannot be said
otherwise a~ is a. Advantages and loss are GRPO's.

Logged: acre/unchanged, the share of responses asked again whose two answers are the same (OSCR), and acre/agreement,
the share whose two answers are both right or both wrong, which stands for the agreement of trace and answer (CACR).

A sentence at the end of a thought that names a letter ("so B.") is not put again, as the letters then stand for other
options; one that names it further up, or a thought that is nothing but that sentence, fails by construction.

The coefficients of the four cases were not found and are ours; so is that a~ is the most probable answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos import grpo
from pymathrl.algos.algo import Algo
from pymathrl.batch import Graded
from pymathrl.errors import UserError
from pymathrl.options import option, positive
from pymathrl.tasks import Grade
from pymathrl.tasks.questions import LETTERS
from pymathrl.verify.extract import CLOSE, END_OF_THOUGHT, OPEN

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config(grpo.Config):
    acre_both: float = option(1.0, "reward where the answer and the second one are right (not found: ours)")
    acre_first: float = option(0.5, "reward where only the answer is right (not found: ours)")
    acre_second: float = option(0.2, "reward where only the second answer is right (not found: ours)")
    acre_none: float = option(0.0, "reward where neither answer is right (not found: ours)")
    acre_tokens: int = positive(48, "length limit of the second answer, in tokens (not found: ours)")


def trace_of(text: str) -> str | None:
    """What a response says before its last closed answer; None where it has none."""
    close = text.rfind(CLOSE)
    begin = text.rfind(OPEN, 0, max(close, 0))
    return None if begin < 0 else text[:begin]


def without_letter(trace: str, options: int) -> str:
    """The trace without the sentence that ends its thought, if that names the letter of one of so many options and is
    not all of it, and without what else stands between thought and answer then."""
    thought, mark, _ = trace.rpartition(END_OF_THOUGHT) if END_OF_THOUGHT in trace else (trace, "", "")
    body = thought.rstrip(" \n.!?")
    begin = max((m.end() for m in re.finditer(r"[.!?] |\n", body)), default=0)
    named = re.search(rf"\b[{LETTERS[:options]}]\b", body[begin:])
    return thought[:begin] + mark if named and body[:begin].strip() else trace


def reward(first: Tensor, second: Tensor, config: Config) -> Tensor:
    """first, second bool [B] -> fp32 [B]."""
    alone = torch.where(first, config.acre_first, torch.where(second, config.acre_second, config.acre_none))
    return torch.where(first & second, config.acre_both, alone)


def second_answers(ctx: Context, graded: Graded) -> Sequence[Grade | None]:
    """[B] the grade of each row's a~; None where there is none."""
    seed = ctx.train.seed
    grades: list[Grade | None] = [None] * len(graded.texts)
    asked: dict[tuple[int, str], list[int]] = {}  # equal responses to one problem are asked once
    for row, (group, text) in enumerate(zip(graded.rollout.group.tolist(), graded.texts, strict=True)):
        trace = trace_of(text)
        if trace is not None:
            options = len(graded.problems[group].meta.get("options", ()))
            asked.setdefault((group, without_letter(trace, options) if options else trace), []).append(row)
    room = ctx.policy.config.max_positions - ctx.own.acre_tokens
    problems, traces, prompts, rows = [], [], [], []
    for (group, trace), same in asked.items():
        problem = graded.problems[group]
        other = ctx.task.reword(problem, random.Random(f"acre {seed} {problem.uid} {trace}"))
        prompt = [*ctx.encode(other), *ctx.tokens(trace + OPEN)]
        if other is problem or len(prompt) > room:
            for row in same:
                grades[row] = graded.grades[row]
            continue
        problems.append(other)
        traces.append(trace)
        prompts.append(prompt)
        rows.append(same)
    if prompts:
        again = ctx.engine.generate(prompts, 1, ctx.own.acre_tokens, temperature=0.0, stop_strings=(CLOSE,))
        ctx.at.tokens += int(again.sampled_mask.sum())
        texts = ctx.policy.tokenizer.decode_batch([again.response(row).tolist() for row in range(again.rows)])
        for problem, trace, text, same in zip(problems, traces, texts, rows, strict=True):
            grade = ctx.task.grade(problem, trace + OPEN + text)
            for row in same:
                grades[row] = grade
    return grades


def judge(ctx: Context, graded: Graded) -> Graded:
    grades = second_answers(ctx, graded)
    second = torch.tensor([g is not None and g.correct for g in grades], device=graded.reward.device)
    both = [(a, b) for a, b in zip(graded.grades, grades, strict=True) if b is not None]
    if both:
        ctx.metrics |= {
            "acre/unchanged": sum(a.canonical == b.canonical and a.answer is not None for a, b in both) / len(both),
            "acre/agreement": sum(a.correct == b.correct for a, b in both) / len(both),
            "acre/second_accuracy": sum(b.correct for _, b in both) / len(both),
        }  # fmt: skip
    form = torch.where(graded.correct, 0.0, graded.reward)
    return replace(graded, reward=reward(graded.correct, second, ctx.own) + form)


def check(train: TrainConfig, own: Any) -> None:
    if not own.acre_both >= own.acre_first >= own.acre_second >= own.acre_none:
        raise UserError(
            "expected --acre-both >= --acre-first >= --acre-second >= --acre-none, got "
            f"{own.acre_both}, {own.acre_first}, {own.acre_second}, {own.acre_none}"
        )


ALGO = Algo(
    name="acre",
    summary="GRPO with more reward where the reasoning gives the right answer again to the problem said otherwise",
    paper="arXiv 2510.10104",
    config=Config,
    advantage=grpo.advantage,
    loss=grpo.loss,
    check=check,
    judge=judge,
)
