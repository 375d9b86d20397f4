"""The table of equal and different answers, the policy decided row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pymathrl.verify import equal

HERE = Path(__file__).parent
# Which side carries the mark decides about a percentage, a unit, or an equation that is not solved.
ONE_SIDED = (
    "%",
    "percent",
    "\\text",
    "\\mathrm",
    "\\circ",
    "$",
    "€",
    "=",
    "<",
    ">",
    "\\le",
    "\\ge",
    "\\ne",
    "\\in",
    "≥",
    "≤",
)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").split("\n") if line]


def name_of(row: dict[str, Any]) -> str:
    sign = "==" if row["expected"] else "!="
    return f"{row['cat']} {row['gold']} {sign} {row['answer'][:60]}".encode("unicode_escape").decode()


TABLE = rows("equality.jsonl")
MORE = rows("equality_more.jsonl")


@pytest.mark.parametrize("row", TABLE, ids=name_of)
def test_table(row):
    verdict = equal(row["gold"], row["answer"])
    assert bool(verdict) == bool(row["expected"]), f"{verdict}; {row['note']}"


@pytest.mark.parametrize("row", MORE, ids=name_of)
def test_more(row):
    verdict = equal(row["gold"], row["answer"])
    assert bool(verdict) == bool(row["expected"]), verdict


def is_two_sided(row: dict[str, Any]) -> bool:
    return not any(mark in row["gold"] + row["answer"] for mark in ONE_SIDED)


def test_symmetric():
    """equal(a, b) == equal(b, a) wherever no policy asks which side is the gold."""
    both = [row for row in TABLE + MORE if is_two_sided(row)]
    assert len(both) > 200
    apart = [row for row in both if bool(equal(row["answer"], row["gold"])) != bool(row["expected"])]
    assert not apart, "\n".join(map(name_of, apart))


def test_tables_hold_each_pair_once():
    pairs = [(row["gold"], row["answer"]) for row in TABLE + MORE]
    assert len(set(pairs)) == len(pairs)
    assert len(TABLE) == 345 and len(MORE) <= 500
