"""A real model on real prompts: SmolLM2-135M-Instruct says greedily what it says in transformers.

PYMATHRL_SMOLLM2 names its folder and PYMATHRL_GSM8K a JSONL of GSM8K; without both the test is skipped and says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import pymathrl

FOLDER, QUESTIONS = os.environ.get("PYMATHRL_SMOLLM2", ""), os.environ.get("PYMATHRL_GSM8K", "")
PROMPTS, TOKENS = 20, 64

pytestmark = pytest.mark.skipif(
    not (Path(FOLDER, "model.safetensors").is_file() and Path(QUESTIONS).is_file()),
    reason="PYMATHRL_SMOLLM2 names no folder with SmolLM2-135M, or PYMATHRL_GSM8K no JSONL file",
)


@pytest.mark.timeout(1800)
def test_greedy_text_equals_transformers() -> None:
    from transformers import AutoModelForCausalLM

    policy = pymathrl.load(FOLDER, dtype=torch.float32)
    rows = [json.loads(line) for line in Path(QUESTIONS).read_text().splitlines()[:PROMPTS]]
    encode, chat = policy.tokenizer.encode, policy.tokenizer.chat
    prompts = [encode(chat([{"role": "user", "content": row["question"]}])) for row in rows]
    rollout = pymathrl.Engine(policy).generate(prompts, 1, TOKENS, temperature=0.0)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        ours = rollout.response(i).tolist()
        assert policy.tokenizer.decode(ours) == policy.tokenizer.decode(theirs[0, len(prompt) :].tolist()), i
