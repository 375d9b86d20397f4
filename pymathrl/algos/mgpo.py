"""MGPO: GRPO weighted towards problems that the policy solves half of the time, after the VibeThinker-1.5B report
(Xu et al., arXiv 2511.06221, section 3); long2short after that of VibeThinker-3B (section 2).

    p = share of right answers of the group,   D = p ln(p / p0) + (1 - p) ln((1 - p) / (1 - p0)),   0 ln 0 = 0
    A = exp(-lambda D) (R - mean of the group) / (std of the group + eps)        lambda = 0: GRPO, bit for bit
    L = mean over responses of (mean over its tokens of PPO's clipped term)
    --long2short c   among the right answers of a group, s = 1 / length:  R += c (s - mean s) / max |s - mean s|

p counts right answers whatever the reward is; the weight is a constant and is not renormalised over the batch. The
change of R by long2short sums to 0 over the right answers, and is 0 where their lengths are equal.

Not published, so that the defaults are ours: lambda, the clip range, the group size, the learning rate. Left out: that
right answers of low probability be raised, for which the text gives no term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import SEQ_MEAN, clip_high, clip_low, clip_terms, group_scores
from pymathrl.batch import Graded
from pymathrl.options import at_least, option, positive

if TYPE_CHECKING:
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    mgpo_lambda: float = at_least(0, 1.0, "sharpness of the weight; 0 = GRPO (not published; ours)")
    mgpo_p0: float = option(0.5, "accuracy of the largest weight (report: 0.5)", check=lambda v: 0 < v < 1,
                            expected="between 0 and 1")  # fmt: skip
    long2short: float = at_least(0, 0.0, "reward that moves from long right answers to short ones; 0 = off (3B: 0.2)")
    clip_low: float = clip_low(0.2, "not published; ours")
    clip_high: float = clip_high(0.2, "not published; ours")
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6)")


def weight(accuracy: Tensor, sharpness: float, p0: float) -> Tensor:
    """accuracy [P] -> [P], 1 at p0. xlogy gives 0 ln 0 = 0."""
    p, q = accuracy, 1 - accuracy
    distance = torch.xlogy(p, p) - p * math.log(p0) + torch.xlogy(q, q) - q * math.log(1 - p0)
    return torch.exp(-sharpness * distance)


def short_bonus(correct: Tensor, length: Tensor, offsets: Tensor) -> Tensor:
    """correct bool [B], length [B] tokens, groups at offsets [P+1] -> fp32 [B] in [-1, 1], 0 for wrong answers."""
    groups = offsets.numel() - 1
    group = torch.repeat_interleave(torch.arange(groups, device=length.device), offsets.diff())[correct]
    short = 1 / length[correct].double()
    zero = short.new_zeros(groups)
    count = zero.index_add(0, group, torch.ones_like(short))
    gap = short - (zero.index_add(0, group, short) / count)[group]
    gap = torch.where(gap.abs() <= 1e-12, 0.0, gap)  # three of length 5: their mean is not 1/5 in the last bit
    most = zero.scatter_reduce(0, group, gap.abs(), "amax")[group]
    bonus = torch.zeros(length.numel(), device=length.device)
    bonus[correct] = torch.where(most > 0, gap / most, 0.0).float()
    return bonus


def judge(ctx: Context, graded: Graded) -> Graded:
    if not ctx.own.long2short:
        return graded
    rollout = graded.rollout
    bonus = short_bonus(graded.correct, rollout.sampled_count, rollout.group_offsets)
    return replace(graded, reward=graded.reward + ctx.own.long2short * bonus)


def advantage(ctx: Context, graded: Graded) -> Tensor:
    scale = weight(graded.accuracy, ctx.own.mgpo_lambda, ctx.own.mgpo_p0)
    ctx.metrics["mgpo/weight"] = float(scale.mean())
    scores = group_scores(graded, centre="group_mean", scale="group_std", eps=ctx.own.adv_eps)
    return scores * scale[graded.rollout.group]


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation=SEQ_MEAN, terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="mgpo",
    summary="GRPO weighted by the entropy of a problem's accuracy, optionally for short answers",
    paper="arXiv 2511.06221",
    config=Config,
    advantage=advantage,
    loss=loss,
    judge=judge,
)
