"""gae and value_loss: the published numbers, a loop in float64, forced tokens, invariants, mutants."""

from __future__ import annotations

import math

import pytest
import torch

from pymathrl.ops import gae, group_advantage, value_loss
from tests.oracle import accepts, assert_accurate

ONE_ROW = torch.tensor([0, 3])
ALL = torch.ones(3, dtype=torch.bool)
REWARD, VALUE = torch.tensor([0.0, 0, 1]), torch.tensor([0.2, 0.5, 0.6])
TARGET = torch.tensor([0.956, 0.98, 1.0])


def close(got: torch.Tensor, expected: list[float] | float) -> None:
    torch.testing.assert_close(got.detach().cpu(), torch.tensor(expected), atol=2e-6, rtol=1e-5)


def test_published_values(device):
    place = lambda *tensors: (t.to(device) for t in tensors)
    out = gae(*place(REWARD, VALUE, ALL, ONE_ROW), gamma=1.0, lam=0.95)
    close(out.advantage, [0.756, 0.48, 0.4])
    close(out.returns, TARGET.tolist())
    each = torch.arange(4, device=device)  # every token a sample of its own, counted once
    white = group_advantage(
        out.advantage, each, centre="none", scale="token_whiten", eps=1e-8, tokens=torch.ones_like(each[1:])
    )
    close(white.advantage, [1.127910, -0.349795, -0.778115])
    value = torch.tensor([0.5, 0.5, 0.9]).to(device).requires_grad_()
    third = torch.full((3,), 1 / 3)
    loss = value_loss(value, *place(VALUE, TARGET, third), clip=0.2)
    close(loss, 0.096589)
    loss.backward()
    close(value.grad, [0.0, -0.48 / 3, 0.0])  # .5 and .9 are past .4 and .8, and the clipped arm is larger
    close(value_loss(value, *place(VALUE, TARGET, third), clip=None), (0.456**2 + 0.48**2 + 0.1**2) / 6)


def loop(reward, value, mask, offsets, gamma, lam, skip: bool = True, bootstrap: bool = False):
    """The definition, one token at a time. The last two arguments make mutants of it."""
    advantage, target = torch.zeros_like(value), torch.zeros_like(value)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        carried = value.new_zeros(())
        following = value[end - 1] if bootstrap and end > begin else carried
        for t in range(end - 1, begin - 1, -1):
            if skip and not mask[t]:
                continue
            carried = reward[t] + gamma * following - value[t] + gamma * lam * carried
            following = value[t]
            if mask[t]:
                advantage[t], target[t] = carried, carried + following
    return advantage, target


def draw(n: int = 3000, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    offsets = torch.cat(
        [torch.tensor([0, 1, 1]), torch.randint(2, n, (30,), generator=g).sort().values, torch.tensor([n])]
    )
    mask = torch.rand(n, generator=g) < 0.8
    mask[offsets[5] : offsets[6]] = False  # a row without a sampled token
    return 0.1 * torch.randn(n, generator=g), torch.randn(n, generator=g), mask, offsets


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.99, 0.9), (0.9, 0.0), (0.0, 1.0)])
def test_against_a_loop_in_float64(device, gamma, lam):
    reward, value, mask, offsets = draw()
    out = gae(*(t.to(device) for t in (reward, value, mask, offsets)), gamma=gamma, lam=lam)
    double = gae(reward.double(), value.double(), mask, offsets, gamma=gamma, lam=lam)
    ref64 = loop(reward.double(), value.double(), mask, offsets, gamma, lam)
    torch.testing.assert_close((double.advantage, double.returns), ref64, rtol=1e-12, atol=1e-12)
    ref32 = loop(reward, value, mask, offsets, gamma, lam)  # rounded once per token
    for got, single, exact in zip((out.advantage, out.returns), ref32, ref64, strict=True):
        if gamma * lam < 1:
            assert_accurate(got, single, exact)
        else:  # a sum over the whole row, here in fp32
            assert float((got.cpu() - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_forced_tokens_change_nothing(device):
    """Rows with forced tokens give what the same rows without them give, whatever stands at the forced places."""
    reward, value, mask, offsets = draw()
    reward, value = torch.where(mask, reward, math.nan), torch.where(mask, value, math.inf)
    full = gae(*(t.to(device) for t in (reward, value, mask, offsets)), gamma=0.99, lam=0.95)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), mask.cumsum(0)])
    some = (reward[mask], value[mask], mask[mask], before[offsets])
    packed = gae(*(t.to(device) for t in some), gamma=0.99, lam=0.95)
    assert torch.equal(full.advantage[mask.to(device)], packed.advantage)
    assert torch.equal(full.returns[mask.to(device)], packed.returns)
    assert float(full.advantage[~mask.to(device)].abs().sum()) == float(full.returns[~mask.to(device)].abs().sum()) == 0


def test_a_row_does_not_depend_on_the_others():
    reward, value, mask, offsets = draw()
    full = gae(reward, value, mask, offsets, gamma=0.99, lam=0.95)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        row = slice(begin, end)
        alone = gae(reward[row], value[row], mask[row], torch.tensor([0, end - begin]), gamma=0.99, lam=0.95)
        assert torch.equal(alone.advantage, full.advantage[row]) and torch.equal(alone.returns, full.returns[row])


def test_without_discount_the_returns_are_the_rewards_to_come():
    reward, value, mask, offsets = draw()
    out = gae(reward.double(), value.double(), mask, offsets, gamma=1.0, lam=1.0)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        paid = torch.where(mask, reward.double(), 0.0)[begin:end]
        to_come = paid.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(out.returns[begin:end], torch.where(mask[begin:end], to_come, 0.0))


@pytest.mark.parametrize(
    "wrong",
    [{"skip": False}, {"bootstrap": True}, {"gamma": 1.0}, {"lam": 1.0}, {"offsets": torch.tensor([0, 3000])}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_estimates_are_refused(wrong):
    reward, value, mask, offsets = draw()
    right = {"offsets": offsets, "gamma": 0.99, "lam": 0.95}
    got = gae(reward, value, mask, **right).advantage
    ref32 = loop(reward, value, mask, **right)[0]
    ref64 = loop(reward.double(), value.double(), mask, **right)[0]
    assert accepts(got, ref32, ref64)
    assert not accepts(loop(reward, value, mask, **right | wrong)[0], ref32, ref64)


def test_value_loss_against_float64(device):
    g = torch.Generator().manual_seed(1)
    old, target = torch.randn(4096, generator=g), torch.randn(4096, generator=g)
    value = old + 0.4 * torch.randn(4096, generator=g)
    coef = torch.where(torch.rand(4096, generator=g) < 0.9, 1 / 4096, 0.0)
    poison = torch.where(coef == 0, math.nan, value)

    def both(dtype: torch.dtype, clip: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        v = poison.to(device, dtype, copy=True).requires_grad_()
        loss = value_loss(v, old.to(device, dtype), target.to(device, dtype), coef.to(device, dtype), clip=clip)
        loss.backward()
        return loss.detach().cpu(), v.grad.cpu()

    for clip in (0.2, None):
        loss, grad = both(torch.float32, clip)
        v, c = value.double(), coef.double()
        bounded = v if clip is None else torch.clamp(v, old.double() - clip, old.double() + clip)
        free, capped = (v - target).square(), (bounded - target).square()
        assert float(loss) == pytest.approx(float(0.5 * (c * torch.maximum(free, capped)).sum()), rel=1e-6)
        inside = (free >= capped).double()
        torch.testing.assert_close(grad.double(), c * (v - target) * inside, rtol=1e-6, atol=1e-10)
        if clip is not None:
            assert 300 < int(((inside == 0) & (c != 0)).sum()) < 3000


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"reward, value and mask must be \[N\]"):
        gae(REWARD, VALUE[:2], ALL, ONE_ROW, gamma=1.0, lam=0.95)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got 1.5"):
        gae(REWARD, VALUE, ALL, ONE_ROW, gamma=1.0, lam=1.5)
    with pytest.raises(ValueError, match="clip must be > 0 or None, got 0"):
        value_loss(VALUE, VALUE, VALUE, VALUE, clip=0)


def test_no_rows_and_no_tokens():
    empty = torch.empty(0)
    for offsets in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        out = gae(empty, empty, empty.bool(), offsets, gamma=1.0, lam=0.95)
        assert out.advantage.numel() == out.returns.numel() == 0
