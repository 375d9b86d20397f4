"""Bench of sample_token: one decode step's sampling, without and with filters, against the torch operations for it."""

from __future__ import annotations

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops.sample_token import sample_token, sample_token_ref

CASES = {  # device: (B, V, dtype, in --quick)
    "cpu": [
        (64, 128, torch.float32, True),
        (512, 48, torch.float32, True),
        (64, 32000, torch.float32, True),
        (64, 151936, torch.float32, False),
    ],
    "cuda": [
        (64, 128, torch.float32, True),
        (64, 151936, torch.bfloat16, True),
        (512, 151936, torch.bfloat16, True),
        (512, 151936, torch.float32, False),
    ],
}
SETTINGS = {"plain": {}, "top_p": {"top_p": 0.95}, "top_k": {"top_k": 50}, "min_p": {"min_p": 0.02}}
LIMIT = 1e-5
CHECK_ROWS = 64
SMALL = 1 << 20  # elements: below this a call is its overhead, and is timed with warm caches


def eager_sample(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """What a sampling loop in plain torch does for the same outputs (entropy and mean log-prob included)."""
    logp = torch.log_softmax(logits.float(), -1)
    kept = logp
    if top_k:
        kept = kept.masked_fill(kept < kept.topk(min(top_k, kept.shape[1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ranked, order = kept.sort(descending=True)
        mass = ranked.exp().cumsum(-1)
        remove = (mass - ranked.exp() >= top_p).scatter(1, order, mass - ranked.exp() >= top_p)
        kept = kept.masked_fill(remove, -torch.inf)
    if min_p:
        kept = kept.masked_fill(kept < kept.amax(-1, keepdim=True) + torch.tensor(min_p).log(), -torch.inf)
    ids = torch.multinomial(kept.exp(), 1)
    chosen = torch.log_softmax(kept, -1).gather(1, ids)
    return torch.cat([chosen, -(logp.exp() * logp).sum(-1, keepdim=True), logp.mean(-1, keepdim=True)], 1)


def bench_setting(bench: Bench, rows: int, width: int, dtype: torch.dtype, label: str, kw: dict[str, float]) -> None:
    part = slice(0, CHECK_ROWS)
    logits = (4 * torch.randn(rows, width, device=bench.device)).to(dtype)
    uid = torch.arange(rows, device=bench.device)
    step = torch.zeros_like(uid)

    def check() -> float:
        got = sample_token(logits[part], 1, uid[part], step[part], **kw)
        expected = sample_token_ref(logits[part].double(), 1, uid[part], step[part], **kw)
        if int((got.ids != expected.ids).sum()) > 1:  # one row may lie within rounding of a step of the CDF
            raise AssertionError(f"sample_token {kw}: ids differ from the reference; not timed")
        return require(max(relative_error(x, y) for x, y in zip(got[2:], expected[2:], strict=True)), LIMIT, label)

    bench.case(
        {"filter": label, "B": rows, "V": width, "dtype": str(dtype).removeprefix("torch.")},
        lambda: sample_token(logits, 1, uid, step, **kw),
        bytes_moved=logits.element_size() * rows * width,
        check=check,
        eager=lambda: eager_sample(logits, **kw),
        cold=rows * width >= SMALL,
    )


def main() -> None:
    args = parse(__doc__)
    bench = Bench("sample_token", args.device, args.quick)
    for rows, width, dtype, quick in CASES[args.device]:
        for label, kw in SETTINGS.items():
            if quick or not args.quick:
                bench_setting(bench, rows, width, dtype, label, kw)


if __name__ == "__main__":
    main()
