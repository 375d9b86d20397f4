"""Stage 4, advantage: rewards of groups -> one advantage per token, and what else the loss reads of each token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pymathrl.batch import ROLE_FORCED, STOP_LENGTH, Batch, Graded, Rollout
from pymathrl.config import TrainConfig
from pymathrl.context import Context
from pymathrl.errors import UserError


def reference_terms(ctx: Context, graded: Graded) -> Graded:
    """Under --kl: extra["ref_logp"], the log-probs of the reference policy; with --kl-in reward also
    extra["kl_penalty"], what each token's KL (k1, of the sampling policy) takes off its reward. Both fp32 [T], nats."""
    config, rollout = ctx.train, graded.rollout
    if config.kl == "none":
        return graded
    ref_logp = ctx.score(rollout, ctx.reference()).logp
    if config.kl_in == "reward" and rollout.parent is not None:
        raise UserError("--kl-in reward: a response of several rows has no place for it; use --kl-in loss")
    k1 = torch.where(rollout.sampled_mask, rollout.logp - ref_logp, 0.0)
    extra = {**graded.extra, "ref_logp": ref_logp}
    if config.kl_in == "reward":
        extra["kl_penalty"] = ctx.kl_coef * k1
    mean = float(k1.sum() / rollout.sampled_mask.sum())
    ctx.metrics |= {"kl/coef": ctx.kl_coef, "kl/sampler_to_reference": mean}
    return replace(graded, extra=extra)


def steer_kl(ctx: Context, responses: int) -> None:
    """Under --kl-target: the factor of the KL in the next step, moved by at most a fifth per --kl-horizon responses
    from what it was in this one (Ziegler et al., arXiv 1909.08593, section 2.2)."""
    config = ctx.train
    if config.kl != "none" and config.kl_target:
        error = max(-0.2, min(0.2, ctx.metrics["kl/sampler_to_reference"] / config.kl_target - 1))
        ctx.at.kl_coef = ctx.kl_coef * (1 + error * responses / config.kl_horizon)


def advantage(ctx: Context, graded: Graded) -> Batch:
    """The batch with the algorithm's advantage of each response at each of its sampled tokens; 0 elsewhere. The
    algorithm sees the responses without their branches; these get the numbers of their responses."""
    rollout, mask = graded.rollout, graded.rollout.sampled_mask
    values = ctx.run.algo.advantage(ctx, graded.main)
    if rollout.parent is not None:
        if values.ndim != 1 or values.numel() != rollout.main_rows.numel():
            raise ValueError(
                f"{ctx.run.algo.name}: responses of several rows need one advantage each, expected "
                f"[{rollout.main_rows.numel()}], got {list(values.shape)}"
            )
        values = values[rollout.response_of_row]
    if values.shape not in ((rollout.rows,), (rollout.tokens,)):
        raise ValueError(
            f"{ctx.run.algo.name}: advantage must return [B] = [{rollout.rows}] or [T] = [{rollout.tokens}], got "
            f"{list(values.shape)}"
        )
    per_token = values if values.shape == (rollout.tokens,) else rollout.per_token(values)
    ones = torch.ones_like(rollout.logp)
    return Batch(
        rollout, graded.reward, graded.correct, torch.where(mask, per_token, 0.0), torch.where(mask, ones, 0.0), ones,
        graded.extra,
    )  # fmt: skip


def mask_tokens(batch: Batch, config: TrainConfig) -> Batch:
    """Takes tokens out of the update: those of truncated responses (--truncated mask; they do not count in averages
    either), and all but the share of highest entropy (--entropy-quantile; arXiv 2506.01939)."""
    if config.truncated == "mask":
        batch = replace(batch, rollout=_not_sampled(batch.rollout, batch.per_token(batch.rollout.stop == STOP_LENGTH)))
        batch = replace(
            batch, weight=torch.where(batch.rollout.sampled_mask, batch.weight, 0.0),
            advantage=torch.where(batch.rollout.sampled_mask, batch.advantage, 0.0),
        )  # fmt: skip
    if config.entropy_quantile < 1:
        entropy, mask = batch.rollout.entropy, batch.rollout.sampled_mask
        if bool(mask.any()):
            count = int(mask.sum())
            cut = min(count, 1 + int((1 - config.entropy_quantile) * count))
            least = entropy[mask].kthvalue(cut).values  # of the whole step
            batch = replace(batch, coef=torch.where(entropy >= least, batch.coef, 0.0))
    return batch


def _not_sampled(rollout: Rollout, tokens: Tensor) -> Rollout:
    """`tokens` bool [T] as forced tokens: in the context, not in the loss."""
    gone = tokens & rollout.sampled_mask
    names = ("logp", "mean_logp", "entropy")
    zeroed: dict[str, Any] = {name: torch.where(gone, 0.0, getattr(rollout, name)) for name in names}
    return replace(rollout, role=torch.where(gone, ROLE_FORCED, rollout.role).to(torch.int8), **zeroed)
