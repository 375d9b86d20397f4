"""soft_embed against float64, the case worked by hand, invariants, bits of a row, and results that must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pymathrl.ops._call import _C, use_reference
from pymathrl.ops.sample_token import philox_uniform_ref
from pymathrl.ops.soft_embed import (
    SoftEmbed,
    SoftOut,
    soft_embed,
    soft_embed_backward,
    soft_embed_ref,
    soft_noise_ref,
)
from tests.oracle import accepts, assert_accurate

TABLE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
SIGMA = 0.33 * 0.816497  # 0.33 of the table's root mean square


def case(rows: int, width: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits where decisions are, a table, and inputs about two sigma of 0.3 off the mean."""
    g = torch.Generator().manual_seed(1000 * seed + 10 * width + columns)
    logits = 5 * torch.randn(rows, width, generator=g)
    table = torch.randn(width, columns, generator=g)
    inputs = logits.softmax(-1) @ table + 0.3 * torch.randn(rows, columns, generator=g)
    return logits, table, inputs


def keys(rows: int, device: str = "cpu") -> tuple[int, torch.Tensor, torch.Tensor]:
    return 7, torch.arange(rows, device=device) * 3 + 2**40, torch.arange(rows, device=device)


def gradients(op, logits, table, inputs, weight, **options) -> tuple[torch.Tensor, torch.Tensor]:
    z, e = logits.clone().requires_grad_(), table.clone().requires_grad_()
    logp = op(z, e, inputs=inputs.to(z.dtype), **options).logp
    return torch.autograd.grad((logp * weight.to(z.dtype)).sum(), (z, e))


def test_hand_sized(device: str) -> None:
    z, e = torch.tensor([[1.0, 0.5, -0.5]], device=device), TABLE.to(device)
    inputs = torch.tensor([[0.804987, 0.025172]], device=device)  # eps = (0.5, -1)
    options = {"temperature": 0.5, "sigma": SIGMA}
    r = soft_embed(z, e, inputs=inputs, **options)
    close = {"atol": 1e-5, "rtol": 0.0}
    torch.testing.assert_close(r.weights.cpu(), torch.tensor([[0.705385, 0.259496, 0.035119]]), **close)
    torch.testing.assert_close(r.mean.cpu(), torch.tensor([[0.670265, 0.294615]]), **close)
    torch.testing.assert_close(r.logp.cpu(), torch.tensor([-0.625]), **close)
    assert int(r.ids) == 0 and float(r.kept_mass) == 1.0
    dz, de = gradients(soft_embed, z, e, inputs, torch.ones(1, device=device), **options)
    torch.testing.assert_close(dz.cpu(), torch.tensor([[2.405785, -2.004206, -0.401579]]), atol=3e-5, rtol=0.0)
    u = torch.tensor([[1.855674, -3.711348]])
    torch.testing.assert_close(de.cpu(), r.weights.cpu().t() @ u, atol=3e-5, rtol=0.0)
    new = soft_embed(torch.tensor([[1.2, 0.4, -0.5]], device=device), e, inputs=inputs, **options)
    torch.testing.assert_close(new.mean.cpu(), torch.tensor([[0.782523, 0.190460]]), **close)
    assert float(new.logp - r.logp) == pytest.approx(0.433368, abs=2e-5)


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1e-4])
@pytest.mark.parametrize("width, columns", [(1, 1), (17, 8), (32, 64), (1000, 67), (4111, 96)])
def test_accuracy(device: str, width: int, columns: int, temperature: float, top_k: int) -> None:
    logits, table, inputs = case(50, width, columns)
    options = {"temperature": temperature, "sigma": 0.3, "top_k": top_k}
    given = (logits.to(device), table.to(device))
    scored = soft_embed(*given, inputs=inputs.to(device), **options)
    drawn = soft_embed(*given, noise=keys(50, device), **options)
    for ours, kw, kw64 in (
        (scored, {"inputs": inputs}, {"inputs": inputs.double()}),
        (drawn, {"noise": keys(50)}, {"noise": keys(50)}),
    ):
        ref32 = soft_embed_ref(logits, table, **kw, **options)
        ref64 = soft_embed_ref(logits.double(), table.double(), **kw64, **options)
        assert torch.equal(ours.ids.cpu(), ref64.ids)
        for name in SoftEmbed._fields:
            if name == "inputs" or (name == "logp" and ours is drawn):
                continue  # the noise is compared below; the density of a drawn h~ is that of its rounding
            assert_accurate(getattr(ours, name), getattr(ref32, name), getattr(ref64, name), name)
    eps = soft_noise_ref(*keys(50), columns)
    torch.testing.assert_close((drawn.inputs - drawn.mean).cpu(), 0.3 * eps.float(), atol=1e-6, rtol=1e-5)
    weight = torch.randn(50, generator=torch.Generator().manual_seed(1))
    ours = gradients(soft_embed, *given, inputs.to(device), weight.to(device), **options)
    ref32 = gradients(soft_embed_ref, logits, table, inputs, weight, **options)
    ref64 = gradients(soft_embed_ref, logits.double(), table.double(), inputs, weight, **options)
    for got, a, b, name in zip(ours, ref32, ref64, ("logits", "table"), strict=True):
        assert_accurate(got, a, b, name)


def test_wrong_values_are_refused() -> None:
    logits, table, inputs = case(64, 1000, 48)
    right = {"temperature": 0.5, "sigma": 0.3}
    ref64 = soft_embed_ref(logits.double(), table.double(), inputs=inputs.double(), **right)
    ref32 = soft_embed_ref(logits, table, inputs=inputs, **right)

    def mutant(name: str, **changes) -> torch.Tensor:
        options = {"inputs": inputs.double(), **right, **changes}
        return getattr(soft_embed_ref(logits.double(), table.double(), **options), name).float()

    square = (inputs.double() - ref64.mean).square().sum(-1)
    mutants = {
        "mean": [
            mutant("mean", temperature=1.0), mutant("mean", temperature=0.5005), mutant("mean", top_k=3),
            (ref64.weights @ table.roll(1, 0).double()).float(), table[ref64.ids],
        ],
        "logp": [
            mutant("logp", sigma=0.301), (-square / 0.3**2).float(), (-square / (2 * 0.3)).float(),
            (square / (2 * 0.3**2)).float(), (ref64.logp / 48).float(),
            (ref64.logp - 48 * math.log(0.3 * math.sqrt(2 * math.pi))).float(),
        ],
        "weights": [mutant("weights", temperature=0.5005), torch.softmax(logits, -1)],
        "entropy": [mutant("entropy", temperature=0.5005), -ref64.entropy.float()],
    }  # fmt: skip
    for name, wrong in mutants.items():
        exact = getattr(ref64, name)
        assert accepts(exact.float(), getattr(ref32, name), exact), name
        for i, value in enumerate(wrong):
            assert not accepts(value, getattr(ref32, name), exact), (name, i)


def test_wrong_gradients_are_refused() -> None:
    logits, table, inputs = case(64, 1000, 48)
    weight = torch.randn(64, generator=torch.Generator().manual_seed(1))
    options = {"temperature": 0.5, "sigma": 0.3}
    ref32 = gradients(soft_embed_ref, logits, table, inputs, weight, **options)
    ref64 = gradients(soft_embed_ref, logits.double(), table.double(), inputs, weight, **options)
    r = soft_embed_ref(logits.double(), table.double(), inputs=inputs.double(), **options)
    e, g = table.double(), weight.double()[:, None]
    u = (inputs.double() - r.mean) / 0.3**2
    dots, p = u @ e.t(), r.weights
    centred = dots - (p * dots).sum(-1, keepdim=True)
    right = g / 0.5 * p * centred
    assert accepts(right.float(), ref32[0], ref64[0]) and accepts((p.t() @ (g * u)).float(), ref32[1], ref64[1])
    for name, wrong in {
        "no centre": g / 0.5 * p * dots,
        "no 1/T": g * p * centred,
        "1/sigma": g / 0.5 * p * centred * 0.3,
        "sign": -right,
        "centred by the unweighted mean": g / 0.5 * p * (dots - dots.mean(-1, keepdim=True)),
        "straight to the argmax": torch.zeros_like(p).scatter_(1, r.ids[:, None], 1.0) * right,
        "rows shifted": right.roll(1, 0),
    }.items():
        assert not accepts(wrong.float(), ref32[0], ref64[0]), name
    onehot = torch.zeros_like(p).scatter_(1, r.ids[:, None], 1.0)
    for name, wrong in {
        "no p": onehot.t() @ (g * u), "g forgotten": p.t() @ u, "1/sigma": 0.3 * (p.t() @ (g * u)),
    }.items():  # fmt: skip
        assert not accepts(wrong.float(), ref32[1], ref64[1]), name


def test_invariants(device: str) -> None:
    logits, table, inputs = (x.to(device) for x in case(40, 700, 30))
    r = soft_embed(logits, table, temperature=0.5, sigma=0.3, inputs=inputs)
    assert bool((r.weights >= 0).all()) and float((r.weights.sum(-1) - 1).abs().max()) < 2e-6
    dz, _ = gradients(soft_embed, logits, table, inputs, torch.ones(40, device=device), temperature=0.5, sigma=0.3)
    assert float(dz.sum(-1).abs().max()) < 2e-5 * float(dz.abs().max())
    zero = torch.zeros(40, device=device)
    zero[0] = 1.0
    dz, shares = soft_embed_backward(r, table, zero, temperature=0.5, sigma=0.3)
    assert bool((dz[1:] == 0).all() and (shares[1:] == 0).all()) and float(dz[0].abs().max()) > 0
    at_mean = soft_embed(logits, table, temperature=0.5, sigma=0.3, inputs=r.mean)
    assert bool((at_mean.logp == 0).all())
    still = soft_embed(logits, table, temperature=0.5, sigma=0.0, noise=keys(40, device))
    assert torch.equal(still.inputs, still.mean) and bool((still.logp == 0).all())
    fuzzy = soft_embed(logits, table, temperature=1e-4, sigma=0.0, noise=keys(40, device))
    torch.testing.assert_close(fuzzy.mean, table[logits.argmax(-1)])
    few = soft_embed(logits, table, temperature=0.5, sigma=0.3, inputs=inputs, top_k=4)
    assert ((few.weights > 0).sum(-1) == 4).all() and float(few.kept_mass.max()) < 1.0


def test_top_k_breaks_ties_by_index(device: str) -> None:
    z = torch.tensor([[1.0, 2.0, 1.0, 1.0]], device=device)
    r = soft_embed(z, torch.eye(4, device=device), temperature=1.0, sigma=0.0, noise=keys(1, device), top_k=2)
    e = math.exp(-1)
    torch.testing.assert_close(r.mean.cpu(), torch.tensor([[e / (1 + e), 1 / (1 + e), 0.0, 0.0]]))


@pytest.mark.parametrize("top_k", [0, 6])
def test_a_row_is_its_own_business(device: str, threads: Callable[[int], None], top_k: int) -> None:
    """Bit for bit: any rows alone, in any number, order, place and memory layout, by any number of threads."""
    if use_reference():
        pytest.skip("the plain torch reference promises no order of summation")
    logits, table, _ = (x.to(device) for x in case(77, 1000, 83))
    options = {"temperature": 0.5, "sigma": 0.3, "top_k": top_k}
    seed, uid, step = keys(77, device)
    threads(1)
    drawn = soft_embed(logits, table, noise=(seed, uid, step), **options)
    scored = soft_embed(logits, table, inputs=drawn.inputs, **options)
    for name in SoftEmbed._fields:
        assert torch.equal(getattr(scored, name), getattr(drawn, name)), name
    for count in (1, 2):
        threads(count)
        for rows in ([0], [5], [1, 2, 3], list(range(30, 77)), list(range(76, -1, -1))):
            part = soft_embed(logits[rows], table, noise=(seed, uid[rows], step[rows]), **options)
            for name in SoftEmbed._fields:
                assert torch.equal(getattr(part, name), getattr(drawn, name)[rows]), (name, rows[0], count)
    wide = torch.zeros(77, 1007, device=device)
    wide[:, 3:1003] = logits
    apart = soft_embed(wide[:, 3:1003], table, noise=(seed, uid, step), **options)
    assert torch.equal(apart.inputs, drawn.inputs) and torch.equal(apart.weights, drawn.weights)
    weight = torch.randn(77, generator=torch.Generator().manual_seed(1)).to(device)
    whole = soft_embed_backward(scored, table, weight, temperature=0.5, sigma=0.3)[0]
    first = SoftEmbed(*(value[:9] for value in scored))
    if device == "cpu":  # on a GPU the product is the library's
        part = soft_embed_backward(first, table, weight[:9].contiguous(), temperature=0.5, sigma=0.3)[0]
        assert torch.equal(part, whole[:9])


def test_weights_over_the_logits_in_a_program(device: str) -> None:
    """What the engine records: results over the inputs, no allocation, run again on other numbers."""
    logits, table, _ = (x.to(device) for x in case(6, 130, 24))
    seed, uid, step = keys(6, device)
    options = {"temperature": 0.5, "sigma": 0.3}
    out = SoftOut(
        torch.empty(6, 130, device=device), torch.empty(6, 24, device=device), torch.empty(6, 24, device=device),
        torch.empty(6, dtype=torch.int64, device=device), torch.empty(4, 6, device=device),
    )  # fmt: skip
    work = out.weights.copy_(logits)

    def call() -> None:
        soft_embed(work, table, noise=(seed, uid, step), out=out, **options)

    if device == "cuda":
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run = graph.replay
    elif use_reference():
        run = call
    else:
        program = _C.Program()
        program.begin()
        call()
        program.end()
        run = program.run
    for _ in range(2):
        work.copy_(logits)
        run()
        expected = soft_embed(logits, table, noise=(seed, uid.clone(), step.clone()), **options)
        assert torch.equal(out.inputs, expected.inputs) and torch.equal(out.weights, expected.weights)
        assert torch.equal(out.ids, expected.ids) and torch.equal(out.numbers[0], expected.logp)
        step += 1


def test_noise_is_standard_normal_and_independent() -> None:
    logits, table = torch.zeros(500, 4), torch.zeros(4, 201)
    uid, step = torch.arange(500), torch.zeros(500, dtype=torch.int64)

    def draw(seed: int = 0, uid: torch.Tensor = uid, step: torch.Tensor = step, columns: int = 201) -> torch.Tensor:
        return soft_embed(logits, table[:, :columns].contiguous(), temperature=1.0, sigma=1.0, noise=(seed, uid, step)
                          ).inputs  # fmt: skip

    eps = draw().double()
    n = eps.numel()
    assert abs(float(eps.mean())) < 5 / n**0.5
    assert abs(float(eps.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((eps**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    assert abs(float((eps[:, :-1] * eps[:, 1:]).mean())) < 5 / n**0.5
    assert abs(float((eps[:-1] * eps[1:]).mean())) < 5 / n**0.5
    assert torch.equal(draw(columns=66), draw()[:, :66])  # a coordinate's number is its own
    for other in (draw(seed=1), draw(uid=uid + 2**32), draw(step=step + 1)):
        assert abs(float((eps * other.double()).mean())) < 5 / n**0.5
    words = philox_uniform_ref(0, uid, step, 1)  # the first word, of which the token stream would make its uniform
    radius = eps[:, :2].norm(dim=1)
    torch.testing.assert_close((-2 * words.log()).sqrt(), radius, atol=1e-2, rtol=1e-3)


def test_rows_without_a_distribution(device: str) -> None:
    z = torch.zeros(4, 5, device=device)
    z[0, 1], z[1] = torch.nan, -torch.inf
    z[2, 3] = -torch.inf
    r = soft_embed(z, torch.ones(5, 3, device=device), temperature=1.0, sigma=0.0, noise=keys(4, device))
    assert r.ids.tolist() == [-1, -1, 0, 0]
    for name in ("logp", "entropy", "mean_logp", "mean", "inputs"):
        value = getattr(r, name).view(4, -1)
        assert value.isnan().all(1).tolist() == value.isnan().any(1).tolist() == [True, True, False, False], name
    assert r.weights[2].tolist() == pytest.approx([0.25, 0.25, 0.25, 0.0, 0.25])


def test_no_rows(device: str) -> None:
    r = soft_embed(
        torch.empty(0, 5, device=device), torch.ones(5, 3, device=device), temperature=1.0, sigma=0.1,
        noise=(0, *(torch.empty(2, 0, dtype=torch.int64, device=device))),
    )  # fmt: skip
    assert r.inputs.shape == (0, 3)


def test_bad_arguments() -> None:
    z, e = torch.zeros(2, 4), torch.zeros(4, 3)
    good = {"temperature": 1.0, "sigma": 0.1, "noise": keys(2)}
    for changes, message in (
        ({"temperature": 0.0}, "temperature > 0"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"sigma": -0.1}, "sigma must be >= 0"),
        ({"noise": None}, "give noise"),
        ({"inputs": torch.zeros(2, 3)}, "and not both"),
        ({"noise": None, "inputs": torch.zeros(2, 3), "sigma": 0.0}, "> 0 to score"),
        ({"noise": None, "inputs": torch.zeros(2, 4)}, "inputs must have shape"),
        ({"noise": (0, torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))}, "uid must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_embed(z, e, **{**good, **changes})
    with pytest.raises(ValueError, match="table must be float32"):
        soft_embed(z, e.double(), **good)
    with pytest.raises(ValueError, match="logits must be float32"):
        soft_embed(z.half(), e, **good)
    with pytest.raises(ValueError, match=r"table \[V,D\]"):
        soft_embed(z, e[:3], **good)
