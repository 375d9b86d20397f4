"""RLP: thoughts before the next token of a text, after "RLP: Reinforcement as a Pretraining Objective" (arXiv
2510.01265, section 2, algorithm 1).

A problem is a place in a text: the prefix x_<t and the token x_t that follows. The policy thinks G times behind the
prefix, in <think> ... </think>, and a thought is worth what it tells of that token:

    r_i = log pi(x_t | x_<t, <think> c_i </think>) - log phi(x_t | x_<t)               nats, temperature 1; constants
    A_i = G/(G-1) (r_i - mean r), not divided by the std
    L   = mean over thoughts of the mean over their tokens of GRPO's clipped term: thought tokens only
    phi <- tau phi + (1 - tau) pi after each optimizer step; phi = pi when the run begins

phi is a running average of the policy, in fp32 whatever the weights are (steps of 1e-3 vanish in bf16). It never sees a
thought, so no tag stands in what it reads. Its score cancels in A; it tells how much the thoughts help, which is what
"reward" and "accuracy" (the share of thoughts with r > 0) log. A thought that ends at the length limit, or with an end
token, is closed by force before it is scored: no loss on that. No next-token loss, no KL.

Texts: --text FILE, a JSONL file with a field "text" per row, or any other file, whose texts stand between blank lines;
without it the task's questions with their worked solutions. Evaluations are those of the task either way.

    --rlp-place uniform   anywhere in a text; in a task's text behind the question
                answer    of a task's text, without its worked steps, between question and answer: the thought is to
                          find the steps
                auto      uniform; answer for the built-in model on a task, which after a thought can write nothing else

Of more than one predicted token (--rlp-horizon) r is the mean. Not found: the clip range, how places in a text are
chosen, and how x_t is joined to the thought beyond a figure (here: directly behind the closing tag). Paper: 16 thoughts
of at most 2048 tokens at temperature 0.7, 512 prefixes per step, lr 1e-6.

Tried, with the built-in model on Countdown: --rlp-place uniform leaves r at -17 nats after 5 steps, for the model knows
no text behind a thought but an answer. --rlp-place answer does what r asks for, log pi(answer | thought) -2.5 -> -1.8
nats per token in 20 steps on fresh problems, and pass@1 falls, 31.5 -> 21.3 %: r pays for a likeness to the one answer
of the text, not for a right one (problems with a single solution: 21.9 %). With right or wrong as the reward and
everything else as it is, pass@1 rises to 37.7 % and that log-prob stays.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import SEQ_MEAN, clip_high, clip_low, clip_terms, group_scores
from pymathrl.batch import ROLE_PROMPT, ROLE_SAMPLED, STOP_NONE, STOP_STRING, Batch, Graded, Rollout
from pymathrl.errors import UserError
from pymathrl.models import Policy
from pymathrl.ops.token_logprob import token_logprob
from pymathrl.options import at_least, option, positive, share
from pymathrl.prompt import Prompts
from pymathrl.tasks import Grade, Problem
from pymathrl.tasks.jsonl import shuffled
from pymathrl.tasks.texts import read_texts
from pymathrl.verify.extract import END_OF_THOUGHT

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context
    from pymathrl.rollout import Draws

THOUGHT = "<think>"
MAX_ANSWER = 256  # tokens of an answer that are predicted, at most


@dataclass(frozen=True)
class Config:
    text: str | None = option(None, "file of texts, see above [the task's questions with worked solutions]")
    rlp_place: str = option("auto", "where a thought stands, see the table", choices=("auto", "uniform", "answer"))
    rlp_horizon: int = at_least(0, 0, "tokens predicted at a place (paper: 1); 0 = 1, of an answer all")
    rlp_positions: int = positive(1, "places drawn per text and epoch (not found: ours)")
    rlp_from: int = positive(1, "tokens of a text before its first place (not found: ours)")
    rlp_average: float = share(0.999, "tau, the share of the teacher that stays per optimizer step (paper: 0.999)")
    clip_low: float = clip_low(0.2, "not found: ours")
    clip_high: float = clip_high(0.2, "not found: ours")


class Teacher:
    """phi. average: name -> fp32 weights, {} before the first batch. texts: of --text, or None."""

    def __init__(self, ctx: Context) -> None:
        self.average: dict[str, Tensor] = {}
        self.texts = None if ctx.own.text is None else read_texts(ctx.own.text)
        self._policy: Policy | None = None

    def policy(self, ctx: Context) -> Policy:
        """phi as a policy; at the first call of a run that is the policy as it is."""
        if self._policy is None:
            self._policy = ctx.frozen_copy()
        if not self.average:
            self.average = {n: p.detach().float().clone() for n, p in ctx.policy.model.named_parameters()}
        for name, p in self._policy.model.named_parameters():
            p.data.copy_(self.average[name])
        return self._policy

    @torch.no_grad()
    def follow(self, policy: Policy, stay: float) -> None:
        """phi <- stay phi + (1 - stay) policy."""
        for name, p in policy.model.named_parameters():
            self.average[name].lerp_(p.float(), 1 - stay)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = {name: value.clone() for name, value in state["average"].items()}


def place_of(ctx: Context) -> str:
    """--rlp-place without auto."""
    if ctx.own.rlp_place != "auto":
        return ctx.own.rlp_place
    return "answer" if ctx.own.text is None and ctx.policy.prompt_style == "compact" else "uniform"


def text_of(ctx: Context, index: int) -> tuple[list[int], int]:
    """(token ids of text `index` of the stream, tokens before its first place)."""
    seed, own, texts = ctx.train.seed, ctx.own, ctx.memory.texts
    if texts is not None:
        epoch, at = divmod(index, len(texts))
        return ctx.tokens(texts[shuffled(len(texts), seed, epoch)[at]]), own.rlp_from
    problem = ctx.task.train(index, seed)
    solution = ctx.task.solution(problem, random.Random(f"rlp {seed} {index}"))
    steps, _, answer = solution.partition(END_OF_THOUGHT)
    steps = "" if place_of(ctx) == "answer" else problem.meta.get("worked", steps)
    question = ctx.tokens(problem.question + "\n")
    return [*question, *ctx.tokens(f"{steps}\n{answer}" if steps else answer)], max(own.rlp_from, len(question))


def draw(ctx: Context, count: int) -> Prompts:
    """The next `count` places, each a problem whose meta holds "next", the ids from x_t on that are predicted, and
    "prefix", the ids of x_<t. Of a long prefix the end is kept."""
    tags = len(ctx.tokens(THOUGHT + END_OF_THOUGHT))
    at_answer = place_of(ctx) == "answer"
    horizon = ctx.own.rlp_horizon or (MAX_ANSWER if at_answer else 1)
    problems: list[Problem] = []
    missed = 0
    while len(problems) < count:
        index, ctx.at.cursor = ctx.at.cursor, ctx.at.cursor + 1
        ids, first = text_of(ctx, index // ctx.own.rlp_positions)
        if first >= len(ids):
            missed += 1
            if missed > 1000 + 10 * count:
                raise UserError(f"--rlp-from {ctx.own.rlp_from}: no text is longer than that many tokens; lower it")
            continue
        rng = random.Random(f"rlp place {ctx.train.seed} {index}")
        at = first if at_answer else rng.randrange(first, len(ids))
        following = ids[at : at + horizon]
        room = ctx.train.max_prompt_tokens - tags - len(following)
        if room < 1:
            raise UserError(
                f"--max-prompt-tokens {ctx.train.max_prompt_tokens}: no room for a prefix beside the tags and "
                f"{len(following)} predicted tokens; raise it"
            )
        prefix = ids[max(0, at - room) : at]
        show = ctx.policy.tokenizer.decode
        problems.append(Problem(index, show(prefix), show(following), {"next": following, "prefix": prefix}))
    return Prompts(problems, [[*p.meta["prefix"], *ctx.tokens(THOUGHT)] for p in problems], ctx.at.cursor)


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    closing = ctx.tokens(END_OF_THOUGHT)
    if len(closing) == 1:
        return ctx.generate(prompts, draws, stop_ids=(*closing, *ctx.policy.eos_ids))
    return ctx.generate(prompts, draws, stop_strings=(END_OF_THOUGHT,))


def score_next(
    ctx: Context, policy: Policy, contexts: Sequence[Sequence[int]], following: Sequence[Sequence[int]]
) -> Tensor:
    """fp32 [n], nats: the mean log-prob, at temperature 1, of the tokens following[i] behind contexts[i]."""
    device = ctx.policy.device
    ids = torch.tensor([i for c, y in zip(contexts, following, strict=True) for i in (*c, *y)], device=device)
    size = torch.tensor([len(c) for c in contexts], device=device)
    count = torch.tensor([len(y) for y in following], device=device)
    offsets = torch.cat([size.new_zeros(1), (size + count).cumsum(0)])
    rows = torch.arange(size.numel(), device=device)
    row = torch.repeat_interleave(rows, size + count)
    inside = torch.arange(ids.numel(), device=device) < (offsets[:-1] + size)[row]
    role = torch.where(inside, ROLE_PROMPT, ROLE_SAMPLED).to(torch.int8)
    nothing = torch.zeros(ids.numel(), device=device)
    stop = torch.full_like(rows, STOP_NONE, dtype=torch.int8)
    asked = Rollout(ids, role, nothing, nothing, nothing, offsets, size, rows, rows, stop)
    logp = nothing.clone()
    for part in ctx.walk(asked, policy):
        logp[part.at] = token_logprob(part.logits, ids[part.at]).logp
    return asked.row_sums(logp) / count


def verify(ctx: Context, thoughts: Rollout, prompts: Prompts) -> Graded:
    closing, eos = ctx.tokens(END_OF_THOUGHT), set(ctx.policy.eos_ids)
    ids, ends = thoughts.ids.tolist(), thoughts.offsets.tolist()
    rows = [ids[a:b] for a, b in pairwise(ends)]
    for row, stop in zip(rows, thoughts.stop.tolist(), strict=True):
        if row[-1] in eos:
            row.pop()
        if stop != STOP_STRING and row[-len(closing) :] != closing:
            row.extend(closing)
    following = [p.meta["next"] for p in prompts.problems]
    group = thoughts.group.tolist()
    with_thought = score_next(ctx, ctx.policy, rows, [following[p] for p in group])
    without = score_next(ctx, ctx.memory.policy(ctx), [p.meta["prefix"] for p in prompts.problems], following)
    gain = with_thought - without[thoughts.group]
    ctx.metrics |= {"rlp/logp": float(with_thought.mean()), "rlp/teacher_logp": float(without.mean())}
    texts = ctx.policy.tokenizer.decode_batch([thoughts.response(row).tolist() for row in range(thoughts.rows)])
    grades = [Grade(g, g > 0, None, None, f"{g:+.3f} nats") for g in gain.tolist()]
    return Graded(thoughts, prompts.problems, gain, gain > 0, grades, texts)


def advantage(ctx: Context, graded: Graded) -> Tensor:
    return group_scores(graded, centre="leave_one_out")


def loss(config: Config) -> LossSpec:
    return LossSpec(form="clip", aggregation=SEQ_MEAN, terms=clip_terms(config), idle_when_zero=True)


def learn(ctx: Context, mini: Batch) -> Mapping[str, float]:
    ctx.memory.follow(ctx.policy, ctx.own.rlp_average)
    return {}


def check(train: TrainConfig, own: Any) -> None:
    if own.text is not None:
        read_texts(own.text)  # a file that cannot be read fails here: nothing was written yet
    if train.filter != "off":
        raise UserError(
            f"--filter {train.filter}: thoughts before a token have no right or wrong answers; leave it off"
        )


ALGO = Algo(
    name="rlp",
    summary="thoughts before the next token of a text, rewarded by what they tell of it",
    paper="arXiv 2510.01265",
    config=Config,
    advantage=advantage,
    loss=loss,
    defaults={"temperature": 0.7, "samples_per_prompt": 16},
    check=check,
    memory=Teacher,
    draw=draw,
    rollout=rollout,
    verify=verify,
    learn=learn,
)
