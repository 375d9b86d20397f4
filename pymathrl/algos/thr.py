"""THR: Token Hidden Reward, after "Token Hidden Reward" (ICLR 2026), and its predecessor NTHR, after "On the Effect of
Negative Gradient in GRPO" (arXiv 2505.18830).

How far an update on token t moves the likelihood of the group's right answers, to first order in the head. With h_t the
hidden state that scores token t and g_t = onehot(y_t) - pi_old(. | prefix), both of the sampling policy, for each group
with right and wrong answers:

    M     = sum over right responses i of (1/L_i) sum over their tokens of g h^T               NTHR: without 1/L_i
    s_t   = g_t^T M h_t                                        the own response is part of M
    THR_t = s_t for a right response, -s_t for a wrong one
    tau   = thr_beta * min over right responses of the mean of s over their tokens             below 0: nothing is cut

    --thr-mode thr    A'_t = [|THR_t| > tau] (1 + sign(THR_t) p) A_t
               nthr   A'_t = 2 |0.5 - accuracy| A_t for tokens of wrong responses with s_t > tau, else A_t

p > 0 favours tokens that raise the right answers (exploitation), p < 0 the others (exploration), p = 0 keeps the
dominant tokens as they are. The sign of A stays. Other groups stay as they are; A and the loss are GRPO's.

The vocabulary of g is cut to the ids that occur in the group's responses, without renormalising. g and h are constants,
taken once, right after the rollout, by one more forward pass over the groups that count; sums are fp32 whatever the
weights are: bf16 sums over thousands of tokens lose the sign near tau.

No code of THR was found: its equations are those of a public summary, and that tau, of which the paper of NTHR speaks
for its own s, uses THR's normalisation is our reading. The papers' runs use --filter mixed, the default here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymathrl.algos import grpo
from pymathrl.algos.algo import Algo
from pymathrl.batch import Batch, Graded, Rollout
from pymathrl.options import at_least, option

if TYPE_CHECKING:
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config(grpo.Config):
    thr_mode: str = option(
        "thr", "token weights: Token Hidden Reward, or its predecessor, which tempers wrong responses only",
        choices=("thr", "nthr"),
    )  # fmt: skip
    thr_p: float = option(0.1, "mode thr: exploitation above 0 (paper: 0.1), exploration below (paper: -0.1)",
                          check=lambda v: -1 <= v <= 1, expected="in [-1, 1]")  # fmt: skip
    thr_beta: float = at_least(0, 1.0, "the threshold in shares of the right responses' least mean score (NTHR: 1; 0 "
                                       "for a distilled model)")  # fmt: skip


def scores(errors: Tensor, hidden: Tensor, row: Tensor, right: Tensor, by_length: bool) -> tuple[Tensor, Tensor]:
    """One group's s fp32 [n] and the least mean of it over a right response.

    errors fp32 [n,V*] and hidden fp32 [n,D] of its n tokens; row int64 [n]: the response of each, from 0; right bool
    [G]. by_length: M takes the mean over a right response's tokens, not their sum.
    """
    length = torch.zeros(right.numel(), device=row.device).index_add_(0, row, torch.ones_like(hidden[:, 0]))
    share = right.float() / length.clamp(min=1) if by_length else right.float()
    moment = errors.t() @ (hidden * share[row, None])  # [V*,D]
    score = ((errors @ moment) * hidden).sum(1)
    mean = torch.zeros_like(length).index_add_(0, row, score) / length.clamp(min=1)
    return score, mean[right & (length > 0)].min()


def weights(score: Tensor, least: Tensor, right: Tensor, accuracy: float, config: Config) -> Tensor:
    """The factors of A [n] from s [n], for tokens of right or wrong responses: right bool [n]."""
    tau = config.thr_beta * least
    if config.thr_mode == "nthr":
        return torch.where(~right & (score > tau), 2 * abs(0.5 - accuracy), 1.0)
    thr = torch.where(right, score, -score)
    return torch.where(thr.abs() > tau, 1 + thr.sign() * config.thr_p, 0.0)


def group_weights(ctx: Context, rollout: Rollout, correct: Tensor) -> Tensor:
    """The factors of A, fp32 [n], of the n sampled tokens of one group with right and wrong answers."""
    ids = rollout.ids[rollout.sampled_mask].unique()
    errors, hidden = [], []
    for part in ctx.walk(rollout):
        probability = torch.softmax(part.logits / ctx.train.temperature, -1)[:, ids]
        errors.append((rollout.ids[part.at, None] == ids).float() - probability)
        hidden.append(part.hidden.float())
    row = rollout.row_of_token[rollout.sampled_mask]
    by_length = ctx.own.thr_mode == "thr"
    score, least = scores(torch.cat(errors), torch.cat(hidden), row, correct, by_length)
    return weights(score, least, correct[row], float(correct.float().mean()), ctx.own)


def judge(ctx: Context, graded: Graded) -> Graded:
    """Here and not when the loss is made: a group that --filter carries over waits for a step in which the weights have
    moved."""
    rollout, bounds = graded.rollout, graded.rollout.group_offsets.tolist()
    factor = torch.ones_like(rollout.logp)
    mixed = ((graded.accuracy > 0) & (graded.accuracy < 1)).nonzero()[:, 0].tolist()
    for group in mixed:
        rows = slice(bounds[group], bounds[group + 1])
        at = slice(int(rollout.offsets[rows.start]), int(rollout.offsets[rows.stop]))
        part = rollout.select(range(rows.start, rows.stop))
        factor[at][part.sampled_mask] = group_weights(ctx, part, graded.correct[rows])
    if mixed:
        of_mixed = torch.isin(rollout.group, torch.tensor(mixed, device=rollout.device))
        trained = factor[rollout.sampled_mask & rollout.per_token(of_mixed)]
        for name, tokens in (("cut", trained == 0), ("raised", trained > 1)):
            ctx.metrics[f"thr/{name}"] = float(tokens.float().mean())
    return replace(graded, extra={**graded.extra, "thr_weight": factor})


def shape(ctx: Context, graded: Graded, batch: Batch) -> Batch:
    return replace(batch, advantage=batch.advantage * batch.extra["thr_weight"])


ALGO = Algo(
    name="thr",
    summary="GRPO whose tokens count by what they do to the group's right answers; exploit or explore",
    paper="ICLR 2026; NTHR: arXiv 2505.18830",
    config=Config,
    advantage=grpo.advantage,
    loss=grpo.loss,
    defaults={"filter": "mixed"},
    judge=judge,
    shape=shape,
)
