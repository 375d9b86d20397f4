"""rms_norm and add_rms_norm against float64, their gradients, and results that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pymathrl import _C
from pymathrl.ops.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_out, rms_norm_ref
from tests.oracle import accepts, assert_accurate

EPS = 1e-6


def inputs(rows: int, width: int) -> list[torch.Tensor]:
    """x, residual, weight, and gradients of h and y."""
    g = torch.Generator().manual_seed(width)
    x, residual, dh, dy = (torch.randn(rows, width, generator=g) for _ in range(4))
    return [x, residual, 1 + 0.3 * torch.randn(width, generator=g), dh, dy]


def run(op: Callable, tensors: list[torch.Tensor], added: bool) -> dict[str, torch.Tensor]:
    x, residual, weight = (t.clone().requires_grad_() for t in tensors[:3])
    if not added:
        y = op(x, weight, EPS)
        dx, dw = torch.autograd.grad(y, (x, weight), tensors[4])
        return {"y": y, "dx": dx, "dw": dw}
    h, y = op(x, residual, weight, EPS)
    dx, dr, dw = torch.autograd.grad((h, y), (x, residual, weight), tensors[3:])
    return {"h": h, "y": y, "dx": dx, "dr": dr, "dw": dw}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 15), (5, 33), (700, 64), (257, 96), (2, 1000)])
def test_accuracy(device: str, rows: int, width: int, added: bool) -> None:
    tensors = inputs(rows, width)
    ours = run(add_rms_norm if added else rms_norm, [t.to(device) for t in tensors], added)
    reference = add_rms_norm_ref if added else rms_norm_ref
    ref32, ref64 = run(reference, tensors, added), run(reference, [t.double() for t in tensors], added)
    for name in ours:
        assert_accurate(ours[name], ref32[name], ref64[name], name)


def test_hand_sized(device: str) -> None:
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]], device=device)  # mean of squares 25/4, rms 2.5
    y = rms_norm(x, torch.tensor([1.0, 2.0, 1.0, 1.0], device=device), 0.0)
    torch.testing.assert_close(y.cpu(), torch.tensor([[1.2, 3.2, 0.0, 0.0]]))
    h, y = add_rms_norm(x, -x / 2, torch.ones(4, device=device), 0.0)
    torch.testing.assert_close(h, x / 2)
    torch.testing.assert_close(y.cpu(), torch.tensor([[1.2, 1.6, 0.0, 0.0]]))


def test_wrong_results_are_refused() -> None:
    tensors = inputs(64, 96)
    ref32, ref64 = run(rms_norm_ref, tensors, False), run(rms_norm_ref, [t.double() for t in tensors], False)
    x, _, weight, _, dy = (t.double() for t in tensors)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    mutants = {
        "y": [x * rstd, x * rstd * weight * (95 / 96) ** 0.5, (x - x.mean(-1, keepdim=True)) * rstd * weight],
        "dx": [dy * weight * rstd, dy * rstd, -ref64["dx"]],
        "dw": [(dy * x).sum(0), (dy * x * rstd).mean(0), (dy * x * rstd)[:63].sum(0)],
    }
    for name, wrong in mutants.items():
        assert accepts(ref64[name].float(), ref32[name], ref64[name])
        for i, mutant in enumerate(wrong):
            assert not accepts(mutant.float(), ref32[name], ref64[name]), f"{name} {i}"


def test_gradient_of_one_output_only() -> None:
    x, residual, weight, dh, dy = inputs(7, 40)
    for which in (0, 1):
        a, b, w = (t.clone().requires_grad_() for t in (x, residual, weight))
        c, d, v = (t.clone().requires_grad_() for t in (x, residual, weight))
        seed = (dh, dy)[which]
        add_rms_norm(a, b, w, EPS)[which].backward(seed)
        add_rms_norm_ref(c, d, v, EPS)[which].backward(seed)
        for ours, expected in ((a, c), (b, d), (w, v)):
            if expected.grad is None:
                assert ours.grad is None
            else:
                torch.testing.assert_close(ours.grad, expected.grad)


def test_threads_do_not_matter(threads: Callable[[int], None]) -> None:
    tensors = inputs(2000, 96)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(run(add_rms_norm, tensors, True))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_without_gradients_equals_with() -> None:
    x, residual, weight, _, _ = inputs(9, 64)
    with torch.no_grad():
        plain = add_rms_norm(x, residual, weight, EPS)
    graph = add_rms_norm(x.requires_grad_(), residual, weight, EPS)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph, strict=True))


def test_a_row_is_alone(device: str) -> None:
    """The bits of a row depend on no other row, forward and backward."""
    x, residual, weight, dh, dy = (t.to(device) for t in inputs(70, 45))
    whole = run(add_rms_norm, [x, residual, weight, dh, dy], True)
    for row in (0, 33, 69):
        part = [x[row : row + 1], residual[row : row + 1], weight, dh[row : row + 1], dy[row : row + 1]]
        single = run(add_rms_norm, part, True)
        assert all(torch.equal(single[name][0], whole[name][row]) for name in ("h", "y", "dx"))


@pytest.mark.parametrize("width", [45, 64])
def test_into_buffers_and_in_place(device: str, width: int) -> None:
    x, residual, weight, _, _ = (t.to(device) for t in inputs(9, width))
    y, total = torch.empty_like(x), torch.empty_like(x)
    rms_norm_out(x, weight, y, EPS)
    assert torch.equal(y, rms_norm(x, weight, EPS))
    expected = add_rms_norm(x, residual, weight, EPS)
    rms_norm_out(x, weight, y, EPS, residual, total)
    assert all(torch.equal(a, b) for a, b in zip((total, y), expected, strict=True))
    for where in (0, 1):
        pair = [x.clone(), residual.clone()]
        rms_norm_out(pair[0], weight, y, EPS, pair[1], sum=pair[where])
        assert all(torch.equal(a, b) for a, b in zip((pair[where], y), expected, strict=True))
        assert torch.equal(pair[1 - where], (x, residual)[1 - where])


def test_recorded_call_reads_its_buffers_again() -> None:
    x, residual, weight, _, _ = inputs(3, 40)
    stream, y = residual.clone(), torch.empty_like(x)
    program = _C.Program()
    program.begin()
    rms_norm_out(x, weight, y, EPS, stream, stream)
    program.end()
    assert torch.equal(stream, residual)  # recorded, not run
    program.run()
    program.run()
    h, expected = add_rms_norm(x, x + residual, weight, EPS)
    assert torch.equal(stream, h)
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("added", [False, True])
def test_bfloat16(device: str, added: bool) -> None:
    if device == "cpu":
        pytest.skip("on a CPU the op is fp32")
    tensors = [t.bfloat16() for t in inputs(257, 96)]
    if added:
        tensors[1] = tensors[0] / 2 - tensors[0]  # a sum that bf16 holds exactly: its rounding is not the norm's error
    ours = run(add_rms_norm if added else rms_norm, [t.to(device) for t in tensors], added)
    exact = run(add_rms_norm_ref if added else rms_norm_ref, [t.double() for t in tensors], added)
    for name, value in exact.items():
        assert_accurate(ours[name].float(), value.bfloat16().float(), value, name)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="x and residual must agree"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(3, 4), torch.ones(4), EPS)
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(torch.zeros(2, 4), torch.ones(5), EPS)
    with pytest.raises(ValueError, match="x must be float32"):
        rms_norm(torch.zeros(2, 4).double(), torch.ones(4), EPS)
    with pytest.raises(ValueError, match="x must be float32 on a CPU, got bfloat16"):
        rms_norm(torch.zeros(2, 4).bfloat16(), torch.ones(4).bfloat16(), EPS)
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="give both or neither"):
        rms_norm_out(x, torch.ones(4), torch.empty(2, 4), EPS, residual=x)
    with pytest.raises(ValueError, match="y must have shape"):
        rms_norm_out(x, torch.ones(4), torch.empty(3, 4), EPS)
