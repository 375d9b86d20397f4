from pymathrl.tasks.holdout import HELD_OUT_SHARE, held_out_keys, is_held_out, key_hash


def test_share():
    count = sum(is_held_out(f"key {i}") for i in range(40_000))
    assert HELD_OUT_SHARE == 1 / 8
    assert abs(count / 40_000 - HELD_OUT_SHARE) < 0.008  # 5 standard deviations


def test_keys_of_a_file():
    keys = [f"key {i}" for i in range(100)]
    assert held_out_keys(keys) == {key for key in keys if is_held_out(key)}
    few = [key for key in keys if not is_held_out(key)][:3]
    assert held_out_keys(few) == held_out_keys(few[::-1] * 2) == {sorted(few, key=key_hash)[0]}


def test_hash_is_fixed_for_ever():
    """A change would move problems between training and test, and so spoil every model trained before it."""
    assert key_hash("countdown:17,60,79->36") == 11_007_660_600_063_179_590
