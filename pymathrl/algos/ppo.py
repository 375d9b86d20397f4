"""PPO with a critic, after "Proximal Policy Optimization Algorithms" (Schulman et al., arXiv 1707.06347) and
"High-Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv 1506.02438), as verl and TRL run it.

    V_t     = the critic's value of the state in which token t was drawn, 0 after the last one
    delta_t = r_t + gamma V_t+1 - V_t, A_t = delta_t + gamma lambda A_t+1, return_t = A_t + V_t
    A       is then whitened over all tokens of the batch: (A - mean) / sqrt(var + eps)
    L       = mean over the tokens of the step of max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)
    L_V     = vf_coef times their mean of 0.5 max((v - return)^2, (clip(v, V - value_clip, V + value_clip) - return)^2)

r_t is the reward at the last token, less the KL of each token under --kl k1 --kl-in reward. A response that the length
limit cut ends like any other. The critic has layers of its own, which begin as a copy of the policy's, a value vector
that begins at 0, and its own optimizer, which takes a step after each of the policy's on the same responses.

Differs from TRL: no KL unless the options put it there (TRL: --kl k1 --kl-in reward --kl-coef 0.05), as the rewards
here are verified; two learning rates, as in verl, where TRL has one for the sum L + L_V.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, token_reward, whiten
from pymathrl.batch import Batch, Graded
from pymathrl.ops.gae import Gae, gae, value_loss
from pymathrl.options import at_least, option, positive

if TYPE_CHECKING:
    from pymathrl.context import Context
    from pymathrl.learner import CriticLearner

CRITIC_RATE = 10.0  # times --lr: verl's 1e-5 beside 1e-6
MAX_CRITIC_RATE = 1e-3


def share(default: float, help: str) -> Any:
    return option(default, help, check=lambda v: 0 <= v <= 1, expected="in [0, 1]")


@dataclass(frozen=True)
class Config:
    clip_low: float = clip_low(0.2, "paper, verl, TRL: 0.2")
    clip_high: float = clip_high(0.2, "paper, verl, TRL: 0.2")
    gamma: float = share(1.0, "discount per token (verl, TRL: 1)")
    gae_lambda: float = share(0.95, "lambda of the advantages (TRL: 0.95; verl: 1)")
    whiten_eps: float = positive(1e-8, "added to the variance of the advantages (verl: 1e-8)")
    value_clip: float = at_least(0, 0.2, "values move at most so far from those of the rollout; 0 = off (TRL: 0.2; "
                                         "verl: 0.5)")  # fmt: skip
    vf_coef: float = positive(0.1, "factor of the value loss; acts through --max-grad-norm only (TRL: 0.1)")
    critic_lr: float = at_least(0, 0.0, "learning rate of the critic; 0 = ten times --lr, at most 0.001 (verl: 1e-5)")


def rate(ctx: Context) -> float:
    return ctx.own.critic_lr or min(CRITIC_RATE * ctx.train.lr, MAX_CRITIC_RATE)


class WithCritic:
    """What PPO keeps: the critic. stage: of the run, whose options it follows."""

    def __init__(self, ctx: Context) -> None:
        self.critic: CriticLearner = ctx.new_critic(rate(ctx), ctx.train.updates)
        self.stage = ctx.at.stage

    def follow(self, ctx: Context) -> None:
        """Under the options of the stage that the run is in."""
        if self.stage != ctx.at.stage:
            self.stage = ctx.at.stage
            self.new_stage(ctx)

    def new_stage(self, ctx: Context) -> None:
        self.critic.restart(replace(ctx.train, lr=rate(ctx)), updates=ctx.train.updates)

    def state_dict(self) -> dict[str, Any]:
        return {"critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])


def judge(ctx: Context, graded: Graded) -> Graded:
    ctx.memory.follow(ctx)
    return replace(graded, extra={**graded.extra, "value": ctx.memory.critic.values(graded.rollout)})


def estimate(ctx: Context, graded: Graded) -> Gae:
    """Advantages before whitening, and returns."""
    r = graded.rollout
    return gae(token_reward(graded), graded.extra["value"], r.sampled_mask, r.offsets,
               gamma=ctx.own.gamma, lam=ctx.own.gae_lambda)  # fmt: skip


def explained_variance(value: Tensor, returns: Tensor) -> float:
    """1 - var(returns - value) / var(returns): 1 for values that are always right, 0 for a constant; 0 where the
    returns are all the same."""
    spread = returns.double().var(correction=0)
    return float(1 - (returns - value).double().var(correction=0) / spread) if spread > 0 else 0.0


def advantage(ctx: Context, graded: Graded) -> Tensor:
    mask = graded.rollout.sampled_mask
    return whiten(estimate(ctx, graded).advantage, mask, eps=ctx.own.whiten_eps)


def shape(ctx: Context, graded: Graded, batch: Batch) -> Batch:
    mask, returns, value = graded.rollout.sampled_mask, estimate(ctx, graded).returns, graded.extra["value"]
    ctx.metrics |= {
        "critic/value": float(value[mask].mean()), "critic/return": float(returns[mask].mean()),
        "critic/explained_variance": explained_variance(value[mask], returns[mask]),
    }  # fmt: skip
    return replace(batch, extra={**batch.extra, "returns": returns})


def learn(ctx: Context, mini: Batch) -> Mapping[str, float]:
    """One step of the critic."""
    mask = mini.rollout.sampled_mask
    count = mask.sum().clamp(min=1)
    coef = ctx.own.vf_coef * mask.float() / count
    old, returns, clip = mini.extra["value"], mini.extra["returns"], ctx.own.value_clip or None
    moved = torch.zeros_like(coef)

    def term(at: Tensor, value: Tensor) -> Tensor:
        moved[at] = (value.detach() - old[at]).abs()
        return value_loss(value, old[at], returns[at], coef[at], clip=clip)

    total, step = ctx.memory.critic.update(mini.rollout, term)
    metrics = {"critic/loss": total, "critic/grad_norm": step.grad_norm, "critic/skipped": float(not step.applied)}
    return metrics if clip is None else metrics | {"critic/clipped": float((moved > clip).sum() / count)}


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation="token-mean", terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="ppo",
    summary="clipped ratio, advantages by GAE from a critic that is trained beside",
    paper="arXiv 1707.06347",
    config=Config,
    advantage=advantage,
    loss=loss,
    defaults={"samples_per_prompt": 1, "prompts_per_step": 512, "epochs": 4},
    min_samples=1,
    memory=WithCritic,
    trained_beside=1,
    judge=judge,
    shape=shape,
    learn=learn,
)
