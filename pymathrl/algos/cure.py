"""CURE, stage 1: new continuations from uncertain tokens of a response, after "CURE: Critical-Token-Guided
Re-Concatenation for Entropy-Collapse Prevention" (Li et al., arXiv 2508.11016; code: github.com/bytedance/CURE).

Per problem n1 responses. Of each response a critical token is chosen: its tokens in order of falling entropy, without
the first one, special tokens and tokens of less than two characters; of the first K that are left, one at random. From
the text before it n2 new responses are drawn: the token itself is drawn anew. A group is all n1 (1 + n2) of them, and
the rest is DAPO: see that file. --samples-per-prompt is the size of the group; its share for n1 follows.

What a branch takes over from its response is forced: graded with it as one answer, in the context, not in the loss.

Stage 2 is plain DAPO from these weights (paper: after 300 steps, with longer responses), as a schedule:

    [[stage]]            [[stage]]
    algo = "cure"        algo = "dapo"
    steps = 300          steps = 200

Differs from the code: it grades only the continuation (the answer at the tail is the same), and gives a continuation
the whole length limit; here response and continuation together have --max-new-tokens. Without a valid token the whole
response is drawn anew, as there. The paper's text was not at hand beyond its abstract.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pymathrl.algos import dapo
from pymathrl.batch import ROLE_FORCED, Rollout
from pymathrl.errors import UserError
from pymathrl.options import at_least, option, positive

if TYPE_CHECKING:
    from pymathrl.config import TrainConfig
    from pymathrl.context import Context
    from pymathrl.prompt import Prompts
    from pymathrl.rollout.draws import Draws


@dataclass(frozen=True)
class Config(dapo.Config):
    branches: int = positive(3, "n2: new continuations of each response (code: 3)")
    critical_tokens: int = positive(20, "K: most uncertain tokens of a response, one of which is chosen (code: 20)")
    critical_by: str = option("entropy", "the order of a response's tokens; random: a control",
                              choices=("entropy", "random"))  # fmt: skip
    critical_chars: int = at_least(
        0, 0, "least characters of a critical token, white space at its ends not counted; 0 = 2 (code: 2), but 1 "
        "for prompts in the compact style, where a token is a character",
    )  # fmt: skip


def check(train: TrainConfig, own: Config) -> None:
    dapo.check(train, own)
    if train.samples_per_prompt % (1 + own.branches):
        raise UserError(
            "--samples-per-prompt: --algo cure draws n1 responses and --branches new ones from each; expected a "
            f"multiple of {1 + own.branches}, got {train.samples_per_prompt}"
        )


def critical_token(
    entropy: Sequence[float], texts: Sequence[str], count: int, least: int, by: str, rng: random.Random
) -> int:
    """The number of the critical token of a response, 0 where none is valid. texts: of each token alone; those of
    special tokens are empty."""
    order = sorted(range(len(entropy)), key=lambda i: -entropy[i])
    if by == "random":
        order = rng.sample(range(len(entropy)), len(entropy))
    valid = [i for i in order if i > 0 and len(texts[i].strip()) >= least]
    return rng.choice(valid[:count]) if valid else 0


def branch(ctx: Context, first: Rollout, cuts: Sequence[int], prompts: Prompts, draws: Draws) -> Rollout:
    """--branches continuations of each row of `first`, after its first cuts[row] tokens, which are forced in them."""
    branches = ctx.own.branches
    roots = first.rows // len(prompts.ids)
    row_problem = first.group.tolist()
    ids = [[*prompts.ids[p], *first.response(row).tolist()[: cuts[row]]] for row, p in enumerate(row_problem)]
    numbers = [roots + row % roots * branches for row in range(first.rows)]
    named = replace(draws, samples=branches, first=numbers)
    new = ctx.engine.generate(
        ids, branches, [draws.max_new_tokens - cut for cut in cuts],
        uids=named.uids([prompts.problems[p] for p in row_problem]), seed=draws.seed,
        stop_strings=ctx.stop_strings, **draws.sampling,
    )  # fmt: skip
    prompt_len = new.prompt_len - torch.tensor(cuts, device=new.device).repeat_interleave(branches)
    position = torch.arange(new.tokens, device=new.device) - new.per_token(new.offsets[:-1])
    taken_over = (position >= new.per_token(prompt_len)) & (position < new.per_token(new.prompt_len))
    role = torch.where(taken_over, ROLE_FORCED, new.role).to(torch.int8)
    return replace(new, role=role, prompt_len=prompt_len)


def rollout(ctx: Context, prompts: Prompts, draws: Draws) -> Rollout:
    own = ctx.own
    roots, problems = draws.samples // (1 + own.branches), len(prompts.ids)
    first = ctx.generate(prompts, replace(draws, samples=roots))
    least = own.critical_chars or (1 if ctx.policy.prompt_style == "compact" else 2)
    host = first.cpu()
    used = host.ids[host.sampled_mask].unique().tolist()
    text = dict(zip(used, ctx.policy.tokenizer.decode_batch([[token] for token in used]), strict=True))
    cuts = []
    for row, uid in enumerate(host.uid.tolist()):
        response, end = host.response(row).tolist(), int(host.offsets[row + 1])
        cuts.append(critical_token(
            host.entropy[end - len(response) : end].tolist(),
            [text[token] for token in response], own.critical_tokens, least, own.critical_by,
            random.Random(f"cure {draws.seed} {uid}"),
        ))  # fmt: skip
    ctx.metrics["cure/cut"] = sum(cuts) / len(cuts)
    both = Rollout.concat([first, branch(ctx, host, cuts, prompts, draws)])
    # the rows of a problem together: its responses, then the branches of each
    rows = torch.arange(both.rows, device=both.device)
    order = torch.cat([rows[: first.rows].view(problems, -1), rows[first.rows :].view(problems, -1)], 1)
    return replace(both.select(order.flatten()), group=rows // draws.samples)


ALGO = replace(
    dapo.ALGO,
    name="cure",
    summary="DAPO on responses and new continuations from their uncertain tokens",
    paper="arXiv 2508.11016",
    config=Config,
    defaults={**dapo.ALGO.defaults, "samples_per_prompt": 16},
    check=check,
    rollout=rollout,
)
