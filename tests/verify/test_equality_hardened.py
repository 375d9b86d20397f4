"""Answers that a grader got wrong once, or that are written to fool one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pymathrl.verify import equal
from pymathrl.verify.equality import decide

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "equality_hardened.jsonl").read_text(encoding="utf-8").splitlines()
]


def name_of(row: dict[str, str]) -> str:
    sign = "==" if row["expected"] else "!="
    return f"{row['cat']} {row['gold']} {sign} {row['answer'][:60]}".encode("unicode_escape").decode()


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_hardened(row):
    verdict = equal(row["gold"], row["answer"])
    assert bool(verdict) == bool(row["expected"]), f"{verdict}; {row['note']}"


@pytest.mark.parametrize("row", [r for r in ROWS if r["cat"] == "COST"], ids=name_of)
def test_bounded_without_sympy(row):
    begin = time.process_time()
    decide(row["gold"], row["answer"], symbolic=False)
    assert time.process_time() - begin < 1
