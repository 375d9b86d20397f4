"""The tokenizer wrapper, its chat template, and the built-in model's character tokenizer."""

from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pymathrl.errors import UserError
from pymathrl.models.tokenizer import CHARS, TAGS, Tokenizer, char_tokenizer

TEXT = "<think>3 + (4*5) = 23\n</think><answer>3+4*5</answer>"
TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}{{ '<' + messages[0]['content'] + '>\\n' }}{%- endif %}"
    "{%- for m in messages if m['role'] == 'user' %}{{ '?' + m.content | trim + eos_token }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '=' }}{% endif %}{%- if enable_thinking is defined %}{{ '>' }}{% endif %}"
)


def test_ids_of_the_character_tokenizer() -> None:
    tokenizer = char_tokenizer()
    assert (tokenizer.pad_id, tokenizer.eos_id, len(tokenizer)) == (0, 1, 2 + len(TAGS) + len(CHARS))
    assert tokenizer.encode("<think>1") == [2, 6 + CHARS.index("1")]
    assert tokenizer.encode("<eos>") == [1] and tokenizer.encode("") == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, *CHARS]), max_size=30))
def test_character_tokenizer_is_lossless(pieces: list[str]) -> None:
    tokenizer, text = CHARACTER, "".join(pieces)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


CHARACTER = char_tokenizer()


def test_decode_leaves_out_specials_and_ids_past_the_vocabulary() -> None:
    ids = CHARACTER.encode("1+2")
    assert CHARACTER.decode([0, *ids, 1, 0, 47]) == "1+2"
    assert CHARACTER.decode_batch([ids, [1], []]) == ["1+2", "", ""]


def test_unknown_character_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot encode '3x\+é'.*\['x', 'é'\]"):
        CHARACTER.encode("3x+é")


def test_same_ids_in_transformers(tmp_path: Path) -> None:
    CHARACTER.save(tmp_path, prompt_style="compact")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == CHARACTER.encode(TEXT)
    assert theirs.decode(CHARACTER.encode(TEXT)) == TEXT
    assert (theirs.eos_token_id, theirs.pad_token_id) == (1, 0)


def test_chat_template_as_in_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(CHARACTER.backend_json, CHARACTER.config, template=TEMPLATE)
    tokenizer.save(tmp_path)
    messages = [{"role": "system", "content": "9"}, {"role": "user", "content": " 1+1 "}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for variables in ({}, {"enable_thinking": False}):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
        assert tokenizer.chat(messages, **variables) == expected
    assert tokenizer.chat(messages) == "<9>\n?1+1<eos>="


def test_chat_template_in_the_config_named_or_not() -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    for template in (named, "{{ messages[0].content }}"):
        tokenizer = Tokenizer(CHARACTER.backend_json, {**CHARACTER.config, "chat_template": template})
        assert tokenizer.has_chat and tokenizer.chat([{"role": "user", "content": "7"}]) == "7"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template failed"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "chat template failed"),  # leaving the sandbox
        ("{{ messages.append(1) }}", "chat template failed"),
    ],
)
def test_bad_chat_template(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer(CHARACTER.backend_json, CHARACTER.config, template=template).chat([{"role": "user", "content": "1"}])


def test_no_chat_template() -> None:
    assert not CHARACTER.has_chat
    with pytest.raises(UserError, match="no chat template"):
        CHARACTER.chat([{"role": "user", "content": "1"}])


def test_end_and_padding_ids() -> None:
    json = CHARACTER.backend_json
    same = Tokenizer(json, {"eos_token": "<eos>"})
    assert (same.eos_id, same.pad_id) == (1, 1)  # no padding token: the end token serves
    assert Tokenizer(json, {"eos_token": {"content": "<eos>"}, "pad_token": "<eos>"}).pad_id == 1
    assert Tokenizer(json, {}, eos_id=5, pad_id=0).eos_id == 5  # named by the model's config only
    with pytest.raises(UserError, match="no end token"):
        Tokenizer(json, {})
    with pytest.raises(UserError, match=r"eos_token '</s>' of tokenizer_config\.json is not in the vocabulary"):
        Tokenizer(json, {"eos_token": "</s>"})
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer("{}", {"eos_token": "<eos>"})


def test_repeated_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct tokens"):
        char_tokenizer("aa")
