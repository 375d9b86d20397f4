"""selective_scan, forward and forward + backward, against the loop over time in plain torch. Also prints states per
second, because the exponential of each state, and no memory, is the limit on a CPU.

python bench/bench_selective_scan.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops.selective_scan import selective_scan, selective_scan_ref

STATES = 16
SHAPES = {  # T, D, X: tokens in sequences of at most 1024; a small layer, then the layer of M1-3B
    "cpu": ((256, 576, 192), (4096, 1536, 512)),
    "cuda": ((4096, 3072, 1024), (32768, 3072, 1024)),
}
LONGEST = 1024
PEER_TOKENS = 256  # the peer keeps [T,D,N] of decays and products for autograd: it gets the first so many tokens
CHECK_CHANNELS = 48  # float64 goes through as many channels only


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("selective_scan", args.device, args.quick)
    dtypes = (torch.float32,) if args.device == "cpu" else (torch.float32, torch.bfloat16)
    shapes = SHAPES[args.device]
    for tokens, channels, sources, dtype in [(*s, d) for s in (shapes[:1] if args.quick else shapes) for d in dtypes]:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size, generator=generator: torch.randn(*size, generator=generator)
        rows = [draw(tokens, n).to(args.device, dtype) for n in (channels, channels, channels, sources, channels)]
        rows[1] -= 3
        a_log = torch.arange(1.0, STATES + 1).log().expand(channels, STATES)
        weights = [t.to(args.device) for t in (a_log.contiguous(), draw(channels), draw(channels) / 2)]
        dy = draw(tokens, channels).to(args.device, dtype)
        offsets = torch.arange(0, tokens + 1, min(tokens, LONGEST), device=args.device)
        leaves = [t.clone().requires_grad_() for t in (*rows, *weights)]
        case = {"T": tokens, "D": channels, "X": sources, "N": STATES, "dtype": str(dtype).removeprefix("torch.")}

        def ours(*inputs, offsets=offsets):
            return selective_scan(*inputs, offsets)

        def forward(op, inputs=(*rows, *weights)) -> torch.Tensor:
            with torch.no_grad():
                return op(*inputs)

        def gradient(op, inputs=leaves, dy=dy) -> list[torch.Tensor]:
            return list(torch.autograd.grad(op(*inputs), inputs, dy))

        def peer(*inputs):
            """The reference on the first tokens only, as `eager_on` says: the ratio to it is a lower bound."""
            first = [t[:PEER_TOKENS] for t in inputs[:5]]
            return selective_scan_ref(*first, *inputs[5:], torch.tensor([0, len(first[0])]))[0]

        def few(inputs, ratio=channels // sources) -> list[torch.Tensor]:
            """The first channels, and the first tokens."""
            widths = (CHECK_CHANNELS, CHECK_CHANNELS, CHECK_CHANNELS, CHECK_CHANNELS // ratio, CHECK_CHANNELS)
            cut = [t.detach()[:PEER_TOKENS, :n] for t, n in zip(inputs[:5], widths, strict=True)]
            return [*cut, *(t.detach()[:CHECK_CHANNELS] for t in inputs[5:])]

        def check(few=few, gradient=gradient, inputs=(*rows, *weights), dy=dy, dtype=dtype) -> float:
            some = [t.clone().requires_grad_() for t in few(inputs)]
            some_dy = dy[:PEER_TOKENS, :CHECK_CHANNELS]
            got = gradient(
                lambda *x: ours(*x, offsets=torch.tensor([0, len(some_dy)], device=x[0].device)), some, some_dy
            )
            some = [t.detach().double().requires_grad_() for t in some]
            exact = gradient(peer, some, some_dy.double())
            errors = [relative_error(a, b) for a, b in zip(got, exact, strict=True)]
            return require(max(errors), 2e-6 if dtype == torch.float32 else 1e-2, "the gradient of selective_scan")

        size, peer_share = tokens * rows[0].element_size(), f"first {min(tokens, PEER_TOKENS)} tokens"
        for name, job, bytes_moved in (
            ("forward", forward, size * (4 * channels + sources + channels)),
            ("forward+backward", gradient, size * (13 * channels + 3 * sources) + tokens * STATES * channels // 8),
        ):
            row = bench.case(
                {"pass": name, **case, "eager_on": peer_share},
                lambda job=job, ours=ours: job(ours),
                bytes_moved=bytes_moved,
                check=check,
                eager=(lambda forward=forward: forward(peer))
                if name == "forward"
                else (lambda leaves=leaves, dy=dy: torch.autograd.grad(peer(*leaves), leaves, dy[:PEER_TOKENS])),
                cold=False,
                repeats=5,
            )
            print(f"{'':16} {tokens * channels * STATES / row['us'] / 1e3:.2f} G states/s")


if __name__ == "__main__":
    main()
