"""DAPO, after "DAPO: An Open-Source LLM Reinforcement Learning System at Scale" (Yu et al., arXiv 2503.14476, section
3; code: the dapo recipe of github.com/verl-project/verl-recipe).

    R = 1 for a right answer, -1 for a wrong one, and for n tokens of at most Lmax (section 3.4)
        + min(-(n - (Lmax - buffer)) / buffer * factor, 0)
    A = (R - mean of the group) / (std of the group + eps)
    L = mean over the tokens of the step of max(-r A, -clip(r, 0.8, 1.28) A), at most -10 A where A < 0

Clip-higher, averages over tokens, and dynamic sampling: groups whose answers are all right or all wrong are dropped and
drawn anew (`--filter mixed`, on by default here; it looks at accuracy, not at R). Lmax is --max-new-tokens.

Differs from the code: where the rounds of --filter-rounds do not fill the batch, the step goes on with a smaller one
(there: an error). The dual clip of 10 is that of the recipe's script, not of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, dual_clip, group_normalised
from pymathrl.batch import Graded
from pymathrl.errors import UserError
from pymathrl.options import at_least, positive

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    clip_low: float = clip_low(0.2, "paper: 0.2")
    clip_high: float = clip_high(0.28, "paper: 0.28")
    dual_clip: float = dual_clip(10.0, "script: 10")
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6)")
    overlong_buffer: int = at_least(0, 0, "tokens before --max-new-tokens over which a response is punished; 0 = off "
                                          "(paper: 4096 of 20480)")  # fmt: skip
    overlong_factor: float = positive(1.0, "the punishment at the full length (paper: 1)")


def check(train: TrainConfig, own: Config) -> None:
    if own.overlong_buffer > train.max_new_tokens:
        raise UserError(
            f"--overlong-buffer: expected at most --max-new-tokens {train.max_new_tokens}, got {own.overlong_buffer}"
        )
    if not own.overlong_buffer and own.overlong_factor != Config.overlong_factor:
        raise UserError("--overlong-factor has no effect with --overlong-buffer 0; set that too")


def overlong_penalty(length: Tensor, limit: int, buffer: int, factor: float) -> Tensor:
    """length [B] tokens -> fp32 [B], 0 or less."""
    return (-(length - (limit - buffer)).float() / buffer * factor).clamp(max=0.0)


def judge(ctx: Context, graded: Graded) -> Graded:
    reward = torch.where(graded.correct, 1.0, -1.0)
    if ctx.own.overlong_buffer:
        length = graded.rollout.response_lengths
        limit = ctx.train.max_new_tokens
        reward = reward + overlong_penalty(length, limit, ctx.own.overlong_buffer, ctx.own.overlong_factor)
    return replace(graded, reward=reward)


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation="token-mean", terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="dapo",
    summary="clip-higher, token mean, dynamic sampling, overlong penalty",
    paper="arXiv 2503.14476",
    config=Config,
    advantage=group_normalised,
    loss=loss,
    defaults={"filter": "mixed"},
    check=check,
    judge=judge,
)
