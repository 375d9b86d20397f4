"""A model of a few thousand random weights with the built-in tokenizer: enough to run every stage in a test."""

from __future__ import annotations

import json
from pathlib import Path

from pymathrl.models import ModelConfig, Policy, char_tokenizer, new_policy, save
from pymathrl.models.config import Mamba


def tiny_policy(seed: int = 0, width: int = 32, layers: int = 2, tie: bool = False, hybrid: bool = False) -> Policy:
    """hybrid: its second layer is attention, the others are Mamba layers that repeat x and B."""
    tokenizer = char_tokenizer()
    mamba = Mamba(2 * width, width, attention_layers=(1,), dt_rank=2) if hybrid else None
    config = ModelConfig(
        vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_layers=layers, num_heads=2, num_kv_heads=1,
        head_dim=16, max_positions=256, tie_embeddings=tie, eos_ids=(tokenizer.eos_id,), pad_id=tokenizer.pad_id,
        mamba=mamba,
    )  # fmt: skip
    return new_policy(config, tokenizer, prompt_style="compact", seed=seed)


def save_tiny(folder: Path, **options: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save(tiny_policy(**options), folder)
    return folder


SMALL_RUN = [
    "--device", "cpu", "--threads", "1", "--prompts-per-step", "4", "--samples-per-prompt", "4", "--minibatches", "2",
    "--max-new-tokens", "12", "--max-prompt-tokens", "64", "--eval-problems", "4", "--eval-samples", "8",
    "--eval-problems-during", "4", "--eval-samples-during", "2", "--lr", "1e-3",
]  # fmt: skip


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
