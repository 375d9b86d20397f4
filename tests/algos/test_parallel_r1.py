"""Parallel-R1: its rewards by hand; forks and joins token by token; each sampled token once, in its own context."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pymathrl.advantage import advantage as advantage_stage
from pymathrl.algos import REGISTRY, parallel_r1
from pymathrl.batch import ROLE_FORCED, ROLE_PROMPT, ROLE_SAMPLED, STOP_EOS, STOP_LENGTH
from pymathrl.errors import UserError
from pymathrl.eval import evaluate
from pymathrl.models import load
from pymathrl.ops.aggregation import aggregation_coef
from pymathrl.train import main, rollout_metrics
from tests.algos.cases import check_gradient, context, make_batch, move
from tests.tiny import SMALL_RUN, read_metrics, tiny_policy

GOOD = "a <Parallel> <Path> b </Path> <Path> c d </Path> </Parallel>\n<Summary> e </Summary> f"
THINK = "<think>b</think>"


def test_well_formed_blocks():
    count = parallel_r1.WORDS.count
    assert count("no block") == (0, True)
    assert count(GOOD) == (1, True) and count(GOOD + GOOD) == (2, True)
    for broken in (
        GOOD.replace("</Path>", "", 1), GOOD.replace("<Path> c d </Path>", ""), GOOD.replace("</Parallel>", ""),
        GOOD.replace("<Summary> e </Summary>", ""), GOOD.replace("</Summary>", ""), GOOD.replace(" b ", " <Path> b "),
        "<Parallel> " + GOOD, "<Parallel><Path> cut",
    ):  # fmt: skip
        blocks, sound = count(broken)
        assert not sound and blocks <= 1, broken
    compact = parallel_r1.COMPACT.count
    assert compact(f"\n{THINK}{THINK}<answer>1+2</answer>") == (1, True)
    assert compact("3+4=7</think><answer>3+4</answer>") == (0, True)
    for broken in (f"\n{THINK}<answer>1</answer>", f"\n{THINK}{THINK}1+2", f"\n{THINK}<think>1+", f"{THINK}"):
        assert compact(broken) == (0, False), broken


def test_rewards_and_their_schedule():
    reward = lambda step, correct, blocks, sound, kind="alternating": parallel_r1.reward_of(
        kind, 1.2, step, correct, blocks, sound
    )
    for step in (*range(1, 9), *range(11, 19)):
        assert reward(step, True, 1, False) == 1 and reward(step, False, 1, True) == -1
    for step in (9, 10, 19, 20):
        assert reward(step, True, 1, True) == 1.2 and reward(step, True, 0, True) == 1
        assert reward(step, True, 1, False) == reward(step, True, 0, False) == reward(step, False, 2, True) == -1
    assert reward(9, True, 1, False, "accuracy") == 1
    assert [reward(1, c, b, True, "both") for c, b in ((True, 1), (True, 0), (False, 1))] == [1, 0, 0]
    assert [reward(1, c, b, True, "bonus") for c, b in ((True, 1), (True, 0), (False, 1))] == [1.5, 1, -0.5]


def rows_of(rollout):
    ids, roles, bounds = rollout.ids.tolist(), rollout.role.tolist(), rollout.offsets.tolist()
    return [(ids[a:b], roles[a:b]) for a, b in pairwise(bounds)]


def written(*flags, policy=None, prompts=3):
    ctx = context("parallel_r1", *flags, policy=policy or load("builtin:tiny"))
    drawn = ctx.draw(prompts)
    return ctx, drawn, parallel_r1.rollout(ctx, drawn, ctx.draws)


@pytest.mark.parametrize("limit", [4, 24, 40, 96])
def test_paths_see_only_the_text_before_the_block_and_the_summary_sees_them_all(limit):
    """Also where the limit cuts within a path, a tag or a summary."""
    ctx, drawn, rollout = written("--max-new-tokens", str(limit), "--paths", "3")
    rollout.validate()
    tokenizer, rows = ctx.policy.tokenizer, rows_of(rollout)
    assert (
        rollout.main_rows.tolist() == list(range(0, 3 * 8 * 3, 3))
        and rollout.group.tolist() == [0] * 24 + [1] * 24 + [2] * 24
    )
    opening = tokenizer.encode("\n<think>")
    whole = 0
    for first in rollout.main_rows.tolist():
        prompt = list(drawn.ids[int(rollout.group[first])])
        main_ids, main_role = rows[first]
        assert main_role[: len(prompt)] == [ROLE_PROMPT] * len(prompt)
        assert main_ids[: len(prompt) + 2] == prompt + opening
        assert main_role[len(prompt) : len(prompt) + 2] == [ROLE_FORCED] * 2
        assert len(main_ids) <= len(prompt) + limit
        joined = []
        for ids, role in rows[first + 1 : first + 3]:
            assert ids[: len(prompt) + 2] == prompt + opening
            assert set(role[len(prompt) + 2 :]) == {ROLE_SAMPLED}
            joined += ids[len(prompt) + 1 :]
        sampled = [i for i, r in enumerate(main_role) if r == ROLE_SAMPLED]
        path = sampled[: next((k for k, i in enumerate(sampled) if i != sampled[0] + k), len(sampled))]
        behind = main_ids[path[-1] + 1 :]
        if behind and main_ids[path[-1]] == tokenizer.encode("</think>")[0]:
            both = joined[: len(behind)]
            assert behind[: len(both)] == both
            assert set(main_role[path[-1] + 1 :][: len(both)]) == {ROLE_FORCED}
            whole += len(behind) > len(both)
    assert (whole > 5) == (limit == 96)
    # the sampler's log-probs are those of the update, bit for bit, in the rows as they are trained
    assert torch.equal(ctx.score(rollout).logp, rollout.logp)
    assert bool((rollout.stop == STOP_LENGTH).any()) or limit == 96


def test_positions_and_visible_tokens_of_the_worked_example():
    """a <P> <T> b </T> <T> c d </T> </P> <S> e </S> f: the tokens that each one sees, itself included, are those of the
    masked variant; inside a block the positions are too."""
    visible = [1, 2, 3, 4, 5, 3, 4, 5, 6, 10, 11, 12, 13, 14]
    position = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    main = list(range(14))  # of the structured tokens; the second path's 5..8 are forced here
    branch = [0, 1, 5, 6, 7, 8]
    trained = {t: (at + 1, at) for at, t in enumerate(main) if t not in branch[2:]}
    trained |= {t: (at + 1, at) for at, t in enumerate(branch) if at >= 2}
    assert [trained[t][0] for t in range(14)] == visible
    assert [trained[t][1] for t in range(9)] == position[:9]


def test_draws_do_not_depend_on_what_is_written_beside_them():
    flags = ("--max-new-tokens", "60")
    ctx, drawn, rollout = written(*flags)
    one = replace(drawn, problems=drawn.problems[1:2], ids=drawn.ids[1:2])
    alone = parallel_r1.rollout(ctx, one, ctx.draws)
    both = rollout.select((rollout.group == 1).nonzero()[:, 0])
    assert torch.equal(both.ids, alone.ids) and torch.equal(both.logp, alone.logp)
    assert rollout.uid.unique().numel() == rollout.rows
    other = parallel_r1.rollout(ctx, one, replace(ctx.draws, seed=1))
    assert other.tokens != alone.tokens or not torch.equal(other.ids, alone.ids), "draws.seed, as evaluations use it"


def push(ctx, text, monkeypatch):
    """Makes every token of `text` likely wherever the engine draws."""
    liked, real = ctx.tokens(text), ctx.engine.segment

    def pushed(seqs, most, *, hook=None, **options):
        def like(names, logits, stats):
            logits = logits.clone() if hook is None else hook(names, logits, stats)
            logits[:, liked] += 8.0
            return logits

        return real(seqs, most, hook=like, **options)

    monkeypatch.setattr(ctx.engine, "segment", pushed)


def test_tags_of_several_tokens(monkeypatch):
    """They are found in the text; a fifth opening tag is ruled out at its last token."""
    tags = parallel_r1.Tags(("::", ""), ("?(", ")?"), (">(", ")>"), odd=("::", "?(", ")?", ">(", ")>"))
    monkeypatch.setattr(parallel_r1, "tags_of", lambda ctx: tags)
    ctx = context("parallel_r1", "--max-new-tokens", "200", "--open", "model", "--path-tokens", "12")
    push(ctx, ":)>?1", monkeypatch)
    prompts = ctx.draw(3)
    rollout = parallel_r1.rollout(ctx, prompts, ctx.draws)
    rollout.validate()
    blocks = (torch.bincount(rollout.parent, minlength=rollout.rows) - 1)[rollout.main_rows]
    texts = ctx.verify(rollout, prompts.problems).main.texts
    assert int(blocks.max()) == parallel_r1.BLOCKS
    assert max(tags.count(text)[0] for text in texts) >= 1
    for text, opened in zip(texts, blocks.tolist(), strict=True):
        assert opened <= text.count("?(") // 2 + 1 and text.count("?(") <= 2 * parallel_r1.BLOCKS
        if opened == text.count(">(") == parallel_r1.BLOCKS:
            behind = text.rsplit(">(", 1)[-1].partition(")>")[2]
            assert "::" not in behind


def test_a_fifth_block_is_ruled_out_and_the_response_goes_on(monkeypatch):
    """A model that is pushed to open blocks and to close summaries, in every token that it draws."""
    ctx = context("parallel_r1", "--max-new-tokens", "120", "--open", "model", "--path-tokens", "3")
    push(ctx, "\n</answer>1", monkeypatch)
    rollout = parallel_r1.rollout(ctx, ctx.draw(3), ctx.draws)
    rollout.validate()
    blocks = (torch.bincount(rollout.parent, minlength=rollout.rows) - 1)[rollout.main_rows]
    assert int(blocks.max()) == parallel_r1.BLOCKS
    full = rollout.main_rows[blocks == parallel_r1.BLOCKS].tolist()
    newline, closing = ctx.tokens("\n")[0], ctx.tokens("</answer>")[0]
    lengths = []
    for row in full:
        ids, role = rows_of(rollout.select([row]))[0]
        forced = max(i for i, r in enumerate(role) if r == ROLE_FORCED)  # of the fourth summary's opening tag
        behind = ids[forced + 1 :]
        behind = behind[behind.index(closing) + 1 :] if closing in behind else []
        assert newline not in behind
        lengths.append(len(behind))
    assert max(lengths) > 20
    scores = ctx.score(rollout)
    own = torch.isin(rollout.row_of_token, torch.tensor(full)[torch.tensor(lengths) > 0])
    assert torch.equal(scores.logp[own], rollout.logp[own]), "the policy's, not those of the ruled-out draws"
    assert not torch.equal(scores.logp, rollout.logp)


def test_an_end_token_in_a_path_gives_way_to_its_closing_tag():
    policy = tiny_policy(seed=3)
    with torch.no_grad():
        policy.model.head_weight.mul_(0.01)  # nearly uniform over 32 tokens: some paths end at the end token
    ctx, _, rollout = written("--max-new-tokens", "120", "--path-tokens", "30", policy=policy, prompts=4)
    rollout.validate()
    eos = policy.eos_ids[0]
    branches = [row for row in range(rollout.rows) if int(rollout.parent[row]) != row]
    closing = policy.tokenizer.encode("</think>")[0]
    ends = [int(rollout.ids[rollout.offsets[row + 1] - 1]) for row in branches]
    assert eos not in ends and closing in ends and any(end != closing for end in ends)
    inner = [i for row in rollout.main_rows.tolist() for i in rollout.response(row)[:-1].tolist()]
    assert eos not in inner
    assert torch.equal(ctx.score(rollout).logp, rollout.logp)


def test_branches_take_what_their_response_has_and_count_nowhere():
    ctx, drawn, rollout = written("--max-new-tokens", "60")
    graded = ctx.verify(rollout, drawn.problems)
    right = torch.arange(24) % 3 == 0
    of = rollout.response_of_row
    graded = replace(graded, correct=right[of], reward=torch.where(right, 1.0, -1.0)[of])
    assert graded.texts[1] == graded.texts[0] and len(graded.texts) == rollout.rows == 48
    assert graded.accuracy.tolist() == pytest.approx([3 / 8, 3 / 8, 2 / 8])
    assert graded.main.rollout.rows == 24 and graded.main.texts == graded.texts[::2]
    batch = advantage_stage(ctx, graded)
    batch.validate()
    expected = REGISTRY["grpo"].advantage(context("grpo"), graded.main)
    mask = rollout.sampled_mask
    assert torch.equal(batch.advantage[mask], rollout.per_token(expected[of])[mask])
    metrics = rollout_metrics(graded)
    assert metrics["accuracy"] == pytest.approx(8 / 24)
    assert metrics["completions/max_length"] == int(rollout.main.response_lengths.max())
    part = graded.select_groups([2, 0])
    part.rollout.validate()
    assert part.rollout.rows == 32 and torch.equal(part.accuracy, graded.accuracy[[2, 0]])


def test_aggregation_counts_responses_with_their_branches():
    _, _, rollout = written("--max-new-tokens", "40", prompts=1)
    mask = rollout.sampled_mask
    coef = aggregation_coef(
        "seq-mean-token-mean", mask, rollout.response_offsets, sequences=rollout.main_rows.numel()
    )  # fmt: skip
    sums = torch.zeros(8).index_add_(0, rollout.response_of_row[rollout.row_of_token], coef)
    assert sums.tolist() == pytest.approx([1 / 8] * 8)


def equations(rows):
    terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.28) * r.advantage) for r in rows]
    return -torch.cat(terms).sum() / sum(len(t) for t in terms)


def responses_mean(sizes):
    """GRPO's average over responses, each of which is `size` rows."""

    def loss(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.28) * r.advantage) for r in rows]
        left, means = iter(terms), []
        for size in sizes:
            means.append(torch.cat([next(left) for _ in range(size)]).mean())
        return -torch.stack(means).mean()

    return loss


@pytest.mark.parametrize("aggregation", ["auto", "seq-mean-token-mean"])
@pytest.mark.parametrize("budget", [10_000, 60])
def test_gradient_through_the_model_equals_the_equations_in_float64(aggregation, budget):
    """The plain model takes each row alone: a sampled token's context is exactly its row's."""
    policy = tiny_policy(seed=3)
    flags = ("--max-new-tokens", "30", "--path-tokens", "6", "--samples-per-prompt", "4", "--aggregation", aggregation)
    ctx, drawn, rollout = written(*flags, policy=policy, prompts=2)
    graded = ctx.verify(rollout, drawn.problems)
    reward = torch.tensor([1.0, -1, -1, 1, -1, -1, 1, -1])[rollout.response_of_row]
    batch = make_batch(ctx, replace(graded, reward=reward))
    move(policy, 0.02)
    sizes = torch.bincount(rollout.response_of_row).tolist()
    check_gradient(ctx, batch, equations if aggregation == "auto" else responses_mean(sizes), budget)


def test_evaluations_write_blocks_and_count_responses():
    ctx, _, _ = written("--max-new-tokens", "60")
    result = evaluate(
        ctx.engine, ctx.task, ctx.task.test(3), samples=4, ks=(1, 4), max_new_tokens=60, max_prompt_tokens=64,
        rollout=lambda prompts, draws: parallel_r1.rollout(ctx, prompts, draws),
    )  # fmt: skip
    assert all(text.startswith("\n<think>") for row in result.texts for text in row)
    assert [len(row) for row in result.texts] == [4, 4, 4]
    assert ctx.engine.pages_in_use == 0, "every sequence was freed"


def test_kl_in_the_reward_is_refused():
    ctx, drawn, rollout = written("--max-new-tokens", "12", "--kl", "k1", "--kl-in", "reward", policy=tiny_policy())
    ctx._reference = {ctx.train.model: ctx.policy}
    with pytest.raises(UserError, match="--kl-in loss"):
        make_batch(ctx, ctx.verify(rollout, drawn.problems))


def test_command_line_and_resume(tmp_path):
    """4 steps, and 2 with 2 more: the same losses; a filter carries branches from step to step."""
    argv = ["--algo", "parallel_r1", "--eval-every", "0", "--checkpoint-every", "0", *SMALL_RUN]
    argv += ["--max-new-tokens", "60", "--filter", "mixed", "--filter-rounds", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*argv, "--steps", "4", "--out", str(whole)]) == 0
    assert main([*argv, "--steps", "2", "--out", str(parts)]) == 0
    assert main(["--resume", str(parts), "--steps", "4"]) == 0
    steps = [[m for m in read_metrics(run) if "tokens_per_second" in m] for run in (whole, parts)]
    assert [m.get("loss") for m in steps[0]] == [m.get("loss") for m in steps[1]]
    assert [m["tokens"] for m in steps[0]] == [m["tokens"] for m in steps[1]]
    assert steps[0][0]["parallel/blocks"] <= 4
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert all(row["text"].startswith("\n<think>") for row in rows)


def test_stops_are_those_of_the_responses():
    _, _, rollout = written("--max-new-tokens", "96")
    main = rollout.main
    for row in range(main.rows):
        ended = int(main.response(row)[-1]) == 1
        assert int(main.stop[row]) == (STOP_EOS if ended else STOP_LENGTH)
    assert torch.equal(rollout.stop, rollout.stop[rollout.parent])
