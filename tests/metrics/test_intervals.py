"""Errors and tests against numbers worked out by hand."""

import math

import numpy as np
import pytest

from pymathrl.metrics import (
    bootstrap,
    mcnemar,
    mean_over_problems,
    paired_difference,
    percentile_interval,
    resample,
    run_to_run_sd,
    sampling_variance,
    wilson,
)

SCORES = np.array([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])


def test_error_over_problems():
    mean, se = mean_over_problems(SCORES.mean(axis=1))
    assert mean == pytest.approx(0.666667, abs=1e-6)
    assert se == pytest.approx(0.220479, abs=1e-6)
    assert math.isnan(mean_over_problems([0.5]).se)
    with pytest.raises(ValueError, match="shape"):
        mean_over_problems([])


def test_error_over_samples():
    variance = sampling_variance(SCORES.sum(axis=1), [4, 4, 4])
    assert variance == pytest.approx(0.0138889, abs=1e-7) and math.sqrt(variance) == pytest.approx(0.117851, abs=1e-6)
    assert sampling_variance([0, 4], [4, 4]) == 0.0
    with pytest.raises(ValueError, match="two samples"):
        sampling_variance([1, 0], [1, 1])


def test_run_to_run():
    assert run_to_run_sd(SCORES) == pytest.approx(0.272166, abs=1e-6)
    assert math.isnan(run_to_run_sd(SCORES[:, :1]))


def test_bootstrap_over_problems():
    assert bootstrap([1, 1, 0, 1, 0, 0, 1, 1, 0, 1]) == pytest.approx((0.3, 0.9))
    assert bootstrap([0.25] * 7) == (0.25, 0.25)
    low, high = bootstrap(np.arange(100) / 99)
    se = mean_over_problems(np.arange(100) / 99).se
    assert (high - low) / 2 == pytest.approx(1.96 * se, rel=0.05)


def test_resamples_are_paired_and_fixed_by_the_seed():
    rng = np.random.default_rng(7)
    a, b = rng.random(40), rng.random(40)
    together = resample(np.stack([a, b, a - b], axis=1), draws=500)
    assert together[:, 2] == pytest.approx(together[:, 0] - together[:, 1])
    assert resample(a, draws=500)[:, 0] == pytest.approx(together[:, 0]), "whatever is measured beside"
    assert (resample(a, draws=500, seed=1)[:, 0] != together[:, 0]).any()
    assert abs(together[:, 0].mean() - a.mean()) < 5 * a.std() / math.sqrt(40 * 500)


def test_resamples_of_a_ratio():
    """Problems of 1, 1 and 2 samples: the estimate of each resample is its samples' mean, not the problems'."""
    values, sizes = np.array([1.0, 0.0, 2.0]), np.array([1.0, 1.0, 2.0])
    allowed = {(a + 2 * c) / (a + b + 2 * c) for a in range(4) for b in range(4 - a) for c in [3 - a - b]}
    got = set(np.round(resample(values, sizes, draws=400)[:, 0], 12))
    assert got == {round(x, 12) for x in allowed}
    nothing = resample([0.0, 1.0], [0.0, 1.0], draws=200)[:, 0]
    assert np.isnan(nothing).any() and percentile_interval(nothing[:, None])[0] == (1.0, 1.0)
    assert all(math.isnan(x) for x in bootstrap([0.0], [0.0]))
    with pytest.raises(ValueError, match="resample"):
        resample([])


def test_large_sets_are_resampled_in_parts():
    """More problems than are drawn at once give one distribution all the same."""
    values = np.arange(5000) % 2
    low, high = bootstrap(values, draws=1000)
    half = 1.96 * 0.5 / math.sqrt(5000)
    assert low == pytest.approx(0.5 - half, abs=0.002) and high == pytest.approx(0.5 + half, abs=0.002)


def test_wilson():
    assert wilson(6, 10) == pytest.approx((0.312674, 0.831820), abs=1e-6)
    assert wilson(30, 30) == pytest.approx((0.886487, 1.0), abs=1e-6) and wilson(30, 30).high <= 1.0
    assert wilson(0, 30) == pytest.approx((0.0, 0.113513), abs=1e-6) and wilson(0, 30).low >= 0.0
    with pytest.raises(ValueError, match="wilson"):
        wilson(4, 3)


def test_paired_difference():
    assert paired_difference([1, 0, 0.5, 1], [0.5, 0, 0.5, 0.75]) == pytest.approx((0.1875, 0.119678), abs=1e-6)
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([1, 0], [1])


def test_mcnemar():
    assert mcnemar(1, 6) == mcnemar(6, 1) == 0.125
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    with pytest.raises(ValueError, match="mcnemar"):
        mcnemar(-1, 2)
