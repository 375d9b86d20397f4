"""A graded response as a record: what is kept of a sample, and all that the numbers of an evaluation are made from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from pymathrl.batch import STOP_NAMES, Rollout
from pymathrl.eval.sample import CUT, count_cut_as_wrong
from pymathrl.metrics import position_buckets, repetition_rate
from pymathrl.models import Tokenizer
from pymathrl.tasks import Grade, Problem, Task
from pymathrl.verify import shared_pool

FLEXIBLE = "last_number"  # where the task's own extraction finds no answer


@dataclass(frozen=True)
class Sample:
    """One response to problem `id`, graded.

    finish_reason  one of STOP_NAMES; after length and deadline the verdict is wrong, see `count_cut_as_wrong`
    n_tokens       of the response, its end token included
    extracted      the answer that was read from the response; None: there was none
    canonical      a form shared by all answers that are the same solution; None: not well-formed
    verdict        whether it is correct; reason and stage of the verifier ("task": graded by the task itself)
    latency_s      seconds from the question to the verdict, queues included
    flexible       the verdict if, where no answer is found, the last number counts; None: the task has no such rule
    within         of each budget of the evaluation: whether the first so many tokens, graded alone, are correct
    logp           nats, of the whole response under the distribution it was drawn from
    entropy        nats, mean of that distribution's entropy over each of `position_buckets(n_tokens)`
    repetition     share of the tokens that repeat a run of ten
    """

    id: int
    sample: int
    prompt_hash: str
    response: str
    finish_reason: str
    n_tokens: int
    extracted: str | None
    canonical: str | None
    verdict: bool
    reward: float
    reason: str
    stage: str
    latency_s: float
    flexible: bool | None
    within: list[bool]
    logp: float
    entropy: list[float]
    repetition: float

    @property
    def cut(self) -> bool:
        return self.finish_reason in CUT

    @staticmethod
    def read(row: dict[str, Any]) -> Sample:
        """From the object of a line; KeyError or TypeError where it is not one."""
        return Sample(**{f.name: row[f.name] for f in fields(Sample)})

    def line(self, **more: Any) -> dict[str, Any]:
        """The object of a line, with further fields in front."""
        return {**more, **asdict(self)}


def record(
    rollout: Rollout,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    task: Task,
    tokenizer: Tokenizer,
    budgets: Sequence[int],
) -> Callable[[], list[Sample]]:
    """Begins to grade the rows [B] of a rollout: row b answers problems[b], whose prompt is prompts[b], as its sample
    numbers[b]. What it returns waits for the verdicts and gives the samples."""
    ids, offsets, prompt_len = rollout.ids.tolist(), rollout.offsets.tolist(), rollout.prompt_len.tolist()
    logp, entropy = rollout.logp.double().cpu(), rollout.entropy.double().cpu()
    spans = [(begin + n, end) for begin, end, n in zip(offsets, offsets[1:], prompt_len, strict=False)]
    stops = [STOP_NAMES[s] for s in rollout.stop.tolist()]
    texts = tokenizer.decode_batch([ids[a:b] for a, b in spans])
    parts = tokenizer.decode_batch([ids[a : min(a + budget, b)] for a, b in spans for budget in budgets])
    owners = [*range(len(spans)), *(row for row in range(len(spans)) for _ in budgets)]
    wait = grade_all(task, [(problems[row], text) for row, text in zip(owners, texts + parts, strict=True)])

    def finish() -> list[Sample]:
        verdicts = wait()
        samples = []
        for row, ((begin, end), text, stop) in enumerate(zip(spans, texts, stops, strict=True)):
            graded = verdicts[row]
            within = verdicts[len(spans) + row * len(budgets) :][: len(budgets)]
            grade = count_cut_as_wrong(graded.grade, stop)
            flexible = None if graded.flexible is None else graded.flexible and stop not in CUT
            samples.append(Sample(
                id=problems[row].uid, sample=numbers[row], prompt_hash=hash_ids(prompts[row]), response=text,
                finish_reason=stop, n_tokens=end - begin, extracted=grade.answer, canonical=grade.canonical,
                verdict=grade.correct, reward=grade.reward, reason=grade.reason, stage=graded.stage,
                latency_s=round(graded.latency_s, 6), flexible=flexible, within=[v.grade.correct for v in within],
                logp=float(logp[begin:end].sum()), entropy=_over_positions(entropy[begin:end]),
                repetition=repetition_rate(ids[begin:end]),
            ))  # fmt: skip
        return samples

    return finish


def hash_ids(ids: Sequence[int]) -> str:
    """16 hexadecimal digits that name a prompt: of the SHA-256 of its token ids."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def _over_positions(values: torch.Tensor) -> list[float]:
    return [float(values[a:b].mean()) for a, b in position_buckets(values.numel())]


@dataclass(frozen=True)
class Graded:
    grade: Grade
    stage: str
    latency_s: float
    flexible: bool | None


def grade_all(task: Task, items: Sequence[tuple[Problem, str]]) -> Callable[[], list[Graded]]:
    """Begins to grade (problem, response) pairs, equal ones once; what it returns waits, and gives the verdicts in
    their order. Of a task that compares answers, the verifier's workers do it meanwhile."""
    asked: dict[tuple[int, str], Callable[[], Graded]] = {}
    for problem, text in items:
        key = (problem.uid, text)
        if key not in asked:
            asked[key] = (_compare if hasattr(task, "check") else _by_the_task)(task, problem, text)

    def finish() -> list[Graded]:
        verdicts = {key: wait() for key, wait in asked.items()}
        return [verdicts[problem.uid, text] for problem, text in items]

    return finish


def _by_the_task(task: Task, problem: Problem, text: str) -> Callable[[], Graded]:
    begin = time.perf_counter()
    graded = Graded(task.grade(problem, text), "task", time.perf_counter() - begin, None)
    return lambda: graded


def _compare(task: Any, problem: Problem, text: str) -> Callable[[], Graded]:
    check, pool = task.check(problem), shared_pool()
    begin = time.perf_counter()
    answered: Future[float] = Future()
    result = pool.submit(text, check.golds, check.mode, check.cfg)
    result.add_done_callback(lambda _: answered.set_result(time.perf_counter()))

    def finish() -> Graded:
        found = result.result()
        grade = task.grade_result(problem, text, found)
        flexible: bool | None = None
        if check.mode != FLEXIBLE:
            flexible = grade.correct
            if grade.answer is None:
                flexible = pool.submit(text, check.golds, FLEXIBLE, check.cfg).result().correct
        return Graded(grade, found.stage, answered.result() - begin, flexible)

    return finish
