"""CURE: the critical token by hand, branches that share a prefix and nothing else, the loss, both stages."""

import json
import random

import pytest
import torch

from pymathrl.algos import REGISTRY, cure
from pymathrl.batch import ROLE_FORCED, ROLE_SAMPLED
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, make_batch, move, with_rewards
from tests.algos.runs import RUN, short_run, steps
from tests.tiny import tiny_policy

ALGO = REGISTRY["cure"]
ENTROPY = [3.0, 0.2, 2.5, 0.1, 2.9, 1.0]
TEXTS = ["The", " ", "so", "", "Wait", "x"]  # the fourth is a special token


def chosen(count, by="entropy", least=2, texts=TEXTS):
    return {cure.critical_token(ENTROPY, texts, count, least, by, random.Random(i)) for i in range(60)}


def test_critical_token_by_hand():
    assert chosen(1) == {4} and chosen(2) == {4, 2}, "first, blank, special and one-letter tokens are skipped"
    assert chosen(20) == {4, 2}
    assert chosen(1, "random") == {4, 2}, "the control does not look at entropy"
    assert chosen(2, least=1) == {4, 2} and chosen(3, least=1) == {4, 2, 5}
    assert chosen(5, texts=["The", "a", " b ", "", "c", "d"]) == {0}, "none: all anew"


def drawn(policy=None, *flags):
    ctx = context("cure", "--samples-per-prompt", "8", "--prompts-per-step", "2", "--minibatches", "1",
                  "--max-new-tokens", "24", *flags, policy=policy or tiny_policy(seed=3))  # fmt: skip
    prompts = ALGO.draw(ctx, 2)
    return ctx, prompts, ALGO.rollout(ctx, prompts, ctx.draws)


def test_branches_share_a_prefix_that_is_not_trained():
    ctx, prompts, rollout = drawn()
    rollout.validate()
    assert rollout.group.tolist() == [0] * 8 + [1] * 8
    cuts = []
    for p, prompt in enumerate(prompts.ids):
        for i in range(2):
            root = rollout.response(8 * p + i).tolist()
            for b in range(3):
                row = 8 * p + 2 + 3 * i + b
                begin, end = rollout.offsets[row : row + 2].tolist()
                assert rollout.ids[begin : begin + len(prompt)].tolist() == list(prompt)
                assert int(rollout.prompt_len[row]) == len(prompt)
                role = rollout.role[begin + len(prompt) : end].tolist()
                cut = role.count(ROLE_FORCED)
                assert role == [ROLE_FORCED] * cut + [ROLE_SAMPLED] * (len(role) - cut) and len(role) <= 24
                assert rollout.response(row)[:cut].tolist() == root[:cut]
                cuts.append(cut)
    for at in range(0, 12, 3):
        assert len(set(cuts[at : at + 3])) == 1, "the branches of a response start at the same token"
    assert len(set(cuts)) > 2 and ctx.metrics["cure/cut"] == pytest.approx(sum(cuts) / len(cuts))
    problems = [p.uid for p in prompts.problems]
    assert rollout.uid.tolist() == [(uid << 16) + i for uid in problems for i in range(8)]
    # what was drawn is what the policy says in that context, bit for bit
    assert ctx.score(rollout).logp.equal(rollout.logp)
    assert drawn()[2].ids.equal(rollout.ids), "a pure function of the seed"
    assert not drawn(None, "--critical-by", "random")[2].ids.equal(rollout.ids)


def test_the_whole_answer_is_graded():
    ctx, prompts, rollout = drawn()
    texts = ctx.verify(rollout, prompts.problems).texts
    assert texts == ctx.policy.tokenizer.decode_batch([rollout.response(r).tolist() for r in range(16)])
    assert any(ROLE_FORCED in rollout.role[rollout.offsets[r] : rollout.offsets[r + 1]] for r in range(16))


def test_tokens_of_one_letter_are_critical_in_the_compact_style_only():
    policy = tiny_policy(seed=3)
    strict, _, rollout = drawn(policy, "--critical-chars", "2")
    forced = rollout.role == ROLE_FORCED
    roots = [rollout.response(row).tolist() for p in range(2) for row in (8 * p, 8 * p + 1)]
    tags = set(range(2, 6))
    cut = [int((forced & (rollout.row_of_token == 8 * p + 2 + 3 * i)).sum()) for p in range(2) for i in range(2)]
    assert all(c == 0 or root[c] in tags for c, root in zip(cut, roots, strict=True))
    assert strict.own.critical_chars == 2 and cure.Config().critical_chars == 0


def test_gradient_through_the_model_equals_the_equations_in_float64():
    policy = tiny_policy(seed=3)
    ctx, _, rollout = drawn(policy, "--clip-low", "0.1", "--clip-high", "0.15", "--dual-clip", "1.2")
    reward = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0])
    batch = make_batch(ctx, ALGO.judge(ctx, with_rewards(rollout, reward)))
    # one group: mean and std of all sixteen halves, responses and branches alike
    first = torch.where(reward[:8] == 1, 1.0, -1.0)
    at = rollout.offsets[1:] - 1
    expected = ((first - first.mean()) / first.std())[:8]
    assert batch.advantage[at][:8].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    move(policy)

    def equations(rows):
        total = rows[0].logp.new_zeros(())
        for r in rows:
            worst = torch.maximum(-r.advantage * r.ratio, -r.advantage * r.ratio.clamp(0.9, 1.15))
            total = total + torch.where(r.advantage < 0, torch.minimum(worst, -1.2 * r.advantage), worst).sum()
        return total / sum(len(r.logp) for r in rows)

    check_gradient(ctx, batch, equations, 100)


def test_a_group_that_does_not_divide():
    with pytest.raises(UserError, match="multiple of 4, got 6"):
        parse_train(["--algo", "cure", "--samples-per-prompt", "6"])
    assert parse_train(["--algo", "cure"]).train.filter == "mixed"


def test_a_schedule_of_both_stages(tmp_path):
    file, out = tmp_path / "run.toml", tmp_path / "run"
    options = {flag[2:].replace("-", "_"): value for flag, value in zip(RUN[::2], RUN[1::2], strict=True)}
    shared = [f"{name} = {value}" for name, value in options.items() if name != "device"]
    stages = ['[[stage]]', 'algo = "cure"', "steps = 1", "samples_per_prompt = 8",
              '[[stage]]', 'algo = "dapo"', "steps = 1", "max_new_tokens = 64"]  # fmt: skip
    file.write_text("\n".join([*shared, *stages]))
    assert main(["--algo", "cure", "--config", str(file), "--out", str(out), "--device", "cpu"]) == 0
    assert ["cure/cut" in m for m in steps(out)] == [True, False]
    assert json.loads((out / "summary.json").read_text())["steps"] == 2


def test_a_short_run(tmp_path):
    metrics = short_run(tmp_path / "run", "cure", "--samples-per-prompt", "8")
    assert len(metrics) == 2 and metrics[0]["cure/cut"] > 0
    assert metrics[0]["logp_gap/max"] == 0, "sampler and update see a branch in the same context"
