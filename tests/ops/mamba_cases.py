"""Inputs of the Mamba ops' tests, and their formulas once more, written for one sequence in the channel-major layout of
the papers' code, (D, L) and states (D, N), with the repeat of x and b spelled out by index."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Shape(NamedTuple):
    lengths: tuple[int, ...]  # of the sequences
    channels: int  # D
    sources: int  # X
    states: int  # N
    width: int  # W


SHAPES = (
    Shape((5,), 8, 4, 2, 4),
    Shape((1, 3, 0, 70, 2), 96, 32, 16, 4),
    Shape((130,), 32, 32, 16, 3),
    Shape((64, 9, 129, 1), 30, 10, 5, 2),
    Shape((2, 66), 80, 40, 20, 4),
)
ACTIVATIONS = ("u", "dt", "z", "b", "c")


def offsets_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def mamba_inputs(shape: Shape, padding: int = 0) -> dict[str, torch.Tensor]:
    """fp32: the activations of a layer, its weights, states before the sequences, gradients of the results. Steps and
    decays are such that some states last for dozens of tokens and some for none."""
    generator = torch.Generator().manual_seed(sum(shape.lengths) + shape.channels)
    tokens, sequences = sum(shape.lengths) + padding, len(shape.lengths)
    (channels, sources, states, width) = shape[1:]
    draw = lambda *size: torch.randn(*size, generator=generator)
    return {
        "x": draw(tokens, sources), "u": draw(tokens, channels), "dt": 2 * draw(tokens, channels) - 2,
        "z": 2 * draw(tokens, channels), "b": draw(tokens, sources), "c": draw(tokens, channels),
        "weight": draw(channels, width) / 2, "bias": draw(channels) / 2,
        "a_log": torch.arange(1.0, states + 1).log() + draw(channels, states) / 2,
        "d": draw(channels), "dt_bias": draw(channels) / 2,
        "window": draw(sequences, width - 1, sources), "state": draw(sequences, states, channels),
        "dy": draw(tokens, channels), "dwindow": draw(sequences, width - 1, sources),
        "dstate": draw(sequences, states, channels),
    }  # fmt: skip


def moved(x: dict[str, torch.Tensor], to: str | torch.dtype) -> dict[str, torch.Tensor]:
    return {name: t.to(to) for name, t in x.items()}


def bits_equal(a: tuple | list, b: tuple | list) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def source_columns(channels: int, sources: int, group: int) -> torch.Tensor:
    """s(c) for each channel c, from its definition."""
    copies = channels // sources
    return torch.tensor([group * (c // group // copies) + c % group for c in range(channels)])


def published_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, silu: bool = True) -> torch.Tensor:
    """x (D,L), weight (D,W) -> (D,L)."""
    channels, width = weight.shape
    u = F.conv1d(x[None], weight[:, None], bias, padding=width - 1, groups=channels)[0, :, : x.shape[1]]
    return F.silu(u) if silu else u


def published_scan(
    u: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor,
    z: torch.Tensor, delta_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """u, delta, z (D,L), a (D,N), b and c (D,N,L): already repeated for each channel -> (D,L), last state (D,N)."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("dl,dn->dnl", delta, a))
    added = torch.einsum("dl,dnl,dl->dnl", delta, b, u)
    state, ys = torch.zeros_like(a), []
    for t in range(u.shape[1]):
        state = decay[..., t] * state + added[..., t]
        ys.append(torch.einsum("dn,dn->d", state, c[..., t]))
    return (torch.stack(ys, 1) + u * d[:, None]) * F.silu(z), state
