"""Which sequence holds which recurrent state of a hybrid: shared by reference and copied before a write, as pages are.

Keys and values of a token stay where they are when later tokens come; a state does not: it has taken in a number of
tokens and cannot give one back. So a sequence's pages reach as far as its state here: `fed` counts both, and what is
taken back leads to the latest state that was kept at or before that token (`keep`), or to the beginning. The tokens
from there on are fed again, which on a CPU gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymathrl.rollout.pages import PageTable, who_moves

KEPT = 16  # states that a sequence keeps to come back to; the oldest go first
Copy = Callable[[Tensor, Tensor], None]


class HybridTable(PageTable):
    """Pages and states of up to S sequences. All tensors are int64 on the CPU.

    state       [S]     row of the state pool; -1: none, before the first token
    taken       [S]     tokens that it has taken in
    state_refs  [rows]  sequences and kept states that hold a row; 0 = free
    """

    def __init__(self, pages: int, slots: int, columns: int, copy: Copy, copy_state: Copy) -> None:
        """copy_state(source, target): copies rows of the state pool."""
        super().__init__(pages, slots, columns, copy)
        self.copy_state = copy_state
        self.state = torch.full((slots,), -1)
        self.taken = torch.zeros(slots, dtype=torch.int64)
        self.state_refs = torch.zeros(0, dtype=torch.int64)
        self._kept: dict[int, list[tuple[int, int, int]]] = {}  # slot -> (tokens, row, mark), in the order of keeping

    @property
    def states(self) -> int:
        return self.state_refs.numel()

    @property
    def states_free(self) -> int:
        return int((self.state_refs == 0).sum())

    def need_states(self, slots: Tensor) -> Tensor:
        """[n]: new rows that each slot needs, as if alone, before tokens can be fed."""
        row = self.state[slots]
        alone = (row >= 0) & (self.state_refs[row.clamp(min=0)] == 1) if self.states else row >= 0
        return (~alone).long()

    def states_of(self, slots: Tensor) -> Tensor:
        return self.state[slots]

    def reserve(self, slots: Tensor, end: Tensor) -> None:
        super().reserve(slots, end)
        shared = slots[(self.state[slots] >= 0) & (self.need_states(slots) > 0)]
        if shared.numel():
            movers = shared[who_moves(self.state[shared], self.state_refs)]
            source = self.state[movers]
            target = self._take_states(source.numel())
            self.copy_state(source, target)
            self.state[movers] = target
            self.state_refs.index_add_(0, source, torch.full_like(source, -1))
        fresh = slots[self.state[slots] < 0]
        self.state[fresh] = self._take_states(fresh.numel())
        self.taken[fresh] = 0

    def need(self, slots: Tensor, end: Tensor) -> Tensor:
        self._go_back(slots[self.taken[slots] > self.fed[slots]])  # a pass that broke off, or its `settle`
        return super().need(slots, end)

    def share(self, source: Tensor, target: Tensor) -> None:
        super().share(source, target)
        self.taken[target] = self.fed[source]
        self.state[target] = torch.where(self.fed[source] > 0, self.state[source], -1)
        rows = self.state[target[self.fed[target] > 0]]
        self.state_refs.index_add_(0, rows, torch.ones_like(rows))

    def ran(self, slots: Tensor, tokens: Tensor | int) -> None:
        self.taken[slots] += tokens

    def settle(self, slots: Tensor, fed: Tensor) -> None:
        super().settle(slots, fed)
        self._go_back(slots[self.taken[slots] > fed])

    def truncate(self, slots: Tensor, fed: Tensor) -> None:
        super().truncate(slots, fed)
        fed = self.fed[slots]
        self._go_back(slots[(self.taken[slots] > fed) | ((fed == 0) & (self.state[slots] >= 0))])

    def keep(self, slots: Tensor, mark: int) -> None:
        for slot, row, taken in zip(
            slots.tolist(), self.state[slots].tolist(), self.taken[slots].tolist(), strict=True
        ):
            if taken:
                kept = self._kept.setdefault(slot, [])
                kept.append((taken, row, mark))
                self.state_refs[row] += 1
                if len(kept) > KEPT:
                    self.state_refs[kept.pop(0)[1]] -= 1

    def let_go(self, slots: Tensor | None = None, mark: int | None = None) -> bool:
        before = self.states_free
        for slot in list(self._kept) if slots is None else slots.tolist():
            kept = self._kept.pop(slot, [])
            stay = [] if mark is None else [entry for entry in kept if entry[2] != mark]
            for entry in kept:
                if entry not in stay:
                    self.state_refs[entry[1]] -= 1
            if stay:
                self._kept[slot] = stay
        return self.states_free > before

    def _go_back(self, slots: Tensor) -> None:
        """To the latest kept state at or before the token that `fed` counts to."""
        if not slots.numel():
            return
        for slot in slots.tolist():
            if self.state[slot] >= 0:
                self.state_refs[self.state[slot]] -= 1
            kept, limit = self._kept.get(slot, []), int(self.fed[slot])
            for entry in [entry for entry in kept if entry[0] > limit]:
                kept.remove(entry)
                self.state_refs[entry[1]] -= 1
            taken, row, _ = max(kept, default=(0, -1, 0))
            self.state[slot], self.taken[slot] = row, taken
            if row >= 0:
                self.state_refs[row] += 1
        super().truncate(slots, self.taken[slots])

    def _take_states(self, count: int) -> Tensor:
        taken = (self.state_refs == 0).nonzero()[:count, 0]
        if taken.numel() < count:
            raise RuntimeError(f"HybridTable: {count} states asked for, {taken.numel()} of {self.states} are free")
        self.state_refs[taken] = 1
        return taken

    def grow(self, pages: int, slots: int, columns: int, states: int = 0) -> None:
        super().grow(pages, slots, columns)
        more = slots - self.state.numel()
        self.state = torch.cat([self.state, self.state.new_full((more,), -1)])
        self.taken = torch.cat([self.taken, self.taken.new_zeros(more)])
        self.state_refs = torch.cat([self.state_refs, self.state_refs.new_zeros(states - self.states)])
