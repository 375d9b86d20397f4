"""Causal attention, rotary positions and grouped queries: whole rows (differentiable), and one step with a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view

MAX_HEAD = 256  # largest head size of the kernels (kMaxHead in csrc/attention.h); head sizes are multiples of 8


class Attention(NamedTuple):
    out: torch.Tensor  # [B,S,H*E] fp32, as the output projection reads it; 0 in the padding
    keys: torch.Tensor  # [B,K,S,E] fp32, rotated, for a cache; constant


def attention_supports(head_dim: int) -> bool:
    """True where the kernels take heads of this size."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD


def attention(
    qkv: torch.Tensor, angle: torch.Tensor, heads: int, kv_heads: int, scale: float, pad: torch.Tensor | None = None
) -> Attention:
    """out[b,i,h] = sum_{j<=i} softmax_j(scale * (R_i q_i) . (R_j k_j)) v_j, straight from the projection.

    qkv    [B,S,(H+2K)*E] fp32: H query heads, then K key heads, then K value heads; E a multiple of 8, at most 256.
           Query head h reads key/value head h // (H/K)
    angle  [S,E/2] complex64: exp(i * angle) of each position; R turns the pair (2c, 2c+1) of a head by angle c
    pad    int64 [B] in [0,S): columns of left padding. Column c is position c - pad; padding is not seen, its results
           are 0. None: none. Padding on the right needs nothing: no query before it sees it

    Differentiable in qkv through out. Values are the same for every thread count, and on the CPU bit for bit those of
    decode_attention over the same keys. Raises ValueError for a wrong shape, dtype or head size.
    """
    _check(qkv, 3, heads, kv_heads)
    if use_reference():
        return attention_ref(qkv, angle, heads, kv_heads, scale, pad)
    out, keys, _ = _Attention.apply(qkv, angle, pad, heads, kv_heads, scale)
    return Attention(out, keys)


def decode_attention(
    qkv: torch.Tensor,
    angle: torch.Tensor,
    cache: torch.Tensor,
    pad: torch.Tensor,
    column: int,
    heads: int,
    kv_heads: int,
    scale: float,
) -> torch.Tensor:
    """One token per row: turns its q and k, writes k and v into the cache at `column`, attends over pad..column.

    qkv [B,(H+2K)*E] fp32; angle [>= column+1, E/2] complex64; cache [2,B,K,C,E] fp32, keys and values, written;
    pad int64 [B] in [0,column] as in `attention`. Returns [B,H*E]. Not differentiable.
    Raises ValueError for a wrong shape, dtype, head size, or a column outside the cache.
    """
    _check(qkv, 2, heads, kv_heads)
    if use_reference():
        return decode_attention_ref(qkv, angle, cache, pad, column, heads, kv_heads, scale)
    if cache.ndim != 5 or not cache.is_contiguous():  # it is written in place, so a copy of it would be lost
        raise ValueError(
            f"attention: cache must be a contiguous [2,B,K,C,E], got {list(cache.shape)}, strides {cache.stride()}"
        )
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads) * heads)
    _C.decode_attention(
        view(qkv), view(torch.view_as_real(angle)), view(cache.flatten(0, 1)), view(pad), view(out),
        column, heads, kv_heads, scale, stream(qkv),
    )  # fmt: skip
    return out


def _check(qkv: torch.Tensor, dims: int, heads: int, kv_heads: int) -> None:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"attention: heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if qkv.ndim != dims or qkv.shape[-1] % (heads + 2 * kv_heads):
        raise ValueError(
            f"attention: qkv must have {dims} dimensions, the last (H+2K)*E = {heads + 2 * kv_heads}*E, "
            f"got {list(qkv.shape)}"
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, angle: torch.Tensor, pad: torch.Tensor | None, heads: int, kv_heads: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        rows, columns, width = qkv.shape
        qkv = qkv.contiguous()
        head_dim = width // (heads + 2 * kv_heads)
        out = qkv.new_empty(rows, columns, heads * head_dim)
        keys = qkv.new_empty(rows, kv_heads, columns, head_dim)
        lse = qkv.new_empty(rows, heads, columns)
        angle = torch.view_as_real(angle)
        _C.attention(
            view(qkv), view(angle), optional_view(pad), view(keys), view(out), view(lse),
            heads, kv_heads, scale, stream(qkv),
        )  # fmt: skip
        ctx.mark_non_differentiable(keys, lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, angle, pad, keys, out, lse)
        ctx.shape = heads, kv_heads, scale
        return out, keys, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Any, *constants: Any) -> tuple[torch.Tensor | None, ...]:
        if dout is None:
            return (None,) * 6
        qkv, angle, pad, keys, out, lse = ctx.saved_tensors
        heads, kv_heads, scale = ctx.shape
        dqkv = torch.empty_like(qkv)
        dout = dout.contiguous()
        _C.attention_backward(
            view(qkv), view(angle), optional_view(pad), view(keys), view(out), view(lse), view(dout), view(dqkv),
            heads, kv_heads, scale, stream(qkv),
        )  # fmt: skip
        return dqkv, None, None, None, None, None


def rotate_ref(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """x [..., E] with the pairs (2c, 2c+1) turned by angle [..., E/2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angle.to(pairs.dtype)).flatten(-2)


def attention_ref(
    qkv: torch.Tensor, angle: torch.Tensor, heads: int, kv_heads: int, scale: float, pad: torch.Tensor | None = None
) -> Attention:
    """The same in plain torch, in the precision of qkv (fp32 or float64); autograd gives the gradient."""
    columns = qkv.shape[1]
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    column = torch.arange(columns, device=qkv.device)
    first = torch.zeros_like(qkv[:, 0, 0], dtype=torch.int64) if pad is None else pad
    real = column >= first[:, None]  # [B,S]
    turn = angle[(column - first[:, None]).clamp(min=0)][:, None]
    q, k = rotate_ref(q, turn), rotate_ref(k, turn) * real[:, None, :, None]
    # padding columns see themselves: a softmax without any key would be nan
    seen = (column <= column[:, None]) & real[:, None] | torch.eye(columns, dtype=torch.bool, device=qkv.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=True)
    out = torch.where(real[:, None, :, None], out, 0.0)
    return Attention(out.transpose(1, 2).flatten(-2), k.detach())


def decode_attention_ref(
    qkv: torch.Tensor,
    angle: torch.Tensor,
    cache: torch.Tensor,
    pad: torch.Tensor,
    column: int,
    heads: int,
    kv_heads: int,
    scale: float,
) -> torch.Tensor:
    """The same in plain torch, in the precision of qkv and cache."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    turn = angle[column - pad][:, None]
    cache[0, :, :, column], cache[1, :, :, column] = rotate_ref(k, turn), v
    keys, values = cache[:, :, :, : column + 1].unbind(0)
    seen = torch.arange(column + 1, device=qkv.device) >= pad[:, None]
    q = rotate_ref(q, turn)[:, :, None]
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None], scale=scale, enable_gqa=True)
    return out.flatten(1)
