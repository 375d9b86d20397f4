"""Policy losses: clipping (PPO, GRPO), weighted log-likelihood, sequence ratios, ROVER, Lp-Reg, SAPO, VESPO, with KL,
entropy and TIS.

One pass gives the loss, its gradient and the statistics, so a fused head can use the gradient without autograd, and any
other loop can call `.loss.backward()`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pymathrl.ops._call import _C, optional_view, stream, use_reference, view

FORMS = ("clip", "weighted", "sequence", "rover", "lp_reg", "sapo", "vespo")
KLS = ("none", "k1", "k2", "k3", "k1+", "k3+")
LEVELS = ("token", "sequence", "geometric")
SUMS, MAXIMA, MINIMA = _C.policy_loss_stats()
STATS = SUMS + MAXIMA + MINIMA  # the columns of PolicyLoss.stats

MAX_LOG_RATIO = 20.0  # the log-ratio is clamped here before exp (rover does not take exp and does not clamp)
MAX_SEQUENCE_LOG_RATIO = 10.0
MIN_WEIGHT_LOG_RATIO = math.log(1e-8)  # vespo's sequence weight stops here and at MAX_LOG_RATIO
MAX_K3 = 10.0

# The numbers each form reads, with their defaults; any other form-specific number is an error. None = must be given.
_FORM_NUMBERS: dict[str, dict[str, Any]] = {
    "clip": {"clip_low": 0.2, "clip_high": 0.2, "delta": math.inf, "dual_clip": math.inf},
    "weighted": {"weight": "one", "weight_low": 0.0, "weight_high": None},
    "sequence": {
        "sequence": "mean", "clip_low": None, "clip_high": None, "delta": math.inf, "dual_clip": math.inf,
    },
    "rover": {"rover_level": "token", "rho": 1.0, "beta": 1.0, "rover_clip": None},
    "lp_reg": {"clip_low": 1.0, "clip_high": 9.0, "lp_reg_coef": 1.0},
    "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
    "vespo": {"k_positive": 2.0, "lambda_positive": 3.0, "k_negative": 3.0, "lambda_negative": 2.0},
}  # fmt: skip
_FORM_TENSORS = {"rover": ("mean_logp", "old_mean_logp", "link"), "lp_reg": ("proxy_logp", "selected")}


@dataclass(frozen=True)
class PolicyLoss:
    loss: torch.Tensor  # scalar: sum of coef * l; differentiable in logp and entropy where they require grad
    grad_logp: torch.Tensor  # [N] d loss / d logp
    grad_entropy: torch.Tensor | None  # [N] d loss / d entropy; None where entropy_coef is 0
    stats: torch.Tensor  # [K] fp32, columns STATS, over the active tokens; combine chunks with merge_stats


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    coef: torch.Tensor,
    *,
    form: str,
    mask: torch.Tensor | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
    weight: str | None = None,
    weight_low: float | None = None,
    weight_high: float | None = None,
    sequence: str | None = None,
    offsets: torch.Tensor | None = None,
    rover_level: str | None = None,
    rho: float | None = None,
    beta: float | None = None,
    mean_logp: torch.Tensor | None = None,
    old_mean_logp: torch.Tensor | None = None,
    link: torch.Tensor | None = None,
    rover_clip: float | None = None,
    proxy_logp: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
    lp_reg_coef: float | None = None,
    tau_positive: float | None = None,
    tau_negative: float | None = None,
    k_positive: float | None = None,
    lambda_positive: float | None = None,
    k_negative: float | None = None,
    lambda_negative: float | None = None,
    kl: str = "none",
    kl_ratio: bool = False,
    kl_coef: float | None = None,
    ref_logp: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    behaviour_logp: torch.Tensor | None = None,
    tis_cap: float | None = None,
    tis_mode: str = "truncate",
    tis_level: str = "token",
    reference: bool | None = None,
) -> PolicyLoss:
    """loss = sum_n coef[n] l[n] over N tokens, to be minimised.

    x = logp - old_logp, r = exp(x), A = advantage, sg = a constant. All tensors [N] fp32, in nats, dense, on one
    device, unless said otherwise. Differentiable in logp and entropy only.
    old_logp None means on-policy: old = sg(logp), r = 1 (one optimizer step per batch).
    coef: normaliser and mask, made by `aggregation_coef`. A token with coef 0, or with mask [N] bool/uint8 0, gives
    exactly 0 loss and gradient whatever its inputs are (nan, inf). nan in an active token reaches the loss.

    form "clip": l = max(-A min(r, delta), -A clip(r, 1-clip_low, 1+clip_high)), for A < 0 at most -A dual_clip.
        Defaults 0.2, 0.2, inf, inf. PPO (arXiv 1707.06347), GRPO (2402.03300), DAPO (2503.14476: 0.2, 0.28, dual 10).
    form "weighted": l = -w A logp. weight "one": w = 1 (REINFORCE; RLOO, 2402.14740). weight "clipped_ratio":
        w = sg(clip(r, weight_low, weight_high)), absolute bounds (CISPO, 2506.13585: 0 and 1 + eps).
    form "sequence": "clip" with s in the place of r: s = exp(mean x) (sequence "mean": GSPO, 2507.18071, clips 3e-4 and
        4e-4) or exp(sum x) (sequence "sum": RLOO on sequences, clips 0.2) over the active tokens of each sequence.
        clip_low and clip_high have no default. offsets [S+1] int64 from 0 to N: a call holds whole sequences. Advantage
        and coef should be constant over a sequence; where they are not, "mean" is the token-level variant of GSPO.
        "mean" with the aggregation "seq-mean-token-sum", a sequence's loss times its length, is LUSPO (2602.05261).
    form "rover": l = (Q - sg(A + beta Q'))^2, Q = rho x, Q' = rho (mean_logp[n+1] - old_mean_logp[n+1]) where link[n],
        else 0. mean_logp and old_mean_logp [N] or [N+1]: the extra element is the row after this chunk. link [N]
        bool/uint8: row n+1 scores the next token of the same sequence and that token is sampled. The three may be left
        out where Q' = 0: beta = 0, or old_logp None. rover_clip e: a Q beyond log(1+e) or log(1-e) whose target is
        further out still becomes that bound. ROVER (2509.24981): rho = beta = 1, no clip (the defaults).
        rover_level "response": l = (Q - A)^2 with Q = rho (mean x over the active tokens of the sequence of `offsets`),
        at each of its tokens; the gradient is that of the mean over responses where coef is 1 / (B L). It reads neither
        beta nor rover_clip nor the means.
    form "lp_reg": "clip" without dual clip, defaults 1.0 and 9.0; where selected [N] bool/uint8 and logp < proxy_logp,
        l = -A r + lp_reg_coef min(k3(proxy_logp - logp), 10). Lp-Reg (2510.03222).
    form "sapo": l = -A (4/tau) sigmoid(tau (r - 1)), tau = tau_positive (1) where A > 0, else tau_negative (1.05): a
        clip without an edge, of slope 1 at r = 1. SAPO (2511.20347).
    form "vespo": l = -sg(phi) A logp, phi = exp(k log w + lambda (1 - w)) with w = exp(sum x) over the sequence of
        `offsets`, log w in [log 1e-8, 20]; k_positive (2), lambda_positive (3) where A >= 0, else k_negative (3),
        lambda_negative (2). phi(1) = 1, and 0 far from it on both sides. VESPO (2602.10693).
    x is clamped to [-20, 20] (log s to [-20, 10]) with zero gradient outside; rover's x is not.

    Then l *= w with w = exp(old_logp - behaviour_logp), a constant. tis_mode "truncate": min(w, tis_cap); "mask": 0
    where w > tis_cap. tis_level "token"; "sequence" (product) or "geometric" (mean) over each sequence of `offsets`.
    Form "vespo" takes the token's weight, at least 1e-8, as a factor of its own w instead.
    Then l += kl_coef KL with d = logp - ref_logp: "k1" d; "k2" d^2/2; "k3" exp(-d) + d - 1, at most 10, with zero
    gradient there; "k1+", "k3+": that value with the gradient of k2. kl_ratio multiplies KL by r, gradient included:
    its gradient is then that of the reverse KL, also on-policy (2512.02556). Then l -= entropy_coef entropy. Neither is
    multiplied by w. An entropy without a coefficient is counted in the statistics only.

    reference: True runs plain torch in the dtype of the inputs (float64 in tests); None leaves it to PYMATHRL_IMPL.
    How N is cut into calls changes the loss by rounding only and the gradient not at all; the thread count changes
    neither. No host sync on a GPU. Raises ValueError for an option that the form does not read, for a missing one, and
    for a wrong shape, dtype or device.
    """
    tensors = {
        "mask": mask, "offsets": offsets, "mean_logp": mean_logp, "old_mean_logp": old_mean_logp, "link": link,
        "proxy_logp": proxy_logp, "selected": selected, "ref_logp": ref_logp, "entropy": entropy,
        "behaviour_logp": behaviour_logp,
    }  # fmt: skip
    given = tuple([name for name, t in tensors.items() if t is not None])
    numbers, config = _resolve(
        form, given, old_logp is None, kl, kl_ratio, kl_coef, entropy_coef, tis_cap, tis_mode, tis_level,
        clip_low, clip_high, delta, dual_clip, weight, weight_low, weight_high, sequence, rover_level, rho, beta,
        rover_clip, lp_reg_coef, tau_positive, tau_negative, k_positive, lambda_positive, k_negative, lambda_negative,
    )  # fmt: skip
    if use_reference() if reference is None else reference:
        result = _reference(logp, old_logp, advantage, coef, tensors, numbers)
    else:
        result = _kernel(logp, old_logp, advantage, coef, tensors, numbers, config)
    entropy_grad = result.grad_entropy is not None and entropy is not None and entropy.requires_grad
    if not (torch.is_grad_enabled() and (logp.requires_grad or entropy_grad)):
        return result
    loss = _Backward.apply(logp, entropy, result.loss, result.grad_logp, result.grad_entropy)
    return PolicyLoss(loss, result.grad_logp, result.grad_entropy, result.stats)


def policy_loss_ref(*args: Any, **options: Any) -> PolicyLoss:
    """policy_loss in plain torch, gradients by autograd, in the dtype of the inputs."""
    return policy_loss(*args, **options, reference=True)


def works_on_sequences(form: str, options: Mapping[str, Any]) -> bool:
    """True where the loss of a token depends on other tokens of its sequence: a call then holds whole sequences and is
    given `offsets`. options: keyword arguments of policy_loss; tis_level counts where tis_cap is given."""
    tis = options.get("tis_cap") is not None and options.get("tis_level", "token") != "token"
    return tis or form in ("sequence", "vespo") or (form == "rover" and options.get("rover_level") == "response")


def merge_stats(stats: Sequence[torch.Tensor]) -> torch.Tensor:
    """The statistics of several calls as one: sums add, maxima and minima combine. No host sync."""
    table = torch.stack(tuple(stats))
    sums, maxima, minima = table.split([len(SUMS), len(MAXIMA), len(MINIMA)], dim=1)
    return torch.cat([sums.sum(0), maxima.amax(0), minima.amin(0)])


class _Backward(torch.autograd.Function):
    """Attaches a gradient that is already known to the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: torch.Tensor,
        entropy: torch.Tensor | None,
        loss: torch.Tensor,
        grad_logp: torch.Tensor,
        grad_entropy: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(grad_logp, grad_entropy)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logp, grad_entropy = ctx.saved_tensors
        need_logp, need_entropy = ctx.needs_input_grad[:2]
        return (
            upstream * grad_logp if need_logp else None,
            upstream * grad_entropy if need_entropy and grad_entropy is not None else None,
            None, None, None,
        )  # fmt: skip


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"policy_loss: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


@functools.lru_cache(maxsize=256)  # a run uses a handful of combinations: checked once, then one dictionary lookup
def _resolve(
    form: str,
    given: tuple[str, ...],
    on_policy: bool,
    kl: str,
    kl_ratio: bool,
    kl_coef: float | None,
    entropy_coef: float,
    tis_cap: float | None,
    tis_mode: str,
    tis_level: str,
    clip_low: float | None,
    clip_high: float | None,
    delta: float | None,
    dual_clip: float | None,
    weight: str | None,
    weight_low: float | None,
    weight_high: float | None,
    sequence: str | None,
    rover_level: str | None,
    rho: float | None,
    beta: float | None,
    rover_clip: float | None,
    lp_reg_coef: float | None,
    tau_positive: float | None,
    tau_negative: float | None,
    k_positive: float | None,
    lambda_positive: float | None,
    k_negative: float | None,
    lambda_negative: float | None,
) -> tuple[dict[str, Any], _C.PolicyLossConfig]:
    """Checks that the options fit together; returns the numbers with defaults filled in, and the kernel's record."""
    _choice("form", form, FORMS)
    wanted = {
        "clip_low": clip_low, "clip_high": clip_high, "delta": delta, "dual_clip": dual_clip, "weight": weight,
        "weight_low": weight_low, "weight_high": weight_high, "sequence": sequence, "rover_level": rover_level,
        "rho": rho, "beta": beta, "rover_clip": rover_clip, "lp_reg_coef": lp_reg_coef, "tau_positive": tau_positive,
        "tau_negative": tau_negative, "k_positive": k_positive, "lambda_positive": lambda_positive,
        "k_negative": k_negative, "lambda_negative": lambda_negative,
    }  # fmt: skip
    numbers = dict(_FORM_NUMBERS[form])
    for name, value in wanted.items():
        if value is None:
            continue
        if name not in numbers:
            raise ValueError(
                f"policy_loss: form {form!r} does not read {name}; it reads {', '.join(numbers)}; leave {name} out"
            )
        numbers[name] = value
    for other, names in _FORM_TENSORS.items():
        for name in names:
            if other != form and name in given:
                raise ValueError(f"policy_loss: {name} belongs to form {other!r}, got form {form!r}; leave it out")

    def need(name: str, reason: str) -> None:
        if name not in given:
            raise ValueError(f"policy_loss: {reason} needs {name}, got None")

    if form == "weighted":
        _choice("weight", numbers["weight"], ("one", "clipped_ratio"))
        if numbers["weight"] == "clipped_ratio" and numbers["weight_high"] is None:
            raise ValueError(
                "policy_loss: weight 'clipped_ratio' needs weight_high (1.2 for CISPO at eps 0.2), got None"
            )
        if numbers["weight"] == "one" and (weight_low is not None or weight_high is not None):
            raise ValueError("policy_loss: weight 'one' does not read weight_low and weight_high; leave them out")
    elif form == "sequence":
        _choice("sequence", numbers["sequence"], ("mean", "sum"))
        if clip_low is None or clip_high is None:
            raise ValueError(
                "policy_loss: form 'sequence' needs clip_low and clip_high (GSPO 3e-4, 4e-4; sums of log-ratios 0.2)"
            )
    elif form == "rover":
        means = sum(name in given for name in _FORM_TENSORS["rover"])
        _choice("rover_level", numbers["rover_level"], ("token", "response"))
        if numbers["rover_level"] == "response":
            if means or beta is not None or rover_clip is not None:
                raise ValueError(
                    "policy_loss: rover_level 'response' does not read mean_logp, old_mean_logp, link, beta and "
                    "rover_clip; leave them out"
                )
            numbers["beta"] = 0.0
        if means not in (0, 3):
            raise ValueError(
                "policy_loss: form 'rover' needs mean_logp, old_mean_logp and link together, or none of them"
            )
        if means == 0 and not on_policy and numbers["beta"] != 0:
            raise ValueError(
                "policy_loss: form 'rover' needs mean_logp, old_mean_logp and link, except with beta=0 or old_logp=None"
            )
        if rover_clip is not None and not 0 < rover_clip < 1:
            raise ValueError(f"policy_loss: rover_clip must be between 0 and 1, got {rover_clip}")
    elif form == "lp_reg":
        need("proxy_logp", "form 'lp_reg'")
        need("selected", "form 'lp_reg'")
    elif form == "sapo":
        for name in ("tau_positive", "tau_negative"):
            if not 0 < numbers[name] < math.inf:
                raise ValueError(f"policy_loss: {name} must be > 0 and finite, got {numbers[name]}")

    _choice("kl", kl, KLS)
    if kl == "none" and ("ref_logp" in given or kl_coef is not None or kl_ratio):
        raise ValueError(
            "policy_loss: ref_logp, kl_coef and kl_ratio are not read with kl 'none'; choose k1, k2, k3, k1+ or k3+"
        )
    if kl_ratio and form == "sequence":
        raise ValueError("policy_loss: kl_ratio is the ratio of a token; form 'sequence' has none; leave it out")
    if kl != "none":
        need("ref_logp", f"kl {kl!r}")
        if kl_coef is None:
            raise ValueError(f"policy_loss: kl {kl!r} needs kl_coef, got None")
    if entropy_coef != 0:
        need("entropy", "entropy_coef")
    _choice("tis_mode", tis_mode, ("truncate", "mask"))
    _choice("tis_level", tis_level, LEVELS)
    tis = "behaviour_logp" in given
    if tis != (tis_cap is not None):
        raise ValueError("policy_loss: behaviour_logp and tis_cap go together; give both or neither")
    if form == "vespo" and tis and tis_level != "token":
        raise ValueError(
            f"policy_loss: form 'vespo' takes the weight of tokens into its own, got tis_level {tis_level!r}"
        )
    if tis_cap is not None and not tis_cap > 0:
        raise ValueError(f"policy_loss: tis_cap must be > 0, got {tis_cap}")
    over_sequences = works_on_sequences(form, {**numbers, "tis_cap": tis_cap, "tis_level": tis_level})
    if over_sequences:
        of_form = works_on_sequences(form, numbers)
        level = " with rover_level 'response'" if form == "rover" else ""
        need("offsets", f"form {form!r}{level}" if of_form else f"tis_level {tis_level!r}")
    elif "offsets" in given:
        raise ValueError(
            "policy_loss: offsets are read by forms 'sequence' and 'vespo', rover_level 'response' and tis_level "
            "'sequence', 'geometric' only"
        )

    numbers.update(
        form=form, kl=kl, kl_ratio=kl_ratio, kl_coef=kl_coef or 0.0, entropy_coef=entropy_coef,
        tis=tis_level if tis else None, tis_mode=tis_mode,
        tis_cap=math.inf if tis_cap is None else tis_cap, over_sequences=over_sequences,
    )  # fmt: skip
    edge = numbers.get("rover_clip")
    config = _C.PolicyLossConfig(
        form=FORMS.index(form),
        clip_low=numbers.get("clip_low", 0.0),
        clip_high=numbers.get("clip_high", 0.0),
        delta=numbers.get("delta", math.inf),
        dual_clip=numbers.get("dual_clip", math.inf),
        ratio_weight=numbers.get("weight") == "clipped_ratio",
        weight_low=numbers.get("weight_low", 0.0),
        weight_high=math.inf if numbers.get("weight_high") is None else numbers["weight_high"],
        sequence_mean=numbers.get("sequence", "mean") == "mean" and form != "vespo",
        rho=numbers.get("rho", 1.0),
        beta=numbers.get("beta", 0.0),
        rover_response=numbers.get("rover_level") == "response",
        q_low=-math.inf if edge is None else math.log1p(-edge),
        q_high=math.inf if edge is None else math.log1p(edge),
        lp_reg_coef=numbers.get("lp_reg_coef", 0.0),
        tau=(numbers.get("tau_positive", 1.0), numbers.get("tau_negative", 1.0)),
        vespo_positive=(numbers.get("k_positive", 0.0), numbers.get("lambda_positive", 0.0)),
        vespo_negative=(numbers.get("k_negative", 0.0), numbers.get("lambda_negative", 0.0)),
        kl=KLS.index(kl),
        kl_ratio=kl_ratio,
        kl_coef=numbers["kl_coef"],
        entropy_coef=entropy_coef,
        tis=LEVELS.index(tis_level) + 1 if tis else 0,
        tis_mask=tis_mode == "mask",
        tis_cap=numbers["tis_cap"],
        log_tis_cap=math.log(numbers["tis_cap"]),
    )
    return numbers, config


def _kernel(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    coef: torch.Tensor,
    tensors: dict[str, torch.Tensor | None],
    numbers: dict[str, Any],
    config: _C.PolicyLossConfig,
) -> PolicyLoss:
    grad_logp = torch.empty_like(logp)
    grad_entropy = torch.empty_like(logp) if numbers["entropy_coef"] else None
    work = logp.new_empty(3 * logp.numel()) if numbers["over_sequences"] else None
    result = logp.new_empty((1 + _C.policy_loss_blocks(logp.numel(), logp.is_cuda), 1 + len(STATS)))
    _C.policy_loss(
        config, view(logp), optional_view(old_logp), view(advantage), view(coef),
        optional_view(tensors["mask"]), optional_view(tensors["offsets"]), optional_view(tensors["mean_logp"]),
        optional_view(tensors["old_mean_logp"]), optional_view(tensors["link"]), optional_view(tensors["proxy_logp"]),
        optional_view(tensors["selected"]), optional_view(tensors["ref_logp"]), optional_view(tensors["entropy"]),
        optional_view(tensors["behaviour_logp"]),
        view(grad_logp), optional_view(grad_entropy), optional_view(work), view(result), stream(logp),
    )  # fmt: skip
    row = result[0]
    return PolicyLoss(row[0], grad_logp, grad_entropy, row[1:])


def _reference(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    coef: torch.Tensor,
    tensors: dict[str, torch.Tensor | None],
    o: dict[str, Any],
) -> PolicyLoss:
    active = coef != 0
    if tensors["mask"] is not None:
        active = active & (tensors["mask"] != 0)
    index = active.nonzero()[:, 0]  # only active tokens are computed, so nothing of the others can leak

    def pick(name: str) -> torch.Tensor:
        t = tensors[name]
        assert t is not None, name  # _resolve has checked it
        return t.detach()[index]

    with torch.enable_grad():
        lp = logp.detach()[index].requires_grad_()
        old = lp.detach() if old_logp is None else old_logp.detach()[index]
        a, c = advantage.detach()[index], coef.detach()[index]
        entropy = None if tensors["entropy"] is None else pick("entropy").requires_grad_()
        x = lp - old
        r = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        sums = {name: lp.new_zeros(()) for name in SUMS}
        none = torch.zeros_like(index, dtype=torch.bool)
        low = high = dual = over = selected = none

        owner = lengths = None
        if o["over_sequences"]:
            offsets = tensors["offsets"]
            assert offsets is not None
            count = offsets.diff()
            owner = torch.arange(count.numel(), device=logp.device).repeat_interleave(count)[index]
            lengths = torch.zeros_like(count, dtype=lp.dtype).index_add(0, owner, torch.ones_like(lp)).clamp(min=1)

        def over_sequence(values: torch.Tensor, mean: bool) -> torch.Tensor:
            """Sum or mean over each sequence, at each of its tokens."""
            assert owner is not None and lengths is not None
            total = values.new_zeros(lengths.numel()).index_add(0, owner, values)
            return (total / lengths if mean else total)[owner]

        if o["form"] in ("clip", "sequence", "lp_reg"):
            if owner is not None and lengths is not None and o["form"] == "sequence":
                mean = o["sequence"] == "mean"
                # The value of the sequence with the slope of the token. d log s / d logp is 1/L of a mean, 1 of a sum;
                # and each of the L tokens carries the loss of its sequence once.
                log_s = over_sequence(x.detach(), mean) + (1.0 if mean else lengths[owner]) * (lp - lp.detach())
                r = log_s.clamp(-MAX_LOG_RATIO, MAX_SEQUENCE_LOG_RATIO).exp()
            value = torch.maximum(
                -a * r.clamp(max=o.get("delta", math.inf)), -a * r.clamp(1 - o["clip_low"], 1 + o["clip_high"])
            )
            low, high = (a < 0) & (r < 1 - o["clip_low"]), (a > 0) & (r > 1 + o["clip_high"])
            if o["form"] == "lp_reg":
                proxy = pick("proxy_logp")
                selected = (pick("selected") != 0) & ~(lp >= proxy)
                value = torch.where(selected, -a * r + o["lp_reg_coef"] * _k3(proxy - lp), value)
                low, high = low & ~selected, high & ~selected
            elif o["dual_clip"] < math.inf:
                bound = -a * o["dual_clip"]
                dual = (a < 0) & (value > bound)
                value = torch.where(dual, bound, value)
        elif o["form"] == "weighted":
            ratio_weight = o["weight"] == "clipped_ratio"
            w = r.detach().clamp(o["weight_low"], o["weight_high"]) if ratio_weight else torch.ones_like(lp)
            value = -w * a * lp
            if ratio_weight:
                low, high = r < o["weight_low"], r > o["weight_high"]
        elif o["form"] == "sapo":
            tau = torch.where(a > 0, lp.new_tensor(o["tau_positive"]), lp.new_tensor(o["tau_negative"]))
            value = -a * (4 / tau) * torch.sigmoid(tau * (r - 1))
        elif o["form"] == "vespo":
            log_w = x.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            if o["tis"] is not None:
                weight = old - pick("behaviour_logp")
                cap = math.log(o["tis_cap"])
                bound = MIN_WEIGHT_LOG_RATIO if o["tis_mode"] == "mask" else cap
                weight = torch.where(weight > cap, bound, weight)
                log_w = log_w + weight.clamp(MIN_WEIGHT_LOG_RATIO, MAX_LOG_RATIO)
            log_w = over_sequence(log_w, mean=False).clamp(MIN_WEIGHT_LOG_RATIO, MAX_LOG_RATIO)
            r = log_w.exp()
            k = torch.where(a < 0, lp.new_tensor(o["k_negative"]), lp.new_tensor(o["k_positive"]))
            decay = torch.where(a < 0, lp.new_tensor(o["lambda_negative"]), lp.new_tensor(o["lambda_positive"]))
            value = -(k * log_w + decay * (1 - r)).exp() * a * lp
        else:
            if o["rover_level"] == "response":  # the value of the sequence with the slope of the token, as above
                x_of_q = over_sequence(x.detach(), mean=True) + (lp - lp.detach())
            else:
                x_of_q = x
            q, next_q = o["rho"] * x_of_q, torch.zeros_like(lp)
            if tensors["link"] is not None:
                linked = pick("link") != 0
                mean, old_mean = tensors["mean_logp"], tensors["old_mean_logp"]
                assert mean is not None and old_mean is not None
                successor = index[linked] + 1
                if successor.numel() and int(successor[-1]) >= mean.numel():
                    raise ValueError(
                        "policy_loss: link is 1 at the last row, but mean_logp and old_mean_logp end there; "
                        f"give them N+1 = {logp.numel() + 1} rows (the extra one is the row after this chunk)"
                    )
                next_q = next_q.masked_scatter(
                    linked, o["rho"] * (mean.detach()[successor] - old_mean.detach()[successor])
                )
            target = (a + o["beta"] * next_q).detach()  # the bootstrap carries no gradient
            if o["rover_clip"] is not None:
                q_low, q_high = math.log1p(-o["rover_clip"]), math.log1p(o["rover_clip"])
                low, high = (target < q) & (q < q_low), (target > q) & (q > q_high)
            bounded = q
            if o["rover_clip"] is not None:
                bounded = torch.where(low, torch.full_like(q, q_low), torch.where(high, torch.full_like(q, q_high), q))
            value = (bounded - target) ** 2
            sums |= {"q": q.sum(), "next_q": next_q.sum(), "target": target.sum()}
            sums |= {"q_above": ((a > 0) & (q > a)).sum(), "q_below": ((a < 0) & (q < a)).sum()}

        if o["tis"] is not None:
            log_w = old - pick("behaviour_logp")
            if o["tis"] != "token":
                log_w = over_sequence(log_w, mean=o["tis"] == "geometric")
            w = log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().detach()
            over = w > o["tis_cap"]
            w = torch.where(over, torch.full_like(w, 0.0 if o["tis_mode"] == "mask" else o["tis_cap"]), w)
            value = value if o["form"] == "vespo" else w * value
            tis_weight = w
        else:
            tis_weight = torch.ones_like(lp)
        if o["kl"] != "none":
            d = lp - pick("ref_logp")
            k2 = d.square() / 2
            kl = {"k1": d, "k2": k2, "k3": _k3(-d)}[o["kl"][:2]]
            if o["kl"].endswith("+"):
                kl = k2 - k2.detach() + kl.detach()
            if o["kl_ratio"]:
                kl = kl * x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
            value = value + o["kl_coef"] * kl
            sums["kl"] = kl.sum()
        if entropy is not None:
            value = value - o["entropy_coef"] * entropy
            sums["entropy"] = entropy.sum()
        loss = (c * value).sum()
        leaves = [lp] + ([entropy] if entropy is not None else [])
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    with torch.no_grad():
        extras = o["tis"] is not None or o["kl"] != "none" or entropy is not None
        flags = {"clip_low": low, "clip_high": high, "dual_clip": dual, "tis_clipped": over, "selected": selected}
        sums |= {name: flag.sum() for name, flag in flags.items()}
        sums |= {"tokens": torch.ones_like(lp).sum(), "ratio": r.sum(), "log_ratio": x.sum()}
        sums |= {"log_ratio_abs": x.abs().sum(), "old_k3": _excess(x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).sum()}
        extremes = {"ratio": r, "log_ratio_abs": x.abs()}
        if extras:
            sums |= {"tis_weight": tis_weight.sum(), "tis_weight_square": tis_weight.square().sum()}
            extremes["tis_weight"] = tis_weight
        if o["form"] == "rover":
            extremes |= {"q": q, "next_q": next_q, "target": target}
        row = [sums[name] for name in SUMS]
        for names, ending, start in ((MAXIMA, "_max", -math.inf), (MINIMA, "_min", math.inf)):
            for name in names:
                values = extremes.get(name.removesuffix(ending), lp[:0])
                values = torch.cat([values, lp.new_full((1,), start)])
                row.append(values.max() if ending == "_max" else values.min())
        stats = torch.stack([v.detach().to(lp.dtype) for v in row])
        scatter = lambda values: torch.zeros_like(logp).index_copy(0, index, values)
        grad_entropy = scatter(grads[1]) if o["entropy_coef"] else None
        return PolicyLoss(loss.detach(), scatter(grads[0]), grad_entropy, stats)


def _excess(d: torch.Tensor) -> torch.Tensor:
    return torch.expm1(d) - d


def _k3(d: torch.Tensor) -> torch.Tensor:
    """exp(d) - 1 - d, bounded: a clamped value has no gradient."""
    return _excess(d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=MAX_K3)
