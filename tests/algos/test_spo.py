"""SPO: the tracker's numbers by hand, its draws, what it remembers of a response, the loss, and a run cut in two."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from pymathrl.algos import REGISTRY, spo
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.algos.runs import assert_resume_gives_the_same_bits
from tests.tiny import tiny_policy

OWN = spo.Config()
ALGO = REGISTRY["spo"]


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_start_of_the_tracker():
    alpha, beta = spo.prior(torch.tensor([3]), OWN)
    assert (float(alpha), float(beta)) == pytest.approx((3.111111, 4.888889), abs=1e-5)
    alpha, beta = spo.prior(torch.tensor([3, 0]), replace(OWN, spo_init="paper"))
    assert alpha.tolist() == [3, 0] and beta.tolist() == [5, 8]
    assert [x.tolist() for x in spo.prior(torch.tensor([0]), replace(OWN, offline_samples=0))] == [[0.5], [0.5]]
    assert float(spo.prior(torch.tensor([3]), replace(OWN, rho_min=0.5))[0]) == pytest.approx(2 * 3.5 / 9)


@pytest.mark.parametrize(
    "distance, reward, expected",
    [(0.03, 1, (3.722222, 4.277778)), (0.006, 0, (2.902769, 5.561495)), (0.0, 1, (3.986667, 4.693333))],
)
def test_forgetting_by_hand(distance, reward, expected):
    alpha, beta = spo.prior(torch.tensor([3]), OWN)
    rho = spo.factor(values(distance), OWN)
    assert (float(rho * alpha + reward), float(rho * beta + 1 - reward)) == pytest.approx(expected, abs=1e-5)
    # the same as a moving average of v with the weight of the past
    v, past = float(alpha / (alpha + beta)), float(rho * (alpha + beta))
    assert v + (reward - v) / (past + 1) == pytest.approx(expected[0] / sum(expected), abs=1e-6)


def test_forgetting_of_a_constant_and_its_bounds():
    assert spo.factor(values(0.0, 9.0), replace(OWN, rho_type="constant")).tolist() == [0.875, 0.875]
    assert spo.factor(values(0.0, 9.0), OWN).tolist() == [0.96, 0.875]
    assert float(spo.factor(values(0.06), replace(OWN, rho_min=0.1))) == pytest.approx(0.5)


def set_value(ctx, *numbers):
    ctx.memory.alpha, ctx.memory.beta = 8 * values(*numbers), 8 * (1 - values(*numbers))
    ctx.memory.started = True


def test_advantage_and_weights_by_hand():
    ctx = context("spo", "--pool", "4")
    set_value(ctx, 0.1, 0.5, 0.9, 0.25)
    weight = spo.draw_weight(ctx.memory.value, ctx.own)
    assert (weight / weight.sum()).tolist() == pytest.approx([0.201960, 0.317366, 0.201960, 0.278713], abs=1e-5)
    got = ALGO.advantage(ctx, graded([[1.0], [0.0], [1.0], [0.0]]))
    assert got.tolist() == pytest.approx([1.372597, -0.921894, 0.061460, -0.512163], abs=1e-5)
    assert ctx.metrics["spo/adv_before_norm"] == pytest.approx(0.0625)
    # each response has the value of its own problem, in whatever order
    turned = ALGO.advantage(ctx, graded([[0.0], [1.0], [0.0], [1.0]], uids=[3, 2, 1, 0]))
    assert turned.tolist() == pytest.approx(got.flip(0).tolist(), abs=1e-6)


def test_draw_is_weighted_and_without_replacement():
    weight = values(4.0, 2.0, 1.0, 1.0)
    first, pairs = torch.zeros(4), torch.zeros(4)
    for seed in range(1500):
        first[spo.weighted_draw(weight, 1, random.Random(seed))] += 1
        pairs[spo.weighted_draw(weight, 2, random.Random(seed))] += 1
    assert (first / 1500).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.04)
    # 1/2 + 1/4 * 4/6 + 2 * 1/8 * 4/7: the second among what the first left
    assert float(pairs[0]) / 1500 == pytest.approx(0.5 + 1 / 6 + 1 / 7, abs=0.04)
    assert spo.weighted_draw(weight, 4, random.Random(0)) == [0, 1, 2, 3]


def test_start_counts_right_answers_of_each_problem():
    ctx = context("spo", "--pool", "6", "--offline-samples", "3")
    real, seen = ctx.verify, []

    def verify(rollout, problems):  # the problems of even number are solved by two samples of three
        seen.extend(rollout.uid.tolist())
        right = torch.tensor([p.uid % 2 == 0 and i < 2 for p in problems for i in range(3)])
        return replace(real(rollout, problems), correct=right)

    ctx.verify = verify
    prompts = ALGO.draw(ctx, 4)
    assert seen == [(uid << 16) + i for uid in range(6) for i in range(3)]
    assert len({p.uid for p in prompts.problems}) == 4 and ctx.at.tokens > 0
    assert ctx.memory.alpha.tolist() == pytest.approx([8 * 2.5 / 4, 8 * 0.5 / 4] * 3)
    assert (ctx.memory.alpha + ctx.memory.beta).tolist() == pytest.approx([8.0] * 6)
    before = ctx.at.tokens
    ALGO.draw(ctx, 4)
    assert ctx.at.tokens == before, "once"


def step(ctx, update=lambda: None):
    """draw .. after_step; the answers to problems of even number are right."""
    prompts = ALGO.draw(ctx, ctx.train.prompts_per_step)
    rollout = ALGO.rollout(ctx, prompts, ctx.draws)
    batch = make_batch(ctx, ALGO.judge(ctx, ctx.verify(rollout, prompts.problems)))
    batch = replace(batch, correct=(batch.rollout.uid >> 16) % 2 == 0)
    update()
    ALGO.after_step(ctx, batch)
    ctx.at.step += 1
    return batch


def test_a_problem_met_again_draws_anew_and_is_compared_with_its_last_response():
    policy = tiny_policy(seed=3)
    ctx = context("spo", "--pool", "4", "--offline-samples", "2", "--rho-min", "0.1", policy=policy)
    first = step(ctx, update=lambda: move(policy, 0.01, seed=1))
    assert first.rollout.uid.tolist() == [(uid << 16) + 2 for uid in range(4)]
    assert ctx.metrics["spo/first_sampled_ratio"] == 1 and ctx.metrics["spo/D"] == 0
    alpha, beta = ctx.memory.alpha.clone(), ctx.memory.beta.clone()
    kept = ctx.memory.last
    assert kept.ids.equal(first.rollout.ids), "with the log-probs of the policy after the update"
    assert kept.logp.equal(ctx.score(first.rollout).logp) and not kept.logp.equal(first.rollout.logp)
    move(policy, 0.002)
    now = ctx.score(first.rollout).logp
    second = step(ctx)
    assert second.rollout.uid.tolist() == [(uid << 16) + 3 for uid in range(4)]
    mask = first.rollout.sampled_mask
    distance = torch.stack([
        (kept.logp - now)[mask & (first.rollout.row_of_token == row)].abs().mean() for row in range(4)
    ]).double()  # fmt: skip
    assert ctx.metrics["spo/D"] == pytest.approx(float(distance.mean()), rel=1e-5)
    rho = torch.exp2(-distance / 0.06).clamp(0.1, 0.96)
    assert len(set(rho.tolist())) == 4, "the case is inside the bounds"
    assert ctx.memory.alpha.tolist() == pytest.approx((rho * alpha + values(1, 0, 1, 0)).tolist(), rel=1e-5)
    assert ctx.memory.beta.tolist() == pytest.approx((rho * beta + values(0, 1, 0, 1)).tolist(), rel=1e-5)
    assert ctx.memory.last.ids.equal(second.rollout.ids) and ctx.memory.visits.tolist() == [2] * 4
    assert ctx.metrics["spo/first_sampled_ratio"] == 0


def test_responses_of_problems_not_drawn_are_kept_and_the_state_survives():
    ctx = context("spo", "--pool", "6", "--offline-samples", "1")
    batches = [step(ctx) for _ in range(3)]
    latest = {}
    for batch in batches:
        for row, uid in enumerate(batch.rollout.uid.tolist()):
            latest[uid >> 16] = batch.rollout.response(row).tolist()
    tracker = ctx.memory
    stored = {int(owner): tracker.last.response(row).tolist() for row, owner in enumerate(tracker.owner)}
    assert stored == latest and len(stored) > 4
    other = context("spo", "--pool", "6", "--offline-samples", "1")
    other.memory.load_state_dict(copy.deepcopy(tracker.state_dict()))
    other.at.step = ctx.at.step
    a, b = step(ctx), step(other)
    assert a.rollout.ids.equal(b.rollout.ids) and a.advantage.equal(b.advantage)
    assert ctx.memory.alpha.equal(other.memory.alpha) and ctx.metrics == other.metrics


def test_a_stage_with_another_task_begins_another_pool():
    ctx = context("spo", "--pool", "6", "--offline-samples", "1")
    step(ctx)
    ctx.task = replace(ctx.task, format_score=0.0)
    step(ctx)
    assert ctx.memory.visits.sum() == 4 and ctx.memory.pool.fits(ctx, 6)


def test_gradient_through_the_model_equals_the_equations_in_float64():
    policy = tiny_policy(seed=3)
    ctx = context("spo", "--pool", "8", "--clip-low", "0.1", "--clip-high", "0.15", "--dual-clip", "1.2",
                  "--temperature", "0.9", policy=policy)  # fmt: skip
    set_value(ctx, *[0.1 * i for i in range(1, 9)])
    rollout = sampled(policy, 3, 1)
    batch = make_batch(ctx, with_rewards(rollout, torch.tensor([1.0, 0.0, 0.0])))
    assert set((batch.advantage[rollout.sampled_mask] > 0).tolist()) == {True, False}
    move(policy)

    def equations(rows):
        total = rows[0].logp.new_zeros(())
        for r in rows:
            worst = torch.maximum(-r.advantage * r.ratio, -r.advantage * r.ratio.clamp(0.9, 1.15))
            bounded = torch.minimum(worst, -1.2 * r.advantage)
            total = total + torch.where(r.advantage < 0, bounded, worst).sum()
        return total / sum(len(r.logp) for r in rows)

    check_gradient(ctx, batch, equations)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--samples-per-prompt", "2"], "one response per problem"),
        (["--filter", "mixed"], "--filter off"),
        (["--pool", "100"], "--pool >= --prompts-per-step"),
        (["--rho-min", "0.97"], "--rho-min <= --rho-max"),
    ],
)
def test_options_that_do_not_fit(flags, words):
    with pytest.raises(UserError, match=words):
        parse_train(["--algo", "spo", *flags])


def test_run_cut_in_two_gives_the_same_bits(tmp_path):
    flags = ("--pool", "24", "--offline-samples", "2", "--samples-per-prompt", "1", "--prompts-per-step", "16")
    metrics = assert_resume_gives_the_same_bits(tmp_path, "spo", *flags)
    assert metrics[-1]["spo/D"] > 0 and metrics[-1]["spo/sampled_number_max"] >= 3
