"""attention and paged_attention against float64, the gradient, their common order, the pages, and refused results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from pymathrl.ops.attention import PAGE, attention, attention_ref, paged_attention, paged_attention_ref
from pymathrl.ops.rotary import rotary
from tests.oracle import accepts, assert_accurate

# sequence lengths, tokens of padding behind them, query heads, key/value heads, head size
SHAPES = [
    ((1,), 0, 1, 1, 8),
    ((37, 1, 0, 15, 16, 17), 3, 4, 2, 16),
    ((0, 50, 33), 0, 6, 2, 24),
    ((33, 20, 0), 1, 3, 3, 40),
    ((130,), 0, 8, 2, 64),
    ((20,), 5, 2, 1, 256),
]


def offsets_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def inputs(lengths: tuple[int, ...], extra: int, heads: int, kv_heads: int, head_dim: int):
    tokens = sum(lengths) + extra
    generator = torch.Generator().manual_seed(tokens + head_dim)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator)
    qkv[:, : heads * head_dim] *= 2 * head_dim**-0.5  # scores spread over +-6: some weights near 1, most near 0
    return qkv, torch.randn(tokens, heads * head_dim, generator=generator)


def value_and_gradient(op, qkv: torch.Tensor, dout: torch.Tensor, *args) -> tuple[torch.Tensor, torch.Tensor]:
    x = qkv.clone().requires_grad_()
    out = op(x, *args)
    return out.detach(), torch.autograd.grad(out, x, dout.to(out.dtype))[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device: str, shape) -> None:
    lengths, extra, heads, kv_heads, _ = shape
    qkv, dout = inputs(*shape)
    offsets = offsets_of(lengths)
    if extra:
        qkv[-extra:] = math.nan  # must not be read
    ours = value_and_gradient(attention, qkv.to(device), dout.to(device), offsets.to(device), heads, kv_heads)
    ref32 = value_and_gradient(attention_ref, qkv, dout, offsets, heads, kv_heads)
    ref64 = value_and_gradient(attention_ref, qkv.double(), dout, offsets, heads, kv_heads)
    for name, a, b, c in zip(("out", "dqkv"), ours, ref32, ref64, strict=True):
        assert_accurate(a, b, c, name)
        assert (a[len(a) - extra :] == 0).all()


def test_hand_sized(device: str) -> None:
    """Two positions, one element of the head in use. Scores of the second query: 0 and ln 3."""
    qkv = torch.zeros(2, 24)
    qkv[1, 0], qkv[1, 8] = 1.0, math.log(3)  # q_1 . k_1 = ln 3
    qkv[0, 16], qkv[1, 16] = 4.0, 8.0  # v
    offsets = torch.tensor([0, 2], device=device)
    out, dqkv = value_and_gradient(attention, qkv.to(device), torch.ones(2, 8, device=device), offsets, 1, 1)
    torch.testing.assert_close(out[:, 0].cpu(), torch.tensor([4.0, 7.0]))  # 1/4 * 4 + 3/4 * 8
    # ds = p (dout.v - dout.out) = (1/4 (4 - 7), 3/4 (8 - 7)); dk = ds q, dq = ds_1 k_1, dv = p summed over queries
    torch.testing.assert_close(dqkv[:, 8].cpu(), torch.tensor([-0.75, 0.75]))
    torch.testing.assert_close(dqkv[1, 0].cpu(), torch.tensor(0.75 * math.log(3)))
    torch.testing.assert_close(dqkv[:, 16].cpu(), torch.tensor([1.25, 0.75]))


def test_neighbours_change_nothing(device: str) -> None:
    """A sequence gives the same bits alone and packed between others, whatever stands in those."""
    qkv, dout = inputs((30, 70, 9), 0, 4, 2, 16)
    offsets = torch.tensor([0, 30, 100, 109], device=device)
    whole = value_and_gradient(attention, qkv.to(device), dout.to(device), offsets, 4, 2)
    mine = slice(30, 100)
    alone = value_and_gradient(
        attention, qkv[mine].to(device), dout[mine].to(device), torch.tensor([0, 70], device=device), 4, 2
    )
    assert all(torch.equal(a[mine], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("shape", [((37,) * 5, 2, 4, 2, 16), ((300, 70), 0, 3, 3, 32)], ids=str)
def test_threads_do_not_matter(shape, threads: Callable[[int], None]) -> None:
    qkv, dout = inputs(*shape)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(value_and_gradient(attention, qkv, dout, offsets_of(shape[0]), shape[2], shape[3]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@dataclass
class Cache:
    """Sequences of raw projections, their pages (numbers drawn, some positions shared), and the arguments to go on."""

    qkv: list[torch.Tensor]  # per sequence [n,(H+2K)E]
    table: torch.Tensor
    rope: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    options: dict

    def to(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Cache:
        """A copy."""
        norms = {k: v.to(device, dtype) if torch.is_tensor(v) else v for k, v in self.options.items()}
        rest = (x.to(device, dtype, copy=True) for x in (self.rope, self.keys, self.values))
        return Cache([x.to(device, dtype) for x in self.qkv], self.table.to(device, copy=True), *rest, norms)

    def step(self, rows: list[tuple[int, int]], op=paged_attention) -> torch.Tensor:
        """One call over rows of (slot, position); slot -1 is padding."""
        device = self.rope.device
        slot, position = torch.tensor(rows, device=device).T.contiguous()
        qkv = torch.stack([self.qkv[s][i] if s >= 0 else torch.full_like(self.qkv[0][0], math.nan) for s, i in rows])
        out = qkv.new_full((len(rows), qkv.shape[1] * self.options["heads"] // self.width), math.nan)
        op(qkv, position, slot, self.table, self.rope, self.keys, self.values, out, **self.options)
        return out

    @property
    def width(self) -> int:
        return self.options["heads"] + 2 * self.options["kv_heads"]


def cache_of(lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, norm: bool = True) -> Cache:
    generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
    columns = -(-max(lengths) // PAGE) + 1
    pages = len(lengths) * columns + 3
    table = torch.randperm(pages, generator=generator)[: len(lengths) * columns].view(len(lengths), columns)
    phase = torch.outer(torch.arange(columns * PAGE), 100.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    options = {"heads": heads, "kv_heads": kv_heads, "scale": 2.0 ** round(math.log2(2 * head_dim**-0.5))}
    if norm:
        options |= {n: 1 + 0.3 * torch.randn(head_dim, generator=generator) for n in ("q_norm", "k_norm")}
    return Cache(
        [torch.randn(n, (heads + 2 * kv_heads) * head_dim, generator=generator) for n in lengths],
        table.int(),
        torch.cat([phase.cos(), phase.sin()], 1),
        torch.full((pages, kv_heads, head_dim, PAGE), math.nan),
        torch.full((pages, kv_heads, PAGE, head_dim), math.nan),
        options,
    )  # fmt: skip


PAGED = [  # lengths, query heads, key/value heads, head size
    ((1, 15, 16, 17, 40), 4, 2, 16),
    ((37, 5), 3, 1, 24),
    ((33, 20), 3, 3, 40),
    ((150,), 8, 2, 64),
    ((20,), 5, 1, 8),
    ((18,), 2, 1, 256),
]


def rows_of(cache: Cache) -> list[tuple[int, int]]:
    return [(s, i) for s, qkv in enumerate(cache.qkv) for i in range(len(qkv))]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_paged_accuracy(device: str, case, norm: bool) -> None:
    cache = cache_of(*case, norm)
    rows = [(-1, 0), *rows_of(cache), (-1, 7), (-1, 8)]
    ours, ref32, ref64 = cache.to(device), cache.to(), cache.to(dtype=torch.float64)
    out = ours.step(rows)
    outs = out, ref32.step(rows, paged_attention_ref), ref64.step(rows, paged_attention_ref)
    assert_accurate(*outs, "out")
    assert (out[0] == 0).all() and (out[-2:] == 0).all()
    for name in ("keys", "values"):  # nan marks what must stay unwritten
        assert_accurate(*(getattr(c, name) for c in (ours, ref32, ref64)), name)


def chunks(rows: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Calls in which each sequence goes on by at most `size` tokens."""
    calls = []
    for first in range(0, max(i for _, i in rows) + 1, size):
        calls.append([(s, i) for s, i in rows if first <= i < first + size])
    return calls


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_any_chunking_and_training_agree(device: str, case) -> None:
    """One token at a time, a few, whole: the same bits, and on a CPU those of training."""
    cache = cache_of(*case)
    rows = rows_of(cache)
    whole = cache.to(device)
    expected = dict(zip(rows, whole.step(rows), strict=True))
    for size in (1, 2, 3, 7, 16, 29):
        again = cache.to(device)
        for call in chunks(rows, size):
            for row, out in zip(call, again.step([(-1, 0), *call])[1:], strict=True):
                assert torch.equal(out, expected[row]), (size, row)
        assert torch.equal(again.keys.nan_to_num(7.0), whole.keys.nan_to_num(7.0))
        assert torch.equal(again.values.nan_to_num(7.0), whole.values.nan_to_num(7.0))
    if device == "cpu":
        position = torch.tensor([i for _, i in rows])
        training = attention(
            rotary(torch.cat(cache.qkv), position, cache.rope, **cache.options), offsets_of(case[0]), *case[1:3]
        )
        assert torch.equal(training, torch.stack(list(expected.values())))


def test_shared_pages(device: str) -> None:
    """Two slots share a prompt's full pages; each goes on in its own. The same bits as without sharing."""
    cache = cache_of((50, 50), 4, 2, 16).to(device)
    cache.qkv[1][:32] = cache.qkv[0][:32]
    apart = cache.to(device)
    expected = apart.step(rows_of(apart))
    cache.table[1, :2] = cache.table[0, :2]
    first = cache.step([(0, i) for i in range(32)])
    rest = cache.step([(s, i) for s in (0, 1) for i in range(32, 50)])
    assert torch.equal(torch.cat([first, rest[:18], first, rest[18:]]), expected)
    unused = set(range(len(cache.keys))) - set(cache.table[0, :4].tolist()) - set(cache.table[1, 2:4].tolist())
    for page in unused:
        assert cache.keys[page].isnan().all() and cache.values[page].isnan().all()


def test_paged_threads_do_not_matter(threads: Callable[[int], None]) -> None:
    cache = cache_of((300, 3, 70, 16), 6, 3, 32)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(cache.to().step(rows_of(cache)))
    assert torch.equal(*results)


def test_paged_by_hand(device: str) -> None:
    """Position 1 turns the pair (0, 4) by a right angle: q = (1,0) becomes (0,1); k_0 = (0, ln 3), v = 8 and 4."""
    rope = torch.zeros(2, 8)
    rope[:, :4] = 1.0
    rope[1, 0], rope[1, 4] = 0.0, 1.0
    keys, values = torch.zeros(1, 1, 8, PAGE), torch.zeros(1, 1, PAGE, 8)
    qkv = torch.zeros(2, 24)
    qkv[0, 8 + 4], qkv[0, 16], qkv[1, 16], qkv[1, 0] = math.log(3), 8.0, 4.0, 0.5
    out = torch.empty(2, 8, device=device)
    order = torch.arange(2, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    pages = keys.to(device), values.to(device)
    paged_attention(
        qkv.to(device), order, order * 0, table, rope.to(device), *pages, out, heads=1, kv_heads=1, scale=2.0
    )
    torch.testing.assert_close(out[:, 0].cpu(), torch.tensor([8.0, 7.0]))  # 3/4 * 8 + 1/4 * 4


def test_wrong_results_are_refused() -> None:
    shape = lengths, _, heads, kv_heads, head_dim = (37, 20), 0, 4, 2, 16
    qkv, dout = inputs(*shape)
    offsets = offsets_of(lengths)
    ref32 = value_and_gradient(attention_ref, qkv, dout, offsets, heads, kv_heads)
    ref64 = value_and_gradient(attention_ref, qkv.double(), dout, offsets, heads, kv_heads)
    k, v = heads * head_dim, (heads + kv_heads) * head_dim
    swapped = qkv.double()
    swapped[:, k:v] = qkv[:, k:v].double().unflatten(-1, (kv_heads, head_dim)).flip(-2).flatten(-2)
    future = qkv.double().roll(-1, 0)
    future[:, :k] = qkv[:, :k].double()
    interleaved = qkv.double()
    interleaved[:, :k] = qkv[:, :k].double().unflatten(-1, (heads, head_dim))[:, [0, 2, 1, 3]].flatten(-2)
    wrong_map = attention_ref(interleaved, offsets, heads, kv_heads).unflatten(-1, (heads, head_dim))[:, [0, 2, 1, 3]]
    mutants = {
        "one sequence instead of two": attention_ref(qkv.double(), offsets[[0, 2]], heads, kv_heads),
        "next key and value seen": attention_ref(future, offsets, heads, kv_heads),
        "key heads swapped": attention_ref(swapped, offsets, heads, kv_heads),
        "query heads read key/value head h % K": wrong_map.flatten(-2),
        "position off by one": ref64[0].roll(1, 0),
        "last key dropped": attention_ref(qkv.double(), offsets - torch.tensor([0, 1, 1]), heads, kv_heads),
    }
    for name, out in mutants.items():
        assert not accepts(out.float(), ref32[0], ref64[0]), name
    gradient = ref64[1]
    dq, dk, dv = gradient.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    wrong = {
        "dk and dv swapped": torch.cat([dq, dv, dk], -1),
        "one query head's dk": torch.cat([dq, dk / 2, dv], -1),
        "dv dropped": torch.cat([dq, dk, torch.zeros_like(dv)], -1),
        "last token's gradient dropped": torch.cat([gradient[:-1], torch.zeros_like(gradient[-1:])]),
    }
    for name, mutant in wrong.items():
        assert not accepts(mutant.float(), ref32[1], gradient), name
    assert accepts(ref64[0].float(), ref32[0], ref64[0]) and accepts(gradient.float(), ref32[1], gradient)


def test_wrong_paged_results_are_refused() -> None:
    lengths, heads, kv_heads, head_dim = (70, 40), 4, 2, 16
    cache = cache_of(lengths, heads, kv_heads, head_dim)
    rows, late = rows_of(cache), [(0, 69), (1, 39)]
    ref32, ref64 = (cache.to(dtype=dtype) for dtype in (torch.float32, torch.float64))
    outs = [c.step(rows, paged_attention_ref) for c in (ref32, ref64)]
    last = [rows.index(row) for row in late]

    def mutant(change: Callable[[Cache], None]) -> torch.Tensor:
        """What the reference gives for the last tokens when it goes on from a changed state."""
        state = ref64.to(dtype=torch.float64)
        change(state)
        return state.step(late, paged_attention_ref)

    def option(**changes) -> Callable[[Cache], None]:
        return lambda c: c.options.update(changes)

    half = head_dim // 2
    mutants: dict[str, Callable[[Cache], None]] = {
        "rotation of the other sign": lambda c: c.rope[:, half:].neg_(),
        "position off by one": lambda c: c.rope.copy_(c.rope.roll(1, 0)),
        "pairs (2j, 2j+1)": lambda c: c.rope.copy_(c.rope.unflatten(1, (2, half)).transpose(1, 2).flatten(1)),
        "no scale": option(scale=1.0),
        "q_norm left out": option(q_norm=None),
        "k_norm left out": option(k_norm=None),
        "eps of another model": option(eps=1e-2),
        "keys of another page": lambda c: c.keys.index_copy_(0, c.table[:, 0].long(), c.keys[c.table[:, 1].long()]),
        "keys of another order in a page": lambda c: c.keys.copy_(c.keys.flip(-1)),
        "a page of the other sequence": lambda c: c.table[0, 1].copy_(c.table[1, 1]),
        "a stale page": lambda c: c.keys[c.table[0, 2].item()].mul_(0.9),
        "key/value heads swapped": lambda c: (c.keys.copy_(c.keys.flip(1)), c.values.copy_(c.values.flip(1))),
    }
    for name, change in mutants.items():
        assert not accepts(mutant(change).float(), outs[0][last], outs[1][last]), name
    assert accepts(mutant(lambda c: None).float(), outs[0][last], outs[1][last])


def test_arguments_are_checked() -> None:
    qkv, offsets = torch.zeros(5, 4 * 16), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        attention(qkv, offsets, 3, 2)
    with pytest.raises(ValueError, match="qkv must have 2 dimensions"):
        attention(qkv[None], offsets, 2, 1)
    with pytest.raises(ValueError, match="head size must be a multiple of 8"):
        attention(torch.zeros(5, 4 * 12), offsets, 2, 1)
    with pytest.raises(ValueError, match="qkv must be float32 on a CPU, got bfloat16"):
        attention(qkv.bfloat16(), offsets, 2, 1)
    for wrong in ([1, 5], [0, 6], [0, 3, 2]):
        with pytest.raises(ValueError, match="offsets must start at 0 and rise to at most 5"):
            attention(qkv, torch.tensor(wrong), 2, 1)
    with pytest.raises(ValueError, match="offsets must be int64"):
        attention(qkv, offsets.int(), 2, 1)
    cache = cache_of((20,), 2, 1, 16)
    with pytest.raises(ValueError, match=r"slots must be in \[-1, 1\), positions in \[0, 48\)"):
        cache.qkv.append(cache.qkv[0])
        cache.step([(1, 0)])
    cache.table[0, 1] = 99
    with pytest.raises(ValueError, match=r"page 99 of position 16 is not in \[0, 6\)"):
        cache.step([(0, 16)])
    with pytest.raises(ValueError, match="keys must have shape"):
        cache.keys = cache.keys[:, :, :8]
        cache.step([(0, 0)])
