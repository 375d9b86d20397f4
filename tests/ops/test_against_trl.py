"""Every loss type and advantage of TRL 1.16, computed by TRL's own trainers on padded float64 batches, against ours on
the same tokens packed: advantages, loss and gradient in logp.

The trainers are built without a model: TRL's scoring and loss methods run as they are, on log-probs handed to them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pymathrl.ops import aggregation_coef, group_advantage, policy_loss
from pymathrl.ops.policy_loss import works_on_sequences

pytest.importorskip("trl", reason="trl is not installed: pip install pymathrl[bench]")
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

LIMIT = 1e-6  # of the largest entry, fp32 kernel against float64
MAX_LENGTH = 24  # longer than every completion below
WEIGHTS = [1.0, 0.5]  # of two reward functions


@dataclass
class Batch:
    """Completions of several prompts, `group` each, padded to the right with finite noise, as TRL's are."""

    group: int
    length: Tensor  # [B]
    tool: Tensor  # [B, T] bool, 1 = sampled by the policy, 0 = the output of a tool
    logp: Tensor  # [B, T], of the policy now; so are those that follow of other policies
    old: Tensor
    ref: Tensor
    sampler: Tensor
    reward: Tensor  # [B, 2], of two reward functions

    @property
    def inside(self) -> Tensor:
        """[B, T] bool, not padding."""
        return torch.arange(self.logp.shape[1]) < self.length[:, None]

    @property
    def offsets(self) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.length.cumsum(0)])

    @property
    def groups(self) -> Tensor:
        return torch.arange(0, len(self.length) + 1, self.group)


def draw(seed: int, tools: bool = True) -> Batch:
    """Four groups of four, both signs of advantage, a group of equal rewards, a row of one token, one of which the
    policy sampled nothing, ratios on both sides of every clip. Values are fp32 numbers, held in float64."""
    g = torch.Generator().manual_seed(seed)
    rows, width = 16, 20
    exact = lambda x: x.float().double()
    normal = lambda scale: torch.randn(rows, width, generator=g) * scale
    length = torch.randint(2, width + 1, (rows,), generator=g)
    length[3], length[5] = 1, width
    tool = torch.rand(rows, width, generator=g) < 0.8
    tool[6] = False
    logp = exact(-4 * torch.rand(rows, width, generator=g))
    old, ref = exact(logp - normal(0.3)), exact(logp - normal(0.3))
    reward = exact(torch.randint(0, 3, (rows, 2), generator=g) * 0.35)
    reward[8:12] = reward[8]
    return Batch(4, length, tool | (not tools), logp, old, ref, exact(old - normal(0.2)), reward)


class Accelerator:
    """One process, as far as the trainers ask."""

    device = torch.device("cpu")
    process_index, num_processes, is_main_process, sync_gradients = 0, 1, True, True

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        return x


def trainer(kind: type, data: Batch, rewards: int, **options: Any) -> Any:
    """A trainer of TRL at its own defaults whose sampler, models and reward functions return what `data` says."""
    config = GRPOConfig if kind is GRPOTrainer else RLOOConfig
    args = SimpleNamespace(**{f.name: f.default for f in fields(config)} | options)
    t = object.__new__(kind)
    for name, value in vars(args).items():  # its __init__ copies options under their own names, except the two below
        setattr(t, name, value)
    t.epsilon_low = args.epsilon
    t.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    t.args, t.accelerator, t.ref_model = args, Accelerator(), "reference"
    t.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    t._tokenizer, t.pad_to_multiple_of = SimpleNamespace(pad_token_id=0), None
    t.tools = t.environments = t.environment_factories = None
    t.num_generations, t.current_gradient_accumulation_steps = data.group, args.gradient_accumulation_steps
    t.reward_weights, t.reward_func_names = torch.tensor(WEIGHTS[:rewards]), ["first", "second"][:rewards]
    t.reward_funcs = t.reward_func_names
    t.aux_loss_enabled = t._entropy_bonus_enabled = False
    t._metrics, t._pending_extra_logs, t._pending_metrics = {"train": defaultdict(list)}, {}, {}
    t._logs = {
        "prompt": [],
        "completion": [],
        "advantages": [],
        "rewards": defaultdict(list),
        "extra": defaultdict(list),
    }

    def generate(prompts: list[str]) -> tuple[Any, ...]:
        rows = lambda x: [row[:n].tolist() for row, n in zip(x, data.length.tolist(), strict=True)]
        ids = rows(torch.full_like(data.tool, 2, dtype=torch.int64))
        first = [[2]] * len(ids)
        if kind is RLOOTrainer:
            return first, ids, ids
        sampler = rows(data.sampler) if args.use_vllm else None
        return first, ids, rows(data.tool.long()), ids, sampler, {}, None, None

    def log_probs(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        values = model if isinstance(model, Tensor) else data.ref if model is t.ref_model else data.old
        return values, -values.detach(), None  # any entropies will do

    t._generate, t._get_per_token_logps_and_entropies = generate, log_probs
    t._calculate_rewards = lambda *_: data.reward[:, :rewards]
    return t


def theirs(
    kind: type, data: Batch, *, rewards: int = 1, micro: int = 1, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [B], loss, and its gradient in the log-probs, packed; over `micro` micro-batches of equal rows."""
    common = {"gradient_accumulation_steps": micro, "steps_per_generation": micro, "max_completion_length": MAX_LENGTH}
    t = trainer(kind, data, rewards, **common | options)
    scored = t._generate_and_score_completions([{"prompt": "x"}] * len(data.length))
    logp = data.logp.clone().requires_grad_()
    rows = len(data.length) // micro
    loss = torch.zeros((), dtype=torch.float64)
    for begin in range(0, len(data.length), rows):
        part = {name: x[begin : begin + rows] if x.ndim else x for name, x in scored.items()}
        loss = loss + t._compute_loss(logp[begin : begin + rows], part)
    loss.backward()
    return scored["advantages"], loss.detach(), logp.grad[data.inside]


def ours(
    data: Batch, advantage: Tensor, aggregation: str, *, double: bool = False, on_policy: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the same tokens, packed; in float64 by the reference, else by the kernel. advantage [B] or
    [B, T]."""
    pack = lambda x: x[data.inside].to(torch.float64 if double else torch.float32)
    mask = data.tool[data.inside]
    coef = aggregation_coef(
        aggregation, mask, data.offsets, tokens=int(mask.sum()), sequences=len(data.length), max_length=MAX_LENGTH
    )
    if "tis_cap" in options:
        options["behaviour_logp"] = pack(data.sampler)
    if options.get("kl", "none") != "none":
        options["ref_logp"] = pack(data.ref)
    if works_on_sequences(options["form"], options):
        options["offsets"] = data.offsets
    each = pack(advantage.reshape(len(advantage), -1).expand_as(data.logp))
    out = policy_loss(
        pack(data.logp), None if on_policy else pack(data.old), each,
        coef.to(pack(data.logp).dtype), mask=mask, reference=double, **options,
    )  # fmt: skip
    return out.loss, out.grad_logp


def compare(data: Batch, expected: tuple[Tensor, Tensor], advantage: Tensor, aggregation: str, **options: Any) -> None:
    loss, grad = expected
    assert float(grad.abs().max()) > 1e-4  # there is something to compare
    for double in (False, True):
        got_loss, got_grad = ours(data, advantage, aggregation, double=double, **options)
        assert float((got_grad - grad).abs().max()) <= LIMIT * float(grad.abs().max())
        assert float(got_loss) == pytest.approx(float(loss), rel=LIMIT, abs=LIMIT)


CLIP = {"form": "clip", "clip_low": 0.2, "clip_high": 0.2}
SEQUENCE = {"form": "sequence", "sequence": "mean", "clip_low": 0.02, "clip_high": 0.03}
# name -> (TRL's options, our aggregation and options)
LOSSES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, "seq-mean-token-mean", CLIP),
    "bnpo": ({"loss_type": "bnpo"}, "token-mean", CLIP),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "dr_grpo", CLIP),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, "token-mean", CLIP | {"clip_high": 0.28}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        "token-mean",
        {"form": "weighted", "weight": "clipped_ratio", "weight_high": 1.2},
    ),
    "sapo": ({"loss_type": "sapo"}, "seq-mean-token-mean", {"form": "sapo"}),
    "sapo at other temperatures": (
        {"loss_type": "sapo", "sapo_temperature_pos": 3.0, "sapo_temperature_neg": 7.0},
        "seq-mean-token-mean",
        {"form": "sapo", "tau_positive": 3.0, "tau_negative": 7.0},
    ),
    "vespo": ({"loss_type": "vespo"}, "token-mean", {"form": "vespo"}),
    "vespo at other constants": (
        {
            "loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 0.5,
            "vespo_k_neg": 0.7, "vespo_lambda_neg": 1.1,
        },
        "token-mean",
        {"form": "vespo", "k_positive": 1.5, "lambda_positive": 0.5, "k_negative": 0.7, "lambda_negative": 1.1},
    ),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
        "seq-mean-token-sum",
        SEQUENCE,
    ),
    "luspo over tokens": ({"loss_type": "luspo"}, "seq-mean-token-sum", CLIP),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
        "seq-mean-token-mean",
        SEQUENCE,
    ),
    "gspo over all tokens": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
        "token-mean",
        SEQUENCE,
    ),
    "delta": ({"loss_type": "dapo", "delta": 1.4}, "token-mean", CLIP | {"delta": 1.4}),
}  # fmt: skip
ADD_ONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "kl": ({"beta": 0.3, "use_bias_correction_kl": False}, {"kl": "k3", "kl_coef": 0.3}),
    "kl by ratio": ({"beta": 0.3}, {"kl": "k3", "kl_coef": 0.3, "kl_ratio": True}),
}
for trl_mode, ours_mode in {
    "token_truncate": {"tis_level": "token", "tis_mode": "truncate"},
    "token_mask": {"tis_level": "token", "tis_mode": "mask"},
    "sequence_truncate": {"tis_level": "sequence", "tis_mode": "truncate"},
    "sequence_mask": {"tis_level": "sequence", "tis_mode": "mask"},
}.items():
    vllm = {"use_vllm": True, "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": trl_mode}
    ADD_ONS[trl_mode] = (vllm | {"vllm_importance_sampling_clip_max": 1.3}, ours_mode | {"tis_cap": 1.3})


@pytest.mark.parametrize("add_on", ADD_ONS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_equal_trl(name, add_on, seed):
    (options, aggregation, mine), (more, extra) = LOSSES[name], ADD_ONS[add_on]
    if "vespo" in name and add_on.startswith("sequence"):
        pytest.skip("TRL refuses sequence weights of the sampler with VESPO, and so does policy_loss")
    if mine["form"] == "sequence" and add_on.startswith(("kl by ratio", "token")):
        pytest.skip("a factor that differs within a sequence: ours is the token variant of the form, TRL's is not")
    data = draw(seed)
    # An accumulation window that is not a whole number of generations makes TRL compute the old log-probs.
    advantage, *expected = theirs(GRPOTrainer, data, steps_per_generation=1, num_iterations=2, **options | more)
    compare(data, tuple(expected), advantage, aggregation, **mine | extra)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "bnpo"])
def test_micro_batches_of_trl_add_up_to_our_step(name):
    """bnpo's mean is over each micro-batch, by its definition; ours is over the step."""
    options, aggregation, mine = LOSSES[name]
    data = draw(3)
    advantage, *expected = theirs(GRPOTrainer, data, micro=2, num_iterations=3, **options)
    compare(data, tuple(expected), advantage, aggregation, **mine)


def test_on_policy_step_of_trl():
    data = draw(4)
    advantage, *expected = theirs(GRPOTrainer, data)
    compare(data, tuple(expected), advantage, "token-mean", on_policy=True, **CLIP)


def test_off_policy_mask_is_an_advantage_of_zero():
    """TRL drops the responses with A < 0 whose mean of old - logp passes a threshold: their policy part is 0."""
    data = draw(1)
    advantage, *expected = theirs(GRPOTrainer, data, num_iterations=2, off_policy_mask_threshold=0.02, beta=0.3)
    drift = ((data.old - data.logp) * data.tool * data.inside).sum(1) / (data.tool & data.inside).sum(1).clamp(min=1)
    dropped = (advantage < 0) & (drift > 0.02)
    assert 0 < int(dropped.sum()) < int((advantage < 0).sum())
    compare(
        data, tuple(expected), torch.where(dropped, 0.0, advantage), "token-mean", **CLIP | ADD_ONS["kl by ratio"][1]
    )


@pytest.mark.parametrize("name", ["dapo", "cispo", "sapo", "vespo"])
def test_top_entropy_tokens_are_the_others_at_an_advantage_of_zero(name):
    options, aggregation, mine = LOSSES[name]
    data = draw(2)
    more, extra = ADD_ONS["kl"]
    advantage, *expected = theirs(GRPOTrainer, data, num_iterations=2, top_entropy_quantile=0.4, **options | more)
    entropy, active = -data.logp, data.tool & data.inside
    chosen = entropy >= torch.quantile(entropy[active].float(), 0.6)
    assert 0.35 < float(chosen[active].float().mean()) < 0.45
    each = torch.where(chosen, advantage[:, None], 0.0)
    compare(data, tuple(expected), each, aggregation, **mine | extra)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_rloo(seed, normalize, beta):
    data = draw(seed, tools=False)
    advantage, *expected = theirs(RLOOTrainer, data, normalize_advantages=normalize, beta=beta)
    kl = ((data.old - data.ref) * data.inside).sum(1)
    reward = (data.reward[:, 0] - beta * kl).float()
    scale = {"scale": "batch_whiten", "eps": 1e-4} if normalize else {}
    mine = group_advantage(reward, data.groups, centre="leave_one_out", **scale).advantage
    torch.testing.assert_close(mine, advantage.float(), rtol=0, atol=LIMIT)
    options = {"form": "sequence", "sequence": "sum", "clip_low": 0.2, "clip_high": 0.2}
    compare(data, tuple(expected), advantage, "seq-mean-token-mean", **options)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scaled_advantages(seed, scale):
    data = draw(seed)
    advantage, *_ = theirs(GRPOTrainer, data, scale_rewards=scale)
    ours_scale = {"group": "group_std", "batch": "batch_std", "none": "none"}[scale]
    mine = group_advantage(data.reward[:, 0].float(), data.groups, scale=ours_scale, eps=1e-4).advantage
    torch.testing.assert_close(mine, advantage.float(), rtol=0, atol=LIMIT)


def test_rewards_normalised_one_by_one():
    """TRL's normalize_then_sum (GDPO): each reward's own group scores, weighted and summed, whitened over the batch."""
    data = draw(1)
    advantage, *_ = theirs(GRPOTrainer, data, rewards=2, multi_objective_aggregation="normalize_then_sum")
    each = [
        weight * group_advantage(reward, data.groups, scale="group_std", eps=1e-4).advantage
        for weight, reward in zip(WEIGHTS, data.reward.float().T.contiguous(), strict=True)
    ]
    mine = group_advantage(sum(each), data.groups, centre="none", scale="batch_whiten", eps=1e-4).advantage
    torch.testing.assert_close(mine, advantage.float(), rtol=0, atol=LIMIT)


@pytest.mark.parametrize(
    "ours_name, trl_name",
    [
        ("tau_positive", "sapo_temperature_pos"),
        ("tau_negative", "sapo_temperature_neg"),
        ("k_positive", "vespo_k_pos"),
        ("lambda_positive", "vespo_lambda_pos"),
        ("k_negative", "vespo_k_neg"),
        ("lambda_negative", "vespo_lambda_neg"),
    ],
)
def test_a_wrong_constant_is_refused(ours_name, trl_name):
    form = trl_name.split("_")[0]
    data = draw(0)
    advantage, *expected = theirs(GRPOTrainer, data, num_iterations=2, loss_type=form)
    aggregation = LOSSES[form][1]
    with pytest.raises(AssertionError):
        compare(data, tuple(expected), advantage, aggregation, form=form, **{ours_name: 1.5})
