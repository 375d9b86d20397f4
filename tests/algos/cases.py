"""Graded rollouts made by hand, and what an algorithm's hooks need to run on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from pymathrl.advantage import advantage, mask_tokens, reference_terms
from pymathrl.algos import REGISTRY
from pymathrl.batch import ROLE_FORCED, ROLE_PROMPT, ROLE_SAMPLED, STOP_EOS, Batch, Graded, Rollout
from pymathrl.config import parse_train
from pymathrl.context import Context, Position
from pymathrl.learner import Learner
from pymathrl.loss import minibatch_loss, with_options
from pymathrl.rollout import Engine
from pymathrl.tasks import Grade, Problem, load_task
from tests.models.plain import plain_hidden
from tests.tiny import tiny_policy


def context(name: str, *flags: str, policy: Any = None, memory: bool = True) -> Context:
    """A context of `--algo name` with these flags, on a tiny random model and Countdown."""
    small = ("--prompts-per-step", "4", "--minibatches", "1", "--max-new-tokens", "12", "--device", "cpu")
    run = parse_train(["--algo", name, *(small if "--prompts-per-step" not in flags else small[2:]), *flags])
    learner = Learner(policy or tiny_policy(seed=3), run.train, updates=10)
    ctx = Context(run, learner, load_task("countdown"), Position(), note=lambda text: None)
    make = REGISTRY[name].memory
    ctx.memory = make(ctx) if make is not None and memory else None
    return ctx


def graded(
    rewards: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]] | None = None,
    *,
    correct: Sequence[Sequence[bool]] | None = None,
    logp: Sequence[Sequence[float]] | None = None,
    texts: Sequence[str] | None = None,
    stops: Sequence[int] | None = None,
    uids: Sequence[int] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
) -> Graded:
    """rewards[p][g] of each response, lengths[p][g] its sampled tokens [2 each], behind a prompt of one token.

    correct: whether the reward is 1, unless given. logp: of each response's tokens, rows in order. Ids count from 3.
    """
    flat = [r for row in rewards for r in row]
    size = [n for row in lengths for n in row] if lengths else [2] * len(flat)
    group = torch.tensor([p for p, row in enumerate(rewards) for _ in row])
    offsets = torch.tensor([0, *[n + 1 for n in size]]).cumsum(0)
    tokens = int(offsets[-1])
    first = torch.zeros(tokens, dtype=torch.bool)
    first[offsets[:-1]] = True
    values = torch.zeros(tokens)
    values[~first] = -1.0 if logp is None else torch.tensor([x for row in logp for x in row])
    right = torch.tensor([c for row in correct for c in row]) if correct else torch.tensor(flat) == 1
    rollout = Rollout(
        ids=torch.where(first, 1, 3 + torch.arange(tokens) % 20),
        role=torch.where(first, ROLE_PROMPT, ROLE_SAMPLED).to(torch.int8),
        logp=values, mean_logp=2 * values, entropy=-values, offsets=offsets,
        prompt_len=torch.ones(len(flat), dtype=torch.int64), group=group, uid=torch.arange(len(flat)),
        stop=torch.tensor(list(stops) if stops else [STOP_EOS] * len(flat), dtype=torch.int8),
    )  # fmt: skip
    rollout.validate()
    problems = [Problem(uids[p] if uids else p, f"problem {p}", "0") for p in range(len(rewards))]
    grades = [Grade(r, bool(c), None, None, "by hand") for r, c in zip(flat, right, strict=True)]
    return Graded(
        rollout, problems, torch.tensor(flat, dtype=torch.float32), right, grades, list(texts or [""] * len(flat)),
        extra or {},
    )  # fmt: skip


def with_rewards(rollout: Rollout, reward: torch.Tensor) -> Graded:
    """A rollout of the engine with these rewards; a response of reward 1 is right."""
    grades = [Grade(float(r), float(r) == 1, None, None, "by hand") for r in reward]
    problems = [Problem(p, f"problem {p}", "0") for p in range(rollout.group_offsets.numel() - 1)]
    return Graded(rollout, problems, reward, reward == 1, grades, [""] * rollout.rows)


@dataclass
class Row:
    """One response through the plain model in float64, with gradients; L sampled tokens, V vocabulary."""

    log_probs: torch.Tensor  # [L,V]
    logp: torch.Tensor  # [L] of the sampled tokens
    old_logp: torch.Tensor  # [L] and the rest: constants
    old_mean_logp: torch.Tensor
    advantage: torch.Tensor
    coef: torch.Tensor
    extra: dict[str, torch.Tensor]

    @property
    def ratio(self) -> torch.Tensor:
        return (self.logp - self.old_logp).exp()


def plain_rows(policy: Any, weights: dict[str, torch.Tensor], batch: Batch, temperature: float) -> list[Row]:
    """The batch by plain torch: every row alone, no packing, no fused head."""
    rollout, rows = batch.rollout, []
    for number in range(rollout.rows):
        begin, end = rollout.offsets[number : number + 2].tolist()
        ids = rollout.ids[begin:end]
        at = begin + (rollout.role[begin:end] == ROLE_SAMPLED).nonzero()[:, 0]
        made = rollout.soft_of(torch.arange(begin, end - 1))
        fed = None if made is None else (made[0].nonzero()[:, 0], made[1])
        logits = plain_hidden(policy.config, weights, ids[:-1], fed) @ weights.get("head", weights["embed"]).T
        logits = logits[at - begin - 1]
        own = torch.log_softmax(logits / temperature, -1)
        logp, made, how = own.gather(1, rollout.ids[at, None])[:, 0], rollout.soft_of(at), rollout.soft_sampling
        if made is not None and how is not None:  # a soft token: the density of its vector
            mean = torch.softmax(logits[made[0]] / how.temperature, -1) @ weights["embed"]
            distance = (made[1].double() - mean).square().sum(-1)
            logp = logp.index_put((made[0].nonzero()[:, 0],), -distance / (2 * how.sigma**2))
        rows.append(Row(
            own, logp, rollout.logp[at].double(),
            rollout.mean_logp[at].double(), batch.advantage[at].double(), batch.coef[at].double(),
            {name: values[at].double() for name, values in batch.extra.items()},
        ))  # fmt: skip
    return rows


def sampled(policy: Any, groups: int = 2, samples: int = 4, length: int = 10, temperature: float = 0.9) -> Rollout:
    """Responses to Countdown prompts, drawn by the engine."""
    texts = ("3 4 -> 7\n<think>", "12 5 9 -> 26\n<think>", "8 2 -> 4\n<think>")[:groups]
    prompts = [policy.tokenizer.encode(text) for text in texts]
    return Engine(policy, seed=1).generate(prompts, samples, length, temperature=temperature)


def ragged(rollout: Rollout) -> Rollout:
    """The rollout with the first b mod 4 response tokens of row b as forced ones: rows of different counts, as the tiny
    model, which never ends, does not draw them."""
    row = rollout.row_of_token
    place = torch.arange(rollout.tokens) - (rollout.offsets[:-1] + rollout.prompt_len)[row]
    forced = (place >= 0) & (place < row % 4)
    zeroed = {name: torch.where(forced, 0.0, getattr(rollout, name)) for name in ("logp", "mean_logp", "entropy")}
    out = replace(rollout, role=torch.where(forced, ROLE_FORCED, rollout.role).to(torch.int8), **zeroed)
    out.validate()
    return out


def move(policy: Any, scale: float = 0.03, seed: int = 0) -> None:
    """The policy after some updates: ratios on both sides of a clip range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def make_batch(ctx: Context, graded: Graded) -> Batch:
    """The batch that the loop would train on: advantages, reference terms, the algorithm's own shape, masks."""
    graded = reference_terms(ctx, graded)
    return mask_tokens(ctx.run.algo.shape(ctx, graded, advantage(ctx, graded)), ctx.train)


def check_gradient(
    ctx: Context, batch: Batch, equations: Callable[[list[Row]], torch.Tensor], token_budget: int = 10_000
) -> None:
    """The loss and every gradient of the real path (packing, micro-batches, fused head, kernels) against
    equations(rows) -> loss, the paper's in plain torch under autograd in float64."""
    policy, algo, train = ctx.policy, ctx.run.algo, ctx.train
    spec = replace(with_options(algo.loss(ctx.own), train, ctx.kl_coef), idle_when_zero=False)
    terms = None if algo.terms is None else partial(algo.terms, ctx)
    policy.model.zero_grad()
    report = minibatch_loss(
        policy.model, batch, range(batch.rollout.rows), spec, temperature=train.temperature,
        token_budget=token_budget, max_new_tokens=train.max_new_tokens, terms=terms,
    )  # fmt: skip
    got = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    if terms is not None:
        batch = replace(batch, extra={**batch.extra, **terms(batch)})
    weights = {n: p.detach().double().requires_grad_() for n, p in policy.model.named_parameters()}
    expected = equations(plain_rows(policy, weights, batch, train.temperature))
    expected.backward()
    assert float(report.loss) == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    for n, p in weights.items():
        assert p.grad is not None and float(p.grad.norm()) > 0, n
        worst = float((got[n].double() - p.grad).norm() / p.grad.norm())
        assert worst < 2e-5, (n, worst)
