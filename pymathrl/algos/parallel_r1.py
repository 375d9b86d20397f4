"""Parallel-R1: fork/join thinking, after "Parallel-R1: Towards Parallel Thinking via Reinforcement Learning" (Zheng et
al., arXiv 2509.07980; code: github.com/zhengkid/Parallel-R1).

    ... <Parallel> <Path> a </Path> <Path> b </Path> </Parallel> <Summary> c </Summary> ... answer

At <Parallel> the response forks into paths, which do not see each other; they are joined, and the summary sees all of
them. At most 4 blocks; after them <Parallel> is ruled out. The policy gradient is GRPO's with clip-higher:

    A = (R - mean of the group) / (std of the group + eps)
    L = mean over the tokens of the step of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    --path-reward accuracy     R = 1 or -1                                                       (the paper's S1)
                  alternating  the same in steps 1..8 of each ten; in the others, where a block is well-formed if its
                               tags are balanced, with two or more paths and one summary:        (S2)
                               1.2 for a right answer with a well-formed block, 1 without any block, else -1
                  both         1 for a right answer with a well-formed block, else 0              (GSM8K stage)
                  bonus        accuracy, and 0.5 for a well-formed block even when wrong

Rows. A path k > 1 was drawn with only the text before the block in view, yet in the response it stands behind path 1.
So in the response's own (main) row its tokens are forced, and a branch row, prompt + prefix + <Path> + path, holds them
as sampled: each sampled token is trained once, in the context that it was drawn in, with the sampler's log-prob
reproduced bit for bit, and the summary is trained behind the union of the paths. Advantages, averages and counts are
those of responses (see `Rollout.parent`).

Differs from the paper's "Unseen" variant, whose attention mask hides the paths from each other and starts each at the
same position: tokens see the same text here, but the positions after a block run on (there: from the longest path),
and the summary reads path 2 as it looks behind path 1. The code draws the summary so too, and trains it otherwise.
Differs from the code: forced tags are not trained (there a mask is made and not used); a fourth block does not end the
response; a block cut off by the length limit stays open; any number of paths. An end token drawn in a path gives way to
</Path>, as in the code, and is then not trained.

Ours: --open. A model that was not fine-tuned on such traces never writes <Parallel>; `always` opens a block at the
start of each response, in training and in evaluations. For the built-in model a block opens with a newline and has no
closing tag; its paths are thoughts, <think> ... </think>, and its summary is the answer, <answer> ... </answer>: the
texts that it knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import clip_high, clip_low, clip_terms, group_normalised
from pymathrl.batch import STOP_EOS, STOP_LENGTH, Graded, Rollout
from pymathrl.errors import UserError
from pymathrl.options import option, positive

if TYPE_CHECKING:
    from pymathrl.context import Context
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws

BLOCKS = 4  # per response at most
WAYS = 64  # draws of a response have identities uid * WAYS .. : room for the branches of all its blocks
PERIOD, TIERED = 10, 2  # of ten steps of `alternating`, the last two are tiered


@dataclass(frozen=True)
class Tags:
    """block, path, summary: (opening, closing) text. odd: texts that stand nowhere but in a well-formed block."""

    block: tuple[str, str]
    path: tuple[str, str]
    summary: tuple[str, str]
    odd: tuple[str, ...]

    def count(self, text: str) -> tuple[int, bool]:
        """(well-formed blocks, whether all tags are theirs). Well-formed: two or more paths, then one summary."""
        outside = "|".join(map(re.escape, (*self.odd, self.path[1], self.summary[1])))
        path, summary = (f"{re.escape(a)}(?:(?!{outside}).)*{re.escape(b)}" for a, b in (self.path, self.summary))
        begin, end = re.escape(self.block[0]), re.escape(self.block[1].strip())
        block = rf"{begin}\s*(?:{path}\s*?){{2,}}{end}\s*{summary}"
        rest, blocks = re.subn(block, "", text, flags=re.DOTALL)
        return blocks, not any(tag in rest for tag in self.odd)


WORDS = Tags(
    ("<Parallel>", "</Parallel>\n"), ("<Path>", "</Path>"), ("<Summary>", "</Summary>"),
    odd=("<Parallel>", "</Parallel>", "<Path>", "</Path>", "<Summary>", "</Summary>"),
)  # fmt: skip
COMPACT = Tags(("\n", ""), ("<think>", "</think>"), ("<answer>", "</answer>"), odd=("\n", "<think>"))


@dataclass(frozen=True)
class Config:
    paths: int = option(2, "paths of a block (paper: 2)", check=lambda v: 2 <= v <= WAYS // BLOCKS, expected="2 .. 16")
    path_tokens: int = positive(4096, "length limit of a path, in tokens (code: 4096)")
    open: str = option(
        "auto", "who opens a block: the model; always: one is opened at the start of each response too (ours); auto: "
        "always for the built-in model, which opens none", choices=("auto", "model", "always"),
    )  # fmt: skip
    path_reward: str = option("alternating", "see the table", choices=("accuracy", "alternating", "both", "bonus"))
    path_bonus: float = positive(1.2, "reward of a right answer with a well-formed block, in tiered steps (code: 1.2)")
    clip_low: float = clip_low(0.2, "code: 0.2")
    clip_high: float = clip_high(0.28, "S2: 0.28; S1: 0.2")
    adv_eps: float = positive(1e-6, "added to the std (verl: 1e-6)")


@dataclass
class _Response:
    """A response in the making, or a branch of it. length: of the sequence in tokens, at most `limit`. stop: None while
    it goes on."""

    seq: int
    uid: int
    length: int
    limit: int
    branches: list[int] = field(default_factory=list)
    blocks: int = 0
    stop: int | None = None


class _Writer:
    """Writes the responses of one call, all side by side: text up to a block, its paths, its summary, and so on."""

    def __init__(self, ctx: Context, prompts: Prompts, draws: Draws, always: bool) -> None:
        self.ctx, self.engine, self.draws, self.always = ctx, ctx.engine, draws, always
        self.tags = tags_of(ctx)
        uids = draws.uids(prompts.problems).tolist()
        if max(uids) >= 2**62 // WAYS:
            raise UserError(
                "parallel_r1: expected problem numbers below 2^40, as each path has random numbers of its own"
            )
        roots = self.engine.start(prompts.ids)
        for root in roots if always else ():
            self.engine.append(root, ctx.tokens(self.tags.block[0]))
        seqs = self.engine.fork(roots, draws.samples, uids)
        length = [n for n in self.engine.lengths(roots) for _ in range(draws.samples)]
        limit = [len(ids) + draws.max_new_tokens for ids in prompts.ids for _ in range(draws.samples)]
        self.engine.free(roots)
        self.rows = [_Response(*values) for values in zip(seqs, uids, length, limit, strict=True)]

    def write(self) -> Rollout:
        try:
            opened, capped = (self.rows if self.always else []), set[int]()
            while True:
                self._block([r for r in opened if r.stop is None])
                going = [r for r in self.rows if r.stop is None]
                if not going:
                    return self._rollout(capped)
                free, full = ([r for r in going if (r.blocks < BLOCKS) == below] for below in (True, False))
                closed = self._draw(free, self.tags.block[0])
                opened = [r for r in free if r.seq in closed]
                self._draw(full, None, hook=self._forbid(self.ctx.tokens(self.tags.block[0])))
                capped |= {r.seq for r in full}
        finally:
            self.engine.free([seq for r in self.rows for seq in (r.seq, *r.branches)])

    def _block(self, opened: list[_Response]) -> None:
        """Paths and summary of these responses, whose block was just opened."""
        if not opened:
            return
        engine, n, (begin, end) = self.engine, self.ctx.own.paths, self.tags.path
        uids = [-1 - (r.uid * WAYS + r.blocks * n + k) for r in opened for k in range(1, n)]
        branches = iter(engine.fork([r.seq for r in opened], n - 1, uids))
        forks = [(r, r.length, [replace(r, seq=next(branches)) for _ in range(1, n)]) for r in opened]
        for r, _, others in forks:
            r.branches += [p.seq for p in others]
            r.blocks += 1
            for p in (r, *others):
                self._force(p, self.ctx.tokens(begin))
        every = [p for r, _, others in forks for p in (r, *others) if p.stop is None]
        closed = self._draw(every, end, most=self.ctx.own.path_tokens)
        closing, summary = self.ctx.tokens(end), self.ctx.tokens(self.tags.block[1] + self.tags.summary[0])
        for r, start, others in forks:
            joined = [] if r.seq in closed else [*closing]
            for p in others:
                joined += engine.tokens(p.seq)[start:] + ([] if p.seq in closed else closing)
            self._force(r, joined + summary)
        self._draw([r for r in opened if r.stop is None], self.tags.summary[1])

    def _draw(
        self, rows: list[_Response], closing: str | None, *, most: int | None = None, hook: Any = None
    ) -> set[int]:
        """Draws for each row until it writes `closing`; the sequences that did. The other responses have stopped; but
        under `most`, the limit of a path in tokens, they go on, and give an end token back."""
        if not rows:
            return set()
        engine, seqs = self.engine, [r.seq for r in rows]
        room = [min(r.limit - r.length, most or r.limit) for r in rows]
        ids = [] if closing is None else self.ctx.tokens(closing)
        ends: dict[str, Any] = {"stop_ids": (*self.ctx.policy.eos_ids, *ids)} if len(ids) == 1 else {}
        if len(ids) > 1:
            ends["stop_strings"] = [closing]
        why = engine.segment(seqs, room, seed=self.draws.seed, hook=hook, **ends, **self.draws.sampling)
        closed = set()
        for r, reason, length in zip(rows, why, engine.lengths(seqs), strict=True):
            r.length = length
            if reason == "string" or (reason == "eos" and engine.tokens(r.seq)[-1:] == ids):
                closed.add(r.seq)
                r.stop = STOP_LENGTH if length == r.limit else None
            elif most is None:
                r.stop = STOP_EOS if reason == "eos" else STOP_LENGTH
            elif reason == "eos":
                r.length -= 1
                engine.rollback(r.seq, replace(engine.snapshot(r.seq), length=r.length))
        return closed

    def _force(self, r: _Response, ids: list[int]) -> None:
        """Puts tokens in, as far as there is room; a response that is full has stopped."""
        ids = ids[: r.limit - r.length]
        self.engine.append(r.seq, ids)
        r.length += len(ids)
        r.stop = STOP_LENGTH if r.length == r.limit else r.stop

    def _forbid(self, opening: list[int]) -> Any:
        """A hook that rules out the token which would complete <Parallel>."""
        *before, last = opening

        def hook(seqs: list[int], logits: Tensor, stats: object) -> Tensor:
            tails = [self.engine.tokens(seq)[-len(before) :] if before else [] for seq in seqs]
            ruled_out = torch.tensor([tail == before for tail in tails], device=logits.device)
            logits = logits.clone()
            logits[ruled_out, last] = -torch.inf
            return logits

        return hook

    def _rollout(self, capped: set[int]) -> Rollout:
        size = torch.tensor([1 + len(r.branches) for r in self.rows])
        of = torch.arange(len(self.rows)).repeat_interleave(size)
        made = self.engine.rollout(
            [s for r in self.rows for s in (r.seq, *r.branches)], (of // self.draws.samples).tolist()
        )
        stop = torch.tensor([r.stop for r in self.rows], dtype=torch.int8)
        move = lambda values: values.to(made.device)
        made = replace(made, parent=move((size.cumsum(0) - size)[of]), stop=move(stop[of]))
        rows = [at for at, r in zip((size.cumsum(0) - size).tolist(), self.rows, strict=True) if r.seq in capped]
        if not rows:
            return made
        # a token drawn where <Parallel> was ruled out has a larger log-prob there than under the policy
        tokens = made.per_token(torch.isin(torch.arange(made.rows, device=made.device), move(torch.tensor(rows))))
        own = self.ctx.score(made.select(rows))
        scored = {name: getattr(made, name).clone() for name in ("logp", "mean_logp", "entropy")}
        for name, values in scored.items():
            values[tokens] = getattr(own, name)
        return replace(made, **scored)


def tags_of(ctx: Context) -> Tags:
    return COMPACT if ctx.policy.prompt_style == "compact" else WORDS


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    always = ctx.own.open == "always" or (ctx.own.open == "auto" and ctx.policy.prompt_style == "compact")
    return _Writer(ctx, prompts, draws, always).write()


def reward_of(kind: str, bonus: float, step: int, correct: bool, blocks: int, sound: bool) -> float:
    """step: from 1. sound: no tag stands outside of the well-formed blocks."""
    good = blocks > 0 and sound
    if kind == "both":
        return float(correct and good)
    if kind == "alternating" and (step - 1) % PERIOD >= PERIOD - TIERED:
        return (bonus if blocks else 1.0) if correct and sound else -1.0
    return (1.0 if correct else -1.0) + (0.5 if kind == "bonus" and good else 0.0)


def judge(ctx: Context, graded: Graded) -> Graded:
    own, step, tags = ctx.own, ctx.at.stage_step + 1, tags_of(ctx)
    counts = [tags.count(text) for text in graded.texts]
    reward = [
        reward_of(own.path_reward, own.path_bonus, step, correct, *count)
        for correct, count in zip(graded.correct.tolist(), counts, strict=True)
    ]
    main = [counts[row] for row in graded.rollout.main_rows.tolist()]
    ctx.metrics |= {
        "parallel/blocks": sum(blocks for blocks, _ in main) / len(main),
        "parallel/well_formed": sum(blocks > 0 and sound for blocks, sound in main) / len(main),
    }
    return replace(graded, reward=graded.reward.new_tensor(reward))


def loss(config: Config) -> LossSpec:
    return LossSpec("clip", "token-mean", clip_terms(config), idle_when_zero=True)


ALGO = Algo(
    name="parallel_r1",
    summary="fork/join thinking: paths that do not see each other, and a summary of them",
    paper="arXiv 2509.07980",
    config=Config,
    advantage=group_normalised,
    loss=loss,
    tools=True,
    rollout=rollout,
    judge=judge,
)
