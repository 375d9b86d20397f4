"""linear against float64, its rows one by one bit for bit, its gradients, and results that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pymathrl.ops._call import _C
from pymathrl.ops.linear import linear, linear_out, linear_ref
from tests.oracle import accepts, assert_accurate

DEPTHS = (1, 7, 8, 64, 65, 513, 576, 1153, 1536)  # rests of a vector; one, two and three pieces of K
COLUMNS = (1, 2, 3, 5, 64, 193)
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 47, 48, 49, 63, 64, 65, 257)


def inputs(rows: int, depth: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, bias."""
    g = torch.Generator().manual_seed(1_000_000 * rows + 1000 * depth + columns)
    return (
        torch.randn(rows, depth, generator=g),
        torch.randn(columns, depth, generator=g) / depth**0.5,
        torch.randn(columns, generator=g),
    )


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_accuracy(device: str, depth: int, columns: int) -> None:
    for count in (2, 3):  # without and with bias
        ours, ref32, ref64 = [], [], []
        for rows in ROWS:
            given = inputs(rows, depth, columns)[:count]
            ours.append(linear(*(t.to(device) for t in given), exact=True))
            ref32.append(linear_ref(*given))
            ref64.append(linear_ref(*(t.double() for t in given)))
            assert ours[-1].shape == (rows, columns)
        # all M together: of one or two numbers the reference may hit the nearest float, which twice its error is not
        assert_accurate(torch.cat(ours), torch.cat(ref32), torch.cat(ref64))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_rows_do_not_depend_on_each_other(device: str, depth: int, columns: int) -> None:
    """Bit for bit: any rows, computed alone, in any number and from any offset, are those of the whole product."""
    x, w, bias = (t.to(device) for t in inputs(450, depth, columns))  # 450: two tasks of rows, several blocks in each
    whole = linear(x, w, bias, exact=True)
    for rows in ROWS:
        for first in (0, 1, 50, 450 - rows):
            part = linear(x[first : first + rows], w, bias, exact=True)
            assert torch.equal(part, whole[first : first + rows]), (rows, first)
    assert torch.equal(linear(x.flip(0), w, bias, exact=True), whole.flip(0))
    for row in range(0, 450, 7):
        assert torch.equal(linear(x[row], w, bias, exact=True), whole[row])


@pytest.mark.parametrize(("depth", "columns"), [(65, 5), (576, 193), (1153, 66)])
def test_memory_and_threads_do_not_matter(threads: Callable[[int], None], depth: int, columns: int) -> None:
    x, w, bias = inputs(450, depth, columns)
    threads(1)
    expected = linear(x, w, bias)
    for count in (1, 2):
        threads(count)
        for offset in (0, 1, 3):  # rows apart, and starts that no vector is aligned to
            wide = torch.zeros(450, depth + 9)
            wide[:, offset : offset + depth] = x
            same_w = torch.zeros(columns * depth + 3)[offset : offset + columns * depth].view(columns, depth).copy_(w)
            for rows in (1, 6, 450):
                out = torch.full((rows, columns + 4), -7.0)
                place = out[:, offset : offset + columns]
                assert linear_out(wide[:rows, offset : offset + depth], same_w, place, bias) is place
                assert torch.equal(place, expected[:rows])
                assert bool((out[:, :offset] == -7).all() and (out[:, offset + columns :] == -7).all())


def test_columns_do_not_depend_on_each_other_either() -> None:
    x, w, bias = inputs(70, 130, 193)
    whole = linear(x, w, bias)
    for first, last in ((0, 1), (5, 8), (64, 193), (130, 131)):
        assert torch.equal(linear(x, w[first:last], bias[first:last]), whole[:, first:last])


def test_hand_sized(device: str) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]], device=device)
    w = torch.tensor([[1.0, 0.0, -1.0], [2.0, 2.0, 2.0]], device=device)
    y = linear(x, w, torch.tensor([0.5, -1.0], device=device), exact=True)
    assert y.tolist() == [[-1.5, 11.0], [0.0, -2.0]]


def test_inf_and_nan_stay_in_their_row() -> None:
    x, w, bias = inputs(64, 65, 6)
    expected = linear(x, w, bias)
    x[3, 64], x[10, 0], x[40, 5] = torch.nan, torch.inf, -torch.inf  # 64: the rest of the vectors
    y = linear(x, w, bias)
    assert bool(y[3].isnan().all()) and not bool(y[[10, 40]].isfinite().any())
    others = [row for row in range(64) if row not in (3, 10, 40)]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 40)])
def test_gradients(device: str, shape: tuple[int, ...], bias: bool) -> None:
    rows = torch.Size(shape).numel()
    x, w, b = inputs(rows, 33, 21)
    x, dy = x.view(*shape, 33), torch.randn(*shape, 21, generator=torch.Generator().manual_seed(0))

    def run(op: Callable, dtype: torch.dtype, place: str) -> list[torch.Tensor]:
        tensors = [t.to(place, dtype).requires_grad_() for t in ((x, w, b) if bias else (x, w))]
        return list(torch.autograd.grad(op(*tensors), tensors, dy.to(place, dtype)))

    ours = run(lambda *t: linear(*t, exact=True), torch.float32, device)
    ref32, ref64 = (run(linear_ref, dtype, "cpu") for dtype in (torch.float32, torch.float64))
    for name, *three in zip(("dx", "dw", "dbias"), ours, ref32, ref64, strict=False):
        assert_accurate(*three, name)


def test_gradients_only_where_needed() -> None:
    x, w, bias = inputs(6, 9, 4)
    for which in range(3):
        tensors = [t.clone().requires_grad_(i == which) for i, t in enumerate((x, w, bias))]
        linear(*tensors).square().sum().backward()
        assert [t.grad is not None for t in tensors] == [i == which for i in range(3)]
    assert not linear(x, w, bias).requires_grad
    turned = torch.randn(9, 6).t().requires_grad_()  # no contiguous rows: copied
    torch.testing.assert_close(linear(turned, w, bias), linear_ref(turned, w, bias))
    with torch.no_grad():
        assert torch.equal(linear(turned, w, bias), linear(turned.contiguous(), w, bias))


def test_recorded_calls() -> None:
    """A Program replays linear_out on what its buffers then hold."""
    x, w, bias = inputs(5, 33, 8)
    out = torch.empty(5, 8)
    program = _C.Program()
    program.begin()
    linear_out(x, w, out, bias)
    program.end()
    x.mul_(-2)
    program.run()
    assert torch.equal(out, linear(x, w, bias))


def test_bf16_on_a_gpu(device: str) -> None:
    if device == "cpu":
        with pytest.raises(ValueError, match="x must be float32"):
            linear(torch.zeros(2, 4).bfloat16(), torch.zeros(3, 4).bfloat16())
        return
    x, w, _ = (t.to(device).bfloat16() for t in inputs(70, 100, 30))
    expected = linear_ref(x.double(), w.double())
    for exact in (False, True):
        out = linear_out(x, w, torch.empty(70, 30, device=device), exact=exact)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)  # fp32 sums of exact products
        assert linear(x, w, exact=exact).dtype == torch.bfloat16


def test_arguments_are_checked() -> None:
    x, w, bias = inputs(4, 6, 3)
    with pytest.raises(ValueError, match=r"w must have shape \[3, 6\], got \[3, 5\]"):
        linear(x, w[:, :5].contiguous(), bias)
    with pytest.raises(ValueError, match="w must be contiguous"):
        linear(x[:, :5], w[:, :5])
    with pytest.raises(ValueError, match=r"bias must have shape \[3\], got \[2\]"):
        linear(x, w, bias[:2])
    with pytest.raises(ValueError, match="x must be float32"):
        linear(x.double(), w)
    with pytest.raises(ValueError, match="at least one column"):
        linear(x[:, :0], w[:, :0])
    with pytest.raises(ValueError, match=r"x must be \[...,K\] and w \[N,K\]"):
        linear(x, bias)
    with pytest.raises(ValueError, match=r"out must have shape \[4, 3\], got \[4, 4\]"):
        linear_out(x, w, torch.empty(4, 4))
    with pytest.raises(ValueError, match="rows of out must not overlap"):
        linear_out(x, w, torch.empty(3).expand(4, 3))
    with pytest.raises(ValueError, match="out must be float32"):
        linear_out(x, w, torch.empty(4, 3).double())
    with pytest.raises(ValueError, match="rows of x must be contiguous"):
        linear_out(torch.empty(6, 4).t(), w, torch.empty(4, 3))
    assert linear(torch.zeros(0, 6), w, bias).shape == (0, 3)
    assert linear(x, torch.zeros(0, 6)).shape == (4, 0)


# name -> what a wrong kernel gives for x [M,K], w [N,K], bias [N]; M = N, so that no shape gives it away
MUTANTS: dict[str, Callable[..., torch.Tensor]] = {
    "rest of K dropped": lambda x, w, b: x[:, :64] @ w[:, :64].t() + b,
    "last piece of K twice": lambda x, w, b: x @ w.t() + x[:, 64:] @ w[:, 64:].t() + b,
    "bias by row": lambda x, w, b: x @ w.t() + b[:, None],
    "bias left out": lambda x, w, b: x @ w.t(),
    "bias twice": lambda x, w, b: x @ w.t() + 2 * b,
    "w taken as its transpose": lambda x, w, b: x @ w.reshape(w.shape[1], w.shape[0]) + b,
    "y transposed": lambda x, w, b: (x @ w.t() + b).t(),
    "last column that of its neighbour": lambda x, w, b: (x @ w.t() + b)[:, [*range(18), 17]],
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_products_are_refused(name: str) -> None:
    x, w, bias = inputs(19, 65, 19)
    ref32, ref64 = linear_ref(x, w, bias), linear_ref(x.double(), w.double(), bias.double())
    assert accepts(linear(x, w, bias), ref32, ref64)
    assert not accepts(MUTANTS[name](x.double(), w.double(), bias.double()).float(), ref32, ref64)
