"""Questions with a number as their answer, from a JSONL file: {"question": .., "answer": ..} per line, as in GSM8K.

The gold answer is what follows the last "####" of the answer field, or the whole field; what stands before the mark is
a worked solution. A row may have a "hint".
"""

import random
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from pymathrl.errors import UserError
from pymathrl.tasks.answer_tag import last_answer
from pymathrl.tasks.holdout import held_out_keys
from pymathrl.tasks.jsonl import fail, read_hint, read_objects, shuffled
from pymathrl.tasks.last_number import last_number, read_number
from pymathrl.tasks.problem import Grade, Problem
from pymathrl.tasks.prompt_style import instruct

ANSWERS = ("tag", "last")
MARK = "####"  # of GSM8K, before the final answer
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
        value = read_number(gold)
        if value is None:
            fail(path, line, row, "answer", f"a number, alone or after '{MARK}'")
        rows.append(Row(row["question"], gold, value, worked, read_hint(path, line, row)))
    if split == "all":
        return Questions(str(path), (), tuple(rows), answer, format_score)
    keys = ["question:" + row.question for row in rows]
    held_out = held_out_keys(keys)
    train = tuple(row for row, key in zip(rows, keys, strict=True) if key not in held_out)
    test = tuple(row for row, key in zip(rows, keys, strict=True) if key in held_out)
    return Questions(str(path), train, test, answer, format_score)


@dataclass(frozen=True)
class Row:
    """worked: the solution in words, hint: a text for who cannot find it; "" where the file has none."""

    question: str
    gold: str
    value: Fraction
    worked: str = ""
    hint: str = ""


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
        texts = {"worked": row.worked, "hint": row.hint}
        return Problem(uid, row.question, row.gold, {"value": row.value, **{k: v for k, v in texts.items() if v}})

    def prompt(self, problem: Problem, style: str) -> str:
        if style == "compact":
            return f"{problem.question}\n<think>"
        where = "between <answer> and </answer>" if self.answer == "tag" else "at the end, after 'The answer is'"
        return instruct(f"{problem.question}\nReason step by step, and put the final number {where}.", style)

    def reword(self, problem: Problem, rng: random.Random) -> Problem:
        """With a sentence in front."""
        return replace(problem, question=f"{rng.choice(WORDINGS)} {problem.question}")

    def grade(self, problem: Problem, response: str) -> Grade:
        written = last_answer(response) if self.answer == "tag" else response
        if written is None:
            return Grade(0.0, False, None, None, "no closed answer tag")
        found = last_number(written)
        if found is None:
            return Grade(0.0, False, None, None, "no number")
        text, value = found
        if value == problem.meta["value"]:
            return Grade(1.0, True, text, str(value), "correct")
        return Grade(self.format_score, False, text, str(value), f"wrong value {text}")

    def solution(self, problem: Problem, rng: random.Random) -> str:
        return f"</think><answer>{problem.answer}</answer>"
