"""group_advantage: published values, every centre x scale against float64, exact zeros, ragged groups, nan."""

from __future__ import annotations

import math

import pytest
import torch

from pymathrl.ops import group_advantage, group_advantage_ref
from pymathrl.ops.group_advantage import CENTRES, SCALES
from tests.oracle import assert_accurate

TOY = torch.tensor([1.0, 0, 0, 1])
ONE_OF_FOUR = torch.tensor([1.0, 0, 0, 0])
LENGTHS = torch.tensor([3, 2, 3, 1])


def one_group(reward: torch.Tensor, device: str, **options) -> torch.Tensor:
    offsets = torch.tensor([0, reward.numel()], device=device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return group_advantage(reward.to(device), offsets, **options).advantage.cpu()


def close(got: torch.Tensor, expected: list[float], atol: float = 2e-6) -> None:
    torch.testing.assert_close(got, torch.tensor(expected), atol=atol, rtol=1e-6)


@pytest.mark.parametrize(
    "reward, options, expected",
    [
        (TOY, {"scale": "group_std", "eps": 1e-6}, [0.866024, -0.866024, -0.866024, 0.866024]),
        (TOY, {"scale": "group_std", "eps": 1e-4}, [0.865875, -0.865875, -0.865875, 0.865875]),
        (TOY, {}, [0.5, -0.5, -0.5, 0.5]),
        (TOY, {"centre": "leave_one_out"}, [0.666667, -0.666667, -0.666667, 0.666667]),
        (TOY, {"scale": "token_whiten", "eps": 1e-8, "tokens": LENGTHS}, [1.054093, -0.843274, -0.843274, 1.054093]),
        (
            TOY,
            {"centre": "none", "scale": "token_whiten", "eps": 1e-8, "tokens": LENGTHS},
            [1.054093, -0.843274, -0.843274, 1.054093],
        ),
        (ONE_OF_FOUR, {"scale": "group_std"}, [1.499997, -0.499999, -0.499999, -0.499999]),
        (ONE_OF_FOUR, {}, [0.75, -0.25, -0.25, -0.25]),
        (ONE_OF_FOUR, {"centre": "leave_one_out"}, [1.0, -1 / 3, -1 / 3, -1 / 3]),
        # ddof and eps of the std: sample std + 1e-4, population std + 1e-4
        (ONE_OF_FOUR, {"scale": "group_std", "eps": 1e-4}, [1.499700, -0.499900, -0.499900, -0.499900]),
        (ONE_OF_FOUR, {"scale": "group_std", "eps": 1e-4, "ddof": 0}, [1.731651, -0.577217, -0.577217, -0.577217]),
        # a tracker's baseline, whitened over the batch: (R - v) = (.6, -.2, -.8, .4), mean 0, std .632456
        (
            TOY,
            {
                "centre": "baseline",
                "baseline": torch.tensor([0.4, 0.2, 0.8, 0.6]),
                "scale": "batch_whiten",
                "eps": 1e-8,
            },
            [0.948683, -0.316228, -1.264911, 0.632456],
        ),
    ],
)
def test_published_values(device, reward, options, expected):
    close(one_group(reward, device, **options), expected)


def test_batch_std_is_of_all_rewards(device):
    reward = torch.cat([TOY, ONE_OF_FOUR]).to(device)
    got = group_advantage(reward, torch.tensor([0, 4, 8], device=device), scale="batch_std", eps=1e-4).advantage.cpu()
    std = math.sqrt(3 * 5 / 8 / 7)  # three ones among eight
    centred = [0.5, -0.5, -0.5, 0.5, 0.75, -0.25, -0.25, -0.25]
    close(got, [a / (std + 1e-4) for a in centred])


@pytest.mark.parametrize("value", [0.1, 0.3, 1.0, 0.0, -0.7, 1e30])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 1000])
@pytest.mark.parametrize("centre", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exact_zeros(device, value, n, centre, scale):
    """Sixteen rewards of 0.1 under the plain z-score give 0.0074: the mean rounds, and the std is that small too."""
    options = {"tokens": torch.ones(n, dtype=torch.int64)} if scale == "token_whiten" else {}
    got = one_group(torch.full((n,), value), device, centre=centre, scale=scale, **options)
    assert torch.equal(got, torch.zeros(n))


def test_the_plain_z_score_fails_that_test():
    r = torch.full((16,), 0.1)
    assert ((r - r.mean()) / (r.std() + 1e-6)).abs().max() > 1e-3


def test_only_exactly_equal_groups_are_flagged(device):
    reward = torch.tensor([0.0] + [0.95] * 7 + [0.95] * 8 + [0.3, 0.3 + 3e-8])
    out = group_advantage(reward.to(device), torch.tensor([0, 8, 16, 18, 18], device=device))
    assert out.equal.tolist() == [False, True, False, True]
    assert bool((out.advantage[:8] != 0).all()) and bool((out.advantage[8:16] == 0).all())


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("centre", CENTRES)
def test_ragged_groups_against_float64(device, centre, scale, ddof):
    g = torch.Generator().manual_seed(1)
    size = torch.tensor([5, 1, 0, 16, 2, 8, 8, 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)])
    n = int(offsets[-1])
    reward = torch.randint(0, 3, (n,), generator=g) * 0.35 + 0.1
    reward[6:22] = 0.3  # a group of equal rewards
    extra = {}
    if centre == "baseline":
        extra["baseline"] = torch.rand(n, generator=g)
    if scale == "token_whiten":
        extra["tokens"] = torch.randint(0, 30, (n,), generator=g)
    options = {"centre": centre, "scale": scale, "ddof": ddof}
    kernel = group_advantage(
        reward.to(device), offsets.to(device), **{k: v.to(device) for k, v in extra.items()}, **options
    )
    wide = {k: v.double() if v.is_floating_point() else v for k, v in extra.items()}
    ref64 = group_advantage_ref(reward.double(), offsets, **wide, **options)
    ref32 = group_advantage_ref(reward, offsets, **extra, **options)
    assert_accurate(kernel.advantage, ref32.advantage, ref64.advantage)
    assert torch.equal(kernel.equal.cpu(), ref64.equal)


def test_group_advantages_sum_to_zero_and_follow_a_permutation(device):
    g = torch.Generator().manual_seed(2)
    reward = torch.rand(64, generator=g)
    offsets = torch.arange(0, 65, 8)
    order = torch.cat([torch.randperm(8, generator=g) + 8 * p for p in range(8)])
    for options in ({}, {"scale": "group_std"}, {"centre": "leave_one_out"}):
        a = group_advantage(reward.to(device), offsets.to(device), **options).advantage.cpu()
        assert a.view(8, 8).sum(1).abs().max() < 1e-5
        b = group_advantage(reward[order].to(device), offsets.to(device), **options).advantage.cpu()
        torch.testing.assert_close(b, a[order], rtol=1e-6, atol=1e-7)


def test_spread_far_from_zero_keeps_its_digits(device):
    reward = 1000 + torch.tensor([0.0, 1 / 1024, 2 / 1024, 3 / 1024])
    for scale in ("group_std", "batch_std", "batch_whiten"):
        centre = "none" if scale == "batch_whiten" else "group_mean"
        got = one_group(reward, device, centre=centre, scale=scale, eps=0.0)
        close(got, [-1.161895, -0.387298, 0.387298, 1.161895], atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_bad_reward_is_never_hidden(device, bad, centre, scale):
    """nan stays in its group where the scale is of the group; a scale of the batch spreads it. Nothing finite
    and wrong comes out of a broken std."""
    reward = torch.tensor([1.0, bad, 0.0, 1.0, 0.0, 0.5])
    extra = {"baseline": torch.zeros(6, device=device)} if centre == "baseline" else {}
    extra |= {"tokens": torch.ones(6, dtype=torch.int64, device=device)} if scale == "token_whiten" else {}
    offsets = torch.tensor([0, 3, 6], device=device)
    out = group_advantage(reward.to(device), offsets, centre=centre, scale=scale, **extra)
    clean = group_advantage(
        torch.nan_to_num(reward, posinf=0.0).to(device), offsets, centre=centre, scale=scale, **extra
    )
    a = out.advantage.cpu()
    assert not bool(torch.isfinite(a[1])) and out.equal.tolist() == [False, False]
    if scale in ("none", "group_std"):
        assert torch.equal(a[3:], clean.advantage.cpu()[3:])
    else:
        assert not bool((torch.isfinite(a) & (a != 0)).any())  # x / inf = 0 is the only finite outcome


def test_no_groups(device):
    out = group_advantage(
        torch.empty(0, device=device), torch.zeros(1, dtype=torch.int64, device=device), scale="batch_std"
    )
    assert out.advantage.numel() == out.equal.numel() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"centre": "mean"}, "centre must be one of none, group_mean"),
        ({"scale": "std"}, "scale must be one of none, group_std"),
        ({"centre": "baseline"}, r"needs baseline \[B\], got None"),
        ({"scale": "token_whiten"}, r"needs tokens \[B\], got None"),
        ({"offsets": torch.tensor([0, 3])}, "offsets must rise from 0 to B=4"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, "offsets must rise from 0 to B=4"),
        ({"reward": TOY[:, None]}, r"reward must be \[B\]"),
        ({"reward": TOY.double()}, "reward must be float32, got float64"),
        ({"centre": "baseline", "baseline": TOY[:2]}, r"baseline must have shape \[4\], got \[2\]"),
        ({"scale": "token_whiten", "tokens": TOY}, "tokens must be int64, got float32"),
    ],
)
def test_errors_name_the_argument(change, message):
    args = {"reward": TOY, "offsets": torch.tensor([0, 4])} | change
    with pytest.raises(ValueError, match=message):
        group_advantage(args.pop("reward"), args.pop("offsets"), **args)
