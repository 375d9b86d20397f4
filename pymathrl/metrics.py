"""Evaluation statistics: pass@k, the error of a mean over problems, diversity of solutions, lengths.  numpy only,
float64.

P problems, n samples of each, c of them correct.  Fractions are 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """Unbiased estimate of "at least one of k samples is correct", per problem (Chen et al. 2021, arXiv 2107.03374).

    pass@k = 1 - C(n-c, k) / C(n, k) = 1 - prod_{i<k} (n-c-i) / (n-i).     n, c: integers, any shapes that broadcast;
    returns that shape. The product has k factors in [0, 1], so nothing overflows, c = 0 gives exactly 0 and n - c < k
    gives exactly 1 (one factor is 0). Not 1 - (1 - c/n)^k: that is biased (0.832 instead of 0.917 for n, c, k = 10,
    3, 5). Average over problems afterwards; a pooled c/n over problems is another quantity.
    """
    n_arr, c_arr = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if not (np.issubdtype(n_arr.dtype, np.integer) and np.issubdtype(c_arr.dtype, np.integer)):
        raise TypeError(f"pass_at_k: n and c must be integer counts, got {n_arr.dtype} and {c_arr.dtype}")
    if k < 1:
        raise ValueError(f"pass_at_k: k must be at least 1, got {k}")
    if n_arr.size and int(n_arr.min()) < k:
        raise ValueError(f"pass_at_k: needs n >= k samples of each problem, got n = {int(n_arr.min())} with k = {k}")
    if c_arr.size and bool(((c_arr < 0) | (c_arr > n_arr)).any()):
        raise ValueError("pass_at_k: needs 0 <= c <= n for each problem")
    i = np.arange(k)
    # [..., k]; clamped: past n-c < k the product is 0 and must stay 0
    wrong = np.maximum((n_arr - c_arr)[..., None] - i, 0)
    return 1.0 - np.prod(wrong / (n_arr[..., None] - i), axis=-1)


class Estimate(NamedTuple):
    mean: float
    se: float  # standard error over problems; nan with fewer than two problems


def mean_over_problems(values: ArrayLike) -> Estimate:
    """Mean of one value per problem [P] and its standard error sd(values, ddof=1) / sqrt(P).

    The error answers "how would the mean move with other problems of this kind"; it includes the decoding noise of
    this run, and not the seed of training.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or v.size == 0:
        raise ValueError(f"mean_over_problems: needs one value per problem, shape [P] with P >= 1, got shape {v.shape}")
    se = float(v.std(ddof=1)) / math.sqrt(v.size) if v.size > 1 else math.nan
    return Estimate(float(v.mean()), se)


class Diversity(NamedTuple):
    mean: float  # distinct correct solutions per solved problem, >= 1; 0.0 when no problem is solved
    coverage: float  # share of the problems that are solved at least once: the problems `mean` is over


def diversity(correct: Sequence[Sequence[bool]], canonical: Sequence[Sequence[str | None]]) -> Diversity:
    """Mean over solved problems of the number of distinct canonical forms among the correct responses.

    correct, canonical: [P][n_p], the same shape.  `canonical` is the task's normal form of a response (for Countdown:
    of the expression, so that `3 + 4` and `(4+3)` count once); forms of wrong responses are ignored.  None = the task
    has no normal form: all of these count as one form. The count grows with n and with pass@1, so compare only runs
    with the same number of samples.
    """
    if len(correct) != len(canonical):
        raise ValueError(f"diversity: canonical must have one row per problem ({len(correct)}), got {len(canonical)}")
    if not correct:
        raise ValueError("diversity: needs at least one problem")
    distinct: list[int] = []
    for p, (flags, forms) in enumerate(zip(correct, canonical, strict=True)):
        if len(flags) != len(forms):
            raise ValueError(
                f"diversity: problem {p} has {len(flags)} correctness flags and {len(forms)} canonical forms"
            )
        solutions = {form for ok, form in zip(flags, forms, strict=True) if ok}
        if solutions:
            distinct.append(len(solutions))
    return Diversity(float(np.mean(distinct)) if distinct else 0.0, len(distinct) / len(correct))


def evaluate_samples(
    correct: Sequence[Sequence[bool]], canonical: Sequence[Sequence[str | None]], ks: Sequence[int] = (1, 8)
) -> dict[str, float]:
    """The numbers of one evaluation: `pass@k` and `pass@k_se` for each k, `diversity`, `coverage`.   correct,
    canonical: [P][n_p], n_p >= max(ks)."""
    n = np.array([len(row) for row in correct], dtype=np.int64)
    c = np.array([sum(bool(ok) for ok in row) for row in correct], dtype=np.int64)
    result: dict[str, float] = {}
    for k in ks:
        result[f"pass@{k}"], result[f"pass@{k}_se"] = mean_over_problems(pass_at_k(n, c, k))
    result["diversity"], result["coverage"] = diversity(correct, canonical)
    return result


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
