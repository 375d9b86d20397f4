"""MGPO: the weight, long2short and the loss by their numbers; lambda 0 is GRPO."""

import pytest
import torch

from pymathrl.algos import REGISTRY, mgpo
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.algos.runs import short_run
from tests.tiny import tiny_policy

ALGO = REGISTRY["mgpo"]


def test_weight_by_hand():
    p = torch.tensor([0.125, 0.25, 0.375, 0.5, 0.0, 1.0])
    expected = {1: [0.728785, 0.877383, 0.968910, 1, 0.5, 0.5], 4: [0.282096, 0.592593, 0.881319, 1, 0.0625, 0.0625]}
    for sharpness, numbers in expected.items():
        assert mgpo.weight(p, sharpness, 0.5).tolist() == pytest.approx(numbers, abs=1e-5)
    assert mgpo.weight(p, 2.0, 0.25).argmax() == 1, "largest at p0"


def test_advantage_by_hand_counts_right_answers_and_not_rewards():
    ctx = context("mgpo", "--mgpo-lambda", "4")
    got = ALGO.advantage(ctx, graded([[1.0] + [0.0] * 7])).tolist()
    assert got == pytest.approx([0.698150] + [-0.099736] * 7, abs=1e-5)
    # rewards 0.1 for the form: the same weight
    shaped = graded([[1.0] + [0.1] * 7])
    assert ALGO.advantage(ctx, shaped).tolist() == pytest.approx(got, abs=1e-5)
    two = ALGO.advantage(ctx, graded([[1.0] + [0.0] * 7, [1.0, 0.0, 0.0, 1.0]]))
    assert two[:8].tolist() == pytest.approx(got, abs=1e-6)
    assert two[8:].tolist() == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=1e-5)


def test_without_sharpness_it_is_grpo_bit_for_bit():
    case = graded([[1.0, 0.1, 0.0, 0.0], [0.1, 0.1, 1.0, 1.0]])
    ours, grpo = context("mgpo", "--mgpo-lambda", "0"), context("grpo")
    assert ALGO.advantage(ours, case).equal(REGISTRY["grpo"].advantage(grpo, case))
    assert ALGO.loss(ours.own).form == "clip" and ALGO.loss(ours.own).aggregation == "seq-mean-token-mean"


def test_long2short_by_hand():
    ctx = context("mgpo", "--long2short", "0.2")
    rewards = [[1.0, 1.0, 1.0, 0.0], [1.0, 0.1, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    case = graded(rewards, [[100, 200, 400, 50], [5, 3, 5, 5], [1, 2, 3, 4]])
    got = ALGO.judge(ctx, case).reward.tolist()
    assert got == pytest.approx([1.2, 0.96, 0.84, 0.0, 1.0, 0.1, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0], abs=1e-6)
    assert got[4:8] == case.reward[4:8].tolist(), "equal lengths: exactly as it was"
    assert sum(got[:3]) == pytest.approx(3.0, abs=1e-6)
    assert ALGO.judge(context("mgpo"), case) is case


def test_gradient_through_the_model_equals_the_equations_in_float64():
    policy = tiny_policy(seed=3)
    ctx = context("mgpo", "--mgpo-lambda", "4", "--temperature", "0.9", "--clip-high", "0.1", policy=policy)
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    batch = make_batch(ctx, with_rewards(sampled(policy), reward))
    move(policy)

    def equations(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.1) * r.advantage).mean() for r in rows]
        return -torch.stack(terms).mean()

    check_gradient(ctx, batch, equations)


def test_a_short_run(tmp_path):
    metrics = short_run(tmp_path / "run", "mgpo", "--long2short", "0.2")
    assert len(metrics) == 2 and 0.5 <= metrics[0]["mgpo/weight"] <= 1
