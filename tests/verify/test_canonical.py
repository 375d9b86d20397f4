from fractions import Fraction as F

import pytest

from pymathrl.verify.canonical import Former, NoForm, Undefined, number, rational
from pymathrl.verify.lexer import TooLarge
from pymathrl.verify.parser import parse


def equal(a: str, b: str) -> bool | None:
    former = Former()
    return former.equal(*(former.form(parse(x)) for x in (a, b)))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\sqrt{12}", r"2\sqrt3"),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
        (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"),
        (r"\sqrt[4]{4}", r"\sqrt2"),
        (r"\sqrt[3]{-8}", "-2"),
        ("i^3", "-i"),
        (r"(1+i)^2", "2i"),
        (r"e^{i\pi}", "-1"),
        (r"\ln 12", r"2\ln 2+\ln 3"),
        (r"\log_4 8", r"\frac32"),
        (r"\cos\frac{2\pi}{3}", r"-\frac12"),
        (r"\tan 60^\circ", r"\sqrt3"),
        (r"\sin(-x)", r"-\sin x"),
        ("x^2-4", "(x-2)(x+2)"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        ("2^{n+1}", r"2\cdot 2^n"),
        ("4^n", "2^{2n}"),
        (r"\sqrt{x^2}", "|x|"),
        (r"|{-3}x|", "3|x|"),
        (r"\frac{n!}{n}", "(n-1)!"),
        (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        (r"\sum_{k=1}^{10} k", "55"),
        (r"|3+4i|", "5"),
    ],
)
def test_equal(a: str, b: str) -> None:
    assert equal(a, b) is True


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("(-8)^{1/3}", "-2"),  # the principal root
        (r"\sqrt{x^2}", "x"),
        (r"1+\sqrt2", r"1-\sqrt2"),
        (r"\sqrt2+\sqrt3", r"\sqrt5"),
        ("x^2", "x^3"),
        (r"\frac{1}{300!}", r"\frac{1}{301!}"),
        (r"\pi", "3.14159"),
    ],
)
def test_not_equal(a: str, b: str) -> None:
    assert equal(a, b) is not True


def test_what_has_no_rule_is_left_open() -> None:
    assert equal(r"\sin^2 x+\cos^2 x", "1") is None
    assert equal(r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3") is None
    assert equal(r"\sqrt{10007\cdot10009}", r"\sqrt{10007}\sqrt{10009}") is None  # factors past the trial division
    assert equal("2x", "3x") is False


@pytest.mark.parametrize("text", [r"\frac{1}{0}", "0^0", r"\ln 0", r"\frac{1}{x-x}", r"\tan\frac{\pi}{2}", "(-1)!"])
def test_undefined(text: str) -> None:
    with pytest.raises(Undefined):
        Former().form(parse(text))


def test_bounds() -> None:
    for text in ("9^{9^9}", "99999!", r"\sum_{k=1}^{10^{12}} k", r"\binom{10^9}{10^8}"):
        with pytest.raises(TooLarge):
            Former().form(parse(text))
    with pytest.raises(NoForm):
        Former().form(parse("(a+b+c+d)^{80}(e+f+g+h)^{80}(k+m+n+p)^{80}"))


def test_rational() -> None:
    assert rational(number(F(2, 3))) == F(2, 3)
    assert rational(Former().form(parse("x"))) is None
