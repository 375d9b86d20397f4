"""The product of a layer, y = x w^T + bias: no row depends on another to the last bit (csrc/linear.h)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, *, exact: bool = False) -> torch.Tensor:
    """y = x w^T + bias. x [...,K], w [N,K] contiguous, bias [N] or None -> [...,N]; differentiable in all three.

    CPU: fp32, by the kernel: the bits of a row of y follow from that row of x, w and bias alone, for any number of rows
    and threads. GPU: torch's F.linear, any dtype; with exact=True the kernel (fp32, or bf16 summed in fp32; bias fp32),
    which keeps that promise there, several times slower: for runs where the sampler's log-probs must be the trainer's.
    The backward is torch's products: gradients are sums over rows, which no promise covers.
    Raises ValueError for another dtype, shape or device.
    """
    if use_reference() or (x.is_cuda and not exact):
        return linear_ref(x, w, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, bias)):
        return _Linear.apply(x, w, bias)
    return _forward(x, w, bias)


def linear_out(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None, *, exact: bool = False
) -> torch.Tensor:
    """The same for x [M,K] into out [M,N], whose rows may be apart, as those of x may; returns out. No gradients.

    On a GPU out may be fp32 where x and w are bf16: the sums are then not rounded to bf16.
    """
    if use_reference() or (x.is_cuda and not exact):
        if x.is_cuda and out.dtype != x.dtype:
            torch.mm(x, w.t(), out_dtype=out.dtype, out=out)
        else:
            torch.mm(x, w.t(), out=out)
        return out if bias is None else out.add_(bias)
    _C.linear(view(x), view(w), optional_view(bias), view(out), stream(x))
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [M,K] with contiguous rows; a copy only where its strides leave no other way."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _forward(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dim() == 0 or w.dim() != 2:
        raise ValueError(f"linear: x must be [...,K] and w [N,K], got {list(x.shape)} and {list(w.shape)}")
    rows = _rows(x)
    y = x.new_empty(rows.shape[0], w.shape[0], dtype=torch.float32)
    _C.linear(view(rows), view(w), optional_view(bias), view(y), stream(x))
    return y.view(*x.shape[:-1], w.shape[0]).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return _forward(x, w, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        rows = _rows(dy)
        need_x, need_w, need_bias = ctx.needs_input_grad
        dx = torch.mm(rows, w).view(x.shape) if need_x else None
        dw = torch.mm(rows.t(), _rows(x)) if need_w else None
        return dx, dw, rows.sum(0, dtype=torch.float32) if need_bias else None


def linear_ref(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain torch, in the precision of x."""
    return F.linear(x, w, bias)
