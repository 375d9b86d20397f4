"""The numbers that single benchmarks define: variants of a question, checklists, composed questions, frontiers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# --- variants of one question: DynaMath (Zou et al. 2024, arXiv 2411.00836), GSM8K+, MATH+ ---


class Variants(NamedTuple):
    average: float
    worst: float  # share of the seed questions of which every variant is right
    robustness: float  # worst / average; nan where the average is 0


def over_variants(correct: Sequence[ArrayLike]) -> Variants:
    """correct: for each seed question the verdicts (or chances, 0..1) on its variants [v], or on n samples of each
    [v, n]; v may differ.

    average: mean over the seeds of the mean over their variants; worst: mean over the seeds of the worst variant, in
    each of the n runs by itself.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in correct]
    if not rows or any(row.ndim not in (1, 2) or row.size == 0 for row in rows):
        raise ValueError("over_variants: needs at least one seed question, each with one variant or more")
    average = float(np.mean([row.mean() for row in rows]))
    worst = float(np.mean([row.min(axis=0).mean() for row in rows]))
    return Variants(average, worst, worst / average if average else math.nan)


class Drop(NamedTuple):
    original: float
    variants: float
    drop: float  # original - variants, in shares of 1
    relative: float  # drop / original; nan where the original is 0


def robustness_drop(original: ArrayLike, variants: Sequence[ArrayLike]) -> Drop:
    """How much is lost from the seed questions [P] to their variants (one sequence per seed): means over the seeds, of
    the seed's own accuracy and of the mean over its variants."""
    first = np.asarray(original, dtype=np.float64)
    if first.ndim != 1 or first.size == 0 or first.size != len(variants):
        raise ValueError(f"robustness_drop: needs variants of each seed question {first.shape}, got {len(variants)}")
    after = float(np.mean([np.asarray(row, dtype=np.float64).mean() for row in variants]))
    before = float(first.mean())
    return Drop(before, after, before - after, (before - after) / before if before else math.nan)


# --- MATHCHECK: four tasks x four kinds of question (Zhou et al. 2024, arXiv 2407.08733) ---

CHECK_TASKS = ("solving", "answerable_judging", "outcome_judging", "process_judging")
CHECK_QUESTIONS = (
    "seed_question", "problem_understanding_question", "distractor_insertion_question", "scenario_understanding",
)  # fmt: skip
JUDGING = {"answerable_judging": ("Unanswerable", "Answerable"), "outcome_judging": ("Incorrect", "Correct")}  # 0, 1
_N, _RIGHT, _TP0, _MISS0, _TP1, _MISS1 = range(6)  # what is counted; MISS: false positives and false negatives


def macro_f1(gold: Sequence[int], predicted: Sequence[int | None]) -> float:
    """Mean of the F1 of the labels 0 and 1. A prediction None could not be read: a miss of the gold label that is no
    false alarm of the other. F1 = 2 TP / (2 TP + FP + FN), 0 where that is 0 / 0."""
    if len(gold) != len(predicted) or not gold:
        raise ValueError(f"macro_f1: needs a prediction for each gold label, got {len(gold)} and {len(predicted)}")
    counts = sum(_judged(g, p) for g, p in zip(gold, predicted, strict=True))
    return float(_macro_f1(np.asarray(counts)))


def _judged(gold: int, predicted: int | None) -> NDArray[np.float64]:
    """The six counts of one judgement."""
    out = np.zeros(6)
    out[_N], out[_RIGHT] = 1, predicted == gold
    if predicted == gold:
        out[(_TP0, _TP1)[gold]] = 1
    else:
        out[(_MISS0, _MISS1)[gold]] = 1
        if predicted is not None:
            out[(_MISS0, _MISS1)[predicted]] = 1
    return out


def _macro_f1(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """counts [..., 6] -> [...]"""
    scores = []
    for hits, misses in ((_TP0, _MISS0), (_TP1, _MISS1)):
        bottom = 2 * counts[..., hits] + counts[..., misses]
        scores.append(np.where(bottom > 0, 2 * counts[..., hits] / np.where(bottom > 0, bottom, 1), 0.0))
    return (scores[0] + scores[1]) / 2


class Checked(NamedTuple):
    """One graded response to an item. label, predicted: of a judging task, 0 or 1, predicted None if it could not be
    read; of the other tasks None."""

    group: str
    task: str
    question: str
    correct: bool
    label: int | None = None
    predicted: int | None = None


def check_counts(items: Sequence[Checked]) -> NDArray[np.float64]:
    """[groups, 4 tasks, 4 questions, 6]: what `check_matrix` needs, per group of items, so that groups can be summed
    and resampled. Groups in the order of their first item."""
    groups: dict[str, int] = {}
    for item in items:
        groups.setdefault(item.group, len(groups))
    counts = np.zeros((len(groups), len(CHECK_TASKS), len(CHECK_QUESTIONS), 6))
    for item in items:
        cell = counts[groups[item.group], CHECK_TASKS.index(item.task), CHECK_QUESTIONS.index(item.question)]
        if item.label is None:
            cell[_N] += 1
            cell[_RIGHT] += item.correct
        else:
            cell += _judged(item.label, item.predicted)
    return counts


def check_matrix(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """counts [..., 4, 4, 6] summed over groups -> the matrix [..., 4 tasks, 4 questions]: accuracy of solving and of
    process judging, macro F1 of the two judging tasks with labels; nan where a cell has no item.  The score is the mean
    of the 16 cells."""
    number = counts[..., _N]
    accuracy = counts[..., _RIGHT] / np.where(number > 0, number, 1)
    judging = np.array([task in JUDGING for task in CHECK_TASKS])[:, None]
    return np.where(number > 0, np.where(judging, _macro_f1(counts), accuracy), np.nan)


# --- MATH-Beyond: what training added to a base model (Mayilvahanan et al. 2025) ---


class Frontier(NamedTuple):
    """Shares of all problems, but for consolidation."""

    expansion: float  # solved after training alone
    shrinkage: float  # solved before training alone
    preservation: float  # solved by both
    out_of_reach: float  # by neither
    consolidation: float  # of those solved by both, the share with more correct samples after; nan without any


def frontier(base: ArrayLike, trained: ArrayLike) -> Frontier:
    """base, trained [P]: correct samples of each problem, of the same number of samples; solved: one or more."""
    b, t = np.asarray(base, dtype=np.float64), np.asarray(trained, dtype=np.float64)
    if b.shape != t.shape or b.ndim != 1 or b.size == 0:
        raise ValueError(f"frontier: needs the same P >= 1 problems of both models, got {b.shape} and {t.shape}")
    both = (b > 0) & (t > 0)
    consolidated = float((t > b)[both].mean()) if both.any() else math.nan
    gained, lost, neither = (b == 0) & (t > 0), (b > 0) & (t == 0), (b == 0) & (t == 0)
    return Frontier(
        float(gained.mean()), float(lost.mean()), float(both.mean()), float(neither.mean()), consolidated
    )


# --- composed questions ---------------------------------------------------------------------


class WeMath(NamedTuple):
    """Shares of the N composed problems; score = complete mastery + half of the inadequate generalization."""

    insufficient_knowledge: float  # a part wrong, the whole wrong
    inadequate_generalization: float  # every part right, the whole wrong
    complete_mastery: float
    rote_memorization: float  # as a share of rote memorization and complete mastery; nan where both are 0
    score: float


def we_math(parts: Sequence[Sequence[bool]], whole: Sequence[bool], *, loose: bool = False) -> WeMath:
    """Qiao et al. 2024, arXiv 2407.01284. parts: the verdicts on the sub-problems of each problem, whole: on the
    problem. A right whole with a wrong part is rote memorization: strict: any part wrong; loose: every part wrong."""
    if len(parts) != len(whole) or not whole or not all(parts):
        raise ValueError(f"we_math: needs parts of each problem, got {len(parts)} lists and {len(whole)} problems")
    some = any if loose else all
    rows = list(zip(parts, whole, strict=True))
    generalization = sum(all(p) and not w for p, w in rows)
    knowledge = sum(not all(p) and not w for p, w in rows)
    rote = sum(w and not some(p) for p, w in rows)
    return we_math_counts(len(rows), generalization, knowledge, rote)


def we_math_counts(problems: int, generalization: int, knowledge: int, rote: int) -> WeMath:
    """The same from counts: inadequate generalization, insufficient knowledge, rote memorization."""
    mastery = problems - generalization - knowledge - rote
    if min(generalization, knowledge, rote, mastery) < 0 or problems < 1:
        raise ValueError(
            f"we_math: counts must be >= 0 and add up to at most the problems, got {generalization}, {knowledge} and "
            f"{rote} of {problems}"
        )
    return WeMath(
        knowledge / problems, generalization / problems, mastery / problems,
        rote / (rote + mastery) if rote + mastery else math.nan, (mastery + 0.5 * generalization) / problems,
    )  # fmt: skip


def compositionality_gap(first: Sequence[bool], second: Sequence[bool], composed: Sequence[bool]) -> float:
    """AgentCoMa: the share of problems of which both steps are right alone, minus that of right composed questions."""
    if not len(first) == len(second) == len(composed) or not composed:
        raise ValueError(
            "compositionality_gap: needs both steps of each problem, "
            f"got {len(first)}, {len(second)} and {len(composed)}"
        )
    both = np.asarray(first, dtype=bool) & np.asarray(second, dtype=bool)
    return float(both.mean() - np.asarray(composed, dtype=np.float64).mean())


class ProcessScores(NamedTuple):
    erroneous: float  # accuracy on the solutions with a wrong step
    sound: float  # on those without
    f1: float  # their harmonic mean


def process_f1(labels: Sequence[int], predicted: Sequence[int | None]) -> ProcessScores:
    """ProcessBench (Zheng et al. 2024, arXiv 2412.06559). labels: the first wrong step of each solution, -1 if none;
    predicted: the same as the model says, None if it could not be read, which is wrong."""
    if len(labels) != len(predicted):
        raise ValueError(f"process_f1: needs a prediction for each label, got {len(labels)} and {len(predicted)}")
    right = np.array([a == b for a, b in zip(labels, predicted, strict=True)], dtype=bool)
    sound = np.asarray(labels) == -1
    if not sound.any() or sound.all():
        raise ValueError("process_f1: needs solutions with a wrong step, and without one")
    wrong, fine = float(right[~sound].mean()), float(right[sound].mean())
    return ProcessScores(wrong, fine, 2 * wrong * fine / (wrong + fine) if wrong + fine else 0.0)
