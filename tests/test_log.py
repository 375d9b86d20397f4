"""The files of a run are valid whatever the numbers; the display follows the kind of output and gives the terminal
back."""

import errno
import io
import json
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pymathrl import log as log_module
from pymathrl.errors import UserError
from pymathrl.log import STAGES, RunLog, StageTimer, show, show_time, sparkline, summary_table, to_json

METRICS = {
    "reward": 0.25,
    "accuracy": 0.2,
    "entropy": 1.5,
    "completions/mean_length": 18.0,
    "completions/clipped_ratio": 0.125,
    "grad_norm": 0.5,
    "learning_rate": 1e-4,
    "tokens_per_second": 3210.0,
    "time/rollout": 0.6,
    "time/loss": 0.4,
}
SUMMARY = {
    "before": {"pass@1": 0.2, "pass@1_se": 0.01, "pass@8": 0.5, "diversity": 1.8},
    "after": {"pass@1": 0.425, "pass@1_se": 0.012, "pass@8": 0.55, "diversity": 2.0},
    "wall_s": 99.2,
    "tokens_per_second": 3210.4,
}


def strict_lines(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_object_per_step_flushed_at_once(tmp_path):
    with RunLog(tmp_path, 3, stream=io.StringIO()) as log:
        log.eval(0, "eval", {"pass@1": 0.1})
        log.step(1, METRICS)
        log.eval(2, "eval", {"pass@1": 0.2, "pass@8": 0.4})
        log.step(2, METRICS)
        seen = strict_lines(tmp_path / "metrics.jsonl")  # before the file is closed
        log.eval(3, "eval", {"pass@1": 0.3})  # its step line never comes: kept all the same
    assert seen == [
        {"step": 0, "eval/pass@1": 0.1},
        {"step": 1, **METRICS},
        {"step": 2, **METRICS, "eval/pass@1": 0.2, "eval/pass@8": 0.4},
    ]
    assert strict_lines(tmp_path / "metrics.jsonl") == [*seen, {"step": 3, "eval/pass@1": 0.3}]


def test_nonfinite_numbers_are_null_and_named(tmp_path):
    bad = {
        "reward": math.nan,
        "grad_norm": torch.tensor(math.inf),
        "entropy": np.float32(-math.inf),
        "accuracy": np.float64(0.5),
    }
    with RunLog(tmp_path, 1, stream=(out := io.StringIO())) as log:
        log.step(1, bad)
        log.samples(1, [{"problem": "1+1", "text": "zwei\n", "reward": math.nan, "extra": {"p": [math.inf, 1]}}])
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {
            "step": 1,
            "reward": None,
            "grad_norm": None,
            "entropy": None,
            "accuracy": 0.5,
            "nonfinite": ["reward", "grad_norm", "entropy"],
        }
    ]
    assert strict_lines(tmp_path / "samples.jsonl") == [
        {
            "step": 1,
            "problem": "1+1",
            "text": "zwei\n",
            "reward": None,
            "extra": {"p": [None, 1]},
            "nonfinite": ["reward", "extra.p[0]"],
        }
    ]
    assert "reward nan" in out.getvalue() and "grad inf" in out.getvalue()
    assert to_json({"a": 1.0}) == '{"a": 1.0}'


def test_reserved_names_are_refused(tmp_path):
    with RunLog(tmp_path, 1, stream=io.StringIO()) as log, pytest.raises(ValueError, match="'step' is a reserved name"):
        log.step(1, {"step": 3})


def test_a_pipe_gets_one_plain_line_per_step(tmp_path):
    with RunLog(tmp_path, 2, stream=(out := io.StringIO())) as log:
        log.note("kernels: cpu")
        log.step(1, METRICS)
        log.step(2, METRICS)
        log.summary(SUMMARY)
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines[0] == "kernels: cpu" and [line.startswith("step ") for line in lines[:4]] == [False, True, True, False]
    for part in (
        "1/2",
        "reward 0.250",
        "accuracy 20.0 %",
        "entropy 1.500",
        "length 18.0",
        "lr 1.0e-04",
        "tok/s 3,210",
        "rollout 60% loss 40%",
        "ETA",
    ):
        assert part in lines[1]
    assert lines[3:] == summary_table(SUMMARY)


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, 2, stream=io.StringIO()) as log:
        log.step(1, METRICS)
        log.step(2, METRICS | {"reward": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.25), (2, 0.75)]
    assert set(events.Tags()["scalars"]) == set(METRICS)


def test_resume_appends(tmp_path):
    for first in (1, 3):
        with RunLog(tmp_path, 4, start_step=first - 1, stream=io.StringIO()) as log:
            log.step(first, METRICS)
            log.step(first + 1, METRICS)
    assert [line["step"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_summary_file_and_table(tmp_path):
    with RunLog(tmp_path, 1, stream=io.StringIO()) as log:
        log.summary(SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY
    assert summary_table(SUMMARY) == [
        "                 before         after    difference",
        "pass@1     20.0 % ± 1.0  42.5 % ± 1.2  +22.5 points",
        "pass@8           50.0 %        55.0 %   +5.0 points",
        "diversity         1.800         2.000        +0.200",
        "wall time 1:39  3,210 tokens/s",
    ]
    assert summary_table({"before": {"pass@1": 0.5}, "after": {}})[1].split() == ["pass@1", "50.0", "%", "-", "-"]


LIVE_RUN = """
import sys
from pymathrl.log import RunLog
with RunLog(sys.argv[1], 4, title="rover") as log:
    log.eval(0, "eval", {"pass@1": 0.1})
    log.note("a note")
    log.stage("rollout")
    for step in (1, 2):
        log.step(step, {"reward": step / 4, "entropy": float("nan"), "time/rollout": 1.0})
    raise END
"""


@pytest.mark.parametrize("end", ["KeyboardInterrupt", "ValueError('boom')"])
def test_a_terminal_gets_a_display_and_is_restored(tmp_path, end):
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PYTHONUTF8": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE_RUN.replace("END", end), str(tmp_path)],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=env,
        cwd=Path(__file__).parents[1],
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError as error:
            assert error.errno == errno.EIO  # how Linux reports that the other end of a terminal closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    _, stderr = process.communicate(timeout=60)
    assert end.split("(")[0] in stderr.decode()
    text = shown.decode()
    for part in ("rover", "a note", "step 2/4", "reward", "0.500", "rollout 100 %", "pass@1 10.0 %", "ETA"):
        assert part in text
    # cursor hidden, then shown again
    assert text.count("\x1b[?25l") >= 1 and text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 3


def test_display_renders_before_the_first_step_and_without_unicode(tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    with RunLog(tmp_path, 2, live=True, stream=out) as log:
        log.step(1, METRICS)
        log.step(2, METRICS | {"reward": 0.5})
    out.flush()
    assert b"reward, last steps" in out.buffer.getvalue()


def test_a_supervised_run_shows_its_loss(tmp_path):
    for live in (True, False):
        out = io.StringIO()
        with RunLog(tmp_path, 2, live=live, stream=out) as log:
            log.step(1, {"nll": 1.25, "grad_norm": 0.5})
            log.step(2, {"nll": 0.75, "grad_norm": 0.5})
        text = out.getvalue()
        assert "loss" in text and "0.750" in text and "reward" not in text and ("loss, last steps" in text) == live


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    code = (
        "import sys\nfrom pymathrl.log import RunLog\n"
        "with RunLog(sys.argv[1], 300) as log:\n    for i in range(1, 301): log.step(i, {'reward': 0.5})\n"
    )
    run = f'{sys.executable} -c "$CODE" {tmp_path} | head -n 1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", run],
        capture_output=True,
        env=os.environ | {"CODE": code},
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "0"
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 300


@pytest.mark.parametrize("name", ["", "metrics.jsonl", "samples.jsonl", "tensorboard"])
def test_a_broken_output_folder_names_the_path(tmp_path, name):
    run = tmp_path / "run"
    if name in ("", "tensorboard"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("a file where a folder is needed")
    else:
        (run / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"cannot write the run folder: .*{name}.*: (File exists|Is a directory)"):
        RunLog(run, 1, stream=io.StringIO())


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["metrics", "samples"])
def test_full_disk(tmp_path, name):
    with RunLog(tmp_path, 1, stream=io.StringIO()) as log:
        setattr(log, f"_{name}_file", FullDisk())
        with pytest.raises(UserError, match=rf"{name}\.jsonl: No space left on device; free some space"):
            log.step(1, METRICS)
            log.samples(1, [{"problem": "p", "text": "t", "reward": 1.0}])


def test_full_disk_at_the_summary_keeps_the_old_one(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with RunLog(tmp_path, 1, stream=io.StringIO()) as log:
        log.summary(SUMMARY)
        monkeypatch.setattr(log_module, "write_atomic", full)
        with pytest.raises(UserError, match=r"summary\.json: No space left"):
            log.summary({})
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY


def test_stage_timer(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 5.5, 10.0, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    entered: list[str] = []
    timer = StageTimer(entered.append)
    for stage in ("rollout", "loss"):
        with timer(stage):
            pass
    with pytest.raises(ZeroDivisionError), timer("rollout"):  # time before an exception counts too
        _ = 1 / 0
    assert timer.pop() == {"time/rollout": 3.0, "time/loss": 0.5}
    assert timer.pop() == {} and entered == ["rollout", "loss", "rollout"]


def test_a_stage_waits_for_what_it_queued_within_its_own_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def queued_work():
        now[0] += 4.0

    timer = StageTimer(on_exit=queued_work)
    with timer("loss"):
        now[0] += 1.0
    with timer("optim"):
        pass
    assert timer.pop() == {"time/loss": 5.0, "time/optim": 4.0}


def test_stage_timer_refuses_other_names_and_nesting():
    timer = StageTimer()
    with (
        pytest.raises(
            ValueError, match="prompt, rollout, verify, advantage, loss, optim, eval, checkpoint, got 'sleep'"
        ),
        timer("sleep"),
    ):
        pass
    with pytest.raises(RuntimeError, match="'loss' starts inside 'rollout'"), timer("rollout"), timer("loss"):
        pass
    assert STAGES[:6] == ("prompt", "rollout", "verify", "advantage", "loss", "optim")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.1234, "12.3 %"),
        ("eval/pass@8", 1.0, "100.0 %"),
        ("learning_rate", 3e-5, "3.0e-05"),
        ("tokens_per_second", 12345.6, "12,346"),
        ("reward", 0.0, "0.000"),
        ("grad_norm", 0.00012, "1.2e-04"),
        ("completions/mean_length", 18.25, "18.2"),
        ("reward", math.nan, "nan"),
        ("reward", None, "-"),
    ],
)
def test_show(name, value, text):
    assert show(name, value) == text


def test_show_time_and_sparkline():
    assert [show_time(s) for s in (0, 65, 3599.6, 7389, -3)] == ["0:00", "1:05", "1:00:00", "2:03:09", "0:00"]
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█" and sparkline([0.0, math.nan, 1.0], ascii_only=True) == "_#"
    assert sparkline([2.0, 2.0]) == "▁▁" and sparkline([]) == ""
