"""What a policy says of the tokens of a rollout, by the update's forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pymathrl.batch import Rollout, keep_support, micro_batches
from pymathrl.models.load import Policy
from pymathrl.ops.soft_embed import soft_embed
from pymathrl.ops.token_logprob import token_logprob

SCORE_LOGITS = 1 << 24  # fp32 logits held at once: 64 MiB


class Scores(NamedTuple):
    """fp32 [T] each, nats where they are logs; 0 where the token was not sampled."""

    logp: Tensor
    mean_logp: Tensor
    entropy: Tensor
    proxy_logp: Tensor | None = None  # with min_p: see `token_logprob`


class Scored(NamedTuple):
    """Some sampled tokens of a rollout, n of them."""

    at: Tensor  # int64 [n], of the token in the packed arrays
    hidden: Tensor  # [n,D] the state that scores it, after the last norm
    logits: Tensor  # fp32 [n,V], raw; -inf outside the support of a filtered draw


@torch.no_grad()
def walk(policy: Policy, rollout: Rollout, token_budget: int = 16384) -> Iterator[Scored]:
    """Every sampled token of the rollout once, in order, a bounded number at a time."""
    chunk = max(1, SCORE_LOGITS // policy.config.vocab_size)
    for part in micro_batches(rollout, torch.arange(rollout.rows, device=rollout.device), token_budget):
        hidden = policy.model.hidden(part.ids, part.starts, part.inputs)[part.hidden_index]
        support = rollout.support_of(part.token_index)
        for start in range(0, part.targets.numel(), chunk):
            piece = slice(start, start + chunk)
            logits = policy.model.logits(hidden[piece])
            if support is not None:
                keep_support(logits, support, start)
            yield Scored(part.token_index[piece], hidden[piece], logits)


@torch.no_grad()
def score(
    policy: Policy, rollout: Rollout, temperature: float, token_budget: int = 16384, min_p: float | None = None
) -> Scores:
    """The sampled tokens under the policy as it is now.

    At `temperature`, over the support that the rollout's filters left. Right after sampling they are the sampler's own:
    on a CPU bit for bit (contract C1). Of a soft token: the density of its vector, and the distribution that was mixed,
    as in `Rollout`; its proxy_logp is 0.
    """
    names = ("logp", "mean_logp", "entropy", "proxy_logp")[: 3 + (min_p is not None)]
    out = {name: torch.zeros_like(rollout.logp) for name in names}
    for part in walk(policy, rollout, token_budget):
        scored = token_logprob(part.logits, rollout.ids[part.at], temperature=temperature, min_p=min_p)
        for name, values in out.items():
            values[part.at] = getattr(scored, name)
        made, how = rollout.soft_of(part.at), rollout.soft_sampling
        if made is not None and how is not None:
            soft = soft_embed(
                part.logits[made[0]], policy.model.embed, temperature=how.temperature, sigma=how.sigma,
                top_k=how.top_k, inputs=made[1],
            )  # fmt: skip
            for name, values in out.items():
                values[part.at[made[0]]] = getattr(soft, name) if name != "proxy_logp" else 0.0
    return Scores(**out)
