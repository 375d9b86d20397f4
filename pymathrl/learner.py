"""Weights that are being trained, with what generates from them and what moves them: one copy for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pymathrl.algos import LossSpec
from pymathrl.batch import Batch, Rollout, micro_batches
from pymathrl.config import TrainConfig
from pymathrl.loss import LossReport, minibatch_loss
from pymathrl.models import Critic, Policy
from pymathrl.optim import Optimizer, StepReport
from pymathrl.rollout import Engine


@dataclass
class Update:
    """The optimizer steps of one batch, in order."""

    losses: list[LossReport] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
    beside: list[Mapping[str, float]] = field(default_factory=list)  # what `learn` returned


class Learner:
    """A policy, its engine and its optimizer. A run has one; an algorithm may make more (see `Context.new_learner`).

    updates: optimizer steps in all, for the learning-rate schedule.
    current: the optimizer steps so far of the batch that is being trained.
    """

    def __init__(self, policy: Policy, config: TrainConfig, *, updates: int, max_pages: int | None = None) -> None:
        self.policy, self.config = policy, config
        self.engine = Engine(policy, config.seed, max_batch=config.rollout_rows, max_pages=max_pages)
        self.optimizer = Optimizer(policy.model, config, updates)
        self.current = Update()

    def restart(self, config: TrainConfig, *, updates: int, max_pages: int | None = None) -> None:
        """Goes on with these weights under the options of another stage, whose schedule starts anew."""
        self.config = config
        self.engine = Engine(self.policy, config.seed, max_batch=config.rollout_rows, max_pages=max_pages)
        self.optimizer.restart(config, updates)

    def update(
        self,
        batch: Batch,
        spec: LossSpec,
        *,
        terms: Callable[[Batch], Mapping[str, Tensor]] | None = None,
        learn: Callable[[Batch], Mapping[str, float]] | None = None,
        timer: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> Update:
        """The optimizer steps of one batch: `epochs` passes of `minibatches` steps over whole groups, in their order.

        terms, learn: see `Algo`; both get the minibatch, `learn` after its step.
        """
        config, rollout = self.config, batch.rollout
        bounds = rollout.group_offsets
        self.current = done = Update()
        for _ in range(config.epochs):
            for groups in torch.arange(bounds.numel() - 1, device=bounds.device).chunk(config.minibatches):
                rows = torch.arange(int(bounds[groups[0]]), int(bounds[groups[-1] + 1]), device=bounds.device)
                with timer("loss"):
                    report = minibatch_loss(
                        self.policy.model, batch, rows, spec, temperature=config.temperature,
                        token_budget=config.tokens_per_microbatch, max_new_tokens=config.max_new_tokens, terms=terms,
                    )  # fmt: skip
                    finite = math.isfinite(float(report.loss))
                with timer("optim"):
                    done.steps.append(self.optimizer.step(finite))
                done.losses.append(report)
                if learn is not None:
                    with timer("loss"):
                        done.beside.append(learn(batch.select(rows)))
        return done

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer, of a learner that an algorithm keeps beside the run's own."""
        return _state(self.policy.model, self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _load_state(self.policy.model, self.optimizer, state)


class CriticLearner:
    """A model of numbers, one per sampled token, and its optimizer: values of states, or scores of responses.

    It begins as a copy of the policy's layers. config: the options of its optimizer, and the size of micro-batches;
    updates: optimizer steps in all, for the learning-rate schedule.
    """

    def __init__(self, policy: Policy, config: TrainConfig, *, updates: int) -> None:
        self.config, self.model = config, Critic.like(policy.model)
        self.optimizer = Optimizer(self.model, config, updates)

    def restart(self, config: TrainConfig, *, updates: int) -> None:
        """Goes on with these weights under the options of another stage, whose schedule starts anew."""
        self.config = config
        self.optimizer.restart(config, updates)

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """fp32 [T]: at each sampled token the value of the state in which it was drawn; 0 elsewhere."""
        out = torch.zeros_like(rollout.logp)
        for part in micro_batches(rollout, torch.arange(rollout.rows), self.config.tokens_per_microbatch):
            out[part.token_index] = self.model(part.ids, part.starts, part.hidden_index)
        return out

    def update(self, rollout: Rollout, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, StepReport]:
        """One optimizer step on the sum of loss(at, values) over micro-batches, and that sum before the step.

        at int64 [n]: indices of sampled tokens in the packed arrays, whole rows; values fp32 [n]: theirs,
        differentiable. Normalisers are the caller's, of all the rows.
        """
        total = torch.zeros((), device=rollout.device)
        for part in micro_batches(rollout, torch.arange(rollout.rows), self.config.tokens_per_microbatch):
            term = loss(part.token_index, self.model(part.ids, part.starts, part.hidden_index))
            term.backward()
            total += term.detach()
        value = float(total)
        return value, self.optimizer.step(math.isfinite(value))

    def state_dict(self) -> dict[str, Any]:
        return _state(self.model, self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _load_state(self.model, self.optimizer, state)


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"weights": weights, "optimizer": optimizer.state_dict()}


@torch.no_grad()
def _load_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    for name, p in model.named_parameters():
        p.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
