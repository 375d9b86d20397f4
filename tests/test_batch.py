"""Rollout, Batch and micro-batches: selection, checks, and the index arithmetic against plain loops."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymathrl.batch import (
    ROLE_FORCED,
    ROLE_PROMPT,
    ROLE_SAMPLED,
    STOP_EOS,
    STOP_LENGTH,
    Batch,
    Rollout,
    micro_batches,
)


def make_rollout(shape: list[tuple[int, int]], group: list[int] | None = None, forced: bool = False) -> Rollout:
    """Rows of (prompt tokens, response tokens); ids count up from 10; `forced`: every third response token is."""
    lengths = torch.tensor([p + r for p, r in shape], dtype=torch.int64)
    role = torch.tensor(
        [
            ROLE_PROMPT if i < p else ROLE_FORCED if forced and (i - p) % 3 == 2 else ROLE_SAMPLED
            for p, r in shape
            for i in range(p + r)
        ],
        dtype=torch.int8,
    )
    value = torch.where(role == ROLE_SAMPLED, -torch.arange(1.0, len(role) + 1), 0.0)
    rows = len(shape)
    return Rollout(
        ids=torch.arange(10, 10 + len(role)),
        role=role,
        logp=value,
        mean_logp=value * 2,
        entropy=-value,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        prompt_len=torch.tensor([p for p, _ in shape], dtype=torch.int64),
        group=torch.tensor(group if group is not None else list(range(rows)), dtype=torch.int64),
        uid=torch.arange(100, 100 + rows),
        stop=torch.tensor([STOP_EOS, STOP_LENGTH] * rows, dtype=torch.int8)[:rows],
    )


SMALL = make_rollout([(2, 3), (1, 1), (3, 2)], group=[0, 0, 1])


def make_batch(rollout: Rollout) -> Batch:
    sampled = rollout.sampled_mask.float()
    reward = torch.arange(rollout.rows, dtype=torch.float32)
    return Batch(rollout, reward, reward > 0, rollout.per_token(reward) * sampled, sampled, torch.ones_like(sampled))


def test_by_hand() -> None:
    """Rows: 10 11 | 12 13 14,  15 | 16,  17 18 19 | 20 21."""
    r = SMALL
    assert (r.rows, r.tokens) == (3, 12)
    assert r.lengths.tolist() == [5, 2, 5] and r.response_lengths.tolist() == [3, 1, 2]
    assert r.sampled_mask.nonzero()[:, 0].tolist() == [2, 3, 4, 6, 10, 11]
    assert r.per_token(torch.tensor([7, 8, 9])).tolist() == [7] * 5 + [8] * 2 + [9] * 5
    assert r.row_of_token.tolist() == [0] * 5 + [1] * 2 + [2] * 5
    assert r.response(2).tolist() == [20, 21]
    r.validate()
    make_batch(r).validate()
    one, two = micro_batches(r, [0, 1, 2], token_budget=8)
    assert one.rows.tolist() == [0, 2] and one.ids.tolist() == [[10, 11, 12, 13], [17, 18, 19, 20]]
    assert one.targets.tolist() == [12, 13, 14, 20, 21] and one.token_index.tolist() == [2, 3, 4, 10, 11]
    assert one.hidden_index.tolist() == [1, 2, 3, 6, 7] and one.offsets.tolist() == [0, 3, 5]
    assert two.rows.tolist() == [1] and two.ids.tolist() == [[15]] and two.hidden_index.tolist() == [0]


def test_select_and_concat() -> None:
    batch = make_batch(SMALL)
    part = batch.select([2, 0])
    assert part.rollout.ids.tolist() == [17, 18, 19, 20, 21, 10, 11, 12, 13, 14]
    assert part.rollout.offsets.tolist() == [0, 5, 10] and part.rollout.uid.tolist() == [102, 100]
    assert part.reward.tolist() == [2.0, 0.0] and part.advantage.tolist() == [0, 0, 0, 2, 2, 0, 0, 0, 0, 0]
    part.validate()
    both = Batch.concat([batch, part])
    both.validate()
    assert both.rollout.group.tolist() == [0, 0, 1, 3, 2]  # shifted by 2 past the groups of the first part
    assert torch.equal(both.rollout.ids, torch.cat([batch.rollout.ids, part.rollout.ids]))
    for f in fields(Rollout):
        assert torch.equal(getattr(Rollout.concat([SMALL]), f.name), getattr(SMALL, f.name))
    assert batch.select(torch.tensor([], dtype=torch.int64)).rollout.tokens == 0
    batch.select([]).validate()
    with pytest.raises(ValueError, match="at least one rollout"):
        Rollout.concat([])


def test_to_keeps_every_field() -> None:
    moved = make_batch(SMALL).to("meta")
    assert all(getattr(moved.rollout, f.name).device.type == "meta" for f in fields(Rollout))
    assert moved.reward.device.type == moved.coef.device.type == "meta"
    assert torch.equal(make_batch(SMALL).cpu().rollout.ids, SMALL.ids)


def changed(name: str, at: int, value: float) -> Rollout:
    tensor = getattr(SMALL, name).clone()
    tensor[at] = value
    return replace(SMALL, **{name: tensor})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(SMALL, ids=SMALL.ids.int()), r"Rollout.ids: expected torch.int64 of shape \[12\], got torch.int32"),
        (replace(SMALL, logp=SMALL.logp[:-1]), r"Rollout.logp: expected torch.float32 of shape \[12\], got .* \[11\]"),
        (replace(SMALL, offsets=SMALL.offsets[:-1]), r"Rollout.offsets: expected .* \[4\]"),
        (replace(SMALL, uid=SMALL.uid[:2]), r"Rollout.uid: expected .* \[3\]"),
        (
            replace(SMALL, entropy=SMALL.entropy.to("meta")),
            r"Rollout.entropy: expected a tensor on cpu like ids, got meta",
        ),
        (changed("offsets", 0, 1), r"Rollout.offsets: expected offsets\[0\] = 0, got 1"),
        (changed("offsets", 3, 11), r"expected offsets\[B\] = T = 12, got 11"),
        (changed("offsets", 1, 7), r"Rollout.offsets: .* got 0 at index 1"),
        (changed("prompt_len", 1, 0), "Rollout.prompt_len: expected 1 <= prompt_len <= row length, got 0 at index 1"),
        (changed("prompt_len", 2, 6), "Rollout.prompt_len: .* got 6 at index 2"),
        (changed("role", 4, 3), r"Rollout.role: expected 0..2, got 3 at index 4"),
        (changed("role", 4, ROLE_PROMPT), "Rollout.role: expected ROLE_PROMPT on the first prompt_len tokens"),
        (changed("role", 0, ROLE_SAMPLED), "Rollout.role: expected ROLE_PROMPT on the first prompt_len tokens"),
        (changed("stop", 0, 2), r"Rollout.stop: expected 0..1, got 2"),
        (changed("ids", 3, -1), "Rollout.ids: expected ids >= 0, got -1 at index 3"),
        (changed("logp", 3, float("nan")), "Rollout.logp: expected finite values, 0 where not sampled, got nan"),
        (changed("entropy", 0, 0.5), "Rollout.entropy: expected finite values, 0 where not sampled, got 0.5"),
        (
            replace(SMALL, group=torch.tensor([0, 1, 0])),
            r"Rollout.group: expected contiguous groups .2 runs., got 3 runs",
        ),
    ],
)
def test_validate_names_the_field(bad: Rollout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad.validate()


def test_validate_batch_names_the_field() -> None:
    batch = make_batch(SMALL)
    for bad, message in (
        (replace(batch, reward=batch.reward.double()), "Batch.reward: expected torch.float32"),
        (replace(batch, reward=batch.reward / 0), "Batch.reward: expected finite values, got nan at index 0"),
        (replace(batch, correct=batch.reward), "Batch.correct: expected torch.bool"),
        (
            replace(batch, advantage=batch.reward),
            r"Batch.advantage: expected torch.float32 of shape \[12\], got .* \[3\]",
        ),
        (replace(batch, weight=batch.weight + 1), "Batch.weight: expected 0 where not sampled, got 1.0 at index 0"),
        (replace(batch, coef=batch.coef * torch.inf), "Batch.coef: expected finite values, got inf at index 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bad.validate()
    with pytest.raises(ValueError, match=r"per_token.values.: expected shape \[3\], got \[2\]"):
        batch.per_token(batch.reward[:2])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=12),
    st.integers(1, 60),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_micro_batches_cover_each_sampled_token_once(shape, budget, forced, random) -> None:  # type: ignore[no-untyped-def]
    rollout = make_rollout(shape, forced=forced)
    chosen = [row for row in range(len(shape)) if random.random() < 0.8]
    random.shuffle(chosen)
    parts = list(micro_batches(rollout, chosen, budget))
    seen: dict[int, int] = {}
    widths = []
    for part in parts:
        rows, width = part.ids.shape
        widths.append(width)
        assert rows == 1 or rows * width <= budget
        assert part.rows.tolist() == sorted(part.rows.tolist())
        assert width == max(1, int(rollout.lengths[part.rows].max()) - 1)
        assert torch.equal(part.targets, rollout.ids[part.token_index])
        assert bool((part.token_index.diff() > 0).all())
        for i, row in enumerate(part.rows.tolist()):
            start = int(rollout.offsets[row])
            for j in range(int(part.offsets[i]), int(part.offsets[i + 1])):
                token, cell = int(part.token_index[j]), int(part.hidden_index[j])
                assert cell // width == i and start + cell % width == token - 1
                assert int(part.ids.flatten()[cell]) == int(rollout.ids[token - 1])
                seen[token] = row
    assert widths == sorted(widths, reverse=True)
    expected = {t for t in rollout.sampled_mask.nonzero()[:, 0].tolist() if int(rollout.row_of_token[t]) in chosen}
    assert set(seen) == expected and sum(p.targets.numel() for p in parts) == len(expected)
    again = list(micro_batches(rollout, sorted(chosen), budget))
    assert sum(p.ids.numel() for p in again) == sum(p.ids.numel() for p in parts)


def test_micro_batch_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="token_budget must be >= 1 token, got 0"):
        list(micro_batches(SMALL, [0], 0))
