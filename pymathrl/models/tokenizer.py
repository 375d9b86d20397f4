"""Text to token ids and back: a thin wrapper over a tokenizer.json, with the chat templates beside it.

The files are kept as they were read and written back unchanged, so that a saved checkpoint tokenizes as its origin did.
`char_tokenizer` makes the tokenizer of the built-in model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pymathrl.errors import UserError, nearest

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARS = "\n 0123456789+-*/()=,>?.:"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"  # of templates other than the default one, <name>.jinja each
TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Files of a tokenizer and what they mean.

    encode adds no special token of its own; text that spells a special token becomes that token, as in transformers.
    eos_id, pad_id: int; the two may be the same id.
    templates: chat templates by name, the usual one under "default".
    """

    def __init__(
        self,
        backend_json: str,
        config: dict[str, Any] | None = None,
        *,
        files: dict[str, str] | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        where: str = "tokenizer.json",
    ) -> None:
        """backend_json, config: the text of tokenizer.json and the object of tokenizer_config.json. files: path within
        the folder -> text of every other file that belongs to the tokenizer; chat templates among them come before
        those of tokenizer_config.json. eos_id, pad_id: ids that the model's own files name; the tokenizer's come first.
        """
        try:
            self.backend = Backend.from_str(backend_json)
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"{where}: not a tokenizer.json that the tokenizers package can read ({error})") from error
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend_json = backend_json
        self.config = dict(config or {})
        self.files = dict(files or {})
        self.where = where
        self._add_tokens()
        named_eos, named_pad = self._named_id("eos_token"), self._named_id("pad_token")
        eos = named_eos if named_eos is not None else eos_id
        if eos is None:
            raise UserError(
                f"{where}: no end token; name it as eos_token in tokenizer_config.json or eos_token_id in config.json"
            )
        self.eos_id = eos
        self.pad_id = next(i for i in (named_pad, pad_id, eos) if i is not None)
        self.templates = {**self._config_templates(), **_file_templates(self.files)}

    def __len__(self) -> int:
        """Number of tokens, added tokens included. The model's vocabulary may be larger (padded rows)."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens around it. UserError for text that the vocabulary cannot spell."""
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises bare Exception
            unknown = sorted({ch for ch in text if self.backend.token_to_id(ch) is None})
            raise UserError(
                f"the tokenizer cannot encode {_shorten(text)!r}: its vocabulary lacks {unknown or 'a piece of it'} "
                f"({error})"
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens (end, padding) leave no text, nor do ids past the tokenizer's vocabulary."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of many rows in one call."""
        return self.backend.decode_batch([list(row) for row in rows], skip_special_tokens=True)

    @property
    def has_chat(self) -> bool:
        return "default" in self.templates

    def chat(self, messages: Sequence[dict[str, Any]], template: str | None = None, **variables: Any) -> str:
        """The conversation as the model was trained to read it, ending where the assistant's answer begins
        (add_generation_prompt=False: ending with the last message).

        messages: [{"role": "user", "content": ...}, ...]; variables are passed to the template (enable_thinking=False,
        tools=[...]). template: a name in `templates`; where not given, "tool_use" for a call with tools if there is
        such a template, else "default".
        """
        if template is None:
            template = "tool_use" if variables.get("tools") and "tool_use" in self.templates else "default"
        if template not in self.templates:
            if not self.templates:
                raise UserError(f"{self.where}: the tokenizer has no chat template; use the plain prompt style")
            raise UserError(f"{self.where}: no chat template {template!r}; {nearest(template, self.templates)}")
        named = {key: _token_text(self.config.get(key)) for key in TOKEN_KEYS}
        special = {key: text for key, text in named.items() if text is not None}  # others stay undefined
        values = {"tools": None, "documents": None, "add_generation_prompt": True, **special, **variables}
        try:
            return _compile(self.templates[template]).render({**values, "messages": list(messages)})
        # a template computes: besides jinja2's own errors it raises those of its expressions ('a' + 1, 1 // 0)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise UserError(f"{self.where}: the chat template failed: {error}") from error

    def save(self, folder: Path, **config: Any) -> None:
        """Writes the tokenizer's files; `config` entries are set in tokenizer_config.json."""
        text = json.dumps({**self.config, **config}, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        for name, content in {**self.files, "tokenizer.json": self.backend_json, "tokenizer_config.json": text}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")

    def _add_tokens(self) -> None:
        """Tokens that only tokenizer_config.json or added_tokens.json knows, as transformers adds them.

        A fine-tune may add a token, or make one special, without writing tokenizer.json again: its text would fall
        apart into letters here, and a special one would stay in decoded answers.
        """
        listed = {}
        try:
            for text, index in json.loads(self.files.get("added_tokens.json", "{}")).items():
                listed[int(index)] = AddedToken(text, normalized=False)
            for index, entry in (self.config.get("added_tokens_decoder") or {}).items():
                listed[int(index)] = AddedToken(**entry)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.where}: the added tokens of added_tokens.json or tokenizer_config.json cannot be read ({error})"
            ) from error
        known = self.backend.get_added_tokens_decoder()
        wanted = {}
        for index, token in sorted(listed.items()):
            have = known.get(index)
            if have is None or have.content != token.content or (token.special and not have.special):
                wanted[index] = token
        self.backend.add_tokens(list(wanted.values()))
        for index, token in wanted.items():
            if self.backend.token_to_id(token.content) != index:
                raise UserError(
                    f"{self.where}: added token {token.content!r} must have id {index}, got "
                    f"{self.backend.token_to_id(token.content)}; tokenizer.json and the other files do not match"
                )
        named = {text for key in TOKEN_KEYS if (text := _token_text(self.config.get(key)))}
        named -= {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        self.backend.add_special_tokens([text for text in sorted(named) if self.backend.token_to_id(text) is not None])

    def _named_id(self, key: str) -> int | None:
        """Id of a token that tokenizer_config.json names by its text; None when it names none."""
        text = _token_text(self.config.get(key))
        if text is None:
            return None
        found = self.backend.token_to_id(text)
        if found is None:
            raise UserError(f"{self.where}: {key} {text!r} of tokenizer_config.json is not in the vocabulary")
        return found

    def _config_templates(self) -> dict[str, str]:
        """chat_template of tokenizer_config.json: one text, or a list of {"name": ..., "template": ...}."""
        entry = self.config.get("chat_template")
        if entry is None:
            return {}
        listed = entry if isinstance(entry, list) else [{"name": "default", "template": entry}]
        named = {t.get("name"): t.get("template") for t in listed if isinstance(t, dict)}
        texts = {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
        if len(texts) != len(listed):
            raise UserError(
                f"{self.where}: chat_template of tokenizer_config.json must be text, or a list of objects with a name "
                f"and a template, got {_shorten(repr(entry))}"
            )
        return texts


def _file_templates(files: dict[str, str]) -> dict[str, str]:
    folder = PurePosixPath(TEMPLATE_FOLDER)
    named = {path.stem: text for name, text in files.items() if (path := PurePosixPath(name)).parent == folder}
    return {"default": files[TEMPLATE_FILE], **named} if TEMPLATE_FILE in files else named


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's text for training masks; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=8)  # compiling takes longer than rendering, and a run renders one template for every problem
def _compile(template: str) -> Template:
    """The template in jinja2's sandbox (it comes with the model and is not trusted), with what transformers offers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes <, > and & for HTML and sorts the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json is its text, or an object that holds it as content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def char_tokenizer(chars: str = CHARS, tags: Sequence[str] = TAGS) -> Tokenizer:
    """One token per character and per tag: <pad> = 0, <eos> = 1, then the tags, then the characters, in that order.

    Encoding then decoding gives the text back. Text with any other character is refused, not replaced.
    """
    specials = ("<pad>", "<eos>")
    tokens = [*specials, *tags, *chars]
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"char_tokenizer: expected distinct tokens, got {tokens}")
    # no unknown token: tokenizers then refuses a word that is not in the vocabulary
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    pattern = "|".join([*tags, r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(specials))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(backend.to_str(pretty=True), config, where="char_tokenizer")
