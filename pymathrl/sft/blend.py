"""A weighted blend of sources: which row of which source is drawn next, a pure function of the draw's number and seed.

One number, the cursor, is therefore the whole state of a blend, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from pymathrl.errors import UserError, nearest
from pymathrl.models import Policy
from pymathrl.prompt import system_of
from pymathrl.sft.rows import TEMPLATES, Example, exchange, join, read_row
from pymathrl.tasks import Task
from pymathrl.tasks.jsonl import read_objects, shuffled

BLOCK = 1000  # draws in which every source has its exact share
SEED_STEP = 1_000_003  # between the streams of random numbers of neighbouring seeds


class Source(Protocol):
    """Rows without end."""

    @property
    def name(self) -> str: ...

    def example(self, index: int, seed: int) -> Example | None:
        """Row `index` of the stream, a pure function of both; None for one that is too long."""
        ...


class FileRows:
    """The rows of a file that are kept, visited once per epoch in an order shuffled by (seed, epoch).

    left_out: why rows were, with counts.
    """

    def __init__(self, name: str, examples: Sequence[Example], left_out: Counter[str]) -> None:
        self.name, self.examples, self.left_out = name, list(examples), left_out
        self._order: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    def example(self, index: int, seed: int) -> Example:
        epoch, at = divmod(index, len(self.examples))
        if self._order[0] != (seed, epoch):  # kept here: `shuffled` remembers fewer orders than a blend may have files
            self._order = ((seed, epoch), shuffled(len(self.examples), seed, epoch))
        return self.examples[self._order[1][at]]

    def digest(self) -> str:
        """Equal exactly when the rows are."""
        total = hashlib.sha256()
        for e in self.examples:
            total.update(f"{e.ids.numel()} {e.weight!r}".encode())
            total.update(e.ids.numpy().tobytes() + e.trained.numpy().tobytes())
        return total.hexdigest()


def read_file(policy: Policy, mode: str, spec: DataSpec, max_tokens: int) -> FileRows:
    """Every row of the file, encoded; rows of more than `max_tokens` tokens are left out and counted."""
    left_out: Counter[str] = Counter()
    examples = []
    for line, item in read_objects(spec.path):
        example, why = read_row(policy, mode, spec.template, spec.path, line, item)
        if example is not None and example.ids.numel() > max_tokens:
            example, why = None, "too long"
        if example is None:
            left_out[why] += 1
        else:
            examples.append(example)
    if not examples:
        counts = ", ".join(f"{n} {why}" for why, n in left_out.items())
        raise UserError(f"{spec.path}: no row is left to train on: {counts} (--max-tokens {max_tokens})")
    return FileRows(spec.path, examples, left_out)


@dataclass(frozen=True)
class Solutions:
    """A task's own worked solutions of its training problems. The style "chat" opens the thought that they start in."""

    policy: Policy
    task: Task
    max_tokens: int

    @property
    def name(self) -> str:
        return f"worked solutions of {self.task.name}"

    def example(self, index: int, seed: int) -> Example | None:
        problem = self.task.train(index, seed)
        text = self.task.solution(problem, random.Random(seed * SEED_STEP + index))
        style = self.policy.prompt_style
        opened = "<think>" + text if style == "chat" else text
        example = join(exchange(self.policy, self.task.prompt(problem, style), opened, system_of(self.task)))
        return example if example.ids.numel() <= self.max_tokens else None


# --- the blend --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSpec:
    """One file of --data. weight: its share relative to the others; None: as many draws as it has rows."""

    path: str
    weight: float | None = None
    template: str = "mcq"


def parse_data(text: str, option: str = "--data") -> list[DataSpec]:
    """FILE[:WEIGHT][:TEMPLATE], comma-separated: "a.jsonl:2,b.jsonl:1:open". Weights for all files or for none.
    option: where the text is from, for errors."""
    specs = []
    for part in filter(None, text.split(",")):
        path, weight, template = part, None, "mcq"
        head, _, tail = path.rpartition(":")
        if head and not tail.endswith(".jsonl") and not _is_number(tail):
            if tail not in TEMPLATES:
                raise UserError(f"{option} {part}: unknown template {tail!r}; {nearest(tail, TEMPLATES)}")
            path, template = head, tail
            head, _, tail = path.rpartition(":")
        if head and _is_number(tail):
            path, weight = head, float(tail)
            if not 0 < weight < float("inf"):
                raise UserError(f"{option} {part}: expected a weight above 0, got {tail}")
        specs.append(DataSpec(path, weight, template))
    if not specs:
        raise UserError(f"{option}: expected FILE[:WEIGHT][:TEMPLATE], comma-separated, got {text!r}")
    if 0 < sum(s.weight is None for s in specs) < len(specs):
        raise UserError(f"{option}: expected weights for all files or for none, got {text!r}")
    return specs


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def apportion(weights: Sequence[float]) -> tuple[int, ...]:
    """BLOCK draws shared out in proportion to the weights by largest remainders, at least one to each source."""
    total = sum(weights)
    exact = [BLOCK * w / total for w in weights]
    counts = [max(1, int(e)) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: max(0, BLOCK - sum(counts))]:
        counts[i] += 1
    counts[counts.index(max(counts))] -= max(0, sum(counts) - BLOCK)  # what the least shares took
    return tuple(counts)


@lru_cache(maxsize=4)
def _block(counts: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """(source, how many of it came before) of each draw of a block."""
    sources = [s for s, n in enumerate(counts) for _ in range(n)]
    if len(counts) > 1:
        random.Random(seed * SEED_STEP + block).shuffle(sources)
    seen = [block * n for n in counts]
    draws = []
    for s in sources:
        draws.append((s, seen[s]))
        seen[s] += 1
    return draws


class Blend:
    """Sources with weights. Every BLOCK draws hold each source in its exact share, in an order shuffled by the seed."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int) -> None:
        if not 1 <= len(sources) == len(weights) or len(sources) > BLOCK // 2:
            raise ValueError(
                f"Blend: sources must be 1 to {BLOCK // 2} with a weight each, got {len(sources)} and {len(weights)}"
            )
        self.sources, self.seed, self.counts = list(sources), seed, apportion(weights)

    def example(self, index: int) -> tuple[int, Example | None]:
        """(source, row) of draw `index`."""
        block, at = divmod(index, BLOCK)
        source, row = _block(self.counts, self.seed, block)[at]
        # a seed of its own per source: files of one length would otherwise be visited in one order
        return source, self.sources[source].example(row, self.seed + 7_919 * source)

    def draw(self, cursor: int, count: int) -> Drawn:
        """The next `count` rows that are short enough."""
        examples: list[Example] = []
        per_source = [0] * len(self.sources)
        too_long = 0
        while len(examples) < count:
            source, example = self.example(cursor)
            cursor += 1
            if example is None:
                too_long += 1
                if too_long >= 1000 + 10 * count:
                    raise UserError(f"--max-tokens: {too_long} rows of the data in a row are longer; raise it")
                continue
            per_source[source] += 1
            examples.append(example)
        return Drawn(examples, cursor, too_long, per_source)


@dataclass(frozen=True)
class Drawn:
    """examples [B]; cursor: where the next draw begins; too_long: passed over; per_source: rows of each source."""

    examples: list[Example]
    cursor: int
    too_long: int
    per_source: list[int]


def file_blend(policy: Policy, mode: str, specs: Sequence[DataSpec], max_tokens: int, seed: int) -> Blend:
    sources = [read_file(policy, mode, spec, max_tokens) for spec in specs]
    weights = [len(s.examples) if spec.weight is None else spec.weight for s, spec in zip(sources, specs, strict=True)]
    return Blend(sources, weights, seed)
