"""How different the responses to one problem are: distinct solutions, embeddings, n-grams, entropy of the answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

EMBEDDING_SIZE = 4096
STRATEGY_DISTANCE = 0.2  # cosine distance below which two responses count as the same strategy
_WORD = re.compile(r"\w+|[^\w\s]")

Embedder = Callable[[Sequence[str]], NDArray[np.float32]]  # texts [m] -> unit vectors [m, D]


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


def embed(texts: Sequence[str], size: int = EMBEDDING_SIZE, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors [m, size] of term frequencies: words, pairs of words and three-character pieces, hashed by CRC32.

    No model and no file, so the same on every machine; distances compare only within one embedder. Case is ignored.
    """
    out = np.zeros((len(texts), size), dtype=np.float32)
    for row, text in enumerate(texts):
        text = text.lower()
        words = _WORD.findall(text)
        padded = f"\x02{text}\x03\x03"  # so that no text is without a piece, and no vector zero
        terms = Counter(words)
        terms.update(f"{a} {b}" for a, b in pairwise(words))
        terms.update(padded[i : i + 3] for i in range(len(padded) - 2))
        for term, count in terms.items():
            out[row, crc32(term.encode("utf-8", "surrogatepass"), seed) % size] += count
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def cosine_diversity(vectors: ArrayLike) -> float:
    """Mean cosine distance of the pairs of m unit vectors [m, D]: 1 - (|sum e|^2 - m) / (m (m - 1)); nan for m < 2."""
    e = np.asarray(vectors, dtype=np.float64)
    m = len(e)
    if m < 2:
        return math.nan
    return float(1 - (np.square(e.sum(axis=0)).sum() - m) / (m * (m - 1)))


def strategies(vectors: ArrayLike, distance: float = STRATEGY_DISTANCE) -> list[int]:
    """The cluster of each of m unit vectors [m, D], numbered from 0 by first appearance: vectors at a cosine distance
    below `distance` are in one, and so is a chain of such."""
    e = np.asarray(vectors, dtype=np.float64)
    near = e @ e.T > 1 - distance
    return components(len(e), ((i, j) for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True)))


def components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Union-find: the component of each of `count` elements once the pairs are joined, numbered by first appearance."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        parent[root(b)] = root(a)
    names: dict[int, int] = {}
    return [names.setdefault(root(i), len(names)) for i in range(count)]


def entropy(weights: ArrayLike) -> float:
    """-sum p log p in nats of the weights (counts, or probabilities), which are brought to sum 1; 0.0 where all are
    0."""
    w = np.asarray(weights, dtype=np.float64)
    if w.size and float(w.min()) < 0:
        raise ValueError(f"entropy: weights must be >= 0, got {w.min()}")
    w = w[w > 0]
    p = w / w.sum() if w.size else w
    return float(-(p * np.log(p)).sum()) + 0.0  # + 0.0: one certain outcome is 0, not -0


def effective_number(labels: Sequence[int]) -> float:
    """exp(entropy) of the cluster sizes: as many equally large clusters would be as diverse."""
    return math.exp(entropy(list(Counter(labels).values())))


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Unique n-grams of words over all n-grams of the texts together (Li et al. 2016, arXiv 1510.03055); nan without
    any."""
    grams = [gram for text in texts for gram in _ngrams(_WORD.findall(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[str], order: int = 4) -> float:
    """Mean BLEU of each text against all others (Zhu et al. 2018, arXiv 1802.01886), 1 for equal texts; nan for fewer
    than two.

    n-grams of words up to `order`, geometric mean of the clipped precisions of the orders that the text is long enough
    for; add-one smoothing above order 1 (Lin and Och 2004); brevity penalty against the nearest length. Linear in the
    number of texts: of each n-gram only the two largest counts are kept, of which one is the largest among the others.
    """
    words = [_WORD.findall(text) for text in texts]
    if len(words) < 2:
        return math.nan
    logs: list[list[float]] = [[] for _ in words]
    for n in range(1, order + 1):
        counts = [Counter(_ngrams(w, n)) for w in words]
        most: dict[tuple[str, ...], tuple[int, int, int]] = {}  # largest count, whose it is, second largest
        for i, counter in enumerate(counts):
            for gram, count in counter.items():
                first, owner, second = most.get(gram, (0, -1, 0))
                most[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
        smooth = int(n > 1)
        for i, counter in enumerate(counts):
            hits = sum(min(c, most[gram][2 if most[gram][1] == i else 0]) for gram, c in counter.items())
            if counter:
                total = sum(counter.values())
                logs[i].append(math.log((hits + smooth) / (total + smooth)) if hits + smooth else -math.inf)
    lengths = [len(w) for w in words]
    scores = []
    for i, known in enumerate(logs):
        if not known:  # a text without words
            scores.append(0.0)
            continue
        nearest = min((abs(m - lengths[i]), m) for j, m in enumerate(lengths) if j != i)[1]
        scores.append(min(1.0, math.exp(1 - nearest / lengths[i])) * math.exp(sum(known) / len(known)))
    return float(np.mean(scores))


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
