"""Samples and problems made by hand."""

from __future__ import annotations

from pymathrl.eval.record import Sample
from pymathrl.metrics import position_buckets
from pymathrl.tasks import Grade, Problem


class PlainTask:
    """Grades by itself; prompts and problems are the test's."""

    name = "plain"

    @staticmethod
    def grade(problem: Problem, response: str) -> Grade:
        right = response == problem.answer
        return Grade(float(right), right, response or None, response or None, "correct" if right else "wrong")


def sample(answer: str | None, right: bool, *, problem: int = 0, number: int = 0, tokens: int = 10, stop: str = "eos",
           flexible: bool | None = None, within: tuple[bool, ...] = (), text: str | None = None,
           logp: float = -1.0, entropy: float = 0.5) -> Sample:  # fmt: skip
    """A response whose answer is `answer`."""
    return Sample(
        id=problem, sample=number, prompt_hash="0" * 16, response=answer or "" if text is None else text,
        finish_reason=stop, n_tokens=tokens, extracted=answer, canonical=answer, verdict=right, reward=float(right),
        reason="correct" if right else "wrong", stage="task", latency_s=0.001, flexible=flexible,
        within=list(within), logp=logp, entropy=[entropy] * len(position_buckets(tokens)), repetition=0.0,
    )  # fmt: skip


def rows_of(*answers: str, right: str = "A", **options) -> list[list[Sample]]:
    """A row of samples per text, one per letter: "AAB" is two right ones and a wrong one; "-" is one without answer."""
    return [
        [
            sample(None if letter == "-" else letter, letter == right, problem=p, number=s, **options)
            for s, letter in enumerate(text)
        ]
        for p, text in enumerate(answers)
    ]


def problems_of(count: int, **meta) -> list[Problem]:
    return [Problem(uid, f"question {uid}", "A", dict(meta)) for uid in range(count)]
