"""policy_loss: hand-sized values of every form, the float64 oracle, invariants, splits, bad input."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from policy_cases import CASES, call, draw, part

from pymathrl.ops import aggregation_coef, merge_stats, policy_loss, policy_loss_ref
from pymathrl.ops.policy_loss import MAXIMA, MINIMA, STATS, SUMS
from tests.oracle import assert_accurate

# One group of four answers, lengths 3, 2, 3, 1, rewards 1, 0, 0, 1; values worked by hand and in float64 numpy.
LENGTHS = torch.tensor([3, 2, 3, 1])
OFFSETS = torch.tensor([0, 3, 5, 8, 9])
OLD = torch.tensor([-1, -0.5, -2, -0.7, -1.2, -0.3, -3, -0.9, -1.5])
LOGP = torch.tensor([-0.7, -0.5, -1.5, -1, -0.9, -0.3, -1.7, -0.9, -1.1])
REF = torch.tensor([-0.9, -0.6, -1.8, -0.8, -1.1, -0.4, -2.5, -1, -1.4])
BEHAVIOUR = OLD + torch.tensor([0.1, -0.3, -1, 0, 0, 0.5, -0.2, 0, -0.9])
SIGN = torch.tensor([1.0, -1, -1, 1]).repeat_interleave(LENGTHS)
GRPO = 0.866024 * SIGN
RLOO = 2 / 3 * SIGN
ALL = torch.ones(9, dtype=torch.bool)
MEAN = torch.full((9,), 1 / 9)


def close(got: torch.Tensor | float, expected: list[float] | float, atol: float = 2e-6) -> None:
    got = torch.as_tensor(got).detach().cpu()
    torch.testing.assert_close(got, torch.tensor(expected), atol=atol, rtol=1e-5)


def to(device: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: t.to(device) for name, t in tensors.items()}


def toy(device: str = "cpu", coef: torch.Tensor = MEAN, advantage: torch.Tensor = GRPO, **options):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return policy_loss(LOGP.to(device), OLD.to(device), advantage.to(device), coef.to(device), **options)


def token_losses(device: str, **options) -> list[float]:
    """l of each token of the toy: one call per token."""
    return [float(toy(device, coef=torch.eye(9)[n], **options).loss) for n in range(9)]


def stat(result, name: str) -> float:
    return float(result.stats[STATS.index(name)])


# ---- hand-sized values -------------------------------------------------------------------------------------


def test_hand_table(device):
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    old = torch.tensor([-1.0, -1.5, -1.5, -1.0])
    a = torch.tensor([1.0, 1.0, -1.0, 2.0])
    mask = torch.tensor([1, 1, 1, 0], dtype=torch.uint8)
    expected = [(-1.0, -1.0), (-1.28, 0.0), (1.648721, 1.648721), (0.0, 0.0)]
    for n, (loss, grad) in enumerate(expected):
        coef = torch.eye(4)[n]
        t = to(device, logp=logp, old_logp=old, advantage=a, coef=coef, mask=mask)
        out = policy_loss(**t, form="clip", clip_low=0.2, clip_high=0.28)
        close(out.loss, loss)
        close(out.grad_logp[n], grad)


PLAIN = [-1.039229, -0.866024, -1.039229, 0.692819, 1.169010, 0.866024, 3.177699, 0.866024, -1.039229]
HIGHER = [-1.108511 if x == -1.039229 else x for x in PLAIN]  # the three capped positives
DUAL_3 = [2.598072 if x == 3.177699 else x for x in PLAIN]


@pytest.mark.parametrize(
    "options, expected",
    [({}, PLAIN), ({"clip_high": 0.28}, HIGHER), ({"dual_clip": 3.0}, DUAL_3), ({"dual_clip": 10.0}, PLAIN)],
)
def test_clip_values(device, options, expected):
    close(torch.tensor(token_losses(device, form="clip", **options)), expected)


def test_clip_gradient_and_counts(device):
    out = toy(device, form="clip")
    close(out.grad_logp, [0, -0.096225, 0, 0, 0.129890, 0.096225, 0.353078, 0.096225, 0])
    assert [stat(out, k) for k in ("tokens", "clip_low", "clip_high", "dual_clip")] == [9, 1, 3, 0]
    dual = toy(device, form="clip", dual_clip=3.0)
    close(dual.grad_logp, [0, -0.096225, 0, 0, 0.129890, 0.096225, 0, 0.096225, 0])
    assert stat(dual, "dual_clip") == 1
    close(stat(dual, "ratio_max"), 3.669297)
    close(stat(dual, "log_ratio_abs_max"), 1.3)


def test_delta_caps_the_ratio_itself(device):
    out = toy(device, form="clip", delta=2.0, coef=torch.eye(9)[6])
    close(out.loss, 0.866024 * 2)
    close(out.grad_logp[6], 0.0)
    out = toy(device, form="clip", delta=2.0, coef=torch.eye(9)[4])  # r = 1.349859 is below the cap
    close(out.loss, 1.169010)


@pytest.mark.parametrize(
    "mode, plain, higher",
    [
        ("token-mean", 0.309763, 0.286669),
        ("seq-mean-token-sum", 0.696966, 0.645005),
        ("seq-mean-token-mean", 0.136694, 0.107826),
        ("dr_grpo", 0.232322, 0.215002),
        ("seq-mean-token-sum-norm", 0.929289, 0.860007),
    ],
)
def test_aggregation_values(device, mode, plain, higher):
    coef = aggregation_coef(mode, ALL.to(device), OFFSETS.to(device), tokens=9, sequences=4, max_length=3)
    close(toy(device, coef=coef, form="clip").loss, plain)
    close(toy(device, coef=coef, form="clip", clip_high=0.28, dual_clip=10.0).loss, higher)


def test_gspo_values(device):
    coef = aggregation_coef("seq-mean-token-mean", ALL, OFFSETS, sequences=4)
    tight = {"form": "sequence", "offsets": OFFSETS, "clip_low": 3e-4, "clip_high": 4e-4}
    close(toy(device, coef=coef, **tight).loss, 0.117258)
    out = toy(device, coef=coef, **(tight | {"clip_low": 0.2, "clip_high": 0.2}))
    close(out.loss, 0.030828)
    close(out.grad_logp, [0, 0, 0, 0.108253, 0.108253, 0.111312, 0.111312, 0.111312, 0])
    losses = []
    for s in range(4):
        begin, end = int(OFFSETS[s]), int(OFFSETS[s + 1])
        t = to(device, logp=LOGP[begin:end], old_logp=OLD[begin:end], advantage=GRPO[begin:end])
        t |= to(device, coef=torch.full((end - begin,), 1 / (end - begin)), offsets=torch.tensor([0, end - begin]))
        losses.append(float(policy_loss(**t, form="sequence", clip_low=3e-4, clip_high=4e-4).loss))
    close(torch.tensor(losses), [-0.866370, 0.866024, 1.335747, -0.866370])


def test_sequence_ratio_stops_at_e10(device):
    t = to(device, logp=torch.tensor([-0.5, -0.5]), old_logp=torch.tensor([-15.5, -15.5]), advantage=-torch.ones(2))
    t |= to(device, coef=torch.full((2,), 0.5), offsets=torch.tensor([0, 2]))
    out = policy_loss(**t, form="sequence", clip_low=0.2, clip_high=0.2)
    close(out.loss, math.exp(10))
    close(out.grad_logp, [0.0, 0.0])


def test_cispo_values(device):
    out = toy(device, form="weighted", weight="clipped_ratio", weight_low=0.0, weight_high=1.2)
    close(out.loss, -0.057814)
    close(out.grad_logp, [-0.115470, -0.096225, -0.115470, 0.071285, 0.115470, 0.096225, 0.115470, 0.096225, -0.115470])
    assert (stat(out, "clip_low"), stat(out, "clip_high")) == (0, 5)


def test_rloo_values(device):
    coef = aggregation_coef("seq-mean-token-sum", ALL, OFFSETS, sequences=4)
    close(toy(device, coef=coef, advantage=RLOO, form="weighted").loss, -0.166667)
    coef = aggregation_coef("seq-mean-token-mean", ALL, OFFSETS, sequences=4)
    out = toy(
        device, coef=coef, advantage=RLOO, form="sequence", sequence="sum", offsets=OFFSETS, clip_low=0.2, clip_high=0.2
    )
    close(out.loss, 0.378216)
    # d mean_i(-A s_i) / d logp_t = -A s_i / 4 for each token of a sequence that is not clipped: s = 1 and 3.669297
    close(out.grad_logp, [0, 0, 0, 0.166667, 0.166667, 0.611549, 0.611549, 0.611549, 0])


@pytest.mark.parametrize(
    "kl, value", [("k1", 0.211111), ("k2", 0.053889), ("k3", 0.044927), ("k1+", 0.211111), ("k3+", 0.044927)]
)
def test_kl_values(device, kl, value):
    zero = torch.zeros(9)
    out = toy(device, advantage=zero, form="clip", kl=kl, kl_coef=1.0, ref_logp=REF)
    close(out.loss, value)
    close(stat(out, "kl") / 9, value)
    x = LOGP - REF
    slope = {"k1": torch.ones(9), "k3": 1 - torch.exp(-x)}.get(kl, x)
    close(out.grad_logp, (slope / 9).tolist())


def test_k3_is_exact_near_zero_and_flat_when_large(device):
    logp = torch.tensor([-1.0, -5.0, -1.0])
    ref = torch.tensor([-1.0009765625, -1.0, -1.0])
    coef, zero = torch.eye(3), torch.zeros(3)
    options = {"form": "clip", "kl": "k3", "kl_coef": 1.0}
    rows = [
        policy_loss(**to(device, logp=logp, old_logp=logp, advantage=zero, coef=c, ref_logp=ref), **options)
        for c in coef
    ]
    d = -0.0009765625
    assert float(rows[0].loss) == pytest.approx(math.expm1(d) - d, rel=1e-6)
    assert float(rows[1].loss) == 10.0 and float(rows[1].grad_logp[1]) == 0.0
    assert float(rows[2].loss) == 0.0 and float(rows[2].grad_logp[2]) == 0.0


def test_tis_values(device):
    options = {"form": "clip", "behaviour_logp": BEHAVIOUR, "tis_cap": 2.0}
    out = toy(device, **options)
    close(out.loss, 0.096457)
    weights = [0.904837, 1.349859, 2, 1, 1, 0.606531, 1.221403, 1, 2]
    close(stat(out, "tis_weight"), sum(weights), atol=1e-5)
    close(stat(out, "tis_weight_square"), sum(w * w for w in weights), atol=1e-5)
    assert stat(out, "tis_clipped") == 2
    for sequence, w in zip(range(4), [3.320117, 1, 0.740818, 2.459603], strict=True):
        n = int(OFFSETS[sequence])
        coef = torch.zeros(9).index_fill(0, torch.arange(n, int(OFFSETS[sequence + 1])), 1.0)
        wide = {"behaviour_logp": BEHAVIOUR, "tis_cap": 100.0, "tis_level": "sequence", "offsets": OFFSETS}
        out = toy(device, coef=coef, advantage=-1 / LOGP, form="weighted", **wide)  # l = w
        close(out.loss / coef.sum().to(device), float(w))


@pytest.mark.parametrize(
    "log_ratio, level, cap, mode, expected",
    [
        ([0.01, -0.02, 0.9, 0], "token", 10.0, "truncate", [1.0101, 0.9802, 2.4596, 1]),
        ([0.01, -0.02, 0.9, 0], "token", 2.0, "truncate", [1.0101, 0.9802, 2.0, 1]),
        ([0.01, -0.02, 0.9, 0], "token", 2.0, "mask", [1.0101, 0.9802, 0.0, 1]),
        ([0.01, -0.02, 0.9, 0], "sequence", 10.0, "truncate", [2.4351] * 4),
        ([0.01, -0.02, 0.9, 0], "geometric", 10.0, "truncate", [1.2492] * 4),
        ([0.5, 0.5, 0.5, -0.1], "sequence", 10.0, "truncate", [4.0552] * 4),
        ([0.5, 0.5, 0.5, -0.1], "sequence", 3.0, "mask", [0.0] * 4),
        ([0.5, 0.5, 0.5, -0.1], "sequence", 3.0, "truncate", [3.0] * 4),
        ([0.5, 0.5, 0.5, -0.1], "geometric", 10.0, "truncate", [1.4191] * 4),
    ],
)
def test_importance_weights_of_the_sampler(device, log_ratio, level, cap, mode, expected):
    x = torch.tensor(log_ratio)
    one = torch.ones(4)
    offsets = {} if level == "token" else to(device, offsets=torch.tensor([0, 4]))
    t = to(device, logp=-one, old_logp=-one, advantage=one, coef=one, behaviour_logp=-one - x)
    out = policy_loss(**t, **offsets, form="weighted", tis_cap=cap, tis_mode=mode, tis_level=level)
    close(-out.grad_logp, expected, atol=1e-4)  # g = -w A


def test_tis_weighs_the_policy_part_only(device):
    kl = {"kl": "k3", "kl_coef": 0.7, "ref_logp": REF}
    tis = {"behaviour_logp": BEHAVIOUR, "tis_cap": 2.0}
    both, policy = toy(device, form="clip", **kl, **tis), toy(device, form="clip", **tis)
    divergence = toy(device, form="clip", advantage=torch.zeros(9), **kl)
    close(both.loss, float(policy.loss + divergence.loss))
    close(both.grad_logp, (policy.grad_logp + divergence.grad_logp).tolist())


ROVER_NEW = torch.tensor([[2, 1, 0, -1], [0.5, 1.5, -0.5, 0], [1, 1, 1, -2]], dtype=torch.float64)
ROVER_OLD = torch.tensor([[1.5, 1, 0, -1], [0.5, 1, -0.5, 0.5], [1, 0.5, 1, -1]], dtype=torch.float64)


def rover_inputs(device: str, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    new, old = ((z / temperature).log_softmax(1) for z in (ROVER_NEW, ROVER_OLD))
    row = torch.arange(3)
    t = {"logp": new[row, row], "old_logp": old[row, row], "mean_logp": new.mean(1), "old_mean_logp": old.mean(1)}
    t |= {"advantage": torch.full((3,), 0.5), "coef": torch.full((3,), 1 / 3)}
    return {name: v.float().to(device) for name, v in t.items()} | to(
        device, link=torch.tensor([1, 1, 0], dtype=torch.uint8)
    )


def test_rover_worked_example(device):
    t = rover_inputs(device)
    close(t["logp"], [-0.440190, -0.546006, -1.115072])
    close(t["mean_logp"], [-1.940190, -1.671006, -1.865072])
    out = policy_loss(**t, form="rover")
    close(out.loss, 0.130725)
    close(out.grad_logp, [-0.091068, 0.050575, -0.404289])
    for n, (q, next_q, target) in enumerate(
        zip([0.207827, 0.344430, -0.106433], [-0.155570, -0.231433, 0], [0.344430, 0.268567, 0.5], strict=True)
    ):
        one = policy_loss(**(t | to(device, coef=torch.eye(3)[n])), form="rover")
        close(torch.tensor([stat(one, k) for k in ("q", "next_q", "target")]), [q, next_q, target])
    close(stat(out, "q_max"), 0.344430)
    close(stat(out, "q_min"), -0.106433)
    close(stat(out, "target_max"), 0.5)
    close(stat(out, "next_q_min"), -0.231433)
    assert (stat(out, "q_above"), stat(out, "q_below")) == (0, 0)


def test_rover_at_temperature(device):
    t = rover_inputs(device, temperature=0.6)
    close(t["logp"], [-0.208060, -0.267455, -1.100856])
    out = policy_loss(**t, form="rover")
    close(out.loss, 0.200501)
    close(stat(out, "next_q"), -0.432302 - 0.404861)


def test_rover_clip_value(device):
    out = policy_loss(**rover_inputs(device), form="rover", rover_clip=0.2)
    close(out.loss, 0.133265)
    close(out.grad_logp[0], 0.0)
    assert (stat(out, "clip_low"), stat(out, "clip_high")) == (0, 1)


def test_rover_on_policy_is_twice_reinforce(device):
    t = to(device, logp=LOGP, advantage=GRPO, coef=MEAN)
    rover = policy_loss(old_logp=None, **t, form="rover")
    reinforce = policy_loss(old_logp=None, **t, form="weighted")
    assert torch.equal(rover.grad_logp, 2 * reinforce.grad_logp)
    assert stat(rover, "q") == stat(rover, "next_q") == 0


def test_rover_over_responses(device):
    """By hand: Q = 2 (mean of x) = (.533333, 0, .866667, .8), A = (.5, -.5, -.5, .5), and the mean over responses."""
    coef = aggregation_coef("seq-mean-token-mean", ALL, OFFSETS, sequences=4)
    options = {"form": "rover", "rover_level": "response", "rho": 2.0, "offsets": OFFSETS}
    out = toy(device, coef=coef, advantage=0.5 * SIGN, **options)
    residual = [0.033333, 0.5, 1.366667, 0.3]
    close(out.loss, sum(x * x for x in residual) / 4)
    lengths = LENGTHS.tolist()
    slope = [2 * 2.0 * x / (4 * n) for x, n in zip(residual, lengths, strict=True) for _ in range(n)]
    close(out.grad_logp, slope, atol=3e-6)
    close(stat(out, "q_max"), 0.866667)
    assert stat(out, "next_q") == 0


def test_sapo_values(device):
    """Slope 1 in r at r = 1; the temperature of the gate goes by the sign of A."""
    sigmoid = lambda u: 1 / (1 + math.exp(-u))
    options = {"form": "sapo", "tau_positive": 2.0, "tau_negative": 4.0}
    losses, grad = token_losses(device, **options), 9 * toy(device, **options).grad_logp
    for n, r, tau, a in (
        (0, math.exp(0.3), 2.0, 0.866024),
        (1, 1.0, 2.0, 0.866024),
        (6, math.exp(1.3), 4.0, -0.866024),
    ):
        gate = sigmoid(tau * (r - 1))
        close(losses[n], -a * 4 / tau * gate)
        close(grad[n], -a * r * 4 * gate * (1 - gate))
    close(grad[1], -0.866024)
    far = policy_loss(**to(device, logp=torch.tensor([-0.1, -40.0]), old_logp=torch.tensor([-30.0, -0.1]),
                           advantage=torch.tensor([-1.0, -1.0]), coef=torch.ones(2)),
                      form="sapo", tau_negative=200.0)  # fmt: skip
    close(far.loss, 4 / 200)
    assert far.grad_logp.tolist() == [0.0, 0.0]


def test_vespo_values(device):
    """w = exp(.8, 0, 1.3, .4); phi = w^2 e^(3 (1 - w)) where A > 0, w^3 e^(2 (1 - w)) where A < 0; phi(1) = 1."""
    options = {"form": "vespo", "offsets": OFFSETS}
    w = [math.exp(x) for x in (0.8, 0.0, 1.3, 0.4)]
    phi = [
        w[0] ** 2 * math.exp(3 - 3 * w[0]),
        1.0,
        w[2] ** 3 * math.exp(2 - 2 * w[2]),
        w[3] ** 2 * math.exp(3 - 3 * w[3]),
    ]
    each = torch.tensor(phi).repeat_interleave(LENGTHS)
    out = toy(device, **options)
    close(out.grad_logp, (-each * GRPO / 9).tolist())
    close(out.loss, float((-each * GRPO * LOGP).sum() / 9))
    close(stat(out, "ratio_max"), w[2], atol=1e-5)
    # The sampler's weights, at most 2: of the last sequence 2 instead of e^.9, so that w = 2 e^.4.
    tis = toy(device, **options, behaviour_logp=BEHAVIOUR, tis_cap=2.0)
    w = 2 * math.exp(0.4)
    close(tis.grad_logp[8], -(w**2) * math.exp(3 - 3 * w) * 0.866024 / 9)
    masked = toy(device, **options, behaviour_logp=BEHAVIOUR, tis_cap=2.0, tis_mode="mask")
    assert abs(float(masked.grad_logp[8])) < 1e-14  # w = e^.4 1e-8


def test_luspo_is_gspo_times_the_length(device):
    tight = {"form": "sequence", "offsets": OFFSETS, "clip_low": 3e-4, "clip_high": 4e-4}
    coef = aggregation_coef("seq-mean-token-sum", ALL, OFFSETS, sequences=4)
    close(toy(device, coef=coef, **tight).loss, (3 * -0.866370 + 2 * 0.866024 + 3 * 1.335747 - 0.866370) / 4, atol=1e-5)


def test_kl_times_the_ratio(device):
    """d/dlogp r (e^-x + x - 1) = r x: the gradient of the reverse KL, x = logp - ref, also where r = 1."""
    options = {"form": "clip", "kl": "k3", "kl_coef": 1.0, "kl_ratio": True, "ref_logp": REF}
    out = toy(device, advantage=torch.zeros(9), **options)
    ratio, x = (LOGP - OLD).exp(), LOGP - REF
    close(out.loss, float((ratio * (torch.exp(-x) + x - 1)).sum() / 9))
    close(out.grad_logp, (ratio * x / 9).tolist())
    on_policy = policy_loss(**to(device, logp=LOGP, advantage=torch.zeros(9), coef=MEAN), old_logp=None,
                            **options | to(device, ref_logp=REF))  # fmt: skip
    close(on_policy.grad_logp, (x / 9).tolist())


@pytest.mark.parametrize(
    "logp, expected",
    [(0.012, (1.000032, 0.991935, 1)), (0.006, (0.814950, -0.516129, 1)), (0.013, (13 / 12, 13 / 12, 0))],
)
def test_lp_reg_worked_example(device, logp, expected):
    p = torch.tensor([0.60, 0.30, 0.08, 0.012, 0.008], dtype=torch.float64)
    kept = p >= 0.02 * p.max()  # the threshold equals p[3], which stays
    proxy = torch.where(kept, p, 0) / p[kept].sum()
    close(proxy.float(), [0.604839, 0.302419, 0.080645, 0.012097, 0])
    t = {
        "logp": torch.tensor([math.log(logp)]),
        "old_logp": p[3:4].log().float(),
        "proxy_logp": proxy[3:4].log().float(),
    }
    t |= {"advantage": -torch.ones(1), "coef": torch.ones(1), "selected": torch.ones(1, dtype=torch.bool)}
    out = policy_loss(**to(device, **t), form="lp_reg")
    close(torch.stack([out.loss, out.grad_logp[0]]), list(expected[:2]))
    assert stat(out, "selected") == expected[2]


def test_lp_reg_bounds_the_ratio_above_only(device):
    old = torch.full((3,), -math.log(100.0))
    logp = old + torch.tensor([12.0, 12.0, 0.05]).log()
    t = {"logp": logp, "old_logp": old, "advantage": torch.tensor([-1.0, 1.0, -1.0]), "coef": torch.ones(3)}
    t |= {"selected": torch.zeros(3, dtype=torch.bool), "proxy_logp": torch.zeros(3)}
    out = policy_loss(**to(device, **t), form="lp_reg")
    close(out.loss, 12 - 10 + 0.05, atol=1e-5)  # A < 0 is unbounded above: max() takes the free arm
    close(out.grad_logp, [12.0, 0.0, 0.05], atol=1e-5)


# ---- against float64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [4096, 3, 17, 1024 + 15])
def test_as_accurate_as_torch(device, case, n):
    data = draw(n, seed=n)
    kernel = call(data, case, device=device)
    ref32, ref64 = (call(data, case, dtype=d, reference=True) for d in (torch.float32, torch.float64))
    assert_accurate(kernel.grad_logp, ref32.grad_logp, ref64.grad_logp, case)
    # The loss is one number with cancellation: measured against the sum of the sizes of its terms.
    size = sum(float((data["coef"] * data["mask"] * f).abs().sum()) for f in (1, data["advantage"], data["logp"]))
    weight = max(1.0, float(ref64.stats[STATS.index("ratio_max")]))
    assert abs(float(kernel.loss) - float(ref64.loss)) <= 3e-7 * size * weight
    for name, got, expected in zip(STATS, kernel.stats.tolist(), ref64.stats.tolist(), strict=True):
        assert got == pytest.approx(expected, rel=2e-5, abs=2e-6 * n), name
    if kernel.grad_entropy is not None:
        assert_accurate(kernel.grad_entropy, ref32.grad_entropy, ref64.grad_entropy, "grad_entropy")


@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in ("weighted_ratio", "kl_k1+", "kl_k3+") and "vespo" not in c]
)
def test_reference_gradient_by_finite_differences(case):
    """The oracle itself: the gradient is the derivative of the loss in logp. (By design it is not for the weights of
    CISPO and VESPO and the straight-through estimators, which are not here.)"""
    data = {k: v.double() if v.is_floating_point() else v for k, v in draw(60, seed=3).items()}
    full = call(data, case, dtype=torch.float64, reference=True)
    step = 1e-6
    for n in range(0, 60, 4):
        up, down = (
            data["logp"].index_add(0, torch.tensor([n]), torch.tensor([s], dtype=torch.float64)) for s in (step, -step)
        )
        difference = [call(data, case, dtype=torch.float64, reference=True, logp=x).loss for x in (up, down)]
        slope = float(difference[0] - difference[1]) / (2 * step)
        assert slope == pytest.approx(float(full.grad_logp[n]), rel=1e-5, abs=1e-9)


def test_hundred_thousand_rows(device):
    data = draw(200_003, seed=5)
    kernel = call(data, "everything", device=device)
    ref64 = call(data, "everything", dtype=torch.float64, reference=True)
    assert float((kernel.grad_logp.cpu() - ref64.grad_logp).abs().max() / ref64.grad_logp.abs().max()) < 1e-6
    assert stat(kernel, "tokens") == float(data["mask"].sum())


# ---- invariants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "dr_grpo"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_any_split_gives_the_same_gradient(device, case, mode, masked):
    data = draw(700, seed=11)
    mask = data["mask"] if masked else torch.ones_like(data["mask"])
    data["mask"] = mask
    data["link"] = torch.cat([data["link"][:-1] & mask[1:], torch.tensor([False])])
    lengths = dict(tokens=int(mask.sum()), sequences=data["offsets"].numel() - 1, max_length=64)
    data["coef"] = aggregation_coef(mode, mask, data["offsets"], **lengths)
    whole = call(data, case, device=device, use_mask=masked)
    if "offsets" in CASES[case][1]:
        cuts = [[int(x) for x in data["offsets"][::2]] + [700], [int(x) for x in data["offsets"]]]
    else:
        cuts = [[0, 1, 33, 512, 700], [0, 699, 700], list(range(0, 701, 100))]
    for cut in cuts:
        parts = []
        for begin, end in pairwise(cut):
            chunk = part(data, begin, end)
            inside = (data["offsets"] >= begin) & (data["offsets"] <= end)
            chunk["offsets"] = data["offsets"][inside].unique() - begin if begin < end else torch.tensor([0])
            parts.append(call(chunk, case, device=device, use_mask=masked))
        assert torch.equal(torch.cat([p.grad_logp for p in parts]), whole.grad_logp)
        torch.testing.assert_close(torch.stack([p.loss for p in parts]).sum(), whole.loss, rtol=1e-5, atol=1e-6)
        merged = merge_stats([p.stats for p in parts])
        torch.testing.assert_close(merged, whole.stats, rtol=1e-5, atol=1e-4)
        extremes = slice(len(SUMS), None)
        assert torch.equal(merged[extremes], whole.stats[extremes])


@pytest.mark.parametrize("case", CASES)
def test_inactive_tokens_are_exactly_zero(device, case):
    data = draw(300, seed=7)
    clean = call(data, case, device=device)
    off = ~data["mask"]
    bad = dict(data)
    for k, value in enumerate(("logp", "old_logp", "advantage", "proxy_logp", "ref_logp", "entropy", "behaviour_logp")):
        poison = torch.tensor([math.nan, math.inf, -math.inf])[k % 3]
        bad[value] = torch.where(off, poison, data[value])
    dirty = call(bad, case, device=device)
    assert torch.equal(dirty.loss, clean.loss) and torch.equal(dirty.grad_logp, clean.grad_logp)
    assert torch.equal(dirty.stats, clean.stats)
    assert bool((dirty.grad_logp.cpu()[off] == 0).all())
    folded = call(bad, case, device=device, use_mask=False, coef=torch.where(off, 0.0, data["coef"]))
    assert torch.equal(folded.loss, clean.loss) and torch.equal(folded.grad_logp, clean.grad_logp)
    nothing = call(bad, case, device=device, mask=torch.zeros_like(off))
    assert float(nothing.loss) == 0 and bool((nothing.grad_logp == 0).all()) and stat(nothing, "tokens") == 0


@pytest.mark.parametrize("case", CASES)
def test_nan_of_an_active_token_reaches_the_loss(device, case):
    data = draw(100, seed=9)
    row = int(data["mask"].nonzero()[50])
    reads = {"logp", "advantage"} | {k for k in CASES[case][1] if data[k].is_floating_point()}
    if case not in ("weighted_one", "kl_k3+"):
        reads.add("old_logp")
    if "rover" in case:
        data["link"][row - 1] = data["mask"][row - 1] = True  # row's mean is read by the token before it
    data["selected"][row] = True
    for name in sorted(reads):
        bad = data | {name: data[name].clone()}
        bad[name][row] = math.nan
        assert math.isnan(float(call(bad, case, device=device).loss)), name


@pytest.mark.parametrize("case", CASES)
def test_thread_count_changes_nothing(threads, case):
    data = draw(30_000, seed=13)
    threads(1)
    one = call(data, case)
    threads(2)
    two = call(data, case)
    assert (
        torch.equal(one.loss, two.loss)
        and torch.equal(one.grad_logp, two.grad_logp)
        and torch.equal(one.stats, two.stats)
    )


def test_empty_call(device):
    e = torch.empty(0, device=device)
    out = policy_loss(e, e, e, e, form="clip")
    assert float(out.loss) == 0 and out.grad_logp.numel() == 0
    identity = torch.cat(
        [torch.zeros(len(SUMS)), torch.full((len(MAXIMA),), -math.inf), torch.full((len(MINIMA),), math.inf)]
    )
    assert torch.equal(out.stats.cpu(), identity)


def test_on_policy_equals_old_of_the_same_values(device):
    data = draw(500, seed=15)
    for case in ("clip", "weighted_ratio", "sequence_mean", "lp_reg"):
        same = call(data, case, device=device, old_logp=data["logp"])
        none = call(data, case, device=device, old_logp=None)
        assert torch.equal(none.grad_logp, same.grad_logp) and torch.equal(none.loss, same.loss)


@pytest.mark.gpu
def test_cuda_graph_replays_the_call():
    from tests.gpu import cuda_skip_reason

    if reason := cuda_skip_reason():
        pytest.skip(reason)
    data = {k: v.cuda() for k, v in draw(5000, seed=17).items()}
    eager = call(data, "everything", device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(data, "everything", device="cuda")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.grad_logp, eager.grad_logp) and torch.equal(captured.loss, eager.loss)
    assert torch.equal(captured.stats, eager.stats)


# ---- autograd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "ref"])
def test_backward_uses_the_gradient(reference):
    data = draw(200, seed=19)
    logits = data["logp"].clone().requires_grad_()
    entropy = data["entropy"].clone().requires_grad_()
    old = data["old_logp"].clone().requires_grad_()
    out = policy_loss(
        logits * 2,
        old,
        data["advantage"],
        data["coef"],
        form="clip",
        entropy=entropy,
        entropy_coef=0.1,
        reference=reference,
    )
    (3 * out.loss).backward()
    torch.testing.assert_close(logits.grad, 6 * out.grad_logp)
    torch.testing.assert_close(entropy.grad, 3 * out.grad_entropy)
    torch.testing.assert_close(entropy.grad, -0.3 * data["coef"])
    assert old.grad is None
    with torch.no_grad():
        assert not policy_loss(logits, None, data["advantage"], data["coef"], form="clip").loss.requires_grad


def test_reference_is_the_same_call():
    data = draw(200, seed=21)
    args = (data["logp"], data["old_logp"], data["advantage"], data["coef"])
    a, b = policy_loss(*args, form="clip"), policy_loss_ref(*args, form="clip")
    torch.testing.assert_close(a.grad_logp, b.grad_logp)
    torch.testing.assert_close(a.loss, b.loss)


# ---- aggregation -------------------------------------------------------------------------------------------


def test_aggregation_coefficients():
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    offsets = torch.tensor([0, 3, 3, 7])
    count = dict(tokens=10, sequences=4, max_length=5)
    expected = {
        "token-mean": [0.1, 0.1, 0, 0.1, 0.1, 0.1, 0],
        "seq-mean-token-sum": [0.25, 0.25, 0, 0.25, 0.25, 0.25, 0],
        "seq-mean-token-mean": [1 / 8, 1 / 8, 0, 1 / 12, 1 / 12, 1 / 12, 0],
        "dr_grpo": [0.05, 0.05, 0, 0.05, 0.05, 0.05, 0],
        "seq-mean-token-sum-norm": [0.2, 0.2, 0, 0.2, 0.2, 0.2, 0],
    }
    for mode, values in expected.items():
        close(aggregation_coef(mode, mask, offsets, **count), values)
    with pytest.raises(ValueError, match="mode must be one of"):
        aggregation_coef("mean", mask, offsets)
    with pytest.raises(ValueError, match=r"'dr_grpo' needs sequences > 0"):
        aggregation_coef("dr_grpo", mask, offsets, max_length=5)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "ppo"}, "form must be one of clip, weighted"),
        ({"form": "rover", "dual_clip": 3.0}, "form 'rover' does not read dual_clip"),
        ({"form": "clip", "link": ALL}, "link belongs to form 'rover'"),
        ({"form": "rover"}, "needs mean_logp, old_mean_logp and link, except"),
        ({"form": "rover", "link": ALL}, "together, or none"),
        ({"form": "rover", "beta": 0.0, "rover_clip": 1.5}, "rover_clip must be between 0 and 1"),
        ({"form": "rover", "rover_level": "row", "beta": 0.0}, "rover_level must be one of token, response"),
        ({"form": "rover", "rover_level": "response"}, "form 'rover' with rover_level 'response' needs offsets"),
        ({"form": "rover", "rover_level": "response", "beta": 1.0}, "does not read mean_logp"),
        ({"form": "vespo"}, "form 'vespo' needs offsets"),
        ({"form": "clip", "k_positive": 2.0}, "form 'clip' does not read k_positive"),
        ({"form": "sapo", "tau_positive": 0.0}, "tau_positive must be > 0 and finite, got 0.0"),
        (
            {"form": "vespo", "offsets": OFFSETS, "behaviour_logp": OLD, "tis_cap": 2.0, "tis_level": "sequence"},
            "takes the weight of tokens",
        ),
        ({"form": "clip", "behaviour_logp": OLD, "tis_cap": 0.0}, "tis_cap must be > 0, got 0.0"),
        ({"form": "clip", "kl_ratio": True}, "kl_ratio are not read with kl 'none'"),
        (
            {
                "form": "sequence",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "offsets": OFFSETS,
                "kl": "k3",
                "kl_coef": 0.1,
                "ref_logp": REF,
                "kl_ratio": True,
            },
            "kl_ratio is the ratio of a token",
        ),
        ({"form": "lp_reg", "selected": ALL}, "needs proxy_logp"),
        ({"form": "sequence", "offsets": OFFSETS}, "needs clip_low and clip_high"),
        ({"form": "sequence", "clip_low": 0.2, "clip_high": 0.2}, "needs offsets"),
        ({"form": "clip", "offsets": OFFSETS}, "offsets are read by forms 'sequence'"),
        ({"form": "weighted", "weight": "clipped_ratio"}, "needs weight_high"),
        ({"form": "weighted", "weight_high": 2.0}, "does not read weight_low and weight_high"),
        ({"form": "clip", "kl": "k3", "kl_coef": 0.1}, "kl 'k3' needs ref_logp"),
        ({"form": "clip", "kl": "k3", "ref_logp": REF}, "needs kl_coef"),
        ({"form": "clip", "ref_logp": REF}, "not read with kl 'none'"),
        ({"form": "clip", "entropy_coef": 0.1}, "entropy_coef needs entropy"),
        ({"form": "clip", "behaviour_logp": OLD}, "tis_cap go together"),
        ({"form": "clip", "mask": ALL[:3]}, r"mask must have shape \[9\], got \[3\]"),
        ({"form": "clip", "mask": ALL.float()}, "mask must be uint8 or bool, got float32"),
        (
            {"form": "sequence", "clip_low": 0.2, "clip_high": 0.2, "offsets": OFFSETS - 1},
            "offsets must rise from 0 to N = 9",
        ),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        toy(**options)


def test_error_of_dtype_and_layout():
    with pytest.raises(ValueError, match="logp must be float32, got bfloat16"):
        policy_loss(LOGP.bfloat16(), OLD, GRPO, MEAN, form="clip")
    with pytest.raises(ValueError, match="old_logp must be contiguous"):
        policy_loss(LOGP, OLD.repeat_interleave(2)[::2], GRPO, MEAN, form="clip")
    with pytest.raises(ValueError, match=r"advantage must have shape \[9\], got \[4\]"):
        policy_loss(LOGP, OLD, GRPO[:4], MEAN, form="clip")


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "ref"])
def test_rover_link_past_the_last_row_is_refused(reference):
    t = rover_inputs("cpu")
    t["link"] = torch.ones(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"give them N\+1 = 4 rows"):
        policy_loss(**t, form="rover", reference=reference)
    for name in ("mean_logp", "old_mean_logp"):
        t[name] = torch.cat([t[name], torch.tensor([-2.0])])
    assert stat(policy_loss(**t, form="rover", reference=reference), "tokens") == 3
