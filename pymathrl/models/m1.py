"""The Mamba layer of an M1 hybrid (arXiv 2504.10449), and its start from an attention layer.

In a hybrid most layers of a Llama decoder mix tokens by a selective scan (Mamba, arXiv 2312.00752) instead of
attention: what a layer knows of the past is a state of fixed size, not keys and values that grow. Shapes are those of
attention, so that its weights can be the start: values become x, keys B, queries C (`start_from`).

    z | x | B | C | r = W_in h         dt = W_dt r + b       delta = softplus(dt + b)
    u = silu(conv(repeat(x)))          h_t = exp(delta A) h_{t-1} + delta u B        y = (C h_t + D u) silu(z)

Three things are as in the released model although they look like faults, because its weights were trained with them:
the bias b is added twice (its gradient is the sum of both); x and B are repeated in mini-heads of N channels, not in
attention heads; and the attention layers beside these turn by rope_theta alone, whatever rope_scaling says.

A_log, D, the convolution and b are fp32 in every dtype of the model, and so is the state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymathrl.models.block import Block, Empty, Packed
from pymathrl.models.config import Mamba
from pymathrl.ops.causal_conv1d import causal_conv1d
from pymathrl.ops.linear import linear
from pymathrl.ops.selective_scan import selective_scan

SMALLEST_DELTA, DELTA_RANGE = 1e-4, (1e-3, 1e-1)  # of a channel at the start (arXiv 2312.00752, section 3.6)


class MambaLayer(Block):
    """A layer whose mixer is a Mamba. Sizes: I inner, X of x and of B, N state, W convolution, r rank of dt."""

    def make_mixer(self, empty: Empty) -> None:
        m, hidden = self.shape, self.config.hidden_size
        self.in_proj = empty(sum(m.parts), hidden)
        self.conv = empty(m.inner_size, m.conv_width, dtype=torch.float32)
        self.conv_bias = empty(m.inner_size, dtype=torch.float32)
        self.dt_proj = empty(m.inner_size, m.dt_rank)
        self.dt_bias = empty(m.inner_size, dtype=torch.float32)
        self.a_log = empty(m.inner_size, m.state_size, dtype=torch.float32)
        self.d = empty(m.inner_size, dtype=torch.float32)
        self.out = empty(hidden, m.inner_size)

    @property
    def shape(self) -> Mamba:
        assert self.config.mamba is not None, "a decoder makes this layer for hybrids alone"
        return self.config.mamba

    def mix(self, h: Tensor, at: Packed) -> Tensor:
        m = self.shape
        z, x, b, c, r = linear(h, self.in_proj).split(m.parts, 1)
        dt = linear(r, self.dt_proj, self.dt_bias.to(h.dtype))
        u = causal_conv1d(x, self.conv, self.conv_bias, at.offsets, group=m.state_size)
        y = selective_scan(u, dt, z, b, c, self.a_log, self.d, self.dt_bias, at.offsets)
        return linear(y, self.out)

    @torch.no_grad()
    def init_mixer(self, generator: torch.Generator) -> None:
        """As Mamba starts: A = -1 .. -N in every channel, D = 1, softplus(b) log-uniform in DELTA_RANGE."""

        def uniform(param: nn.Parameter, bound: float) -> None:
            param.copy_((2 * torch.rand(param.shape, generator=generator) - 1) * bound)

        m = self.shape
        uniform(self.conv, m.conv_width**-0.5)
        uniform(self.conv_bias, m.conv_width**-0.5)
        uniform(self.dt_proj, m.dt_rank**-0.5)
        low, high = (math.log(end) for end in DELTA_RANGE)
        delta = torch.exp(low + (high - low) * torch.rand(m.inner_size, generator=generator)).clamp(min=SMALLEST_DELTA)
        self.dt_bias.copy_(delta + torch.log(-torch.expm1(-delta)))
        self.a_log.copy_(torch.arange(1, m.state_size + 1).log().expand_as(self.a_log))
        self.d.fill_(1.0)

    @torch.no_grad()
    def start_from(self, qkv: Tensor, out: Tensor, generator: torch.Generator) -> None:
        """The start of M1 (section 3, stage 1): an attention layer's projections. qkv [(H+2K)E, D], out [D, H*E],
        without bias or norms of heads. The rows of z and r start as a new linear layer does."""
        m, hidden = self.shape, self.config.hidden_size
        q, k, v = qkv.split([m.inner_size, m.xb_size, m.xb_size])
        z, x, b, c, r = self.in_proj.split(m.parts)
        for rows, source in ((x, v), (b, k), (c, q)):
            rows.copy_(source)
        for rows in (z, r):
            rows.copy_((2 * torch.rand(rows.shape, generator=generator) - 1) * hidden**-0.5)
        self.out.copy_(out)
        self.init_mixer(generator)
