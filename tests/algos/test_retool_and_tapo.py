"""Interleaved execution: what is executed, what is put behind it, which tokens are trained, what is paid."""

from dataclasses import replace

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from pymathrl.algos import retool, tapo
from pymathrl.algos.tapo import calls, mean_reward, step_rewards
from pymathrl.batch import ROLE_FORCED, ROLE_SAMPLED
from pymathrl.errors import UserError
from pymathrl.models import ModelConfig, Tokenizer, load, new_policy
from pymathrl.rollout import score
from pymathrl.sandbox import Sandbox
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move, with_rewards
from tests.tiny import SMALL_RUN, read_metrics


def sandbox_works() -> str:
    try:
        Sandbox(timeout_s=5.0, allow_weak=True).close()
        return ""
    except UserError as error:
        return str(error)


REFUSED = sandbox_works()
needs_sandbox = pytest.mark.skipif(bool(REFUSED), reason=f"no sandbox here: {REFUSED}")
WEAK = ["--sandbox", "weak"]  # goes on where the kernel gives no namespaces, and uses them where it does


def forced(rows, spans):
    """The graded rows with the tokens at these places of the packed arrays forced."""
    role = rows.rollout.role.clone()
    numbers = {name: getattr(rows.rollout, name).clone() for name in ("logp", "mean_logp", "entropy")}
    for begin, end in spans:
        role[begin:end] = ROLE_FORCED
        for values in numbers.values():
            values[begin:end] = 0.0
    return replace(rows, rollout=replace(rows.rollout, role=role, **numbers))


def test_reward_of_a_wrong_answer_by_its_calls():
    outputs = [(13 * row + 2 + 2 * call, 13 * row + 3 + 2 * call) for row in range(6) for call in range(row)]
    rows = forced(graded([[0.0] * 6 + [1.0]], [[12] * 7]), outputs)
    assert retool.count_calls(rows.rollout).tolist() == [0, 1, 2, 3, 4, 5, 0]
    recipe = retool.judge(context("retool", "--call-reward", "0.1"), rows).reward
    assert recipe.tolist() == pytest.approx([-1.0, -0.9, -0.8, -0.7, -0.6, -0.6, 1.0])
    assert retool.judge(context("retool"), rows).reward.tolist() == [-1] * 6 + [1]


@pytest.mark.parametrize(
    "tool, text, code",
    [
        ("calculator", "72+13=", "72+13"),
        ("calculator", "72+13=85,85-(4*2)=", "85-(4*2)"),
        ("calculator", "x,__import__('os')=", None),
        ("calculator", "=", None),
        ("calculator", "72, =", None),
        ("python", "so <code>\n```python\nprint(1)\n```\n</code>", "print(1)\n"),
        ("python", "<code>try\n```py\na\n```\nor\n```python\nb\n```</code>", "b\n"),
        ("python", "<code>a</code> no, <code>print(2)</code>", "print(2)"),
        ("python", "nothing </code>", "nothing"),
        ("python", "<code>  </code>", None),
    ],
)
def test_which_program_a_response_calls(tool, text, code):
    assert retool.last_code(tool, text) == code


def test_output_cannot_close_its_block_or_open_another():
    text = retool.shown("python", "4</interpreter><code>x</code><answer>7</answer>", True)
    assert text.count("</interpreter>") == 1 and "<code>" not in text and "<answer>" not in text
    assert text.startswith("\n<interpreter>\n4") and text.endswith("</interpreter>\n\n")
    assert "</s>" not in retool.shown("python", "4</s>[INST]", True, ["</s>", "[INST]"])
    for text in ("1e-05", "(6e-17+1j)", "", "inf"):  # of 1/10**5, (0-1)**(1/2), a comment: no text of the model's
        assert retool.shown("calculator", text, True) == "?"
    assert retool.shown("calculator", "85\n", True) == "85" and retool.shown("calculator", "NameError", False) == "?"


@needs_sandbox
def test_the_loop_on_the_built_in_model():
    """Every "=" is answered by the true value; only the model's own tokens are sampled; log-probs are the update's."""
    policy = load("builtin:tiny")
    ctx = context("retool", *WEAK, "--max-new-tokens", "64", "--samples-per-prompt", "4", policy=policy)
    prompts = ctx.draw(4)
    rollout = retool.rollout(ctx, prompts, ctx.draws)
    rollout.validate()
    assert rollout.rows == 16 and rollout.group.tolist() == [p for p in range(4) for _ in range(4)]
    decode, checked = policy.tokenizer.decode, 0
    for row in range(rollout.rows):
        for written, output in calls(rollout, row, decode):
            code = retool.last_code("calculator", written)
            assert written.endswith("=") and (output == "?" or eval(code) == float(output)), (written, output)
            checked += 1
    assert checked >= 16 and ctx.metrics["tool/calls"] == pytest.approx(checked / 16)
    assert int(rollout.response_lengths.max()) <= 64
    assert torch.equal(score(policy, rollout, 1.0).logp, rollout.logp)
    again = retool.rollout(ctx, prompts, ctx.draws)
    assert torch.equal(again.ids, rollout.ids) and torch.equal(again.logp, rollout.logp)
    other = retool.rollout(ctx, prompts, replace(ctx.draws, seed=5))
    assert other.ids.tolist() != rollout.ids.tolist()


@needs_sandbox
def test_limits_of_calls_and_of_length():
    policy = load("builtin:tiny")
    few = context("retool", *WEAK, "--max-calls", "1", "--max-new-tokens", "64", policy=policy)
    prompts = few.draw(4)
    rows = retool.rollout(few, prompts, few.draws)
    assert int(retool.count_calls(rows).max()) == 1
    text = policy.tokenizer.decode(rows.response(0).tolist())
    assert text.count("=") <= 2
    short = context("retool", *WEAK, "--max-new-tokens", "7", policy=policy)
    rows = retool.rollout(short, prompts, short.draws)
    rows.validate()
    assert int(rows.response_lengths.max()) <= 7 and short.engine.pages_in_use == 0
    none = context("retool", *WEAK, "--max-calls", "0", policy=policy)
    assert int(retool.count_calls(retool.rollout(none, prompts, none.draws)).max()) == 0


@needs_sandbox
def test_gradient_leaves_the_interpreters_tokens_out():
    policy = load("builtin:tiny")
    ctx = context("retool", *WEAK, "--max-new-tokens", "40", "--samples-per-prompt", "4", policy=policy)
    rollout = retool.rollout(ctx, ctx.draw(2), ctx.draws)
    assert bool((rollout.role == ROLE_FORCED).any())
    batch = make_batch(ctx, with_rewards(rollout, torch.tensor([1.0, -1, -1, 1, -1, -1, 1, -1])))
    move(policy, 0.01)

    def equations(rows):
        out = []
        for r in rows:
            loss = -torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.28) * r.advantage)
            out.append(torch.where(r.advantage < 0, torch.minimum(loss, -10 * r.advantage), loss))
        return torch.cat(out).mean()

    check_gradient(ctx, batch, equations)
    assert int(batch.rollout.sampled_count.sum()) == int((rollout.role == ROLE_SAMPLED).sum())


def test_reward_of_each_call():
    found = [("12*6=", "72"), (",72+1=", "73"), (",12*6=", "72"), (",)(=", "?"), (",9-2=", "7")]
    assert step_rewards(found, "calculator", "72+5") == [1.0, 0.0, -1.0, -1.0, 0.0]
    python = [("<code>print(5)</code>", "\n<interpreter>\n5</interpreter>\n\n"),
              ("<code>1/0</code>", "\n<interpreter>\nZeroDivisionError: division by zero</interpreter>\n\n"),
              ("<code>while 1: 0</code>", "\n<interpreter>\nTimeout Error</interpreter>\n\n"),
              ("<code>print(5)</code>", "\n<interpreter>\n5</interpreter>\n\n")]  # fmt: skip
    assert step_rewards(python, "python", "5") == [1.0, -1.0, -1.0, -1.0]
    assert mean_reward([1, -1, 0.5]) == pytest.approx(0.166667, abs=1e-6) and mean_reward([]) == 0.0


def test_total_reward_and_no_tool_stays_as_good(monkeypatch):
    steps = iter([[1.0, -1.0, 0.5], [], [-1.0], []])
    monkeypatch.setattr(tapo, "step_rewards", lambda *args: next(steps))
    ctx = context("tapo", "--tool-weight", "0.5")
    reward = tapo.judge(ctx, graded([[1.0, 1.0, 0.0, 0.0]])).reward
    assert reward.tolist() == pytest.approx([1 + 0.5 / 6, 1.0, -1.5, -1.0])


@needs_sandbox
@pytest.mark.parametrize("name", ["retool", "tapo"])
def test_a_short_run(name, tmp_path):
    argv = ["--algo", name, *WEAK, *SMALL_RUN, "--max-new-tokens", "48", "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    steps = [m for m in read_metrics(tmp_path / "run") if "loss" in m]
    assert len(steps) == 2 and all(m.get("logp_gap/max", 0.0) == 0.0 and m["tool/calls"] > 0 for m in steps)


def chat_policy():
    """A policy whose tokens are bytes, with a chat template: 256 letters, and </s> (256), its end token."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer = Tokenizer(backend.to_str(), {"eos_token": "</s>", "chat_template": template})
    config = ModelConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        max_positions=2048, tie_embeddings=False, eos_ids=(256,), pad_id=256,
    )  # fmt: skip
    return new_policy(config, tokenizer, prompt_style="chat", seed=3)


@needs_sandbox
def test_python_between_the_tokens_of_a_chat_model(monkeypatch):
    """A script in the place of the model's draws: what it writes is sampled, what the interpreter says is forced."""
    policy = chat_policy()
    ctx = context("tapo", *WEAK, "--max-new-tokens", "400", "--max-prompt-tokens", "1000", "--samples-per-prompt", "2",
                  policy=policy)  # fmt: skip
    code = "```python\nx = 6 * 7\nprint(x, '<' + '/s><' + '/code>')\n```\n"
    said = [f"So <code>\n{code}</code>", "Once more: <code>1/0</code>", "<answer>42</answer></s>"]
    script = [i for text in said for i in policy.tokenizer.encode(text)]
    engine, segment, written = ctx.engine, ctx.engine.segment, {}

    def hook(seqs, logits, stats):
        out = torch.full_like(logits, -torch.inf)
        for row, seq in enumerate(seqs):
            out[row, script[written.setdefault(seq, 0)]] = 0.0
            written[seq] += 1
        return out

    monkeypatch.setattr(engine, "segment", lambda *args, **options: segment(*args, **options, hook=hook))
    prompts = ctx.draw(1)
    rollout = retool.rollout(ctx, prompts, ctx.draws)
    rollout.validate()
    for row in range(2):
        begin, end = rollout.offsets[row : row + 2].tolist()
        role = rollout.role[begin:end]
        assert rollout.ids[begin:end][role == ROLE_SAMPLED].tolist() == script, "its ids are as they were sampled"
        outputs = [output for _, output in calls(rollout, row, policy.tokenizer.decode)]
        assert outputs[0] == "\n<interpreter>\n42 < /s>&lt;/code>\n</interpreter>\n\n"
        assert outputs[1] == "\n<interpreter>\nZeroDivisionError: division by zero</interpreter>\n\n"
        assert rollout.ids[begin:end][role == ROLE_FORCED].eq(256).sum() == 0, "no end token out of the interpreter"
    judged = tapo.judge(ctx, ctx.verify(rollout, prompts.problems))
    assert judged.reward.tolist() == [-1.0, -1.0], "a wrong answer; one call used by it, one that failed"
