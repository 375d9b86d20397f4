"""The numbers as a picture: a row of panels per task, a colour per model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from pymathrl.eval.summary import Point, Summary
from pymathrl.eval.table import short_names
from pymathrl.report import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, YELLOW

COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "osD^vP"
OUTCOME_COLOURS = {"correct": GREEN, "wrong answer": ORANGE, "no answer": YELLOW, "cut off": GREY}
KINDS = ("correct", "incorrect", "truncated")
TASK_WIDTH = 20  # characters of a task's name in a title
ROW_WIDTH = 16  # of a line of a model's name beside a panel
LEGEND_WIDTH = 60


def draw(summaries: Sequence[Summary]) -> bytes:
    """A PNG."""
    models = short_names([*dict.fromkeys(s.model for s in summaries)])
    tasks = short_names([*dict.fromkeys(s.task for s in summaries)])
    height = 2.6 + 0.35 * len(models)
    timed = bool(summaries[0].budgets_s)
    figure = Figure(
        figsize=(21 if timed else 17, 0.9 + max(3.4, height) * len(tasks)), dpi=110,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12),
    )  # fmt: skip
    axes = figure.subplots(len(tasks), 5 if timed else 4, squeeze=False)
    for row, (task, task_name) in zip(axes, tasks.items(), strict=True):
        some = [s for s in summaries if s.task == task]
        styles = [(COLOURS[i % 6], MARKERS[i % 6]) for i, m in enumerate(models) if m in {s.model for s in some}]
        title = f"{_shorten(task_name, TASK_WIDTH)}: {some[0].problems} x {some[0].samples}"
        _curves(row[0], some, styles, ("pass@k", "maj@k"), "samples k", title)
        _curves(row[1], some, styles, ("within", "stated"), "token budget", "correct within a token budget")
        _lengths(row[2], some, [models[s.model] for s in some])
        _outcomes(row[3], some, [models[s.model] for s in some])
        if timed:
            about = ("seconds of generation, all problems", "majority vote under a time budget")
            _curves(row[4], some, styles, ("seconds",), *about, ticks=some[0].budgets_s)
    handles = [
        Line2D([], [], color=COLOURS[i % 6], marker=MARKERS[i % 6], lw=1.8, label=_shorten(name, LEGEND_WIDTH))
        for i, name in enumerate(models.values())
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=10, frameon=False)
    figure.suptitle("Bands and bars: 95 % intervals, bootstrap over problems", fontsize=11)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _shorten(name: str, width: int) -> str:
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _dress(ax: Axes, title: str, x: str) -> None:
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.tick_params(labelsize=8.5)
    ax.grid(True, color="#E4E4E4", lw=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _curves(
    ax: Axes, summaries: Sequence[Summary], styles: Sequence[tuple[str, str]], names: Sequence[str], x: str,
    title: str, ticks: Sequence[float] = (),
) -> None:  # fmt: skip
    """The first curve solid with a band, the second dashed. ticks: of x; none: where the points are."""
    labels = {"pass@k": "pass@k", "maj@k": "maj@k", "within": "ended", "stated": "answer stated", "seconds": "maj@n"}
    lines = dict(zip(names, ("-", "--"), strict=False))
    xs: set[float] = set()
    for place, (summary, (colour, marker)) in enumerate(zip(summaries, styles, strict=True)):
        for name, line in lines.items():
            points: list[Point] = summary.curves[name]
            if not points:
                continue
            at, values, low, high = (list(column) for column in zip(*points, strict=True))
            xs |= set(at)
            if len(at) == 1:  # side by side, or the intervals of all models would lie on one line
                at = [at[0] * 2 ** (0.15 * (place - (len(summaries) - 1) / 2))]
            filled = colour if line == "-" else "white"
            ax.plot(at, values, line, color=colour, marker=marker, ms=5, lw=1.6, mfc=filled)
            if len(at) == 1:
                ax.vlines(at, low, high, color=colour, lw=1.6)
            elif line == "-":
                ax.fill_between(at, low, high, color=colour, alpha=0.13, lw=0)
    ax.set_xscale("log", base=2)
    if len(xs) == 1:
        ax.set_xlim(min(xs) / 2, max(xs) * 2)
    ticks = ticks or sorted(xs)
    ax.set_xticks(ticks[:: -(-len(ticks) // 8)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ax.set_ylim(bottom=0)
    _dress(ax, title, x)
    handles = [Line2D([], [], color="black", ls=line, lw=1.4, label=labels[name]) for name, line in lines.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8.5, frameon=False)


def _lengths(ax: Axes, summaries: Sequence[Summary], names: Sequence[str]) -> None:
    """Quartile boxes with whiskers at 5 and 95 %, of correct, incorrect and truncated responses."""
    colours = {"correct": GREEN, "incorrect": ORANGE, "truncated": GREY}
    for i, summary in enumerate(summaries):
        for j, kind in enumerate(KINDS):
            if summary.lengths[kind]:
                ax.boxplot(
                    summary.lengths[kind], positions=[i + 0.25 * (j - 1)], widths=0.18, orientation="horizontal",
                    whis=(5, 95), showfliers=False, patch_artist=True, manage_ticks=False,
                    boxprops={"facecolor": colours[kind], "alpha": 0.75, "lw": 0.8},
                    medianprops={"color": "black", "lw": 1.4},
                )  # fmt: skip
    _name_rows(ax, names)
    ax.set_xlim(left=0)
    _dress(ax, "response length", "tokens (box: quartiles, whiskers: 5 and 95 %)")
    _patches(ax, colours)


def _outcomes(ax: Axes, summaries: Sequence[Summary], names: Sequence[str]) -> None:
    """Shares of the responses, side by side, which add up to 1."""
    for i, summary in enumerate(summaries):
        left = 0.0
        for kind, share in summary.outcomes.items():
            ax.barh(i, share, left=left, height=0.55, color=OUTCOME_COLOURS[kind])
            if share >= 0.1:
                ax.text(left + share / 2, i, f"{100 * share:.0f} %", ha="center", va="center", fontsize=8.5)
            left += share
    _name_rows(ax, names)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _dress(ax, "what became of the responses", "share of responses")
    _patches(ax, OUTCOME_COLOURS)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), [fill(name, ROW_WIDTH) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)


def _patches(ax: Axes, colours: dict[str, str]) -> None:
    handles = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=8.5, frameon=False,
        columnspacing=1.0, handlelength=1.2,
    )  # fmt: skip
