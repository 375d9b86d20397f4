"""The engine: whole generations and one step at a time, against a sampler that recomputes everything for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from pymathrl.advantage import advantage
from pymathrl.batch import (
    ROLE_FORCED,
    ROLE_PROMPT,
    ROLE_SAMPLED,
    STOP_EOS,
    STOP_LENGTH,
    STOP_NAMES,
    STOP_STRING,
    Rollout,
)
from pymathrl.errors import UserError
from pymathrl.loss import minibatch_loss
from pymathrl.models import Policy, Tokenizer, new_policy
from pymathrl.optim import Optimizer
from pymathrl.rollout import Engine, Snapshot, Step, StepStats, score
from pymathrl.rollout import engine as engine_module
from tests.algos.cases import context, with_rewards
from tests.rollout.cases import (
    CONFIG,
    FIELDS,
    PROMPTS,
    assert_no_pages,
    assert_same,
    assert_same_rollout,
    naive_draws,
    next_logits,
    sampled_numbers,
    sharp_policy,
)

N, MAX_NEW, SEED = 3, 40, 1
UIDS = torch.arange(1000, 1000 + len(PROMPTS) * N)


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Matrices this small gain nothing from a second thread, and wait for it where the cores are busy."""
    threads(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return sharp_policy()


@pytest.fixture(scope="module")
def whole(policy: Policy) -> Rollout:
    """What all batch limits, orders and page limits must come to."""
    torch.set_num_threads(1)
    return run(policy)


@pytest.fixture
def engine(policy: Policy) -> Iterator[Engine]:
    """It must have no page in use when a test has freed its sequences; tests that do not are those of errors."""
    engine = Engine(policy, SEED)
    yield engine
    engine.free(list(engine._slot_of))
    assert_no_pages(engine)


def run(policy: Policy, max_batch: int = 512, max_pages: int | None = None, **options: object) -> Rollout:
    engine = Engine(policy, SEED, max_batch=max_batch, max_pages=max_pages)
    rollout = engine.generate(PROMPTS, N, MAX_NEW, **{"uids": UIDS, **options})  # type: ignore[arg-type]
    assert_no_pages(engine)
    return rollout


# --- whole generations -----------------------------------------------------------------------------------------------


def test_rollout_is_valid_and_in_order(policy: Policy, whole: Rollout) -> None:
    whole.validate()
    assert whole.group.tolist() == [g for g in range(len(PROMPTS)) for _ in range(N)]
    assert torch.equal(whole.uid, UIDS) and whole.support_ids is None
    for row in range(whole.rows):
        start, prompt = int(whole.offsets[row]), PROMPTS[row // N]
        assert whole.ids[start : start + len(prompt)].tolist() == prompt
        response = whole.response(row).tolist()
        ended = response[-1] == 1
        assert 1 not in response[:-1]
        assert int(whole.stop[row]) == (STOP_EOS if ended else STOP_LENGTH)
        assert ended or len(response) == MAX_NEW
    ends = int((whole.stop == STOP_EOS).sum())
    assert 3 <= ends <= whole.rows - 3  # both kinds occur
    sampled = whole.sampled_mask
    assert bool((whole.logp[sampled] < 0).all()) and bool((whole.entropy[sampled] > 0).all())
    assert not any(getattr(whole, name).is_inference() for name in ("ids", "role", "logp", "offsets", "uid", "stop"))


def test_it_is_the_sampler_that_recomputes_everything(policy: Policy, whole: Rollout) -> None:
    for row in range(0, whole.rows, 2):
        prompt, response = PROMPTS[row // N], whole.response(row).tolist()
        ids, numbers = naive_draws(policy, prompt, len(prompt), int(UIDS[row]), len(response), SEED)
        assert ids == response
        begin, end = int(whole.offsets[row]) + len(prompt), int(whole.offsets[row + 1])
        for name, want in zip(FIELDS, numbers, strict=True):
            assert_same(getattr(whole, name)[begin:end], want, name)


@pytest.mark.parametrize("max_batch", [1, 5, 11])
def test_more_samples_than_rows(policy: Policy, whole: Rollout, max_batch: int) -> None:
    """1 is alone; 5 and 11 split groups, and every end lets the next one in."""
    assert_same_rollout(run(policy, max_batch), whole)


def test_looking_for_ends_at_every_step_changes_nothing(
    policy: Policy, whole: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    for every in (1, 7):
        monkeypatch.setitem(engine_module.CHECK_EVERY, "cpu", every)
        assert_same_rollout(run(policy), whole)


def test_seed_uid_and_sampling_options_matter(policy: Policy, whole: Rollout) -> None:
    assert torch.equal(run(policy).ids, whole.ids)
    for options in ({"seed": 2}, {"uids": UIDS + 1}, {"temperature": 0.5}):
        assert run(policy, **options).ids.tolist() != whole.ids.tolist(), options
    assert_same_rollout(run(policy, seed=SEED), whole)
    for name in ("ids", "logp"):  # without uids they are 0 .. P*n-1
        implied, given = run(policy, uids=None), run(policy, uids=torch.arange(len(PROMPTS) * N))
        assert torch.equal(getattr(implied, name), getattr(given, name))


def test_each_prompt_has_its_own_limit(policy: Policy, whole: Rollout) -> None:
    limits = [1, 40, 3, 17, 9, 2]
    engine = Engine(policy, SEED, max_batch=7)
    cut = engine.generate(PROMPTS, N, limits, uids=UIDS)
    assert_no_pages(engine)
    cut.validate()
    for row in range(whole.rows):
        full, limit = whole.response(row).tolist(), limits[row // N]
        assert cut.response(row).tolist() == full[:limit]
        ended = len(full) <= limit and full[-1] == 1
        assert int(cut.stop[row]) == (STOP_EOS if ended else STOP_LENGTH)


def test_ends_none_one_and_many(policy: Policy, whole: Rollout) -> None:
    endless = run(policy, stop_ids=())
    assert endless.response_lengths.tolist() == [MAX_NEW] * whole.rows
    assert bool((endless.stop == STOP_LENGTH).all())
    many = run(replace(policy, eos_ids=(1, 9, 10, 11)))
    assert_same_rollout(run(policy, stop_ids=[9, 1, 11, 10]), many)
    last = many.ids[many.offsets[1:] - 1][many.stop == STOP_EOS].unique().tolist()
    assert len(last) > 1 and set(last) <= {1, 9, 10, 11}
    for row in range(whole.rows):
        free = endless.response(row).tolist()
        for ends, rollout in (({1}, whole), ({1, 9, 10, 11}, many)):
            count = next((i + 1 for i, token in enumerate(free) if token in ends), MAX_NEW)
            assert rollout.response(row).tolist() == free[:count]


def test_padding_id_equal_to_the_end_id(policy: Policy, whole: Rollout) -> None:
    """Padding never meets the sampler: the end token stays in the sequence and keeps its log-prob."""
    config = {"eos_token": "<eos>", "pad_token": "<eos>"}
    same = replace(policy, tokenizer=Tokenizer(policy.tokenizer.backend_json, config))
    assert same.tokenizer.pad_id == same.tokenizer.eos_id == 1
    rollout = run(same)
    assert_same_rollout(rollout, whole)
    ends = rollout.offsets[1:][rollout.stop == STOP_EOS] - 1
    assert bool((rollout.ids[ends] == 1).all()) and bool((rollout.logp[ends] < 0).all())
    assert bool((rollout.role[ends] == ROLE_SAMPLED).all())


def test_greedy(policy: Policy) -> None:
    cold = run(policy, temperature=0.0)
    assert all(torch.equal(cold.response(row), cold.response(row - row % N)) for row in range(cold.rows))
    ids = list(PROMPTS[1])
    for token in cold.response(N).tolist():
        assert token == int(next_logits(policy, ids).argmax())
        ids.append(token)


def test_one_token_and_one_row(engine: Engine) -> None:
    rollout = engine.generate([[5]], 1, 1, uids=[7])
    rollout.validate()
    assert rollout.tokens == 2 and rollout.uid.tolist() == [7] and rollout.stop.tolist() in ([STOP_EOS], [STOP_LENGTH])


def test_a_sequence_to_the_last_position(policy: Policy) -> None:
    """Its last token is never fed: 320 tokens fit 320 positions, and the cache grows to 20 pages on the way."""
    engine = Engine(policy, SEED)
    rollout = engine.generate([PROMPTS[0], PROMPTS[4]], 1, [319, 280], stop_ids=())
    assert rollout.lengths.tolist() == [320, 320]
    for got, name in zip(score(policy, rollout, 1.0)[:3], FIELDS, strict=True):
        assert_same(got, getattr(rollout, name), name)


def test_progress(policy: Policy) -> None:
    seen: list[tuple[int, int, int]] = []
    rollout = run(policy, max_batch=4, on_progress=lambda *values: seen.append(values))
    assert seen[-1] == (rollout.rows, rollout.rows, int(rollout.response_lengths.sum()))
    assert all(a <= b for x, y in pairwise(seen) for a, b in zip(x, y, strict=True))


def test_responses_are_told_when_they_end_while_others_go_on(policy: Policy) -> None:
    told: dict[int, list[int]] = {}
    drawn: list[int] = []  # responses that had been told after each call

    def on_finished(rows: list[int], ids: list[list[int]]) -> None:
        assert rows and not told.keys() & set(rows)
        told.update(zip(rows, ids, strict=True))
        drawn.append(len(told))

    rollout = run(policy, max_batch=4, on_finished=on_finished)
    assert told == {row: rollout.response(row).tolist() for row in range(rollout.rows)}
    assert len(drawn) > 2  # not all at the end
    assert_same_rollout(rollout, run(policy, max_batch=4))


def test_an_error_of_who_is_told_ends_the_generation_and_frees_its_pages(policy: Policy) -> None:
    engine = Engine(policy, SEED)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, N, MAX_NEW, on_finished=lambda rows, ids: 1 // 0)
    assert_no_pages(engine)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": []}, ValueError, r"len\(prompts\) must be >= 1, got 0"),
        ({"prompts": [[5], []]}, ValueError, "at least one token, got an empty one"),
        ({"prompts": [[5], [32]]}, ValueError, r"token ids must be in 0..31, got 5..32"),
        ({"prompts": [[5], [-1]]}, ValueError, r"token ids must be in 0..31, got -1..5"),
        ({"n": 0}, ValueError, "n must be >= 1, got 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1, got 0"),
        ({"max_new_tokens": [4, 0]}, ValueError, "max_new_tokens must be >= 1, got 0"),
        ({"max_new_tokens": [4]}, ValueError, "max_new_tokens must be one number or 2, got 1"),
        ({"uids": torch.arange(3)}, ValueError, r"uids must have shape \[2\] \(P\*n\), got \[3\]"),
        ({"stop_strings": ["a", ""]}, ValueError, "stop_strings must not be empty texts"),
        ({"stop_strings": "ab"}, ValueError, "stop_strings must be a list of texts, got one text 'ab'"),
        ({"temperature": -1.0}, ValueError, "expected temperature >= 0, .*, got -1.0"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        (
            {"max_new_tokens": 320},
            UserError,
            "a prompt of 1 tokens and 320 new tokens exceed the model's 320",
        ),
    ],
)
def test_bad_requests(engine: Engine, change: dict[str, object], error: type[Exception], message: str) -> None:
    request = {"prompts": [[5], [6]], "n": 1, "max_new_tokens": 4, **change}
    with pytest.raises(error, match=message):
        engine.generate(**request)  # type: ignore[arg-type]
    assert not bool(engine._live.any()), "a request that is refused must leave no sequence behind"


@pytest.mark.parametrize("name", ["max_batch", "max_pages"])
def test_bad_engines(policy: Policy, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        Engine(policy, **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"stop_strings": ["9"]}, {"hook": lambda *_: None}], ids=len)
def test_weights_without_finite_logits_are_an_error(options: dict[str, object]) -> None:
    broken = new_policy(CONFIG, sharp_policy().tokenizer)
    with torch.no_grad():
        broken.model.layers[1].down[3, 3] = torch.nan  # type: ignore[index]
    engine = Engine(broken)
    with pytest.raises(UserError, match="no finite logits"):
        engine.generate(PROMPTS, N, 8, **options)  # type: ignore[arg-type]
    assert_no_pages(engine)


# --- stop strings ----------------------------------------------------------------------------------------------------


def cut_at(policy: Policy, ids: list[int], stops: list[str], known: int = 0) -> tuple[int, int] | None:
    """(tokens up to the one that completes a stop string behind the first `known` tokens, where in the text the
    earliest string that it completes begins)."""
    for count in range(known + 1, len(ids) + 1):
        before, text = policy.tokenizer.decode(ids[: count - 1]), policy.tokenizer.decode(ids[:count])
        starts = [text.find(s, max(0, len(before) - len(s) + 1)) for s in stops]
        if any(at >= 0 for at in starts):
            return count, min(at for at in starts if at >= 0)
    return None


def tokens_before(policy: Policy, ids: list[int], at: int) -> list[int]:
    """The tokens in front of the one that holds character `at` of the text."""
    return next(ids[:n] for n in range(len(ids), -1, -1) if len(policy.tokenizer.decode(ids[:n])) <= at)


def common_pairs(policy: Policy, rollout: Rollout) -> list[str]:
    """Two texts of two tokens that responses hold, not at their beginning."""
    texts = [policy.tokenizer.decode(rollout.response(row).tolist()) for row in range(rollout.rows)]
    pairs = [t[i : i + 2] for t in texts for i in (9, 5) if len(t) > i + 2]
    return [pairs[0], pairs[3]]


def test_stop_strings_of_generate(policy: Policy, whole: Rollout) -> None:
    stops = common_pairs(policy, whole)
    rollout = run(policy, stop_strings=stops)
    rollout.validate()
    found = 0
    for row in range(whole.rows):
        full = whole.response(row).tolist()
        at = cut_at(policy, full, stops)
        assert rollout.response(row).tolist() == (full if at is None else full[: at[0]])
        assert int(rollout.stop[row]) == (int(whole.stop[row]) if at is None else STOP_STRING)
        found += at is not None
    assert 2 <= found < whole.rows


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("most", [1, 3, MAX_NEW])
def test_stop_strings_over_segments(policy: Policy, whole: Rollout, engine: Engine, keep: bool, most: int) -> None:
    """In segments of 1 and 3 tokens every string straddles two of them; what is found is the same."""
    stops = common_pairs(policy, whole)
    for row in range(0, whole.rows, 2):
        prompt, full = PROMPTS[row // N], whole.response(row).tolist()
        (seq,) = engine.start([prompt], uids=[int(UIDS[row])])
        why = "length"
        while why == "length" and len(engine.tokens(seq)) < len(prompt) + MAX_NEW:
            left = len(prompt) + MAX_NEW - len(engine.tokens(seq))
            (why,) = engine.segment([seq], min(most, left), stop_strings=stops, keep_stop=keep)
        at, got = cut_at(policy, full, stops), engine.tokens(seq)[len(prompt) :]
        assert why == ("string" if at is not None else STOP_NAMES[int(whole.stop[row])])
        if at is None:
            assert got == (full[:-1] if why == "eos" and not keep else full)
        elif keep:
            assert got == full[: at[0]]
        else:
            assert got == tokens_before(policy, full, at[1])


def test_a_string_of_the_history_does_not_stop_again(policy: Policy, whole: Rollout, engine: Engine) -> None:
    """After a stop the next segment goes on to the next occurrence, and so to the end."""
    row = int((whole.stop == STOP_LENGTH).nonzero()[0, 0])
    prompt, full = PROMPTS[row // N], whole.response(row).tolist()
    stop = policy.tokenizer.decode([max(set(full), key=full.count)])
    assert len(stop) == 1
    (seq,) = engine.start([prompt], uids=[int(UIDS[row])])
    known, stops = 0, 0
    while (at := cut_at(policy, full, [stop], known)) is not None and at[0] < MAX_NEW:
        assert engine.segment([seq], MAX_NEW - known, stop_strings=[stop]) == ["string"]
        assert engine.tokens(seq)[len(prompt) :] == full[: at[0]]
        known, stops = at[0], stops + 1
    assert stops >= 2


def test_a_long_stop_string(policy: Policy, whole: Rollout, engine: Engine) -> None:
    """Longer than any window of a few tokens: one token spells one letter here."""
    row = int((whole.stop == STOP_LENGTH).nonzero()[0, 0])
    prompt, full = PROMPTS[row // N], whole.response(row).tolist()
    stop = policy.tokenizer.decode(full[:-2])
    assert len(stop) > 32
    for keep in (True, False):
        (seq,) = engine.start([prompt], uids=[int(UIDS[row])])
        assert engine.segment([seq], MAX_NEW, stop_strings=[stop], keep_stop=keep) == ["string"]
        assert engine.tokens(seq)[len(prompt) :] == (full[:-2] if keep else tokens_before(policy, full, 0))


def test_a_character_of_several_tokens_completes_a_string() -> None:
    """Bytes as tokens: until its third has come, the character of three bytes decodes to a mark of its own."""
    backend = Backend(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer(backend.to_str(), {"eos_token": "<eos>"})
    policy = new_policy(replace(CONFIG, vocab_size=257), tokenizer)
    script = tokenizer.encode("ab\u2192c \u2192\u2192")
    assert len(script) == 13

    def dictate(seqs: list[int], logits: Tensor, stats: StepStats) -> Tensor:
        wanted = torch.full_like(logits, -torch.inf)
        wanted[0, script[len(engine.tokens(seqs[0])) - 1]] = 0
        return wanted

    engine = Engine(policy)
    (seq,) = engine.start([[5]])
    for stop, keep, text in (
        ("\u2192", True, "ab\u2192"), ("c \u2192", False, "ab\u2192"), ("\u2192\u2192", True, "ab\u2192c \u2192\u2192"),
    ):  # fmt: skip
        assert engine.segment([seq], 12, stop_strings=[stop], keep_stop=keep, hook=dictate) == ["string"]
        assert tokenizer.decode(engine.tokens(seq)[1:]) == text


def test_of_two_strings_completed_at_once_the_longer_is_taken_back(
    policy: Policy, whole: Rollout, engine: Engine
) -> None:
    prompt, full = PROMPTS[1], whole.response(N).tolist()
    text = policy.tokenizer.decode(full)
    (seq,) = engine.start([prompt], uids=[int(UIDS[N])])
    engine.segment([seq], 8)
    assert engine.segment([seq], 8, stop_strings=[text[9], text[6:10]], keep_stop=False) == ["string"]
    assert policy.tokenizer.decode(engine.tokens(seq)[len(prompt) :]) == text[:6]


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_a_hook_sees_the_raw_logits_and_right_statistics(policy: Policy, engine: Engine) -> None:
    seqs = engine.start(PROMPTS)
    seen: list[list[int]] = []

    def hook(handles: list[int], logits: Tensor, stats: StepStats) -> None:
        seen.append(handles)
        assert logits.dtype == torch.float32
        for row, seq in enumerate(handles):
            assert_same(logits[row : row + 1], next_logits(policy, engine.tokens(seq)))
        logp = logits.double().log_softmax(-1)
        top = logp.exp().sort(descending=True).values[:, :2]
        for got, want in (
            (stats.logp, logp), (stats.entropy, -(logp.exp() * logp).sum(-1)), (stats.mean_logp, logp.mean(-1)),
            (stats.top, top),
        ):  # fmt: skip
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)

    for _ in range(2):
        engine.step(seqs, temperature=0.7, top_k=3, hook=hook)
    assert engine.segment(seqs, 3, hook=hook, temperature=2.0) is not None
    assert seen[0] == seqs and len(seen) >= 3


def test_a_hook_that_changes_nothing_changes_nothing(policy: Policy, whole: Rollout) -> None:
    for hook in (lambda seqs, logits, stats: None, lambda seqs, logits, stats: logits.double()):
        assert_same_rollout(run(policy, max_batch=5, hook=hook), whole)


def test_a_hook_bans_a_token(policy: Policy, whole: Rollout) -> None:
    """What it says is renormalised: the log-prob is of the distribution without the token."""
    assert 1 in whole.ids

    def ban(seqs: list[int], logits: Tensor, stats: StepStats) -> Tensor:
        logits = logits.clone()
        logits[:, 1] = -torch.inf
        return logits

    banned = run(policy, hook=ban)
    banned.validate()
    assert 1 not in banned.ids and bool((banned.stop == STOP_LENGTH).all())
    logits = next_logits(policy, PROMPTS[0])
    logits[0, 1] = -torch.inf
    first = banned.offsets[0] + 1
    torch.testing.assert_close(banned.logp[first], logits.log_softmax(-1)[0, banned.ids[first]])


def test_a_hook_with_a_wrong_shape_is_refused(engine: Engine) -> None:
    (seq,) = engine.start([[5]])
    with pytest.raises(ValueError, match=r"hook: expected logits of shape \[1, 32\], got \[32\]"):
        engine.step([seq], hook=lambda seqs, logits, stats: logits[0])
    assert engine.tokens(seq) == [5]
    with pytest.raises(ValueError, match="hook: expected logits"):
        engine.generate([[5]], 2, 2, hook=lambda seqs, logits, stats: logits[:1])


# --- one step at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [2, 512])
def test_steps_are_the_generation(policy: Policy, whole: Rollout, max_batch: int) -> None:
    """Also in waves, where there are more sequences than rows: what a step says and what is kept are the same."""
    engine = Engine(policy, SEED, max_batch=max_batch)
    seqs = engine.start(PROMPTS, uids=UIDS[::N].tolist())
    steps: list[Step] = [engine.step(seqs) for _ in range(6)]
    for i, seq in enumerate(seqs):
        prompt, row = PROMPTS[i], i * N
        got = engine.tokens(seq)
        assert got[: len(prompt)] == prompt and [int(s.ids[i]) for s in steps] == got[len(prompt) :]
        count = min(6, int(whole.response_lengths[row]))
        assert got[len(prompt) :][:count] == whole.response(row)[:count].tolist()
        begin = int(whole.offsets[row]) + len(prompt)
        for name in FIELDS:
            said = torch.stack([getattr(s, name)[i] for s in steps])[:count]
            assert_same(said, getattr(whole, name)[begin : begin + count], name)
            assert torch.equal(said, sampled_numbers(engine, seq, 6)[FIELDS.index(name), :count])
    assert all(bool((s.kept_mass == 1).all()) for s in steps)
    engine.free(seqs)
    assert_no_pages(engine)


def test_logits_leave_the_sequences_as_they_are(policy: Policy, engine: Engine) -> None:
    seqs = engine.start(PROMPTS)
    for _ in range(2):
        got = engine.logits(seqs)
        want = torch.cat([next_logits(policy, engine.tokens(seq)) for seq in seqs])
        assert got.shape == (len(seqs), 32) and got.dtype == torch.float32
        assert_same(got, want)
        assert_same(engine.logits(seqs[::-1]), want.flip(0))
        engine.step(seqs)
    assert [len(engine.tokens(seq)) for seq in seqs] == [len(p) + 2 for p in PROMPTS]


def test_forks_share_pages_and_go_their_own_ways(policy: Policy, engine: Engine) -> None:
    prompt = PROMPTS[4]
    (a,) = engine.start([prompt], uids=[5])
    engine.segment([a], 3, stop_ids=())
    before = engine.pages_in_use
    assert before == 3  # 42 fed tokens of 16 a page
    b, c = engine.fork(a, 2, uids=[6, 7])
    assert engine.pages_in_use == before and engine.tokens(b) == engine.tokens(a)
    history = engine.tokens(a)
    engine.segment([a, b, c], 9, stop_ids=())
    for seq, uid in ((a, 5), (b, 6), (c, 7)):
        ids, numbers = naive_draws(policy, history, len(prompt), uid, 9, SEED)
        assert engine.tokens(seq) == history + ids
        assert_same(sampled_numbers(engine, seq, 9), numbers)
    assert len({tuple(engine.tokens(seq)) for seq in (a, b, c)}) == 3
    assert engine.pages_in_use == 2 + 3 * 2  # two full pages of the prompt are still shared
    engine.free([a])
    (d,) = engine.fork(c, 1, uids=[5])
    engine.free([c, b])
    history = engine.tokens(d)
    engine.step([d])
    assert engine.tokens(d)[len(history) :] == naive_draws(policy, history, len(prompt), 5, 1, SEED)[0]


def test_forks_of_many_sequences_are_those_of_each(policy: Policy) -> None:
    """Also where not all of them find room at once."""
    uids = list(range(50, 50 + 2 * len(PROMPTS)))
    single, many = Engine(policy, SEED), Engine(policy, SEED, max_batch=2)
    a, b = single.start(PROMPTS, range(len(PROMPTS))), many.start(PROMPTS, range(len(PROMPTS)))
    copies = [c for i, seq in enumerate(a) for c in single.fork(seq, 2, uids[2 * i : 2 * i + 2])]
    together = many.fork(b, 2, uids)
    for engine, seqs in ((single, a + copies), (many, b + together)):
        engine.segment(seqs, 6, stop_ids=())
    assert many.lengths(b) == [len(p) + 6 for p in PROMPTS]
    assert_same_rollout(many.rollout(b + together), single.rollout(a + copies))
    many.free(b + together)
    assert_no_pages(many)


def test_a_segment_with_a_seed_and_a_limit_of_each_sequence(policy: Policy) -> None:
    limits = [3 + i for i in range(len(PROMPTS))]
    want = Engine(policy, SEED).generate(PROMPTS, 1, limits, seed=SEED + 1, stop_ids=())
    engine = Engine(policy, SEED)
    seqs = engine.start(PROMPTS, range(len(PROMPTS)))
    assert engine.segment(seqs, limits, seed=SEED + 1, stop_ids=()) == ["length"] * len(seqs)
    assert_same_rollout(engine.rollout(seqs), want)
    for bad, message in (([1], "one number or"), ([*limits[1:], 0], ">= 1, got 0")):
        with pytest.raises(ValueError, match=message):
            engine.segment(seqs, bad)


def test_fork_before_anything_was_drawn(policy: Policy, engine: Engine) -> None:
    (a,) = engine.start([PROMPTS[4]], uids=[0])
    forks = engine.fork(a, 3, uids=[1, 2, 3])
    assert engine.pages_in_use == 3
    engine.step([a, *forks])
    for uid, seq in enumerate([a, *forks]):
        assert engine.tokens(seq)[-1:] == naive_draws(policy, PROMPTS[4], 40, uid, 1, SEED)[0]


def test_forks_without_uids_draw_apart(engine: Engine) -> None:
    """Also from a sequence whose own uid was given: a fork that repeats its parent's draws is no second sample."""
    (a,) = engine.start([PROMPTS[1]], uids=[0])
    forks = engine.fork(a, 4)
    engine.segment([a, *forks], 12, stop_ids=())
    assert len({tuple(engine.tokens(seq)) for seq in (a, *forks)}) == 5


def test_a_fork_has_stopped_where_its_parent_has(engine: Engine) -> None:
    (a,) = engine.start([PROMPTS[1]])
    (why,) = engine.segment([a], 2, stop_ids=())
    (b,) = engine.fork(a, 1)
    assert why == "length" and [STOP_NAMES[s] for s in engine.rollout([a, b]).stop.tolist()] == ["length", "length"]
    engine.step([b])
    assert [STOP_NAMES[s] for s in engine.rollout([a, b]).stop.tolist()] == ["length", "none"]


def test_appended_tokens_are_forced(policy: Policy, engine: Engine) -> None:
    """A hint of one token, one of two pages, and one in front of the first draw."""
    prompt = PROMPTS[1]
    (seq,) = engine.start([prompt], uids=[3])
    want: list[int] = []
    roles: list[int] = []
    for hint, draws in (([8], 3), (list(range(3, 30)), 4), ([], 1), ([9, 9], 0)):
        engine.append(seq, hint)
        want, roles = want + hint, roles + [ROLE_FORCED] * len(hint)
        ids, numbers = naive_draws(policy, prompt + want, len(prompt), 3, draws, SEED)
        if draws:
            engine.segment([seq], draws, stop_ids=())
            assert_same(sampled_numbers(engine, seq, draws), numbers)
        want, roles = want + ids, roles + [ROLE_SAMPLED] * draws
    assert engine.tokens(seq) == prompt + want
    rollout = engine.rollout([seq])
    rollout.validate()
    assert rollout.role.tolist() == [ROLE_PROMPT] * len(prompt) + roles
    for name in FIELDS:
        values = getattr(rollout, name)
        assert bool((values[rollout.role != ROLE_SAMPLED] == 0).all()) and bool((values[rollout.role == 1] != 0).all())
    with pytest.raises(ValueError, match=r"token ids must be in 0..31, got 40..40"):
        engine.append(seq, [40])
    with pytest.raises(UserError, match="exceed the model's 320 positions"):
        engine.append(seq, [3] * 300)
    assert engine.tokens(seq) == prompt + want


def test_rollback_takes_tokens_back_and_draws_the_same_again(policy: Policy, engine: Engine) -> None:
    """And a sibling that reads the same pages does not notice."""
    (a,) = engine.start([PROMPTS[3]], uids=[0])
    engine.segment([a], 4, stop_ids=())
    point = engine.snapshot(a)
    engine.segment([a], 20, stop_ids=())
    (b,) = engine.fork(a, 1, uids=[1])
    first, numbers = engine.tokens(a), sampled_numbers(engine, a, 20)
    engine.rollback(a, point)
    assert engine.tokens(a) == first[:21]
    engine.append(a, [4] * 7)
    engine.step([a])
    engine.rollback(a, point)
    engine.segment([a], 20, stop_ids=())
    assert engine.tokens(a) == first
    assert_same(sampled_numbers(engine, a, 20), numbers)
    engine.step([b])
    assert engine.tokens(b) == first + naive_draws(policy, first, 17, 1, 1, SEED)[0]
    engine.rollback(a, engine.snapshot(a))
    assert engine.tokens(a) == first


def test_rollback_to_other_points_is_refused(engine: Engine) -> None:
    a, b = engine.start(PROMPTS[:2])
    early = engine.snapshot(a)
    engine.step([a])
    late = engine.snapshot(a)
    with pytest.raises(ValueError, match=f"expected a snapshot of sequence {b}"):
        engine.rollback(b, early)
    engine.rollback(a, early)
    with pytest.raises(ValueError, match="whose tokens are all still there"):
        engine.rollback(a, late)
    assert (late.seq, late.length) == (a, 2)


def test_segments_say_why_they_stop(policy: Policy, whole: Rollout, engine: Engine) -> None:
    """All sequences at once, more than rows; they go on after an end, and a deadline leaves whole sequences."""
    seqs = engine.start([p for p in PROMPTS for _ in range(N)], uids=UIDS.tolist())
    why = engine.segment(seqs, MAX_NEW)
    assert why == [STOP_NAMES[s] for s in whole.stop.tolist()] and {"eos", "length"} == set(why)
    rollout = engine.rollout(seqs, group=whole.group.tolist())
    assert_same_rollout(rollout, whole)
    assert torch.equal(rollout.group, whole.group)
    before = [engine.tokens(seq) for seq in seqs]
    assert engine.segment(seqs, 30, stop_ids=(), deadline_s=0.0) == ["deadline"] * len(seqs)
    assert engine.rollout(seqs).stop.unique().tolist() == [STOP_NAMES.index("deadline")]
    engine.segment(seqs, 2, stop_ids=())
    for i, seq in enumerate(seqs[:4]):
        drawn = engine.tokens(seq)[len(before[i]) :]
        assert engine.tokens(seq)[: len(before[i])] == before[i] and len(drawn) >= 2
        assert drawn == naive_draws(policy, before[i], len(PROMPTS[i // N]), int(UIDS[i]), len(drawn), SEED)[0]
    assert engine.segment(seqs[:2], 1, stop_ids=(), deadline_s=60.0) == ["length"] * 2
    with pytest.raises(ValueError, match="segment: max_new_tokens must be >= 1, got 0"):
        engine.segment(seqs, 0)


def test_an_end_is_taken_back(policy: Policy, whole: Rollout, engine: Engine) -> None:
    row = int((whole.stop == STOP_EOS).nonzero()[0, 0])
    prompt, full = PROMPTS[row // N], whole.response(row).tolist()
    (seq,) = engine.start([prompt], uids=[int(UIDS[row])])
    assert engine.segment([seq], MAX_NEW, keep_stop=False) == ["eos"]
    assert engine.tokens(seq) == prompt + full[:-1]
    engine.append(seq, [9])
    engine.step([seq])
    ids, numbers = naive_draws(policy, [*prompt, *full[:-1], 9], len(prompt), int(UIDS[row]), 1, SEED)
    assert engine.tokens(seq)[-1:] == ids
    assert_same(sampled_numbers(engine, seq, 1), numbers)


def test_handles_are_checked(engine: Engine) -> None:
    for seqs in ([], [0], [-1]):
        with pytest.raises(ValueError, match="expected handles of live sequences"):
            engine.step(seqs)
    a, b = engine.start(PROMPTS[:2])
    engine.free([a])
    for call in (
        lambda: engine.step([a, b]), lambda: engine.segment([b, a], 1), lambda: engine.logits([a]),
        lambda: engine.fork(a, 1), lambda: engine.append(a, [3]), lambda: engine.snapshot(a), lambda: engine.free([a]),
        lambda: engine.tokens(a), lambda: engine.rollout([b, a]), lambda: engine.rollback(a, Snapshot(a, 1, 0)),
        lambda: engine.step([b, 99]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected handles of live sequences, got"):
            call()
    with pytest.raises(ValueError, match="expected each sequence once"):
        engine.step([b, b])
    with pytest.raises(ValueError, match="fork: n must be >= 1, got 0"):
        engine.fork(b, 0)
    with pytest.raises(ValueError, match="uids must have 2 elements, one per sequence, got 1"):
        engine.fork(b, 2, uids=[3])
    with pytest.raises(ValueError, match="at least one token, got an empty one"):
        engine.start([[]])
    with pytest.raises(UserError, match="exceed the model's 320 positions"):
        engine.start([[3] * 321])
    assert engine.tokens(b) == PROMPTS[1] and engine._live.sum() == 1


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_batch", "max_pages"), [(512, 6), (512, 11), (5, 6)])
def test_preempted_sequences_go_on_as_if_nothing_had_happened(
    policy: Policy, whole: Rollout, max_batch: int, max_pages: int
) -> None:
    """One sequence needs up to 5 pages of 16 tokens, the eighteen of them 54."""
    engine = Engine(policy, SEED, max_batch=max_batch, max_pages=max_pages)
    rollout = engine.generate(PROMPTS, N, MAX_NEW, uids=UIDS)
    assert engine.preemptions > 0 and engine._pages.pages == max_pages
    assert_same_rollout(rollout, whole)
    assert_no_pages(engine)


def test_steps_and_forks_with_too_few_pages(policy: Policy) -> None:
    """Pages for one long sequence: each step takes them from the other, and a fork from both."""
    engine, roomy = Engine(policy, SEED, max_pages=4), Engine(policy, SEED)
    for e in (engine, roomy):
        seqs = e.start([PROMPTS[4], PROMPTS[3]], uids=[1, 2])
        for _ in range(3):
            e.step(seqs)
        seqs += e.fork(seqs[0], 2, uids=[3, 4])
        e.segment(seqs, 5, stop_ids=())
        assert e.logits(seqs).shape == (4, 32)
    assert engine.preemptions > 0 and roomy.preemptions == 0
    assert_same_rollout(engine.rollout(seqs), roomy.rollout(seqs))
    engine.free(seqs)
    assert_no_pages(engine)


def test_a_sequence_that_cannot_fit_is_an_error(policy: Policy) -> None:
    engine = Engine(policy, SEED, max_pages=3)
    with pytest.raises(UserError, match=r"the cache holds 3 pages of 16 tokens, and one .* of \d+ tokens needs 4"):
        engine.generate([PROMPTS[4]], 2, MAX_NEW, stop_ids=())
    assert_no_pages(engine)
    (seq,) = engine.start([PROMPTS[4]])
    with pytest.raises(UserError, match="free memory, or shorten prompts and responses"):
        engine.segment([seq], MAX_NEW, stop_ids=())
    kept = engine.tokens(seq)
    assert kept[:40] == PROMPTS[4] and 40 < len(kept) <= 49  # it stays as far as it came
    assert engine.generate([PROMPTS[1]], 4, 12).rows == 4
    engine.free([seq])
    assert_no_pages(engine)


def test_an_error_in_a_hook_leaves_no_page_behind(policy: Policy) -> None:
    engine, calls = Engine(policy, SEED), []

    def fail(seqs: list[int], logits: Tensor, stats: StepStats) -> None:
        calls.append(seqs)
        if len(calls) == 3:
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        engine.generate(PROMPTS, N, MAX_NEW, hook=fail)
    assert_no_pages(engine)
    assert not bool(engine._live.any())


def test_what_memory_holds_is_asked_for_only_as_far_as_needed(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without max_pages the free memory is the limit: here room for 7 pages."""
    bytes_of = engine_module.PagedCache.page_bytes(policy.model)
    engine = Engine(policy, SEED)
    left = lambda device: (7 - engine._pages.pages) * bytes_of + bytes_of // 2
    monkeypatch.setattr(engine_module.devices, "free_bytes", left)
    rollout = engine.generate(PROMPTS, N, MAX_NEW, uids=UIDS)
    assert engine._pages.pages == 7 and engine.preemptions > 0
    assert rollout.rows == len(PROMPTS) * N
    assert_no_pages(engine)


# --- one engine for a whole run --------------------------------------------------------------------------------------


def test_one_engine_over_several_generations(policy: Policy, whole: Rollout) -> None:
    """Slots, pages and recorded passes of other calls, larger and smaller, are no memory of them."""
    engine = Engine(policy, SEED)
    engine.generate([PROMPTS[4]], 1, 5, temperature=0.5, top_k=4)
    (seq,) = engine.start([PROMPTS[2]], uids=[9])
    engine.segment([seq], 7, stop_ids=())
    for _ in range(2):
        assert_same_rollout(engine.generate(PROMPTS, N, MAX_NEW, uids=UIDS), whole)
        engine.generate(PROMPTS[::-1], 1, 60, seed=8, stop_ids=())
    ids, _ = naive_draws(policy, PROMPTS[2], 16, 9, 10, SEED)
    engine.segment([seq], 3, stop_ids=())
    assert engine.tokens(seq) == PROMPTS[2] + ids  # a sequence of its own lives through them
    engine.free([seq])
    assert_no_pages(engine)


def test_slots_are_used_again(engine: Engine) -> None:
    for _ in range(5):
        engine.free(engine.start(PROMPTS))
    assert engine._live.numel() <= 2 * len(PROMPTS)


def test_weights_stay_where_they_are_and_recorded_passes_see_the_new_ones() -> None:
    """Contract C2 over 10 optimizer steps: one copy of the weights, nothing to bring over, nothing stale."""
    policy = sharp_policy()
    engine = Engine(policy, SEED)
    ctx = context("grpo", "--lr", "1e-2", policy=policy)
    optimizer = Optimizer(policy.model, ctx.train, 10)
    where = [p.data_ptr() for p in policy.model.parameters()]
    seen = []
    for _ in range(10):
        rollout = engine.generate(PROMPTS[:3], 4, 8)
        batch = advantage(ctx, with_rewards(rollout, (torch.arange(12) % 3 == 0).float()))
        minibatch_loss(
            policy.model, batch, range(12), ctx.run.algo.loss(ctx.own), temperature=1.0, token_budget=100,
            max_new_tokens=8,
        )  # fmt: skip
        assert optimizer.step(True).applied
        seen.append(rollout.logp[4].item())
    assert [p.data_ptr() for p in policy.model.parameters()] == where
    assert len(set(seen)) > 5
    assert_same_rollout(engine.generate(PROMPTS, N, 8), Engine(policy, SEED).generate(PROMPTS, N, 8))
    final = engine.generate(PROMPTS, N, 8)
    for got, name in zip(score(policy, final, 1.0)[:3], FIELDS, strict=True):
        assert_same(got, getattr(final, name), name)


def test_an_engine_first_used_in_inference_mode_serves_outside_it(policy: Policy) -> None:
    engine = Engine(policy, 1)
    with torch.inference_mode():
        first = engine.generate(PROMPTS[:2], 2, 5)
    again = engine.generate(PROMPTS[:2], 2, 5)
    assert torch.equal(first.ids, again.ids) and not again.logp.is_inference()


def test_idle_sequences_do_not_hold_up_a_segment(policy: Policy) -> None:
    """Pages of sequences that nobody asks for go to those that run: side by side, not one by one."""
    engine = Engine(policy, 1, max_pages=12)
    idle = engine.start([[5] * 40] * 3)
    engine.step(idle)
    assert engine.pages_in_use == 9
    rows: list[int] = []
    real = engine._draw
    def counted(slots, *rest, **how):  # type: ignore[no-untyped-def]
        rows.append(slots.numel())
        return real(slots, *rest, **how)

    engine._draw = counted  # type: ignore[method-assign]
    running = engine.start([[6] * 20] * 4)
    engine.segment(running, 8, stop_ids=())
    assert rows[0] == 4 and engine.preemptions > 0
    engine.free([*idle, *running])
    assert engine.pages_in_use == 0


def test_a_segment_that_fails_leaves_no_support_behind(policy: Policy) -> None:
    """Draws are made some steps ahead of the look for ends: what lies behind an end must not meet later draws."""
    for stop in range(2, 32):
        engine = Engine(policy, 1, max_pages=3)
        a, b = engine.start(PROMPTS[:2])
        try:
            engine.segment([a, b], 60, top_p=0.99, stop_ids=[stop])
        except UserError:
            if engine.tokens(a)[-1] == stop:  # the first stopped, the second outgrew the cache
                break
    else:
        pytest.fail("no stop token ends one sequence and lets the other outgrow the cache")
    engine.step([a], top_p=0.2)
    rollout = engine.rollout([a, b])
    rollout.validate()
    for values, name in zip(score(policy, rollout, 1.0)[:3], ("logp", "mean_logp", "entropy"), strict=True):
        torch.testing.assert_close(values, getattr(rollout, name), rtol=1e-5, atol=1e-5)


def test_handles_never_come_again(policy: Policy) -> None:
    engine = Engine(policy, 1)
    (a,) = engine.start(PROMPTS[:1])
    mark = engine.snapshot(a)
    engine.free([a])
    (b,) = engine.start([[5] * 20])
    assert b != a
    with pytest.raises(ValueError, match="handles of live sequences"):
        engine.rollback(a, mark)
    with pytest.raises(ValueError, match="expected a snapshot of sequence"):
        engine.rollback(b, mark)
    engine.free([])


def test_a_snapshot_is_good_until_tokens_before_it_are_taken_back(policy: Policy) -> None:
    engine = Engine(policy, 1)
    (a,) = engine.start(PROMPTS[:1])
    early = engine.snapshot(a)
    engine.append(a, [5, 6, 7])
    late = engine.snapshot(a)
    engine.append(a, [8])
    engine.rollback(a, late)
    assert engine.tokens(a) == [*PROMPTS[0], 5, 6, 7]
    engine.rollback(a, early)
    engine.append(a, [9, 9, 9, 9])
    with pytest.raises(ValueError, match="whose tokens are all still there"):
        engine.rollback(a, late)
    engine.rollback(a, early)
    assert engine.tokens(a) == PROMPTS[0]


def test_a_special_token_is_no_stop_string(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"special token, which no decoded text shows; give stop_ids=\[1\]"):
        Engine(policy).generate(PROMPTS[:1], 1, 4, stop_strings=["<eos>"])


def test_weights_that_moved_are_read_where_they_lie(policy: Policy) -> None:
    moving = new_policy(policy.config, policy.tokenizer, seed=0)
    engine = Engine(moving, 1)
    before = engine.generate(PROMPTS[:1], 1, 4, stop_ids=())
    moving.model.norm.data = torch.zeros_like(moving.model.norm)
    after = engine.generate(PROMPTS[:1], 1, 4, stop_ids=())
    uniform = torch.tensor(moving.config.vocab_size).log()
    torch.testing.assert_close(after.entropy[after.sampled_mask], uniform.expand(4))
    assert not torch.equal(before.entropy, after.entropy)
