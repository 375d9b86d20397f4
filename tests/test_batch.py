"""Rollout, Batch and micro-batches: selection, checks, and the index arithmetic against plain loops."""

from dataclasses import fields, replace
from itertools import pairwise

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
    STOP_NAMES,
    Batch,
    Rollout,
    keep_support,
    micro_batches,
)
from pymathrl.ops.soft_embed import SoftSampling


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


# of tokens 2, 3, 6, 10 and 11
FILTERED = replace(
    SMALL,
    support_ids=torch.tensor([9, 30, 31, 5, 6, 7, 11, 12], dtype=torch.int32),
    support_offsets=torch.tensor([0, 0, 0, 1, 3, 3, 3, 5, 5, 5, 5, 6, 8]),
)


# tokens 3, 4 and 6
SOFT = replace(
    SMALL,
    soft=torch.tensor([i in (3, 4, 6) for i in range(12)]),
    soft_inputs=torch.tensor([[3.0, 3.5], [4.0, 4.5], [6.0, 6.5]]),
    soft_sampling=SoftSampling(0.5, 0.1),
)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def support_pairs(rollout: Rollout, tokens: torch.Tensor) -> tuple[list[int], list[int]]:
    pairs = rollout.support_of(tokens)
    assert pairs is not None
    return pairs[0].tolist(), pairs[1].tolist()


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
    one, two = micro_batches(r, [2, 1, 0], token_budget=8)
    assert one.rows.tolist() == [2, 1] and one.ids.tolist() == [17, 18, 19, 20, 15] and one.starts.tolist() == [0, 4, 5]
    assert one.targets.tolist() == [20, 21, 16] and one.token_index.tolist() == [10, 11, 6]
    assert one.hidden_index.tolist() == [2, 3, 4] and one.offsets.tolist() == [0, 2, 3]
    assert two.rows.tolist() == [0] and two.ids.tolist() == [10, 11, 12, 13] and two.starts.tolist() == [0, 4]
    assert two.hidden_index.tolist() == [1, 2, 3] and two.offsets.tolist() == [0, 3]
    assert STOP_NAMES[STOP_EOS] == "eos" and STOP_NAMES[STOP_LENGTH] == "length" and STOP_NAMES[-1] == "none"


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
        assert same(getattr(Rollout.concat([SMALL]), f.name), getattr(SMALL, f.name))
    assert batch.select(torch.tensor([], dtype=torch.int64)).rollout.tokens == 0
    batch.select([]).validate()
    with pytest.raises(ValueError, match="at least one rollout"):
        Rollout.concat([])


def test_supports_follow_their_tokens() -> None:
    """Tokens 3, 6 and 11 were drawn from two tokens, 2 and 10 from one, 4 without filters."""
    FILTERED.validate()
    row, ids = support_pairs(FILTERED, torch.tensor([3, 4, 11]))
    assert row == [0, 0, 2, 2] and ids == [30, 31, 11, 12]
    part = FILTERED.select([2, 1])
    part.validate()
    assert part.support_ids is not None and part.support_ids.dtype == torch.int32
    assert part.support_ids.tolist() == [7, 11, 12, 5, 6]
    assert part.support_offsets is not None and part.support_offsets.tolist() == [0, 0, 0, 0, 1, 3, 3, 5]
    assert SMALL.support_of(torch.tensor([3])) is None and SMALL.select([0]).support_ids is None
    both = Rollout.concat([SMALL, FILTERED])  # of the first nothing was filtered
    both.validate()
    assert both.support_ids is not None and both.support_ids.tolist() == FILTERED.support_ids.tolist()
    assert support_pairs(both, torch.tensor([2, 12 + 6])) == ([1, 1], [5, 6])


def test_keep_support() -> None:
    """Logits of tokens 1 .. 3 of four; the third has no support, and keeps them all."""
    logits = torch.arange(15.0).view(3, 5)
    support = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 2, 4, 0, 3])
    keep_support(logits, support, 1)
    inf = torch.inf
    assert logits.tolist() == [[-inf, -inf, -inf, -inf, 4], [5, -inf, -inf, 8, -inf], [10, 11, 12, 13, 14]]


def test_soft_tokens_keep_their_vectors() -> None:
    """Rows are (0..4), (5, 6), (7..11); through selection, concatenation and micro-batches."""
    SOFT.validate()
    picked = SOFT.select([2, 1, 0, 1])
    picked.validate()
    assert picked.soft is not None and picked.soft_inputs is not None
    assert picked.ids[picked.soft].tolist() == [16, 13, 14, 16]
    assert picked.soft_inputs[:, 0].tolist() == [6, 3, 4, 6]
    assert SOFT.select([2]).soft is None and SOFT.select([2]).soft_sampling is None
    joined = Rollout.concat([SMALL, SOFT, SOFT.select([1])])
    joined.validate()
    assert joined.soft is not None and joined.soft.nonzero()[:, 0].tolist() == [15, 16, 18, 25]
    assert joined.soft_inputs is not None and joined.soft_inputs[:, 0].tolist() == [3, 4, 6, 6]
    assert Rollout.concat([SMALL, SMALL]).soft is None
    state = SOFT.state_dict()
    assert all(isinstance(value, torch.Tensor) or name == "soft_sampling" for name, value in state.items())
    assert state["soft_sampling"] == {"temperature": 0.5, "sigma": 0.1, "top_k": 0}
    assert Rollout.restore(state).soft_sampling == SOFT.soft_sampling
    assert Rollout.restore(FILTERED.state_dict()).soft is None
    (micro,) = micro_batches(SOFT, [1, 0], 100)
    assert micro.inputs is not None  # token 6 is row 1's last and is not fed, nor is token 4
    assert micro.ids[micro.inputs[0]].tolist() == [13] and micro.inputs[1].tolist() == [[3.0, 3.5]]
    made = SOFT.soft_of(torch.tensor([6, 2, 3]))
    assert made is not None and made[0].tolist() == [True, False, True] and made[1][:, 0].tolist() == [6, 3]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"soft_inputs": None}, "together"),
        ({"soft": torch.arange(12) == 0}, "False in prompts"),
        ({"soft_inputs": torch.zeros(2, 2)}, r"\[3,D\]"),
        ({"soft_inputs": torch.full((3, 2), torch.nan)}, "finite"),
    ],
)
def test_soft_tokens_are_checked(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SOFT, **wrong).validate()


def test_soft_tokens_made_in_two_ways_do_not_mix() -> None:
    with pytest.raises(ValueError, match="made in one way"):
        Rollout.concat([SOFT, replace(SOFT, soft_sampling=SoftSampling(0.5, 0.2))])


# Rows 0 and 3 are responses, 1 and 2 the first one's branches; the second stands alone.
BRANCHED = replace(
    make_rollout([(2, 5), (2, 3), (2, 4), (1, 3)], group=[0, 0, 0, 1]),
    parent=torch.tensor([0, 0, 0, 3]), stop=torch.tensor([0, 0, 0, 1], dtype=torch.int8),
)  # fmt: skip


def test_branch_rows_belong_to_the_response_before_them() -> None:
    r = BRANCHED
    r.validate()
    assert r.main_rows.tolist() == [0, 3] and r.response_of_row.tolist() == [0, 0, 0, 1]
    assert r.response_offsets.tolist() == [0, 18, 22] and SMALL.response_offsets.tolist() == SMALL.offsets.tolist()
    assert r.main.lengths.tolist() == [7, 4] and r.main.parent is None and SMALL.main is SMALL
    part = r.select([3, 0, 2])
    part.validate()
    assert part.parent is not None and part.parent.tolist() == [0, 1, 1]
    both = Rollout.concat([SMALL, r, part])
    both.validate()
    assert both.parent is not None and both.parent.tolist() == [0, 1, 2, 3, 3, 3, 6, 7, 8, 8]
    for rows in ([1], [0, 3, 1], [3, 2]):
        with pytest.raises(ValueError, match="behind the main row"):
            r.select(rows)
    for parent in ([0, 0, 1, 3], [1, 1, 1, 3], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="parent"):
            replace(r, parent=torch.tensor(parent)).validate()
    with pytest.raises(ValueError, match="group and stop"):
        replace(r, stop=torch.tensor([0, 1, 0, 1], dtype=torch.int8)).validate()


def test_to_keeps_every_field() -> None:
    soft = {name: getattr(SOFT, name) for name in ("soft", "soft_inputs", "soft_sampling")}
    moved = make_batch(replace(FILTERED, parent=torch.arange(3), **soft)).to("meta")
    for f in fields(Rollout):
        value = getattr(moved.rollout, f.name)
        assert value == SOFT.soft_sampling if f.name == "soft_sampling" else value.device.type == "meta"
    assert moved.reward.device.type == moved.coef.device.type == "meta"
    assert torch.equal(make_batch(SMALL).cpu().rollout.ids, SMALL.ids)


def changed(name: str, at: int, value: float) -> Rollout:
    tensor = getattr(SMALL, name).clone()
    tensor[at] = value
    return replace(SMALL, **{name: tensor})


zeros = {name: torch.zeros(12) for name in ("logp", "mean_logp", "entropy")}


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
        (changed("stop", 0, 5), r"Rollout.stop: expected 0..4, got 5"),
        (replace(FILTERED, support_offsets=FILTERED.support_offsets[:-1]), r"Rollout.support_offsets: .* \[13\], got"),
        (replace(FILTERED, support_ids=FILTERED.support_ids.long()), "Rollout.support_ids: expected torch.int32"),
        (
            replace(FILTERED, support_ids=FILTERED.support_ids[1:]),
            r"Rollout.support_ids: expected .* \[8\], got .* \[7\]",
        ),
        (
            replace(FILTERED, role=(SMALL.role * 2).to(torch.int8), **zeros),
            "Rollout.support_offsets: expected rising values, a support only where sampled, got 1 at index 2",
        ),
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
    seen: list[int] = []
    for part in parts:
        fed = part.starts.diff().tolist()
        assert len(fed) == part.rows.numel() and part.starts[0] == 0 and sum(fed) == part.ids.numel()
        assert len(fed) == 1 or sum(fed) <= budget
        assert torch.equal(part.targets, rollout.ids[part.token_index])
        for i, row in enumerate(part.rows.tolist()):
            start, end, at = int(rollout.offsets[row]), int(rollout.offsets[row + 1]), int(part.starts[i])
            assert part.ids[at : at + fed[i]].tolist() == rollout.ids[start : end - 1].tolist()
            own = range(int(part.offsets[i]), int(part.offsets[i + 1]))
            assert len(own) > 0
            for j in own:
                token = int(part.token_index[j])
                assert int(part.hidden_index[j]) - at == token - 1 - start
                seen.append(token)
    expected = [
        t for row in chosen for t in range(*rollout.offsets[row : row + 2].tolist()) if bool(rollout.sampled_mask[t])
    ]
    assert seen == expected  # rows in the order given, without those that have no sampled token
    for one, two in pairwise(parts):  # no micro-batch could take its neighbour's first row
        assert one.ids.numel() + int(two.starts[1]) > budget


def test_micro_batch_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="token_budget must be >= 1 token, got 0"):
        list(micro_batches(SMALL, [0], 0))
