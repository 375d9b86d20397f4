"""The command: what it prints and writes, what it refuses, and that it goes on where it was stopped."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pymathrl.eval import command, evaluate
from pymathrl.eval.command import main
from pymathrl.rollout import Engine
from pymathrl.tasks import load_task
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
    assert f"every row of {file} is graded" in capsys.readouterr().err
    assert main([*argv, "--split", "held-out", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "5 problems" not in printed.out and "every row" not in printed.err


def test_options_of_the_task_reach_it(tmp_path, capsys, monkeypatch):
    model, file, out = save_tiny(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "eval.json"
    file.write_text("".join(json.dumps({"question": f"{i} + 0?", "answer": str(i)}) + "\n" for i in range(3)))
    argv = ["--model", str(model), "--n", "2", "--k", "1", "--max-new-tokens", "4", "--device", "cpu"]
    seen = []
    real = command.load_task
    monkeypatch.setattr(command, "load_task", lambda *a, **k: seen.append(k) or real(*a, **k))
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

    monkeypatch.setattr(command, "load", refuse)
    assert main(["--model", str(tmp_path), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {type(error).__name__}: ") and err.count("\n") == 1


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


# --- several models and tasks -----------------------------------------------------------------------------------------


def test_models_and_tasks_in_one_table(tmp_path, capsys):
    models = [str(save_tiny(tmp_path / "a" / "step-1")), str(save_tiny(tmp_path / "b" / "step-1", seed=1))]
    file, out, record = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "record.json"
    file.write_text("".join(json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(3)))
    argv = ["--model", ",".join(models), "--task", "arithmetic", "--task", str(file), "--problems", "4", "--n", "2"]
    argv += ["--k", "1,2", "--max-new-tokens", "8", "--device", "cpu", "--task-answer", "tag", "--task-terms-max", "2"]
    assert main([*argv, "--out", str(out), "--json", str(record)]) == 0
    printed = capsys.readouterr()
    assert "a/step-1" in printed.out and "b/step-1 - a/step-1" in printed.out
    assert "rows.jsonl holds 3 problems, fewer than the 4" in printed.err and "3/3 problems" in printed.err
    summary = json.loads((out / "summary.json").read_text())
    assert [(e["model"], e["task"]) for e in summary["evaluations"]] == [
        (m, t) for m in models for t in ("arithmetic", str(file))
    ]
    assert len(summary["comparisons"]) == 2 and summary["evaluations"][1]["metrics"]["flexible/pass@1"] >= 0
    assert summary["settings"]["task_terms_max"] == 2
    table = (out / "table.md").read_text()
    assert "| task |  | a/step-1 | b/step-1 |" in table and "McNemar" not in table and "flexible" in table
    assert (out / "plots.png").read_bytes().startswith(b"\x89PNG")
    everything = json.loads(record.read_text())["evaluations"]
    assert [len(e["problems"]) for e in everything] == [4, 3, 4, 3]
    for evaluation, path in zip(summary["evaluations"], sorted((out / "samples").iterdir()), strict=False):
        row = json.loads(path.read_text().splitlines()[0])
        assert {"set", "id", "seed", "sample", "prompt_hash", "response", "finish_reason", "n_tokens", "extracted",
                "verdict", "stage", "latency_s"} <= row.keys(), evaluation["task"]  # fmt: skip


def test_the_samples_are_those_of_the_training_loops_evaluation(tmp_path):
    model, record = save_tiny(tmp_path / "model"), tmp_path / "record.json"
    argv = ["--model", str(model), "--problems", "5", "--n", "3", "--k", "1,3", "--max-new-tokens", "24"]
    assert main([*argv, "--rows", "4", "--device", "cpu", "--json", str(record)]) == 0
    got = json.loads(record.read_text())
    task = load_task("countdown")
    want = evaluate(Engine(tiny_policy()), task, task.test(5), samples=3, ks=(1, 3), max_new_tokens=24,
                    max_prompt_tokens=1024)  # fmt: skip
    assert [[r["text"] for r in p["responses"]] for p in got["problems"]] == want.texts
    assert {name: got["metrics"][name] for name in want.metrics} == pytest.approx(want.metrics, nan_ok=True)
    assert got["tokens"] == want.tokens


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(command, "draw", lambda summaries: b"")


RUN = ["--problems", "12", "--n", "4", "--k", "1,4", "--max-new-tokens", "48", "--rows", "8", "--device", "cpu",
       "--threads", "1"]  # fmt: skip


def content(out):
    """All that an evaluation wrote, but for times."""
    summary = json.loads((out / "summary.json").read_text())
    for evaluation in summary["evaluations"]:
        for name in ("verifier/p50_ms", "verifier/p99_ms"):
            del evaluation["metrics"][name]
    rows = {}
    for path in (out / "samples").iterdir():
        rows[path.name] = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[path.name]:
            del row["latency_s"]
    table = [line for line in (out / "table.md").read_text().splitlines() if "time of a verdict" not in line]
    return summary, rows, table


@pytest.mark.usefixtures("no_picture")
def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    model, whole, parts = save_tiny(tmp_path / "model"), tmp_path / "whole", tmp_path / "parts"
    argv = ["--model", str(model), *RUN]
    assert main([*argv, "--out", str(whole)]) == 0
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *argv, "--out", str(parts)], env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in (parts / "samples").glob("*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "it never wrote a sample"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (parts / "summary.json").exists()
    (path,) = (parts / "samples").iterdir()
    there = {json.loads(line)["id"] for line in path.read_text().splitlines()}
    assert 0 < len(there) < 12
    path.write_text(path.read_text() + '{"set": "countdo')  # and a line that was half written
    asked = spy_on_stream(monkeypatch)
    capsys.readouterr()
    assert main([*argv, "--out", str(parts)]) == 0
    assert f"{len(there)} of 12 problems are there already" in capsys.readouterr().err
    assert asked == [[at for at in range(12) if at not in there]], "nothing is drawn twice"
    assert content(parts) == content(whole)
    assert main([*argv, "--out", str(parts)]) == 0, "with all there, it only writes the tables"
    assert len(asked) == 1 and content(parts) == content(whole)


# The command, with a pause at each look so that it can be killed in the middle.
SLOW = """
import sys, time
from pymathrl.eval import command
real = command.Progress.update
command.Progress.update = lambda *a: (real(*a), time.sleep(0.3))
sys.exit(command.main(sys.argv[1:]))
"""


def spy_on_stream(monkeypatch):
    asked, real = [], command.stream

    def spy(engine, prompts, draws, todo, *more):
        asked.append(list(todo))
        return real(engine, prompts, draws, todo, *more)

    monkeypatch.setattr(command, "stream", spy)
    return asked


@pytest.mark.usefixtures("no_picture")
def test_ctrl_c_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "out"
    argv = ["--model", str(model), *RUN, "--out", str(out)]
    seen = []

    def interrupt(self, responses, tokens):
        seen.append(responses)
        if sum(seen) > 24:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command.Progress, "update", interrupt)
        assert main(argv) == 130
    assert "goes on from here" in capsys.readouterr().err
    asked = spy_on_stream(monkeypatch)
    assert main(argv) == 0 and 0 < len(asked[0]) < 12


@pytest.mark.usefixtures("no_picture")
def test_other_settings_are_refused(tmp_path, capsys):
    model, other = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    base = ["--model", str(model), "--problems", "2", "--n", "2", "--k", "1", "--device", "cpu", "--out", str(out)]
    assert main([*base, "--max-new-tokens", "4"]) == 0
    for more, words in (
        (["--seed", "1", "--max-new-tokens", "4"], ["seed = 0", "now it is 1"]),
        (["--temperature", "0.5", "--max-new-tokens", "4"], ["temperature = 1.0"]),
        (["--max-new-tokens", "5"], ["max_new_tokens = 4"]),
        (["--max-new-tokens", "4", "--task-nmax", "3"], ["options", "'nmax': 4"]),
        (["--max-new-tokens", "4", "--problems", "3"], ["problems = 2"]),
    ):
        capsys.readouterr()
        assert main([*base, *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: --out") and all(word in err for word in words), err
    (model / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert main([*base, "--max-new-tokens", "4"]) == 2 and "weights" in capsys.readouterr().err
    # what does not change a sample may change; another model and another task may join
    more = ["--model", str(other), "--task", "arithmetic", "--max-new-tokens", "4", "--k", "1,2", "--rows", "3"]
    assert main([*base[2:], *more]) == 0
    assert len(list((out / "samples").iterdir())) == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_and_in_a_pipe(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    tty, pipe = Terminal(), io.StringIO()
    for stream in (tty, pipe):
        clock[0] = 0.0
        progress = command.Progress("m on t", problems=10, done=2, samples=4, stream=stream)
        for _ in range(8):  # 4 responses in 5 s: the 32 of this session take 40 s
            clock[0] += 5
            progress.update(4, 1000)
        progress.end()
    assert tty.getvalue().startswith("\r\x1b[Km on t: 3/10 problems, 200 tokens/s, 0:05, ETA 0:35")
    assert tty.getvalue().count("\n") == 1
    lines = pipe.getvalue().splitlines()
    assert lines[0] == "m on t: 5/10 problems, 67 tokens/s, 0:15, ETA 0:25"
    assert len(lines) == 3 and lines[-1] == "m on t: 10/10 problems, 25 tokens/s, 0:40"
