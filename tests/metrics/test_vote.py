"""Majority votes against counts made by hand."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymathrl.metrics import TIES, group_answers, maj_at_k

AABBC = [0, 0, 1, 1, 2]
A_IS_RIGHT = [True, True, False, False, False]


def vote(k, groups=AABBC, correct=A_IS_RIGHT, **options):
    return maj_at_k(groups, correct, k, **options)


def test_known_values():
    """Of the 10 subsets of 3, AAB x 2 and AAC are won by A, ABB x 2 and BBC by B, ABC x 4 are ties of three."""
    assert vote(5) == 0.5 and vote(5, ties="first") == 1.0
    assert vote(3) == pytest.approx((3 + 4 / 3) / 10) and vote(3, ties="first") == pytest.approx(0.7)
    assert vote(1) == pytest.approx(0.4), "a vote of one is avg@n"


def test_tie_rules_look_at_their_key():
    """A and B tie at k = 5; B holds the shortest and the likeliest sample, and was completed first."""
    assert vote(5, ties="shortest", key=[9, 8, 7, 20, 1]) == 0.0
    assert vote(5, ties="shortest", key=[9, 6, 7, 20, 1]) == 1.0
    assert vote(5, ties="logprob", key=[-9.0, -8.0, -7.0, -20.0, -1.0]) == 0.0
    assert vote(5, ties="first", key=[4, 3, 2, 1, 0]) == 0.0, "C came first, but is not among the tied"
    with pytest.raises(ValueError, match="needs the key"):
        vote(5, ties="shortest")
    with pytest.raises(ValueError, match="ties"):
        vote(5, ties="coin")


def test_answers_that_were_not_found_cannot_win():
    assert maj_at_k([-1, -1, -1, 0], [False, False, False, True], 4) == 1.0
    assert maj_at_k([-1, -1], [False, False], 2) == 0.0
    # of the 3 pairs of (none, none, A), one has no voter
    assert maj_at_k([-1, -1, 0], [False, False, True], 2) == pytest.approx(2 / 3)


def test_weights_replace_counts():
    assert vote(5, weights=[1, 1, 1, 1.5, 1]) == 0.0
    assert vote(5, weights=[1, 1.5, 1, 1, 2.4]) == 1.0
    assert vote(5, weights=[0.1, 0.2, 0.3, 0.0, 0.0]) == 0.5, "0.1 + 0.2 and 0.3 tie, though not in floating point"
    assert vote(5, weights=[0, 0, 0, 0, 0]) == 0.0, "no weight, no voter"
    with pytest.raises(ValueError, match="weights"):
        vote(5, weights=[1, 1, 1, 1, -1])


def test_many_subsets_are_drawn_by_the_seed():
    """C(20, 8) = 125,970 subsets: 1000 are drawn, and estimate the exact share."""
    groups = [0] * 8 + [1] * 7 + [2] * 5
    correct = [g == 0 for g in groups]
    drawn = [maj_at_k(groups, correct, 8, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    total = 0.0
    for subset in combinations(range(20), 8):
        counts = [sum(groups[i] == g for i in subset) for g in range(3)]
        total += (counts[0] == max(counts)) / counts.count(max(counts))
    exact = total / math.comb(20, 8)
    assert abs(drawn[0] - exact) < 5 * math.sqrt(0.25 / 1000) and abs(drawn[0] - exact) > 0


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=7), st.data())
def test_against_a_plain_count(groups, data):
    k = data.draw(st.integers(1, len(groups)))
    right = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
    names = {}
    groups = [-1 if g < 0 else names.setdefault(g, len(names)) for g in groups]
    correct = [g >= 0 and right[g] for g in groups]
    scores = {"expected": [], "first": []}
    for subset in combinations(range(len(groups)), k):
        votes = [groups[i] for i in subset if groups[i] >= 0]
        most = max((votes.count(g) for g in votes), default=0)
        tied = [g for g in dict.fromkeys(votes) if votes.count(g) == most]
        scores["expected"].append(np.mean([right[g] for g in tied]) if tied else 0.0)
        scores["first"].append(float(right[tied[0]]) if tied else 0.0)
    for rule, values in scores.items():
        assert maj_at_k(groups, correct, k, ties=rule) == pytest.approx(np.mean(values))


def test_refusals():
    for groups, correct, k in (([0], [True], 2), ([0], [True, False], 1), ([0], [True], 0), ([], [], 1)):
        with pytest.raises(ValueError, match="maj_at_k"):
            maj_at_k(groups, correct, k)
    assert TIES[0] == "expected"


def test_groups_by_text_and_by_equality():
    asked = []

    def same_number(a, b):
        asked.append((a, b))
        return float(a) == float(b)

    answers = ["2", None, "3", "2.0", "2", "3.00", None]
    assert group_answers(answers) == [0, -1, 1, 2, 0, 3, -1]
    assert group_answers(answers, same_number) == [0, -1, 1, 0, 0, 1, -1]
    assert all("2" in pair or "3" in pair or "2.0" in pair for pair in asked) and len(asked) < 2 * math.comb(4, 2)
    assert group_answers([None, None], same_number) == [-1, -1]


def test_equality_is_asked_in_both_orders_and_chains_join():
    """50% may be read as 50 and as 0.5, where the sign stands on the left alone."""
    pairs = {("50%", "0.5"), ("50%", "50")}
    equal = lambda a, b: (a, b) in pairs
    assert group_answers(["0.5", "50", "50%"], equal) == [0, 0, 0]
    assert group_answers(["0.5", "50"], equal) == [0, 1]
    assert group_answers(["7", "0.5", "50", "50%"], equal) == [0, 1, 1, 1]
