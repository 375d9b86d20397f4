"""The eval command: exact numbers on a policy that is known, a file's every row, and clear refusals."""

import json

import pytest

from pymathrl import eval as eval_module
from pymathrl.eval import evaluate, main, sample_uids
from pymathrl.rollout import Engine
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
    prompts = [policy.tokenizer.encode(task.prompt(p, "compact")) for p in problems]
    training = Engine(policy).generate(prompts, 3, 10, uids=sample_uids(problems, 3))
    drawn = [policy.tokenizer.decode(training.response(r).tolist()) for r in range(15)]
    assert drawn != [t for row in a.texts for t in row]


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
