"""The numbers as tables: on a terminal the main rows, in Markdown all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymathrl.eval.budget import in_seconds
from pymathrl.eval.compare import Comparison
from pymathrl.eval.summary import Score, Summary


@dataclass(frozen=True)
class Row:
    """name: a pattern for the names of numbers. label: {} is what the pattern's group matched. unit: % of a share, else
    what stands behind a number. main: on the terminal too."""

    name: str
    label: str
    unit: str = "%"
    main: bool = False


ROWS = (
    Row(r"pass@(\d+)", "pass@{}", main=True),
    Row(r"flexible/pass@(\d+)", "pass@{}, flexible", main=True),
    Row(r"maj@(\d+)", "maj@{}", main=True),
    Row(r"maj@(.+)s", "maj within {} s"),
    Row(r"g-pass@(.+)", "G-pass@{}"),
    Row(r"pass@(\d+)-pass@1", "pass@{} - pass@1"),
    Row("sampling_sd", "sd of pass@1 over samples"),
    Row("run_to_run_sd", "sd of one sample per problem, run to run"),
    Row("coverage", "solved at least once", main=True),
    Row("variants/average", "variants: average", main=True),
    Row("variants/worst", "variants: worst case", main=True),
    Row("variants/robustness", "variants: worst / average", "", main=True),
    Row("variants/original", "variants: the original", main=True),
    Row("variants/drop", "variants: drop from the original", main=True),
    Row("variants/relative_drop", "variants: relative drop", main=True),
    Row(r"mathcheck/(.+)", "MATHCHECK {}", main=True),
    Row("completions/clipped_ratio", "cut off, counted as wrong", main=True),
    Row("cut_but_right", "of all: cut off, and right so far"),
    Row("no_answer", "no answer found", main=True),
    Row("format_ok", "well-formed answer"),
    Row("reward", "reward", ""),
    Row("diversity", "distinct correct solutions per solved problem", "", main=True),
    Row("diversity/problems", "problems with two correct responses or more"),
    Row("diversity/cosine", "of correct responses: cosine distance", ""),
    Row("diversity/strategies", "of correct responses: strategies", ""),
    Row("diversity/effective", "of correct responses: effective strategies", ""),
    Row("diversity/distinct_2", "of correct responses: distinct 2-grams"),
    Row("diversity/unlike_bleu", "of correct responses: 1 - self-BLEU", ""),
    Row("variety/cosine", "of all responses: cosine distance", ""),
    Row("variety/strategies", "of all responses: strategies", ""),
    Row("variety/effective", "of all responses: effective strategies", ""),
    Row("variety/distinct_2", "of all responses: distinct 2-grams"),
    Row("variety/unlike_bleu", "of all responses: 1 - self-BLEU", ""),
    Row("answers/distinct", "distinct answers", ""),
    Row("answers/entropy", "entropy of the answers", "nats"),
    Row("entropy", "entropy per token", "nats", main=True),
    Row("completions/mean_length", "length, mean", "tokens", main=True),
    Row("completions/median_length", "length, median", "tokens"),
    Row("completions/p95_length", "length, 95th percentile", "tokens"),
    *(
        Row(f"completions/{kind}/{statistic}_length", f"length of {kind} ones, {label}", "tokens")
        for kind in ("correct", "incorrect", "truncated")
        for statistic, label in (("mean", "mean"), ("median", "median"), ("p95", "95th percentile"))
    ),
    Row("tokens_per_correct", "tokens per correct response", "", main=True),
    Row("repetition", "repeated tokens"),
    Row(r"within/(\d+)", "correct and ended within {} tokens"),
    Row(r"stated/(\d+)", "correct answer stated within {} tokens"),
    Row("verifier/p50_ms", "time of a verdict, median", "ms"),
    Row("verifier/p99_ms", "time of a verdict, 99th percentile", "ms"),
)

NOTES = """\
Intervals: 95 %, bootstrap over problems (10,000 draws, seed 0); of pass@1 with one sample per problem Wilson's. They
say how the mean moves with other problems; the sd over samples, how it moves with other draws on these. Draws without a
problem to divide by are left out, so what is over solved problems or correct responses has too narrow an interval where
these are few. A response that was cut off counts as wrong and has no vote. Flexible: where no answer is found, the last
number of the response counts. maj@k: votes among k samples, {ties}. Distances between responses are those of hashed
n-grams (4096 dimensions): compare them with each other only. Entropy is of the distribution that was drawn from,
temperature and filters included."""

BUDGET_NOTE = """\
Of each budget the most samples per problem that were generated within so many seconds, all problems together, from the
first prompt to the last response; grading is not in it. Each number of samples is a batch of its own, measured once,
after an untimed one that fills the rows; nothing is extrapolated. (all): all samples of the evaluation fit, more may.
0 (1: T): not even one per problem fits, which takes T. The interval is over problems; the times have none."""

PAIRED = r"(flexible/)?pass@|maj@|completions/mean_length"  # what of the comparisons is shown on the terminal

TIES_NOTE = {
    "expected": "ties shared equally",
    "first": "of a tie the answer that came first",
    "logprob": "of a tie the answer with the likeliest response",
    "shortest": "of a tie the answer with the shortest response",
}


def _shown(names: Iterable[str], main: bool) -> list[tuple[str, Row, str]]:
    """(name, row, label) of the numbers that have a row, in the order of `ROWS`, numbers in names rising. Others are in
    summary.json only (avg@n, which is pass@1)."""
    names = sorted(dict.fromkeys(names), key=lambda name: [float(x) for x in re.findall(r"\d+(?:\.\d+)?", name)])
    out = []
    for row in ROWS:
        for name in names:
            found = re.fullmatch(row.name, name) if row.main or not main else None
            if found:
                out.append((name, row, row.label.format(*(group.replace("_", " ") for group in found.groups()))))
    return out


def show_number(value: float, unit: str, sign: str = "") -> str:
    """25.2 %, 1.005, 312.4 tokens; - for nan."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf"
    if unit == "%":
        return f"{100 * value:{sign}.1f} %"
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign},.1f}"


def show_score(score: Score | float, unit: str, sign: str = "") -> str:
    """A number with its interval, if it has one."""
    if not isinstance(score, Score):
        return show_number(score, unit, sign)
    text = show_number(score.value, unit, sign)
    if math.isnan(score.low) or math.isnan(score.value):
        return text
    low, high = (show_number(x, unit, sign).removesuffix(" %") for x in (score.low, score.high))
    return f"{text} [{low}, {high}]"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name by as few of its last path components as tell it from the others."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    for depth in range(1, max(map(len, parts.values())) + 1):
        short = {name: "/".join(p[-depth:]) for name, p in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}


def score_rows(summaries: Sequence[Summary], main: bool) -> list[list[str]]:
    """A row per task and number: task, label, and a cell per model; the first row is the head."""
    models, tasks = ([*dict.fromkeys(values)] for values in zip(*((s.model, s.task) for s in summaries), strict=True))
    by_pair = {(s.task, s.model): s for s in summaries}
    names = short_names(models)
    rows = [["task", "", *(names[m] for m in models)]]
    for task, task_name in short_names(tasks).items():
        numbers: list[Mapping[str, Any]] = [
            {**by_pair[task, m].plain, **by_pair[task, m].scores} if (task, m) in by_pair else {} for m in models
        ]
        some = next(s for s in summaries if s.task == task)
        first = f"{task_name}, {some.problems} x {some.samples}"
        for name, row, label in _shown((name for number in numbers for name in number), main):
            unit = f" ({row.unit})" if row.unit not in ("", "%") else ""
            cells = [show_score(number[name], row.unit) if name in number else "-" for number in numbers]
            rows.append([first, label + unit, *cells])
            first = ""
    return rows


def comparison_rows(comparisons: Sequence[Comparison], names: Mapping[str, str], main: bool) -> list[list[str]]:
    """A row per comparison and number; the first row is the head."""
    rows = [["task", "model - base", "", "difference", "se"]]
    tasks = short_names([c.task for c in comparisons])
    for c in comparisons:
        first = [tasks[c.task], f"{names[c.model]} - {names[c.base]}"]
        for name, row, label in _shown((n for n in c.differences if not main or re.match(PAIRED, n)), False):
            score = c.differences[name]
            rows.append([*first, label, show_score(score, row.unit, "+"), show_number(score.se, row.unit)])
            first = ["", ""]
        if not math.isnan(c.mcnemar):
            rows.append([*first, "McNemar's exact p", f"{c.mcnemar:.4f}", "-"])
            first = ["", ""]
        for label, value in c.frontier._asdict().items():
            if not main or label in ("expansion", "shrinkage"):
                rows.append([*first, label.replace("_", " "), show_number(value, "%"), "-"])
                first = ["", ""]
    return rows


def budget_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """A row per task, time budget and model; the first row is the head."""
    names, tasks = _short_pairs(summaries)
    rows = [["task", "model", "budget", "samples", "measured", "samples/s", "tokens/s", "majority vote", "pass@1"]]
    for task in tasks:
        some = [s for s in summaries if s.task == task]
        votes = [s.time_record()["time_budgets"] for s in some]
        for at, budget in enumerate(some[0].budgets_s):
            for s, vote in zip(some, (v[at] for v in votes), strict=True):
                count = f"{vote['samples']} (all)" if vote["all"] else str(vote["samples"])
                if not vote["samples"]:
                    count = f"0 (1: {s.timings[0].seconds:,.2f} s)"
                rows.append([
                    tasks[task], names[s.model], in_seconds(budget), count, *_speed_cells(vote),
                    show_score(Score(vote["accuracy"], vote["low"], vote["high"]), "%"),
                    show_number(vote["pass@1"], "%"),
                ])  # fmt: skip
    return rows


def timing_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """A row per measured batch; the first row is the head."""
    names, tasks = _short_pairs(summaries)
    rows = [["task", "model", "samples", "measured", "samples/s", "tokens/s"]]
    for s in summaries:
        rows += [[tasks[s.task], names[s.model], str(t.samples), *_speed_cells(s.speed(t))] for t in s.timings]
    return rows


def _short_pairs(summaries: Sequence[Summary]) -> tuple[dict[str, str], dict[str, str]]:
    """The short names of the models and of the tasks."""
    return (
        short_names([*dict.fromkeys(s.model for s in summaries)]),
        short_names([*dict.fromkeys(s.task for s in summaries)]),
    )


def _speed_cells(speed: Mapping[str, float]) -> list[str]:
    if "seconds" not in speed:
        return ["-", "-", "-"]
    return [f"{speed['seconds']:,.2f} s", f"{speed['samples_per_s']:,.1f}", f"{speed['tokens_per_s']:,.0f}"]


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns lined up by blanks."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; a bar in a name is written so that it is no column."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def markdown(
    summaries: Sequence[Summary], comparisons: Sequence[Comparison], settings: Iterable[str], ties: str
) -> str:
    """The whole report."""
    names = short_names([*dict.fromkeys(s.model for s in summaries)])
    parts = ["# Evaluation", "\n".join(f"- {line}" for line in settings), markdown_table(score_rows(summaries, False))]
    for s in summaries:
        if s.matrix:
            head = ["", *next(iter(s.matrix.values()))]
            rows = [[task, *(show_number(x, "%") for x in cells.values())] for task, cells in s.matrix.items()]
            parts += [f"## MATHCHECK, {names[s.model]}", markdown_table([head, *rows])]
    if summaries[0].budgets_s:
        tables = map(markdown_table, (budget_rows(summaries), timing_rows(summaries)))
        parts += ["## Votes under a time budget", BUDGET_NOTE, *tables]
    if comparisons:
        parts += ["## In pairs", markdown_table(comparison_rows(comparisons, names, False))]
    return "\n\n".join([*parts, NOTES.format(ties=TIES_NOTE[ties])]) + "\n"
