"""Responses as they end: continuous batching that hands out each one with its numbers, so that none has to wait for the
last before it is graded and kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice

from pymathrl.batch import Rollout
from pymathrl.errors import UserError
from pymathrl.prompt import Prompts
from pymathrl.rollout import Draws, Engine

SHARE = 16  # of the length limit: the tokens between two looks at what has ended, at least MIN_TOKENS
MIN_TOKENS = 16


@dataclass(frozen=True)
class Ended:
    """rollout: a row per response that has ended; rows: (problem, sample) of each; tokens: drawn so far, in all."""

    rollout: Rollout
    rows: list[tuple[int, int]]
    tokens: int


def stream(
    engine: Engine, prompts: Prompts, draws: Draws, todo: Sequence[int], stop_strings: Sequence[str] = ()
) -> Generator[Ended, None, None]:
    """`draws.samples` responses to each of the problems `todo` (positions in the prompts), the tokens being those that
    `Engine.generate` draws with `draws.uids`: what a response says does not depend on what runs beside it.

    Yields after every few tokens, where a response has ended. The sequences are freed when the iterator is closed.
    """
    longest, limit = max((len(prompts.ids[p]) for p in todo), default=0), engine.policy.config.max_positions
    if longest + draws.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {draws.max_new_tokens} new tokens exceed the model's {limit} positions; "
            "lower --max-prompt-tokens or --max-new-tokens"
        )
    uids = draws.uids(prompts.problems).view(-1, draws.samples).tolist()
    waiting = iter([(p, s) for p in todo for s in range(draws.samples)])
    roots: dict[int, int] = {}  # problem -> the sequence of its prompt, while samples of it wait
    active: dict[int, tuple[int, int]] = {}  # sequence -> (problem, sample)
    look = max(MIN_TOKENS, draws.max_new_tokens // SHARE)
    tokens = 0
    try:
        while True:
            new = list(islice(waiting, engine.max_batch - len(active)))
            _start(engine, prompts, draws.samples, new, uids, roots, active)
            if not active:
                return
            seqs = list(active)
            before = engine.lengths(seqs)
            drawn = [n - len(prompts.ids[active[seq][0]]) for seq, n in zip(seqs, before, strict=True)]
            why = engine.segment(
                seqs, [min(look, draws.max_new_tokens - n) for n in drawn], seed=draws.seed,
                stop_strings=stop_strings, **draws.sampling,
            )  # fmt: skip
            steps = [b - a for a, b in zip(before, engine.lengths(seqs), strict=True)]
            tokens += sum(steps)
            over = [
                seq for seq, stop, n, step in zip(seqs, why, drawn, steps, strict=True)
                if stop != "length" or n + step == draws.max_new_tokens
            ]  # fmt: skip
            if over:
                ended = Ended(engine.rollout(over), [active.pop(seq) for seq in over], tokens)
                engine.free(over)
                yield ended
    finally:
        left = [*active, *roots.values()]
        if left:
            engine.free(left)


def _start(
    engine: Engine, prompts: Prompts, samples: int, new: Sequence[tuple[int, int]], uids: list[list[int]],
    roots: dict[int, int], active: dict[int, tuple[int, int]],
) -> None:  # fmt: skip
    """A sequence for each of the samples `new`; those of one problem share the pages of its prompt."""
    wanted: dict[int, list[int]] = defaultdict(list)
    for problem, sample in new:
        wanted[problem].append(sample)
    fresh = [p for p in wanted if p not in roots]
    if fresh:
        roots |= zip(fresh, engine.start([prompts.ids[p] for p in fresh]), strict=True)
    by_count: dict[int, list[int]] = defaultdict(list)  # one fork for all problems of as many samples
    for problem, numbers in wanted.items():
        by_count[len(numbers)].append(problem)
    for count, some in by_count.items():
        rows = [(p, s) for p in some for s in wanted[p]]
        copies = engine.fork([roots[p] for p in some], count, [uids[p][s] for p, s in rows])
        active |= zip(copies, rows, strict=True)
    complete = [p for p, numbers in wanted.items() if numbers[-1] == samples - 1]
    if complete:
        engine.free([roots.pop(p) for p in complete])
