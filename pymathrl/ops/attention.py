"""Causal attention with grouped queries: packed sequences (differentiable), and new tokens over a paged cache."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view
from pymathrl.ops.rotary import rotary_ref

MAX_HEAD = 256  # largest head size of the kernels (kMaxHead in csrc/attention.h); head sizes are multiples of 8
PAGE = 16  # positions of a page of the cache (kPage)


def attention_supports(head_dim: int) -> bool:
    """True where the kernels take heads of this size."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD


@functools.cache
def fused_attention() -> tuple[Callable[..., torch.Tensor] | None, str]:
    """The library kernel that `attention` uses on a GPU in 16-bit precision (None: our own), and its name. Ours is a
    warp per query without tiles: right, and no match for these. Looked for once per process."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        pass
    else:
        return functools.partial(flash_attn_varlen_func, causal=True, softmax_scale=1.0), "flash-attn"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, f"ours (no flash-attn, and torch {torch.__version__} has no varlen_attn)"
    if not {"enable_gqa", "window_size", "scale"} <= set(inspect.signature(varlen_attn).parameters):
        return None, f"ours (no flash-attn, and varlen_attn of torch {torch.__version__} takes no grouped queries)"
    kernel: Callable[..., Any] = functools.partial(varlen_attn, window_size=(-1, 0), scale=1.0, enable_gqa=True)
    return kernel, "torch's varlen_attn"


def attention(
    qkv: torch.Tensor, offsets: torch.Tensor, heads: int, kv_heads: int, longest: int | None = None
) -> torch.Tensor:
    """out[i,h] = sum_{j<=i} softmax_j(q_i . k_j) v_j within each sequence.

    qkv      [T,(H+2K)*E] fp32, on a GPU also bf16: H query heads, already scaled, then K key heads, then K value heads;
             E a multiple of 8, at most 256. Query head h reads key/value head h // (H/K)
    offsets  int64 [B+1], from 0, not falling: sequence b is tokens offsets[b]..offsets[b+1]-1, and may be empty.
             Tokens from offsets[B] on are padding: their results and gradients are 0
    longest  tokens of the longest sequence; saves a wait for the GPU where `fused_attention` runs, unused elsewhere

    Returns [T,H*E] in the dtype of qkv; differentiable in qkv. Values are the same for every thread count, and on the
    CPU bit for bit those of paged_attention, where `rotary` prepared the heads.
    Raises ValueError for a wrong shape, dtype or head size, and on the CPU for offsets that are none.
    """
    _check("attention", qkv, heads, kv_heads)
    if use_reference():
        return attention_ref(qkv, offsets, heads, kv_heads)
    if qkv.is_cuda and qkv.dtype != torch.float32 and (fused := fused_attention()[0]) is not None:
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
        bounds, longest = offsets.int(), int(offsets.diff().max()) if longest is None else longest
        return fused(q, k, v, bounds, bounds, longest, longest).flatten(1)
    return _Attention.apply(qkv, offsets, heads, kv_heads)


def paged_attention(
    qkv: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    table: torch.Tensor,
    rope: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Norm, rotation and write of new tokens, then out[r,h] = sum_j softmax_j(q_r . k_j) v_j over their sequences.

    qkv       [R,(H+2K)*E] fp32, on a GPU also bf16: the projection of one new token per row
    position  int64 [R] of the token in its sequence: it sees positions 0..position
    slot      int64 [R]: the row of `table` that is its sequence; -1: padding, its out is 0 and nothing is written.
              Tokens of one sequence are consecutive rows of rising positions; no two sequences write the same page
    table     int32 [S,C]: positions 16c..16c+15 of slot s are in page table[s,c]; pages may be shared
    rope      fp32 [P,E]: cosines of the E/2 angles of a position, then their sines; E as in `attention`
    keys      [pages,K,E,16], values [pages,K,16,E] in the dtype of qkv: the cache, written at the new positions
    out       [R,H*E] in the dtype of qkv, written
    scale     factor of q after norm and rotation
    q_norm, k_norm  [E] weights of an RMSNorm of each head before the rotation, with `eps`; None: no norm

    Not differentiable. A row's result depends on its sequence alone: not on how its tokens are cut into calls, on other
    rows, on the pages used, or on threads. On the CPU it is bit for bit what `rotary` and `attention` give.
    Raises ValueError for a wrong shape, dtype or head size, and on the CPU for slots, positions or pages out of range.
    """
    _check("paged_attention", qkv, heads, kv_heads)
    if use_reference():
        paged_attention_ref(
            qkv, position, slot, table, rope, keys, values, out,
            heads=heads, kv_heads=kv_heads, scale=scale, q_norm=q_norm, k_norm=k_norm, eps=eps,
        )  # fmt: skip
        return
    q_norm, k_norm = (None if norm is None else norm.float() for norm in (q_norm, k_norm))
    _C.paged_attention(
        view(qkv), view(position), view(slot), view(table), view(rope), view(keys), view(values), view(out),
        heads, kv_heads, scale, optional_view(q_norm), optional_view(k_norm), eps, stream(qkv),
    )  # fmt: skip


def _check(op: str, qkv: torch.Tensor, heads: int, kv_heads: int) -> None:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{op}: heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if qkv.ndim != 2 or qkv.shape[-1] % (heads + 2 * kv_heads):
        raise ValueError(
            f"{op}: qkv must have 2 dimensions, the last (H+2K)*E = {heads + 2 * kv_heads}*E, got {list(qkv.shape)}"
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, offsets: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
        qkv = qkv.contiguous()
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads) * heads)
        lse = qkv.new_empty(qkv.shape[0], heads, dtype=torch.float32)
        _C.attention(view(qkv), view(offsets), view(out), view(lse), heads, kv_heads, stream(qkv))
        ctx.save_for_backward(qkv, offsets, out, lse)
        ctx.shape = heads, kv_heads
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Any) -> tuple[torch.Tensor | None, ...]:
        qkv, offsets, out, lse = ctx.saved_tensors
        heads, kv_heads = ctx.shape
        dout = dout.contiguous()
        dqkv = torch.empty_like(qkv)
        _C.attention_backward(
            view(qkv), view(offsets), view(out), view(lse), view(dout), view(dqkv), heads, kv_heads, stream(qkv)
        )
        return dqkv, None, None, None


def attention_ref(qkv: torch.Tensor, offsets: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """The same in plain torch, in the precision of qkv (fp32 or float64); autograd gives the gradient."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(0, 1).split([heads, kv_heads, kv_heads])
    bounds = offsets.tolist()
    out = [qkv.new_zeros(heads, 0, q.shape[-1])]
    for first, last in itertools.pairwise(bounds):
        if first < last:
            out.append(
                F.scaled_dot_product_attention(
                    q[None, :, first:last], k[None, :, first:last], v[None, :, first:last],
                    is_causal=True, scale=1.0, enable_gqa=True,
                )[0]
            )  # fmt: skip
    return F.pad(torch.cat(out, 1).transpose(0, 1).flatten(1), (0, 0, 0, qkv.shape[0] - bounds[-1]))


def paged_attention_ref(
    qkv: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    table: torch.Tensor,
    rope: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """The same in plain torch, one row after the other, in the precision of qkv and the cache."""
    prepared = rotary_ref(qkv, position.clamp(min=0), rope, heads, kv_heads, scale, q_norm, k_norm, eps)
    q, k, v = prepared.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    for row, (at, sequence) in enumerate(zip(position.tolist(), slot.tolist(), strict=True)):
        if sequence < 0:
            out[row] = 0
            continue
        page, column = int(table[sequence, at // PAGE]), at % PAGE
        keys[page, :, :, column], values[page, :, column] = k[row], v[row]
        pages = table[sequence, : at // PAGE + 1].long()
        seen_keys = keys[pages].permute(1, 0, 3, 2).flatten(1, 2)[:, : at + 1]  # [K,n,E]
        seen_values = values[pages].transpose(0, 1).flatten(1, 2)[:, : at + 1]
        out[row] = F.scaled_dot_product_attention(
            q[row, None, :, None], seen_keys[None], seen_values[None], scale=1.0, enable_gqa=True
        ).flatten()
