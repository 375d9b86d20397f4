import pytest

from pymathrl.verify import numeric
from pymathrl.verify.lexer import TooLarge
from pymathrl.verify.parser import parse


def trees(a: str, b: str) -> tuple:
    return parse(a), parse(b)


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3", numeric.AGREE),
        (r"\sin 2x", r"2\sin x\cos x", numeric.AGREE),
        (r"\sin 2x", r"\sin x\cos x", numeric.DIFFER),
        (r"|x|", "x", numeric.DIFFER),  # points are also negative
        (r"|x-3|", "3-x", numeric.DIFFER),  # and beyond 3
        (r"\ln x^2", r"2\ln x", numeric.AGREE),  # where both are defined
        (r"\sqrt{10^{60}+1}", "10^{30}", numeric.DIFFER),
        (r"e^{\pi\sqrt{163}}", "262537412640768744", numeric.DIFFER),
        (r"\sin\pi", "0", numeric.AGREE),
        (r"\sqrt2^{\sqrt2}", r"2^{\sqrt2/2}", numeric.AGREE),
        (r"(-1)^n", "1", numeric.DIFFER),
        (r"\sqrt{-1-x^2}", r"i\sqrt{1+x^2}", numeric.AGREE),  # nowhere real
    ],
)
def test_compare(a: str, b: str, found: str) -> None:
    assert numeric.compare(*trees(a, b)) == found


@pytest.mark.parametrize(
    ("a", "b", "proved"),
    [
        (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3", True),
        (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1", True),
        # Two sums of roots that agree to 12 digits: the bound must not be satisfied by that.
        (r"\sqrt{1000000000001}+\sqrt{1000000000004}", r"\sqrt{1000000000002}+\sqrt{1000000000003}", False),
        (r"\sqrt{10^{30}+1}", "10^{15}", False),
        ("10^{300}", r"\sqrt{10^{600}+1}", False),  # they agree to 600 digits
        (r"\pi", r"\pi", None),  # not algebraic
    ],
)
def test_proof(a: str, b: str, proved: bool | None) -> None:
    assert numeric.same_algebraic(*trees(a, b)) is proved


def test_the_bound_of_a_sum_of_roots() -> None:
    """u = 2 + 3 for sqrt 4 + sqrt 9 written with l = 1, D = 4."""
    roots: dict = {}
    upper, lower = numeric._bound(parse(r"\sqrt4+\sqrt9"), roots)
    assert 2**upper == pytest.approx(6, abs=1e-3)  # max(2, 3) * 2, which is above 5
    assert lower == pytest.approx(0, abs=1e-4)
    assert sorted(roots.values()) == [2, 2]


def test_residues() -> None:
    assert numeric.same_residues(*trees("2^{1000001}", r"2\cdot2^{1000000}"))
    assert not numeric.same_residues(*trees("2^{1000001}", "2^{1000002}"))
    assert numeric.same_residues(*trees("5000!", r"5000\cdot4999!"))
    with pytest.raises(TooLarge):
        numeric.same_residues(*trees("9^{9^{9^9}}", "1"))


def test_has_pieces_and_integer_parameters() -> None:
    assert numeric.has_pieces(parse("|x|+1")) and not numeric.has_pieces(parse("|3|+x"))
    assert numeric.has_integer_parameter(parse("n!")) and not numeric.has_integer_parameter(parse("5!+n"))
    assert numeric.has_integer_parameter(parse("(-1)^n")) and not numeric.has_integer_parameter(parse("2^n"))
