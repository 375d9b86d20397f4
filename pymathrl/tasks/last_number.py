"""The last number of a response, exactly: for models that were never taught to put their answer into a tag."""

import re
from fractions import Fraction

MAX_LENGTH = 256  # characters of a number: Python refuses to read integers of more than 4300 digits

_NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_MINUS = "-−–"  # noqa: RUF001 - the characters that are read as a sign


def last_number(text: str) -> tuple[str, Fraction] | None:
    """(as written, value) of the last number in a text, as in "-1,234.50"; None where there is none, or one too long.

    Fractions and exponents are not read: "3/4" ends in 4, "2e5" in 5. A minus is its sign where no operand stands
    before it: "=-3" is -3, "5-3" ends in 3. Linear in the text's length.
    """
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 - the last one counts
        pass
    if found is None or len(found[0]) > MAX_LENGTH:
        return None
    before = text[: found.start()][-2:]
    negative = before[-1:] in tuple(_MINUS) and not (before[:-1].isalnum() or before[:-1] == ")")
    value = Fraction(found[0].replace(",", ""))
    return ("-" + found[0], -value) if negative else (found[0], value)


def read_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else; None for any other text."""
    text = text.strip()
    found = last_number(text)
    sign = text[:1] in tuple(_MINUS) or text[:1] == "+"
    if found is None or len(found[0].lstrip("-")) + sign != len(text):
        return None
    return found[1]
