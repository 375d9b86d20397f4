"""Stage 3, verify: the text of each response, graded by the task.

A task whose grader is equality of answers says what to compare (`check`), and the process's pool of workers compares;
any other grades the text itself. The first kind is graded ahead: a response goes to the pool when it ends, while
others are still being written (`ahead`), and this stage finds the verdict there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymathrl.batch import Rollout
from pymathrl.models import Tokenizer
from pymathrl.tasks import Grade, Problem, Task
from pymathrl.verify.equality import AGREED
from pymathrl.verify.nodes import Word
from pymathrl.verify.parser import parse
from pymathrl.verify.policy import Result
from pymathrl.verify.pool import TIMEOUT, shared_pool


@dataclass(frozen=True)
class Tally:
    """What the verifier did: a result per response, and the seconds of each verdict that had to be found."""

    results: tuple[Result, ...] = ()
    seconds: tuple[float, ...] = ()

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.results + other.results, self.seconds + other.seconds)

    def metrics(self) -> dict[str, float]:
        """Under verifier/, where there are results: the shares of responses without an answer (no_answer), with a wrong
        one that is no formula (unparsed) and by the stage that decided (stage/NAME); how many ran into the deadline
        (timeout) and how many were right by SymPy's proof (accepted_symbolic) or because it had none and many digits
        agree (accepted_numeric); p50_ms and p99_ms of a verdict, extraction and repeated answers left out."""
        count = len(self.results)
        if not count:
            return {}
        stages = Counter(r.stage for r in self.results)
        wrong = {r.extracted for r in self.results if r.extracted is not None and r.stage in ("text", "kind")}
        words = {text for text in wrong if isinstance(parse(text), Word)}
        symbolic = [r for r in self.results if r.correct and r.stage == "symbolic"]
        agreed = sum(r.reason == AGREED for r in symbolic)
        out = {
            "no_answer": sum(r.extracted is None for r in self.results) / count,
            "unparsed": sum(r.extracted in words and not r.correct for r in self.results) / count,
            "timeout": sum((r.reason, r.stage) == (TIMEOUT.reason, TIMEOUT.stage) for r in self.results),
            "accepted_symbolic": len(symbolic) - agreed,
            "accepted_numeric": agreed,
            **{f"stage/{name}": n / count for name, n in sorted(stages.items())},
        }
        if self.seconds:
            p50, p99 = np.percentile(self.seconds, [50, 99]) * 1e3
            out |= {"p50_ms": float(p50), "p99_ms": float(p99)}
        return {f"verifier/{name}": value for name, value in out.items()}


@dataclass(frozen=True)
class Verdicts:
    """reward fp32 [B], correct bool [B], for each row its grade and the graded text, and what the verifier did."""

    reward: Tensor
    correct: Tensor
    grades: list[Grade]
    texts: list[str]
    tally: Tally = Tally()


def verify(rollout: Rollout, problems: Sequence[Problem], task: Task, tokenizer: Tokenizer) -> Verdicts:
    """Grades every response; `problems` [P] in group order; a branch row gets what its response gets. Equal responses
    to one problem are graded once."""
    rows = rollout.response_of_row
    rollout = rollout.main
    ids, offsets = rollout.ids.tolist(), rollout.offsets.tolist()
    prompt_len, groups = rollout.prompt_len.tolist(), rollout.group.tolist()
    texts = tokenizer.decode_batch(
        [ids[begin + n : end] for begin, end, n in zip(offsets, offsets[1:], prompt_len, strict=False)]
    )
    graded, tally = grade([problems[g] for g in groups], texts, task)
    grades, texts = [graded[i] for i in rows.tolist()], [texts[i] for i in rows.tolist()]
    reward = torch.tensor([g.reward for g in grades], dtype=torch.float32, device=rollout.device)
    correct = torch.tensor([g.correct for g in grades], dtype=torch.bool, device=rollout.device)
    return Verdicts(reward, correct, grades, texts, tally)


def grade(problems: Sequence[Problem], texts: Sequence[str], task: Task) -> tuple[list[Grade], Tally]:
    """The grade of each text as a response to its problem. Equal texts of one problem are graded once."""
    keys = [(id(problem), text) for problem, text in zip(problems, texts, strict=True)]
    asked = {key: (problem, key[1]) for key, problem in zip(keys, problems, strict=True)}
    comparing = _comparing(task)
    if comparing is None:
        graded = {key: task.grade(*pair) for key, pair in asked.items()}
        return [graded[key] for key in keys], Tally()
    futures = {key: _submit(comparing, *pair) for key, pair in asked.items()}
    results = {key: future.result() for key, future in futures.items()}
    graded = {key: comparing.grade_result(*pair, results[key]) for key, pair in asked.items()}
    tally = Tally(tuple(results[key] for key in keys), tuple(shared_pool().take_latencies()))
    return [graded[key] for key in keys], tally


def ahead(
    problems: Sequence[Problem], samples: int, task: Task, tokenizer: Tokenizer
) -> Callable[[list[int], list[list[int]]], None] | None:
    """What `Engine.generate` may call with the responses that have ended, `samples` for each problem: the pool begins
    with their verdicts. None for a task that grades by itself: that costs less than handing over."""
    comparing = _comparing(task)
    if comparing is None:
        return None

    def on_finished(rows: list[int], ids: list[list[int]]) -> None:
        for row, text in zip(rows, tokenizer.decode_batch(ids), strict=True):
            _submit(comparing, problems[row // samples], text)

    return on_finished


def _comparing(task: Any) -> Any:
    """The task if answers to it are compared: such a one has `check` and `grade_result`."""
    return task if hasattr(task, "check") else None


def _submit(task: Any, problem: Problem, text: str) -> Future[Result]:
    check = task.check(problem)
    return shared_pool().submit(text, check.golds, check.mode, check.cfg)
