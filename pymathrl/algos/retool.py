"""ReTool: code execution inside the reasoning, after "ReTool" (Feng et al., arXiv 2504.11536, section 2.3; code:
github.com/ReTool-RL/ReTool and the retool recipe of github.com/verl-project/verl-recipe).

The policy writes <code> ... </code>; it is stopped there, the last block is executed, and its output is put behind it
as <interpreter> ... </interpreter>, from where the policy goes on over the same cache. Interpreter tokens are context:
no loss, not counted in averages. The code's tokens are the policy's own.

    R = 1 for a right answer; -1 for a wrong one, with call_reward (recipe: 0.1) min(-0.6, -1 + call_reward * calls)
    A = (R - mean of the group) / (std of the group + eps)
    L = mean over sampled tokens of max(-r A, -clip(r, 0.8, 1.28) A), at most -10 A where A < 0

This is the recipe's GRPO; the paper has PPO. A response ends where its output would not fit --max-new-tokens (which
counts output too) or after --max-calls; a pending call is then not executed. Output is escaped, so that it can close no
tag, and tokenised alone: what was sampled keeps its ids. Errors and time-outs are output as well, never a dropped row.

--tool calculator is ours, for the built-in model's compact style, in which a step of the thinking is "12*6=72": the
policy is stopped at "=", and what stands before it is executed the same way and in the same sandbox. Every execution is
a process of its own, see `pymathrl.sandbox`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, dual_clip, group_normalised
from pymathrl.batch import ROLE_FORCED, Graded, Rollout
from pymathrl.options import at_least, option, positive
from pymathrl.sandbox import Result, Sandbox, escape_tags

if TYPE_CHECKING:
    from pymathrl.context import Context
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws

STOP = {"python": "</code>", "calculator": "="}
DIGITS = set("0123456789+-*/() ")
ERROR = "?"  # what the calculator gives where there is no number, or one that the built-in model cannot write: 1e-05
FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Config:
    tool: str = option("auto", "what is executed; auto: the calculator for prompts in the compact style, else Python",
                       choices=("auto", "python", "calculator"))  # fmt: skip
    max_calls: int = at_least(0, 8, "calls per response at most (recipe: 8 for 32B, 16 for 7B)")
    tool_timeout_s: float = positive(5.0, "seconds of one execution (evaluation code: 5)")
    tool_memory_mb: int = positive(512, "MiB that one execution may take (recipe: 1024)")
    tool_output_chars: int = at_least(2, 400, "characters of output kept, half from its end (evaluation code: 400)")
    sandbox: str = option("full", "namespaces of its own for each execution; weak: go on without where the kernel "
                                  "refuses them", choices=("full", "weak"))  # fmt: skip
    call_reward: float = at_least(0, 0.0, "per call, in the reward of a wrong answer, up to -0.6 (recipe: 0.1)")
    clip_low: float = clip_low(0.2, "recipe: 0.2")
    clip_high: float = clip_high(0.28, "recipe: 0.28")
    dual_clip: float = dual_clip(10.0, "recipe: 10")
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6)")


@lru_cache(maxsize=1)
def open_sandbox(timeout_s: float, memory_mb: int, output_chars: int, weak: bool) -> Sandbox:
    return Sandbox(timeout_s=timeout_s, memory_mb=memory_mb, output_chars=output_chars, allow_weak=weak)


def tool_of(ctx: Context) -> str:
    if ctx.own.tool != "auto":
        return ctx.own.tool
    return "calculator" if ctx.policy.prompt_style == "compact" else "python"


def last_code(tool: str, text: str) -> str | None:
    """The program of a response that stopped at a call; None: there is none to execute."""
    if tool == "calculator":
        expression = text.rpartition("=")[0].replace(",", "\n").rpartition("\n")[2]
        return expression if expression.strip() and set(expression) <= DIGITS else None
    block = text.rpartition("</code>")[0].rpartition("<code>")[2].strip()
    fenced = FENCED.findall(block)
    return (fenced[-1] if fenced else block) or None


def shown(tool: str, output: str, ok: bool, special: Sequence[str] = ()) -> str:
    """The text that is put behind a call. special: texts that the tokenizer reads as one of its special tokens, such as
    </s>; a blank after their first letter makes them letters like others."""
    if tool == "calculator":
        number = output.strip()
        return number if ok and number and set(number) <= DIGITS | {"."} else ERROR
    output = escape_tags(output)
    for text in special:
        output = output.replace(text, f"{text[0]} {text[1:]}")
    return f"\n<interpreter>\n{output}</interpreter>\n\n"


def execute(ctx: Context, codes: Sequence[str | None]) -> list[str]:
    """The text that is put behind each call; equal programs run once."""
    own, tool = ctx.own, tool_of(ctx)
    box = open_sandbox(own.tool_timeout_s, own.tool_memory_mb, own.tool_output_chars, own.sandbox == "weak")
    distinct = list(dict.fromkeys(code for code in codes if code is not None))
    results = dict(zip(distinct, box.run_many(distinct), strict=True))
    failed = sum(not r.ok for r in results.values())
    ctx.metrics["tool/failed"] = ctx.metrics.get("tool/failed", 0.0) + failed
    missing = Result("SyntaxError: no code block was found", False, "error", 0.0)
    given = [missing if code is None else results[code] for code in codes]
    added = ctx.policy.tokenizer.backend.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    return [shown(tool, result.output, result.ok, special) for result in given]


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    engine, tool, decode = ctx.engine, tool_of(ctx), ctx.policy.tokenizer.decode
    rows = [list(ids) for ids in prompts.ids for _ in range(draws.samples)]
    seqs = engine.start(rows, uids=draws.uids(prompts.problems).tolist())
    try:
        room, calls = dict.fromkeys(seqs, draws.max_new_tokens), dict.fromkeys(seqs, 0)
        begin = {seq: len(row) for seq, row in zip(seqs, rows, strict=True)}
        live = list(seqs)
        while live:
            why = engine.segment(
                live, [room[s] for s in live], stop_strings=[STOP[tool]], seed=draws.seed, **draws.sampling
            )
            text = {s: decode(engine.tokens(s)[begin[s] :]) for s, w in zip(live, why, strict=True) if w == "string"}
            live = [s for s in text if calls[s] < ctx.own.max_calls]
            outputs = execute(ctx, [last_code(tool, text[s]) for s in live])
            for seq, output in zip(list(live), outputs, strict=True):
                ids, used = ctx.tokens(output), len(engine.tokens(seq)) - begin[seq]
                room[seq] = draws.max_new_tokens - used - len(ids)
                if room[seq] < 1:
                    live.remove(seq)
                    continue
                calls[seq] += 1
                engine.append(seq, ids)
        ctx.metrics["tool/calls"] = sum(calls.values()) / len(calls)
        group = [p for p in range(len(prompts.ids)) for _ in range(draws.samples)]
        return engine.rollout(seqs, group)
    finally:
        engine.free(seqs)


def count_calls(rollout: Rollout) -> Tensor:
    """int64 [B]: runs of forced tokens in each row, one per call."""
    forced = rollout.role == ROLE_FORCED
    begins = forced.clone()
    begins[1:] &= ~forced[:-1]
    return rollout.row_sums(begins.long())


def outcome(graded: Graded, call_reward: float) -> Tensor:
    wrong = torch.full_like(graded.reward, -1.0)
    if call_reward:
        wrong = (wrong + call_reward * count_calls(graded.rollout)).clamp(max=-0.6)
    return torch.where(graded.correct, 1.0, wrong)


def judge(ctx: Context, graded: Graded) -> Graded:
    return replace(graded, reward=outcome(graded, ctx.own.call_reward))


def loss(config: Any) -> LossSpec:
    return LossSpec(form="clip", aggregation="token-mean", terms=clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="retool",
    summary="code executed in the middle of the reasoning, in a locked-down process",
    paper="arXiv 2504.11536",
    config=Config,
    advantage=group_normalised,
    loss=loss,
    tools=True,
    rollout=rollout,
    judge=judge,
)
