"""Stage 1, prompt: the next problems of the stream, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pymathrl.errors import UserError
from pymathrl.models import Policy
from pymathrl.tasks import Problem, Task
from pymathrl.tasks.questions import STATED


@dataclass(frozen=True)
class Prompts:
    """problems [P] and their token ids [P]; cursor: where the next draw begins; too_long: how many were passed over."""

    problems: Sequence[Problem]
    ids: Sequence[Sequence[int]]
    cursor: int = 0
    too_long: int = 0


def encode(policy: Policy, task: Task, problem: Problem) -> list[int]:
    """The prompt of one problem in the policy's style."""
    return encode_prompt(policy, task.prompt(problem, policy.prompt_style), system_of(task))


def system_of(task: Task) -> str:
    """The message that a task puts before the user's; "" for most."""
    return getattr(task, "system", "")


def stop_strings(task: Task) -> tuple[str, ...]:
    """The texts that end a response, of the task's prompt template; none for most."""
    return getattr(getattr(task, "template", None), "stop", ())


def encode_prompt(policy: Policy, text: str, system: str = "") -> list[int]:
    """The ids of a prompt; under the style "chat" the template is put around it, as the user's message, after `system`
    if that is not empty. The other styles have no place for a system message."""
    if policy.prompt_style == "chat":
        messages = [{"role": "system", "content": system}] if system else []
        text = policy.tokenizer.chat([*messages, {"role": "user", "content": text}])
    return policy.tokenizer.encode(text)


def check_spelling(policy: Policy, task: Task, problem: Problem) -> None:
    """UserError where the model's vocabulary cannot spell the prompt of a problem, or the form that an answer to it is
    read from: such a model would be asked nothing, or earn nothing."""
    read = "read its problems; choose another model or task"
    try:
        encode(policy, task, problem)
        if hasattr(task, "check"):
            read = "write an answer as it is read; choose another --task-answer (tag, for the built-in model) or model"
            policy.tokenizer.encode(STATED[task.check(problem).mode].format(gold=1))
    except UserError as error:
        raise UserError(f"--task {task.name}: the model cannot {read}: {error}") from None


def draw(policy: Policy, task: Task, *, cursor: int, count: int, seed: int, max_tokens: int) -> Prompts:
    """The next `count` problems whose prompt has at most `max_tokens` tokens. A pure function of its arguments."""
    problems: list[Problem] = []
    ids: list[list[int]] = []
    too_long = 0
    while len(problems) < count:
        problem = task.train(cursor, seed)
        prompt = encode(policy, task, problem)
        cursor += 1
        if len(prompt) > max_tokens:
            too_long += 1
            if too_long >= 1000 + 10 * count:
                raise UserError(
                    f"--max-prompt-tokens: {too_long} prompts of the task {task.name} exceed {max_tokens} tokens "
                    f"(the last has {len(prompt)}); raise it"
                )
            continue
        problems.append(problem)
        ids.append(prompt)
    return Prompts(problems, ids, cursor, too_long)
