"""KL to a reference in loss and reward, its steered factor, and tokens that are taken out."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pymathrl.advantage import advantage, mask_tokens, reference_terms, steer_kl
from pymathrl.algos import LossSpec
from pymathrl.algos.common import last_sampled, response_reward, token_reward
from pymathrl.batch import ROLE_FORCED, STOP_EOS, STOP_LENGTH
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from pymathrl.loss import minibatch_loss
from pymathrl.ops.aggregation import MODES
from pymathrl.rollout import Engine
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.algos.runs import assert_resume_gives_the_same_bits, steps
from tests.tiny import save_tiny, tiny_policy

KL = ["--kl", "k3", "--kl-coef", "0.5"]


def with_reference(monkeypatch, ctx, ref_logp):
    """A context whose reference policy gives these log-probs [T]."""
    monkeypatch.setattr(type(ctx), "reference", lambda self: None)
    monkeypatch.setattr(type(ctx), "score", lambda self, rollout, policy: SimpleNamespace(logp=ref_logp))
    return ctx


def test_kl_in_the_reward_is_taken_off_token_by_token(monkeypatch):
    rows = graded([[1.0, 0.0]], [[2, 1]], logp=[[-1.0, -2.0], [-0.5]])
    mask = rows.rollout.sampled_mask
    ref = torch.where(mask, rows.rollout.logp - 0.25, 0.0)
    ctx = with_reference(monkeypatch, context("grpo", "--kl", "k1", "--kl-coef", "0.5", "--kl-in", "reward"), ref)
    out = reference_terms(ctx, rows)
    assert out.extra["kl_penalty"].tolist() == [0, 0.125, 0.125, 0, 0.125]  # 0.5 * k1
    assert response_reward(out).tolist() == [0.75, -0.125]
    assert token_reward(out).tolist() == [0, -0.125, 0.875, 0, -0.125]
    assert last_sampled(rows.rollout).tolist() == [False, False, True, False, True]
    assert ctx.metrics["kl/sampler_to_reference"] == pytest.approx(0.25)
    assert response_reward(rows).tolist() == [1, 0] and token_reward(rows).tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("target, factor", [(0.25, 1.0), (0.125, 1 + 0.2 * 2 / 100), (2.5, 1 - 0.2 * 2 / 100),
                                            (0.25 / 1.1, 1 + 0.1 * 2 / 100)])  # fmt: skip
def test_the_factor_is_steered_to_its_target_within_a_fifth(target, factor, monkeypatch):
    rows = graded([[1.0, 0.0]], logp=[[-1.0, -2.0], [-0.5, -1.0]])
    ref = torch.where(rows.rollout.sampled_mask, rows.rollout.logp - 0.25, 0.0)
    flags = [*KL, "--kl-target", str(target), "--kl-horizon", "100"]
    ctx = with_reference(monkeypatch, context("grpo", *flags), ref)
    reference_terms(ctx, rows)
    assert ctx.metrics["kl/coef"] == ctx.kl_coef == 0.5, "the step's loss has the factor that it logs"
    steer_kl(ctx, 2)
    assert ctx.kl_coef == pytest.approx(0.5 * factor, rel=1e-5)
    reference_terms(ctx, rows)
    steer_kl(ctx, 2)
    assert ctx.at.kl_coef == pytest.approx(0.5 * factor**2, rel=1e-5)


def test_a_steered_factor_survives_a_resume(tmp_path):
    flags = ["--kl", "k3", "--kl-coef", "0.5", "--kl-target", "0.001", "--kl-horizon", "32"]
    metrics = assert_resume_gives_the_same_bits(tmp_path, "grpo", *flags)
    assert len({m["kl/coef"] for m in metrics}) > 2 and metrics[0]["kl/coef"] == 0.5
    assert [m["kl/coef"] for m in steps(tmp_path / "parts")] == [m["kl/coef"] for m in metrics]


def test_the_reference_is_that_of_the_stage(tmp_path):
    policy = tiny_policy(seed=3)
    ctx = context("grpo", *KL, "--kl-reference", str(save_tiny(tmp_path / "a", seed=5)), policy=policy)
    first = ctx.reference()
    assert ctx.reference() is first
    other = save_tiny(tmp_path / "b", seed=6)
    ctx.run = replace(ctx.run, train=replace(ctx.train, kl_reference=str(other)))
    assert not torch.equal(ctx.reference().model.embed, first.model.embed)


def test_the_first_step_of_a_run_has_no_kl():
    """The reference is the model that the run began with: on a CPU its log-probs have the sampler's bits."""
    policy = tiny_policy(seed=3)
    ctx = context("grpo", *KL, policy=policy)
    ctx._reference = {ctx.train.model: ctx.frozen_copy()}
    out = reference_terms(ctx, with_rewards(sampled(policy, temperature=1.0), torch.ones(8)))
    assert torch.equal(out.extra["ref_logp"], out.rollout.logp)
    move(policy)
    moved = reference_terms(ctx, with_rewards(sampled(policy, temperature=1.0), torch.ones(8)))
    assert not torch.allclose(moved.extra["ref_logp"], moved.rollout.logp, atol=1e-2)


@pytest.mark.parametrize(
    "flags, extra_loss",
    [
        (["--kl", "k1", "--kl-coef", "0.5"], lambda r: 0.5 * (r.logp - r.extra["ref_logp"])),
        (["--kl", "k2", "--kl-coef", "0.5"], lambda r: 0.25 * (r.logp - r.extra["ref_logp"]).square()),
        (KL, lambda r: 0.5 * ((r.extra["ref_logp"] - r.logp).exp() + r.logp - r.extra["ref_logp"] - 1)),
        (["--entropy-coef", "0.3"], lambda r: 0.3 * (r.log_probs.exp() * r.log_probs).sum(-1)),
    ],
)
def test_kl_and_entropy_in_the_loss_through_the_model(flags, extra_loss):
    policy = tiny_policy(seed=3)
    ctx = context("grpo", *flags, "--temperature", "0.9", "--aggregation", "token-mean", policy=policy)
    ctx._reference = {ctx.train.model: tiny_policy(seed=8)}
    batch = make_batch(ctx, with_rewards(sampled(policy), torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])))
    move(policy)

    def equations(rows):
        terms = [-torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage) for r in rows]
        return torch.cat([t + extra_loss(r) for t, r in zip(terms, rows, strict=True)]).mean()

    check_gradient(ctx, batch, equations, token_budget=60)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_importance_weights_multiply_the_loss(level):
    policy = tiny_policy(seed=3)
    flags = ["--old-logp", "recompute", "--is-level", level, "--is-cap", "1.05", "--aggregation", "token-mean"]
    ctx = context("grpo", *flags, "--temperature", "0.9", policy=policy)
    rows = with_rewards(sampled(policy), torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0]))
    noise = torch.where(rows.rollout.sampled_mask, 0.1 * torch.randn(rows.rollout.tokens), 0.0)
    rows.extra["behaviour_logp"] = rows.rollout.logp + noise
    batch = make_batch(ctx, rows)
    move(policy)

    def equations(rows):
        out = []
        for r in rows:
            x = r.old_logp - r.extra["behaviour_logp"]
            w = {"token": x, "sequence": x.sum() + 0 * x, "geometric": x.mean() + 0 * x}[level].exp().clamp(max=1.05)
            out.append(-w * torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage))
        return torch.cat(out).mean()

    check_gradient(ctx, batch, equations)


def test_truncated_responses_leave_loss_and_counts():
    rows = graded([[1.0, 0.0, 0.0]], [[2, 3, 2]], stops=[STOP_EOS, STOP_LENGTH, STOP_EOS])
    ctx = context("grpo", "--truncated", "mask")
    batch = mask_tokens(advantage(ctx, rows), ctx.train)
    batch.validate()
    assert batch.rollout.sampled_count.tolist() == [2, 0, 2]
    assert (batch.rollout.role[batch.per_token(torch.tensor([False, True, False]))] == ROLE_FORCED).sum() == 3
    assert batch.advantage.count_nonzero() == 4
    whole = mask_tokens(advantage(ctx, rows), context("grpo").train)
    assert whole.rollout.sampled_count.tolist() == [2, 3, 2]


@pytest.mark.parametrize("mode", MODES)
def test_truncated_responses_are_in_no_average(mode):
    """The loss is that of the other responses alone, and 0 where there are none."""
    policy, spec = tiny_policy(seed=3), LossSpec("weighted", mode)
    options = dict(temperature=1.0, token_budget=99, max_new_tokens=5)
    ctx = context("grpo", "--truncated", "mask")
    for cut, kept in (([1], [0, 2]), ([0, 1, 2], [])):
        stops = [STOP_LENGTH if row in cut else STOP_EOS for row in range(3)]
        rows = graded([[1.0, 0.0, 0.0]], [[2, 3, 4]], stops=stops)
        batch = mask_tokens(advantage(ctx, rows), ctx.train)
        masked = minibatch_loss(policy.model, batch, range(3), spec, **options)
        alone = float(minibatch_loss(policy.model, batch.select(kept), range(2), spec, **options).loss) if kept else 0.0
        assert float(masked.loss) == pytest.approx(alone, rel=1e-6) and (masked.loss != 0) == bool(kept)
        assert masked.tokens == (6 if kept else 0) and masked.rows == 3


def test_only_the_tokens_of_highest_entropy_are_trained():
    rows = graded([[1.0, 0.0]], [[3, 2]], logp=[[-0.1, -3.0, -0.2], [-2.0, -0.3]])  # entropy = -logp there
    ctx = context("grpo", "--entropy-quantile", "0.4")
    batch = mask_tokens(advantage(ctx, rows), ctx.train)
    trained = (batch.coef != 0) & batch.rollout.sampled_mask
    assert batch.rollout.entropy[trained].tolist() == [3.0, 2.0]
    assert batch.rollout.sampled_count.tolist() == [3, 2]  # the others count in the averages


def test_a_wrong_shape_of_an_algorithms_advantage_is_named():
    ctx = context("grpo")
    ctx.run = replace(ctx.run, algo=replace(ctx.run.algo, advantage=lambda c, g: torch.zeros(3)))
    with pytest.raises(ValueError, match=r"grpo: advantage must return \[B\] = \[2\] or \[T\] = \[6\], got \[3\]"):
        advantage(ctx, graded([[1.0, 0.0]]))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--is-level", "token"], "needs --old-logp recompute"),
        (["--kl-coef", "0.1"], "--kl-coef has no effect with --kl none"),
        (["--kl", "k3", "--kl-in", "reward"], "--kl-in reward takes k1 off the rewards: expected --kl k1, got --kl k3"),
        (["--kl", "k3", "--kl-horizon", "9"], "--kl-horizon has no effect with --kl-target 0.0"),
        (["--filter-low", "0.1"], "--filter-low has no effect with --filter off"),
        (["--filter", "mixed", "--filter-high", "0.9"], "--filter-high has no effect with --filter mixed"),
        (["--filter", "band", "--filter-low", "0.8"], "0 <= --filter-low <= --filter-high <= 1"),
        (["--samples-per-prompt", "1"], "expected at least 2, got 1"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(flags, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        parse_train(["--algo", "grpo", *flags])


def test_responses_behind_other_prompts():
    policy = tiny_policy(seed=3)
    rollout = Engine(policy, seed=1).generate([[4, 5, 6], [7, 8]], 2, 6)
    moved = rollout.with_prompts([[9], [9, 10], [11, 12, 13, 14], [3, 3, 3]])
    moved.validate()
    for row, prompt in enumerate([[9], [9, 10], [11, 12, 13, 14], [3, 3, 3]]):
        begin, end = moved.offsets[row : row + 2].tolist()
        assert moved.ids[begin : begin + len(prompt)].tolist() == prompt
        assert moved.ids[begin + len(prompt) : end].tolist() == rollout.response(row).tolist()
        old = rollout.logp[rollout.offsets[row] : rollout.offsets[row + 1]][int(rollout.prompt_len[row]) :]
        assert torch.equal(moved.logp[begin + len(prompt) : end], old)
