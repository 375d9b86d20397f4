"""The harness of every op bench: first is it right, then how fast, then how far from the physical limit.

One case = a kernel call, the bytes it must move, a check against the reference, and torch eager for the same job.
Kernel, eager and a plain copy (the bandwidth ceiling) are timed interleaved in one run, so that a busy machine or a
clock change hits all three. Per case two lines on stdout: one to read, one JSON object (last).

    python bench/bench_<op>.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pymathrl import devices

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # one direction of the ceiling's copy: far larger than any cache
FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # written between cold calls; also hides the launch from the timer
QUICK_SHARE = 8  # --quick divides the repetitions by this


def parse(description: str) -> argparse.Namespace:
    """The flags of every bench; `device` is checked here, so that a case can rely on it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and the small shapes only")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU on this machine; use --device cpu")
    return args


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median: float
    p20: float
    p80: float


class Bench:
    """The cases of one op on one device."""

    def __init__(self, op: str, device: str, quick: bool = False) -> None:
        self.op, self.device, self.quick = op, device, quick
        self.machine = devices.machine(torch.device(device))
        self._flush = torch.empty(FLUSH_BYTES[device], dtype=torch.uint8, device=device)
        self._source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def case(
        self,
        shape: dict[str, Any],
        run: Callable[[], Any],
        *,
        bytes_moved: int,
        check: Callable[[], float],
        eager: Callable[[], Any] | None = None,
        cold: bool = True,
        repeats: int | None = None,
    ) -> dict[str, Any]:
        """Check, time and print one case; returns the JSON object.

        shape: what names the case, e.g. {"pass": "forward", "N": 2048, "V": 32000, "dtype": "bf16"}.
        run: one call of the kernel on inputs made beforehand.   eager: the same job in plain torch.
        check: compares `run` with the reference, raises where it is wrong, returns the relative L2 error.
        bytes_moved: what the call must read and write once, from the op's header.
        cold: write a large buffer before each call, so that nothing of the input is in a cache (off for calls of
              microseconds, whose cost is the call and not the memory).
        repeats: timed samples (default 40 on a GPU, 15 on a CPU; divided by 8 under --quick, at least 5).
        """
        error = check()
        repeats = repeats or (40 if self.device == "cuda" else 15)
        repeats = max(5, repeats // QUICK_SHARE) if self.quick else repeats
        copy = lambda: self._target.copy_(self._source)
        jobs = [run, copy] + ([eager] if eager else [])
        inner = [self._inner(job, cold) for job in jobs]
        samples: list[list[float]] = [[] for _ in jobs]
        for _ in range(repeats):
            for job, count, out in zip(jobs, inner, samples, strict=True):
                out.append(self._time(job, count, cold))
        timing = [_summary(s) for s in samples]
        copy_gb_s = 2 * COPY_BYTES[self.device] / timing[1].median / 1e3
        gb_s = bytes_moved / timing[0].median / 1e3
        row: dict[str, Any] = {
            "op": self.op, **shape, "us": timing[0].median, "p20_us": timing[0].p20, "p80_us": timing[0].p80,
            "bytes": bytes_moved, "gb_s": gb_s, "copy_gb_s": copy_gb_s, "frac_copy": gb_s / copy_gb_s,
            "eager_us": timing[2].median if eager else None,
            "x_eager": timing[2].median / timing[0].median if eager else None,
            "rel_error": error, "cold": cold, "device": self.machine, "torch": torch.__version__, "commit": _commit(),
        }  # fmt: skip
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        label = " ".join(f"{k}={v}" for k, v in shape.items())
        ratio = f"{row['x_eager']:.2f}x torch eager" if eager else "no eager twin"
        print(
            f"{self.op:<16} {label} | {timing[0].median:.1f} us median"
            f" (p20 {timing[0].p20:.1f}, p80 {timing[0].p80:.1f})"
            f" | {gb_s:.1f} GB/s = {100 * row['frac_copy']:.0f} % of copy ({copy_gb_s:.0f} GB/s) | {ratio}"
            f" | rel. error {error:.1e}"
        )
        print(json.dumps(row), flush=True)
        return row

    def _inner(self, job: Callable[[], Any], cold: bool) -> int:
        """Calls per sample: one where the cache is flushed before it, else as many as fill 2 ms."""
        job()
        once = self._time(job, 1, cold=False)
        return 1 if cold else max(1, int(2000 / max(once, 0.5)))

    def _time(self, job: Callable[[], Any], count: int, cold: bool) -> float:
        """Microseconds per call over `count` calls."""
        if cold:
            self._flush.fill_(count & 1)
        if self.device == "cpu":
            begin = time.perf_counter_ns()
            for _ in range(count):
                job()
            return (time.perf_counter_ns() - begin) / 1e3 / count
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            job()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / count


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected|| in float64."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def require(error: float, limit: float, what: str) -> float:
    """The error, or an exception: a kernel that is wrong is not timed."""
    if not error <= limit:  # also refuses nan
        raise AssertionError(f"{what}: relative L2 error {error:.3e} is above {limit:.1e}; not timed")
    return error


def _summary(samples: list[float]) -> Timing:
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), cuts[0], cuts[3])


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def quiet() -> None:
    """Offline and silent: the peers' notices are about models and services that are not used here."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
