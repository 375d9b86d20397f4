"""Checkpoints: out and in again, in transformers, in shards; and every fault of a folder as one clear sentence."""

import functools
import importlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pymathrl.errors import UserError
from pymathrl.models import ModelConfig, Policy, Rope, char_tokenizer, load, new_policy, save
from pymathrl.models.load import state_tensors

MODULE = importlib.import_module("pymathrl.models.load")  # the package exports a function of that name
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
)
VARIANTS = {
    "llama": CONFIG,
    "tied": replace(CONFIG, tie_embeddings=True),
    "qwen2": replace(CONFIG, model_type="qwen2", attention_bias=True),
    "qwen3": replace(CONFIG, model_type="qwen3", qk_norm=True, rope=Rope("yarn", 4.0, 16)),
}


def make(config: ModelConfig = CONFIG) -> Policy:
    policy = new_policy(config, char_tokenizer(), "compact", seed=1)
    with torch.no_grad():
        for i, param in enumerate(policy.model.parameters()):
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return policy


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    policy = make(VARIANTS[name])
    save(policy, tmp_path / "a")
    again = load(tmp_path / "a")
    assert again.config == policy.config and again.eos_ids == (1,) and again.prompt_style == "compact"
    for (key, ours), (other, theirs) in zip(
        policy.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert key == other and torch.equal(ours, theirs)
    save(again, tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_folder_loads_in_transformers(name: str, tmp_path: Path) -> None:
    policy = make(VARIANTS[name])
    save(policy, tmp_path)
    twin, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor(policy.tokenizer.encode("<think>1+2=3</think>"))
    with torch.no_grad():
        hidden = policy.model.hidden(ids, torch.tensor([0, len(ids)]))
        ours, theirs = policy.model.logits(hidden), twin(ids[None]).logits[0]
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5
    assert twin.generation_config.eos_token_id == 1 and twin.generation_config.pad_token_id == 0


def test_folder_written_by_transformers_in_shards(tmp_path: Path) -> None:
    policy = make()
    save(policy, tmp_path / "a")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    twin.save_pretrained(tmp_path / "b", max_shard_size="4KB")
    policy.tokenizer.save(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 1
    again = load(tmp_path / "b")
    for name, tensor in state_tensors(policy.model).items():
        assert torch.equal(state_tensors(again.model)[name], tensor)
    assert again.prompt_style == "plain"  # nothing says otherwise and there is no chat template


@pytest.mark.parametrize("name", VARIANTS)
def test_shards_out(name: str, tmp_path: Path) -> None:
    policy = make(VARIANTS[name])
    save(policy, tmp_path / "whole")
    save(policy, tmp_path / "a", max_shard_bytes=3000)
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    held = {file: load_file(tmp_path / "a" / file) for file in files}
    assert {key: file for file in files for key in held[file]} == index["weight_map"]
    for tensors_of_file in held.values():  # full, but no fuller than asked
        assert sum(t.nbytes for t in tensors_of_file.values()) <= 3000
    sizes = [sum(t.nbytes for t in held[file].values()) for file in files]
    assert all(a + b > 3000 for a, b in itertools.pairwise(sizes)) and sum(sizes) == index["metadata"]["total_size"]
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(held[file][key], whole[key]) for key, file in index["weight_map"].items())
    twin, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values()) and torch.equal(twin.state_dict()["model.norm.weight"], whole["model.norm.weight"])
    again = load(tmp_path / "a")
    assert all(torch.equal(tensor, whole[key]) for key, tensor in state_tensors(again.model).items())
    save(again, tmp_path / "b", max_shard_bytes=3000)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_tensor_larger_than_a_shard_is_not_cut(tmp_path: Path) -> None:
    policy = make()
    save(policy, tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-00021.safetensors"))) == 21  # one tensor each
    assert torch.equal(load(tmp_path).model.embed, policy.model.embed)
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        save(policy, tmp_path, max_shard_bytes=0)


def test_saving_over_an_older_checkpoint_leaves_none_of_its_weights(tmp_path: Path) -> None:
    """A single file wins over an index, and an index promises its shards: what is left over would be read."""
    first, second = make(), make()
    with torch.no_grad():
        second.model.embed.add_(1)
    for limit in (2**30, 3000, 5000, 2**30):
        first, second = second, first
        save(first, tmp_path, max_shard_bytes=limit)
        assert torch.equal(load(tmp_path).model.embed, first.model.embed)
    assert [path.name for path in tmp_path.glob("*model*")] == ["model.safetensors"]


def test_weights_in_memory_are_those_of_the_file_stacked(tmp_path: Path) -> None:
    """No tensor is reordered on the way: memory is the checkpoint's layout."""
    save(make(VARIANTS["qwen2"]), tmp_path)
    stored, layer = load_file(tmp_path / "model.safetensors"), load(tmp_path).model.layers[1]
    prefix = "model.layers.1."
    for param, names in (
        (layer.qkv, [f"self_attn.{x}_proj.weight" for x in "qkv"]),
        (layer.qkv_bias, [f"self_attn.{x}_proj.bias" for x in "qkv"]),
        (layer.gate_up, ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
        (layer.out, ["self_attn.o_proj.weight"]),
    ):
        assert torch.equal(param, torch.cat([stored[prefix + name] for name in names]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_copy_of_the_tied_head(dtype: torch.dtype, tmp_path: Path) -> None:
    save(make(VARIANTS["tied"]), tmp_path)
    tensors(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    tensors(tmp_path, lambda t: {key: value.to(dtype) for key, value in t.items()})
    assert load(tmp_path).model.head_weight is not None
    tensors(tmp_path, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] * 2})
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight although config.json"):
        load(tmp_path)


def test_positions_that_a_file_stores_are_left_aside(tmp_path: Path) -> None:
    save(make(), tmp_path)
    for name in ("model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        tensors(tmp_path, lambda t, name=name: {**t, name: torch.ones(4)})
    load(tmp_path)


def test_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make()
    save(policy, tmp_path / "a")
    with pytest.raises(UserError, match=r"dtype must be torch.float32 on a CPU, got torch.bfloat16.*PYMATHRL_IMPL=ref"):
        load(tmp_path / "a", dtype=torch.bfloat16)
    monkeypatch.setattr("pymathrl.ops._call.IMPL", "ref")
    low = load(tmp_path / "a", dtype=torch.bfloat16)
    assert low.model.dtype == torch.bfloat16
    save(low, tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load(tmp_path / "b")  # stored in bf16, held in fp32 on a CPU
    assert again.model.dtype == torch.float32 and torch.equal(again.model.embed, low.model.embed.float())


def test_several_end_tokens_and_padding_by_the_end_token(tmp_path: Path) -> None:
    policy = make()
    save(policy, tmp_path / "a")
    assert json.loads((tmp_path / "a/generation_config.json").read_text()) == {"eos_token_id": 1, "pad_token_id": 0}
    edit(tmp_path / "a/generation_config.json", lambda c: {**c, "eos_token_id": [3, 1], "temperature": 0.6})
    edit(tmp_path / "a/tokenizer_config.json", lambda c: {**c, "pad_token": "<eos>"})
    again = load(tmp_path / "a")
    assert again.eos_ids == (3, 1) and again.tokenizer.pad_id == again.tokenizer.eos_id == 1
    save(again, tmp_path / "b")
    twice = load(tmp_path / "b")
    assert twice.eos_ids == (3, 1) and twice.tokenizer.pad_id == 1 and twice.generation["temperature"] == 0.6


def test_prompt_style_follows_the_chat_template(tmp_path: Path) -> None:
    save(make(), tmp_path)
    edit(tmp_path / "tokenizer_config.json", lambda c: {k: v for k, v in c.items() if k != "prompt_style"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load(tmp_path).prompt_style == "chat"


def test_without_generation_config_the_end_tokens_are_those_of_the_config(tmp_path: Path) -> None:
    save(make(), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path / "config.json", lambda c: {**c, "eos_token_id": [2, 1], "pad_token_id": -1})
    policy = load(tmp_path)
    assert policy.eos_ids == (2, 1) and policy.generation == {} and policy.tokenizer.pad_id == 0
    edit(tmp_path / "config.json", lambda c: {**c, "eos_token_id": None})
    assert load(tmp_path).eos_ids == (1,)  # the tokenizer's


def test_every_file_of_the_tokenizer_survives(tmp_path: Path) -> None:
    """Named templates, special tokens that only special_tokens_map.json names, and tokens that tokenizer.json lacks."""
    first, second = tmp_path / "a", tmp_path / "b"
    save(make(), first)
    (first / "additional_chat_templates").mkdir()
    (first / "additional_chat_templates/tool_use.jinja").write_text("tools: {{ messages[0].content }}")
    (first / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    (first / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<think>"}}))
    (first / "added_tokens.json").write_text(json.dumps({"<extra>": 30}))
    save(load(first), second)
    assert sorted(p.relative_to(first) for p in first.rglob("*")) == sorted(
        p.relative_to(second) for p in second.rglob("*")
    )
    for folder in (first, second):
        tokenizer = load(folder).tokenizer
        assert tokenizer.encode("1<extra>")[1:] == [30] and len(tokenizer) == 31
        assert tokenizer.chat([{"role": "user", "content": "1"}]) == "<think>1"
        assert tokenizer.chat([{"role": "user", "content": "1"}], template="tool_use") == "tools: 1"
    theirs = transformers.AutoTokenizer.from_pretrained(second)
    assert theirs.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False) == "<think>1"


def test_vocabulary_must_hold_the_tokenizer() -> None:
    with pytest.raises(ValueError, match="vocab_size must be >= the tokenizer's 30 tokens, got 16"):
        new_policy(replace(CONFIG, vocab_size=16), char_tokenizer())


def edit(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def tensors(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def shard(folder: Path, listed: str, held: str) -> None:
    """Moves all weights into one shard whose index lists `listed` where the file holds `held`."""
    content = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(content, folder / "one.safetensors")
    names = [listed if name == held else name for name in content]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")})
    )


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"expected a file config.json, got none"),
    "config cut off": (lambda f: truncate(f / "config.json", 0.5), r"config.json: not valid JSON: .* at line \d+"),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json: expected a JSON object, got list",
    ),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as text"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"expected a file tokenizer.json, got none"),
    "tokenizer cut off": (lambda f: truncate(f / "tokenizer.json", 0.5), r"tokenizer.json: not a tokenizer.json"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "expected model.safetensors or .*index.json, got neither",
    ),
    "weights cut off": (
        lambda f: truncate(f / "model.safetensors", 0.7),
        "model.safetensors: not a complete safetensors",
    ),
    "header cut off": (
        lambda f: truncate(f / "model.safetensors", 0.001),
        "model.safetensors: not a complete safetensors",
    ),
    "weights empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors: not a complete safetensors",
    ),
    "tensor missing": (
        lambda f: tensors(f, lambda t: {k: v for k, v in t.items() if k != UP}),
        rf"tensor {UP} of shape \[24, 16\] expected by config.json, got no such tensor",
    ),
    "many missing": (lambda f: tensors(f, lambda t: dict(list(t.items())[:3])), r"and 17 more expected by config.json"),
    "tensor unknown": (
        lambda f: tensors(f, lambda t: {**t, "model.layers.1.mlp.upp_proj.weight": t[UP].clone()}),
        rf"upp_proj.weight is not part of this architecture \(llama\); did you mean '{UP}'",
    ),
    "shape": (
        lambda f: tensors(f, lambda t: {**t, UP: t[UP].T.contiguous()}),
        rf"tensor {UP}: expected shape \[24, 16\] from config.json, got \[16, 24\]",
    ),
    "dtype": (
        lambda f: tensors(f, lambda t: {**t, UP: t[UP].to(torch.int8)}),
        rf"tensor {UP}: expected dtype F32, BF16, F16, got I8; quantised checkpoints are not read",
    ),
    "layers in config": (lambda f: edit(f / "config.json", lambda c: {**c, "num_hidden_layers": 3}), "model.layers.2"),
    "shard missing": (
        lambda f: (shard(f, UP, UP), (f / "one.safetensors").unlink()),
        "one.safetensors: listed in model.safetensors.index.json but not there",
    ),
    "shard without its tensor": (
        lambda f: shard(f, "model.lost.weight", UP),
        "one.safetensors: tensor model.lost.weight is missing although",
    ),
    "index": (
        lambda f: (shard(f, UP, UP), (f / "model.safetensors.index.json").write_text("{}")),
        "weight_map must be an object",
    ),
    "index leaves the folder": (
        lambda f: (
            shard(f, UP, UP),
            (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "../x.safetensors"}})),
        ),
        "expected a file in the same folder",
    ),
    "architecture": (
        lambda f: edit(f / "config.json", lambda c: {**c, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}),
        "architecture GPT2LMHeadModel .* is not supported; supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3",
    ),
    "end token": (
        lambda f: edit(f / "generation_config.json", lambda c: {**c, "eos_token_id": 99}),
        r"eos_token_id must lie in 0..31, got \[99\]",
    ),
    "end token no number": (
        lambda f: edit(f / "generation_config.json", lambda c: {**c, "eos_token_id": "x"}),
        "eos_token_id must be an integer or a list of integers, got 'x'",
    ),
    "prompt style": (
        lambda f: edit(f / "tokenizer_config.json", lambda c: {**c, "prompt_style": "short"}),
        "prompt_style must be one of compact, plain, chat, got 'short'",
    ),
    "foreign tokenizer": (
        lambda f: (
            tensors(f, lambda t: {k: v[:16] if v.shape == (32, 16) else v for k, v in t.items()}),
            edit(f / "config.json", lambda c: {**c, "vocab_size": 16}),
        ),
        "30 tokens do not fit the model's vocab_size of 16",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "good"
    save(make(), folder)
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_file_and_what_was_expected(name: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    break_it, message = FAULTS[name]
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")

    def refused(*_: object, **__: object) -> str:
        raise OSError("401 Client Error\nRepository Not Found")

    monkeypatch.setattr(MODULE, "snapshot_download", refused)
    for name, message in {
        "builtin:tyni": "no such built-in model; did you mean 'builtin:tiny'",
        str(tmp_path / "file"): "expected a folder with config.json and model.safetensors, got a file",
        str(tmp_path / "none"): "no such folder; give a model folder, a hub name",
        "./models/none": "no such folder",
        "org/name": r"not be fetched from the Hugging Face hub \(401 Client Error\); check the name and your access",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["offline", "no network"])
def test_a_hub_name_without_a_network(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, at an empty cache: one sentence with the model's name and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", setting == "offline")
    client = functools.partial(
        huggingface_hub.snapshot_download, cache_dir=tmp_path, endpoint="http://127.0.0.1:9", etag_timeout=1
    )
    monkeypatch.setattr(MODULE, "snapshot_download", client)
    with pytest.raises(UserError) as caught:
        load("org/name")
    assert str(caught.value) == (
        "model 'org/name': no such folder, not in the Hugging Face cache, and the hub cannot be reached; give the "
        "folder of a copy, or fetch it once while online (hf download org/name; HF_HUB_OFFLINE must not be set)"
    )


def test_builtin_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE.BUILTIN, "builtin:none", "none")
    with pytest.raises(UserError, match=r"'builtin:none': its files are not in .*assets/none"):
        load("builtin:none")


def test_hub_name_resolves_to_the_fetched_folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "snapshot_download", lambda name, allow_patterns: str(good))
    assert load("org/name").path == "org/name"
