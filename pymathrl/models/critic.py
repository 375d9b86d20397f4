"""A model of numbers instead of tokens: the decoder's hidden states and one vector, for values and for scores."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pymathrl.models.decoder import Decoder
from pymathrl.ops.linear import linear


class Critic(nn.Module):
    """v = <h, value>, with h the state after the last norm. D hidden size.

    trunk: layers of its own, in the dtype of the model they came from, without an output head.
    value: fp32 [D], 0 at first: before it has learned anything a critic says exactly 0.
    """

    def __init__(self, trunk: Decoder) -> None:
        super().__init__()
        self.trunk = trunk
        self.value = nn.Parameter(torch.zeros(trunk.config.hidden_size, device=trunk.device))

    @classmethod
    def like(cls, model: Decoder) -> Critic:
        """A critic whose layers begin as a copy of those of `model`."""
        bare = replace(model.config, tie_embeddings=True)  # so that no head is made
        trunk = Decoder(bare, seed=None, device=model.device, dtype=model.dtype)
        source = dict(model.named_parameters())
        with torch.no_grad():
            for name, p in trunk.named_parameters():
                p.copy_(source[name])
        return cls(trunk)

    def forward(self, ids: Tensor, offsets: Tensor, at: Tensor) -> Tensor:
        """ids int64 [T] and offsets [B+1] as in `Decoder.hidden`, at int64 [N]: positions among the T -> fp32 [N], the
        values of the states after these tokens. A value follows from its row alone (contract C1)."""
        return linear(self.trunk.hidden(ids, offsets)[at].float(), self.value[None])[:, 0]
