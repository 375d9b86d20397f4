"""What an algorithm is: a record of functions, with defaults, that the one training loop calls.

An algorithm states only what is its own; a variant is `dataclasses.replace(ALGO, name=..., ...)`. The loop never has a
branch for an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pymathrl.ops.group_advantage import GroupAdvantage


@dataclass(frozen=True)
class LossSpec:
    """The loss of one optimizer step: which per-token form, its constants, and how tokens are averaged.

    form: a form of `pymathrl.ops.policy_loss`.
    terms: keyword arguments of that op (clip ranges, rho, beta, ...).
    aggregation: a mode of `pymathrl.ops.aggregation.aggregation_coef`; counts are those of the whole optimizer step.
    idle_when_zero: a token whose advantage is exactly 0 has exactly zero gradient, so that rows of groups with equal
        rewards can be left out of the update without changing it.
    """

    form: str
    aggregation: str = "token-mean"
    terms: Mapping[str, Any] = field(default_factory=dict)
    idle_when_zero: bool = False


@dataclass(frozen=True)
class Algo:
    """One algorithm.

    config: dataclass of its own flags; every field carries its help text.
    advantage(reward [B] fp32, offsets [P+1] int64, tokens [B] int64, config) -> GroupAdvantage: one number per sample,
        a constant of the loss. `offsets` are the groups, `tokens` the sampled tokens of each sample.
    loss(config) -> LossSpec.
    """

    name: str
    summary: str
    paper: str
    config: type
    advantage: Callable[[Tensor, Tensor, Tensor, Any], GroupAdvantage]
    loss: Callable[[Any], LossSpec]
