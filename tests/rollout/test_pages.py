"""The page table alone: cases by hand, and random histories against sequences that are plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pymathrl.ops.attention import PAGE
from pymathrl.rollout.pages import PageTable, pages_for


class Store:
    """A page table over a cache of one number per position: what each sequence reads is checked, not only counts."""

    def __init__(self, pages: int, slots: int, columns: int) -> None:
        self.values = torch.full((pages, PAGE), -1)
        self.table = PageTable(pages, slots, columns, self.copy)
        self.copies: list[tuple[int, int]] = []
        self.lists: list[list[int]] = [[] for _ in range(slots)]
        self.next = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.copies += zip(source.tolist(), target.tolist(), strict=True)
        self.values[target] = self.values[source]

    def write(self, slots: list[int], ends: list[int]) -> int:
        """New numbers at positions fed .. end-1 of each slot; the pages that this took."""
        t, at, end = self.table, torch.tensor(slots), torch.tensor(ends)
        need, before = t.need(at, end), t.free
        t.reserve(at, end)
        taken = before - t.free
        assert taken <= int(need.sum()) and (len(slots) > 1 or taken == int(need))
        for slot, stop in zip(slots, ends, strict=True):
            for position in range(int(t.fed[slot]), stop):
                page = int(t.table[slot, position // PAGE])
                assert t.refs[page] == 1, "a page that others read is written"
                self.values[page, position % PAGE] = self.next
                self.lists[slot].append(self.next)
                self.next += 1
        t.fed[at] = torch.maximum(t.fed[at], end)
        return taken

    def share(self, source: list[int], target: list[int]) -> None:
        self.table.share(torch.tensor(source), torch.tensor(target))
        for a, b in zip(source, target, strict=True):
            self.lists[b] = list(self.lists[a])

    def truncate(self, slot: int, fed: int) -> None:
        self.table.truncate(torch.tensor([slot]), torch.tensor([fed]))
        del self.lists[slot][fed:]

    def check(self) -> None:
        t = self.table
        held = [t.table[slot, : int(t.held[slot])].tolist() for slot in range(len(self.lists))]
        for slot, numbers in enumerate(self.lists):
            assert int(t.fed[slot]) == len(numbers)
            assert int(t.held[slot]) >= int(pages_for(t.fed[slot]))
            got = [int(self.values[held[slot][i // PAGE], i % PAGE]) for i in range(len(numbers))]
            assert got == numbers, slot
        count = torch.bincount(torch.tensor([p for row in held for p in row], dtype=torch.int64), minlength=t.pages)
        assert torch.equal(count, t.refs)
        assert t.free == int((t.refs == 0).sum())
        idle = t._stack[: t.free]
        assert idle.unique().numel() == t.free and bool((t.refs[idle] == 0).all())


def test_pages_for() -> None:
    assert PAGE == 16
    assert pages_for(torch.tensor([0, 1, 16, 17, 32, 33])).tolist() == [0, 1, 1, 2, 2, 3]


def test_share_and_copy_on_write_by_hand() -> None:
    """20 tokens in two pages. Full pages stay shared; the half full one is copied by whoever writes first."""
    s = Store(6, 3, 4)
    assert s.write([0], [20]) == 2
    full, half = s.table.table[0, :2].tolist()
    s.share([0, 0], [1, 2])
    assert s.table.refs[[full, half]].tolist() == [3, 3] and s.table.free == 4
    assert s.table.need(torch.tensor([0, 1, 2]), torch.tensor([21, 20, 33])).tolist() == [1, 0, 2]
    assert s.write([1], [21]) == 1
    one = int(s.table.table[1, 1])
    assert s.copies == [(half, one)] and s.table.table[1, 0] == full
    # the two that are left both write: the last of them keeps the page
    assert s.write([2, 0], [22, 22]) == 1
    two = int(s.table.table[2, 1])
    assert s.copies == [(half, one), (half, two)] and s.table.table[0, 1] == half
    assert s.table.refs[[full, half, one, two]].tolist() == [3, 1, 1, 1] and s.table.free == 2
    s.check()


def test_a_reader_keeps_the_page_from_all_writers() -> None:
    """Three hold a page and two write: both copy, or the third would read what they wrote."""
    s = Store(6, 3, 2)
    s.write([0], [5])
    s.share([0, 0], [1, 2])
    page = int(s.table.table[2, 0])
    assert s.write([0, 1], [6, 6]) == 2 and s.table.table[2, 0] == page and s.table.refs[page] == 1
    s.check()


def test_writers_of_two_shared_pages_at_once() -> None:
    s = Store(8, 4, 2)
    s.write([0, 1], [3, 20])
    s.share([0, 1], [2, 3])
    assert s.write([3, 2, 1, 0], [21, 4, 21, 4]) == 2
    assert len(s.copies) == 2 and len({source for source, _ in s.copies}) == 2
    s.check()


def test_a_full_page_is_shared_for_good() -> None:
    s = Store(3, 2, 3)
    s.write([0], [16])
    s.share([0], [1])
    assert s.table.need(torch.tensor([0, 1]), torch.tensor([17, 17])).tolist() == [1, 1]
    assert s.write([0, 1], [17, 17]) == 2 and s.copies == []
    s.check()


def test_truncate_gives_back_whole_pages_and_the_rest_can_be_written_again() -> None:
    s = Store(5, 2, 4)
    s.write([0], [40])
    s.share([0], [1])
    s.truncate(0, 18)  # into the second page, which slot 1 reads too
    shared = int(s.table.table[1, 1])
    assert s.table.held.tolist() == [2, 3] and s.table.refs[s.table.table[1, :3]].tolist() == [2, 2, 1]
    assert s.write([0], [19]) == 1 and s.copies == [(shared, int(s.table.table[0, 1]))]
    s.truncate(0, 32)  # more than there is: nothing happens
    s.check()
    s.truncate(1, 0)
    s.truncate(0, 0)
    assert s.table.free == 5 and s.table.refs.sum() == 0
    s.check()


def test_reserved_pages_that_were_not_fed_are_not_shared() -> None:
    s = Store(4, 2, 4)
    s.table.reserve(torch.tensor([0]), torch.tensor([40]))
    s.table.fed[0] = 16
    s.table.share(torch.tensor([0]), torch.tensor([1]))
    assert s.table.held.tolist() == [3, 1] and s.table.refs[s.table.table[0, :3]].tolist() == [2, 1, 1]


def test_grow_keeps_what_is_there() -> None:
    s = Store(2, 1, 2)
    s.write([0], [20])
    s.table.grow(4, 3, 5)
    s.values = torch.cat([s.values, torch.full((2, PAGE), -1)])
    s.lists += [[], []]
    assert s.table.table.shape == (3, 5) and s.table.pages == 4 and s.table.free == 2
    s.check()
    s.share([0], [2])
    s.write([2], [33])
    s.check()


def test_more_pages_than_are_free_is_an_error() -> None:
    s = Store(2, 1, 4)
    with pytest.raises(RuntimeError, match="3 pages asked for, 2 of 2 are free"):
        s.table.reserve(torch.tensor([0]), torch.tensor([33]))
    s.check()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4), st.integers(0, 4), st.integers(1, 40)), max_size=30))
def test_histories_against_plain_lists(history: list[tuple[int, int, int, int]]) -> None:
    """Writes by one or several, shares, cuts, growth, over a pool that is too small for all."""
    s = Store(9, 5, 8)
    for kind, a, b, n in history:
        if kind < 4:
            slots = [a] if kind < 2 or a == b else [b, a]
            ends = [min(len(s.lists[x]) + n, 8 * PAGE) for x in slots]
            if int(s.table.need(torch.tensor(slots), torch.tensor(ends)).sum()) <= s.table.free:
                s.write(slots, ends)
        elif kind < 7:
            empty = [x for x in range(5) if x != a and not s.lists[x] and int(s.table.held[x]) == 0][: 1 + n % 3]
            if empty:
                s.share([a] * len(empty), empty)
        elif kind < 9:
            s.truncate(b, (3 * n) % (len(s.lists[b]) + 2))
        elif s.table.pages < 14:
            s.table.grow(s.table.pages + n % 3, 5, s.table.table.shape[1] + n % 2)
            s.values = torch.cat([s.values, torch.full((n % 3, PAGE), -1)])
    s.check()
    for slot in range(5):
        s.truncate(slot, 0)
    assert s.table.free == s.table.pages
    s.check()
