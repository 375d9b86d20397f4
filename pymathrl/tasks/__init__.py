"""Tasks: problems with a prompt and an exact grader.

`TASKS` and ``synth:FAMILY`` are generated, ``rg:FAMILY`` by reasoning-gym, `datasets.DATASETS` are known by name; any
other task is a file.
"""

import inspect
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pymathrl.errors import UserError, nearest
from pymathrl.tasks.arithmetic import Arithmetic
from pymathrl.tasks.countdown import countdown, countdown_file
from pymathrl.tasks.datasets import DATASETS
from pymathrl.tasks.gym import gym_task
from pymathrl.tasks.problem import Check, Grade, Problem
from pymathrl.tasks.questions import data_set, data_set_names, questions_file
from pymathrl.tasks.readers import SUFFIXES, data_files, read_file
from pymathrl.tasks.synth import constructor

__all__ = [
    "DATASETS",
    "OPTION_HELP",
    "TASKS",
    "TASK_HELP",
    "Check",
    "Grade",
    "Problem",
    "Task",
    "convert_option",
    "load_task",
    "short_name",
    "task_options",
]


class Task(Protocol):
    """What the stages need of a task.  Implementations are frozen: equal arguments give equal results.

    A task may have more. `check(problem) -> Check` and `grade_result(problem, response, result) -> Grade`: its grader
    compares answers, so the comparison can be made elsewhere; `grade` does both. `system`: a message before the user's,
    under the style "chat". `template`: a `templates.Template`, whose stop strings end a response. `notes`: what was
    left out of its data, and why.
    """

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

# What --help says of --task.
TASK_HELP = (
    f"a task ({', '.join(TASKS)}); a family of generated problems (synth:chain_sum, of reasoning-gym rg:chain_sum); a "
    f"data set ({', '.join(DATASETS)}), also NAME-PART, and NAME:PATH for files of one's own; or the path of a file "
    "with questions and answers"
)

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
    "answer": "where the answer stands: tag, in <answer>...</answer>; boxed; gsm8k, after ####; answer, after 'the "
    "answer is'; choice; last, the last number (evaluation only, but for arithmetic); template, as the template says",
    "template": "the words around a question, a name of pymathrl/tasks/templates.py; auto: the data set's own",
    "terms": "most terms, numbers, brackets or changes of a problem; of a sequence, the terms that are shown",
    "digits": "most digits of a number",
    "depth": "how deep operations or brackets are nested; of a sequence, how hard its rule is, up to 3",
    "format_score": "reward of a well-formed wrong answer (at most 0.1 but for countdown and arithmetic); 0 pays for "
    "correctness only",
    "allow_subset": "true: numbers may be left unused",
    "compat": "exact, or rover for the text rules of the ROVER scorer",
    "split": "hash: train on most rows and hold some out, or the data set's own test split; all: every row, or that "
    "split, is for evaluation, none for training",
    "data": "folder with the files of the data set, or with a folder of its name; auto: PYMATHRL_DATA, else the hub",
    "question_field": "field of the question, may be a path such as prompt[0].content; auto: question, problem, input, "
    "prompt",
    "gold_field": "field of the gold answer; auto: answer, final_answer, gold, ground_truth, output",
    "gold_form": "how the gold answer stands there: whole, marked (after ####), boxed (the last box), or guess",
    "gold_list": "a list of gold answers: any of them is right, or all have to be given",
    "solution_field": "field of a worked solution; auto: worked, or what stands before ####",
    "settings": "options of the family in reasoning-gym, NAME=VALUE,NAME=VALUE",
}

_BOOLEANS = {"true": True, "false": False}


def load_task(name: str | Path, /, **options: Any) -> Task:
    """The task of that name: of `TASKS`; ``synth:FAMILY`` or ``rg:FAMILY``; a data set, ``gsm8k`` or ``gsm8k:PATH``; or
    the path of a file or a folder, which ends in one of `readers.SUFFIXES` or has a directory part, and whose first row
    tells the kind of task.  Options as in `task_options`; values may be text, as from a command line."""
    build, arguments = _resolve(str(name))
    known = _options(build)
    for option in options:
        if option not in known:
            raise UserError(f"task {name}: unknown option {option!r}: {nearest(option, known)}")
    values = {key: _convert(f"task {name}: {key}", known[key].annotation, value) for key, value in options.items()}
    return build(*arguments, **values)


def short_name(name: str | Path) -> str:
    """What a folder may be called after a task: "gsm8k", "rg-chain_sum", or the name of a file without its suffix."""
    head, colon, rest = str(name).partition(":")
    if not colon or os.sep in head:
        return Path(name).stem
    return head if head in data_set_names() else f"{head}-{rest}"


def task_options(name: str | Path) -> dict[str, Any]:
    """Option -> default value, of a task or a file; the meaning is in the docstring of its constructor."""
    build, _ = _resolve(str(name))
    return {key: parameter.default for key, parameter in _options(build).items()}


def convert_option(name: str | Path, option: str, value: Any) -> Any:
    """`value` (text of a command line, or already typed) as the type of that option of the task."""
    build, _ = _resolve(str(name))
    return _convert(f"task {name}: {option}", _options(build)[option].annotation, value)


def _resolve(name: str) -> tuple[Callable[..., Task], tuple[Any, ...]]:
    """(constructor, its positional arguments); the options are its keyword-only parameters."""
    if name in TASKS:
        return TASKS[name], ()
    head, _, rest = name.partition(":")
    if head in data_set_names():
        benchmark = DATASETS[head.partition("-")[0]].benchmark
        return (partial(data_set, split="all") if benchmark else data_set), (head, rest)
    if head == "rg":
        return gym_task, (rest,)
    if head == "synth":
        return constructor(rest), ()
    if not name.endswith(SUFFIXES) and os.sep not in name:
        raise UserError(
            f"unknown task {name!r}: {nearest(head, [*TASKS, *DATASETS])}, or give synth:FAMILY, rg:FAMILY (such as "
            f"synth:chain_sum), or the path of a file ({', '.join(SUFFIXES)})"
        )
    files = data_files(Path(name)) if Path(name).is_dir() else [Path(name)]
    if not files:
        raise UserError(f"{name}: expected a folder with data files ({', '.join(SUFFIXES)}), got none")
    first = next(read_file(files[0]))
    if ("nums" in first.values or "target" in first.values) and files == [Path(name)] and name.endswith(".jsonl"):
        return countdown_file, (Path(name),)
    return questions_file, (Path(name),)


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
