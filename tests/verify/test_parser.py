from fractions import Fraction as F

import pytest

from pymathrl.verify import nodes as t
from pymathrl.verify.lexer import TooLarge
from pymathrl.verify.parser import parse

x, y, n = t.Sym("x"), t.Sym("y"), t.Sym("n")


def num(value: int | str) -> t.Num:
    return t.Num(F(value))


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("17", num(17)),
        ("0.50", t.Num(F(1, 2), places=2, digits=2)),
        ("1,234,567", num(1234567)),
        (r"114{,}200", num(114200)),
        ("6.02e2", num(602)),
        (r"0.1\overline{6}", num("1/6")),
        (r"\frac12", num("1/2")),
        (r"\tfrac{1}{72}", num("1/72")),
        (r"3\frac{1}{2}", num("7/2")),
        ("3 1/2", num("7/2")),
        ("3 million", t.Mul((num(3), num(10**6)))),
        ("1/2x", t.Mul((num(1), t.Pow(num(2), num(-1)), x))),
        ("2^10", t.Pow(num(2), num(10))),
        (r"\sqrt[3]{x}", t.Root(x, 3)),
        (r"\sin^2 x", t.Pow(t.Call("sin", (x,)), num(2))),
        (r"\cos^{-1} x", t.Call("arccos", (x,))),
        (r"\log_2 8", t.Call("log", (num(8), num(2)))),
        ("a_{12}", t.Sym("a_12")),
        ("|x|", t.Call("abs", (x,))),
        ("n!", t.Call("factorial", (n,))),
        (r"\{1,2\}", t.Braces((num(1), num(2)))),
        ("(1,2]", t.Group((num(1), num(2)), "(", "]")),
        ("1, 2 and 3", t.Items((num(1), num(2), num(3)), "and")),
        ("1,000, 2,000", t.Items((num(1000), num(2000)))),
        ("(3,193)", t.Group((num(3), num(193)), "(", ")")),
        (r"x \le 4", t.Chain((x, num(4)), ("<=",))),
        (r"f(x) = 2", t.Chain((t.Sym("f(x)"), num(2)), ("=",))),
        ("3:4", t.Ratio((num(3), num(4)))),
        ("6:30", t.Ratio((num(6), num(30)), clock=True)),
        (r"15\text{ cm}^2", t.Quantity(num(15), "cm^2")),
        ("15 square centimeters", t.Quantity(num(15), "cm^2")),
        (r"60^\circ", t.Quantity(num(60), "deg")),
        (r"25\%", t.Quantity(num(25), "%")),
        (r"\$18", t.Quantity(num(18), "$")),
        ("24 ways", t.Quantity(num(24), "way")),
        ("5m", t.Mul((num(5), t.Sym("m")))),
        ("204_5", t.Based("204", "5")),
        (r"\begin{pmatrix}1&x\\2&y\end{pmatrix}", t.Matrix(((num(1), x), (num(2), y)))),
        (r"\mathbb{R}", t.Named("R")),
        ("no solution", t.Named("0")),
        (r"\{x \mid x > 2\}", t.Chain((x, num(2)), (">",))),
        (r"{n \choose 2}", t.Call("binom", (n, num(2)))),
        ("The answer is 58", num(58)),
        ("Evelyn Smith", t.Word("Evelyn Smith")),
        ("not 58", t.Word("not 58")),
        ("2 3", t.Word("2 3")),
        ("__import__('os')", t.Word("__import__('os')")),
        ("", None),
    ],
)
def test_tree(text: str, tree: t.Node | None) -> None:
    assert parse(text) == tree


def test_bounds() -> None:
    with pytest.raises(TooLarge, match="64 levels"):
        parse("(" * 65 + "1" + ")" * 65)
    with pytest.raises(TooLarge, match="500 tokens"):
        parse("x+" * 300 + "x")
    with pytest.raises(TooLarge, match="2000 characters"):
        parse("1" * 2001)
    assert parse("(" * 60 + "1" + ")" * 60) == num(1)
