"""Stage 6, optim: AdamW with a schedule and clipping, and a step that is skipped rather than poisoned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from pymathrl.config import TrainConfig


@dataclass(frozen=True)
class StepReport:
    """grad_norm: global L2 norm before clipping; applied: False where it was not finite and nothing was changed."""

    grad_norm: float
    learning_rate: float
    applied: bool


class Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the weights in place; decay on matrices only.

    `step` works on the gradients accumulated since the last one and clears them.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, total_updates: int) -> None:
        self.config = config
        self.total_updates = max(1, total_updates)
        self.updates = 0  # optimizer steps tried, skipped ones included: the schedule's clock
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True,
        )  # fmt: skip

    def learning_rate(self) -> float:
        """The rate of the next step: linear warm-up, then constant, linear to 0 or half a cosine to 0."""
        c = self.config
        if self.updates < c.warmup_steps:
            return c.lr * (self.updates + 1) / c.warmup_steps
        done = min(1.0, (self.updates - c.warmup_steps) / max(1, self.total_updates - c.warmup_steps))
        shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return c.lr * shape[c.lr_schedule]

    def step(self, finite_loss: bool = True) -> StepReport:
        """One update. A nan or inf in the loss or in any gradient changes neither weights nor optimizer state."""
        rate = self.learning_rate()
        self.updates += 1
        for p in self.parameters:
            if p.grad is None:  # no live row in the step: its gradient is exactly 0, and momentum and decay go on
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        )
        value = float(norm)
        applied = finite_loss and math.isfinite(value)
        if applied:
            limit = self.config.max_grad_norm
            if limit > 0 and value > limit:
                torch._foreach_mul_(gradients, limit / value)
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return StepReport(value, rate, applied)

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.updates = state["updates"]
