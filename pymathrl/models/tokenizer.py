"""Text to token ids and back: a thin wrapper over a tokenizer.json, with the chat template beside it.

The files are kept as they were read and written back unchanged, so that a saved checkpoint tokenizes as its origin did.
`char_tokenizer` makes the tokenizer of the built-in model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pymathrl.errors import UserError

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARS = "\n 0123456789+-*/()=,>?.:"


class Tokenizer:
    """Files of a tokenizer and what they mean.

    encode adds no special token of its own; text that spells a special token becomes that token, as in transformers.
    eos_id, pad_id: int; the two may be the same id.
    """

    def __init__(
        self,
        backend_json: str,
        config: dict[str, Any] | None = None,
        *,
        template: str | None = None,
        extra_files: dict[str, str] | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        where: str = "tokenizer.json",
    ) -> None:
        """backend_json, config, template: the text of tokenizer.json, the object of tokenizer_config.json and the text
        of chat_template.jinja. eos_id, pad_id: ids that the model's own files name; the tokenizer's come first."""
        try:
            self.backend = Backend.from_str(backend_json)
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"{where}: not a tokenizer.json that the tokenizers package can read ({error})") from error
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend_json = backend_json
        self.config = dict(config or {})
        self.template_file = template
        self.extra_files = dict(extra_files or {})
        self.where = where
        named_eos, named_pad = self._named_id("eos_token"), self._named_id("pad_token")
        eos = named_eos if named_eos is not None else eos_id
        if eos is None:
            raise UserError(
                f"{where}: no end token; name it as eos_token in tokenizer_config.json or eos_token_id in config.json"
            )
        self.eos_id = eos
        self.pad_id = next(i for i in (named_pad, pad_id, eos) if i is not None)
        self._template = template if template is not None else self._config_template()

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
        return self._template is not None

    def chat(self, messages: Sequence[dict[str, str]], **variables: Any) -> str:
        """The conversation as the model was trained to read it, ending where the assistant's answer begins.

        messages: [{"role": "user", "content": ...}, ...]; variables are passed to the template (enable_thinking=False).
        The template runs in jinja2's sandbox: it comes with the model and is not trusted.
        """
        if self._template is None:
            raise UserError(f"{self.where}: the tokenizer has no chat template; use the plain prompt style")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        special = {
            key: _token_text(self.config.get(key)) or "" for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        values = {"tools": None, **special, **variables, "messages": list(messages), "add_generation_prompt": True}
        try:
            return environment.from_string(self._template).render(values)
        except TemplateError as error:
            raise UserError(f"{self.where}: the chat template failed: {error}") from error

    def save(self, folder: Path, **config: Any) -> None:
        """Writes the tokenizer's files; `config` entries are set in tokenizer_config.json."""
        (folder / "tokenizer.json").write_text(self.backend_json, encoding="utf-8")
        text = json.dumps({**self.config, **config}, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        files = dict(self.extra_files)
        if self.template_file is not None:
            files["chat_template.jinja"] = self.template_file
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")

    def _named_id(self, key: str) -> int | None:
        """Id of a token that tokenizer_config.json names by its text; None when it names none."""
        text = _token_text(self.config.get(key))
        if text is None:
            return None
        found = self.backend.token_to_id(text)
        if found is None:
            raise UserError(f"{self.where}: {key} {text!r} of tokenizer_config.json is not in the vocabulary")
        return found

    def _config_template(self) -> str | None:
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several named templates: the one called default
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if template is not None and not isinstance(template, str):
            raise UserError(
                f"{self.where}: chat_template of tokenizer_config.json must be text, got {type(template).__name__}"
            )
        return template


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
