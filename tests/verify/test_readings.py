from fractions import Fraction as F

import pytest

from pymathrl.verify import nodes as t
from pymathrl.verify import real_sets as rs
from pymathrl.verify.forms import has_form
from pymathrl.verify.parser import parse
from pymathrl.verify.readings import Assignments, Equation, Inequality, System, Value, both_signs, read


def num(value: int) -> t.Num:
    return t.Num(F(value))


def test_values_with_names() -> None:
    assert read(parse("x = 5")) == Value(num(5), ("x",))
    assert read(parse("5 = x")) == Value(num(5), ("x",))
    assert read(parse("(x,y) = (2,3)")) == Value(t.Group((num(2), num(3)), "(", ")"), ("x", "y"))
    assert read(parse(r"x \approx 5")) == Value(num(5), ("x",))
    assert read(parse(r"x = \pi \approx 3.14")) == Value(t.PI, ("x",))
    assert read(parse("x=1 or x=-4")) == Value(t.Items((num(1), num(-4)), "or"), ("x",))
    assert read(parse(r"x \in \{1,-4\}")) == Value(t.Items((num(1), num(-4))), ("x",))
    assert read(parse("x=2, y=3")) == Assignments(("x", "y"), (num(2), num(3)))
    assert read(parse("AB = 5")) == Value(num(5), ("AB",))


def test_relations() -> None:
    x, y = t.Sym("x"), t.Sym("y")
    assert read(parse("x + y = 4")) == Equation(t.Add((x, y)), num(4))
    assert read(parse("2x = 3")) == Equation(t.Mul((num(2), x)), num(3))
    assert isinstance(read(parse("2x - 1 < 7")), Inequality)
    assert isinstance(read(parse("x+y=1, x-y=2")), System)
    assert read(parse("x < 4")) == rs.RealSet((rs.Piece(rs.LOW, False, num(4), False),), "x")
    assert read(parse(r"5 \ge x > -2")) == rs.RealSet((rs.Piece(num(-2), False, num(5), True),), "x")


def test_plus_minus_takes_one_side_throughout() -> None:
    tree = both_signs(parse(r"(\pm 3, \mp 4)"))
    pairs = [[n.value * m.value for n, m in [x.factors]] for item in tree.items for x in item.items]
    assert pairs == [[3], [-4], [-3], [4]]


def pieces(text: str) -> list[tuple]:
    reading = read(parse(text))
    found = reading if isinstance(reading, rs.RealSet) else rs.from_tree(reading.node)
    return [(rs.order(p.low), p.low_closed, rs.order(p.high), p.high_closed) for p in found.pieces]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)"),
        (r"(0,2]\cup[1,3)", "(0,3)"),
        (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"),
        (r"x \ne 0", r"(-\infty,0)\cup(0,\infty)"),
        (r"x < -1 or x \ge 2", r"(-\infty,-1)\cup[2,\infty)"),
        (r"x > 1 and x \le 3", "(1,3]"),
        (r"(0,3)\cap[1,5]", "[1,3)"),
        (r"[2,\infty]", r"[2,\infty)"),
        (r"(0,1)\cap(2,3)", r"\emptyset"),
        (r"[1,2)\cup\{2\}", "[1,2]"),
    ],
)
def test_same_set(a: str, b: str) -> None:
    assert pieces(a) == pieces(b)


def test_touching_open_intervals_stay_apart() -> None:
    assert pieces(r"(0,1)\cup(1,2)") != pieces("(0,2)")
    with pytest.raises(rs.NotReal):
        rs.from_tree(parse("(1,2,3)"))


@pytest.mark.parametrize(
    ("text", "form", "has"),
    [
        (r"\frac{3}{8}", "reduced", True),
        (r"\frac{6}{16}", "reduced", False),
        ("8/1", "reduced", False),
        ("(12)/(3)", "reduced", False),
        (r"12\div 3", "reduced", False),
        ("12/-3", "reduced", False),
        ("(-5)/3", "reduced", True),
        ("-14", "evaluated", True),
        ("1,234.50", "evaluated", True),
        (r"-\frac{3}{2}", "evaluated", True),
        (r"1\frac{1}{2}", "evaluated", True),
        (r"0.1\overline{6}", "evaluated", True),
        (r"x=-\frac12 \text{ or } x=5", "evaluated", True),
        (r"14\text{ ways}", "evaluated", True),
        ("12+2=14", "evaluated", True),
        ("14=12+2", "evaluated", False),
        ("12+2", "evaluated", False),
        (r"2\cdot 7", "evaluated", False),
        ("28/2", "evaluated", False),
        ("1.5/0.5", "evaluated", False),
        (r"\frac{\frac{1}{2}}{3}", "evaluated", False),
        (r"12\over 5", "evaluated", False),
        (r"\binom{12}{5}", "evaluated", False),
        (r"\gcd(12,18)", "evaluated", False),
        (r"\sqrt{16}", "evaluated", False),
        ("2^5", "evaluated", False),
        (r"1\pm 4", "evaluated", False),
        ("-3,2+3", "evaluated", False),
        ("-3x^2+x-5", "evaluated", True),
        ("3+4i", "evaluated", True),
        ("x(3x+5)", "evaluated", False),
        ("3x^2+6x-x", "evaluated", False),
        (r"2\cdot 3x", "evaluated", False),
        (r"x\cdot x", "evaluated", False),
        ("(x-2)(x+2)", "factored", True),
        ("x^2-4", "factored", False),
        ("x^2-4", "expanded", True),
        ("2(x-2)", "expanded", False),
        ("(x+1)^2", "expanded", False),
    ],
)
def test_form(text: str, form: str, has: bool) -> None:
    assert has_form(text, parse(text), form) is has
