"""GRPO: group-relative policy optimization, after "DeepSeekMath" (Shao et al., arXiv 2402.03300, section 4.1).

    A   = (R - mean of the group) / (std of the group + eps)              std unbiased, equal rewards give exactly 0
    r_t = exp(log pi(y_t) - log pi_old(y_t))
    L   = mean over responses of (mean over its tokens of -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A))

`--clip-high 0.28` is DAPO's clip-higher, `--adv-scale none` Dr. GRPO's unscaled advantage, `--aggregation token-mean`
the average over all tokens of the optimizer step. log pi_old comes from the sampler, which runs on the same weights.

Differs from the paper: no KL term to a reference model (its coefficient is 0 in most later recipes and TRL's default).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.ops.group_advantage import GroupAdvantage, group_advantage
from pymathrl.options import at_least, option, positive


@dataclass(frozen=True)
class Config:
    clip_low: float = option(
        0.2, "the ratio is clipped below 1 - this (paper: 0.2)", check=lambda v: 0 <= v <= 1, expected="between 0 and 1"
    )
    clip_high: float = at_least(0, 0.2, "the ratio is clipped above 1 + this (paper: 0.2)")
    adv_scale: str = option("group_std", "divide A by the group's std or not", choices=("none", "group_std"))
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6, TRL: 1e-4)")
    aggregation: str = option(
        "seq-mean-token-mean",
        "average over tokens within each response, then over responses (paper), or over all tokens of the step",
        choices=("seq-mean-token-mean", "token-mean"),
    )


def advantage(reward: Tensor, offsets: Tensor, tokens: Tensor, config: Config) -> GroupAdvantage:
    return group_advantage(reward, offsets, centre="group_mean", scale=config.adv_scale, eps=config.adv_eps)


def loss(config: Config) -> LossSpec:
    terms = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    return LossSpec(form="clip", aggregation=config.aggregation, terms=terms, idle_when_zero=True)


ALGO = Algo(
    name="grpo",
    summary="clipped policy ratio with group-normalised advantages",
    paper="arXiv 2402.03300",
    config=Config,
    advantage=advantage,
    loss=loss,
)
