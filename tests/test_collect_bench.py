"""The results page of the GPU suite: logs in, JSON and Markdown out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "collect_bench.py"
ROW: dict[str, Any] = {  # as bench/common.py prints it
    "op": "token_logprob", "pass": "forward", "N": 2048, "V": 32000, "dtype": "bf16", "us": 41.5, "p20_us": 41.0,
    "p80_us": 42.25, "bytes": 131072000, "gb_s": 3158.0, "copy_gb_s": 4300.0, "frac_copy": 0.7344, "eager_us": 830.0,
    "x_eager": 20.0, "rel_error": 1.2e-7, "cold": True, "device": "NVIDIA X1", "torch": "2.13.0", "commit": "abc1234",
}  # fmt: skip


def collect(folder: Path, part: str, log: str, rc: int = 0) -> subprocess.CompletedProcess[str]:
    path = folder / "part.log"
    path.write_text(log)
    command = [sys.executable, str(SCRIPT), "--part", part, "--rc", str(rc), "--seconds", "7", "--out", str(folder),
               "--machine", "NVIDIA X1", str(path)]  # fmt: skip
    environment = os.environ | {"PYMATHRL_COMMIT": "abc1234"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def results(folder: Path, ending: str) -> str:
    (path,) = folder.glob(f"nvidia-x1-*{ending}")
    return path.read_text()


@pytest.fixture
def benched(tmp_path: Path) -> Path:
    other = ROW | {"op": "group_advantage", "us": 3.0, "cold": False, "x_eager": None, "eager_us": None}
    lines = ["N=2048 | 41.5 us median", json.dumps(ROW), "{not json", '{"no": "op"}', json.dumps(other), "all done", ""]
    done = collect(tmp_path, "bench", "\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "bench, 2 rows" in done.stdout
    return tmp_path


def test_rows_and_outcome(benched: Path) -> None:
    part = json.loads(results(benched, ".json"))["parts"]["bench"]
    assert [row["op"] for row in part["rows"]] == ["token_logprob", "group_advantage"]
    assert part["rows"][0] == ROW
    assert (part["outcome"], part["rc"], part["commit"]) == ("all done", 0, "abc1234")


def test_page(benched: Path) -> None:
    page = results(benched, ".md")
    assert "| bench | abc1234 | passed | 7 | all done |" in page
    case = "| pass=forward N=2048 V=32000 dtype=bf16 | 41.5 (41 to 42.25) | 3158 GB/s | 73 % | 20.00x | 1.2e-07 |"
    assert "## token_logprob\n\n| case |" in page and case in page
    assert "dtype=bf16 (warm) | 3 (41 to 42.25) | 3158 GB/s | 73 % | n/a |" in page


def test_parts_are_kept_and_replaced(benched: Path) -> None:
    assert collect(benched, "tests", "\x1b[31m3 failed\x1b[0m | a\n", rc=1).returncode == 0
    assert collect(benched, "bench", "cut", rc=124).returncode == 0
    parts = json.loads(results(benched, ".json"))["parts"]
    assert [(name, part["rc"], len(part["rows"])) for name, part in parts.items()] == [
        ("bench", 124, 0),
        ("tests", 1, 0),
    ]
    page = results(benched, ".md")
    assert "| bench | abc1234 | time limit | 7 | cut |" in page
    assert "| tests | abc1234 | failed (1) | 7 | 3 failed \\| a |" in page


def test_foreign_file_is_not_overwritten(benched: Path) -> None:
    (path,) = benched.glob("nvidia-x1-*.json")
    path.write_text("[]")
    done = collect(benched, "bench", "x")
    assert done.returncode == 1
    assert "is not a result file of this suite" in done.stderr and "Traceback" not in done.stderr
    assert path.read_text() == "[]"
