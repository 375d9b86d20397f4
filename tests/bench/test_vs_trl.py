"""bench/vs_trl.py: ours and TRL agree on one batch, a wrong loss is refused, and the quick run prints its figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MISSING = [name for name in ("trl", "transformers", "datasets") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages compared with
needs_trl = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture
def vs_trl(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module("vs_trl")


@needs_trl
def test_loss_and_gradients_agree_and_mutants_do_not(vs_trl, tmp_path):
    case = vs_trl.QUICK
    model = vs_trl.build(case, tmp_path)
    ours = vs_trl.Ours(case, tmp_path)
    trainer, reward = vs_trl.trainer_for(case, model, 1, tmp_path)
    good = vs_trl.compare(trainer, reward, ours)
    assert good.ok, good
    mutants = {
        "clip_low 0.1": replace(ours.spec, terms={"clip_low": 0.1, "clip_high": 0.2}),
        "clip_high 0.28": replace(ours.spec, terms={"clip_low": 0.2, "clip_high": 0.28}),
        "sum over tokens": replace(ours.spec, aggregation="seq-mean-token-sum"),
    }
    for name, spec in mutants.items():
        assert not vs_trl.compare(trainer, reward, ours, spec).ok, name


def test_flops_by_hand(vs_trl):
    """d=4, 1 layer, V=10, R=1, 8 rows of one group: 4 prompt tokens once in generation, 4 per row in the update.

    Weights per token: q and out 2*16, k and v 2*8, MLP 3*32 = 144, so 288 operations; attention 4*4 per pair of the
    1+2+3+4 = 10 pairs of a prompt; head 2*4*10 = 80 per row.
    """
    prompt = 4 * 288 + 16 * 10
    assert vs_trl.step_flops(vs_trl.Case(4, 1, 10, 1, batch=8)) == prompt + 8 * 80 + 3 * 8 * (prompt + 80)


def test_one_character_per_token(vs_trl):
    tokenizer = vs_trl.backend(4096)
    assert tokenizer.get_vocab_size() == 4096
    assert len(tokenizer.encode("7+8=").ids) == vs_trl.PROMPT_TOKENS
    ids = list(range(4096))
    assert tokenizer.encode(tokenizer.decode(ids)).ids == ids


@needs_trl
def test_quick_run_prints_one_json_object_last():
    command = [sys.executable, str(BENCH / "vs_trl.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["cases"][0]
    assert row["steps"] == 5 and row["gradient_error"] <= 1e-5
    assert row["ours_x"] == pytest.approx(row["trl_s"] / row["ours_s"], rel=1e-2)


@pytest.mark.parametrize("script, wanted", [("vs_trl", "pip install trl"), ("vs_liger", "pip install liger-kernel")])
def test_missing_package_is_one_sentence(script, wanted):
    """Both benches, run where the peer cannot be imported."""
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(BENCH)!r}); sys.argv = [{script!r}, '--quick']\n"
        "sys.modules['trl'] = sys.modules['liger_kernel'] = None\n"
        f"runpy.run_path({str(BENCH / (script + '.py'))!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0 and wanted in done.stderr and "Traceback" not in done.stderr
