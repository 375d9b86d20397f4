"""How sure a number is: errors over problems and over samples, bootstrap, exact tests of one model against another.

Two errors that answer different questions, and are never added: over problems (would other problems of this kind give
the same mean) and over samples (would another seed of the decoding, on these problems).
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 10_000  # bootstrap resamples
LEVEL = 0.95  # of every interval
_CHUNK = 2_000_000  # problem indices drawn at once: 16 MB


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


class Interval(NamedTuple):
    low: float
    high: float


def sampling_variance(correct: ArrayLike, samples: ArrayLike) -> float:
    """Variance of the benchmark's mean over the decoding alone, the problems being these.

    correct, samples: c and n of each problem [P], n >= 2.   sum_i p_i (1 - p_i) / (n_i - 1) / P^2 with p_i = c_i / n_i.
    """
    c, n = np.asarray(correct, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if c.ndim != 1 or c.size == 0 or c.shape != n.shape or bool((n < 2).any()):
        raise ValueError(f"sampling_variance: needs [P] counts of two samples or more, got {c.shape} and {n.shape}")
    p = c / n
    return float((p * (1 - p) / (n - 1)).mean() / c.size)


def run_to_run_sd(scores: ArrayLike) -> float:
    """Standard deviation, ddof 1, of the whole benchmark's accuracy from one sample of each problem to the next: of the
    column means of scores [P, n]. nan for n = 1."""
    means = np.asarray(scores, dtype=np.float64).mean(axis=0)
    return float(means.std(ddof=1)) if means.size > 1 else math.nan


def resample(
    values: ArrayLike, sizes: ArrayLike | None = None, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Bootstrap over problems: the estimates of `draws` resamples of the P problems, [draws, M], for M statistics.

    values [P, M] or [P]; the estimate is sum(values) / sum(sizes) of the problems drawn, sizes of the same shape; None:
    1 each, so a mean. nan where the sizes drawn add up to 0. A problem is drawn with all of its samples. The problems
    drawn depend on P and the seed alone: two models on the same problems are resampled in pairs.
    """
    top = np.asarray(values, dtype=np.float64)
    top = top[:, None] if top.ndim == 1 else top
    if top.ndim != 2 or top.shape[0] == 0:
        raise ValueError(f"resample: values must be [P] or [P, M] with P >= 1, got {np.shape(values)}")
    bottom = np.ones_like(top) if sizes is None else np.asarray(sizes, dtype=np.float64).reshape(top.shape)
    count, rng = top.shape[0], np.random.default_rng(seed)
    out = np.empty((draws, top.shape[1]))
    step = max(1, _CHUNK // count)
    for begin in range(0, draws, step):
        rows = min(step, draws - begin)
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        total = times @ bottom
        with np.errstate(invalid="ignore", divide="ignore"):
            out[begin : begin + rows] = np.where(total == 0, np.nan, (times @ top) / total)
    return out


def percentile_interval(estimates: ArrayLike, level: float = LEVEL) -> list[Interval]:
    """The middle `level` of each column of the estimates [draws, M]; nan estimates are left out, and a column of
    nothing else is (nan, nan)."""
    intervals = []
    for column in np.asarray(estimates, dtype=np.float64).T:
        kept = column[~np.isnan(column)]
        tail = 50 * (1 - level)
        low, high = np.percentile(kept, [tail, 100 - tail]) if kept.size else (math.nan, math.nan)
        intervals.append(Interval(float(low), float(high)))
    return intervals


def bootstrap(values: ArrayLike, sizes: ArrayLike | None = None, draws: int = DRAWS, seed: int = 0) -> Interval:
    """95 % interval of the mean of a value per problem [P], or of sum(values) / sum(sizes), by resampling problems."""
    return percentile_interval(resample(values, sizes, draws, seed))[0]


def wilson(correct: int, samples: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of one proportion: never outside [0, 1], of use at 0 and at n (Wilson 1927)."""
    if not 0 <= correct <= samples or samples < 1:
        raise ValueError(f"wilson: needs 0 <= correct <= samples and samples >= 1, got {correct} of {samples}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, scale = correct / samples, 1 + z * z / samples
    middle = (p + z * z / (2 * samples)) / scale
    half = z * math.sqrt(p * (1 - p) / samples + z * z / (4 * samples * samples)) / scale
    # at 30 of 30 rounding gives 1.0000000000000002
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def paired_difference(a: ArrayLike, b: ArrayLike) -> Estimate:
    """Mean of a_i - b_i over problems [P] and its standard error, for two models on the same problems."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired_difference: needs the same problems for both, got {first.shape} and {second.shape}")
    return mean_over_problems(first - second)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test for two greedy runs: `only_a` problems only the one solves, `only_b` only the
    other. Binomial(only_a + only_b, 1/2), doubled, at most 1 (McNemar 1947; exact form)."""
    if only_a < 0 or only_b < 0:
        raise ValueError(f"mcnemar: counts must be >= 0, got {only_a} and {only_b}")
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**n))
