"""Shares of correct responses: pass@k, avg@k, G-pass@k, and the numbers of one evaluation.

P problems, n samples of each, c of them correct.  Fractions are 0..1.  numpy only, float64, as in all of this package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymathrl.metrics.intervals import mean_over_problems
from pymathrl.metrics.variety import diversity


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


def g_pass_at_k(n: ArrayLike, c: ArrayLike, k: int, tau: float) -> NDArray[np.float64]:
    """Unbiased estimate of "at least a share tau of k samples is correct", per problem: stability, where pass@k asks
    for one hit (Liu et al. 2024, arXiv 2412.13147).

    sum_{j >= ceil(tau k)} C(c, j) C(n-c, k-j) / C(n, k), in exact integers.   n, c as in `pass_at_k`; 0 < tau <= 1.
    """
    pass_at_k(n, c, k)  # its checks
    if not 0 < tau <= 1:
        raise ValueError(f"g_pass_at_k: tau must be in (0, 1], got {tau}")
    least = math.ceil(tau * k - 1e-9)  # 0.55 * 20 is 11.000000000000002 in floating point

    def one(samples: int, hits: int) -> float:
        ways = sum(math.comb(hits, j) * math.comb(samples - hits, k - j) for j in range(least, min(k, hits) + 1))
        return ways / math.comb(samples, k)

    n_arr, c_arr = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    known = {pair: one(*pair) for pair in set(zip(n_arr.ravel().tolist(), c_arr.ravel().tolist(), strict=True))}
    flat = [known[pair] for pair in zip(n_arr.ravel().tolist(), c_arr.ravel().tolist(), strict=True)]
    return np.array(flat, dtype=np.float64).reshape(n_arr.shape)


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
