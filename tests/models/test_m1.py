"""The Mamba layer of a hybrid against the paper's numbers and plain float64 torch; its checkpoint; its start."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pymathrl.errors import UserError
from pymathrl.models import Decoder, ModelConfig, Policy, Rope, char_tokenizer, load, save
from pymathrl.models.block import Packed
from pymathrl.models.config import MAMBA_FILE, Mamba, tensor_specs
from pymathrl.models.load import state_tensors
from pymathrl.models.m1 import MambaLayer
from tests.models.plain import plain_hidden, plain_mamba
from tests.models.test_decoder import HYBRID, HYBRIDS, LENGTHS, make_model, packed

LLAMA_3B = ModelConfig(  # Llama-3.2-3B-Instruct, and what M1-3B makes of it
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24, num_kv_heads=8,
    head_dim=128, max_positions=131072, rope_theta=500000.0, rms_norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
M1_3B = replace(LLAMA_3B, mamba=Mamba(3072, 1024, attention_layers=(3, 8, 13, 18, 23, 27), dt_rank=192))


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


# --- one layer -------------------------------------------------------------------------------------------------------


def fill(k: int, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return (0.5 * torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + k)).view(shape)


def golden() -> tuple[MambaLayer, dict[str, Tensor], Tensor]:
    """The layer of the worked example, its weights in float64, its five inputs."""
    mamba = Mamba(inner_size=8, xb_size=4, attention_layers=(), dt_rank=1, state_size=2)
    config = ModelConfig(
        vocab_size=2, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        mamba=mamba,
    )  # fmt: skip
    weights = {
        "in_proj": fill(1, 25, 4), "dt_proj": fill(2, 8, 1), "dt_bias": fill(3, 8) - 1, "conv": fill(4, 8, 4),
        "conv_bias": fill(5, 8), "out": fill(6, 4, 8), "a_log": torch.tensor([1.0, 2.0]).double().log().expand(8, 2),
        "d": torch.ones(8).double(),
    }  # fmt: skip
    layer = MambaLayer(config, "cpu", torch.float32)
    with torch.no_grad():
        for name, value in weights.items():
            getattr(layer, name).copy_(value)
    h = torch.cos(0.9 * torch.arange(20, dtype=torch.float64)).view(5, 4)
    return layer, weights, h


def close(got: Tensor, *rows: list[float]) -> bool:
    """Within what eight printed decimals and fp32 say."""
    return torch.allclose(got.detach().double(), torch.tensor(rows).double().squeeze(0), rtol=1e-5, atol=2e-8)


LAST = [-0.01648767, 0.00241201, 0.02022902, 0.02896586]
SINGLE_BIAS_LAST = [-0.01934082, 0.00004712, 0.01941391, 0.03006641]
TILED_LAST = [-0.02690895, -0.00933075, 0.01243573, 0.0286202]


def test_the_worked_mixer() -> None:
    layer, _, h = golden()
    offsets = torch.tensor([0, 5])
    out = layer.mix(h.float(), Packed(torch.arange(5), torch.zeros(5, 8), offsets, 5))
    assert close(out[0], [0.05352453, 0.08245029, 0.07436674, 0.03290231]) and close(out[4], LAST)
    out.sum().backward()
    gradient = layer.dt_bias.grad
    assert gradient is not None and close(
        gradient,
        [0.01199811, -0.0039589, 0.0006317, -0.02079137, 0.12218375, 0.01911179, -0.01013627, -0.03212447],
    )
    assert not close(out[4], SINGLE_BIAS_LAST) and not close(out[4], TILED_LAST)


def test_the_plain_mixer_of_these_tests_is_the_worked_one_and_its_mistakes_are_the_known_ones() -> None:
    layer, w, h = golden()
    out, state, x = plain_mamba(layer.shape, w, h)
    assert close(out[4], LAST)
    assert close(state[[0, 5, 7]], [-0.00359558, 0.00161096], [-0.01669084, 0.00895958], [-0.0266534, 0.00426705])
    windows = x[1:].T
    assert close(windows[[0, 2]], *[[0.60886564, -0.20646134, -0.23857376, 0.63434738]] * 2)
    assert close(windows[[4, 6]], *[[-0.02321184, 0.44398152, -0.7730765, 0.94254419]] * 2)
    assert close(plain_mamba(layer.shape, w, h, biases=1)[0][4], SINGLE_BIAS_LAST)
    assert close(plain_mamba(layer.shape, w, h, tiled=True)[0][4], TILED_LAST)


@pytest.mark.parametrize("name", HYBRIDS)
def test_logits_equal_plain_float64(name: str) -> None:
    model = make_model(HYBRIDS[name])
    ids, offsets = packed(3)
    weights = {k: p.detach().double() for k, p in model.named_parameters()}
    head = weights.get("head", weights["embed"])
    with torch.no_grad():
        ours = model.logits(model.hidden(ids, offsets))
        plain = torch.cat([plain_hidden(model.config, weights, part) @ head.T for part in ids.split(LENGTHS)])
    assert plain.std() > 1
    assert ((ours - plain).norm() / plain.norm()).item() < 1e-5


def test_small_parameters_stay_fp32_in_a_model_of_low_precision() -> None:
    """A_log through bf16 would make A -1, -1.9965, -3.0089 ...: the sampler and the update would still agree, and with
    no checkpoint."""
    model = Decoder(HYBRID, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.layers[0].named_parameters()}
    small = {"conv", "conv_bias", "dt_bias", "a_log", "d"}
    assert {name for name, dtype in kinds.items() if dtype == torch.float32} == small
    a = model.layers[0].a_log.exp()
    assert torch.allclose(a, torch.arange(1.0, 17.0).expand_as(a), rtol=1e-6)


def test_how_a_layer_starts() -> None:
    model = Decoder(M1_LIKE, seed=5)
    layer = model.layers[0]
    assert isinstance(layer, MambaLayer)
    delta = torch.nn.functional.softplus(layer.dt_bias.detach().double())
    assert 1e-3 < delta.min() < 3e-3 and 4e-2 < delta.max() < 1e-1
    assert torch.equal(layer.d, torch.ones(256)) and layer.conv.abs().max() <= 0.5
    assert 0.9 * 16**-0.5 < layer.dt_proj.abs().max() <= 16**-0.5
    again = Decoder(M1_LIKE, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


M1_LIKE = ModelConfig(
    vocab_size=50, hidden_size=256, intermediate_size=96, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=32,
    mamba=Mamba(256, 64, attention_layers=(1,), dt_rank=16),
)  # fmt: skip


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_tensors_of_m1_3b() -> None:
    """Names, shapes and the number of parameters; on the meta device."""
    assert sum(p.numel() for p in Decoder(LLAMA_3B, seed=None, device="meta").parameters()) == 3_212_749_824
    model = Decoder(M1_3B, seed=None, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 4) == 3.4479
    shapes = {spec.name: list(spec.shape) for spec in tensor_specs(M1_3B)}
    mamba = {name.removeprefix("model.layers.0."): shape for name, shape in shapes.items() if ".layers.0." in name}
    assert mamba == {
        "input_layernorm.weight": [3072], "post_attention_layernorm.weight": [3072],
        "mamba.in_proj.weight": [8384, 3072], "mamba.conv1d.weight": [3072, 1, 4], "mamba.conv1d.bias": [3072],
        "mamba.dt_proj.weight": [3072, 192], "mamba.dt_proj.bias": [3072], "mamba.A_log": [3072, 16],
        "mamba.D": [3072], "mamba.out_proj.weight": [3072, 3072], "mlp.gate_proj.weight": [8192, 3072],
        "mlp.up_proj.weight": [8192, 3072], "mlp.down_proj.weight": [3072, 8192],
    }  # fmt: skip
    for i in range(28):
        kind = "mha" if i in (3, 8, 13, 18, 23, 27) else "mamba"
        assert f"model.layers.{i}.{kind}.in_proj.weight" in shapes
    assert shapes["model.layers.27.mha.in_proj.weight"] == [5120, 3072]
    assert shapes["model.layers.27.mha.out_proj.weight"] == [3072, 3072] and "lm_head.weight" not in shapes
    views = state_tensors(model)
    assert all(list(views[name].shape) == shape for name, shape in shapes.items())


def policy_of(config: ModelConfig) -> Policy:
    return Policy(make_model(config), char_tokenizer(), config, (1,), "plain")


def as_older(folder: Path, config: ModelConfig) -> None:
    """The weights of the folder under the older names, made from the newer file alone."""
    tensors = load_file(folder / "model.safetensors")
    older: dict[str, Tensor] = {}
    assert config.mamba is not None
    for name, value in tensors.items():
        if name.endswith("mamba.in_proj.weight"):
            parts = value.split(config.mamba.parts)
            for part, rows in zip(("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down"), parts, strict=True):
                older[name.replace("in_proj", part)] = rows.contiguous()
        elif name.endswith("mha.in_proj.weight"):
            sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
            for part, rows in zip("qkv", value.split(sizes), strict=True):
                older[name.replace("mha.in_proj", f"self_attn.{part}_proj")] = rows.contiguous()
        else:
            older[name.replace("mha.out_proj", "self_attn.o_proj")] = value
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("older", [False, True], ids=["in_proj", "in_proj_z and so on"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_checkpoints_of_both_namings_come_back(tmp_path: Path, name: str, older: bool) -> None:
    policy = policy_of(HYBRIDS[name])
    save(policy, tmp_path)
    if older:
        as_older(tmp_path, policy.config)
        keys = load_file(tmp_path / "model.safetensors").keys()
        assert any("in_proj_z" in key for key in keys) and not any("mha" in key for key in keys)
    back = load(tmp_path)
    assert back.config.mamba == policy.config.mamba
    for (key, a), b in zip(policy.model.named_parameters(), back.model.parameters(), strict=True):
        assert torch.equal(a, b), key
    save(back, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == {s.name for s in tensor_specs(policy.config)}


def released(folder: Path, **changes: Any) -> Path:
    """A folder as M1's own code writes it: what follows from other entries is null or absent."""
    policy = policy_of(replace(HYBRID, mamba=Mamba(32, 16, attention_layers=(1,), dt_rank=2)))
    save(policy, folder)
    raw = {
        "d_model": 32, "ssm_cfg": {"expand": 1}, "rms_norm_eps": 1e-6, "vocab_size": None, "d_inner": None,
        "d_xb": 16, "intermediate_size": 48, "hidden_act": "silu", "n_layer": 3, "attn_layers": [1],
    } | changes  # fmt: skip
    (folder / MAMBA_FILE).write_text(json.dumps(raw))
    return folder


def test_a_released_folder(tmp_path: Path) -> None:
    """Its rope_scaling is not M1's, and the name of its base model goes on."""
    config = json.loads((released(tmp_path) / "config.json").read_text())
    config |= {
        "_name_or_path": "meta-llama/Llama-3.2-3B-Instruct", "max_position_embeddings": 4096,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy = load(tmp_path)
    assert policy.config.rope == Rope()
    assert policy.config.mamba == Mamba(32, 16, (1,), 2, base="meta-llama/Llama-3.2-3B-Instruct")
    save(policy, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["_name_or_path"] == config["_name_or_path"]
    save(policy_of(replace(HYBRID, mamba=None)), tmp_path / "again")
    assert load(tmp_path / "again").config.mamba is None, "a hybrid's file stayed in a folder that is none any more"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 4}, "n_layer must be 3, as config.json says, got 4"),
        ({"attn_layers": [3]}, r"attn_layers must be different numbers in 0\.\.2, got \[3\]"),
        ({"attn_layers": [0, 1, 2]}, "attn_layers names every layer"),
        ({"attn_layers": None}, "attn_layers must be a list of layer numbers, got None"),
        ({"d_xb": 24}, "d_xb must divide d_inner, and d_state must divide d_xb, got d_inner = 32, d_xb = 24"),
        ({"ssm_cfg": {"expand": 1, "headdim": 64}}, "ssm_cfg: headdim = 64 is not supported"),
        ({"ssm_cfg": {"conv_bias": False}}, "conv_bias must be True, got False"),
        ({"ssm_cfg": {"d_conv": 5}}, "d_conv must be 2, 3 or 4, got 5"),
        ({"d_inner": "wide"}, "d_inner must be an integer, got 'wide'"),
        ({"d_inner": 64}, r"expected shape \[64, 16\] from config.json, got \[32, 16\]"),
    ],
)
def test_folders_that_are_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(released(tmp_path, **change))


def test_a_missing_tensor_is_named_in_the_naming_of_the_file(tmp_path: Path) -> None:
    policy = policy_of(HYBRID)
    save(policy, tmp_path)
    as_older(tmp_path, HYBRID)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mamba.B_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model.layers.2.mamba.B_proj.weight of shape \[32, 32\] expected"):
        load(tmp_path)


# --- the start of M1 -------------------------------------------------------------------------------------------------


def test_a_layer_starts_from_attention() -> None:
    teacher = make_model(replace(M1_LIKE, mamba=None)).layers[0]
    layer = MambaLayer(M1_LIKE, "cpu", torch.float32)
    layer.start_from(teacher.qkv, teacher.out, torch.Generator().manual_seed(0))
    q, k, v = teacher.qkv.split([256, 64, 64])
    z, x, b, c, r = layer.in_proj.split([256, 64, 64, 256, 16])
    assert torch.equal(x, v) and torch.equal(b, k) and torch.equal(c, q) and torch.equal(layer.out, teacher.out)
    for rows in (z, r):
        assert 0.95 / 16 < rows.abs().max() <= 1 / 16
