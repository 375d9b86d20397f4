"""The decoder in plain torch, one sequence, in the dtype of the weights: a float64 oracle with autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pymathrl.models import ModelConfig, rope_table


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

    for i in range(c.num_layers):
        w = {name.rsplit(".", 1)[1]: value for name, value in weights.items() if name.startswith(f"layers.{i}.")}
        qkv = norm(x, w["attn_norm"]) @ w["qkv"].T
        if c.attention_bias:
            qkv = qkv + w["qkv_bias"]
        q, k, v = qkv.view(len(ids), -1, e).split([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
        if c.qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        k, v = (z.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for z in (rotate(k), v))
        scores = torch.einsum("ihe,jhe->hij", rotate(q), k) * e**-0.5 + future
        x = x + torch.einsum("hij,jhe->ihe", scores.softmax(-1), v).flatten(1) @ w["out"].T
        gate, up = (norm(x, w["mlp_norm"]) @ w["gate_up"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w["down"].T
    return norm(x, weights["norm"])
