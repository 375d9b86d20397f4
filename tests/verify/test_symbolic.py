import pytest

from pymathrl.verify import symbolic
from pymathrl.verify.parser import parse


@pytest.mark.parametrize(
    ("a", "b", "proved"),
    [
        (r"\sin^2 x+\cos^2 x", "1", True),
        (r"2\sin a\cos a", r"\sin(2a)", True),
        (r"\arcsin\frac12", r"\frac{\pi}{6}", True),
        (r"\sin x", r"\cos x", False),
        ("x+" * 200 + "x", "201x", False),  # more nodes than it takes on
    ],
)
def test_proves_equal(a: str, b: str, proved: bool) -> None:
    assert symbolic.proves_equal(parse(a), parse(b)) is proved
