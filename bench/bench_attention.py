"""attention: forward + backward over packed sequences, prefill and decode over a paged cache, against torch's
scaled_dot_product_attention (with rotation and a dense cache for the last two, which paged_attention brings along).

python bench/bench_attention.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import Bench, parse, relative_error, require

from pymathrl import _C
from pymathrl.ops.attention import PAGE, attention, attention_ref, paged_attention
from pymathrl.ops.rotary import rotary_ref

HEADS = ((4, 2, 16), (9, 3, 64))  # H, K, E
TRAINING = ((64, 36), (16, 256))  # sequences, tokens of each
DECODE = ((64, 36), (64, 300), (64, 512))  # rows, tokens in the cache
PREFILL = ((64, 24), (4, 256))
LIMIT = 2e-6  # relative L2 error against float64


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q [B,H,S,E] already scaled, k and v [B,K,n,E] -> [B*S,H*E]."""
    grouped = q.shape[1] > k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def training_case(bench: Bench, rows: int, columns: int, heads: int, kv_heads: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    width, tokens = heads + 2 * kv_heads, rows * columns
    qkv = torch.randn(tokens, width * head_dim, generator=generator)
    qkv[:, : heads * head_dim] *= head_dim**-0.5
    qkv = qkv.to(bench.device).requires_grad_()
    dout = torch.randn(tokens, heads * head_dim, generator=generator).to(bench.device)
    offsets = torch.arange(rows + 1, device=bench.device) * columns

    def run() -> torch.Tensor:
        return torch.autograd.grad(attention(qkv, offsets, heads, kv_heads), qkv, dout)[0]

    def run_eager() -> torch.Tensor:
        parts = qkv.view(rows, columns, width, head_dim).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
        return torch.autograd.grad(sdpa(*parts, causal=True), qkv, dout)[0]

    def check() -> float:
        wide = qkv.detach().double().requires_grad_()
        expected = torch.autograd.grad(attention_ref(wide, offsets, heads, kv_heads), wide, dout.double())[0]
        require(relative_error(run_eager(), expected), LIMIT, "the eager twin")
        return require(relative_error(run(), expected), LIMIT, "attention")

    bench.case(
        {"pass": "forward+backward", "B": rows, "S": columns, "H": heads, "K": kv_heads, "E": head_dim},
        run,
        bytes_moved=4 * tokens * head_dim * (6 * heads + 6 * kv_heads),
        check=check,
        eager=run_eager,
        cold=False,
    )


def paged_case(bench: Bench, rows: int, context: int, new: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """The last `new` of `context` tokens of each of `rows` sequences."""
    generator = torch.Generator().manual_seed(0)
    width, columns = heads + 2 * kv_heads, -(-context // PAGE)
    qkv = torch.randn(rows * new, width * head_dim, generator=generator).to(bench.device)
    phase = torch.outer(torch.arange(context), 100.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    rope = torch.cat([phase.cos(), phase.sin()], 1).to(bench.device)
    pages = torch.randperm(rows * columns, generator=generator).to(bench.device)
    table = pages.view(rows, columns).int()
    keys = torch.randn(rows * columns, kv_heads, head_dim, PAGE, generator=generator).to(bench.device)
    values = torch.randn(rows * columns, kv_heads, PAGE, head_dim, generator=generator).to(bench.device)
    position = torch.arange(context - new, context, device=bench.device).repeat(rows)
    slot = torch.arange(rows, device=bench.device).repeat_interleave(new)
    out = torch.empty(rows * new, heads * head_dim, device=bench.device)
    scale = head_dim**-0.5
    dense_k = keys[pages].view(rows, columns, kv_heads, head_dim, PAGE).permute(0, 2, 1, 4, 3).flatten(2, 3)
    dense_v = values[pages].view(rows, columns, kv_heads, PAGE, head_dim).transpose(1, 2).flatten(2, 3)
    dense_k, dense_v = dense_k[:, :, :context].contiguous(), dense_v[:, :, :context].contiguous()

    def call() -> None:
        paged_attention(
            qkv, position, slot, table, rope, keys, values, out, heads=heads, kv_heads=kv_heads, scale=scale
        )

    def eager(dtype: torch.dtype | None = None) -> torch.Tensor:
        x, turn, k, v = (t.to(dtype) for t in (qkv, rope, dense_k, dense_v))
        parts = rotary_ref(x, position, turn, heads, kv_heads, scale).view(rows, new, width, head_dim)
        q, new_k, new_v = parts.transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
        k[:, :, context - new :], v[:, :, context - new :] = new_k, new_v
        return sdpa(q, k, v, causal=new == context)

    def check() -> float:
        call()
        expected = eager(torch.float64)
        require(relative_error(eager(), expected), LIMIT, "the eager twin")
        return require(relative_error(out, expected), LIMIT, "paged_attention")

    run: Any = call
    if bench.device == "cpu":  # as the engine runs it: recorded once
        run = _C.Program()
        run.begin()
        call()
        run.end()
        run = run.run
    bench.case(
        {
            "pass": "decode" if new == 1 else "prefill",
            "R": rows,
            "n": context,
            "H": heads,
            "K": kv_heads,
            "E": head_dim,
        },
        run,
        bytes_moved=4 * head_dim * (2 * rows * context * kv_heads + rows * new * (2 * heads + 4 * kv_heads)),
        check=check,
        eager=eager,
        cold=False,
    )


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("attention", args.device, args.quick)
    for heads in HEADS[:1] if args.quick else HEADS:
        for shape in TRAINING[:1] if args.quick else TRAINING:
            training_case(bench, *shape, *heads)
        for shape in DECODE[:1] if args.quick else DECODE:
            with torch.no_grad():
                paged_case(bench, *shape, 1, *heads)
        for rows, context in PREFILL[:1] if args.quick else PREFILL:
            with torch.no_grad():
                paged_case(bench, rows, context, context, *heads)


if __name__ == "__main__":
    main()
