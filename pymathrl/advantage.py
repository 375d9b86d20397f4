"""Stage 4, advantage: rewards of groups -> one advantage per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymathrl.algos import Algo
from pymathrl.batch import Batch, Rollout


@dataclass(frozen=True)
class Advantages:
    """The batch with its advantages, and for each group whether all its rewards are equal (bool [P])."""

    batch: Batch
    equal: Tensor
    sampled: Tensor  # int64 [B]: sampled tokens of each row


def group_offsets(rollout: Rollout) -> Tensor:
    """int64 [P+1]: the first row of each group."""
    starts = torch.ones(rollout.rows + 1, dtype=torch.bool, device=rollout.device)
    starts[1:-1] = rollout.group.diff() != 0
    return starts.nonzero()[:, 0]


def advantage(rollout: Rollout, reward: Tensor, correct: Tensor, algo: Algo, config: Any) -> Advantages:
    """The algorithm's advantage of each row, at each of its sampled tokens; 0 elsewhere."""
    mask = rollout.sampled_mask
    sampled = torch.zeros(rollout.rows, dtype=torch.int64, device=rollout.device)
    sampled.index_add_(0, rollout.row_of_token, mask.long())
    result = algo.advantage(reward, group_offsets(rollout), sampled, config)
    per_token = torch.where(mask, rollout.per_token(result.advantage), 0.0)
    ones = torch.ones_like(per_token)
    batch = Batch(rollout, reward, correct, per_token, torch.where(mask, ones, 0.0), ones)
    return Advantages(batch, result.equal, sampled)
