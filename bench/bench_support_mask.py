"""support_mask_: the sampler's support put on the update's logits, against torch's masked_fill_ of the unpacked bits.

python bench/bench_support_mask.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
from common import Bench, parse

from pymathrl.ops.support_mask import support_mask_, support_mask_ref, support_pack_ref, support_unpack_ref

CASES = {  # device: (N, V, dtype, in --quick)
    "cpu": [(1024, 128, torch.float32, True), (512, 4096, torch.float32, True), (64, 151936, torch.float32, False)],
    "cuda": [(4096, 32000, torch.float32, True), (4096, 151936, torch.bfloat16, False)],
}
KEPT = {"top_p": 0.002, "half": 0.5}  # share of the vocabulary that is kept: what a filter leaves, and the worst case
CHECK_ROWS = 64
SMALL = 1 << 20  # elements: below this a call is its overhead, and is timed with warm caches


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("support_mask", args.device, args.quick)
    for rows, width, dtype, quick in CASES[args.device]:
        if args.quick and not quick:
            continue
        for label, share in KEPT.items():
            generator = torch.Generator().manual_seed(0)
            logits = torch.randn(rows, width, generator=generator).to(args.device, dtype)
            kept = torch.rand(rows, width, generator=generator) < share
            support = support_pack_ref(kept).to(args.device)

            def check(logits=logits[:CHECK_ROWS], support=support[:CHECK_ROWS]) -> float:
                if not torch.equal(support_mask_(logits.clone(), support), support_mask_ref(logits, support)):
                    raise AssertionError("support_mask: differs from the reference; not timed")
                return 0.0

            def eager(logits=logits, support=support, width=width) -> torch.Tensor:
                return logits.masked_fill_(~support_unpack_ref(support, width), -torch.inf)

            bench.case(
                {"kept": label, "N": rows, "V": width, "dtype": str(dtype).removeprefix("torch.")},
                lambda logits=logits, support=support: support_mask_(logits, support),
                bytes_moved=rows * width * logits.element_size() + support.numel(),
                check=check,
                eager=eager,
                cold=rows * width >= SMALL,
            )


if __name__ == "__main__":
    main()
