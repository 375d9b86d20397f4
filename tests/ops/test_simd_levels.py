"""The kernels compiled per level give the same bits on every processor level, and refuse a level that is not there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from pymathrl import _C
from pymathrl.ops.attention import PAGE, attention, paged_attention
from pymathrl.ops.causal_conv1d import causal_conv1d
from pymathrl.ops.mamba_step import mamba_step
from pymathrl.ops.rms_norm import add_rms_norm
from pymathrl.ops.rotary import rotary
from pymathrl.ops.sample_token import sample_token, support_bytes, support_unpack
from pymathrl.ops.selective_scan import selective_scan
from pymathrl.ops.soft_embed import soft_embed
from pymathrl.ops.ssd import ssd_scan, ssd_step
from pymathrl.ops.swiglu import swiglu
from pymathrl.ops.token_logprob import token_logprob, token_logprob_backward_

LEVELS = {"base": ("base",), "v3": ("base", "v3"), "v4": ("base", "v3", "v4")}[_C.simd_level()]


def digest() -> str:
    """A hash of everything that these kernels compute, over widths with and without a rest, and all dtypes."""
    h = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    for width in (5, 48, 1000, 4111):
        logits = 5 * torch.randn(7, width, generator=generator)
        logits[0, 2] = -torch.inf
        where = torch.arange(7)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            z = logits.to(dtype)
            forward = token_logprob(z, where % width, temperature=0.7, min_p=0.01)
            grads = torch.linspace(-1, 1, 7)
            dz = token_logprob_backward_(
                z.clone(), where % width, forward.lse, forward.entropy, grads, grads.flip(0), 0.7
            )
            results = [*forward, dz.float()]
            for kw in ({}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}):
                support = torch.empty(7, support_bytes(width), dtype=torch.uint8)
                drawn = sample_token(z, 1, where, where, support=support, **kw)
                masked = z.masked_fill(~support_unpack(support, width), -torch.inf)
                results += [*drawn, support, *token_logprob(masked, drawn.ids)[:-1]]
            table = torch.linspace(-1, 1, width * 37).view(width, 37)
            for top_k in (0, 3):
                mixed = soft_embed(z.float(), table, temperature=0.7, sigma=0.1, noise=(1, where, where), top_k=top_k)
                results += [x for name, x in mixed._asdict().items() if name != "inputs"]
            for x in results:
                h.update(x.numpy().tobytes())
    parts = (layer_parts, heads, attentions, mamba, scans)
    for results in (result for part in parts for result in part(generator)):
        for x in results:
            h.update(x.detach().numpy().tobytes())
    return h.hexdigest()


def with_gradients(op: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], *inputs: torch.Tensor) -> list:
    leaves = [x.requires_grad_() for x in inputs]
    out = op(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    return outs + list(torch.autograd.grad(outs, leaves, [x.detach().sin() for x in outs]))


def layer_parts(generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
    for width in (5, 64, 1003):
        x, residual, gate, up = 4 * torch.randn(4, 37, width, generator=generator)
        weight = torch.rand(width, generator=generator)
        yield with_gradients(lambda *t: add_rms_norm(*t, 1e-6), x, residual, weight)
        yield with_gradients(swiglu, torch.cat([gate, up], -1))


def heads(generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
    for head_dim in (8, 24, 40, 64, 128):
        qkv = torch.randn(13, 5 * head_dim, generator=generator)
        angle, position = torch.randn(20, head_dim // 2, generator=generator), torch.arange(13)
        rope = torch.cat(
            [angle.double().cos(), angle.double().sin()], -1
        ).float()  # torch's fp32 cos varies by processor
        norms = torch.rand(2, head_dim, generator=generator)
        turn = lambda x, q=None, k=None: rotary(x, position, rope, 3, 1, 0.3, q, k)  # noqa: B023  # called here
        yield with_gradients(turn, qkv)
        yield with_gradients(turn, qkv.detach(), norms[0].clone(), norms[1].clone())


def attentions(generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
    for heads, kv_heads, head_dim in ((4, 2, 8), (3, 1, 24), (5, 1, 64), (2, 2, 136)):
        qkv = torch.randn(53, (heads + 2 * kv_heads) * head_dim, generator=generator)
        offsets = torch.tensor([0, 35, 36, 52])
        yield with_gradients(lambda x: attention(x, offsets, heads, kv_heads), qkv)  # noqa: B023  # called here
        rope = torch.rand(40, head_dim, generator=generator)
        keys, values = torch.zeros(8, kv_heads, head_dim, PAGE), torch.zeros(8, kv_heads, PAGE, head_dim)
        slot = torch.tensor([0] * 35 + [1] + [2] * 16 + [-1])
        position = torch.cat([torch.arange(35), torch.arange(1), torch.arange(17)])
        table = torch.arange(9, dtype=torch.int32).clamp(max=7).view(3, 3)
        out = qkv.new_empty(53, heads * head_dim)
        weight = torch.rand(head_dim, generator=generator)
        for rows in (slice(None), slice(34, 35)):  # a run, and one token again
            paged_attention(
                qkv.detach()[rows], position[rows], slot[rows], table, rope, keys, values, out[rows],
                heads=heads, kv_heads=kv_heads, scale=0.2, q_norm=weight, k_norm=weight,
            )  # fmt: skip
            yield [out.clone(), keys, values]


def mamba(generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
    draw = lambda *size: torch.randn(*size, generator=generator)
    offsets = torch.tensor([0, 70, 71, 73])
    for channels, sources, states, width in ((8, 4, 2, 4), (96, 32, 16, 4), (32, 32, 16, 3), (40, 20, 20, 2)):
        x, weight, bias, initial = draw(75, sources), draw(channels, width), draw(channels), draw(3, width - 1, sources)
        conv = lambda x, w, b, i, group=states: causal_conv1d(
            x, w, b, offsets, group=group, initial=i, return_final=True
        )
        yield with_gradients(conv, x, weight, bias, initial)
        rows, bc, dt_bias = draw(3, 75, channels), draw(75, sources + channels), draw(channels)
        a_log, state = draw(channels, states), draw(3, states, channels)
        scan = lambda u, dt, z, b, c, a, d, bias, h: selective_scan(
            u, dt, z, b, c, a, d, bias, offsets, initial=h, return_final=True
        )
        b, c = (t.contiguous() for t in bc.split([sources, channels], 1))
        yield with_gradients(scan, *(t.clone() for t in rows), b, c, a_log, bias.detach().clone(), dt_bias, state)
        with torch.no_grad():
            row = torch.tensor([0] * 35 + [1] + [2] * 38 + [-1])
            position = torch.cat([torch.arange(35), torch.arange(1, 2), torch.arange(39)])
            proj = torch.cat([rows[0], x, b, c], 1)
            windows, states_of = initial.clone(), state.clone()
            vectors = (weight, bias, a_log, dt_bias, bias)
            yield [mamba_step(proj, rows[1], windows, states_of, row, position, *vectors), windows, states_of]


def scans(generator: torch.Generator) -> Iterator[list[torch.Tensor]]:
    for heads, width, groups, states in ((4, 5, 2, 7), (2, 64, 1, 20), (2, 70, 2, 128)):
        x, dt, b, c = (
            torch.randn(99, n, generator=generator) for n in (heads * width, heads, groups * states, groups * states)
        )
        weights, state = torch.rand(3, heads, generator=generator), torch.ones(3, heads, states, width)
        offsets, row = torch.tensor([0, 67, 67, 98]), torch.tensor([0] * 50 + [1, -1] + [2] * 47)
        yield with_gradients(
            lambda *t: ssd_scan(*t[:-1], offsets, groups=groups, initial=t[-1], chunk=70, return_final=True),  # noqa: B023  # called here
            x, dt, b, c, *weights.clone(), state,
        )  # fmt: skip
        state = state.detach().clone()
        yield [ssd_step(*(t.detach() for t in (x, dt, b, c)), state, row, torch.arange(99), *weights), state]


@pytest.mark.skipif(len(LEVELS) == 1, reason="this processor has one level only: nothing to compare")
def test_levels_agree_bit_for_bit() -> None:
    expected = digest()
    for level in LEVELS[:-1]:  # the last is the one this process runs
        environment = os.environ | {"PYMATHRL_SIMD": level}
        done = subprocess.run(
            [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        assert done.stdout.split() == [level, expected]


def test_unknown_level() -> None:
    code = "import torch; from pymathrl import _C; _C.simd_level()"
    environment = os.environ | {"PYMATHRL_SIMD": "v9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode != 0
    assert "PYMATHRL_SIMD must be a level that this processor has" in done.stderr


if __name__ == "__main__":
    print(_C.simd_level(), digest())
