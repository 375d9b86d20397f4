"""The short causal convolution of a Mamba layer (Gu and Dao, arXiv 2312.00752) and its silu, over packed sequences."""

from __future__ import annotations

import itertools
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view


@overload
def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, *, group: int = ...,
    initial: torch.Tensor | None = ..., silu: bool = ..., return_final: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, *, group: int = ...,
    initial: torch.Tensor | None = ..., silu: bool = ..., return_final: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    *,
    group: int = 1,
    initial: torch.Tensor | None = None,
    silu: bool = True,
    return_final: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """u[t,c] = silu(bias[c] + sum_k weight[c,k] x[t-(W-1)+k, s(c)]) within each sequence.

    x        [T,X] fp32, on a GPU also bf16 (arithmetic in fp32); its rows may be apart (a slice of a projection)
    weight   fp32 [D,W], W in 2..4, D a multiple of X; weight[:,W-1] multiplies the current token. bias fp32 [D] or None
    offsets  int64 [B+1], from 0, not falling: sequence b is tokens offsets[b]..offsets[b+1]-1, and may be empty.
             Tokens from offsets[B] on are padding: their results and gradients are 0
    group    channels c read source s(c) = group * (c // group // (D/X)) + c % group: each group of x is read by the D/X
             groups of channels that stand next to each other (Mamba layers whose x has fewer heads: arXiv 2504.10449).
             It divides X. D = X: s(c) = c for every group
    initial  fp32 [B,W-1,X]: the inputs before each sequence, oldest first; None: zeros
    silu     False: the sum itself

    Returns u [T,D] in the dtype of x, and with return_final also fp32 [B,W-1,X]: the last W-1 inputs, `initial` of the
    tokens that follow. Differentiable in x, weight, bias and initial, also through final.
    A sequence's results depend on it alone, bit for bit on the CPU: not on how it is packed or cut, nor on threads.
    Raises ValueError for a wrong shape or dtype, and on the CPU for offsets that are none.
    """
    if x.ndim != 2 or weight.ndim != 2 or not x.shape[1] or weight.shape[0] % x.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "causal_conv1d: x must have shape [T,X] and weight [D,W] with D a multiple of X, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if group < 1 or x.shape[1] % group:
        raise ValueError(f"causal_conv1d: group must divide the {x.shape[1]} columns of x, got {group}")
    if use_reference():
        both = causal_conv1d_ref(x, weight, bias, offsets, group=group, initial=initial, silu=silu)
    else:
        both = _CausalConv1d.apply(x, weight, bias, offsets, group, initial, silu, return_final)
    return both if return_final else both[0]


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, group: int,
        initial: torch.Tensor | None, silu: bool, return_final: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        weight = weight.contiguous()
        u = x.new_empty(x.shape[0], weight.shape[0])
        sequences, kept = offsets.shape[0] - 1, weight.shape[1] - 1
        final = weight.new_empty(sequences, kept, x.shape[1]) if return_final else None
        _C.causal_conv1d(
            view(x), view(weight), optional_view(bias), view(offsets), optional_view(initial), view(u),
            optional_view(final), group, silu, stream(x),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, offsets, initial)
        ctx.rest = group, silu
        ctx.set_materialize_grads(False)
        return u, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, du: torch.Tensor | None, dfinal: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, offsets, initial = ctx.saved_tensors
        group, silu = ctx.rest
        du = x.new_zeros(x.shape[0], weight.shape[0]) if du is None else du.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dinitial = None if initial is None else torch.empty_like(initial)
        tiles = _C.causal_conv1d_tiles(x.shape[0], offsets.shape[0] - 1)
        dw = weight.new_empty(1 + tiles, weight.numel() + weight.shape[0])  # row 0: the sums, dweight before dbias
        _C.causal_conv1d_backward(
            view(x), view(weight), optional_view(bias), view(offsets), optional_view(initial), view(du),
            optional_view(dfinal), view(dx), optional_view(dinitial), view(dw), group, silu, stream(x),
        )  # fmt: skip
        dweight, dbias = dw[0].split([weight.numel(), weight.shape[0]])
        return (
            dx, dweight.clone().view_as(weight), None if bias is None else dbias.clone(), None, None,
            dinitial, None, None,
        )  # fmt: skip


def causal_conv1d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    *,
    group: int = 1,
    initial: torch.Tensor | None = None,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, final) in plain torch, in the precision of weight; autograd gives the gradients."""
    copies, width = weight.shape[0] // x.shape[1], weight.shape[1]
    inputs = x.to(weight.dtype)
    parts, final = [inputs.new_zeros(0, weight.shape[0])], []
    bounds = offsets.tolist()
    for sequence, (first, last) in enumerate(itertools.pairwise(bounds)):
        before = inputs.new_zeros(width - 1, x.shape[1]) if initial is None else initial[sequence]
        window = torch.cat([before, inputs[first:last]])
        final.append(window[last - first :])
        read = repeat_groups(window, group, copies)
        total = read.new_zeros(last - first, weight.shape[0]) if bias is None else bias.expand(last - first, -1)
        for k in range(width):
            total = total + weight[:, k] * read[k : k + last - first]
        parts.append(F.silu(total) if silu else total)
    u = F.pad(torch.cat(parts), (0, 0, 0, x.shape[0] - bounds[-1]))
    return u.to(x.dtype), torch.stack(final) if final else inputs.new_zeros(0, width - 1, x.shape[1])


def repeat_groups(x: torch.Tensor, group: int, copies: int) -> torch.Tensor:
    """[..,X] -> [..,X*copies]: each group of columns `copies` times in a row."""
    return x.unflatten(-1, (-1, group)).repeat_interleave(copies, -2).flatten(-2)
