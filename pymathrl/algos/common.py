"""Pieces that several algorithms share: advantages of groups, rewards per token, options of clipped losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.batch import Graded, Rollout
from pymathrl.ops.group_advantage import group_advantage
from pymathrl.options import option

if TYPE_CHECKING:
    from pymathrl.context import Context

SEQ_MEAN = "seq-mean-token-mean"


def clip_low(default: float, where: str) -> Any:
    return option(
        default, f"the ratio is clipped below 1 - this ({where})", check=lambda v: 0 <= v <= 1, expected="in [0, 1]"
    )


def clip_high(default: float, where: str) -> Any:
    return option(
        default, f"the ratio is clipped above 1 + this ({where})", check=lambda v: v >= 0, expected="at least 0"
    )


def dual_clip(default: float, where: str) -> Any:
    return option(
        default, f"for A < 0 the loss is at most this times -A; 0 = off ({where})",
        check=lambda v: v == 0 or v > 1, expected="0, or more than 1",
    )  # fmt: skip


def clip_terms(config: Any) -> dict[str, Any]:
    """Keyword arguments of form "clip" from the options clip_low, clip_high and, where there is one, dual_clip."""
    terms = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    return terms | ({"dual_clip": config.dual_clip} if getattr(config, "dual_clip", 0) else {})


def response_reward(graded: Graded) -> Tensor:
    """fp32 [B]: the reward of each response, less the KL of its tokens where --kl-in reward puts it there."""
    penalty = graded.extra.get("kl_penalty")
    return graded.reward if penalty is None else graded.reward - graded.rollout.row_sums(penalty)


def last_sampled(rollout: Rollout) -> Tensor:
    """bool [T]: the last sampled token of each row; rows without one have none."""
    mask, row = rollout.sampled_mask, rollout.row_of_token
    position = torch.arange(rollout.tokens, device=rollout.device)
    last = position.new_full((rollout.rows,), -1).scatter_reduce(0, row[mask], position[mask], "amax")
    return mask & (position == last[row])


def token_reward(graded: Graded) -> Tensor:
    """fp32 [T]: the reward of a response at its last sampled token, less the KL of each token under --kl-in reward."""
    reward = torch.where(last_sampled(graded.rollout), graded.rollout.per_token(graded.reward), 0.0)
    penalty = graded.extra.get("kl_penalty")
    return reward if penalty is None else reward - penalty


def group_scores(graded: Graded, **options: Any) -> Tensor:
    """fp32 [B]: `group_advantage` of the responses' rewards within their groups."""
    offsets = graded.rollout.group_offsets
    return group_advantage(response_reward(graded), offsets, **options).advantage


def whiten(values: Tensor, mask: Tensor, *, eps: float = 0.0, floor: float = 0.0, correction: int = 1) -> Tensor:
    """fp32 [T]: (x - mean) / sqrt(max(var, floor) + eps) over the tokens of mask bool [T]; 0 elsewhere.

    Every token counts alike, so a long response counts more. var = sum of squares / (N - correction). In fp64, where
    sums of equal fp32 numbers are exact: equal values give exactly 0, with no rounding for a tiny eps to blow up.
    """
    x = values[mask].double()
    if x.numel() <= correction:
        return torch.zeros_like(values)
    x = x - x.mean()
    scale = (x.square().sum() / (x.numel() - correction)).clamp(min=floor) + eps
    return torch.zeros_like(values).masked_scatter(mask, (x / scale.sqrt()).float())


def group_normalised(ctx: Context, graded: Graded) -> Tensor:
    """fp32 [B]: GRPO's advantage, (R - mean of the group) / (std of the group + --adv-eps)."""
    return group_scores(graded, centre="group_mean", scale="group_std", eps=ctx.own.adv_eps)
