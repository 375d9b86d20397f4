"""The selective scan of a Mamba-1 layer (Gu and Dao, arXiv 2312.00752), over packed sequences, with its gate."""

from __future__ import annotations

import itertools
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view


@overload
def selective_scan(
    u: torch.Tensor, dt: torch.Tensor, z: torch.Tensor | None, b: torch.Tensor, c: torch.Tensor, a_log: torch.Tensor,
    d: torch.Tensor, dt_bias: torch.Tensor, offsets: torch.Tensor, *, initial: torch.Tensor | None = ...,
    return_final: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: torch.Tensor, dt: torch.Tensor, z: torch.Tensor | None, b: torch.Tensor, c: torch.Tensor, a_log: torch.Tensor,
    d: torch.Tensor, dt_bias: torch.Tensor, offsets: torch.Tensor, *, initial: torch.Tensor | None = ...,
    return_final: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    z: torch.Tensor | None,
    b: torch.Tensor,
    c: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    offsets: torch.Tensor,
    *,
    initial: torch.Tensor | None = None,
    return_final: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = (d u + sum_n c[n] h[n]) silu(z) with h[n] = exp(delta a[n]) h[n] + delta u b[n], token by token within each
    sequence and channel by channel; delta = softplus(dt + dt_bias), a = -exp(a_log).

    u, dt, z [T,D] fp32, on a GPU also bf16 (arithmetic in fp32); z None: no gate
    b        [T,X], c [T,D] in the dtype of u: N numbers per group. Channel i reads group i // N of c and group
             i // N // (D/X) of b: each group of b is read by D/X groups of channels (arXiv 2504.10449)
    a_log    fp32 [D,N], N at most 128, entries below 88. d, dt_bias fp32 [D]
    offsets  int64 [B+1], from 0, not falling: sequence b is tokens offsets[b]..offsets[b+1]-1, and may be empty.
             Tokens from offsets[B] on are padding: their results and gradients are 0
    initial  fp32 [B,N,D]: the state before each sequence; None: zeros

    The rows of u, dt, z, b and c may be apart (slices of a projection). dt already has the bias of its projection:
    dt_bias comes on top (in M1's checkpoints it is the same vector once more).
    Returns y [T,D] in the dtype of u, and with return_final also fp32 [B,N,D]: the last state of each sequence.
    Differentiable in everything but offsets, also through final; a state per 64 tokens is kept for it.
    A sequence's results depend on it alone, bit for bit on the CPU: not on how it is packed or cut, nor on threads.
    Raises ValueError for a wrong shape or dtype, and on the CPU for offsets that are none.
    """
    if (
        u.ndim != 2
        or b.ndim != 2
        or a_log.ndim != 2
        or not all(n and u.shape[1] % n == 0 for n in (a_log.shape[1], b.shape[1]))
    ):
        raise ValueError(
            "selective_scan: u must have shape [T,D], b [T,X] and a_log [D,N] with D a multiple of X and of N, "
            f"got {list(u.shape)}, {list(b.shape)} and {list(a_log.shape)}"
        )
    if use_reference():
        both = selective_scan_ref(u, dt, z, b, c, a_log, d, dt_bias, offsets, initial=initial)
    else:
        inputs = (u, dt, z, b, c, a_log, d, dt_bias, initial)
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        both = _SelectiveScan.apply(*inputs, offsets, keep, return_final)
    return both if return_final else both[0]


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: torch.Tensor, dt: torch.Tensor, z: torch.Tensor | None, b: torch.Tensor, c: torch.Tensor,
        a_log: torch.Tensor, d: torch.Tensor, dt_bias: torch.Tensor, initial: torch.Tensor | None,
        offsets: torch.Tensor, keep: bool, return_final: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        a_log = a_log.contiguous()
        (tokens, channels), states, sequences = u.shape, a_log.shape[1], offsets.shape[0] - 1
        y = u.new_empty(tokens, channels)
        final = a_log.new_empty(sequences, states, channels) if return_final else None
        checkpoint = a_log.new_empty(_C.selective_scan_tiles(tokens, sequences), states, channels) if keep else None
        _C.selective_scan(
            view(u), view(dt), optional_view(z), view(b), view(c), view(a_log), view(d), view(dt_bias), view(offsets),
            optional_view(initial), view(y), optional_view(final), optional_view(checkpoint), stream(u),
        )  # fmt: skip
        ctx.save_for_backward(u, dt, z, b, c, a_log, d, dt_bias, offsets, checkpoint)
        ctx.has_initial = initial is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dfinal: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        u, dt, z, b, c, a_log, d, dt_bias, offsets, checkpoint = ctx.saved_tensors
        (channels, states), sequences = a_log.shape, offsets.shape[0] - 1
        dy = u.new_zeros(u.shape) if dy is None else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        du, ddt, db, dc = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, b, c))
        dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
        dinitial = a_log.new_empty(sequences, states, channels) if ctx.has_initial else None
        dw = a_log.new_empty(1 + sequences, states + 2, channels)  # row 0: the sums, of a_log before d and dt_bias
        _C.selective_scan_backward(
            view(u), view(dt), optional_view(z), view(b), view(c), view(a_log), view(d), view(dt_bias), view(offsets),
            view(checkpoint), view(dy), optional_view(dfinal), view(du), view(ddt), optional_view(dz), view(db),
            view(dc), optional_view(dinitial), view(dw), stream(u),
        )  # fmt: skip
        return (
            du, ddt, dz, db, dc, dw[0, :states].t().contiguous(), dw[0, states].clone(), dw[0, states + 1].clone(),
            dinitial, None, None, None,
        )  # fmt: skip


def selective_scan_ref(
    u: torch.Tensor,
    dt: torch.Tensor,
    z: torch.Tensor | None,
    b: torch.Tensor,
    c: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    offsets: torch.Tensor,
    *,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, final) in plain torch, in the precision of a_log; autograd gives the gradients."""
    channels, states = a_log.shape
    dtype, x = a_log.dtype, u.to(a_log.dtype)
    delta = F.softplus(dt.to(dtype) + dt_bias)
    decay = torch.exp(delta[..., None] * -a_log.exp())  # [T,D,N]
    b_of, c_of = (
        m.to(dtype).unflatten(-1, (-1, states)).repeat_interleave(channels // (m.shape[1] // states), 1) for m in (b, c)
    )
    added = (delta * x)[..., None] * b_of
    sums, final = [x.new_zeros(0, channels)], []
    bounds = offsets.tolist()
    for sequence, (first, last) in enumerate(itertools.pairwise(bounds)):
        h = a_log.new_zeros(channels, states) if initial is None else initial[sequence].t()
        for t in range(first, last):
            h = decay[t] * h + added[t]
            sums.append((c_of[t] * h).sum(-1)[None])
        final.append(h.t())
    last = bounds[-1]
    y = torch.cat(sums) + d * x[:last]
    if z is not None:
        y = y * F.silu(z[:last].to(dtype))
    y = F.pad(y, (0, 0, 0, u.shape[0] - last)).to(u.dtype)
    return y, torch.stack(final) if final else a_log.new_zeros(0, states, channels)
