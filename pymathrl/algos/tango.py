"""RL Tango: a generator and a verifier of its steps, trained together, after "RL Tango: Reinforcing Generator and
Verifier Together for Language Reasoning" (Zha et al., arXiv 2505.15034, sections 3.2 and 4, algorithm 1).

The verifier, a model of its own, reads problem, solution and its number of steps K, and writes a verdict on each step
and a final one. It never sees step labels: it is paid for the final verdict.

Generator, y_k in {-1, 1} of one verification of each response, I(k) the last token of step k, z over all steps of the
group:
    A_out    = (r_out - mean) / (std + eps)            z_k = (y_k / K - mean) / (std + eps)
    A_step,t = sum over I(k) >= t of z_k               A_t = (1 - alpha) A_out + alpha A_step,t
    alpha    = alpha_start (alpha_end / alpha_start)^(share of the run that is done)
Verifier, M verifications of one solution of each problem, after every 3rd optimizer step of the generator, and 40 times
before the first:
    r_v = 1[final verdict = r_out] + gamma r_fmt       A_v = s (r_v - mean) / (std + eps)
    s = 1 / sqrt(number of right solutions) where the solution is right, of wrong ones where it is wrong; the numbers
    are moving averages, and s has mean 1 over the solutions
Both: GRPO's clipped loss.

NOT FOUND in the paper, and so ours: the form of r_v (equation lost), the law of alpha between its ends, the format
penalties (r_fmt is the share of the rules that are met: K verdicts, a justification of each, a final verdict), the mean
of s, clip ranges. A verification that cannot be read gives its response no step part, and is counted. The paper's KL is
--kl k3 --kl-coef 0.001, for both models.

Steps are <step> ... </step>; where a response has none, the lines of its thought. For the built-in model they are the
pieces of its thought between commas, and its verifier gives each verdict in one character, + or -: ++-- for three steps
and the final one. It draws from these two alone, for left to itself it finds the final verdict and never the others
(tried: 60 steps, none readable).

The verifier starts as a copy of the policy. It is saved, with its optimizer, in the trainer state of each checkpoint
(trainer/state.pt, under "memory").
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import SEQ_MEAN, clip_high, clip_low, clip_terms, group_scores
from pymathrl.batch import Batch, Graded, Rollout, enumerate_ragged
from pymathrl.ops.group_advantage import group_advantage
from pymathrl.options import at_least, option, positive

if TYPE_CHECKING:
    from pymathrl.context import Context
    from pymathrl.models import Policy, Tokenizer
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws

STREAM = 0x74616E67 << 32  # mixed into the seed: a verification repeats no draw of a response
LOOKS = 256  # verifications of one response that can be told apart; 0 is the generator's
SIGNS = "+-"  # verdicts of the built-in model
LEAST = 1e-30  # a share of the top probability that only a token which was ruled out lies below
TAGGED = re.compile(r"<step>.*?</step>", re.DOTALL)
LINES = re.compile(r"[^\n]*\S[^\n]*")
PIECES = re.compile(r"[^,\n]+[,\n]?")
REQUEST = """Check this solution step by step.

Problem: {problem}

Solution, in {steps} steps: {solution}

Write <step_verification>, then for each of the {steps} steps, in order, <step>the reason of your verdict, and \
\\boxed{{CORRECT}} or \\boxed{{INCORRECT}}</step>, then </step_verification>, then the verdict on the final answer as \
<final_verification>\\boxed{{CORRECT}}</final_verification> or \
<final_verification>\\boxed{{INCORRECT}}</final_verification>."""


@dataclass(frozen=True)
class Config:
    alpha_start: float = option(0.1, "share of the step part at the start (paper: 0.1; for REINFORCE++ 0.5)",
                                check=lambda v: 0 < v <= 1, expected="in (0, 1]")  # fmt: skip
    alpha_end: float = option(1e-3, "and at the end (paper: 0.001)", check=lambda v: 0 < v <= 1, expected="in (0, 1]")
    generator_updates: int = positive(3, "optimizer steps of the generator per step of the verifier (paper: 3)")
    verifier_warmup: int = at_least(
        0, 40, "optimizer steps of the verifier before the first of the generator (paper: 40)"
    )
    verifier_lr: float = at_least(0, 0.0, "learning rate of the verifier; 0 = --lr (paper: the same)")
    verify_tokens: int = positive(1024, "length limit of a verification, in tokens (ours)")
    format_weight: float = at_least(0, 0.8, "gamma, weight of the verifier's format (paper: 0.8)")
    balance_decay: float = option(0.8, "of the moving averages of right and wrong solutions (paper: 0.8)",
                                  check=lambda v: 0 <= v < 1, expected="in [0, 1)")  # fmt: skip
    clip_low: float = clip_low(0.2, "ours")
    clip_high: float = clip_high(0.2, "ours")
    adv_eps: float = positive(1e-6, "added to each std (ours)")


class Memory:
    """The verifier and where the alternation stands. phase: optimizer steps of the generator. counts: moving averages
    of right and wrong solutions, None before the first."""

    def __init__(self, ctx: Context) -> None:
        own, train = ctx.own, ctx.train
        policy = ctx.frozen_copy()
        policy.model.requires_grad_(True).train()
        updates = own.verifier_warmup + train.updates // own.generator_updates
        lr = own.verifier_lr or train.lr
        self.learner = ctx.new_learner(policy, updates, minibatches=1, epochs=1, lr=lr)
        self.warm = not own.verifier_warmup
        self.phase = 0
        self.counts: list[float] | None = None

    def balance(self, right: int, wrong: int, decay: float) -> tuple[float, float]:
        """s of right and of wrong solutions, after these counts of a batch."""
        new = [float(right), float(wrong)]
        old = self.counts or new
        self.counts = [decay * a + (1 - decay) * b for a, b in zip(old, new, strict=True)]
        r, w = (max(1.0, count) for count in self.counts)
        mean = (r**0.5 + w**0.5) / (r + w)
        return r**-0.5 / mean, w**-0.5 / mean

    def state_dict(self) -> dict[str, Any]:
        return {"verifier": self.learner.state_dict(), "warm": self.warm, "phase": self.phase, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["verifier"])
        self.warm, self.phase, self.counts = state["warm"], state["phase"], state["counts"]


@dataclass(frozen=True)
class Solution:
    """A response to be verified. ends: the token I(k), within the response, that ends step k."""

    uid: int
    text: str
    ends: Sequence[int]


@dataclass(frozen=True)
class Verdict:
    """What a verification says. steps: +1 or -1 for each, None where it cannot be read; form: r_fmt, 0 .. 1."""

    steps: Sequence[int] | None
    final: bool | None
    form: float


def step_ends(tokenizer: Tokenizer, ids: Sequence[int], compact: bool) -> list[int]:
    """The token that ends each step of a response; steps that end in the same token are one."""
    text = tokenizer.decode(ids)
    thought, mark, _ = text.partition("</think>")
    if compact:
        ends = [m.end() for m in PIECES.finditer(thought)]
        if ends:  # </think> is to the last piece what the comma is to the others
            ends[-1] += len(mark)
    else:
        lines = [m for m in LINES.finditer(thought) if m.group().strip() != "<think>"]
        ends = [m.end() for m in list(TAGGED.finditer(text)) or lines]
    known = lambda count: len(tokenizer.decode(ids[:count]))
    return list(dict.fromkeys(bisect_left(range(len(ids) + 1), end, key=known) - 1 for end in ends))


def read_verdict(text: str, steps: int, compact: bool) -> Verdict:
    """What the verification of a solution with so many steps says."""
    if compact:
        if len(text) != steps + 1 or not set(text) <= set(SIGNS):
            return Verdict(None, None, 0.0)
        signs = [1 if c == "+" else -1 for c in text]
        return Verdict(signs[:-1], signs[-1] == 1, 1.0)
    inside = re.search(r"<step_verification>(.*?)</step_verification>", text, re.DOTALL)
    blocks = TAGGED.findall(inside.group(1)) if inside else []
    found = [re.fullmatch(r"<step>(.*)\\boxed\{(CORRECT|INCORRECT)\}\W*</step>", b, re.DOTALL) for b in blocks]
    verdicts = [m for m in found if m]
    final = re.search(r"<final_verification>\s*\\boxed\{(CORRECT|INCORRECT)\}\s*</final_verification>", text)
    counted = len(verdicts) == len(blocks) == steps
    rules = (counted, counted and all(m.group(1).strip() for m in verdicts), final is not None)
    steps_read = [1 if m.group(2) == "CORRECT" else -1 for m in verdicts] if counted else None
    return Verdict(steps_read, final.group(1) == "CORRECT" if final else None, sum(rules) / len(rules))


def question(ctx: Context, verifier: Policy, solution: Solution) -> list[int]:
    """The verifier's prompt."""
    problem, steps = ctx.problem_of(solution.uid), len(solution.ends)
    if verifier.prompt_style == "compact":
        return verifier.tokenizer.encode(ctx.task.prompt(problem, "compact") + solution.text + "\n")
    text = REQUEST.format(problem=ctx.task.prompt(problem, "chat"), solution=solution.text, steps=steps)
    if verifier.prompt_style == "chat":
        return verifier.tokenizer.encode(verifier.tokenizer.chat([{"role": "user", "content": text}]))
    return verifier.tokenizer.encode(text + "\n")


def solutions_of(ctx: Context, rollout: Rollout) -> list[Solution]:
    tokenizer, compact = ctx.policy.tokenizer, ctx.policy.prompt_style == "compact"
    responses = [rollout.response(row).tolist() for row in range(rollout.rows)]
    return [
        Solution(uid, tokenizer.decode(ids), step_ends(tokenizer, ids, compact))
        for uid, ids in zip(rollout.uid.tolist(), responses, strict=True)
    ]


def _signs_only(verifier: Policy) -> Any:
    signs = verifier.tokenizer.encode(SIGNS)

    def hook(rows: list[int], logits: Tensor, stats: object) -> Tensor:
        kept = torch.full_like(logits, -torch.inf)
        kept[:, signs] = logits[:, signs]
        return kept

    return hook


def verifications(ctx: Context, solutions: Sequence[Solution], first: int, count: int) -> tuple[Rollout, list[Verdict]]:
    """Verifications first .. first+count-1 of each solution: rows of the solution together, group = its number."""
    own, verifier, engine = ctx.own, ctx.memory.learner.policy, ctx.memory.learner.engine
    compact = verifier.prompt_style == "compact"
    ids = [question(ctx, verifier, s) for s in solutions]
    most = [min(own.verify_tokens, len(s.ends) + 1) if compact else own.verify_tokens for s in solutions]
    room = [max(1, verifier.config.max_positions - len(prompt)) for prompt in ids]
    most = [min(pair) for pair in zip(most, room, strict=True)]
    uids = [s.uid * LOOKS + look for s in solutions for look in range(first, first + count)]
    options = ctx.draws.sampling
    if compact:  # ruled out by a filter, the other tokens are left out of the log-probs of the update too
        options |= {"hook": _signs_only(verifier), "min_p": max(options["min_p"], LEAST)}
    drawn = engine.generate(ids, count, most, uids=uids, seed=ctx.train.seed ^ STREAM, **options)
    ctx.at.tokens += int(drawn.sampled_mask.sum())
    texts = verifier.tokenizer.decode_batch([drawn.response(row).tolist() for row in range(drawn.rows)])
    steps = [len(s.ends) for s in solutions for _ in range(count)]
    return drawn, [read_verdict(text, k, compact) for text, k in zip(texts, steps, strict=True)]


def train_verifier(ctx: Context, rollout: Rollout, correct: Tensor) -> dict[str, float]:
    """One optimizer step of the verifier on verifications of these responses, one for each problem."""
    own, memory, config = ctx.own, ctx.memory, ctx.train
    count = config.samples_per_prompt
    drawn, verdicts = verifications(ctx, solutions_of(ctx, rollout), 1, count)
    right = correct.repeat_interleave(count)
    agrees = [v.final == r for v, r in zip(verdicts, right.tolist(), strict=True)]
    reward = torch.tensor(
        [a + own.format_weight * v.form for a, v in zip(agrees, verdicts, strict=True)],
        dtype=torch.float32, device=drawn.device,
    )  # fmt: skip
    scores = group_advantage(
        reward, drawn.group_offsets, centre="group_mean", scale="group_std", eps=own.adv_eps
    ).advantage
    n_right = int(correct.sum())
    s_right, s_wrong = memory.balance(n_right, correct.numel() - n_right, own.balance_decay)
    scores = torch.where(right, s_right, s_wrong) * scores
    mask, zero = drawn.sampled_mask, torch.zeros_like(drawn.logp)
    extra, spec = {}, loss(own)
    if config.kl != "none" and config.kl_in == "loss":
        extra = {"ref_logp": ctx.score(drawn, ctx.reference()).logp}
        spec = replace(spec, terms={**spec.terms, "kl": config.kl, "kl_coef": ctx.kl_coef}, idle_when_zero=False)
    batch = Batch(
        drawn, reward, right, torch.where(mask, drawn.per_token(scores), zero), torch.where(mask, zero + 1, zero),
        zero + 1, extra,
    )  # fmt: skip
    update = memory.learner.update(batch, spec)
    return {
        "verifier/reward": float(reward.mean()), "verifier/agrees": sum(agrees) / len(agrees),
        "verifier/readable": sum(v.steps is not None for v in verdicts) / len(verdicts),
        "verifier/loss": float(update.losses[0].loss), "verifier/grad_norm": update.steps[0].grad_norm,
    }  # fmt: skip


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    """Responses; before the first, the verifier's warm-up on further problems of the stream, one response each."""
    memory = ctx.memory
    if not memory.warm:
        for _ in range(ctx.own.verifier_warmup):
            more = ctx.draw(ctx.train.prompts_per_step)
            graded = ctx.verify(ctx.generate(more, replace(draws, samples=1)), more.problems)
            metrics = train_verifier(ctx, graded.rollout, graded.correct)
        memory.warm = True
        ctx.note("verifier after its warm-up: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
    return ctx.generate(prompts, draws)


def judge(ctx: Context, graded: Graded) -> Graded:
    """Rewards 1 and 0; extra["step_reward"] fp32 [T]: y_k / K at the last token of each step."""
    made = graded.rollout
    solutions = solutions_of(ctx, made)
    _, verdicts = verifications(ctx, solutions, 0, 1)
    reward = torch.zeros_like(made.logp)
    starts = (made.offsets[:-1] + made.prompt_len).tolist()
    for start, s, v in zip(starts, solutions, verdicts, strict=True):
        if v.steps is not None and s.ends:
            at = torch.tensor(s.ends, device=made.device) + start
            reward[at] = torch.tensor(v.steps, dtype=torch.float32, device=made.device) / len(s.ends)
    agrees = [v.final == r for v, r in zip(verdicts, graded.correct.tolist(), strict=True)]
    ctx.metrics |= {
        "tango/unreadable": sum(v.steps is None for v in verdicts) / len(verdicts),
        "tango/agrees": sum(agrees) / len(agrees), "tango/steps": sum(len(s.ends) for s in solutions) / len(solutions),
    }  # fmt: skip
    return replace(graded, reward=graded.correct.float(), extra={**graded.extra, "step_reward": reward})


def step_advantage(graded: Graded, eps: float) -> Tensor:
    """fp32 [T]: at each token the sum of z over the steps of its row that end at it or later."""
    made, reward = graded.rollout, graded.extra["step_reward"]
    ends = reward != 0  # a verdict is never 0
    count = made.row_sums(ends.long())
    groups = torch.zeros(graded.groups + 1, dtype=torch.int64, device=made.device)
    groups[1:] = groups[1:].index_add(0, made.group, count).cumsum(0)
    z = group_advantage(reward[ends], groups, centre="group_mean", scale="group_std", eps=eps).advantage
    rows = z.new_zeros(made.rows, int(count.max()) + 1)
    rows[enumerate_ragged(count)] = z
    later = rows.flip(1).cumsum(1).flip(1)  # [B, steps + 1], 0 behind the last step
    before = ends.cumsum(0) - ends.long()
    return later[made.row_of_token, before - made.per_token(before[made.offsets[:-1]])]


def alpha(config: Config, progress: float) -> float:
    return config.alpha_start * (config.alpha_end / config.alpha_start) ** progress


def advantage(ctx: Context, graded: Graded) -> Tensor:
    share = alpha(ctx.own, ctx.progress)
    ctx.metrics["tango/alpha"] = share
    outcome = group_scores(graded, centre="group_mean", scale="group_std", eps=ctx.own.adv_eps)
    return (1 - share) * graded.rollout.per_token(outcome) + share * step_advantage(graded, ctx.own.adv_eps)


def learn(ctx: Context, mini: Batch) -> Mapping[str, float]:
    """The verifier's turn after every few steps of the generator: the first response to each problem of the last."""
    ctx.memory.phase += 1
    if ctx.memory.phase % ctx.own.generator_updates:
        return {}
    rows = mini.rollout.group_offsets[:-1]
    return train_verifier(ctx, mini.rollout.select(rows), mini.correct[rows])


def loss(config: Config) -> LossSpec:
    return LossSpec("clip", SEQ_MEAN, clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="tango",
    summary="a generator and a verifier of its steps, trained together",
    paper="arXiv 2505.15034",
    config=Config,
    advantage=advantage,
    loss=loss,
    memory=Memory,
    rollout=rollout,
    judge=judge,
    learn=learn,
)
