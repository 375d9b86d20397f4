"""swiglu against float64, its gradient, the ends of the sigmoid, and the form that writes into a given buffer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pymathrl import _C
from pymathrl.ops.swiglu import swiglu, swiglu_out, swiglu_ref
from tests.oracle import assert_accurate

SHAPES = [(1, 1), (3, 8), (5, 17), (2, 1000), (257, 96)]


def inputs(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    gate_up = torch.randn(rows, 2 * width, generator=generator)
    gate_up[:, :width] *= 4  # the sigmoid's bend and both its flat ends
    return gate_up, torch.randn(rows, width, generator=generator)


def run(op: Callable, gate_up: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = gate_up.clone().requires_grad_()
    out = op(x)
    return out.detach(), torch.autograd.grad(out, x, dout)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device: str, shape: tuple[int, int]) -> None:
    gate_up, dout = inputs(*shape)
    ours = run(swiglu, gate_up.to(device), dout.to(device))
    ref32, ref64 = run(swiglu_ref, gate_up, dout), run(swiglu_ref, gate_up.double(), dout.double())
    for name, a, b, c in zip(("out", "dgate_up"), ours, ref32, ref64, strict=True):
        assert_accurate(a, b, c, name)


def test_hand_sized(device: str) -> None:
    """gate 0: silu 0, slope 1/2. gate ln 3: sigmoid 3/4, silu 3/4 ln 3, slope 3/4 + ln 3 * 3/16."""
    ln3 = math.log(3)
    out, gradient = run(
        swiglu, torch.tensor([[0.0, ln3, -ln3, 5.0, 2.0, 4.0]], device=device), torch.ones(1, 3, device=device)
    )
    torch.testing.assert_close(out.cpu(), torch.tensor([[0.0, 1.5 * ln3, -ln3]]))
    slopes = [0.5 * 5, (0.75 + ln3 * 3 / 16) * 2, (0.25 - ln3 * 3 / 16) * 4]
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[*slopes, 0.0, 0.75 * ln3, -0.25 * ln3]]))


def test_each_element_at_the_ends(device: str) -> None:
    """Relative to each element, not to the largest: slopes of silu are e^-x small, and must not be 0 or overflow."""
    gate = torch.tensor([-1e30, -200.0, -80.0, -20.0, -1e-3, 1e-30, 17.0, 80.0, 1e30])
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    out, gradient = run(swiglu, gate_up.to(device), torch.ones(1, 9, device=device))
    out64, gradient64 = run(swiglu_ref, gate_up.double(), torch.ones(1, 9).double())
    torch.testing.assert_close(out.cpu().double(), out64, rtol=5e-7, atol=1e-36)
    torch.testing.assert_close(gradient.cpu().double(), gradient64, rtol=5e-7, atol=1e-34)
    nan, _ = run(swiglu, torch.tensor([[math.nan, 1.0, 1.0, math.nan]], device=device), torch.ones(1, 2, device=device))
    assert torch.isnan(nan).all()


def test_a_row_is_alone(device: str) -> None:
    gate_up, dout = (t.to(device) for t in inputs(37, 45))
    whole = run(swiglu, gate_up, dout)
    for row in (0, 36):
        single = run(swiglu, gate_up[row : row + 1], dout[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(single, whole, strict=True))


def test_threads_do_not_matter(threads: Callable[[int], None]) -> None:
    gate_up, dout = inputs(500, 100)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(run(swiglu, gate_up, dout))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_into_a_buffer_and_recorded(device: str) -> None:
    gate_up, _ = (t.to(device) for t in inputs(5, 17))
    out = torch.full((5, 17), math.nan, device=device)
    swiglu_out(gate_up, out)
    assert torch.equal(out, swiglu(gate_up))
    if device == "cpu":
        program = _C.Program()
        program.begin()
        swiglu_out(gate_up, out)
        program.end()
        gate_up.copy_(-gate_up)
        program.run()
        assert torch.equal(out, swiglu(gate_up))


@pytest.mark.gpu
def test_bfloat16(device: str) -> None:
    if device == "cpu":
        pytest.skip("on a CPU the op is fp32")
    gate_up, dout = (t.bfloat16() for t in inputs(257, 96))
    ours = run(swiglu, gate_up.to(device), dout.to(device))
    ref64 = run(swiglu_ref, gate_up.double(), dout.double())
    for name, a, c in zip(("out", "dgate_up"), ours, ref64, strict=True):
        assert_accurate(a.float(), c.bfloat16().float(), c, name)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"gate_up must have shape \[T,2F\], got \[2, 3\]"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="gate_up must be float32 on a CPU, got float64"):
        swiglu(torch.zeros(2, 4).double())
    with pytest.raises(ValueError, match=r"gate_up must have shape \[2, 6\], got \[2, 4\]"):
        swiglu_out(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="out must be contiguous"):
        swiglu_out(torch.zeros(2, 4), torch.zeros(2, 4)[:, :2])
