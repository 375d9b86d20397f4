"""Checkpoints that transformers wrote: the same logits here, and again in transformers after a save of ours.

The models are small and random, with every weight (norms and biases too) away from its initial value, so that no tensor
can be dropped, swapped or turned without moving the logits.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import pymathrl
from pymathrl.config import TrainConfig
from pymathrl.models import Policy, char_tokenizer, save
from pymathrl.optim import Optimizer

LENGTHS = (50, 1, 17)  # of the packed sequences
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass
class Case:
    model_type: str
    kv_heads: int
    tied: bool
    rope: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    sharded: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("llama", 2, tied=False, dtype=torch.bfloat16, sharded=True),
    "llama, one kv head, llama3": Case("llama", 1, tied=True, rope=LLAMA3),
    "llama, linear": Case("llama", 2, tied=False, rope={"rope_type": "linear", "factor": 2.0}, dtype=torch.float16),
    "llama, as many kv heads, wide": Case("llama", 4, tied=True, sharded=True, extra={"head_dim": 24}),
    "qwen2, yarn": Case("qwen2", 2, tied=True, rope=YARN, dtype=torch.bfloat16),
    "qwen2, one kv head": Case("qwen2", 1, tied=False, dtype=torch.float16, sharded=True),
    "qwen3, yarn": Case("qwen3", 2, tied=False, rope={**YARN, "beta_fast": 4.0}, sharded=True, extra={"head_dim": 16}),
    "qwen3, one kv head": Case("qwen3", 1, tied=True, dtype=torch.bfloat16, extra={"head_dim": 32}),
    "qwen3, llama3": Case("qwen3", 2, tied=True, rope=LLAMA3, dtype=torch.float16, extra={"head_dim": 16}),
}


def make(case: Case, folder: Path) -> None:
    """A model folder as transformers writes it, and a tokenizer in it."""
    config = transformers.AutoConfig.for_model(
        case.model_type,
        vocab_size=40,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **case.rope},
        tie_word_embeddings=case.tied,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=[1, 3],
        pad_token_id=0,
        **case.extra,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.25)
    model.to(case.dtype).save_pretrained(folder, max_shard_size="10KB" if case.sharded else "1GB")
    char_tokenizer().save(folder)


def sequences() -> list[Tensor]:
    return list(torch.randint(0, 40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2)).split(LENGTHS))


@torch.no_grad()
def theirs(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the sequences, each alone, fp32 [T,V], and the weights that transformers read, fp32."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return torch.cat([model.eval()(ids[None]).logits[0] for ids in sequences()]), model.state_dict()


@torch.no_grad()
def our_logits(policy: Policy) -> Tensor:
    """fp32 [T,V] of the sequences, packed."""
    offsets = torch.tensor((0, *LENGTHS)).cumsum(0)
    return policy.model.logits(policy.model.hidden(torch.cat(sequences()), offsets))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_both_ways(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    make(case, tmp_path / "theirs")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == case.sharded
    policy = pymathrl.load(tmp_path / "theirs", dtype=torch.float32)
    assert policy.eos_ids == (1, 3) and policy.config.model_type == case.model_type
    (want, weights), got = theirs(tmp_path / "theirs"), our_logits(policy)
    assert got.dtype == torch.float32 and want.std() > 1  # the comparison is relative to something
    assert ((got - want).norm() / want.norm()).item() < 1e-5
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-4
    save(policy, tmp_path / "ours", max_shard_bytes=10_000 if case.sharded else 2**30)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == case.sharded
    again, saved = theirs(tmp_path / "ours")
    assert weights.keys() == saved.keys() and all(torch.equal(weights[key], saved[key]) for key in weights)
    # not bit for bit: torch's products round otherwise where a tensor begins at another address of the mapped file
    assert ((again - want).abs().max() / want.abs().max()).item() < 1e-6


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype != torch.float32])
def test_a_save_in_the_dtype_of_the_file_gives_its_tensors_back(name: str, tmp_path: Path) -> None:
    make(CASES[name], tmp_path / "theirs")
    policy = pymathrl.load(tmp_path / "theirs", dtype=torch.float32)
    policy.model.to(CASES[name].dtype)
    save(policy, tmp_path / "ours", max_shard_bytes=10_000)
    theirs, ours = ({}, {})
    for folder, tensors in ((tmp_path / "theirs", theirs), (tmp_path / "ours", ours)):
        for file in folder.glob("*.safetensors"):
            tensors.update(load_file(file))
    assert theirs.keys() == ours.keys()
    assert all(ours[key].dtype == CASES[name].dtype and torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_comparison_notices_a_wrong_tensor(tmp_path: Path) -> None:
    """Each fault moves some logit by more than 10 times the bound."""
    make(CASES["qwen3, yarn"], tmp_path)
    policy = pymathrl.load(tmp_path)
    want, layer = our_logits(policy), policy.model.layers[1]
    e = policy.config.head_dim
    k = layer.qkv.detach()[4 * e : 5 * e]
    for param, wrong in (
        (k, k.view(2, e // 2, -1).transpose(0, 1).reshape(k.shape)),  # pairs as neighbours instead of halves
        (layer.q_norm, layer.k_norm.clone()),
        (layer.gate_up, layer.gate_up.roll(policy.config.intermediate_size, 0)),
        (layer.mixer_norm, layer.mlp_norm.clone()),
        (policy.model.head, policy.model.embed.clone()),
    ):
        right = param.detach().clone()
        param.data.copy_(wrong)
        assert ((our_logits(policy) - want).abs().max() / want.abs().max()).item() > 1e-3
        param.data.copy_(right)
    assert torch.equal(our_logits(policy), want)


@pytest.mark.parametrize("name", ["llama, one kv head, llama3", "qwen2, one kv head", "qwen3, yarn"])
def test_a_model_saved_after_training_has_the_same_logits_in_transformers(name: str, tmp_path: Path) -> None:
    make(CASES[name], tmp_path / "theirs")
    policy = pymathrl.load(tmp_path / "theirs", dtype=torch.float32)
    before = our_logits(policy)
    optimizer = Optimizer(policy.model, replace(TrainConfig(), lr=1e-2), 2)
    for _ in range(2):
        offsets = torch.tensor((0, *LENGTHS)).cumsum(0)
        policy.model.logits(policy.model.hidden(torch.cat(sequences()), offsets)).logsumexp(-1).sum().backward()
        assert optimizer.step().applied
    ours = our_logits(policy)
    assert (ours - before).norm() > 0.1 * before.norm()
    save(policy, tmp_path / "ours")
    got, _ = theirs(tmp_path / "ours")
    assert ((got - ours).abs().max() / ours.abs().max()).item() < 1e-4
