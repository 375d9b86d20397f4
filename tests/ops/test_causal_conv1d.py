"""causal_conv1d against float64 and the published formula; packing, cuts and threads that must not show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from pymathrl.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref
from tests.ops.mamba_cases import (
    SHAPES,
    Shape,
    bits_equal,
    mamba_inputs,
    moved,
    offsets_of,
    published_conv,
    source_columns,
)
from tests.oracle import accepts, assert_accurate

LEAVES = ("x", "weight", "bias", "window")
NAMES = ("u", "final", *(f"d{name}" for name in LEAVES))


def kernel(*args, **options):
    return causal_conv1d(*args, **options, return_final=True)


def run(op: Callable, x: dict[str, torch.Tensor], shape: Shape, silu: bool = True) -> list[torch.Tensor]:
    """u, final and the gradients of both by x, weight, bias and the window before."""
    leaves = [x[name].clone().requires_grad_() for name in LEAVES]
    u, final = op(
        *leaves[:3], offsets_of(shape.lengths).to(leaves[0].device), group=shape.states, initial=leaves[3], silu=silu
    )
    gradients = torch.autograd.grad([u, final], leaves, [x["dy"].to(u.dtype), x["dwindow"]])
    return [u.detach(), final.detach(), *gradients]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device: str, shape: Shape, silu: bool) -> None:
    x = mamba_inputs(shape, padding=3)
    ours = run(kernel, moved(x, device), shape, silu)
    ref32, ref64 = run(causal_conv1d_ref, x, shape, silu), run(causal_conv1d_ref, moved(x, torch.float64), shape, silu)
    for name, a, b, c in zip(NAMES, ours, ref32, ref64, strict=True):
        assert_accurate(a, b, c, name)
    assert not ours[0][-3:].any() and not ours[2][-3:].any()  # padding


def table(*numbers: float, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(numbers, device=device)[:, None]


@pytest.mark.parametrize(
    ("lengths", "u", "dx", "dw", "db"),
    [
        (
            (5,),
            (1.87089668, 2.96636751, -0.10980458, 2.96636751, 5.06909501),
            (3.25629809, -1.04778324, -1.73116338, 3.31440091, 2.04931582),
            (3.27741945, -2.81592809, 3.12120254),
            3.16745321,
        ),
        (
            (3, 2),
            (1.87089668, 2.96636751, -0.10980458, 0.82528612, 5.57936826),
            (3.25629809, -2.13254795, -0.07396293, 2.8085964, 2.03374298),
            (-0.03698146, -0.65029189, 2.96944556),
            2.90287133,
        ),
    ],
)
def test_hand_sized(device: str, lengths: tuple, u: tuple, dx: tuple, dw: tuple, db: float) -> None:
    """p = (2.1, 3.1, -3.4, 3.1, 5.1), and (1.1, 5.6) at the end where a second sequence starts."""
    x = table(1, 2, -1, 0.5, 3, device=device).requires_grad_()
    weight = torch.tensor([[0.5, -1.0, 2.0]], device=device).requires_grad_()
    bias = torch.tensor([0.1], device=device).requires_grad_()
    out = causal_conv1d(x, weight, bias, offsets_of(lengths).to(device))
    got = torch.autograd.grad(out, (x, weight, bias), table(1, -1, 0.5, 2, 1, device=device))
    close = lambda a, b: torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
    close(out.detach(), table(*u))
    for a, b in zip(got, (table(*dx), torch.tensor([dw]), torch.tensor([db])), strict=True):
        close(a, b)


def test_hand_sized_update(device: str) -> None:
    """The window (1,2,3), then 4: p = 1.25. Then -1 over (2,3,4): p = -0.75."""
    weight, bias = torch.tensor([[0.1, 0.2, -0.3, 0.4]], device=device), torch.tensor([0.05], device=device)
    window = torch.tensor([[[1.0], [2.0], [3.0]]], device=device)
    for x, u, after in ((4.0, 0.97162483, (2.0, 3.0, 4.0)), (-1.0, -0.24061598, (3.0, 4.0, -1.0))):
        out, window = causal_conv1d(
            table(x, device=device), weight, bias, offsets_of((1,)).to(device), initial=window, return_final=True
        )
        torch.testing.assert_close(out.cpu(), table(u), rtol=1e-5, atol=0)
        assert window.flatten().tolist() == list(after)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_against_the_published_formula(shape: Shape) -> None:
    x = moved(mamba_inputs(shape), torch.float64)
    u, final = causal_conv1d_ref(x["x"], x["weight"], x["bias"], offsets_of(shape.lengths), group=shape.states)
    columns = source_columns(shape.channels, shape.sources, shape.states)
    for sequence, (first, last) in enumerate(itertools.pairwise(offsets_of(shape.lengths).tolist())):
        alone = x["x"][first:last, columns].t()
        if first < last:
            torch.testing.assert_close(u[first:last].t(), published_conv(alone, x["weight"], x["bias"]))
        kept = torch.cat([torch.zeros(shape.width - 1, shape.sources), x["x"][first:last]])[1 - shape.width :]
        assert torch.equal(final[sequence], kept)


MUTANTS: dict[str, Callable] = {
    "no reset": lambda x, w, b, o, initial, **kw: causal_conv1d_ref(
        x, w, b, o[[0, -1]], initial=initial[:1], **kw
    ),
    "no bias": lambda x, w, b, o, **kw: causal_conv1d_ref(x, w, 0 * b, o, **kw),
    "taps reversed": lambda x, w, b, o, **kw: causal_conv1d_ref(x, w.flip(1), b, o, **kw),
    "tiled repeat": lambda x, w, b, o, group, **kw: causal_conv1d_ref(
        x, w, b, o, group=x.shape[1], **kw
    ),
    "no silu": lambda *a, silu, **kw: causal_conv1d_ref(*a, silu=False, **kw),
    "initial ignored": lambda x, w, b, o, initial, **kw: causal_conv1d_ref(x, w, b, o, initial=0 * initial, **kw),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_refused(name: str) -> None:
    shape = SHAPES[1]
    x = mamba_inputs(shape)
    x64 = moved(x, torch.float64)
    ref32, ref64 = run(causal_conv1d_ref, x, shape), run(causal_conv1d_ref, x64, shape)
    mutant = lambda *a, **kw: pad_final(MUTANTS[name](*a, **kw), len(shape.lengths))
    wrong = run(mutant, x64, shape)
    assert accepts(run(kernel, x, shape)[0], ref32[0], ref64[0])
    assert not accepts(wrong[0].float(), ref32[0], ref64[0])
    assert not accepts(wrong[2].float(), ref32[2], ref64[2])


def pad_final(both: tuple[torch.Tensor, torch.Tensor], sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    return both[0], both[1].expand(sequences, -1, -1) if len(both[1]) < sequences else both[1]


def test_gradient_of_final_counts() -> None:
    shape = SHAPES[1]
    x = mamba_inputs(shape)
    ref32, ref64 = run(causal_conv1d_ref, x, shape), run(causal_conv1d_ref, moved(x, torch.float64), shape)
    without = run(kernel, x | {"dwindow": 0 * x["dwindow"]}, shape)
    for index in (2, 5):  # dx, dwindow
        assert not accepts(without[index], ref32[index], ref64[index])


def test_gradcheck() -> None:
    shape = Shape((3, 0, 1), 8, 4, 2, 4)
    x = moved(mamba_inputs(shape), torch.float64)
    leaves = [x[name].requires_grad_() for name in LEAVES]
    op = lambda x, w, b, initial: causal_conv1d_ref(x, w, b, offsets_of(shape.lengths), group=2, initial=initial)
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_is_separate(device: str, shape: Shape) -> None:
    """Values and gradients of a sequence, bit for bit. The weights' gradients sum over sequences and may round."""
    x = moved(mamba_inputs(shape), device)
    u, final, dx, _, _, dwindow = run(kernel, x, shape)
    for sequence, (first, last) in enumerate(itertools.pairwise(offsets_of(shape.lengths).tolist())):
        one = {k: v[first:last] if k in ("x", "dy") else v for k, v in x.items()}
        one |= {k: x[k][sequence : sequence + 1] for k in ("window", "dwindow")}
        alone = run(kernel, one, shape._replace(lengths=(last - first,)))
        whole = (u[first:last], final[sequence, None], dx[first:last], dwindow[sequence, None])
        assert bits_equal((*alone[:3], alone[5]), whole)


@pytest.mark.parametrize("cut", [1, 2, 63, 64, 65, 129])
def test_cut_is_whole(device: str, cut: int) -> None:
    x = moved(mamba_inputs(SHAPES[2]), device)
    weights = (x["weight"], x["bias"])
    offsets = lambda n: offsets_of((n,)).to(device)
    whole, last = causal_conv1d(x["x"], *weights, offsets(130), group=16, return_final=True)
    head, window = causal_conv1d(x["x"][:cut], *weights, offsets(cut), group=16, return_final=True)
    tail, window = causal_conv1d(
        x["x"][cut:], *weights, offsets(130 - cut), group=16, initial=window, return_final=True
    )
    assert bits_equal((torch.cat([head, tail]), window), (whole, last))


def test_options(device: str) -> None:
    """Rows that are apart, no bias, no window before, a gradient through one result only."""
    shape = SHAPES[1]
    x = moved(mamba_inputs(shape), device)
    offsets = offsets_of(shape.lengths).to(device)
    wide = torch.cat([x["dy"], x["x"], x["dy"]], 1)[:, 96:128]
    apart, dense = wide.detach().requires_grad_(), x["x"].clone().requires_grad_()
    results = [causal_conv1d(leaf, x["weight"], None, offsets, group=16, return_final=True) for leaf in (apart, dense)]
    assert bits_equal(*results)
    zeros = causal_conv1d(
        dense, x["weight"], torch.zeros_like(x["bias"]), offsets, group=16, initial=torch.zeros_like(x["window"])
    )
    assert torch.equal(zeros, results[0][0])
    for index, gradient in ((0, x["dy"]), (1, x["dwindow"])):
        a, b = (
            torch.autograd.grad(result[index], leaf, gradient, retain_graph=True)[0]
            for result, leaf in zip(results, (apart, dense), strict=True)
        )
        assert a.is_contiguous() and torch.equal(a, b) and a.any()


def test_threads_do_not_matter(threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2):
        threads(count)
        results.append([y for shape in SHAPES for y in run(kernel, mamba_inputs(shape), shape)])
    assert bits_equal(*results)


@pytest.mark.gpu
def test_bfloat16(device: str) -> None:
    if device == "cpu":
        pytest.skip("on a CPU the op is fp32")
    shape = SHAPES[1]
    x = mamba_inputs(shape)
    low = {name: t.bfloat16() if name in ("x", "dy") else t for name, t in x.items()}
    ours, ref64 = run(kernel, moved(low, device), shape), run(causal_conv1d_ref, moved(low, torch.float64), shape)
    for name, a, c in zip(NAMES, ours, ref64, strict=True):
        assert_accurate(a.float(), c.to(a.dtype).float(), c, name)


def test_no_tokens_and_nan(device: str) -> None:
    weight, bias = torch.ones(4, 3, device=device), torch.zeros(4, device=device)
    u, final = causal_conv1d(
        torch.zeros(0, 2, device=device), weight, bias, torch.tensor([0], device=device), return_final=True
    )
    assert u.shape == (0, 4) and final.shape == (0, 2, 2)
    x = torch.zeros(70, 2, device=device)
    x[3, 1] = math.nan
    u = causal_conv1d(x, weight, bias, torch.tensor([0, 5, 70], device=device))
    assert torch.isnan(u).nonzero().tolist() == [[t, c] for t in (3, 4) for c in (2, 3)]


def test_arguments_are_checked() -> None:
    x, weight, bias, offsets = torch.zeros(5, 4), torch.zeros(8, 4), torch.zeros(8), torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"weight \[D,W\] with D a multiple of X, got \[5, 4\] and \[6, 4\]"):
        causal_conv1d(x, weight[:6], bias, offsets)
    with pytest.raises(ValueError, match="group must divide the 4 columns of x, got 3"):
        causal_conv1d(x, weight, bias, offsets, group=3)
    with pytest.raises(ValueError, match=r"width of weight must be in 2\.\.4, got 5"):
        causal_conv1d(x, torch.zeros(8, 5), bias, offsets)
    with pytest.raises(ValueError, match=r"bias must have shape \[8\], got \[4\]"):
        causal_conv1d(x, weight, bias[:4], offsets)
    with pytest.raises(ValueError, match=r"offsets must start at 0 and rise to at most 5 .*, got 6 at 1"):
        causal_conv1d(x, weight, bias, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"initial must have shape \[1, 3, 4\], got \[1, 4, 4\]"):
        causal_conv1d(x, weight, bias, offsets, initial=torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="x must be float32 on a CPU, got bfloat16"):
        causal_conv1d(x.bfloat16(), weight, bias, offsets)
