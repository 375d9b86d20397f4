"""Inputs and options of the policy loss tests: drawn where the decisions are, one case per form and add-on."""

from __future__ import annotations

from typing import Any

import torch

from pymathrl.ops import PolicyLoss, policy_loss

TENSORS = {
    "rover": ("mean_logp", "old_mean_logp", "link"),
    "lp_reg": ("proxy_logp", "selected"),
}

# name -> (options, names of the tensors it reads besides logp, old_logp, advantage, coef)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "clip": ({"form": "clip", "clip_low": 0.2, "clip_high": 0.28}, ()),
    "clip_dual": ({"form": "clip", "dual_clip": 1.5}, ()),
    "clip_delta": ({"form": "clip", "delta": 1.4}, ()),
    "weighted_one": ({"form": "weighted"}, ()),
    "weighted_ratio": ({"form": "weighted", "weight": "clipped_ratio", "weight_low": 0.7, "weight_high": 1.2}, ()),
    "sequence_mean": ({"form": "sequence", "clip_low": 0.02, "clip_high": 0.03}, ("offsets",)),
    "sequence_sum": ({"form": "sequence", "sequence": "sum", "clip_low": 0.2, "clip_high": 0.2}, ("offsets",)),
    "rover": ({"form": "rover", "rho": 0.5, "beta": 0.7}, TENSORS["rover"]),
    "rover_clip": ({"form": "rover", "rover_clip": 0.2}, TENSORS["rover"]),
    "rover_response": ({"form": "rover", "rover_level": "response", "rho": 3.0}, ("offsets",)),
    "lp_reg": ({"form": "lp_reg", "lp_reg_coef": 2.0}, TENSORS["lp_reg"]),
    "sapo": ({"form": "sapo", "tau_positive": 1.0, "tau_negative": 4.0}, ()),
    "vespo": ({"form": "vespo"}, ("offsets",)),
    "vespo_tis": ({"form": "vespo", "tis_cap": 1.2}, ("offsets", "behaviour_logp")),
    "vespo_mask": (
        {"form": "vespo", "tis_cap": 1.6, "tis_mode": "mask", "k_positive": 0.5, "k_negative": 0.5},
        ("offsets", "behaviour_logp"),
    ),
    "kl_k1": ({"form": "clip", "kl": "k1", "kl_coef": 0.5}, ("ref_logp",)),
    "kl_k2": ({"form": "clip", "kl": "k2", "kl_coef": 0.5}, ("ref_logp",)),
    "kl_k3": ({"form": "clip", "kl": "k3", "kl_coef": 0.5}, ("ref_logp",)),
    "kl_k1+": ({"form": "rover", "kl": "k1+", "kl_coef": 0.5}, ("ref_logp", *TENSORS["rover"])),
    "kl_k3+": ({"form": "weighted", "kl": "k3+", "kl_coef": 0.5}, ("ref_logp",)),
    "kl_ratio": ({"form": "clip", "kl": "k3", "kl_ratio": True, "kl_coef": 0.5}, ("ref_logp",)),
    "entropy": ({"form": "clip", "entropy_coef": 0.01}, ("entropy",)),
    "tis_token": ({"form": "clip", "tis_cap": 1.2}, ("behaviour_logp",)),
    "tis_mask": ({"form": "clip", "tis_cap": 1.2, "tis_mode": "mask"}, ("behaviour_logp",)),
    "tis_sequence": (
        {"form": "weighted", "tis_cap": 1.2, "tis_level": "sequence"},
        ("behaviour_logp", "offsets"),
    ),
    "tis_geometric": (
        {"form": "sequence", "clip_low": 0.02, "clip_high": 0.03, "tis_cap": 1.01, "tis_level": "geometric"},
        ("behaviour_logp", "offsets"),
    ),
    "everything": (
        {"form": "clip", "dual_clip": 1.5, "kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.01, "tis_cap": 1.2},
        ("ref_logp", "entropy", "behaviour_logp"),
    ),
}


def draw(n: int = 4096, seed: int = 0) -> dict[str, torch.Tensor]:
    """A packed batch of n tokens: both signs of advantage, about 40 % of the ratios outside [0.8, 1.28], a tenth of the
    tokens masked, one sequence of length 1, one empty, one whose advantage is 0."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(n, generator=g)
    flag = lambda share: torch.rand(n, generator=g) < share
    logp = -torch.rand(n, generator=g) * 4
    old_logp = logp + 0.3 * normal()
    cuts = torch.randint(2, n, (max(1, n // 100),), generator=g).sort().values
    offsets = torch.cat([torch.tensor([0, 1, 1]), cuts, torch.tensor([n])])
    length = offsets.diff()
    advantage = torch.randn(length.numel(), generator=g)
    advantage[-1] = 0.0
    advantage = advantage.repeat_interleave(length)
    mask = flag(0.9)
    mean_logp = -10 + torch.randn(n + 1, generator=g)
    link = mask[1:] & (torch.arange(1, n)[:, None] != offsets).all(1)
    return {
        "logp": logp, "old_logp": old_logp, "advantage": advantage,
        "coef": torch.full((n,), 1.0 / n), "mask": mask, "offsets": offsets,
        "mean_logp": mean_logp, "old_mean_logp": mean_logp + 0.3 * torch.randn(n + 1, generator=g),
        "link": torch.cat([link, torch.zeros(1, dtype=torch.bool)]),
        "proxy_logp": logp + 0.5 * normal(), "selected": flag(0.3) & (advantage < 0),
        "ref_logp": logp + 0.5 * normal(), "entropy": torch.rand(n, generator=g) * 2,
        "behaviour_logp": old_logp + 0.2 * normal(),
    }  # fmt: skip


def call(
    data: dict[str, torch.Tensor],
    case: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    reference: bool = False,
    use_mask: bool = True,
    **changes: Any,
) -> PolicyLoss:
    """The loss of one case; `changes` replace options or tensors."""
    options, names = CASES[case]
    place = lambda t: t.to(device, dtype) if t.is_floating_point() else t.to(device)
    fields = {k: v for k, v in changes.items() if k in data}
    options = options | {k: v for k, v in changes.items() if k not in data}
    fields = data | fields
    extra = {name: place(fields[name]) for name in (*names, *(("mask",) if use_mask else ()))}
    old_logp = fields["old_logp"]
    return policy_loss(
        place(fields["logp"]), None if old_logp is None else place(old_logp), place(fields["advantage"]),
        place(fields["coef"]), reference=reference, **extra, **options,
    )  # fmt: skip


def part(data: dict[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
    """Tokens [begin, end) of a batch, with the row after them for the means of ROVER. offsets do not travel."""
    n = data["logp"].numel()
    last = min(end + 1, n + 1)
    return {
        name: t[begin:last] if name in ("mean_logp", "old_mean_logp") else t[begin:end]
        for name, t in data.items()
        if name != "offsets"
    }
