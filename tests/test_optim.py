"""Optimizer: torch's AdamW with our schedule and clipping; a step with a nan changes nothing."""

import dataclasses
import math

import pytest
import torch

from pymathrl.config import TrainConfig
from pymathrl.optim import Optimizer
from tests.tiny import tiny_policy


def filled(model, value=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if value is None else torch.full_like(p, value)


def test_equals_torch_adamw_with_decay_on_matrices_only():
    config = dataclasses.replace(TrainConfig(), lr=1e-3, weight_decay=0.1, max_grad_norm=0.0)
    ours, theirs = tiny_policy().model, tiny_policy().model
    optimizer = Optimizer(ours, config, 10)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    for seed in range(3):
        filled(ours, seed=seed)
        filled(theirs, seed=seed)
        optimizer.step()
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_the_rates_of_a_mamba_do_not_decay():
    config = dataclasses.replace(TrainConfig(), lr=1e-2, weight_decay=0.5)
    model = tiny_policy(hybrid=True).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    Optimizer(model, config, 10).step()  # no gradient: what moves is decay
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert "layers.0.a_log" in still and "layers.0.d" in still and "layers.0.dt_bias" in still
    assert "layers.0.in_proj" not in still and "layers.0.conv" not in still and "layers.1.qkv" not in still


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    config = dataclasses.replace(TrainConfig(), lr=1.0, max_grad_norm=0.5)
    model = tiny_policy().model
    optimizer = Optimizer(model, config, 10)
    filled(model)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    seen = []
    optimizer.adamw.step = lambda: seen.append(
        math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    )
    report = optimizer.step()
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert seen == [pytest.approx(0.5, rel=1e-5)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    model = tiny_policy().model
    optimizer = Optimizer(model, TrainConfig(), 10)
    filled(model)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    moments = [v["exp_avg"].clone() for v in optimizer.adamw.state.values()]
    filled(model)
    next(model.parameters()).grad[0, 0] = bad
    assert not optimizer.step().applied
    filled(model)
    assert not optimizer.step(finite_loss=False).applied
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, v["exp_avg"]) for a, v in zip(moments, optimizer.adamw.state.values(), strict=True))
    assert all(p.grad is None for p in model.parameters()), "the bad gradient must not reach the next step"
    filled(model)
    assert optimizer.step().applied


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5]),
    ],
)
def test_schedule_by_hand(schedule, expected):
    config = dataclasses.replace(TrainConfig(), lr=1.0, lr_schedule=schedule, warmup_steps=2)
    optimizer = Optimizer(tiny_policy().model, config, total_updates=6)
    rates = []
    for _ in range(5):
        rates.append(optimizer.learning_rate())
        optimizer.updates += 1
    assert rates == pytest.approx(expected)


def low_precision_model():
    model = tiny_policy().model
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


def test_small_steps_on_bf16_weights_add_up_in_fp32_masters():
    """50 steps of 1e-6 on weights around 0.02: plain bf16 moves 2 % of them, masters move the weights' fp32 copies."""
    model, exact = low_precision_model(), tiny_policy().model
    with torch.no_grad():
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.copy_(p.float())
    config = dataclasses.replace(TrainConfig(), lr=1e-5, weight_decay=0.0, max_grad_norm=0.0)
    ours, theirs = Optimizer(model, config, 50), Optimizer(exact, config, 50)
    places = [p.data_ptr() for p in model.parameters()]
    for seed in range(50):
        filled(exact, seed=seed)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.grad = q.grad.bfloat16().float()  # what autograd hands over
            p.backward(q.grad.bfloat16())  # through autograd: the hook takes the gradient
            assert p.grad is None
        ours.step()
        theirs.step()
    for master, q in zip(ours.parameters, exact.parameters(), strict=True):
        assert torch.equal(master, q)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16())
    assert places == [p.data_ptr() for p in model.parameters()]


def test_gradients_of_bf16_weights_add_up_in_fp32():
    model = low_precision_model()
    optimizer = Optimizer(model, TrainConfig(), 1)
    for value in (1.0, 2.0**-9):  # the sum is no bf16 number
        for p in model.parameters():
            p.backward(torch.full_like(p, value))
    assert all(bool((p.grad == 1.0 + 2.0**-9).all()) for p in optimizer.parameters)


def test_masters_travel_with_the_state():
    model, again = low_precision_model(), low_precision_model()
    config = dataclasses.replace(TrainConfig(), lr=1e-4)
    optimizer, other = Optimizer(model, config, 10), Optimizer(again, config, 10)
    for p in model.parameters():
        p.backward(torch.ones_like(p))
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.parameters, other.parameters, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


class Mixed(torch.nn.Module):
    """Like a critic: low-precision layers under an fp32 vector."""

    def __init__(self, low):
        super().__init__()
        self.vector = torch.nn.Parameter(torch.linspace(0, 1, 5))
        self.matrix = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).to(low))


@pytest.mark.parametrize("source, target", [(a, b) for a in (0, 1) for b in (0, 1)])
def test_a_model_of_mixed_precision_goes_on_in_every_other(source, target):
    kinds, config = (torch.bfloat16, torch.float32), dataclasses.replace(TrainConfig(), lr=1e-4)
    saved, model = Mixed(kinds[source]), Mixed(kinds[target])
    optimizer = stepped(saved, config)
    with torch.no_grad():
        for p, q in zip(model.parameters(), saved.parameters(), strict=True):
            p.copy_(q)
    other = Optimizer(model, config, 10)
    other.load_state_dict(optimizer.state_dict())
    vector, matrix = optimizer.parameters
    if source == 1:  # there are no masters in the state: the loaded weights become them
        matrix = matrix.to(kinds[target]).float()
    assert torch.equal(other.parameters[0], vector) and torch.equal(other.parameters[1], matrix)
    assert torch.equal(model.vector, vector) and torch.equal(model.matrix, matrix.to(kinds[target]))


def full_precision_model(seed=0):
    """A model in fp32 with weights that bf16 holds: what a bf16 checkpoint becomes on a CPU."""
    model = tiny_policy(seed).model
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    return model


def stepped(model, config):
    optimizer = Optimizer(model, config, 10)
    for p in model.parameters():
        p.backward(torch.ones_like(p))
    optimizer.step()
    return optimizer


def test_weights_from_outside_and_a_restart_are_a_new_optimizer():
    config = dataclasses.replace(TrainConfig(), lr=1e-4, stage_optimizer="fresh")
    for make in (low_precision_model, full_precision_model):
        model, fresh = make(), make()
        optimizer = stepped(model, config)
        with torch.no_grad():
            for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
                p.copy_(q)
        optimizer.read_weights()
        optimizer.restart(config, 10)
        for p in model.parameters():
            p.backward(torch.ones_like(p))
        optimizer.step()
        other = stepped(fresh, config)
        for a, b in zip(optimizer.parameters, other.parameters, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("masters_first", [True, False])
def test_a_state_goes_on_in_the_other_precision(masters_first):
    """From a GPU to a CPU the masters become the weights; the other way the loaded weights become the masters."""
    config = dataclasses.replace(TrainConfig(), lr=1e-4)
    models = low_precision_model(), full_precision_model()
    saved, model = models if masters_first else models[::-1]
    optimizer = stepped(saved, config)
    with torch.no_grad():  # as train does: the checkpoint's weights first
        for p, q in zip(model.parameters(), saved.parameters(), strict=True):
            p.copy_(q)
    other = Optimizer(model, config, 10)
    other.load_state_dict(optimizer.state_dict())
    assert other.updates == 1
    for now, before, weight in zip(other.parameters, optimizer.parameters, model.parameters(), strict=True):
        assert now.dtype == torch.float32
        # fp32 weights were rounded to bf16 when they were loaded: that is what the new masters go on from
        assert torch.equal(now, before if masters_first else before.bfloat16().float())
        assert torch.equal(weight, now.to(weight.dtype))
        ours, theirs = other.adamw.state[now], optimizer.adamw.state[before]
        assert all(torch.equal(ours[k], theirs[k]) for k in ("exp_avg", "exp_avg_sq", "step"))
    for p in model.parameters():
        p.backward(torch.ones_like(p))
    assert other.step().applied


@pytest.mark.parametrize("make", [low_precision_model, full_precision_model])
@pytest.mark.parametrize("other", [dict(width=64), dict(layers=1), dict(tie=True)])
def test_a_state_of_another_model_changes_nothing(make, other):
    model = tiny_policy(**other).model
    state = stepped(model if make is full_precision_model else model.bfloat16(), TrainConfig()).state_dict()
    optimizer = stepped(make(), TrainConfig())
    before = [p.detach().clone() for p in (*optimizer.weights, *optimizer.parameters)]
    with pytest.raises(ValueError, match="state must be of a model with these"):
        optimizer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, (*optimizer.weights, *optimizer.parameters), strict=True))
    assert optimizer.updates == 1 and all(float(v["step"]) == 1 for v in optimizer.adamw.state.values())
