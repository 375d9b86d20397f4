"""Majority votes: answers grouped by equality, and the share of votes that are right (Wang et al. 2023, arXiv
2203.11171)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pymathrl.metrics.variety import components

TIES = ("expected", "first", "logprob", "shortest")
EXACT_SUBSETS = 2000  # up to so many subsets are all counted
DRAWN_SUBSETS = 1000  # else so many are drawn


def group_answers(answers: Sequence[str | None], equal: Callable[[str, str], bool] | None = None) -> list[int]:
    """The group of each of n answers, numbered from 0 by first appearance; -1 for None, which is in no group.

    Equal texts are one group; groups whose first texts `equal` joins, asked in both orders, are one group too, and so
    is a chain of these (50% is 50 and is 0.5, so all three are). `equal` None: texts alone count.
    """
    texts = list(dict.fromkeys(a for a in answers if a is not None))
    joined = list(range(len(texts)))
    if equal is not None:
        pairs: list[tuple[int, int]] = []
        for i, j in combinations(range(len(texts)), 2):
            if joined[i] != joined[j] and (equal(texts[i], texts[j]) or equal(texts[j], texts[i])):
                pairs.append((i, j))
                joined = components(len(texts), pairs)
    group_of = {text: joined[i] for i, text in enumerate(texts)}
    return [-1 if a is None else group_of[a] for a in answers]


def maj_at_k(
    groups: Sequence[int],
    correct: Sequence[bool],
    k: int,
    *,
    ties: str = "expected",
    key: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    seed: int | Sequence[int] = 0,
) -> float:
    """The chance that the vote of k of n samples is right, over the subsets of k: all of them if there are at most
    2000, else 1000 that the seed draws.

    groups   [n] as of `group_answers`; -1 has no vote. A vote without a voter is wrong. The verdict on a group is that
             on its first sample.
    ties     expected: the share of the largest groups that are right, so the mean over a coin's throws;
             first: the one with the sample of the lowest key (when it was completed; without keys its position);
             logprob: the one with the sample of the highest key; shortest: of the lowest key (its length).
             Equal keys: the group that appears first.
    weights  [n] >= 0: votes count so much, instead of 1
    """
    label, ok = np.asarray(groups, dtype=np.int64), np.asarray(correct, dtype=bool)
    n = label.size
    if label.shape != ok.shape or label.ndim != 1 or not 1 <= k <= n:
        raise ValueError(
            f"maj_at_k: needs [n] groups and verdicts and 1 <= k <= n, got {label.shape}, {ok.shape} and k = {k}"
        )
    if ties not in TIES:
        raise ValueError(f"maj_at_k: ties must be one of {', '.join(TIES)}, got {ties!r}")
    if key is None and ties in ("logprob", "shortest"):
        raise ValueError(f"maj_at_k: ties={ties!r} needs the key of each sample")
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != (n,) or bool((weight < 0).any()):
        raise ValueError(f"maj_at_k: weights must be [n] and >= 0, got {weight.shape}")
    low = np.arange(n, dtype=np.float64) if key is None else np.asarray(key, dtype=np.float64)
    low = -low if ties == "logprob" else low
    count = int(label.max()) + 1
    if count == 0:
        return 0.0
    right = ok[[int((label == g).argmax()) for g in range(count)]]
    subsets = _subsets(n, k, seed)
    rows = np.arange(len(subsets))
    votes = np.zeros((len(subsets), count))
    best_key = np.full((len(subsets), count), np.inf)
    for column in subsets.T:
        voter = label[column] >= 0
        at = (rows[voter], label[column][voter])
        votes[at] += weight[column][voter]
        best_key[at] = np.minimum(best_key[at], low[column][voter])
    most = votes.max(axis=1, keepdims=True)
    # 0.1 + 0.2 and 0.3 are a tie
    tied = (votes > 0) & (votes >= most * (1 - 1e-12))
    if ties == "expected":
        return float(((tied & right).sum(axis=1) / np.maximum(tied.sum(axis=1), 1)).mean())
    chosen = np.where(tied, best_key, np.inf).argmin(axis=1)
    return float((right[chosen] & tied.any(axis=1)).mean())


def _subsets(n: int, k: int, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """[S, k]: sample numbers of each subset."""
    if math.comb(n, k) <= EXACT_SUBSETS:
        return np.array(list(combinations(range(n), k)), dtype=np.int64)
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(n), (DRAWN_SUBSETS, 1)), axis=1)[:, :k]
