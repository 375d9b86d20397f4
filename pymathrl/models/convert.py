"""A hybrid out of a Llama: the start of M1 (arXiv 2504.10449, section 3, stage 1), before it is distilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pymathrl.errors import UserError
from pymathrl.models.config import Mamba, ModelConfig, Rope
from pymathrl.models.decoder import AttentionLayer, Decoder
from pymathrl.models.load import Policy
from pymathrl.models.m1 import MambaLayer

ATTENTION_SHARE = 6 / 28  # of the layers of M1-3B


def spread_layers(layers: int) -> tuple[int, ...]:
    """The attention layers where none are named: M1's share of them, one at the least, evenly spread, the last of each
    stretch. 28 layers: 4, 9, 13, 18, 23, 27 (M1-3B: 3, 8, 13, 18, 23, 27)."""
    count = min(layers - 1, max(1, round(ATTENTION_SHARE * layers)))
    return tuple(-(-layers * (i + 1) // count) - 1 for i in range(count))


@torch.no_grad()
def to_hybrid(policy: Policy, attention_layers: Sequence[int], seed: int = 0) -> Policy:
    """A new policy: these layers keep their attention, in the others a Mamba starts from it (`MambaLayer.start_from`),
    and all else is copied. Same device and dtype. What a Mamba does not take from attention follows from seed.

    Kept attention layers turn by rope_theta alone, as M1's do: a rope_scaling is dropped. UserError for a model with
    biases on q, k and v or norms of heads, which the start has no place for, and for one that is a hybrid already.
    """
    old = policy.config
    if old.mamba is not None:
        raise UserError(f"{policy.path}: is a hybrid already; a transformer is made into one")
    if old.attention_bias or old.qk_norm:
        raise UserError(
            f"{policy.path}: a hybrid starts from a Llama, got model_type {old.model_type!r}, whose attention has "
            f"{'norms of its heads' if old.qk_norm else 'biases'} that a Mamba has no place for"
        )
    mamba = Mamba(
        inner_size=old.num_heads * old.head_dim, xb_size=old.num_kv_heads * old.head_dim,
        attention_layers=tuple(attention_layers), dt_rank=-(-old.hidden_size // 16), base=policy.path,
    )  # fmt: skip
    config = replace(old, mamba=mamba, rope=Rope())
    model = Decoder(config, seed=None, device=policy.device, dtype=policy.model.dtype)
    generator = torch.Generator().manual_seed(seed)
    for name in ("embed", "norm", "head"):
        source, target = getattr(policy.model, name), getattr(model, name)
        if source is not None:
            target.copy_(source)
    for source, target in zip(policy.model.blocks, model.blocks, strict=True):
        shared = dict(source.named_parameters())
        if isinstance(target, MambaLayer) and isinstance(source, AttentionLayer):
            target.start_from(source.qkv, source.out, generator)
            shared = {name: shared[name] for name in ("mixer_norm", "mlp_norm", "gate_up", "down")}
        for name, value in shared.items():
            getattr(target, name).copy_(value)
    return replace(policy, model=model, config=config, path=None)


def shape_of(config: ModelConfig) -> str:
    """In words: which layers are attention."""
    assert config.mamba is not None
    kept = ", ".join(map(str, config.mamba.attention_layers)) or "none"
    return f"attention in layers {kept}, Mamba in the other {config.num_layers - config.attention_count}"
