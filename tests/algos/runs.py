"""Short runs of an algorithm through the command line, on the built-in model, which earns rewards."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from pymathrl.checkpoint import hash_parameters
from pymathrl.train import main
from tests.tiny import SMALL_RUN, read_metrics

RUN = [*SMALL_RUN, "--prompts-per-step", "8", "--max-new-tokens", "48", "--lr", "3e-4", "--eval-every", "0"]


def steps(run: Path) -> list[dict]:
    """The metrics of the steps that updated the weights."""
    return [m for m in read_metrics(run) if "loss" in m]


def short_run(out: Path, name: str, *flags: str, count: int = 2) -> list[dict]:
    """Runs `count` steps; their metrics."""
    assert main(["--algo", name, "--steps", str(count), "--out", str(out), *RUN, *flags]) == 0
    return steps(out)


def assert_resume_gives_the_same_bits(folder: Path, name: str, *flags: str) -> list[dict]:
    """4 steps at once, and 2, a checkpoint and 2 more: the same weights and losses. Returns the first's metrics."""
    whole, parts = folder / "whole", folder / "parts"
    metrics = short_run(whole, name, *flags, count=4)
    short_run(parts, name, *flags, count=2)
    assert main(["--resume", str(parts), "--steps", "4"]) == 0
    weights = [load_file(run / "checkpoints" / "step-4" / "model.safetensors") for run in (whole, parts)]
    assert hash_parameters(weights[0].items()) == hash_parameters(weights[1].items())
    names = ("loss", "grad_norm", "reward", *(key for key in metrics[0] if key.startswith(f"{name}/")))
    assert [[m[n] for n in names] for m in steps(parts)] == [[m[n] for n in names] for m in metrics]
    return metrics
