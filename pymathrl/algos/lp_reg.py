"""Lp-Reg: low-probability regularization, after "Low-probability Tokens Sustain Exploration in Reinforcement Learning
with Verifiable Reward" (Huang et al., arXiv 2510.03222, sections 3 to 5; code: github.com/CarlanLark/Lp-Reg-dev).

    proxy = pi_old without the tokens below kappa times its largest probability, renormalised       (once per rollout)
    A as in GRPO, with the std;  r = pi / pi_old
    L = mean over the tokens of the step of max(-A r, -A clip(r, 0, 10)), but on the selected tokens
        -A r + coef * min(k3, 10),   k3 = exp(d) - d - 1,   d = log proxy(y) - log pi(y)
    selected: of the tokens with A < 0 of the optimizer step the k = share * (their number) least likely under the
        policy as it is now, none where k < 2, and of these those with pi < proxy; so none that the proxy dropped

As in the code: k3 of the sampled token stands for the paper's KL of whole distributions, a selected token's r is not
clipped, and k < 2 selects nothing. Differs from it: the share is of an optimizer step, not of a micro-batch, so that
memory options do not change the result (the paper: of all tokens of the batch, by probability).

While pi = pi_old the pull is slight, 1 - 1/(mass that the proxy kept); it acts on the later optimizer steps of a batch,
where the policy has left its proxy. The second look at the probabilities is one pass per optimizer step, which the
first one of a batch does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import group_normalised
from pymathrl.batch import Batch, Graded
from pymathrl.options import at_least, option, positive

if TYPE_CHECKING:
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    lp_reg_kappa: float = option(0.02, "share of the largest probability below which the proxy drops a token "
                                 "(paper: 0.02)", check=lambda v: 0 <= v <= 1, expected="in [0, 1]")  # fmt: skip
    lp_reg_share: float = option(0.01, "share of the tokens with a negative advantage that may be regularised (paper: "
                                 "0.01; 0.005 at 32B)", check=lambda v: 0 <= v <= 1, expected="in [0, 1]")  # fmt: skip
    lp_reg_coef: float = positive(1.0, "factor of k3 (paper: 1)")
    lp_reg_clip: float = at_least(1, 10.0, "the ratio is clipped above this; below it is not (paper: 10)")
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6)")


def judge(ctx: Context, graded: Graded) -> Graded:
    """The proxy here, right after the rollout: groups that wait under --filter were drawn by an older policy."""
    proxy = ctx.score(graded.rollout, min_p=ctx.own.lp_reg_kappa).proxy_logp
    assert proxy is not None  # with min_p
    return replace(graded, extra={**graded.extra, "proxy_logp": proxy})


def least_likely(logp: Tensor, candidate: Tensor, share: float) -> Tensor:
    """uint8 [T]: the share of the candidates bool [T] whose logp is least, the first of equal ones; none for k < 2."""
    at = candidate.nonzero()[:, 0]
    count = int(at.numel() * share)
    chosen = torch.zeros_like(candidate, dtype=torch.uint8)
    if count > 1:
        chosen[at[logp[at].argsort(stable=True)[:count]]] = 1
    return chosen


def terms(ctx: Context, mini: Batch) -> Mapping[str, Tensor]:
    # before the first optimizer step the policy is the sampler, but not of groups that waited under --filter
    unmoved = not ctx.learner.current.steps and ctx.train.filter == "off"
    logp = mini.rollout.logp if unmoved else ctx.score(mini.rollout).logp
    negative = mini.rollout.sampled_mask & (mini.advantage < 0)
    return {"selected": least_likely(logp, negative, ctx.own.lp_reg_share)}


def loss(config: Config) -> LossSpec:
    numbers = {"clip_low": 1.0, "clip_high": config.lp_reg_clip - 1, "lp_reg_coef": config.lp_reg_coef}
    return LossSpec(form="lp_reg", aggregation="token-mean", terms=numbers, idle_when_zero=True)


ALGO = Algo(
    name="lp_reg",
    summary="GRPO that keeps unlikely but meaningful tokens near a proxy without the noise",
    paper="arXiv 2510.03222",
    config=Config,
    advantage=group_normalised,
    loss=loss,
    judge=judge,
    terms=terms,
)
