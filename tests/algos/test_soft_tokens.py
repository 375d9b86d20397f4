"""soft_tokens: its numbers, the shape of a response, the gradient through the real model, whole runs in each mode."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pymathrl
from pymathrl.algos import REGISTRY
from pymathrl.algos.soft_tokens import PAPER, TAGS, Noise, phrases
from pymathrl.batch import ROLE_FORCED, ROLE_SAMPLED, STOP_EOS, Batch, Rollout
from pymathrl.errors import UserError
from pymathrl.ops.soft_embed import SoftSampling
from pymathrl.rollout import Draws
from pymathrl.tasks import Grade
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move, with_rewards
from tests.tiny import SMALL_RUN, read_metrics, tiny_policy

ALGO = REGISTRY["soft_tokens"]
MODES = ("soft", "fuzzy", "hard")
RUN = [*SMALL_RUN, "--minibatches", "1", "--answer-tokens", "4"]


def drawn(ctx: Any, samples: int = 4, length: int = 14) -> Rollout:
    prompts = ctx.draw(2)
    rollout = ALGO.rollout(ctx, prompts, Draws(samples, length, ctx.train.temperature, seed=ctx.train.seed))
    rollout.validate()
    return rollout


def test_advantage_is_the_reward_less_the_mean_of_the_others() -> None:
    ctx = context("soft_tokens")
    got = ALGO.advantage(ctx, graded([[100.0, 10.0, 0.0, 100.0], [10.0] * 4])).tolist()
    assert got[:4] == pytest.approx([63.333333, -56.666667, -70, 63.333333], abs=1e-4)
    assert got[4:] == [0, 0, 0, 0]


def test_rewards_are_100_10_and_0() -> None:
    batch = graded([[1.0, 0.1, 0.0]])
    grades = [
        Grade(1.0, True, "7", "7", "correct"),
        Grade(0.1, False, "8", "8", "wrong"),
        Grade(0.0, False, None, None, "none"),
    ]
    assert ALGO.judge(context("soft_tokens"), dataclasses.replace(batch, grades=grades)).reward.tolist() == [100, 10, 0]


def test_the_noise_is_a_third_of_the_embeddings_and_does_not_follow_them() -> None:
    ctx = context("soft_tokens")
    with torch.no_grad():
        ctx.policy.model.embed.zero_()
        ctx.policy.model.embed[:3, :2] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
    table = ctx.policy.model.embed
    entry = (4 / table.numel()) ** 0.5  # UT-T1's four ones, among more zeros: 0.816497 = sqrt(4 / 6) there
    noise = Noise(ctx)
    assert noise.sigma(ctx) == pytest.approx(0.33 * entry)
    # as of another stage of the run: the same table, other options
    row = context("soft_tokens", "--rms-mode", "row", "--sigma-scale", "2", policy=ctx.policy)
    assert noise.sigma(row) == pytest.approx(2 * entry * table.shape[1] ** 0.5)
    before = noise.state_dict()
    move(ctx.policy)
    restored = Noise(ctx)
    assert restored.rms != noise.rms
    restored.load_state_dict(before)
    assert restored.sigma(ctx) == noise.sigma(ctx)


@pytest.mark.parametrize("mode", MODES)
def test_a_response_is_a_chain_then_a_phrase_then_an_answer(mode: str) -> None:
    policy = pymathrl.load("builtin:tiny")
    ctx = context("soft_tokens", "--cot-mode", mode, "--answer-tokens", "20", policy=policy)
    prompts = ctx.draw(4)
    early, late = policy.tokenizer.encode(TAGS[1]), policy.tokenizer.encode("".join(TAGS))
    reasons = set()
    for length in (60, 20 + len(late) + 12):  # room for most chains, and for none
        rollout = ALGO.rollout(ctx, prompts, Draws(3, length))
        rollout.validate()
        assert rollout.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert torch.equal(rollout.uid, Draws(3, length).uids(prompts.problems))
        assert (rollout.soft_sampling is None) == (mode == "hard")
        assert int(rollout.response_lengths.max()) <= length
        for row in range(rollout.rows):
            begin, end = rollout.offsets[row : row + 2].tolist()
            begin += int(rollout.prompt_len[row])
            ids, role = rollout.ids[begin:end].tolist(), rollout.role[begin:end]
            at = (role == ROLE_FORCED).nonzero()[:, 0].tolist()
            if not at:
                assert int(rollout.stop[row]) == STOP_EOS and mode == "hard"
                continue
            text = policy.tokenizer.decode(ids[: at[0]])
            stopped = text.endswith(TAGS[0])
            assert TAGS[0] not in text[: -len(TAGS[0])]
            phrase = early if stopped else late
            assert ids[at[0] : at[-1] + 1] == phrase and at == list(range(at[0], at[0] + len(phrase)))
            assert stopped or at[0] == length - 20 - len(late)
            reasons.add(stopped)
            soft = torch.zeros(end - begin, dtype=torch.bool)
            soft[: at[0]] = mode != "hard"
            assert rollout.soft is None or torch.equal(rollout.soft[begin:end], soft)
            assert bool((role[at[-1] + 1 :] == ROLE_SAMPLED).all())
    assert reasons == {True, False}
    assert ctx.engine.pages_in_use == 0
    if mode != "hard":
        tau = {"soft": 0.5, "fuzzy": 1e-4}[mode]
        assert rollout.soft_sampling == SoftSampling(tau, ctx.memory.sigma(ctx))


def test_phrases_follow_the_prompt() -> None:
    ctx = context("soft_tokens")
    assert phrases(ctx, "3 4 -> 7\n<think>") == TAGS
    plain = dataclasses.replace(ctx.policy, prompt_style="chat")
    ctx = context("soft_tokens", policy=plain)
    assert phrases(ctx, "What is 3 + 4? Write <answer>...</answer>.") == TAGS
    assert phrases(ctx, "What is 3 + 4?") == PAPER
    own = context("soft_tokens", "--cot-stop", "So: ", "--cot-prefill", "", policy=plain)
    assert phrases(own, "What is 3 + 4?") == ("So: ", "")


def minus_a_logp(rows: list[Any]) -> torch.Tensor:
    return torch.stack([-(r.advantage * r.logp).sum() for r in rows]).mean()


def batch_of(ctx: Any) -> Batch:
    rollout = drawn(ctx)
    reward = torch.tensor([100.0, 10.0, 0.0, 100.0, 0.0, 10.0, 10.0, 0.0])
    batch = make_batch(ctx, with_rewards(rollout, reward))
    move(ctx.policy)  # the vectors are data: the density is that of the policy as it is now
    return batch


@pytest.mark.parametrize(
    "mode, flags, tie",
    [("soft", [], False), ("soft", [], True), ("soft", ["--soft-top-k", "5"], False), ("hard", [], False),
     ("hard", [], True)],
)  # fmt: skip
@pytest.mark.parametrize("budget", [10_000, 40])
def test_gradient_through_the_model_equals_the_equations_in_float64(
    mode: str, flags: list[str], tie: bool, budget: int
) -> None:
    options = ("--temperature", "0.9", "--answer-tokens", "4", "--cot-mode", mode)
    tau = () if mode == "hard" else ("--soft-tau", "0.7")
    ctx = context("soft_tokens", *options, *tau, *flags, policy=tiny_policy(seed=3, tie=tie))
    batch = batch_of(ctx)
    assert (batch.rollout.soft is not None) == (mode != "hard")
    if flags:
        batch = dataclasses.replace(batch, rollout=dataclasses.replace(
            batch.rollout, soft_sampling=dataclasses.replace(batch.rollout.soft_sampling, top_k=32)
        ))  # fmt: skip  # all of the vocabulary, by the other path
    check_gradient(ctx, batch, minus_a_logp, budget)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows: torch.stack([-(r.advantage * r.logp).mean() for r in rows]).mean(),
        lambda rows: -torch.cat([r.advantage * r.logp for r in rows]).mean(),
        lambda rows: -minus_a_logp(rows),
        lambda rows: torch.stack([-(r.advantage * r.logp)[-4:].sum() for r in rows]).mean(),
        lambda rows: torch.stack([-(r.advantage * r.logp)[:-4].sum() for r in rows]).mean(),
        lambda rows: torch.stack([-(r.advantage * r.log_probs.amax(-1)).sum() for r in rows]).mean(),
    ],
    ids=["mean of a response", "mean of all tokens", "sign", "no chain", "no answer", "shadow tokens"],
)
def test_wrong_equations_are_refused(wrong: Any) -> None:
    ctx = context("soft_tokens", "--answer-tokens", "4", "--soft-tau", "0.7", policy=tiny_policy(seed=3))
    with pytest.raises(AssertionError):
        check_gradient(ctx, batch_of(ctx), wrong)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_in_each_mode_and_its_resume(mode: str, tmp_path) -> None:
    """Four steps, and two with two more after a resume: the same weights, so the same noise."""
    algo = ["--algo", "soft_tokens", "--cot-mode", mode]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*algo, *RUN, "--steps", "4", "--out", str(whole)]) == 0
    assert main([*algo, *RUN, "--steps", "2", "--out", str(cut)]) == 0
    assert main(["--resume", str(cut), "--steps", "4"]) == 0
    one, two = (load_file(run / "checkpoints" / "step-4" / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)
    metrics = [m for m in read_metrics(whole) if "loss" in m]
    assert len(metrics) == 4 and all("cot/stopped" in m for m in metrics)


def test_an_entropy_bonus_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(UserError, match="soft tokens have no entropy bonus"):
        context("soft_tokens", "--entropy-coef", "0.01")
    context("soft_tokens", "--entropy-coef", "0.01", "--cot-mode", "hard")


@pytest.mark.parametrize("name, value", [("soft-tau", "1"), ("soft-top-k", "3"), ("sigma-scale", "1"),
                                         ("rms-mode", "row")])  # fmt: skip
def test_options_of_soft_tokens_are_refused_without_them(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is of soft tokens: it has no effect with --cot-mode hard"):
        context("soft_tokens", "--cot-mode", "hard", f"--{name}", value)
    with pytest.raises(UserError, match="--cot-stop: expected the text"):
        context("soft_tokens", "--cot-stop", "")


def test_no_room_for_a_chain_is_said() -> None:
    with pytest.raises(UserError, match="--cot-stop '<eos>' is a special token"):
        drawn(context("soft_tokens", "--cot-stop", "<eos>", "--answer-tokens", "4"))
    ctx = context("soft_tokens")
    with pytest.raises(UserError, match="--max-new-tokens 14 leaves no room"):
        drawn(ctx)
