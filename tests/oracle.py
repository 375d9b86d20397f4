"""The acceptance rule of every op test: as close to float64 as plain fp32 torch is, within a factor of 2.

A tolerance that accepts a wrong kernel is none, so each op's test also feeds deliberately wrong results (mutants) to
`accepts` and requires a refusal.
"""

from __future__ import annotations

import torch

from pymathrl.ops.sample_token import support_unpack

FLOOR = 1e-7  # relative, for fp32 outputs: below it the two roundings are not comparable


def relative_l2(x: torch.Tensor, r: torch.Tensor) -> float:
    """||x - r|| / ||r|| over the finite entries of r, in float64."""
    keep = torch.isfinite(r)
    r, x = r.double()[keep], x.double()[keep]
    return float((x - r).norm() / r.norm().clamp(min=1e-300))


def relative_max(x: torch.Tensor, r: torch.Tensor) -> float:
    """max|x - r| / max|r| over the finite entries of r, in float64."""
    keep = torch.isfinite(r)
    r, x = r.double()[keep], x.double()[keep]
    return float((x - r).abs().max() / r.abs().max().clamp(min=1e-300)) if r.numel() else 0.0


def accepts(kernel: torch.Tensor, ref32: torch.Tensor, ref64: torch.Tensor, floor: float = FLOOR) -> bool:
    """True where `kernel` is within twice the error of `ref32` against `ref64` (L2 and largest entry), and inf and nan
    of ref64 are met at the same places."""
    kernel, ref32, ref64 = kernel.detach().cpu(), ref32.detach().cpu(), ref64.detach().cpu()
    if kernel.shape != ref64.shape:
        return False
    for mark in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(mark(kernel), mark(ref64)):
            return False
    return all(
        error(kernel, ref64) <= 2 * error(ref32.to(kernel.dtype), ref64) + floor
        for error in (relative_l2, relative_max)
    )


def assert_accurate(
    kernel: torch.Tensor, ref32: torch.Tensor, ref64: torch.Tensor, what: str = "", floor: float = FLOOR
) -> None:
    kernel, ref32, ref64 = kernel.detach().cpu(), ref32.detach().cpu(), ref64.detach().cpu()
    errors = " ".join(
        f"{name} {error(kernel, ref64):.3e} (fp32 reference {error(ref32, ref64):.3e})"
        for name, error in (("L2", relative_l2), ("max", relative_max))
    )
    assert accepts(kernel, ref32, ref64, floor), f"{what}: {errors}"


def support_mask_(logits: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """-inf outside the sampler's support, in place: what the update does to its logits."""
    return logits.masked_fill_(~support_unpack(support, logits.shape[1]), -torch.inf)
