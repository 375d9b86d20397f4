"""The recurrence of a Mamba-2 layer (state space dual; Dao and Gu, arXiv 2405.21060): packed, and one step in place."""

from __future__ import annotations

import itertools
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view


@overload
def ssd_scan(
    x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor, a_log: torch.Tensor, d: torch.Tensor,
    dt_bias: torch.Tensor, offsets: torch.Tensor, *, groups: int, initial: torch.Tensor | None = ...,
    chunk: int = ..., return_final: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def ssd_scan(
    x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor, a_log: torch.Tensor, d: torch.Tensor,
    dt_bias: torch.Tensor, offsets: torch.Tensor, *, groups: int, initial: torch.Tensor | None = ...,
    chunk: int = ..., return_final: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    offsets: torch.Tensor,
    *,
    groups: int,
    initial: torch.Tensor | None = None,
    chunk: int = 256,
    return_final: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Token by token within each sequence and head, with delta = softplus(dt + dt_bias) and a = exp(-exp(a_log) delta):

    S[n,p] = a S[n,p] + delta x[p] b[n],  y[p] = d x[p] + sum_n c[n] S[n,p]

    x        [T,H*P] fp32, on a GPU also bf16 (arithmetic in fp32): H heads of P channels
    dt       [T,H] in the dtype of x
    b, c     [T,G*N] in the dtype of x: G = `groups` divides H, N is at most 256. Head h reads group h // (H/G)
    a_log    fp32 [H], entries below 88. d, dt_bias fp32 [H]
    offsets  int64 [B+1], from 0, not falling: sequence b is tokens offsets[b]..offsets[b+1]-1, and may be empty.
             Tokens from offsets[B] on are padding: their results and gradients are 0
    initial  fp32 [B,H,N,P]: the state before each sequence; None: zeros
    chunk    tokens from one state that is kept for the gradient to the next: memory H*N*P*4 bytes per chunk against
             time to make the states between again. Without influence on y and the states

    The rows of x, dt, b and c may be apart (slices of a projection).
    Returns y [T,H*P] in the dtype of x, and with return_final also fp32 [B,H,N,P]: the last state of each sequence.
    Differentiable in everything but offsets, also through final. The gradient works on matrices of 64 tokens.
    A sequence's results depend on it alone, bit for bit on the CPU: not on how it is packed or cut, nor on threads.
    Raises ValueError for a wrong shape or dtype, and on the CPU for offsets that are none.
    """
    heads = a_log.shape[0] if a_log.ndim == 1 else 0
    if x.ndim != 2 or b.ndim != 2 or heads < 1 or x.shape[1] < 1 or x.shape[1] % heads:
        raise ValueError(
            "ssd_scan: x must have shape [T,H*P], b [T,G*N] and a_log [H], "
            f"got {list(x.shape)}, {list(b.shape)} and {list(a_log.shape)}"
        )
    if groups < 1 or heads % groups or b.shape[1] < 1 or b.shape[1] % groups:
        raise ValueError(
            f"ssd_scan: groups must divide the {heads} heads of a_log and the {b.shape[1]} columns of b, got {groups}"
        )
    if chunk < 1:
        raise ValueError(f"ssd_scan: chunk must be at least 1, got {chunk}")
    if use_reference():
        both = ssd_scan_ref(x, dt, b, c, a_log, d, dt_bias, offsets, groups=groups, initial=initial)
    else:
        inputs = (x, dt, b, c, a_log, d, dt_bias, initial)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        both = _SsdScan.apply(*inputs, offsets, groups, chunk, keep)
    return both if return_final else both[0]


class _SsdScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor, a_log: torch.Tensor,
        d: torch.Tensor, dt_bias: torch.Tensor, initial: torch.Tensor | None, offsets: torch.Tensor, groups: int,
        chunk: int, keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        (tokens, channels), heads, sequences = x.shape, a_log.shape[0], offsets.shape[0] - 1
        matrix = heads, b.shape[1] // groups, channels // heads
        y = x.new_empty(tokens, channels)
        final = a_log.new_empty(max(sequences, 0), *matrix)
        starts = a_log.new_empty(_C.ssd_chunks(tokens, sequences, chunk), *matrix) if keep else None
        _C.ssd_scan(
            view(x), view(dt), view(b), view(c), view(a_log), view(d), view(dt_bias), view(offsets),
            optional_view(initial), view(y), view(final), optional_view(starts), groups, chunk, stream(x),
        )  # fmt: skip
        ctx.save_for_backward(x, dt, b, c, a_log, d, dt_bias, offsets, starts)
        ctx.rest = groups, chunk, initial is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dfinal: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, dt, b, c, a_log, d, dt_bias, offsets, starts = ctx.saved_tensors
        groups, chunk, has_initial = ctx.rest
        tokens, sequences = x.shape[0], offsets.shape[0] - 1
        heads, states, width = starts.shape[1:]
        dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        of_heads = a_log.new_empty(2, tokens, heads * states)  # the gradients of b and c, head by head
        dinitial = a_log.new_empty(sequences, heads, states, width) if has_initial else None
        sums = a_log.new_empty(3, sequences, heads)  # of a_log, d and dt_bias, sequence by sequence
        work = a_log.new_empty(
            min(sequences * heads, _workers(x.device)), _C.ssd_work_size(states, width, min(chunk, tokens))
        )
        _C.ssd_scan_backward(
            view(x), view(dt), view(b), view(c), view(a_log), view(d), view(dt_bias), view(offsets), view(starts),
            view(dy), optional_view(dfinal), view(dx), view(ddt), view(of_heads[0]), view(of_heads[1]),
            optional_view(dinitial), view(sums), view(work), groups, chunk, stream(x),
        )  # fmt: skip
        if groups < heads:
            of_heads = of_heads.unflatten(2, (groups, heads // groups, states)).sum(3).flatten(2)
        db, dc = of_heads.to(b.dtype)
        return dx, ddt, db, dc, *sums.sum(1), dinitial, None, None, None, None


def _workers(device: torch.device) -> int:
    """How many heads of sequences a backward works on at a time, each with memory of its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


def ssd_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The recurrence of `ssd_scan` for one token per row, on states held in place.

    x         [R,H*P] fp32, on a GPU also bf16 (arithmetic in fp32); dt [R,H], b and c [R,G*N] in its dtype. Their rows
              may be apart (slices of a projection). N and P are those of `state`, G follows from b
    state     fp32 [S,H,N,P], updated
    row       int64 [R] of the states; -1: padding, its y is 0 and nothing else is read or written. Tokens of one
              sequence stand next to each other, in their order: a prefill is the same call as a decode
    position  int64 [R] of the token in its sequence; 0: the sequence starts here, what lies in its state is not read
    a_log, d, dt_bias  fp32 [H]
    out       [R,H*P] in the dtype of x, written and returned: then the call allocates nothing

    Returns y [R,H*P]. Not differentiable; waits for nothing on a GPU: it can stand in a CUDA graph or a Program.
    A sequence's results depend on it alone: not on the other rows, on how its tokens are cut into calls, or on threads.
    On the CPU they are bit for bit those of `ssd_scan`.
    Raises ValueError for a wrong shape or dtype, and on the CPU for rows out of range.
    """
    if out is None:
        out = x.new_empty(x.shape)
    if use_reference():
        ssd_step_ref(x, dt, b, c, state, row, position, a_log, d, dt_bias, out=out)
    else:
        _C.ssd_step(
            view(x), view(dt), view(b), view(c), view(state), view(row), view(position), view(a_log), view(d),
            view(dt_bias), view(out), stream(x),
        )  # fmt: skip
    return out


def ssd_scan_ref(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    offsets: torch.Tensor,
    *,
    groups: int,
    initial: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, final) in plain torch, in the precision of a_log; autograd gives the gradients."""
    dtype, heads = a_log.dtype, a_log.shape[0]
    delta = F.softplus(dt.to(dtype) + dt_bias)
    decay = torch.exp(delta * -a_log.exp())[..., None, None]  # [T,H,1,1]
    x_of = x.to(dtype).unflatten(1, (heads, -1))  # [T,H,P]
    b_of, c_of = (m.to(dtype).unflatten(1, (groups, -1)).repeat_interleave(heads // groups, 1) for m in (b, c))
    added = (delta[..., None] * x_of)[:, :, None]
    sums, final = [x_of.new_zeros(0, *x_of.shape[1:])], []
    bounds = offsets.tolist()
    for sequence, (first, last) in enumerate(itertools.pairwise(bounds)):
        state = x_of.new_zeros(heads, b_of.shape[2], x_of.shape[2]) if initial is None else initial[sequence]
        for t in range(first, last):
            state = decay[t] * state + b_of[t][..., None] * added[t]
            sums.append((c_of[t][:, None] @ state)[:, 0][None])
        final.append(state)
    last = bounds[-1]
    y = (torch.cat(sums) + d[:, None] * x_of[:last]).flatten(1)
    y = F.pad(y, (0, 0, 0, x.shape[0] - last)).to(x.dtype)
    return y, torch.stack(final) if final else x_of.new_zeros(0, heads, b_of.shape[2], x_of.shape[2])


def ssd_step_ref(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    a_log: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    out: torch.Tensor,
) -> None:
    """The same in plain torch, one row after the other, in the precision of the weights and the state."""
    groups, one = b.shape[1] // state.shape[2], torch.tensor([0, 1])
    for i, (slot, at) in enumerate(zip(row.tolist(), position.tolist(), strict=True)):
        if slot < 0:
            out[i] = 0
            continue
        initial, token = None if at == 0 else state[slot : slot + 1], slice(i, i + 1)
        out[token], state[slot : slot + 1] = ssd_scan_ref(
            x[token], dt[token], b[token], c[token], a_log, d, dt_bias, one, groups=groups, initial=initial
        )
