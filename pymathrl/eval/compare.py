"""One model against another on the problems that both were asked, in pairs: the same problems, the same draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymathrl.eval.summary import Ratio, Score, Summary
from pymathrl.metrics import Frontier, frontier, mcnemar, paired_difference, percentile_interval, resample


@dataclass(frozen=True)
class Comparison:
    """differences: model - base, with the interval of a paired bootstrap and, of means, the standard error over
    problems. mcnemar: exact p where there is one sample per problem, else nan. frontier: which problems the model
    solves at least once where the base did not, and so on."""

    base: str
    model: str
    task: str
    problems: int
    differences: dict[str, Score]
    mcnemar: float
    frontier: Frontier

    def record(self) -> dict[str, Any]:
        """Plain data for summary.json."""
        return {
            "base": self.base, "model": self.model, "task": self.task, "problems": self.problems,
            "differences": {
                name: {"value": s.value, "low": s.low, "high": s.high, "se": s.se}
                for name, s in self.differences.items()
            },
            "mcnemar_p": self.mcnemar, "frontier": self.frontier._asdict(),
        }  # fmt: skip


def compare(base: Summary, model: Summary) -> Comparison | None:
    """None where no problem is common to both."""
    at = {uid: i for i, uid in enumerate(base.uids)}
    pairs = np.array([(at[uid], j) for j, uid in enumerate(model.uids) if uid in at], dtype=np.int64)
    if not pairs.size:
        return None
    first, second = pairs.T

    def common(summary: Summary, name: str, rows: np.ndarray) -> Ratio | None:
        values, sizes = summary.ratios[name]
        return (values[rows], sizes[rows]) if len(values) == len(summary.uids) else None

    differences: dict[str, Score] = {}
    for name in (name for name in model.ratios if name in base.ratios):
        a, b = common(base, name, first), common(model, name, second)
        if a is None or b is None or not a[1].sum() or not b[1].sum():
            continue
        value = float(b[0].sum() / b[1].sum() - a[0].sum() / a[1].sum())
        low, high = percentile_interval(resample(*b) - resample(*a))[0] if len(pairs) > 1 else (math.nan, math.nan)
        means = bool((a[1] == 1).all() and (b[1] == 1).all())
        differences[name] = Score(value, low, high, paired_difference(b[0], a[0]).se if means else math.nan)
    a_right, b_right = base.correct[first], model.correct[second]
    p = math.nan
    if base.samples == model.samples == 1:
        p = mcnemar(int(((a_right > 0) & (b_right == 0)).sum()), int(((a_right == 0) & (b_right > 0)).sum()))
    return Comparison(base.model, model.model, model.task, len(pairs), differences, p, frontier(a_right, b_right))
