import pytest

from pymathrl.verify import normalize


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("$58$", "58"),
        (r"\(58\)", "58"),
        (r"\[ x = 5 \]", "x = 5"),
        (r"\boxed{58}", "58"),
        (r"\textbf{\boxed{58}}", "58"),
        ("**58**", "58"),
        ("73**", "73"),
        ("`58`", "58"),
        (r"58\,.", "58"),
        (r"58 \quad", "58"),
        ("{58}", "58"),
        ("{1}{2}", "{1}{2}"),  # the first brace is not closed by the last
        ("58!", "58!"),
        ("−3", "-3"),  # noqa: RUF001 - the minus sign of typography
        ("2√3", r"2\sqrt 3"),
        ("x²", "x^{2}"),
        ("½", r"\frac{1}{2}"),
        ("$18", r"\$18"),
        ("$5 and $6", r"\$5 and \$6"),
        (r"$8$,$4$", "8 , 4"),
        (r"\left[0, 1\right)", "[0, 1 )"),
        (r"\\frac{1}{2}", r"\frac{1}{2}"),  # escaped once too often
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"2023\text{-}10\text{-}05", "2023-10-05"),
        ("", ""),
        ("...", "..."),
    ],
)
def test_clothes(written: str, plain: str) -> None:
    assert " ".join(normalize(written).split()) == plain
    assert normalize(normalize(written)) == normalize(written)
