"""mamba_step: one token of B sequences through a layer of M1-3B between its projections, against the same in torch.

On a GPU also mamba_ssm's Triton kernel selective_state_update where it is installed. It does the scan and the gate
alone, on x and b that are repeated already, and without the convolution: less work than ours.

python bench/bench_mamba_step.py [--device cpu|cuda] [--quick]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Bench, parse, relative_error, require

from pymathrl.ops.causal_conv1d import repeat_groups
from pymathrl.ops.mamba_step import mamba_step, mamba_step_ref

CHANNELS, SOURCES, STATES, WIDTH, RANK = 3072, 1024, 16, 4, 192  # M1-3B
BATCHES = {"cpu": (1, 16, 64), "cuda": (1, 64, 512)}
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 3e-3}  # relative L2 error of y against float64


def torch_step(proj, dt, conv_state, ssm_state, weight, bias, a_log, d, dt_bias) -> torch.Tensor:
    """All sequences at once in torch's operations, in place on the states."""
    z, x, b, c, _ = proj.float().split([CHANNELS, SOURCES, SOURCES, CHANNELS, RANK], 1)
    copies = CHANNELS // SOURCES
    window = torch.cat([conv_state, x[:, None]], 1)
    conv_state.copy_(window[:, 1:])
    u = F.silu((repeat_groups(window, STATES, copies) * weight.t()).sum(1) + bias)
    delta = F.softplus(dt.float() + dt_bias)
    each = lambda m, times: m.unflatten(1, (-1, STATES)).repeat_interleave(times, 1).transpose(1, 2)  # [B,N,D]
    decay = torch.exp(delta[:, None] * -a_log.exp().t())
    ssm_state.mul_(decay).add_((delta * u)[:, None] * each(b, STATES * copies))
    y = (ssm_state * each(c, STATES)).sum(1) + d * u
    return (y * F.silu(z)).to(proj.dtype)


def mamba_ssm_kernel():
    """None where mamba_ssm is not installed, with a line that says so."""
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except ImportError as error:
        print(f"mamba_ssm's selective_state_update: not measured, {error}")
        return None
    return selective_state_update


def main() -> None:
    args = parse(__doc__ or "")
    bench = Bench("mamba_step", args.device, args.quick)
    library = mamba_ssm_kernel() if args.device == "cuda" else None
    dtypes = (torch.float32,) if args.device == "cpu" else (torch.float32, torch.bfloat16)
    batches = BATCHES[args.device]
    for batch, dtype in [(b, d) for b in (batches[:1] if args.quick else batches) for d in dtypes]:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size, generator=generator: torch.randn(*size, generator=generator)
        proj = draw(batch, 2 * (CHANNELS + SOURCES) + RANK).to(args.device, dtype)
        dt = (draw(batch, CHANNELS) - 3).to(args.device, dtype)
        a_log = torch.arange(1.0, STATES + 1).log().expand(CHANNELS, STATES)
        weights = (draw(CHANNELS, WIDTH) / 2, draw(CHANNELS) / 2, a_log, draw(CHANNELS), draw(CHANNELS) / 2)
        weights = tuple(t.contiguous().to(args.device) for t in weights)
        states = (draw(batch, WIDTH - 1, SOURCES).to(args.device), draw(batch, STATES, CHANNELS).to(args.device))
        row, position = torch.arange(batch, device=args.device), torch.ones(batch, dtype=torch.int64).to(args.device)
        out = torch.empty_like(dt)

        def ours(states=states, inputs=(proj, dt), row=row, position=position, weights=weights, out=out):
            return mamba_step(*inputs, *states, row, position, *weights, out=out)

        def eager(states=states, inputs=(proj, dt), weights=weights):
            return torch_step(*inputs, *states, *weights)

        def check(
            states=states,
            inputs=(proj, dt),
            row=row,
            position=position,
            weights=weights,
            out=out,
            dtype=dtype,
            ours=ours,
        ) -> float:
            before = [t.clone() for t in states]
            exact = [t.double() for t in (*inputs, *before, *weights)]
            expected = torch.empty_like(exact[1])
            mamba_step_ref(*exact[:4], row, position, *exact[4:], out=expected)
            error = relative_error(ours(), expected)
            require(relative_error(states[1], exact[3]), 1e-6, "mamba_step's state")
            same = torch_step(*inputs, *before, *weights)
            require(relative_error(same, expected), LIMIT[dtype], "the peer")
            return require(error, LIMIT[dtype], "mamba_step")

        case = {"B": batch, "D": CHANNELS, "X": SOURCES, "N": STATES, "W": WIDTH, "state": "float32"}
        read = batch * (3 * CHANNELS + 2 * SOURCES + CHANNELS) * proj.element_size()
        bytes_moved = read + 2 * sum(t.numel() for t in states) * 4 + sum(t.numel() for t in weights) * 4
        options = {"bytes_moved": bytes_moved, "check": check, "cold": False}
        case["dtype"] = str(dtype).removeprefix("torch.")
        bench.case(case, ours, eager=eager, **options)
        if library is not None:
            state = states[1].transpose(1, 2).contiguous()
            z, x, b, c, _ = proj.split([CHANNELS, SOURCES, SOURCES, CHANNELS, RANK], 1)
            copies, heads = CHANNELS // SOURCES, CHANNELS // STATES
            wide = [repeat_groups(m, STATES, copies).unflatten(1, (heads, STATES)) for m in (x, b)]
            shaped = lambda m, heads=heads: m.unflatten(-1, (heads, STATES))
            head_states, decay = state.unflatten(1, (heads, STATES)), -weights[2].exp().unflatten(0, (heads, STATES))

            def triton_step(s=head_states, u=wide[0], b=wide[1], dt=dt, c=c, z=z, a=decay, w=weights, f=shaped):
                return library(
                    s, u, f(dt), a, b, f(c), f(w[3]), z=f(z), dt_bias=f(w[4]), dt_softplus=True
                )  # fmt: skip

            bench.case({**case, "eager": "selective_state_update"}, ours, eager=triton_step, **options)


if __name__ == "__main__":
    main()
