import pytest

from pymathrl.errors import UserError
from pymathrl.tasks import DATASETS, OPTION_HELP, TASKS, load_task, short_name, task_options
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
        (
            "cuntdown",
            {},
            "unknown task 'cuntdown': did you mean 'countdown'? (valid: aime24, aime25, amc23, arithmetic, ",
        ),
        ("", {}, "unknown task ''"),
        ("chain_sum", {}, "or give synth:FAMILY, rg:FAMILY (such as synth:chain_sum), or the path of a file (.jsonl"),
        ("synth:chain_sun", {}, "unknown family: did you mean 'chain_sum'? (valid: base_convert, binomial_count, "),
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


def test_short_names():
    names = {
        "countdown": "countdown", "gsm8k": "gsm8k", "gsm8k:/data/x/train.jsonl": "gsm8k", "mgsm-de:folder": "mgsm-de",
        "rg:chain_sum": "rg-chain_sum", "synth:gcd_lcm": "synth-gcd_lcm", "data/my.rows.jsonl": "my.rows",
        "/a:b/rows.jsonl": "rows",
    }  # fmt: skip
    assert {name: short_name(name) for name in names} == names


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
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text('question,answer\n"1,5 and 2?",7\n3?,3\n')
    (tmp_path / "set" / "test.json").write_text(
        '{"data": [{"question": "3?", "answer": 3.0}, {"problem": "4?", "answer": 4}]}'
    )
    folder = load_task(tmp_path / "set")  # the folder says what is held out, and its test questions are not trained on
    assert [p.answer for p in folder.test()] == ["3", "4"] and {folder.train(i, 0).question for i in range(4)} == {
        "1,5 and 2?"
    }
    assert folder.notes == (f"{tmp_path / 'set'}: 1 train rows whose question is in the test split left out",)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected a folder with data files .* got none"):
        load_task(tmp_path / "empty")


def test_every_option_has_its_help(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"nums": [1, 2], "target": 3}\n')
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "1+2", "answer": "3"}\n')
    kinds = (*TASKS, file, questions, *DATASETS, "rg:gcd", "synth:mixed_arith", "synth:percent_word")
    names = {option for task in kinds for option in task_options(task)}
    assert names == OPTION_HELP.keys()
