"""The paged pass: the update's hidden states however the tokens come in, its cache and its buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pymathrl.models import Decoder, ModelConfig, paged
from pymathrl.models.paged import Buffers, PagedCache, Pass, Sampling
from pymathrl.ops.attention import PAGE
from pymathrl.ops.sample_token import sample_token
from tests.models.test_decoder import HYBRID, QWEN2, QWEN3, TINY, make_model
from tests.rollout.cases import assert_same

IDS = [7 + i * i % 31 for i in range(37)]


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


def feed(model: Decoder, buffers: Buffers, rows: list[tuple[int, int, int]], padding: int = 0) -> None:
    """(token, slot, position) of the first rows; then rows without a sequence."""
    ids, slot, position = torch.tensor(rows).T
    count = len(rows)
    buffers.ids[:count], buffers.slot[:count], buffers.position[:count] = ids, slot, position
    buffers.state[:count] = slot  # of the pool's two, in a hybrid
    buffers.clear_from(count, count + padding)
    buffers.embed(model, count + padding)


def make(config: ModelConfig, rows: int = 48) -> tuple[Decoder, PagedCache, Buffers]:
    """Two slots over pages in no order."""
    model = make_model(config)
    cache = PagedCache(model)
    cache.grow(7, 2, 3, 2)
    cache.keys.fill_(torch.nan)  # what was never written must never be read
    cache.values.fill_(torch.nan)
    cache.conv.fill_(torch.nan)
    cache.ssm.fill_(torch.nan)
    cache.table.copy_(torch.tensor([[4, 1, 6], [0, 5, 2]]))
    return model, cache, Buffers(model, rows)


@torch.no_grad()
def update_hidden(model: Decoder, ids: list[int]) -> Tensor:
    return model.hidden(torch.tensor(ids), torch.tensor([0, len(ids)]))


@pytest.mark.parametrize("config", [TINY, QWEN2, QWEN3, HYBRID, replace(TINY, num_kv_heads=4, num_layers=1)], ids=str)
def test_any_cut_of_the_tokens_gives_the_updates_hidden_states(config: ModelConfig) -> None:
    """One at a time, some at a time, all at once; beside another sequence and rows of none."""
    want = update_hidden(make_model(config), IDS)
    for pieces in ([1] * 37, [5, 16, 1, 15], [37], [20, 17]):
        model, cache, buffers = make(config)
        got, at = [], 0
        for count in pieces:
            other = [(9, 1, at)] if at < 48 else []
            rows = [(IDS[at + i], 0, at + i) for i in range(count)] + other
            feed(model, buffers, rows, padding=3)
            Pass(model, cache, buffers, len(rows) + 3, "hidden", replay=False).run()
            got.append(buffers.hidden[:count].clone())
            at += count
        assert_same(torch.cat(got), want)


def test_a_prefill_writes_what_a_whole_pass_writes_and_nothing_else() -> None:
    caches = []
    for until in ("cache", "hidden"):
        model, cache, buffers = make(QWEN3)
        feed(model, buffers, [(token, 0, i) for i, token in enumerate(IDS)], padding=4)
        Pass(model, cache, buffers, 41, until, replay=False).run()  # type: ignore[arg-type]
        caches.append(cache)
    for name in ("keys", "values"):
        one, two = (getattr(cache, name) for cache in caches)
        assert torch.equal(one.isnan(), two.isnan())
        assert_same(one.nan_to_num(), two.nan_to_num())
    keys = caches[0].keys[:, [4, 1, 6]]  # [L, 3, K, E, PAGE]
    assert not bool(keys[:, :2].isnan().any()) and not bool(keys[:, 2, ..., : 37 - 32].isnan().any())
    assert bool(keys[:, 2, ..., 5:].isnan().all()) and bool(caches[0].keys[:, [0, 2, 3, 5]].isnan().all())


def test_a_recorded_pass_draws_on_and_sees_new_weights() -> None:
    """Each run feeds what the one before drew, at the next position and the next random number."""
    model, cache, buffers = make(TINY)
    step = Pass(model, cache, buffers, 2, "token", Sampling(0.9), seed=5)
    for scale in (1.0, 1.25):
        with torch.no_grad():
            model.layers[1].down.mul_(scale)
        sequences = [[3], [8]]
        buffers.inputs[:, :2] = torch.tensor([[3, 8], [0, 1], [0, 1], [70, 80], [0, 0], [0, 0]])
        buffers.embed(model, 2)
        for draw in range(20):
            step.run()
            for row, (uid, ids) in enumerate(zip((70, 80), sequences, strict=True)):
                logits = model.logits(update_hidden(model, ids)[-1:])
                out = sample_token(logits, 5, torch.tensor([uid]), torch.tensor([draw]), temperature=0.9)
                assert int(buffers.drawn[row]) == int(out.ids) == int(buffers.ids[row])
                numbers = buffers.split_numbers(2, buffers.numbers[None, :8])[:, 0, row]
                assert_same(numbers, torch.stack([out.logp[0], out.entropy[0], out.mean_logp[0], out.kept_mass[0]]))
                ids.append(int(out.ids))
        assert buffers.position[:2].tolist() == buffers.draw[:2].tolist() == [20, 20]
        assert buffers.uid[:2].tolist() == [70, 80] and buffers.slot[:2].tolist() == [0, 1]


def test_numbers_of_several_chunks_of_the_head() -> None:
    """10 rows in chunks of 4, 4 and 2: number `w` of row r in pass k lies in its chunk's block of 4*c."""
    model = make_model(TINY)
    buffers = Buffers(model, 12)
    buffers.head_rows = 4
    flat = torch.full((3, 48), torch.nan)
    for k in range(3):
        for start, count in ((0, 4), (4, 4), (8, 2)):
            for w in range(4):
                begin = 4 * start + w * count
                flat[k, begin : begin + count] = torch.arange(start, start + count) + 100.0 * w + 1000 * k
    got = buffers.split_numbers(10, flat[:, :40])
    want = torch.arange(4)[:, None, None] * 100.0 + torch.arange(3)[:, None] * 1000 + torch.arange(10)
    assert torch.equal(got, want)


def test_chunks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of one row, of three rows or of all at a time."""
    seen = []
    for held in (paged.HEAD_BYTES, 4 * 50, 3 * 4 * 50):
        monkeypatch.setattr(paged, "HEAD_BYTES", held)
        model, cache, buffers = make(TINY, rows=8)
        assert buffers.head_rows == min(8, held // 200) == len(buffers.logits)
        feed(model, buffers, [(token, 0, i) for i, token in enumerate(IDS[:7])])
        buffers.uid[:7] = torch.arange(7)
        Pass(model, cache, buffers, 7, "token", Sampling(top_p=0.9), seed=1).run()
        seen.append((buffers.drawn[:7].clone(), buffers.split_numbers(7, buffers.numbers[None, :28]).clone()))
    for ids, numbers in seen[1:]:
        assert torch.equal(ids, seen[0][0])
        assert_same(numbers, seen[0][1])


def test_grow_keeps_pages_and_table() -> None:
    _, cache, _ = make(TINY)
    cache.keys.normal_()
    cache.values.normal_()
    keys, values, table = cache.keys.clone(), cache.values.clone(), cache.table.clone()
    cache.grow(7, 2, 3, 2)
    assert cache.keys.data_ptr() != keys.data_ptr() and torch.equal(cache.keys, keys)
    cache.grow(12, 5, 4, 2)
    assert cache.keys.shape == (3, 12, 2, 8, PAGE) and cache.values.shape == (3, 12, 2, PAGE, 8)
    assert torch.equal(cache.keys[:, :7], keys) and torch.equal(cache.values[:, :7], values)
    assert cache.table.dtype == torch.int32 and torch.equal(cache.table[:2, :3], table)
    assert not bool(cache.table[2:].any()) and not bool(cache.table[:, 3].any())
    assert not cache.keys.requires_grad


def test_copy_takes_pages_of_all_layers() -> None:
    _, cache, _ = make(TINY)
    cache.keys.normal_()
    cache.values.normal_()
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.copy(torch.tensor([1, 4]), torch.tensor([3, 0]))
    for got, old in ((cache.keys, keys), (cache.values, values)):
        assert torch.equal(got[:, [3, 0]], old[:, [1, 4]]) and torch.equal(
            got[:, [1, 2, 4, 5, 6]], old[:, [1, 2, 4, 5, 6]]
        )


@pytest.mark.parametrize("config", [TINY, HYBRID], ids=["llama", "hybrid"])
def test_the_memory_plan_counts_every_tensor(config: ModelConfig) -> None:
    model, cache, buffers = make(config, rows=48)
    assert PagedCache.page_bytes(model) * 7 == cache.keys.nbytes + cache.values.nbytes
    assert PagedCache.state_bytes(model) * 2 == cache.conv.nbytes + cache.ssm.nbytes
    held = {name: t for name, t in vars(buffers).items() if isinstance(t, Tensor) and t._base is None}
    assert sum(t.nbytes for t in held.values()) == Buffers.nbytes(model, 48), {n: t.nbytes for n, t in held.items()}
