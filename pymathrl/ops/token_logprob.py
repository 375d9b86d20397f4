"""Log-probs of tokens and what else one sweep over the logits gives: entropy, ROVER's mean log-prob, top prob."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view

PROXY_FLOOR = -1e4  # proxy_logp of a token that min-p filters out
TIE = 1e-6  # relative slack within which a probability equals a filter's threshold (kTie in csrc/common/row_softmax.h)


class TokenLogprob(NamedTuple):
    logp: torch.Tensor  # [N] fp32, nats: log-prob of ids under softmax(logits / temperature)
    entropy: torch.Tensor  # [N] fp32, nats
    mean_logp: torch.Tensor  # [N] fp32, nats: mean of the log-probs over the tokens of finite logit; constant
    top_prob: torch.Tensor  # [N] fp32: the largest probability; constant
    lse: torch.Tensor  # [N] float64, nats: logsumexp(logits / temperature), what the backward needs; constant
    proxy_logp: torch.Tensor | None = None  # [N] fp32, nats: with min_p given; constant


def token_logprob(
    logits: torch.Tensor, ids: torch.Tensor, *, temperature: float = 1.0, min_p: float | None = None
) -> TokenLogprob:
    """logp[n] = z_y/T - logsumexp(z/T) with z = logits[n], y = ids[n]; and of p = softmax(z/T): entropy -sum p ln p,
    mean_logp = mean_j(z_j)/T - logsumexp(z/T), top_prob = max p, lse = logsumexp(z/T).

    logits [N,V] fp32, bf16 or fp16, rows contiguous (a row stride is fine); ids [N] int64 in [0,V).
    min_p: also give proxy_logp, the log-prob after dropping all tokens with p < min_p * max p and renormalising
           (equality, within 1e-6, is kept); -1e4 where y itself is dropped (Lp-Reg, arXiv 2510.03222).

    Differentiable in logits through logp and entropy; everything else is a constant. Mathematics in fp32, whatever the
    dtype of the logits; gradients come in the dtype of the logits.
    A logit of -inf is a token outside the support (see sample_token): p = 0, nothing in the entropy, not
    counted in mean_logp, gradient 0. logp, entropy and mean_logp are then those that sample_token reports under the
    filters that cut it, bit for bit. logp of an id outside the support is -inf.
    A row with a nan, a +inf or nothing but -inf gives nan. The result of a row depends on that row alone, bit for bit.
    Raises ValueError for a wrong shape, dtype, device, temperature, or an id outside [0,V); on a GPU, where that check
    would wait for the device, such a row gives nan and nothing is read out of bounds.
    """
    _check(logits, ids, temperature)
    if min_p is not None and not 0.0 <= min_p <= 1.0:
        raise ValueError(f"token_logprob: min_p must be in [0, 1], got {min_p}")
    if use_reference():
        return token_logprob_ref(logits, ids, temperature=temperature, min_p=min_p)
    if logits.requires_grad and torch.is_grad_enabled():
        return TokenLogprob(*_TokenLogprob.apply(logits, ids, temperature, min_p))
    return _forward(logits, ids, temperature, min_p)


def token_logprob_backward_(
    logits: torch.Tensor,
    ids: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The gradient to the logits, written over the logits: dz_j = (g/T)(1[j=y] - p_j) + (gH/T)(-p_j (ln p_j + H)).

    logits [N,V] (overwritten, returned), ids [N] as in the forward; lse [N] float64 and entropy [N] fp32 are its
    results; grad_logp g [N] and grad_entropy gH [N] fp32, None = zero; entropy may be None where grad_entropy is.
    A row whose g and gH are exactly 0 gets exact zeros, whatever its logits hold; so does every logit of -inf. Not seen
    by autograd.
    Raises ValueError like token_logprob, and for logits whose rows overlap in memory.
    """
    _check(logits, ids, temperature)
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError("token_logprob: rows of logits overlap in memory, cannot write over them; call .contiguous()")
    if use_reference():
        gradient = token_logprob_backward_ref(logits, ids, lse, entropy, grad_logp, grad_entropy, temperature)
        return logits.copy_(gradient)
    return _backward(logits, ids, lse, entropy, grad_logp, grad_entropy, temperature, logits)


def _check(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> None:
    if logits.ndim != 2 or ids.ndim != 1 or logits.shape[0] != ids.shape[0] or logits.shape[1] < 1:
        raise ValueError(
            f"token_logprob: logits must be [N,V] and ids [N], got {list(logits.shape)} and {list(ids.shape)}"
        )
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"token_logprob: temperature must be a positive number, got {temperature}")


def _forward(logits: torch.Tensor, ids: torch.Tensor, temperature: float, min_p: float | None) -> TokenLogprob:
    rows, device = logits.shape[0], logits.device
    logp, entropy, mean_logp, top_prob = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(4))
    lse = torch.empty(rows, dtype=torch.float64, device=device)
    proxy = None if min_p is None else torch.empty(rows, dtype=torch.float32, device=device)
    _C.token_logprob(
        view(logits), view(ids), view(logp), view(entropy), view(mean_logp), view(top_prob), view(lse),
        optional_view(proxy), temperature, min_p or 0.0, stream(logits),
    )  # fmt: skip
    return TokenLogprob(logp, entropy, mean_logp, top_prob, lse, proxy)


def _backward(
    logits: torch.Tensor,
    ids: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    temperature: float,
    out: torch.Tensor,
) -> torch.Tensor:
    _C.token_logprob_backward(
        view(logits), view(ids), view(lse), optional_view(entropy), optional_view(grad_logp),
        optional_view(grad_entropy), view(out), temperature, stream(logits),
    )  # fmt: skip
    return out


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, ids: torch.Tensor, temperature: float, min_p: float | None
    ) -> tuple[torch.Tensor | None, ...]:
        results = _forward(logits, ids, temperature, min_p)
        _, entropy, mean_logp, top_prob, lse, proxy = results
        ctx.mark_non_differentiable(*(t for t in (mean_logp, top_prob, lse, proxy) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, ids, lse, entropy)
        ctx.temperature = temperature
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp: Any, grad_entropy: Any, *constants: Any) -> tuple[torch.Tensor | None, ...]:
        logits, ids, lse, entropy = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None
        grad_logp, grad_entropy = (None if g is None else g.contiguous() for g in (grad_logp, grad_entropy))
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        gradient = _backward(logits, ids, lse, entropy, grad_logp, grad_entropy, ctx.temperature, out)
        return gradient, None, None, None


def token_logprob_ref(
    logits: torch.Tensor, ids: torch.Tensor, *, temperature: float = 1.0, min_p: float | None = None
) -> TokenLogprob:
    """The same in plain torch, in fp32 or, for float64 logits, in float64; autograd gives the gradient."""
    z = (logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits) / temperature
    logp = torch.log_softmax(z, dim=-1)
    p = logp.exp()
    chosen = logp.gather(1, ids[:, None])[:, 0]
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    proxy = None
    if min_p is not None:
        constant = z.detach()
        top = constant.amax(-1, keepdim=True)
        kept = (constant - top).exp() >= min_p * (1 - TIE)
        rest = torch.log_softmax(constant.masked_fill(~kept, -torch.inf), dim=-1).gather(1, ids[:, None])[:, 0]
        proxy = rest.masked_fill(rest == -torch.inf, PROXY_FLOOR)
    return TokenLogprob(
        chosen, entropy, support_mean_ref(logp.detach()), p.amax(-1).detach(),
        torch.logsumexp(z, -1).double().detach(), proxy,
    )  # fmt: skip


def support_mean_ref(logp: torch.Tensor) -> torch.Tensor:
    """Mean over each row of logp [N,V] of the entries that are not -inf."""
    inside = logp != -torch.inf  # nan counts: it must stay
    return logp.masked_fill(~inside, 0.0).sum(-1) / inside.sum(-1)


def token_logprob_backward_ref(
    logits: torch.Tensor,
    ids: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The formula of token_logprob_backward_ in plain torch, as a new tensor."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp = (logits.double() / temperature - lse.double()[:, None]).to(compute)
    p = logp.exp()
    gradient = torch.zeros_like(p)
    skip = torch.ones_like(ids, dtype=torch.bool)
    if grad_logp is not None:
        own = torch.zeros_like(p).scatter_(1, ids[:, None], 1.0)
        gradient += grad_logp.to(compute)[:, None] * (own - p)
        skip &= grad_logp == 0
    if grad_entropy is not None:
        if entropy is None:
            raise ValueError("token_logprob: grad_entropy needs the forward's entropy [N], got None")
        inner = logp.masked_fill(p == 0, 0.0) + entropy.to(compute)[:, None]
        gradient -= grad_entropy.to(compute)[:, None] * p * inner
        skip &= grad_entropy == 0
    constant = skip[:, None] | (logits == -torch.inf)
    return (gradient / temperature).masked_fill(constant, 0.0).to(logits.dtype)
