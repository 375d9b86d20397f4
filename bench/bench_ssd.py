"""ssd_scan (forward, forward + backward) and ssd_step on the Mamba-2 shapes of M1-3B: H = G = 24, P = N = 128.

The peer is the chunk form in plain torch: products of matrices over chunks of 64 tokens, batched over chunks and heads,
autograd for the gradient; for the step, the update written with torch's operators.

python bench/bench_ssd.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Bench, parse, relative_error, require

from pymathrl.ops.ssd import ssd_scan, ssd_scan_ref, ssd_step

HEADS, WIDTH, STATES = 24, 128, 128
SHAPES = {"cpu": (256, 1024), "cuda": (1024, 8192)}  # T, four sequences
ROWS = {"cpu": (1, 16, 64), "cuda": (1, 64, 512)}  # R of a decode step
CHUNK = 64
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 5e-3}  # relative L2 error against float64


def chunked(x, dt, b, c, a_log, d, dt_bias):
    """x, b, c [B,T,H,*], dt [B,T,H] of sequences of one length, a multiple of CHUNK -> y [B,T,H,P]."""
    delta = F.softplus(dt + dt_bias)
    parts = lambda t: t.unflatten(1, (-1, CHUNK)).movedim(3, 2)  # [B,K,H,Q,...]
    sums = parts(-a_log.exp() * delta).cumsum(-1)
    scaled, b, c = parts(delta[..., None] * x), parts(b), parts(c)
    low = torch.exp((sums[..., None] - sums[..., None, :]).tril()).tril()
    y = (low * (c @ b.mT)) @ scaled
    added = b.mT @ ((sums[..., -1:] - sums).exp()[..., None] * scaled)  # [B,K,H,N,P]
    decay = sums[..., -1].exp()[..., None, None]
    states, state = [], torch.zeros_like(added[:, 0])
    for k in range(added.shape[1]):
        states.append(state)
        state = decay[:, k] * state + added[:, k]
    y = y + sums.exp()[..., None] * (c @ torch.stack(states, 1))
    return y.movedim(2, 3).flatten(1, 2) + d[:, None] * x


def eager_step(x, dt, b, c, state, a_log, d, dt_bias):
    delta = F.softplus(dt + dt_bias)
    x, b, c = (t.unflatten(1, (HEADS, -1)) for t in (x, b, c))
    state.mul_(torch.exp(delta * -a_log.exp())[..., None, None])
    state.add_(b[..., None] * (delta[..., None] * x)[:, :, None])
    return (c[:, :, None] @ state)[:, :, 0] + d[:, None] * x


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("ssd", args.device, args.quick)
    dtypes = (torch.float32,) if args.device == "cpu" else (torch.float32, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows, columns: torch.randn(rows, columns, generator=generator)
    weights = [t.to(args.device) for t in (torch.linspace(0, 2.5, HEADS), torch.ones(HEADS), torch.zeros(HEADS))]
    columns = HEADS * WIDTH, HEADS, HEADS * STATES, HEADS * STATES
    for tokens, dtype in [(n, d) for n in SHAPES[args.device][: 1 if args.quick else 2] for d in dtypes]:
        offsets = torch.arange(0, tokens + 1, tokens // 4).to(args.device)
        inputs = [draw(tokens, n) for n in columns]
        inputs[1] -= 4  # delta about 0.02, as models have it
        leaves = [t.to(args.device, dtype).requires_grad_() for t in inputs]
        dy = draw(tokens, columns[0]).to(args.device, dtype)
        case = {"T": tokens, "B": 4, "dtype": str(dtype).removeprefix("torch.")}

        def ours(*tensors, offsets=offsets):
            return ssd_scan(*tensors, *weights, offsets, groups=HEADS)

        def reference(*tensors, offsets=offsets):
            weights64 = [w.double() for w in weights]
            return ssd_scan_ref(*tensors, *weights64, offsets, groups=HEADS)[0]

        def peer(x, dt, b, c, tokens=tokens):
            shape = lambda rows: rows.unflatten(0, (4, -1)).unflatten(2, (HEADS, -1))
            y = chunked(shape(x), dt.unflatten(0, (4, -1)), shape(b), shape(c), *weights)
            return y.flatten(2).flatten(0, 1).to(x.dtype)

        def gradient(op, leaves=leaves, dy=dy):
            return torch.autograd.grad(op(*leaves), leaves, dy.to(leaves[0].dtype))

        def forward(op, leaves=leaves):
            with torch.no_grad():
                return [op(*leaves)]

        def check(run, leaves=leaves, limit=LIMIT[dtype], ours=ours, reference=reference, peer=peer) -> float:
            expected = run(reference, [t.detach().double().requires_grad_() for t in leaves])
            worst = [
                max(relative_error(got, e) for got, e in zip(run(op, leaves), expected, strict=True))
                for op in (ours, peer)
            ]
            require(worst[1], 10 * limit, "the peer")
            return require(worst[0], limit, "ssd_scan")

        size = leaves[0].element_size() * tokens
        bench.case(
            {"pass": "forward", **case},
            lambda forward=forward, ours=ours: forward(ours),
            bytes_moved=size * (sum(columns) + columns[0]),
            check=lambda check=check, run=forward: check(run),
            eager=lambda forward=forward, peer=peer: forward(peer),
            cold=False,
        )
        bench.case(
            {"pass": "forward+backward", **case},
            lambda gradient=gradient, ours=ours: gradient(ours),
            bytes_moved=size * (3 * sum(columns) + 2 * columns[0]),
            check=lambda check=check, run=gradient: check(run),
            eager=lambda gradient=gradient, peer=peer: gradient(peer),
            cold=False,
        )
    for rows, dtype in [(n, d) for n in ROWS[args.device][: 2 if args.quick else 3] for d in dtypes]:
        tokens = [draw(rows, n).to(args.device, dtype) for n in columns]
        state = torch.randn(rows, HEADS, STATES, WIDTH, generator=generator).to(args.device)
        row, out = torch.arange(rows).to(args.device), torch.empty_like(tokens[0])
        position = torch.ones_like(row)

        def step(tokens=tokens, state=state, row=row, position=position, out=out):
            return ssd_step(*tokens, state, row, position, *weights, out=out)

        def check_step(tokens=tokens, state=state, step=step, limit=LIMIT[dtype]) -> float:
            expected_state = state.double()
            expected = eager_step(*(t.double() for t in tokens), expected_state, *(w.double() for w in weights))
            error = require(relative_error(step(), expected.flatten(1)), limit, "ssd_step")
            return max(error, require(relative_error(state, expected_state), limit, "the state of ssd_step"))

        bench.case(
            {"pass": "step", "R": rows, "dtype": str(dtype).removeprefix("torch.")},
            step,
            bytes_moved=2 * state.numel() * 4 + rows * tokens[0].element_size() * (sum(columns) + columns[0]),
            check=check_step,
            eager=lambda tokens=tokens, state=state: eager_step(*tokens, state, *weights),
            cold=False,
        )


if __name__ == "__main__":
    main()
