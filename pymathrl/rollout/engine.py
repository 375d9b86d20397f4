"""The rollout engine: sequences that are cheap to fork, over one paged cache (contracts C3, C5 to C10).

A sequence is a list of tokens with a role each, of which the first len-1 have keys and values in the cache, or will get
them before the next draw. A draw feeds the last token and appends what is drawn; so starting, forking, forcing tokens
in, rolling back and being preempted are all the same thing: tokens whose keys and values are there, shared, or still to
be made. Random numbers are a function of (seed, uid, number of the draw) and no kernel lets one row see another: what a
sequence says does not depend on what runs beside it, on the batch limit, or on whether it was preempted.

    engine = Engine(policy, seed=0)
    rollout = engine.generate(prompts, 8, 256)                 # P*8 sequences, packed for training

    a, = engine.start([prompt])                                # or token by token:
    b, c = engine.fork(a, 2)
    engine.append(b, hint)                                     # forced tokens: no loss on them
    engine.segment([a, b, c], 64, stop_strings=["\\n"])         # why each stopped; all can go on
    engine.segment([b], 32, soft=SoftSampling(0.5, sigma))      # soft tokens: vectors are fed, no token is chosen
    rollout = engine.rollout([a, b, c]); engine.free([a, b, c])
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pymathrl import devices
from pymathrl.batch import (
    ROLE_FORCED,
    ROLE_PROMPT,
    ROLE_SAMPLED,
    STOP_DEADLINE,
    STOP_EOS,
    STOP_LENGTH,
    STOP_NAMES,
    STOP_NONE,
    STOP_STRING,
    Rollout,
    enumerate_ragged,
)
from pymathrl.errors import UserError
from pymathrl.models.load import Policy
from pymathrl.models.paged import Buffers, PagedCache, Pass, Sampling, Until
from pymathrl.ops.attention import PAGE
from pymathrl.ops.sample_token import sample_token, support_bytes
from pymathrl.ops.soft_embed import SoftSampling
from pymathrl.rollout.pages import PageTable, pages_for
from pymathrl.rollout.states import HybridTable
from pymathrl.rollout.supports import Supports

CHECK_EVERY = {"cpu": 4, "cuda": 8}  # draws between two looks for ends: a sequence runs on for half as many on average
CHECK_LONGEST = 16  # while no sequence ends the looks grow rarer, up to this: one costs like 4 draws of a tiny model
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # of CUDA graphs
PREFILL_ROWS = 2048  # tokens of one pass over prompts and forced tokens: bounds its buffers
TAIL_TOKENS = 24  # decoded in front of what can hold a stop string when one is looked for
LOGITS, BLOCK = 0, -1  # why a hybrid's states are kept, beside the clock of snapshots, which is above 0
Progress = Callable[[int, int, int], None]  # sequences finished, sequences in all, tokens drawn
Finished = Callable[[list[int], list[list[int]]], None]  # rows of responses that ended, and their token ids
Hook = Callable[[list[int], Tensor, "StepStats"], Tensor | None]


F = TypeVar("F", bound=Callable[..., Any])


def _outside_autograd(method: F) -> F:
    """No gradients, and plain tensors even where the caller is in inference mode: the engine's outlive the call."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class StepStats:
    """What the raw logits [R,V] of a step say, at temperature 1 and unfiltered; computed when asked for.

    logp [R,V], entropy [R] and mean_logp [R] in nats; top [R,2]: the two largest probabilities. fp32.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @cached_property
    def logp(self) -> Tensor:
        return torch.log_softmax(self._logits, -1)

    @cached_property
    def entropy(self) -> Tensor:
        return -(self.logp.exp() * self.logp.masked_fill(self.logp == -torch.inf, 0.0)).sum(-1)

    @cached_property
    def mean_logp(self) -> Tensor:
        return self.logp.mean(-1)

    @cached_property
    def top(self) -> Tensor:
        return self.logp.topk(2, -1).values.exp()


class Step(NamedTuple):
    """One drawn token per sequence; fp32 in nats, of the distribution it was drawn from."""

    ids: Tensor  # int64 [R]
    logp: Tensor  # [R]
    entropy: Tensor  # [R]
    mean_logp: Tensor  # [R]
    kept_mass: Tensor  # [R] the share of the probability that the filters left


class _Extra(NamedTuple):
    """What k draws of r sequences come with: the supports [r, ceil(V/8)] of draws under filters, of each draw, and the
    inputs [k,r,D] of soft tokens."""

    supports: list[Tensor]
    inputs: Tensor | None


@dataclass(frozen=True)
class Snapshot:
    """A point of a sequence to come back to: its length in tokens then, and when that was."""

    seq: int
    length: int
    when: int


def _grown(needed: int, have: int) -> int:
    return have if needed <= have else max(needed, 2 * have)


class _Store:
    """Tokens of S sequences and what was said about them: tensors [S,W] that grow in both directions.

    ids int64, role int8; logp, mean_logp, entropy fp32, of sampled tokens; soft int64: 0, or the row of a soft token's
    input in `inputs` [., D], which grows by doubling and whose first row is none's. On the policy's device.
    """

    FIELDS = (("ids", torch.int64), ("role", torch.int8), ("logp", torch.float32), ("mean_logp", torch.float32),
              ("entropy", torch.float32), ("soft", torch.int64))  # fmt: skip

    def __init__(self, like: Tensor) -> None:
        self.ids, self.role, self.logp, self.mean_logp, self.entropy, self.soft = (
            torch.zeros(0, 0, dtype=dtype, device=like.device) for _, dtype in self.FIELDS
        )
        self.inputs = like.new_zeros(1, like.shape[1], requires_grad=False)
        self.used = 1  # rows of `inputs`
        self.sampling: SoftSampling | None = None  # under which they were made

    def grow(self, slots: int, width: int) -> None:
        """Room for so many slots and tokens; at least doubled, so that adding tokens one by one stays cheap."""
        have_slots, have_width = self.ids.shape
        slots, width = _grown(slots, have_slots), _grown(width, have_width)
        if (slots, width) != (have_slots, have_width):
            for name, _ in self.FIELDS:
                old = getattr(self, name)
                new = old.new_zeros(slots, width)
                new[:have_slots, :have_width] = old
                setattr(self, name, new)

    def copy(self, source: Tensor, target: Tensor) -> None:
        for name, _ in self.FIELDS:
            values = getattr(self, name)
            values[target] = values[source]

    def keep_inputs(self, inputs: Tensor, live: Callable[[], Tensor]) -> Tensor:
        """inputs [m,D] of soft tokens -> their rows, int64 [m]. live() -> bool [S,W], the tokens there are: where the
        room is over, rows that none of them names are given away first."""
        if self.used + len(inputs) > len(self.inputs):
            rows, self.soft = torch.where(live(), self.soft, 0).unique(return_inverse=True)
            if int(rows[0]):  # every token is soft
                rows, self.soft = torch.cat([rows.new_zeros(1), rows]), self.soft + 1
            kept, self.used = self.inputs[rows], len(rows)
            room = max(len(self.inputs), 2 * (self.used + len(inputs)))
            self.inputs = torch.cat([kept, kept.new_zeros(room - self.used, kept.shape[1])])
        rows = torch.arange(self.used, self.used + len(inputs), device=inputs.device)
        self.inputs[rows] = inputs
        self.used += len(inputs)
        return rows


class Engine:
    """Generation with one policy. One engine serves a whole run: its buffers, pages and recorded passes are kept.

    seed        of every random number
    max_batch   sequences decoded side by side; more wait their turn. What is drawn does not depend on it
    max_pages   pages of PAGE tokens for keys and values; None: what the free memory holds. Where they run out,
                sequences are preempted and later go on as if nothing had happened
    """

    def __init__(self, policy: Policy, seed: int = 0, *, max_batch: int = 512, max_pages: int | None = None) -> None:
        for name, value in (("max_batch", max_batch), ("max_pages", 1 if max_pages is None else max_pages)):
            if value < 1:
                raise ValueError(f"Engine: {name} must be >= 1, got {value}")
        self.policy, self.seed, self.max_batch, self.max_pages = policy, seed, max_batch, max_pages
        self.device = policy.device
        self._store = _Store(policy.model.embed)
        self._length = torch.zeros(0, dtype=torch.int64)  # tokens of the sequence in each slot
        self._prompt = torch.zeros(0, dtype=torch.int64)  # of these, its prompt
        self._uid = torch.zeros(0, dtype=torch.int64)
        self._stop = torch.zeros(0, dtype=torch.int8)
        self._live = torch.zeros(0, dtype=torch.bool)
        self._name = torch.zeros(0, dtype=torch.int64)  # the handle of the sequence; in `generate` its row
        self._slot_of: dict[int, int] = {}  # handle -> slot. Handles never come again
        self._next_handle = 0
        self._cuts: dict[int, list[tuple[int, int]]] = {}  # handle -> (when, length), both rising: see `rollback`
        self._clock = 0  # of snapshots and cuts
        self._next_uid = -(2**63)  # of sequences that are given none: below all that a caller counts from 0
        self._support = Supports()
        self._passes: dict[tuple[int, Until, Sampling | SoftSampling | None, int | None], Pass] = {}
        self._pass_seeds: list[int] = []  # of the recorded draws: a run uses two, training's and evaluation's
        self._pass_weights: list[int] = []  # where the weights lay when the passes were recorded
        self._cache = PagedCache(policy.model)
        self._pages = PageTable(0, 0, 0, self._cache.copy)
        if policy.config.mamba is not None:
            self._pages = HybridTable(0, 0, 0, self._cache.copy, self._cache.copy_states)
        self._buffers = Buffers(policy.model, 0)
        self._ring_ids = torch.zeros(0, 0, dtype=torch.int64, device=self.device)
        self._ring_numbers = torch.zeros(0, 0, device=self.device)
        self._ring_inputs = policy.model.embed.new_zeros(0, 0, 0, requires_grad=False)
        self.preemptions = 0  # sequences that gave back their pages to others, since the engine was made

    # --- whole generations ---------------------------------------------------------------------------------------

    @_outside_autograd
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        max_new_tokens: int | Sequence[int],
        *,
        uids: Tensor | Sequence[int] | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        hook: Hook | None = None,
        on_progress: Progress | None = None,
        on_finished: Finished | None = None,
    ) -> Rollout:
        """n samples for each of P prompts -> Rollout of P*n rows in that order, on the policy's device; group = prompt.

        prompts         non-empty lists of token ids
        max_new_tokens  limit of a response in tokens; one for all, or one per prompt
        uids            int64 [P*n], the identity of each sample in (seed, uid, draw); None: 0 .. P*n-1
        seed            instead of the engine's
        temperature     divides the logits, 0 is greedy; top_k 0, top_p 1 and min_p 0 keep the whole vocabulary
        stop_ids        tokens that end a response and belong to it; None: the policy's end tokens; (): none
        stop_strings    texts that end a response; the tokens up to the one that completes the text belong to it
        hook            sees, and may replace, the logits of every step: see `step`; its sequences are row numbers
        on_progress     called every few steps: (responses finished, responses in all, tokens drawn)
        on_finished     called with responses that have ended, each once, while others go on: (their rows in the
                        Rollout, their token ids without the prompt). Generation waits for it: it hands on what is long
        """
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        for name, value in (("len(prompts)", len(prompts)), ("n", n), ("max_new_tokens", min(limits, default=1))):
            if value < 1:
                raise ValueError(f"generate: {name} must be >= 1, got {value}")
        if len(limits) != len(prompts):
            raise ValueError(f"generate: max_new_tokens must be one number or {len(prompts)}, got {len(limits)}")
        uid = torch.arange(len(prompts) * n) if uids is None else torch.as_tensor(uids, dtype=torch.int64).cpu()
        if uid.shape != (len(prompts) * n,):
            raise ValueError(f"generate: uids must have shape [{len(prompts) * n}] (P*n), got {list(uid.shape)}")
        for prompt, most in zip(prompts, limits, strict=True):
            self._check_length(len(prompt), most)
        sampling = Sampling(temperature, top_k, top_p, min_p)
        lengths = torch.tensor([len(p) for p in prompts])
        taken = [self._new(prompts, torch.zeros(len(prompts), dtype=torch.int64))]
        try:
            roots = taken[0].repeat_interleave(n)
            taken.append(seqs := self._copy(roots, uid))
            self._name[seqs] = torch.arange(seqs.numel())
            longest = (lengths + torch.tensor(limits)).repeat_interleave(n)
            pages = pages_for(longest).sort(descending=True).values[: self.max_batch].sum() + pages_for(lengths).sum()
            rows = min(len(seqs), self.max_batch)
            states = rows + min(len(prompts), rows // n + 1)
            self._open(pages=int(pages), tokens=int(longest.max()), states=states)
            # prompts of like length follow each other: their prefills fill up the same passes
            order = torch.argsort(lengths, stable=True)[:, None] * n + torch.arange(n)
            self._run(
                seqs, longest, _Ends.of(self.policy, stop_ids, stop_strings), sampling,
                self.seed if seed is None else seed, order=order.flatten(), roots=roots, hook=hook,
                on_progress=on_progress, on_finished=on_finished,
            )  # fmt: skip
            return self._rollout(seqs, torch.arange(len(prompts)).repeat_interleave(n))
        finally:
            self._release(torch.cat(taken))

    # --- one step at a time --------------------------------------------------------------------------------------

    @_outside_autograd
    def start(self, prompts: Sequence[Sequence[int]], uids: Sequence[int] | None = None) -> list[int]:
        """A new sequence for each prompt: its handle. Free it when done.

        uids: see `generate`; without them sequences are numbered in the order in which the engine made them, with
        negative numbers, which meet none that were given.
        """
        for prompt in prompts:
            self._check_length(len(prompt), 0)
        return self._hand_out(self._new(prompts, self._uids(len(prompts), uids)))

    @_outside_autograd
    def fork(self, seq: int | Sequence[int], n: int, uids: Sequence[int] | None = None) -> list[int]:
        """n copies of a sequence, or of each of several, one sequence's after the other's. It goes on too; they share
        its pages until one of them writes."""
        if n < 1:
            raise ValueError(f"fork: n must be >= 1, got {n}")
        slots = self._check([seq] if isinstance(seq, int) else seq)
        for start in range(0, slots.numel(), self.max_batch):  # what finds no room is fed before its next draw
            part = slots[start : start + self.max_batch]
            self._feed(part[: self._make_room(part, -1)])
        source = slots.repeat_interleave(n)
        copies = self._copy(source, self._uids(source.numel(), uids))
        self._pages.share(source, copies)
        return self._hand_out(copies)

    @_outside_autograd
    def append(self, seq: int, ids: Sequence[int]) -> None:
        """Adds tokens that the policy did not draw: a hint, a tool's output. Their role is forced: no loss on them."""
        slot = self._check([seq])
        length = int(self._length[slot])
        self._check_length(length, len(ids))
        self._store.grow(0, length + len(ids))
        self._store.ids[slot, length : length + len(ids)] = self._as_ids(ids)
        self._store.role[slot, length : length + len(ids)] = ROLE_FORCED
        self._store.soft[slot, length : length + len(ids)] = 0
        self._length[slot] += len(ids)
        self._stop[slot] = STOP_NONE

    @_outside_autograd
    def step(
        self,
        seqs: Sequence[int],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        soft: SoftSampling | None = None,
        hook: Hook | None = None,
    ) -> Step:
        """Draws one token for each sequence and appends it. Ends are the caller's affair; see `segment`.

        soft: a soft token instead: h~ of `soft_embed` is what the model is fed, ids its most probable token, logp its
        density up to a constant, entropy and mean_logp those of the distribution that was mixed. It takes neither
        temperature and filters nor a hook.

        hook(seqs, logits, stats) sees the raw logits, fp32 [R,V], before temperature and filters, and `StepStats` of
        them; what it returns (None: nothing changed) is drawn from. The numbers are those of what was drawn from: the
        update, which does not know the hook, finds the policy's own.
        """
        slots = self._check(seqs)
        self._check_length(int(self._length[slots].max()), 1)
        sampling = _sampling(soft, hook, temperature, top_k, top_p, min_p)
        parts = []
        for part in self._waves(slots):
            drawn, extra = self._draw(part, 1, sampling, self.seed, hook)
            self._keep(part, drawn, torch.ones_like(part), extra)
            parts.append(drawn)
            self._stop[part] = STOP_NONE
        return Step(*(torch.cat(values, 1)[0] for values in zip(*parts, strict=True)))

    @_outside_autograd
    def logits(self, seqs: Sequence[int]) -> Tensor:
        """fp32 [R,V]: the raw logits of each sequence's next token; the sequences stay as they are."""
        slots = self._check(seqs)
        parts = []
        for part in self._waves(slots, keeping=True):
            parts.append(self.policy.model.logits(self._hidden(part, mark=LOGITS)))
            self._pages.settle(part, self._length[part] - 1)
            self._pages.let_go(part, LOGITS)
        return torch.cat(parts)

    @_outside_autograd
    def segment(
        self,
        seqs: Sequence[int],
        max_new_tokens: int | Sequence[int],
        *,
        seed: int | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        keep_stop: bool = True,
        deadline_s: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        soft: SoftSampling | None = None,
        hook: Hook | None = None,
    ) -> list[str]:
        """Draws for each sequence until it stops, and says why: "eos", "string", "length" or "deadline". All stay live
        and can go on.

        max_new_tokens: one for all, or one per sequence. seed, stop_ids, stop_strings, hook: as in `generate`.
        keep_stop False: a stop token, or the tokens from the one on that begins the stop string, are taken back.
        deadline_s: seconds from now. soft: soft tokens, as in `step`; stop tokens and strings are then looked for in
        their most probable tokens.
        """
        slots = self._check(seqs)
        limits = [max_new_tokens] * len(seqs) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if min(limits) < 1:
            raise ValueError(f"segment: max_new_tokens must be >= 1, got {min(limits)}")
        if len(limits) != len(seqs):
            raise ValueError(f"segment: max_new_tokens must be one number or {len(seqs)}, got {len(limits)}")
        most = torch.tensor(limits)
        longest = int((self._length[slots] + most).argmax())
        self._check_length(int(self._length[slots[longest]]), limits[longest])
        ends = replace(
            _Ends.of(self.policy, stop_ids, stop_strings), keep=keep_stop,
            deadline=None if deadline_s is None else time.monotonic() + deadline_s,
        )  # fmt: skip
        self._stop[slots] = STOP_NONE
        self._run(
            slots, self._length[slots] + most, ends, _sampling(soft, hook, temperature, top_k, top_p, min_p),
            self.seed if seed is None else seed, keep_pages=True, hook=hook,
        )  # fmt: skip
        return [STOP_NAMES[s] for s in self._stop[slots].tolist()]

    def snapshot(self, seq: int) -> Snapshot:
        """A point to come back to with `rollback`, until tokens before it are taken back. Costs nothing, and of a
        hybrid one copy of its state as it goes on; beyond the latest few, coming back feeds the tokens again."""
        self._clock += 1
        slot = self._check([seq])
        self._pages.keep(slot, self._clock)
        return Snapshot(seq, int(self._length[slot]), self._clock)

    @_outside_autograd
    def rollback(self, seq: int, snapshot: Snapshot) -> None:
        """Takes back every token after the snapshot. Drawing on gives the same tokens again: their randomness follows
        from uid and position. `fork` with another uid draws anew."""
        slot = self._check([seq])
        since = [length for when, length in self._cuts.get(seq, []) if when > snapshot.when]
        if snapshot.seq != seq or min(since, default=snapshot.length) < snapshot.length:
            raise ValueError(
                f"rollback: expected a snapshot of sequence {seq} whose tokens are all still there, got {snapshot}"
            )
        self._cut(slot, torch.tensor([snapshot.length]))
        self._stop[slot] = STOP_NONE

    @_outside_autograd
    def free(self, seqs: Sequence[int]) -> None:
        """Ends sequences: their handles mean nothing any more."""
        if seqs:
            self._release(self._check(seqs))

    def lengths(self, seqs: Sequence[int]) -> list[int]:
        """The tokens that each sequence has, prompt included."""
        return self._length[self._check(seqs)].tolist()

    def tokens(self, seq: int) -> list[int]:
        """The token ids of a sequence, prompt included."""
        slot = self._check([seq])
        return self._store.ids[int(slot), : int(self._length[slot])].tolist()

    def rollout(self, seqs: Sequence[int], group: Sequence[int] | None = None) -> Rollout:
        """The sequences as a Rollout, in this order. group: number of each; None: all different."""
        slots = self._check(seqs)
        return self._rollout(slots, torch.arange(len(seqs)) if group is None else torch.as_tensor(group))

    @property
    def pages_in_use(self) -> int:
        return self._pages.pages - self._pages.free

    @property
    def _states_in_use(self) -> int:
        return self._pages.states - self._pages.states_free

    # --- the loop ------------------------------------------------------------------------------------------------

    def _run(
        self,
        slots: Tensor,
        limit: Tensor,
        ends: _Ends,
        sampling: Sampling | SoftSampling,
        seed: int,
        *,
        order: Tensor | None = None,
        roots: Tensor | None = None,
        keep_pages: bool = False,
        hook: Hook | None = None,
        on_progress: Progress | None = None,
        on_finished: Finished | None = None,
    ) -> None:
        """Draws for slots [n] until each stops, at the latest at `limit` [n] tokens. Continuous batching: at most
        max_batch run; one that stops makes room at once, one that is preempted comes back first.

        order: in which they get their turn. roots [n]: slots that hold a sequence's prompt, to share its pages; given
        back when all that want them have started. keep_pages: those of a sequence that stops stay.
        """
        self._forget_moved_weights()
        end_of = torch.zeros_like(self._length)
        end_of[slots] = limit
        root_of = torch.full_like(self._length, -1)
        if roots is not None:
            root_of[slots] = roots
        waiting = deque((slots if order is None else slots[order]).tolist())
        active = torch.zeros(0, dtype=torch.int64)
        finished = drawn_tokens = 0
        least = every = 1 if hook is not None else CHECK_EVERY[self.device.type]
        while waiting or active.numel():
            active = self._admit(active, waiting, root_of)
            k = min(every, int((end_of[active] - self._length[active]).min()))
            if int(self._pages.need(active, self._length[active] + k - 1).sum()) > self._pages.free:
                k = 1  # nobody is preempted or refused for tokens that may never come
            fit = self._make_room(active, k - 1, keeping=keep_pages)
            waiting.extendleft(reversed(active[fit:].tolist()))
            active = active[:fit]
            drawn, extra = self._draw(active, k, sampling, seed, hook, mark=BLOCK if keep_pages else None)
            steps, stop = self._ends_of(active, drawn.ids, end_of[active], ends)
            self._keep(active, drawn, steps, extra)
            self._stop[active] = stop
            over = stop != STOP_NONE
            done = active[over]
            if done.numel() and not ends.keep:
                self._take_back(done, ends)
            self._pages.let_go(active, BLOCK)
            if done.numel():
                if not keep_pages:
                    self._drop_pages(done)
                if on_finished is not None:
                    on_finished(self._name[done].tolist(), self._responses(done))
                active = active[~over]
            if hook is None:
                every = max(least, every // 2) if done.numel() else min(2 * every, max(least, CHECK_LONGEST))
            finished += done.numel()
            drawn_tokens += int(steps.sum())
            if on_progress is not None:
                on_progress(finished, slots.numel(), drawn_tokens)
            if ends.deadline is not None and time.monotonic() > ends.deadline:
                left = torch.cat([active, torch.tensor(list(waiting), dtype=torch.int64)])
                self._stop[left] = STOP_DEADLINE
                return

    def _admit(self, active: Tensor, waiting: deque[int], root_of: Tensor) -> Tensor:
        """Takes sequences from the head of the queue while there are rows and pages for them; with their prompts' pages
        where a root holds them."""
        count = min(len(waiting), self.max_batch - active.numel())
        if not count:
            return active
        new = torch.tensor([waiting[i] for i in range(count)])
        # each running sequence may want a page before long: one that starts now must not be preempted for it
        pages = self._pages.need(new, self._length[new]).cumsum(0) + active.numel()
        states = self._pages.need_states(new).cumsum(0)
        self._open(
            pages=self.pages_in_use + int(pages[-1]), tokens=int(self._length[new].max()) + 1,
            states=self._states_in_use + int(states[-1]),
        )  # fmt: skip
        roots = root_of[new[root_of[new] >= 0]]
        self._evict(int(pages[-1]), int(states[-1]), keep=torch.cat([active, new, roots]))
        count = int(((pages <= self._pages.free) & (states <= self._pages.states_free)).sum())
        count = max(count, 0 if active.numel() else 1)
        new = new[:count]
        for _ in range(count):
            waiting.popleft()
        empty = new[(self._pages.fed[new] == 0) & (root_of[new] >= 0)]
        roots = root_of[empty].unique()
        if roots.numel():
            self._feed(roots[: self._make_room(roots, -1)])
            sharing = empty[self._pages.fed[root_of[empty]] > 0]
            self._pages.share(root_of[sharing], sharing)
            root_of[new] = -1
            wanted = root_of[torch.tensor(list(waiting), dtype=torch.int64)]
            self._drop_pages(roots[~torch.isin(roots, wanted)])
        return torch.cat([active, new])

    def _ends_of(self, slots: Tensor, ids: Tensor, limit: Tensor, ends: _Ends) -> tuple[Tensor, Tensor]:
        """ids [k,r] just drawn, limit [r] tokens -> (how many of them count [r], why the sequence stops [r] int8)."""
        ids = ids.cpu()
        hit = torch.isin(ids, ends.ids)
        any_hit = hit.any(0)
        steps = torch.where(any_hit, hit.int().argmax(0) + 1, ids.shape[0])
        stop = torch.where(any_hit, STOP_EOS, STOP_NONE).to(torch.int8)
        for row in range(slots.numel() if ends.strings else 0):
            count = self._find_string(int(slots[row]), ids[: steps[row], row].tolist(), ends.strings)
            if count is not None:
                steps[row], stop[row] = count, STOP_STRING
        full = (stop == STOP_NONE) & (self._length[slots] + steps >= limit)
        return steps, torch.where(full, STOP_LENGTH, stop).to(torch.int8)

    def _tail(self, slot: int, strings: Sequence[str]) -> list[int]:
        """The last tokens of a response, enough for any of the strings: a token spells a byte or more of it."""
        length, bytes_ = int(self._length[slot]), max(len(s.encode()) for s in strings)
        begin = max(int(self._prompt[slot]), length - TAIL_TOKENS - bytes_)
        return self._store.ids[slot, begin:length].tolist()

    def _find_string(self, slot: int, new: list[int], strings: Sequence[str]) -> int | None:
        """The number of new tokens after which the text first holds one of the strings, None: it does not."""
        old, decode = self._tail(slot, strings), self.policy.tokenizer.decode
        known = _known(decode(old))
        for count in range(1, len(new) + 1):
            if _find_completed(decode(old + new[:count]), known, strings) is not None:
                return count
        return None

    def _take_back(self, slots: Tensor, ends: _Ends) -> None:
        """Cuts the stop token, or the tokens from the one on that begins the stop string."""
        decode = self.policy.tokenizer.decode
        for slot in slots.tolist():
            length = int(self._length[slot])
            if self._stop[slot] == STOP_EOS:
                self._cut(torch.tensor([slot]), torch.tensor([length - 1]))
            elif self._stop[slot] == STOP_STRING:
                ids = self._tail(slot, ends.strings)
                at = _find_completed(decode(ids), _known(decode(ids[:-1])), ends.strings)
                assert at is not None, "the sequence stopped at a string"
                keep = next(n for n in range(len(ids), -1, -1) if len(decode(ids[:n])) <= at)
                self._cut(torch.tensor([slot]), torch.tensor([length - len(ids) + keep]))

    # --- the forward passes --------------------------------------------------------------------------------------

    def _draw(
        self,
        slots: Tensor,
        k: int,
        sampling: Sampling | SoftSampling,
        seed: int,
        hook: Hook | None,
        mark: int | None = None,
    ) -> tuple[Step, _Extra]:
        """k draws for each slot [r], for which there is room: tensors [k,r]. Nothing is kept yet. mark: see `_load`."""
        if hook is not None:
            assert isinstance(sampling, Sampling), "a soft step takes no hook"
            return self._draw_with_hook(slots, sampling, seed, hook, mark)
        rows, b = slots.numel(), self._buffers
        step = self._pass(self._bucket(rows), "token", sampling, seed)
        self._feed(slots, ahead=k - 1)
        self._load(slots, step.rows, k, mark)
        soft = self._makes_soft(sampling)
        self._grow_ring(k, step.rows if soft else 0)
        supports = []
        for j in range(k):
            step.run()
            self._ring_ids[j, :rows] = b.drawn[:rows]
            self._ring_numbers[j, : 4 * step.rows] = b.numbers[: 4 * step.rows]
            if soft:
                self._ring_inputs[j, :rows] = b.stream[:rows]
            if step.support is not None:
                supports.append(step.support[:rows].clone())
        numbers = b.split_numbers(step.rows, self._ring_numbers[:k])[..., :rows]
        # a copy of the ids: where `step` takes several waves, the next one writes over the ring
        drawn = _finite(Step(self._ring_ids[:k, :rows].clone(), *numbers.unbind()))
        return drawn, _Extra(supports, self._ring_inputs[:k, :rows] if soft else None)

    def _makes_soft(self, sampling: Sampling | SoftSampling) -> bool:
        """Whether it makes soft tokens. All of an engine's at a time are made alike, so that a rollout can say how."""
        if isinstance(sampling, Sampling):
            return False
        if self._store.used > 1 and self._store.sampling != sampling:
            raise ValueError(
                f"soft: live sequences hold soft tokens made under {self._store.sampling}, got {sampling}; free them"
            )
        self._store.sampling = sampling
        return True

    def _draw_with_hook(
        self, slots: Tensor, sampling: Sampling, seed: int, hook: Hook, mark: int | None
    ) -> tuple[Step, _Extra]:
        logits = self.policy.model.logits(self._hidden(slots, mark))
        changed = hook(self._name[slots].tolist(), logits, StepStats(logits))
        if changed is not None:
            if changed.shape != logits.shape:
                raise ValueError(f"hook: expected logits of shape {list(logits.shape)}, got {list(changed.shape)}")
            logits = changed.float().contiguous()
        support = None
        if sampling.truncates:
            support = torch.empty(len(logits), support_bytes(logits.shape[1]), dtype=torch.uint8, device=self.device)
        uid, draw = self._uid[slots].to(self.device), (self._length - self._prompt)[slots].to(self.device)
        out = sample_token(
            logits, seed, uid, draw, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            min_p=sampling.min_p, support=support,
        )  # fmt: skip
        return _finite(Step(*(value[None] for value in out))), _Extra([] if support is None else [support], None)

    def _hidden(self, slots: Tensor, mark: int | None) -> Tensor:
        """[r,D]: the hidden state of each slot's last token, which scores the next; there is room for it. mark: see
        `_load`."""
        step = self._pass(self._bucket(slots.numel()), "hidden", None, 0)
        self._feed(slots, ahead=0)
        self._load(slots, step.rows, 1, mark)
        step.run()
        return self._buffers.hidden[: slots.numel()]

    def _feed(self, slots: Tensor, ahead: int = -1) -> None:
        """Keys and values of every token but the last, and pages up to `ahead` tokens behind the last."""
        pages = self._pages
        pages.reserve(slots, self._length[slots] + ahead)
        self._cache.table[slots.to(self.device)] = pages.table[slots].to(self.device, torch.int32)
        missing = (self._length[slots] - 1 - pages.fed[slots]).clamp(min=0)
        if not bool(missing.any()):
            return
        pages.ran(slots, missing)
        owner, within = enumerate_ragged(missing)
        slot = slots[owner]
        position = pages.fed[slot] + within
        for start in range(0, slot.numel(), PREFILL_ROWS):
            part = slice(start, start + PREFILL_ROWS)
            rows = slot[part].numel()
            self._fill(rows, slot[part], position[part])
            Pass(self.policy.model, self._cache, self._buffers, rows, "cache", replay=False).run()
        pages.settle(slots, torch.maximum(pages.fed[slots], self._length[slots] - 1))

    def _load(self, slots: Tensor, rows: int, passes: int, mark: int | None) -> None:
        """The buffers' inputs: the last token of each slot, in the first rows of `rows`, for so many passes. mark: a
        hybrid's states before them are kept under it, and there is room for that."""
        if mark is not None and self._pages.states:
            self._pages.keep(slots, mark)
            self._pages.reserve(slots, self._pages.fed[slots])
        self._pages.ran(slots, passes)
        self._fill(rows, slots, self._length[slots] - 1)

    def _fill(self, rows: int, slots: Tensor, position: Tensor) -> None:
        b, count = self._buffers, slots.numel()
        draw = position + 1 - self._prompt[slots]
        values = torch.stack([slots, slots, self._pages.states_of(slots), self._uid[slots], position, draw])
        values = values.to(self.device)
        values[0] = self._store.ids[values[1], values[4]]
        b.inputs[:, :count] = values
        b.clear_from(count, rows)
        b.embed(self.policy.model, rows)
        if self._store.used > 1:
            soft = self._store.soft[values[1], values[4]]
            b.stream[:count] = torch.where(soft[:, None] > 0, self._store.inputs[soft], b.stream[:count])

    def _forget_moved_weights(self) -> None:
        """Drops the recorded passes where a parameter lies elsewhere than they read it: they hold its address."""
        where = [p.data_ptr() for p in self.policy.model.parameters()]
        if where != self._pass_weights:
            self._pass_weights = where
            self._passes.clear()

    def _pass(self, rows: int, until: Until, sampling: Sampling | SoftSampling | None, seed: int) -> Pass:
        if until == "token" and seed not in self._pass_seeds:
            self._pass_seeds = [*self._pass_seeds[-1:], seed]
            self._passes = {k: v for k, v in self._passes.items() if k[3] is None or k[3] in self._pass_seeds}
        key = (rows, until, sampling, seed if until == "token" else None)
        if key not in self._passes:
            self._passes[key] = Pass(self.policy.model, self._cache, self._buffers, rows, until, sampling, seed)
        return self._passes[key]

    def _bucket(self, rows: int) -> int:
        """Rows of the pass that serves `rows`: exactly so many on a CPU, where a recording is cheap; on a GPU one of a
        few sizes, each with its captured graph."""
        if self.device.type == "cpu":
            return rows
        return next((size for size in GRAPH_ROWS if size >= rows), -(-rows // 64) * 64)

    def _grow_ring(self, k: int, soft_rows: int) -> None:
        have, inputs = self._ring_inputs.shape, self._buffers.stream
        if soft_rows and (have[0] < k or have[1] < soft_rows):
            self._ring_inputs = inputs.new_zeros(max(k, have[0]), max(soft_rows, have[1]), inputs.shape[1])
        if len(self._ring_ids) < k or self._ring_ids.shape[1] < self._buffers.rows:
            self._ring_ids = torch.zeros(k, self._buffers.rows, dtype=torch.int64, device=self.device)
            self._ring_numbers = torch.zeros(k, 4 * self._buffers.rows, device=self.device)

    # --- memory --------------------------------------------------------------------------------------------------

    def _make_room(self, slots: Tensor, ahead: int, keeping: bool = False) -> int:
        """How many of the slots, counted from the first, get pages up to `ahead` tokens behind their last, and a state
        of their own; keeping: a second one, to keep. Others give theirs back for them: first sequences that are not
        asked for, then the last of those that are."""
        slots = slots[: self.max_batch]
        end = self._length[slots] + ahead

        def need() -> tuple[int, int]:
            pages, states = self._pages.need(slots, end), self._pages.need_states(slots)
            if keeping and self.policy.config.mamba is not None:
                states += 1
            return int(pages.sum()), int(states.sum())

        pages, states = need()
        self._open(
            pages=self.pages_in_use + pages, tokens=int(end.max()) + 1, states=self._states_in_use + states
        )  # fmt: skip
        while pages > self._pages.free or states > self._pages.states_free:
            if not self._evict(pages, states, keep=slots) and not self._pages.let_go():
                if slots.numel() == 1:
                    has, needs = self._in_words(self._pages.states), self._in_words(states)
                    raise UserError(
                        f"the cache holds {self._pages.pages} pages of {PAGE} tokens{has}, and one sequence of "
                        f"{int(end)} tokens needs {int(pages_for(end))}{needs}; free memory, or shorten prompts and "
                        "responses"
                    )
                self.preemptions += int(self._pages.held[slots[-1]] > 0)
                self._drop_pages(slots[-1:])
                slots, end = slots[:-1], end[:-1]
            pages, states = need()  # a page that was shared may be its own now
        return slots.numel()

    def _in_words(self, states: int) -> str:
        return "" if self.policy.config.mamba is None else f" and {states} recurrent states"

    def _evict(self, pages: int, states: int, keep: Tensor) -> bool:
        """Preempts sequences other than `keep`, the last slot first, until so much is free; whether there was one."""
        others = self._pages.held > 0
        others[keep] = False
        victims = others.nonzero()[:, 0].tolist()

        def short() -> bool:
            return self._pages.free < pages or self._pages.states_free < states

        some = bool(victims) and short()
        while victims and short():
            self.preemptions += 1
            self._drop_pages(torch.tensor([victims.pop()]))
        return some

    def _waves(self, slots: Tensor, keeping: bool = False) -> Iterator[Tensor]:
        """The slots in parts that have room at a time, for one more token each. keeping: see `_make_room`."""
        self._forget_moved_weights()
        while slots.numel():
            fit = self._make_room(slots, 0, keeping)
            yield slots[:fit]
            slots = slots[fit:]

    def _open(self, pages: int, tokens: int, states: int = 0) -> None:
        """Room for `pages` pages and `states` states, as far as the memory goes, and for sequences of `tokens` tokens.
        What was recorded on older tensors is forgotten."""
        model, have, slots = self.policy.model, self._pages, self._live.numel()
        rows = max(self._bucket(self.max_batch), PREFILL_ROWS)
        if self._buffers.rows < rows:
            self._buffers = Buffers(model, rows)
        columns = _grown(-(-tokens // PAGE), have.table.shape[1])
        state_bytes, page_bytes = PagedCache.state_bytes(model), PagedCache.page_bytes(model)
        new_states = 0
        if states > have.states and state_bytes:  # the larger half of a state lies there twice while it is copied
            most = max(0, devices.free_bytes(self.device) // state_bytes - have.states)
            new_states = min(most, max(states, 2 * have.states) - have.states)
        if pages > have.pages:
            limit = self.max_pages
            if limit is None:  # of pages in use half are there twice while they are copied
                limit = have.pages - (have.pages + 1) // 2 * bool(self.pages_in_use)
                left = devices.free_bytes(self.device) - new_states * state_bytes
                limit += max(0, left) // max(1, page_bytes)
            pages = max(have.pages, min(limit, max(pages, 2 * have.pages)))
        pages, states = max(pages, have.pages), have.states + new_states
        if (pages, states, slots, columns) == (have.pages, have.states, *have.table.shape):
            return
        keep = self.pages_in_use > 0
        have.grow(pages, slots, columns, states)
        self._cache.grow(pages, slots, columns, states, keep)
        self._passes.clear()

    def _drop_pages(self, slots: Tensor) -> None:
        self._pages.let_go(slots)
        self._pages.truncate(slots, torch.zeros_like(slots))

    def _cut(self, slots: Tensor, length: Tensor) -> None:
        self._length[slots] = length
        self._pages.truncate(slots, length - 1)
        self._support.cut(slots, length)
        self._clock += 1
        for name, kept in zip(self._name[slots].tolist(), length.tolist(), strict=True):
            cuts = self._cuts.setdefault(name, [])
            while cuts and cuts[-1][1] >= kept:
                cuts.pop()
            cuts.append((self._clock, kept))

    # --- sequences -----------------------------------------------------------------------------------------------

    def _new(self, prompts: Sequence[Sequence[int]], uids: Tensor) -> Tensor:
        """Slots of new sequences that hold these prompts."""
        lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        ids = self._as_ids([i for p in prompts for i in p])
        slots = self._take_slots(len(prompts), int(lengths.max()) if len(prompts) else 0)
        owner, column = enumerate_ragged(lengths)
        at = slots[owner].to(self.device), column.to(self.device)
        self._store.ids[at] = ids
        self._store.role[at] = ROLE_PROMPT
        self._store.soft[at] = 0
        self._length[slots] = self._prompt[slots] = lengths
        self._uid[slots] = uids
        return slots

    def _copy(self, source: Tensor, uids: Tensor) -> Tensor:
        """Slots of new sequences with the tokens of `source`, without pages."""
        slots = self._take_slots(source.numel(), 0)
        self._store.copy(source.to(self.device), slots.to(self.device))
        for values in (self._length, self._prompt, self._stop):
            values[slots] = values[source]
        self._uid[slots] = uids
        self._support.copy(source, slots)
        return slots

    def _take_slots(self, count: int, width: int) -> Tensor:
        idle = (~self._live).nonzero()[:count, 0]
        have = self._live.numel()
        more = _grown(have + count - idle.numel(), have) - have
        if more:
            for name in ("_length", "_prompt", "_uid", "_stop", "_live", "_name"):
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, old.new_zeros(more)]))
            idle = (~self._live).nonzero()[:count, 0]
        self._store.grow(self._live.numel(), width)
        self._open(pages=1, tokens=1)
        self._live[idle], self._stop[idle] = True, STOP_NONE
        return idle

    def _hand_out(self, slots: Tensor) -> list[int]:
        """New handles of the sequences in these slots."""
        handles = torch.arange(self._next_handle, self._next_handle + slots.numel())
        self._next_handle += slots.numel()
        self._name[slots] = handles
        self._slot_of |= zip(handles.tolist(), slots.tolist(), strict=True)
        return handles.tolist()

    def _release(self, slots: Tensor) -> None:
        for name, slot in zip(self._name[slots].tolist(), slots.tolist(), strict=True):
            if self._slot_of.get(name) == slot:
                del self._slot_of[name]
                self._cuts.pop(name, None)
        self._drop_pages(slots)
        self._live[slots] = False
        if not bool(self._live.any()):
            self._store.used, self._store.sampling = 1, None
        self._support.cut(slots, torch.zeros_like(slots))

    def _keep(self, slots: Tensor, drawn: Step, steps: Tensor, extra: _Extra) -> None:
        """Appends the first steps [r] of drawn [k,r] to each slot, with their supports and inputs."""
        k, store = drawn.ids.shape[0], self._store
        store.grow(0, int(self._length[slots].max()) + k)
        # a sequence that has ended drew on until the look: those tokens lie behind its length and are never read
        row, column = slots[:, None].to(self.device), (self._length[slots, None] + torch.arange(k)).to(self.device)
        for name in ("ids", "logp", "mean_logp", "entropy"):
            getattr(store, name)[row, column] = getattr(drawn, name).T
        store.role[row, column] = ROLE_SAMPLED
        soft = torch.zeros(slots.numel(), k, dtype=torch.int64, device=self.device)
        if extra.inputs is not None:
            kept = (torch.arange(k) < steps[:, None]).to(self.device)
            soft[kept] = store.keep_inputs(extra.inputs.transpose(0, 1)[kept], self._tokens_there)
        store.soft[row, column] = soft
        for j, bits in enumerate(extra.supports):
            kept = steps > j
            self._support.add(slots[kept], self._length[slots[kept]] + j, bits[kept.to(self.device)])
        self._length[slots] += steps
        self._pages.settle(slots, self._length[slots] - 1)

    def _tokens_there(self) -> Tensor:
        """bool [S,W]: the places of the store that hold a live sequence's tokens."""
        width = self._store.ids.shape[1]
        return (torch.arange(width) < (self._length * self._live)[:, None]).to(self.device)

    def _responses(self, slots: Tensor) -> list[list[int]]:
        """The token ids of each slot's sequence behind its prompt."""
        bounds = zip(self._prompt[slots].tolist(), self._length[slots].tolist(), strict=True)
        ids = self._store.ids[slots.to(self.device), : int(self._length[slots].max())].tolist()
        return [row[begin:end] for row, (begin, end) in zip(ids, bounds, strict=True)]

    def _rollout(self, slots: Tensor, group: Tensor) -> Rollout:
        lengths = self._length[slots]
        offsets = torch.zeros(slots.numel() + 1, dtype=torch.int64)
        offsets[1:] = lengths.cumsum(0)
        owner, column = enumerate_ragged(lengths)
        at = slots[owner].to(self.device), column.to(self.device)
        store = self._store
        role = store.role[at]
        numbers = {
            name: torch.where(role == ROLE_SAMPLED, getattr(store, name)[at], 0.0)
            for name in ("logp", "mean_logp", "entropy")
        }
        support_ids, support_offsets = self._support.pack(slots, lengths)
        soft = store.soft[at]
        is_soft = soft > 0 if store.used > 1 and bool((soft > 0).any()) else None
        return Rollout(
            ids=store.ids[at], role=role, **numbers, offsets=offsets, prompt_len=self._prompt[slots], group=group,
            uid=self._uid[slots], stop=self._stop[slots], support_ids=support_ids, support_offsets=support_offsets,
            soft=is_soft, soft_inputs=None if is_soft is None else store.inputs[soft[is_soft]],
            soft_sampling=None if is_soft is None else store.sampling,
        ).to(self.device)  # fmt: skip

    # --- checks --------------------------------------------------------------------------------------------------

    def _check(self, seqs: Sequence[int]) -> Tensor:
        if not seqs or not all(seq in self._slot_of for seq in seqs):
            raise ValueError(f"Engine: expected handles of live sequences, got {list(seqs)}")
        slots = torch.tensor([self._slot_of[seq] for seq in seqs], dtype=torch.int64)
        if slots.unique().numel() < slots.numel():
            raise ValueError(f"Engine: expected each sequence once, got {list(seqs)}")
        return slots

    def _check_length(self, tokens: int, more: int) -> None:
        limit = self.policy.config.max_positions
        if tokens < 1:
            raise ValueError("Engine: each prompt must have at least one token, got an empty one")
        if tokens + more > limit:
            raise UserError(
                f"a prompt of {tokens} tokens and {more} new tokens exceed the model's {limit} positions; shorten the "
                "prompts or lower the number of new tokens"
            )

    def _as_ids(self, ids: Sequence[int]) -> Tensor:
        values = torch.tensor(list(ids), dtype=torch.int64)
        vocab = self.policy.config.vocab_size
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= vocab):
            raise ValueError(
                f"Engine: token ids must be in 0..{vocab - 1}, got {int(values.min())}..{int(values.max())}"
            )
        return values.to(self.device)

    def _uids(self, count: int, uids: Sequence[int] | None) -> Tensor:
        if uids is None:
            self._next_uid += count
            return torch.arange(self._next_uid - count, self._next_uid)
        if len(uids) != count:
            raise ValueError(f"Engine: uids must have {count} elements, one per sequence, got {len(uids)}")
        return torch.tensor(list(uids), dtype=torch.int64)


@dataclass(frozen=True)
class _Ends:
    """What ends a response. keep: the stop token or string stays in it. deadline: of time.monotonic()."""

    ids: Tensor
    strings: tuple[str, ...]
    keep: bool = True
    deadline: float | None = None

    @staticmethod
    def of(policy: Policy, ids: Sequence[int] | None, strings: Iterable[str]) -> _Ends:
        if isinstance(strings, str):
            raise ValueError(f"stop_strings must be a list of texts, got one text {strings!r}")
        strings = tuple(strings)
        if any(not s for s in strings):
            raise ValueError("stop_strings must not be empty texts")
        for text in strings:
            token = policy.tokenizer.backend.token_to_id(text)
            if token is not None and not policy.tokenizer.decode([token]):
                raise ValueError(
                    f"stop_strings: {text!r} is a special token, which no decoded text shows; give stop_ids=[{token}]"
                )
        return _Ends(torch.tensor(policy.eos_ids if ids is None else list(ids), dtype=torch.int64), strings)


def _sampling(
    soft: SoftSampling | None, hook: Hook | None, temperature: float, top_k: int, top_p: float, min_p: float
) -> Sampling | SoftSampling:
    hard = Sampling(temperature, top_k, top_p, min_p)
    if soft is not None and (hook is not None or hard != Sampling()):
        raise ValueError("soft: a soft token takes no temperature, filters or hook; SoftSampling has its own")
    return soft or hard


def _finite(drawn: Step) -> Step:
    """What was drawn, before anything reads it: a row of nan logits has the token -1."""
    if not bool(torch.isfinite(drawn.logp).all()):
        raise UserError(
            "the model gives no finite logits: its weights hold nan or inf; go back to an earlier checkpoint"
        )
    return drawn


def _known(text: str) -> int:
    """Length of a text whose last character may still lack bytes: those decode to U+FFFD until the rest has come."""
    return len(text.rstrip("\ufffd"))


def _find_completed(text: str, known: int, strings: Sequence[str]) -> int | None:
    """Where the first of the strings begins that end behind the first `known` characters; None: there is none."""
    found = [text.find(s, max(0, known - len(s) + 1)) for s in strings]
    return min((at for at in found if at >= 0), default=None)
