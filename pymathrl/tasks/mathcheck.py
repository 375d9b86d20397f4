"""MATHCHECK-GSM (arXiv 2407.08733): four tasks on variants of one problem, each with its own way to read an answer.

solving: the number. outcome_judging: whether a solution is Correct or Incorrect. process_judging: the first wrong step
of a solution, "Step 3". answerable_judging: whether a problem is Answerable or Unanswerable. The sentences that ask for
them are ours; the rules by which answers are read are those of the authors' evaluation, in our words.
"""

import re

from pymathrl.tasks.readers import Row
from pymathrl.verify.extract import after_thoughts, extract

TASKS = ("solving", "outcome_judging", "process_judging", "answerable_judging")
ASKED = {
    "solving": "{question}\n\nReason step by step, and end with the sentence “The answer is: N”, with the number that "
    "is the answer in the place of N.",
    "outcome_judging": "Here is a problem and a solution.\n\nProblem: {question}\n\nSolution:\n{solution}\n\nIs the "
    "final answer of the solution correct? Reason step by step, and end with “The answer is: Correct” or “The answer "
    "is: Incorrect”.",
    "process_judging": "Here is a problem and a solution that goes wrong.\n\nProblem: {question}\n\nSolution:\n"
    "{solution}\n\nWhich step is the first that is wrong? Reason step by step, and end with “The answer is: Step i”, "
    "with the number of that step in the place of i.",
    "answerable_judging": "{question}\n\nDoes the problem say all that is needed to answer it? Do not answer it. "
    "Reason step by step, and end with “The answer is: Answerable” or “The answer is: Unanswerable”.",
}
_STEP = re.compile(r"\bstep\s*(\d{1,3})\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?\n]+")
_WRONG = re.compile(r"\b(?:wrong|incorrect|error|errors|mistake|mistakes|mistaken|flaw|flawed|false)\b", re.IGNORECASE)
_LABELS = {
    "outcome_judging": re.compile(r"\b(incorrect|correct)\b", re.IGNORECASE),
    "answerable_judging": re.compile(r"\b(unanswerable|answerable)\b", re.IGNORECASE),
}
_STATED = r"the answer is\W{0,8}"


def asked(row: Row, question: str) -> str:
    """The question of a row with what its task asks for."""
    task = row.get("task_type")
    if task not in ASKED:
        row.fail("task_type", f"one of {', '.join(TASKS)}")
    solution = row.get("solution")
    if "{solution}" in ASKED[task] and not isinstance(solution, str):
        row.fail("solution", "a text")
    return ASKED[task].replace("{solution}", str(solution)).replace("{question}", question)


def read(task: str, response: str) -> str | None:
    """What a response answers to one of the four tasks, in the words of the golds ("18", "Incorrect", "Step 3",
    "Unanswerable"); None where that cannot be told."""
    text = after_thoughts(response)
    if text is None:
        return None
    if task == "solving":
        return extract(extract(text, "gsm8k") or text, "last_number")
    if task == "process_judging":
        return _step(text)
    label = _LABELS[task]
    stated = list(re.finditer(_STATED + label.pattern, text, re.IGNORECASE))
    if not stated:
        stated = list(label.finditer(text))
    return stated[-1][1].capitalize() if stated else None


def _step(text: str) -> str | None:
    stated = re.findall(_STATED + _STEP.pattern, text, re.IGNORECASE)
    if stated:
        return f"Step {int(stated[-1])}"
    named = {int(n) for n in _STEP.findall(text)}
    if len(named) > 1:  # several steps are gone through: the one that a sentence calls wrong
        sentences = [s for s in _SENTENCE.findall(text) if _WRONG.search(s)]
        blamed = [found for s in sentences if len(found := {int(n) for n in _STEP.findall(s)}) == 1]
        named = blamed[0] if blamed else set()
    return f"Step {named.pop()}" if len(named) == 1 else None
