"""The last number of a text: signs, separators, decimals; never slow, never an exception."""

import time
from fractions import Fraction

import pytest

from pymathrl.tasks.last_number import last_number, read_number


@pytest.mark.parametrize(
    ("text", "written", "value"),
    [
        ("2+5=7", "7", Fraction(7)),
        ("x = -3.", "-3", Fraction(-3)),
        ("10-8", "8", Fraction(8)),
        ("(4)-3", "3", Fraction(3)),
        ("10 - 8 = 2.", "2", Fraction(2)),
        ("it is $1,234.50.", "1,234.50", Fraction(2469, 2)),
        ("12,34", "34", Fraction(34)),
        ("−7", "-7", Fraction(-7)),  # noqa: RUF001
        ("1.5", "1.5", Fraction(3, 2)),
        ("3/4", "4", Fraction(4)),
        ("2e5", "5", Fraction(5)),
        ("12,345,678 eggs", "12,345,678", Fraction(12345678)),
    ],
)
def test_hand_cases(text, written, value):
    assert last_number(text) == (written, value)


@pytest.mark.parametrize("text", ["", "none", "-", "²", "9" * 5000])
def test_no_number(text):
    assert last_number(text) is None


def test_read_number_takes_a_number_and_nothing_else():
    assert read_number(" 1,000 ") == 1000 and read_number("-2.5") == Fraction(-5, 2) and read_number("+3") == 3
    for text in ("3 apples", "3-4", "1/2", "", "- 3", "$5"):
        assert read_number(text) is None


def test_long_texts_take_linear_time():
    start = time.perf_counter()
    for text in ("1" * 200_000, "1," * 100_000, "-" * 200_000, "1.1" * 70_000, "-1" * 100_000):
        last_number(text)
    assert time.perf_counter() - start < 2
