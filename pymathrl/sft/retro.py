"""Retro-Search (arXiv 2504.04383): right traces made shorter by looking, afterwards, for the paths not taken.

A trace is cut into thoughts where words such as "wait" switch to another idea. From the end of each thought it is
written anew, and in the next step no such word may begin; what the rest of that try says is free. A try takes the
place of the old continuation where its value discount^(steps to the end) * [right] is higher: it is right and takes
fewer steps. The published text names this value without its form or constants; both are our choice.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymathrl.batch import STOP_EOS, STOP_STRING, Rollout
from pymathrl.models import Policy, Tokenizer
from pymathrl.prompt import stop_strings
from pymathrl.rollout import Draws, Engine
from pymathrl.rollout.draws import MAX_SAMPLES
from pymathrl.rollout.engine import Hook
from pymathrl.tasks import Problem, Task


@dataclass(frozen=True)
class Retro:
    """switches: words that begin a thought. step_break: text between steps. discount: of the value, per step."""

    switches: tuple[str, ...] = ("alternatively", "wait")
    step_break: str = "\n\n"
    discount: float = 0.9

    def starts(self, text: str) -> list[int]:
        """Where the thoughts after the first begin: the characters at which a switch word does, in any case, not
        inside another word."""
        words = "|".join(
            (r"\b" if w[0].isalnum() else "") + re.escape(w) + (r"\b" if w[-1].isalnum() else "")
            for w in sorted(self.switches, key=len, reverse=True)
        )
        return [m.start() for m in re.finditer(words, text, re.IGNORECASE) if m.start() > 0]

    def value(self, continuation: str, correct: bool) -> float:
        """discount^steps of a continuation that leads to a right answer, 0 of another."""
        steps = sum(1 for part in continuation.split(self.step_break) if part.strip())
        return self.discount**steps if correct else 0.0


@dataclass
class Attempt:
    """One trace while it is revised. index: its number among the problem's, which keys its random numbers."""

    problem: Problem
    prompt: list[int]  # up to where the response was drawn: with a hint, if there was one
    ids: list[int]  # drawn, the end token included
    index: int
    replaced: int = 0  # tries that were taken


def banned_ids(policy: Policy, retro: Retro) -> list[int]:
    """Tokens with which a switch word can begin: after nothing, a blank or a line break, lower-case or capitalised.
    Of a word of several tokens the first one, whatever else it can begin."""
    encode, decode = policy.tokenizer.encode, policy.tokenizer.decode
    found = set()
    for word in retro.switches:
        for spelled in {word, word.lower(), word.capitalize()}:
            for before in ("", " ", "\n", retro.step_break):
                ids = encode(before + spelled)
                found.add(next(i for n, i in enumerate(ids, 1) if len(decode(ids[:n])) > len(before)))
    return sorted(found)


def revise(engine: Engine, task: Task, attempts: Sequence[Attempt], retro: Retro, draws: Draws, hint: str = "") -> None:
    """Revises right traces in place, thought by thought, all of them side by side. `draws`: of the sampling that made
    them; a response stays within its length limit. hint: text that every response begins with, before what was drawn.
    No trace depends on the others."""
    policy, decode = engine.policy, engine.policy.tokenizer.decode
    banned = torch.tensor(banned_ids(policy, retro), device=policy.device)

    def ban(seqs: list[int], logits: Tensor, stats: object) -> Tensor:
        return logits.index_fill(1, banned, -torch.inf)

    for thought in range(max((len(a.ids) for a in attempts), default=0)):
        if draws.samples * (2 * thought + 3) > MAX_SAMPLES:
            return  # no random numbers are left that the problem's own samples do not use
        todo, heads = [], []
        for a in attempts:
            starts = retro.starts(decode(a.ids))
            if thought < len(starts):
                todo.append(a)
                heads.append(a.ids[: tokens_before(policy.tokenizer, a.ids, starts[thought])])
        if not todo:
            return
        first = _write(engine, todo, heads, draws, 2 * thought + 1, strings=(retro.step_break,), hook=ban)
        written = [first.response(i).tolist() for i in range(first.rows)]
        ended = (first.stop == STOP_EOS).tolist()
        room = [draws.max_new_tokens - len(h) - len(w) for h, w in zip(heads, written, strict=True)]
        on = [i for i, why in enumerate(first.stop.tolist()) if why == STOP_STRING and room[i] > 0]
        if on:
            begun = [heads[i] + written[i] for i in on]
            rest = _write(
                engine, [todo[i] for i in on], begun, draws, 2 * thought + 2, strings=stop_strings(task)
            )
            for row, i in enumerate(on):
                written[i] += rest.response(row).tolist()
                ended[i] = int(rest.stop[row]) in (STOP_EOS, STOP_STRING)
        for a, head, new, done in zip(todo, heads, written, ended, strict=True):
            ok = done and task.grade(a.problem, hint + decode(head + new)).correct
            if retro.value(decode(new), ok) > retro.value(decode(a.ids[len(head) :]), True):
                a.ids, a.replaced = head + new, a.replaced + 1


def _write(
    engine: Engine, todo: Sequence[Attempt], heads: Sequence[Sequence[int]], draws: Draws, number: int,
    *, strings: Sequence[str] = (), hook: Hook | None = None,
) -> Rollout:  # fmt: skip
    """One continuation of each beginning of a response; number: of the call, which no other may share."""
    uids = [(a.problem.uid << 16) + number * draws.samples + a.index for a in todo]
    return engine.generate(
        [[*a.prompt, *head] for a, head in zip(todo, heads, strict=True)], 1,
        [draws.max_new_tokens - len(head) for head in heads], uids=uids, seed=draws.seed, stop_strings=strings,
        hook=hook, **draws.sampling,
    ).cpu()  # fmt: skip


def tokens_before(tokenizer: Tokenizer, ids: Sequence[int], characters: int) -> int:
    """The most tokens whose text has at most so many characters: a token that reaches across is not among them."""
    return bisect_right(range(1, len(ids) + 1), characters, key=lambda n: len(tokenizer.decode(ids[:n])))
