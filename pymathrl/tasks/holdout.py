"""Which problems are never trained on.

One rule for every task: a problem is held out if the hash of its key says so.  Membership depends on nothing else (no
seed, no option, no file, no order), so a model made from one training source and tested with another, or with other
ranges, has still never been trained on a problem of the test set. There are two exceptions. A file read with
split="all": then every row is for evaluation, whether a model was trained on it or not. And data with a test split of
its own: that is held out, and every other row is trained on.
"""

import hashlib
from collections.abc import Iterable

HELD_OUT_SHARE = 1 / 8
TEST_SEED = 2_718_281_828  # of every generated test stream; independent of the seed of a run


def key_hash(key: str) -> int:
    """64-bit BLAKE2b hash of a key; the same on every machine and Python version (unlike ``hash``)."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def is_held_out(key: str) -> bool:
    """True for the share `HELD_OUT_SHARE` of all keys.  `key`: the identity of the problem, with its task's name."""
    return key_hash(key) < HELD_OUT_SHARE * 2**64


def held_out_keys(keys: Iterable[str]) -> set[str]:
    """Those of a file's keys, at least one, that are held out; if that is none, as in a small file, the one of the
    smallest hash."""
    keys = set(keys)
    return {key for key in keys if is_held_out(key)} or {min(keys, key=key_hash)}
