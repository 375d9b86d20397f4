"""Whole runs: they leave the promised files, resume to the same bits, agree with the references, survive bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymathrl import context as context_module
from pymathrl import learner as learner_module
from pymathrl import train as train_module
from pymathrl.algos import rover
from pymathrl.checkpoint import hash_parameters
from pymathrl.config import TrainConfig
from pymathrl.loss import WORKSPACE_BYTES
from pymathrl.models import Decoder, ModelConfig
from pymathrl.models.config import Mamba
from pymathrl.optim import Optimizer
from pymathrl.tasks import Grade
from pymathrl.train import kept_bytes, kept_states, main, plan_memory
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy

ROOT = Path(__file__).resolve().parent.parent
# on the built-in model, which earns rewards
RUN = [*SMALL_RUN, "--prompts-per-step", "8", "--max-new-tokens", "64", "--lr", "3e-4"]


def command(*argv: str, env: dict[str, str] | None = None, driver: str = "", **options) -> subprocess.Popen:
    """The command in its own process; `driver` is Python code to run before it, in that process."""
    code = f"import sys\n{driver}\nfrom pymathrl.train import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], env={**os.environ, **(env or {})}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, (process.returncode, out[-2000:], err[-2000:])
    return out + err


def final_hash(run: Path, step: int) -> str:
    return hash_parameters(load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors").items())


def losses(run: Path) -> list[float]:
    return [m["loss"] for m in read_metrics(run) if "loss" in m]


@pytest.mark.parametrize("algo", ["rover", "grpo"])
def test_a_run_leaves_the_promised_files(algo, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["--algo", algo, "--steps", "3", "--eval-every", "2", "--out", str(out), *RUN]) == 0
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["algo"] == algo and config["steps"] == 3 and config["lr"] == 3e-4
    metrics = read_metrics(out)
    steps = [m for m in metrics if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    for name in (
        "reward", "reward_std", "frac_reward_zero_std", "accuracy", "completions/mean_length",
        "completions/clipped_ratio", "entropy", "clip_ratio/low", "clip_ratio/high", "kl", "grad_norm", "learning_rate",
        "ratio/max", "logp_gap/mean", "logp_gap/max", "tokens_per_second", "time/prompt", "time/rollout", "time/verify",
        "time/advantage", "time/loss", "time/optim",
    ):  # fmt: skip
        assert name in steps[-1], name
    assert "eval/pass@1" in steps[1]
    # contract C1: sampler and trainer give the same bits on unchanged weights
    assert steps[0]["logp_gap/max"] == 0.0 and steps[0]["logp_gap/mean"] == 0.0
    summary = json.loads((out / "summary.json").read_text())
    for when in ("before", "after"):
        assert {"pass@1", "pass@8", "diversity"} <= summary[when].keys()
    assert summary["wall_s"] > 0 and summary["tokens_per_second"] > 0
    assert (out / "curves.png").stat().st_size > 10_000
    assert list((out / "tensorboard").iterdir())
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {"step", "problem", "text", "reward"} <= samples[0].keys()
    folder = out / "checkpoints" / "step-3"
    assert (folder / "config.json").exists() and (folder / "trainer").is_dir()
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert main(["--algo", algo, "--out", str(out), *RUN]) == 2
    assert "a run is there already" in capsys.readouterr().err


@pytest.mark.parametrize("algo", ["rover", "grpo"])
def test_kernels_and_references_give_the_same_losses(algo, tmp_path):
    """5 steps with the C++ kernels and 5 with the plain torch references: the same losses to 1e-5."""
    runs = {impl: tmp_path / impl for impl in ("kernel", "ref")}
    for impl, out in runs.items():
        # AdamW's first steps are the signs of the gradient, so it turns rounding of small gradients into whole steps:
        # at 3e-4 the losses of a step later differ by 1e-4, whichever of the two rounds better
        argv = ["--algo", algo, "--steps", "5", "--eval-every", "0", "--out", str(out), *RUN]
        argv += ["--prompts-per-step", "4", "--lr", "3e-5"]
        text = finish(command(*argv, env={"PYMATHRL_IMPL": impl}), 0)
        assert ("PYMATHRL_IMPL=ref" in text) == (impl == "ref")
    kernel, ref = losses(runs["kernel"]), losses(runs["ref"])
    assert len(kernel) == 5 and kernel == pytest.approx(ref, abs=1e-5)
    # GRPO's loss is near 0 whatever its gradient is, as advantages sum to 0 in a group: the gradients must agree too
    norms = {impl: [m["grad_norm"] for m in read_metrics(out) if "loss" in m] for impl, out in runs.items()}
    assert norms["kernel"] == pytest.approx(norms["ref"], rel=5e-3) and max(norms["kernel"]) > 0.05


# The Nth pass of the engine kills the process: inside the decode loop, with some tokens drawn and none kept.
KILL = """
import os, signal
from pymathrl.models.paged import Pass
real, calls = Pass.run, [0]
def run(self):
    calls[0] += 1
    if calls[0] == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self)
Pass.run = run
"""
COUNT = """
import atexit
from pymathrl.models.paged import Pass
real, calls = Pass.run, [0]
def run(self):
    calls[0] += 1
    real(self)
Pass.run = run
atexit.register(lambda: print("engine passes", calls[0]))
"""


def test_kill_in_a_rollout_then_resume_gives_the_same_bits(tmp_path):
    argv = ["--algo", "rover", "--steps", "8", "--eval-every", "3", "--checkpoint-every", "2", *RUN]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    text = finish(command(*argv, "--out", str(whole), driver=COUNT), 0)
    calls = int(text.rsplit("engine passes", 1)[1])
    finish(command(*argv, "--out", str(killed), driver=KILL.format(call=int(calls * 0.7))), -signal.SIGKILL)
    done = [m["step"] for m in read_metrics(killed) if "loss" in m]
    assert 2 <= len(done) < 8, "the kill came at the wrong place for this test"
    assert not (killed / "summary.json").exists()
    finish(command("--resume", str(killed)), 0)
    assert final_hash(killed, 8) == final_hash(whole, 8)
    assert losses(killed) == losses(whole), "each step once, and the same"
    rows = [[json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()] for run in (whole, killed)]
    assert rows[0] == rows[1]
    after = [json.loads((run / "summary.json").read_text()) for run in (whole, killed)]
    assert after[0]["after"] == after[1]["after"] and after[0]["before"] == after[1]["before"]
    assert after[0]["tokens"] == after[1]["tokens"]


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    argv = ["--algo", "grpo", "--eval-every", "0", "--checkpoint-every", "0", *RUN]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = command(*argv, "--steps", "400", "--out", str(stopped))
    deadline = time.monotonic() + 100
    while not (stopped / "metrics.jsonl").exists() or not any("loss" in m for m in read_metrics(stopped)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text = finish(process, 130)
    assert "--resume" in text and "Traceback" not in text
    done = read_metrics(stopped)[-1]["step"]
    assert (stopped / "checkpoints" / f"step-{done}").is_dir()
    finish(command("--resume", str(stopped), "--steps", str(done + 2)), 0)
    finish(command(*argv, "--steps", str(done + 2), "--out", str(whole)), 0)
    assert final_hash(stopped, done + 2) == final_hash(whole, done + 2)


def test_resume_refuses_other_options_and_says_when_done(tmp_path, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    assert main(["--algo", "rover", "--model", str(model), "--steps", "1", "--out", str(out), *SMALL_RUN]) == 0
    assert main(["--resume", str(out)]) == 0
    assert "all 1 steps are done" in capsys.readouterr().out
    assert main(["--resume", str(out), "--lr", "0.1"]) == 2
    assert "--lr cannot change" in capsys.readouterr().err
    assert main(["--resume", str(out), "--algo", "grpo"]) == 2
    assert "started with 'rover'" in capsys.readouterr().err
    # the same values in another spelling
    assert main(["--resume", str(out), "--lr", "0.001", "--temperature", "1"]) == 0
    # a run from before an option was there has the option's default
    lines = (out / "config.toml").read_text().splitlines(keepends=True)
    (out / "config.toml").write_text("".join(x for x in lines if not x.startswith(("top_p", "rho"))))
    assert main(["--resume", str(out), "--top-p", "0.5"]) == 2
    assert "--top-p cannot change when a run is resumed: it was 1.0" in capsys.readouterr().err
    assert main(["--resume", str(out), "--top-p", "1", "--rho", str(rover.Config().rho)]) == 0
    capsys.readouterr()
    weights = out / "checkpoints" / "step-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert main(["--resume", str(out), "--steps", "2"]) == 2
    assert "all checkpoints there are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("number", [None, 1])
def test_resume_refuses_the_state_of_an_earlier_version(number, tmp_path, monkeypatch, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    real = train_module.save_checkpoint

    def earlier(run_dir, step, write, state, **options):
        state = {k: v for k, v in state.items() if k != "format"} | ({} if number is None else {"format": number})
        return real(run_dir, step, write, state, **options)

    monkeypatch.setattr(train_module, "save_checkpoint", earlier)
    assert main(["--algo", "rover", "--model", str(model), "--steps", "1", "--out", str(out), *SMALL_RUN]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["--resume", str(out), "--steps", "2"]) == 2
    err = capsys.readouterr().err
    checkpoint = out / "checkpoints" / "step-1"
    assert f"saved by an earlier version of pymathrl; start a new run from its weights: --model {checkpoint}" in err
    assert err.count("\n") == 1 and {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_resume_before_the_first_checkpoint_and_after_the_last(tmp_path, capsys, monkeypatch):
    """A run killed before its first checkpoint starts over; one killed in its last evaluation only evaluates."""
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    argv = ["--algo", "rover", "--model", str(model), "--steps", "2", "--checkpoint-every", "0", "--out", str(out)]
    real = train_module.save_checkpoint
    monkeypatch.setattr(train_module, "save_checkpoint", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*argv, *SMALL_RUN]) == 130
    assert len([m for m in read_metrics(out) if "loss" in m]) == 2
    monkeypatch.setattr(train_module, "save_checkpoint", real)
    assert main(["--resume", str(out)]) == 0
    assert "starting over" in capsys.readouterr().out
    assert [m["step"] for m in read_metrics(out) if "loss" in m] == [1, 2]
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    (out / "curves.png").unlink()
    assert main(["--resume", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["after"] == summary["after"]
    assert (out / "curves.png").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    real = Optimizer.step

    def poison(self, finite_loss=True):
        report = real(self, finite_loss)
        self.parameters[0].data[0, 0] = math.inf
        return report

    monkeypatch.setattr(Optimizer, "step", poison)
    assert main(["--algo", "rover", "--model", str(model), "--steps", "1", "--out", str(out), *SMALL_RUN]) == 2
    assert "nan or infinity" in capsys.readouterr().err
    assert not list((out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("layers", [2, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "hybrid"])
def test_planned_activations_are_those_that_autograd_keeps(kind, layers):
    config = ModelConfig(
        vocab_size=32, hidden_size=64, intermediate_size=160, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=32, max_positions=256, model_type="qwen3" if kind == "qwen3" else "llama", qk_norm=kind == "qwen3",
        mamba=Mamba(128, 64, attention_layers=(1,), dt_rank=4) if kind == "hybrid" else None,
    )  # fmt: skip
    model, tokens = Decoder(config), 200
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()} | {model.rope(256).data_ptr()}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t  # alive, so that no other tensor gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model.hidden(torch.arange(tokens) % 32, torch.tensor([0, 120, tokens]))
    counted = sum(t.untyped_storage().nbytes() for t in kept.values())
    # besides the layers: the input of the last norm with its scale, ids, positions and offsets
    per_token = kept_bytes(config, 4) + 4 * config.hidden_size + 4 + 8 + 8
    assert counted == tokens * per_token + 3 * 8 + kept_states(config, tokens, sequences=2)
    policy = replace(tiny_policy(), model=model, config=config)
    options = replace(
        TrainConfig(), tokens_per_microbatch=tokens, max_prompt_tokens=100, max_new_tokens=100, minibatches=1
    )
    memory = plan_memory(options, policy, torch.device("cpu"))
    planned = memory.activations - WORKSPACE_BYTES["cpu"] - 4 * 32 * config.hidden_size
    assert counted <= planned
    assert layers == 2 or planned <= 1.25 * counted, "one layer's share besides is a large part of two layers"
    hidden.sum().backward()


def test_the_plan_counts_master_weights_once(tmp_path, monkeypatch):
    """The free memory of the plan is read while there are no masters yet."""
    model, seen = save_tiny(tmp_path / "model"), []
    real_plan, real_optimizer = train_module.plan_memory, learner_module.Optimizer
    monkeypatch.setattr(train_module, "plan_memory", lambda *a: seen.append("plan") or real_plan(*a))
    monkeypatch.setattr(learner_module, "Optimizer", lambda *a: seen.append("optimizer") or real_optimizer(*a))
    out = tmp_path / "run"
    assert main(["--algo", "rover", "--model", str(model), "--steps", "0", "--out", str(out), *SMALL_RUN]) == 0
    assert seen == ["plan", "optimizer"]


def test_recomputed_log_probs_show_the_gap_to_the_sampler(tmp_path, monkeypatch):
    """The update then starts from the second pass, so its own gap is 0; logged is what the exchange replaced."""
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    real = context_module.score

    def shifted(policy, rollout, *args):
        scores = real(policy, rollout, *args)
        logp = scores.logp + 0.25 * rollout.sampled_mask
        logp[rollout.sampled_mask.nonzero()[0]] += 0.5
        return scores._replace(logp=logp)

    argv = ["--algo", "grpo", "--model", str(model), "--steps", "1", "--old-logp", "recompute"]
    assert main([*argv, "--out", str(tmp_path / "exact"), *SMALL_RUN]) == 0
    first = next(m for m in read_metrics(tmp_path / "exact") if "loss" in m)
    assert first["logp_gap/max"] == first["logp_gap/mean"] == 0.0
    monkeypatch.setattr(context_module, "score", shifted)
    assert main([*argv, "--out", str(out), *SMALL_RUN]) == 0
    step = next(m for m in read_metrics(out) if "loss" in m)
    assert step["logp_gap/max"] == pytest.approx(0.75, abs=1e-5)
    assert 0.25 < step["logp_gap/mean"] < 0.75


def test_prompts_and_responses_share_the_positions_of_the_model(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")  # 256 positions
    argv = ["--algo", "rover", "--model", str(model), "--dry-run"]
    assert main([*argv, "--max-new-tokens", "300"]) == 2
    assert "--max-new-tokens 300" in capsys.readouterr().err
    assert main([*argv, "--max-new-tokens", "200", "--max-prompt-tokens", "1000"]) == 0


def test_a_run_on_the_built_in_model_is_better_after(tmp_path):
    """It learns: 16 steps of ROVER, one third of a default run's samples, must lift held-out accuracy by 4 points."""
    out = tmp_path / "run"
    argv = ["--steps", "16", "--eval-every", "0", "--eval-problems", "128", "--eval-samples", "8"]
    assert main(["--algo", "rover", "--out", str(out), *argv]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["after"]["pass@1"] > summary["before"]["pass@1"] + 0.04, summary


def test_nan_gradient_skips_the_step_and_spares_the_weights(tmp_path, monkeypatch):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    real, calls = learner_module.minibatch_loss, []

    def poisoned(policy_model, *args, **options):
        report = real(policy_model, *args, **options)
        calls.append(len(calls))
        if len(calls) == 3:
            next(policy_model.parameters()).grad[0, 0] = math.nan
        return report

    monkeypatch.setattr(learner_module, "minibatch_loss", poisoned)
    assert main(["--algo", "rover", "--model", str(model), "--steps", "3", "--out", str(out), *SMALL_RUN]) == 0
    assert [m["updates/skipped"] for m in read_metrics(out) if "loss" in m] == [0, 1, 1]
    saved = load_file(out / "checkpoints" / "step-3" / "model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in saved.values())
    assert json.loads((out / "summary.json").read_text())["skipped_updates"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rewards_are_reported_and_end_the_run_when_they_go_on(bad, tmp_path, monkeypatch, capsys):
    from pymathrl.tasks.countdown import Countdown

    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    before = load_file(model / "model.safetensors")
    monkeypatch.setattr(Countdown, "grade", lambda self, problem, text: Grade(bad, False, None, None, "test"))
    argv = ["--algo", "rover", "--model", str(model), "--steps", "30", "--checkpoint-every", "1", "--out", str(out)]
    assert main([*argv, *SMALL_RUN]) == 2
    captured = capsys.readouterr()
    assert "rewards are nan or infinite" in captured.out
    assert "10 updates in a row" in captured.err and "Traceback" not in captured.err
    newest = max((out / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    after = load_file(newest / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_filter_that_keeps_nothing_ends_the_run_with_its_own_sentence(tmp_path, capsys):
    """A random model has no right answer: nothing was nan, and no learning rate would help."""
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    argv = ["--algo", "dapo", "--filter-rounds", "1", "--model", str(model), "--steps", "30", "--eval-every", "0"]
    assert main([*argv, "--out", str(out), *SMALL_RUN]) == 2
    err = capsys.readouterr().err
    assert "--filter mixed kept no group in 10 steps of 1 draws each" in err and "nan" not in err
    steps = [m for m in read_metrics(out) if "filter/keep_rate" in m]
    assert len(steps) == 9 and {m["updates/skipped"] for m in steps} == {0}


def test_a_batch_of_cut_responses_only_is_no_update_to_fail_on(tmp_path):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    argv = ["--algo", "rover", "--truncated", "mask", "--model", str(model), "--steps", "3", "--eval-every", "0"]
    assert main([*argv, "--out", str(out), *SMALL_RUN, "--max-new-tokens", "1"]) == 0
    steps = [m for m in read_metrics(out) if "loss" in m]
    assert len(steps) == 3 and max(m["completions/clipped_ratio"] for m in steps) == 1
    assert {m["updates/skipped"] for m in steps} == {0}


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "model")
    assert main(["--algo", "grpo", "--model", str(model), "--max-new-tokens", "100", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for word in ("grpo", "parameters", "memory", "tokens at most", "KV cache"):
        assert word in text
    device = next(line for line in text.splitlines() if line.startswith("device"))
    assert "threads of" in device and "/" not in device, "the name of the OpenMP library, not where it lies"
    assert not (tmp_path / "runs").exists()


def test_the_plan_says_once_what_was_left_out_of_the_data(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rows = [f'{{"question": "{n}+1=?", "answer": {n + 1}}}\n' for n in range(3)]
    (data / "train.jsonl").write_text("".join(rows))
    (data / "test.jsonl").write_text(rows[2])
    (tmp_path / "two.toml").write_text("[[stage]]\nsteps = 1\n[[stage]]\nsteps = 1\n")
    model = str(save_tiny(tmp_path / "model"))
    run = ["--algo", "grpo", "--model", model, "--task", str(data), "--max-new-tokens", "9", "--dry-run"]
    assert main([*run, "--config", str(tmp_path / "two.toml")]) == 0
    text = capsys.readouterr().out
    assert text.count(f"\ndata      {data}: 1 train rows whose question is in the test split left out\n") == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"nums": [1, 2, 3], "target": 6}', '{"nums": [1, 2'], ["line 2"]),
        (['{"nums": [1, "x"], "target": 6}'], ["line 1", "nums"]),
        (['{"nums": [1, 2]}'], ["line 1", "target"]),
        ([], ["empty"]),
    ],
)
def test_broken_problem_file_names_line_and_field(lines, words, tmp_path, capsys):
    model, file = save_tiny(tmp_path / "model"), tmp_path / "problems.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    assert main(["--algo", "rover", "--model", str(model), "--task", str(file), *SMALL_RUN]) == 2
    err = capsys.readouterr().err
    assert "problems.jsonl" in err and err.count("\n") == 1
    for word in words:
        assert word in err.replace("no rows", "empty").replace("no problem", "empty"), err


@pytest.mark.parametrize("row", ['{"nums": [1, 2, 3], "target": 6}', '{"question": "1 + 1?", "answer": "2"}'])
def test_a_file_that_is_all_for_evaluation_is_refused_before_the_run_folder(row, tmp_path, capsys):
    model, file, out = save_tiny(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text((row + "\n") * 3)
    argv = ["--algo", "rover", "--model", str(model), "--task", str(file), "--task-split", "all", "--out", str(out)]
    assert main([*argv, *SMALL_RUN]) == 2
    err = capsys.readouterr().err
    assert "rows.jsonl: no row is left to train on" in err and err.count("\n") == 1 and not out.exists()


def test_output_folder_that_cannot_be_written(tmp_path, capsys):
    model, blocker = save_tiny(tmp_path / "model"), tmp_path / "file"
    blocker.write_text("in the way")
    assert main(["--algo", "rover", "--model", str(model), "--out", str(blocker / "run"), *SMALL_RUN]) == 2
    err = capsys.readouterr().err
    assert str(blocker) in err and err.count("\n") == 1


def test_disk_full_while_saving_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "run"
    real, calls = train_module.save, []

    def full(policy, folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(folder))
        real(policy, folder)

    monkeypatch.setattr(train_module, "save", full)
    argv = ["--algo", "rover", "--model", str(model), "--steps", "3", "--checkpoint-every", "1", "--out", str(out)]
    assert main([*argv, *SMALL_RUN]) == 2
    err = capsys.readouterr().err
    assert "No space left" in err or "disk is full" in err.lower() or "space" in err
    monkeypatch.setattr(train_module, "save", real)
    assert main(["--resume", str(out)]) == 0
    assert [m["step"] for m in read_metrics(out) if "loss" in m] == [1, 2, 3]
