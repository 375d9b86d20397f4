"""Philox4x32-10: the published known answers, and the extension against the reference."""

from __future__ import annotations

import pytest
import torch

from pymathrl.ops.sample_token import philox4x32_10_ref, philox_uniform, philox_uniform_ref

# counter, key, result: kat_vectors of the Random123 distribution (Salmon et al., SC 2011)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    words = tuple(torch.tensor([c]) for c in counter)
    assert tuple(int(x) for x in philox4x32_10_ref(words, key)) == result
    uid = counter[1] | (counter[2] << 32)
    uid -= (uid >> 63) << 64  # the same 64 bits as a signed integer
    u = philox_uniform(key[0] | (key[1] << 32), torch.tensor([uid]), torch.tensor([counter[0]]), counter[3])
    assert float(u) == (result[0] >> 8) * 2.0**-24 + 2.0**-25


def test_extension_is_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    uid = torch.randint(-(2**63), 2**63 - 1, (4096,), generator=generator)
    step = torch.randint(0, 2**32, (4096,), generator=generator)
    for seed in (0, 1, 2**40 + 17, 2**64 - 1, -1):
        for stream in (0, 1, 2):
            assert torch.equal(philox_uniform(seed, uid, step, stream), philox_uniform_ref(seed, uid, step, stream))
    assert torch.equal(philox_uniform(-1, uid, step), philox_uniform(2**64 - 1, uid, step))


def test_ends_of_the_interval() -> None:
    """Samples found by search whose 24 bits are all 0 and all 1: in fp32 the second would be 1."""
    u = philox_uniform(0, torch.tensor([1224113, 5150801]), torch.tensor([0, 0]))
    assert u.tolist() == [2.0**-25, 1.0 - 2.0**-25]


def test_open_interval_and_independent_inputs() -> None:
    n = 1 << 20
    u = philox_uniform(3, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    assert 0.0 < float(u.min()) < 1e-5
    assert 1.0 - 1e-5 < float(u.max()) < 1.0
    assert abs(float(u.double().mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5
    one = torch.tensor([5])
    base = philox_uniform(3, one, one)
    others = [philox_uniform(4, one, one), philox_uniform(3, one + 1, one), philox_uniform(3, one, one + 1)]
    assert all(not torch.equal(base, other) for other in [*others, philox_uniform(3, one, one, 1)])
