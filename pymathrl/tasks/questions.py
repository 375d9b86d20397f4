"""Questions with a number, or one of given options, as their answer, from a JSONL file: {"question": .., "answer": ..}
per line, as in GSM8K.

The gold answer is what follows the last "####" of the answer field, or the whole field; what stands before the mark is
a worked solution. A row may have a "hint", and "options": a list of texts, one of which is the gold answer. They are
shown with letters, and a response names the letter or the option.
"""

import random
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pymathrl.errors import UserError
from pymathrl.tasks.holdout import held_out_keys
from pymathrl.tasks.jsonl import fail, read_hint, read_objects, shuffled
from pymathrl.tasks.last_number import last_number, read_number
from pymathrl.tasks.problem import Grade, Problem
from pymathrl.tasks.prompt_style import instruct
from pymathrl.verify.extract import last_answer

ANSWERS = ("tag", "last")
MARK = "####"  # of GSM8K, before the final answer
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"\(?([A-Z])[).:]?(\s.*)?", re.DOTALL)
WORDINGS = ("Here is a problem to solve.", "Consider this question.", "Read this carefully before you answer.")


def questions_file(path: Path, *, answer: str = "tag", format_score: float = 0.0, split: str = "hash") -> "Questions":
    """The task of a file. answer "tag" reads <answer>...</answer>, "last" the last number of the response.
    format_score: reward of a wrong number. split "hash": an eighth of the questions is held out, at least one;
    "all": all are for test."""
    if answer not in ANSWERS or split not in ("hash", "all"):
        raise UserError(
            f"{path}: expected answer in {', '.join(ANSWERS)} and split in hash, all, got {answer!r} and {split!r}"
        )
    if not 0 <= format_score < 1:
        raise UserError(f"{path}: format_score must be in [0, 1), got {format_score}")
    rows: list[Row] = []
    for line, row in read_objects(path):
        for name in ("question", "answer"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                fail(path, line, row, name, "a text that is not empty")
        worked, _, gold = row["answer"].rpartition(MARK)
        gold, worked = gold.strip(), worked.strip()
        options = _read_options(path, line, row, gold)
        value = read_number(gold)
        if value is None and not options:
            fail(path, line, row, "answer", f"a number, alone or after '{MARK}'")
        if options and answer == "last":
            raise UserError(f"{path}, line {line}: an option is named in an answer tag; use answer='tag'")
        rows.append(Row(row["question"], gold, value, worked, read_hint(path, line, row), options))
    if split == "all":
        return Questions(str(path), (), tuple(rows), answer, format_score)
    keys = ["question:" + row.question for row in rows]
    held_out = held_out_keys(keys)
    train = tuple(row for row, key in zip(rows, keys, strict=True) if key not in held_out)
    test = tuple(row for row, key in zip(rows, keys, strict=True) if key in held_out)
    return Questions(str(path), train, test, answer, format_score)


def _read_options(path: Path, line: int, row: dict[str, Any], gold: str) -> tuple[str, ...]:
    options = row.get("options", [])
    if "options" in row:
        texts = isinstance(options, list) and all(isinstance(o, str) and o.strip() for o in options)
        if not texts or not 2 <= len({o.strip() for o in options}) == len(options) <= len(LETTERS):
            fail(path, line, row, "options", f"a list of 2 to {len(LETTERS)} different texts that are not empty")
        if gold not in [o.strip() for o in options]:
            fail(path, line, row, "answer", f"one of the options, alone or after '{MARK}'")
    return tuple(o.strip() for o in options)


@dataclass(frozen=True)
class Row:
    """value: of a gold answer that is a number. worked: the solution in words, hint: a text for who cannot find it;
    "" where the file has none."""

    question: str
    gold: str
    value: Fraction | None
    worked: str = ""
    hint: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    name: str
    rows: tuple[Row, ...]
    held_out: tuple[Row, ...]
    answer: str
    format_score: float

    def train(self, index: int, seed: int) -> Problem:
        if not self.rows:
            raise UserError(f"{self.name}: no row is left to train on; use split='hash' and two or more questions")
        epoch, at = divmod(index, len(self.rows))
        return self._problem(index, self.rows[shuffled(len(self.rows), seed, epoch)[at]])

    def test(self, n: int | None = None) -> list[Problem]:
        return [self._problem(uid, row) for uid, row in enumerate(self.held_out[:n])]

    @staticmethod
    def _problem(uid: int, row: Row) -> Problem:
        some = {"worked": row.worked, "hint": row.hint, "options": row.options}
        return Problem(uid, row.question, row.gold, {"value": row.value, **{k: v for k, v in some.items() if v}})

    def prompt(self, problem: Problem, style: str) -> str:
        options = problem.meta.get("options", ())
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        if style == "compact":
            return f"{problem.question}{listed}\n<think>"
        if options:
            task = "Reason step by step, and put the letter of the right option between <answer> and </answer>."
            return instruct(f"{problem.question}{listed}\n{task}", style)
        where = "between <answer> and </answer>" if self.answer == "tag" else "at the end, after 'The answer is'"
        return instruct(f"{problem.question}\nReason step by step, and put the final number {where}.", style)

    def reword(self, problem: Problem, rng: random.Random) -> Problem:
        """The options in another order; without options, with a sentence in front."""
        if "options" in problem.meta:
            options = list(problem.meta["options"])
            while tuple(options) == problem.meta["options"]:
                rng.shuffle(options)
            return replace(problem, meta={**problem.meta, "options": tuple(options)})
        return replace(problem, question=f"{rng.choice(WORDINGS)} {problem.question}")

    def grade(self, problem: Problem, response: str) -> Grade:
        written = last_answer(response) if self.answer == "tag" else response
        if written is None:
            return Grade(0.0, False, None, None, "no closed answer tag")
        if "options" in problem.meta:
            chosen = _chosen(written, problem.meta["options"])
            if chosen is None:
                return Grade(0.0, False, written, None, "names no option")
            right = chosen == problem.answer
            reason = "correct" if right else f"wrong option {chosen}"
            return Grade(1.0 if right else self.format_score, right, written, chosen, reason)
        found = last_number(written)
        if found is None:
            return Grade(0.0, False, None, None, "no number")
        text, value = found
        if value == problem.meta["value"]:
            return Grade(1.0, True, text, str(value), "correct")
        return Grade(self.format_score, False, text, str(value), f"wrong value {text}")

    def solution(self, problem: Problem, rng: random.Random) -> str:
        return f"</think><answer>{problem.answer}</answer>"


def _chosen(written: str, options: tuple[str, ...]) -> str | None:
    """The option that an answer means: by its text, or by its letter with nothing or more words after it."""
    if written in options:
        return written
    letter = _LETTER.fullmatch(written)
    at = LETTERS.index(letter[1]) if letter else len(options)
    return options[at] if at < len(options) else None
