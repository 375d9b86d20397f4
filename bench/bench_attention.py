"""attention: forward + backward from the projection, against rotation + scaled_dot_product_attention + autograd.

python bench/bench_attention.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Bench, parse, relative_error, require

from pymathrl.ops.attention import attention, attention_ref, rotate_ref

SHAPES = ((64, 36, 4, 2, 16), (64, 132, 4, 2, 16), (64, 68, 4, 2, 64), (512, 52, 3, 3, 32))  # B, S, H, K, E
LIMIT = 2e-6  # relative L2 error of the gradient against float64


def eager(qkv: torch.Tensor, turn: torch.Tensor, heads: int, kv_heads: int, scale: float) -> torch.Tensor:
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    out = F.scaled_dot_product_attention(
        rotate_ref(q, turn), rotate_ref(k, turn), v, is_causal=True, scale=scale, enable_gqa=heads > kv_heads
    )
    return out.transpose(1, 2).flatten(-2)


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("attention", args.device, args.quick)
    for rows, columns, heads, kv_heads, head_dim in SHAPES[:1] if args.quick else SHAPES:
        generator = torch.Generator().manual_seed(0)
        width = (heads + 2 * kv_heads) * head_dim
        qkv = torch.randn(rows, columns, width, generator=generator).to(args.device).requires_grad_()
        dout = torch.randn(rows, columns, heads * head_dim, generator=generator).to(args.device)
        phase = torch.outer(torch.arange(columns), 100.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
        turn = torch.polar(torch.ones_like(phase), phase).to(args.device)
        rest = (heads, kv_heads, head_dim**-0.5)

        def run(qkv=qkv, turn=turn, rest=rest, dout=dout) -> torch.Tensor:
            return torch.autograd.grad(attention(qkv, turn, *rest).out, qkv, dout)[0]

        def run_eager(qkv=qkv, turn=turn, rest=rest, dout=dout) -> torch.Tensor:
            return torch.autograd.grad(eager(qkv, turn, *rest), qkv, dout)[0]

        def check(qkv=qkv, turn=turn, rest=rest, dout=dout, run=run, run_eager=run_eager) -> float:
            wide = qkv.detach().double().requires_grad_()
            out = attention_ref(wide, turn.to(torch.complex128), *rest).out
            expected = torch.autograd.grad(out, wide, dout.double())[0]
            require(relative_error(run_eager(), expected), LIMIT, "the eager twin")
            return require(relative_error(run(), expected), LIMIT, "attention")

        tokens = rows * columns
        bench.case(
            {"pass": "forward+backward", "B": rows, "S": columns, "H": heads, "K": kv_heads, "E": head_dim},
            run,
            bytes_moved=4 * tokens * head_dim * (8 * heads + 11 * kv_heads),
            check=check,
            eager=run_eager,
            cold=False,
        )


if __name__ == "__main__":
    main()
