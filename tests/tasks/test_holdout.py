from pymathrl.tasks.holdout import HELD_OUT_SHARE, is_held_out, key_hash


def test_share():
    count = sum(is_held_out(f"key {i}") for i in range(40_000))
    assert HELD_OUT_SHARE == 1 / 8
    assert abs(count / 40_000 - HELD_OUT_SHARE) < 0.008  # 5 standard deviations


def test_hash_is_fixed_for_ever():
    """A change would move problems between training and test, and so spoil every model trained before it."""
    assert key_hash("countdown:17,60,79->36") == 11_007_660_600_063_179_590
