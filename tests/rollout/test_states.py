"""Recurrent states of a hybrid: shared until a write, kept to come back to, given up where memory ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pymathrl.batch import ROLE_SAMPLED
from pymathrl.errors import UserError
from pymathrl.models import Policy
from pymathrl.models.paged import PagedCache
from pymathrl.rollout import Engine, score
from pymathrl.rollout import engine as engine_module
from pymathrl.rollout.states import KEPT, HybridTable
from tests.rollout.cases import (
    HYBRID,
    PROMPTS,
    assert_no_pages,
    assert_same,
    assert_same_rollout,
    naive_draws,
    next_logits,
    sharp_policy,
)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return sharp_policy(HYBRID)


class Table:
    """A table over a pool whose states are the lists of tokens that they have taken in."""

    def __init__(self, states: int = 6) -> None:
        self.pool: list[list[int]] = [[] for _ in range(states)]
        self.copies = 0
        self.table = HybridTable(0, 0, 0, lambda source, target: None, self.copy)
        self.table.grow(40, 5, 8, states)
        self.tokens: list[list[int]] = [[] for _ in range(5)]

    def copy(self, source: Tensor, target: Tensor) -> None:
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            self.pool[t] = self.pool[s][:]
            self.copies += 1

    def feed(self, slot: int, *ids: int, count: int | None = None) -> None:
        """The tokens behind `fed`, of which `count` stay (None: all)."""
        at, fed = torch.tensor([slot]), int(self.table.fed[slot])
        self.table.need(at, torch.tensor([fed + len(ids)]))
        fed = int(self.table.fed[slot])
        self.table.reserve(at, torch.tensor([fed + len(ids)]))
        row = int(self.table.states_of(at))
        if fed == 0:
            self.pool[row] = []
        self.table.ran(at, len(ids))
        self.pool[row] += ids
        self.tokens[slot] = self.tokens[slot][:fed] + list(ids[:count])
        self.table.settle(at, torch.tensor([len(self.tokens[slot])]))
        self.check()

    def check(self) -> None:
        t = self.table
        for slot in range(5):
            row, fed = int(t.state[slot]), int(t.fed[slot])
            if fed:
                assert self.pool[row] == self.tokens[slot][:fed], slot
        held = [int(row) for row in t.state if row >= 0] + [row for kept in t._kept.values() for _, row, _ in kept]
        assert t.state_refs.tolist() == [held.count(row) for row in range(t.states)]


def slots(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def test_a_state_is_shared_until_one_of_its_holders_goes_on() -> None:
    s = Table()
    s.feed(0, 1, 2, 3)
    s.table.share(slots(0, 0), slots(1, 2))
    s.tokens[1], s.tokens[2] = s.tokens[0][:], s.tokens[0][:]
    assert s.table.states_free == 5 and s.copies == 0
    s.feed(1, 4)
    assert s.copies == 1 and s.table.states_free == 4
    s.feed(2, 5, 6)
    s.feed(0, 7)  # the last holder keeps the row
    assert s.copies == 2 and s.table.states_free == 3
    s.table.truncate(slots(0, 1, 2), slots(0, 0, 0))
    s.check()
    assert s.table.states_free == 6


def test_tokens_that_do_not_count_lead_back_to_what_was_kept_or_to_the_beginning() -> None:
    s = Table()
    s.feed(0, 1, 2, 3)
    s.table.keep(slots(0), 1)
    s.feed(0, 4, 5, 6, count=2)
    assert int(s.table.fed[0]) == 3, "the state with token 6 cannot give it back; the kept one has three tokens"
    s.table.let_go(slots(0), 1)
    s.feed(0, 8, 9, count=1)
    assert int(s.table.fed[0]) == 0 and int(s.table.state[0]) == -1 and int(s.table.held[0]) == 0
    s.feed(0, 1, 2)
    assert s.table.states_free == 5


def test_a_pass_that_broke_off_is_forgotten() -> None:
    s = Table()
    s.feed(0, 1, 2, 3)
    s.table.keep(slots(0), 7)
    s.table.reserve(slots(0), slots(4))
    s.table.ran(slots(0), 1)
    s.pool[int(s.table.state[0])] += [99]  # and no `settle`
    s.feed(0, 4)
    assert s.pool[int(s.table.state[0])] == [1, 2, 3, 4]


def test_the_oldest_kept_states_go_first() -> None:
    s = Table(states=KEPT + 3)
    for token in range(KEPT + 2):
        s.feed(0, token)
        s.table.keep(slots(0), token)
    assert s.table.states_free == 3, "KEPT rows, the sequence's own among them"
    s.table.truncate(slots(0), slots(5))
    assert int(s.table.fed[0]) == 5
    s.table.truncate(slots(0), slots(2))
    s.check()
    assert int(s.table.fed[0]) == 0
    s.table.let_go()
    assert s.table.states_free == s.table.states


def limit_states(patch: pytest.MonkeyPatch, policy: Policy, states: int) -> None:
    """The machine has memory for so many states, and for pages as many as are wanted."""
    patch.setattr(engine_module.devices, "free_bytes", lambda _: states * PagedCache.state_bytes(policy.model))
    patch.setattr(PagedCache, "page_bytes", staticmethod(lambda _: 0))


def test_fewer_states_than_sequences_change_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Engine(policy, 5).generate(PROMPTS, 4, 30)
    limit_states(monkeypatch, policy, 5)
    engine = Engine(policy, 5)
    assert_same_rollout(engine.generate(PROMPTS, 4, 30), whole)
    assert engine._pages.states == 5
    assert_no_pages(engine)
    seqs = engine.start(PROMPTS, uids=range(6))
    engine.segment(seqs, 12, stop_ids=())  # a state and one to keep for each: two or three at a time
    assert engine.preemptions > 0
    rollout = engine.rollout(seqs)
    sampled = rollout.role == ROLE_SAMPLED
    assert_same(rollout.logp[sampled], score(policy, rollout, 1.0).logp[sampled])
    engine.free(seqs)
    assert_no_pages(engine)


def test_no_room_for_one_sequence_is_an_error(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_states(monkeypatch, policy, 1)
    engine = Engine(policy, 5)
    seqs = engine.start(PROMPTS[:1])
    with pytest.raises(UserError, match=r"and 1 recurrent states, and one sequence .* needs 1 and 2 recurrent states"):
        engine.segment(seqs, 4)


def test_kept_states_of_snapshots_make_room_for_running_sequences(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_states(monkeypatch, policy, 3)
    engine = Engine(policy, 5)
    (a,) = engine.start(PROMPTS[3:4], uids=[9])
    points = []
    for _ in range(4):
        engine.step([a])
        points.append(engine.snapshot(a))
    tokens = engine.tokens(a)
    engine.rollback(a, points[1])
    for _ in range(2):
        engine.step([a])
    assert engine.tokens(a) == tokens
    assert_same(engine.logits([a]), next_logits(policy, tokens))


def test_logits_and_interrupted_draws_leave_a_sequence_as_it_was(policy: Policy) -> None:
    engine = Engine(policy, 5)
    (a,) = engine.start(PROMPTS[2:3], uids=[4])
    engine.segment([a], 6, stop_ids=())
    for _ in range(2):
        assert_same(engine.logits([a]), next_logits(policy, engine.tokens(a)))

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.segment([a], 6, hook=broken)
    before = engine.tokens(a)
    engine.segment([a], 9, stop_ids=())
    assert engine.tokens(a) == before + naive_draws(policy, before, 16, 4, 9, 5)[0]


def test_a_long_generation_copies_no_state(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a segment, which can go on, keeps states: at most once in a look for ends."""
    copied = []
    monkeypatch.setattr(PagedCache, "copy_states", lambda self, source, target: copied.append(source.numel()))
    engine = Engine(policy, 5)
    engine.generate([PROMPTS[1]], 1, 60, stop_ids=())
    assert copied == []
