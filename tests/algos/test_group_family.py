"""Dr. GRPO, DAPO, GSPO, CISPO, RLOO, CAMPO and AceReason: worked numbers, and gradients through the real model."""

from dataclasses import replace

import pytest
import torch

from pymathrl.algos import REGISTRY, campo, dapo
from pymathrl.batch import STOP_EOS, STOP_LENGTH
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.tiny import tiny_policy

TWO = [[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
GRPO = [0.866024, -0.866024, -0.866024, 0.866024, 1.499997, -0.499999, -0.499999, -0.499999]


@pytest.mark.parametrize(
    "name, flags, expected",
    [
        ("dr_grpo", [], [0.5, -0.5, -0.5, 0.5, 0.75, -0.25, -0.25, -0.25]),
        ("dapo", [], GRPO),
        ("gspo", [], GRPO),
        ("cispo", [], GRPO),
        ("rloo", [], [2 / 3, -2 / 3, -2 / 3, 2 / 3, 1, -1 / 3, -1 / 3, -1 / 3]),
        ("campo", [], GRPO),
        ("acereason", [], GRPO),
    ],
)
def test_advantages_of_two_groups(name, flags, expected):
    got = REGISTRY[name].advantage(context(name, *flags), graded(TWO))
    assert got.tolist() == pytest.approx(expected, abs=2e-5)


def clipped(low, high, dual=None):
    """The clipped term of each token, a list of one tensor per response."""

    def terms(rows):
        out = []
        for r in rows:
            loss = -torch.minimum(r.ratio * r.advantage, r.ratio.clamp(1 - low, 1 + high) * r.advantage)
            if dual is not None:
                loss = torch.where(r.advantage < 0, torch.minimum(loss, -dual * r.advantage), loss)
            out.append(loss)
        return out

    return terms


def token_mean(terms):
    return lambda rows: torch.cat(terms(rows)).mean()


def sequence(low, high, mean=True):
    def loss(rows):
        out = []
        for r in rows:
            x = r.logp - r.old_logp
            s, a = (x.mean() if mean else x.sum()).exp(), r.advantage[0]
            out.append(-torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a))
        return torch.stack(out).mean()

    return loss


def cispo(low, high):
    return lambda rows: torch.cat([-r.ratio.clamp(low, high).detach() * r.advantage * r.logp for r in rows]).mean()


def reinforce_sum(rows):
    return torch.stack([-(r.advantage * r.logp).sum() for r in rows]).mean()


EQUATIONS = {
    "dr_grpo": (
        "dr_grpo",
        ["--clip-low", "0.1"],
        lambda rows: sum(t.sum() for t in clipped(0.1, 0.2)(rows)) / (8 * 12),
    ),
    "dapo": ("dapo", [], token_mean(clipped(0.2, 0.28, 10))),
    "dapo, dual clip in reach": ("dapo", ["--dual-clip", "1.05"], token_mean(clipped(0.2, 0.28, 1.05))),
    "gspo": ("gspo", ["--clip-low", "0.02", "--clip-high", "0.03"], sequence(0.02, 0.03)),
    "cispo": ("cispo", ["--weight-high", "1.05"], cispo(0, 1.05)),
    "rloo": ("rloo", [], reinforce_sum),
    "rloo, clip": ("rloo", ["--rloo-form", "clip"], lambda rows: sum(t.sum() for t in clipped(0.2, 0.2)(rows)) / 8),
    "rloo, sequence": ("rloo", ["--rloo-form", "sequence"], sequence(0.2, 0.2, mean=False)),
    "campo": ("campo", [], token_mean(clipped(0.2, 0.28, 10))),
    "acereason": ("acereason", [], lambda rows: torch.cat([-r.advantage * r.logp for r in rows]).mean()),
}


@pytest.mark.parametrize("case", EQUATIONS)
def test_gradients_through_the_model_equal_the_equations_in_float64(case):
    name, flags, equations = EQUATIONS[case]
    policy = tiny_policy(seed=3)
    ctx = context(name, *flags, "--temperature", "0.9", policy=policy)
    reward = torch.tensor([1.0, 0.1, 0.0, 1.0, 0.0, 0.1, 0.1, 1.0])
    batch = make_batch(ctx, with_rewards(sampled(policy), reward))
    move(policy)
    check_gradient(ctx, batch, equations, token_budget=60)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["cispo", "--weight-low", "2"], "expected --weight-low <= --weight-high, got 2.0 and 1.2"),
        (["dapo", "--overlong-factor", "2"], "--overlong-factor has no effect with --overlong-buffer 0"),
        (["dapo", "--overlong-buffer", "65"], "--overlong-buffer: expected at most --max-new-tokens 64, got 65"),
        (["cure", "--overlong-buffer", "65"], "--overlong-buffer: expected at most --max-new-tokens 64, got 65"),
    ],
)
def test_options_that_do_not_fit(flags, words):
    with pytest.raises(UserError, match=words):
        parse_train(["--algo", *flags])


def test_dapo_rewards_are_plus_and_minus_one_less_what_is_too_long():
    limit = torch.tensor([3000, 3584, 3840, 4096])
    assert dapo.overlong_penalty(limit, 4096, 512, 1.0).tolist() == [0.0, 0.0, -0.5, -1.0]  # UT-D1
    rows = graded([[1.0, 0.1, 0.0, 1.0]], [[4, 8, 10, 12]])
    plain = dapo.judge(context("dapo"), rows)
    assert plain.reward.tolist() == [1, -1, -1, 1]
    punished = dapo.judge(context("dapo", "--overlong-buffer", "4", "--overlong-factor", "0.5"), rows)
    assert punished.reward.tolist() == [1, -1, -1.25, 0.5]
    assert plain.correct.tolist() == rows.correct.tolist()  # the filter looks at these


def definition(ids):
    """f by its words: blocks of b tokens from the end leftwards, the largest b with two equal ones wins."""
    n, start = len(ids), None
    for b in range(1, n // 2 + 1):
        left = n - b
        while left - b >= 0 and ids[left - b : left] == ids[left : left + b]:
            left -= b
        if left < n - b:
            start = left
    return 0.0 if start is None else (n - start) / n


def test_repetition_of_the_worked_examples_and_by_its_definition():
    cases = {(1, 2, 3, 3, 3, 3, 3, 3): 0.75, tuple(range(1, 9)): 0, (9, 1, 2, 1, 2, 1, 2, 1, 2, 1): 0.8,
             (5, 7, 1, 2, 3, 1, 2, 3): 0.75, (1, 2, 9, 9, 9, 8, 9, 9, 9, 8): 0.8, (): 0, (4,): 0}  # fmt: skip
    for ids, f in cases.items():
        assert campo.repetition(ids) == f == definition(list(ids)), ids
    generator = torch.Generator().manual_seed(0)
    for n in range(2, 40):
        for _ in range(20):
            ids = torch.randint(0, 2, (n,), generator=generator).tolist()
            assert campo.repetition(ids) == definition(ids), ids
    assert campo.repetition([7] * 50_000) == 1.0  # linear: the definition would take minutes


def test_campo_takes_the_repetition_off_the_reward(monkeypatch):
    f = {0: 0.0, 1: 0.75, 2: 0.0, 3: 0.0}
    rows = graded([[1.0, 0.0, 0.0, 1.0]], stops=[STOP_EOS, STOP_LENGTH, STOP_EOS, STOP_EOS])
    numbers = iter(f.values())
    monkeypatch.setattr(campo, "repetition", lambda ids: next(numbers))
    ctx = context("campo")
    paper = campo.ALGO.advantage(ctx, campo.judge(ctx, rows))
    assert paper.tolist() == pytest.approx([0.808008, -1.248739, -0.367276, 0.808008], abs=1e-5)
    numbers, ctx = iter(f.values()), context("campo", "--repetition", "code")
    code = campo.ALGO.advantage(ctx, campo.judge(ctx, rows))
    assert code.tolist() == pytest.approx([0.864067, -0.946359, -0.781775, 0.864067], abs=1e-5)
    numbers, finished = iter(f.values()), graded([[1.0, 0.0, 0.0, 1.0]])
    assert campo.judge(ctx, finished).reward.tolist() == [1, 0, 0, 1]  # the script looks at cut responses only
    numbers, ctx = iter(f.values()), context("campo", "--repetition", "off")
    assert campo.judge(ctx, rows).reward.tolist() == [1, 0, 0, 1]


def test_campo_looks_for_repetition_before_the_end_token():
    """Both responses end in 3, 3, 3, 3, of which one has an end token behind it."""
    rows, ctx = graded([[0.0, 0.0]], [[5, 5]], stops=[STOP_LENGTH, STOP_EOS]), context("campo")
    ids, end = rows.rollout.ids.clone(), ctx.policy.eos_ids[0]
    ids[rows.rollout.sampled_mask] = torch.tensor([9, 3, 3, 3, 3, 3, 3, 3, 3, end])
    rows = replace(rows, rollout=replace(rows.rollout, ids=ids))
    assert campo.judge(ctx, rows).reward.tolist() == pytest.approx([-0.8, -1.0])


def test_acereason_makes_one_update_per_batch_and_pays_for_correctness_only():
    with pytest.raises(UserError, match=r"one update per rollout batch.*got 2 and 1"):
        parse_train(["--algo", "acereason", "--minibatches", "2"])
    rows = graded([[1.0, 0.1, 0.1, 0.0]])
    assert REGISTRY["acereason"].judge(context("acereason"), rows).reward.tolist() == [1, 0, 0, 0]
