"""Questions from a file: GSM8K's form, both ways to read an answer, held-out rows, and every defect as one sentence."""

import json
import random
from pathlib import Path

import pytest

from pymathrl.errors import UserError
from pymathrl.tasks import load_task, task_options
from pymathrl.tasks.holdout import is_held_out


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
    assert set(task_options(file)) == {"answer", "format_score", "split"}
    for options, message in (
        ({"answer": "box"}, "answer in tag, last"),
        ({"format_score": 1.0}, "format_score must be"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(file, **options)
    for row, message in (
        ({"question": "a"}, "line 1: field 'answer' must be a text"),
        ({"question": "", "answer": "1"}, "field 'question' must be a text that is not empty"),
        ({"question": "a", "answer": "x/2"}, "field 'answer' must be a number, alone or after '####'"),
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
                           ("b", 0.0), ("BC", 0.0), ("", 0.0), ("77", 0.0)):  # fmt: skip
        grade = task.grade(one, f"B<answer>{answer}</answer>")
        assert grade.reward == reward and grade.correct == (reward == 1.0), answer
    assert task.grade(one, "B").reward == 0.0
    assert task.grade(one, "<answer>B</answer>").canonical == "7"
    words = {"question": "Sky?", "answer": "blue", "options": ["blue", "red"]}  # no number needed
    assert load_task(write(tmp_path / "words.jsonl", [words]), split="all").test()[0].meta["value"] is None
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
