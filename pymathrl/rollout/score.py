"""The log-probs of a rollout under the policy as it is now, by the update's forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pymathrl.batch import Rollout, keep_support, micro_batches
from pymathrl.models.load import Policy
from pymathrl.ops.token_logprob import token_logprob

SCORE_LOGITS = 1 << 24  # fp32 logits held at once: 64 MiB


@torch.no_grad()
def score(
    policy: Policy, rollout: Rollout, temperature: float, token_budget: int = 16384
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, mean_logp, entropy), each fp32 [T] nats, of the sampled tokens under the policy as it is now; 0 elsewhere.

    At `temperature`, over the support that the rollout's filters left. Right after sampling they are the sampler's own:
    on a CPU bit for bit (contract C1).
    """
    out = tuple(torch.zeros_like(rollout.logp) for _ in range(3))
    chunk = max(1, SCORE_LOGITS // policy.config.vocab_size)
    for part in micro_batches(rollout, torch.arange(rollout.rows, device=rollout.device), token_budget):
        hidden = policy.model.hidden(part.ids, part.starts)[part.hidden_index]
        support = rollout.support_of(part.token_index)
        for start in range(0, part.targets.numel(), chunk):
            piece = slice(start, start + chunk)
            logits = policy.model.logits(hidden[piece])
            if support is not None:
                keep_support(logits, support, start)
            scored = token_logprob(logits, part.targets[piece], temperature=temperature)
            for values, name in zip(out, ("logp", "mean_logp", "entropy"), strict=True):
                values[part.token_index[piece]] = getattr(scored, name)
    return out[0], out[1], out[2]
