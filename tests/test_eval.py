"""The eval command: exact numbers on a policy that is known, a file's every row, and clear refusals."""

import json

import pytest
import torch

from pymathrl import eval as eval_module
from pymathrl.errors import UserError
from pymathrl.eval import evaluate, main
from pymathrl.rollout import Engine
from pymathrl.rollout.draws import sample_uids
from pymathrl.tasks import Grade, load_task
from tests.tiny import save_tiny, tiny_policy


def test_json_holds_metrics_and_every_response(tmp_path, capsys):
    model, file, out = save_tiny(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "sub" / "eval.json"
    file.write_text("".join(json.dumps({"nums": [i, 2, 3], "target": i + 5}) + "\n" for i in range(1, 6)))
    argv = ["--model", str(model), "--task", str(file), "--n", "4", "--k", "1,2,64", "--max-new-tokens", "8"]
    assert main([*argv, "--json", str(out), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "5 problems x 4 responses" in text and "pass@2" in text and "pass@64" not in text
    record = json.loads(out.read_text())
    assert len(record["problems"]) == 5 and all(len(p["responses"]) == 4 for p in record["problems"])
    assert {"pass@1", "pass@2", "diversity", "completions/mean_length"} <= record["metrics"].keys()
    assert main([*argv, "--json", str(tmp_path / "again.json"), "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["problems"] == record["problems"], "the same seed gives the same samples"
    capsys.readouterr()
    assert main([*argv, "--split", "held-out", "--device", "cpu"]) == 0
    assert "5 problems" not in capsys.readouterr().out


def test_pass_at_k_counts_correct_answers_not_rewards(monkeypatch):
    policy, task = tiny_policy(), load_task("countdown")
    problems = task.test(3)
    verdicts = iter([True, False, False, False] * 2 + [False] * 4)

    class Fake:
        name = "fake"
        prompt = staticmethod(task.prompt)

        @staticmethod
        def grade(problem, text):
            return Grade(0.1, next(verdicts), text, text, "test")

    # equal texts would be graded once; distinct texts make the sequence of verdicts exact
    numbers = iter(range(1000))
    monkeypatch.setattr(policy.tokenizer, "decode_batch", lambda rows: [str(next(numbers)) for _ in rows])
    result = evaluate(Engine(policy), Fake(), problems, samples=4, ks=(1, 4), max_new_tokens=4, max_prompt_tokens=64)
    assert result.metrics["pass@1"] == pytest.approx((0.25 + 0.25 + 0) / 3)
    assert result.metrics["pass@4"] == pytest.approx(2 / 3)
    assert result.metrics["coverage"] == pytest.approx(2 / 3)


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


def test_options_of_the_task_reach_it(tmp_path, capsys, monkeypatch):
    model, file, out = save_tiny(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "eval.json"
    file.write_text("".join(json.dumps({"question": f"{i} + 0?", "answer": str(i)}) + "\n" for i in range(3)))
    argv = ["--model", str(model), "--n", "2", "--k", "1", "--max-new-tokens", "4", "--device", "cpu"]
    seen = []
    real = eval_module.load_task
    monkeypatch.setattr(eval_module, "load_task", lambda *a, **k: seen.append(k) or real(*a, **k))
    assert main([*argv, "--task", str(file), "--task-answer", "last", "--json", str(out), "--dtype", "fp32"]) == 0
    assert main([*argv, "--problems", "2", "--task-nmax", "3"]) == 0
    assert seen == [{"answer": "last", "split": "all"}, {"nmax": 3}]
    settings = json.loads(out.read_text())["settings"]
    assert (settings["task_answer"], settings["task_format_score"], settings["dtype"]) == ("last", 0.0, "fp32")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--task", str(file), "--help"])
    text = capsys.readouterr().out
    assert "--task-answer" in text and "--task-nmax" not in text and "--task-split" not in text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much\nof it"), OSError(5, "Input/output error")])
def test_what_the_machine_refuses_is_one_sentence(error, tmp_path, capsys, monkeypatch):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(eval_module, "load", refuse)
    assert main(["--model", str(tmp_path), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {type(error).__name__}: ") and err.count("\n") == 1


def test_long_prompts_are_left_out_and_counted(capsys):
    policy, task = tiny_policy(), load_task("countdown")
    problems = task.test(8)
    lengths = sorted(len(policy.tokenizer.encode(task.prompt(p, "compact"))) for p in problems)
    limit = lengths[3]
    kept = sum(n <= limit for n in lengths)
    result = evaluate(Engine(policy), task, problems, samples=1, ks=(1,), max_new_tokens=4, max_prompt_tokens=limit)
    assert len(result.problems) == len(result.grades) == kept and result.too_long == 8 - kept


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--model"]),
        (["--model", "/nowhere/x"], ["/nowhere/x"]),
        (["--model", "MODEL", "--k", "one"], ["--k", "'one'"]),
        (["--model", "MODEL", "--n", "0"], ["--n", "at least 1"]),
        (["--model", "MODEL", "--n", "4", "--k", "8"], ["--k", "at most --n 4"]),
        (["--model", "MODEL", "--top-p", "0"], ["--top-p"]),
        (["--model", "MODEL", "--task", "nope"], ["nope", "countdown"]),
        (["--model", "MODEL", "--nn", "4"], ["--nn"]),
        (["--model", "MODEL", "--temperature", "inf"], ["--temperature"]),
        (["--model", "MODEL", "--split", "all"], ["--split", "countdown"]),
        (["--model", "MODEL", "--task-nmax", "many"], ["nmax", "'many'"]),
        (["--model", "MODEL", "--task-answer", "last"], ["--task-answer"]),
        (["--model", "MODEL", "--device", "cpu", "--dtype", "bf16"], ["--dtype bf16", "CPU"]),
        (["--model", "MODEL", "--dtype", "fp8"], ["--dtype", "fp8"]),
        (["--model", "MODEL", "--n", "70000", "--k", "1"], ["65536"]),
    ],
)
def test_wrong_input_is_one_sentence(argv, words, capsys, tmp_path):
    model = save_tiny(tmp_path / "model")
    assert main([str(model) if a == "MODEL" else a for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err, err


def test_eval_seed_is_mixed_with_its_own_constant():
    assert eval_module.EVAL_STREAM > 2**32, "small seeds of training must not meet it"
