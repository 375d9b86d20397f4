"""group_advantage: P groups of G rewards in one call, against torch eager on a rectangular [P, G] tensor.

python bench/bench_group_advantage.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops import group_advantage, group_advantage_ref

SHAPES = ((8, 8), (128, 16), (8192, 16))  # P, G: a small run, a usual batch, a batch of 131,072 samples
LIMIT = 1e-6  # relative L2 error against float64


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("group_advantage", args.device, args.quick)
    for p, g in SHAPES[:2] if args.quick else SHAPES:
        reward = (torch.rand(p * g, generator=torch.Generator().manual_seed(p)) < 0.4).float().to(args.device)
        offsets = torch.arange(0, p * g + 1, g, device=args.device)

        def eager(reward: torch.Tensor = reward, p: int = p, g: int = g) -> torch.Tensor:
            r = reward.view(p, g)
            d = r - r[:, :1]  # equal rewards give exact zeros
            return ((d - d.mean(1, keepdim=True)) / (d.std(1, keepdim=True) + 1e-6)).view(-1)

        def check(reward: torch.Tensor = reward, offsets: torch.Tensor = offsets, eager=eager) -> float:
            expected = group_advantage_ref(reward.double(), offsets, scale="group_std").advantage
            require(relative_error(eager(), expected), LIMIT, "the eager twin")
            got = group_advantage(reward, offsets, scale="group_std").advantage
            return require(relative_error(got, expected), LIMIT, "group_advantage")

        bench.case(
            {"P": p, "G": g, "scale": "group_std"},
            lambda reward=reward, offsets=offsets: group_advantage(reward, offsets, scale="group_std"),
            bytes_moved=8 * p * g + 9 * p,
            check=check,
            eager=eager,
            cold=False,
        )


if __name__ == "__main__":
    main()
