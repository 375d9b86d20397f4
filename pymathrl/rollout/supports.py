"""Which tokens the sampling filters left at each draw: what the update needs to renormalise over the same ones (C8)."""

from __future__ import annotations

import torch
from torch import Tensor

from pymathrl.batch import enumerate_ragged


class Supports:
    """Draws under filters, in their order: (slot, position, count) int64 of each, and its `count` token ids, int32, on
    the host. Empty while nothing is drawn under filters."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, slots: Tensor, position: Tensor, bits: Tensor) -> None:
        """bits uint8 [r, ceil(V/8)] of `sample_token`: the support of token position [r] of slot [r]."""
        row, byte = bits.nonzero(as_tuple=True)  # a small share of the bytes: most tokens are cut
        set_bits = (bits[row, byte][:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
        which, bit = set_bits.nonzero(as_tuple=True)
        count = torch.bincount(row[which], minlength=slots.numel()).cpu()
        self._parts.append((slots, position, count, (8 * byte[which] + bit).int().cpu()))

    def cut(self, slots: Tensor, length: Tensor) -> None:
        """Forgets what lies at or behind `length` [n] of each slot."""
        if self._parts:
            slot, position, *_ = self._joined()
            limit = torch.full((int(torch.cat([slot, slots]).max()) + 1,), torch.iinfo(torch.int64).max)
            limit[slots] = length
            keep = position < limit[slot]
            self._parts = [self._pick(keep.nonzero()[:, 0])] if bool(keep.any()) else []

    def copy(self, source: Tensor, target: Tensor) -> None:
        """What is known of source [n] is known of target [n] too."""
        if self._parts:
            slot = self._joined()[0]
            for old, new in zip(source.tolist(), target.tolist(), strict=True):
                own = (slot == old).nonzero()[:, 0]
                if own.numel():
                    same, position, count, ids = self._pick(own)
                    self._parts.append((torch.full_like(same, new), position, count, ids))

    def pack(self, slots: Tensor, lengths: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(ids int32 [M], offsets int64 [T+1]) over the T = sum(lengths) tokens of the slots one after the other: the
        support of token t is ids[offsets[t] : offsets[t+1]], rising; empty where it was not drawn under filters."""
        if not self._parts:
            return None, None
        slot, position, count, _ = self._joined()
        start = torch.full((int(torch.cat([slot, slots]).max()) + 1,), -1)
        start[slots] = lengths.cumsum(0) - lengths
        draws = (start[slot] >= 0).nonzero()[:, 0]
        token = start[slot[draws]] + position[draws]
        order = torch.argsort(token)
        offsets = torch.zeros(int(lengths.sum()) + 1, dtype=torch.int64)
        offsets[1 + token] = count[draws]
        return self._pick(draws[order])[3], offsets.cumsum(0)

    def _pick(self, draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """These draws, in this order."""
        slot, position, count, ids = self._joined()
        owner, within = enumerate_ragged(count[draws])
        start = (count.cumsum(0) - count)[draws]
        return slot[draws], position[draws], count[draws], ids[start[owner] + within]

    def _joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slot, position, count, ids = (torch.cat(values) for values in zip(*self._parts, strict=True))
        self._parts = [(slot, position, count, ids)]
        return slot, position, count, ids
