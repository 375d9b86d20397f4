r"""Soft tokens: a chain of thought in vectors instead of words, trained by REINFORCE, after "Soft Tokens, Hard Truths"
(arXiv 2509.19170). No code was published with it.

A step of the chain of thought mixes the embedding table E by the policy's own distribution and adds noise:

    p  = softmax(z / tau),   h = p E,   h~ = h + sigma eps,   eps ~ N(0, I)          h~ is what the model is fed
    lp = -|h~ - h|^2 / (2 sigma^2), the log-density of h~ up to a constant; its gradient flows through h, that is
         through p and E, while h~ is data: the update is one ordinary pass that is fed the h~ of the rollout
    soft: tau = 0.5   fuzzy: tau = 1e-4   hard: ordinary tokens at --temperature, for comparison

Until the text of its most probable tokens holds the phrase --cot-stop, or for as long as --max-new-tokens leaves
room; then a phrase is put in (--cot-prefill, behind --cot-stop where the chain was cut off), and the answer is at most
--answer-tokens ordinary tokens. With R = 100 for a right answer, 10 for a wrong one, 0 for none,

    A = R - mean of the other responses of the group
    L = mean over responses of the sum over the sampled tokens, soft and hard, of -A lp

Published: 2 prompts x 32 samples, one update per batch, AdamW at 3e-6 to 8e-6, cosine after 20 steps of warm-up, chains
of 128 (GSM8K) or 512 tokens: --prompts-per-step 2 --samples-per-prompt 32 --lr 6e-6 --lr-schedule cosine
--warmup-steps 20. Its best results train soft or fuzzy and decode ordinary tokens, as evaluations do here.

The score of a soft token is eps / sigma: on the built-in model its gradient has 27 times the norm of an ordinary
chain's (3,800 against 140 at the first steps), nearly all of it noise. At the 4e-4 that suits ordinary chains there 20
steps took pass@1 from 26.0 to 9.2 %; at 3e-5 and at 6e-6, the default here, it stayed (26.3 and 26.6 %).

Decided here, where the paper is silent: sigma = 0.33 rms with rms over all numbers of E (its noise is then about a
third of an embedding; --rms-mode row takes the norm of a row instead, sqrt(D) times as much), taken when the run begins
and kept; the phrase that is put in has no loss; a chain that ends in an end token is a response without an answer. At
tau = 1e-4 the gradient of p vanishes unless logits tie: a fuzzy chain teaches through E and the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import group_scores
from pymathrl.batch import Graded, Rollout
from pymathrl.errors import UserError
from pymathrl.ops.soft_embed import SoftSampling
from pymathrl.options import at_least, flag, option, positive

if TYPE_CHECKING:
    from pymathrl.context import Context
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws

TAU = {"soft": 0.5, "fuzzy": 1e-4}
TAGS = ("</think>", "<answer>")  # phrases (cot_stop, cot_prefill) of prompts that ask for these tags
PAPER = ("The final answer is: ", "\\boxed{")


@dataclass(frozen=True)
class Config:
    cot_mode: str = option("soft", "what the chain of thought is made of, see above", choices=("hard", "soft", "fuzzy"))
    soft_tau: float = at_least(0, 0.0, "temperature of the mix; 0 = of the mode (paper: 0.5 soft, 1e-4 fuzzy)")
    soft_top_k: int = at_least(0, 0, "most likely tokens that are mixed; 0 = all (paper: all)")
    sigma_scale: float = positive(0.33, "noise, in units of the embeddings' root mean square (paper: 0.33)")
    rms_mode: str = option(
        "entry", "root mean square of all numbers of the table, or of the norms of its rows", choices=("entry", "row")
    )
    answer_tokens: int = positive(32, "of the answer, at most; the chain gets the rest of --max-new-tokens (paper: 32)")
    cot_stop: str = option(
        "auto", "text that ends a chain of thought; auto: </think> where the prompt asks for tags, else the paper's "
                "'The final answer is: '"
    )  # fmt: skip
    cot_prefill: str = option("auto", "text put before the answer; auto: <answer>, else the paper's '\\boxed{'")
    reward_right: float = option(100.0, "reward of a right answer (paper: 100)")
    reward_wrong: float = option(10.0, "reward of an answer that is wrong (paper: 10)")


def check(train: Any, own: Config) -> None:
    if train.entropy_coef and own.cot_mode != "hard":
        raise UserError(
            f"--entropy-coef: soft tokens have no entropy bonus, got {train.entropy_coef}; use --cot-mode hard or 0"
        )
    of_soft = ("soft_tau", "soft_top_k", "sigma_scale", "rms_mode")
    unread = [name for name in of_soft if getattr(own, name) != getattr(Config, name)]
    if own.cot_mode == "hard" and unread:
        raise UserError(f"{flag(unread[0])} is of soft tokens: it has no effect with --cot-mode hard")
    if not own.cot_stop:
        raise UserError("--cot-stop: expected the text that ends a chain of thought, got an empty one")


class Noise:
    """rms of all numbers of the table, as it was when the run began: the table is trained, and the noise must not
    follow it. The options that make sigma of it are those of the stage."""

    def __init__(self, ctx: Context) -> None:
        self.rms = float(ctx.policy.model.embed.detach().double().square().mean().sqrt())

    def sigma(self, ctx: Context) -> float:
        width = 1 if ctx.own.rms_mode == "entry" else ctx.policy.config.hidden_size
        return ctx.own.sigma_scale * self.rms * width**0.5

    def state_dict(self) -> dict[str, Any]:
        return {"rms": self.rms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rms = state["rms"]


def phrases(ctx: Context, prompt: str) -> tuple[str, str]:
    """(cot_stop, cot_prefill) for prompts like this one."""
    tags = ctx.policy.prompt_style == "compact" or TAGS[1] in prompt
    auto = TAGS if tags else PAPER
    given = (ctx.own.cot_stop, ctx.own.cot_prefill)
    return tuple(a if own == "auto" else own for own, a in zip(given, auto, strict=True))  # type: ignore[return-value]


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    own, engine = ctx.own, ctx.engine
    stop, prefill = phrases(ctx, ctx.task.prompt(prompts.problems[0], ctx.policy.prompt_style))
    if not ctx.policy.tokenizer.decode(ctx.tokens(stop)):
        raise UserError(f"--cot-stop {stop!r} is a special token, which no text shows; give one that the model writes")
    early, late = ctx.tokens(prefill), ctx.tokens(stop + prefill)  # after a chain that stopped, or was cut off
    room = draws.max_new_tokens - own.answer_tokens - len(late)
    if room < 1:
        raise UserError(
            f"--max-new-tokens {draws.max_new_tokens} leaves no room for a chain of thought: --answer-tokens "
            f"{own.answer_tokens} and {len(late)} tokens that are put in; raise the one or lower the other"
        )
    chain: dict[str, Any] = draws.sampling
    if own.cot_mode != "hard":
        chain = {"soft": SoftSampling(own.soft_tau or TAU[own.cot_mode], ctx.memory.sigma(ctx), own.soft_top_k)}
    seqs = roots = engine.start(prompts.ids)
    try:
        rows = engine.fork(roots, draws.samples, draws.uids(prompts.problems).tolist())
        seqs = roots + rows
        why = engine.segment(rows, room, seed=draws.seed, stop_strings=[stop], **chain)
        going = [(seq, reason) for seq, reason in zip(rows, why, strict=True) if reason != "eos"]
        for seq, reason in going:
            engine.append(seq, early if reason == "string" else late)
        if going:
            answering = [seq for seq, _ in going]
            engine.segment(
                answering, own.answer_tokens, seed=draws.seed, stop_strings=ctx.stop_strings, **draws.sampling
            )
        ctx.metrics["cot/stopped"] = why.count("string") / len(why)
        group = torch.arange(len(roots)).repeat_interleave(draws.samples)
        return engine.rollout(rows, group.tolist())
    finally:
        engine.free(seqs)


def judge(ctx: Context, graded: Graded) -> Graded:
    answered = torch.tensor([g.answer is not None for g in graded.grades], device=graded.reward.device)
    wrong = torch.where(answered, ctx.own.reward_wrong, 0.0)
    return replace(graded, reward=torch.where(graded.correct, ctx.own.reward_right, wrong))


def advantage(ctx: Context, graded: Graded) -> Tensor:
    return group_scores(graded, centre="leave_one_out")


def loss(config: Config) -> LossSpec:
    return LossSpec(form="weighted", aggregation="seq-mean-token-sum", idle_when_zero=True)


ALGO = Algo(
    name="soft_tokens",
    summary="a chain of thought in noisy mixtures of embeddings; REINFORCE, the others' mean as baseline",
    paper="arXiv 2509.19170",
    config=Config,
    advantage=advantage,
    loss=loss,
    defaults={"minibatches": 1, "lr": 6e-6},
    check=check,
    memory=Noise,
    rollout=rollout,
    judge=judge,
)
