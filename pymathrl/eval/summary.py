"""The numbers of one model on one task, from its samples alone.

A score is a ratio sum(values) / sum(sizes) over problems (a mean where the sizes are 1), so that one bootstrap over
problems gives every interval. Fractions are 0..1, lengths in tokens, entropies in nats. The names are explained in
`table.ROWS`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pymathrl
from pymathrl.eval.budget import Timing, fitting, in_seconds
from pymathrl.eval.record import Sample
from pymathrl.metrics import (
    CHECK_QUESTIONS,
    CHECK_TASKS,
    JUDGING,
    Checked,
    budget_curve,
    check_counts,
    check_matrix,
    cosine_diversity,
    distinct_n,
    effective_number,
    embed,
    entropy,
    g_pass_at_k,
    group_answers,
    length_stats,
    maj_at_k,
    mean_over_problems,
    over_variants,
    pass_at_k,
    percentile_interval,
    position_buckets,
    resample,
    run_to_run_sd,
    sampling_variance,
    self_bleu,
    strategies,
    wilson,
)
from pymathrl.tasks import Problem, Task
from pymathrl.verify import Policy, equal

TAUS = (0.5, 0.75, 1.0)  # of G-pass@k
VARIANT_FIELDS = ("group", "group_id")  # of a row: what the variants of one question share

Rows = Sequence[Sequence[Sample]]  # [P][n]
Flag = Callable[[Sample], bool]
Ratio = tuple[NDArray[np.float64], NDArray[np.float64]]  # values and sizes, each [P] (or [groups of problems])
Point = tuple[float, float, float, float]  # x, value, low, high


@dataclass(frozen=True)
class Score:
    """value with the 95 % interval of a bootstrap over problems; se: standard error over problems, of a mean."""

    value: float
    low: float = math.nan
    high: float = math.nan
    se: float = math.nan


@dataclass(frozen=True)
class Summary:
    """What is known of one model on one task.

    scores   numbers with intervals; plain: without.  Both in the order of the table
    curves   pass@k and maj@k over k; within and stated, two accuracies over token budgets; seconds: maj@n over the
             measured time of n samples
    entropy  (first token, behind the last, mean) over the positions in the responses
    lengths  kind of response -> tokens of each.   outcomes: kind -> share of the responses; these add up to 1
    stages   stage of the verifier -> verdicts.   matrix: of MATHCHECK
    timings  measured batches, see `budget`.   budgets_s: the budgets, in seconds
    ratios   with uids and correct (samples of each problem): what comparisons are made from, problem by problem
    """

    model: str
    task: str
    problems: int
    samples: int
    left_out: int
    verifier: str
    scores: dict[str, Score]
    plain: dict[str, float]
    curves: dict[str, list[Point]]
    entropy: list[tuple[int, int, float]]
    lengths: dict[str, list[int]]
    outcomes: dict[str, float]
    stages: dict[str, int]
    matrix: dict[str, dict[str, float]]
    timings: list[Timing]
    budgets_s: list[float]
    ratios: dict[str, Ratio] = field(repr=False)
    uids: list[int] = field(repr=False)
    correct: NDArray[np.int64] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers under flat names; standard errors as NAME_se. diversity is 0.0 where no problem is solved, as
        in the evaluations of a training run."""
        errors = {f"{name}_se": s.se for name, s in self.scores.items() if not math.isnan(s.se)}
        values = {name: s.value for name, s in self.scores.items()}
        return values | ({} if self.correct.any() else {"diversity": 0.0}) | errors | self.plain

    def record(self) -> dict[str, Any]:
        """Plain data for summary.json."""
        points = {
            name: [dict(zip(("x", "value", "low", "high"), point, strict=True)) for point in curve]
            for name, curve in self.curves.items()
        }
        return {
            "model": self.model, "task": self.task, "problems": self.problems, "samples": self.samples,
            "left_out": self.left_out, "verifier": self.verifier, "metrics": self.metrics,
            "intervals": {name: [s.low, s.high] for name, s in self.scores.items()}, "curves": points,
            "entropy_by_position": [list(part) for part in self.entropy], "outcomes": self.outcomes,
            "stages": self.stages, "mathcheck": self.matrix, **self.time_record(),
        }  # fmt: skip

    def speed(self, timing: Timing) -> dict[str, float]:
        """Of a measured batch: what it took, and responses and tokens a second."""
        responses = self.problems * timing.samples
        return {
            "samples": timing.samples, "seconds": timing.seconds, "tokens": timing.tokens,
            "samples_per_s": responses / timing.seconds, "tokens_per_s": timing.tokens / timing.seconds,
        }  # fmt: skip

    def time_record(self) -> dict[str, Any]:
        """Plain data of --budget-s: of each budget the batch that fits, with its vote; and all batches that were
        measured. all: one of more samples may fit. Nothing without budgets."""
        if not self.budgets_s:
            return {}
        votes = []
        for budget in self.budgets_s:
            fit, score = fitting(self.timings, budget), self.scores[f"maj@{in_seconds(budget)}"]
            speed: dict[str, float] = {"samples": 0} if fit is None else self.speed(fit)
            votes.append({
                "budget_s": budget, **speed, "all": fit is not None and fit.samples == self.samples,
                "accuracy": score.value, "low": score.low, "high": score.high, "pass@1": self.scores["pass@1"].value,
            })  # fmt: skip
        return {"time_budgets": votes, "timings": [self.speed(t) for t in self.timings]}


def summarize(
    model: str, name: str, task: Task, problems: Sequence[Problem], rows: Rows, *,
    ks: Sequence[int], budgets: Sequence[int], ties: str = "expected", left_out: int = 0,
    timings: Sequence[Timing] = (), budgets_s: Sequence[float] = (),
) -> Summary:  # fmt: skip
    """The numbers of the samples rows [P][n] of the problems [P].

    ks: of pass@k and maj@k, at most n. budgets: those of `Sample.within`; the last is the length limit. ties: see
    `maj_at_k`. A response that was cut off is wrong and has no vote. timings: of batches of at most n samples; the vote
    within each of budgets_s is that of the largest batch that fits, a ratio over no problem where none does.
    """
    n = len(rows[0])
    every = [s for row in rows for s in row]
    correct = np.array([sum(s.verdict for s in row) for row in rows])
    groups = [group_samples(task, problem, row) for problem, row in zip(problems, rows, strict=True)]
    curve_ks = sorted({1 << i for i in range(n.bit_length())} | {n, *ks})
    vote_ks = sorted({*curve_ks, *(t.samples for t in timings)})
    ratios = _rates(rows, correct, curve_ks, max(ks)) | _votes(groups, rows, vote_ks, ties) | _variants(problems, rows)
    ratios |= _votes_in_time(ratios, timings, budgets_s)
    ratios |= _costs(rows, correct) | _budgets(rows, budgets) | _answers(rows, groups, correct)
    ratios |= _variety("diversity", rows, lambda s: s.verdict) | _variety("variety", rows, lambda s: True)
    scores = _score(ratios)
    if n == 1:
        scores["pass@1"] = Score(scores["pass@1"].value, *wilson(int(correct.sum()), len(rows)), scores["pass@1"].se)
    checked, matrix = _checklist(problems, rows)
    scores |= checked

    def curve(kind: str, xs: Sequence[int]) -> list[Point]:
        known = [(x, scores[f"{kind}{x}"]) for x in xs if f"{kind}{x}" in scores]
        return [(float(x), s.value, s.low, s.high) for x, s in known]

    curves = {
        "pass@k": curve("pass@", curve_ks),
        "maj@k": curve("pass@", [1]) + curve("maj@", curve_ks) if n > 1 else [],  # pass@1: a vote of one
        "within": curve("within/", budgets), "stated": curve("stated/", budgets),
    }  # fmt: skip
    if timings:
        voted = [(t.seconds, scores[_vote_name(t.samples)]) for t in timings]
        curves["seconds"] = sorted((seconds, s.value, s.low, s.high) for seconds, s in voted)
    asked = {1, *ks}
    for k in vote_ks:
        for kind, kept in (("pass", asked), ("flexible/pass", asked), ("maj", asked | {n})):
            if k not in kept:
                scores.pop(f"{kind}@{k}", None)
    lengths = {
        "all": [s.n_tokens for s in every], "correct": [s.n_tokens for s in every if s.verdict],
        "incorrect": [s.n_tokens for s in every if not s.verdict], "truncated": [s.n_tokens for s in every if s.cut],
    }  # fmt: skip
    return Summary(
        model=model, task=name, problems=len(rows), samples=n, left_out=left_out, verifier=verifier_of(task, problems),
        scores=scores, plain=_plain(rows, correct, lengths, scores, max(ks)), curves=curves,
        entropy=_entropy_by_position(every), lengths=lengths, outcomes=_outcomes(every),
        stages=dict(Counter(s.stage for s in every).most_common()), matrix=matrix, timings=list(timings),
        budgets_s=list(budgets_s),
        ratios={k: v for k, v in ratios.items() if k in scores}, uids=[p.uid for p in problems], correct=correct,
    )  # fmt: skip


def verifier_of(task: Task, problems: Sequence[Problem]) -> str:
    """The version of the verifier and a hash of what it is told for these problems: how to extract, which policy."""
    told = {"task"}
    if hasattr(task, "check"):
        told = {f"{check.mode} {check.cfg!r}" for check in map(task.check, problems)}
    return f"{pymathrl.__version__}+{hashlib.sha256(chr(10).join(sorted(told)).encode()).hexdigest()[:12]}"


def group_samples(task: Task, problem: Problem, row: Sequence[Sample]) -> list[int]:
    """The group of each sample by its answer, -1 without one and where it was cut off: by the equality that grades a
    task which compares answers, after the canonical form; by that alone where the task itself grades."""
    if hasattr(task, "check"):
        cfg: Policy = task.check(problem).cfg
        first: dict[str, str] = {}  # of each canonical form, an answer: a letter and its option are one, and right ones
        said = [
            None if s.cut or s.extracted is None else first.setdefault(s.canonical or s.extracted, s.extracted)
            for s in row
        ]
        return group_answers(said, lambda a, b: bool(equal(a, b, cfg=cfg)))
    return group_answers([None if s.cut else s.canonical for s in row])


def fields_of(problem: Problem) -> dict[str, Any]:
    """What the row of a problem says beside question and answer: its meta, and the fields of its data set there."""
    return {**problem.meta.get("fields", {}), **problem.meta}


# --- ratios over problems ---------------------------------------------------------------------------------------------


def _ones(rows: Rows) -> NDArray[np.float64]:
    return np.ones(len(rows))


def _per_problem(rows: Rows, number: Callable[[Sequence[Sample]], float]) -> NDArray[np.float64]:
    return np.array([number(row) for row in rows], dtype=np.float64)


def _share(rows: Rows, flag: Flag) -> Ratio:
    """Of all samples, those with the flag."""
    return _per_problem(rows, lambda row: sum(map(flag, row))), _per_problem(rows, len)


def _rates(rows: Rows, correct: NDArray[np.int64], ks: Sequence[int], stable_k: int) -> dict[str, Ratio]:
    n, one = len(rows[0]), _ones(rows)
    out = {f"pass@{k}": (pass_at_k(n, correct, k), one) for k in ks}
    if stable_k > 1:
        out |= {f"g-pass@{stable_k}({tau:g})": (g_pass_at_k(n, correct, stable_k, tau), one) for tau in TAUS}
    out["coverage"] = (correct > 0).astype(np.float64), one
    if rows[0][0].flexible is not None:
        loose = np.array([sum(bool(s.flexible) for s in row) for row in rows])
        out |= {f"flexible/pass@{k}": (pass_at_k(n, loose, k), one) for k in ks}
    return out


def _votes(groups: Sequence[Sequence[int]], rows: Rows, ks: Sequence[int], ties: str) -> dict[str, Ratio]:
    """maj@k for k > 1: with k = 1 it is pass@1 (a vote of one)."""
    keys: Mapping[str, Callable[[Sample], float]] = {"logprob": lambda s: s.logp, "shortest": lambda s: s.n_tokens}
    key = keys.get(ties)
    out = {}
    for k in ks:
        if k > 1:
            won = [
                maj_at_k(
                    group, [s.verdict for s in row], k, ties=ties, key=None if key is None else [key(s) for s in row],
                    seed=[k, at],
                )
                for at, (group, row) in enumerate(zip(groups, rows, strict=True))
            ]  # fmt: skip
            out[f"maj@{k}"] = np.array(won), _ones(rows)
    return out


def _vote_name(k: int) -> str:
    return f"maj@{k}" if k > 1 else "pass@1"


def _votes_in_time(
    votes: Mapping[str, Ratio], timings: Sequence[Timing], budgets_s: Sequence[float]
) -> dict[str, Ratio]:
    """The vote of as many samples as fit each budget."""
    none = np.zeros(len(votes["pass@1"][0]))
    fits = {budget: fitting(timings, budget) for budget in budgets_s}
    return {
        f"maj@{in_seconds(budget)}": (none, none) if fit is None else votes[_vote_name(fit.samples)]
        for budget, fit in fits.items()
    }


def _costs(rows: Rows, correct: NDArray[np.int64]) -> dict[str, Ratio]:
    tokens = _per_problem(rows, lambda row: sum(s.n_tokens for s in row))
    return {
        "completions/mean_length": (tokens, _per_problem(rows, len)),
        "completions/clipped_ratio": _share(rows, lambda s: s.cut),
        "cut_but_right": _share(rows, lambda s: s.cut and s.within[-1]),
        "tokens_per_correct": (tokens, correct.astype(np.float64)),
        "repetition": (_per_problem(rows, lambda row: sum(s.repetition * s.n_tokens for s in row)), tokens),
        "entropy": (_per_problem(rows, lambda row: sum(sum(w * e for _, w, e in _positions(s)) for s in row)), tokens),
    }


def _positions(sample: Sample) -> list[tuple[tuple[int, int], int, float]]:
    """Of each stretch of positions: where it lies, its tokens, their mean entropy."""
    parts = position_buckets(sample.n_tokens)
    return [((a, b), b - a, mean) for (a, b), mean in zip(parts, sample.entropy, strict=True)]


def _entropy_by_position(samples: Sequence[Sample]) -> list[tuple[int, int, float]]:
    totals: dict[int, list[float]] = {}
    for sample in samples:
        for (first, behind), width, mean in _positions(sample):
            entry = totals.setdefault(first, [0.0, 0.0, 0.0])
            entry[0], entry[1], entry[2] = max(entry[0], behind), entry[1] + width, entry[2] + width * mean
    return [(first, int(behind), total / width) for first, (behind, width, total) in sorted(totals.items())]


def _budgets(rows: Rows, budgets: Sequence[int]) -> dict[str, Ratio]:
    """Accuracy at a limit of so many tokens, and of the text so far: the last is that at the end, cut off or not."""
    out: dict[str, Ratio] = {}
    for i, budget in enumerate(budgets):
        ended = [budget_curve([s.n_tokens for s in r], [s.verdict for s in r], [budget])[0] for r in rows]
        out[f"within/{budget}"] = np.array(ended), _ones(rows)
        out[f"stated/{budget}"] = _share(rows, lambda s, i=i: s.within[i])  # type: ignore[misc]
    return out


def _answers(rows: Rows, groups: Sequence[Sequence[int]], correct: NDArray[np.int64]) -> dict[str, Ratio]:
    solved, answered = (correct > 0).astype(np.float64), np.array([float(max(g) >= 0) for g in groups])
    forms = _per_problem(rows, lambda row: len({s.canonical for s in row if s.verdict}))
    spread = [entropy(list(Counter(g for g in group if g >= 0).values())) for group in groups]
    return {
        "no_answer": _share(rows, lambda s: s.extracted is None),
        "format_ok": _share(rows, lambda s: s.canonical is not None),
        "reward": (_per_problem(rows, lambda row: sum(s.reward for s in row)), _per_problem(rows, len)),
        "diversity": (forms, solved),
        "answers/distinct": (np.array([float(max(group) + 1) for group in groups]), answered),
        "answers/entropy": (np.array(spread), answered),
    }


def _variety(prefix: str, rows: Rows, keep: Flag) -> dict[str, Ratio]:
    """How different the kept responses to one problem are, over the problems with two or more of them."""
    texts = [[s.response for s in row if keep(s)] for row in rows]
    enough = np.array([float(len(t) >= 2) for t in texts])
    out = {name: np.zeros(len(rows)) for name in ("cosine", "strategies", "effective", "distinct_2", "unlike_bleu")}
    for at in np.flatnonzero(enough):
        different = {text: i for i, text in enumerate(dict.fromkeys(texts[at]))}
        vectors = embed(list(different))[[different[text] for text in texts[at]]]
        clusters = strategies(vectors)
        distinct = distinct_n(texts[at], 2)
        numbers = (
            cosine_diversity(vectors), max(clusters) + 1, effective_number(clusters),
            0.0 if math.isnan(distinct) else distinct, 1 - self_bleu(texts[at]),
        )  # fmt: skip
        for name, number in zip(out, numbers, strict=True):
            out[name][at] = number
    ratios = {f"{prefix}/{name}": (values, enough) for name, values in out.items()}
    return ratios | {f"{prefix}/problems": (enough, _ones(rows))}


def _variants(problems: Sequence[Problem], rows: Rows) -> dict[str, Ratio]:
    """Over groups of problems that are variants of one question, the first of which is the original: see
    `VARIANT_FIELDS`. Of a MATHCHECK set the solving task."""
    found: dict[Any, list[Sequence[Sample]]] = {}
    for problem, row in zip(problems, rows, strict=True):
        fields = fields_of(problem)
        key = next((fields[f] for f in VARIANT_FIELDS if f in fields), None)
        if key is not None and fields.get("task_type", "solving") == "solving":
            found.setdefault(key, []).append(row)
    right = [np.array([[s.verdict for s in row] for row in some], dtype=np.float64) for some in found.values()]
    right = [group for group in right if len(group) > 1]
    if not right:
        return {}
    by_group = [over_variants([group]) for group in right]
    average, worst = np.array([v.average for v in by_group]), np.array([v.worst for v in by_group])
    original = np.array([group[0].mean() for group in right])
    drop = original - np.array([group[1:].mean() for group in right])
    one = np.ones(len(right))
    return {
        "variants/average": (average, one), "variants/worst": (worst, one), "variants/robustness": (worst, average),
        "variants/original": (original, one), "variants/drop": (drop, one), "variants/relative_drop": (drop, original),
    }  # fmt: skip


def _score(ratios: Mapping[str, Ratio]) -> dict[str, Score]:
    """Each ratio with its interval; one bootstrap for all that are over the same number of problems."""
    scores: dict[str, Score] = {}
    for count in {len(values) for values, _ in ratios.values()}:
        names = [name for name, (values, _) in ratios.items() if len(values) == count]
        values, sizes = (np.stack([ratios[name][i] for name in names], axis=1) for i in (0, 1))
        intervals = percentile_interval(resample(values, sizes)) if count > 1 else [(math.nan, math.nan)] * len(names)
        for at, name in enumerate(names):
            total = sizes[:, at].sum()
            value = float(values[:, at].sum() / total) if total else math.nan
            se = mean_over_problems(values[:, at]).se if (sizes[:, at] == 1).all() else math.nan
            scores[name] = Score(value, *intervals[at], se)
    return {name: scores[name] for name in ratios}


# --- the rest ---------------------------------------------------------------------------------------------------------


def _checklist(problems: Sequence[Problem], rows: Rows) -> tuple[dict[str, Score], dict[str, dict[str, float]]]:
    """The MATHCHECK matrix, with intervals by resampling its groups; nothing for other tasks."""
    items: list[Checked] = []
    for problem, row in zip(problems, rows, strict=True):
        fields = fields_of(problem)
        kind, question = fields.get("task_type"), fields.get("question_type")
        if kind not in CHECK_TASKS or question not in CHECK_QUESTIONS:
            return {}, {}
        if kind in JUDGING and problem.answer not in JUDGING[kind]:
            return {}, {}
        label = JUDGING[kind].index(problem.answer) if kind in JUDGING else None
        group = str(fields.get("group_id", problem.uid))
        for s in row:
            read = None if label is None or s.extracted is None or s.cut else label if s.verdict else 1 - label
            items.append(Checked(group, kind, question, s.verdict, label, read))
    counts = check_counts(items)
    matrix = check_matrix(counts.sum(axis=0))
    drawn = check_matrix(resample(counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:]))
    parts = {"score": (matrix.mean(), drawn.mean(axis=(1, 2)))}
    parts |= {task: (matrix[i].mean(), drawn[:, i].mean(axis=1)) for i, task in enumerate(CHECK_TASKS)}
    parts |= {kind: (matrix[:, i].mean(), drawn[:, :, i].mean(axis=1)) for i, kind in enumerate(CHECK_QUESTIONS)}
    scores = {
        f"mathcheck/{name}": Score(float(value), *percentile_interval(draws[:, None])[0])
        for name, (value, draws) in parts.items()
    }
    cells = {
        task: {kind: float(matrix[i, j]) for j, kind in enumerate(CHECK_QUESTIONS)}
        for i, task in enumerate(CHECK_TASKS)
    }
    return scores, cells


def _plain(
    rows: Rows, correct: NDArray[np.int64], lengths: Mapping[str, list[int]], scores: Mapping[str, Score], most: int
) -> dict[str, float]:
    n = len(rows[0])
    out = {f"avg@{n}": scores["pass@1"].value}
    if n > 1:
        out["sampling_sd"] = math.sqrt(sampling_variance(correct, [n] * len(rows)))
        out["run_to_run_sd"] = run_to_run_sd([[s.verdict for s in row] for row in rows])
    if most > 1:
        out[f"pass@{most}-pass@1"] = scores[f"pass@{most}"].value - scores["pass@1"].value
    for kind, some in lengths.items():
        stats = length_stats(some)
        where = "completions" if kind == "all" else f"completions/{kind}"
        out |= {f"{where}/median_length": stats.median, f"{where}/p95_length": stats.p95}
        if kind != "all":
            out[f"{where}/mean_length"] = stats.mean
    p50, p99 = np.percentile([s.latency_s for row in rows for s in row], [50, 99]) * 1e3
    return out | {"verifier/p50_ms": float(p50), "verifier/p99_ms": float(p99)}


def _outcomes(samples: Sequence[Sample]) -> dict[str, float]:
    kinds = Counter(
        "correct" if s.verdict else "cut off" if s.cut else "no answer" if s.extracted is None else "wrong answer"
        for s in samples
    )
    return {kind: kinds[kind] / len(samples) for kind in ("correct", "wrong answer", "no answer", "cut off")}
