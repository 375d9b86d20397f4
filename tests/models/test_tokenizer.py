"""The tokenizer wrapper, its chat template, and the built-in model's character tokenizer."""

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pymathrl.errors import UserError
from pymathrl.models.tokenizer import CHARS, TAGS, TEMPLATE_FILE, Tokenizer, char_tokenizer

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
    tokenizer = Tokenizer(CHARACTER.backend_json, CHARACTER.config, files={TEMPLATE_FILE: TEMPLATE})
    tokenizer.save(tmp_path)
    messages = [{"role": "system", "content": "9"}, {"role": "user", "content": " 1+1 "}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for variables in ({}, {"enable_thinking": False}):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
        assert tokenizer.chat(messages, **variables) == expected
    assert tokenizer.chat(messages) == "<9>\n?1+1<eos>="


def with_template(template: str) -> Tokenizer:
    return Tokenizer(CHARACTER.backend_json, CHARACTER.config, files={TEMPLATE_FILE: template})


USER = [{"role": "user", "content": "7"}]


def test_chat_template_in_the_config_named_or_not() -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    for template in (named, "{{ messages[0].content }}"):
        tokenizer = Tokenizer(CHARACTER.backend_json, {**CHARACTER.config, "chat_template": template})
        assert tokenizer.has_chat and tokenizer.chat(USER) == "7"
    tokenizer = Tokenizer(CHARACTER.backend_json, {**CHARACTER.config, "chat_template": named})
    assert tokenizer.chat(USER, template="tool_use") == tokenizer.chat(USER, tools=[{"name": "f"}]) == "tools"
    with pytest.raises(UserError, match="no chat template 'tool_us'; did you mean 'tool_use'"):
        tokenizer.chat(USER, template="tool_us")
    for wrong in ({"default": "x"}, [{"name": "default"}], ["x"], [{"name": "a", "template": "x"}] * 2):
        with pytest.raises(UserError, match="must be text, or a list of objects with a name and a template, got"):
            Tokenizer(CHARACTER.backend_json, {**CHARACTER.config, "chat_template": wrong})


def test_templates_in_files_come_first(tmp_path: Path) -> None:
    """The layout in which transformers saves several templates, and the one of its versions before."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=CHARACTER.backend, eos_token="<eos>", chat_template={"default": "d", "rag": "r"}
    )
    for files in (True, False):
        folder = tmp_path / str(files)
        theirs.save_pretrained(folder, save_jinja_files=files)
        assert (folder / "additional_chat_templates/rag.jinja").is_file() == files
        read = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.jinja")}
        config = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer = Tokenizer((folder / "tokenizer.json").read_text(), config, files=read)
        assert tokenizer.templates == {"default": "d", "rag": "r"}
        tokenizer.save(folder / "again")
        again = transformers.AutoTokenizer.from_pretrained(folder / "again")
        assert again.apply_chat_template(USER, chat_template="rag", tokenize=False) == "r"
    config = {**CHARACTER.config, "chat_template": "of the config"}
    assert Tokenizer(CHARACTER.backend_json, config, files={TEMPLATE_FILE: "of the file"}).chat(USER) == "of the file"


TEMPLATES = {  # what the templates of real models use
    "loop controls": "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "json as it is": "{{ {'b': '<é&>', 'a': [1, none]} | tojson }}",
    "json with options": "{{ {'b': '<é&>', 'a': 1} | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}"
    "{{ [1, 2] | tojson(separators=(',', ':')) }}",
    "date": "{{ strftime_now('%Y') }}",
    "special tokens": "{{ eos_token }}{{ pad_token }}{% if bos_token is defined %}bos{% endif %}",
    "no tools": "{% if tools is not none or documents %}tools{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x }}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(last=-1) %}{% for m in messages %}{% set ns.last = loop.index0 %}{% endfor %}"
    "{{ ns.last }}",
    "trimmed blocks": "  {% if true %}\n  a\n  {% endif %}\nb\n",
    "slices and string methods": "{{ messages[::-1][0]['content'].strip('\n').split('</think>')[-1].lstrip() }}",
    "no prompt": "{{ 'prompt' if add_generation_prompt else 'none' }}",
    "macro": "{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say(messages | length) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_features_as_in_transformers(name: str) -> None:
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=CHARACTER.backend, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATES[name]
    )
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<think>2</think>\n 3\n"}]
    for prompt in (True, False):
        want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert with_template(TEMPLATES[name]).chat(messages, add_generation_prompt=prompt) == want
    assert with_template(TEMPLATES[name]).chat(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template failed"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "chat template failed"),  # leaving the sandbox
        ("{{ messages.append(1) }}", "chat template failed"),
        ("{{ 'a' + 1 }}", "chat template failed: can only concatenate str"),
        ("{{ 1 // 0 }}", "chat template failed"),
        ("{{ bos_token + 'a' }}", "chat template failed: 'bos_token' is undefined"),  # this tokenizer has none
    ],
)
def test_bad_chat_template(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_template(template).chat([{"role": "user", "content": "1"}])


def test_no_chat_template() -> None:
    assert not CHARACTER.has_chat
    with pytest.raises(UserError, match="no chat template"):
        CHARACTER.chat([{"role": "user", "content": "1"}])


def entry(text: str, special: bool = False) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": text, "special": special, **flags}


def test_tokens_that_only_the_config_knows(tmp_path: Path) -> None:
    """Added after tokenizer.json was written, in order of their ids; and one that is special in the config only."""
    n = len(CHARACTER)
    added = {
        str(n + 1): entry("[B]"),
        str(n): entry("[A]", True),
        str(n + 2): entry("[C]", True),
        "4": entry("<answer>", True),
        "2": entry("<think>"),
    }
    config = {**CHARACTER.config, "added_tokens_decoder": added}
    tokenizer = Tokenizer(CHARACTER.backend_json, config)
    ids = tokenizer.encode("[C]1[B]<answer>[A]")
    assert ids == [n + 2, *CHARACTER.encode("1"), n + 1, 4, n] and len(tokenizer) == n + 3
    assert tokenizer.decode(ids) == "1[B]"
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("[C]1[B]<answer>[A]")["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == "1[B]"
    for wrong in ({str(n + 5): entry("[A]")}, {"3": entry("<think>")}):
        with pytest.raises(UserError, match=r"added token .* must have id \d+, got \d+; tokenizer.json and the other"):
            Tokenizer(CHARACTER.backend_json, {**CHARACTER.config, "added_tokens_decoder": wrong})
    for files, config in (({"added_tokens.json": "{"}, {}), ({}, {"added_tokens_decoder": {"30": "[A]"}})):
        with pytest.raises(UserError, match=r"the added tokens of .* cannot be read"):
            Tokenizer(CHARACTER.backend_json, {**CHARACTER.config, **config}, files=files)


def test_named_tokens_are_special() -> None:
    """An end token that tokenizer.json holds as an ordinary word leaves no text either, as in transformers."""
    tokenizer = Tokenizer(CHARACTER.backend_json, {"eos_token": "</answer>"})
    assert tokenizer.eos_id == 5 and tokenizer.decode(tokenizer.encode("1</answer>")) == "1"


def test_end_and_padding_ids() -> None:
    text = CHARACTER.backend_json
    same = Tokenizer(text, {"eos_token": "<eos>"})
    assert (same.eos_id, same.pad_id) == (1, 1)  # no padding token: the end token serves
    assert Tokenizer(text, {"eos_token": {"content": "<eos>"}, "pad_token": "<eos>"}).pad_id == 1
    assert Tokenizer(text, {}, eos_id=5, pad_id=0).eos_id == 5  # named by the model's config only
    with pytest.raises(UserError, match="no end token"):
        Tokenizer(text, {})
    with pytest.raises(UserError, match=r"eos_token '</s>' of tokenizer_config\.json is not in the vocabulary"):
        Tokenizer(text, {"eos_token": "</s>"})
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer("{}", {"eos_token": "<eos>"})


def test_repeated_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct tokens"):
        char_tokenizer("aa")
