"""An outcome model: one score per response, trained beside the policy to rank right responses over wrong ones.

    L = mean over the prompts with both kinds of the mean over their pairs of -log sigmoid(s_right - s_wrong)

(Bradley-Terry.) The score is read in the state in which the last token was drawn. Only differences are learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pymathrl.algos.common import last_sampled
from pymathrl.batch import Batch, Rollout

if TYPE_CHECKING:
    from pymathrl.learner import CriticLearner


def scores(model: CriticLearner, rollout: Rollout) -> Tensor:
    """fp32 [B], constants; 0 for a row without a sampled token."""
    return rollout.row_sums(torch.where(last_sampled(rollout), model.values(rollout), 0.0))


def pair_loss(score: Tensor, correct: Sequence[bool], group: Sequence[int]) -> Tensor | None:
    """score fp32 [B], differentiable; None where no group has both kinds."""
    rows: dict[int, tuple[list[int], list[int]]] = {}
    for row, (right, number) in enumerate(zip(correct, group, strict=True)):
        rows.setdefault(number, ([], []))[right].append(row)
    mixed = [(wrong, right) for wrong, right in rows.values() if wrong and right]
    if not mixed:
        return None
    pairs = [(r, w, 1 / (len(right) * len(wrong) * len(mixed))) for wrong, right in mixed for r in right for w in wrong]
    plus, minus, weight = zip(*pairs, strict=True)
    margin = score[list(plus)] - score[list(minus)]
    return (torch.tensor(weight, device=score.device) * F.softplus(-margin)).sum()


def learn(model: CriticLearner, mini: Batch) -> Mapping[str, float]:
    """One step of the model on the pairs of these rows, if there are any."""
    # A pair may lie in two micro-batches: its gradient at the scores comes first, then goes through each of them.
    score = scores(model, mini.rollout).requires_grad_()
    total = pair_loss(score, mini.correct.tolist(), mini.rollout.group.tolist())
    if total is None:
        return {}
    (slope,) = torch.autograd.grad(total, score)
    per_token = torch.where(last_sampled(mini.rollout), mini.per_token(slope), 0.0)
    _, step = model.update(mini.rollout, lambda at, values: (per_token[at] * values).sum())
    return {"orm/loss": float(total.detach()), "orm/grad_norm": step.grad_norm}
