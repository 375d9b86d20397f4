"""token_logprob against float64, paper-sized cases, invariants, and results that must be refused."""

from __future__ import annotations

import math

import pytest
import torch

from pymathrl.ops.token_logprob import (
    PROXY_FLOOR,
    TokenLogprob,
    token_logprob,
    token_logprob_backward_,
    token_logprob_backward_ref,
    token_logprob_ref,
)
from tests.oracle import accepts, assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("logp", "entropy")
LOGITS = [[2.0, 1.0, 0.0, -1.0], [0.5, 1.5, -0.5, 0.0], [1.0, 1.0, 1.0, -2.0]]


def peaked(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where decisions are (median top probability about 0.5), tokens drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, width, generator=generator)
    ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits, ids


def gradients(
    op, logits: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, entropy_weight: torch.Tensor | None, **kw
) -> torch.Tensor:
    z = logits.clone().requires_grad_()
    result = op(z, ids, **kw)
    loss = (result.logp * weight.to(result.logp.dtype)).sum()
    if entropy_weight is not None:
        loss = loss + (result.entropy * entropy_weight.to(result.logp.dtype)).sum()
    loss.backward()
    return z.grad


def test_hand_sized(device: str) -> None:
    r = token_logprob(torch.tensor(LOGITS, device=device), torch.tensor([0, 1, 2], device=device))
    expected = {
        "logp": [-0.440190, -0.546006, -1.115072],
        "mean_logp": [-1.940190, -1.671006, -1.865072],
        "entropy": [0.947537, 1.109767, 1.164046],
    }
    for name, numbers in expected.items():
        torch.testing.assert_close(getattr(r, name).cpu(), torch.tensor(numbers), atol=1e-6, rtol=0)
    cooler = token_logprob(torch.tensor(LOGITS, device=device), torch.tensor([0, 1, 2], device=device), temperature=0.6)
    torch.testing.assert_close(cooler.logp.cpu(), torch.tensor([-0.208060, -0.267455, -1.100856]), atol=1e-6, rtol=0)


def test_hand_sized_gradients(device: str) -> None:
    logits, ids = torch.tensor(LOGITS, device=device), torch.tensor([0, 1, 2], device=device)
    weight = torch.tensor([-0.091068, 0.050575, -0.404289], device=device)
    dz = gradients(token_logprob, logits, ids, weight, None).cpu()
    torch.testing.assert_close(dz[0], torch.tensor([-0.032428, 0.021573, 0.007936, 0.002920]), atol=1e-6, rtol=0)
    torch.testing.assert_close(dz[2], torch.tensor([0.132563, 0.132563, -0.271726, 0.006600]), atol=1e-6, rtol=0)
    z = logits[:1].clone().requires_grad_()
    token_logprob(z, ids[:1]).entropy.sum().backward()
    expected = torch.tensor([[-0.326688, 0.116701, 0.130076, 0.079911]])
    torch.testing.assert_close(z.grad.cpu(), expected, atol=1e-6, rtol=0)


def test_hand_sized_proxy(device: str) -> None:
    p = torch.tensor([[0.60, 0.30, 0.08, 0.012, 0.008]], device=device)
    logits, ids = p.log().expand(5, 5), torch.arange(5, device=device)
    proxy = token_logprob(logits, ids, min_p=0.02).proxy_logp.cpu()
    torch.testing.assert_close(
        proxy[:4].exp(), torch.tensor([0.604839, 0.302419, 0.080645, 0.012097]), atol=1e-6, rtol=0
    )
    assert proxy[4] == PROXY_FLOOR
    full = token_logprob(logits, ids, min_p=0.0)
    torch.testing.assert_close(full.proxy_logp, full.logp)
    assert token_logprob(logits, ids).proxy_logp is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("width", [1, 17, 1000, 4096])
def test_accuracy(device: str, width: int, temperature: float, dtype: torch.dtype) -> None:
    logits, ids = peaked(16, width)
    logits = logits.to(dtype)
    kw = {"temperature": temperature, "min_p": 0.02}
    ours = token_logprob(logits.to(device), ids.to(device), **kw)
    ref32, ref64 = token_logprob_ref(logits.float(), ids, **kw), token_logprob_ref(logits.double(), ids, **kw)
    for name in TokenLogprob._fields:
        assert_accurate(getattr(ours, name), getattr(ref32, name), getattr(ref64, name), name)
    generator = torch.Generator().manual_seed(1)
    weight, entropy_weight = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    for h in (None, entropy_weight):
        h_device = None if h is None else h.to(device)
        dz = gradients(token_logprob, logits.to(device), ids.to(device), weight.to(device), h_device, **kw)
        assert dz.dtype == dtype
        dz32 = gradients(token_logprob_ref, logits.float(), ids, weight, h, **kw).to(dtype)
        dz64 = gradients(token_logprob_ref, logits.double(), ids, weight.double(), h, **kw)
        assert_accurate(dz, dz32, dz64, f"dlogits, entropy gradient {h is not None}")


def test_wrong_values_are_refused() -> None:
    logits, ids = peaked(64, 4096)
    z = logits.double()
    ref64, ref32 = token_logprob_ref(z, ids, temperature=0.6), token_logprob_ref(logits, ids, temperature=0.6)
    mutants = {
        "temperature ignored": token_logprob_ref(z, ids).logp,
        "temperature off by 1e-3": token_logprob_ref(z, ids, temperature=0.6006).logp,
        "target shifted": token_logprob_ref(z, ids.roll(1), temperature=0.6).logp,
        "unnormalised": z.gather(1, ids[:, None])[:, 0] / 0.6 - z.amax(-1) / 0.6,
    }
    for name, logp in mutants.items():
        assert not accepts(logp.float(), ref32.logp, ref64.logp), name
    assert not accepts(-ref64.entropy.float(), ref32.entropy, ref64.entropy), "entropy sign"
    assert not accepts((ref64.entropy / math.log(2)).float(), ref32.entropy, ref64.entropy), "entropy in bits"
    assert not accepts((ref64.mean_logp + 1e-4).float(), ref32.mean_logp, ref64.mean_logp), "mean off by 1e-4"
    assert accepts(ref64.logp.float(), ref32.logp, ref64.logp), "the right answer"


def test_wrong_gradients_are_refused() -> None:
    logits, ids = peaked(64, 4096)
    generator = torch.Generator().manual_seed(1)
    g, h = torch.randn(64, generator=generator), torch.randn(64, generator=generator)
    ref64 = gradients(token_logprob_ref, logits.double(), ids, g, h, temperature=0.6)
    ref32 = gradients(token_logprob_ref, logits, ids, g, h, temperature=0.6)
    logp = torch.log_softmax(logits.double() / 0.6, -1)
    p, entropy = logp.exp(), token_logprob_ref(logits.double(), ids, temperature=0.6).entropy[:, None]
    own = torch.zeros_like(p).scatter_(1, ids[:, None], 1.0)
    shifted = torch.zeros_like(p).scatter_(1, ids.roll(1)[:, None], 1.0)
    g, h = g.double()[:, None], h.double()[:, None]
    right = (g * (own - p) - h * p * (logp + entropy)) / 0.6
    mutants = {
        "softmax term dropped": (g * own - h * p * (logp + entropy)) / 0.6,
        "no 1/T": right * 0.6,
        "target shifted": (g * (shifted - p) - h * p * (logp + entropy)) / 0.6,
        "entropy sign": (g * (own - p) + h * p * (logp + entropy)) / 0.6,
        "entropy without H": (g * (own - p) - h * p * logp) / 0.6,
        "entropy dropped": g * (own - p) / 0.6,
    }
    assert accepts(right.float(), ref32, ref64)
    for name, dz in mutants.items():
        assert not accepts(dz.float(), ref32, ref64), name


def test_gradient_rows_sum_to_zero(device: str) -> None:
    logits, ids = peaked(64, 4096)
    generator = torch.Generator().manual_seed(1)
    weight, h = torch.randn(64, generator=generator).to(device), torch.randn(64, generator=generator).to(device)
    dz = gradients(token_logprob, logits.to(device), ids.to(device), weight, h)
    assert dz.double().sum(-1).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place(device: str, dtype: torch.dtype) -> None:
    logits, ids = peaked(16, 1003)
    logits, ids = logits.to(device, dtype), ids.to(device)
    forward = token_logprob(logits, ids, temperature=0.8)
    generator = torch.Generator().manual_seed(1)
    weight, h = torch.randn(16, generator=generator).to(device), torch.randn(16, generator=generator).to(device)
    expected = gradients(token_logprob, logits, ids, weight, h, temperature=0.8)
    work = torch.full((16, 1024), 7.0, dtype=dtype, device=device)
    work[:, :1003] = logits
    view = work[:, :1003]  # rows apart in memory: the padding must survive
    out = token_logprob_backward_(view, ids, forward.lse, forward.entropy, weight, h, 0.8)
    assert out.data_ptr() == work.data_ptr()
    assert torch.equal(view, expected)
    assert (work[:, 1003:] == 7.0).all()
    reference = token_logprob_backward_ref(logits, ids, forward.lse, forward.entropy, weight, h, 0.8)
    torch.testing.assert_close(view, reference, atol=1e-6, rtol=1e-2 if dtype != torch.float32 else 1e-5)
    only_h = token_logprob_backward_(logits.clone(), ids, forward.lse, forward.entropy, None, h, 0.8)
    z = logits.clone().requires_grad_()
    (token_logprob(z, ids, temperature=0.8).entropy * h).sum().backward()
    assert torch.equal(only_h, z.grad)


def test_masked_rows_are_exact_zeros(device: str) -> None:
    logits, ids = peaked(4, 300)
    logits[1], logits[2, 5] = math.nan, math.inf
    logits, ids = logits.to(device), ids.to(device)
    forward = token_logprob(logits, ids)
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)
    dz = token_logprob_backward_(logits, ids, forward.lse, forward.entropy, weight, torch.zeros_like(weight))
    assert (dz[1:] == 0).all()
    assert dz[0].abs().max() > 0


def test_masked_vocabulary(device: str) -> None:
    logits, ids = peaked(8, 512)
    logits[:, 100:400] = -math.inf
    ids = torch.full((8,), 3)
    short = torch.cat([logits[:, :100], logits[:, 400:]], 1).double()
    ours = token_logprob(logits.to(device), ids.to(device))
    expected = token_logprob_ref(short, ids)
    for name in ("logp", "entropy", "mean_logp", "top_prob", "lse"):
        torch.testing.assert_close(getattr(ours, name).cpu().double(), getattr(expected, name), atol=1e-6, rtol=1e-6)
    weight = torch.ones(8, device=device)
    dz = gradients(token_logprob, logits.to(device), ids.to(device), weight, weight)
    assert torch.isfinite(dz).all()
    assert (dz[:, 100:400] == 0).all()
    masked = token_logprob(logits.to(device), torch.full((8,), 200, device=device), min_p=0.0)
    assert (masked.logp == -math.inf).all()
    assert (masked.proxy_logp == PROXY_FLOOR).all()


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e38])
def test_large_logits(device: str, offset: float) -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0]]) + (0.0 if offset == 3e38 else offset)
    if offset == 3e38:
        logits = torch.tensor([[3e38, 0.0, -1e4]])
    r = token_logprob(logits.to(device), torch.tensor([0], device=device))
    expected = token_logprob_ref(logits.double(), torch.tensor([0]))
    torch.testing.assert_close(r.logp.cpu().double(), expected.logp, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(r.entropy.cpu().double(), expected.entropy, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("row", [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3])
def test_rows_without_a_distribution(device: str, row: list[float]) -> None:
    r = token_logprob(torch.tensor([row, [0.0, 1.0, 2.0]], device=device), torch.tensor([1, 1], device=device))
    for name in ("logp", "entropy", "mean_logp", "top_prob", "lse"):
        value = getattr(r, name)
        assert torch.isnan(value[0]), name
        assert torch.isfinite(value[1]), name


@pytest.mark.parametrize("width", [48, 128, 1024, 1025, 5000, 33001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_batch(device: str, width: int, dtype: torch.dtype, threads) -> None:
    logits, ids = peaked(65, width)
    logits, ids = logits.to(device, dtype), ids.to(device)
    threads(2)
    whole = token_logprob(logits, ids, min_p=0.05)
    weight = torch.ones(65, device=device)
    dz = gradients(token_logprob, logits, ids, weight, weight)
    threads(1)
    for begin, end in ((0, 1), (3, 10), (1, 65)):
        part = token_logprob(logits[begin:end], ids[begin:end], min_p=0.05)
        for name, value in part._asdict().items():
            assert torch.equal(value, getattr(whole, name)[begin:end]), name
        ones = weight[begin:end]
        assert torch.equal(gradients(token_logprob, logits[begin:end], ids[begin:end], ones, ones), dz[begin:end])


def test_alignment_changes_nothing(device: str) -> None:
    logits, ids = peaked(8, 2050)
    logits, ids = logits.to(device), ids.to(device)
    wide = torch.zeros(8, 2053, device=device)
    wide[:, 3:] = logits
    a, b = token_logprob(logits, ids, min_p=0.1), token_logprob(wide[:, 3:], ids, min_p=0.1)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradient_contract(device: str) -> None:
    logits, ids = peaked(4, 64)
    z = logits.clone().to(device).requires_grad_()
    r = token_logprob(z, ids.to(device), min_p=0.1)
    assert [name for name, value in r._asdict().items() if value.requires_grad] == list(DIFFERENTIABLE)
    (r.logp.sum() * 2).backward()  # the gradient of sum() is an expanded scalar
    expected = gradients(token_logprob, logits.to(device), ids.to(device), torch.full((4,), 2.0, device=device), None)
    assert torch.equal(z.grad, expected)
    with torch.no_grad():
        assert not token_logprob(z, ids.to(device)).logp.requires_grad


def test_no_rows(device: str) -> None:
    z = torch.empty(0, 16, device=device, requires_grad=True)
    r = token_logprob(z, torch.empty(0, dtype=torch.int64, device=device))
    assert r.logp.shape == (0,)
    r.logp.sum().backward()
    assert z.grad.shape == (0, 16)


def test_reference_backward_is_autograd_of_the_reference() -> None:
    logits, ids = peaked(16, 200)
    logits = logits.double()
    r = token_logprob_ref(logits, ids, temperature=0.7)
    generator = torch.Generator().manual_seed(1)
    g, h = torch.randn(16, generator=generator).double(), torch.randn(16, generator=generator).double()
    auto = gradients(token_logprob_ref, logits, ids, g, h, temperature=0.7)
    torch.testing.assert_close(token_logprob_backward_ref(logits, ids, r.lse, r.entropy, g, h, 0.7), auto)


def test_bad_arguments() -> None:
    z, ids = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    cases = [
        (lambda: token_logprob(z, torch.tensor([0, 4])), r"ids must be in \[0, V=4\), got 4 in row 1"),
        (lambda: token_logprob(z, torch.tensor([-100, 0])), "got -100 in row 0"),
        (lambda: token_logprob(z, ids[:1]), r"logits must be \[N,V\] and ids \[N\], got \[2, 4\] and \[1\]"),
        (lambda: token_logprob(z[0], ids), r"logits must be \[N,V\]"),
        (lambda: token_logprob(z.double(), ids), "float32, bfloat16 or float16, got float64"),
        (lambda: token_logprob(z, ids.int()), "ids must be int64, got int32"),
        (lambda: token_logprob(z.T.contiguous().T, ids), "rows of logits must be contiguous"),
        (lambda: token_logprob(z, ids, temperature=0.0), "temperature must be a positive number, got 0.0"),
        (lambda: token_logprob(z, ids, temperature=math.nan), "temperature must be a positive number"),
        (lambda: token_logprob(z, ids, min_p=1.5), r"min_p must be in \[0, 1\], got 1.5"),
        (
            lambda: token_logprob_backward_(z[:1].expand(2, 4), ids, z[:, 0].double(), None, z[:, 0].clone(), None),
            "rows of logits overlap",
        ),
        (
            lambda: token_logprob_backward_(z, ids, z[:, 0].double(), None, None, torch.zeros(2)),
            "grad_entropy needs the forward's entropy",
        ),
        (lambda: token_logprob_backward_(z, ids, torch.zeros(2), None, torch.zeros(2), None), "lse must be float64"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
def test_cuda_ids_out_of_range() -> None:
    from tests.gpu import cuda_skip_reason

    if reason := cuda_skip_reason():
        pytest.skip(reason)
    z, ids = torch.zeros(3, 4096, device="cuda"), torch.tensor([0, 4096, -1], device="cuda")
    r = token_logprob(z, ids)
    assert torch.isnan(r.logp).tolist() == [False, True, True]
    dz = token_logprob_backward_(z, ids, r.lse, None, torch.ones_like(r.logp), None)
    assert torch.isnan(dz).any(1).tolist() == [False, True, True]


@pytest.mark.gpu
def test_cuda_graph() -> None:
    from tests.gpu import cuda_skip_reason

    if reason := cuda_skip_reason():
        pytest.skip(reason)
    logits, ids = (t.cuda() for t in peaked(8, 4096))
    expected = token_logprob(logits, ids)
    gradient = token_logprob_backward_(logits.clone(), ids, expected.lse, None, torch.ones_like(expected.logp), None)
    work, ones = logits.clone(), torch.ones_like(expected.logp)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_logprob(work, ids)
        token_logprob_backward_(work, ids, captured.lse, None, ones, None)
    for _ in range(2):
        work.copy_(logits)
        graph.replay()
        assert torch.equal(captured.logp, expected.logp)
        assert torch.equal(work, gradient)
