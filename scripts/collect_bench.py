#!/usr/bin/env python3
"""Add the log of one part of the GPU suite to the machine's results: a JSON file, and the same as a Markdown page.

    python scripts/collect_bench.py --part bench --rc 0 --seconds 312 [--out bench/results] [--machine NAME] LOG

Every line of LOG that is a JSON object with an "op" becomes a row (bench/common.py prints one per case); the last line
of text stands for the outcome. A part that ran before on the same machine and day is replaced, the others stay. The
commit comes from git, or from PYMATHRL_COMMIT in a tree without its history.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What bench/common.py measures or notes; every other key of a row names the case.
MEASURED = ("us", "p20_us", "p80_us", "bytes", "gb_s", "copy_gb_s", "flop", "tflop_s", "frac_copy", "frac_peak",
            "eager_us", "x_eager", "rel_error", "cold", "device", "torch", "commit")  # fmt: skip


def parse_rows(log: str) -> list[dict[str, Any]]:
    """The JSON objects with an "op" among the lines of a log."""
    rows = []
    for line in log.splitlines():
        if not line.startswith("{"):
            continue
        try:
            value = json.loads(line)
        except ValueError:  # text that happens to begin with a brace, or a line cut by a time limit
            continue
        if isinstance(value, dict) and "op" in value:
            rows.append(value)
    return rows


def outcome(log: str) -> str:
    """The last line of text: what a program says of itself at its end."""
    texts = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("{")]
    return re.sub(r"\x1b\[[0-9;]*m", "", texts[-1])[:200] if texts else "printed nothing"


def machine() -> dict[str, str]:
    gpu, _, driver = _say(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).partition(", ")
    return {
        "gpu": gpu or platform.machine(),
        "driver": driver.split("\n")[0],
        "cuda": _say(["nvcc", "--version"]).rpartition("release ")[2].split(",")[0] or "none",
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def commit() -> str:
    return os.environ.get("PYMATHRL_COMMIT") or _say(["git", "rev-parse", "--short", "HEAD"]) or "unknown"


def _say(command: list[str]) -> str:
    """What a command prints; empty where it is absent or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def render(result: dict[str, Any]) -> str:
    """The Markdown page of a result file."""
    about = result["machine"]
    lines = [
        f"# {about['gpu']}, {result['date']}", "",
        f"Driver {about['driver'] or 'none'}, nvcc {about['cuda']}, torch {about['torch']}, Python {about['python']}. "
        "Made by `scripts/gpu_suite.sh`.", "",
        "| part | commit | result | seconds | last line |", "|---|---|---|---:|---|",
    ]  # fmt: skip
    for name, part in result["parts"].items():
        verdict = {0: "passed", 124: "time limit"}.get(part["rc"], f"failed ({part['rc']})")
        lines.append(f"| {name} | {part['commit']} | {verdict} | {part['seconds']} | {_cell(part['outcome'])} |")
    rows = [row for part in result["parts"].values() for row in part["rows"]]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [
            "", f"## {op}", "",
            "| case | us, median (p20 to p80) | rate | of the measured copy | against torch eager | rel. error |",
            "|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        lines += [_row(row) for row in rows if row["op"] == op]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    case = " ".join(f"{k}={v}" for k, v in row.items() if k != "op" and k not in MEASURED)
    if row.get("cold") is False:
        case += " (warm)"
    spread = f" ({row['p20_us']:g} to {row['p80_us']:g})" if "p20_us" in row and "p80_us" in row else ""
    rates = [f"{row[key]:g} {unit}" for key, unit in (("gb_s", "GB/s"), ("tflop_s", "TFLOP/s")) if row.get(key)]
    share = f"{100 * row['frac_copy']:.0f} %" if row.get("frac_copy") is not None else "n/a"
    eager = f"{row['x_eager']:.2f}x" if row.get("x_eager") is not None else "n/a"
    error = f"{row['rel_error']:.1e}" if row.get("rel_error") is not None else "n/a"
    time = f"{row['us']:g}{spread}" if row.get("us") is not None else "n/a"
    return f"| {_cell(case)} | {time} | {', '.join(rates) or 'n/a'} | {share} | {eager} | {error} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def add_part(path: Path, name: str, part: dict[str, Any], about: dict[str, str], date: str) -> dict[str, Any]:
    """The result file at `path` with this part put in, written beside it as Markdown too."""
    result: dict[str, Any] = {"machine": about, "date": date, "parts": {}}
    if path.exists():
        try:
            result["parts"] = json.loads(path.read_text())["parts"]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"collect_bench: {path} is not a result file of this suite; move it away and run the part again")
    result["parts"][name] = part
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path, json.dumps(result, indent=1) + "\n"), (path.with_suffix(".md"), render(result))):
        draft = target.with_name(target.name + ".tmp")
        draft.write_text(text)
        draft.replace(target)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, metavar="LOG")
    parser.add_argument("--part", required=True, help="which part of the suite the log is of")
    parser.add_argument("--rc", type=int, required=True, help="its exit status; 124 = stopped at its time limit")
    parser.add_argument("--seconds", type=int, required=True, help="how long it took")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--machine", help="name to file the results under (default: the GPU's)")
    args = parser.parse_args()
    log = args.log.read_text(errors="replace")
    about = machine()
    if args.machine:
        about["gpu"] = args.machine
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    stem = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    path = args.out / f"{stem}-{date}.json"
    part = {"rc": args.rc, "seconds": args.seconds, "commit": commit(), "outcome": outcome(log),
            "rows": parse_rows(log)}  # fmt: skip
    add_part(path, args.part, part, about, date)
    print(f"{path.with_suffix('.md')}: {args.part}, {len(part['rows'])} rows")


if __name__ == "__main__":
    main()
