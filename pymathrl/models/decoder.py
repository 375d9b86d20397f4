"""Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, optional q/k/v bias and tied head.

Two forward passes share one copy of the weights: `hidden` (whole right-padded rows, autograd) for the update, and
`prefill` + `decode` (a KV cache, no gradients, few calls per layer) for generation.

q, k and v are one matrix `qkv`, gate and up are one matrix `gate_up`: one GEMM each.

Dimensions: B rows, S columns, D hidden size, H query heads, K key/value heads, E head size, F MLP size, V vocabulary.
Weights and activations have the parameter dtype; norm statistics, rotation and logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymathrl.errors import UserError
from pymathrl.models.config import ModelConfig, rope_table
from pymathrl.ops._call import use_reference
from pymathrl.ops.attention import attention, decode_attention
from pymathrl.ops.rms_norm import add_rms_norm, rms_norm

PREFILL_TOKENS = 16384  # padded tokens of one prefill piece: bounds the MLP's workspace (2F floats a token)


class Layer(nn.Module):
    """One block: attention and MLP, each behind its norm and added to the residual stream."""

    def __init__(self, c: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.config = c
        self.attn_norm = empty(c.hidden_size)
        self.qkv = empty(q + 2 * kv, c.hidden_size)
        self.qkv_bias = empty(q + 2 * kv) if c.attention_bias else None
        self.q_norm = empty(c.head_dim) if c.qk_norm else None
        self.k_norm = empty(c.head_dim) if c.qk_norm else None
        self.out = empty(c.hidden_size, q)
        self.mlp_norm = empty(c.hidden_size)
        self.gate_up = empty(2 * c.intermediate_size, c.hidden_size)
        self.down = empty(c.hidden_size, c.intermediate_size)

    def project(self, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,S,D], angle complex64 [.., S,1,E/2] -> q [B,H,S,E], k [B,K,S,E] (rotated), v [B,K,S,E]."""
        c = self.config
        h = F.rms_norm(x, (c.hidden_size,), self.attn_norm, c.rms_norm_eps)
        heads = c.num_heads + c.num_kv_heads
        qk, v = F.linear(h, self.qkv, self.qkv_bias).split([heads * c.head_dim, c.num_kv_heads * c.head_dim], -1)
        q, k = (
            turn(self.norm_heads(qk.unflatten(-1, (heads, c.head_dim))), angle)
            .transpose(1, 2)
            .split([c.num_heads, c.num_kv_heads], 1)
        )
        return q, k, v.unflatten(-1, (c.num_kv_heads, c.head_dim)).transpose(1, 2)

    def norm_heads(self, qk: Tensor) -> Tensor:
        """qk [..,H+K,E] -> the same after the norm of each head, where the model has one."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        c = self.config
        q, k = qk.split([c.num_heads, c.num_kv_heads], -2)
        norm = lambda x, weight: F.rms_norm(x, (c.head_dim,), weight, c.rms_norm_eps)
        return torch.cat([norm(q, self.q_norm), norm(k, self.k_norm)], -2)

    def step_weights(self) -> StepWeights:
        return StepWeights(
            self.attn_norm, self.qkv, self.qkv_bias, self.out.t(), self.mlp_norm, self.gate_up, self.down.t()
        )

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B,S,D], attended [B,H,S,E] -> the block's output [B,S,D]."""
        c = self.config
        x = x + F.linear(attended.transpose(1, 2).flatten(-2), self.out)
        h = F.rms_norm(x, (c.hidden_size,), self.mlp_norm, c.rms_norm_eps)
        gate, up = F.linear(h, self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def fused(self, x: Tensor, branch: Tensor | None, angle: Tensor) -> tuple[Tensor, Tensor]:
        """The block in few passes over memory. x [B,S,D]: residual stream, branch [B,S,D]: what is still to be added to
        it (None: nothing), angle complex64 [S,E/2] -> the same two after this block."""
        c = self.config
        if branch is None:
            h = rms_norm(x, self.attn_norm, c.rms_norm_eps)
        else:
            x, h = add_rms_norm(branch, x, self.attn_norm, c.rms_norm_eps)
        qkv = F.linear(h, self.qkv, self.qkv_bias)
        attended = attention(qkv, angle, c.num_heads, c.num_kv_heads, c.head_dim**-0.5).out
        x, h = add_rms_norm(F.linear(attended, self.out), x, self.mlp_norm, c.rms_norm_eps)
        gate, up = F.linear(h, self.gate_up).chunk(2, -1)
        return x, F.linear(F.silu(gate) * up, self.down)

    def forward(self, x: Tensor, angle: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B,S,D] and this layer's k and v [B,K,S,E]. mask: bool [B,1,S,S], True = visible; None = causal."""
        q, k, v = self.project(x, angle)
        group = self.config.num_heads // self.config.num_kv_heads
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1)
        return self.finish(x, attended), k, v


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """x [..,E] rotated by angle complex64 [..,E/2]: pair j is (x_j, x_{j+E/2})."""
    first, second = x.float().chunk(2, -1)
    pairs = torch.complex(first, second) * angle
    return torch.cat([pairs.real, pairs.imag], -1).to(x.dtype)


class StepWeights(NamedTuple):
    """A layer's weights as `decode` uses them. Module attributes cost a dictionary search each; these do not."""

    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out_t: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down_t: Tensor


class Cache:
    """Keys and values of B rows in use up to column `length`, the same for all rows: prompts are padded on the left.

    kv       per layer [2,B,K,C,E], keys then values, C = capacity in columns. A row's used part of a head is one block
             of memory: keys stored as [E,C] save 5 us a layer at 64 rows and cost 3 times the time at 512
    pad      int64 [B], columns of left padding of each row
    bias     [B,1,1,C], -inf in the padding, 0 elsewhere; None while no row is padded
    weights  per layer, as `decode` multiplies with them: views of the parameters, never copies
    """

    def __init__(self, model: Decoder, rows: int, capacity: int, pad: Tensor | None = None) -> None:
        c = model.config
        like = model.embed
        self.model = model
        self.length = 0
        self.capacity = capacity
        shape = (2, rows, c.num_kv_heads, capacity, c.head_dim)
        self.kv = [like.new_empty(shape, requires_grad=False) for _ in model.layers]
        self.pad = torch.zeros(rows, dtype=torch.int64, device=like.device) if pad is None else pad
        self.bias = _pad_bias(self.pad, capacity, like.dtype)
        self.angles = model.step_angles(capacity)
        self.weights = [layer.step_weights() for layer in cast(Iterator[Layer], iter(model.layers))]

    @property
    def rows(self) -> int:
        return self.pad.numel()

    def select(self, rows: Tensor, capacity: int | None = None) -> None:
        """Keeps these rows (int64 indices, repeats allowed) in this order; capacity: new number of columns."""
        capacity = self.capacity if capacity is None else capacity
        n = self.length
        if capacity < n:
            raise ValueError(f"Cache.select: capacity must be >= the {n} columns in use, got {capacity}")
        for i, old in enumerate(self.kv):
            self.kv[i] = old.new_empty(2, rows.numel(), old.shape[2], capacity, old.shape[4])
            self.kv[i][:, :, :, :n] = old[:, :, :, :n].index_select(1, rows)
        self.pad = self.pad[rows]
        self.bias = None if self.bias is None else _pad_bias(self.pad, capacity, self.bias.dtype)
        if capacity != self.capacity:
            self.angles, self.capacity = self.model.step_angles(capacity), capacity

    def expand(self, n: int) -> None:
        """Repeats each row n times in a row: the samples of a group share their prompt's prefill."""
        self.select(torch.arange(self.rows, device=self.pad.device).repeat_interleave(n))


def _pad_bias(pad: Tensor, capacity: int, dtype: torch.dtype) -> Tensor | None:
    if not bool(pad.any()):
        return None
    hidden = torch.arange(capacity, device=pad.device) < pad[:, None]
    return torch.zeros(hidden.shape, device=pad.device, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None, None]


class Decoder(nn.Module):
    """The model. seed fills the weights as Hugging Face does (normal 0.02, norms 1, biases 0); None: unset."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.layers = nn.ModuleList([Layer(config, device, dtype) for _ in range(config.num_layers)])
        self.norm = nn.Parameter(torch.empty(config.hidden_size, device=device, dtype=dtype))
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._angles: Tensor | None = None
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The same weights for a seed on every device and dtype (drawn in fp32 on the CPU, then rounded)."""
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.named_parameters():
            if name.endswith("norm"):
                param.fill_(1.0)
            elif name.endswith("bias"):
                param.zero_()
            else:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.02)

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def head_weight(self) -> nn.Parameter:
        """[V,D]: the output head, which is the embedding table when tied."""
        return self.embed if self.head is None else self.head

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N,D] -> fp32 [N,V], kept in fp32 throughout. For sampling and scoring: the update's head is fused."""
        weight = self.head_weight
        if hidden.dtype == torch.float32:
            return F.linear(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return F.linear(hidden.float(), weight.float())

    def angles(self, positions: int) -> Tensor:
        """complex64 [positions, E/2]: exp(i * position * theta^(-2j/E)). Kept on the model, grown when needed."""
        if self._angles is None or len(self._angles) < positions or self._angles.device != self.device:
            if positions > self.config.max_positions:
                raise UserError(
                    f"a sequence of {positions} tokens is longer than the model's {self.config.max_positions} "
                    "positions; shorten the prompts or the responses"
                )
            table = rope_table(self.config, positions, self.device)
            with torch.inference_mode(False):
                self._angles = torch.complex(*table.chunk(2, -1))
        return self._angles[:positions]

    def step_angles(self, positions: int) -> Tensor:
        """complex64 [positions, H+K, E/2]: `angles` per head for `decode`; q's hold the score scale E^-0.5."""
        c = self.config
        scale = torch.ones(c.num_heads + c.num_kv_heads, 1, device=self.device)
        scale[: c.num_heads] = c.head_dim**-0.5
        return self.angles(positions)[:, None] * scale

    def attention_path(self) -> tuple[bool, str]:
        """(whether the package's attention and norm kernels run, why). Elsewhere torch's do."""
        if use_reference():
            return False, "torch's attention and norms (PYMATHRL_IMPL=ref)"
        if self.dtype != torch.float32 or self.embed.is_cuda:
            return False, f"torch's attention and norms ({self.dtype} on {self.device.type}; ours: fp32 on a CPU)"
        return False, "torch's attention and norms (ours turn neighbours, not halves)"

    def hidden(self, ids: Tensor) -> Tensor:
        """ids int64 [B,S], right-padded with any valid id -> [B,S,D] after the last norm; differentiable in weights.

        Positions start at 0 in each row and attention is causal, so padding on the right changes nothing before it.
        """
        x = F.embedding(ids, self.embed)
        angle = self.angles(ids.shape[1])
        if self.attention_path()[0]:
            branch = None
            for layer in cast(Iterator[Layer], iter(self.layers)):
                x, branch = layer.fused(x, branch, angle)
            if branch is None:
                return rms_norm(x, self.norm, self.config.rms_norm_eps)
            return add_rms_norm(branch, x, self.norm, self.config.rms_norm_eps)[1]
        for layer in cast(Iterator[Layer], iter(self.layers)):
            x, _, _ = layer(x, angle[:, None], None)
        return F.rms_norm(x, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)

    def new_cache(self, rows: int, capacity: int, pad: Tensor | None = None) -> Cache:
        """An empty cache for `rows` rows of at most `capacity` columns; pad int64 [rows] as in `prefill`."""
        return Cache(self, rows, capacity, pad)

    @torch.no_grad()
    def prefill(self, ids: Tensor, pad: Tensor, capacity: int | None = None) -> tuple[Tensor, Cache]:
        """ids int64 [P,S] padded on the left by pad int64 [P] columns -> (hidden [P,D] of the last column, cache)."""
        rows, width = ids.shape
        cache = self.new_cache(rows, width if capacity is None else capacity, pad)
        last = torch.empty(rows, self.config.hidden_size, device=self.device, dtype=self.dtype)
        step = max(1, PREFILL_TOKENS // width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            last[part] = self._prefill_rows(ids[part], pad[part], cache, part)
        cache.length = width
        return last, cache

    def _prefill_rows(self, ids: Tensor, pad: Tensor, cache: Cache, rows: slice) -> Tensor:
        width = ids.shape[1]
        column = torch.arange(width, device=self.device)
        angle, mask = self.angles(width)[:, None], None
        if cache.bias is not None:
            angle = self.angles(width)[(column - pad[:, None]).clamp(min=0)][:, :, None]
            causal = column <= column[:, None]
            real = column >= pad[:, None]
            # padding columns see themselves: a row of the softmax without any key would be nan
            mask = ((causal & real[:, None]) | torch.eye(width, dtype=torch.bool, device=self.device))[:, None]
        x = F.embedding(ids, self.embed)
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, angle, mask)
            cache.kv[i][0, rows, :, :width] = k
            cache.kv[i][1, rows, :, :width] = v
        return F.rms_norm(x[:, -1], (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)

    @torch.no_grad()
    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """ids int64 [B], the next token of each row -> hidden [B,D], which scores the one after; uses one more column.

        Written for few calls: a small model's step on a CPU is dispatch time, not arithmetic. Two batched products beat
        scaled_dot_product_attention for a single query by 3 to 5 times (64 rows, 36 and 130 columns, 2 CPU cores).
        """
        c = self.config
        col, n = cache.length, cache.length + 1
        if n > cache.capacity:
            raise ValueError(
                f"Decoder.decode: the cache is full at {cache.capacity} columns; call cache.select with more"
            )
        rows, heads, kv_heads, e = cache.rows, c.num_heads + c.num_kv_heads, c.num_kv_heads, c.head_dim
        shape, eps = (c.hidden_size,), c.rms_norm_eps
        bias = None
        if cache.bias is None:
            angle = cache.angles[col]
        else:
            angle = cache.angles[col - cache.pad]
            bias = cache.bias[..., :n]
        x = F.embedding(ids, self.embed)
        if c.num_heads > c.num_kv_heads and self.attention_path()[0]:
            # with a single query per key/value head the kernel waits for its own sums: 2.0 ms a layer against 0.7 ms
            # of two batched products at 512 rows, 3 heads of 32, 40 columns, one thread
            return self._decode_fused(x, cache)
        layers = cast(Iterator[Layer], iter(self.layers))
        for layer, w, kv in zip(layers, cache.weights, cache.kv, strict=True):
            qkv = F.linear(F.rms_norm(x, shape, w.attn_norm, eps), w.qkv, w.qkv_bias)
            qkv = qkv.view(rows, heads + kv_heads, e)
            qk = qkv[:, :heads]
            qk.copy_(turn(layer.norm_heads(qk), angle))
            kv.select(3, col).copy_(qkv[:, c.num_heads :].view(rows, 2, kv_heads, e).transpose(0, 1))
            key, value = kv.narrow(3, 0, n).flatten(1, 2).unbind(0)
            q = qk[:, : c.num_heads].reshape(rows * kv_heads, -1, e)
            scores = torch.bmm(q, key.transpose(1, 2))
            if bias is not None:
                scores.view(rows, kv_heads, -1, n).add_(bias)
            attended = torch.bmm(torch.softmax(scores, -1), value)
            x = torch.addmm(x, attended.view(rows, -1), w.out_t)
            gate, up = F.linear(F.rms_norm(x, shape, w.mlp_norm, eps), w.gate_up).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate).mul_(up), w.down_t)
        cache.length = n
        return F.rms_norm(x, shape, self.norm, eps)

    def _decode_fused(self, x: Tensor, cache: Cache) -> Tensor:
        """x [B,D], embedded -> hidden [B,D]. Only the products with weights are torch's."""
        c, col = self.config, cache.length
        angle, scale = self.angles(cache.capacity), c.head_dim**-0.5
        for w, kv in zip(cache.weights, cache.kv, strict=True):
            qkv = F.linear(rms_norm(x, w.attn_norm, c.rms_norm_eps), w.qkv, w.qkv_bias)
            attended = decode_attention(qkv, angle, kv, cache.pad, col, c.num_heads, c.num_kv_heads, scale)
            x = torch.addmm(x, attended, w.out_t)
            gate, up = F.linear(rms_norm(x, w.mlp_norm, c.rms_norm_eps), w.gate_up).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate).mul_(up), w.down_t)
        cache.length = col + 1
        return rms_norm(x, self.norm, c.rms_norm_eps)
