#!/usr/bin/env python
"""Makes the built-in model from nothing: a small decoder, trained on solutions that the task generators write.

    python scripts/make_builtin.py [--out pymathrl/assets/tiny] [--steps N]

The model learns the format (steps in <think>, the expression in <answer>) and part of the skill: each Countdown problem
comes with the one random solution its generator happened to use, so the trained policy spreads over many ways of
combining the numbers, and reinforcement learning has something to choose from. Problems that are held out for
evaluation are never generated here. The seed fixes everything: the same machine and thread count give the same weights.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from pymathrl.models import ModelConfig, char_tokenizer, new_policy, save
from pymathrl.tasks import load_task
from pymathrl.tasks.countdown import solution_text
from pymathrl.tasks.expression import Invalid, parse

SEED = 20250929
ARITHMETIC_SHARE = 0.1  # of the training rows; the rest is Countdown
LARGEST = 999  # solutions that pass through larger numbers are left out: rare, and they cost most of the capacity


def largest_number(text: str) -> int:
    return max((int(n) for n in "".join(c if c.isdigit() else " " for c in text).split()), default=0)


def rows(encode, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) without end, from the training streams of both tasks."""
    countdown, arithmetic = load_task("countdown"), load_task("arithmetic")
    rng = random.Random(seed)
    index = 0
    while True:
        index += 1
        task = arithmetic if rng.random() < ARITHMETIC_SHARE else countdown
        problem = task.train(index, seed)
        if task is countdown:
            tree = parse(problem.meta["solution"])
            if isinstance(tree, Invalid):
                raise RuntimeError(
                    f"the generator wrote {problem.meta['solution']!r}, which does not parse: {tree.reason}"
                )
            response = solution_text(tree)
        else:
            response = task.solution(problem, rng)
        if largest_number(response) <= LARGEST:
            yield encode(task.prompt(problem, "compact")), encode(response)


def batches(encode, eos: int, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids int64 [T], offsets int64 [size+1], labels int64 [T]): rows packed one after the other, as `Decoder.hidden`
    takes them; labels: the next response token, -100 elsewhere. Rows of like length are together."""
    stream, rng = rows(encode, seed), random.Random(seed + 1)
    while True:
        pool = sorted((next(stream) for _ in range(size * 16)), key=lambda row: len(row[0]) + len(row[1]))
        parts = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(parts)
        for part in parts:
            lengths = torch.tensor([0, *(len(p) + len(r) for p, r in part)])
            ids = torch.tensor([i for p, r in part for i in p + r])
            labels = torch.tensor([i for p, r in part for i in [-100] * (len(p) - 1) + [*r, eos]])
            yield ids, lengths.cumsum(0), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="pymathrl/assets/tiny")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=64, help="rows per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = char_tokenizer()
    heads = args.width // 32
    config = ModelConfig(
        vocab_size=16 * math.ceil(len(tokenizer) / 16),
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // 16 * 16,
        num_layers=args.layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=32,
        max_positions=512,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
    policy = new_policy(config, tokenizer, prompt_style="compact", seed=SEED)
    model = policy.model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name and "head" not in name:
                p.mul_(p.shape[1] ** -0.5 / 0.02)  # unit gain per layer: trains several times faster at this width
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps of {args.rows} rows", flush=True
    )
    start, mean, tokens = time.perf_counter(), 0.0, 0
    stream = batches(tokenizer.encode, tokenizer.eos_id, args.rows, SEED)
    for step, (ids, offsets, labels) in zip(range(args.steps), stream, strict=False):  # the stream has no end
        rate = args.lr * min(1.0, (step + 1) / 200) * 0.5 * (1.0 + math.cos(math.pi * step / args.steps))
        for group in adamw.param_groups:
            group["lr"] = rate
        picked = labels >= 0
        hidden = model.hidden(ids, offsets)[picked]
        loss = F.cross_entropy(hidden @ model.head_weight.T, labels[picked])
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        mean, tokens = mean + loss.item(), tokens + ids.numel()
        if (step + 1) % 200 == 0:
            seconds = time.perf_counter() - start
            left = seconds / (step + 1) * (args.steps - step - 1)
            speed = f"{tokens / seconds:,.0f} tokens/s, {left / 60:.1f} min left"
            print(f"step {step + 1}: loss {mean / 200:.4f} nats/token, {speed}", flush=True)
            mean = 0.0
        if (step + 1) % 2000 == 0:
            save(policy, Path(args.out))
    save(policy, Path(args.out))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
