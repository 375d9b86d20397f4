"""The fused head and policy loss of pymathrl against Liger's LigerFusedLinearGRPOLoss and plain torch, on the CPU.

The job: hidden states [B,T,H], head [V,H] and sampled tokens in; the clipped policy loss (0.2, mean over responses of
the mean over tokens, no KL term) and the gradients of hidden states and head out, fp32. Logits are 5 N(0,1), tokens are
drawn from them, old log-probs are 0.3 N(0,1) off, so that about half of the ratios are outside the clip range.

    ours    pymathrl.loss.fused_policy_loss
    naive   all logits at once, log_softmax, gather, autograd
    liger   LigerFusedLinearGRPOLoss with its defaults (one response per chunk, loss compiled by torch.compile), but no
            KL term and no reference model; --eager: without torch.compile, which needs a C++ compiler and a minute

First loss and gradients are compared across all three; a case where two differ by more than 1e-5 (relative L2) is not
timed. Then one run of each in turn, after two untimed ones. Share of GEMM: 6 N H V operations (the product and its two
gradients, N = B T) over the time, over the best fp32 matrix product timed between them.

Peak memory: each in a fresh process, after the inputs exist and a run at the same B and T with a tiny H and V has
loaded and compiled all code: the peak of the resident memory during one run (VmHWM of Linux, reset before it) less that
before it. The returned gradients are part of it.

    python bench/vs_liger.py [--cases small large] [--repeats 7] [--threads 2] [--eager] [--quick]

One line per contestant and case, and a JSON object last.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import _commit, relative_error
from torch import Tensor

from pymathrl.algos import LossSpec
from pymathrl.devices import processor
from pymathrl.loss import TokenTerms, fused_policy_loss
from pymathrl.ops.aggregation import aggregation_coef

TOLERANCE = 1e-5
CLIP = 0.2
SPEC = LossSpec(form="clip", aggregation="seq-mean-token-mean", terms={"clip_low": CLIP, "clip_high": CLIP})
GEMM_SIZE = 1024
WHO = ("ours", "naive", "liger")
WANTED = "liger-kernel==0.8.5"


@dataclass(frozen=True)
class Case:
    """B responses of T tokens, hidden size H, vocabulary V."""

    b: int
    t: int
    h: int
    v: int

    @property
    def label(self) -> str:
        return f"B{self.b} T{self.t} H{self.h} V{self.v}"


CASES = {"small": Case(16, 64, 256, 32000), "large": Case(64, 64, 256, 32000), "quick": Case(4, 16, 64, 32000)}


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # fp32 [B,T,H], leaf with gradient
    weight: Tensor  # fp32 [V,H], leaf with gradient
    ids: Tensor  # int64 [B,T]
    old_logp: Tensor  # fp32 [B,T], nats
    advantage: Tensor  # fp32 [B]

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def plain_inputs(case: Case) -> Inputs:
    """Inputs made without any temporary of more than their own size; tokens and old log-probs at random."""
    torch.manual_seed(0)
    hidden = torch.randn(case.b, case.t, case.h)
    weight = torch.randn(case.v, case.h).mul_(5 / case.h**0.5)
    ids = torch.randint(case.v, (case.b, case.t))
    advantage = torch.randn(case.b)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), ids, torch.full((case.b, case.t), -10.0), advantage)


@torch.no_grad()
def sampled_inputs(case: Case) -> Inputs:
    """The same with tokens drawn from the logits and old log-probs near theirs."""
    inputs = plain_inputs(case)
    ids, logp = torch.empty_like(inputs.ids), torch.empty_like(inputs.old_logp)
    for row in range(case.b):
        scores = torch.log_softmax(inputs.hidden[row] @ inputs.weight.t(), -1)
        ids[row] = torch.multinomial(scores.exp(), 1)[:, 0]
        logp[row] = scores.gather(-1, ids[row, :, None])[:, 0]
    return replace(inputs, ids=ids, old_logp=logp + 0.3 * torch.randn(logp.shape))


def ours(case: Case) -> Callable[[Inputs], Tensor]:
    rows = case.b * case.t
    offsets = torch.arange(case.b + 1) * case.t
    coef = aggregation_coef(SPEC.aggregation, torch.ones(rows, dtype=torch.bool), offsets, sequences=case.b)

    def run(x: Inputs) -> Tensor:
        terms = TokenTerms(x.old_logp.flatten(), x.advantage.repeat_interleave(case.t), coef)
        loss = fused_policy_loss(x.hidden.view(rows, -1), x.weight, x.ids.flatten(), terms, SPEC).loss
        loss.backward()
        return loss

    return run


def naive(case: Case) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        logits = x.hidden @ x.weight.t()
        logp = torch.log_softmax(logits, -1).gather(-1, x.ids[..., None])[..., 0]
        ratio = (logp - x.old_logp).exp()
        a = x.advantage[:, None]
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean(1).mean()
        loss.backward()
        return loss

    return run


def liger(case: Case, compiled: bool) -> Callable[[Inputs], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", epsilon_low=CLIP, epsilon_high=CLIP, compiled=compiled
    )
    mask = torch.ones(case.b, case.t)

    def run(x: Inputs) -> Tensor:
        loss, _ = module(x.hidden, x.weight, x.ids, mask, x.advantage, old_per_token_logps=x.old_logp)
        loss.backward()
        return loss

    return run


def make(who: str, case: Case, compiled: bool) -> Callable[[Inputs], Tensor]:
    """The job as one call that fills the gradients of its inputs and returns the loss."""
    return liger(case, compiled) if who == "liger" else {"ours": ours, "naive": naive}[who](case)


def compare(case: Case, inputs: Inputs, runs: dict[str, Callable[[Inputs], Tensor]]) -> dict[str, float]:
    """Relative L2 differences of loss and both gradients, ours and Liger's to plain torch's, and ours to Liger's."""
    results: dict[str, list[Tensor]] = {}
    for who, run in runs.items():
        inputs.clear()
        loss = run(inputs).detach()
        assert inputs.hidden.grad is not None and inputs.weight.grad is not None
        results[who] = [loss, inputs.hidden.grad, inputs.weight.grad]
    inputs.clear()
    errors = {}
    for a, b in (("ours", "naive"), ("liger", "naive"), ("ours", "liger")):
        for name, got, expected in zip(("loss", "hidden", "weight"), results[a], results[b], strict=True):
            errors[f"{a}_{b}_{name}"] = relative_error(got, expected)
    return errors


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (highest since the last reset) of this process.

    Not getrusage: the ru_maxrss of a child starts at its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def peak(case: Case, who: str, compiled: bool) -> int:
    """Bytes of resident memory that one run needs above what the process holds. For a fresh process only."""
    run = make(who, case, compiled)
    run(plain_inputs(replace(case, h=8, v=64)))
    inputs = plain_inputs(case)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    run(inputs)
    return resident("VmHWM") - before


def peak_in_child(name: str, who: str, threads: int, compiled: bool) -> int:
    command = [sys.executable, str(Path(__file__)), "--cases", name, "--threads", str(threads), "--peak", who]
    command += [] if compiled else ["--eager"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: measuring the memory of {who} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def run_case(name: str, repeats: int, threads: int, compiled: bool) -> dict[str, Any]:
    case = CASES[name]
    inputs = sampled_inputs(case)
    runs = {who: make(who, case, compiled) for who in WHO}
    errors = compare(case, inputs, runs)
    print(
        f"{name} {case.label} | " + ", ".join(f"{k.replace('_', ' ')} {v:.1e}" for k, v in errors.items()), flush=True
    )
    if not all(error <= TOLERANCE for error in errors.values()):  # also refuses nan
        raise SystemExit(f"error: case {name}: loss or gradients differ by more than {TOLERANCE:.0e}; not timed")
    square, product = torch.randn(2, GEMM_SIZE, GEMM_SIZE), torch.empty(GEMM_SIZE, GEMM_SIZE)
    times: dict[str, list[float]] = {who: [] for who in (*WHO, "gemm")}
    for _ in range(repeats + 1):  # the comparison was the first untimed run
        for who in WHO:
            inputs.clear()
            begin = time.perf_counter()
            runs[who](inputs)
            times[who].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        torch.mm(square[0], square[1], out=product)
        times["gemm"].append(time.perf_counter() - begin)
    times = {who: samples[1:] for who, samples in times.items()}
    ceiling = 2 * GEMM_SIZE**3 / min(times["gemm"])
    flops = 6.0 * case.b * case.t * case.h * case.v
    row: dict[str, Any] = {
        "case": name,
        "shape": case.label,
        "repeats": repeats,
        "gemm_gflop_s": ceiling / 1e9,
        **errors,
    }
    for who in WHO:
        median, best = statistics.median(times[who]), min(times[who])
        row |= {f"{who}_s": median, f"{who}_best_s": best, f"{who}_frac_gemm": flops / median / ceiling}
        row[f"{who}_peak_bytes"] = peak_in_child(name, who, threads, compiled)
    for who in ("naive", "liger"):
        row[f"x_{who}"] = row[f"{who}_s"] / row["ours_s"]
        row[f"memory_x_{who}"] = row[f"{who}_peak_bytes"] / row["ours_peak_bytes"]
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    for who in WHO:
        ratio = (
            "" if who == "ours" else f" | ours {row[f'x_{who}']:.2f}x faster, {row[f'memory_x_{who}']:.2f}x less memory"
        )
        print(
            f"  {who:<6} {row[f'{who}_s']:.4f} s median, {row[f'{who}_best_s']:.4f} best of {repeats} | "
            f"{100 * row[f'{who}_frac_gemm']:.0f} % of GEMM ({row['gemm_gflop_s']:.0f} GFLOP/s) | "
            f"peak {row[f'{who}_peak_bytes'] / 1e6:.0f} MB{ratio}",
            flush=True,
        )
    return row


def versions() -> dict[str, str]:
    """Versions of what is compared; exits with what to install where Liger is missing."""
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"error: {error.name or error} is not installed; pip install {WANTED}") from None
    from importlib.metadata import version

    return {
        "liger": version("liger-kernel"), "torch": torch.__version__, "python": platform.python_version(),
        "commit": _commit(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["small", "large"], help="[small large]")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each, at least 5 [7]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all [2]")
    parser.add_argument("--quick", action="store_true", help="the quick case, 5 repeats, --eager: does it work at all")
    parser.add_argument("--eager", action="store_true", help="Liger without torch.compile")
    parser.add_argument("--peak", choices=WHO, help="only print the peak memory of one run of this one, in bytes")
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error(f"--repeats must be at least 5, got {args.repeats}")
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(args.threads)
    found = versions()
    if args.peak:
        print(peak(CASES[args.cases[0]], args.peak, not args.eager))
        return 0
    print(f"{processor()}, {args.threads} threads | " + ", ".join(f"{k} {v}" for k, v in found.items()), flush=True)
    names, repeats = (["quick"], 5) if args.quick else (args.cases, args.repeats)
    compiled = not (args.eager or args.quick)
    rows = [run_case(name, repeats, args.threads, compiled) for name in names]
    head = {"bench": "vs_liger", "machine": processor(), "threads": args.threads, "liger_compiled": compiled, **found}
    print(json.dumps({**head, "cases": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
