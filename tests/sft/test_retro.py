"""Retro-Search: where thoughts begin, what a try is worth, and that revising right traces keeps what it promises."""

import pytest
import torch

from pymathrl.errors import UserError
from pymathrl.models import load
from pymathrl.prompt import draw
from pymathrl.rollout import Draws, Engine
from pymathrl.sft.retro import Attempt, Retro, banned_ids, revise, tokens_before
from pymathrl.tasks import load_task
from pymathrl.verify.stage import verify
from tests.tiny import tiny_policy


def test_thoughts_begin_at_switch_words():
    text = "Wait. I add.\n\nWait, no.\n\nAwaiting alternatively more waits\n\nbut wait"
    starts = Retro().starts(text)
    assert [text[s : s + 4] for s in starts] == ["Wait", "alte", "wait"], "not at the beginning, not inside a word"
    assert Retro((",", "="), "=").starts("1+1=2,2=2") == [3, 5, 7]


def test_value_by_hand():
    retro = Retro(discount=0.9)
    text = "a\n\nb\n\n\n\nc"  # an empty step is none
    assert retro.value(text, True) == pytest.approx(0.9**3) and retro.value(text, False) == 0.0
    assert retro.value("x\n\n" * 7, True) > retro.value("x\n\n" * 12, True) > retro.value("x", False)


def test_every_spelling_is_banned_by_its_first_token():
    policy = tiny_policy()
    ids = dict(zip("=,<", policy.tokenizer.encode("=,") + policy.tokenizer.encode("<think>"), strict=True))
    assert banned_ids(policy, Retro((",", "="), "\n")) == sorted([ids["="], ids[","]])
    assert banned_ids(policy, Retro(("<think>x"[:7],), "\n")) == [ids["<"]]
    with pytest.raises(UserError, match="cannot encode"):
        banned_ids(policy, Retro())  # words that the small tokenizer cannot spell
    text = policy.tokenizer.encode("12<think>3")
    assert [tokens_before(policy.tokenizer, text, n) for n in (0, 2, 3, 8, 9, 10, 99)] == [0, 2, 2, 2, 3, 4, 4]


@pytest.fixture(scope="module")
def revised():
    """Right answers of the built-in model before and after, with "+" as the switch word and between steps: a try writes
    its first step without a sum, and is taken if the solution is right and has fewer sums."""
    policy, task = load("builtin:tiny"), load_task("countdown", nmax=3)
    engine, draws = Engine(policy), Draws(8, 64)
    prompts = draw(policy, task, cursor=0, count=48, seed=0, max_tokens=64)
    rollout = engine.generate(prompts.ids, 8, 64, uids=draws.uids(prompts.problems))
    correct = verify(rollout, prompts.problems, task, policy.tokenizer).correct.tolist()
    rows = [i for i in range(rollout.rows) if correct[i]]

    def attempts(chosen):
        return [
            Attempt(prompts.problems[i // 8], list(prompts.ids[i // 8]), rollout.response(i).tolist(), i % 8)
            for i in chosen
        ]

    before, after, alone = attempts(rows), attempts(rows), attempts(rows[:1])
    retro = Retro(("+",), "+")
    revise(engine, task, after, retro, draws)
    revise(engine, task, alone, retro, draws)
    return policy, task, retro, before, after, alone


def test_a_revised_trace_is_right_and_takes_fewer_steps(revised):
    policy, task, retro, before, after, _ = revised
    decode, eos = policy.tokenizer.decode, policy.eos_ids
    assert len(before) > 50 and 0 < sum(a.replaced > 0 for a in after) < len(after)
    for old, new in zip(before, after, strict=True):
        text = decode(new.ids)
        assert task.grade(new.problem, text).correct and new.ids[-1] in eos and len(new.ids) <= 64
        if not new.replaced:
            assert new.ids == old.ids
        else:
            assert retro.value(text, True) > retro.value(decode(old.ids), True)


def test_a_try_keeps_what_comes_before_its_thought(revised):
    policy, _, retro, before, after, _ = revised
    decode = policy.tokenizer.decode
    for old, new in zip(before, after, strict=True):
        if new.replaced:
            starts = retro.starts(decode(old.ids))
            assert any(decode(new.ids).startswith(decode(old.ids)[:s]) for s in starts)
            same = next(i for i, (a, b) in enumerate(zip(old.ids, new.ids, strict=False)) if a != b)
            assert decode(old.ids[same : same + 1]) == "+" != decode(new.ids[same : same + 1])


def test_a_trace_does_not_depend_on_the_others(revised):
    *_, after, alone = revised
    assert alone[0].ids == after[0].ids and torch.equal(torch.tensor(alone[0].ids), torch.tensor(after[0].ids))
