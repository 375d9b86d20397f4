"""The prompt templates: every one asks, its examples are right, and a system message reaches a chat model."""

import re
import subprocess
import sys

import pytest

from pymathrl.errors import UserError
from pymathrl.prompt import encode
from pymathrl.tasks import load_task
from pymathrl.tasks.prompt_style import noted
from pymathrl.tasks.templates import GSM8K_SHOTS, MINERVA_SHOTS, TEMPLATES, find_template
from pymathrl.verify import equal, extract
from tests.tiny import tiny_policy

QUESTION = "What is {x} + {question} + 1?"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_asks_the_question_once(name):
    template = TEMPLATES[name]
    for style in ("plain", "chat"):
        text = template.prompt(QUESTION, style)
        assert text.count(QUESTION) == 1 and "{{" not in text
    assert template.prompt(QUESTION, "compact") == QUESTION + "\n<think>"
    assert extract("<answer>5</answer>", template.mode) is not None or template.mode != "tag"
    marks = {"boxed": "\\boxed{}", "tag": "<answer>", "gsm8k": "####"}
    if template.mode in marks:  # what is read is what is asked for
        assert marks[template.mode] in template.system + template.prompt("?", "chat")
        assert marks[template.mode] in template.prompt("?", "plain")


def test_the_examples_are_right():
    assert len(GSM8K_SHOTS) == 5 and len(MINERVA_SHOTS) == 4
    for _, worked, gold in GSM8K_SHOTS:
        steps = re.findall(r"((?:\d+ [-+*/] )+\d+) = (\d+)", worked)
        assert steps and worked.rstrip(".").endswith(steps[-1][1] + worked.rstrip(".").rpartition(steps[-1][1])[2])
        for left, right in steps:
            assert eval(left) == int(right), left  # digits and operators alone: see the pattern
        assert steps[-1][1] == gold
        assert extract(f"{worked}\n#### {gold}", "gsm8k") == gold
    text = TEMPLATES["lm_minerva_4shot"].prompt("?", "plain")
    for part, (_, _, gold) in zip(text.split("Problem:\n")[1:], MINERVA_SHOTS, strict=False):
        assert equal(gold, extract(part, "answer") or "")
    assert text.endswith("Problem:\n?\n\nSolution:") and TEMPLATES["lm_minerva_4shot"].stop == ("Problem:",)


def test_names():
    assert find_template("r1_tag", "task x").prompt("1+1?", "plain").endswith("Assistant: <think>")
    with pytest.raises(UserError, match="task x: unknown template 'qwen': did you mean 'qwen_boxed_"):
        find_template("qwen", "task x")
    with pytest.raises(UserError, match="unknown prompt style 'chatty'"):
        TEMPLATES["tag"].prompt("?", "chatty")


def test_a_system_message_reaches_the_chat_template(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n')
    seen = []
    policy = tiny_policy()
    object.__setattr__(policy, "prompt_style", "chat")
    monkeypatch.setattr(type(policy.tokenizer), "chat", lambda self, messages: seen.append(messages) or "1+1?")
    for template in ("qwen_boxed_sys", "qwen_boxed_user"):
        task = load_task(file, split="all", template=template)
        encode(policy, task, task.test()[0])
    assert [[m["role"] for m in messages] for messages in seen] == [["system", "user"], ["user"]]
    assert seen[0] == [
        {"role": "system", "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {"role": "user", "content": "1+1?"},
    ]
    encode(policy, load_task("countdown"), load_task("countdown").test(1)[0])
    assert [m["role"] for m in seen[-1]] == ["user"]


def test_a_hint_stands_below_the_question(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n')
    task = load_task(file, split="all", template="lm_gsm8k_5shot")
    one = task.test()[0]
    assert noted(task, one, "plain", "Hint: two.").endswith("Question: 1+1?\nHint: two.\nAnswer:")
    assert noted(task, one, "compact", "1+1=2,") == "1+1?\n<think>1+1=2,"


def test_tasks_need_no_torch():
    code = "import sys, pymathrl.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
