"""Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, optional q/k/v bias and tied head.

Two forward passes share one copy of the weights: `hidden` (whole right-padded rows, autograd) for the update, and
`prefill` + `decode` (a KV cache, no gradients, few calls per layer) for generation.

Storage differs from the checkpoint layout in three ways, undone on save by `tensor_specs`:
- q, k and v are one matrix `qkv`, gate and up are one matrix `gate_up`: one GEMM each;
- the two halves of each q and k head are interleaved (pair j at 2j, 2j+1 instead of j, j + head_dim/2), so that
  rotation is one complex product. Scores do not change: the same permutation on q and k leaves q.k as it was.

Dimensions: B rows, S columns, D hidden size, H query heads, K key/value heads, E head size, F MLP size, V vocabulary.
Weights and activations have the parameter dtype; norm statistics, rotation and logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymathrl.errors import UserError
from pymathrl.ops._call import _C, use_reference
from pymathrl.ops.attention import attention, attention_supports, decode_attention
from pymathrl.ops.rms_norm import add_rms_norm, rms_norm

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}  # model_type -> architecture
PREFILL_TOKENS = 16384  # padded tokens of one prefill piece: bounds the MLP's workspace (2F floats a token)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder; the meaning of each field is that of Hugging Face's config.json."""

    vocab_size: int  # V, rows of the embedding table
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K, divides H
    head_dim: int  # E, even
    max_positions: int = 2048  # longest sequence in tokens
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    attention_bias: bool = False  # bias on q, k and v (Qwen2); the output projection has none
    model_type: str = "llama"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"model config: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim must be even for rotary positions, got {self.head_dim}")

    @staticmethod
    def from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads a config.json of transformers 4 or 5. UserError names the key, what is supported and what was found."""
        model_type = raw.get("model_type")
        architectures = raw.get("architectures") or [ARCHITECTURES.get(str(model_type))]
        if model_type not in ARCHITECTURES or architectures != [ARCHITECTURES[model_type]]:
            raise UserError(
                f"{where}: architecture {architectures[0] or 'unnamed'} (model_type {model_type!r}) is not supported; "
                f"supported: {', '.join(ARCHITECTURES.values())}"
            )

        def get(key: str, kind: type, default: Any = None) -> Any:
            value = raw.get(key, default)
            if value is None:
                value = default
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise UserError(f"{where}: {key} must be {kind.__name__}, got {value!r}")
            return value

        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"{where}: rope_scaling {rope_type!r} is not supported; only the default rotary positions are"
            )
        refused = {
            "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
            "mlp_bias": (bool(raw.get("mlp_bias", False)), False),
            "use_sliding_window": (bool(raw.get("use_sliding_window", False)), False),
            "layer_types": (sorted(set(raw.get("layer_types") or ["full_attention"])), ["full_attention"]),
        }
        if model_type == "llama":  # in Llama files this flag puts a bias on the output projection as well
            refused["attention_bias"] = (bool(raw.get("attention_bias", False)), False)
        for key, (got, only) in refused.items():
            if got != only:
                raise UserError(f"{where}: {key} = {got!r} is not supported; only {only!r} is")
        heads = get("num_attention_heads", int)
        hidden = get("hidden_size", int)
        eos = raw.get("eos_token_id")
        return ModelConfig(
            vocab_size=get("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=get("intermediate_size", int),
            num_layers=get("num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", int, heads),
            head_dim=get("head_dim", int, hidden // max(heads, 1)),
            max_positions=get("max_position_embeddings", int, 2048),
            rope_theta=float(rope.get("rope_theta", get("rope_theta", float, 10000.0))),
            rms_norm_eps=get("rms_norm_eps", float, 1e-6),
            tie_embeddings=get("tie_word_embeddings", bool, False),
            attention_bias=model_type == "qwen2",
            model_type=model_type,
            bos_id=raw.get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            pad_id=raw.get("pad_token_id"),
        )

    def to_hf(self, dtype: torch.dtype) -> dict[str, Any]:
        """config.json of the model, readable by transformers 4 and 5 and by vLLM."""
        if self.attention_bias != (self.model_type == "qwen2"):
            raise ValueError(
                f"ModelConfig.attention_bias: expected {self.model_type == 'qwen2'} for model_type "
                f"{self.model_type!r}, got {self.attention_bias}: no Hugging Face architecture stores that"
            )
        eos: int | list[int] | None = list(self.eos_ids)
        if isinstance(eos, list) and len(eos) < 2:
            eos = eos[0] if eos else None
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_id,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor of a checkpoint lives: rows start .. start + shape[0] of parameter `param`."""

    name: str  # in model.safetensors
    shape: tuple[int, ...]  # in model.safetensors
    param: str  # in Decoder.named_parameters()
    start: int = 0
    heads: int = 0  # > 0: rows are this many heads whose halves are interleaved in memory

    def read(self, value: Tensor) -> Tensor:
        """Checkpoint layout -> memory layout."""
        return self._reorder(value, 2, self.shape[0] // max(2 * self.heads, 1))

    def write(self, value: Tensor) -> Tensor:
        """Memory layout -> checkpoint layout (the inverse of `read`)."""
        return self._reorder(value, self.shape[0] // max(2 * self.heads, 1), 2)

    def _reorder(self, value: Tensor, outer: int, inner: int) -> Tensor:
        if not self.heads:
            return value
        return value.reshape(self.heads, outer, inner, -1).transpose(1, 2).reshape(self.shape)


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint, in the order in which it is written."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield TensorSpec("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), "embed")
    for i in range(c.num_layers):
        hf, own = f"model.layers.{i}.", f"layers.{i}."
        yield TensorSpec(hf + "input_layernorm.weight", (c.hidden_size,), own + "attn_norm")
        blocks = (("q", 0, q, c.num_heads), ("k", q, kv, c.num_kv_heads), ("v", q + kv, kv, 0))
        for name, start, size, heads in blocks:
            yield TensorSpec(f"{hf}self_attn.{name}_proj.weight", (size, c.hidden_size), own + "qkv", start, heads)
        if c.attention_bias:
            for name, start, size, heads in blocks:
                yield TensorSpec(f"{hf}self_attn.{name}_proj.bias", (size,), own + "qkv_bias", start, heads)
        yield TensorSpec(hf + "self_attn.o_proj.weight", (c.hidden_size, q), own + "out")
        yield TensorSpec(hf + "post_attention_layernorm.weight", (c.hidden_size,), own + "mlp_norm")
        for j, name in enumerate(("gate", "up")):
            shape = (c.intermediate_size, c.hidden_size)
            yield TensorSpec(f"{hf}mlp.{name}_proj.weight", shape, own + "gate_up", j * c.intermediate_size)
        yield TensorSpec(hf + "mlp.down_proj.weight", (c.hidden_size, c.intermediate_size), own + "down")
    yield TensorSpec("model.norm.weight", (c.hidden_size,), "norm")
    if not c.tie_embeddings:
        yield TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), "head")


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
        pairs = torch.view_as_complex(qk.unflatten(-1, (heads, c.head_dim // 2, 2)).float())
        qk = torch.view_as_real(pairs * angle).flatten(-2).to(x.dtype)
        q, k = qk.transpose(1, 2).split([c.num_heads, c.num_kv_heads], 1)
        return q, k, v.unflatten(-1, (c.num_kv_heads, c.head_dim)).transpose(1, 2)

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
            e = self.config.head_dim
            with torch.inference_mode(False):
                exponent = torch.arange(0, e, 2, device=self.device).float() / e
                at = torch.arange(positions, device=self.device).float()
                phase = torch.outer(at, 1.0 / self.config.rope_theta**exponent)
                self._angles = torch.polar(torch.ones_like(phase), phase)
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
        if not attention_supports(self.config.head_dim):
            return False, f"torch's attention and norms (ours do not take heads of {self.config.head_dim})"
        if _C.simd_level() != "v4":
            # their vectors are 16 floats wide, and gcc splits comparisons of such vectors into single floats on AVX2
            return False, f"torch's attention and norms (ours need AVX-512; the level here is {_C.simd_level()})"
        return True, "our attention and norms"

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
        shape, eps, low = (c.hidden_size,), c.rms_norm_eps, self.dtype != torch.float32
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
        for w, kv in zip(cache.weights, cache.kv, strict=True):
            qkv = F.linear(F.rms_norm(x, shape, w.attn_norm, eps), w.qkv, w.qkv_bias)
            qkv = qkv.view(rows, heads + kv_heads, e)
            qk = qkv[:, :heads]
            if low:
                pairs = torch.view_as_complex(qk.float().view(rows, heads, e // 2, 2))
                qk.copy_(torch.view_as_real(pairs.mul_(angle)).view(rows, heads, e))
            else:
                torch.view_as_complex(qk.unflatten(-1, (e // 2, 2))).mul_(angle)
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
