"""Gold answers as data sets write them, made into texts that a verifier compares with."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pymathrl.verify.extract import extract

MARK = "####"  # of GSM8K, before the final answer
_CALCULATION = re.compile(r"<<[^<>]*>>")
_DOLLARS = re.compile(r"(?<!\\)\$")
_BETWEEN = re.compile(r"(?<!\\)\$\s*,\s*\$")


def gold_text(value: Any) -> str | None:
    """The text of a field with one answer: numbers in their shortest form, integral ones without a point ("27" for the
    27.0 of AMC23), texts without the dollar signs of mathematics (but with an escaped one) and as they are otherwise,
    leading zeros ("025") included. None for what is no answer."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        return str(value)
    # "$69$,$84$" are two numbers; without the blank after the comma they would read as one, 69 thousand or not
    return _DOLLARS.sub("", _BETWEEN.sub(", ", value)).strip()


def whole(value: Any) -> str | None:
    """The field is the answer."""
    return gold_text(value)


def marked(value: Any) -> str | None:
    """GSM8K: what follows the last "####" of a worked solution."""
    return gold_text(value.rpartition(MARK)[2]) if isinstance(value, str) and MARK in value else None


def boxed(value: Any) -> str | None:
    """MATH: the last box of a worked solution."""
    found = extract(value, "boxed") if isinstance(value, str) else None
    return None if found is None else gold_text(found)


def guess(value: Any) -> str | None:
    """For files of unknown make: after the last "####", else the last box, else the whole field."""
    if isinstance(value, str) and MARK in value:
        return marked(value)
    if isinstance(value, str) and "\\boxed" in value:
        return boxed(value)
    return gold_text(value)


FORMS: dict[str, Callable[[Any], str | None]] = {"guess": guess, "whole": whole, "marked": marked, "boxed": boxed}


def all_of(golds: Sequence[str]) -> str:
    """One gold answer that holds all of several: "2500,7500" and ["2500", "7500"] alike become "2500, 7500". The blank
    tells them from a number with a mark between its thousands."""
    return ", ".join(part for gold in golds for part in split_list(gold))


def split_list(text: str) -> list[str]:
    """The parts of a list, cut at commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for at, ch in enumerate(text):
        if ch in "([{":
            depth += 1
        elif ch in ")]}":
            depth -= 1
        elif ch == "," and depth <= 0 and not text[at + 1 :].startswith("\\!"):
            parts.append(text[begin:at].strip())
            begin = at + 1
    return [part for part in [*parts, text[begin:].strip()] if part]


def without_calculations(worked: str) -> str:
    """GSM8K's solutions without the marks of its calculator, as in "2+3=<<2+3=5>>5"."""
    return _CALCULATION.sub("", worked)
