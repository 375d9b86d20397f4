"""Every gold of the public data sets equals itself, and only itself: read from a folder of data that is no part of the
repository (PYMATHRL_DATA, else ../shared/data)."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from pymathrl.verify import equal
from pymathrl.verify.equality import decide

DATA = Path(os.environ.get("PYMATHRL_DATA", Path(__file__).parents[3] / "shared" / "data"))


def gsm8k(row: dict[str, Any]) -> Iterator[str]:
    yield row["answer"].rsplit("####", 1)[1].strip()


def named(key: str) -> Callable[[dict[str, Any]], Iterator[str]]:
    def golds(row: dict[str, Any]) -> Iterator[str]:
        if text := str(row[key]).strip():  # MATH has two rows without an answer
            yield text

    return golds


def olympiadbench(row: dict[str, Any]) -> Iterator[str]:
    yield from row["final_answer"]


# folder, files, the golds of a row, and how many golds there are
SETS: dict[str, tuple[str, Callable[[dict[str, Any]], Iterator[str]], int]] = {
    "gsm8k": ("*.jsonl", gsm8k, 8792),
    "math": ("*.jsonl", named("answer"), 7498),
    "math500": ("*.jsonl", named("answer"), 500),
    "aime24": ("*.jsonl", named("answer"), 30),
    "aime25": ("*.jsonl", named("output"), 30),
    "amc23": ("*.jsonl", named("answer"), 40),
    "olympiadbench": ("*.jsonl", olympiadbench, 675),
    "olymmath": ("*.jsonl", named("answer"), 400),
    "mgsm": ("*.jsonl", named("answer_number"), 2750),
    "mathcheck_gsm": ("*.jsonl", named("answer"), 3096),
}


def load(name: str) -> list[str]:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no data set in {folder}; set PYMATHRL_DATA to the folder that holds {name}/")
    pattern, golds, _ = SETS[name]
    files = sorted(folder.glob(pattern))
    lines = [line for f in files for line in f.read_text(encoding="utf-8").split("\n") if line]
    return [gold for line in lines for gold in golds(json.loads(line))]


@pytest.mark.parametrize("name", SETS)
def test_every_gold_equals_itself_without_a_worker(name):
    golds = load(name)
    assert len(golds) == SETS[name][2]
    unequal = [gold for gold in set(golds) if not decide(gold, gold, symbolic=False)]
    assert not unequal


def plain_number(text: str) -> Fraction | None:
    """The value of digits with thousands marks, a sign and decimals; None for everything else."""
    text = text.strip().strip("$").replace(",\\!", "").replace(" ", "")
    return Fraction(text.replace(",", "")) if re.fullmatch(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?", text) else None


@pytest.mark.parametrize("name", SETS)
def test_another_gold_is_refused(name):
    """Golds against golds of other problems, shuffled: two plain numbers are equal exactly where their values are, and
    of the others hardly any is accepted that is not written the same."""
    golds = load(name)
    answers = random.Random(5).sample(golds, len(golds))
    wrong, other, accepted = [], 0, []
    for gold, answer in zip(golds, answers, strict=True):
        a, b = plain_number(gold), plain_number(answer)
        verdict = bool(equal(gold, answer))
        if a is not None and b is not None:
            if verdict != (a == b):
                wrong.append((gold, answer))
        elif re.sub(r"\s", "", gold) != re.sub(r"\s", "", answer):
            other += 1
            if verdict:
                accepted.append((gold, answer))
    assert not wrong
    assert len(accepted) <= 0.002 * other, accepted
