"""swiglu: forward into a given buffer and forward + backward, against torch's silu, product and autograd.

python bench/bench_swiglu.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops.swiglu import swiglu, swiglu_out, swiglu_ref

SHAPES = {"cpu": ((64, 256), (64, 3072), (4096, 3072)), "cuda": ((64, 3072), (8192, 3072), (8192, 8960))}  # N, F
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 3e-3}  # relative L2 error of the gradient against float64


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("swiglu", args.device, args.quick)
    dtypes = (torch.float32,) if args.device == "cpu" else (torch.float32, torch.bfloat16)
    shapes = SHAPES[args.device]
    for rows, width, dtype in [(*s, d) for s in (shapes[:1] if args.quick else shapes) for d in dtypes]:
        generator = torch.Generator().manual_seed(0)
        gate_up = (3 * torch.randn(rows, 2 * width, generator=generator)).to(args.device, dtype)
        dout = torch.randn(rows, width, generator=generator).to(args.device, dtype)
        out = torch.empty_like(dout)
        leaf = gate_up.clone().requires_grad_()
        case = {"N": rows, "F": width, "dtype": str(dtype).removeprefix("torch.")}

        def forward(gate_up=gate_up, out=out) -> torch.Tensor:
            swiglu_out(gate_up, out)
            return out

        def gradient(op, x=leaf, dout=dout) -> torch.Tensor:
            return torch.autograd.grad(op(x), x, dout)[0]

        def check_forward(forward=forward, gate_up=gate_up, limit=LIMIT[dtype]) -> float:
            return require(relative_error(forward(), swiglu_ref(gate_up.double())), limit, "swiglu")

        def check(gradient=gradient, x=leaf, dout=dout, limit=LIMIT[dtype]) -> float:
            expected = gradient(swiglu_ref, x.detach().double().requires_grad_(), dout.double())
            return require(relative_error(gradient(swiglu), expected), limit, "the gradient of swiglu")

        size = rows * width * gate_up.element_size()
        bench.case(
            {"pass": "forward", **case},
            forward,
            bytes_moved=3 * size,
            check=check_forward,
            eager=lambda gate_up=gate_up: swiglu_ref(gate_up),
            cold=False,
        )
        bench.case(
            {"pass": "forward+backward", **case},
            lambda gradient=gradient: gradient(swiglu),
            bytes_moved=8 * size,
            check=check,
            eager=lambda gradient=gradient: gradient(swiglu_ref),
            cold=False,
        )


if __name__ == "__main__":
    main()
