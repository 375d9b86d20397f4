"""rotary: forward + backward, with and without the norms of the heads, against the same in plain torch with autograd.

python bench/bench_rotary.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops.rotary import rotary, rotary_ref

# N, query heads, key/value heads, head size
SHAPES = {"cpu": ((512, 8, 2, 16), (4096, 16, 8, 128)), "cuda": ((512, 16, 8, 128), (16384, 16, 8, 128))}
POSITIONS = 2048
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # relative L2 error of qkv's gradient against float64


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("rotary", args.device, args.quick)
    dtypes = (torch.float32,) if args.device == "cpu" else (torch.float32, torch.bfloat16)
    shapes = SHAPES[args.device]
    for shape, dtype in [(s, d) for s in (shapes[:1] if args.quick else shapes) for d in dtypes]:
        rows, heads, kv_heads, head_dim = shape
        width = (heads + 2 * kv_heads) * head_dim
        generator = torch.Generator().manual_seed(0)
        qkv, dout = (torch.randn(rows, width, generator=generator).to(args.device, dtype) for _ in range(2))
        position = torch.arange(rows, device=args.device) % POSITIONS
        angle = torch.outer(torch.arange(POSITIONS), 1e6 ** (-2 / head_dim * torch.arange(head_dim // 2).double()))
        rope = torch.cat([angle.cos(), angle.sin()], -1).float().to(args.device)
        norms = [(1 + 0.1 * torch.randn(head_dim, generator=generator)).to(args.device, dtype) for _ in range(2)]
        for leaves in ([qkv], [qkv, *norms]):
            leaves = [t.clone().requires_grad_() for t in leaves]

            def gradient(
                op, leaves=leaves, dout=dout, rope=rope, position=position, rest=(heads, kv_heads, head_dim**-0.5)
            ) -> torch.Tensor:
                out = op(leaves[0], position, rope, *rest, *leaves[1:])
                return torch.autograd.grad(out, leaves, dout.to(out.dtype))[0]

            def check(gradient=gradient, leaves=leaves, rope=rope, limit=LIMIT[dtype]) -> float:
                wide = [t.detach().double().requires_grad_() for t in leaves]
                return require(
                    relative_error(gradient(rotary), gradient(rotary_ref, wide, rope=rope.double())), limit, "rotary"
                )

            normed = len(leaves) > 1
            bench.case(
                {
                    "pass": "forward+backward", "norms": normed, "N": rows, "H": heads, "K": kv_heads, "E": head_dim,
                    "dtype": str(dtype).removeprefix("torch."),
                },
                lambda gradient=gradient: gradient(rotary),
                bytes_moved=(5 if normed else 4) * rows * width * qkv.element_size(),
                check=check,
                eager=lambda gradient=gradient: gradient(rotary_ref),
                cold=False,
            )  # fmt: skip


if __name__ == "__main__":
    main()
