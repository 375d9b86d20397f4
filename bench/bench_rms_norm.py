"""add_rms_norm: forward + backward, against torch's addition, rms_norm and autograd.

python bench/bench_rms_norm.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Bench, parse, relative_error, require

from pymathrl.ops.rms_norm import add_rms_norm, add_rms_norm_ref

SHAPES = ((2304, 64), (8192, 96), (4352, 256))  # N, D
EPS = 1e-6
LIMIT = 1e-6  # relative L2 error of the gradient against float64


def eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    h = x + residual
    return h, F.rms_norm(h, weight.shape, weight, eps)


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("rms_norm", args.device, args.quick)
    for rows, width in SHAPES[:1] if args.quick else SHAPES:
        generator = torch.Generator().manual_seed(0)
        x, residual, dh, dy = (torch.randn(rows, width, generator=generator).to(args.device) for _ in range(4))
        weight = torch.rand(width, generator=generator).to(args.device)
        inputs = tuple(t.requires_grad_() for t in (x, residual, weight))

        def gradient(op, inputs=inputs, seeds=(dh, dy)) -> torch.Tensor:
            return torch.autograd.grad(op(*inputs, EPS), inputs, seeds)[0]

        def check(gradient=gradient, inputs=inputs, seeds=(dh, dy)) -> float:
            wide = tuple(t.detach().double().requires_grad_() for t in inputs)
            expected = gradient(add_rms_norm_ref, wide, tuple(t.double() for t in seeds))
            require(relative_error(gradient(eager), expected), LIMIT, "the eager twin")
            return require(relative_error(gradient(add_rms_norm), expected), LIMIT, "rms_norm")

        bench.case(
            {"pass": "forward+backward", "N": rows, "D": width},
            lambda gradient=gradient: gradient(add_rms_norm),
            bytes_moved=4 * rows * width * 8,
            check=check,
            eager=lambda gradient=gradient: gradient(eager),
            cold=False,
        )


if __name__ == "__main__":
    main()
