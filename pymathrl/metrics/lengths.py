"""Tokens of the responses: how many, how repetitive, what a correct answer costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

REPEAT = 10  # tokens of the pieces whose return counts as repetition


def response_lengths(offsets: ArrayLike, prompt_len: ArrayLike) -> NDArray[np.int64]:
    """Tokens after the prompt, per sequence [B].   offsets [B+1]: where each packed sequence starts; prompt_len [B]:
    its prompt tokens."""
    off, plen = np.asarray(offsets, dtype=np.int64), np.asarray(prompt_len, dtype=np.int64)
    if off.ndim != 1 or plen.shape != (off.size - 1,):
        raise ValueError(
            f"response_lengths: offsets must be [B+1] and prompt_len [B], got {off.shape} and {plen.shape}"
        )
    return np.diff(off) - plen


def completion_stats(lengths: ArrayLike, truncated: ArrayLike) -> dict[str, float]:
    """`completions/mean_length` (tokens) and `completions/clipped_ratio` (share cut off by the length limit).
    lengths [B] tokens; truncated [B] bool."""
    n, cut = np.asarray(lengths, dtype=np.float64), np.asarray(truncated, dtype=bool)
    if n.ndim != 1 or n.shape != cut.shape or n.size == 0:
        raise ValueError(
            f"completion_stats: lengths and truncated must both be [B] with B >= 1, got {n.shape} and {cut.shape}"
        )
    return {"completions/mean_length": float(n.mean()), "completions/clipped_ratio": float(cut.mean())}


def token_mean(values: ArrayLike, mask: ArrayLike) -> float:
    """Mean of per-token values [T] over the tokens where mask [T] is True; 0.0 when there are none.  Masked values
    may be nan or infinite."""
    v, m = np.asarray(values, dtype=np.float64), np.asarray(mask, dtype=bool)
    if v.shape != m.shape:
        raise ValueError(f"token_mean: mask must have the shape of values {v.shape}, got {m.shape}")
    kept = v[m]
    return float(kept.mean()) if kept.size else 0.0


class LengthStats(NamedTuple):
    """In tokens; nan where there are none."""

    responses: int
    mean: float
    median: float
    p95: float


def length_stats(lengths: ArrayLike) -> LengthStats:
    """lengths [B] tokens; percentiles with linear interpolation."""
    n = np.asarray(lengths, dtype=np.float64)
    if not n.size:
        return LengthStats(0, math.nan, math.nan, math.nan)
    return LengthStats(n.size, float(n.mean()), float(np.median(n)), float(np.percentile(n, 95)))


def repetition_rate(ids: Sequence[int], n: int = REPEAT) -> float:
    """Share of the tokens that lie in a run of n tokens which occurred before in the same response; 0.0 if shorter."""
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    covered = 0  # tokens before it are counted
    for begin in range(len(ids) - n + 1):
        gram = tuple(ids[begin : begin + n])
        if gram in seen:
            repeated += begin + n - max(begin, covered)
            covered = begin + n
        seen.add(gram)
    return repeated / len(ids) if ids else 0.0


def tokens_per_correct(lengths: ArrayLike, correct: ArrayLike) -> float:
    """All generated tokens over the number of correct responses; infinite without one.   lengths, correct: [B]."""
    n, ok = np.asarray(lengths, dtype=np.float64), np.asarray(correct, dtype=bool)
    if n.shape != ok.shape:
        raise ValueError(f"tokens_per_correct: lengths and correct must be alike, got {n.shape} and {ok.shape}")
    return float(n.sum() / ok.sum()) if ok.any() else math.inf


def token_budgets(limit: int, points: int = 5) -> list[int]:
    """Budgets that double up to the limit, for 16384: 1024, 2048, 4096, 8192, 16384."""
    return sorted({max(1, limit >> i) for i in range(points)})


def budget_curve(lengths: ArrayLike, correct: ArrayLike, budgets: Sequence[int]) -> NDArray[np.float64]:
    """Accuracy under a length limit of each budget, as an evaluation with that limit would measure it on the same
    draws: share of the responses [B] that are correct and ended within so many tokens."""
    n, ok = np.asarray(lengths), np.asarray(correct, dtype=bool)
    if n.shape != ok.shape or n.ndim != 1 or n.size == 0:
        raise ValueError(f"budget_curve: lengths and correct must both be [B], B >= 1, got {n.shape} and {ok.shape}")
    return np.array([float((ok & (n <= budget)).mean()) for budget in budgets])


def position_buckets(length: int) -> list[tuple[int, int]]:
    """(first, behind the last) token of the buckets 1, 2, 4, 8, .. tokens wide that a response is cut into: a curve
    over positions in a few numbers."""
    edges = [(1 << i) - 1 for i in range(length.bit_length() + 1)]
    return [(a, min(b, length)) for a, b in pairwise(edges) if a < length]
