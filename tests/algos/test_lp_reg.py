"""Lp-Reg: which tokens are selected, the worked numbers, and the loss through the model."""

import math
from functools import partial

import pytest
import torch

from pymathrl.algos import REGISTRY, lp_reg
from pymathrl.ops.policy_loss import policy_loss
from pymathrl.ops.token_logprob import token_logprob
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.algos.runs import short_run
from tests.tiny import tiny_policy

ALGO = REGISTRY["lp_reg"]


def test_worked_numbers():
    """p = [.60,.30,.08,.012,.008], kappa .02: the proxy keeps four; token 3, A = -1."""
    own = lp_reg.Config()
    logits = torch.tensor([[0.60, 0.30, 0.08, 0.012, 0.008]]).log().repeat(2, 1)
    proxy = token_logprob(logits, torch.tensor([3, 4]), min_p=own.lp_reg_kappa).proxy_logp
    assert proxy.exp().tolist() == pytest.approx([0.012097, 0.0], abs=1e-6)
    spec = ALGO.loss(own)

    def of(probability, ratio_to=0.012):
        out = policy_loss(
            torch.tensor([math.log(probability)]), torch.tensor([math.log(ratio_to)]), torch.tensor([-1.0]),
            torch.ones(1), form=spec.form, proxy_logp=proxy[:1], selected=torch.ones(1, dtype=torch.uint8),
            **spec.terms,
        )  # fmt: skip
        return float(out.loss), float(out.grad_logp)

    assert of(0.012) == pytest.approx((1.000032, 0.991935), abs=1e-5)
    assert of(0.006) == pytest.approx((0.814950, -0.516129), abs=1e-5)
    assert of(0.013) == pytest.approx((0.013 / 0.012, 0.013 / 0.012), abs=1e-5)
    assert spec.terms["clip_high"] == 9 and spec.aggregation == "token-mean"


def test_selection_by_hand():
    logp = torch.tensor([-1.0, -5.0, -4.0, -9.0, -3.0, -4.0])
    candidate = torch.tensor([True, True, True, False, True, True])
    assert lp_reg.least_likely(logp, candidate, 0.4).tolist() == [0, 1, 1, 0, 0, 0], "of equal ones the first"
    assert lp_reg.least_likely(logp, candidate, 0.6).tolist() == [0, 1, 1, 0, 0, 1]
    assert lp_reg.least_likely(logp, candidate, 0.39).sum() == 0, "one token alone is not selected"
    assert lp_reg.least_likely(logp, ~candidate, 1.0).sum() == 0


def test_candidates_are_sampled_tokens_of_negative_advantage_by_the_policy_as_it_is_now():
    policy = tiny_policy(seed=3)
    ctx = context("lp_reg", "--lp-reg-share", "0.5", policy=policy)
    rollout = sampled(policy, temperature=1.0)
    batch = make_batch(ctx, ALGO.judge(ctx, with_rewards(rollout, torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1]))))
    negative = rollout.sampled_mask & (batch.advantage < 0)
    count = int(negative.sum()) // 2

    def expected(logp):
        chosen = torch.zeros_like(negative)
        at = negative.nonzero()[:, 0]
        chosen[at[logp[at].sort(stable=True).indices[:count]]] = True
        return chosen

    scored = []
    ctx.score = lambda *a, real=ctx.score, **k: scored.append(1) or real(*a, **k)
    first = ALGO.terms(ctx, batch)["selected"].bool()
    assert first.equal(expected(rollout.logp)) and not scored, "the sampler's own numbers"
    move(policy, 0.1)
    ctx.learner.current.steps.append(None)
    second = ALGO.terms(ctx, batch)["selected"].bool()
    assert scored == [1]
    assert second.equal(expected(ctx.score(rollout).logp)) and not second.equal(first)
    # groups that waited under --filter were drawn by an older policy
    waiting = context("lp_reg", "--lp-reg-share", "0.5", "--filter", "mixed", policy=policy)
    assert ALGO.terms(waiting, batch)["selected"].bool().equal(second)


def test_the_proxy_is_of_the_policy_that_drew_and_stays():
    policy = tiny_policy(seed=3)
    ctx = context("lp_reg", "--lp-reg-kappa", "0.9", policy=policy)
    judged = ALGO.judge(ctx, with_rewards(sampled(policy, temperature=1.0), torch.arange(8.0)))
    proxy = judged.extra["proxy_logp"]
    mask = judged.rollout.sampled_mask
    kept = proxy[mask] > -1e3
    assert 0 < int(kept.sum()) < kept.numel(), "the case has tokens on both sides of kappa"
    assert bool((proxy[mask][kept] >= judged.rollout.logp[mask][kept]).all())
    # by hand: every token alone
    logits = torch.cat([part.logits for part in ctx.walk(judged.rollout)])
    p = torch.softmax(logits.double(), -1)
    q = torch.where(p >= 0.9 * p.amax(-1, keepdim=True), p, 0)
    own = (q / q.sum(-1, keepdim=True)).gather(1, judged.rollout.ids[mask, None])[:, 0]
    torch.testing.assert_close(proxy[mask][kept].exp().double(), own[kept], rtol=1e-5, atol=0)
    assert bool((own[~kept] == 0).all())
    move(policy, 0.1)
    assert make_batch(ctx, judged).extra["proxy_logp"].equal(proxy)


@pytest.mark.parametrize("budget", [10_000, 40])
def test_gradient_through_the_model_equals_the_equations_in_float64(budget):
    """The share of the optimizer step: the same for every cut into micro-batches."""
    policy = tiny_policy(seed=3)
    ctx = context("lp_reg", "--lp-reg-share", "0.4", "--lp-reg-kappa", "0.01", "--lp-reg-clip", "1.1",
                  "--lp-reg-coef", "0.7", "--temperature", "0.9", policy=policy)  # fmt: skip
    reward = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1])
    batch = make_batch(ctx, ALGO.judge(ctx, with_rewards(sampled(policy), reward)))
    move(policy)
    ctx.learner.current.steps.append(None)
    pulled = []

    def equations(rows):
        total = rows[0].logp.new_zeros(())
        for r in rows:
            plain = torch.maximum(-r.advantage * r.ratio, -r.advantage * r.ratio.clamp(0.0, 1.1))
            d = r.extra["proxy_logp"] - r.logp
            near = -r.advantage * r.ratio + 0.7 * (d.exp() - d - 1)
            on = (r.extra["selected"] > 0) & (d > 0)
            pulled.append(int(on.sum()))
            total = total + torch.where(on, near, plain).sum()
        return total / sum(len(r.logp) for r in rows)

    check_gradient(ctx, batch, equations, budget)
    assert sum(pulled) > 2


def test_without_a_share_it_is_the_clipped_loss():
    ctx = context("lp_reg", "--lp-reg-share", "0")
    case = graded([[1.0, 0.0, 0.0, 1.0]], extra={"proxy_logp": torch.zeros(12)})
    terms = partial(ALGO.terms, ctx)(make_batch(ctx, case))
    assert terms["selected"].dtype == torch.uint8 and int(terms["selected"].sum()) == 0


def test_a_short_run(tmp_path):
    metrics = short_run(tmp_path / "run", "lp_reg", "--lp-reg-share", "0.2", "--filter", "mixed")
    assert len(metrics) == 2 and metrics[-1]["selected"] > 0


def test_every_batch_begins_with_an_unmoved_policy():
    policy = tiny_policy(seed=3)
    ctx = context("lp_reg", "--minibatches", "2", policy=policy)
    batch = make_batch(ctx, ALGO.judge(ctx, with_rewards(sampled(policy), torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1]))))
    seen = []

    def terms(mini):
        seen.append(len(ctx.learner.current.steps))
        return ALGO.terms(ctx, mini)

    for _ in range(2):
        ctx.learner.update(batch, ALGO.loss(ctx.own), terms=terms)
    assert seen == [0, 1, 0, 1]
