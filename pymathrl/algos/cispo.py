"""CISPO: clips the weight, not the gradient, after "MiniMax-M1" (arXiv 2506.13585, section 3.1).

    A = (R - mean of the group) / (std of the group + eps)
    L = mean over the tokens of the step of -sg(clip(r, weight_low, weight_high)) A log pi

No token is left without a gradient. The value of the loss means nothing (it holds log pi); its gradient does.

Weights here are absolute bounds of the ratio, as in TRL; verl's clip_high 0.2 is 1.2 here. The paper gives no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import group_normalised
from pymathrl.errors import UserError
from pymathrl.options import at_least, positive

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig


@dataclass(frozen=True)
class Config:
    weight_low: float = at_least(0, 0.0, "least weight (verl and TRL: none, 0)")
    weight_high: float = positive(1.2, "largest weight (verl: 1.2; ScaleRL, arXiv 2510.13786: 5)")
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6)")


def check(train: TrainConfig, own: Config) -> None:
    if own.weight_low > own.weight_high:
        raise UserError(f"expected --weight-low <= --weight-high, got {own.weight_low} and {own.weight_high}")


def loss(config: Config) -> LossSpec:
    terms = {"weight": "clipped_ratio", "weight_low": config.weight_low, "weight_high": config.weight_high}
    return LossSpec(form="weighted", aggregation="token-mean", terms=terms, idle_when_zero=True)


ALGO = Algo(
    name="cispo",
    summary="log-likelihood weighted by a clipped ratio: every token keeps its gradient",
    paper="arXiv 2506.13585",
    config=Config,
    advantage=group_normalised,
    loss=loss,
    check=check,
)
