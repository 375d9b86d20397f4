"""The instruction prompts shared by the tasks whose answer stands in an ``<answer>`` tag."""

from dataclasses import replace
from typing import TYPE_CHECKING

from pymathrl.errors import UserError, nearest

if TYPE_CHECKING:
    from pymathrl.tasks import Problem, Task

STYLES = ("compact", "plain", "chat")


def instruct(task: str, style: str) -> str:
    """`task`: the user's message.  style "chat": the message itself.  "plain": a dialogue for a base model to continue,
    which ends inside the assistant's turn after an opened ``<think>`` (the form used by TinyZero and ROVER)."""
    if style == "chat":
        return task
    if style == "plain":
        return (
            "What follows is a dialogue between a User who poses a problem and an Assistant who solves it. "
            "The Assistant works the problem out in its head before it tells the User the result.\n"
            f"User: {task}\nAssistant: I will work through this one step at a time.\n<think>"
        )
    raise UserError(f"unknown prompt style {style!r}: {nearest(style, STYLES)}")


def noted(task: "Task", problem: "Problem", style: str, note: str) -> str:
    """The prompt of a problem with a line of text below the question, a hint. Under "compact" the thought begins with
    it: the built-in model takes up a thought that it finds begun, and is lost where a line stands elsewhere."""
    if style == "compact":
        return task.prompt(problem, style) + note
    if hasattr(task, "template"):
        return task.prompt(replace(problem, question=f"{problem.question}\n{note}"), style)
    return instruct(f"{task.prompt(problem, 'chat')}\n{note}", style)
