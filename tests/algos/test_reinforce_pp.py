"""REINFORCE++: returns whitened over tokens, by the numbers of its papers' codes."""

import pytest
import torch

from pymathrl.algos import REGISTRY
from pymathrl.algos.common import whiten
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move, ragged, sampled, with_rewards
from tests.algos.test_rover_and_grpo import grpo_equations
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy

LENGTHS = [[3, 2, 3, 1]]
GROUP = ("--samples-per-prompt", "4", "--rf-baseline", "group")


def sampled_values(name, of, *flags):
    return REGISTRY[name].advantage(context(name, *flags), of)[of.rollout.sampled_mask]


@pytest.mark.parametrize("flags", [(), GROUP])
def test_worked_numbers(flags):
    """R = 1, 0, 0, 1 of 3, 2, 3 and 1 tokens: mean 4/9 and unbiased variance 5/18 over nine tokens."""
    got = sampled_values("reinforce_pp", graded([[1.0, 0, 0, 1.0]], LENGTHS), *flags).tolist()
    high, low = 1.054093, -0.843274
    assert got == pytest.approx([high] * 3 + [low] * 5 + [high], abs=1e-5)


def test_one_response_per_prompt_and_whitening_across_prompts():
    together = sampled_values("reinforce_pp", graded([[1.0, 0, 0, 1.0]], LENGTHS))
    alone = sampled_values("reinforce_pp", graded([[1.0], [0.0], [0.0], [1.0]], [[3], [2], [3], [1]]))
    assert torch.equal(together, alone)


def test_the_baseline_is_the_groups_own():
    """Prompts of accuracy 1 and 1/2: without the baseline the first earns most, with it it earns nothing."""
    of = graded([[1.0, 1.0], [1.0, 0.0]])
    got = sampled_values("reinforce_pp", of, *GROUP[:1], "2", *GROUP[2:])
    assert got[:4].tolist() == pytest.approx([0.0] * 4, abs=1e-7)
    assert got[4:].tolist() == pytest.approx([0.5 / (1 / 7) ** 0.5] * 2 + [-0.5 / (1 / 7) ** 0.5] * 2, abs=1e-5)
    assert float(sampled_values("reinforce_pp", of)[0]) > 0.4


def test_discount_and_kl_act_from_each_token_on():
    """gamma 1/2, one response of three tokens: returns 1/4, 1/2, 1 less the discounted KL of the tokens ahead."""
    of = graded([[1.0], [0.0]], [[3], [1]])
    flags = ("--gamma", "0.5", "--kl", "k1", "--kl-in", "reward")
    kl = torch.tensor([0, 0.1, 0.2, 0.4, 0, 0.0])
    of.extra["kl_penalty"] = kl
    raw = torch.tensor([0.25 - 0.1 - 0.1 - 0.1, 0.5 - 0.2 - 0.2, 1 - 0.4, 0.0])
    expected = (raw - raw.mean()) / raw.std()
    torch.testing.assert_close(sampled_values("reinforce_pp", of, *flags), expected, rtol=1e-5, atol=1e-5)


def test_whitening():
    values, mask = torch.tensor([5.0, 1.0, 2.0, 6.0, 9.0]), torch.tensor([False, True, True, True, False])
    got = whiten(values, mask, eps=1e-8)
    assert got.tolist() == pytest.approx([0, -2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, 0], abs=1e-6)
    biased = whiten(values, mask, floor=1e-8, correction=0)
    assert biased.tolist() == pytest.approx([0, *[x * 1.5**0.5 for x in got[1:4].tolist()], 0], abs=1e-6)
    for equal in (0.1, 0.3, 1.0):  # rounding would give 0.1 something of the size of 1e-8 / 1e-4
        for count in (7, 1001):
            assert not whiten(torch.full((count,), equal), torch.ones(count, dtype=torch.bool), eps=1e-8).any()
    assert not whiten(values, torch.tensor([True, False, False, False, False]), eps=1e-8).any()
    order = torch.tensor([0, 3, 1, 2, 4])
    torch.testing.assert_close(whiten(values[order], mask[order], eps=1e-8), got[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("budget", [10_000, 40])
def test_gradient_through_the_model(budget):
    policy = tiny_policy(seed=3)
    ctx = context("reinforce_pp", "--temperature", "0.9", "--clip-low", "0.1", policy=policy)
    batch = make_batch(ctx, with_rewards(ragged(sampled(policy)), torch.tensor([1.0, 0, 0, 1, 0, 0.1, 0.1, 1])))
    move(policy)

    def equations(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.9, 1.2) * r.advantage) for r in rows]
        return -torch.cat(terms).mean()

    check_gradient(ctx, batch, equations, budget)
    with pytest.raises(AssertionError):  # a mean over responses is another loss
        check_gradient(ctx, batch, grpo_equations(0.1, 0.2), budget)


def test_defaults_and_refusals():
    run = parse_train(["--algo", "reinforce_pp"])
    assert (run.train.samples_per_prompt, run.train.prompts_per_step) == (1, 512)
    with pytest.raises(UserError, match=r"--rf-baseline group compares .* got 1"):
        parse_train(["--algo", "reinforce_pp", "--rf-baseline", "group"])
    with pytest.raises(UserError, match=r"--rf-baseline group has no returns .* got 0.9"):
        flags = ["--rf-baseline", "group", "--samples-per-prompt", "8", "--prompts-per-step", "64", "--gamma", "0.9"]
        parse_train(["--algo", "reinforce_pp", *flags])
    with pytest.raises(UserError, match=r"--filter mixed keeps groups by .* got 1"):
        parse_train(["--algo", "reinforce_pp", "--filter", "mixed"])


def test_a_run(tmp_path, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    argv = ["--algo", "reinforce_pp", "--model", str(model), "--steps", "2", "--out", str(out), *SMALL_RUN]
    assert main([*argv, "--samples-per-prompt", "1"]) == 0, capsys.readouterr().err
    assert [m["updates/skipped"] for m in read_metrics(out) if "loss" in m] == [0, 0]
