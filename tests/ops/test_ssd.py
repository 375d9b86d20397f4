"""ssd_scan and ssd_step against float64, against the chunk form of the paper, and against each other bit for bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pymathrl import _C
from pymathrl.ops.ssd import ssd_scan, ssd_scan_ref, ssd_step, ssd_step_ref
from tests.oracle import accepts, assert_accurate

# heads, channels of a head, groups, states; lengths; tokens of padding
SHAPES = {
    "one token": ((1, 1, 1, 1), (1,), 0),
    "odd sizes": ((6, 5, 3, 7), (5, 0, 1, 19), 3),
    "one group": ((8, 24, 1, 20), (70, 1, 131), 0),
    "chunk and its neighbours": ((4, 8, 2, 16), (255, 256, 257), 0),
    "M1": ((3, 128, 3, 128), (130, 64), 1),
    "most states": ((2, 17, 2, 256), (65,), 0),
}
INPUTS = ("x", "dt", "b", "c", "a_log", "d", "dt_bias", "initial")
# ddt is a difference of two sums, the gradients of the weights are sums over tokens: where large terms cancel in a few
# numbers, the last digits are luck in the reference as in ours.
FLOOR = {"ddt": 3e-7, "da_log": 2e-6, "dd": 2e-6, "ddt_bias": 2e-6}


def draw(shape: tuple[int, int, int, int], lengths: tuple[int, ...], padding: int = 0) -> dict[str, Any]:
    """Decays from almost 1 to almost 0, delta on both sides of the bend of softplus."""
    heads, width, groups, states = shape
    tokens = sum(lengths) + padding
    generator = torch.Generator().manual_seed(tokens + width)
    normal = lambda *size: torch.randn(*size, generator=generator)
    return {
        "x": normal(tokens, heads * width), "dt": 2 * normal(tokens, heads) - 1, "b": normal(tokens, groups * states),
        "c": normal(tokens, groups * states), "a_log": torch.linspace(-4, 2, heads), "d": normal(heads),
        "dt_bias": normal(heads), "initial": normal(len(lengths), heads, states, width),
        "offsets": torch.tensor([0, *lengths]).cumsum(0), "groups": groups,
    }  # fmt: skip


def to(data: dict[str, Any], target: Any) -> dict[str, Any]:
    return {k: v.to(target) if k in INPUTS else v for k, v in data.items()}


def run(op: Callable, data: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """y, final and the gradient of a weighted sum of both in every input."""
    leaves = {k: data[k].clone().requires_grad_() for k in INPUTS}
    y, final = op(**leaves, offsets=data["offsets"], groups=data["groups"], **options)
    weights = [torch.arange(t.numel(), dtype=torch.float64).sin().view(t.shape).to(t) for t in (y, final)]
    gradients = torch.autograd.grad([y, final], list(leaves.values()), weights)
    return {"y": y.detach(), "final": final.detach(), **{f"d{k}": g for k, g in zip(INPUTS, gradients, strict=True)}}


def scan(data: dict[str, Any], device: str = "cpu", **options: Any) -> dict[str, torch.Tensor]:
    data = to(data, device) | {"offsets": data["offsets"].to(device)}
    return run(ssd_scan, data, return_final=True, **options)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert {k for k in a if not torch.equal(a[k], b[k])} == set()


@functools.cache
def references(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    data = draw(*SHAPES[name])
    return run(ssd_scan_ref, data), run(ssd_scan_ref, to(data, torch.float64))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunk", [256, 100, 7])
def test_accuracy(device: str, name: str, chunk: int) -> None:
    ours = scan(draw(*SHAPES[name]), device, chunk=chunk)
    ref32, ref64 = references(name)
    for k in ours:
        assert_accurate(ours[k], ref32[k], ref64[k], k, FLOOR.get(k, 1e-7))


def test_hand_sized(device: str) -> None:
    """delta = ln 2, a = e^(-ln 2 * 1/ln 2 * ln 2) = 1/2 with A = -1: S = 0, 1, 1/2 + 3 for delta x = 1, 3 and b = 1."""
    ln2 = math.log(2)
    zero, one = torch.zeros(1), torch.ones(1)
    data = {
        "x": torch.tensor([[1.0], [3.0]]) / ln2, "dt": torch.zeros(2, 1), "b": torch.ones(2, 1),
        "c": torch.tensor([[2.0], [-1.0]]), "a_log": zero, "d": ln2 * one, "dt_bias": zero,
        "initial": torch.zeros(1, 1, 1, 1), "offsets": torch.tensor([0, 2]), "groups": 1,
    }  # fmt: skip
    out = scan(data, device)
    torch.testing.assert_close(out["y"].cpu(), torch.tensor([[1.0 + 2.0], [3.0 - 3.5]]))
    torch.testing.assert_close(out["final"].flatten().cpu(), torch.tensor([3.5]))


def chunk_form(data: dict[str, Any], size: int) -> dict[str, torch.Tensor]:
    """One sequence by matrices of whole chunks, forward and backward, with the decays as sums in the exponent: the
    equations of the paper (section 6) and their gradient, written out head by head."""
    heads, groups = data["a_log"].shape[0], data["groups"]
    x, b, c = (data[k].unflatten(1, (n, -1)) for k, n in (("x", heads), ("b", groups), ("c", groups)))
    out = {k: torch.zeros_like(data[k]) for k in INPUTS}
    dx, db, dc = (out[k].unflatten(1, (n, -1)) for k, n in (("x", heads), ("b", groups), ("c", groups)))
    y, final = torch.zeros_like(x), torch.zeros_like(data["initial"])
    dy = torch.arange(y.numel(), dtype=y.dtype).sin().view(y.shape)
    dfinal = torch.arange(final.numel(), dtype=y.dtype).sin().view(final.shape)
    for h in range(heads):
        g, rate = h // (heads // groups), -data["a_log"][h].exp()
        delta = F.softplus(data["dt"][:, h] + data["dt_bias"][h])
        state, kept = data["initial"][0, h].T, []  # [P,N]
        for part in torch.arange(len(delta)).split(size):
            cs = (rate * delta[part]).cumsum(0)
            low = torch.exp(cs[:, None] - cs).tril()
            scaled, e, w = delta[part, None] * x[part, h], cs.exp()[:, None], (cs[-1] - cs).exp()[:, None]
            kept.append((part, low, scaled, e, w, e[-1, 0], state))
            y[part, h] = (low * (c[part, g] @ b[part, g].T)) @ scaled + e * (c[part, g] @ state.T)
            state = e[-1] * state + (w * scaled).T @ b[part, g]
        y[:, h] += data["d"][h] * x[:, h]
        final[0, h] = state.T
        dstate = dfinal[0, h].T
        for part, low, scaled, e, w, f, state in reversed(kept):
            bs, cs, dys, xs, deltas = b[part, g], c[part, g], dy[part, h], x[part, h], delta[part]
            mixed = low * (cs @ bs.T)
            d_mixed = (dys @ scaled.T).tril()
            d_cb, t = d_mixed * low, d_mixed * mixed
            d_scaled = mixed.T @ dys + w * (bs @ dstate.T)
            v = w[:, 0] * (scaled * (bs @ dstate.T)).sum(1)
            d_cs = t.sum(1) - t.sum(0) + e[:, 0] * (dys * (cs @ state.T)).sum(1) - v
            d_cs[-1] += v.sum() + f * (state * dstate).sum()
            da = d_cs.flip(0).cumsum(0).flip(0)
            ddelta = (d_scaled * xs).sum(1) + rate * da
            dx[part, h] = deltas[:, None] * d_scaled + data["d"][h] * dys
            dc[part, g] += d_cb @ bs + e * (dys @ state)
            db[part, g] += d_cb.T @ cs + w * (scaled @ dstate)
            out["dt"][part, h] = ddelta * torch.sigmoid(data["dt"][part, h] + data["dt_bias"][h])
            out["a_log"][h] += rate * (deltas * da).sum()
            out["d"][h] += (dys * xs).sum()
            dstate = f * dstate + (e * dys).T @ cs
        out["dt_bias"][h] = out["dt"][:, h].sum()
        out["initial"][0, h] = dstate.T
    return {"y": y.flatten(1), "final": final, **{f"d{k}": v for k, v in out.items()}}


@pytest.mark.parametrize("size", [4, 16])
def test_chunk_form_of_the_paper(size: int) -> None:
    data = to(draw((4, 3, 2, 5), (19,)), torch.float64)
    expected = run(ssd_scan_ref, data)
    for k, value in chunk_form(data, size).items():
        torch.testing.assert_close(value, expected[k], rtol=1e-10, atol=1e-11, msg=k)


def test_reference_gradients() -> None:
    data = to(draw((2, 2, 1, 3), (3, 0, 2), 1), torch.float64)
    leaves = [data[k].requires_grad_() for k in INPUTS]
    op = lambda *t: ssd_scan_ref(*t[:-1], data["offsets"], groups=1, initial=t[-1])
    assert torch.autograd.gradcheck(op, leaves)


def mutants(data: dict[str, Any]) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """Wrong kernels: what each computes, in float64."""
    heads, groups, size = data["a_log"].shape[0], data["groups"], 16

    def state_not_carried(**inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs["offsets"] = torch.arange(0, data["x"].shape[0] + 1, size)
        inputs["initial"] = torch.cat([inputs["initial"], torch.zeros_like(inputs["initial"])], 0)[[0, 1, 1]]
        y, final = ssd_scan_ref(**inputs)
        return y, final[-1:]

    def regrouped(t: torch.Tensor) -> torch.Tensor:
        """Head h reads group h % G: the same as h // (H/G) where each head has its own."""
        return t.unflatten(1, (groups, -1)).repeat(1, heads // groups, 1).flatten(1)

    def tiled(**inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        changed = {"b": regrouped(inputs["b"]), "c": regrouped(inputs["c"]), "groups": heads}
        return ssd_scan_ref(**inputs | changed)

    def without(name: str) -> Callable:
        return lambda **inputs: ssd_scan_ref(**inputs | {name: 0 * inputs[name]})

    def final_detached(**inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y, final = ssd_scan_ref(**inputs)
        return y, final.detach().requires_grad_()

    return {
        "the state of a chunk is not carried": state_not_carried,
        "group h % G": tiled,
        "no D": without("d"),
        "no bias": without("dt_bias"),
        "the gradient of final is dropped": final_detached,
    }


MUTANTS = draw((4, 8, 2, 6), (48,))
WRONG = {  # what a mutant must be refused for
    "the state of a chunk is not carried": ("y", "final", "dx", "ddt", "db", "dc", "da_log", "ddt_bias", "dinitial"),
    "group h % G": ("y", "final", "dx", "ddt", "db", "dc", "da_log", "ddt_bias", "dinitial"),
    "no D": ("y", "dx"),
    "no bias": ("y", "final", "dx", "ddt", "db", "dc", "da_log", "dinitial"),
    "the gradient of final is dropped": ("dx", "ddt", "db", "da_log", "ddt_bias", "dinitial"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_refused(name: str) -> None:
    ours = scan(MUTANTS)
    ref32, ref64 = run(ssd_scan_ref, MUTANTS), run(ssd_scan_ref, to(MUTANTS, torch.float64))
    wrong = run(mutants(MUTANTS)[name], to(MUTANTS, torch.float64))
    for k in WRONG[name]:
        assert accepts(ours[k], ref32[k], ref64[k]), k
        assert not accepts(wrong[k].float(), ref32[k], ref64[k]), k


def part_of(data: dict[str, Any], sequence: int) -> dict[str, Any]:
    first, last = data["offsets"][sequence : sequence + 2].tolist()
    cut = {k: data[k][first:last] for k in ("x", "dt", "b", "c")}
    return data | cut | {"initial": data["initial"][sequence, None], "offsets": torch.tensor([0, last - first])}


@pytest.mark.parametrize("chunk", [256, 7])
def test_packed_is_separate(device: str, chunk: int) -> None:
    data = draw((4, 24, 2, 16), (1, 255, 0, 256, 257, 3), 2)
    y, final = forward(data, device, chunk)
    gradients = gradient_of_y(data, device, chunk)
    for sequence in range(6):
        alone, (first, last) = part_of(data, sequence), data["offsets"][sequence : sequence + 2].tolist()
        y_alone, final_alone = forward(alone, device, chunk)
        assert torch.equal(y_alone, y[first:last])
        assert torch.equal(final_alone[0], final[sequence])
        weights = alone | {"weights": torch.arange(first * 96, last * 96).sin().view(-1, 96)}
        for k, value in gradient_of_y(weights, device, chunk).items():
            assert torch.equal(value, gradients[k][first:last]), k
    assert not y[-2:].any()
    assert not any(value[-2:].any() for value in gradients.values())


def forward(data: dict[str, Any], device: str = "cpu", chunk: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = to(data, device) | {"offsets": data["offsets"].to(device)}
    return ssd_scan(**inputs, chunk=chunk, return_final=True)


def gradient_of_y(data: dict[str, Any], device: str, chunk: int) -> dict[str, torch.Tensor]:
    """Gradients, in the inputs that have rows, of a sum with weights that follow from a token's place in the pack."""
    data = dict(data)
    weights = data.pop("weights", torch.arange(data["x"].numel()).sin().view(data["x"].shape)).to(device)
    inputs = to(data, device) | {"offsets": data["offsets"].to(device)}
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("x", "dt", "b", "c")}
    y = ssd_scan(**inputs | leaves, chunk=chunk)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weights), strict=True))


def test_chunk_does_not_change_the_forward() -> None:
    data = draw((3, 20, 3, 12), (300, 9))
    expected = forward(data)
    for chunk in (1, 2, 255, 256, 257, 10**12):
        leaves = {k: data[k].clone().requires_grad_() for k in INPUTS}
        y, final = ssd_scan(**data | leaves, chunk=chunk, return_final=True)  # with the states of chunks
        assert torch.equal(y, expected[0])
        assert torch.equal(final, expected[1])


@pytest.mark.parametrize("cut", [1, 17, 256, 299])
def test_split_is_whole(cut: int) -> None:
    data = draw((3, 20, 3, 12), (300,))
    whole, final = forward(data)
    rows = ("x", "dt", "b", "c")
    head = data | {k: data[k][:cut] for k in rows} | {"offsets": torch.tensor([0, cut])}
    first, carried = forward(head)
    tail = {k: data[k][cut:] for k in rows} | {"offsets": torch.tensor([0, 300 - cut]), "initial": carried}
    second, last = forward(data | tail)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(last, final)


def stepped(data: dict[str, Any], state: torch.Tensor, row: torch.Tensor, position: torch.Tensor, rows: slice):
    x, dt, b, c = (data[k][rows] for k in ("x", "dt", "b", "c"))
    return ssd_step(x, dt, b, c, state, row[rows], position[rows], data["a_log"], data["d"], data["dt_bias"])


@pytest.mark.parametrize("shape", [(2, 128, 1, 32), (3, 20, 3, 12), (2, 70, 2, 128)], ids=str)
def test_step_is_scan(shape: tuple[int, int, int, int]) -> None:
    """Prefill in one call, token by token, and in uneven pieces: the bits of the scan."""
    lengths = (40, 1, 23)
    data = draw(shape, lengths)
    data["initial"] = torch.zeros_like(data["initial"])
    y, final = forward(data)
    row = torch.tensor([2, 0, 3]).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
    order = torch.argsort(position, stable=True)  # all first tokens, all second ones, ...
    by_token = {k: data[k][order] for k in ("x", "dt", "b", "c")}
    waves = torch.bincount(position).tolist()
    dirty = torch.full((5, *final.shape[1:]), math.nan)  # position 0 does not read it
    for name, (inputs, rows, pieces) in {
        "prefill": (data, slice(None), [64]),
        "pieces": (data, slice(None), [3, 30, 2, 29]),
        "tokens": (data | by_token, order, waves),
    }.items():
        state, out, start = dirty.clone(), [], 0
        for count in pieces:
            piece = slice(start, start + count)
            out.append(stepped(inputs, state, row[rows], position[rows], piece))
            start += count
        assert torch.equal(torch.cat(out), y[rows]), name
        assert torch.equal(state[[2, 0, 3]], final), name
        assert state[[1, 4]].isnan().all(), name


def test_step_reference() -> None:
    data = draw((4, 8, 2, 16), (9,))
    row, position = torch.tensor([1, 1, 1, -1, 0, 3, 3, -1, 2]), torch.tensor([4, 5, 6, 0, 0, 1, 2, 9, 7])
    state = torch.randn(4, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    both = []
    for dtype in (torch.float32, torch.float64):
        inputs, states, out = to(data, dtype), state.to(dtype), torch.empty(9, 32, dtype=dtype)
        weights = (inputs["a_log"], inputs["d"], inputs["dt_bias"])
        tokens = [inputs[k] for k in ("x", "dt", "b", "c")]
        ssd_step_ref(*tokens, states, row, position, *weights, out=out)
        both.append((out, states))
    y = stepped(data, state, row, position, slice(None))
    for ours, ref32, ref64 in zip((y, state), *both, strict=True):
        assert_accurate(ours, ref32, ref64)


def test_padding_rows_touch_nothing(device: str) -> None:
    data = to(draw((2, 70, 1, 8), (6,)), device)
    for k in ("x", "dt", "b", "c"):
        data[k][2:4] = math.nan
    state = torch.ones(2, 2, 8, 70, device=device)
    row = torch.tensor([0, 0, -1, -1, 1, 1], device=device)
    y = stepped(data, state, row, torch.tensor([3, 4, 0, 7, 0, 1], device=device), slice(None))
    assert not y[2:4].any()
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()
    before = state.clone()
    assert not stepped(data, state, torch.full_like(row, -1), torch.zeros_like(row), slice(None)).any()
    assert torch.equal(state, before)


def test_a_row_is_alone(device: str) -> None:
    data = to(draw((2, 128, 2, 32), (5,)), device)
    start = torch.randn(6, 2, 32, 128, generator=torch.Generator().manual_seed(0)).to(device)
    row, position = torch.tensor([4, 0, 2, 5, 1], device=device), torch.tensor([1, 2, 3, 0, 5], device=device)
    together = start.clone()
    y = stepped(data, together, row, position, slice(None))
    for i in range(5):
        alone = start.clone()
        assert torch.equal(stepped(data, alone, row, position, slice(i, i + 1))[0], y[i])
        assert torch.equal(alone[row[i]], together[row[i]])


def test_slices_of_a_projection(device: str) -> None:
    """Rows apart, of odd alignment: the bits of dense inputs, and dense gradients."""
    data = draw((4, 9, 2, 6), (33, 2))
    joined = torch.cat([data[k] for k in ("dt", "x", "b", "c")], 1)
    dt, x, b, c = joined.split([data[k].shape[1] for k in ("dt", "x", "b", "c")], 1)
    sliced = scan(data | {"x": x, "dt": dt, "b": b, "c": c}, device)
    assert_same(sliced, scan(data, device))
    leaf = joined.to(device).requires_grad_()
    dt, x, b, c = leaf.split([4, 36, 12, 12], 1)
    inputs = to(data, device) | {"offsets": data["offsets"].to(device), "x": x, "dt": dt, "b": b, "c": c}
    (gradient,) = torch.autograd.grad(ssd_scan(**inputs), leaf, torch.ones(35, 36, device=device))
    dense = {k: v.detach().contiguous().requires_grad_() for k, v in (("dt", dt), ("x", x), ("b", b), ("c", c))}
    expected = torch.autograd.grad(ssd_scan(**inputs | dense), list(dense.values()), torch.ones(35, 36, device=device))
    assert torch.equal(gradient, torch.cat(expected, 1))
    state = torch.zeros(1, 4, 6, 9, device=device)
    row, at = torch.zeros(33, dtype=torch.int64, device=device), torch.arange(33, device=device)
    weights = [inputs[k] for k in ("a_log", "d", "dt_bias")]
    sliced_step = ssd_step(*(t.detach()[:33] for t in (x, dt, b, c)), state, row, at, *weights)
    dense_step = ssd_step(*(dense[k].detach()[:33] for k in ("x", "dt", "b", "c")), state, row, at, *weights)
    assert torch.equal(sliced_step, dense_step)


def test_gradients_of_some(device: str) -> None:
    """Only y or only final, without initial states, and in one input alone."""
    data = draw((2, 8, 1, 4), (40,))
    data["initial"] = None
    offsets = data["offsets"].to(device)
    inputs = {k: v.to(device) if k in INPUTS and v is not None else v for k, v in data.items()} | {"offsets": offsets}
    x = inputs["x"].clone().requires_grad_()
    y, final = ssd_scan(**inputs | {"x": x}, return_final=True)
    both = torch.autograd.grad(y.sum() + final.sum(), x, retain_graph=True)[0]
    parts = [torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (y, final)]
    torch.testing.assert_close(both, parts[0] + parts[1])
    assert parts[1].any()


def test_threads_do_not_matter(threads: Callable[[int], None]) -> None:
    data = draw((6, 40, 2, 24), (300, 3, 70))
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(scan(data))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_extreme_decays(device: str) -> None:
    """a = 0, a = 1 and delta = 0: nothing overflows, and no 0 times inf."""
    data = draw((4, 4, 1, 3), (100,))
    data["a_log"] = torch.tensor([-80.0, 5.0, 20.0, 80.0])
    data["dt"][:50] = -200.0
    data["dt"][50:, 1] = 50.0
    out = scan(data, device)
    assert all(torch.isfinite(v).all() for v in out.values())
    expected = run(ssd_scan_ref, to(data, torch.float64))
    for k in ("y", "final", "dx", "ddt", "db", "dc", "dinitial"):
        torch.testing.assert_close(out[k].cpu().double(), expected[k], rtol=1e-4, atol=1e-4, msg=k)


def test_nothing_at_all() -> None:
    data = draw((2, 3, 1, 4), ())
    assert forward(data)[0].shape == (0, 6)
    assert forward(data)[1].shape == (0, 2, 4, 3)
    assert all(not v.any() for v in scan(draw((2, 3, 1, 4), (), 5)).values())
    assert_same({"final": forward(draw((2, 3, 1, 4), (0,)))[1]}, {"final": draw((2, 3, 1, 4), (0,))["initial"]})


def test_step_into_a_buffer_and_recorded(device: str) -> None:
    data = to(draw((2, 64, 1, 8), (3,)), device)
    row, position = torch.tensor([1, 0, -1], device=device), torch.tensor([0, 3, 0], device=device)
    state, weights = torch.ones(2, 2, 8, 64, device=device), [data[k] for k in ("a_log", "d", "dt_bias")]
    tokens = [data[k] for k in ("x", "dt", "b", "c")]
    out, expected = torch.full((3, 128), math.nan, device=device), state.clone()
    assert ssd_step(*tokens, state, row, position, *weights, out=out) is out
    assert torch.equal(out, ssd_step(*tokens, expected, row, position, *weights))
    if device == "cpu":
        program = _C.Program()
        program.begin()
        ssd_step(*tokens, state, row, position, *weights, out=out)
        program.end()
        row.copy_(torch.tensor([0, -1, 1]))
        data["x"].neg_()
        program.run()
        assert torch.equal(out, ssd_step(*tokens, expected, row, position, *weights))
        assert torch.equal(state, expected)


@pytest.mark.gpu
def test_bfloat16(device: str) -> None:
    if device == "cpu":
        pytest.skip("on a CPU the op is fp32")
    data = draw((4, 24, 2, 32), (70, 131))
    rounded = data | {k: data[k].bfloat16() for k in ("x", "dt", "b", "c")}
    ours = run(ssd_scan, to(rounded, device) | {"offsets": data["offsets"].to(device)}, return_final=True)
    ref64 = run(ssd_scan_ref, to(rounded, torch.float64))
    for k in ours:
        assert_accurate(ours[k].float(), ref64[k].to(ours[k].dtype).float(), ref64[k], k)


def test_arguments_are_checked() -> None:
    data = draw((4, 6, 2, 5), (7,))
    bad = {
        "x": (torch.zeros(7, 23), r"x must have shape \[T,H\*P\].*got \[7, 23\], \[7, 10\] and \[4\]"),
        "dt": (torch.zeros(7, 3), r"dt must have shape \[7, 4\], got \[7, 3\]"),
        "c": (torch.zeros(7, 5), r"c must have shape \[7, 10\], got \[7, 5\]"),
        "b": (torch.zeros(10, 7).T, "the rows of b must be contiguous"),
        "d": (torch.zeros(3), r"d must have shape \[4\], got \[3\]"),
        "dt_bias": (torch.zeros(4).double(), "dt_bias must be float32, got float64"),
        "initial": (torch.zeros(1, 4, 6, 5), r"initial must have shape \[1, 4, 5, 6\], got \[1, 4, 6, 5\]"),
        "offsets": (torch.tensor([0, 8]), r"offsets must start at 0 and rise to at most 7"),
        "groups": (3, "groups must divide the 4 heads of a_log and the 10 columns of b, got 3"),
        "chunk": (0, "chunk must be at least 1, got 0"),
    }
    for name, (value, message) in bad.items():
        with pytest.raises(ValueError, match="ssd_scan: .*" + message):
            ssd_scan(**data | {name: value})
    with pytest.raises(ValueError, match="x must be float32 on a CPU, got float64"):
        ssd_scan(**to(data, torch.float64))
    with pytest.raises(ValueError, match="b must have at most 256 states in a group, got 257"):
        ssd_scan(**draw((1, 1, 1, 257), (2,)))
    tokens, weights = [data[k] for k in ("x", "dt", "b", "c")], [data[k] for k in ("a_log", "d", "dt_bias")]
    row, state = torch.zeros(7, dtype=torch.int64), torch.zeros(2, 4, 5, 6)
    with pytest.raises(ValueError, match=r"ssd_step: row must be in \[-1, 2\), got 2 at 3; correct row"):
        ssd_step(*tokens, state, torch.tensor([0, 0, 1, 2, 0, 0, 0]), row, *weights)
    with pytest.raises(ValueError, match=r"state must have shape \[S,H,N,P\], got \[2, 4, 30\]"):
        ssd_step(*tokens, state.flatten(2), row, row, *weights)
    with pytest.raises(ValueError, match=r"b must have shape \[R,G\*3\] with G a divisor of the 4 heads"):
        ssd_step(*tokens, torch.zeros(2, 4, 3, 6), row, row, *weights)
    with pytest.raises(ValueError, match=r"x must have shape \[7, 28\], got \[7, 24\]"):
        ssd_step(*tokens, torch.zeros(2, 4, 5, 7), row, row, *weights)
