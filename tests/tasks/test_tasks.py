import pytest

from pymathrl.errors import UserError
from pymathrl.tasks import OPTION_HELP, TASKS, load_task, task_options
from pymathrl.tasks.arithmetic import Arithmetic
from pymathrl.tasks.countdown import countdown


def test_every_registered_task_works_under_its_name():
    for name in TASKS:
        task = load_task(name)
        assert task.name == name
        assert load_task(name, **task_options(name)) == task
        one = task.train(0, 0)
        assert not task.grade(one, "").correct
        assert task.prompt(one, "compact").endswith("<think>")


def test_options_may_be_text():
    expected = countdown(nmin=2, format_score=0.5, allow_subset=True, compat="rover")
    assert load_task("countdown", nmin=2, format_score=0.5, allow_subset=True, compat="rover") == expected
    assert load_task("countdown", nmin="2", format_score="0.5", allow_subset="true", compat="rover") == expected
    assert load_task("countdown", format_score=0) == countdown(format_score=0.0)
    assert load_task("arithmetic", ops="+") == Arithmetic(ops="+")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cuntdown", {}, "unknown task 'cuntdown': did you mean 'countdown'? (valid: arithmetic, countdown)"),
        ("", {}, "unknown task ''"),
        ("countdown", {"nmn": 3}, "unknown option 'nmn': did you mean 'nmin'?"),
        ("arithmetic", {"nmin": 3}, "unknown option 'nmin': did you mean"),
        ("arithmetic", {"name": "x"}, "unknown option 'name'"),
        ("countdown", {"source": "x"}, "unknown option 'source'"),
        ("countdown", {"nmin": "three"}, "nmin must be of type int, got 'three'"),
        ("countdown", {"nmin": 3.0}, "nmin must be of type int, got 3.0"),
        ("countdown", {"nmin": True}, "nmin must be of type int, got True"),
        ("countdown", {"allow_subset": "yes"}, "allow_subset must be of type bool, got 'yes'"),
        ("countdown", {"format_score": None}, "format_score must be of type float, got None"),
        ("countdown", {"compat": 1}, "compat must be of type str, got 1"),
        ("nowhere/a.jsonl", {}, "nowhere/a.jsonl: cannot read the file"),
    ],
)
def test_bad_names_and_options(name, options, message):
    with pytest.raises(UserError) as error:
        load_task(name, **options)
    assert message in str(error.value)


def test_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"nums": [1, 2], "target": 3}\n')
    assert [p.question for p in load_task(path, split="all").test()] == ["1 2 -> 3"]
    assert load_task(str(path), format_score="0.2") == load_task(path, format_score=0.2)
    assert task_options(path) == {"split": "hash", "format_score": 0.1, "allow_subset": False, "compat": "exact"}
    with pytest.raises(UserError, match="unknown option 'nmin'"):
        load_task(path, nmin=3)
    path.write_text('{"question": "1+2", "answer": "3"}\n')
    assert [p.answer for p in load_task(path, split="all").test()] == ["3"]
    path.write_text('{"problem": "1+2", "solution": "3"}\n')
    with pytest.raises(UserError) as error:
        load_task(path)
    assert "line 1: expected an object with the fields 'question' and 'answer'" in str(error.value)
    assert "got the fields 'problem', 'solution'" in str(error.value)


def test_every_option_has_its_help(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"nums": [1, 2], "target": 3}\n')
    names = {option for task in (*TASKS, file) for option in task_options(task)}
    assert names == OPTION_HELP.keys()
