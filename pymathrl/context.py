"""What the hooks of an algorithm may use: options, the policy with its engine, the task, the verifier, other models.

One per session of a run. Hooks are functions of it and of what travels between the stages; what they remember lies in
`ctx.memory` and is saved with each checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pymathrl import devices
from pymathrl.batch import Graded, Rollout
from pymathrl.config import Run, TrainConfig
from pymathrl.errors import UserError
from pymathrl.learner import CriticLearner, Learner
from pymathrl.models import Policy, load
from pymathrl.prompt import Prompts, draw, encode, encode_prompt, stop_strings, system_of
from pymathrl.rollout import Draws, Engine, Scored, Scores, score, walk
from pymathrl.rollout.draws import SAMPLE_BITS
from pymathrl.tasks import Problem, Task
from pymathrl.tasks.prompt_style import noted
from pymathrl.verify.stage import Tally, ahead, verify


@dataclass
class Position:
    """Where a run is; plain data, saved with each checkpoint.

    Random numbers need no state: every draw is a pure function of (seed, problem, sample, position).
    """

    step: int = 0  # steps done
    stage: int = 0  # of a run with stages, from 0
    stage_step: int = 0  # steps done in it
    cursor: int = 0  # next element of the task's stream
    wall_s: float = 0.0  # of all sessions of the run
    tokens: int = 0  # generated
    skipped: int = 0  # optimizer steps left out because of a nan or an infinity
    skips_in_a_row: int = 0
    empty_in_a_row: int = 0  # steps of which --filter kept no group
    kl_coef: float | None = None  # of --kl as --kl-target has moved it; None: not yet
    before: dict[str, float] = field(default_factory=dict)  # the evaluation before training


@dataclass
class Context:
    """run: the options. at: where the run is. memory: what the algorithm keeps, made by `Algo.memory`. metrics: numbers
    that hooks add are logged with the step. tally: what the verifier did in it. note(text): a line of the log."""

    run: Run
    learner: Learner
    task: Task
    at: Position
    note: Callable[[str], None] = print
    memory: Any = None
    metrics: dict[str, float] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    _reference: dict[str, Policy] = field(default_factory=dict)  # by its name: one

    @property
    def train(self) -> TrainConfig:
        """The options of every run."""
        return self.run.train

    @property
    def own(self) -> Any:
        """The algorithm's own options, an instance of `Algo.config`."""
        return self.run.own

    @property
    def policy(self) -> Policy:
        return self.learner.policy

    @property
    def engine(self) -> Engine:
        return self.learner.engine

    @property
    def progress(self) -> float:
        """The share of the run's (or the stage's) steps that is done, 0 .. 1."""
        return self.at.stage_step / max(1, self.train.steps)

    @property
    def kl_coef(self) -> float:
        """The factor of the KL in this step: --kl-coef, or what --kl-target has made of it."""
        return self.train.kl_coef if self.at.kl_coef is None else self.at.kl_coef

    @property
    def draws(self) -> Draws:
        """How the rollouts of training are drawn."""
        c = self.train
        return Draws(c.samples_per_prompt, c.max_new_tokens, c.temperature, c.top_k, c.top_p, c.min_p, c.seed)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts that end a response to a problem of the task beside the end token; none for most."""
        return stop_strings(self.task)

    def draw(self, count: int) -> Prompts:
        """The next `count` problems of the task's stream."""
        prompts = draw(self.policy, self.task, cursor=self.at.cursor, count=count, seed=self.train.seed,
                       max_tokens=self.train.max_prompt_tokens)  # fmt: skip
        self.at.cursor = prompts.cursor
        return prompts

    def problem_of(self, uid: int) -> Problem:
        """The problem that a sample of training with this identity answers, see `Draws.uids`."""
        return self.task.train(self.problem_uid(uid), self.train.seed)

    def problem_uid(self, uid: int) -> int:
        """The identity of that problem."""
        return uid >> SAMPLE_BITS

    def encode(self, problem: Problem, note: str = "") -> list[int]:
        """The prompt of a problem as token ids, with a line of text below the question where one is given."""
        if note:
            text = noted(self.task, problem, self.policy.prompt_style, note)
            return encode_prompt(self.policy, text, system_of(self.task))
        return encode(self.policy, self.task, problem)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text alone, without begin token or template: for forced phrases."""
        return self.policy.tokenizer.encode(text)

    def generate(
        self, prompts: Prompts, draws: Draws | None = None, *, uids: Tensor | None = None, **options: Any
    ) -> Rollout:
        """Responses to the prompts, `draws.samples` each. uids int64 [P*samples]: identities of the samples, where the
        prompts of a call need different ones than `draws` gives. options: more arguments of `Engine.generate`; what
        ends a response is by default what the task says."""
        d = draws or self.draws
        if "stop_ids" not in options:
            options.setdefault("stop_strings", self.stop_strings)
        options.setdefault("on_finished", ahead(prompts.problems, d.samples, self.task, self.policy.tokenizer))
        return self.engine.generate(
            prompts.ids,
            d.samples,
            d.max_new_tokens,
            uids=d.uids(prompts.problems) if uids is None else uids,
            seed=d.seed,
            **d.sampling,
            **options,
        )

    def verify(self, rollout: Rollout, problems: Sequence[Problem]) -> Graded:
        """The task's verdict on each row; problems [P] in the order of the groups, which are numbered 0 .. P-1."""
        v = verify(rollout, problems, self.task, self.policy.tokenizer)
        self.tally += v.tally
        return Graded(rollout, problems, v.reward, v.correct, v.grades, v.texts)

    def score(self, rollout: Rollout, policy: Policy | None = None, min_p: float | None = None) -> Scores:
        """The sampled tokens under `policy` [the one that is trained, as it is now], at the rollouts' temperature."""
        c = self.train
        return score(policy or self.policy, rollout, c.temperature, c.tokens_per_microbatch, min_p)

    def walk(self, rollout: Rollout, policy: Policy | None = None) -> Iterator[Scored]:
        """Hidden states and logits of every sampled token, a bounded number at a time."""
        return walk(policy or self.policy, rollout, self.train.tokens_per_microbatch)

    def frozen_copy(self) -> Policy:
        """The policy as it is now, with weights of its own that nothing moves."""
        return replace(self.policy, model=copy.deepcopy(self.policy.model).requires_grad_(False).eval())

    def reference(self) -> Policy:
        """The reference policy of KL terms: --kl-reference, or the model that the run began with. Loaded when first
        asked for."""
        name = self.train.kl_reference or self.train.model
        if name not in self._reference:  # a later stage may name another one
            device = self.policy.device
            policy = load(name, device, devices.weight_dtype(self.train.dtype, device))
            policy.model.requires_grad_(False)
            if policy.config.vocab_size != self.policy.config.vocab_size:
                raise UserError(
                    f"--kl-reference {name}: its vocabulary has {policy.config.vocab_size} tokens, the policy's "
                    f"{self.policy.config.vocab_size}; it must be of the same family"
                )
            self._reference = {name: policy}
        return self._reference[name]

    def new_learner(self, policy: Policy, updates: int, **options: Any) -> Learner:
        """Another model to train beside the policy, under the run's options but for `options` of these; `updates`: its
        optimizer steps in all. Keep it in the memory and save its `state_dict`."""
        return Learner(policy, replace(self.train, **options), updates=updates)

    def new_critic(self, lr: float, updates: int) -> CriticLearner:
        """A critic to train beside the policy, of its layers as they are now, under the same options but for the
        learning rate; `updates`: its optimizer steps in all. Keep it in the memory and save its `state_dict`."""
        return CriticLearner(self.policy, replace(self.train, lr=lr), updates=updates)
