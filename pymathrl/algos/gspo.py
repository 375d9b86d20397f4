"""GSPO: one ratio per response, after "Group Sequence Policy Optimization" (Zheng et al., arXiv 2507.18071, section 4).

    A   = (R - mean of the group) / (std of the group + eps)
    s_i = exp(mean over the tokens of log pi - log pi_old)                       the geometric mean of the token ratios
    L   = mean over responses of max(-s_i A, -clip(s_i, 1 - clip_low, 1 + clip_high) A)

The ratios of whole responses stay close to 1: the clip range is a thousandth of GRPO's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import SEQ_MEAN, clip_high, clip_low, clip_terms, group_normalised
from pymathrl.options import positive

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Config:
    clip_low: float = clip_low(3e-4, "paper: 3e-4")
    clip_high: float = clip_high(4e-4, "paper: 4e-4")
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6)")


def loss(config: Config) -> LossSpec:
    return LossSpec(form="sequence", aggregation=SEQ_MEAN, terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="gspo",
    summary="clips one ratio per response, the geometric mean over its tokens",
    paper="arXiv 2507.18071",
    config=Config,
    advantage=group_normalised,
    loss=loss,
)
