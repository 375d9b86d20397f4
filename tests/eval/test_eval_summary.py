"""The numbers of an evaluation from samples made by hand."""

import math
from dataclasses import replace

import pytest

from pymathrl.eval.compare import compare
from pymathrl.eval.plot import draw
from pymathrl.eval.summary import group_samples, summarize, verifier_of
from pymathrl.eval.table import markdown, markdown_table, plain_table, score_rows, short_names, show_number
from pymathrl.tasks import Problem
from pymathrl.tasks.problem import Check
from pymathrl.verify import Policy
from tests.eval.cases import PlainTask, problems_of, rows_of, sample


def summary_of(rows, problems=None, *, ks=(1,), budgets=(10,), model="m", name="set", task=None, **options):
    for row in rows:
        for s in row:
            s.within.extend([s.verdict] * (len(budgets) - len(s.within)))
    problems = problems_of(len(rows)) if problems is None else problems
    return summarize(model, name, task or PlainTask(), problems, rows, ks=ks, budgets=budgets, **options)


def test_rates_and_votes():
    s = summary_of(rows_of("AABBC", "BBB-B"), ks=(1, 3, 5))
    m = s.metrics
    assert m["pass@1"] == m["avg@5"] == pytest.approx(0.2) and m["pass@1_se"] == pytest.approx(0.2)
    assert m["pass@3"] == pytest.approx((1 - 1 / 10) / 2) and m["pass@5-pass@1"] == pytest.approx(0.3)
    assert m["maj@3"] == pytest.approx(0.4333333 / 2) and m["maj@5"] == 0.25
    assert m["g-pass@5(0.5)"] == 0.0, "2 of 5 are right, not 3"
    assert m["coverage"] == 0.5 and m["no_answer"] == 0.1 and m["reward"] == 0.2
    # over samples: p = 0.4 of 5, so 0.24 / 4 over 2 problems, over P = 2
    assert m["sampling_sd"] == pytest.approx(math.sqrt(0.24 / 4 / 2 / 2))
    assert s.scores["pass@1"].low == 0.0 and s.scores["pass@1"].high == pytest.approx(0.4)
    assert [x for x, *_ in s.curves["pass@k"]] == [1, 2, 3, 4, 5] == [x for x, *_ in s.curves["maj@k"]]
    assert "pass@2" not in m and "maj@2" not in m, "only what was asked for"
    assert summary_of(rows_of("AABBC"), ks=(1, 5), ties="first").metrics["maj@5"] == 1.0


def test_ties_by_length_and_likelihood():
    row = [sample("A", True, tokens=9, logp=-5.0, within=(True,)), sample("B", False, number=1, logp=-2.0)]
    assert summary_of([row], ks=(2,), ties="shortest").metrics["maj@2"] == 1.0
    assert summary_of([row], ks=(2,), ties="logprob").metrics["maj@2"] == 0.0


def test_what_is_cut_off_is_wrong_and_does_not_vote():
    cut = sample("A", False, stop="length", tokens=20, within=(True,))
    more = [sample("B", False, number=1), sample("A", True, number=2), sample(None, False, number=3)]
    s = summary_of([[cut, *more]], ks=(1, 4), budgets=(20,))
    m = s.metrics
    assert m["pass@1"] == 0.25 and m["completions/clipped_ratio"] == 0.25 and m["cut_but_right"] == 0.25
    assert m["maj@4"] == 0.5, "A and B have a vote each"
    assert s.outcomes == {"correct": 0.25, "wrong answer": 0.25, "no answer": 0.25, "cut off": 0.25}
    assert s.lengths == {"all": [20, 10, 10, 10], "correct": [10], "incorrect": [20, 10, 10], "truncated": [20]}
    assert m["completions/mean_length"] == 12.5 and m["completions/truncated/median_length"] == 20
    assert m["tokens_per_correct"] == 50.0


def test_budgets_and_entropy():
    rows = [[
        sample("A", True, tokens=3, entropy=1.0, within=(True, True)),
        sample("A", True, tokens=7, entropy=0.0, number=1, within=(True, True)),
        sample("B", False, tokens=9, entropy=0.5, number=2, within=(True, False)),
    ]]  # fmt: skip
    s = summary_of(rows, ks=(1,), budgets=(5, 10))
    assert s.metrics["within/5"] == pytest.approx(1 / 3) and s.metrics["within/10"] == pytest.approx(2 / 3)
    assert s.metrics["stated/5"] == 1.0 and s.metrics["stated/10"] == pytest.approx(2 / 3), "the last changed its mind"
    assert s.metrics["entropy"] == pytest.approx((3 * 1 + 9 * 0.5) / 19)
    # tokens 0, 1-2, 3-6 and 7-8; three responses reach the first two, two the third, one the last
    assert s.entropy == [(0, 1, 0.5), (1, 3, 0.5), (3, 7, 0.25), (7, 9, 0.5)]


def test_diversity_over_correct_responses():
    same, other = "1 + 2 = 3 so 3 * 4 = 12", "4 * 3 = 12 since 2 + 1 = 3"
    texts = [same, same, other]
    rows = [[sample("A", True, number=i, text=t) for i, t in enumerate(texts)], rows_of("BBB")[0]]
    m = summary_of(rows).metrics
    assert m["diversity"] == 1.0, "over the one solved problem: one canonical form"
    assert m["diversity/problems"] == 0.5 and m["variety/problems"] == 1.0
    assert m["diversity/strategies"] == 2.0
    assert m["diversity/effective"] == pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))))
    assert 0 < m["diversity/cosine"] < 1 and m["answers/distinct"] == 1.0 and m["answers/entropy"] == 0.0
    nothing = summary_of(rows_of("BBB")).metrics
    assert math.isnan(nothing["diversity/cosine"]) and nothing["variety/cosine"] == pytest.approx(0.0, abs=1e-6)


def test_one_sample_per_problem_has_wilsons_interval():
    s = summary_of(rows_of(*"AAAAAABBBB"))
    assert s.scores["pass@1"].value == 0.6
    assert (s.scores["pass@1"].low, s.scores["pass@1"].high) == pytest.approx((0.312674, 0.831820), abs=1e-6)
    assert "sampling_sd" not in s.metrics and not [n for n in s.metrics if n.startswith("maj@")]
    assert math.isnan(summary_of(rows_of("AB")).scores["pass@1"].low), "one problem says nothing of others"


def test_flexible_scores():
    right = {"A": True, "B": False}
    row = [sample(a, right[a], number=i, flexible=f) for i, (a, f) in enumerate([("A", True), ("B", False)])]
    row.append(sample(None, False, number=2, flexible=True))
    m = summary_of([row], ks=(1, 3)).metrics
    assert m["pass@1"] == pytest.approx(1 / 3) and m["flexible/pass@1"] == pytest.approx(2 / 3)
    assert m["flexible/pass@3"] == 1.0
    assert "flexible/pass@1" not in summary_of(rows_of("AB")).metrics


def test_variants_of_one_question():
    """Two questions of two variants and one without: the first run of question 0 is right on both variants."""
    rows = rows_of("AA", "AB", "AA", "BB", "AA")
    problems = [Problem(i, "q", "A", {"fields": {"group": g}}) for i, g in enumerate([0, 0, 1, 1, 2])]
    m = summary_of(rows, problems).metrics
    assert m["variants/average"] == pytest.approx((0.75 + 0.5) / 2)
    assert m["variants/worst"] == pytest.approx((0.5 + 0.0) / 2)
    assert m["variants/robustness"] == pytest.approx(0.25 / 0.625)
    assert m["variants/original"] == 1.0 and m["variants/drop"] == pytest.approx(1 - (0.5 + 0.0) / 2)
    assert m["variants/relative_drop"] == pytest.approx(0.75)
    assert not [n for n in summary_of(rows).metrics if n.startswith("variants")]


def test_checklist_of_two_cells():
    """The macro F1 case as outcome judgements of one group; the cut-off one cannot be read, whatever it said."""
    fields = {"task_type": "outcome_judging", "question_type": "seed_question", "group_id": "7"}
    golds = ["Correct", "Incorrect", "Correct", "Incorrect"]
    problems = [Problem(i, "q", gold, {"fields": fields}) for i, gold in enumerate(golds)]
    rows = [
        [sample("Correct", True)], [sample("Incorrect", True)], [sample("Correct", False, stop="length")],
        [sample("Correct", False)],
    ]  # fmt: skip
    s = summary_of(rows, problems)
    assert s.matrix["outcome_judging"]["seed_question"] == pytest.approx(0.583333, abs=1e-6)
    assert math.isnan(s.metrics["mathcheck/score"]), "15 of its 16 cells are empty"
    assert "MATHCHECK" in markdown([s], [], [], "expected")
    assert not [n for n in s.metrics if n.startswith("variants")], "only of the solving task"


class ComparingTask(PlainTask):
    @staticmethod
    def check(problem):
        return Check((problem.answer,), "boxed", Policy())


def test_answers_are_grouped_by_the_equality_that_grades():
    problem = Problem(0, "q", "0.5")
    answers = ["\\frac{1}{2}", "0.5", None, "2", "1/2"]
    row = [sample(a, a not in (None, "2"), number=i) for i, a in enumerate(answers)]
    assert group_samples(ComparingTask(), problem, row) == [0, 0, -1, 1, 0]
    assert group_samples(PlainTask(), problem, row) == [0, 1, -1, 2, 3]
    letters = [replace(s, canonical=c) for s, c in zip(row, ["x", "y", None, "y", "x"], strict=True)]
    assert group_samples(ComparingTask(), problem, letters) == [0, 0, -1, 0, 0], "0.5 and 2 are the form y: one option"
    assert verifier_of(ComparingTask(), [problem]) != verifier_of(PlainTask(), [problem])


def test_comparison_in_pairs():
    a = summary_of(rows_of("AB", "BB", "AB", "AA"), ks=(1, 2), model="a")
    b = summary_of(rows_of("AA", "BB", "AB", "AB"), ks=(1, 2), model="b")
    c = compare(a, b)
    assert c.problems == 4 and c.differences["pass@1"].value == 0.0
    # d = 0.5, 0, 0, -0.5: sd 0.408248 over 2
    assert c.differences["pass@1"].se == pytest.approx(0.204124, abs=1e-6)
    assert c.differences["pass@2"].value == 0.0 == c.differences["pass@2"].low
    assert c.frontier == pytest.approx((0.0, 0.0, 0.75, 0.25, 1 / 3)) and math.isnan(c.mcnemar)


def test_greedy_runs_are_compared_by_mcnemar_on_common_problems():
    base = summary_of(rows_of(*"ABBBBBBA"), model="a")
    rows = rows_of(*"BAAAAAA")
    some = problems_of(9)[:7]
    c = compare(base, summary_of(rows, some, model="b"))
    assert c.problems == 7 and c.mcnemar == 0.125 and c.differences["pass@1"].value == pytest.approx(5 / 7)
    assert c.frontier.expansion == pytest.approx(6 / 7) and c.frontier.shrinkage == pytest.approx(1 / 7)
    far = [Problem(uid, "q", "A") for uid in range(100, 107)]
    assert compare(base, summary_of(rows_of(*"BAAAAAA"), far, model="b")) is None


def test_tables():
    a, b = (summary_of(rows_of("AB", "AA"), ks=(1, 2), model=m) for m in ("runs/x/step-1", "runs/y|z/step-1"))
    rows = score_rows([a, b], main=False)
    assert rows[0] == ["task", "", "x/step-1", "y|z/step-1"] and rows[1][:2] == ["set, 2 x 2", "pass@1"]
    assert rows[1][2] == "75.0 % [50.0, 100.0]"
    report = markdown([a, b], [compare(a, b)], ["n: 2"], "first")
    body = [line for line in report.splitlines() if line.startswith("|")]
    assert "y\\|z/step-1" in report and "of a tie the answer that came first" in report and "expansion" in report
    assert {line.replace("\\|", "").count("|") for line in body} == {5, 6}
    assert len(score_rows([a, b], main=True)) < len(rows)
    assert plain_table([["a", "b"], ["ccc", ""], ["", "d"]]) == "a    b\nccc\n     d"
    assert markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    # a model that was not asked this task has no numbers there
    other = summary_of(rows_of("A"), model="q", name="other")
    assert {row[2] for row in score_rows([a, other], main=True) if row[1] == "pass@1"} == {"75.0 % [50.0, 100.0]", "-"}


def test_numbers_as_text():
    assert [show_number(x, "%") for x in (0.2516, math.nan)] == ["25.2 %", "-"]
    assert [show_number(x, "tokens") for x in (1.0, 1234.56, math.inf)] == ["1.000", "1,234.6", "inf"]
    assert show_number(0.031, "%", "+") == "+3.1 %"
    assert short_names(["a/x", "b/x", "builtin:tiny"]) == {"a/x": "a/x", "b/x": "b/x", "builtin:tiny": "builtin:tiny"}
    assert short_names(["runs/a", "runs/b"]) == {"runs/a": "a", "runs/b": "b"}


def test_picture_of_few_and_of_many():
    one = summary_of(rows_of("A"))
    names = [(f"model-{m}-{'x' * 40}", task) for m in range(3) for task in ("one", "two")]
    many = [summary_of(rows_of("AB", "BA"), ks=(1, 2), model=model, name=task) for model, task in names]
    for summaries in ([one], many):
        png = draw(summaries)
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 10_000
