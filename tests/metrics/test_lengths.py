"""Lengths, repetition and budgets against numbers worked out by hand."""

import math

import pytest

from pymathrl.metrics import (
    budget_curve,
    completion_stats,
    length_stats,
    position_buckets,
    repetition_rate,
    response_lengths,
    token_budgets,
    token_mean,
    tokens_per_correct,
)


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


def test_length_stats():
    # the 95th percentile of 1 .. 5 lies at position 3.8 from 0: 4.8
    assert length_stats([5, 1, 2, 4, 3]) == pytest.approx((5, 3.0, 3.0, 4.8))
    none = length_stats([])
    assert none.responses == 0 and all(math.isnan(x) for x in none[1:])


def test_repetition():
    assert repetition_rate([1, 2, 1, 2, 1], n=2) == pytest.approx(3 / 5), "12 returns as tokens 2, 3; 21 as 3, 4"
    assert repetition_rate([7] * 12) == pytest.approx(11 / 12), "the pieces at 1 and 2 cover all but the first token"
    assert repetition_rate(list(range(30))) == 0.0 and repetition_rate([1] * 9) == 0.0 and repetition_rate([]) == 0.0
    once = [*range(10), 99, *range(10)]
    assert repetition_rate(once) == pytest.approx(10 / 21)


def test_what_a_correct_answer_costs():
    assert tokens_per_correct([10, 20, 30], [True, False, True]) == 30.0
    assert tokens_per_correct([10], [False]) == math.inf
    with pytest.raises(ValueError, match="tokens_per_correct"):
        tokens_per_correct([1, 2], [True])


def test_budgets():
    assert token_budgets(16384) == [1024, 2048, 4096, 8192, 16384]
    assert token_budgets(64) == [4, 8, 16, 32, 64] and token_budgets(3) == [1, 3]
    curve = budget_curve([5, 10, 10, 40], [True, True, False, True], [4, 5, 10, 39, 40])
    assert curve.tolist() == [0.0, 0.25, 0.5, 0.5, 0.75]
    with pytest.raises(ValueError, match="budget_curve"):
        budget_curve([], [], [1])


def test_position_buckets_tile_the_response():
    assert position_buckets(10) == [(0, 1), (1, 3), (3, 7), (7, 10)]
    assert position_buckets(1) == [(0, 1)] and position_buckets(0) == []
    assert position_buckets(7)[-1] == (3, 7)
