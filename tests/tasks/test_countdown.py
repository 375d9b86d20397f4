# ruff: noqa: RUF001 - look-alike characters are test inputs here
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymathrl.errors import UserError
from pymathrl.tasks.countdown import (
    Generator,
    countdown,
    countdown_file,
    generate,
    problem_key,
    solution_text,
    solve,
)
from pymathrl.tasks.expression import Binary, Literal, canonical, evaluate, literals, parse, render
from pymathrl.tasks.holdout import is_held_out
from pymathrl.tasks.problem import Problem
from pymathrl.tasks.prompt_style import noted

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def problem(nums, target):
    return Problem(0, f"{' '.join(map(str, nums))} -> {target}", str(target), {"nums": tuple(nums), "target": target})


def graded(answer, nums, target, **options):
    return countdown(**options).grade(problem(nums, target), f"work</think>\n<answer>{answer}</answer>")


# ---- generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "index", "nums", "target", "solution"),
    [
        (0, 0, [72, 13, 46, 56], 95, "((56-46)+13)+72"),
        (0, 1, [73, 98, 9], 19, "(98+73)/9"),
        (0, 2, [66, 47, 88, 80], 27, "(66+88)-(47+80)"),
        (0, 3, [5, 40, 1], 45, "1*(5+40)"),
        (7, 0, [92, 25, 82], 15, "82-(92-25)"),
    ],
)
def test_generator_check_values(seed, index, nums, target, solution):
    got_nums, got_target, tree = generate(Generator(), seed, index)
    assert (got_nums, got_target, render(tree)) == (nums, target, solution)


@pytest.mark.parametrize("options", [{}, {"nmin": 1, "nmax": 6, "lo": 0, "hi": 20, "tlo": 0, "thi": 1000}])
def test_generated_problems_keep_their_promises(options):
    task, rng = countdown(**options), random.Random(0)
    bounds = {"nmin": 3, "nmax": 4, "lo": 1, "hi": 99, "tlo": 10, "thi": 100} | options
    for index in range(200):
        one = task.train(index, 3)
        nums, target = one.meta["nums"], one.meta["target"]
        assert bounds["nmin"] <= len(nums) <= bounds["nmax"]
        assert all(bounds["lo"] <= value <= bounds["hi"] for value in nums)
        assert bounds["tlo"] <= target <= bounds["thi"]
        assert (one.uid, one.answer, one.question) == (index, str(target), problem(nums, target).question)
        assert evaluate(parse(one.meta["solution"])) == target
        assert task.grade(one, task.solution(one, rng)).correct
    json.dumps(dict(one.meta))  # plain data


def test_streams_are_pure_functions():
    one, other = countdown(), countdown()
    forward = [one.train(index, 5) for index in range(50)]
    assert forward == [other.train(index, 5) for index in reversed(range(50))][::-1]
    assert forward != [one.train(index, 6) for index in range(50)]
    assert one.test(20) == other.test(40)[:20]
    assert [p.uid for p in one.test(20)] == list(range(20))


def keys(problems):
    return {problem_key(p.meta["nums"], p.meta["target"]) for p in problems}


def test_test_set_is_fixed():
    """Figures measured on it stay comparable."""
    expected = ["21 31 11 -> 41", "18 1 58 17 -> 92", "20 68 5 -> 32", "19 38 49 31 -> 99"]
    assert [p.question for p in countdown().test(4)] == expected


def test_key_ignores_the_order_of_numbers():
    assert problem_key([79, 17, 60], 36) == problem_key([17, 60, 79], 36) == "countdown:17,60,79->36"


def test_train_and_test_never_overlap():
    task = countdown()
    test = task.test()
    assert len(keys(test)) == len(test) == 1024
    for seed in (0, 1, 2_718_281_828):
        assert not keys(test) & keys(task.train(index, seed) for index in range(1500))


def test_train_and_test_never_overlap_where_problems_are_few():
    """Ranges so narrow that a stream without the hold-out meets every test problem."""
    options = {"nmin": 2, "nmax": 2, "lo": 1, "hi": 12, "tlo": 1, "thi": 20}
    task = countdown(**options)
    test = keys(task.test())
    raw = (generate(Generator(**options), 0, index) for index in range(6000))
    assert test and test <= {problem_key(nums, target) for nums, target, _ in raw}
    assert not test & keys(task.train(index, 0) for index in range(3000))
    # A model trained with other ranges has not met them either: the hold-out does not depend on the options.
    wide = countdown(**options | {"hi": 30, "nmax": 3})
    assert not test & keys(wide.train(index, 1) for index in range(3000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nmin": 5}, "1 <= nmin <= nmax <= 12, got nmin=5, nmax=4"),
        ({"nmax": 13}, "nmax"),
        ({"lo": -1}, "lo"),
        ({"tlo": 101}, "tlo=101, thi=100"),
        ({"format_score": 1.0}, "format_score"),
        ({"format_score": float("nan")}, "format_score"),
        ({"compat": "tinyzero"}, "'exact' or 'rover', got 'tinyzero'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match="countdown: ") as error:
        countdown(**options)
    assert message in str(error.value)


def test_ranges_that_cannot_be_met_end_with_a_sentence():
    with pytest.raises(UserError, match=r"no training problem .* widen"):
        countdown(nmin=2, nmax=2, hi=3, tlo=50).train(0, 0)


# ---- grading -----------------------------------------------------------------------------------------------------

CORRECT = [
    ("(79-60)+17", [79, 17, 60], 36),
    ("17 + 79 - 60", [79, 17, 60], 36),
    ("(98+73)/9", [73, 98, 9], 19),
    ("1/3*3*7", [1, 3, 3, 7], 7),  # in floating point 1/3*3 is luck
    ("8/(3-8/3)", [3, 3, 8, 8], 24),  # needs exact rationals
    ("-(2-5)", [2, 5], 3),
    ("+2+3", [2, 3], 5),
    ("2×3", [2, 3], 6),
    ("7−4", [7, 4], 3),
    ("9÷3", [9, 3], 3),
    ("05*2", [5, 2], 10),
    ("2+2", [2, 2], 4),
    ("99*99*99*99", [99, 99, 99, 99], 96_059_601),
]
# Each would count as correct to a grader with the named weakness.
WORTH_NOTHING = [
    ("60-17", [79, 17, 60], 43, "a number unused"),
    ("79-60+17+0", [79, 17, 60], 36, "a number added"),
    ("2+2", [2, 3], 4, "a number used twice"),
    ("37", [3, 7], 37, "digits glued"),
    ("3 7", [3, 7], 37, "spaces dropped"),
    ("3.7*10", [3, 7, 10], 37, "numbers found by digits"),
    ("2**3", [2, 3], 8, "evaluated as code"),
    ("7//2", [7, 2], 3, "evaluated as code"),
    ("5%3", [5, 3], 2, "evaluated as code"),
    ("2^3", [2, 3], 8, "evaluated as code"),
    ("5!", [5], 120, "factorial"),
    ("1e2", [1, 2], 100, "float literals"),
    ("0x10", [0, 10], 16, "hexadecimal literals"),
    ("2_0+1", [2, 0, 1], 21, "underscores in literals"),
    ("2*3=6", [2, 3], 6, "text after the expression"),
    ("2+3 # ok", [2, 3], 5, "comments"),
    ("36", [79, 17, 60], 36, "only the value checked"),
    ("79-60+17 = 36", [79, 17, 60], 36, "text after the expression"),
    ("2²", [2], 4, "digits of other scripts"),
    ("1/(3-3)", [1, 3, 3], 0, "division by zero"),
    ("(2+3", [2, 3], 5, "repaired brackets"),
    ("2+3)", [2, 3], 5, "prefix parsed"),
    ("", [2, 3], 5, "empty"),
    ('__import__("os").abort()', [2, 3], 5, "evaluated as code"),
    ("9" * 10**5, [9], 9, "length"),
    ("(" * 200 + "2+3" + ")" * 200, [2, 3], 5, "recursion"),
]


@pytest.mark.parametrize(("answer", "nums", "target"), CORRECT)
def test_correct(answer, nums, target):
    grade = graded(answer, nums, target)
    assert (grade.reward, grade.correct, grade.reason) == (1.0, True, "correct")
    assert (grade.answer, grade.canonical) == (answer, canonical(answer))


@pytest.mark.parametrize(("answer", "nums", "target", "weakness"), WORTH_NOTHING, ids=lambda value: str(value)[:20])
def test_traps_earn_nothing(answer, nums, target, weakness):
    grade = graded(answer, nums, target)
    assert (grade.reward, grade.correct) == (0.0, False), weakness
    assert grade.reason


def test_well_formed_but_wrong_earns_the_format_score():
    assert graded("79+60+17", [79, 17, 60], 36).reward == 0.1
    assert graded("79+60+17", [79, 17, 60], 36).reason == "wrong value 156"
    assert graded("79+60+17", [79, 17, 60], 36, format_score=0.25).reward == 0.25
    assert graded("79+60+17", [79, 17, 60], 36, format_score=0.0).reward == 0.0
    assert not graded("79+60+17", [79, 17, 60], 36, format_score=0.25).correct


def test_subset_on_request():
    assert graded("60-17", [79, 17, 60], 43, allow_subset=True).correct
    assert graded("60-17-17", [79, 17, 60], 26, allow_subset=True).reward == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<answer>(79-60)+17</answer>", 1.0),
        ("a\nb</think>\n<answer>\n(79-60)+17\n</answer>\n\n", 1.0),
        ("<answer>(79-60)+17</answer></think>so", 0.0),  # thoughts are not answers
        ("<answer>1</answer></think><answer>(79-60)+17</answer>", 1.0),
        ("<answer>(79-60)+17</answer><answer>79+60+17</answer>", 0.1),  # the last one counts
        ("<answer>79+60+17</answer><answer>(79-60)+17</answer>", 1.0),
        ("(79-60)+17", 0.0),
        ("<answer>(79-60)+17", 0.0),
        ("", 0.0),
    ],
)
def test_where_the_answer_is_looked_for(response, reward):
    assert countdown().grade(problem([79, 17, 60], 36), response).reward == reward


@pytest.mark.parametrize(
    ("response", "nums", "target", "reward"),
    [
        ("<answer>(79-60)+17</answer>", [79, 17, 60], 36, 1.0),
        ("thought\n<answer>(79-60)+17</answer>", [79, 17, 60], 36, 1.0),
        ("<answer>(79-60)+17</answer></think>", [79, 17, 60], 36, 1.0),
        ("<answer>(79-60)+17</answer>\n", [79, 17, 60], 36, 0.0),  # only the last line is read
        ("<answer>(79-60)\n+17</answer>", [79, 17, 60], 36, 0.0),
        ("<answer>60-17</answer>", [79, 17, 60], 43, 0.1),  # any closed tag earns the format score
        ("<answer>2*3=6</answer>", [2, 3], 6, 0.1),
        ("<answer>2×3</answer>", [2, 3], 6, 0.1),
        ("<answer>1/(3-3)</answer>", [1, 3, 3], 0, 0.1),
        ("<answer>10+1/200000</answer>", [10, 1, 200_000], 10, 1.0),  # 5e-6 off, within its tolerance
        ("<answer>2**3</answer>", [2, 3], 8, 0.1),  # unlike the original: no power,
        ("<answer>7//2</answer>", [7, 2], 3, 0.1),  # no floor division,
        ("<answer>3.7*10</answer>", [3, 7, 10], 37, 0.1),  # no decimal point
        ("no tag", [2, 3], 5, 0.0),
    ],
)
def test_rover_compatibility(response, nums, target, reward):
    grade = countdown(compat="rover").grade(problem(nums, target), response)
    assert (grade.reward, grade.correct) == (reward, reward == 1.0)


def test_exact_mode_has_no_tolerance():
    assert not graded("10+1/200000", [10, 1, 200_000], 10).correct


PIECES = st.sampled_from(
    ["<answer>", "</answer>", "<think>", "</think>", "79", "17", "60", "+", "-", "(", ")", "\n", "/0"]
)


@given(st.text(st.characters(exclude_categories=())) | st.lists(PIECES, max_size=30).map("".join))
def test_grading_never_raises(text):
    for compat in ("exact", "rover"):
        for response in (text, f"<answer>{text}</answer>"):
            grade = countdown(compat=compat).grade(problem([79, 17, 60], 36), response)
            assert 0.0 <= grade.reward <= 1.0 and grade.correct == (grade.reward == 1.0)


def test_verifier_cases_file():
    path = SHARED / "verifier_cases" / "countdown.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/verifier_cases/countdown.jsonl is not beside this repository")
    cases = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(cases) == 35
    for case in cases:
        assert graded(case["answer"], case["nums"], case["target"]).correct == bool(case["expected"]), case


# ---- solutions ---------------------------------------------------------------------------------------------------


def all_trees(nums):
    if len(nums) == 1:
        yield Literal(nums[0])
    for cut in range(1, len(nums)):
        for left, right in itertools.product(all_trees(nums[:cut]), all_trees(nums[cut:])):
            for op in "+-*/":
                yield Binary(op, left, right)


def integer_value(tree):
    """The value if every step is a nonnegative integer, else None."""
    if isinstance(tree, Literal):
        return tree.value
    if integer_value(tree.left) is None or integer_value(tree.right) is None:
        return None
    value = evaluate(tree)
    return int(value) if value is not None and value >= 0 and value.denominator == 1 else None


@pytest.mark.parametrize(
    ("nums", "target"),
    [
        ([3, 5, 7], 22),
        ([5, 40, 1], 45),
        ([2, 2, 4], 1),
        ([0, 3, 3], 0),
        ([1, 2, 3, 4], 24),
        ([9, 3, 3, 0], 3),
        ([4], 4),
    ],
)
def test_solve_finds_exactly_the_distinct_solutions(nums, target):
    trees = (tree for order in set(itertools.permutations(nums)) for tree in all_trees(order))
    expected = {canonical(tree) for tree in trees if integer_value(tree) == target}
    found = solve(nums, target)
    assert set(found) == expected
    for form, tree in found.items():
        assert canonical(tree) == form and integer_value(tree) == target
        assert Counter(literals(tree)) == Counter(nums)
    assert set(solve(nums, target, limit=2)) <= expected
    assert len(solve(nums, target, limit=2)) == min(2, len(expected))
    assert set(solve(nums, target, rng=random.Random(1))) == expected


def test_unsolvable():
    assert solve([1, 1], 7) == {}
    assert solve([4], 5) == {}


def test_solution_text():
    assert solution_text(parse("(79-60)+17")) == "79-60=19,19+17=36</think><answer>(79-60)+17</answer>"
    assert solution_text(parse("36")) == "</think><answer>36</answer>"
    task = countdown()
    only = task.solution(problem([79, 17, 60], 36), random.Random(0))
    assert only in {
        "79-60=19,19+17=36</think><answer>(79-60)+17</answer>",
        "79+17=96,96-60=36</think><answer>(79+17)-60</answer>",
        "60-17=43,79-43=36</think><answer>79-(60-17)</answer>",
    }


def test_solutions_cover_all_distinct_forms_evenly():
    task, one, rng = countdown(), problem([5, 40, 1], 45), random.Random(0)
    counts = Counter(task.grade(one, task.solution(one, rng)).canonical for _ in range(600))
    assert set(counts) == set(solve([5, 40, 1], 45))
    assert len(counts) == 6 and min(counts.values()) > 60  # 100 expected, standard deviation 9


def test_solution_of_more_numbers():
    task, rng = countdown(nmin=5, nmax=8), random.Random(0)
    for index in range(20):
        one = task.train(index, 0)
        assert task.grade(one, task.solution(one, rng)).correct
    row = problem([1, 2, 3, 4, 5, 6], 21)
    assert len({task.solution(row, rng) for _ in range(5)}) > 1
    for impossible in (problem([1, 1], 7), problem([3, 3, 8, 8], 24), problem([1] * 7, 7)):
        with pytest.raises(UserError, match="cannot write a solution"):
            task.solution(impossible, rng)


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_prompts():
    task, one = countdown(), problem([79, 17, 60], 36)
    assert task.prompt(one, "compact") == "79 17 60 -> 36\n<think>"
    chat, plain = task.prompt(one, "chat"), task.prompt(one, "plain")
    assert "[79, 17, 60]" in chat and "36" in chat and "<answer>" in chat and "Assistant" not in chat
    assert chat in plain and plain.endswith("\n<think>") and "\nAssistant: " in plain
    with pytest.raises(UserError, match="did you mean 'compact'"):
        task.prompt(one, "compct")


def test_other_wordings_permute_the_numbers():
    task, rng = countdown(), random.Random(0)
    one = task.train(5, 0)
    seen = {task.reword(one, rng).question for _ in range(200)}
    assert one.question not in seen and len(seen) > 3
    other = task.reword(one, rng)
    assert sorted(other.meta["nums"]) == sorted(one.meta["nums"]) and other.uid == one.uid
    assert {k: v for k, v in other.meta.items() if k != "nums"} == {k: v for k, v in one.meta.items() if k != "nums"}
    assert other.question == f"{' '.join(map(str, other.meta['nums']))} -> {one.meta['target']}"
    assert task.reword(problem([5, 5], 10), rng).meta["nums"] == (5, 5)  # nothing to permute


def test_a_hint_stands_below_the_question():
    task, one = countdown(), problem([79, 17, 60], 36)
    assert noted(task, one, "compact", "79-60=19,") == "79 17 60 -> 36\n<think>79-60=19,"
    assert noted(task, one, "chat", "Hint: add.") == task.prompt(one, "chat") + "\nHint: add."
    plain = noted(task, one, "plain", "Hint: add.")
    assert plain.replace("\nHint: add.", "") == task.prompt(one, "plain")
    assert plain.index("Hint: add.") < plain.index("\nAssistant:")


def test_compact_text_stays_in_its_alphabet():
    task, rng = countdown(), random.Random(0)
    for index in range(100):
        one = task.train(index, 0)
        text = task.prompt(one, "compact") + task.solution(one, rng)
        for tag in ("<think>", "</think>", "<answer>", "</answer>"):
            text = text.replace(tag, "")
        assert set(text) <= set("0123456789+-*/()=,> \n")


# ---- files -------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_file_is_split_once_and_visited_in_shuffled_epochs(tmp_path):
    rows = [{"nums": [a, b, 2], "target": a + b + 2} for a in range(10, 20) for b in range(20, 26)]
    path = write(tmp_path / "a.jsonl", [*rows, *rows[:10]])
    task = countdown_file(path)
    test = task.test()
    held_out = [row for row in [*rows, *rows[:10]] if is_held_out(problem_key(row["nums"], row["target"]))]
    assert [list(p.meta["nums"]) for p in test] == [row["nums"] for row in held_out] != []
    count = 70 - len(test)
    epochs = [[task.train(epoch * count + i, seed=4) for i in range(count)] for epoch in range(3)]
    orders = [[p.meta["id"] for p in epoch] for epoch in epochs]
    assert len(set(orders[0])) == count
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]
    assert [p.uid for epoch in epochs for p in epoch] == list(range(3 * count))
    assert not keys(test) & keys(epochs[0])
    assert [p.meta["id"] for p in (countdown_file(path).train(i, seed=4) for i in range(count))] == orders[0]
    assert [p.meta["id"] for p in (task.train(i, seed=5) for i in range(count))] != orders[0]


def test_file_with_every_row_for_evaluation(tmp_path):
    rows = [
        {"nums": [3, 4], "target": 12, "id": "a", "hint": "Multiply."},
        {"nums": [4, 3], "target": 12},
        {"nums": [1, 1], "target": 9, "id": 7},
    ]
    task = countdown_file(write(tmp_path / "b.jsonl", rows), split="all")
    assert [p.meta.get("hint") for p in task.test()] == ["Multiply.", None, None]
    assert [p.meta["id"] for p in task.test()] == ["a", "b.jsonl:2", "7"]  # repeated and unsolvable rows count too
    assert [p.question for p in task.test(2)] == ["3 4 -> 12", "4 3 -> 12"]
    assert len(task.test(99)) == 3
    with pytest.raises(UserError, match="no row is left to train on"):
        task.train(0, 0)


def test_small_file_has_both_sides(tmp_path):
    for size in (2, 3, 5):
        rows = [{"nums": [i, 1], "target": i + 1} for i in range(size)]
        task = countdown_file(write(tmp_path / "c.jsonl", rows))
        assert task.test() and not keys(task.test()) & keys(task.train(i, 0) for i in range(size))
    with pytest.raises(UserError, match="no row is left"):
        countdown_file(write(tmp_path / "d.jsonl", rows[:1])).train(0, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"nums": [1, 2]}', "field 'target' must be an integer, got no such field among 'nums'"),
        ('{"target": 3}', "field 'nums' must be a list of 1 to 12 integers in 0..1000000000, got no such field"),
        ('{"nums": [], "target": 3}', "field 'nums' must be a list of 1 to 12 integers in 0..1000000000, got []"),
        ('{"nums": "1 2", "target": 3}', "field 'nums' must be a list"),
        ('{"nums": [1, 2.0], "target": 3}', "got [1, 2.0]"),
        ('{"nums": [1, true], "target": 3}', "got [1, true]"),
        ('{"nums": [1, -2], "target": 3}', "got [1, -2]"),
        ('{"nums": [1, NaN], "target": 3}', "got [1, NaN]"),
        ('{"nums": [1, [2]], "target": 3}', "got [1, [2]]"),
        ('{"nums": [1, 1000000001], "target": 3}', "1000000001]"),
        ('{"nums": [1,1,1,1,1,1,1,1,1,1,1,1,1], "target": 3}', "field 'nums' must be"),
        ('{"nums": [1, 2], "target": "3"}', "field 'target' must be an integer, got \"3\""),
        ('{"nums": [1, 2], "target": 3.0}', "got 3.0"),
        ('{"nums": [1, 2], "target": true}', "got true"),
        ('{"nums": [1, 2], "target": null}', "got null"),
        ('{"nums": [1, 2], "target": 3, "id": ""}', "field 'id' must be a non-empty string or an integer, got \"\""),
        ('{"nums": [1, 2], "target": 3, "id": [1]}', "field 'id' must be"),
        ('{"nums": [1, 2], "target": 3, "id": "x"}', "field 'id' must be unique (line 1 has it too), got \"x\""),
        ('{"nums": [1, 2], "target": 3, "hint": " "}', "field 'hint' must be a text that is not empty"),
        ('{"nums": [1, 2], "target": 3', "expected a JSON object"),
    ],
)
def test_broken_rows(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"nums": [5, 6], "target": 30, "id": "x"}}\n\n{row}\n', "utf-8")
    with pytest.raises(UserError) as error:
        countdown_file(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and message in str(error.value)


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match="split must be 'hash' or 'all', got 'test'"):
        countdown_file(write(tmp_path / "e.jsonl", [{"nums": [1], "target": 1}]), split="test")


def test_public_rover_test_set():
    path = SHARED / "countdown" / "test.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/countdown/test.jsonl is not beside this repository")
    problems = countdown_file(path, split="all").test()
    assert Counter(len(p.meta["nums"]) for p in problems) == {3: 490, 4: 534}
    assert all(solve(p.meta["nums"], p.meta["target"], limit=1) for p in problems)
