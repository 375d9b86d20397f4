"""bench/b4_generation.py: the requests are nano-vllm's, a wrong model is refused, the quick run prints its figures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pymathrl.models import load

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages compared with
NANO_VLLM = """
class SamplingParams:
    def __init__(self, temperature, ignore_eos, max_tokens):
        assert temperature == 0.6 and ignore_eos
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, model, enforce_eager, max_model_len):
        pass
    def generate(self, prompts, params, use_tqdm):
        assert len(prompts) == len(params)
        return [{"token_ids": [0] * (p.max_tokens - SHORT)} for p in params]
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module("b4_generation")


def test_requests(bench):
    prompts, new = bench.requests()
    assert len(prompts) == len(new) == 256 and sum(new) == 133_966
    assert all(100 <= n <= 1024 for n in [*new, *map(len, prompts)])
    assert all(0 <= i <= 10000 for p in prompts for i in p)
    few, fewer = bench.requests(3, 0.1)
    assert few == [p[: round(0.1 * len(p))] for p in prompts[:3]]
    assert fewer == [round(0.1 * n) for n in new[:3]]
    assert bench.requests(2, 1e-9)[1] == [1, 1]


def test_log_probs_agree_and_mutants_are_refused_before_timing(bench, monkeypatch):
    policy = bench.random_policy(bench.QUICK, torch.device("cpu"), torch.float32)
    model, engine, (prompts, new) = bench.twin(policy), bench.Engine(policy, seed=0), bench.requests(3, 0.02)
    limit = bench.TOLERANCE[torch.float32]
    assert bench.gap(engine, model, prompts, new) <= limit
    assert bench.gap(engine, None, prompts, new) <= limit

    def never(*_):
        raise AssertionError("timed although the log-probs differ")

    monkeypatch.setattr(bench, "seconds", never)
    layer = next(policy.model.blocks)
    whole = {name: param.detach().clone() for name, param in layer.named_parameters()}
    mutants = {
        "norm of q twice as large": lambda: layer.q_norm.fill_(2.0),
        "value 10 % too large": lambda: layer.qkv[-32:].mul_(1.1),
        "gate and up swapped": lambda: layer.gate_up.copy_(layer.gate_up.roll(len(layer.gate_up) // 2, 0)),
    }
    for name, mutate in mutants.items():
        with torch.no_grad():
            mutate()
        assert bench.gap(engine, model, prompts, new) > limit, name
        with pytest.raises(SystemExit, match="not timed"):
            bench.run(policy, model, 3, 0.02, 5, 5)
        layer.load_state_dict(whole)
    monkeypatch.setattr(bench, "TEMPERATURE", 1.0)
    rollout = engine.generate(prompts, 1, new, temperature=0.6, stop_ids=())
    monkeypatch.setattr(bench, "ours", lambda *_: rollout)
    assert bench.gap(engine, model, prompts, new) > limit, "another temperature"


def test_quick_run_prints_one_json_object_last():
    command = [sys.executable, str(BENCH / "b4_generation.py"), "--quick", "--device", "cpu", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "nano-vllm: left out, it needs a GPU" in done.stdout
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["bench"] == "b4_generation" and row["requests"] == 3 and row["checked_against"] == "transformers"
    assert row["ours_repeats"] == row["hf_repeats"] == 5
    assert row["x_hf"] == pytest.approx(row["hf_s"] / row["ours_s"], rel=1e-2)
    assert row["ours_tokens_s"] == pytest.approx(row["output_tokens"] / row["ours_s"], rel=1e-2)
    assert 0 < row["ours_frac_limit"] < 1 and row["logp_gap"] <= 1e-4


@pytest.mark.parametrize("short", [0, 1])
def test_nano_vllm_is_asked_for_every_token(bench, tmp_path, monkeypatch, short):
    """Its interface is stood in for: the package needs a GPU. The folder is the model as nano-vllm reads it."""
    (tmp_path / "nanovllm.py").write_text(NANO_VLLM.replace("SHORT", str(short)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{BENCH.parent}")
    saved = []

    def save(policy, folder):
        importlib.import_module("pymathrl.models").save(policy, folder)
        saved.append(load(folder).model.embed.bfloat16())

    monkeypatch.setattr(bench, "save", save)
    if short:
        with pytest.raises(SystemExit, match="as many new tokens as were asked for"):
            bench.nano_vllm_in_child(bench.QUICK, 2, 0.02)
    else:
        assert bench.nano_vllm_in_child(bench.QUICK, 2, 0.02) >= 0
        timed = bench.random_policy(bench.QUICK, torch.device("cpu"), torch.bfloat16)
        assert torch.equal(saved[0], timed.model.embed)
