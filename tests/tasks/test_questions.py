"""Questions from a file: GSM8K's form, both ways to read an answer, held-out rows, and every defect as one sentence."""

import json
import random
from pathlib import Path

import pytest

from pymathrl.errors import UserError
from pymathrl.tasks import load_task, task_options
from pymathrl.tasks.holdout import is_held_out
from pymathrl.verify import verify


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def file(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"Twice {i}.\n#### {2 * i:,}"} for i in range(1, 2001)]
    return write(tmp_path / "sums.jsonl", rows)


def test_rows_are_split_by_hash_and_shuffled_by_seed_and_epoch(file):
    task = load_task(file)
    test = task.test()
    assert 180 < len(test) < 320  # an eighth of 2,000
    count = 2000 - len(test)
    epoch = [task.train(i, 0).question for i in range(count)]
    assert len(set(epoch)) == count and not set(epoch) & {p.question for p in test}
    assert [task.train(i + count, 0).question for i in range(count)] != epoch
    assert [task.train(i, 1).question for i in range(5)] != epoch[:5]
    assert task.train(3, 0) == load_task(file).train(3, 0)
    everything = load_task(file, split="all")
    assert len(everything.test()) == 2000
    with pytest.raises(UserError, match="no row is left to train on"):
        everything.train(0, 0)


def test_a_small_file_holds_out_one_question(tmp_path):
    rows = [{"question": q, "answer": "1"} for q in ("Two?", "One?", "Two?")]
    assert not any(is_held_out("question:" + row["question"]) for row in rows), "a case for the fallback"
    task = load_task(write(tmp_path / "small.jsonl", rows))
    held_out = {p.question for p in task.test()}
    assert len(held_out) == 1 and not held_out & {task.train(i, 0).question for i in range(4)}
    assert task.test() == load_task(write(tmp_path / "small.jsonl", rows[::-1])).test()
    single = load_task(write(tmp_path / "single.jsonl", rows[:1]))
    assert len(single.test()) == 1
    with pytest.raises(UserError, match="no row is left to train on; use split='hash' and two or more questions"):
        single.train(0, 0)


@pytest.mark.parametrize(
    ("answer", "response", "reward", "correct"),
    [
        ("tag", "so <answer>2,000</answer>", 1.0, True),
        ("tag", "so 2000", 0.0, False),
        ("tag", "<answer>2001</answer>", 0.1, False),
        ("tag", "<answer>none</answer>", 0.0, False),
        ("last", "first 3, then $2000.00.", 1.0, True),
        ("last", "2000, or 2001", 0.1, False),
        ("last", "no idea", 0.0, False),
    ],
)
def test_grades(file, answer, response, reward, correct):
    task = load_task(file, answer=answer, format_score=0.1, split="all")
    grade = task.grade(task.test()[999], response)
    assert (grade.reward, grade.correct) == (reward, correct)
    assert all(str(999 + 1) in task.prompt(task.test()[999], style) for style in ("compact", "plain", "chat"))
    assert task.grade(task.test()[999], task.solution(task.test()[999], None)).correct == (answer in ("tag", "last"))


def test_options_and_defects(file, tmp_path):
    assert set(task_options(file)) == {
        "answer", "template", "format_score", "split", "question_field", "gold_field", "gold_form", "gold_list",
        "solution_field",
    }  # fmt: skip
    for options, message in (
        ({"answer": "box"}, "answer in template, tag, boxed, gsm8k, answer, choice, last, auto"),
        ({"format_score": 0.2}, "format_score must be in \\[0, 0.1\\]"),
        ({"template": "verl"}, "unknown template 'verl': did you mean 'verl_"),
        ({"gold_form": "x"}, "gold_form in guess, whole, marked, boxed"),
        ({"question_field": "q"}, "line 1: field 'q' must be a text"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(file, **options)
    for row, message in (
        ({"question": "a"}, "line 1: field 'answer' must be an answer"),
        ({"question": "", "answer": "1"}, "field 'question' must be a text that is not empty"),
        ({"question": "a", "answer": "  "}, "field 'answer' must be an answer: .* alone or after '####'"),
        ({"question": "a", "answer": True}, "field 'answer' must be an answer"),
        ({"question": "a", "answer": ["1", ""]}, "field 'answer' must be an answer"),
        ({"problem": "a", "solution": "1"}, "field 'answer' .* got no such field among 'problem', 'solution'"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(write(tmp_path / "bad.jsonl", [row]))


def test_options(tmp_path):
    row = {"question": "Which is prime?", "answer": "It has no divisor.\n#### 7", "options": ["4", "7", "9"]}
    task = load_task(write(tmp_path / "choice.jsonl", [row]), split="all", format_score=0.1)
    one = task.test()[0]
    assert one.meta["options"] == ("4", "7", "9") and one.answer == "7" and one.meta["worked"] == "It has no divisor."
    chat = task.prompt(one, "chat")
    assert "Which is prime?\nA. 4\nB. 7\nC. 9\n" in chat and "letter" in chat
    for answer, reward in (("B", 1.0), ("(B)", 1.0), ("B. 7", 1.0), ("7", 1.0), ("A", 0.1), ("9", 0.1), ("D", 0.0),
                           ("b", 1.0), ("b) 7", 1.0), ("\\textbf{(B)}", 1.0), ("BC", 0.0), ("", 0.0), ("77", 0.0),
                           ("a cat", 0.0), ("7.0", 1.0), ("B or C", 0.0), ("(B) and (C)", 0.0)):  # fmt: skip
        grade = task.grade(one, f"B<answer>{answer}</answer>")
        assert grade.reward == reward and grade.correct == (reward == 1.0), answer
    assert task.grade(one, "B").reward == 0.0
    assert task.grade(one, "<answer>B</answer>").canonical == "7"
    for mode in ("tag", "boxed", "choice"):
        own = load_task(tmp_path / "choice.jsonl", split="all", answer=mode)
        assert own.grade(one, own.solution(one, random.Random(0))).correct, mode
    words = {"question": "Sky?", "answer": "blue", "options": ["blue", "red"]}  # no number needed
    assert load_task(write(tmp_path / "words.jsonl", [words]), split="all").test()[0].answer == "blue"
    for change, message in (
        ({"options": ["4"]}, "field 'options' must be a list of 2 to 26 different texts"),
        ({"options": ["4", "7", "7"]}, "field 'options' must be a list of 2 to 26 different texts"),
        ({"options": ["4", 7]}, "field 'options' must be a list of 2 to 26 different texts"),
        ({"options": ["4", "8"]}, "field 'answer' must be one of the options"),
        ({"hint": ""}, "field 'hint' must be a text that is not empty"),
        ({"hint": 3}, "field 'hint' must be a text that is not empty"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(write(tmp_path / "bad.jsonl", [{**row, **change}]))
    with pytest.raises(UserError, match="use answer='tag'"):
        load_task(tmp_path / "choice.jsonl", answer="last")


def test_other_wordings_mean_the_same(tmp_path):
    rows = [{"question": "Two?", "answer": "2", "hint": "One more than one."},
            {"question": "Pick.", "answer": "x", "options": ["w", "x"]}]  # fmt: skip
    task = load_task(write(tmp_path / "a.jsonl", rows), split="all")
    plain, choice = task.test()
    rng = random.Random(0)
    for _ in range(20):
        other = task.reword(plain, rng)
        assert other.question.endswith(" Two?") and other.meta == plain.meta and other.meta["hint"]
        shuffled = task.reword(choice, rng)
        assert shuffled.meta["options"] == ("x", "w") and shuffled.question == choice.question
        assert (
            task.grade(shuffled, "<answer>A</answer>").correct and not task.grade(choice, "<answer>A</answer>").correct
        )


def test_fields_by_name_and_by_path(tmp_path):
    rows = [{"extra": {"ask": ["x", {"text": "1+1?"}]}, "gold": ["2", "two"], "why": "Count.", "level": 3}]
    task = load_task(
        write(tmp_path / "a.jsonl", rows), split="all", question_field="extra.ask[1].text", gold_field="gold",
        solution_field="why",
    )  # fmt: skip
    one = task.test()[0]
    assert (one.question, one.answer, one.meta["golds"]) == ("1+1?", "2", ("2", "two"))
    assert one.meta["worked"] == "Count." and one.meta["fields"] == {"level": 3}
    assert task.check(one).golds == ("2", "two") and task.check(one).mode == "tag"
    assert task.grade(one, "<answer>two</answer>").correct
    both = load_task(
        tmp_path / "a.jsonl", split="all", question_field="extra.ask[1].text", gold_field="gold", gold_list="all"
    )
    assert both.test()[0].answer == "2, two"


def test_a_template_says_how_to_ask_and_where_the_answer_is(file):
    task = load_task(file, split="all", template="verl_gsm8k")
    one = task.test()[4]
    assert task.prompt(one, "chat").startswith("What is 5 + 5? Let's think step by step") and task.system == ""
    assert task.grade(one, "5+5=10\n#### 10").correct and not task.grade(one, "<answer>10</answer>").correct
    boxed = load_task(file, split="all", template="qwen_boxed_sys")
    assert boxed.prompt(one, "chat") == "What is 5 + 5?" and "\\boxed{}" in boxed.system
    assert boxed.grade(one, "It is \\boxed{10.0}").correct
    assert load_task(file, split="all", answer="boxed").check(one).mode == "boxed"
    mixed = load_task(file, split="all", template="verl_gsm8k", answer="last")  # the flexible score of GSM8K
    assert mixed.prompt(one, "chat") == task.prompt(one, "chat") and mixed.grade(one, "so it is 10").correct
    for answer in ("tag", "boxed", "gsm8k", "answer", "auto", "last"):
        own = load_task(file, split="all", answer=answer)
        assert own.grade(one, own.solution(one, random.Random(0))).correct, answer


def test_the_last_number_is_no_reward(file):
    task = load_task(file, answer="last")
    assert task.test()
    with pytest.raises(UserError, match="in evaluations only: as a reward it would pay for any stray number"):
        task.train(0, 0)


def test_a_comparison_made_elsewhere_gives_the_same_grade(file):
    task = load_task(file, split="all", format_score=0.1)
    one = task.test()[9]
    check = task.check(one)
    for response in ("<answer>20</answer>", "<answer>21</answer>", "<answer>none</answer>", "20"):
        result = verify(response, check.golds, check.mode, check.cfg)
        assert task.grade_result(one, response, result) == task.grade(one, response)
    right, same = task.grade(one, "<answer>20.0</answer>"), task.grade(one, "<answer>\\frac{40}{2}</answer>")
    assert right.canonical == same.canonical == "20"
