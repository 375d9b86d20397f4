"""Questions whose answers are compared with gold ones by `pymathrl.verify`: of a data set known by name, or of a file.

A file has a row per question, in any format of `readers`: {"question": .., "answer": ..}, or fields of other names that
options name. A row may have a "hint", and "options": a list of texts, one of which is the gold answer. They are shown
with letters, and a response names the letter or the option.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pymathrl.errors import UserError
from pymathrl.tasks import mathcheck
from pymathrl.tasks.datasets import DATASETS, EXACT, DataSet
from pymathrl.tasks.golds import FORMS, MARK, all_of, without_calculations
from pymathrl.tasks.holdout import held_out_keys
from pymathrl.tasks.hub import find_folder, split_files
from pymathrl.tasks.jsonl import shuffled
from pymathrl.tasks.problem import Check, Grade, Problem
from pymathrl.tasks.readers import Row, read_file
from pymathrl.tasks.templates import Template, find_template
from pymathrl.verify import Result, equal, verify
from pymathrl.verify.normalize import normalize
from pymathrl.verify.policy import Policy

QUESTION_FIELDS = ("question", "problem", "input", "prompt")
GOLD_FIELDS = ("answer", "final_answer", "gold", "ground_truth", "output")
# option --task-answer -> mode of `verify.extract`
ANSWERS = {
    "tag": "tag", "boxed": "boxed", "gsm8k": "gsm8k", "answer": "answer", "choice": "choice", "last": "last_number",
    "auto": "auto",
}  # fmt: skip
# the template of a file's questions, by where the answer is to stand
FILE_TEMPLATES = {
    "template": "tag", "tag": "tag", "boxed": "qwen_boxed_user", "gsm8k": "verl_gsm8k", "answer": "dapo_answer",
    "choice": "choice", "last": "last", "auto": "qwen_boxed_user",
}  # fmt: skip
MAX_FORMAT_SCORE = 0.1
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDINGS = ("Here is a problem to solve.", "Consider this question.", "Read this carefully before you answer.")
STATED = {  # how a solution states its answer, by mode
    "tag": "<answer>{gold}</answer>", "boxed": "The answer is \\boxed{{{gold}}}.", "gsm8k": "#### {gold}",
    "answer": "Answer: {gold}", "choice": "Answer: {gold}", "last_number": "The answer is {gold}",
    "auto": "<answer>{gold}</answer>",
}  # fmt: skip
SCALAR = 80  # characters of a text that is kept in `Problem.meta["fields"]`
# an option's letter, alone, in brackets or punctuated, more words after it, but not another letter to choose from; a
# small one must be punctuated or alone
_LETTER = re.compile(
    r"\(?(?:([A-Z])(?!\)?\s*(?:and|or)\s+\(?[A-Z]\b)[).:]?(?:\s.*)?|([a-z])(?:[).:](?:\s.*)?)?)", re.DOTALL
)
_CLOTHES = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
_DIGIT = re.compile(r"[0-9]")


@dataclass(frozen=True)
class Item:
    """golds: any of them is right. worked: the solution in words, hint: a text for who cannot find it; "" where there
    is none. fields: the short values of the row, for metrics by level, kind or group."""

    question: str
    golds: tuple[str, ...]
    worked: str = ""
    hint: str = ""
    options: tuple[str, ...] = ()
    subset: str = ""
    policy: Policy = EXACT
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Questions:
    """items are trained on, held_out are for test. template_name: of `templates.TEMPLATES`, "{subset}" in it is
    replaced by the problem's. answer: a key of `ANSWERS`, or "template": where that puts it. notes: what was left out
    of the data and why, with counts. own_test: the data say themselves what is for test: a split, or all of it."""

    name: str
    items: tuple[Item, ...]
    held_out: tuple[Item, ...]
    template_name: str = "tag"
    answer: str = "template"
    format_score: float = 0.0
    kind: str = "equal"
    notes: tuple[str, ...] = ()
    own_test: bool = False

    @property
    def template(self) -> Template:
        """Of the first problem: all have the same, but for those of a set of several languages."""
        first = next(iter((*self.held_out, *self.items)))
        return self._template(first.subset, bool(first.options))

    @property
    def system(self) -> str:
        """The message before the user's, for a chat model; "" for its own."""
        return self.template.system

    def train(self, index: int, seed: int) -> Problem:
        if not self.items:
            raise UserError(f"{self.name}: no row is left to train on; use split='hash' and two or more questions")
        if self.kind == "mathcheck" or self._mode(self.items[0].subset, bool(self.items[0].options)) == "last_number":
            raise UserError(
                f"{self.name}: the last number of a response is read in evaluations only: as a reward it would pay for "
                "any stray number; train with answer='boxed', 'tag', 'gsm8k' or 'answer'"
            )
        epoch, at = divmod(index, len(self.items))
        return self._problem(index, self.items[shuffled(len(self.items), seed, epoch)[at]])

    def test(self, n: int | None = None) -> list[Problem]:
        return [self._problem(uid, item) for uid, item in enumerate(self.held_out[:n])]

    def prompt(self, problem: Problem, style: str) -> str:
        options = problem.meta.get("options", ())
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        template = self._template(problem.meta.get("subset", ""), bool(options))
        return template.prompt(problem.question + listed, style)

    def reword(self, problem: Problem, rng: random.Random) -> Problem:
        """The options in another order; without options, with a sentence in front."""
        if "options" in problem.meta:
            options = list(problem.meta["options"])
            while tuple(options) == problem.meta["options"]:
                rng.shuffle(options)
            return replace(problem, meta={**problem.meta, "options": tuple(options)})
        return replace(problem, question=f"{rng.choice(WORDINGS)} {problem.question}")

    def check(self, problem: Problem) -> Check:
        mode = self._mode(problem.meta.get("subset", ""), "options" in problem.meta)
        golds = problem.meta.get("golds", (problem.answer,))
        return Check(golds, mode, problem.meta.get("policy", EXACT))

    def grade(self, problem: Problem, response: str) -> Grade:
        check = self.check(problem)
        return self.grade_result(problem, response, verify(response, check.golds, check.mode, check.cfg))

    def grade_result(self, problem: Problem, response: str, result: Result) -> Grade:
        """The grade of a response whose answer has been compared as `check` says."""
        if self.kind == "mathcheck":
            kind = problem.meta["fields"]["task_type"]
            said = mathcheck.read(kind, response)
            right = said == problem.answer or (
                kind == "solving" and said is not None and bool(equal(problem.answer, said))
            )
            reason = "correct" if right else "no verdict" if said is None else f"wrong verdict {said}"
            return Grade(float(right), right, said, problem.answer if right else said, reason)
        if "options" in problem.meta:
            return _grade_option(problem, result, self.format_score)
        return grade_equal(problem, result, self.format_score)

    def solution(self, problem: Problem, rng: random.Random) -> str:
        mode = self._mode(problem.meta.get("subset", ""), "options" in problem.meta)
        said = problem.answer
        if mode == "choice" and "options" in problem.meta:
            said = LETTERS[problem.meta["options"].index(said)]
        return "</think>" + STATED[mode].format(gold=said)

    def _template(self, subset: str, options: bool) -> Template:
        name = self.template_name.replace("{subset}", subset.split("-")[0])
        return find_template("choice" if name == "tag" and options else name, self.name)

    def _mode(self, subset: str, options: bool) -> str:
        return self._template(subset, options).mode if self.answer == "template" else ANSWERS[self.answer]

    @staticmethod
    def _problem(uid: int, item: Item) -> Problem:
        some: dict[str, Any] = {
            "worked": item.worked, "hint": item.hint, "options": item.options, "subset": item.subset,
            "golds": item.golds if len(item.golds) > 1 else (), "fields": item.fields,
        }  # fmt: skip
        meta = {key: value for key, value in some.items() if value}
        if item.policy != EXACT:
            meta["policy"] = item.policy
        return Problem(uid, item.question, item.golds[0], meta)


def grade_equal(problem: Problem, result: Result, format_score: float) -> Grade:
    """The grade that a comparison gives. A wrong answer earns `format_score` if it is of the gold's kind: a number, or
    a formula with one, where that has one."""
    if result.extracted is None:
        return Grade(0.0, False, None, None, result.reason)
    if result.correct:
        return Grade(1.0, True, result.extracted, problem.answer, "correct")
    well_formed = not _DIGIT.search(problem.answer) or _DIGIT.search(result.extracted)
    canonical = normalize(result.extracted) or None
    return Grade(format_score if well_formed else 0.0, False, result.extracted, canonical, f"wrong: {result.reason}")


def _grade_option(problem: Problem, result: Result, format_score: float) -> Grade:
    if result.extracted is None:
        return Grade(0.0, False, None, None, result.reason)
    chosen = _chosen(result.extracted, problem.meta["options"])
    if chosen is None and result.correct:
        chosen = problem.answer
    if chosen is None:
        return Grade(0.0, False, result.extracted, None, "names no option")
    right = chosen == problem.answer
    reason = "correct" if right else f"wrong option {chosen}"
    return Grade(1.0 if right else format_score, right, result.extracted, chosen, reason)


def _chosen(written: str, options: tuple[str, ...]) -> str | None:
    """The option that an answer means: by its text, or by its letter with nothing or more words after it."""
    if written in options:
        return written
    letter = _LETTER.fullmatch(without_clothes(written))
    at = LETTERS.index((letter[1] or letter[2]).upper()) if letter else len(options)
    return options[at] if at < len(options) else None


def without_clothes(written: str) -> str:
    """A word or a letter without the fonts, the dollar signs and the markdown around it."""
    return _CLOTHES.sub(r"\1", written).strip(" *$`\n")


# ---- reading ---------------------------------------------------------------------------------------------------------


def questions_file(
    path: Path,
    *,
    answer: str = "template",
    template: str = "auto",
    format_score: float = 0.0,
    split: str = "hash",
    question_field: str = "auto",
    gold_field: str = "auto",
    gold_form: str = "guess",
    gold_list: str = "any",
    solution_field: str = "auto",
) -> Questions:
    """The task of a file, or of a folder with one or more. split "hash": an eighth of the questions is held out, at
    least one; "all": all are for test. A folder with files of a test split is tested on those, and trained on the
    others."""
    if gold_form not in FORMS or gold_list not in ("any", "all"):
        raise UserError(
            f"{path}: expected gold_form in {', '.join(FORMS)} and gold_list in any, all, got {gold_form!r} and "
            f"{gold_list!r}"
        )
    record = DataSet(
        QUESTION_FIELDS if question_field == "auto" else (question_field,),
        GOLD_FIELDS if gold_field == "auto" else (gold_field,), "", {}, form=gold_form, several=gold_list,
        solution=("worked",) if solution_field == "auto" else (solution_field,),
        template=FILE_TEMPLATES.get(answer, "tag") if template == "auto" else template,
    )  # fmt: skip
    return _build(str(path), record, Path(path), "", answer, format_score, split, strict=True)


def data_set(
    name: str,
    path: str,
    *,
    answer: str = "template",
    template: str = "auto",
    format_score: float = 0.0,
    split: str = "hash",
    data: str = "auto",
) -> Questions:
    """The task of a data set known by name, `path` or not; see `questions_file` and `hub.find_folder`. Rows without an
    answer and rows that repeat another are left out, and counted in the task's notes."""
    base, _, subset = name.partition("-")
    record = DATASETS[base]
    record = replace(record, template=record.template if template == "auto" else template)
    folder = find_folder(base, record.hub, path, "" if data == "auto" else data)
    return _build(name, record, folder, subset, answer, format_score, split, strict=False)


def data_set_names() -> list[str]:
    """The names of `data_set`: those of `DATASETS`, and of their parts."""
    return [full for name, record in DATASETS.items() for full in (name, *(f"{name}-{s}" for s in record.subsets))]


def _build(
    name: str, record: DataSet, folder: Path, subset: str, answer: str, format_score: float, split: str, strict: bool
) -> Questions:
    if answer not in ("template", *ANSWERS) or split not in ("hash", "all"):
        raise UserError(
            f"{name}: expected answer in template, {', '.join(ANSWERS)} and split in hash, all, got {answer!r} and "
            f"{split!r}"
        )
    if not 0 <= format_score <= MAX_FORMAT_SCORE:
        raise UserError(f"{name}: format_score must be in [0, {MAX_FORMAT_SCORE}], got {format_score}")
    if "{subset}" not in record.template:
        find_template(record.template, name)
    left_out: Counter[str] = Counter()
    train: list[Item] = []
    test: list[Item] = []
    seen: set[Any] = set()
    for part in (subset,) if subset or folder.is_file() or not record.subsets else record.subsets:
        files = split_files(folder, record.config, part)
        if record.benchmark:
            test += _items(files.test or files.plain or files.train, record, part, seen, left_out, strict)
        else:
            test += _items(files.test, record, part, set(), left_out, strict)
            train += _items(files.train or files.plain, record, part, seen, left_out, strict)
    if not train and not test:
        raise UserError(f"{name}: no row with a question and an answer in {folder}")
    for item in (*train, *test):
        if item.options and answer == "last":
            raise UserError(f"{name}: an option is named in an answer tag; use answer='tag'")
    own_test = record.benchmark or bool(train and test)
    if train and test:  # the set says itself what is held out
        tested = {_key(item.question) for item in test}
        clean = [item for item in train if _key(item.question) not in tested]
        left_out["train rows whose question is in the test split"] += len(train) - len(clean)
        train = clean if split == "hash" else []
    else:
        rows, train, test = train + test, [], []
        held_out = held_out_keys("question:" + item.question for item in rows) if split == "hash" else None
        for item in rows:
            (test if held_out is None or "question:" + item.question in held_out else train).append(item)
    notes = tuple(f"{name}: {count} {what} left out" for what, count in left_out.items() if count)
    return Questions(
        name, tuple(train), tuple(test), record.template, answer, format_score, record.kind, notes, own_test
    )


def _key(question: str) -> str:
    """Questions that differ in blanks alone are one."""
    return "".join(question.split())


def _items(
    files: Iterable[Path], record: DataSet, subset: str, seen: set[Any], left_out: Counter[str], strict: bool
) -> list[Item]:
    """strict: a row without an answer is an error, not a note."""
    items = []
    for file in files:
        for row in read_file(file, record.columns):
            if record.distinct:
                key = row.get(record.distinct) if record.distinct != "question" else None
                if key is None:
                    key = _key(str(row.first(record.question)[1]))
                if key in seen:
                    left_out["rows that repeat another"] += 1
                    continue
                seen.add(key)
            item = _item(row, record, subset, strict)
            if item is None:
                left_out["rows without an answer"] += 1
            else:
                items.append(item)
    return items


def _item(row: Row, record: DataSet, subset: str, strict: bool) -> Item | None:
    at, question = row.first(record.question)
    if not isinstance(question, str) or not question.strip():
        row.fail(at or record.question[0], "a text that is not empty; question_field names another field")
    options = _read_options(row)
    golds: tuple[str, ...] = ()
    for name in record.gold:
        if golds := _golds(row, name, record):
            break
    if not golds and not strict:
        return None
    if not golds:
        at = row.first(record.gold)[0] or record.gold[0]
        row.fail(
            at,
            f"an answer: a text that is not empty or a number, alone or after '{MARK}'; gold_field names another field",
        )
    if options and golds[0] not in options:
        row.fail(row.first(record.gold)[0], f"one of the options, alone or after '{MARK}'")
    hint = row.values.get("hint", "")
    if not isinstance(hint, str) or ("hint" in row.values and not hint.strip()):
        row.fail("hint", "a text that is not empty")
    policy = record.policy
    if record.kind == "wrapped":
        question = unwrapped(question)
    elif record.kind == "steps":
        question = with_steps(row, question)
    elif record.kind == "mathcheck":
        question = mathcheck.asked(row, question)
    if isinstance(row.get("error"), str) and row.get("error"):  # of OlympiadBench: the tolerance of an answer
        policy = replace(policy, abs_tol=_tolerance(row))
    values = {k: v for k, v in row.values.items() if k not in (*record.question, *record.gold, *record.solution)}
    short = {
        k: v for k, v in values.items()
        if isinstance(v, int | float) or (isinstance(v, str) and 0 < len(v) <= SCALAR and k != "hint")
    }  # fmt: skip
    return Item(question, golds, _worked(row, record), hint.strip(), options, subset, policy, short)


def _golds(row: Row, name: str, record: DataSet) -> tuple[str, ...]:
    value = row.get(name)
    read = FORMS[record.form]
    golds = tuple(text for v in (value if isinstance(value, list) else [value]) if (text := read(v)))
    if len(golds) < (len(value) if isinstance(value, list) else 1):
        return ()
    several = record.several == "all" and len(golds) > 1
    return (all_of(golds),) if several or row.get("is_multiple_answer") is True else golds


def _worked(row: Row, record: DataSet) -> str:
    """The worked solution: a field of its own, else what stands before GSM8K's mark."""
    _, value = row.first(record.solution)
    if value is None:
        value = row.first(record.gold)[1]
        value = value if isinstance(value, str) and MARK in value else ""
    if not isinstance(value, str):
        return ""
    worked = value.rpartition(MARK)[0] if MARK in value else value
    return without_calculations(worked).strip()


def _read_options(row: Row) -> tuple[str, ...]:
    options = row.values.get("options")
    if options is None:
        return ()
    texts = isinstance(options, list) and all(isinstance(o, str) and o.strip() for o in options)
    if not texts or not 2 <= len({o.strip() for o in options}) == len(options) <= len(LETTERS):
        row.fail("options", f"a list of 2 to {len(LETTERS)} different texts that are not empty")
    return tuple(o.strip() for o in options)


def _tolerance(row: Row) -> float:
    try:
        tolerance = max(float(part) for part in row.get("error").split(","))
    except ValueError:
        tolerance = math.nan
    if not 0 <= tolerance < math.inf:
        row.fail("error", "a tolerance such as 1e-1")
    return tolerance


def unwrapped(prompt: str) -> str:
    """The problem of a prompt of DAPO's, without the paragraphs around it that say how to write the answer."""
    paragraphs = prompt.strip().split("\n\n")
    if len(paragraphs) > 1 and "Answer:" in paragraphs[0]:
        del paragraphs[0]
    if len(paragraphs) > 1 and "Answer:" in paragraphs[-1]:
        del paragraphs[-1]
    return "\n\n".join(paragraphs).strip()


def with_steps(row: Row, question: str) -> str:
    """A problem of ProcessBench (arXiv 2412.06559) with the solution whose first wrong paragraph is asked for."""
    steps = row.get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        row.fail("steps", "a list of texts that is not empty")
    listed = "\n".join(f"[{number}] {step}" for number, step in enumerate(steps))
    return (
        f"Here is a problem and a solution whose paragraphs are numbered from 0.\n\nProblem:\n{question}\n\nSolution:\n"
        f"{listed}\n\nGive the number of the first paragraph with an error, or -1 if there is none."
    )
