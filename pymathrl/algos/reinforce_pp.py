"""REINFORCE++, after "REINFORCE++: Stabilizing Critic-Free Policy Optimization" (Hu et al., arXiv 2501.03262, section
3).

    r_t = the reward at the last token, less --kl-coef times the KL of each token under --kl k1 --kl-in reward
    A_t = sum over t' >= t of gamma^(t' - t) r_t', then over all tokens of the batch (A - mean) / sqrt(var + eps)
    L   = mean over the tokens of the step of max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)

--rf-baseline group is its "-baseline" variant: R - mean of the group first, at every token, then the same whitening.
The mean and the variance weigh a response by its tokens, so long ones count more. `reinforce_pp` draws one response per
problem and many problems; the variant needs a group.

Differs from the paper: no KL unless the options put it there, as the rewards here are verified. Under --kl-in reward
the variant takes the KL of a whole response off its reward; the paper has it in the loss there (--kl k2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, group_scores, token_reward, whiten
from pymathrl.batch import Graded
from pymathrl.errors import UserError
from pymathrl.ops.gae import gae
from pymathrl.options import option, positive

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    rf_baseline: str = option("none", "what is taken off the rewards before whitening", choices=("none", "group"))
    gamma: float = option(
        1.0, "discount per token, of --rf-baseline none (paper: 1)", check=lambda v: 0 < v <= 1, expected="in (0, 1]"
    )
    clip_low: float = clip_low(0.2, "paper: 0.2")
    clip_high: float = clip_high(0.2, "paper: 0.2")
    whiten_eps: float = positive(1e-8, "added to the variance (verl: 1e-8)")


def check(train: TrainConfig, own: Config) -> None:
    if own.rf_baseline == "group" and train.samples_per_prompt < 2:
        raise UserError(
            "--rf-baseline group compares the responses to a problem: expected at least 2 --samples-per-prompt, got "
            f"{train.samples_per_prompt}; for example --samples-per-prompt 8 --prompts-per-step 64"
        )
    if own.rf_baseline == "group" and own.gamma != 1:
        raise UserError(f"--rf-baseline group has no returns to discount: expected --gamma 1, got {own.gamma}")


def advantage(ctx: Context, graded: Graded) -> Tensor:
    rollout = graded.rollout
    if ctx.own.rf_baseline == "group":
        raw = rollout.per_token(group_scores(graded, centre="group_mean", scale="none"))
    else:
        reward = token_reward(graded)
        zero = torch.zeros_like(reward)  # without values, GAE at lambda 1 is the discounted return
        raw = gae(reward, zero, rollout.sampled_mask, rollout.offsets, gamma=ctx.own.gamma, lam=1.0).advantage
    return whiten(raw, rollout.sampled_mask, eps=ctx.own.whiten_eps)


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation="token-mean", terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="reinforce_pp",
    summary="clipped ratio, returns whitened over the batch's tokens, no critic",
    paper="arXiv 2501.03262",
    config=Config,
    advantage=advantage,
    loss=loss,
    defaults={"samples_per_prompt": 1, "prompts_per_step": 512},
    min_samples=1,
    check=check,
)
