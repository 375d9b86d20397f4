"""RL Tango on the numbers of its specification, its equations through the real model, and its two models in a run."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pymathrl.advantage import advantage as advantage_stage
from pymathrl.algos import tango
from pymathrl.batch import Graded
from pymathrl.checkpoint import latest_checkpoint, load_state
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.tiny import SMALL_RUN, read_metrics, tiny_policy

SMALL = ["--verifier-warmup", "2", *SMALL_RUN]


def with_steps(verdicts: list[list[int]], right: list[float], extra_tokens: int = 1) -> Graded:
    """One group; response i has 2 tokens a step, of which the second ends it, and `extra_tokens` behind the last."""
    made = graded([right], [[2 * len(v) + extra_tokens for v in verdicts]])
    reward = torch.zeros(made.rollout.tokens)
    for start, row in zip((made.rollout.offsets[:-1] + 1).tolist(), verdicts, strict=True):
        for k, y in enumerate(row):
            reward[start + 2 * k + 1] = y / len(row)
    return replace(made, extra={"step_reward": reward})


def responses(made: Graded, values: torch.Tensor) -> list[list[float]]:
    bounds = made.rollout.offsets.tolist()
    return [values[a + 1 : b].tolist() for a, b in pairwise(bounds)]


def test_worked_example():
    made = with_steps([[1, 1, -1], [1, -1]], [1.0, 0.0])
    ctx = context("tango", memory=False)
    one, two = responses(made, tango.step_advantage(made, ctx.own.adv_eps))
    # each value at both tokens of its step; the token behind the last step has no step part
    assert one == pytest.approx([0.296093, 0.296093, -0.296093, -0.296093, -0.888278, -0.888278, 0.0], abs=1e-5)
    assert two == pytest.approx([-0.296093, -0.296093, -1.258394, -1.258394, 0.0], abs=1e-5)
    one, two = responses(made, tango.advantage(ctx, made))  # alpha = 0.1 at the start
    assert one[::2] == pytest.approx([0.666004, 0.606786, 0.547567, 0.9 * 0.707106], abs=1e-5)
    assert two[::2] == pytest.approx([-0.666004, -0.762235, -0.9 * 0.707106], abs=1e-5)


def test_groups_are_normalised_apart_and_rows_do_not_reach_into_each_other():
    a, b = with_steps([[1, 1, -1], [1, -1]], [1.0, 0.0]), with_steps([[-1], [], [1, 1], [1]], [0.0, 1.0, 0.0, 0.0])
    both = Graded.concat([a, b])
    alone = torch.cat([tango.step_advantage(a, 1e-6), tango.step_advantage(b, 1e-6)])
    assert torch.equal(tango.step_advantage(both, 1e-6), alone)
    rows = both.select_groups([1, 0])  # another order, the same bits
    expected = torch.cat([tango.step_advantage(b, 1e-6), tango.step_advantage(a, 1e-6)])
    assert torch.equal(tango.step_advantage(rows, 1e-6), expected)
    none = with_steps([[], []], [1.0, 0.0])
    assert tango.step_advantage(none, 1e-6).tolist() == [0.0] * none.rollout.tokens


def test_alpha_falls_exponentially():
    own = tango.Config()
    got = [tango.alpha(own, t / 200) for t in (0, 50, 100, 150, 200)]
    assert got == pytest.approx([0.1, 0.031623, 0.01, 0.003162, 0.001], abs=1e-6)


def test_balance_of_right_and_wrong_solutions():
    memory = tango.Memory(context("tango", memory=False))
    right, wrong = memory.balance(20, 80, 0.8)
    assert right / wrong == pytest.approx(2.0) and 0.2 * right + 0.8 * wrong == pytest.approx(1.0)
    memory.balance(80, 20, 0.8)
    assert memory.counts == pytest.approx([32.0, 68.0])
    right, wrong = tango.Memory(context("tango", memory=False)).balance(0, 64, 0.8)
    assert right == pytest.approx(8 * wrong), "a class that was not seen counts as one"


def test_steps_of_a_response():
    policy = tiny_policy()
    ids = policy.tokenizer.encode("79-60=19,19+17=36</think><answer>(79-60)+17</answer>")
    assert tango.step_ends(policy.tokenizer, ids, True) == [8, 17]  # the comma, and </think>
    cut = policy.tokenizer.encode("1+2=3,3+")
    assert tango.step_ends(policy.tokenizer, cut, True) == [5, 7]
    assert tango.step_ends(policy.tokenizer, policy.tokenizer.encode("</think>"), True) == []
    assert tango.step_ends(policy.tokenizer, policy.tokenizer.encode("1+2=3\n\n3+4=7\n</think>"), False) == [4, 11]


def test_verdicts_of_the_built_in_model():
    assert tango.read_verdict("++-+", 3, True) == tango.Verdict([1, 1, -1], True, 1.0)
    assert tango.read_verdict("-", 0, True) == tango.Verdict([], False, 1.0)
    for text in ("++-", "++-+-", "+3-+", ""):
        assert tango.read_verdict(text, 3, True) == tango.Verdict(None, None, 0.0)


def test_verdicts_in_words():
    step = "<step>as 1+1=2: \\boxed{CORRECT}</step>\n<step>no \\boxed{INCORRECT}.</step>"
    inside = f"<step_verification>{step}</step_verification>"
    final = "<final_verification> \\boxed{INCORRECT}</final_verification>"
    assert tango.read_verdict(inside + final, 2, False) == tango.Verdict([1, -1], False, 1.0)
    assert tango.read_verdict(inside + final, 3, False) == tango.Verdict(None, False, pytest.approx(1 / 3))
    assert tango.read_verdict(inside, 2, False) == tango.Verdict([1, -1], None, pytest.approx(2 / 3))
    bare = inside.replace("as 1+1=2: ", "")
    assert tango.read_verdict(bare + final, 2, False) == tango.Verdict([1, -1], False, pytest.approx(2 / 3))
    assert tango.read_verdict("nothing", 2, False) == tango.Verdict(None, None, 0.0)


def test_judge_puts_verdicts_on_the_ends_of_steps_and_rewards_are_outcomes():
    policy = tiny_policy(seed=3)
    ctx = context("tango", "--samples-per-prompt", "4", policy=policy)
    prompts = ctx.draw(3)
    made = ctx.verify(ctx.generate(prompts), prompts.problems)
    judged = tango.judge(ctx, replace(made, reward=made.reward + 0.1))
    assert torch.equal(judged.reward, made.correct.float())
    reward, rollout = judged.extra["step_reward"], made.rollout
    for row, s in enumerate(tango.solutions_of(ctx, rollout)):
        start = int(rollout.offsets[row] + rollout.prompt_len[row])
        own = reward[int(rollout.offsets[row]) : int(rollout.offsets[row + 1])]
        assert (own.nonzero()[:, 0] + int(rollout.offsets[row])).tolist() == [start + e for e in s.ends]
        assert all(abs(float(v)) == pytest.approx(1 / len(s.ends)) for v in own[own != 0])
        assert ctx.problem_of(s.uid) == prompts.problems[int(rollout.group[row])]
    assert ctx.metrics["tango/unreadable"] == 0.0
    again = tango.judge(ctx, made)
    assert torch.equal(again.extra["step_reward"], reward), "the same draws for the same weights"
    assert advantage_stage(ctx, judged).advantage.isfinite().all()


def test_verifier_rewards_advantages_and_the_exactness_of_its_draws(monkeypatch):
    """r_v = [1.8, 0.8, 1.4] of a right solution: A = s [0.927171, -1.059624, 0.132453]."""
    ctx = context("tango", "--samples-per-prompt", "3", "--verifier-warmup", "0", policy=tiny_policy(seed=3))
    prompts = ctx.draw(1)
    made = ctx.generate(prompts, replace(ctx.draws, samples=1))
    drawn, real = tango.verifications(ctx, tango.solutions_of(ctx, made), 1, 3)
    assert all(v.steps is not None and v.form == 1 for v in real)
    scored = ctx.score(drawn, ctx.memory.learner.policy)
    assert torch.equal(scored.logp, drawn.logp) and bool((drawn.logp[drawn.sampled_mask] < 0).any())
    verdicts = [tango.Verdict([], f, form) for f, form in ((True, 1.0), (False, 1.0), (True, 0.5))]
    monkeypatch.setattr(tango, "verifications", lambda *args: (drawn, verdicts))
    seen = []
    real_update = ctx.memory.learner.update
    monkeypatch.setattr(
        ctx.memory.learner, "update", lambda batch, spec: seen.append(batch) or real_update(batch, spec)
    )
    generator = copy.deepcopy(ctx.policy.model.state_dict())
    verifier = copy.deepcopy(ctx.memory.learner.policy.model.state_dict())
    metrics = tango.train_verifier(ctx, made, torch.tensor([True]))
    (batch,) = seen
    batch.validate()
    assert batch.reward.tolist() == pytest.approx([1.8, 0.8, 1.4])
    first = batch.rollout.offsets[1:] - 1
    assert batch.advantage[first].tolist() == pytest.approx([0.927171, -1.059624, 0.132453], abs=1e-5)
    assert metrics["verifier/agrees"] == pytest.approx(2 / 3)
    assert all(torch.equal(generator[k], v) for k, v in ctx.policy.model.state_dict().items())
    assert not all(torch.equal(verifier[k], v) for k, v in ctx.memory.learner.policy.model.state_dict().items())
    wrong = context("tango", "--samples-per-prompt", "3", policy=tiny_policy(seed=3))
    monkeypatch.setattr(
        wrong.memory.learner, "update", lambda batch, spec: seen.append(batch) or real_update(batch, spec)
    )
    wrong.memory.counts = [20.0, 80.0]
    tango.train_verifier(wrong, made, torch.tensor([False]))  # counts 16 and 64.2
    assert seen[1].reward.tolist() == pytest.approx([0.8, 1.8, 0.4])
    scale = (16.0 + 64.2) / (16.0**0.5 + 64.2**0.5) / 64.2**0.5
    mean, std = 1.0, (0.04 + 0.64 + 0.36) ** 0.5 / 2**0.5
    assert seen[1].advantage[first].tolist() == pytest.approx(
        [scale * (r - mean) / std for r in (0.8, 1.8, 0.4)], abs=1e-4
    )


def test_the_verifier_takes_its_turn_after_every_third_step(monkeypatch):
    ctx = context("tango", policy=tiny_policy(seed=3))
    turns = []
    monkeypatch.setattr(
        tango, "train_verifier", lambda ctx, rollout, right: turns.append(rollout.uid.tolist()) or {"x": 1}
    )
    made = advantage_stage(context("grpo"), with_rewards(sampled(ctx.policy), torch.tensor([1.0, 0, 0, 0] * 2)))
    assert [bool(tango.learn(ctx, made)) for _ in range(7)] == [False, False, True, False, False, True, False]
    assert turns == [[0, 4]] * 2, "the first response to each problem"


def equations(rows):
    terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage) for r in rows]
    return -torch.stack([t.mean() for t in terms]).mean()


def test_gradient_through_the_model_equals_the_equations_in_float64():
    policy = tiny_policy(seed=3)
    ctx = context("tango", "--temperature", "0.9", policy=policy)
    ctx.at.stage_step = ctx.train.steps // 4
    made = with_rewards(sampled(policy), torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1]))
    reward = torch.zeros(made.rollout.tokens)
    ends = made.rollout.sampled_mask.nonzero()[::3, 0]
    reward[ends] = torch.tensor([0.5, -0.5, 1.0])[torch.arange(ends.numel()) % 3]
    batch = make_batch(ctx, replace(made, extra={"step_reward": reward}))
    share = 0.1 * 0.01**0.25
    outcome = batch.advantage - share * torch.where(made.rollout.sampled_mask, tango.step_advantage(
        replace(made, extra={"step_reward": reward}), 1e-6), 0.0)  # fmt: skip
    row = outcome[made.rollout.row_of_token == 0]
    assert row[made.rollout.sampled_mask[made.rollout.row_of_token == 0]].std() < 1e-6, "one outcome part per response"
    move(policy)
    check_gradient(ctx, batch, equations)


def test_state_survives_a_round_trip():
    ctx = context("tango", "--samples-per-prompt", "3", "--verifier-warmup", "1", policy=tiny_policy(seed=3))
    prompts = ctx.draw(2)
    tango.rollout(ctx, prompts, ctx.draws)
    ctx.memory.phase = 2
    state = copy.deepcopy(ctx.memory.state_dict())
    other = context("tango", policy=tiny_policy(seed=4))
    other.memory.load_state_dict(state)
    assert (other.memory.warm, other.memory.phase, other.memory.counts) == (True, 2, ctx.memory.counts)
    for a, b in zip(
        ctx.memory.learner.policy.model.parameters(), other.memory.learner.policy.model.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_resume_gives_the_same_bits(tmp_path):
    """5 steps, and 3 with 2 more after a resume: both models, their optimizers and the phase."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = ["--algo", "tango", "--eval-every", "0", "--checkpoint-every", "0", *SMALL]
    assert main([*argv, "--alpha-end", "0.1", "--steps", "5", "--out", str(whole)]) == 0
    assert main([*argv, "--alpha-end", "0.1", "--steps", "3", "--out", str(parts)]) == 0
    assert main(["--resume", str(parts), "--steps", "5"]) == 0
    states = [load_state(latest_checkpoint(run)[1]) for run in (whole, parts)]
    assert states[0]["memory"]["phase"] == states[1]["memory"]["phase"] == 10
    for name, value in states[0]["memory"]["verifier"]["weights"].items():
        assert torch.equal(value, states[1]["memory"]["verifier"]["weights"][name]), name
    losses = [[m["loss"] for m in read_metrics(run) if "loss" in m] for run in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    turns = [m["verifier/reward"] for m in read_metrics(whole) if "verifier/reward" in m]
    assert len(turns) == 3, "of 10 optimizer steps"


def test_the_warm_up_keeps_the_verifier_near_the_reference_and_stages_have_their_own_options(monkeypatch):
    flags = ("--samples-per-prompt", "3", "--verifier-warmup", "1", "--kl", "k3", "--kl-coef", "0.5")
    ctx = context("tango", *flags, policy=tiny_policy(seed=3))
    ctx._reference = {ctx.train.model: ctx.frozen_copy()}
    specs = []
    monkeypatch.setattr(
        ctx.memory.learner, "update",
        lambda batch, spec, real=ctx.memory.learner.update: specs.append(spec) or real(batch, spec),
    )  # fmt: skip
    tango.rollout(ctx, ctx.draw(1), ctx.draws)  # before the first batch has set the factor of the KL
    assert specs[0].terms["kl_coef"] == 0.5
    ctx.run = replace(ctx.run, train=replace(ctx.train, temperature=0.7, lr=0.25))
    tango.rollout(ctx, ctx.draw(1), ctx.draws)
    assert ctx.memory.learner.config.temperature == 1.0, "the same stage"
    ctx.at.stage = 1
    tango.rollout(ctx, ctx.draw(1), ctx.draws)
    config = ctx.memory.learner.config
    assert (config.temperature, config.lr, config.minibatches) == (0.7, 0.25, 1)
    assert len(specs) == 1, "one warm-up for the whole run"


def test_more_verifications_than_can_be_told_apart_are_refused(capsys):
    assert main(["--algo", "tango", "--samples-per-prompt", "256", "--dry-run"]) == 2
    assert "at most 255 --samples-per-prompt" in capsys.readouterr().err
