"""mamba_step: bit for bit what convolution and scan give, however the tokens of its sequences are cut into calls."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pymathrl import _C
from pymathrl.ops.causal_conv1d import causal_conv1d
from pymathrl.ops.mamba_step import mamba_step, mamba_step_ref
from pymathrl.ops.selective_scan import selective_scan
from tests.ops.mamba_cases import SHAPES, Shape, bits_equal, mamba_inputs, moved, offsets_of
from tests.oracle import accepts, assert_accurate

WEIGHTS = ("weight", "bias", "a_log", "d", "dt_bias")
SLOTS = 11  # rows of the states, more than any test has sequences


class Layer:
    """A layer's inputs, and states that hold nan wherever nothing was written yet."""

    def __init__(self, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        x = moved(mamba_inputs(shape), device)
        rest = x["dy"][:, :3]  # columns after z, x, b and c, as those of the dt projection
        self.shape = shape
        self.proj = torch.cat([x["z"], x["x"], x["b"], x["c"], rest], 1).to(dtype)
        self.dt = x["dt"].to(dtype)
        self.weights = [x[name] for name in WEIGHTS]
        self.conv = torch.full((SLOTS, *x["window"].shape[1:]), math.nan, device=device)
        self.ssm = torch.full((SLOTS, *x["state"].shape[1:]), math.nan, device=device)
        self.device = device

    def step(self, tokens: list[int], row: list[int], position: list[int], **options) -> torch.Tensor:
        at = lambda numbers: torch.tensor(numbers, dtype=torch.int64, device=self.device)
        return mamba_step(
            self.proj[at(tokens)], self.dt[at(tokens)], self.conv, self.ssm, at(row), at(position), *self.weights,
            **options,
        )  # fmt: skip

    def scan(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y and both states of all sequences, by the ops of the training pass."""
        channels, sources, states = self.shape[1:4]
        z, x, b, c, _ = self.proj.split([channels, sources, sources, channels, 3], 1)
        offsets = offsets_of(self.shape.lengths).to(self.device)
        weight, bias, *rest = self.weights
        u, window = causal_conv1d(x, weight, bias, offsets, group=states, return_final=True)
        y, state = selective_scan(u, self.dt, z, b, c, *rest, offsets, return_final=True)
        return y, window, state


def tokens_of(lengths: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(token, sequence, position) of a packed batch."""
    pairs = [(sequence, at) for sequence, length in enumerate(lengths) for at in range(length)]
    return [(token, *pair) for token, pair in enumerate(pairs)]


def decode(layer: Layer) -> torch.Tensor:
    """All sequences side by side, one token each per call; those that are over stay in the batch as padding."""
    tokens, out = tokens_of(layer.shape.lengths), torch.empty_like(layer.dt)
    for at in range(max(layer.shape.lengths)):
        now = {sequence: token for token, sequence, position in tokens if position == at}
        batch = [(now.get(s, 0), s if s in now else -1) for s in range(len(layer.shape.lengths))]
        y = layer.step([token for token, _ in batch], [row for _, row in batch], [at] * len(batch))
        for (token, row), value in zip(batch, y, strict=True):
            if row >= 0:
                out[token] = value
            else:
                assert not value.any()
    return out


def agree(device: str, shape: Shape, got: tuple, expected: tuple) -> None:
    """y, and the states of the sequences that have tokens."""
    some = [sequence for sequence, length in enumerate(shape.lengths) if length]
    cut = lambda results: [results[0], *(states[some] for states in results[1:])]
    if device == "cpu":
        assert bits_equal(cut(got), cut(expected))
    else:  # nvcc fuses products and sums as it likes
        for a, b in zip(cut(got), cut(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_is_scan(device: str, shape: Shape) -> None:
    layer = Layer(shape, device)
    y = decode(layer)
    agree(device, shape, (y, layer.conv, layer.ssm), layer.scan())


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_is_scan(device: str, shape: Shape, chunk: int) -> None:
    """The packed batch in calls of `chunk` tokens: runs of several sequences, cut anywhere."""
    layer, tokens = Layer(shape, device), tokens_of(shape.lengths)
    parts = [layer.step(*map(list, zip(*tokens[i : i + chunk], strict=True))) for i in range(0, len(tokens), chunk)]
    agree(device, shape, (torch.cat(parts), layer.conv, layer.ssm), layer.scan())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device: str, shape: Shape) -> None:
    """y of all tokens of a batch and both states, against float64."""
    tokens, row, position = map(list, zip(*tokens_of(shape.lengths), strict=True))

    def by_reference(dtype: torch.dtype) -> list[torch.Tensor]:
        x = Layer(shape)
        conv, ssm, y = (torch.zeros_like(t, dtype=dtype) for t in (x.conv, x.ssm, x.dt))
        weights = (t.to(dtype) for t in x.weights)
        at = (torch.tensor(row), torch.tensor(position))
        mamba_step_ref(x.proj.to(dtype), x.dt.to(dtype), conv, ssm, *at, *weights, out=y)
        return [y, conv, ssm]

    layer = Layer(shape, device)
    layer.conv.zero_(), layer.ssm.zero_()
    ours = [layer.step(tokens, row, position), layer.conv, layer.ssm]
    for name, a, b, c in zip(
        ("y", "conv_state", "ssm_state"), ours, by_reference(torch.float32), by_reference(torch.float64), strict=True
    ):
        assert_accurate(a, b, c, name)


def test_mutants_are_refused() -> None:
    """Layers that differ from the checkpoint's: one bias missing, b and c exchanged, the tail of the window lost."""
    shape = Shape((9,), 8, 4, 2, 4)
    tokens, row, position = map(list, zip(*tokens_of(shape.lengths), strict=True))
    ours = Layer(shape).step(tokens, row, position)
    reference = Layer(shape).scan()[0]
    assert accepts(ours, reference, reference.double())

    def no_bias(layer: Layer) -> None:
        layer.weights[4] = 0 * layer.weights[4]

    def exchanged(layer: Layer) -> None:
        layer.proj[:, 12:16], layer.proj[:, 16:20] = layer.proj[:, 16:20].clone(), layer.proj[:, 12:16].clone()

    for change in (no_bias, exchanged):
        layer = Layer(shape)
        change(layer)
        assert not accepts(layer.step(tokens, row, position), reference, reference.double())
    layer = Layer(shape)
    head = layer.step(tokens[:4], row[:4], position[:4])
    layer.conv[:, 0] = 0
    tail = layer.step(tokens[4:], row[4:], position[4:])
    assert not accepts(torch.cat([head, tail]), reference, reference.double())


def test_padding_touches_nothing(device: str) -> None:
    """Also not where its inputs are nan, and also between the rows of others."""
    layer = Layer(SHAPES[1], device)
    layer.proj[2] = layer.dt[2] = math.nan
    y = layer.step([2, 0, 2, 2, 1, 2], [-1, 4, -1, -1, 7, -1], [0, 0, 3, 0, 0, 9])
    assert not y[[0, 2, 3, 5]].any() and torch.isfinite(y).all()
    untouched = [s for s in range(SLOTS) if s not in (4, 7)]
    assert torch.isnan(layer.conv[untouched]).all() and torch.isnan(layer.ssm[untouched]).all()
    assert torch.isfinite(layer.conv[[4, 7]]).all() and torch.isfinite(layer.ssm[[4, 7]]).all()


def test_position_0_starts_anew(device: str) -> None:
    layer = Layer(SHAPES[1], device)
    first = layer.step([5, 6, 7], [3, 3, 3], [0, 1, 2])
    states = layer.conv[3].clone(), layer.ssm[3].clone()
    again = layer.step([5, 6, 7], [3, 3, 3], [0, 1, 2])  # over what the first call left
    assert bits_equal((again, layer.conv[3], layer.ssm[3]), (first, *states))
    later = layer.step([5], [3], [1])
    assert not torch.equal(later[0], first[0])


def test_a_row_is_alone(device: str) -> None:
    """The same token alone, among 40 others, and as the last of them."""
    shape = SHAPES[2]
    alone = Layer(shape, device)
    expected = alone.step([3, 4], [0, 0], [0, 1])
    for before in (0, 17, 39):
        crowd = Layer(shape, device)
        crowd.conv, crowd.ssm = (torch.cat([t] * 5) for t in (crowd.conv, crowd.ssm))
        others = [token for token in range(5, 45)]
        slots = list(range(1, 41))
        tokens = [*others[:before], 3, 4, *others[before:]]
        y = crowd.step(tokens, [*slots[:before], 0, 0, *slots[before:]], [*[0] * before, 0, 1, *[0] * (40 - before)])
        got = (y[before : before + 2], crowd.conv[0], crowd.ssm[0])
        assert bits_equal(got, (expected, alone.conv[0], alone.ssm[0]))


def test_threads_do_not_matter(threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2):
        threads(count)
        layer = Layer(SHAPES[1])
        results.append((decode(layer), layer.conv.nan_to_num(), layer.ssm.nan_to_num()))
    assert bits_equal(*results)


def test_into_a_buffer_and_recorded(device: str) -> None:
    """`out` is written and returned; a recorded call reads what its tensors hold when it runs, also new weights."""
    shape = SHAPES[1]
    layer = Layer(shape, device)
    at = lambda *numbers: torch.tensor(numbers, device=device)
    row, position, out = at(1, -1, 2), at(0, 0, 0), torch.full((3, shape.channels), math.nan, device=device)
    call = lambda: mamba_step(
        layer.proj[:3], layer.dt[:3], layer.conv, layer.ssm, row, position, *layer.weights, out=out
    )
    assert call() is out and not out[1].any() and torch.isfinite(out).all()
    if device == "cpu":
        program = _C.Program()
        program.begin()
        call()
        program.end()
        run = program.run
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run = graph.replay
    for tensor in (layer.weights[2], layer.proj, layer.dt):
        tensor.neg_()
    row.copy_(at(-1, 2, 5))
    run()
    got = out.clone()
    assert not got[0].any() and bits_equal([got], [call()])


@pytest.mark.gpu
def test_bfloat16(device: str) -> None:
    if device == "cpu":
        pytest.skip("on a CPU the op is fp32")
    shape = SHAPES[1]
    layer = Layer(shape, device, torch.bfloat16)
    tokens, row, position = map(list, zip(*tokens_of(shape.lengths), strict=True))
    y = layer.step(tokens, row, position)
    assert y.dtype == torch.bfloat16
    exact = Layer(shape)
    exact.proj, exact.dt = (t.bfloat16().float() for t in (exact.proj, exact.dt))
    expected = exact.step(tokens, row, position)
    assert_accurate(y.float(), expected.bfloat16().float(), expected.double(), "y")


def test_arguments_are_checked() -> None:
    layer = Layer(Shape((3,), 8, 4, 2, 4))
    with pytest.raises(ValueError, match=r"row must be in \[-1, 11\) .*, got 11 at 1"):
        layer.step([0, 1], [0, 11], [0, 0])
    layer.proj = layer.proj[:, :20]
    with pytest.raises(ValueError, match=r"proj must have at least 2D\+2X = 24 columns .*, got \[1, 20\]"):
        layer.step([0], [0], [0])
    layer = Layer(Shape((3,), 8, 4, 2, 4))
    with pytest.raises(ValueError, match=r"out must have shape \[1, 8\], got \[2, 8\]"):
        layer.step([0], [0], [0], out=torch.zeros(2, 8))
    layer.conv = layer.conv[:, :2]
    with pytest.raises(ValueError, match="conv_state must have shape"):
        layer.step([0], [0], [0])
    layer = Layer(Shape((3,), 8, 4, 2, 4))
    layer.ssm = layer.ssm.double()
    with pytest.raises(ValueError, match="ssm_state must be float32, got float64"):
        layer.step([0], [0], [0])
    layer.dt = layer.dt[:, :4]
    with pytest.raises(ValueError, match=r"dt must have shape \[1, 8\], got \[1, 4\]"):
        layer.step([0], [0], [0])
