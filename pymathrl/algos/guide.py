"""Guide-GRPO: hints for the problems that the policy fails, after "Adaptive Guidance Accelerates Reinforcement Learning
of Reasoning Models" (arXiv 2506.13923).

A group with at most --guide-threshold right answers is drawn again, under a prompt with a hint h; the other groups are
GRPO's. What was drawn with the hint is trained without it, for the policy is to do without:

    r_t = pi(y_t | q, y_<t) / pi_old(y_t | q + h, y_<t)            --guide-ratio plain_over_hinted
          pi / pi_old, both behind q + h                                         hinted_over_hinted
          pi / pi_old, both behind q: 1 at the first optimizer step              none
    A, loss as in GRPO, over the hinted responses alone (--guide-rows guided_only) or with the failed ones (union)

So r is not 1 at the first optimizer step, and the clip acts on one side: where the hint alone made a token likely
(r < 1 - clip_low), A > 0 leaves it a gradient scaled by the small r, A < 0 none at all. A KL to a reference policy
speaks of the context that is trained: the plain one. A problem without a right answer in either draw is dropped for the
step: its first responses stay in the counts, their factor is 0.

The hint is the field "hint" of a problem's row; else the first half of the task's worked solution, at least one step
of it and never the last one. A problem without either stays as it is. Evaluations never see hints. The built-in model
finds its thought begun with the hint: then the hint is part of y, with pi_old = 1 behind q + h. (Training what follows
alone teaches it to leave out steps: pass@1 26.0 -> 28.4 % in 20 steps.)

Only the abstract and public reviews of the paper were found: the ratio and the trigger are its statements, the options,
the group of the hinted rows (as many as the first) and the words of the hint are ours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos import grpo
from pymathrl.algos.algo import Algo
from pymathrl.batch import ROLE_SAMPLED, Batch, Graded, Rollout
from pymathrl.errors import UserError
from pymathrl.options import at_least, option
from pymathrl.prompt import Prompts
from pymathrl.verify.extract import END_OF_THOUGHT

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context
    from pymathrl.tasks import Problem, Task


@dataclass(frozen=True)
class Config(grpo.Config):
    guide_threshold: int = at_least(0, 0, "right answers of a group up to which its hint is used (paper: all fail)")
    guide_rows: str = option(
        "guided_only", "responses that make the group of a hinted problem: the hinted ones, or also the failed ones "
        "(not found: ours)", choices=("guided_only", "union"),
    )  # fmt: skip
    guide_ratio: str = option(
        "plain_over_hinted", "contexts of the ratio of hinted responses, see the table; the others are ablations",
        choices=("plain_over_hinted", "hinted_over_hinted", "none"),
    )  # fmt: skip


def check(train: TrainConfig, own: Any) -> None:
    if train.old_logp == "recompute":
        raise UserError(
            "--old-logp recompute: the log-probs of hinted responses are those of the sampler, with the hint before "
            "them; a second pass, after the exchange of the prompts, would lose them; leave it at sampler"
        )
    if train.top_k or train.top_p < 1 or train.min_p:
        raise UserError(
            "--top-k, --top-p and --min-p cannot be used with --algo guide: the tokens that they leave behind a hint "
            "need not be among those behind the plain prompt"
        )


def hint_of(task: Task, problem: Problem, style: str, seed: int) -> str:
    """The text shown with a problem, "" where there is none."""
    if "hint" in problem.meta:
        return f"Hint: {problem.meta['hint']}" if style != "compact" else str(problem.meta["hint"])
    try:
        solution = task.solution(problem, random.Random(f"hint {seed} {problem.uid}"))
    except UserError:  # a row of a file that nobody can solve
        return ""
    worked = problem.meta.get("worked", solution.partition(END_OF_THOUGHT)[0])
    separator = "\n" if "worked" in problem.meta else ","
    steps = [step for step in worked.split(separator) if step.strip()]
    begin = separator.join(steps[: max(1, len(steps) // 2)]) if len(steps) > 1 else ""
    if not begin or style == "compact":
        return begin + separator if begin else ""
    return f"Hint: a solution may begin like this: {begin}"


def judge(ctx: Context, graded: Graded) -> Graded:
    own, style = ctx.own, ctx.policy.prompt_style
    right = torch.zeros(graded.groups, device=graded.reward.device).index_add_(
        0, graded.rollout.group, graded.correct.float()
    )
    failed = (right <= own.guide_threshold).nonzero()[:, 0].tolist()
    hints = {p: hint_of(ctx.task, graded.problems[p], style, ctx.train.seed) for p in failed}
    ids = {p: ctx.encode(graded.problems[p], note) for p, note in hints.items() if note}
    ids = {p: prompt for p, prompt in ids.items() if len(prompt) <= ctx.train.max_prompt_tokens}
    keep = torch.ones_like(graded.rollout.logp)
    dropped = 0
    if ids:
        problems = [graded.problems[p] for p in ids]
        # the first responses of these problems were samples 0 .. G-1
        draws = replace(ctx.draws, first=ctx.draws.samples)
        guided = ctx.verify(ctx.generate(Prompts(problems, list(ids.values())), draws), problems)
        ctx.at.tokens += int(guided.rollout.sampled_mask.sum())
        solved = (guided.accuracy > 0).tolist()
        dropped = len(solved) - sum(solved)
        graded, keep = merge(ctx, graded, guided, dict(zip(ids, solved, strict=True)))
    ctx.metrics |= {
        "guide/failed": len(failed), "guide/hinted": len(ids), "guide/solved": len(ids) - dropped,
        "guide/first_accuracy": float(right.sum()) / max(1, ctx.draws.samples * len(graded.problems)),
    }  # fmt: skip
    return replace(graded, extra={**graded.extra, "guide_keep": keep})


def without_hint(rollout: Rollout, plain: Sequence[Sequence[int]]) -> Rollout:
    """The responses behind their problems' plain prompts [P], with the log-probs that they had behind the hint. A hint
    that stands behind the whole plain prompt begins the response: for sure, so with log-prob 0."""
    groups = rollout.group.tolist()
    ids, starts = rollout.ids.tolist(), rollout.offsets.tolist()
    if any(ids[s : s + len(plain[p])] != list(plain[p]) for s, p in zip(starts, groups, strict=False)):
        return rollout.with_prompts([plain[p] for p in groups])
    size = torch.tensor([len(plain[p]) for p in groups], device=rollout.device)
    position = torch.arange(rollout.tokens, device=rollout.device) - rollout.per_token(rollout.offsets[:-1])
    role = torch.where(position < rollout.per_token(size), rollout.role, ROLE_SAMPLED).to(torch.int8)
    return replace(rollout, role=role, prompt_len=size)


def merge(ctx: Context, plain: Graded, guided: Graded, solved: dict[int, bool]) -> tuple[Graded, Tensor]:
    """(the groups with hinted responses where these solved the problem, fp32 [T] 0 at the tokens of those dropped).
    solved: group of `plain` -> whether its hint helped, in the order of the groups of `guided`."""
    rollout = guided.rollout
    if ctx.own.guide_ratio != "hinted_over_hinted":
        rollout = without_hint(rollout, [ctx.encode(problem) for problem in guided.problems])
    if ctx.own.guide_ratio == "none":
        score = ctx.score(rollout)
        rollout = replace(rollout, logp=score.logp, mean_logp=score.mean_logp, entropy=score.entropy)
    rows: list[int] = []
    group: list[int] = []
    keep: list[bool] = []
    number = {p: n for n, p in enumerate(solved)}
    guided_rows = list(pairwise(rollout.group_offsets.tolist()))
    for p, (begin, end) in enumerate(pairwise(plain.rollout.group_offsets.tolist())):
        chosen = [] if solved.get(p) and ctx.own.guide_rows == "guided_only" else list(range(begin, end))
        if solved.get(p):
            chosen += [plain.rollout.rows + row for row in range(*guided_rows[number[p]])]
        rows += chosen
        group += [p] * len(chosen)
        keep += [solved.get(p, True) or bool(plain.correct[begin:end].any())] * len(chosen)
    both = Rollout.concat([plain.rollout, rollout]).select(rows)
    both = replace(both, group=torch.tensor(group, device=both.device))
    at = torch.tensor(rows, device=both.device)
    pick = lambda a, b: torch.cat([a, b])[at]
    listed = lambda a, b: _picked([*a, *b], rows)
    graded = Graded(
        both, plain.problems, pick(plain.reward, guided.reward), pick(plain.correct, guided.correct),
        listed(plain.grades, guided.grades), listed(plain.texts, guided.texts),
    )  # fmt: skip
    return graded, both.per_token(torch.tensor(keep, device=both.device).float())


def _picked(values: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    return [values[row] for row in rows]


def shape(ctx: Context, graded: Graded, batch: Batch) -> Batch:
    return replace(batch, coef=batch.coef * batch.extra["guide_keep"])


ALGO = Algo(
    name="guide",
    summary="GRPO with hints for the problems that fail, trained without the hint",
    paper="arXiv 2506.13923",
    config=Config,
    advantage=grpo.advantage,
    loss=grpo.loss,
    check=check,
    judge=judge,
    shape=shape,
)
