"""The program for compute-sanitizer: it covers every op of the build, and its calls are valid (seen on the CPU)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu_ops_once import RUNS


def test_covers_every_op_of_the_build() -> None:
    cmake = Path(__file__).parents[1] / "CMakeLists.txt"
    found = re.search(r"set\(PYMATHRL_OPS ([^)]*)\)", cmake.read_text())
    assert found is not None
    assert sorted(RUNS) == sorted(found[1].split())


@pytest.mark.parametrize("op", RUNS)
def test_calls_are_valid(op: str, device: str) -> None:
    RUNS[op](device)
