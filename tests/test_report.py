"""Reports read what runs write: pictures of one run, comparisons of several, one clear sentence for anything
broken."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from pymathrl.errors import UserError
from pymathrl.log import RunLog
from pymathrl.report import comparison_table, group_runs, main, plot_run, read_run


def make_run(
    path: Path, algo: str = "rover", seed: int = 0, steps: int = 8, gain: float = 0.4, done: bool = True
) -> Path:
    """A run folder written by the run log itself; pass@1 rises linearly from 0.2 by `gain`."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(f'algo = "{algo}"\nseed = {seed}\n')

    def scores(step: int) -> dict[str, float]:
        return {
            "pass@1": 0.2 + gain * step / steps,
            "pass@8": 0.5 + 0.01 * seed,
            "diversity": 1.5 + gain * step / steps,
        }

    with RunLog(path, steps, stream=io.StringIO()) as log:
        log.eval(0, "eval", scores(0))
        for step in range(1, steps + 1):
            if step % 4 == 0:
                log.eval(step, "eval", scores(step))
            metrics = {
                "reward": 0.1 * step if step != 3 else float("nan"),
                "reward_std": 0.2,
                "accuracy": 0.05 * step,
                "entropy": 1.0,
                "grad_norm": 0.5,
            }
            log.step(
                step,
                metrics | {"completions/mean_length": 18.0, "time/rollout": 0.6, "time/loss": 0.4, "time/eval": 9.0},
            )
        if done:
            log.summary(
                {"before": scores(0), "after": scores(steps), "wall_s": 100.0 + seed, "algo": algo, "seed": seed}
            )
    return path


def assert_is_a_picture(path: Path) -> None:
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 400 and image.shape[1] > 1200 and image.std() > 0.05


def test_read_run_merges_lines_and_leaves_gaps(tmp_path):
    run = read_run(make_run(tmp_path / "run", seed=3))
    assert (run.label, run.seed) == ("rover", 3)
    steps, values = run.series["eval/pass@1"]
    assert steps.tolist() == [0, 4, 8] and values == pytest.approx([0.2, 0.4, 0.6])
    assert 3 not in run.series["reward"][0] and len(run.series["entropy"][0]) == 8
    assert run.score("after", "pass@1") == pytest.approx(0.6) and run.score("after", "pass@64") is None


@pytest.mark.parametrize("steps", [1, 8, 60])
@pytest.mark.parametrize("done", [True, False])
def test_curves_of_one_run(tmp_path, steps, done):
    path = plot_run(make_run(tmp_path / "run", steps=steps, done=done))
    assert path == tmp_path / "run" / "curves.png"
    assert_is_a_picture(path)


def test_curves_with_few_metrics_and_a_spike(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "grad_norm": 1e4 if s == 5 else 1.0}) + "\n" for s in range(1, 9))
    )
    assert_is_a_picture(plot_run(run))


def test_comparison_of_two_algorithms_over_seeds(tmp_path, capsys):
    dirs = [
        make_run(tmp_path / f"{algo}{seed}", algo, seed, gain=gain)
        for algo, gain in (("rover", 0.4), ("grpo", 0.2))
        for seed in (1, 0)
    ]
    assert main([*map(str, dirs), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "out/all.json")]) == 0
    table = (tmp_path / "out/comparison.md").read_text()
    assert table.splitlines() == [
        "| algorithm | seed | pass@1 | pass@8 | diversity | wall (s) |",
        "|---|---|---|---|---|---:|",
        "| rover | 0 | 20.0 % → 60.0 % | 50.0 % → 50.0 % | 1.500 → 1.900 | 100 |",
        "| rover | 1 | 20.0 % → 60.0 % | 51.0 % → 51.0 % | 1.500 → 1.900 | 101 |",
        "| **rover** | **mean of 2** | **20.0 % → 60.0 %** | **50.5 % → 50.5 %** | **1.500 → 1.900** | **100** |",
        "| grpo | 0 | 20.0 % → 40.0 % | 50.0 % → 50.0 % | 1.500 → 1.700 | 100 |",
        "| grpo | 1 | 20.0 % → 40.0 % | 51.0 % → 51.0 % | 1.500 → 1.700 | 101 |",
        "| **grpo** | **mean of 2** | **20.0 % → 40.0 %** | **50.5 % → 50.5 %** | **1.500 → 1.700** | **100** |",
    ]
    assert capsys.readouterr().out.startswith(table)
    assert_is_a_picture(tmp_path / "out/comparison.png")
    records = json.loads((tmp_path / "out/all.json").read_text())["runs"]
    assert [(r["label"], r["seed"]) for r in records] == [("rover", 1), ("rover", 0), ("grpo", 1), ("grpo", 0)]
    assert records[0]["after"]["pass@1"] == pytest.approx(0.6) and records[0]["run"] == str(dirs[0])


def test_labels_and_folders_with_an_equals_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("lr=1"), seed=0)
    make_run(Path("b"), seed=1)
    assert main(["lr=1", "mine=b"]) == 0
    assert "| rover | 0 |" in capsys.readouterr().out
    assert "| mine | 1 |" in Path("comparison.md").read_text()
    assert main(["name=b", "--out", "solo"]) == 0 and Path("solo/curves.png").exists()


def test_runs_without_a_shared_evaluation_step_or_score_are_still_compared(tmp_path):
    a, b = make_run(tmp_path / "a", seed=0), make_run(tmp_path / "b", seed=1)
    lines = [line for line in (b / "metrics.jsonl").read_text().splitlines(keepends=True) if "eval/pass@1" not in line]
    (b / "metrics.jsonl").write_text("".join(lines))
    summary = json.loads((b / "summary.json").read_text())
    del summary["after"]["diversity"]
    (b / "summary.json").write_text(json.dumps(summary))
    assert main([str(a), str(b), "--out", str(tmp_path)]) == 0
    assert_is_a_picture(tmp_path / "comparison.png")
    assert "1.500 → -" in comparison_table(group_runs([read_run(a), read_run(b)])).splitlines()[4]


BREAKS = {
    "no folder": (
        lambda r: [p.unlink() for p in r.rglob("*") if p.is_file()],
        "not a complete run folder: config.toml: No such file",
    ),
    "bad toml": (lambda r: (r / "config.toml").write_text("algo = "), "config.toml: not valid TOML"),
    "no algo": (
        lambda r: ((r / "config.toml").write_text("seed = 1"), (r / "summary.json").write_text("{}")),
        "string under the key `algo`, got None",
    ),
    "no metrics": (lambda r: (r / "metrics.jsonl").unlink(), "not a complete run folder: metrics.jsonl: No such file"),
    "empty metrics": (lambda r: (r / "metrics.jsonl").write_text(""), "metrics.jsonl: holds no metrics"),
    "broken line": (
        lambda r: (r / "metrics.jsonl").write_text('{"step": 1, "reward": 1}\n{"st\n{"step": 2}\n'),
        "metrics.jsonl, line 2: expected",
    ),
    "binary": (lambda r: (r / "metrics.jsonl").write_bytes(b"\xff\xfe\x00"), "metrics.jsonl: not UTF-8"),
    "broken summary": (lambda r: (r / "summary.json").write_text('{"before": '), "summary.json: not valid JSON"),
    "list summary": (lambda r: (r / "summary.json").write_text("[]"), "summary.json: expected a JSON object, got list"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_runs_are_named(tmp_path, capsys, case):
    run = make_run(tmp_path / "run")
    damage, message = BREAKS[case]
    damage(run)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(run) in error and error.count("\n") == 1


def test_a_partial_last_line_belongs_to_a_running_run(tmp_path):
    run = make_run(tmp_path / "run", done=False)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "rew')
    assert read_run(run).series["entropy"][0].max() == 8


def test_comparison_refuses_what_would_mislead(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", done=False)
    assert main([str(a), str(b)]) == 2
    assert f"{b} has no summary.json: the run has not ended" in capsys.readouterr().err
    assert main([str(a), str(a)]) == 2
    assert "given twice" in capsys.readouterr().err
    (b / "summary.json").write_text('{"before": {"pass@1": 0.1}, "after": {"pass@1": null}}')
    assert main([str(a), str(b)]) == 2
    assert "has no number under after / pass@1" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    runs = [f"label{i}={make_run(tmp_path / f'many{i}', steps=1)}" for i in range(19)]
    assert main(runs) == 2
    assert "at most 18" in capsys.readouterr().err and not Path("comparison.png").exists()


def test_unwritable_output(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main([str(run), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write the report" in capsys.readouterr().err


def test_help_and_usage_from_the_command_line(tmp_path):
    environment = os.environ | {"COLUMNS": "100"}
    call = [sys.executable, "-m", "pymathrl.report"]
    done = subprocess.run(
        [*call, "--help"], capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment
    )
    assert done.returncode == 0
    for word in ("RUN_DIR", "LABEL", "--out DIR", "--json FILE", "curves"):
        assert word in done.stdout
    done = subprocess.run(
        [*call, str(tmp_path / "x")], capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment
    )
    assert (
        done.returncode == 2
        and done.stderr == f"report: {tmp_path / 'x'} is not a run folder: there is no such folder\n"
    )


def test_smoothing_keeps_lines_and_levels():
    from pymathrl.report import _smooth

    assert _smooth(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    line = np.arange(100.0)
    assert _smooth(line)[10:90] == pytest.approx(line[10:90])
