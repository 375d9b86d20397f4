"""The engine on a GPU: replayed CUDA graphs against the same calls made one by one, before and after an update."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pymathrl.batch import ROLE_SAMPLED, Rollout
from pymathrl.config import TrainConfig
from pymathrl.models import Decoder, Policy, char_tokenizer
from pymathrl.models.config import Mamba, ModelConfig
from pymathrl.models.paged import Pass
from pymathrl.optim import Optimizer
from pymathrl.rollout import Engine, SoftSampling, score
from tests.gpu import cuda_skip_reason

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
    max_positions=256, qk_norm=True, model_type="qwen3",
)  # fmt: skip
HYBRID = dataclasses.replace(
    CONFIG, model_type="llama", qk_norm=False, num_layers=3, mamba=Mamba(128, 64, attention_layers=(1,), dt_rank=4)
)
PROMPTS = [[5, 6, 7], [8] * 20, [9, 10], [11] * 33, [12]]


@pytest.fixture(autouse=True)
def gpu() -> None:
    if reason := cuda_skip_reason():
        pytest.skip(reason)


@pytest.fixture(params=["transformer", "hybrid"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIG if request.param == "transformer" else HYBRID


def policy(config: ModelConfig, dtype: torch.dtype) -> Policy:
    model, tokenizer = Decoder(config, seed=3, device="cuda", dtype=dtype), char_tokenizer()
    with torch.no_grad():
        model.head_weight.mul_(8)
    return Policy(model, tokenizer, config, (tokenizer.eos_id,), "compact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_graph_equals_the_calls_one_by_one(
    config: ModelConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over batches that shrink through several buckets, and after a step of the optimizer, which moves no weight."""
    made = policy(config, dtype)
    optimizer = Optimizer(made.model, dataclasses.replace(TrainConfig(), lr=1e-2), 1)
    graphs = Engine(made, 1)
    with monkeypatch.context() as plain:
        plain.setattr(Pass, "_capture", lambda self: self._once)
        single = Engine(made, 1)
        for step in range(2):
            ours, theirs = (e.generate(PROMPTS, 3, 40, top_p=0.9) for e in (graphs, single))
            assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.logp, theirs.logp), step
            ids = torch.arange(12, device="cuda")
            offsets = torch.tensor([0, 12], device="cuda")
            made.model.logits(made.model.hidden(ids, offsets)).logsumexp(-1).sum().backward()
            assert optimizer.step().applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_soft_tokens_in_a_graph_equal_the_calls_one_by_one(
    config: ModelConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = policy(config, dtype)

    def draw() -> Rollout:
        engine = Engine(made, 1)
        seqs = engine.start(PROMPTS, uids=range(5))
        engine.segment(seqs, 20, stop_ids=(), soft=SoftSampling(0.5, 0.01))
        engine.segment(seqs, 10, stop_ids=())
        return engine.rollout(seqs)

    graphs = draw()
    graphs.validate()
    monkeypatch.setattr(Pass, "_capture", lambda self: self._once)
    single = draw()
    assert torch.equal(graphs.ids, single.ids) and torch.equal(graphs.logp, single.logp)
    assert torch.equal(graphs.soft_inputs, single.soft_inputs)
    if dtype == torch.float32:
        gap = (score(made, graphs, 1.0).logp - graphs.logp)[graphs.sampled_mask].abs()
        assert float(gap.mean()) < 1e-2  # densities of 64 coordinates are about -32


def test_graphs_are_captured_and_survive_a_pool_that_grows(config: ModelConfig) -> None:
    made = policy(config, torch.float32)
    engine = Engine(made, 1)
    first = engine.generate(PROMPTS[:1], 2, 8)
    assert engine._passes
    engine.generate(PROMPTS, 8, 200)  # more pages, slots and columns
    again = engine.generate(PROMPTS[:1], 2, 8)
    assert torch.equal(first.ids, again.ids) and engine.pages_in_use == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampler_and_update_agree_to_rounding(config: ModelConfig, dtype: torch.dtype) -> None:
    made = policy(config, dtype)
    rollout = Engine(made, 1).generate(PROMPTS, 4, 40)
    rollout.validate()
    mask = rollout.role == ROLE_SAMPLED
    gap = (score(made, rollout, 1.0)[0] - rollout.logp)[mask].abs()
    assert float(gap.mean()) < (1e-5 if dtype == torch.float32 else 3e-2)
