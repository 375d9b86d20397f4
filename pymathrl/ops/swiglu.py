"""SwiGLU (Shazeer, arXiv 2002.05202), straight from the projection that gives gate and up side by side."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pymathrl.ops._call import _C, stream, use_reference, view


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """out = silu(gate) * up with silu(x) = x / (1 + exp(-x)).

    gate_up [T,2F] fp32, on a GPU also bf16 (arithmetic in fp32): gate in the first F columns, up in the rest.
    Returns [T,F]. Differentiable; gate_up alone is kept for the gradient. Raises ValueError for another shape or dtype.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up must have shape [T,2F], got {list(gate_up.shape)}")
    if use_reference():
        return swiglu_ref(gate_up)
    return _Swiglu.apply(gate_up)


def swiglu_out(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """The same into `out` [T,F], without gradients and without allocating: for buffers that stay where they are."""
    if use_reference():
        out.copy_(swiglu_ref(gate_up))
    else:
        _C.swiglu(view(gate_up), view(out), stream(gate_up))


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        _C.swiglu(view(gate_up), view(out), stream(gate_up))
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        dout, dgate_up = dout.contiguous(), torch.empty_like(gate_up)
        _C.swiglu_backward(view(gate_up), view(dout), view(dgate_up), stream(gate_up))
        return dgate_up


def swiglu_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, in the precision of gate_up."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
