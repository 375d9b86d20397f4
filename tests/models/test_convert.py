"""A hybrid out of a Llama: what is copied, what starts anew, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pymathrl.errors import UserError
from pymathrl.models import Decoder, Policy, Rope, char_tokenizer
from pymathrl.models.config import Mamba
from pymathrl.models.convert import shape_of, spread_layers, to_hybrid
from pymathrl.models.m1 import MambaLayer
from tests.models.test_decoder import QWEN2, QWEN3, TINY, make_model


def policy(config=TINY) -> Policy:
    return Policy(make_model(config), char_tokenizer(), config, (1,), "plain", path="some/llama")


def test_attention_layers_are_spread_as_in_m1() -> None:
    assert spread_layers(28) == (4, 9, 13, 18, 23, 27)
    assert spread_layers(16) == (5, 10, 15) and spread_layers(4) == (3,) and spread_layers(2) == (1,)


def test_what_is_copied_and_what_starts_anew() -> None:
    old = policy(replace(TINY, rope=Rope("linear", factor=2.5)))
    made = to_hybrid(old, (1,), seed=3)
    assert made.config.mamba == Mamba(32, 16, (1,), dt_rank=2, base="some/llama") and made.config.rope == Rope()
    assert shape_of(made.config) == "attention in layers 1, Mamba in the other 2"
    before, after = dict(old.model.named_parameters()), dict(made.model.named_parameters())
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    assert {n.rsplit(".", 1)[1] for n in after.keys() - before.keys()} == {
        "in_proj", "conv", "conv_bias", "dt_proj", "dt_bias", "a_log", "d",
    }  # fmt: skip
    q, k, v = before["layers.0.qkv"].split([32, 16, 16])
    _, x, b, c, _ = after["layers.0.in_proj"].split([32, 16, 16, 32, 2])
    assert torch.equal(x, v) and torch.equal(b, k) and torch.equal(c, q)
    assert after["embed"].data_ptr() != before["embed"].data_ptr(), "a copy, not the same storage"
    again, other = to_hybrid(old, (1,), seed=3), to_hybrid(old, (1,), seed=4)
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(other.model.layers[0].in_proj, made.model.layers[0].in_proj)


def test_low_precision_stays_and_small_parameters_do_not() -> None:
    model = Decoder(TINY, dtype=torch.bfloat16)
    made = to_hybrid(Policy(model, char_tokenizer(), TINY, (1,), "plain"), (0,)).model
    assert made.dtype == torch.bfloat16
    layer = made.layers[1]
    assert isinstance(layer, MambaLayer) and layer.a_log.dtype == torch.float32
    assert layer.in_proj.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (QWEN2, (1,), "starts from a Llama, got model_type 'qwen2', whose attention has biases"),
        (QWEN3, (1,), "starts from a Llama, got model_type 'qwen3', whose attention has norms of its heads"),
        (TINY, (3,), r"attn_layers must be different numbers in 0\.\.2, got \[3\]"),
        (TINY, (0, 1, 2), "attn_layers names every layer"),
        (replace(TINY, num_kv_heads=1), (1,), "d_state must divide d_xb, got d_inner = 32, d_xb = 8"),
    ],
)
def test_what_is_refused(config, layers, message) -> None:
    with pytest.raises(UserError, match=message):
        to_hybrid(policy(config), layers)


def test_a_hybrid_is_not_made_twice() -> None:
    with pytest.raises(UserError, match="is a hybrid already"):
        to_hybrid(to_hybrid(policy(), (1,)), (1,))
