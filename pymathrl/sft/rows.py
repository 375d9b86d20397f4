"""Supervised rows: from the objects of a JSONL file to token ids with a mask of the tokens that are trained.

A row is a list of segments in the order they are read; each is context or trained. The tokens of a segment are those
of its own text, as at generation, where the prompt is encoded before the first token of a response is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymathrl.batch import ROLE_FORCED, ROLE_PROMPT, ROLE_SAMPLED, STOP_EOS, Rollout
from pymathrl.errors import UserError
from pymathrl.models import Policy
from pymathrl.prompt import encode_prompt
from pymathrl.tasks.jsonl import fail
from pymathrl.tasks.questions import LETTERS

Segment = tuple[list[int], bool]  # token ids, and whether they are trained
MAX_WEIGHT = 1e6  # of a row; 1e300 is infinite in fp32, and the loss nan


@dataclass(frozen=True)
class Example:
    """One row: ids int32 [T], trained bool [T] (never the first token), weight: its tokens' factor in the loss."""

    ids: Tensor
    trained: Tensor
    weight: float = 1.0


def join(segments: Sequence[Segment], weight: float = 1.0) -> Example:
    """The segments one after the other; context after the last trained token teaches nothing and is left out.
    ValueError where nothing is trained, or the first token is: it has no context to be predicted from."""
    ids = [i for part, _ in segments for i in part]
    trained = [flag for part, flag in segments for _ in part]
    if True not in trained or trained[0]:
        raise ValueError(f"join: segments must begin with context and hold trained tokens, got {len(ids)} tokens")
    end = len(trained) - trained[::-1].index(True)
    return Example(torch.tensor(ids[:end], dtype=torch.int32), torch.tensor(trained[:end]), weight)


def pack(examples: Sequence[Example], device: torch.device) -> tuple[Rollout, Tensor]:
    """(the rows packed as the update takes them, weight fp32 [T] of each token, 0 where not trained).

    The trained tokens have the role "sampled": of a multi-turn row every assistant turn. Context before the first of
    them is its prompt, and later context is "forced". Attention is exact per row: no token sees another row.
    """
    trained = torch.cat([e.trained for e in examples]).to(device)
    lengths = torch.tensor([e.ids.numel() for e in examples], device=device)
    prompt = torch.tensor([int(e.trained.int().argmax()) for e in examples], device=device)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    position = torch.arange(trained.numel(), device=device) - offsets[:-1].repeat_interleave(lengths)
    role = torch.full(trained.shape, ROLE_FORCED, dtype=torch.int8, device=device)
    role[position < prompt.repeat_interleave(lengths)] = ROLE_PROMPT
    role[trained] = ROLE_SAMPLED
    zero = torch.zeros(trained.shape, device=device)
    rows = torch.arange(len(examples), device=device)
    rollout = Rollout(
        ids=torch.cat([e.ids for e in examples]).to(device, torch.int64), role=role, logp=zero, mean_logp=zero,
        entropy=zero, offsets=offsets, prompt_len=prompt, group=rows, uid=rows,
        stop=torch.full((len(examples),), STOP_EOS, dtype=torch.int8, device=device),
    )  # fmt: skip
    weight = torch.tensor([e.weight for e in examples], device=device).repeat_interleave(lengths)
    return rollout, torch.where(trained, weight, 0.0)


# --- segments ---------------------------------------------------------------------------------------------------------


def exchange(policy: Policy, prompt: str, response: str, system: str = "") -> list[Segment]:
    """A prompt as the policy is asked at generation, after a system message if there is one, and a response with the
    end token that closes it."""
    reply = policy.tokenizer.encode(response)
    closed = reply[-1:] and reply[-1] in policy.eos_ids
    return [(encode_prompt(policy, prompt, system), False), (reply if closed else [*reply, end_id(policy)], True)]


def conversation(policy: Policy, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[Segment]:
    """A conversation under the policy's chat template: assistant turns are trained, up to and with their end token;
    system, user and tool turns, and the words that the template puts around all turns, are context.

    UserError where the template writes an earlier turn differently once later ones follow: what the model would read
    at generation is then no beginning of the row.
    """
    chat = policy.tokenizer.chat
    segments: list[Segment] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat([dict(m) for m in messages[:i]], tools=tools)
        after = chat([dict(m) for m in messages[: i + 1]], tools=tools, add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                f"the chat template does not put message {i + 1} after the earlier ones as they were; give one row "
                "per turn, or rows with prompt and response"
            )
        reply = policy.tokenizer.encode(after[len(before) :])
        ends = [at for at, token in enumerate(reply) if token in policy.eos_ids]
        cut = ends[-1] + 1 if ends else len(reply)  # past it stands what separates turns, such as a line break
        segments += [(policy.tokenizer.encode(before[len(done) :]), False), (reply[:cut], True), (reply[cut:], False)]
        done = after
    return segments


def critique_prompt(question: str, solution: str, style: str) -> str:
    """The context of a critique (critique fine-tuning, CFT, arXiv 2501.17703): the problem and a candidate solution."""
    if style == "compact":
        return f"{question}\n{solution}\n"
    task = (
        "Judge whether the solution below answers the question. Check it step by step, correct it where it is wrong, "
        f"and end with a verdict: right or wrong.\n\nQuestion:\n{question}\n\nSolution:\n{solution}"
    )
    return task if style == "chat" else f"{task}\n\nCritique:\n"


def end_id(policy: Policy) -> int:
    """The token that closes a response."""
    own = policy.tokenizer.eos_id
    return own if own in policy.eos_ids else policy.eos_ids[0]


# --- multiple choice and open questions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A question with options and a gold answer, the text of one of them. alone: it can be answered without them."""

    question: str
    options: tuple[str, ...]
    gold: str
    alone: bool


def as_choice(item: Choice) -> tuple[str, str] | None:
    """(question with lettered options, the gold letter); None where the gold answer is not among the options: no rule
    could then check an answer."""
    if item.gold not in item.options:
        return None
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.options, strict=False))
    return f"{item.question}\n{listed}", LETTERS[item.options.index(item.gold)]


def as_open(item: Choice) -> tuple[str, str] | None:
    """(question without its options, the gold answer); None where it cannot be answered without them."""
    return (item.question, item.gold) if item.alone else None


TEMPLATES = {"mcq": as_choice, "open": as_open}  # CrossThink, arXiv 2504.13941


def read_choice(path: str, line: int, row: Mapping[str, Any]) -> Choice:
    """Of {"question", "options": [texts], "answer": a letter or an option's text, "needs_options": bool if any}."""
    item, options = dict(row), row["options"]
    if (
        not isinstance(options, list)
        or not 2 <= len(options) <= len(LETTERS)
        or not all(isinstance(o, str) and o.strip() for o in options)
        or len({o.strip() for o in options}) < len(options)
    ):
        fail(path, line, item, "options", f"a list of 2 to {len(LETTERS)} different texts that are not empty")
    answer, needs = text_of(path, line, item, "answer").strip(), row.get("needs_options", False)
    if not isinstance(needs, bool):
        fail(path, line, item, "needs_options", "true or false")
    texts = tuple(o.strip() for o in options)
    letter = answer.strip("().").upper()
    by_letter = answer not in texts and len(letter) == 1 and letter in LETTERS[: len(texts)]
    gold = texts[LETTERS.index(letter)] if by_letter else answer
    return Choice(text_of(path, line, item, "question"), texts, gold, not needs)


# --- rows of files ----------------------------------------------------------------------------------------------------


def text_of(path: str, line: int, item: dict[str, Any], *names: str) -> str:
    """The text under the first of these names that the row has."""
    name = next((n for n in names if n in item), names[0])
    value = item.get(name)
    if not isinstance(value, str) or not value.strip():
        fail(path, line, item, name, "a text that is not empty")
    return value


def read_row(
    policy: Policy, mode: str, template: str, path: str, line: int, item: dict[str, Any]
) -> tuple[Example | None, str]:
    """(the example of a row, ""), or (None, why it is left out). UserError, with file and line, for a bad row.

    mode "cft": {"question", "solution", "critique"}. Otherwise {"messages": [{"role", "content"}, ..]}, or {"prompt" or
    "question", "response" or "answer"}, with a "system" message where a chat model is to read one; with {"options"} a
    multiple-choice question under a template. "weight" is optional in all.
    """
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT:
        fail(path, line, item, "weight", f"a number from {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    try:
        if mode == "cft":
            question, solution = text_of(path, line, item, "question"), text_of(path, line, item, "solution")
            prompt = critique_prompt(question, solution, policy.prompt_style)
            segments = exchange(policy, prompt, text_of(path, line, item, "critique"))
        elif "messages" in item:
            segments = conversation(policy, read_messages(path, line, item), item.get("tools"))
        elif "options" in item:
            asked = TEMPLATES[template](read_choice(path, line, item))
            if asked is None:
                return None, "gold not among the options" if template == "mcq" else "unanswerable without options"
            response = text_of(path, line, item, "response") if "response" in item else asked[1]
            segments = exchange(policy, asked[0], response)
        else:
            prompt = text_of(path, line, item, "prompt", "question")
            system = text_of(path, line, item, "system") if "system" in item else ""
            segments = exchange(policy, prompt, text_of(path, line, item, "response", "answer"), system)
    except UserError as error:
        raise error if str(error).startswith(f"{path}, line") else UserError(f"{path}, line {line}: {error}") from None
    return join(segments, float(weight)), ""


def read_messages(path: str, line: int, item: dict[str, Any]) -> list[dict[str, Any]]:
    messages = item["messages"]
    ok = isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    roles = [m["role"] for m in messages] if ok else []
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        fail(path, line, item, "messages", "a list of objects with a role: another first, an assistant's turn after it")
    for number, m in enumerate(messages, 1):
        empty = not isinstance(m.get("content"), str) or (m["role"] == "assistant" and not m["content"].strip())
        if empty and not m.get("tool_calls"):  # a template may write "None", or an empty turn to be learned
            raise UserError(
                f"{path}, line {line}: message {number} must have a text as content (not empty where trained) or "
                f"tool_calls, got {m.get('content')!r}"
            )
    return messages
