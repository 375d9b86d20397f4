"""The engine's tests share: a policy whose every draw matters, a naive sampler, and what it means that two agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pymathrl.batch import Rollout
from pymathrl.models import ModelConfig, Policy, char_tokenizer, new_policy
from pymathrl.models.config import Mamba
from pymathrl.ops._call import use_reference
from pymathrl.ops.sample_token import sample_token
from pymathrl.rollout import Engine

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=320,
)  # fmt: skip
HYBRID = replace(CONFIG, num_layers=3, mamba=Mamba(32, 16, attention_layers=(1,), dt_rank=2, state_size=8))
# one token; less than a page of 16; a page to the token; a page and a token; three pages
PROMPTS = [[6], [5, 7, 9, 11], list(range(4, 20)), list(range(7, 24)), [3 + i % 23 for i in range(40)], [7, 7]]
FIELDS = ("logp", "mean_logp", "entropy")


def sharp_policy(config: ModelConfig = CONFIG) -> Policy:
    """A head 8 times the usual size: the entropy is near 3 nats, ends come after some 25 tokens."""
    policy = new_policy(config, char_tokenizer(), seed=3)
    with torch.no_grad():
        policy.model.head_weight.mul_(8)
    return policy


def assert_same(got: Tensor, want: Tensor, what: str = "") -> None:
    """The same bits. The plain torch references, which PYMATHRL_IMPL=ref asks for, promise no order of summation and so
    no bits: there it is 2e-5, a hundredth of what the smallest of the planted faults does."""
    if use_reference():
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
        return
    assert got.shape == want.shape and got.dtype == want.dtype, (what, got.shape, want.shape)
    wrong = (got != want) & ~(got.isnan() & want.isnan())
    worst = (got - want)[wrong].abs().max() if bool(wrong.any()) else 0
    assert not bool(wrong.any()), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, at most by {worst}"


def assert_same_rollout(got: Rollout, want: Rollout) -> None:
    for name in ("offsets", "ids", "role", "stop", "prompt_len", "uid"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in FIELDS:
        assert_same(getattr(got, name), getattr(want, name), name)
    assert (got.support_ids is None) == (want.support_ids is None)
    assert (got.soft is None) == (want.soft is None) and got.soft_sampling == want.soft_sampling
    if got.soft is not None and want.soft is not None:
        assert torch.equal(got.soft, want.soft)
        assert_same(got.soft_inputs, want.soft_inputs, "soft_inputs")
    if got.support_ids is not None and want.support_ids is not None:
        assert torch.equal(got.support_ids, want.support_ids)
        assert torch.equal(got.support_offsets, want.support_offsets)


@torch.no_grad()
def next_logits(policy: Policy, tokens: Sequence[int]) -> Tensor:
    """fp32 [1,V] by the update's pass over the whole sequence, alone."""
    ids = torch.tensor(list(tokens), device=policy.device)
    hidden = policy.model.hidden(ids, torch.tensor([0, len(ids)], device=policy.device))
    return policy.model.logits(hidden[-1:])


def naive_draws(
    policy: Policy, tokens: Sequence[int], prompt_len: int, uid: int, count: int, seed: int, **sampling: float
) -> tuple[list[int], Tensor]:
    """`count` draws after `tokens`, each from a pass over everything before it: (ids, fp32 [3,count] of FIELDS)."""
    ids, numbers = list(tokens), []
    for _ in range(count):
        one = torch.tensor([len(ids) - prompt_len])
        out = sample_token(next_logits(policy, ids), seed, torch.tensor([uid]), one, **sampling)  # type: ignore[arg-type]
        numbers.append(torch.stack([getattr(out, name)[0] for name in FIELDS]))
        ids.append(int(out.ids))
    return ids[len(tokens) :], torch.stack(numbers, 1) if numbers else torch.zeros(3, 0)


def sampled_numbers(engine: Engine, seq: int, last: int) -> Tensor:
    """fp32 [3,last]: what the engine said about the last tokens of a sequence."""
    rollout = engine.rollout([seq])
    return torch.stack([getattr(rollout, name)[rollout.tokens - last :] for name in FIELDS])


def assert_no_pages(engine: Engine) -> None:
    """Every page is free, once."""
    pages = engine._pages
    assert engine.pages_in_use == 0 and pages.free == pages.pages
    assert bool((pages.refs == 0).all()) and bool((pages.held == 0).all()) and bool((pages.fed == 0).all())
    assert sorted(pages._stack.tolist()) == list(range(pages.pages))
    assert pages.states_free == pages.states and not bool((pages.states_of(torch.arange(len(pages.fed))) >= 0).any())
