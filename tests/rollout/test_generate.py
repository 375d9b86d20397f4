"""Generation: the same samples however they are batched, ends and lengths, and the gap to the scoring pass."""

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pymathrl.batch import ROLE_SAMPLED, STOP_EOS, STOP_LENGTH, Rollout
from pymathrl.errors import UserError
from pymathrl.models import ModelConfig, Policy, Tokenizer, char_tokenizer, new_policy
from pymathrl.rollout import generate, score

MODULE = importlib.import_module("pymathrl.rollout.generate")  # the package exports a function of that name
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=320,
)
N, MAX_NEW = 6, 40


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Matrices this small gain nothing from a second thread, and wait for it where the cores are busy."""
    threads(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    """A head 8 times the usual size: the entropy is near 3 nats, ends come after some 25 tokens."""
    policy = new_policy(CONFIG, char_tokenizer(), seed=3)
    with torch.no_grad():
        policy.model.head_weight.mul_(8)
    return policy


PROMPTS = [[5, 7, 9, 11], [6], [8, 9, 10, 11, 12, 13, 14, 15, 16], [7, 7], [20, 3, 4, 5, 6, 7]]
UIDS = torch.arange(1000, 1000 + len(PROMPTS) * N)


def run(policy: Policy, **options: object) -> Rollout:
    return generate(policy, PROMPTS, N, MAX_NEW, **{"seed": 1, "uids": UIDS, **options})  # type: ignore[arg-type]


def test_rollout_is_valid_and_in_order(policy: Policy) -> None:
    rollout = run(policy)
    rollout.validate()
    assert rollout.group.tolist() == [g for g in range(len(PROMPTS)) for _ in range(N)]
    assert torch.equal(rollout.uid, UIDS)
    for row in range(rollout.rows):
        start, prompt = int(rollout.offsets[row]), PROMPTS[row // N]
        assert rollout.ids[start : start + len(prompt)].tolist() == prompt
        response = rollout.response(row).tolist()
        ended = response[-1] == 1
        assert 1 not in response[:-1]
        assert int(rollout.stop[row]) == (STOP_EOS if ended else STOP_LENGTH)
        assert ended or len(response) == MAX_NEW
    ends = int((rollout.stop == STOP_EOS).sum())
    assert 3 <= ends <= rollout.rows - 3  # both kinds occur
    sampled = rollout.sampled_mask
    assert bool((rollout.logp[sampled] < 0).all()) and bool((rollout.entropy[sampled] > 0).all())
    assert not any(getattr(rollout, name).is_inference() for name in ("ids", "role", "logp", "offsets", "uid", "stop"))


@pytest.mark.parametrize("max_batch", [1, 3, 8, 13, 64])
def test_same_samples_for_any_batch_limit(policy: Policy, max_batch: int) -> None:
    """8 is a group and a part, 3 splits groups, 1 is alone: left padding, compaction and chunks all differ."""
    whole, parts = run(policy), run(policy, max_batch=max_batch)
    assert torch.equal(whole.ids, parts.ids) and torch.equal(whole.stop, parts.stop)
    torch.testing.assert_close(whole.logp, parts.logp, rtol=0, atol=1e-5)


def test_same_samples_for_any_order(policy: Policy) -> None:
    order = [3, 0, 4, 2, 1]
    whole = run(policy)
    rows = torch.tensor([p * N + i for p in order for i in range(N)])
    other = generate(policy, [PROMPTS[p] for p in order], N, MAX_NEW, seed=1, uids=UIDS[rows])
    assert torch.equal(other.ids, whole.select(rows).ids)


def test_seed_uid_and_sampling_options_matter(policy: Policy) -> None:
    whole = run(policy)
    assert torch.equal(run(policy).ids, whole.ids)
    for options in ({"seed": 2}, {"uids": UIDS + 1}, {"temperature": 0.5}, {"top_k": 2}):
        assert run(policy, **options).ids.tolist() != whole.ids.tolist(), options


def test_no_wait_for_the_end_changes_what_was_said(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for ends at each step, compacting at once and growing the cache often: the same rollout."""
    whole = run(policy)
    for name, value in (("CHECK_EVERY", 1), ("COMPACT_BELOW", 1.0), ("GROW_COLUMNS", 2)):
        monkeypatch.setattr(MODULE, name, value)
    assert torch.equal(run(policy).ids, whole.ids)


def test_a_cache_that_grows() -> None:
    """Small weights draw almost evenly from 512 ids: rows get to 300 tokens, past two growths from 128 columns."""
    policy = new_policy(replace(CONFIG, vocab_size=512), char_tokenizer(), seed=0)
    rollout = generate(policy, PROMPTS[:2], 3, 300, seed=5, uids=torch.arange(6))
    rollout.validate()
    assert int(rollout.response_lengths.max()) == 300
    torch.testing.assert_close(score(policy, rollout, 1.0)[0], rollout.logp, rtol=1e-5, atol=2e-5)


def test_weights_without_finite_logits_are_an_error(policy: Policy) -> None:
    broken = new_policy(CONFIG, char_tokenizer())
    with torch.no_grad():
        broken.model.layers[1].down[3, 3] = torch.nan
    with pytest.raises(UserError, match="no finite logits"):
        run(broken)


def test_greedy(policy: Policy) -> None:
    cold = run(policy, temperature=0.0)
    assert all(torch.equal(cold.response(row), cold.response(row - row % N)) for row in range(cold.rows))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scoring_pass_agrees_with_the_sampler(policy: Policy, temperature: float) -> None:
    rollout = run(policy, temperature=temperature)
    for budget in (64, 5000):
        for got, name in zip(
            score(policy, rollout, temperature, budget), ("logp", "mean_logp", "entropy"), strict=True
        ):
            torch.testing.assert_close(got, getattr(rollout, name), rtol=1e-5, atol=2e-5)
            assert bool((got[rollout.role != ROLE_SAMPLED] == 0).all())


def test_scoring_in_small_head_chunks(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = run(policy)
    whole = score(policy, rollout, 1.0)
    monkeypatch.setattr(MODULE, "SCORE_LOGITS", 7 * CONFIG.vocab_size)
    for a, b in zip(whole, score(policy, rollout, 1.0), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_id_equal_to_the_end_id(policy: Policy) -> None:
    """Padding never meets the sampler: the end token stays in the sequence and keeps its log-prob."""
    config = {"eos_token": "<eos>", "pad_token": "<eos>"}
    same = replace(policy, tokenizer=Tokenizer(policy.tokenizer.backend_json, config))
    assert same.tokenizer.pad_id == same.tokenizer.eos_id == 1
    rollout, plain = run(same), run(policy)
    assert torch.equal(rollout.ids, plain.ids)
    ends = rollout.offsets[1:][rollout.stop == STOP_EOS] - 1
    assert bool((rollout.ids[ends] == 1).all()) and bool((rollout.logp[ends] < 0).all())
    assert bool((rollout.role[ends] == ROLE_SAMPLED).all())


def test_any_of_several_ends(policy: Policy) -> None:
    many = replace(policy, eos_ids=(1, 9, 10, 11))
    rollout = run(many)
    last = rollout.ids[rollout.offsets[1:] - 1][rollout.stop == STOP_EOS].unique().tolist()
    assert len(last) > 1 and set(last) <= {1, 9, 10, 11}
    assert rollout.response_lengths.float().mean() < run(policy).response_lengths.float().mean()


def test_one_token_and_one_row(policy: Policy) -> None:
    rollout = generate(policy, [[5]], 1, 1, seed=0, uids=[7])
    rollout.validate()
    assert rollout.tokens == 2 and rollout.uid.tolist() == [7]


def test_progress(policy: Policy) -> None:
    seen: list[tuple[int, int, int]] = []
    rollout = run(policy, max_batch=12, on_progress=lambda *values: seen.append(values))
    assert seen[-1] == (rollout.rows, rollout.rows, int(rollout.response_lengths.sum()))
    assert [s[0] for s in seen] == sorted(s[0] for s in seen) and [s[2] for s in seen] == sorted(s[2] for s in seen)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": []}, ValueError, r"len\(prompts\) must be >= 1, got 0"),
        ({"prompts": [[5], []]}, ValueError, "at least one token, got an empty one"),
        ({"n": 0}, ValueError, "n must be >= 1, got 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1"),
        ({"max_batch": 0}, ValueError, "max_batch must be >= 1"),
        ({"uids": torch.arange(3)}, ValueError, r"uids must have shape \[2\] \(P\*n\), got \[3\]"),
        (
            {"max_new_tokens": 320},
            UserError,
            "a prompt of 1 tokens and 320 new tokens exceed the model's 320 positions",
        ),
    ],
)
def test_bad_requests(policy: Policy, change: dict[str, object], error: type[Exception], message: str) -> None:
    request = {"prompts": [[5], [6]], "n": 1, "max_new_tokens": 4, "seed": 0, "uids": torch.arange(2), **change}
    with pytest.raises(error, match=message):
        generate(policy, **request)  # type: ignore[arg-type]
