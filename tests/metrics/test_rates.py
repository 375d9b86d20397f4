"""Shares of correct responses against numbers worked out by hand and against the binomial definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymathrl.metrics import evaluate_samples, g_pass_at_k, pass_at_k


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


@pytest.mark.parametrize(
    ("n", "c", "k", "tau", "value"),
    [(10, 6, 4, 0.5, 0.880952), (10, 6, 4, 1.0, 0.0714286), (10, 6, 4, 0.25, 0.995238), (10, 0, 4, 0.5, 0.0)],
)
def test_g_pass_at_k_known_values(n, c, k, tau, value):
    assert float(g_pass_at_k(n, c, k, tau)) == pytest.approx(value, abs=1e-6)


def test_g_pass_at_k_ends():
    c = np.arange(17)
    assert g_pass_at_k(16, c, 8, 1 / 8) == pytest.approx(pass_at_k(16, c, 8)), "one of 8 is pass@8"
    assert g_pass_at_k(20, np.array([[11, 10]]), 20, 0.55).tolist() == [[1.0, 0.0]], "0.55 * 20 is 11, not a bit more"
    for tau in (0.0, 1.1):
        with pytest.raises(ValueError, match="tau"):
            g_pass_at_k(4, 2, 2, tau)


def test_evaluate_samples_averages_over_problems():
    result = evaluate_samples([[True, False], [False, False]], [["a", "b"], [None, None]], ks=(1, 2))
    assert result["pass@1"] == 0.25 and result["pass@2"] == 0.5
    assert result["pass@1_se"] == pytest.approx(0.25) and result["pass@2_se"] == pytest.approx(0.5)
    assert result["diversity"] == 1.0 and result["coverage"] == 0.5
