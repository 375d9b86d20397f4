"""Satori: restart and explore, after "Satori: Reinforcement Learning with Chain-of-Action-Thought" (Shen et al., arXiv
2502.02508, section 4.2; code: satori-reasoning/Satori). PPO from more initial states than the questions:

    D = {q} + D+ + D-       q followed by part of a right (D+) or a wrong (D-) response, then a phrase: reflect
    R = clip(c - 1 + sigmoid(s) + b, -10, 10)       c = 1 for a right answer, s the logit of an outcome model, or 0
    b = beta from D- where c = 1, -beta from D+ where c = 0, else 0        so correcting pays, and spoiling costs
    A = GAE, whitened over all tokens of the batch: (A - mean) / sqrt(max(var, eps)), biased variance

The part is the response without its last t <= T steps (lines; in the compact style what stands between commas). It is
prompt: never trained, and no answer is read from it. A question gives one right and one wrong response, where it has
both, of those drawn in training, and they are restarted from in the next step; the published code makes its states
once, with the tuned model. --orm bt trains an outcome model beside, see `outcome`.

The outcome model begins at chance, and --orm-normalize batch makes that chance as large as the verdict: on the built-in
model pass@1 went 26.0 % -> 19.8 % with it, -> 24.7 % without it, -> 26.7 % with --orm none (20 steps of 64 x 8, one
seed, standard error 2.5 points). With the defaults, one response to each of 512 prompts: -> 30.3 %.

Differs from the code: a response that the length limit cut gets no end token; answers are read from the response alone,
not from the last 128 characters of prompt and response. NOT FOUND: T, the share of restarts, how the outcome model is
trained; the defaults are ours. Published with --temperature 0.6 and a model tuned to reflect; its rounds, in between
which the base model is tuned on the policy's responses, are runs of their own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos import outcome, ppo
from pymathrl.algos.common import whiten
from pymathrl.batch import Batch, Graded, Rollout
from pymathrl.errors import UserError
from pymathrl.options import at_least, option, positive

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context
    from pymathrl.learner import CriticLearner
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws

LIMIT = 10.0  # of a reward
TOKEN = "<|reflect|>"  # of Satori's models
PHRASE = {"compact": "\n<think>"}  # the built-in model begins anew after it; it has no words
WORDS = "\nWait, let me check what I have so far and go on from there.\n"
PLACE = {0: 0, -1: 1, 1: 2}  # status -> which samples of the problem: no two draws of a problem share random numbers


@dataclass(frozen=True)
class Config(ppo.Config):
    whiten_eps: float = positive(1e-8, "least variance of the advantages (code: 1e-8)")
    bonus_scale: float = at_least(0, 0.5, "beta, for correcting a wrong start or spoiling a right one (paper: 0.5)")
    restart_share: float = ppo.share(0.67, "share of the prompts that are restarts, at most, half from right responses "
                                           "(paper: not given; D holds three states per question)")  # fmt: skip
    restart_back: int = positive(4, "T: steps taken off a response at most (paper: not given)")
    reflect: str = option("", f"text at the end of a restart; empty: {TOKEN} where the vocabulary has it, else a "
                              "phrase in the prompt's style")  # fmt: skip
    orm: str = option("none", "outcome model: none (its logit is 0), or bt, trained on pairs", choices=("none", "bt"))
    orm_normalize: str = option("none", "its logits: as they are, or less their mean, divided by their std, over the "
                                        "responses of a draw", choices=("none", "batch"))  # fmt: skip


def check(train: TrainConfig, own: Config) -> None:
    if own.orm == "bt" and train.samples_per_prompt < 2:
        raise UserError(
            "--orm bt learns from right and wrong responses to the same prompt: expected at least 2 "
            f"--samples-per-prompt, got {train.samples_per_prompt}; for example --samples-per-prompt 8 "
            "--prompts-per-step 64"
        )


def step_ends(pieces: Sequence[str], mark: str) -> list[int]:
    """Where the steps of a response end; pieces: its tokens' texts. A token that holds the mark ends one."""
    ends = [i for i, piece in enumerate(pieces, 1) if mark in piece]
    return ends if ends and ends[-1] == len(pieces) else [*ends, len(pieces)]


def backtrack(ends: Sequence[int], most: int, rng: random.Random) -> int:
    """How many tokens are left when 1 .. most steps are taken off the end; at least one step stays. 0: it has one."""
    return 0 if len(ends) < 2 else ends[-1 - rng.randint(1, min(most, len(ends) - 1))]


class Restarts(ppo.WithCritic):
    """The critic, the outcome model, and restart states by status, oldest first: (uid of the problem, token ids)."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.states: dict[int, list[tuple[int, list[int]]]] = {1: [], -1: []}
        self.orm: CriticLearner | None = None
        if ctx.own.orm == "bt":
            self.orm = ctx.new_critic(ppo.rate(ctx), ctx.train.updates)
        tokenizer = ctx.policy.tokenizer
        own = ctx.own.reflect or (TOKEN if tokenizer.backend.token_to_id(TOKEN) is not None else "")
        self.phrase = ctx.tokens(own or PHRASE.get(ctx.policy.prompt_style, WORDS))
        self.mark = "," if ctx.policy.prompt_style == "compact" else "\n"

    def new_stage(self, ctx: Context) -> None:
        super().new_stage(ctx)
        if self.orm is not None:
            self.orm.restart(replace(ctx.train, lr=ppo.rate(ctx)), updates=ctx.train.updates)
        self.states = {1: [], -1: []}  # of another stage's task

    def store(self, ctx: Context, graded: Graded) -> None:
        """Of each plain question of the draw a right and a wrong response, cut."""
        rollout, tokenizer = graded.rollout, ctx.policy.tokenizer
        ids, offsets, prompt = rollout.ids.tolist(), rollout.offsets.tolist(), rollout.prompt_len.tolist()
        correct, bounds = graded.correct.tolist(), rollout.group_offsets.tolist()
        for number, problem in enumerate(graded.problems):
            if "restart" in problem.meta:
                continue
            rng = random.Random(ctx.train.seed * 1_000_003 + problem.uid)
            for status, kept in self.states.items():
                rows = [b for b in range(bounds[number], bounds[number + 1]) if correct[b] == (status == 1)]
                if not rows:
                    continue
                row = rng.choice(rows)
                response = ids[offsets[row] + prompt[row] : offsets[row + 1]]
                pieces = tokenizer.decode_batch([[i] for i in response])
                part = response[: backtrack(step_ends(pieces, self.mark), ctx.own.restart_back, rng)]
                if part and prompt[row] + len(part) + len(self.phrase) <= ctx.train.max_prompt_tokens:
                    kept.append((problem.uid, [*part, *self.phrase]))
        for kept in self.states.values():
            del kept[: -ctx.train.prompts_per_step]

    def take(self, status: int, most: int) -> list[tuple[int, list[int]]]:
        """The newest states, which no draw sees again."""
        kept = self.states[status]
        first = max(0, len(kept) - most)
        self.states[status], taken = kept[:first], kept[first:]
        return taken

    def state_dict(self) -> dict[str, Any]:
        orm = {} if self.orm is None else {"orm": self.orm.state_dict()}
        return {**super().state_dict(), **orm, "right": self.states[1], "wrong": self.states[-1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.states = {1: list(state["right"]), -1: list(state["wrong"])}
        if self.orm is not None:
            self.orm.load_state_dict(state["orm"])


def draw(ctx: Context, count: int) -> Prompts:
    memory: Restarts = ctx.memory
    memory.follow(ctx)
    most = int(ctx.own.restart_share * count) // 2
    taken = [(status, *state) for status in (1, -1) for state in memory.take(status, most)]
    prompts = ctx.draw(count - len(taken))
    rows = list(zip(prompts.problems, prompts.ids, strict=True))
    for status, uid, part in taken:
        problem = ctx.task.train(uid, ctx.train.seed)
        rows.append((replace(problem, meta={**problem.meta, "restart": status}), [*ctx.encode(problem), *part]))
    random.Random(ctx.train.seed * 1_000_003 + ctx.at.cursor).shuffle(rows)  # every minibatch gets of each kind
    return replace(prompts, problems=[problem for problem, _ in rows], ids=[ids for _, ids in rows])


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    place = torch.tensor([PLACE[p.meta.get("restart", 0)] for p in prompts.problems]) * draws.samples
    return ctx.generate(prompts, draws, uids=draws.uids(prompts.problems) + place.repeat_interleave(draws.samples))


def outcome_reward(correct: Tensor, status: Tensor, logit: Tensor, bonus: float) -> Tensor:
    """correct bool [B], status int64 [B] in -1, 0, 1, logit fp32 [B] -> fp32 [B]."""
    gain = torch.where(correct & (status == -1), bonus, 0.0) - torch.where(~correct & (status == 1), bonus, 0.0)
    return (correct.float() - 1 + logit.sigmoid() + gain).clamp(-LIMIT, LIMIT)


def judge(ctx: Context, graded: Graded) -> Graded:
    memory: Restarts = ctx.memory
    memory.store(ctx, graded)
    correct = graded.correct
    status = torch.tensor([p.meta.get("restart", 0) for p in graded.problems]).to(correct.device)[graded.rollout.group]
    logit = torch.zeros_like(graded.reward)
    if memory.orm is not None:
        logit = outcome.scores(memory.orm, graded.rollout)
        if ctx.own.orm_normalize == "batch":
            logit = (logit - logit.mean()) / (logit.std(correction=0) + 1e-8)
    for name, of in (("question", status == 0), ("right", status == 1), ("wrong", status == -1)):
        ctx.metrics[f"satori/from_{name}"] = float(of.float().mean())
        if bool(of.any()):
            ctx.metrics[f"satori/accuracy_from_{name}"] = float(correct[of].float().mean())
    reward = outcome_reward(correct, status, logit, ctx.own.bonus_scale)
    return ppo.judge(ctx, replace(graded, reward=reward))


def advantage(ctx: Context, graded: Graded) -> Tensor:
    mask = graded.rollout.sampled_mask
    return whiten(ppo.estimate(ctx, graded).advantage, mask, floor=ctx.own.whiten_eps, correction=0)


def learn(ctx: Context, mini: Batch) -> Mapping[str, float]:
    orm = ctx.memory.orm
    return ppo.learn(ctx, mini) if orm is None else {**ppo.learn(ctx, mini), **outcome.learn(orm, mini)}


ALGO = replace(
    ppo.ALGO,
    name="satori",
    summary="PPO from questions and from cut right and wrong responses to reflect on",
    paper="arXiv 2502.02508",
    config=Config,
    advantage=advantage,
    defaults={"samples_per_prompt": 1, "prompts_per_step": 512},
    memory=Restarts,
    trained_beside=2,
    draw=draw,
    rollout=rollout,
    judge=judge,
    learn=learn,
    check=check,
)
