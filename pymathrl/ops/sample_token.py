"""One token per row from filtered logits, with the log-prob, entropy and mean log-prob that training needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pymathrl.ops._call import _C, optional_view, use_reference, view
from pymathrl.ops._call import stream as stream_handle
from pymathrl.ops.token_logprob import TIE, support_mean_ref

STREAM_TOKEN, STREAM_NOISE, STREAM_DATA = 0, 1, 2  # of the random numbers: tokens, soft-token noise, tasks and data


class SampleToken(NamedTuple):
    ids: torch.Tensor  # [B] int64; -1 where the row has no distribution (nan, +inf, or nothing but -inf)
    logp: torch.Tensor  # [B] fp32, nats: of ids under the filtered, renormalised distribution
    entropy: torch.Tensor  # [B] fp32, nats: of that distribution
    mean_logp: torch.Tensor  # [B] fp32, nats: mean of its log-probs over the tokens that the filters kept
    kept_mass: torch.Tensor  # [B] fp32: the share of the probability that the filters left; 1 without filters


def support_bytes(width: int) -> int:
    """Bytes of one row's support: ceil(V/8)."""
    return (width + 7) // 8


def sample_token(
    logits: torch.Tensor,
    seed: int,
    uid: torch.Tensor,
    step: torch.Tensor,
    *,
    stream: int = STREAM_TOKEN,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    support: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> SampleToken:
    """Draw a token from softmax(logits / temperature) of each row, by inverse CDF in vocabulary order.

    logits [B,V] fp32, bf16 or fp16, rows contiguous (a row stride is fine); uid [B] int64, the sample a row belongs to;
    step [B] int64, the position of the token in it (low 32 bits).
    The uniform is Philox4x32-10 at key = seed, counter = (step, uid, stream): a pure function of these numbers, so a
    sample does not depend on the batch it was drawn in, on the order of rows or on the number of threads.

    temperature: 0 takes the largest logit (lowest index of equals) and reports the numbers of temperature 1.
    top_k (0 = off), top_p (1 = off), min_p (0 = off) act in this order, each on what the one before left, renormalised.
    Equal logits rank by index; each filter keeps at least one token; thresholds are met within 1e-6.
      top_p keeps the most probable tokens until their mass reaches top_p; min_p keeps p >= min_p * max p.

    logp, entropy and mean_logp belong to the distribution that the token is drawn from, renormalised over what the
    filters keep: p = (.5, .3, .15, .05) under top_p = 0.8 keeps {0, 1}, logp of token 0 is ln(.5/.8), mean_logp is the
    mean of two log-probs. They equal those of token_logprob bit for bit: without filters on the same logits, with
    filters on logits that are -inf outside `support`.
    support: uint8 [B, ceil(V/8)], contiguous, is written: bit j%8 of byte j//8 is 1 where the filters kept token j (all
    tokens where there are no filters, or temperature is 0), 0 where they cut it, its logit is -inf, or j >= V.
    A token with a logit of -inf is never drawn. Not differentiable.
    Raises ValueError for a wrong shape, dtype, device or setting. A row without a distribution raises nothing (on a GPU
    that would wait for the device): its id is -1, its numbers are nan and its support is empty.
    """
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"sample_token: logits must be [B,V], got {list(logits.shape)}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"sample_token: temperature must be 0 (greedy) or a positive number, got {temperature}")
    if top_k < 0 or not 0.0 <= top_p <= 1.0 or not 0.0 <= min_p <= 1.0:
        raise ValueError(
            f"sample_token: need top_k >= 0 and top_p, min_p in [0, 1], got top_k={top_k}, top_p={top_p}, min_p={min_p}"
        )
    if use_reference():
        drawn = sample_token_ref(
            logits, seed, uid, step, stream=stream, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            support=support,
        )  # fmt: skip
        if out is not None:
            out[0].copy_(drawn.ids)
            out[1].copy_(torch.stack(drawn[1:]))
        return drawn
    rows, device = logits.shape[0], logits.device
    if out is not None:
        ids, numbers = out
    else:
        ids = torch.empty(rows, dtype=torch.int64, device=device)
        numbers = torch.empty((4, rows), dtype=torch.float32, device=device)  # one allocation: calls cost microseconds
    _C.sample_token(
        view(logits), view(uid), view(step), view(ids), view(numbers), seed & (2**64 - 1), stream, temperature,
        top_k, top_p, min_p, optional_view(support), stream_handle(logits),
    )  # fmt: skip
    return SampleToken(ids, *numbers.unbind())


def sample_token_ref(
    logits: torch.Tensor,
    seed: int,
    uid: torch.Tensor,
    step: torch.Tensor,
    *,
    stream: int = STREAM_TOKEN,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    support: torch.Tensor | None = None,
) -> SampleToken:
    """The same in plain torch, in fp32 or, for float64 logits, in float64."""
    z = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    width = z.shape[1]
    greedy = temperature == 0.0
    z = z / (1.0 if greedy else temperature)
    top = z.amax(-1, keepdim=True)
    d = z - top
    e = d.exp()
    total = e.sum(-1, keepdim=True)
    order = torch.sort(z, dim=-1, descending=True, stable=True).indices
    ranked = e.gather(1, order)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if not greedy:
        if 0 < top_k < width:
            kept[:, top_k:] = False
        if top_p < 1.0:
            mass = (ranked * kept).cumsum(-1)
            kept &= (mass - ranked) < top_p * (1 - TIE) * mass[:, -1:]
        if min_p > 0.0:
            kept &= ranked >= min_p * (1 - TIE)
        kept[:, 0] = True
    inside = torch.zeros_like(kept).scatter(1, order, kept) & (z > -torch.inf)
    e = torch.where(inside, e, 0.0)
    mass = e.sum(-1, keepdim=True)
    u = philox_uniform_ref(seed, uid, step, stream)[:, None]
    above = (e.double().cumsum(-1) > u * e.double().sum(-1, keepdim=True)) & (e > 0)
    last = width - 1 - (e > 0).flip(-1).int().argmax(-1)  # where rounding leaves u * mass unreached
    ids = order[:, 0] if greedy else torch.where(above.any(-1), above.int().argmax(-1), last)
    logp_all = (d - mass.log()).masked_fill(~inside, -torch.inf)
    p = logp_all.exp()
    entropy = -(p * logp_all.masked_fill(p == 0, 0.0)).sum(-1)
    logp = logp_all.gather(1, ids[:, None])[:, 0]
    bad = ~total[:, 0].isfinite()
    if support is not None:
        support.copy_(support_pack_ref(inside & ~bad[:, None]))
    numbers = (logp, entropy, support_mean_ref(logp_all), (mass / total)[:, 0])
    return SampleToken(ids.masked_fill(bad, -1), *(x.masked_fill(bad, math.nan) for x in numbers))


def support_pack_ref(kept: torch.Tensor) -> torch.Tensor:
    """bool [B,V], True = inside -> the support, uint8 [B, ceil(V/8)]; bits past V are 0."""
    rows, width = kept.shape
    padded = kept.new_zeros(rows, 8 * support_bytes(width))
    padded[:, :width] = kept
    weight = 2 ** torch.arange(8, device=kept.device)
    return (padded.view(rows, -1, 8) * weight).sum(-1).to(torch.uint8)


def support_unpack(support: torch.Tensor, width: int) -> torch.Tensor:
    """The support, uint8 [B, ceil(V/8)] -> bool [B,V], True = inside."""
    bits = support[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=support.device) & 1
    return bits.flatten(1)[:, :width].bool()


def philox_uniform(seed: int, uid: torch.Tensor, step: torch.Tensor, stream: int = STREAM_TOKEN) -> torch.Tensor:
    """The uniforms in (0, 1) that sample_token draws with, [B] float64, for uid [B] and step [B] int64 on the CPU."""
    if use_reference():
        return philox_uniform_ref(seed, uid, step, stream)
    out = torch.empty(uid.shape, dtype=torch.float64)
    _C.philox_uniform(view(uid), view(step), view(out), seed & (2**64 - 1), stream)
    return out


def philox_uniform_ref(seed: int, uid: torch.Tensor, step: torch.Tensor, stream: int) -> torch.Tensor:
    """The same in int64 torch: ((x0 >> 8) + 0.5) * 2^-24 with x0 the first word of Philox4x32-10."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    low, high = uid & 0xFFFFFFFF, (uid >> 32) & 0xFFFFFFFF
    x0 = philox4x32_10_ref((step & 0xFFFFFFFF, low, high, torch.full_like(uid, stream)), key)[0]
    return ((x0 >> 8).double() + 0.5) * 2.0**-24


def philox4x32_10_ref(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product_words(c0, 0xD2511F53)
        high1, low1 = _product_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _product_words(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 32 bits of x * factor, in 16-bit halves: the whole product does not fit a signed int64."""
    low = x * (factor & 0xFFFF)  # < 2^48
    high = x * (factor >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & 0xFFFFFFFF
