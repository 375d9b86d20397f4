"""Data sets by name: those on this machine whole, the form of the others on a few rows written here."""

import json
import os
import random
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from pymathrl.errors import UserError
from pymathrl.tasks import DATASETS, load_task, task_options
from pymathrl.tasks.golds import all_of, boxed, gold_text, guess, marked, split_list
from pymathrl.tasks.questions import data_set_names, unwrapped
from pymathrl.tasks.templates import TEMPLATES

DATA = Path(os.environ.get("PYMATHRL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

# name -> (rows to train on, rows to test on, first gold of the test rows)
LOCAL = {
    "gsm8k": (7473, 1319, "18"),
    "math": (6524, 972, "14"),
    "math500": (0, 500, "\\left( 3, \\frac{\\pi}{2} \\right)"),
    "aime24": (0, 30, "204"),
    "aime25": (0, 30, "70"),
    "amc23": (0, 40, "27"),
    "olympiadbench": (0, 675, "2"),
    "olymmath": (0, 400, "948"),
    "olymmath-en-hard": (0, 100, "2625"),
    "olymmath-zh-hard": (0, 100, "2625"),
    "mgsm": (0, 2750, "18"),
    "mgsm-sw": (0, 250, "18"),
    "mathcheck_gsm": (0, 3096, "18"),
}


@pytest.fixture
def local(monkeypatch):
    """Loads a data set of the folder of data sets; skips where that has none of its name."""

    def load(name, **options):
        if not (DATA / name.partition("-")[0]).is_dir():
            pytest.skip(f"no folder {name.partition('-')[0]} in {DATA}; PYMATHRL_DATA names the folder of data sets")
        monkeypatch.setenv("PYMATHRL_DATA", str(DATA))
        return load_task(name, **options)

    return load


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_set_loads_whole(local, name):
    task = local(name)
    train, test, first = LOCAL[name]
    assert (len(task.items), len(task.held_out)) == (train, test)
    assert task.test(1)[0].answer == first
    record = DATASETS[name.partition("-")[0]]
    if name in DATASETS:
        left_out = sum(int(note.split(": ")[1].split()[0]) for note in task.notes)
        assert train + test + left_out == sum(record.rows.values())
    assert task.own_test == ("test" in record.rows)
    if train:
        assert task.train(0, 0).question != task.train(0, 1).question
    else:
        with pytest.raises(UserError, match="no row is left to train on"):
            task.train(0, 0)


@pytest.mark.parametrize("name", [name for name in LOCAL if name in DATASETS and name != "mathcheck_gsm"])
def test_gold_answers_are_right_and_those_of_other_problems_wrong(local, name):
    task = local(name, split="all")
    rng = random.Random(0)
    problems = rng.sample(task.test(), min(300, len(task.test())))
    responses = [task.solution(p, rng) for p in problems]
    assert all(task.grade(p, r).correct for p, r in zip(problems, responses, strict=True))
    moved = zip(problems, responses[1:] + responses[:1], problems[1:] + problems[:1], strict=True)
    accepted = [p for p, r, q in moved if p.answer != q.answer and task.grade(p, r).correct]
    assert len(accepted) < 0.01 * len(problems)


def test_hand_picked_rows(local):
    aime = {p.answer for p in local("aime24").test()}
    assert {"025", "073"} <= aime  # leading zeros are kept, and mean nothing
    task = local("aime24")
    one = next(p for p in task.test() if p.answer == "025")
    assert task.grade(one, "\\boxed{25}").correct and not task.grade(one, "\\boxed{26}").correct
    olympiad = local("olympiadbench")
    two = next(p for p in olympiad.test() if p.answer == "69, 84")  # "$69$,$84$": both, in any order
    assert olympiad.grade(two, "\\boxed{84, 69}").correct and not olympiad.grade(two, "\\boxed{69}").correct
    near = next(p for p in olympiad.test() if "policy" in p.meta)  # the one row with a tolerance: 1e-1
    assert near.answer == "4.2" and olympiad.check(near).cfg.abs_tol == 0.1
    assert olympiad.grade(near, "\\boxed{4.25}").correct and not olympiad.grade(near, "\\boxed{4.4}").correct
    gsm8k = local("gsm8k").test(1)[0]
    assert gsm8k.meta["worked"].startswith("Janet sells 16 - 3 - 4 = 9 duck eggs a day.")  # no calculator's marks


def test_math_leaves_out_what_it_cannot_grade(local):
    assert local("math").notes == (
        "math: 2 rows that repeat another left out",
        "math: 2 rows without an answer left out",
    )


def test_every_language_of_mgsm_reads_its_own_phrase(local):
    said = {
        "bn": "The answer is 18.", "de": "Die Antwort lautet 18.", "en": "The answer is 18.",
        "es": "La respuesta es 18.", "fr": "La réponse est 18.", "ja": "答えは18です。", "ru": "Ответ — 18.",
        "sw": "Jibu ni 18.", "te": "సమాధానం 18.", "th": "คำตอบคือ 18", "zh": "答案是 18。",
    }  # fmt: skip
    assert set(said) == set(DATASETS["mgsm"].subsets)
    task = local("mgsm")
    for language, phrase in said.items():
        one = next(p for p in task.test() if p.meta["subset"] == language)
        assert one.answer == "18" and task.grade(one, f"16 - 7 = 9\n{phrase}").correct, language
        assert not task.grade(one, phrase.replace("18", "17")).correct
        assert phrase.replace("18", "N") in task.prompt(one, "chat")


# ---- sets that are not here: the form of their rows ------------------------------------------------------------------


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def dapo(index: int, problem: str, gold: str) -> dict:
    prompt = (
        "Solve the problem. The last line is to be Answer: $Answer.\n\n"
        + problem
        + '\n\nEnd with a line after "Answer:".'
    )
    return {
        "data_source": "math_dapo", "prompt": [{"content": prompt, "role": "user"}], "ability": "MATH",
        "reward_model": {"ground_truth": gold, "style": "rule"}, "extra_info": {"index": f"id-{index}"},
    }  # fmt: skip


def test_dapo_is_unwrapped_and_each_index_kept_once(tmp_path):
    rows = [dapo(i % 20, f"Find $x+{i % 20}$.\n\nAssume $x=0$.", str(i % 20)) for i in range(100)]
    task = load_task(f"dapo17k:{write(tmp_path / 'train.jsonl', rows)}")
    assert len(task.items) + len(task.held_out) == 20
    assert task.notes == ("dapo17k: 80 rows that repeat another left out",)
    one = task.train(0, 0)
    assert one.question == f"Find $x+{one.answer}$.\n\nAssume $x=0$."
    assert task.grade(one, f"So.\nAnswer: {one.answer}").correct and not task.grade(one, "Answer: 77").correct
    assert unwrapped("Only a problem that says Answer: nothing.") == "Only a problem that says Answer: nothing."


def test_deepscaler_and_math_beyond(tmp_path):
    rows = [
        {"problem": f"{i}?", "answer": a, "solution": "\\boxed{1}"}
        for i, a in enumerate(["\\frac{1}{2}", "", "3", "4"])
    ]
    rows += [{"problem": "2 ?", "answer": "3", "solution": ""}]
    task = load_task("deepscaler", data=str(write(tmp_path / "deepscaler" / "data.jsonl", rows).parents[1]))
    assert len(task.items) + len(task.held_out) == 3 and len(task.notes) == 2
    beyond = load_task(
        "math_beyond", data=str(write(tmp_path / "x" / "test.jsonl", [{"problem": "a", "answer": 5}]).parent)
    )
    assert beyond.test()[0].answer == "5"


def test_worked_golds_steps_and_tolerance(tmp_path):
    rows = [{"problem": "How far?", "solution": "It is \\boxed{4.7e3} then.", "type": "x"}]
    minerva = load_task(f"minerva:{write(tmp_path / 'test.jsonl', rows)}")
    one = minerva.test()[0]
    assert one.answer == "4.7e3" and minerva.grade(one, "\\boxed{4690}").correct
    assert not minerva.grade(one, "\\boxed{4600}").correct
    steps = [{"id": "a-1", "problem": "1+1?", "steps": ["Two.", "So 3."], "final_answer_correct": False, "label": 1}]
    task = load_task(f"processbench:{write(tmp_path / 'gsm8k.jsonl', steps)}")
    one = task.test()[0]
    assert "[0] Two.\n[1] So 3." in one.question and one.answer == "1"
    assert one.meta["fields"] == {"id": "a-1", "final_answer_correct": False}
    assert task.grade(one, "\\boxed{1}").correct and not task.grade(one, "\\boxed{-1}").correct

    row = {"question": "How long?", "final_answer": ["2.5"], "error": "-1"}
    with pytest.raises(UserError, match="'error' must be a tolerance such as 1e-1"):
        load_task(f"olympiadbench:{write(tmp_path / 'rows.jsonl', [row])}")


def test_golds():
    assert [gold_text(v) for v in (27.0, 0.5, 7, "025", " $x$ ", "\\$18", "$\\$5$", True, None, float("inf"), [1])] == [
        "27", "0.5", "7", "025", "x", "\\$18", "\\$5", None, None, None, None,
    ]  # fmt: skip
    assert gold_text("$100$,$200$") == "100, 200"  # two numbers, not one with a mark between thousands
    assert marked("2+3=5\n#### 1,000 ") == "1,000" and marked("5") is None
    assert boxed("\\boxed{1} so \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}" and boxed("5") is None
    assert [guess(v) for v in ("a #### 5", "so \\boxed{6}", "7", 8)] == ["5", "6", "7", "8"]
    assert all_of(["2500,7500"]) == "2500, 7500" and all_of(["(1,2),(3,4)", "\\{5,6\\}"]) == "(1,2), (3,4), \\{5,6\\}"
    assert split_list("a,,b,") == ["a", "b"] and split_list("1,\\!000") == ["1,\\!000"]


def test_names_and_errors(tmp_path, monkeypatch):
    assert {"gsm8k", "olymmath-en-hard", "mgsm-de", "processbench-math"} <= set(data_set_names())
    for record in DATASETS.values():
        for subset in record.subsets or ("",):
            assert record.template.replace("{subset}", subset.split("-")[0]) in TEMPLATES
        assert record.benchmark == ("train" not in record.rows) and "/" in record.hub and record.licence
    assert task_options("gsm8k")["split"] == "hash" and task_options("aime24")["split"] == "all"
    monkeypatch.delenv("PYMATHRL_DATA", raising=False)
    for name, options, message in (
        ("gsm8k:nowhere", {}, "task gsm8k:nowhere: no such file or folder"),
        ("gsm8k", {"data": str(tmp_path / "nowhere")}, "expected a folder with the files of gsm8k"),
        ("gsm8k", {"data": str(tmp_path)}, "expected data files .* got none"),
        ("gsm9k", {}, "unknown task 'gsm9k': did you mean 'gsm8k'"),
        ("mgsm-xx", {}, "unknown task 'mgsm-xx': did you mean 'mgsm'"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(name, **options)
    (tmp_path / "gsm8k").mkdir()
    write(tmp_path / "gsm8k" / "test.jsonl", [{"question": "1?", "answer": "no mark"}])
    with pytest.raises(UserError, match="gsm8k: no row with a question and an answer"):
        load_task("gsm8k", data=str(tmp_path))


def test_the_hub_is_asked_last(tmp_path, monkeypatch):
    asked = []
    write(tmp_path / "main" / "test.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    write(tmp_path / "socratic" / "test.jsonl", [{"question": "Why?", "answer": "#### 3"}])

    def download(repository, repo_type, allow_patterns):
        asked.append((repository, repo_type, allow_patterns))
        return str(tmp_path)

    monkeypatch.delenv("PYMATHRL_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    task = load_task("gsm8k", split="all")
    assert [p.answer for p in task.test()] == ["2"]  # of the configuration that is meant
    assert asked == [("openai/gsm8k", "dataset", ["*.jsonl", "*.json", "*.parquet", "*.csv", "*.tsv"])]

    def refuse(*args, **options):
        raise ValueError("403 for you\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        UserError, match=r"openai/gsm8k could not be fetched .* \(403 for you\); name them: --task gsm8k:PATH"
    ):
        load_task("gsm8k")

    def offline(*args, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.setenv("PYMATHRL_DATA", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"not in a folder gsm8k in PYMATHRL_DATA=.*/empty, .* hub cannot be reached"):
        load_task("gsm8k")
