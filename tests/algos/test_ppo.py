"""PPO: advantages and returns by the worked numbers, the value loss, and a critic that learns and survives a resume."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pymathrl.algos import REGISTRY, ppo
from pymathrl.checkpoint import hash_parameters, load_state
from pymathrl.learner import CriticLearner
from pymathrl.optim import StepReport
from pymathrl.train import main, plan_memory
from tests.algos.cases import check_gradient, context, graded, make_batch, move, ragged, sampled, with_rewards
from tests.tiny import SMALL_RUN, read_metrics, tiny_policy

VALUES = torch.tensor([0, 0.2, 0.5, 0.6])  # of one response of three tokens behind a prompt of one
MANY = ("--samples-per-prompt", "4")


def worked(reward=1.0):
    return graded([[reward]], [[3]], extra={"value": VALUES})


def test_worked_numbers():
    ctx, of = context("ppo", memory=False), worked()
    found = ppo.estimate(ctx, of)
    assert found.advantage.tolist() == pytest.approx([0, 0.756, 0.48, 0.4], abs=1e-6)
    assert found.returns.tolist() == pytest.approx([0, 0.956, 0.98, 1.0], abs=1e-6)
    batch = make_batch(ctx, of)
    assert batch.advantage.tolist() == pytest.approx([0, 1.127910, -0.349795, -0.778115], abs=1e-5)
    assert torch.equal(batch.extra["returns"], found.returns), "before whitening"


class Fixed:
    """A critic that says `says`, and hands out the loss instead of taking a step."""

    def __init__(self, says):
        self.says = says.requires_grad_()

    def update(self, rollout, loss):
        at = rollout.sampled_mask.nonzero()[:, 0]
        total = loss(at[:1], self.says[:1]) + loss(at[1:], self.says[1:])  # two micro-batches
        total.backward()
        return float(total.detach()), StepReport(0.0, 0.0, True)


@pytest.mark.parametrize("clip, loss, slope, clipped", [
    # values 0.5, 0.5, 0.9 of old ones 0.2, 0.5, 0.6: bounded to 0.4, 0.5, 0.8, whose arm is the larger at both ends
    ("0.2", (0.556**2 + 0.48**2 + 0.2**2) / 6, [0, -0.48 / 3, 0], 2 / 3),
    ("0.5", (0.456**2 + 0.48**2 + 0.1**2) / 6, [-0.456 / 3, -0.48 / 3, -0.1 / 3], 0),
    ("0", (0.456**2 + 0.48**2 + 0.1**2) / 6, [-0.456 / 3, -0.48 / 3, -0.1 / 3], None),
])  # fmt: skip
def test_value_loss_of_the_worked_numbers(clip, loss, slope, clipped):
    ctx = context("ppo", "--value-clip", clip, "--vf-coef", "0.25", memory=False)
    batch = make_batch(ctx, worked())
    ctx.memory = type("Memory", (), {"critic": Fixed(torch.tensor([0.5, 0.5, 0.9]))})()
    metrics = ppo.learn(ctx, batch)
    if clip == "0.2":
        assert loss == pytest.approx(0.096589, abs=1e-6)
    assert metrics["critic/loss"] == pytest.approx(0.25 * loss, abs=1e-6)
    assert ctx.memory.critic.says.grad.tolist() == pytest.approx([0.25 * s for s in slope], abs=1e-6)
    assert metrics.get("critic/clipped") == (clipped if clipped is None else pytest.approx(clipped))


def test_kl_of_each_token_is_taken_off_its_reward():
    """lambda 1: the advantage of a token is all that comes from it on, less its value."""
    of = worked()
    of.extra["kl_penalty"] = torch.tensor([0, 0.1, 0.2, 0.4])
    ctx = context("ppo", "--gae-lambda", "1", "--kl", "k1", "--kl-in", "reward", memory=False)
    expected = [0, 1 - 0.7 - 0.2, 1 - 0.6 - 0.5, 1 - 0.4 - 0.6]
    assert ppo.estimate(ctx, of).advantage.tolist() == pytest.approx(expected, abs=1e-6)


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert ppo.explained_variance(returns, returns) == 1
    assert ppo.explained_variance(torch.full((4,), 0.3), returns) == pytest.approx(0)
    assert ppo.explained_variance(1 - returns, returns) == pytest.approx(-3)
    assert ppo.explained_variance(returns, torch.ones(4)) == 0


def case(*flags, policy=None):
    """A context and the graded responses of 4, with forced tokens in some of them."""
    policy = policy or tiny_policy(seed=3)
    ctx = context("ppo", "--temperature", "0.9", "--critic-lr", "3e-3", *MANY, *flags, policy=policy)
    with torch.no_grad():
        vector = ctx.memory.critic.model.value
        vector.copy_(0.3 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(1)))
    of = with_rewards(ragged(sampled(policy)), torch.tensor([1.0, 0, 0, 1, 0, 0.1, 0.1, 1]))
    return ctx, ppo.judge(ctx, of)


@pytest.mark.parametrize("budget", [10_000, 40])
def test_gradient_through_the_model(budget):
    ctx, of = case()
    batch = make_batch(ctx, of)
    assert batch.advantage[of.rollout.sampled_mask].unique().numel() > 50, "one per token"
    assert not batch.advantage.requires_grad and not batch.advantage[~of.rollout.sampled_mask].any()
    move(ctx.policy)

    def equations(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage) for r in rows]
        return -torch.cat(terms).mean()

    check_gradient(ctx, batch, equations, budget)


def test_advantages_do_not_depend_on_the_order_of_groups():
    ctx, of = case()
    turned = of.select_groups([1, 0])
    own = lambda g: REGISTRY["ppo"].advantage(ctx, g)
    at = of.rollout.row_of_token >= 4
    expected = torch.cat([own(of)[at], own(of)[~at]])
    torch.testing.assert_close(own(turned), expected, rtol=1e-5, atol=1e-6)


def test_advantages_do_not_see_forced_tokens():
    ctx, of = case()
    forced = ~of.rollout.sampled_mask
    other = replace(of, extra={"value": torch.where(forced, 99.0, of.extra["value"])})
    assert torch.equal(REGISTRY["ppo"].advantage(ctx, of), REGISTRY["ppo"].advantage(ctx, other))


def test_the_critic_learns_from_the_minibatches_and_the_policy_is_left_alone():
    ctx, of = case("--value-clip", "0", "--vf-coef", "1")
    batch = make_batch(ctx, of)
    before = copy.deepcopy(ctx.policy.model.state_dict())
    losses = [ppo.learn(ctx, batch)["critic/loss"] for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    after = ppo.judge(ctx, of)
    mask = of.rollout.sampled_mask
    spread = [ppo.explained_variance(g.extra["value"][mask], batch.extra["returns"][mask]) for g in (of, after)]
    assert spread[0] < 0.2 < 0.7 < spread[1]
    assert all(torch.equal(v, before[k]) for k, v in ctx.policy.model.state_dict().items())


def test_memory_goes_on_to_the_same_bits_and_follows_the_stage():
    ctx, of = case()
    batch = make_batch(ctx, of)
    ppo.learn(ctx, batch)
    state = copy.deepcopy(ctx.memory.state_dict())
    first = [ppo.learn(ctx, batch) for _ in range(3)]
    ctx.memory.load_state_dict(state)
    assert [ppo.learn(ctx, batch) for _ in range(3)] == first
    critic = ctx.memory.critic
    assert critic.optimizer.learning_rate() == 3e-3 and critic.optimizer.updates == 4
    ctx.at.stage, ctx.run = 1, replace(ctx.run, own=replace(ctx.own, critic_lr=1e-4))
    ppo.judge(ctx, of)
    assert critic.optimizer.learning_rate() == 1e-4 and critic.optimizer.updates == 0
    ppo.learn(ctx, batch)
    ppo.judge(ctx, of)
    assert critic.optimizer.updates == 1, "once per stage"


def test_the_critics_rate_follows_the_policys_within_bounds():
    assert ppo.rate(context("ppo", "--lr", "1e-6", memory=False)) == pytest.approx(1e-5)
    assert ppo.rate(context("ppo", "--lr", "4e-4", memory=False)) == 1e-3
    assert ppo.rate(context("ppo", "--lr", "4e-4", "--critic-lr", "0.5", memory=False)) == 0.5


def test_the_memory_plan_has_room_for_the_critic():
    ctx = context("ppo", memory=False)
    alone, both = (plan_memory(ctx.train, ctx.policy, torch.device("cpu"), n) for n in (0, 1))
    owned = sum(p.numel() for p in CriticLearner(ctx.policy, ctx.train, updates=1).model.parameters())
    assert 16 * owned <= both.update - alone.update <= 16 * 1.2 * owned  # weights, gradients and two moments


def test_a_run_resumes_to_the_same_bits(tmp_path, capsys):
    """On the built-in model, which earns rewards."""
    argv = ["--algo", "ppo", *SMALL_RUN, "--samples-per-prompt", "1", "--prompts-per-step", "8", "--epochs", "2",
            "--max-new-tokens", "64", "--checkpoint-every", "2", "--eval-every", "0"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*argv, "--steps", "4", "--out", str(whole)]) == 0, capsys.readouterr().err
    assert main([*argv, "--steps", "2", "--out", str(cut)]) == 0
    assert main(["--resume", str(cut), "--steps", "4"]) == 0
    rows = [[m for m in read_metrics(run) if "loss" in m] for run in (whole, cut)]
    for name in ("loss", "critic/loss", "critic/value", "critic/explained_variance", "critic/grad_norm"):
        assert [m[name] for m in rows[0]] == [m[name] for m in rows[1]], name
    assert rows[0][0]["critic/value"] == 0 != rows[0][3]["critic/value"]
    weights = [load_file(run / "checkpoints/step-4/model.safetensors") for run in (whole, cut)]
    assert hash_parameters(weights[0].items()) == hash_parameters(weights[1].items())
    states = [load_state(run / "checkpoints/step-4")["memory"]["critic"] for run in (whole, cut)]
    assert all(torch.equal(v, states[1]["weights"][k]) for k, v in states[0]["weights"].items())
    assert states[0]["optimizer"]["updates"] == states[1]["optimizer"]["updates"] == 16
