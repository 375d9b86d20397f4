"""Curves of one run, or a comparison of several, from the files of their run folders.

    python -m pymathrl.report RUN_DIR                        -> RUN_DIR/curves.png
    python -m pymathrl.report RUN_DIR RUN_DIR [...]          -> comparison.png, comparison.md, and the table on
    standard output

Reads config.toml (`algo`), metrics.jsonl and summary.json.  A comparison groups runs by algorithm, or by the label of
a LABEL=RUN_DIR argument; a group's curve is the mean over its runs (the seeds), with a band from minimum to maximum.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pymathrl.errors import UserError
from pymathrl.files import explain_os_errors, write_atomic
from pymathrl.log import STAGES, show, show_time, to_json

# Okabe and Ito's palette, told apart with the common colour vision deficiencies; groups also differ in line and marker
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
GREY = "#8A8A8A"
_GROUP_STYLES = [
    (colour, line, marker)
    for lines, markers in ((("-", "--", "-.", ":", "-", "--"), "osD^vP"), ((":", "-", "--", "-.", ":", "-"), "X<>*hd"),
                           (("-.", ":", "-", "--", "-.", ":"), "p8H1+x"))
    for colour, line, marker in zip((BLUE, RED, GREEN, PURPLE, ORANGE, SKY), lines, markers, strict=True)
]  # fmt: skip
_STAGE_COLOURS = dict(zip(STAGES, (GREY, BLUE, SKY, YELLOW, RED, GREEN, ORANGE, PURPLE), strict=True))
_SCORES = ("pass@1", "pass@8", "diversity")
_SCORE_TITLES = {
    "pass@1": "pass@1, held-out problems",
    "pass@8": "pass@8, held-out problems",
    "diversity": "distinct correct solutions per solved problem",
}
_SMOOTH_FROM = 30  # steps; a shorter curve is drawn as it is


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    path: Path
    label: str  # algorithm, or the label that was asked for
    seed: int | None
    series: dict[str, tuple[np.ndarray, np.ndarray]]  # metric name -> (steps [n] int64 ascending, values [n] float64)
    summary: dict[str, Any] | None  # None while the run has not ended

    def score(self, when: str, name: str) -> float | None:
        """A number of summary.json; when: "before" or "after"."""
        value = ((self.summary or {}).get(when) or {}).get(name)
        return float(value) if isinstance(value, int | float) else None


def read_run(run_dir: str | Path, label: str | None = None) -> Run:
    """Read a run folder.  UserError, naming folder and file, when something needed is missing or broken; summary.json
    may be missing."""
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"{path} is not a run folder: there is no such folder")
    try:
        config = tomllib.loads(_read_text(path / "config.toml"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path / 'config.toml'}: not valid TOML ({error})") from error
    summary = None
    if (path / "summary.json").exists():
        try:
            summary = json.loads(_read_text(path / "summary.json"))
        except ValueError as error:
            raise UserError(f"{path / 'summary.json'}: not valid JSON ({error})") from error
        if not isinstance(summary, dict):
            raise UserError(f"{path / 'summary.json'}: expected a JSON object, got {type(summary).__name__}")
    series = _read_metrics(path / "metrics.jsonl")
    algo = config.get("algo", config.get("mode", (summary or {}).get("algo")))
    if label is None and not isinstance(algo, str):
        raise UserError(f"{path / 'config.toml'}: expected a string under the key `algo`, got {algo!r}")
    seed = config.get("seed", (summary or {}).get("seed"))
    return Run(path, label or str(algo), seed if isinstance(seed, int) else None, series, summary)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path.parent} is not a complete run folder: {path.name}: {error.strerror or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lines of one step are merged; null (a non-finite number) is a gap.  A partial last line belongs to a run that
    still writes, and is left out."""
    text = _read_text(path)
    points: dict[str, dict[int, float]] = {}
    lines = text.splitlines()
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if i == len(lines) - 1 and not text.endswith("\n"):
                break
            raise UserError(f"{path}, line {i + 1}: expected a JSON object with `step`, got {line[:60]!r}") from error
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                points.setdefault(name, {})[step] = float(value)
    if not points:
        raise UserError(f"{path}: holds no metrics; the run ended before its first step")
    return {
        name: (np.array(sorted(by_step), dtype=np.int64), np.array([by_step[s] for s in sorted(by_step)]))
        for name, by_step in points.items()
    }


# --- one run ----------------------------------------------------------------------------------------------------------


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twelfth of the curve; shorter at both ends."""
    half = max(1, len(values) // 24)
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _curve(ax: Axes, run: Run, name: str, colour: str, label: str | None = None) -> bool:
    if name not in run.series:
        return False
    steps, values = run.series[name]
    if len(values) < _SMOOTH_FROM:
        ax.plot(steps, values, color=colour, lw=1.6, marker="o" if len(values) == 1 else None, label=label)
    else:
        ax.plot(steps, values, color=colour, lw=0.7, alpha=0.35)
        ax.plot(steps, _smooth(values), color=colour, lw=2.0, label=label)
    return True


def _dress(ax: Axes, title: str, unit: str, percent: bool = False) -> None:
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.set_xlabel("training step", fontsize=9)
    ax.set_ylabel(unit, fontsize=9)
    ax.tick_params(labelsize=8.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.grid(True, color="#E4E4E4", lw=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _no_data(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=9)


def _score_panel(ax: Axes, run: Run, name: str) -> None:
    """Evaluation points with the before and after levels; for pass@1 also the accuracy of the rollouts."""
    drawn = name == "pass@1" and _curve(ax, run, "accuracy", SKY, "rollouts (training problems)")
    last = max(int(steps[-1]) for steps, _ in run.series.values())
    if f"eval/{name}" in run.series:
        steps, values = run.series[f"eval/{name}"]
        ax.plot(steps, values, color=BLUE, lw=1.8, marker="o", ms=5, label="evaluation (held-out)", zorder=4)
        drawn = True
    percent = name.startswith("pass@")
    for when, x, colour, marker in (("before", 0, ORANGE, "s"), ("after", last, GREEN, "D")):
        value = run.score(when, name)
        if value is not None:
            ax.axhline(value, color=colour, lw=1.0, ls=":", zorder=2)
            text = f"{when}: {show(name, value)}"
            ax.plot(
                [x], [value], color=colour, marker=marker, ms=8, mec="black", mew=0.6, ls="none", label=text, zorder=5
            )
            drawn = True
    _dress(ax, _SCORE_TITLES[name], "share of problems" if percent else "solutions", percent)
    if drawn:
        ax.margins(y=0.12)
        _legend_below(ax)
    else:
        _no_data(ax)


def _legend_below(ax: Axes) -> None:
    """Outside the axes, so that it hides no data."""
    entries = len(ax.get_legend_handles_labels()[1])
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=2 if entries == 4 else 3,
        fontsize=8,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.5,
    )


def _reward_panel(ax: Axes, run: Run) -> None:
    """The reward; of a supervised run, which has none, the loss; of a distillation, the KL to the teacher."""
    if "teacher_kl" in run.series:
        _curve(ax, run, "teacher_kl", BLUE)
        _dress(ax, "KL to the teacher on the trained tokens", "nats per token")
        return
    if "nll" in run.series:
        _curve(ax, run, "nll", BLUE)
        _dress(ax, "loss on the trained tokens", "nats per token")
        return
    if not _curve(ax, run, "reward", BLUE, "mean over the rollouts"):
        _no_data(ax)
    elif "reward_std" in run.series:
        steps, mean = run.series["reward"]
        std_steps, std = run.series["reward_std"]
        common, i, j = np.intersect1d(steps, std_steps, return_indices=True)
        smooth = _smooth if len(common) >= _SMOOTH_FROM else np.asarray
        m, s = smooth(mean[i]), smooth(std[j])
        ax.fill_between(common, m - s, m + s, color=BLUE, alpha=0.12, lw=0, label="± standard deviation")
        _legend_below(ax)
    _dress(ax, "reward", "reward")


def _time_panel(ax: Axes, run: Run) -> None:
    """Shares of the stages, stacked; evaluation and checkpoints are left out, as they are no part of a step."""
    present = [s for s in STAGES[:6] if f"time/{s}" in run.series]
    steps = np.unique(np.concatenate([run.series[f"time/{s}"][0] for s in present])) if present else np.array([])
    seconds = np.zeros((len(present), len(steps)))
    for row, stage in enumerate(present):
        at, values = run.series[f"time/{stage}"]
        seconds[row, np.searchsorted(steps, at)] = values
    total = seconds.sum(axis=0)
    keep = total > 0
    if keep.any():
        shares = seconds[:, keep] / total[keep]
        if keep.sum() >= _SMOOTH_FROM:
            shares = np.stack([_smooth(row) for row in shares])
        labels = [f"{s} {100 * seconds[i].sum() / total.sum():.0f} %" for i, s in enumerate(present)]
        colours = [_STAGE_COLOURS[s] for s in present]
        x = steps[keep]
        if len(x) == 1:  # an area needs two points
            x, shares = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(shares, 2, axis=1)
        ax.stackplot(x, shares, labels=labels, colors=colours, lw=0)
        ax.set_ylim(0, 1)
        ax.margins(x=0)
        _legend_below(ax)
    else:
        _no_data(ax)
    _dress(
        ax,
        f"time of a step (mean {total[keep].mean():.2f} s)" if keep.any() else "time of a step",
        "share",
        percent=True,
    )


def plot_run(run_dir: str | Path) -> Path:
    """Draw RUN_DIR/curves.png, of a run that has ended or not, and return its path."""
    return draw_run(read_run(run_dir), Path(run_dir))


def draw_run(run: Run, folder: Path) -> Path:
    """folder/curves.png: scores, reward, entropy, length, gradient norm and time shares over the steps."""
    figure = Figure(figsize=(17, 8.2), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.subplots(2, 4)
    for ax, name in zip(axes[0, :3], _SCORES, strict=True):
        _score_panel(ax, run, name)
    _reward_panel(axes[0, 3], run)
    for ax, name, title, unit in (
        (axes[1, 0], "entropy", "entropy of the policy", "nats per token"),
        (axes[1, 1], "completions/mean_length", "length of the responses", "tokens"),
        (axes[1, 2], "grad_norm", "gradient norm, before clipping", "L2 norm"),
    ):
        if not _curve(ax, run, name, BLUE):
            _no_data(ax)
        _dress(ax, title, unit)
    norms = run.series.get("grad_norm")
    if norms is not None and (norms[1] > 0).all() and norms[1].max() > 50 * np.median(norms[1]):
        axes[1, 2].set_yscale("log")  # one spike would flatten the rest
    _time_panel(axes[1, 3], run)
    figure.suptitle(_run_title(run), fontsize=13)
    return _save(figure, folder, "curves.png")


def _run_title(run: Run) -> str:
    parts = [run.label]
    if run.seed is not None:
        parts.append(f"seed {run.seed}")
    if run.summary is None:
        parts.append("not finished")
    elif isinstance(run.summary.get("wall_s"), int | float):
        parts.append(f"wall time {show_time(run.summary['wall_s'])}")
    return "   |   ".join(parts)


def _save(figure: Figure, folder: Path, name: str) -> Path:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return _write(folder / name, buffer.getvalue())


def _write(path: Path, data: bytes) -> Path:
    with explain_os_errors("write the report", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return path


# --- several runs -----------------------------------------------------------------------------------------------------


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """By label, in the order given; runs of a group by seed.  UserError when a run comes twice or has not
    ended."""
    groups: dict[str, list[Run]] = {}
    seen: set[Path] = set()
    for run in runs:
        if run.path.resolve() in seen:
            raise UserError(f"{run.path} is given twice; give each run once")
        seen.add(run.path.resolve())
        if run.summary is None:
            raise UserError(
                f"{run.path} has no summary.json: the run has not ended; resume it, or leave it out of the comparison"
            )
        for when in ("before", "after"):
            if run.score(when, "pass@1") is None:
                raise UserError(f"{run.path / 'summary.json'}: has no number under {when} / pass@1")
        groups.setdefault(run.label, []).append(run)
    return {label: sorted(group, key=lambda r: (r.seed is None, r.seed or 0)) for label, group in groups.items()}


def _group_curve(group: Sequence[Run], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps [n], values [runs, n]) at the evaluation steps that all runs of the group share; None when there are
    none."""
    curves = []
    for run in group:
        steps, values = run.series.get(f"eval/{name}", (np.array([], dtype=np.int64), np.array([])))
        curves.append(dict(zip(steps.tolist(), values.tolist(), strict=True)))
    common = sorted(set.intersection(*(set(c) for c in curves)))
    return (np.array(common), np.array([[c[s] for s in common] for c in curves])) if common else None


def plot_comparison(groups: dict[str, list[Run]], folder: Path) -> Path:
    """comparison.png: one panel per score, one curve per group."""
    if len(groups) > len(_GROUP_STYLES):
        raise UserError(
            f"a comparison shows at most {len(_GROUP_STYLES)} algorithms or labels at once, got {len(groups)}: "
            + ", ".join(groups)
        )
    figure = Figure(figsize=(16, 5.4), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.subplots(1, 3)
    for ax, name in zip(axes, _SCORES, strict=True):
        absent = []
        for (label, group), (colour, line, marker) in zip(groups.items(), _GROUP_STYLES, strict=False):
            curve = _group_curve(group, name)
            if curve is None:
                absent.append(label)
                continue
            steps, values = curve
            ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.16, lw=0)
            runs = f"{len(group)} seeds" if len(group) > 1 else "1 run"
            ax.plot(
                steps,
                values.mean(axis=0),
                color=colour,
                ls=line,
                lw=2,
                marker=marker,
                ms=6,
                mec="white",
                mew=0.6,
                label=f"{label} ({runs})",
            )
        percent = name.startswith("pass@")
        _dress(ax, _SCORE_TITLES[name], "share of problems" if percent else "solutions", percent)
        if absent:
            text = f"no evaluation step shared by all runs of: {', '.join(absent)}"
            ax.text(0.5, 0.03, text, transform=ax.transAxes, ha="center", color=GREY, fontsize=9)
    handles = {h.get_label(): h for ax in axes for h in ax.get_lines() if not str(h.get_label()).startswith("_")}
    if handles:
        figure.legend(
            handles=list(handles.values()), loc="outside lower center", ncols=min(8, len(handles)), fontsize=10,
            frameon=False,
        )
    figure.suptitle("Mean over seeds, band from minimum to maximum", fontsize=12)
    return _save(figure, folder, "comparison.png")


def comparison_table(groups: dict[str, list[Run]]) -> str:
    """Markdown: a row per run (before -> after of each score, wall time) and a mean row per group."""

    def cell(name: str, before: float | None, after: float | None) -> str:
        return f"{show(name, before)} → {show(name, after)}"

    def mean(values: list[float | None]) -> float | None:
        numbers = [v for v in values if v is not None]
        return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None

    lines = [
        "| algorithm | seed | " + " | ".join(_SCORES) + " | wall (s) |",
        "|---|---|" + "---|" * len(_SCORES) + "---:|",
    ]
    for label, group in groups.items():
        walls = [_wall(run) for run in group]
        for run, wall in zip(group, walls, strict=True):
            cells = [cell(name, run.score("before", name), run.score("after", name)) for name in _SCORES]
            seed = "-" if run.seed is None else str(run.seed)
            lines.append(f"| {label} | {seed} | {' | '.join(cells)} | {'-' if wall is None else f'{wall:.0f}'} |")
        if len(group) > 1:
            cells = [
                cell(n, mean([r.score("before", n) for r in group]), mean([r.score("after", n) for r in group]))
                for n in _SCORES
            ]
            wall = mean(walls)
            bold = [
                f"**{c}**" for c in (label, f"mean of {len(group)}", *cells, "-" if wall is None else f"{wall:.0f}")
            ]
            lines.append(f"| {' | '.join(bold)} |")
    return "\n".join(lines) + "\n"


def _wall(run: Run) -> float | None:
    wall = (run.summary or {}).get("wall_s")
    return float(wall) if isinstance(wall, int | float) else None


def _as_record(run: Run) -> dict[str, Any]:
    return {"run": run.path, "label": run.label, "seed": run.seed, **(run.summary or {})}


# --- command ----------------------------------------------------------------------------------------------------------


def _parse_run(argument: str) -> Run:
    """RUN_DIR or LABEL=RUN_DIR; a folder whose own name has a `=` is a folder."""
    label, separator, folder = argument.partition("=")
    if separator and label and not Path(argument).exists():
        return read_run(folder, label)
    return read_run(argument)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pymathrl.report",
        description="Draw the curves of one run, or compare several (mean over seeds, band from minimum to maximum).",
        epilog="Runs are grouped by the algorithm in their config.toml; LABEL=RUN_DIR puts a run into the group LABEL.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[LABEL=]RUN_DIR", help="run folder, as `python -m pymathrl.train` writes it"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the pictures and the table (default: the run folder of a single run, else .)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers of all runs to FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        runs = [_parse_run(argument) for argument in args.runs]
        if len(runs) == 1:
            print(draw_run(runs[0], args.out or runs[0].path))
        else:
            folder = args.out or Path(".")
            groups = group_runs(runs)
            table = comparison_table(groups)
            picture = plot_comparison(groups, folder)
            print(table)
            print(picture)
            print(_write(folder / "comparison.md", table.encode()))
        if args.json is not None:
            print(_write(args.json, (to_json({"runs": [_as_record(run) for run in runs]}, indent=1) + "\n").encode()))
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
