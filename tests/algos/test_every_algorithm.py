"""Every algorithm runs on the built-in hybrid as on the built-in transformer, by the command that a person types."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pymathrl.algos import REGISTRY
from tests.algos.runs import short_run

FLAGS = {
    "acereason": ("--minibatches", "1"),
    "spo": ("--samples-per-prompt", "1", "--pool", "16", "--offline-samples", "2"),
    "soft_tokens": ("--answer-tokens", "16"),
}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_step_on_a_hybrid(name: str, tmp_path: Path) -> None:
    """Whatever it draws, forks, forces in or takes back: the sampler's log-probs are the update's to the bit."""
    (step,) = short_run(tmp_path / "run", name, "--model", "builtin:tiny-m1", *FLAGS.get(name, ()), count=1)
    assert math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"])
    if name != "guide":  # it trains what was drawn behind a hint without the hint
        assert step.get("logp_gap/max", 0.0) == 0.0
