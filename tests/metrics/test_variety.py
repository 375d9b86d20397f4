"""Diversity against numbers worked out by hand and against the plain definitions."""

import math
from zlib import crc32

import numpy as np
import pytest

from pymathrl.metrics import (
    cosine_diversity,
    distinct_n,
    diversity,
    effective_number,
    embed,
    entropy,
    self_bleu,
    strategies,
)


def test_diversity_counts_distinct_correct_forms():
    correct = [[True, True, True, False], [False, False, False, False], [True, False, False, False]]
    forms = [["a", "b", "a", "c"], ["a", "b", "c", None], ["x", "y", None, "z"]]
    result = diversity(correct, forms)
    assert result.mean == 1.5  # problem 0: {a, b}; problem 2: {x}; problem 1 is unsolved and not counted
    assert result.coverage == pytest.approx(2 / 3)
    assert diversity([[False]], [["a"]]) == (0.0, 0.0)
    assert diversity([[True, True]], [[None, None]]).mean == 1.0
    with pytest.raises(ValueError, match="problem 0"):
        diversity([[True]], [["a", "b"]])
    with pytest.raises(ValueError, match="one row per problem"):
        diversity([[True]], [])


def test_diversity_ignores_order_and_wrong_responses():
    rng = np.random.default_rng(0)
    correct = rng.random((5, 8)) < 0.5
    forms = rng.choice(list("abcd"), (5, 8))
    shuffle = rng.permutation(8)
    base = diversity(correct.tolist(), forms.tolist())
    assert diversity(correct[:, shuffle].tolist(), forms[:, shuffle].tolist()) == base
    assert diversity(correct.tolist(), np.where(correct, forms, "junk").tolist()) == base


def test_cosine_diversity():
    assert cosine_diversity([[1, 0], [0, 1], [math.sqrt(0.5), math.sqrt(0.5)]]) == pytest.approx(0.528595, abs=1e-6)
    assert cosine_diversity([[1, 0], [1, 0]]) == pytest.approx(0.0)
    assert math.isnan(cosine_diversity([[1, 0]]))
    e = np.random.default_rng(0).normal(size=(6, 5))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    pairs = [1 - e[i] @ e[j] for i in range(6) for j in range(i)]
    assert cosine_diversity(e) == pytest.approx(np.mean(pairs))


def test_embeddings_are_hashed_term_frequencies():
    """Of "a a": the word a twice, the pair "a a", and the pieces of three characters with the ends marked."""
    (e,) = embed(["A a"])
    want = np.zeros(4096)
    for term, count in {"a": 2, "a a": 1, "\x02a ": 1, " a\x03": 1, "a\x03\x03": 1}.items():
        want[crc32(term.encode()) % 4096] += count
    want[crc32(b"a a") % 4096] += 1  # the piece "a a" too
    assert e == pytest.approx(want / np.linalg.norm(want), abs=1e-6)
    same, near, far = embed(["3 + 4 = 7, so 7 * 2 = 14"] * 2 + ["pears and apples are fruit"])
    assert (same == near).all() and same @ far < 0.2
    assert np.linalg.norm(embed(["", "\ud800"]), axis=1) == pytest.approx([1, 1]), "no text is without a direction"
    assert (embed(["x"], seed=1) != embed(["x"])).any() and embed(["x"], size=8).shape == (1, 8)


def test_strategies_are_chains_of_near_responses():
    def at(degrees):
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    # cos 30 = 0.866 is nearer than 0.2; cos 60 = 0.5 is not, but 0, 30 and 60 degrees make a chain
    assert strategies([at(0), at(90 + 80), at(60), at(30)]) == [0, 1, 0, 0]
    assert strategies([at(0), at(60)]) == [0, 1]
    assert strategies([at(0), at(60)], distance=0.6) == [0, 0]
    assert strategies(np.zeros((0, 2))) == []


def test_entropy_and_effective_number():
    assert entropy([0.5, 0.25, 0.25]) == pytest.approx(1.0397208, abs=1e-7)
    assert entropy([2, 2, 1]) == pytest.approx(1.0549202, abs=1e-7)
    assert entropy([3, 0]) == 0.0 and entropy([]) == 0.0 and entropy([0, 0]) == 0.0
    assert effective_number([0, 0, 1, 1, 2]) == pytest.approx(math.exp(1.0549202))
    assert effective_number([5, 7, 9]) == pytest.approx(3.0) and effective_number([4, 4]) == 1.0
    with pytest.raises(ValueError, match="entropy"):
        entropy([1, -1])


def test_distinct_n():
    assert distinct_n(["a b a", "a b c"], 2) == 0.75
    assert distinct_n(["a b a", "a b c"], 1) == 0.5
    assert math.isnan(distinct_n(["a"], 2))


def plain_bleu(texts):
    words = [t.split() for t in texts]
    scores = []
    for i, mine in enumerate(words):
        others = words[:i] + words[i + 1 :]
        logs = []
        for n in range(1, min(4, len(mine)) + 1):
            grams = [tuple(mine[j : j + n]) for j in range(len(mine) - n + 1)]
            hits = 0
            for gram in set(grams):
                best = max(sum(tuple(o[j : j + n]) == gram for j in range(len(o))) for o in others)
                hits += min(grams.count(gram), best)
            extra = n > 1
            logs.append(math.log((hits + extra) / (len(grams) + extra)) if hits + extra else -math.inf)
        near = min(others, key=lambda o: (abs(len(o) - len(mine)), len(o)))
        scores.append(min(1, math.exp(1 - len(near) / len(mine))) * math.exp(np.mean(logs)))
    return np.mean(scores)


def test_self_bleu():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b", "c d"]) == 0.0
    # "a b": 1 of 1-grams 2/2, of 2-grams (0 + 1)/(1 + 1); "b a" the same
    assert self_bleu(["a b", "b a"]) == pytest.approx(math.sqrt(0.5))
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abc"), size)) for size in (1, 4, 6, 9, 9)]
    assert self_bleu(texts) == pytest.approx(plain_bleu(texts))
    assert math.isnan(self_bleu(["a"])) and self_bleu(["", ""]) == 0.0
