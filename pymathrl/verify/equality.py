"""Whether an answer equals the gold answer."""

from __future__ import annotations

from pymathrl.verify.policy import Policy, Verdict


def decide(gold: str, answer: str, cfg: Policy = Policy(), *, symbolic: bool) -> Verdict | None:  # noqa: B008
    """The verdict on two answers; None where only SymPy could tell and `symbolic` is False."""
    return Verdict(gold.strip() == answer.strip(), "same text" if gold.strip() == answer.strip() else "differ", "text")
