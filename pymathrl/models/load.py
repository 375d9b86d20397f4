"""Checkpoints in and out, in the Hugging Face layout: config.json, generation_config.json, model.safetensors (or shards
with model.safetensors.index.json), tokenizer.json, tokenizer_config.json, chat_template.jinja and
additional_chat_templates/.

What `save` writes loads in transformers as it is; a hybrid, which transformers does not know, has a mamba_config.json
more, as M1's own files do. Every fault of a folder is one UserError that names the file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pymathrl.errors import UserError, nearest
from pymathrl.models.config import MAMBA_FILE, Mamba, ModelConfig, Rope, TensorSpec, tensor_specs, token_ids
from pymathrl.models.decoder import Decoder
from pymathrl.models.tokenizer import TEMPLATE_FILE, TEMPLATE_FOLDER, Tokenizer
from pymathrl.ops._call import use_reference

BUILTIN = {"builtin:tiny": "tiny", "builtin:tiny-m1": "tiny-m1"}  # model name -> folder of pymathrl/assets
STYLES = ("compact", "plain", "chat")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SHARD_BYTES = 5_000_000_000  # of tensors in one file, as transformers writes them
TIED_HEAD = "lm_head.weight"
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # dtypes of safetensors that are read
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
# tensors that some writers store although they follow from the config
DERIVED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


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
    """path: a folder, a name of BUILTIN, or a model's name on the Hugging Face hub (org/name).

    dtype of the weights: fp32 on a CPU and bf16 on a GPU where not given; on a CPU the kernels take no other.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "cpu" and dtype != torch.float32 and not use_reference():
        raise UserError(
            f"load: dtype must be torch.float32 on a CPU, got {dtype}: the kernels there are fp32; leave it out, or "
            "set PYMATHRL_IMPL=ref to run the torch references"
        )
    folder = _resolve(str(path))
    raw = _read_json(folder / "config.json")
    config = ModelConfig.from_hf(raw, str(folder / "config.json"))
    if (folder / MAMBA_FILE).is_file():
        config = _as_hybrid(config, folder, raw.get("_name_or_path"))
    generation = _read_json(folder / "generation_config.json", required=False)
    tokenizer = _load_tokenizer(folder, config, generation)
    if len(tokenizer) > config.vocab_size and max(tokenizer.backend.get_vocab().values()) >= config.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'}: {len(tokenizer)} tokens do not fit the model's vocab_size of "
            f"{config.vocab_size}; the tokenizer belongs to another model"
        )
    eos = _end_ids(generation, config, folder) or (tokenizer.eos_id,)
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


def _as_hybrid(config: ModelConfig, folder: Path, base: Any) -> ModelConfig:
    """The config of a folder with a mamba_config.json. M1's attention turns by rope_theta alone: rope_scaling goes."""
    try:
        mamba = Mamba.from_hf(_read_json(folder / MAMBA_FILE), config, base if isinstance(base, str) else None)
        return replace(config, mamba=mamba, rope=Rope())
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def save(policy: Policy, folder: str | Path, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the checkpoint into `folder` (made if absent). Not atomic by itself: give it a new folder and rename that.

    Weights of more than max_shard_bytes go to several files with an index; a tensor is never cut, so a file of one
    tensor may be larger. The written files follow from the arguments alone: the same policy gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(policy.config, eos_ids=policy.eos_ids, pad_id=policy.tokenizer.pad_id)
    _write_json(folder / "config.json", config.to_hf(policy.model.dtype))
    if config.mamba is None:
        (folder / MAMBA_FILE).unlink(missing_ok=True)  # of an earlier save
    else:
        _write_json(folder / MAMBA_FILE, config.mamba.to_hf(config))
    eos: int | list[int] = list(policy.eos_ids) if len(policy.eos_ids) > 1 else policy.eos_ids[0]
    generation = {**(policy.generation or {}), "eos_token_id": eos, "pad_token_id": policy.tokenizer.pad_id}
    _write_json(folder / "generation_config.json", generation)
    policy.tokenizer.save(folder, prompt_style=policy.prompt_style)
    _save_weights(policy.model, folder, max_shard_bytes)


def state_tensors(model: Decoder) -> dict[str, Tensor]:
    """The weights under their checkpoint names: views of the parameters, shaped as in the checkpoint."""
    params = {name: param.detach() for name, param in model.named_parameters()}
    return {spec.name: spec.view(params) for spec in tensor_specs(model.config)}


def _save_weights(model: Decoder, folder: Path, limit: int) -> None:
    if limit < 1:
        raise ValueError(f"save: max_shard_bytes must be at least 1, got {limit}")
    for old in folder.iterdir():  # weights of an earlier save: a single file would win over a new index
        if old.name in (WEIGHTS, INDEX) or SHARDS.fullmatch(old.name):
            old.unlink()
    tensors = state_tensors(model)
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= tensor.nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WEIGHTS]
    else:
        table = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})
    for file, names in zip(files, shards, strict=True):  # one at a time: a GPU's weights cost one shard of host memory
        save_file({name: tensors[name].cpu() for name in names}, str(folder / file), metadata={"format": "pt"})


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
    except LocalEntryNotFoundError as error:  # no connection, or HF_HUB_OFFLINE=1, and not in the cache either
        raise UserError(
            f"model {path!r}: no such folder, not in the Hugging Face cache, and the hub cannot be reached; give the "
            f"folder of a copy, or fetch it once while online (hf download {path}; HF_HUB_OFFLINE must not be set)"
        ) from error
    except (OSError, ValueError) as error:  # what else the hub client raises: no such name, not allowed, disk full
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {path!r}: no such folder, and it could not be fetched from the Hugging Face hub ({reason}); "
            "check the name and your access to it, or give the folder of a copy"
        ) from error


def _load_tokenizer(folder: Path, config: ModelConfig, generation: dict[str, Any]) -> Tokenizer:
    settings = _read_json(folder / "tokenizer_config.json", required=False)
    special = _read_json(folder / "special_tokens_map.json", required=False)
    names = ["special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE]
    names += [file.relative_to(folder).as_posix() for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    eos = _end_ids(generation, config, folder)
    pad = generation.get("pad_token_id", config.pad_id)
    return Tokenizer(
        _read_text(folder / "tokenizer.json"),
        {**special, **settings},
        files={name: _read_text(folder / name) for name in names if (folder / name).is_file()},
        eos_id=eos[0] if eos else None,
        pad_id=pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else None,
        where=str(folder / "tokenizer.json"),
    )


def _end_ids(generation: dict[str, Any], config: ModelConfig, folder: Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json; () where neither names one."""
    try:
        return token_ids(generation, "eos_token_id") or config.eos_ids
    except UserError as error:
        raise UserError(f"{folder / 'generation_config.json'}: {error}") from error


def _load_weights(model: Decoder, folder: Path) -> None:
    specs = {spec.name: spec for spec in tensor_specs(model.config)}
    older = {spec.name: spec for spec in tensor_specs(model.config, split=True)}
    seen: set[str] = set()
    files = _weight_files(folder)
    for file, promised in files:
        names = _load_file(model, file, specs | older)
        missing = sorted(promised - names)
        if missing:
            raise UserError(
                f"{file}: tensor {missing[0]} is missing although {INDEX} lists it here; download the shard again"
            )
        seen |= names
    if seen & (older.keys() - specs.keys()):
        specs = older
    absent = [name for name in specs if name not in seen]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        expected = list(specs[absent[0]].shape)
        raise UserError(
            f"{folder}: tensor {absent[0]} of shape {expected}{more} expected by config.json, got no such tensor in "
            "the weight files; the weights belong to another config"
        )
    if model.config.tie_embeddings and TIED_HEAD in seen:
        _check_tied_head(model, next(file for file, names in files if not names or TIED_HEAD in names))


def _check_tied_head(model: Decoder, file: Path) -> None:
    """Some writers store the tied head. transformers 4 drops one that differs from the embedding, 5 uses it."""
    with safe_open(file, framework="pt") as source:
        head = source.get_tensor(TIED_HEAD)
    if not torch.equal(head.to(model.device, model.dtype), model.embed):
        raise UserError(
            f"{file}: tensor {TIED_HEAD} differs from model.embed_tokens.weight although config.json ties them; set "
            "tie_word_embeddings to false to use it, or remove the tensor"
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
    params: dict[str, Tensor] = dict(model.named_parameters())
    if not file.is_file():
        raise UserError(f"{file}: listed in {INDEX} but not there; download it again")
    try:
        with safe_open(file, framework="pt") as source:
            names = set(source.keys())
            for name in source.keys():  # noqa: SIM118  (the handle is no dict)
                spec = specs.get(name)
                if spec is None:
                    if (name == TIED_HEAD and model.config.tie_embeddings) or DERIVED.fullmatch(name):
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
                spec.view(params).copy_(source.get_tensor(name))
    except SafetensorError as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}); copy or download it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    return names


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
