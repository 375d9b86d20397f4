"""rotary against float64, its gradients, rows that do not see each other, and results that must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pymathrl.ops.rotary import rotary, rotary_ref
from tests.oracle import assert_accurate

# rows, query heads, key/value heads, head size
SHAPES = [(1, 1, 1, 8), (7, 4, 2, 16), (5, 3, 1, 24), (33, 2, 2, 40), (130, 8, 2, 64), (9, 16, 8, 128), (3, 2, 1, 256)]
POSITIONS = 300


def table(head_dim: int) -> torch.Tensor:
    """[P,E] float64: cosines, then sines."""
    phase = torch.outer(torch.arange(POSITIONS).double(), 1e4 ** -(torch.arange(0, head_dim, 2).double() / head_dim))
    return torch.cat([phase.cos(), phase.sin()], -1)


def inputs(rows: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + head_dim)
    width = (heads + 2 * kv_heads) * head_dim
    return {
        "qkv": torch.randn(rows, width, generator=generator),
        "position": torch.randint(POSITIONS, (rows,), generator=generator),
        "q_norm": 1 + 0.3 * torch.randn(head_dim, generator=generator),
        "k_norm": 1 + 0.3 * torch.randn(head_dim, generator=generator),
        "dout": torch.randn(rows, width, generator=generator),
    }


def run(
    op: Callable, x: dict[str, torch.Tensor], heads: int, kv_heads: int, normed: bool, rope: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Value and gradients, in the precision of x."""
    head_dim = x["q_norm"].numel()
    rope = (table(head_dim) if rope is None else rope).to(x["qkv"])
    names = ["qkv", "q_norm", "k_norm"] if normed else ["qkv"]
    leaves = {name: x[name].clone().requires_grad_() for name in names}
    out = op(
        leaves["qkv"], x["position"], rope, heads, kv_heads, head_dim**-0.5, leaves.get("q_norm"), leaves.get("k_norm")
    )
    gradients = torch.autograd.grad(out, list(leaves.values()), x["dout"])
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}


def moved(x: dict[str, torch.Tensor], to: str | torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(to) if v.is_floating_point() or isinstance(to, str) else v for k, v in x.items()}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device: str, shape: tuple[int, ...], normed: bool) -> None:
    x, heads = inputs(*shape), shape[1:3]
    ours = run(rotary, moved(x, device), *heads, normed)
    ref32, ref64 = run(rotary_ref, x, *heads, normed), run(rotary_ref, moved(x, torch.float64), *heads, normed)
    for name in ours:
        assert_accurate(ours[name], ref32[name], ref64[name], name)


def test_hand_sized(device: str) -> None:
    """One head of each kind, E = 8, in position 1 turned by 90 degrees, in position 0 by none; scale 10."""
    rope = torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4], device=device)
    head = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    qkv = head.repeat(2, 3).to(device).requires_grad_()
    position = torch.tensor([1, 0], device=device)
    out = rotary(qkv, position, rope, 1, 1, 10.0)
    turned = torch.tensor([-5.0, -6.0, -7.0, -8.0, 1.0, 2.0, 3.0, 4.0])
    expected = torch.stack([torch.cat([10 * turned, turned, head]), torch.cat([10 * head, head, head])])
    assert torch.equal(out.detach().cpu(), expected)
    out.backward(out.detach())  # R^T R = 1: what was scaled comes back scaled twice
    assert torch.equal(qkv.grad.cpu(), torch.cat([100 * head, head, head]).expand(2, -1))
    ones = torch.full((1, 24), 2.0, device=device)  # rms 2: the norm gives the weight
    weight = torch.arange(8.0, device=device)
    normed = rotary(ones, torch.tensor([0], device=device), rope, 1, 1, 1.0, weight, 3 * weight, eps=0.0)
    assert torch.equal(normed[0], torch.cat([weight, 3 * weight, ones[0, :8]]))


def test_equals_transformers() -> None:
    """The layout of the pairs and of the table is Hugging Face's."""
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    x = inputs(6, 2, 2, 16)
    q, k, _ = x["qkv"].double().unflatten(1, (6, 16)).transpose(0, 1).split([2, 2, 2])
    rope = table(16)[x["position"]]
    cosine, sine = (part.repeat(1, 2)[None] for part in rope.chunk(2, -1))  # their tables repeat the half
    q, k = qwen3.apply_rotary_pos_emb(q[None], k[None], cosine, sine)
    ours = rotary_ref(x["qkv"].double(), x["position"], table(16), 2, 2, 1.0)
    torch.testing.assert_close(ours[:, :64], torch.cat([q[0], k[0]]).transpose(0, 1).flatten(1))


def test_one_norm_only(device: str) -> None:
    x = moved(inputs(6, 3, 1, 16), device)
    rope = table(16).float().to(device)
    both = rotary(x["qkv"], x["position"], rope, 3, 1, 0.25, x["q_norm"], x["k_norm"])
    plain = rotary(x["qkv"], x["position"], rope, 3, 1, 0.25)
    for name, first in (("q_norm", both), ("k_norm", plain)):
        weight = x[name].clone().requires_grad_()
        out = rotary(x["qkv"], x["position"], rope, 3, 1, 0.25, **{name: weight})
        assert torch.equal(out[:, :48], first[:, :48])
        assert torch.equal(out[:, 48:64], (plain if name == "q_norm" else both)[:, 48:64])
        assert torch.equal(out[:, 64:], x["qkv"][:, 64:])
        out.backward(x["dout"])
        assert weight.grad is not None


def test_distance_between_two_positions_is_all_that_counts() -> None:
    """(R_i q) . (R_j k) depends on i - j: the reason for rotary positions, and no reference needed."""
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(1, 3 * 32, generator=generator)
    rope = table(32).float()
    turned = rotary(head.expand(POSITIONS, -1), torch.arange(POSITIONS), rope, 1, 1, 1.0)
    scores = turned[:, :32].double() @ turned[:, 32:64].double().T
    for distance in (0, 7, 200):
        along = scores.diagonal(-distance)
        assert float(along.max() - along.min()) < 1e-5


def test_a_row_is_alone(device: str) -> None:
    """The bits of a row depend on no other row, forward and backward."""
    x = moved(inputs(37, 4, 2, 40), device)
    whole = run(rotary, x, 4, 2, True)
    for row in (0, 5, 36):
        part = {k: v if k.endswith("norm") else v[row : row + 1] for k, v in x.items()}
        single = run(rotary, part, 4, 2, True)
        for name in ("out", "dqkv"):
            assert torch.equal(single[name][0], whole[name][row])


def test_threads_do_not_matter(threads: Callable[[int], None]) -> None:
    x = inputs(1001, 4, 2, 32)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(run(rotary, x, 4, 2, True))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_without_norms_the_input_is_not_kept() -> None:
    x = inputs(4, 2, 1, 16)
    out = rotary(x["qkv"].requires_grad_(), x["position"], table(16).float(), 2, 1, 0.25)
    kept = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert [t.data_ptr() for t in kept][:1] == [x["position"].data_ptr()]
    assert len(kept) == 2  # position and rope


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True])
def test_bfloat16(device: str, normed: bool) -> None:
    if device == "cpu":
        pytest.skip("on a CPU the op is fp32")
    x = moved(inputs(130, 8, 2, 64), torch.bfloat16)
    ours = run(rotary, moved(x, device), 8, 2, normed, table(64).float())
    ref64 = run(rotary_ref, moved(x, torch.float64), 8, 2, normed)
    for name, exact in ref64.items():
        assert_accurate(ours[name].float(), exact.to(torch.bfloat16).float(), exact, name)


def test_arguments_are_checked() -> None:
    x, rope = inputs(4, 2, 1, 16), table(16).float()
    qkv, position = x["qkv"], x["position"]
    with pytest.raises(ValueError, match="qkv must have shape"):
        rotary(qkv[:, :-1], position, rope, 2, 1, 1.0)
    with pytest.raises(ValueError, match="head size must be a multiple of 8"):
        rotary(qkv[:, :48].contiguous(), position, rope, 2, 1, 1.0)
    with pytest.raises(ValueError, match="rope must have shape"):
        rotary(qkv, position, rope[:, :8].contiguous(), 2, 1, 1.0)
    with pytest.raises(ValueError, match=r"position must be in \[0, 300\), got 300 in row 2"):
        rotary(qkv, torch.tensor([0, 1, 300, 2]), rope, 2, 1, 1.0)
    with pytest.raises(ValueError, match="position must be int64"):
        rotary(qkv, position.int(), rope, 2, 1, 1.0)
    with pytest.raises(ValueError, match="qkv must be float32 on a CPU, got bfloat16"):
        rotary(qkv.bfloat16(), position, rope, 2, 1, 1.0)
    with pytest.raises(ValueError, match="q_norm must have shape"):
        rotary(qkv, position, rope, 2, 1, 1.0, torch.ones(8))


def test_nan_stays_in_its_head(device: str) -> None:
    x = moved(inputs(3, 2, 1, 16), device)
    x["qkv"][1, 16] = math.nan  # the second query head of row 1
    out = rotary(x["qkv"], x["position"], table(16).float().to(device), 2, 1, 1.0, x["q_norm"], x["k_norm"])
    bad = torch.isnan(out)
    assert bad[1, 16:32].all()
    assert int(bad.sum()) == 16
