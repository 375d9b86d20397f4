"""Stage 5, loss: hidden states and head weight in, loss and both gradients out, never holding all logits.

A micro-batch of N sampled tokens is cut into chunks of rows. Per chunk: one GEMM into a reused workspace [rows, V], one
fused pass for log-prob, entropy and mean log-prob, the token loss with its gradient, the gradient of the logits written
over the logits, and two GEMMs for the gradients of the hidden states and of the head. The peak is one chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pymathrl.algos import LossSpec
from pymathrl.batch import ROLE_SAMPLED, Batch, Rollout, keep_support, micro_batches
from pymathrl.config import TrainConfig
from pymathrl.models import Decoder
from pymathrl.ops.aggregation import aggregation_coef
from pymathrl.ops.linear import linear_out
from pymathrl.ops.policy_loss import PolicyLoss, merge_stats, policy_loss, works_on_sequences
from pymathrl.ops.soft_embed import SoftEmbed, SoftSampling, soft_embed, soft_embed_backward
from pymathrl.ops.token_logprob import token_logprob, token_logprob_backward_

WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # of one chunk of fp32 logits
ROW_MULTIPLE = 16  # rows per chunk: whole tiles of the GEMMs


@dataclass(frozen=True)
class SoftTerms:
    """Which of N tokens are soft, and what they were: constants without gradient.

    index     int64 [S]  rising
    inputs    [S,D]      the vectors that were drawn, of the model's dtype
    sampling             how
    table     [V,D]      the embedding table, of which their means are mixed: it gets a gradient
    """

    index: Tensor
    inputs: Tensor
    sampling: SoftSampling
    table: Tensor

    def score(self, logits: Tensor, begin: int) -> tuple[Tensor, SoftEmbed] | None:
        """logits [n,V] of tokens begin .. begin+n-1 -> (the rows of the soft tokens among them, what they were); None
        where there is none."""
        bounds = torch.tensor([begin, begin + logits.shape[0]], device=self.index.device)
        piece, s = slice(*torch.searchsorted(self.index, bounds).tolist()), self.sampling
        at = self.index[piece] - begin
        if not at.numel():
            return None
        return at, soft_embed(
            logits[at], self.table.detach(), temperature=s.temperature, sigma=s.sigma, top_k=s.top_k,
            inputs=self.inputs[piece],
        )  # fmt: skip

    def gradient(self, scored: SoftEmbed, grad_logp: Tensor, grad_table: Tensor) -> Tensor:
        """The gradient of the logits; that of the table is added to `grad_table`."""
        dlogits, shares = soft_embed_backward(
            scored, self.table.detach(), grad_logp, temperature=self.sampling.temperature, sigma=self.sampling.sigma
        )
        grad_table.addmm_(scored.weights.t().to(grad_table.dtype), shares)
        return dlogits


def soft_terms(rollout: Rollout, tokens: Tensor, table: Tensor) -> SoftTerms | None:
    """Of these tokens of the rollout; None where none is soft."""
    made = rollout.soft_of(tokens)
    if made is None:
        return None
    assert rollout.soft_sampling is not None, "Rollout.validate: soft tokens say how they were made"
    return SoftTerms(made[0].nonzero()[:, 0], made[1], rollout.soft_sampling, table)


@dataclass(frozen=True)
class TokenTerms:
    """What the loss of N sampled tokens is made of, rows of a sequence in order. Constants without gradient.

    old_logp, advantage, coef  fp32 [N]   coef: share of the token in the loss (normaliser and weights)
    old_mean_logp              fp32 [N]   form "rover": the sampler's mean log-prob
    link                       uint8 [N]  form "rover": 1 where row n+1 is the next token of the same sequence
    offsets                    int64 [S+1] a loss that `works_on_sequences`: rows of each sequence
    support                    (row, id) int64 [M] each, rising in row: where tokens were drawn under filters, the ids
                               that each token was drawn from; the distribution is renormalised over them
    soft                       where there are soft tokens: their log-prob is the density of their vector, their entropy
                               and mean log-prob are those of the distribution that was mixed
    extra                      name -> [N]: further inputs of `policy_loss` by name, such as ref_logp
    """

    old_logp: Tensor
    advantage: Tensor
    coef: Tensor
    old_mean_logp: Tensor | None = None
    link: Tensor | None = None
    offsets: Tensor | None = None
    support: tuple[Tensor, Tensor] | None = None
    soft: SoftTerms | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, begin: int, end: int) -> TokenTerms:
        """Rows begin..end; old_mean_logp reaches one row further, where there is one."""
        return replace(
            self,
            old_logp=self.old_logp[begin:end],
            advantage=self.advantage[begin:end],
            coef=self.coef[begin:end],
            old_mean_logp=None if self.old_mean_logp is None else self.old_mean_logp[begin : end + 1],
            link=None if self.link is None else self.link[begin:end],
            extra={name: values[begin:end] for name, values in self.extra.items()},
        )


@dataclass(frozen=True)
class HeadLoss:
    """loss: fp32 scalar, differentiable in hidden, weight and the table of soft tokens. logp, entropy, mean_logp: fp32
    [N], of the policy now. stats: fp32 [K], see `pymathrl.ops.policy_loss.STATS`."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    mean_logp: Tensor
    stats: Tensor


def fused_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    terms: TokenTerms,
    spec: LossSpec,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> HeadLoss:
    """The policy loss of N tokens from their hidden states [N,D] and the head [V,D]; targets int64 [N].

    Both gradients are computed here, in the forward pass, and only scaled in the backward. `chunk_rows` (default: what
    fits the workspace) changes memory and speed, not the result beyond fp32 rounding of the head's gradient.
    Chunks go from the last row to the first, so that ROVER's target, which looks one token ahead, finds it computed.
    A loss over sequences needs every log-prob of its sequence first: with several chunks it takes a pass of its own.
    """
    if terms.soft is not None and spec.terms.get("entropy_coef"):
        raise ValueError("fused_policy_loss: soft tokens have no entropy bonus; expected entropy_coef 0")
    rows = head_chunk_rows(hidden, weight) if chunk_rows is None else chunk_rows
    record: dict[str, Any] = {}
    table = None if terms.soft is None else terms.soft.table
    loss = _FusedHead.apply(hidden, weight, table, targets, terms, spec, temperature, max(1, rows), record)
    return HeadLoss(loss, record["logp"], record["entropy"], record["mean_logp"], record["stats"])


def head_chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """Rows whose fp32 logits are held at once."""
    rows = WORKSPACE_BYTES[hidden.device.type] // (4 * weight.shape[0])
    return max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, table: Tensor | None, targets: Tensor, terms: TokenTerms,
        spec: LossSpec, temperature: float, chunk_rows: int, record: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        n, vocab = hidden.shape[0], weight.shape[0]
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_table = None if table is None else torch.zeros_like(table)
        logp, entropy, mean_logp = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(3))
        workspace = torch.empty(min(n, chunk_rows), vocab, dtype=torch.float32, device=hidden.device)
        starts = list(range(0, n, chunk_rows))[::-1]
        over_sequences = works_on_sequences(spec.form, spec.terms)

        def scores(begin: int, end: int) -> tuple[Tensor, Tensor, tuple[Tensor, SoftEmbed] | None]:
            logits = linear_out(hidden[begin:end], weight, workspace[: end - begin])
            if terms.support is not None:
                keep_support(logits, terms.support, begin)
            row = token_logprob(logits, targets[begin:end], temperature=temperature)
            logp[begin:end], entropy[begin:end], mean_logp[begin:end] = row.logp, row.entropy, row.mean_logp
            made = None if terms.soft is None else terms.soft.score(logits, begin)
            if made is not None:
                at, soft = begin + made[0], made[1]
                logp[at], entropy[at], mean_logp[at] = soft.logp, soft.entropy, soft.mean_logp
            return logits, row.lse, made

        def token_loss(begin: int, end: int) -> PolicyLoss:
            part = terms.rows(begin, end)
            extra = {**spec.terms, **part.extra}
            if spec.form == "rover" and spec.terms.get("rover_level") != "response":
                extra |= dict(mean_logp=mean_logp[begin : end + 1], old_mean_logp=part.old_mean_logp, link=part.link)
            if over_sequences:
                extra |= dict(offsets=terms.offsets)
            if extra.get("entropy_coef"):
                extra |= dict(entropy=entropy[begin:end])
            return policy_loss(logp[begin:end], part.old_logp, part.advantage, part.coef, form=spec.form, **extra)

        whole = None
        if over_sequences and len(starts) > 1:
            for begin in starts:
                scores(begin, min(n, begin + chunk_rows))
            whole = token_loss(0, n)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device) if whole is None else whole.loss
        stats = [] if whole is None else [whole.stats]
        for begin in starts:
            end = min(n, begin + chunk_rows)
            logits, lse, made = scores(begin, end)
            if whole is None:
                out = token_loss(begin, end)
                loss, grad_logp, grad_entropy = loss + out.loss, out.grad_logp, out.grad_entropy
                stats.append(out.stats)
            else:
                grad_logp = whole.grad_logp[begin:end]
                grad_entropy = None if whole.grad_entropy is None else whole.grad_entropy[begin:end]
            if made is not None:
                soft_grad, grad_logp = grad_logp[made[0]], grad_logp.index_fill(0, made[0], 0.0)
            token_logprob_backward_(
                logits, targets[begin:end], lse, entropy[begin:end], grad_logp, grad_entropy, temperature
            )
            if made is not None and terms.soft is not None and grad_table is not None:
                logits[made[0]] = terms.soft.gradient(made[1], soft_grad, grad_table)
            dlogits = logits.to(weight.dtype)
            torch.mm(dlogits, weight, out=grad_hidden[begin:end])
            grad_weight.addmm_(dlogits.t(), hidden[begin:end])
        record.update(logp=logp, entropy=entropy, mean_logp=mean_logp, stats=merge_stats(stats))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_table)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_table = ctx.saved_tensors
        scale = grad_loss.to(grad_hidden.dtype)  # in place: the buffers are this node's own
        grad_table = None if grad_table is None else grad_table.mul_(scale)
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), grad_table, None, None, None, None, None, None


@dataclass
class LossReport:
    """One optimizer step's loss, before the step. Sums over all its micro-batches."""

    loss: Tensor  # fp32 scalar on the device, detached
    stats: list[Tensor]  # fp32 [K] of each micro-batch, see `pymathrl.ops.policy_loss.STATS`
    tokens: int  # N, trained tokens
    rows: int  # B, responses
    idle_rows: int  # of these, left out because their gradient is exactly zero


def with_options(spec: LossSpec, config: TrainConfig, kl_coef: float) -> LossSpec:
    """An algorithm's loss with what the options of every run add to it. kl_coef: the factor of the KL as it is now."""
    terms, idle = dict(spec.terms), spec.idle_when_zero
    if config.kl != "none" and config.kl_in == "loss":
        terms |= {"kl": config.kl, "kl_coef": kl_coef}
        idle = False  # every token has a gradient now
    if config.entropy_coef:
        terms |= {"entropy_coef": config.entropy_coef}
        idle = False
    if config.is_level != "none":
        terms |= {"tis_level": config.is_level, "tis_cap": config.is_cap, "tis_mode": config.is_mode}
    aggregation = spec.aggregation if config.aggregation == "auto" else config.aggregation
    return replace(spec, terms=terms, aggregation=aggregation, idle_when_zero=idle)


def loss_inputs(spec: LossSpec) -> tuple[str, ...]:
    """Names of the per-token inputs that this loss reads besides log-probs and advantages: fields of `Batch.extra`."""
    names = ["proxy_logp", "selected"] if spec.form == "lp_reg" else []
    names += ["ref_logp"] if spec.terms.get("kl", "none") != "none" else []
    names += ["behaviour_logp"] if spec.terms.get("tis_cap") is not None else []
    return tuple(names)


def minibatch_loss(
    model: Decoder,
    batch: Batch,
    rows: Sequence[int] | Tensor,
    spec: LossSpec,
    *,
    temperature: float,
    token_budget: int,
    max_new_tokens: int,
    terms: Callable[[Batch], Mapping[str, Tensor]] | None = None,
) -> LossReport:
    """Accumulates into the gradients of `model` the loss of these rows of the batch: one optimizer step.

    The normalisers (N sampled tokens, B responses that have one) are those of all the rows, whatever the cut into
    micro-batches.
    terms: makes further fields of `Batch.extra` from the whole minibatch, before its loss.
    """
    mini = batch.select(rows)
    if terms is not None:
        mini = replace(mini, extra={**mini.extra, **terms(mini)})
    missing = [name for name in loss_inputs(spec) if name not in mini.extra]
    if missing:
        raise ValueError(f"minibatch_loss: form {spec.form!r} with {dict(spec.terms)} needs Batch.extra {missing}")
    extra = {name: mini.extra[name] for name in loss_inputs(spec)}
    rollout = mini.rollout
    mask, row = rollout.sampled_mask, rollout.row_of_token
    tokens = int(mask.sum())
    if not tokens:  # --truncated mask took every response
        empty = torch.zeros((), device=rollout.device)
        return LossReport(loss=empty, stats=[], tokens=0, rows=rollout.rows, idle_rows=rollout.rows)
    responses = rollout.response_offsets  # a response is one sequence here, with its branches
    before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
    counted = int((before[responses].diff() > 0).sum())  # one without a trained token is in no average
    weight = aggregation_coef(
        spec.aggregation, mask, responses, tokens=tokens, sequences=counted, max_length=max_new_tokens
    )
    mini = replace(mini, weight=weight)
    live = torch.arange(rollout.rows, device=rollout.device)
    if spec.idle_when_zero:
        # Exactly equal rewards give advantages of exactly 0, and in this form their gradient is exactly 0 too; so is
        # that of a factor of 0. Their tokens stay in the normalisers above.
        active = torch.zeros(rollout.rows, dtype=torch.bool, device=rollout.device)
        active[row[(mini.advantage != 0) & (mini.coef != 0)]] = True
        live = live[active]
    # A link leads to the next token where that is sampled in the same row: ROVER's Q' looks across it.
    link = torch.zeros_like(rollout.role, dtype=torch.uint8)
    link[:-1] = (row[1:] == row[:-1]) & (rollout.role[1:] == ROLE_SAMPLED)

    report = LossReport(
        loss=torch.zeros((), device=rollout.device), stats=[],
        tokens=tokens, rows=rollout.rows, idle_rows=rollout.rows - live.numel(),
    )  # fmt: skip
    for micro in micro_batches(rollout, live, token_budget):
        at = micro.token_index
        hidden = model.hidden(micro.ids, micro.starts, micro.inputs)[micro.hidden_index]
        inputs = TokenTerms(
            old_logp=rollout.logp[at], advantage=mini.advantage[at], coef=mini.weight[at] * mini.coef[at],
            old_mean_logp=rollout.mean_logp[at], link=link[at], offsets=micro.offsets, support=rollout.support_of(at),
            soft=soft_terms(rollout, at, model.embed),
            extra={name: values[at] for name, values in extra.items()},
        )  # fmt: skip
        out = fused_policy_loss(hidden, model.head_weight, micro.targets, inputs, spec, temperature=temperature)
        out.loss.backward()
        report.loss += out.loss.detach()
        report.stats.append(out.stats)
    return report
