"""What a task says of its prompts and responses, in training and supervised runs: system message, stop strings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pymathrl.errors import UserError
from pymathrl.models.tokenizer import TEMPLATE_FILE, Tokenizer
from pymathrl.prompt import Prompts, check_spelling, encode, stop_strings
from pymathrl.rollout import Draws, Engine
from pymathrl.sft import collect as collect_module
from pymathrl.sft.accept import Rules
from pymathrl.sft.blend import Solutions
from pymathrl.sft.collect import collect
from pymathrl.sft.rows import read_row
from pymathrl.tasks import Grade, load_task
from pymathrl.tasks.templates import SLOT, TEMPLATES, Template
from tests.algos.cases import context
from tests.tiny import tiny_policy

# a chat reads "8" for the system, "7" for the user
CHAT = "{% for m in messages %}{{ {'system': '8', 'user': '7'}[m.role] }}{{ m.content }}{% endfor %}"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A task whose template has a system message and stop strings that the built-in tokenizer spells."""
    template = Template(SLOT, "tag", system="1000", plain=f"{SLOT}=", stop=("5", "</answer>"))
    monkeypatch.setitem(TEMPLATES, "made", template)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"question": "{n}+1=?", "answer": "{n + 1}"}}\n' for n in range(12)))
    return load_task(file, template="made")


def chat_policy():
    own = tiny_policy().tokenizer
    return replace(
        tiny_policy(),
        tokenizer=Tokenizer(own.backend_json, own.config, files={TEMPLATE_FILE: CHAT}), prompt_style="chat",
    )  # fmt: skip


def test_a_hint_keeps_the_system_message(made):
    policy = chat_policy()
    ctx = context("grpo", policy=policy)
    problem = made.train(0, 0)
    ctx.task = made
    assert policy.tokenizer.decode(ctx.encode(problem)) == f"810007{problem.question}"
    assert policy.tokenizer.decode(ctx.encode(problem, "2>1")) == f"810007{problem.question}\n2>1"


def test_a_worked_solution_is_trained_behind_the_system_message(made):
    policy = chat_policy()
    example = Solutions(policy, made, 64).example(0, 0)
    problem = made.train(0, 0)
    assert policy.tokenizer.decode(example.ids.tolist()) == (
        f"810007{problem.question}<think></think><answer>{problem.answer}</answer>"
    )
    assert int(example.trained.int().argmax()) == len(encode(policy, made, problem))


def test_collected_rows_repeat_what_was_read_and_end_where_the_task_says(made, monkeypatch):
    policy = chat_policy()
    problems = [made.train(index, 0) for index in range(6)]
    prompts = Prompts(problems, [encode(policy, made, p) for p in problems])
    monkeypatch.setattr(
        collect_module, "grade", lambda problems, texts, task: ([Grade(1.0, True, "", "", "")] * len(texts), None)
    )
    rows = collect(Engine(policy), made, prompts, Rules(max_repetition=1.0), Draws(4, 60, seed=1)).rows
    assert len(rows) > 8 and any(row["response"].endswith("5") for row in rows)
    of = {problem.question: ids for problem, ids in zip(problems, prompts.ids, strict=True)}
    for row in rows:
        assert row["system"] == "1000" and "5" not in row["response"][:-1]
        example, _ = read_row(policy, "sft", "mcq", "rows.jsonl", 1, row)
        assert example.ids[: int(example.trained.int().argmax())].tolist() == of[row["question"]]
    monkeypatch.setitem(TEMPLATES, "bare", Template(SLOT, "tag"))
    plain = load_task(made.name, template="bare")
    problems = [plain.train(0, 0)]
    rows = collect(
        Engine(policy), plain, Prompts(problems, [encode(policy, plain, problems[0])]), Rules(max_repetition=1.0),
        Draws(4, 60, seed=1),
    ).rows  # fmt: skip
    assert rows and "system" not in rows[0] and any("5" in row["response"][:-1] for row in rows)


def test_a_system_message_of_a_row():
    policy = chat_policy()
    example, _ = read_row(policy, "sft", "mcq", "f.jsonl", 1, {"system": "3", "prompt": "1", "response": "2"})
    assert policy.tokenizer.decode(example.ids.tolist()) == "83712"
    with pytest.raises(UserError, match=r"f\.jsonl, line 1: field 'system' must be a text that is not empty"):
        read_row(policy, "sft", "mcq", "f.jsonl", 1, {"system": 3, "prompt": "1", "response": "2"})


@pytest.mark.parametrize(
    ("algo", "flags"), [("grpo", []), ("vogue", ["--vogue-start", "0", "--vogue-end", "0"]), ("cure", [])]
)
def test_rollouts_of_training_end_where_the_task_says(algo, flags, made):
    ctx = context(algo, "--max-new-tokens", "40", *flags)
    ctx.task = made
    rollout = ctx.run.algo.rollout(ctx, ctx.draw(4), ctx.draws).main
    texts = [ctx.policy.tokenizer.decode(rollout.response(row).tolist()) for row in range(rollout.rows)]
    assert len(texts) >= 32 and sum(text.endswith("5") for text in texts) > 3
    assert not any("5" in text[:-1] for text in texts)


def test_the_answer_after_a_soft_chain_ends_where_the_task_says(made):
    ctx = context("soft_tokens", "--max-new-tokens", "40", "--answer-tokens", "20")
    ctx.task = made
    seen = []
    segment, ctx.engine.segment = ctx.engine.segment, lambda *a, **k: seen.append(k["stop_strings"]) or segment(*a, **k)
    ctx.run.algo.rollout(ctx, ctx.draw(4), ctx.draws)
    assert len(seen) == 2 and "5" not in seen[0] and seen[1] == ("5", "</answer>")


def test_a_task_without_a_template_has_no_stop_strings(made):
    assert stop_strings(made) == ("5", "</answer>") and stop_strings(load_task("arithmetic")) == ()
    ctx = context("grpo")
    seen = {}
    generate = ctx.engine.generate

    def spy(*args, **options):
        seen.clear()
        seen.update(options)
        return generate(*args, **options)

    ctx.engine.generate = spy
    ctx.generate(ctx.draw(4))
    assert seen["stop_strings"] == ()
    ctx.task = made
    ctx.generate(ctx.draw(4), stop_ids=(1,))  # who says how a response ends has the last word
    assert "stop_strings" not in seen
    ctx.generate(ctx.draw(4), stop_strings=("7",))
    assert seen["stop_strings"] == ("7",)


def test_what_a_model_cannot_spell(made, tmp_path):
    policy = tiny_policy()
    check_spelling(policy, made, made.train(0, 0))
    check_spelling(policy, load_task("countdown"), load_task("countdown").train(0, 0))
    file = tmp_path / "words.jsonl"
    file.write_text('{"question": "One and one?", "answer": "2"}\n{"question": "Two?", "answer": "2"}\n')
    task = load_task(file)
    with pytest.raises(UserError, match="the model cannot read its problems; choose another model or task: the tok"):
        check_spelling(policy, task, task.train(0, 0))
    boxed = load_task(made.name, answer="boxed")
    with pytest.raises(UserError, match=r"the model cannot write an answer as it is read; .*'\\\\'"):
        check_spelling(policy, boxed, boxed.train(0, 0))
