"""MATHCHECK-GSM: what each of its four tasks asks, and how an answer to it is read."""

import json

import pytest

from pymathrl.errors import UserError
from pymathrl.tasks import load_task
from pymathrl.tasks.mathcheck import read


@pytest.mark.parametrize(
    ("task", "response", "expected"),
    [
        ("solving", "So 1,234.50 in all.", "1,234.50"),
        ("solving", "5 + 3 = 8\n#### 8 dollars for 2", "2"),
        ("solving", "<think>7</think>It is 1/2", "1/2"),
        ("solving", "<think>7", None),
        ("solving", "nothing", None),
        ("outcome_judging", "The step looks incorrect at first. The answer is: Correct", "Correct"),
        ("outcome_judging", "**The answer is: Incorrect.** It was not correct.", "Incorrect"),
        ("outcome_judging", "This is correct, but the sum is incorrect.", "Incorrect"),
        ("outcome_judging", "Good.", None),
        ("answerable_judging", "the answer is: unanswerable", "Unanswerable"),
        ("answerable_judging", "It is not Unanswerable. It is Answerable", "Answerable"),
        ("answerable_judging", "Who knows", None),
        ("process_judging", "Step 2 is fine. The answer is: Step 3", "Step 3"),
        ("process_judging", "The error is in step 4.", "Step 4"),
        ("process_judging", "Step 1 is right. Step 2 is right. In Step 3 there is a mistake.", "Step 3"),
        ("process_judging", "Step 1, Step 2 and Step 3", None),
        ("process_judging", "None is wrong", None),
    ],
)
def test_answers(task, response, expected):
    assert read(task, response) == expected


def test_the_four_tasks(tmp_path):
    common = {"question_type": "seed_question", "group_id": "0"}
    rows = [
        {**common, "task_type": "solving", "id": "0", "question": "16-7?", "answer": 9.0},
        {**common, "task_type": "outcome_judging", "id": "1", "question": "16-7?", "solution": "Step 1: 8.",
         "answer": "Incorrect"},
        {**common, "task_type": "process_judging", "id": "2", "question": "16-7?", "solution": "Step 1: 8.",
         "answer": "Step 1"},
        {**common, "task_type": "answerable_judging", "id": "3", "question": "16 less some?", "answer": "Unanswerable"},
    ]  # fmt: skip
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    task = load_task(f"mathcheck_gsm:{file}")
    problems = task.test()
    right = ("The answer is: 9.00", "The answer is: Incorrect", "The answer is: Step 1", "The answer is: Unanswerable")
    for i, problem in enumerate(problems):
        assert problem.meta["fields"]["task_type"] == rows[i]["task_type"]
        assert rows[i].get("solution", "") in task.prompt(problem, "chat") and "boxed" not in task.prompt(
            problem, "chat"
        )
        for j, response in enumerate(right):
            assert task.grade(problem, response).correct == (i == j), (i, j)
        assert task.grade(problem, "?").canonical is None and task.grade(problem, "?").reason == "no verdict"
    assert task.grade(problems[1], "The answer is: Correct").canonical == "Correct"
    open_to_training = load_task(f"mathcheck_gsm:{file}", split="hash")
    with pytest.raises(UserError, match="in evaluations only"):
        open_to_training.train(0, 0)
    file.write_text(json.dumps({**rows[0], "task_type": "guessing"}))
    with pytest.raises(UserError, match="line 1: field 'task_type' must be one of solving, outcome_judging"):
        load_task(f"mathcheck_gsm:{file}")
