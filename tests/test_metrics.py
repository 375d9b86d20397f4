"""Evaluation statistics against numbers worked out by hand and against the binomial definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymathrl.metrics import (
    completion_stats,
    diversity,
    evaluate_samples,
    mean_over_problems,
    pass_at_k,
    response_lengths,
    token_mean,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (10, 3, 1, 0.3),
        (10, 3, 5, 0.9166666667),
        (10, 6, 5, 1.0),
        (16, 4, 8, 0.9615384615),
        (256, 1, 64, 0.25),
        (1024, 2, 256, 0.4376832845),
        (8, 3, 1, 0.375),
        (8, 3, 4, 0.928571),
        (8, 2, 4, 0.785714),
    ],
)
def test_pass_at_k_known_values(n, c, k, value):
    assert float(pass_at_k(n, c, k)) == pytest.approx(value, abs=1e-6 if len(str(value)) < 9 else 1e-10)


@given(st.integers(1, 60), st.data())
def test_pass_at_k_is_the_binomial_ratio(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert float(pass_at_k(n, c, k)) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


def test_pass_at_k_exact_ends_and_broadcast():
    values = pass_at_k(8, np.array([[0, 8], [1, 5]]), 4)
    assert values.shape == (2, 2)
    assert values[0, 0] == 0.0 and values[0, 1] == 1.0 and values[1, 1] == 1.0  # n - c = 3 < k: exactly 1
    assert pass_at_k(np.array([4, 8]), np.array([1, 1]), 2) == pytest.approx([0.5, 0.25])
    assert pass_at_k(1024, np.arange(1025), 1) == pytest.approx(np.arange(1025) / 1024)


@pytest.mark.parametrize(
    ("n", "c", "k", "error"),
    [
        (4, 1, 8, ValueError),
        (8, 9, 2, ValueError),
        (8, -1, 2, ValueError),
        (8, 1, 0, ValueError),
        (8.0, 0.5, 2, TypeError),
    ],
)
def test_pass_at_k_refuses(n, c, k, error):
    with pytest.raises(error, match="pass_at_k"):
        pass_at_k(n, c, k)


def test_error_over_problems():
    scores = np.array([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    mean, se = mean_over_problems(scores.mean(axis=1))
    assert mean == pytest.approx(0.666667, abs=1e-6)
    assert se == pytest.approx(0.220479, abs=1e-6)
    assert math.isnan(mean_over_problems([0.5]).se)
    with pytest.raises(ValueError, match="shape"):
        mean_over_problems([])


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


def test_evaluate_samples_averages_over_problems():
    result = evaluate_samples([[True, False], [False, False]], [["a", "b"], [None, None]], ks=(1, 2))
    assert result["pass@1"] == 0.25 and result["pass@2"] == 0.5
    assert result["pass@1_se"] == pytest.approx(0.25) and result["pass@2_se"] == pytest.approx(0.5)
    assert result["diversity"] == 1.0 and result["coverage"] == 0.5


def test_lengths_and_token_mean():
    lengths = response_lengths([0, 5, 12], [2, 3])
    assert lengths.tolist() == [3, 4]
    assert completion_stats(lengths, [False, True]) == {
        "completions/mean_length": 3.5,
        "completions/clipped_ratio": 0.5,
    }
    assert token_mean([1.0, math.nan, 3.0], [True, False, True]) == 2.0
    assert token_mean([math.inf], [False]) == 0.0
    with pytest.raises(ValueError, match="prompt_len"):
        response_lengths([0, 5], [1, 2])
    with pytest.raises(ValueError, match="mask"):
        token_mean([1.0], [True, False])
    with pytest.raises(ValueError, match="truncated"):
        completion_stats([1.0, 2.0], [True])
