"""The stage: what is compared and counted, and that grading ahead changes nothing."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import pymathrl.context
from pymathrl.rollout import Engine
from pymathrl.tasks import Grade, Problem
from pymathrl.tasks.problem import Check
from pymathrl.train import main
from pymathrl.verify import Policy, Result, VerifierPool
from pymathrl.verify import stage as stage_module
from pymathrl.verify.pool import shared_pool
from pymathrl.verify.stage import Tally, ahead, grade, verify
from tests.algos.cases import context
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy

PROBLEMS = [Problem(0, "?", "0.5"), Problem(1, "?", "7")]


@dataclass
class Compared:
    """A task whose grader is equality; it counts what it is asked."""

    mode: str = "boxed"
    asked: list = field(default_factory=list)

    def check(self, problem):
        return Check((problem.answer,), self.mode, Policy())

    def grade_result(self, problem, response, result):
        self.asked.append((problem.uid, response))
        return Grade(result.score, result.correct, result.extracted, result.extracted, result.reason)


@dataclass
class Own:
    """A task that grades by itself."""

    asked: list = field(default_factory=list)

    def grade(self, problem, response):
        self.asked.append((problem.uid, response))
        return Grade(0.25, problem.answer == response, response, None, "own")


@pytest.fixture
def pool(monkeypatch):
    with VerifierPool(deadline_s=60) as pool:
        monkeypatch.setattr(stage_module, "shared_pool", lambda: pool)
        yield pool


def test_a_task_says_what_is_compared_and_equal_texts_are_graded_once(pool):
    task = Compared()
    problems = [PROBLEMS[0], PROBLEMS[0], PROBLEMS[0], PROBLEMS[1], PROBLEMS[1]]
    texts = ["\\boxed{\\frac12}", "\\boxed{7}", "\\boxed{\\frac12}", "\\boxed{7}", "7"]
    grades, tally = grade(problems, texts, task)
    assert [g.reward for g in grades] == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert [g.answer for g in grades] == ["\\frac12", "7", "\\frac12", "7", None]
    assert len(task.asked) == 4
    assert [r.score for r in tally.results] == [1.0, 0.0, 1.0, 1.0, 0.0] and len(tally.seconds) == 3
    assert grade(problems, texts, task) == (grades, Tally(tally.results, ()))


def test_other_tasks_grade_by_themselves(pool):
    task = Own()
    grades, tally = grade([PROBLEMS[0], PROBLEMS[1], PROBLEMS[1]], ["7", "7", "7"], task)
    assert [g.correct for g in grades] == [False, True, True]
    assert task.asked == [(0, "7"), (1, "7")] and tally == Tally() and tally.metrics() == {}
    assert ahead(PROBLEMS, 2, task, None) is None


def test_metrics_by_hand():
    results = [
        Result(0.0, None, "no answer", "extract"),
        Result(0.0, "I do not know", "words and a value", "kind"),
        Result(0.0, "2", "different values", "exact"),
        Result(1.0, "3", "equal", "exact"),
        Result(1.0, "x", "equal", "symbolic"),
        Result(1.0, "y", "agree to 40 digits at 5 points", "symbolic"),
        Result(1.0, "y", "agree to 40 digits at 5 points", "symbolic"),
        Result(0.0, "z", "timeout", "worker"),
    ]
    tally = Tally(tuple(results[:3]), (0.001,)) + Tally(tuple(results[3:]), (0.003, 0.002))
    assert tally.metrics() == pytest.approx({
        "verifier/no_answer": 1 / 8, "verifier/unparsed": 1 / 8, "verifier/timeout": 1, "verifier/accepted_symbolic": 1,
        "verifier/accepted_numeric": 2, "verifier/stage/exact": 2 / 8, "verifier/stage/extract": 1 / 8,
        "verifier/stage/kind": 1 / 8, "verifier/stage/symbolic": 3 / 8, "verifier/stage/worker": 1 / 8,
        "verifier/p50_ms": 2.0, "verifier/p99_ms": 2.98,
    })  # fmt: skip


def test_what_the_verifier_says_is_what_is_counted(pool):
    texts = ["\\boxed{\\sin^2 x+\\cos^2 x}", "\\boxed{\\tan(x/2)}", "\\boxed{none of it}"]
    problems = [Problem(i, "?", gold) for i, gold in enumerate(["1", "\\frac{\\sin x}{1+\\cos x}", "3"])]
    metrics = grade(problems, texts, Compared())[1].metrics()
    assert (metrics["verifier/accepted_symbolic"], metrics["verifier/accepted_numeric"]) == (1, 1)
    assert metrics["verifier/unparsed"] == pytest.approx(1 / 3)


def test_branch_rows_get_what_their_response_gets(pool):
    policy = tiny_policy()
    rollout = Engine(policy).generate([policy.tokenizer.encode("7")] * 2, 3, 8)
    verdicts = verify(rollout, PROBLEMS, Compared("last_number"), policy.tokenizer)
    assert verdicts.reward.shape == verdicts.correct.shape == (6,)
    assert verdicts.texts == policy.tokenizer.decode_batch([rollout.response(r).tolist() for r in range(6)])
    assert verdicts.correct.tolist() == [g.correct for g in verdicts.grades]


def test_a_response_is_graded_when_it_ends_and_the_stage_finds_the_verdict(pool, monkeypatch):
    policy, task = tiny_policy(seed=5), Compared("last_number")
    prompts = [policy.tokenizer.encode("7")] * 2

    def run(on_finished):
        rollout = Engine(policy, max_batch=4).generate(prompts, 8, 24, on_finished=on_finished)
        before = list(task.asked), len(pool.take_latencies())
        return rollout, before, verify(rollout, PROBLEMS, task, policy.tokenizer)

    rollout, (asked, decided), early = run(ahead(PROBLEMS, 8, task, policy.tokenizer))
    answers = {(g, a.answer) for g, a in zip(rollout.group.tolist(), early.grades, strict=True) if a.answer is not None}
    assert not asked and decided == len(answers) > 4  # all were decided in the rollout
    assert early.tally.seconds == ()
    with VerifierPool() as other:
        monkeypatch.setattr(stage_module, "shared_pool", lambda: other)
        plain, _, late = run(None)
    assert torch.equal(plain.ids, rollout.ids)
    assert torch.equal(early.reward, late.reward) and early.grades == late.grades and early.texts == late.texts
    assert early.tally.results == late.tally.results and len(late.tally.seconds) == decided


def test_the_hooks_generate_with_it_where_the_task_compares(monkeypatch):
    ctx = context("grpo")
    seen = []
    monkeypatch.setattr(ctx.learner.engine, "generate", lambda *args, **options: seen.append(options["on_finished"]))
    prompts = ctx.draw(2)
    ctx.generate(prompts)
    ctx.task = SimpleNamespace(check=None)
    ctx.generate(prompts)
    mine = lambda rows, ids: None
    ctx.generate(prompts, on_finished=mine)
    assert seen[0] is None and callable(seen[1]) and seen[2] is mine


def test_a_run_is_the_same_with_and_without_and_logs_what_the_verifier_did(tmp_path, monkeypatch, capsys):
    model = save_tiny(tmp_path / "model")
    rows = [{"question": f"{a}+{a}", "answer": str(2 * a)} for a in range(1, 40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--algo", "grpo", "--model", str(model), "--task", str(tmp_path / "sums.jsonl"), "--task-answer",
            "tag", *SMALL_RUN, "--max-new-tokens", "48", "--steps", "2", "--eval-every", "0", "--checkpoint-every",
            "0"]  # fmt: skip
    runs = []
    for name, streaming in (("with", True), ("without", False)):
        if not streaming:
            monkeypatch.setattr(pymathrl.context, "ahead", lambda *args: None)
        assert main([*argv, "--out", str(tmp_path / name)]) == 0
        steps = [m for m in read_metrics(tmp_path / name) if "reward" in m]
        assert len(steps) == 2
        runs.append([{k: v for k, v in m.items() if "time" not in k and "_ms" not in k and "second" not in k}
                     for m in steps])  # fmt: skip
    assert runs[0] == runs[1]
    for metrics in runs[0]:
        shares = [v for k, v in metrics.items() if k.startswith("verifier/stage/")]
        assert sum(shares) == pytest.approx(1) and 0 <= metrics["verifier/no_answer"] < 1
    capsys.readouterr()


def test_there_is_one_pool_in_a_process():
    assert shared_pool() is shared_pool()
