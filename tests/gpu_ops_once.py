"""Each op once on small odd shapes, in every variant that launches another kernel: the program that compute-sanitizer
watches. Right answers are the op tests' business; here only the memory accesses count.

    python tests/gpu_ops_once.py [--device cuda|cpu] [--planted-overrun]

--planted-overrun instead reads past the end of a tensor on purpose: a checker that reports nothing then checks nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from pymathrl.ops._call import _C, DTYPES, view
from pymathrl.ops.attention import PAGE, attention, paged_attention
from pymathrl.ops.causal_conv1d import causal_conv1d
from pymathrl.ops.group_advantage import CENTRES, SCALES, group_advantage
from pymathrl.ops.linear import linear, linear_out
from pymathrl.ops.mamba_step import mamba_step
from pymathrl.ops.policy_loss import policy_loss
from pymathrl.ops.rms_norm import add_rms_norm, rms_norm, rms_norm_out
from pymathrl.ops.rotary import rotary
from pymathrl.ops.sample_token import sample_token, support_bytes
from pymathrl.ops.selective_scan import selective_scan
from pymathrl.ops.soft_embed import soft_embed
from pymathrl.ops.ssd import ssd_scan, ssd_step
from pymathrl.ops.swiglu import swiglu, swiglu_out
from pymathrl.ops.token_logprob import token_logprob, token_logprob_backward_

ROWS, VOCAB = 7, 1031  # a prime: the last vector of each row is a partial one


def run_group_advantage(device: str) -> None:
    reward = torch.rand(23).to(device)
    offsets = torch.tensor([0, 1, 9, 9, 23]).to(device)  # a group of one, an empty one, one longer than a few lanes
    tokens, baseline = torch.arange(1, 24).to(device), torch.rand(23).to(device)
    for centre in CENTRES:
        for scale in SCALES:
            group_advantage(
                reward, offsets, centre=centre, scale=scale,
                baseline=baseline if centre == "baseline" else None, tokens=tokens if scale == "token_whiten" else None,
            )  # fmt: skip


def run_policy_loss(device: str) -> None:
    n = 1543  # more than one block, the last one partial
    logp, old, mean, old_mean, ref, proxy, behaviour = (-3 * torch.rand(7, n)).to(device)
    advantage, coef, entropy = torch.randn(n).to(device), torch.full((n,), 1 / n).to(device), torch.rand(n).to(device)
    some = (torch.arange(n) % 3 > 0).to(device)
    link = some.clone()
    link[-1] = False
    offsets = torch.tensor([0, 5, 700, n]).to(device)
    forms = (
        {"form": "clip", "dual_clip": 10.0},
        {"form": "weighted", "weight": "clipped_ratio", "weight_low": 0.0, "weight_high": 1.2},
        {"form": "sequence", "sequence": "mean", "clip_low": 3e-4, "clip_high": 4e-4, "offsets": offsets},
        {"form": "rover", "mean_logp": mean, "old_mean_logp": old_mean, "link": link},
        {"form": "rover", "rover_level": "response", "offsets": offsets},
        {"form": "lp_reg", "proxy_logp": proxy, "selected": some},
        {"form": "sapo"},
        {"form": "vespo", "offsets": offsets, "behaviour_logp": behaviour, "tis_cap": 2.0},
    )
    for form in forms:
        policy_loss(logp, old, advantage, coef, mask=some, **form)
    add_ons = {
        "kl": "k3", "kl_coef": 0.1, "ref_logp": ref, "entropy": entropy, "entropy_coef": 0.01,
        "behaviour_logp": behaviour, "tis_cap": 2.0,
    }  # fmt: skip
    policy_loss(logp, old, advantage, coef, form="clip", **add_ons)
    policy_loss(logp, old, advantage, coef, form="clip", tis_level="sequence", offsets=offsets, **add_ons)


def run_token_logprob(device: str) -> None:
    ids = (torch.arange(ROWS) * 97 % VOCAB).to(device)
    grad = torch.randn(ROWS).to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.randn(ROWS, VOCAB + 5).to(dtype).to(device)
        for logits in (wide[:, :VOCAB], wide[:, 5:].contiguous()):  # a row stride, and dense rows of odd alignment
            out = token_logprob(logits, ids, min_p=0.05)
            token_logprob_backward_(logits, ids, out.lse, out.entropy, grad, grad)


def run_sample_token(device: str) -> None:
    uid, step = torch.arange(ROWS).to(device), torch.arange(ROWS).to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (3 * torch.randn(ROWS, VOCAB)).to(dtype).to(device)
        for options in ({}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}, {"top_p": 0.5}):
            sample_token(logits, 1, uid, step, **options)
            support = torch.empty(ROWS, support_bytes(VOCAB), dtype=torch.uint8).to(device)
            sample_token(logits, 1, uid, step, support=support, **options)


def run_soft_embed(device: str) -> None:
    uid, step = torch.arange(ROWS).to(device), torch.arange(ROWS).to(device)
    for width in (131, VOCAB, 9001):  # each size of the softmax's team
        logits = (3 * torch.randn(ROWS, width + 1)).to(device)[:, 1:].detach().requires_grad_()
        for dtype in activations(device):
            table = torch.randn(width, 45).to(device, dtype).requires_grad_()
            for top_k in (0, 9):
                options = {"temperature": 0.5, "sigma": 0.3, "top_k": top_k}
                drawn = soft_embed(logits.detach(), table.detach(), noise=(1, uid, step), **options)
                soft_embed(logits, table, inputs=drawn.inputs, **options).logp.sum().backward()


def run_attention(device: str) -> None:
    offsets = torch.tensor([0, 19, 19, 40]).to(device)
    for heads, kv_heads, head_dim in ((4, 2, 16), (5, 1, 40), (3, 3, 64), (2, 1, 256)):
        for dtype in activations(device):
            qkv = torch.randn(43, (heads + 2 * kv_heads) * head_dim).to(device, dtype).requires_grad_()
            attention(qkv, offsets, heads, kv_heads).sum().backward()
            slot = torch.tensor([0] * 40 + [-1, 1, 2]).to(device)
            position = torch.tensor([*range(40), 0, 0, 0]).to(device)
            table = torch.arange(9, dtype=torch.int32).view(3, 3).to(device)
            rope, norm = torch.rand(48, head_dim).to(device), torch.rand(head_dim).to(device)
            keys = torch.zeros(9, kv_heads, head_dim, PAGE).to(device, dtype)
            values, out = keys.transpose(2, 3).contiguous(), qkv.new_empty(43, heads * head_dim)
            shape = {"heads": heads, "kv_heads": kv_heads, "scale": 0.2}
            for options in ({}, {"q_norm": norm, "k_norm": norm}):
                paged_attention(qkv.detach(), position, slot, table, rope, keys, values, out, **shape, **options)


def activations(device: str) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)


def run_rms_norm(device: str) -> None:
    for dtype in activations(device):
        for width in (131, 2056):  # odd, and more vectors than threads
            x = torch.randn(517, width).to(dtype).to(device).requires_grad_()
            weight = torch.rand(width).to(dtype).to(device).requires_grad_()
            rms_norm(x, weight, 1e-6).sum().backward()
            h, y = add_rms_norm(x, x, weight, 1e-6)
            (h + y).sum().backward()
            rms_norm_out(x.detach(), weight.detach(), y.detach(), 1e-6, h.detach(), h.detach())


def run_rotary(device: str) -> None:
    rope = torch.randn(50, 40).to(device)
    position = (torch.arange(ROWS) * 7).to(device)
    for dtype in activations(device):
        qkv = torch.randn(ROWS, 9 * 40).to(dtype).to(device).requires_grad_()
        norms = torch.rand(2, 40).to(dtype).to(device).requires_grad_()
        rotary(qkv, position, rope, 5, 2, 0.2).sum().backward()
        rotary(qkv, position, rope, 5, 2, 0.2, norms[0], norms[1]).sum().backward()


def run_swiglu(device: str) -> None:
    for dtype in activations(device):
        for width in (131, 2056):
            gate_up = torch.randn(ROWS, 2 * width).to(dtype).to(device).requires_grad_()
            swiglu(gate_up).sum().backward()
            swiglu_out(gate_up.detach(), torch.empty(ROWS, width, dtype=dtype, device=device))


def run_ssd(device: str) -> None:
    offsets = torch.tensor([0, 1, 1, 68, 97]).to(device)
    for heads, width, groups, states in ((4, 5, 2, 7), (2, 33, 1, 20), (3, 16, 3, 64), (1, 8, 1, 65), (2, 70, 1, 200)):
        weights = torch.rand(3, heads).to(device).requires_grad_()
        initial = torch.randn(4, heads, states, width).to(device).requires_grad_()
        for dtype in activations(device):
            sizes = (heads * width, heads, groups * states, groups * states)
            joined = torch.randn(99, sum(sizes)).to(device, dtype).requires_grad_()
            tokens = joined.split(sizes, 1)
            for chunk in (16, 256):
                y, final = ssd_scan(
                    *tokens, *weights, offsets, groups=groups, initial=initial, chunk=chunk, return_final=True
                )
                (y.float().sum() + final.sum()).backward()
            row = torch.tensor([0] * 90 + [-1, 3, 1, 1, 1, -1, -1, 2, 2]).to(device)
            state = initial.detach().clone()
            ssd_step(*(t.detach() for t in tokens), state, row, torch.arange(99).to(device), *weights.detach())


def run_linear(device: str) -> None:
    x, w, bias = torch.randn(67, 45).to(device), torch.randn(129, 37).to(device), torch.randn(129).to(device)
    linear(x[:, :37].contiguous().requires_grad_(), w, bias, exact=True).sum().backward()
    linear_out(x[:, 5:42], w, torch.empty(67, 131).to(device)[:, :129], exact=True)  # rows apart, of odd alignment
    if device == "cuda":
        linear(x[:, :37].bfloat16(), w.bfloat16(), exact=True)


MAMBA = ((48, 16, 16), (96, 32, 16), (30, 10, 5), (256, 128, 128))  # D, X, N: one group, several, odd, the most states


def run_causal_conv1d(device: str) -> None:
    offsets = torch.tensor([0, 1, 1, 70, 72]).to(device)
    for channels, sources, states in MAMBA:
        for width in (2, 3, 4):
            for dtype in activations(device):
                x = torch.randn(75, sources + 3).to(device, dtype).requires_grad_()
                weight = torch.randn(channels, width).to(device).requires_grad_()
                initial = torch.randn(4, width - 1, sources).to(device).requires_grad_()
                for bias, before, silu in ((weight[:, 0].clone(), initial, True), (None, None, False)):
                    u, final = causal_conv1d(
                        x[:, 3:], weight, bias, offsets, group=states, initial=before, silu=silu, return_final=True
                    )
                    (u.sum() + final.sum()).backward()


def run_selective_scan(device: str) -> None:
    offsets = torch.tensor([0, 1, 1, 70, 72]).to(device)
    for channels, sources, states in MAMBA:
        for dtype in activations(device):
            wide = torch.randn(75, 2 * sources + 4 * channels + 1).to(device, dtype).requires_grad_()
            u, dt, z, b, c, _ = wide.split([channels, channels, channels, sources, channels, sources + 1], 1)
            a_log, d, bias = torch.rand(states + 2, channels).to(device).split([states, 1, 1])
            initial = torch.randn(4, states, channels).to(device).requires_grad_()
            for gate, before in ((z, initial), (None, None)):
                y, final = selective_scan(
                    u, dt, gate, b, c, a_log.t().contiguous(), d[0], bias[0], offsets, initial=before, return_final=True
                )
                (y.sum() + final.sum()).backward()


def run_mamba_step(device: str) -> None:
    row, position = (
        torch.tensor([-1, 0, 2, 2, 2, 2, 1, -1]).to(device),
        torch.tensor([0, 7, 0, 1, 2, 3, 2, 0]).to(device),
    )
    for channels, sources, states in MAMBA:
        for width in (2, 3, 4):
            for dtype in activations(device):
                proj = torch.randn(8, 2 * (channels + sources) + 3).to(device, dtype)
                conv, ssm = torch.zeros(3, width - 1, sources).to(device), torch.zeros(3, states, channels).to(device)
                weight, a_log = torch.randn(channels, width).to(device), torch.rand(channels, states).to(device)
                vectors = torch.rand(3, channels).to(device)
                dt = torch.randn(8, channels).to(device, dtype)
                mamba_step(proj, dt, conv, ssm, row, position, weight, vectors[0], a_log, vectors[1], vectors[2])


RUNS: dict[str, Callable[[str], None]] = {  # one per op of CMakeLists.txt
    "group_advantage": run_group_advantage,
    "policy_loss": run_policy_loss,
    "token_logprob": run_token_logprob,
    "sample_token": run_sample_token,
    "soft_embed": run_soft_embed,
    "attention": run_attention,
    "rms_norm": run_rms_norm,
    "rotary": run_rotary,
    "swiglu": run_swiglu,
    "linear": run_linear,
    "causal_conv1d": run_causal_conv1d,
    "selective_scan": run_selective_scan,
    "mamba_step": run_mamba_step,
    "ssd": run_ssd,
}


def planted_overrun() -> None:
    """group_advantage on a tensor that claims a million more elements than its memory holds."""
    count = 1 << 20
    reward = torch.zeros(8).to("cuda")
    claimed = _C.Tensor(reward.data_ptr(), DTYPES[reward.dtype], (count,), (1,), reward.get_device())
    offsets = torch.tensor([0, count]).to("cuda")
    out, equal = torch.zeros(count).to("cuda"), torch.zeros(1, dtype=torch.bool).to("cuda")
    stream = torch.cuda.current_stream().cuda_stream
    _C.group_advantage(claimed, view(offsets), None, None, view(out), view(equal), 1, 0, 1e-6, 1, stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--planted-overrun", action="store_true", help="an access out of bounds, on purpose (cuda)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.planted_overrun:
        planted_overrun()
        torch.cuda.synchronize()
        return
    for op, run in RUNS.items():
        run(args.device)
        if args.device == "cuda":
            torch.cuda.synchronize()
        print(f"{op}: done")


if __name__ == "__main__":
    main()
