"""The decoder in plain torch, one sequence, in the dtype of the weights: a float64 oracle with autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pymathrl.models import ModelConfig, rope_table
from pymathrl.models.config import Mamba


def plain_hidden(
    config: ModelConfig, weights: Mapping[str, Tensor], ids: Tensor, inputs: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """ids int64 [T] -> [T,D] after the last norm; weights by the names of `Decoder.named_parameters`; inputs as in
    `Decoder.hidden`."""
    c, e = config, config.head_dim
    x = weights["embed"][ids]
    if inputs is not None:
        x = x.index_put((inputs[0],), inputs[1].to(x.dtype))
    table = rope_table(c, len(ids), x.device)[: len(ids), None].to(x.dtype)  # cosines, then sines
    cos, sin = table.split(e // 2, -1)
    future = torch.full((len(ids), len(ids)), -torch.inf, dtype=x.dtype).triu(1)

    def norm(z: Tensor, weight: Tensor) -> Tensor:
        return z * (z.square().mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * weight

    def rotate(z: Tensor) -> Tensor:
        a, b = z.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def mix(h: Tensor, w: dict[str, Tensor], attention: bool) -> Tensor:
        if not attention:
            return plain_mamba(c.mamba, w, h)[0]
        qkv = h @ w["qkv"].T
        if c.attention_bias:
            qkv = qkv + w["qkv_bias"]
        q, k, v = qkv.view(len(ids), -1, e).split([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
        if c.qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        k, v = (z.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for z in (rotate(k), v))
        scores = torch.einsum("ihe,jhe->hij", rotate(q), k) * e**-0.5 + future
        return torch.einsum("hij,jhe->ihe", scores.softmax(-1), v).flatten(1) @ w["out"].T

    for i in range(c.num_layers):
        w = {name.rsplit(".", 1)[1]: value for name, value in weights.items() if name.startswith(f"layers.{i}.")}
        x = x + mix(norm(x, w["mixer_norm"]), w, c.is_attention(i))
        gate, up = (norm(x, w["mlp_norm"]) @ w["gate_up"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w["down"].T
    return norm(x, weights["norm"])


def plain_mamba(
    m: Mamba | None, w: Mapping[str, Tensor], h: Tensor, biases: int = 2, tiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence h [T,D] through an M1 mixer, token by token as in the paper's algorithm: its output [T,D], the final
    state [I,N], and the repeated inputs of the convolution [T,I]. biases 1 and tiled are two plausible mistakes: stock
    Mamba's single bias, and mini-heads that are repeated as a whole."""
    assert m is not None
    z, x, b, c, r = (h @ w["in_proj"].T).split(m.parts, -1)
    copies = m.inner_size // m.xb_size
    x, b = (part.unflatten(-1, (-1, m.state_size)) for part in (x, b))
    x, b = (part.repeat(1, copies, 1) if tiled else part.repeat_interleave(copies, 1) for part in (x, b))
    x, c = x.flatten(1), c.unflatten(-1, (-1, m.state_size))
    padded = torch.cat([x.new_zeros(m.conv_width - 1, m.inner_size), x])
    windows = padded.unfold(0, m.conv_width, 1)  # [T,I,W]
    u = torch.nn.functional.silu((windows * w["conv"]).sum(-1) + w["conv_bias"])
    delta = torch.nn.functional.softplus(r @ w["dt_proj"].T + biases * w["dt_bias"])
    a, state, out = -w["a_log"].exp(), x.new_zeros(m.inner_size, m.state_size), []
    for t in range(len(h)):
        b_t, c_t = (part[t].repeat_interleave(m.state_size, 0) for part in (b, c))  # [I,N]: those of a channel's group
        state = (delta[t, :, None] * a).exp() * state + (delta[t] * u[t])[:, None] * b_t
        out.append((state * c_t).sum(-1) + w["d"] * u[t])
    return (torch.stack(out) * torch.nn.functional.silu(z)) @ w["out"].T, state, x
