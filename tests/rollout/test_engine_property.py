"""Random lives of sequences over a cache that is too small for them, against a pass over each whole sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymathrl.batch import ROLE_FORCED, ROLE_PROMPT, ROLE_SAMPLED
from pymathrl.models import Policy
from pymathrl.rollout import Engine, Snapshot
from tests.rollout.cases import (
    HYBRID,
    PROMPTS,
    assert_no_pages,
    assert_same,
    naive_draws,
    next_logits,
    sampled_numbers,
    sharp_policy,
)

POLICIES = {"transformer": sharp_policy(), "hybrid": sharp_policy(HYBRID)}
STOPS = range(3, 14)  # about every third draw
SEED, MOST = 4, 90  # tokens of a sequence
NAMES = ("start", "step", "step", "segment", "stop", "fork", "append", "snapshot", "rollback", "free", "logits")


@dataclass
class Naive:
    """A sequence as plain lists."""

    policy: Policy
    uid: int
    prompt: int
    tokens: list[int]
    roles: list[int]
    points: list[Snapshot] = field(default_factory=list)

    def draw(self, count: int) -> torch.Tensor:
        ids, numbers = naive_draws(self.policy, self.tokens, self.prompt, self.uid, count, SEED)
        self.tokens += ids
        self.roles += [ROLE_SAMPLED] * count
        return numbers

    def draw_until_stop(self, most: int, keep: bool) -> str:
        for _ in range(most):
            self.draw(1)
            if self.tokens[-1] in STOPS:
                if not keep:
                    del self.tokens[-1], self.roles[-1]
                    self.points = [p for p in self.points if p.length <= len(self.tokens)]
                return "eos"
        return "length"


@pytest.mark.parametrize("kind", POLICIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 99), st.integers(0, 99)), min_size=4, max_size=16),
    st.integers(6, 12),
    st.sampled_from([2, 3, 512]),
)
def test_random_lives(kind: str, actions: list[tuple[str, int, int]], max_pages: int, max_batch: int) -> None:
    torch.set_num_threads(1)
    policy = POLICIES[kind]
    engine = Engine(policy, SEED, max_batch=max_batch, max_pages=max_pages)
    live: dict[int, Naive] = {}
    uid = 0

    def enter(seqs: list[int], naive: list[Naive]) -> None:
        assert not set(seqs) & live.keys()
        live.update(zip(seqs, naive, strict=True))

    for name, a, b in [("start", 4, 3), *actions]:
        some = [seq for i, seq in enumerate(live) if (a >> (i % 6)) % 2 == 0 and len(live[seq].tokens) < MOST]
        if name == "start" and len(live) < 6:
            prompts = [PROMPTS[(a + i) % len(PROMPTS)] for i in range(1 + b % 2)]
            seqs = engine.start(prompts, uids=range(uid, uid + len(prompts)))
            enter(
                seqs, [Naive(policy, uid + i, len(p), list(p), [ROLE_PROMPT] * len(p)) for i, p in enumerate(prompts)]
            )
            uid += len(prompts)
        elif name in ("step", "segment") and some:
            count = 1 if name == "step" else 1 + b % 7
            if name == "step":
                out = engine.step(some)
            else:
                assert engine.segment(some, count, stop_ids=()) == ["length"] * len(some)
            for i, seq in enumerate(some):
                numbers = live[seq].draw(count)
                assert_same(sampled_numbers(engine, seq, count), numbers)
                if name == "step":
                    assert_same(torch.stack([out.logp[i], out.mean_logp[i], out.entropy[i]]), numbers[:, 0])
                    assert int(out.ids[i]) == live[seq].tokens[-1]
        elif name == "stop" and some:
            why = engine.segment(some, 9, stop_ids=STOPS, keep_stop=b % 2 == 1)
            assert why == [live[seq].draw_until_stop(9, keep=b % 2 == 1) for seq in some]
        elif name == "logits" and some:
            got = engine.logits(some)
            assert_same(got, torch.cat([next_logits(policy, live[seq].tokens) for seq in some]))
        elif live:
            seq = list(live)[a % len(live)]
            naive = live[seq]
            if name == "fork" and len(live) < 6:
                count = 1 + b % 2
                seqs = engine.fork(seq, count, uids=range(uid, uid + count))
                enter(
                    seqs, [Naive(policy, uid + i, naive.prompt, naive.tokens[:], naive.roles[:]) for i in range(count)]
                )
                uid += count
            elif name == "append" and len(naive.tokens) < MOST:
                ids = [3 + (a + i) % 25 for i in range(b % 21)]
                engine.append(seq, ids)
                naive.tokens += ids
                naive.roles += [ROLE_FORCED] * len(ids)
            elif name == "snapshot":
                naive.points.append(engine.snapshot(seq))
            elif name == "rollback" and naive.points:
                point = naive.points[b % len(naive.points)]
                engine.rollback(seq, point)
                del naive.tokens[point.length :], naive.roles[point.length :]
                naive.points = [p for p in naive.points if p.length <= point.length]
            elif name == "free" and len(live) > 1:
                engine.free([seq])
                del live[seq]
        assert engine.pages_in_use <= max_pages
    rollout = engine.rollout(list(live))
    rollout.validate()
    assert rollout.ids.tolist() == [i for naive in live.values() for i in naive.tokens]
    assert rollout.role.tolist() == [i for naive in live.values() for i in naive.roles]
    engine.free(list(live))
    assert_no_pages(engine)
