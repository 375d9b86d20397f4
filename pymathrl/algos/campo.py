"""CAMPO: GRPO with a repetition critic, for stages of growing length, after "MiroMind-M1" (Li et al., arXiv 2507.14683,
sections 4.1 and 4.2; code: github.com/MiroMindAsia/MiroMind-M1).

    f(y) = (n - start of the block that the end of y repeats back to back) / n;  0 where no block stands there twice
    A    = (R - f(y) - mean of the group) / (std of the group + eps)
    L    = mean over the tokens of the step of max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), at most -10 A where
           A < 0; groups of only right or only wrong answers are dropped and drawn anew (--filter mixed)

The stages (paper: 16K, then 32K tokens, when lengths saturate; no numeric rule) are a schedule of [[stage]] tables,
each with its own --max-new-tokens, --clip-low and --clip-high; see README.

--repetition paper subtracts f of every response, whose end token is not part of y: behind it nothing repeats. `code` is
what the released script does: a constant 0.1 where f > 0, of responses cut at the length limit only. Its hard-coded
skip of steps and its random choice of surplus groups are not here. A truncated response is scored 0 and kept, as in the
code (section 4.5.2 of the paper speaks of leaving it out: --truncated mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, dual_clip, group_normalised
from pymathrl.batch import STOP_LENGTH, Graded
from pymathrl.options import option, positive

if TYPE_CHECKING:
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    repetition: str = option("paper", "what is taken off the reward: f(y), a constant if f > 0 and y was cut, nothing",
                             choices=("paper", "code", "off"))  # fmt: skip
    repetition_penalty: float = positive(0.1, "the constant of --repetition code (code: 0.1)")
    clip_low: float = clip_low(0.2, "scripts: 0.2")
    clip_high: float = clip_high(0.28, "scripts: 0.28")
    dual_clip: float = dual_clip(10.0, "scripts: 10")
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6)")


def repetition(ids: Sequence[int]) -> float:
    """f of one response, in [0, 1]: the share of it that lies in the repeated blocks at its end.

    For each length b of a block, with 2b <= n, blocks of b tokens are compared from the end leftwards; the longest b
    with two copies or more wins. The run of equal blocks that ends the sequence is as long as the longest suffix of
    period b, which the Z function of the reversed sequence gives for every b in O(n) together.
    """
    n = len(ids)
    reach = _z(ids[::-1])  # reach[b]: tokens from the end for which y[i] == y[i - b]
    for b in range(n // 2, 0, -1):
        copies = reach[b] // b + 1
        if copies >= 2:
            return copies * b / n
    return 0.0


def _z(s: Sequence[int]) -> list[int]:
    """z[i]: length of the longest common prefix of s and s[i:]."""
    z, left, right = [0] * (len(s) + 1), 0, 0
    for i in range(1, len(s)):
        k = min(right - i, z[i - left]) if i < right else 0
        while i + k < len(s) and s[k] == s[i + k]:
            k += 1
        z[i] = k
        if i + k > right:
            left, right = i, i + k
    return z


def judge(ctx: Context, graded: Graded) -> Graded:
    rollout = graded.rollout
    texts = [rollout.response(row).tolist() for row in range(rollout.rows)]
    ended = [ids[-1:] and ids[-1] in ctx.policy.eos_ids for ids in texts]
    f = graded.reward.new_tensor([repetition(y[:-1] if end else y) for y, end in zip(texts, ended, strict=True)])
    ctx.metrics |= {"campo/repetition": float(f.mean()), "campo/repeating": float((f > 0).float().mean())}
    if ctx.own.repetition == "code":
        f = ctx.own.repetition_penalty * ((f > 0) & (rollout.stop == STOP_LENGTH))
    elif ctx.own.repetition == "off":
        f = torch.zeros_like(f)
    return replace(graded, reward=graded.correct.float() - f)


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation="token-mean", terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="campo",
    summary="a critic of repetition in the reward, stages of growing length",
    paper="arXiv 2507.14683",
    config=Config,
    advantage=group_normalised,
    loss=loss,
    defaults={"filter": "mixed", "minibatches": 1},
    judge=judge,
)
