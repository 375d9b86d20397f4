"""Rotary positions (Su et al., arXiv 2104.09864) on a packed projection, after Qwen3's norms of the heads."""

from __future__ import annotations

from typing import Any

import torch

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view


def rotary(
    qkv: torch.Tensor,
    position: torch.Tensor,
    rope: torch.Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """[scale * R(norm(q)) | R(norm(k)) | v] with norm(x) = x / sqrt(mean(x^2) + eps) * weight over each head.

    qkv       [T,(H+2K)E] fp32, on a GPU also bf16: H query heads, K key heads, K value heads; E a multiple of 8,
              at most 256. Arithmetic in fp32
    position  int64 [T], rows of rope
    rope      [P,E] fp32: the cosines of a position's E/2 angles, then their sines. R turns the pairs (j, j+E/2):
              out_j = x_j c_j - x_{j+E/2} s_j, out_{j+E/2} = x_{j+E/2} c_j + x_j s_j
    scale     of the queries: E**-0.5 for attention without a factor of its own
    q_norm, k_norm  [E], weights of the norms; None: no norm

    Differentiable in qkv, q_norm and k_norm. Without norms only position and rope are kept for the gradient, which is
    the rotation back. Raises ValueError for a wrong shape, dtype, head size or (on a CPU) a position outside rope.
    """
    if qkv.ndim != 2 or qkv.shape[1] % (heads + 2 * kv_heads):
        raise ValueError(
            f"rotary: qkv must have shape [T,(H+2K)*E] with H={heads}, K={kv_heads}, got {list(qkv.shape)}"
        )
    if use_reference():
        return rotary_ref(qkv, position, rope, heads, kv_heads, scale, q_norm, k_norm, eps)
    q_norm, k_norm = (None if norm is None else norm.float() for norm in (q_norm, k_norm))
    return _Rotary.apply(qkv, position, rope, heads, kv_heads, scale, q_norm, k_norm, eps)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, position: torch.Tensor, rope: torch.Tensor, heads: int, kv_heads: int,
        scale: float, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
    ) -> torch.Tensor:  # fmt: skip
        qkv = qkv.contiguous()
        out = torch.empty_like(qkv)
        _C.rotary(
            view(qkv), view(position), view(rope), optional_view(q_norm), optional_view(k_norm), view(out),
            heads, kv_heads, scale, eps, stream(qkv),
        )  # fmt: skip
        ctx.save_for_backward(None if q_norm is None and k_norm is None else qkv, position, rope, q_norm, k_norm)
        ctx.rest = heads, kv_heads, scale, eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, position, rope, q_norm, k_norm = ctx.saved_tensors
        heads, kv_heads, scale, eps = ctx.rest
        dout = dout.contiguous()
        dqkv, dw = torch.empty_like(dout), None
        if qkv is not None:
            dw = rope.new_empty(1 + _C.rotary_blocks(dout.shape[0]), 2 * rope.shape[1])
        _C.rotary_backward(
            optional_view(qkv), view(position), view(rope), optional_view(q_norm), optional_view(k_norm), view(dout),
            view(dqkv), optional_view(dw), heads, kv_heads, scale, eps, stream(dout),
        )  # fmt: skip
        dq_norm, dk_norm = (None, None) if dw is None else dw[0].clone().chunk(2)
        return (
            dqkv, None, None, None, None, None,
            None if q_norm is None else dq_norm, None if k_norm is None else dk_norm, None,
        )  # fmt: skip


def rotary_ref(
    qkv: torch.Tensor,
    position: torch.Tensor,
    rope: torch.Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The same in plain torch, in the precision of qkv."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    cosine, sine = rope[position][:, None].chunk(2, -1)

    def prepare(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
        low, high = x.chunk(2, -1)
        return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)

    return torch.cat([prepare(q, q_norm) * scale, prepare(k, k_norm), v], 1).flatten(1)
