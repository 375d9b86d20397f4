"""What travels between the stages: Rollout (what was generated), Graded (with the verifier's word) and Batch (with the
terms of its loss).

All are packed structs of arrays: T tokens of B sequences one after the other, without padding. Sequence b is the
token range offsets[b] .. offsets[b+1]; its first prompt_len[b] tokens are the prompt. Position t of a per-token array
speaks of token t given the tokens before it in the same sequence: the shift by one happens once, in `micro_batches`.
Rows of one group (the samples of one prompt) are contiguous. Nothing here is changed in place after it was built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from pymathrl.ops.soft_embed import SoftSampling
from pymathrl.tasks.problem import Grade, Problem

ROLE_PROMPT = 0  # given by the task
ROLE_SAMPLED = 1  # drawn by the policy: the only role that is trained
ROLE_FORCED = 2  # put in by a program: a hint, a tool's output, a prefilled phrase
ROLE_NAMES = ("prompt", "sampled", "forced")

STOP_EOS = 0  # the policy drew an end token; that token is part of the sequence and is trained
STOP_LENGTH = 1  # cut off at the length limit; the sequence has no end token
STOP_STRING = 2  # its text holds a stop string, which its last token completed
STOP_DEADLINE = 3  # cut off by the clock
STOP_NONE = 4  # it has not stopped: it can go on
STOP_NAMES = ("eos", "length", "string", "deadline", "none")


def _check(owner: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise ValueError(
            f"{owner}.{name}: expected {dtype} of shape {list(shape)}, got {value.dtype} of shape {list(value.shape)}"
        )


def _require(condition: bool, owner: str, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{owner}.{name}: expected {expected}, got {got}")


def _require_all(ok: Tensor, value: Tensor, owner: str, name: str, expected: str) -> None:
    """Raises with the first element of `value` where `ok` is False."""
    if not bool(ok.all()):
        at = int((~ok).nonzero()[0, 0])
        _require(False, owner, name, expected, f"{value[at].item()} at index {at}")


@dataclass(frozen=True)
class Rollout:
    """B sequences, T tokens in all.

    ids         int64 [T]    token ids of the policy's tokenizer
    role        int8  [T]    ROLE_PROMPT, ROLE_SAMPLED or ROLE_FORCED
    logp        fp32  [T]    nats, log-probability of the token under the distribution it was drawn from (temperature,
                             truncation); like the next two 0 where the role is not sampled
    mean_logp   fp32  [T]    nats, mean of the log-probabilities of that distribution over its support: the vocabulary,
                             or what the truncation left of it
    entropy     fp32  [T]    nats, entropy of the distribution that the token was drawn from
    offsets     int64 [B+1]  tokens; offsets[0] = 0, offsets[B] = T, strictly rising
    prompt_len  int64 [B]    tokens, 1 <= prompt_len[b] <= length of row b
    group       int64 [B]    group number; rows of one group are contiguous
    uid         int64 [B]    identity of the sample (the counter of its random draws): not a batch slot
    stop        int8  [B]    why the row ended: an index into STOP_NAMES

    Only where tokens were drawn under filters (top-k, top-p, min-p), None elsewhere: what these left, of which logp and
    entropy speak and mean_logp is the mean. Of token t it is support_ids[support_offsets[t] : support_offsets[t+1]],
    empty where the token was drawn without filters.
    support_offsets  int64 [T+1]
    support_ids      int32 [M]

    Only where the policy made soft tokens, None elsewhere: it was fed a vector of its own instead of a row of its
    embedding table (see `soft_embed`). ids then holds the most probable token, logp the density of the vector up to a
    constant, entropy and mean_logp are those of the distribution that was mixed.
    soft           bool [T]   True at a soft token; one that is not to be trained may have role ROLE_FORCED
    soft_inputs    [S,D]      the vectors of the S soft tokens, in their order, of the model's dtype
    soft_sampling             how they were made

    Only where a response has tokens that were drawn without all that stands before them in its row (one of several
    paths that are joined later), None elsewhere. There such tokens are forced, and a branch row of their own, which
    stands behind the response's main row, holds them in the context that they were drawn in; so every sampled token is
    trained once. A branch row has the reward, the verdict and the stop of its response, and counts in no number of
    responses: see `main` and `Graded.main`.
    parent  int64 [B]    the main row that a branch row belongs to; of a main row itself
    """

    ids: Tensor
    role: Tensor
    logp: Tensor
    mean_logp: Tensor
    entropy: Tensor
    offsets: Tensor
    prompt_len: Tensor
    group: Tensor
    uid: Tensor
    stop: Tensor
    support_ids: Tensor | None = None
    support_offsets: Tensor | None = None
    soft: Tensor | None = None
    soft_inputs: Tensor | None = None
    soft_sampling: SoftSampling | None = None
    parent: Tensor | None = None

    @property
    def rows(self) -> int:
        """B, the number of sequences."""
        return self.prompt_len.numel()

    @property
    def tokens(self) -> int:
        """T, the number of tokens, prompts included."""
        return self.ids.numel()

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: tokens of each row, prompt included."""
        return self.offsets.diff()

    @property
    def response_lengths(self) -> Tensor:
        """int64 [B]: tokens of each row after its prompt."""
        return self.lengths - self.prompt_len

    @property
    def sampled_mask(self) -> Tensor:
        """bool [T]: True where the policy drew the token."""
        return self.role == ROLE_SAMPLED

    @property
    def row_of_token(self) -> Tensor:
        """int64 [T]: the row that each token belongs to."""
        return torch.repeat_interleave(torch.arange(self.rows, device=self.device), self.lengths)

    def per_token(self, values: Tensor) -> Tensor:
        """values [B] -> [T]: each row's value at each of its tokens (prompt tokens too: mask with `sampled_mask`)."""
        _require(
            values.shape == (self.rows,), "Rollout", "per_token(values)", f"shape [{self.rows}]", list(values.shape)
        )
        return torch.repeat_interleave(values, self.lengths)

    @property
    def sampled_count(self) -> Tensor:
        """int64 [B]: tokens of each row that the policy drew."""
        return self.row_sums(self.sampled_mask.long())

    @property
    def group_offsets(self) -> Tensor:
        """int64 [P+1]: the first row of each group, then B."""
        starts = torch.ones(self.rows + 1, dtype=torch.bool, device=self.device)
        starts[1:-1] = self.group.diff() != 0
        return starts.nonzero()[:, 0] if self.rows else self.group.new_zeros(1)

    def row_sums(self, values: Tensor) -> Tensor:
        """values [T] -> [B]: the sum over the tokens of each row, in their order."""
        return values.new_zeros(self.rows).index_add_(0, self.row_of_token, values)

    @property
    def main_rows(self) -> Tensor:
        """int64 [R]: the first row of each response, in order: every row that is not a branch."""
        rows = torch.arange(self.rows, device=self.device)
        return rows if self.parent is None else rows[self.parent == rows]

    @property
    def main(self) -> Rollout:
        """The responses without their branches."""
        return self if self.parent is None else replace(self.select(self.main_rows), parent=None)

    @property
    def response_of_row(self) -> Tensor:
        """int64 [B]: the number, among the responses, of the one that each row belongs to."""
        rows = torch.arange(self.rows, device=self.device)
        return rows if self.parent is None else (self.parent == rows).cumsum(0) - 1

    @property
    def response_offsets(self) -> Tensor:
        """int64 [R+1]: the first token of each response, branches included, then T."""
        return torch.cat([self.offsets[self.main_rows], self.offsets[-1:]])

    def response(self, row: int) -> Tensor:
        """int64: the ids of one row after its prompt, the end token included."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return self.ids[start + int(self.prompt_len[row]) : end]

    def select(self, rows: Tensor | Sequence[int]) -> Rollout:
        """The rollout of these rows, in the order given. Keeping a group's rows together is the caller's affair."""
        rows = _row_index(rows, self.device)
        index, offsets = _gather_index(self.offsets, rows)
        support_ids = support_offsets = None
        if self.support_ids is not None and self.support_offsets is not None:
            picked, support_offsets = _gather_index(self.support_offsets, index)
            support_ids = self.support_ids[picked]
        made = self.soft_of(index)
        return Rollout(
            **{name: getattr(self, name)[index] for name in _TOKEN_FIELDS},
            offsets=offsets,
            **{name: getattr(self, name)[rows] for name in _ROW_FIELDS},
            support_ids=support_ids,
            support_offsets=support_offsets,
            soft=None if made is None else made[0],
            soft_inputs=None if made is None else made[1],
            soft_sampling=None if made is None else self.soft_sampling,
            parent=self._select_parent(rows),
        )

    def _select_parent(self, rows: Tensor) -> Tensor | None:
        """`parent` among these rows: each branch row must follow its main row, or another branch of it."""
        if self.parent is None:
            return None
        place = torch.arange(rows.numel(), device=self.device)
        is_main = self.parent[rows] == rows
        last = torch.where(is_main, place, -1).cummax(0).values if rows.numel() else place
        ok = (last >= 0) & (rows[last] == self.parent[rows])
        _require_all(ok, rows, "Rollout", "select(rows)", "branch rows right behind the main row of their response")
        return last

    def with_prompts(self, prompts: Sequence[Sequence[int]]) -> Rollout:
        """The same responses behind other prompts, prompts[b] for row b: the context in which they are trained, while
        their log-probs stay those of the context in which they were drawn."""
        if self.support_ids is not None or self.soft is not None:
            raise ValueError(
                "Rollout.with_prompts: expected rows drawn without top-k, top-p or min-p and without soft tokens"
            )
        size = torch.tensor([len(p) for p in prompts], device=self.device)
        new = torch.zeros_like(self.offsets)
        new[1:] = (size + self.response_lengths).cumsum(0)
        in_prompt = torch.arange(int(new[-1]), device=self.device) < torch.repeat_interleave(
            new[:-1] + size, new.diff()
        )
        old_response = self.role != ROLE_PROMPT
        values = {}
        for name in _TOKEN_FIELDS:
            values[name] = getattr(self, name).new_zeros(int(new[-1]))  # role 0 is that of a prompt
            values[name][~in_prompt] = getattr(self, name)[old_response]
        values["ids"][in_prompt] = torch.tensor([i for p in prompts for i in p], device=self.device)
        return replace(self, **values, offsets=new, prompt_len=size)

    def support_of(self, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        """(row, id) of every pair "id is in the support of tokens[row]", int64; None where nothing was filtered."""
        if self.support_ids is None or self.support_offsets is None:
            return None
        picked, offsets = _gather_index(self.support_offsets, tokens)
        row = torch.repeat_interleave(torch.arange(tokens.numel(), device=self.device), offsets.diff())
        return row, self.support_ids[picked].long()

    def soft_of(self, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        """(which of these tokens are soft, bool like tokens; their vectors, in this order); None where none is."""
        if self.soft is None or self.soft_inputs is None or not bool(self.soft[tokens].any()):
            return None
        chosen = self.soft[tokens]
        return chosen, self.soft_inputs[(self.soft.cumsum(0) - 1)[tokens[chosen]]]

    def to(self, device: torch.device | str) -> Rollout:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return Rollout(**values)

    def cpu(self) -> Rollout:
        return self.to("cpu")

    def state_dict(self) -> dict[str, Any]:
        """Its fields as tensors and plain values, for a checkpoint; `Rollout.restore` takes them back."""
        state = {name: value for name, value in vars(self).items() if value is not None}
        return state | ({"soft_sampling": asdict(self.soft_sampling)} if self.soft_sampling is not None else {})

    @staticmethod
    def restore(state: Mapping[str, Any]) -> Rollout:
        how = state.get("soft_sampling")
        return Rollout(**{**state, "soft_sampling": None if how is None else SoftSampling(**how)})

    def validate(self) -> None:
        """Raises ValueError naming the field, what was expected and what was found."""
        rows, tokens = self.rows, self.tokens
        for name, dtype in _TOKEN_FIELDS.items():
            _check("Rollout", name, getattr(self, name), (tokens,), dtype)
        _check("Rollout", "offsets", self.offsets, (rows + 1,), torch.int64)
        for name, dtype in _ROW_FIELDS.items():
            _check("Rollout", name, getattr(self, name), (rows,), dtype)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                _require(
                    value.device == self.device, "Rollout", f.name, f"a tensor on {self.device} like ids", value.device
                )
        offsets, lengths = self.offsets, self.lengths
        _require(int(offsets[0]) == 0, "Rollout", "offsets", "offsets[0] = 0", int(offsets[0]))
        _require(int(offsets[-1]) == tokens, "Rollout", "offsets", f"offsets[B] = T = {tokens}", int(offsets[-1]))
        if rows == 0:
            return
        _require_all(lengths > 0, lengths, "Rollout", "offsets", "strictly rising values: row lengths >= 1")
        ok = (self.prompt_len >= 1) & (self.prompt_len <= lengths)
        _require_all(ok, self.prompt_len, "Rollout", "prompt_len", "1 <= prompt_len <= row length")
        for name, names in (("role", ROLE_NAMES), ("stop", STOP_NAMES)):
            value = getattr(self, name)
            _require_all((value >= 0) & (value < len(names)), value, "Rollout", name, f"0..{len(names) - 1}")
        _require_all(self.ids >= 0, self.ids, "Rollout", "ids", "ids >= 0")
        position = torch.arange(tokens, device=self.device) - self.per_token(offsets[:-1])
        in_prompt = position < self.per_token(self.prompt_len)
        expected = "ROLE_PROMPT on the first prompt_len tokens of a row and nowhere else"
        _require_all(in_prompt == (self.role == ROLE_PROMPT), self.role, "Rollout", "role", expected)
        for name in ("logp", "mean_logp", "entropy"):
            value = getattr(self, name)
            ok = torch.isfinite(value) & (self.sampled_mask | (value == 0))
            _require_all(ok, value, "Rollout", name, "finite values, 0 where not sampled")
        if self.support_ids is not None and self.support_offsets is not None:
            _check("Rollout", "support_offsets", self.support_offsets, (tokens + 1,), torch.int64)
            _check("Rollout", "support_ids", self.support_ids, (int(self.support_offsets[-1]),), torch.int32)
            size = self.support_offsets.diff()
            ok = (size == 0) | ((size > 0) & self.sampled_mask)
            _require_all(ok, size, "Rollout", "support_offsets", "rising values, a support only where sampled")
        made = (self.soft, self.soft_inputs, self.soft_sampling)
        given = sum(value is not None for value in made)
        _require(given in (0, 3), "Rollout", "soft", "soft, soft_inputs and soft_sampling together", f"{given} of them")
        if self.soft is not None and self.soft_inputs is not None:
            _check("Rollout", "soft", self.soft, (tokens,), torch.bool)
            _require_all(~self.soft | (self.role != ROLE_PROMPT), self.soft, "Rollout", "soft", "False in prompts")
            count, vectors = int(self.soft.sum()), self.soft_inputs
            _require(vectors.shape[:-1] == (count,), "Rollout", "soft_inputs", f"[{count},D]", list(vectors.shape))
            _require(bool(torch.isfinite(vectors).all()), "Rollout", "soft_inputs", "finite values", "nan or inf")
        if self.parent is not None:
            _check("Rollout", "parent", self.parent, (rows,), torch.int64)
            own = torch.arange(rows, device=self.device)
            last = torch.where(self.parent == own, own, -1).cummax(0).values
            ok = (last >= 0) & (self.parent == last)
            _require_all(ok, self.parent, "Rollout", "parent", "the row itself, or the last row of which that is true")
            ok = (self.group == self.group[last]) & (self.stop == self.stop[last])
            _require_all(ok, own, "Rollout", "parent", "branch rows with group and stop of their main row")
        runs = 1 + int((self.group.diff() != 0).sum())
        distinct = self.group.unique().numel()
        _require(runs == distinct, "Rollout", "group", f"contiguous groups ({distinct} runs)", f"{runs} runs")

    @staticmethod
    def concat(parts: Sequence[Rollout]) -> Rollout:
        """The rows of all parts in order. Group numbers of a later part are shifted past those of the earlier ones."""
        if not parts:
            raise ValueError("Rollout.concat: expected at least one rollout, got none")
        shifts, groups, offsets = 0, [], [parts[0].offsets[:1]]
        tokens = 0
        for part in parts:
            groups.append(part.group + shifts)
            shifts = int(groups[-1].max()) + 1 if part.rows else shifts
            offsets.append(part.offsets[1:] + tokens)
            tokens += part.tokens
        joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in (*_TOKEN_FIELDS, *_ROW_FIELDS)}
        joined["group"] = torch.cat(groups)
        support_ids = support_offsets = None
        if any(p.support_ids is not None for p in parts):
            support_ids = torch.cat([p.support_ids for p in parts if p.support_ids is not None])
            sizes = [p.support_offsets.diff() if p.support_offsets is not None else p.ids * 0 for p in parts]
            support_offsets = torch.cat([offsets[0], torch.cat(sizes).cumsum(0)])
        made = {p.soft_sampling for p in parts if p.soft_sampling is not None}
        if len(made) > 1:
            raise ValueError(f"Rollout.concat: expected soft tokens made in one way, got {made}")
        soft = soft_inputs = None
        if made:
            soft = torch.cat([torch.zeros_like(p.ids, dtype=torch.bool) if p.soft is None else p.soft for p in parts])
            soft_inputs = torch.cat([p.soft_inputs for p in parts if p.soft_inputs is not None])
        parent = None
        if any(p.parent is not None for p in parts):
            first = torch.tensor([p.rows for p in parts], device=joined["group"].device).cumsum(0)
            own = [torch.arange(p.rows, device=p.device) if p.parent is None else p.parent for p in parts]
            parent = torch.cat([o + end - p.rows for o, end, p in zip(own, first, parts, strict=True)])
        return Rollout(
            offsets=torch.cat(offsets), **joined, support_ids=support_ids, support_offsets=support_offsets, soft=soft,
            soft_inputs=soft_inputs, soft_sampling=made.pop() if made else None, parent=parent,
        )  # fmt: skip


_TOKEN_FIELDS = {
    "ids": torch.int64,
    "role": torch.int8,
    "logp": torch.float32,
    "mean_logp": torch.float32,
    "entropy": torch.float32,
}
_ROW_FIELDS = {"prompt_len": torch.int64, "group": torch.int64, "uid": torch.int64, "stop": torch.int8}


@dataclass(frozen=True)
class Graded:
    """A rollout with what the verifier said of it.

    rollout    Rollout          B rows in P groups, numbered 0 .. P-1; those of branches have what their response has
    problems   [P]              the problem of each group
    reward     fp32 [B]         what the algorithm trains on: the task's, until `Algo.judge` says otherwise
    correct    bool [B]         the exact verdict, whatever the reward is
    grades     [B]              the task's grade of each row, and
    texts      [B]              the graded text
    extra      name -> fp32 [T] per-token numbers for later stages, such as ref_logp; see `Batch.extra`
    """

    rollout: Rollout
    problems: Sequence[Problem]
    reward: Tensor
    correct: Tensor
    grades: Sequence[Grade]
    texts: Sequence[str]
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """P"""
        return len(self.problems)

    @property
    def main(self) -> Graded:
        """The responses without the rows of their branches: what group means and counts are over."""
        if self.rollout.parent is None:
            return self
        rows = self.rollout.main_rows
        return self._select(rows, self.rollout.main, self.problems)

    @property
    def accuracy(self) -> Tensor:
        """fp32 [P]: the share of right answers of each group."""
        rows = self.rollout.main_rows
        group, right = self.rollout.group[rows], self.correct[rows].float()
        return right.new_zeros(self.groups).index_add_(0, group, right) / torch.bincount(group)

    @property
    def equal(self) -> Tensor:
        """bool [P]: all rewards of the group are the same number, so that it teaches nothing (contract C15)."""
        first = self.reward[self.rollout.group_offsets[:-1]][self.rollout.group]
        differing = self.reward.new_zeros(self.groups).index_add_(0, self.rollout.group, (self.reward != first).float())
        return differing == 0

    def select_groups(self, groups: Tensor | Sequence[int]) -> Graded:
        """These groups, in the order given, numbered anew from 0."""
        chosen = torch.as_tensor(groups, dtype=torch.int64, device=self.rollout.device)
        bounds = self.rollout.group_offsets
        rows, _ = _gather_index(bounds, chosen)
        rollout = self.rollout.select(rows)
        size = bounds.diff()[chosen]
        number = torch.repeat_interleave(torch.arange(chosen.numel(), device=rollout.device), size)
        return self._select(rows, replace(rollout, group=number), [self.problems[i] for i in chosen.tolist()])

    def _select(self, rows: Tensor, rollout: Rollout, problems: Sequence[Problem]) -> Graded:
        """What is said of these rows; rollout: their tokens."""
        index, _ = _gather_index(self.rollout.offsets, rows)
        return Graded(
            rollout, problems, self.reward[rows], self.correct[rows], [self.grades[i] for i in rows.tolist()],
            [self.texts[i] for i in rows.tolist()], {name: values[index] for name, values in self.extra.items()},
        )  # fmt: skip

    @staticmethod
    def concat(parts: Sequence[Graded]) -> Graded:
        """The groups of all parts in order."""
        return Graded(
            Rollout.concat([p.rollout for p in parts]),
            [problem for p in parts for problem in p.problems],
            torch.cat([p.reward for p in parts]),
            torch.cat([p.correct for p in parts]),
            [grade for p in parts for grade in p.grades],
            [text for p in parts for text in p.texts],
            _concat_extra([p.extra for p in parts]),
        )


def _concat_extra(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = parts[0].keys() if parts else ()
    if any(p.keys() != names for p in parts):
        raise ValueError(f"concat: every part needs the same extra fields, got {[sorted(p) for p in parts]}")
    return {name: torch.cat([p[name] for p in parts]) for name in names}


@dataclass(frozen=True)
class Batch:
    """A rollout with its rewards and the terms of its loss.

    rollout    Rollout     B rows, T tokens
    reward     fp32 [B]    the task's reward of each row's response
    correct    bool [B]    whether the row's answer is right
    advantage  fp32 [T]    the factor of the policy gradient at each sampled token; 0 elsewhere
    weight     fp32 [T]    the share of each token in the loss (the normaliser); 0 where not trained
    coef       fp32 [T]    an algorithm's own factor on a token's term; 1 where it has none
    extra      name -> [T] further inputs of the loss, by their names in `pymathrl.ops.policy_loss` (ref_logp,
                           behaviour_logp, proxy_logp fp32, selected uint8), and what an algorithm keeps beside them
    """

    rollout: Rollout
    reward: Tensor
    correct: Tensor
    advantage: Tensor
    weight: Tensor
    coef: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def per_token(self, values: Tensor) -> Tensor:
        """values [B] -> [T], see `Rollout.per_token`."""
        return self.rollout.per_token(values)

    def select(self, rows: Tensor | Sequence[int]) -> Batch:
        """The batch of these rows, in the order given."""
        rows = _row_index(rows, self.rollout.device)
        index, _ = _gather_index(self.rollout.offsets, rows)
        return Batch(
            rollout=self.rollout.select(rows),
            reward=self.reward[rows],
            correct=self.correct[rows],
            advantage=self.advantage[index],
            weight=self.weight[index],
            coef=self.coef[index],
            extra={name: values[index] for name, values in self.extra.items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "extra"}
        return replace(self, **moved, extra={name: values.to(device) for name, values in self.extra.items()})

    def cpu(self) -> Batch:
        return self.to("cpu")

    def validate(self) -> None:
        """Raises ValueError naming the field, what was expected and what was found."""
        self.rollout.validate()
        rows, tokens = self.rollout.rows, self.rollout.tokens
        _check("Batch", "reward", self.reward, (rows,), torch.float32)
        _check("Batch", "correct", self.correct, (rows,), torch.bool)
        _require_all(torch.isfinite(self.reward), self.reward, "Batch", "reward", "finite values")
        for name in ("advantage", "weight", "coef"):
            value = getattr(self, name)
            _check("Batch", name, value, (tokens,), torch.float32)
            _require_all(torch.isfinite(value), value, "Batch", name, "finite values")
        for name, value in self.extra.items():
            _check("Batch", f"extra[{name!r}]", value, (tokens,), value.dtype)
        ok = self.rollout.sampled_mask | (self.weight == 0)
        _require_all(ok, self.weight, "Batch", "weight", "0 where not sampled")

    @staticmethod
    def concat(parts: Sequence[Batch]) -> Batch:
        """The rows of all parts in order, see `Rollout.concat`."""
        names = ("reward", "correct", "advantage", "weight", "coef")
        joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
        return Batch(
            Rollout.concat([p.rollout for p in parts]), **joined, extra=_concat_extra([p.extra for p in parts])
        )


@dataclass(frozen=True)
class MicroBatch:
    """b rows as one forward pass of the update takes them, one after the other without padding; N = sampled tokens.

    rows          int64 [b]    row numbers in the rollout
    ids           int64 [F]    the fed tokens: of each row all but the last, which scores nothing
    starts        int64 [b+1]  row i feeds ids[starts[i] : starts[i+1]]
    hidden_index  int64 [N]    index into the F hidden states: the position before each sampled token, which scores it
    token_index   int64 [N]    index of each sampled token in the rollout's packed arrays
    targets       int64 [N]    the sampled tokens: rollout.ids[token_index]
    offsets       int64 [b+1]  row i of the micro-batch owns the sampled tokens offsets[i] .. offsets[i+1]
    inputs        None, or (int64 [s] into ids, [s,D]): the fed soft tokens and their vectors, see `Decoder.hidden`
    """

    rows: Tensor
    ids: Tensor
    starts: Tensor
    hidden_index: Tensor
    token_index: Tensor
    targets: Tensor
    offsets: Tensor
    inputs: tuple[Tensor, Tensor] | None = None


def micro_batches(rollout: Rollout, rows: Tensor | Sequence[int], token_budget: int) -> Iterator[MicroBatch]:
    """Splits rows of a rollout, in their order, into micro-batches of at most `token_budget` fed tokens, or one row.

    Deterministic in its arguments. Rows without a sampled token are left out.
    """
    if token_budget < 1:
        raise ValueError(f"micro_batches: token_budget must be >= 1 token, got {token_budget}")
    device = rollout.device
    rows = _row_index(rows, device)
    per_row = torch.zeros(rollout.rows, dtype=torch.int64, device=device)
    per_row.index_add_(0, rollout.row_of_token, rollout.sampled_mask.long())
    rows = rows[per_row[rows] > 0]
    begin = fed = 0
    for end, length in enumerate((rollout.lengths[rows] - 1).tolist()):
        if end > begin and fed + length > token_budget:
            yield _micro_batch(rollout, rows[begin:end])
            begin, fed = end, 0
        fed += length
    if rows.numel():
        yield _micro_batch(rollout, rows[begin:])


def _micro_batch(rollout: Rollout, rows: Tensor) -> MicroBatch:
    index, ends = _gather_index(rollout.offsets, rows)  # packed index of every token of these rows
    row = torch.repeat_interleave(torch.arange(rows.numel(), device=rollout.device), ends.diff())
    fed = torch.ones_like(index, dtype=torch.bool)
    fed[ends[1:] - 1] = False
    at = (rollout.role[index] == ROLE_SAMPLED).nonzero()[:, 0]  # never a row's first token: that is a prompt token
    offsets = torch.zeros_like(ends)
    offsets[1:] = torch.bincount(row[at], minlength=rows.numel()).cumsum(0)
    token_index = index[at]
    made = rollout.soft_of(index[fed])
    return MicroBatch(
        rows=rows,
        ids=rollout.ids[index[fed]],
        starts=ends - torch.arange(ends.numel(), device=rollout.device),
        hidden_index=at - 1 - row[at],
        token_index=token_index,
        targets=rollout.ids[token_index],
        offsets=offsets,
        inputs=None if made is None else (made[0].nonzero()[:, 0], made[1]),
    )


def keep_support(logits: Tensor, support: tuple[Tensor, Tensor], begin: int = 0) -> None:
    """Sets logits [n,V], those of tokens begin .. begin+n-1, to -inf outside their support (see `support_of`); those of
    a token without one, which was drawn without filters, stay."""
    row, ids = support
    bounds = torch.tensor([begin, begin + logits.shape[0]], device=row.device)
    part = slice(*torch.searchsorted(row, bounds).tolist())
    at = row[part] - begin, ids[part]
    kept = logits[at]
    logits[at[0].unique_consecutive()] = -torch.inf
    logits[at] = kept


def enumerate_ragged(count: Tensor) -> tuple[Tensor, Tensor]:
    """count int64 [n] -> (owner, within), both int64 [sum(count)]: 0,0,..,1,.. and 0,1,..,0,..: the elements of n lists
    of these lengths, one list after the other."""
    owner = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)
    return owner, torch.arange(owner.numel(), device=count.device) - (count.cumsum(0) - count)[owner]


def _row_index(rows: Tensor | Sequence[int], device: torch.device) -> Tensor:
    return torch.as_tensor(rows, dtype=torch.int64, device=device)


def _gather_index(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(index [T'] of the tokens of these rows in the packed arrays, offsets [B'+1] of the selection)."""
    lengths = offsets.diff()[rows]
    new = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=offsets.device)
    new[1:] = lengths.cumsum(0)
    total = int(new[-1])
    index = torch.arange(total, device=offsets.device) + torch.repeat_interleave(offsets[:-1][rows] - new[:-1], lengths)
    return index, new
