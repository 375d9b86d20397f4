"""Responses to the held-out problems of a task, graded: what the commands and the training loop evaluate with.

Every sample comes from the same batched generation as training, and its random numbers depend only on (seed, problem,
sample): two models, or one model before and after training, are compared on the same draws, and an evaluation that was
cut short goes on to the same responses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pymathrl.batch import STOP_DEADLINE, STOP_LENGTH, STOP_NAMES, Rollout
from pymathrl.errors import UserError
from pymathrl.metrics import completion_stats, evaluate_samples
from pymathrl.models import Policy
from pymathrl.prompt import Prompts, encode, stop_strings
from pymathrl.rollout import Draws, Engine
from pymathrl.tasks import Grade, Problem, Task
from pymathrl.verify.stage import ahead, verify

EVAL_STREAM = 0x65766131 << 32  # mixed into the seed: an evaluation never repeats a draw of a training rollout
CUT = (STOP_NAMES[STOP_LENGTH], STOP_NAMES[STOP_DEADLINE])  # stops of a response that was not finished


@dataclass(frozen=True)
class Evaluation:
    """metrics: pass@k with its standard error over problems, diversity, coverage, lengths; lists per problem."""

    metrics: dict[str, float]
    problems: list[Problem]
    grades: list[list[Grade]]
    texts: list[list[str]]
    stops: list[list[str]]
    lengths: list[list[int]]
    tokens: int  # generated
    seconds: float
    too_long: int  # problems left out because of their prompt's length


def evaluate(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    *,
    samples: int,
    ks: Sequence[int],
    max_new_tokens: int,
    max_prompt_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
    rollout: Callable[[Prompts, Draws], Rollout] | None = None,
) -> Evaluation:
    """Samples `samples` responses per problem and grades them. pass@k counts exact correctness, never the reward, and a
    response that was cut off counts as wrong.

    on_progress(done, total) is called every few tokens, in problems: done is what the finished responses amount to.
    rollout: writes the responses in the place of the engine's plain generation (then without progress).
    """
    start = time.perf_counter()
    prompts = encode_all(engine.policy, task, problems, max_prompt_tokens)
    chosen = list(prompts.problems)

    def progress(finished: int, responses: int, tokens: int) -> None:
        if on_progress is not None:
            on_progress(finished // samples, len(chosen))

    draws = Draws(samples, max_new_tokens, temperature, top_k, top_p, min_p, seed ^ EVAL_STREAM)
    # one call: a cut into parts would wait for the slowest response of each with most rows idle
    drawn = rollout(prompts, draws) if rollout is not None else engine.generate(
        prompts.ids, samples, max_new_tokens, seed=draws.seed, uids=draws.uids(chosen), **draws.sampling,
        stop_strings=stop_strings(task), on_progress=progress,
        on_finished=ahead(chosen, samples, task, engine.policy.tokenizer),
    )  # fmt: skip
    drawn = drawn.main
    verdicts = verify(drawn, chosen, task, engine.policy.tokenizer)
    groups = [slice(i * samples, (i + 1) * samples) for i in range(len(chosen))]
    stop, length = [STOP_NAMES[s] for s in drawn.stop.tolist()], drawn.response_lengths.tolist()
    graded = [count_cut_as_wrong(g, s) for g, s in zip(verdicts.grades, stop, strict=True)]
    grades, texts = [graded[g] for g in groups], [verdicts.texts[g] for g in groups]
    stops, lengths = [stop[g] for g in groups], [length[g] for g in groups]
    metrics = evaluate_samples(
        [[g.correct for g in row] for row in grades], [[g.canonical for g in row] for row in grades], ks
    )
    metrics.update(completion_stats(length, [s == STOP_NAMES[STOP_LENGTH] for s in stop]))
    seconds = time.perf_counter() - start
    return Evaluation(metrics, chosen, grades, texts, stops, lengths, sum(length), seconds, prompts.too_long)


def encode_all(policy: Policy, task: Task, problems: Sequence[Problem], max_prompt_tokens: int) -> Prompts:
    """The problems whose prompt fits, with its ids; UserError where there is none."""
    encoded = [(p, encode(policy, task, p)) for p in problems]
    kept = [(p, ids) for p, ids in encoded if len(ids) <= max_prompt_tokens]
    if not encoded:
        raise UserError(f"no problem to evaluate: the task {task.name} holds out none")
    if not kept:
        raise UserError(
            f"no problem to evaluate: all {len(problems)} prompts of the task {task.name} "
            f"exceed {max_prompt_tokens} tokens"
        )
    return Prompts([p for p, _ in kept], [ids for _, ids in kept], too_long=len(encoded) - len(kept))


def count_cut_as_wrong(grade: Grade, stop: str) -> Grade:
    """The grade of a response that ended in this way: one that was cut off at the limit is wrong, whatever it says: at
    another limit it would have gone on, and may have said something else."""
    return replace(grade, correct=False, reason=f"cut off: {grade.reason}") if stop in CUT else grade
