"""TAPO: rewards for the steps that use a tool, the text part of "CodeV: Code with Images for Faithful Visual Reasoning
via Tool-Aware Policy Optimization" (arXiv 2511.19661), on the tool loop of `retool`.

    r_t = -1   the call failed, or the same call was made before in this response
           1   its output holds a number that the final answer uses
           0   otherwise
    R   = outcome + tool_weight * mean over the calls of r_t;   no call gives 0, so that "no tool" stays as good
    A, L: as in `retool`

The judge sees the answer and what the tool gave, never the thinking, as in the paper, where it is a model that looks at
images. NOT FOUND: the weights of the two rewards (1 and 0.5 are ours) and a rule for text (the one above is ours).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pymathrl.algos import retool
from pymathrl.batch import ROLE_FORCED, Graded, Rollout
from pymathrl.options import at_least

if TYPE_CHECKING:
    from pymathrl.context import Context

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FAILED = re.compile(r"(?m)^(\w*(Error|Exception|Interrupt|Exit)\b|(Timeout|Execution) Error|Killed by)|^\?$")


@dataclass(frozen=True)
class Config(retool.Config):
    tool_weight: float = at_least(0, 0.5, "of the calls' mean reward beside the outcome (not found; ours)")


def calls(rollout: Rollout, row: int, text_of: Callable[[list[int]], str]) -> list[tuple[str, str]]:
    """(what the policy wrote up to the call, since the call before; the tool's output) of each call of a row."""
    begin, end = rollout.offsets[row : row + 2].tolist()
    begin += int(rollout.prompt_len[row])
    forced = (rollout.role[begin:end] == ROLE_FORCED).tolist()
    ids, found, written = rollout.ids[begin:end].tolist(), [], 0
    at = 0
    while at < len(ids):
        if forced[at]:
            stop = next((i for i in range(at, len(ids)) if not forced[i]), len(ids))
            found.append((text_of(ids[written:at]), text_of(ids[at:stop])))
            at = written = stop
        else:
            at += 1
    return found


def step_rewards(found: Sequence[tuple[str, str]], tool: str, answer: str | None) -> list[float]:
    """r_t of each call. answer: the text of the final answer."""
    used = set(_NUMBER.findall(answer or ""))
    rewards, seen = [], set()
    for written, output in found:
        code = retool.last_code(tool, written)
        body = output.replace("<interpreter>", "").replace("</interpreter>", "").strip()
        if code is None or code in seen or _FAILED.search(body):
            rewards.append(-1.0)
        else:
            rewards.append(1.0 if used & set(_NUMBER.findall(body)) else 0.0)
        seen.add(code)
    return rewards


def mean_reward(rewards: Sequence[float]) -> float:
    return sum(rewards) / len(rewards) if rewards else 0.0


def judge(ctx: Context, graded: Graded) -> Graded:
    tool, decode = retool.tool_of(ctx), ctx.policy.tokenizer.decode
    means = [
        mean_reward(step_rewards(calls(graded.rollout, row, decode), tool, graded.grades[row].answer))
        for row in range(graded.rollout.rows)
    ]
    tool_reward = torch.tensor(means, device=graded.reward.device)
    ctx.metrics["tool/reward"] = float(tool_reward.mean())
    return replace(graded, reward=retool.outcome(graded, ctx.own.call_reward) + ctx.own.tool_weight * tool_reward)


ALGO = replace(
    retool.ALGO,
    name="tapo",
    summary="ReTool with a reward for each call: used by the answer, wasted, or failed",
    paper="arXiv 2511.19661",
    config=Config,
    judge=judge,
)
