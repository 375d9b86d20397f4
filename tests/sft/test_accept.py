"""Which responses become rows: each rule alone, and the choice among the responses to one problem."""

import pytest

from pymathrl.sft.accept import Rules, Trace, choose, reject, repetition

GOOD = Trace("a", tuple(range(20)), correct=True, ended=True)


def trace(**changes) -> Trace:
    return Trace(**{**vars(GOOD), **changes})


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4], 2) == 0.0
    assert repetition([1, 2, 1, 2, 1], 2) == 0.5  # 12 21 12 21: two of four occurred before
    assert repetition([7] * 10, 3) == 1 - 1 / 8
    assert repetition([1, 1], 3) == 0.0, "no n-gram at all"


@pytest.mark.parametrize(
    ("case", "rules", "greedy", "why"),
    [
        (GOOD, Rules(), True, None),
        (trace(correct=False), Rules(), False, "wrong"),
        (trace(ended=False), Rules(), False, "cut off"),
        (GOOD, Rules(min_tokens=20, max_tokens=20), False, None),
        (GOOD, Rules(min_tokens=21), False, "too short"),
        (GOOD, Rules(max_tokens=19), False, "too long"),
        (trace(ids=(7,) * 20), Rules(), False, "repetitive"),
        (trace(ids=(7,) * 20), Rules(max_repetition=1.0), False, None),
        # START: correct(hint) and not correct(greedy), all four cases
        (GOOD, Rules(accept="beyond-greedy"), False, None),
        (GOOD, Rules(accept="beyond-greedy"), True, "greedy is right too"),
        (trace(correct=False), Rules(accept="beyond-greedy"), False, "wrong"),
        (trace(correct=False), Rules(accept="beyond-greedy"), True, "wrong"),
    ],
)
def test_each_rule_alone(case, rules, greedy, why):
    assert reject(case, rules, greedy) == why


def test_equal_texts_count_once_and_the_first_ones_are_kept():
    texts = ["a", "b", "a", "c", "d", "e"]
    traces = [trace(text=t, correct=t != "b") for t in texts]
    kept, reasons = choose(traces, Rules(per_problem=2))
    assert kept == [0, 3]
    assert reasons == {"wrong": 1, "duplicate": 1, "over the cap": 2}
    kept, reasons = choose(traces, Rules(accept="beyond-greedy"), greedy_correct=True)
    assert kept == [] and reasons == {"greedy is right too": 5, "wrong": 1}
