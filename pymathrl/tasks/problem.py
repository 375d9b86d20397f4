"""What a task hands to the other stages: a problem, and the grade of one response to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pymathrl.verify.policy import Policy


@dataclass(frozen=True)
class Problem:
    """One question with the data its grader needs.

    uid: >= 0, one number per position in a stream: within one seed's train stream, or within the test set, no two
        problems share it.  It keys the random numbers of the responses, so equal rows met in two epochs differ in it.
    question: the statement as one short line (no instructions, no tags).
    answer: the reference answer as text (Countdown: the target).
    meta: plain data of the task, e.g. Countdown's ``nums``, ``target``; never changed after construction.
    """

    uid: int
    question: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    reward: in [0, 1], what the algorithm trains on (may pay a little for a well-formed wrong answer).
    correct: the exact verdict; pass@k counts this and never the reward.
    answer: the text taken from the response, stripped; None if there was none.
    canonical: a form shared by all answers that are the same solution; None if the answer is not well-formed.
    reason: "correct", or a short phrase that says what is wrong.
    """

    reward: float
    correct: bool
    answer: str | None
    canonical: str | None
    reason: str


@dataclass(frozen=True)
class Check:
    """What a grader by equality of answers compares: any of the gold answers, against the answer that a response states
    in `mode` (see `verify.extract`), under the policy `cfg`."""

    golds: tuple[str, ...]
    mode: str
    cfg: Policy
