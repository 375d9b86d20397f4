"""Tasks: problems with a prompt and an exact grader.  One file per task; `TASKS` is the whole list."""

import inspect
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pymathrl.errors import UserError, nearest
from pymathrl.tasks.arithmetic import Arithmetic
from pymathrl.tasks.countdown import countdown, countdown_file
from pymathrl.tasks.jsonl import read_objects
from pymathrl.tasks.problem import Grade, Problem
from pymathrl.tasks.questions import questions_file

__all__ = ["OPTION_HELP", "TASKS", "Grade", "Problem", "Task", "convert_option", "load_task", "task_options"]


class Task(Protocol):
    """What the stages need of a task.  Implementations are frozen: equal arguments give equal results."""

    @property
    def name(self) -> str: ...

    def train(self, index: int, seed: int) -> Problem:
        """Element `index` (from 0) of an endless stream with uid = index.  A pure function of its arguments; a file
        is visited once per epoch in an order shuffled by (seed, epoch).  Never a problem that `test` can return."""
        ...

    def test(self, n: int | None = None) -> list[Problem]:
        """The first n of the held-out problems (None: all of a file, 1024 generated ones) with uid = position; fewer if
        there are fewer.  The same for every run: no seed enters."""
        ...

    def prompt(self, problem: Problem, style: str) -> str:
        """style "compact": the short format of the built-in model, "plain": a text for a base model to continue; both
        end in an opened ``<think>``.  "chat": the user's message, for a chat template."""
        ...

    def reword(self, problem: Problem, rng: random.Random) -> Problem:
        """The same problem said otherwise, with the same answers: its numbers or terms in another order, or other words
        around it.  Never as it was, unless there is no other way to say it: then the problem itself."""
        ...

    def grade(self, problem: Problem, response: str) -> Grade:
        """The verdict on the response alone (no prompt).  Never raises and runs no code, whatever the text."""
        ...

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """A correct response in the compact format, which starts inside ``<think>``: supervised training data."""
        ...


TASKS: dict[str, Callable[..., Task]] = {"countdown": countdown, "arithmetic": Arithmetic}

# What --help says of each option of `task_options`.
OPTION_HELP = {
    "nmin": "fewest numbers of a problem",
    "nmax": "most numbers of a problem",
    "lo": "smallest number given",
    "hi": "largest number given",
    "tlo": "smallest target",
    "thi": "largest target",
    "terms_min": "fewest terms of a chain",
    "terms_max": "most terms of a chain",
    "digits_min": "fewest digits of a term",
    "digits_max": "most digits of a term",
    "ops": "operations that may occur, some of +-*",
    "answer": "tag: the answer stands in <answer>...</answer>; last: it is the last number of the response",
    "format_score": "reward of a well-formed wrong answer; 0 pays for correctness only",
    "allow_subset": "true: numbers may be left unused",
    "compat": "exact, or rover for the text rules of the ROVER scorer",
    "split": "hash: train on most rows and hold some out; all: every row is for evaluation, none for training",
}

_BOOLEANS = {"true": True, "false": False}


def load_task(name: str | Path, /, **options: Any) -> Task:
    """The task of that name, or of a JSONL file: a path that ends in .jsonl or has a directory part; the fields of its
    first row tell the kind of task.  Options as in `task_options`; values may be text, as from a command line."""
    build, arguments = _resolve(str(name))
    known = _options(build)
    for option in options:
        if option not in known:
            raise UserError(f"task {name}: unknown option {option!r}: {nearest(option, known)}")
    values = {key: _convert(f"task {name}: {key}", known[key].annotation, value) for key, value in options.items()}
    return build(*arguments, **values)


def task_options(name: str | Path) -> dict[str, Any]:
    """Option -> default value, of a task or a JSONL file; the meaning is in the docstring of its constructor."""
    build, _ = _resolve(str(name))
    return {key: parameter.default for key, parameter in _options(build).items()}


def convert_option(name: str | Path, option: str, value: Any) -> Any:
    """`value` (text of a command line, or already typed) as the type of that option of the task."""
    build, _ = _resolve(str(name))
    return _convert(f"task {name}: {option}", _options(build)[option].annotation, value)


def _resolve(name: str) -> tuple[Callable[..., Task], tuple[Path, ...]]:
    """(constructor, its positional arguments); the options are its keyword-only parameters."""
    if name in TASKS:
        return TASKS[name], ()
    if not name.endswith(".jsonl") and os.sep not in name:
        raise UserError(f"unknown task {name!r}: {nearest(name, TASKS)}, or give the path of a .jsonl file")
    line, first = read_objects(name, limit=1)[0]
    if "nums" in first or "target" in first:
        return countdown_file, (Path(name),)
    if "question" in first or "answer" in first:
        return questions_file, (Path(name),)
    raise UserError(
        f"{name}, line {line}: expected an object with the fields 'question' and 'answer' (texts), or 'nums' (list of "
        f"integers) and 'target' (integer), got the fields {', '.join(map(repr, first)) or 'none'}"
    )


def _options(build: Callable[..., Task]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(build).parameters
    return {key: value for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}


def _convert(label: str, kind: type[Any], value: Any) -> Any:
    """`value` as `kind` (bool, int, float or str), from the same type or from text; an int serves as a float."""
    if isinstance(value, str) and kind is not str:
        try:
            value = _BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UserError(f"{label} must be of type {kind.__name__}, got {value!r}") from None
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise UserError(f"{label} must be of type {kind.__name__}, got {value!r}")
