"""The numbers of single benchmarks against counts made by hand."""

import math

import numpy as np
import pytest

from pymathrl.metrics import (
    CHECK_QUESTIONS,
    CHECK_TASKS,
    Checked,
    check_counts,
    check_matrix,
    compositionality_gap,
    frontier,
    macro_f1,
    over_variants,
    process_f1,
    robustness_drop,
    we_math,
    we_math_counts,
)


def test_worst_case_over_variants():
    assert over_variants([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1]]) == pytest.approx((0.625, 0.25, 0.4))
    assert over_variants([[1, 0, 1], [1]]) == pytest.approx((5 / 6, 0.5, 0.6)), "of seeds with unequal variants"
    # two runs: the first fails on the second variant, the second on the first; each by itself has a worst of 0
    assert over_variants([[[1, 0], [0, 1]]]) == (0.5, 0.0, 0.0)
    assert math.isnan(over_variants([[0, 0]]).robustness)
    with pytest.raises(ValueError, match="over_variants"):
        over_variants([[1], []])


def test_robustness_drop():
    drop = robustness_drop([1, 1, 0, 0.5], [[1, 0], [0.5, 0.5, 0.5], [0], [1]])
    # the variants' means are 0.5, 0.5, 0 and 1
    assert drop == pytest.approx((0.625, 0.5, 0.125, 0.2))
    assert math.isnan(robustness_drop([0], [[0]]).relative)
    with pytest.raises(ValueError, match="robustness_drop"):
        robustness_drop([1, 1], [[1]])


def test_macro_f1_counts_what_it_cannot_read_as_a_miss():
    gold, predicted = [1, 0, 1, 0], [1, 0, None, 1]
    # label 0: TP 1, FN 1: 2/3; label 1: TP 1, FN 1 (unread), FP 1: 1/2
    assert macro_f1(gold, predicted) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert macro_f1([1, 1], [1, 1]) == 0.5, "a label that never occurs has F1 0"
    assert macro_f1([0, 1], [None, None]) == 0.0
    with pytest.raises(ValueError, match="macro_f1"):
        macro_f1([1], [])


def test_checklist_matrix():
    """One group: all right but one of the two outcome judgements of a seed question, which could not be read."""
    items = []
    for task in CHECK_TASKS:
        for question in CHECK_QUESTIONS:
            if task.endswith("answerable_judging") or task.startswith("outcome"):
                items += [Checked("g", task, question, True, label, label) for label in (0, 1)]
            else:
                items.append(Checked("g", task, question, True))
    broken = items.index(Checked("g", "outcome_judging", "seed_question", True, 1, 1))
    items[broken] = Checked("g", "outcome_judging", "seed_question", False, 1, None)
    counts = check_counts(items)
    assert counts.shape == (1, 4, 4, 6)
    matrix = check_matrix(counts.sum(axis=0))
    want = np.ones((4, 4))
    want[CHECK_TASKS.index("outcome_judging"), 0] = 0.5  # F1 of label 0 is 1, of label 1 it is 0
    assert matrix == pytest.approx(want) and matrix.mean() == pytest.approx(15.5 / 16)


def test_checklist_pools_groups_before_it_divides():
    """The four judgements of the macro F1 case, in two groups: F1 of the sum, not the mean of F1s."""
    verdicts = [("a", 1, 1), ("a", 0, 0), ("b", 1, None), ("b", 0, 1)]
    items = [Checked(g, "outcome_judging", "seed_question", gold == p, gold, p) for g, gold, p in verdicts]
    items += [Checked("b", "solving", "scenario_understanding", x) for x in (True, False, False)]
    matrix = check_matrix(check_counts(items).sum(axis=0))
    assert matrix[2, 0] == pytest.approx(0.583333, abs=1e-6) and matrix[0, 3] == pytest.approx(1 / 3)
    assert np.isnan(matrix).sum() == 14, "cells without items are no zeros"


def test_frontier_of_training():
    base, trained = np.zeros(10), np.zeros(10)
    base[[0, 1, 2]], trained[[1, 2, 3, 4]] = [3, 2, 2], [5, 1, 1, 1]
    got = frontier(base, trained)
    assert got == pytest.approx((0.2, 0.1, 0.2, 0.5, 0.5)), "of problems 1 and 2, 1 has more correct ones"
    assert math.isnan(frontier([0, 1], [1, 0]).consolidation)
    with pytest.raises(ValueError, match="same P"):
        frontier([1], [1, 2])


@pytest.mark.parametrize(
    ("rote", "mastery", "score", "rate"), [(60, 215, 0.504762, 0.218182), (20, 255, 0.580952, 0.072727)]
)
def test_we_math_counts(rote, mastery, score, rate):
    got = we_math_counts(525, generalization=100, knowledge=150, rote=rote)
    assert got.score == pytest.approx(score, abs=1e-6) and got.rote_memorization == pytest.approx(rate, abs=1e-6)
    assert got.complete_mastery == pytest.approx(mastery / 525)
    assert got.score == pytest.approx((525 - 0.5 * 100 - rote - 150) / 525)


def test_we_math_from_verdicts():
    parts = [[True, True], [True, False], [True, True], [True, False], [False, False]]
    whole = [False, False, True, True, True]
    strict, loose = we_math(parts, whole), we_math(parts, whole, loose=True)
    # generalization 1, knowledge 1; strict: mastery 1, rote 2; loose: mastery 2, rote 1
    assert strict == pytest.approx((0.2, 0.2, 0.2, 2 / 3, 0.3)) and loose == pytest.approx((0.2, 0.2, 0.4, 1 / 3, 0.5))
    assert math.isnan(we_math([[False]], [False]).rote_memorization)
    for bad in (lambda: we_math([[]], [True]), lambda: we_math_counts(3, 2, 2, 0)):
        with pytest.raises(ValueError, match="we_math"):
            bad()


def test_compositionality_gap():
    first, second = [True, True, True, False], [True, True, False, True]
    assert compositionality_gap(first, second, [True, False, False, False]) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="compositionality_gap"):
        compositionality_gap([True], [True, False], [True])


def test_process_f1():
    assert process_f1([-1, 2, 0, -1, 3], [-1, 2, 1, 0, 3]) == pytest.approx((2 / 3, 1 / 2, 0.571429), abs=1e-6)
    assert process_f1([-1, 2], [None, 1]).f1 == 0.0
    with pytest.raises(ValueError, match="process_f1"):
        process_f1([1, 2], [1, 2])
