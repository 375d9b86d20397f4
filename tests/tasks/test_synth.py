"""Generated families: answers worked out again from the words of the question, knobs, what is held out and refused."""

import ast
import random
import re
from fractions import Fraction
from itertools import combinations_with_replacement, pairwise, permutations, product

import pytest

from pymathrl.errors import UserError
from pymathrl.models import ModelConfig, char_tokenizer, new_policy, save
from pymathrl.prompt import check_spelling
from pymathrl.tasks import load_task, task_options
from pymathrl.tasks.arithmetic import problem_key
from pymathrl.tasks.families import FAMILIES, THINGS, polynomial
from pymathrl.tasks.holdout import is_held_out
from pymathrl.train import main
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy

SPELLED = ("chain_sum", "fraction_ops", "mixed_arith", "sequence_next")  # by the built-in model's tokenizer
# small enough to be counted by brute force
SMALL = {"binomial_count": {"digits": 1}, "gcd_lcm": {"digits": 2}, "count_divisors": {"digits": 3}}


def integers(text):
    return [int(n) for n in re.findall(r"-?\d+", text)]


def value(text, x=Fraction(0)):
    """Of a formula in x, in Python's arithmetic of fractions."""
    text = re.sub(r"(\d|\))(?=[x(])|(x)(?=\()", r"\1\2*", text.strip("$").replace("^", "**"))
    return eval(re.sub(r"(?<!\*\*)\b\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction, "x": x})


def next_term(values):
    """By the first rule that the terms obey."""
    if all(a * values[1] == b * values[0] for a, b in pairwise(values)):
        return values[-1] * Fraction(values[1], values[0])
    if all(a + b == c for a, b, c in zip(values, values[1:], values[2:], strict=False)):
        return values[-1] + values[-2]
    rows = [values]
    for _ in range(3):
        rows.append([b - a for a, b in pairwise(rows[-1])])
        if len(set(rows[-1])) == 1:
            return sum(row[-1] for row in rows)
    twos = [b - a for a, b in zip(values, values[2:], strict=False)]
    assert len(set(twos[::2])) == len(set(twos[1::2])) == 1
    return values[-2] + twos[-2]


def chosen(question):
    """(how many there are, how many of them are chosen)."""
    a, b = integers(question)
    return (b, a) if "chosen for a team" in question else (a, b) if "words" in question else (a + b, a)


def ways(question):
    n, k = chosen(question)
    return sum(sum(bits) == k for bits in product((0, 1), repeat=n))


def price(question):
    start, *_ = integers(question)
    at = Fraction(start)
    for word, percent in re.findall(r"(raised|lowered) by (\d+) percent", question):
        at += at * int(percent) * (1 if word == "raised" else -1) / 100
    return at


def remainder(question):
    base, exponent, modulus = integers(question)
    at = 1
    for _ in range(exponent):
        at = at * base % modulus
    return at


def shared(question):
    numbers = integers(question)
    if "divisor" in question:
        return max(d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers))
    multiple = max(numbers)
    while any(multiple % n for n in numbers):
        multiple += max(numbers)
    return multiple


SOLVED = {
    "chain_sum": value, "mixed_arith": value, "fraction_ops": value, "gcd_lcm": shared, "mod_pow": remainder,
    "count_divisors": lambda q: sum(integers(q)[0] % d == 0 for d in range(1, integers(q)[0] + 1)),
    "percent_word": price, "sequence_next": lambda q: next_term(integers(q)), "binomial_count": ways,
}  # fmt: skip


def problems(family, count=60, **options):
    task = load_task(f"synth:{family}", **options)
    return task, [task.train(index, 3) for index in range(count)]


def boxed(answer):
    return f"So it is \\boxed{{{answer}}}."


@pytest.mark.parametrize("family", SOLVED)
def test_a_number_is_what_the_question_asks_for(family):
    _, drawn = problems(family, **SMALL.get(family, {}), **({"depth": 3} if family == "sequence_next" else {}))
    for problem in drawn:
        assert Fraction(problem.answer) == SOLVED[family](problem.question), problem
    assert len({p.answer for p in drawn}) > 5


def test_the_other_answers_are_what_the_question_asks_for():
    for problem in problems("linear_eq", depth=2)[1]:
        left, right = problem.question.removeprefix("Solve $").removesuffix("$ for $x$.").split(" = ")
        gap = [value(left, x) - value(right, x) for x in (Fraction(problem.answer), Fraction(problem.answer) + 1)]
        assert gap[0] == 0 != gap[1]
    for problem in problems("quadratic_roots")[1]:
        (equation,) = re.findall(r"\$(.*) = 0\$", problem.question)
        roots = [Fraction(root) for root in problem.answer.split(", ")]
        assert len(set(roots)) == 2 and [value(equation, x) for x in roots] == [0, 0]
    for problem in problems("poly_expand", terms=4)[1]:
        (brackets,) = re.findall(r"\$(.*)\$", problem.question)
        assert all(value(brackets, Fraction(x)) == value(problem.answer, Fraction(x)) for x in range(-3, 3))
    for problem in problems("base_convert", digits=5)[1]:
        given, old, new = re.findall(r"Write (\w+), a number in base (\d+), in base (\d+)\.", problem.question)[0]
        assert int(given, int(old)) == int(problem.answer, int(new)) and given != problem.answer


def test_text_of_a_polynomial():
    for coefficients, text in (([-2, 1, 3], "3x^2 + x - 2"), ([5, -1], "-x + 5"), ([0, 0, -1], "-x^2"), ([0], "0")):
        assert polynomial(coefficients) == text


def test_every_part_of_mixed_arith_is_a_whole_number():
    operations = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
    seen = set()
    for problem in problems("mixed_arith", depth=4)[1]:
        for node in ast.walk(ast.parse(problem.question, mode="eval")):
            if isinstance(node, ast.BinOp):
                assert value(ast.unparse(node)).denominator == 1
                seen.add(operations[type(node.op)])
    assert seen == set("+-*/")


@pytest.mark.parametrize("family", FAMILIES)
def test_streams(family):
    task, drawn = problems(family)
    assert drawn == problems(family)[1] and drawn[:9] != [task.train(index, 4) for index in range(9)]
    held_out = task.test(60)
    assert held_out == load_task(f"synth:{family}").test(60) and [p.uid for p in held_out] == list(range(60))
    keys = {task.key(p) for p in held_out}
    assert len(keys) == 60 and all(is_held_out(key) for key in keys)
    assert not any(is_held_out(task.key(p)) for p in drawn)
    for problem in (*drawn[:20], *held_out[:5]):
        assert task.grade(problem, task.solution(problem, random.Random(0))).correct
        other = task.reword(problem, random.Random(1))
        assert (other.answer, task.key(other)) == (problem.answer, task.key(problem))
        if family != "sequence_next":
            assert other.question != problem.question or not set("+*") & set(problem.question)


def test_what_is_held_out_does_not_depend_on_words_or_order():
    assert problems("chain_sum")[1][0].question == "13-588"  # the stream of seed 3 starts so everywhere
    for family in ("chain_sum", "mixed_arith", "fraction_ops"):
        task, drawn = problems(family)
        for problem in drawn[:9]:
            other = task.reword(problem, random.Random(2))
            assert problem_key(other.question) == task.key(problem) and value(other.question) == Fraction(other.answer)
    task = load_task("synth:binomial_count")
    seen: dict[tuple[int, int], set[str]] = {}
    for uid in range(400):
        problem = task.draw(uid, random.Random(uid))
        n, k = chosen(problem.question)
        seen.setdefault((n, min(k, n - k)), set()).add(task.key(problem))
    assert len(seen) < 390 and all(len(keys) == 1 for keys in seen.values())
    task, drawn = problems("percent_word")
    assert not any(thing in task.key(problem) for problem in drawn for thing in THINGS)


def deepest(text):
    depth = most = 0
    for ch in text:
        depth += (ch == "(") - (ch == ")")
        most = max(most, depth)
    return most


def test_knobs_make_a_difference():
    def most(family, measure, **options):
        return max(measure(p) for p in problems(family, 80, **options)[1])

    def size(problem):
        return max(map(abs, integers(problem.question)))

    def count(problem):
        return len(integers(problem.question))

    for family in ("chain_sum", "gcd_lcm", "mod_pow", "count_divisors", "linear_eq", "poly_expand", "fraction_ops"):
        assert [len(str(most(family, size, digits=d))) for d in (1, 2, 3)] == [1, 2, 3], family
    for family in ("quadratic_roots", "percent_word", "sequence_next", "base_convert", "binomial_count", "mixed_arith"):
        assert most(family, size, digits=1) < most(family, size, digits=2) < most(family, size, digits=3), family
    for family, options in (("chain_sum", {}), ("gcd_lcm", {"digits": 4})):
        assert [most(family, count, terms=n, **options) for n in (2, 4, 6)] == [2, 4, 6]
    assert [most("fraction_ops", count, terms=n) for n in (2, 5)] == [4, 10]
    assert [most("poly_expand", lambda p: p.question.count("("), terms=n) for n in (2, 5)] == [2, 5]
    assert [most("percent_word", lambda p: p.question.count("percent"), terms=n) for n in (1, 3)] == [1, 3]
    assert [most("sequence_next", lambda p: p.question.count(","), terms=n) for n in (6, 9)] == [6, 9]
    assert [most("linear_eq", lambda p: deepest(p.question), depth=d) for d in (0, 1, 3)] == [0, 1, 3]
    assert [most("mixed_arith", lambda p: deepest(p.question), depth=d) for d in (1, 2, 5)] == [0, 1, 4]

    def rule(problem):
        values = integers(problem.question)
        steps = [b - a for a, b in pairwise(values)]
        return 1 if len(set(steps)) == 1 or all(a * values[1] == b * values[0] for a, b in pairwise(values)) else 2

    assert (most("sequence_next", rule, depth=1), most("sequence_next", rule, depth=2)) == (1, 2)
    assert task_options("synth:mod_pow") == {"answer": "template", "template": "auto", "format_score": 0.0, "digits": 2}


def test_bad_options():
    for family, options, message in (
        ("chain_sum", {"terms": 1}, "task synth:chain_sum: expected 2 <= terms <= 12, got 1"),
        ("mixed_arith", {"depth": 7}, "expected 1 <= depth <= 6, got 7"),
        ("mod_pow", {"digits": "x"}, "digits must be of type int, got 'x'"),
        ("mod_pow", {"terms": 3}, "unknown option 'terms': did you mean"),
        ("mod_pow", {"answer": "x"}, "expected answer in template"),
        ("mod_pow", {"format_score": 0.2}, r"format_score must be in \[0, 0.1\], got 0.2"),
        ("mod_pow", {"template": "x"}, "unknown template 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(f"synth:{family}", **options)
    with pytest.raises(UserError, match="in evaluations only"):
        load_task("synth:mod_pow", answer="last").train(0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_answers_are_refused(family):
    task, drawn = problems(family, 12)
    for problem, other in zip(drawn, drawn[1:] + drawn[:1], strict=True):
        gold = problem.answer
        if family == "quadratic_roots":
            first, second = gold.split(", ")
            wrong = [f"{first}, {Fraction(second) + 1}", first, second, f"{first}, {second}, 100", f"{first}, {first}"]
        elif family == "poly_expand":
            wrong = [f"{gold} + 1", gold.replace("x^2", "x^3"), f"-({gold})"]
        elif family == "base_convert":
            base = problem.meta["base"]
            wrong = [f"{gold}0", f"{gold}_{base + 1}", str(int(gold, base)) if base != 10 else "1", f"{gold}, {gold}"]
        else:
            wrong = [str(Fraction(gold) + 1), str(Fraction(gold) - 1), f"{gold}.5", f"{gold}, {gold}, 17", "x"]
        if other.answer != gold:
            wrong.append(other.answer)
        for answer in (*wrong, problem.question, ""):
            assert not task.grade(problem, boxed(answer)).correct, (problem, answer)
        assert not task.grade(problem, gold).correct  # not in a box
        assert task.grade(problem, boxed(gold)).reward == 1.0


def test_the_answer_has_to_be_worked_out():
    for family, read in (
        ("chain_sum", "^.*$"), ("mixed_arith", "^.*$"), ("fraction_ops", "^.*$"), ("poly_expand", r"\$(.*)\$"),
    ):  # fmt: skip
        task, drawn = problems(family, 12)
        for problem in drawn:
            grade = task.grade(problem, boxed(re.findall(read, problem.question)[0]))
            assert (grade.correct, grade.reason) == (False, "wrong: not evaluated"), problem

    task, drawn = problems("binomial_count", 12)
    for problem in drawn:
        assert not task.grade(problem, boxed("\\binom{{{}}}{{{}}}".format(*chosen(problem.question)))).correct
    task = load_task("synth:gcd_lcm")
    for index in range(9):
        problem = task.train(index, 0)
        name = "gcd" if "divisor" in problem.question else "lcm"
        call = f"\\{name}({', '.join(map(str, integers(problem.question)))})"
        assert not task.grade(problem, boxed(call)).correct


@pytest.mark.parametrize(
    ("family", "gold", "answers"),
    [
        ("linear_eq", "-3/2", ["x = -\\frac{3}{2}", "-1.5", "-1\\tfrac12", "\\frac{-3}{2}"]),
        ("quadratic_roots", "-2, 1/3", ["x = \\frac13 \\text{ or } x = -2", "\\{-2, \\tfrac{1}{3}\\}", "1/3,-2"]),
        ("poly_expand", "3x^2 + x - 2", ["3x^{2}+x-2", "x + 3x^2 - 2", "f(x) = 3x^2 + x - 2"]),
        ("percent_word", "1815/2", ["\\$907.50", "907.5 \\text{ dollars}", "\\frac{1815}{2}"]),
        ("mod_pow", "1041", ["1,041", "1041.0", "+1041"]),
    ],
)
def test_right_answers_in_other_forms(family, gold, answers):
    task = load_task(f"synth:{family}")
    problem = task.train(0, 0)
    problem = type(problem)(0, problem.question, gold, problem.meta)
    for answer in answers:
        assert task.grade(problem, boxed(answer)).correct, answer


def test_figures_in_a_base():
    task = load_task("synth:base_convert")
    problem = type(task.train(0, 0))(0, "Write ..", "1A3", {"key": "k", "base": 12})
    for answer in ("1A3", "1a3", "1A3_{12}", "\\text{1A3}", "1A3_12", "\\mathrm{1a3}_{12}"):
        assert task.grade(problem, boxed(answer)).correct, answer
    for answer in ("1A3_{13}", "1 A 4", "267", "01A3"):
        assert not task.grade(problem, boxed(answer)).correct, answer


def reaches(numbers, target):
    """Whether some order of numbers, operations and brackets gives the target: two at a time, in fractions."""
    if len(numbers) == 1:
        return numbers[0] == target
    for a, b, *_ in permutations(numbers, 2):
        rest = list(numbers)
        rest.remove(a)
        rest.remove(b)
        results = [a + b, a - b, a * b, *([a / b] if b else [])]
        if any(reaches([*rest, c], target) for c in results):
            return True
    return False


def test_puzzle24():
    task = load_task("synth:puzzle24")
    train, held_out = [task.train(index, 0) for index in range(200)], task.test()
    cards = {p.meta["nums"] for p in held_out}
    assert len(cards) == len(held_out) > 100 and not cards & {p.meta["nums"] for p in train}
    assert {len(p.meta["nums"]) for p in train} == {4} and {p.answer for p in train} == {"24"}
    known = cards | {task.train(index, 1).meta["nums"] for index in range(len(task.source.train_rows))}
    for nums in list(combinations_with_replacement(range(1, 14), 4))[::150]:
        if nums in known:
            assert reaches([Fraction(n) for n in nums], 24)
    assert (1, 1, 1, 1) not in known and (1, 2, 3, 4) in known
    one = task.source.train_rows[0]
    assert not task.grade(train[0], f"<answer>{'+'.join(map(str, one.nums))}</answer>").correct
    assert task.grade(train[0], task.solution(train[0], random.Random(0))).correct
    assert load_task("synth:countdown") == load_task("countdown")


# ---- runs ------------------------------------------------------------------------------------------------------------

RUN = [*SMALL_RUN, "--algo", "grpo", "--prompts-per-step", "2", "--samples-per-prompt", "2", "--max-new-tokens", "4",
       "--eval-problems", "2", "--eval-samples", "1"]  # fmt: skip


def test_one_step_of_training_of_every_family(tmp_path, capsys):
    """On random weights with a token for each printable character, as stages of one run."""
    tokenizer = char_tokenizer("\n" + "".join(map(chr, range(32, 127))))
    config = ModelConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        max_positions=320, tie_embeddings=True, eos_ids=(tokenizer.eos_id,), pad_id=tokenizer.pad_id,
    )  # fmt: skip
    save(new_policy(config, tokenizer, prompt_style="compact", seed=0), tmp_path / "model")
    families = [*FAMILIES, "countdown", "puzzle24"]
    stages = [f'[[stage]]\ntask = "synth:{family}"\nsteps = 1\n' for family in families]
    (tmp_path / "all.toml").write_text("\n".join(stages))
    run = [*RUN, "--max-prompt-tokens", "300", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]
    assert main([*run, "--config", str(tmp_path / "all.toml")]) == 0, capsys.readouterr().err
    assert sum("loss" in row for row in read_metrics(tmp_path / "run")) == len(families)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_built_in_tokenizer_cannot_spell_is_said(family):
    policy, task = tiny_policy(), load_task(f"synth:{family}")
    with pytest.raises(UserError) as error:
        check_spelling(policy, task, task.train(0, 0))
    assert str(error.value).startswith(
        f"--task synth:{family}: the model cannot "
        + ("write an answer as it is read; choose another" if family in SPELLED else "read its problems; choose")
    )
    assert "its vocabulary lacks [" in str(error.value)
    if family in SPELLED:  # the question, but not the box
        tagged = load_task(f"synth:{family}", answer="tag")
        for index in range(50):
            check_spelling(policy, tagged, tagged.train(index, 0))


def test_it_is_said_before_the_run_and_the_tag_helps(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = [*RUN, "--steps", "1", "--model", str(save_tiny(tmp_path / "tiny")), "--task", "synth:chain_sum"]
    assert main(run) == 2
    error = capsys.readouterr().err
    assert "error: --task synth:chain_sum: the model cannot write an answer as it is read" in error
    assert "(tag, for the built-in model)" in error and not (tmp_path / "runs").exists()
    assert main([*run, "--task-answer", "tag"]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "grpo-synth-chain_sum-seed0" / "summary.json").exists()
