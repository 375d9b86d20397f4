"""The decoder against transformers, and its generation path against its training path."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers

from pymathrl.errors import UserError
from pymathrl.models import Decoder, ModelConfig
from pymathrl.models.config import tensor_specs
from pymathrl.models.load import state_tensors

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
CASES = {
    "llama": TINY,
    "tied": replace(TINY, tie_embeddings=True),
    "one kv head": replace(TINY, num_kv_heads=1),
    "as many kv heads": replace(TINY, num_kv_heads=4, rope_theta=500000.0),
    "wide head": replace(TINY, head_dim=16),
    "qwen2 with bias": replace(TINY, model_type="qwen2", attention_bias=True, rope_theta=1e6),
}


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Matrices this small gain nothing from a second thread, and wait for it where the cores are busy."""
    threads(1)


def make_pair(config: ModelConfig) -> tuple[Decoder, transformers.PreTrainedModel]:
    """A decoder whose logits are of order 1 to 10, with every weight away from its initial value; and its twin."""
    model = Decoder(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.2)
    raw = config.to_hf(torch.float32)
    twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    left = twin.load_state_dict(state_tensors(model), strict=False)
    assert left.unexpected_keys == [] and left.missing_keys in ([], ["lm_head.weight"])
    return model, twin.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    model, twin = make_pair(CASES[name])
    ids = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = model.logits(model.hidden(ids)), twin(ids).logits
    assert theirs.std() > 1  # the comparison is relative to something
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    model, twin = make_pair(CASES[name])
    prompts = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(4))
    theirs = twin.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    hidden, cache = model.prefill(prompts, torch.zeros(4, dtype=torch.int64), capacity=40)
    ours = []
    for _ in range(32):
        ours.append(model.logits(hidden).argmax(-1))
        hidden = model.decode(ours[-1], cache)
    assert torch.equal(torch.stack(ours, 1), theirs[:, 7:])


@pytest.mark.parametrize("name", CASES)
def test_decode_agrees_with_the_training_path(name: str) -> None:
    """Left-padded prompts of three lengths, rows dropped, repeated and the cache grown on the way."""
    model, _ = make_pair(CASES[name])
    ids = torch.randint(0, 50, (3, 30), generator=torch.Generator().manual_seed(5))
    lengths = [9, 4, 6]
    pad = torch.tensor([9 - n for n in lengths])
    left = torch.stack([torch.cat([torch.zeros(9 - n, dtype=torch.int64), ids[i, :n]]) for i, n in enumerate(lengths)])
    with torch.no_grad():
        expected = model.logits(model.hidden(ids))
    hidden, cache = model.prefill(left, pad)
    rows = [0, 1, 2]
    for step in range(16):
        for at, row in enumerate(rows):
            got, want = model.logits(hidden[at : at + 1])[0], expected[row, lengths[row] + step - 1]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        keep = {0: [0, 1, 2], 3: [2, 1, 1, 0], 7: [3, 1]}.get(step)
        if keep is not None:
            rows, hidden = [rows[i] for i in keep], hidden[keep]
            cache.select(torch.tensor(keep), capacity=cache.length + 10)
        hidden = model.decode(torch.stack([ids[row, lengths[row] + step] for row in rows]), cache)


def test_expand_repeats_each_prompt() -> None:
    model = Decoder(TINY)
    prompts = torch.arange(10).view(2, 5)
    _, cache = model.prefill(prompts, torch.zeros(2, dtype=torch.int64), capacity=6)
    cache.expand(3)
    assert cache.rows == 6
    after = model.decode(torch.full((6,), 7), cache)
    torch.testing.assert_close(after[:3], after[:1].expand(3, -1))
    assert not torch.allclose(after[0], after[3], atol=1e-3)


def test_full_cache_is_an_error() -> None:
    model = Decoder(TINY)
    _, cache = model.prefill(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="full at 5 columns"):
        model.decode(torch.zeros(1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="capacity must be >= the 5 columns in use, got 4"):
        cache.select(torch.tensor([0]), capacity=4)


def test_prefill_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_pair(TINY)
    ids = torch.randint(0, 50, (7, 6), generator=torch.Generator().manual_seed(6))
    pad = torch.tensor([0, 1, 2, 0, 3, 0, 5])
    whole, cache = model.prefill(ids, pad)
    monkeypatch.setattr("pymathrl.models.decoder.PREFILL_TOKENS", 12)
    pieces, parts = model.prefill(ids, pad)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(cache.kv, parts.kv, strict=True):
        torch.testing.assert_close(a[:, 3], b[:, 3], rtol=1e-5, atol=1e-5)  # a row without padding


def test_right_padding_does_not_reach_back_and_gradients_flow() -> None:
    model, _ = make_pair(TINY)
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(7))
    other = ids.clone()
    other[:, 8:] = 3
    assert torch.allclose(model.hidden(ids)[:, :8], model.hidden(other)[:, :8], atol=1e-6)
    model.logits(model.hidden(ids).flatten(0, 1)).logsumexp(-1).sum().backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and bool((param.grad != 0).any()), name


def test_gradients_equal_transformers() -> None:
    model, twin = make_pair(CASES["qwen2 with bias"])
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(8))
    torch.logsumexp(model.logits(model.hidden(ids)), -1).sum().backward()
    torch.logsumexp(twin(ids).logits, -1).sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    theirs = dict(twin.named_parameters())
    for spec in tensor_specs(model.config):
        ours = spec.view(grads)
        want = theirs[spec.name].grad
        # a bias on k shifts all scores of a query alike: its gradient is rounding noise, hence the floor
        assert (ours - want).norm() <= 1e-4 * want.norm() + 1e-4, spec.name


def test_bf16_is_close_to_fp32() -> None:
    """Rounding of weights and activations only: norms, rotation and logits are fp32. 3e-2 is 8 bf16 steps (2^-8)."""
    config = replace(TINY, tie_embeddings=True)
    full, _ = make_pair(config)
    low = Decoder(config, seed=None, dtype=torch.bfloat16)
    low.load_state_dict(full.state_dict())
    ids = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        want, got = full.logits(full.hidden(ids)), low.logits(low.hidden(ids))
        hidden, cache = low.prefill(ids[:, :5], torch.zeros(2, dtype=torch.int64), capacity=9)
        for step in range(5, 9):
            hidden = low.decode(ids[:, step], cache)
    assert got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 3e-2
    assert ((low.logits(hidden) - want[:, 8]).norm() / want[:, 8].norm()).item() < 3e-2


def test_init_is_that_of_hugging_face_and_depends_on_the_seed() -> None:
    model = Decoder(replace(TINY, vocab_size=2000, model_type="qwen2", attention_bias=True), seed=0)
    assert abs(float(model.embed.detach().std()) - 0.02) < 2e-4 and bool((model.norm == 1).all())
    assert bool((model.layers[0].qkv_bias == 0).all())
    again, other = Decoder(TINY, seed=3), Decoder(TINY, seed=4)
    assert torch.equal(again.embed, Decoder(TINY, seed=3).embed) and not torch.equal(again.embed, other.embed)


def test_weights_of_a_cache_are_views_of_the_parameters() -> None:
    """One copy of the weights: an in-place update by the optimizer is seen by a cache that is already in use."""
    model = Decoder(TINY)
    _, cache = model.prefill(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), capacity=8)
    addresses = {param.data_ptr() for param in model.parameters()}
    assert all(w.data_ptr() in addresses for weights in cache.weights for w in weights if w is not None)


def test_a_sequence_past_the_last_position_is_an_error() -> None:
    with pytest.raises(UserError, match="129 tokens is longer than the model's 128 positions"):
        Decoder(TINY).hidden(torch.zeros(1, 129, dtype=torch.int64))
