"""Checkpoints in and out, in the Hugging Face layout: config.json, generation_config.json, model.safetensors (or shards
with model.safetensors.index.json), tokenizer.json, tokenizer_config.json, chat_template.jinja.

What `save` writes loads in transformers as it is. Every fault of a folder is one UserError that names the file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pymathrl.errors import UserError, nearest
from pymathrl.models.decoder import Decoder, ModelConfig, TensorSpec, tensor_specs
from pymathrl.models.tokenizer import Tokenizer

BUILTIN = {"builtin:tiny": "tiny"}  # model name -> folder of pymathrl/assets
STYLES = ("compact", "plain", "chat")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # dtypes of safetensors that are read
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
# tensors that some writers store although they follow from the config
DERIVED = re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Policy:
    """A model that writes text: weights, tokenizer, and how it wants to be asked.

    eos_ids       ids that end a sequence, at least one
    prompt_style  "compact" (the built-in model's short form), "plain" (text completion) or "chat" (chat template)
    path          folder or name it was loaded from; None for one made in memory
    generation    the object of generation_config.json, written back on save
    """

    model: Decoder
    tokenizer: Tokenizer
    config: ModelConfig
    eos_ids: tuple[int, ...]
    prompt_style: str
    path: str | None = None
    generation: dict[str, Any] | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device


def new_policy(config: ModelConfig, tokenizer: Tokenizer, prompt_style: str = "compact", seed: int = 0) -> Policy:
    """A policy with random weights, fp32 on the CPU, ending at the tokenizer's end token."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"new_policy: vocab_size must be >= the tokenizer's {len(tokenizer)} tokens, got {config.vocab_size}"
        )
    config = replace(config, eos_ids=(tokenizer.eos_id,), pad_id=tokenizer.pad_id)
    return Policy(Decoder(config, seed=seed), tokenizer, config, config.eos_ids, prompt_style)


def load(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Policy:
    """path: a folder, "builtin:tiny", or a model's name on the Hugging Face hub (org/name).

    dtype of the weights: fp32 on a CPU and bf16 on a GPU where not given.
    """
    folder = _resolve(str(path))
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = ModelConfig.from_hf(_read_json(folder / "config.json"), str(folder / "config.json"))
    generation = _read_json(folder / "generation_config.json", required=False)
    tokenizer = _load_tokenizer(folder, config, generation)
    if len(tokenizer) > config.vocab_size and max(tokenizer.backend.get_vocab().values()) >= config.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'}: {len(tokenizer)} tokens do not fit the model's vocab_size of "
            f"{config.vocab_size}; the tokenizer belongs to another model"
        )
    eos = (
        _ids(generation.get("eos_token_id"), folder / "generation_config.json") or config.eos_ids or (tokenizer.eos_id,)
    )
    if not all(0 <= i < config.vocab_size for i in eos):
        raise UserError(f"{folder}: eos_token_id must lie in 0..{config.vocab_size - 1}, got {list(eos)}")
    style = tokenizer.config.get("prompt_style", "chat" if tokenizer.has_chat else "plain")
    if style not in STYLES:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: prompt_style must be one of {', '.join(STYLES)}, got {style!r}"
        )
    model = Decoder(config, seed=None, device=device, dtype=dtype)
    _load_weights(model, folder)
    return Policy(model, tokenizer, config, tuple(eos), style, str(path), generation)


def save(policy: Policy, folder: str | Path) -> None:
    """Writes the checkpoint into `folder` (made if absent). Not atomic by itself: give it a new folder and rename that.

    The written files follow from the weights and the policy alone: the same policy gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(policy.config, eos_ids=policy.eos_ids, pad_id=policy.tokenizer.pad_id)
    _write_json(folder / "config.json", config.to_hf(policy.model.dtype))
    eos: int | list[int] = list(policy.eos_ids) if len(policy.eos_ids) > 1 else policy.eos_ids[0]
    generation = {**(policy.generation or {}), "eos_token_id": eos, "pad_token_id": policy.tokenizer.pad_id}
    _write_json(folder / "generation_config.json", generation)
    policy.tokenizer.save(folder, prompt_style=policy.prompt_style)
    save_file(state_tensors(policy.model), str(folder / WEIGHTS), metadata={"format": "pt"})


@torch.no_grad()
def state_tensors(model: Decoder) -> dict[str, Tensor]:
    """The weights under their checkpoint names and in the checkpoint layout, on the CPU."""
    params = dict(model.named_parameters())
    return {
        spec.name: spec.write(params[spec.param].narrow(0, spec.start, spec.shape[0])).contiguous().cpu()
        for spec in tensor_specs(model.config)
    }


def _resolve(path: str) -> Path:
    """The local folder of a model name."""
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise UserError(f"model {path!r}: no such built-in model; {nearest(path, BUILTIN)}")
        folder = Path(__file__).parent.parent / "assets" / BUILTIN[path]
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model {path!r}: its files are not in {folder}; reinstall the package, or make them with scripts/"
            )
        return folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"model {path!r}: expected a folder with config.json and model.safetensors, got a file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(
            f"model {path!r}: no such folder; give a model folder, a hub name (org/name), or {', '.join(BUILTIN)}"
        )
    try:
        return Path(snapshot_download(path, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # what the hub client raises: no network, no such name, not allowed
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {path!r}: no such folder, and it could not be fetched from the Hugging Face hub ({reason}); "
            "give a local folder when offline"
        ) from error


def _load_tokenizer(folder: Path, config: ModelConfig, generation: dict[str, Any]) -> Tokenizer:
    settings = _read_json(folder / "tokenizer_config.json", required=False)
    extra = {}
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            extra[name] = _read_text(folder / name)
    template = folder / "chat_template.jinja"
    eos = _ids(generation.get("eos_token_id"), folder / "generation_config.json") or config.eos_ids
    pad = generation.get("pad_token_id", config.pad_id)
    return Tokenizer(
        _read_text(folder / "tokenizer.json"),
        settings,
        template=_read_text(template) if template.is_file() else None,
        extra_files=extra,
        eos_id=eos[0] if eos else None,
        pad_id=pad if isinstance(pad, int) else None,
        where=str(folder / "tokenizer.json"),
    )


def _load_weights(model: Decoder, folder: Path) -> None:
    specs = {spec.name: spec for spec in tensor_specs(model.config)}
    seen: set[str] = set()
    for file, promised in _weight_files(folder):
        names = _load_file(model, file, specs)
        missing = sorted(promised - names)
        if missing:
            raise UserError(
                f"{file}: tensor {missing[0]} is missing although {INDEX} lists it here; download the shard again"
            )
        seen |= names
    absent = [name for name in specs if name not in seen]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        expected = list(specs[absent[0]].shape)
        raise UserError(
            f"{folder}: tensor {absent[0]} of shape {expected}{more} expected by config.json, got no such tensor in "
            "the weight files; the weights belong to another config"
        )


def _weight_files(folder: Path) -> list[tuple[Path, set[str]]]:
    """(file, names of the tensors that the index promises in it); a single file wins over an index."""
    if (folder / WEIGHTS).is_file():
        return [(folder / WEIGHTS, set())]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: expected {WEIGHTS} or {INDEX}, got neither; other weight formats are not read")
    table = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise UserError(f"{folder / INDEX}: weight_map must be an object of tensor name -> file name")
    shards: dict[str, set[str]] = {}
    for name, file in table.items():
        if Path(file).name != file:
            raise UserError(f"{folder / INDEX}: weight_map names {file!r}; expected a file in the same folder")
        shards.setdefault(file, set()).add(name)
    return [(folder / file, names) for file, names in sorted(shards.items())]


@torch.no_grad()
def _load_file(model: Decoder, file: Path, specs: dict[str, TensorSpec]) -> set[str]:
    """Copies every tensor of one safetensors file into the model; returns the names that the file holds."""
    params = dict(model.named_parameters())
    if not file.is_file():
        raise UserError(f"{file}: listed in {INDEX} but not there; download it again")
    try:
        with safe_open(file, framework="pt") as source:
            names = set(source.keys())
            for name in source.keys():  # noqa: SIM118  (the handle is no dict)
                spec = specs.get(name)
                if spec is None:
                    if (name == "lm_head.weight" and model.config.tie_embeddings) or DERIVED.fullmatch(name):
                        continue
                    raise UserError(
                        f"{file}: tensor {name} is not part of this architecture ({model.config.model_type}); "
                        f"{nearest(name, specs).split(' (valid')[0]}"
                    )
                view = source.get_slice(name)
                if tuple(view.get_shape()) != spec.shape:
                    raise UserError(
                        f"{file}: tensor {name}: expected shape {list(spec.shape)} from config.json, got "
                        f"{list(view.get_shape())}; config.json and the weights are of different models"
                    )
                if view.get_dtype() not in STORED:
                    raise UserError(
                        f"{file}: tensor {name}: expected dtype {', '.join(STORED)}, got {view.get_dtype()}; "
                        "quantised checkpoints are not read"
                    )
                value = spec.read(source.get_tensor(name))
                params[spec.param].narrow(0, spec.start, spec.shape[0]).copy_(value)
    except SafetensorError as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}); copy or download it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    return names


def _ids(value: Any, where: Path) -> tuple[int, ...]:
    """eos_token_id is an int, a list of ints or absent."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(i, int) for i in ids):
        raise UserError(f"{where}: eos_token_id must be an integer or a list of integers, got {value!r}")
    return ids


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path.parent}: expected a file {path.name}, got none; the model folder is incomplete")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error


def _read_json(path: Path, required: bool = True) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
