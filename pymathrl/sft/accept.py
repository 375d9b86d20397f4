"""Which sampled responses become training rows: rules on one response, and a choice among those of one problem.

Rejection-sampling fine-tuning (RFT, arXiv 2308.01825) keeps what is verified. START (arXiv 2503.04625) keeps what is
right with a hint where greedy decoding without it is wrong: `correct(hint) and not correct(greedy)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

ACCEPT = ("correct", "beyond-greedy")


@dataclass(frozen=True)
class Trace:
    """One response: its text and sampled ids, whether its answer is right, and whether it ended by itself."""

    text: str
    ids: tuple[int, ...]
    correct: bool
    ended: bool


@dataclass(frozen=True)
class Rules:
    """accept: "correct", or "beyond-greedy" (START). min_tokens, max_tokens: bounds on the length, 0 = none.
    ngram, max_repetition: at most this share of the n-grams may be repeats. per_problem: most rows kept of one."""

    accept: str = "correct"
    min_tokens: int = 0
    max_tokens: int = 0
    ngram: int = 8
    max_repetition: float = 0.5
    per_problem: int = 4


def repetition(ids: Sequence[int], n: int) -> float:
    """The share of the n-grams that occurred before: 1 - distinct / all; 0 for fewer than n tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def reject(trace: Trace, rules: Rules, greedy_correct: bool = False) -> str | None:
    """Why a response is left out, by itself; None where it is good."""
    if not trace.correct:
        return "wrong"
    if rules.accept == "beyond-greedy" and greedy_correct:
        return "greedy is right too"
    if not trace.ended:
        return "cut off"
    if len(trace.ids) < rules.min_tokens:
        return "too short"
    if rules.max_tokens and len(trace.ids) > rules.max_tokens:
        return "too long"
    if repetition(trace.ids, rules.ngram) > rules.max_repetition:
        return "repetitive"
    return None


def choose(traces: Sequence[Trace], rules: Rules, greedy_correct: bool = False) -> tuple[list[int], Counter[str]]:
    """Of the responses to one problem: (numbers of those kept, in their order; reason -> how many were not).
    Equal texts count once, and of the rest the first `per_problem` are kept."""
    kept: list[int] = []
    seen: set[str] = set()
    reasons: Counter[str] = Counter()
    for i, trace in enumerate(traces):
        why = reject(trace, rules, greedy_correct)
        if why is None and trace.text in seen:
            why = "duplicate"
        seen.add(trace.text)
        if why is None and len(kept) >= rules.per_problem:
            why = "over the cap"
        if why is None:
            kept.append(i)
        else:
            reasons[why] += 1
    return kept, reasons
