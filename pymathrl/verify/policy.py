"""The debatable choices of answer equality, in one place, and what a comparison gives back."""

from __future__ import annotations

from dataclasses import dataclass

FORMS = ("", "reduced", "evaluated", "factored", "expanded")


@dataclass(frozen=True)
class Policy:
    """What counts as the same answer where graders differ. The defaults are for training rewards.

    choice          the data set is multiple choice: a lone letter A-J is a choice, whatever its case and clothes
    decimal_digits  a decimal stands for an exact value that does not terminate if it has at least so many significant
                    digits and is that value, rounded or truncated; between exact values there is no tolerance
    decimal_round   a gold decimal of three or more significant digits takes an exact or longer answer that rounds to it
    abs_tol rel_tol a number is right within abs_tol + rel_tol * |gold|; 0 is exact
    percent         where one side alone has a percent sign, its n% may also be read as n / 100
    require_form    the answer must be written "reduced" (a fraction in lowest terms), "evaluated" (as one number, or a
                    sum of different monomials: the question itself is no answer), "factored" or "expanded"; "" takes
                    every form of the value
    """

    choice: bool = False
    decimal_digits: int = 6
    decimal_round: bool = False
    abs_tol: float = 0.0
    rel_tol: float = 0.0
    percent: bool = True
    require_form: str = ""

    def __post_init__(self) -> None:
        if self.require_form not in FORMS:
            raise ValueError(f"Policy: require_form must be one of {FORMS}, got {self.require_form!r}")
        if self.decimal_digits < 1:
            raise ValueError(f"Policy: decimal_digits must be at least 1, got {self.decimal_digits}")
        if not (self.abs_tol >= 0 and self.rel_tol >= 0):
            raise ValueError(f"Policy: tolerances must be >= 0, got {self.abs_tol} and {self.rel_tol}")


@dataclass(frozen=True)
class Verdict:
    """equal, the reason in a few words, and the stage that decided it: limits, text, kind, exact, numeric,
    symbolic or worker (a time-out, a death)."""

    equal: bool
    reason: str
    stage: str

    def __bool__(self) -> bool:
        return self.equal


@dataclass(frozen=True)
class Result:
    """The grade of a response: score 1.0 or 0.0, the text that was taken for the answer (None: there was none)."""

    score: float
    extracted: str | None
    reason: str
    stage: str

    @property
    def correct(self) -> bool:
        return self.score == 1.0
