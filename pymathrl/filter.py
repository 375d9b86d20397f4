"""Groups that teach: online difficulty filtering, as an option of every algorithm.

A group is kept by its accuracy, never by a shaped reward: "mixed" keeps those with both right and wrong answers (DAPO's
dynamic sampling, arXiv 2503.14476, section 3.2), "band" those whose accuracy lies in [low, high] (online difficulty
filtering, arXiv 2504.03380: the balanced band 0.3 .. 0.7 works best). What is missing from a step's batch is drawn
anew, a bounded number of times; surplus groups wait in a carry buffer for the next step and no longer, since the policy
moves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pymathrl.batch import Graded, Rollout
from pymathrl.config import TrainConfig
from pymathrl.context import Context
from pymathrl.prompt import Prompts

MIN_RATE = 0.1  # of groups kept, assumed at least when the size of the next draw is chosen
BINS = 4  # of the histogram of accuracies that is logged, besides exactly 0 and exactly 1


def keep_mask(accuracy: Tensor, config: TrainConfig) -> Tensor:
    """accuracy [P] -> bool [P]."""
    if config.filter == "band":
        slack = 1e-6  # an accuracy is a rounded fraction: 0.3 of ten is 0.3
        return (accuracy >= config.filter_low - slack) & (accuracy <= config.filter_high + slack)
    if config.filter == "mixed":
        return (accuracy > 0) & (accuracy < 1)
    return torch.ones_like(accuracy, dtype=torch.bool)


class Filter:
    """Collects a step's groups. carry: surplus groups and the step in which they were drawn."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.carry: Graded | None = None
        self.carry_step = -1
        self._seen: list[Tensor] = []
        self._kept = self._rounds = 0

    def start(self) -> Graded | None:
        """What the last step left over; older ones are dropped."""
        self._seen, self._kept, self._rounds = [], 0, 0
        carried, self.carry = self.carry, None
        return carried if carried is not None and self.carry_step == self.ctx.at.step - 1 else None

    def wanted(self, have: int) -> int:
        """How many prompts to draw next for a batch that has `have` groups; 0 when it is full or the rounds are."""
        config = self.ctx.train
        missing = config.prompts_per_step - have
        if missing <= 0:
            return 0
        if self._rounds == 0:
            return missing if config.filter == "off" else config.prompts_per_step
        if config.filter == "off":
            return 0
        if self._rounds == config.filter_rounds:
            self.ctx.note(
                f"step {self.ctx.at.step + 1}: after {self._rounds} rounds --filter {config.filter} has kept {have} of "
                f"{config.prompts_per_step} groups; the step goes on with these"
            )
            return 0
        seen = sum(a.numel() for a in self._seen)
        return min(config.prompts_per_step, int(missing / max(MIN_RATE, self._kept / seen)) + 1)

    def take(self, have: Graded | None, new: Graded) -> Graded | None:
        """The groups so far with those of `new` that are kept."""
        kept = keep_mask(new.accuracy, self.ctx.train).nonzero()[:, 0]
        self._seen.append(new.accuracy)
        self._kept += kept.numel()
        self._rounds += 1
        if not kept.numel():
            return have
        chosen = new if kept.numel() == new.groups else new.select_groups(kept)
        return chosen if have is None else Graded.concat([have, chosen])

    def finish(self, graded: Graded | None) -> Graded | None:
        """The step's batch; what is over goes into the carry buffer."""
        most, config = self.ctx.train.prompts_per_step, self.ctx.train
        if config.filter != "off":
            accuracy = torch.cat(self._seen)
            inner = accuracy[(accuracy > 0) & (accuracy < 1)]
            counts = torch.histc(inner, BINS, 0.0, 1.0) / accuracy.numel()
            self.ctx.metrics |= {
                "filter/keep_rate": self._kept / accuracy.numel(), "filter/rounds": self._rounds,
                "filter/dropped_groups": accuracy.numel() - self._kept,
                "filter/accuracy_0": float((accuracy == 0).float().mean()),
                "filter/accuracy_1": float((accuracy == 1).float().mean()),
                **{f"filter/accuracy_bin{i}": float(c) for i, c in enumerate(counts)},
            }  # fmt: skip
        if graded is None or graded.groups <= most:
            return graded
        self.carry = graded.select_groups(range(most, graded.groups))
        self.carry_step = self.ctx.at.step
        return graded.select_groups(range(most))

    # The problems of a carried group are elements of the task's stream, and its grades follow from its tokens: neither
    # is saved.

    def state_dict(self) -> dict[str, Any]:
        c = self.carry
        if c is None:
            return {}
        return {
            "rollout": c.rollout.state_dict(), "uids": [p.uid for p in c.problems], "reward": c.reward,
            "correct": c.correct, "extra": dict(c.extra), "step": self.carry_step,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.carry, self.carry_step = None, -1
        if not state:
            return
        problems = [self.ctx.task.train(uid, self.ctx.train.seed) for uid in state["uids"]]
        prompts = Prompts(problems, [self.ctx.encode(problem) for problem in problems])
        rollout = Rollout.restore(state["rollout"]).to(self.ctx.policy.device)
        graded = self.ctx.run.algo.verify(self.ctx, rollout, prompts)
        move = lambda values: values.to(self.ctx.policy.device)
        self.carry = replace(
            graded, reward=move(state["reward"]), correct=move(state["correct"]),
            extra={name: move(values) for name, values in state["extra"].items()},
        )  # fmt: skip
        self.carry_step = state["step"]
