"""Schedules: stages as data in a TOML, run in order in one run folder, resumable in the middle."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymathrl.config import TrainConfig, parse_train, write_toml
from pymathrl.errors import UserError
from pymathrl.optim import Optimizer
from pymathrl.train import main
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy

BASE = """
algo = "grpo"
clip_high = 0.28
samples_per_prompt = 4
prompts_per_step = 4
max_new_tokens = 10
lr = 1e-3

[[stage]]
steps = 2
max_new_tokens = 8

[[stage]]
steps = 2
algo = "rover"
rho = 0.5
max_new_tokens = 12
lr = 2e-3

[[stage]]
steps = 1
task = "arithmetic"
task_terms_max = 2
filter = "mixed"
filter_rounds = 1
"""


def schedule(tmp_path, text=BASE):
    path = tmp_path / "schedule.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_a_stage_stands_over_the_file_and_under_the_command_line(tmp_path):
    run = parse_train([*schedule(tmp_path), "--max-prompt-tokens", "60"])
    first, second, third = run.stages
    assert run.steps == 5 and [s.algo.name for s in run.stages] == ["grpo", "rover", "grpo"]
    assert (first.train.max_new_tokens, second.train.max_new_tokens) == (8, 12)
    assert third.train.max_new_tokens == run.train.max_new_tokens == 10
    assert third.train.minibatches == run.train.minibatches == 2  # of the built-in model
    assert (first.own.clip_high, second.own.rho, third.own.clip_high) == (0.28, 0.5, 0.28)
    assert (first.train.lr, second.train.lr) == (1e-3, 2e-3)
    assert third.train.task == "arithmetic" and third.task_options == {"terms_max": 2}
    assert {s.train.max_prompt_tokens for s in run.stages} == {60}


def test_defaults_are_those_of_the_stages_own_algorithm(tmp_path):
    text = 'algo = "dapo"\n[[stage]]\nsteps = 1\n[[stage]]\nsteps = 1\nalgo = "grpo"\n'
    first, second = parse_train(schedule(tmp_path, text)).stages
    assert (first.train.filter, second.train.filter) == ("mixed", "off")
    turned = text.replace("dapo", "X").replace("grpo", "dapo").replace("X", "grpo")
    assert [stage.train.filter for stage in parse_train(schedule(tmp_path, turned)).stages] == ["off", "mixed"]


def test_the_saved_options_give_the_same_stages(tmp_path):
    run = parse_train(schedule(tmp_path))
    (tmp_path / "config.toml").write_text(write_toml(run.values()))
    again = parse_train(["--resume", str(tmp_path)])
    assert [(s.algo.name, s.train, s.own, s.task_options) for s in again.stages] == [
        (s.algo.name, s.train, s.own, s.task_options) for s in run.stages
    ]
    assert again.values() == run.values()
    changed = parse_train(["--resume", str(tmp_path), "--checkpoint-every", "1"])
    assert {s.train.checkpoint_every for s in changed.stages} == {1}
    # said once more, what the run had is no new option of its stages
    same = parse_train(["--resume", str(tmp_path), "--max-new-tokens", "10", "--lr", "1e-3"])
    assert [s.train for s in same.stages] == [s.train for s in run.stages]


@pytest.mark.parametrize(
    "text, words",
    [
        ("[[stage]]\nmax_new_tokens = 8\n", "stage 1: each stage says its number of steps"),
        ("[[stage]]\nsteps = 1\nmodel = 'x'\n", "model is an option of the whole run"),
        ("[[stage]]\nsteps = 1\neval_problems = 9\n", "eval_problems is an option of the whole run"),
        ("stage_optimizer = 'fresh'\n", "has no effect without [[stage]] tables"),
        ("[[stage]]\nsteps = 1\n[[stage]]\nsteps = 1\nrho = 1.0\n", "stage 2, rho: unknown option for --algo grpo"),
        ("[[stage]]\nsteps = 1\nalgo = 'grop'\n", "stage 1, algo: unknown algorithm 'grop'; did you mean 'grpo'"),
        ("[[stage]]\nsteps = 1\nlr = -1.0\n", "stage 1, lr: expected more than 0"),
        ("stage = 3\n", "expected stages as tables"),
    ],
)
def test_bad_stages_name_the_file_the_stage_and_the_option(text, words, tmp_path):
    with pytest.raises(UserError) as error:
        parse_train(schedule(tmp_path, 'algo = "grpo"\n' + text))
    assert words in str(error.value), error.value


def test_steps_on_the_command_line_are_refused(tmp_path):
    with pytest.raises(UserError, match="--steps: the stages of the schedule say how long each is"):
        parse_train([*schedule(tmp_path), "--steps", "3"])


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


@pytest.mark.parametrize("moments", ["continue", "fresh"])
def test_a_schedule_runs_through_and_resumes_in_the_middle_to_the_same_bits(moments, tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    text = BASE.replace('algo = "grpo"', f'algo = "grpo"\nstage_optimizer = "{moments}"', 1)
    small = [f for f in SMALL_RUN if f not in ("--lr", "1e-3", "--max-new-tokens", "12")]
    argv = ["--model", str(model), *schedule(tmp_path, text), *small, "--eval-every", "0", "--checkpoint-every", "1",
            "--keep-checkpoints", "9"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*argv, "--out", str(whole)]) == 0
    out = capsys.readouterr().out
    assert "stage 2" in out and "stage 3" in out and "rover on countdown" in out and "grpo on arithmetic" in out
    steps = [m for m in read_metrics(whole) if "loss" in m or "filter/keep_rate" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5]
    assert max(m["completions/max_length"] for m in steps[:2]) <= 8
    assert [m["learning_rate"] for m in steps[:4]] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert "rover/q_mean" in steps[2] and "rover/q_mean" not in steps[0]
    assert json.loads((whole / "summary.json").read_text())["steps"] == 5
    assert len(tomllib.loads((whole / "config.toml").read_text())["stage"]) == 3

    for cut in (2, 3):  # at the end of a stage, and within one
        shutil.rmtree(parts, ignore_errors=True)
        shutil.copytree(whole, parts)
        (parts / "summary.json").unlink()
        for step in range(cut + 1, 6):
            shutil.rmtree(parts / "checkpoints" / f"step-{step}")
        assert main(["--resume", str(parts)]) == 0
        a, b = weights(whole, 5), weights(parts, 5)
        assert all(torch.equal(a[name], b[name]) for name in a), cut
        assert [m["step"] for m in read_metrics(parts)] == [m["step"] for m in read_metrics(whole)]


def test_moments_go_on_or_begin_anew(tmp_path):
    config = replace(TrainConfig(), lr=1e-3, weight_decay=0.0)
    for kept in (True, False):
        optimizer = Optimizer(tiny_policy().model, config, 10)
        optimizer.step()
        new = replace(config, lr=5e-4, weight_decay=0.3, stage_optimizer="continue" if kept else "fresh")
        optimizer.restart(new, 4)
        assert bool(optimizer.adamw.state) == kept and optimizer.updates == 0
        assert [g["weight_decay"] for g in optimizer.adamw.param_groups] == [0.3, 0.0]
        assert optimizer.step().learning_rate == 5e-4


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "schedules").glob("*.toml")), ids=lambda p: p.stem)
def test_the_schedules_of_the_repository_are_understood(path):
    run = parse_train(["--config", str(path)])
    assert len(run.stages) >= 2 and run.steps <= 60
