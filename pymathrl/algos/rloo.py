"""RLOO: REINFORCE with the mean of the other responses as baseline, after "Back to Basics" (Ahmadian et al., arXiv
2402.14740, section 3.2).

    A = R - mean of the other responses of the group = n/(n-1) (R - mean of the group)
    --rloo-form reinforce   L = mean over responses of the sum over tokens of -A log pi            (the paper)
                clip        the same sum of PPO's clipped term
                sequence    L = mean over responses of max(-s A, -clip(s, 1 - clip_low, 1 + clip_high) A), where s is
                            the ratio of the whole response (as in TRL)

The paper takes a KL to the initial policy off the reward: `--kl k1 --kl-in reward --kl-coef 0.05` (TRL's number); off
by default, as the rewards here are verified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, group_scores
from pymathrl.batch import Graded
from pymathrl.options import option

if TYPE_CHECKING:
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    rloo_form: str = option(
        "reinforce", "the loss of a response, see the table", choices=("reinforce", "clip", "sequence")
    )
    clip_low: float = clip_low(0.2, "of forms clip and sequence; TRL: 0.2")
    clip_high: float = clip_high(0.2, "of forms clip and sequence; TRL: 0.2")
    rloo_scale: str = option("none", "divide A by the std of all rewards of the batch, plus 1e-4, or not",
                             choices=("none", "batch_std"))  # fmt: skip


def advantage(ctx: Context, graded: Graded) -> Tensor:
    return group_scores(graded, centre="leave_one_out", scale=ctx.own.rloo_scale, eps=1e-4)


def loss(config: Config) -> LossSpec:
    if config.rloo_form == "reinforce":
        return LossSpec(form="weighted", aggregation="seq-mean-token-sum", idle_when_zero=True)
    if config.rloo_form == "clip":
        return LossSpec("clip", "seq-mean-token-sum", clip_terms(config), idle_when_zero=True)
    # each token of a sum carries the whole sequence's loss once, so the mean over its tokens is the sequence's
    return LossSpec("sequence", "seq-mean-token-mean", {"sequence": "sum", **clip_terms(config)}, idle_when_zero=True)


ALGO = Algo(
    name="rloo",
    summary="REINFORCE with the other responses' mean as baseline",
    paper="arXiv 2402.14740",
    config=Config,
    advantage=advantage,
    loss=loss,
)
