"""Which sequence holds which pages: reference counts, sharing, copy-on-write. Bookkeeping on the host, in bulk.

A sequence in slot s has fed[s] tokens in the cache, in its first held[s] = ceil(reserved / PAGE) pages. Pages are
shared by reference (`share`); a page that others hold too is copied before a sequence writes into it (`reserve`). Only
the page that holds position fed[s] can be both shared and still to be written: the ones before are full, the ones after
are the sequence's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymathrl.batch import enumerate_ragged
from pymathrl.ops.attention import PAGE


def pages_for(tokens: Tensor) -> Tensor:
    """int64: pages that hold so many tokens."""
    return (tokens + PAGE - 1) // PAGE


def who_moves(held: Tensor, refs: Tensor) -> Tensor:
    """held [n]: what each of n writers holds, refs: holders of each -> int64, the writers that must have a copy of
    their own, by what they hold. Where all holders of one write, the last of them keeps it."""
    order = torch.argsort(held, stable=True)
    held = held[order]
    first = torch.searchsorted(held, held)  # where the run of each starts
    return order[torch.arange(held.numel()) - first < refs[held] - 1]


class PageTable:
    """Pages of up to S sequences out of a pool. All tensors are int64 on the CPU.

    table [S,C]    page numbers, of which the first held[s] count in row s
    held  [S]      pages that a sequence holds
    fed   [S]      tokens whose keys and values are in them
    refs  [pages]  sequences that hold a page; 0 = free
    """

    def __init__(self, pages: int, slots: int, columns: int, copy: Callable[[Tensor, Tensor], None]) -> None:
        """copy(source, target): copies pages of the cache."""
        self.copy = copy
        self.table = torch.zeros(slots, columns, dtype=torch.int64)
        self.held = torch.zeros(slots, dtype=torch.int64)
        self.fed = torch.zeros(slots, dtype=torch.int64)
        self.refs = torch.zeros(pages, dtype=torch.int64)
        self._stack = torch.arange(pages - 1, -1, -1)  # free pages: the first `free` entries, the top is taken first
        self.free = pages

    @property
    def pages(self) -> int:
        return self.refs.numel()

    # --- recurrent states: a hybrid's table has them (rollout/states.py), this one has none --------------------------

    @property
    def states(self) -> int:
        """Rows of the state pool."""
        return 0

    @property
    def states_free(self) -> int:
        return 0

    def need_states(self, slots: Tensor) -> Tensor:
        """[n]: new rows of the state pool that each slot needs, as if alone, before tokens can be fed."""
        return torch.zeros_like(slots)

    def states_of(self, slots: Tensor) -> Tensor:
        """[n]: the row of each slot's state; -1 = none."""
        return torch.full_like(slots, -1)

    def ran(self, slots: Tensor, tokens: Tensor | int) -> None:
        """A pass is about to feed so many tokens behind `fed` to each slot; `settle` says how many of them count."""

    def keep(self, slots: Tensor, mark: int) -> None:
        """The states as they are stay at hand, a bounded number per sequence. mark: see `let_go`."""

    def let_go(self, slots: Tensor | None = None, mark: int | None = None) -> bool:
        """Forgets what these slots (None: all) kept under this mark (None: any); whether rows became free."""
        return False

    # --- pages -------------------------------------------------------------------------------------------------------

    def settle(self, slots: Tensor, fed: Tensor) -> None:
        """The cache holds the first `fed` tokens of each slot: what it held, and what counts of those that ran."""
        self.fed[slots] = fed

    def need(self, slots: Tensor, end: Tensor) -> Tensor:
        """[n]: new pages that each slot needs, as if alone, to write positions fed .. end-1; copies are included."""
        fresh = (pages_for(end) - self.held[slots]).clamp(min=0)
        return fresh + self._shared(slots, end).long()

    def _shared(self, slots: Tensor, end: Tensor) -> Tensor:
        """bool [n]: the page of position `fed` is in use already, by others too, and will be written."""
        fed = self.fed[slots]
        page = self.table[slots, (fed // PAGE).clamp(max=self.table.shape[1] - 1)]
        return (fed % PAGE > 0) & (end > fed) & (self.refs[page] > 1)

    def reserve(self, slots: Tensor, end: Tensor) -> None:
        """Makes positions fed .. end-1 of these distinct slots writable. The caller saw that `need` fits `free`."""
        written = slots[self._shared(slots, end)]
        if written.numel():
            column = self.fed[written] // PAGE
            movers = who_moves(self.table[written, column], self.refs)
            written, column = written[movers], column[movers]
            source = self.table[written, column]
            target = self._take(source.numel())
            self.copy(source, target)
            self.table[written, column] = target
            self._drop(source)
        fresh = (pages_for(end) - self.held[slots]).clamp(min=0)
        owner, within = enumerate_ragged(fresh)
        if owner.numel():
            row = slots[owner]
            self.table[row, self.held[row] + within] = self._take(owner.numel())
            self.held[slots] += fresh

    def share(self, source: Tensor, target: Tensor) -> None:
        """Empty slots `target` hold what `source` [n] has fed."""
        held = pages_for(self.fed[source])
        self.fed[target] = self.fed[source]
        self.held[target] = held
        self.table[target] = self.table[source]
        self.refs.index_add_(0, self._entries(target, held), torch.ones(int(held.sum()), dtype=torch.int64))

    def truncate(self, slots: Tensor, fed: Tensor) -> None:
        """Forgets what lies behind the first `fed` tokens, and gives back the pages behind them."""
        self.fed[slots] = torch.minimum(self.fed[slots], fed)
        keep = torch.minimum(self.held[slots], pages_for(self.fed[slots]))
        drop = self.held[slots] - keep
        if int(drop.sum()):
            self._drop(self._entries(slots, drop, keep))
        self.held[slots] = keep

    def _entries(self, slots: Tensor, count: Tensor, start: Tensor | None = None) -> Tensor:
        """The page numbers table[s, start .. start+count-1] of all slots, one after the other."""
        owner, within = enumerate_ragged(count)
        return self.table[slots[owner], within if start is None else within + start[owner]]

    def _take(self, count: int) -> Tensor:
        if count > self.free:
            raise RuntimeError(f"PageTable: {count} pages asked for, {self.free} of {self.pages} are free")
        taken = self._stack[self.free - count : self.free].clone()
        self.free -= count
        self.refs[taken] = 1
        return taken

    def _drop(self, pages: Tensor) -> None:
        self.refs.index_add_(0, pages, torch.full_like(pages, -1))
        gone = pages[self.refs[pages] == 0].unique()
        self._stack[self.free : self.free + gone.numel()] = gone
        self.free += gone.numel()

    def grow(self, pages: int, slots: int, columns: int, states: int = 0) -> None:
        """Room for so many pages, slots, columns and states; none of them shrinks."""
        table = torch.zeros(slots, columns, dtype=torch.int64)
        table[: self.table.shape[0], : self.table.shape[1]] = self.table
        self.table = table
        more = slots - self.held.numel()
        self.held, self.fed = (torch.cat([x, x.new_zeros(more)]) for x in (self.held, self.fed))
        fresh = torch.arange(pages - 1, self.pages - 1, -1)
        used = torch.zeros(self.pages - self.free, dtype=torch.int64)
        self._stack = torch.cat([fresh, self._stack[: self.free], used])
        self.refs = torch.cat([self.refs, torch.zeros(fresh.numel(), dtype=torch.int64)])
        self.free += fresh.numel()
