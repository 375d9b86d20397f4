"""bench/vs_math_verify.py: the truth of its pairs, a wrong grader gets no speed, the quick run's figures."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the package compared with
needs_peer = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="not installed: math_verify")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("vs_math_verify")


def rational(text: str) -> Fraction:
    """The value of what the bench writes for a rational, read by its own few lines."""
    text = text.strip().replace("{,}", "").replace(",", "").removeprefix("x = ")
    if found := re.fullmatch(r"(-?)\\d?frac\{(-?\d+)\}\{(\d+)\}", text):
        sign, top, bottom = found.groups()
        return Fraction(int(top), int(bottom)) * (-1 if sign else 1)
    if found := re.fullmatch(r"(-?\d+) \+ (\d+)", text):
        return Fraction(int(found[1]) + int(found[2]))
    if found := re.fullmatch(r"(\d+) \\cdot 10\^\{-(\d+)\}", text):
        return Fraction(int(found[1]), 10 ** int(found[2]))
    if found := re.fullmatch(r"(.*?)0? ?\\?%", text):
        return Fraction(found[1]) / 100
    return Fraction(text.removeprefix("+"))


def test_truth_of_the_pairs(bench):
    """Of the kinds that hold one rational each the value is computed again; of the others the shares are counted."""
    pairs = bench.make_pairs(1100, seed=3)
    assert len({(p.gold, p.answer) for p in pairs}) == 1100
    for kind in bench.KINDS:
        of_kind = [p for p in pairs if p.kind == kind]
        assert len(of_kind) == 100 and sum(p.equal for p in of_kind) == 50
    checked = [p for p in pairs if p.kind in ("integers", "decimals", "fractions", "percentages")]
    for pair in checked:
        assert (rational(pair.gold) == rational(pair.answer)) == pair.equal, pair
    assert bench.make_pairs(1100, seed=3) == pairs != bench.make_pairs(1100, seed=4)


def test_polynomials_at_a_point(bench):
    """At x = 1000 no two of them that differ can coincide: coefficients are below 1000 in size."""

    def value(text: str) -> int:
        text = text.replace("\\cdot", "").replace(" ", "").replace(")(", ")*(").replace("^", "**")
        text = re.sub(r"(\d)x", r"\1*x", text)
        assert re.fullmatch(r"[\dx+*()-]+", text), text
        return eval(text, {"x": 1000})

    for pair in bench.make_pairs(2200, seed=5):
        if pair.kind == "polynomials":
            assert (value(pair.gold) == value(pair.answer)) == pair.equal, pair


def test_a_wrong_grader_gets_no_speed(bench, capsys):
    pairs = bench.make_pairs(110, seed=0)
    truth = lambda pair: pair.equal
    report = bench.report_pairs(pairs, bench.grade(pairs, 55, truth, truth), shown=5)
    assert (report["both_equal"], report["both_different"], report["disagreements"]) == (55, 55, [])
    for wrong in (lambda pair: True, lambda pair: False, lambda pair: pair.equal and pair.kind != "sets"):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="no speed is reported"):
            bench.report_pairs(pairs, bench.grade(pairs, 55, wrong, truth), shown=5)
        assert "pairs/s" not in capsys.readouterr().out


def test_disagreements_say_who_is_right(bench):
    pairs = [
        bench.Pair("integers", "1", "1.0", True),
        bench.Pair("sets", "2", "3", False),
        bench.Pair("sets", "4", "4", True),
    ]
    graded = bench.Graded([True, False, True], [False, True, True], [0.5], [1.0])
    report = bench.report_pairs(pairs, graded, shown=1)
    assert report["only_ours_equal"] == report["only_theirs_equal"] == report["both_equal"] == 1
    assert [d["right"] for d in report["disagreements"]] == ["ours", "ours"]
    kinds = {row["kind"]: row for row in report["kinds"]}
    assert kinds["integers"]["theirs_refuses_equal"] == kinds["sets"]["theirs_accepts_different"] == 1
    assert report["x"] == 2.0 and report["ours_pairs_s"] == 6.0


def test_the_hang_list_refuses_an_accepted_or_a_late_answer(bench):
    row = {
        "gold": "7", "answer": "x", "equal": False, "ours_s": 0.1, "ours_accepts": False, "theirs_s": 9.0,
        "theirs_accepts": None, "theirs_killed": True,
    }  # fmt: skip
    assert bench.report_hangs([row, {**row, "equal": True, "ours_accepts": True}])["theirs_killed"] == 2
    with pytest.raises(SystemExit, match="accepts"):
        bench.report_hangs([{**row, "ours_accepts": True}])
    with pytest.raises(SystemExit, match=r"2\.600 s on one answer"):
        bench.report_hangs([row, {**row, "ours_s": 2.6}])


@needs_peer
def test_a_process_that_does_not_answer_is_killed(bench):
    guarded = bench.Guarded(guard_s=0.3)
    try:
        verdict, seconds = guarded.grade("7", "9^{9^{9^{9}}}")
        assert verdict is None and 0.3 <= seconds < 5
        guarded.guard_s = 60
        assert guarded.grade("7", "7.0")[0] is True and guarded.grade("7", "8")[0] is False
    finally:
        guarded.close()


@needs_peer
def test_quick_run_prints_one_json_object_last():
    command = [sys.executable, str(BENCH / "vs_math_verify.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == "vs_math_verify" and result["math-verify"] and result["commit"]
    mix, hangs = result["mix"], result["hang_list"]
    assert (
        mix["pairs"]
        == 110
        == sum(mix[k] for k in ("both_equal", "both_different", "only_ours_equal", "only_theirs_equal"))
    )
    assert sum(row["ours_right"] for row in mix["kinds"]) == 110
    assert mix["x"] > 1 and hangs["pairs"] == 2 and hangs["ours_worst_s"] <= hangs["deadline_s"] + 0.5


def test_missing_package_is_one_sentence():
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(BENCH)!r}); sys.argv = ['vs_math_verify', '--quick']\n"
        "sys.modules['math_verify'] = None\n"
        f"runpy.run_path({str(BENCH / 'vs_math_verify.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0 and "pip install math-verify" in done.stderr and "Traceback" not in done.stderr
