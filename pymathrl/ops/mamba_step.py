"""New tokens of many sequences through convolution, scan and gate of a Mamba-1 layer, on states held in place."""

from __future__ import annotations

import torch

from pymathrl.ops._call import _C, stream, use_reference, view
from pymathrl.ops.causal_conv1d import causal_conv1d_ref
from pymathrl.ops.selective_scan import selective_scan_ref


def mamba_step(
    proj: torch.Tensor,
    dt: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = selective_scan(causal_conv1d(x, weight, bias), dt, z, b, c, a_log, d, dt_bias), one token per row of `proj`.

    proj        [R, at least 2D+2X] fp32, on a GPU also bf16: z [D], x [X], b [X], c [D] side by side; columns after
                them are not read. Its rows and those of dt may be apart
    dt          [R,D] in the dtype of proj, with the bias of its projection
    conv_state  fp32 [S,W-1,X], updated: the last inputs x of each sequence, oldest first
    ssm_state   fp32 [S,N,D], updated
    row         int64 [R] of the states; -1: padding, its y is 0 and nothing else is read or written. Tokens of one
                sequence stand next to each other, in their order: a prefill is the same call as a decode
    position    int64 [R] of the token in its sequence; 0: the sequence starts here, what lies in its states is not read
    weight, bias, a_log, d, dt_bias  fp32 [D,W], [D], [D,N], [D], [D], as in the two ops; the group is N
    out         [R,D] in the dtype of proj, written and returned: then the call allocates nothing

    Returns y [R,D]. Not differentiable; waits for nothing on a GPU, so that it can stand in a CUDA graph or a Program.
    A sequence's results depend on it alone: not on the other rows, on how its tokens are cut into calls, or on threads.
    On the CPU they are bit for bit those of `causal_conv1d` and `selective_scan`.
    Raises ValueError for a wrong shape or dtype, and on the CPU for rows out of range.
    """
    if out is None:
        out = dt.new_empty(dt.shape)
    if use_reference():
        mamba_step_ref(proj, dt, conv_state, ssm_state, row, position, weight, bias, a_log, d, dt_bias, out=out)
    else:
        _C.mamba_step(
            view(proj), view(dt), view(conv_state), view(ssm_state), view(row), view(position), view(weight),
            view(bias), view(a_log), view(d), view(dt_bias), view(out), stream(proj),
        )  # fmt: skip
    return out


def mamba_step_ref(
    proj: torch.Tensor,
    dt: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    out: torch.Tensor,
) -> None:
    """The same in plain torch, one row after the other, in the precision of the weights and states."""
    (channels, states), sources = a_log.shape, conv_state.shape[2]
    z, x, b, c = proj[:, : 2 * (channels + sources)].split([channels, sources, sources, channels], 1)
    one = torch.tensor([0, 1])
    for i, (slot, at) in enumerate(zip(row.tolist(), position.tolist(), strict=True)):
        if slot < 0:
            out[i] = 0
            continue
        state, token = slice(slot, slot + 1), slice(i, i + 1)
        if at == 0:
            conv_state[state] = 0
            ssm_state[state] = 0
        u, conv_state[state] = causal_conv1d_ref(x[token], weight, bias, one, group=states, initial=conv_state[state])
        out[token], ssm_state[state] = selective_scan_ref(
            u, dt[token], z[token], b[token], c[token], a_log, d, dt_bias, one, initial=ssm_state[state]
        )
