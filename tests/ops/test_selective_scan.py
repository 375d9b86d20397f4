"""selective_scan against float64 and the published formula; packing, cuts and threads that must not show."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from pymathrl.ops.causal_conv1d import repeat_groups
from pymathrl.ops.selective_scan import selective_scan, selective_scan_ref
from tests.ops.mamba_cases import (
    ACTIVATIONS,
    SHAPES,
    Shape,
    bits_equal,
    mamba_inputs,
    moved,
    offsets_of,
    published_scan,
    source_columns,
)
from tests.oracle import accepts, assert_accurate

LEAVES = (*ACTIVATIONS, "a_log", "d", "dt_bias", "state")
NAMES = ("y", "final", *(f"d_{name}" for name in LEAVES))


def kernel(*args, **options):
    return selective_scan(*args, **options, return_final=True)


def run(op: Callable, x: dict[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """y, final and the gradients of both by everything."""
    leaves = [x[name].clone().requires_grad_() for name in LEAVES]
    y, final = op(*leaves[:8], offsets_of(shape.lengths).to(leaves[0].device), initial=leaves[8])
    gradients = torch.autograd.grad([y, final], leaves, [x["dy"].to(y.dtype), x["dstate"]])
    return dict(zip(NAMES, (y.detach(), final.detach(), *gradients), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device: str, shape: Shape) -> None:
    x = mamba_inputs(shape, padding=3)
    ours = run(kernel, moved(x, device), shape)
    ref32, ref64 = run(selective_scan_ref, x, shape), run(selective_scan_ref, moved(x, torch.float64), shape)
    for name in NAMES:
        assert_accurate(ours[name], ref32[name], ref64[name], name)
    for name in ("y", *(f"d_{name}" for name in ACTIVATIONS)):
        assert not ours[name][-3:].any()  # padding


SCAN = {  # one channel of two states, four tokens
    "u": [[1.0], [-1.0], [2.0], [0.5]], "dt": [[0.0], [0.5], [-0.5], [1.0]], "z": [[1.0], [0.0], [-1.0], [2.0]],
    "b": [[1.0, 0.0], [0.5, 1.0], [-1.0, 1.0], [2.0, -0.5]], "c": [[1.0, 2.0], [1.0, -1.0], [0.5, 1.0], [-1.0, 1.0]],
    "dy": [[1.0], [2.0], [-1.0], [0.5]],
}  # fmt: skip
WORKED = {  # with and without a reset at token 2; a, d and dt_bias as in worked_inputs
    (4,): {
        "y": (0.76351514, 0, -0.17879964, -2.20024098), "final": (1.09297218, -0.30603343),
        "d_u": (0.7500133, 0.09388478, 0.29069866, -2.79066313),
        "d_dt": (0.37426849, -0.04970945, 0.42000427, -1.07448073), "d_a": (0.35238781, -0.01193003),
        "d_b": (0.53069573, 0.05310638, -0.08772505, -0.61098045),
        "d_c": (0.54419756, 0, -0.31699558, 0.9626867), "d_z": (0.96885598, 0.48251624, -0.04808663, -0.68119782),
        "d_d": (1.70933996,), "d_dt_bias": (-0.32991742,),
    },
    (2, 2): {
        "y": (0.76351514, 0, -0.2993359, -2.22654028), "final": (1.13109458, -0.28284029),
        "d_u": (0.76351514, 0, 0.29069866, -2.79066313), "d_dt": (0.38379054, 0, 0.32857545, -1.07994172),
        "d_a": (0.31311618, 0.0781976), "d_b": (0.54419756, 0, -0.08772505, -0.61098045),
        "d_c": (0.54419756, 0, -0.2759421, 0.9962648), "d_z": (0.96885598, 0.48251624, -0.08050382, -0.68934012),
        "d_d": (1.70933996,), "d_dt_bias": (-0.36757574,),
    },
}  # fmt: skip


def worked_inputs(device: str, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The channel of SCAN as channel 0 of two that read the same b: an op's groups have as many channels as states. The
    other channel's u and dy are 0, so that it adds nothing."""
    two = lambda name: torch.cat([torch.tensor(SCAN[name]), torch.zeros(4, 1)], 1)
    x = {name: two(name) for name in ("u", "dt", "z", "dy")} | {name: torch.tensor(SCAN[name]) for name in ("b", "c")}
    x |= {"a_log": torch.tensor([[1.0, 2.0]]).log().expand(2, 2), "d": torch.tensor([0.3, 0.3])}
    x |= {"dt_bias": torch.tensor([0.1, 0.1]), "state": torch.zeros(len(lengths), 2, 2)}
    x["dstate"] = torch.zeros_like(x["state"])
    return moved(x, device)


@pytest.mark.parametrize("lengths", WORKED, ids=str)
def test_worked_example(device: str, lengths: tuple[int, ...]) -> None:
    got = run(kernel, worked_inputs(device, lengths), Shape(lengths, 2, 2, 2, 4))
    got["final"] = got["final"][-1, :, 0]
    got["d_a"] = got["d_a_log"][0].cpu() / torch.tensor([-1.0, -2.0])  # a = -1, -2
    for name, expected in WORKED[lengths].items():
        value = got[name][..., 0] if got[name].ndim == 2 else got[name]
        value = value[: len(expected)].cpu()
        torch.testing.assert_close(
            value, torch.tensor(expected), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("twice", "state", "y"),
    [
        (False, [[0.63995636, 1.1004337], [-0.62564146, -1.78190044]], [0.16791546, -0.04202451]),
        (True, [[0.67580883, 1.31857852], [-0.87969182, -2.63715704]], [0.11118067, -0.20371377]),
    ],
)
def test_hand_sized_update(device: str, twice: bool, state: list, y: list) -> None:
    """One token of two channels. In M1's checkpoints the bias of the projection comes a second time, as dt_bias."""
    bias = torch.tensor([0.2, 0.4])
    at = lambda *numbers: torch.tensor([numbers], device=device)
    before = torch.tensor([[[0.5, -1.0], [0.25, 2.0]]], device=device).transpose(1, 2).contiguous()
    dt = torch.tensor([0.1, -0.3]) + (bias if twice else 0)
    got, after = selective_scan(
        at(1.0, -2.0), dt[None].to(device), at(0.5, -1.0), at(0.5, 1.5), at(1.0, -1.0),
        torch.tensor([[1.0, 2.0]] * 2, device=device).log(), torch.tensor([1.0, 0.5], device=device), bias.to(device),
        torch.tensor([0, 1], device=device), initial=before, return_final=True,
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), torch.tensor([y]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.cpu()[0].t(), torch.tensor(state), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_against_the_published_formula(shape: Shape) -> None:
    x = moved(mamba_inputs(shape), torch.float64)
    y, final = selective_scan_ref(*(x[name] for name in LEAVES[:8]), offsets_of(shape.lengths))
    states, columns = shape.states, source_columns(shape.channels, shape.sources, shape.states)
    group = lambda m: torch.stack([m[:, g * states : (g + 1) * states] for g in range(m.shape[1] // states)])  # [G,L,N]
    b = group(x["b"])[columns // states].transpose(1, 2)  # [D,N,L]
    c = group(x["c"])[torch.arange(shape.channels) // states].transpose(1, 2)
    for sequence, (first, last) in enumerate(itertools.pairwise(offsets_of(shape.lengths).tolist())):
        if first == last:
            continue
        cut = slice(first, last)
        expected, state = published_scan(
            x["u"][cut].t(), x["dt"][cut].t(), -x["a_log"].exp(), b[..., cut], c[..., cut], x["d"], x["z"][cut].t(),
            x["dt_bias"],
        )  # fmt: skip
        torch.testing.assert_close(y[cut].t(), expected)
        torch.testing.assert_close(final[sequence].t(), state)


def without_reset(*args, initial):
    y, final = selective_scan_ref(*args[:8], args[8][[0, -1]], initial=initial[:1])
    return y, final.expand(len(initial), -1, -1)


def c_of_the_copy(u, dt, z, b, c, *rest, **options):
    """Each group of channels reads the c of the next one: then dc sums over the wrong group as well."""
    return selective_scan_ref(u, dt, z, b, c.roll(rest[0].shape[1], 1), *rest, **options)


def tiled(u, dt, z, b, c, a_log, *rest, **options):
    """b repeated as a whole, not group by group."""
    copies = u.shape[1] // b.shape[1]
    return selective_scan_ref(u, dt, z, repeat_groups(b, b.shape[1], copies), c, a_log, *rest, **options)


MUTANTS: dict[str, tuple[Callable, tuple[str, ...]]] = {  # and some results that must show it
    "no reset": (without_reset, ("y", "d_u", "d_dt", "d_b")),
    "no bias": (lambda *a, **kw: selective_scan_ref(*a[:7], 0 * a[7], *a[8:], **kw), ("y", "final", "d_dt", "d_a_log")),
    "bias twice": (lambda *a, **kw: selective_scan_ref(*a[:7], 2 * a[7], *a[8:], **kw), ("y", "final", "d_dt_bias")),
    "tiled repeat": (tiled, ("y", "final", "d_b")),
    "c of the next group": (c_of_the_copy, ("y", "d_c")),
    "no gate": (lambda u, dt, z, *a, **kw: selective_scan_ref(u, dt, 0 * z + 1.28, *a, **kw), ("y", "d_u", "d_d")),
    "no d": (lambda *a, **kw: selective_scan_ref(*a[:6], 0 * a[6], *a[7:], **kw), ("y", "d_u", "d_z")),
    "initial ignored": (
        lambda *a, initial, **kw: selective_scan_ref(*a, initial=0 * initial, **kw), ("y", "final", "d_state", "d_c"),
    ),
    "one decay for all states": (
        lambda *a, **kw: selective_scan_ref(*a[:5], a[5].mean(1, keepdim=True).expand_as(a[5]), *a[6:], **kw),
        ("y", "d_a_log"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_refused(name: str) -> None:
    shape = SHAPES[1]
    x = mamba_inputs(shape)
    x64 = moved(x, torch.float64)
    ref32, ref64 = run(selective_scan_ref, x, shape), run(selective_scan_ref, x64, shape)
    mutant, shown = MUTANTS[name]
    wrong = run(mutant, x64, shape)
    for result in shown:
        assert not accepts(wrong[result].float(), ref32[result], ref64[result]), result


def test_gradient_of_final_counts() -> None:
    shape = SHAPES[1]
    x = mamba_inputs(shape)
    ref32, ref64 = run(selective_scan_ref, x, shape), run(selective_scan_ref, moved(x, torch.float64), shape)
    without = run(kernel, x | {"dstate": 0 * x["dstate"]}, shape)
    for name in ("d_u", "d_dt", "d_b", "d_a_log", "d_state"):
        assert not accepts(without[name], ref32[name], ref64[name])


def test_gradcheck() -> None:
    shape = Shape((3, 0, 1), 8, 4, 2, 4)
    x = moved(mamba_inputs(shape), torch.float64)
    leaves = [x[name].requires_grad_() for name in LEAVES]
    op = lambda *a: selective_scan_ref(*a[:8], offsets_of(shape.lengths), initial=a[8])
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_is_separate(device: str, shape: Shape) -> None:
    """Values and gradients of a sequence, bit for bit. The weights' gradients sum over sequences and may round."""
    x = moved(mamba_inputs(shape), device)
    whole = run(kernel, x, shape)
    rows, states = ("y", *(f"d_{name}" for name in ACTIVATIONS)), ("final", "d_state")
    for sequence, (first, last) in enumerate(itertools.pairwise(offsets_of(shape.lengths).tolist())):
        one = {k: v[first:last] if k in (*ACTIVATIONS, "dy") else v for k, v in x.items()}
        one |= {k: x[k][sequence : sequence + 1] for k in ("state", "dstate")}
        alone = run(kernel, one, shape._replace(lengths=(last - first,)))
        assert bits_equal([alone[k] for k in rows], [whole[k][first:last] for k in rows])
        assert bits_equal([alone[k] for k in states], [whole[k][sequence, None] for k in states])


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 129])
def test_cut_is_whole(device: str, cut: int) -> None:
    x = moved(mamba_inputs(SHAPES[2]), device)
    rows, weights = [x[name] for name in ACTIVATIONS], [x[name] for name in ("a_log", "d", "dt_bias")]
    offsets = lambda n: offsets_of((n,)).to(device)
    whole, last = kernel(*rows, *weights, offsets(130))
    head, state = kernel(*(t[:cut] for t in rows), *weights, offsets(cut))
    tail, state = kernel(*(t[cut:] for t in rows), *weights, offsets(130 - cut), initial=state)
    assert bits_equal((torch.cat([head, tail]), state), (whole, last))


def test_options(device: str) -> None:
    """Slices of one projection, no gate, no state before, a gradient through one result only."""
    shape = SHAPES[1]
    x = moved(mamba_inputs(shape), device)
    offsets, weights = offsets_of(shape.lengths).to(device), [x[name] for name in ("a_log", "d", "dt_bias")]
    names = ("u", "dt", "b", "c")
    wide = torch.cat([x[name] for name in names], 1).requires_grad_()
    dense = [x[name].clone().requires_grad_() for name in names]
    slices = wide.split([t.shape[1] for t in dense], 1)
    runs = [kernel(*inputs[:2], None, *inputs[2:], *weights, offsets) for inputs in (slices, dense)]
    assert bits_equal(*runs)
    zeros = selective_scan(*dense[:2], None, *dense[2:], *weights, offsets, initial=torch.zeros_like(x["state"]))
    assert torch.equal(zeros, runs[0][0])
    for index, gradient in ((0, x["dy"]), (1, x["dstate"])):
        a = torch.autograd.grad(runs[0][index], wide, gradient, retain_graph=True)[0]
        b = torch.autograd.grad(runs[1][index], dense, gradient, retain_graph=True)
        assert torch.equal(a, torch.cat(b, 1)) and a.any()
    with torch.no_grad():
        assert torch.equal(selective_scan(*dense[:2], None, *dense[2:], *weights, offsets), runs[0][0])


def test_decays_at_the_ends(device: str) -> None:
    """A state that nothing decays, one that is gone after a token, steps that are 0, and steps as long as dt itself."""
    tokens = 200
    ones = torch.ones(tokens, 2)
    dt = torch.tensor([-200.0, 60.0]).expand(tokens, 2)
    a_log = torch.tensor([[-40.0, 3.0]] * 2)
    args = (ones, dt, None, ones, ones, a_log, torch.zeros(2), torch.zeros(2), offsets_of((tokens,)))
    y, final = kernel(*(None if t is None else t.to(device) for t in args))
    assert not y[:, 0].any() and not final[0, :, 0].any()
    torch.testing.assert_close(final[0, :, 1].cpu(), torch.tensor([60.0 * tokens, 60.0]))


def test_threads_do_not_matter(threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2):
        threads(count)
        results.append([y for shape in SHAPES for y in run(kernel, mamba_inputs(shape), shape).values()])
    assert bits_equal(*results)


@pytest.mark.gpu
def test_bfloat16(device: str) -> None:
    if device == "cpu":
        pytest.skip("on a CPU the op is fp32")
    shape = SHAPES[1]
    x = mamba_inputs(shape)
    low = {name: t.bfloat16() if name in (*ACTIVATIONS, "dy") else t for name, t in x.items()}
    ours, ref64 = run(kernel, moved(low, device), shape), run(selective_scan_ref, moved(low, torch.float64), shape)
    for name in NAMES:
        assert_accurate(ours[name].float(), ref64[name].to(ours[name].dtype).float(), ref64[name], name)


def test_no_tokens(device: str) -> None:
    shape = Shape((), 8, 4, 2, 4)
    x = moved(mamba_inputs(shape), device)
    got = run(kernel, x, shape)
    assert got["y"].shape == (0, 8) and got["final"].shape == (0, 2, 8) and not got["d_a_log"].any()


def test_arguments_are_checked() -> None:
    x = mamba_inputs(Shape((5,), 8, 4, 2, 4))
    args = [x[name] for name in LEAVES[:8]] + [torch.tensor([0, 5])]
    changed = lambda index, value: [*args[:index], value, *args[index + 1 :]]
    with pytest.raises(ValueError, match=r"D a multiple of X and of N, got \[5, 8\], \[5, 3\] and \[8, 2\]"):
        selective_scan(*changed(3, x["b"][:, :3]))
    with pytest.raises(ValueError, match=r"D must be a multiple of X, and X of N, got D = 8, X = 2, N = 4"):
        selective_scan(*changed(3, x["b"][:, :2])[:5], torch.zeros(8, 4), *args[6:])
    with pytest.raises(ValueError, match=r"c must have shape \[5, 8\], got \[5, 4\]"):
        selective_scan(*changed(4, x["c"][:, :4]))
    with pytest.raises(ValueError, match=r"dt_bias must have shape \[8\], got \[4\]"):
        selective_scan(*changed(7, x["dt_bias"][:4]))
    with pytest.raises(ValueError, match=r"offsets must start at 0 .* got 1 at 0"):
        selective_scan(*changed(8, torch.tensor([1, 5])))
    with pytest.raises(ValueError, match="z must be float32, got float64"):
        selective_scan(*changed(2, x["z"].double()))
    with pytest.raises(ValueError, match=r"initial must have shape \[1, 2, 8\], got \[1, 8, 2\]"):
        selective_scan(*args, initial=torch.zeros(1, 8, 2))
