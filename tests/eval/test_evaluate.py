"""What a training loop evaluates with: exact numbers on a policy that is known, and clear refusals."""

import pytest

from pymathrl.errors import UserError
from pymathrl.eval import evaluate, sample
from pymathrl.rollout import Engine
from pymathrl.rollout.draws import sample_uids
from pymathrl.tasks import Grade, load_task
from tests.eval.cases import PlainTask
from tests.tiny import tiny_policy


class FakeTask(PlainTask):
    """Grades by a list of verdicts, in the order of the responses."""

    def __init__(self, verdicts):
        self.verdicts = iter(verdicts)
        self.prompt = load_task("countdown").prompt

    def grade(self, problem, text):
        return Grade(0.1, next(self.verdicts), text, text, "test")


def number_texts(policy, monkeypatch):
    """Equal texts would be graded once; distinct texts make the sequence of verdicts exact."""
    numbers = iter(range(1000))
    monkeypatch.setattr(policy.tokenizer, "decode_batch", lambda rows: [str(next(numbers)) for _ in rows])


def test_pass_at_k_counts_correct_answers_not_rewards(monkeypatch):
    policy, problems = tiny_policy(), load_task("countdown").test(3)
    number_texts(policy, monkeypatch)
    task = FakeTask([True, False, False, False] * 2 + [False] * 4)
    result = evaluate(Engine(policy), task, problems, samples=4, ks=(1, 4), max_new_tokens=200, max_prompt_tokens=64)
    assert {stop for row in result.stops for stop in row} == {"eos"}
    assert result.metrics["pass@1"] == pytest.approx((0.25 + 0.25 + 0) / 3)
    assert result.metrics["pass@4"] == pytest.approx(2 / 3)
    assert result.metrics["coverage"] == pytest.approx(2 / 3)


def test_a_response_that_was_cut_off_is_wrong(monkeypatch):
    policy, problems = tiny_policy(), load_task("countdown").test(8)
    number_texts(policy, monkeypatch)
    task = FakeTask([True] * 32)
    result = evaluate(Engine(policy), task, problems, samples=4, ks=(1,), max_new_tokens=20, max_prompt_tokens=64)
    stops = [stop for row in result.stops for stop in row]
    assert 0 < stops.count("length") < 32
    assert result.metrics["pass@1"] == stops.count("eos") / 32 == 1 - result.metrics["completions/clipped_ratio"]
    cut = next(g for row, ends in zip(result.grades, result.stops, strict=True)
               for g, stop in zip(row, ends, strict=True) if stop == "length")  # fmt: skip
    assert cut == Grade(0.1, False, cut.answer, cut.canonical, "cut off: test"), "the reward is the task's own affair"


def test_samples_do_not_depend_on_the_batch_or_repeat_the_training_draws():
    policy, task = tiny_policy(), load_task("countdown")
    problems = task.test(5)
    options = dict(samples=3, ks=(1,), max_new_tokens=10, max_prompt_tokens=64)
    a = evaluate(Engine(policy), task, problems, **options)
    b = evaluate(Engine(policy, seed=5, max_batch=4), task, problems, **options)
    assert a.texts == b.texts, "nor on the engine's own seed"
    assert (a.grades, a.stops, a.lengths, a.metrics, a.tokens) == (b.grades, b.stops, b.lengths, b.metrics, b.tokens)
    # each problem by itself, as its own call
    alone = [evaluate(Engine(policy), task, [p], **options).texts[0] for p in problems]
    assert alone == a.texts
    prompts = [policy.tokenizer.encode(task.prompt(p, "compact")) for p in problems]
    training = Engine(policy).generate(prompts, 3, 10, uids=sample_uids(problems, 3))
    drawn = [policy.tokenizer.decode(training.response(r).tolist()) for r in range(15)]
    assert drawn != [t for row in a.texts for t in row]


def test_rows_stay_busy_and_progress_is_in_problems(monkeypatch):
    """One call for all prompts: a row that ends early is filled from any of them."""
    policy, task, calls, seen = tiny_policy(), load_task("countdown"), [], []
    real = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *a, **k: calls.append(len(a[1])) or real(*a, **k))
    options = dict(samples=3, ks=(1,), max_new_tokens=10, max_prompt_tokens=64)
    result = evaluate(Engine(policy, max_batch=4), task, task.test(5), on_progress=lambda *x: seen.append(x), **options)
    assert calls == [5] and len(result.grades) == 5
    assert all(total == 5 for _, total in seen) and seen == sorted(seen) and seen[-1] == (5, 5)
    assert seen.count((5, 5)) == 1, "the line that it prints is ended once"


def test_no_problem_has_a_message_of_its_own():
    policy, task = tiny_policy(), load_task("countdown")
    with pytest.raises(UserError, match="no problem to evaluate: the task countdown holds out none"):
        evaluate(Engine(policy), task, [], samples=1, ks=(1,), max_new_tokens=4, max_prompt_tokens=64)
    with pytest.raises(UserError, match="all 2 prompts of the task countdown exceed 1 tokens"):
        evaluate(Engine(policy), task, task.test(2), samples=1, ks=(1,), max_new_tokens=4, max_prompt_tokens=1)


def test_long_prompts_are_left_out_and_counted(capsys):
    policy, task = tiny_policy(), load_task("countdown")
    problems = task.test(8)
    lengths = sorted(len(policy.tokenizer.encode(task.prompt(p, "compact"))) for p in problems)
    limit = lengths[3]
    kept = sum(n <= limit for n in lengths)
    result = evaluate(Engine(policy), task, problems, samples=1, ks=(1,), max_new_tokens=4, max_prompt_tokens=limit)
    assert len(result.problems) == len(result.grades) == kept and result.too_long == 8 - kept


def test_eval_seed_is_mixed_with_its_own_constant():
    assert sample.EVAL_STREAM > 2**32, "small seeds of training must not meet it"
