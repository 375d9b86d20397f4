"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), alone and fused with the addition to the residual stream before it."""

from __future__ import annotations

from typing import Any

import torch

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. x [...,D] fp32, weight [D] fp32 -> [...,D].

    On a GPU both may be bf16; the arithmetic is in fp32. Differentiable in x and weight; the sum of weight's gradient
    runs in one order, whatever the number of threads.
    Raises ValueError for another dtype, shape or device.
    """
    if use_reference():
        return rms_norm_ref(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, None, weight, eps)[1]
    return _forward(x.contiguous(), None, weight, eps, None)[1]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, rms_norm(h, weight, eps)) with h = x + residual, in one pass. Differentiable; shapes as in rms_norm."""
    if x.shape != residual.shape:
        raise ValueError(f"rms_norm: x and residual must agree, got {list(x.shape)} and {list(residual.shape)}")
    if use_reference():
        return add_rms_norm_ref(x, residual, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, residual, weight, eps)
    return _forward(x.contiguous(), residual.contiguous(), weight, eps, None)


def rms_norm_out(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    sum: torch.Tensor | None = None,
) -> None:
    """rms_norm, or with residual and sum add_rms_norm, into y [N,D] (and sum [N,D]), without gradients and without
    allocating: for buffers that stay where they are. All contiguous; sum may be x or residual itself.
    """
    if use_reference():
        h = x if residual is None else torch.add(x, residual, out=sum)
        y.copy_(rms_norm_ref(h, weight, eps))
    else:
        _C.rms_norm(
            view(x), optional_view(residual), view(weight), optional_view(sum), view(y), None, eps, stream(x)
        )  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.shape[-1])


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, rstd: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    _C.rms_norm(
        view(_rows(x)), None if residual is None else view(_rows(residual)), view(weight),
        None if residual is None else view(_rows(h)), view(_rows(y)), optional_view(rstd), eps, stream(x),
    )  # fmt: skip
    return h, y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
        h, y = _forward(x, None if residual is None else residual.contiguous(), weight, eps, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, rstd)
        ctx.added = residual is not None
        return h, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh_out: Any, dy: Any) -> tuple[torch.Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dh_out, dh_out if ctx.added else None, None, None
        dy = dy.contiguous()
        dh_out = None if dh_out is None else dh_out.contiguous()
        dh = torch.empty_like(h)
        dw = rstd.new_empty(1 + _C.rms_norm_blocks(rstd.numel()), h.shape[-1])
        _C.rms_norm_backward(
            view(_rows(h)), view(weight), view(rstd), view(_rows(dy)),
            None if dh_out is None else view(_rows(dh_out)), view(_rows(dh)), view(dw), stream(h),
        )  # fmt: skip
        return dh, dh if ctx.added else None, dw[0].to(weight.dtype, copy=True), None


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in plain torch, in the precision of x."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + residual
    return h, rms_norm_ref(h, weight, eps)
