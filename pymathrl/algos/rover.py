"""ROVER: the residual of a uniform policy's Q values, after "Random Policy Valuation is Enough for LLM Reasoning with
Verifiable Rewards" (He et al., arXiv 2509.24981, Algorithm 1; code: github.com/tinnerhrhe/ROVER).

A response of the group has reward R. With pi_old the policy that sampled it, V the vocabulary, and t a response token:

    A     = R - mean of the group's rewards, at every token of the response
    Q_t   = rho (log pi(y_t) - log pi_old(y_t))
    Q'_t  = rho (m_{t+1} - m_old,t+1),   m_t = mean over V of log pi(. | s_t);   0 at the last token
    L     = mean over the tokens of the optimizer step of (Q_t - sg(A + beta Q'_t))^2

No clip, no KL term, no entropy bonus, no critic, no reference model. The target is a constant: no gradient flows
through A, m or m_old. At the first optimizer step of a batch pi = pi_old, so Q = Q' = 0 and the gradient is exactly
twice that of REINFORCE with the same advantages; the squared residual matters from the second minibatch on.

Differs from the released code: the mean over tokens is exact over the optimizer step (there: per micro-batch);
log pi_old and m_old come from the sampler itself, which runs on the same weights, so there is no second pass over the
batch. The released mathematics script also divides A by the group's standard deviation: `--adv-scale group_std`.
`--rover-level response` is the released code's other loss, off in all its scripts: the mean over responses of
(mean of Q_t over the response - A)^2, without Q'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import SEQ_MEAN, group_scores
from pymathrl.batch import Graded
from pymathrl.errors import UserError
from pymathrl.options import at_least, option, positive

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    rho: float = positive(1.0, "scale of the Q values, the temperature of the Q policy (paper: 1)")
    beta: float = at_least(0, 1.0, "weight of the next state's value Q' in the target (paper: 1; 0 collapses entropy)")
    rover_level: str = option(
        "token", "a residual per token, or per response of its mean Q, without Q'", choices=("token", "response")
    )
    adv_scale: str = option("none", "divide A by the group's std or not (paper: none)", choices=("none", "group_std"))
    rover_clip: float = option(
        0.0, "bound Q by log(1 +- this) once it is past the target; 0 = off (paper: off, code: 0.2 when on)",
        check=lambda v: 0 <= v < 1, expected="in [0, 1)",
    )  # fmt: skip


def check(train: TrainConfig, own: Config) -> None:
    if own.rover_level == "response" and (own.beta != Config.beta or own.rover_clip):
        raise UserError("--rover-level response reads neither --beta nor --rover-clip; leave them out")


def advantage(ctx: Context, graded: Graded) -> Tensor:
    return group_scores(graded, centre="group_mean", scale=ctx.own.adv_scale)


def loss(config: Config) -> LossSpec:
    if config.rover_level == "response":
        terms = {"rover_level": "response", "rho": config.rho}
        return LossSpec(form="rover", aggregation=SEQ_MEAN, terms=terms)
    terms = {"rho": config.rho, "beta": config.beta, "rover_clip": config.rover_clip or None}
    return LossSpec(form="rover", aggregation="token-mean", terms=terms)


ALGO = Algo(
    name="rover",
    summary="squared residual of a uniform policy's Q values; keeps diversity, no clip, no KL",
    paper="arXiv 2509.24981",
    config=Config,
    advantage=advantage,
    loss=loss,
    check=check,
)
