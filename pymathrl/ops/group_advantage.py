"""Advantages of ragged groups: every centre x scale of the group-relative family, exact zeros for equal rewards."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view

CENTRES = ("none", "group_mean", "leave_one_out", "baseline")
SCALES = ("none", "group_std", "batch_std", "batch_whiten", "token_whiten")


@dataclass(frozen=True)
class GroupAdvantage:
    advantage: torch.Tensor  # [B] fp32
    equal: torch.Tensor  # [P] bool: all rewards of the group are the same number, so the group teaches nothing


def group_advantage(
    reward: torch.Tensor,
    offsets: torch.Tensor,
    *,
    centre: str = "group_mean",
    scale: str = "none",
    eps: float = 1e-6,
    ddof: int = 1,
    baseline: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> GroupAdvantage:
    """Advantage of each sample within its group.

    reward [B] fp32; offsets [P+1] int64, the first sample of each group (the last entry is B); groups may differ in
    size.

    centre: "none" r; "group_mean" r - mean(group) (GRPO, Dr. GRPO, ROVER); "leave_one_out" r - mean(others) (RLOO);
            "baseline" r - baseline[B] (a tracker or a value, as in SPO).
    scale:  "none"; "group_std" / (std of the group's rewards + eps) (GRPO); "batch_std" / (std of all rewards + eps);
            "batch_whiten" (a - mean) / (std + eps) over samples (SPO); "token_whiten" (a - mean) / sqrt(var + eps)
            with each sample counted tokens[B] int64 times (REINFORCE++).
    ddof:   1 = unbiased variance (torch.std, verl, TRL), 0 = population.

    A group of equal rewards gets exactly 0 under "group_mean" and "leave_one_out", and under "group_std" with any
    centre; so does a group of one. A nan reward makes its whole group nan, or the whole batch where the scale is of the
    batch. Not differentiable: advantages are constants of the loss.
    Raises ValueError for a wrong shape, dtype, device or mode, and on the CPU for offsets that do not rise from 0 to B
    (on a GPU that check would be a host sync).
    """
    if centre not in CENTRES:
        raise ValueError(f"group_advantage: centre must be one of {', '.join(CENTRES)}, got {centre!r}")
    if scale not in SCALES:
        raise ValueError(f"group_advantage: scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if reward.ndim != 1 or offsets.ndim != 1 or offsets.numel() < 1:
        raise ValueError(
            f"group_advantage: reward must be [B] and offsets [P+1], got {list(reward.shape)} and {list(offsets.shape)}"
        )
    if use_reference():
        return group_advantage_ref(
            reward, offsets, centre=centre, scale=scale, eps=eps, ddof=ddof, baseline=baseline, tokens=tokens
        )
    advantage = torch.empty_like(reward)
    equal = torch.empty(offsets.numel() - 1, dtype=torch.bool, device=reward.device)
    _C.group_advantage(
        view(reward), view(offsets), optional_view(baseline), optional_view(tokens), view(advantage), view(equal),
        CENTRES.index(centre), SCALES.index(scale), eps, ddof, stream(reward),
    )  # fmt: skip
    return GroupAdvantage(advantage, equal)


def group_advantage_ref(
    reward: torch.Tensor,
    offsets: torch.Tensor,
    *,
    centre: str = "group_mean",
    scale: str = "none",
    eps: float = 1e-6,
    ddof: int = 1,
    baseline: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> GroupAdvantage:
    """The same in plain torch, at the dtype of `reward` (float64 in tests)."""
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != reward.numel() or sorted(bounds) != bounds:
        raise ValueError(f"group_advantage: offsets must rise from 0 to B={reward.numel()}, got {bounds[:8]}...")
    parts, flags = [], []
    for begin, end in pairwise(bounds):
        r = reward[begin:end]
        n = end - begin
        same = bool((r == r[:1]).all())
        shifted = r - r[:1]
        if centre == "none":
            a = r.clone()
        elif centre == "baseline":
            if baseline is None:
                raise ValueError("group_advantage: centre 'baseline' needs baseline [B], got None")
            a = r - baseline[begin:end]
        elif same:
            a = torch.zeros_like(r)
        else:
            a = (shifted - shifted.mean()) * (n / (n - 1) if centre == "leave_one_out" else 1.0)
        if scale == "group_std":
            a = torch.zeros_like(a) if same else a / (shifted.var(correction=ddof).sqrt() + eps)
        parts.append(a)
        flags.append(same)
    a = torch.cat(parts) if parts else reward.clone()
    if a.numel() and scale == "batch_std":
        a = a / (_variance(reward - reward[0], None, ddof).sqrt() + eps)
    elif a.numel() and scale == "batch_whiten":
        a = (a - a.mean()) / (_variance(a, None, ddof).sqrt() + eps)
    elif a.numel() and scale == "token_whiten":
        if tokens is None:
            raise ValueError("group_advantage: scale 'token_whiten' needs tokens [B], got None")
        mean = (a * tokens).sum() / tokens.sum().clamp(min=1)
        a = (a - mean) / (_variance(a, tokens, ddof) + eps).sqrt()
    return GroupAdvantage(a, torch.tensor(flags, dtype=torch.bool, device=reward.device))


def _variance(x: torch.Tensor, count: torch.Tensor | None, ddof: int) -> torch.Tensor:
    count = torch.ones_like(x) if count is None else count.to(x.dtype)
    total = count.sum()
    if total <= ddof:
        return torch.zeros((), dtype=x.dtype, device=x.device)
    mean = (x * count).sum() / total
    return ((x - mean).square() * count).sum() / (total - ddof)
