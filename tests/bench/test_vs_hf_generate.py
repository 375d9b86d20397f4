"""bench/vs_hf_generate.py: greedy tokens are those of transformers, a wrong model is refused, the limit by hand."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pymathrl.models import ModelConfig

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the package compared with
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module("vs_hf_generate")


def test_tokens_agree_and_mutants_are_refused_before_timing(bench, tmp_path, monkeypatch):
    bench.build(bench.QUICK, tmp_path)
    engine, model = bench.contestants(tmp_path, CPU)
    prompts = [[7, 100 + row, 3] for row in range(4)]
    agreement = bench.compare(engine, model, prompts, 12)
    assert agreement.ok and agreement.distinct > 12, agreement

    def never(*_):
        raise AssertionError("timed although the tokens differ")

    monkeypatch.setattr(bench, "seconds", never)
    layer = next(engine.policy.model.blocks)
    heads = layer.qkv.unflatten(0, (5, 32))  # 3 query heads, a key head, a value head
    mutants = {
        "query of another sign": lambda: heads[:3].neg_(),
        "value 10 % too large": lambda: heads[4].mul_(1.1),
        "gate and up swapped": lambda: layer.gate_up.copy_(layer.gate_up.roll(len(layer.gate_up) // 2, 0)),
    }
    whole = {name: param.detach().clone() for name, param in layer.named_parameters()}
    for name, mutate in mutants.items():
        with torch.no_grad():
            mutate()
        agreement = bench.compare(engine, model, prompts, 12)
        assert not agreement.ok, f"{name}: {agreement}"
        assert "differs first at new token" in str(agreement)
        with pytest.raises(SystemExit, match="not timed"):
            bench.run_batch(engine, model, None, 4, 12, 5)
        layer.load_state_dict(whole)
    assert bench.compare(engine, model, prompts, 12).ok


def test_a_tie_is_accepted_and_nan_is_not(bench):
    assert bench.Agreement(4, 3, 9, 1, 5, gap=1e-4, spreads=5e-4).ok
    assert not bench.Agreement(4, 3, 9, 1, 5, gap=1e-2, spreads=2e-3).ok
    assert not bench.Agreement(4, 3, 9, 1, 5, gap=float("nan"), spreads=float("nan")).ok


def test_limit_by_hand(bench):
    """D=4, one layer, 2 query heads and 1 key/value head of 2, F=8, V=10, 4 bytes: q and out 2*16, k and v 2*8, MLP
    3*32: 144 weights; head 40; a token's keys and values 16 bytes; attention 4*4 operations per pair.

    Prompts of 3 and 1 tokens, 2 and 1 new: the prefill feeds 2 tokens, which meet 1+2 keys; the first step feeds two
    tokens over 3 and 1 keys, the second one token over 4.
    """
    config = ModelConfig(10, 4, 8, 1, 2, 1, 2, tie_embeddings=True)
    lengths = [3, 1], [2, 1]
    flops = (2 * 288 + 16 * 3) + (2 * 288 + 2 * 80 + 16 * 4) + (288 + 80 + 16 * 4)
    read = 4 * 144 + (4 * 184 + 16 * 4) + (4 * 184 + 16 * 4)
    inf = float("inf")
    assert bench.limit_s(config, 4, *lengths, inf, 100.0) == pytest.approx(flops / 100)
    assert bench.limit_s(config, 4, *lengths, 50.0, inf) == pytest.approx(read / 50)
    # each pass takes the longer of its two times: with a pass bound by each, more than either sum
    both = bench.limit_s(config, 4, *lengths, 100.0, 100.0)
    assert both == pytest.approx((max(624, 576) + max(800, 800) + max(432, 800)) / 100)


def test_quick_run_prints_one_json_object_last():
    command = [sys.executable, str(BENCH / "vs_hf_generate.py"), "--quick", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == "vs_hf_generate" and result["transformers"] and result["commit"]
    assert [row["batch"] for row in result["cases"]] == [1, 3]
    for row in result["cases"]:
        assert row["repeats"] == 5 and row["new_tokens"] == 8
        assert row["x"] == pytest.approx(row["hf_s"] / row["ours_s"], rel=1e-2)
        assert row["ours_tokens_s"] == pytest.approx(8 * row["batch"] / row["ours_s"], rel=1e-2)
        assert 0 < row["ours_frac_limit"] < 1
        assert max(row["limit_read_s"], row["limit_gemm_s"]) <= 1.01 * row["limit_s"]


def test_missing_transformers_is_one_sentence():
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(BENCH)!r}); sys.argv = ['vs_hf_generate', '--quick']\n"
        "sys.modules['transformers'] = None\n"
        f"runpy.run_path({str(BENCH / 'vs_hf_generate.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0 and "pip install transformers" in done.stderr and "Traceback" not in done.stderr
