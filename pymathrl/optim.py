"""Stage 6, optim: AdamW with a schedule and clipping, and a step that is skipped rather than poisoned.

Weights in a low precision have fp32 master copies: AdamW moves those, and the weights are rounded from them in place. A
step of 1e-6 on a bf16 weight of 0.02 would round to nothing: the spacing there is 1.2e-4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from pymathrl.config import TrainConfig

NO_DECAY = "a_log"  # a matrix that is none: decay would pull the rates of a Mamba's channels towards one another


@dataclass(frozen=True)
class StepReport:
    """grad_norm: global L2 norm before clipping; applied: False where it was not finite and nothing was changed."""

    grad_norm: float
    learning_rate: float
    applied: bool


class Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the weights in place; decay on matrices only, not on A_log.

    `step` works on the gradients accumulated since the last one and clears them. Those of low-precision weights are
    added up in fp32, in their master's grad, as each backward pass makes them.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, total_updates: int) -> None:
        self.config = config
        self.total_updates = max(1, total_updates)
        self.updates = 0  # optimizer steps tried, skipped ones included: the schedule's clock
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.parameters = [p if p.dtype == torch.float32 else _master(p) for p in self.weights]
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        decays = [p.ndim >= 2 and not name.endswith(NO_DECAY) for name, p in zip(names, self.parameters, strict=True)]
        matrices = [p for p, decay in zip(self.parameters, decays, strict=True) if decay]
        vectors = [p for p, decay in zip(self.parameters, decays, strict=True) if not decay]
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True,
        )  # fmt: skip

    def restart(self, config: TrainConfig, total_updates: int) -> None:
        """A new stage: its options and a schedule from its start; the moments go on, or begin anew."""
        self.config, self.total_updates, self.updates = config, max(1, total_updates), 0
        decays = (config.weight_decay, 0.0)
        for group, decay in zip(self.adamw.param_groups, decays, strict=True):
            betas = (config.adam_beta1, config.adam_beta2)
            group.update(lr=config.lr, betas=betas, eps=config.adam_eps, weight_decay=decay)
        if config.stage_optimizer == "fresh":
            self.adamw.state.clear()

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
            self._round()
        self.adamw.zero_grad(set_to_none=True)
        return StepReport(value, rate, applied)

    @torch.no_grad()
    def read_weights(self) -> None:
        """Masters take the values of the weights, which were set from outside. A second optimizer on the same model
        would not do: the masters of the first take the gradients."""
        for weight, master in self._masters():
            master.copy_(weight)

    def _masters(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(weight, its master) where the two differ."""
        return [(w, p) for w, p in zip(self.weights, self.parameters, strict=True) if w is not p]

    @torch.no_grad()
    def _round(self) -> None:
        for weight, master in self._masters():
            weight.copy_(master)

    def state_dict(self) -> dict:
        # all or none: a model of mixed precision may be loaded where every weight is fp32
        masters = [p.detach() for p in self.parameters] if self._masters() else []
        return {"adamw": self.adamw.state_dict(), "updates": self.updates, "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state`, after the model's weights were loaded. The precision may differ from when it was saved,
        as it does between a CPU and a GPU: saved masters become fp32 weights, and loaded weights become masters where
        none were saved. ValueError, with nothing changed, where the state is of another model."""
        saved: list[torch.Tensor] = state["masters"]
        own: list[torch.Tensor] = list(self.parameters) if saved else [p for _, p in self._masters()]
        moments = state["adamw"]["state"]
        ordered = [p for group in self.adamw.param_groups for p in group["params"]]
        indices = [i for group in state["adamw"]["param_groups"] for i in group["params"]]
        if (
            (saved and [m.shape for m in saved] != [p.shape for p in own])
            or len(indices) != len(ordered)
            or any(
                moments[i]["exp_avg"].shape != p.shape for i, p in zip(indices, ordered, strict=True) if i in moments
            )
        ):
            raise ValueError(
                f"Optimizer.load_state_dict: state must be of a model with these {len(ordered)} weights, got "
                f"{len(indices)} weights and {len(saved)} masters, or other shapes; load the weights it was saved with"
            )
        self.adamw.load_state_dict(state["adamw"])
        self.updates = state["updates"]
        for parameter, master in zip(own, saved or [w for w, _ in self._masters()], strict=True):
            parameter.copy_(master)
        self._round()


def _master(weight: nn.Parameter) -> nn.Parameter:
    """The fp32 copy of a low-precision weight; it takes over the weight's gradient after each backward pass."""
    master = nn.Parameter(weight.detach().float())

    def take(w: torch.Tensor) -> None:
        gradient, w.grad = w.grad, None
        if gradient is not None:
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    weight.register_post_accumulate_grad_hook(take)
    return master
