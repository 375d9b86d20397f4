"""How the losses of tokens become one number: the coefficient of each token, from the whole optimizer step's counts."""

from __future__ import annotations

import torch

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "dr_grpo", "seq-mean-token-sum-norm")


def aggregation_coef(
    mode: str,
    mask: torch.Tensor,
    offsets: torch.Tensor,
    *,
    tokens: int | None = None,
    sequences: int | None = None,
    max_length: int | None = None,
) -> torch.Tensor:
    """Coefficients c [N] fp32, so that the loss of the step is sum_n c[n] l[n]; exactly 0 where mask is 0.

    mask [N] bool/uint8: 1 = sampled by the policy. offsets [S+1] int64: first token of each sequence, the last entry is
    N. tokens = N_step and sequences = B_step count the whole optimizer step, over all micro-batches and replicas, so
    that any split of the step gives the same gradient; never divide by a number of micro-batches again. L = sampled
    tokens of the token's sequence, which must be whole within this call. max_length = Lmax, a constant of the run.

    mode                        c                    reads             used by
    "token-mean"                1 / N_step           tokens            DAPO, CISPO, VESPO, SPO, ROVER, Lp-Reg, CURE
    "seq-mean-token-sum"        1 / B_step           sequences         REINFORCE, RLOO, LUSPO
    "seq-mean-token-mean"       1 / (B_step L)       sequences         GRPO as published, GSPO, SAPO
    "dr_grpo"                   1 / (B_step Lmax)    sequences, Lmax   Dr. GRPO, TRL
    "seq-mean-token-sum-norm"   1 / Lmax             Lmax              verl (without 1/B)
    Raises ValueError for an unknown mode and for a count that the mode needs and lacks or that is not positive.
    """
    if mode not in MODES:
        raise ValueError(f"aggregation_coef: mode must be one of {', '.join(MODES)}, got {mode!r}")

    def need(name: str, value: int | None) -> int:
        if value is None or value <= 0:
            raise ValueError(
                f"aggregation_coef: mode {mode!r} needs {name} > 0, of the whole optimizer step, got {value}"
            )
        return value

    if mode == "token-mean":
        scale = 1.0 / need("tokens", tokens)
    elif mode == "seq-mean-token-sum-norm":
        scale = 1.0 / need("max_length", max_length)
    elif mode == "dr_grpo":
        scale = 1.0 / (need("sequences", sequences) * need("max_length", max_length))
    else:
        scale = 1.0 / need("sequences", sequences)
    active = mask != 0
    if mode == "seq-mean-token-mean":
        before = torch.zeros(active.numel() + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(active, 0, out=before[1:])
        length = before[offsets].diff().clamp(min=1)
        coef = (scale / length.double()).float().repeat_interleave(offsets.diff(), output_size=active.numel())
    else:
        coef = torch.full((active.numel(),), scale, dtype=torch.float32, device=mask.device)
    return torch.where(active, coef, 0.0)
