"""sample_token: the right token for a known uniform, filters against brute force, and samples that no batch changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymathrl.ops.sample_token import SampleToken, philox_uniform, sample_token, sample_token_ref
from pymathrl.ops.token_logprob import TIE, token_logprob
from tests.oracle import assert_accurate

FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.02},
    {"top_k": 100, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
]


def draw_inputs(rows: int, width: int, device: str, scale: float = 4.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(width)
    logits = scale * torch.randn(rows, width, generator=generator)
    uid = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    step = torch.randint(0, 5000, (rows,), generator=generator)
    return logits.to(device), uid.to(device), step.to(device)


def same(a: SampleToken, b: SampleToken) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kw", FILTERS, ids=str)
@pytest.mark.parametrize("width", [1, 48, 129, 1024, 4096, 33000])
def test_against_reference(device: str, width: int, kw: dict[str, float]) -> None:
    logits, uid, step = draw_inputs(8 if width > 4096 else 32, width, "cpu")
    ours = sample_token(logits.to(device), 7, uid.to(device), step.to(device), **kw)
    ref32 = sample_token_ref(logits, 7, uid, step, **kw)
    ref64 = sample_token_ref(logits.double(), 7, uid, step, **kw)
    # u * mass within rounding of a step of the cumulative sum may give the neighbour: 32 rows x 1e-6
    assert torch.equal(ours.ids.cpu(), ref64.ids)
    for name in ("logp", "entropy", "mean_logp", "kept_mass"):
        assert_accurate(getattr(ours, name), getattr(ref32, name), getattr(ref64, name), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kw", FILTERS, ids=str)
def test_half_precision_logits(device: str, dtype: torch.dtype, kw: dict[str, float]) -> None:
    """Ties are everywhere in 16 bits: the cut by index decides."""
    logits, uid, step = draw_inputs(16, 5000, device)
    logits = logits.to(dtype)
    a, b = sample_token(logits, 7, uid, step, **kw), sample_token(logits.float(), 7, uid, step, **kw)
    assert torch.equal(a.ids.cpu(), sample_token_ref(logits.cpu().double(), 7, uid.cpu(), step.cpu(), **kw).ids)
    assert same(a, b)


@pytest.mark.parametrize("width", [48, 128, 1024, 1025, 5000, 33001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_numbers_are_the_trainers(device: str, width: int, dtype: torch.dtype, temperature: float, threads) -> None:
    """The sampler's log-probs equal the update's bit for bit, whatever the batch sizes and threads on either side."""
    logits, uid, step = draw_inputs(65, width, device)
    logits = logits.to(dtype)
    threads(1)
    sampled = sample_token(logits, 3, uid, step, temperature=temperature)
    threads(2)
    for begin, end in ((0, 65), (0, 1), (1, 4), (30, 65)):
        scored = token_logprob(logits[begin:end], sampled.ids[begin:end], temperature=temperature)
        for name in ("logp", "entropy", "mean_logp"):
            assert torch.equal(getattr(scored, name), getattr(sampled, name)[begin:end]), name
    greedy = sample_token(logits, 3, uid, step, temperature=0.0)
    assert torch.equal(greedy.ids, logits.argmax(-1))
    assert torch.equal(greedy.logp, token_logprob(logits, greedy.ids).logp)
    assert (sampled.kept_mass == 1).all()


@pytest.mark.parametrize("kw", [{}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize("width", [48, 3000])
def test_samples_do_not_depend_on_the_batch(device: str, width: int, kw: dict[str, float], threads) -> None:
    logits, uid, step = draw_inputs(130, width, device)
    threads(2)
    whole = sample_token(logits, 11, uid, step, **kw)
    threads(1)
    assert same(whole, sample_token(logits, 11, uid, step, **kw))
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = sample_token(logits[order], 11, uid[order], step[order], **kw)
    assert same(SampleToken(*(x[order] for x in whole)), shuffled)
    for begin, end in ((0, 1), (7, 64)):
        part = sample_token(logits[begin:end], 11, uid[begin:end], step[begin:end], **kw)
        assert same(SampleToken(*(x[begin:end] for x in whole)), part)
    wide = torch.zeros(130, width + 3, device=device)
    wide[:, 3:] = logits
    assert same(whole, sample_token(wide[:, 3:], 11, uid, step, **kw))
    assert not torch.equal(whole.ids, sample_token(logits, 12, uid, step, **kw).ids)
    assert not torch.equal(whole.ids, sample_token(logits, 11, uid, step, stream=1, **kw).ids)


def test_hand_sized(device: str) -> None:
    """p = (.5, .3, .15, .05) under top_p = 0.8 keeps {0, 1}; over all tokens logp would be off by ln 0.8."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], device=device).log().expand(200, 4)
    uid = torch.arange(200, device=device)
    r = sample_token(logits, 0, uid, torch.zeros_like(uid), top_p=0.8)
    ids = r.ids.cpu()
    assert set(ids.tolist()) == {0, 1}
    expected = torch.tensor([math.log(0.5 / 0.8), math.log(0.3 / 0.8)])[ids]
    torch.testing.assert_close(r.logp.cpu(), expected, atol=1e-6, rtol=0)
    assert abs(float(r.logp[ids == 0][0]) + 0.470004) < 1e-6
    torch.testing.assert_close(r.kept_mass.cpu(), torch.full((200,), 0.8))
    u = philox_uniform(0, uid.cpu(), torch.zeros(200, dtype=torch.int64))
    assert torch.equal(ids, (u * 0.8 >= 0.5).long())


@pytest.mark.parametrize("kw", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.75}, {"min_p": 0.3}], ids=str)
def test_frequencies(device: str, kw: dict[str, float]) -> None:
    n = 20000
    p = torch.tensor([0.1, 0.3, 0.05, 0.25, 0.2, 0.1], dtype=torch.float64)
    uid = torch.arange(n, device=device)
    r = sample_token(p.log().float().expand(n, 6).to(device), 5, uid, uid % 7, **kw)
    tempered = p ** (1 / kw.get("temperature", 1.0))
    order = torch.argsort(tempered, descending=True, stable=True)
    ranked = tempered[order] / tempered.sum()
    keep = torch.ones(6, dtype=torch.bool)
    keep[kw.get("top_k", 6) :] = False
    keep &= ranked.cumsum(0) - ranked < kw.get("top_p", 1.0) - 1e-9
    keep &= ranked >= kw.get("min_p", 0.0) * ranked[0]
    expected = torch.zeros(6, dtype=torch.float64).scatter(0, order, ranked * keep)
    expected = n * expected / expected.sum()
    counts = torch.bincount(r.ids.cpu(), minlength=6)
    assert (counts[expected == 0] == 0).all()
    inside = expected > 0
    chi2 = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    assert chi2 < 26, chi2  # 5 degrees of freedom: 26 is passed once in 10,000 fair seeds


def test_masked_tokens_are_never_drawn(device: str) -> None:
    """Also where the uniform is as near to 0 and to 1 as 24 bits allow."""
    uid = torch.tensor([1224113, 22978087, 5150801, 8966016], device=device)  # u = 2^-25 twice, 1 - 2^-25 twice
    step = torch.zeros_like(uid)
    assert philox_uniform(0, uid.cpu(), step.cpu()).tolist() == [2.0**-25] * 2 + [1 - 2.0**-25] * 2
    for width in (40, 1200, 4096):
        logits = torch.full((4, width), -math.inf, device=device)
        allowed = [3, 17, width - 9]
        logits[:, allowed] = torch.tensor([0.0, -80.0, 1.0], device=device)
        for kw in ({}, {"top_p": 0.999}, {"top_k": 30}, {"min_p": 1e-3}):
            ids = sample_token(logits, 0, uid, step, **kw).ids
            assert ids.tolist() == [3, 3, width - 9, width - 9], (width, kw)


def test_ties(device: str) -> None:
    uid = torch.arange(500, device=device)
    step = torch.zeros_like(uid)
    for width in (10, 2000):
        equal = torch.zeros(500, width, device=device)
        assert set(sample_token(equal, 1, uid, step, top_k=3).ids.tolist()) == {0, 1, 2}
        assert set(sample_token(equal, 1, uid, step, top_p=2.5 / width).ids.tolist()) == {0, 1, 2}
        assert set(sample_token(equal, 1, uid, step, top_p=3 / width).ids.tolist()) == {0, 1, 2}
        assert set(sample_token(equal, 1, uid, step, top_p=0.0).ids.tolist()) == {0}
        assert set(sample_token(equal, 1, uid, step, temperature=0.0).ids.tolist()) == {0}
        assert (sample_token(equal, 1, uid, step, min_p=1.0).kept_mass == 1).all()
        equal[:, 0] = -0.0  # equal to +0 in every order
        assert set(sample_token(equal, 1, uid, step, top_k=3).ids.tolist()) == {0, 1, 2}
        both = sample_token(equal, 1, uid, step, top_k=4, top_p=0.5)
        assert set(both.ids.tolist()) == {0, 1}
        torch.testing.assert_close(both.logp.cpu(), torch.full((500,), math.log(0.5)))


@pytest.mark.parametrize("row", [[math.nan, 0.0, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
@pytest.mark.parametrize("kw", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5, "min_p": 0.1}], ids=str)
def test_rows_without_a_distribution(device: str, row: list[float], kw: dict[str, float]) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0]], device=device)
    uid = torch.arange(2, device=device)
    r = sample_token(logits, 0, uid, uid, **kw)
    assert r.ids[0] == -1 and 0 <= r.ids[1] < 3
    for value in r[1:]:
        assert torch.isnan(value[0]) and torch.isfinite(value[1])
    reference = sample_token_ref(logits, 0, uid, uid, **kw)
    assert torch.equal(r.ids, reference.ids)


def brute_force(z: list[float], u: float, top_k: int, top_p: float, min_p: float) -> tuple[set[int], float, set[int]]:
    """The kept set, its mass, and the tokens that u may give (two where rounding decides), in python floats."""
    e = [math.exp(x - max(z)) for x in z]
    order = sorted(range(len(z)), key=lambda j: (-z[j], j))
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        mass, total, kept = 0.0, sum(e[j] for j in order), []
        for j in order:
            if kept and mass >= top_p * total * (1 - TIE):
                break
            kept.append(j)
            mass += e[j]
        order = kept
    order = [j for j in order if e[j] >= min_p * (1 - TIE)]
    kept = set(order)
    mass, target, acc, possible = sum(e[j] for j in kept), u * sum(e[j] for j in kept), 0.0, set()
    for j in sorted(kept):
        if acc - 1e-6 * mass <= target < acc + e[j] + 1e-6 * mass:
            possible.add(j)
        acc += e[j]
    return kept, mass / sum(e), possible


@settings(max_examples=300, deadline=None)
@given(
    z=st.lists(st.integers(-12, 4), min_size=1, max_size=40),
    uid=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.77, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_filters_against_brute_force(z: list[int], uid: int, step: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.tensor([z]) / 2.0  # halves of integers: equal logits are common
    where = torch.tensor([uid]), torch.tensor([step])
    u = float(philox_uniform(4, *where))
    kept, mass, possible = brute_force(logits[0].tolist(), u, top_k, top_p, min_p)
    r = sample_token(logits, 4, *where, top_k=top_k, top_p=top_p, min_p=min_p)
    assert abs(float(r.kept_mass) - mass) < 1e-6
    assert int(r.ids) in possible
    e = math.exp(logits[0, int(r.ids)] - logits.max())
    total = sum(math.exp(x - logits.max()) for x in logits[0, sorted(kept)].tolist())
    assert abs(float(r.logp) - math.log(e / total)) < 2e-6


def test_filters_against_transformers() -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits, uid, step = draw_inputs(64, 1500, "cpu")
    for top_k, top_p, min_p in ((50, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (200, 0.95, 0.01)):
        scores = logits.double()
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        if min_p:
            scores = MinPLogitsWarper(min_p)(None, scores)
        r = sample_token(logits, 2, uid, step, top_k=top_k, top_p=top_p, min_p=min_p)
        kept_mass = (logits.double().softmax(-1) * (scores > -math.inf)).sum(-1)
        torch.testing.assert_close(r.kept_mass.double(), kept_mass, atol=1e-6, rtol=0)
        expected = scores.log_softmax(-1).gather(1, r.ids[:, None])[:, 0]
        torch.testing.assert_close(r.logp.double(), expected, atol=2e-6, rtol=0)


def test_strided_and_empty(device: str) -> None:
    logits, uid, step = draw_inputs(6, 100, device)
    assert same(
        sample_token(logits[::2], 1, uid[:3], step[:3]), sample_token(logits[::2].clone(), 1, uid[:3], step[:3])
    )
    empty = sample_token(logits[:0], 1, uid[:0], step[:0])
    assert empty.ids.shape == (0,) and empty.ids.dtype == torch.int64


def test_bad_arguments() -> None:
    z, uid = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    cases = [
        (lambda: sample_token(z[0], 0, uid, uid), r"logits must be \[B,V\], got \[4\]"),
        (lambda: sample_token(z.double(), 0, uid, uid), "float32, bfloat16 or float16, got float64"),
        (lambda: sample_token(z, 0, uid[:1], uid), r"uid must have shape \[2\], got \[1\]"),
        (lambda: sample_token(z, 0, uid, uid.int()), "step must be int64, got int32"),
        (lambda: sample_token(z, 0, uid, uid, temperature=-1.0), "temperature must be 0"),
        (lambda: sample_token(z, 0, uid, uid, temperature=math.nan), "temperature must be 0"),
        (lambda: sample_token(z, 0, uid, uid, top_k=-1), "top_k >= 0"),
        (lambda: sample_token(z, 0, uid, uid, top_p=1.1), r"top_p, min_p in \[0, 1\]"),
        (lambda: sample_token(z, 0, uid, uid, min_p=-0.1), r"top_p, min_p in \[0, 1\]"),
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
    expected = sample_token(logits, 1, uid, step, top_p=0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample_token(logits, 1, uid, step, top_p=0.9)
    graph.replay()
    assert same(captured, expected)
