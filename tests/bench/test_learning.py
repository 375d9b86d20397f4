"""bench/learning.py: every algorithm has its place, tables come from summaries, what does not learn is named."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from pymathrl.algos import REGISTRY
from pymathrl.config import parse_train

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("learning")


def test_every_algorithm_is_measured_on_the_same_budget(learning):
    named = {}
    for label, options in {**learning.CORE, **learning.EXTENDED}.items():
        train = parse_train(options.split()).train
        assert train.prompts_per_step * train.samples_per_prompt == 512, label
        named[parse_train(options.split()).algo.name] = label
    assert set(named) == set(REGISTRY)


def test_table_means_and_what_is_flat(learning, tmp_path):
    def job(label, seed, before, after):
        folder = tmp_path / label / str(seed)
        folder.mkdir(parents=True)
        scores = {"pass@8": 0.7, "diversity": 1.0, "pass@1_se": 0.02}
        summary = {"before": {"pass@1": before, **scores}, "after": {"pass@1": after, **scores}, "steps": 20,
                   "tokens": 2_000_000, "wall_s": 50.0}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        return learning.Job(label, seed, folder, [])

    jobs = [job("grows", 0, 0.25, 0.40), job("grows", 1, 0.25, 0.42), job("flat", 0, 0.25, 0.27)]
    text, records, flat = learning.table(jobs)
    assert flat == ["flat"]
    assert records[0]["gain"] == pytest.approx(0.16) and records[0]["seeds"] == 2
    assert records[0]["gain_se"] == pytest.approx(0.02 / 2**0.5)
    assert "| grows | 25.0% → **41.0%** (40.0%, 42.0%) | 70.0% → 70.0% | 1.000 | 2.00 | 50 |" in text
    assert jobs[0].run() == "", "a run that has ended is not run again"
