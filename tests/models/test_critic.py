"""The critic against plain torch in float64, the independence of its rows, and its learner."""

import copy
from dataclasses import replace

import pytest
import torch

from pymathrl.config import TrainConfig
from pymathrl.learner import CriticLearner
from pymathrl.models import Critic
from pymathrl.ops.gae import value_loss
from tests.algos.cases import ragged, sampled
from tests.models.plain import plain_hidden
from tests.tiny import tiny_policy

OPTIONS = replace(TrainConfig(), lr=1e-2, tokens_per_microbatch=10_000)


def learner(policy, **options):
    """With a value vector that is not 0."""
    made = CriticLearner(policy, replace(OPTIONS, **options), updates=100)
    with torch.no_grad():
        made.model.value.copy_(torch.randn(made.model.value.shape, generator=torch.Generator().manual_seed(1)))
    return made


def plain_values(policy, weights, rollout):
    """[(index of the sampled token, its value)]: every row alone."""
    found = []
    for begin, end in zip(rollout.offsets.tolist(), rollout.offsets.tolist()[1:], strict=False):
        hidden = plain_hidden(policy.config, weights, rollout.ids[begin : end - 1])
        for at in range(begin + 1, end):
            if rollout.role[at] == 1:
                found.append((at, hidden[at - begin - 1] @ weights["value"]))
    return found


def double_weights(made, policy):
    named = {n.removeprefix("trunk."): p.detach().double().requires_grad_() for n, p in made.model.named_parameters()}
    return {**named, "head": policy.model.head_weight.detach().double()}


@pytest.mark.parametrize("tie", [False, True])
def test_a_new_critic_says_zero_and_shares_no_weight_with_the_policy(tie):
    policy = tiny_policy(tie=tie)
    made = CriticLearner(policy, OPTIONS, updates=1)
    assert not made.values(sampled(policy)).any()
    assert made.model.trunk.head is None
    owned = {p.data_ptr() for p in policy.model.parameters()}
    for name, p in made.model.trunk.named_parameters():
        assert torch.equal(p, policy.model.get_parameter(name)) and p.data_ptr() not in owned
        assert p.requires_grad
    made.model.trunk.embed.data.add_(1)
    assert not torch.equal(made.model.trunk.embed, policy.model.embed)


def test_a_critic_of_low_precision_layers_has_fp32_values():
    model = copy.deepcopy(tiny_policy().model).to(torch.bfloat16)
    critic = Critic.like(model)
    assert critic.trunk.dtype == torch.bfloat16 and critic.value.dtype == torch.float32


def test_values_are_those_of_the_states_before_the_tokens():
    policy = tiny_policy(seed=3)
    made, rollout = learner(policy), ragged(sampled(policy))
    got = made.values(rollout)
    expected = torch.zeros(rollout.tokens, dtype=torch.float64)
    for at, value in plain_values(policy, double_weights(made, policy), rollout):
        expected[at] = value.detach()
    assert (expected != 0).sum() == rollout.sampled_mask.sum()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    shifted = torch.roll(expected, 1)  # the value of the state after the token
    assert (shifted - got)[rollout.sampled_mask].abs().max() > 0.05


def test_a_value_follows_from_its_row_alone_to_the_last_bit():
    policy = tiny_policy(seed=3)
    made, rollout = learner(policy), ragged(sampled(policy))
    whole = made.values(rollout)
    made.config = replace(made.config, tokens_per_microbatch=1)
    assert torch.equal(made.values(rollout), whole)
    assert torch.equal(made.values(rollout.select([5])), whole[rollout.row_of_token == 5])


@pytest.mark.parametrize("budget", [10_000, 40])
def test_update_steps_along_the_gradient_of_the_value_loss(budget):
    policy = tiny_policy(seed=3)
    made, rollout = learner(policy, tokens_per_microbatch=budget, max_grad_norm=0.0), ragged(sampled(policy))
    mask = rollout.sampled_mask
    generator = torch.Generator().manual_seed(2)
    old = made.values(rollout) + 0.3 * torch.randn(mask.shape, generator=generator)
    returns, coef = torch.randn(mask.shape, generator=generator), mask / mask.sum()
    weights = double_weights(made, policy)
    total = torch.zeros((), dtype=torch.float64)
    for at, v in plain_values(policy, weights, rollout):
        o, r = old[at].double(), returns[at].double()
        total = total + 0.5 * torch.maximum((v - r) ** 2, (v.clamp(o - 0.2, o + 0.2) - r) ** 2)
    expected = total / mask.sum()
    expected.backward()
    seen = {}
    made.optimizer.step = lambda finite: seen.update(
        {n.removeprefix("trunk."): p.grad.clone() for n, p in made.model.named_parameters()}
    )
    loss, _ = made.update(rollout, lambda at, v: value_loss(v, old[at], returns[at], coef[at], clip=0.2))
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert set(seen) == set(weights) - {"head"}
    for name, got in seen.items():
        want = weights[name].grad
        assert float((got.double() - want).norm() / want.norm()) < 1e-4, name


def test_a_learner_fits_returns_and_goes_on_to_the_same_bits():
    policy = tiny_policy(seed=3)
    rollout = sampled(policy)
    mask, returns = rollout.sampled_mask, rollout.per_token(torch.arange(8.0) / 8)
    fit = lambda at, v: (v - returns[at]).square().sum() / mask.sum()
    one, two = (CriticLearner(policy, replace(OPTIONS, lr=3e-3), updates=60) for _ in range(2))
    losses = [one.update(rollout, fit)[0] for _ in range(20)]
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    losses += [one.update(rollout, fit)[0] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]
    again = [two.update(rollout, fit)[0] for _ in range(40)]
    assert again == losses[20:] and torch.equal(one.values(rollout), two.values(rollout))


def test_a_loss_that_is_not_finite_changes_nothing():
    policy = tiny_policy(seed=3)
    made, rollout = learner(policy), ragged(sampled(policy))
    before = copy.deepcopy(made.model.state_dict())
    _, step = made.update(rollout, lambda at, v: v.sum() * torch.nan)
    assert not step.applied
    assert all(torch.equal(v, before[k]) for k, v in made.model.state_dict().items())
