"""SPO: single-stream policy optimization, after "Single-stream Policy Optimization" (Xu, Ding, arXiv 2509.13232,
sections 3 to 5; code: recipe spo of github.com/verl-project/verl-recipe).

One response per problem. A tracker holds alpha and beta of each problem x of a pool; v = alpha / (alpha + beta).

    start   k right of n0 responses of the initial policy, N0 = 1 / (1 - rho_min)
            --spo-init jeffreys   alpha = N0 (k + 1/2) / (n0 + 1),  beta = N0 (n0 - k + 1/2) / (n0 + 1)      (the code)
                       paper      alpha = N0 k / n0,                beta = N0 (1 - k / n0)
            n0 = 0: both 1/2
    draw    a step's problems without replacement, weights sqrt(v (1 - v)) + draw_floor
    R = 1 for a right answer, else 0;   A = R - v, then (A - mean) / (std + 1e-8) over the responses of the step
    L = mean over the tokens of the step of PPO's clipped term, clip-higher, at most -10 A where A < 0
    then    D = mean of |log pi_then - log pi_now| over the tokens of the last response to x that was trained on, where
            pi_then is the policy right after that update; 0 where there was none
            rho = 2^(-D / d_half) in [rho_min, rho_max];   alpha <- rho alpha + R;   beta <- rho beta + 1 - R

The last lines follow the code; the paper speaks of a KL divergence for D, and its N_eff = alpha + beta + 1 does not fit
its own update, which holds with alpha + beta. The pool is the task's first --pool problems: a generated task has no
end. A problem met again has other random numbers: its visits enter the number of the sample. The code's 8 updates per
batch are `--minibatches 8`. Batches are 2048 responses in the paper, 768 in the code's notes, 1024 in its script.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, dual_clip, response_reward
from pymathrl.algos.pool import Pool
from pymathrl.batch import Batch, Graded, Rollout
from pymathrl.errors import UserError
from pymathrl.ops.group_advantage import group_advantage
from pymathrl.options import at_least, option, positive

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the advantages, that are logged


@dataclass(frozen=True)
class Config:
    pool: int = positive(2048, "problems of the task that are drawn from, its first (paper: 14,000)")
    offline_samples: int = at_least(0, 8, "responses per problem of the pool before the first step (paper: 8)")
    spo_init: str = option("jeffreys", "alpha and beta at the start, see the table", choices=("jeffreys", "paper"))
    draw_floor: float = positive(0.05, "added to the weight of every problem (paper: 0.05)")
    rho_type: str = option(
        "kl", "what is forgotten: by how far the policy has moved on the problem's last response (two more passes per "
        "step), or always --rho-min", choices=("kl", "constant"),
    )  # fmt: skip
    rho_min: float = option(0.875, "least factor of the past (paper: 0.875)", check=lambda v: 0 <= v < 1,
                            expected="in [0, 1)")  # fmt: skip
    rho_max: float = option(0.96, "largest factor (paper: 0.96)", check=lambda v: 0 <= v <= 1, expected="in [0, 1]")
    d_half: float = positive(0.06, "nats per token that halve the past (code: 0.06)")
    clip_low: float = clip_low(0.2, "paper: 0.2")
    clip_high: float = clip_high(0.28, "paper: 0.28")
    dual_clip: float = dual_clip(10.0, "script: 10")


def check(train: TrainConfig, own: Config) -> None:
    if train.samples_per_prompt != 1 or train.filter != "off":
        raise UserError(
            "--algo spo takes one response per problem and draws problems by its own weights: expected "
            f"--samples-per-prompt 1 and --filter off, got {train.samples_per_prompt} and {train.filter}"
        )
    if own.pool < train.prompts_per_step or own.rho_min > own.rho_max:
        raise UserError(
            f"--algo spo: expected --pool >= --prompts-per-step and --rho-min <= --rho-max, got {own.pool} and "
            f"{train.prompts_per_step}, {own.rho_min} and {own.rho_max}"
        )


def prior(right: Tensor, own: Config) -> tuple[Tensor, Tensor]:
    """(alpha, beta) fp64 [N] of problems with right [N] of --offline-samples responses right."""
    k, n0, weight = right.double(), own.offline_samples, 1 / (1 - own.rho_min)
    if n0 == 0:
        return torch.full_like(k, 0.5), torch.full_like(k, 0.5)
    if own.spo_init == "paper":
        return weight * k / n0, weight * (1 - k / n0)
    return weight * (k + 0.5) / (n0 + 1), weight * (n0 - k + 0.5) / (n0 + 1)


def factor(distance: Tensor, own: Config) -> Tensor:
    """rho of each D, nats."""
    if own.rho_type == "constant":
        return torch.full_like(distance, own.rho_min)
    return torch.exp2(-distance / own.d_half).clamp(own.rho_min, own.rho_max)


def draw_weight(value: Tensor, own: Config) -> Tensor:
    return (value * (1 - value)).sqrt() + own.draw_floor


def weighted_draw(weight: Tensor, count: int, rng: random.Random) -> list[int]:
    """`count` different numbers, one after the other with chances in proportion to the weights of those that are left
    (Efraimidis and Spirakis 2006: the largest of u^(1/w)); given rising, for in the order drawn the likely ones would
    all be in the first optimizer step."""
    key = torch.tensor([rng.random() for _ in range(weight.numel())], dtype=torch.float64).log() / weight
    return sorted(key.topk(count).indices.tolist())


class Tracker:
    """alpha, beta fp64 [N], visits int64 [N] of the pool's problems; last: the last response to each problem that was
    trained on, with its log-probs after that update, and owner int64 [rows of it], its problem. All on the CPU."""

    def __init__(self, ctx: Context) -> None:
        self.pool = Pool(ctx, ctx.own.pool)
        none = torch.zeros(len(self.pool), dtype=torch.int64)
        self.alpha, self.beta = prior(none, replace(ctx.own, offline_samples=0))
        self.visits, self.owner = none, none[:0]
        self.last: Rollout | None = None
        self.started = False

    @property
    def value(self) -> Tensor:
        return self.alpha / (self.alpha + self.beta)

    def row(self) -> Tensor:
        """int64 [N]: the row of `last` that is the problem's; -1: none."""
        row = torch.full_like(self.visits, -1)
        row[self.owner] = torch.arange(self.owner.numel())
        return row

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("alpha", "beta", "visits", "owner", "started")}
        return state | {"last": self.last.state_dict() if self.last else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("alpha", "beta", "visits", "owner", "started"):
            setattr(self, name, state[name])
        self.last = Rollout.restore(state["last"]) if state["last"] else None


def start(ctx: Context, tracker: Tracker) -> None:
    """alpha and beta from the responses of the policy as it is now, some problems at a time."""
    own, size = ctx.own, ctx.train.prompts_per_step
    tracker.started = True
    if not own.offline_samples:
        return
    right = []
    for begin in range(0, len(tracker.pool), size):
        prompts = tracker.pool.prompts(range(begin, min(begin + size, len(tracker.pool))))
        rollout = ctx.generate(prompts, replace(ctx.draws, samples=own.offline_samples))
        ctx.at.tokens += int(rollout.sampled_mask.sum())
        right.append(ctx.verify(rollout, prompts.problems).correct.view(-1, own.offline_samples).sum(1).cpu())
    tracker.alpha, tracker.beta = prior(torch.cat(right), own)
    ctx.note(f"tracker   {len(tracker.pool)} problems, mean value {float(tracker.value.mean()):.3f}")


def draw(ctx: Context, count: int) -> Prompts:
    if not ctx.memory.pool.fits(ctx, ctx.own.pool):
        ctx.memory = Tracker(ctx)
    tracker = ctx.memory
    if len(tracker.pool) < count:
        raise UserError(
            f"--pool {ctx.own.pool} holds {len(tracker.pool)} different problems whose prompts fit, fewer than "
            f"--prompts-per-step {count}; raise the one or lower the other"
        )
    if not tracker.started:
        start(ctx, tracker)
    rng = random.Random(f"spo {ctx.train.seed} {ctx.at.step}")
    return tracker.pool.prompts(weighted_draw(draw_weight(tracker.value, ctx.own), count, rng), ctx.at.cursor)


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    """Numbers of samples: first those of the start, then one per visit."""
    tracker = ctx.memory
    at = [tracker.pool.index[problem.uid] for problem in prompts.problems]
    seen = tracker.visits[at]
    tracker.visits[at] += 1
    visits = tracker.visits.double()
    ctx.metrics |= {
        "spo/first_sampled_ratio": float((seen == 0).double().mean()), "spo/sampled_number_min": float(visits.min()),
        "spo/sampled_number_mean": float(visits.mean()), "spo/sampled_number_max": float(visits.max()),
    }  # fmt: skip
    return ctx.generate(prompts, replace(draws, first=(seen + ctx.own.offline_samples).tolist()))


def judge(ctx: Context, graded: Graded) -> Graded:
    return replace(graded, reward=graded.correct.float())


def advantage(ctx: Context, graded: Graded) -> Tensor:
    at = [ctx.memory.pool.index[problem.uid] for problem in graded.problems]
    value = ctx.memory.value[at].float().to(graded.reward.device)
    offsets, reward = graded.rollout.group_offsets, response_reward(graded)
    gap = group_advantage(reward, offsets, centre="baseline", baseline=value).advantage
    levels = torch.tensor(QUANTILES, device=gap.device)
    ctx.metrics |= {
        "spo/p_hats": float(value.mean()), "spo/reward": float(reward.mean()),
        "spo/adv_before_norm": float(gap.mean()),
        **{f"spo/adv_q{100 * q:.0f}": float(a) for q, a in zip(QUANTILES, gap.quantile(levels), strict=True)},
    }  # fmt: skip
    return group_advantage(reward, offsets, centre="baseline", scale="batch_whiten", eps=1e-8, baseline=value).advantage


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation="token-mean", terms=clip_terms(config), idle_when_zero=True)


def moved(ctx: Context, tracker: Tracker, at: Tensor, trained: Rollout) -> Tensor:
    """D fp64 of the problems `at`; what was trained becomes their last response."""
    distance = torch.zeros(at.numel(), dtype=torch.float64)
    row = tracker.row()[at]
    if tracker.last is not None and bool((row >= 0).any()):
        then = tracker.last.select(row[row >= 0]).to(ctx.policy.device)
        gap = (then.logp - ctx.score(then).logp).abs()  # both are 0 where not sampled
        distance[row >= 0] = (then.row_sums(gap) / then.sampled_count.clamp(min=1)).double().cpu()
    now = replace(trained, logp=ctx.score(trained).logp).cpu()
    others = ~torch.isin(tracker.owner, at)
    kept = [] if tracker.last is None else [tracker.last.select(others.nonzero()[:, 0])]
    tracker.last = Rollout.concat([*kept, now])
    tracker.owner = torch.cat([tracker.owner[others], at])
    return distance


def after_step(ctx: Context, batch: Batch) -> None:
    tracker, own = ctx.memory, ctx.own
    at = torch.tensor([tracker.pool.index[ctx.problem_uid(uid)] for uid in batch.rollout.uid.tolist()])
    right = batch.correct.double().cpu()
    distance = torch.zeros_like(right)
    if own.rho_type == "kl":
        distance = moved(ctx, tracker, at, batch.rollout)
    rho, raw = factor(distance, own), torch.exp2(-distance / own.d_half)
    tracker.alpha[at] = rho * tracker.alpha[at] + right
    tracker.beta[at] = rho * tracker.beta[at] + 1 - right
    alpha, beta = tracker.alpha[at], tracker.beta[at]
    ctx.metrics |= {
        "spo/alpha": float(alpha.mean()), "spo/beta": float(beta.mean()), "spo/Neff": float((alpha + beta).mean()),
        "spo/D": float(distance.mean()), "spo/rho": float(raw.mean()), "spo/rho_clipped": float(rho.mean()),
        "spo/rho_clip_ratio": float((raw != rho).double().mean()),
    }  # fmt: skip


ALGO = Algo(
    name="spo",
    summary="one response per problem against a tracked success rate; problems drawn by its variance",
    paper="arXiv 2509.13232",
    config=Config,
    advantage=advantage,
    loss=loss,
    defaults={"samples_per_prompt": 1, "prompts_per_step": 512},
    min_samples=1,
    check=check,
    memory=Tracker,
    draw=draw,
    rollout=rollout,
    judge=judge,
    after_step=after_step,
)
