"""causal_conv1d with its silu, forward and forward + backward, against torch's grouped conv1d. That knows neither
packed sequences nor the repeat of x: it gets one sequence, channel-major, with x repeated before it.

python bench/bench_causal_conv1d.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Bench, parse, relative_error, require

from pymathrl.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref, repeat_groups

WIDTH, GROUP = 4, 16
SHAPES = {  # T, D, X: a small layer; the layer of M1-3B
    "cpu": ((512, 1536, 512), (4096, 1536, 512), (4096, 3072, 1024)),
    "cuda": ((4096, 3072, 1024), (32768, 3072, 1024)),
}
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # relative L2 error against float64


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("causal_conv1d", args.device, args.quick)
    dtypes = (torch.float32,) if args.device == "cpu" else (torch.float32, torch.bfloat16)
    shapes = SHAPES[args.device]
    for tokens, channels, sources, dtype in [(*s, d) for s in (shapes[:1] if args.quick else shapes) for d in dtypes]:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size, generator=generator: torch.randn(*size, generator=generator)
        x, du = draw(tokens, sources).to(args.device, dtype), draw(tokens, channels).to(args.device, dtype)
        weight, bias = draw(channels, WIDTH).to(args.device), draw(channels).to(args.device)
        offsets = torch.tensor([0, tokens], device=args.device)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        case = {"T": tokens, "D": channels, "X": sources, "dtype": str(dtype).removeprefix("torch.")}

        def ours(x, weight, bias, offsets=offsets):
            return causal_conv1d(x, weight, bias, offsets, group=GROUP)

        def reference(x, weight, bias, offsets=offsets):
            return causal_conv1d_ref(x, weight, bias, offsets, group=GROUP)[0]

        def library(x, weight, bias, copies=channels // sources):
            rows = repeat_groups(x, GROUP, copies).t()[None].to(weight.dtype)
            u = F.conv1d(rows, weight[:, None], bias, padding=WIDTH - 1, groups=weight.shape[0])
            return F.silu(u[0, :, : x.shape[0]]).t().to(x.dtype)

        def forward(op, inputs=(x, weight, bias)) -> torch.Tensor:
            with torch.no_grad():
                return op(*inputs)

        def gradient(op, inputs=leaves, du=du) -> list[torch.Tensor]:
            return list(torch.autograd.grad(op(*inputs), inputs, du))

        def check_forward(forward=forward, inputs=(x, weight, bias), limit=LIMIT[dtype], reference=reference) -> float:
            exact = forward(reference, [t.double() for t in inputs])
            return require(relative_error(forward(ours), exact), limit, "causal_conv1d")

        def check(gradient=gradient, inputs=leaves, du=du, limit=LIMIT[dtype], reference=reference) -> float:
            exact = gradient(reference, [t.detach().double().requires_grad_() for t in inputs], du.double())
            errors = [relative_error(a, b) for a, b in zip(gradient(ours), exact, strict=True)]
            return require(max(errors), limit, "the gradient of causal_conv1d")

        size = tokens * x.element_size()
        bench.case(
            {"pass": "forward", **case},
            lambda forward=forward, ours=ours: forward(ours),
            bytes_moved=size * (sources + channels),
            check=check_forward,
            eager=lambda forward=forward, library=library: forward(library),
            cold=False,
        )
        bench.case(
            {"pass": "forward+backward", **case},
            lambda gradient=gradient, ours=ours: gradient(ours),
            bytes_moved=size * (3 * sources + 2 * channels),
            check=check,
            eager=lambda gradient=gradient, library=library: gradient(library),
            cold=False,
        )


if __name__ == "__main__":
    main()
