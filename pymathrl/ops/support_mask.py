"""The sampler's support, put on the update's logits: truncated sampling (top-k, top-p, min-p) accounted for."""

from __future__ import annotations

import torch

from pymathrl.ops._call import _C, stream, use_reference, view


def support_bytes(width: int) -> int:
    """Bytes of one row's support: ceil(V/8)."""
    return (width + 7) // 8


def support_mask_(logits: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """logits[n,j] = -inf where bit j%8 of support[n, j//8] is 0; in place, returned. Everything else keeps its bits.

    logits [N,V] fp32, bf16 or fp16, rows contiguous (a row stride is fine); support uint8 [N, ceil(V/8)], contiguous,
    as sample_token(..., support=) writes it; bits past V are not read.
    token_logprob of the result has the logp, entropy and mean_logp that the sampler reported, bit for bit, where the
    logits are the sampler's: p = (.5, .3, .15, .05) with support {0, 1} gives logp of token 0 = ln(.5/.8).
    A row with an empty support has no distribution: nan. Not seen by autograd; a masked logit is a constant.
    Raises ValueError for a wrong shape, dtype or device, and for logits whose rows overlap in memory.
    """
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"support_mask: logits must be [N,V], got {list(logits.shape)}")
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError("support_mask: rows of logits overlap in memory, cannot write over them; call .contiguous()")
    if use_reference():
        return logits.copy_(support_mask_ref(logits, support))
    _C.support_mask(view(logits), view(support), stream(logits))
    return logits


def support_mask_ref(logits: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, as a new tensor; any floating dtype."""
    return logits.masked_fill(~support_unpack_ref(support, logits.shape[1]), -torch.inf)


def support_pack_ref(kept: torch.Tensor) -> torch.Tensor:
    """bool [B,V], True = inside -> the support, uint8 [B, ceil(V/8)]; bits past V are 0."""
    rows, width = kept.shape
    padded = kept.new_zeros(rows, 8 * support_bytes(width))
    padded[:, :width] = kept
    weight = 2 ** torch.arange(8, device=kept.device)
    return (padded.view(rows, -1, 8) * weight).sum(-1).to(torch.uint8)


def support_unpack_ref(support: torch.Tensor, width: int) -> torch.Tensor:
    """The support, uint8 [B, ceil(V/8)] -> bool [B,V], True = inside."""
    bits = support[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=support.device) & 1
    return bits.flatten(1)[:, :width].bool()
