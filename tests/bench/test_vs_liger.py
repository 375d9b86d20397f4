"""bench/vs_liger.py: ours, plain torch and Liger give the same loss and gradients; a wrong loss would be seen."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the package compared with
    pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="not installed: liger-kernel"),
]


@pytest.fixture
def vs_liger(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("vs_liger")


def test_loss_and_gradients_agree_and_a_mutant_does_not(vs_liger, monkeypatch):
    case = vs_liger.Case(6, 10, 16, 500)
    inputs = vs_liger.sampled_inputs(case)
    runs = {who: vs_liger.make(who, case, compiled=False) for who in vs_liger.WHO}
    errors = vs_liger.compare(case, inputs, runs)
    assert max(errors.values()) <= vs_liger.TOLERANCE, errors
    monkeypatch.setattr(vs_liger, "SPEC", replace(vs_liger.SPEC, terms={"clip_low": 0.2, "clip_high": 0.28}))
    errors = vs_liger.compare(case, inputs, runs)
    assert errors["ours_naive_hidden"] > 100 * vs_liger.TOLERANCE
    assert errors["liger_naive_hidden"] <= vs_liger.TOLERANCE


def test_peak_memory_of_plain_torch_holds_all_logits(vs_liger):
    """Logits, their log-softmax and the gradient of one of them at the least: 3 N V floats."""
    case = vs_liger.CASES["quick"]
    logits = 4 * case.b * case.t * case.v
    assert vs_liger.peak_in_child("quick", "naive", 1, False) >= 3 * logits
