"""linear against torch.mm into a given tensor: decode, prefill, training and the output head; rows into one product.

The limit is the larger of two times: the bytes at the copy's bandwidth, and the flops at the rate that torch.mm reaches
on a large square product (what this machine's processor gives a tuned library).

python bench/bench_linear.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import json
import time

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops.linear import linear_out

SHAPES = (  # M, K, N
    (1, 576, 3072), (16, 576, 3072), (64, 576, 3072), (64, 64, 128), (16, 576, 49152),
    (2304, 64, 256), (2304, 256, 576), (2304, 576, 1536), (2304, 1536, 576),
)  # fmt: skip
QUICK = ((1, 576, 960), (64, 64, 128), (512, 576, 960))
LIMIT = 1e-6  # relative L2 error against float64


def peak_gflop_s(device: str, size: int = 1536) -> float:
    """The best of 10 large products by torch.mm."""
    a, out = torch.rand(size, size, device=device), torch.empty(size, size, device=device)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        torch.mm(a, a.t(), out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times) / 1e9


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("linear", args.device, args.quick)
    peak = peak_gflop_s(args.device)
    for rows, depth, columns in QUICK if args.quick else SHAPES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, depth, generator=generator).to(args.device)
        w = torch.randn(columns, depth, generator=generator).to(args.device)
        out, eager_out = (torch.empty(rows, columns, device=args.device) for _ in range(2))
        run = lambda x=x, w=w, out=out: linear_out(x, w, out, exact=True)
        eager = lambda x=x, w=w, out=eager_out: torch.mm(x, w.t(), out=out)

        def check(run=run, eager=eager, x=x, w=w) -> float:
            expected = torch.mm(x.double(), w.double().t())
            require(relative_error(eager(), expected), LIMIT, "the eager twin")
            return require(relative_error(run(), expected), LIMIT, "linear")

        moved = 4 * (rows * depth + columns * depth + rows * columns)
        row = bench.case(
            {"pass": "forward", "M": rows, "K": depth, "N": columns},
            run, bytes_moved=moved, check=check, eager=eager, cold=rows < 64,
        )  # fmt: skip
        flops = 2 * rows * depth * columns
        limit_us = max(moved / row["copy_gb_s"] / 1e3, flops / peak / 1e3)
        numbers = {"gflop_s": flops / row["us"] / 1e3, "peak_gflop_s": peak, "frac_limit": limit_us / row["us"]}
        print(json.dumps({"op": "linear", **{k: float(f"{v:.4g}") for k, v in numbers.items()}}), flush=True)


if __name__ == "__main__":
    main()
