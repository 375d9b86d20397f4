"""One round of rejection sampling: responses to a task's problems, and the rows made of those that are accepted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pymathrl.batch import STOP_LENGTH
from pymathrl.prompt import Prompts, stop_strings, system_of
from pymathrl.rollout import Draws, Engine
from pymathrl.sft.accept import Rules, Trace, choose
from pymathrl.sft.retro import Attempt, Retro, revise
from pymathrl.tasks import Task
from pymathrl.verify.stage import grade, verify


@dataclass(frozen=True)
class Collected:
    """rows: {"prompt", "response", "question", "answer", "tokens"} each, and "system" where the task has a message for
    it; metrics: numbers of the round."""

    rows: list[dict[str, Any]]
    metrics: dict[str, Any]


def collect(
    engine: Engine,
    task: Task,
    prompts: Prompts,
    rules: Rules,
    draws: Draws,
    *,
    hint: str = "",
    retro: Retro | None = None,
) -> Collected:
    """Responses to each problem, graded and chosen by `rules`. A response is the hint and what was drawn next.

    Under "beyond-greedy" one greedy response without the hint is graded too. What is drawn follows from the weights,
    the seed and the problems' uids. retro: what is kept is then revised by Retro-Search.
    """
    policy, problems = engine.policy, prompts.problems
    begun = policy.tokenizer.encode(hint) if hint else []
    greedy = [False] * len(problems)
    if rules.accept == "beyond-greedy":
        plain = engine.generate(
            prompts.ids, 1, draws.max_new_tokens, temperature=0.0, stop_strings=stop_strings(task)
        )
        greedy = verify(plain, problems, task, policy.tokenizer).correct.tolist()
    rollout = engine.generate(
        [[*ids, *begun] for ids in prompts.ids], draws.samples, draws.max_new_tokens, uids=draws.uids(problems),
        seed=draws.seed, stop_strings=stop_strings(task), **draws.sampling,
    ).cpu()  # fmt: skip
    cut = (rollout.stop == STOP_LENGTH).tolist()
    responses = [tuple(rollout.response(row).tolist()) for row in range(rollout.rows)]
    texts = [hint + text for text in policy.tokenizer.decode_batch(responses)]
    grades, _ = grade([p for p in problems for _ in range(draws.samples)], texts, task)
    kept: list[Attempt] = []
    reasons: Counter[str] = Counter()
    right = solved = 0
    for i, problem in enumerate(problems):
        first = i * draws.samples
        traces = [
            Trace(texts[r], responses[r], grades[r].correct, not cut[r]) for r in range(first, first + draws.samples)
        ]
        chosen, left_out = choose(traces, rules, greedy[i])
        reasons += left_out
        right += sum(t.correct for t in traces)
        solved += bool(chosen)
        prompt = [*prompts.ids[i], *begun]
        kept += [Attempt(problem, prompt, list(responses[first + k]), k) for k in chosen]
    metrics: dict[str, Any] = {
        "accuracy": right / rollout.rows, "responses": rollout.rows, "accepted": len(kept),
        "problems": len(problems), "problems_with_rows": solved,
    }  # fmt: skip
    if retro is not None:
        before = sum(len(a.ids) for a in kept)
        revise(engine, task, kept, retro, draws, hint)
        metrics |= {"revised": sum(a.replaced > 0 for a in kept), "tokens_before": before,
                    "tokens_after": sum(len(a.ids) for a in kept)}  # fmt: skip
    system = {"system": text} if (text := system_of(task)) else {}
    rows = [
        {**system, "prompt": task.prompt(a.problem, policy.prompt_style),
         "response": hint + policy.tokenizer.decode(a.ids), "question": a.problem.question,
         "answer": a.problem.answer, "tokens": len(begun) + len(a.ids),
         **({"revised": a.replaced} if retro is not None else {})}
        for a in kept
    ]  # fmt: skip
    return Collected(rows, metrics | {f"left_out/{why}": n for why, n in sorted(reasons.items())})
