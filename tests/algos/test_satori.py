"""Satori: rewards by its table, restart states and what they may never do, and its outcome model."""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pymathrl.algos import REGISTRY, outcome, satori
from pymathrl.algos.common import last_sampled
from pymathrl.checkpoint import hash_parameters, load_state
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from pymathrl.optim import StepReport
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move, ragged, sampled, with_rewards
from tests.tiny import SMALL_RUN, read_metrics, tiny_policy

MANY = ("--samples-per-prompt", "4")


@pytest.mark.parametrize("logit, expected", [
    (0.0, {0: (0.5, -0.5), -1: (1.0, -0.5), 1: (0.5, -1.0)}),
    (2.0, {0: (0.880797, -0.119203), -1: (1.380797, -0.119203), 1: (0.880797, -0.619203)}),
])  # fmt: skip
def test_worked_rewards(logit, expected):
    for status, (right, wrong) in expected.items():
        got = satori.outcome_reward(torch.tensor([True, False]), torch.full((2,), status), torch.full((2,), logit), 0.5)
        assert got.tolist() == pytest.approx([right, wrong], abs=1e-6)


def test_rewards_are_bounded():
    got = satori.outcome_reward(torch.tensor([True, False]), torch.tensor([-1, 1]), torch.zeros(2), 50.0)
    assert got.tolist() == [10, -10]


def test_steps_end_at_a_mark_and_at_the_end():
    assert satori.step_ends(["1", "+2", "=3,", "4", ",", "</think>", "x"], ",") == [3, 5, 7]
    assert satori.step_ends(["a", "b\n"], "\n") == [2]
    assert satori.step_ends(["a", "b"], "\n") == [2]
    assert satori.step_ends([], ",") == [0]


def test_backtracking_takes_1_to_t_steps_and_leaves_one():
    drawn = lambda ends, most: {satori.backtrack(ends, most, random.Random(i)) for i in range(50)}
    assert drawn([3, 5, 7, 9], 1) == {7}
    assert drawn([3, 5, 7, 9], 2) == {7, 5}
    assert drawn([3, 5, 7, 9], 9) == {7, 5, 3}
    assert drawn([3], 4) == {0}


def stored(*flags, correct=(1.0, 0.0, 0.0), text="1+2=3,3+4=7,7+5=12</think><answer>7+5</answer>"):
    """A context that has seen one question per entry of `correct`, each answered by `text`."""
    ctx = context("satori", "--prompts-per-step", "8", "--samples-per-prompt", "1", *flags)
    ids = ctx.tokens(text)
    of = graded([[c] for c in correct], [[len(ids)] for _ in correct])
    of.rollout.ids[of.rollout.sampled_mask] = torch.tensor(ids * len(correct))
    ctx.memory.store(ctx, of)
    return ctx


def test_questions_give_restart_states_by_their_verdict():
    ctx = stored("--restart-back", "1")
    part = ctx.tokens("1+2=3,3+4=7,\n<think>")
    assert ctx.memory.states == {1: [(0, part)], -1: [(1, part), (2, part)]}
    assert ctx.tokens("</think>")[0] not in part, "no answer is left in it"


def test_a_question_with_both_kinds_gives_one_of_each():
    ctx = context("satori", "--prompts-per-step", "8", *MANY)
    ids = ctx.tokens("1+2=3,3")
    of = graded([[1.0, 0, 0, 1.0], [1.0] * 4], [[len(ids)] * 4] * 2)
    of.rollout.ids[of.rollout.sampled_mask] = torch.tensor(ids * 8)
    ctx.memory.store(ctx, of)
    assert {status: [uid for uid, _ in kept] for status, kept in ctx.memory.states.items()} == {1: [0, 1], -1: [0]}


def test_states_that_are_too_long_or_old_or_restarts_are_not_kept():
    assert not any(stored(text="1+2</think>").memory.states.values()), "one step"
    room = 1 + len("1+2=3,") + 2  # the shortest prompt that a state of one step needs
    assert any(stored("--max-prompt-tokens", str(room), "--restart-back", "9").memory.states.values())
    assert not any(stored("--max-prompt-tokens", str(room - 1)).memory.states.values())
    assert [uid for uid, _ in stored(correct=[0.0] * 11).memory.states[-1]] == list(range(3, 11))
    ctx = context("satori", "--prompts-per-step", "8", "--samples-per-prompt", "1")
    of = graded([[1.0]], [[7]])
    of.rollout.ids[of.rollout.sampled_mask] = torch.tensor(ctx.tokens("1+2=3,3"))
    ctx.memory.store(ctx, replace(of, problems=[replace(of.problems[0], meta={"restart": 1})]))
    assert not any(ctx.memory.states.values())


def test_prompts_of_a_step():
    ctx = stored("--restart-share", "0.5", correct=[1.0, 1.0, 1.0, 0.0])
    ctx.at.cursor = 100
    prompts = satori.draw(ctx, 8)
    by = {s: [p.uid for p in prompts.problems if p.meta.get("restart", 0) == s] for s in (1, -1, 0)}
    assert by[1] == [1, 2] or by[1] == [2, 1], "the newest, half of the share"
    assert by[-1] == [3] and sorted(by[0]) == [100, 101, 102, 103, 104] and ctx.at.cursor == 105
    assert ctx.memory.states == {1: ctx.memory.states[1], -1: []} and len(ctx.memory.states[1]) == 1
    place = [p.meta.get("restart", 0) for p in prompts.problems]
    assert place != sorted(place) and place != sorted(place, reverse=True), "mixed, for the minibatches"
    for problem, ids in zip(prompts.problems, prompts.ids, strict=True):
        plain = ctx.encode(ctx.task.train(problem.uid, 0))
        assert ids[: len(plain)] == plain
        assert ids[len(plain) :] == [] if "restart" not in problem.meta else ids[-2:] == ctx.tokens("\n<think>")
    assert not [p for p in satori.draw(stored("--restart-share", "0"), 8).problems if "restart" in p.meta]


def test_what_comes_before_the_response_is_prompt_and_random_numbers_are_new():
    ctx = stored(*("--restart-share", "1"), correct=[1.0, 0.0])
    ctx.at.cursor = 10
    prompts = satori.draw(ctx, 3)
    other = replace(prompts, problems=[ctx.task.train(p.uid, 0) for p in prompts.problems])
    rollout, plain = satori.rollout(ctx, prompts, ctx.draws), ctx.generate(other)
    assert rollout.prompt_len.tolist() == [len(ids) for ids in prompts.ids]
    status = [p.meta.get("restart", 0) for p in prompts.problems]
    expected = [(p.uid << 16) + satori.PLACE[s] for p, s in zip(prompts.problems, status, strict=True)]
    assert rollout.uid.tolist() == expected and sorted(status) == [-1, 0, 1]
    for row, s in enumerate(status):
        assert torch.equal(rollout.response(row), plain.response(row)) == (s == 0)


def test_no_answer_is_read_from_the_prompt():
    """A restart whose kept part holds a right answer, and a response without one: wrong."""
    ctx = stored()
    problem = ctx.task.train(0, 0)
    right = ctx.encode(problem) + ctx.tokens(f"</think><answer>{problem.meta['solution']}</answer>\n<think>")
    prompts = replace(
        satori.draw(ctx, 1), problems=[replace(problem, meta={**problem.meta, "restart": -1})], ids=[right]
    )
    rollout = satori.rollout(ctx, prompts, ctx.draws)
    assert not ctx.verify(rollout, prompts.problems).correct.any()


def test_judge_pays_for_correcting_and_for_not_spoiling():
    ctx = stored("--bonus-scale", "0.25")
    of = graded([[1.0], [0.0], [1.0], [0.1], [1.0], [0.0]])
    marks = [None, None, 1, 1, -1, -1]
    problems = [p if m is None else replace(p, meta={"restart": m}) for p, m in zip(of.problems, marks, strict=True)]
    got = satori.judge(ctx, replace(of, problems=problems))
    assert got.reward.tolist() == pytest.approx([0.5, -0.5, 0.5, -0.75, 0.75, -0.5])
    assert torch.equal(got.correct, of.correct) and got.extra["value"].shape == got.rollout.ids.shape
    assert ctx.metrics["satori/from_wrong"] == pytest.approx(1 / 3)
    assert ctx.metrics["satori/accuracy_from_right"] == 0.5


def test_advantages_are_whitened_with_the_biased_variance():
    values = torch.tensor([0, 0.2, 0.5, 0.6])
    batch = make_batch(context("satori", memory=False), graded([[1.0]], [[3]], extra={"value": values}))
    factor = 1.5**0.5
    assert batch.advantage.tolist() == pytest.approx(
        [0, 1.127910 * factor, -0.349795 * factor, -0.778115 * factor], abs=1e-5
    )


@pytest.mark.parametrize("budget", [10_000, 40])
def test_gradient_through_the_model(budget):
    policy = tiny_policy(seed=3)
    ctx = context("satori", "--temperature", "0.9", *MANY, policy=policy)
    of = with_rewards(ragged(sampled(policy)), torch.tensor([1.0, 0, 0, 1, 0, 0.1, 0.1, 1]))
    batch = make_batch(ctx, satori.judge(ctx, of))
    move(policy)

    def equations(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage) for r in rows]
        return -torch.cat(terms).mean()

    check_gradient(ctx, batch, equations, budget)


def test_pair_loss_by_hand():
    """Groups: one right over two wrong ones; only wrong ones; two right over one wrong one."""
    score = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 0.5, 0.25, 0.0], requires_grad=True)
    correct, group = [True, False, False, False, False, True, True, False], [0, 0, 0, 1, 1, 2, 2, 2]
    cost = lambda margin: math.log1p(math.exp(-margin))
    expected = ((cost(1) + cost(-1)) / 2 + (cost(0.5) + cost(0.25)) / 2) / 2
    total = outcome.pair_loss(score, correct, group)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    total.backward()
    assert score.grad[3:5].tolist() == [0, 0] and score.grad[0] < 0 < score.grad[1]
    assert float(score.grad.sum()) == pytest.approx(0, abs=1e-7)
    assert outcome.pair_loss(score, [True] * 3 + [False] * 5, [0, 0, 0, 1, 1, 2, 2, 2]) is None


def with_orm(*flags):
    policy = tiny_policy(seed=3)
    ctx = context("satori", "--orm", "bt", "--temperature", "0.9", "--critic-lr", "3e-3", *MANY, *flags, policy=policy)
    of = with_rewards(ragged(sampled(policy)), torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1]))
    return ctx, of


@pytest.mark.parametrize("budget", [10_000, 25])
def test_the_outcome_model_steps_along_the_gradient_of_the_pairs(budget):
    """Pairs lie in different micro-batches under the small budget."""
    ctx, of = with_orm("--tokens-per-microbatch", str(budget))
    orm, batch = ctx.memory.orm, make_batch(ctx, satori.judge(ctx, of))
    orm.model.value.data.copy_(torch.randn(32, generator=torch.Generator().manual_seed(1)))
    seen = {}

    def step(finite):
        seen.update({n: p.grad.clone() for n, p in orm.model.named_parameters()})
        return StepReport(0.0, 0.0, True)

    orm.optimizer.step = step
    outcome.learn(orm, batch)
    orm.model.zero_grad()
    scores = []
    for b in range(of.rollout.rows):
        begin, end = of.rollout.offsets[b : b + 2].tolist()
        fed = of.rollout.ids[begin : end - 1]
        scores.append(orm.model(fed, torch.tensor([0, len(fed)]), torch.tensor([len(fed) - 1]))[0])
    outcome.pair_loss(torch.stack(scores), of.correct.tolist(), of.rollout.group.tolist()).backward()
    for name, p in orm.model.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-3, atol=1e-5)


def test_the_outcome_model_learns_to_rank_and_then_counts_in_the_reward():
    ctx, of = with_orm("--orm-normalize", "batch")
    first = satori.judge(ctx, of)
    assert first.reward.tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, -0.5, -0.5, -0.5, 0.5]), "it knows nothing yet"
    batch = make_batch(ctx, first)
    losses = [satori.learn(ctx, batch)["orm/loss"] for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.2
    reward = satori.judge(ctx, of).reward
    own = outcome.scores(ctx.memory.orm, of.rollout)
    assert own[of.correct].min() > own[~of.correct].max()
    normal = (own - own.mean()) / own.std(correction=0)
    torch.testing.assert_close(reward, of.correct.float() - 1 + normal.sigmoid(), rtol=1e-5, atol=1e-5)
    ctx.run = replace(ctx.run, own=replace(ctx.own, orm_normalize="none"))
    torch.testing.assert_close(satori.judge(ctx, of).reward, of.correct.float() - 1 + own.sigmoid())


def test_the_score_is_read_where_the_last_token_was_drawn():
    ctx, of = with_orm()
    orm = ctx.memory.orm
    orm.model.value.data.normal_(generator=torch.Generator().manual_seed(1))
    at = last_sampled(of.rollout).nonzero()[:, 0]
    assert at.tolist() == (of.rollout.offsets[1:] - 1).tolist()
    assert torch.equal(outcome.scores(orm, of.rollout), orm.values(of.rollout)[at])


def test_state_goes_on_to_the_same_bits_and_a_new_stage_drops_the_restarts():
    ctx, of = with_orm()
    batch = make_batch(ctx, satori.judge(ctx, of))
    satori.learn(ctx, batch)
    ctx.memory.states = {1: [(4, [5, 6])], -1: [(7, [8])]}
    state = copy.deepcopy(ctx.memory.state_dict())
    first = [satori.learn(ctx, batch) for _ in range(3)]
    ctx.memory.states = {1: [], -1: []}
    ctx.memory.load_state_dict(state)
    assert ctx.memory.states == {1: [(4, [5, 6])], -1: [(7, [8])]}
    assert [satori.learn(ctx, batch) for _ in range(3)] == first
    ctx.at.stage = 1
    satori.draw(ctx, 2)
    assert ctx.memory.states == {1: [], -1: []} and ctx.memory.orm.optimizer.updates == 0


def test_refusals_and_phrases():
    with pytest.raises(UserError, match=r"--orm bt learns from .* got 1"):
        parse_train(["--algo", "satori", "--orm", "bt"])
    own = context("satori", "--reflect", "?<think>", memory=True)
    assert own.memory.phrase == own.tokens("?<think>")
    with pytest.raises(UserError, match="cannot encode"):
        context("satori", "--reflect", "Wait")
    assert REGISTRY["satori"].trained_beside == 2


def test_a_run_resumes_to_the_same_bits(tmp_path, capsys):
    """On the built-in model, whose responses have steps."""
    argv = ["--algo", "satori", *SMALL_RUN, "--orm", "bt", "--prompts-per-step", "8", "--samples-per-prompt", "4",
            "--max-new-tokens", "64", "--checkpoint-every", "2", "--eval-every", "0"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*argv, "--steps", "4", "--out", str(whole)]) == 0, capsys.readouterr().err
    assert main([*argv, "--steps", "2", "--out", str(cut)]) == 0
    assert main(["--resume", str(cut), "--steps", "4"]) == 0
    rows = [[m for m in read_metrics(run) if "loss" in m] for run in (whole, cut)]
    for name in ("loss", "reward", "critic/loss", "critic/value", "satori/from_wrong"):
        assert [m[name] for m in rows[0]] == [m[name] for m in rows[1]], name
    assert [m.get("orm/loss") for m in rows[0]] == [m.get("orm/loss") for m in rows[1]]
    assert rows[0][0]["satori/from_wrong"] == 0 < rows[0][1]["satori/from_wrong"]
    weights = [load_file(run / "checkpoints/step-4/model.safetensors") for run in (whole, cut)]
    assert hash_parameters(weights[0].items()) == hash_parameters(weights[1].items())
    states = [load_state(run / "checkpoints/step-4")["memory"] for run in (whole, cut)]
    assert states[0]["right"] == states[1]["right"] and states[0]["wrong"] == states[1]["wrong"] != []
