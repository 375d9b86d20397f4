"""The two records, by their papers' equations, on numbers worked by hand and through the real model."""

import dataclasses

import pytest
import torch

from pymathrl.advantage import advantage
from pymathrl.algos import REGISTRY
from pymathrl.errors import UserError
from pymathrl.loss import minibatch_loss
from pymathrl.rollout import Engine
from tests.models.plain import plain_hidden
from tests.tiny import tiny_policy

REWARD = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1])
OFFSETS = torch.tensor([0, 4, 8, 12])
TOKENS = torch.ones(12, dtype=torch.int64)


def test_rover_advantage_is_centred_and_unscaled():
    algo = REGISTRY["rover"]
    got = algo.advantage(REWARD, OFFSETS, TOKENS, algo.config())
    assert got.advantage.tolist() == [0.5, -0.5, -0.5, 0.5, 0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert got.equal.tolist() == [False, False, True]
    scaled = algo.advantage(REWARD, OFFSETS, TOKENS, algo.config(adv_scale="group_std")).advantage
    assert scaled[:5].tolist() == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024, 1.499997], abs=1e-5)


def test_grpo_advantage_is_divided_by_the_unbiased_std():
    algo = REGISTRY["grpo"]
    got = algo.advantage(REWARD, OFFSETS, TOKENS, algo.config()).advantage
    assert got[:5].tolist() == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024, 1.499997], abs=1e-5)
    assert got[8:].tolist() == [0, 0, 0, 0]
    plain = algo.advantage(REWARD, OFFSETS, TOKENS, algo.config(adv_scale="none")).advantage
    assert plain[4:8].tolist() == [0.75, -0.25, -0.25, -0.25]


def rover_equations(x, a, m_new, m_old, last, rho, beta):
    """Sum over tokens of the squared residual, in float64; x = log pi - log pi_old, one row per token."""
    nxt = torch.zeros_like(x)
    nxt[:-1] = rho * (m_new[1:] - m_old[1:])
    target = a + beta * torch.where(last, 0.0, nxt)
    return (rho * x - target.detach()).square().sum()


def rover_response_equations(x, a, rows, rho):
    """The share of one response in the mean over responses of (mean Q - A)^2."""
    return (rho * x.mean() - a[0]).square() / rows


def grpo_equations(x, a, lengths, rows, low, high):
    ratio = x.exp()
    objective = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return -(objective / lengths).sum() / rows


@pytest.mark.parametrize("name", ["rover", "rover over responses", "grpo"])
@pytest.mark.parametrize("budget", [10_000, 40])
def test_gradient_through_the_model_equals_the_equations_in_float64(name, budget):
    """The whole path (packing, micro-batches, fused head, kernels) against the paper's equations under autograd."""
    policy = tiny_policy(seed=3)
    algo = REGISTRY[name.split()[0]]
    config = algo.config(**{
        "rover": {"rho": 0.7, "beta": 0.8},
        "rover over responses": {"rho": 0.7, "rover_level": "response"},
        "grpo": {"clip_low": 0.1, "clip_high": 0.15},
    }[name])  # fmt: skip
    prompts = [policy.tokenizer.encode(text) for text in ("3 4 -> 7\n<think>", "12 5 9 -> 26\n<think>")]
    temperature = 0.9
    rollout = Engine(policy, seed=1).generate(prompts, 4, 10, temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the policy has moved since it sampled: ratios on both sides of the clip range
        for p in policy.model.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))
    reward = torch.tensor([1.0, 0.1, 0.0, 1.0, 0.0, 0.1, 0.1, 1.0])
    batch = advantage(rollout, reward, reward == 1, algo, config).batch
    spec = dataclasses.replace(algo.loss(config), idle_when_zero=False)
    report = minibatch_loss(
        policy.model, batch, range(8), spec, temperature=temperature, token_budget=budget, max_new_tokens=10
    )
    got = {n: p.grad.clone() for n, p in policy.model.named_parameters()}

    weights = {n: p.detach().double().requires_grad_() for n, p in policy.model.named_parameters()}
    mask = rollout.sampled_mask
    pieces = []
    for row in range(8):
        begin, end = rollout.offsets[row : row + 2].tolist()
        ids = rollout.ids[begin:end]
        hidden = plain_hidden(policy.config, weights, ids[:-1])
        logps = torch.log_softmax(hidden @ weights["head"].T / temperature, -1)
        first = int(rollout.prompt_len[row])
        own = logps[first - 1 :]
        chosen = own.gather(1, ids[first:, None])[:, 0]
        at = slice(begin + first, end)
        x = chosen - rollout.logp[at].double()
        a = batch.advantage[at].double()
        if name == "rover":
            last = torch.zeros(len(x), dtype=torch.bool)
            last[-1] = True
            mean = own.mean(-1)
            pieces.append(rover_equations(x, a, mean, rollout.mean_logp[at].double(), last, 0.7, 0.8) / mask.sum())
        elif name == "rover over responses":
            pieces.append(rover_response_equations(x, a, 8, 0.7))
        else:
            pieces.append(grpo_equations(x, a, len(x), 8, 0.1, 0.15))
    expected = torch.stack(pieces).sum()
    expected.backward()
    assert float(report.loss) == pytest.approx(expected.item(), rel=1e-5)
    for n, p in weights.items():
        worst = float((got[n].double() - p.grad).norm() / p.grad.norm())
        assert worst < 2e-5, (n, worst)


@pytest.mark.parametrize("other", [{"beta": 0.5}, {"rover_clip": 0.2}])
def test_rover_over_responses_refuses_what_it_does_not_read(other):
    algo = REGISTRY["rover"]
    with pytest.raises(UserError, match="reads neither --beta nor --rover-clip"):
        algo.loss(algo.config(rover_level="response", **other))


def test_first_rover_update_is_twice_reinforce():
    """At the first step of a batch pi = pi_old, so dL/dlogp = -2 A / N."""
    policy = tiny_policy(seed=5)
    algo = REGISTRY["rover"]
    rollout = Engine(policy).generate([policy.tokenizer.encode("1 2 -> 3\n<think>")], 4, 6)
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0])
    batch = advantage(rollout, reward, reward == 1, algo, algo.config()).batch
    options = dict(temperature=1.0, token_budget=1000, max_new_tokens=6)
    minibatch_loss(policy.model, batch, range(4), algo.loss(algo.config()), **options)
    rover = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    reinforce = dataclasses.replace(algo.loss(algo.config()), form="weighted", terms={})
    minibatch_loss(policy.model, batch, range(4), reinforce, **options)
    plain = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    torch.testing.assert_close(rover, 2 * plain, rtol=1e-3, atol=1e-6)
