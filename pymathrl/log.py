"""The numbers of a run: files that programs read, and progress that a person reads.

    RUN/metrics.jsonl    one object per step: "step" and the metrics below; nan and infinity are null and are listed
                         in "nonfinite"
    RUN/samples.jsonl    {"step", "problem", "text", "reward", ...}, for reading
    RUN/summary.json     before and after, written once at the end
    RUN/tensorboard/     the same numbers as metrics.jsonl

Metric names: reward, reward_std, frac_reward_zero_std, accuracy (pass@1 of the rollouts), completions/mean_length
(tokens), completions/clipped_ratio, entropy (nats), clip_ratio/*, kl, grad_norm, learning_rate, ratio/max,
logp_gap/*, time/<stage> (seconds), tokens_per_second, eval/pass@1, eval/pass@8, eval/diversity; of a supervised run nll
(nats per trained token).  Fractions are 0..1, and percent only where they are shown.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pymathrl.errors import UserError
from pymathrl.files import explain_os_errors, write_atomic

STAGES = ("prompt", "rollout", "verify", "advantage", "loss", "optim", "eval", "checkpoint")
HEADLINES = (("KL", "teacher_kl"), ("loss", "nll"), ("reward", "reward"))  # label and metric of what a run is about
_ETA_STEPS = 20  # the remaining time follows the speed of so many last steps
_SPARK_WIDTH = 24
_FRACTIONS = ("pass@", "accuracy", "coverage", "completions/clipped_ratio")  # shown in percent


class StageTimer:
    """Seconds per stage, summed over repeated entries:  `with timer("rollout"): ...`;  `timer.pop()` ->
    {"time/rollout": s}.

    Stages do not nest: time belongs to one stage, so that shares add up to 1.   on_enter: told the name of each
    stage.   on_exit: called when a stage is done, within its time: waits for what it queued on a GPU.
    """

    def __init__(
        self, on_enter: Callable[[str], None] | None = None, on_exit: Callable[[], None] | None = None
    ) -> None:
        self._seconds: dict[str, float] = {}
        self._on_enter = on_enter
        self._on_exit = on_exit
        self._current: str | None = None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if stage not in STAGES:
            raise ValueError(f"StageTimer: stage must be one of {', '.join(STAGES)}, got {stage!r}")
        if self._current is not None:
            raise RuntimeError(f"StageTimer: {stage!r} starts inside {self._current!r}; stages do not nest")
        self._current = stage
        if self._on_enter is not None:
            self._on_enter(stage)
        start = time.perf_counter()
        try:
            yield
            if self._on_exit is not None:
                self._on_exit()
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start
            self._current = None

    def pop(self) -> dict[str, float]:
        """{"time/<stage>": seconds} since the last pop, in the order of STAGES."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{stage}": seconds[stage] for stage in STAGES if stage in seconds}


# --- values -----------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Python values only: tensors and numpy numbers of one element become numbers."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any, name: str, nonfinite: list[str]) -> Any:
    """The value with nan and infinity replaced by None; their dotted names are appended to `nonfinite`."""
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    if isinstance(value, dict):
        return {k: _finite(v, f"{name}.{k}" if name else k, nonfinite) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v, f"{name}[{i}]", nonfinite) for i, v in enumerate(value)]
    return value


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """Valid JSON on any input numbers: nan and infinity become null and their names go to a list "nonfinite"."""
    nonfinite: list[str] = []
    clean = _finite(_plain(record), "", nonfinite)
    if nonfinite:
        clean["nonfinite"] = nonfinite
    return json.dumps(clean, ensure_ascii=False, allow_nan=False, indent=indent)


def show(name: str, value: float | None) -> str:
    """A number as a person reads it: percent for fractions that are rates, else a few digits."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if name.removeprefix("eval/").startswith(_FRACTIONS):
        return f"{100 * value:.1f} %"
    if name == "learning_rate":
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def show_time(seconds: float) -> str:
    """1:05 or 2:03:09."""
    total = max(0, round(seconds))
    hours, minutes = divmod(total // 60, 60)
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"


def sparkline(values: Iterable[float], ascii_only: bool = False) -> str:
    """One character per finite value, low to high."""
    finite = [v for v in values if math.isfinite(v)]
    marks = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(marks[min(len(marks) - 1, int((v - low) / span * len(marks)))] if span else marks[0] for v in finite)


def _headline(values: Mapping[str, Any]) -> tuple[str, str]:
    """What the run is about: the first that it reports."""
    return next((pair for pair in HEADLINES if pair[1] in values), HEADLINES[-1])


def _stage_shares(metrics: Mapping[str, Any], above: float = 0.005) -> list[tuple[str, float]]:
    seconds = {s: float(metrics[f"time/{s}"]) for s in STAGES if f"time/{s}" in metrics}
    total = sum(seconds.values())
    return [(s, t / total) for s, t in seconds.items() if t / total >= above] if total > 0 else []


# --- the log of one run ---------------------------------------------------------------------------------------------


class RunLog:
    """Writes the files of a run and shows its progress: a live display on a terminal, plain lines in a pipe.

    total_steps: steps of the whole run.   start_step: steps done before (a resume; call truncate_metrics first).
    live: None = live display exactly when standard output is a terminal.   title: shown on the display.
    Use it as a context manager: the display is taken down, and the terminal restored, on any exception and on Ctrl-C.
    Raises UserError, naming the path and the system's words, when a file cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        *,
        live: bool | None = None,
        start_step: int = 0,
        title: str | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._total, self._done, self._start_step = total_steps, start_step, start_step
        self._title = title or self.run_dir.name
        self._stream: TextIO | None = stream if stream is not None else sys.stdout
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="replace")  # an ASCII terminal shows ? for ±, instead of ending the run
        self._last: dict[str, Any] = {}
        self._last_eval: dict[str, Any] = {}
        self._held_evals: dict[int, dict[str, Any]] = {}
        self._curve: deque[float] = deque(maxlen=_SPARK_WIDTH)
        self._stamps: deque[float] = deque([time.monotonic()], maxlen=_ETA_STEPS + 1)
        self._stage = ""
        self._closed = False
        with explain_os_errors("write the run folder", self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with ExitStack() as opened:
                self._metrics_file = opened.enter_context(open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8"))
                self._samples_file = opened.enter_context(open(self.run_dir / "samples.jsonl", "a", encoding="utf-8"))
                self._tensorboard = _open_tensorboard(self.run_dir / "tensorboard", start_step)
                opened.callback(self._tensorboard.close)
                self._files = opened.pop_all()  # from here on, close() closes them
        console = Console(file=self._stream, force_terminal=live)
        self._live: Live | None = None
        if (console.is_terminal and not console.is_dumb_terminal) if live is None else live:
            self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render)
            self._live.start()

    # --- what the trainer reports ---

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The metrics of training step `step` (1 = after the first update).  One line in metrics.jsonl, with the
        operating system when this returns: a kill cannot lose it, a power cut can."""
        values = {**_plain(metrics), **self._held_evals.pop(step, {})}
        self._write_metrics(step, values)
        self._done, self._last = step, values
        value = values.get(_headline(values)[1])
        if isinstance(value, int | float):
            self._curve.append(float(value))
        self._stamps.append(time.monotonic())
        if self._live is None:
            self._print(self._step_line(step, values))
        else:
            self._live.refresh()

    def eval(self, step: int, name: str, metrics: Mapping[str, Any]) -> None:
        """The numbers of an evaluation after `step` updates (0 = before training), logged as `<name>/<key>`.

        They join the line of their step when that comes later, so that metrics.jsonl keeps one object per step; for
        step 0, or after the line of the step was written, they are a line of their own.
        """
        values = {f"{name}/{key}": value for key, value in _plain(metrics).items()}
        if step > self._done:
            self._held_evals.setdefault(step, {}).update(values)
        else:
            self._write_metrics(step, values)
        if len(self._stamps) == 1:
            self._stamps[0] = time.monotonic()  # the evaluation before training is no training time
        self._last_eval = {"step": step, **values}
        shown = "  ".join(f"{k.removeprefix('eval/')} {show(k, v)}" for k, v in values.items() if _shown_number(k, v))
        self.note(f"eval {step:>5}/{self._total}  {shown}")

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows with `problem`, `text`, `reward` (and what else a task adds), for reading."""
        with explain_os_errors("write samples", self.run_dir / "samples.jsonl"):
            for row in rows:
                self._samples_file.write(to_json({"step": step, **row}) + "\n")
            self._samples_file.flush()

    def stage(self, name: str) -> None:
        """The stage now running, for the live display: `StageTimer(on_enter=log.stage)`."""
        self._stage = name

    def note(self, text: str) -> None:
        """One line for the reader, above the display."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            self._print(text)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json (atomically) and print before, after and difference.   summary: "before" and "after" map
        names to numbers."""
        path = self.run_dir / "summary.json"
        with explain_os_errors("write the summary", path):
            write_atomic(path, (to_json(summary, indent=1) + "\n").encode())
        self._stop_display()
        for line in summary_table(summary):
            self._print(line)

    # --- files ---

    def _write_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        if clash := {"step", "nonfinite"} & values.keys():
            raise ValueError(f"RunLog: {min(clash)!r} is a reserved name of metrics.jsonl")
        with explain_os_errors("write metrics", self.run_dir / "metrics.jsonl"):
            self._metrics_file.write(to_json({"step": step, **values}) + "\n")
            self._metrics_file.flush()
        with explain_os_errors("write TensorBoard events", self.run_dir / "tensorboard"):
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Restore the terminal, then close the files.  Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self._stop_display()
            for step, values in sorted(self._held_evals.items()):
                self._write_metrics(step, values)
        finally:
            with explain_os_errors("close the logs", self.run_dir):
                self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError as closing:
            if error is None:
                raise
            error.add_note(f"while closing the logs: {closing}")  # the first error is the one to report

    # --- display ---

    def _stop_display(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _print(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            print(line, file=self._stream, flush=True)
        except BrokenPipeError:
            # `train | head`: the reader left, the run goes on.  Standard output must lead somewhere, or Python fails
            # at exit.

            if self._stream is sys.stdout:
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), sys.stdout.fileno())
            self._stream = None

    def _seconds_per_step(self) -> float | None:
        return (self._stamps[-1] - self._stamps[0]) / (len(self._stamps) - 1) if len(self._stamps) > 1 else None

    def _eta(self) -> str:
        per_step = self._seconds_per_step()
        if per_step is None:
            return "-"
        return show_time(per_step * (self._total - self._done) - (time.monotonic() - self._stamps[-1]))

    def _step_line(self, step: int, values: Mapping[str, Any]) -> str:
        parts = [f"step {step:>5}/{self._total}"]
        for label, name in (
            *HEADLINES,
            ("accuracy", "accuracy"),
            ("entropy", "entropy"),
            ("length", "completions/mean_length"),
            ("grad", "grad_norm"),
            ("lr", "learning_rate"),
            ("tok/s", "tokens_per_second"),
        ):
            if name in values:
                parts.append(f"{label} {show(name, values[name])}")
        if (per_step := self._seconds_per_step()) is not None:
            parts.append(f"{per_step:.2f} s/step")
        if shares := _stage_shares(values, above=0.05):
            parts.append(" ".join(f"{s} {100 * share:.0f}%" for s, share in shares))
        parts.append(f"ETA {self._eta()}")
        return "  ".join(parts)

    def _render(self) -> RenderableType:
        values = self._last
        ascii_only = self._live is not None and self._live.console.options.ascii_only
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        per_step = self._seconds_per_step()
        speed = f"{per_step:.2f} s/step" if per_step is not None else "first step"
        head.add_row(
            ProgressBar(total=max(self._total, 1), completed=self._done),
            f"step {self._done}/{self._total}   {speed}   ETA {self._eta()}",
        )
        grid = Table.grid(padding=(0, 2), expand=False)
        for _ in range(4):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(no_wrap=True, min_width=8)
        cells = [
            _headline(values),
            ("accuracy", "accuracy"),
            ("entropy", "entropy"),
            ("tokens/s", "tokens_per_second"),
            ("length", "completions/mean_length"),
            ("cut off", "completions/clipped_ratio"),
            ("grad norm", "grad_norm"),
            ("lr", "learning_rate"),
        ]
        for row in (cells[:4], cells[4:]):
            grid.add_row(*(text for label, name in row for text in (label, show(name, values.get(name)))))
        lines: list[RenderableType] = [head, grid]
        # a copy: the display's thread must not iterate over what step() appends to
        if curve := [r for r in list(self._curve) if math.isfinite(r)]:
            low, high = min(curve), max(curve)
            spark = sparkline(curve, ascii_only)
            what = _headline(values)[0]
            lines.append(
                Text.assemble(
                    (f"{what}, last steps  ", "dim"), (spark, "green"), f"  {show('', low)} .. {show('', high)}"
                )
            )
        shares = " | ".join(f"{s} {100 * share:.0f} %" for s, share in _stage_shares(values))
        lines.append(
            Text.assemble(("time of last step  ", "dim"), shares or "-", ("   now  ", "dim"), self._stage or "-")
        )
        if self._last_eval:
            shown = "   ".join(
                f"{k.removeprefix('eval/')} {show(k, v)}" for k, v in self._last_eval.items() if _shown_number(k, v)
            )
            lines.append(Text.assemble((f"eval, step {self._last_eval['step']}  ", "dim"), shown))
        return Panel(Group(*lines), title=Text(self._title), title_align="left", border_style="blue")


def _shown_number(name: str, value: Any) -> bool:
    return name != "step" and not name.endswith("_se") and isinstance(value, int | float)


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # about a second to import, and only a run needs it

    # purge_step: TensorBoard hides points of an interrupted run that a resume computes again
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None, flush_secs=10)


def summary_table(summary: Mapping[str, Any]) -> list[str]:
    """Lines of a small table: name, before, after, difference; then the speed.  Rates in percent, their differences
    in points."""
    before, after = summary.get("before") or {}, summary.get("after") or {}
    rows = [("", "before", "after", "difference")]
    for name in [k for k in before if not k.endswith("_se")] + [
        k for k in after if k not in before and not k.endswith("_se")
    ]:
        pair = before.get(name), after.get(name)
        cells = []
        for values, value in zip((before, after), pair, strict=True):
            se = values.get(f"{name}_se")
            cells.append(show(name, value) + (f" ± {100 * se:.1f}" if value is not None and se is not None else ""))
        change = "-"
        if pair[0] is not None and pair[1] is not None:
            delta = pair[1] - pair[0]
            change = f"{100 * delta:+.1f} points" if name.startswith(_FRACTIONS) else f"{delta:+.3f}"
        rows.append((name, *cells, change))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join((row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)))) for row in rows]
    tail = []
    if isinstance(summary.get("wall_s"), int | float):
        tail.append(f"wall time {show_time(summary['wall_s'])}")
    if isinstance(summary.get("tokens_per_second"), int | float):
        tail.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    return lines + (["  ".join(tail)] if tail else [])
