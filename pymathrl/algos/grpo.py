"""GRPO: group-relative policy optimization, after "DeepSeekMath" (Shao et al., arXiv 2402.03300, section 4.1).

    A   = (R - mean of the group) / (std of the group + eps)              std unbiased, equal rewards give exactly 0
    r_t = exp(log pi(y_t) - log pi_old(y_t))
    L   = mean over responses of (mean over its tokens of -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A))

log pi_old comes from the sampler, which runs on the same weights.

Differs from the paper: no KL term to a reference model unless `--kl k3 --kl-coef 0.04` puts it there (the coefficient
is 0 in most later recipes, and TRL's default).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import SEQ_MEAN, clip_high, clip_low, clip_terms, dual_clip, group_scores
from pymathrl.batch import Graded
from pymathrl.options import option, positive

if TYPE_CHECKING:
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    clip_low: float = clip_low(0.2, "paper: 0.2")
    clip_high: float = clip_high(0.2, "paper: 0.2; DAPO: 0.28")
    dual_clip: float = dual_clip(0.0, "verl: 3")
    adv_scale: str = option(
        "group_std", "divide A by the std of the group, of the batch (of all rewards), or not",
        choices=("none", "group_std", "batch_std"),
    )  # fmt: skip
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6, TRL: 1e-4)")


def advantage(ctx: Context, graded: Graded) -> Tensor:
    return group_scores(graded, centre="group_mean", scale=ctx.own.adv_scale, eps=ctx.own.adv_eps)


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation=SEQ_MEAN, terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="grpo",
    summary="clipped policy ratio with group-normalised advantages",
    paper="arXiv 2402.03300",
    config=Config,
    advantage=advantage,
    loss=loss,
)
