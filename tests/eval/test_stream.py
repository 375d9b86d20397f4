"""Responses as they end are those of one whole generation, to the bit, whatever the order and the batch."""

import pytest
import torch

from pymathrl.batch import STOP_STRING
from pymathrl.errors import UserError
from pymathrl.eval.record import grade_all, record
from pymathrl.eval.sample import encode_all
from pymathrl.eval.stream import stream
from pymathrl.rollout import Draws, Engine
from pymathrl.tasks import Grade, Problem, load_task
from pymathrl.tasks.problem import Check
from pymathrl.verify import Policy
from tests.eval.cases import PlainTask
from tests.tiny import tiny_policy

DRAWS = Draws(samples=5, max_new_tokens=40, temperature=0.9, top_k=0, top_p=0.95, min_p=0.0, seed=7)
FIELDS = ("ids", "logp", "entropy")


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture(scope="module")
def prompts(policy):
    task = load_task("countdown")
    return encode_all(policy, task, task.test(6), 64)


def collect(engine, prompts, draws=DRAWS, todo=range(6), **options):
    found, tokens = {}, []
    for ended in stream(engine, prompts, draws, todo, **options):
        tokens.append(ended.tokens)
        for i, row in enumerate(ended.rows):
            a, b = ended.rollout.offsets[i : i + 2].tolist()
            assert row not in found
            found[row] = [getattr(ended.rollout, name)[a:b] for name in FIELDS] + [ended.rollout.stop[i]]
    return found, tokens


@pytest.mark.parametrize("rows", [3, 7, 512])
def test_the_tokens_are_those_of_generate(policy, prompts, rows):
    engine = Engine(policy, seed=1, max_batch=rows)
    whole = engine.generate(
        prompts.ids, 5, 40, seed=7, uids=DRAWS.uids(prompts.problems), **DRAWS.sampling
    )  # fmt: skip
    found, tokens = collect(engine, prompts)
    assert len(found) == 30 and tokens == sorted(tokens)
    assert tokens[-1] == int(whole.response_lengths.sum())
    for (problem, number), values in found.items():
        row = problem * 5 + number
        a, b = whole.offsets[row : row + 2].tolist()
        want = [getattr(whole, name)[a:b] for name in FIELDS] + [whole.stop[row]]
        assert all(torch.equal(x, y) for x, y in zip(values, want, strict=True))
    assert engine.pages_in_use == 0
    some, _ = collect(engine, prompts, todo=[4, 1])
    assert sorted(some) == [(p, s) for p in (1, 4) for s in range(5)]
    assert all(torch.equal(x, y) for row, values in some.items() for x, y in zip(values, found[row], strict=True))


def test_stop_strings_end_a_response(policy, prompts):
    text = policy.tokenizer.decode(next(iter(collect(Engine(policy), prompts)[0].values()))[0][-12:].tolist())
    found, _ = collect(Engine(policy), prompts, stop_strings=[text[0]])
    ends = [values[-1] for values in found.values()]
    assert ends.count(STOP_STRING) > 5
    for ids, _, _, stop in found.values():
        if stop == STOP_STRING:
            assert text[0] in policy.tokenizer.decode(ids[-1:].tolist())


def test_closing_frees_the_sequences(policy, prompts):
    engine = Engine(policy, max_batch=4)
    responses = stream(engine, prompts, DRAWS, range(6))
    next(responses)
    assert engine.pages_in_use > 0
    responses.close()
    assert engine.pages_in_use == 0
    assert list(stream(engine, prompts, DRAWS, [])) == []


def test_too_long_for_the_model_is_said_before_anything_is_drawn(policy, prompts):
    with pytest.raises(UserError, match="256 positions; lower --max-prompt-tokens or --max-new-tokens"):
        next(stream(Engine(policy), prompts, Draws(1, 250), range(6)))


# --- records ----------------------------------------------------------------------------------------------------------


def test_records_of_a_rollout(policy, prompts):
    engine = Engine(policy)
    whole = engine.generate(prompts.ids, 5, 40, seed=7, uids=DRAWS.uids(prompts.problems), **DRAWS.sampling)

    class Starts(PlainTask):
        """Right where the response is long enough to hold seven tokens' text."""

        @staticmethod
        def grade(problem, text):
            right = len(policy.tokenizer.encode(text)) >= 7
            return Grade(float(right), right, text, text, "correct" if right else "short")

    problems = [p for p in prompts.problems for _ in range(5)]
    ids = [i for i in prompts.ids for _ in range(5)]
    samples = record(whole, problems, ids, [0, 1, 2, 3, 4] * 6, Starts(), policy.tokenizer, [5, 40])()
    lengths = whole.response_lengths.tolist()
    assert [s.n_tokens for s in samples] == lengths
    assert [(s.id, s.sample) for s in samples[:6]] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    for row, s in enumerate(samples):
        a, b = whole.offsets[row : row + 2].tolist()
        begin = b - s.n_tokens
        assert s.logp == pytest.approx(float(whole.logp[begin:b].double().sum())) and a < begin
        assert s.entropy[0] == float(whole.entropy[begin]), "the first token is a stretch of its own"
        assert s.cut == (s.finish_reason == "length") and not (s.cut and s.verdict)
        assert s.within == [False, s.within[1]], "five tokens are too short"
        assert s.verdict == (s.within[1] and not s.cut)
        assert s.flexible is None and s.stage == "task"
    assert len({s.prompt_hash for s in samples}) == 6
    assert any(s.cut for s in samples) and any(s.verdict for s in samples)


class Comparing(PlainTask):
    @staticmethod
    def check(problem):
        return Check((problem.answer,), "boxed", Policy())

    @staticmethod
    def grade_result(problem, response, result):
        return Grade(result.score, result.correct, result.extracted, result.extracted, result.reason)


def test_answers_are_compared_and_the_last_number_counts_where_there_is_none():
    problem = Problem(0, "q", "\\frac{1}{2}")
    texts = ["\\boxed{0.5}", "it is 0.5", "\\boxed{3} or 0.5", "no number", "\\boxed{0.5}"]
    graded = grade_all(Comparing(), [(problem, text) for text in texts])()
    assert [g.grade.correct for g in graded] == [True, False, False, False, True]
    assert [g.flexible for g in graded] == [True, True, False, False, True]
    assert graded[0] is graded[4], "equal responses are graded once"
    assert all(g.latency_s >= 0 for g in graded) and graded[0].stage != "task"
