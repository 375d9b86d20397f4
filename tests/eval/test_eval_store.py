"""The folder of an evaluation: what it keeps, drops and refuses."""

import json
from dataclasses import replace

import pytest

from pymathrl.errors import UserError
from pymathrl.eval.store import open_store
from tests.eval.cases import sample


def samples_of(problem, count=2):
    return [sample("A", True, problem=problem, number=i, text="é \u2028 \ud800") for i in range(count)]


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "out") as store:
        store.agree("sampling", "all", {"seed": 3})
        yield store


def test_samples_come_back_by_problem(store):
    store.add("m", "t", samples_of(4)[::-1])
    store.add("m", "t", samples_of(1))
    assert store.read("m", "t", [1, 4], 2) == {1: samples_of(1), 4: samples_of(4)}
    assert store.read("m", "t", [4], 2) == {4: samples_of(4)}, "of the problems that are asked for"
    assert store.read("m", "other", [1], 2) == {} == store.read("m2", "t", [1], 2)
    row = json.loads(store.path("m", "t").read_bytes().split(b"\n")[0])
    assert (row["set"], row["model"], row["seed"], row["id"], row["sample"]) == ("t", "m", 3, 4, 1)
    store.rewrite("m", "t", samples_of(1))
    assert len(store.path("m", "t").read_bytes().splitlines()) == 2


def test_problems_that_are_not_whole_are_dropped(store):
    store.add("m", "t", [*samples_of(0), *samples_of(1)[:1], *samples_of(2), *samples_of(2)])
    path = store.path("m", "t")
    path.write_bytes(path.read_bytes() + b'{"set": "t", "mod')
    assert store.read("m", "t", [0, 1, 2], 2) == {0: samples_of(0)}


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b'{"id": 1}\n'])
def test_a_broken_line_is_an_error_with_its_number(store, line):
    store.add("m", "t", samples_of(0, count=1))
    path = store.path("m", "t")
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=r"samples.*line 2: not a sample of this version"):
        store.read("m", "t", [0], 1)


def test_names_that_differ_have_files_of_their_own(store):
    pairs = [("a/b", "t"), ("a:b", "t"), ("a-b", "t"), ("a", "b--t"), ("a--b", "t"), ("x" * 300, "é")]
    paths = {store.path(*pair) for pair in pairs}
    assert len(paths) == len(pairs) and all(len(p.name) < 120 and p.name.isascii() for p in paths)


def test_settings_are_kept_and_compared(tmp_path):
    folder = tmp_path / "out"
    with open_store(folder) as store:
        store.agree("sampling", "all", {"seed": 4})
    with open_store(folder) as store:  # no sample was made with that seed
        store.agree("sampling", "all", {"seed": 3, "pair": (1, 2)})
        store.add("m", "t", samples_of(0))
        store.agree("models", "m", {"weights": "abc"})
        store.agree("sampling", "all", {"seed": 3, "pair": (1, 2)})
    with open_store(folder) as store:
        store.agree("models", "m", {"weights": "abc"})
        with pytest.raises(UserError, match=r"weights = 'abc' \(models m\), now it is 'abd'"):
            store.agree("models", "m", {"weights": "abd"})
        with pytest.raises(UserError, match="more = None"):
            store.agree("models", "m", {"weights": "abc", "more": 1})


def test_one_evaluation_at_a_time(tmp_path):
    with open_store(tmp_path), pytest.raises(UserError, match="another evaluation is writing"), open_store(tmp_path):
        pass
    with open_store(tmp_path):
        pass


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}'])
def test_foreign_settings_are_refused(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings\.json: not the settings"), open_store(tmp_path):
        pass


def test_a_sample_is_what_was_written():
    one = replace(sample(None, False, flexible=True, within=(True, False)), logp=-0.1, entropy=[0.1, 1 / 3])
    assert type(one).read(json.loads(json.dumps(one.line(set="t")))) == one
