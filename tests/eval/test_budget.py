"""Votes under a time budget: which batches are measured, what fits, and what is said of it."""

import json
import math
from dataclasses import replace

import pytest

from pymathrl.errors import UserError
from pymathrl.eval import budget, command
from pymathrl.eval.budget import Timing, fitting, in_seconds, search, time_batch
from pymathrl.eval.command import main
from pymathrl.eval.compare import compare
from pymathrl.eval.plot import draw
from pymathrl.eval.sample import encode_all
from pymathrl.eval.store import open_store
from pymathrl.eval.summary import summarize
from pymathrl.eval.table import BUDGET_NOTE, budget_rows, comparison_rows, markdown, timing_rows
from pymathrl.rollout import Draws, Engine
from pymathrl.tasks import load_task
from tests.eval.cases import PlainTask, problems_of, rows_of, sample
from tests.tiny import save_tiny, tiny_policy

# --- the search -------------------------------------------------------------------------------------------------------


class Clock:
    """Batches whose time is a function of their samples; counts them."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, samples):
        self.asked.append(samples)
        return Timing(samples, self.seconds(samples), 10 * samples)


@pytest.mark.parametrize(
    ("tokens_per_s", "want"),
    [
        (lambda n: 3000.0, 150),
        (lambda n: 9000.0, 450),
        (lambda n: 9000.0 * n / (n + 50), 400),  # rows fill up: (n + 50) * 12000 / 9000 = 600 at n = 400
    ],
)
def test_most_samples_of_12000_tokens_in_600_s(tokens_per_s, want):
    """n = floor(B * throughput(n) / length): the throughput is that of the batch of n itself."""
    clock = Clock(lambda n: n * 12_000 / tokens_per_s(n))
    timings = search(clock, [600.0], 512)
    assert fitting(timings, 600.0).samples == want
    assert {want, want + 1} <= set(clock.asked), "it fits, and one more was measured and does not"
    assert len(clock.asked) == len(set(clock.asked)) <= 15
    assert [t.samples for t in timings] == sorted(clock.asked)


def steps_of_rows(n):
    """Waves of 16 rows: a staircase."""
    return 1.0 + 3.0 * math.ceil(n / 16)


@pytest.mark.parametrize("seconds", [lambda n: 0.01 * n * n, lambda n: 2 * math.sqrt(n), steps_of_rows, lambda n: 7.0])
@pytest.mark.parametrize("most", [2, 37, 1000])
def test_each_budget_has_its_largest_count_in_few_batches(seconds, most):
    clock, budgets = Clock(seconds), [0.5, 4.0, 7.0, 30.0]
    timings = search(clock, budgets, most)
    for limit in budgets:
        want = max((n for n in range(1, most + 1) if seconds(n) <= limit), default=0)
        fit = fitting(timings, limit)
        assert (0 if fit is None else fit.samples) == want
    # doubling, and for each budget at most three steps per halving of the range
    assert len(clock.asked) == len(set(clock.asked)) <= 11 + len(budgets) * 3 * math.ceil(math.log2(most))


def test_noise_counts_as_measured():
    """Four samples took longer than eight: eight fit, as measured."""
    took = {1: 1.0, 2: 2.0, 4: 5.5, 8: 5.0, 16: 11.0, 9: 6.0}
    timings = search(lambda n: Timing(n, took.get(n, 9.0), n), [5.2, 8.0], 64)
    assert [fitting(timings, b).samples for b in (5.2, 8.0)] == [8, 9]


def test_what_is_known_is_not_measured_again():
    whole = Clock(lambda n: 0.5 * n)
    timings = search(whole, [3.2, 10.0], 64)
    for some in (timings, timings[:3], timings[-1:]):
        clock = Clock(lambda n: 0.5 * n)
        again = search(clock, [3.2, 10.0], 64, some)
        assert not set(clock.asked) & {t.samples for t in some}
        assert [fitting(again, b).samples for b in (3.2, 10.0)] == [6, 20]
    more = Clock(lambda n: 0.5 * n)
    assert fitting(search(more, [20.0], 64, timings), 20.0).samples == 40, "another budget uses them too"


def test_nothing_fits_and_everything_fits():
    clock = Clock(lambda n: 8.0 + n)
    assert fitting(search(clock, [5.0], 64), 5.0) is None and clock.asked == [1]
    clock = Clock(lambda n: 0.1 * n)
    assert fitting(search(clock, [9.0, 5.0], 48), 9.0).samples == 48
    assert clock.asked == [1, 2, 4, 8, 16, 32, 48]


def test_names_of_budgets():
    assert [in_seconds(b) for b in (5.0, 0.25, 604800.0, 1234567.0)] == ["5s", "0.25s", "604800s", "1234567s"]


# --- the measurement --------------------------------------------------------------------------------------------------


def test_a_batch_is_the_samples_of_the_evaluation_and_its_time_is_the_generations(monkeypatch):
    policy, task, seen = tiny_policy(), load_task("countdown"), []
    prompts = encode_all(policy, task, task.test(5), 64)
    draws = Draws(4, 40, seed=9)
    whole = Engine(policy).generate(prompts.ids, 4, 40, seed=9, uids=draws.uids(prompts.problems))
    clock = iter([100.0, 107.5])
    monkeypatch.setattr(budget.time, "perf_counter", lambda: next(clock))
    engine = Engine(policy, max_batch=3)
    timing = time_batch(engine, prompts, replace(draws, samples=2), (), lambda *x: seen.append(x))
    lengths = whole.response_lengths.view(5, 4)[:, :2]
    assert timing == Timing(2, 7.5, int(lengths.sum())), "samples 0 and 1 of the four, to the token"
    assert sum(responses for responses, _ in seen) == 10 and seen[-1][1] == timing.tokens
    assert engine.pages_in_use == 0


# --- the numbers ------------------------------------------------------------------------------------------------------


def summary_of(rows, timings, budgets_s, model="m", budgets=(), **options):
    return summarize(model, "set", PlainTask(), problems_of(len(rows)), rows, ks=(1,), budgets=budgets,
                     timings=timings, budgets_s=budgets_s, **options)  # fmt: skip


TIMES = [Timing(1, 2.0, 40), Timing(3, 4.0, 120), Timing(5, 10.0, 200)]


def test_the_vote_within_a_budget_is_that_of_the_samples_that_fit():
    rows = rows_of("AABBC", "BBB-B")
    s = summary_of(rows, TIMES, [1.0, 2.0, 9.9, 10.0])
    plain = summarize("m", "set", PlainTask(), problems_of(2), rows, ks=(1, 3, 5), budgets=())
    none, one, three, five = (s.scores[f"maj@{b}s"] for b in ("1", "2", "9.9", "10"))
    assert math.isnan(none.value) and math.isnan(none.low)
    assert one == plain.scores["pass@1"]
    assert three.value == pytest.approx(0.4333333 / 2), "of the five samples, over all subsets of three"
    assert three == plain.scores["maj@3"] and five == plain.scores["maj@5"]
    assert "maj@3" not in s.metrics and "pass@3" not in s.metrics, "only what was asked for"
    assert [x for x, *_ in s.curves["maj@k"]] == [1, 2, 4, 5]
    assert s.curves["seconds"] == [
        (t, x.value, x.low, x.high) for t, x in ((2.0, one), (4.0, three), (10.0, five))
    ]  # fmt: skip
    record = s.record()
    votes = record["time_budgets"]
    assert [(v["budget_s"], v["samples"], v["all"]) for v in votes] == [
        (1.0, 0, False), (2.0, 1, False), (9.9, 3, False), (10.0, 5, True)
    ]  # fmt: skip
    assert votes[2]["accuracy"] == three.value and votes[2]["pass@1"] == pytest.approx(0.2)
    # 2 problems x 3 samples and 120 tokens in 4 s
    assert (votes[2]["samples_per_s"], votes[2]["tokens_per_s"]) == (1.5, 30.0)
    assert [t["samples"] for t in record["timings"]] == [1, 3, 5] and "seconds" not in votes[0]
    assert "time_budgets" not in plain.record() and "seconds" not in plain.curves


def test_answers_of_one_group_are_one_vote():
    """Two samples say 1/2 and 0.5, which the task's canonical form joins; ties go as --ties says."""
    texts = [("B", False), ("A", True), ("A2", True)]
    row = [replace(sample(a, right, number=i), canonical=a[0]) for i, (a, right) in enumerate(texts)]
    s = summary_of([row], [Timing(3, 1.0, 3)], [1.0], ties="first")
    assert s.scores["maj@1s"].value == 1.0


def test_models_are_compared_at_equal_time():
    """The slower model has one sample in 3 s, the faster three: a vote of AAB against one of its samples."""
    rows = rows_of("AAB", "AAB", "ABA", "BBB")
    slow = summary_of(rows, [Timing(1, 3.0, 40), Timing(2, 6.0, 80)], [1.0, 3.0], model="slow")
    fast = summary_of(rows, [Timing(1, 0.9, 40), Timing(2, 2.0, 80), Timing(3, 3.0, 120)], [1.0, 3.0], model="fast")
    c = compare(slow, fast)
    assert c.differences["maj@3s"].value == pytest.approx(3 / 4 - 2 / 4) and c.differences["pass@1"].value == 0.0
    assert "maj@1s" not in c.differences, "the slower one has no vote in 1 s"
    table = comparison_rows([c], {"slow": "slow", "fast": "fast"}, True)
    assert [row[2] for row in table if "within" in row[2]] == ["maj within 3 s"]
    rows = budget_rows([slow, fast])
    assert [row[1:4] for row in rows[1:]] == [
        ["slow", "1s", "0 (1: 3.00 s)"], ["fast", "1s", "1"], ["slow", "3s", "1"], ["fast", "3s", "3 (all)"]
    ]  # fmt: skip
    assert rows[1][4:7] == ["-", "-", "-"] and rows[4][4:7] == ["3.00 s", "4.0", "40"]
    assert rows[4][7].startswith("75.0 % [") and rows[1][7] == "-" and rows[4][8] == "50.0 %"
    assert timing_rows([slow, fast])[1] == ["set", "slow", "1", "3.00 s", "1.3", "13"]
    report = markdown([slow, fast], [c], [], "expected")
    assert BUDGET_NOTE in report and "| set | fast | 3s | 3 (all) |" in report
    assert BUDGET_NOTE not in markdown([summary_of(rows_of("AB"), [], [])], [], [], "expected")
    some = rows_of("AB", within=(True,))
    narrow, wide = (draw([summary_of(some, t, b, budgets=(10,))]) for t, b in (([], []), (TIMES[:1], [2.0])))
    assert int.from_bytes(wide[16:20], "big") > int.from_bytes(narrow[16:20], "big"), "a panel more"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--budget-s", "5,x"], ["--budget-s", "seconds above 0", "'5,x'"]),
        (["--budget-s", ""], ["--budget-s", "''"]),
        (["--budget-s", "5,,20"], ["--budget-s", "'5,,20'"]),
        (["--budget-s", "0"], ["--budget-s", "above 0", "'0'"]),
        (["--budget-s=-5"], ["--budget-s", "'-5'"]),
        (["--budget-s", "inf"], ["--budget-s", "'inf'"]),
        (["--budget-s", "nan,5"], ["--budget-s", "'nan,5'"]),
        (["--budget-s", "5", "--n", "1", "--k", "1"], ["--budget-s", "--n of at least 2", "got 1"]),
        (["--budget-s", "5", "--temperature", "0"], ["--budget-s", "greedy", "--temperature above 0"]),
    ],
)
def test_wrong_budgets_are_one_sentence(argv, words, capsys):
    assert main(["--model", "/nowhere", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(word in err for word in words), err


def test_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--budget-s S[,S...]", "all problems of a task together", "without grading",
                  "nothing is extrapolated", "5 to 8 times the largest budget"):  # fmt: skip
        assert words in text


RUN = ["--problems", "4", "--n", "8", "--k", "1", "--device", "cpu", "--max-new-tokens", "40"]


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(command, "draw", lambda summaries: b"")


def fake_clock(monkeypatch, stop_at=0):
    """Batches are drawn as ever, but n samples take n seconds. Returns the list of those asked for."""
    asked, real = [], command.time_batch

    def timed(engine, prompts, draws, *more):
        asked.append(draws.samples)
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        return replace(real(engine, prompts, draws, *more), seconds=float(draws.samples))

    monkeypatch.setattr(command, "time_batch", timed)
    return asked


def test_a_real_run_of_the_built_in_model(tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "record.json"
    argv = ["--model", "builtin:tiny", *RUN, "--budget-s", "1e-6,600"]
    assert main([*argv, "--out", str(out), "--json", str(record)]) == 0
    printed = capsys.readouterr()
    assert "8 (all)" in printed.out and "0 (1: " in printed.out and "1e-06s" in printed.out
    assert "warm-up: 8 per problem: 4/4 problems" in printed.err and "timed: 4 per problem: 4/4 problems" in printed.err
    evaluation = json.loads(record.read_text())
    (row,) = json.loads((out / "summary.json").read_text())["evaluations"]
    assert row["time_budgets"] == evaluation["time_budgets"] and row["timings"] == evaluation["timings"]
    assert [t["samples"] for t in row["timings"]] == [1, 2, 4, 8] and evaluation["settings"]["budget_s"] == [1e-6, 600]
    for t in row["timings"]:
        drawn = sum(r["tokens"] for p in evaluation["problems"] for r in p["responses"][: t["samples"]])
        assert t["tokens"] == drawn and t["seconds"] > 0, "the batches are the samples of the evaluation"
    assert row["metrics"]["maj@600s"] == row["metrics"]["maj@8"] == row["time_budgets"][1]["accuracy"]
    assert (out / "plots.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_picture")
def test_stopped_and_started_again_no_time_is_measured_twice(tmp_path, monkeypatch, capsys):
    models = [str(save_tiny(tmp_path / "a")), str(save_tiny(tmp_path / "b", seed=1))]
    argv = [f"--model={','.join(models)}", *RUN, "--task", "countdown,arithmetic", "--budget-s", "3,5"]
    argv += ["--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        asked = fake_clock(patch, stop_at=9)
        assert main(argv) == 130
    assert asked == [8, 1, 2, 4, 8, 3, 5, 6, 8], "warm-up; doubling; what the budgets ask for; next task"
    capsys.readouterr()
    asked = fake_clock(monkeypatch)
    assert main([*argv, "--budget-s", "5,3"]) == 0
    assert asked == [8, 1, 2, 4, 8, 3, 5, 6] * 3
    printed = capsys.readouterr()
    assert "the times of 1, 2, 4, 8, 3, 5, 6 samples are there already" in printed.err
    whole = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [[v["samples"] for v in e["time_budgets"]] for e in whole["evaluations"]] == [[3, 5]] * 4
    assert len(whole["comparisons"]) == 2 and "maj@5s" in whole["comparisons"][0]["differences"]
    asked.clear()
    assert main([*argv, "--budget-s", "1,3"]) == 0 and asked == [], "what is known serves other budgets"
    # other rows, other times
    assert main([*argv, "--rows", "4"]) == 0 and asked == [1, 1, 2, 4, 8, 3, 5, 6] * 4
    asked.clear()
    assert main(argv) == 0 and asked == []


def test_times_in_the_folder(tmp_path):
    here, there = {"machine": "x", "rows": 4}, {"machine": "y", "rows": 4}
    with open_store(tmp_path) as store:
        assert store.read_times("m", "t", here) == []
        store.add_time("m", "t", TIMES[0], here)
        store.add_time("m", "t", TIMES[1], there)
        store.add_time("m", "t", TIMES[2], here)
        assert store.read_times("m", "t", here) == [TIMES[0], TIMES[2]]
        assert store.read_times("m", "t", here | {"rows": 5}) == [] == store.read_times("m", "u", here)
        path = store.path("m", "t", "times")
        path.write_bytes(b'{"samples": 1}\n' + path.read_bytes())
        with pytest.raises(UserError, match=r"times.*line 1: not a measured batch of this version"):
            store.read_times("m", "t", here)
