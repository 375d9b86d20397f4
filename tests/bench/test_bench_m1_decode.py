"""bench/bench_m1_decode.py: its bytes by hand, a wrong sampler is refused, the quick run prints its figures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_m1_decode")


def test_the_bytes_of_a_step_and_its_limit(bench) -> None:
    """By hand for batch 2 at 100 tokens. 2 of 8 layers hold 2 x 4 x 32 floats a token, 6 hold 3 x 128 + 16 x 256."""
    config, mamba = bench.MODELS["cpu"]
    policy = bench.random_policy(replace(config, mamba=mamba), torch.device("cpu"), torch.float32)
    one = bench.Contestant("hybrid", policy, 2)
    cache = 2 * (101 * 2 * 256 * 4 + 2 * 6 * 4480 * 4)
    assert one.step_bytes(100) - one.weights == cache
    parameters = sum(p.numel() for p in policy.model.parameters())
    assert one.weights == 4 * parameters
    slow = type("Slow", (), {"read_bytes_s": 1e9, "gemm_flop_s": 1e9})()
    assert one.limit_s(100, slow) == pytest.approx(4 * parameters / 1e9 + cache / 1e9)
    slow.gemm_flop_s = 1e8
    assert one.limit_s(100, slow) == pytest.approx(4 * parameters / 1e8 + cache / 1e9)


def test_a_sampler_that_differs_is_not_timed(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    config, mamba = bench.MODELS["cpu"]
    policy = bench.random_policy(replace(config, mamba=mamba), torch.device("cpu"), torch.float32)
    real = bench.score
    wrong = lambda *args: real(*args)._replace(logp=real(*args).logp + 1e-6)
    monkeypatch.setattr(bench, "score", wrong)
    with pytest.raises(AssertionError, match=r"hybrid: sampler and update pass differ by 9.* nats; not timed"):
        bench.Contestant("hybrid", policy, 2)


def test_the_quick_run() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "bench_m1_decode.py"), "--device", "cpu", "--quick", "--batch", "2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert [(row["model"], row["tokens"]) for row in result["rows"]] == [
        (model, length) for length in (64, 128) for model in ("transformer", "hybrid")
    ]
    assert all(row["tokens_s"] > 0 and row["bytes_ratio"] > 0.9 for row in result["rows"])
    assert result["rows"][3]["kv_bytes"] * 4 == result["rows"][2]["kv_bytes"]
