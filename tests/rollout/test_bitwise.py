"""Contracts C1 and C3: the sampler's numbers are the update's bit for bit, and samples know nothing of their batch.

On tiny random models and the built-in ones, a transformer and a hybrid of each, and on SmolLM2-135M where the
environment variable PYMATHRL_SMOLLM2 names its folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pymathrl
from pymathrl.advantage import advantage
from pymathrl.batch import ROLE_SAMPLED, Rollout
from pymathrl.errors import UserError
from pymathrl.loss import minibatch_loss
from pymathrl.models import Policy
from pymathrl.models.paged import PagedCache
from pymathrl.ops._call import use_reference
from pymathrl.ops.policy_loss import STATS
from pymathrl.rollout import Engine, score
from pymathrl.rollout import engine as engine_module
from pymathrl.rollout.pages import PageTable
from tests.algos.cases import context, with_rewards
from tests.rollout.cases import FIELDS, assert_no_pages, assert_same, assert_same_rollout, sharp_policy
from tests.tiny import tiny_policy

N, SEED = 3, 11
FOLDER = os.environ.get("PYMATHRL_SMOLLM2", "")
NO_FOLDER = pytest.mark.skipif(
    not Path(FOLDER, "model.safetensors").is_file(), reason="PYMATHRL_SMOLLM2 names no folder with SmolLM2-135M"
)
TEXTS = (
    "7 3 -> 21\n<think>",
    "3",
    "1 2 3 4 -> 10\n<think>1+2",
    "9 8 -> 1\n<think>" + "9-8=1 " * 6,
    "25 4 -> 100\n<think>",
)


@pytest.fixture(
    scope="module", params=["tiny", "hybrid", "builtin", "builtin-m1", pytest.param("smollm2", marks=NO_FOLDER)]
)
def policy(request: pytest.FixtureRequest) -> Policy:
    makers: dict[str, Callable[[], Policy]] = {
        "tiny": lambda: tiny_policy(tie=True),
        "hybrid": lambda: tiny_policy(layers=3, hybrid=True),
        "builtin": lambda: pymathrl.load("builtin:tiny"),
        "builtin-m1": lambda: pymathrl.load("builtin:tiny-m1"),
        "smollm2": lambda: pymathrl.load(FOLDER, dtype=torch.float32),
    }
    return makers[request.param]()


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[list[int]]:
    """Of 1 to about 50 tokens, none a multiple of the page."""
    return [policy.tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def limit(policy: Policy) -> int:
    return 24 if policy.config.vocab_size < 1000 else 5


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


@pytest.fixture(scope="module")
def uids(prompts: list[list[int]]) -> Tensor:
    return torch.arange(500, 500 + len(prompts) * N)


@pytest.fixture(scope="module")
def whole(policy: Policy, prompts: list[list[int]], uids: Tensor, limit: int) -> Rollout:
    torch.set_num_threads(1)
    return Engine(policy, SEED, max_batch=64).generate(prompts, N, limit, uids=uids)


def assert_scored(policy: Policy, rollout: Rollout, temperature: float = 1.0) -> None:
    """The update's pass gives the sampler's numbers: one row at a time, a few, all; in order, reversed, shuffled."""
    shuffled = torch.randperm(rollout.rows, generator=torch.Generator().manual_seed(0))
    for budget, order in ((1, None), (70, torch.arange(rollout.rows).flip(0)), (100_000, shuffled)):
        part = rollout if order is None else rollout.select(order)
        for got, name in zip(score(policy, part, temperature, budget)[:3], FIELDS, strict=True):
            assert_same(got, getattr(part, name), f"{name}, budget {budget}")


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_same_samples_for_any_batch_limit(
    policy: Policy, prompts: list[list[int]], uids: Tensor, limit: int, whole: Rollout, max_batch: int
) -> None:
    engine = Engine(policy, SEED, max_batch=max_batch)
    assert_same_rollout(engine.generate(prompts, N, limit, uids=uids), whole)


def test_same_samples_for_any_order_of_prompts(
    policy: Policy, prompts: list[list[int]], uids: Tensor, limit: int, whole: Rollout
) -> None:
    order = [3, 0, 4, 2, 1]
    rows = torch.tensor([p * N + i for p in order for i in range(N)])
    other = Engine(policy, SEED, max_batch=4).generate([prompts[p] for p in order], N, limit, uids=uids[rows])
    assert_same_rollout(other, whole.select(rows))


def test_same_numbers_for_any_packing(policy: Policy, whole: Rollout) -> None:
    assert int(whole.sampled_mask.sum()) > whole.rows
    assert_scored(policy, whole)


def test_same_numbers_for_any_number_of_threads(
    policy: Policy, prompts: list[list[int]], uids: Tensor, limit: int, whole: Rollout,
    threads: Callable[[int], None],
) -> None:  # fmt: skip
    """Also with a pass that was recorded under another number. Two prompts: threads that share a core wait long."""
    engine, part = Engine(policy, SEED), whole.select(range(2 * N))
    for count in (2, 1):
        threads(count)
        assert_same_rollout(engine.generate(prompts[:2], N, limit, uids=uids[: 2 * N]), part)
    threads(2)
    for got, name in zip(score(policy, part, 1.0, 70)[:3], FIELDS, strict=True):
        assert_same(got, getattr(part, name), name)


def test_shared_prompts_and_cold_starts_are_the_same(
    policy: Policy, prompts: list[list[int]], uids: Tensor, limit: int, whole: Rollout
) -> None:
    """`generate` makes a prompt's keys once for its samples; here each sequence makes its own, and one at a time."""
    engine = Engine(policy, SEED)
    seqs = engine.start([p for p in prompts for _ in range(N)], uids=uids.tolist())
    for seq in seqs[::-1]:
        engine.segment([seq], limit)
    assert_same_rollout(engine.rollout(seqs, group=whole.group.tolist()), whole)


@pytest.mark.parametrize("max_pages", [None, 8])
def test_forked_forced_and_rolled_back_sequences(
    policy: Policy, prompts: list[list[int]], limit: int, max_pages: int | None
) -> None:
    """8 pages hold one or two of the seven: the rest are preempted again and again."""
    engine = Engine(policy, SEED, max_pages=max_pages)
    seqs = engine.start(prompts[:4], uids=[1, 2, 3, 4])
    engine.segment(seqs, limit // 2, stop_ids=(), temperature=0.8)
    seqs += engine.fork(seqs[3], 2, uids=[5, 6])
    engine.append(seqs[4], prompts[2])
    point = engine.snapshot(seqs[2])
    engine.segment(seqs, limit, stop_ids=(), temperature=0.8)
    engine.rollback(seqs[2], point)
    engine.append(seqs[2], prompts[1])
    seqs += engine.fork(seqs[2], 1, uids=[7])
    engine.append(seqs[6], prompts[0])
    for _ in range(2):
        engine.step(seqs, temperature=0.8)
    rollout = engine.rollout(seqs)
    rollout.validate()
    assert (engine.preemptions > 0) == (max_pages is not None)
    assert_scored(policy, rollout, temperature=0.8)
    engine.free(seqs)
    assert_no_pages(engine)


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}]
)
def test_filtered_draws_are_accounted_for(
    policy: Policy, prompts: list[list[int]], uids: Tensor, limit: int, filters: dict[str, float]
) -> None:
    """Contract C8: log-prob, entropy and mean are those of what the filters left, in the update too."""
    engine = Engine(policy, SEED, max_batch=7)
    rollout = engine.generate(prompts, N, limit, uids=uids, temperature=1.3, **filters)  # type: ignore[arg-type]
    rollout.validate()
    assert rollout.support_ids is not None and rollout.support_offsets is not None
    size = rollout.support_offsets.diff()[rollout.sampled_mask]
    assert int(size.min()) >= 1 and int(size.max()) > 1 and int(size.max()) <= filters.get("top_k", 10**9)
    for token in rollout.sampled_mask.nonzero()[:40, 0].tolist():
        kept = rollout.support_ids[rollout.support_offsets[token] : rollout.support_offsets[token + 1]].tolist()
        assert int(rollout.ids[token]) in kept and kept == sorted(set(kept))
    assert_scored(policy, rollout, temperature=1.3)
    assert_same_rollout(
        Engine(policy, SEED, max_pages=8).generate(prompts, N, limit, uids=uids, temperature=1.3, **filters), rollout  # type: ignore[arg-type]
    )  # fmt: skip


def test_draws_with_and_without_filters_in_one_sequence(policy: Policy, prompts: list[list[int]]) -> None:
    """What was filtered, rolled back and drawn again without, or forked, has the support of what is there now."""
    engine = Engine(policy, SEED)
    seqs = engine.start(prompts[:3], uids=[1, 2, 3])
    engine.segment(seqs, 3, stop_ids=())
    point = engine.snapshot(seqs[0])
    engine.segment(seqs, 4, stop_ids=(), top_k=4)
    engine.rollback(seqs[0], point)
    seqs += engine.fork(seqs[1], 1, uids=[4])
    engine.append(seqs[2], prompts[1])
    for options in ({}, {"top_p": 0.6}):
        engine.step(seqs, **options)  # type: ignore[arg-type]
    rollout = engine.rollout(seqs)
    rollout.validate()
    assert rollout.support_offsets is not None
    drawn = [size.tolist() for size in rollout.support_offsets.diff().split(rollout.lengths.tolist())]
    filtered = [[n > 0 for n in sizes][len(prompts[i]) :] for i, sizes in zip((0, 1, 2, 1), drawn, strict=True)]
    forced = [False] * len(prompts[1])
    assert filtered[0] == [False] * 4 + [True]
    assert filtered[1] == filtered[3] == [False] * 3 + [True] * 4 + [False, True]
    assert filtered[2] == [False] * 3 + [True] * 4 + forced + [False, True]
    assert_scored(policy, rollout)


@pytest.mark.parametrize("name", ["grpo", "rover"])
def test_the_first_ratio_is_one(policy: Policy, whole: Rollout, name: str) -> None:
    """On the first inner step of a batch the fused loss sees the ratios 1 and the differences 0, exactly."""
    ctx = context(name, policy=policy)
    batch = advantage(ctx, with_rewards(whole, (torch.arange(whole.rows) % N == 0).float()))
    for budget in (50, 100_000):
        policy.model.zero_grad()
        report = minibatch_loss(
            policy.model, batch, range(whole.rows), ctx.run.algo.loss(ctx.own), temperature=1.0, token_budget=budget,
            max_new_tokens=24,
        )  # fmt: skip
        for stats in report.stats:
            seen = dict(zip(STATS, stats.tolist(), strict=True))
            assert seen["tokens"] > 0
            if use_reference():
                assert abs(seen["ratio_max"] - 1) < 1e-4 and seen["log_ratio_abs_max"] < 1e-4
            else:
                assert seen["ratio_max"] == 1.0 and seen["ratio"] == seen["tokens"]
                assert seen["log_ratio_abs_max"] == 0.0 and seen["old_k3"] == 0.0
    policy.model.zero_grad()


# --- the comparison notices -------------------------------------------------------------------------------------------


def wrong_page(patch: pytest.MonkeyPatch) -> None:
    """One entry of the table that the kernels read is off by one."""
    feed = Engine._feed

    def planted(self: Engine, slots: Tensor, ahead: int = -1) -> None:
        feed(self, slots, ahead)
        if len(slots) > 1:
            self._cache.table[slots[0], 0] = (self._cache.table[slots[0], 0] + 1) % self._pages.pages

    patch.setattr(Engine, "_feed", planted)


def wrong_position(patch: pytest.MonkeyPatch) -> None:
    """A token that is fed takes the rotation and the place of the one before."""
    fill = Engine._fill

    def planted(self: Engine, rows: int, slots: Tensor, position: Tensor) -> None:
        fill(self, rows, slots, position)
        self._buffers.position[: slots.numel()] -= (position > 20).to(self.device).long()

    patch.setattr(Engine, "_fill", planted)


def no_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    """Who writes into a shared page writes for all that read it."""
    patch.setattr(PageTable, "_shared", lambda self, slots, end: torch.zeros_like(slots, dtype=torch.bool))


def empty_copies(patch: pytest.MonkeyPatch) -> None:
    """A page is taken on write, but what the old one holds is not copied."""

    def planted(self: PagedCache, source: Tensor, target: Tensor) -> None:
        self.keys[:, target] = 0  # not what the memory held before: that may be the same page of another engine
        self.values[:, target] = 0

    patch.setattr(PagedCache, "copy", planted)


def stale_pages(patch: pytest.MonkeyPatch) -> None:
    """What a sequence has in the cache after a rollback is what was rolled back, and then some."""
    patch.setattr(PageTable, "truncate", lambda self, slots, fed: None)


def forgotten_prefill(patch: pytest.MonkeyPatch) -> None:
    """Of several tokens to be fed, the last is not."""
    patch.setattr(engine_module, "Pass", type("Pass", (engine_module.Pass,), {"run": skip_prefill}))


def skip_prefill(self: engine_module.Pass) -> None:
    if self.until == "cache":
        self.buffers.slot[self.rows - 1] = -1
    engine_module.Pass.__mro__[1].run(self)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "plant", [wrong_page, wrong_position, no_copy_on_write, empty_copies, stale_pages, forgotten_prefill]
)
def test_the_comparison_notices_a_wrong_engine(plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    policy = sharp_policy()

    def largest_gap() -> float:
        engine = Engine(policy, SEED)
        seqs = engine.start(
            [[5, 7, 9], [3 + i % 20 for i in range(25)], [3 + i % 9 for i in range(25)]], uids=[1, 2, 3]
        )
        engine.segment(seqs, 4, stop_ids=())
        seqs += engine.fork(seqs[1], 2, uids=[4, 5])
        point = engine.snapshot(seqs[2])
        engine.segment(seqs, 12, stop_ids=())
        engine.rollback(seqs[2], point)
        engine.append(seqs[2], [4, 4, 4])
        engine.segment(seqs, 12, stop_ids=())
        rollout = engine.rollout(seqs)
        gap = (score(policy, rollout, 1.0)[0] - rollout.logp)[rollout.role == ROLE_SAMPLED]
        return float(gap.abs().max())

    assert largest_gap() < (1e-4 if use_reference() else 1e-30)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        try:
            assert largest_gap() > 1e-2
        except UserError as error:  # keys that nobody wrote may be nan
            assert "no finite logits" in str(error)
