"""Dr. GRPO: GRPO without its two biases, after "Understanding R1-Zero-Like Training" (Liu et al., arXiv 2503.20783,
section 3).

    A = R - mean of the group                             no division by the std: easy and hard problems weigh the same
    L = sum over tokens of GRPO's clipped term / (B Lmax)      no division by a response's length: Lmax is a constant

B responses in the optimizer step, Lmax = --max-new-tokens. verl's mode of the same idea lacks 1/B: `--aggregation
seq-mean-token-sum-norm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, group_scores
from pymathrl.batch import Graded

if TYPE_CHECKING:
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    clip_low: float = clip_low(0.2, "paper: 0.2")
    clip_high: float = clip_high(0.2, "paper: 0.2")


def advantage(ctx: Context, graded: Graded) -> Tensor:
    return group_scores(graded, centre="group_mean")


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation="dr_grpo", terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="dr_grpo",
    summary="GRPO without division by the group's std and by the response's length",
    paper="arXiv 2503.20783",
    config=Config,
    advantage=advantage,
    loss=loss,
)
