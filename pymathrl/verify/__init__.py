"""Answers to mathematical questions: what a response states, and whether it equals the gold answer.

    extract("... so it is \\\\boxed{\\\\frac{1}{2}}.")               # "\\\\frac{1}{2}"
    equal("\\\\frac{1}{2}", "0.5")                                 # Verdict(equal=True, reason=..., stage="exact")
    verify("... so it is \\\\boxed{0.5}.", "\\\\frac{1}{2}").score   # 1.0

A model's answer is text of a stranger: none of it is ever executed, what takes long is decided by a process that can be
killed (`VerifierPool`), and nothing here raises for what an answer says. Needs no torch; the stage of a training step
is `pymathrl.verify.stage`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pymathrl.verify.extract import extract
from pymathrl.verify.normalize import normalize
from pymathrl.verify.parser import parse
from pymathrl.verify.policy import Policy, Result, Verdict
from pymathrl.verify.pool import DEFAULT, VerifierPool, shared_pool

__all__ = ["Policy", "Result", "Verdict", "VerifierPool", "equal", "extract", "normalize", "parse", "verify"]


def equal(gold: str | Sequence[str], answer: str, *, cfg: Policy = DEFAULT) -> Verdict:
    """Whether the answer equals the gold, or any of several. UserError where no worker can be started."""
    return shared_pool().decide(gold, answer, cfg).result()


def verify(response: str, gold: str | Sequence[str], mode: str = "boxed", cfg: Policy = DEFAULT) -> Result:
    """The grade of a response: its answer, extracted in `mode`, against the gold or any of several."""
    return shared_pool().submit(response, gold, mode, cfg).result()
