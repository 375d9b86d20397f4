"""policy_loss: value, gradient and statistics of N tokens in one call, against the same loss in torch eager + autograd.

python bench/bench_policy_loss.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Bench, parse, relative_error, require

from pymathrl.ops import PolicyLoss, policy_loss, policy_loss_ref

SIZES = (512, 8192, 65536, 1 << 20)
LIMIT = 1e-6  # relative L2 error of the gradient in fp32 against float64


def inputs(n: int, device: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    logp = -torch.rand(n, generator=g) * 4
    old_logp = logp + 0.3 * torch.randn(n, generator=g)
    mean_logp = torch.randn(n + 1, generator=g) - 10
    t = {
        "logp": logp, "old_logp": old_logp, "advantage": torch.randn(n, generator=g),
        "coef": torch.full((n,), 1 / n), "ref_logp": logp + 0.3 * torch.randn(n, generator=g),
        "entropy": torch.rand(n, generator=g), "mean_logp": mean_logp,
        "old_mean_logp": mean_logp + 0.1 * torch.randn(n + 1, generator=g),
        "link": torch.rand(n, generator=g) < 0.95, "mask": torch.rand(n, generator=g) < 0.9,
    }  # fmt: skip
    return {name: x.to(device) for name, x in t.items()}


def eager_clip(t: dict[str, torch.Tensor]) -> torch.Tensor:
    logp = t["logp"].detach().requires_grad_()
    ratio = (logp - t["old_logp"]).exp()
    surrogate = torch.minimum(ratio * t["advantage"], ratio.clamp(0.8, 1.28) * t["advantage"])
    loss = (torch.where(t["mask"], -surrogate, 0.0) * t["coef"]).sum()
    return torch.autograd.grad(loss, logp)[0]


def eager_rover(t: dict[str, torch.Tensor]) -> torch.Tensor:
    logp = t["logp"].detach().requires_grad_()
    next_q = torch.where(t["link"], t["mean_logp"][1:] - t["old_mean_logp"][1:], 0.0)
    residual = logp - t["old_logp"] - (t["advantage"] + next_q)
    loss = (torch.where(t["mask"], residual * residual, 0.0) * t["coef"]).sum()
    return torch.autograd.grad(loss, logp)[0]


def eager_kl(t: dict[str, torch.Tensor]) -> torch.Tensor:
    logp, entropy = t["logp"].detach().requires_grad_(), t["entropy"].detach().requires_grad_()
    ratio = (logp - t["old_logp"]).exp()
    surrogate = torch.minimum(ratio * t["advantage"], ratio.clamp(0.8, 1.28) * t["advantage"])
    d = t["ref_logp"] - logp
    value = -surrogate + 0.1 * (d.exp() - d - 1) - 0.01 * entropy
    loss = (torch.where(t["mask"], value, 0.0) * t["coef"]).sum()
    return torch.autograd.grad(loss, (logp, entropy))[0]


# name -> (options, names of tensors beside the four and the mask, bytes per token, the same job in eager torch)
FORMS: dict[str, tuple[dict, tuple[str, ...], int, Callable]] = {
    "clip": ({"form": "clip", "clip_high": 0.28}, (), 21, eager_clip),
    "rover": ({"form": "rover"}, ("mean_logp", "old_mean_logp", "link"), 30, eager_rover),
    "clip+k3+entropy": (
        {"form": "clip", "clip_high": 0.28, "kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.01},
        ("ref_logp", "entropy"),
        33,
        eager_kl,
    ),
}


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("policy_loss", args.device, args.quick)
    for name, (options, names, bytes_per_token, eager) in FORMS.items():
        for n in SIZES[:2] if args.quick else SIZES:
            t = inputs(n, args.device)

            def arguments(t: dict[str, torch.Tensor] = t, names: tuple[str, ...] = names) -> dict[str, torch.Tensor]:
                return {k: t[k] for k in ("logp", "old_logp", "advantage", "coef", "mask", *names)}

            given = arguments()

            def run(given: dict = given, options: dict = options) -> PolicyLoss:
                return policy_loss(**given, **options)

            def check(t: dict = t, given: dict = given, options: dict = options, eager: Callable = eager) -> float:
                wide = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
                expected = policy_loss_ref(**wide, **options).grad_logp
                require(relative_error(eager(t), expected), LIMIT, "the eager twin")
                return require(
                    relative_error(policy_loss(**given, **options).grad_logp, expected), LIMIT, "policy_loss"
                )

            bench.case(
                {"form": name, "N": n},
                run,
                bytes_moved=bytes_per_token * n,
                check=check,
                eager=lambda t=t, eager=eager: eager(t),
                cold=n >= 1 << 20,  # below it the cost is the call, not the memory
            )


if __name__ == "__main__":
    main()
