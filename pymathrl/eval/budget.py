"""Votes under a time budget: the most samples per problem that are generated within so many seconds (self-consistency
at equal time, as in M1, arXiv 2504.10449).

Models that differ in speed are compared at equal time, not at equal samples. The time is measured, batch by batch: all
problems x n samples from the first prompt to the last response, decoded as the evaluation decodes them. It is never
computed from a throughput: how many tokens a second gives depends on n, which fills the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count

from pymathrl import devices
from pymathrl.eval.stream import stream
from pymathrl.prompt import Prompts
from pymathrl.rollout import Draws, Engine

HALVE_EVERY = 3  # steps of a search: one halves the range, so that a crooked curve of times ends it in log(n) steps


@dataclass(frozen=True)
class Timing:
    """Generation of `samples` responses to each problem of a task, as one batch: its seconds, and tokens drawn."""

    samples: int
    seconds: float
    tokens: int


def time_batch(
    engine: Engine, prompts: Prompts, draws: Draws, stop_strings: Sequence[str], on_ended: Callable[[int, int], None]
) -> Timing:
    """`draws.samples` responses to every problem, timed and thrown away: a draw depends on (seed, problem, sample)
    alone, so they are to the bit those that the evaluation has graded. on_ended(responses, tokens): that have ended
    since the last call, and drawn so far."""
    tokens = 0
    devices.synchronize(engine.device)
    begin = time.perf_counter()
    with closing(stream(engine, prompts, draws, range(len(prompts.problems)), stop_strings)) as responses:
        for ended in responses:
            tokens = ended.tokens
            on_ended(len(ended.rows), tokens)
    devices.synchronize(engine.device)
    return Timing(draws.samples, time.perf_counter() - begin, tokens)


def in_seconds(budget_s: float) -> str:
    """5s, 0.25s, 604800s: a budget in the names of numbers."""
    return f"{budget_s:.15g}s"


def fitting(timings: Iterable[Timing], budget_s: float) -> Timing | None:
    """The largest of the batches that took at most budget_s; None: there is none."""
    return max((t for t in timings if t.seconds <= budget_s), key=lambda t: t.samples, default=None)


def search(
    measure: Callable[[int], Timing], budgets_s: Sequence[float], most: int, known: Iterable[Timing] = ()
) -> list[Timing]:
    """Measures as many batches as it takes to know, for each budget, the largest number of samples that fits: it fits,
    and one more does not, or it is `most`. All measured batches, those of `known` too, in the order of their samples.

    The numbers double until one is over the largest budget. Between the largest that fits a budget and the next that
    was measured, which does not, the line through both proposes the next.
    """
    timings = {t.samples: t for t in known}

    def seconds(samples: int) -> float:
        if samples not in timings:
            timings[samples] = measure(samples)
        return timings[samples].seconds

    samples = 1
    while seconds(samples) <= max(budgets_s) and samples < most:
        samples = min(2 * samples, most)
    for budget in budgets_s:
        for step in count(1):
            fit = fitting(timings.values(), budget) or Timing(0, 0.0, 0)
            over = min((n for n in timings if n > fit.samples), default=None)
            if over is None or over == fit.samples + 1:
                break
            room = over - fit.samples
            share = 0.5 if step % HALVE_EVERY == 0 else (budget - fit.seconds) / (seconds(over) - fit.seconds)
            seconds(fit.samples + min(max(int(share * room), 1), room - 1))
    return [timings[samples] for samples in sorted(timings)]
