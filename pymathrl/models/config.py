"""What a decoder is, without its network: shape, rotary positions, and the tensors of its checkpoint.

Llama, Qwen2 (also 2.5) and Qwen3 are one decoder with two switches: a bias on q, k and v (Qwen2), and an RMSNorm over
each q and k head (Qwen3). A hybrid (M1) is a Llama of which some layers are Mamba layers. Memory holds a checkpoint's
values in the checkpoint's own layout, only stacked: `qkv` has the rows of q, k and v, `gate_up` those of gate and up,
one GEMM each.

Dimensions: D hidden size, H query heads, K key/value heads, E head size, F MLP size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pymathrl.errors import UserError

ARCHITECTURES = {  # model_type -> architecture
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MAMBA_FILE = "mamba_config.json"  # beside config.json: the decoder is a hybrid
SSM_KEYS = ("expand", "d_state", "d_conv", "dt_rank")  # of its ssm_cfg, read
SSM_ONLY = {"conv_bias": True, "bias": False, "repeat_kv_before_conv": True}  # of its ssm_cfg, no other value is read
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # rope_type -> fields it needs, fields it may have
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True)
class Rope:
    """How rotary angles are stretched past the trained length: the entries of config.json's rope_scaling, by their
    names there, None where absent.

    Not supported: "dynamic", "longrope". Their frequencies change once a sequence outgrows a length, while the keys
    already cached were turned by the old ones: a token's logits would depend on how the text was cut into calls.
    """

    rope_type: str = "default"
    factor: float | None = None  # longest sequence / trained length
    original_max_position_embeddings: int | None = None  # trained length in tokens
    low_freq_factor: float | None = None  # llama3: wavelengths over original/low are stretched by factor,
    high_freq_factor: float | None = None  # those under original/high not at all
    attention_factor: float | None = None  # yarn: multiplies cos and sin; from factor and the mscales where absent
    beta_fast: float | None = None  # yarn: a pair that turns this often within the trained length is not stretched (32)
    beta_slow: float | None = None  # yarn: a pair that turns less often is stretched by factor (1)
    mscale: float | None = None  # yarn: weights of log(factor) in attention_factor, read only as a pair
    mscale_all_dim: float | None = None
    truncate: bool | None = None  # yarn: round the bounds of the ramp to whole pairs (True)

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UserError(
                f"rope_scaling: rope_type {self.rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        needed, optional = ROPE_TYPES[self.rope_type]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is None:
                if field.name in needed:
                    raise UserError(f"rope_scaling: {field.name} is missing; {self.rope_type!r} needs it")
            elif field.name not in needed + optional:
                raise UserError(f"rope_scaling: {field.name} means nothing to {self.rope_type!r}; leave it out")
            elif field.name == "truncate":
                if not isinstance(value, bool):
                    raise UserError(f"rope_scaling: truncate must be true or false, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"rope_scaling: {field.name} must be a positive number, got {value!r}")

    @staticmethod
    def from_hf(raw: dict[str, Any], max_positions: int) -> Rope:
        """raw: the object of rope_scaling (transformers 4) or rope_parameters (5). Entries that belong to another type
        are left out, as transformers ignores them; an entry that no type has is refused."""
        names = {field.name for field in fields(Rope)}
        values = {key: value for key, value in raw.items() if value is not None}
        rope_type = str(values.get("rope_type", values.pop("type", "default")))
        values.pop("type", None)
        values.pop("rope_theta", None)
        if values.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"rope_scaling: partial_rotary_factor = {raw['partial_rotary_factor']!r} is not supported; only 1.0 is"
            )
        if rope_type not in ROPE_TYPES:
            return Rope(rope_type)  # the error that lists what is supported, before one about an entry of that type
        unknown = sorted(set(values) - names)
        if unknown:
            raise UserError(f"rope_scaling: {unknown[0]} = {values[unknown[0]]!r} is not supported")
        needed, optional = ROPE_TYPES[rope_type]
        if "original_max_position_embeddings" in needed:
            trained = values.setdefault("original_max_position_embeddings", max_positions)
            if rope_type == "yarn" and isinstance(trained, int) and trained > 0:
                values.setdefault("factor", max_positions / trained)
        return Rope(rope_type, **{key: values[key] for key in needed + optional if key in values})

    def to_hf(self) -> dict[str, Any] | None:
        """rope_scaling of config.json; None for the default positions."""
        if self.rope_type == "default":
            return None
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Mamba:
    """Shape of the Mamba layers of a hybrid, and which layers are none: what mamba_config.json says (M1, arXiv
    2504.10449).

    Channel c of inner_size belongs to mini-head c // state_size; x and B have xb_size / state_size mini-heads, each
    repeated for inner_size / xb_size neighbouring ones.
    """

    inner_size: int  # d_inner, channels
    xb_size: int  # d_xb, of x and of B before they are repeated; divides inner_size
    attention_layers: tuple[int, ...]  # attn_layers, counted from 0; the others are Mamba layers
    dt_rank: int  # of the projection that makes delta
    state_size: int = 16  # d_state, numbers per channel; divides xb_size
    conv_width: int = 4  # d_conv, tokens
    base: str | None = None  # config.json's _name_or_path: the model that M1's own loader builds on

    def __post_init__(self) -> None:
        for name in ("inner_size", "xb_size", "dt_rank", "state_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{MAMBA_FILE}: {name} must be at least 1, got {getattr(self, name)}")
        if self.inner_size % self.xb_size or self.xb_size % self.state_size:
            raise UserError(
                f"{MAMBA_FILE}: d_xb must divide d_inner, and d_state must divide d_xb, got d_inner = "
                f"{self.inner_size}, d_xb = {self.xb_size} and d_state = {self.state_size}"
            )
        if not 2 <= self.conv_width <= 4:
            raise UserError(f"{MAMBA_FILE}: d_conv must be 2, 3 or 4, got {self.conv_width}")

    @property
    def parts(self) -> list[int]:
        """Rows of the input projection: z, x, B, C, r."""
        return [self.inner_size, self.xb_size, self.xb_size, self.inner_size, self.dt_rank]

    @staticmethod
    def from_hf(raw: dict[str, Any], c: ModelConfig, base: str | None) -> Mamba:
        """raw: the object of mamba_config.json, beside a config.json that says `c`."""
        for key, same in (
            ("d_model", c.hidden_size), ("n_layer", c.num_layers), ("intermediate_size", c.intermediate_size),
            ("hidden_act", "silu"), ("vocab_size", c.vocab_size), ("rms_norm_eps", c.rms_norm_eps),
        ):  # fmt: skip
            if raw.get(key) not in (None, same):
                raise UserError(f"{MAMBA_FILE}: {key} must be {same!r}, as config.json says, got {raw[key]!r}")
        kwargs = raw.get("ssm_cfg") or {}
        unknown = sorted(set(kwargs) - set(SSM_KEYS) - set(SSM_ONLY))
        if unknown:
            raise UserError(f"{MAMBA_FILE}: ssm_cfg: {unknown[0]} = {kwargs[unknown[0]]!r} is not supported")
        for key, only in SSM_ONLY.items():
            if kwargs.get(key, only) != only:
                raise UserError(f"{MAMBA_FILE}: ssm_cfg: {key} must be {only!r}, got {kwargs[key]!r}")

        def size(key: str, source: dict[str, Any], default: int) -> int:
            value = source.get(key)
            value = default if value in (None, "auto") else value
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"{MAMBA_FILE}: {key} must be an integer, got {value!r}")
            return value

        layers = raw.get("attn_layers")
        if not isinstance(layers, list) or not all(isinstance(i, int) for i in layers):
            raise UserError(f"{MAMBA_FILE}: attn_layers must be a list of layer numbers, got {layers!r}")
        inner = size("d_inner", raw, size("expand", kwargs, 1) * c.hidden_size)
        return Mamba(
            inner_size=inner, xb_size=size("d_xb", raw, c.num_kv_heads * c.head_dim), attention_layers=tuple(layers),
            dt_rank=size("dt_rank", kwargs, -(-c.hidden_size // 16)), state_size=size("d_state", kwargs, 16),
            conv_width=size("d_conv", kwargs, 4), base=base,
        )  # fmt: skip

    def to_hf(self, c: ModelConfig) -> dict[str, Any]:
        """mamba_config.json."""
        return {
            "d_model": c.hidden_size,
            "ssm_cfg": {"d_state": self.state_size, "d_conv": self.conv_width, "dt_rank": self.dt_rank, "expand": 1},
            "rms_norm_eps": c.rms_norm_eps,
            "vocab_size": None,
            "d_inner": self.inner_size,
            "d_xb": self.xb_size,
            "intermediate_size": c.intermediate_size,
            "hidden_act": "silu",
            "n_layer": c.num_layers,
            "attn_layers": list(self.attention_layers),
        }


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder; the meaning of each field is that of Hugging Face's config.json."""

    vocab_size: int  # V, rows of the embedding table
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K, divides H
    head_dim: int  # E, even
    max_positions: int = 2048  # longest sequence in tokens
    rope_theta: float = 10000.0
    rope: Rope = Rope()
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    attention_bias: bool = False  # bias on q, k and v (Qwen2); the output projection has none
    qk_norm: bool = False  # RMSNorm over each q and k head before rotation (Qwen3)
    model_type: str = "llama"
    mamba: Mamba | None = None  # of a hybrid
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"model config: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model config: num_attention_heads ({self.num_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim must be even for rotary positions, got {self.head_dim}")
        if self.mamba is None:
            return
        layers = self.mamba.attention_layers
        if sorted(set(layers)) != sorted(layers) or not all(0 <= i < self.num_layers for i in layers):
            raise UserError(
                f"{MAMBA_FILE}: attn_layers must be different numbers in 0..{self.num_layers - 1}, got {list(layers)}"
            )
        if len(layers) == self.num_layers:
            raise UserError(f"{MAMBA_FILE}: attn_layers names every layer; a hybrid has at least one Mamba layer")
        if self.attention_bias or self.qk_norm:
            raise UserError(f"{MAMBA_FILE}: a hybrid must be of model_type 'llama', got {self.model_type!r}")

    def is_attention(self, layer: int) -> bool:
        return self.mamba is None or layer in self.mamba.attention_layers

    @property
    def attention_count(self) -> int:
        """Layers of attention; the others are Mamba layers."""
        return self.num_layers if self.mamba is None else len(self.mamba.attention_layers)

    @staticmethod
    def from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads a config.json of transformers 4 or 5. UserError names the key, what is supported and what was found."""
        try:
            return _config_from_hf(raw)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def to_hf(self, dtype: torch.dtype) -> dict[str, Any]:
        """config.json of the model, readable by transformers 4 and 5 and by vLLM."""
        for name, model_type in (("attention_bias", "qwen2"), ("qk_norm", "qwen3")):
            if getattr(self, name) != (self.model_type == model_type):
                raise ValueError(
                    f"ModelConfig.{name}: expected {self.model_type == model_type} for model_type "
                    f"{self.model_type!r}, got {getattr(self, name)}: no Hugging Face architecture stores that"
                )
        eos: int | list[int] | None = list(self.eos_ids)
        if isinstance(eos, list) and len(eos) < 2:
            eos = eos[0] if eos else None
        base = {} if self.mamba is None or self.mamba.base is None else {"_name_or_path": self.mamba.base}
        return base | {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope.to_hf(),
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_id,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


def _config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    model_type = raw.get("model_type")
    architectures = raw.get("architectures") or [ARCHITECTURES.get(str(model_type))]
    if model_type not in ARCHITECTURES or architectures != [ARCHITECTURES[model_type]]:
        raise UserError(
            f"architecture {architectures[0] or 'unnamed'} (model_type {model_type!r}) is not supported; "
            f"supported: {', '.join(ARCHITECTURES.values())}"
        )

    def get(key: str, kind: type, default: Any = None, source: dict[str, Any] = raw) -> Any:
        value = source.get(key)
        if value is None:
            value = default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{key} must be {kind.__name__}, got {value!r}")
        return value

    refused = {
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "mlp_bias": (bool(raw.get("mlp_bias", False)), False),
        "use_sliding_window": (bool(raw.get("use_sliding_window", False)), False),
        "layer_types": (sorted(set(raw.get("layer_types") or ["full_attention"])), ["full_attention"]),
        "partial_rotary_factor": (raw.get("partial_rotary_factor") or 1.0, 1.0),
        "quantization_config": (raw.get("quantization_config"), None),
    }
    if model_type != "qwen2":  # in Llama and Qwen3 files this flag puts a bias on the output projection as well
        refused["attention_bias"] = (bool(raw.get("attention_bias", False)), False)
    for key, (got, only) in refused.items():
        if got != only:
            raise UserError(f"{key} = {got!r} is not supported; only {only!r} is")
    heads = get("num_attention_heads", int)
    hidden = get("hidden_size", int)
    max_positions = get("max_position_embeddings", int, 2048 if model_type == "llama" else 32768)
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers 5 prefers the old key, too
    if not isinstance(scaling, dict):
        raise UserError(f"rope_scaling must be an object, got {scaling!r}")
    # transformers 5 keeps theta inside; where a file has both keys it may be in the one that does not count
    theta = get("rope_theta", float, get("rope_theta", float, 10000.0), scaling)
    return ModelConfig(
        vocab_size=get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=get("intermediate_size", int),
        num_layers=get("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", int, heads),
        head_dim=get("head_dim", int, 128 if model_type == "qwen3" else hidden // max(heads, 1)),
        max_positions=max_positions,
        rope_theta=theta,
        rope=Rope.from_hf(scaling, max_positions),
        rms_norm_eps=get("rms_norm_eps", float, 1e-6),
        tie_embeddings=get("tie_word_embeddings", bool, False),
        attention_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        model_type=model_type,
        bos_id=next(iter(token_ids(raw, "bos_token_id")), None),
        eos_ids=token_ids(raw, "eos_token_id"),
        pad_id=next((i for i in token_ids(raw, "pad_token_id") if i >= 0), None),  # -1 in early Llama files: none
    )


def token_ids(raw: dict[str, Any], key: str) -> tuple[int, ...]:
    """Ids under `key` of a config.json or generation_config.json: an integer, a list of integers, or absent."""
    value = raw.get(key)
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"{key} must be an integer or a list of integers, got {value!r}")
    return ids


@torch.inference_mode(False)  # a table made while sampling is used again by the update, which needs normal tensors
def rope_table(config: ModelConfig, positions: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [positions, E]: row p holds cos of the E/2 angles p*w_j, then sin of them, both times the attention factor.

    Pair j of a head x turns as (x_j, x_{j+E/2}) -> (x_j cos - x_{j+E/2} sin, x_{j+E/2} cos + x_j sin). Angles are fp32
    products as in transformers: at position 1e5 the rounding of p*w is up to 4e-3 rad, so a more exact table would not
    be the one that a model was trained with. Made on the CPU: every device turns by the same bits.
    """
    frequency, scale = _frequencies(config)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return (torch.cat([angle.cos(), angle.sin()], dim=-1) * scale).to(device)


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """w_j in radians per token, fp32 [E/2], and the attention factor."""
    rope, e = config.rope, config.head_dim
    power = config.rope_theta ** (torch.arange(0, e, 2, dtype=torch.float32) / e)
    plain = 1.0 / power
    if rope.rope_type == "default":
        return plain, 1.0
    factor, trained = rope.factor, rope.original_max_position_embeddings
    assert factor is not None  # Rope refuses to be made without what its type needs
    if rope.rope_type == "linear":
        return plain / factor, 1.0
    assert trained is not None
    if rope.rope_type == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        assert low is not None and high is not None
        wavelength = 2 * math.pi / plain
        keep = ((trained / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long waves, 1: short ones
        return (1 - keep) * plain / factor + keep * plain, 1.0
    first = _pair_that_turns(rope.beta_fast or 32.0, config.rope_theta, e, trained)
    last = _pair_that_turns(rope.beta_slow or 1.0, config.rope_theta, e, trained)
    if rope.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, e - 1)
    ramp = (torch.arange(e // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * power) * (1 - keep) + plain * keep, _yarn_attention_factor(rope, factor)


def _pair_that_turns(times: float, theta: float, e: int, length: int) -> float:
    """The index j, not rounded, whose pair turns `times` times within `length` tokens: length*w_j = 2*pi*times."""
    return e * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_attention_factor(rope: Rope, factor: float) -> float:
    """1 + log(factor)/10, or the ratio of two such terms where both mscales are given."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    grown = math.log(factor) if factor > 1 else 0.0
    if rope.mscale and rope.mscale_all_dim:
        return (0.1 * rope.mscale * grown + 1) / (0.1 * rope.mscale_all_dim * grown + 1)
    return 0.1 * grown + 1


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor of a checkpoint lives: rows start .. start + shape[0] of parameter `param`."""

    name: str  # in model.safetensors
    shape: tuple[int, ...]  # in model.safetensors, and of those rows
    param: str  # in Decoder.named_parameters()
    start: int = 0

    def view(self, params: dict[str, Tensor]) -> Tensor:
        """The rows of this tensor in its parameter (or in the parameter's gradient): a view, contiguous."""
        return params[self.param].narrow(0, self.start, self.shape[0]).view(self.shape)


def tensor_specs(config: ModelConfig, split: bool = False) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint, in the order in which it is written. split: the older naming of hybrids, in which
    the parts of a layer's input projection are tensors of their own; such files are read, not written."""
    c = config
    yield TensorSpec("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), "embed")
    for i in range(c.num_layers):
        hf, own = f"model.layers.{i}.", f"layers.{i}."
        yield TensorSpec(hf + "input_layernorm.weight", (c.hidden_size,), own + "mixer_norm")
        if c.mamba is not None and not c.is_attention(i):
            yield from _mamba_specs(c, c.mamba, hf + "mamba.", own, split)
        elif c.mamba is not None and not split:
            q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
            yield TensorSpec(hf + "mha.in_proj.weight", (q + 2 * kv, c.hidden_size), own + "qkv")
            yield TensorSpec(hf + "mha.out_proj.weight", (c.hidden_size, q), own + "out")
        else:
            yield from _attention_specs(c, hf + "self_attn.", own)
        yield TensorSpec(hf + "post_attention_layernorm.weight", (c.hidden_size,), own + "mlp_norm")
        for j, name in enumerate(("gate", "up")):
            shape = (c.intermediate_size, c.hidden_size)
            yield TensorSpec(f"{hf}mlp.{name}_proj.weight", shape, own + "gate_up", j * c.intermediate_size)
        yield TensorSpec(hf + "mlp.down_proj.weight", (c.hidden_size, c.intermediate_size), own + "down")
    yield TensorSpec("model.norm.weight", (c.hidden_size,), "norm")
    if not c.tie_embeddings:
        yield TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), "head")


def _attention_specs(c: ModelConfig, hf: str, own: str) -> Iterator[TensorSpec]:
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    blocks = (("q", 0, q), ("k", q, kv), ("v", q + kv, kv))
    for name, start, size in blocks:
        yield TensorSpec(f"{hf}{name}_proj.weight", (size, c.hidden_size), own + "qkv", start)
    if c.attention_bias:
        for name, start, size in blocks:
            yield TensorSpec(f"{hf}{name}_proj.bias", (size,), own + "qkv_bias", start)
    if c.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield TensorSpec(f"{hf}{name}.weight", (c.head_dim,), own + name)
    yield TensorSpec(hf + "o_proj.weight", (c.hidden_size, q), own + "out")


def _mamba_specs(c: ModelConfig, m: Mamba, hf: str, own: str, split: bool) -> Iterator[TensorSpec]:
    if split:
        start = 0
        for name, size in zip(("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down"), m.parts, strict=True):
            yield TensorSpec(f"{hf}{name}.weight", (size, c.hidden_size), own + "in_proj", start)
            start += size
    else:
        yield TensorSpec(hf + "in_proj.weight", (sum(m.parts), c.hidden_size), own + "in_proj")
    yield TensorSpec(hf + "conv1d.weight", (m.inner_size, 1, m.conv_width), own + "conv")
    yield TensorSpec(hf + "conv1d.bias", (m.inner_size,), own + "conv_bias")
    yield TensorSpec(hf + "dt_proj.weight", (m.inner_size, m.dt_rank), own + "dt_proj")
    yield TensorSpec(hf + "dt_proj.bias", (m.inner_size,), own + "dt_bias")
    yield TensorSpec(hf + "A_log", (m.inner_size, m.state_size), own + "a_log")
    yield TensorSpec(hf + "D", (m.inner_size,), own + "d")
    yield TensorSpec(hf + "out_proj.weight", (c.hidden_size, m.inner_size), own + "out")
