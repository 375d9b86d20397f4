"""Bonuses for disagreement between two wordings: hand-worked numbers, contexts, and the update."""

import dataclasses

import pytest
import torch

from pymathrl.algos import vogue
from pymathrl.algos.vogue import Config, disagreement, shaped
from pymathrl.prompt import Prompts
from pymathrl.tasks import load_task
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, make_batch, move
from tests.models.plain import plain_hidden
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy


def test_disagreement_is_half_the_symmetric_kl():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    assert disagreement(p.log(), q.log()).item() == pytest.approx(0.088578, abs=1e-6)
    # logits, not log-probs, and either order
    assert disagreement(q.log() + 3.0, p.log() - 1.0).item() == pytest.approx(0.088578, abs=1e-6)
    # nearly equal distributions: no cancellation below 0
    assert disagreement(p.log(), p.log()).item() == 0.0


def test_bonuses_are_capped_by_shares_of_the_advantage():
    uncertainty, entropy = torch.tensor([0.05, 0.8, 0.3]), torch.tensor([0.2, 1.5, 2.0])
    for a, expected in ((0.5, [0.63, 1.0, 1.0]), (-0.5, [-0.37, 0.0, 0.0]), (0.0, [0.0, 0.0, 0.0])):
        got = shaped(torch.full((3,), a), uncertainty, entropy, Config())
        assert got.tolist() == pytest.approx(expected, abs=1e-6)
    got = shaped(torch.tensor([0.5]), uncertainty[1:2], entropy[1:2], Config(vogue_cap=5.0, vogue_entropy_coef=0.1))
    assert got.item() == pytest.approx(0.5 + 0.1 + 0.15)


def judged(ctx, progress=0.0, rewards=None):
    ctx.at.stage_step = round(progress * ctx.train.steps)
    prompts = ctx.draw(2)
    rollout = vogue.rollout(ctx, prompts, ctx.draws)
    graded = vogue.verify(ctx, rollout, prompts)
    reward = torch.tensor(rewards or [1.0, 0.1, 0.0, 1.0, 0.0, 0.1, 0.1, 1.0])
    return prompts, dataclasses.replace(graded, reward=reward, correct=reward == 1)


def vogue_context(*flags, policy=None):
    flags = ("--samples-per-prompt", "4", "--steps", "10", *flags)
    return context("vogue", "--prompts-per-step", "2", "--max-prompt-tokens", "64", *flags, policy=policy)


def test_share_of_other_wordings_falls_and_the_draws_stay():
    ctx = vogue_context("--vogue-start", "1", "--vogue-end", "0")
    prompts, first = judged(ctx)
    other, plain = vogue.reworded(ctx, first.rollout, first.problems)
    assert bool(other.all()) and plain[5] == ctx.encode(prompts.problems[1])
    for row in range(8):  # the same numbers in another order
        begin, n = int(first.rollout.offsets[row]), int(first.rollout.prompt_len[row])
        text = ctx.policy.tokenizer.decode(first.rollout.ids[begin : begin + n].tolist())
        numbers = text.split(" ->")[0].split()
        meta = prompts.problems[row // 4].meta["nums"]
        assert sorted(map(int, numbers)) == sorted(meta) and tuple(map(int, numbers)) != meta
    assert first.rollout.group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    first.rollout.validate()
    ctx.at.cursor = 0
    _, last = judged(ctx, progress=1.0)
    assert not bool(vogue.reworded(ctx, last.rollout, last.problems)[0].any())
    # all behind their own prompts: what any algorithm would have drawn, bit for bit
    same = ctx.generate(prompts)
    for name in ("ids", "logp", "uid", "group"):
        assert torch.equal(getattr(last.rollout, name), getattr(same, name)), name
    assert torch.equal(make_batch(ctx, last).advantage, make_batch(context("grpo"), last).advantage)


def test_a_letter_is_graded_by_the_options_that_the_row_read(tmp_path):
    file = tmp_path / "choice.jsonl"
    file.write_text('{"question": "2+2 = ?", "answer": "4", "options": ["3", "4", "5", "6"]}\n' * 2)
    ctx = vogue_context("--vogue-start", "1")
    task = load_task(file, split="all")

    class Spelled:  # the built-in vocabulary has no letters: prompts of digits, but graded as the task does
        reword, grade = task.reword, task.grade

        def prompt(self, problem, style):
            return f"{problem.question} {' '.join(problem.meta['options'])}\n<think>"

    ctx.task = Spelled()
    problem = task.test()[0]
    prompts = Prompts([problem], [ctx.encode(problem)])
    rollout = vogue.rollout(ctx, prompts, ctx.draws)
    texts = [f"<answer>{letter}</answer>" for letter in "ABCD"]
    decode = ctx.policy.tokenizer.decode_batch
    ctx.policy.tokenizer.decode_batch = lambda rows: texts
    try:
        graded = vogue.verify(ctx, rollout, prompts)
    finally:
        ctx.policy.tokenizer.decode_batch = decode
    for row, right in enumerate(graded.correct.tolist()):
        read = decode([rollout.ids[int(rollout.offsets[row]) :][: int(rollout.prompt_len[row])].tolist()])[0]
        assert right == (read.split("? ")[1].split()[row] == "4")
    assert graded.problems == [problem] and graded.rollout is rollout


def test_bonus_of_a_row_compares_its_context_with_the_plain_one():
    policy = tiny_policy(seed=3)
    move(policy, 0.2)  # a fresh model hardly reads its prompt
    ctx = vogue_context("--temperature", "0.9", policy=policy)
    # caps that never bind
    ctx.run = dataclasses.replace(ctx.run, own=Config(vogue_cap=1e-6, vogue_entropy_cap=1e-6))
    _, graded = judged(ctx)
    batch = make_batch(ctx, graded)
    plain_batch = make_batch(context("grpo", policy=policy), graded)
    other, plain = vogue.reworded(ctx, graded.rollout, graded.problems)
    assert 0 < int(other.sum()) < 8
    weights = {n: p.detach().double() for n, p in policy.model.named_parameters()}
    rollout = graded.rollout
    for row in range(8):
        begin, end = rollout.offsets[row : row + 2].tolist()
        at = slice(begin + int(rollout.prompt_len[row]), end)
        bonus = batch.advantage[at] - plain_batch.advantage[at]
        if not other[row]:
            assert not bool(bonus.any())
            continue
        kls = []
        for prompt in (plain[row], rollout.ids[begin : at.start].tolist()):
            ids = torch.tensor([*prompt, *rollout.ids[at].tolist()])
            hidden = plain_hidden(policy.config, weights, ids[:-1])[len(prompt) - 1 :]
            kls.append(torch.log_softmax(hidden @ weights["head"].T / 0.9, -1))
        a, b = kls
        u = ((a.exp() * (a - b)).sum(-1) + (b.exp() * (b - a)).sum(-1)) / 2
        assert float(u.max()) > 1e-3
        torch.testing.assert_close(bonus.double(), u + 0.4 * rollout.entropy[at].double(), atol=2e-6, rtol=1e-4)


def test_gradient_keeps_one_context_per_row_and_the_bonus_constant():
    policy = tiny_policy(seed=3)
    ctx = vogue_context("--temperature", "0.9", policy=policy)
    batch = make_batch(ctx, judged(ctx)[1])
    move(policy)

    def loss(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage).mean() for r in rows]
        return -torch.stack(terms).mean()

    check_gradient(ctx, batch, loss)


def test_groups_of_equal_rewards_stay_idle():
    ctx = vogue_context("--vogue-start", "1")
    _, graded = judged(ctx, rewards=[0.1] * 8)
    assert not bool(make_batch(ctx, graded).advantage.any())


def test_a_short_run_with_filters(tmp_path):
    out = tmp_path / "run"
    argv = ["--algo", "vogue", "--model", str(save_tiny(tmp_path / "model")), "--steps", "2", "--top-k", "5",
            "--out", str(out), *SMALL_RUN]  # fmt: skip
    assert main(argv) == 0
    steps = [m for m in read_metrics(out) if "loss" in m]
    assert len(steps) == 2 and steps[0]["vogue/reworded"] > 0
