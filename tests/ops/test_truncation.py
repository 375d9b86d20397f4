"""Truncated sampling accounted for: the update on masked logits gives the sampler's numbers bit for bit, and the
gradient of the distribution that the token was drawn from."""

from __future__ import annotations

import math

import pytest
import torch

from pymathrl.ops.sample_token import (
    SampleToken,
    sample_token,
    sample_token_ref,
    support_bytes,
    support_pack_ref,
    support_unpack,
)
from pymathrl.ops.token_logprob import (
    token_logprob,
    token_logprob_backward_,
    token_logprob_backward_ref,
    token_logprob_ref,
)
from tests.oracle import assert_accurate, support_mask_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (5, 48, 1000, 4111)
FILTERS = [
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 40},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 4000},  # most of 4111 tokens, many of them with e^d = 0 at a low temperature
    {},
]
NUMBERS = ("logp", "entropy", "mean_logp")


def draw_inputs(rows: int, width: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    logits = 5 * torch.randn(rows, width, generator=generator)
    return logits.to(device), torch.arange(rows).to(device), torch.arange(rows).to(device)


def sampled(logits: torch.Tensor, uid: torch.Tensor, step: torch.Tensor, **kw) -> tuple[SampleToken, torch.Tensor]:
    """The draw and its support, in memory that was not zero before."""
    rows, width = logits.shape
    support = torch.full((rows, support_bytes(width)), 0xA5, dtype=torch.uint8, device=logits.device)
    return sample_token(logits, 7, uid, step, support=support, **kw), support


def test_hand_sized(device: str) -> None:
    """p = (.5, .3, .15, .05) under top_p = .8 keeps {0, 1}: bits 0 and 1 of the byte."""
    rows = 50
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(rows, 1).to(device)
    uid = torch.arange(rows).to(device)
    draw, support = sampled(logits, uid, uid, top_p=0.8)
    assert support.tolist() == [[0b11]] * rows
    at = int((draw.ids == 0).nonzero()[0])
    assert abs(float(draw.logp[at]) + 0.470004) < 1e-6
    entropy = -(0.625 * math.log(0.625) + 0.375 * math.log(0.375))
    mean = (math.log(0.625) + math.log(0.375)) / 2
    assert abs(float(draw.entropy[at]) - entropy) < 1e-6
    assert abs(float(draw.mean_logp[at]) - mean) < 1e-6
    naive = (token_logprob(logits, draw.ids).logp - draw.logp).exp()
    torch.testing.assert_close(naive.cpu(), torch.full((rows,), 0.8), atol=1e-6, rtol=0)
    masked = support_mask_(logits, support)
    assert masked.data_ptr() == logits.data_ptr()
    assert masked[0].isinf().tolist() == [False, False, True, True]
    assert ((token_logprob(masked, draw.ids).logp - draw.logp).exp() == 1.0).all()
    z = masked[:1].clone().requires_grad_()
    token_logprob(z, draw.ids[at : at + 1]).logp.sum().backward()
    torch.testing.assert_close(z.grad.cpu(), torch.tensor([[0.375, -0.375, 0.0, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kw", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7, 0.02])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_update_gives_the_samplers_numbers(
    device: str, width: int, temperature: float, kw: dict[str, float], threads
) -> None:
    logits, uid, step = draw_inputs(33, width, device)
    logits[3, : width // 2] = -math.inf  # a mask of the caller's own
    for dtype in DTYPES:
        z = logits.to(dtype)
        threads(1)
        draw, support = sampled(z, uid, step, temperature=temperature, **kw)
        threads(2)
        masked = support_mask_(z.clone(), support)
        for begin, end in ((0, 33), (3, 4), (20, 33)):
            scored = token_logprob(masked[begin:end], draw.ids[begin:end], temperature=temperature)
            for name in NUMBERS:
                ours, theirs = getattr(scored, name), getattr(draw, name)[begin:end]
                assert torch.equal(ours, theirs), (dtype, name, (ours - theirs).abs().max())
                assert torch.isfinite(ours).all(), name


@pytest.mark.parametrize("kw", FILTERS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_support_against_reference(device: str, width: int, kw: dict[str, float]) -> None:
    logits, uid, step = draw_inputs(16, width)
    logits[3, 1:3] = -math.inf
    draw, support = sampled(logits.to(device), uid.to(device), step.to(device), **kw)
    expected = torch.zeros(16, support_bytes(width), dtype=torch.uint8)
    ref64 = sample_token_ref(logits.double(), 7, uid, step, support=expected, **kw)
    ref32 = sample_token_ref(logits, 7, uid, step, **kw)
    assert torch.equal(support.cpu(), expected)
    for name in (*NUMBERS, "kept_mass"):
        assert_accurate(getattr(draw, name), getattr(ref32, name), getattr(ref64, name), name)
    kept = support_unpack(expected, width)
    assert kept.gather(1, draw.ids.cpu()[:, None]).all()
    assert torch.equal(support_pack_ref(kept), expected)
    assert (kept.sum(1) <= kw.get("top_k", width)).all()


@pytest.mark.parametrize("kw", FILTERS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_asking_for_the_support_changes_nothing(device: str, width: int, kw: dict[str, float]) -> None:
    logits, uid, step = draw_inputs(16, width, device)
    for dtype in DTYPES:
        for temperature in (0.0, 0.6):
            plain = sample_token(logits.to(dtype), 7, uid, step, temperature=temperature, **kw)
            draw, support = sampled(logits.to(dtype), uid, step, temperature=temperature, **kw)
            assert all(torch.equal(x, y) for x, y in zip(plain, draw, strict=True))
            if temperature == 0.0:
                assert support_unpack(support, width).all()  # greedy: the filters have no effect


@pytest.mark.parametrize("kw", FILTERS[:-1], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradient_is_that_of_the_renormalised_distribution(device: str, width: int, kw: dict[str, float]) -> None:
    temperature = 0.7
    logits, uid, step = draw_inputs(16, width)
    draw, support = sampled(logits, uid, step, temperature=temperature, **kw)
    kept = support_unpack(support, width)
    generator = torch.Generator().manual_seed(1)
    weight, h = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    for entropy_weight in (None, h):
        expected = []
        for dtype in (torch.float32, torch.float64):  # log-softmax over the kept tokens alone, row by row
            z = logits.to(dtype, copy=True).requires_grad_()
            loss = torch.zeros((), dtype=dtype)
            for row in range(16):
                logp = torch.log_softmax(z[row][kept[row]] / temperature, -1)
                at = int(kept[row, : draw.ids[row]].sum())
                loss = loss + weight[row] * logp[at]
                if entropy_weight is not None:
                    loss = loss - entropy_weight[row] * (logp.exp() * logp).sum()
            loss.backward()
            expected.append(z.grad)
        masked = support_mask_(logits.to(device), support.to(device))
        z = masked.clone().requires_grad_()
        scored = token_logprob(z, draw.ids.to(device), temperature=temperature)
        loss = (scored.logp * weight.to(device)).sum()
        if entropy_weight is not None:
            loss = loss + (scored.entropy * entropy_weight.to(device)).sum()
        loss.backward()
        if kw.get("top_k") == 1:  # one token: nothing to learn, in exact zeros
            assert (z.grad == 0).all()
        else:
            assert_accurate(z.grad, *expected, f"dlogits, entropy gradient {entropy_weight is not None}")
        assert (z.grad.cpu()[~kept] == 0).all()
        in_place = token_logprob_backward_(
            masked, draw.ids.to(device), scored.lse, scored.entropy, weight.to(device),
            None if entropy_weight is None else h.to(device), temperature,
        )  # fmt: skip
        assert torch.equal(in_place, z.grad)


def test_token_outside_the_support(device: str) -> None:
    """Its logit is a constant of the mask: log-prob -inf, gradient 0 there and elsewhere never nan."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).to(device)
    masked = support_mask_(logits, torch.tensor([[0b1100]], dtype=torch.uint8).to(device))
    ids, one = torch.zeros(1, dtype=torch.int64).to(device), torch.ones(1).to(device)
    scored = token_logprob(masked, ids)
    assert scored.logp.item() == -math.inf
    reference = token_logprob_backward_ref(masked, ids, scored.lse, scored.entropy, one, one)
    dz = token_logprob_backward_(masked, ids, scored.lse, scored.entropy, one, one)
    torch.testing.assert_close(dz, reference)
    assert torch.isfinite(dz).all() and (dz[0, :2] == 0).all()


@pytest.mark.parametrize("row", [[math.nan, 0.0, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
@pytest.mark.parametrize("kw", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_rows_without_a_distribution(device: str, row: list[float], kw: dict[str, float]) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0]]).to(device)
    uid = torch.arange(2).to(device)
    draw, support = sampled(logits, uid, uid, **kw)
    assert support[0].tolist() == [0] and support[1] != 0
    assert draw.ids[0] == -1 and draw.logp[0].isnan()
    assert token_logprob(support_mask_(logits, support), draw.ids.clamp(min=0)).logp.isnan().tolist() == [True, False]


def test_mean_counts_the_support_only(device: str) -> None:
    logits, ids = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)), torch.full((4,), 5)
    masked = logits.clone()
    masked[:, 100:2900] = -math.inf
    expected = token_logprob_ref(torch.cat([logits[:, :100], logits[:, 2900:]], 1).double(), ids)
    ours = token_logprob(masked.to(device), ids.to(device))
    for name in NUMBERS:
        torch.testing.assert_close(getattr(ours, name).cpu().double(), getattr(expected, name), atol=1e-6, rtol=1e-6)


def test_no_rows(device: str) -> None:
    empty = torch.empty(0, 16).to(device)
    support = torch.empty(0, 2, dtype=torch.uint8).to(device)
    uid = torch.empty(0, dtype=torch.int64).to(device)
    assert sample_token(empty, 0, uid, uid, top_k=2, support=support).ids.shape == (0,)
    assert support_mask_(empty, support).shape == (0, 16)


def test_bad_arguments() -> None:
    z, uid = torch.zeros(2, 12), torch.zeros(2, dtype=torch.int64)
    support = torch.zeros(2, 2, dtype=torch.uint8)
    cases = [
        (lambda: sample_token(z, 0, uid, uid, support=support[:1]), r"support must have shape \[2, 2\], got \[1, 2\]"),
        (lambda: sample_token(z, 0, uid, uid, support=support.int()), "support must be uint8 or bool, got int32"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
def test_cuda_graph() -> None:
    from tests.gpu import cuda_skip_reason

    if reason := cuda_skip_reason():
        pytest.skip(reason)
    logits, uid, step = draw_inputs(16, 33000, "cuda")
    expected, expected_support = sampled(logits, uid, step, top_p=0.9)
    support, work = torch.zeros_like(expected_support), logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample_token(work, 7, uid, step, top_p=0.9, support=support)
        support_mask_(work, support)
        scored = token_logprob(work, captured.ids)
    work.copy_(logits)
    graph.replay()
    assert torch.equal(support, expected_support)
    for name in NUMBERS:
        assert torch.equal(getattr(captured, name), getattr(expected, name))
        assert torch.equal(getattr(scored, name), getattr(expected, name))
