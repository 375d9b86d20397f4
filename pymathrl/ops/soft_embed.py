"""A row of logits as one noisy input vector of the model instead of a token, and the log-density of that vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pymathrl.ops._call import _C, optional_view, use_reference, view
from pymathrl.ops._call import stream as stream_handle
from pymathrl.ops.linear import linear_out
from pymathrl.ops.sample_token import STREAM_NOISE, philox4x32_10_ref
from pymathrl.ops.token_logprob import support_mean_ref

Noise = tuple[int, torch.Tensor, torch.Tensor]  # seed, uid [N] int64, step [N] int64


@dataclass(frozen=True)
class SoftSampling:
    """How soft tokens are made: temperature > 0 divides the logits, sigma >= 0 is the noise in the units of the
    embedding table, top_k mixes the k most probable tokens only (0 = all)."""

    temperature: float
    sigma: float
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (0.0 < self.temperature < math.inf and 0.0 <= self.sigma < math.inf and self.top_k >= 0):
            raise ValueError(
                "SoftSampling: expected temperature > 0, sigma >= 0 and top_k >= 0, got "
                f"{self.temperature}, {self.sigma} and {self.top_k}"
            )


class SoftEmbed(NamedTuple):
    inputs: torch.Tensor  # [N,D] of the table's dtype: h~, what the model is fed
    logp: torch.Tensor  # [N] fp32, nats: -|h~ - h|^2 / (2 sigma^2); 0 at sigma = 0
    ids: torch.Tensor  # [N] int64: the most probable token, lowest index of equals; -1 where the row has none
    entropy: torch.Tensor  # [N] fp32, nats: of p
    mean_logp: torch.Tensor  # [N] fp32, nats: mean of ln p over the tokens kept
    kept_mass: torch.Tensor  # [N] fp32: the share of the probability that top_k left
    mean: torch.Tensor  # [N,D] fp32: h
    weights: torch.Tensor  # [N,V] fp32: p


class SoftOut(NamedTuple):
    """Where `soft_embed` writes; all contiguous but weights, whose rows may be apart."""

    weights: torch.Tensor  # fp32 [N,V]; may be the logits
    mean: torch.Tensor  # fp32 [N,D]
    inputs: torch.Tensor  # [N,D] of the table's dtype; read where `inputs` are given
    ids: torch.Tensor  # int64 [N]
    numbers: torch.Tensor  # fp32 [4,N]: logp, entropy, mean_logp, kept_mass


def soft_embed(
    logits: torch.Tensor,
    table: torch.Tensor,
    *,
    temperature: float,
    sigma: float,
    noise: Noise | None = None,
    inputs: torch.Tensor | None = None,
    top_k: int = 0,
    out: SoftOut | None = None,
) -> SoftEmbed:
    """h~ = h + sigma eps, h = sum_j p_j e_j, p = softmax(logits / temperature); logp = -|h~ - h|^2 / (2 sigma^2).

    logits [N,V] fp32, rows contiguous (a row stride is fine); table [V,D] contiguous, its rows e_j; fp32, on a GPU also
    bf16. top_k: p is that of the k largest logits (lowest index of equals), renormalised; 0 = the vocabulary.
    Exactly one of
      noise   (seed, uid [N], step [N]): eps is standard normal, a function of these and the coordinate alone (Philox,
              stream STREAM_NOISE), so that h~ does not depend on other rows, on their order or on threads
      inputs  h~ itself [N,D], of the table's dtype: logp is then that of it
    sigma >= 0, in the units of the table; 0, with noise, gives h~ = h and logp = 0.

    Differentiable, with inputs given, in logits and table through logp: u = (h~ - h) / sigma^2,
      dlogp/dz_j = (p_j / temperature) (e_j.u - sum_k p_k e_k.u),   dlogp/de_j = p_j u.
    Everything but logp is a constant. Mathematics in fp32; h~ as noise makes it is a constant too.
    out: with it nothing is allocated, no gradient is recorded, and the call can be part of a `_C.Program` or a graph.
    A row with a nan, a +inf or nothing but -inf gives id -1 and nan. Raises ValueError for a wrong argument.
    """
    if logits.ndim != 2 or table.ndim != 2 or logits.shape[1] != table.shape[0]:
        raise ValueError(
            f"soft_embed: logits must be [N,V] and table [V,D], got {list(logits.shape)} and {list(table.shape)}"
        )
    if not (temperature > 0.0 and math.isfinite(temperature)) or top_k < 0:
        raise ValueError(f"soft_embed: need temperature > 0 and top_k >= 0, got {temperature} and {top_k}")
    if (noise is None) == (inputs is None):
        raise ValueError("soft_embed: give noise (to draw the inputs) or inputs (to score them), and not both")
    if not (sigma >= 0.0 and math.isfinite(sigma)) or (inputs is not None and sigma == 0.0):
        raise ValueError(f"soft_embed: sigma must be >= 0, and > 0 to score inputs, got {sigma}")
    if use_reference():
        result = soft_embed_ref(
            logits, table, temperature=temperature, sigma=sigma, noise=noise, inputs=inputs, top_k=top_k
        )
        if out is not None:
            numbers = torch.stack([result.logp, result.entropy, result.mean_logp, result.kept_mass])
            values = (result.weights, result.mean, result.inputs, result.ids, numbers)
            for place, value in zip(out, values, strict=True):
                place.copy_(value)
        return result
    if out is None and inputs is not None and torch.is_grad_enabled() and (logits.requires_grad or table.requires_grad):
        return SoftEmbed(*_SoftEmbed.apply(logits, table, inputs, temperature, sigma, top_k))
    return _forward(logits, table, noise, inputs, temperature, sigma, top_k, out)


def soft_embed_backward(
    scored: SoftEmbed, table: torch.Tensor, grad_logp: torch.Tensor, *, temperature: float, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the logits [N,V] fp32, g u [N,D] of the table's dtype): the table's is weights^T (g u).

    scored: what `soft_embed` gave for inputs; grad_logp g [N] fp32. A row whose g is 0 gets exact zeros.
    """
    direction = (scored.inputs.float() - scored.mean) / sigma**2
    rows, width = scored.weights.shape
    shares = torch.where(grad_logp[:, None] == 0, 0.0, grad_logp[:, None] * direction).to(table.dtype)
    if use_reference():
        dots = direction.to(table.dtype).float() @ table.float().t()
        centred = dots - (scored.weights * dots).sum(-1, keepdim=True)
        scale = grad_logp[:, None] / temperature
        return torch.where(scale == 0, 0.0, scale * scored.weights * centred), shares
    dots = torch.empty(rows, width, dtype=torch.float32, device=table.device)
    linear_out(direction.to(table.dtype), table, dots)
    _C.soft_embed_backward(view(scored.weights), view(dots), view(grad_logp), temperature, stream_handle(dots))
    return dots, shares


def _forward(
    logits: torch.Tensor,
    table: torch.Tensor,
    noise: Noise | None,
    inputs: torch.Tensor | None,
    temperature: float,
    sigma: float,
    top_k: int,
    out: SoftOut | None,
) -> SoftEmbed:
    (rows, width), columns, device = logits.shape, table.shape[1], logits.device
    if out is None:
        out = SoftOut(
            torch.empty(rows, width, device=device),
            torch.empty(rows, columns, device=device),
            torch.empty(rows, columns, dtype=table.dtype, device=device) if inputs is None else inputs.contiguous(),
            torch.empty(rows, dtype=torch.int64, device=device),
            torch.empty(4, rows, device=device),
        )
    elif inputs is not None:
        out = out._replace(inputs=inputs)
    seed, uid, step = noise if noise is not None else (0, None, None)
    _C.soft_embed(
        view(logits), view(table), optional_view(uid), optional_view(step), view(out.weights), view(out.mean),
        view(out.inputs), view(out.ids), view(out.numbers), seed & (2**64 - 1), STREAM_NOISE, temperature, sigma, top_k,
        stream_handle(logits),
    )  # fmt: skip
    logp, entropy, mean_logp, kept_mass = out.numbers.unbind()
    return SoftEmbed(out.inputs, logp, out.ids, entropy, mean_logp, kept_mass, out.mean, out.weights)


class _SoftEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, table: torch.Tensor, inputs: torch.Tensor, temperature: float, sigma: float,
        top_k: int,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        result = _forward(logits, table, None, inputs.detach(), temperature, sigma, top_k, None)
        result = result._replace(inputs=result.inputs.clone())
        ctx.mark_non_differentiable(*(value for value in result if value is not result.logp))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(table, *result)
        ctx.temperature, ctx.sigma = temperature, sigma
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Any, grad_logp: Any, *constants: Any) -> tuple[torch.Tensor | None, ...]:
        if grad_logp is None:
            return (None,) * 6
        table, *values = ctx.saved_tensors
        scored = SoftEmbed(*values)
        dlogits, shares = soft_embed_backward(
            scored, table, grad_logp.contiguous(), temperature=ctx.temperature, sigma=ctx.sigma
        )
        dtable = scored.weights.t().to(table.dtype) @ shares if ctx.needs_input_grad[1] else None
        return dlogits, dtable, None, None, None, None


def soft_embed_ref(
    logits: torch.Tensor,
    table: torch.Tensor,
    *,
    temperature: float,
    sigma: float,
    noise: Noise | None = None,
    inputs: torch.Tensor | None = None,
    top_k: int = 0,
) -> SoftEmbed:
    """The same in plain torch, in the precision of the logits; autograd gives the gradients of logp."""
    z = logits / temperature
    kept = torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k < z.shape[1]:
        order = torch.sort(z, dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(kept).scatter(1, order[:, :top_k], True)
    logp_all = torch.log_softmax(z.masked_fill(~kept, -torch.inf), -1)
    weights = logp_all.exp()
    mean = weights @ table.to(z.dtype)
    if inputs is None:
        assert noise is not None, "soft_embed gives one of the two"
        eps = soft_noise_ref(*noise, table.shape[1]).to(z.dtype)
        inputs = (mean + sigma * eps).detach().to(table.dtype)
    square = (inputs.to(z.dtype) - mean).square().sum(-1)
    constant = logp_all.detach()
    entropy = -(constant.exp() * constant.masked_fill(constant == -torch.inf, 0.0)).sum(-1)
    mass = (torch.softmax(z.detach(), -1) * kept).sum(-1)
    ids = logits.argmax(-1).masked_fill(constant.isnan().any(-1), -1)
    logp = -square / (2 * sigma**2) if sigma > 0 else square * 0
    return SoftEmbed(
        inputs, logp, ids, entropy, support_mean_ref(constant), mass.clamp(max=1.0), mean.detach(), weights.detach()
    )


def soft_noise_ref(seed: int, uid: torch.Tensor, step: torch.Tensor, columns: int) -> torch.Tensor:
    """eps [N,columns] float64: Box-Muller on words 0 and 1, then 2 and 3, of the Philox block of four coordinates."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    block = torch.arange((columns + 3) // 4, device=uid.device)
    low, high = uid & 0xFFFFFFFF, (uid >> 32) & 0xFFFFFFFF
    counter = torch.broadcast_tensors(
        (step & 0xFFFFFFFF)[:, None], low[:, None], high[:, None], STREAM_NOISE + 256 * block
    )
    u = (torch.stack(philox4x32_10_ref(counter, key), -1).double() + 0.5) * 2.0**-32  # [N, blocks, 4]
    radius, angle = (-2 * u[..., 0::2].log()).sqrt(), 2 * math.pi * u[..., 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :columns]
