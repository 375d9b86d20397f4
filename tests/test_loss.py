"""The fused head against all logits at once under autograd, for every form, and its invariance under chunking."""

import dataclasses

import pytest
import torch

from pymathrl.advantage import advantage, mask_tokens
from pymathrl.algos import REGISTRY, LossSpec
from pymathrl.batch import STOP_LENGTH
from pymathrl.loss import TokenTerms, fused_policy_loss, minibatch_loss, with_options
from pymathrl.ops import IMPL
from pymathrl.ops.policy_loss import STATS, merge_stats, policy_loss_ref, works_on_sequences
from pymathrl.rollout import Engine
from tests.algos.cases import context, with_rewards
from tests.tiny import tiny_policy

N, D, V = 53, 24, 384
CUTS = torch.tensor([0, 1, 20, 37, 53])  # four sequences, one of a single token
SPECS = {
    "clip": LossSpec("clip", terms={"clip_low": 0.2, "clip_high": 0.28}),
    "clip-entropy": LossSpec("clip", terms={"clip_low": 0.2, "clip_high": 0.28, "entropy_coef": 0.01}),
    "weighted": LossSpec("weighted", terms={"weight": "clipped_ratio", "weight_low": 0.0, "weight_high": 1.2}),
    "sequence": LossSpec("sequence", terms={"sequence": "mean", "clip_low": 0.1, "clip_high": 0.1}),
    "rover": LossSpec("rover", terms={"rho": 1.0, "beta": 1.0}),
    "rover-response": LossSpec("rover", terms={"rover_level": "response", "rho": 2.0}),
    "vespo": LossSpec("vespo"),
    "clip-is-sequence": LossSpec("clip", terms={"tis_cap": 1.5, "tis_level": "sequence"}),
    "rover-is-geometric": LossSpec("rover", terms={"tis_cap": 1.02, "tis_level": "geometric"}),
}


def problem(spec):
    """Hidden states whose logits are about 5 N(0,1), tokens from the policy, old log-probs 0.3 N(0,1) away."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g)
    weight = torch.randn(V, D, generator=g) * 5 / D**0.5
    logits = hidden @ weight.T / 0.8
    targets = torch.multinomial(logits.softmax(-1), 1, generator=g)[:, 0]
    logps = logits.log_softmax(-1)
    old = logps.gather(1, targets[:, None])[:, 0] + 0.3 * torch.randn(N, generator=g)
    link = torch.ones(N, dtype=torch.uint8)
    link[CUTS[1:] - 1] = 0
    terms = TokenTerms(
        old_logp=old, advantage=torch.randn(N, generator=g), coef=torch.rand(N, generator=g) / N,
        old_mean_logp=logps.mean(-1) + 0.1 * torch.randn(N, generator=g), link=link, offsets=CUTS,
    )  # fmt: skip
    if spec.terms.get("tis_cap"):
        terms = dataclasses.replace(terms, extra={"behaviour_logp": old + 0.2 * torch.randn(N, generator=g)})
    return hidden, weight, targets, terms


def naive(hidden, weight, targets, terms, spec, dtype):
    """All logits at once, plain torch, autograd."""
    h, w = (t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
    logps = torch.log_softmax(h @ w.T / 0.8, -1)
    logp = logps.gather(1, targets[:, None])[:, 0]
    extra = {**spec.terms, **{name: t.to(dtype) for name, t in terms.extra.items()}}
    if spec.form == "rover" and "rover_level" not in extra:
        extra |= dict(mean_logp=logps.mean(-1).detach(), old_mean_logp=terms.old_mean_logp.to(dtype), link=terms.link)
    if works_on_sequences(spec.form, extra):
        extra |= dict(offsets=terms.offsets)
    if "entropy_coef" in extra:
        extra |= dict(entropy=-(logps.exp() * logps).sum(-1))
    out = policy_loss_ref(
        logp, terms.old_logp.to(dtype), terms.advantage.to(dtype), terms.coef.to(dtype), form=spec.form, **extra
    )
    out.loss.backward()
    return out.loss.detach(), h.grad, w.grad


def ours(hidden, weight, targets, terms, spec, chunk):
    h, w = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    out = fused_policy_loss(h, w, targets, terms, spec, temperature=0.8, chunk_rows=chunk)
    (3.0 * out.loss).backward()  # any factor must pass through
    return out.loss.detach(), h.grad / 3, w.grad / 3


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("chunk", [1000, 16, 1])
@pytest.mark.parametrize("name", SPECS)
def test_equals_all_logits_at_once(name, chunk):
    args = problem(SPECS[name])
    expected = naive(*args, SPECS[name], torch.float64)
    single = naive(*args, SPECS[name], torch.float32)
    got = ours(*args, SPECS[name], chunk)
    for what, g, e, s in zip(("loss", "hidden", "weight"), got, expected, single, strict=True):
        assert distance(g, e) <= 2 * distance(s, e) + 1e-6, (what, distance(g, e), distance(s, e))


def test_the_comparison_rejects_wrong_heads():
    """Mutants: temperature forgotten, link over a sequence end, one token shifted, a chunk's mean for the step's."""
    spec = SPECS["rover"]
    args = problem(spec)
    hidden, weight, targets, terms = args
    expected = naive(*args, spec, torch.float64)
    shifted = torch.roll(targets, 1)
    across = terms.link.clone()
    across[CUTS[1:-1] - 1] = 1  # from the last token of a sequence to the first of the next
    mutants = {
        "temperature": (hidden / 0.8, weight, targets, terms),
        "link": (hidden, weight, targets, dataclasses.replace(terms, link=across)),
        "target": (hidden, weight, shifted, terms),
        "normaliser": (hidden, weight, targets, dataclasses.replace(terms, coef=terms.coef * 2)),
    }
    for name, mutant in mutants.items():
        got = ours(*mutant, spec, 16)
        assert distance(got[2], expected[2]) > 1e-3, name


def test_idle_rows_change_nothing_and_are_counted():
    policy = tiny_policy(seed=1)
    algo = REGISTRY["grpo"]
    prompts = [policy.tokenizer.encode(t) for t in ("3 4 -> 7\n<think>", "1 5 9 -> 15\n<think>")]
    rollout = Engine(policy, seed=2).generate(prompts, 4, 8)
    reward = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.0, 1.0, 0.0, 0.0])  # the first group teaches nothing
    batch = advantage(context("grpo", policy=policy), with_rewards(rollout, reward))
    spec = algo.loss(algo.config())
    options = dict(temperature=1.0, token_budget=1000, max_new_tokens=8)
    skipped = minibatch_loss(policy.model, batch, range(8), spec, **options)
    first = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    whole = minibatch_loss(policy.model, batch, range(8), dataclasses.replace(spec, idle_when_zero=False), **options)
    second = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert (skipped.idle_rows, whole.idle_rows) == (4, 0)
    assert skipped.tokens == whole.tokens and skipped.rows == whole.rows == 8
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("extra", [(), ("--entropy-coef", "0.1")])
def test_a_minibatch_of_truncated_responses_has_no_loss_when_these_are_masked(extra):
    policy = tiny_policy(seed=1)
    ctx = context("hapo", "--truncated", "mask", "--kl", "none", *extra, policy=policy)
    rollout = Engine(policy, seed=2).generate([[3, 4]], 4, 2)
    rollout = dataclasses.replace(rollout, stop=torch.full_like(rollout.stop, STOP_LENGTH))
    batch = mask_tokens(advantage(ctx, with_rewards(rollout, torch.tensor([0.0, 1.0, 0.0, 0.0]))), ctx.train)
    ctx.learner.update(batch, with_options(ctx.run.algo.loss(ctx.own), ctx.train, -1.0))
    (report,) = ctx.learner.current.losses
    assert (float(report.loss), report.tokens, report.idle_rows) == (0.0, 0, 4)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}], ids=["", "filtered"])
@pytest.mark.parametrize("name", ["rover", "grpo"])
def test_any_cut_into_micro_batches_gives_the_same_gradient(name, filters):
    """Contract C11. The log-probs have the same bits in every cut, so the loss differs by the order in which its fp32
    sums are added, and so do the gradients: fewer than 100 terms, each rounded to 6e-8, stay within 1e-5."""
    policy = tiny_policy(seed=1)
    algo = REGISTRY[name]
    prompts = [policy.tokenizer.encode(t) for t in ("3 4 -> 7\n<think>", "1 5 9 -> 15\n<think>")]
    rollout = Engine(policy, seed=2).generate(prompts, 4, 9, **filters)
    reward = torch.tensor([0.1, 1.0, 0.1, 0.1, 0.0, 1.0, 0.0, 0.0])
    batch = advantage(context(name, policy=policy), with_rewards(rollout, reward))
    with torch.no_grad():  # the policy has moved: ratios other than 1
        generator = torch.Generator().manual_seed(0)
        for p in policy.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    gradients, losses, tables = [], [], []
    for budget, rows in ((10_000, range(8)), (60, range(8)), (1, range(8)), (45, (5, 4, 7, 6, 0, 3, 2, 1))):
        policy.model.zero_grad()
        spec, options = algo.loss(algo.config()), dict(temperature=1.0, max_new_tokens=9)
        report = minibatch_loss(policy.model, batch, rows, spec, token_budget=budget, **options)
        assert report.tokens == int(rollout.sampled_mask.sum()) and report.rows == 8
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
        losses.append(float(report.loss))
        tables.append(dict(zip(STATS, merge_stats(report.stats).tolist(), strict=True)))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5, abs=1e-7)
    for g, table in zip(gradients[1:], tables[1:], strict=True):
        assert distance(g, gradients[0]) < 1e-5
        assert (table["ratio_max"], table["tokens"]) == pytest.approx((tables[0]["ratio_max"], tables[0]["tokens"]))
    if IMPL == "kernel":  # maxima have no order: the same bits
        assert len({table["log_ratio_abs_max"] for table in tables}) == 1
    assert tables[0]["log_ratio_abs_max"] > 0.01


def test_the_comparison_rejects_a_normaliser_of_the_micro_batch():
    """Mutant: each micro-batch divided by its own rows and tokens, then averaged, as gradient accumulation often is."""
    policy = tiny_policy(seed=1)
    algo = REGISTRY["grpo"]
    rollout = Engine(policy, seed=2).generate([policy.tokenizer.encode("3 4 -> 7\n<think>")], 6, 20)
    reward = (torch.arange(6) % 2).float()
    batch = advantage(context("grpo", policy=policy), with_rewards(rollout, reward))
    spec = dataclasses.replace(algo.loss(algo.config()), aggregation="token-mean")
    options = dict(temperature=1.0, max_new_tokens=20, token_budget=10_000)

    def gradient(parts):
        policy.model.zero_grad()
        for part in parts:
            minibatch_loss(policy.model, batch, part, spec, **options)
        return torch.cat([p.grad.flatten() for p in policy.model.parameters()]) / len(parts)

    assert rollout.response_lengths.unique().numel() > 1
    assert distance(gradient([[0], [1], [2], [3], [4], [5]]), gradient([range(6)])) > 1e-2
