"""Thoughts before the next token: the reward itself, the teacher, the texts, and the update."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from pymathrl.algos import rlp
from pymathrl.batch import ROLE_SAMPLED, STOP_EOS, STOP_LENGTH
from pymathrl.checkpoint import hash_parameters
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from pymathrl.tasks.texts import read_texts
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move
from tests.models.plain import plain_hidden
from tests.tiny import SMALL_RUN, read_metrics, save_tiny, tiny_policy


def rlp_context(*flags, policy=None):
    flags = ("--prompts-per-step", "3", "--samples-per-prompt", "4", "--max-prompt-tokens", "64", *flags)
    return context("rlp", *flags, policy=policy)


def drawn(ctx):
    prompts = ctx.run.algo.draw(ctx, 3)
    return prompts, rlp.rollout(ctx, prompts, ctx.draws)


def logp_of(policy, weights, ids, following):
    hidden = plain_hidden(policy.config, weights, torch.tensor([*ids, *following[:-1]]))[len(ids) - 1 :]
    logp = torch.log_softmax(hidden @ weights["head"].T, -1)
    return float(logp.gather(1, torch.tensor(following)[:, None]).mean())


def test_advantages_are_leave_one_out_without_std():
    scores, teacher = torch.tensor([-1.0, -2.0, -0.5, -1.5]), -1.25
    gains = (scores - teacher).tolist()
    assert gains == pytest.approx([0.25, -0.75, 0.75, -0.25])
    got = rlp.advantage(rlp_context(), graded([gains]))
    assert got.tolist() == pytest.approx([1 / 3, -1.0, 1.0, -1 / 3], abs=1e-6)


def test_teacher_is_an_average_that_follows_slowly():
    policy = tiny_policy(seed=3)
    ctx = rlp_context(policy=policy)
    teacher = ctx.memory
    assert teacher.state_dict() == {"average": {}}
    start = teacher.policy(ctx)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    with torch.no_grad():
        policy.model.norm.fill_(2.0)  # from 1
    for _ in range(2):
        teacher.follow(policy, 0.999)
    assert teacher.average["norm"].dtype == torch.float32
    assert teacher.average["norm"].tolist() == pytest.approx([1.001999] * 32, abs=1e-6)
    again = teacher.policy(ctx)
    assert again is start and again.model.norm.tolist() == pytest.approx([1.001999] * 32, abs=1e-6)
    assert torch.equal(again.model.embed, before["embed"]) and not again.model.embed.requires_grad
    assert policy.model.norm.tolist() == [2.0] * 32  # the policy is another model
    other = rlp.Teacher(ctx)
    other.load_state_dict(teacher.state_dict())
    assert all(torch.equal(other.policy(ctx).model.get_parameter(n), p) for n, p in again.model.named_parameters())


@pytest.mark.parametrize("place", ["uniform", "answer"])
def test_reward_is_what_the_thought_tells_of_the_next_token(place):
    """Against the plain model: closing tag behind a thought cut short, none twice, temperature 1, teacher without
    tags."""
    policy = tiny_policy(seed=3)
    move(policy, 0.2)
    ctx = rlp_context("--temperature", "0.6", "--max-new-tokens", "12", "--rlp-place", place, policy=policy)
    teacher = ctx.memory.policy(ctx)
    move(policy, 0.1, seed=1)  # the policy has left its teacher
    prompts, thoughts = drawn(ctx)
    assert all((len(p.meta["next"]) == 1) == (place == "uniform") for p in prompts.problems)
    open_id, close_id = policy.tokenizer.encode("<think></think>")
    eos = policy.tokenizer.eos_id
    # one thought of each ending: cut off, closed by itself, ended by an end token
    ids, stop = thoughts.ids.clone(), thoughts.stop.clone()
    ends = (thoughts.offsets[1:] - 1).tolist()
    filler = policy.tokenizer.encode("7")[0]
    for row, (last, why) in enumerate([(filler, STOP_LENGTH), (close_id, STOP_EOS), (eos, STOP_EOS)]):
        ids[ends[row]], stop[row] = last, why
    thoughts = dataclasses.replace(thoughts, ids=ids, stop=stop)
    out = rlp.verify(ctx, thoughts, prompts)
    now, then = ({n: p.detach().double() for n, p in m.named_parameters()} for m in (policy.model, teacher.model))
    for row in range(thoughts.rows):
        problem = prompts.problems[int(thoughts.group[row])]
        begin, end = thoughts.offsets[row : row + 2].tolist()
        text = ids[begin:end].tolist()
        assert text[: int(thoughts.prompt_len[row])] == [*problem.meta["prefix"], open_id]
        text = [i for i in text if i != eos]
        text += [] if text[-1] == close_id else [close_id]
        expected = logp_of(policy, now, text, problem.meta["next"])
        expected -= logp_of(policy, then, problem.meta["prefix"], problem.meta["next"])
        assert float(out.reward[row]) == pytest.approx(expected, abs=2e-5), row
        assert bool(out.correct[row]) == (expected > 0)
    assert float(out.reward.abs().max()) > 1e-2
    assert len(out.grades) == thoughts.rows and out.rollout is thoughts


def test_thoughts_stop_at_the_closing_tag_and_only_they_are_trained():
    ctx = rlp_context("--max-new-tokens", "40", policy=tiny_policy(seed=3))
    prompts, thoughts = drawn(ctx)
    close_id, eos = ctx.tokens("</think>")[0], ctx.policy.tokenizer.eos_id
    closed = 0
    for row in range(thoughts.rows):
        said = thoughts.response(row).tolist()
        assert not {close_id, eos} & set(said[:-1])
        closed += said[-1] == close_id
    assert closed
    batch = make_batch(ctx, rlp.verify(ctx, thoughts, prompts))
    assert bool((batch.advantage[batch.rollout.role != ROLE_SAMPLED] == 0).all())
    assert int(batch.rollout.sampled_mask.sum()) == int(thoughts.response_lengths.sum())


def test_gradient_is_that_of_the_clipped_loss_over_thoughts():
    policy = tiny_policy(seed=3)
    move(policy, 0.2)
    ctx = rlp_context("--clip-low", "0.1", "--clip-high", "0.15", policy=policy)
    assert ctx.train.temperature == 0.7
    prompts, thoughts = drawn(ctx)
    batch = make_batch(ctx, rlp.verify(ctx, thoughts, prompts))
    move(policy)

    def loss(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.9, 1.15) * r.advantage).mean() for r in rows]
        return -torch.stack(terms).mean()

    check_gradient(ctx, batch, loss)


def test_clipped_loss_of_the_worked_example():
    from pymathrl.ops.policy_loss import policy_loss

    ratio = torch.tensor([1.3, 0.9])
    terms = rlp.loss(rlp.Config()).terms
    out = policy_loss(ratio.log(), torch.zeros(2), torch.ones(2), torch.full((2,), 0.5), form="clip", **terms)
    assert out.loss.item() == pytest.approx(-1.05, abs=1e-6)


def test_places_in_texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "1+2=3, 3+4=7"}\n{"text": "9"}\n{"text": "5*5=25"}\n')
    ctx = rlp_context("--text", str(file), "--rlp-from", "2", "--rlp-positions", "3")
    prompts = ctx.run.algo.draw(ctx, 12)
    seen = {}
    for problem, ids in zip(prompts.problems, prompts.ids, strict=True):
        text = problem.question + problem.answer
        assert any(t.startswith(text) for t in ("1+2=3, 3+4=7", "5*5=25"))  # "9" has no place
        assert len(problem.meta["prefix"]) >= 2 and list(ids) == [*problem.meta["prefix"], *ctx.tokens("<think>")]
        assert ctx.tokens(problem.answer) == problem.meta["next"] and len(problem.meta["next"]) == 1
        seen.setdefault(problem.uid // 3, set()).add(problem.question)
    assert len({p.uid for p in prompts.problems}) == 12 and prompts.cursor == ctx.at.cursor
    assert max(len(places) for places in seen.values()) > 1  # several places of one text
    ctx.at.cursor = 0
    assert ctx.run.algo.draw(ctx, 12) == prompts  # a function of seed and cursor
    # a long prefix keeps its end
    short = rlp_context("--text", str(file), "--max-prompt-tokens", "8")
    ends = [p for p in short.run.algo.draw(short, 12).problems]
    assert max(len(p.meta["prefix"]) for p in ends) == 5
    assert all(any((p.question + p.answer) in t for t in ("1+2=3, 3+4=7", "5*5=25")) for p in ends)


def test_texts_of_the_task():
    uniform = rlp_context("--rlp-place", "uniform", "--rlp-horizon", "3")
    for problem in uniform.run.algo.draw(uniform, 8).problems:
        question, newline, rest = problem.question.partition("\n")
        assert newline and question == uniform.task.train(problem.uid, 0).question
        assert "<think>" not in rest and "</think>" not in rest and 1 <= len(problem.meta["next"]) <= 3
    ctx = rlp_context()  # the built-in model's prompts: a thought between question and answer
    assert rlp.place_of(ctx) == "answer"
    for problem in ctx.run.algo.draw(ctx, 8).problems:
        own = ctx.task.train(problem.uid, 0)
        assert problem.question == own.question + "\n" and ctx.tokens(problem.answer) == problem.meta["next"]
        assert problem.answer.startswith("<answer>") and ctx.task.grade(own, problem.answer).correct


def test_files_of_texts(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\nstill one\n\n\ntwo\n\n")
    assert [t.strip() for t in read_texts(str(file))] == ["one\nstill one", "two"]
    file.write_text(" \n\n")
    with pytest.raises(UserError, match="expected texts between blank lines"):
        read_texts(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_texts(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="cannot be read"):  # before a model is loaded or a folder made
        parse_train(["--algo", "rlp", "--text", str(tmp_path / "none.txt")])
    bad = tmp_path / "b.jsonl"
    bad.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="line 1: field 'text' must be a text"):
        read_texts(str(bad))


def test_filters_are_refused():
    with pytest.raises(UserError, match="--filter mixed"):
        parse_train(["--algo", "rlp", "--filter", "mixed"])


def test_a_run_that_stops_and_resumes_ends_in_the_same_bits(tmp_path):
    model = save_tiny(tmp_path / "model")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    argv = ["--algo", "rlp", "--model", str(model), *SMALL_RUN, "--temperature", "1", "--rlp-average", "0.5",
            "--eval-every", "0"]  # fmt: skip
    assert main([*argv, "--steps", "4", "--out", str(whole)]) == 0
    assert main([*argv, "--steps", "2", "--out", str(halves)]) == 0
    assert main(["--resume", str(halves), "--steps", "4"]) == 0
    files = [run / "checkpoints" / "step-4" / "model.safetensors" for run in (whole, halves)]
    assert hash_parameters(load_file(files[0]).items()) == hash_parameters(load_file(files[1]).items())
    steps = [[m for m in read_metrics(run) if "loss" in m] for run in (whole, halves)]
    for name in ("loss", "reward", "rlp/teacher_logp"):  # the teacher's score is in no gradient: look at it
        assert [m[name] for m in steps[0]] == [m[name] for m in steps[1]], name
    assert len({m["rlp/teacher_logp"] for m in steps[0]}) == 4
