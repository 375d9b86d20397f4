"""Stage 3, verify: the text of each response, graded by the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymathrl.batch import Rollout
from pymathrl.models import Tokenizer
from pymathrl.tasks import Grade, Problem, Task


@dataclass(frozen=True)
class Verdicts:
    """reward fp32 [B], correct bool [B], and for each row its grade and the graded text."""

    reward: Tensor
    correct: Tensor
    grades: list[Grade]
    texts: list[str]


def verify(rollout: Rollout, problems: Sequence[Problem], task: Task, tokenizer: Tokenizer) -> Verdicts:
    """Grades every response; `problems` [P] in group order; a branch row gets what its response gets. Equal responses
    to one problem are graded once."""
    rows = rollout.response_of_row
    rollout = rollout.main
    ids, offsets = rollout.ids.tolist(), rollout.offsets.tolist()
    prompt_len, groups = rollout.prompt_len.tolist(), rollout.group.tolist()
    texts = tokenizer.decode_batch(
        [ids[begin + n : end] for begin, end, n in zip(offsets, offsets[1:], prompt_len, strict=False)]
    )
    seen: dict[tuple[int, str], Grade] = {}
    grades = []
    for group, text in zip(groups, texts, strict=True):
        key = (group, text)
        if key not in seen:
            seen[key] = task.grade(problems[group], text)
        grades.append(seen[key])
    grades, texts = [grades[i] for i in rows.tolist()], [texts[i] for i in rows.tolist()]
    reward = torch.tensor([g.reward for g in grades], dtype=torch.float32, device=rollout.device)
    correct = torch.tensor([g.correct for g in grades], dtype=torch.bool, device=rollout.device)
    return Verdicts(reward, correct, grades, texts)
