"""Rows: what is trained of each kind. Blends: exact shares, each row once per epoch, a cursor that is the state."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from pymathrl.batch import ROLE_FORCED, ROLE_PROMPT, ROLE_SAMPLED, micro_batches
from pymathrl.errors import UserError
from pymathrl.models import Tokenizer
from pymathrl.models.tokenizer import TEMPLATE_FILE
from pymathrl.sft.blend import BLOCK, Blend, DataSpec, FileRows, Solutions, apportion, file_blend, parse_data, read_file
from pymathrl.sft.rows import Choice, as_choice, as_open, join, pack, read_row
from pymathrl.tasks import load_task
from tests.tiny import tiny_policy

MARKS = "{'system': '*', 'user': '>', 'assistant': '=', 'tool': '?'}"
TEMPLATE = (
    "{% for m in messages %}{{ " + MARKS + "[m.role] }}{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)  # "assistant" turns read "=CONTENT<eos>\n"
EOS = 1


def chat_policy(template: str = TEMPLATE):
    policy = tiny_policy()
    own = policy.tokenizer
    tokenizer = Tokenizer(own.backend_json, own.config, files={TEMPLATE_FILE: template})
    return replace(policy, tokenizer=tokenizer, prompt_style="chat")


def row(policy, item, mode="sft", template="mcq"):
    example, why = read_row(policy, mode, template, "f.jsonl", 3, item)
    assert (example is None) == bool(why)
    return example if example is not None else why


def trained_text(policy, example) -> str:
    return policy.tokenizer.backend.decode(example.ids[example.trained].tolist(), skip_special_tokens=False)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_critique_mask_by_hand():
    """7 tokens of problem and candidate solution, 4 of critique: labels on the last 4, the first predicted from 6."""
    policy = tiny_policy()
    example = row(policy, {"question": "1+1", "solution": "3", "critique": "1=2"}, "cft")
    assert policy.tokenizer.decode(example.ids.tolist()) == "1+1\n3\n1=2"
    example = row(policy, {"question": "1+1=", "solution": "3", "critique": "3>2"}, "cft")
    assert example.trained.tolist() == [False] * 7 + [True] * 4
    rollout, weight = pack([example], torch.device("cpu"))
    rollout.validate()
    (micro,) = micro_batches(rollout, [0], 100)
    assert micro.hidden_index.tolist() == [6, 7, 8, 9] and micro.token_index.tolist() == [7, 8, 9, 10]
    assert micro.targets.tolist() == [*policy.tokenizer.encode("3>2"), EOS]
    assert weight.tolist() == [0.0] * 7 + [1.0] * 4


def test_only_assistant_turns_of_a_conversation_are_trained():
    policy = chat_policy()
    turns = [("system", "0"), ("user", "1+2"), ("assistant", "3*3"), ("tool", "9"), ("assistant", "9."), ("user", "8")]
    example = row(policy, {"messages": [{"role": r, "content": c} for r, c in turns], "weight": 0.5})
    # past the last trained token nothing is kept: the user's turn, and the line break after the end token
    text = policy.tokenizer.backend.decode(example.ids.tolist(), skip_special_tokens=False)
    assert text == "*0\n>1+2\n=3*3<eos>\n?9\n=9.<eos>"
    assert trained_text(policy, example) == "3*3<eos>9.<eos>" and example.weight == 0.5
    rollout, _ = pack([example, example], torch.device("cpu"))
    rollout.validate()
    letter = {ROLE_PROMPT: "p", ROLE_SAMPLED: "s", ROLE_FORCED: "f"}
    assert "".join(letter[r] for r in rollout.role.tolist()) == ("p" * 9 + "ssss" + "fffff" + "sss") * 2


def test_a_prompt_is_asked_as_at_generation():
    policy = chat_policy()
    example = row(policy, {"question": "1+2", "answer": "3"})
    assert policy.tokenizer.decode(example.ids.tolist()) == ">1+2\n=3" and trained_text(policy, example) == "3<eos>"
    plain = row(tiny_policy(), {"prompt": "1+2\n<think>", "response": "</think>3<eos>"})
    assert trained_text(policy, plain) == "</think>3<eos>", "an end token that is there is not doubled"


@pytest.mark.parametrize(
    ("item", "mode", "words"),
    [
        ({"prompt": "1"}, "sft", ["'response' must be a text"]),
        ({"prompt": 1, "response": "2"}, "sft", ["'prompt' must be a text", "got 1"]),
        ({"prompt": "1", "response": "2", "weight": 0}, "sft", ["'weight' must be a number from 1e-06 to 1e+06"]),
        (
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": None}]},
            "sft",
            ["message 2 must have a text as content", "got None"],
        ),
        (
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "2"}]},
            "sft",
            ["message 1 must have a text as content"],
        ),
        ({"question": "1", "options": ["1", "1 "], "answer": "1"}, "sft", ["'options'", "different texts"]),
        ({"prompt": "1", "response": "2", "weight": 1e300}, "sft", ["'weight'", "got 1e+300"]),
        ({"question": "1", "options": ["1", "2"], "answer": "2", "response": 5}, "sft", ["'response'", "got 5"]),
        ({"prompt": "1", "response": "x"}, "sft", ["cannot encode 'x'"]),
        ({"question": "1", "solution": "2"}, "cft", ["'critique' must be a text"]),
        ({"messages": [{"role": "user", "content": "1"}]}, "sft", ["'messages' must be", "assistant"]),
        ({"messages": "1"}, "sft", ["'messages' must be a list"]),
        (
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]},
            "sft",
            ["no chat template"],
        ),
        ({"question": "1", "options": ["2"], "answer": "A"}, "sft", ["'options' must be a list of 2 to 26 different"]),
    ],
)
def test_a_bad_row_is_one_sentence_with_its_line(item, mode, words):
    with pytest.raises(UserError, match=r"^f\.jsonl, line 3: ") as error:
        row(tiny_policy(), item, mode)
    assert all(word in str(error.value) for word in words), error.value


def test_a_template_that_rewrites_earlier_turns_is_refused():
    policy = chat_policy("{{ messages | length }}" + TEMPLATE)
    messages = [{"role": r, "content": "1"} for r in ("user", "assistant")]
    with pytest.raises(UserError, match="does not put message 2 after the earlier ones"):
        row(policy, {"messages": messages})


def test_rows_without_context_or_without_training_are_refused():
    for segments in ([([1, 2], False)], [([1], True), ([2], True)], []):
        with pytest.raises(ValueError, match="must begin with context and hold trained tokens"):
            join(segments)


# --- templates --------------------------------------------------------------------------------------------------------


def test_choice_and_open_templates():
    item = Choice("1+4=?", ("3", "5", "7"), "5", alone=True)
    assert as_choice(item) == ("1+4=?\nA. 3\nB. 5\nC. 7", "B")
    assert as_open(item) == ("1+4=?", "5")
    assert as_choice(replace(item, gold="6")) is None, "no rule can check an answer that is not among the options"
    assert as_open(replace(item, alone=False)) is None


def test_rows_with_options_under_each_template():
    policy = tiny_policy()
    item = {"question": "1+4", "options": ["3", "5"], "answer": "B"}
    assert trained_text(policy, row(policy, item, template="open")) == "5<eos>", "the letter's content"
    assert trained_text(policy, row(policy, item | {"answer": "(b)"}, template="open")) == "5<eos>"
    assert trained_text(policy, row(policy, item | {"answer": "3"}, template="open")) == "3<eos>"
    assert trained_text(policy, row(policy, item | {"response": "1+4=5"}, template="open")) == "1+4=5<eos>"
    assert row(policy, item | {"needs_options": True}, template="open") == "unanswerable without options"
    assert row(policy, item | {"answer": "D"}) == "gold not among the options"


# --- blends -----------------------------------------------------------------------------------------------------------


def rows_of(name: str, count: int, start: int) -> FileRows:
    return FileRows(name, [join([([start + i], False), ([1], True)]) for i in range(count)], Counter())


def names(blend: Blend, first: int, count: int) -> list[int]:
    return [int(blend.example(i)[1].ids[0]) for i in range(first, first + count)]


def test_every_block_holds_the_exact_shares():
    assert apportion([2, 1]) == (667, 333) and apportion([1]) == (BLOCK,)
    assert apportion([1e9, 1, 1]) == (998, 1, 1), "a small source is not forgotten"
    assert sum(apportion([1] * 7)) == sum(apportion([0.3, 0.3, 1e-9, 0.1])) == BLOCK
    blend = Blend([rows_of("a", 50, 0), rows_of("b", 9, 100)], [2, 1], seed=3)
    for block in range(3):
        drawn = Counter(i >= 100 for i in names(blend, block * BLOCK, BLOCK))
        assert drawn == {False: 667, True: 333}
    order = [source for source, _ in map(blend.example, range(60))]
    assert 10 < sum(order) < 30, "mixed, not one after the other"


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own():
    blend = Blend([rows_of("a", 37, 0)], [1.0], seed=3)
    first, second = names(blend, 0, 37), names(blend, 37, 37)
    assert sorted(first) == sorted(second) == list(range(37)) and first != second != list(range(37))
    two = Blend([rows_of("a", 37, 0), rows_of("b", 37, 100)], [1, 1], seed=3)
    drawn = names(two, 0, BLOCK)
    a, b = [i for i in drawn if i < 100], [i - 100 for i in drawn if i >= 100]
    assert sorted(a[:37]) == list(range(37)) and a[:37] != b[:37], "sources of one length have orders of their own"


def test_the_cursor_is_the_whole_state():
    def fresh():
        return Blend([rows_of("a", 50, 0), rows_of("b", 9, 100)], [2, 1], seed=3)

    whole = fresh().draw(0, 1500)
    begun = fresh().draw(0, 700)
    rest = fresh().draw(begun.cursor, 800)
    assert [e.ids.tolist() for e in whole.examples] == [e.ids.tolist() for e in begun.examples + rest.examples]
    assert whole.cursor == rest.cursor and whole.per_source[0] == begun.per_source[0] + rest.per_source[0]
    other = Blend([rows_of("a", 50, 0), rows_of("b", 9, 100)], [2, 1], seed=4)
    assert names(other, 0, 100) != names(fresh(), 0, 100)


def test_files_with_overlong_rows_and_without_weights(tmp_path):
    policy = tiny_policy()
    short = [{"prompt": "1", "response": str(i)} for i in range(6)]
    a = write(tmp_path / "a.jsonl", [*short, {"prompt": "1" * 20, "response": "2"}])
    b = write(tmp_path / "b.jsonl", short[:2])
    blend = file_blend(policy, "sft", parse_data(f"{a},{b}"), 10, seed=0)
    assert blend.counts == (750, 250), "as many draws as rows"
    assert blend.sources[0].left_out == {"too long": 1} and len(blend.sources[0].examples) == 6
    with pytest.raises(UserError, match="no row is left to train on: 7 too long"):
        read_file(policy, "sft", DataSpec(a), 1)
    changed = write(tmp_path / "c.jsonl", [*short[:5], short[0] | {"weight": 2}])
    assert len({read_file(policy, "sft", DataSpec(p), 10).digest() for p in (a, b, changed)}) == 3


def test_worked_solutions_are_right_and_long_ones_are_passed_over():
    policy, task = tiny_policy(), load_task("countdown")
    blend = Blend([Solutions(policy, task, 60)], [1.0], seed=1)
    drawn = blend.draw(0, 40)
    assert (
        drawn.too_long > 0 and max(e.ids.numel() for e in drawn.examples) <= 60 and drawn.cursor == 40 + drawn.too_long
    )
    for i in range(20):
        example = Solutions(policy, task, 1000).example(i, 1)
        assert task.grade(task.train(i, 1), policy.tokenizer.decode(example.ids[example.trained].tolist())).correct
    opened = Solutions(chat_policy(), load_task("arithmetic"), 1000)
    with pytest.raises(UserError, match="cannot encode"):
        opened.example(0, 1)  # the words of a chat prompt; the characters of the small tokenizer do not spell them
    with pytest.raises(UserError, match="--max-tokens"):
        Blend([Solutions(policy, task, 5)], [1.0], seed=1).draw(0, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [DataSpec("a.jsonl")]),
        ("a.jsonl:2,b.jsonl:1.5", [DataSpec("a.jsonl", 2.0), DataSpec("b.jsonl", 1.5)]),
        ("a.jsonl:1:mcq,a.jsonl:3:open", [DataSpec("a.jsonl", 1.0), DataSpec("a.jsonl", 3.0, "open")]),
        ("a.jsonl:open", [DataSpec("a.jsonl", None, "open")]),
        ("x:y/a.jsonl", [DataSpec("x:y/a.jsonl")]),
    ],
)
def test_data_specs(text, expected):
    assert parse_data(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jsonl:opne", "did you mean 'open'"),
        ("a.jsonl:2,b.jsonl", "weights for all files or for none"),
        ("a.jsonl:-1", "a weight above 0"),
        ("a.jsonl:nan", "a weight above 0"),
        (",", "comma-separated"),
    ],
)
def test_bad_data_specs(text, words):
    with pytest.raises(UserError, match=words):
        parse_data(text)
