"""Token Hidden Reward and NTHR: numbers worked by hand, the double sum of the definition, and the update."""

import dataclasses

import pytest
import torch

from pymathrl.algos.thr import Config, scores, weights
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move, plain_rows, sampled, with_rewards
from tests.models.plain import plain_hidden
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy

# two right responses, of 2 and 1 tokens, and a wrong one of 2; V = 3, D = 2
TOKENS = torch.tensor([0, 1, 0, 0, 2])
PROBS = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])
HIDDEN = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [1.0, 0.0], [0.2, -0.2]])
ROW, RIGHT = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([True, True, False])
ADVANTAGE = torch.tensor([0.577349, 0.577349, 0.577349, -1.154699, -1.154699])


def by_hand(mode, p=0.0, beta=1.0):
    errors = torch.nn.functional.one_hot(TOKENS, 3) - PROBS
    score, least = scores(errors, HIDDEN, ROW, RIGHT, by_length=mode == "thr")
    config = Config(thr_mode=mode, thr_p=p, thr_beta=beta)
    return score, least, ADVANTAGE * weights(score, least, RIGHT[ROW], 2 / 3, config)


def test_scores_and_weights_of_the_worked_example():
    score, least, _ = by_hand("thr")
    torch.testing.assert_close(score, torch.tensor([0.44, -0.015, 0.5875, 0.44, -0.058]), atol=1e-6, rtol=0)
    assert least.item() == pytest.approx(0.2125, abs=1e-6)
    for p, expected in (
        (0.0, [0.577349, 0, 0.577349, -1.154699, 0]),
        (0.1, [0.635084, 0, 0.635084, -1.039229, 0]),
        (-0.1, [0.519614, 0, 0.519614, -1.270168, 0]),
    ):
        assert by_hand("thr", p)[2].tolist() == pytest.approx(expected, abs=1e-5)
    # beta 0: every token of nonzero score stays, raised or lowered by its sign
    assert by_hand("thr", 0.1, beta=0.0)[2].tolist() == pytest.approx(
        [0.635084, 0.519614, 0.635084, -1.039229, -1.270168], abs=1e-5
    )


def test_nthr_tempers_only_wrong_tokens_above_the_threshold():
    score, least, scaled = by_hand("nthr")
    assert score[3:].tolist() == pytest.approx([0.57, -0.082], abs=1e-6) and least.item() == pytest.approx(0.3125)
    assert scaled.tolist() == pytest.approx([0.577349, 0.577349, 0.577349, -0.384900, -1.154699], abs=1e-5)


def test_one_right_response_of_one_token_is_its_own_threshold():
    """s = |g|^2 |h|^2 = tau exactly: not above it, so cut; the definition says >."""
    score, least = scores(torch.tensor([[0.5, -0.5]]), torch.tensor([[2.0]]), torch.tensor([0]), RIGHT[:1], True)
    assert score.tolist() == [2.0] and least.item() == 2.0
    assert weights(score, least, RIGHT[:1], 1.0, Config()).tolist() == [0.0]


def plain_tokens(ctx, rollout):
    """(row, g, h) of every sampled token, through the plain model in float64."""
    policy = ctx.policy
    weights64 = {n: p.detach().double() for n, p in policy.model.named_parameters()}
    batch = make_batch(context("grpo", policy=policy), with_rewards(rollout, torch.zeros(rollout.rows)))
    tokens = []
    for number, row in enumerate(plain_rows(policy, weights64, batch, ctx.train.temperature)):
        mask = rollout.sampled_mask[rollout.offsets[number] : rollout.offsets[number + 1]]
        ids = rollout.ids[rollout.offsets[number] : rollout.offsets[number + 1]]
        hidden = plain_hidden(policy.config, weights64, ids[:-1])[mask.nonzero()[:, 0] - 1]
        g = torch.nn.functional.one_hot(ids[mask], row.log_probs.shape[1]) - row.log_probs.exp()
        tokens += [(number, g[i], hidden[i]) for i in range(len(g))]
    return tokens


@pytest.mark.parametrize("mode", ["thr", "nthr"])
def test_weights_of_a_group_are_those_of_the_double_sum(mode):
    policy = tiny_policy(seed=3)
    ctx = context(
        "thr", "--thr-mode", mode, "--thr-p", "0.2", "--thr-beta", "0.1", "--temperature", "0.9", policy=policy
    )
    rollout = sampled(policy, groups=2)
    correct = torch.tensor([True, False, True, False, False, True, False, False])
    judged = ctx.run.algo.judge(ctx, with_rewards(rollout, correct.float()))
    tokens = plain_tokens(ctx, rollout)
    vocabulary = [rollout.ids[rollout.sampled_mask & (rollout.group[rollout.row_of_token] == p)].unique()
                  for p in range(2)]  # fmt: skip
    expected = []
    for row, g, h in tokens:
        group, total = row // 4, 0.0
        for other, g2, h2 in tokens:
            if other // 4 == group and correct[other]:
                length = sum(o == other for o, _, _ in tokens)
                cut = vocabulary[group]
                total += float((g[cut] @ g2[cut]) * (h @ h2)) / (length if mode == "thr" else 1)
        expected.append(total)
    values = torch.tensor(expected)
    rows = torch.tensor([row for row, _, _ in tokens])
    got = judged.extra["thr_weight"][rollout.sampled_mask]
    for group in range(2):
        own = rows // 4 == group
        tau = 0.1 * min(float(values[rows == r].mean()) for r in range(4 * group, 4 * group + 4) if correct[r])
        accuracy = float(correct[4 * group : 4 * group + 4].float().mean())
        if mode == "nthr":
            want = torch.where(~correct[rows] & (values > tau), 2 * abs(0.5 - accuracy), 1.0)
        else:
            signed = torch.where(correct[rows], values, -values)
            want = torch.where(signed.abs() > tau, 1 + 0.2 * signed.sign(), 0.0)
        torch.testing.assert_close(got[own], want[own])
    assert got.unique().numel() >= 2  # something was weighed


def test_groups_of_one_outcome_are_left_alone():
    ctx = context("thr")
    rewards = [[0.1, 0.0, 0.1, 0.0], [1.0, 1.0, 1.0, 1.0]]
    judged = ctx.run.algo.judge(ctx, graded(rewards))
    assert bool((judged.extra["thr_weight"] == 1).all())
    assert ctx.train.filter == "mixed"


def test_gradient_is_that_of_the_clipped_loss_with_constant_weights():
    policy = tiny_policy(seed=3)
    ctx = context("thr", "--temperature", "0.9", "--thr-p", "-0.3", policy=policy)
    reward = torch.tensor([1.0, 0.1, 0.0, 1.0, 0.0, 0.1, 0.1, 1.0])
    judged = ctx.run.algo.judge(ctx, with_rewards(sampled(policy), reward))
    batch = make_batch(ctx, judged)
    plain = make_batch(context("grpo", policy=policy), judged)
    torch.testing.assert_close(batch.advantage, plain.advantage * judged.extra["thr_weight"])
    assert not torch.equal(batch.advantage, plain.advantage)
    move(policy)

    def loss(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage).mean() for r in rows]
        return -torch.stack(terms).mean()

    check_gradient(ctx, batch, loss)


def test_weights_of_one_are_grpo_bit_for_bit():
    policy = tiny_policy(seed=3)
    ctx = context("thr", policy=policy)
    with_ones = with_rewards(sampled(policy), torch.tensor([1.0, 0.1, 0.0, 1.0, 0.0, 0.1, 0.1, 1.0]))
    with_ones = dataclasses.replace(with_ones, extra={"thr_weight": torch.ones_like(with_ones.rollout.logp)})
    assert torch.equal(make_batch(ctx, with_ones).advantage,
                       make_batch(context("grpo", policy=policy), with_ones).advantage)  # fmt: skip


def test_a_short_run(tmp_path):
    out = tmp_path / "run"
    argv = ["--algo", "thr", "--thr-mode", "nthr", "--model", str(save_tiny(tmp_path / "model")), "--steps", "2",
            "--filter", "off", "--out", str(out), *SMALL_RUN]  # fmt: skip
    assert main(argv) == 0
    assert len([m for m in read_metrics(out) if "loss" in m]) == 2
