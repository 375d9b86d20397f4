"""What an algorithm is: a record of functions, with defaults, that the one training loop calls.

An algorithm states only what is its own; a variant is `dataclasses.replace(ALGO, name=..., ...)`. The loop never has a
branch for an algorithm. Every hook gets the `Context`: the options, the policy and its engine, the task, the verifier,
and `ctx.memory`, what the algorithm keeps between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pymathrl.batch import Batch, Graded, Rollout

if TYPE_CHECKING:
    from pymathrl.context import Context
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws


@dataclass(frozen=True)
class LossSpec:
    """The loss of one optimizer step: which per-token form, its constants, and how tokens are averaged.

    form: a form of `pymathrl.ops.policy_loss`.
    terms: keyword arguments of that op (clip ranges, rho, beta, ...).
    aggregation: a mode of `pymathrl.ops.aggregation.aggregation_coef`; counts are those of the whole optimizer step.
    idle_when_zero: a token whose advantage is exactly 0 has exactly zero gradient, so that rows of groups with equal
        rewards can be left out of the update without changing it.
    """

    form: str
    aggregation: str = "token-mean"
    terms: Mapping[str, Any] = field(default_factory=dict)
    idle_when_zero: bool = False


class Memory(Protocol):
    """What an algorithm keeps between steps. Saved with every checkpoint: plain values and tensors, nested in dicts and
    lists."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _check(train: Any, own: Any) -> None:
    pass


def _draw(ctx: Context, count: int) -> Prompts:
    return ctx.draw(count)


def _rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    return ctx.generate(prompts, draws)


def _verify(ctx: Context, rollout: Rollout, prompts: Prompts) -> Graded:
    return ctx.verify(rollout, prompts.problems)


def _judge(ctx: Context, graded: Graded) -> Graded:
    return graded


def _shape(ctx: Context, graded: Graded, batch: Batch) -> Batch:
    return batch


def _learn(ctx: Context, mini: Batch) -> Mapping[str, float]:
    return {}


def _after_step(ctx: Context, batch: Batch) -> None:
    pass


@dataclass(frozen=True)
class Algo:
    """One algorithm. Only the first six fields are needed; a hook that is not given does what its line says.

    config: dataclass of its own flags; every field carries its help text.
    advantage(ctx, graded) -> fp32 [B], one number per response, or [T], one per token: constants of the loss. Entries
        of tokens that were not sampled are ignored.
    loss(own config) -> LossSpec. The options of every run (--aggregation, --kl, --entropy-coef, ...) come on top.

    defaults: options of every run that have another default here (the command line and a file still win).
    min_samples: least --samples-per-prompt with which the algorithm can learn anything.
    check(train options, own config): raises UserError for options that do not go together [anything goes].
    memory(ctx) -> what it keeps between steps, as ctx.memory; None: nothing.
    trained_beside: models of the policy's size that it may train beside it; the memory plan leaves room for them.

    In the order of a step:
    draw(ctx, count) -> Prompts: the next problems [the next of the task's stream].
    rollout(ctx, prompts, draws) -> Rollout: responses, `draws.samples` per prompt or another number, rows of a prompt
        together, group = its number [ctx.generate]. tools: evaluations use it too, for what it writes is not what the
        policy alone would [they sample plainly].
    verify(ctx, rollout, prompts) -> Graded: the verdict on each row, where it is no answer to a problem of the task
        [the task's].
    judge(ctx, graded) -> Graded: rewards of its own, second passes over the rows, other rows in their place [as
        graded]. --filter looks at groups after this.
    advantage, as above.
    shape(ctx, graded, batch) -> Batch: token weights, extra inputs of the loss, more rows [as it is].
    terms(ctx, minibatch) -> extra inputs of the loss that depend on the weights as they are at this optimizer step, by
        name, [T] of the minibatch [none].
    learn(ctx, minibatch) -> metrics: trains what else there is on the same rows, after each optimizer step [nothing].
    after_step(ctx, batch): what it remembers of the step [nothing].
    """

    name: str
    summary: str
    paper: str
    config: type
    advantage: Callable[[Context, Graded], Tensor]
    loss: Callable[[Any], LossSpec]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    min_samples: int = 2
    check: Callable[[Any, Any], None] = _check
    tools: bool = False
    memory: Callable[[Context], Memory] | None = None
    trained_beside: int = 0
    draw: Callable[[Context, int], Prompts] = _draw
    rollout: Callable[[Context, Prompts, Draws], Rollout] = _rollout
    verify: Callable[[Context, Rollout, Prompts], Graded] = _verify
    judge: Callable[[Context, Graded], Graded] = _judge
    shape: Callable[[Context, Graded, Batch], Batch] = _shape
    terms: Callable[[Context, Batch], Mapping[str, Tensor]] | None = None
    learn: Callable[[Context, Batch], Mapping[str, float]] = _learn
    after_step: Callable[[Context, Batch], None] = _after_step
