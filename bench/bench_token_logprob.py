"""Bench of token_logprob: forward, backward in place, with entropy gradient, at the vocabulary sizes of real models."""

from __future__ import annotations

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops.token_logprob import (
    token_logprob,
    token_logprob_backward_,
    token_logprob_backward_ref,
    token_logprob_ref,
)

CASES = {  # device: (N, V, dtype, in --quick)
    "cpu": [(2048, 128, torch.float32, True), (512, 4096, torch.float32, True), (2048, 32000, torch.float32, False)],
    "cuda": [
        (16384, 128, torch.bfloat16, True),
        (8192, 4096, torch.bfloat16, True),
        (8192, 32000, torch.float32, False),
        (8192, 151936, torch.bfloat16, True),
        (8192, 151936, torch.float32, False),
    ],
}
LIMIT = 1e-5  # fp32 mathematics against float64; outputs in 16 bits round at LIMIT_16
LIMIT_16 = 4e-3
CHECK_ROWS = 64  # compared in float64, which would not fit for all rows


def bench_shape(bench: Bench, rows: int, width: int, dtype: torch.dtype) -> None:
    device, part = bench.device, slice(0, CHECK_ROWS)
    logits = (5 * torch.randn(rows, width, device=device)).to(dtype)
    ids = torch.randint(0, width, (rows,), device=device)
    weight, entropy_weight = torch.randn(rows, device=device), torch.randn(rows, device=device)
    forward = token_logprob(logits, ids)
    exact = token_logprob_ref(logits[part].double(), ids[part])
    shape = {"N": rows, "V": width, "dtype": str(dtype).removeprefix("torch.")}
    size = logits.element_size() * rows * width

    def check_forward() -> float:
        errors = [relative_error(x[part], y) for x, y in zip(forward[:5], exact[:5], strict=True)]
        return require(max(errors), LIMIT, "forward")

    bench.case(
        {"pass": "forward", **shape},
        lambda: token_logprob(logits, ids),
        bytes_moved=size,
        check=check_forward,
        eager=lambda: torch.log_softmax(logits.float(), -1).gather(1, ids[:, None]),
    )
    leaf = logits.clone().requires_grad_()
    loss = (torch.log_softmax(leaf.float(), -1).gather(1, ids[:, None])[:, 0] * weight).sum()
    work = logits.clone()

    def eager_backward() -> None:
        leaf.grad = None
        loss.backward(retain_graph=True)

    def check_backward(h: torch.Tensor | None) -> float:
        f = [None if x is None else x[part].clone() for x in (logits, ids, forward.lse, forward.entropy, weight, h)]
        h64 = None if h is None else h[part].double()
        expected = token_logprob_backward_ref(
            logits[part].double(), ids[part], exact.lse, exact.entropy, weight[part].double(), h64
        )
        limit = LIMIT if dtype == torch.float32 else LIMIT_16
        return require(relative_error(token_logprob_backward_(*f), expected), limit, "backward")

    bench.case(
        {"pass": "backward", **shape},
        lambda: token_logprob_backward_(work, ids, forward.lse, None, weight, None),
        bytes_moved=2 * size,
        check=lambda: check_backward(None),
        eager=eager_backward,
    )
    bench.case(
        {"pass": "backward+entropy", **shape},
        lambda: token_logprob_backward_(work, ids, forward.lse, forward.entropy, weight, entropy_weight),
        bytes_moved=2 * size,
        check=lambda: check_backward(entropy_weight),
    )


def main() -> None:
    args = parse(__doc__)
    bench = Bench("token_logprob", args.device, args.quick)
    for rows, width, dtype, quick in CASES[args.device]:
        if quick or not args.quick:
            bench_shape(bench, rows, width, dtype)


if __name__ == "__main__":
    main()
