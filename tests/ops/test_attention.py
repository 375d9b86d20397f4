"""attention and decode_attention against float64, their gradients, their common order, and results to be refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pymathrl.ops.attention import attention, attention_ref, decode_attention, decode_attention_ref, rotate_ref
from tests.oracle import accepts, assert_accurate

# rows, columns, query heads, key/value heads, head size
SHAPES = [
    (2, 1, 1, 1, 8),
    (3, 37, 4, 2, 16),
    (2, 50, 6, 1, 24),
    (2, 33, 3, 3, 40),
    (1, 130, 8, 2, 64),
    (1, 20, 2, 1, 256),
]


def angles(positions: int, head_dim: int) -> torch.Tensor:
    phase = torch.outer(torch.arange(positions).double(), 100.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim))
    return torch.polar(torch.ones_like(phase), phase)


def inputs(rows: int, columns: int, heads: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns + head_dim)
    qkv = torch.randn(rows, columns, (heads + 2 * kv_heads) * head_dim, generator=generator)
    qkv[..., : heads * head_dim] *= 2  # scores spread over +-6: some weights near 1, most near 0
    return qkv, torch.randn(rows, columns, heads * head_dim, generator=generator)


def value_and_gradient(op, qkv: torch.Tensor, dout: torch.Tensor, *args) -> tuple[torch.Tensor, torch.Tensor]:
    x = qkv.clone().requires_grad_()
    out = op(x, *args).out
    return out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device: str, shape: tuple[int, ...], padded: bool) -> None:
    rows, columns, heads, kv_heads, head_dim = shape
    qkv, dout = inputs(*shape)
    pad = (torch.arange(1, rows + 1) * 7) % columns if padded else None
    turn, scale = angles(columns, head_dim), head_dim**-0.5
    turn32 = turn.to(torch.complex64)
    rest = (heads, kv_heads, scale)
    pad_device = None if pad is None else pad.to(device)
    ours = value_and_gradient(attention, qkv.to(device), dout.to(device), turn32.to(device), *rest, pad_device)
    ref32 = value_and_gradient(attention_ref, qkv, dout, turn32, *rest, pad)
    ref64 = value_and_gradient(attention_ref, qkv.double(), dout, turn32.to(torch.complex128), *rest, pad)
    for name, a, b, c in zip(("out", "dqkv"), ours, ref32, ref64, strict=True):
        assert_accurate(a, b, c, name)
    keys = attention(qkv.to(device), turn32.to(device), *rest, pad_device).keys
    expected = attention_ref(qkv.double(), turn32.to(torch.complex128), *rest, pad).keys
    torch.testing.assert_close(keys.cpu().double(), expected, atol=2e-6, rtol=1e-6)


def test_hand_sized(device: str) -> None:
    """Two positions, one pair of the head in use, no rotation. Scores of the second query: 0 and ln 3."""
    qkv = torch.zeros(1, 2, 24)
    qkv[0, 1, 0], qkv[0, 1, 8] = 1.0, math.log(3)  # q_1 . k_1 = ln 3
    qkv[0, 0, 16], qkv[0, 1, 16] = 4.0, 8.0  # v
    turn = torch.ones(2, 4, dtype=torch.complex64)
    out, dqkv = value_and_gradient(
        attention, qkv.to(device), torch.ones(1, 2, 8, device=device), turn.to(device), 1, 1, 1.0
    )
    torch.testing.assert_close(out[0, :, 0].cpu(), torch.tensor([4.0, 7.0]))  # 1/4 * 4 + 3/4 * 8
    # ds = p (dout.v - dout.out) = (1/4 (4 - 7), 3/4 (8 - 7)); dk = ds q, dq = ds_1 k_1, dv = p summed over queries
    torch.testing.assert_close(dqkv[0, :, 8].cpu(), torch.tensor([-0.75, 0.75]))
    torch.testing.assert_close(dqkv[0, 1, 0].cpu(), torch.tensor(0.75 * math.log(3)))
    torch.testing.assert_close(dqkv[0, :, 16].cpu(), torch.tensor([1.25, 0.75]))


def test_padding_on_the_right_changes_nothing(device: str) -> None:
    qkv, _ = inputs(2, 40, 4, 2, 16)
    turn = angles(40, 16).to(torch.complex64).to(device)
    qkv = qkv.to(device)
    whole = attention(qkv, turn, 4, 2, 0.25).out
    short = attention(qkv[:, :23].contiguous(), turn[:23], 4, 2, 0.25).out
    assert torch.equal(whole[:, :23], short)


def test_left_padding_only_moves_a_row(device: str) -> None:
    qkv, _ = inputs(1, 30, 4, 2, 16)
    turn = angles(40, 16).to(torch.complex64).to(device)
    moved = torch.full((1, 40, qkv.shape[2]), 1e4)  # the padding holds numbers that would show
    moved[:, 10:] = qkv
    expected = attention(qkv.to(device), turn[:30], 4, 2, 0.25).out
    out, keys = attention(moved.to(device), turn, 4, 2, 0.25, torch.tensor([10], device=device))
    assert torch.equal(out[:, 10:], expected)
    assert (out[:, :10] == 0).all()
    assert (keys[:, :, :10] == 0).all()


def test_wrong_results_are_refused() -> None:
    shape = _, columns, heads, kv_heads, head_dim = 3, 37, 4, 2, 16
    qkv, dout = inputs(*shape)
    turn, scale = angles(columns, head_dim).to(torch.complex64), head_dim**-0.5
    wide = turn.to(torch.complex128)
    ref32 = value_and_gradient(attention_ref, qkv, dout, turn, heads, kv_heads, scale)
    ref64 = value_and_gradient(attention_ref, qkv.double(), dout, wide, heads, kv_heads, scale)
    wrong_heads = qkv.clone()
    k, v = heads * head_dim, (heads + kv_heads) * head_dim
    wrong_heads[..., k:v] = qkv[..., k:v].unflatten(-1, (kv_heads, head_dim)).flip(-2).flatten(-2)
    q, keys, values = qkv.double().unflatten(-1, (-1, head_dim)).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    full = torch.nn.functional.scaled_dot_product_attention(
        rotate_ref(q, wide), rotate_ref(keys, wide), values, scale=scale, enable_gqa=True
    )
    mutants = {
        "no scale": attention_ref(qkv.double(), wide, heads, kv_heads, 1.0).out,
        "no mask": full.transpose(1, 2).flatten(-2),
        "no rotation": attention_ref(qkv.double(), torch.ones_like(wide), heads, kv_heads, scale).out,
        "rotated back": attention_ref(qkv.double(), wide.conj().roll(1, 0), heads, kv_heads, scale).out,
        "key heads swapped": attention_ref(wrong_heads.double(), wide, heads, kv_heads, scale).out,
        "position off by one": attention_ref(qkv.double(), wide, heads, kv_heads, scale).out.roll(1, 1),
    }
    for name, out in mutants.items():
        assert not accepts(out.float(), ref32[0], ref64[0]), name
    gradient = ref64[1]
    dq, dk, dv = gradient.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    dk_unturned = rotate_ref(dk.unflatten(-1, (kv_heads, head_dim)), wide[:, None]).flatten(-2)
    wrong = {
        "dk and dv swapped": torch.cat([dq, dv, dk], -1),
        "dq without scale": torch.cat([dq / scale, dk, dv], -1),
        "dk without scale": torch.cat([dq, dk / scale, dv], -1),
        "dk left rotated": torch.cat([dq, dk_unturned, dv], -1),
        "one query head's dk": torch.cat([dq, dk / 2, dv], -1),
        "dv dropped": torch.cat([dq, dk, torch.zeros_like(dv)], -1),
    }
    for name, mutant in wrong.items():
        assert not accepts(mutant.float(), ref32[1], gradient), name
    assert accepts(ref64[0].float(), ref32[0], ref64[0]) and accepts(gradient.float(), ref32[1], gradient)


@pytest.mark.parametrize("shape", [(5, 37, 4, 2, 16), (5, 70, 3, 3, 32)], ids=str)
def test_threads_do_not_matter(shape: tuple[int, ...], threads: Callable[[int], None]) -> None:
    qkv, dout = inputs(*shape)
    turn = angles(shape[1], shape[4]).to(torch.complex64)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(value_and_gradient(attention, qkv, dout, turn, shape[2], shape[3], 0.2))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(3, 37, 4, 2, 16), (2, 40, 3, 3, 32), (2, 20, 6, 1, 24), (2, 35, 8, 1, 8)], ids=str)
def test_decode_repeats_the_row(device: str, shape: tuple[int, ...]) -> None:
    """Column by column through the cache gives what the whole row gives; on a CPU, the same bits."""
    rows, columns, heads, kv_heads, head_dim = shape
    qkv, _ = inputs(*shape)
    qkv = qkv.to(device)
    pad = (torch.arange(rows) * 5).to(device)
    turn, scale = angles(columns, head_dim).to(torch.complex64).to(device), head_dim**-0.5
    whole, keys = attention(qkv, turn, heads, kv_heads, scale, pad)
    first = int(pad.max())
    cache = torch.full((2, rows, kv_heads, columns + 3, head_dim), math.nan, device=device)
    cache[0, :, :, :first] = keys[:, :, :first]
    values = qkv[..., (heads + kv_heads) * head_dim :].unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)
    cache[1, :, :, :first] = values[:, :, :first]
    twin = cache.double()
    for column in range(first, columns):
        step = qkv[:, column].contiguous()
        out = decode_attention(step, turn, cache, pad, column, heads, kv_heads, scale)
        assert torch.equal(cache[1, :, :, column], values[:, :, column])
        if device == "cpu":
            assert torch.equal(out, whole[:, column]), column
        wide = turn.to(torch.complex128)
        expected = decode_attention_ref(step.double(), wide, twin, pad, column, heads, kv_heads, scale)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache[0, :, :, :columns].double(), twin[0, :, :, :columns], atol=1e-5, rtol=1e-5)
    assert torch.isnan(cache[:, :, :, columns:]).all()


def test_arguments_are_checked() -> None:
    qkv, turn = torch.zeros(2, 5, 4 * 16), angles(5, 16).to(torch.complex64)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        attention(qkv, turn, 3, 2, 1.0)
    with pytest.raises(ValueError, match="qkv must have 3 dimensions"):
        attention(qkv[0], turn, 2, 1, 1.0)
    with pytest.raises(ValueError, match="head size must be a multiple of 8"):
        attention(torch.zeros(2, 5, 4 * 12), angles(5, 12).to(torch.complex64), 2, 1, 1.0)
    with pytest.raises(ValueError, match="angle must have shape"):
        attention(qkv, turn[:3], 2, 1, 1.0)
    with pytest.raises(ValueError, match="must be float32"):
        attention(qkv.double(), turn, 2, 1, 1.0)
    with pytest.raises(ValueError, match=r"pad must be in \[0, 4\], got 5 in row 1"):
        attention(qkv, turn, 2, 1, 1.0, torch.tensor([0, 5]))
    cache = torch.zeros(2, 2, 1, 5, 16)
    with pytest.raises(ValueError, match=r"column must be in \[0, 5\)"):
        decode_attention(qkv[:, 0].contiguous(), turn, cache, torch.zeros(2, dtype=torch.int64), 5, 2, 1, 1.0)
