"""Bench of soft_embed: the full mix and the top k of it, and the backward, at the sizes of real models."""

from __future__ import annotations

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops.soft_embed import soft_embed, soft_embed_backward, soft_embed_ref

CASES = {  # device: (N, V, D, top_k, in --quick)
    "cpu": [(64, 128, 64, 0, True), (16, 49152, 576, 64, False), (16, 49152, 576, 0, False)],
    "cuda": [(512, 128, 64, 0, True), (64, 49152, 576, 64, True), (64, 49152, 576, 0, True)],
}
LIMIT = 1e-5


def bench_shape(bench: Bench, rows: int, width: int, columns: int, top_k: int) -> None:
    device = bench.device
    logits, table = 5 * torch.randn(rows, width, device=device), torch.randn(width, columns, device=device)
    uid, step = torch.arange(rows, device=device), torch.arange(rows, device=device)
    options = {"temperature": 0.5, "sigma": 0.3, "top_k": top_k}
    forward = soft_embed(logits, table, noise=(0, uid, step), **options)
    exact = soft_embed_ref(logits.double(), table.double(), inputs=forward.inputs.double(), **options)
    shape = {"N": rows, "V": width, "D": columns, "top_k": top_k}
    entries = rows * top_k if top_k else width

    def eager() -> torch.Tensor:
        z = logits / 0.5
        if top_k:
            value, index = z.topk(top_k, -1)
            mean = torch.bmm(value.softmax(-1)[:, None], table[index])[:, 0]
        else:
            mean = z.softmax(-1) @ table
        return mean + 0.3 * torch.randn_like(mean)

    bench.case(
        {"pass": "forward", **shape},
        lambda: soft_embed(logits, table, noise=(0, uid, step), **options),
        bytes_moved=8 * rows * width + 4 * entries * columns + 8 * rows * columns,
        check=lambda: require(relative_error(forward.mean, exact.mean), LIMIT, "forward"),
        eager=eager,
    )
    weight = torch.ones(rows, device=device)

    def backward() -> torch.Tensor:
        return soft_embed_backward(forward, table, weight, temperature=0.5, sigma=0.3)[0]

    def check_backward() -> float:
        u = (forward.inputs.double() - exact.mean) / 0.3**2
        dots = u @ table.double().t()
        right = exact.weights * (dots - (exact.weights * dots).sum(-1, keepdim=True)) / 0.5
        return require(relative_error(backward(), right), LIMIT, "backward")

    bench.case(
        {"pass": "backward", **shape},
        backward,
        bytes_moved=12 * rows * width + 4 * width * columns + 8 * rows * columns,
        check=check_backward,
    )


def main() -> None:
    args = parse(__doc__)
    bench = Bench("soft_embed", args.device, args.quick)
    for *shape, quick in CASES[args.device]:
        if quick or not args.quick:
            bench_shape(bench, *shape)


if __name__ == "__main__":
    main()
