"""What every layer of a decoder is: a mixer and an MLP, each behind its norm and added to the residual stream.

The mixer is what tells the kinds apart: attention (`models/decoder.py`) or Mamba (`models/m1.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pymathrl.models.config import ModelConfig
from pymathrl.ops.linear import linear
from pymathrl.ops.rms_norm import add_rms_norm, rms_norm
from pymathrl.ops.swiglu import swiglu

Empty = Callable[..., nn.Parameter]  # empty(*shape, dtype=...): a parameter of the layer, unset


class Packed(NamedTuple):
    """Where T tokens of B sequences stand, one sequence after the other."""

    position: Tensor  # int64 [T], of a token in its sequence
    rope: Tensor  # fp32 [P,E], see `rope_table`
    offsets: Tensor  # int64 [B+1]: sequence b is offsets[b] .. offsets[b+1]
    longest: int  # tokens of the longest


class Block(nn.Module):
    """A layer without its mixer, which every kind ends in `out` [D, its width]."""

    out: nn.Parameter

    def __init__(self, c: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()

        def empty(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.config = c
        self.mixer_norm = empty(c.hidden_size)
        self.make_mixer(empty)
        self.mlp_norm = empty(c.hidden_size)
        self.gate_up = empty(2 * c.intermediate_size, c.hidden_size)
        self.down = empty(c.hidden_size, c.intermediate_size)

    def make_mixer(self, empty: Empty) -> None:
        """Sets the mixer's parameters."""
        raise NotImplementedError

    def init_mixer(self, generator: torch.Generator) -> None:
        """Fills those of the mixer's parameters that do not start as `Decoder.init_weights` fills them."""

    def mix(self, h: Tensor, at: Packed) -> Tensor:
        """h [T,D] -> the mixer's [T,D]."""
        raise NotImplementedError

    def forward(self, x: Tensor, branch: Tensor | None, at: Packed) -> tuple[Tensor, Tensor]:
        """x [T,D]: the residual stream, branch [T,D]: what is still to be added to it (None: nothing) -> the same two
        after this layer."""
        eps = self.config.rms_norm_eps
        if branch is None:
            h = rms_norm(x, self.mixer_norm, eps)
        else:
            x, h = add_rms_norm(branch, x, self.mixer_norm, eps)
        x, h = add_rms_norm(self.mix(h, at), x, self.mlp_norm, eps)
        return x, linear(swiglu(linear(h, self.gate_up)), self.down)
