"""Soft tokens in the engine: what it draws is what a pass over the whole sequence draws, and the update's (C1)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pymathrl
from pymathrl.algos import LossSpec
from pymathrl.batch import ROLE_FORCED, ROLE_SAMPLED, Batch, Rollout
from pymathrl.loss import minibatch_loss
from pymathrl.models import Policy
from pymathrl.ops.policy_loss import STATS
from pymathrl.ops.soft_embed import soft_embed
from pymathrl.rollout import Engine, SoftSampling, score
from tests.rollout.cases import FIELDS, PROMPTS, assert_no_pages, assert_same, assert_same_rollout, sharp_policy

SEED = 4
SOFT = SoftSampling(0.5, 0.01)


@pytest.fixture(scope="module", params=["sharp", "builtin"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return sharp_policy() if request.param == "sharp" else pymathrl.load("builtin:tiny")


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


@torch.no_grad()
def naive(
    policy: Policy, prompt: list[int], uid: int, plan: list[tuple[str, int]], soft: SoftSampling = SOFT
) -> tuple[list[int], Tensor, Tensor]:
    """The plan's phases, ("soft", n), ("hard", n) or ("forced", id), each step by a pass over everything before it:
    (ids, fed vectors [T,D], fp32 [3,T'] of FIELDS of the drawn tokens)."""
    model = policy.model
    ids, fed, numbers = list(prompt), model.embed[torch.tensor(prompt)], []
    for phase, count in plan:
        for _ in range(1 if phase == "forced" else count):
            if phase == "forced":
                token, vector = count, model.embed[count]
            else:
                at = torch.arange(len(ids))
                hidden = model.hidden(torch.tensor(ids), torch.tensor([0, len(ids)]), (at, fed))
                logits = model.logits(hidden[-1:])
                key = (SEED, torch.tensor([uid]), torch.tensor([len(ids) - len(prompt)]))
                if phase == "soft":
                    out = soft_embed(logits, model.embed, temperature=soft.temperature, sigma=soft.sigma,
                                     top_k=soft.top_k, noise=key)  # fmt: skip
                    vector = out.inputs[0]
                else:
                    out = pymathrl.ops.sample_token(logits, *key)
                    vector = model.embed[int(out.ids)]
                token = int(out.ids)
                numbers.append(torch.stack([getattr(out, name)[0] for name in FIELDS]))
            ids.append(token)
            fed = torch.cat([fed, vector[None]])
    return ids, fed, torch.stack(numbers, 1)


def fed_vectors(policy: Policy, rollout: Rollout) -> Tensor:
    vectors = policy.model.embed.detach()[rollout.ids]
    if rollout.soft is not None and rollout.soft_inputs is not None:
        vectors[rollout.soft] = rollout.soft_inputs
    return vectors


def responses(engine: Engine, prompts: list[list[int]], most: int = 17) -> Rollout:
    """Soft, a forced token, hard; the third sequence goes on with soft tokens, straight after hard ones."""
    seqs = engine.start(prompts, uids=range(len(prompts)))
    engine.segment(seqs, most, stop_ids=(), soft=SOFT)
    for seq in seqs:
        engine.append(seq, [5])
    engine.segment(seqs, 6, stop_ids=())
    engine.segment(seqs[2:3], 3, stop_ids=(), soft=SOFT)
    engine.segment(seqs[2:3], 2, stop_ids=())
    rollout = engine.rollout(seqs)
    rollout.validate()
    engine.free(seqs)
    assert_no_pages(engine)
    return rollout


@pytest.fixture(scope="module")
def whole(policy: Policy) -> Rollout:
    torch.set_num_threads(1)
    return responses(Engine(policy, SEED), PROMPTS)


def test_the_engine_draws_what_a_pass_over_the_whole_sequence_draws(policy: Policy, whole: Rollout) -> None:
    for row, prompt in enumerate(PROMPTS):
        plan = [("soft", 17), ("forced", 5), ("hard", 6)] + ([("soft", 3), ("hard", 2)] if row == 2 else [])
        ids, fed, numbers = naive(policy, prompt, row, plan)
        one = whole.select([row])
        assert one.ids.tolist() == ids
        assert_same(fed_vectors(policy, one), fed)
        assert_same(torch.stack([getattr(one, name)[one.sampled_mask] for name in FIELDS]), numbers)
        assert one.soft is not None and int(one.soft.sum()) == 17 + 3 * (row == 2)
        assert bool((one.role[one.soft] == ROLE_SAMPLED).all())
        assert one.role[len(prompt) + 17] == ROLE_FORCED and not bool(one.soft[len(prompt) + 17])
    assert whole.soft_sampling == SOFT
    assert whole.soft_inputs is not None and whole.soft_inputs.shape == (17 * 6 + 3, policy.config.hidden_size)


@pytest.mark.parametrize("max_batch, max_pages", [(1, None), (2, None), (4, 8), (512, 9)])
def test_same_vectors_for_any_batch_limit_and_under_preemption(
    policy: Policy, whole: Rollout, max_batch: int, max_pages: int | None
) -> None:
    engine = Engine(policy, SEED, max_batch=max_batch, max_pages=max_pages)
    assert_same_rollout(responses(engine, PROMPTS), whole)
    if max_pages is not None:
        assert engine.preemptions > 0
    assert_same_rollout(responses(engine, PROMPTS), whole)  # with what the first left behind


def test_same_vectors_for_any_number_of_threads(policy: Policy, whole: Rollout, threads: Callable[[int], None]) -> None:
    threads(2)
    assert_same_rollout(responses(Engine(policy, SEED), PROMPTS), whole)


def test_the_update_sees_the_same_states_and_densities(policy: Policy, whole: Rollout) -> None:
    """However the rows are packed; and an optimizer step begins with a ratio of exactly 1."""
    shuffled = torch.randperm(whole.rows, generator=torch.Generator().manual_seed(0))
    for budget, order in ((1, torch.arange(whole.rows)), (70, torch.arange(whole.rows).flip(0)), (10**6, shuffled)):
        part = whole.select(order)
        part.validate()
        scores = score(policy, part, 1.0, budget)
        for name in FIELDS:
            assert_same(getattr(scores, name), getattr(part, name), f"{name}, budget {budget}")
    ones = torch.ones(whole.tokens)
    batch = Batch(whole, torch.ones(whole.rows), torch.ones(whole.rows, dtype=torch.bool), ones, ones, ones)
    for budget in (60, 10**6):
        report = minibatch_loss(
            policy.model, batch, range(whole.rows), LossSpec("clip", terms={"clip_low": 0.2, "clip_high": 0.2}),
            temperature=1.0, token_budget=budget, max_new_tokens=40,
        )  # fmt: skip
        policy.model.zero_grad()
        for values in report.stats:
            stats = dict(zip(STATS, values.tolist(), strict=True))
            assert stats["ratio_max"] == 1.0 and stats["log_ratio_abs_max"] == 0.0


def test_a_fork_feeds_the_same_vectors_and_draws_its_own(policy: Policy) -> None:
    engine = Engine(policy, SEED, max_pages=8)
    (a,) = engine.start([PROMPTS[1]], uids=[7])
    engine.segment([a], 20, stop_ids=(), soft=SOFT)
    (same, other) = engine.fork(a, 2, uids=[7, 8])
    assert engine._store.used == 21  # a fork shares the vectors
    before = engine.rollout([a]).soft_inputs
    seqs = [a, same, other]
    engine.segment(seqs, 9, stop_ids=(), soft=SOFT)
    engine.segment(seqs, 4, stop_ids=())
    one, two, three = (engine.rollout([seq]) for seq in seqs)
    assert_same_rollout(two, one)
    assert before is not None and one.soft_inputs is not None and three.soft_inputs is not None
    assert torch.equal(three.soft_inputs[:20], before) and not torch.equal(three.soft_inputs[20:], one.soft_inputs[20:])
    for seq, uid in ((a, 7), (same, 7)):
        ids, fed, _ = naive(policy, PROMPTS[1], uid, [("soft", 29), ("hard", 4)])
        assert engine.tokens(seq) == ids
        assert_same(fed_vectors(policy, engine.rollout([seq])), fed)


def test_a_rollback_draws_the_same_again_and_forgets_what_was_taken_back(policy: Policy) -> None:
    engine = Engine(policy, SEED)
    (a,) = engine.start([PROMPTS[3]], uids=[3])
    engine.segment([a], 5, stop_ids=(), soft=SOFT)
    point = engine.snapshot(a)
    engine.segment([a], 12, stop_ids=(), soft=SOFT)
    first = engine.rollout([a])
    engine.rollback(a, point)
    engine.segment([a], 12, stop_ids=(), soft=SOFT)
    assert_same_rollout(engine.rollout([a]), first)
    engine.rollback(a, point)
    engine.segment([a], 12, stop_ids=())  # hard tokens where soft ones lay
    mixed = engine.rollout([a])
    assert mixed.soft is not None and int(mixed.soft.sum()) == 5
    ids, fed, _ = naive(policy, PROMPTS[3], 3, [("soft", 5), ("hard", 12)])
    assert mixed.ids.tolist() == ids
    assert_same(fed_vectors(policy, mixed), fed)
    engine.rollback(a, point)
    engine.append(a, [6, 7, 8])
    forced = engine.rollout([a])
    assert forced.soft is not None and int(forced.soft.sum()) == 5
    engine.free([a])
    (b,) = engine.start([[9] * 30])  # a slot that held soft tokens
    assert engine.rollout([b]).soft is None


def test_the_store_gives_away_vectors_that_nobody_has(policy: Policy) -> None:
    engine = Engine(policy, SEED)
    (a,) = engine.start([PROMPTS[1]], uids=[7])
    engine.segment([a], 10, stop_ids=(), soft=SOFT)
    want = engine.rollout([a])
    (b,) = engine.start([PROMPTS[2]], uids=[8])
    point = engine.snapshot(b)
    for _ in range(40):
        engine.segment([b], 10, stop_ids=(), soft=SOFT)
        engine.rollback(b, point)
    assert len(engine._store.inputs) < 100
    assert_same_rollout(engine.rollout([a]), want)


def test_steps_one_by_one_and_top_k(policy: Policy) -> None:
    soft = SoftSampling(0.7, 0.02, top_k=3)
    engine = Engine(policy, SEED, max_batch=2)
    seqs = engine.start(PROMPTS[:3], uids=[0, 1, 2])
    steps = [engine.step(seqs, soft=soft) for _ in range(6)]
    rollout = engine.rollout(seqs)
    for row, prompt in enumerate(PROMPTS[:3]):
        ids, fed, numbers = naive(policy, prompt, row, [("soft", 6)], soft)
        one = rollout.select([row])
        assert one.ids.tolist() == ids == [*prompt, *(int(s.ids[row]) for s in steps)]
        assert_same(fed_vectors(policy, one), fed)
        assert_same(torch.stack([s.logp[row] for s in steps]), numbers[0])
    scores = score(policy, rollout, 1.0)
    for name in FIELDS:
        assert_same(getattr(scores, name), getattr(rollout, name), name)


def test_stop_strings_are_found_in_the_most_probable_tokens(policy: Policy) -> None:
    engine = Engine(policy, SEED)
    (a,) = engine.start([PROMPTS[1]], uids=[7])
    engine.segment([a], 20, stop_ids=(), soft=SOFT)
    ids = engine.tokens(a)[len(PROMPTS[1]) :]
    text = policy.tokenizer.decode(ids[:9])[-1:]
    assert text
    (b,) = engine.start([PROMPTS[1]], uids=[7])
    assert engine.segment([b], 20, stop_ids=(), stop_strings=[text], soft=SOFT) == ["string"]
    shadow = policy.tokenizer.decode(engine.tokens(b)[len(PROMPTS[1]) :])
    assert shadow.endswith(text) and text not in shadow[:-1]
    assert engine.tokens(b) == engine.tokens(a)[: len(engine.tokens(b))]


def test_sigma_0_feeds_the_mean_alone(policy: Policy) -> None:
    engine = Engine(policy, SEED)
    a, b = engine.start([PROMPTS[1]] * 2, uids=[7, 8])
    engine.segment([a, b], 8, stop_ids=(), soft=SoftSampling(0.5, 0.0))
    rollout = engine.rollout([a, b])
    assert rollout.soft_inputs is not None and torch.equal(rollout.soft_inputs[:8], rollout.soft_inputs[8:])
    assert bool((rollout.logp == 0).all())


def test_errors(policy: Policy) -> None:
    engine = Engine(policy, SEED)
    (a,) = engine.start([PROMPTS[1]])
    with pytest.raises(ValueError, match="takes no temperature, filters or hook"):
        engine.segment([a], 3, soft=SOFT, temperature=0.5)
    with pytest.raises(ValueError, match="takes no temperature, filters or hook"):
        engine.step([a], soft=SOFT, hook=lambda *_: None)
    engine.step([a], soft=SOFT)
    with pytest.raises(ValueError, match=r"made under SoftSampling\(temperature=0.5, sigma=0.01"):
        engine.step([a], soft=SoftSampling(0.5, 0.02))
    with pytest.raises(ValueError, match="expected temperature > 0"):
        SoftSampling(0.0, 0.1)
    with pytest.raises(ValueError, match="no entropy bonus"):
        rollout = engine.rollout([a])
        one = torch.ones(rollout.tokens)
        batch = Batch(rollout, one[:1], one[:1].bool(), one, one, one)
        minibatch_loss(
            policy.model, batch, [0], LossSpec("weighted", terms={"entropy_coef": 0.1}), temperature=1.0,
            token_budget=99, max_new_tokens=9,
        )  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(["soft", "hard", "forced", "fork", "back"]), st.integers(0, 99)), max_size=14),
    st.integers(5, 9),
    st.sampled_from([1, 2, 512]),
)
def test_random_lives(actions: list[tuple[str, int]], max_pages: int, max_batch: int) -> None:
    """Of sequences over a cache that is too small for them; each plan is replayed by passes over whole sequences."""
    torch.set_num_threads(1)
    policy = sharp_policy()
    engine = Engine(policy, SEED, max_batch=max_batch, max_pages=max_pages)
    seqs = engine.start(PROMPTS[:2], uids=[0, 1])
    live = {seq: (row, PROMPTS[row], [], []) for row, seq in enumerate(seqs)}  # uid, prompt, plan, (snapshot, steps)
    for name, a in actions:
        some = [seq for i, seq in enumerate(live) if (a >> i) % 2 == 0 and len(engine.tokens(seq)) < 70]
        if name in ("soft", "hard") and some:
            count = 1 + a % 9
            engine.segment(some, count, stop_ids=(), soft=SOFT if name == "soft" else None)
            for seq in some:
                live[seq][2].append((name, count))
        elif name == "forced" and some:
            engine.append(some[0], [3 + a % 20])
            live[some[0]][2].append((name, 3 + a % 20))
        elif name == "fork" and some and len(live) < 5:
            (copy,) = engine.fork(some[0], 1, uids=[live[some[0]][0]])  # the same uid: its replay is the source's
            live[copy] = (live[some[0]][0], live[some[0]][1], list(live[some[0]][2]), [])
        elif name == "back" and some:
            _, _, plan, points = live[some[0]]
            if points and a % 2:
                point, steps = points.pop()
                engine.rollback(some[0], point)
                del plan[steps:]
            else:
                points.append((engine.snapshot(some[0]), len(plan)))
    for seq, (uid, prompt, plan, _) in live.items():
        one = engine.rollout([seq])
        one.validate()
        if not any(name != "forced" for name, _ in plan):
            continue
        ids, fed, numbers = naive(policy, prompt, uid, plan)
        assert one.ids.tolist() == ids
        assert_same(fed_vectors(policy, one), fed)
        assert_same(torch.stack([getattr(one, name)[one.sampled_mask] for name in FIELDS]), numbers)
    engine.free(list(live))
    assert_no_pages(engine)
