"""python -m pymathrl.verify: single pairs, files, what they should give, and input that cannot be used."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pymathrl.verify import Policy
from pymathrl.verify.command import POLICY_HELP, main

HERE = Path(__file__).parent


def run(capsys, *argv):
    """(exit code, lines of standard output, text of standard error)"""
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def cases(tmp_path, *rows):
    path = tmp_path / "cases.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_pair(capsys):
    code, (line,), _ = run(capsys, "--gold", "\\frac12", "--answer", "0.5")
    assert code == 0 and line.split() == ["equal", "exact", "equal", "\\frac12", "|", "0.5"]
    code, (line,), _ = run(capsys, "--gold", "2", "--answer", "3")
    assert code == 1 and line.startswith("different  exact     different values")


def test_several_golds_and_a_hard_one(capsys):
    code, (line,), _ = run(capsys, "--gold", "2", "--gold", "1", "--answer", "\\sin^2 x+\\cos^2 x")
    assert code == 0 and line.split()[:2] == ["equal", "symbolic"]


def test_a_response(capsys):
    assert run(capsys, "--gold", "4", "--response", "so #### 4", "--mode", "gsm8k")[0] == 0
    assert run(capsys, "--gold", "4", "--response", "so 4")[:2] == (
        1,
        ["different  extract   no answer                     4 | -"],
    )
    assert run(capsys, "--response", "is \\boxed{a\nb}")[:2] == (
        0,
        ["extracted  extract   mode boxed                    a\\nb"],
    )
    assert run(capsys, "--response", "is 4")[0] == 1


def test_options_of_the_policy(capsys):
    assert run(capsys, "--gold", "3", "--answer", "3.001")[0] == 1
    assert run(capsys, "--gold", "3", "--answer", "3.001", "--abs-tol", "1e-2")[0] == 0
    assert run(capsys, "--gold", "0.5", "--answer", "2/4", "--require-form", "reduced")[0] == 1
    assert run(capsys, "--gold", "0.25", "--answer", "25\\%", "--no-percent")[0] == 1
    assert {f.name for f in fields(Policy)} == set(POLICY_HELP)


def test_a_file(tmp_path, capsys):
    path = cases(
        tmp_path,
        {"gold": "1", "answer": "1.0", "expected": True, "note": "is ignored"},
        "",
        {"gold": ["1", "2"], "response": "\\boxed{2}", "expected": 1},
        {"gold": "b", "answer": "(B)", "choice": True, "expected": 1},
        {"gold": "7", "response": "<answer>7</answer>", "mode": "tag", "expected": 0},
        {"response": "\\boxed{9}", "expected": "9"},
        {"response": "9", "expected": None},
        {"gold": "3", "answer": "4"},
    )
    code, lines, _ = run(capsys, "--file", path, "--json", tmp_path / "new" / "out.jsonl")
    assert code == 1
    assert [line.split()[:2] for line in lines[:7]] == [
        ["1", "equal"], ["3", "equal"], ["4", "equal"], ["5", "equal"], ["6", "extracted"], ["7", "no"],
        ["8", "different"],
    ]  # fmt: skip
    assert [i for i, line in enumerate(lines[:7]) if line.endswith("<- not as expected")] == [3]
    assert lines[-1] == "as expected: 5 of 6; not in line 5" and lines[7].startswith("7 cases in ")
    rows = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [row.get("agrees") for row in rows] == [True, True, True, False, True, True, None]
    assert rows[1] == {"line": 3, "gold": ["1", "2"], "equal": True, "mode": "boxed", "answer": "2", "stage": "exact",
                       "reason": "equal", "agrees": True}  # fmt: skip
    assert rows[5]["answer"] is None


def test_the_tables_are_as_expected(capsys):
    code, lines, _ = run(capsys, "--file", HERE / "extraction.jsonl")
    assert (code, lines[-1]) == (0, "as expected: 49 of 49")
    code, lines, _ = run(capsys, "--file", HERE / "equality.jsonl", "--workers", "2", "--deadline", "60")
    assert code == 0 and lines[-1] == f"as expected: {len(lines) - 3} of {len(lines) - 3}"


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "expected --gold with --answer or with --response, --response alone, or --file"),
        (["--gold", "1"], "expected --gold with --answer"),
        (["--answer", "1"], "--answer: expected a --gold"),
        (["--gold", "1", "--answer", "1", "--response", "1"], "expected --gold with --answer or with --response"),
        (["--gold", "1", "--file", "x"], "--file: its rows hold golds and answers"),
        (["--file", "/nowhere.jsonl"], "/nowhere.jsonl: cannot read the file"),
        (["--response", "x", "--mode", "box"], "invalid choice: 'box'"),
        (["--gold", "1", "--answer", "1", "--workers", "0"], "expected --workers >= 1"),
        (["--gold", "1", "--answer", "1", "--deadline", "inf"], "--deadline > 0 and finite"),
        (["--gold", "1", "--answer", "1", "--abs-tol", "x"], "--abs-tol: expected float, got 'x'"),
        (["--gold", "1", "--answer", "1", "--abs-tol", "-1"], "--abs-tol: "),
        (["--gold", "1", "--answer", "1", "--require-form", "nice"], "--require-form: "),
        (["--gold", "1", "--answer", "1", "--json", "/proc/no"], "write the verdicts"),
    ],
)
def test_a_command_line_that_cannot_be_used(argv, words, capsys):
    code, _, err = run(capsys, *argv)
    assert code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "row, words",
    [
        ("{", "expected a JSON object"),
        ({"gold": 1, "answer": "1"}, "field 'gold' must be a text, or a list of texts, got 1"),
        ({"gold": [], "answer": "1"}, "field 'gold' must be a text"),
        ({"gold": ["1", 2], "answer": "1"}, "field 'gold' must be"),
        ({"answer": "1"}, "field 'gold' must be a text, or a list of texts, got no such field"),
        ({"gold": "1"}, "expected either 'answer' or 'response', got gold"),
        ({"gold": "1", "answer": "1", "response": "1"}, "expected either 'answer' or 'response'"),
        ({"gold": "1", "answer": 1}, "field 'answer' must be a text, got 1"),
        ({"gold": "1", "response": "1", "mode": "box"}, "field 'mode' must be one of boxed, tag"),
        ({"gold": "1", "answer": "1", "expected": "yes"}, "field 'expected' must be true, false, 1 or 0"),
        ({"response": "1", "expected": 1}, "field 'expected' must be the text that is extracted, or null"),
        ({"gold": "1", "answer": "1", "choice": 1}, "field 'choice': expected true or false, got 1"),
        ({"gold": "1", "answer": "1", "abs_tol": "x"}, "field 'abs_tol': expected float"),
        ({"gold": "1", "answer": "1", "choice": True, "require_form": "nice"}, "field 'require_form': "),
    ],
)
def test_a_defect_of_a_file_is_named_with_its_line(row, words, tmp_path, capsys):
    path = cases(tmp_path, {"gold": "1", "answer": "1"}, row)
    code, out, err = run(capsys, "--file", path)
    assert code == 2 and not out
    assert err.startswith(f"error: {path}, line 2: ") and words in err, err


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "pymathrl.verify", "--gold", "1", "--answer", "2"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "") and done.stdout.startswith("different")
    done = subprocess.run([sys.executable, "-m", "pymathrl.verify", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Exit code" in done.stdout and "n% may be" in done.stdout
