"""Which groups are kept, how a batch is filled, what waits for the next step."""

from dataclasses import replace

import pytest
import torch

from pymathrl.batch import Graded
from pymathrl.config import TrainConfig
from pymathrl.filter import Filter, keep_mask
from pymathrl.prompt import Prompts
from tests.algos.cases import context, graded

ACCURACY = torch.tensor([0, 0.25, 0.375, 0.5, 0.75, 1])  # UT-O1


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"filter": "band"}, [2, 3]),
        ({"filter": "mixed"}, [1, 2, 3, 4]),
        ({"filter": "off"}, [0, 1, 2, 3, 4, 5]),
        ({"filter": "band", "filter_low": 0.0, "filter_high": 0.375}, [0, 1, 2]),  # AceReason: at most 6 of 16
    ],
)
def test_which_groups_are_kept(options, kept):
    assert keep_mask(ACCURACY, replace(TrainConfig(), **options)).nonzero()[:, 0].tolist() == kept


def test_the_edges_of_a_band_survive_rounding():
    shares = torch.tensor([3.0, 7.0]) / 10
    assert keep_mask(shares, replace(TrainConfig(), filter="band")).all()
    counts = torch.arange(17.0) / 16
    band = replace(TrainConfig(), filter="band", filter_low=0.0, filter_high=0.375)
    assert keep_mask(counts, band).tolist() == [n <= 6 for n in range(17)]


def test_accuracy_decides_and_not_the_reward():
    shaped = graded([[0.0] + [0.95] * 7, [1.0] * 8], correct=[[False] + [True] * 7, [True] * 8])
    assert keep_mask(shaped.accuracy, replace(TrainConfig(), filter="mixed")).tolist() == [True, False]


def group(uid: int, right: int) -> Graded:
    return graded([[1.0] * right + [0.0] * (4 - right)], uids=[uid])


def fill(f: Filter, groups: list[Graded]) -> Graded | None:
    kept, stream, asked = f.start(), iter(groups), []
    while count := f.wanted(0 if kept is None else kept.groups):
        asked.append(count)
        kept = f.take(kept, Graded.concat([next(stream) for _ in range(count)]))
    f.asked = asked
    return f.finish(kept)


def uids(batch):
    return [p.uid for p in batch.problems]


def test_refill_surplus_and_carry():
    ctx = context("grpo", "--filter", "mixed", "--samples-per-prompt", "4")
    f = Filter(ctx)
    rights = [2, 4, 0, 4, 1, 3, 2, 1]  # one of the first four is kept: four more are drawn, all of which are kept
    batch = fill(f, [group(i, n) for i, n in enumerate(rights)])
    assert f.asked == [4, 4] and uids(batch) == [0, 4, 5, 6] and uids(f.carry) == [7]
    assert batch.rollout.group.tolist() == [g for g in range(4) for _ in range(4)]
    batch.rollout.validate()
    assert ctx.metrics["filter/keep_rate"] == 5 / 8 and ctx.metrics["filter/rounds"] == 2
    ctx.at.step += 1
    batch = fill(f, [group(10 + i, 2) for i in range(4)])
    assert uids(batch) == [7, 10, 11, 12] and uids(f.carry) == [13]
    ctx.at.step += 2  # the policy has moved on twice
    batch = fill(f, [group(20 + i, 2) for i in range(8)])
    assert uids(batch) == [20, 21, 22, 23]


def test_rounds_are_bounded_and_what_there_is_goes_on():
    notes = []
    ctx = context("grpo", "--filter", "mixed", "--filter-rounds", "3", "--samples-per-prompt", "4")
    ctx.note = notes.append
    batch = fill(Filter(ctx), [group(i, 2 if i == 5 else 0) for i in range(100)])
    assert uids(batch) == [5] and "after 3 rounds" in notes[0]
    assert fill(Filter(ctx), [group(i, 0) for i in range(100)]) is None


def test_without_a_filter_one_draw_is_the_batch():
    ctx = context("grpo", "--samples-per-prompt", "4")
    f = Filter(ctx)
    batch = fill(f, [group(i, 0) for i in range(4)])
    assert uids(batch) == [0, 1, 2, 3] and f.carry is None and "filter/keep_rate" not in ctx.metrics


def test_the_carry_buffer_survives_a_restart():
    ctx = context("grpo", "--filter", "mixed", "--samples-per-prompt", "2")
    prompts = ctx.draw(3)
    rollout = ctx.generate(prompts)
    whole = ctx.verify(rollout, prompts.problems)
    whole = replace(whole, reward=whole.reward + 0.5, extra={"behaviour_logp": rollout.logp * 2})
    f = Filter(ctx)
    f.carry, f.carry_step = whole, 4
    ctx.at.step = 5
    other = Filter(ctx)
    other.load_state_dict(f.state_dict())
    back = other.start()
    for name in ("ids", "role", "logp", "offsets", "group", "uid", "stop"):
        assert torch.equal(getattr(back.rollout, name), getattr(rollout, name)), name
    assert back.problems == list(prompts.problems) and back.texts == whole.texts and back.grades == whole.grades
    assert torch.equal(back.reward, whole.reward) and torch.equal(back.extra["behaviour_logp"], rollout.logp * 2)
    other.load_state_dict({})
    assert other.start() is None
    assert isinstance(prompts, Prompts)
