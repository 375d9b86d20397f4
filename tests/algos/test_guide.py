"""Hints for failed groups: which rows are trained, under which context, and how the clip treats them."""

import dataclasses

import pytest
import torch

from pymathrl.algos import guide
from pymathrl.batch import Batch
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from pymathrl.ops.policy_loss import policy_loss
from pymathrl.tasks import Problem, load_task
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy


def test_advantages_and_loss_of_the_worked_example():
    only = guide.ALGO.advantage(context("guide"), graded([[1.0, 0.0, 1.0, 0.0]]))
    assert only.tolist() == pytest.approx([0.866024, -0.866024, 0.866024, -0.866024], abs=1e-5)
    union = guide.ALGO.advantage(context("guide"), graded([[0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]]))
    assert union.tolist() == pytest.approx([-0.540061] * 4 + [1.620182, -0.540061] * 2, abs=1e-5)
    plain, hinted = torch.tensor([-1.20, -0.10]), torch.tensor([-0.20, -0.15])
    terms = guide.ALGO.loss(guide.Config()).terms
    for a, loss, gradient in ((0.866025, -0.614510, [-0.318593, -0.910427]), (-0.866025, 0.801624, [0.0, 0.910427])):
        out = policy_loss(plain, hinted, torch.full((2,), a), torch.full((2,), 0.5), form="clip", **terms)
        assert out.loss.item() == pytest.approx(loss, abs=1e-5)
        # a token that only the hint made likely: pulled weakly where A > 0, not pushed at all where A < 0
        assert out.grad_logp.tolist() == pytest.approx([g / 2 for g in gradient], abs=1e-5)
        assert (out.grad_logp[0].item() == 0.0) == (a < 0)


def guide_context(*flags, policy=None):
    flags = ("--samples-per-prompt", "4", "--prompts-per-step", "4", "--max-prompt-tokens", "64", *flags)
    return context("guide", *flags, policy=policy)


def judged(monkeypatch, ctx, first, second):
    """A judged step in which the first draw is right where `first` says so, and the hinted draw where `second` does."""
    prompts = ctx.draw(len(first))
    verdicts = [torch.tensor(first).flatten(), torch.tensor(second).flatten()]
    verify = ctx.verify

    def verdict(rollout, problems):
        right = verdicts.pop(0)
        assert right.numel() == rollout.rows
        return dataclasses.replace(verify(rollout, problems), reward=right.float(), correct=right)

    monkeypatch.setattr(ctx, "verify", verdict)
    rollout = ctx.generate(prompts)
    return rollout, prompts, guide.judge(ctx, ctx.verify(rollout, prompts.problems))


NO, ONE = [False] * 4, [False, True, False, False]


@pytest.mark.parametrize("rows", ["guided_only", "union"])
def test_failed_groups_are_drawn_again_and_trained_behind_the_plain_prompt(monkeypatch, rows):
    """Groups: solved; failed and solved with the hint; failed twice."""
    ctx = guide_context("--guide-rows", rows, policy=tiny_policy(seed=3))
    drawn = ctx.at.tokens
    first, prompts, out = judged(monkeypatch, ctx, [ONE, NO, NO], [ONE, NO])
    rollout = out.rollout
    rollout.validate()
    size = [4, 4 if rows == "guided_only" else 8, 4]
    assert rollout.group_offsets.diff().tolist() == size
    assert out.correct.tolist() == ONE + ([] if rows == "guided_only" else NO) + ONE + NO
    assert len(out.texts) == len(out.grades) == sum(size)
    assert ctx.at.tokens - drawn > 0
    hinted = list(range(sum(size) - 8, sum(size) - 4))
    ids = rollout.ids.tolist()
    for row in range(rollout.rows):  # nobody's context holds a hint
        begin, n = int(rollout.offsets[row]), int(rollout.prompt_len[row])
        assert ids[begin : begin + n] == prompts.ids[int(rollout.group[row])]
    # second look: other samples of the same problem, so other identities
    uid = prompts.problems[1].uid << 16
    assert rollout.uid[hinted].tolist() == [uid + 4, uid + 5, uid + 6, uid + 7]
    assert rollout.uid[:4].tolist() == first.uid[:4].tolist()
    # the begun thought is part of the response, certain where the hint stood: log-prob 0; what follows has its own
    problem = prompts.problems[1]
    note = guide.hint_of(ctx.task, problem, "compact", 0)
    assert note and ctx.encode(problem, note) == prompts.ids[1] + ctx.tokens(note)
    rows_of_hint = rollout.select(hinted)
    for row in range(4):
        begin = int(rows_of_hint.offsets[row]) + len(prompts.ids[1])
        end, last = begin + len(ctx.tokens(note)), int(rows_of_hint.offsets[row + 1])
        assert rows_of_hint.ids[begin:end].tolist() == ctx.tokens(note)
        assert bool(rows_of_hint.sampled_mask[begin:last].all())
        assert not bool(rows_of_hint.logp[begin:end].any())
        score = ctx.score(rows_of_hint).logp
        assert torch.equal(score[end:last], rows_of_hint.logp[end:last]) and bool((score[begin:end] < -1e-3).all())
    # the group that failed twice is out of the update, whatever its rewards
    batch = make_batch(ctx, out)
    gone = rollout.per_token(torch.arange(rollout.rows) >= sum(size) - 4)
    assert not bool(batch.coef[gone & rollout.sampled_mask].any())
    assert bool((batch.coef[~gone & rollout.sampled_mask] == 1).all())
    assert ctx.metrics["guide/failed"] == 2 and ctx.metrics["guide/solved"] == 1


def test_a_hint_within_the_prompt_is_exchanged_for_the_plain_prompt(monkeypatch):
    """As in every style but the built-in model's: log-probs stay those behind the hint."""
    policy = tiny_policy(seed=3)
    move(policy, 0.2)
    ctx = guide_context(policy=policy)
    shown = lambda problem, note="": ctx.tokens(f"{problem.question}{' ?7' if note else ''}\n<think>")
    monkeypatch.setattr(ctx, "encode", shown)
    _, prompts, out = judged(monkeypatch, ctx, [NO, ONE], [ONE])
    rollout = out.rollout.select(range(4))
    assert rollout.prompt_len.tolist() == [len(prompts.ids[0])] * 4
    behind_hint = rollout.with_prompts([shown(prompts.problems[0], "x")] * 4)
    score = ctx.score(behind_hint)
    assert torch.equal(score.logp, behind_hint.logp) and torch.equal(score.entropy, behind_hint.entropy)
    assert float((ctx.score(rollout).logp - rollout.logp).abs().max()) > 1e-3


def test_ratio_modes(monkeypatch):
    for mode in ("hinted_over_hinted", "none"):
        ctx = guide_context("--guide-ratio", mode, policy=tiny_policy(seed=3))
        _, prompts, out = judged(monkeypatch, ctx, [NO], [ONE])
        score = ctx.score(out.rollout)  # both ratios are 1 at the first optimizer step, in their own contexts
        assert torch.equal(score.logp, out.rollout.logp)
        note = guide.hint_of(ctx.task, prompts.problems[0], "compact", 0)
        length = len(prompts.ids[0]) + (len(ctx.tokens(note)) if mode == "hinted_over_hinted" else 0)
        assert out.rollout.prompt_len.tolist() == [length] * 4


def test_threshold(monkeypatch):
    ctx = guide_context("--guide-threshold", "1", policy=tiny_policy(seed=3))
    _, _, out = judged(monkeypatch, ctx, [ONE, [True, True, False, False]], [NO])
    # one right answer is few enough for a hint; the hint does not help, so the group stays and is trained
    assert out.correct.tolist() == [*ONE, True, True, False, False]
    assert bool((out.extra["guide_keep"] == 1).all())
    assert ctx.metrics["guide/hinted"] == 1


def test_without_failures_it_is_grpo_bit_for_bit(monkeypatch):
    policy = tiny_policy(seed=3)
    ctx = guide_context(policy=policy)
    _, _, out = judged(monkeypatch, ctx, [ONE, ONE], [])
    ours, plain = make_batch(ctx, out), make_batch(context("grpo", policy=policy), out)
    for name in ("advantage", "coef", "weight"):
        assert torch.equal(getattr(ours, name), getattr(plain, name))


def test_gradient_is_that_of_the_plain_context_over_the_hinted_one(monkeypatch):
    policy = tiny_policy(seed=3)
    ctx = guide_context("--temperature", "0.9", "--guide-rows", "union", policy=policy)
    _, _, out = judged(monkeypatch, ctx, [ONE, NO, NO], [ONE, NO])
    batch = make_batch(ctx, out)
    move(policy)

    def loss(rows):
        terms = [
            (torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage) * r.coef).mean() for r in rows
        ]
        return -torch.stack(terms).mean()

    assert isinstance(batch, Batch)
    check_gradient(ctx, batch, loss)


def test_hints(tmp_path):
    countdown = load_task("countdown")
    problem = Problem(0, "3 4 5 -> 17", "17", {"nums": (3, 4, 5), "target": 17})
    compact = guide.hint_of(countdown, problem, "compact", 0)
    assert compact.count("=") == 1 and compact.endswith(",")  # of two steps the first
    assert guide.hint_of(countdown, problem, "chat", 0) == f"Hint: a solution may begin like this: {compact[:-1]}"
    # one step would be the answer, and what cannot be solved has no hint
    for nums, target in (((3, 4), 7), ((2, 2, 2), 97)):
        hard = Problem(0, "?", str(target), {"nums": nums, "target": target})
        assert guide.hint_of(countdown, hard, "compact", 0) == ""
    file = tmp_path / "questions.jsonl"
    file.write_text(
        '{"question": "a?", "answer": "one\\ntwo\\nthree\\nfour\\n#### 4"}\n{"question": "b?", "answer": "5"}\n'
        '{"question": "c?", "answer": "6", "hint": "Think of six."}\n'
    )
    questions = load_task(file, split="all")
    assert [guide.hint_of(questions, p, "plain", 0) for p in questions.test()] == [
        "Hint: a solution may begin like this: one\ntwo", "", "Hint: Think of six.",
    ]  # fmt: skip


def test_options_that_lose_the_sampler_are_refused():
    for flags in (["--old-logp", "recompute"], ["--top-k", "5"], ["--top-p", "0.9"], ["--min-p", "0.1"]):
        with pytest.raises(UserError, match=flags[0]):
            parse_train(["--algo", "guide", *flags])


def test_a_short_run_with_a_filter_and_a_reference(tmp_path):
    out = tmp_path / "run"
    argv = ["--algo", "guide", "--model", str(save_tiny(tmp_path / "model")), "--steps", "2", "--kl", "k3",
            "--out", str(out), *SMALL_RUN]  # fmt: skip
    assert main(argv) == 0
    steps = [m for m in read_metrics(out) if "loss" in m]
    assert len(steps) == 2 and steps[0]["guide/failed"] == 4
