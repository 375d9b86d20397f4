"""Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU; q/k/v bias, q/k norm, tied head;
in a hybrid, Mamba layers among those of attention (`models/m1.py`).

`Decoder.hidden` is the update's forward pass: packed sequences, autograd. `models/paged.py` is the generator's, over a
paged cache. Both run the same kernels on one copy of the weights, and every kernel computes a row from that row alone,
in one order: on a CPU a token's log-prob has the same bits in both (contract C1).

The weights lie as in the checkpoint, only stacked: q, k and v are one matrix `qkv`, gate and up one matrix `gate_up`.

Dimensions: T tokens, B sequences, D hidden size, H query heads, K key/value heads, E head size, F MLP size, V
vocabulary.
Weights and activations have the parameters' dtype; norm statistics, rotation, softmax and logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymathrl.errors import UserError
from pymathrl.models.block import Block, Empty, Packed
from pymathrl.models.config import ModelConfig, rope_table
from pymathrl.models.m1 import MambaLayer
from pymathrl.ops.attention import MAX_HEAD, attention, attention_supports
from pymathrl.ops.linear import linear
from pymathrl.ops.rms_norm import add_rms_norm
from pymathrl.ops.rotary import rotary


class AttentionLayer(Block):
    """A layer whose mixer is attention."""

    def make_mixer(self, empty: Empty) -> None:
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.qkv = empty(q + 2 * kv, c.hidden_size)
        self.qkv_bias = empty(q + 2 * kv) if c.attention_bias else None
        self.q_norm = empty(c.head_dim) if c.qk_norm else None
        self.k_norm = empty(c.head_dim) if c.qk_norm else None
        self.out = empty(c.hidden_size, q)

    def mix(self, h: Tensor, at: Packed) -> Tensor:
        c = self.config
        qkv = rotary(
            linear(h, self.qkv, self.qkv_bias), at.position, at.rope, c.num_heads, c.num_kv_heads, c.head_dim**-0.5,
            self.q_norm, self.k_norm, c.rms_norm_eps,
        )  # fmt: skip
        return linear(attention(qkv, at.offsets, c.num_heads, c.num_kv_heads, at.longest), self.out)


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
        if not attention_supports(config.head_dim):
            raise UserError(
                f"model config: head_dim must be a multiple of 8 and at most {MAX_HEAD}, got {config.head_dim}: the "
                "attention kernels take no other"
            )
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        kinds = (AttentionLayer if config.is_attention(i) else MambaLayer for i in range(config.num_layers))
        self.layers = nn.ModuleList([kind(config, device, dtype) for kind in kinds])
        self.norm = nn.Parameter(torch.empty(config.hidden_size, device=device, dtype=dtype))
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._rope: Tensor | None = None
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
        for layer in self.blocks:
            layer.init_mixer(generator)

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

    @property
    def blocks(self) -> Iterator[Block]:
        return cast(Iterator[Block], iter(self.layers))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N,D] -> fp32 [N,V], kept in fp32 throughout. For scoring: the update's head is fused."""
        weight = self.head_weight
        if hidden.dtype != torch.float32 and hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return linear(hidden.float(), weight.float())

    def rope(self, positions: int) -> Tensor:
        """fp32 [at least `positions`, E], see `rope_table`. Kept on the model, doubled when it is too short."""
        if self._rope is None or len(self._rope) < positions or self._rope.device != self.device:
            limit = self.config.max_positions
            if positions > limit:
                raise UserError(
                    f"a sequence of {positions} tokens is longer than the model's {limit} positions; shorten the "
                    "prompts or the responses"
                )
            self._rope = rope_table(self.config, min(limit, max(256, 2 * positions)), self.device)
        return self._rope

    def hidden(self, ids: Tensor, offsets: Tensor, inputs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """ids int64 [T]: B sequences one after the other, sequence b = ids[offsets[b] : offsets[b+1]], offsets int64
        [B+1] -> [T,D] after the last norm. Differentiable in the weights. Positions start at 0 in each sequence.
        inputs: (int64 [s], [s,D]): positions in ids that are fed these vectors instead of rows of the table."""
        if ids.ndim != 1 or offsets.ndim != 1:
            raise ValueError(
                f"Decoder.hidden: expected ids [T] and offsets [B+1], got {list(ids.shape)} and {list(offsets.shape)}"
            )
        lengths = offsets.diff()
        position = torch.arange(ids.numel(), device=ids.device) - torch.repeat_interleave(offsets[:-1], lengths)
        longest = int(lengths.max())
        at = Packed(position, self.rope(longest), offsets, longest)
        x, branch = F.embedding(ids, self.embed), None
        if inputs is not None:
            x = x.index_put((inputs[0],), inputs[1])
        for layer in self.blocks:
            x, branch = layer(x, branch, at)
        return add_rms_norm(cast(Tensor, branch), x, self.norm, self.config.rms_norm_eps)[1]
