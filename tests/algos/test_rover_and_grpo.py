"""The two records, by their papers' equations, on numbers worked by hand and through the real model."""

import dataclasses

import pytest
import torch

from pymathrl.advantage import advantage
from pymathrl.algos import REGISTRY
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from pymathrl.loss import minibatch_loss
from pymathrl.rollout import Engine
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.tiny import tiny_policy

REWARDS = [[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.1] * 4]


def advantages(name, *flags):
    return REGISTRY[name].advantage(context(name, *flags), graded(REWARDS)).tolist()


def test_rover_advantage_is_centred_and_unscaled():
    assert advantages("rover") == [0.5, -0.5, -0.5, 0.5, 0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert graded(REWARDS).equal.tolist() == [False, False, True]
    scaled = advantages("rover", "--adv-scale", "group_std")
    assert scaled[:5] == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024, 1.499997], abs=1e-5)


def test_grpo_advantage_is_divided_by_the_unbiased_std():
    got = advantages("grpo")
    assert got[:5] == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024, 1.499997], abs=1e-5)
    assert got[8:] == [0, 0, 0, 0]
    assert advantages("grpo", "--adv-scale", "none")[4:8] == [0.75, -0.25, -0.25, -0.25]


def rover_equations(rho, beta):
    def loss(rows):
        total = rows[0].logp.new_zeros(())
        for r in rows:
            mean = r.log_probs.mean(-1)
            next_q = torch.zeros_like(r.logp)
            next_q[:-1] = rho * (mean[1:] - r.old_mean_logp[1:])
            target = (r.advantage + beta * next_q).detach()
            total = total + (rho * (r.logp - r.old_logp) - target).square().sum()
        return total / sum(len(r.logp) for r in rows)

    return loss


def rover_response_equations(rho):
    def loss(rows):
        return torch.stack([(rho * (r.logp - r.old_logp).mean() - r.advantage[0]).square() for r in rows]).mean()

    return loss


def grpo_equations(low, high):
    def loss(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(1 - low, 1 + high) * r.advantage) for r in rows]
        return -torch.stack([t.mean() for t in terms]).mean()

    return loss


@pytest.mark.parametrize(
    "name, flags, equations",
    [
        ("rover", ["--rho", "0.7", "--beta", "0.8"], rover_equations(0.7, 0.8)),
        ("rover", ["--rho", "0.7", "--rover-level", "response"], rover_response_equations(0.7)),
        ("grpo", ["--clip-low", "0.1", "--clip-high", "0.15"], grpo_equations(0.1, 0.15)),
    ],
)
@pytest.mark.parametrize("budget", [10_000, 40])
def test_gradient_through_the_model_equals_the_equations_in_float64(name, flags, equations, budget):
    policy = tiny_policy(seed=3)
    ctx = context(name, *flags, "--temperature", "0.9", policy=policy)
    reward = torch.tensor([1.0, 0.1, 0.0, 1.0, 0.0, 0.1, 0.1, 1.0])
    batch = make_batch(ctx, with_rewards(sampled(policy), reward))
    move(policy)
    check_gradient(ctx, batch, equations, budget)


@pytest.mark.parametrize("other", [["--beta", "0.5"], ["--rover-clip", "0.2"]])
def test_rover_over_responses_refuses_what_it_does_not_read(other):
    with pytest.raises(UserError, match="reads neither --beta nor --rover-clip"):
        parse_train(["--algo", "rover", "--rover-level", "response", *other])


def test_first_rover_update_is_twice_reinforce():
    """At the first step of a batch pi = pi_old, so dL/dlogp = -2 A / N."""
    policy = tiny_policy(seed=5)
    algo = REGISTRY["rover"]
    rollout = Engine(policy).generate([policy.tokenizer.encode("1 2 -> 3\n<think>")], 4, 6)
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0])
    batch = advantage(context("rover", policy=policy), with_rewards(rollout, reward))
    options = dict(temperature=1.0, token_budget=1000, max_new_tokens=6)
    minibatch_loss(policy.model, batch, range(4), algo.loss(algo.config()), **options)
    rover = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    reinforce = dataclasses.replace(algo.loss(algo.config()), form="weighted", terms={})
    minibatch_loss(policy.model, batch, range(4), reinforce, **options)
    plain = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    torch.testing.assert_close(rover, 2 * plain, rtol=1e-3, atol=1e-6)
