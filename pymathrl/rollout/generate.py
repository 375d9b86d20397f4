"""Generation: prompts in, a packed Rollout out; and the second pass that scores one.

Prompts are padded on the left and prefilled once per group; the group's samples share that prefill by copying its
cache. All rows then step together. Nothing per token is done in Python: the draws of a step stay in tensors, every
CHECK_EVERY steps the finished rows are found in one go, and they leave the batch when enough of them have gathered. The
randomness of a draw is a function of (seed, uid, step) only: what a row says does not depend on where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymathrl.batch import ROLE_PROMPT, ROLE_SAMPLED, STOP_EOS, STOP_LENGTH, Rollout, micro_batches
from pymathrl.errors import UserError
from pymathrl.models.load import Policy
from pymathrl.ops.sample_token import sample_token
from pymathrl.ops.token_logprob import token_logprob

CHECK_EVERY = 4  # steps between two looks for finished rows; a row runs on for 1.5 steps past its end on average
COMPACT_BELOW = 0.7  # finished rows leave when at most this share of the rows is live: a smaller copy, seldom made
GROW_COLUMNS = 128  # first room in the cache for new tokens; doubled when full, so short answers cost little memory
SCORE_LOGITS = 1 << 24  # fp32 logits held at once by `score`: 64 MiB
Progress = Callable[[int, int, int], None]  # rows finished, rows in all, tokens drawn


@dataclass
class _Drawn:
    """What was drawn for B rows, by step: [M,B], M = max_new_tokens. `steps` [B] is how many entries of a row count."""

    ids: Tensor  # int64
    logp: Tensor  # fp32, nats
    mean_logp: Tensor  # fp32, nats
    entropy: Tensor  # fp32, nats
    steps: Tensor  # int64 [B]
    stop: Tensor  # int8 [B]

    @staticmethod
    def empty(rows: int, max_new: int, device: torch.device) -> _Drawn:
        return _Drawn(
            ids=torch.zeros(max_new, rows, dtype=torch.int64, device=device),
            logp=torch.zeros(max_new, rows, device=device),
            mean_logp=torch.zeros(max_new, rows, device=device),
            entropy=torch.zeros(max_new, rows, device=device),
            steps=torch.full((rows,), max_new, dtype=torch.int64, device=device),
            stop=torch.full((rows,), STOP_LENGTH, dtype=torch.int8, device=device),
        )


def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    n: int,
    max_new_tokens: int,
    *,
    seed: int,
    uids: Tensor | Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    max_batch: int = 512,
    on_progress: Progress | None = None,
) -> Rollout:
    """n samples for each of P prompts -> Rollout of P*n rows in that order, on the policy's device; group = prompt.

    prompts: non-empty lists of token ids. uids int64 [P*n]: the identity of each sample in (seed, uid, step).
    max_batch: rows that run at once, in whole groups where n <= max_batch. The samples do not depend on it.
    A row ends with the first of the policy's end tokens, which belongs to it, or after max_new_tokens.
    temperature divides the logits, 0 is greedy; top_k 0, top_p 1 and min_p 0 keep the whole vocabulary.
    on_progress(rows finished, rows in all, tokens drawn) is called every few steps.
    """
    uid = torch.as_tensor(uids, dtype=torch.int64).to(policy.device)
    _check_request(policy, prompts, n, max_new_tokens, uid, max_batch)
    total = len(prompts) * n
    drawn = _Drawn.empty(total, max_new_tokens, policy.device)

    def draw(logits: Tensor, uid: Tensor, step: Tensor) -> Any:
        return sample_token(logits, seed, uid, step, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    # prompts of like length run together: less padding
    by_length = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    order = torch.tensor(by_length, device=policy.device).repeat_interleave(n) * n
    order += torch.arange(n, device=policy.device).repeat(len(prompts))
    batch = max_batch - max_batch % n if n <= max_batch else max_batch
    done = tokens = 0
    for rows in order.split(batch):
        for step in _run(policy, prompts, n, rows, uid[rows], draw, drawn):
            if on_progress is not None:
                steps = drawn.steps[rows]
                on_progress(done + int((steps <= step).sum()), total, tokens + int(steps.clamp(max=step).sum()))
        done += rows.numel()
        tokens += int(drawn.steps[rows].sum()) if on_progress is not None else 0
    return _pack(prompts, n, uid, drawn)


def _check_request(
    policy: Policy, prompts: Sequence[Sequence[int]], n: int, max_new: int, uid: Tensor, max_batch: int
) -> None:
    for name, value in (
        ("len(prompts)", len(prompts)),
        ("n", n),
        ("max_new_tokens", max_new),
        ("max_batch", max_batch),
    ):
        if value < 1:
            raise ValueError(f"generate: {name} must be >= 1, got {value}")
    if uid.shape != (len(prompts) * n,):
        raise ValueError(f"generate: uids must have shape [{len(prompts) * n}] (P*n), got {list(uid.shape)}")
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if shortest == 0:
        raise ValueError("generate: each prompt must have at least one token, got an empty one")
    if longest + max_new > policy.config.max_positions:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new} new tokens exceed the model's {policy.config.max_positions} "
            "positions; shorten the prompts or lower the number of new tokens"
        )


@torch.inference_mode()
def _run(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    n: int,
    rows: Tensor,
    uid: Tensor,
    draw: Callable[[Tensor, Tensor, Tensor], Any],
    drawn: _Drawn,
) -> Iterator[int]:
    """Samples rows (numbers in 0 .. P*n) to their ends, into their columns of `drawn`; yields the steps made so far."""
    model, device, max_new = policy.model, policy.device, drawn.ids.shape[0]
    eos = torch.tensor(policy.eos_ids, device=device)
    own, copy_of = torch.unique_consecutive(rows // n, return_inverse=True)
    lists = [prompts[p] for p in own.tolist()]
    width = max(map(len, lists))
    pad = torch.tensor([width - len(ids) for ids in lists], device=device)
    ids = torch.tensor([[0] * (width - len(x)) + list(x) for x in lists], dtype=torch.int64, device=device)
    hidden, cache = model.prefill(ids, pad)
    hidden = hidden[copy_of]
    cache.select(copy_of, width + min(GROW_COLUMNS, max_new))
    live = torch.ones(rows.numel(), dtype=torch.bool, device=device)  # of the rows still in the batch
    step_of = torch.zeros_like(uid)  # the step, once per row: the sampler's counter
    pending: list[tuple[Tensor, ...]] = []
    for step in range(max_new):
        out = draw(model.logits(hidden), uid, step_of)
        ids = out.ids.clamp_(min=0)  # -1 marks a row of nan logits: `_flush` reports it, the embedding must not see it
        pending.append((ids, out.logp, out.mean_logp, out.entropy))
        last = step + 1 == max_new
        if last or len(pending) == CHECK_EVERY:
            live &= _flush(pending, rows, step + 1, eos, live, drawn)
            pending.clear()
            alive = int(live.sum())
            yield step + 1
            if alive == 0 or last:
                return
            if alive <= COMPACT_BELOW * rows.numel():
                keep = live.nonzero()[:, 0]
                rows, uid, step_of, live, ids = rows[keep], uid[keep], step_of[keep], live[keep], ids[keep]
                cache.select(keep)
        if cache.length == cache.capacity:
            used = cache.length - width
            cache.select(torch.arange(rows.numel(), device=device), width + min(2 * used, max_new))
        hidden = model.decode(ids, cache)
        step_of += 1


def _flush(
    pending: list[tuple[Tensor, ...]], rows: Tensor, step: int, eos: Tensor, live: Tensor, drawn: _Drawn
) -> Tensor:
    """Writes the draws of the last steps, up to `step`, of the rows into `drawn`; returns bool [rows]: no end yet.

    A row that ended earlier keeps writing until it leaves the batch; its `steps` are final, so nobody reads that.
    """
    ids, logp, mean_logp, entropy = (torch.stack(values) for values in zip(*pending, strict=True))
    if not bool(torch.isfinite(logp).all()):
        raise UserError(
            "the model gives no finite logits: its weights hold nan or inf; go back to an earlier checkpoint"
        )
    at = slice(step - len(pending), step)
    drawn.ids[at, rows], drawn.logp[at, rows] = ids, logp
    drawn.mean_logp[at, rows], drawn.entropy[at, rows] = mean_logp, entropy
    ends = torch.isin(ids, eos)
    ended = ends.any(0)
    new = ended & live
    first = ends.int().argmax(0) + (step - len(pending) + 1)
    drawn.steps[rows] = torch.where(new, first, drawn.steps[rows])
    drawn.stop[rows] = torch.where(new, STOP_EOS, drawn.stop[rows]).to(torch.int8)
    return ~ended


def _pack(prompts: Sequence[Sequence[int]], n: int, uid: Tensor, drawn: _Drawn) -> Rollout:
    device = drawn.ids.device
    rows = len(prompts) * n
    prompt_len = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(n)
    lengths = prompt_len + drawn.steps
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    offsets[1:] = lengths.cumsum(0)
    row = torch.repeat_interleave(torch.arange(rows, device=device), lengths)
    step = torch.arange(row.numel(), device=device) - offsets[row] - prompt_len[row]  # < 0 in the prompt
    sampled = step >= 0
    flat = torch.tensor([i for p in prompts for i in p], dtype=torch.int64, device=device)
    first = F.pad(torch.tensor([len(p) for p in prompts], device=device).cumsum(0), (1, -1))
    in_flat = (first.repeat_interleave(n)[row] + step + prompt_len[row]).clamp(max=flat.numel() - 1)
    at = (step.clamp(min=0), row)
    return Rollout(
        ids=torch.where(sampled, drawn.ids[at], flat[in_flat]),
        role=torch.where(sampled, ROLE_SAMPLED, ROLE_PROMPT).to(torch.int8),
        logp=torch.where(sampled, drawn.logp[at], 0.0),
        mean_logp=torch.where(sampled, drawn.mean_logp[at], 0.0),
        entropy=torch.where(sampled, drawn.entropy[at], 0.0),
        offsets=offsets,
        prompt_len=prompt_len,
        group=torch.arange(len(prompts), device=device).repeat_interleave(n),
        uid=uid,
        stop=drawn.stop,
    )


@torch.no_grad()
def score(
    policy: Policy, rollout: Rollout, temperature: float, token_budget: int = 16384
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, mean_logp, entropy), each fp32 [T] nats, of the sampled tokens under the policy as it is now; 0 elsewhere.

    The path of the update, `Decoder.hidden`, over the whole vocabulary at `temperature`: right after sampling without
    truncation, the difference to the rollout's own values is the gap between sampler and trainer.
    """
    out = tuple(torch.zeros_like(rollout.logp) for _ in range(3))
    chunk = max(1, SCORE_LOGITS // policy.config.vocab_size)
    for part in micro_batches(rollout, torch.arange(rollout.rows, device=rollout.device), token_budget):
        hidden = policy.model.hidden(part.ids).flatten(0, 1)
        for start in range(0, part.targets.numel(), chunk):
            piece = slice(start, start + chunk)
            logits = policy.model.logits(hidden[part.hidden_index[piece]])
            scored = token_logprob(logits, part.targets[piece], temperature=temperature)
            for values, name in zip(out, ("logp", "mean_logp", "entropy"), strict=True):
                values[part.token_index[piece]] = getattr(scored, name)
    return out[0], out[1], out[2]
