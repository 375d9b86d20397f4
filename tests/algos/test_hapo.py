"""HAPO: rewards by hand, the history's order of reading and writing, problems that come again, a run cut in two."""

import copy
import math

import pytest
import torch

from pymathrl.algos import REGISTRY, hapo
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.algos.runs import assert_resume_gives_the_same_bits
from tests.tiny import tiny_policy

ALGO = REGISTRY["hapo"]


def reward(length, correct, shape="cos", h=1000.0):
    got = hapo.length_reward(torch.tensor([length]), torch.tensor([h]), torch.tensor([bool(correct)]), shape)
    return correct + float(got)


@pytest.mark.parametrize(
    "shape, length, correct, expected",
    [
        ("cos", 500, 1, 1.707107), ("cos", 1000, 1, 1.0), ("cos", 1200, 1, 0.690983), ("cos", 1500, 1, 0.3),
        ("cos", 2500, 1, 0.3), ("cos", 500, 0, 0.0), ("cos", 1200, 0, -0.309017), ("cos", 1500, 0, -0.707107),
        ("cos", 2500, 0, -1.0), ("linear", 500, 1, 1.5), ("linear", 1050, 1, 1.0), ("linear", 1300, 1, 0.8),
        ("linear", 1900, 1, 0.3), ("linear", 500, 0, 0.0), ("linear", 1300, 0, -0.2), ("linear", 2500, 0, -1.0),
    ],
)  # fmt: skip
def test_reward_by_hand(shape, length, correct, expected):
    assert reward(length, correct, shape) == pytest.approx(expected, abs=1e-6)
    assert reward(length, correct, shape, h=math.inf) == correct, "no history, no length reward"


@pytest.mark.parametrize("shape", ["cos", "linear"])
def test_every_right_answer_is_above_every_wrong_one(shape):
    lengths = range(1, 60)
    right, wrong = ([reward(n, c, shape, h=10.0) for n in lengths] for c in (1, 0))
    assert min(right) == pytest.approx(0.3) and max(wrong) == 0


def test_repeated_tokens_by_hand():
    assert -0.5 * hapo.repeated_share([1, 2, 3, 1, 2, 3, 4], 3) == pytest.approx(-0.214286, abs=1e-6)
    assert hapo.repeated_share([7, 7, 7, 7], 3) == 0.75, "a copy may overlap the first"
    assert hapo.repeated_share([1, 2], 3) == 0 and hapo.repeated_share([], 3) == 0


def test_group_by_hand_reads_the_history_before_it_writes():
    ctx = context("hapo", "--pool", "4")
    case = graded([[1.0, 1.0, 0.0, 0.0]], [[800, 1300, 600, 1600]])
    key = "problem 0\n0"
    ctx.memory.of[key] = [1000.0, 1.0]
    judged = ALGO.judge(ctx, case)
    assert judged.reward.tolist() == pytest.approx([1.309017, 0.546010, 0, -0.809017], abs=1e-5)
    got = ALGO.advantage(ctx, judged).tolist()
    assert got == pytest.approx([1.172829, 0.318543, -0.292786, -1.198586], abs=1e-5)
    assert ctx.memory.of[key] == [800.0, 3.0]
    assert ctx.metrics["hapo/known"] == 1
    # a new problem: plain rewards, then a history; wrong answers never enter it
    fresh = context("hapo", "--pool", "4")
    assert ALGO.judge(fresh, case).reward.tolist() == [1, 1, 0, 0] and fresh.memory.of[key] == [800.0, 2.0]
    none = graded([[0.0, 0.0]], [[5, 6]])
    fresh = context("hapo", "--pool", "4")
    ALGO.judge(fresh, none)
    assert fresh.memory.of == {}


def test_mean_of_the_right_lengths():
    ctx = context("hapo", "--pool", "4", "--history", "mean")
    ALGO.judge(ctx, graded([[1.0, 1.0, 0.0]], [[10, 20, 3]]))
    ALGO.judge(ctx, graded([[1.0, 0.0, 0.0]], [[60, 3, 3]]))
    assert ctx.memory.of["problem 0\n0"] == pytest.approx([30.0, 3.0])


def test_weights_of_the_parts_and_format_rewards():
    ctx = context("hapo", "--pool", "4", "--length-weight", "0.5", "--rep-penalty", "-0.5")
    ctx.memory.of["problem 0\n0"] = [4.0, 1.0]
    case = graded([[1.0, 0.1]], [[2, 6]])  # ids count on: nothing repeats; the reward of the form does not count
    assert ALGO.judge(ctx, case).reward.tolist() == pytest.approx(
        [1 + 0.5 * math.cos(math.pi / 4), 0.5 * math.cos(1.5 * math.pi / 2)], abs=1e-6
    )
    ctx.memory.of.clear()
    case.rollout.ids[1:3] = torch.tensor([7, 7])
    case.rollout.ids[4:] = 9  # six times: all but the first lie in a copy
    assert ALGO.judge(ctx, case).reward.tolist() == pytest.approx([1.0, -0.5 * 5 / 6], abs=1e-6)


def test_the_pool_comes_again_in_another_order_with_other_samples():
    ctx = context("hapo", "--pool", "6", "--samples-per-prompt", "2")
    uids, orders = [], []
    for _ in range(3):  # 12 places: two epochs, the second draw across both
        prompts = ALGO.draw(ctx, 4)
        orders += [p.uid for p in prompts.problems]
        uids += ALGO.rollout(ctx, prompts, ctx.draws).uid.tolist()
    assert sorted(orders[:6]) == sorted(orders[6:]) == list(range(6)) and orders[:6] != orders[6:]
    assert sorted(uids) == [(uid << 16) + i for uid in range(6) for i in range(4)]
    assert ctx.at.cursor == 12
    stream = context("hapo", "--pool", "0")
    assert [p.uid for p in ALGO.draw(stream, 4).problems] == [0, 1, 2, 3]


def test_state_survives():
    ctx, other = context("hapo", "--pool", "4"), context("hapo", "--pool", "4")
    ALGO.judge(ctx, graded([[1.0, 0.0]], [[7, 3]]))
    other.memory.load_state_dict(copy.deepcopy(ctx.memory.state_dict()))
    case = graded([[1.0, 0.0]], [[5, 14]])
    assert ALGO.judge(other, case).reward.tolist() == ALGO.judge(ctx, case).reward.tolist() != [1, 0]


def test_gradient_through_the_model_equals_the_equations_in_float64():
    policy = tiny_policy(seed=3)
    ctx = context("hapo", "--pool", "4", "--clip-high", "0.1", "--temperature", "0.9", policy=policy)
    ctx._reference = {ctx.train.model: tiny_policy(seed=4)}
    reward = torch.tensor([1.0, 0.0, 0.3, 0.0, 1.0, -0.5, 0.0, 1.7])
    batch = make_batch(ctx, with_rewards(sampled(policy), reward))
    move(policy)

    def equations(rows):
        total = rows[0].logp.new_zeros(())
        for r in rows:
            gain = torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.1) * r.advantage)
            d = r.extra["ref_logp"] - r.logp
            total = total + (0.04 * (d.exp() - d - 1) - gain).sum()
        return total / sum(len(r.logp) for r in rows)

    check_gradient(ctx, batch, equations)


def test_run_cut_in_two_gives_the_same_bits(tmp_path):
    metrics = assert_resume_gives_the_same_bits(tmp_path, "hapo", "--pool", "10")
    assert metrics[0]["hapo/known"] == 0 and metrics[-1]["hapo/known"] > 0
    assert any(m["hapo/extra_reward"] != 0 for m in metrics)
