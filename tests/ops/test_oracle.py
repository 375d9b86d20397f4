"""Tests of the tests: wrong kernels, fed to the comparison that accepts the right one, must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from policy_cases import call, draw

from pymathrl.ops import (
    aggregation_coef,
    group_advantage,
    group_advantage_ref,
    rotary,
    rotary_ref,
    sample_token,
    swiglu,
    swiglu_ref,
    token_logprob,
    token_logprob_ref,
)
from pymathrl.ops.policy_loss import STATS
from pymathrl.ops.sample_token import support_bytes, support_pack_ref, support_unpack
from tests.oracle import accepts, relative_l2, support_mask_

DATA = draw(4096, seed=0)
COUNT = int(DATA["mask"].sum())


def references(case: str, **changes):
    return (
        call(DATA, case, dtype=dtype, reference=True, **changes).grad_logp for dtype in (torch.float32, torch.float64)
    )


def autograd(loss_of) -> torch.Tensor:
    """Gradient of sum_n coef[n] l[n] over the unmasked tokens, for a formula written out here (fp32)."""
    logp = DATA["logp"].clone().requires_grad_()
    (DATA["coef"] * torch.where(DATA["mask"], loss_of(logp), 0.0)).sum().backward()
    return logp.grad


def next_q(mean: torch.Tensor, old_mean: torch.Tensor, link: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.where(link, mean[1:] - old_mean[1:], 0.0)


def rover_with(mean, link=DATA["link"], detach: bool = True):
    def loss(logp):
        target = DATA["advantage"] + 0.7 * next_q(mean(logp), DATA["old_mean_logp"], link)
        return (0.5 * (logp - DATA["old_logp"]) - (target.detach() if detach else target)) ** 2

    return autograd(loss)


def mean_of(logp: torch.Tensor) -> torch.Tensor:
    """The mean log-prob with a path to logp, as it has in a model: the same values, slope 1."""
    return DATA["mean_logp"] + torch.cat([logp - logp.detach(), torch.zeros(1)])


def cispo(logp, detach: bool):
    ratio = (logp - DATA["old_logp"]).exp().clamp(0.7, 1.2)
    return -(ratio.detach() if detach else ratio) * DATA["advantage"] * logp


def rover_response(logp, divide: bool = True):
    x = 3.0 * (logp - DATA["old_logp"])
    length = over_sequences(torch.ones_like(x)).clamp(min=1) if divide else 1.0
    return (over_sequences(x) / length + x - x.detach() - DATA["advantage"]) ** 2


def over_sequences(x: torch.Tensor) -> torch.Tensor:
    """Sum over the unmasked tokens of each sequence, at each of its tokens; a constant."""
    owner = torch.arange(SEQUENCE_LENGTH.numel()).repeat_interleave(SEQUENCE_LENGTH)
    x = torch.where(DATA["mask"], x.detach(), 0.0)
    return x.new_zeros(SEQUENCE_LENGTH.numel()).index_add(0, owner, x)[owner]


def sapo(logp, detach: bool = False):
    tau = torch.where(DATA["advantage"] > 0, 1.0, 4.0)
    ratio = (logp - DATA["old_logp"]).exp()
    gate = 4 * torch.sigmoid(tau * (ratio - 1)) / tau
    return -(gate.detach() * logp if detach else gate) * DATA["advantage"]


def vespo(logp, sign: float = 1.0, detach: bool = True):
    log_w = over_sequences(logp - DATA["old_logp"])
    log_w = (log_w if detach else log_w + logp - logp.detach()).clamp(-18.42, 20)
    negative = sign * DATA["advantage"] < 0
    k, decay = torch.where(negative, 3.0, 2.0), torch.where(negative, 2.0, 3.0)
    return -(k * log_w + decay * (1 - log_w.exp())).exp() * DATA["advantage"] * logp


def k3_loss(logp, d, factor=1.0):
    ratio = (logp - DATA["old_logp"]).exp()
    a = DATA["advantage"]
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    return policy + 0.5 * factor * (d.exp() - d - 1).clamp(max=10)


def grad(case: str, **changes) -> torch.Tensor:
    return call(DATA, case, **changes).grad_logp


SEQUENCE_LENGTH = DATA["offsets"].diff()
TIS = (DATA["old_logp"] - DATA["behaviour_logp"]).exp().clamp(max=1.2)
KL_SHARE = grad("everything") - grad("everything", kl_coef=0.0)

# name -> (the case it pretends to be, the gradient that a wrong kernel gives)
MUTANTS = {
    "no clipping": ("clip", lambda: grad("clip", clip_low=1.0, clip_high=1e9)),
    "clip_low and clip_high swapped": ("clip", lambda: grad("clip", clip_low=0.28, clip_high=0.2)),
    "symmetric clip": ("clip", lambda: grad("clip", clip_high=0.2)),
    "clips without regard to the sign of A": (
        "clip",
        lambda: autograd(lambda lp: -DATA["advantage"] * (lp - DATA["old_logp"]).exp().clamp(0.8, 1.28)),
    ),
    "advantage sign": ("clip", lambda: grad("clip", advantage=-DATA["advantage"])),
    "dropped ratio": ("clip", lambda: grad("clip", old_logp=None)),
    "ratio upside down": ("clip", lambda: grad("clip", logp=DATA["old_logp"], old_logp=DATA["logp"])),
    "mask ignored": ("clip", lambda: grad("clip", use_mask=False)),
    "target shifted by one": ("clip", lambda: grad("clip").roll(1)),
    "no dual clip": ("clip_dual", lambda: grad("clip")),
    "dual clip for both signs": (
        "clip_dual",
        lambda: torch.where((DATA["logp"] - DATA["old_logp"]).exp() > 1.1, 0.0, grad("clip_dual")),
    ),
    "delta taken as a dual clip": ("clip_delta", lambda: grad("clip_dual", dual_clip=1.2)),
    "mean over the chunk instead of the step": (
        "clip",
        lambda: grad("clip", coef=DATA["coef"] * 4096 / COUNT),
    ),
    "CISPO weight not detached": ("weighted_ratio", lambda: autograd(lambda lp: cispo(lp, detach=False))),
    "CISPO with PPO's dead zone": ("weighted_ratio", lambda: grad("clip", clip_low=0.3, clip_high=0.2)),
    "CISPO with a relative cap": ("weighted_ratio", lambda: grad("weighted_ratio", weight_high=2.2)),
    "token ratios instead of the sequence's": ("sequence_mean", lambda: grad("clip", clip_low=0.02, clip_high=0.03)),
    "sum of log-ratios instead of the mean": ("sequence_mean", lambda: grad("sequence_mean", sequence="sum")),
    "masked tokens in the sequence ratio": ("sequence_mean", lambda: grad("sequence_mean", use_mask=False)),
    "sequence gradient divided by the length once more": (
        "sequence_mean",
        lambda: grad("sequence_mean") / SEQUENCE_LENGTH.repeat_interleave(SEQUENCE_LENGTH),
    ),
    "ROVER without the factor 2": ("rover", lambda: grad("rover") / 2),
    "ROVER without rho in the slope": ("rover", lambda: grad("rover") / 0.5),
    "ROVER without the link of the next token": (
        "rover",
        lambda: rover_with(lambda lp: DATA["mean_logp"], link=torch.ones_like(DATA["link"])),
    ),
    "ROVER with its own row instead of the next": (
        "rover",
        lambda: grad("rover", mean_logp=DATA["mean_logp"].roll(1), old_mean_logp=DATA["old_mean_logp"].roll(1)),
    ),
    "ROVER without the next Q": ("rover", lambda: grad("rover", beta=0.0)),
    "ROVER target not detached": ("rover", lambda: rover_with(mean_of, detach=False)),
    "ROVER by token for ROVER by response": ("rover_response", lambda: grad("rover", rho=3.0, beta=0.0)),
    "ROVER's sum over a response for its mean": (
        "rover_response",
        lambda: autograd(lambda lp: rover_response(lp, divide=False)),
    ),
    "ROVER by response, gradient divided by the length once more": (
        "rover_response",
        lambda: grad("rover_response") / SEQUENCE_LENGTH.repeat_interleave(SEQUENCE_LENGTH),
    ),
    "ROVER by response over masked tokens": ("rover_response", lambda: grad("rover_response", use_mask=False)),
    "SAPO with its temperatures swapped": (
        "sapo",
        lambda: grad("sapo", tau_positive=4.0, tau_negative=1.0),
    ),
    "SAPO without 4/tau": ("sapo", lambda: grad("sapo") * torch.where(DATA["advantage"] > 0, 1.0, 4.0)),
    "SAPO's gate as a weight": ("sapo", lambda: autograd(lambda lp: sapo(lp, detach=True))),
    "SAPO as a hard clip": ("sapo", lambda: grad("clip")),
    "VESPO with the signs swapped": ("vespo", lambda: autograd(lambda lp: vespo(lp, sign=-1.0))),
    "VESPO not detached": ("vespo", lambda: autograd(lambda lp: vespo(lp, detach=False))),
    "VESPO with masked tokens in its weight": ("vespo", lambda: grad("vespo", use_mask=False)),
    "VESPO without its weight": ("vespo", lambda: grad("weighted_one")),
    "VESPO with TIS as a factor": ("vespo_tis", lambda: TIS * grad("vespo")),
    "VESPO without TIS": ("vespo_tis", lambda: grad("vespo")),
    "VESPO truncates TIS where it should mask": ("vespo_mask", lambda: grad("vespo_mask", tis_mode="truncate")),
    "KL by ratio, the ratio a constant": (
        "kl_ratio",
        lambda: autograd(lambda lp: k3_loss(lp, DATA["ref_logp"] - lp, (DATA["logp"] - DATA["old_logp"]).exp())),
    ),
    "KL not multiplied by the ratio": ("kl_ratio", lambda: grad("kl_ratio", kl_ratio=False)),
    "ROVER's clip left out": ("rover_clip", lambda: grad("rover", rho=1.0, beta=1.0)),
    "Lp-Reg on every candidate": ("lp_reg", lambda: grad("lp_reg", proxy_logp=DATA["proxy_logp"].abs())),
    "Lp-Reg without the proxy": ("lp_reg", lambda: grad("lp_reg", lp_reg_coef=0.0)),
    "Lp-Reg with a lower clip": ("lp_reg", lambda: grad("lp_reg", clip_low=0.2)),
    "k3 of the wrong sign": ("kl_k3", lambda: autograd(lambda lp: k3_loss(lp, lp - DATA["ref_logp"]))),
    "k3 with the gradient of k2": ("kl_k3", lambda: autograd(lambda lp: k3_loss(lp, torch.zeros_like(lp)) + 0.25
                                                           * (lp - DATA["ref_logp"]) ** 2)),
    "k1 instead of k3": ("kl_k3", lambda: grad("kl_k1")),
    "k3+ with the gradient of k3": ("kl_k3+", lambda: grad("kl_k3+", kl="k3")),
    "KL subtracted": ("kl_k3", lambda: grad("kl_k3", kl_coef=-0.5)),
    "TIS left out": ("tis_token", lambda: grad("clip", clip_high=0.2)),
    "TIS not truncated": ("tis_token", lambda: grad("tis_token", tis_cap=1e9)),
    "TIS of the current policy": (
        "tis_token",
        lambda: grad("tis_token", behaviour_logp=DATA["behaviour_logp"] - DATA["logp"] + DATA["old_logp"]),
    ),
    "TIS truncates where it should mask": ("tis_mask", lambda: grad("tis_token")),
    "TIS by token instead of sequence": ("tis_sequence", lambda: TIS * grad("weighted_one")),
    "TIS applied to the KL too": ("everything", lambda: grad("everything") + (TIS - 1) * KL_SHARE),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_policy_gradients_are_refused(name):
    case, wrong = MUTANTS[name]
    ref32, ref64 = references(case)
    assert accepts(grad(case), ref32, ref64)
    gradient = wrong()
    assert not accepts(gradient, ref32, ref64), f"accepted at relative L2 {relative_l2(gradient, ref64):.1e}"


@pytest.mark.parametrize(
    "case, formula",
    [
        ("rover", lambda: rover_with(lambda lp: DATA["mean_logp"])),
        ("rover", lambda: rover_with(mean_of)),
        ("rover_response", lambda: autograd(rover_response)),
        ("sapo", lambda: autograd(sapo)),
        ("vespo", lambda: autograd(vespo)),
        ("weighted_ratio", lambda: autograd(lambda lp: cispo(lp, detach=True))),
        ("kl_k3", lambda: autograd(lambda lp: k3_loss(lp, DATA["ref_logp"] - lp))),
        ("kl_ratio", lambda: autograd(lambda lp: k3_loss(lp, DATA["ref_logp"] - lp, (lp - DATA["old_logp"]).exp()))),
    ],
)
def test_the_formulas_of_the_mutants_are_right_unmutated(case, formula):
    """A mutant proves nothing if its formula was wrong for another reason."""
    assert accepts(formula(), *references(case))


def test_normaliser_of_each_micro_batch_is_refused():
    """Token means inside micro-batches, averaged: the gradient that a well-known trainer had for months."""
    lengths = [(0, 512), (512, 4096)]
    wrong = torch.cat([grad("clip")[b:e] * (COUNT / int(DATA["mask"][b:e].sum()) / len(lengths)) for b, e in lengths])
    assert not accepts(wrong, *references("clip"))


def test_sequence_mean_by_padded_length_is_refused():
    coef = aggregation_coef("seq-mean-token-mean", DATA["mask"], DATA["offsets"], sequences=SEQUENCE_LENGTH.numel())
    padded = aggregation_coef(
        "seq-mean-token-mean", torch.ones_like(DATA["mask"]), DATA["offsets"], sequences=SEQUENCE_LENGTH.numel()
    )
    assert accepts(grad("clip", coef=coef), *references("clip", coef=coef))
    assert not accepts(grad("clip", coef=padded), *references("clip", coef=coef))


@pytest.mark.parametrize("column, case", [("clip_low", "clip"), ("clip_high", "clip"), ("tis_clipped", "tis_token")])
def test_counts_differ_from_their_neighbours(column, case):
    """The flags are not interchangeable on these inputs, so that a swapped pair cannot pass the statistics test."""
    stats = dict(zip(STATS, call(DATA, case).stats.tolist(), strict=True))
    others = [v for k, v in stats.items() if k != column and not k.endswith(("_max", "_min"))]
    assert stats[column] > 100 and stats[column] not in others


GROUPS = torch.arange(0, 65, 8)
REWARD = (torch.rand(64, generator=torch.Generator().manual_seed(3)) * 3).round() * 0.35

ADVANTAGE_MUTANTS = {
    "population std": ({"scale": "group_std"}, {"scale": "group_std", "ddof": 0}),
    "eps 1e-4 for 1e-6": ({"scale": "group_std"}, {"scale": "group_std", "eps": 1e-4}),
    "std of the batch for the group's": ({"scale": "group_std"}, {"scale": "batch_std"}),
    "mean of the group for mean of the others": ({"centre": "leave_one_out"}, {}),
    "no centre": ({}, {"centre": "none"}),
    "samples weighted equally for tokens": (
        {"scale": "token_whiten", "tokens": torch.arange(1, 65)},
        {"scale": "token_whiten", "tokens": torch.ones(64, dtype=torch.int64)},
    ),
}


@pytest.mark.parametrize("name", ADVANTAGE_MUTANTS)
def test_wrong_advantages_are_refused(name):
    right, wrong = ADVANTAGE_MUTANTS[name]
    ref32 = group_advantage_ref(REWARD, GROUPS, **right).advantage
    ref64 = group_advantage_ref(REWARD.double(), GROUPS, **right).advantage
    assert accepts(group_advantage(REWARD, GROUPS, **right).advantage, ref32, ref64)
    assert not accepts(group_advantage(REWARD, GROUPS, **wrong).advantage, ref32, ref64)


HEADS, KV_HEADS, HEAD, SCALE = 3, 1, 16, 0.25
GENERATOR = torch.Generator().manual_seed(4)
QKV, DQKV = torch.randn(2, 40, (HEADS + 2 * KV_HEADS) * HEAD, generator=GENERATOR)
Q_NORM, K_NORM = 1 + 0.3 * torch.randn(2, HEAD, generator=GENERATOR)
PHASE = torch.outer(torch.arange(40.0), 100.0 ** -(torch.arange(0, HEAD, 2) / HEAD))
ROPE = torch.cat([PHASE.cos(), PHASE.sin()], -1)


def rotated(op=rotary_ref, x=QKV, rope=ROPE, position=None, scale=SCALE, norms=(Q_NORM, K_NORM), dtype=torch.float64):
    """Value and gradients of x and the norms, one after another."""
    x, q, k = (t.to(dtype).requires_grad_() for t in (x, *norms))
    position = torch.arange(40) if position is None else position
    out = op(x, position, rope.to(dtype), HEADS, KV_HEADS, scale, q, k)
    return [out.detach(), *torch.autograd.grad(out, (x, q, k), DQKV.to(dtype))]


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """A head as the layout of pairs (2j, 2j+1) would see it."""
    return x.unflatten(-1, (-1, HEAD // 2, 2)).transpose(-1, -2).flatten(-3)


def norm_after_rotation(x, position, rope, heads, kv_heads, scale, q_norm, k_norm):
    turned = rotary_ref(x, position, rope, heads, kv_heads, 1.0).unflatten(-1, (-1, HEAD))
    normed = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + 1e-6)
    q, k, v = normed[:, :heads] * q_norm * scale, normed[:, heads:-kv_heads] * k_norm, turned[:, -kv_heads:]
    return torch.cat([q, k, v], 1).flatten(1)


def norm_of_the_whole_projection(x, position, rope, heads, kv_heads, scale, q_norm, k_norm):
    q, k, v = x.split([heads * HEAD, kv_heads * HEAD, kv_heads * HEAD], -1)
    q, k = (part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-6) for part in (q, k))
    q, k = q * q_norm.repeat(heads), k * k_norm.repeat(kv_heads)
    return rotary_ref(torch.cat([q, k, v], -1), position, rope, heads, kv_heads, scale)


ROTARY_MUTANTS = {
    "rotated back": lambda: rotated(rope=torch.cat([PHASE.cos(), -PHASE.sin()], -1)),
    "sines before cosines": lambda: rotated(rope=torch.cat([PHASE.sin(), PHASE.cos()], -1)),
    "interleaved pairs": lambda: rotated(x=interleaved(QKV)),
    "norm after rotation": lambda: rotated(norm_after_rotation),
    "norm over all heads": lambda: rotated(norm_of_the_whole_projection),
    "norms swapped": lambda: rotated(norms=(K_NORM, Q_NORM)),
    "position shifted by one": lambda: rotated(position=torch.arange(40).roll(1)),
    "scale on the keys too": lambda: rotated(
        lambda x, *rest: (
            rotary_ref(x, *rest) * torch.cat([torch.ones(HEADS * HEAD), torch.full((HEAD,), SCALE), torch.ones(HEAD)])
        )
    ),
    "no scale": lambda: rotated(scale=1.0),
}


@pytest.mark.parametrize("name", ROTARY_MUTANTS)
def test_wrong_rotations_are_refused(name):
    ref32, ref64 = rotated(dtype=torch.float32), rotated()
    for ours, a, b, wrong in zip(
        rotated(rotary, dtype=torch.float32), ref32, ref64, ROTARY_MUTANTS[name](), strict=True
    ):
        assert accepts(ours, a, b)
        if wrong.shape == QKV.shape:  # a norm's gradient may be right by itself
            assert not accepts(wrong.float(), a, b)


def test_wrong_rotary_gradients_are_refused():
    ref32, ref64 = rotated(dtype=torch.float32), rotated()
    _, dx, dq, dk = ref64
    back = rotary_ref(
        DQKV.double(), torch.arange(40), torch.cat([PHASE.cos(), -PHASE.sin()], -1).double(), HEADS, KV_HEADS, SCALE
    )
    mutants = {
        1: [back, dx * torch.cat([torch.ones(64), torch.zeros(16)]), -dx],  # no norm; dv dropped
        2: [dk, dq / HEADS, dq / SCALE],
        3: [dq, dk / 40, 2 * dk],
    }
    for which, wrong in mutants.items():
        for mutant in wrong:
            assert not accepts(mutant.float(), ref32[which], ref64[which])


GATE_UP = 3 * torch.randn(50, 2 * 24, generator=GENERATOR)
DOUT = torch.randn(50, 24, generator=GENERATOR)


def activated(op, dtype=torch.float64):
    x = GATE_UP.to(dtype).requires_grad_()
    out = op(x)
    return out.detach(), torch.autograd.grad(out, x, DOUT.to(dtype))[0]


def halves(formula):
    return lambda x: formula(*x.chunk(2, -1))


SWIGLU_MUTANTS = {
    "silu(up) * gate": halves(lambda gate, up: F.silu(up) * gate),
    "gate and up interleaved": lambda x: F.silu(x[:, 0::2]) * x[:, 1::2],
    "gelu for silu": halves(lambda gate, up: F.gelu(gate) * up),
    "sigmoid for silu": halves(lambda gate, up: gate.sigmoid() * up),
    "quick gelu": halves(lambda gate, up: gate * (1.702 * gate).sigmoid() * up),
    "relu for silu": halves(lambda gate, up: gate.relu() * up),
}


@pytest.mark.parametrize("name", SWIGLU_MUTANTS)
def test_wrong_activations_are_refused(name):
    ref32, ref64 = activated(swiglu_ref, torch.float32), activated(swiglu_ref)
    for ours, a, b, wrong in zip(
        activated(swiglu, torch.float32), ref32, ref64, activated(SWIGLU_MUTANTS[name]), strict=True
    ):
        assert accepts(ours, a, b)
        assert not accepts(wrong.float(), a, b)


def test_wrong_slopes_of_the_activation_are_refused():
    gate, up = GATE_UP.double().chunk(2, -1)
    s, dout = gate.sigmoid(), DOUT.double()
    ref32, ref64 = activated(swiglu_ref, torch.float32)[1], activated(swiglu_ref)[1]
    dup = dout * gate * s
    assert accepts(torch.cat([dout * up * s * (1 + gate * (1 - s)), dup], -1).float(), ref32, ref64)
    for slope in (s, s * (1 - s), s * (1 - gate * (1 - s)), s * (1 + gate * s)):
        assert not accepts(torch.cat([dout * up * slope, dup], -1).float(), ref32, ref64)
    assert not accepts(torch.cat([dup, dout * up * s * (1 + gate * (1 - s))], -1).float(), ref32, ref64)


WIDTH = 1000
LOGITS = 5 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(4))
SUPPORT = torch.empty(64, support_bytes(WIDTH), dtype=torch.uint8)
DRAWN = sample_token(LOGITS, 0, torch.arange(64), torch.arange(64), top_p=0.9, support=SUPPORT)
KEPT = support_unpack(SUPPORT, WIDTH)


def scored(kept: torch.Tensor, dtype: torch.dtype = torch.float64):
    return token_logprob_ref(LOGITS.to(dtype).masked_fill(~kept, -torch.inf), DRAWN.ids)


def reversed_bits() -> torch.Tensor:
    """Bit 7 - j%8 for token j: the order of the other common packing."""
    packed = support_pack_ref(KEPT.view(64, -1, 8).flip(2).flatten(1))
    return support_unpack(packed, WIDTH)


SUPPORT_MUTANTS = {  # what a wrong mask gives for (logp, entropy, mean_logp)
    "wrong bit order": lambda: scored(reversed_bits()),
    "mask ignored": lambda: scored(torch.ones_like(KEPT)),
    "mask upside down": lambda: scored(~KEPT),
    "one token of the support missing": lambda: scored(KEPT.scatter(1, LOGITS.argmax(1, keepdim=True), False)),
    "rows shifted by one": lambda: scored(KEPT.roll(1, 0)),
    "renormaliser missing": lambda: scored(KEPT)._replace(
        logp=scored(torch.ones_like(KEPT)).logp,
        entropy=scored(KEPT).entropy - scored(torch.ones_like(KEPT)).logp + scored(KEPT).logp,
        mean_logp=scored(KEPT).mean_logp + scored(torch.ones_like(KEPT)).logp - scored(KEPT).logp,
    ),
}


@pytest.mark.parametrize("name", SUPPORT_MUTANTS)
def test_wrong_supports_are_refused(name):
    ours = token_logprob(support_mask_(LOGITS.clone(), SUPPORT), DRAWN.ids)
    ref32, ref64, wrong = scored(KEPT, torch.float32), scored(KEPT), SUPPORT_MUTANTS[name]()
    for number in ("logp", "entropy", "mean_logp"):
        assert accepts(getattr(ours, number), getattr(ref32, number), getattr(ref64, number))
        value = getattr(wrong, number).float()
        assert not accepts(value, getattr(ref32, number), getattr(ref64, number)), number


def test_mean_over_the_vocabulary_is_refused():
    """The sum over the support divided by V instead of the support's size."""
    ref32, ref64 = scored(KEPT, torch.float32).mean_logp, scored(KEPT).mean_logp
    assert not accepts((ref64 * KEPT.sum(1) / WIDTH).float(), ref32, ref64)
