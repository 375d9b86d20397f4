"""Model configs in and out, and the rotary table against transformers and against angles computed by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pymathrl.errors import UserError
from pymathrl.models import ModelConfig, Rope, rope_table
from pymathrl.models.config import tensor_specs

TINY = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
)
QWEN2 = replace(TINY, model_type="qwen2", attention_bias=True, rope_theta=1e6)
QWEN3 = replace(TINY, model_type="qwen3", qk_norm=True, head_dim=16, rope_theta=1e6)
YARN = Rope("yarn", factor=4.0, original_max_position_embeddings=32)
ROPES = {
    "default": Rope(),
    "linear": Rope("linear", factor=2.5),
    "llama3": Rope("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": YARN,
    "yarn: attention factor": replace(YARN, attention_factor=0.8),
    "yarn: betas": replace(YARN, beta_fast=8.0, beta_slow=2.0),
    "yarn: mscales": replace(YARN, mscale=1.0, mscale_all_dim=0.5),
    "yarn: one mscale": replace(YARN, mscale=0.7),
    "yarn: ramp not rounded": replace(YARN, truncate=False),
    "yarn: shrinks": replace(YARN, factor=0.5),
}
CASES = {
    "llama": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    **{f"rope {name}": replace(TINY, rope=rope) for name, rope in ROPES.items()},
    "qwen3 with yarn": replace(QWEN3, rope=YARN),
}


def theirs(config: ModelConfig, positions: int) -> Tensor:
    """The table of transformers, for a Llama of the same shape (Qwen uses the same classes)."""
    raw = replace(config, model_type="llama", attention_bias=False, qk_norm=False).to_hf(torch.float32)
    rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))
    cos, sin = rotary(torch.zeros(1), torch.arange(positions)[None])
    half = config.head_dim // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], -1)


@pytest.mark.parametrize("name", ROPES)
def test_rope_table_equals_transformers(name: str) -> None:
    for head_dim, theta in ((64, 500000.0), (128, 1e6), (8, 10000.0)):
        config = replace(TINY, head_dim=head_dim, rope_theta=theta, rope=ROPES[name], max_positions=4096)
        ours, want = rope_table(config, 4096), theirs(config, 4096)
        assert ours.dtype == torch.float32 and ours.shape == (4096, head_dim)
        assert (ours - want).abs().max().item() <= 1e-6
        if name != "default":  # the bound tells the variants apart
            assert (rope_table(replace(config, rope=Rope()), 4096) - want).abs().max().item() > 0.1


def test_rope_table_by_hand() -> None:
    """E = 4, theta = 1e4: w = 1, 0.01 rad a token, that is 6.28 and 628 tokens a turn."""
    config = replace(TINY, head_dim=4)

    def row(first: float, second: float, scale: float = 1.0) -> Tensor:
        return scale * torch.tensor([math.cos(first), math.cos(second), math.sin(first), math.sin(second)])

    for rope, want in (
        (Rope(), row(3.0, 0.03)),
        (Rope("linear", factor=2.0), row(1.5, 0.015)),
        # 64 tokens: waves under 64/4 stay, waves over 64/1 are stretched by 8
        (Rope("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0), row(3.0, 0.03 / 8)),
        # low 0.05: 628 lies between 64/4 and 64/0.05; keep = (64/628.3 - 0.05) / 3.95 = 0.013129
        (Rope("llama3", 8.0, 64, low_freq_factor=0.05, high_freq_factor=4.0), row(3.0, 0.03 * 0.13648783)),
        # pairs that turn 32 and once in 64 tokens: j < 0 and 0.504, rounded to 0 and 1; the ramp keeps pair 0 whole
        (Rope("yarn", 4.0, 64), row(3.0, 0.0075, 1 + 0.1 * math.log(4))),
        # not rounded, the ramp ends at 0.504; beta_fast 32 still starts it at 0
        (Rope("yarn", 4.0, 64, truncate=False, attention_factor=1.0), row(3.0, 0.0075)),
        (Rope("yarn", 4.0, 64, mscale=2.0, mscale_all_dim=1.0), row(3.0, 0.0075, 1.2772589 / 1.1386294)),
    ):
        torch.testing.assert_close(rope_table(replace(config, rope=rope), 4)[3], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ROPES)
def test_a_longer_rope_table_begins_with_the_shorter_one(name: str) -> None:
    """A table grows as sequences do: a token must not be turned by other bits because another one is longer."""
    config = replace(TINY, head_dim=64, rope=ROPES[name])
    whole = rope_table(config, 101)
    for n in (1, 7, 64, 100):
        assert torch.equal(rope_table(config, n), whole[:n])


def test_a_rope_table_made_while_sampling_serves_the_update() -> None:
    with torch.inference_mode():
        table = rope_table(TINY, 3)
    assert not table.is_inference()


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name: str) -> None:
    config = replace(CASES[name], eos_ids=(1, 3), bos_id=2, pad_id=0)
    raw = json.loads(json.dumps(config.to_hf(torch.float32)))
    assert ModelConfig.from_hf(raw) == config
    again = transformers.AutoConfig.for_model(**raw).to_dict()  # the keys that transformers 5 writes
    assert "rope_scaling" not in again
    assert ModelConfig.from_hf({**again, "architectures": raw["architectures"]}) == config


def test_rope_scaling_as_real_files_spell_it() -> None:
    base = {**TINY.to_hf(torch.float32), "rope_theta": 500000.0}
    llama = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    for rope, want in (
        ({**llama, "rope_type": "llama3"}, Rope("llama3", 8.0, 8192, 1.0, 4.0)),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, YARN),  # Qwen's readme
        ({"type": "yarn", "original_max_position_embeddings": 32, "factor": None}, YARN),  # 128 / 32
        ({"rope_type": "yarn", "type": "yarn", "factor": 2}, Rope("yarn", 2, 128)),
        ({"type": "linear", "factor": 2.0, "original_max_position_embeddings": 64}, Rope("linear", 2.0)),
        ({"rope_type": "default", "factor": 4.0}, Rope()),
        ({}, Rope()),
        (None, Rope()),
    ):
        config = ModelConfig.from_hf({**base, "rope_scaling": rope})
        assert (config.rope, config.rope_theta) == (want, 500000.0)
        theta = {"rope_theta": 7.0}  # transformers 5
        config = ModelConfig.from_hf({**base, "rope_scaling": None, "rope_parameters": {**(rope or {}), **theta}})
        assert (config.rope, config.rope_theta) == (want, 7.0)


def test_defaults_of_keys_that_old_files_leave_out() -> None:
    raw = QWEN3.to_hf(torch.float32)
    for key in ("head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "tie_word_embeddings"):
        del raw[key]
    got = ModelConfig.from_hf(raw)
    want = transformers.Qwen3Config(
        **{key: raw[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")}
    )
    assert (got.head_dim, got.max_positions) == (want.head_dim, want.max_position_embeddings) == (128, 32768)
    assert (got.rope_theta, got.tie_embeddings) == (want.rope_parameters["rope_theta"], want.tie_word_embeddings)
    llama = {key: value for key, value in TINY.to_hf(torch.float32).items() if key != "head_dim"}
    assert ModelConfig.from_hf({**llama, "pad_token_id": -1, "eos_token_id": [1, 3]}) == replace(TINY, eos_ids=(1, 3))


def rope(**entries: object) -> dict[str, object]:
    return {"rope_scaling": entries}


CONFIG_FAULTS = [
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
    ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM .model_type 'qwen3_m"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification .* is not supported"),
    ({"architectures": None, "model_type": None}, "supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
    (rope(rope_type="dynamic", factor=2.0), "rope_type 'dynamic' is not supported; supported: default, linear, llama3"),
    (rope(type="longrope", short_factor=[1.0]), "rope_type 'longrope' is not supported"),
    (rope(rope_type="su"), "config.json: rope_scaling: rope_type 'su' is not supported"),
    (rope(rope_type="default", mrope_section=[16, 24]), r"rope_scaling: mrope_section = \[16, 24\] is not supported"),
    (rope(rope_type="yarn", factor=2.0, attn_factor=1.0), "rope_scaling: attn_factor = 1.0 is not supported"),
    (rope(rope_type="linear"), "rope_scaling: factor is missing; 'linear' needs it"),
    (rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0), "high_freq_factor is missing; 'llama3' needs it"),
    (rope(rope_type="linear", factor="2"), "rope_scaling: factor must be a positive number, got '2'"),
    (rope(rope_type="linear", factor=0), "rope_scaling: factor must be a positive number, got 0"),
    (rope(rope_type="yarn", factor=2.0, truncate=1), "rope_scaling: truncate must be true or false, got 1"),
    (rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
    ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 is not supported; only 1.0 is"),
    ({"rope_theta": "big"}, "rope_theta must be float, got 'big'"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias = True is not supported; only False is"),
    ({"attention_bias": True}, "attention_bias = True is not supported; only False is"),
    ({"attention_bias": True, "architectures": None, "model_type": "qwen3"}, "attention_bias = True is not supported"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding_attention"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = .*awq.* is not supported"),
    ({"hidden_size": "32"}, "hidden_size must be int, got '32'"),
    ({"num_hidden_layers": None}, "num_hidden_layers must be int, got None"),
    ({"num_key_value_heads": 3}, "num_attention_heads .4. must be a multiple of num_key_value_heads .3."),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    ({"eos_token_id": ["</s>"]}, "eos_token_id must be an integer or a list of integers"),
    ({"bos_token_id": True}, "bos_token_id must be an integer or a list of integers, got True"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_FAULTS)
def test_config_faults(change: dict[str, object], message: str) -> None:
    raw = {**TINY.to_hf(torch.float32), **change}
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_hf(raw, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ") and "\n" not in str(caught.value)


def test_qwen2_reads_past_attention_bias() -> None:
    """The biases of Qwen2 are part of the architecture; a file that says so, or not, means the same model."""
    raw = QWEN2.to_hf(torch.float32)
    assert ModelConfig.from_hf({**raw, "attention_bias": True}) == ModelConfig.from_hf(raw) == QWEN2


def test_a_config_that_no_architecture_stores_is_not_written() -> None:
    for config, message in (
        (replace(TINY, attention_bias=True), "attention_bias: expected False for model_type 'llama', got True"),
        (replace(TINY, model_type="qwen2"), "attention_bias: expected True for model_type 'qwen2', got False"),
        (replace(QWEN3, qk_norm=False), "qk_norm: expected True for model_type 'qwen3', got False"),
    ):
        with pytest.raises(ValueError, match=message):
            config.to_hf(torch.float32)


def test_rope_entries_of_another_type_are_refused_in_memory() -> None:
    with pytest.raises(UserError, match="low_freq_factor means nothing to 'yarn'"):
        replace(YARN, low_freq_factor=1.0)


@pytest.mark.parametrize("config", [TINY, replace(TINY, tie_embeddings=True), QWEN2, QWEN3])
def test_tensors_tile_their_parameters(config: ModelConfig) -> None:
    """Every row of every parameter belongs to one tensor of the checkpoint, and the names are those of transformers."""
    rows: dict[str, int] = {}
    for spec in tensor_specs(config):
        assert spec.start == rows.get(spec.param, 0), spec  # q, k, v and gate, up in this order, without gaps
        rows[spec.param] = spec.start + spec.shape[0]
    e, d = config.head_dim, config.hidden_size
    assert rows["layers.0.qkv"] == 8 * e and rows["layers.2.gate_up"] == 96 and rows["layers.1.out"] == d
    assert rows.get("layers.0.qkv_bias") == (8 * e if config.attention_bias else None)
    assert rows.get("layers.0.q_norm") == rows.get("layers.0.k_norm") == (e if config.qk_norm else None)
    assert ("head" in rows) != config.tie_embeddings
    twin = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config.to_hf(torch.float32))
    )
    assert {spec.name: spec.shape for spec in tensor_specs(config)} == {
        name: tuple(param.shape) for name, param in twin.named_parameters()
    }
