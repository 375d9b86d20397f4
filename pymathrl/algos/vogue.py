"""VOGUE: exploration where two wordings of a prompt disagree, after "VOGUE: Guiding Exploration with Visual
Uncertainty" (arXiv 2510.01444), with words in the place of images.

Each response is drawn, and trained, behind one prompt: its problem as it is, or, with a probability that falls
linearly from --vogue-start to --vogue-end over the run, the same problem said otherwise (numbers or terms in another
order, other words around it; the paper: noise on the image). For the latter the same tokens are read once more behind
the plain prompt:

    U_t = (KL(p_plain,t || p_other,t) + KL(p_other,t || p_plain,t)) / 2        whole vocabulary, fp32
    A'_t = A + min(a_v U_t, |A| / b_v) + min(a_e H_t, |A| / b_e)               H_t: entropy of the policy there

A and the loss are GRPO's. U and H are constants. With b_v = b_e = 2 a negative A rises to 0 at most. The ratio of a row
is between two policies behind one and the same prompt.

No code was found. The four numbers are those of the public reviews; the 1/2 of U, the form of the caps and the numbers
of the annealing were not found and are ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymathrl.algos import grpo
from pymathrl.algos.algo import Algo
from pymathrl.batch import Batch, Graded, Rollout
from pymathrl.options import at_least, positive, share

if TYPE_CHECKING:
    from pymathrl.context import Context
    from pymathrl.prompt import Prompts
    from pymathrl.rollout import Draws
    from pymathrl.rollout.score import Scored
    from pymathrl.tasks import Problem


@dataclass(frozen=True)
class Config(grpo.Config):
    vogue_coef: float = at_least(0, 1.0, "a_v, factor of the disagreement U (paper: 1)")
    vogue_cap: float = positive(2.0, "b_v: that bonus is at most |A| / b_v (paper: 2)")
    vogue_entropy_coef: float = at_least(0, 0.4, "a_e, factor of the entropy H (paper: 0.4)")
    vogue_entropy_cap: float = positive(2.0, "b_e: that bonus is at most |A| / b_e (paper: 2)")
    vogue_start: float = share(0.5, "share of responses behind another wording at first (not found: ours)")
    vogue_end: float = share(0.0, "that share at the end of the run (not found: ours)")


def other_wording(ctx: Context, problem: Problem, uid: int) -> Problem:
    """The problem as the sample of this identity reads it, if it reads another wording."""
    return ctx.task.reword(problem, random.Random(f"vogue wording {ctx.train.seed} {uid}"))


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    own, seed = ctx.own, ctx.train.seed
    share = own.vogue_start + (own.vogue_end - own.vogue_start) * ctx.progress
    uids, ids = draws.uids(prompts.problems), []
    for number, uid in enumerate(uids.tolist()):
        problem, plain = prompts.problems[number // draws.samples], prompts.ids[number // draws.samples]
        reword = random.Random(f"vogue {seed} {uid}").random() < share
        other = ctx.encode(other_wording(ctx, problem, uid)) if reword else plain
        ids.append(other if len(other) <= ctx.train.max_prompt_tokens else plain)
    drawn = ctx.engine.generate(
        ids, 1, draws.max_new_tokens, uids=uids, seed=draws.seed, stop_strings=ctx.stop_strings, **draws.sampling
    )
    return replace(drawn, group=drawn.group // draws.samples)


def verify(ctx: Context, rollout: Rollout, prompts: Prompts) -> Graded:
    """Each row by the wording it read: a letter means the option that stood there."""
    behind_other, _ = reworded(ctx, rollout, prompts.problems)
    problems = [prompts.problems[p] for p in rollout.group.tolist()]
    uids = rollout.uid.tolist()
    read = [
        other_wording(ctx, problem, uid) if other else problem
        for problem, uid, other in zip(problems, uids, behind_other.tolist(), strict=True)
    ]
    alone = replace(rollout, group=torch.arange(rollout.rows, device=rollout.device))
    return replace(ctx.verify(alone, read), rollout=rollout, problems=prompts.problems)


def disagreement(a: Tensor, b: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of the softmax of logits a, b [N,V] -> fp32 [N]: sum of (p - q)(log p - log q) / 2,
    of which no term is negative."""
    p, q = torch.log_softmax(a.float(), -1), torch.log_softmax(b.float(), -1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2


def shaped(advantage: Tensor, uncertainty: Tensor, entropy: Tensor, config: Config) -> Tensor:
    size = advantage.abs()
    first = torch.minimum(config.vogue_coef * uncertainty, size / config.vogue_cap)
    return advantage + first + torch.minimum(config.vogue_entropy_coef * entropy, size / config.vogue_entropy_cap)


def _side_by_side(a: Iterator[Scored], b: Iterator[Scored]) -> Iterator[tuple[Scored, Scored]]:
    """Two walks over the same responses, whose pieces may be cut at different tokens, as pieces of the same tokens."""
    left, right = next(a, None), next(b, None)
    while left is not None and right is not None:
        n = min(left.at.numel(), right.at.numel())
        yield type(left)(*(x[:n] for x in left)), type(right)(*(x[:n] for x in right))
        left = type(left)(*(x[n:] for x in left)) if left.at.numel() > n else next(a, None)
        right = type(right)(*(x[n:] for x in right)) if right.at.numel() > n else next(b, None)


def reworded(ctx: Context, rollout: Rollout, problems: Sequence[Problem]) -> tuple[Tensor, list[list[int]]]:
    """(bool [B]: rows behind another prompt than their problem's own; those own prompts, of every row)."""
    own = [ctx.encode(problem) for problem in problems]
    plain = [own[p] for p in rollout.group.tolist()]
    ids, starts, sizes = rollout.ids.tolist(), rollout.offsets.tolist(), rollout.prompt_len.tolist()
    other = [ids[s : s + n] != prompt for s, n, prompt in zip(starts, sizes, plain, strict=False)]
    return torch.tensor(other, device=rollout.device), plain


def shape(ctx: Context, graded: Graded, batch: Batch) -> Batch:
    rollout = batch.rollout
    other, plain = reworded(ctx, rollout, graded.problems)
    active = rollout.row_sums((batch.advantage != 0).float()) > 0  # |A| = 0 has no bonus
    rows = (other & active).nonzero()[:, 0]
    mask = rollout.sampled_mask & rollout.per_token(other & active)
    uncertainty = torch.zeros_like(rollout.logp)
    if rows.numel():
        # the policies as they are: what a filter of the rollouts left would differ between the two prompts
        seen = replace(rollout, support_ids=None, support_offsets=None).select(rows)
        again = seen.with_prompts([plain[row] for row in rows.tolist()])
        parts = [
            disagreement(a.logits / ctx.train.temperature, b.logits / ctx.train.temperature)
            for a, b in _side_by_side(ctx.walk(again), ctx.walk(seen))
        ]
        uncertainty[mask] = torch.cat(parts)
        ctx.metrics["vogue/disagreement"] = float(uncertainty[mask].mean())
    ctx.metrics["vogue/reworded"] = float(other.float().mean())
    advantage = torch.where(mask, shaped(batch.advantage, uncertainty, rollout.entropy, ctx.own), batch.advantage)
    return replace(batch, advantage=advantage)


ALGO = Algo(
    name="vogue",
    summary="GRPO with a bonus where the policy answers differently when the prompt is said otherwise",
    paper="arXiv 2510.01444",
    config=Config,
    advantage=grpo.advantage,
    loss=grpo.loss,
    rollout=rollout,
    verify=verify,
    shape=shape,
)
