"""The decoder against transformers and against plain float64 torch: logits, greedy tokens, gradients."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers

from pymathrl.errors import UserError
from pymathrl.models import Decoder, ModelConfig, Policy, Rope, char_tokenizer
from pymathrl.models.config import Mamba, tensor_specs
from pymathrl.models.load import state_tensors
from pymathrl.rollout import Engine
from tests.gpu import cuda_skip_reason
from tests.models.plain import plain_hidden

TINY = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=128,
)  # fmt: skip
QWEN2 = replace(TINY, model_type="qwen2", attention_bias=True, rope_theta=1e6)
QWEN3 = replace(TINY, model_type="qwen3", qk_norm=True, head_dim=16, rope_theta=1e6)
HYBRID = replace(
    TINY, num_layers=3, mamba=Mamba(inner_size=96, xb_size=32, attention_layers=(1,), dt_rank=3, state_size=16)
)
LLAMA3 = Rope("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = Rope("yarn", factor=4.0, original_max_position_embeddings=32)
CASES = {
    "llama": TINY,
    "llama, tied, linear": replace(TINY, tie_embeddings=True, rope=Rope("linear", factor=2.5)),
    "llama, one kv head, llama3": replace(TINY, num_kv_heads=1, rope=LLAMA3),
    "llama, as many kv heads, yarn": replace(TINY, num_kv_heads=4, rope=YARN, rope_theta=500000.0),
    "llama, wide head": replace(TINY, head_dim=24),
    "qwen2": QWEN2,
    "qwen2, tied, yarn": replace(QWEN2, tie_embeddings=True, rope=YARN),
    "qwen2, one kv head, linear": replace(QWEN2, num_kv_heads=1, rope=Rope("linear", factor=4.0)),
    "qwen3": QWEN3,
    "qwen3, tied, yarn": replace(QWEN3, tie_embeddings=True, rope=YARN),
    "qwen3, as many kv heads, llama3": replace(QWEN3, num_kv_heads=4, rope=LLAMA3),
}
HYBRIDS = {  # not in transformers
    "hybrid": HYBRID,
    "hybrid, narrow groups, ends in mamba, short conv": replace(
        TINY, mamba=Mamba(24, 8, attention_layers=(0,), dt_rank=2, state_size=4, conv_width=2)
    ),
    "mamba alone": replace(TINY, mamba=Mamba(32, 32, attention_layers=(), dt_rank=2)),
}
LENGTHS = (40, 1, 17)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Matrices this small gain nothing from a second thread, and wait for it where the cores are busy."""
    threads(1)


def make_model(config: ModelConfig) -> Decoder:
    """Logits of order 1 to 10, every weight away from its initial value."""
    model = Decoder(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.2)
    return model


def make_pair(config: ModelConfig) -> tuple[Decoder, transformers.PreTrainedModel]:
    """A decoder and its twin with the same weights."""
    model = make_model(config)
    raw = config.to_hf(torch.float32)
    twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    left = twin.load_state_dict(state_tensors(model), strict=False)
    assert left.unexpected_keys == [] and left.missing_keys in ([], ["lm_head.weight"])
    return model, twin.eval()


def packed(seed: int, lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [T], offsets [B+1])."""
    ids = torch.randint(0, 50, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return ids, torch.tensor((0, *lengths)).cumsum(0)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str) -> None:
    model, twin = make_pair(CASES[name])
    ids, offsets = packed(3)
    with torch.no_grad():
        ours = model.logits(model.hidden(ids, offsets))
        theirs = torch.cat([twin(part[None]).logits[0] for part in ids.split(LENGTHS)])
    assert theirs.std() > 1  # the comparison is relative to something
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    """64 tokens after prompts of one length, which transformers can take at once, by the engine's paged pass."""
    model, twin = make_pair(CASES[name])
    prompts = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(4))
    theirs = twin.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    engine = Engine(Policy(model, char_tokenizer(), model.config, (1,), "plain"))
    ours = engine.generate(prompts.tolist(), 1, 64, temperature=0.0, stop_ids=())
    assert torch.equal(ours.ids.view(3, 71), theirs)
    assert theirs[:, 7:].unique().numel() > 5  # it says something


@pytest.mark.parametrize("name", CASES | HYBRIDS)
def test_gradients_equal_plain_float64(name: str) -> None:
    """Of the log-sum-exp of all logits, sequences packed: within 1e-5, where 61 tokens of fp32 sums add up."""
    model = make_model((CASES | HYBRIDS)[name])
    ids, offsets = packed(8)
    weights = {k: p.detach().double().requires_grad_() for k, p in model.named_parameters()}
    head = weights.get("head", weights["embed"])
    torch.cat([plain_hidden(model.config, weights, part) @ head.T for part in ids.split(LENGTHS)]).logsumexp(
        -1
    ).sum().backward()
    (model.hidden(ids, offsets) @ model.head_weight.T).logsumexp(-1).sum().backward()
    for key, param in model.named_parameters():
        want = weights[key].grad
        assert param.grad is not None and want is not None and bool((want != 0).any()), key
        # a bias on k shifts all scores of a query alike: its gradient is 0 up to rounding, hence the floor
        assert (param.grad - want).norm() <= 1e-5 * want.norm() + 1e-5, key


def test_gradients_equal_transformers() -> None:
    model, twin = make_pair(QWEN2)
    ids, offsets = packed(8, (9, 9))
    torch.logsumexp(model.hidden(ids, offsets) @ model.head_weight.T, -1).sum().backward()
    torch.logsumexp(twin(ids.view(2, 9)).logits, -1).sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    theirs = dict(twin.named_parameters())
    for spec in tensor_specs(model.config):
        ours, want = spec.view(grads), theirs[spec.name].grad
        assert (ours - want).norm() <= 1e-4 * want.norm() + 1e-4, spec.name


def test_sequences_of_a_pack_do_not_see_each_other() -> None:
    """Nor does a token see those behind it; positions start at 0 in each sequence."""
    model = make_model(QWEN3)
    ids, offsets = packed(7)
    with torch.no_grad():
        whole = model.hidden(ids, offsets)
        for part, (begin, end) in zip(ids.split(LENGTHS), pairwise(offsets), strict=True):
            alone = model.hidden(part, torch.tensor([0, len(part)]))
            torch.testing.assert_close(whole[begin:end], alone, rtol=1e-5, atol=1e-5)
        other = ids.clone()
        other[20:40] = 3
        changed = model.hidden(other, offsets)
        torch.testing.assert_close(changed[:20], whole[:20], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(changed[40:], whole[40:], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(changed[20:40], whole[20:40], atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(cuda_skip_reason() is not None, reason=str(cuda_skip_reason()))
def test_bf16_is_close_to_fp32() -> None:
    """Rounding of weights and activations only: norms, rotation and logits are fp32. 3e-2 is 8 bf16 steps (2^-8)."""
    config = replace(TINY, tie_embeddings=True)
    full = make_model(config)
    low = Decoder(config, seed=None, device="cuda", dtype=torch.bfloat16)
    low.load_state_dict(full.state_dict())
    ids, offsets = packed(9)
    with torch.no_grad():
        want = full.logits(full.hidden(ids, offsets))
        got = low.logits(low.hidden(ids.cuda(), offsets.cuda()))
    assert got.dtype == torch.float32
    assert ((got.cpu() - want).norm() / want.norm()).item() < 3e-2
    engine = Engine(Policy(low, char_tokenizer(), config, (1,), "plain"))
    seqs = engine.start([part.tolist() for part in ids.split(LENGTHS)])
    assert ((engine.logits(seqs).cpu() - want[offsets[1:] - 1]).norm() / want[offsets[1:] - 1].norm()).item() < 3e-2


def test_init_is_that_of_hugging_face_and_depends_on_the_seed() -> None:
    model = Decoder(replace(TINY, vocab_size=2000, model_type="qwen2", attention_bias=True), seed=0)
    assert abs(float(model.embed.detach().std()) - 0.02) < 2e-4 and bool((model.norm == 1).all())
    assert bool((model.layers[0].qkv_bias == 0).all())
    again, other = Decoder(TINY, seed=3), Decoder(TINY, seed=4)
    assert torch.equal(again.embed, Decoder(TINY, seed=3).embed) and not torch.equal(again.embed, other.embed)


def test_a_sequence_past_the_last_position_is_an_error() -> None:
    model = Decoder(TINY)
    with pytest.raises(UserError, match="129 tokens is longer than the model's 128 positions"):
        model.hidden(torch.zeros(130, dtype=torch.int64), torch.tensor([0, 1, 130]))
    assert model.hidden(torch.zeros(256, dtype=torch.int64), torch.tensor([0, 128, 256])).shape == (256, 32)


def test_padded_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected ids \[T\] and offsets \[B\+1\], got \[2, 3\] and \[2\]"):
        Decoder(TINY).hidden(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 3]))
