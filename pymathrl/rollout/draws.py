"""How responses are drawn: the options of one call for rollouts, and the identity of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pymathrl.errors import UserError
from pymathrl.tasks.problem import Problem

SAMPLE_BITS = 16  # of a sample's identity, which is (problem uid, these bits)
MAX_SAMPLES = 1 << SAMPLE_BITS


@dataclass(frozen=True)
class Draws:
    """samples responses per prompt of at most max_new_tokens, under these filters.

    first: number of the first sample, one for all prompts or one per prompt. A second look at the same problem under
        the same seed needs other numbers, or it would draw the same responses again.
    """

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    first: int | Sequence[int] = 0

    @property
    def sampling(self) -> dict[str, Any]:
        """The filters, as keyword arguments of the engine."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}

    def uids(self, problems: Sequence[Problem]) -> torch.Tensor:
        """int64 [P*samples]: the identity of each sample, which keys its random numbers: (problem uid, its number)."""
        return sample_uids(problems, self.samples, self.first)


def sample_uids(problems: Sequence[Problem], samples: int, first: int | Sequence[int] = 0) -> torch.Tensor:
    firsts = torch.tensor([first] * len(problems) if isinstance(first, int) else list(first), dtype=torch.int64)
    most = samples + int(firsts.max()) if problems else 0
    if most > MAX_SAMPLES:
        raise UserError(f"at most {MAX_SAMPLES} responses per problem can be told apart, got {most}")
    problem = torch.tensor([p.uid for p in problems], dtype=torch.int64)
    return ((problem << SAMPLE_BITS)[:, None] + firsts[:, None] + torch.arange(samples)).flatten()
