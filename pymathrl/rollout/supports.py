"""Which tokens the sampling filters left at each draw: what the update needs to renormalise over the same ones (C8)."""

from __future__ import annotations

import torch
from torch import Tensor


class Supports:
    """Triples (slot, position, token id), in the order of the draws; empty while nothing is drawn under filters."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, slots: Tensor, position: Tensor, bits: Tensor) -> None:
        """bits uint8 [r, ceil(V/8)] of `sample_token`: the support of token position [r] of slot [r]."""
        row, byte = bits.nonzero(as_tuple=True)  # a small share of the bytes: most tokens are cut
        set_bits = (bits[row, byte][:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
        which, bit = set_bits.nonzero(as_tuple=True)
        row, ids = row[which].cpu(), (8 * byte[which] + bit).int().cpu()
        self._parts.append((slots[row], position[row], ids))

    def cut(self, slots: Tensor, length: Tensor) -> None:
        """Forgets what lies at or behind `length` [n] of each slot."""
        if self._parts:
            slot, position, ids = self._joined()
            limit = torch.full((int(torch.cat([slot, slots]).max()) + 1,), torch.iinfo(torch.int64).max)
            limit[slots] = length
            keep = position < limit[slot]
            self._parts = [(slot[keep], position[keep], ids[keep])] if bool(keep.any()) else []

    def copy(self, source: Tensor, target: Tensor) -> None:
        """What is known of source [n] is known of target [n] too."""
        if self._parts:
            slot, position, ids = self._joined()
            for old, new in zip(source.tolist(), target.tolist(), strict=True):
                own = slot == old
                if bool(own.any()):
                    self._parts.append((torch.full_like(slot[own], new), position[own], ids[own]))

    def pack(self, slots: Tensor, lengths: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(ids int32 [M], offsets int64 [T+1]) over the T = sum(lengths) tokens of the slots one after the other: the
        support of token t is ids[offsets[t] : offsets[t+1]], rising; empty where it was not drawn under filters."""
        if not self._parts:
            return None, None
        slot, position, ids = self._joined()
        start = torch.full((int(torch.cat([slot, slots]).max()) + 1,), -1)
        start[slots] = lengths.cumsum(0) - lengths
        count = torch.zeros_like(start)
        count[slots] = lengths
        keep = (start[slot] >= 0) & (position < count[slot])
        token = start[slot[keep]] + position[keep]
        order = torch.argsort(token, stable=True)
        offsets = torch.zeros(int(lengths.sum()) + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(token, minlength=int(lengths.sum())).cumsum(0)
        return ids[keep][order], offsets

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        slot, position, ids = (torch.cat(values) for values in zip(*self._parts, strict=True))
        self._parts = [(slot, position, ids)]
        return slot, position, ids
