"""Generalised advantage estimation and the clipped value loss of PPO, over packed ragged rows. Plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gae:
    advantage: Tensor  # [N], of the dtype of `value`; 0 where mask is 0
    returns: Tensor  # [N] advantage + value, what the value should have been; 0 where mask is 0


def gae(reward: Tensor, value: Tensor, mask: Tensor, offsets: Tensor, *, gamma: float, lam: float) -> Gae:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, along the sampled tokens of each row.

    reward, value [N] floating point: r_t is paid for token t, V_t is the value of the state in which it was chosen.
    mask [N] bool/uint8, 1 = sampled by the policy. offsets [B+1] int64: first token of each row, the last entry is N.
    t+1 is the next sampled token of the row: forced ones between them are skipped, what is paid for them is not read.
    V and A after the last sampled token are 0, whether it ended the response or the length did.
    gamma, lam in [0, 1]. lam = 1: the discounted return minus V; lam = 0: delta.

    A row's result depends on that row alone. Not differentiable: advantages and returns are constants of the losses.
    Raises ValueError for a wrong shape or range; one host sync on a GPU, for the longest row.
    """
    if reward.ndim != 1 or not reward.shape == value.shape == mask.shape or offsets.ndim != 1 or offsets.numel() < 1:
        raise ValueError(
            "gae: reward, value and mask must be [N] and offsets [B+1], got "
            f"{list(reward.shape)}, {list(value.shape)}, {list(mask.shape)} and {list(offsets.shape)}"
        )
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"gae: {name} must be in [0, 1], got {number}")
    reward, value, active = reward.detach(), value.detach(), mask != 0
    rows = offsets.numel() - 1
    row = torch.arange(rows, device=value.device).repeat_interleave(offsets.diff(), output_size=value.numel())[active]
    before = torch.zeros(value.numel() + 1, dtype=torch.int64, device=value.device)
    torch.cumsum(active, 0, out=before[1:])
    first = before[offsets[:-1]]  # of each row, among the sampled tokens
    step = torch.arange(row.numel(), device=value.device) - first[row]
    steps = int(step.max()) + 1 if row.numel() else 0
    # One column per row, filled up below with zeros: past the last token r = V = 0, so A = 0 there.
    r, v, a = (value.new_zeros(steps + 1, rows) for _ in range(3))
    r[step, row], v[step, row] = reward[active], value[active]
    for t in reversed(range(steps)):
        a[t] = (r[t] + gamma * v[t + 1] - v[t]) + gamma * lam * a[t + 1]
    advantage = torch.zeros_like(value).masked_scatter(active, a[step, row])
    return Gae(advantage, torch.where(active, advantage + value, 0.0))


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, coef: Tensor, *, clip: float | None) -> Tensor:
    """sum_n coef[n] 0.5 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2), a scalar to be minimised.

    value [N]: differentiable; old_value, returns, coef [N]: constants. coef as of `aggregation_coef`; a token with coef
    0 gives exactly 0 whatever its other numbers are. clip None: 0.5 (v - R)^2. The gradient is v - R, and 0 where v is
    past the clip and the clipped arm is the larger one.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"value_loss: clip must be > 0 or None, got {clip}")
    active = coef != 0
    value, old_value, returns = (torch.where(active, x, 0.0) for x in (value, old_value.detach(), returns.detach()))
    loss = (value - returns).square()
    if clip is not None:
        bounded = torch.maximum(torch.minimum(value, old_value + clip), old_value - clip)
        loss = torch.maximum(loss, (bounded - returns).square())
    return 0.5 * (coef.detach() * loss).sum()
