"""HAPO: history-aware policy optimization, rewards for answers shorter than any right one before, after "HAPO: Training
Language Models to Reason Concisely via History-Aware Policy Optimization" (Huang et al., arXiv 2505.11225; code:
github.com/HCY123902/HAPO).

h of a problem: length of its shortest right response so far (--history min) or their mean (mean). For a response of n
tokens and a problem that has an h,

    cos     f = cos(min(n / h, 2) pi / 2)               right: max(-0.7, f)         wrong: min(0, f)
    linear  m = 1.1 h;  g = -(n - m) / h for n >= m     right: 1 - n/h for n < h, 0 up to m, then max(-0.7, g)
                                                        wrong: 0 up to m, then max(-1, g)
    R = [1 if right] + length_weight * that + rep_penalty * (share of tokens in a repeated n-gram)
    A = (R - mean of the group) / (std of the group + 1e-4)
    L = mean over the tokens of the step of PPO's clipped term + 0.04 KL (k3)        (TRL's defaults, which it ran with)

The floor of -0.7 keeps every right answer (>= 0.3) above every wrong one (<= 0). Rewards use the h from before the
draw, then the draw moves h. n counts the sampled tokens, the end token too; the code counts those of the decoded text
again. The history is saved with a checkpoint (there: not), and evaluations leave it alone (there: they have their own).

A history needs problems that come again: --pool N runs over the first N of the task, in a new order each time; 0 is the
task's whole stream, which repeats only for a file. The code's temperature is 0.7, its groups have 2 or 4 responses; at
2 the size of the length reward vanishes in A, which is then +-0.707.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, group_normalised
from pymathrl.algos.pool import Pool, identity
from pymathrl.batch import Graded, Rollout
from pymathrl.options import at_least, option, positive, share
from pymathrl.tasks.jsonl import shuffled

if TYPE_CHECKING:
    from pymathrl.context import Context
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws

FLOOR = -0.7  # of the length reward of a right answer
TOLERANCE = 0.1  # linear: lengths up to 1.1 h cost nothing


@dataclass(frozen=True)
class Config:
    pool: int = at_least(0, 512, "problems of the task that are trained on again and again, its first; 0 = all of its "
                                 "stream, for files (paper: 2000)")  # fmt: skip
    history: str = option("min", "what h is, see the table", choices=("min", "mean"))
    length_reward: str = option("cos", "its shape, see the table", choices=("cos", "linear"))
    length_weight: float = share(1.0, "factor of the length reward (code: 1)")
    rep_penalty: float = option(0.0, "reward of a response that only repeats itself; 0 = off (code: 0)",
                                check=lambda v: v <= 0, expected="at most 0")  # fmt: skip
    rep_ngram: int = positive(3, "tokens of a repeated n-gram (code: 3)")
    clip_low: float = clip_low(0.2, "TRL: 0.2")
    clip_high: float = clip_high(0.2, "TRL: 0.2")
    adv_eps: float = positive(1e-4, "added to the std (TRL: 1e-4)")


def length_reward(length: Tensor, history: Tensor, correct: Tensor, shape: str) -> Tensor:
    """length, history [B] tokens (history inf: none yet), correct bool [B] -> fp64 [B]."""
    n, h = length.double(), history.double()
    x = n / h
    if shape == "cos":
        f = torch.cos(x.clamp(max=2.0) * (math.pi / 2))
        value = torch.where(correct, f.clamp(min=FLOOR), f.clamp(max=0.0))
    else:
        late = torch.where(x >= 1 + TOLERANCE, 1 + TOLERANCE - x, 0.0)
        value = torch.where(correct, torch.where(x < 1, 1 - x, late.clamp(min=FLOOR)), late.clamp(min=-1.0))
    return torch.where(torch.isinf(h), 0.0, value)


def repeated_share(ids: Sequence[int], n: int) -> float:
    """The share of tokens that lie in an n-gram which begins further left already."""
    seen, covered = set[tuple[int, ...]](), [False] * len(ids)
    for start in range(len(ids) - n + 1):
        gram = tuple(ids[start : start + n])
        if gram in seen:
            covered[start : start + n] = [True] * n
        seen.add(gram)
    return sum(covered) / max(1, len(ids))


class History:
    """of: problem -> [h, right responses so far]. pool: the problems, None for the stream."""

    def __init__(self, ctx: Context) -> None:
        self.of: dict[str, list[float]] = {}
        self.pool = Pool(ctx, ctx.own.pool) if ctx.own.pool else None

    def add(self, problem: str, lengths: Sequence[float], mode: str) -> None:
        """Takes in the lengths of right responses."""
        if not lengths:
            return
        h, count = self.of.get(problem, [math.inf, 0.0])
        total = count + len(lengths)
        mean = sum(lengths) / total + (h * (count / total) if count else 0.0)
        self.of[problem] = [min(h, *lengths) if mode == "min" else mean, total]

    def state_dict(self) -> dict[str, Any]:
        return {"of": self.of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.of = state["of"]


def draw(ctx: Context, count: int) -> Prompts:
    """The next of the pool: every problem once, then again in another order."""
    if not ctx.own.pool:
        return ctx.draw(count)
    if ctx.memory.pool is None or not ctx.memory.pool.fits(ctx, ctx.own.pool):  # a stage with another task
        ctx.memory.pool = Pool(ctx, ctx.own.pool)
    pool, begin = ctx.memory.pool, ctx.at.cursor
    ctx.at.cursor += count
    places = [divmod(position, len(pool)) for position in range(begin, ctx.at.cursor)]
    return pool.prompts([shuffled(len(pool), ctx.train.seed, epoch)[i] for epoch, i in places], ctx.at.cursor)


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    """Other samples in each epoch of the pool: a problem of it has one uid, so its samples are numbered on."""
    if not ctx.own.pool:
        return ctx.generate(prompts, draws)
    begin, size = prompts.cursor - len(prompts.ids), len(ctx.memory.pool)
    first = [position // size * draws.samples for position in range(begin, prompts.cursor)]
    return ctx.generate(prompts, replace(draws, first=first))


def judge(ctx: Context, graded: Graded) -> Graded:
    own, of, rolled = ctx.own, ctx.memory.of, graded.rollout.cpu()
    names = [identity(problem) for problem in graded.problems]
    known = torch.tensor([of.get(name, [math.inf])[0] for name in names], dtype=torch.float64)
    length, group, correct = rolled.sampled_count, rolled.group, graded.correct.cpu()
    extra = own.length_weight * length_reward(length, known[group], correct, own.length_reward)
    if own.rep_penalty:
        shares = [repeated_share(rolled.response(row).tolist(), own.rep_ngram) for row in range(rolled.rows)]
        extra = extra + own.rep_penalty * torch.tensor(shares)
    ctx.metrics |= {
        "hapo/known": float(torch.isfinite(known).double().mean()), "hapo/problems": len(of),
        "hapo/history": sum(h for h, _ in of.values()) / max(1, len(of)),
        "hapo/extra_reward": float(extra.mean()),
    }  # fmt: skip
    bounds = rolled.group_offsets.tolist()
    for name, begin, end in zip(names, bounds, bounds[1:], strict=False):
        ctx.memory.add(name, length[begin:end][correct[begin:end]].double().tolist(), own.history)
    return replace(graded, reward=(correct + extra).float().to(graded.reward.device))


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation="token-mean", terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="hapo",
    summary="rewards right answers that are shorter than the problem's best so far",
    paper="arXiv 2505.11225",
    config=Config,
    advantage=group_normalised,
    loss=loss,
    defaults={"kl": "k3", "kl_coef": 0.04},
    memory=History,
    draw=draw,
    rollout=rollout,
    judge=judge,
)
