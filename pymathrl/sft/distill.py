"""Distillation from a teacher that reads the same tokens: reverse KL, token by token (M1, arXiv 2504.10449, section 3).

    KL(student || teacher) = sum_v p_s(v) (log p_s(v) - log p_t(v)),   d/dz_s(v) = p_s(v) (log p_s(v) - log p_t(v) - KL)

over the whole vocabulary at temperature 1. The teacher is a constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pymathrl.batch import Rollout, micro_batches
from pymathrl.errors import UserError
from pymathrl.loss import head_chunk_rows
from pymathrl.models import Policy
from pymathrl.ops.linear import linear_out


class Distilled(NamedTuple):
    """fp32 [], nats, means over the weights of all trained tokens."""

    kl: Tensor
    nll: Tensor  # of the rows' own tokens


class _Head(torch.autograd.Function):
    """sum_n coef (kl_weight KL_n + ce_weight nll_n), rows in chunks: neither model's logits are ever all there. Adds
    the two sums to `sums` [2]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, targets: Tensor,
        coef: Tensor, kl_weight: float, ce_weight: float, sums: Tensor,
    ) -> Tensor:  # fmt: skip
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        part_sums = torch.zeros_like(sums)
        rows = head_chunk_rows(hidden, weight)
        ours, theirs = torch.empty(2, min(rows, len(hidden)), len(weight), device=hidden.device)  # logits stay fp32
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            count = min(rows, len(hidden) - begin)
            logp = linear_out(hidden[part], weight, ours[:count]).log_softmax(-1)
            other = linear_out(teacher_hidden[part], teacher_weight, theirs[:count]).log_softmax(-1)
            p, gap = logp.exp(), logp - other
            # a token that both rule out adds nothing; one that only the teacher rules out is infinitely wrong
            gap = torch.where(p == 0, 0.0, gap)
            kl, chosen, share = (p * gap).sum(-1), targets[part, None], coef[part]
            part_sums += torch.stack([(share * kl).sum(), -(share * logp.gather(1, chosen)[:, 0]).sum()])
            dlogits = p * (kl_weight * (gap - kl[:, None]) + ce_weight)
            dlogits.scatter_add_(1, chosen, torch.full_like(dlogits[:, :1], -ce_weight))
            dlogits = (dlogits * share[:, None]).to(weight.dtype)
            torch.mm(dlogits, weight, out=grad_hidden[part])
            grad_weight.addmm_(dlogits.t(), hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        sums += part_sums
        return kl_weight * part_sums[0] + ce_weight * part_sums[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_loss.to(grad_hidden.dtype)  # in place: the buffers are this node's own
        return grad_hidden.mul_(scale), grad_weight.mul_(scale), *[None] * 7


def distillation_loss(
    student: Policy, teacher: Policy, rollout: Rollout, weight: Tensor, token_budget: int, *, kl_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Distilled:  # fmt: skip
    """Accumulates into the student's gradients those of sum(w (kl_weight KL + ce_weight nll)) / sum(w) over the sampled
    tokens of all rows, and returns both means. weight fp32 [T], more than 0 on sampled tokens. How the rows are cut
    into micro-batches changes rounding only."""
    coef = (weight / weight.double().sum()).float()
    total = torch.zeros(2, device=rollout.device)
    for micro in micro_batches(rollout, torch.arange(rollout.rows, device=rollout.device), token_budget):
        with torch.no_grad():
            read = teacher.model.hidden(micro.ids, micro.starts)[micro.hidden_index]
        hidden = student.model.hidden(micro.ids, micro.starts)[micro.hidden_index]
        loss = _Head.apply(
            hidden, student.model.head_weight, read, teacher.model.head_weight.detach(), micro.targets,
            coef[micro.token_index], kl_weight, ce_weight, total,
        )  # fmt: skip
        loss.backward()
    return Distilled(*total)


def check_pair(student: Policy, teacher: Policy) -> None:
    """UserError where the two do not read the same tokens."""
    ours, theirs = (p.tokenizer.backend.get_vocab() for p in (student, teacher))
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs or sizes[0] != sizes[1]:
        raise UserError(
            f"--teacher {teacher.path}: its tokenizer ({len(theirs)} tokens, {sizes[1]} logits) is not the student's "
            f"({len(ours)} tokens, {sizes[0]} logits); distillation compares logits token by token"
        )
